"""Image files to square uint8 arrays."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from autoenc.data.palette import IGNORED, Palette

MAX_PIXELS = 50_000_000
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")

T = TypeVar("T")


class BrokenImage(Exception):
    """A file that holds no usable image; says why in a few words."""


def probe(path: str) -> None:
    """Read an image's header only. Raises :class:`BrokenImage`."""
    _opened(path, lambda image: None)


def decode(path: str, size: int, fit: str, palette: Palette | None) -> tuple[np.ndarray, np.ndarray | None]:
    """An image file as uint8 (size, size, 3) and, given a palette, its classes, uint8 (size, size).

    Class maps (a palette is given) and images of palette mode are scaled to the nearest pixel, others with
    antialiasing. ``fit``: "crop" cuts the longer side at the centre, "pad" adds to the shorter one.
    Transparency lies on white; EXIF orientation is followed; of an animation the first frame counts.
    Raises :class:`BrokenImage`.
    """
    return _opened(path, lambda image: _square(image, size, fit, palette))


def _opened(path: str, use: Callable[[Image.Image], T]) -> T:
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BrokenImage(_too_large(f"{image.width}×{image.height} pixels"))
            return use(image)
    except BrokenImage:
        raise
    except UnidentifiedImageError:
        raise BrokenImage(f"no readable image ({', '.join(FORMATS)})") from None
    except Image.DecompressionBombError:
        raise BrokenImage(_too_large("too many pixels")) from None
    except Exception as error:      # Pillow's decoders raise nearly anything on a damaged file
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BrokenImage(f"broken image: {said}") from None


def _too_large(what: str) -> str:
    return f"{what}; at most {MAX_PIXELS // 10**6} megapixels are read"


def _square(image: Image.Image, size: int, fit: str, palette: Palette | None) -> tuple[np.ndarray, np.ndarray | None]:
    nearest = palette is not None or image.mode in ("P", "PA", "1")
    resample = Image.Resampling.NEAREST if nearest else Image.Resampling.LANCZOS
    ImageOps.exif_transpose(image, in_place=True)
    image = _rgb(image)
    width, height = image.size
    if fit == "crop":
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        rgb = np.asarray(image.resize((size, size), resample, (left, top, left + side, top + side)))
        return rgb, palette.classify(rgb) if palette else None

    longer = max(width, height)
    width, height = max(1, round(width * size / longer)), max(1, round(height * size / longer))
    inner = np.asarray(image.resize((width, height), resample))
    background = palette.background if palette else None
    here = np.s_[(size - height) // 2:(size - height) // 2 + height, (size - width) // 2:(size - width) // 2 + width]
    rgb = np.empty((size, size, 3), dtype=np.uint8)
    rgb[:] = 255 if background is None else palette.colours[background]
    rgb[here] = inner
    if palette is None:
        return rgb, None
    classes = np.full((size, size), IGNORED if background is None else background, dtype=np.uint8)
    classes[here] = palette.classify(inner)
    return rgb, classes


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):      # Pillow's own conversion would clip 16 bits at 255
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise BrokenImage("32-bit pixels: save it with 8 bits a channel")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def workers(size: int, file_bytes: float) -> int:
    """How many threads pay for images of this size from files of so many bytes on average.

    Pillow and numpy let go of the interpreter only while they unpack and scale: threads halve the time of photos
    or 512 px class maps on two cores, and double that of a 64 px icon.
    """
    return 1 if size < 256 and file_bytes < 50_000 else cores()


def cores() -> int:
    """Processors that this process may use, 8 at most."""
    try:
        return min(8, len(os.sched_getaffinity(0)))
    except AttributeError:      # not on macOS
        return min(8, os.cpu_count() or 1)
