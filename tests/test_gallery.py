"""The arms of a sweep on the same validation images."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import PALETTE, small_config, small_dataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from racing import Lab, decision_of

from autoenc.checkpoint import build_model, checkpoint_content, data_shapes, load_model, save_checkpoint
from autoenc.data import IGNORED, prepare
from autoenc.evaluation.gallery import IMAGES, chosen_columns, compared_images, latent_histograms, write_gallery
from autoenc.interrupts import Deadline
from autoenc.metrics import to_uint8, to_unit
from autoenc.report import gallery
from autoenc.report.gallery import MOST_ARMS, exhibits, is_current
from autoenc.sweep import doors

torch.set_num_threads(1)

DATASET = small_dataset(100)                                          # 20 validation images
ARMS = {"A": {"train__seed": 1}, "B": {"train__seed": 2, "model__latent_channels": 3},
        "C": {"train__seed": 3, "loss__segmentation": 0.1}}


def arm(folder: Path, name: str, dataset=DATASET, **settings) -> tuple[str, Path, int, str, str]:
    """An untrained model, saved as training saves it."""
    config = small_config(**settings)
    path = folder / f"{name}.pt"
    save_checkpoint(path, checkpoint_content(config, data_shapes(dataset), build_model(config, dataset), epoch=3,
                                             metrics={}))
    return name, path, 3, f"key of {name}", f"{name}_seed42"


def made(arms, folder: Path, dataset=DATASET) -> dict:
    assert write_gallery(arms, dataset, folder, "cpu") == []
    content = json.loads((folder / "gallery.json").read_text())
    assert {path.name for path in folder.iterdir()} == {
        "gallery.json", content["inputs"], *(told["picture"] for told in content["arms"].values())}
    return content


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


@pytest.fixture(scope="module")
def arms(tmp_path_factory) -> list:
    folder = tmp_path_factory.mktemp("arms")
    return [arm(folder, name, **settings) for name, settings in ARMS.items()]


@torch.inference_mode()
def reconstructed(path: Path, indices: list[int], dataset=DATASET) -> tuple[torch.Tensor, np.ndarray, dict]:
    """Latents, each image's mean squared error and the outputs, the plain way."""
    model, images = load_model(path), to_unit(dataset.images[indices])
    encoded = model.encode(images)
    latent = model.mean_latent(encoded)
    outputs = model.decode(latent)
    return latent, (outputs["rgb"] - images).square().mean((1, 2, 3)).numpy(), outputs


# What is shown --------------------------------------------------------------------------------------------------------

def test_every_arm_shows_the_same_images(arms, tmp_path):
    content = made(arms, tmp_path / "gallery")
    val = DATASET.splits["val"].tolist()
    assert (content["format"], content["images"], content["cell"]) == (1, len(val), 16)
    assert content["rows"] == ["image", "classes"] and list(content["arms"]) == ["A", "B", "C"]
    errors = {name: reconstructed(path, val)[1] for name, path, *_ in arms}
    order = np.argsort(np.mean([np.log(error) for error in errors.values()], axis=0), kind="stable")
    expected = [*order[:3], *order[8:11], *order[-3:]]                # of 20, three around the median
    assert [column["index"] for column in content["columns"]] == [val[position] for position in expected]
    assert [column["kind"] for column in content["columns"]] == ["best"] * 3 + ["typical"] * 3 + ["worst"] * 3
    for k, column in enumerate(content["columns"]):
        assert column["mse"] == pytest.approx(np.mean([error[expected[k]] for error in errors.values()]), rel=1e-4)
    for name, path, *_ in arms:
        told = content["arms"][name]
        assert (told["trial"], told["key"], told["epoch"], told["weights"]) == (
            f"{name}_seed42", f"key of {name}", 3, path.name)
        assert told["mse"] == pytest.approx(errors[name][expected], rel=1e-4)
        assert told["psnr"] == pytest.approx(10 * np.log10(4 / np.array(told["mse"])))


def test_pictures(arms, tmp_path):
    content = made(arms, tmp_path)
    indices = [column["index"] for column in content["columns"]]
    inputs = pixels(tmp_path / "inputs.png")
    assert inputs.shape == (2 * 16, 9 * 16, 3)
    for k, index in enumerate(indices):
        cell = inputs[:, 16 * k:16 * (k + 1)]
        classes = DATASET.segmentation[index]
        assert (cell[:16] == DATASET.images[index]).all()
        assert (cell[16:][classes != IGNORED] == PALETTE[classes[classes != IGNORED]]).all()
        assert (cell[16:][classes == IGNORED] == (255, 0, 255)).all()
    for name, path, *_ in arms:
        _, _, outputs = reconstructed(path, indices)
        picture = pixels(tmp_path / content["arms"][name]["picture"])
        assert picture.shape == inputs.shape
        rgb = np.concatenate(list(to_uint8(outputs["rgb"])), axis=1)
        assert np.abs(picture[:16].astype(int) - rgb).max() <= 1       # another memory layout, another rounding
        distance = np.square(picture[:16, :, None].astype(int) - PALETTE).sum(-1).argmin(-1)
        predicted = outputs["segmentation"].argmax(1).numpy() if name == "C" else None
        expected = PALETTE[distance if predicted is None else np.concatenate(list(predicted), axis=1)]
        assert (picture[16:] == expected).all(-1).mean() > 0.99


def test_the_same_bytes_every_time(arms, tmp_path):
    made(arms, tmp_path / "one")
    made(arms, tmp_path / "two")
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_fewer_images_than_columns(arms, tmp_path, count):
    few = dataclasses.replace(DATASET, splits={**DATASET.splits, "val": DATASET.splits["val"][:count]})
    content = made(arms, tmp_path, few)
    assert sorted(column["index"] for column in content["columns"]) == few.splits["val"].tolist()
    kinds = [column["kind"] for column in content["columns"]]
    assert kinds == sorted(kinds) and kinds.count("best") == kinds.count("worst")
    assert pixels(tmp_path / "A.png").shape == (2 * 16, count * 16, 3)


@given(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), min_size=1, max_size=40))
def test_columns(scores):
    columns = chosen_columns(np.array(scores))
    positions = [position for position, _ in columns]
    assert len(set(positions)) == len(positions) == min(9, len(scores))
    assert positions == sorted(positions, key=lambda position: (scores[position], position))
    kinds = [kind for _, kind in columns]
    assert kinds == sorted(kinds) and all(kinds.count(kind) <= 3 for kind in kinds)
    if len(scores) >= 3:
        assert set(kinds) == {"best", "typical", "worst"}
        order = sorted(range(len(scores)), key=lambda position: (scores[position], position))
        assert positions[0] == order[0] and positions[-1] == order[-1]
        assert len(scores) % 2 == 0 or order[len(scores) // 2] in positions


def test_a_large_split_is_drawn_from_and_equal_images_stand_once(tmp_path):
    large = small_dataset(10 * IMAGES, 16)
    rows = compared_images(large)
    assert len(rows) == IMAGES and set(rows) <= set(large.splits["val"]) and len(large.splits["val"]) == 2 * IMAGES
    assert (rows == compared_images(large)).all() and (np.diff(rows) > 0).all()
    twins = DATASET.images.copy()
    val = DATASET.splits["val"]
    twins[val[5:]] = twins[val[2]]
    assert compared_images(dataclasses.replace(DATASET, images=twins)).tolist() == val[:5].tolist()


def test_data_without_palette(tmp_path):
    bare = small_dataset(60, segmentation=False, labels=False)
    content = made([arm(tmp_path, "A", bare)], tmp_path / "gallery", bare)
    assert content["rows"] == ["image"]
    assert pixels(tmp_path / "gallery" / "inputs.png").shape == pixels(tmp_path / "gallery" / "A.png").shape \
        == (16, 9 * 16, 3)


def test_large_images_are_reduced(tmp_path):
    large = small_dataset(30, 160)
    content = made([arm(tmp_path, "A", large, data__image_size=160)], tmp_path / "gallery", large)
    assert content["cell"] == 128
    inputs, picture = (pixels(tmp_path / "gallery" / name) for name in ("inputs.png", "A.png"))
    assert inputs.shape == picture.shape == (2 * 128, len(content["columns"]) * 128, 3)
    colours = {tuple(colour) for colour in inputs[128:].reshape(-1, 3)}
    assert colours <= {*(tuple(colour) for colour in PALETTE), (255, 0, 255)}          # classes are not mixed
    index = content["columns"][0]["index"]
    mean = DATASET.images.dtype.type(large.images[index].mean((0, 1)).round())
    assert np.abs(inputs[:128, :128].mean((0, 1)) - mean).max() < 2


# Latents --------------------------------------------------------------------------------------------------------------

def test_histograms_are_of_the_latents(arms, tmp_path):
    content = made(arms, tmp_path)
    val = DATASET.splits["val"].tolist()
    for name, path, *_ in arms:
        latent = reconstructed(path, val)[0].transpose(0, 1).flatten(1).numpy()
        found = content["arms"][name]["latent"]
        assert len(found["edges"]) == 41 and np.allclose(np.diff(found["edges"], 2), 0, atol=1e-9)
        assert found["edges"][0] == pytest.approx(np.percentile(latent, 0.1), abs=1e-4)
        assert found["edges"][-1] == pytest.approx(np.percentile(latent, 99.9), abs=1e-4)
        assert [sum(counts) for counts in found["counts"]] == [latent.shape[1]] * len(latent)
        assert found["mean"] == pytest.approx(latent.mean(1), abs=1e-4)
        assert found["std"] == pytest.approx(latent.std(1), abs=1e-4)
        for counts, channel in zip(found["counts"], latent, strict=True):
            assert abs(counts[0] - (channel < found["edges"][1]).sum()) <= 1
            assert abs(counts[20] - ((channel >= found["edges"][20]) & (channel < found["edges"][21])).sum()) <= 1


def test_a_vae_shows_its_posteriors_mean_normalised_where_it_normalises(tmp_path):
    settings = {"model__variational": True, "loss__kl": 1e-3, "model__latent": "sample",
                "model__normalize_latents": True}
    vae = arm(tmp_path, "V", **settings)
    content = torch.load(vae[1], weights_only=True)
    content["model"]["encoder.latent_normalizer.shift"] += 3
    torch.save(content, vae[1])
    found = made([vae], tmp_path / "gallery")["arms"]["V"]
    with torch.inference_mode():
        model = load_model(vae[1])
        mean = model.encode(to_unit(DATASET.images[DATASET.splits["val"]]))["mu"].mean((0, 2, 3)) - 3
    assert found["latent"]["mean"] == pytest.approx(mean.tolist(), abs=1e-4)


def test_a_constant_latent_has_a_histogram():
    found = latent_histograms(np.zeros((2, 50), dtype=np.float32))
    assert [sum(counts) for counts in found["counts"]] == [50, 50] and found["edges"][0] < 0 < found["edges"][-1]


# What is there before, and what is broken -----------------------------------------------------------------------------

def test_a_broken_checkpoint_is_left_out_and_told(arms, tmp_path):
    broken = tmp_path / "B.pt"
    broken.write_bytes(arms[1][1].read_bytes()[:-500])
    gone = tmp_path / "gone.pt"
    three = [arms[0], ("B", broken, *arms[1][2:]), ("C", gone, *arms[2][2:])]
    problems = write_gallery(three, DATASET, tmp_path / "gallery", "cpu")
    assert len(problems) == 2 and "B: " in problems[0] and str(broken) in problems[0] and str(gone) in problems[1]
    assert list(json.loads((tmp_path / "gallery" / "gallery.json").read_text())["arms"]) == ["A"]

    content = torch.load(arms[1][1], weights_only=True)
    content["model"]["encoder.mean.bias"] += float("nan")
    torch.save(content, broken)
    before = {path: path.read_bytes() for path in (tmp_path / "gallery").iterdir()}
    problems = write_gallery(three[1:], DATASET, tmp_path / "gallery", "cpu")
    assert len(problems) == 2 and "not finite" in problems[0]
    assert before == {path: path.read_bytes() for path in (tmp_path / "gallery").iterdir()}


def test_no_picture_of_another_gallery_stays(arms, tmp_path):
    made(arms, tmp_path)
    content = made([arms[2]], tmp_path)                                # checks the folder's files
    assert list(content["arms"]) == ["C"]


def test_an_arm_may_be_called_as_the_inputs_are(arms, tmp_path):
    content = made([("inputs", *arms[0][1:]), ("_inputs", *arms[1][1:]), ("INPUTS", *arms[2][1:])], tmp_path)
    names = [content["inputs"], *(told["picture"] for told in content["arms"].values())]
    assert len({name.lower() for name in names}) == 4


# Of a sweep -----------------------------------------------------------------------------------------------------------

def keep(run) -> Path:
    """A file for the weights of a run's best epoch."""
    path = run.trajectory.weights_path(len(run.rows))
    path.touch()
    return path


def test_the_completed_arms_are_shown_best_first(tmp_path):
    levels = {"A": 0.12, "C": 0.1, "B": 0.11, "D": 0.9, "E": 0.13}

    def curve(config):
        level = config.train.weight_decay
        return ["diverged"] if level == 0.9 else [level * (1 + 1 / epoch) for epoch in range(1, 9)]

    lab = Lab(tmp_path, curve, arms={name: {"train.weight_decay": level} for name, level in levels.items()},
              asha=False, decision={"repeats": 2, "within": "50%"})
    race = lab.run()
    kept = {trial.name: keep(trial.run) for trial in race.trials
            if trial.run.state == "completed" and trial.candidate.name != "E"}
    assert "B_seed43" in kept
    shown = exhibits(race, decision_of(race))
    assert [(name, epoch, trial) for name, _, epoch, _, trial in shown] == [
        ("A", 8, "A_seed42"), ("C", 8, "C_seed42"), ("B", 8, "B_seed42")]       # the winner, then by score
    assert [path for _, path, *_ in shown] == [kept[trial] for *_, trial in shown]
    assert [key for *_, key, _ in shown] == [kept[trial].parent.name for *_, trial in shown]


def test_of_many_arms_the_best_are_shown(tmp_path):
    levels = {f"arm{k:02d}": 1 - 0.02 * k for k in range(MOST_ARMS + 6)}
    lab = Lab(tmp_path, arms={name: {"train.weight_decay": level} for name, level in levels.items()}, asha=False)
    for name in levels:
        lab.store_epochs(name, 8)
    race = lab.race()
    for run in race.runs.values():
        keep(run)
    assert [name for name, *_ in exhibits(race, decision_of(race))] == sorted(levels, reverse=True)[:MOST_ARMS]


def test_a_gallery_is_current_while_it_shows_just_these_epochs(arms, tmp_path):
    assert not is_current(tmp_path, arms)
    made(arms, tmp_path)
    assert is_current(tmp_path, arms) and is_current(tmp_path, arms[::-1])
    other_epoch, other_key = [("A", arms[0][1], 4, *arms[0][3:])], [("A", *arms[0][1:3], "other", arms[0][4])]
    normalized = [("A", arms[0][1].with_name("normalized.pt"), *arms[0][2:])]
    for first in (other_epoch, other_key, normalized, []):
        assert not is_current(tmp_path, [*first, *arms[1:]])
    (tmp_path / "B.png").unlink()
    assert not is_current(tmp_path, arms)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"arms": []}', '{"arms": {"A": 3}, "inputs": 1}',
                                     "[" * 100_000])
def test_a_broken_gallery_is_none(arms, tmp_path, content):
    (tmp_path / "gallery.json").write_text(content)
    assert not is_current(tmp_path, arms)


# On a cluster ---------------------------------------------------------------------------------------------------------

@pytest.fixture
def cluster(ray_token):
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(ray_token))
        repository = Path(__file__).resolve().parents[1]
        patch.setenv("PYTHONPATH", os.pathsep.join([str(repository), str(repository / "tests")]))
        doors.prepare_local()
        from autoenc.sweep import ray_cluster

        with ray_cluster.cluster(None) as cluster:
            yield cluster
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
def test_a_worker_makes_it_and_no_failure_of_it_is_raised(tmp_path, cluster, monkeypatch):
    from autoenc.sweep import run_ray

    lab = Lab(tmp_path, arms={"A": {"train.weight_decay": 0.1}, "B": {"train.weight_decay": 0.2}}, asha=False,
              config={"data": {"image_size": 16, "limit": 40, "cache_dir": str(tmp_path / "cache")},
                      "model": {"latent_channels": 2, "base_channels": 8, "downsampling_steps": 2},
                      "train": {"epochs": 2}})
    dataset = prepare(lab.arms[0].config.data)
    for run in lab.race().runs.values():
        list(run.trajectory.train(run.config, dataset, "cpu"))
    race, folder = lab.race(), lab.folder.path / "gallery"
    decision = decision_of(race)

    def draw(target: Path = folder, **more) -> str:
        return gallery.draw(race, decision, target, partial(run_ray.apart, race, cluster), **more)

    near = Deadline(time.monotonic() + 40, "a test")
    assert "a test is nearly over" in draw(deadline=near) and not folder.exists()
    assert draw(deadline=Deadline(time.monotonic() + 1000, "a test")) == ""
    assert is_current(folder, exhibits(race, decision)) and len(exhibits(race, decision)) == 2
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert draw() == "" and before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}

    (tmp_path / "file").touch()
    assert "NotADirectoryError" in draw(tmp_path / "file" / "gallery")
    weights = exhibits(race, decision)[0][1]
    weights.write_bytes(weights.read_bytes()[:-100])
    assert str(weights) in draw(tmp_path / "other") and (tmp_path / "other" / "gallery.json").is_file()

    def die(*given) -> None:
        os._exit(1)

    def sleep(*given) -> None:
        time.sleep(100)

    monkeypatch.setattr(gallery, "make", die)
    assert "ActorDiedError" in draw(tmp_path / "third")
    monkeypatch.setattr(gallery, "make", sleep)
    monkeypatch.setattr(gallery, "SECONDS", 31.0)
    monkeypatch.setattr(gallery, "SPARE_SECONDS", 1.0)
    began = time.monotonic()
    assert "not done within" in draw(tmp_path / "third", deadline=Deadline(time.monotonic() + 4, "a test"))
    assert time.monotonic() - began < 20 and not (tmp_path / "third").exists()
    for path in tmp_path.glob("store/*/best*.pt"):                     # no weights are kept: nothing to show
        path.unlink()
    assert draw(tmp_path / "third") == "" and not (tmp_path / "third").exists()
