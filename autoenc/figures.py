"""The names of all figures that training reports, and which way each is better. No torch here.

A figure of a data split is written ``val/mse``; the others stand alone (``latent/std``, ``parameters``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

SPLAT_GROUPS = ("xy", "scale", "rot", "feat")
OF_SPLATS = {                           # of decoded raw splats, by group: see autoenc.groups
    **{f"{group}_fvu{suffix}": "min" for suffix in ("", "_position") for group in SPLAT_GROUPS},
    **{f"{group}_std_ratio": "max" for group in SPLAT_GROUPS},
    "rot_error": "min",
}
PER_SPLIT = {
    "loss": "min",                      # weighted sum of the loss terms
    "mse": "min", "l1": "min", "psnr": "max", "ssim": "max",
    "mse_sampled": "min",               # a VAE's error when it decodes a draw instead of the posterior's mean
    "palette_miou": "max",
    "segmentation_ce": "min", "segmentation_accuracy": "max", "segmentation_miou": "max",
    "classification_ce": "min", "classification_accuracy": "max",
    "kl": "min", "kl_nats": "min", "nelbo": "min",
    "log_sigma": "min",                 # of the decoder, with loss.optimal_variance: natural logarithm, at least -6
    "standardization": "min",           # per channel, squared mean plus squared difference of the deviation from 1
    "splats": "min",                    # the group loss of models of splats
    **OF_SPLATS,
}
ALONE = {
    "latent/mean": "min", "latent/std": "min", "latent/active_units": "max", "latent/smoothness": "min",
    "latent/worst_mean": "min", "latent/worst_deviation": "min", "latent/worst_correlation": "min",
    "latent/reconstruction_change": "min",
    "latent/kl_dead": "min", "latent/mse_own": "min", "latent/mse_shuffled": "max", "latent/mse_prior": "min",
    "latent_size": "min", "parameters": "min",
    "encode_ms": "min",                 # time to encode one image, milliseconds: see autoenc.finish
    "train/grad_norm": "min", "train/spikes": "min", "beta": "max",
    "stability/spikes": "min",          # of the gradient norm, over all epochs of a trial
    "stability/epochs": "min",          # the first epoch whose objective is within 5% of the trial's best
}
# Measured on validation data alone: in training they would cost more than they tell.
OF_VALIDATION = ("ssim", "palette_miou", "segmentation_accuracy", "segmentation_miou", "classification_accuracy",
                 *OF_SPLATS)
MODES = {**{f"{split}/{name}": mode for split in ("train", "val") for name, mode in PER_SPLIT.items()
            if split == "val" or name not in OF_VALIDATION}, **ALONE}

WEIGHTED = ("train/loss", "val/loss")                    # change with the loss weights: no fair objective over them
EITHER_WAY = ("latent/mean", "latent/std", "latent/mse_shuffled", "latent/mse_prior", "beta", "val/kl", "val/kl_nats",
              "train/kl", "train/kl_nats",
              *(f"val/{group}_std_ratio" for group in SPLAT_GROUPS))
# Of normalised latents over the training split: the channel farthest from mean 0, that from deviation 1, and the two
# that tell most of each other; and what setting the statistics changed of the reconstructions.
STANDARDIZED = ("latent/worst_mean", "latent/worst_deviation", "latent/worst_correlation",
                "latent/reconstruction_change")
# Of VAEs: what the latent's dimensions tell, and the error from an image's own latent, another image's, the prior's.
OF_POSTERIORS = ("latent/kl_dead", "latent/mse_own", "latent/mse_shuffled", "latent/mse_prior")
# Once, on the best weights of a completed trial.
AFTER_TRAINING = ("latent/smoothness", "encode_ms", *OF_POSTERIORS, *STANDARDIZED)
IN_PASSING = ("encode_ms", *OF_POSTERIORS)    # of them, what every worker measures, as far as it exists, unasked
OF_THE_COURSE = ("stability/spikes", "stability/epochs")             # of a whole trial rather than of an epoch
MONITORED = tuple(name for name in MODES if name.startswith("val/"))


def better(mode: str, left: float, right: float) -> bool:
    """Whether ``left`` beats ``right``; NaN beats nothing and loses to every number."""
    if left != left or right != right:
        return left == left and right != right
    return left < right if mode == "min" else left > right


def best_epoch(values: Sequence[float], mode: str, first: int = 1) -> int:
    """The epoch (1-based) of the best value, the earliest of equals, of those from epoch ``first`` on; 0 if there is
    none but NaN."""
    best = 0
    for epoch, value in enumerate(values[first - 1:], start=first):
        if better(mode, value, values[best - 1] if best else math.nan):
            best = epoch
    return best


def patience_end(values: Sequence[float], mode: str, patience: int | None, min_delta: float = 0.0,
                 first: int = 1) -> int | None:
    """The epoch (1-based) with which patience ends a training of these values, one an epoch; None where it does not.

    It ends after ``patience`` epochs in a row none of which improved on the best by more than ``min_delta``
    (None: never). NaN is no improvement. Epochs before ``first`` are left out.
    """
    if patience is None:
        return None
    best, waited = math.nan, 0
    for epoch, value in enumerate(values[first - 1:], start=first):
        if better(mode, value + min_delta if mode == "min" else value - min_delta, best):
            best, waited = value, 0
        else:
            waited += 1
        if waited >= patience:
            return epoch
    return None
