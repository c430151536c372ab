"""Which of the parameters that a sweep searched mattered for its objective, as far as that stands out from chance."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from autoenc.sweep.evidence import DOUBT
from autoenc.sweep.race import Race
from autoenc.sweep.search import parameters_of, quiet_optuna
from autoenc.sweep.space import draw_point

if TYPE_CHECKING:
    from optuna import Study

FEWEST = 8               # completed points below which nothing is said
GOOD = 8                 # points that are to count as good ones, at least
ROUNDS = 199             # of shuffled scores


def importances(race: Race) -> dict[str, float] | None:
    """Every searched parameter's share in what sets good points apart from all, the largest first; they add up to 1.

    By PED-ANOVA (Watanabe, Bansal & Hutter 2023, arXiv:2304.10255) over the first seeds of the candidates that
    completed and lie in the space: by how much the distribution of a parameter among the best tenth (among the best
    eight where those are more, half of them at most) differs from that among all. By itself that finds importance in
    every noise, the more the rarer a condition lets a parameter exist; so what shuffled scores give is taken off, and a
    parameter that does not stand out from them (95% confidence, corrected for the number of parameters) counts 0. None
    where none does, or fewer than 8 points completed. Below some thirty points even a strong effect may go unseen; and
    since TPE draws more where it was lucky, one in ten of its searches finds importance where nothing matters.
    """
    study = _study_of_points(race)
    scores = [trial.value for trial in study.get_trials(deepcopy=False)]
    if len(scores) < FEWEST or len(set(scores)) == 1:
        return None
    if race.spec.objective.direction == "max":
        scores = [-score for score in scores]
    draw = random.Random(race.spec.search.seed)
    found = _divergences(study, race, scores)
    chance = [_divergences(study, race, draw.sample(scores, len(scores))) for _ in range(ROUNDS)]
    shares = {}
    for key, value in found.items():
        usual = [other[key] for other in chance]
        likely = (1 + sum(other >= value for other in usual)) / (1 + ROUNDS)
        shares[key] = max(0.0, value - fmean(usual)) if likely <= max(DOUBT / len(found), 1 / (1 + ROUNDS)) else 0.0
    whole = sum(shares.values())
    return {key: share / whole for key, share in sorted(shares.items(), key=lambda item: -item[1])} if whole else None


def _study_of_points(race: Race) -> Study:
    optuna = quiet_optuna()
    study = optuna.create_study()
    for trial in race.trials:
        score = race.score(trial.run)
        first = trial.seed == trial.candidate.config.train.seed
        if not first or trial.run.state != "completed" or not math.isfinite(score):
            continue
        parameters = parameters_of(race.spec.space, race.start, trial.candidate)
        if parameters:
            fixed = optuna.trial.FixedTrial(parameters)
            draw_point(fixed, race.spec.space, race.start)
            study.add_trial(optuna.trial.create_trial(value=score, params=parameters,
                                                      distributions=fixed.distributions))
    return study


def _divergences(study: Study, race: Race, scores: Sequence[float]) -> dict[str, float]:
    """Of every parameter between the points with the lowest scores and all; whether a weight is exactly 0 counts for
    that weight."""
    import optuna

    evaluator = optuna.importance.PedAnovaImportanceEvaluator(
        target_quantile=min(0.5, max(0.1, GOOD / len(scores))))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                          # that it minimises; that few points are many alike
        found = evaluator.evaluate(study, target=lambda trial: scores[trial.number])
    sums = {key: [found[name] for name in parameter.names(key) if name in found]
            for key, parameter in race.spec.space.items()}
    return {key: sum(parts) for key, parts in sums.items() if parts}
