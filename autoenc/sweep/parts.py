"""The typed sections of a sweep file: search, asha, objective, decision, resources."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator

from autoenc import figures
from autoenc.checks import Conflict, describe
from autoenc.errors import InputError, did_you_mean
from autoenc.settings import Section


def _share(value: Any) -> Any:
    """``5%`` or ``0.05`` as a float."""
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)\s*%\s*", value)
        if not match:
            raise ValueError("should be a share like 5% or 0.05")
        return float(match.group(1)) / 100
    return value


def _within(value: Any) -> Any:
    """A share, ``1se``, or none."""
    return None if value == "none" else value if value == "1se" else _share(value)


def _figure(value: str) -> str:
    if value not in figures.MODES:
        raise ValueError(f"is no figure{did_you_mean(value, figures.MODES)}")
    return value


def _gpus(value: Any) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if value != "auto" and not (number and 0 <= value <= 1000 and (value <= 1 or value == int(value))):
        raise ValueError("should be auto, a fraction of one GPU, or whole ones")
    return float(value) if number else value


def _list(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


Share = Annotated[float, BeforeValidator(_share), Field(ge=0, le=10)]
Figure = Annotated[str, AfterValidator(_figure)]


class Measured(Section):
    """A figure and the direction that is better."""

    metric: Figure = "val/mse"
    mode: Literal["min", "max"] | None = None
    """none: the figure's own"""

    @model_validator(mode="after")
    def _check(self) -> Measured:
        own = figures.MODES[self.metric]
        if self.mode not in (None, own) and self.metric not in figures.EITHER_WAY:
            better = "larger" if own == "max" else "smaller"
            raise Conflict(f"mode: {self.mode!r}: {self.metric} is better when {better} (mode: {own})")
        return self

    @property
    def direction(self) -> str:
        return self.mode or figures.MODES[self.metric]


class Preference(Measured):
    metric: Figure
    within: Share = 0.0
    """values this near the best one count as equal"""


class Requirement(Section):
    metric: Figure
    min: float | None = None
    max: float | None = None

    @model_validator(mode="after")
    def _check(self) -> Requirement:
        if self.min is None and self.max is None:
            raise Conflict(f"a requirement on {self.metric} needs min or max")
        return self


class Baseline(Section):
    arm: str
    margin: Share = 0.05
    gains: Annotated[tuple[Figure, ...], BeforeValidator(_list)] = ()


class Decision(Section):
    within: Annotated[Share | Literal["1se"] | None, BeforeValidator(_within)] = None
    """relative distance from the best score that counts as just as good; none: only the best itself; 1se: one standard
    error of the best's mean over its seeds"""
    evidence: Literal["observed", "shown"] = "observed"
    prefer: Annotated[tuple[Preference, ...], BeforeValidator(_list)] = ()
    require: Annotated[tuple[Requirement, ...], BeforeValidator(_list)] = ()
    baseline: Baseline | None = None
    repeats: Annotated[int, Field(ge=1, le=1000)] = 1
    """seeds for the finalists"""
    repeats_vary: Annotated[tuple[Literal["train.seed", "data.seed"], ...], BeforeValidator(_list)] = ("train.seed",)
    """what a further seed changes: data.seed splits (and, with data.limit, draws) the data anew, too"""
    pick: str | None = None
    because: str | None = None

    @model_validator(mode="after")
    def _check(self) -> Decision:
        if self.evidence == "shown" and self.repeats < 2:
            raise Conflict("evidence: shown needs repeats of at least 2: one seed shows nothing about the noise")
        if self.within == "1se" and self.repeats < 2:
            raise Conflict("within: 1se needs repeats of at least 2: one seed has no standard error")
        if "train.seed" not in self.repeats_vary:
            raise Conflict("repeats_vary: must name train.seed (data.seed may be added)")
        if self.because is not None and self.pick is None:
            raise Conflict("because: gives a reason, but nothing is picked (pick)")
        return self

    @property
    def share(self) -> float:
        """``within`` as a share, as far as it is known before all seeds are: 0 for none and for 1se."""
        return self.within if isinstance(self.within, float) else 0.0

    @property
    def named(self) -> set[str]:
        """The arms that the rule names: they get all seeds, and are never stopped."""
        return {name for name in (self.pick, self.baseline.arm if self.baseline else None) if name is not None}


def _underscored(value: Any) -> Any:
    return "quasi_random" if value == "quasi-random" else value


class Search(Section):
    algorithm: Annotated[Literal["tpe", "gp", "random", "quasi_random", "grid"], BeforeValidator(_underscored)] = "tpe"
    trials: Annotated[int, Field(ge=1, le=100_000)] | None = None
    """arms and sampled points together; none: as many as arms"""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42


class Asha(Section):
    grace_epochs: Annotated[int, Field(ge=1, le=100_000)] = 1
    reduction_factor: Annotated[int, Field(ge=2, le=100_000)] = 3
    margin: Share = 0.05


class Resources(Section):
    cpus: Annotated[int, Field(ge=1, le=100_000)] = 1
    gpus: Annotated[float | Literal["auto"], BeforeValidator(_gpus)] = "auto"
    """of a trial; auto: one where there are enough, else a share by what a trial takes of it (autoenc.sweep.gpu)"""
    accelerator: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,60}$")] | None = None
    """the kind of GPU to train on, by Ray's name (V100, L40S, A100-80G), where a cluster has several; any: whatever is
    free; none: whatever is free, but one kind for each seed where seeds are compared in pairs"""
    store_gb: Annotated[float | None, Field(gt=0), BeforeValidator(lambda value: None if value == "none" else value)] \
        = 20.0
    """how large the store may get before checkpoints of trials that lost give way, 10⁹ bytes; none: without limit"""

    @property
    def kind(self) -> str | None:
        """The one kind of GPU that was asked for."""
        return None if self.accelerator == "any" else self.accelerator


PARTS: dict[str, type[Section]] = {"search": Search, "asha": Asha, "objective": Measured, "decision": Decision,
                                   "resources": Resources}


def make_part(name: str, value: Mapping[str, Any], where: str, *, alone: bool = False) -> Any:
    """The typed section. ``alone``: only the types; what must fit together is checked when all layers are applied."""
    try:
        return PARTS[name].model_validate(dict(value))
    except ValidationError as error:
        if said := describe(error, f"{where}: {name}", PARTS[name], alone=alone):
            raise InputError(said) from None
        return None
