"""What is done once with the best weights of a finished training: figures that need the model, the statistics of its
latents, and for a final model its evaluation."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import torch

from autoenc import figures
from autoenc.checkpoint import build_model, load_model, read_checkpoint, save_checkpoint
from autoenc.config import Config
from autoenc.evaluation.cost import encode_ms
from autoenc.evaluation.posterior import posterior_figures
from autoenc.files import write_atomic
from autoenc.latents import LatentStatistics, latent_statistics
from autoenc.metrics import smoothness, to_inputs
from autoenc.model import DEVIATIONS, Autoencoder
from autoenc.table import Row
from autoenc.trajectory import FINISHED, Trajectory

if TYPE_CHECKING:
    from autoenc.data import Dataset

BATCH = 64


def finish(trajectory: Trajectory, config: Config, dataset: Dataset, device: str, epoch: int,
           wanted: Collection[str]) -> None:
    """Compute and keep the figures ``wanted`` of the weights of an epoch (which must be kept), as far as they are not.

    Where the configuration normalises latents, its weights with their statistics set are written, too. ``encode_ms`` is
    measured here and now (see :func:`autoenc.evaluation.cost.encode_ms`): it compares between trials that ran on the
    same kind of machine (``device_name`` in status.json), within about a tenth.
    """
    normalized = config.model.normalize_latents
    if normalized and trajectory.weights(epoch, normalized) is None:
        trajectory.add_figures(epoch, standardize(trajectory, config, dataset, device, epoch), normalized)
    missing = set(wanted) - set(trajectory.figures(epoch, normalized))
    if missing & {"latent/smoothness", "encode_ms", *figures.OF_POSTERIORS}:
        path = trajectory.weights(epoch, normalized)
        if path is None:
            raise FileNotFoundError(f"{trajectory.folder}: the weights of epoch {epoch} are not kept")
        model, inputs, found = load_model(path, device=device), dataset.inputs, {}
        if "latent/smoothness" in missing:
            found["latent/smoothness"] = smoothness(model, inputs, indices=dataset.splits["val"])
        if "encode_ms" in missing:
            found["encode_ms"] = encode_ms(model, dataset.images.shape[1])
        if missing & set(figures.OF_POSTERIORS):
            found |= posterior_figures(model, dataset, dataset.splits["val"])
        trajectory.add_figures(epoch, found, normalized)
    if FINISHED in missing:
        trajectory.add_figures(epoch, evaluate_final(trajectory, config, dataset, device, epoch), normalized)


def standardize(trajectory: Trajectory, config: Config, dataset: Dataset, device: str, epoch: int) -> Row:
    """Set the statistics of an epoch's latents over the whole training split, and write the weights with them.

    An exact inverse changes no reconstruction, so nothing need be trained again. ``learned`` is left as it was trained,
    and only measured. Returns what a look at the normalised latents then gives.
    """
    content = read_checkpoint(trajectory.weights_path(epoch))
    model = build_model(config, dataset)
    # Assigned, not copied: in another memory layout convolutions would round otherwise. What was trained without a
    # normaliser lacks its statistics.
    model.load_state_dict(content["model"], strict=config.as_trained is config, assign=True)
    model.to(device).eval()
    normalizer = model.encoder.latent_normalizer
    before = None
    if config.model.normalizer != "learned":
        with torch.no_grad():
            normalizer.shift.zero_(), normalizer.log_scale.zero_()
        before = _statistics(model, dataset, "train")
        normalizer.set_statistics(before.mean.float().to(device), before.std.float().to(device))
    after = _statistics(model, dataset, "train")
    dead = [] if before is None else dead_channels(before)
    if dead:
        names = ", ".join(map(str, dead))
        trajectory.warn(f"latent channels {names} (of {len(after.mean)}, from 0) carry nothing: their deviation is "
                        "bounded, and they are left out of what is said of the others")
    change = _change(model, load_model(trajectory.weights_path(epoch), device=device), dataset)
    latents = {"raw_mean": normalizer.shift.flatten().tolist(),
               "raw_std": normalizer.log_scale.exp().flatten().tolist(),
               "dead": dead}
    save_checkpoint(trajectory.weights_path(epoch, normalized=True), {
        **content, "config": config.nested(), "latents": latents,
        "model": {name: value.detach().cpu() for name, value in model.state_dict().items()}})
    return {**standardized(after, dead), "latent/reconstruction_change": change}


@torch.inference_mode()
def _change(model: Autoencoder, before: Autoencoder, dataset: Dataset) -> float:
    """The largest difference of any number in the reconstructions of validation images, images in [-1, 1]."""
    inputs = to_inputs(dataset.inputs[dataset.splits["val"][:BATCH]], next(model.parameters()).device)
    pictures = [each.decode(each.normalize(each.encoder(inputs)[0]), heads=("rgb",))["rgb"]
                for each in (model, before)]
    return float((pictures[0] - pictures[1]).abs().max())


def dead_channels(raw: LatentStatistics) -> list[int]:
    """Channels (from 0) that carry nothing: their deviation is below the smallest one that is told from rounding."""
    bound = max(DEVIATIONS[0], 1e-4 * float(raw.std.max()))
    return [channel for channel, deviation in enumerate(raw.std.tolist()) if deviation < bound]


def standardized(found: LatentStatistics, dead: Collection[int] = ()) -> Row:
    """How far latents are from standardised; dead channels are left out."""
    alive = [channel for channel in range(len(found.mean)) if channel not in dead]
    if not alive:
        return dict.fromkeys(figures.STANDARDIZED[:3], float("nan"))
    deviation = found.covariance.diagonal().clamp(min=1e-300).sqrt()
    correlation = (found.covariance / torch.outer(deviation, deviation))[alive][:, alive].abs()
    correlation.fill_diagonal_(0)
    return {"latent/worst_mean": float(found.mean[alive].abs().max()),
            "latent/worst_deviation": float((found.std[alive] - 1).abs().max()),
            "latent/worst_correlation": float(correlation.max())}


def _statistics(model: Autoencoder, dataset: Dataset, split: str) -> LatentStatistics:
    return latent_statistics(model, dataset.inputs, batch_size=BATCH, indices=dataset.splits[split])


def evaluate_final(trajectory: Trajectory, config: Config, dataset: Dataset, device: str, epoch: int) -> Row:
    """Evaluate the model of an epoch on val and test; add the statistics of its latents to its checkpoint, under the
    names by which diffusion libraries read them; write the weights once more as safetensors. Returns the test split's
    figures: those of a finished model are the only ones that read it."""
    from safetensors.torch import save

    from autoenc.evaluate import evaluate, json_text

    normalized = config.model.normalize_latents
    path = trajectory.weights_path(epoch, normalized)
    model = load_model(path, device=device)
    latents = _statistics(model, dataset, "train")
    statistics = {"latents_mean": latents.mean.tolist(), "latents_std": latents.std.tolist()}
    save_checkpoint(path, {**read_checkpoint(path), **statistics})
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    write_atomic(path.with_suffix(".safetensors"), save(state))
    found = {**statistics, **evaluate(model, dataset, config, pictures=path.with_suffix(".pictures"))}
    write_atomic(trajectory.evaluation_path(epoch, normalized), json_text(found))
    plain = {name: value for name, value in (found["test"] or {}).items()
             if isinstance(value, int | float) and "/" not in name}
    return {f"test/{name}": float(value) for name, value in {"mse": float("nan"), **plain}.items()}
