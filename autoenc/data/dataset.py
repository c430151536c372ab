"""One in-memory form of every data source: uint8 arrays, memory-mapped from a cache, with their split."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from autoenc.config import DataConfig
from autoenc.data import cache, layouts
from autoenc.data.images import BrokenImage, decode, probe, workers
from autoenc.data.listing import Item, Listing, read_listing, told
from autoenc.data.palette import read_palette
from autoenc.errors import InputError
from autoenc.files import canonical_json

FORMAT = 1            # raise it when files would be decoded to other arrays, or arrays kept another way
LAYOUTS = 1000        # how many layouts are generated where data.limit says nothing
SPLITS = ("train", "val", "test")
_CHUNK = 64
_MOST_LABELS = 32_767

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Dataset:
    """All items of a data configuration, decoded; N items of H × W pixels, K classes."""

    images: np.ndarray
    """uint8 (N, H, W, 3), read-only map"""
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
    """items whose image equals an earlier one's exactly"""
    ignored: float
    """share of pixels without class"""


def prepare(data: DataConfig) -> Dataset:
    """The data set of a configuration, out of the cache; decoded or generated first where it is not there.

    Raises :class:`InputError`, naming every file that cannot be used, and then leaves nothing behind.
    """
    source = _source(data)
    dataset = None if source.listing and source.listing.problems else _open(data, source)
    if dataset is None:
        arrays = cache.build(*_place(data, source), source.decode(),
                             accept=lambda arrays: _splits(data, arrays.hashes))
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
    listing = _source(data).listing
    if listing is not None:
        for item, problem in _each(listing.items, lambda item: probe(item.path)):
            if isinstance(problem, BrokenImage):
                _note(listing, item, problem)
        listing.refuse()


class _Source(NamedTuple):
    """Where items come from: how many, their names, and how to decode them one after another."""

    key: str
    names: Sequence[str]
    labelled: bool
    label_names: tuple[str, ...]
    classes: tuple[str, ...]
    palette: np.ndarray | None
    decode: Callable[[], Iterator[cache.Decoded]]
    listing: Listing | None = None


def _source(data: DataConfig) -> _Source:
    return _layouts(data) if data.source == "layouts" else _files(data)


def _layouts(data: DataConfig) -> _Source:
    count = data.limit or LAYOUTS

    def generate() -> Iterator[cache.Decoded]:
        for index in range(count):
            segmentation, label = layouts.generate(data.seed, index, data.image_size)
            yield layouts.PALETTE[segmentation], segmentation, label

    key = _key({"source": "layouts", "version": layouts.VERSION, "seed": data.seed, "count": count,
                "size": data.image_size})
    return _Source(key, tuple(f"layout_{index:06d}" for index in range(count)), True, layouts.LABELS,
                   layouts.CLASSES, layouts.PALETTE, generate)


def _files(data: DataConfig) -> _Source:
    faults, palette, listing = [], None, None
    try:
        palette = read_palette(data.palette, data.palette_tolerance) if data.palette is not None else None
    except InputError as error:
        faults.append(str(error))
    try:
        listing = read_listing(data)
    except InputError as error:
        faults.append(str(error))
    if faults:
        raise InputError("\n".join(faults))

    label_names = listing.label_names
    if len(label_names) > _MOST_LABELS:
        raise InputError(f"{listing.where}: {len(label_names):,} different labels, at most {_MOST_LABELS:,} are "
                         f"possible; is data.label_column {data.label_column!r} meant, or none?")
    index = {label: k for k, label in enumerate(label_names)}

    def load() -> Iterator[cache.Decoded]:
        def one(item: Item) -> tuple[np.ndarray, np.ndarray | None]:
            return decode(item.path, data.image_size, data.fit, palette)
        mean_bytes = sum(item.size for item in listing.items) / max(1, len(listing.items))
        for item, decoded in _each(listing.items, one, workers(data.image_size, mean_bytes)):
            if isinstance(decoded, BrokenImage):
                _note(listing, item, decoded)
            elif not listing.problems:
                yield *decoded, index.get(item.label, -1)
        listing.refuse()

    colours = None if palette is None else {"classes": palette.classes, "colours": palette.colours.tolist(),
                                            "tolerance": palette.tolerance}
    # The manifest's content, as read, stands for the manifest: the same images and labels are the same data.
    key = _key({"source": "files", "size": data.image_size, "fit": data.fit, "palette": colours,
                "items": [(item.path, item.label, item.size, item.mtime) for item in listing.items]})
    return _Source(key, tuple(item.name for item in listing.items), bool(label_names), label_names,
                   palette.classes if palette else (), palette.colours if palette else None, load, listing)


def _key(content: dict[str, Any]) -> str:
    return hashlib.sha256(canonical_json({"format": FORMAT, **content}).encode(errors="surrogatepass")).hexdigest()


def _note(listing: Listing, item: Item, problem: BrokenImage) -> None:
    row = "" if item.row is None else f"row {item.row}: "
    listing.problems.append((item.row or 0, f"{row}{told(item.name)}: {problem}"))


def _each(items: Sequence[Item], work: Callable[[Item], T], threads: int = 1) -> Iterator[tuple[Item, T | BrokenImage]]:
    """Every item with its result or what is wrong with it, in order; a bounded number is held at a time."""
    def guarded(item: Item) -> T | BrokenImage:
        try:
            return work(item)
        except BrokenImage as error:
            return error

    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(items), _CHUNK):
            chunk = items[start:start + _CHUNK]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")      # Pillow warns of oddities that are read all the same
                results = list(map(guarded, chunk) if threads == 1 else pool.map(guarded, chunk))
            yield from zip(chunk, results, strict=True)


def _place(data: DataConfig, source: _Source) -> tuple[Path, int, int, bool, bool]:
    return (cache.root(data) / source.key, len(source.names), data.image_size, source.palette is not None,
            source.labelled)


def _open(data: DataConfig, source: _Source) -> Dataset | None:
    arrays = cache.load(*_place(data, source))
    return None if arrays is None else _dataset(data, source, arrays)


def _dataset(data: DataConfig, source: _Source, arrays: cache.Arrays) -> Dataset:
    splits, duplicates = _splits(data, arrays.hashes)
    fingerprint = hashlib.sha256(canonical_json({
        "arrays": arrays.digest, "classes": source.classes, "labels": source.label_names,
        "palette": None if source.palette is None else source.palette.tolist(),
        "splits": {name: hashlib.sha256(indices.astype("<i8").tobytes()).hexdigest()
                   for name, indices in splits.items()}}).encode()).hexdigest()
    return Dataset(arrays.images, arrays.segmentation, arrays.labels, source.classes, source.palette,
                   source.label_names, source.names, splits, fingerprint, duplicates, arrays.ignored)


def _splits(data: DataConfig, hashes: np.ndarray) -> tuple[dict[str, np.ndarray], int]:
    """Items by part of the split, from their pixels' hashes, so that equal images share a part; and how many
    are duplicates. Raises :class:`InputError` when nothing is left to train on or to validate with."""
    seed = data.seed.to_bytes(8, "little")
    pixels = [row.tobytes() for row in np.asarray(hashes)]
    draws = np.array([int.from_bytes(hashlib.sha256(one + seed).digest()[:8], "big") for one in pixels],
                     dtype=np.uint64) / 2.0**64
    train, val, test = data.split
    edges = [train, train + val if test > 0 else np.inf]
    part = np.searchsorted(edges, draws, side="right")
    splits = {name: np.flatnonzero(part == k).astype(np.int64) for k, name in enumerate(SPLITS)}
    duplicates = len(pixels) - len(set(pixels))
    empty = [name for name in SPLITS[:2] if not len(splits[name])]
    if empty:
        counts = ", ".join(f"{name} {len(indices)}" for name, indices in splits.items())
        twins = f" ({duplicates} of them exact duplicates, which share a part)" if duplicates else ""
        raise InputError(f"data.split: {list(data.split)} of {len(pixels)} items{twins} leaves nothing for "
                         f"{' and '.join(empty)} ({counts}): more items, other shares or another data.seed help")
    return splits, duplicates
