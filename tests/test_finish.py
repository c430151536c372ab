"""What is done once with the best weights of a finished training."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import small_config, small_dataset
from racing import KNOB, Lab, decision_of

from autoenc.checkpoint import load_model, read_checkpoint
from autoenc.figures import STANDARDIZED
from autoenc.finish import finish
from autoenc.latents import latent_statistics
from autoenc.metrics import to_unit
from autoenc.sweep.store import Store
from autoenc.trajectory import FINISHED, Trajectory

torch.set_num_threads(1)

DATASET = small_dataset(60)
SMOOTH = ("latent/smoothness",)
TINY = {"data__limit": 40, "train__epochs": 2, "train__patience": None}


def config_of(**settings):
    return small_config(**{"train__epochs": 3, "train__patience": None, "train__learning_rate": 1e-2,
                           "model__latent_channels": 3, "train__seed": 5, **settings})


def train(folder: Path, **settings) -> tuple[Trajectory, int]:
    trajectory, config = Trajectory(folder), config_of(**settings)
    for _ in trajectory.train(config, DATASET, "cpu"):
        pass
    return trajectory, trajectory.status()["best_epoch"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("plain") / "t")[0].folder


def images(split: str = "train") -> torch.Tensor:
    return to_unit(DATASET.images[DATASET.splits[split]])


def test_figures_are_computed_once(plain, tmp_path):
    trajectory = Trajectory(Path(shutil.copytree(plain, tmp_path / "t")))
    best = trajectory.status()["best_epoch"]
    finish(trajectory, config_of(), DATASET, "cpu", best, SMOOTH)
    found = trajectory.figures(best)
    assert found["latent/smoothness"] >= 1
    trajectory.weights_path(best).unlink()
    finish(trajectory, config_of(), DATASET, "cpu", best, SMOOTH)                       # kept, not computed again
    assert trajectory.figures(best) == found
    with pytest.raises(FileNotFoundError, match="weights of epoch"):
        finish(trajectory, config_of(), DATASET, "cpu", best + 1, SMOOTH)


def test_encoding_is_timed_on_one_thread_and_once(plain, tmp_path):
    trajectory = Trajectory(Path(shutil.copytree(plain, tmp_path / "t")))
    best = trajectory.status()["best_epoch"]
    torch.set_num_threads(2)
    try:
        finish(trajectory, config_of(), DATASET, "cpu", best, ["encode_ms"])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    found = trajectory.figures(best)
    assert found.keys() == {"encode_ms"} and 0.01 < found["encode_ms"] < 1000
    finish(trajectory, config_of(), DATASET, "cpu", best, ["encode_ms", *SMOOTH])
    assert trajectory.figures(best)["encode_ms"] == found["encode_ms"]
    larger, best = train(tmp_path / "larger", model__base_channels=64, train__epochs=1)
    finish(larger, config_of(model__base_channels=64, train__epochs=1), DATASET, "cpu", best, ["encode_ms"])
    assert larger.figures(best)["encode_ms"] > found["encode_ms"]


def test_a_worker_times_encoding_unasked_but_trains_nothing_for_it(tmp_path, monkeypatch):
    from autoenc.sweep.work import Task, work

    monkeypatch.setenv("AUTOENC_CACHE", str(tmp_path / "cache"))
    task = Task(key="key", output=str(tmp_path), config=small_config(**TINY).flat(), threads=1, device="cpu")
    trajectory = Store(tmp_path).open("key")
    assert [said.get("epoch") for said in work(task)] == [1, 2, None]
    best = trajectory.status()["best_epoch"]
    assert trajectory.figures(best).keys() == {"encode_ms"}

    for name in ("figures.json", "latest.pt"):
        (trajectory.folder / name).unlink()
    weights = trajectory.weights(best).read_bytes()
    trajectory.weights(best).write_bytes(weights[:-100])               # broken: set aside
    assert [said["outcome"] for said in work(task) if "warning" not in said] == ["completed"]
    assert trajectory.figures(best) == {} and trajectory.weights(best) is None
    *trained, outcome = work(replace(task, after=("encode_ms",)))      # asked for by a rule
    assert trained and outcome == {"outcome": "completed"}
    assert trajectory.figures(best).keys() == {"encode_ms"} and trajectory.weights(best).read_bytes() == weights


@pytest.mark.parametrize("rule, waits", [({}, False), ({"prefer": [{"metric": "parameters"}]}, False),
                                         ({"prefer": [{"metric": "encode_ms", "mode": "min", "within": "10%"}]}, True),
                                         ({"require": [{"metric": "encode_ms", "max": 5}]}, True),
                                         ({"baseline": {"arm": "A", "gains": ["encode_ms"]}}, True)])
def test_only_a_rule_that_names_it_waits_for_the_time_of_encoding(tmp_path, rule, waits):
    """A store of an earlier version lacks it."""
    lab = Lab(tmp_path, arms={"A": {KNOB: 0.1}, "B": {KNOB: 0.101}}, asha=False, decision={"within": "5%", **rule})
    for arm in ("A", "B"):
        lab.store_epochs(arm, 8)
    race = lab.race()
    assert race.idle != waits
    assert [race.missing_figures(run) for run in race.runs.values()] == [["encode_ms"] if waits else []] * 2
    for milliseconds, run in zip((3.0, 2.0), race.runs.values(), strict=True):
        run.trajectory.add_figures(8, {"encode_ms": milliseconds})
    race = lab.race()
    assert race.idle and [record.figures["encode_ms"] for record in race.records()] == [3.0, 2.0]
    if "prefer" in rule:
        assert decision_of(race)["winner"] == ("B" if waits else "A")
    lab.folder.write_trials(race)
    assert "encode_ms" in (lab.folder.path / "trials.csv").read_text().splitlines()[0].split(",")


# Standardised latents -------------------------------------------------------------------------------------------------

def normalized(folder: Path, **settings) -> tuple[torch.nn.Module, dict, dict]:
    """The finished model of a training, its figures, and its checkpoint's content."""
    trajectory, best = train(folder, **settings)
    config = config_of(**settings)
    finish(trajectory, config, DATASET, "cpu", best, STANDARDIZED)
    path = trajectory.weights(best, normalized=True)
    return load_model(path), trajectory.figures(best, normalized=True), read_checkpoint(path)


@pytest.mark.parametrize("mode", ["exact", "running", "loss"])
@pytest.mark.parametrize("vae", [{}, {"model__variational": True, "loss__kl": 1e-4}])
def test_latents_over_the_training_split_are_standardised(tmp_path, mode, vae):
    model, found, _ = normalized(tmp_path / "t", model__normalize_latents=True, model__normalizer=mode, **vae)
    latent = model.encode(images())["latent"].double()
    assert latent.mean((0, 2, 3)).abs().max() <= 1e-3
    assert (latent.std((0, 2, 3), correction=0) - 1).abs().max() <= 1e-3
    assert found["latent/worst_mean"] <= 1e-3 and found["latent/worst_deviation"] <= 1e-3
    assert 0 <= found["latent/worst_correlation"] <= 1


def test_the_sources_way_does_not_standardise(tmp_path):
    _, found, _ = normalized(tmp_path / "t", model__normalize_latents=True, model__normalizer="learned")
    assert max(found["latent/worst_mean"], found["latent/worst_deviation"]) > 0.05


def test_exact_statistics_change_no_reconstruction_and_train_nothing(plain, tmp_path):
    trajectory = Trajectory(Path(shutil.copytree(plain, tmp_path / "t")))
    config, best = config_of(model__normalize_latents=True), trajectory.status()["best_epoch"]
    assert list(trajectory.train(config, DATASET, "cpu")) == []
    before = {path: path.read_bytes() for path in trajectory.folder.glob("*.*")}
    finish(trajectory, config, DATASET, "cpu", best, STANDARDIZED)
    assert before.items() <= {path: path.read_bytes() for path in trajectory.folder.glob("*.*")}.items()
    model, raw = load_model(trajectory.weights(best, normalized=True)), load_model(trajectory.weights(best))
    pictures = images("val")
    encoded, plainly = model.encode(pictures), raw.encode(pictures)
    difference = model.decode(encoded["latent"])["rgb"] - raw.decode(plainly["latent"])["rgb"]
    assert difference.abs().max() <= 1e-5
    assert trajectory.figures(best, normalized=True)["latent/reconstruction_change"] <= 1e-5
    # The source's own check of shift and scale, as it stands.
    latents = raw.encode(images())["latent"]
    shift = model.encoder.latent_normalizer.shift
    scale = torch.exp(model.encoder.latent_normalizer.log_scale)
    assert torch.allclose(shift.flatten(), latents.mean((0, 2, 3)), atol=1e-4)
    assert torch.allclose(scale.flatten(), latents.std((0, 2, 3), correction=0), rtol=1e-3)
    assert trajectory.figures(best) == {}                                              # of the plain model


def test_held_out_latents_are_within_four_standard_errors(tmp_path):
    model, _, _ = normalized(tmp_path / "t", model__normalize_latents=True)
    held = latent_statistics(model, DATASET.images[DATASET.splits["val"]], batch_size=16, device="cpu")
    assert (held.mean.abs() <= 4 * held.mean_error).all()


def test_a_dead_channel_is_named(plain, tmp_path):
    said = []
    trajectory = Trajectory(Path(shutil.copytree(plain, tmp_path / "t")), warn=said.append)
    best = trajectory.status()["best_epoch"]
    content = read_checkpoint(trajectory.weights(best))
    content["model"]["encoder.mean.weight"][1] = 0
    torch.save(content, trajectory.weights(best))
    finish(trajectory, config_of(model__normalize_latents=True), DATASET, "cpu", best, STANDARDIZED)
    assert len(said) == 1 and "channels 1 (of 3" in said[0]
    assert trajectory.figures(best, normalized=True)["latent/worst_deviation"] <= 1e-3
    assert load_model(trajectory.weights(best, normalized=True)).encode(images())["latent"].abs().max() < 1e3


def test_a_draw_is_standardised_with_its_own_noise(tmp_path):
    """model.latent sample: its variance is that of the mean and the posterior's own."""
    settings = {"model__variational": True, "loss__kl": 1e-2, "model__latent": "sample"}
    model, found, _ = normalized(tmp_path / "t", model__normalize_latents=True, **settings)
    assert found["latent/worst_deviation"] <= 1e-3
    drawn = torch.cat([model.encode(images(), torch.Generator().manual_seed(k))["latent"] for k in range(20)])
    assert drawn.mean((0, 2, 3)).abs().max() < 0.05 and (drawn.std((0, 2, 3)) - 1).abs().max() < 0.05


def test_running_statistics_go_on_bit_for_bit(tmp_path):
    settings = {"model__normalize_latents": True, "model__normalizer": "running", "train__ema": 0.9,
                "train__schedule": "cosine"}
    whole, _ = train(tmp_path / "whole", **settings)
    part = Trajectory(tmp_path / "part")
    for _ in range(3):
        next(part.train(config_of(**settings), DATASET, "cpu"), None)                  # a new process each epoch
    for _ in part.train(config_of(**settings), DATASET, "cpu"):
        pass
    one, two = (read_checkpoint(t.folder / "latest.pt") for t in (whole, part))
    assert all(torch.equal(one["model"][name], two["model"][name]) for name in one["model"])
    assert all(torch.equal(one["raw"][name], two["raw"][name]) for name in one["raw"])
    assert any(not torch.equal(one["raw"][name], one["model"][name]) for name in one["raw"])


# A final model --------------------------------------------------------------------------------------------------------

def test_a_final_model_is_evaluated_on_the_test_split(plain, tmp_path):
    from safetensors.torch import load_file

    trajectory = Trajectory(Path(shutil.copytree(plain, tmp_path / "t")))
    best = trajectory.status()["best_epoch"]
    finish(trajectory, config_of(), DATASET, "cpu", best, [FINISHED])
    found = trajectory.figures(best)
    assert math.isfinite(found["test/mse"]) and found["test/psnr"] == pytest.approx(
        10 * math.log10(4 / found["test/mse"]))
    evaluation = json.loads(trajectory.evaluation_path(best).read_text())
    assert evaluation["test"]["mse"] == found["test/mse"] and len(evaluation["latents_mean"]) == 3
    assert read_checkpoint(trajectory.weights(best))["latents_std"] == evaluation["latents_std"]
    state = load_file(trajectory.weights(best).with_suffix(".safetensors"))
    weights = read_checkpoint(trajectory.weights(best))["model"]
    assert state.keys() == weights.keys() and all(torch.equal(state[name], weights[name]) for name in state)
