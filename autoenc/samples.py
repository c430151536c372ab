"""The picture that shows what a model makes of a few images."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor

from autoenc.metrics import nearest_class, palette_colours, to_uint8
from autoenc.model import Autoencoder


def sample_picture(model: Autoencoder, inputs: Tensor, images: Tensor, palette: np.ndarray | None) -> np.ndarray:
    """The picture of :func:`sample`."""
    return sample(model, inputs, images, palette)[0]


@torch.inference_mode()
def sample(model: Autoencoder, inputs: Tensor, images: Tensor, palette: np.ndarray | None,
           autocast: AbstractContextManager | None = None) -> tuple[np.ndarray, np.ndarray]:
    """A picture, uint8 (rows * H, B * W, 3): images (B, 3, H, W) above their reconstructions (of ``inputs``, what the
    model takes: the images or their splats) above the predicted classes in palette colours (no such row without
    palette); and the latents that were decoded, float32 (B, C, h, w) or (B, D): a VAE's posterior mean, normalised
    where the model normalises."""
    with autocast or nullcontext():
        mean, _ = model.encoder(inputs)
        latent = model.normalize(mean)
        outputs = model.decode(latent)
    rows = [to_uint8(images), to_uint8(outputs["rgb"])]
    if palette is not None:
        rows.append(palette[predicted_classes(outputs, palette_colours(palette, images.device)).cpu().numpy()])
    return np.concatenate([np.concatenate(list(row), axis=1) for row in rows]), latent.float().cpu().numpy()


def predicted_classes(outputs: dict[str, Tensor], colours: Tensor) -> Tensor:
    """The classes (B, H, W) of a decoder's outputs: of its segmentation head, else those of the palette's ``colours``
    (K, 3) in [-1, 1] that are nearest to the reconstruction."""
    return outputs["segmentation"].argmax(1) if "segmentation" in outputs else nearest_class(outputs["rgb"], colours)
