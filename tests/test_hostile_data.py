"""Hostile manifests, palettes and images.

By default some hundreds of mutations, with AUTOENC_EXAMPLES or ``-m slow`` ten thousand.
"""

import copy
import csv
import io
import os
import re
import shutil
import struct
import zlib
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hostile import MANY, QUIET, WORDS, examples, spoil_bytes, spoil_tree, within
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from autoenc import data
from autoenc.config import DataConfig, load_config
from autoenc.data import prepare
from autoenc.data.__main__ import main as data_command
from autoenc.errors import InputError

SECRET = (1, 254, 3)                     # the colour of images outside the manifest's folder
SPECIAL = ["images/pipe.png", "images/folder.png", "images/device.png", "images/loop.png", "images/dangling.png",
           "images/outside.png", "images/empty.png", "images/bomb.png", "images/tall.png", "images/wide.gif",
           "images/text.png", "../outside/secret.png", "images/../../outside/secret.png", "images/00.png/x",
           "/dev/zero", "/etc/passwd", "", ".", "..", "/", "~/x.png", "images", "images/00.png ", "x" * 5000,
           "\udcff.png"]
LABELS = ["[/b]", "[bold]", "a\nb", "\x1b[31mred", "nan", "true", "0", "é☃" * 50, "\u202e", " "]


class Photos:
    """A folder with a manifest of twelve images, a palette and a configuration, among all that an image may turn out
    to be; beside it an image that is none of its business."""

    def __init__(self, folder: Path) -> None:
        self.home, self.cache = folder / "home", folder / "cache"
        images = self.home / "images"
        images.mkdir(parents=True)
        (folder / "outside").mkdir()
        Image.new("RGB", (8, 8), SECRET).save(folder / "outside" / "secret.png")
        for k in range(12):
            Image.new("RGB", (8, 8), (20 * k, 9, 1)).save(images / f"{k:02d}.png")
        os.mkfifo(images / "pipe.png")
        (images / "folder.png").mkdir()
        for name, target in {"device": "/dev/zero", "loop": "loop.png", "dangling": "none.png",
                             "outside": "../../outside/secret.png"}.items():
            (images / f"{name}.png").symlink_to(target)
        (images / "empty.png").write_bytes(b"")
        (images / "bomb.png").write_bytes(png(60_000, 60_000, b""))
        (images / "tall.png").write_bytes(png(1, 40_000, bytes(4 * 40_000)))
        (images / "text.png").write_bytes(png(8, 8, bytes(25 * 8), (b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8)))))
        frames = [Image.new("RGB", (40, 2), (k, 0, 0)) for k in range(30)]
        frames[0].save(images / "wide.gif", save_all=True, append_images=frames[1:])
        self.table = [["layout_path", "type", "is_empty"],
                      *([f"images/{k:02d}.png", ("scene", "room")[k % 2], "false"] for k in range(12))]
        self.palette = {"dark": {"rgb": [10, 9, 1], "class_index": 0}, "light": {"rgb": [200, 9, 1], "class_index": 1},
                        "background": {"rgb": [255, 255, 255], "class_index": 2}}
        self.write("layouts.csv", "\n".join(",".join(row) for row in self.table).encode())
        self.write("palette.yaml", yaml.safe_dump(self.palette).encode())
        self.write("data.yaml", yaml.safe_dump({"model": {"downsampling_steps": 3}, "data": {
            "source": "manifest", "manifest": "layouts.csv", "palette": "palette.yaml", "image_size": 8,
            "filters": {"is_empty": [False]}, "split": [0.5, 0.4, 0.1], "cache_dir": str(self.cache)}}).encode())

    def __repr__(self) -> str:
        return "…"

    def write(self, name: str, content: bytes) -> None:
        (self.home / name).unlink(missing_ok=True)
        (self.home / name).write_bytes(content)

    def config(self, **changes: Any) -> DataConfig:
        return load_config(self.home / "data.yaml").data.model_copy(update=changes)

    def files(self) -> dict[str, int]:
        """All there is but the cache, with the times of the last changes."""
        return {str(path): path.lstat().st_mtime_ns for top in (self.home, self.home.parent / "outside")
                for path in top.rglob("*")}


def png(width: int, height: int, rows: bytes, *more: tuple[bytes, bytes]) -> bytes:
    """A PNG of that size in its header, its filtered RGB rows, and further chunks."""
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, content) for kind, content in (
        (b"IHDR", head), *more, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")))


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Photos:
    return Photos(tmp_path_factory.mktemp("photos"))


@st.composite
def manifests(draw: st.DrawFn, table: list[list[str]]) -> bytes:
    """The manifest with up to three things wrong."""
    rows = [list(row) for row in table]
    for _ in range(draw(st.integers(0, 3))):
        what = draw(st.sampled_from(["path", "path", "label", "cell", "drop row", "double row", "drop column",
                                     "double column", "misspell", "short", "long"]))
        at, column = draw(st.integers(1, len(rows) - 1)), draw(st.integers(0, len(rows[0]) - 1))
        if what in ("path", "label", "cell") and column < len(rows[at]):
            texts = {"path": st.sampled_from(SPECIAL), "label": st.sampled_from(LABELS),
                     "cell": st.text(max_size=9) | st.sampled_from(WORDS)}[what]
            rows[at][{"path": 0, "label": min(1, len(rows[at]) - 1)}.get(what, column)] = draw(texts)
        elif what == "drop row" and len(rows) > 2:
            del rows[at]
        elif what == "double row":
            rows.insert(at, rows[at])
        elif what.endswith("column"):
            rows = [row[:column] + row[column:column + 1] * (2 * (what == "double column")) + row[column + 1:]
                    for row in rows]
            if not rows[0]:
                rows[0] = ["layout_path"]
        elif what == "misspell":
            rows[0][column] = draw(st.sampled_from([rows[0][column][:-1], rows[0][column].upper(), " type ", ""]))
        elif what == "short":
            rows[at] = rows[at][:-1]
        elif what == "long":
            rows[at] = rows[at] * draw(st.sampled_from([2, 1000]))
    text = io.StringIO()
    csv.writer(text, lineterminator=draw(st.sampled_from(["\n", "\r\n", "\r"]))).writerows(rows)
    encoding = draw(st.sampled_from(["utf-8"] * 6 + ["utf-8-sig", "utf-16", "utf-7"]))
    raw = text.getvalue().encode(encoding, "surrogatepass")
    return spoil_bytes(draw, raw) if draw(st.integers(0, 2)) == 0 else raw


@st.composite
def palettes(draw: st.DrawFn, palette: dict[str, Any]) -> bytes:
    """The palette with up to three things wrong; seldom as it was."""
    if draw(st.integers(0, 4)) == 0:
        return spoil_bytes(draw, yaml.safe_dump(palette).encode())
    return yaml.safe_dump(spoil_tree(draw, copy.deepcopy(palette)), sort_keys=False, allow_unicode=True).encode(
        "utf-8", "surrogatepass")


def check_photos(photos: Photos, changes: dict[str, Any], command: bool = False) -> bool:
    """Check and prepare the data as it stands; whether that went well. What is wrong is told, naming the file, soon;
    then nothing is left behind, and never is anything written beside the cache or read from outside."""
    before = photos.files()
    shutil.rmtree(photos.cache, ignore_errors=True)
    where = r"layouts\.csv|palette\.yaml|data\.split"
    with within(10):
        try:
            dataset = prepare(photos.config(**changes))
        except InputError as error:
            assert re.search(where, str(error)) and len(str(error)) < 20_000
            assert not photos.cache.exists()
            told = True
        else:
            assert dataset.images.shape == (len(dataset.names), 8, 8, 3) and len(dataset.names) >= 3
            assert not (np.asarray(dataset.images) == SECRET).all(axis=(1, 2, 3)).any()
            told = False
        try:
            data.check(photos.config(**changes))
        except InputError as error:
            assert told and re.search(where, str(error))
        if command:
            sheet = photos.home.parent / "sheet.png"
            sheet.unlink(missing_ok=True)
            try:
                with redirect_stdout(io.TextIOWrapper(io.BytesIO(), encoding="utf-8")):
                    assert data_command([str(photos.home / "data.yaml"), "--output", str(sheet)]) == 0
            except InputError as error:
                assert told and re.search(where, str(error)) and not sheet.exists()
            else:
                assert not told and Image.open(sheet).width > 8
    assert photos.files() == before
    return not told


CHANGES = ({}, {}, {}, {"filters": {}}, {"limit": 5}, {"label_column": None}, {"palette": None},
           {"fit": "crop"}, {"label_column": "is_empty"}, {"filters": {"type": ["room", 3, None]}})


def spoil_photos(photos: Photos, draw: st.DrawFn) -> None:
    """Mutate the manifest or the palette, and look at the data."""
    what = draw(st.sampled_from(["manifest", "manifest", "palette"]))
    photos.write("palette.yaml", draw(palettes(photos.palette)) if what == "palette" else
                 yaml.safe_dump(photos.palette).encode())
    photos.write("layouts.csv", draw(manifests(photos.table)) if what == "manifest" else
                 "\n".join(",".join(row) for row in photos.table).encode())
    changes = draw(st.sampled_from(CHANGES))
    check_photos(photos, changes, command=not changes)


@examples(120)
@given(st.data())
def test_mutated_manifests_and_palettes_are_read_or_told(photos, data):
    spoil_photos(photos, data.draw)


@pytest.mark.slow
@settings(QUIET, max_examples=MANY)
@given(st.data())
def test_ten_thousand_manifests_and_palettes(photos, data):
    spoil_photos(photos, data.draw)


def test_the_mutations_of_manifests_reach_both_ends(photos):
    """The property above would hold of a reader that refuses, or takes, everything."""
    photos.write("palette.yaml", yaml.safe_dump(photos.palette).encode())
    photos.write("layouts.csv", "\n".join(",".join(row) for row in photos.table).encode())
    assert check_photos(photos, {}, command=True)
    rows = [*photos.table, ["images/pipe.png", "", "false"]]
    photos.write("layouts.csv", "\n".join(",".join(row) for row in rows).encode())
    assert not check_photos(photos, {}, command=True)


@pytest.mark.parametrize("key", ["manifest", "palette"])
@pytest.mark.parametrize("path", ["images/pipe.png", "images/folder.png", "images/device.png", "images/loop.png",
                                  "images/dangling.png", "x" * 300, "y/" * 3000, "images/bomb.png"])
@pytest.mark.parametrize("source", ["manifest", "folder"])
def test_what_is_no_manifest_and_no_palette_is_told(photos, key, path, source):
    """Neither waited for, as a pipe would be, nor read without end."""
    photos.write("layouts.csv", b"layout_path\n")
    with within(10), pytest.raises(InputError, match=re.escape(path[:50])):
        prepare(photos.config(source=source, **{key: str(photos.home / path)}))


def test_a_pipe_is_no_configuration(photos):
    with within(10), pytest.raises(InputError, match=r"pipe\.png: not a regular file"):
        data_command([str(photos.home / "images" / "pipe.png")])


def test_names_that_are_markup_or_no_text_are_printed(photos, capsys):
    """Labels of a manifest, classes, and folders whose names are bytes of another encoding."""
    rows = [[path, label, empty] for (path, _, empty), label in zip(photos.table[1:], 3 * LABELS, strict=False)]
    photos.write("layouts.csv", "\n".join(",".join(row) for row in [photos.table[0], *rows[:2], *rows[4:]]).encode())
    photos.write("palette.yaml", yaml.safe_dump({"[/x]": photos.palette["dark"], "[red]a": photos.palette["light"]}
                                                ).encode())
    assert check_photos(photos, {}, command=True)
    folder = photos.home.parent / "folder"
    for name in (b"\xff", b"[b]", b"\x1b[31m"):
        (folder / os.fsdecode(name)).mkdir(parents=True)
        for k in range(12):
            shutil.copy(photos.home / f"images/{k:02d}.png", folder / os.fsdecode(name))
    (photos.home.parent / "folder.yaml").write_text(yaml.safe_dump({"data": {
        "source": "folder", "manifest": "folder", "image_size": 16, "split": [0.5, 0.4, 0.1],
        "cache_dir": str(photos.cache)}}))
    assert data_command([str(photos.home.parent / "folder.yaml"), "--output", str(folder / "sheet.png")]) == 0
    said = capsys.readouterr().out
    assert all(f"\n{name} " in said for name in ("[b]", r"'\udcff'", r"'\x1b[31m'"))
