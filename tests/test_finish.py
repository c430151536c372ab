"""What is done once with the best weights of a finished training."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from helpers import small_config, small_dataset

from autoenc.checkpoint import load_model, read_checkpoint
from autoenc.figures import STANDARDIZED
from autoenc.finish import finish
from autoenc.latents import latent_statistics
from autoenc.metrics import to_unit
from autoenc.trajectory import FINISHED, Trajectory

torch.set_num_threads(1)

DATASET = small_dataset(60)
SMOOTH = ("latent/smoothness",)


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
