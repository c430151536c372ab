"""What TensorBoard reads of a training."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import small_config, small_dataset
from PIL import Image
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData
from tensorboardX.record_writer import masked_crc32c

from autoenc.events import METRICS, hyperparameters
from autoenc.trajectory import Superseded, Trajectory

torch.set_num_threads(1)

DATASET = small_dataset(60)
EPOCHS = 4


def config_of(epochs: int = EPOCHS, **settings):
    return small_config(**{"train__epochs": epochs, "train__patience": None, "train__sample_every": 2, **settings})


def train(folder: Path, *config, trajectory: Trajectory | None = None, **settings) -> Trajectory:
    trajectory = trajectory or Trajectory(folder)
    for _ in trajectory.train(config_of(*config, **settings), DATASET, "cpu"):
        pass
    return trajectory


def read_events(path: Path) -> list[Event]:
    """A file of TFRecords: length, its checksum, data, its checksum."""
    content, events = path.read_bytes(), []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        assert struct.unpack("<I", content[8:12]) == (masked_crc32c(content[:8]),)
        data, (checksum,) = content[12:12 + length], struct.unpack("<I", content[12 + length:16 + length])
        assert checksum == masked_crc32c(data)
        events.append(Event.FromString(data))
        content = content[16 + length:]
    return events


def shown(folder: Path) -> dict[str, dict[int, object]]:
    """Tag -> step -> value as TensorBoard has it after all files in their order: a start takes back what lies at its
    step and later."""
    found: dict[str, dict[int, object]] = defaultdict(dict)
    for path in sorted((folder / "tensorboard").iterdir()):
        for event in read_events(path):
            if event.session_log.status == SessionLog.START:
                for steps in found.values():
                    for step in [step for step in steps if step >= event.step]:
                        del steps[step]
            for value in event.summary.value:
                if value.HasField("metadata"):
                    found[value.tag].setdefault(0, HParamsPluginData.FromString(value.metadata.plugin_data.content))
                    continue
                assert event.step not in found[value.tag], f"{value.tag}: step {event.step} stands twice"
                found[value.tag][event.step] = getattr(value, value.WhichOneof("value"))
    return found


def check_all(trajectory: Trajectory, epochs: int) -> dict[str, dict[int, object]]:
    """Every figure of every epoch is there, once."""
    found, rows = shown(trajectory.folder), trajectory.rows()
    assert len(rows) == epochs
    for row in rows:
        for name in row.keys() - {"epoch", "seconds"}:
            assert np.float32(row[name]) == pytest.approx(found[name][row["epoch"]], nan_ok=True)
    assert list(found["val/mse"]) == list(range(1, epochs + 1))
    return found


def test_figures_pictures_and_latents(tmp_path):
    trajectory = train(tmp_path / "t")
    found = check_all(trajectory, EPOCHS)
    assert list(found["samples"]) == [1, 2, 4]
    for epoch, picture in found["samples"].items():
        there = np.asarray(Image.open(trajectory.folder / "samples" / f"epoch_{epoch:04d}.png"))
        assert (np.asarray(Image.open(io.BytesIO(picture.encoded_image_string))) == there).all()
        assert (picture.height, picture.width) == there.shape[:2]
    channels = sorted(tag for tag in found if tag.startswith("latent/channel"))
    assert channels == ["latent/channel_00", "latent/channel_01"]
    for tag in channels:
        assert list(found[tag]) == [1, 2, 4]
        for histogram in found[tag].values():                          # 8 images, latents 4 × 4
            assert histogram.num == sum(histogram.bucket) == 8 * 16 and histogram.min < histogram.max


def test_hyperparameters(tmp_path):
    trajectory = train(tmp_path / "t", loss__segmentation=0.05)
    found = shown(trajectory.folder)
    given = found["_hparams_/session_start_info"][0].session_start_info.hparams
    plain = {key: getattr(value, value.WhichOneof("kind")) for key, value in given.items()}
    assert plain == hyperparameters(config_of(loss__segmentation=0.05))
    assert (plain["loss.segmentation"], plain["train.patience"], plain["model.variational"]) == (0.05, "none", False)
    experiment = found["_hparams_/experiment"][0].experiment
    assert {info.name for info in experiment.hparam_infos} == plain.keys()
    assert tuple(info.name.tag for info in experiment.metric_infos) == METRICS
    assert set(METRICS) - {"val/classification_accuracy", "val/kl_nats"} <= found.keys()       # figures, all of them
    assert found["_hparams_/session_end_info"][0].HasField("session_end_info")
    unfinished = Trajectory(tmp_path / "other")
    rows = unfinished.train(config_of(), DATASET, "cpu")
    next(rows)
    rows.close()
    assert "_hparams_/session_end_info" not in shown(unfinished.folder)


class Kill(BaseException):
    """What a process that is killed never sees."""


@pytest.mark.parametrize("kills", [[1], [3], [2, 3], [4, 4, 4]])
def test_after_a_kill_no_epoch_is_missing_and_none_stands_twice(tmp_path, monkeypatch, kills):
    """Between an epoch's events and its checkpoint: the worst moment, as it is trained again."""
    import autoenc.checkpoint

    save = autoenc.checkpoint.save_checkpoint
    for epoch in kills:
        def killed(path, content, epoch=epoch):
            if content["epoch"] == epoch:
                raise Kill
            save(path, content)

        monkeypatch.setattr(autoenc.checkpoint, "save_checkpoint", killed)
        with pytest.raises(Kill):
            train(tmp_path / "t")
    monkeypatch.setattr(autoenc.checkpoint, "save_checkpoint", save)
    found = check_all(train(tmp_path / "t"), EPOCHS)
    assert list(found["samples"]) == list(found["latent/channel_00"]) == [1, 2, 4]
    assert len(list((tmp_path / "t" / "tensorboard").iterdir())) >= len({1, *kills})


def test_a_training_that_is_lengthened_or_has_lost_its_checkpoint(tmp_path):
    """Epochs that are trained once more for their checkpoint say nothing."""
    trajectory = train(tmp_path / "t", 2)
    (trajectory.folder / "latest.pt").unlink()
    train(tmp_path / "t", EPOCHS)
    check_all(trajectory, EPOCHS)


def test_who_lost_the_right_to_write_writes_no_events(tmp_path):
    train(tmp_path / "t", 1)

    def guard() -> None:
        raise Superseded

    with pytest.raises(Superseded):
        train(tmp_path / "t", trajectory=Trajectory(tmp_path / "t", guard=guard))
    assert list(shown(tmp_path / "t")["val/mse"]) == [1]


FULL = """
import resource, sys
from pathlib import Path
import numpy as np
from helpers import small_config
from autoenc.events import Events
from autoenc.train import EpochResult
events = Events(Path(sys.argv[1]), small_config(), 1)
resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))           # as a full disk does, it takes a part of a write
metrics = {f"val/{k}": 1.0 for k in range(40)}
for epoch in range(1, 100):
    try:
        events.epoch(EpochResult(epoch, metrics, 1.0, False, dict, None, None))
    except OSError:
        print("told at epoch", epoch)
        break
"""


def test_a_full_disk_is_told(tmp_path):
    """A training must not wait for a writer that is dead."""
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, timeout=60,
                          cwd=Path(__file__).parent)
    assert done.stdout.startswith("told at epoch"), done.stderr
