"""GaussVAE's configuration files: what they say as settings, what they cannot say, and the way back."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoenc.config import load_config, make_config
from autoenc.errors import InputError
from autoenc.gaussvae_config import read, resnet_filters, write
from autoenc.interop import form_of, is_experiment, load_experiment, main, read_experiment, write_experiment
from autoenc.sweep.inherit import arm_candidates, load_chain, starting_point
from autoenc.yamlfile import dump_yaml, parse_yaml, read_yaml

BASE = """
experiment_name: conv1d_base
model: {name: conv1d, latent_dim: 256, encoder_filters: [32, 64, 128], decoder_filters: [64, 32, 16],
        dropout_rates: [0.1, 0.15, 0.2]}
training: {batch_size: 32, epochs: 100, learning_rate: 0.001, beta_warmup_epochs: 50, max_beta: 0.5,
           mixed_precision: true}
data: {train_dir: npz/train, dev_dir: npz/dev, test_dir: npz/test, stats_path: stats.npz, shuffle_buffer: 1000}
callbacks: {checkpoint_every: 10, early_stopping_patience: 15, reduce_lr_patience: 5, reduce_lr_factor: 0.5,
            min_lr: 0.000001}
output_dir: outputs/conv1d_base
seed: 7
"""
RESNET = """
model:
  name: resnet_conv1d_512d
  latent_dim: 512
  encoder_filters: [32, 64, 128, 256, 256]
  decoder_filters: [256, 128, 64, 32, 16]
  encoder_kernel_sizes: [5, 5, 5, 5, 5]
  decoder_kernel_sizes: [5, 5, 5, 5, 5]
  encoder_pool_sizes: [2, 2, 2, 2, null]
  decoder_upsample_sizes: [2, 2, 2, 2, null]
  encoder_dropout_rates: [0.0, 0.0, 0.0, 0.0, 0.0]
  decoder_dropout_rates: [0.0, 0.0, 0.0, 0.0, 0.0]
  encoder_dense_units: 512
  encoder_dense_dropout: 0.0
  decoder_dense_units: [512, 16384]
  decoder_reshape_target: [32, 512]
training: {batch_size: 16, max_beta: 0.0, mixed_precision: false}
"""
FILE = Path("/data/conv1d_base.yaml")


def base(text: str = BASE, **changes):
    """The example with other values; dots in keys are written ``__``; ``...`` takes a key out."""
    content = parse_yaml(text, "base")
    for key, value in changes.items():
        *place, last = key.split("__")
        section = content
        for part in place:
            section = section.setdefault(part, {})
        if value is ...:
            del section[last]
        else:
            section[last] = value
    return content


def read_config(content, path: Path = FILE):
    return make_config(read_experiment(content, path).settings, "test")


def refused(content) -> str:
    with pytest.raises(InputError) as error:
        read_experiment(content, FILE)
    assert all(line.startswith(f"{FILE}: ") for line in str(error.value).split("\n"))
    return str(error.value)


def test_a_file_is_read_whole():
    experiment = read_experiment(base(), FILE)
    assert experiment.name == "conv1d_base" and (experiment.classes, experiment.labels) == (None, None)
    assert make_config(experiment.settings, "base") == make_config({
        "data.source": "splats", "data.manifest": "/data/npz", "data.splats": 512, "data.curve": "morton",
        "model.kind": "conv1d", "model.latent_dim": 256, "model.encoder_filters": [32, 64, 128],
        "model.decoder_filters": [64, 32, 16], "model.dropout_rates": [0.1, 0.15, 0.2], "model.variational": True,
        "model.pool": "mean", "model.splat_target": "raw", "model.norm": "batch", "model.init": "xavier",
        "loss.mse": 0.0, "loss.splats": 1.0, "loss.group_reduction": "sum", "loss.kl": 0.5, "loss.kl_reduction": "mean",
        "loss.kl_schedule": "linear", "loss.kl_warmup_epochs": 50, "train.epochs": 100, "train.batch_size": 32,
        "train.learning_rate": 1e-3, "train.weight_decay": 0.0, "train.patience": 15, "train.seed": 7}, "expected")


def test_what_is_absent_is_as_in_the_source():
    experiment = read_experiment({"model": {}, "training": {}}, FILE)
    config = make_config(experiment.settings, "test")
    assert experiment.name == "conv1d_base"              # the file's
    assert (config.model.kind, config.model.latent_dim, config.data.manifest) == ("conv1d", 256, None)
    assert (config.train.batch_size, config.train.epochs, config.train.learning_rate) == (32, 100, 1e-3)
    assert (config.loss.kl, config.loss.kl_warmup_epochs, config.train.patience) == (1.0, 50, 15)
    assert "train.seed" not in experiment.settings


@pytest.mark.parametrize(("beta", "warmup", "schedule"), [
    (1.0, 50, ("linear", 50)), (0.1, 1, ("linear", 1)), (1.0, 0, ("constant", 0)), (0.0, 50, ("constant", 0)),
    (0, 0, ("constant", 0))])
def test_the_warm_up_of_the_kl(beta, warmup, schedule):
    config = read_config(base(training__max_beta=beta, training__beta_warmup_epochs=warmup))
    assert (config.loss.kl_schedule, config.loss.kl_warmup_epochs) == schedule
    assert config.loss.kl == beta and config.model.variational
    assert config.counted_from == (warmup + 1 if beta else 1)


def test_a_resnet():
    experiment = read_experiment(base(RESNET), FILE)
    config = make_config(experiment.settings, "test")
    assert (config.model.kind, config.model.base_channels, config.model.latent_dim) == ("resnet1d", 32, 512)
    assert config.loss_weights == {"splats": 1.0} and config.train.batch_size == 16
    filters = next(notice for notice in experiment.notices if "encoder_filters" in notice)
    assert "32-64-128-128-128 and 128-128-128-64-32 channels" in filters
    alike = base(RESNET, model__encoder_filters=[32, 64, 128, 128, 128],
                 model__decoder_filters=[128, 128, 128, 64, 32])
    assert not any("channels" in notice for notice in read_experiment(alike, FILE).notices)


@pytest.mark.parametrize("channels", [1, 16, 32])
def test_the_channels_of_a_resnet_are_those_of_the_model(channels):
    config = read_config(base(RESNET, model__encoder_filters=[channels]))
    assert tuple(map(tuple, resnet_filters(channels))) == config.splat_filters


@pytest.mark.parametrize(("name", "kind"), [
    ("conv1d", "conv1d"), ("conv1d_512d_beta0.1", "conv1d"), ("Conv1D", "conv1d"), ("resnet_conv1d_512d", "resnet1d"),
    ("resnet1d", "resnet1d"), ("ResNetConv1D", "resnet1d")])
def test_a_name_says_the_kind(name, kind):
    assert read_config(base(model__name=name)).model.kind == kind


def test_what_has_no_effect_is_told_in_one_notice():
    first, *others = read_experiment(base(), FILE).notices
    assert all(notice.startswith(f"{FILE}: ") for notice in (first, *others))
    assert all(key in first for key in ("data.stats_path", "data.shuffle_buffer", "callbacks.checkpoint_every",
                                        "output_dir gives way to --output"))
    for words in ("mixed_precision", "reduce_lr_patience", "early_stopping_patience", "below /data/npz"):
        assert len([notice for notice in others if words in notice]) == 1
    ours = read_experiment(base(RESNET, model__dropout_rates=[0.5]), FILE).notices[0]
    assert "model.dropout_rates" in ours and "model.encoder_pool_sizes" in ours and "kernel" not in ours
    conv1d = read_experiment(base(model__encoder_kernel_sizes=[7, 7, 7]), FILE).notices[0]
    assert "model.encoder_kernel_sizes" in conv1d                        # nor there, where conv1d does not read it
    quiet = base(data=..., output_dir=..., training__mixed_precision=False,
                 callbacks={"reduce_lr_patience": 100, "early_stopping_patience": 100})
    (notice,) = read_experiment(quiet, FILE).notices
    assert "images are generated" in notice
    assert read_config(quiet).train.patience is None                     # as many epochs as there are


@pytest.mark.parametrize(("changes", "said"), [
    ({"model__name": "pointnet"}, "model.name: 'pointnet': should begin with 'conv1d' (model.kind conv1d) or 'resnet' "
                                  "(model.kind resnet1d)"),
    ({"model__latent_dims": 256}, "unknown key 'model.latent_dims' (did you mean 'latent_dim'?)"),
    ({"training__beta_warmup": 5}, "(did you mean 'beta_warmup_epochs'?)"),
    ({"optimizer": "adam"}, "unknown key 'optimizer'"),
    ({"callbacks__early_stopping": 5}, "(did you mean 'early_stopping_patience'?)"),
    ({"model__latent_dim": 0}, "model.latent_dim: 0: input should be greater than or equal to 1"),
    ({"model__encoder_filters": []}, "model.encoder_filters: []"),
    ({"model__encoder_filters": [32, 0]}, "model.encoder_filters.1: 0"),
    ({"model__dropout_rates": [0.1, 0.2, 1.0]}, "model.dropout_rates.2: 1.0"),
    ({"training__epochs": 0}, "training.epochs: 0: input should be greater than or equal to 1"),
    ({"training__max_beta": -1}, "training.max_beta: -1.0"),
    ({"training__beta_warmup_epochs": -1}, "training.beta_warmup_epochs: -1"),
    ({"training__learning_rate": "fast"}, "training.learning_rate: 'fast'"),
    ({"callbacks__early_stopping_patience": 0}, "callbacks.early_stopping_patience: 0"),
    ({"seed": -1}, "seed: -1"), ({"seed": 1.5}, "seed: 1.5"),
    ({"model": 3}, "model: 3: should be a mapping"),
    ({"data__dev_dir": "other/dev"}, "data.train_dir: 'npz/train', dev_dir: 'other/dev', test_dir: 'npz/test': should "
                                     "be three folders side by side"),
    ({"data__dev_dir": "npz/train"}, "should be three folders side by side"),
    ({"data__test_dir": ...}, "should be three folders side by side"),
    ({"data__train_dir": "~nobody_here/train", "data__dev_dir": "~nobody_here/dev", "data__test_dir":
      "~nobody_here/test"}, "data.train_dir: '~nobody_here'"),
])
def test_what_cannot_be_done_here_is_an_error_that_names_it(changes, said):
    assert said in refused(base(**changes))


@pytest.mark.parametrize(("changes", "said"), [
    ({"model__decoder_kernel_sizes": [5, 5, 5, 5, 3]}, "model.decoder_kernel_sizes: (5, 5, 5, 5, 3): should be 5"),
    ({"model__encoder_dropout_rates": [0.1, 0, 0, 0, 0]}, "model.encoder_dropout_rates: (0.1, 0"),
    ({"model__encoder_filters": [2048]}, "model.encoder_filters.0: 2048")])
def test_what_a_resnet_cannot_be_here(changes, said):
    assert said in refused(base(RESNET, **changes))


def test_several_problems_are_told_together():
    assert len(refused(base(training__epochs=0, training__max_beta=-1, data__dev_dir="x/y")).split("\n")) == 3


@pytest.mark.parametrize(("content", "expected"), [
    (base(), "gaussvae"), (base(RESNET), "gaussvae"), ({"model": 1, "training": None}, "gaussvae"),
    ({"experiment": {}, "training": {}}, "imginav"), ({"autoencoder": {}, "training": {}, "model": {}}, "imginav"),
    ({"model": {}}, None), ({"training": {}}, None), ({"model": {}, "train": {}}, None),
    ({"model": {}, "training": {}, "loss": {}}, None), ({"config": {"model": {}}, "training": {}}, None),
    ({"name": "sweep", "model": {}, "training": {}}, None), (None, None), (["model", "training"], None)])
def test_which_files_are_in_this_form(content, expected):
    assert form_of(content) == expected and is_experiment(content) == (expected is not None)


# There and back -------------------------------------------------------------------------------------------------------

filters = st.lists(st.integers(1, 65_536), min_size=3, max_size=3)
folders = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=6).filter(
    lambda name: not name.endswith(".csv")).map(lambda name: os.path.realpath(f"/nowhere/x{name}"))


@st.composite
def expressible(draw):
    said = draw(st.fixed_dictionaries({}, optional={
        "data.manifest": folders, "model.latent_dim": st.integers(1, 65_536), "train.seed": st.integers(0, 2**32 - 1),
        "train.batch_size": st.integers(2, 65_536), "train.learning_rate": st.floats(1e-300, 1e300),
        "train.patience": st.none() | st.integers(1, 100_000), "loss.kl": st.just(0.0) | st.floats(0, 1e6),
        "train.sample_every": st.integers(0, 9), "loss.kl_cycles": st.integers(1, 9)}))
    said["train.epochs"] = draw(st.integers(2, 100_000))
    if draw(st.booleans()):
        said |= {"loss.kl_schedule": "linear", "loss.kl_warmup_epochs": draw(st.integers(1, said["train.epochs"] - 1))}
    if draw(st.booleans()):
        said |= {"model.kind": "resnet1d", "model.base_channels": draw(st.integers(1, 1024))}
    else:
        rates = st.lists(st.floats(0, 1, exclude_max=True), min_size=3, max_size=3)
        said |= {"model.kind": "conv1d", "model.encoder_filters": draw(filters), "model.decoder_filters": draw(filters),
                 "model.dropout_rates": draw(rates)}
    return make_config({
        "data.source": "splats", "data.curve": "morton", "model.variational": True, "model.norm": "batch",
        "model.init": "xavier", "loss.mse": 0.0, "loss.splats": 1.0, "train.weight_decay": 0.0, **said}, "test")


there_and_back = settings(max_examples=80, deadline=None)


def back(document):
    written = parse_yaml(dump_yaml(document), "written")
    return read_config(written, Path("/elsewhere/written.yaml"))


@there_and_back
@given(expressible(), st.text(min_size=1).map(repr))
def test_a_configuration_survives_the_form(config, name):
    again = back(write(config, name))
    assert again.identity() == config.identity()
    assert again.counted_from == config.counted_from
    for part in ("data", "model"):
        assert getattr(again, part) == getattr(config, part)
    alike = {"train.sample_every", "train.patience"}
    mine, theirs = ({key: value for key, value in one.flat().items() if key.startswith("train.") and key not in alike}
                    for one in (config, again))
    assert mine == theirs
    never = config.train.patience is None or config.train.patience >= config.train.epochs
    assert again.train.patience == (None if never else config.train.patience)


@there_and_back
@given(expressible())
def test_a_document_survives_the_way_here_and_back(config):
    document = write(config, "name")
    assert write(back(document), "name") == document


SOUND = {"model": {"name": "conv1d"}, "training": {}}


@pytest.mark.parametrize("setting", [
    {"data.splats": 256}, {"data.curve": "hilbert"}, {"data.image_size": 128}, {"data.limit": 500},
    {"data.refine": 10}, {"data.generated": "layouts"}, {"data.split": [0.8, 0.15, 0.05]}, {"data.seed": 1},
    {"model.pool": "none"}, {"model.splat_target": "canonical"}, {"model.norm": "group"}, {"model.init": "default"},
    {"model.latent": "sample"}, {"model.normalize_latents": True}, {"loss.splats": 0.5}, {"loss.mse": 1.0},
    {"loss.group_reduction": "mean"}, {"loss.kl_reduction": "sum"}, {"loss.free_bits": 0.1},
    {"loss.optimal_variance": True}, {"train.weight_decay": 0.01}, {"train.precision": "bf16"},
    {"train.schedule": "cosine"}, {"train.ema": 0.999}, {"train.monitor": "val/psnr"}, {"train.min_delta": 0.1},
    {"train.stop_on_collapse": True}])
def test_what_the_form_cannot_say_is_named(setting):
    flat = read_experiment(SOUND, FILE).settings
    write(make_config(flat, "test"), "name")
    with pytest.raises(InputError) as error:
        write(make_config({**flat, **setting}, "test"), "name")
    key, value = next(iter(setting.items()))
    assert str(error.value).startswith(f"{key}: {value!r} has no place in GaussVAE's form")
    assert len(str(error.value).split("\n")) == 1


def test_more_that_the_form_cannot_say():
    flat = read_experiment(SOUND, FILE).settings
    for setting, said in (({"model.variational": False}, "model.variational: False has no place"),
                          ({"data.manifest": "/data/splats.csv"}, "data.manifest: '/data/splats.csv' has no place"),
                          ({"model.decoder_filters": [64, 32]}, "GaussVAE's conv1d has three levels"),
                          ({"loss.kl_schedule": "cyclical"}, "loss.kl_schedule: 'cyclical' has no place")):
        with pytest.raises(InputError) as error:
            write(make_config({**flat, **setting}, "test"), "name")
        assert said in str(error.value)
    with pytest.raises(InputError, match=r"model\.kind: 'conv2d' has no place in GaussVAE's form"):
        write(make_config({}, "test"), "name")
    with pytest.raises(InputError, match=r"model\.kind: 'conv1d' has no place in ImgiNav's form"):
        write_experiment(make_config(flat, "test"), "name")


def test_what_has_no_effect_needs_no_place_in_it():
    flat = read_experiment(SOUND, FILE).settings
    idle = {"model.latent_channels": 4, "model.base_channels": 8, "model.downsampling_steps": 3,
            "train.sample_every": 1, "data.cache_dir": "/cache", "loss.kl_cycles": 2}
    plain = write(make_config(flat, "test"), "name")
    assert write(make_config({**flat, **idle}, "test"), "name") == plain
    no_kl = {**flat, "loss.kl": 0.0}
    idle = {"loss.free_bits": 1.0, "loss.kl_reduction": "sum"}           # with a schedule, which is idle, too
    document = write(make_config({**no_kl, **idle}, "test"), "name")
    assert document == write(make_config(no_kl, "test"), "name")
    assert (document["training"]["max_beta"], document["training"]["beta_warmup_epochs"]) == (0.0, 0)


def test_a_written_resnet_has_all_that_it_takes_there():
    document = write(read_config(base(RESNET, model__encoder_filters=[8])), "name")
    assert set(document["model"]) == set(parse_yaml(RESNET, "resnet")["model"])
    assert all(len(document["model"][key]) == 5 for key in document["model"] if key.endswith(("filters", "sizes")))


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from([10**290, "~me/x"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | st.integers() | st.none(), inner,
                                                                max_size=3), max_leaves=5)


@st.composite
def mutated(draw):
    content = copy.deepcopy(draw(st.sampled_from([base(), base(RESNET)])))
    for _ in range(draw(st.integers(1, 4))):
        section = content
        if draw(st.booleans()):
            inner = [part for part in content.values() if isinstance(part, dict) and part]
            section = draw(st.sampled_from(inner)) if inner else content
        key = draw(st.sampled_from(list(section)))
        change = draw(st.sampled_from(["put", "drop", "add"]))
        if change == "drop":
            del section[key]
        else:
            section[key if change == "put" else draw(st.text(max_size=4) | st.integers() | st.none())] = draw(
                junk | st.sampled_from(["conv1d", "resnet", 512, 3, 0.5, True, [1, 2, 3]]))
        if not content:
            break
    return content


@settings(max_examples=250, deadline=None)
@given(mutated() | junk.filter(lambda value: isinstance(value, dict)))
def test_any_file_is_a_configuration_or_an_input_error(content):
    form_of(content)
    try:
        experiment = read(content, FILE)
        config = make_config(experiment.settings, str(FILE))
    except InputError as error:
        assert all(line.startswith(f"{FILE}: ") for line in str(error).split("\n"))
        assert len(str(error)) < 10_000
    else:
        assert config.data.source == "splats" and experiment.notices


# The command ----------------------------------------------------------------------------------------------------------

def test_the_command_goes_there_and_back(tmp_path, capsys):
    source, ours = tmp_path / "base.yaml", tmp_path / "best_config.yaml"
    source.write_text(BASE)
    assert load_experiment(source) == read_experiment(base(), source)
    assert main([str(source), "--from", "gaussvae", "--output", str(ours)]) == 0
    assert load_experiment(ours) is None
    assert "note: " in capsys.readouterr().err
    config = load_config(ours)
    assert config == load_config(source) == read_config(base(), source)
    assert config.data.manifest == str(tmp_path / "npz")
    content = read_yaml(ours)
    ours.write_text(dump_yaml({**content, "provenance": {"sweep": "splats"}}))
    for way in ([], ["--to", "gaussvae"]):                               # by itself for models of splats
        assert main([str(ours), *way]) == 0
        written = parse_yaml(capsys.readouterr().out, "out")
        assert written["experiment_name"] == "splats" and written["data"]["dev_dir"] == str(tmp_path / "npz" / "dev")
        assert read_config(written, source) == config


def test_the_command_says_what_is_wrong(tmp_path):
    source, ours = tmp_path / "base.yaml", tmp_path / "layouts.yaml"
    source.write_text(BASE)
    ours.write_text("train: {epochs: 1}\n")
    for arguments, said in (([source, "--to", "gaussvae"], "is an experiment file already"),
                            ([source, "--to", "imginav"], f"{source}: model.kind: 'conv1d' has no place in ImgiNav's"),
                            ([source, "--from", "imginav"], "is no experiment file of ImgiNav (sections experiment"),
                            ([ours, "--from", "gaussvae"], "is no experiment file of GaussVAE (sections model"),
                            ([ours, "--to", "gaussvae"], f"{ours}: model.kind: 'conv2d' has no place in GaussVAE's")):
        with pytest.raises(InputError) as error:
            main([str(argument) for argument in arguments])
        assert said in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.yaml", "layouts.yaml"]


# Wherever a configuration can be given --------------------------------------------------------------------------------

@pytest.fixture
def sweeps(tmp_path):
    """Two files, a sweep that starts from one, and a sweep with arms taken from both."""
    (tmp_path / "base.yaml").write_text("config: {train: {batch_size: 16}}")
    (tmp_path / "conv1d.yaml").write_text(BASE)
    (tmp_path / "resnet.yaml").write_text(RESNET)
    (tmp_path / "start.yaml").write_text(
        "name: start\ninherits: conv1d.yaml\nasha: false\narms: {A: {}, B: {model.pool: none}}")
    (tmp_path / "arms.yaml").write_text(
        "name: arms\ninherits: conv1d.yaml\nasha: false\nconfig: {train: {epochs: 60}}\n"
        "arms: {conv1d: {from: conv1d.yaml}, resnet: {from: resnet.yaml, hypothesis: deeper}}")
    return tmp_path


def test_a_sweep_starts_from_such_a_file(sweeps):
    (spec,) = load_chain(sweeps / "start.yaml")
    start = starting_point(spec, None)
    assert (start["model.kind"], start["loss.kl"], start["train.epochs"]) == ("conv1d", 0.5, 100)
    assert [candidate.config.model.pool for candidate in arm_candidates(spec, start)] == ["mean", "none"]
    assert [experiment.name for experiment in spec.experiments] == ["conv1d_base"] and spec.notices


def test_arms_are_taken_from_such_files(sweeps):
    (spec,) = load_chain(sweeps / "arms.yaml")
    conv1d, resnet = (candidate.config for candidate in arm_candidates(spec, starting_point(spec, None)))
    assert (conv1d.model.kind, resnet.model.kind, resnet.model.latent_dim) == ("conv1d", "resnet1d", 512)
    assert (conv1d.train.epochs, conv1d.counted_from, resnet.counted_from) == (60, 51, 1)
    assert resnet.train.seed == conv1d.train.seed == 7 and not any(key.startswith("data.") for key in spec.varied)


def test_their_warm_up_is_scaled_with_the_epochs(sweeps):
    (sweeps / "presets").mkdir()
    (sweeps / "presets" / "short.yaml").write_text("config: {train: {epochs: 3}}")
    (spec,) = load_chain(sweeps / "arms.yaml", ["short"])
    conv1d, _ = (candidate.config for candidate in arm_candidates(spec, starting_point(spec, None)))
    assert (conv1d.train.epochs, conv1d.loss.kl_warmup_epochs) == (3, 2)


def test_such_a_file_is_no_sweep(sweeps):
    with pytest.raises(InputError, match="is an experiment of GaussVAE, not a sweep"):
        load_chain(sweeps / "conv1d.yaml")
    (sweeps / "arms.yaml").write_text("name: arms\narms: {X: {from: base.yaml}}")
    with pytest.raises(InputError, match="is no experiment file of ImgiNav or GaussVAE"):
        load_chain(sweeps / "arms.yaml")
