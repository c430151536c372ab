"""Latents of a data set on disk: shards that say in themselves what they hold, a manifest, statistics."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from autoenc.data import SPLITS, Dataset
from autoenc.errors import InputError, did_you_mean
from autoenc.files import LEFTOVER, canonical_json, write_atomic
from autoenc.model import Autoencoder, by_channel

FORMATS = ("safetensors", "npz")

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Settings:
    """What decides the content of the shards, beside the model and the data."""

    format: str = "safetensors"
    dtype: str = "float32"
    posterior: bool = False
    """a VAE's ``mu`` and ``logvar``, too"""
    precision: str = "fp32"
    """fp32, or bf16 to compute in; whatever is written"""
    shard_size: int = 2048
    """images"""


class BrokenShard(Exception):
    """What is no shard, or not a whole one."""


class Shards:
    """The shards of one data set in a folder. ``moments``: by shard that is done, each image's mean and variance per
    channel, both float64 (images, C), of the latents as they are written."""

    def __init__(self, folder: Path, dataset: Dataset, of: dict[str, Any], settings: Settings) -> None:
        self.folder, self.dataset, self.of, self.settings = folder, dataset, of, settings
        self.rows = [range(start, min(start + settings.shard_size, len(dataset.images)))
                     for start in range(0, len(dataset.images), settings.shard_size)]
        self.moments: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self.shape: tuple[int, ...] = ()

    def path(self, shard: int) -> Path:
        return self.folder / f"latents_{shard:05d}.{self.settings.format}"

    def missing(self) -> list[range]:
        return [rows for shard, rows in enumerate(self.rows) if shard not in self.moments]

    def find(self, say: Callable[[str], None]) -> None:
        """Take up what is there. Broken shards are renamed, once it is clear that the folder is this data set's."""
        present = sorted(path for path in self.folder.glob("latents_*") if path.suffix[1:] in FORMATS)
        self._check_files(bool(present))
        broken = []
        places = {self.path(shard): shard for shard in range(len(self.rows))}
        for path in present:
            try:
                about, tensors = read_shard(path)
                self._check(about["of"])
                rows = self.rows[places[path]] if path in places else range(0)
                if about["rows"] != [rows.start, rows.stop]:
                    raise BrokenShard("holds other rows than its name says")
            except BrokenShard as error:
                broken.append((path, error))
            else:
                self._take(places[path], tensors)
        for path in self.folder.glob(".*"):      # of a killed run; the folder may hold other hidden files
            if path.name.startswith((".latents_", ".manifest.csv.", ".statistics.json.")) \
                    and LEFTOVER.fullmatch(path.name):
                path.unlink()
        for path, error in broken:
            path.replace(path.with_name(path.name + ".broken"))
            say(f"{path}: {error}; set aside as {path.name}.broken, to be computed again")

    def _check_files(self, shards: bool) -> None:
        """Nothing of anybody else's is written over: a data set may well have a manifest.csv of its own."""
        path, manifest = self.folder / "statistics.json", self.folder / "manifest.csv"
        if path.exists():
            try:
                theirs = json.loads(path.read_bytes())["of"]
            except (ValueError, KeyError, TypeError):
                raise InputError(f"--output: {path} is there, and not of this program") from None
            self._check(theirs)
        elif manifest.exists() and not shards:
            raise InputError(f"--output: {manifest} is there, and not of this program")

    def _check(self, theirs: dict[str, Any]) -> None:
        if theirs == self.of:
            return
        differing = [key for key in self.of if theirs.get(key) != self.of[key]]
        if "checkpoint" in differing:
            other = "another model's latents"
        elif "data" in differing:
            other = "another data set's latents"
        else:
            settings = theirs.get("settings", {})
            other = "latents written with other settings: " + ", ".join(
                f"{key} {settings.get(key)!r}, not {value!r}" for key, value in self.of["settings"].items()
                if settings.get(key) != value)
        raise InputError(f"--output: {self.folder}: holds {other}; a new folder is needed")

    def write(self, shard: int, fetch: Callable[[], Tensors]) -> None:
        """Write a shard whole. Raises :class:`InputError` for latents that are not finite; OSError."""
        tensors, rows = fetch(), self.rows[shard]
        for name, tensor in tensors.items():
            bad = (~torch.isfinite(tensor.flatten(1)).all(1)).nonzero().flatten().tolist()
            if bad:
                hint = "; --dtype float16 ends at 65504" if self.settings.dtype == "float16" else ""
                raise InputError(f"{name} is not finite for {len(bad)} of {len(rows)} images, the first of them "
                                 f"{self.dataset.names[rows[bad[0]]]}{hint}")
        write_atomic(self.path(shard), lambda file: _write(file, self.settings.format, tensors,
                                                           {"of": self.of, "rows": [rows.start, rows.stop]}))
        self._take(shard, tensors)

    def _take(self, shard: int, tensors: Tensors) -> None:
        # numpy sums in one thread: the last digit is the same however many threads torch has.
        latent = by_channel(tensors["latent"]).double().numpy()
        self.moments[shard] = latent.mean(2), latent.var(2)
        self.shape = tuple(tensors["latent"].shape[1:])

    def finish(self, model: Autoencoder) -> dict[str, Any]:
        """Write manifest and statistics, and return these."""
        dataset = self.dataset
        write_atomic(self.folder / "manifest.csv", self._manifest().encode(errors="surrogateescape"))
        means, variances = (np.concatenate([self.moments[shard][k] for shard in range(len(self.rows))]) for k in (0, 1))
        config, train = model.config, dataset.splits["train"]
        statistics = {
            "images": {"all": len(means), **{name: len(dataset.splits[name]) for name in SPLITS}},
            "image_size": dataset.images.shape[1], "latent_shape": list(self.shape),
            "statistics_of": "train", **_over(means[train], variances[train]), "all": _over(means, variances),
            "latent": config.model.latent if config.model.variational else "deterministic",
            "normalized": config.model.normalize_latents, "shards": len(self.rows), "of": self.of}
        write_atomic(self.folder / "statistics.json", json.dumps(statistics, indent=1, allow_nan=False) + "\n")
        return statistics

    def _manifest(self) -> str:
        dataset, text = self.dataset, io.StringIO()
        split = {int(row): name for name in SPLITS for row in dataset.splits[name]}
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("name", "shard", "row", "split", "label"))
        for shard, rows in enumerate(self.rows):
            for row in rows:
                label = -1 if dataset.labels is None else int(dataset.labels[row])
                writer.writerow((dataset.names[row], self.path(shard).name, row - rows.start, split[row],
                                 dataset.label_names[label] if label >= 0 else ""))
        return text.getvalue()


def _over(means: np.ndarray, variances: np.ndarray) -> dict[str, list[float]]:
    """Population statistics per channel from those of images of equal size: the law of total variance."""
    return {"latents_mean": means.mean(0).tolist(),
            "latents_std": np.sqrt(variances.mean(0) + means.var(0)).tolist()}


def _digest(about: dict[str, Any], tensors: Tensors) -> str:
    digest = hashlib.sha256(canonical_json(about).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _write(file: BinaryIO, form: str, tensors: Tensors, about: dict[str, Any]) -> None:
    text = canonical_json({**about, "sha256": _digest(about, tensors)})
    if form == "safetensors":
        file.write(safetensors.torch.save(tensors, {"autoenc": text}))      # one key: their order is not kept
        return
    with zipfile.ZipFile(file, "w") as archive:          # an .npz, with a comment and no time of writing
        archive.comment = text.encode()
        for name, tensor in tensors.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, tensor.numpy(), allow_pickle=False)


def read_shard(path: Path) -> tuple[dict[str, Any], Tensors]:
    """What a shard says of itself, and its tensors. Raises :class:`BrokenShard`; OSError where it cannot be read."""
    content = path.read_bytes()
    try:
        if path.suffix == ".npz":
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                about = json.loads(archive.comment)
            with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
                tensors = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        else:
            header = json.loads(content[8:8 + int.from_bytes(content[:8], "little")])
            about, tensors = json.loads(header["__metadata__"]["autoenc"]), safetensors.torch.load(content)
        said = about.pop("sha256")
        whole = said == _digest(about, tensors)
    except Exception:        # what three parsers raise for damaged bytes is of a dozen kinds
        raise BrokenShard("no readable shard, or a broken one") from None
    if not whole:
        raise BrokenShard("its content does not match its checksum")
    return about, tensors


def load_latents(folder: str | Path, tensor: str = "latent") -> tuple[Tensor, list[dict[str, str]]]:
    """All latents that :func:`encode_dataset` wrote to a folder, (N, C, h, w) on the CPU, and the rows of its manifest
    in the same order. ``tensor``: or ``mu``, ``logvar``. Raises :class:`InputError`."""
    folder = Path(folder)
    try:
        json.loads((folder / "statistics.json").read_bytes())
        with (folder / "manifest.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            rows = list(csv.DictReader(file))
        parts = []
        for name in dict.fromkeys(row["shard"] for row in rows):
            _, tensors = read_shard(folder / name)
            if tensor not in tensors:
                raise InputError(f"{folder / name}: holds no {tensor!r}{did_you_mean(tensor, tensors)}")
            parts.append(tensors[tensor])
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder}: no finished latents there: {error}") from None
    except BrokenShard as error:
        raise InputError(f"{folder / name}: {error}; python -m autoenc.encode computes it again") from None
    return torch.cat(parts), rows
