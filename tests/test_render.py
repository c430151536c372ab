"""Splats back to images: the renderer."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from splatsets import covariances, uniform_splats

from autoenc.render import EMPTY, PIXEL_VARIANCE, gaussians, render

torch.set_num_threads(1)


def plain_render(splats: torch.Tensor, size: int) -> torch.Tensor:
    """One image (3, size, size) of splats (N, 8): the formula, pixel by pixel and splat by splat."""
    rows = []
    noise = PIXEL_VARIANCE * (2 / size) ** 2 * torch.eye(2, dtype=splats.dtype)
    inverses = [torch.linalg.inv(covariance + noise) for covariance in covariances(splats)]
    for row in range(size):
        for column in range(size):
            point = torch.tensor([(2 * column + 1) / size - 1, (2 * row + 1) / size - 1], dtype=splats.dtype)
            total, colour = torch.zeros((), dtype=splats.dtype), torch.zeros(3, dtype=splats.dtype)
            for splat, inverse in zip(splats, inverses, strict=True):
                away = point - splat[:2]
                weight = torch.exp(-0.5 * away @ inverse @ away)
                total, colour = total + weight, colour + weight * splat[5:]
            rows.append(colour / (total + EMPTY))
    return torch.stack(rows).T.reshape(3, size, size)


def test_rendering_and_its_gradient_equal_a_plain_loop():
    splats = torch.from_numpy(uniform_splats(4, 3, (2,))).double().requires_grad_()
    with torch.no_grad():
        splats[..., 2:4] += 0.1
    weight = torch.rand(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    plain = torch.stack([plain_render(one, 4) for one in splats])
    fast = render(splats, 4)
    assert torch.allclose(fast, plain, atol=1e-12)
    wanted, = torch.autograd.grad((plain * weight).sum(), splats)
    found, = torch.autograd.grad((fast * weight).sum(), splats)
    assert torch.allclose(found, wanted, atol=1e-10)
    assert torch.autograd.gradcheck(lambda given: render(given, 3), splats)


def test_a_splat_lies_where_the_coordinates_say():
    """x to the right, y down, the first axis turned from x towards y."""
    splat = torch.tensor([[[0.5, -0.5, 0.3, 0.05, math.pi / 4, 1.0, 1.0, 1.0]]])
    weight = gaussians(splat, 32)[0, 0]
    row, column = divmod(int(weight.argmax()), 32)
    assert abs((2 * row + 1) / 32 - 1 + 0.5) < 0.05 and abs((2 * column + 1) / 32 - 1 - 0.5) < 0.05
    assert weight[8 + 3, 24 + 3] > 10 * weight[8 + 3, 24 - 3]      # long from top left to bottom right


@pytest.mark.parametrize("chunk", [1, 3 * 7 * 64, 10**9])
def test_chunks_do_not_show(chunk):
    splats = torch.from_numpy(uniform_splats(7, 1, (5,))).requires_grad_()
    whole, parts = render(splats, 8), render(splats, 8, chunk)
    assert torch.allclose(whole, parts, atol=1e-6)
    gradients = [torch.autograd.grad(image.square().sum(), splats)[0] for image in (whole, parts)]
    assert torch.allclose(*gradients, atol=1e-4, rtol=1e-4)


def test_a_chunk_bounds_what_is_held_for_the_gradient():
    """Of 32 images no weights are kept between the pass and the way back."""
    kept = []
    splats = torch.from_numpy(uniform_splats(64, 1, (32,))).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda x: x):
        render(splats, 32, 64 * 32 * 32)
    assert sum(kept) < 32 * 64 * 32 * 32 / 20


def test_half_precision_does_not_reach_the_renderer():
    splats = torch.from_numpy(uniform_splats(32, 2, (1,)))
    with torch.autocast("cpu", torch.bfloat16):
        inside = render(splats, 16)
    assert inside.dtype == torch.float32 and torch.equal(inside, render(splats, 16))


@settings(max_examples=30, deadline=None)
@given(values=hnp.arrays(np.float32, (1, 4, 8), elements=st.one_of(
    st.sampled_from([0.0, 1e-30]), st.floats(-100, 100, width=32))))
def test_rendering_is_finite_whatever_a_model_gives(values):
    splats = torch.from_numpy(values).requires_grad_()
    image = render(splats, 8)
    image.sum().backward()
    assert torch.isfinite(image).all() and torch.isfinite(splats.grad).all()
    assert image.abs().max() <= max(1e-6, splats[..., 5:].abs().max() * 1.001)


def test_no_splat_and_no_image():
    assert torch.equal(render(torch.empty(2, 0, 8), 4), torch.zeros(2, 3, 4, 4))
    assert render(torch.empty(0, 5, 8), 4).shape == (0, 3, 4, 4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_renders_the_same():
    splats = torch.from_numpy(uniform_splats(512, 2, (4,)))
    images, gradients = [], []
    for device in ("cpu", "cuda"):
        there = splats.to(device).requires_grad_()
        image = render(there, 64)
        gradients.append(torch.autograd.grad(image.square().mean(), there)[0].cpu())
        images.append(image.detach().cpu())
    assert torch.allclose(*images, atol=1e-4)
    assert torch.allclose(*gradients, atol=1e-5)
