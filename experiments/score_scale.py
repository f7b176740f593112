"""How much the scale of QSM's score matters, for its three regression targets.

    python experiments/score_scale.py             # hours; see below for several processes
    python experiments/score_scale.py --quick

The `gradient` target is the paper's, and its scale M_q (`score_scale`) is a setting per task. The
targets `normalized` and `posterior` divide by a temperature instead, in units of the critic's own
gradient. Each is trained at a ninth, a third, one, three and nine times its default scale (M_q or
one over the temperature) on four tasks; all else is as the default preset has it, but for a random
warm-up of 1,000 steps. A curve is flat where the setting does not matter. Last checkpoints; every
seed.
"""

from typing import Any, Literal, get_args

from common import Job, arguments, figures, missing, panel, places, save, train
from matplotlib.figure import Figure

import qscore as qs
from qscore.environments import DoubleWell

Target = Literal["gradient", "normalized", "posterior"]
TARGETS: tuple[Target, ...] = get_args(Target)
FACTORS = (1 / 9, 1 / 3, 1.0, 3.0, 9.0)
TASKS: dict[str, tuple[Any, int]] = {
    "Pendulum-v1": (qs.Host("Pendulum-v1"), 10_000),
    "InvertedPendulum-v5": (qs.Host("InvertedPendulum-v5"), 10_000),
    "double_well": (DoubleWell("double_well"), 10_000),
    "HalfCheetah-v5": (qs.Host("HalfCheetah-v5"), 20_000),
}


def algorithm(target: Target, factor: float, **fields: Any) -> qs.QSM:
    """The default preset with another target and scale."""
    usual = qs.QSM()
    if target == "gradient":
        return qs.QSM(target=target, score_scale=usual.score_scale * factor, **fields)
    return qs.QSM(target=target, temperature=usual.temperature / factor, **fields)


def jobs(quick: bool) -> dict[tuple[str, str, float], list[Job]]:
    """Every run, by task, target and factor."""
    fields: dict[str, Any] = {"warmup_steps": 1_000}
    if quick:
        fields = {"warmup_steps": 300, "hidden": (32, 32), "batch_size": 64, "noise_levels": 2}
    found: dict[tuple[str, str, float], list[Job]] = {}
    for task, (environment, steps) in TASKS.items():
        if quick:
            if task != "Pendulum-v1":
                continue
            steps = 600
        for target in TARGETS[:2] if quick else TARGETS:
            for factor in FACTORS[1:2] if quick else FACTORS:
                for seed in range(1 if quick else 3):
                    job = Job(
                        f"{task}/{target}-{factor:.3g}",
                        algorithm(target, factor, **fields),
                        environment,
                        steps,
                        seed,
                        steps // 5,
                        1 if quick else 10,
                    )
                    found.setdefault((task, target, factor), []).append(job)
    return found


def picture(results: dict[str, Any]) -> Figure:
    """One axes per task: return against the scale, a line per target, every seed a dot."""
    figure = Figure(figsize=(3.2 * max(2, len(results)), 3.2), layout="constrained")
    for axes, (task, targets) in zip(
        figure.subplots(1, len(results), squeeze=False)[0], results.items(), strict=True
    ):
        for index, (target, rows) in enumerate(targets.items()):
            x = [row["factor"] for row in rows]
            axes.plot(x, [row["iqm"] for row in rows], color=f"C{index}", label=target)
            for row in rows:
                values = list(row["returns"].values())
                axes.plot([row["factor"]] * len(values), values, ".", color=f"C{index}", alpha=0.4)
        axes.set(xscale="log", title=task, xlabel="scale, times the default")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.axes[0].set_ylabel("last return")
    figure.axes[0].legend(frameon=False)
    return figure


def table(results: dict[str, Any]) -> str:
    """Interquartile means, as Markdown."""
    all_rows = [row for targets in results.values() for rows in targets.values() for row in rows]
    factors = sorted({row["factor"] for row in all_rows})
    lines = [f"| task | target | {' | '.join(f'{factor:.3g}' for factor in factors)} |"]
    lines.append("|---|---|" + "---|" * len(factors))
    for task, targets in results.items():
        for target, rows in targets.items():
            known = {row["factor"]: f"{row['iqm']:.4g}" for row in rows}
            cells = [known.get(factor, "-") for factor in factors]
            lines.append(f"| `{task}` | `{target}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__, "score_scale").parse_args(argv)
    runs, _ = places(args)
    todo = jobs(args.quick)
    every = [job for each in todo.values() for job in each]
    if not train(every, runs):
        print("other processes are still at some of the runs; they will write the results")
        return
    results: dict[str, Any] = {}
    for (task, target, factor), each in todo.items():
        if len(missing(each, runs)) == len(each):
            continue
        (found,) = panel(each, runs).tasks
        (method,) = found.methods
        row = {"factor": round(factor, 4), "steps": found.final_step} | figures(found, method)
        results.setdefault(task, {}).setdefault(target, []).append(row)
    print(table(results))
    save(args, {"missing": missing(every, runs), "tasks": results}, picture(results))


if __name__ == "__main__":
    main()
