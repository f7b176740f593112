"""The interquartile mean and its interval, against values worked out by hand."""

import numpy as np
from helpers import assert_close

from qscore.statistics import bootstrap_interval, interquartile_mean, summarize


def test_interquartile_mean_is_the_mean_of_the_middle_half():
    values = [100.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, -100.0]
    assert interquartile_mean(values) == np.mean([2.0, 3.0, 4.0, 5.0])
    assert interquartile_mean([1.0, 5.0, 9.0]) == 5.0  # no whole value is a quarter of three


def test_interval_covers_the_truth_as_often_as_it_says():
    # 95% in the limit of many values; percentile intervals of 20 are a few percent too narrow
    draws = np.random.default_rng(1).normal(size=(200, 20))
    hits = [low <= 0.0 <= high for low, high in map(bootstrap_interval, draws.tolist())]
    assert 0.85 < np.mean(hits) < 0.99


def test_interval_is_the_same_every_time_and_shrinks_to_a_point():
    values = [3.0, 1.0, 4.0, 1.5, 9.0]
    assert bootstrap_interval(values) == bootstrap_interval(values)
    assert bootstrap_interval([2.0]) == bootstrap_interval([2.0, 2.0]) == (2.0, 2.0)


def test_several_seeds_are_summarized_over_seeds_and_one_over_its_episodes():
    several = summarize([[0.0, 2.0], [4.0, 4.0], [10.0, 12.0]])
    assert_close(several["iqm"], np.mean([1.0, 4.0, 11.0]))
    assert several["ci95_over"] == "seeds" and several["ci95"] == [1.0, 11.0]
    one = summarize([[0.0, 2.0, 4.0, 100.0]])
    assert one["ci95_over"] == "episodes" and one["iqm"] == 3.0
