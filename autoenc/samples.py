"""The picture that shows what a model makes of a few images."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor

from autoenc.metrics import nearest_class, palette_colours, to_uint8
from autoenc.model import Autoencoder


@torch.inference_mode()
def sample_picture(model: Autoencoder, images: Tensor, palette: np.ndarray | None,
                   autocast: AbstractContextManager | None = None) -> np.ndarray:
    """uint8 (rows * H, B * W, 3): images (B, 3, H, W) above their reconstructions above the predicted classes in
    palette colours (of the segmentation head, else the nearest to the reconstruction; no such row without palette).
    A VAE decodes the posterior's mean."""
    with autocast or nullcontext():
        mean, _ = model.encoder(images)
        outputs = model.decode(model.normalize(mean))
    rows = [to_uint8(images), to_uint8(outputs["rgb"])]
    if palette is not None:
        predicted = outputs["segmentation"].argmax(1) if "segmentation" in outputs \
            else nearest_class(outputs["rgb"], palette_colours(palette, images.device))
        rows.append(palette[predicted.cpu().numpy()])
    return np.concatenate([np.concatenate(list(row), axis=1) for row in rows])
