from __future__ import annotations

import math

import pytest
import torch
from helpers import small_config
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from autoenc.losses import LOG_SIGMA, LOSSES, gaussian, kl, kl_nats, log_sigma, losses_of, weighted_sum

torch.set_num_threads(1)


def example(count: int = 3):
    generator = torch.Generator().manual_seed(4)
    outputs = {"rgb": torch.rand(count, 3, 8, 8, generator=generator) * 2 - 1,
               "segmentation": torch.randn(count, 4, 8, 8, generator=generator),
               "classification": torch.randn(count, 5, generator=generator),
               "mu": torch.randn(count, 2, 4, 4, generator=generator),
               "logvar": torch.randn(count, 2, 4, 4, generator=generator)}
    batch = {"images": torch.rand(count, 3, 8, 8, generator=generator) * 2 - 1,
             "segmentation": torch.randint(0, 4, (count, 8, 8), generator=generator),
             "labels": torch.randint(0, 5, (count,), generator=generator)}
    return outputs, batch


def test_reconstruction_terms():
    outputs, batch = example()
    difference = (outputs["rgb"] - batch["images"]).double()
    assert LOSSES["mse"](outputs, batch).item() == pytest.approx((difference**2).mean().item(), rel=1e-6)
    assert LOSSES["l1"](outputs, batch).item() == pytest.approx(difference.abs().mean().item(), rel=1e-6)


def test_cross_entropies_are_means_over_what_is_valid():
    outputs, batch = example()
    batch["segmentation"][:, :, :5] = 255
    batch["labels"][1] = -1
    logs = outputs["segmentation"].double().log_softmax(1)
    cells = [(b, y, x) for b in range(3) for y in range(8) for x in range(5, 8)]
    expected = -sum(logs[b, batch["segmentation"][b, y, x], y, x].item() for b, y, x in cells) / len(cells)
    assert LOSSES["segmentation"](outputs, batch).item() == pytest.approx(expected, rel=1e-5)
    logs = outputs["classification"].double().log_softmax(1)
    expected = -(logs[0, batch["labels"][0]] + logs[2, batch["labels"][2]]).item() / 2
    assert LOSSES["classification"](outputs, batch).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name, part, ignored", [
    ("segmentation", "segmentation", 255), ("classification", "labels", -1)])
def test_nothing_valid_is_zero_with_a_gradient(name, part, ignored):
    outputs, batch = example()
    batch[part] = torch.full_like(batch[part], ignored)
    logits = outputs[name].requires_grad_()
    term = LOSSES[name](outputs, batch)
    term.backward()
    assert term.item() == 0 and torch.equal(logits.grad, torch.zeros_like(logits))


def test_kl_is_that_of_the_normal_distributions():
    outputs, batch = example()
    mu, std = outputs["mu"].double(), (0.5 * outputs["logvar"].double()).exp()
    each = kl_divergence(Normal(mu, std), Normal(torch.zeros_like(mu), torch.ones_like(std)))
    assert LOSSES["kl"](outputs, batch).item() == pytest.approx(each.mean().item(), rel=1e-5)
    assert kl_nats(outputs).item() == pytest.approx(each.flatten(1).sum(1).mean().item(), rel=1e-5)


def test_kl_is_zero_for_the_standard_normal():
    zeros = {"mu": torch.zeros(2, 3, 4, 4), "logvar": torch.zeros(2, 3, 4, 4)}
    assert LOSSES["kl"](zeros, {}).item() == 0 and kl_nats(zeros).item() == 0


def kl_of(mean: float, logvar: float) -> float:
    """Of one dimension, from N(mean, exp(logvar)) to N(0, 1), in nats."""
    return (mean**2 + math.exp(logvar) - 1 - logvar) / 2


@pytest.mark.parametrize("shape", [(3, 2, 4, 4), (3, 5)])
@pytest.mark.parametrize("free_bits", [0.0, 0.3, 20.0])
def test_free_bits_and_reductions_against_a_loop(shape, free_bits):
    generator = torch.Generator().manual_seed(3)
    outputs = {"mu": torch.randn(shape, generator=generator), "logvar": torch.randn(shape, generator=generator) / 2}
    outputs["mu"][:, 0] *= 0.1                                   # one channel that tells little
    outputs["logvar"][:, 0] *= 0.1
    total = 0.0
    for channel in range(shape[1]):
        images = []
        for image in range(shape[0]):
            pairs = zip(outputs["mu"][image, channel].flatten().tolist(),
                        outputs["logvar"][image, channel].flatten().tolist(), strict=True)
            images.append(math.fsum(kl_of(*pair) for pair in pairs))
        total += max(free_bits, math.fsum(images) / len(images))
    batch = {"images": torch.zeros(shape[0], 3, 8, 8)}
    dimensions = math.prod(shape[1:])
    assert kl(outputs, batch, "mean", free_bits).item() == pytest.approx(total / dimensions, rel=1e-5)
    assert kl(outputs, batch, "sum", free_bits).item() == pytest.approx(total / (3 * 8 * 8), rel=1e-5)


def test_the_sum_is_nats_over_the_numbers_of_an_image():
    outputs, batch = example()
    assert kl(outputs, batch, "sum").item() == pytest.approx(kl_nats(outputs).item() / (3 * 8 * 8), rel=1e-6)
    assert kl(outputs, batch, "mean").item() == pytest.approx(kl_nats(outputs).item() / (2 * 4 * 4), rel=1e-6)


def test_a_channel_below_its_free_bits_has_no_gradient():
    outputs, batch = example()
    outputs["mu"][:, 0], outputs["logvar"][:, 0] = 1e-3, 0.0
    for value in outputs.values():
        value.requires_grad_()
    kl(outputs, batch, "mean", 0.5).backward()
    assert outputs["mu"].grad[:, 0].abs().max() == 0 and outputs["mu"].grad[:, 1].abs().min() > 0


@pytest.mark.parametrize("scale", [1.0, 0.05, 1e-5])             # the last one below the bound
def test_an_optimal_variance_against_a_loop(scale):
    """D/2 (ln s^2 + mse / s^2) an image with the batch's best s^2, per number of an image."""
    outputs, batch = example()
    outputs["rgb"] = batch["images"] + scale * (outputs["rgb"] - batch["images"])
    pairs = list(zip(outputs["rgb"].flatten().tolist(), batch["images"].flatten().tolist(), strict=True))
    error = math.fsum((left - right) ** 2 for left, right in pairs) / len(pairs)
    sigma = max(math.exp(-6), math.sqrt(error))
    each = [math.log(sigma**2) / 2 + (left - right) ** 2 / (2 * sigma**2) for left, right in pairs]
    found = LOSSES["optimal_variance"](outputs, batch).item()
    assert found == pytest.approx(math.fsum(each) / len(each), rel=1e-4)
    assert log_sigma(torch.tensor(error)).item() == pytest.approx(math.log(sigma), rel=1e-5)
    if sigma > math.exp(-6):            # then it is the greatest likelihood there is, whatever the variance
        assert all(found <= math.log(s) + error / (2 * s**2) + 1e-6 for s in (0.5 * sigma, 0.9 * sigma, 1.1 * sigma))


def test_an_optimal_variance_has_the_gradient_of_a_fixed_one():
    for error in (0.3, 1e-9):
        value = torch.tensor(error, dtype=torch.float64, requires_grad=True)
        gaussian(value).backward()
        variance = max(error, math.exp(2 * LOG_SIGMA))
        assert value.grad.item() == pytest.approx(1 / (2 * variance))
    perfect = torch.zeros((), requires_grad=True)
    gaussian(perfect).backward()
    assert gaussian(perfect).item() == LOG_SIGMA and perfect.grad.isfinite()


def test_training_minimises_the_configured_kl():
    outputs, batch = example()
    for flat, expected in (({}, LOSSES["kl"](outputs, batch)),
                           ({"loss__kl_reduction": "sum"}, kl(outputs, batch, "sum")),
                           ({"loss__optimal_variance": True}, kl(outputs, batch, "sum")),
                           ({"loss__free_bits": 30.0}, kl(outputs, batch, "mean", 30.0))):
        config = small_config(model__variational=True, loss__kl=1.0, **flat)
        assert torch.equal(losses_of(config)["kl"](outputs, batch), expected)
    assert kl(outputs, batch, "mean", 30.0) > LOSSES["kl"](outputs, batch)


@pytest.mark.parametrize("name", LOSSES)
def test_a_missing_output_raises(name):
    with pytest.raises(KeyError):
        LOSSES[name]({}, example()[1])


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(LOSSES)), st.tuples(st.floats(0, 10), st.floats(0, 10)), min_size=1))
def test_weighted_sum(pairs):
    terms = {name: torch.tensor(term) for name, (term, _) in pairs.items()}
    weights = {name: weight for name, (_, weight) in pairs.items()}
    expected = math.fsum(term * weight for term, weight in pairs.values())
    assert weighted_sum(terms, weights).item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_a_weight_without_its_term_raises():
    with pytest.raises(KeyError):
        weighted_sum({"mse": torch.tensor(1.0)}, {"mse": 1.0, "segmentation": 0.1})
