"""One training on disk: a folder that can be read at any moment and continued after any kill.

    config.yaml     the configuration that was trained
    metrics.csv     a row an epoch, appended
    status.json     where it stands, on what it ran
    latest.pt       everything to go on from; written first, so that all else can be derived from it
    best_epoch_0007.pt   weights of the best epoch, and of the best within a budget that ended earlier
    best.pt         the same file as the best epoch's
    figures.json    figures computed once, on best weights
    samples/        epoch_*.png
    tensorboard/    events

Reading needs no torch; only training does.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import platform
import shutil
import socket
import traceback
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoenc import figures
from autoenc.config import Config
from autoenc.files import append_line, content_hash, replacing, write_atomic
from autoenc.yamlfile import dump_yaml

if TYPE_CHECKING:
    from autoenc.data import Dataset
    from autoenc.train import EpochResult

FORMAT = 1           # of trajectories; part of every key
Row = dict[str, float]


def trajectory_key(config: Config, fingerprint: str, device_kind: str) -> str:
    """The identity of what training this configuration computes: 20 hexadecimal digits.

    ``fingerprint``: of the decoded data and its split; ``device_kind``: ``cpu`` or ``cuda``.
    """
    return content_hash({"format": FORMAT, "config": config.identity(), "data": fingerprint, "device": device_kind})


def own_end(rows: Sequence[Row], config: Config) -> int | None:
    """The epoch at which this configuration's budget or patience ends a training; None where the rows end earlier."""
    mode = figures.MODES[config.train.monitor]
    values = [row.get(config.train.monitor, math.nan) for row in rows[:config.train.epochs]]
    patience = config.train.patience
    if patience is not None:
        for epoch in range(1, len(values) + 1):
            if figures.patience_over(values[:epoch], mode, patience, config.train.min_delta):
                return epoch
    return config.train.epochs if len(values) >= config.train.epochs else None


def best_row(rows: Sequence[Row], config: Config) -> Row | None:
    """The row of the best epoch by the monitored figure, within the configuration's own end."""
    rows = rows[:own_end(rows, config) or len(rows)]
    values = [row.get(config.train.monitor, math.nan) for row in rows]
    best = figures.best_epoch(values, figures.MODES[config.train.monitor])
    return rows[best - 1] if best else None


def divergence(diverged: Mapping[str, Any]) -> str:
    """A divergence in words."""
    return f"diverged at epoch {diverged['epoch']}, step {diverged['step']}: {diverged['what']} not finite"


class Trajectory:
    """A training's folder. Constructing it touches nothing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def rows(self) -> list[Row]:
        """The figures of all epochs so far, in order; what follows a broken line is left out."""
        return _parse_rows(_read_text(self.folder / "metrics.csv"))

    def status(self) -> dict[str, Any]:
        """``state`` (training, completed, diverged, failed), epochs, best epoch, device, versions; {} where none is."""
        try:
            status = json.loads(_read_text(self.folder / "status.json"))
        except ValueError:
            return {}
        return status if isinstance(status, dict) else {}

    def figures(self, epoch: int) -> Row:
        """The figures computed on the weights of this epoch (``latent/smoothness``), where they have been."""
        try:
            return {str(key): float(value) for key, value in self._all_figures().get(str(epoch), {}).items()}
        except (ValueError, AttributeError, TypeError):
            return {}

    def weights(self, epoch: int) -> Path | None:
        """The checkpoint with the weights of this epoch, where one is kept."""
        path = self._weights_path(epoch)
        return path if path.is_file() else None

    def _weights_path(self, epoch: int) -> Path:
        return self.folder / f"best_epoch_{epoch:04d}.pt"          # named by its epoch: never mistaken for another

    def train(self, config: Config, dataset: Dataset, device: str) -> Iterator[Row]:
        """Train from where the folder stands to the configuration's end; yields each new epoch's row, once on disk.

        A diverged training ends and says so in ``status``; so does one whose code raised (see traceback.txt).
        Raises OSError where the folder cannot be written.
        """
        from tensorboardX import SummaryWriter

        from autoenc.train import Diverged, train

        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self.folder / "config.yaml", dump_yaml({"config": config.nested()}))
        rows, resume = self._recover()
        seconds = sum(row["seconds"] for row in rows)
        about = _about(config, device, dataset)
        before = self.status().get("state")
        if own_end(rows, config) is not None:
            if before == "training":                             # killed after the last epoch was stored
                self._write_status(about, "completed", rows, config, seconds)
            return
        # The best within a budget that has ended stays: a decision may rest on it. So do those kept before.
        best = resume["best"] if resume else 0
        spare = {best} if before != "completed" else set()
        self._write_status(about, "training", rows, config, seconds)
        events = SummaryWriter(logdir=str(self.folder / "tensorboard"))
        try:
            for result in train(config, dataset, device=device, resume=resume, history=rows):
                row = self._record(result, best)
                if result.improved:
                    if best in spare:
                        self._weights_path(best).unlink(missing_ok=True)
                    best = result.epoch
                    spare.add(best)
                rows.append(row)
                seconds += row["seconds"]
                self._write_status(about, "training", rows, config, seconds)
                for name, value in result.metrics.items():
                    events.add_scalar(name, value, result.epoch)
                yield row
            self._write_status(about, "completed", rows, config, seconds)
        except Diverged as error:
            self._write_status(about, "diverged", rows, config, seconds, diverged={
                "epoch": error.epoch, "step": error.step, "what": error.what})
        except (OSError, GeneratorExit):
            raise                                # the folder is gone or full, or the caller stopped here
        except Exception as error:
            write_atomic(self.folder / "traceback.txt", traceback.format_exc())
            first = (str(error).strip().splitlines() or [""])[0]
            self._write_status(about, "failed", rows, config, seconds, failed=f"{type(error).__name__}: {first}")
        finally:
            events.close()

    def restore_weights(self, config: Config, dataset: Dataset, device: str, epoch: int) -> Iterator[Row]:
        """Train the first epochs once more for the weights of one of them; its rows stand already. Yields each row."""
        from autoenc.train import train

        for result in train(config, dataset, device=device):
            if result.epoch == epoch:
                self._save_weights(result.state())
            yield {"epoch": result.epoch, "seconds": result.seconds, **result.metrics}
            if result.epoch == epoch:
                return

    def measure(self, config: Config, dataset: Dataset, device: str, epoch: int) -> Row:
        """Compute and keep the figures that need the finished model of an epoch (its weights must be kept)."""
        from autoenc.checkpoint import load_model
        from autoenc.metrics import smoothness

        found = self.figures(epoch)
        if "latent/smoothness" not in found:
            path = self.weights(epoch)
            if path is None:
                raise FileNotFoundError(f"{self.folder}: the weights of epoch {epoch} are not kept")
            images = dataset.images[dataset.splits["val"]]
            found["latent/smoothness"] = smoothness(load_model(path, device=device), images)
            write_atomic(self.folder / "figures.json", json.dumps(self._all_figures() | {str(epoch): found}))
        return found

    def _all_figures(self) -> dict[str, Any]:
        try:
            content = json.loads(_read_text(self.folder / "figures.json"))
        except ValueError:
            return {}
        return content if isinstance(content, dict) else {}

    def _recover(self) -> tuple[list[Row], dict[str, Any] | None]:
        """The rows and the checkpoint to go on from, brought to the same epoch."""
        from autoenc.checkpoint import read_checkpoint

        rows = self.rows()
        latest = self.folder / "latest.pt"
        checkpoint = None
        if latest.is_file():
            try:
                checkpoint = read_checkpoint(latest)
            except Exception:
                latest.replace(self.folder / "latest.pt.broken")
        epoch = checkpoint["epoch"] if checkpoint else 0
        if checkpoint and epoch == len(rows) + 1:            # killed between the checkpoint and its row
            rows.append(checkpoint["row"])
        if epoch > len(rows):                                # rows are missing: nothing to go on from
            checkpoint, epoch = None, 0
        rows = rows[:epoch]
        if rows != self.rows() or (rows and not _read_text(self.folder / "metrics.csv").endswith("\n")):
            write_atomic(self.folder / "metrics.csv", csv_text(rows))
        if checkpoint and checkpoint["best"] == epoch:
            self._save_best(checkpoint)                      # it may have been killed before these followed
        return rows, checkpoint

    def _record(self, result: EpochResult, best: int) -> Row:
        """Put an epoch on disk: the checkpoint first, so that a kill at any point loses nothing of it."""
        from autoenc.checkpoint import save_checkpoint

        row: Row = {"epoch": result.epoch, "seconds": round(result.seconds, 4), **result.metrics}
        state = result.state() | {"row": row, "best": result.epoch if result.improved else best}
        save_checkpoint(self.folder / "latest.pt", state)
        path = self.folder / "metrics.csv"
        header = _header(_read_text(path))
        if header and set(row) <= set(header):
            append_line(path, _line(row, header))
        else:                                                # the first row, or figures that an older version lacked
            write_atomic(path, csv_text([*self.rows(), row]))
        if result.improved:
            self._save_best(state)
        if result.samples is not None:
            self._save_samples(result)
        return row

    def _save_weights(self, state: dict[str, Any]) -> Path:
        from autoenc.checkpoint import model_checkpoint, save_checkpoint

        path = self._weights_path(state["epoch"])
        save_checkpoint(path, model_checkpoint({k: v for k, v in state.items() if k not in ("row", "best")}))
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


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return ""


def _header(text: str) -> list[str]:
    return next(csv.reader([text.split("\n", 1)[0]]), [])


def _parse_rows(text: str) -> list[Row]:
    lines = text.split("\n")
    header = _header(text)
    if header[:2] != ["epoch", "seconds"]:
        return []
    rows: list[Row] = []
    for cells in csv.reader(lines[1:-1]):                    # a last line without its end may lack digits: it is none
        try:
            row = {name: float(cell) for name, cell in zip(header, cells, strict=True) if cell != ""}
        except ValueError:
            break
        if row.get("epoch") != len(rows) + 1 or "seconds" not in row:
            break
        rows.append(row | {"epoch": len(rows) + 1})
    return rows


def _line(row: Row, header: Sequence[str]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow([repr(row[name]) if name in row else "" for name in header])
    return text.getvalue()


def csv_text(rows: Sequence[Row]) -> str:
    header = list(dict.fromkeys(name for row in rows for name in row))
    return "\n".join([",".join(header), *(_line(row, header) for row in rows), ""]) if rows else ""
