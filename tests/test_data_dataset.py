"""prepare, cached, check: splits, cache, limits, what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from autoenc.data import Dataset, cached, check, prepare
from autoenc.errors import InputError
from autoenc.settings import DataConfig

pytestmark = pytest.mark.usefixtures("cache")
QUICK = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def paint(path: Path, number: int, size: int = 8) -> None:
    """A plain image in a colour of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), (number % 256, number // 256, 7)).save(path)


def folder_of(path: Path, numbers: list[int], prefix: str = "") -> Path:
    for k, number in enumerate(numbers):
        paint(path / f"{prefix}{k:04d}.png", number)
    return path


def folder_data(path: Path, **changes) -> DataConfig:
    return DataConfig(**{"source": "folder", "manifest": str(path), "image_size": 8, **changes})


def part_of(dataset: Dataset) -> dict[str, str]:
    return {dataset.names[k]: name for name, indices in dataset.splits.items() for k in indices}


def test_layouts_by_default(cache):
    data = DataConfig(image_size=16, limit=60)
    assert cached(data) is None and not cache.exists()
    check(data)
    assert not cache.exists()
    dataset = prepare(data)
    assert dataset.images.shape == (60, 16, 16, 3) and dataset.images.dtype == np.uint8
    assert dataset.segmentation.shape == (60, 16, 16)
    assert np.array_equal(dataset.palette[dataset.segmentation], dataset.images)
    assert dataset.labels.dtype == np.int16 and set(dataset.labels) == {0, 1}
    assert dataset.label_names == ("room", "scene") and len(dataset.classes) == 11
    assert dataset.names[0] == "layout_000000" and len(dataset.names) == 60
    assert dataset.ignored == 0 and dataset.duplicates == 0
    assert not dataset.images.flags.writeable
    assert isinstance(dataset.images, np.memmap)
    indices = np.concatenate(list(dataset.splits.values()))
    assert sorted(indices) == list(range(60))
    assert all(part.dtype == np.int64 and np.all(np.diff(part) > 0) for part in dataset.splits.values())


def test_the_cache_is_used_again_and_told_apart(cache):
    data = DataConfig(image_size=16, limit=40)
    first = prepare(data)
    written = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    again = prepare(data)
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == written
    assert again.fingerprint == first.fingerprint == cached(data).fingerprint
    others = [prepare(data.model_copy(update=change)).fingerprint
              for change in ({"seed": 1}, {"limit": 41}, {"image_size": 24}, {"split": (0.7, 0.2, 0.1)})]
    assert len({first.fingerprint, *others}) == 5
    elsewhere = data.model_copy(update={"cache_dir": str(cache.parent / "elsewhere")})
    assert prepare(elsewhere).fingerprint == first.fingerprint


@pytest.mark.parametrize("damage", ["meta", "short", "absent", "shape"])
def test_a_damaged_cache_is_rebuilt(cache, damage):
    data = DataConfig(image_size=16, limit=40)
    images = np.array(prepare(data).images)
    [folder] = cache.iterdir()
    if damage == "meta":
        (folder / "meta.json").write_text("{")
    elif damage == "short":
        with (folder / "images.npy").open("r+b") as file:
            file.truncate(1000)
    elif damage == "absent":
        (folder / "labels.npy").unlink()
    else:
        np.save(folder / "images.npy", np.zeros((3, 16, 16, 3), np.uint8))
    assert cached(data) is None
    assert np.array_equal(prepare(data).images, images)
    assert cached(data) is not None
    assert [path.name for path in cache.iterdir()] == [folder.name]
    assert len(list(folder.iterdir())) == 5


def test_two_processes_at_once_share_one_result(cache):
    code = "from autoenc.config import DataConfig; from autoenc.data import prepare; " \
           "print(prepare(DataConfig(image_size=32, limit=150)).fingerprint)"
    runs = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = {run.communicate(timeout=60)[0] for run in runs}
    assert len(outputs) == 1 and len(outputs.pop().strip()) == 64
    assert len(list(cache.iterdir())) == 1


def test_changed_files_are_decoded_anew(tmp_path):
    folder = folder_of(tmp_path / "images", list(range(30)))
    first = prepare(folder_data(folder))
    assert (first.images[3] == (3, 0, 7)).all()
    paint(folder / "0003.png", 9999)
    os.utime(folder / "0003.png", ns=(1, 1))
    second = prepare(folder_data(folder))
    assert (second.images[3] == (9999 % 256, 9999 // 256, 7)).all()
    assert first.fingerprint != second.fingerprint


def test_touched_files_have_the_same_fingerprint(tmp_path):
    folder = folder_of(tmp_path / "images", list(range(30)))
    first = prepare(folder_data(folder)).fingerprint
    os.utime(folder / "0003.png", ns=(1, 1))
    assert prepare(folder_data(folder)).fingerprint == first


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"data\.cache_dir.*file"):
        prepare(DataConfig(image_size=16, limit=30, cache_dir=str(tmp_path / "file" / "cache")))


def test_nothing_is_left_behind_on_failure(tmp_path, cache):
    folder = folder_of(tmp_path / "images", list(range(20)))
    whole = (folder / "0004.png").read_bytes()
    (folder / "0004.png").write_bytes(whole[:len(whole) // 2])
    (folder / "0007.png").write_bytes(b"no image")
    with pytest.raises(InputError) as error:
        prepare(folder_data(folder))
    assert "0004.png" in str(error.value) and "0007.png" in str(error.value)
    assert not cache.exists()
    with pytest.raises(InputError, match="leaves nothing for"):
        prepare(DataConfig(image_size=8, limit=30, split=(0.999, 0.001, 0.0)))
    assert not cache.exists()


@QUICK
@given(numbers=st.lists(st.integers(0, 30), min_size=20, max_size=50), seed=st.integers(0, 2**63 - 1))
def test_duplicates_never_cross(numbers, seed, tmp_path_factory):
    folder = folder_of(tmp_path_factory.mktemp("images"), numbers)
    try:
        dataset = prepare(folder_data(folder, seed=seed, split=(0.5, 0.3, 0.2)))
    except InputError as error:
        assert "data.split" in str(error)
        return
    parts: dict[int, set[str]] = {}
    for name, part in part_of(dataset).items():
        parts.setdefault(numbers[int(name[:4])], set()).add(part)
    assert all(len(found) == 1 for found in parts.values())
    assert dataset.duplicates == len(numbers) - len(set(numbers))


@QUICK
@given(count=st.integers(20, 40), more=st.integers(1, 20), seed=st.integers(0, 1000))
def test_the_split_is_stable_when_items_are_added(count, more, seed, tmp_path_factory):
    folder = folder_of(tmp_path_factory.mktemp("images"), list(range(count)), "b")
    data = folder_data(folder, seed=seed, split=(0.5, 0.4, 0.1))
    before = prepare(data)
    folder_of(folder, list(range(1000, 1000 + more)), "a")      # they come first, so all positions move
    after = part_of(prepare(data))
    assert {name: after[name] for name in before.names} == part_of(before)


def test_shares_are_those_asked_for():
    for split in ((0.8, 0.1, 0.1), (0.5, 0.5, 0.0), (0.2, 0.3, 0.5)):
        dataset = prepare(DataConfig(image_size=8, limit=1500, split=split))
        for share, indices in zip(split, dataset.splits.values(), strict=True):
            assert abs(len(indices) / 1500 - share) < 0.05
        if split[2] == 0:
            assert len(dataset.splits["test"]) == 0


def test_generated_layouts_keep_their_fingerprint():
    """Stored results hang on it. Where it should change, FORMAT or layouts.VERSION is raised."""
    dataset = prepare(DataConfig(image_size=16, limit=50, seed=3))
    assert dataset.fingerprint == "0c00ec9fdf7024f4f8c2fed48c7b615300cef1cb09caee562cc77d071d9d5eb1"


def test_too_few_items_for_the_split(tmp_path):
    folder = folder_of(tmp_path / "images", [5] * 12)
    with pytest.raises(InputError, match=r"data\.split.*12 items.*11 of them exact duplicates"):
        prepare(folder_data(folder))
    with pytest.raises(InputError, match="only 2 images"):
        prepare(folder_data(folder_of(tmp_path / "two", [1, 2])))


def test_folder_labels_and_order(tmp_path):
    root = tmp_path / "images"
    for k in range(12):
        paint(root / ("b" if k % 2 else "a/deep") / f"{k:02d}.PNG", k)
    paint(root / "top.png", 100)
    paint(root / ".hidden" / "x.png", 101)
    (root / "notes.txt").write_text("no image")
    dataset = prepare(folder_data(root))
    assert list(dataset.names) == sorted(dataset.names) and len(dataset.names) == 13
    assert dataset.label_names == ("a", "b")
    labels = dict(zip(dataset.names, dataset.labels.tolist(), strict=True))
    assert labels["a/deep/00.PNG"] == 0 and labels["b/01.PNG"] == 1 and labels["top.png"] == -1
    assert dataset.segmentation is None and dataset.palette is None and dataset.classes == ()
    assert prepare(folder_data(folder_of(tmp_path / "flat", list(range(20))))).labels is None


def test_limit_chooses_by_hash(tmp_path):
    folder = folder_of(tmp_path / "images", list(range(60)))
    chosen = {limit: list(prepare(folder_data(folder, limit=limit)).names) for limit in (20, 40)}
    assert len(chosen[20]) == 20 and set(chosen[20]) < set(chosen[40])
    assert chosen[20] == sorted(chosen[20]) and chosen[20] != [f"{k:04d}.png" for k in range(20)]
    assert set(prepare(folder_data(folder, limit=20, seed=1)).names) != set(chosen[20])


def test_a_folder_that_is_none(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.csv").write_text("layout_path\na.png\n")
    for name, said in (("empty", "no images there"), ("absent", "no such folder"), ("file.csv", "source: manifest")):
        with pytest.raises(InputError, match=said):
            check(folder_data(tmp_path / name))


def test_importing_is_light():
    code = "import sys, autoenc.data; print([name for name in ('torch', 'ray', 'pandas') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
