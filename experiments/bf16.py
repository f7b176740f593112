"""Whether QSM learns as well where its matrix products multiply bfloat16 numbers.

    python experiments/bf16.py             # about 40 minutes of one core
    python experiments/bf16.py --quick

QSM with its default preset on two tasks, with `--precision f32` and `--precision bf16`. Only the
products of an update differ: acting, parameters, sums and losses are float32 in both.
"""

from typing import Any

from common import Job, arguments, curves, figures, missing, panel, places, save, train

import qscore as qs
from qscore.products import Precision

TASKS = {"Pendulum-v1": 10_000, "HalfCheetah-v5": 30_000}
PRECISIONS: tuple[Precision, ...] = ("f32", "bf16")


def jobs(quick: bool) -> list[Job]:
    """Every run, whole rounds of a seed."""
    tasks, fields = TASKS, {}
    if quick:
        tasks = {"Pendulum-v1": 600}
        fields = {"hidden": (32, 32), "batch_size": 64, "warmup_steps": 300, "noise_levels": 2}
    return [
        Job(
            f"{task}/{precision}",
            qs.QSM(**fields),
            qs.Host(task),
            steps,
            seed,
            steps // 10,
            1 if quick else 10,
            precision=precision,
        )
        for task, steps in tasks.items()
        for seed in range(1 if quick else 5)
        for precision in PRECISIONS
    ]


def table(results: dict[str, Any]) -> str:
    """Every seed and the interquartile means, as Markdown."""
    lines = [
        "| task | products of | last return of each seed | interquartile mean | 95% |",
        "|---|---|---|---|---|",
    ]
    for task, rows in results.items():
        for precision, each in rows.items():
            cells = ", ".join(f"{value:.5g}" for value in each["returns"].values())
            low, high = each["ci95"]
            lines.append(
                f"| `{task}` | `{precision}` | {cells} | {each['iqm']:.5g} | "
                f"{low:.5g} to {high:.5g} |"
            )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__, "bf16").parse_args(argv)
    runs, _ = places(args)
    todo = jobs(args.quick)
    if not train(todo, runs):
        print("other processes are still at some of the runs; they will write the results")
        return
    found = panel(todo, runs)
    results = {
        task.name: {
            method.runs[0].settings.precision: figures(task, method) for method in task.methods
        }
        for task in found.tasks
    }
    print(table(results))
    steps = {task.name: task.final_step for task in found.tasks}
    save(args, {"missing": missing(todo, runs), "steps": steps, "tasks": results}, curves(found))


if __name__ == "__main__":
    main()
