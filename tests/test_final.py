"""From a winner to a finished model: phases that vary nothing, and those that normalise latents. Without Ray."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from autoenc import load_config, load_model
from autoenc.data import prepare
from autoenc.errors import InputError
from autoenc.sweep import export, final, inherit
from autoenc.sweep.phase import Phase, conclude, decide_race, open_phase
from autoenc.sweep.work import Task, work

BASE = {"config": {"data": {"image_size": 16, "limit": 60},
                   "model": {"latent_channels": 3, "base_channels": 8, "downsampling_steps": 2},
                   "train": {"epochs": 2, "batch_size": 16, "learning_rate": 1e-2, "patience": None}}}
SCREEN = {"name": "screen", "arms": {"S": {"model.latent_channels": 2}, "L": {}}}
FINISH = {"name": "finish", "inherits": "screen.yaml", "export_name": "AE_final",
          "config": {"train": {"epochs": 4, "patience": 4, "min_delta": 1e-4}}}
NORMAL = {"name": "normal", "inherits": "finish.yaml", "start": "parent", "export_name": "AE_normalized",
          "config": {"model": {"normalize_latents": True}}}
WAYS = {"name": "ways", "inherits": "finish.yaml",
        "config": {"model": {"normalize_latents": True}, "train": {"epochs": 2}},
        "arms": {mode: {"model.normalizer": mode} for mode in ("exact", "running", "loss", "learned")},
        "asha": False}


class Project:
    """Sweep files, an output folder, and the command's steps over them in this process."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.output, self.trained = folder, folder / "out", 0
        self.write(base=BASE, screen=SCREEN, finish=FINISH, normal=NORMAL, ways=WAYS)

    def write(self, **files) -> None:
        for stem, content in files.items():
            (self.folder / f"{stem}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))

    def run(self, stem: str, **overrides) -> Phase:
        """Runs a sweep and those above it where they are missing."""
        texts = [inherit.parse_override(f"{key.replace('__', '.')}={value}") for key, value in overrides.items()]
        for spec in inherit.load_chain(self.folder / f"{stem}.yaml", (), texts):
            phase = open_phase(spec, self.output, prepare)
            if phase.reasons:
                self._run(phase)
        return open_phase(spec, self.output, prepare)

    def _run(self, phase: Phase) -> None:
        with phase.writing() as folder:
            race = phase.race("cpu", folder.emit)
            while run := race.next():
                task = Task(key=run.key, output=str(self.output), config=run.config.flat(), threads=1, device="cpu",
                            after=race.wanted_after(run), keep=run.keep)
                for said in work(task):
                    if "row" in said:
                        self.trained += 1
                        race.report(run, said["row"])
                    elif "outcome" in said:
                        assert said["outcome"] == "completed", said
                        race.finish(run, said["outcome"])
            decision = decide_race(race)
            assert export.missing_weights(race, decision) is None
            conclude(phase, race, decision, folder)

    def remarks(self, phase: Phase) -> list[final.Remark]:
        race = phase.race("cpu")
        return final.remarks(race, export.winning_trial(race, decide_race(race)), phase.parent, self.output)


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Project:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("final")
        patch.setenv("AUTOENC_CACHE", str(folder / "cache"))
        project = Project(folder)
        project.phase = project.run("normal")
        yield project


def test_the_winner_is_trained_on_and_then_taken_over(project):
    assert project.trained == 2 + 2 + 2                # two arms, then two more epochs of the winner, then nothing
    folders = [project.output / name for name in ("screen", "finish", "normal")]
    trajectories = [yaml.safe_load((folder / "best_config.yaml").read_text())["provenance"]["trajectory"]
                    for folder in folders]
    assert len(set(trajectories)) == 1
    for folder, name in zip(folders[1:], ("AE_final", "AE_normalized"), strict=True):
        assert {f"{name}_checkpoint_best.pt", f"{name}_checkpoint_latest.pt", f"{name}_checkpoint_best.safetensors",
                f"{name}_metrics.csv", "evaluation.json", "handoff.yaml"} <= {path.name for path in folder.iterdir()}
        assert sorted(path.name for path in (folder / "pictures").iterdir())[0].startswith("interpolations_")
    assert not (folders[0] / "handoff.yaml").exists()
    plain = load_model(folders[1] / "AE_final_checkpoint_best.pt")
    normal = load_model(folders[2] / "AE_normalized_checkpoint_best.pt")
    assert plain.encoder.latent_normalizer is None
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    pictures = [model.decode(model.encode(images)["latent"])["rgb"] for model in (plain, normal)]
    assert (pictures[0] - pictures[1]).abs().max() < 1e-5
    assert load_config(folders[2] / "best_config.yaml").model.normalize_latents


def test_the_handoff_says_what_a_diffusion_model_needs(project):
    for name, normalized in (("finish", False), ("normal", True)):
        folder = project.output / name
        handoff = yaml.safe_load((folder / "handoff.yaml").read_text())
        channels = load_config(folder / "best_config.yaml").model.latent_channels
        assert (folder / handoff["checkpoint"]).is_file() and (folder / handoff["weights"]).is_file()
        assert handoff["latent"] == {"height": 4, "width": 4, "channels": channels, "normalized": normalized}
        assert handoff["unet"]["in_channels"] == len(handoff["latents_mean"]) == len(handoff["latents_std"]) == channels
        assert (max(map(abs, handoff["latents_mean"])) < 1e-3) == normalized
        assert handoff["psnr"]["val"] > 0 and handoff["psnr"]["test"] > 0 and handoff["latency"]["encode_ms"] > 0
        content = torch.load(folder / handoff["checkpoint"], weights_only=True)
        assert content["latents_std"] == handoff["latents_std"]


def test_what_is_said_of_a_finished_model(project):
    said = project.remarks(project.phase)
    assert [remark.warning for remark in said if "taken over" in remark.text] == [False]
    assert any("not yet N(0, I)" in remark.text for remark in said)
    finish = open_phase(inherit.load_chain(project.folder / "finish.yaml")[-1], project.output, prepare)
    said = {remark.text: remark.warning for remark in project.remarks(finish)}
    ending = next(text for text in said if "converged" in text or "ran out" in text)
    assert said[ending] == ("ran out" in ending)
    assert any("of all phases" in text for text in said)


def test_deciding_twice_trains_nothing_and_writes_the_same(project):
    before = (project.output / "normal" / "decision.json").read_bytes()
    (project.output / "normal" / "best_config.yaml").unlink()
    trained = project.trained
    project.run("normal")
    assert project.trained == trained and (project.output / "normal" / "decision.json").read_bytes() == before


def test_the_ways_to_normalise(project):
    phase = project.run("ways")
    race = phase.race("cpu")
    figures = {trial.candidate.name: race.figures_of(trial.run) for trial in race.trials}
    for mode, found in figures.items():
        worst = max(found["latent/worst_mean"], found["latent/worst_deviation"])
        assert (worst <= final.STANDARD) == (mode != "learned"), (mode, found)
    assert figures["running"]["val/mse"] == pytest.approx(figures["exact"]["val/mse"], rel=0.02)
    warnings = [remark.text for remark in project.remarks(phase) if remark.warning]
    assert len(warnings) == 1 and "learned" in warnings[0] and "no gradient" in warnings[0]


@pytest.mark.parametrize(("change", "words"), [
    ({"start": "winner"}, "start: 'winner' should be parent"),
    ({"start": "parent", "arms": {"A": {"model.base_channels": 16}}}, "varies nothing"),
    ({"start": "parent", "inherits": None}, "a sweep that it inherits"),
])
def test_start_is_checked_when_the_file_is_read(tmp_path, change, words):
    project = Project(tmp_path)
    content = {**NORMAL, **change}
    project.write(normal={key: value for key, value in content.items() if value is not None})
    with pytest.raises(InputError, match=words):
        inherit.load_chain(tmp_path / "normal.yaml")


def test_what_is_taken_over_cannot_be_changed(project):
    with pytest.raises(InputError, match=r"normal\.yaml: start: parent takes the winner .* train\.batch_size 8"):
        project.run("normal", **{"normal:train__batch_size": 8})


def test_the_test_split_is_read_for_a_final_model(project):
    evaluation = json.loads((project.output / "normal" / "evaluation.json").read_text())
    assert evaluation["test"]["mse"] > 0 and "pca" in evaluation["test"]["baselines"]
    table = (project.output / "normal" / "trials.csv").read_text()
    assert "test/psnr" in table.splitlines()[0] and "latent/worst_mean" in table.splitlines()[0]


@pytest.mark.parametrize("content", [None, "", "{}", "[]", '{"cost": 3}', "[" * 100_000])
def test_an_evaluation_that_is_broken_is_made_again(project, content):
    folder = project.output / "normal"
    best = yaml.safe_load((folder / "best_config.yaml").read_text())["provenance"]
    (path,) = (project.output / "store" / best["trajectory"]).glob("normalized_epoch_*.evaluation.json")
    before = json.loads(path.read_text())
    path.unlink()
    if content is not None:
        path.write_text(content)
    (folder / "best_config.yaml").unlink()
    trained = project.trained
    project.run("normal")
    after = json.loads(path.read_text())
    assert project.trained == trained and after["test"] == before["test"] and after.keys() == before.keys()
    assert (folder / "handoff.yaml").is_file() and (folder / "best_config.yaml").is_file()


def test_pairs_that_ran_on_several_kinds_of_device_are_told(tmp_path):
    project = Project(tmp_path)
    project.write(screen={**SCREEN, "decision": {"repeats": 2, "within": "50%", "baseline": {"arm": "S"}}})
    phase = project.run("screen")
    race = phase.race("cpu")
    assert race.idle and len(race.trials) == 4 and final.remarks(race, None, None, project.output) == []
    noisy = race.trials[-1].run
    noisy.rows = [row | {"val/mse": 1.7 * row["val/mse"]} for row in noisy.rows]
    noise, = final.remarks(race, None, None, project.output)
    assert noise.warning and "more than the 50% that keep an arm in the race (asha.margin)" in noise.text
    path = race.trials[-1].run.trajectory.folder / "status.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"device_name": "another one"}))
    race = phase.race("cpu")
    assert race.idle
    remark, = final.remarks(race, None, None, project.output)
    assert remark.warning and remark.text.startswith("seed 43 was trained on several kinds of device")
    assert "L on another one" in remark.text
