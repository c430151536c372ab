"""A training's TensorBoard event files: every figure by epoch, sample pictures, latent histograms, hyperparameters.

Each time a training begins or goes on it writes a file of its own. That takes back what earlier files say of the epochs
that it is about to train: whoever was killed between an epoch's events and its checkpoint trains that epoch again.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from autoenc.config import Config

if TYPE_CHECKING:
    from autoenc.train import EpochResult

# The columns of TensorBoard's HParams page; it shows the first five before anybody asks for more.
METRICS = ("val/mse", "val/psnr", "val/ssim", "val/palette_miou", "parameters", "latent_size", "train/mse",
           "val/segmentation_miou", "val/classification_accuracy", "val/kl_nats", "latent/std", "latent/active_units")
CHANNELS = 64               # of more the histograms show the first ones
BINS = 30
PICTURE = 1_000_000         # pixels of a picture; larger ones are reduced, as checksums are slow here (7 MB/s)


class Events:
    """An event file in ``folder``, which is made where there is none. Methods raise OSError."""

    def __init__(self, folder: Path, config: Config, first: int) -> None:
        """``first``: the epoch that is trained next; what earlier files say of it and of later ones is taken back."""
        folder.mkdir(parents=True, exist_ok=True)
        # Not SummaryWriter: on a full disk its thread ends without a word, and the training waits for it for ever.
        # The suffix keeps files apart that are begun within the same second.
        self._writer = EventsWriter(str(folder / "events"), f".{first:04d}")
        self._write(Event(step=first, session_log=SessionLog(status=SessionLog.START)))
        experiment, start, self._end = summary.hparams(hyperparameters(config), dict.fromkeys(METRICS))
        self._write(Event(summary=experiment), Event(summary=start))
        self._writer.flush()

    def epoch(self, result: EpochResult) -> None:
        """An epoch's figures; at sample epochs also the picture and, from its images, a histogram a latent channel."""
        values = [summary.scalar(name, value) for name, value in result.metrics.items()]
        if result.samples is not None:
            values.append(summary.image("samples", _reduced(result.samples), dataformats="HWC"))
            for channel, latents in enumerate(result.latents.swapaxes(0, 1)[:CHANNELS]):
                finite = latents[np.isfinite(latents)]
                if len(finite):
                    values.append(summary.histogram(f"latent/channel_{channel:02d}", finite, bins=BINS))
        whole = Summary(value=[value for part in values for value in part.value])
        self._write(Event(step=result.epoch, summary=whole))
        self._writer.flush()

    def end(self) -> None:
        """The training is completed."""
        self._write(Event(summary=self._end))

    def close(self) -> None:
        self._writer.close()

    def _write(self, *events: Event) -> None:
        for event in events:
            event.wall_time = time.time()
            self._writer.write_event(event)


def hyperparameters(config: Config) -> dict[str, str | bool | float]:
    """A configuration's settings as TensorBoard takes them: words for what is not set, JSON for lists. Without
    ``data.*``, which no sweep varies: the page would show them first."""
    def plain(value: object) -> str | bool | float:
        if value is None:
            return "none"
        return value if isinstance(value, str | bool | int | float) else json.dumps(value)

    return {key: plain(value) for key, value in config.flat().items() if not key.startswith("data.")}


def _reduced(picture: np.ndarray) -> np.ndarray:
    """uint8 (height, width, 3) of at most about PICTURE pixels."""
    factor = math.ceil(math.sqrt(picture.shape[0] * picture.shape[1] / PICTURE))
    return picture if factor <= 1 else np.asarray(Image.fromarray(picture).reduce(factor))
