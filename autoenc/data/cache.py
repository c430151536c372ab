"""Decoded data sets on disk: one folder a content key, arrays as .npy files that every process maps.

A folder appears under its key only when it is complete, by a rename.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from autoenc.config import DataConfig
from autoenc.data.palette import IGNORED
from autoenc.errors import InputError

Decoded = tuple[np.ndarray, "np.ndarray | None", "int | None"]      # image, segmentation, label


@dataclass(frozen=True, eq=False)
class Arrays:
    """Decoded arrays, memory-mapped, and what was computed while they were written."""

    images: np.ndarray
    segmentation: np.ndarray | None
    labels: np.ndarray | None
    hashes: np.ndarray            # uint8 (N, 32), sha256 of each image's pixels
    digest: str                   # of all arrays
    ignored: float


def root(data: DataConfig) -> Path:
    """The folder of all cached data sets."""
    chosen = data.cache_dir or os.environ.get("AUTOENC_CACHE") or "~/.cache/autoenc"
    return Path(chosen).expanduser().absolute()


def load(folder: Path, count: int, size: int, segmented: bool, labelled: bool) -> Arrays | None:
    """The arrays in a cache folder; None when there are none, or damaged ones."""
    shapes = _shapes(count, size, segmented, labelled)
    try:
        meta = json.loads((folder / "meta.json").read_text())
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in shapes}
        if any(arrays[name].shape != shape or arrays[name].dtype != dtype for name, (shape, dtype) in shapes.items()):
            return None
        return Arrays(arrays["images"], arrays.get("segmentation"), arrays.get("labels"), arrays["hashes"],
                      str(meta["digest"]), float(meta["ignored"]))
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None


def build(folder: Path, count: int, size: int, segmented: bool, labelled: bool, items: Iterable[Decoded],
          accept: Callable[[Arrays], object]) -> Arrays:
    """Write ``items`` to a new cache folder and map it. When another process was faster, its folder is used.

    ``accept`` sees the arrays before they take their place; what it or ``items`` raise leaves nothing behind.
    Raises :class:`InputError` where the cache cannot be written.
    """
    shapes = _shapes(count, size, segmented, labelled)
    with _beside(folder) as beside:
        _write(beside, shapes, items)
        arrays = load(beside, count, size, segmented, labelled)
        if arrays is None:
            raise InputError(f"data.cache_dir: {folder.parent}: what was written cannot be read back")
        accept(arrays)
        with _writing(folder.parent):
            try:
                beside.rename(folder)
            except OSError:
                theirs = load(folder, count, size, segmented, labelled)
                if theirs is not None:
                    return theirs
                folder.rename(beside / "damaged")
                beside.rename(folder)
                shutil.rmtree(folder / "damaged", ignore_errors=True)
        # The maps made before the rename stay valid: they hold the files, not their names.
        return arrays


def _shapes(count: int, size: int, segmented: bool, labelled: bool) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    byte = np.dtype(np.uint8)
    shapes = {"images": ((count, size, size, 3), byte), "hashes": ((count, 32), byte)}
    if segmented:
        shapes["segmentation"] = (count, size, size), byte
    if labelled:
        shapes["labels"] = (count,), np.dtype("<i2")
    return shapes


def _write(folder: Path, shapes: dict[str, tuple[tuple[int, ...], np.dtype]], items: Iterable[Decoded]) -> None:
    """Stream the arrays to disk. Plain writes, since a full disk kills the process that writes through a map."""
    files: dict[str, BinaryIO] = {}
    digests = {name: hashlib.sha256() for name in shapes}
    ignored = 0

    def append(name: str, content: bytes) -> None:
        digests[name].update(content)
        with _writing(folder.parent):
            files[name].write(content)

    try:
        with _writing(folder.parent):
            for name, (shape, dtype) in shapes.items():
                files[name] = (folder / f"{name}.npy").open("wb")
                header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(files[name], header)
        for image, segmentation, label in items:
            pixels = image.tobytes()
            append("images", pixels)
            append("hashes", hashlib.sha256(pixels).digest())
            if "segmentation" in shapes:
                append("segmentation", segmentation.tobytes())
                ignored += int(np.count_nonzero(segmentation == IGNORED))
            if "labels" in shapes:
                append("labels", np.array(label, dtype="<i2").tobytes())
    finally:
        with _writing(folder.parent):
            for file in files.values():
                file.close()
    digest = hashlib.sha256()
    for name in sorted(shapes):
        digest.update(f"{name} {shapes[name]}".encode() + digests[name].digest())
    pixels = int(np.prod(shapes["segmentation"][0])) if "segmentation" in shapes else 1
    with _writing(folder.parent):
        (folder / "meta.json").write_text(json.dumps({"digest": digest.hexdigest(), "ignored": ignored / pixels}))
        for path in folder.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())


@contextmanager
def _beside(folder: Path) -> Iterator[Path]:
    """A temporary folder beside ``folder``, gone at the end unless renamed."""
    created = [parent for parent in (folder.parent, *folder.parent.parents) if not parent.exists()]
    with _writing(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{folder.name[:16]}.", dir=folder.parent))
    try:
        umask = os.umask(0)
        os.umask(umask)
        beside.chmod(0o777 & ~umask)      # mkdtemp makes it private; a cache may be shared
        yield beside
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        for parent in created:
            try:
                parent.rmdir()
            except OSError:      # not empty: another process works there
                break
        raise
    shutil.rmtree(beside, ignore_errors=True)


@contextmanager
def _writing(where: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"data.cache_dir: {where}: cannot be written: {error.strerror or error} "
                         f"(data.cache_dir or $AUTOENC_CACHE names another folder)") from None
