"""Numbers about data: what a PCA of the latent's size keeps, statistics of splats; and the command that shows them."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import random_splats, small_config, small_dataset
from PIL import Image
from splatfiles import config, files_in

from autoenc.data import originals, prepare
from autoenc.data.__main__ import pca_words
from autoenc.data.summary import fit_psnr, latent_pca, splat_statistics
from autoenc.evaluation.reach import fit_pca, pca_reach

pytestmark = pytest.mark.usefixtures("cache")

# What a latent of some size can reach ---------------------------------------------------------------------------------

def test_pca_keeps_a_share_of_noise_and_all_of_what_is_flat():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1200, 128, generator=generator)
    reach = pca_reach(noise[:1000], noise[1000:], [16, 128])
    assert reach[16].val == pytest.approx(16 / 128, abs=0.02) and reach[16].train > reach[16].val
    assert reach[128].train == pytest.approx(1, abs=1e-5) and reach[128].val == pytest.approx(1, abs=1e-5)
    flat = torch.randn(60, 4, generator=generator) @ torch.randn(4, 500, generator=generator) + 3
    reach = pca_reach(flat[:40], flat[40:], [3, 4])
    assert reach[4].val == pytest.approx(1, abs=1e-4) and reach[3].val < 0.999
    pca = fit_pca(flat[:40], 4)
    assert torch.allclose(pca.project(flat[40:]), flat[40:], atol=1e-3)
    lost = (pca.project(flat[40:], 3) - flat[40:]).square().sum() / (flat[40:] - pca.mean).square().sum()
    assert 1 - lost.item() == pytest.approx(reach[3].val, abs=1e-4)


def test_a_pca_of_independent_splats_keeps_its_share_of_dimensions():
    dataset = small_dataset(1200, 8, splats=32)
    rng = np.random.default_rng(0)
    shape = (1200, 32)
    independent = np.concatenate((rng.uniform(-1, 1, (*shape, 2)), rng.uniform(0.1, 0.2, (*shape, 2)),
                                  rng.uniform(0, math.pi, (*shape, 1)), rng.uniform(-1, 1, (*shape, 3))), -1)
    settings = small_config(data__source="splats", data__splats=32, model__kind="conv1d", model__latent_dim=32,
                            loss__splats=1.0)
    found = latent_pca(dataclasses.replace(dataset, splats=independent.astype(np.float32)), settings)
    assert (found.components, found.numbers, found.fitted_on) == (32, 256, 840)
    assert found.val == pytest.approx(32 / 256, abs=0.02) and found.train > found.val
    patterned = latent_pca(dataset, settings)
    assert patterned.val > 0.6


def test_a_pca_of_images_is_one_of_pixels():
    rng = np.random.default_rng(0)
    dataset = small_dataset(400, 8)
    mixed = rng.normal(size=(400, 6)) @ rng.normal(size=(6, 192)) * 20 + 128
    flat = dataclasses.replace(dataset, images=mixed.clip(0, 255).round().astype(np.uint8).reshape(400, 8, 8, 3))
    settings = small_config(data__image_size=8, model__latent_channels=2)      # 2 × 2 × 2
    found = latent_pca(flat, settings)
    assert (found.components, found.numbers, found.fitted_on) == (8, 192, 280) and 0.97 < found.val < 1
    few = latent_pca(dataclasses.replace(flat, splits={**flat.splits, "train": np.arange(5)}), settings)
    assert few.components == 4 and few.train == pytest.approx(1, abs=1e-4)
    plain = latent_pca(dataclasses.replace(flat, images=np.full_like(flat.images, 7)), settings)
    assert math.isnan(plain.val)
    assert "an undefined share" in pca_words(dataclasses.replace(flat, images=np.full_like(flat.images, 7)), settings)
    one = dataclasses.replace(flat, splits={**flat.splits, "train": np.arange(1)})
    assert latent_pca(one, settings) is None and "one training item" in pca_words(one, settings)
    own = small_config(model__kind="custom", model__target="own:Model")
    assert latent_pca(flat, own) is None and "not known" in pca_words(flat, own)


def test_statistics_are_those_of_all_splats():
    splats = random_splats(600, 4, np.random.default_rng(2))
    mean, deviation = splat_statistics(splats, np.arange(10, 590))
    rows = splats[10:590].reshape(-1, 8).astype(np.float64)
    low, high = np.sort(rows[:, 2:4]).T
    columns = np.column_stack((rows[:, :2], high, low, (high - low) / (high + low), rows[:, 5:]))
    assert np.allclose(mean, columns.mean(0)) and np.allclose(deviation, columns.std(0))
    assert np.isnan(splat_statistics(splats, np.arange(0))[0]).all()


# The command ----------------------------------------------------------------------------------------------------------

def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "autoenc.data", *arguments], cwd=cwd, capture_output=True, text=True,
                          timeout=120)


def write_config(path: Path, **data) -> None:
    path.write_text(yaml.safe_dump({
        "data": {"source": "splats", "splats": 32, "image_size": 16, "split": [0.5, 0.4, 0.1], **data},
        "model": {"kind": "conv1d", "latent_dim": 8, "splat_target": "logcov"}, "loss": {"splats": 1.0}}))


def test_the_command_shows_fitted_splats(tmp_path):
    write_config(tmp_path / "data.yaml", limit=60)
    done = run("data.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    data = config(splats=32, limit=60)
    dataset = prepare(data)
    assert "splats: 60 items, 32 splats each, rendered as images of 16×16 pixels" in done.stdout
    assert "exact duplicates: 0 (0.0%)" in done.stdout
    train = dataset.splits["train"]
    mean, deviation = splat_statistics(dataset.splats, train)
    lines = {line[:15].strip(): line for line in done.stdout.splitlines()}
    for name, k in (("x", 0), ("longer axis", 2), ("anisotropy", 4), ("blue", 7)):
        assert f"{mean[k]:.3f} ± {deviation[k]:.3f}" in lines[name]
    shown = train[np.unique(np.linspace(0, len(train) - 1, 32).astype(int))]
    images = originals(data, shown)
    assert f"{len(shown)} of the training part: PSNR {fit_psnr(images, dataset.images[shown]):.1f} dB" in done.stdout
    assert "PCA: 8 of 256 dimensions, as many as the latent has" in done.stdout
    assert "model.splat_target logcov" in done.stdout and "random splats they would keep 3.1%" in done.stdout
    sheet = np.asarray(Image.open(tmp_path / "data_contact_sheet.png"))
    assert np.array_equal(sheet[4:132:8, 4:132:8], images[0])      # the image above, enlarged eight times
    assert np.array_equal(sheet[133:261:8, 4:132:8], dataset.images[shown[0]])


def test_the_command_shows_splats_from_files(tmp_path):
    sets = random_splats(12, 32, np.random.default_rng(1))
    files_in(tmp_path / "x", sets)
    write_config(tmp_path / "data.yaml", manifest="x")
    done = run("data.yaml", "--output", "sheet.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "12 items, 32 splats each" in done.stdout and "PSNR" not in done.stdout
    assert "(rendered splats of the training part)" in done.stdout
    dataset = prepare(config(manifest=str(tmp_path / "x"), splats=32))
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert np.array_equal(sheet[4:132:8, 4:132:8], dataset.images[dataset.splits["train"][0]])
    write_config(tmp_path / "data.yaml", manifest="x", splats=64)
    done = run("data.yaml", cwd=tmp_path)
    assert done.returncode == 2 and "12 files cannot be used" in done.stderr and "Traceback" not in done.stderr
