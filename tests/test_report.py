from __future__ import annotations

import json
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pages import FAIR, GOOD, NASTY, POOR, Page, Sweep, arms, rows_of
from PIL import Image

from autoenc.report.page import number
from autoenc.report.sweep import write_report
from autoenc.sweep.phase import decide_race
from autoenc.yamlfile import dump_yaml


@pytest.fixture
def sweep(tmp_path) -> Sweep:
    """A wins, B is as good by the rule, C was stopped at epoch 2."""
    made = Sweep(tmp_path, arms("A", "B", "C"))
    made.trained("A", rows_of(GOOD))
    made.trained("B", rows_of(FAIR))
    made.trained("C", rows_of(POOR))                          # the store holds an epoch beyond the stop
    made.stopped("C", 2, POOR[1], GOOD[1], by="A")
    return made


def test_says_who_wins_by_how_much_and_who_was_stopped(sweep):
    page = sweep.page(sweep.winner("A"))
    text = page.text()
    assert "A wins val/mse 0.1000, the best score. The next is B (0.1040), 4% behind." in text
    assert "smallest val/mse; whatever is within 5% of it is as good, then smaller parameters" in text
    assert "C_seed42 stopped at epoch 2: val/mse 0.8, 100.0% behind the best there (0.4)" in text
    assert "12 from the store" in text and "3 spared by early stopping" in text
    assert "Still improving by more than 5% over the last 3 epochs: A (300%)" in text
    assert "One seed each: nothing here tells a difference from noise." in text


def test_candidates_have_score_figures_settings_and_verdict(sweep):
    page = sweep.page(sweep.winner("A"))
    assert page.tables[0][0] == ["arm", "verdict", "val/mse", "behind", "val/psnr", "parameters", "epochs",
                                 "differs from its start by"]
    first, second, stopped = page.row("A"), page.row("B"), page.row("C")
    assert first[2:7] == ["0.1000", "best", "25", "1,234,567", "5 of 5 1 seed"]
    assert second[2:4] == ["0.1040", "4%"] and second[1].startswith("as good")
    assert stopped[1].startswith("behind at epoch 2") and stopped[2:4] == ["0.8000", "—"]
    start = sweep.start["train.learning_rate"]
    assert first[7] == f"train.learning_rate {start:g} → 0.01"


def test_winner_that_conceded_says_so(tmp_path):
    made = Sweep(tmp_path, arms("A", "B"))
    made.trained("A", rows_of(GOOD))
    made.trained("B", rows_of(FAIR, parameters=1000.0))
    page = made.page(made.winner("B", concessions={"above": 0.1, "phase": 0.1}))
    assert "B wins val/mse 0.1040, 4% behind A (0.1000), which has the best score. It is as good by" in page.text()
    assert "above 10%, phase 10%; together 21% of the objective along the chain" in page.text()


def test_curves_hold_the_rows_and_mark_the_stop(sweep):
    objective, splits = sweep.page(sweep.winner("A")).charts
    lines = {trace["name"]: trace for trace in objective["data"]}
    assert lines["A (winner)"]["x"] == [1, 2, 3, 4, 5] and lines["A (winner)"]["y"] == GOOD
    assert lines["C"]["y"] == POOR[:2]
    assert (lines["stopped early"]["x"], lines["stopped early"]["y"]) == ([2], [POOR[1]])
    assert lines["within 5% of the best"]["y"] == pytest.approx([0.105, 0.105])
    assert [shape["x0"] for shape in objective["layout"]["shapes"]] == [2]
    trains = [trace for trace in splits["data"] if trace["line"]["dash"] == "dot"]
    assert trains[0]["y"] == pytest.approx([value * 0.9 for value in GOOD])
    assert len(splits["data"]) == 6


@pytest.mark.parametrize(("values", "kind"), [([0.5, 0.4], "linear"), ([5.0, 0.01], "log"), ([5.0, 0.0], "linear")])
def test_axis_is_logarithmic_where_the_values_span_much(tmp_path, values, kind):
    made = Sweep(tmp_path, arms("A"))
    made.trained("A", rows_of([*values, *[values[-1]] * 3]))
    assert made.page().charts[0]["layout"]["yaxis"]["type"] == kind


def test_undefined_values_leave_gaps(tmp_path):
    made = Sweep(tmp_path, arms("A", "B"), decision={"prefer": [{"metric": "val/palette_miou", "mode": "max"}]})
    made.trained("A", rows_of([0.5, math.nan, math.inf, 0.2, 0.1], **{"val/palette_miou": math.nan}))
    made.trained("B", [{"epoch": n, "seconds": 1.0, "val/mse": 0.3} for n in range(1, 6)])
    page = made.page(made.winner("A"))
    assert page.charts[0]["data"][0]["y"] == [0.5, None, None, 0.2, 0.1]
    assert page.row("A")[5] == "—" and page.row("B")[4:6] == ["—", "—"]


def test_many_arms_share_grey_but_the_best_have_colours(tmp_path):
    names = [f"S{number}" for number in range(12)]
    made = Sweep(tmp_path, {name: {"train.weight_decay": 0.01 * (place + 1)} for place, name in enumerate(names)},
                 asha=False)
    for place, name in enumerate(names):
        made.trained(name, rows_of([1.0, 0.9, 0.8, 0.7, 0.6 - 0.01 * place]))
    traces = [trace for trace in made.page(made.winner("S11")).charts[0]["data"] if trace["mode"] == "lines+markers"]
    best, rest = traces[4:], traces[:4]
    assert len({trace["line"]["color"] for trace in best}) == 8 and len({trace["line"]["color"] for trace in rest}) == 1
    assert {trace["name"] for trace in rest} == {"other arms"} and sum(trace["showlegend"] for trace in rest) == 1


def test_the_page_stays_below_its_bound_and_loads_nothing(sweep):
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (1100, 1500, 3), dtype=np.uint8))
    for arm in "ABC":
        noise.save(sweep.folder(arm) / "samples" / "epoch_0002.png", compress_level=1)
    race = sweep.race()
    decision = decide_race(race)
    path = sweep.output / "phase" / "report.html"
    path.parent.mkdir()
    write_report(path, race, decision, winner=sweep.winner("A"), dataset_words="", command="again")
    assert path.stat().st_size < 15_000_000
    page = Page(path.read_text(encoding="utf-8"))
    assert len(page.pictures()) == 3
    for tag, attributes in page.tags:
        assert all(attributes.get(name, "data:").startswith("data:") for name in ("src", "href")), tag
    policy = next(a["content"] for tag, a in page.tags if tag == "meta" and a.get("http-equiv"))
    assert "default-src 'none'" in policy and "http" not in policy


def test_text_from_files_is_never_markup(tmp_path):
    (tmp_path / "plain").mkdir()
    made, plain = (Sweep(folder, arms("A", "B", hypothesis=text), description=text,
                         decision={"pick": "A", "because": text})
                   for folder, text in ((tmp_path, NASTY), (tmp_path / "plain", "x")))
    for one in (made, plain):
        one.trained("A", rows_of(GOOD))
        one.trained("B", rows_of(POOR), failed=NASTY if one is made else "x")
    provenance = {"versions": {NASTY: NASTY}, "parents": {"above": NASTY}, "data": NASTY}
    page = made.page(made.winner("A", **provenance), command=NASTY, data=NASTY)
    expected = plain.page(plain.winner("A", versions={"x": "x"}, parents={"above": "x"}, data="x"))
    assert page.text().count(NASTY) >= 8
    assert (page.count("script"), page.count("img")) == (expected.count("script"), 0)
    assert "alert" not in str([attributes for _, attributes in page.tags])


@settings(max_examples=25)
@given(st.text(st.characters(exclude_characters="\0"), max_size=40))
def test_any_hypothesis_is_shown_as_it_is(tmp_path_factory, text):
    made = Sweep(tmp_path_factory.mktemp("sweep"), arms("A"))
    made.trained("A", [], failed="x")                         # no curves: a short page
    object.__setattr__(made.arms[0], "hypothesis", f"<{text}>")
    path = made.output / "report.html"
    race = made.race()
    write_report(path, race, decide_race(race), winner=None, dataset_words="", command="")
    told = f"<{text}>".encode("utf-8", "replace").decode()
    assert " ".join(told.split()) in Page(path.read_bytes().decode()).text()


def test_nothing_won(tmp_path):
    made = Sweep(tmp_path, arms("A", "B"))
    made.trained("A", rows_of([0.5, 0.4]), diverged={"epoch": 3, "step": 7, "what": "train/loss"})
    made.trained("B", [], failed="RuntimeError: out of memory")
    page = made.page()
    text = page.text()
    assert "No winner" in text and "no candidate completed and met every requirement" in text and "One seed" not in text
    assert "A_seed42 diverged at epoch 3, step 7: train/loss not finite" in text
    assert "B_seed42 RuntimeError: out of memory" in text
    assert page.row("B")[1].startswith("failed") and page.row("B")[2] == "—"
    marks = [trace for trace in page.charts[0]["data"] if trace["name"] == "diverged"]
    assert (marks[0]["x"], marks[0]["y"]) == ([2], [0.4])
    assert "fingerprint" in text and "torch 9.9" in text


def test_nothing_ran_at_all(tmp_path):
    made = Sweep(tmp_path, arms("A"))
    made.trained("A", [], failed="ValueError: no")
    page = made.page()
    assert page.charts == [] and page.pictures() == [] and "No winner" in page.text()
    assert page.count("script") == 0                          # and so no plotly.js


def test_one_arm(tmp_path):
    made = Sweep(tmp_path, {"only": {}})
    made.trained("only", rows_of(GOOD))
    page = made.page(made.winner("only"))
    assert "only wins val/mse 0.1000, the only candidate." in page.text() and "One seed each" not in page.text()
    assert page.row("only")[7] == "nothing"


def test_seeds_give_a_standard_error_and_dashed_lines(tmp_path):
    made = Sweep(tmp_path, arms("A", "B"), decision={"repeats": 2, "within": "5%"})
    made.trained("A", rows_of(GOOD))
    made.trained("B", rows_of(FAIR))
    made.repeated("A", 1, rows_of([*GOOD[:4], 0.12]))
    made.repeated("B", 1, rows_of([*GOOD[:4], 0.124]))
    page = made.page(made.winner("A"))
    assert page.row("A")[2] == "0.1100 ± 0.01000" and page.row("A")[5] == "10 of 10 2 seeds"
    dashes = [trace["line"]["dash"] for trace in page.charts[0]["data"] if "seed" in trace.get("hovertemplate", "")]
    assert sorted(dashes) == ["dash", "dash", "solid", "solid"]
    assert len(page.charts[1]["data"]) == 4 and "One seed each" not in page.text()


def test_trials_that_share_a_training_say_so(tmp_path):
    made = Sweep(tmp_path, {"A": {"train.learning_rate": 0.01}, "twin": {"train.learning_rate": 0.01}})
    made.trained("A", rows_of(GOOD))
    page = made.page(made.winner("A"))
    assert "shares A_seed42" in page.row("twin_seed42", table=1)
    assert "A wins val/mse 0.1000, the same as twin (0.1000)." in page.text() and "5 from the store" in page.text()


def test_parents_are_named_where_their_winner_still_stands(sweep):
    above = sweep.winner("B", sweep="above")
    folder = sweep.output / "above"
    folder.mkdir()
    config = sweep.arms[1].config.nested()
    (folder / "best_config.yaml").write_text(dump_yaml({"config": config, "provenance": {"arm": "B"}}))
    (sweep.output / "broken").mkdir()
    (sweep.output / "broken" / "best_config.yaml").write_text("- no\n")
    winner = sweep.winner("A", parents={"above": above.hash, "broken": "0" * 20, "gone": "1" * 20},
                          concessions={"above": 0.02})
    page = sweep.page(winner)
    assert page.row("above", table=2)[1:] == ["B", "2%", above.hash]
    assert page.row("broken", table=2)[1:] == ["—", "—", "0" * 20] and page.row("gone", table=2)[1] == "—"
    assert winner.hash in page.text() and sweep.spec.content_hash in page.text()


@given(st.floats())
def test_numbers_read_as_numbers(value):
    shown = number(value)
    if math.isfinite(value):
        assert float(shown.replace(",", "")) == pytest.approx(value, rel=1e-3, abs=0.5 if abs(value) >= 1e5 else 0)
    else:
        assert shown in ("—", "∞", "−∞")


def test_loading_it_loads_neither_torch_nor_ray_nor_plotly():
    code = "import sys, autoenc.report.sweep; print([m for m in ('torch', 'ray', 'plotly') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def repeated_sweep(tmp_path, **decision) -> Sweep:
    """Three seeds: B is 1% better than the baseline A, C 3% worse, all by nearly the same on every seed."""
    made = Sweep(tmp_path, arms("A", "B", "C"), asha=False, decision={
        "repeats": 3, "baseline": {"arm": "A", "margin": "1%", "gains": ["val/palette_miou"]}, **decision})
    for arm, factor, miou in (("A", 1.0, 0.50), ("B", 0.99, 0.60), ("C", 1.03, 0.50)):
        for k, noise in enumerate((1.0, 1.05, 0.96)):
            rows = rows_of([0.5, 0.4, 0.3, 0.2, 0.1 * factor * noise * (1 + 0.001 * k)], **{"val/palette_miou": miou})
            if k:
                made.repeated(arm, k, rows)
            else:
                made.trained(arm, rows)
    return made


def test_intervals_against_the_best_are_on_top(tmp_path):
    made = repeated_sweep(tmp_path)
    text = made.page(made.winner("B")).text()
    top = text[:text.index("Candidates")]
    assert "Over 3 seeds B is shown to be better than A (95% confidence for all together)." in top
    behind = {row["arm"]: row["behind"] for row in made.decision()["candidates"]}
    assert f"{100 * behind['A']['low']:+.2g}% to {100 * behind['A']['high']:+.2g}%" in top


def test_a_winner_whose_lead_is_not_shown_is_told_so(tmp_path):
    made = Sweep(tmp_path, arms("A", "B"), asha=False, decision={"repeats": 2, "within": "5%"})
    made.trained("A", rows_of([*GOOD[:4], 0.100]))
    made.trained("B", rows_of([*GOOD[:4], 0.104]))
    made.repeated("A", 1, rows_of([*GOOD[:4], 0.105]))
    made.repeated("B", 1, rows_of([*GOOD[:4], 0.103]))
    assert "not shown to be better than B" in made.page(made.winner("A")).text()
    preferred = Sweep(tmp_path, arms("A", "B"), asha=False, decision={
        "repeats": 2, "within": "5%", "prefer": [{"metric": "val/palette_miou", "mode": "max"}]})
    for arm, ends, miou in (("A", (0.100, 0.105), 0.1), ("B", (0.104, 0.103), 0.9)):
        preferred.trained(arm, rows_of([*GOOD[:4], ends[0]], **{"val/palette_miou": miou}))
        preferred.repeated(arm, 1, rows_of([*GOOD[:4], ends[1]], **{"val/palette_miou": miou}))
    text = preferred.page(preferred.winner("B")).text()
    assert "the seeds do not show which of the two is better" in text
    assert "That it is within the 5% that the rule allows is not shown." in text


def test_baseline_has_an_interval_for_the_objective_and_each_gain(tmp_path):
    made = repeated_sweep(tmp_path)
    page = made.page(made.winner("B"))
    section = page.text()[page.text().index("Against the baseline, A"):]
    assert "val/mse, smaller is better" in section and "val/palette_miou, larger is better" in section
    assert "helps +20%" in section and "hurts" in section
    assert page.row("B")[1].startswith("winner helps") and page.row("C")[1].startswith("worse hurts")
    assert page.row("A")[1].startswith("worse baseline")
    bars = [attributes["style"] for tag, attributes in page.tags if tag == "i" and "bar" in attributes.get("class", "")]
    assert len(bars) == 1 + 2 * 2              # A behind the best (C fell out after two seeds); two figures of B and C


def test_what_an_undecided_verdict_would_take(tmp_path):
    made = Sweep(tmp_path, arms("A", "B"), asha=False, decision={
        "within": "2%", "baseline": {"arm": "A", "margin": "1%"}, "repeats": 2})
    for arm, ends in (("A", (0.100, 0.110)), ("B", (0.101, 0.105))):
        made.trained(arm, rows_of([*GOOD[:4], ends[0]]))
        made.repeated(arm, 1, rows_of([*GOOD[:4], ends[1]]))
    row = next(row for row in made.decision()["candidates"] if row["arm"] == "B")
    assert row["verdict"] == "undecided"
    needed = row["baseline"]["seeds_needed"]
    expected = f"about {needed} seeds" if needed else "more seeds than anyone would train"
    assert f"What it would take B: {expected}, if the means stay" in made.page(made.winner("B")).text()


def test_arms_still_improving_are_marked_on_the_chart(sweep):
    marks = [trace for trace in sweep.page().charts[0]["data"] if trace["name"] == "still improving"]
    assert marks[0]["x"] == [5, 5] and sorted(marks[0]["y"]) == [0.1, 0.104]       # C was stopped: nobody knows


def test_cost_of_repeats_and_what_racing_spared(tmp_path):
    made = repeated_sweep(tmp_path, repeats=4)
    for arm, end in (("A", 0.1), ("B", 0.099)):
        made.repeated(arm, 3, rows_of([*GOOD[:4], end], **{"val/palette_miou": 0.5}))
    race = made.race()
    assert race.idle
    given = {name: sum(trial.candidate.name == name for trial in race.trials) for name in "ABC"}
    text = made.page(made.winner("B")).text()
    assert given["A"] == given["B"] == 4 and given["C"] < 4
    assert f"Of all these, {5 * (sum(given.values()) - 3)} went into further seeds" in text
    assert f"; {5 * (4 - given['C'])} more were spared because candidates were ruled out" in text


def searched_sweep(tmp_path, points: int) -> Sweep:
    """Points drawn from a space by an earlier run: the nearer the rate is to 0.01, the better."""
    made = Sweep(tmp_path, {"A": {"train.learning_rate": 0.01}}, asha=False, search={"trials": 1 + points},
                 space={"train.learning_rate": {"type": "float", "low": 1e-4, "high": 1.0, "log": True},
                        "loss.l1": {"type": "float", "low": 0.1, "high": 1.0, "zero": True},
                        "train.schedule": {"type": "choice", "choices": ["constant", "cosine"]}})
    made.trained("A", rows_of([0.5, 0.4, 0.3, 0.2, 0.1]))
    for place in range(points):
        rate = 10.0 ** (-4 + 4 * place / (points - 1))
        point = {"train.learning_rate": rate, "loss.l1": 0.1 + 0.08 * (place * 7 % 10) if place % 3 else 0.0,
                 "train.schedule": "cosine" if place % 2 else "constant"}
        error = 0.1 + 0.02 * abs(math.log10(rate) + 2)
        made.sampled(f"S{place + 1:03d}", point, rows_of([0.6, 0.5, 0.4, 0.3, error]))
    return made


def test_search_shows_importances_and_parallel_coordinates(tmp_path):
    made = searched_sweep(tmp_path, 24)
    page = made.page(made.winner("A"))
    text = page.text()
    assert "What mattered train.learning_rate" in text
    lines = [trace for trace in page.charts[-1]["data"] if "hovertemplate" in trace]
    assert len(lines) == 25 and "A</b> (winner)" in lines[-1]["hovertemplate"]
    ys = {trace["hovertemplate"].split("</b>")[0][3:]: trace["y"] for trace in lines}
    assert [round(ys[name][0], 6) for name in ("S001", "S024")] == [0.0, 1.0]                 # log axis, low to high
    assert ys["A"][0] == pytest.approx(0.5)
    assert ys["S001"][1] == 0.0 < ys["S002"][1]                                                # exact 0 below the range
    assert {ys["S001"][2], ys["S002"][2]} == {0.0, 1.0}
    assert ys["A"][3] == 0.0 and max(y[3] for y in ys.values()) == 1.0                         # the objective, last
    marks = {(note["x"], note["text"]) for note in page.charts[-1]["layout"]["annotations"]}
    assert {(0, "0.0001"), (0, "1"), (1, "0"), (2, "cosine"), (3, "0.1")} <= marks


def test_few_points_say_nothing_about_importance(tmp_path):
    made = searched_sweep(tmp_path, 3)
    assert "No setting stands out from chance" in made.page(made.winner("A")).text()


@pytest.mark.parametrize("state", ["running", "interrupted"])
def test_before_it_is_decided_nothing_sounds_final(sweep, state):
    page = sweep.page(state=state)
    text = page.text()
    assert f"{state.capitalize()}: A would win if it ended now A_seed42 has the best val/mse so far, 0.1000." in text
    assert "wins val/mse" not in text and "If it ended now" in text and "How it was decided" not in text
    assert "3 of 3 trials have ended, 12 epochs so far." in text
    refreshes = [attributes for tag, attributes in page.tags if attributes.get("http-equiv") == "refresh"]
    assert len(refreshes) == (state == "running")
    assert ("the same command goes on from here" in text) == (state == "interrupted")


def test_a_sweep_that_has_only_begun_has_a_page(tmp_path):
    made = Sweep(tmp_path, arms("A", "B"))
    made.trained("A", rows_of([0.5]))
    race = made.race()
    assert not race.idle
    page = made.page(state="running")
    assert "Running: no trial has ended yet A_seed42 has the best val/mse so far, 0.5000." in page.text()
    assert page.row("A_seed42")[2] == "1 of 5" and page.row("B_seed42")[2] == "0 of 5"
    assert page.charts[0]["data"][0]["y"] == [0.5]


def test_plotly_knows_every_chart(tmp_path, sweep):
    from plotly import graph_objects

    (tmp_path / "searched").mkdir()
    for made in (sweep, searched_sweep(tmp_path / "searched", 12)):
        charts = made.page().charts
        assert len(charts) >= 2
        for chart in charts:
            graph_objects.Figure(chart)                               # raises for what it does not know


@pytest.mark.slow
def test_fifty_trials_with_pictures_stay_below_the_bound(tmp_path):
    names = [f"A{place}" for place in range(50)]
    made = Sweep(tmp_path, {name: {"train.weight_decay": 0.001 * (place + 1)} for place, name in enumerate(names)},
                 config={"train": {"epochs": 50}}, asha=False)
    noise = np.random.default_rng(0)
    folder = made.output / "phase" / "gallery"
    folder.mkdir(parents=True)
    told = {}
    for place, name in enumerate(names):
        made.trained(name, rows_of([1 / epoch + 0.1 + 0.002 * place for epoch in range(1, 51)]))
        Image.fromarray(noise.integers(0, 256, (256, 1152, 3), dtype=np.uint8)).save(folder / f"{name}.png")
        told[name] = {"key": made.folder(name).name, "epoch": 50, "picture": f"{name}.png", "psnr": [20.0] * 9,
                      "latent": {"edges": np.linspace(-3, 3, 41).tolist(), "mean": [0.0] * 64, "std": [1.0] * 64,
                                 "counts": noise.integers(0, 5000, (64, 40)).tolist()}}
    (folder / "gallery.json").write_text(json.dumps({
        "format": 1, "inputs": "A0.png", "cell": 128, "rows": ["image", "classes"], "arms": told,
        "columns": [{"kind": kind} for kind in ("best", "typical", "worst") for _ in range(3)]}))
    race = made.race()
    path = made.output / "phase" / "report.html"
    write_report(path, race, decide_race(race), winner=made.winner("A0"), dataset_words="", command="")
    assert path.stat().st_size < 15_000_000
    assert len([picture for picture in Page(path.read_text()).pictures() if picture.size == (40, 64)]) == 24
