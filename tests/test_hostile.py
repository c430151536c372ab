"""Hostile stored files of every kind, checkpoints and configurations. (Sweep files: test_spec.py; data:
test_hostile_data.py.)

By default some hundreds of mutations, with AUTOENC_EXAMPLES or ``-m slow`` ten thousand and more.
"""

import io
import json
import math
import os
import pickle
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hostile import MANY, QUIET, Finished, Outcome, examples, few, spoil_bytes, spoil_tree, within
from hypothesis import given, settings
from hypothesis import strategies as st

from autoenc.checkpoint import load_model
from autoenc.config import load_config
from autoenc.errors import InputError
from autoenc.sweep.inherit import read_winner
from autoenc.table import csv_text, parse_rows
from autoenc.train import main as train_command
from autoenc.trajectory import Trajectory

LONGER = ("--set", "train.epochs=4")
TRIALS = ["second/C_seed42", "first/B_seed42", "second/D_seed42", "second/E_seed42"]    # C is the winner, and first's
OF_A_TRIAL = ["metrics.csv", "status.json", "latest.pt", "best.pt", "best_epoch_0002.pt", "figures.json", "config.yaml"]
OF_A_SWEEP = ["events.jsonl", "trials.csv", "decision.json", "best_config.yaml"]
MODES = ["again", "anew", "longer"]      # the last takes a second, the others a tenth of that


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Iterator[Finished]:
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTOENC_CACHE", str(folder / "cache"))
        patch.delenv("RAY_ADDRESS", raising=False)
        yield Finished(folder)


def stored(finished: Finished) -> list[str]:
    """Every file that the mutations are about, relative to the output folder."""
    found = [f"store/{finished.key(trial)}/{name}" for trial in TRIALS for name in OF_A_TRIAL]
    found += [f"{sweep}/{name}" for sweep in ("first", "second") for name in OF_A_SWEEP]
    return [name for name in found if (finished.output / name).is_file()]


def run(finished: Finished, output: Path, mode: str) -> Outcome:
    """Again: the same command. Anew: it has to decide once more. Longer: and to go on training."""
    if mode == "anew":
        for sweep in ("first", "second"):
            (output / sweep / "best_config.yaml").unlink(missing_ok=True)
    return finished.run(output, *(LONGER if mode == "longer" else ()))


@pytest.fixture(scope="module")
def usual(finished) -> dict[str, Outcome]:
    """What the command does and decides in each mode where nothing is broken."""
    return {mode: run(finished, finished.copy(), mode) for mode in MODES}


def test_what_the_mutations_start_from(finished, usual):
    """The winner stands on the first sweep's, one trial is stopped; nothing is trained but by the longer budget."""
    first, longer = finished.first, usual["longer"]
    assert first.code == 0 and sorted(first.trained.values()) == [1, 2, 2, 2] and b"behind at" in first.decisions[1]
    assert len(stored(finished)) > 30
    for mode in ("again", "anew"):
        assert usual[mode].code == 0 and not usual[mode].trained and usual[mode].decisions == first.decisions
    assert longer.code == 0 and sorted(longer.trained.values()) == [2, 2, 2] and longer.decisions != first.decisions


@st.composite
def mutations(draw: st.DrawFn, finished: Finished) -> tuple[str, bytes]:
    """A stored file and what to put in its place."""
    name = draw(st.sampled_from(stored(finished)))
    raw = (finished.output / name).read_bytes()
    how = draw(st.sampled_from(["bytes", "content", "content"]))
    if how == "bytes" or name.endswith(".pt"):
        return name, spoil_bytes(draw, raw)
    if name.endswith((".json", ".jsonl")):
        lines = raw.decode().splitlines() if name.endswith("l") else [raw.decode()]
        at = draw(st.integers(0, len(lines) - 1))
        lines[at] = json.dumps(spoil_tree(draw, json.loads(lines[at])))
        return name, "\n".join([*lines, ""]).encode()
    if name.endswith(".yaml"):
        text = yaml.safe_dump(spoil_tree(draw, yaml.safe_load(raw)), sort_keys=False, allow_unicode=True)
        return name, text.encode("utf-8", "surrogatepass")
    table = [line.split(",") for line in raw.decode().splitlines()]
    cells = st.sampled_from(["nan", "inf", "-inf", "-1", "1e999", "", '"', "x", "1" * 400, "0", "," * 5000])
    spoilt = spoil_tree(draw, table, cells)
    rows = spoilt if isinstance(spoilt, list) else [spoilt]
    text = "\n".join(",".join(map(str, row)) if isinstance(row, list) else str(row) for row in rows)
    return name, (text + draw(st.sampled_from(["\n", "", ",", "\n\n"]))).encode("utf-8", "surrogatepass")


def says_something_else(finished: Finished, output: Path, name: str) -> bool:
    """Whether a file that was changed is still a good one: then nobody can tell, and what it says holds."""
    before, path = finished.output / name, output / name
    if path.name == "metrics.csv":
        rows, whole = (parse_rows(file.read_bytes().decode("utf-8", "replace")) for file in (path, before))
        return csv_text(rows) != csv_text(whole[:len(rows)])
    if path.name == "status.json":
        return bool(Trajectory(path.parent).status().get("diverged"))
    if path.name == "figures.json":
        found = [[Trajectory(file.parent).figures(epoch) for epoch in (1, 2, 3, 4)] for file in (path, before)]
        return found[0] != found[1] and any(found[0])
    if path.name == "events.jsonl":
        lines, known = path.read_bytes().splitlines(), before.read_bytes().splitlines()
        return any(line not in known for line in lines)
    if path.name == "best_config.yaml":
        try:
            winners = read_winner(path.parent), read_winner(before.parent)
        except InputError:
            return False
        return winners[0].settings != winners[1].settings
    return False


def check(finished: Finished, usual: dict[str, Outcome], name: str, content: bytes, mode: str) -> Outcome:
    """Break one file and run the command: it ends, decides as before, and trains again what only that file held."""
    output = finished.copy()
    (output / name).write_bytes(content)
    other, broken = says_something_else(finished, output, name), is_no_winner(output / name)
    outcome, reference = run(finished, output, mode), usual[mode]
    assert not list(output.glob("store/*/traceback.txt")), outcome.said
    if other:
        return outcome
    assert outcome.code == 0, outcome.said
    again = 2 if name.endswith(".pt") else 1 if name == f"store/{finished.key('second/E_seed42')}/metrics.csv" else 0
    for key in {*outcome.trained, *reference.trained}:
        more = outcome.trained[key] - reference.trained[key]
        assert 0 <= more <= (again if key == Path(name).parent.name else 0), outcome.said
    if (mode, Path(name).name) != ("again", "decision.json"):
        assert outcome.decisions == reference.decisions, outcome.said
    for sweep in ("first", "second"):
        assert read_winner(output / sweep) is not None
        load_model(output / sweep / f"{sweep}_checkpoint_best.pt")
    if broken and mode != "anew":
        assert (output / f"{name}.broken").read_bytes() == content
        assert mode != "again" or (output / name).read_bytes() == (finished.output / name).read_bytes()
    return outcome


def is_no_winner(path: Path) -> bool:
    """Whether this is a best_config.yaml that cannot be read."""
    try:
        return path.name == "best_config.yaml" and read_winner(path.parent) is None
    except InputError as error:
        return str(path) in str(error)


def spoil_stored(finished: Finished, usual: dict[str, Outcome], draw: st.DrawFn, modes: list[str]) -> None:
    name, content = draw(mutations(finished))
    with within(120):
        check(finished, usual, name, content, draw(st.sampled_from(modes)))


@examples(50)
@given(st.data())
def test_a_mutated_stored_file_costs_what_it_held(finished, usual, data):
    spoil_stored(finished, usual, data.draw, MODES[:2])


@pytest.mark.slow
@settings(QUIET, max_examples=MANY)
@given(st.data())
def test_ten_thousand_stored_files(finished, usual, data):
    spoil_stored(finished, usual, data.draw, MODES)


@pytest.mark.parametrize("how", ["folder", "full folder", "dangling", "gone"])
@pytest.mark.parametrize("modes", few(1, [MODES[:2], MODES]))
@examples(10)
@given(st.data())
def test_something_else_in_the_place_of_a_stored_file(finished, usual, how, modes, data):
    """A folder where a file should be is told; a link to nowhere or nothing at all is made good."""
    name = data.draw(st.sampled_from(stored(finished)))
    mode = data.draw(st.sampled_from([mode for mode in modes if mode != "anew" or "best_config" not in name]))
    output = finished.copy()
    path = output / name
    path.unlink()
    if how == "dangling":
        path.symlink_to(output / "nowhere" / "at all")
    elif how != "gone":
        path.mkdir()
        if how == "full folder":
            (path / "x").write_text("x")
    outcome = run(finished, output, mode)
    assert not list(output.glob("store/*/traceback.txt")), outcome.said
    for key, epochs in outcome.trained.items():
        assert epochs <= usual[mode].trained[key] + (2 if key == path.parent.name else 0)
    if outcome.code:
        assert "folder" in how or path.name == "events.jsonl"
        assert outcome.code == 1 and path.name in outcome.said and "irectory" in outcome.said, outcome.said
    elif mode != "again":
        assert outcome.code == 0 and outcome.decisions == usual[mode].decisions, outcome.said
    assert not (output / "nowhere").exists()


class Trap:
    """Makes a file as it is unpickled by whoever runs what a pickle tells it to."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def traps(folder: Path) -> dict[str, bytes]:
    """Files with code in them, in all ways in which torch has ever written checkpoints, and whole files of others."""
    trap, found = Trap(folder / "sprung"), {}
    for kind, options in {"zip": {}, "legacy": {"_use_new_zipfile_serialization": False}}.items():
        for name, content in {"bare": trap, "inside": {"format": 1, "model": trap}}.items():
            file = io.BytesIO()
            torch.save(content, file, **options)
            found[f"{kind} {name}"] = file.getvalue()
    found["pickle"] = pickle.dumps(trap)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("hello.txt", "a zip of something else")
    found["zip of text"] = file.getvalue()
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), file)
    found["script"] = file.getvalue()
    return found


@pytest.mark.filterwarnings("ignore")        # torch warns of what it is asked to write and to read here
@pytest.mark.parametrize("name", ["latest.pt", pytest.param("best_epoch_0002.pt", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", few(1, ["zip inside", "zip bare", "legacy bare", "legacy inside", "pickle",
                                         "zip of text", "script"]))
def test_code_in_a_checkpoint_never_runs(finished, usual, tmp_path, name, kind):
    """Such a latest.pt is set aside, its epochs are trained again, and all comes out as it was."""
    content = traps(tmp_path)[kind]
    output = finished.copy()
    path = output / "store" / finished.key("first/B_seed42") / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=re.escape(str(path))):
        load_model(path)
    outcome = run(finished, output, "longer")
    assert not (tmp_path / "sprung").exists()
    assert outcome.code == 0 and outcome.decisions == usual["longer"].decisions, outcome.said
    assert outcome.trained - usual["longer"].trained == (
        {finished.key("first/B_seed42"): 2} if name == "latest.pt" else {})
    if name == "latest.pt":
        assert path.with_name("latest.pt.broken").read_bytes() == content and "latest.pt.broken" in outcome.said
        assert any(event["event"] == "warning" for event in events(output / "first"))


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def change(content: dict[str, Any], **parts: Any) -> dict[str, Any]:
    return {**content, **parts}


@pytest.mark.parametrize("spoil", few(1, [
    lambda c: change(c, best=10**100), lambda c: change(c, best=-1), lambda c: change(c, best=3),
    lambda c: change(c, epoch=10**9), lambda c: change(c, epoch=-1), lambda c: change(c, format=2),
    lambda c: change(c, rows=[{1: 2.0}, {1: 2.0}]), lambda c: change(c, rows=[{"epoch": torch.zeros(1)}] * 2),
    lambda c: change(c, rows=c["rows"][:1]), lambda c: change(c, rows=[*c["rows"][:1], {**c["rows"][1], "epoch": 3}]),
    lambda c: change(c, rows=[{**row, "seconds": math.nan} for row in c["rows"]]),
    lambda c: change(c, config={}), lambda c: change(c, config={"model": 3}), lambda c: change(c, config={"x": {}}),
    lambda c: change(c, optimizer=[]), lambda c: {"format": 1}, lambda c: [c], lambda c: {1: c},
]))
def test_a_checkpoint_with_other_content_is_set_aside(finished, usual, spoil):
    output = finished.copy()
    key = finished.key("second/D_seed42")
    path = output / "store" / key / "latest.pt"
    torch.save(spoil(torch.load(path, weights_only=True)), path)
    outcome = run(finished, output, "longer")
    assert outcome.code == 0 and outcome.decisions == usual["longer"].decisions, outcome.said
    assert outcome.trained - usual["longer"].trained == {key: 2}
    assert path.with_name("latest.pt.broken").is_file() and "latest.pt.broken" in outcome.said


@pytest.mark.parametrize("at", few(2, [0.5, -46, 0.2, 0.8, 0, -22]))
def test_a_flipped_bit_of_a_checkpoint_is_noticed(finished, usual, at):
    """Among the weights, where torch reads on; in the archive's end, which then points to nowhere."""
    output = finished.copy()
    key = finished.key("second/D_seed42")
    for name in ("latest.pt", "best_epoch_0002.pt"):
        content = bytearray((output / "store" / key / name).read_bytes())
        content[int(at * len(content)) if isinstance(at, float) else at] ^= 128
        (output / "store" / key / name).write_bytes(content)
    trajectory = Trajectory(output / "store" / key)
    assert trajectory.whole_weights(2) is None and (trajectory.folder / "best_epoch_0002.pt.broken").is_file()
    outcome = run(finished, output, "longer")
    assert outcome.code == 0 and outcome.decisions == usual["longer"].decisions, outcome.said
    assert outcome.trained - usual["longer"].trained == {key: 2} and "latest.pt.broken" in outcome.said


NO_NUMBERS = [math.nan, math.inf, -math.inf, "0.5", None, [], {}, True, 10**400, -(10**400)]
JUNK_EVENTS = [
    *({"event": "stopped", "value": value} for value in NO_NUMBERS),
    *({"event": "stopped", "best": value} for value in NO_NUMBERS),
    *({"event": "stopped", "cutoff": value} for value in NO_NUMBERS),
    *({"event": "stopped", "epoch": epoch} for epoch in ("1", 1.0, True, [1], None, math.nan, -1, 0, 10**400)),
    *({"event": "stopped", "beaten_by": keys} for keys in ("D", 3, None, {}, [3], [["D"]], [])),
    *({"event": "stopped", "key": key} for key in ("x", 3, None, [], {}, ["x"])),
    *({"event": kind, "epoch": epoch} for kind in ("passed", "continued") for epoch in ("1", [], {}, True, math.nan)),
    *({"event": kind} for kind in ([], {}, 3, None, "x" * 10_000, ["stopped"])),
    *({"event": "suggested", "settings": point} for point in (3, [], {"x": 1}, {"train.epochs": math.nan}, {"": {}})),
    *({"event": "stopped", "metric": metric} for metric in ([], {}, None, "val/psnr")),
    {"event": "space exhausted", "space": [], "candidates": "x"}, {"event": "diverged", "epoch": 1}]


@pytest.mark.parametrize("mode", few(1, ["anew", "longer"]))
def test_events_of_wrong_types_are_passed_over(finished, usual, mode):
    """After the true ones, about a trial that completed."""
    output = finished.copy()
    stop = {"event": "stopped", "trial": "D_seed42", "key": finished.key("second/D_seed42"), "epoch": 1, "value": 9.0,
            "cutoff": 0.1, "best": 0.1, "beaten_by": [finished.key("second/C_seed42")], "metric": "val/mse"}
    with (output / "second" / "events.jsonl").open("a") as file:
        file.writelines(json.dumps(stop | junk) + "\n" for junk in JUNK_EVENTS)
        file.write("[" * 100_000 + "\n" + "3\n\n" + '{"event": "stopped", "key"')
    outcome = run(finished, output, mode)
    assert outcome.code == 0 and outcome.trained == usual[mode].trained, outcome.said
    assert outcome.decisions == usual[mode].decisions


def test_a_stop_of_right_types_is_not_passed_over(finished, usual):
    """The test above would hold where no event is read."""
    output = finished.copy()
    stop = next(event for event in events(output / "second") if event["event"] == "stopped")
    with (output / "second" / "events.jsonl").open("a") as file:
        file.write(json.dumps(stop | {"key": finished.key("second/D_seed42"), "value": 9.0}) + "\n")
    assert run(finished, output, "anew").decisions != usual["anew"].decisions


@examples(60)
@given(st.data())
def test_a_mutated_configuration_is_read_or_told(finished, data):
    """By ``python -m autoenc.train``, which then writes nothing; what is read could be trained."""
    path, target = finished.folder / "mutant.yaml", finished.folder / "nothing"
    raw = (finished.output / "second" / "best_config.yaml").read_bytes()
    path.write_bytes(spoil_bytes(data.draw, raw) if data.draw(st.booleans()) else yaml.safe_dump(
        spoil_tree(data.draw, yaml.safe_load(raw)), allow_unicode=True).encode("utf-8", "surrogatepass"))
    try:
        load_config(path)
    except InputError as error:
        assert all(line.startswith(str(path)) for line in str(error).split("\n"))
        with pytest.raises(InputError, match="mutant"):
            train_command([str(path), "--output", str(target)])
        assert not target.exists()


@examples(60)
@given(st.data())
def test_a_mutated_checkpoint_is_a_model_or_told(finished, data):
    path = finished.folder / "mutant.pt"
    raw = finished.output / "second" / "second_checkpoint_best.pt"
    if data.draw(st.booleans()):
        path.write_bytes(spoil_bytes(data.draw, raw.read_bytes()))
    else:
        content = torch.load(raw, weights_only=True)
        part = data.draw(st.sampled_from(["config", "shapes", "metrics", "epoch", "format"]))
        content[part] = spoil_tree(data.draw, content[part])
        torch.save(content, path)
    try:
        model = load_model(path)
    except InputError as error:
        assert "mutant.pt" in str(error) or "loss." in str(error)
    else:
        assert model.encode(torch.zeros(1, 3, 16, 16))["latent"].shape[0] == 1
