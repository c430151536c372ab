"""An experiment file of another project, read: what it says as settings, and how it takes part in a sweep.

What the forms of those files share stands here (see autoenc.imginav, autoenc.gaussvae). No torch, no ray.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoenc.checks import Faults, shown
from autoenc.config import OF_KIND, Config, absolute_paths, check_values, make_config
from autoenc.errors import InputError

BUDGET = ("train.epochs", "train.patience", "train.min_delta", "train.sample_every")


@dataclass(frozen=True)
class Experiment:
    """What an experiment file says."""

    where: str
    """the file, as messages name it"""
    name: str
    settings: dict[str, Any]
    """by our dotted keys; everything that the form determines"""
    notices: tuple[str, ...]
    """what a person should know of how it was read, each with the file's name"""
    classes: int | None = None
    """how many segmentation classes its head declares; None without the head"""
    labels: int | None = None
    """how many labels its classification head declares; None without the head"""


def check_counts(experiment: Experiment, classes: int, labels: int) -> None:
    """Raise :class:`InputError` where the data's number of segmentation classes, or of labels, is not the declared."""
    faults = Faults()
    for kind, declared, have, what in (("SegmentationHead", experiment.classes, classes, "segmentation classes"),
                                       ("ClassificationHead", experiment.labels, labels, "labels")):
        if declared not in (None, have):
            faults.said.append(f"{experiment.where}: autoencoder.decoder.heads: {kind}: num_classes: {declared}, and "
                               f"the data has {have} {what}")
    faults.tell()


def as_arm(experiment: Experiment, start: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """An experiment as a sweep's candidate: its settings without data, seed and budget, which must be the sweep's for
    candidates to compare, and a notice of those that are others in the sweep (``start``: all settings under its arms).
    """
    given_way = [key for key in experiment.settings
                 if key.startswith("data.") or key == "train.seed" or key in BUDGET]
    others = [f"{key} ({shown(start[key])} here)" for key in given_way
              if start.get(key, experiment.settings[key]) != experiment.settings[key]]
    notices = [f"{experiment.where}: gives way to the sweep: {', '.join(others)}"] if others else []
    return {key: value for key, value in experiment.settings.items() if key not in given_way}, notices


def checked(settings: Mapping[str, Any], path: Path, where: str, theirs: Mapping[str, str]) -> dict[str, Any]:
    """The settings with paths made absolute from the file ``path``. Raises :class:`InputError` for values that no
    configuration can hold, by ``theirs``, the form's own words for our keys, as far as it has any."""
    try:
        settings = absolute_paths(settings, path.resolve().parent, where)
        check_values(settings, where)
    except InputError as error:
        said = str(error)
        for ours, their in theirs.items():
            said = said.replace(f"{where}: {ours}", f"{where}: {their}")
        raise InputError(said) from None
    return dict(settings)


def meant(config: Config) -> dict[str, Any]:
    """All settings by dotted key; one way of saying for those that mean the same, the default where they have no
    effect."""
    flat = absolute_paths(config.flat(), Path.cwd())
    flat |= {"data.cache_dir": None, "model.heads": list(config.heads),
             "loss.standardization": config.loss_weights.get("standardization", 0.0)}
    idle = [f"model.{key}" for kind, keys in OF_KIND.items() for key in keys
            if kind != config.model.kind and key not in OF_KIND[config.model.kind]]
    idle += [f"loss.{key}" for key, schedule in (("kl_warmup_epochs", "linear"), ("kl_cycles", "cyclical"))
             if config.kl_schedule != schedule]
    if config.data.source != "splats":
        idle += ["data.splats", "data.curve", "data.generated", "data.refine"]
    if not config.loss.splats:
        idle.append("loss.group_reduction")
    if not config.model.variational:
        idle += ["model.latent", "train.stop_on_collapse", "loss.kl_reduction", "loss.kl_schedule", "loss.free_bits",
                 "loss.optimal_variance"]
    default = Config().flat()
    flat |= {key: default[key] for key in idle}
    if not config.model.normalize_latents or config.model.normalizer == "loss":
        flat["model.normalizer"] = "exact"          # with the loss's weight, the same
    return flat


def check_written(said: Mapping[str, Any], document: Mapping[str, Any], form: str,
                  read: Callable[[Mapping[str, Any], Path], Experiment],
                  again: Callable[[Config], dict[str, Any]]) -> None:
    """Raise :class:`InputError` where a document, read back, does not say what was meant (``said``, by
    ``again(config)``), with every setting that the form has no place for."""
    where = "as an experiment"
    back = again(make_config(read(document, Path(where)).settings, where))
    faults = Faults()
    for key, value in said.items():
        if key == "data.split":
            differs = any(abs(mine - theirs) > 1e-9 for mine, theirs in zip(value, back[key], strict=True))
        else:
            differs = value != back[key]
        if differs:
            faults.said.append(no_place(key, value, form, back[key]))
    faults.tell()


def no_place(key: str, value: Any, form: str, there: Any) -> str:
    """The message for a setting that a form cannot express."""
    return f"{key}: {shown(value)} has no place in {form}'s form (there it is {shown(there)})"
