"""ImgiNav's experiment files: written from a configuration, and the command that reads and writes them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from experiments import F3, FILE, f3
from hypothesis import given, settings
from hypothesis import strategies as st

from autoenc.config import HEADS, Config, load_config, make_config
from autoenc.errors import InputError
from autoenc.interop import PALETTE, load_experiment, main, read_experiment, write_experiment
from autoenc.yamlfile import dump_yaml, parse_yaml, read_yaml

# There and back -------------------------------------------------------------------------------------------------------

weights = st.sampled_from([0.0, 1e-6, 0.05, 1.0]) | st.floats(0, 1e6)
columns = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=6)


def plain_path(name: str) -> str:
    """As a configuration holds it: absolute, without a slash too many."""
    return os.path.realpath(f"/nowhere/x{name}")


shares = st.integers(1, 998).map(lambda train: [train / 1000, (1000 - train) / 2000, (1000 - train) / 2000])
expressible = st.fixed_dictionaries(
    {"data.source": st.just("manifest"), "data.manifest": columns.map(plain_path),
     "data.image_size": st.sampled_from([256, 512, 768]), "loss.mse": st.floats(1e-9, 1e6),
     "model.heads": st.just(list(HEADS)), "data.palette": st.just(str(PALETTE)), "data.label_column": columns},
    optional={
        "data.image_column": columns, "data.seed": st.integers(0, 2**63 - 1), "data.split": shares,
        "data.filters": st.dictionaries(columns, st.lists(columns | st.booleans() | st.none(), min_size=1), max_size=2),
        "model.latent_channels": st.integers(1, 4096), "model.base_channels": st.integers(1, 1024),
        "model.downsampling_steps": st.integers(1, 8), "model.variational": st.booleans(),
        "model.normalize_latents": st.booleans(), "loss.l1": weights, "loss.segmentation": weights,
        "loss.classification": weights, "loss.kl": weights, "loss.standardization": weights,
        "train.epochs": st.integers(1, 100_000), "train.batch_size": st.integers(1, 65_536),
        "train.learning_rate": st.floats(1e-300, 1e300), "train.weight_decay": st.floats(0, 1e300),
        "train.seed": st.integers(0, 2**32 - 1), "train.patience": st.none() | st.integers(1, 100_000),
        "train.min_delta": st.floats(0, 1e300), "train.sample_every": st.integers(0, 100_000)})
there_and_back = settings(max_examples=60, deadline=None)


def back(document) -> Config:
    written = parse_yaml(dump_yaml(document), "written")
    return make_config(read_experiment(written, Path("/elsewhere/written.yaml")).settings, "back")


@there_and_back
@given(expressible, st.sampled_from([None, ["rgb"], ["rgb", "classification"]]), st.text(min_size=1).map(repr))
def test_a_configuration_survives_the_form(flat, heads, name):
    config = make_config(flat, "test")
    again = back(write_experiment(config, name, labels=2))
    alike = {"data.split", "model.heads", "model.normalizer", "loss.standardization"}
    mine, theirs = ({key: value for key, value in one.flat().items() if key not in alike} for one in (config, again))
    assert mine == theirs
    assert config.as_trained.identity() == again.as_trained.identity()
    assert config.data.split == pytest.approx(again.data.split, abs=1e-9)
    if heads is not None and all(head in heads for head in config.loss_weights if head in HEADS):
        fewer = config.model_copy(update={"model": config.model.model_copy(update={"heads": tuple(heads)})})
        assert back(write_experiment(fewer, name, labels=2)).heads == tuple(heads)


@there_and_back
@given(expressible)
def test_an_experiment_survives_the_way_here_and_back(flat):
    document = write_experiment(make_config(flat, "test"), "name", labels=2)
    assert write_experiment(back(document), "name", labels=2) == document


@pytest.mark.parametrize("setting", [
    {"data.source": "folder"}, {"data.source": "layouts"}, {"data.limit": 400}, {"data.fit": "crop"},
    {"data.palette_tolerance": 5.0}, {"data.allow_outside": True}, {"data.split": [0.8, 0.15, 0.05]},
    {"model.latent": "sample", "model.variational": True}, {"train.monitor": "val/psnr"}, {"train.precision": "bf16"},
    {"train.schedule": "cosine"}, {"train.ema": 0.999}, {"model.norm": "batch"}, {"model.init": "xavier"},
    {"loss.kl_reduction": "sum", "model.variational": True}, {"loss.free_bits": 0.1, "model.variational": True},
    {"loss.optimal_variance": True, "model.variational": True},
    {"model.normalizer": "learned", "model.normalize_latents": True},
    {"model.normalizer": "running", "model.normalize_latents": True}])
def test_what_the_form_cannot_say_is_named(setting):
    flat = read_experiment(f3(), FILE).settings
    write_experiment(make_config(flat, "test"), "name", labels=2)
    with pytest.raises(InputError) as error:
        write_experiment(make_config({**flat, **setting}, "test"), "name", labels=2)
    key, value = next(iter(setting.items()))
    assert str(error.value).startswith(f"{key}: {value!r}")
    assert len(str(error.value).split("\n")) == 1


def test_what_has_no_effect_needs_no_place_in_it():
    flat = read_experiment(f3(), FILE).settings
    idle = {"loss.kl_reduction": "sum", "loss.kl_schedule": "linear", "loss.kl_warmup_epochs": 3, "loss.free_bits": 1.0,
            "loss.kl_cycles": 2, "loss.optimal_variance": True, "train.stop_on_collapse": True}
    plain = write_experiment(make_config(flat, "test"), "name", labels=2)
    assert write_experiment(make_config({**flat, **idle}, "test"), "name", labels=2) == plain


def test_generated_layouts_have_no_place_in_it():
    config = make_config({"loss.segmentation": 0.1, "loss.classification": 0.1, "data.limit": 400}, "test")
    with pytest.raises(InputError) as error:
        write_experiment(config, "name")
    assert [line.split(": ")[0] for line in str(error.value).split("\n")] == ["data.source", "data.limit"]


def test_a_palette_is_told_by_its_content(tmp_path):
    flat = read_experiment(f3(), FILE).settings
    same, other = tmp_path / "same.yaml", tmp_path / "other.yaml"
    same.write_text(dump_yaml(read_yaml(PALETTE)))
    other.write_text("wall: {rgb: [200, 200, 200], class_index: 0}\n")
    written = write_experiment(make_config({**flat, "data.palette": str(same)}, "test"), "name", labels=2)
    assert back(written).data.palette == str(PALETTE)
    with pytest.raises(InputError, match=r"^data\.palette: "):
        write_experiment(make_config({**flat, "data.palette": str(other)}, "test"), "name", labels=2)


# The command ----------------------------------------------------------------------------------------------------------

def test_the_command_goes_there_and_back(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    (tmp_path / "layouts.csv").write_text("layout_path,type,is_empty\n" + "".join(
        f"images/{k}.png,{'scene' if k % 2 else 'room'},false\n" for k in range(4)))
    for k in range(4):
        (tmp_path / f"images/{k}.png").touch()
    source, ours = tmp_path / "F3.yaml", tmp_path / "best_config.yaml"
    source.write_text(F3)
    assert load_experiment(source) == read_experiment(f3(), source)
    assert main([str(source), "--from", "imginav", "--output", str(ours)]) == 0
    assert load_experiment(ours) is None
    assert "note: " in capsys.readouterr().err
    config = load_config(ours)
    assert config == make_config(read_experiment(f3(), source).settings, "F3")
    content = read_yaml(ours)
    ours.write_text(dump_yaml({**content, "provenance": {"sweep": "phase1_4_loss_tuning", "arm": "F3"}}))
    assert main([str(ours), "--to", "imginav"]) == 0
    written = parse_yaml(capsys.readouterr().out, "out")
    assert written["experiment"]["name"] == "phase1_4_loss_tuning"
    heads = {head["name"]: head.get("num_classes") for head in written["autoencoder"]["decoder"]["heads"]}
    assert heads == {"rgb": None, "segmentation": 11, "classification": 2}        # labels counted in the manifest
    assert make_config(read_experiment(written, source).settings, "back") == config


def test_the_command_says_what_is_wrong(tmp_path):
    source, ours = tmp_path / "F3.yaml", tmp_path / "layouts.yaml"
    source.write_text(F3)
    ours.write_text("train: {epochs: 1, precision: bf16}\n")
    for arguments, said in (([source, "--to", "imginav"], "is an experiment file already"),
                            ([ours, "--from", "imginav"], "is no experiment file"),
                            ([ours, "--to", "imginav"], f"{ours}: train.precision: 'bf16'"),
                            ([tmp_path / "no.yaml"], "no such file"),
                            ([source, "--output", tmp_path], "cannot be written"),
                            ([source, "--output", tmp_path / "no" / "x.yaml"], "cannot be written")):
        with pytest.raises(InputError) as error:
            main([str(argument) for argument in arguments])
        assert said in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["F3.yaml", "layouts.yaml"]


def test_the_command_loads_neither_torch_nor_ray(tmp_path):
    source = tmp_path / "F3.yaml"
    source.write_text(F3.replace("AdamW", "Adam"))
    code = ("import sys; from autoenc.errors import command; from autoenc.interop import main\n"
            "try: command(main)\n"
            "finally: assert not {'torch', 'ray'} & set(sys.modules)")
    run = subprocess.run([sys.executable, "-c", code, str(source)], capture_output=True, text=True, timeout=60)
    assert run.returncode == 2
    assert run.stderr == f"error: {source}: training.optimizer: 'Adam': input should be 'AdamW'\n"
