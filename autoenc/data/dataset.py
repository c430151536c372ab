"""One in-memory form of every data source: arrays, memory-mapped from a cache, with their split."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from autoenc.data import cache
from autoenc.data.images import BrokenImage
from autoenc.data.listing import told
from autoenc.data.sources import Source, each, note, of_images, of_layouts
from autoenc.data.splat_source import of_splats
from autoenc.data.splats import RENDERING
from autoenc.errors import InputError
from autoenc.files import canonical_json
from autoenc.settings import DataConfig

SPLITS = ("train", "val", "test")


@dataclass(frozen=True, eq=False)
class Dataset:
    """All items of a data configuration, decoded; N items of H × W pixels, K classes."""

    images: np.ndarray
    """uint8 (N, H, W, 3), read-only map; where there are splats, their rendering"""
    segmentation: np.ndarray | None
    """uint8 (N, H, W): class index or IGNORED"""
    labels: np.ndarray | None
    """int16 (N,): index into label_names, -1 without label"""
    classes: tuple[str, ...]
    """segmentation classes by index, () when there are none"""
    palette: np.ndarray | None
    """uint8 (K, 3): RGB of each class"""
    label_names: tuple[str, ...]
    names: Sequence[str]
    """relative path of each image, or layout_000123"""
    splits: dict[str, np.ndarray]
    """train, val, test: int64 indices, ascending"""
    fingerprint: str
    """sha256 over the decoded arrays, class and label names, palette and split, hexadecimal"""
    duplicates: int
    """items whose image, or whose splats, equal an earlier one's exactly"""
    ignored: float
    """share of pixels without class"""
    splats: np.ndarray | None = None
    """float32 (N, data.splats, 8), read-only map: raw (see autoenc.data.splats), each set sorted along data.curve"""

    @property
    def inputs(self) -> np.ndarray:
        """What a model encodes: splats where there are any, else images."""
        return self.images if self.splats is None else self.splats


def prepare(data: DataConfig) -> Dataset:
    """The data set of a configuration, out of the cache; decoded, generated or fitted first where it is not there,
    which is told on stderr where it takes long.

    Raises :class:`InputError`, naming every file that cannot be used, and then leaves nothing behind.
    """
    source = _source(data)
    dataset = None if source.listing and source.listing.problems else _open(data, source)
    if dataset is None:
        arrays = cache.build(_folder(data, source), source.form, source.decode(),
                             accept=lambda arrays: _splits(data, arrays.by_name["hashes"]))
        dataset = _dataset(data, source, arrays)
    return dataset


def cached(data: DataConfig) -> Dataset | None:
    """The data set, if this machine has decoded it already. Writes nothing. Raises :class:`InputError`."""
    source = _source(data)
    if source.listing:
        source.listing.refuse()
    return _open(data, source)


def check(data: DataConfig) -> None:
    """Find what is wrong with the data without decoding or writing anything: palette, manifest, columns,
    filters, absent files, unreadable headers. Raises one :class:`InputError` with all of it."""
    source = _source(data)
    if source.listing is not None:
        for item, problem in each(source.listing.items, lambda item: source.probe(item.path), what="checking files"):
            if isinstance(problem, BrokenImage):
                note(source.listing, item, problem)
        source.listing.refuse()


def originals(data: DataConfig, indices: Sequence[int]) -> np.ndarray | None:
    """The images that the splats of these items were fitted to, uint8 (n, H, W, 3); None where they were not fitted.

    Raises :class:`InputError` for files that cannot be read any more.
    """
    source = _source(data)
    if source.original is None:
        return None
    images = np.empty((len(indices), data.image_size, data.image_size, 3), dtype=np.uint8)
    for k, index in enumerate(indices):
        try:
            images[k] = source.original(int(index))
        except BrokenImage as error:
            raise InputError(f"{source.listing.where}: {told(source.names[index])}: {error}") from None
    return images


def _source(data: DataConfig) -> Source:
    return {"layouts": of_layouts, "splats": of_splats}.get(data.source, of_images)(data)


def _folder(data: DataConfig, source: Source) -> Path:
    return cache.root(data) / source.key


def _open(data: DataConfig, source: Source) -> Dataset | None:
    arrays = cache.load(_folder(data, source), source.form)
    return None if arrays is None else _dataset(data, source, arrays)


def _dataset(data: DataConfig, source: Source, arrays: cache.Arrays) -> Dataset:
    by_name = arrays.by_name
    splits, duplicates = _splits(data, by_name["hashes"])
    content = {
        "arrays": arrays.digest, "classes": source.classes, "labels": source.label_names,
        "palette": None if source.palette is None else source.palette.tolist(),
        "splits": {name: hashlib.sha256(indices.astype("<i8").tobytes()).hexdigest()
                   for name, indices in splits.items()}}
    if source.form.splats:      # the digest leaves their rendering out
        content["rendering"] = RENDERING
    fingerprint = hashlib.sha256(canonical_json(content).encode()).hexdigest()
    return Dataset(by_name["images"], by_name.get("segmentation"), by_name.get("labels"), source.classes,
                   source.palette, source.label_names, source.names, splits, fingerprint, duplicates, arrays.ignored,
                   by_name.get("splats"))


def _splits(data: DataConfig, hashes: np.ndarray) -> tuple[dict[str, np.ndarray], int]:
    """Items by part of the split, from the hashes of their content, so that equal ones share a part; and how many are
    duplicates. Raises :class:`InputError` when nothing is left to train on or to validate with."""
    seed = data.seed.to_bytes(8, "little")
    contents = [row.tobytes() for row in np.asarray(hashes)]
    draws = np.array([int.from_bytes(hashlib.sha256(one + seed).digest()[:8], "big") for one in contents],
                     dtype=np.uint64) / 2.0**64
    train, val, test = data.split
    edges = [train, train + val if test > 0 else np.inf]
    part = np.searchsorted(edges, draws, side="right")
    splits = {name: np.flatnonzero(part == k).astype(np.int64) for k, name in enumerate(SPLITS)}
    duplicates = len(contents) - len(set(contents))
    empty = [name for name in SPLITS[:2] if not len(splits[name])]
    if empty:
        counts = ", ".join(f"{name} {len(indices)}" for name, indices in splits.items())
        twins = f" ({duplicates} of them exact duplicates, which share a part)" if duplicates else ""
        raise InputError(f"data.split: {list(data.split)} of {len(contents)} items{twins} leaves nothing for "
                         f"{' and '.join(empty)} ({counts}): more items, other shares or another data.seed help")
    return splits, duplicates
