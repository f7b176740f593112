"""Figures of finished or running runs, drawn without a screen."""

import gc
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import hsv_to_rgb, to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from qscore.closed_form import Comparison
from qscore.panel import Method, Panel, Task

SHOWN = 1000
"""Points per seed in a scatter plot."""

SHOWN_ROWS = 200
"""Points per seed, at most twice that, in a figure of training metrics."""

COLORS = (
    *("#3b7dd8", "#e07b1a", "#2a9d5c", "#b455c9", "#d6453d"),
    *("#1f9fb4", "#a0782c", "#d1639b", "#6f8f1f", "#7d7f87"),
)
"""Of methods, told apart on white and on black, and by most who see few colours."""

OTHERS = 5
"""Seeds of each method, at most, in the background of a picture of one seed."""


def color(panel: Panel, name: str) -> str:
    """The colour of a method, the same in every figure of a panel, and no other method's."""
    index = panel.names.index(name)
    if index < len(COLORS):
        return COLORS[index]
    # golden steps around the circle of hues, darker on each turn of as many
    turn, step = divmod(index, len(COLORS))
    red, green, blue = hsv_to_rgb((0.618034 * step % 1.0, 0.75, 0.6 + 0.3 / turn))
    return to_hex((red, green, blue))


def plot_returns(panel: Panel, out: Path) -> None:
    """Learning curves, one axes per task, written to a file.

    Raises `ValueError` for a file type that Matplotlib does not write.
    """
    rows = -(-len(panel.tasks) // 2)
    columns = min(2, len(panel.tasks))
    figure = Figure(figsize=(7 if columns == 1 else 10, 4.2 * rows), layout="constrained", dpi=150)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, task in zip(grid, panel.tasks, strict=False):
        draw_returns(axes, panel, task, "env_steps")
        axes.set_title(task.name, fontsize=10, parse_math=False)
        axes.legend(frameon=False)
    for axes in grid[len(panel.tasks) :]:
        axes.set_axis_off()
    figure.suptitle(
        "each seed (thin), interquartile mean (thick), 95% bootstrap interval", fontsize=9
    )
    _save(figure, out)


def draw_returns(axes: Axes, panel: Panel, task: Task, axis: str) -> None:
    """Every seed as a thin line, the interquartile mean over seeds as a thick one, its 95% band.

    Where seeds have reached different steps, the thick line goes as far as all of them.
    """
    for method in task.methods:
        shade = color(panel, method.name)
        for seed in method.seeds.values():
            x = [row[axis] for row in seed.evals.values()]
            y = [seed.mean_return(step) for step in seed.evals]
            axes.plot(x, y, color=shade, alpha=0.35, linewidth=0.9)
        curve, count = method.curve(axis), len(method.seeds)
        label = f"{method.name} ({count} seed{'s' if count > 1 else ''})"
        axes.plot(curve.x, curve.middle, color=shade, linewidth=2.2, label=label)
        axes.fill_between(curve.x, curve.low, curve.high, color=shade, alpha=0.18, linewidth=0)
    axes.set_xlabel(task.counted if axis == "env_steps" else "wall clock, seconds")
    axes.set_ylabel("return per episode")
    _plain(axes)


def figure_returns(panel: Panel, task: Task, axis: str) -> Figure:
    """`draw_returns` for a page, which has a legend of its own."""
    figure = Figure(figsize=(5.2, 3.3), layout="constrained")
    draw_returns(figure.subplots(), panel, task, axis)
    return figure


def figure_intervals(
    panel: Panel, figures: dict[str, tuple[float, tuple[float, float]]], label: str
) -> Figure:
    """One row per method, best first: interquartile mean and 95% interval."""
    figure = Figure(figsize=(5.2, 0.7 + 0.44 * len(figures)), layout="constrained")
    axes = figure.subplots()
    left = axes.get_yaxis_transform()  # names of any length stand above their bars
    for row, (name, (middle, (low, high))) in enumerate(figures.items()):
        shade = color(panel, name)
        axes.plot(
            [low, high], [row, row], color=shade, linewidth=7, alpha=0.35, solid_capstyle="butt"
        )
        axes.plot([middle], [row], "|", color=shade, markersize=14, markeredgewidth=2.5)
        axes.text(0.01, row - 0.22, name, transform=left, fontsize=8, va="bottom", parse_math=False)
    axes.set_yticks([])
    axes.set_ylim(len(figures) - 0.6, -0.8)
    axes.set_xlabel(label)
    _plain(axes, thousands=False)
    return figure


def figure_seed(panel: Panel, task: Task, method: Method, seed: int) -> Figure:
    """One seed's learning curve, with some of the task's others in grey."""
    figure = Figure(figsize=(2.4, 1.5), layout="constrained")
    axes = figure.subplots()
    for each in task.methods:
        for other in list(each.seeds.values())[:OTHERS]:
            y = [other.mean_return(step) for step in other.evals]
            axes.plot(list(other.evals), y, color="#888888", alpha=0.25, linewidth=0.7)
    own = method.seeds[seed]
    y = [own.mean_return(step) for step in own.evals]
    axes.plot(list(own.evals), y, color=color(panel, method.name), linewidth=1.8)
    _plain(axes)
    axes.tick_params(labelsize=7)
    return figure


def figure_metric(panel: Panel, task: Task, metric: str, *, log: bool) -> Figure:
    """A training metric over environment steps, one line per seed that has it."""
    figure = Figure(figsize=(5.2, 2.6), layout="constrained")
    axes = figure.subplots()
    for method in task.methods:
        label = method.name  # of its first line
        for seed in method.seeds.values():
            rows = [row for row in seed.metrics.values() if metric in row]
            rows = rows[:: max(1, len(rows) // SHOWN_ROWS)]
            x, y = [row["env_steps"] for row in rows], [row[metric] for row in rows]
            shade = color(panel, method.name)
            axes.plot(x, y, color=shade, alpha=0.7, linewidth=1.1, label=label)
            label = None
    axes.set_xlabel(task.counted)
    axes.set_ylabel(metric)
    if log and any(value > 0 for line in axes.lines for value in np.asarray(line.get_ydata())):
        axes.set_yscale("log")
    _plain(axes)
    return figure


def _plain(axes: Axes, *, thousands: bool = True) -> None:
    """Few lines; along the horizontal axis 20,000 as 20k."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if thousands:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))


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
