"""Decoding: palettes, fitting to a square, transparency, orientation, broken files."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from autoenc.data import IGNORED, Dataset, check, prepare
from autoenc.data.palette import Palette
from autoenc.errors import InputError
from autoenc.settings import DataConfig

pytestmark = pytest.mark.usefixtures("cache")
RED, GREEN, PAPER = (200, 0, 0), (0, 200, 0), (240, 240, 240)
PALETTE = {"red": {"rgb": list(RED), "class_index": 1}, "green": {"rgb": list(GREEN), "class_index": 0},
           "background": {"rgb": list(PAPER), "class_index": 2}}


def write_palette(folder: Path, content=PALETTE) -> str:
    (folder / "palette.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return str(folder / "palette.yaml")


def decoded(tmp_path: Path, image: Image.Image, name: str = "a.png", save: dict | None = None, **changes) -> Dataset:
    """The data set whose first item is this image; the others only fill the split."""
    folder = tmp_path / "images"
    folder.mkdir(exist_ok=True)
    image.save(folder / name, **(save or {}))
    for k in range(25):
        Image.new("RGB", (8, 8), (k, 9 * k, 1)).save(folder / f"z{k:02d}.png")
    return prepare(DataConfig(**{"source": "folder", "manifest": str(folder), "image_size": 8, **changes}))


def halves(width: int, height: int) -> Image.Image:
    """Left half red, right half green."""
    image = Image.new("RGB", (width, height), RED)
    image.paste(GREEN, (width // 2, 0, width, height))
    return image


def test_palette_classes_and_the_file_s_own_colours(tmp_path):
    image = halves(8, 8)
    image.putpixel((0, 0), (205, 3, 3))      # near red
    image.putpixel((1, 0), (100, 100, 100))      # near nothing
    dataset = decoded(tmp_path, image, palette=write_palette(tmp_path))
    assert dataset.classes == ("green", "red", "background")
    assert dataset.palette.tolist() == [list(GREEN), list(RED), list(PAPER)]
    assert dataset.images[0, 0, 0].tolist() == [205, 3, 3]
    assert dataset.segmentation[0, 0, 0] == 1 and dataset.segmentation[0, 0, 1] == IGNORED
    assert (dataset.segmentation[0, 1:, :4] == 1).all() and (dataset.segmentation[0, :, 4:] == 0).all()
    assert dataset.ignored == pytest.approx(np.mean(dataset.segmentation == IGNORED)) and dataset.ignored > 0


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_nearest_colour_within_tolerance(data):
    colours = data.draw(st.lists(st.tuples(*[st.integers(0, 255)] * 3), min_size=1, max_size=12, unique=True))
    tolerance = data.draw(st.floats(0, 442))
    pixels = data.draw(st.lists(st.one_of(st.tuples(*[st.integers(0, 255)] * 3), st.sampled_from(colours)),
                                min_size=1, max_size=20))
    palette = Palette(tuple(map(str, colours)), np.array(colours, np.uint8), tolerance)
    for pixel, found in zip(pixels, palette.classify(np.array(pixels, np.uint8)), strict=True):
        distances = [sum((a - b) ** 2 for a, b in zip(pixel, colour, strict=True)) for colour in colours]
        best = min(distances)
        assert found == (distances.index(best) if best <= tolerance ** 2 else IGNORED)


@pytest.mark.parametrize("with_background", [True, False])
def test_padding(tmp_path, with_background):
    palette = {name: entry for name, entry in PALETTE.items() if with_background or name != "background"}
    # White is near "paper" here: without a background class, padding must still be of no class.
    palette["white"] = {"rgb": [255, 255, 255], "class_index": len(palette)}
    dataset = decoded(tmp_path, halves(16, 8), palette=write_palette(tmp_path, palette), fit="pad")
    above, inside = np.s_[0, :2], np.s_[0, 2:6]
    assert (dataset.images[above] == (PAPER if with_background else (255, 255, 255))).all()
    assert (dataset.segmentation[above] == (2 if with_background else IGNORED)).all()
    assert (dataset.segmentation[inside][:, :4] == 1).all() and (dataset.segmentation[inside][:, 4:] == 0).all()
    assert (dataset.segmentation[0, 6:] == dataset.segmentation[0, 0, 0]).all()


def test_padding_without_palette_is_white(tmp_path):
    dataset = decoded(tmp_path, Image.new("RGB", (4, 16), RED), fit="pad")
    assert (dataset.images[0, :, 3:5] == RED).all()
    assert (dataset.images[0, :, :3] == 255).all() and (dataset.images[0, :, 5:] == 255).all()


def test_crop_takes_the_centre(tmp_path):
    image = Image.new("RGB", (24, 8), PAPER)
    image.paste(RED, (8, 0, 16, 8))
    dataset = decoded(tmp_path, image, fit="crop")
    assert (dataset.images[0] == RED).all()


def test_class_maps_are_scaled_to_the_nearest_pixel_and_photos_smoothly(tmp_path):
    stripes = Image.fromarray(np.tile(np.array([RED, GREEN], np.uint8), (26, 13, 1)))
    colours = {tuple(colour) for colour in decoded(tmp_path, stripes, palette=write_palette(tmp_path))
               .images[0].reshape(-1, 3).tolist()}
    assert colours <= {RED, GREEN}
    smooth = {tuple(colour) for colour in decoded(tmp_path, stripes).images[0].reshape(-1, 3).tolist()}
    assert not smooth <= {RED, GREEN}
    indexed = stripes.quantize(2)
    assert indexed.mode == "P"
    exact = {tuple(colour) for colour in decoded(tmp_path, indexed).images[0].reshape(-1, 3).tolist()}
    assert exact <= {tuple(colour) for colour in np.unique(np.asarray(indexed.convert("RGB")).reshape(-1, 3),
                                                          axis=0).tolist()}


def test_transparency_lies_on_white(tmp_path):
    image = Image.new("RGBA", (8, 8), (*RED, 0))
    image.paste((*RED, 255), (4, 0, 8, 8))
    dataset = decoded(tmp_path, image)
    assert (dataset.images[0, :, :4] == 255).all() and (dataset.images[0, :, 4:] == RED).all()


def test_exif_orientation_is_followed(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3      # upside down
    dataset = decoded(tmp_path, halves(8, 8), save={"exif": exif})
    assert (dataset.images[0, :, :4] == GREEN).all() and (dataset.images[0, :, 4:] == RED).all()


def test_other_modes_and_formats(tmp_path):
    sixteen = Image.fromarray(np.full((8, 8), 40_000, np.uint16))
    assert (decoded(tmp_path, sixteen).images[0] == 40_000 >> 8).all()
    assert (decoded(tmp_path, Image.new("L", (8, 8), 77)).images[0] == 77).all()
    for name in ("a.bmp", "a.gif", "a.tif", "a.webp", "a.jpg"):
        (tmp_path / "images" / "a.png").unlink(missing_ok=True)
        save = {"lossless": True} if name == "a.webp" else {}
        image = decoded(tmp_path, Image.new("RGB", (8, 8), RED), name, save).images[0]
        assert np.abs(image.astype(int) - RED).max() <= (4 if name == "a.jpg" else 0)
        (tmp_path / "images" / name).unlink()


def png_header(width: int, height: int) -> bytes:
    """A PNG of that size without pixels."""
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + \
        chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(10_000, 5_001), (10_000, 10_000), (100_000, 100_000)])
def test_huge_images_are_refused_unread(tmp_path, size):
    decoded(tmp_path, halves(8, 8))
    (tmp_path / "images" / "a.png").write_bytes(png_header(*size))
    with pytest.raises(InputError, match=r"a\.png: .*at most 50 megapixels"):
        check(DataConfig(source="folder", manifest=str(tmp_path / "images"), image_size=8))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_give_pixels_or_a_message(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    kind = data.draw(st.sampled_from(["png", "jpg", "gif", "bmp", "tif", "webp"]))
    for k in range(12):
        Image.new("RGB", (8, 8), (20 * k, 9, 1)).save(folder / f"z{k}.png")
    halves(12, 12).save(folder / f"a.{kind}")
    content = bytearray((folder / f"a.{kind}").read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (folder / f"a.{kind}").write_bytes(content[:data.draw(st.integers(0, len(content)))])
    try:
        dataset = prepare(DataConfig(source="folder", manifest=str(folder), image_size=8, split=(0.5, 0.4, 0.1)))
    except InputError as error:
        assert f"a.{kind}" in str(error) or "data.split" in str(error)
    else:
        assert dataset.images.shape == (13, 8, 8, 3)


@pytest.mark.parametrize(("content", "said"), [
    ({}, "should hold classes"),
    (["red"], "should hold classes"),
    ({"red": {"rgb": [1, 2, 3]}}, "red: lacks class_index"),
    ({"red": {"rgb": [1, 2], "class_index": 0}}, r"red: rgb \[1, 2\]"),
    ({"red": {"rgb": [1, 2, 256], "class_index": 0}}, "0 to 255"),
    ({"red": {"rgb": [1, 2, True], "class_index": 0}}, "0 to 255"),
    ({"red": {"rgb": "red", "class_index": 0}}, "red: rgb 'red'"),
    ({"red": {"rgb": [1, 2, 3], "class_index": "0"}}, "class_index '0'"),
    ({"red": {"rgb": [1, 2, 3], "class_index": 1}}, r"\[1\] should be 0 to 0"),
    ({"red": {"rgb": [1, 2, 3], "class_idx": 0}}, "did you mean 'class_index'"),
    ({"red": {"rgb": [1, 2, 3], "class_index": 0}, "blue": {"rgb": [1, 2, 3], "class_index": 1}}, "also that of red"),
    ({"red": {"rgb": [1, 2, 3], "class_index": 0}, "blue": {"rgb": [1, 2, 4], "class_index": 0}}, "also that of red"),
    ({1: {"rgb": [1, 2, 3], "class_index": 0}}, "should be text"),
    ({f"c{k}": {"rgb": [k % 256, k // 256, 0], "class_index": k} for k in range(256)}, "at most 255"),
])
def test_bad_palettes(tmp_path, content, said):
    decoded(tmp_path, halves(8, 8))
    with pytest.raises(InputError, match=said) as error:
        check(DataConfig(source="folder", manifest=str(tmp_path / "images"), palette=write_palette(tmp_path, content)))
    assert "palette.yaml" in str(error.value)


def test_every_fault_of_palette_and_manifest_is_told_at_once(tmp_path):
    palette = write_palette(tmp_path, {"red": {"rgb": [1, 2, -3], "class_index": 0}, "blue": {"class_index": -1}})
    with pytest.raises(InputError) as error:
        check(DataConfig(source="manifest", manifest=str(tmp_path / "absent.csv"), palette=palette))
    for said in ("red: rgb", "blue: lacks rgb", "blue: class_index -1", "absent.csv"):
        assert said in str(error.value)
