"""The interquartile mean and its interval, against values worked out by hand."""

import gc

import numpy as np
import pytest
from helpers import assert_close
from matplotlib.figure import Figure

from qscore.plots import plot_returns
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


def test_a_figure_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no evaluation to plot yet"):
        plot_returns({"empty": {}}, tmp_path / "figure.png")
    curves = {0: {10: [1.0, 2.0], 20: [3.0, 4.0]}, 1: {10: [0.0, 1.0]}}  # seeds of unlike length
    plot_returns({"two": curves, "one": {5: {10: [1.0]}}}, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 0


def test_figures_do_not_pile_up(tmp_path):
    # a figure and its canvas hold each other: only the collector of cycles frees them
    def alive():
        return sum(isinstance(each, Figure) for each in gc.get_objects())

    gc.collect()
    before = alive()
    gc.disable()
    try:
        for _ in range(4):
            plot_returns({"run": {0: {10: [1.0]}}}, tmp_path / "figure.png")
        assert alive() - before <= 1
    finally:
        gc.enable()
