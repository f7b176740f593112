"""Figures of finished or running runs, drawn without a screen."""

import gc
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from qscore.closed_form import Comparison
from qscore.statistics import bootstrap_interval, interquartile_mean

SHOWN = 1000
"""Points per seed in a scatter plot."""

Curves = dict[int, dict[int, list[float]]]
"""Episode returns by environment steps, by seed."""


def read_evals(run: Path) -> Curves:
    """The evaluations of a run folder: seed -> environment steps -> returns."""
    curves: Curves = defaultdict(dict)
    path = run / "evals.jsonl"
    for line in path.read_text().splitlines() if path.is_file() else []:
        row = json.loads(line)
        curves[row["seed"]][row["env_steps"]] = row["returns"]
    return dict(curves)


def plot_returns(runs: dict[str, Curves], out: Path) -> None:
    """Every seed as a thin line, the interquartile mean over seeds as a thick one, its 95% band.

    `runs` maps a label to a run's evaluations. Where seeds have reached different steps, the
    thick line goes as far as all of them. Raises `ValueError` where there is nothing to draw.
    """
    if not any(runs.values()):
        raise ValueError("no evaluation to plot yet")
    figure = Figure(figsize=(7, 4.2), layout="constrained", dpi=150)
    axes = figure.add_subplot()
    for index, (label, curves) in enumerate(runs.items()):
        color = f"C{index}"
        means = {
            seed: {step: float(np.mean(returns)) for step, returns in curve.items()}
            for seed, curve in curves.items()
        }
        for curve in means.values():
            axes.plot(list(curve), list(curve.values()), color=color, alpha=0.35, linewidth=0.9)
        common = sorted(set.intersection(*(set(curve) for curve in means.values())))
        across = [[curve[step] for curve in means.values()] for step in common]
        middle = [interquartile_mean(values) for values in across]
        seeds = f"{len(means)} seed{'s' if len(means) > 1 else ''}"
        axes.plot(common, middle, color=color, linewidth=2.2, label=f"{label} ({seeds})")
        if len(means) > 1:
            bands = np.array([bootstrap_interval(values) for values in across])
            axes.fill_between(
                common, bands[:, 0], bands[:, 1], color=color, alpha=0.18, linewidth=0
            )
    axes.set_xlabel("environment steps")
    axes.set_ylabel("return per episode")
    axes.set_title(
        "each seed (thin), interquartile mean (thick), 95% bootstrap interval", fontsize=9
    )
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    _save(figure, out)


def plot_comparisons(comparisons: dict[int, Comparison], out: Path) -> None:
    """Learned against exact Q, action gradient and score, one colour per seed."""
    names = {"q": "Q", "grad_a_q": "action gradient of Q", "score": "score"}
    figure = Figure(figsize=(10, 3.6), layout="constrained", dpi=150)
    for axes, (name, title) in zip(figure.subplots(1, 3), names.items(), strict=True):
        for index, (seed, comparison) in enumerate(comparisons.items()):
            exact = comparison.exact[name].ravel()[:SHOWN]
            learned = comparison.learned[name].ravel()[:SHOWN]
            error = f"seed {seed}: {comparison.relative_error[name]:.1%}"
            axes.plot(exact, learned, ".", ms=2, alpha=0.4, color=f"C{index}", label=error)
        low, high = axes.get_xlim()
        axes.plot([low, high], [low, high], color="black", linewidth=0.8)
        axes.set(title=title, xlabel="closed form", ylabel="learned")
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=8, markerscale=4)
    figure.suptitle("relative L2 error over standard normal states and actions", fontsize=9)
    _save(figure, out)


def _save(figure: Figure, out: Path) -> None:
    """Write a figure, and free the ones before it."""
    # each is some MB in a cycle of references, which Python would let pile up
    gc.collect()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)
