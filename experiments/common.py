"""What the experiments share: their runs, and the file that a result is kept in.

Every experiment is a command. It trains what is missing into run folders, and then makes a JSON
file, a picture and a table of them:

    python experiments/NAME.py             # the full settings; results in experiments/results/
    python experiments/NAME.py --quick     # minutes: the same code on less of everything

Runs are ordinary run folders, one per seed, in `--runs`. A finished run is not repeated and one
that was cut short is resumed, so that an experiment goes on where it stopped. Processes may share
the work: start the command once per core, each under `taskset -c CORE`; the one that finishes last
writes the results.
"""

import argparse
import fcntl
import functools
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

import qscore as qs
from qscore.errors import UsageError
from qscore.folder import Run, write_json
from qscore.panel import Method, Panel, Task, arrange
from qscore.plots import draw_returns
from qscore.products import Precision
from qscore.statistics import bootstrap_interval, interquartile_mean

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "experiments" / "results"

COMMITS = ".commits"
"""Ending of the file beside a run that has a line for every start: the commit of the code."""

RECORD = ("config.json", "evals.jsonl", "summary.json")
"""What is kept of a run whose results are: all of its folder that is small. The last ends it."""


@dataclass(frozen=True)
class Job:
    """One training run of one seed."""

    name: str
    """Its folder, under `--runs`; with the seed."""
    algorithm: Any
    environment: Any
    steps: int
    seed: int
    eval_every: int
    eval_episodes: int = 10
    precision: Precision = "f32"

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of its run that are the experiment's choice."""
        return {
            "steps": self.steps,
            "seed_start": self.seed,
            "eval_every": self.eval_every,
            "eval_episodes": self.eval_episodes,
            "precision": self.precision,
        }

    def folder(self, runs: Path) -> Path:
        return runs / self.name / f"seed-{self.seed}"


def arguments(doc: str | None, name: str) -> argparse.ArgumentParser:
    """The options that all experiments have."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="less of everything, in minutes")
    parser.add_argument("--runs", type=Path, help="where the runs are; runs/NAME by default")
    parser.add_argument("--out", type=Path, help="the JSON file; experiments/results by default")
    parser.set_defaults(name=name)
    return parser


def records_of(out: Path) -> Path:
    """The folder beside a JSON file that holds the records of its runs, where they are kept."""
    return out.with_suffix("")


def places(args: argparse.Namespace) -> tuple[Path, Path]:
    """(folder of the runs, JSON file); quick results never lie where the full ones do."""
    name = f"{args.name}-quick" if args.quick else args.name
    runs = args.runs or ROOT / "runs" / name
    if args.quick and args.out is None:
        return runs, runs / f"{args.name}.json"
    return runs, args.out or RESULTS / f"{args.name}.json"


def train(jobs: Sequence[Job], runs: Path) -> bool:
    """Train or resume every job that no other process is at. False while others are at some.

    A run that diverges stays where it stopped, and is named on standard error.
    """
    held = [job for job in jobs if not _attempt(job, runs)]
    # by now they may have ended without a summary: diverged, or killed
    return not [job for job in held if not _attempt(job, runs)]


def _attempt(job: Job, runs: Path) -> bool:
    """Train or resume a job, unless that is done. False where another process is at it."""
    folder = job.folder(runs)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        if not finished(job, runs):
            with open(folder.with_suffix(COMMITS), "a") as file:
                file.write(f"{commit()}\n")
            try:
                _train(job, folder)
            except qs.TrainingDiverged as error:
                print(f"{folder}: {error}", file=sys.stderr)
    return True


def _train(job: Job, folder: Path) -> None:
    if (folder / "config.json").is_file():
        _opened(job, folder)
        qs.resume(folder)
        return
    qs.train(job.algorithm, job.environment, **job.settings, keep_checkpoints=1, out=folder)


def panel(jobs: Sequence[Job], runs: Path) -> Panel:
    """The runs that have finished, side by side."""
    ended = [job for job in jobs if finished(job, runs)]
    return arrange([_opened(job, job.folder(runs)) for job in ended])


def _opened(job: Job, folder: Path) -> Run:
    """The run in a job's folder. Raises `UsageError` where it is of other settings than the job."""
    run = Run.open(folder)
    settings = replace(run.settings, **job.settings)
    asked = Run(folder, job.algorithm, job.environment, settings, run.versions)
    if asked != run:
        raise UsageError(
            f"{folder} is no run of this experiment: it was started by `{run.command()}`, where "
            f"`{asked.command()}` is asked for. Move it away."
        )
    return run


def finished(job: Job, runs: Path) -> bool:
    """Whether a folder of runs, or of their records, has a run and its end."""
    return (job.folder(runs) / RECORD[-1]).is_file()


def missing(jobs: Sequence[Job], runs: Path) -> list[str]:
    """The names of those that have not finished: diverged, cut short, or never begun."""
    return [f"{job.name}, seed {job.seed}" for job in jobs if not finished(job, runs)]


def keep(jobs: Sequence[Job], runs: Path, records: Path) -> None:
    """Copy the small files of every run that has finished to where results are kept.

    The copies are run folders too, without weights and metrics.
    """
    for job in jobs:
        if not finished(job, runs):
            continue
        source, copy = _opened(job, job.folder(runs)).folder, job.folder(records)
        copy.mkdir(parents=True, exist_ok=True)
        for name in RECORD:
            shutil.copyfile(source / name, copy / name)
        shutil.copyfile(source.with_suffix(COMMITS), copy.with_suffix(COMMITS))


def figures(task: Task, method: Method) -> dict[str, Any]:
    """The last returns of every seed of a method, their interquartile mean and its interval."""
    values = task.last_returns(method)
    return {
        "returns": {str(s): round(v, 2) for s, v in zip(method.seeds, values, strict=True)},
        "iqm": round(interquartile_mean(values), 2),
        "ci95": np.round(bootstrap_interval(values), 2).tolist(),
    }


def curves(found: Panel) -> Figure:
    """Return over environment steps: one axes per task, three to a row."""
    columns = min(3, len(found.tasks))
    rows = -(-len(found.tasks) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.2 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, task in zip(grid, found.tasks, strict=False):
        draw_returns(axes, found, task, "env_steps")
        axes.set_title(task.name, fontsize=9)
    for axes in grid[len(found.tasks) :]:
        axes.set_axis_off()
    grid[0].legend(frameon=False, fontsize=8)
    return figure


def save(args: argparse.Namespace, results: dict[str, Any], figure: Figure | None = None) -> Path:
    """Write the JSON file, with the command, the commits and the machine; and the picture.

    The picture of the full settings goes to where the documentation shows it, others beside the
    file. The runs that `results` lack, its `missing`, are named on the terminal too.
    """
    for name in results.get("missing", ()):
        print(f"missing: {name}")
    runs, out = places(args)
    out.parent.mkdir(parents=True, exist_ok=True)
    words = [Path(sys.argv[0]).name, *sys.argv[1:]]
    about = {
        "experiment": args.name,
        "command": shlex.join(["python", f"experiments/{words[0]}", *words[1:]]),
        "commit": commit(),
        "trained_at": trained_at(runs, records_of(out)),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "quick": args.quick,
    }
    write_json(out, about | results)
    if figure is not None:
        shown = ROOT / "docs" / "assets" / f"{args.name}.png"
        figure.savefig(shown if out.parent == RESULTS else out.with_suffix(".png"), dpi=150)
    return out


def learn_missing(
    args: argparse.Namespace, wanted: dict[tuple[str, ...], Callable[[], Any]], **settings: Any
) -> dict[str, Any]:
    """`settings`, results under `algorithms`, and the commits that those were `trained_at`.

    For experiments whose runs keep no folder: what the JSON file has is not learned again, and each
    result is in it as soon as it is there. `wanted` are functions that learn one, by the names that
    it is nested under, the seed last. Raises `UsageError` where a setting is another in the file.
    """
    _, out = places(args)
    results, commits = {}, []
    if out.is_file():
        found = json.loads(out.read_text(encoding="utf-8"))
        for name, value in settings.items():
            if found[name] != value:
                raise UsageError(
                    f"{out} holds results of other `{name}` than those asked for. Move it away."
                )
        results, commits = found["algorithms"], found.get("trained_at") or [found["commit"]]
    for (*names, seed), learn in wanted.items():
        place = functools.reduce(lambda inner, name: inner.setdefault(name, {}), names, results)
        if seed not in place:
            commits = sorted({*commits, commit()})
            place[seed] = learn()
            save(args, {"trained_at": commits, **settings, "algorithms": results})
    return {"trained_at": commits, **settings, "algorithms": results}


def trained_at(*folders: Path) -> list[str]:
    """The commits that the runs in some folders were trained at, where that is on record."""
    files = [file for folder in folders for file in folder.rglob(f"*{COMMITS}")]
    return sorted({commit for file in files for commit in file.read_text().split()})


def commit() -> str:
    """The commit that is checked out; marked where code differs from it, and not its results."""
    code = ("--", ".", ":!experiments/results", ":!docs/assets")

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip()

    found = git("rev-parse", "--short=10", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no", *code)
    return (found or "unknown") + ("-dirty" if changed else "")
