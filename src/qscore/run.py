"""A run: chunk -> evaluate -> log -> checkpoint. The only loop with files, a clock and a terminal.

`train` starts a run folder and `resume` continues one.
"""

import contextlib
import dataclasses
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from qscore import checkpoint, datasets, lq, memory, replay
from qscore.algorithms import algorithm_name
from qscore.algorithms.base import Algorithm
from qscore.closed_form import Comparison, compare, return_gap
from qscore.datasets import Dataset
from qscore.environments import LQ, Environment, EnvironmentFailure, environment_class
from qscore.environments.sde import SDEEnvironment
from qscore.errors import Interrupted, RunStopped, TrainingDiverged, UsageError
from qscore.folder import (
    Run,
    Settings,
    absolute,
    alone,
    as_usage_error,
    expanded,
    installed_versions,
    new_folder,
    registered_name,
    write_json,
)
from qscore.log import ProgressBar, RunLog
from qscore.panel import arrange
from qscore.products import Precision
from qscore.statistics import summarize
from qscore.train_host import (
    Diverged,
    Session,
    agent_shapes,
    chunk_steps,
    inadmissible,
    replay_rows,
)
from qscore.types import Spec

PLOT_SECONDS = 15.0
"""The learning curve is redrawn at evaluations, but not more often than this."""

LOG_EVERY = 1000
"""Environment steps between lines of training metrics, unless told otherwise."""

SATURATION_WARNING = 0.9
"""Share of saturated actions beyond which a run warns."""


def train(
    algorithm: Algorithm,
    environment: str | Environment,
    *,
    steps: int = Settings.steps,
    seeds: int = Settings.seeds,
    seed_start: int = Settings.seed_start,
    out: str | os.PathLike | None = None,
    eval_every: int | None = Settings.eval_every,
    eval_episodes: int = Settings.eval_episodes,
    log_every: int | None = Settings.log_every,
    keep_checkpoints: int = Settings.keep_checkpoints,
    dataset: str | os.PathLike | None = Settings.dataset,
    online_steps: int = Settings.online_steps,
    precision: Precision = Settings.precision,
    progress: bool = True,
) -> Run:
    """Train `seeds` independent seeds for `steps` environment steps each, into the folder `out`.

    With a `dataset`, for `steps` gradient steps on it and then `online_steps` in the environment.

    As `qscore train`, which on some tasks has other defaults for `steps` and the preset; see
    `Settings` for the arguments. Raises `UsageError` for a request that cannot be carried out,
    before anything is written, and `RunStopped` for a run that ends early.
    """
    if isinstance(algorithm, type) or not hasattr(algorithm, "update"):
        raise UsageError(f"`algorithm` is {algorithm!r}; it must be one with its fields: qs.QSM().")
    algorithm_label = as_usage_error(lambda: algorithm_name(algorithm))
    task: Environment = (
        environment_class(environment)(id=environment)
        if isinstance(environment, str)
        else environment
    )
    name = as_usage_error(lambda: registered_name(task))
    settings = as_usage_error(
        lambda: Settings(
            steps=steps,
            dataset=None if dataset is None else absolute(dataset),
            online_steps=online_steps,
            seeds=seeds,
            seed_start=seed_start,
            eval_every=eval_every,
            eval_episodes=eval_episodes,
            log_every=log_every,
            keep_checkpoints=keep_checkpoints,
            precision=precision,
        )
    )
    rows = task.num_envs
    settings = filled(settings, task)
    _check_multiples(settings, rows)
    if out is not None:
        _check_empty(Path(out))
    # what is wrong with the task or the data is said before anything is written
    data = _load_data(settings, algorithm, task)
    made_in = None if data is None else data.environment
    if made_in and datasets.unversioned(made_in) != datasets.unversioned(name) and progress:
        print(f"warning: {dataset} was recorded in {made_in}, not in {name}.", file=sys.stderr)
    if algorithm.warmup_steps >= steps and dataset is None and progress:
        print(
            f"warning: nothing will be learned: all {steps} steps are random warm-up "
            f"(`algorithm.warmup_steps` is {algorithm.warmup_steps}).",
            file=sys.stderr,
        )
    stamp = time.strftime("%Y%m%d-%H%M%S")
    usual = f"{algorithm_label}-{name.replace('/', '-')}-{stamp}"
    folder = Path("runs") / usual if out is None else expanded(out)
    with contextlib.ExitStack() as held:
        try:
            if out is None:
                folder = new_folder(folder)
            else:
                folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(alone(folder))
            _check_empty(folder)  # another process may have been quicker
            run = Run(folder, algorithm, task, settings, installed_versions())
            run.save_config()
        except OSError as error:
            raise UsageError(f"cannot write to `out`, {folder}: {error}.") from error
        with _resumable(run):
            _Loop(run, data, progress=progress).go()
    return run


def _check_empty(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"`out` is {out}, which exists and is not an empty folder.")


def resume(folder: str | os.PathLike, *, steps: int | None = None, progress: bool = True) -> Run:
    """Continue a run from its newest intact checkpoint, to `steps` if given.

    Ends bit for bit where the uninterrupted run would have ended. Raises as `train` does.
    """
    run = Run.open(folder)
    if steps is not None:
        done = (checkpoint.steps(run.checkpoints) or [0])[-1]
        if steps < done:
            raise UsageError(f"`steps` is {steps}, but the run has already done {done}.")
        offline = run.settings.offline_steps if run.settings.online_steps else 0
        if steps < offline:
            raise UsageError(f"`steps` is {steps}, but the run takes {offline} on its data alone.")
        changed = {"online_steps": steps - offline} if offline else {"steps": steps}
        settings = as_usage_error(lambda: dataclasses.replace(run.settings, **changed))
        _check_multiples(settings, run.environment.num_envs)
        run = dataclasses.replace(run, settings=settings)
    installed = installed_versions()
    differing = [
        f"{name} {old} -> {installed.get(name)}"
        for name, old in run.versions.items()
        if installed.get(name) != old
    ]
    data = _load_data(run.settings, run.algorithm, run.environment)
    with alone(run.folder), _resumable(run):
        loop = _Loop(run, data, progress=progress)
        if differing:
            changes = ", ".join(differing)
            loop.bar.warn(f"not what the run began with, so numbers may differ: {changes}")
        try:
            loop.restore()
            run.save_config()
        except OSError as error:
            loop.close()
            raise RunStopped(f"cannot write to {run.folder}: {error}.") from error
        except BaseException:
            loop.close()
            raise
        loop.go()
    return run


@contextlib.contextmanager
def _resumable(run: Run) -> Iterator[None]:
    """Turn an interrupt outside the loop into `Interrupted`.

    That is one while programs compile, a checkpoint is read or the final comparison runs, and any
    second one.
    """
    ours = threading.current_thread() is threading.main_thread()  # only it may handle signals
    usual = signal.getsignal(signal.SIGTERM)
    if ours:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; {run.how_to_resume}") from None
    finally:
        if ours:
            _restore_handler(signal.SIGTERM, usual)


def _restore_handler(number: int, usual: Any) -> None:
    # None is a handler that was not installed from Python, which Python cannot put back
    signal.signal(number, signal.SIG_DFL if usual is None else usual)


def check(
    algorithm: Algorithm, environment: Environment, settings: Settings, *, beside: int = 1
) -> Settings:
    """All that `train` would refuse, without an `out`. The settings with what was left open.

    `beside` is how many such runs share the memory. Raises `UsageError`.
    """
    settings = filled(settings, environment)
    _check_multiples(settings, environment.num_envs)
    _load_data(settings, algorithm, environment, beside=beside)
    return settings


def filled(settings: Settings, task: Environment) -> Settings:
    """The settings that were left open. Our own environments are cut at whole chunks."""
    ours = isinstance(task, SDEEnvironment)
    unit = chunk_steps(task) if ours else task.num_envs
    if settings.eval_every is None:
        twentieth = max(1, settings.total_steps // (20 * unit)) * unit
        settings = dataclasses.replace(settings, eval_every=twentieth)
    if settings.log_every is None:
        log_every = unit if ours else -(-LOG_EVERY // unit) * unit
        settings = dataclasses.replace(settings, log_every=log_every)
    return settings


def _load_data(
    settings: Settings, algorithm: Algorithm, environment: Environment, *, beside: int = 1
) -> Dataset | None:
    """Load the run's data set, if it has one.

    Opens the environment once, so that a bad environment, bad data, buffers too large and an
    unsolvable problem are refused here. Raises `UsageError`.
    """
    task = as_usage_error(environment.open)
    try:
        data = None if settings.dataset is None else datasets.load(settings.dataset, task)
    finally:
        task.close()
    if data is not None and len(data) > algorithm.replay_capacity:
        raise UsageError(
            f"{settings.dataset} has {len(data)} transitions, more than "
            f"`algorithm.replay_capacity`, {algorithm.replay_capacity}."
        )
    recorded = 0 if data is None else len(data)
    _check_memory(settings, algorithm, environment, task.spec, recorded, beside)
    if (compared := _compared(algorithm, environment)) is not None:
        as_usage_error(lambda: lq.solve(compared.solved_problem))
    return data


def _compared(algorithm: Algorithm, environment: Environment) -> LQ | None:
    """The environment, if a run in it ends in a comparison with its closed form."""
    if isinstance(environment, LQ) and hasattr(algorithm, "value_and_score"):
        return environment
    return None


def _check_memory(
    settings: Settings,
    algorithm: Algorithm,
    environment: Environment,
    spec: Spec,
    recorded: int,
    beside: int,
) -> None:
    """Refuse what the device does not hold, or the machine not twice: a checkpoint copies it."""
    rows = replay_rows(
        algorithm,
        environment,
        steps=settings.total_steps,
        recorded=recorded,
        offline_steps=settings.offline_steps,
    )
    size = replay.row_bytes(spec)
    stats = jax.devices()[0].memory_stats()  # none on a CPU
    left = stats["bytes_limit"] - stats["bytes_in_use"] if stats else math.inf
    free = memory.available()
    leaves = jax.tree.leaves(as_usage_error(lambda: agent_shapes(algorithm, spec)))
    learner = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    needed = beside * settings.seeds * (rows * size + learner)
    if needed <= left and 2 * needed <= free:
        return
    sizes = (
        f"{settings.seeds} x {rows} transitions of {size} bytes and {learner / 2**20:.1f} MiB "
        "that are learned"
    )
    remedy = "Lower `algorithm.replay_capacity` or `seeds`."
    if beside > 1:
        remedy = "Lower `algorithm.replay_capacity`, `seeds_per_trial` or `resources.workers`."
    if learner > rows * size:
        remedy = "Take fewer `seeds`, smaller networks, or network critics in place of features."
    runs = "a run takes" if beside == 1 else f"{beside} trials side by side take"
    takes = f"{runs} {needed / 2**30:.1f} GiB ({sizes}{'' if beside == 1 else ' each'})"
    if needed > left:
        raise UsageError(f"{takes}; {left / 2**30:.1f} GiB are free on the device. {remedy}")
    raise UsageError(
        f"{takes}, and as much again while a checkpoint is written; {free / 2**30:.1f} GiB are "
        f"free. {remedy}"
    )


def _check_multiples(settings: Settings, rows: int) -> None:
    """Steps are counted in whole steps of all the environments together."""
    for name in ("steps", "online_steps", "eval_every", "log_every"):
        if getattr(settings, name) % rows:
            raise UsageError(
                f"`{name}` must be a multiple of `environment.num_envs`, {rows}; "
                f"got {getattr(settings, name)}."
            )


class _Loop:
    """The loop of one run over all its seeds, one thread each.

    Training waits neither for evaluations nor for the disk: a snapshot is evaluated and written in
    the background, one at a time. What is evaluated is what the checkpoint holds, so the numbers
    are those of a loop that does one thing after the other.
    """

    def __init__(self, run: Run, data: Dataset | None, *, progress: bool):
        self.run, self.data, settings = run, data, run.settings
        self.env_steps = 0
        self.seconds = 0.0  # of training, over every sitting
        self.log: RunLog | None = None
        self.saturation_warned = False
        self.plotted = -math.inf
        self.background: Future | None = None  # the evaluation and checkpoint under way
        try:
            self.sessions = [
                Session(
                    run.algorithm,
                    run.environment,
                    seed,
                    steps=settings.total_steps,
                    eval_episodes=settings.eval_episodes,
                    data=None if data is None else data.rows,
                    offline_steps=settings.offline_steps,
                    precision=settings.precision,
                )
                for seed in settings.seed_list
            ]
        except EnvironmentFailure as error:
            raise RunStopped(f"the environment failed before training began: {error}") from error
        label = f"{algorithm_name(run.algorithm)} on {run.environment.id}"
        warmup = 0 if settings.offline_steps else run.algorithm.warmup_steps
        self.bar = ProgressBar(label, settings.total_steps, warmup=warmup, enabled=progress)
        rows = sum(session.capacity for session in self.sessions)
        size = rows * replay.row_bytes(self.sessions[0].spec)
        self.bar.note(f"replay buffers of {size / 2**20:.0f} MiB")

    def restore(self) -> None:
        """Go back to the newest intact checkpoint; to the start where there is none."""
        folder = self.run.checkpoints
        checkpoint.clean(folder)
        found = checkpoint.newest(folder, self.bar.warn)
        if found is None:
            if checkpoint.steps(folder):
                raise RunStopped(f"no checkpoint in {folder} is intact; the run cannot be resumed.")
            self._refuse_results()
            return
        path, header = found
        if self.data is not None and header["dataset"] != self.data.sha256:
            raise UsageError(
                f"{self.run.settings.dataset} does not hold what this run began with; it cannot be "
                "resumed on other data."
            )
        self.env_steps, self.seconds = header["env_steps"], header["seconds"]
        for session in self.sessions:
            try:
                arrays = checkpoint.load(path, session.seed, session.skeleton())
                repeated = session.restore(header["seeds"][str(session.seed)], arrays)
            except (checkpoint.CorruptCheckpoint, EnvironmentFailure) as error:
                raise RunStopped(f"cannot resume: {error}") from error
            if not repeated:
                self.bar.warn(
                    f"seed {session.seed}: an environment did not repeat its episode from the same "
                    "seed and actions, so it is not deterministic; it starts a new episode."
                )
        checkpoint.discard_after(folder, self.env_steps)  # corrupt, or one would have been used
        self.log = RunLog(self.run.folder, header["offsets"], self.env_steps)

    def _refuse_results(self) -> None:
        """Without a checkpoint a run begins anew, which must not replace what it has written."""
        for name in ("summary.json", "evals.jsonl", "metrics.jsonl"):
            path = self.run.folder / name
            if path.is_file() and path.stat().st_size:
                raise RunStopped(
                    f"{self.run.folder} has no checkpoint to go on from, but results ({name}), "
                    f"which a new start would replace. To train it again: {self.run.command()}"
                )

    def go(self) -> None:
        """From wherever the sessions are to the end."""
        try:
            with (
                interruptible() as interrupted,
                ThreadPoolExecutor(len(self.sessions)) as training,
                ThreadPoolExecutor(len(self.sessions)) as evaluating,
                ThreadPoolExecutor(1) as writing,  # left last: what is under way is finished
            ):
                self._loop(training, evaluating, writing, interrupted)
            self._summarize()
        except Diverged as error:
            raise TrainingDiverged(f"training diverged: {error}. {self._last_good()}") from error
        except EnvironmentFailure as error:
            raise RunStopped(f"the environment failed: {error} {self._last_good()}") from error
        except OSError as error:
            raise RunStopped(
                f"cannot write to {self.run.folder}: {error}. {self._last_good()}"
            ) from error
        finally:
            self.close()

    def close(self) -> None:
        """Stop the bar, close the files and the environments."""
        self.bar.close()
        if self.log is not None:
            self.log.close()
        for session in self.sessions:
            session.close()

    def _loop(
        self,
        training: ThreadPoolExecutor,
        evaluating: ThreadPoolExecutor,
        writing: ThreadPoolExecutor,
        interrupted: Callable[[], bool],
    ) -> None:
        settings = self.run.settings
        eval_every = settings.eval_every
        log_every = settings.log_every
        assert eval_every is not None and log_every is not None  # `train` fills them

        def save(*, evaluate: bool) -> None:
            self._wait()
            self.background = writing.submit(self._record(evaluating if evaluate else None))

        if self.log is None:
            self.log = RunLog(self.run.folder)
            save(evaluate=False)
            self._wait()
        if self.env_steps < settings.total_steps:
            (self.run.folder / "summary.json").unlink(missing_ok=True)  # of a shorter run
        elif self.env_steps not in self._written("evals"):  # an interrupt's checkpoint ends it now
            if self.env_steps not in self._written("metrics"):
                self._log_metrics()
            save(evaluate=True)
        clock = time.perf_counter()
        while self.env_steps < settings.total_steps:
            milestones = (log_every, eval_every)
            until = min(settings.total_steps, *((self.env_steps // n + 1) * n for n in milestones))
            list(training.map(lambda session: session.advance(until), self.sessions))
            done = self.sessions[0].env_steps
            clock, taken = time.perf_counter(), time.perf_counter() - clock
            self.seconds += taken
            self.bar.update(done, (done - self.env_steps) * len(self.sessions) / taken)
            self.env_steps = done

            finished = done == settings.total_steps
            landmark = done in (settings.offline_steps, settings.total_steps)
            if done % log_every == 0 or landmark:
                self._log_metrics()
            evaluate = done % eval_every == 0 or landmark
            stopping = interrupted()
            if evaluate or stopping:
                save(evaluate=evaluate)
            if finished or stopping:
                self._wait()
            clock, taken = time.perf_counter(), time.perf_counter() - clock
            self.seconds += taken
            if stopping and not finished:
                raise Interrupted(
                    f"interrupted at {done} of {settings.total_steps} steps, checkpoint written; "
                    f"{self.run.how_to_resume}"
                )
        self._wait()

    def _wait(self) -> None:
        """For the evaluation and the checkpoint in the background; raises what they raised."""
        if self.background is not None:
            self.background.result()

    def _written(self, stream: Literal["evals", "metrics"]) -> dict[int, Any]:
        """The lines of the first seed, by environment step."""
        return self.run.rows(stream).get(self.sessions[0].seed, {})

    def _log_metrics(self) -> None:
        assert self.log is not None
        for session in self.sessions:
            metrics = session.flush()
            self.log.metrics(
                {
                    "seed": session.seed,
                    "env_steps": self.env_steps,
                    "updates": session.updates,
                    "seconds": round(self.seconds, 3),
                    **metrics,
                }
            )
            if self.env_steps == self.run.settings.total_steps and (why := inadmissible(metrics)):
                self.bar.warn(
                    f"seed {session.seed} did not find a score with a finite value{why}. Longer "
                    "training, shorter episodes or a higher discount rate would help."
                )
            saturation = metrics.get("action_saturation", 0.0)
            if saturation > SATURATION_WARNING and not self.saturation_warned:
                self.saturation_warned = True
                self.bar.warn(
                    f"seed {session.seed}: {saturation:.0%} of the policy's actions lie at their "
                    "bounds (`action_saturation` in the algorithm's page)."
                )

    def _record(self, evaluating: ThreadPoolExecutor | None) -> Callable[[], None]:
        """Take a snapshot now; what is returned evaluates it, if asked to, and writes it."""
        log = self.log
        assert log is not None
        env_steps, seconds = self.env_steps, self.seconds
        snapshots = [session.snapshot() for session in self.sessions]
        metrics = log.offset("metrics")

        def record() -> None:
            if evaluating is not None:
                self._evaluate(evaluating, env_steps, seconds, [arrays for _, arrays in snapshots])
            seeds = self.run.settings.seed_list
            checkpoint.save(
                self.run.checkpoints,
                env_steps,
                {
                    "seconds": seconds,
                    "offsets": {"metrics": metrics, "evals": log.offset("evals")},
                    "dataset": None if self.data is None else self.data.sha256,
                    "seeds": {str(s): c for s, (c, _) in zip(seeds, snapshots, strict=True)},
                },
                {s: arrays for s, (_, arrays) in zip(seeds, snapshots, strict=True)},
                keep=self.run.settings.keep_checkpoints,
            )

        return record

    def _evaluate(
        self,
        evaluating: ThreadPoolExecutor,
        env_steps: int,
        seconds: float,
        snapshots: list[dict[str, Any]],
    ) -> None:
        assert self.log is not None
        results = list(
            evaluating.map(
                lambda session, arrays: session.evaluate(0, arrays), self.sessions, snapshots
            )
        )
        for session, (returns, lengths) in zip(self.sessions, results, strict=True):
            self.log.evaluation(
                {
                    "seed": session.seed,
                    "env_steps": env_steps,
                    "seconds": round(seconds, 3),
                    "returns": returns,
                    "lengths": lengths,
                }
            )
        self.bar.note("return " + " ".join(f"{np.mean(returns):.0f}" for returns, _ in results))
        if (
            time.monotonic() - self.plotted > PLOT_SECONDS
            or env_steps == self.run.settings.total_steps
        ):
            plot_run(self.run)
            self.plotted = time.monotonic()

    def _last_good(self) -> str:
        steps = checkpoint.steps(self.run.checkpoints)
        if not steps:
            return "No checkpoint had been written yet."
        return f"The last good checkpoint is {self.run.checkpoints / str(steps[-1])}."

    def _summarize(self) -> None:
        rows = self.run.rows("evals")
        last = [rows[session.seed][self.env_steps]["returns"] for session in self.sessions]
        seeds, collected = len(self.sessions), self.env_steps - self.run.settings.offline_steps
        summary = {
            "algorithm": algorithm_name(self.run.algorithm),
            "environment": self.run.environment.id,
            "seeds": [session.seed for session in self.sessions],
            "env_steps": self.env_steps,
            "final_returns": [float(np.mean(returns)) for returns in last],
            **summarize(last),
            "seconds": round(self.seconds, 3),
            "env_steps_per_second": collected * seeds / self.seconds,
            "updates_per_second": sum(session.updates for session in self.sessions) / self.seconds,
        }
        if self.data is not None:
            summary["dataset"] = {
                "source": self.data.source,
                "steps": len(self.data),
                "episodes": len(self.data.episodes),
                "mean_return": float(np.mean(self.data.returns)),
            }
        if names := datasets.references(self.run.environment):
            summary["normalized"] = {
                name: [datasets.normalized(value, reference) for value in summary["final_returns"]]
                for name, reference in names.items()
            }
        algorithm = self.run.algorithm
        if (environment := _compared(algorithm, self.run.environment)) is not None:
            first, *others = self.sessions

            def compared(session: Session) -> tuple[Comparison, float]:
                arguments = (algorithm, environment, session.runner.agent)
                return compare(*arguments), return_gap(*arguments)

            with ThreadPoolExecutor(len(self.sessions)) as pool:  # the first one compiles
                found, gaps = zip(compared(first), *pool.map(compared, others), strict=True)
            comparisons = dict(zip(summary["seeds"], found, strict=True))
            errors = [c.relative_error for c in found]

            def finite(values: Iterable[float]) -> list[float | None]:
                return [value if math.isfinite(value) else None for value in values]

            summary["lq"] = {
                # null: what is exactly 0 was learned as something else
                "relative_error": {name: finite(e[name] for e in errors) for name in errors[0]},
                # null: the score lets the state grow faster than the discount falls
                "return_gap": finite(gaps),
            }
            from qscore.plots import plot_comparisons  # (see `plot_run`)

            plot_comparisons(comparisons, self.run.folder / "plots" / "lq.png")
        write_json(self.run.folder / "summary.json", summary)


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Turn a SIGINT or SIGTERM into a flag; a SIGINT after one acts as usual.

    A SIGTERM after one changes nothing: whoever ends a machine's processes sends it to a sweep and
    to its trials, and a trial that had it then has it from its sweep, too.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set  # only the main thread may handle signals
        return
    usual = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handler(number: int, frame: Any) -> None:
        asked.set()
        _restore_handler(signal.SIGINT, usual[signal.SIGINT])

    for number in usual:
        signal.signal(number, handler)
    try:
        yield asked.is_set
    finally:
        for number, old in usual.items():
            _restore_handler(number, old)


def plot_run(run: Run) -> None:
    """Redraw plots/returns.png."""
    from qscore.plots import plot_returns  # Matplotlib takes a second, which not every command has

    plot_returns(arrange([run]), run.folder / "plots" / "returns.png")
