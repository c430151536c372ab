"""Every YAML file under sweeps/: it loads, its chain resolves, and it says what the contract says."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from sweepfiles import SWEEPS

import tune_runner
from autoenc import figures
from autoenc.config import KEYS, flatten, load_config, make_config
from autoenc.errors import InputError
from autoenc.gaussvae_config import read
from autoenc.losses import kl
from autoenc.sweep.inherit import arm_candidates, load_chain, parse_override, starting_point
from autoenc.sweep.space import project
from autoenc.sweep.spec import PARTIAL_KEYS, read_layer
from autoenc.yamlfile import read_yaml

FILES = sorted(SWEEPS.rglob("*.yaml"))
NAMED = [path for path in FILES if path.parent == SWEEPS and path.stem != "base"]
PARTIAL = [path for path in FILES if path not in NAMED]
PRESETS = [path for path in PARTIAL if path.stem != "base"]
NEEDS = {"full": ["data.manifest=maps.csv", "data.palette=palette.yaml"]}      # what a preset's comment asks for
REFUSED = {("phase1_0", "quick"): "train.learning_rate is what phase1_0_learning_rate",
           **{(stem, "full"): "'conv1d' takes splats" for stem in ("splats", "splats_targets")}}     # it is for images

# The contract: name, what is varied, the arms. Loss weights of phase 1.4: segmentation / classification.
SIZES = ("model.latent_channels", "model.base_channels")
WEIGHTS = ("loss.segmentation", "loss.classification")
TABLE = {
    "phase1_1": ("phase1_1_latent_channels", SIZES,
                 {"L1": (4, 32), "L2": (8, 32), "L3": (16, 32), "L4": (8, 64), "L5": (4, 64)}),
    "phase1_2": ("phase1_2_spatial_resolution", ("model.downsampling_steps",), {"R1": (3,), "R2": (4,), "R3": (5,)}),
    "phase1_3": ("phase1_3_vae_test", ("model.variational", "loss.kl"), {"V1": (False, None), "V2": (True, 1e-4)}),
    "phase1_4": ("phase1_4_loss_tuning", WEIGHTS, {"F1": (0, 0), "F2": (0.05, 0), "F3": (0.05, 0.01)}),
}


def stems(paths: list) -> list[str]:
    return [path.relative_to(SWEEPS).with_suffix("").as_posix() for path in paths]


def test_all_files_are_looked_at():
    assert {"base", *TABLE, "presets/quick", "presets/full"} <= set(stems(FILES))


@pytest.mark.parametrize("path", NAMED, ids=stems(NAMED))
@pytest.mark.parametrize("preset", [None, *PRESETS], ids=["plain", *stems(PRESETS)])
def test_every_chain_resolves_under_every_preset(path, preset):
    name = preset and preset.stem
    overrides = [parse_override(text) for text in NEEDS.get(name, [])]
    if (path.stem, name) in REFUSED:
        with pytest.raises(InputError, match=REFUSED[path.stem, name]):
            load_chain(path, [name], overrides)
        return
    chain = load_chain(path, [name] if name else [], overrides)
    assert chain[-1].path == path
    assert chain[-1].name.startswith(path.stem)
    assert chain[0].inherits is None
    for above, spec in itertools.pairwise(chain):
        assert spec.inherits.resolve() == above.path.resolve()
    for spec in chain:
        assert spec.description
        for candidate in arm_candidates(spec, starting_point(spec, None)):
            assert set(candidate.settings) == set(spec.arms[candidate.name].settings) if spec.arms else True
        assert all(arm.hypothesis for arm in spec.arms.values())


@pytest.mark.parametrize("path", PARTIAL, ids=stems(PARTIAL))
def test_every_partial_file_is_a_layer(path):
    layer = read_layer(read_yaml(path), path, PARTIAL_KEYS)
    assert layer.config


@pytest.mark.parametrize("stem", TABLE)
def test_names_and_arms_of_the_contract(stem):
    name, keys, arms = TABLE[stem]
    spec = load_chain(SWEEPS / f"{stem}.yaml")[-1]
    assert spec.name == spec.export_name == name
    assert spec.varied == keys
    assert {arm: tuple(content.settings.get(key) for key in keys) for arm, content in spec.arms.items()} == arms
    assert list(spec.arms) == list(arms)
    assert (spec.objective.metric, spec.objective.direction) == ("val/mse", "min")
    assert spec.trials == len(arms)                      # the space is there for those who ask for more trials


def test_the_chain_of_the_main_job():
    assert [spec.path.stem for spec in load_chain(SWEEPS / "phase1_4.yaml")] == list(TABLE)


def test_the_base_of_the_contract():
    config = make_config(flatten(read_yaml(SWEEPS / "base.yaml")["config"], "base"), "base")
    assert config.loss_weights == {"mse": 1.0}
    assert (config.model.variational, config.model.downsampling_steps) == (False, 4)
    assert (config.train.learning_rate, config.train.weight_decay, config.train.batch_size) == (1e-4, 0.01, 16)
    assert (config.train.epochs, config.train.patience, config.train.seed, config.data.seed) == (10, 3, 42, 42)
    assert config.data.split == (0.8, 0.1, 0.1)


def test_loss_weights_until_the_phase_that_asks_about_them():
    for spec in load_chain(SWEEPS / "phase1_3.yaml"):
        start = starting_point(spec, None)
        assert (start["loss.mse"], start["loss.segmentation"], start["loss.classification"]) == (1, 0.05, 0.01)


def test_the_rules_of_the_phases():
    one, two, three, four = (spec.decision for spec in load_chain(SWEEPS / "phase1_4.yaml"))
    for rule in (one, two):                              # within 10% the smaller latent wins, then fewer parameters
        assert rule.within == 0.1
        assert [(p.metric, p.direction) for p in rule.prefer] == [("latent_size", "min"), ("parameters", "min")]
    assert three.within == 0.1
    assert [(p.metric, p.direction) for p in three.prefer] == [("latent/smoothness", "min")]
    assert four.within == 0.02
    assert [(p.metric, p.direction, p.within) for p in four.prefer] == [
        ("val/palette_miou", "max", 0.01), ("parameters", "min", 0.0)]
    assert (four.baseline.arm, four.baseline.margin, four.baseline.gains) == ("F1", 0.05, ("val/palette_miou",))
    assert all(rule.require == () and rule.pick is None for rule in (one, two, three, four))


def test_the_space_of_the_loss_weights():
    spec = load_chain(SWEEPS / "phase1_4.yaml", [], [parse_override("phase1_4:search.trials=20")])[-1]
    found = {key: (p.type, p.low, p.high, p.log, p.zero) for key, p in spec.space.items()}
    assert found == {"loss.segmentation": ("float", 0.005, 0.5, True, True),
                     "loss.classification": ("float", 0.001, 0.1, True, True)}
    assert spec.trials == 20


def test_the_quick_preset_is_quick():
    for spec in load_chain(SWEEPS / "phase1_4.yaml", ["quick"]):
        start = starting_point(spec, None)
        assert start["data.image_size"] == 32 and start["data.limit"] < 100 and start["train.epochs"] == 3


def test_the_full_preset_is_for_gpu_workers():
    for spec in load_chain(SWEEPS / "phase1_4.yaml", ["full"], [parse_override(text) for text in NEEDS["full"]]):
        start = starting_point(spec, None)
        assert (start["data.source"], start["data.image_size"], start["data.limit"]) == ("manifest", 512, None)
        assert spec.resources.gpus >= 1


def test_every_figure_that_a_shipped_rule_reads_is_reported():
    for path in NAMED:
        rule = load_chain(path)[-1].decision
        gains = rule.baseline.gains if rule.baseline else ()
        assert {*(item.metric for item in (*rule.prefer, *rule.require)), *gains} <= set(figures.MODES)
    assert set(flatten(read_yaml(SWEEPS / "base.yaml")["config"], "base")) <= set(KEYS)


def test_the_joint_search_reaches_whatever_the_greedy_phases_could():
    """Its space holds every setting that phase 1 varies, and every arm; its baseline is where those phases end."""
    *phases, joint = load_chain(SWEEPS / "joint.yaml")
    assert [spec.path.stem for spec in phases] == list(TABLE)
    assert set(joint.space) == {key for spec in phases for key in spec.varied}
    start, mean = starting_point(joint, None), joint.arms["greedy"].settings
    assert mean == {"loss.kl_reduction": "mean"} and start["loss.kl_reduction"] == "sum"
    for spec in phases:
        for arm in spec.arms.values():
            met = {key: value for key, value in arm.settings.items() if key != "loss.kl" and
                   all(arm.settings.get(other) == needed for other, needed in joint.space[key].when.items())}
            assert project(met, joint.space, {**start, **arm.settings}) is not None
    assert joint.decision.baseline.arm == "greedy" and joint.trials == 24
    assert joint.space["loss.kl"].when == {"model.variational": True}


def test_the_joint_search_reaches_the_kl_weights_of_the_phases():
    """They weigh the mean over a latent's dimensions, its space the sum over the numbers of an image: a weight of one
    is that times the image's numbers over the latent's dimensions in the other, for every latent of phase 1."""
    *phases, joint = load_chain(SWEEPS / "joint.yaml")
    start, space = starting_point(joint, None), joint.space
    weights = {arm.settings["loss.kl"] for spec in phases for arm in spec.arms.values() if "loss.kl" in arm.settings}
    assert weights == {1e-4}
    for weight, channels, steps in itertools.product(
            weights, space["model.latent_channels"].values(), space["model.downsampling_steps"].values()):
        latent = {"model.latent_channels": channels, "model.downsampling_steps": steps, "model.variational": True}
        config = make_config({**start, **latent}, "test")
        summed = weight * config.elements / math.prod(config.latent_shape)
        assert project({**latent, "loss.kl": summed}, space, start) is not None
        mu, logvar = torch.randn(2, 1, *config.latent_shape).unbind()
        as_mean, as_sum = (kl({"mu": mu, "logvar": logvar}, {}, reduction, elements=config.elements).item()
                           for reduction in ("mean", "sum"))
        assert weight * as_mean == pytest.approx(summed * as_sum)


def test_the_greedy_winner_of_the_joint_search_is_trained_as_it_was():
    """Its weight keeps its meaning, so its training is that of the phases, whatever it is."""
    *_, four, joint = load_chain(SWEEPS / "joint.yaml")
    for won in ({"model.variational": False}, {"model.variational": True, "loss.kl": 1e-4}):
        parent = {**make_config({}, "test").flat(), **starting_point(four, None), **won}
        start = starting_point(joint, parent)
        (greedy,) = arm_candidates(joint, start)
        assert greedy.config.identity() == make_config(parent, "test").identity()
        taught = make_config({**start, **project({}, joint.space, start)}, "test")
        # A point of the space, and so learnt from, unless it is a VAE, whose weight the space weighs otherwise.
        assert (taught.identity() == greedy.config.identity()) is not won["model.variational"]


def splat_arms(stem, *presets):
    """The sweep and its arms' configurations by name."""
    [spec] = load_chain(SWEEPS / f"{stem}.yaml", presets)
    return spec, {arm.name: arm.config for arm in arm_candidates(spec, starting_point(spec, None))}


def test_the_seven_configurations_of_splats():
    spec, arms = splat_arms("splats")
    found = {name: (config.model.kind, config.model.latent_dim, config.loss.kl) for name, config in arms.items()}
    assert found == {
        "conv256_b1": ("conv1d", 256, 1.0), "conv256_b0.5": ("conv1d", 256, 0.5), "conv512_b1": ("conv1d", 512, 1.0),
        "conv512_b0.5": ("conv1d", 512, 0.5), "conv512_b0.1": ("conv1d", 512, 0.1), "conv512_b0": ("conv1d", 512, 0.0),
        "resnet512_b0": ("resnet1d", 512, 0.0)}
    for config in arms.values():
        model, train = config.model, config.train
        assert (config.data.source, config.data.splats, config.data.manifest) == ("splats", 512, None)
        assert (model.encoder_filters, model.decoder_filters) == ((32, 64, 128), (64, 32, 16))
        assert (model.dropout_rates, model.pool, model.splat_target) == ((0.1, 0.15, 0.2), "mean", "raw")
        assert (model.variational, model.norm, config.kl_reduction) == (True, "batch", "mean")
        assert config.loss_weights == {"splats": 1.0, **({"kl": config.loss.kl} if config.loss.kl else {})}
        assert (train.epochs, train.batch_size, train.learning_rate, train.weight_decay) == (100, 32, 1e-3, 0)
        assert train.patience is None
        assert config.counted_from == (51 if config.loss.kl else 1)
    assert (spec.objective.metric, spec.asha) == ("val/mse", None)
    assert [(rule.metric, rule.min) for rule in spec.decision.require] == [("latent/active_units", 0.1)]


def test_the_arms_of_splats_are_what_their_files_say():
    """Read as GaussVAE writes them, the seven are the arms, data, seed and patience aside."""
    _, arms = splat_arms("splats")
    for name, config in arms.items():
        file = {"model": {"name": name.replace("conv256", "conv1d").replace("conv512", "conv1d"),
                          "latent_dim": config.model.latent_dim}, "training": {"max_beta": config.loss.kl}}
        experiment = read(file, SWEEPS / "file.yaml")
        theirs = make_config(experiment.settings, name)
        assert theirs.identity() == config.identity() and theirs.counted_from == config.counted_from
        assert theirs.data.curve == config.data.curve


def test_the_targets_and_poolings_of_splats():
    spec, arms = splat_arms("splats_targets")
    found = {name: (config.model.splat_target, config.model.pool) for name, config in arms.items()}
    assert found == {f"{target}_{pool}": (target, pool)
                     for target in ("raw", "canonical", "logcov") for pool in ("mean", "none")}
    assert all((config.model.variational, config.model.latent_dim) == (False, 512) for config in arms.values())
    assert all(config.loss_weights == {"splats": 1.0} for config in arms.values())
    assert spec.objective.metric == "val/mse"             # comparable, where a loss in the target's columns is not
    assert [rule.metric for rule in spec.decision.prefer] == ["val/rot_fvu", "val/feat_fvu", "parameters"]
    _, others = splat_arms("splats")
    same = others["conv512_b0"]
    for key, value in arms["raw_mean"].flat().items():    # apart from what it says, as in splats.yaml
        assert value == same.flat()[key] or key in ("model.variational", "loss.kl_schedule", "loss.kl_warmup_epochs")


@pytest.mark.parametrize("stem", ["splats", "splats_targets"])
def test_splats_are_quick_to_try(stem):
    _, arms = splat_arms(stem, "quick")
    for config in arms.values():
        assert (config.data.image_size, config.data.limit, config.train.epochs) == (32, 96, 3)
        assert config.counted_from == (2 if config.loss_weights.get("kl") else 1)          # the warm-up goes along


@pytest.mark.parametrize(("stem", "plan"), [
    ("splats", ["splats", "conv512_b0.1", "at most 700 epochs", "latent/active_units ≥ 0.1"]),
    ("splats_targets", ["splats_targets", "canonical_none", "at most 600 epochs", "then smaller val/rot_fvu"]),
    ("joint", ["joint", "loss.kl_reduction mean", "phase1_1_latent_channels"])])
def test_plans_of_sweeps_whose_data_is_not_there_yet(stem, plan, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("AUTOENC_CACHE", str(tmp_path / "cache"))
    assert tune_runner.main([str(SWEEPS / f"{stem}.yaml"), "--dry-run", "--output", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert all(words in said for words in plan) and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_splats_run_to_a_winner(tmp_path):
    sweeps = {"splats": 7, "splats_targets": 6}                     # by the number of their arms
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "AUTOENC_CACHE": str(tmp_path / "cache")}
    run = subprocess.run(
        [sys.executable, SWEEPS.parent / "tune_runner.py", *(SWEEPS / f"{stem}.yaml" for stem in sweeps), "--preset",
         "quick", "--no-dashboard", "--output", tmp_path / "out"],
        capture_output=True, text=True, timeout=900, env=environment, cwd=tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    for stem, arms in sweeps.items():
        decision = json.loads((tmp_path / "out" / stem / "decision.json").read_text())
        assert len(decision["candidates"]) == arms and decision["winner"] is not None
        assert all(row["epochs"] == 3 and math.isfinite(row["score"]) for row in decision["candidates"])
        best = load_config(tmp_path / "out" / stem / "best_config.yaml")
        assert best.data.source == "splats" and best.train.epochs == 3


def test_the_learning_rates_are_around_the_base():
    [spec] = load_chain(SWEEPS / "phase1_0.yaml")
    rates = [arm.settings["train.learning_rate"] for arm in spec.arms.values()]
    range_ = spec.space["train.learning_rate"]
    assert rates == [1e-4, 3e-4, 1e-3, 3e-3] and range_.log and range_.low < min(rates) and max(rates) < range_.high
    phase = load_chain(SWEEPS / "phase1_1.yaml", [], [parse_override("train.learning_rate=1.0e-3")])[0]
    assert starting_point(phase, None)["train.learning_rate"] == 1e-3                       # how its winner is used
    assert {key: value for key, value in starting_point(spec, None).items() if key.startswith("loss.")} == {
        key: value for key, value in starting_point(phase, None).items() if key.startswith("loss.")}
