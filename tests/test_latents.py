from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import small_config, small_dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from autoenc.latents import latent_statistics
from autoenc.metrics import to_unit
from autoenc.model import Autoencoder
from autoenc.model.conv2d import ConvAutoencoder

torch.set_num_threads(1)

IMAGES = small_dataset(60).images


def build(**settings) -> Autoencoder:
    return ConvAutoencoder(small_config(**settings), classes=0, labels=0, seed=3).eval()


class Pixels(ConvAutoencoder):
    """Encodes to its images, moved and stretched: latents of any offset whose values a test knows."""

    offset, scale = 0.0, 1.0

    def encode(self, images, generator=None):
        return {"latent": images.double() * self.scale + self.offset}


def by_hand(latents: np.ndarray) -> dict[str, np.ndarray]:
    """The statistics of latents (N, C, h, w), two passes, all at once."""
    rows = latents.astype(np.longdouble).transpose(1, 0, 2, 3).reshape(latents.shape[1], -1)
    mean = rows.mean(1)
    rows = rows - mean[:, None]
    variance = (rows**2).mean(1)
    return {"mean": mean, "std": np.sqrt(variance), "skewness": (rows**3).mean(1) / variance**1.5,
            "kurtosis": (rows**4).mean(1) / variance**2 - 3, "covariance": rows @ rows.T / rows.shape[1]}


@settings(max_examples=30, deadline=None)
@given(batch_size=st.integers(1, 61), offset=st.sampled_from([0.0, -3.0, 1e4]), scale=st.sampled_from([1e-3, 1.0, 50]))
def test_they_are_those_of_all_latents_at_once_whatever_the_batches(batch_size, offset, scale):
    model = Pixels(small_config(), classes=0, labels=0, seed=0)
    model.offset, model.scale = offset, scale
    found = latent_statistics(model, IMAGES, batch_size)
    assert (found.count, found.images) == (60 * 16 * 16, 60)
    for name, value in by_hand(model.encode(to_unit(IMAGES))["latent"].numpy()).items():
        # What 1e4 + x keeps of x in float64 is 1e-9 of it at the smallest scale.
        assert getattr(found, name).numpy() == pytest.approx(value.astype(float), rel=1e-7, abs=1e-12), name
    assert found.correlation.diagonal().tolist() == pytest.approx([1, 1, 1])


def test_of_a_model_they_are_in_float64_and_of_the_images_named():
    model = build()
    chosen = np.array([3, 50, 7])
    found = latent_statistics(model, IMAGES, 2, indices=chosen)
    with torch.no_grad():
        expected = by_hand(model.encode(to_unit(IMAGES[chosen]))["latent"].numpy())
    assert found.mean.dtype == found.covariance.dtype == torch.float64 and found.images == 3
    assert found.covariance.numpy() == pytest.approx(expected["covariance"].astype(float), rel=1e-4, abs=1e-8)
    with pytest.raises(ValueError, match="no images"):
        latent_statistics(model, IMAGES, 2, indices=chosen[:0])


@pytest.mark.parametrize("normalized", [False, True])
def test_of_a_vae_that_samples_they_are_those_of_its_draws_without_drawing(normalized):
    model = build(model__variational=True, model__latent="sample", model__normalize_latents=normalized)
    with torch.no_grad():       # posteriors as wide as their means are apart, and wider for some images
        model.encoder.logvar.weight.mul_(2)
        model.encoder.logvar.bias.sub_(1.5)
    if normalized:
        model.encoder.latent_normalizer.set_statistics(torch.tensor([0.5, -1.0]), torch.tensor([0.2, 3.0]))
    state = torch.get_rng_state()
    found = latent_statistics(model, IMAGES, 16)
    assert torch.equal(torch.get_rng_state(), state)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        drawn = torch.cat([model.encode(to_unit(IMAGES), generator)["latent"] for _ in range(400)])
        encoded = model.encode(to_unit(IMAGES), generator)
    expected = by_hand(drawn.numpy())
    for name in ("mean", "std", "skewness", "kurtosis", "covariance"):
        power = {"mean": 1, "std": 1, "covariance": 2}.get(name, 0)
        within = 0.05 * float(expected["std"].max()) ** power        # of 400 draws, the rare wide ones decide the shape
        assert getattr(found, name).numpy() == pytest.approx(expected[name].astype(float), abs=within), name
    assert found.kurtosis.abs().max() > 0.1          # a mixture, not the normal distribution that would pass as well
    unit = encoded["mu"].double().var((0, 2, 3), correction=0) + encoded["logvar"].double().exp().mean((0, 2, 3))
    scale = model.encoder.latent_normalizer.log_scale.exp().flatten() if normalized else 1
    assert found.std.numpy() == pytest.approx((unit.sqrt() / scale).numpy(), rel=1e-5)


def test_of_a_vae_that_does_not_sample_they_are_those_of_the_mean():
    model = build(model__variational=True)
    with torch.no_grad():
        mu = model.encode(to_unit(IMAGES))["mu"].double()
    assert latent_statistics(model, IMAGES).std.numpy() == pytest.approx(mu.std((0, 2, 3), correction=0).numpy())


def test_a_normaliser_set_by_them_standardises():
    model = build(model__normalize_latents=True)
    raw = latent_statistics(model, IMAGES, 16)
    model.encoder.latent_normalizer.set_statistics(raw.mean.float(), raw.std.float())
    found = latent_statistics(model, IMAGES, 16)
    assert found.mean.abs().max() < 1e-5 and (found.std - 1).abs().max() < 1e-5
    assert raw.mean.abs().max() > 0.01 and (raw.std - 1).abs().max() > 0.01


@pytest.mark.parametrize("sampled", [False, True])
def test_standard_errors_are_those_of_a_bootstrap_over_images(sampled):
    model = build(model__variational=sampled, model__latent="sample" if sampled else "mean")
    images = small_dataset(300, seed=5).images
    found = latent_statistics(model, images)
    with torch.no_grad():
        encoded = model.encode(to_unit(images))
    latent = encoded.get("mu", encoded["latent"]).double()
    noise = encoded["logvar"].double().exp() if sampled else torch.zeros_like(latent)
    rng = np.random.default_rng(0)
    again = [rng.integers(0, 300, 300) for _ in range(500)]
    means = torch.stack([latent[rows].mean((0, 2, 3)) for rows in again])
    stds = torch.stack([(latent[rows].var((0, 2, 3), correction=0) + noise[rows].mean((0, 2, 3))).sqrt()
                        for rows in again])
    assert found.mean_error.numpy() == pytest.approx(means.std(0).numpy(), rel=0.15)
    assert found.std_error.numpy() == pytest.approx(stds.std(0).numpy(), rel=0.15)


def test_standard_errors_know_that_positions_of_an_image_depend_on_each_other():
    levels = np.random.default_rng(0).integers(0, 255, (50, 1, 1, 1), dtype=np.uint8)
    images = np.broadcast_to(levels, (50, 16, 16, 3))          # each of one brightness: 50 observations, not 12,800
    found = latent_statistics(Pixels(small_config(), classes=0, labels=0, seed=0), images)
    assert found.mean_error.numpy() == pytest.approx((found.std / 49**0.5).numpy())
    squares = ((levels / 127.5 - 1).ravel() - found.mean[0].item()) ** 2
    assert found.std_error[0].item() == pytest.approx(squares.std(ddof=1) / 50**0.5 / (2 * found.std[0].item()))


def test_what_is_undefined_is_nan():
    model = build()
    with torch.no_grad():
        model.encoder.mean.weight[0] = 0
        model.encoder.mean.bias[0] = 2.0
    found = latent_statistics(model, IMAGES)
    assert found.std[0] == 0 and found.mean[0] == 2
    assert found.skewness[0].isnan() and found.kurtosis[0].isnan() and found.correlation[0].isnan().all()
    assert found.skewness[1].isfinite() and found.correlation[1, 1].item() == pytest.approx(1)
    alone = latent_statistics(model, IMAGES[:1])
    assert alone.mean_error.isnan().all() and alone.std_error.isnan().all() and alone.std[1] > 0
