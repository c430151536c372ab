"""Whether a VAE's latent tells of the image: what its figures amount to, in words. Pure; no torch here.

A dimension has *collapsed* where its KL divergence from the prior, mean over images, is below 0.01 nats: it can tell no
more of an image than that. (Lucas et al. 2019, "Don't Blame the ELBO!", https://arxiv.org/abs/1911.02469, define
collapse by such a bound and leave its size open. A posterior mean whose variance is 0.01, the bound of active units,
costs 0.005 nats at least.) Whether the decoder makes use of the others shows when it is given the latent of another
image: what does not get worse by that did not come from the latent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from autoenc.table import Row

COLLAPSED_NATS = 0.01    # KL of a dimension, mean over images: below it tells nothing
IGNORED_GAIN = 0.05      # of the error with another image's latent: what the right latent must at least take away
SPARED = 0.1             # share of collapsed dimensions that a healthy latent may have: one larger than the data needs
FAR_PRIOR = 1.5          # the prior's error over that of another image's latent: from there on its draws are no images
LASTING = 3              # counted epochs in a row without an active unit, after which a collapse counts as lasting

HEALTHY, PARTLY, COLLAPSED, IGNORED = "healthy", "partly collapsed", "collapsed", "decoder ignores the latent"
WORDS = (HEALTHY, PARTLY, IGNORED, COLLAPSED)        # from good to bad

ADVICE = {
    HEALTHY: "",
    PARTLY: "if the reconstruction lacks what they could tell, try loss.free_bits, or a smaller "
            "loss.kl; if not, a smaller model.latent_channels does as well",
    COLLAPSED: "try a loss.kl a hundred times smaller, loss.kl_schedule linear or cyclical, loss.free_bits, or "
               "loss.optimal_variance",
    IGNORED: "train longer, or try a larger train.learning_rate; loss.free_bits makes the encoder tell something, and "
             "does not make the decoder listen",
}
PRIOR_ADVICE = ("latents drawn from N(0, I) decode worse than another image's ({ratio:.1f} times its error): draw from "
                "the statistics of real latents, or raise loss.kl")


@dataclass(frozen=True)
class Diagnosis:
    word: str
    """one of ``WORDS``"""
    why: str
    """the figures that it rests on"""
    advice: str
    """what to try, a sentence; empty where there is nothing to"""

    @property
    def text(self) -> str:
        """All in a line."""
        return f"{self.word}: {self.why}" + (f"; {self.advice}" if self.advice else "")


@dataclass(frozen=True)
class Signs:
    """What a diagnosis reads: figures of one model on one split. NaN where one is not known."""

    dimensions: int
    """numbers of a latent, d"""
    active: float
    """share of dimensions whose posterior mean varies (``latent/active_units``)"""
    nats: float
    """KL of an image, summed over dimensions (``val/kl_nats``)"""
    dead: float = math.nan
    """share of collapsed dimensions (``latent/kl_dead``); not known: those that are not active"""
    own: float = math.nan
    """mean squared error from the image's own latent, the posterior's mean"""
    shuffled: float = math.nan
    """from another image's"""
    prior: float = math.nan
    """from a draw of N(0, I)"""

    @property
    def collapsed_dimensions(self) -> int:
        share = 1 - self.active if math.isnan(self.dead) else self.dead
        return round(share * self.dimensions)

    @property
    def kl(self) -> str:
        """The KL of an image in words, in full from 1,000 nats: ``KL 2,480 nats``, ``KL 0.0172 nats``."""
        return f"KL {self.nats:,.0f} nats" if abs(self.nats) >= 1000 else f"KL {self.nats:.3g} nats"

    @property
    def told_little(self) -> bool:
        """Whether the KL is below 0.01 nats a dimension on average."""
        return self.nats < COLLAPSED_NATS * self.dimensions

    @property
    def gain(self) -> float:
        """The share of the error with another image's latent that the right latent takes away; NaN where unknown."""
        return 1 - self.own / self.shuffled if self.shuffled > 0 else math.nan


def signs_of(row: Mapping[str, float]) -> Signs | None:
    """The signs among the figures of a trial or of one epoch; None where they are not those of a VAE."""
    names = ("latent_size", "latent/active_units", "val/kl_nats")
    if not all(math.isfinite(row.get(name, math.nan)) for name in names):
        return None
    more = (row.get(name, math.nan) for name in ("latent/kl_dead", "latent/mse_own", "latent/mse_shuffled",
                                                 "latent/mse_prior"))
    return Signs(int(row["latent_size"]), row["latent/active_units"], row["val/kl_nats"], *more)


def diagnose(signs: Signs) -> Diagnosis:
    """What the signs amount to.

    The right latent is of no use where it takes away less than 5% of the error that another image's has. *collapsed*:
    every dimension has, or the latent is of no use and its KL below 0.01 nats a dimension on average. *decoder ignores
    the latent*: of no use, though the KL is paid. *partly collapsed*: of use, and more than one dimension in ten has.
    Where nothing is known of other latents (during training), the dimensions alone decide.
    """
    dead, size = signs.collapsed_dimensions, signs.dimensions
    useless = signs.gain < IGNORED_GAIN                          # False where it is not known
    if dead == size or (useless and signs.told_little):
        word = COLLAPSED
    elif useless:
        word = IGNORED
    else:
        word = PARTLY if dead > SPARED * size else HEALTHY
    advice = ADVICE[word]
    ratio = signs.prior / signs.shuffled if signs.shuffled > 0 else math.nan
    if word in (HEALTHY, PARTLY) and ratio > FAR_PRIOR:
        advice = "; ".join(filter(None, (advice, PRIOR_ADVICE.format(ratio=ratio))))
    return Diagnosis(word, _why(signs), advice)


def _why(signs: Signs) -> str:
    told = [f"{signs.collapsed_dimensions} of {signs.dimensions} dimensions tell nothing",
            f"{signs.active:.0%} active units", f"{signs.kl} an image"]
    if not math.isnan(signs.gain):
        told.append(f"the right latent takes away {max(0.0, signs.gain):.0%} of the error that another image's has")
    return ", ".join(told)


def has_collapsed(row: Row) -> bool:
    """Whether no dimension is active after an epoch, and the KL below 0.01 nats a dimension on average."""
    signs = signs_of(row)
    return signs is not None and signs.active == 0 and signs.told_little


def lasting_collapse(rows: Sequence[Row], first: int) -> int | None:
    """The epoch at which a VAE has collapsed for good: the last of three in a row without an active unit, none of them
    before ``first``, the first epoch that counts; None where there is none."""
    run = 0
    for epoch, row in enumerate(rows[first - 1:], start=first):
        run = run + 1 if has_collapsed(row) else 0
        if run == LASTING:
            return epoch
    return None
