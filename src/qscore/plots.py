"""Figures of finished or running runs, drawn without a screen."""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from qscore.statistics import bootstrap_interval, interquartile_mean

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
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)
