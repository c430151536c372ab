from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers import PALETTE, small_config, small_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.classification import multiclass_confusion_matrix
from torchmetrics.functional.image import structural_similarity_index_measure

from autoenc import metrics
from autoenc.batches import Batches
from autoenc.checkpoint import build_model
from autoenc.model import Autoencoder
from autoenc.model.conv2d import ConvAutoencoder

torch.set_num_threads(1)


def random_images(count: int, side: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_images_convert_both_ways():
    pixels = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    images = metrics.to_unit(pixels)
    assert images.shape == (1, 3, 16, 16) and images.min() == -1 and images.max() == 1
    assert np.array_equal(metrics.to_uint8(images), pixels)
    last = metrics.to_unit(pixels, channels_last=True)
    assert last.is_contiguous(memory_format=torch.channels_last) and torch.equal(last, images)


def test_psnr_and_nelbo():
    assert metrics.psnr(4.0) == 0 and metrics.psnr(0.04) == pytest.approx(20)
    assert metrics.psnr(0.0) == math.inf and math.isnan(metrics.psnr(math.nan))
    # With a mean squared error s^2 the density N(x; y, s^2) of one number costs 1/2 ln(2 pi s^2) + 1/2 on average.
    assert metrics.nelbo(0.25, 7.0, 12) == pytest.approx(12 * (0.5 * math.log(2 * math.pi * 0.25) + 0.5) + 7)
    assert metrics.nelbo(0.0, 7.0, 12) == -math.inf


@pytest.mark.parametrize("side", [8, 10, 16, 33])
def test_ssim_equals_torchmetrics(side):
    left = random_images(3, side, 1)
    right = (left + 0.3 * random_images(3, side, 2)).clamp(-1, 1)
    expected = structural_similarity_index_measure((left + 1) / 2, (right + 1) / 2, data_range=1.0, reduction="none")
    assert torch.allclose(metrics.ssim(left, right), expected, atol=1e-5)
    assert torch.allclose(metrics.ssim(left, left), torch.ones(3))


def test_ssim_has_a_gradient_after_use_in_inference_mode():
    with torch.inference_mode():
        metrics.ssim(random_images(1, 9), random_images(1, 9))
    left = random_images(1, 9).requires_grad_()
    metrics.ssim(left, random_images(1, 9, 3)).sum().backward()
    assert left.grad.abs().sum() > 0


def test_nearest_class():
    images = random_images(2, 6)
    palette = metrics.palette_colours(PALETTE)
    expected = (images[:, None] - palette[None, :, :, None, None]).square().sum(2).argmin(1)
    assert torch.equal(metrics.nearest_class(images, palette), expected)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(0, 2**16), st.floats(0, 1))
def test_confusion_and_iou(classes, seed, ignored):
    generator = torch.Generator().manual_seed(seed)
    predicted = torch.randint(0, classes, (2, 5, 5), generator=generator)
    target = torch.randint(0, classes, (2, 5, 5), generator=generator)
    target[torch.rand(target.shape, generator=generator) < ignored] = 255
    confusion = metrics.confusion_matrix(predicted, target, classes)
    if classes > 1:
        assert torch.equal(confusion, multiclass_confusion_matrix(predicted, target, classes, ignore_index=255))
    assert confusion.sum() == (target != 255).sum()
    for kind, iou in enumerate(metrics.class_iou(confusion).tolist()):
        hit, seen = (predicted == kind) & (target != 255), target == kind
        if seen.any():
            assert iou == pytest.approx((hit & seen).sum().item() / (hit | seen).sum().item())
        else:
            assert math.isnan(iou)


def measure(model: Autoencoder, dataset, batch_size: int, weights=None) -> dict[str, float]:
    split = metrics.SplitFigures(model, dataset.palette)
    batches = Batches(dataset, dataset.splits["train"], torch.device("cpu"), segmentation=True, labels=True)
    with torch.no_grad():
        for batch in batches.pass_over(batch_size):
            encoded = model.encode(batch["images"])
            outputs = model.decode(encoded["latent"])
            # A "draw" that doesn't depend on the batch, so that results don't either.
            sampled = model.decode(encoded["mu"] + 0.1) if "mu" in encoded else None
            split.update(batch, encoded, outputs, sampled)
    return split.compute(weights or model.config.loss_weights, elements=3 * 16 * 16)


def test_figures_are_of_the_split_whatever_the_batches():
    config = small_config(loss__segmentation=0.1, loss__classification=0.2, model__variational=True, loss__kl=0.01)
    dataset = small_dataset()
    model = build_model(config, dataset)
    whole, parts = measure(model, dataset, 100), measure(model, dataset, 4)
    assert whole == pytest.approx(parts, rel=1e-5, abs=1e-6)

    rows = dataset.splits["train"]
    images = metrics.to_unit(dataset.images[rows])
    with torch.no_grad():
        encoded = model.encode(images)
        outputs = model.decode(encoded["latent"])
    error = (outputs["rgb"] - images).double()
    assert whole["mse"] == pytest.approx(error.square().mean().item(), rel=1e-5)
    assert whole["l1"] == pytest.approx(error.abs().mean().item(), rel=1e-5)
    assert whole["psnr"] == pytest.approx(10 * math.log10(4 / whole["mse"]))
    valid = dataset.segmentation[rows] != 255
    predicted = outputs["segmentation"].argmax(1).numpy()
    hits = predicted == dataset.segmentation[rows]
    assert whole["segmentation_accuracy"] == pytest.approx(hits[valid].mean())
    labelled = dataset.labels[rows] >= 0
    guesses = outputs["classification"].argmax(1).numpy() == dataset.labels[rows]
    assert whole["classification_accuracy"] == pytest.approx(guesses[labelled].mean())
    assert whole["segmentation_classes"] == whole["palette_classes"] == 4
    assert whole["latent/mean"] == pytest.approx(encoded["latent"].mean().item(), abs=1e-6)
    assert whole["latent/std"] == pytest.approx(encoded["latent"].std(correction=0).item(), rel=1e-4)
    spread = encoded["mu"].double().var(dim=0, correction=0)
    assert whole["latent/active_units"] == pytest.approx((spread > 0.01).double().mean().item())
    assert whole["kl_nats"] == pytest.approx(whole["kl"] * model.latent_size, rel=1e-5)
    assert whole["nelbo"] == pytest.approx(metrics.nelbo(whole["mse_sampled"], whole["kl_nats"], 768))
    assert whole["loss"] == pytest.approx(whole["mse"] + 0.1 * whole["segmentation_ce"]
                                          + 0.2 * whole["classification_ce"] + 0.01 * whole["kl"])


def test_perfect_reconstruction():
    dataset = small_dataset()
    model = build_model(small_config(), dataset)
    split = metrics.SplitFigures(model, PALETTE)
    images = metrics.to_unit(dataset.images)
    batch = {"images": images, "segmentation": torch.from_numpy(dataset.segmentation).long()}
    split.update(batch, {"latent": torch.ones(30, 2, 4, 4)}, {"rgb": images.clone()})
    found = split.compute({"mse": 1.0}, 768)
    assert (found["mse"], found["psnr"], found["palette_miou"]) == (0, math.inf, 1)
    assert found["ssim"] == pytest.approx(1, abs=1e-4) and found["latent/std"] == found["latent/active_units"] == 0


def test_without_valid_pixels_and_labels_figures_are_undefined_and_the_loss_is_not():
    dataset = small_dataset()
    dataset.segmentation[:] = 255
    dataset.labels[:] = -1
    model = build_model(small_config(loss__segmentation=0.1, loss__classification=0.2), dataset)
    found = measure(model, dataset, 8)
    undefined = {name for name, value in found.items() if math.isnan(value)}
    assert undefined == {"segmentation_ce", "segmentation_miou", "segmentation_accuracy", "palette_miou",
                         "classification_ce", "classification_accuracy"}
    assert found["loss"] == pytest.approx(found["mse"]) and found["palette_classes"] == 0


class Line(ConvAutoencoder):
    """Decodes to brightness, by a function of the latent's mean that a test chooses."""

    bend = staticmethod(lambda value: value)

    def encode(self, images, generator=None):
        return {"latent": images.mean(dim=(1, 2, 3), keepdim=True)}

    def decode(self, latent, heads=None):
        return {"rgb": self.bend(latent).expand(-1, 3, 16, 16)}


def test_smoothness_is_path_over_endpoint_distance():
    levels = np.array([0, 51, 102, 255], dtype=np.uint8)
    images = np.broadcast_to(levels[:, None, None, None], (4, 16, 16, 3)).copy()
    model = Line(small_config(), classes=0, labels=0, seed=0)
    assert metrics.smoothness(model, images) == pytest.approx(1, rel=1e-4)
    # |x| decoded from -1 and 0.5: the path goes down 1 and up 0.5 (to the nearest points), the ends differ by 0.5.
    model.bend = torch.abs
    pair = np.stack([images[0], np.full_like(images[0], 191)])
    assert metrics.smoothness(model, pair, points=1001) == pytest.approx(1.498 / 0.502, rel=0.01)
    assert math.isnan(metrics.smoothness(model, images[[1, 1, 1]]))
    assert math.isnan(metrics.smoothness(model, images[:1]))


def test_smoothness_is_seeded():
    dataset = small_dataset()
    model = build_model(small_config(model__variational=True, model__latent="sample"), dataset)
    state = torch.get_rng_state()
    first = metrics.smoothness(model, dataset.images, pairs=4)
    assert first == metrics.smoothness(model, dataset.images, pairs=4) and first >= 1
    assert first != metrics.smoothness(model, dataset.images, pairs=4, seed=7)
    assert torch.equal(torch.get_rng_state(), state)
