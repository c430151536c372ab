"""How the trials of a sweep share a cluster: what one gets of a node, and how many share a GPU. No Ray, no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from autoenc.errors import InputError
from autoenc.sweep.parts import Resources

MOST = 8                # trials on a GPU, however idle one of them leaves it
RESERVE = 0.1           # of a GPU's memory is left free: other arms and later epochs may need more than was measured
STEP = 10_000           # Ray counts a GPU's fractions in so many parts
OLD = ("K80", "P4", "P100", "V100", "T4")      # GPUs without arithmetic in bf16, by Ray's names
# As autoenc.trajectory words it, and as CUDA's libraries do where torch does not recognise it.
_MEMORY = re.compile(r"out of GPU memory|CUDA (error: )?out of memory|(CUBLAS|CUDNN)_STATUS_ALLOC_FAILED")


@dataclass(frozen=True)
class Use:
    """What one training takes of a GPU."""

    gpu: str                    # its name
    memory: float               # bytes, at its peak, with what CUDA itself takes for a process
    total: float                # bytes of the GPU that nobody else holds
    busy: float                 # share of the time in which the GPU runs something for it, 0 to 1
    exclusive: bool = False     # the GPU takes one process only; then nothing else is measured


@dataclass(frozen=True)
class Node:
    """A node of a cluster, with all that it has, whoever holds it."""

    id: str
    host: str
    cpus: int
    gpus: float
    kind: str = ""              # of its GPUs, by Ray's name (V100); empty: none, or not known

    def room(self, cpus: int, gpus: float) -> int:
        """How many trials with so many CPUs and GPUs each run here at once. A fraction is of one GPU."""
        by_gpus = math.inf if not gpus else self.gpus // gpus if gpus >= 1 else int(self.gpus) * int(1 / gpus + 1e-9)
        return int(min(self.cpus // cpus, by_gpus))


@dataclass(frozen=True)
class Cluster:
    """What a command has joined or started."""

    cpus: int
    gpus: float
    dashboard: str | None
    local: bool
    slots: int | None = None        # trials at once that this command may take; None: what there is
    grows: bool = False             # brings nodes for so many slots as trials wait for them
    metrics: str | None = None      # what the agent of the driver's node tells Prometheus
    nodes: tuple[Node, ...] = ()    # none: only the totals are known
    packing: int = 2                # trials on a GPU at most, with gpus: auto; a guess until it was measured

    def share(self, resources: Resources, runs: int) -> tuple[int, float, int]:
        """CPUs and GPUs of one trial and the number of slots, for so many runs. What other commands hold at the moment
        is not taken off: trials wait for it.

        Raises :class:`InputError` where the cluster can never give what one trial asks for.
        """
        cpus, gpus, here = resources.cpus, resources.gpus, self.only(resources.kind)
        if self.grows:
            return cpus, (1.0 if self.gpus else 0.0) if gpus == "auto" else float(gpus), self.slots
        if gpus == "auto":
            gpus = fraction(here.together(resources, runs)) if here.gpus else 0.0
        nodes = here.nodes or (Node("", "", here.cpus, here.gpus),)
        self._check("cpus", cpus, here.cpus, max(node.cpus for node in nodes))
        self._check("gpus", gpus, here.gpus, max(node.gpus for node in nodes))
        slots = sum(node.room(cpus, gpus) for node in nodes)
        if not slots:
            raise InputError(f"resources: {cpus} CPUs and {gpus:g} GPUs a trial, but no node of the cluster has both")
        return cpus, float(gpus), min(slots, self.slots or slots)

    def only(self, kind: str | None) -> Cluster:
        """The part of the cluster with GPUs of a kind; all of it for None. Raises :class:`InputError` where there is
        none."""
        if kind is None or self.grows:
            return self
        nodes = tuple(node for node in self.nodes if node.kind == kind)
        if not nodes:
            have = f"its GPUs are {', '.join(self.kinds)}" if self.kinds else "Ray has no name for its GPUs" \
                if self.gpus else "it has no GPUs"
            raise InputError(f"resources.accelerator: {kind!r}: the cluster has none of that kind: {have}")
        return replace(self, nodes=nodes, cpus=sum(node.cpus for node in nodes), gpus=sum(node.gpus for node in nodes))

    @staticmethod
    def _check(name: str, asked: float, held: float, most: float) -> None:
        if asked > held:
            cpus = "; to train on CPUs: --set resources.gpus=0" if name == "gpus" and not held else ""
            raise InputError(f"resources.{name}: {asked:g} a trial, but the cluster has {held:g}{cpus}")
        if asked > most:
            raise InputError(f"resources.{name}: {asked:g} a trial, but no node of the cluster has more than {most:g}")

    def together(self, resources: Resources, runs: int) -> int:
        """Trials that share a GPU with ``gpus: auto``: no more than it takes to run all at once. 1 for given GPUs."""
        if resources.gpus != "auto" or not self.gpus or self.grows:
            return 1
        return max(1, min(self.packing, self.enough(runs)))

    def enough(self, runs: int) -> int:
        """How many of so many runs come to a GPU when all run at once that may."""
        return math.ceil(min(runs, self.slots or runs) / self.gpus)

    def beside(self, cpus: int) -> int:
        """For how many trials there are CPUs beside each GPU, on the node where they are fewest."""
        nodes = [node for node in self.nodes if node.gpus] or [Node("", "", self.cpus, self.gpus)]
        return min(int(node.cpus / cpus / node.gpus) for node in nodes)

    @property
    def kinds(self) -> list[str]:
        """Of the GPUs, as far as Ray has a name for them."""
        return sorted({node.kind for node in self.nodes if node.gpus and node.kind})


def packing(memory: float, total: float, busy: float, cpus: int, *, most: int = MOST, reserve: float = RESERVE) -> int:
    """How many trials to run on a GPU at once: as many as fit and pay, at least one.

    ``memory``: bytes that one takes, of ``total`` that there are, of which the ``reserve`` (a share) is left free.
    ``busy``: share of the time, 0 to 1, in which the GPU runs something for one of them. Kernels of several processes
    take turns, so that about 1 / busy trials keep it busy all the time, and more would wait for each other. ``cpus``:
    for how many trials there are CPUs. ``most``: in any case.
    """
    fit = (1 - reserve) * total / memory if memory > 0 else math.inf
    pay = math.floor(1 / busy + 0.5) if busy * most > 1 else most
    return max(1, int(min(fit, pay, cpus, most)))


def fraction(trials: int) -> float:
    """What Ray is asked for, of a GPU, for each of so many trials that share it. Rounded down: Ray counts in parts of a
    ten-thousandth, and 0.1667 six times would be more than one GPU."""
    return STEP // trials / STEP


def choose(uses: Sequence[Use], cpus: int, enough: int) -> tuple[int, str]:
    """The packing for GPUs of several kinds, the smallest of theirs, and in words why. ``cpus``, ``enough``: for how
    many trials a GPU has CPUs, and how many there are for it."""
    each = [1 if use.exclusive else packing(use.memory, use.total, use.busy, cpus) for use in uses]
    number, use = min(zip(each, uses, strict=True), key=lambda found: found[0])
    chosen = min(number, enough)
    if use.exclusive:
        return 1, f"1 trial a GPU: {use.gpu} takes one process only (compute mode Exclusive_Process or Prohibited)"
    why = (f"one takes {use.memory / 2**30:.1f} of {use.total / 2**30:.0f} GiB and keeps it busy {use.busy:.0%} of the "
           "time")
    if chosen < number:
        why += "; there are no more for it"
    elif number == max(1, cpus) and packing(use.memory, use.total, use.busy, MOST) > number:
        why += f"; beside a GPU there are CPUs for {cpus}"
    of = f" ({use.gpu}, the smallest of {len(uses)} kinds)" if len(uses) > 1 else ""
    return number, f"{trials(chosen)} a GPU{of}: {why}"


def trials(number: int) -> str:
    """So many trials, in words."""
    return f"{number} trial" + ("s" if number != 1 else "")


def out_of_gpu_memory(note: str) -> bool:
    """Whether a trial failed because its GPU had no memory left."""
    return _MEMORY.search(note) is not None


def precision_warning(precisions: set[str], kinds: Sequence[str]) -> str:
    """What is to be said of candidates with these precisions (``train.precision``) on GPUs of these kinds; empty:
    nothing."""
    old = [kind for kind in kinds if kind.partition("-")[0] in OLD]
    if len(precisions) > 1 and len(kinds) > 1:
        return (f"train.precision differs among the candidates ({', '.join(sorted(precisions))}), and so do the GPUs "
                f"({', '.join(kinds)}): what is better then is not the precision's merit alone")
    if "bf16" in precisions and old:
        return f"train.precision bf16: {', '.join(old)} has no arithmetic in bf16, and is slow with it; fp16 suits it"
    return ""
