from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from helpers import small_config, small_dataset
from PIL import Image
from torch import nn

from autoenc.checkpoint import build_model, checkpoint_content, data_shapes, model_checkpoint, save_checkpoint
from autoenc.config import make_config
from autoenc.data import prepare
from autoenc.errors import InputError
from autoenc.evaluate import evaluate, json_text, main
from autoenc.evaluation.baselines import principal_components
from autoenc.evaluation.cost import speed
from autoenc.evaluation.interpolation import interpolate
from autoenc.evaluation.pictures import reconstructions
from autoenc.latents import latent_statistics
from autoenc.metrics import smoothness, to_unit
from autoenc.model.conv2d import ConvAutoencoder
from autoenc.train import train

torch.set_num_threads(1)

DATASET = small_dataset(60)
ALL_HEADS = {"loss__segmentation": 0.1, "loss__classification": 0.1}


@pytest.fixture(scope="module")
def trained():
    """A VAE with all heads, its last epoch's result, and its evaluation."""
    config = small_config(model__variational=True, loss__kl=1e-4, train__epochs=3, **ALL_HEADS)
    result = list(train(config, DATASET))[-1]
    model = build_model(config, DATASET)
    model.load_state_dict(result.state()["model"])
    return config, result, model, evaluate(model, DATASET, config, timing=False)


def untrained(dataset=DATASET, **settings):
    config = small_config(**settings)
    return build_model(config, dataset).eval(), config


def test_the_figures_are_those_that_training_reports(trained):
    _, result, _, found = trained
    reported = {name.removeprefix("val/"): value for name, value in result.metrics.items()
                if name.startswith(("val/", "latent/")) or name == "beta"}
    drawn = ("mse_sampled", "nelbo")                 # of draws, which are others
    assert {name for name, value in found["val"].items() if isinstance(value, float)} == reported.keys()
    assert {name: found["val"][name] for name in reported if name not in drawn} == pytest.approx(
        {name: value for name, value in reported.items() if name not in drawn}, rel=1e-4, abs=1e-6)
    assert found["val"]["mse_sampled"] == pytest.approx(reported["mse_sampled"], rel=0.05)
    assert found["model"]["latent_size"] == result.metrics["latent_size"] == math.prod(found["model"]["latent"])
    assert found["model"]["parameters"] == result.metrics["parameters"]
    assert found["test"]["mse"] != found["val"]["mse"] and "speed" not in found["cost"]


def test_iou_by_class_averages_to_the_miou(trained):
    for split in ("val", "test"):
        for name in ("palette", "segmentation"):
            ious = trained[3][split][f"{name}_iou"]
            assert tuple(ious) == DATASET.classes
            assert np.nanmean(list(ious.values())) == pytest.approx(trained[3][split][f"{name}_miou"])


def test_latents_are_those_of_the_split(trained):
    _, _, model, found = trained
    expected = latent_statistics(model, DATASET.images, indices=DATASET.splits["test"])
    latent = found["test"]["latent"]
    assert latent["mean"] == pytest.approx(expected.mean.tolist())
    assert np.array(latent["covariance"]) == pytest.approx(expected.covariance.numpy())
    assert latent["largest_correlation"] == pytest.approx(abs(latent["correlation"][0][1]))
    assert latent["count"] == len(DATASET.splits["test"]) * 4 * 4


def test_it_is_deterministic_and_leaves_model_and_random_state_alone(trained):
    config, _, model, found = trained
    model.train()
    state = torch.get_rng_state()
    assert json_text(evaluate(model, DATASET, config, timing=False)) == json_text(found)
    assert torch.equal(torch.get_rng_state(), state) and model.training
    model.eval()


# Baselines ------------------------------------------------------------------------------------------------------------

def test_constant_baselines_by_hand(trained):
    baselines = trained[3]["test"]["baselines"]
    train_rows, test_rows = DATASET.splits["train"], DATASET.splits["test"]
    images = DATASET.images / 127.5 - 1
    mean = images[train_rows].mean(0)
    assert baselines["mean_image"]["mse"] == pytest.approx(((images[test_rows] - mean) ** 2).mean(), rel=1e-5)
    segmentation, kinds = DATASET.segmentation, len(DATASET.classes)
    counts = np.stack([(segmentation[train_rows] == kind).sum(0) for kind in range(kinds)])
    valid = segmentation[test_rows] != 255
    hits = (counts.argmax(0) == segmentation[test_rows])[valid]
    assert baselines["majority_class"]["segmentation_accuracy"] == pytest.approx(hits.mean())
    assert baselines["majority_class"]["palette_miou"] == baselines["majority_class"]["segmentation_miou"]
    shares = (counts + 1) / (counts.sum(0) + kinds)
    likelihood = np.take_along_axis(shares[None], np.where(valid, segmentation[test_rows], 0)[:, None], 1)[:, 0]
    assert baselines["majority_class"]["segmentation_ce"] == pytest.approx(-np.log(likelihood[valid]).mean(), rel=1e-5)
    labels = DATASET.labels[train_rows]
    commonest = np.bincount(labels[labels >= 0]).argmax()
    tested = DATASET.labels[test_rows]
    assert baselines["majority_label"]["classification_accuracy"] == pytest.approx(
        (tested == commonest)[tested >= 0].mean())


def test_pca_has_as_many_dimensions_as_the_latent_and_is_the_best_linear_code(trained):
    found = trained[3]
    train_rows, test_rows = DATASET.splits["train"], DATASET.splits["test"]
    flat = (DATASET.images / 127.5 - 1).transpose(0, 3, 1, 2).reshape(len(DATASET.images), -1)
    mean = flat[train_rows].mean(0)
    basis = np.linalg.svd(flat[train_rows] - mean, full_matrices=False)[2][:32]
    projected = mean + (flat[test_rows] - mean) @ basis.T @ basis
    assert found["baselines"] == {"pca_dimensions": 32, "pca_images": len(train_rows)}
    assert found["test"]["baselines"]["pca"]["mse"] == pytest.approx(
        ((projected.clip(-1, 1) - flat[test_rows]) ** 2).mean(), rel=1e-4)
    assert found["test"]["baselines"]["pca"]["mse"] < found["test"]["baselines"]["mean_image"]["mse"]


def test_pca_of_many_images_is_as_good_as_the_exact_one():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(1500, 300, generator=generator) * torch.arange(1, 301) ** -0.7 @ \
        torch.linalg.qr(torch.randn(1200, 300, generator=generator)).Q.T
    rows += 0.01 * torch.randn(1500, 1200, generator=generator)
    rows -= rows.mean(0)
    state = torch.get_rng_state()
    fast = principal_components(rows, 40)
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(fast, principal_components(rows, 40))
    assert fast.shape == (40, 1200) and torch.allclose(fast @ fast.T, torch.eye(40), atol=1e-5)
    exact = torch.linalg.svdvals(rows.double())
    left = (rows - rows @ fast.T @ fast).double().square().sum()
    assert left.item() == pytest.approx(exact[40:].square().sum().item(), rel=0.005)
    assert len(principal_components(rows[:9], 40)) == 8


def test_shuffled_latents_decode_to_other_images():
    pair = DATASET.splits["test"][:2]
    dataset = dataclasses.replace(DATASET, splits={**DATASET.splits, "test": pair})
    model, config = untrained(**ALL_HEADS)
    shuffled = evaluate(model, dataset, config, timing=False)["test"]["baselines"]["shuffled_latents"]
    images = to_unit(DATASET.images[pair])
    with torch.no_grad():
        outputs = model.decode(model.encode(images)["latent"])
    assert shuffled["mse"] == pytest.approx((outputs["rgb"].flip(0) - images).square().mean().item(), rel=1e-5)
    hits = outputs["segmentation"].argmax(1).flip(0).numpy() == DATASET.segmentation[pair]
    assert shuffled["segmentation_accuracy"] == pytest.approx(hits[DATASET.segmentation[pair] != 255].mean())


# Interpolation and cost -----------------------------------------------------------------------------------------------

class Line(ConvAutoencoder):
    """Encodes to brightness; decodes that, bent by a function that a test chooses."""

    bend = staticmethod(lambda value: value)

    def encode(self, images, generator=None):
        return {"latent": images.mean(dim=(1, 2, 3), keepdim=True)}

    def decode(self, latent, heads=None):
        return {"rgb": self.bend(latent).expand(-1, 3, 16, 16)}


def test_interpolation_by_hand():
    levels = np.array([0, 51], dtype=np.uint8)[:, None, None, None]                          # -1 and -0.6
    dataset = dataclasses.replace(DATASET, images=np.broadcast_to(levels, (2, 16, 16, 3)).copy(),
                                  splits={"val": np.array([0, 1])})
    model = Line(small_config(model__downsampling_steps=4), classes=0, labels=0, seed=0)
    found = interpolate(model, dataset, "val", torch.tensor([0.2])).figures
    assert (found["pairs"], found["points"]) == (64, 11)
    assert [found[name]["median"] for name in ("path", "largest_step")] == pytest.approx([1, 1], rel=1e-4)
    assert found["cycle_error"]["mean"] < 1e-5
    model.bend = torch.square               # from 1 to 0.36: the step at -1 is the longest, 1 - 0.96**2
    found = interpolate(model, dataset, "val", torch.tensor([0.2])).figures
    assert found["path"]["mean"] == pytest.approx(1, rel=1e-4)
    assert found["largest_step"]["mean"] == pytest.approx((1 - 0.96**2) / 0.064, rel=1e-3)
    ends = math.sqrt(((1 - -1) ** 2 + (0.36 - -0.6) ** 2) / 2) / 0.2
    assert found["cycle_error_ends"]["mean"] == pytest.approx(ends, rel=1e-4)
    line = np.linspace(-1, -0.6, 11)
    assert found["cycle_error"]["mean"] == pytest.approx(np.sqrt(((line**2 - line) ** 2).mean()) / 0.2, rel=1e-4)


def test_the_path_is_the_smoothness_that_training_reports():
    model, config = untrained()
    found = evaluate(model, DATASET, config, timing=False)["val"]["interpolation"]
    assert found["path"]["mean"] == pytest.approx(
        smoothness(model, DATASET.images, indices=DATASET.splits["val"]), rel=1e-5)


def test_flops_are_those_of_the_convolutions():
    model, config = untrained(**ALL_HEADS)
    counted = {"encode": 0, "decode": 0}
    hooks = []
    for part, modules in (("encode", model.encoder), ("decode", nn.ModuleList([model.decoder.trunk,
                                                                             model.decoder.heads["rgb"]]))):
        for module in modules.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                def count(module, inputs, output, part=part):
                    places = (inputs[0] if isinstance(module, nn.ConvTranspose2d) else output)[0, 0].numel()
                    counted[part] += 2 * places * module.weight.numel()
                hooks.append(module.register_forward_hook(count))
    with torch.no_grad():
        model.decode(model.encode(to_unit(DATASET.images[:1]))["latent"], heads=("rgb",))
    for hook in hooks:
        hook.remove()
    assert evaluate(model, DATASET, config, timing=False)["cost"]["flops"] == counted


def test_speed(monkeypatch):
    monkeypatch.setattr("autoenc.evaluation.cost.SECONDS", 0.02)
    model, _ = untrained()
    found = speed(model, 16, (1, 8, 1))
    assert list(found["batches"]) == ["1", "8"] and found["device"] and found["threads"] == 1
    for size, works in found["batches"].items():
        for work in works.values():
            latency, rate = work["latency_ms"], work["images_per_second"]
            assert 0 < latency["q1"] <= latency["median"] <= latency["q3"] and work["runs"] >= 5
            assert latency["median"] * rate["median"] == pytest.approx(1000 * int(size))
            assert rate["q1"] <= rate["median"] <= rate["q3"]


# What data and model may lack -----------------------------------------------------------------------------------------

def test_normalising_changes_no_figure_of_the_outputs():
    plain, config = untrained()
    model, normalized = untrained(model__normalize_latents=True)
    raw = latent_statistics(plain, DATASET.images, indices=DATASET.splits["train"])
    model.encoder.latent_normalizer.set_statistics(raw.mean.float(), raw.std.float())
    before = evaluate(plain, DATASET, config, timing=False)["test"]
    after = evaluate(model, DATASET, normalized, timing=False)["test"]
    for name in ("mse", "psnr", "ssim", "palette_miou"):
        assert after[name] == pytest.approx(before[name], rel=1e-4), name
    assert after["baselines"]["pca"] == before["baselines"]["pca"]
    assert after["interpolation"]["path"] == pytest.approx(before["interpolation"]["path"], rel=1e-4)
    far = {name: max(abs(std - 1) for std in found["latent"]["std"]) for name, found in
           (("before", before), ("after", after))}
    assert far["after"] < 0.2 < far["before"]


def test_data_without_classes_and_labels_leaves_out_their_figures():
    model, config = untrained(**ALL_HEADS)
    bare = small_dataset(60, segmentation=False, labels=False)
    found = evaluate(model, bare, config, timing=False)["test"]
    assert not [name for name in found if name.startswith(("palette", "segmentation", "classification", "loss"))]
    assert set(found["baselines"]) == {"mean_image", "pca", "shuffled_latents"} and found["mse"] > 0


def test_splits_of_no_image_and_of_one():
    model, config = untrained(**ALL_HEADS)
    rows = DATASET.splits["val"]
    dataset = dataclasses.replace(DATASET, splits={**DATASET.splits, "val": rows[:1], "test": rows[:0]})
    found = evaluate(model, dataset, config, timing=False)
    assert found["test"] is None and found["val"]["baselines"]["shuffled_latents"] == {}
    assert math.isnan(found["val"]["interpolation"]["path"]["mean"])
    text = json_text(found)
    assert "NaN" not in text and json.loads(text)["val"]["interpolation"]["path"]["mean"] is None


# The command ----------------------------------------------------------------------------------------------------------

@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr("autoenc.evaluation.cost.SECONDS", 0.01)
    monkeypatch.chdir(tmp_path)
    return saved(tmp_path)


def saved(folder, **settings):
    flat = {**small_config(**ALL_HEADS).flat(), "data.limit": 60, "data.cache_dir": str(folder / "cache"), **settings}
    config = make_config(flat, "test")
    dataset = prepare(config.data)
    content = checkpoint_content(config, data_shapes(dataset), build_model(config, dataset), epoch=4, metrics={},
                                 optimizer={}, scaler={})
    save_checkpoint(folder / "model.pt", model_checkpoint(content))
    return folder / "model.pt"


def test_command(checkpoint, capsys):
    assert main([str(checkpoint), "--json", "found.json"]) == 0
    told = capsys.readouterr().out
    assert max(map(len, told.split("\n"))) <= 120
    for word in ("model.pt, epoch 4: 16×16×3 to 4×4×2; layouts", "psnr", "wall (head)", "PCA 32", "shuffled latents",
                 "cycle error", "GFLOPs", "batch 8, ms", "found.json", "found_pictures"):
        assert word in told, word
    first = json.loads((checkpoint.parent / "found.json").read_text())
    assert first["checkpoint"] == {"path": str(checkpoint), "epoch": 4}
    assert sum(first["data"]["images"].values()) == 60
    pictures = {path.name: path for path in (checkpoint.parent / "found_pictures").iterdir()}
    assert set(pictures) == {f"{kind}_{split}.png" for kind in ("reconstructions", "interpolations")
                             for split in ("val", "test")}
    with Image.open(pictures["interpolations_val.png"]) as picture:
        assert picture.width >= 13 * 16 and picture.height >= 8 * 16 and len(np.unique(np.asarray(picture))) > 9

    assert main([str(checkpoint), "--json", "again.json", "--pictures", "elsewhere", "--device", "cpu"]) == 0
    again = json.loads((checkpoint.parent / "again.json").read_text())
    for found in (first, again):
        assert found["cost"].pop("speed")["batches"].keys() == {"1", "8"}
    assert first == again and (checkpoint.parent / "elsewhere" / "reconstructions_test.png").is_file()


def test_pictures_show_the_best_first_and_the_worst_last():
    model, _ = untrained()
    rows = DATASET.splits["val"]
    errors = np.random.default_rng(1).random(len(rows))
    picture = np.asarray(reconstructions(model, DATASET, "val", errors))
    enlarged, count = 8, min(8, len(rows))                       # 16 px to 128
    first = picture[6 + 18:][:128:enlarged, 6:][:, :128:enlarged]
    assert np.array_equal(first, DATASET.images[rows[errors.argmin()]])
    last = picture[-6 - 3 * 128:][:128:enlarged, 6 + (count - 1) * 128:][:, :128:enlarged]
    assert np.array_equal(last, DATASET.images[rows[errors.argmax()]])


def test_other_data(checkpoint, capsys):
    assert main([str(checkpoint), "--set", "data.seed=7", "--set", "data.limit=40", "--json", "found.json"]) == 0
    assert sum(json.loads((checkpoint.parent / "found.json").read_text())["data"]["images"].values()) == 40
    assert main([str(checkpoint), "--set", "data.image_size=32"]) == 0
    assert "32×32×3 to 8×8×2" in capsys.readouterr().out


@pytest.mark.parametrize("arguments, said", [
    (["--set", "train.epochs=3"], ["--set train.epochs=3", "only data."]),
    (["--set", "data.limt=3"], ["--set data.limt=3", "data.limit"]),
    (["--set", "data.image_size=18"], ["data.image_size: 18", "divisible"]),
    (["--set", "data.split=[0.9, 0.1, 0.1]"], ["data.split", "sum to 1"]),
    (["--device", "warp"], ["--device", "warp"]),
    (["--device", "meta"], ["--device", "cpu or cuda"]),
    (["--json", "nowhere/found.json"], ["--json", "nowhere"]),
    (["--json", "."], ["--json", "is a folder"]),
    (["--pictures", "model.pt"], ["--pictures", "no folder"]),
])
def test_what_is_wrong_is_told(checkpoint, arguments, said):
    before = sorted(checkpoint.parent.iterdir())
    with pytest.raises(InputError) as caught:
        main([str(checkpoint), *arguments])
    assert all(part in str(caught.value) for part in said), str(caught.value)
    assert sorted(checkpoint.parent.iterdir()) == before


def write_manifest(folder, colours, labels):
    images = np.random.default_rng(0).choice(np.array(colours, dtype=np.uint8), (30, 16, 16))
    for row, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{row}.png")
    (folder / "items.csv").write_text("layout_path,type\n" + "".join(
        f"{row}.png,{labels[row % len(labels)]}\n" for row in range(30)))
    (folder / "palette.yaml").write_text("".join(
        f"kind{index}: {{rgb: {colour}, class_index: {index}}}\n" for index, colour in enumerate(colours)))
    return {"data.source": "manifest", "data.manifest": str(folder / "items.csv"),
            "data.palette": str(folder / "palette.yaml"), "data.limit": None}


def test_data_that_is_gone_or_of_other_kinds(tmp_path, monkeypatch):
    monkeypatch.setattr("autoenc.evaluation.cost.SECONDS", 0.01)
    monkeypatch.chdir(tmp_path)
    path = saved(tmp_path, **write_manifest(tmp_path, [[0, 0, 0], [250, 0, 0]], ["a", "b"]))
    with pytest.raises(InputError, match=r"segmentation head knows the classes kind0, kind1, and the data has .*wall"):
        main([str(path), "--set", "data.source=layouts"])
    (tmp_path / "other").mkdir()
    write_manifest(tmp_path / "other", [[0, 0, 0], [250, 0, 0]], ["a", "c"])
    with pytest.raises(InputError, match="classification head knows the labels a, b, and the data has a, c"):
        main([str(path), "--set", "data.manifest=other/items.csv"])
    assert main([str(path), "--set", "data.manifest=other/items.csv", "--set", "data.label_column=null"]) == 0
    (tmp_path / "items.csv").unlink()
    with pytest.raises(InputError, match=r"(?s)model.pt: the data.*items.csv.*no such file.*--set data.manifest=PATH"):
        main([str(path)])


def test_splats_of_another_number_or_size_are_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("AUTOENC_CACHE", str(tmp_path / "cache"))
    config = small_config(data__source="splats", data__splats=32, data__limit=40, model__kind="conv1d",
                          model__latent_dim=4, loss__mse=0.0, loss__splats=1.0)
    dataset = prepare(config.data)
    path = tmp_path / "model.pt"
    save_checkpoint(path, checkpoint_content(config, data_shapes(dataset), build_model(config, dataset), epoch=1,
                                             metrics={}))
    for setting, have in (("data.splats=64", "64 at 16 px"), ("data.image_size=24", "32 at 24 px")):
        with pytest.raises(InputError, match=f"takes 32 splats an image and renders 16 px, and the data has {have}"):
            main([str(path), "--set", setting])
