"""ImgiNav's experiment files: what they say as settings, what they cannot say, and where they can be given."""

from __future__ import annotations

import copy

import pytest
from experiments import F3, FILE, f3
from hypothesis import given, settings
from hypothesis import strategies as st

from autoenc.config import HEADS, load_config, make_config
from autoenc.data import layouts
from autoenc.data.palette import read_palette
from autoenc.errors import InputError
from autoenc.interop import PALETTE, as_arm, check_counts, is_experiment, read_experiment
from autoenc.sweep.inherit import arm_candidates, load_chain, starting_point
from autoenc.yamlfile import parse_yaml

# Reading --------------------------------------------------------------------------------------------------------------

def test_an_experiment_is_read_whole():
    experiment = read_experiment(f3(), FILE)
    assert experiment.name == "phase1_4_AE_F3"
    assert (experiment.classes, experiment.labels) == (11, 2)
    config = make_config(experiment.settings, "F3")
    assert config == make_config({
        "data.source": "manifest", "data.manifest": "/data/layouts.csv", "data.image_column": "layout_path",
        "data.label_column": "type", "data.filters": {"is_empty": [False]}, "data.palette": str(PALETTE),
        "data.image_size": 512, "data.seed": 7, "data.split": [0.8, 0.1, 0.1],
        "model.latent_channels": 16, "model.base_channels": 32, "model.downsampling_steps": 4,
        "loss.mse": 1.0, "loss.segmentation": 0.05, "loss.classification": 0.01, "loss.standardization": 0.0,
        "train.epochs": 10, "train.batch_size": 16, "train.learning_rate": 1e-4, "train.weight_decay": 0.01,
        "train.seed": 42, "train.patience": 3, "train.min_delta": 1e-4, "train.sample_every": 5}, "expected")
    assert config.heads == HEADS


def test_its_palette_is_that_of_generated_layouts():
    palette = read_palette(str(PALETTE), 30.0)
    assert palette.classes == layouts.CLASSES
    assert (palette.colours == layouts.PALETTE).all()


def test_what_has_no_effect_is_told_in_one_notice():
    first, *others = read_experiment(f3(), FILE).notices
    assert all(notice.startswith(f"{FILE}: ") for notice in (first, *others))
    assert all(key in first for key in ("experiment.phase", "dataset.return_path", "training.num_workers",
                                        "training.shuffle", "training.early_stopping_restore_best",
                                        "training.save_interval", "experiment.save_path gives way to --output"))
    assert len([notice for notice in others if "train_split: 0.8" in notice and "0.1" in notice]) == 1
    assert len([notice for notice in others if "512 px" in notice]) == 1
    quiet = f3(experiment={"name": "x"}, dataset__return_path=...)
    for key in ("num_workers", "shuffle", "save_interval", "early_stopping_restore_best"):
        del quiet["training"][key]
    assert not any("without effect" in notice for notice in read_experiment(quiet, FILE).notices)


def test_what_is_absent_is_as_in_the_source():
    content = f3(dataset__filters=..., training__early_stopping_patience=..., training__early_stopping_min_delta=...,
                 training__weight_decay=..., training__optimizer=..., autoencoder__encoder__variational=...,
                 autoencoder__encoder__activation=..., dataset__outputs={"rgb": "image"})
    content["autoencoder"]["decoder"]["heads"] = [{"type": "RGBHead", "name": "rgb"}]
    content["training"]["loss"] = {"type": "L1Loss", "key": "rgb"}
    config = make_config(read_experiment(content, FILE).settings, "f")
    assert config.train.patience is None and config.train.min_delta == 0 and config.train.weight_decay == 0.01
    assert config.data.palette is None and config.data.label_column is None and config.data.filters == {}
    assert config.loss_weights == {"l1": 1.0}


def test_a_variational_standardised_experiment():
    losses = [{"type": "MSELoss", "key": "rgb", "target": "rgb"}, {"type": "KLDLoss", "weight": 1e-4},
              {"type": "LatentStandardizationLoss", "key": "mu", "weight": 0.1}]
    content = f3(autoencoder__encoder__variational=True, autoencoder__encoder__normalize_latents=True,
                 autoencoder__decoder__denormalize_latents=True, training__loss__losses=losses)
    experiment = read_experiment(content, FILE)
    config = make_config(experiment.settings, "f")
    assert config.model.variational and config.model.normalize_latents and config.model.normalizer == "loss"
    assert config.loss_weights == {"mse": 1.0, "kl": 1e-4, "standardization": 0.1}
    assert config.heads == HEADS                      # declared, whatever their weight
    assert any("normalize_latents" in notice for notice in experiment.notices)
    losses.pop()
    assert read_experiment(content, FILE).settings["model.normalizer"] == "exact"
    content["autoencoder"]["encoder"]["variational"] = False
    assert any("KLDLoss: without effect" in notice for notice in read_experiment(content, FILE).notices)


@pytest.mark.parametrize(("classes", "labels", "said"), [
    (10, 2, "SegmentationHead: num_classes: 11, and the data has 10 segmentation classes"),
    (11, 3, "ClassificationHead: num_classes: 2, and the data has 3 labels"), (11, 2, None)])
def test_declared_counts_must_be_those_of_the_data(classes, labels, said):
    experiment = read_experiment(f3(), FILE)
    if said is None:
        check_counts(experiment, classes, labels)
    else:
        with pytest.raises(InputError, match=said):
            check_counts(experiment, classes, labels)


def test_without_heads_any_data_will_do():
    content = f3(autoencoder__decoder__heads=[{"type": "RGBHead", "name": "rgb"}],
                 training__loss={"type": "MSELoss", "key": "rgb", "target": "rgb"})
    check_counts(read_experiment(content, FILE), 0, 0)


@pytest.mark.parametrize(("content", "expected"), [
    (parse_yaml(F3, "F3"), True), ({"experiment": 1, "training": None}, True), ({"training": {}}, False),
    ({"config": {"train": {"epochs": 1}}}, False), ({"name": "phase1_1", "arms": {}}, False), (None, False),
    ([], False), ("experiment", False)])
def test_which_files_are_experiments(content, expected):
    assert is_experiment(content) is expected


# What is refused ------------------------------------------------------------------------------------------------------

def refused(content) -> str:
    with pytest.raises(InputError) as error:
        read_experiment(content, FILE)
    assert all(line.startswith(f"{FILE}: ") for line in str(error.value).split("\n"))
    return str(error.value)


@pytest.mark.parametrize(("changes", "said"), [
    ({"training__optimizer": "Adam"}, "training.optimizer: 'Adam': input should be 'AdamW'"),
    ({"autoencoder__encoder__activation": "ReLU"}, "autoencoder.encoder.activation: 'ReLU'"),
    ({"autoencoder__decoder__norm_groups": 4}, "autoencoder.decoder.norm_groups: 4"),
    ({"autoencoder__encoder__in_channels": 4}, "autoencoder.encoder.in_channels: 4"),
    ({"training__epoch": 1}, "unknown key 'training.epoch' (did you mean 'epochs'?)"),
    ({"training__epochs": ...}, "training.epochs is missing"),
    ({"training__epochs": 0}, "training.epochs: 0: input should be greater than or equal to 1"),
    ({"training__early_stopping_patience": 0}, "training.early_stopping_patience: 0"),
    ({"training__train_split": 1.0}, "training.train_split: 1.0"),
    ({"autoencoder__encoder__latent_channels": 8},
     "autoencoder.encoder.latent_channels: 8 and autoencoder.decoder.latent_channels: 16 disagree"),
    ({"autoencoder__decoder__base_channels": 64},
     "autoencoder.encoder.base_channels: 32 and autoencoder.decoder.base_channels: 64 disagree"),
    ({"autoencoder__decoder__upsampling_steps": 3},
     "autoencoder.encoder.downsampling_steps: 4 and autoencoder.decoder.upsampling_steps: 3 disagree"),
    ({"autoencoder__encoder__normalize_latents": True},
     "autoencoder.encoder.normalize_latents: True and autoencoder.decoder.denormalize_latents: False disagree"),
    ({"autoencoder__decoder__variational": True}, "variational: True disagree"),
    ({"autoencoder__decoder__heads__0__final_activation": "sigmoid"}, "final_activation: 'sigmoid' should be tanh"),
    ({"autoencoder__decoder__heads__0__final_activation": None}, "final_activation: None should be tanh"),
    ({"autoencoder__decoder__heads__1__final_activation": "softmax"}, "final_activation: 'softmax' should be null"),
    ({"autoencoder__decoder__heads__0__out_channels": 4}, "heads.0: RGBHead: out_channels: 4 should be 3"),
    ({"autoencoder__decoder__heads__1__out_channels": 10}, "num_classes: 11, out_channels: 10"),
    ({"autoencoder__decoder__heads__1__name": "seg"}, "name: 'seg' should be 'segmentation'"),
    ({"autoencoder__decoder__heads__1__type": "DepthHead"}, "autoencoder.decoder.heads.1.type: 'DepthHead'"),
    ({"autoencoder__decoder__heads__2": {"type": "RGBHead", "name": "rgb"}}, "RGBHead is given 2 times"),
    ({"autoencoder__decoder__heads": []}, "autoencoder.decoder.heads: lacks RGBHead"),
    ({"dataset__outputs__label": ...}, "dataset.outputs: lacks label"),
    ({"dataset__outputs__segmentation": "mask_path"},
     "dataset.outputs.segmentation: 'mask_path' should be the column of rgb, 'layout_path'"),
    ({"dataset__outputs__depth": "depth_path"}, "unknown key 'dataset.outputs.depth'"),
    ({"training__loss__losses__0__type": "PerceptualLoss"}, "training.loss.losses.0.type: 'PerceptualLoss'"),
    ({"training__loss__losses__0__weight": -1}, "training.loss: MSELoss (rgb): weight: -1.0"),
    ({"training__loss__losses__0__wieght": 1}, "(did you mean 'weight'?)"),
    ({"training__loss__losses__2__target": "type"}, "key: 'classification', target: 'type' should be key: "),
    ({"training__loss__losses__2": {"type": "MSELoss", "key": "rgb", "target": "rgb"}},
     "training.loss.losses.2: MSELoss: the same loss as training.loss.losses.0"),
    ({"training__loss__losses": []}, "training.loss.losses: []"),
    ({"autoencoder__decoder__heads__1": ..., "training__loss__type": "CompositeLoss"}, "has no head 'segmentation'"),
    ({"dataset__transform": {"type": "Compose", "transforms": [{"type": "Resize", "size": [256, 128]}]}},
     "Resize: size: [256, 128] should be a square's"),
    ({"dataset__manifest": 3}, "dataset.manifest: 3"),
    ({"training": 3}, "training: 3: should be a mapping"),
])
def test_what_cannot_be_done_here_is_an_error_that_names_it(changes, said):
    if changes.get("autoencoder__decoder__heads__1") is ...:
        content = f3()
        del content["autoencoder"]["decoder"]["heads"][1]
    else:
        content = f3(**changes)
    assert said in refused(content)


def test_several_problems_are_told_together():
    said = refused(f3(training__optimizer="SGD", autoencoder__encoder__norm_groups=4, dataset__manifes="x"))
    assert len(said.split("\n")) == 3
    said = refused(f3(autoencoder__decoder__latent_channels=8, autoencoder__decoder__upsampling_steps=3,
                      training__batch_size=0, training__loss__losses__0__key="rbg"))
    assert len(said.split("\n")) == 4


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from([10**290, "~me/x"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | st.integers() | st.none(), inner,
                                                                max_size=3), max_leaves=5)
WORDS = ("type", "name", "key", "target", "weight", "losses", "size", "heads", "SegmentationHead", "KLDLoss", "rgb",
         "Compose", "Resize", 512, 3, True)


def places(value, place=()):
    """Every place in nested mappings and lists."""
    yield place
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*place, key))


@st.composite
def mutated(draw):
    content = f3(dataset__transform={"type": "Compose", "transforms": [
        {"type": "Resize", "size": [256, 256], "interpolation": "nearest"}, {"type": "ToTensor"},
        {"type": "Normalize", "mean": [0.5] * 3, "std": [0.5] * 3}]})
    for _ in range(draw(st.integers(1, 4))):
        *place, last = draw(st.sampled_from([place for place in places(content) if place]))
        section = content
        for part in place:
            section = section[part]
        change = draw(st.sampled_from(["put", "drop", "add", "move"]))
        if change == "put":
            section[last] = draw(junk | st.sampled_from(WORDS))
        elif change == "drop":
            del section[last]
        elif change == "move":
            section[last] = copy.deepcopy(draw(st.sampled_from([content, section, *WORDS])))
        elif isinstance(section, dict):
            section[draw(st.text(max_size=4) | st.integers() | st.none() | st.sampled_from(WORDS))] = draw(junk)
        else:
            section.append(draw(junk | st.sampled_from(section)) if section else draw(junk))
        if not content:
            break
    return content


@settings(max_examples=250, deadline=None)
@given(mutated() | junk.filter(lambda value: isinstance(value, dict)))
def test_any_file_is_an_experiment_or_an_input_error(content):
    is_experiment(content)
    try:
        experiment = read_experiment(content, FILE)
        config = make_config(experiment.settings, str(FILE))
    except InputError as error:
        assert all(line.startswith(f"{FILE}: ") for line in str(error).split("\n"))
        assert len(str(error)) < 10_000
    else:
        assert config.data.source == "manifest"
        assert experiment.notices


# Wherever a configuration can be given --------------------------------------------------------------------------------

def test_as_an_arm_it_leaves_data_seed_and_budget_to_the_sweep():
    experiment = read_experiment(f3(), FILE)
    start = make_config({"train.epochs": 3, "data.image_size": 512, "train.seed": 42}, "sweep").flat()
    arm, (notice,) = as_arm(experiment, start)
    assert arm["model.latent_channels"] == 16 and arm["loss.segmentation"] == 0.05
    assert not any(key.startswith("data.") for key in arm) and "train.epochs" not in arm and "train.seed" not in arm
    assert "train.epochs (3 here)" in notice and "data.manifest (None here)" in notice
    assert "train.seed" not in notice and "data.image_size" not in notice
    assert as_arm(experiment, {**start, **experiment.settings})[1] == []


@pytest.fixture
def sweeps(tmp_path):
    """An experiment file, a sweep that starts from it, and one with arms taken from files."""
    (tmp_path / "base.yaml").write_text("config: {train: {batch_size: 16}}")
    (tmp_path / "F3.yaml").write_text(F3)
    alone = F3.replace("weight: 0.05", "weight: 0.0").replace("weight: 0.01}", "weight: 0.0}")
    (tmp_path / "F1.yaml").write_text(alone)
    (tmp_path / "start.yaml").write_text(
        "name: start\ninherits: F3.yaml\narms: {A: {}, B: {train.batch_size: 8}}")
    (tmp_path / "arms.yaml").write_text(
        "name: arms\ninherits: F3.yaml\narms: {F1: {from: F1.yaml, hypothesis: RGB alone}, F3: {from: F3.yaml}}")
    return tmp_path


def test_an_experiment_is_a_configuration(sweeps):
    config = load_config(sweeps / "F3.yaml")
    assert config.model.latent_channels == 16 and config.data.image_size == 512
    assert config.data.manifest == str(sweeps / "layouts.csv") and config.loss.segmentation == 0.05


def test_a_sweep_starts_from_an_experiment(sweeps):
    (spec,) = load_chain(sweeps / "start.yaml")
    start = starting_point(spec, None)
    assert start["model.latent_channels"] == 16 and start["loss.classification"] == 0.01
    assert [candidate.config.train.batch_size for candidate in arm_candidates(spec, start)] == [16, 8]
    assert [experiment.name for experiment in spec.experiments] == ["phase1_4_AE_F3"] and spec.notices


def test_arms_are_taken_from_experiments(sweeps):
    (spec,) = load_chain(sweeps / "arms.yaml")
    first, third = arm_candidates(spec, starting_point(spec, None))
    assert (first.config.loss.segmentation, third.config.loss.segmentation) == (0.0, 0.05)
    assert first.hypothesis == "RGB alone" and len(spec.experiments) == 3
    assert not any(key.startswith("data.") for key in spec.varied)


@pytest.mark.parametrize(("arm", "said"), [
    ("{from: none.yaml}", r"arms\.X: from: .*none\.yaml: no such file"), ("{from: base.yaml}", "is no experiment file"),
    ("{from: 3}", "from: 3 should be the path"), ("{from: F3.yaml, train.epoch: 3}", r"train\.epoch")])
def test_an_arm_from_something_else_is_told(sweeps, arm, said):
    (sweeps / "arms.yaml").write_text(f"name: arms\ninherits: F3.yaml\narms: {{X: {arm}}}")
    with pytest.raises(InputError, match=said):
        load_chain(sweeps / "arms.yaml")


def test_an_experiment_is_no_sweep(sweeps):
    with pytest.raises(InputError, match="is an experiment of ImgiNav, not a sweep"):
        load_chain(sweeps / "F3.yaml")
