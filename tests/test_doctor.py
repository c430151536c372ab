"""Whether a VAE's latent tells of the image: what the figures amount to, on made up ones and on trained models."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import small_config, small_dataset
from hypothesis import given
from hypothesis import strategies as st
from pages import Sweep
from racing import Lab, decision_of, states

from autoenc.checkpoint import build_model
from autoenc.course import own_end
from autoenc.doctor import COLLAPSED, HEALTHY, IGNORED, LASTING, PARTLY, WORDS, Signs, diagnose, has_collapsed, signs_of
from autoenc.evaluation.posterior import posterior_figures
from autoenc.figures import OF_POSTERIORS
from autoenc.metrics import to_unit
from autoenc.sweep.final import remarks
from autoenc.sweep.store import Store
from autoenc.sweep.work import Task, work
from autoenc.train import train
from autoenc.trajectory import Trajectory

torch.set_num_threads(1)

DATASET = small_dataset(120)
VAE = {"model__variational": True, "train__patience": None, "train__learning_rate": 3e-3, "train__epochs": 8}

# What trains to what, with the small model on rectangles. The first has the source's weight, and no warm-up.
TRAINED = {
    "collapses": ({"loss__kl": 1.0, "model__downsampling_steps": 3}, COLLAPSED),
    "healthy": ({"loss__kl": 1e-3}, HEALTHY),
    "partly": ({"loss__kl": 0.1}, PARTLY),
    "hardly trained": ({"loss__kl": 1e-3, "train__epochs": 1, "train__learning_rate": 1e-6}, IGNORED),
}


@cache
def trained(name: str) -> SimpleNamespace:
    config = small_config(**{**VAE, **TRAINED[name][0]})
    *_, last = train(config, DATASET)
    model = build_model(config, DATASET)
    model.load_state_dict(last.state()["model"])
    found = posterior_figures(model.eval(), DATASET, DATASET.splits["val"])
    return SimpleNamespace(model=model, row={**last.metrics, **found})


@pytest.mark.parametrize("name", TRAINED)
def test_trained_models_are_told_apart(name):
    row = trained(name).row
    diagnosis = diagnose(signs_of(row))
    assert diagnosis.word == TRAINED[name][1], (diagnosis.text, row)
    assert bool(diagnosis.advice) == (name != "healthy")
    if name == "partly":
        dead = round(row["latent/kl_dead"] * 32)
        assert 3 < dead < 32 and f"{dead} of 32 dimensions tell nothing" in diagnosis.text


def test_a_collapsed_latent_decodes_like_any_other():
    row = trained("collapses").row
    assert row["latent/mse_shuffled"] == pytest.approx(row["latent/mse_own"], rel=0.05)
    assert row["latent/mse_prior"] == pytest.approx(row["latent/mse_own"], rel=0.05)
    healthy = trained("healthy").row
    assert healthy["latent/mse_shuffled"] > 1.5 * healthy["latent/mse_own"]


def test_figures_against_their_definitions():
    """Written out for one image at a time."""
    model, row = trained("partly").model, trained("partly").row
    images = to_unit(DATASET.images[DATASET.splits["val"]])
    with torch.inference_mode():
        encoded = [model.encode(image[None]) for image in images]
        kl = sum(0.5 * (e["mu"] ** 2 + e["logvar"].exp() - 1 - e["logvar"]) for e in encoded) / len(images)
        errors = np.array([[float((model.decode(e["mu"])["rgb"] - image).square().mean()) for image in images]
                           for e in encoded])
    assert row["latent/kl_dead"] == pytest.approx(float((kl < 0.01).double().mean()))
    assert float(kl.sum()) == pytest.approx(row["val/kl_nats"], rel=1e-4)
    assert row["latent/mse_own"] == pytest.approx(errors.diagonal().mean(), rel=1e-5)
    assert row["latent/mse_own"] == pytest.approx(row["val/mse"], rel=1e-5)
    others = errors[~np.eye(len(errors), dtype=bool)]
    assert others.min() < row["latent/mse_shuffled"] < others.max()
    assert row["latent/mse_shuffled"] == pytest.approx(others.mean(), rel=0.3)


def test_every_image_gets_another_ones_latent_and_no_more_images_than_are_needed(monkeypatch):
    monkeypatch.setattr("autoenc.evaluation.posterior.MOST_IMAGES", 5)
    model, every = trained("healthy").model, np.arange(len(DATASET.images))
    few = posterior_figures(model, DATASET, every)
    assert few == posterior_figures(model, DATASET, every) != posterior_figures(
        model, DATASET, every, seed=7)
    alone = posterior_figures(model, DATASET, every[:1])
    assert math.isnan(alone["latent/mse_shuffled"]) and alone["latent/mse_own"] > 0
    twins = replace(DATASET, images=np.repeat(DATASET.images[:1], 4, axis=0))
    same = posterior_figures(model, twins, np.arange(4))
    assert same["latent/mse_shuffled"] == pytest.approx(same["latent/mse_own"])


shares = st.floats(0, 1)


@given(st.integers(1, 4096), shares, st.floats(0, 1e4), st.one_of(st.just(math.nan), shares), st.floats(0, 4),
       st.one_of(st.just(math.nan), st.floats(0, 4)), st.one_of(st.just(math.nan), st.floats(0, 4)))
def test_any_figures_have_a_diagnosis_and_more_collapsed_dimensions_make_none_better(size, active, nats, dead, own,
                                                                                     shuffled, prior):
    signs = Signs(size, active, nats, dead, own, shuffled, prior)
    diagnosis = diagnose(signs)
    assert diagnosis.word in WORDS and diagnosis.text.startswith(diagnosis.word)
    assert 0 <= signs.collapsed_dimensions <= size
    if diagnosis.word != HEALTHY:
        assert diagnosis.advice
    worse = diagnose(replace(signs, dead=1.0, active=0.0, nats=0.0))
    assert worse.word == COLLAPSED


@pytest.mark.parametrize("change, word", [
    ({}, HEALTHY), ({"dead": 0.1}, HEALTHY), ({"dead": 0.2}, PARTLY), ({"dead": 0.99}, PARTLY),
    ({"dead": 1.0}, COLLAPSED),
    ({"own": 0.096}, IGNORED), ({"own": 0.094}, HEALTHY), ({"own": 0.1, "nats": 0.9}, COLLAPSED),
    ({"own": 0.1, "nats": 1.1}, IGNORED), ({"dead": math.nan, "active": 0.5}, PARTLY),
    ({"dead": math.nan, "active": 0.0, "shuffled": math.nan}, COLLAPSED), ({"shuffled": math.nan}, HEALTHY)])
def test_where_one_diagnosis_ends_and_the_next_begins(change, word):
    signs = Signs(dimensions=100, active=1.0, nats=50.0, dead=0.0, own=0.05, shuffled=0.1, prior=0.1)
    assert diagnose(replace(signs, **change)).word == word


def test_a_prior_that_decodes_badly_is_told_of_a_healthy_latent():
    signs = Signs(32, 1.0, 90.0, 0.0, own=0.05, shuffled=0.1, prior=0.3)
    diagnosis = diagnose(signs)
    assert diagnosis.word == HEALTHY and "3.0 times" in diagnosis.advice
    assert "N(0, I)" not in diagnose(replace(signs, prior=0.12)).text


def test_what_is_no_vae_has_no_signs():
    assert signs_of({"latent_size": 32.0, "latent/active_units": 1.0, "val/mse": 0.1}) is None
    assert not has_collapsed({"latent_size": 32.0, "latent/active_units": 0.0})


# As figures of a trial ------------------------------------------------------------------------------------------------

def test_a_worker_measures_them_of_a_vae_unasked(tmp_path, monkeypatch):
    monkeypatch.setenv("AUTOENC_CACHE", str(tmp_path / "cache"))
    tiny = {"data__limit": 40, "train__epochs": 1}
    for key, more in (("vae", {"model__variational": True, "loss__kl": 1e-3}), ("plain", {})):
        config = small_config(**tiny, **more)
        list(work(Task(key=key, output=str(tmp_path), config=config.flat(), threads=1, device="cpu")))
    found = {key: Store(tmp_path).open(key).figures(1).keys() for key in ("vae", "plain")}
    assert found == {"vae": {"encode_ms", *OF_POSTERIORS}, "plain": {"encode_ms"}}


def test_a_rule_that_names_them_waits_for_vaes_only(tmp_path):
    lab = Lab(tmp_path, arms={"vae": {"model.variational": True, "loss.kl": 1e-3}, "plain": {}}, asha=False,
              decision={"within": "100%", "prefer": [{"metric": "latent/kl_dead", "mode": "min"}]})
    for arm in ("vae", "plain"):
        lab.store_epochs(arm, 8)
    race = lab.race()
    assert not race.idle
    assert [race.missing_figures(trial.run) for trial in race.trials] == [["latent/kl_dead"], []]


# In the race ----------------------------------------------------------------------------------------------------------

GONE = {"latent_size": 32.0, "latent/active_units": 0.0, "val/kl_nats": 0.1}
ALIVE = {"latent_size": 32.0, "latent/active_units": 1.0, "val/kl_nats": 60.0}


def row(mse: float, alive: bool) -> dict[str, float]:
    return {"val/mse": mse, "train/mse": mse, "beta": 1.0, **(ALIVE if alive else GONE)}


def falling(config) -> list[dict[str, float]]:
    """A large weight has collapsed from epoch 2 on, and the smaller error."""
    heavy = config.loss.kl == 1.0
    return [row((0.1 if heavy else 0.2) / epoch, not heavy or epoch < 2) for epoch in range(1, config.train.epochs + 1)]


HEAVY, LIGHT = {"model.variational": True, "loss.kl": 1.0}, {"model.variational": True, "loss.kl": 1e-3}
STOP = {"train": {"stop_on_collapse": True}}


@pytest.mark.parametrize("slots", [1, 2])
def test_a_lasting_collapse_ends_a_trial_that_then_cannot_win(tmp_path, slots):
    lab = Lab(tmp_path, falling, arms={"heavy": HEAVY, "light": LIGHT}, config=STOP, asha=False)
    race = lab.run(slots)
    assert states(race) == {"heavy_seed42": ("completed", 1 + LASTING), "light_seed42": ("completed", 8)}
    decision = decision_of(race)
    standing = {item["arm"]: item["standing"] for item in decision["candidates"]}
    assert decision["winner"] == "light" and standing == {"heavy": "collapsed", "light": "winner"}
    reasons = next(item["reasons"] for item in decision["candidates"] if item["arm"] == "heavy")
    assert reasons == ["heavy_seed42: collapsed: no dimension of the latent active in epochs 2 to 4, ended there "
                       "(train.stop_on_collapse)"]
    assert not lab.events("diverged", "failed", "stopped")
    again = lab.race()                                                             # out of the store: the same
    assert again.idle and decision_of(again) == decision


def test_without_it_a_collapsed_trial_is_trained_on_and_may_win(tmp_path):
    lab = Lab(tmp_path, falling, arms={"heavy": HEAVY, "light": LIGHT}, asha=False)
    race = lab.run()
    assert set(states(race).values()) == {("completed", 8)} and decision_of(race)["winner"] == "heavy"


def test_where_all_collapse_nobody_wins(tmp_path):
    lab = Lab(tmp_path, falling, arms={"heavy": HEAVY, "other": {**HEAVY, "train.learning_rate": 1e-2}}, config=STOP,
              asha=False)
    assert decision_of(lab.run())["winner"] is None


def test_what_was_stopped_because_of_a_trial_that_collapses_is_continued(tmp_path):
    stopped = 0
    for seed in range(6):
        (folder := tmp_path / str(seed)).mkdir()
        lab = Lab(folder, falling, arms={"heavy": HEAVY, "light": LIGHT}, config=STOP,
                  asha={"grace_epochs": 1, "reduction_factor": 2})
        race = lab.run(slots=2, seed=seed)
        stopped += len(lab.events("stopped"))
        assert len(lab.events("stopped")) == len(lab.events("continued"))
        assert states(race)["light_seed42"] == ("completed", 8) and decision_of(race)["winner"] == "light"
    assert stopped


def test_a_trial_that_may_collapse_and_one_that_may_not_share_a_trajectory_not_a_run(tmp_path):
    lab = Lab(tmp_path, falling, arms={"stops": {**HEAVY, "train.stop_on_collapse": True}, "goes_on": HEAVY},
              asha=False)
    race = lab.run()
    assert states(race) == {"stops_seed42": ("completed", 1 + LASTING), "goes_on_seed42": ("completed", 8)}
    assert len({trial.run.key for trial in race.trials}) == 1 and sum(lab.trained.values()) == 8


@given(st.lists(st.booleans(), max_size=20), st.integers(0, 5), st.integers(1, 20))
def test_it_ends_after_three_in_a_row_that_count(alive, warmup, epochs):
    shape = {"loss__kl_schedule": "linear", "loss__kl_warmup_epochs": warmup} if warmup else {}
    epochs = max(epochs, warmup + 1)
    config = small_config(**{**VAE, "train__epochs": epochs, "loss__kl": 1.0, "train__stop_on_collapse": True, **shape})
    rows = [{"epoch": epoch, "seconds": 0.0, **row(1 / epoch, lives)} for epoch, lives in enumerate(alive, start=1)]
    ends = [epoch for epoch in range(1, len(rows) + 1)
            if epoch - LASTING >= warmup and not any(alive[epoch - LASTING:epoch])]
    assert own_end(rows, config) == min([end for end in [*ends[:1], epochs] if end <= len(rows)], default=None)
    plain = config.model_copy(update={"train": config.train.model_copy(update={"stop_on_collapse": False})})
    assert own_end(rows, plain) == (epochs if epochs <= len(rows) else None)


def test_a_training_that_collapses_ends_and_can_be_gone_on_with(tmp_path):
    settings = {**VAE, **TRAINED["collapses"][0]}
    config = small_config(**settings, train__stop_on_collapse=True)
    trajectory = Trajectory(tmp_path / "t")
    rows = list(trajectory.train(config, DATASET, "cpu"))
    assert len(rows) < 8 and trajectory.status()["state"] == "completed"
    assert [has_collapsed(item) for item in rows[-LASTING:]] == [True] * LASTING
    assert list(trajectory.train(config, DATASET, "cpu")) == []
    more = list(trajectory.train(small_config(**settings), DATASET, "cpu"))
    whole = list(Trajectory(tmp_path / "u").train(small_config(**settings), DATASET, "cpu"))
    assert [item["val/mse"] for item in [*rows, *more]] == [item["val/mse"] for item in whole] and len(whole) == 8


# In words -------------------------------------------------------------------------------------------------------------

KL_ARMS = {"heavy": {**HEAVY, "hypothesis": "collapses"}, "light": {**LIGHT, "train.learning_rate": 1e-2},
           "plain": {"train.learning_rate": 1e-3}}


@pytest.fixture
def sweep(tmp_path) -> Sweep:
    made = Sweep(tmp_path, KL_ARMS, asha=False, decision={})
    for arm, alive in (("heavy", False), ("light", True), ("plain", True)):
        rows = [{"epoch": epoch, "seconds": 1.0, **row(0.3 / epoch, alive)} for epoch in range(1, 6)]
        if arm == "plain":
            rows = [{name: item[name] for name in item if name not in ("val/kl_nats", "beta")} for item in rows]
        made.trained(arm, rows)
    for arm, dead, shuffled in (("heavy", 1.0, 0.06), ("light", 0.25, 0.2)):
        made.store.open(made.folder(arm).name).add_figures(5, dict(zip(OF_POSTERIORS, (dead, 0.06, shuffled, shuffled),
                                                                       strict=True)))
    return made


def test_the_report_has_a_diagnosis_an_arm_and_the_kl_beside_its_weight(sweep):
    page = sweep.page(sweep.winner("heavy"))
    table = next(number for number, rows in enumerate(page.tables) if rows[0][1] == "diagnosis")
    assert page.row("heavy", table)[1].startswith("collapsed try a loss.kl a hundred times smaller")
    assert page.row("light", table)[1].startswith("partly collapsed")
    assert page.row("light", table)[4] == "8 of 32" and page.row("light", table)[2:4] == ["60", "100%"]
    assert not any(cells and cells[0].strip() == "plain" for cells in page.tables[table])
    curves = [[trace.get("y") for trace in chart["data"]] for chart in page.charts]
    assert [[0.1] * 5, [60.0] * 5] in curves and [[1.0] * 5] * 2 in curves


def test_a_sweep_without_vaes_has_no_such_section(tmp_path):
    made = Sweep(tmp_path, {"plain": {}}, asha=False)
    made.trained("plain", [{"epoch": epoch, "seconds": 1.0, "val/mse": 0.1} for epoch in range(1, 6)])
    assert "variational candidates" not in made.page(made.winner("plain")).text()


def test_the_terminal_says_it_of_vaes_only(sweep):
    said = [remark for remark in remarks(sweep.race(), None, None, sweep.output) if "latent" in remark.text]
    assert [(remark.text.split(":")[0], remark.warning) for remark in said] == [
        ("latent of heavy", True), ("latent of light", True)]
    assert "collapsed: 32 of 32 dimensions tell nothing" in said[0].text and "8 of 32" in said[1].text
