"""Runs side by side: which of them are seeds of one method, which share a task, how they differ.

A *task* is an environment with its fields, and the data set learned from, if any. A *method* is an
algorithm with its fields. Seeds of one method on one task belong together, whichever run folders
they lie in; a seed that is there twice, and evaluations of different lengths, are refused;
everything else in which compared runs differ is said in `Panel.notes`.
"""

import functools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qscore.algorithms import algorithm_name
from qscore.errors import UsageError
from qscore.folder import Run, non_defaults
from qscore.statistics import bootstrap_interval, interquartile_mean

TRAINING_FIELDS = ("num_envs",)
"""Fields of an environment that say how it is trained in, not what it is."""

EARLY = 0.2
"""The share of training that counts as early."""


@dataclass(frozen=True)
class Seed:
    """One trained seed: the run it is of, and its lines of `evals.jsonl` and `metrics.jsonl`."""

    run: Run
    evals: dict[int, dict[str, Any]]  # by environment steps
    metrics: dict[int, dict[str, Any]]

    def mean_return(self, step: int) -> float:
        """The mean return of the evaluation at `step`."""
        return float(np.mean(self.evals[step]["returns"]))


@dataclass(frozen=True)
class Curve:
    """The interquartile mean over seeds and its 95% bootstrap interval, all of shape [points]."""

    x: list[float]
    middle: list[float]
    low: list[float]
    high: list[float]


@dataclass(frozen=True)
class Method:
    """All seeds of one algorithm with one setting of its fields, on one task."""

    name: str
    seeds: dict[int, Seed]

    @property
    def runs(self) -> list[Run]:
        """The run folders that the seeds lie in, in the order of the seeds."""
        return list({seed.run.folder: seed.run for seed in self.seeds.values()}.values())

    @property
    def steps(self) -> list[int]:
        """Environment steps at which every seed was evaluated."""
        return sorted(set.intersection(*(set(seed.evals) for seed in self.seeds.values())))

    def returns(self, step: int) -> list[float]:
        """The mean return of every seed at a step of `steps`."""
        return [seed.mean_return(step) for seed in self.seeds.values()]

    def curve(self, axis: str) -> Curve:
        """Over `env_steps`, or over `seconds` of wall clock, those of the mean seed."""
        across = [self.returns(step) for step in self.steps]
        bands = [bootstrap_interval(values) for values in across]
        return Curve(
            x=[
                float(np.mean([seed.evals[step][axis] for seed in self.seeds.values()]))
                for step in self.steps
            ],
            middle=[interquartile_mean(values) for values in across],
            low=[low for low, _ in bands],
            high=[high for _, high in bands],
        )


@dataclass(frozen=True)
class Task:
    """The methods that were run on one task, and the steps at which all can be compared."""

    name: str
    methods: list[Method]
    steps: list[int]
    counted: str
    """What steps are: `environment steps`, `gradient steps`, or the one and then the other."""

    @property
    def final_step(self) -> int:
        """The last step that every seed of every method was evaluated at."""
        return self.steps[-1]

    def last_returns(self, method: Method) -> list[float]:
        """The mean return of every seed at `final_step`."""
        return method.returns(self.final_step)

    def mean_over(self, method: Method, share: float) -> list[float] | None:
        """Per seed, the mean return of the evaluations in the first `share` of training.

        Of those that all methods have, or means would be of different steps; None where none is.
        """
        per_step = [method.returns(s) for s in self.steps if s <= share * self.final_step]
        return np.mean(per_step, axis=0).tolist() if per_step else None

    @functools.cached_property
    def bounds(self) -> tuple[float, float]:
        """The returns that normalised returns of 0 and 1 stand for.

        The lowest interquartile mean of any method at any evaluation, and the highest at the end.
        """
        low = min(interquartile_mean(m.returns(step)) for m in self.methods for step in m.steps)
        high = max(interquartile_mean(self.last_returns(m)) for m in self.methods)
        return low, high if high > low else low + 1.0

    def normalized(self, returns: Sequence[float]) -> list[float]:
        """Returns in the unit of `bounds`."""
        low, high = self.bounds
        return [(value - low) / (high - low) for value in returns]


@dataclass(frozen=True)
class Panel:
    """Everything that a figure or a report of some run folders is made of."""

    tasks: list[Task]
    notes: list[str]
    """What a reader has to know before comparing: every way in which the runs differ."""

    @property
    def names(self) -> list[str]:
        """The methods of all tasks, in the order in which they were first given."""
        return list(dict.fromkeys(method.name for task in self.tasks for method in task.methods))

    @property
    def everywhere(self) -> dict[str, list[Method]]:
        """The methods that were run on every task: name -> as they are on each of the tasks."""
        found = {
            name: [method for task in self.tasks for method in task.methods if method.name == name]
            for name in self.names
        }
        return {name: on for name, on in found.items() if len(on) == len(self.tasks)}

    @property
    def unit(self) -> str:
        """What `scores` are in: of one task they are returns, of several normalised ones."""
        return "normalised return" if len(self.tasks) > 1 else "return"

    def scores(self, figure: Callable[[Task, Method], list[float]]) -> dict[str, list[list[float]]]:
        """A figure of every seed, a return, of each method that was run on every task.

        For each method the tasks in order, and of each task the seeds.
        """
        scores: dict[str, list[list[float]]] = {}
        for name, methods in self.everywhere.items():
            scores[name] = []
            for task, method in zip(self.tasks, methods, strict=True):
                values = figure(task, method)
                scores[name].append(task.normalized(values) if len(self.tasks) > 1 else values)
        return scores


def read_panel(folders: Sequence[Path]) -> Panel:
    """Read run folders and arrange them.

    Raises `UsageError` where a folder is not a run or has no evaluation yet, where a seed of a
    method is there twice, and where evaluations on one task are not of equally many episodes or
    share no step.
    """
    return arrange([Run.open(folder) for folder in folders])


def arrange(runs: Sequence[Run]) -> Panel:
    """As `read_panel`, of runs that are open."""
    if not runs:
        raise UsageError("no run folder was given.")
    labels = _labels([(algorithm_name(run.algorithm), _method_settings(run)) for run in runs])
    places = _labels([(run.environment.id, _task_settings(run)) for run in runs])
    tasks = []
    for place in dict.fromkeys(places):
        there = [i for i, each in enumerate(places) if each == place]
        methods = []
        for label in dict.fromkeys(labels[i] for i in there):
            of_method = [runs[i] for i in there if labels[i] == label]
            methods.append(Method(label, _seeds(label, of_method)))
        tasks.append(_task(place, methods))
    return Panel(tasks, _notes(tasks))


def _method_settings(run: Run) -> dict[str, Any]:
    """What distinguishes methods: fields that are not defaults, and how the run is computed."""
    settings = non_defaults(run.algorithm)
    for name in TRAINING_FIELDS:
        if (value := getattr(run.environment, name)) != 1:
            settings[name] = value
    if run.settings.precision != "f32":
        settings["precision"] = run.settings.precision
    return settings


def task_fields(run: Run) -> dict[str, Any]:
    """The fields of a run's environment that make it another task than its defaults."""
    fields = non_defaults(run.environment)
    return {name: value for name, value in fields.items() if name not in TRAINING_FIELDS}


def _task_settings(run: Run) -> dict[str, Any]:
    """What distinguishes tasks of one environment."""
    settings = task_fields(run)
    if run.settings.dataset is not None:
        settings["dataset"] = run.settings.dataset
        if run.settings.online_steps:
            settings |= {"offline_steps": run.settings.steps}
            settings |= {"online_steps": run.settings.online_steps}
    return settings


def _labels(named: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """A label for each (name, settings): the name, and settings that not all of the name share.

    Equal settings have equal labels, and others never.
    """
    labels: dict[str, str] = {}
    for name, settings in named:
        alike = [other for each, other in named if each == name]
        said = [name]
        for key in dict.fromkeys(key for other in alike for key in other):
            if key in settings and any(other.get(key) != settings[key] for other in alike):
                short = shortened(settings[key])
                if key != "preset":
                    said.append(f"{key}={short}")
                elif short != "default":
                    said.append(short)
        label = full = ", ".join(said)
        identity = _identity(name, settings)
        if identity in labels.values():
            continue
        while labels.setdefault(label, identity) != identity:  # cut to the same characters
            label = f"{full} ({1 + sum(each.startswith(full) for each in labels)})"
    by_identity = {identity: label for label, identity in labels.items()}
    return [by_identity[_identity(name, settings)] for name, settings in named]


def _identity(name: str, settings: dict[str, Any]) -> str:
    return json.dumps([name, settings], sort_keys=True)


def shortened(value: Any) -> str:
    """A setting in a label: of a file its name, of a long one its first characters."""
    if isinstance(value, str) and value.startswith("/"):
        value = Path(value).name
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 30 else text[:27] + "..."


def _seeds(label: str, runs: Iterable[Run]) -> dict[int, Seed]:
    """Every seed of the runs of a method on a task, in order."""
    seeds: dict[int, Seed] = {}
    for run in runs:
        for other in {seed.run.folder for seed in seeds.values()}:
            if run.folder.resolve() == other.resolve():
                raise UsageError(f"{run.folder} was given twice.")
        evals, metrics = run.rows("evals"), run.rows("metrics")
        if not evals:
            raise UsageError(f"{run.folder} has no evaluation yet; there is nothing to show.")
        for seed, rows in evals.items():
            if seed in seeds:
                raise UsageError(
                    f"seed {seed} of {label} is in {seeds[seed].run.folder} and in {run.folder}; "
                    "a seed counts once: leave one of them out."
                )
            seeds[seed] = Seed(run, rows, metrics.get(seed, {}))
    return dict(sorted(seeds.items()))


def _task(place: str, methods: list[Method]) -> Task:
    runs = [run for method in methods for run in method.runs]
    episodes = {run.settings.eval_episodes: run.folder for run in runs}
    if len(episodes) > 1:
        said = ", ".join(f"{count} in {folder}" for count, folder in episodes.items())
        raise UsageError(
            f"evaluations on {place} are over different numbers of episodes ({said}); figures of "
            "single policies would not be equally sure. Compare runs with the same `eval_episodes`."
        )
    common = set.intersection(*(set(method.steps) for method in methods))
    if not common:
        folders = ", ".join(str(run.folder) for run in runs)
        raise UsageError(
            f"the runs on {place} were never evaluated after equally many steps ({folders}); "
            "compare runs whose `eval_every` have a common multiple."
        )
    offline, online = runs[0].settings.dataset is not None, runs[0].settings.online_steps > 0
    counted = "gradient steps" if offline else "environment steps"
    if online:
        counted = "gradient, then environment steps"
    return Task(place, methods, sorted(common), counted)


def _notes(tasks: list[Task]) -> list[str]:
    """Each difference in a sentence."""
    notes = []
    for task in tasks:
        runs = [run for method in task.methods for run in method.runs]
        reached: dict[str, int] = {}
        for method in task.methods:
            for run in method.runs:
                own = {s: seed for s, seed in method.seeds.items() if seed.run == run}
                if missing := sorted(set(run.settings.seed_list) - set(own)):
                    said = ", ".join(map(str, missing))
                    notes.append(f"{run.folder}: no evaluation yet of seeds {said}.")
                reached[str(run.folder)] = done = min(max(seed.evals) for seed in own.values())
                if done < run.settings.total_steps:
                    notes.append(
                        f"{run.folder} has not finished: {done:,} of {run.settings.total_steps:,} "
                        "steps."
                    )
        if max(reached.values()) > task.final_step:
            said = "; ".join(f"{folder} {step:,}" for folder, step in reached.items())
            notes.append(
                f"{task.name}: compared after {task.final_step:,} steps, which all were evaluated "
                f"at ({said})."
            )
        if any(
            set(seed.evals) - set(task.steps) for m in task.methods for seed in m.seeds.values()
        ):
            notes.append(
                f"{task.name}: not all were evaluated at the same steps; tables take those that "
                f"all have, {len(task.steps)} of them."
            )
        counts = {method.name: len(method.seeds) for method in task.methods}
        if len(set(counts.values())) > 1:
            said = "; ".join(f"{name}: {count}" for name, count in counts.items())
            notes.append(f"{task.name}: different numbers of seeds ({said}).")
        for package in dict.fromkeys(name for run in runs for name in run.versions):
            found = dict.fromkeys(str(run.versions.get(package, "unknown")) for run in runs)
            if len(found) > 1:
                notes.append(f"{task.name}: different versions, {package} ({', '.join(found)}).")
    everyone = dict.fromkeys(method.name for task in tasks for method in task.methods)
    for task in tasks:
        if missing := everyone.keys() - {method.name for method in task.methods}:
            said = "; ".join(name for name in everyone if name in missing)
            notes.append(f"{task.name}: not run with {said}.")
    environments: dict[str, int] = {}
    for task in tasks:
        name = task.methods[0].runs[0].environment.id
        environments[name] = environments.get(name, 0) + 1
    for name, count in environments.items():
        if count > 1:
            notes.append(f"{name} is there in different forms, which are tasks of their own.")
    return list(dict.fromkeys(notes))
