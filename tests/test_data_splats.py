"""Splats as data: fitted to generated images or to files, read from .npz files; what is refused; the command."""

from __future__ import annotations

import csv
import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import random_splats, small_config, small_dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from autoenc.data import Dataset, cached, check, compositions, layouts, originals, prepare, sources
from autoenc.data.__main__ import pca_words
from autoenc.data.splats import PARTS, curve_index, in_order, read_splats, write_splats
from autoenc.data.summary import fit_psnr, latent_pca, splat_statistics
from autoenc.errors import InputError
from autoenc.render import render
from autoenc.settings import DataConfig

EACH = 16      # splats of a set
QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("AUTOENC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def config(**changes) -> DataConfig:
    return DataConfig(**{"source": "splats", "splats": EACH, "image_size": 16, "limit": 40, "split": (0.5, 0.4, 0.1),
                         **changes})


def files_in(folder: Path, sets: np.ndarray, prefix: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for k, splats in enumerate(sets):
        write_splats(folder / f"{prefix}{k:02d}.npz", splats)
    return folder


def images_in(folder: Path, count: int, prefix: str = "", start: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(count):
        Image.fromarray(compositions.generate(5, start + k, 20)).save(folder / f"{prefix}{k:02d}.png")
    return folder


def table(path: Path, *rows: list[str]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["layout_path", "type"], *rows])
    return path


def part_of(dataset: Dataset) -> dict[str, str]:
    return {dataset.names[k]: name for name, indices in dataset.splits.items() for k in indices}


@pytest.fixture
def sets() -> np.ndarray:
    return random_splats(12, EACH, np.random.default_rng(1))


# Where splats come from

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


def test_an_original_that_is_broken_by_now(tmp_path):
    folder = images_in(tmp_path / "images", 10)
    data = config(manifest=str(folder))
    prepare(data)
    (folder / "00.png").write_text("no image")
    assert originals(data, [1]).shape == (1, 16, 16, 3)
    with pytest.raises(InputError, match=r"images: 00\.png: no readable image"):
        originals(data, [1, 0])


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


# What is refused

def test_splats_and_images_in_one_place(tmp_path, sets, cache):
    folder = files_in(images_in(tmp_path / "both", 4), sets[:5], "s")
    manifest = table(folder / "m.csv", *(["00.png", "image"], ["s00.npz", "splats"], ["01.png", "image"],
                                         ["s01.npz", "splats"], ["s02.npz", "splats"], ["02.png", "image"]))
    for path, numbers, way in ((folder, ("5 .npz files, the first s00.npz", "4, the first 00.png"), "CSV file"),
                               (manifest, ("3 .npz files, the first s00.npz", "3, the first 00.png"), "data.filters")):
        for function in (check, prepare, cached):
            with pytest.raises(InputError) as error:
                function(config(manifest=str(path)))
            assert all(said in str(error.value) for said in (str(path), "holds both splats", way, *numbers))
    assert not cache.exists()
    one = config(manifest=str(manifest), filters={"type": "splats"}, split=(0.4, 0.4, 0.2), seed=3)
    check(one)
    assert set(config(manifest=str(manifest), filters={"type": "image"}).filters) == {"type"}
    check(one.model_copy(update={"filters": {"type": ["image"]}}))


def test_broken_files_are_told_together(tmp_path, sets, cache):
    files_in(tmp_path / "x", sets)
    good = {name: sets[0][:, part].astype(np.float64) for name, part in PARTS.items()}

    def spoil(number: int, **arrays) -> None:
        np.savez(tmp_path / f"x/{number:02d}.npz", **{name: array for name, array in {**good, **arrays}.items()
                                                      if array is not None})

    spoil(0, rot=None)
    spoil(1, xy=np.zeros((EACH, 3)))
    spoil(2, feat=np.zeros((EACH, 3), int))
    spoil(3, **{name: array[:9] for name, array in good.items()})
    headers = ["row 2: x/00.npz: there is no array rot", f"row 3: x/01.npz: xy has the shape ({EACH}, 3)",
               "row 4: x/02.npz: feat is of int64",
               f"row 5: x/03.npz: the file holds 9 splats, {EACH} are expected (data.splats says how many"]
    (tmp_path / "x/04.npz").write_bytes((tmp_path / "x/04.npz").read_bytes()[:300])
    headers.append("row 6: x/04.npz: no .npz file")
    spoil(5, xy=np.full((EACH, 2), np.nan))
    spoil(6, scale=-good["scale"])
    values = ["row 7: x/05.npz: xy holds NaN", "row 8: x/06.npz: scale holds -"]
    manifest = table(tmp_path / "m.csv", *([f"x/{k:02d}.npz", ""] for k in range(12)), ["x/absent.npz", ""])
    headers.append("row 14: x/absent.npz: no such file")
    with pytest.raises(InputError) as error:
        check(config(manifest=str(manifest)))
    assert all(said in str(error.value) for said in ("6 files cannot be used", *headers)), error.value
    assert values[0] not in str(error.value)
    with pytest.raises(InputError) as error:
        prepare(config(manifest=str(manifest)))
    assert all(said in str(error.value) for said in ("8 files cannot be used", *headers, *values)), error.value
    assert not cache.exists()


def test_broken_images_are_told_before_much_is_fitted(tmp_path, cache):
    folder = images_in(tmp_path / "images", 20)
    for name in ("00.png", "07.png"):
        (folder / name).write_bytes((folder / name).read_bytes()[:200])      # the header is fine
    data = config(manifest=str(folder), splats=512, image_size=64, refine=10_000)
    check(data)
    (folder / "09.png").write_text("no image")
    with pytest.raises(InputError) as error:
        check(data)
    assert "1 file cannot be used" in str(error.value) and "09.png" in str(error.value)
    folder = images_in(tmp_path / "more", 3)
    (folder / "03.png").write_text("no image")
    with pytest.raises(InputError, match=r"03\.png: no readable image"):
        prepare(config(manifest=str(folder)))
    assert not cache.exists()


@pytest.mark.parametrize(("manifest", "said"), [
    ("absent", "no such file"), ("empty", r"no images or splats there .*\.npz"), ("two", "only 2 files to use"),
    ("m.csv", r"there is no column 'layout_path'")])
def test_places_without_splats(tmp_path, sets, manifest, said):
    (tmp_path / "empty").mkdir()
    files_in(tmp_path / "two", sets[:2])
    (tmp_path / "m.csv").write_text("path\na.npz\n")
    for function in (check, prepare, cached):
        with pytest.raises(InputError, match=said) as error:
            function(config(manifest=str(tmp_path / manifest)))
        assert manifest in str(error.value)


def test_paths_that_lead_outside_need_leave(tmp_path, sets):
    files_in(tmp_path / "x", sets)
    (tmp_path / "in").mkdir()
    manifest = table(tmp_path / "in/m.csv", *([f"../x/{k:02d}.npz", ""] for k in range(12)))
    with pytest.raises(InputError, match=r"12 files cannot be used(.|\n)*leads out of the manifest's folder"):
        check(config(manifest=str(manifest)))
    assert len(prepare(config(manifest=str(manifest), allow_outside=True)).names) == 12


@QUICK
@given(edits=st.lists(st.tuples(st.integers(0, 10**6), st.binary(max_size=5)), min_size=1, max_size=4),
       cut=st.none() | st.integers(0, 10**6))
def test_damaged_files_give_data_or_a_message(edits, cut, tmp_path_factory, sets):
    folder = files_in(tmp_path_factory.mktemp("damaged"), sets)
    path = folder / "03.npz"
    content = bytearray(path.read_bytes())
    for at, what in edits:
        at %= len(content)
        content[at:at + len(what)] = what
    path.write_bytes(content if cut is None else content[:cut % len(content)])
    data = config(manifest=str(folder), cache_dir=str(folder / "cache"))
    try:
        check(data)
        dataset = prepare(data)
    except InputError as error:
        assert "1 file cannot be used" in str(error) and "03.npz" in str(error)
        assert not (folder / "cache").exists()
    else:
        assert np.isfinite(dataset.splats).all() and (dataset.splats[..., 2:4] > 0).all()
        assert np.array_equal(dataset.splats[3], in_order(read_splats(path, EACH)))
        assert np.array_equal(np.delete(dataset.splats, 3, 0), np.delete(sets, 3, 0))


@QUICK
@given(counts=st.lists(st.integers(8, 20), min_size=6, max_size=6), expected=st.integers(8, 20))
def test_files_of_another_count_are_all_named(counts, expected, tmp_path_factory):
    folder = tmp_path_factory.mktemp("counts")
    for k, count in enumerate(counts):
        write_splats(folder / f"{k}.npz", random_splats(1, count, np.random.default_rng(k))[0])
    wrong = [k for k, count in enumerate(counts) if count != expected]
    try:
        check(config(manifest=str(folder), splats=expected))
        assert not wrong
    except InputError as error:
        lines = str(error).split("\n")[1:]
        assert [int(line.split(".npz")[0]) for line in lines] == wrong
        assert all(f"holds {counts[k]} splats, {expected} are expected" in line
                   for k, line in zip(wrong, lines, strict=True))


# Numbers about the data, and the command

def test_a_pca_of_independent_splats_keeps_its_share_of_dimensions():
    dataset = small_dataset(1200, 8, splats=32)
    rng = np.random.default_rng(0)
    shape = (1200, 32)
    independent = np.concatenate((rng.uniform(-1, 1, (*shape, 2)), rng.uniform(0.1, 0.2, (*shape, 2)),
                                  rng.uniform(0, math.pi, (*shape, 1)), rng.uniform(-1, 1, (*shape, 3))), -1)
    settings = small_config(data__source="splats", data__splats=32, model__kind="conv1d", model__latent_dim=32,
                            loss__splats=1.0)
    found = latent_pca(dataclasses.replace(dataset, splats=independent.astype(np.float32)), settings)
    assert (found.components, found.numbers, found.fitted_on) == (32, 256, 840)
    assert found.val == pytest.approx(32 / 256, abs=0.02) and found.train > found.val
    patterned = latent_pca(dataset, settings)
    assert patterned.val > 0.6


def test_a_pca_of_images_is_one_of_pixels():
    rng = np.random.default_rng(0)
    dataset = small_dataset(400, 8)
    mixed = rng.normal(size=(400, 6)) @ rng.normal(size=(6, 192)) * 20 + 128
    flat = dataclasses.replace(dataset, images=mixed.clip(0, 255).round().astype(np.uint8).reshape(400, 8, 8, 3))
    settings = small_config(data__image_size=8, model__latent_channels=2)      # 2 × 2 × 2
    found = latent_pca(flat, settings)
    assert (found.components, found.numbers, found.fitted_on) == (8, 192, 280) and 0.97 < found.val < 1
    few = latent_pca(dataclasses.replace(flat, splits={**flat.splits, "train": np.arange(5)}), settings)
    assert few.components == 4 and few.train == pytest.approx(1, abs=1e-4)
    plain = latent_pca(dataclasses.replace(flat, images=np.full_like(flat.images, 7)), settings)
    assert math.isnan(plain.val)
    assert "an undefined share" in pca_words(dataclasses.replace(flat, images=np.full_like(flat.images, 7)), settings)
    one = dataclasses.replace(flat, splits={**flat.splits, "train": np.arange(1)})
    assert latent_pca(one, settings) is None and "one training item" in pca_words(one, settings)
    own = small_config(model__kind="custom", model__target="own:Model")
    assert latent_pca(flat, own) is None and "not known" in pca_words(flat, own)


def test_statistics_are_those_of_all_splats():
    splats = random_splats(600, 4, np.random.default_rng(2))
    mean, deviation = splat_statistics(splats, np.arange(10, 590))
    rows = splats[10:590].reshape(-1, 8).astype(np.float64)
    low, high = np.sort(rows[:, 2:4]).T
    columns = np.column_stack((rows[:, :2], high, low, (high - low) / (high + low), rows[:, 5:]))
    assert np.allclose(mean, columns.mean(0)) and np.allclose(deviation, columns.std(0))
    assert np.isnan(splat_statistics(splats, np.arange(0))[0]).all()


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "autoenc.data", *arguments], cwd=cwd, capture_output=True, text=True,
                          timeout=120)


def write_config(path: Path, **data) -> None:
    path.write_text(yaml.safe_dump({
        "data": {"source": "splats", "splats": 32, "image_size": 16, "split": [0.5, 0.4, 0.1], **data},
        "model": {"kind": "conv1d", "latent_dim": 8, "splat_target": "logcov"}, "loss": {"splats": 1.0}}))


def test_the_command_shows_fitted_splats(tmp_path):
    write_config(tmp_path / "data.yaml", limit=60)
    done = run("data.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    data = config(splats=32, limit=60)
    dataset = prepare(data)
    assert "splats: 60 items, 32 splats each, rendered as images of 16×16 pixels" in done.stdout
    assert "exact duplicates: 0 (0.0%)" in done.stdout
    train = dataset.splits["train"]
    mean, deviation = splat_statistics(dataset.splats, train)
    lines = {line[:15].strip(): line for line in done.stdout.splitlines()}
    for name, k in (("x", 0), ("longer axis", 2), ("anisotropy", 4), ("blue", 7)):
        assert f"{mean[k]:.3f} ± {deviation[k]:.3f}" in lines[name]
    shown = train[np.unique(np.linspace(0, len(train) - 1, 32).astype(int))]
    images = originals(data, shown)
    assert f"{len(shown)} of the training part: PSNR {fit_psnr(images, dataset.images[shown]):.1f} dB" in done.stdout
    assert "PCA: 8 of 256 dimensions, as many as the latent has" in done.stdout
    assert "model.splat_target logcov" in done.stdout and "random splats they would keep 3.1%" in done.stdout
    sheet = np.asarray(Image.open(tmp_path / "data_contact_sheet.png"))
    assert np.array_equal(sheet[4:132:8, 4:132:8], images[0])      # the image above, enlarged eight times
    assert np.array_equal(sheet[133:261:8, 4:132:8], dataset.images[shown[0]])


def test_the_command_shows_splats_from_files(tmp_path):
    sets = random_splats(12, 32, np.random.default_rng(1))
    files_in(tmp_path / "x", sets)
    write_config(tmp_path / "data.yaml", manifest="x")
    done = run("data.yaml", "--output", "sheet.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "12 items, 32 splats each" in done.stdout and "PSNR" not in done.stdout
    assert "(rendered splats of the training part)" in done.stdout
    dataset = prepare(config(manifest=str(tmp_path / "x"), splats=32))
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert np.array_equal(sheet[4:132:8, 4:132:8], dataset.images[dataset.splits["train"][0]])
    write_config(tmp_path / "data.yaml", manifest="x", splats=64)
    done = run("data.yaml", cwd=tmp_path)
    assert done.returncode == 2 and "12 files cannot be used" in done.stderr and "Traceback" not in done.stderr
