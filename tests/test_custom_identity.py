"""What one's own model or loss is to the store, to a sweep and to its workers: its text; and the commands with it."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml
from owncode import LOSSES, PLAIN, ROOT, another_process, net
from sweepfiles import load, refused

from autoenc import custom
from autoenc.errors import InputError
from autoenc.sweep.inherit import Winner, arm_candidates, stale_reasons, starting_point, winner_hash
from autoenc.train import main

# Identity -------------------------------------------------------------------------------------------------------------


SWEEP = {"config": {"data.image_size": 16, "model.downsampling_steps": 2}, "asha": False}


def sweep_of(name: str) -> dict:
    return {**SWEEP, "arms": {"conv2d": {}, "own": {"model.kind": "custom", "model.target": f"{name}:Net"},
                              "loss": {"loss.custom": [{"target": f"{name}:bright"}]}}}


def candidates(folder: Path, content: dict) -> list:
    spec = load(folder, content)
    return arm_candidates(spec, starting_point(spec, None))


def test_the_text_is_part_of_the_identity_of_what_uses_it(module, tmp_path, monkeypatch):
    name = module(PLAIN + "def bright(outputs, batch): pass\n")
    content = sweep_of(name)
    before = {candidate.name: candidate.config.identity() for candidate in candidates(tmp_path, content)}
    spec = load(tmp_path, content)
    winner = Winner("toy", {}, {"format": 1, "content_hash": spec.content_hash, "data": "d",
                                "content": json.loads(json.dumps(spec.content))})
    assert stale_reasons(spec, winner, None, "d") == []

    module(PLAIN + "def bright(outputs, batch): pass\n# a comment\n", name)
    assert load(tmp_path, content).content_hash == spec.content_hash         # as this process has read it
    another_process(monkeypatch)
    after = {candidate.name: candidate.config.identity() for candidate in candidates(tmp_path, content)}
    assert [before[arm] == after[arm] for arm in ("conv2d", "own", "loss")] == [True, False, False]
    digest = hashlib.sha256((tmp_path / f"{name}.py").read_bytes()).hexdigest()
    assert after["own"]["sources"] == {f"{name}:Net": digest}
    assert after["loss"]["sources"] == {f"{name}:bright": digest}
    assert stale_reasons(load(tmp_path, content), winner, None, "d") == [f"the source text of {name} changed"]
    flat = candidates(tmp_path, content)[1].config.flat()
    assert len({winner_hash(flat), winner_hash(flat, {"a": "1"}), winner_hash(flat, {"a": "2"})}) == 3


def test_a_sweep_tells_file_key_and_value_of_what_is_not_there(module, tmp_path):
    name = module("class Nut: pass\ndef bright(outputs, batch): pass\n")
    with pytest.raises(InputError) as error:
        candidates(tmp_path, sweep_of(name))
    assert str(error.value) == (f"{tmp_path}/toy.yaml: arms.own: model.target: '{name}:Net': there is no Net in "
                                f"{tmp_path}/{name}.py (did you mean 'Nut'?)")
    with pytest.raises(InputError, match=r"/toy.yaml: loss.custom: 'absent:bright': there is no module absent"):
        candidates(tmp_path, {**SWEEP, "config": {**SWEEP["config"], "loss.custom": [{"target": "absent:bright"}]}})
    assert "loss.custom.0.target is missing" in refused(
        tmp_path, {**SWEEP, "config": {"loss.custom": [{"weight": 1}]}})


def test_a_plan_imports_neither_torch_nor_the_module(module, tmp_path):
    name = module("raise RuntimeError('imported')\nclass Net: pass\ndef bright(outputs, batch): pass\n")
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump({"name": "toy", **sweep_of(name)}), encoding="utf-8")
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import tune_runner
assert tune_runner.main(["toy.yaml", "--dry-run", "--set", "data.limit=20"]) == 0
print(*({{"torch", "ray", {name!r}}} & set(sys.modules)), "nothing more")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60,
                          env={**os.environ, "AUTOENC_CACHE": str(tmp_path / "cache")}, check=False)
    assert done.stdout.splitlines()[-1] == "nothing more", done.stdout + done.stderr
    assert f"model.target {name}:Net" in done.stdout


def test_workers_import_the_text_that_the_command_read(module, tmp_path, monkeypatch):
    """Whatever is in the file by then; also of a package, and with what it imports beside it."""
    module("", "cst_sent.__init__")
    module("word = 'beside'\n", "cst_sent.other")
    name = module("from cst_sent.other import word\nclass Net: text = 'first'\n", "cst_sent.models")
    another_process(monkeypatch)
    custom.source_digest(f"{name}:Net")
    sent = custom.for_workers()
    assert list(sent) == [name] and sent[name][1] == str(tmp_path)
    module("raise RuntimeError\n", name)
    code = f"""
from autoenc import custom
custom.arrive({sent!r})
custom.check_target("{name}:Net", "class")
found = custom.load_target("{name}:Net")
import inspect, sys
print(found.text, sys.modules["{name}"].word, custom.source_digest("{name}:Net"))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, timeout=60,
                          check=False)
    text = "from cst_sent.other import word\nclass Net: text = 'first'\n"
    assert done.stdout.split() == ["first", "beside", hashlib.sha256(text.encode()).hexdigest()], done.stderr
    with pytest.raises(InputError, match="has changed since this process read it"):
        custom.load_target(f"{name}:Net")


# From the commands ----------------------------------------------------------------------------------------------------


def command(folder: Path, *words: str, code: int = 0) -> str:
    """Runs a command in the folder; its output, both streams."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env |= {"HOME": str(folder), "AUTOENC_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    ray = tempfile.mkdtemp(prefix="ray", dir="/tmp")                      # paths of sockets may not be long
    try:
        done = subprocess.run([sys.executable, *words], cwd=folder, env={**env, "RAY_TMPDIR": ray},
                              capture_output=True, text=True, timeout=300, check=False)
    finally:
        shutil.rmtree(ray, ignore_errors=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def trained(output: Path) -> dict[str, int]:
    with (output / "trials.csv").open(encoding="utf-8") as file:
        return {row["arm"]: int(row["epochs_trained"]) for row in csv.DictReader(file)}


def test_a_training_that_cannot_be_leaves_nothing(module, tmp_path, monkeypatch):
    monkeypatch.setenv("AUTOENC_CACHE", str(tmp_path / "cache"))
    name = module(net(decode='return {"rgb": latent}') + LOSSES)
    path, settings = tmp_path / "one.yaml", {"kind": "custom", "target": f"{name}:Net"}
    for content, said in (
            ({"model": settings}, rf"model.target: '{name}:Net': decode\(\) gives 'rgb' of shape \(2, 2, 4, 4\)"),
            ({"model": {**settings, "target": f"{name}:Nut"}}, rf"model.target: '{name}:Nut': there is no Nut in"),
            ({"loss": {"custom": [{"target": f"{name}:Term"}]}}, rf"loss.custom: '{name}:Term': .* is a class")):
        path.write_text(yaml.safe_dump({"data": {"image_size": 16, "limit": 20}, **content}))
        with pytest.raises(InputError, match=f"^{path}: {said}"):
            main([str(path), "--output", str(tmp_path / "out")])
        assert not (tmp_path / "out").exists()


@pytest.fixture
def page(tmp_path) -> Path:
    """A folder with the files that docs/own-model.md shows."""
    text = (ROOT / "docs" / "own-model.md").read_text(encoding="utf-8")
    for name, content in re.findall(r"^```\w+\n# (\S+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        (tmp_path / Path(name).name).write_text(content, encoding="utf-8")
    assert {path.name for path in tmp_path.iterdir()} == {"mymodel.py", "own_model.yaml", "patches.yaml"}
    return tmp_path


@pytest.mark.slow
def test_the_example_of_the_page_alone(page):
    config = yaml.safe_load((page / "patches.yaml").read_text())
    config["config"]["data"]["limit"], config["config"]["train"] = 40, {"epochs": 2}
    (page / "patches.yaml").write_text(yaml.safe_dump(config))
    said = command(page, "-m", "autoenc.train", "patches.yaml", "--output", "runs/patches")
    assert "epoch   2/2" in said
    with (page / "runs/patches/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert float(rows[1]["train/edges"]) > 0 and float(rows[1]["val/edges"]) > 0
    command(page, "-m", "autoenc.evaluate", "runs/patches/best.pt", "--json", "found.json")
    best = min(rows, key=lambda row: float(row["val/mse"]))
    assert json.loads((page / "found.json").read_text())["val"]["edges"] == pytest.approx(float(best["val/edges"]))
    code = ("from autoenc import load_model; import torch\nm = load_model('runs/patches/best.pt')\n"
            "z = m.encode(torch.zeros(2, 3, 32, 32))['latent']\n"
            "print(type(m.module).__name__, *z.shape, *m.decode(z)['rgb'].shape)")
    assert command(page, "-c", code).split() == ["Patches", "2", "4", "4", "4", "2", "3", "32", "32"]
    (page / "mymodel.py").rename(page / "elsewhere.py")
    assert command(page, "-m", "autoenc.evaluate", "runs/patches/best.pt", code=2).startswith(
        "error: runs/patches/best.pt: model.target: 'mymodel:Patches': there is no module mymodel on Python's path")


@pytest.mark.slow
def test_the_example_of_the_page_as_a_sweep(page):
    runner = (str(ROOT / "tune_runner.py"), "own_model.yaml", "--output", "out", "--no-dashboard", "--set",
              "data.limit=40", "--set", "train.epochs=2")
    command(page, *runner)
    assert trained(page / "out/own_model") == {"conv2d": 2, "patches": 2, "edges": 2}
    assert "nothing to train" in command(page, *runner)

    module = page / "mymodel.py"
    text = module.read_text()
    module.write_text(f"{text}\n# a comment\n")
    said = command(page, *runner)
    assert "runs because the source text of mymodel changed" in " ".join(said.split())
    assert trained(page / "out/own_model") == {"conv2d": 0, "patches": 2, "edges": 2}

    decided = (page / "out/own_model/decision.json").read_bytes()
    module.write_text(text.replace('"rgb": self.decoder(latent)', '"rgb": self.decoder(latent)[..., :16, :16]'))
    said = command(page, *runner, code=2)
    assert [line for line in said.splitlines() if "error" in line or "arms" in line] == [
        f"{start}own_model.yaml: arms.{arm}: model.target: 'mymodel:Patches': decode() gives 'rgb' of shape "
        "(2, 3, 16, 16) and torch.float32; it should be (2, 3, 32, 32), as the images, of floating point"
        for start, arm in (("error: ", "patches"), ("", "edges"))]
    assert (page / "out/own_model/decision.json").read_bytes() == decided

    module.write_text(text)                                        # taken back: the store has it
    command(page, *runner)
    assert trained(page / "out/own_model") == {"conv2d": 0, "patches": 0, "edges": 0}
