"""Every algorithm on the two benchmark panels, from the papers: dm_control and MuJoCo.

    python experiments/control_panels.py dm_control
    python experiments/control_panels.py mujoco
    python experiments/control_panels.py mujoco --seeds 3 4 --tasks HalfCheetah-v5
    python experiments/control_panels.py mujoco --table          # of what has been run so far
    python experiments/control_panels.py mujoco --quick

Default presets, last checkpoints, 10 episodes per evaluation. Runs are shared among processes as in
all experiments: start one per core. The results hold every run that has ended by then, and name
those that have not: `missing`. Hours of training are not lost with the folder they were done in:
settings, evaluations and summary of every finished run are kept beside the JSON file, and a run
that is there is not trained again. They are run folders, `qscore report` takes them. *Early* is the
mean return of the evaluations in the first fifth of training, which the CQSM paper is about.

Over several tasks returns are normalised as in a report: on each task 0 is the lowest interquartile
mean of any algorithm at any evaluation, and 1 the highest at the end. Of the algorithms that were
run on every task, those figures are interquartile means over all tasks and seeds, with stratified
bootstrap intervals, and the best is held against each of the others. They are rliable's: the extra
`stats`.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from common import (
    Job,
    arguments,
    curves,
    figures,
    finished,
    keep,
    missing,
    panel,
    places,
    records_of,
    save,
    train,
)

import qscore as qs
from qscore.panel import EARLY, Method, Panel, Task
from qscore.statistics import (
    aggregate,
    chance,
    interquartile_mean,
    probability_of_improvement,
    ranked,
    require_rliable,
)

SEEDS = [0, 1, 2]
"""Unless others are asked for."""

PANELS: dict[str, tuple[dict[str, int], tuple[str, ...]]] = {
    # panel: (steps of every task, algorithms)
    "dm_control": (
        {
            "dm_control/cartpole-swingup-v0": 40_000,
            "dm_control/reacher-easy-v0": 40_000,
            "dm_control/cheetah-run-v0": 40_000,
            "dm_control/walker-walk-v0": 40_000,
            "dm_control/hopper-stand-v0": 40_000,
        },
        ("qsm", "diffusion_ql", "sac", "td3", "cqsm"),
    ),
    "mujoco": (
        {
            "HalfCheetah-v5": 100_000,
            "Hopper-v5": 100_000,
            "Walker2d-v5": 100_000,
            "Swimmer-v5": 100_000,
        },
        ("cqsm", "qsm", "sac", "td3", "diffusion_ql"),
    ),
}


def jobs(name: str, args: argparse.Namespace) -> list[Job]:
    """Every run that is asked for: whole rounds of a seed, so that an early end leaves few gaps."""
    tasks, algorithms = PANELS[name]
    fields: dict[str, Any] = {}
    if args.quick:
        fields = {"hidden": (32, 32), "batch_size": 64, "warmup_steps": 500}
    found = []
    for seed in args.seeds:
        for task in args.tasks or tasks:
            steps = 1_000 if args.quick else tasks[task]
            for algorithm in args.algorithms or algorithms:
                found.append(
                    Job(
                        f"{task.replace('/', '-')}/{algorithm}",
                        qs.ALGORITHMS[algorithm](**fields),
                        qs.Host(task),
                        steps,
                        seed,
                        steps // (5 if args.quick else 20),
                        1 if args.quick else 10,
                    )
                )
    return found


def everything(name: str, asked: list[Job], *folders: Path) -> list[Job]:
    """Every run that the results hold or miss: of the whole panel, and what was asked for beyond.

    An asked part of the panel leaves what is in the folders of the rest in the results.
    """
    plain = argparse.Namespace(tasks=None, algorithms=None, quick=False)
    there = [path for folder in folders for path in folder.glob("*/*/seed-*[0-9]")]
    known = {int(path.name.removeprefix("seed-")) for path in there}
    plain.seeds = sorted(known.union(SEEDS, (job.seed for job in asked)))
    return [
        job
        for job in jobs(name, plain)
        if job.seed in SEEDS or job in asked or any(job.folder(f).is_dir() for f in folders)
    ]


def early_returns(task: Task, method: Method) -> list[float]:
    """The mean return of every seed over the first fifth of training."""
    early = task.mean_over(method, EARLY)
    assert early is not None  # every run is evaluated twenty times
    return early


def row(task: Task, method: Method) -> dict[str, Any]:
    """The figures of one method on one task."""
    early = early_returns(task, method)
    return figures(task, method) | {
        "early": {str(s): round(v, 2) for s, v in zip(method.seeds, early, strict=True)},
        "early_iqm": round(interquartile_mean(early), 2),
    }


def by_task(found: Panel) -> dict[str, Any]:
    """The figures of every method on each task."""
    return {
        task.name: {method.name: row(task, method) for method in task.methods}
        for task in found.tasks
    }


def overall(found: Panel) -> dict[str, Any]:
    """The figures over all tasks of the algorithms that were run on each, the best first.

    None where one of them has a single seed on a task, which tells nothing of others.
    """
    ends, early = found.scores(Task.last_returns), found.scores(early_returns)
    if any(len(seeds) < 2 for tasks in ends.values() for seeds in tasks):
        return {}
    ranking = ranked(ends)
    best = next(iter(ranking), "")
    rows = {}
    for name, (middle, interval) in ranking.items():
        first, first_interval = aggregate(early[name])
        rows[name] = {
            "iqm": round(middle, 3),
            "ci95": np.round(interval, 3).tolist(),
            "early_iqm": round(first, 3),
            "early_ci95": np.round(first_interval, 3).tolist(),
        }
        if name != best:
            better, _ = probability_of_improvement(ends[best], ends[name])
            rows[name] |= {
                "best_is_better": round(better, 3),
                "by_chance": round(chance(ends[best], ends[name]), 3),
            }
    return rows


def overall_table(rows: dict[str, Any]) -> str:
    """`overall`, as Markdown."""
    best = next(iter(rows))
    lines = [
        "| algorithm | normalised return | 95% | early | 95% "
        f"| a seed of {best} is better | as clearly by chance |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, each in rows.items():
        figures = []
        for figure, interval in (("iqm", "ci95"), ("early_iqm", "early_ci95")):
            low, high = each[interval]
            figures += [f"{each[figure]:.2f}", f"{low:.2f} to {high:.2f}"]
        against = ["", ""]
        if name != best:
            against = [f"{each['best_is_better']:.0%}", f"{each['by_chance']:.1%}"]
        lines.append("| " + " | ".join([name, *figures, *against]) + " |")
    return "\n".join(lines)


def table(results: dict[str, Any]) -> str:
    """Every seed and the interquartile means, as Markdown."""
    lines = [
        "| task | algorithm | last return of each seed | interquartile mean | 95% | early |",
        "|---|---|---|---|---|---|",
    ]
    for task, rows in results.items():
        for name, each in rows.items():
            cells = ", ".join(f"{value:.0f}" for value in each["returns"].values())
            interval = "{:.0f} to {:.0f}".format(*each["ci95"]) if len(each["returns"]) > 1 else ""
            lines.append(
                f"| `{task}` | {name} | {cells} | {each['iqm']:.0f} | {interval} | "
                f"{each['early_iqm']:.0f} |"
            )
    return "\n".join(lines)


def contents(found: Panel) -> dict[str, Any]:
    """What the JSON file says of the runs, all of it computed from their evaluations."""
    return {
        "steps": {task.name: task.final_step for task in found.tasks},
        "overall": overall(found) if len(found.tasks) > 1 else {},
        "tasks": by_task(found),
    }


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__, "")
    parser.add_argument("panel", choices=list(PANELS))
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--tasks", nargs="+")
    parser.add_argument("--algorithms", nargs="+", choices=list(qs.ALGORITHMS))
    parser.add_argument("--table", action="store_true", help="train nothing")
    args = parser.parse_args(argv)
    try:
        require_rliable()
    except ImportError as error:  # now, and not after hours of training
        parser.error(str(error))
    args.name = f"panel_{args.panel}"
    tasks, _ = PANELS[args.panel]
    if unknown := set(args.tasks or ()) - set(tasks):
        parser.error(f"no task {sorted(unknown)[0]!r} in {args.panel}: {', '.join(tasks)}")
    if args.quick:
        args.tasks = args.tasks or list(tasks)[:1]
    args.seeds = args.seeds or ([0] if args.quick else SEEDS)
    runs, out = places(args)
    records = records_of(out)
    asked = jobs(args.panel, args)
    if not args.table:
        train([job for job in asked if not finished(job, records)], runs)
    whole = asked if args.quick else everything(args.panel, asked, runs, records)
    keep(whole, runs, records)
    unfinished = missing(whole, records)
    if len(unfinished) == len(whole):
        parser.error(f"no run in {runs} has finished")
    found = panel(whole, records)
    results = contents(found)
    print(table(results["tasks"]))
    if results["overall"]:
        print(f"\n{overall_table(results['overall'])}")
    save(args, {"missing": unfinished} | results, curves(found))


if __name__ == "__main__":
    main()
