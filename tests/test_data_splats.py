"""Splats as data: fitted to generated images or to files, or read from .npz files; and what is kept of them."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import random_splats
from PIL import Image
from splatfiles import EACH, config, files_in, images_in, table

from autoenc.data import Dataset, cached, check, compositions, layouts, originals, prepare, sources
from autoenc.data.splats import PARTS, curve_index, in_order
from autoenc.data.summary import fit_psnr
from autoenc.errors import InputError
from autoenc.render import render

pytestmark = pytest.mark.usefixtures("cache")


def part_of(dataset: Dataset) -> dict[str, str]:
    return {dataset.names[k]: name for name, indices in dataset.splits.items() for k in indices}


@pytest.fixture
def sets() -> np.ndarray:
    return random_splats(12, EACH, np.random.default_rng(1))


# Fitted to generated images -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("curve", ["hilbert", "morton"])
def test_compositions_by_default(cache, curve):
    data = config(curve=curve)
    check(data)
    assert cached(data) is None and originals(data, []).shape[0] == 0 and not cache.exists()
    dataset = prepare(data)
    assert dataset.splats.shape == (40, EACH, 8) and dataset.splats.dtype == np.float32
    assert dataset.images.shape == (40, 16, 16, 3) and dataset.images.dtype == np.uint8
    for array in (dataset.splats, dataset.images):
        assert isinstance(array, np.memmap) and not array.flags.writeable
    assert dataset.inputs is dataset.splats
    assert dataset.segmentation is dataset.palette is dataset.labels is None and dataset.classes == ()
    assert dataset.names[1] == "composition_000001" and dataset.duplicates == 0
    assert sorted(np.concatenate(list(dataset.splits.values()))) == list(range(40))
    assert np.array_equal(in_order(np.array(dataset.splats), curve), dataset.splats)
    assert (np.diff(curve_index(dataset.splats[..., :2], curve)) >= 0).all()


def test_images_are_what_the_splats_show():
    data = config(splats=200, limit=12, split=(0.4, 0.4, 0.2))
    dataset = prepare(data)
    shown = render(torch.from_numpy(np.array(dataset.splats)), 16).add(1).mul(127.5).permute(0, 2, 3, 1).numpy()
    assert np.abs(shown.clip(0, 255) - dataset.images).max() < 0.502
    images = originals(data, range(12))
    assert np.array_equal(images[3], compositions.generate(data.seed, 3, 16))
    assert fit_psnr(images, dataset.images) > 35      # nearly a splat a pixel
    assert not np.array_equal(images, dataset.images)
    refined = prepare(data.model_copy(update={"refine": 10}))
    assert fit_psnr(images, refined.images) > fit_psnr(images, dataset.images) + 3


def test_generated_layouts_have_labels():
    dataset = prepare(config(generated="layouts", limit=30))
    assert dataset.label_names == layouts.LABELS and dataset.names[2] == "layout_000002"
    assert dataset.labels.tolist() == [layouts.generate(42, index, 16)[1] for index in range(30)]
    classes = layouts.generate(42, 4, 16)[0]
    assert np.array_equal(originals(config(generated="layouts", limit=30), [4])[0], layouts.PALETTE[classes])


def test_every_setting_that_changes_splats_is_told_apart(cache):
    data = config()
    first = prepare(data)
    written = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    assert cached(data).fingerprint == prepare(data).fingerprint == first.fingerprint
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == written
    others = [prepare(data.model_copy(update=change)).fingerprint for change in (
        {"seed": 1}, {"limit": 41}, {"image_size": 24}, {"splats": 17}, {"curve": "morton"}, {"refine": 1},
        {"generated": "layouts"}, {"split": (0.6, 0.3, 0.1)})]
    assert len({first.fingerprint, *others}) == 9
    palette = data.model_copy(update={"palette": "absent.yaml", "label_column": "x"})      # not for splats
    assert cached(palette).fingerprint == first.fingerprint


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="processors cannot be chosen here")
@pytest.mark.parametrize("refine", [0, 2])
def test_the_same_bytes_with_any_number_of_threads(cache, refine):
    """The items of one thread, of as many as there are processors, and of a torch that may use two by itself."""
    everywhere, threads = os.sched_getaffinity(0), torch.get_num_threads()
    found = []
    try:
        for run, processors in enumerate(({min(everywhere)}, everywhere, everywhere)):
            os.sched_setaffinity(0, processors)
            torch.set_num_threads(1 + run // 2)
            data = config(limit=24, image_size=24, refine=refine, cache_dir=str(cache / str(run)))
            dataset = prepare(data)
            found.append((dataset.fingerprint, dataset.splats.tobytes(), dataset.images.tobytes()))
            assert torch.get_num_threads() == 1 + run // 2
    finally:
        os.sched_setaffinity(0, everywhere)
        torch.set_num_threads(threads)
    assert found[0] == found[1] == found[2]


# Read from files ------------------------------------------------------------------------------------------------------

def test_files_come_back_in_order(tmp_path, sets):
    """Shuffled splats under other names: rotations beyond a half turn, float64."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "splats"
    (folder / "a/deep").mkdir(parents=True)
    (folder / "b").mkdir()
    for k, splats in enumerate(sets):
        shuffled = rng.permutation(splats).astype(np.float64)
        shuffled[:, 4] += math.pi * (k % 3 - 1)
        with (folder / ("b" if k % 2 else "a/deep") / f"{k:02d}.NPZ").open("wb") as file:
            np.savez_compressed(file, **{name: shuffled[:, part] for name, part in PARTS.items()})
    (folder / "notes.txt").write_text("neither")
    dataset = prepare(config(manifest=str(folder)))
    assert list(dataset.names) == [*(f"a/deep/{k:02d}.NPZ" for k in range(0, 12, 2)),
                                   *(f"b/{k:02d}.NPZ" for k in range(1, 12, 2))]
    assert dataset.label_names == ("a", "b") and dataset.labels.tolist() == [0] * 6 + [1] * 6
    for name, splats in zip(dataset.names, dataset.splats, strict=True):
        assert np.allclose(splats, sets[int(Path(name).stem)], atol=1e-6)
    assert originals(config(manifest=str(folder)), [0]) is None


def test_a_manifest_of_files(tmp_path, sets):
    files_in(tmp_path / "x", sets)
    manifest = table(tmp_path / "m.csv", *([f"x/{k:02d}.npz", ("one", "two", "")[k % 3]] for k in range(12)))
    dataset = prepare(config(manifest=str(manifest)))
    assert dataset.labels.tolist() == [0, 1, -1] * 4 and np.array_equal(dataset.splats, sets)
    fewer = prepare(config(manifest=str(manifest), filters={"type": ["one", "two"]}))
    assert len(fewer.names) == 8
    assert len(prepare(config(manifest=str(manifest), limit=9)).names) == 9


def test_equal_sets_in_any_order_are_duplicates(tmp_path, sets):
    folder = files_in(tmp_path / "x", sets)
    rng = np.random.default_rng(0)
    files_in(folder, np.stack([rng.permutation(one) for one in sets]), "twin")
    for seed in range(5):
        dataset = prepare(config(manifest=str(folder), seed=seed))
        parts = part_of(dataset)
        assert dataset.duplicates == 12
        assert all(parts[f"{k:02d}.npz"] == parts[f"twin{k:02d}.npz"] for k in range(12))


def test_the_conversion_in_the_docs(tmp_path, monkeypatch):
    page = (Path(__file__).parents[1] / "docs/own-data.md").read_text(encoding="utf-8").split("\n## Splats\n")[1]
    monkeypatch.chdir(tmp_path)
    exec(page.split("```python\n")[1].split("```")[0], {})
    dataset = prepare(config(manifest="splats", splats=64, limit=None))
    assert dataset.splats.shape == (60, 64, 8)
    rng = np.random.default_rng(0)
    centres, deviations = rng.uniform(0, 63, (64, 2)), rng.uniform(1, 6, (64, 2))
    first = dataset.splats[0]
    nearest = np.abs(first[:, None, :2] - ((centres + 0.5) / 32 - 1)[None]).sum(-1).argmin(1)
    assert sorted(nearest) == list(range(64)) and np.allclose(first[:, 2:4], deviations[nearest] / 32, atol=1e-6)


# Fitted to image files ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_splats_are_fitted_to_image_files(tmp_path, fit):
    folder = tmp_path / "images"
    for k in range(10):
        (folder / "ab"[k % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(compositions.generate(5, k, 40)[:20]).save(folder / "ab"[k % 2] / f"{k}.png")
    data = config(manifest=str(folder), splats=200, fit=fit)
    dataset = prepare(data)
    images = originals(data, range(10))
    plain = prepare(data.model_copy(update={"source": "folder"}))
    assert np.array_equal(images, plain.images) and plain.splats is None and plain.inputs is plain.images
    assert fit_psnr(images, dataset.images) > 30
    assert dataset.label_names == ("a", "b") and np.array_equal(dataset.labels, plain.labels)


def test_files_that_are_added_or_touched_change_no_others(tmp_path):
    folder = images_in(tmp_path / "images", 14)
    data = config(manifest=str(folder), refine=2)
    before = prepare(data)
    os.utime(folder / "03.png", ns=(1, 1))
    assert cached(data) is None and prepare(data).fingerprint == before.fingerprint
    images_in(folder, 5, "+", start=100)      # they come first, and other files share their chunks
    after = prepare(data)
    assert after.names[0] == "+00.png"
    parts, was = part_of(after), part_of(before)
    assert {name: parts[name] for name in was} == was
    rows = [after.names.index(name) for name in before.names]
    assert np.array_equal(after.splats[rows], before.splats)


def test_an_original_that_is_broken_by_now(tmp_path):
    folder = images_in(tmp_path / "images", 10)
    data = config(manifest=str(folder))
    prepare(data)
    (folder / "00.png").write_text("no image")
    assert originals(data, [1]).shape == (1, 16, 16, 3)
    with pytest.raises(InputError, match=r"images: 00\.png: no readable image"):
        originals(data, [1, 0])


# Prepared once --------------------------------------------------------------------------------------------------------

def test_what_is_cached_needs_no_torch(tmp_path, sets):
    folder = files_in(tmp_path / "x", sets)
    fitted, read = config(), config(manifest=str(folder))
    prepare(fitted)
    code = ("import sys; from autoenc.data import cached, check, prepare; from autoenc.settings import DataConfig\n"
            "fitted, read = (DataConfig.model_validate_json(text) for text in sys.argv[1:])\n"
            "check(fitted), check(read), prepare(fitted), cached(read)\n"
            "print([name for name in ('torch', 'scipy', 'ray') if name in sys.modules])\n"
            "print(prepare(read).splats.shape, 'torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code, fitted.model_dump_json(), read.model_dump_json()],
                          capture_output=True, text=True)
    assert done.stdout.split("\n")[:2] == ["[]", f"(12, {EACH}, 8) True"], done.stderr


@pytest.mark.parametrize("damage", ["short", "absent", "shape", "dtype"])
def test_a_damaged_cache_is_fitted_again(cache, damage):
    dataset = prepare(config())
    splats = np.array(dataset.splats)
    path = next(cache.iterdir()) / "splats.npy"
    if damage == "short":
        with path.open("r+b") as file:
            file.truncate(1000)
    elif damage == "absent":
        path.unlink()
    else:
        np.save(path, splats[:3] if damage == "shape" else splats.astype(np.float64))
    assert cached(config()) is None
    again = prepare(config())
    assert np.array_equal(again.splats, splats) and again.fingerprint == dataset.fingerprint


def test_a_word_where_it_takes_long(monkeypatch, capsys):
    monkeypatch.setattr(sources, "QUIET", 1000.0)
    prepare(config(limit=70))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sources, "QUIET", 0.0)
    prepare(config(limit=150))
    said = capsys.readouterr().err
    assert said.startswith("preparing data: 64 of 150, about ") and said.count("\n") == 1      # one a minute
