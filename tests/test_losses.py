from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from autoenc.losses import LOSSES, kl_nats, weighted_sum

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
