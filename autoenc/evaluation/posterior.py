"""What a VAE's latent tells of an image, and what its decoder makes of it: the figures that a diagnosis rests on."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from autoenc.data import Dataset
from autoenc.doctor import COLLAPSED_NATS
from autoenc.losses import Tensors
from autoenc.metrics import Means, to_inputs, to_unit
from autoenc.model import Autoencoder, derived_seed
from autoenc.table import Row

MOST_IMAGES = 1024
BATCH = 64


def kl_of_dimensions(encoded: Tensors) -> Tensor:
    """KL(N(mu, sigma^2) || N(0, 1)) in nats of each latent number, of each image: the shape of ``mu`` (Kingma and
    Welling 2014, appendix B)."""
    mu, logvar = encoded["mu"].double(), encoded["logvar"].double()
    return 0.5 * (mu.square() + logvar.exp() - 1 - logvar)


@torch.inference_mode()
def posterior_figures(model: Autoencoder, dataset: Dataset, indices: np.ndarray, seed: int = 42) -> Row:
    """The figures ``latent/kl_dead``, ``latent/mse_own``, ``latent/mse_shuffled`` and ``latent/mse_prior`` of a VAE.

    Of the data, ``indices`` are looked at, 1,024 of them drawn by the seed where there are more. Errors are mean
    squared ones, images in [-1, 1]: of what is decoded from the posterior's mean of an image, from that of another
    image (around a seeded circle of them all), from a draw of N(0, I). Of one image alone the second is NaN.
    """
    device = next(model.parameters()).device
    order = np.random.default_rng(derived_seed(seed, "posterior")).permutation(indices)[:MOST_IMAGES]
    generator = torch.Generator(device).manual_seed(derived_seed(seed, "posterior"))
    divergence, latents, means = None, [], Means()
    for rows in _batches(order):
        encoded = model.encode(to_inputs(dataset.inputs[rows], device), generator)
        summed = kl_of_dimensions(encoded).sum(0)
        divergence = summed if divergence is None else divergence + summed
        latents.append(encoded["mu"])
    own = torch.cat(latents)
    for name, raw in (("own", own), ("shuffled", own.roll(1, dims=0)),
                      ("prior", torch.randn(own.shape, generator=generator, device=device))):
        for start, rows in zip(range(0, len(order), BATCH), _batches(order), strict=True):
            decoded = model.decode(model.normalize(raw[start:start + BATCH]), heads=("rgb",))["rgb"]
            means.add(name, (decoded - to_unit(dataset.images[rows], device)).square().mean(), len(rows))
    found = {f"latent/mse_{name}": value for name, value in means.values().items()}
    if len(order) < 2:
        found["latent/mse_shuffled"] = math.nan
    return {"latent/kl_dead": float((divergence / len(order) < COLLAPSED_NATS).double().mean()), **found}


def _batches(order: np.ndarray) -> list[np.ndarray]:
    return [order[start:start + BATCH] for start in range(0, len(order), BATCH)]
