"""The statistics of returns: interquartile mean and its bootstrap interval."""

from collections.abc import Sequence

import numpy as np
from scipy import stats


def interquartile_mean(values: Sequence[float]) -> float:
    """The mean of the middle half (Agarwal et al. 2021): a quarter trimmed from either end."""
    return float(stats.trim_mean(values, 0.25))


def bootstrap_interval(values: Sequence[float], *, resamples: int = 2000) -> tuple[float, float]:
    """95% percentile-bootstrap interval of the interquartile mean; the same numbers every time.

    One value, or equal ones, have an interval of no width.
    """
    draws = np.random.default_rng(0).choice(np.asarray(values, float), (resamples, len(values)))
    low, high = np.percentile(stats.trim_mean(draws, 0.25, axis=1), [2.5, 97.5])
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
