"""Generated abstract compositions: a background and a few shapes, filled with colours, gradients and stripes.

Item ``index`` depends on (seed, index) alone; it is made in the coordinates of the square [-1, 1]² (x to the right, y
down), so that every size shows the same composition.
"""

from __future__ import annotations

import math

import numpy as np

from autoenc.data.furniture import Random

VERSION = 1      # raise it with every change of what is drawn: cached data and stored results hang on it

_SUPERSAMPLED = 3      # sub-pixels along each axis: fine stripes and edges are averaged over a pixel's area

Plane = np.ndarray     # float64 (side, side)


def generate(seed: int, index: int, size: int) -> np.ndarray:
    """The composition ``index`` of ``seed``: uint8 (size, size, 3)."""
    draw = Random(np.random.Generator(np.random.PCG64([seed, index])).random)
    side = size * _SUPERSAMPLED
    axis = (2 * np.arange(side) + 1) / side - 1
    x, y = axis[None, :], axis[:, None]
    ground, *colours = draw.shuffled(_colours(draw))      # no shape has the background's own colour
    image = _fill(draw, x, y, ground, draw.pick(colours), ("plain", "gradient", "gradient", "glow", "stripes"),
                  draw.between(1.2, 2.4))
    for _ in range(2 + int(draw.uniform() * 5)):
        inside = _shape(draw, x, y)
        fill = _fill(draw, x, y, draw.pick(colours), draw.pick(colours),
                     ("plain", "plain", "gradient", "glow", "stripes"), draw.between(0.4, 1.2))
        cover = np.where(inside, 1.0 if draw.chance(0.75) else draw.between(0.45, 0.8), 0.0)[..., None]
        image = image + cover * (fill - image)
    image = image.reshape(size, _SUPERSAMPLED, size, _SUPERSAMPLED, 3).mean((1, 3))
    return np.rint(image * 255).astype(np.uint8)


def _colours(draw: Random) -> list[np.ndarray]:
    """Four to six colours (3,) in [0, 1]: hues around one or two, from dark to light, some of them nearly grey."""
    hue, spread = draw.uniform(), draw.pick((0.05, 0.12, 0.25))
    opposite = draw.chance(0.6)
    colours, count = [], 4 + int(draw.uniform() * 3)
    for k in range(count):
        turn = 0.5 if opposite and k % 2 else 0.0
        strong = draw.between(0.45, 1.0) if draw.chance(0.8) else draw.between(0.0, 0.2)
        value = 0.15 + 0.85 * (k + draw.uniform()) / count
        colours.append(_rgb(hue + turn + spread * (2 * draw.uniform() - 1), strong, value))
    return colours


def _rgb(hue: float, saturation: float, value: float) -> np.ndarray:
    """HSV, each in [0, 1] and the hue modulo 1, to RGB in [0, 1]."""
    return np.array([value * (1 - saturation * min(1.0, max(0.0, 2 - abs((6 * hue + turn) % 6 - 3))))
                     for turn in (3.0, 1.0, 5.0)])


def _fill(draw: Random, x: Plane, y: Plane, first: np.ndarray, second: np.ndarray, kinds: tuple[str, ...],
          length: float) -> np.ndarray:
    """One of the kinds of fill from one colour to the other, a gradient within a length: colours in [0, 1] that
    broadcast to (side, side, 3)."""
    kind = draw.pick(kinds)
    if kind == "plain":
        return first
    along = _turned(draw, x, y)[0]
    if kind == "gradient":
        share = np.clip(along / length + 0.5 - draw.between(-0.3, 0.3), 0.0, 1.0)
    elif kind == "glow":
        centre = draw.between(-0.8, 0.8), draw.between(-0.8, 0.8)
        share = np.clip(np.hypot(x - centre[0], y - centre[1]) / draw.between(0.8, 2.0), 0.0, 1.0)
    else:
        period, edge = draw.between(0.18, 0.7), draw.between(0.3, 0.7)
        wave = (along / period + draw.uniform()) % 1.0
        share = np.where(wave < edge, 0.0, 1.0) if draw.chance(0.6) else 0.5 - 0.5 * np.cos(2 * math.pi * wave)
    return first + share[..., None] * (second - first)


def _turned(draw: Random, x: Plane, y: Plane) -> tuple[Plane, Plane]:
    """Coordinates along and across a random direction."""
    angle = 2 * math.pi * draw.uniform()
    return x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)


def _shape(draw: Random, x: Plane, y: Plane) -> np.ndarray:
    """The inside of a random shape, bool (side, side)."""
    along, across = _turned(draw, x - draw.between(-0.85, 0.85), y - draw.between(-0.85, 0.85))
    radius = 0.15 + 0.55 * draw.uniform() ** 1.5
    kind = draw.pick(("ellipse", "ellipse", "box", "polygon", "blob", "ring", "band", "crescent"))
    if kind == "ellipse":
        return np.hypot(along, across / draw.between(0.4, 1.0)) < radius
    if kind == "box":
        return (np.abs(along) < radius) & (np.abs(across) < radius * draw.between(0.25, 0.9))
    if kind == "polygon":      # the meet of half planes at equal angles: a triangle to a hexagon, stretched
        across = across / draw.between(0.6, 1.0)
        corners = 3 + int(draw.uniform() * 4)
        turns = [2 * math.pi * k / corners for k in range(corners)]
        return np.logical_and.reduce([along * math.cos(turn) + across * math.sin(turn) < 0.75 * radius
                                      for turn in turns])
    if kind == "band":         # a curved stroke across the image
        return np.abs(across - draw.between(-0.35, 0.35) * np.sin(along * draw.between(1.5, 4.0))) < 0.25 * radius
    distance = np.hypot(along, across)
    if kind == "ring":
        return (distance < radius) & (distance > radius * draw.between(0.45, 0.8))
    if kind == "crescent":
        return (distance < radius) & (np.hypot(along - radius * draw.between(0.3, 0.7), across) > 0.85 * radius)
    angle, edge = np.arctan2(across, along), radius
    for waves in (2, 3, 4, 5):
        edge = edge + radius * draw.between(0.0, 0.5 / waves) * np.cos(waves * angle + 2 * math.pi * draw.uniform())
    return distance < edge
