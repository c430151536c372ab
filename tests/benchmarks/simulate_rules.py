"""How often the decision is right: simulated sweeps whose truth is known, decided by the product's own code.

    python tests/benchmarks/simulate_rules.py [--sweeps 1000] [--json FILE]

Noise as measured on 1,714 real layouts at 64 px (three seeds of the three arms of phase 1.4, 10 epochs): what a seed
does to all arms alike has a standard deviation of 2.4% in validation MSE, what it does to one of them 0.85%; palette
mIoU 0.97%. ``unpaired`` is the same with 2.5% of noise of each arm's own, as if pairing brought nothing.

Regret is how much worse the winner truly is than the truly best arm. The preference is against us: the worse an arm
truly is, the simpler it is.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoenc.sweep.decide import decide
from autoenc.sweep.finalists import finalists, in_race
from autoenc.sweep.parts import Decision, Measured
from autoenc.sweep.records import Record

MSE = Measured()
WITHIN, ASHA_MARGIN, MARGIN = 0.02, 0.05, 0.05
NOISE = {"measured": (0.024, 0.0085, 0.0097), "unpaired": (0.0, 0.025, 0.0097)}     # shared, own, own of the mIoU
TRUTHS: dict[str, Callable[[random.Random], list[float]]] = {                       # excess over the best
    "ties": lambda draw: [0.0] * 5,
    "near-ties": lambda draw: [0.0, 0.005, 0.01, 0.015, 0.025],
    "just too far": lambda draw: [0.0, 0.022, 0.022, 0.022, 0.022],
    "spread out": lambda draw: [0.0, 0.01, 0.04, 0.08, 0.15],
    "drawn at random": lambda draw: [0.0, *(draw.expovariate(1 / 0.03) for _ in range(4))],
}
RULES = {"the smallest number": {"repeats": 1}, **{
    f"{evidence}, {seeds} seed{'s' * (seeds > 1)}": {
        "within": WITHIN, "evidence": evidence, "repeats": seeds, "prefer": [{"metric": "parameters"}]}
    for evidence, counts in (("observed", (1, 3, 5)), ("shown", (3, 5, 10))) for seeds in counts}}


@dataclass
class Sweep:
    """Arms A, B, … of known worth, and a noise that belongs to each seed and arm whenever it is asked for."""

    excess: Sequence[float]
    gain: Sequence[float]
    noise: tuple[float, float, float]
    name: str

    def record(self, i: int, seed: int) -> Record:
        shared, own, mine = self.noise
        draw = random.Random(f"{self.name} {i} {seed}")
        of_seed = random.Random(f"{self.name} {seed}").gauss(0, shared)
        arm = "ABCDEFGH"[i]
        return Record(arm, f"{arm}_seed{seed}", seed, "completed", 10, 10, {
            "val/mse": 0.03 * (1 + self.excess[i]) * math.exp(of_seed + draw.gauss(0, own)),
            "val/palette_miou": 0.26 * (1 + self.gain[i]) * math.exp(draw.gauss(0, mine)),
            "parameters": float(len(self.excess) - sorted(self.excess).index(self.excess[i]) + 10 * i * 1e-3)})

    def run(self, rule: Decision, racing: bool = True) -> tuple[dict[str, Any], int]:
        """The decision as a sweep would come to it, and the trainings that it took."""
        arms = range(len(self.excess))
        order = "ABCDEFGH"[:len(arms)]
        records = [self.record(i, 0) for i in arms]
        stay: Callable[..., list[str]] = in_race if racing else finalists
        for seed in range(1, rule.repeats):
            names = stay(records, order, MSE, rule, max(rule.share, ASHA_MARGIN))
            if len(names) < 2:
                break
            records += [self.record(order.index(name), seed) for name in names]
        return decide(records, order, MSE, rule), len(records)


def sweeps(count: int, truth: str, noise: str) -> Iterator[Sweep]:
    for k in range(count):
        draw = random.Random(f"{truth} {noise} {k}")
        excess = TRUTHS[truth](draw)
        draw.shuffle(excess)
        yield Sweep(excess, [0.0] * len(excess), NOISE[noise], f"{truth} {noise} {k}")


def winners(count: int, truth: str, noise: str, settings: Mapping[str, Any]) -> dict[str, float]:
    """Shares of ``count`` sweeps; trainings are means."""
    rule = Decision.model_validate(settings)
    found = dict.fromkeys(("regret", "decided", "wrong though decided", "simplest that is as good", "trainings",
                           "trainings without racing"), 0.0)
    for sweep in sweeps(count, truth, noise):
        decision, cost = sweep.run(rule)
        regret = sweep.excess["ABCDEFGH".index(decision["winner"])] > WITHIN + 1e-12
        # One seed decides whatever it says; seeds decide where the winner is shown to be within of the best.
        decided = rule.repeats == 1 or bool(decision["shown"] and decision["shown"]["within"]) or (
            len({len(row["seeds"]) for row in decision["candidates"]}) == 1 and cost == len(sweep.excess))
        simplest = max(value for value in sweep.excess if value <= WITHIN)
        found["regret"] += regret
        found["decided"] += decided
        found["wrong though decided"] += regret and decided
        found["simplest that is as good"] += sweep.excess["ABCDEFGH".index(decision["winner"])] == simplest
        found["trainings"] += cost
        found["trainings without racing"] += sweep.run(rule, racing=False)[1]
    return {name: value / count for name, value in found.items()}


ARMS = {"a true tie": (0.0, 0.0), "a gain of 3%": (0.0, 0.03), "worse by 3%": (0.03, 0.0),
        "worse by 10%, a gain of 3%": (0.10, 0.03), "better by 10%": (-0.10, 0.0)}
TRUE: dict[str, Callable[[float, float], bool]] = {
    "helps": lambda e, g: (e <= MARGIN and g > 0) or e < -MARGIN, "hurts": lambda e, g: e > MARGIN,
    "neutral": lambda e, g: abs(e) <= MARGIN and g <= MARGIN, "undecided": lambda e, g: True}


def verdicts(count: int, noise: str, seeds: int) -> dict[str, dict[str, float]]:
    """How often each word is said of each kind of arm, and how often one that is not true; all five stand beside one
    baseline in one sweep."""
    rule = Decision.model_validate({"repeats": seeds, "baseline": {"arm": "A", "margin": MARGIN,
                                                                  "gains": ["val/palette_miou"]}})
    table = {kind: dict.fromkeys((*TRUE, "wrong"), 0.0) for kind in ARMS}
    table["any arm of the sweep"] = {"wrong": 0.0}
    pairs = [(0.0, 0.0), *ARMS.values()]
    for k in range(count):
        sweep = Sweep([e for e, _ in pairs], [g for _, g in pairs], NOISE[noise], f"verdicts {noise} {k}")
        records = [sweep.record(i, seed) for i in range(len(pairs)) for seed in range(seeds)]
        rows = decide(records, "ABCDEF", MSE, rule)["candidates"][1:]
        wrong = False
        for (kind, (excess, gain)), row in zip(ARMS.items(), rows, strict=True):
            table[kind][row["verdict"]] += 1 / count
            false = not TRUE[row["verdict"]](excess, gain)
            table[kind]["wrong"] += false / count
            wrong |= false
        table["any arm of the sweep"]["wrong"] += wrong / count
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description="How often the decision is right, by simulation.")
    parser.add_argument("--sweeps", type=int, default=1000, help="of every kind (default: 1000)")
    parser.add_argument("--json", type=Path, help="where the figures go, too")
    options = parser.parse_args()
    told: dict[str, Any] = {"sweeps": options.sweeps, "winners": {}, "verdicts": {}}
    for noise in NOISE:
        print(f"\nnoise {noise}: the winner ({options.sweeps} sweeps each, within {WITHIN:.0%})")
        print(f"{'truth':<16} {'rule':<20} {'regret>within':>13} {'decided':>8} {'wrong decided':>13} "
              f"{'simplest':>9} {'trainings':>10} {'no racing':>10}")
        for truth in TRUTHS:
            for name, settings in RULES.items():
                row = told["winners"][f"{noise} / {truth} / {name}"] = winners(options.sweeps, truth, noise, settings)
                shares = [f"{row[key]:.1%}" for key in ("regret", "decided", "wrong though decided",
                                                        "simplest that is as good")]
                print(f"{truth:<16} {name:<20} {shares[0]:>13} {shares[1]:>8} {shares[2]:>13} {shares[3]:>9} "
                      f"{row['trainings']:>10.1f} {row['trainings without racing']:>10.1f}", flush=True)
        print(f"\nnoise {noise}: verdicts against the baseline (margin {MARGIN:.0%}, gains in mIoU)")
        print(f"{'arm':<28} {'seeds':>5} " + " ".join(f"{word:>9}" for word in (*TRUE, "wrong")))
        for seeds in (1, 2, 3, 5, 10, 20):
            table = told["verdicts"][f"{noise} / {seeds}"] = verdicts(max(1, options.sweeps // 2), noise, seeds)
            for kind, row in table.items():
                print(f"{kind:<28} {seeds:>5} " + " ".join(
                    f"{row[word]:>9.1%}" if word in row else f"{'':>9}" for word in (*TRUE, "wrong")), flush=True)
    if options.json:
        options.json.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
