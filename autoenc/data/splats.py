"""Images as N anisotropic 2D Gaussians ("splats"): the array form, reading it from .npz files, its order.

One row of 8 numbers a splat, float32: the centre x and y, two standard deviations, a rotation, red, green and blue.
The image is the square [-1, 1]², x to the right and y down, so that a pixel of an image of side S is 2 / S wide and
pixel (row, column) has its centre at ((2 column + 1) / S - 1, (2 row + 1) / S - 1). Standard deviations are in the
same units. The rotation, in radians, is that of the first axis, from x towards y: the covariance is
R(θ) diag(s1², s2²) R(θ)ᵀ with R(θ) = [[cos θ, -sin θ], [sin θ, cos θ]]. It is kept in [0, π), since θ and θ + π are the
same splat; so are (s1, s2, θ) and (s2, s1, θ + π/2). Colours are in [-1, 1].
"""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import BinaryIO

import numpy as np

from autoenc.data.images import BrokenImage
from autoenc.errors import InputError, did_you_mean

# Versions of autoenc.data.splat_fit and autoenc.render, here, where no torch is. Raise them with every change of what
# those fit or render: cached splats and stored results hang on it.
FITTING, RENDERING = 1, 1
COUNT = 512                      # splats an image, where nothing else is said
PARTS = {"xy": slice(0, 2), "scale": slice(2, 4), "rot": slice(4, 5), "feat": slice(5, 8)}
COLUMNS = 8
SMALLEST, LARGEST = 1e-6, 8.0    # standard deviations; 2 is the width of the image
FARTHEST = 2.0                   # |x| and |y| of a centre; splats may lie a little outside the image
BRIGHTEST = 10.0                 # |colour|: fitted colours overshoot [-1, 1], but 0 to 255 is another scale
CURVES = ("hilbert", "morton")

_BITS = 16                       # a curve through 65,536² cells
_WIDTHS = {name: part.stop - part.start for name, part in PARTS.items()}


class BrokenSplats(BrokenImage):
    """A file that holds no usable splats; says why in a few words."""


def read_splats(path: str | os.PathLike[str], count: int = COUNT) -> np.ndarray:
    """The splats of a file, float32 (count, 8), as :func:`decode` gives them. Raises :class:`InputError`."""
    try:
        return decode(os.fspath(path), count)
    except BrokenSplats as error:
        raise InputError(f"{path}: {error}") from None


def decode(path: str, count: int = COUNT) -> np.ndarray:
    """The splats of an .npz file, float32 (count, 8), in the file's order and with rotations in [0, π).

    The file holds ``xy`` (N, 2), ``scale`` (N, 2), ``rot`` (N,) or (N, 1) and ``feat`` (N, 3), floating point, in the
    units of this module; N is ``count``. Nothing in it is executed. Raises :class:`BrokenSplats`, naming each array
    that is wrong and what to do.
    """
    return _opened(path, count, values=True)


def probe(path: str, count: int = COUNT) -> None:
    """Read a file's headers only: presence, dtype and shape of its arrays. Raises :class:`BrokenSplats`."""
    _opened(path, count, values=False)


def _opened(path: str, count: int, values: bool) -> np.ndarray | None:
    try:
        with Path(path).open("rb") as file:
            if not zipfile.is_zipfile(file):
                raise BrokenSplats("no .npz file (numpy.savez writes one)")
            with zipfile.ZipFile(file) as archive:
                return _read(archive, count, values)
    except BrokenSplats:
        raise
    except OSError as error:
        raise BrokenSplats(error.strerror or str(error)) from None
    except Exception as error:      # a damaged archive raises nearly anything: BadZipFile, zlib.error, ValueError, …
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BrokenSplats(f"broken .npz file: {said}") from None


def _read(archive: zipfile.ZipFile, count: int, values: bool) -> np.ndarray | None:
    there = [name.removesuffix(".npy") for name in archive.namelist()]
    missing = [name for name in PARTS if name not in there]
    if missing:
        raise BrokenSplats("; ".join(f"there is no array {name}{did_you_mean(name, there)}" for name in missing))
    faults: list[str] = []
    for name in PARTS:
        with archive.open(f"{name}.npy") as member:
            faults += _header_faults(name, member, count)
    said = {fault.partition(" ")[2] for fault in faults}
    if len(faults) == len(PARTS) and len(said) == 1:         # one thing is wrong, and every array says it
        faults = [f"the file {said.pop()}"]
    if faults:
        raise BrokenSplats("; ".join(faults))
    if not values:
        return None
    splats = np.empty((count, COLUMNS), dtype=np.float32)
    for name, part in PARTS.items():
        with archive.open(f"{name}.npy") as member:
            array = np.lib.format.read_array(member, allow_pickle=False).reshape(count, -1)
        if fault := _value_fault(name, array):
            faults.append(fault)
        else:
            splats[:, part] = np.mod(array, np.pi) if name == "rot" else array
    if faults:
        raise BrokenSplats("; ".join(faults))
    splats[splats[:, 4] >= np.float32(np.pi), 4] = 0.0      # of a tiny negative angle, rounding gives π itself
    return splats


def _header_faults(name: str, member: BinaryIO, count: int) -> list[str]:
    """What is wrong with an array as far as its header tells. Its size is not believed: nothing is allocated yet."""
    version = np.lib.format.read_magic(member)
    if version not in ((1, 0), (2, 0)):      # 3.0 is for field names, which these arrays do not have
        return [f"{name} has the .npy version {version[0]}.{version[1]}; it should be a plain array"]
    reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = reader(member)
    if dtype.kind != "f":
        return [f"{name} is of {'pickled objects' if dtype.hasobject else dtype}; it should be floating point"]
    width = _WIDTHS[name]
    wanted = f"({count}, {width})" if width > 1 else f"({count},) or ({count}, 1)"
    if shape[1:] != (width,) and not (name == "rot" and len(shape) == 1):
        return [f"{name} has the shape {shape}; it should be {wanted}"]
    if shape[0] != count:
        return [f"{name} holds {shape[0]} splats, {count} are expected (data.splats says how many; where files differ, "
                f"drop the faintest or fit them anew)"]
    return []


def _value_fault(name: str, array: np.ndarray) -> str | None:
    bad = ~np.isfinite(array).all(axis=1)
    if bad.any():
        return f"{name} holds NaN or infinity (splat {int(bad.argmax())}, {int(bad.sum())} in all)"
    if name == "rot":
        return None
    if name == "scale":
        wrong, hint = (array < SMALLEST) | (array > LARGEST), (
            f"standard deviations are {SMALLEST:g} to {LARGEST:g}, in units in which the image is 2 wide (pixels times "
            "2 / width; of logarithms, the exponential)")
    elif name == "xy":
        wrong, hint = np.abs(array) > FARTHEST, "the image is [-1, 1] in x and y; pixels are (2 column + 1) / width - 1"
    else:
        wrong, hint = np.abs(array) > BRIGHTEST, "colours are in [-1, 1]: 0 to 255 divided by 127.5, less 1"
    if not wrong.any():
        return None
    value = array[wrong][0]
    return f"{name} holds {value:g} (splat {int(wrong.any(axis=1).argmax())}): {hint}"


def write_splats(path: str | os.PathLike[str], splats: np.ndarray) -> None:
    """Write splats (N, 8) as the .npz file that :func:`read_splats` reads."""
    np.savez(path, **{name: splats[:, part].astype(np.float32) for name, part in PARTS.items()})


def in_order(splats: np.ndarray, curve: str = "hilbert") -> np.ndarray:
    """Splats (…, N, 8), each set sorted along a space-filling curve through their centres.

    Hilbert's visits cells that share a side one after another; Morton's (Z order) interleaves the bits of x and y and
    jumps. Splats of one cell are sorted by their remaining parameters, column by column: sets that hold the same splats
    come out the same, however they were ordered.
    """
    place = curve_index(splats[..., :2], curve)
    keys = [splats[..., column] for column in reversed(range(splats.shape[-1]))]
    order = np.lexsort([*keys, place], axis=-1)      # its last key is the first to sort by
    return np.take_along_axis(splats, order[..., None], axis=-2)


def curve_index(xy: np.ndarray, curve: str = "hilbert") -> np.ndarray:
    """Position along a curve through 65,536² cells of [-1, 1]², int64 (…), of points (…, 2); what lies outside counts
    as at the border.

    Hilbert: the iteration from the highest bit to the lowest in Warren's Hacker's Delight (2012), chapter 16.
    Raises ValueError for an unknown curve.
    """
    if curve not in CURVES:
        raise ValueError(f"{curve!r} is none of {CURVES}")
    cells = np.clip((np.asarray(xy, dtype=np.float64) + 1) * 2.0 ** (_BITS - 1), 0, 2**_BITS - 1).astype(np.int64)
    x, y = cells[..., 0], cells[..., 1]
    place = np.zeros_like(x)
    for bit in reversed(range(_BITS)):
        right, low = x >> bit & 1, y >> bit & 1
        if curve == "morton":
            place = place << 2 | low << 1 | right
            continue
        place = place << 2 | (3 * right ^ low)
        # Into the frame of the quadrant: those at the top (low == 0) are reflected, the right one of them turned over.
        flip = right & (1 - low)
        mask = (1 << bit) - 1
        x, y = np.where(flip, mask - (x & mask), x & mask), np.where(flip, mask - (y & mask), y & mask)
        x, y = np.where(low == 0, y, x), np.where(low == 0, x, y)
    return place
