"""What gives way when the store outgrows its budget, and what that costs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from racing import KNOB, Lab, decision_of, levels
from sweepfiles import write

import tune_runner
from autoenc import data
from autoenc.errors import InputError
from autoenc.sweep import export
from autoenc.sweep.decide import decide
from autoenc.sweep.inherit import load_chain, read_winner
from autoenc.sweep.phase import Phase, conclude, decide_race, open_phase, standing_decision
from autoenc.sweep.race import Race
from autoenc.sweep.records import Record
from autoenc.sweep.thin import StoreBudget, size_of
from autoenc.sweep.work import Task, work

STATE, WEIGHTS = 10_000, 3_000
STATES_OF, WEIGHTS_OF = {"latest.pt"}, {"best.pt", "best_epoch_0003.pt"}
EVERYTHING = STATES_OF | WEIGHTS_OF

ARMS = {"slow": 0.4, "late": 0.35, "breaks": 0.2, "good": 0.1, "equal": 0.102, "stopped": 0.8, "base": 0.6}
EQUAL = ("winner", "best", "as good", "rule's choice")
RULE = {"within": "5%", "repeats": 2, "baseline": {"arm": "base"}}


def curve(config: Any) -> list[Any]:
    values = levels(config)
    return [*values[:2], "diverged"] if config.train.weight_decay == 0.2 else values


def make_lab(folder: Path, arms: dict[str, float] = ARMS, **content: Any) -> Lab:
    return Lab(folder, curve, arms={name: {KNOB: level} for name, level in arms.items()}, **{
        "decision": RULE, "asha": {"margin": 0.5, "grace_epochs": 2}, **content})


def fill(folder: Path, age: int = 0) -> None:
    """A training's checkpoints, and what is not one."""
    (folder / "latest.pt").write_bytes(b"s" * STATE)
    (folder / "best_epoch_0003.pt").write_bytes(b"w" * WEIGHTS)
    (folder / "best.pt").unlink(missing_ok=True)
    (folder / "best.pt").hardlink_to(folder / "best_epoch_0003.pt")
    (folder / "samples").mkdir(exist_ok=True)
    (folder / "samples" / "epoch_0001.png").write_bytes(b"p" * 500)
    os.utime(folder / "status.json", (1e9 - age, 1e9 - age))


def decided(lab: Lab, race: Race) -> dict[str, Any]:
    """What a run of the sweep leaves, checkpoints included; the trials that came first are the oldest."""
    decision = decision_of(race)
    for number, trial in enumerate(race.trials):
        fill(trial.run.trajectory.folder, age=1000 - number)
    lab.folder.link_trials(race)
    lab.folder.write_json("decision.json", decision)
    lab.folder.emit(event="decided", winner=decision["winner"])
    return decision


def budget(lab: Lab, limit: float | None) -> StoreBudget:
    """``limit``: bytes."""
    return StoreBudget(lab.folder.path.parent, lab.spec.name, None if limit is None else limit / 1e9)


def keep(lab: Lab, limit: float, decision: dict[str, Any]) -> str:
    return budget(lab, limit).keep(lambda: decision, emit=lab.folder.emit)


def checkpoints(race: Race) -> dict[str, set[str]]:
    return {trial.name: {path.name for path in trial.run.trajectory.folder.glob("*.pt*")} for trial in race.trials}


def without(race: Race) -> dict[str, set[str]]:
    """Trial -> the checkpoints that it has no more."""
    return {name: EVERYTHING - there for name, there in checkpoints(race).items() if there != EVERYTHING}


def contents(folder: Path) -> dict[str, bytes]:
    """All files but checkpoints and what is only added to."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and ".pt" not in path.name and path.name != "events.jsonl"}


@pytest.fixture
def lab(tmp_path) -> Lab:
    return make_lab(tmp_path)


def test_what_goes_first_and_what_never_goes(lab, tmp_path):
    race = lab.run()
    decision = decided(lab, race)
    assert {row["arm"]: row["standing"] for row in decision["candidates"]} == {
        "slow": "worse", "late": "worse", "breaks": "diverged", "good": "winner", "equal": "as good",
        "stopped": "behind at epoch 2", "base": "worse"}
    before, order, gone = contents(tmp_path), [], without(race)
    while keep(lab, budget(lab, 1).size - 1, decision) and without(race) != gone:
        order += [(trial, files - gone.get(trial, set())) for trial, files in without(race).items()
                  if files != gone.get(trial)]
        gone = without(race)
    others = ["slow_seed42", "late_seed42", "good_seed43", "equal_seed43", "base_seed43"]
    assert order == [("breaks_seed42", EVERYTHING), *[(trial, STATES_OF) for trial in others],
                     *[(trial, WEIGHTS_OF) for trial in others], ("stopped_seed42", EVERYTHING)]
    assert {trial for trial, there in checkpoints(race).items() if there == EVERYTHING} == {
        "good_seed42", "equal_seed42", "base_seed42"}
    assert contents(tmp_path) == before


def test_no_more_goes_than_must(lab):
    race = lab.run()
    decision = decided(lab, race)
    size = budget(lab, 1).size
    for limit in (size, size + 1, None):
        assert budget(lab, limit).keep(lambda: decision, emit=lab.folder.emit) == ""
    assert not without(race) and not lab.events("thinned")
    assert keep(lab, size - STATE - WEIGHTS - 1, decision)
    assert without(race) == {"breaks_seed42": EVERYTHING, "slow_seed42": STATES_OF}
    assert budget(lab, 1).size == size - 2 * STATE - WEIGHTS


def test_one_file_with_two_names_counts_once(tmp_path):
    (tmp_path / "samples").mkdir()
    for name, size in (("a", 5), ("samples/b", 7)):
        (tmp_path / name).write_bytes(b"x" * size)
    (tmp_path / "c").hardlink_to(tmp_path / "a")
    assert size_of(tmp_path) == 12 and size_of(tmp_path / "none") == 0


def test_a_picked_trial_and_the_rules_choice_keep_theirs(tmp_path):
    lab = make_lab(tmp_path, decision={"pick": "slow", "because": "it looks better"})
    race = lab.run()
    decision = decided(lab, race)
    verdicts = {row["arm"]: row["standing"] for row in decision["candidates"]}
    assert (verdicts["slow"], verdicts["good"]) == ("winner", "rule's choice")
    keep(lab, 1, decision)
    assert [name for name, there in checkpoints(race).items() if there] == ["slow_seed42", "good_seed42"]


def test_a_pick_that_cannot_win_keeps_its_own(tmp_path):
    lab = make_lab(tmp_path, decision={"pick": "breaks", "because": "we hope"})
    race = lab.run()
    decision = decided(lab, race)
    assert decision["winner"] is None
    keep(lab, 1, decision)
    assert checkpoints(race)["breaks_seed42"] == EVERYTHING


def test_while_a_sweep_runs_what_is_at_work_or_may_still_win_is_kept(lab):
    race, running = lab.race(), []
    while len(running) < 5:                              # slow and late run to their end, three more are on their way
        run = race.next()
        ends = any(lab.step(race, run) for _ in range(9 if len(running) < 2 else 1))
        running.append(run)
        assert ends == (len(running) <= 2)
    lab.folder.link_trials(race)
    for trial in race.trials[:5]:
        fill(trial.run.trajectory.folder)
    assert keep(lab, 1, standing_decision(race)) and not lab.events("thinned")
    while not lab.step(race, running[3]):                # good comes to its end
        pass
    for trial in race.trials[:5]:
        fill(trial.run.trajectory.folder)
    assert keep(lab, 1, standing_decision(race))
    assert [name for name, there in checkpoints(race).items() if there] == [
        "breaks_seed42", "good_seed42", "equal_seed42"]


@pytest.mark.parametrize("state", ["undecided", "running", "decided", "gone on with", "broken decision"])
def test_what_another_sweep_needs_is_kept(lab, tmp_path, state):
    """The other one varies less: to it, slow and late are winner and baseline."""
    race = lab.run()
    decision = decided(lab, race)
    other = make_lab(tmp_path, {"A": 0.4, "B": 0.35, "C": 0.39}, name="toy_other", decision={}, asha=False)
    theirs = other.run()
    decided(other, theirs)
    other.folder.emit(event="thinned", trajectories=[], bytes=0)
    if state == "undecided":
        (other.folder.path / "decision.json").unlink()
    if state == "gone on with":                          # interrupted in order since: nothing is locked
        other.folder.emit(event="started", trial="C_seed42")
    if state == "broken decision":
        (other.folder.path / "decision.json").write_text('{"rule": [], "candidates": [{"arm": "A", "verdict": 1}]}')
    if state == "running":
        with other.folder.writing():
            keep(lab, 1, decision)
    else:
        keep(lab, 1, decision)
    if state == "decided":
        assert checkpoints(theirs) == {"A_seed42": set(), "B_seed42": EVERYTHING, "C_seed42": set()}
    else:
        assert set(map(len, checkpoints(theirs).values())) == {len(EVERYTHING)}
    assert checkpoints(race)["equal_seed43"] == checkpoints(race)["breaks_seed42"] == set()


def test_a_sweep_that_cannot_be_read_is_not_overridden(lab, tmp_path):
    race = lab.run()
    decision = decided(lab, race)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "trials").write_text("no folder")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "trials").symlink_to("trials")               # leads to itself
    assert "may still be needed" in keep(lab, 1, decision) and not without(race)
    (tmp_path / "odd" / "trials").unlink()
    assert "gave up" in keep(lab, 1, decision) and len(without(race)) == 7


def test_trainings_that_no_sweep_links_to_are_spent_like_losers(lab, tmp_path):
    race = lab.run()
    decision = decided(lab, race)
    (lab.folder.path / "trials" / "good_seed42").unlink()
    keep(lab, 1, decision)
    assert checkpoints(race)["good_seed42"] == set()


def test_a_sweep_that_was_set_aside_speaks_for_its_own_trainings_alone(lab, tmp_path):
    """``--fresh``: it was never decided; what is trained anew is judged by the new decision."""
    old = lab.run()
    decided(lab, old)
    (lab.folder.path / "decision.json").unlink()
    for key in {run.key for run in old.runs.values()}:
        lab.store.set_aside(key)
    lab.folder.set_aside()
    lab.folder.path.mkdir()
    race = lab.run()
    keep(lab, 1, decided(lab, race))
    assert checkpoints(race)["slow_seed42"] == set() and checkpoints(race)["good_seed42"] == EVERYTHING
    links = tmp_path / "toy.old1" / "trials"
    assert all((link / name).is_file() for link in links.iterdir() for name in EVERYTHING)


HOLD = """
import sys
from pathlib import Path
from autoenc.sweep.store import Store
with Store(Path(sys.argv[1])).lock(sys.argv[2]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_what_another_process_has_locked_is_left_alone(lab, tmp_path):
    race = lab.run()
    decision = decided(lab, race)
    key = race.runs[race.trials[0].run.id].key
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path, key], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        keep(lab, 1, decision)
        assert checkpoints(race)["slow_seed42"] == EVERYTHING and checkpoints(race)["late_seed42"] == set()
        other.stdin.close()
    keep(lab, 1, decision)
    assert checkpoints(race)["slow_seed42"] == set()


def test_what_is_said_and_written_down(lab):
    race = lab.run()
    decision = decided(lab, race)
    size, keys = budget(lab, 1).size, {trial.name: trial.run.key for trial in race.trials}
    limit = size - STATE - WEIGHTS
    assert keep(lab, limit, decision) == (
        f"the store held {size / 1e9:.3g} GB, more than resources.store_gb {limit / 1e9:g}: gave up checkpoints of 1 "
        f"trainings that did not win ({(STATE + WEIGHTS) / 1e9:.3g} GB); their figures stay")
    event = lab.events("thinned")[0]
    assert event["trajectories"] == [keys["breaks_seed42"]] and event["bytes"] == STATE + WEIGHTS
    said = keep(lab, 1, decision)
    assert said.endswith(f"; their figures stay; the {budget(lab, 1).size / 1e9:.3g} GB that are left may still be "
                         "needed: raise it, or move old sweeps and their trainings away")
    assert lab.events("thinned")[1]["bytes"] == 6 * (STATE + WEIGHTS)
    assert keep(lab, 1, decision).startswith("the store held ") and len(lab.events("thinned")) == 2


def test_nothing_is_said_twice_while_a_sweep_runs(lab):
    race = lab.run()
    decision = decided(lab, race)
    keep(lab, 1, decision)
    over, key = budget(lab, 1), race.trials[0].run.key

    def said() -> str:
        return over.keep(lambda: decision, key, lab.folder.emit)

    assert "may still be needed" in said() and said() == said() == ""
    fill(race.trials[0].run.trajectory.folder)
    assert "gave up checkpoints of 1 " in said() and said() == ""
    over.gigabytes = 1
    assert said() == ""
    over.gigabytes = 1e-9
    assert "may still be needed" in said()


def test_that_nothing_is_left_is_said_though_something_was_given_up_before(lab):
    race = lab.run()
    decision = decided(lab, race)
    over = budget(lab, budget(lab, 1).size - 1)
    assert over.keep(lambda: decision).endswith("their figures stay")
    keep(lab, 1, decision)
    winner = race.trials[3].run.trajectory.folder
    (winner / "latest.pt").write_bytes(b"s" * 20 * STATE)
    assert "may still be needed" in over.keep(lambda: decision, winner.name)


def test_two_sweeps_that_thin_at_the_same_time_do_not_give_up_twice_as_much(lab, tmp_path):
    race = lab.run()
    decision = decided(lab, race)
    limit = budget(lab, 1).size - STATE - WEIGHTS
    ours, theirs = budget(lab, limit), budget(lab, limit)
    assert theirs.keep(lambda: decision) and ours.keep(lambda: decision, race.trials[0].run.key) == ""
    assert without(race) == {"breaks_seed42": EVERYTHING}


@st.composite
def sweeps(draw: Callable[..., Any]) -> dict[str, Any]:
    """A sweep's records and rule."""
    names = "ABCDE"[:draw(st.integers(1, 5))]
    records = []
    for arm in names:
        for seed in range(42, 42 + draw(st.integers(1, 2))):
            status = draw(st.sampled_from(["completed", "completed", "stopped", "diverged", "failed", "running"]))
            if status != "running":
                score = draw(st.floats(0.1, 0.2))
                records.append(Record(arm=arm, trial=f"{arm}_seed{seed}", seed=seed, status=status, epochs=8,
                                      best_epoch=3, note="", settings={}, figures={"val/mse": score}, improving=0.0))
    pick = draw(st.sampled_from([None, *names]))
    baseline = draw(st.sampled_from([None, *names]))
    rule = {"within": draw(st.sampled_from(["1%", "30%"])), **({"baseline": {"arm": baseline}} if baseline else {}),
            **({"pick": pick, "because": "so"} if pick else {})}
    trainings = {f"{arm}_seed{seed}": draw(st.integers(0, 7)) for arm in names for seed in (42, 43)}
    return {"arms": names, "records": records, "rule": rule, "named": {pick, baseline}, "trainings": trainings,
            "decided": draw(st.booleans())}


@settings(max_examples=60, deadline=None)
@given(st.lists(sweeps(), min_size=1, max_size=3), st.lists(st.integers(0, 2000), min_size=16, max_size=16),
       st.integers(1, 20_000))
def test_after_thinning_it_fits_or_nothing_expendable_is_left(tmp_path_factory, them, sizes, limit):
    """Several sweeps that share trainings, decided by whatever rule: what is needed stays, and nothing else does where
    the store is too large."""
    output = tmp_path_factory.mktemp("out")
    needed: set[str] = set()
    for key in range(8):
        folder = output / "store" / f"t{key}"
        folder.mkdir(parents=True)
        (folder / "metrics.csv").write_text("figures")
        (folder / "latest.pt").write_bytes(b"s" * sizes[2 * key])
        (folder / "best_epoch_0003.pt").write_bytes(b"w" * sizes[2 * key + 1])
    for number, sweep in enumerate(them):
        lab = make_lab(output, dict.fromkeys(sweep["arms"], 0.1), name=f"toy{number}", decision=sweep["rule"])
        decision = decide(sweep["records"], list(sweep["arms"]), lab.spec.objective, lab.spec.decision)
        (lab.folder.path / "trials").mkdir()
        for trial, key in sweep["trainings"].items():
            (lab.folder.path / "trials" / trial).symlink_to(f"../../store/t{key}")
        if number == 0:
            own, over = decision, budget(lab, limit)
        elif sweep["decided"]:
            lab.folder.write_json("decision.json", decision)
            lab.folder.emit(event="decided")
        else:
            decision = {"candidates": []}
        told = {trial: (row, trial == row["trials"][0]) for row in decision["candidates"] for trial in row["trials"]}
        for trial, key in sweep["trainings"].items():
            row, first = told.get(trial, (None, False))
            if row is None or (first and (row["arm"] in sweep["named"] or row["standing"] in EQUAL)):
                needed.add(f"t{key}")
    before = {path: path.stat().st_size for path in (output / "store").rglob("*") if path.is_file()}
    over.keep(lambda: own)
    after = {path: path.stat().st_size for path in (output / "store").rglob("*") if path.is_file()}
    gone = before.keys() - after.keys()
    assert all(path.suffix == ".pt" and path.parent.name not in needed for path in gone)
    assert sum(after.values()) <= limit or {path.parent.name for path in after if path.suffix == ".pt"} <= needed
    assert not gone or sum(before.values()) > limit


# What it costs, with real trainings --------------------------------------------------------------------------------

SMALL = {"data.image_size": 16, "data.limit": 40, "model.base_channels": 4, "model.latent_channels": 2,
         "model.downsampling_steps": 1, "train.batch_size": 8, "train.epochs": 3, "train.patience": None}


def real(folder: Path, **content: Any) -> Phase:
    nested: dict[str, Any] = {}
    for key, value in SMALL.items():
        section, name = key.split(".")
        nested.setdefault(section, {})[name] = value
    write(folder, "base", {"config": nested})
    arms = {"quick": {"train.learning_rate": 3e-3}, "slow": {"train.learning_rate": 1e-5}}
    path = write(folder, "toy", {"arms": arms, "asha": False, "resources": {"gpus": 0}, **content})
    return open_phase(load_chain(path)[-1], folder / "out", data.prepare)


def trained(phase: Phase, race: Race) -> Iterator[tuple[str, int]]:
    """Run what the race asks for, as the workers of a sweep do; yields (trial, epoch)."""
    while (run := race.next()) is not None:
        for said in work(Task(key=run.key, output=str(phase.output), config=run.config.flat(), threads=1, device="cpu",
                              keep=run.keep)):
            if "epoch" in said:
                yield race.name_of(run), said["epoch"]
            if "row" in said:
                race.report(run, said["row"])
            if "outcome" in said:
                race.finish(run, said["outcome"], said.get("note", ""))


def run_command(phase: Phase) -> tuple[list[tuple[str, int]], Race, dict[str, Any]]:
    """What the command does with one sweep, its store kept small; the epochs that it trained."""
    with phase.writing() as folder:
        race = phase.race("cpu", folder.emit)
        folder.link_trials(race)
        epochs = list(trained(phase, race))
        decision = decide_race(race)
        if missing := export.missing_weights(race, decision):
            race.reopen(missing[0].run, missing[1])
            epochs += trained(phase, race)
        conclude(phase, race, decision, folder)
        folder.emit(event="decided", winner=decision["winner"])
        StoreBudget(phase.output, phase.spec.name, 1e-6).keep(lambda: decision, emit=folder.emit)
    return epochs, race, decision


def test_a_thinned_sweep_stands_and_another_rule_trains_its_winner_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("AUTOENC_CACHE", str(tmp_path / "cache"))
    phase = real(tmp_path)
    epochs, race, decision = run_command(phase)
    assert decision["winner"] == "quick" and len(epochs) == 6
    slow = race.trials[1].run.trajectory
    weights = read_winner(phase.output / "toy").provenance["trajectory"]
    assert weights == race.trials[0].run.key
    assert not list(slow.folder.glob("*.pt")) and len(list(race.trials[0].run.trajectory.folder.glob("*.pt"))) == 3
    figures = (slow.folder / "metrics.csv").read_bytes()

    again, _, same = run_command(real(tmp_path))
    assert again == [] and same == decision

    phase = real(tmp_path, decision={"pick": "slow", "because": "to see it"})
    assert phase.reasons
    epochs, race, decision = run_command(phase)
    best = int(race.figures_of(race.trials[1].run)["epoch"])
    assert decision["winner"] == "slow"
    assert epochs == [("slow_seed42", epoch) for epoch in range(1, best + 1)]
    assert (slow.folder / "metrics.csv").read_bytes() == figures
    assert (phase.output / "toy" / "toy_checkpoint_best.pt").read_bytes() == slow.weights(best).read_bytes()
    assert read_winner(phase.output / "toy").provenance["arm"] == "slow"


def test_a_thinned_trial_can_be_lengthened(tmp_path, monkeypatch):
    monkeypatch.setenv("AUTOENC_CACHE", str(tmp_path / "cache"))
    _, race, _ = run_command(real(tmp_path))
    table = (race.trials[1].run.trajectory.folder / "metrics.csv").read_text()
    epochs, race, _ = run_command(real(tmp_path, config={"train.epochs": 4}))
    assert epochs == [("quick_seed42", 4), *(("slow_seed42", epoch) for epoch in (1, 2, 3, 4))]
    assert (race.trials[1].run.trajectory.folder / "metrics.csv").read_text().startswith(table)


# No room at all ----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """8 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("only root may mount a disk")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path, small_disk, monkeypatch, capsys):
    """Two arms of 0.55 million parameters: 6.6 MB to go on from and 2.2 MB of weights each, and once more the former
    while it is written anew."""
    monkeypatch.setenv("AUTOENC_CACHE", str(tmp_path / "cache"))
    phase = real(tmp_path, config={"model.base_channels": 96, "train.epochs": 1})
    command = [str(phase.spec.path), "--dry-run", "--output"]
    assert tune_runner.main([*command, str(phase.output)]) == 0
    assert re.search(r" 18 MB on disk \([0-9,]+ [MG]B free\)", capsys.readouterr().out)
    with pytest.raises(InputError) as error:
        tune_runner.main([*command, str(small_disk / "out")])
    assert str(error.value) == (f"--output {small_disk}/out: 8 MB free, and the checkpoints of toy need 24 MB: make "
                                "room, or choose another --output")
    assert list(small_disk.iterdir()) == [] and not phase.output.exists()
    list(trained(phase, phase.race("cpu")))
    assert StoreBudget(phase.output, phase.spec.name, 1).size == pytest.approx(17.6e6, rel=0.05)     # as foreseen
