"""Palettes: which RGB colour stands for which segmentation class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from autoenc.checks import shown
from autoenc.errors import InputError, did_you_mean
from autoenc.yamlfile import read_yaml

IGNORED = 255
"""Segmentation value of pixels without class."""


@dataclass(frozen=True, eq=False)
class Palette:
    """Classes by index, their colours (uint8 (K, 3)), and how far from a colour a pixel still counts as it."""

    classes: tuple[str, ...]
    colours: np.ndarray
    tolerance: float

    @property
    def background(self) -> int | None:
        """The class that padding gets, if there is one."""
        return self.classes.index("background") if "background" in self.classes else None

    def classify(self, rgb: np.ndarray) -> np.ndarray:
        """Class of the nearest colour (Euclidean in RGB) for uint8 (…, 3), as uint8 (…).

        IGNORED where that is farther than the tolerance; of equally near colours the first.
        """
        red, green, blue = (np.ascontiguousarray(rgb[..., channel], dtype=np.int32) for channel in range(3))
        nearest = np.full(rgb.shape[:-1], IGNORED, dtype=np.uint8)
        distance = np.full(rgb.shape[:-1], int(self.tolerance ** 2) + 1, dtype=np.int32)
        for index, (r, g, b) in enumerate(self.colours.tolist()):
            squared = (red - r) ** 2 + (green - g) ** 2 + (blue - b) ** 2
            np.copyto(nearest, index, where=squared < distance)
            np.minimum(distance, squared, out=distance)
        return nearest


def read_palette(path: str, tolerance: float) -> Palette:
    """Read {class: {rgb: [r, g, b], class_index: i}}. Raises :class:`InputError` that names every fault."""
    content = read_yaml(path)
    if not isinstance(content, Mapping) or not content:
        raise InputError(f"{path}: should hold classes, like {{wall: {{rgb: [200, 200, 200], class_index: 0}}}}")
    faults: list[str] = []
    by_index: dict[int, tuple[str, tuple[int, ...]]] = {}
    by_colour: dict[tuple[int, ...], str] = {}
    for name, entry in content.items():
        said = name if isinstance(name, str) and name.isprintable() and len(name) <= 80 else shown(name)
        wrong = [f"{said}: {fault}" for fault in _faults(name, entry)]
        faults += wrong
        if wrong:
            continue
        colour, index = tuple(entry["rgb"]), entry["class_index"]
        if colour in by_colour:
            faults.append(f"{said}: rgb {list(colour)} is also that of {by_colour[colour]}")
        if index in by_index:
            faults.append(f"{said}: class_index {shown(index)} is also that of {by_index[index][0]}")
        by_colour.setdefault(colour, said)
        by_index.setdefault(index, (name, colour))
    if len(content) > IGNORED:
        faults.append(f"{len(content)} classes: at most {IGNORED} are possible")
    elif not faults and sorted(by_index) != list(range(len(by_index))):
        faults.append(f"class_index: {shown(sorted(by_index))} should be 0 to {len(by_index) - 1} without a gap")
    if faults:
        raise InputError("\n".join(f"{path}: {fault}" for fault in faults))
    ordered = [by_index[index] for index in range(len(by_index))]
    return Palette(tuple(name for name, _ in ordered), np.array([rgb for _, rgb in ordered], dtype=np.uint8),
                   tolerance)


def _faults(name: Any, entry: Any) -> list[str]:
    if not isinstance(name, str):
        return ["a class name should be text (put it in quotes)"]
    if not isinstance(entry, Mapping):
        return [f"{shown(entry)} should be {{rgb: [r, g, b], class_index: i}}"]
    known = ("rgb", "class_index")
    faults = [f"unknown key {shown(key)}{did_you_mean(key, known)}" for key in entry if key not in known]
    faults += [f"lacks {key}" for key in known if key not in entry]
    rgb = entry.get("rgb", [0, 0, 0])
    if not (isinstance(rgb, list) and len(rgb) == 3 and all(type(part) is int and 0 <= part <= 255 for part in rgb)):
        faults.append(f"rgb {shown(rgb)} should be three whole numbers from 0 to 255")
    index = entry.get("class_index", 0)
    if not (type(index) is int and index >= 0):
        faults.append(f"class_index {shown(index)} should be a whole number from 0")
    return faults
