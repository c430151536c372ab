from __future__ import annotations

import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pages import NASTY, Page

from autoenc.config import Config
from autoenc.report.index import entries, write_index
from autoenc.sweep.inherit import winner_hash
from autoenc.yamlfile import dump_yaml


def winner_of(output, name, arm, parents=None, channels=4, **provenance) -> str:
    """A sweep's folder as deciding leaves it; the hash of its winner."""
    folder = output / name
    folder.mkdir(parents=True, exist_ok=True)
    settings = {**Config().flat(), "data.image_size": 64, "model.downsampling_steps": 3,
                "model.latent_channels": channels}
    nested: dict = {}
    for key, value in settings.items():
        part, setting = key.split(".")
        nested.setdefault(part, {})[setting] = value
    (folder / "best_config.yaml").write_text(dump_yaml({"config": nested, "provenance": {
        "format": 1, "sweep": name, "arm": arm, "parents": parents or {},
        "content": {"arms": [[arm, {}]], "space": {}},
        "scores": {"metric": "val/mse", "score": 0.0324, "se": 0.0005, "seeds": [1, 2, 3]}, **provenance}}))
    (folder / "decision.json").write_text(json.dumps({"winner": arm, "candidates": [{}, {}], "reasons": []}))
    (folder / "report.html").write_text("x")
    event(folder, "decided", winner=arm)
    return winner_hash(settings)


def event(folder, kind, **more) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "events.jsonl").open("a") as file:
        file.write(json.dumps({"time": "2026-01-02T03:04:05Z", "event": kind, **more}) + "\n")


@pytest.fixture
def output(tmp_path):
    """one -> two -> {three, four}; five runs, six was interrupted."""
    one = winner_of(tmp_path, "one", "A", concessions={"one": 0.1})
    two = winner_of(tmp_path, "two", "B", {"one": one}, channels=5, concessions={"one": 0.1, "two": 0.1})
    for name in ("three", "four"):
        winner_of(tmp_path, name, "C", {"one": one, "two": two}, channels=6)
    for name in ("five", "six"):
        event(tmp_path / name, "started", trial="X_seed1")
    (tmp_path / "store" / "0123").mkdir(parents=True)
    shutil.copytree(tmp_path / "one", tmp_path / "one.old1")
    return tmp_path


def page_of(output, running=None) -> Page:
    write_index(output, running)
    return Page((output / "index.html").read_text(encoding="utf-8"))


def test_chain_branches_where_several_inherit_from_one(output):
    text = page_of(output).text()
    first = text[:text.index("All sweeps")]
    assert [first.index(name) for name in ("one", "two", "four", "three")] == sorted(
        first.index(name) for name in ("one", "two", "four", "three"))
    found = {entry.name: entry for entry in entries(output)}
    assert [entry.name for entry in found["two"].below] == [] and found["four"].above == "two"
    assert "B val/mse 0.03240 ± 0.0005 latent 320 conceded 10% (21% in all)" in first
    depth = page_of(output)
    assert depth.depths["ul"] == 3                                    # one; two in it; three and four in that


def test_table_has_every_sweep_with_its_state_and_links(output):
    page = page_of(output, running="five")
    assert page.row("one")[1:6] == ["decided", "A", "val/mse 0.03240 ± 0.0005000", "2", "2026-01-02 03:04:05 UTC"]
    assert page.row("five")[1] == "running" and page.row("six")[1:4] == ["unfinished", "—", "—"]
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a" and "href" in attributes]
    assert {"one/report.html", "one/best_config.yaml", "four/report.html"} <= set(links)
    assert all((output / link).is_file() for link in links)
    names = {row[0] for row in page.tables[0]}
    assert not names & {"store", "one.old1"}
    assert any(a.get("http-equiv") == "refresh" for tag, a in page.tags if tag == "meta")
    assert not any(a.get("http-equiv") == "refresh" for tag, a in page_of(output).tags if tag == "meta")


def test_a_winner_that_was_decided_anew_makes_what_builds_on_it_stale(output):
    winner_of(output, "one", "Z", channels=9)
    stale = {entry.name: entry.stale for entry in entries(output)}
    assert stale == {"one": False, "two": True, "three": True, "four": True, "five": False, "six": False}


def test_broken_and_undecided_sweeps_are_shown_as_such(output):
    (output / "two" / "best_config.yaml").write_text("config: [")
    (output / "three" / "decision.json").write_text("[[[")
    (output / "four" / "best_config.yaml").unlink()
    (output / "five" / "events.jsonl").write_text('{"event": "decided", "winner": null}\n{"ev')
    page = page_of(output)
    assert page.row("two")[1].startswith("broken") and page.row("two")[2] == "—"
    assert page.row("three")[4] == "—" and page.row("three")[2] == "C"
    assert page.row("four")[1] == "no winner" and page.row("five")[1] == "no winner"
    assert "one" in page.text()[:page.text().index("All sweeps")]


def test_nothing_yet(tmp_path):
    assert "None yet." in page_of(tmp_path).text()


def test_text_from_files_is_never_markup(tmp_path):
    winner_of(tmp_path, "one", NASTY, scores={"metric": NASTY, "score": NASTY, "se": [1], "seeds": "x"},
              concessions={"one": 0.5})
    page = page_of(tmp_path)
    assert page.count("script") == 0 and page.count("img") == 0 and NASTY in page.text()
    assert all(not attributes.get("src") for _, attributes in page.tags)


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
                    max_leaves=8)


@settings(max_examples=60, deadline=None)
@given(st.fixed_dictionaries({}, optional={key: JSON for key in (
    "parents", "content", "concessions", "scores", "hash", "arm")}), JSON, JSON)
def test_whatever_a_hand_wrote_into_the_files_gives_a_page(tmp_path_factory, provenance, decision, last):
    output = tmp_path_factory.mktemp("output")
    winner_of(output, "one", "A", **{key: value for key, value in provenance.items() if key not in ("arm", "parents")})
    (output / "one" / "decision.json").write_text(json.dumps(decision))
    (output / "one" / "events.jsonl").write_text(json.dumps(last) + "\n" + json.dumps({"event": last, "time": last}))
    state = page_of(output).row("one")[1]
    assert state.startswith("broken") or state in ("decided", "no winner", "unfinished")
