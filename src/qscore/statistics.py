"""The statistics of returns: interquartile means, intervals, and how sure a difference is.

Over several tasks they are those of rliable (Agarwal et al. 2021, arXiv:2108.13264), which comes
with the extra `stats`. It and SciPy are imported where they are used, for they take a second and
most commands need neither.
"""

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from qscore.errors import how_to_install

Scores = Sequence[Sequence[float]]
"""Scores of one method: for each task, one of every seed."""

Interval = tuple[float, tuple[float, float]]
"""A figure and its 95% interval."""

RESAMPLES = 2000
"""Of a bootstrap."""

RELABELLINGS = 20_000
"""Of a permutation test."""


def interquartile_mean(values: Sequence[float]) -> float:
    """The mean of the middle half (Agarwal et al. 2021): a quarter trimmed from either end."""
    from scipy.stats import trim_mean

    return float(trim_mean(values, 0.25))


def bootstrap_interval(
    values: Sequence[float], *, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """95% percentile-bootstrap interval of the interquartile mean; the same numbers every time.

    One value, or equal ones, have an interval of no width.
    """
    from scipy.stats import trim_mean

    draws = np.random.default_rng(0).choice(np.asarray(values, float), (resamples, len(values)))
    low, high = np.percentile(trim_mean(draws, 0.25, axis=1), [2.5, 97.5])
    return float(low), float(high)


def summarize(per_seed: Sequence[Sequence[float]]) -> dict[str, object]:
    """`iqm`, `ci95` and `ci95_over` of episode returns, one sequence per training seed.

    With several seeds the figures are over the seeds' mean returns, the unit that repeats when the
    training is repeated. With one seed they can only be over its episodes, and say so.
    """
    means = [float(np.mean(returns)) for returns in per_seed]
    values = means if len(means) > 1 else list(per_seed[0])
    return {
        "iqm": interquartile_mean(values),
        "ci95": list(bootstrap_interval(values)),
        "ci95_over": "seeds" if len(means) > 1 else "episodes",
    }


def require_rliable() -> None:
    """Raises `ImportError` that says how to install rliable, where it is not."""
    if importlib.util.find_spec("rliable") is None:
        raise ImportError(f"this needs the package rliable: {how_to_install('stats')}")


def aggregate(scores: Scores) -> Interval:
    """The interquartile mean over all tasks and seeds, and its 95% bootstrap interval.

    The bootstrap is stratified: it draws seeds anew within each task. Tasks may have different
    numbers of seeds, and count alike all the same.
    """
    require_rliable()
    from rliable.metrics import aggregate_iqm

    common = math.lcm(*map(len, scores))

    def figure(*tasks: np.ndarray) -> float:
        return aggregate_iqm(np.concatenate([np.repeat(x, common // len(x)) for x in tasks]))

    return _bootstrapped(figure, scores)


def ranked(scores: Mapping[str, Scores]) -> dict[str, Interval]:
    """`aggregate` of every method, the best first."""
    figures = {name: aggregate(tasks) for name, tasks in scores.items()}
    return dict(sorted(figures.items(), key=lambda item: -item[1][0]))


def probability_of_improvement(scores: Scores, others: Scores) -> Interval:
    """How likely a seed of `scores` beats one of `others`, averaged over tasks.

    Returns the figure and its 95% bootstrap interval; ties count as a half.
    """
    require_rliable()
    tasks = len(scores)

    # rliable's own figure is a Mann-Whitney test each time: seconds, where it is drawn 2000 times
    def better(one: np.ndarray, other: np.ndarray) -> float:
        return float(np.mean((one > other.T) + 0.5 * (one == other.T)))

    def probability(*columns: np.ndarray) -> float:
        return float(np.mean(list(map(better, columns[:tasks], columns[tasks:]))))

    return _bootstrapped(probability, [*scores, *others])


def chance(scores: Scores, others: Scores) -> float:
    """How often a method as good as `others` would come out ahead of it, or behind, as clearly.

    Twice the share of random relabellings of the seeds within each task under which the probability
    of improvement is at least what it is (at most 1; near 1 where `scores` are not ahead at all).
    Unlike a bootstrap, it knows that three seeds against three can say little.
    """
    from scipy.stats import rankdata

    generator = np.random.default_rng(0)
    seen, shuffled = 0.0, np.zeros(RELABELLINGS)
    for one, other in zip(scores, others, strict=True):
        # the Mann-Whitney statistic, from ranks that ties share
        ranks = np.tile(rankdata([*one, *other]), (RELABELLINGS, 1))
        scale = len(scores) * len(one) * len(other)
        seen += ranks[0, : len(one)].sum() / scale
        shuffled += generator.permuted(ranks, axis=1)[:, : len(one)].sum(axis=1) / scale
    drawn = min(1.0, 2.0 * float(np.mean(shuffled >= seen - 1e-9)))
    return max(drawn, least_chance(scores, others))  # which a share of draws can lie below


def least_chance(scores: Scores, others: Scores) -> float:
    """What `chance` is at least with these numbers of seeds, however far ahead `scores` are."""
    orders = [
        math.comb(len(one) + len(other), len(one))
        for one, other in zip(scores, others, strict=True)
    ]
    return min(1.0, 2.0 / math.prod(orders))


def _bootstrapped(statistic: Callable[..., float], columns: Scores) -> Interval:
    """A statistic of independent columns and its 95% bootstrap interval; the same every time."""
    from rliable.library import get_interval_estimates

    arrays = [np.asarray(column, float)[:, None] for column in columns]

    def function(*arrays: Any) -> np.ndarray:
        return np.array([statistic(*arrays)])

    # rliable draws from NumPy's global state, whatever generator it is given
    state = np.random.get_state()  # noqa: NPY002
    np.random.seed(0)  # noqa: NPY002
    try:
        points, intervals = get_interval_estimates({"": arrays}, function, reps=RESAMPLES)
    finally:
        np.random.set_state(state)  # noqa: NPY002
    low, high = intervals[""][:, 0]
    return float(points[""][0]), (float(low), float(high))
