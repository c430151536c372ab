"""The decision: pure, blind to order and names, explained, and never for what could not be compared."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from autoenc.sweep.decide import compounded, concession, decide
from autoenc.sweep.finalists import finalists, in_race
from autoenc.sweep.parts import Decision, Measured
from autoenc.sweep.records import Record

MSE, PSNR = Measured(), Measured(metric="val/psnr")
QUICK = settings(max_examples=120, deadline=None)


def rule(**settings: Any) -> Decision:
    return Decision.model_validate({key: value for key, value in settings.items() if value is not None})


def record(arm: str, mse: float = 1.0, seed: int = 42, status: str = "completed", note: str = "",
           **figures: float) -> Record:
    figures = {name.replace("__", "/"): value for name, value in figures.items()}
    return Record(arm, f"{arm}_seed{seed}", seed, status, 10, 8, {"val/mse": mse, **figures}, note=note)


def arms(*means: float, **more: Any) -> list[Record]:
    return [record(name, mean, **more) for name, mean in zip("ABCDEFGH", means, strict=False)]


def order_of(records: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(record.arm for record in records))


def decided(records: Sequence[Record], decision: Decision | None = None, objective: Measured = MSE,
            order: Sequence[str] | None = None) -> dict[str, Any]:
    found = decide(records, order or order_of(records), objective, decision or rule())
    json.dumps(found, allow_nan=False)
    return found


def standings(found: dict[str, Any]) -> dict[str, str]:
    return {row["arm"]: row["standing"] for row in found["candidates"]}


# Strategies ---------------------------------------------------------------------------------------------------------

scores = st.floats(1e-6, 1e6) | st.sampled_from([1.0, 1.01, 1.02, 1.05, 1.1, 2.0])
wild = scores | st.sampled_from([math.nan, math.inf, -math.inf, 0.0, -1.0, 1e100])
shares = st.sampled_from([0.0, 0.01, 0.02, 0.1, 0.5])


@st.composite
def contests(draw: st.DrawFn, score: st.SearchStrategy = scores, broken: bool = True) -> list[Record]:
    """Arms with the same first seed, some of them with the further ones."""
    records = []
    count = draw(st.integers(1, 3))
    states = ["completed"] * 4 + (["stopped", "diverged", "failed"] if broken else [])
    for arm in "ABCDE"[: draw(st.integers(1, 5))]:
        for seed in range(42, 42 + draw(st.sampled_from([1, count]))):
            records.append(record(arm, draw(score), seed, draw(st.sampled_from(states)), val__palette_miou=draw(score),
                                  parameters=draw(st.integers(1, 4)) * 1e6, val__psnr=draw(score)))
    return records


rules = st.builds(
    rule, within=st.none() | shares, repeats=st.just(3), evidence=st.sampled_from(["observed", "observed", "shown"]),
    prefer=st.lists(st.builds(lambda metric, within: {"metric": metric, "within": within},
                              st.sampled_from(["val/palette_miou", "parameters", "val/ssim"]), shares), max_size=2),
    require=st.lists(st.builds(lambda low: {"metric": "val/psnr", "min": low}, st.floats(0, 3)), max_size=1),
    baseline=st.none() | st.just({"arm": "A"}), pick=st.none() | st.sampled_from(["A", "B"]))
objectives = st.sampled_from([MSE, PSNR])


# Properties ---------------------------------------------------------------------------------------------------------


@QUICK
@given(contests(wild), rules, objectives, st.randoms(use_true_random=False))
def test_the_order_of_records_and_duplicates_change_no_byte(records, decision, objective, shuffle):
    order = order_of(records)
    text = json.dumps(decide(records, order, objective, decision), allow_nan=False)
    shuffled = [*records, *shuffle.choices(records, k=3)]
    shuffle.shuffle(shuffled)
    assert json.dumps(decide(shuffled, order, objective, decision), allow_nan=False) == text
    assert set(finalists(shuffled, order, objective, decision, 0.1)) == set(
        finalists(records, order, objective, decision, 0.1))


@QUICK
@given(contests(wild), rules, objectives, st.permutations(["zebra", "F1", "x.9", "L5", "aa"]))
def test_names_mean_nothing(records, decision, objective, names):
    new = dict(zip("ABCDE", names, strict=True))
    renamed = [replace(r, arm=new[r.arm], trial=f"{new[r.arm]}_seed{r.seed}") for r in records]
    changed = decision.model_copy(update={
        "pick": new.get(decision.pick),
        "baseline": decision.baseline and decision.baseline.model_copy(update={"arm": new[decision.baseline.arm]})})
    before, after = decided(records, decision, objective), decided(renamed, changed, objective)
    assert after["winner"] == new.get(before["winner"])
    assert [(new[row["arm"]], row["score"], row["verdict"]) for row in before["candidates"]] == [
        (row["arm"], row["score"], row["verdict"]) for row in after["candidates"]]


@QUICK
@given(contests(), rules, objectives, st.floats(2, 50), st.integers(0, 5))
def test_a_worse_candidate_changes_nothing(records, decision, objective, factor, place):
    """Worse than every other in the objective, beyond what the rule accepts, and in all else as well."""
    found = decided(records, decision, objective)
    worst = max(r.figures["val/mse"] for r in records) * factor
    seeds = max((r.arm for r in records), key=lambda arm: sum(r.arm == arm for r in records))
    further = [replace(r, arm="worse", trial=f"worse_{r.seed}", status="completed", figures={
        "val/mse": worst, "val/psnr": min(r.figures["val/psnr"] for r in records) / factor,
        "val/palette_miou": min(r.figures["val/palette_miou"] for r in records) / factor, "parameters": 1e9})
        for r in records if r.arm == seeds]
    if objective is PSNR and not (decision.within or 0) < 0.5:
        further = [replace(r, figures={**r.figures, "val/psnr": r.figures["val/psnr"] / 10}) for r in further]
    order = order_of(records)
    order.insert(place, "worse")
    again = decided([*further, *records], decision, objective, order)
    assume(found["winner"] is not None)
    assert again["winner"] == found["winner"]
    assert standings(found) == {arm: standing for arm, standing in standings(again).items() if arm != "worse"}


@QUICK
@given(contests(wild), rules, objectives)
def test_the_winner_completed_met_every_requirement_and_is_as_good_as_the_best(records, decision, objective):
    found = decided(records, decision, objective)
    winner = found["winner"]
    able = [arm for arm in order_of(records) if all(
        r.status == "completed" and not math.isnan(r.figures[objective.metric])
        and all(r.figures["val/psnr"] >= item.min for item in decision.require) for r in records if r.arm == arm)]
    if winner is None:
        return
    own = [r for r in records if r.arm == winner]
    assert all(r.status == "completed" for r in own)
    if decision.require and all(map(math.isfinite, (r.figures["val/psnr"] for r in own))):
        assert math.fsum(r.figures["val/psnr"] for r in own) / len(own) >= decision.require[0].min - 1e-9
    rows = {row["arm"]: row for row in found["candidates"]}
    assert [arm for arm, standing in standings(found).items() if standing == "winner"] == [winner]
    if decision.pick is None and able and objective is MSE:
        rivals = [row for row in rows.values() if row["standing"] in ("winner", "best", "as good", "worse")
                  and row["seeds"] == rows[winner]["seeds"] and row["score"] is not None]
        if rows[winner]["score"] is not None and rivals:
            best = min(row["score"] for row in rivals)
            assert rows[winner]["score"] - best <= (decision.within or 0) * abs(best) * (1 + 1e-9) + 1e-12


@QUICK
@given(contests(wild), rules, objectives)
def test_every_candidate_is_told_once_with_a_reason(records, decision, objective):
    found = decided(records, decision, objective)
    assert [row["arm"] for row in found["candidates"]] == order_of(records)
    assert all(row["verdict"] and row["reasons"] and all(row["reasons"]) for row in found["candidates"])
    assert found["reasons"]
    for row in found["candidates"]:
        own = sorted((r for r in records if r.arm == row["arm"]), key=lambda r: r.seed)
        assert row["trials"] == [r.trial for r in own] and row["seeds"] == [r.seed for r in own]
        assert row["epochs"] == sum(r.epochs for r in own)
    assert 0 <= concession(found) <= math.inf


@QUICK
@given(contests(broken=False), rules, st.sampled_from([0.0, 0.05, 0.2]))
def test_finalists_are_what_further_seeds_could_make_the_winner(records, decision, margin):
    first = [r for r in records if r.seed == 42]
    decision = decision.model_copy(update={"require": ()})
    names = finalists(first, order_of(first), MSE, decision, margin)
    best = min(r.figures["val/mse"] for r in first)
    reach = max(decision.within or 0, margin)
    expected = {r.arm for r in first if r.figures["val/mse"] - best <= reach * best * (1 + 1e-12)}
    strict = {r.arm for r in first if r.figures["val/mse"] - best <= reach * best * (1 - 1e-12)}
    named = {decision.pick, decision.baseline.arm if decision.baseline else None} & {r.arm for r in first}
    assert strict | named <= set(names) <= expected | named
    winner = decided(first, decision.model_copy(update={"evidence": "observed", "pick": None}))["winner"]
    assert winner in names


# The rule, step by step ---------------------------------------------------------------------------------------------


def test_without_tolerance_the_best_wins():
    found = decided(arms(1.1, 1.0, 1.2))
    assert found["winner"] == "B"
    assert standings(found) == {"A": "worse", "B": "winner", "C": "worse"}
    assert found["candidates"][0]["reasons"] == ["10% behind B"]
    assert decided([record("A", val__psnr=20), record("B", val__psnr=21)], objective=PSNR)["winner"] == "B"


def test_within_the_tolerance_the_preferences_decide_in_order():
    records = [record("A", 1.00, latent_size=256, parameters=9), record("B", 1.09, latent_size=128, parameters=9),
               record("C", 1.08, latent_size=128, parameters=5), record("D", 1.2, latent_size=1, parameters=1)]
    prefer = [{"metric": "latent_size"}, {"metric": "parameters"}]
    found = decided(records, rule(within="10%", prefer=prefer))
    assert found["winner"] == "C"
    assert standings(found) == {"A": "as good", "B": "as good", "C": "winner", "D": "worse"} | {"A": "best"}
    assert "smaller latent_size is preferred: A 256, B 128, C 128" in found["reasons"]
    assert found["reasons"][-1] == "C wins by the rule, 8% behind A: within 10%"
    assert math.isclose(concession(found), 0.08)
    assert decided(records, rule(within="10%"))["winner"] == "A"         # comes first in the file
    assert decided(records, rule(prefer=prefer))["winner"] == "A"        # no tolerance: nothing to prefer among
    assert decided(records[1:3], rule(within="10%", prefer=[{"metric": "latent_size"}]))["winner"] == "B"


@pytest.mark.parametrize(("best", "other", "tolerance"), [(1.0, 1.1, "10%"), (0.3, 0.33, 0.1), (3e-5, 3.15e-5, "5%")])
def test_what_equals_the_tolerance_but_for_rounding_is_within_it(best, other, tolerance):
    records = [record("A", best, parameters=2), record("B", other, parameters=1)]
    prefer = [{"metric": "parameters"}]
    assert decided(records, rule(within=tolerance, prefer=prefer))["winner"] == "B"
    assert finalists(records, "AB", MSE, rule(within=tolerance), 0) == ["A", "B"]


def test_when_all_finalists_fail_at_their_further_seeds_the_first_seed_decides():
    """A led and got further seeds, as did the baseline; A failed there. B, though it has one seed, is the better."""
    records = [*arms(1.0, 1.5, 3.0), record("A", seed=43, status="failed"), record("C", 3.0, seed=43)]
    found = decided(records, rule(baseline={"arm": "C"}, repeats=2))
    assert found["winner"] == "B"
    assert found["reasons"][0] == "B has the best val/mse: 1.5 (one seed)"


def test_the_edge_of_the_tolerance_belongs_to_it():
    records = [record("A", 1.0, parameters=2), record("B", 1.25, parameters=1)]
    prefer = [{"metric": "parameters"}]
    assert decided(records, rule(within=0.25, prefer=prefer))["winner"] == "B"
    assert decided(records, rule(within=0.2499, prefer=prefer))["winner"] == "A"


def test_a_preference_has_a_tolerance_of_its_own():
    records = [record("A", 1.0, val__palette_miou=0.500, parameters=3),
               record("B", 1.0, val__palette_miou=0.495, parameters=2),
               record("C", 1.0, val__palette_miou=0.4, parameters=1)]
    prefer = [{"metric": "val/palette_miou", "within": "1%"}, {"metric": "parameters"}]
    assert decided(records, rule(prefer=prefer))["winner"] == "B"
    assert decided(records, rule(prefer=[{"metric": "val/palette_miou"}, {"metric": "parameters"}]))["winner"] == "A"


def test_a_figure_that_is_not_known_ranks_last_and_an_infinite_one_where_it_belongs():
    prefer = [{"metric": "val/palette_miou"}]
    records = [record("A", 1.0, val__palette_miou=math.nan), record("B", 1.0, val__palette_miou=0.1), record("C", 1.0)]
    found = decided(records, rule(prefer=prefer))
    assert found["winner"] == "B"
    assert "val/palette_miou is not known" in found["candidates"][0]["reasons"]
    assert "val/palette_miou is known of none of them" in decided(records[::2], rule(prefer=prefer))["reasons"]
    perfect = [record("A", 0.1, val__psnr=30), record("B", 0.1, val__psnr=math.inf)]
    assert decided(perfect, rule(prefer=[{"metric": "val/psnr"}]))["winner"] == "B"
    found = decided(perfect, objective=PSNR)
    assert (found["winner"], found["candidates"][1]["score"]) == ("B", None)


def test_ties_are_said_and_the_file_decides():
    for order in itertools.permutations("ABC"):
        found = decided(arms(1.0, 1.0, 1.5), order=order)
        assert found["winner"] == min("AB", key=order.index)
        assert any("sets" in reason and "comes first in the file" in reason for reason in found["reasons"])


def test_requirements_exclude_with_the_reason():
    records = [record("A", 1.0, val__psnr=29.5), record("B", 1.3, val__psnr=31), record("C", 1.1),
               record("D", 1.1, val__psnr=40)]
    found = decided(records, rule(require=[{"metric": "val/psnr", "min": 30, "max": 35}]))
    assert found["winner"] == "B"
    assert standings(found) == {"A": "requirement not met", "B": "winner", "C": "requirement not met",
                               "D": "requirement not met"}
    assert found["candidates"][0]["reasons"] == ["val/psnr 29.5 is below the required 30"]
    assert found["candidates"][2]["reasons"] == ["has no val/psnr, which is required"]
    assert found["candidates"][3]["reasons"] == ["val/psnr 40 is above the allowed 35"]
    assert found["candidates"][0]["score"] == 1.0


@pytest.mark.parametrize("status", ["stopped", "diverged", "failed"])
def test_what_did_not_complete_never_wins(status):
    found = decided([record("A", 0.1, status=status, note="as the log says"), record("B", 1.0)])
    assert found["winner"] == "B"
    row = found["candidates"][0]
    assert row["standing"] == ("behind at epoch 10" if status == "stopped" else status)
    assert row["reasons"] == ["A_seed42: as the log says"]
    assert row["score"] is None


def test_without_candidates_that_completed_there_is_no_winner():
    records = [record("A", status="failed"), record("B", status="diverged"), record("C", math.nan)]
    found = decided(records)
    assert found["winner"] is None
    assert standings(found) == {"A": "failed", "B": "diverged", "C": "not comparable"}
    assert found["reasons"] == ["no candidate completed and met every requirement, so there is no winner"]
    assert concession(found) == 0
    assert finalists(records, "ABC", MSE, rule(), 0.1) == []
    assert decided([])["winner"] is None


def test_a_candidate_with_a_broken_repeat_cannot_win():
    records = [*arms(0.5, 1.0), *arms(0.5, 1.0, seed=43)]
    assert decided(records, rule(repeats=2))["winner"] == "A"
    records[2] = replace(records[2], status="diverged", note="loss not finite")
    found = decided(records, rule(repeats=2))
    assert found["winner"] == "B"
    assert found["candidates"][0]["reasons"] == ["A_seed43: loss not finite"]


def test_finalists_are_compared_on_all_their_seeds_and_others_on_the_first():
    records = [*arms(1.0, 1.01, 3.0), *arms(1.2, 1.0, seed=43)[:2], *arms(1.2, 1.0, seed=44)[:2]]
    found = decided(records, rule(repeats=3))
    assert found["winner"] == "B"
    assert found["reasons"][0] == "B has the best val/mse: 1.003 (mean of seeds 42, 43, 44)"
    assert found["candidates"][2]["reasons"] == ["200% behind A on the first seed: no finalist"]
    assert found["candidates"][1]["se"] == pytest.approx(0.01 / 3**0.5 / 3**0.5)
    assert found["candidates"][2]["se"] is None


def test_a_person_picks_over_the_rule():
    records = arms(1.0, 1.5, 2.0)
    found = decided(records, rule(pick="B", because="sharper doors"))
    assert found["winner"] == "B"
    assert standings(found) == {"A": "rule's choice", "B": "winner", "C": "worse"}
    assert found["reasons"][-1] == "B was picked by a person over the rule's choice, A: sharper doors"
    assert (found["rule"]["pick"], found["rule"]["because"]) == ("B", "sharper doors")
    assert concession(found) == 0.5
    assert decided(records, rule(pick="A"))["reasons"][-1] == "A was picked by a person: no reason given"
    for broken in ([replace(records[0]), replace(records[1], status="failed")], [records[0]]):
        found = decided(broken, rule(pick="B"))
        assert found["winner"] is None
        assert "B was picked by a person, but cannot win" in found["reasons"][-1]
        assert "winner" not in standings(found).values()


def test_the_rule_is_recorded_with_the_decision():
    decision = rule(within="2%", prefer=[{"metric": "parameters"}], baseline={"arm": "A"}, repeats=2)
    found = decided(arms(1.0, 1.1), decision)
    assert found["rule"]["objective"] == {"metric": "val/mse", "mode": "min"}
    recorded = {key: value for key, value in found["rule"].items() if key != "objective"}
    assert Decision.model_validate_json(json.dumps(recorded)) == decision


# Evidence -----------------------------------------------------------------------------------------------------------


def repeated(*means: float, noise: float, seeds: int = 3) -> list[Record]:
    """Arms whose seeds differ by a shared part, which pairing cancels, and by noise of their own."""
    draw = random.Random(0)
    shared = [draw.gauss(0, 0.2) for _ in range(seeds)]
    return [record(name, mean * math.exp(shared[k] + draw.gauss(0, noise)), 42 + k, parameters=10 - i)
            for i, (name, mean) in enumerate(zip("ABCDE", means, strict=False)) for k in range(seeds)]


def test_shown_asks_for_more_than_observed():
    prefer = [{"metric": "parameters"}]
    observed, shown = (rule(within="5%", prefer=prefer, repeats=3, evidence=kind) for kind in ("observed", "shown"))
    quiet = repeated(1.0, 1.02, noise=0.001)
    noisy = [record(arm, mse, 42 + k, parameters=size) for arm, size, errors in (
        ("A", 2, (1.0, 1.0, 1.0)), ("B", 1, (0.9, 1.2, 1.1))) for k, mse in enumerate(errors)]
    assert decided(quiet, observed)["winner"] == decided(quiet, shown)["winner"] == "B"
    row = decided(quiet, shown)["candidates"][1]
    assert "behind A, at most" in row["reasons"][0] and "with 95% confidence: within 5%" in row["reasons"][0]
    tolerant = {"within": "20%", "prefer": prefer, "repeats": 3}
    assert decided(noisy, rule(**tolerant))["winner"] == "B"
    found = decided(noisy, rule(**tolerant, evidence="shown"))
    assert found["winner"] == "A"
    assert found["candidates"][1]["reasons"][0].endswith("not shown to be within 20%")
    one = decided(arms(1.0, 1.01), rule(within="5%", prefer=prefer, repeats=3, evidence="shown"))
    assert one["winner"] == "A"                          # one seed shows nothing
    assert "the seeds bound it nowhere" in one["candidates"][1]["reasons"][0]


def test_concessions_compound():
    assert compounded([0.1, 0.1]) == pytest.approx(0.21)
    assert compounded([]) == 0


# The race among finalists -------------------------------------------------------------------------------------------


def test_one_standard_error_of_the_best_is_a_tolerance():
    prefer = [{"metric": "parameters"}]
    records = [record(arm, mse, 42 + k, parameters=size) for arm, size, values in (
        ("A", 3, (0.95, 1.0, 1.05)), ("B", 2, (1.0, 1.02, 1.04)), ("C", 1, (1.02, 1.05, 1.08)))
        for k, mse in enumerate(values)]
    found = decided(records, rule(within="1se", prefer=prefer, repeats=3))
    assert found["winner"] == "B"                  # 2% behind; the standard error is 0.05 / sqrt(3), 2.9%
    assert standings(found) == {"A": "best", "B": "winner", "C": "worse"}
    assert any("one standard error (2.89%)" in reason for reason in found["reasons"])
    assert decided([r for r in records if r.seed == 42], rule(within="1se", prefer=prefer, repeats=3))["winner"] == "A"


def test_the_race_drops_who_is_shown_to_be_worse_and_nobody_before_the_second_seed():
    noise = (1.0, 1.004, 0.998, 1.001)
    def raced(seeds: int, **more: Any) -> list[str]:
        records = [record(arm, mean * noise[(k + i) % 4], 42 + k) for i, (arm, mean) in enumerate(
            zip("ABCD", (1.0, 1.01, 1.3, 1.31), strict=True)) for k in range(seeds)]
        return in_race(records, "ABCD", MSE, rule(repeats=5, within="2%", **more), 0.5)

    assert raced(1) == ["A", "B", "C", "D"]
    assert raced(3) == ["A", "B"]
    assert raced(3, baseline={"arm": "D"}) == ["A", "B", "D"]
    assert raced(3, pick="C") == ["A", "B", "C"]
    dropped = [record("A", 1.0), record("B", 1.2), record("A", 1.0, 43), record("B", 1.21, 43), record("A", 1.0, 44)]
    found = decided(dropped, rule(repeats=3))
    assert found["winner"] == "A"
    assert found["candidates"][1]["reasons"] == ["20.5% behind A on seeds 42, 43: shown to be worse, no further seed"]


@QUICK
@given(contests(broken=False), rules, st.randoms(use_true_random=False))
def test_the_race_is_blind_to_order_and_keeps_who_must_stay(records, decision, shuffle):
    names = in_race(records, order_of(records), MSE, decision, 0.1)
    shuffled = [*records, *shuffle.choices(records, k=3)]
    shuffle.shuffle(shuffled)
    assert in_race(shuffled, order_of(records), MSE, decision, 0.1) == names
    entered = finalists(records, order_of(records), MSE, decision, 0.1)
    assert set(names) <= set(entered)
    named = {decision.pick, decision.baseline.arm if decision.baseline else None}
    assert {arm for arm in entered if arm in named or sum(r.arm == arm for r in records) == 1} <= set(names)


def test_how_sure_it_is_stands_with_the_decision():
    quiet = decided(repeated(1.0, 1.02, 1.5, noise=0.001), rule(within="5%", repeats=3))
    assert quiet["shown"]["within"] and 0 <= quiet["shown"]["at_most"] < 0.05
    assert any("the best of them, with 95% confidence" in reason for reason in quiet["reasons"])
    noisy = decided(repeated(1.0, 1.0, 1.0, noise=0.1), rule(within="1%", repeats=3, evidence="shown"))
    assert not noisy["shown"]["within"]
    assert "no candidate is shown to be as good as the best" in noisy["reasons"][-1]
    assert decided(arms(1.0, 1.1))["shown"] is None
    low, high = (quiet["candidates"][1]["behind"][end] for end in ("low", "high"))
    assert low < 0.02 < high
