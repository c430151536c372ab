"""The command as a person meets it: what is wrong is told in one message with exit code 2, and nothing is written."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import tune_runner
from autoenc.errors import InputError

PROJECT = Path(__file__).resolve().parents[1]
PHASE = {number: str(PROJECT / "sweeps" / f"phase1_{number}.yaml") for number in (1, 2, 3, 4)}
QUICK = ["--preset", "quick"]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("AUTOENC_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(tmp_path)


def closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.parametrize("arguments, words", [
    ([PHASE[4].replace("1_4", "1_5x")], ["no such sweep file", "phase1_"]),
    ([PHASE[1], "--set", "train.epoch=3"], ["--set train.epoch=3", "train.epochs"]),
    ([PHASE[1], "--set", "train.epochs=three"], ["--set train.epochs=three", "'three'"]),
    ([PHASE[1], "--set", "train.epochs"], ["KEY=VALUE"]),
    ([PHASE[1], "--set", "objective.metric=val/psnr"], ["objective.metric"]),
    ([PHASE[4], "--set", "model.latent_channels=3"], ["model.latent_channels", "phase1_1_latent_channels"]),
    ([PHASE[4], "--set", "phase1_7:train.epochs=3"], ["phase1_7"]),
    ([PHASE[4], "--set", "data.image_size=48"], ["phase1_2.yaml", "R3", "48", "32"]),
    ([PHASE[4], "--preset", "quik"], ["quik", "quick"]),
    ([PHASE[4], "--preset", "full"], ["data.manifest"]),
    ([PHASE[1], "--set", "data.source=manifest", "--set", "data.manifest=none.csv"], ["none.csv"]),
    ([PHASE[1], *QUICK, "--set", "model.heads=[rgb]"], ["loss.segmentation", "model.heads"]),
    ([PHASE[2], *QUICK, "--no-upstream"], ["phase1_1_latent_channels", "python tune_runner.py", "--preset quick"]),
    ([PHASE[1], *QUICK, "--address", "nowhere"], ["HOST:PORT"]),
    ([PHASE[1], *QUICK, "--address", "http://127.0.0.1:8265"], ["HOST:PORT"]),
    ([PHASE[1], "--output", "/dev/null/x"], ["/dev/null"]),
])
def test_what_is_wrong_is_said_and_nothing_is_written(arguments, words, tmp_path):
    with pytest.raises(InputError) as error:
        tune_runner.main([*arguments, *([] if "--output" in arguments else ["--output", str(tmp_path / "out")])])
    assert all(word in str(error.value) for word in words), str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_head_that_the_data_cannot_serve_is_refused_before_anything_runs(tmp_path):
    """The image folder has neither a palette nor labels; phase 1.1 trains both heads."""
    from PIL import Image

    (tmp_path / "images").mkdir()
    for index in range(20):
        Image.new("RGB", (16, 16), (index * 12, 0, 0)).save(tmp_path / "images" / f"{index}.png")
    with pytest.raises(InputError) as error:
        tune_runner.main([PHASE[1], "--output", str(tmp_path / "out"), "--set", "data.source=folder",
                          "--set", "data.manifest=images", "--set", "data.limit=null"])
    assert "loss.segmentation" in str(error.value) and "phase1_1.yaml" in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [
    ["--address", f"127.0.0.1:{closed_port()}"], ["--set", "resources.cpus=10000"],
    pytest.param(["--set", "resources.gpus=7"], marks=pytest.mark.slow)])
def test_a_cluster_that_cannot_serve_is_an_error(arguments, tmp_path):
    done = subprocess.run(
        [sys.executable, str(PROJECT / "tune_runner.py"), PHASE[1], *QUICK, "--output", "out", "--no-dashboard",
         *arguments],
        capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONPATH": str(PROJECT)})
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    assert any(word in done.stderr for word in ("nobody listens", "the cluster has"))
    assert not (tmp_path / "out").exists()


def test_a_dry_run_says_what_would_run_and_loads_neither_torch_nor_ray(tmp_path):
    code = ("import sys, tune_runner; code = tune_runner.main(sys.argv[1:]); "
            "print('loaded', *({'torch', 'ray', 'optuna'} & set(sys.modules))); sys.exit(code)")
    done = subprocess.run([sys.executable, "-c", code, PHASE[2], "--output", "out", PHASE[4], "--dry-run"],
                          capture_output=True, text=True, timeout=60, env=os.environ | {"PYTHONPATH": str(PROJECT)})
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded"
    for text in ("phase1_1_latent_channels", "phase1_4_loss_tuning", "at most 50 epochs", "model.base_channels 64"):
        assert text in done.stdout
    assert list(tmp_path.iterdir()) == []
