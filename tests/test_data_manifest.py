"""The CSV manifest: columns, labels, filters, paths, and every broken row told at once. The command."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from autoenc.config import DataConfig
from autoenc.data import Dataset, cached, check, prepare
from autoenc.errors import InputError

pytestmark = pytest.mark.usefixtures("cache")
COUNT = 30


@pytest.fixture
def manifest(tmp_path):
    """layouts.csv with 30 good rows; row k + 2 names images/k.png."""
    (tmp_path / "images").mkdir()
    rows = []
    for k in range(COUNT):
        Image.new("RGB", (8, 8), (8 * k, k, 1)).save(tmp_path / f"images/{k:02d}.png")
        rows.append([f"images/{k:02d}.png", ("scene", "room")[k % 2], ("false", "False", "0", "true")[k % 4],
                     str(k // 10), "" if k < 9 else "x"])
    with (tmp_path / "layouts.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["layout_path", "type", "is_empty", "floor", "note"], *rows])
    return tmp_path / "layouts.csv"


def config(manifest: Path, **changes) -> DataConfig:
    return DataConfig(**{"source": "manifest", "manifest": str(manifest), "image_size": 8,
                         "split": (0.5, 0.4, 0.1), **changes})


def append(manifest: Path, *rows: str) -> None:
    with manifest.open("a") as file:
        file.write("".join(f"{row}\n" for row in rows))


def test_images_and_labels_in_the_order_of_the_rows(manifest):
    dataset = prepare(config(manifest))
    assert list(dataset.names) == [f"images/{k:02d}.png" for k in range(COUNT)]
    assert dataset.label_names == ("room", "scene")
    assert dataset.labels.tolist() == [1, 0] * (COUNT // 2)
    assert all((dataset.images[k] == (8 * k, k, 1)).all() for k in range(COUNT))


@pytest.mark.parametrize(("filters", "kept"), [
    ({"is_empty": False}, lambda k: k % 4 != 3),
    ({"is_empty": [True]}, lambda k: k % 4 == 3),
    ({"is_empty": ["False"]}, lambda k: k % 4 == 1),
    ({"floor": [0, 2]}, lambda k: k // 10 != 1),
    ({"floor": 1.0}, lambda k: k // 10 == 1),
    ({"floor": ["1"], "type": ["room"]}, lambda k: k // 10 == 1 and k % 2),
    ({"note": None}, lambda k: k < 9),
    ({"note": [None, "x"]}, lambda k: True),
])
def test_filters(manifest, filters, kept):
    listed = prepare(config(manifest, filters=filters, split=(0.5, 0.5, 0.0), seed=3)).names
    assert list(listed) == [f"images/{k:02d}.png" for k in range(COUNT) if kept(k)]


@pytest.mark.parametrize(("changes", "said"), [
    ({"filters": {"is_emty": [False]}}, r"data\.filters.*'is_emty'.*did you mean 'is_empty'"),
    ({"filters": {"type": ["scenes"]}}, r"keeps none of 30 rows.*'scene' \(15×\)"),
    ({"filters": {"is_empty": []}}, "keeps none"),
    ({"image_column": "layoutpath"}, r"data\.image_column.*did you mean 'layout_path'"),
    ({"label_column": "typ"}, r"data\.label_column.*did you mean 'type'"),
])
def test_columns_and_values_that_are_not_there(manifest, cache, changes, said):
    for function in (check, prepare, cached):
        with pytest.raises(InputError, match=said) as error:
            function(config(manifest, **changes))
        assert "layouts.csv" in str(error.value)
    assert not cache.exists()


def test_all_missing_columns_at_once(manifest):
    with pytest.raises(InputError) as error:
        check(config(manifest, image_column="path", label_column="kind", filters={"empty": [1]}))
    assert all(name in str(error.value) for name in ("'path'", "'kind'", "'empty'"))


def test_labels_are_optional(manifest):
    text = manifest.read_text()
    assert prepare(config(manifest, label_column=None)).labels is None
    manifest.write_text(text.replace("type", "sort", 1))
    assert prepare(config(manifest)).labels is None      # the default column is not there
    assert prepare(config(manifest, label_column="sort")).label_names == ("room", "scene")
    manifest.write_text(text.replace("images/00.png,scene", "images/00.png,", 1))
    assert prepare(config(manifest)).labels[:2].tolist() == [-1, 0]


def test_broken_rows_are_told_together_by_row(manifest, tmp_path, cache):
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "images/05.png")
    whole = (tmp_path / "images/05.png").read_bytes()
    (tmp_path / "images/05.png").write_bytes(whole[:len(whole) // 2])      # its header is fine
    (tmp_path / "images/06.png").write_text("no image")
    append(manifest, "images/absent.png,room,false,0,", ",room,false,0,", "images,room,false,0,", "images/01.png,room",
           "../outside.png,room,false,0,")
    with pytest.raises(InputError) as error:
        prepare(config(manifest))
    message = str(error.value)
    for said in ("7 images cannot be used", "row 7: images/05.png: broken image",
                 "row 8: images/06.png: no readable image",
                 "row 32: images/absent.png: no such file", "row 33: '': no path given",
                 "row 34: images: not a regular file", "row 35: 2 cells, the header has 5",
                 "row 36: ../outside.png: leads out"):
        assert said in message, said
    assert not cache.exists()
    with pytest.raises(InputError, match=r"row 8.*no readable image"):
        check(config(manifest))


def test_of_many_problems_the_first_are_told(manifest):
    append(manifest, *(f"images/none{k}.png,room,false,0," for k in range(25)))
    with pytest.raises(InputError) as error:
        check(config(manifest))
    assert "row 32" in str(error.value) and "row 42" not in str(error.value)
    assert str(error.value).endswith("and 15 more")


def test_paths_that_lead_outside_need_leave(manifest, tmp_path):
    outside = tmp_path / "elsewhere"
    (tmp_path / "inside").mkdir()
    manifest = manifest.rename(tmp_path / "inside/layouts.csv")
    (tmp_path / "images").rename(tmp_path / "inside/images")
    outside.mkdir()
    Image.new("RGB", (8, 8), "blue").save(outside / "x.png")
    (tmp_path / "inside/link.png").symlink_to(outside / "x.png")
    (tmp_path / "inside/folder").symlink_to(outside)
    (tmp_path / "inside/fine.png").symlink_to(tmp_path / "inside/images/00.png")
    text = manifest.read_text()
    for path in (str(outside / "x.png"), "../elsewhere/x.png", "link.png", "folder/x.png",
                 "images/../../elsewhere/x.png"):
        manifest.write_text(f"{text}{path},room,false,0,\n")
        with pytest.raises(InputError, match=r"leads out of the manifest's folder.*allow_outside"):
            check(config(manifest))
        assert (prepare(config(manifest, allow_outside=True)).images[-1] == (0, 0, 255)).all()
    manifest.write_text(f"{text}fine.png,room,false,0,\n")
    assert prepare(config(manifest)).duplicates == 1


@pytest.mark.parametrize(("content", "said"), [
    (b"", "is empty"),
    (b"layout_path,type\n", "no rows"),
    (b"layout_path,type\n\n\n", "no rows"),
    (b"layout_path,layout_path\na,b\n", "there twice"),
    (b"\xff\xfe\x00a", "not UTF-8"),
    (b"layout_path\n" + b'"' + b"x" * 200_000, "row .*field larger"),
])
def test_files_that_are_no_manifest(tmp_path, content, said):
    (tmp_path / "layouts.csv").write_bytes(content)
    with pytest.raises(InputError, match=said):
        check(config(tmp_path / "layouts.csv"))


def test_a_manifest_that_is_not_there_or_a_folder(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        check(config(tmp_path / "absent.csv"))
    with pytest.raises(InputError, match="source: folder"):
        check(config(tmp_path))


def test_check_reads_no_pixels_and_writes_nothing(manifest, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    check(config(manifest))
    assert cached(config(manifest)) is None
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=st.lists(st.tuples(st.integers(0, 10_000), st.sampled_from(["insert", "delete", "swap"]),
                                st.text(alphabet='",\n\r\x00;.~/ é1x', max_size=4)), max_size=6),
       filters=st.sampled_from([{}, {"is_empty": [False]}, {"floor": [1, None]}, {"note": ["x"]}]))
def test_mutated_manifests_give_data_or_a_message(manifest, edits, filters):
    original = manifest.read_bytes()
    text = original.decode()
    for place, edit, what in edits:
        at = place % (len(text) + 1)
        text = text[:at] + (what if edit != "delete" else "") + text[at + (0 if edit == "insert" else len(what) + 1):]
    try:
        manifest.write_bytes(text.encode())
        check(config(manifest, filters=filters))
        dataset = prepare(config(manifest, filters=filters))
    except InputError as error:
        assert "layouts.csv" in str(error) or "data.split" in str(error)
    else:
        assert isinstance(dataset, Dataset)
        count = len(dataset.names)
        assert dataset.images.shape == (count, 8, 8, 3)
        assert sorted(np.concatenate(list(dataset.splits.values()))) == list(range(count))
        if dataset.labels is not None:
            assert dataset.labels.min() >= -1 and dataset.labels.max() < len(dataset.label_names)
    finally:
        manifest.write_bytes(original)


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "autoenc.data", *arguments], cwd=cwd, capture_output=True, text=True,
                          timeout=60)


def test_the_command(manifest, tmp_path):
    Image.new("RGB", (8, 8), (8, 1, 1)).save(tmp_path / "images/00.png")      # a twin of 01.png
    palette = {"dark": {"rgb": [20, 5, 1], "class_index": 0}, "light": {"rgb": [200, 25, 1], "class_index": 1}}
    (tmp_path / "palette.yaml").write_text(yaml.safe_dump(palette))
    (tmp_path / "data.yaml").write_text(yaml.safe_dump({"data": {
        "source": "manifest", "manifest": "layouts.csv", "palette": "palette.yaml", "palette_tolerance": 60.0,
        "image_size": 16, "split": [0.5, 0.4, 0.1]}}))
    done = run("data.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    dataset = prepare(config(manifest, palette=str(tmp_path / "palette.yaml"), palette_tolerance=60.0, image_size=16))
    words = done.stdout.split()
    assert "30 images of 16×16 pixels" in done.stdout and "exact duplicates: 1 (3.3%)" in done.stdout
    assert f"ignored pixels: {dataset.ignored:.2%}" in done.stdout and dataset.ignored > 0
    assert words[words.index("images", words.index("part")) + 1] == str(len(dataset.splits["train"]))
    for name in ("dark", "light", "room", "scene"):
        assert name in words
    train = dataset.splits["train"]
    share = np.mean(dataset.segmentation[train] == 0) / np.mean(dataset.segmentation[train] != 255)
    assert words[words.index("dark") + 1] == f"{share:.2%}"
    # The sheet: an image above its classes, enlarged eight times, 4 pixels from the edge.
    sheet = np.asarray(Image.open(tmp_path / "data_contact_sheet.png"))
    cell = 128
    assert np.array_equal(sheet[4:4 + cell:8, 4:4 + cell:8], dataset.images[train[0]])
    colours = np.vstack([dataset.palette, np.zeros((253, 3), np.uint8), [[255, 0, 255]]])
    below = sheet[4 + cell + 1:4 + 2 * cell + 1:8, 4:4 + cell:8]
    assert np.array_equal(below, colours[dataset.segmentation[train[0]]])


def test_the_command_says_what_is_wrong(manifest, tmp_path):
    (tmp_path / "data.yaml").write_text("data: {source: manifest, manifest: absent.csv}")
    for arguments, said in ((["data.yaml"], "absent.csv"), (["none.yaml"], "none.yaml"),
                            (["data.yaml", "--output", "no/such/sheet.png"], "--output"),
                            (["data.yaml", "--output", "sheet.jpg"], ".png")):
        done = run(*arguments, cwd=tmp_path)
        assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "data_contact_sheet.png").exists()
