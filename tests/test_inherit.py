"""Chains of sweeps: parents, layers, overrides, what may not be overwritten, and when a result is stale."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sweepfiles import ARMS, load, refused, write

from autoenc.config import Config
from autoenc.errors import InputError
from autoenc.sweep import inherit
from autoenc.sweep.inherit import Winner, load_chain, load_chains, parse_override, starting_point
from autoenc.trajectory import FORMAT
from autoenc.yamlfile import dump_yaml, parse_yaml

STEPS = {"S3": {"model.downsampling_steps": 3}, "S5": {"model.downsampling_steps": 5}}


@pytest.fixture
def family(tmp_path):
    """first <- second <- third over base.yaml, with a preset."""
    write(tmp_path, "base", {"config": {"data": {"image_size": 32}, "train": {"epochs": 5}}, "search": {"seed": 1}})
    write(tmp_path, "first", {"inherits": "base.yaml", "name": "first_steps", "arms": STEPS})
    write(tmp_path, "second", {"inherits": "first.yaml", "config": {"train.epochs": 7}, "arms": ARMS})
    write(tmp_path, "third", {"inherits": "second.yaml", "arms": {"V": {"model.variational": True}, "W": None}})
    write(tmp_path / "presets", "brief", {"config": {"train": {"batch_size": 4}}})
    return tmp_path


def chain(family: Path, *sets: str, presets: tuple[str, ...] = (), sweep: str = "third") -> list[inherit.Spec]:
    return load_chain(family / f"{sweep}.yaml", presets, [parse_override(text) for text in sets])


def wrong(family: Path, *sets: str, presets: tuple[str, ...] = (), sweep: str = "third") -> str:
    with pytest.raises(InputError) as error:
        chain(family, *sets, presets=presets, sweep=sweep)
    return str(error.value)


# Chains -------------------------------------------------------------------------------------------------------------


def test_the_first_phase_comes_first_and_parts_come_from_the_base_not_the_parent(family):
    specs = chain(family)
    assert [spec.name for spec in specs] == ["first_steps", "second", "third"]
    assert [spec.inherits and spec.inherits.name for spec in specs] == [None, "first.yaml", "second.yaml"]
    assert [spec.base["train.epochs"] for spec in specs] == [5, 5, 5]
    assert [spec.config.get("train.epochs") for spec in specs] == [None, 7, None]
    assert [spec.search.seed for spec in specs] == [1, 1, 1]


def test_without_inherits_the_base_beside_it_is_the_start(family):
    write(family, "alone", {"arms": ARMS})
    assert chain(family, sweep="alone")[0].base["train.epochs"] == 5


@pytest.mark.parametrize(("links", "circle"), [
    ({"first": "first.yaml"}, "first.yaml -> first.yaml"),
    ({"first": "third.yaml"}, "third.yaml -> second.yaml -> first.yaml -> third.yaml"),
    ({"first": "./presets/../second.yaml"}, "second.yaml -> first.yaml -> second.yaml"),
])
def test_a_circle_is_told(family, links, circle):
    for stem, parent in links.items():
        write(family, stem, {"inherits": parent, "arms": ARMS})
    assert wrong(family) == f"{family / 'third.yaml'}: inherits goes in a circle: {circle}"


def test_a_circle_through_links_is_told(family):
    (family / "linked.yaml").symlink_to(family / "linked.yaml")
    assert str(family / "linked.yaml") in wrong(family, sweep="linked")


@pytest.mark.parametrize("parent", ["secnd.yaml", "x" * 5000 + ".yaml", "presets", "no/where.yaml"])
def test_a_missing_parent_is_told(family, parent):
    write(family, "third", {"inherits": parent, "arms": ARMS})
    message = wrong(family)
    assert message.startswith(f"{family / 'third.yaml'}: inherits: ") and "no such file" in message
    assert ("did you mean 'second.yaml'?" in message) == (parent == "secnd.yaml")
    assert len(message) < 500


def test_a_missing_sweep_names_the_near_one(family):
    assert wrong(family, sweep="thrid") == f"{family / 'thrid.yaml'}: no such file (did you mean 'third.yaml'?)"


def test_a_parent_without_a_name_is_a_base_and_holds_no_arms(family):
    (family / "second.yaml").write_text("arms: {A: {train.epochs: 3}}")
    assert wrong(family) == f"{family / 'second.yaml'}: unknown key 'arms' (a preset or base file holds no such key)"


def test_an_error_in_any_sweep_of_the_chain_names_its_file(family):
    write(family, "first", {"name": "first_steps", "arms": {"A": {"train.epoch": 3}}})
    assert wrong(family).startswith(f"{family / 'first.yaml'}: arms.A: 'train.epoch' is no setting")


def test_two_sweeps_of_a_chain_with_one_name(family):
    write(family, "th", {"inherits": "third.yaml", "name": "third", "arms": ARMS})
    assert "two sweeps of its chain share a name (first_steps, second, third, third)" in wrong(family, sweep="th")


def test_paths_are_relative_to_the_file_and_in_set_to_the_working_directory(family, tmp_path, monkeypatch):
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    write(family, "second", {"inherits": "first.yaml", "config": {"data.palette": "colours.yaml"}, "arms": ARMS})
    write(family / "presets", "brief", {"config": {"data": {"manifest": "maps.csv"}}})
    spec = chain(family, "data.cache_dir=cache", presets=("brief",))[1]
    assert spec.config["data.palette"] == str(family / "colours.yaml")
    assert spec.config["data.manifest"] == str(family / "presets" / "maps.csv")
    assert spec.config["data.cache_dir"] == str(work / "cache")


# Presets and --set ---------------------------------------------------------------------------------------------------


def test_overrides_reach_every_sweep_or_the_one_named(family):
    specs = chain(family, "train.epochs=2", "second:train.batch_size=8", "first_steps:train.patience=null",
                  "asha.margin=20%", "third:asha=false", presets=("brief",))
    assert [spec.config["train.epochs"] for spec in specs] == [2, 2, 2]
    assert [spec.config["train.batch_size"] for spec in specs] == [4, 8, 4]
    assert [spec.config.get("train.patience", "none") for spec in specs] == [None, "none", "none"]
    assert [spec.asha and spec.asha.margin for spec in specs] == [0.2, 0.2, None]
    assert [s.config["train.epochs"] for s in chain(family, "train.epochs=2", "train.epochs=3")] == [3, 3, 3]


@pytest.mark.parametrize("key", ["model.downsampling_steps=4", "train.learning_rate=0.1", "model.variational=true",
                                 "third:train.learning_rate=0.1"])
def test_a_set_that_would_overwrite_a_decision_names_the_sweep(family, key):
    varied = key.split(":")[-1].split("=")[0]
    name, path = {"model.downsampling_steps": ("first_steps", family / "first.yaml"),
                  "train.learning_rate": ("second", family / "second.yaml"),
                  "model.variational": ("third", family / "third.yaml")}[varied]
    assert wrong(family, key) == (
        f"--set {key}: {varied} is what {name} ({path}) varies: fixing it would overwrite its decision")


def test_a_preset_that_would_overwrite_a_decision_names_the_sweep(family):
    path = write(family / "presets", "brief", {"config": {"model": {"variational": True}}})
    message = wrong(family, presets=("brief",))
    assert message.startswith(f"{path}: model.variational is what third ")
    chain(family, presets=("brief",), sweep="second")                       # where third is not of the chain


def test_presets_are_looked_for_beside_the_sweep_then_in_the_project(family):
    assert wrong(family, presets=("breif",)).startswith("--preset breif: no presets/breif.yaml beside ")
    assert "did you mean 'brief'?" in wrong(family, presets=("breif",))
    assert "did you mean 'quick'?" in wrong(family, presets=("quik",))
    assert chain(family, presets=("quick",), sweep="first")[0].config["data.limit"] == 96
    write(family / "presets", "quick", {"config": {"data": {"limit": 5}}})
    assert chain(family, presets=("quick",))[0].config["data.limit"] == 5
    for name in ("../first", "presets/brief", "", "x" * 5000):
        assert wrong(family, presets=(name,)).startswith("--preset ")


@pytest.mark.parametrize(("text", "said"), [
    ("train.epochs", "should be KEY=VALUE or SWEEP:KEY=VALUE"),
    ("=3", "should be KEY=VALUE"),
    ("train.epochs=[1", "--set train.epochs=[1: line 1"),
    ("train.epoch=3", "--set train.epoch=3: 'train.epoch' is no setting (did you mean 'train.epochs'?)"),
    ("train.epochs=three", "--set train.epochs=three: train.epochs: 'three': input should be a valid integer"),
    ("train.epochs=", "--set train.epochs=: train.epochs: None: input should be a valid integer"),
    ("thrid:train.epochs=3", "no sweep 'thrid' runs here (did you mean 'third'?)"),
    ("asha=true", "asha takes false here"),
    ("asha.margn=3%", "asha: unknown key 'margn' (did you mean 'margin'?)"),
    ("decision.within=x", "--set decision.within=x: decision: within: 'x': should be a share like 5% or 0.05"),
    ("objective.metric=val/psnr", "--set objective.metric=val/psnr: 'objective.metric' is no setting"),
    ("arms.A=3", "'arms.A' is no setting"),
    ("data.manifest=~no-such-person/x", "--set data.manifest=~no-such-person/x: data.manifest: '~no-such-person/x'"),
    ("resources.gpus=1.5", "resources: gpus: 1.5: should be auto"),
])
def test_overrides_that_are_wrong(family, text, said):
    assert said in wrong(family, text)


def test_several_wrong_overrides_are_told_together(family):
    assert len(wrong(family, "train.epoch=3", "thrid:train.epochs=3", "asha.margin=x").split("\n")) == 3


def test_what_does_not_go_together_names_all_its_sources(family):
    message = wrong(family, "data.image_size=24", presets=("brief",))
    sources = f"{family / 'first.yaml'}, {family / 'presets' / 'brief.yaml'}, --set data.image_size=24: "
    assert message.startswith(sources)
    assert "data.image_size: 24 is not divisible by 16" in message


def test_several_sweeps_share_one_set_of_overrides(family):
    overrides = [parse_override("third:train.batch_size=2"), parse_override("train.epochs=3")]
    first, third = load_chains([family / "first.yaml", family / "third.yaml"], [], overrides)
    assert [spec.name for spec in first] == ["first_steps"]
    assert third[2].config["train.batch_size"] == 2
    assert first[0].config == third[0].config == {"train.epochs": 3}


# Image sizes ---------------------------------------------------------------------------------------------------------


def test_an_arm_whose_steps_do_not_divide_the_image(family):
    message = wrong(family, "data.image_size=48")
    assert "arms.S5: data.image_size: 48 is not divisible by 32" in message and "first.yaml" in message


def test_steps_that_a_parents_winner_may_have_divide_the_images_of_all_below(family):
    """first's own images are of 32 px; the sweep below it changes them."""
    assert wrong(family, "third:data.image_size=24") == (
        f"{family / 'third.yaml'}: data.image_size: 24 is not divisible by 32, and the winner of first_steps may have"
        " model.downsampling_steps 5")
    write(family, "third", {"inherits": "second.yaml", "config": {"data.image_size": 24, "model.downsampling_steps": 3},
                            "arms": {"A": {}}})
    chain(family)                                                           # third says itself how many
    write(family, "third", {"inherits": "second.yaml", "config": {"data.image_size": 24}, "arms": {"A": {}}})
    write(family, "first", {"name": "first_steps", "arms": {"S2": {"model.downsampling_steps": 2},
                                                            "S3": {"model.downsampling_steps": 3}}})
    chain(family)                                                           # whichever wins, 24 is divisible
    space = {"model.downsampling_steps": {"type": "int", "low": 2, "high": 4}}
    write(family, "first", {"name": "first_steps", "arms": {"S2": {"model.downsampling_steps": 2}}, "space": space,
                            "search": {"trials": 2}})
    assert "not divisible by 16, and the winner of first_steps" in wrong(family)


# The starting point --------------------------------------------------------------------------------------------------


def test_the_starting_point_is_the_parents_winner_under_the_sweeps_own_settings(family):
    first, second, third = chain(family, presets=("brief",))
    assert starting_point(first, None)["train.epochs"] == 5
    assert starting_point(first, None)["data.image_size"] == 32
    won = {**Config().flat(), "data.image_size": 32, "model.downsampling_steps": 5, "loss.l1": 0.25, "train.epochs": 99}
    start = starting_point(second, won)
    assert (start["model.downsampling_steps"], start["loss.l1"], start["train.epochs"]) == (5, 0.25, 7)
    assert start["train.batch_size"] == 4
    unknown = starting_point(third, None)                 # no winner yet: what the sweeps above fix, and could choose
    assert (unknown["train.epochs"], unknown["model.downsampling_steps"]) == (7, 3)
    with pytest.raises(InputError, match=r"second\.yaml.*image_size: 40 is not divisible by 32"):
        starting_point(second, {**won, "data.image_size": 40})


def test_candidates_are_the_arms_over_the_starting_point(family):
    first, second, _ = chain(family)
    found = inherit.arm_candidates(second, starting_point(second, None))
    assert [(c.name, c.config.train.learning_rate) for c in found] == [("A", 1e-3), ("B", 1e-4)]
    assert {c.config.train.epochs for c in found} == {7}
    found = inherit.arm_candidates(first, starting_point(first, None))
    assert [c.config.model.downsampling_steps for c in found] == [3, 5]


def test_a_sweep_that_varies_nothing_has_one_candidate(tmp_path):
    spec = load(tmp_path, {"config": {"train.epochs": 50}})
    candidate, = inherit.arm_candidates(spec, starting_point(spec, None))
    assert (candidate.name, candidate.settings, candidate.config.train.epochs) == ("parent", {}, 50)


# Winners and staleness -----------------------------------------------------------------------------------------------


def provenance(spec: inherit.Spec, parent: Winner | None = None, data: str = "data1") -> dict[str, Any]:
    return {"format": FORMAT, "arm": "A", "content_hash": spec.content_hash, "content": spec.content, "data": data,
            "parents": inherit.parent_hashes(parent)}


def win(folder: Path, spec: inherit.Spec, parent: Winner | None = None, **flat: Any) -> Winner:
    """A winner as a sweep leaves it, read back from its file."""
    config = {**starting_point(spec, parent and parent.settings), **flat}
    nested = {"config": config, "provenance": provenance(spec, parent)}
    (folder / "outputs" / spec.name).mkdir(parents=True, exist_ok=True)
    (folder / "outputs" / spec.name / "best_config.yaml").write_text(dump_yaml(nested))
    return inherit.read_winner(folder / "outputs" / spec.name)


def test_a_winner_is_read_back(family):
    first, *_ = chain(family)
    winner = win(family, first, **{"model.downsampling_steps": 5})
    assert winner.settings["model.downsampling_steps"] == 5
    assert winner.sweep == "first_steps"
    assert inherit.stale_reasons(first, winner, None, "data1") == []
    assert inherit.stale_reasons(first, winner, None, None) == []
    assert inherit.read_winner(family / "nowhere") is None


@pytest.mark.parametrize("content", ["", "[1]", "config: {}", "config: {}\nprovenance: 3", "provenance: {}",
                                     "config: {train.epoch: 3}\nprovenance: {}", "config: {}\nprovenance: {parents: 3}",
                                     "config: {train.epochs: -1}\nprovenance: {}",
                                     "config: {}\nprovenance: {content: []}",
                                     "config: [", "\x00"])
def test_a_broken_best_config_is_told(tmp_path, content):
    (tmp_path / "best_config.yaml").write_text(content)
    with pytest.raises(InputError, match=r"best_config\.yaml"):
        inherit.read_winner(tmp_path)


def test_without_a_winner_it_must_run(family):
    assert inherit.stale_reasons(chain(family)[0], None, None, "data1") == ["has no winner yet"]


CHANGES = [
    ({"decision": {"within": "2%"}}, ["decision.within: None -> 0.02"]),
    ({"decision": {"repeats": 3, "pick": "A"}}, ["decision.repeats: 1 -> 3", "decision.pick: None -> A"]),
    ({"config": {"train.epochs": 3}}, ["train.epochs: None -> 3"]),
    ({"asha": {"margin": 0.2}}, ["asha.margin: 0.05 -> 0.2"]),
    ({"asha": False}, ["asha changed"]),
    ({"objective": {"metric": "val/psnr"}}, ["objective.metric: val/mse -> val/psnr", "objective.mode: min -> max"]),
    ({"search": {"seed": 1}}, ["search.seed: 42 -> 1"]),
    ({"space": {"loss.l1": {"type": "float", "low": 0, "high": 1}}}, ["space.loss.l1: None -> "]),
    ({"arms": {"A": {"train.learning_rate": 0.5}, "B": {"train.learning_rate": 1e-4}}},
     ["arms.A: {'train.learning_rate': 0.001} -> {'train.lea"]),
    ({"arms": {"A": {"train.learning_rate": 1e-3}}}, ["arms.B: {'train.learning_rate': 0.0001} -> None"]),
    ({"arms": dict(reversed(ARMS.items()))}, ["the order of the arms changed"]),
    ({"description": "other"}, []), ({"resources": {"cpus": 2}}, []), ({"export_name": "x"}, []),
    ({"config": {"data.cache_dir": "x"}}, []),
]


@pytest.mark.parametrize(("change", "reasons"), CHANGES, ids=[str(change) for change, _ in CHANGES])
def test_what_makes_a_sweep_stale(tmp_path, change, reasons):
    spec = load(tmp_path, {"arms": ARMS})
    winner = win(tmp_path, spec)
    found = inherit.stale_reasons(load(tmp_path, {"arms": ARMS, **change}), winner, None, "data1")
    assert len(found) == len(reasons)
    assert all(said.startswith(reason) for said, reason in zip(found, reasons, strict=True))


def test_other_data_or_another_format_make_it_stale(tmp_path):
    spec = load(tmp_path, {"arms": ARMS})
    winner = win(tmp_path, spec)
    assert inherit.stale_reasons(spec, winner, None, "data2") == ["its data changed"]
    old = replace(winner, provenance={**winner.provenance, "format": 0})
    assert inherit.stale_reasons(spec, old, None, "data1") == [f"was written in format 0, this is {FORMAT}"]


def test_a_parents_other_winner_makes_it_stale(family):
    first, second, third = chain(family)
    above = win(family, first)
    middle = win(family, second, above)
    below = win(family, third, middle)
    assert inherit.stale_reasons(third, below, middle, "data1") == []
    assert list(inherit.parent_hashes(middle)) == ["first_steps", "second"]
    other = win(family, second, above, **{"train.learning_rate": 0.5})
    assert inherit.stale_reasons(third, below, other, "data1") == ["the winner of second changed"]
    moved = win(family, second, above, **{"data.cache_dir": "/elsewhere", "data.manifest": "/moved"})
    assert inherit.stale_reasons(third, below, moved, "data1") == []                # paths are not part of it
    again = win(family, second, win(family, first, **{"model.downsampling_steps": 5}))
    assert inherit.stale_reasons(third, below, again, "data1") == ["the winner of first_steps, second changed"]
    assert inherit.stale_reasons(third, below, None, "data1") == ["its parent, second.yaml, has no winner"]


def test_content_survives_its_way_through_provenance(family):
    for spec in chain(family, "decision.within=3%", presets=("brief",)):
        assert parse_yaml(dump_yaml(provenance(spec)), "file")["content"] == spec.content


def test_an_objective_that_the_sweep_re_weights_is_refused(tmp_path):
    message = refused(tmp_path, {"objective": {"metric": "val/loss"}, "arms": {"A": {"loss.kl": 0.1}, "B": {}}})
    assert "objective.metric: 'val/loss' is the weighted sum of the losses, and this sweep varies loss.kl" in message
