"""Seeds that are compared in pairs, on a cluster with GPUs of several kinds: every seed has a kind of its own. No Ray.

Two arms with the same seed share their first weights and the order of their images, and their difference is what the
decision reads. On different GPUs the same training comes out differently in its last digits, and then in more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from autoenc.errors import InputError
from autoenc.sweep.packing import Cluster, trials
from autoenc.sweep.spec import Spec


class Pairing:
    """Which kind of GPU the trials of each seed run on."""

    def __init__(self, slots: Mapping[str, int], homes: Mapping[int, str]) -> None:
        """``slots``: kind -> trials that run on it at once; ``homes``: seed -> kind, as earlier runs of the sweep had
        it. A kind that the cluster has no more is forgotten."""
        self.slots = slots
        self.homes = {seed: kind for seed, kind in homes.items() if kind in slots}

    def home(self, seed: int, running: Iterable[int] = ()) -> str:
        """The kind for a trial of a seed; for the first one of a seed, the kind with the most free slots while trials
        of the seeds ``running`` take theirs."""
        if seed not in self.homes:
            taken = Counter(self.homes[other] for other in running if other in self.homes)
            self.homes[seed] = max(self.slots, key=lambda kind: (self.slots[kind] - taken[kind], self.slots[kind]))
        return self.homes[seed]


def make_pairing(spec: Spec, here: Cluster, runs: int, homes: Mapping[int, str]) -> Pairing | None:
    """None where seeds need not be kept together: nothing is repeated, no GPUs are used, or all are of one kind; where
    a kind or ``any`` was asked for; and on a cluster that grows, whose kinds are not known yet. ``runs``, ``homes``: as
    in :meth:`Cluster.share` and :class:`Pairing`."""
    asked = spec.resources
    if spec.decision.repeats < 2 or asked.gpus == 0 or asked.accelerator is not None or here.grows:
        return None
    slots = {}
    for kind in here.kinds:
        try:
            slots[kind] = here.share(asked.model_copy(update={"accelerator": kind}), runs)[2]
        except InputError:                      # no trial fits on a node of this kind
            continue
    return Pairing(slots, homes) if len(slots) > 1 else None


def pairing_words(pairing: Pairing | None, spec: Spec, here: Cluster) -> str:
    """What is to be said before the sweep begins; empty: nothing."""
    if pairing is not None:
        kinds = ", ".join(f"{kind}: {trials(number)} at once" for kind, number in pairing.slots.items())
        return (f"seeds are compared in pairs, so that all trials of a seed run on one kind of GPU ({kinds}); "
                "resources.accelerator: any takes whatever is free")
    if spec.decision.repeats > 1 and spec.resources.accelerator == "any" and len(here.kinds) > 1:
        return (f"! decision.repeats compares seeds in pairs, and on different GPUs ({', '.join(here.kinds)}) a seed "
                f"is not the same training: --set resources.accelerator={here.kinds[0]} keeps to one kind")
    return ""
