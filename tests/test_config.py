"""The typed configuration: its defaults, what it refuses and in which words, its identity, its way through a file."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoenc import figures
from autoenc.config import (
    HEADS,
    KEYS,
    SPLAT_KINDS,
    Config,
    absolute_paths,
    check_heads,
    check_values,
    flatten,
    load_config,
    make_config,
)
from autoenc.errors import InputError
from autoenc.files import append_line, canonical_json, content_hash, write_atomic
from autoenc.trajectory import trajectory_key
from autoenc.yamlfile import dump_yaml, parse_yaml

words = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=8)
weights = st.floats(0, 1e6) | st.integers(0, 10**6)
shares = st.sampled_from([[0.8, 0.1, 0.1], [0.5, 0.5, 0], [1 / 3, 1 / 3, 1 / 3], [1, 1e-9, 0]])
values = {
    "data.source": st.sampled_from(["layouts", "manifest", "folder", "splats"]),
    "data.manifest": words.map("/".__add__),
    "data.image_column": words, "data.label_column": st.none() | words,
    "data.filters": st.dictionaries(words, st.lists(words | st.booleans() | st.integers() | st.none()), max_size=2),
    "data.palette": st.none() | words.map("/".__add__), "data.palette_tolerance": st.floats(0, 442),
    "data.image_size": st.sampled_from([256, 512, 768]), "data.fit": st.sampled_from(["crop", "pad"]),
    "data.limit": st.none() | st.integers(3, 10**7), "data.seed": st.integers(0, 2**63 - 1), "data.split": shares,
    "data.cache_dir": st.none() | words, "data.allow_outside": st.booleans(),
    "data.splats": st.sampled_from([256, 512, 768]), "data.curve": st.sampled_from(["hilbert", "morton"]),
    "data.generated": st.sampled_from(["compositions", "layouts"]), "data.refine": st.integers(0, 10_000),
    "model.kind": st.sampled_from(["conv2d", "conv1d", "resnet1d", "custom"]),
    "model.latent_dim": st.integers(1, 65_536), "model.pool": st.sampled_from(["mean", "none"]),
    "model.splat_target": st.sampled_from(["raw", "canonical", "logcov"]),
    "model.encoder_filters": st.lists(st.integers(1, 512), min_size=1, max_size=8),
    "model.decoder_filters": st.lists(st.integers(1, 512), min_size=1, max_size=8),
    "model.dropout_rates": st.lists(st.floats(0, 0.99), max_size=8),
    "model.target": st.none() | st.just("racing:Lab"),
    "model.settings": st.dictionaries(words, words | st.integers() | st.lists(st.booleans(), max_size=2), max_size=2),
    "loss.splats": weights, "loss.group_reduction": st.sampled_from(["sum", "mean"]),
    "loss.custom": st.lists(st.fixed_dictionaries({"target": st.sampled_from(["helpers:small_config", "racing:Lab"])},
                                                  optional={"weight": weights}), max_size=1),
    "model.latent_channels": st.integers(1, 4096),
    "model.base_channels": st.integers(1, 1024), "model.downsampling_steps": st.integers(1, 8),
    "model.variational": st.booleans(), "model.latent": st.sampled_from(["mean", "sample"]),
    "model.normalize_latents": st.booleans(),
    "model.normalizer": st.sampled_from(["exact", "running", "loss", "learned"]),
    "loss.standardization": st.none() | weights, "train.ema": st.none() | st.floats(1e-9, 1 - 1e-9),
    "train.schedule": st.sampled_from(["constant", "cosine", "plateau"]),
    "model.heads": st.none() | st.permutations(HEADS).map(list),
    "loss.mse": st.floats(1e-9, 1e6), "loss.l1": weights, "loss.segmentation": weights, "loss.classification": weights,
    "loss.kl": weights, "loss.kl_reduction": st.sampled_from(["mean", "sum"]),
    "loss.kl_schedule": st.sampled_from(["constant", "linear", "cyclical"]),
    "loss.kl_warmup_epochs": st.integers(1, 99), "loss.kl_cycles": st.integers(1, 50),
    "loss.free_bits": st.floats(0, 1e6), "loss.optimal_variance": st.booleans(),
    "model.norm": st.sampled_from(["group", "batch"]), "model.init": st.sampled_from(["default", "xavier", "kaiming"]),
    "train.stop_on_collapse": st.booleans(),
    "train.epochs": st.integers(100, 100_000), "train.batch_size": st.integers(2, 65_536),   # enough for all of these
    "train.learning_rate": st.floats(1e-300, 1e300), "train.weight_decay": st.floats(0, 1e300),
    "train.seed": st.integers(0, 2**32 - 1), "train.patience": st.none() | st.integers(1, 100_000),
    "train.min_delta": st.floats(0, 1e300), "train.monitor": st.sampled_from(figures.MONITORED),
    "train.precision": st.sampled_from(["fp32", "bf16", "fp16"]), "train.sample_every": st.integers(0, 100_000),
}
configs = st.fixed_dictionaries(
    {"data.manifest": values["data.manifest"], "data.image_size": values["data.image_size"]},
    optional={key: value for key, value in values.items() if key not in ("data.manifest", "data.image_size")},
).map(lambda flat: make_config({"train.epochs": 100, "loss.kl_warmup_epochs": 5, **fitting(flat)}, "test"))


def fitting(flat: dict) -> dict:
    """The settings with those altered that do not go with the kind of model."""
    kind = flat.get("model.kind", "conv2d")
    flat = {**flat, "loss.mse": flat.get("loss.mse", 1.0)}
    if flat.get("data.source") == "splats" and kind not in SPLAT_KINDS:
        flat["data.source"] = "layouts"
    if kind == "custom":
        flat["model.target"] = "racing:Lab"
    if kind in SPLAT_KINDS:
        flat |= {"data.source": "splats", "model.heads": None, "loss.segmentation": 0, "loss.classification": 0,
                 "model.dropout_rates": [0.1] * len(flat.get("model.encoder_filters", (1, 2, 3)))}
    if kind not in SPLAT_KINDS or flat.get("loss.optimal_variance"):
        flat["loss.splats"] = 0
    return flat


def test_every_setting_is_covered_here():
    assert set(values) == set(KEYS)


@settings(max_examples=150, deadline=None)
@given(configs)
def test_a_configuration_survives_yaml(config):
    content = parse_yaml(dump_yaml({"config": config.nested()}), "file")
    assert make_config(flatten(content["config"], "file"), "file") == config
    assert make_config(config.flat(), "flat") == config
    canonical_json(config.flat())


@settings(max_examples=20, deadline=None)
@given(configs)
def test_a_configuration_survives_its_file(tmp_path_factory, config):
    settings = absolute_paths(config.flat(), Path("/data"))
    config = make_config(settings, "test")
    path = tmp_path_factory.getbasetemp() / "best_config.yaml"
    path.write_text(dump_yaml({"config": config.nested(), "provenance": {"arm": "F2"}}), encoding="utf-8")
    assert load_config(path) == config


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from([10**290, "~me/x"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | st.integers() | st.none(), inner,
                                                                max_size=3), max_leaves=6)
sections = st.sampled_from(["data", "model", "loss", "train"])
leaves = st.sampled_from([key.split(".")[1] for key in KEYS]) | st.text(max_size=4) | st.integers()


@settings(max_examples=300, deadline=None)
@given(st.one_of(junk, st.dictionaries(st.sampled_from(KEYS), junk, max_size=4),
                 st.dictionaries(sections, st.dictionaries(leaves, junk, max_size=3), max_size=3)))
def test_any_settings_are_a_configuration_or_an_input_error(content):
    try:
        flat = flatten(content, "some/file.yaml")
        config = make_config(absolute_paths(flat, Path("/data"), "some/file.yaml"), "some/file.yaml")
    except InputError as error:
        assert all(line.startswith("some/file.yaml: ") for line in str(error).split("\n"))
        assert len(str(error)) < 5000
    else:
        assert config.flat()
        if config.model.kind != "custom" and not config.loss.custom:       # whose sources may not be there
            content_hash(config.identity())


@pytest.mark.parametrize(("flat", "said"), [
    ({"train.epochs": "ten"}, "f: train.epochs: 'ten': input should be a valid integer"),
    ({"train.epochs": 0}, "f: train.epochs: 0: input should be greater than or equal to 1"),
    ({"train.epochs": 3.0}, "f: train.epochs: 3.0: input should be a valid integer"),
    ({"train.epochs": True}, "f: train.epochs: True: input should be a valid integer"),
    ({"loss.mse": float("nan")}, "f: loss.mse: nan: input should be a finite number"),
    ({"loss.kl": -1}, "f: loss.kl: -1: input should be greater than or equal to 0"),
    ({"model.variational": 1}, "f: model.variational: 1: input should be a valid boolean"),
    ({"model.kind": "conv3d"}, "f: model.kind: 'conv3d': input should be 'conv2d', 'conv1d', 'resnet1d' or 'custom'"),
    ({"model.kind": "conv1d"}, "f: model.kind: 'conv1d' takes splats (data.source splats), and data.source is "
                               "'layouts'"),
    ({"data.source": "splats"}, "f: model.kind: 'conv2d' takes images, and data.source is 'splats': conv1d and resnet1d"
                                " take splats"),
    ({"model.kind": "conv1d", "data.source": "splats", "data.splats": 500},
     "f: data.splats: 500 is not divisible by 8, by which model.kind conv1d shortens the sequence"),
    ({"model.kind": "resnet1d", "data.source": "splats", "loss.segmentation": 0.1},
     "f: model.heads: ['rgb', 'segmentation']: model.kind resnet1d has rgb alone, and no loss.segmentation"),
    ({"loss.splats": 1.0}, "f: loss.splats: 1: model.kind 'conv2d' gives no splats"),
    ({"model.kind": "conv1d", "data.source": "splats", "model.encoder_filters": [8, 8]},
     "f: model.dropout_rates: [0.1, 0.15, 0.2]: should be one for each of model.encoder_filters [8, 8]"),
    ({"model.kind": "custom"}, "f: model.target: kind 'custom' needs it"),
    ({"loss.custom": [{"target": "a:mse"}]}, "f: loss.custom: 'mse': there is another term of that name"),
    ({"loss.custom": [{"target": "a:b", "wieght": 1}]}, "f: unknown key 'loss.custom.0.wieght' (did you mean 'weight'"),
    ({"model.heads": "rgb"}, "f: model.heads: 'rgb': should be a list"),
    ({"model.heads": ["segmentation"]}, "f: model.heads: ['segmentation']: lacks 'rgb'"),
    ({"model.heads": ["rgb", "rgb"]}, "f: model.heads: ['rgb', 'rgb']: names a head twice"),
    ({"data.split": [0.5, 0.2, 0.1]}, "f: data.split: [0.5, 0.2, 0.1]: should be three shares that sum to 1"),
    ({"data.split": [1, 0, 0]}, "f: data.split: [1, 0, 0]: leaves nothing to train on or to validate with"),
    ({"data.filters": {"empty": [[1]]}}, "f: data.filters.empty.0: [1]: should be a word"),
    ({"train.monitor": "val/mze"}, "f: train.monitor: 'val/mze': is no figure of the validation split "
                                   "(did you mean 'val/mse'?)"),
    ({"train.monitor": "train/mse"}, "f: train.monitor: 'train/mse': is no figure of the validation split"),
    ({"data.source": "manifest"}, "f: data.manifest: source 'manifest' needs it"),
    ({"loss.mse": 0}, "f: loss: every weight is 0"),
    ({"data.image_size": 40}, "f: data.image_size: 40 is not divisible by 16 (2 to the power of "
                              "model.downsampling_steps, 4)"),
    ({"model.heads": ["rgb"], "loss.segmentation": 0.1}, "f: loss.segmentation: weight 0.1 for a head that"),
    ({"loss.kl_schedule": "linear"}, "f: loss.kl_warmup_epochs: 0: loss.kl_schedule linear needs 1 or more"),
    ({"loss.kl_schedule": "stepwise"}, "f: loss.kl_schedule: 'stepwise': input should be 'constant', 'linear' or"),
    ({"loss.kl_warmup_epochs": 2.5}, "f: loss.kl_warmup_epochs: 2.5: input should be a valid integer"),
    ({"loss.free_bits": -0.1}, "f: loss.free_bits: -0.1: input should be greater than or equal to 0"),
    ({"loss.mse": 0, "loss.l1": 1, "loss.optimal_variance": True}, "f: loss.mse: 0: with loss.optimal_variance it"),
    ({"model.norm": "layer"}, "f: model.norm: 'layer': input should be 'group' or 'batch'"),
    ({"model.norm": "batch", "train.batch_size": 1}, "f: train.batch_size: 1: model.norm batch takes statistics"),
    ({"model.variational": True, "loss.kl": 1, "loss.kl_schedule": "linear", "loss.kl_warmup_epochs": 10},
     "f: train.epochs: 10: no epoch is trained wholly at the KL's final weight with loss.kl_warmup_epochs 10; that "
     "takes 11 epochs or more"),
    ({"model.variational": True, "loss.kl": 1, "loss.kl_schedule": "cyclical", "train.epochs": 7},
     "f: train.epochs: 7: no epoch is trained wholly at the KL's final weight with loss.kl_cycles 4; that takes 8"),
])
def test_wrong_values_are_told_with_key_and_value(flat, said):
    with pytest.raises(InputError) as error:
        make_config(flat, "f")
    assert said in str(error.value)


def test_several_problems_are_told_together():
    with pytest.raises(InputError) as error:
        make_config({"train.epochs": "x", "loss.kl": -1, "data.image_size": 10**290}, "f")
    assert len(str(error.value).split("\n")) == 3
    assert len(str(error.value)) < 400                        # a value is shown shortened
    with pytest.raises(InputError) as error:
        flatten({"train": {"epoch": 1, "sed": 2}, "loss.kll": 3, "model": 4}, "f")
    assert len(str(error.value).split("\n")) == 4


@pytest.mark.parametrize(("settings", "said"), [
    ({"train": {"epoch": 1}}, "'train.epoch' is no setting (did you mean 'train.epochs'?)"),
    ({"epochs": 1}, "'epochs' is no setting (did you mean 'train.epochs'?)"),
    ({"losses": {"mse": 1}}, "'losses' is no setting (did you mean 'loss'?)"),
    ({"loss.sgmentation": 1}, "'loss.sgmentation' is no setting (did you mean 'loss.segmentation'?)"),
    ({"train": {"epochs": 1}, "train.epochs": 2}, "train.epochs is given twice"),
    ({"train": None}, "train: None should be a mapping of its settings (epochs, "),
    ([1], "[1] should be a mapping of settings"),
    ({1: 2}, "'1' is no setting"),
])
def test_unknown_settings_name_the_near_one(settings, said):
    with pytest.raises(InputError) as error:
        flatten(settings, "f: config")
    assert str(error.value).startswith("f: config: ")
    assert said in str(error.value)


def test_dotted_and_nested_settings_are_the_same():
    assert flatten({"train": {"epochs": 3}, "loss.kl": 1}, "f") == {"train.epochs": 3, "loss.kl": 1}
    assert flatten(None, "f") == {}


def test_values_alone_leaves_to_the_whole_what_other_settings_may_resolve():
    check_values({"loss.mse": 0, "data.source": "manifest", "data.image_size": 40}, "f")
    with pytest.raises(InputError, match=r"f: loss\.mse: -1"):
        check_values({"loss.mse": -1, "data.source": "manifest"}, "f")


def test_the_defaults_of_the_contract():
    config = Config()
    assert config.data.split == (0.8, 0.1, 0.1)
    assert (config.data.image_column, config.data.label_column) == ("layout_path", "type")
    assert config.loss_weights == {"mse": 1.0}
    assert (config.train.seed, config.train.monitor, config.train.precision) == (42, "val/mse", "fp32")
    assert (config.train.learning_rate, config.train.weight_decay, config.train.batch_size) == (1e-4, 0.01, 16)
    assert config.heads == ("rgb",)


@settings(max_examples=60, deadline=None)
@given(configs)
def test_heads_follow_the_loss_weights_unless_they_are_given(config):
    if config.model.heads is None:
        assert config.heads == tuple(h for h in HEADS if h == "rgb" or getattr(config.loss, h) > 0)
    else:
        assert set(config.heads) == set(config.model.heads)
    assert config.heads == tuple(sorted(config.heads, key=HEADS.index))


def changed(config: Config, **flat: object) -> Config:
    return make_config({**config.flat(), **{key.replace("__", "."): value for key, value in flat.items()}}, "test")


@settings(max_examples=60, deadline=None)
@given(configs, st.data())
def test_the_identity_holds_what_changes_an_epoch_and_nothing_else(config, data):
    identity = content_hash(config.identity())
    scheduled = {"cosine": {"train.epochs"}, "plateau": {"train.min_delta"}}.get(config.train.schedule, set())
    scheduled |= {"train.epochs"} if config.kl_schedule == "cyclical" else set()
    for key in {"data.cache_dir", "data.image_column", "train.epochs", "train.patience", "train.min_delta",
                "train.sample_every", "train.stop_on_collapse"} - scheduled:
        assert content_hash(changed(config, **{key: data.draw(values[key])}).identity()) == identity
    for key in scheduled:
        other = data.draw(values[key].filter(lambda value, key=key: value != config.flat()[key]))
        assert content_hash(changed(config, **{key: other}).identity()) != identity
    plain = changed(config, model__normalize_latents=False, loss__standardization=0)
    exact = changed(plain, model__normalize_latents=True, model__normalizer="exact")
    assert content_hash(plain.identity()) == content_hash(exact.identity())          # it is done after training
    others = {content_hash(changed(exact, model__normalizer=mode, loss__standardization=None).identity())
              for mode in ("exact", "running", "learned", "loss")}
    assert len(others) == 4
    seed = data.draw(values["train.seed"].filter(lambda seed: seed != config.train.seed))
    assert content_hash(changed(config, train__seed=seed).identity()) != identity
    explicit = changed(config, model__heads=list(reversed(config.heads)))
    assert content_hash(explicit.identity()) == identity                      # heads are resolved
    kl = changed(config, loss__kl=data.draw(weights.filter(lambda weight: weight != config.loss.kl)))
    assert (content_hash(kl.identity()) != identity) == config.model.variational


@settings(max_examples=60, deadline=None)
@given(configs, st.sampled_from(["loss.kl_reduction", "loss.kl_schedule", "loss.kl_warmup_epochs", "loss.kl_cycles",
                                 "loss.free_bits", "loss.optimal_variance", "model.norm", "model.init"]), st.data())
def test_what_shapes_the_kl_is_part_of_the_identity_where_it_has_an_effect(config, key, data):
    value = data.draw(values[key].filter(lambda value: value != config.flat()[key]))
    if key == "loss.optimal_variance":                   # is of the images or of the splats, not of both
        config = changed(config, loss__splats=0)
    other = changed(config, **{key: value})
    weighed = config.model.variational and config.loss.kl > 0
    effect = {"loss.kl_reduction": weighed and not config.loss.optimal_variance,
              "loss.kl_warmup_epochs": weighed and config.loss.kl_schedule == "linear",
              "loss.kl_cycles": weighed and config.loss.kl_schedule == "cyclical",
              "loss.optimal_variance": config.model.variational,
              "model.norm": True, "model.init": True}.get(key, weighed)
    assert (other.identity() != config.identity()) == effect


@pytest.mark.parametrize(("flat", "key"), [
    ({}, "4078775e47377aa14d14"),
    ({"model.variational": True, "loss.kl": 1e-4}, "70c9915231074d55f669"),
    ({"model.variational": True, "loss.kl": 1e-3, "model.latent": "sample", "loss.segmentation": 0.1,
      "train.precision": "bf16"}, "5de0c787dd7fdb545e25"),
    ({"model.variational": True}, "1763969b4882d49fcb95"),
    ({"loss.kl": 1.0}, "4078775e47377aa14d14"),
    ({"train.schedule": "cosine", "train.epochs": 7, "train.ema": 0.99, "model.normalize_latents": True,
      "model.normalizer": "loss"}, "a4d1f2868f118cd30361"),
])
def test_trajectories_that_are_stored_keep_their_keys(flat, key):
    """As they were before there were settings that shape the KL."""
    assert trajectory_key(make_config(flat, "test"), "data", "cpu") == key


@settings(max_examples=60, deadline=None)
@given(configs)
def test_the_epochs_that_count_are_there(config):
    assert 1 <= config.counted_from <= config.train.epochs
    shaped = config.model.variational and config.loss.kl > 0 and config.loss.kl_schedule != "constant"
    assert (config.counted_from > 1) == shaped


def test_paths_are_made_absolute_from_their_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    flat = {"data.manifest": "../maps.csv", "data.palette": "/etc/palette.yaml", "data.cache_dir": "~/cache",
            "data.image_column": "../x", "data.limit": None}
    assert absolute_paths(flat, Path("/a/b")) == {
        **flat, "data.manifest": "/a/maps.csv", "data.cache_dir": "/home/me/cache"}
    with pytest.raises(InputError, match=r"f: data.manifest: '~no-such-person/x'"):
        absolute_paths({"data.manifest": "~no-such-person/x"}, Path("/a"), "f")


def test_load_config_reads_settings_and_nothing_else(tmp_path):
    path = tmp_path / "my.yaml"

    def load(content: dict) -> Config:
        path.write_text(dump_yaml(content))
        return load_config(path)

    assert load({"train": {"epochs": 3}}).train.epochs == 3
    assert load({"config": {"train.epochs": 3}, "provenance": {}, "search": {}}).train.epochs == 3
    assert load({"data": {"source": "folder", "manifest": "pictures"}}).data.manifest == str(tmp_path / "pictures")
    for content, said in (
            ({"config": {}, "train": {"epochs": 3}}, r"unknown key 'train' beside config: it belongs into it"),
            ({"config": {}, "provenanc": {}}, r"unknown key 'provenanc' beside config \(did you mean 'provenance'\?\)"),
            ({"name": "x", "inherits": "base.yaml"}, "is a sweep, not one configuration"),
            ({"config": {}, "arms": {}}, "is a sweep, not one configuration"),
            ({"trian": {}}, r"'trian' is no setting \(did you mean 'train'\?\)"),
            ([1], "should hold a configuration")):
        with pytest.raises(InputError, match=f"^{path}: .*{said}"):
            load(content)


def test_heads_that_the_data_cannot_serve_are_refused_with_what_drops_them():
    config = make_config({"loss.segmentation": 0.05, "model.heads": ["rgb", "segmentation", "classification"]}, "test")
    check_heads(config, classes=11, labels=2)
    with pytest.raises(InputError) as error:
        check_heads(config, classes=0, labels=1)
    first, second = str(error.value).split("\n")
    assert first == ("loss.segmentation: 0.05: the segmentation head needs segmentation classes (data.palette), and the"
                     " data has none; without the head: loss.segmentation=0 and 'segmentation' left out of model.heads")
    assert "model.heads" in second and "has 1" in second
    for monitor in ("val/kl", "val/log_sigma", "val/palette_miou", "val/rot_fvu", "val/segmentation_miou",
                    "val/classification_accuracy"):
        with pytest.raises(InputError, match=f"train.monitor: '{monitor}' is reported only with"):
            check_heads(make_config({"train.monitor": monitor}, "test"), classes=0, labels=0)


def test_a_configuration_is_frozen():
    with pytest.raises(Exception, match="frozen"):
        Config().train.epochs = 3
    with pytest.raises((AttributeError, TypeError, ValueError, dataclasses.FrozenInstanceError)):
        Config().loss = None


# Files --------------------------------------------------------------------------------------------------------------


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.json"
    write_atomic(path, "old")

    def fail(file):
        file.write(b"half")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_atomic(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@settings(deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n\r")), min_size=1, max_size=4),
       st.binary(max_size=6))
def test_a_torn_last_line_costs_only_itself(tmp_path_factory, lines, torn):
    path = tmp_path_factory.getbasetemp() / "events.jsonl"
    path.write_bytes(torn)
    for line in lines:
        append_line(path, line)
    whole = "".join(f"{line}\n" for line in lines).encode()
    assert path.read_bytes() in (torn + whole, torn + b"\n" + whole)
    assert torn == b"" or torn.endswith(b"\n") or path.read_bytes() == torn + b"\n" + whole


def test_the_hash_is_of_the_value_not_of_its_order():
    assert content_hash({"a": 1, "b": [1.5, None]}) == content_hash({"b": [1.5, None], "a": 1})
    assert content_hash({"a": 1}) != content_hash({"a": 1.5})
    with pytest.raises(ValueError):
        canonical_json({"a": float("nan")})


def test_deciding_needs_neither_torch_nor_ray_nor_optuna():
    sweep = ("spec", "space", "inherit", "asha", "decide", "race", "export", "plan", "phase")
    modules = ["autoenc", "autoenc.config", "autoenc.trajectory", "tune_runner", *(f"autoenc.sweep.{x}" for x in sweep)]
    code = f"""
import importlib, sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
for name in {modules}:
    importlib.import_module(name)
    print(name, *({{"torch", "ray", "optuna", "scipy", "torchmetrics"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split("\n")[:-1] == modules, done.stderr
