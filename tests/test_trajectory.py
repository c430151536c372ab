"""A training on disk: what it leaves, what a kill may do to it, and what is broken in it."""

from __future__ import annotations

import csv
import itertools
import json
import math
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from helpers import small_config, small_dataset
from hypothesis import given
from hypothesis import strategies as st

from autoenc.checkpoint import load_model, read_checkpoint
from autoenc.course import best_row, failure, own_end
from autoenc.errors import InputError
from autoenc.table import csv_text
from autoenc.trajectory import Superseded, Trajectory, trajectory_key

torch.set_num_threads(1)

EPOCHS = 4
DATASET = small_dataset()


def config_of(epochs: int = EPOCHS, **settings):
    """With this learning rate and seed the best epoch is the third."""
    return small_config(**{"train__epochs": epochs, "train__patience": None, "train__learning_rate": 0.1,
                           "train__sample_every": 2, "train__seed": 5, **settings})


def train(folder: Path, epochs: int = EPOCHS, **settings) -> Trajectory:
    trajectory = Trajectory(folder)
    for _ in trajectory.train(config_of(epochs, **settings), DATASET, "cpu"):
        pass
    return trajectory


def figures(trajectory: Trajectory) -> list[dict]:
    """All rows without what depends on the clock; NaN made comparable."""
    return [{name: repr(value) for name, value in row.items() if name != "seconds"} for row in trajectory.rows()]


def same_weights(left: Path, right: Path) -> bool:
    one, two = read_checkpoint(left), read_checkpoint(right)
    return (one["epoch"] == two["epoch"] and one["model"].keys() == two["model"].keys()
            and all(torch.equal(one["model"][name], two["model"][name]) for name in one["model"]))


def check_same(trajectory: Trajectory, other: Trajectory) -> None:
    assert figures(trajectory) == figures(other)
    for name in ("best.pt", "latest.pt"):
        assert same_weights(trajectory.folder / name, other.folder / name), name
    one, two = trajectory.status(), other.status()
    assert one | {"seconds": 0} == two | {"seconds": 0}
    pictures = [sorted(path.name for path in (t.folder / "samples").iterdir()) for t in (trajectory, other)]
    assert pictures[0] == pictures[1]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> tuple[Trajectory, list[Path]]:
    """A training, and its folder as it was after each epoch."""
    folder = tmp_path_factory.mktemp("whole")
    trajectory, stages = Trajectory(folder / "t"), []
    for row in trajectory.train(config_of(), DATASET, "cpu"):
        stages.append(folder / f"after {row['epoch']}")
        shutil.copytree(trajectory.folder, stages[-1])
    return trajectory, stages


@pytest.fixture
def whole(uninterrupted) -> Trajectory:
    return uninterrupted[0]


@pytest.fixture
def stages(uninterrupted) -> list[Path]:
    return uninterrupted[1]


# What a training leaves -----------------------------------------------------------------------------------------------

def test_files(whole):
    files = {path.name for path in whole.folder.iterdir()}
    assert files == {"config.yaml", "metrics.csv", "status.json", "latest.pt", "best.pt", "best_epoch_0003.pt",
                     "samples", "tensorboard"}
    assert sorted(path.name for path in (whole.folder / "samples").iterdir()) == [
        "epoch_0001.png", "epoch_0002.png", "epoch_0004.png"]
    with (whole.folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4"] and {"seconds", "val/mse", "val/ssim"} <= set(rows[0])
    best = best_row(whole.rows(), config_of())["epoch"]
    assert best == min(range(EPOCHS), key=lambda epoch: float(rows[epoch]["val/mse"])) + 1
    status = whole.status()
    assert (status["state"], status["epochs"], status["best_epoch"]) == ("completed", EPOCHS, best)
    assert (status["device"], status["threads"]) == ("cpu", 1)
    assert status["data"] == DATASET.fingerprint and status["versions"]["torch"] == torch.__version__
    checkpoint = read_checkpoint(whole.weights(best))
    assert checkpoint["epoch"] == best and "optimizer" not in checkpoint
    assert checkpoint["metrics"]["val/mse"] == whole.rows()[best - 1]["val/mse"]
    assert load_model(whole.weights(best)).encode(torch.zeros(1, 3, 16, 16))["latent"].shape == (1, 2, 4, 4)
    assert whole.weights(best % EPOCHS + 1) is None


def test_reading_a_folder_that_is_not_there(tmp_path):
    trajectory = Trajectory(tmp_path / "none")
    assert (trajectory.rows(), trajectory.status(), trajectory.figures(1), trajectory.weights(1)) == ([], {}, {}, None)
    assert not trajectory.folder.exists()


def test_a_finished_training_is_left_alone(whole, tmp_path):
    shutil.copytree(whole.folder, tmp_path / "t")
    again = Trajectory(tmp_path / "t")
    before = {path: path.read_bytes() for path in again.folder.glob("*.*")}
    assert list(again.train(config_of(), DATASET, "cpu")) == []
    assert before == {path: path.read_bytes() for path in again.folder.glob("*.*")}


# Kills ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("epoch", range(1, EPOCHS))
def test_going_on_equals_the_uninterrupted_training_bit_for_bit(stages, whole, tmp_path, epoch):
    shutil.copytree(stages[epoch - 1], tmp_path / "t")
    torch.manual_seed(epoch)
    trajectory = Trajectory(tmp_path / "t")
    assert [row["epoch"] for row in trajectory.train(config_of(), DATASET, "cpu")] == list(range(epoch + 1, EPOCHS + 1))
    check_same(trajectory, whole)


class Kill(BaseException):
    """What a process that is killed never sees; no handler of the code takes it."""


class Killer:
    """Ends the code right before its n-th change of a folder: a file renamed into place, a line appended. Audit hooks
    see them all, whatever the code uses, and stay for the life of the process."""

    def __init__(self) -> None:
        self.folder, self.left = "", 0
        sys.addaudithook(self.watch)

    def watch(self, event: str, args: tuple) -> None:
        changes = event == "os.rename" or (event == "open" and args[2] & os.O_APPEND)
        if self.folder and changes and str(args[0]).startswith(self.folder):
            self.left -= 1
            if self.left < 0:
                self.folder = ""
                raise Kill


@pytest.fixture(scope="module")
def killer() -> Killer:
    return Killer()


@pytest.mark.parametrize("epoch", [1, 3, 4])
def test_killed_before_any_change_of_a_file(whole, tmp_path, killer, epoch):
    """No epoch whose checkpoint was written is trained again, and weights are never taken for another epoch's."""
    for change in itertools.count():
        folder = tmp_path / str(change)
        trajectory = Trajectory(folder)
        rows = trajectory.train(config_of(), DATASET, "cpu")
        for _ in range(1, epoch):
            next(rows)
        killer.folder, killer.left = str(folder), change
        try:
            next(rows)
            if epoch < EPOCHS or next(rows, None) is None:
                break
        except Kill:
            pass
        finally:
            killer.folder = ""
        for other in range(1, EPOCHS + 1):
            weights = trajectory.weights(other)
            assert weights is None or read_checkpoint(weights)["epoch"] == other, change
        done = read_checkpoint(folder / "latest.pt")["epoch"] if (folder / "latest.pt").exists() else 0
        trained = [row["epoch"] for row in trajectory.train(config_of(), DATASET, "cpu")]
        assert trained == list(range(done + 1, EPOCHS + 1)), change
        shutil.copytree(whole.folder / "samples", folder / "samples", dirs_exist_ok=True)    # a picture may be lacking
        check_same(trajectory, whole)
        assert trajectory.weights(3) is not None
    assert change >= 4


def test_a_generator_that_is_closed_is_gone_on_from(whole, tmp_path):
    trajectory = Trajectory(tmp_path / "t")
    rows = trajectory.train(config_of(), DATASET, "cpu")
    next(rows), next(rows)
    rows.close()
    assert trajectory.status()["state"] == "training" and len(trajectory.rows()) == 2
    check_same(train(tmp_path / "t"), whole)


@pytest.mark.parametrize("cut", [1, 40, -1])
def test_a_row_half_written_is_written_again(stages, whole, tmp_path, cut):
    """Its checkpoint was there first."""
    folder = Path(shutil.copytree(stages[1], tmp_path / "t"))
    for name in ("latest.pt", "best.pt"):
        shutil.copy(stages[2] / name, folder / name)
    line = (stages[2] / "metrics.csv").read_text().splitlines()[3]
    with (folder / "metrics.csv").open("a") as file:
        file.write(line[:cut])
    trajectory = Trajectory(folder)
    assert len(trajectory.rows()) in (2, 3)
    assert [row["epoch"] for row in trajectory.train(config_of(), DATASET, "cpu")] == [4]
    check_same(trajectory, whole)


@pytest.mark.parametrize("content", [b"", b"half a checkpoint", None])
def test_without_a_checkpoint_its_epochs_are_trained_again(stages, whole, tmp_path, content):
    """The rows stay as they were, and only those epochs are trained that lead there."""
    folder = Path(shutil.copytree(stages[1], tmp_path / "t"))
    rows, warnings = (folder / "metrics.csv").read_text(), []
    (folder / "latest.pt").unlink()
    if content is not None:
        (folder / "latest.pt").write_bytes(content)
    trajectory = Trajectory(folder, warn=warnings.append)
    assert [row["epoch"] for row in trajectory.train(config_of(), DATASET, "cpu")] == [1, 2, 3, 4]
    check_same(trajectory, whole)
    assert (folder / "metrics.csv").read_text().startswith(rows)
    if content is None:
        assert warnings == []
    else:
        assert (folder / "latest.pt.broken").read_bytes() == content and "latest.pt.broken" in warnings[0]


@pytest.mark.parametrize("content", [b"", b"a,b\n1,2\n", b"epoch,seconds\n1,\x00\n", b"\xff" * 300_000, None])
def test_a_broken_table_is_made_anew_from_the_checkpoint(stages, whole, tmp_path, content):
    folder, warnings = Path(shutil.copytree(stages[1], tmp_path / "t")), []
    (folder / "metrics.csv").unlink()
    if content is not None:
        (folder / "metrics.csv").write_bytes(content)
    trajectory = Trajectory(folder, warn=warnings.append)
    assert [row["epoch"] for row in trajectory.train(config_of(), DATASET, "cpu")] == [3, 4]
    check_same(trajectory, whole)
    assert len(warnings) == 1 and "metrics.csv" in warnings[0]


@pytest.mark.parametrize("lost", [("latest.pt",), ("latest.pt", "best.pt", "best_epoch_0003.pt")])
def test_a_thinned_training_can_be_lengthened(whole, tmp_path, lost):
    """Its epochs are trained again for their checkpoint; a kill meanwhile costs no row."""
    folder = Path(shutil.copytree(whole.folder, tmp_path / "t"))
    before = (folder / "metrics.csv").read_text()
    for name in lost:
        (folder / name).unlink()
    trajectory = Trajectory(folder)
    again = trajectory.train(config_of(EPOCHS + 2), DATASET, "cpu")
    assert next(again) == trajectory.rows()[0]
    again.close()
    assert (folder / "metrics.csv").read_text() == before and not (folder / "latest.pt").exists()
    assert [row["epoch"] for row in trajectory.train(config_of(EPOCHS + 2), DATASET, "cpu")] == [*range(1, EPOCHS + 3)]
    longer = train(tmp_path / "longer", EPOCHS + 2)
    assert figures(trajectory) == figures(longer) and same_weights(folder / "latest.pt", longer.folder / "latest.pt")
    assert (folder / "metrics.csv").read_text().startswith(before)


def test_a_checkpoint_of_another_version_is_set_aside(stages, whole, tmp_path):
    folder, warnings = Path(shutil.copytree(stages[1], tmp_path / "t")), []
    content = torch.load(folder / "latest.pt", weights_only=True)
    torch.save(content | {"format": 2}, folder / "latest.pt")
    trajectory = Trajectory(folder, warn=warnings.append)
    assert [row["epoch"] for row in trajectory.train(config_of(), DATASET, "cpu")] == [1, 2, 3, 4]
    check_same(trajectory, whole)
    assert "format: 2" in warnings[0]


@pytest.mark.parametrize("rows", [None, [], [1, 2], [{}, {}], "ab"])
def test_a_checkpoint_whose_rows_are_none_is_set_aside(stages, whole, tmp_path, rows):
    folder, warnings = Path(shutil.copytree(stages[1], tmp_path / "t")), []
    torch.save(torch.load(folder / "latest.pt", weights_only=True) | {"rows": rows}, folder / "latest.pt")
    trajectory = Trajectory(folder, warn=warnings.append)
    assert [row["epoch"] for row in trajectory.train(config_of(), DATASET, "cpu")] == [1, 2, 3, 4]
    check_same(trajectory, whole)
    assert "rows: not what going on from it takes" in warnings[0]


def test_a_checkpoint_of_another_training_is_set_aside(stages, whole, tmp_path):
    folder, warnings = Path(shutil.copytree(stages[1], tmp_path / "t")), []
    train(tmp_path / "other", train__learning_rate=0.05)
    shutil.copy(tmp_path / "other" / "latest.pt", folder / "latest.pt")
    trajectory = Trajectory(folder, warn=warnings.append)
    assert [row["epoch"] for row in trajectory.train(config_of(), DATASET, "cpu")] == [1, 2, 3, 4]
    check_same(trajectory, whole)
    assert "another training" in warnings[0]


def test_nothing_is_written_once_the_right_to_is_lost(stages, tmp_path):
    def guard() -> None:
        raise Superseded

    folder = Path(shutil.copytree(stages[1], tmp_path / "t"))
    before = {path: path.read_bytes() for path in folder.glob("*.pt")} | {
        folder / "metrics.csv": (folder / "metrics.csv").read_bytes()}
    with pytest.raises(Superseded):
        list(Trajectory(folder, guard=guard).train(config_of(), DATASET, "cpu"))
    assert before == {path: path.read_bytes() for path in before}


def test_a_truncated_checkpoint_is_set_aside(stages, whole, tmp_path):
    folder = Path(shutil.copytree(stages[2], tmp_path / "t"))
    content = (folder / "latest.pt").read_bytes()
    (folder / "latest.pt").write_bytes(content[:len(content) // 2])
    trajectory = Trajectory(folder)
    assert len(list(trajectory.train(config_of(), DATASET, "cpu"))) == EPOCHS
    check_same(trajectory, whole)


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b'{"best_epoch": "x"}'])
def test_without_a_status_it_goes_on(stages, whole, tmp_path, content):
    folder = Path(shutil.copytree(stages[1], tmp_path / "t"))
    (folder / "status.json").unlink()
    if content is not None:
        (folder / "status.json").write_bytes(content)
    trajectory = Trajectory(folder)
    assert [row["epoch"] for row in trajectory.train(config_of(), DATASET, "cpu")] == [3, 4]
    check_same(trajectory, whole)


def test_without_best_weights_they_can_be_had_again(whole, tmp_path):
    """The rows stay as they are; the weights are those of the first time, bit for bit."""
    folder = Path(shutil.copytree(whole.folder, tmp_path / "t"))
    trajectory, best = Trajectory(folder), whole.status()["best_epoch"]
    for path in folder.glob("best*.pt"):
        path.unlink()
    rows = (folder / "metrics.csv").read_text()
    assert trajectory.weights(best) is None
    assert [row["epoch"] for row in trajectory.restore_weights(config_of(), DATASET, "cpu", best)] == [
        *range(1, best + 1)]
    assert same_weights(trajectory.weights(best), whole.folder / "best.pt")
    assert (folder / "metrics.csv").read_text() == rows
    other = next(epoch for epoch in range(1, EPOCHS) if epoch != best)
    assert [row["epoch"] for row in trajectory.restore_weights(config_of(), DATASET, "cpu", other)][-1] == other
    assert read_checkpoint(trajectory.weights(other))["epoch"] == other
    assert read_checkpoint(trajectory.weights(best))["epoch"] == best


# Budgets --------------------------------------------------------------------------------------------------------------

def test_a_longer_budget_goes_on_and_keeps_what_the_shorter_one_decided_on(whole, tmp_path):
    trajectory = train(tmp_path / "t", epochs=2)
    short = best_row(trajectory.rows(), config_of(2))["epoch"]
    weights = read_checkpoint(trajectory.weights(short))
    train(tmp_path / "t")
    check_same(trajectory, whole)
    kept = read_checkpoint(trajectory.weights(short))
    assert kept["epoch"] == short and all(torch.equal(kept["model"][n], weights["model"][n]) for n in weights["model"])
    long = best_row(trajectory.rows(), config_of())["epoch"]
    assert long > short and read_checkpoint(trajectory.weights(long))["epoch"] == long
    assert best_row(trajectory.rows(), config_of(2))["epoch"] == short


def test_patience_ends_it(tmp_path):
    still = {"train__learning_rate": 1e-30, "train__weight_decay": 0.0}
    trajectory = train(tmp_path / "t", train__patience=2, **still)
    assert len(trajectory.rows()) == 3 and own_end(trajectory.rows(), config_of(train__patience=2)) == 3
    train(tmp_path / "t", **still)
    assert len(trajectory.rows()) == 4


VALUES = st.lists(st.one_of(st.floats(0, 2), st.just(math.nan)), max_size=10)


@given(VALUES, st.integers(1, 10), st.one_of(st.none(), st.integers(1, 4)))
def test_own_end_and_best_row(values, epochs, patience):
    config = config_of(epochs, train__patience=patience)
    rows = [{"epoch": epoch, "seconds": 0.0, "val/mse": value} for epoch, value in enumerate(values, start=1)]
    end = own_end(rows, config)
    if end is not None:
        assert 1 <= end <= min(epochs, len(rows))
        assert own_end(rows[:end], config) == end and all(own_end(rows[:short], config) is None for short in range(end))
        assert own_end([*rows, {"epoch": len(rows) + 1, "val/mse": -1.0}], config) == end
    else:
        assert len(rows) < epochs
    row, mine = best_row(rows, config), [row["val/mse"] for row in rows[:end]]
    numbers = [value for value in mine if value == value]
    assert (row is None) == (not numbers)
    if numbers:
        assert row["val/mse"] == min(numbers) and row["epoch"] == mine.index(min(numbers)) + 1


# Failures -------------------------------------------------------------------------------------------------------------

def test_a_divergence_is_told_and_never_completes(tmp_path):
    trajectory = Trajectory(tmp_path / "t")
    for _ in range(2):
        assert list(trajectory.train(config_of(train__learning_rate=1e12), DATASET, "cpu")) == []
        status = trajectory.status()
        assert status["state"] == "diverged"
        assert status["diverged"]["epoch"] == 1 and status["diverged"]["step"] in (2, 3)
        assert status["epochs"] == 0 and own_end(trajectory.rows(), config_of()) is None


def test_an_exception_is_kept(tmp_path):
    """The training code's, with its traceback; the next attempt goes on."""
    class Broken:
        def __getattr__(self, name):
            if name == "palette":
                raise RuntimeError("a broken palette\nand more")
            return getattr(DATASET, name)

    trajectory = Trajectory(tmp_path / "t")
    assert list(trajectory.train(config_of(), Broken(), "cpu")) == []
    assert trajectory.status()["state"] == "failed"
    assert trajectory.status()["failed"] == "RuntimeError: a broken palette"
    assert "broken palette" in (tmp_path / "t" / "traceback.txt").read_text()
    assert len(train(tmp_path / "t", epochs=1).rows()) == 1 and trajectory.status()["state"] == "completed"


def test_memory_that_runs_out_is_told_with_what_to_change():
    config = config_of(train__batch_size=64, model__base_channels=32)
    with pytest.raises(RuntimeError) as here:
        torch.empty(10**15)
    there = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has …")
    for error, where in ((here.value, "out of memory"), (there, "out of GPU memory")):
        said = failure(error, config)
        assert said.startswith(where) and "train.batch_size 64" in said and "resources.gpus" in said
    assert failure(ValueError("no\nmore"), config) == "ValueError: no"


def test_a_folder_that_cannot_be_written(tmp_path):
    tmp_path.chmod(0o500)
    folder = Path("/sys") if os.geteuid() == 0 else tmp_path           # where root cannot write either
    with pytest.raises(OSError):
        train(folder / "t")
    assert not (folder / "t").exists()


def test_a_folder_that_vanishes(tmp_path):
    rows = Trajectory(tmp_path / "t").train(config_of(), DATASET, "cpu")
    next(rows)
    shutil.rmtree(tmp_path / "t")
    with pytest.raises(OSError):
        next(rows)


@pytest.mark.parametrize("content", ["", "[]", '{"4": 3}', '{"4": {"latent/smoothness": "x"}}', '{"4": {"latent/smoo'])
def test_broken_figures_are_none(tmp_path, content):
    (tmp_path / "figures.json").write_text(content)
    assert Trajectory(tmp_path).figures(4) == {}


# The table ------------------------------------------------------------------------------------------------------------

ROWS = st.lists(st.dictionaries(st.sampled_from(["val/mse", "val/psnr"]), st.floats(), max_size=2), max_size=5)


def sorted_figures(rows: list[dict]) -> list[str]:
    return [repr(sorted(row.items())) for row in rows]


@given(ROWS, st.integers(0, 400))
def test_a_table_reads_back_up_to_where_it_breaks(tmp_path_factory, figures, cut):
    folder = tmp_path_factory.getbasetemp()
    rows = [{"epoch": epoch, "seconds": 0.25, **row} for epoch, row in enumerate(figures, start=1)]
    text = csv_text(rows)
    (folder / "metrics.csv").write_text(text)
    assert sorted_figures(Trajectory(folder).rows()) == sorted_figures(rows)
    (folder / "metrics.csv").write_text(text[:cut])
    whole = max(0, text[:cut].count("\n") - 1)            # a line without its end is none: a figure may be cut short
    assert sorted_figures(Trajectory(folder).rows()) == sorted_figures(rows[:whole])


# Keys -----------------------------------------------------------------------------------------------------------------

SAME = [{"train__epochs": 9}, {"train__patience": 7}, {"train__min_delta": 0.1}, {"train__sample_every": 0},
        {"loss__kl": 0.5}, {"model__heads": ["rgb"]}, {"model__latent": "sample"}, {"data__cache_dir": "/x"}]
OTHER = [{"train__seed": 4}, {"train__learning_rate": 0.06}, {"train__monitor": "val/ssim"}, {"train__batch_size": 4},
         {"train__precision": "bf16"}, {"loss__l1": 0.5}, {"model__heads": ["rgb", "segmentation"]},
         {"model__variational": True}, {"loss__segmentation": 0.1}, {"model__base_channels": 16}]


def test_keys():
    key = trajectory_key(config_of(), "data", "cpu")
    assert len(key) == 20 and int(key, 16)
    assert {trajectory_key(config_of(**more), "data", "cpu") for more in SAME} == {key}
    others = [trajectory_key(config_of(**more), "data", "cpu") for more in OTHER]
    others += [trajectory_key(config_of(), "other", "cpu"), trajectory_key(config_of(), "data", "cuda")]
    assert len({key, *others}) == len(others) + 1
    weights = [config_of(model__variational=True, loss__kl=weight) for weight in (0.1, 0.2)]
    assert len({trajectory_key(config, "data", "cpu") for config in weights}) == 2


def test_a_head_without_its_data_is_told(tmp_path):
    bare = small_dataset(segmentation=False)
    trajectory = Trajectory(tmp_path / "t")
    try:
        rows = list(trajectory.train(config_of(loss__segmentation=0.1), bare, "cpu"))
    except InputError as error:
        assert "loss.segmentation" in str(error)
    else:
        assert rows == [] and "loss.segmentation" in json.dumps(trajectory.status())
