"""Furniture of generated layouts: what stands where in a room of a given kind. Lengths in metres.

A group of pieces (a bed with its night tables, a table with its chairs) is described once, in the frame of
the wall it stands against: ``u`` along the wall, ``v`` away from it. A room tries it at random places until
it hits neither a door nor another piece.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

BED, CABINET, CHAIR, LIGHTING, OTHERS, STOOL, SOFA, TABLE, WALL, FLOOR, BACKGROUND = range(11)

Rect = tuple[float, float, float, float]     # x0, y0, x1, y1


class Random:
    """Draws from one uniform source, with arithmetic that is the same on every machine."""

    def __init__(self, uniform: Callable[[], float]) -> None:
        self.uniform = uniform

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * self.uniform()

    def chance(self, probability: float) -> bool:
        return self.uniform() < probability

    def pick(self, options: tuple | list):
        return options[int(self.uniform() * len(options))]

    def shuffled(self, items: list) -> list:
        return [item for _, item in sorted((self.uniform(), k, item)[::2] for k, item in enumerate(items))]


class Piece(NamedTuple):
    kind: int
    rect: Rect
    round: bool = False


class Group(NamedTuple):
    """Pieces in the frame of a wall; ``front`` metres before them must be free where it is placed."""

    width: float
    depth: float
    pieces: list[Piece]
    front: float = 0.0


class Room:
    """The interior of a room, the doors' clearances in it and what has been placed."""

    def __init__(self, rect: Rect, draw: Random) -> None:
        self.rect = rect
        self.draw = draw
        self.width, self.height = rect[2] - rect[0], rect[3] - rect[1]
        self.doors: list[Rect] = []
        self.pieces: list[Piece] = []

    def place(self, group: Group, side: int | None = None, corner: bool = False, free: bool = False,
              tries: int = 10) -> int | None:
        """Place a group against a wall (in a corner of it, or ``free`` in the room). The side, None if it fits
        nowhere. Sides: 0 top, 1 right, 2 bottom, 3 left."""
        draw = self.draw
        for _ in range(tries):
            at = int(draw.uniform() * 4) if side is None else side
            length, reach = (self.height, self.width) if at % 2 else (self.width, self.height)
            slack, room = length - group.width, reach - group.depth - group.front
            position, away = draw.uniform(), draw.uniform()
            if slack < 0 or room < 0:
                continue
            along = slack * (position >= 0.5 if corner else position)
            off = min(0.6, room / 2) + away * max(0.0, room - 1.2) if free else 0.0
            whole = self._turn(at, (along, off, along + group.width, off + group.depth + group.front))
            if any(_overlap(whole, other) for other in self.doors):
                continue
            if any(_overlap(whole, piece.rect) for piece in self.pieces):
                continue
            for kind, (u0, v0, u1, v1), is_round in group.pieces:
                rect = self._turn(at, (along + u0, off + v0, along + u1, off + v1))
                self.pieces.append(Piece(kind, rect, is_round))
            return at
        return None

    def _turn(self, side: int, local: Rect) -> Rect:
        u0, v0, u1, v1 = local
        x0, y0, x1, y1 = self.rect
        if side == 0:
            return x0 + u0, y0 + v0, x0 + u1, y0 + v1
        if side == 1:
            return x1 - v1, y0 + u0, x1 - v0, y0 + u1
        if side == 2:
            return x0 + u0, y1 - v1, x0 + u1, y1 - v0
        return x0 + v0, y0 + u0, x0 + v1, y0 + u1


def _overlap(a: Rect, b: Rect) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _single(kind: int, width: float, depth: float, front: float = 0.0, is_round: bool = False) -> Group:
    return Group(width, depth, [Piece(kind, (0.0, 0.0, width, depth), is_round)], front)


def bed(draw: Random, beside: bool = True, wide: bool = True) -> Group:
    width = draw.between(1.4, 1.9) if wide else draw.between(0.9, 1.1)
    length, table = draw.between(1.95, 2.15), draw.between(0.42, 0.52)
    left = table if beside and draw.chance(0.8) else 0.0
    right = table if beside and (left == 0.0 or wide) else 0.0
    pieces = [Piece(BED, (left, 0.0, left + width, length))]
    for u, there in ((0.0, left), (left + width, right)):
        if there:
            pieces.append(Piece(TABLE, (u, 0.0, u + table, 0.45)))
            if draw.chance(0.7):
                pieces.append(Piece(LIGHTING, (u + 0.08, 0.06, u + table - 0.08, 0.4), True))
    if wide and draw.chance(0.3):      # a bench at its foot
        pieces.append(Piece(STOOL, (left + 0.15, length + 0.05, left + width - 0.15, length + 0.45)))
        length += 0.45
    return Group(left + width + right, length, pieces, 0.3)


def sofa_corner(draw: Random) -> Group:
    width, table = draw.between(1.8, 2.5), draw.between(0.5, 0.7)
    arm = 0.85 if draw.chance(0.6) else 0.0      # an armchair, or the long end of an L-shaped sofa
    pieces = [Piece(SOFA, (0.0, 0.0, width, 0.9))]
    if arm and draw.chance(0.5):
        pieces.append(Piece(SOFA, (width, 0.0, width + arm, 1.8)))
    elif arm:
        pieces.append(Piece(SOFA, (width + 0.05, 0.95, width + arm, 1.75)))
        pieces.append(Piece(LIGHTING, (width + 0.2, 0.2, width + 0.65, 0.65), True))
    pieces.append(Piece(TABLE, (width * 0.2, 1.25, width * 0.8, 1.25 + table), draw.chance(0.25)))
    if draw.chance(0.3):
        pieces.append(Piece(STOOL, (0.0, 1.9, 0.5, 2.4), draw.chance(0.5)))
    return Group(width + arm, 2.4, pieces)


def dining(draw: Random, seats: int) -> Group:
    """A table with ``seats`` chairs along either side, and sometimes at its ends."""
    width, depth, chair = 0.62 * seats + 0.2, draw.between(0.8, 1.0), 0.45
    ends = chair if draw.chance(0.4) else 0.0
    pieces = [Piece(TABLE, (ends, chair, ends + width, chair + depth), seats == 1)]
    step = width / seats
    for k in range(seats):
        u = ends + step * (k + 0.5) - chair / 2
        pieces += [Piece(CHAIR, (u, 0.0, u + chair, chair)),
                   Piece(CHAIR, (u, chair + depth, u + chair, 2 * chair + depth))]
    if ends:
        v = chair + depth / 2 - chair / 2
        pieces += [Piece(CHAIR, (0.0, v, chair, v + chair)),
                   Piece(CHAIR, (ends + width, v, 2 * ends + width, v + chair))]
    return Group(width + 2 * ends, depth + 2 * chair, pieces)


def desk(draw: Random) -> Group:
    width, depth = draw.between(1.1, 1.7), draw.between(0.6, 0.75)
    u = width * draw.between(0.3, 0.6)
    pieces = [Piece(CABINET, (0.0, 0.0, width, depth)), Piece(CHAIR, (u, depth + 0.05, u + 0.5, depth + 0.55))]
    if draw.chance(0.6):
        pieces.append(Piece(LIGHTING, (0.05, 0.05, 0.4, 0.4), True))
    return Group(width, depth + 0.6, pieces, 0.2)


def cabinet(draw: Random, low: float = 0.9, high: float = 2.2) -> Group:
    return _single(CABINET, draw.between(low, high), draw.pick((0.35, 0.45, 0.6)), 0.5)


def counter(draw: Random, length: float) -> Group:
    """A kitchen counter with a stove let in and a refrigerator at its end; sometimes with bar stools."""
    stove = draw.between(0.3, max(0.4, length - 1.5))
    pieces = [Piece(CABINET, (0.0, 0.0, length - 0.7, 0.6)), Piece(OTHERS, (length - 0.7, 0.0, length, 0.7)),
              Piece(OTHERS, (stove, 0.1, stove + 0.5, 0.5))]
    if draw.chance(0.3):
        pieces += [Piece(STOOL, (u, 0.75, u + 0.4, 1.15), True) for u in (0.2, 0.8)]
        return Group(length, 1.15, pieces, 0.3)
    return Group(length, 0.7, pieces, 0.6)


def _extras(room: Room, lamp: float, plant: float, stool: float) -> None:
    draw = room.draw
    for _ in range(int(room.width * room.height / 9)):      # large rooms are not left bare
        if draw.chance(0.6):
            room.place(cabinet(draw) if draw.chance(0.6) else _single(SOFA, 0.85, 0.85, 0.3))
    if draw.chance(lamp):
        room.place(_single(LIGHTING, 0.42, 0.42, is_round=True), corner=True)
    if draw.chance(plant):
        size = draw.between(0.4, 0.6)
        room.place(_single(OTHERS, size, size, is_round=draw.chance(0.7)), corner=True)
    if draw.chance(stool):
        room.place(_single(STOOL, 0.45, 0.45, is_round=draw.chance(0.6)))


def bedroom(room: Room) -> None:
    draw = room.draw
    wide = draw.chance(0.75)
    if room.place(bed(draw, wide=wide), tries=14) is None and \
            room.place(bed(draw, beside=False, wide=False), corner=True, tries=14) is None:
        return study(room)
    if not wide and draw.chance(0.5):      # a children's room
        room.place(bed(draw, beside=False, wide=False), corner=True)
    room.place(cabinet(draw, 1.2, 2.4), corner=draw.chance(0.6))
    if draw.chance(0.45):
        room.place(desk(draw))
    _extras(room, 0.4, 0.3, 0.25)


def living(room: Room) -> None:
    draw = room.draw
    side = room.place(sofa_corner(draw), tries=14)
    if side is None:
        room.place(_single(SOFA, 1.6, 0.85, 0.4))
    else:
        room.place(cabinet(draw, 1.2, 2.0), side=(side + 2) % 4)
    if room.width * room.height > 13:
        room.place(dining(draw, draw.pick((1, 2, 2, 3))), free=True, tries=14)
    room.place(cabinet(draw, 0.8, 1.8))
    _extras(room, 0.7, 0.6, 0.3)


def dining_room(room: Room) -> None:
    draw = room.draw
    seats = 2 if room.width * room.height < 9 else draw.pick((2, 3, 3, 4))
    if room.place(dining(draw, seats), free=True, tries=14) is None:
        room.place(dining(draw, 1), free=True)
    room.place(cabinet(draw, 1.0, 2.0))
    _extras(room, 0.5, 0.5, 0.2)


def kitchen(room: Room) -> None:
    draw = room.draw
    longest = max(room.width, room.height)
    side = room.place(counter(draw, min(longest, draw.between(2.0, 3.4))), corner=True, tries=14)
    if side is None:
        room.place(_single(CABINET, 1.2, 0.6), tries=20)
    elif draw.chance(0.5):
        room.place(_single(CABINET, draw.between(0.8, 1.6), 0.6, 0.4), side=(side + 1) % 4)
    room.place(dining(draw, draw.pick((1, 1, 2))), free=True)
    _extras(room, 0.3, 0.3, 0.4)


def bath(room: Room) -> None:
    draw = room.draw
    room.place(_single(OTHERS, 1.6, 0.75) if draw.chance(0.7) else _single(OTHERS, 0.9, 0.9), corner=True,
               tries=20)
    room.place(_single(CABINET, draw.between(0.6, 1.2), 0.45, 0.3), tries=20)
    room.place(_single(OTHERS, 0.42, 0.65, 0.2, is_round=draw.chance(0.5)), tries=20)
    _extras(room, 0.3, 0.0, 0.35)


def study(room: Room) -> None:
    draw = room.draw
    room.place(desk(draw))
    room.place(cabinet(draw, 1.0, 2.4), corner=True)
    if draw.chance(0.6):
        room.place(cabinet(draw, 0.9, 1.8))
    if draw.chance(0.35):
        room.place(_single(SOFA, draw.between(1.4, 1.9), 0.85, 0.3))
    _extras(room, 0.5, 0.4, 0.2)


def hall(room: Room) -> None:
    draw = room.draw
    room.place(_single(CABINET, draw.between(0.8, 1.4), 0.35))
    _extras(room, 0.5, 0.25, 0.35)


FURNISH: dict[str, Callable[[Room], None]] = {
    "bedroom": bedroom, "living": living, "dining": dining_room, "kitchen": kitchen, "bath": bath,
    "study": study, "hall": hall,
}
