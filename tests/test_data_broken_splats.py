"""Splats that cannot be used: told with their files before anything is kept."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import random_splats
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from splatfiles import EACH, config, files_in, images_in, table

from autoenc.data import cached, check, prepare
from autoenc.data.splats import PARTS, in_order, read_splats, write_splats
from autoenc.errors import InputError

pytestmark = pytest.mark.usefixtures("cache")
QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def sets() -> np.ndarray:
    return random_splats(12, EACH, np.random.default_rng(1))


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
