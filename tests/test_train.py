from __future__ import annotations

import copy
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import PALETTE, small_config, small_dataset
from hypothesis import given
from hypothesis import strategies as st

from autoenc import figures
from autoenc.batches import Batches
from autoenc.checkpoint import build_model, read_checkpoint, save_checkpoint
from autoenc.data import prepare
from autoenc.errors import InputError
from autoenc.schedule import learning_rate
from autoenc.train import AdamW, Diverged, train
from autoenc.yamlfile import dump_yaml

torch.set_num_threads(1)

PLAIN = {}
HEADS = {"loss__segmentation": 0.1, "loss__classification": 0.05, "loss__l1": 0.2}
VAE = {"model__variational": True, "loss__kl": 1e-3, "model__latent": "sample", **HEADS}


def run(settings, dataset=None, **more):
    """All results with their states, taken as they come."""
    return [(result, result.state()) for result in train(small_config(**settings), dataset or small_dataset(), **more)]


def same(left, right) -> bool:
    """Bit for bit, NaN equal to NaN."""
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right) and left.dtype == right.dtype
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right or (left != left and right != right)


@pytest.mark.parametrize("settings", [PLAIN, HEADS, VAE, {**PLAIN, "train__precision": "bf16"}])
def test_resuming_equals_going_on_bit_for_bit(tmp_path, settings):
    settings = {**settings, "train__epochs": 3, "train__sample_every": 2}
    torch.manual_seed(9)
    before = torch.get_rng_state()
    whole = run(settings)
    assert torch.equal(torch.get_rng_state(), before)
    save_checkpoint(tmp_path / "latest.pt", whole[0][1])
    torch.manual_seed(77)
    rest = run(settings, resume=read_checkpoint(tmp_path / "latest.pt"), history=[whole[0][0].metrics])
    assert [result.epoch for result, _ in rest] == [2, 3]
    for (left, left_state), (right, right_state) in zip(whole[1:], rest, strict=True):
        assert same(left.metrics, right.metrics) and same(left_state, right_state)
        assert left.improved == right.improved
        assert (left.samples is None) == (right.samples is None)
        assert left.samples is None or np.array_equal(left.samples, right.samples)


def test_resuming_leaves_the_checkpoint_as_it_was():
    first = run({"train__epochs": 1})[0][1]
    again = run({"train__epochs": 1})[0][1]
    run({"train__epochs": 2}, resume=first)
    assert same(first, again)


def test_a_copy_stays_as_it_was_and_what_is_not_copied_is_written_alike(tmp_path):
    steps = train(small_config(train__epochs=2, train__ema=0.5), small_dataset())
    first = next(steps)
    copied, bare = first.state(), first.state(copy=False)
    save_checkpoint(tmp_path / "bare.pt", bare)
    before = copy.deepcopy(copied)
    next(steps)
    assert same(copied, before) and same(read_checkpoint(tmp_path / "bare.pt"), before)
    assert not same(bare["model"], before["model"])


def test_the_optimizer_is_torchs():
    """Also where it goes on from a state, and with gradients of nothing."""
    states = []
    for kind in (AdamW, torch.optim.AdamW):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Linear(4, 1))
        optimizer = kind(model.parameters(), lr=0.1, weight_decay=0.2, fused=True)
        for step in range(4):
            if step == 2:
                kept = copy.deepcopy(optimizer.state_dict())
                optimizer = kind(model.parameters(), lr=0.7, fused=True)
                optimizer.load_state_dict(kept)
            optimizer.zero_grad()
            (model if step else model[1])(torch.randn(6, 4 + bool(step))).square().sum().backward()
            optimizer.step()
        states.append([model.state_dict(), optimizer.state_dict()])
    assert same(*states)


def test_training_loads_no_compiler(tmp_path):
    code = (f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
            "from pathlib import Path\nfrom helpers import small_config, small_dataset\n"
            "from autoenc.finish import finish\nfrom autoenc.trajectory import Trajectory\n"
            f"trajectory, config, data = Trajectory(Path({str(tmp_path)!r})), small_config(), small_dataset()\n"
            "rows = list(trajectory.train(config, data, 'cpu'))\n"
            "finish(trajectory, config, data, 'cpu', 2, ['latent/smoothness', 'encode_ms'])\n"
            "print(len(rows), sorted({'torch', 'torch._dynamo', 'sympy'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "2 ['torch']", done.stdout + done.stderr


def test_seeds():
    one, two = run(VAE), run(VAE)
    assert same([state for _, state in one], [state for _, state in two])
    assert same([result.metrics for result, _ in one], [result.metrics for result, _ in two])
    other = run({**VAE, "train__seed": 43})
    assert one[0][0].metrics["val/mse"] != other[0][0].metrics["val/mse"]


class RecordedArray(np.ndarray):
    """An array that notes which rows were asked for."""

    def __getitem__(self, rows):
        if isinstance(rows, np.ndarray):
            self.asked.append(rows.tolist())
        return np.asarray(self)[rows]


def order_of(settings) -> list[list[int]]:
    dataset = small_dataset()
    images = dataset.images.view(RecordedArray)
    images.asked = []
    list(train(small_config(**settings, train__sample_every=0), replace(dataset, images=images)))
    return images.asked


def test_heads_change_no_order_and_epochs_do():
    plain, heads = order_of(PLAIN), order_of(HEADS)
    assert plain == heads
    val = sorted(small_dataset().splits["val"].tolist())
    train_rows = [rows for rows in plain if rows != val]
    assert [len(rows) for rows in train_rows] == [8, 8, 5, 8, 8, 5]              # the smaller last batch is kept
    first, second = np.concatenate(train_rows[:3]).tolist(), np.concatenate(train_rows[3:]).tolist()
    assert sorted(first) == sorted(second) == small_dataset().splits["train"].tolist() and first != second


def test_a_head_without_weight_changes_nothing_else():
    plain, idle = run(PLAIN), run({"model__heads": ["rgb", "segmentation"]})
    for (left, left_state), (right, right_state) in zip(plain, idle, strict=True):
        assert all(same(value, right.metrics[name]) for name, value in left.metrics.items())
        assert all(torch.equal(value, right_state["model"][name]) for name, value in left_state["model"].items())
        assert "val/segmentation_miou" in right.metrics and "val/segmentation_miou" not in left.metrics


def test_training_learns():
    settings = {"train__epochs": 12, "train__patience": None, "train__learning_rate": 3e-3, "train__sample_every": 0}
    results = [result for result, _ in run({**settings, **HEADS}, small_dataset(60))]
    first, last = results[0].metrics, results[-1].metrics
    assert last["train/mse"] < 0.5 * first["train/mse"] and last["val/mse"] < 0.75 * first["val/mse"]
    assert last["val/palette_miou"] > 1.2 * first["val/palette_miou"] and last["val/ssim"] > 2 * first["val/ssim"]
    assert all(result.seconds > 0 for result in results)


def test_figures_and_their_names():
    metrics = run(VAE)[0][0].metrics
    known = set(figures.MODES) | {"val/palette_classes", "val/segmentation_classes"}
    assert set(metrics) <= known
    elsewhere = {"val/log_sigma", "val/splats", *(f"val/{name}" for name in figures.OF_SPLATS)}
    assert set(figures.MONITORED) - elsewhere == set(metrics) & set(figures.MONITORED)
    assert metrics["beta"] == 1e-3 and metrics["latent_size"] == 2 * 4 * 4
    for split in ("train", "val"):
        terms = {"mse": 1.0, "l1": 0.2, "segmentation_ce": 0.1, "classification_ce": 0.05, "kl": 1e-3}
        assert metrics[f"{split}/loss"] == pytest.approx(
            sum(weight * metrics[f"{split}/{name}"] for name, weight in terms.items()))
        assert metrics[f"{split}/nelbo"] == pytest.approx(
            768 / 2 * math.log(2 * math.pi * math.e * metrics[f"{split}/mse_sampled"]) + metrics[f"{split}/kl_nats"])
    plain = run(PLAIN)[0][0].metrics
    assert "beta" not in plain and "val/kl" not in plain and "val/palette_miou" in plain


def test_figures_of_splats_and_their_names():
    dataset = small_dataset(splats=32)
    splats = {"data__source": "splats", "data__splats": 32, "model__kind": "conv1d", "model__latent_dim": 6,
              "model__variational": True, "loss__mse": 0.0, "loss__splats": 1.0, "loss__kl": 1e-3}
    metrics = run(splats, dataset)[0][0].metrics
    known = {"val/splats", "train/splats", "val/mse", "val/psnr", "val/ssim", "val/mse_sampled", "val/kl_nats",
             "val/nelbo", "train/nelbo", "latent/active_units", *(f"val/{name}" for name in figures.OF_SPLATS)}
    assert known <= set(metrics) <= set(figures.MODES)
    assert "train/mse" not in metrics and metrics["latent_size"] == 6
    for split in ("train", "val"):
        assert metrics[f"{split}/loss"] == pytest.approx(metrics[f"{split}/splats"] + 1e-3 * metrics[f"{split}/kl"])
    calibrated = run({**splats, "loss__optimal_variance": True, "loss__kl": 1.0, "train__epochs": 1},
                     dataset)[0][0].metrics
    elements = 32 * 8
    bound = (calibrated["train/nelbo"] / elements) - 0.5 * math.log(2 * math.pi)       # per number, as it is minimised
    assert calibrated["train/loss"] == pytest.approx(bound, rel=1e-4)
    # Rendered, the images weigh in as well, and training reports their error.
    rendered = run({**splats, "loss__mse": 0.5, "train__epochs": 1}, dataset)[0][0].metrics
    assert rendered["train/loss"] == pytest.approx(
        rendered["train/splats"] + 0.5 * rendered["train/mse"] + 1e-3 * rendered["train/kl"])


def test_train_figures_are_those_of_the_steps():
    """With a learning rate too small to move a weight, training sees the error that validation would."""
    dataset = small_dataset()
    dataset.splits["val"] = dataset.splits["train"]
    metrics = run({"train__learning_rate": 1e-30, "train__weight_decay": 0.0, "train__epochs": 1, **HEADS},
                  dataset)[0][0].metrics
    for name in ("loss", "mse", "psnr", "l1", "segmentation_ce", "classification_ce"):
        assert metrics[f"train/{name}"] == pytest.approx(metrics[f"val/{name}"], rel=1e-4), name
    assert metrics["train/grad_norm"] > 0 and metrics["train/spikes"] == 0


def test_generated_layouts(tmp_path):
    """The real thing: read-only, memory-mapped arrays."""
    config = small_config(data__limit=60, data__cache_dir=str(tmp_path), loss__segmentation=0.1,
                          loss__classification=0.1, train__epochs=1)
    dataset = prepare(config.data)
    result = next(train(config, dataset))
    assert math.isfinite(result.metrics["val/palette_miou"]) and result.samples.shape[0] == 3 * 16
    assert len(result.state()["shapes"]["classes"]) == len(dataset.classes) == 11


def test_data_without_classes_and_labels():
    metrics = run(PLAIN, small_dataset(segmentation=False, labels=False))[0][0].metrics
    assert not [name for name in metrics if "miou" in name or "classif" in name]


def test_samples():
    results = [result for result, _ in run({"train__epochs": 3, "train__sample_every": 2, **HEADS})]
    assert [result.samples is not None for result in results] == [True, True, False]
    dataset = small_dataset()
    val = dataset.splits["val"]
    count = min(8, len(val))
    picture = results[0].samples
    assert picture.dtype == np.uint8 and picture.shape == (3 * 16, count * 16, 3)
    shown = dataset.images[val[np.linspace(0, len(val) - 1, count).round().astype(int)]]
    assert np.array_equal(picture[:16], np.concatenate(list(shown), axis=1))
    assert {tuple(colour) for colour in picture[32:].reshape(-1, 3)} <= {tuple(colour) for colour in PALETTE}
    assert np.array_equal(picture[:16], results[1].samples[:16])
    assert run({"train__sample_every": 0})[0][0].samples is None
    bare = run(PLAIN, small_dataset(segmentation=False))[0][0].samples
    assert bare.shape == (2 * 16, count * 16, 3)


@pytest.mark.parametrize("learning_rate, precision", [(1e30, "fp32"), (1e38, "fp32")])
def test_divergence_is_told(learning_rate, precision):
    with pytest.raises(Diverged) as caught:
        run({"train__learning_rate": learning_rate, "train__precision": precision})
    assert caught.value.epoch == 1 and 2 <= caught.value.step <= 3
    assert caught.value.what in ("loss", "gradient")


def test_an_infinite_term_is_divergence_at_its_step():
    with pytest.raises(Diverged) as caught:
        run({"loss__kl": 1e6, "model__variational": True, "train__learning_rate": 1e18})
    assert (caught.value.epoch, caught.value.what) in {(1, "loss"), (1, "gradient")}


def test_patience_ends_training_and_history_counts():
    still = {"train__learning_rate": 1e-30, "train__weight_decay": 0.0, "train__epochs": 9, "train__patience": 2}
    results = run(still)
    assert [result.epoch for result, _ in results] == [1, 2, 3]
    assert [result.improved for result, _ in results] == [True, False, False]
    history = [result.metrics for result, _ in results]
    assert run(still, resume=results[2][1], history=history) == []
    going = run({**still, "train__patience": 4}, resume=results[2][1], history=history)
    assert [result.epoch for result, _ in going] == [4, 5]


def test_an_undefined_monitored_figure_is_no_divergence():
    dataset = small_dataset()
    dataset.segmentation[:] = 255
    results = run({"train__monitor": "val/palette_miou", "train__patience": None}, dataset)
    assert len(results) == 2 and not any(result.improved for result, _ in results)
    assert math.isnan(results[0][0].metrics["val/palette_miou"])


def test_wrong_input_is_told_at_the_call():
    with pytest.raises(InputError, match=r"train\.precision: 'fp16' needs a GPU"):
        train(small_config(train__precision="fp16"), small_dataset())
    with pytest.raises(InputError, match=r"loss\.segmentation"):
        train(small_config(loss__segmentation=0.1), small_dataset(segmentation=False))
    empty = small_dataset()
    empty.splits["val"] = empty.splits["val"][:0]
    with pytest.raises(InputError, match=r"data\.split: .* no image in val"):
        train(small_config(), empty)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("resident", [True, False])
def test_on_a_gpu(precision, resident, monkeypatch):
    monkeypatch.setattr("autoenc.batches.RESIDENT_BYTES", 2 * 10**9 if resident else 0)
    settings = {**VAE, "train__precision": precision, "train__epochs": 8, "train__patience": None}
    results = run(settings, device="cuda")
    assert results[-1][0].metrics["val/mse"] < results[0][0].metrics["val/mse"]
    assert all(weight.device.type == "cpu" for weight in results[0][1]["model"].values())
    rest = run(settings, device="cuda", resume=results[3][1], history=[result.metrics for result, _ in results[:4]])
    assert [result.epoch for result, _ in rest] == [5, 6, 7, 8]
    if precision != "fp16":
        with pytest.raises(Diverged):
            run({**settings, "train__learning_rate": 1e30}, device="cuda")


def test_batches_hold_what_the_arrays_do():
    dataset = small_dataset()
    batches = Batches(dataset, dataset.splits["val"], torch.device("cpu"), segmentation=True, labels=True)
    order = np.array([3, 0, 5, 1, 2, 4])
    parts = list(batches.pass_over(4, order))
    rows = dataset.splits["val"][order]
    assert [len(part["images"]) for part in parts] == [4, 2]
    for name, array in (("segmentation", dataset.segmentation), ("labels", dataset.labels)):
        assert np.array_equal(torch.cat([part[name] for part in parts]).numpy(), array[rows])
    images = torch.cat([part["images"] for part in parts]).permute(0, 2, 3, 1)
    assert np.allclose(images.numpy(), dataset.images[rows] / 127.5 - 1, atol=1e-6)


VALUES = st.lists(st.one_of(st.floats(-5, 5), st.integers(-2, 2).map(float), st.just(math.nan)), max_size=12)


@given(VALUES, st.sampled_from(["min", "max"]))
def test_best_epoch(values, mode):
    best = figures.best_epoch(values, mode)
    numbers = [value for value in values if value == value]
    if not numbers:
        assert best == 0
    else:
        assert best == values.index(min(numbers) if mode == "min" else max(numbers)) + 1


@given(VALUES, st.sampled_from(["min", "max"]), st.integers(1, 4), st.floats(0, 2))
def test_patience(values, mode, patience, min_delta):
    ends = [figures.patience_end(values[:end], mode, patience, min_delta) for end in range(len(values) + 1)]
    end = ends[-1]
    assert ends == [end if end and end <= count else None for count in range(len(values) + 1)]      # over for good
    assert figures.patience_end(values, mode, None, min_delta) is None
    mirrored = [-value for value in values]
    assert end == figures.patience_end(mirrored, "max" if mode == "min" else "min", patience, min_delta)
    if end and min_delta == 0:
        waited, earlier = values[end - patience:end], [value for value in values[:end - patience] if value == value]
        pick = min if mode == "min" else max
        assert not any(figures.better(mode, value, pick(earlier)) if earlier else value == value for value in waited)
    assert end is None or end >= patience
    for first in range(1, len(values) + 2):         # what is left out counts for nothing but the number of the epoch
        rest = figures.patience_end(values[first - 1:], mode, patience, min_delta)
        assert figures.patience_end(values, mode, patience, min_delta, first) == (rest and rest + first - 1)


def test_patience_counts_only_gains_above_min_delta():
    creeping = [1.0, 0.95, 0.9, 0.85, 0.8]
    assert figures.patience_end(creeping, "min", 3, min_delta=0.2) == 4
    assert figures.patience_end(creeping, "min", 3, min_delta=0.08) is None


# Learning rates, averages ---------------------------------------------------------------------------------------------

def test_the_cosine_falls_from_the_rate_towards_nothing():
    settings = small_config(train__schedule="cosine", train__epochs=10, train__learning_rate=2.0).train
    rates = [learning_rate(settings, epoch, []) for epoch in range(1, 11)]
    assert rates[0] == 2.0 and rates == sorted(rates, reverse=True) and 0 < rates[-1] < 0.1
    assert rates[5] == pytest.approx(1.0)


def test_the_rate_is_halved_on_each_plateau():
    settings = small_config(train__schedule="plateau", train__learning_rate=1.0).train
    values = [1.0, 0.9, 0.95, 0.95, 0.8, 0.85, 0.81, 0.82, 0.83]
    assert [learning_rate(settings, epoch, values[:epoch - 1]) for epoch in range(1, 11)] == [
        1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.25, 0.25, 0.125]


@given(VALUES, st.integers(0, 12), st.sampled_from(["constant", "cosine", "plateau"]))
def test_what_a_rate_depends_on_lies_before_it(values, epoch, schedule):
    settings = small_config(train__schedule=schedule, train__epochs=20).train
    rates = [learning_rate(settings, k + 1, values[:k]) for k in range(len(values) + 1)]
    assert all(0 < rate <= settings.learning_rate for rate in rates) and rates == sorted(rates, reverse=True)


def test_the_average_lags_behind_the_weights():
    plain, averaged = ([result.state() for result in train(
        small_config(train__epochs=2, train__ema=ema), small_dataset())] for ema in (None, 0.5))
    for one, two in zip(plain, averaged, strict=True):
        assert all(torch.equal(one["model"][name], two["raw"][name]) for name in one["model"])      # trains as before
    name = "encoder.mean.weight"
    start = build_model(small_config(), small_dataset()).state_dict()[name]
    moved = (averaged[1]["raw"][name] - start).norm()
    assert 0 < (averaged[1]["model"][name] - start).norm() < moved


def test_the_command_trains_a_normalised_configuration_to_its_end(tmp_path, monkeypatch, capsys):
    from autoenc import load_model
    from autoenc.train import main

    monkeypatch.setenv("AUTOENC_CACHE", str(tmp_path / "cache"))
    config = small_config(data__limit=40, train__epochs=1, model__normalize_latents=True)
    (tmp_path / "best_config.yaml").write_text(dump_yaml({"config": config.nested()}))
    assert main([str(tmp_path / "best_config.yaml"), "--output", str(tmp_path / "t")]) == 0
    path = capsys.readouterr().out.split()[-1]
    assert load_model(path).encoder.latent_normalizer.log_scale.abs().max() > 0
