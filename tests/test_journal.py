from __future__ import annotations

import math
import random
import tempfile
import warnings
from pathlib import Path

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState
from racing import KNOB, Lab, decision_of, levels

from autoenc.sweep.importance import importances
from autoenc.sweep.journal import study_of, write_journal
from autoenc.sweep.missed import missed

COMPLETE, PRUNED, FAIL = TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL
STATES = {"completed": COMPLETE, "stopped": PRUNED, "diverged": FAIL, "failed": FAIL,
          "waiting": TrialState.WAITING, "running": TrialState.RUNNING}
VAE = {"model.variational": {"type": "choice", "choices": [True, False]},
       "loss.kl": {"type": "float", "low": 1e-6, "high": 1e-2, "log": True, "when": {"model.variational": True}}}
ZERO = {"loss.l1": {"type": "float", "low": 0.01, "high": 1.0, "log": True, "zero": True}}
BOTH = {"within": 0.02, "prefer": [{"metric": "val/palette_miou"}]}


@pytest.fixture
def lab(tmp_path):
    return lambda curve=levels, **content: Lab(tmp_path, curve, **content)


def read(path: Path, name: str = "toy") -> optuna.Study:
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path)))
    return optuna.load_study(study_name=name, storage=storage)


def journal_of(race, folder: Path) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.INFO)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_journal(folder / "optuna.log", race)
    assert optuna.logging.get_verbosity() == optuna.logging.ERROR          # it says nothing of each study
    assert [path.name for path in folder.glob("*optuna*")] == ["optuna.log"]
    return read(folder / "optuna.log")


def test_a_trial_a_candidate_as_it_ended(lab, tmp_path):
    ends = {0.2: "diverged", 0.3: "failed"}
    curve = lambda config: [*levels(config)[:2], ends.get(config.train.weight_decay, levels(config)[2]),   # noqa: E731
                            *levels(config)[3:]]
    arms = {name: {KNOB: value} for name, value in (("A", 0.1), ("B", 0.4), ("C", 0.2), ("D", 0.3), ("E", 0.101))}
    race = lab(curve, arms=arms, asha={"margin": 2.0}, decision={"within": 0.02, "repeats": 2}).run()
    study = journal_of(race, tmp_path)
    assert study.direction.name == "MINIMIZE" and study.metric_names == ["val/mse"]
    assert [trial.state for trial in study.trials] == [COMPLETE, PRUNED, FAIL, FAIL, COMPLETE]
    first, stopped, diverged, _, near = study.trials
    assert (first.params, first.value) == ({KNOB: 0.1}, pytest.approx(0.1125))
    assert first.intermediate_values == pytest.approx({epoch: 0.1 * (1 + 1 / epoch) for epoch in range(1, 9)})
    assert first.user_attrs == {
        "arm": "A", "seed": 42, "status": "completed", "epochs": 8, "best epoch": 8, "val/mse": pytest.approx(0.1125),
        "val/mse (seed 43)": pytest.approx(0.1125)}
    assert first.duration.total_seconds() == pytest.approx(8 * 0.5)
    assert stopped.value == pytest.approx(0.8) and "behind the best" in stopped.user_attrs["note"]
    assert diverged.user_attrs["note"] == "diverged at epoch 3, step 1: loss not finite"
    assert near.user_attrs["arm"] == "E" and "val/mse (seed 43)" in near.user_attrs


def test_a_sweep_on_its_way(lab, tmp_path):
    here = lab(arms={"A": {KNOB: 0.1}, "B": {KNOB: 0.2}})
    race = here.race()
    here.step(race, race.next())
    study = journal_of(race, tmp_path)
    assert [trial.state.name for trial in study.trials] == ["RUNNING", "WAITING"]
    assert study.trials[0].intermediate_values == {1: 0.2} and study.trials[1].params == {KNOB: 0.2}
    again = journal_of(here.run(), tmp_path)                             # written anew
    assert [trial.state for trial in again.trials] == [COMPLETE, PRUNED]


def test_what_is_searched_by_two_objectives(lab, tmp_path):
    def curve(config):
        if config.train.weight_decay == 0.3:
            return [{"val/mse": 0.1}] * 8
        return [{"val/mse": value, "val/palette_miou": 0.9} for value in levels(config)]

    race = lab(curve, arms={"A": {KNOB: 0.1}, "B": {KNOB: 0.5}, "C": {KNOB: 0.3}}, decision=BOTH,
               space={KNOB: {"type": "float", "low": 0.1, "high": 0.5}}, search={"trials": 4}).run()
    study = journal_of(race, tmp_path)
    assert [direction.name for direction in study.directions] == ["MINIMIZE", "MAXIMIZE"]
    assert study.metric_names == ["val/mse", "val/palette_miou"]
    first, stopped, without, _ = study.trials
    assert (first.values, first.state) == ([pytest.approx(0.1125), 0.9], COMPLETE)
    assert (stopped.values, stopped.state) == (None, PRUNED)
    assert (without.values, without.state, without.user_attrs["status"]) == (None, FAIL, "completed")
    assert stopped.user_attrs["val/mse by epoch"] == [1.0] and len(first.user_attrs["val/mse by epoch"]) == 8


def test_how_settings_are_told(lab):
    """By the space's range where all values are in it, else by what there is; a setting that a condition turns off is
    left out."""
    space = {**VAE, **ZERO, "model.base_channels": {"type": "int", "low": 16, "high": 64, "step": 16},
             KNOB: {"type": "float", "low": 0.001, "high": 1.0, "log": True}}
    arms = {"A": {KNOB: 5.0, "loss.l1": 0.5, "train.ema": 0.9}, "B": {"loss.l1": 0.0},
            "C": {"model.variational": True, "loss.kl": 1e-3, "model.heads": ["rgb"], "train.epochs": 4}}
    first, second, third = study_of(lab(arms=arms, space=space, search={"trials": 3}).run()).trials
    assert first.params == {KNOB: 5.0, "loss.l1": 0.5, "train.ema": 0.9, "model.variational": False,
                            "model.heads": None, "train.epochs": 8, "model.base_channels": 32}
    assert (third.params["loss.kl"], third.params["model.heads"], second.params["train.ema"]) == (1e-3, '["rgb"]', None)
    assert third.distributions == {**first.distributions, "loss.kl": FloatDistribution(1e-6, 1e-2, log=True)}
    assert first.distributions == {
        KNOB: FloatDistribution(0.01, 5.0), "loss.l1": FloatDistribution(0.0, 0.5),       # an arm outside; exact 0
        "model.base_channels": IntDistribution(16, 64, step=16), "train.epochs": IntDistribution(4, 8),
        "model.variational": CategoricalDistribution([True, False]), "train.ema": CategoricalDistribution([0.9, None]),
        "model.heads": CategoricalDistribution([None, '["rgb"]'])}


@settings(max_examples=10, deadline=None)
@given(space=st.sampled_from([{}, VAE, ZERO, {**VAE, **ZERO}]), more=st.integers(0, 5), slots=st.integers(1, 3),
       algorithm=st.sampled_from(["tpe", "random", "quasi_random"]), rule=st.sampled_from([{}, BOTH, {"repeats": 2}]),
       arms=st.lists(st.dictionaries(st.sampled_from([KNOB, "loss.l1", "loss.kl"]), st.floats(0, 2)),
                     min_size=1, max_size=4), seed=st.integers(0, 99), steps=st.integers(0, 40))
def test_a_journal_is_read_as_it_was_written(space, more, slots, algorithm, rule, arms, seed, steps):
    """Whatever is varied, and wherever the sweep is broken off."""
    def curve(config):
        draw = random.Random(repr(config.identity()))
        rows = [{"val/mse": draw.uniform(0.5, 1), "val/palette_miou": draw.choice([math.nan, 0.5])} for _ in range(4)]
        return [draw.choice([*rows, "diverged"]) if draw.random() < 0.1 else row for row in rows]

    with tempfile.TemporaryDirectory() as folder:
        search = {"algorithm": algorithm, "trials": len(arms) + more * bool(space)}
        here = Lab(Path(folder), curve, config={"train": {"epochs": 4}}, decision=rule, space=space, search=search,
                   arms={f"A{number}": arm for number, arm in enumerate(arms)})
        race = here.race()
        for _ in range(steps):
            running = [run for run in race.runs.values() if run.state == "running"]
            if len(running) < slots and (run := race.next()) is not None:
                running.append(run)
            if running:
                here.step(race, random.Random(seed).choice(running))
        study = journal_of(race, Path(folder))
        first = [trial for trial in race.trials if trial.seed == 42]
        assert [trial.user_attrs["arm"] for trial in study.trials] == [trial.candidate.name for trial in first]
        for trial, found in zip(first, study.trials, strict=True):
            flat, score = trial.run.config.flat(), race.score(trial.run)
            assert {**flat, **found.params} == flat and set(found.params) <= set(race.spec.varied)
            assert all(key in found.params or flat["model.variational"] is False for key in race.spec.varied)
            if found.state != STATES[trial.run.state]:
                assert found.state == (FAIL if trial.run.state == "completed" else TrialState.RUNNING)    # paused
            elif found.state == COMPLETE:
                assert found.values[0] == score
            if len(study.directions) == 1:
                assert found.intermediate_values == {
                    epoch: race.score(trial.run, epoch) for epoch in range(1, len(trial.run.rows) + 1)}
        in_memory = [(trial.state, trial.values, trial.params, trial.user_attrs) for trial in study_of(race).trials]
        assert in_memory == [(trial.state, trial.values, trial.params, trial.user_attrs) for trial in study.trials]


# Importances ----------------------------------------------------------------------------------------------------------

SEARCHED = {KNOB: {"type": "float", "low": 0.005, "high": 0.5, "log": True, "zero": True},
            "loss.l1": {"type": "float", "low": 0.001, "high": 1.0, "log": True}, **VAE}


def effect_of(size: float):
    """Noise, and so much of an effect of the knob."""
    def curve(config):
        draw = random.Random(repr(sorted(config.identity().items(), key=str)))
        return [0.1 + size * abs(math.log10(config.train.weight_decay + 1e-3) + 1.5) + draw.gauss(0, 0.01)]
    return curve


def searched(lab, curve, trials: int, **content):
    return lab(curve, space=SEARCHED, search={"algorithm": "random", "trials": trials}, asha=False,
               config={"train": {"epochs": 1}}, **content).run()


@pytest.mark.parametrize("mode", ["min", "max"])
def test_the_parameter_that_matters_is_found(lab, mode):
    def curve(config):
        return [{"val/mse": value, "val/ssim": 1 - value} for value in effect_of(0.5)(config)]

    found = importances(searched(lab, curve, 40, objective={"metric": "val/mse" if mode == "min" else "val/ssim"}))
    assert set(found) == set(SEARCHED) and sum(found.values()) == pytest.approx(1)
    assert next(iter(found)) == KNOB and found[KNOB] > 0.8


def test_what_makes_no_difference_has_no_importance(lab):
    assert importances(searched(lab, lambda config: [0.5], 30)) is None
    assert importances(searched(lab, effect_of(0.0), 30, name="toy_noise")) is None


def test_few_points_have_no_importances(lab):
    assert importances(searched(lab, effect_of(0.5), 7)) is None


def test_arms_that_are_no_points_of_the_space_have_no_say(lab):
    arms = {f"A{i}": {KNOB: 0.01 * (i + 1), "model.base_channels": 8} for i in range(10)}
    race = lab(effect_of(0.5), arms=arms, space=SEARCHED, search={"trials": 10}, asha=False,
               config={"train": {"epochs": 1}}).run()
    assert len(race.trials) == 10 and importances(race) is None


# What the greedy phases missed ----------------------------------------------------------------------------------------

class Joint(Lab):
    """A sweep that starts from another one's winner, its baseline."""

    def __init__(self, folder: Path, noise: float, **content) -> None:
        (folder / "above.yaml").write_text("name: above\narms: {A: {}}\n")
        space = {KNOB: {"type": "choice", "choices": [0.05, 0.1, 0.2]},
                 "model.latent_channels": {"type": "choice", "choices": [4, 8, 16]}}
        super().__init__(folder, self.noisy(noise), **{
            "inherits": "above.yaml", "arms": {"greedy": {}}, "space": space, "asha": False,
            "search": {"algorithm": "grid", "trials": 9}, "config": {"train": {"epochs": 1, "weight_decay": 0.1}},
            "decision": {"within": 0.1, "prefer": [{"metric": "latent_size"}], "repeats": 3,
                         "baseline": {"arm": "greedy"}}, **content})

    level = staticmethod(lambda knob, channels: 1.0)

    def noisy(self, noise: float):
        def curve(config):
            draw = random.Random(f"{config.train.weight_decay} {config.model.latent_channels} {config.train.seed}")
            level = self.level(config.train.weight_decay, config.model.latent_channels)
            return [{"val/mse": level * (1 + noise * draw.uniform(-1, 1)),
                     "latent_size": float(16 * config.model.latent_channels)}]
        return curve


def said(folder: Path, level, noise: float = 0.01, **content) -> list:
    folder.mkdir()
    here = type("Here", (Joint,), {"level": staticmethod(level)})(folder, noise, **content)
    race = here.run()
    return [(remark.text, remark.warning) for remark in missed(race, decision_of(race))]


def test_what_the_joint_search_says_of_the_greedy_phases(tmp_path):
    [(text, warning)] = said(tmp_path / "same", lambda knob, channels: 1.5 if channels == 4 else 1.0, noise=0.02)
    assert text == "nothing that the joint search tried beats the greedy winner (greedy) beyond the noise"
    assert not warning
    [(text, warning)] = said(tmp_path / "better", lambda knob, channels: {4: 1.5}.get(channels, 1 - (knob == 0.2) / 9))
    assert warning and text.startswith("the greedy phases missed something: S")
    assert " against greedy: val/mse 11% better (95% interval: " in text
    assert text.endswith("at the same latent_size (128)")
    [(text, warning)] = said(tmp_path / "smaller", lambda knob, channels: 1.2 if channels == 4 and knob < 0.2 else 1.0)
    assert warning and "missed something: the rule takes S" in text and "at latent_size 64 instead of 128" in text
    [(text, warning)] = said(tmp_path / "larger", lambda knob, channels: 1.6 / channels)
    assert not warning and text.startswith("the rule takes S") and text.endswith("at latent_size 256 instead of 128")


def test_one_seed_says_little_of_the_greedy_phases(tmp_path):
    rule = {"within": 0.1, "prefer": [{"metric": "latent_size"}], "baseline": {"arm": "greedy"}}
    [(text, warning)] = said(tmp_path / "one", lambda knob, channels: {4: 2.0, 8: 1.0, 16: 0.99}[channels] - knob / 10,
                             noise=0.0, decision=rule | {"pick": "greedy"})
    assert not warning and text.startswith("the greedy phases may have missed something: S") and "one seed" in text


def test_other_sweeps_are_not_spoken_of(tmp_path):
    level = lambda knob, channels: knob                                                       # noqa: E731
    for number, content in enumerate((
            {"decision": {"within": 0.1}}, {"arms": {"greedy": {KNOB: 0.2}}}, {"search": {"trials": 1}},
            {"inherits": None})):
        assert said(tmp_path / str(number), level, **content) == []
    curve = lambda knob, channels: math.nan if (knob, channels) == (0.1, 8) else 1.0          # noqa: E731
    [(text, warning)] = said(tmp_path / "broken", curve)
    assert warning and text.endswith("is not known: greedy, their winner, cannot be compared")
