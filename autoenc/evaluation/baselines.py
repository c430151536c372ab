"""Baselines that use no model: what the figures would be without learning anything, and with linear learning."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from autoenc.config import Config
from autoenc.data import Dataset
from autoenc.evaluation.splits import Figures, batch_size, batches_of, figures_of, of_outputs
from autoenc.metrics import SplitFigures, to_inputs
from autoenc.model import Autoencoder, derived_seed

PCA_BYTES = 512 * 2**20      # of training images as float32: 10,922 of 64 px; of larger or more a seeded choice
EXACT = 1000                 # images up to which the decomposition is exact
OVERSAMPLING = 16            # further directions in the randomised one (Halko, Martinsson and Tropp 2011, section 4.2)
CHUNK = 256


@dataclass(frozen=True)
class Baselines:
    """Fitted on the training split, which is all they know."""

    mean_image: Tensor
    """(3, H, W) in [-1, 1]"""
    class_logits: Tensor | None
    """(K, H, W): logarithm of each class's share at each pixel, Laplace's rule for what never occurred"""
    label_logits: Tensor | None
    """(L,): the same of the labels"""
    mean: Tensor
    """(D,): of what the components are of"""
    components: Tensor
    """(k, D), orthonormal rows: the principal components of the images, D = 3 H W, or of splats' normalised columns,
    D = N C"""
    fitted_on: int
    """images that the components come from"""


@torch.inference_mode()
def fit_baselines(model: Autoencoder, dataset: Dataset, dimensions: int, device: torch.device) -> Baselines:
    """Fit to the training split, as the ``model`` normalises splats. ``dimensions``: of the PCA, as many as the latent
    has; fewer where there are not so many images (less one) to fit it on."""
    train = dataset.splits["train"]
    chunks = [train[start:start + CHUNK] for start in range(0, len(train), CHUNK)]
    total = sum(dataset.images[rows].sum(0, dtype=np.int64) for rows in chunks)
    mean = torch.from_numpy(total / len(train) / 127.5 - 1).permute(2, 0, 1)
    classes = labels = None
    if dataset.segmentation is not None:
        counts = np.stack([sum((dataset.segmentation[rows] == kind).sum(0) for rows in chunks)
                           for kind in range(len(dataset.classes))])
        classes = _log_shares(counts).to(device)
    if dataset.labels is not None:
        counts = np.bincount(dataset.labels[train] + 1, minlength=len(dataset.label_names) + 1)[1:]
        labels = _log_shares(counts).to(device)
    most = max(2, PCA_BYTES // (4 * mean.numel()))
    if len(train) > most:
        train = np.sort(np.random.default_rng(derived_seed(0, "pca images")).choice(train, most, replace=False))
    rows = _rows(model, dataset, train, device)
    centre = rows.mean(0)
    components = principal_components(rows.sub_(centre), dimensions)
    return Baselines(mean.float().to(device), classes, labels, centre, components, len(train))


def _log_shares(counts: np.ndarray) -> Tensor:
    return torch.from_numpy(np.log((counts + 1) / (counts + 1).sum(0))).float()


def _rows(model: Autoencoder, dataset: Dataset, rows: np.ndarray, device: torch.device) -> Tensor:
    """Images in [-1, 1], or splats' normalised columns, as rows (n, D) float32; held once."""
    flat = torch.empty(len(rows), model.config.elements if model.takes == "splats" else dataset.images[0].size,
                       device=device)
    for start in range(0, len(rows), CHUNK):
        part = rows[start:start + CHUNK]
        inputs = to_inputs(dataset.inputs[part], device)
        flat[start:start + len(part)] = (model.columns(inputs) if model.takes == "splats" else inputs).flatten(1)
    return flat


def principal_components(centred: Tensor, dimensions: int) -> Tensor:
    """The first principal components (k, d) of centred rows (n, d), orthonormal; k is ``dimensions``, n - 1 or d,
    whichever is least.

    Exact for few rows. For many the randomised method with two power iterations (``torch.svd_lowrank``), seeded: never
    more memory than the rows and (n + d) times k numbers; 8,000 images of 64 px at 128 dimensions take seconds.
    """
    n, d = centred.shape
    k, wanted = min(dimensions, n - 1, d), min(dimensions + OVERSAMPLING, n, d)
    if min(n, d) <= EXACT or wanted == min(n, d):
        # Of the transpose: LAPACK's way for tall matrices, several times as fast as that for wide ones.
        return torch.linalg.svd(centred.T, full_matrices=False).U[:, :k].T.contiguous()
    with torch.random.fork_rng(devices=[centred.device] if centred.is_cuda else []):
        torch.manual_seed(derived_seed(0, "pca"))
        return torch.svd_lowrank(centred, q=wanted, niter=2)[2][:, :k].T.contiguous()


@torch.inference_mode()
def measure_baselines(model: Autoencoder, baselines: Baselines, dataset: Dataset, split: str,
                      config: Config) -> dict[str, Figures]:
    """The figures of each baseline on a split, by its name: those of its outputs. The majority class is measured as a
    segmentation and, painted in the palette's colours, as an image's."""
    device = baselines.mean_image.device
    constant, pca, mean = (SplitFigures(model, dataset.palette if dataset.segmentation is not None else None)
                           for _ in range(3))
    pca.terms, constant.terms = ["mse", "l1"], ["mse", "l1"]
    if model.takes == "splats":
        pca.terms = mean.terms = ["mse", "l1", "splats"]
    constants = {"rgb": baselines.mean_image}
    for name, value in (("segmentation", baselines.class_logits), ("classification", baselines.label_logits)):
        if value is not None:
            constants[name] = value
            constant.terms.append(name)
    for batch in batches_of(dataset, split, device).pass_over(batch_size(config)):
        count = len(batch["images"])
        nothing = {"latent": torch.zeros(count, 1, 1, 1, device=device)}         # there is no latent to tell of
        constant.update(batch, nothing, {name: value.expand(count, *value.shape) for name, value in constants.items()})
        if model.takes == "splats":
            columns = model.columns(batch["splats"])
            pca.update(batch, nothing, model.outputs(project(baselines, columns)))
            mean.update(batch, nothing, model.outputs(baselines.mean.view(columns.shape[1:]).expand_as(columns)))
        else:
            pca.update(batch, nothing, {"rgb": project(baselines, batch["images"]).clamp(-1, 1)})
    found = of_outputs(figures_of(constant, config, dataset))
    parts = {kind: {name: value for name, value in found.items() if name.startswith(kind)}
             for kind in ("segmentation", "classification")}
    rgb = {name: value for name, value in found.items() if not name.startswith(tuple(parts))}
    result = {"mean_image": rgb}
    if segmentation := parts["segmentation"]:
        result["majority_class"] = segmentation | {
            name.replace("segmentation", "palette"): segmentation[name]
            for name in ("segmentation_miou", "segmentation_classes", "segmentation_iou")}
    if parts["classification"]:
        result["majority_label"] = parts["classification"]
    if model.takes == "splats":
        result["mean_splats"] = of_outputs(figures_of(mean, config, dataset))
    return result | {"pca": of_outputs(figures_of(pca, config, dataset))}


def project(baselines: Baselines, rows: Tensor) -> Tensor:
    """Images (B, 3, H, W), or columns (B, N, C), through the principal components and back."""
    codes = (rows.flatten(1) - baselines.mean) @ baselines.components.T
    return (baselines.mean + codes @ baselines.components).view(rows.shape)
