"""Pictures of what a model makes of images, to look at beside its figures."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from autoenc.data import Dataset
from autoenc.evaluation.interpolation import Interpolation
from autoenc.files import write_atomic
from autoenc.metrics import psnr, to_inputs, to_uint8, to_unit
from autoenc.model import Autoencoder
from autoenc.samples import sample_picture

COLUMNS = 8
CELL = 128                   # smaller images are enlarged to at most so many pixels
GAP, LINE = 6, 18


def reconstructions(model: Autoencoder, dataset: Dataset, split: str, errors: np.ndarray) -> Image.Image:
    """The best, typical and worst reconstructed images of a split by their mean squared errors (N,), eight of each:
    images above reconstructions above predicted classes."""
    device, rows = next(model.parameters()).device, dataset.splits[split]
    order = np.argsort(errors, kind="stable")
    count = min(COLUMNS, len(order))
    middle = (len(order) - count) // 2
    parts = []
    for name, chosen in (("best", order[:count]), ("typical", order[middle:middle + count]),
                         ("worst", order[len(order) - count:])):
        picture = sample_picture(model, to_inputs(dataset.inputs[rows[chosen]], device),
                                 to_unit(dataset.images[rows[chosen]], device),
                                 dataset.palette if dataset.segmentation is not None else None)
        low, high = errors[chosen[0]], errors[chosen[-1]]
        title = f"{name} of {len(order)}: MSE {low:.4g} to {high:.4g} ({psnr(low):.1f} to {psnr(high):.1f} dB)"
        parts.append(_titled(_enlarged(picture, dataset.images.shape[1]), title))
    return _stacked(parts)


def interpolations(found: Interpolation) -> Image.Image:
    """A row a pair: its first image, the points decoded between the two latents, its second image."""
    ends = to_uint8(found.ends.flatten(0, 1)).reshape(*found.ends.shape[:2], *found.ends.shape[3:], 3)
    between = to_uint8(found.decoded.flatten(0, 1)).reshape(*found.decoded.shape[:2], *found.decoded.shape[3:], 3)
    rows = []
    for (first, last), points in zip(ends, between, strict=True):
        gap = np.full((first.shape[0], GAP, 3), 255, dtype=np.uint8)
        rows.append(np.concatenate([first, gap, *points, gap, last], axis=1))
    picture = _enlarged(np.concatenate(rows), 2 * ends.shape[2])             # half as large: there are many in a row
    return _stacked([_titled(picture, f"image | decoded from {between.shape[1]} points of the straight line between "
                                      "the two latents | image")])


def write_picture(path: Path, picture: Image.Image) -> None:
    """Write a PNG whole. Raises OSError."""
    content = io.BytesIO()
    picture.save(content, format="PNG")
    write_atomic(path, content.getvalue())


def _enlarged(picture: np.ndarray, side: int) -> Image.Image:
    image = Image.fromarray(picture)
    factor = max(1, CELL // side)
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _titled(picture: Image.Image, title: str) -> Image.Image:
    font = ImageFont.load_default(13)
    width = max(picture.width, int(font.getlength(title)) + 1)
    canvas = Image.new("RGB", (width, picture.height + LINE), "white")
    ImageDraw.Draw(canvas).text((0, 0), title, fill="black", font=font)
    canvas.paste(picture, (0, LINE))
    return canvas


def _stacked(parts: list[Image.Image]) -> Image.Image:
    canvas = Image.new("RGB", (max(part.width for part in parts) + 2 * GAP,
                               sum(part.height + GAP for part in parts) + GAP), "white")
    top = GAP
    for part in parts:
        canvas.paste(part, (GAP, top))
        top += part.height + GAP
    return canvas
