"""The KL divergence while a VAE trains: its weight at every step, what is told of it, which epochs count."""

from __future__ import annotations

import math
import shutil
import warnings
from dataclasses import replace
from fractions import Fraction
from itertools import islice

import numpy as np
import pytest
import torch
from helpers import small_config, small_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import mse_loss

from autoenc.checkpoint import build_model, load_model, read_checkpoint
from autoenc.course import best_row, own_end
from autoenc.errors import InputError
from autoenc.metrics import to_unit
from autoenc.model import derived_seed
from autoenc.schedule import kl_weight
from autoenc.train import main, train
from autoenc.trajectory import Trajectory
from autoenc.yamlfile import dump_yaml

torch.set_num_threads(1)

STEPS = 3                                   # of an epoch: 21 images in batches of 8
STILL = {"train__learning_rate": 1e-30, "train__weight_decay": 0.0}


def vae(**more):
    return small_config(**{"model__variational": True, "loss__kl": 0.1, "train__sample_every": 0,
                           "train__patience": None, **more})


def linear(warmup: int = 2, epochs: int = 4, **more):
    return vae(loss__kl_schedule="linear", loss__kl_warmup_epochs=warmup, train__epochs=epochs, **more)


def cyclical(cycles: int = 2, epochs: int = 6, **more):
    return vae(loss__kl_schedule="cyclical", loss__kl_cycles=cycles, train__epochs=epochs, **more)


def rows_of(config, dataset=None):
    return [result.metrics for result in train(config, dataset or small_dataset())]


# The weight at every step ---------------------------------------------------------------------------------------------

@given(st.integers(1, 20), st.integers(1, 40), st.floats(1e-6, 10), st.integers(0, 1000))
def test_a_linear_weight(warmup, steps, most, step):
    config = linear(warmup, warmup + 1, loss__kl=most)
    expected = most * min(1.0, step / (warmup * steps))
    assert kl_weight(config, step, steps) == pytest.approx(expected, rel=1e-12)
    assert kl_weight(config, 0, steps) == 0 and kl_weight(config, warmup * steps, steps) == most


@given(st.integers(1, 6), st.integers(1, 30), st.integers(1, 20))
def test_a_cyclical_weight_is_that_of_the_paper(cycles, more, steps):
    """beta = f(tau) for tau up to R, else 1, with tau the place within a cycle and f(tau) = tau / R; R is a half."""
    epochs = 2 * cycles + more
    config = cyclical(cycles, epochs, loss__kl=0.5)
    for step in range(epochs * steps):
        length = Fraction(epochs * steps, cycles)
        tau = (step % length) / length
        assert kl_weight(config, step, steps) == pytest.approx(0.5 * min(1.0, float(2 * tau)), rel=1e-12)


@settings(max_examples=60)
@given(st.integers(1, 6), st.integers(0, 30), st.integers(1, 9), st.booleans())
def test_the_epochs_that_count_are_those_at_the_final_weight_to_the_end(length, more, steps, cycles):
    epochs = (2 * length if cycles else length + 1) + more
    config = cyclical(length, epochs) if cycles else linear(length, epochs)
    full = [all(kl_weight(config, (epoch - 1) * steps + step, steps) == config.loss.kl for step in range(steps))
            for epoch in range(1, epochs + 1)]
    last = max((epoch for epoch, whole in enumerate(full, start=1) if not whole), default=0)
    assert config.counted_from >= last + 1 and all(full[config.counted_from - 1:])
    if not cycles or steps % 2 == 0:         # odd steps an epoch may round an earlier start to a whole epoch
        assert config.counted_from == last + 1


def test_a_constant_weight_counts_from_the_first_epoch():
    for config in (vae(), vae(loss__kl=0.0, loss__kl_schedule="cyclical"),
                   small_config(loss__kl_schedule="linear", loss__kl_warmup_epochs=9, loss__kl=1.0)):
        assert config.counted_from == 1 and kl_weight(config, 0, STEPS) == config.loss.kl


def test_training_is_the_plain_loop():
    """Two epochs in which the weight rises, with free bits, against a loop that is written out."""
    config, dataset = linear(3, 4, loss__free_bits=0.2, loss__kl_reduction="sum"), small_dataset()
    model = build_model(config, dataset).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01, fused=True)
    images, step = to_unit(dataset.images[dataset.splits["train"]]), 0
    for epoch in (1, 2):
        order = np.random.default_rng(derived_seed(42, "order", epoch)).permutation(21)
        noise = torch.Generator().manual_seed(derived_seed(42, "noise", epoch))
        for rows in (order[:8], order[8:16], order[16:]):
            outputs = model(images[rows], noise)
            nats = (0.5 * (outputs["mu"].square() + outputs["logvar"].exp() - 1 - outputs["logvar"])).sum((2, 3))
            beta = 0.1 * (step / (3 * 3))
            loss = mse_loss(outputs["rgb"], images[rows]) + beta * (nats.mean(0).clamp(min=0.2).sum() / 768)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
    *_, last = islice(train(config, dataset), 2)
    trained = last.state()["model"]
    assert all(torch.allclose(trained[name], value, atol=1e-6) for name, value in model.state_dict().items())


# What is told ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("config", [linear(2, 4), cyclical(2, 6), vae(train__epochs=2), vae(loss__kl=0.0)],
                         ids=["linear", "cyclical", "constant", "no weight"])
def test_beta_is_the_weight_at_the_end_of_the_epoch(config):
    rows = rows_of(config)
    assert [row["beta"] for row in rows] == [
        kl_weight(config, epoch * STEPS - 1, STEPS) for epoch in range(1, len(rows) + 1)]
    assert rows[-1]["beta"] == config.loss.kl
    for row in rows:
        for split in ("train", "val"):
            assert row[f"{split}/loss"] == pytest.approx(
                row[f"{split}/mse"] + row["beta"] * row[f"{split}/kl"], rel=1e-6)


def test_figures_are_raw_unclamped_and_in_the_configured_reduction():
    free, plain, total = (rows_of(vae(train__epochs=1, **STILL, **more))[0] for more in (
        {"loss__free_bits": 50.0}, {}, {"loss__kl_reduction": "sum"}))
    for split in ("train", "val"):
        assert free[f"{split}/kl"] == plain[f"{split}/kl"] < 50 * 2 / 32        # what training sees is clamped
        assert free[f"{split}/kl_nats"] == plain[f"{split}/kl_nats"] == total[f"{split}/kl_nats"]
        assert free[f"{split}/nelbo"] == plain[f"{split}/nelbo"]
        assert plain[f"{split}/kl"] == pytest.approx(plain[f"{split}/kl_nats"] / 32, rel=1e-5)
        assert total[f"{split}/kl"] == pytest.approx(total[f"{split}/kl_nats"] / 768, rel=1e-5)
        assert free[f"{split}/loss"] == pytest.approx(free[f"{split}/mse"] + 0.1 * 50 * 2 / 32, rel=1e-5)
    assert free["latent/active_units"] == plain["latent/active_units"]
    assert not [name for name in free if "free" in name or "sigma" in name]


def test_an_optimal_variance_is_told_and_its_loss_is_the_bound():
    config = vae(loss__optimal_variance=True, loss__kl=1.0, train__epochs=2)
    for row in rows_of(config):
        assert row["train/log_sigma"] == pytest.approx(math.log(row["train/mse"]) / 2)
        assert row["train/kl"] == pytest.approx(row["train/kl_nats"] / 768, rel=1e-5)
        # Training decodes draws, so its loss is the negative bound in nats per number, up to ln(2 pi) / 2.
        assert row["train/loss"] == pytest.approx(row["train/nelbo"] / 768 - math.log(2 * math.pi) / 2, rel=1e-5)
        assert row["val/loss"] == pytest.approx(row["val/log_sigma"] + 0.5 + row["val/kl"], rel=1e-5)


def test_the_command_tells_the_raw_terms_and_the_weight(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("AUTOENC_CACHE", str(tmp_path / "cache"))
    config = linear(1, 2, data__limit=40, loss__kl=0.5, loss__optimal_variance=True)
    (tmp_path / "my.yaml").write_text(dump_yaml({"config": config.nested()}))
    assert main([str(tmp_path / "my.yaml"), "--output", str(tmp_path / "t")]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    for row, line in zip(Trajectory(tmp_path / "t").rows(), lines, strict=True):
        assert (f"val: mse {row['val/mse']:.5f}, kl {row['val/kl']:.5f} × {row['beta']:g}, "
                f"total {row['val/loss']:.5f}") in line
    assert last.startswith("best epoch 2: ")


def test_an_optimal_variance_without_a_posterior_changes_nothing():
    plain, other = (next(train(small_config(**more), small_dataset())) for more in (
        {}, {"loss__optimal_variance": True, "loss__kl_reduction": "sum", "loss__free_bits": 3.0}))
    assert plain.metrics == other.metrics and "val/log_sigma" not in other.metrics


def test_the_kl_can_be_trusted():
    """A heavy weight collapses the latent; with free bits it does not, nor does an optimal variance with weight 1."""
    def end(**more):
        return rows_of(vae(train__epochs=10, train__learning_rate=3e-3, train__batch_size=4, **more),
                       small_dataset(80))[-1]

    heavy = end(loss__kl=10.0)
    assert heavy["latent/active_units"] == 0 and heavy["val/kl_nats"] < 1
    free = end(loss__kl=10.0, loss__free_bits=4.0)
    assert free["latent/active_units"] > 0.5 and free["val/kl_nats"] > 2     # as a mean, of 8 nats that cost nothing
    optimal = end(loss__kl=1.0, loss__optimal_variance=True)
    assert optimal["latent/active_units"] > 0.9 and optimal["val/nelbo"] < heavy["val/nelbo"] - 50


# Which epochs count ---------------------------------------------------------------------------------------------------

def test_patience_and_the_best_epoch_begin_where_the_weight_is_final():
    config = linear(3, 12, train__patience=2, **STILL)
    results = list(train(config, small_dataset()))
    assert [result.improved for result in results] == [False] * 3 + [True, False, False]
    rows = [{"epoch": result.epoch, "seconds": 1.0, **result.metrics} for result in results]
    assert own_end(rows, config) == 6 and best_row(rows, config)["epoch"] == 4
    assert own_end(rows[:5], config) is None and best_row(rows[:3], config) is None


@settings(max_examples=100)
@given(st.lists(st.sampled_from([1.0, 2.0, 3.0, math.nan]), max_size=12), st.integers(1, 4),
       st.none() | st.integers(1, 3))
def test_what_came_before_is_as_if_it_had_not_been(values, warmup, patience):
    rows = [{"epoch": epoch, "seconds": 1.0, "val/mse": value} for epoch, value in enumerate(values, start=1)]
    config, plain = linear(warmup, 12, train__patience=patience), vae(train__epochs=12 - warmup,
                                                                      train__patience=patience)
    late = [{**row, "epoch": row["epoch"] - warmup} for row in rows[warmup:]]
    end, best = own_end(late, plain), best_row(late, plain)
    assert own_end(rows, config) == (None if end is None else end + warmup)
    assert (best_row(rows, config) or {}).get("epoch") == (best and best["epoch"] + warmup)


def test_a_plateau_of_the_warm_up_does_not_lower_the_learning_rate():
    config = linear(4, 9, train__schedule="plateau", train__learning_rate=1e-30, train__weight_decay=0.0)
    rates = [result.state()["optimizer"]["param_groups"][0]["lr"] for result in train(config, small_dataset())]
    assert rates == [1e-30] * 7 + [5e-31] * 2           # the fifth epoch is the best, the two after it no better


def test_a_training_on_disk_keeps_the_best_of_what_counts(tmp_path):
    trajectory, config = Trajectory(tmp_path / "t"), linear(2, 4)
    best = []
    for _ in trajectory.train(config, small_dataset(), "cpu"):
        best.append(trajectory.status()["best_epoch"])
    assert best[:2] == [0, 0] and best[2] == 3
    kept = sorted(path.name for path in trajectory.folder.glob("best*"))
    assert kept == ["best.pt", f"best_epoch_{best[3]:04d}.pt"]
    assert read_checkpoint(trajectory.folder / "best.pt")["metrics"]["beta"] == 0.1


# Going on -------------------------------------------------------------------------------------------------------------

def same_state(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


GOING_ON = {
    "linear": linear(3, 5),
    "cyclical": cyclical(2, 6, loss__free_bits=0.5),
    "optimal variance": linear(2, 4, loss__optimal_variance=True, loss__kl=1.0),
    "batch normalisation": linear(2, 4, model__norm="batch", model__init="kaiming", train__ema=0.9,
                                  train__batch_size=20, model__downsampling_steps=4),
}


@pytest.mark.parametrize("name", GOING_ON)
def test_going_on_in_the_middle_of_a_schedule_is_bit_identical(tmp_path, name):
    config, dataset = GOING_ON[name], small_dataset()
    whole, stages = Trajectory(tmp_path / "whole"), []
    for row in whole.train(config, dataset, "cpu"):
        stages.append(tmp_path / f"after {row['epoch']}")
        shutil.copytree(whole.folder, stages[-1])
    for epoch, stage in enumerate(stages[:-1], start=1):
        torch.manual_seed(epoch)
        other = Trajectory(stage)
        assert [row["epoch"] for row in other.train(config, dataset, "cpu")] == list(
            range(epoch + 1, config.train.epochs + 1))
        assert [row | {"seconds": 0} for row in other.rows()] == [row | {"seconds": 0} for row in whole.rows()]
        for file in ("latest.pt", "best.pt"):
            mine, theirs = read_checkpoint(other.folder / file), read_checkpoint(whole.folder / file)
            assert same_state(mine["model"], theirs["model"]) and mine["epoch"] == theirs["epoch"]


@pytest.mark.parametrize("config", [
    cyclical(2, 8), linear(2, 5), vae(train__schedule="cosine", train__epochs=5),
    vae(train__schedule="plateau", train__epochs=6, train__min_delta=10.0)],
    ids=["cyclical", "linear", "cosine", "plateau"])
def test_weights_that_are_trained_once_more_are_the_same(tmp_path, config):
    """Whatever the schedules look at: the budget, or the epochs before."""
    dataset = small_dataset()
    trajectory = Trajectory(tmp_path / "t")
    states = {}
    for row in trajectory.train(config, dataset, "cpu"):
        states[row["epoch"]] = read_checkpoint(trajectory.folder / "latest.pt")
    last = config.train.epochs - 1
    for _ in trajectory.restore_weights(config, dataset, "cpu", last):
        pass
    assert same_state(read_checkpoint(trajectory.weights_path(last))["model"], states[last]["model"])
    # A checkpoint that lags behind the table, whose missing epochs are trained again on the way.
    behind = Trajectory(tmp_path / "behind")
    gone = (row for row in behind.train(config, dataset, "cpu"))
    for row in gone:
        if row["epoch"] == 3:
            shutil.copy(behind.folder / "latest.pt", tmp_path / "third.pt")
        if row["epoch"] == last:
            gone.close()
            break
    shutil.copy(tmp_path / "third.pt", behind.folder / "latest.pt")
    assert [row["epoch"] for row in behind.train(config, dataset, "cpu")] == list(range(4, last + 2))
    assert same_state(read_checkpoint(behind.folder / "latest.pt")["model"], states[last + 1]["model"])


# Batch normalisation --------------------------------------------------------------------------------------------------

BATCH_NORM = {"model__norm": "batch", "train__batch_size": 20, "model__downsampling_steps": 4}   # 20 images, then 1


@pytest.mark.parametrize("more", [{}, {"train__ema": 0.9}, {"train__precision": "bf16"}])
def test_batch_normalisation_trains_and_its_checkpoint_measures_the_same(tmp_path, more):
    config = vae(train__epochs=8, train__learning_rate=3e-3, loss__kl=1e-4, **BATCH_NORM, **more)
    dataset = small_dataset()
    trajectory = Trajectory(tmp_path / "t")
    rows = list(trajectory.train(config, dataset, "cpu"))
    assert trajectory.status()["state"] == "completed" and rows[-1]["val/mse"] < 0.95 * rows[0]["val/mse"]
    best = best_row(trajectory.rows(), config)
    model = load_model(trajectory.folder / "best.pt")
    images = to_unit(dataset.images[dataset.splits["val"]])
    with torch.no_grad():
        error = (model.decode(model.encode(images)["latent"])["rgb"] - images).square().mean().item()
    assert error == pytest.approx(best["val/mse"], rel=0.02 if more.get("train__precision") else 1e-4)


def test_the_average_has_statistics_of_its_own():
    state = list(train(vae(train__epochs=2, train__ema=0.5, model__norm="batch"), small_dataset()))[-1].state()
    name = "encoder.trunk.1.running_var"
    assert not torch.equal(state["model"][name], state["raw"][name])
    assert torch.allclose(state["model"][name], state["raw"][name], rtol=0.3)
    counted = "encoder.trunk.1.num_batches_tracked"
    assert state["model"][counted] == state["raw"][counted] == 2 * STEPS


def test_batch_normalisation_needs_a_batch():
    dataset = small_dataset()
    one = replace(dataset, splits={**dataset.splits, "train": dataset.splits["train"][:1]})
    with pytest.raises(InputError, match=r"model\.norm: 'batch' takes statistics over several images"):
        train(vae(model__norm="batch"), one)
    assert rows_of(vae(train__epochs=1), one)


def waits(config) -> int:
    """How often a training waits for the GPU."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            list(train(config, small_dataset(), device="cuda"))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_schedule_waits_no_oftener_for_a_gpu():
    waits(vae(train__epochs=1))                                              # what is set up once
    shaped = {"loss__free_bits": 0.1, "loss__optimal_variance": True, "model__norm": "batch"}
    assert 0 < waits(linear(2, 3, **shaped)) <= waits(vae(train__epochs=3))
