"""python -m autoenc.data CONFIG.yaml: what the data looks like."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from autoenc.config import load_config
from autoenc.data import SPLITS, Dataset, prepare
from autoenc.errors import InputError, command
from autoenc.files import write_atomic

COLUMNS, ROWS = 8, 4
GAP = 4
MAGENTA = (255, 0, 255)      # ignored pixels in the contact sheet


def main(arguments: list[str]) -> int:
    """Print counts and tables, write a contact sheet. Raises :class:`InputError`."""
    parser = argparse.ArgumentParser(prog="python -m autoenc.data", description="What the data of a configuration "
                                     "looks like: counts, duplicates, classes, labels, and a contact sheet.")
    parser.add_argument("config", metavar="CONFIG.yaml", help="a best_config.yaml, or any configuration")
    parser.add_argument("--output", metavar="FILE.png", default="data_contact_sheet.png",
                        help="the contact sheet (default: %(default)s)")
    options = parser.parse_args(arguments)
    output = Path(options.output)
    if output.suffix.lower() != ".png":
        raise InputError(f"--output: {output}: should end in .png")
    if not output.absolute().parent.is_dir():
        raise InputError(f"--output: {output}: there is no folder {output.absolute().parent}")
    if output.is_dir():
        raise InputError(f"--output: {output}: is a folder")
    data = load_config(options.config).data
    dataset = prepare(data)
    describe(dataset, data.source if data.manifest is None else f"{data.source} {data.manifest}")
    try:
        write_atomic(output, lambda file: contact_sheet(dataset).save(file, format="PNG"))
    except OSError as error:
        raise InputError(f"--output: {output}: cannot be written: {error.strerror}") from None
    below = ", each above its classes" if dataset.segmentation is not None else ""
    print(f"\ncontact sheet: {output} (images of the training part{below}"
          f"{'; ignored pixels magenta' if dataset.ignored else ''})")
    return 0


def describe(dataset: Dataset, source: str) -> None:
    """Print what the data holds, per part of the split."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    count, height, width = dataset.images.shape[:3]
    console.print(f"{source}: {count:,} images of {width}×{height} pixels", markup=False)
    console.print(f"exact duplicates: {dataset.duplicates:,} ({dataset.duplicates / count:.1%}), "
                  "each in the same part of the split as its twin")
    if dataset.segmentation is not None:
        console.print(f"ignored pixels: {dataset.ignored:.2%}")

    def table(title: str, rows: list[tuple[str, list[str]]]) -> None:
        grid = Table(title, *SPLITS, box=None, pad_edge=False)
        for column in grid.columns[1:]:
            column.justify = "right"
        for name, cells in rows:
            grid.add_row(Text(name if name.isprintable() else repr(name)), *cells)
        console.print()
        console.print(grid)

    table("part", [("images", [f"{len(dataset.splits[split]):,}" for split in SPLITS])])
    if dataset.segmentation is not None:
        shares = [_shares(dataset, split) for split in SPLITS]
        table("class (share of pixels)", [(name, [f"{share[k]:.2%}" for share in shares])
                                          for k, name in enumerate(dataset.classes)])
    if dataset.labels is not None:
        counts = [np.bincount(dataset.labels[dataset.splits[split]] + 1, minlength=len(dataset.label_names) + 1)
                  for split in SPLITS]
        rows = [(name, [f"{part[k + 1]:,}" for part in counts]) for k, name in enumerate(dataset.label_names)]
        if any(part[0] for part in counts):
            rows.append(("(none)", [f"{part[0]:,}" for part in counts]))
        table("label (images)", rows)


def _shares(dataset: Dataset, split: str) -> np.ndarray:
    """Share of each class among the pixels that have one."""
    counts = np.zeros(256, dtype=np.int64)
    for index in dataset.splits[split]:
        counts += np.bincount(dataset.segmentation[index].ravel(), minlength=256)
    counts = counts[:len(dataset.classes)]
    return counts / max(1, counts.sum())


def contact_sheet(dataset: Dataset) -> Image.Image:
    """Up to 32 training images, evenly spaced over the split; below each its classes in their colours."""
    indices = dataset.splits["train"]
    indices = indices[np.unique(np.linspace(0, len(indices) - 1, COLUMNS * ROWS).astype(int))]
    size = dataset.images.shape[1]
    cell = size * max(1, 128 // size) if size <= 256 else 256
    parts = 1 if dataset.segmentation is None else 2
    columns = min(COLUMNS, len(indices))
    rows = -(-len(indices) // columns)
    tall = parts * cell + GAP
    sheet = Image.new("RGB", (columns * (cell + GAP) + GAP, rows * (tall + GAP) + GAP), "white")
    colours = None
    if dataset.palette is not None:
        colours = np.empty((256, 3), dtype=np.uint8)
        colours[:] = MAGENTA
        colours[:len(dataset.palette)] = dataset.palette
    for k, index in enumerate(indices):
        left, top = GAP + k % columns * (cell + GAP), GAP + k // columns * (tall + GAP)
        shrink = Image.Resampling.BOX if size > cell else Image.Resampling.NEAREST
        sheet.paste(Image.fromarray(np.asarray(dataset.images[index])).resize((cell, cell), shrink), (left, top))
        if colours is not None:
            classes = Image.fromarray(colours[dataset.segmentation[index]])
            sheet.paste(classes.resize((cell, cell), Image.Resampling.NEAREST), (left, top + cell + 1))
    return sheet


if __name__ == "__main__":
    command(main)
