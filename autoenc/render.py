"""Splats to images: differentiable, batched, on any device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

EMPTY = 1e-6                    # of weight of mid-grey: what shows where no splat reaches
PIXEL_VARIANCE = 1 / 12         # of a uniform distribution over a pixel, in pixels²
LEAST_EXPONENT = -40.0          # e to it is nothing beside EMPTY; where exp underflows, CPUs are ten times as slow
CHUNK = 2**22                   # weights held at a time: 16 MiB as float32


def render(splats: Tensor, size: int, chunk: int = CHUNK) -> Tensor:
    """Images (B, 3, size, size) of raw splats (B, N, 8) (see autoenc.data.splats): colours in [-1, 1] where the splats'
    are.

    At a pixel's centre p the mean of the colours c, weighted by the Gaussians there:

        I(p) = Σ w_i(p) c_i / (Σ w_i(p) + EMPTY),  w_i(p) = exp(-½ (p - μ_i)ᵀ (Σ_i + v 1)⁻¹ (p - μ_i))

    That is the normalised sum of Image-GS (Zhang et al. 2025) over all splats instead of the ten nearest, so that a
    colour is one that can be seen; the plain sum of GaussianImage (Zhang et al. 2024) needs colours that stand for no
    pixel's. v is the variance of a pixel's own area: no splat falls between the pixels, none has an infinite slope, and
    scales of 0 or less, which a model may give, are harmless.

    Memory is bounded by ``chunk`` weights at a time (of one image at least): with a gradient, chunks are computed again
    on the way back. Half precision and autocast do not reach in here.
    """
    with torch.autocast(splats.device.type, enabled=False):
        splats = splats if splats.dtype == torch.float64 else splats.float()
        images = []
        for part in splats.split(max(1, chunk // max(1, splats.shape[1] * size * size))):
            if torch.is_grad_enabled() and splats.requires_grad:
                images.append(checkpoint(_render, part, size, use_reentrant=False))
            else:
                images.append(_render(part, size))
        return torch.cat(images) if images else splats.new_zeros(0, 3, size, size)


def _render(splats: Tensor, size: int) -> Tensor:
    weights = gaussians(splats, size).flatten(2)
    colours = torch.cat((splats[..., 5:], torch.ones_like(splats[..., :1])), -1)
    summed = colours.transpose(1, 2) @ weights
    return (summed[:, :3] / (summed[:, 3:] + EMPTY)).unflatten(2, (size, size))


def gaussians(splats: Tensor, size: int) -> Tensor:
    """The weights w (B, N, size, size) of raw splats (B, N, 8) at the pixels' centres, as :func:`render` uses them."""
    x, y, s1, s2, angle = splats[..., :5].unsqueeze(-1).unbind(-2)      # (B, N, 1) each
    cos, sin, pixel = angle.cos(), angle.sin(), PIXEL_VARIANCE * (2 / size) ** 2
    first, second = 1 / (s1.square() + pixel), 1 / (s2.square() + pixel)
    centres = (2 * torch.arange(size, dtype=splats.dtype, device=splats.device) + 1) / size - 1
    across, down = centres - x, centres - y                             # (B, N, size)
    xx = -0.5 * (cos.square() * first + sin.square() * second) * across.square()
    yy = -0.5 * (sin.square() * first + cos.square() * second) * down.square()
    mixed = cos * sin * (second - first) * across
    return _Gaussian.apply(xx, mixed, yy, down)


class _Gaussian(torch.autograd.Function):
    """exp(xx_j + mixed_j down_i + yy_i), (B, N, H, W), of xx and mixed (B, N, W), yy and down (B, N, H).

    The gradient is two small matrix products a splat, where autograd would pass over all weights six times.
    """

    @staticmethod
    def forward(ctx, xx: Tensor, mixed: Tensor, yy: Tensor, down: Tensor) -> Tensor:
        exponent = torch.addcmul(yy.unsqueeze(-1), down.unsqueeze(-1), mixed.unsqueeze(-2)).add_(xx.unsqueeze(-2))
        weights = exponent.clamp_(min=LEAST_EXPONENT).exp_()
        ctx.save_for_backward(mixed, down, weights)
        return weights

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mixed, down, weights = ctx.saved_tensors
        gradient = gradient * weights
        rows = torch.stack((torch.ones_like(down), down), -2) @ gradient            # (B, N, 2, W)
        columns = gradient @ torch.stack((torch.ones_like(mixed), mixed), -1)       # (B, N, H, 2)
        return rows[..., 0, :], rows[..., 1, :], columns[..., 0], columns[..., 1]
