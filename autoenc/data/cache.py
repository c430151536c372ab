"""Decoded data sets on disk: one folder a content key, arrays as .npy files that every process maps.

A folder appears under its key only when it is complete, by a rename.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from autoenc.data.palette import IGNORED
from autoenc.data.splats import COLUMNS
from autoenc.errors import InputError
from autoenc.settings import DataConfig

Decoded = Mapping[str, Any]      # the arrays of one item, and its label, by the names of Form.shapes


@dataclass(frozen=True)
class Form:
    """Which arrays a cache folder holds, and how large they are."""

    count: int
    """items"""
    size: int
    """side of the images, pixels"""
    labelled: bool
    segmented: bool = False
    splats: int = 0
    """of an item; 0: images are data, not renderings of it"""

    @property
    def hashed(self) -> str:
        """The array that tells items apart."""
        return "splats" if self.splats else "images"

    @property
    def shapes(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        byte = np.dtype(np.uint8)
        shapes = {"images": ((self.count, self.size, self.size, 3), byte), "hashes": ((self.count, 32), byte)}
        if self.segmented:
            shapes["segmentation"] = (self.count, self.size, self.size), byte
        if self.labelled:
            shapes["labels"] = (self.count,), np.dtype("<i2")
        if self.splats:
            shapes["splats"] = (self.count, self.splats, COLUMNS), np.dtype("<f4")
        return shapes


@dataclass(frozen=True, eq=False)
class Arrays:
    """Decoded arrays, memory-mapped, and what was computed while they were written."""

    by_name: dict[str, np.ndarray]
    """those of Form.shapes; ``hashes`` is uint8 (N, 32): sha256 of each item's pixels, or of its splats"""
    digest: str
    """of all arrays, save of images that are renderings: their last digits depend on the processor"""
    ignored: float


def root(data: DataConfig) -> Path:
    """The folder of all cached data sets."""
    chosen = data.cache_dir or os.environ.get("AUTOENC_CACHE") or "~/.cache/autoenc"
    return Path(chosen).expanduser().absolute()


def load(folder: Path, form: Form) -> Arrays | None:
    """The arrays in a cache folder; None when there are none, or damaged ones."""
    shapes = form.shapes
    try:
        meta = json.loads((folder / "meta.json").read_text())
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in shapes}
        if any(arrays[name].shape != shape or arrays[name].dtype != dtype for name, (shape, dtype) in shapes.items()):
            return None
        return Arrays(arrays, str(meta["digest"]), float(meta["ignored"]))
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None


def build(folder: Path, form: Form, items: Iterable[Decoded], accept: Callable[[Arrays], object]) -> Arrays:
    """Write ``items`` to a new cache folder and map it. When another process was faster, its folder is used.

    ``accept`` sees the arrays before they take their place; what it or ``items`` raise leaves nothing behind.
    Raises :class:`InputError` where the cache cannot be written.
    """
    with _beside(folder) as beside:
        _write(beside, form, items)
        arrays = load(beside, form)
        if arrays is None:
            raise InputError(f"data.cache_dir: {folder.parent}: what was written cannot be read back")
        accept(arrays)
        with _writing(folder.parent):
            try:
                beside.rename(folder)
            except OSError:
                theirs = load(folder, form)
                if theirs is not None:
                    return theirs
                folder.rename(beside / "damaged")
                beside.rename(folder)
                shutil.rmtree(folder / "damaged", ignore_errors=True)
        # The maps made before the rename stay valid: they hold the files, not their names.
        return arrays


def _write(folder: Path, form: Form, items: Iterable[Decoded]) -> None:
    """Stream the arrays to disk. Plain writes, since a full disk kills the process that writes through a map."""
    shapes = form.shapes
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
        for item in items:
            content = {name: np.asarray(item[name], shapes[name][1]).tobytes() for name in shapes if name != "hashes"}
            content["hashes"] = hashlib.sha256(content[form.hashed]).digest()
            for name in shapes:
                append(name, content[name])
            if form.segmented:
                ignored += int(np.count_nonzero(item["segmentation"] == IGNORED))
    finally:
        with _writing(folder.parent):
            for file in files.values():
                file.close()
    digest = hashlib.sha256()
    for name in sorted(shapes):
        rendered = form.splats and name == "images"
        digest.update(f"{name} {shapes[name]}".encode() + (b"" if rendered else digests[name].digest()))
    pixels = int(np.prod(shapes["segmentation"][0])) if form.segmented else 1
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
