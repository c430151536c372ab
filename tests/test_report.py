from __future__ import annotations

import base64
import io
import json
import math
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from autoenc.sweep import inherit
from autoenc.sweep.charts import embedded
from autoenc.sweep.decide import decide
from autoenc.sweep.inherit import Winner
from autoenc.sweep.race import Race
from autoenc.sweep.report import number, render, write_report
from autoenc.sweep.store import Store
from autoenc.table import csv_text
from autoenc.trajectory import trajectory_key
from autoenc.yamlfile import dump_yaml

GOOD = [0.5, 0.4, 0.3, 0.2, 0.1]
FAIR = [0.55, 0.45, 0.31, 0.22, 0.104]
POOR = [0.9, 0.8, 0.7]


class Page(HTMLParser):
    """What a browser would see: the text, the elements with their attributes, tables, the charts' data."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict]] = []
        self.tables: list[list[list[str]]] = []
        self.charts: list[dict] = []
        self.words = ""
        self._inside = self._cell = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._inside = "chart" if ("type", "application/json") in attributes else tag
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._cell = tag

    def handle_endtag(self, tag):
        self._inside = ""
        self._cell = "" if tag == self._cell else self._cell

    def handle_data(self, data):
        if self._inside == "chart":
            self.charts.append(json.loads(data))
        elif self._inside not in ("script", "style"):
            self.words += data
            if self._cell:
                self.tables[-1][-1][-1] += data

    def text(self) -> str:
        return " ".join(self.words.split())

    def row(self, name: str, table: int = 0) -> list[str]:
        cells = [[" ".join(cell.split()) for cell in row] for row in self.tables[table]]
        return next(row for row in cells if row[0] == name)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)

    def pictures(self) -> list[Image.Image]:
        sources = [attributes["src"] for tag, attributes in self.tags if tag == "img"]
        assert all(source.startswith("data:image/png;base64,") for source in sources)
        return [Image.open(io.BytesIO(base64.b64decode(source.split(",", 1)[1]))) for source in sources]


def rows_of(values, **figures):
    return [{"epoch": epoch, "seconds": 2.0, "val/mse": value, "train/mse": value * 0.9, "val/psnr": 20.0 + epoch,
             "parameters": 1234567.0, **figures} for epoch, value in enumerate(values, start=1)]


class Sweep:
    """A sweep in a folder, its trajectories as training leaves them."""

    def __init__(self, folder: Path, arms: dict, **content) -> None:
        self.output = folder / "outputs"
        self.past: list[dict] = []
        content = {"name": "phase", "config": {"train": {"epochs": 5}}, "arms": arms,
                   "asha": {"grace_epochs": 2, "reduction_factor": 2},
                   "decision": {"within": "5%", "prefer": [{"metric": "parameters", "mode": "min"}]}, **content}
        path = folder / "phase.yaml"
        path.write_text(dump_yaml(content), encoding="utf-8")
        self.spec = inherit.load_chain(path)[-1]
        self.start = inherit.starting_point(self.spec, None)
        self.arms = inherit.arm_candidates(self.spec, self.start)
        self.store = Store(self.output)
        for arm in self.arms:
            (self.folder(arm.name) / "samples").mkdir(parents=True, exist_ok=True)

    def folder(self, arm: str) -> Path:
        config = next(candidate.config for candidate in self.arms if candidate.name == arm)
        return self.store.open(self.key(config)).folder

    @staticmethod
    def key(config) -> str:
        return trajectory_key(config, "fingerprint", "cpu")

    def trained(self, arm: str, rows, **status) -> None:
        folder = self.folder(arm)
        (folder / "metrics.csv").write_text(csv_text(rows))
        (folder / "status.json").write_text(json.dumps({
            "state": "training", "epochs": len(rows), "best_epoch": len(rows), "device": "cpu", "data": "fingerprint",
            "versions": {"torch": "9.9"}, **status}))

    def sample(self, arm: str, epoch: int, colour=(200, 30, 60), size=(64, 24)) -> None:
        Image.new("RGB", size, colour).save(self.folder(arm) / "samples" / f"epoch_{epoch:04d}.png")

    def stopped(self, arm: str, epoch: int, value: float, best: float, by: str) -> None:
        config, other = (next(c.config for c in self.arms if c.name == name) for name in (arm, by))
        self.past.append({"event": "stopped", "key": self.key(config), "epoch": epoch, "value": value, "cutoff": best,
                          "best": best, "beaten_by": [self.key(other)], "metric": "val/mse"})

    def race(self) -> Race:
        return Race(self.spec, self.start, self.arms, key_of=self.key, open_trajectory=self.store.open,
                    past=self.past, retry=False)

    def winner(self, arm: str, **provenance) -> Winner:
        config = next(candidate.config for candidate in self.arms if candidate.name == arm)
        return Winner("phase", config.flat(), {"arm": arm, "trial": f"{arm}_seed42", **provenance})

    def page(self, winner: Winner | None = None, command: str = "python tune_runner.py phase.yaml",
             data: str = "99 images") -> Page:
        race = self.race()
        decision = decide(race.records(), [arm.name for arm in self.arms], self.spec.objective, self.spec.decision)
        return Page(render(race, decision, winner=winner, dataset_words=data, command=command, output=self.output))


def arms(*names, **more) -> dict:
    return {name: {"train.learning_rate": 10.0 ** -(place + 2), **more} for place, name in enumerate(names)}


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
    assert "Still improving by more than 5% over the last 3 epochs: A_seed42 (300%)" in text
    assert "One seed each." in text


def test_candidates_have_score_figures_settings_and_verdict(sweep):
    page = sweep.page(sweep.winner("A"))
    assert page.tables[0][0] == ["arm", "verdict", "val/mse", "behind", "val/psnr", "parameters", "seeds", "epochs",
                                 "differs from its start by"]
    first, second, stopped = page.row("A"), page.row("B"), page.row("C")
    assert first[2:8] == ["0.1000", "best", "25", "1,234,567", "1", "5 of 5"]
    assert second[2:4] == ["0.1040", "4%"] and second[1].startswith("as good")
    assert stopped[1].startswith("behind at epoch 2") and stopped[2:4] == ["0.8000", "—"]
    start = sweep.start["train.learning_rate"]
    assert first[8] == f"train.learning_rate {start:g} → 0.01"


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


def test_pictures_are_the_last_within_this_sweep(sweep):
    sweep.sample("A", 1, colour=(1, 2, 3))
    sweep.sample("A", 5, colour=(10, 200, 30))
    sweep.sample("A", 8, colour=(7, 7, 7))                    # of a longer training that the store holds
    sweep.sample("C", 1, colour=(99, 0, 0))
    (sweep.folder("B") / "samples" / "epoch_0005.png").write_bytes(b"no picture")
    page = sweep.page(sweep.winner("A"))
    pictures = page.pictures()
    assert [picture.convert("RGB").getpixel((3, 3)) for picture in pictures] == [(10, 200, 30), (99, 0, 0)]
    assert "A winner epoch 5 of 5" in page.text() and "C behind at epoch 2 epoch 1 of 2" in page.text()


def test_large_pictures_are_shrunk_until_they_fit(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    path = tmp_path / "epoch_0001.png"
    Image.fromarray(noise).save(path)
    whole = base64.b64decode(embedded(path, 10_000_000)["src"].split(",")[1])
    small = base64.b64decode(embedded(path, 100_000)["src"].split(",")[1])
    assert whole == path.read_bytes()
    assert len(small) <= 100_000 and Image.open(io.BytesIO(small)).size == (200, 150)


def test_the_page_stays_below_its_bound_and_loads_nothing(sweep):
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (1100, 1500, 3), dtype=np.uint8))
    for arm in "ABC":
        noise.save(sweep.folder(arm) / "samples" / "epoch_0002.png", compress_level=1)
    race = sweep.race()
    decision = decide(race.records(), list("ABC"), sweep.spec.objective, sweep.spec.decision)
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


NASTY = "</script><script>alert(1)</script><img src=x onerror=alert(2)> & \"quotes\" {{ 7*7 }} {% raise %}"


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
    write_report(path, race, decide(race.records(), ["A"], made.spec.objective, made.spec.decision), winner=None,
                 dataset_words="", command="")
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
    assert "only wins The only candidate." in page.text() and "One seed each" not in page.text()
    assert page.row("only")[8] == "nothing"


def test_seeds_give_a_standard_error_and_dashed_lines(tmp_path):
    made = Sweep(tmp_path, arms("A", "B"), decision={"repeats": 2, "within": "5%"})
    made.trained("A", rows_of(GOOD))
    made.trained("B", rows_of(FAIR))
    for arm, end in zip(made.arms, (0.12, 0.124), strict=True):
        again = arm.config.train.model_copy(update={"seed": arm.config.train.seed + 1})
        folder = made.store.open(made.key(arm.config.model_copy(update={"train": again}))).folder
        folder.mkdir()
        (folder / "metrics.csv").write_text(csv_text(rows_of([*GOOD[:4], end])))
    race = made.race()
    assert race.idle
    decision = decide(race.records(), ["A", "B"], made.spec.objective, made.spec.decision)
    page = Page(render(race, decision, winner=made.winner("A"), dataset_words="", command="", output=made.output))
    assert page.row("A")[2] == "0.1100 ± 0.01000" and page.row("A")[5:7] == ["2", "10 of 10"]
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
    code = "import sys, autoenc.sweep.report; print([m for m in ('torch', 'ray', 'plotly') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
