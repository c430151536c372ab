"""python -m autoenc.data CONFIG.yaml: what the data looks like."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
from PIL import Image

from autoenc.config import Config, load_config
from autoenc.data import SPLITS, Dataset, originals, prepare
from autoenc.data.summary import STATISTICS, fit_psnr, latent_pca, splat_statistics
from autoenc.errors import InputError, command
from autoenc.files import write_atomic

COLUMNS, ROWS = 8, 4
GAP = 4
MAGENTA = (255, 0, 255)      # ignored pixels in the contact sheet


def main(arguments: list[str]) -> int:
    """Print counts and tables, write a contact sheet. Raises :class:`InputError`."""
    parser = argparse.ArgumentParser(prog="python -m autoenc.data", description="What the data of a configuration "
                                     "looks like: counts, duplicates, classes, labels, splats, what a PCA keeps of it, "
                                     "and a contact sheet.")
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
    config = load_config(options.config)
    data = config.data
    dataset = prepare(data)
    shown = _spread(dataset)
    fitted = originals(data, shown)
    describe(dataset, data.source if data.manifest is None else f"{data.source} {data.manifest}")
    if fitted is not None:
        print(f"\nrendered splats against the images that they were fitted to, {len(shown)} of the training part: "
              f"PSNR {fit_psnr(fitted, dataset.images[shown]):.1f} dB")
    print("\n" + pca_words(dataset, config))
    try:
        write_atomic(output, lambda file: contact_sheet(dataset, shown, fitted).save(file, format="PNG"))
    except OSError as error:
        raise InputError(f"--output: {output}: cannot be written: {error.strerror}") from None
    what = "images of the training part"
    if dataset.segmentation is not None:
        what += ", each above its classes" + ("; ignored pixels magenta" if dataset.ignored else "")
    elif dataset.splats is not None:
        what = "rendered splats of the training part" if fitted is None else what + ", each above its rendered splats"
    print(f"\ncontact sheet: {output} ({what})")
    return 0


def pca_words(dataset: Dataset, config: Config) -> str:
    """What a PCA at the latent's size keeps of the data."""
    if config.latent_shape is None:
        return f"PCA: none, since the size of the latent is not known with model.kind {config.model.kind}"
    found = latent_pca(dataset, config)
    if found is None:
        return "PCA: none, since there is but one training item"
    size, things = math.prod(config.latent_shape), "images" if dataset.splats is None else "sets of splats"
    many = "as many as the latent has" if found.components == size else \
        f"all that {found.fitted_on:,} {things} give (the latent has {size:,})"
    words = (f"PCA: {found.components:,} of {found.numbers:,} dimensions, {many},\nkeep {_share(found.val)} of the "
             f"variance of held-out {things} ({_share(found.train)} of the {found.fitted_on:,} it was fitted to)")
    if dataset.splats is not None:
        words += (f",\nin columns of model.splat_target {config.model.splat_target}, each normalised; of independent "
                  f"random splats they would keep {_share(found.components / found.numbers)}")
    return words


def _share(value: float) -> str:
    return "an undefined share" if math.isnan(value) else f"{value:.1%}"


def describe(dataset: Dataset, source: str) -> None:
    """Print what the data holds, per part of the split."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    count, height, width = dataset.images.shape[:3]
    of_splats = "" if dataset.splats is None else f"{dataset.splats.shape[1]:,} splats each, rendered as "
    console.print(f"{source}: {count:,} {'items, ' if of_splats else ''}{of_splats}images of {width}×{height} pixels",
                  markup=False)
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
    if dataset.splats is not None:
        found = [splat_statistics(dataset.splats, dataset.splits[split]) for split in SPLITS]
        table("splats (mean ± deviation)", [
            (name, ["–" if math.isnan(mean[k]) else f"{mean[k]:.3f} ± {deviation[k]:.3f}" for mean, deviation in found])
            for k, name in enumerate(STATISTICS)])


def _shares(dataset: Dataset, split: str) -> np.ndarray:
    """Share of each class among the pixels that have one."""
    counts = np.zeros(256, dtype=np.int64)
    for index in dataset.splits[split]:
        counts += np.bincount(dataset.segmentation[index].ravel(), minlength=256)
    counts = counts[:len(dataset.classes)]
    return counts / max(1, counts.sum())


def _spread(dataset: Dataset) -> np.ndarray:
    """Up to 32 training items, evenly spaced over the split."""
    indices = dataset.splits["train"]
    return indices[np.unique(np.linspace(0, len(indices) - 1, COLUMNS * ROWS).astype(int))]


def contact_sheet(dataset: Dataset, indices: np.ndarray, fitted: np.ndarray | None = None) -> Image.Image:
    """Images of these items; below each its classes in their colours, or above it the one that its splats were fitted
    to, of ``fitted``, uint8 (n, H, W, 3)."""
    size = dataset.images.shape[1]
    cell = size * max(1, 128 // size) if size <= 256 else 256
    parts = 1 if dataset.segmentation is None and fitted is None else 2
    columns = min(COLUMNS, len(indices))
    rows = -(-len(indices) // columns)
    tall = parts * cell + GAP
    sheet = Image.new("RGB", (columns * (cell + GAP) + GAP, rows * (tall + GAP) + GAP), "white")
    colours = None
    if dataset.palette is not None:
        colours = np.empty((256, 3), dtype=np.uint8)
        colours[:] = MAGENTA
        colours[:len(dataset.palette)] = dataset.palette
    shrink = Image.Resampling.BOX if size > cell else Image.Resampling.NEAREST
    for k, index in enumerate(indices):
        left, top = GAP + k % columns * (cell + GAP), GAP + k // columns * (tall + GAP)
        stack = [(dataset.images[index], shrink)]
        if fitted is not None:
            stack.insert(0, (fitted[k], shrink))
        if colours is not None:
            stack.append((colours[dataset.segmentation[index]], Image.Resampling.NEAREST))
        for below, (pixels, resample) in enumerate(stack):
            picture = Image.fromarray(np.asarray(pixels)).resize((cell, cell), resample)
            sheet.paste(picture, (left, top + below * (cell + 1)))
    return sheet


if __name__ == "__main__":
    command(main)
