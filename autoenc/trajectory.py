"""One training on disk: a folder that can be read at any moment and continued after any kill.

    config.yaml     the configuration that was trained
    metrics.csv     a row an epoch, appended
    status.json     where it stands, on what it ran
    latest.pt       everything to go on from; written first, so that all else can be derived from it
    normalized_epoch_0007.pt   the same with the statistics of its latents set, where a sweep normalises them
    best_epoch_0007.pt   weights of the best epoch, and of the best within a budget that ended earlier
    best.pt         the same file as the best epoch's
    figures.json    figures computed once, on best weights
    samples/        epoch_*.png
    tensorboard/    events

Reading needs no torch; only training does.
"""

from __future__ import annotations

import io
import json
import os
import platform
import shutil
import socket
import traceback
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoenc import figures
from autoenc.config import Config, flatten, make_config
from autoenc.course import best_epoch, best_row, collapsed_at, failure, own_end
from autoenc.errors import InputError
from autoenc.files import content_hash, is_whole_zip, remove_leftovers, replacing, write_atomic
from autoenc.table import Row, append_row, csv_text, parse_rows, read_text
from autoenc.yamlfile import UNWRITABLE, dump_yaml

if TYPE_CHECKING:
    from autoenc.data import Dataset
    from autoenc.train import EpochResult

RESUME_KINDS = {"optimizer": dict, "scaler": dict, "rows": list, "best": int}      # of latest.pt, beside the model's
STATUS_KINDS = {"state": str, "failed": str, "device": str, "device_name": str, "threads": int, "versions": dict,
                "diverged": {"epoch": int, "step": int, "what": str}}              # of status.json: what others read
FINISHED = "test/mse"                # the figure that shows that a final model was evaluated
FORMAT = 1           # of trajectories; part of every key


def trajectory_key(config: Config, fingerprint: str, device_kind: str) -> str:
    """The identity of what training this configuration computes: 20 hexadecimal digits.

    ``fingerprint``: of the decoded data and its split; ``device_kind``: ``cpu`` or ``cuda``.
    """
    return content_hash({"format": FORMAT, "config": config.identity(), "data": fingerprint, "device": device_kind})


def _are_rows(rows: list[Any], epochs: int) -> bool:
    """Whether these are the rows of so many epochs."""
    plain = all(isinstance(row, dict) and all(isinstance(name, str) and type(value) in (int, float)
                                              for name, value in row.items()) for row in rows)
    return plain and len(parse_rows(csv_text(rows))) == len(rows) == epochs


def _is_of(kind: Any, value: Any) -> bool:
    """Whether a value out of a JSON file is of a kind: a type (dict: of texts), or a mapping of kinds."""
    if isinstance(kind, dict):
        return isinstance(value, dict) and all(_is_of(each, value.get(key)) for key, each in kind.items())
    if kind is dict:
        return isinstance(value, dict) and all(_is_of(str, text) for item in value.items() for text in item)
    if kind is str:
        return isinstance(value, str) and not UNWRITABLE.search(value)
    return type(value) is kind is float or (type(value) is int and 0 <= value < 2**63)


def _figures_name(epoch: int, normalized: bool) -> str:
    return f"{epoch} normalized" if normalized else str(epoch)


class Superseded(Exception):
    """Another one has taken this training over; raised by a ``guard``."""


class Trajectory:
    """A training's folder. Constructing it touches nothing."""

    def __init__(self, folder: Path, warn: Callable[[str], None] = lambda text: None,
                 guard: Callable[[], None] = lambda: None) -> None:
        """``warn`` is told of broken files that were set aside; ``guard`` is called before an epoch is written, and
        raises :class:`Superseded` where the right to write here was lost."""
        self.folder, self.warn, self.guard = folder, warn, guard

    def rows(self) -> list[Row]:
        """The figures of all epochs so far, in order; what follows a broken line is left out."""
        return parse_rows(read_text(self.folder / "metrics.csv"))

    def status(self) -> dict[str, Any]:
        """``state`` (training, completed, diverged, failed), epochs, best epoch, device, versions; {} where none is.
        What is not of its kind is left out."""
        return {key: value for key, value in self._read_json("status.json").items()
                if key not in STATUS_KINDS or _is_of(STATUS_KINDS[key], value)}

    def figures(self, epoch: int, normalized: bool = False) -> Row:
        """The figures computed on the weights of this epoch after training (``latent/smoothness``), where they have
        been; ``normalized``: with its latents normalised."""
        found = self._read_json("figures.json").get(_figures_name(epoch, normalized))
        row = {name: float(value) for name, value in (found.items() if isinstance(found, dict) else ())
               if _is_of(float, value) and (name in figures.AFTER_TRAINING or name.startswith("test/"))}
        if FINISHED in row and not self.evaluation(epoch, normalized):       # then they are to be had once more
            row = {name: value for name, value in row.items() if not name.startswith("test/")}
        return row

    def add_figures(self, epoch: int, found: Row, normalized: bool = False) -> None:
        """Keep figures computed on the weights of an epoch, beside those there are."""
        whole = {**self.figures(epoch, normalized), **found}
        write_atomic(self.folder / "figures.json",
                     json.dumps(self._read_json("figures.json") | {_figures_name(epoch, normalized): whole}))

    def weights(self, epoch: int, normalized: bool = False) -> Path | None:
        """The checkpoint with the weights of this epoch, where one is kept; ``normalized``: with the latents'
        statistics set."""
        path = self.weights_path(epoch, normalized)
        return path if path.is_file() else None

    def whole_weights(self, epoch: int, normalized: bool = False) -> Path | None:
        """The same, read to its end; a file that is broken is set aside."""
        path = self.weights(epoch, normalized)
        if path is None or is_whole_zip(path):
            return path
        self.warn(f"{path}: is broken; set aside, its weights are trained again")
        path.replace(path.with_name(f"{path.name}.broken"))
        return None

    def weights_path(self, epoch: int, normalized: bool = False) -> Path:
        """Named by its epoch: never mistaken for another."""
        return self.folder / f"{'normalized' if normalized else 'best'}_epoch_{epoch:04d}.pt"

    def evaluation(self, epoch: int, normalized: bool = False) -> dict[str, Any]:
        """The evaluation of the weights of an epoch; {} where it, or the safetensors file beside it, is lost or broken.
        """
        path = self.evaluation_path(epoch, normalized)
        found = self._read_json(path.name)
        parts = {"latents_mean": list, "latents_std": list, "model": dict, "val": dict, "cost": dict}
        whole = all(isinstance(found.get(name), kind) for name, kind in parts.items())
        return found if whole and self.weights_path(epoch, normalized).with_suffix(".safetensors").is_file() else {}

    def evaluation_path(self, epoch: int, normalized: bool = False) -> Path:
        """The evaluation of the weights of an epoch, a JSON file."""
        return self.weights_path(epoch, normalized).with_suffix(".evaluation.json")

    def train(self, config: Config, dataset: Dataset, device: str) -> Iterator[Row]:
        """Train from where the folder stands to the configuration's end; yields each new epoch's row, once on disk.

        Where the checkpoint to go on from is lost or was thinned out, the epochs in the table are trained once more to
        get there (their rows stay, and are yielded, too). A diverged training ends and says so in ``status``; so does
        one whose code raised (see traceback.txt). Raises OSError where the folder cannot be written.
        """
        from autoenc.events import Events
        from autoenc.train import Diverged, train

        self.folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.folder)
        write_atomic(self.folder / "config.yaml", dump_yaml({"config": config.nested()}))
        rows, resume = self._recover(config)
        seconds = sum(row["seconds"] for row in rows)
        about = _about(config, device, dataset)
        before = self.status().get("state")
        if own_end(rows, config) is not None:
            if before == "training":                             # killed after the last epoch was stored
                self._write_status(about, "completed", rows, config, seconds)
            return
        self._write_status(about, "training", rows, config, seconds)
        events = Events(self.folder / "tensorboard", config, first=len(rows) + 1)
        try:
            if (resume["epoch"] if resume else 0) < len(rows):
                for result in self._again(config, dataset, device, len(rows), resume):
                    yield rows[result.epoch - 1]
                resume = result.state() | {"rows": rows, "best": best_epoch(rows, config)}
                self._save_latest(resume)
            # The best within a budget that has ended stays: a decision may rest on it. So do those kept before.
            best = resume["best"] if resume else 0
            spare = {best} if before != "completed" else set()
            for result in train(config, dataset, device=device, resume=resume, history=rows):
                self.guard()
                events.epoch(result)     # before the checkpoint: an epoch that is not trained again has its events
                row = self._record(result, rows, best)
                if result.improved:
                    if best in spare:
                        self.weights_path(best).unlink(missing_ok=True)
                    best = result.epoch
                    spare.add(best)
                rows.append(row)
                seconds += row["seconds"]
                self._write_status(about, "training", rows, config, seconds)
                yield row
                if collapsed_at(rows, config) is not None:
                    break
            self._write_status(about, "completed", rows, config, seconds)
            events.end()
        except Diverged as error:
            self._write_status(about, "diverged", rows, config, seconds, diverged={
                "epoch": error.epoch, "step": error.step, "what": error.what})
        except (OSError, Superseded, GeneratorExit):
            raise                                # the folder is gone or full or another's, or the caller stopped here
        except Exception as error:
            write_atomic(self.folder / "traceback.txt", traceback.format_exc())
            self._write_status(about, "failed", rows, config, seconds, failed=failure(error, config))
        finally:
            events.close()

    def restore_weights(self, config: Config, dataset: Dataset, device: str, epoch: int) -> Iterator[Row]:
        """Train the first epochs once more for the weights of one of them; its rows stand already. Yields each row."""
        for result in self._again(config, dataset, device, epoch):
            if result.epoch == epoch:
                state = result.state(copy=False)
                self._save_best(state) if epoch == best_epoch(self.rows(), config) else self._save_weights(state)
            yield {"epoch": result.epoch, "seconds": result.seconds, **result.metrics}

    def _again(self, config: Config, dataset: Dataset, device: str, epochs: int,
               resume: Mapping[str, Any] | None = None) -> Iterator[EpochResult]:
        """Train epochs that were trained before, whatever patience may say of them today. The budget stays: schedules
        may depend on it."""
        from autoenc.train import train

        settings = config.train.model_copy(update={"epochs": max(epochs, config.train.epochs), "patience": None})
        for result in train(config.model_copy(update={"train": settings}), dataset, device=device, resume=resume,
                            history=resume["rows"] if resume else ()):
            yield result
            if result.epoch == epochs:
                return

    def _read_json(self, name: str) -> dict[str, Any]:
        """A JSON file's mapping; {} where it is broken, nested beyond reason, or not there."""
        try:
            content = json.loads(read_text(self.folder / name))
        except (ValueError, RecursionError):
            return {}
        return content if isinstance(content, dict) else {}

    def _recover(self, config: Config) -> tuple[list[Row], dict[str, Any] | None]:
        """The rows, and the checkpoint to go on from. latest.pt is written first and holds all rows up to its epoch, so
        whatever else lags or is broken is made from it; what it lacks itself is set aside."""
        rows, checkpoint = self.rows(), self._read_latest(config)
        stored = len(rows)
        if checkpoint is not None:
            rows = [*checkpoint["rows"], *rows[checkpoint["epoch"]:]]
        path = self.folder / "metrics.csv"
        there, whole = read_text(path), csv_text(rows)
        if there != whole:
            if len(rows) > stored + 1 or not whole.startswith(there):        # a kill leaves less than a row to do
                self.warn(f"{path}: broken after epoch {stored}; " + (
                    "written anew from latest.pt" if len(rows) > stored else "what follows is dropped"))
            write_atomic(path, whole)
        if checkpoint is not None and checkpoint["best"] == checkpoint["epoch"]:
            self._save_best(checkpoint)                      # it may have been killed before these followed
        return rows, checkpoint

    def _read_latest(self, config: Config) -> dict[str, Any] | None:
        from autoenc.checkpoint import read_checkpoint

        path = self.folder / "latest.pt"
        if not path.is_file():
            return None
        try:
            content = read_checkpoint(path)
            wrong = [key for key, kind in RESUME_KINDS.items() if not isinstance(content.get(key), kind)]
            if (wrong or content["best"] not in range(content["epoch"] + 1)
                    or not _are_rows(content["rows"], content["epoch"])):
                raise InputError(f"{path}: {', '.join(wrong) or 'rows'}: not what going on from it takes")
            if make_config(flatten(content["config"], str(path)), str(path)).identity() != config.identity():
                raise InputError(f"{path}: config: is another training's")
        except InputError as error:
            path.replace(self.folder / "latest.pt.broken")
            self.warn(f"{error}; set aside as latest.pt.broken, its epochs are trained again")
            return None
        return content

    def _record(self, result: EpochResult, before: list[Row], best: int) -> Row:
        """Put an epoch on disk: the checkpoint first, so that a kill at any point loses nothing of it."""
        row: Row = {"epoch": result.epoch, "seconds": round(result.seconds, 4), **result.metrics}
        state = result.state(copy=False) | {"rows": [*before, row], "best": result.epoch if result.improved else best}
        self._save_latest(state)
        self.guard()
        append_row(self.folder / "metrics.csv", row)
        if result.improved:
            self._save_best(state)
        if result.samples is not None:
            self._save_samples(result)
        return row

    def _save_latest(self, state: dict[str, Any]) -> None:
        from autoenc.checkpoint import save_checkpoint

        self.guard()
        save_checkpoint(self.folder / "latest.pt", state)

    def _save_weights(self, state: dict[str, Any]) -> Path:
        from autoenc.checkpoint import model_checkpoint, save_checkpoint

        path = self.weights_path(state["epoch"])
        save_checkpoint(path, model_checkpoint(state))
        return path

    def _save_best(self, state: dict[str, Any]) -> None:
        path = self._save_weights(state)
        with replacing(self.folder / "best.pt") as beside:
            beside.unlink()
            try:
                os.link(path, beside)
            except OSError:                                  # a file system without hard links
                shutil.copyfile(path, beside)

    def _save_samples(self, result: EpochResult) -> None:
        from PIL import Image

        (self.folder / "samples").mkdir(exist_ok=True)
        picture = io.BytesIO()
        Image.fromarray(result.samples).save(picture, format="png")
        write_atomic(self.folder / "samples" / f"epoch_{result.epoch:04d}.png", picture.getvalue())

    def _write_status(self, about: dict[str, Any], state: str, rows: list[Row], config: Config, seconds: float,
                      **more: Any) -> None:
        best = best_row(rows, config)
        write_atomic(self.folder / "status.json", json.dumps(
            {"state": state, "epochs": len(rows), "best_epoch": int(best["epoch"]) if best else 0,
             "seconds": round(seconds, 3), **more, **about}, indent=1))


def _about(config: Config, device: str, dataset: Dataset) -> dict[str, Any]:
    import torch

    kind = device.split(":")[0]
    name = torch.cuda.get_device_name() if kind == "cuda" else platform.processor() or platform.machine()
    return {"key": trajectory_key(config, dataset.fingerprint, kind), "device": kind, "device_name": name,
            "threads": torch.get_num_threads(), "host": socket.gethostname(), "data": dataset.fingerprint,
            "versions": {"autoenc": version("autoenc"), "torch": torch.__version__,
                         "python": platform.python_version()}}
