"""CQSM against the closed form over training, with its critics and test functions compared.

    python experiments/lq_panel.py             # about ten minutes of one core
    python experiments/lq_panel.py --quick

The environment `lq` with its own problem, the preset `linear_quadratic`, critics of quadratic
features and of networks, and for both the two test functions: `gradient` (of Q in its parameters)
and `weighted` (the same over the increment's variance). Errors are relative L2 errors against the
closed form over standard normal states and actions, as in `summary.json` of a run on `lq`; the
return gap is what the learned score earns less than the optimal one, relative to that.

Errors against the control step, and with steps of random length, are `dt_robustness.py`. Runs that
are in the file already are not repeated.
"""

import functools
import statistics
from typing import Any

from common import arguments, learn_missing, save
from matplotlib.figure import Figure

import qscore as qs
from qscore.closed_form import compare, return_gap
from qscore.environments import LQ
from qscore.train_host import Session, chunk_steps

FIGURES = ("q", "grad_a_q", "score", "return_gap")
TITLES = {"q": "Q", "grad_a_q": "action gradient of Q", "score": "score", "return_gap": "return"}


def variants(quick: bool) -> dict[str, Any]:
    """Critic and test function; quick ones with fewer parameters."""
    small: dict[str, Any] = {"hidden": (16, 16), "batch_size": 64} if quick else {}
    return {
        f"{critic}, {test}": qs.CQSM(
            preset="linear_quadratic",
            critic=critic,
            test_function=test,
            **(small if critic == "network" else {}),
        )
        for critic in ("features", "network")
        for test in (("weighted",) if quick else ("gradient", "weighted"))
    }


def learn(algorithm: Any, seed: int, marks: list[int]) -> dict[str, dict[str, float]]:
    """The errors after each number of environment steps of one run."""
    environment = LQ("lq")
    session = Session(algorithm, environment, seed, steps=marks[-1], eval_episodes=0)
    errors = {}
    for mark in marks:
        while session.env_steps < mark:
            session.advance(mark)
        arguments = (algorithm, environment, session.runner.agent)
        row = {**compare(*arguments).relative_error, "return_gap": return_gap(*arguments)}
        errors[str(mark)] = {name: float(f"{row[name]:.4g}") for name in FIGURES}
    session.close()
    return errors


def picture(results: dict[str, Any], seconds_per_step: float) -> Figure:
    """Errors over experience: every seed and their median."""
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(FIGURES)), FIGURES, strict=True):
        for index, (variant, seeds) in enumerate(results.items()):
            curves = [
                [100 * abs(row[name]) for row in errors.values()] for errors in seeds.values()
            ]
            x = [int(mark) * seconds_per_step for mark in next(iter(seeds.values()))]
            for curve in curves:
                axes.plot(x, curve, color=f"C{index}", alpha=0.3, linewidth=0.9)
            middle = [statistics.median(values) for values in zip(*curves, strict=True)]
            axes.plot(x, middle, color=f"C{index}", linewidth=2, label=variant)
        axes.set(yscale="log", xscale="log", title=TITLES[name], xlabel="experience, s")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.axes[0].set_ylabel("relative error, %")
    figure.axes[-1].legend(frameon=False, fontsize=8)
    return figure


def table(results: dict[str, Any]) -> str:
    """The last errors of every seed, as Markdown."""
    lines = ["| critic, test function | Q | gradient | score | return |", "|---|---|---|---|---|"]
    for variant, seeds in results.items():
        last = [list(errors.values())[-1] for errors in seeds.values()]
        cells = [", ".join(f"{row[name]:.2%}" for row in last) for name in FIGURES]
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__, "lq_panel").parse_args(argv)
    chunks = [4] if args.quick else [2, 5, 10, 20, 50, 100, 200, 400]
    chunk, seeds = chunk_steps(LQ("lq")), 1 if args.quick else 3
    marks = [chunk * each for each in chunks]
    wanted = {
        (variant, str(seed)): functools.partial(learn, algorithm, seed, marks)
        for variant, algorithm in variants(args.quick).items()
        for seed in range(seeds)
    }
    found = learn_missing(args, wanted, steps=marks[-1])
    print(table(found["algorithms"]))
    save(args, found, picture(found["algorithms"], LQ("lq").dt))


if __name__ == "__main__":
    main()
