"""Generated top-down layouts of homes: whole flats ("scene") and single rooms ("room").

Item ``index`` depends on (seed, index, size) alone. Plans are made in metres and drawn as class indices in
whole pixels; rounding edges keeps their order, so what is disjoint in metres is disjoint in the image.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from autoenc.data.furniture import BACKGROUND, FLOOR, FURNISH, WALL, Piece, Random, Rect, Room

VERSION = 1      # raise it with every change of what is drawn: cached layouts and stored results hang on it

CLASSES = ("bed", "cabinet_shelf_desk", "chair", "lighting", "others", "pier_stool", "sofa", "table",
           "wall", "floor", "background")
PALETTE = np.array([(228, 26, 28), (55, 126, 184), (77, 175, 74), (152, 78, 163), (127, 127, 127),
                    (255, 127, 0), (255, 255, 51), (166, 86, 40), (200, 200, 200), (50, 50, 50),
                    (240, 240, 240)], dtype=np.uint8)
LABELS = ("room", "scene")

_DOOR = 0.9           # width of a door, and how deep the floor before it stays free, on both sides
_SMALLEST = 2.0       # side of a room
_LARGEST = 15.0       # what an image of a flat spans at most, margins included
_SINGLE = {"bedroom": (2.9, 4.8), "living": (3.5, 6.5), "dining": (3.0, 5.2), "kitchen": (2.5, 4.6),
           "study": (2.5, 4.4), "bath": (2.1, 3.4)}      # sides of a room shown alone


def generate(seed: int, index: int, size: int) -> tuple[np.ndarray, int]:
    """The layout ``index`` of ``seed``: classes, uint8 (size, size), and its label, an index into LABELS."""
    draw = Random(np.random.Generator(np.random.PCG64([seed, index])).random)
    label = int(draw.chance(0.55))
    if label:
        cells, corridor = _flat(draw, size)
        kinds = _kinds(cells, corridor, draw)
        margin = draw.between(0.03, 0.07)
    else:
        kinds, corridor = [draw.pick(tuple(_SINGLE))], None
        least, most = _SINGLE[kinds[0]]
        cells = [(0.0, 0.0, draw.between(least + 0.3, most), draw.between(least, 0.8 * most))]
        margin = draw.between(0.03, 0.1)
    width, height = max(cell[2] for cell in cells), max(cell[3] for cell in cells)
    # Pixels a metre. At least a pixel of wall stands inside the image, however small it is.
    frame = max(margin * size, 0.5)
    scale = (size - 2 * frame) / (max(width, height) + 0.2)
    thickness = max(draw.between(0.16, 0.24), 1.0 / scale)
    left = frame + thickness / 2 * scale + draw.uniform() * max(0.0, size - 2 * frame - (width + thickness) * scale)
    top = frame + thickness / 2 * scale + draw.uniform() * max(0.0, size - 2 * frame - (height + thickness) * scale)

    rooms = [Room((x0 + thickness / 2, y0 + thickness / 2, x1 - thickness / 2, y1 - thickness / 2), draw)
             for x0, y0, x1, y1 in cells]
    openings = _open_doors(cells, rooms, corridor, thickness, max(_DOOR, 1.01 / scale), draw)
    for room, kind in zip(rooms, kinds, strict=True):
        FURNISH[kind](room)

    canvas = np.full((size, size), BACKGROUND, dtype=np.uint8)

    def fill(piece: Piece) -> None:
        x0, y0, x1, y1 = piece.rect
        x0, x1 = max(int(x0 * scale + left + 0.5), 0), int(x1 * scale + left + 0.5)
        y0, y1 = max(int(y0 * scale + top + 0.5), 0), int(y1 * scale + top + 0.5)
        if piece.round and min(x1 - x0, y1 - y0) > 2:
            canvas[y0:y1, x0:x1][_disc(y1 - y0, x1 - x0)] = piece.kind
        else:
            canvas[y0:y1, x0:x1] = piece.kind

    half = thickness / 2
    for x0, y0, x1, y1 in cells:
        fill(Piece(WALL, (x0 - half, y0 - half, x1 + half, y1 + half)))
    for rect in [room.rect for room in rooms] + openings:
        fill(Piece(FLOOR, rect))
    for room in rooms:
        for piece in room.pieces:
            fill(piece)

    canvas = canvas.T if draw.chance(0.5) else canvas
    canvas = canvas[::-1] if draw.chance(0.5) else canvas
    canvas = canvas[:, ::-1] if draw.chance(0.5) else canvas
    return np.ascontiguousarray(canvas), label


@lru_cache(maxsize=4096)
def _disc(height: int, width: int) -> np.ndarray:
    """The ellipse in a rectangle, in whole numbers only."""
    y = (2 * np.arange(height)[:, None] + 1 - height) * width
    x = (2 * np.arange(width)[None] + 1 - width) * height
    return x * x + y * y <= (width * height) ** 2


def _flat(draw: Random, size: int) -> tuple[list[Rect], int | None]:
    """The rooms of a flat as rectangles between the middles of walls, and which of them is a corridor."""
    pixel = _LARGEST / size      # in small images rooms are fewer: each keeps a few pixels of floor
    smallest = max(_SMALLEST, 3.1 * pixel)
    shape = draw.uniform()
    if shape < 0.4:
        width, height = draw.between(8.0, 12.5), draw.between(7.0, 9.5)
        low = height * draw.between(0.36, 0.48)
        high = low + max(draw.between(1.3, 1.6), 2.1 * pixel)
        corridor = (0.0, low, width, high)
        height = max(height, high + smallest)
        return [corridor, *_row(0.0, low, width, smallest, draw), *_row(high, height, width, smallest, draw)], 0
    width, height = draw.between(7.0, 12.0), draw.between(6.0, 10.0)
    if shape < 0.7:
        return _split((0.0, 0.0, width, height), smallest, draw), None
    across, down = width * draw.between(0.45, 0.65), height * draw.between(0.45, 0.6)
    return [*_split((0.0, 0.0, width, down), smallest, draw),
            *_split((0.0, down, across, height), smallest, draw)], None


def _row(y0: float, y1: float, width: float, smallest: float, draw: Random) -> list[Rect]:
    """Rooms side by side."""
    count = max(2, int(width / max(draw.between(2.8, 4.2), 1.3 * smallest)))
    shares = [draw.between(0.75, 1.25) for _ in range(count)]
    edges = [0.0]
    for share in shares[:-1]:
        edges.append(edges[-1] + share / sum(shares) * width)
    return [(x0, y0, x1, y1) for x0, x1 in zip(edges, [*edges[1:], width], strict=True)]


def _split(rect: Rect, smallest: float, draw: Random) -> list[Rect]:
    x0, y0, x1, y1 = rect
    width, height = x1 - x0, y1 - y0
    longer = max(width, height)
    if longer < 2 * smallest + 0.4 or (width * height < draw.between(9.0, 22.0) and longer < 5.5):
        return [rect]
    cut = min(max(longer * draw.between(0.33, 0.67), smallest), longer - smallest)
    if width >= height:
        return [*_split((x0, y0, x0 + cut, y1), smallest, draw), *_split((x0 + cut, y0, x1, y1), smallest, draw)]
    return [*_split((x0, y0, x1, y0 + cut), smallest, draw), *_split((x0, y0 + cut, x1, y1), smallest, draw)]


def _kinds(cells: list[Rect], corridor: int | None, draw: Random) -> list[str]:
    """What each room is for: the largest to live in, the smallest is the bath."""
    areas = [(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in cells]
    order = sorted((k for k in range(len(cells)) if k != corridor), key=lambda k: -areas[k])
    extra = draw.shuffled(["bedroom", "study", "dining", "bedroom"] * (1 + len(order) // 4))
    kinds = ["living", "bedroom", *extra[:max(0, len(order) - 4)], "kitchen"][:len(order) - 1]
    named = dict(zip(order, [*kinds, "bath"], strict=True))
    return [named.get(k, "hall") for k in range(len(cells))]


def _open_doors(cells: list[Rect], rooms: list[Room], corridor: int | None, thickness: float, door: float,
                draw: Random) -> list[Rect]:
    """Openings in the walls, so that every room is reached from outside; the floor before them is kept free.

    Neighbours are joined along a random spanning tree, through the corridor where there is one.
    """
    half = thickness / 2
    walls = []      # (one room, other room or none, boundary is vertical, where, from, to)
    for i, a in enumerate(cells):
        for j, b in enumerate(cells):
            for axis in (0, 1):      # 0: a is left of b, 1: a is above b
                low = max(a[1 - axis], b[1 - axis]) + half
                high = min(a[3 - axis], b[3 - axis]) - half
                if i != j and a[2 + axis] == b[axis] and high - low >= door:
                    walls.append((i, j, axis == 0, b[axis], low, high))
    walls = draw.shuffled(walls)
    walls.sort(key=lambda wall: corridor not in wall[:2])

    chosen, part = [], list(range(len(cells)))
    for wall in walls:
        i, j = wall[:2]
        if part[i] != part[j]:
            part = [part[i] if one == part[j] else one for one in part]
            chosen.append(wall)
        elif draw.chance(0.12):
            chosen.append(wall)

    # The entrance. Walls at 0 always face outside.
    outer = [(k, None, axis == 0, 0.0, cell[1 - axis] + half, cell[3 - axis] - half)
             for k, cell in enumerate(cells) for axis in (0, 1) if cell[axis] == 0.0]
    outer = [wall for wall in draw.shuffled(outer) if wall[5] - wall[4] >= door]
    outer.sort(key=lambda wall: corridor is not None and wall[0] != corridor)
    chosen += outer[:2 if len(cells) == 1 and draw.chance(0.4) else 1]

    openings = []
    for i, j, vertical, where, low, high in chosen:
        width = door
        if j is not None and draw.chance(0.2):
            width = max(door, min(draw.between(1.4, 2.2), high - low))
        start = low + draw.uniform() * (high - low - width)
        for reach, target in ((half, openings), (half + _DOOR, rooms[i].doors)):
            target.append((where - reach, start, where + reach, start + width) if vertical
                          else (start, where - reach, start + width, where + reach))
        if j is not None:
            rooms[j].doors.append(rooms[i].doors[-1])
    return openings
