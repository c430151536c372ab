"""Where items come from: generated layouts, files of a manifest or folder; for splats see autoenc.data.splat_source."""

from __future__ import annotations

import hashlib
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np

from autoenc.data import images, layouts
from autoenc.data.cache import Decoded, Form
from autoenc.data.images import BrokenImage, decode, workers
from autoenc.data.listing import Item, Listing, read_listing, told
from autoenc.data.palette import read_palette
from autoenc.errors import InputError
from autoenc.files import canonical_json
from autoenc.settings import DataConfig

FORMAT = 1            # raise it when files would be decoded to other arrays, or arrays kept another way
GENERATED = 1000      # how many items are generated where data.limit says nothing
CHUNK = 64            # items whose arrays are held at a time
QUIET, EVERY = 5.0, 60.0      # seconds before the first word of how far the work is, and between others
_MOST_LABELS = 32_767

T, R = TypeVar("T"), TypeVar("R")


class Source(NamedTuple):
    """Where items come from: their names, which arrays there are of them, and how to decode one after another."""

    key: str
    """of the cache folder"""
    names: Sequence[str]
    form: Form
    label_names: tuple[str, ...]
    decode: Callable[[], Iterator[Decoded]]
    classes: tuple[str, ...] = ()
    palette: np.ndarray | None = None
    listing: Listing | None = None
    probe: Callable[[str], None] = images.probe
    """reads the header of a file of the listing"""
    original: Callable[[int], np.ndarray] | None = None
    """the image, uint8 (H, W, 3), that an item's splats were fitted to"""


def of_layouts(data: DataConfig) -> Source:
    """Generated layouts."""
    count = data.limit or GENERATED

    def one(index: int) -> Decoded:
        segmentation, label = layouts.generate(data.seed, index, data.image_size)
        return {"images": layouts.PALETTE[segmentation], "segmentation": segmentation, "labels": label}

    key = key_of({"source": "layouts", "version": layouts.VERSION, "seed": data.seed, "count": count,
                  "size": data.image_size})
    return Source(key, tuple(f"layout_{index:06d}" for index in range(count)),
                  Form(count, data.image_size, labelled=True, segmented=True), layouts.LABELS,
                  lambda: (decoded for _, decoded in each(range(count), one, chunk=1)),
                  layouts.CLASSES, layouts.PALETTE)


def of_images(data: DataConfig) -> Source:
    """The image files of a manifest or a folder. Raises :class:`InputError`."""
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

    def one(item: Item) -> Decoded:
        image, segmentation = decode(item.path, data.image_size, data.fit, palette)
        return {"images": image, "segmentation": segmentation}

    label_names = labels_of(listing, data)
    mean_bytes = sum(item.size for item in listing.items) / max(1, len(listing.items))
    colours = None if palette is None else {"classes": palette.classes, "colours": palette.colours.tolist(),
                                            "tolerance": palette.tolerance}
    key = key_of({"source": "files", "size": data.image_size, "fit": data.fit, "palette": colours,
                  "items": contents(listing)})
    form = Form(len(listing.items), data.image_size, bool(label_names), palette is not None)
    return Source(key, tuple(item.name for item in listing.items), form, label_names,
                  lambda: load(listing, one, workers(data.image_size, mean_bytes)),
                  palette.classes if palette else (), palette.colours if palette else None, listing)


def key_of(content: dict[str, Any]) -> str:
    """The name of a cache folder, from all that its arrays depend on."""
    return hashlib.sha256(canonical_json({"format": FORMAT, **content}).encode(errors="surrogatepass")).hexdigest()


def contents(listing: Listing) -> list[tuple[str, str | None, int, int]]:
    """What stands for the files in a key: the manifest's content as read, not the manifest, so that the same files and
    labels are the same data."""
    return [(item.path, item.label, item.size, item.mtime) for item in listing.items]


def labels_of(listing: Listing, data: DataConfig) -> tuple[str, ...]:
    """The names of the labels. Raises :class:`InputError` where they are too many to be labels."""
    if len(listing.label_names) > _MOST_LABELS:
        raise InputError(f"{listing.where}: {len(listing.label_names):,} different labels, at most {_MOST_LABELS:,} "
                         f"are possible; is data.label_column {data.label_column!r} meant, or none?")
    return listing.label_names


def load(listing: Listing, one: Callable[[Item], Decoded], threads: int, chunk: int = CHUNK) -> Iterator[Decoded]:
    """Every file decoded by ``one``, with its label. Raises :class:`InputError` with all that is wrong, at the end;
    after the first fault nothing is yielded any more."""
    index = {label: k for k, label in enumerate(listing.label_names)}
    for item, decoded in each(listing.items, one, threads, chunk):
        if isinstance(decoded, BrokenImage):
            note(listing, item, decoded)
        elif not listing.problems:
            yield {**decoded, "labels": index.get(item.label, -1)}
    listing.refuse()


def note(listing: Listing, item: Item, problem: BrokenImage) -> None:
    """Keep what is wrong with a file."""
    row = "" if item.row is None else f"row {item.row}: "
    listing.problems.append((item.row or 0, f"{row}{told(item.name)}: {problem}"))


def each(items: Sequence[T], work: Callable[[T], R], threads: int = 1,
         chunk: int = CHUNK, what: str = "preparing data") -> Iterator[tuple[T, R | BrokenImage]]:
    """Every item with its result or what is wrong with it, in order; a bounded number is held at a time. Where it takes
    long, a line on stderr says now and then how far it is."""
    def guarded(item: T) -> R | BrokenImage:
        try:
            return work(item)
        except BrokenImage as error:
            return error

    far = _Far(what, len(items))
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(items), chunk):
            part = items[start:start + chunk]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")      # Pillow warns of oddities that are read all the same
                results = list(map(guarded, part) if threads == 1 else pool.map(guarded, part))
            far.reached(start + len(part))
            yield from zip(part, results, strict=True)


class _Far:
    """Says how far the work is: after some seconds, and then every minute, unless it is nearly done."""

    def __init__(self, what: str, count: int) -> None:
        self.what, self.count, self.start = what, count, time.monotonic()
        self.due = self.start + QUIET

    def reached(self, done: int) -> None:
        now = time.monotonic()
        left = (now - self.start) * (self.count - done) / done
        if now < self.due or left < QUIET:
            return
        self.due = now + EVERY
        told = f"{left:.0f} s" if left < 100 else f"{left / 60:.0f} min" if left < 6000 else f"{left / 3600:.1f} h"
        print(f"{self.what}: {done:,} of {self.count:,}, about {told} to go", file=sys.stderr, flush=True)
