"""Splats as items: read from .npz files, or fitted to image files or generated images; each set with its rendering.

What becomes of an item depends on that item alone, whatever else there is and however many threads there are. PyTorch
is imported where something is fitted or rendered, not to look at files or to map what is cached.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from autoenc.data import compositions, images, layouts, splats
from autoenc.data.cache import Decoded, Form
from autoenc.data.images import cores
from autoenc.data.listing import Item, Listing, is_splats, read_listing
from autoenc.data.sources import CHUNK, GENERATED, Source, contents, each, key_of, labels_of, load
from autoenc.settings import DataConfig

MOST_WEIGHTS = 2**29      # of splats at pixels, held by all threads together: 2 GiB


def of_splats(data: DataConfig) -> Source:
    """The splats of a data configuration. Raises :class:`InputError`."""
    if data.manifest is None:
        return _generated(data)
    listing = read_listing(data)
    source = _files if listing.items and is_splats(listing.items[0].name) else _fitted_files
    return source(data, listing, labels_of(listing, data))


def _generated(data: DataConfig) -> Source:
    count, kind, module = data.limit or GENERATED, data.generated.removesuffix("s"), {
        "compositions": compositions, "layouts": layouts}[data.generated]
    label_names = layouts.LABELS if data.generated == "layouts" else ()

    def image(index: int) -> tuple[np.ndarray, int | None]:
        if data.generated == "compositions":
            return compositions.generate(data.seed, index, data.image_size), None
        classes, label = layouts.generate(data.seed, index, data.image_size)
        return layouts.PALETTE[classes], label

    def one(index: int) -> Decoded:
        pixels, label = image(index)
        return {**_finished(_fit(pixels, data), data), "labels": label}

    def generate() -> Iterator[Decoded]:
        with _one_thread():
            yield from (decoded for _, decoded in each(range(count), one, _threads(data), _chunk(data)))

    key = key_of({**_recipe(data), "of": data.generated, "version": module.VERSION, "count": count})
    return Source(key, tuple(f"{kind}_{index:06d}" for index in range(count)), _form(data, count, label_names),
                  label_names, generate, original=lambda index: image(index)[0])


def _files(data: DataConfig, listing: Listing, label_names: tuple[str, ...]) -> Source:
    def one(item: Item) -> Decoded:
        raw = splats.decode(item.path, data.splats)
        return {} if listing.problems else _finished(raw, data)      # the others are only looked at

    key = key_of({"source": "splats", "of": "files", "size": data.image_size, "splats": data.splats,
                  "curve": data.curve, "rendering": splats.RENDERING, "items": contents(listing)})
    return _of_listing(data, listing, label_names, key, one)._replace(
        probe=functools.partial(splats.probe, count=data.splats))


def _fitted_files(data: DataConfig, listing: Listing, label_names: tuple[str, ...]) -> Source:
    def image(item: Item) -> np.ndarray:
        return images.decode(item.path, data.image_size, data.fit, None)[0]

    def one(item: Item) -> Decoded:
        pixels = image(item)
        return {} if listing.problems else _finished(_fit(pixels, data), data)

    key = key_of({**_recipe(data), "of": "images", "fit": data.fit, "items": contents(listing)})
    return _of_listing(data, listing, label_names, key, one)._replace(
        original=lambda index: image(listing.items[index]))


def _of_listing(data: DataConfig, listing: Listing, label_names: tuple[str, ...], key: str,
                one: Callable[[Item], Decoded]) -> Source:
    def decode() -> Iterator[Decoded]:
        with _one_thread():
            yield from load(listing, one, _threads(data), _chunk(data))

    return Source(key, tuple(item.name for item in listing.items), _form(data, len(listing.items), label_names),
                  label_names, decode, listing=listing)


def _recipe(data: DataConfig) -> dict[str, object]:
    """What the splats fitted to an image depend on."""
    return {"source": "splats", "fitting": splats.FITTING, "rendering": splats.RENDERING, "seed": data.seed,
            "size": data.image_size, "splats": data.splats, "curve": data.curve, "refine": data.refine}


def _form(data: DataConfig, count: int, label_names: tuple[str, ...]) -> Form:
    return Form(count, data.image_size, bool(label_names), splats=data.splats)


def _fit(pixels: np.ndarray, data: DataConfig) -> np.ndarray:
    # One image at a time, on the processor: in a batch or on a GPU its last digits would depend on others.
    from autoenc.data.splat_fit import fit_all

    [fitted] = fit_all([pixels], data.splats, data.seed, data.refine)
    return fitted


def _finished(raw: np.ndarray, data: DataConfig) -> Decoded:
    """Splats (N, 8) in order, and the image that they show."""
    import torch

    from autoenc.render import render

    ordered = splats.in_order(raw, data.curve)
    with torch.inference_mode():
        image = render(torch.from_numpy(ordered)[None], data.image_size)[0].permute(1, 2, 0)
        pixels = image.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).numpy()
    return {"splats": ordered, "images": pixels}


def _threads(data: DataConfig) -> int:
    return max(1, min(cores(), MOST_WEIGHTS // (2 * data.splats * data.image_size**2)))


def _chunk(data: DataConfig) -> int:
    """Items between two words of how far it is: few of those that take seconds each."""
    return 2 * _threads(data) if data.refine or data.image_size > 128 else CHUNK


@contextmanager
def _one_thread() -> Iterator[None]:
    from autoenc.data.splat_fit import one_thread

    with one_thread():
        yield
