"""A sweep file: what its sections say, what is refused and in which words, and that no file breaks the reader."""

from __future__ import annotations

import copy
import math
import os
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from sweepfiles import ARMS, SWEEPS, load, places, refused, write

from autoenc import figures
from autoenc.errors import InputError
from autoenc.files import canonical_json
from autoenc.sweep.inherit import load_chain
from autoenc.sweep.parts import PARTS, Baseline, Decision
from autoenc.sweep.spec import Spec
from autoenc.yamlfile import dump_yaml, parse_yaml

EXAMPLES = int(os.environ.get("AUTOENC_EXAMPLES", "0"))          # mutations of the shipped sweeps


# What is left out, and what is given ---------------------------------------------------------------------------------


def test_what_a_sweep_leaves_out(tmp_path):
    spec = load(tmp_path, {"arms": ARMS})
    assert (spec.objective.metric, spec.objective.direction) == ("val/mse", "min")
    assert (spec.search.algorithm, spec.trials, spec.search.seed) == ("tpe", 2, 42)
    assert (spec.asha.grace_epochs, spec.asha.reduction_factor, spec.asha.margin) == (1, 3, 0.05)
    rule = spec.decision
    assert (rule.within, rule.evidence, rule.repeats) == (None, "observed", 1)
    assert (rule.prefer, rule.require, rule.baseline, rule.pick, rule.because) == ((), (), None, None, None)
    assert (spec.resources.cpus, spec.resources.gpus) == (1, "auto")
    assert (spec.export_name, spec.description, spec.inherits, spec.space) == ("toy", "", None, {})
    assert Baseline(arm="A").margin == 0.05


def test_every_section_is_read(tmp_path):
    content = parse_yaml("""
description: words
export_name: toy_AE
config: {train: {epochs: 20}, loss.l1: 0.5}
arms:
  F1: {loss.segmentation: 0, hypothesis: nothing helps}
  F2: {loss: {segmentation: 0.05, classification: 0}}
  F3:
space:
  loss.segmentation: {type: float, low: 0.005, high: 0.5, log: true, zero: true}
search: {algorithm: random, trials: 9, seed: 7}
asha: {grace_epochs: 3, margin: 7%}
objective: {metric: val/psnr}
decision:
  within: 2 %
  evidence: shown
  prefer: [{metric: val/palette_miou, mode: max, within: 1%}, {metric: latent/std, mode: max}]
  require: [{metric: val/ssim, min: 0.5}]
  baseline: {arm: F1, margin: 3e-1%, gains: [val/palette_miou]}
  repeats: 3
  pick: F2
  because: sharper doors
resources: {cpus: 4, gpus: 0.5}
""", "test")
    spec = load(tmp_path, content)
    assert spec.config == {"train.epochs": 20, "loss.l1": 0.5}
    assert {name: arm.settings for name, arm in spec.arms.items()} == {
        "F1": {"loss.segmentation": 0.0}, "F2": {"loss.segmentation": 0.05, "loss.classification": 0.0}, "F3": {}}
    assert (spec.arms["F1"].hypothesis, spec.arms["F2"].hypothesis) == ("nothing helps", "")
    assert spec.varied == ("loss.segmentation", "loss.classification")
    assert (spec.trials, spec.search.algorithm, spec.search.seed) == (9, "random", 7)
    assert (spec.asha.grace_epochs, spec.asha.reduction_factor, spec.asha.margin) == (3, 3, 0.07)
    assert (spec.objective.metric, spec.objective.direction) == ("val/psnr", "max")
    rule = spec.decision
    assert (rule.within, rule.evidence, rule.repeats, rule.pick, rule.because) == (
        0.02, "shown", 3, "F2", "sharper doors")
    assert [(p.metric, p.direction, p.within) for p in rule.prefer] == [
        ("val/palette_miou", "max", 0.01), ("latent/std", "max", 0.0)]
    assert (rule.require[0].metric, rule.require[0].min, rule.require[0].max) == ("val/ssim", 0.5, None)
    assert (rule.baseline.arm, rule.baseline.gains) == ("F1", ("val/palette_miou",))
    assert math.isclose(rule.baseline.margin, 0.003)
    assert (spec.resources.cpus, spec.resources.gpus) == (4, 0.5)
    assert (spec.export_name, spec.description) == ("toy_AE", "words")


def test_later_layers_over_earlier(tmp_path):
    base = {"config": {"train": {"epochs": 4, "batch_size": 8}}, "asha": {"grace_epochs": 2, "margin": 0.1},
            "search": {"seed": 1}, "decision": {"within": 0.1}}
    write(tmp_path / "presets", "brief", {"config": {"train": {"epochs": 2}}, "asha": {"margin": 0.3}})
    content = {"arms": ARMS, "config": {"train.epochs": 6}, "asha": {"margin": 0.2}}
    spec = load(tmp_path, content, base=base)
    assert (spec.base["train.epochs"], spec.config["train.epochs"]) == (4, 6)
    assert (spec.asha.grace_epochs, spec.asha.margin, spec.search.seed, spec.decision.within) == (2, 0.2, 1, 0.1)
    spec = load(tmp_path, content, base=base, presets=["brief"])
    assert (spec.config["train.epochs"], spec.asha.margin, spec.asha.grace_epochs) == (2, 0.3, 2)
    sets = ["train.epochs=9", "asha.margin=50%", "search.seed=3"]
    spec = load(tmp_path, content, base=base, presets=["brief"], sets=sets)
    assert (spec.config["train.epochs"], spec.asha.margin, spec.search.seed) == (9, 0.5, 3)
    assert load(tmp_path, content, base=base, sets=["asha=false"]).asha is None
    assert load(tmp_path, {"arms": ARMS, "asha": False}, base=base).asha is None
    assert load(tmp_path, {"arms": ARMS, "asha": False}, base=base, sets=["asha.margin=1%"]).asha.margin == 0.01


def test_values_are_kept_typed_so_that_notation_changes_nothing(tmp_path):
    one = load(tmp_path, {"arms": {"A": {"loss.l1": 1}, "B": {}}, "config": {"loss.mse": 2},
                          "decision": {"within": "5%"}})
    two = load(tmp_path, {"arms": {"A": {"loss": {"l1": 1.0}}, "B": None}, "config": {"loss": {"mse": 2.0}},
                          "decision": {"within": 0.05}})
    assert one.content_hash == two.content_hash


CHANGES = [{"arms": {"A": {"loss.l1": 0.5}, "B": {}}}, {"arms": {"B": {}, "A": {"loss.l1": 1}}},
           {"config": {"loss.mse": 2}}, {"asha": False}, {"asha": {"margin": 0.1}}, {"search": {"trials": 3}},
           {"search": {"algorithm": "random"}},
           {"objective": {"metric": "val/ssim"}}, {"decision": {"within": 0.05}}, {"decision": {"repeats": 2}},
           {"space": {"loss.l1": {"type": "float", "low": 0, "high": 2}}},
           {"decision": {"prefer": [{"metric": "parameters"}]}}, {"decision": {"pick": "B"}}]


def test_the_content_changes_with_all_that_matters_and_nothing_else(tmp_path):
    content = {"arms": {"A": {"loss.l1": 1}, "B": {}}, "space": {"loss.l1": {"type": "float", "low": 0, "high": 1}}}
    same = [{"description": "other"}, {"resources": {"cpus": 2}}, {"export_name": "other"},
            {"config": {"data.cache_dir": "elsewhere"}}, {"objective": {"metric": "val/mse", "mode": "min"}}]
    spec = load(tmp_path, content)
    assert {load(tmp_path, {**content, **change}).content_hash for change in same} == {spec.content_hash}
    hashes = [load(tmp_path, {**content, **change}).content_hash for change in CHANGES]
    assert len({spec.content_hash, *hashes}) == len(hashes) + 1
    assert parse_yaml(dump_yaml(spec.content), "file") == spec.content


# What is refused -----------------------------------------------------------------------------------------------------

SPACE = {"loss.l1": {"type": "float", "low": 0.1, "high": 1}}
REFUSED = [
    ({"arm": {}}, "unknown key 'arm' (did you mean 'arms'?)"),
    ({"decisions": {}}, "unknown key 'decisions' (did you mean 'decision'?)"),
    ({"config": {"train": {"epoch": 3}}}, "config: 'train.epoch' is no setting (did you mean 'train.epochs'?)"),
    ({"config": {"train": {"epochs": "x"}}}, "config: train.epochs: 'x': input should be a valid integer"),
    ({"config": {"data": {"image_size": 40}}}, "data.image_size: 40 is not divisible by 16"),
    ({"config": 3}, "config: 3 should be a mapping"),
    ({"description": 3}, "description: 3 should be text"),
    ({"arms": [1]}, "arms: [1] should be a mapping"),
    ({"arms": {"A": 3}}, "arms.A: 3 should be a mapping"),
    ({"arms": {"a b": {}}}, "arms: 'a b' should be a name"),
    ({"arms": {"../x": {}}}, "arms: '../x' should be a name"),
    ({"arms": {1: {}}}, "arms: 1 should be a name"),
    ({"arms": {"A": {"loss.sgmentation": 1}}},
     "arms.A: 'loss.sgmentation' is no setting (did you mean 'loss.segmentation'?)"),
    ({"arms": {"A": {"loss.l1": "x"}}}, "arms.A: loss.l1: 'x': input should be a valid number"),
    ({"arms": {"A": {"hypothesis": 3}}}, "arms.A: hypothesis: 3 should be text"),
    ({"arms": {"A": {"model.downsampling_steps": 7}}}, "arms.A: data.image_size: 64 is not divisible by 128"),
    ({"arms": {"A": {"data.limit": 10}}}, "data.limit cannot be varied"),
    ({"arms": {"A": {"train.seed": 1}}}, "train.seed cannot be varied"),
    ({"space": {"data.image_size": {"type": "choice", "choices": [64]}}}, "data.image_size cannot be varied"),
    ({"space": SPACE}, "search.trials: a space without arms needs it"),
    ({"arms": ARMS, "search": {"trials": 3}}, "search.trials: 3 is more than the arms (2)"),
    ({"arms": ARMS, "space": SPACE, "search": {"algorithm": "grid"}}, "space.loss.l1: search.algorithm grid needs"),
    ({"arms": ARMS, "search": {"algorithm": "gird"}}, "search: algorithm: 'gird': input should be 'tpe', 'gp', 'ran"),
    ({"arms": ARMS, "search": {"trails": 3}}, "search: unknown key 'trails' (did you mean 'trials'?)"),
    ({"arms": ARMS, "asha": 3}, "asha: 3 should be a mapping of grace_epochs, reduction_factor, margin or false"),
    ({"arms": ARMS, "asha": {"margin": "5"}}, "asha: margin: '5': should be a share like 5% or 0.05"),
    ({"arms": ARMS, "asha": {"margin": -1}}, "asha: margin: -1: input should be greater than or equal to 0"),
    ({"arms": ARMS, "asha": {"reduction_factor": 1}}, "asha: reduction_factor: 1: input should be greater than or"),
    ({"arms": ARMS, "objective": {"metric": "val/mze"}}, "objective: metric: 'val/mze': is no figure (did you mean "
                                                          "'val/mse'?)"),
    ({"arms": ARMS, "objective": {"mode": "max"}}, "objective: mode: 'max': val/mse is better when smaller"),
    ({"arms": ARMS, "decision": {"prefer": [{"metrik": "parameters"}]}}, "decision: unknown key 'prefer.0.metrik' "
                                                                         "(did you mean 'metric'?)"),
    ({"arms": ARMS, "decision": {"prefer": {"metric": "parameters"}}}, "decision: prefer: {'metric': 'parameters'}: "
                                                                       "should be a list"),
    ({"arms": ARMS, "decision": {"prefer": [{"metric": "val/ssim", "mode": "min"}]}}, "prefer.0: mode: 'min'"),
    ({"arms": ARMS, "decision": {"require": [{"metric": "val/psnr"}]}}, "require.0: a requirement on val/psnr needs"),
    ({"arms": ARMS, "decision": {"baseline": {"arm": "C"}}}, "decision.baseline: arm: 'C' is no arm (known: A, B)"),
    ({"arms": ARMS, "decision": {"pick": "C"}}, "decision.pick: 'C' is no arm (known: A, B)"),
    ({"arms": ARMS, "decision": {"because": "so"}}, "because: gives a reason, but nothing is picked"),
    ({"arms": ARMS, "decision": {"evidence": "shown"}}, "evidence: shown needs repeats of at least 2"),
    ({"arms": ARMS, "decision": {"repeats": 0}}, "decision: repeats: 0: input should be greater than or equal to 1"),
    ({"arms": ARMS, "resources": {"gpus": "all"}}, "resources: gpus: 'all': should be auto, a fraction of one GPU"),
    ({"arms": ARMS, "resources": {"gpus": 1.5}}, "resources: gpus: 1.5: should be auto"),
    ({"arms": ARMS, "resources": {"gpus": True}}, "resources: gpus: True: should be auto"),
    ({"arms": ARMS, "resources": {"cpus": 0}}, "resources: cpus: 0: input should be greater than or equal to 1"),
    ({"name": "other"}, "name: 'other' should begin with the file's own name, 'toy'"),
    ({"name": None}, "name: None should be a word"),
    ({"name": "toy/../x"}, "name: 'toy/../x' should be a word"),
    ({"export_name": "a b"}, "export_name: 'a b' should be a word"),
    ({"inherits": 3}, "inherits: 3 should be the path of a sweep file"),
    ([1, 2], "should be a sweep: a mapping"),
    ("", "should be a sweep: a mapping"),
    ("a: [", "line 1"),
]


@pytest.mark.parametrize(("content", "said"), REFUSED, ids=[said for _, said in REFUSED])
def test_refused_with_file_key_and_value(tmp_path, content, said):
    assert said in refused(tmp_path, content)


def test_several_problems_are_told_together(tmp_path):
    lines = refused(tmp_path, {"config": {"train.epoch": 1}, "decisions": {}, "asha": {"margin": "x"}}).split("\n")
    assert len(lines) == 3
    lines = refused(tmp_path, {"arms": {"A": {"loss.l": 1}, "B": {"train.epochs": 0, "loss.kl": -1}, "C D": {}},
                               "space": {"loss.x": {}, "loss.l1": {"type": "float"}}, "export_name": ""}).split("\n")
    assert len(lines) == 8


WEIGHTED = [
    {"objective": {"metric": "val/loss"}},
    {"objective": {"metric": "train/loss"}},
    {"config": {"train.monitor": "val/loss"}},
    {"decision": {"prefer": [{"metric": "val/loss"}]}},
    {"decision": {"require": [{"metric": "val/loss", "max": 1}]}},
    {"decision": {"baseline": {"arm": "A", "gains": ["val/loss"]}}},
]
WEIGHING = [
    {"arms": {"A": {"loss.l1": 0.5}, "B": {}}},
    {"arms": {"A": {"model.variational": True}, "B": {}}},
    {"arms": {"A": {}}, "space": {"loss.kl": {"type": "float", "low": 0.1, "high": 1}}, "search": {"trials": 3}},
]


@pytest.mark.parametrize("varied", WEIGHING, ids=["arm", "variational", "space"])
@pytest.mark.parametrize("used", WEIGHTED, ids=["objective", "train", "monitor", "prefer", "require", "gains"])
def test_no_measure_that_the_candidates_re_weight(tmp_path, used, varied):
    assert "is the weighted sum of the losses, and this sweep varies" in refused(tmp_path, {**varied, **used})
    load(tmp_path, {"arms": ARMS, **used})                # where no weight varies it is a measure like others


def test_an_arm_cannot_monitor_what_it_re_weights(tmp_path):
    arms = {"A": {"loss.l1": 0.5}, "B": {"train.monitor": "val/loss"}}
    assert "arms.B: train.monitor: 'val/loss' is the weighted sum" in refused(tmp_path, {"arms": arms})
    space = {"train.monitor": {"type": "choice", "choices": ["val/mse", "val/loss"]}}
    said = refused(tmp_path, {"arms": {"A": {"loss.l1": 0.5}}, "space": space, "search": {"trials": 3}})
    assert "space.train.monitor: 'val/loss' is the weighted sum" in said


def test_a_name_that_is_the_folder_of_all_trajectories(tmp_path):
    path = write(tmp_path, "store", {"arms": ARMS})
    with pytest.raises(InputError, match="name: 'store' is what the folder of all trajectories is called"):
        load_chain(path)


# Any file at all -----------------------------------------------------------------------------------------------------

SHIPPED = {path.relative_to(SWEEPS).as_posix(): path.read_text(encoding="utf-8")
           for path in sorted([*SWEEPS.glob("*.yaml"), *SWEEPS.glob("presets/*.yaml")])}
KEYWORDS = [*PARTS, *Decision.model_fields, "name", "inherits", "arms", "space", "config", "metric", "mode", "type",
            "low", "high", "choices", "when", "log", "zero", "steps", "hypothesis", "model.latent_channels", "loss.kl",
            "train", "train.seed", "data.manifest", "train.patience", "model.heads", "asha", "description"]
WILD = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=6), st.sampled_from(KEYWORDS),
    st.sampled_from([math.nan, math.inf, 10**290, -1, 0, 1e308, "5%", "~me/x", "../base.yaml", "phase1_4.yaml",
                     "x" * 300, "val/loss", "max", "float", "int", "choice", "ünïcode ☃", "a\x85b", ""]),
    st.builds(list), st.builds(dict),
    st.sampled_from(sorted(figures.MODES)))
VALUES = st.recursive(WILD, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
    st.sampled_from(KEYWORDS) | st.text(max_size=4), inner, max_size=3), max_leaves=5)


@st.composite
def mutants(draw: st.DrawFn) -> tuple[str, str]:
    """A shipped file's name and a text for it."""
    name = draw(st.sampled_from(sorted(SHIPPED)))
    content = yaml.safe_load(SHIPPED[name])
    for _ in range(draw(st.integers(0, 3))):
        spots = places(content)
        if not spots:
            break
        holder, key = draw(st.sampled_from(spots))
        what = draw(st.sampled_from(["drop", "retype", "misspell", "nest", "deepen", "move", "add"]))
        if what == "drop":
            del holder[key]
        elif what == "misspell" and isinstance(holder, dict):
            near = [f"{key}s", str(key)[:-1], str(key)[::-1], f" {key}", None, 3]
            holder[draw(st.sampled_from(near))] = holder.pop(key)
        elif what == "nest":
            holder[key] = {draw(st.sampled_from(KEYWORDS)): holder[key]}
        elif what == "deepen":
            for _ in range(draw(st.integers(1, 40))):
                holder[key] = [holder[key]]
        elif what == "move":
            other, there = draw(st.sampled_from(spots))
            other[there] = copy.deepcopy(holder[key])
        elif what == "add" and isinstance(holder, dict):
            holder[draw(st.sampled_from(KEYWORDS))] = draw(VALUES)
        else:
            holder[key] = draw(VALUES)
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=draw(st.booleans()))
    lines = text.split("\n")
    for _ in range(draw(st.integers(0, 2))):                    # what only a text can be
        at = draw(st.integers(0, len(lines) - 1))
        what = draw(st.sampled_from(["nothing", "twice", "indent", "cut", "insert"]))
        if what == "twice":
            lines.insert(at, lines[at])
        elif what == "indent":
            lines[at] = f"  {lines[at]}"
        elif what == "cut":
            lines[at] = lines[at][: len(lines[at]) // 2]
        elif what == "insert":
            lines.insert(at, draw(st.sampled_from([
                "x: &a [1]", "y: *a", "<<: {a: 1}", "? [k]", "!!set {a}", "a: !!binary x", "---", "...", "\t", "- 1",
                "n: " + "9" * 400, "d: " + "[" * 50, "}", "#", "é: ☃", 'u: "\\ud800"', 'z: "\\0"', "b: 0x_"])))
    return name, "\n".join(lines)


@pytest.fixture(scope="module")
def sweeps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweeps")
    (folder / "presets").mkdir()
    for name, text in SHIPPED.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def check_mutant(folder: Path, name: str, text: str) -> bool:
    """Load a chain with the mutated file in it; whether that went well. Anything but an InputError escapes."""
    path = folder / name
    path.write_text(text, encoding="utf-8")
    try:
        preset = [path.stem] if path.parent.name == "presets" else []
        chain = load_chain(folder / "phase1_4.yaml" if preset or name == "base.yaml" else path, preset)
    except InputError as error:
        for line in str(error).split("\n"):
            assert line.startswith((str(folder), "--preset")), line
            assert len(line) < 1500
        return False
    else:
        assert all(isinstance(spec, Spec) for spec in chain)
        for spec in chain:
            canonical_json(spec.content)
            assert parse_yaml(dump_yaml(spec.content), "content") == spec.content
        return True
    finally:
        path.write_text(SHIPPED[name], encoding="utf-8")


@settings(max_examples=EXAMPLES or 300, deadline=None)
@given(mutants())
def test_any_mutation_of_a_shipped_file_is_a_spec_or_an_input_error(sweeps, mutant):
    check_mutant(sweeps, *mutant)


@pytest.mark.slow
@settings(max_examples=EXAMPLES or 10_000, deadline=None)
@given(mutants())
def test_ten_thousand_mutations(sweeps, mutant):
    check_mutant(sweeps, *mutant)


def test_the_mutations_reach_both_ends(sweeps):
    """The property above would hold of a reader that refuses, or takes, everything."""
    assert check_mutant(sweeps, "phase1_2.yaml", SHIPPED["phase1_2.yaml"])
    assert check_mutant(sweeps, "presets/quick.yaml", SHIPPED["presets/quick.yaml"])
    assert not check_mutant(sweeps, "presets/quick.yaml", "config: {train: {epochs: 0}}")
    assert not check_mutant(sweeps, "phase1_2.yaml", SHIPPED["phase1_2.yaml"] + "arms: {}")
