"""The latents of a data set on disk: what is in them, and that nothing that ends a run changes a byte."""

from __future__ import annotations

import csv
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers import small_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from autoenc import load_model
from autoenc.checkpoint import build_model, checkpoint_content, data_shapes, save_checkpoint
from autoenc.data import prepare
from autoenc.encode import Settings, encode_dataset, load_latents, main
from autoenc.errors import InputError
from autoenc.metrics import to_unit
from autoenc.sweep.store import lease

torch.set_num_threads(1)
COUNT = 50
SMALL = ["--shard-size", "20", "--batch-size", "8"]          # three shards, whole and partial batches in each


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTOENC_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    rows = [["layout_path", "type"]]
    for k in range(COUNT):
        name = f"{(7 * k) % COUNT:02d}, ü.png"               # not in the order of the names
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / name)
        rows.append([name, ("room", "scene", "")[k % 3]])
    with (folder / "all.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return folder / "all.csv"


def checkpoint(path: Path, manifest: Path | None, seed: int = 1, **changes) -> Path:
    """A model with weights as they start; normalised by made-up statistics where the configuration normalises."""
    source = ({"data__source": "manifest", "data__manifest": str(manifest), "data__limit": 12}
              if manifest else {"data__limit": 30})
    config = small_config(train__seed=seed, data__split=[0.5, 0.3, 0.2], **{**source, **changes})
    dataset = prepare(config.data.model_copy(update={"limit": None if manifest else 30}))
    model = build_model(config, dataset)
    if model.encoder.latent_normalizer is not None:
        model.encoder.latent_normalizer.set_statistics(torch.tensor([0.3, -0.2]), torch.tensor([0.5, 2.0]))
    save_checkpoint(path, checkpoint_content(config, data_shapes(dataset), model, epoch=1, metrics={}))
    return path


@pytest.fixture(scope="module")
def plain(tmp_path_factory, manifest) -> Path:
    return checkpoint(tmp_path_factory.mktemp("plain") / "model.pt", manifest, model__normalize_latents=True)


@pytest.fixture(scope="module")
def vae(tmp_path_factory, manifest) -> Path:
    return checkpoint(tmp_path_factory.mktemp("vae") / "vae.pt", manifest, model__variational=True,
                      model__latent="sample", model__normalize_latents=True)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def encode(checkpoint: Path, manifest: Path | None, output: Path, *more: str) -> dict[str, bytes]:
    assert main([str(checkpoint), *([str(manifest)] if manifest else []), "--output", str(output), "--device", "cpu",
                 *SMALL, *more]) == 0
    return content(output)


@pytest.fixture(scope="module")
def reference(tmp_path_factory, vae, manifest) -> dict[str, bytes]:
    """What an undisturbed run writes."""
    return encode(vae, manifest, tmp_path_factory.mktemp("reference"))


@pytest.mark.parametrize("form, dtype, tolerance", [("safetensors", "float32", 1e-5), ("npz", "float32", 1e-5),
                                                    ("npz", "float16", 2e-3), ("safetensors", "bfloat16", 2e-2)])
def test_every_image_is_encoded_in_the_order_of_the_manifest(tmp_path, plain, manifest, form, dtype, tolerance, capsys):
    files = encode(plain, manifest, tmp_path, "--format", form, "--dtype", dtype)
    assert set(files) == {*(f"latents_{k:05d}.{form}" for k in range(3)), "manifest.csv", "statistics.json"}
    assert "50 images" in capsys.readouterr().out

    latents, rows = load_latents(tmp_path)
    model = load_model(plain)
    whole = prepare(model.config.data.model_copy(update={"limit": None}))
    with torch.inference_mode():
        expected = model.encode(to_unit(np.array(whole.images)))["latent"]
    assert latents.dtype == getattr(torch, dtype) and latents.shape == expected.shape == (COUNT, 2, 4, 4)
    torch.testing.assert_close(latents.float(), expected, atol=tolerance, rtol=tolerance)

    with manifest.open(newline="", encoding="utf-8") as file:
        given_rows = list(csv.DictReader(file))
    assert [(row["name"], row["label"]) for row in rows] == [(row["layout_path"], row["type"]) for row in given_rows]
    assert [(row["shard"], int(row["row"])) for row in rows] == [
        (f"latents_{k // 20:05d}.{form}", k % 20) for k in range(COUNT)]
    parts = {name: [k for k, row in enumerate(rows) if row["split"] == name] for name in whole.splits}
    assert parts == {name: indices.tolist() for name, indices in whole.splits.items()}

    told = json.loads(files["statistics.json"])
    for statistics, chosen in ((told, latents[parts["train"]]), (told["all"], latents)):
        chosen = chosen.double()
        np.testing.assert_allclose(statistics["latents_mean"], chosen.mean((0, 2, 3)), atol=1e-12)
        np.testing.assert_allclose(statistics["latents_std"], chosen.std((0, 2, 3), correction=0), rtol=1e-12)
    assert told["images"] == {"all": COUNT, **{name: len(rows) for name, rows in parts.items()}}
    assert told["latent_shape"] == [2, 4, 4] and told["normalized"]
    assert told["of"]["data"] == whole.fingerprint


def test_other_programs_can_read_the_shards(tmp_path, vae, manifest):
    encode(vae, manifest, tmp_path / "a", "--posterior")
    encode(vae, manifest, tmp_path / "b", "--posterior", "--format", "npz")
    ours = safetensors.torch.load_file(tmp_path / "a/latents_00001.safetensors")
    theirs = np.load(tmp_path / "b/latents_00001.npz", allow_pickle=False)
    assert set(ours) == set(theirs.files) == {"latent", "mu", "logvar"}
    assert all(np.array_equal(ours[name].numpy(), theirs[name]) for name in ours)


def test_draws_are_those_of_the_posterior_and_of_the_image_alone(tmp_path, vae, manifest, reference):
    encode(vae, manifest, tmp_path / "a", "--posterior", "--shard-size", "7", "--batch-size", "3")
    latents, _ = load_latents(tmp_path / "a")
    (tmp_path / "b").mkdir()
    for name, part in reference.items():
        (tmp_path / "b" / name).write_bytes(part)
    torch.testing.assert_close(latents, load_latents(tmp_path / "b")[0], atol=1e-5, rtol=1e-5)

    model = load_model(vae)
    mu, logvar = (load_latents(tmp_path / "a", name)[0] for name in ("mu", "logvar"))
    with torch.inference_mode():
        expected = model.encode(to_unit(np.array(prepare(
            model.config.data.model_copy(update={"limit": None})).images)), torch.Generator())
    torch.testing.assert_close(mu, expected["mu"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logvar, expected["logvar"], atol=1e-5, rtol=1e-5)
    noise = (model.encoder.latent_normalizer.inverse(latents) - mu).detach() * torch.exp(-0.5 * logvar)
    assert len(noise.flatten(1).round(decimals=3).unique(dim=0)) == COUNT
    assert abs(noise.mean()) < 4 / noise.numel() ** 0.5 and abs(noise.std() - 1) < 4 / (2 * noise.numel()) ** 0.5


def test_its_own_data_and_other_data(tmp_path, manifest, plain, capsys):
    layouts = checkpoint(tmp_path / "layouts.pt", None)
    assert len(encode(layouts, None, tmp_path / "own")) == 4
    latents, rows = load_latents(tmp_path / "own")
    assert len(latents) == 30 and rows[3]["name"] == "layout_000003" and rows[0]["label"]
    assert "not standardised" in capsys.readouterr().out

    encode(layouts, manifest.parent, tmp_path / "folder")
    assert [row["name"] for row in load_latents(tmp_path / "folder")[1]] == sorted(
        path.name for path in manifest.parent.glob("*.png"))
    encode(plain, None, tmp_path / "all")
    assert len(load_latents(tmp_path / "all")[0]) == COUNT
    encode(plain, None, tmp_path / "fewer", "--set", "data.limit=25", "--set", "data.image_size=32")
    assert load_latents(tmp_path / "fewer")[0].shape == (25, 2, 8, 8)


@pytest.mark.parametrize("images", [0, 8, 24, 44])
def test_an_interrupted_run_goes_on_and_ends_the_same(tmp_path, vae, manifest, reference, images, capsys):
    model = load_model(vae)
    whole = prepare(model.config.data.model_copy(update={"limit": None}))
    told = json.loads(reference["statistics.json"])["of"]
    done = 0

    def stop(more: int) -> None:
        nonlocal done
        done += more
        if done >= images:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode_dataset(model, whole, tmp_path, told["checkpoint"], Settings(**told["settings"]), batch_size=8,
                       advance=stop)
    shards = {path: path.stat() for path in tmp_path.glob("latents_*")}
    assert len(shards) == images // 20 and not (tmp_path / "statistics.json").exists()
    assert encode(vae, manifest, tmp_path) == reference
    assert all(path.stat().st_mtime_ns == before.st_mtime_ns and path.stat().st_ino == before.st_ino
               for path, before in shards.items())
    if shards:
        assert f"{20 * len(shards)} were there" in capsys.readouterr().out


def test_a_killed_process_leaves_nothing_half(tmp_path, plain, manifest):
    """Killed as soon as the first of 50 shards is there; what it was writing then goes with the next run."""
    command = [sys.executable, "-m", "autoenc.encode", str(plain), str(manifest), "--device", "cpu", "--batch-size",
               "1", "--shard-size", "1", "--output"]
    output = tmp_path / "killed"
    process = subprocess.Popen([*command, str(output)])
    try:
        deadline = time.monotonic() + 120
        while not list(output.glob("latents_*")) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.0005)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL and not (output / "statistics.json").exists()
    kept = {path.name: path.stat().st_ino for path in output.glob("latents_*")}
    assert 0 < len(kept) < COUNT
    for folder in (output, tmp_path / "whole"):
        folder.mkdir(exist_ok=True)
        (folder / ".vimrc.settings").write_text("hers")
    (output / ".latents_00030.safetensors.abcd1234").write_bytes(b"half")          # as a kill between write and rename
    for folder in (output, tmp_path / "whole"):
        assert main([*command[3:], str(folder)]) == 0
    assert content(output) == content(tmp_path / "whole")
    assert kept == {name: (output / name).stat().st_ino for name in kept}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_broken_shard_is_set_aside_and_computed_again(tmp_path, vae, manifest, reference, data):
    output = tmp_path / "output"
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    for name, part in reference.items():
        (output / name).write_bytes(part)
    name = data.draw(st.sampled_from(sorted(name for name in reference if name.startswith("latents_"))))
    good = reference[name]
    at = data.draw(st.integers(0, len(good) - 1) | st.integers(0, 400))
    bad = data.draw(st.sampled_from([good[:at], good[:at] + bytes([good[at] ^ 1 << at % 8]) + good[at + 1:],
                                     reference["latents_00000.safetensors" if name > "latents_00001" else
                                               "latents_00002.safetensors"]]))
    (output / name).write_bytes(bad)
    after = encode(vae, manifest, output)
    assert after.pop(name + ".broken") == bad
    assert after == reference


@pytest.mark.parametrize("change, words", [
    ("model", ["another model"]), ("data", ["another data set"]), ("dtype", ["dtype 'float32', not 'float16'"]),
    ("shard-size", ["shard_size 20, not 10"]), ("format", ["format 'safetensors', not 'npz'"])])
@pytest.mark.parametrize("left", ["shards", "statistics"])
def test_a_folder_with_other_latents_is_refused(tmp_path, vae, manifest, reference, change, words, left):
    output = tmp_path / "output"
    output.mkdir()
    for name, part in reference.items():
        if name.startswith("latents" if left == "shards" else "statistics"):
            (output / name).write_bytes(part)
    if left == "shards":
        (output / "latents_00000.safetensors").write_bytes(b"broken, and to be left where it is")
    before = content(output)
    model, more = vae, {"data": ["--set", "data.fit=crop", "--set", "data.seed=1"], "dtype": ["--dtype", "float16"],
                        "shard-size": ["--shard-size", "10"], "format": ["--format", "npz"]}.get(change, [])
    if change == "model":
        model = checkpoint(tmp_path / "other.pt", manifest, seed=2, model__variational=True, model__latent="sample",
                           model__normalize_latents=True)
    with pytest.raises(InputError) as error:
        encode(model, manifest, output, *more)
    assert all(word in str(error.value) for word in [str(output), *words]), str(error.value)
    assert content(output) == before


@pytest.mark.parametrize("name", ["manifest.csv", "statistics.json"])
def test_files_of_others_are_not_written_over(tmp_path, plain, manifest, name):
    (tmp_path / name).write_text('{"mine": true}')
    with pytest.raises(InputError, match=name):
        encode(plain, manifest, tmp_path)
    assert content(tmp_path) == {name: b'{"mine": true}'}


def test_two_processes_do_not_write_to_one_folder(tmp_path, plain, manifest):
    with lease(tmp_path / ".lease"), pytest.raises(InputError, match="is writing there"):
        encode(plain, manifest, tmp_path)
    encode(plain, manifest, tmp_path)


def test_latents_beyond_the_numbers_of_the_file_are_told(tmp_path, manifest):
    model = checkpoint(tmp_path / "large.pt", manifest)
    state = torch.load(model, weights_only=True)
    state["model"]["encoder.mean.bias"] += 1e5
    save_checkpoint(model, state)
    with pytest.raises(InputError, match=r"20 of 20 images, the first of them 00, ü\.png; --dtype float16"):
        encode(model, manifest, tmp_path / "half", "--dtype", "float16")
    assert content(tmp_path / "half") == {}
    encode(model, manifest, tmp_path / "single")


def test_a_full_disk_is_told_and_keeps_what_is_whole(tmp_path, vae, manifest, reference):
    """A limit on the size of files, below that of a shard, stands for the disk."""
    output = tmp_path / "output"
    command = [sys.executable, "-m", "autoenc.encode", str(vae), str(manifest), "--output", str(output), *SMALL]
    limited = ["bash", "-c", 'trap "" XFSZ; ulimit -f 2; exec "$@"', "bash", *command]
    done = subprocess.run(limited, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith(f"error: {output / 'latents_00000.safetensors'}: File too large")
    assert content(output) == {}
    assert encode(vae, manifest, output) == reference


def test_progress_is_told_in_plain_lines_or_as_a_bar(tmp_path, plain, manifest, monkeypatch, capsys):
    monkeypatch.setattr("autoenc.encode.SAY_EVERY", 0)
    encode(plain, manifest, tmp_path / "a")
    told = capsys.readouterr().out
    assert re.search(r"^28 of 50 images; [0-9,]+ images/s$", told, re.M) and "\x1b" not in told
    monkeypatch.setenv("FORCE_COLOR", "1")             # what rich takes for a terminal
    encode(plain, manifest, tmp_path / "b")
    told = capsys.readouterr().out
    assert "50/50" in told and "\x1b" in told and "\n28 of" not in told


@pytest.mark.parametrize("arguments, words", [
    (["--set", "train.epochs=3"], ["--set train.epochs=3", "data"]),
    (["--set", "data.image_size=18"], ["data.image_size", "18"]),
    (["--set", "data.image_column=path"], ["data.image_column", "'path'"]),
    (["--set", "data.limt=5"], ["data.limit"]),
    (["--shard-size", "0"], ["--shard-size", "0"]),
    (["--batch-size", "-1"], ["--batch-size", "-1"]),
    (["--device", "gpu"], ["--device", "gpu"]),
    (["--device", "meta"], ["--device", "meta"]),
    (["--posterior"], ["--posterior", "no VAE"]),
    (["--format", "npz", "--dtype", "bfloat16"], ["bfloat16", "safetensors"]),
])
def test_what_is_wrong_is_said_and_nothing_is_written(tmp_path, plain, manifest, arguments, words):
    with pytest.raises(InputError) as error:
        main([str(plain), str(manifest), "--output", str(tmp_path / "out"), *arguments])
    assert all(word in str(error.value) for word in words), str(error.value)
    assert not (tmp_path / "out").exists()


def test_what_is_missing_is_said(tmp_path, plain, manifest):
    with pytest.raises(InputError, match=r"none\.csv"):
        main([str(plain), str(tmp_path / "none.csv"), "--output", str(tmp_path / "out")])
    with pytest.raises(InputError, match=r"none\.pt"):
        main([str(tmp_path / "none.pt"), "--output", str(tmp_path / "out")])
    moved = checkpoint(tmp_path / "moved.pt", manifest)
    state = torch.load(moved, weights_only=True)
    state["config"]["data"]["manifest"] = str(tmp_path / "gone.csv")
    save_checkpoint(moved, state)
    with pytest.raises(InputError, match=r"trained with:\n.*gone\.csv.*\n.*second argument"):
        main([str(moved), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="no finished latents"):
        load_latents(tmp_path)
    encode(plain, manifest, tmp_path / "out")
    with pytest.raises(InputError, match="holds no 'mu'"):
        load_latents(tmp_path / "out", "mu")
    (tmp_path / "out" / "latents_00001.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=r"latents_00001\.safetensors: no readable shard"):
        load_latents(tmp_path / "out")


def test_bf16_computes_nearly_the_same(tmp_path, plain, manifest):
    encode(plain, manifest, tmp_path / "a")
    encode(plain, manifest, tmp_path / "b", "--precision", "bf16")
    a, b = (load_latents(tmp_path / name)[0] for name in "ab")
    assert b.dtype == torch.float32 and 0 < (a - b).abs().max() < 0.05 * a.std() + 0.05
