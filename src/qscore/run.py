"""A run: chunk -> evaluate -> log -> checkpoint. The only loop with files, a clock and a terminal.

    config.json  metrics.jsonl  evals.jsonl  summary.json  checkpoints/  plots/  tensorboard/

`train` starts a run folder, `resume` continues one, `evaluate` and `load` use one.
"""

import dataclasses
import json
import math
import os
import platform
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, TypeVar

import imageio.v2 as imageio
import jax
import jax.numpy as jnp
import numpy as np

from qscore import checkpoint, train_host
from qscore.algorithms import ALGORITHMS, algorithm_name
from qscore.algorithms.base import Algorithm
from qscore.config import Range, validate
from qscore.environments import Environment, EnvironmentFailure, environment_class
from qscore.errors import Interrupted, RunStopped, TrainingDiverged, UsageError
from qscore.log import ProgressBar, RunLog
from qscore.plots import plot_returns, read_evals
from qscore.statistics import summarize
from qscore.train_host import Diverged, Policy, Session, evaluation_policy, with_best_of
from qscore.types import Carry, Key, Spec

T = TypeVar("T")

PLOT_SECONDS = 15.0
"""The learning curve is redrawn at evaluations, but not more often than this."""

SATURATION_WARNING = 0.9
"""Share of saturated actions beyond which a run warns."""
MAX_FRAME_RATE = 50
"""Frames per second of a video at most."""


@dataclass(frozen=True)
class Settings:
    """How long a run is, and what it records. Steps are environment steps of each seed."""

    steps: Annotated[int, Range(1)] = 100_000
    """Environment steps of each seed, in [1, inf)."""
    seeds: Annotated[int, Range(1, 1000)] = 1
    """Independent seeds trained side by side, in [1, 1000]."""
    seed_start: Annotated[int, Range(0)] = 0
    """The first seed, in [0, inf); the others follow."""
    eval_every: Annotated[int | None, Range(1)] = None
    """Environment steps between evaluations, each with a checkpoint, in [1, inf). None is a
    twentieth of the run."""
    eval_episodes: Annotated[int, Range(1)] = 10
    """Episodes per evaluation, in [1, inf), from the same starts every time."""
    log_every: Annotated[int, Range(1)] = 1000
    """Environment steps between lines of training metrics, in [1, inf)."""
    keep_checkpoints: Annotated[int, Range(1)] = 2
    """Newest checkpoints to keep, in [1, inf); they include the replay buffer."""

    def __post_init__(self):
        validate(self)

    @property
    def seed_list(self) -> list[int]:
        return list(range(self.seed_start, self.seed_start + self.seeds))


@dataclass(frozen=True)
class Run:
    """A run folder, and what `config.json` in it says."""

    folder: Path
    algorithm: Algorithm
    environment: Environment
    settings: Settings
    versions: dict[str, str]

    @staticmethod
    def open(folder: str | os.PathLike) -> "Run":
        """Read a run folder. Raises `UsageError` where it is not one."""
        path = Path(folder)
        if not path.is_dir():
            raise UsageError(f"{path} is not a run folder: there is no such folder.")
        try:
            config = json.loads((path / "config.json").read_text())
        except FileNotFoundError:
            raise UsageError(f"{path} is not a run folder: it has no config.json.") from None
        except ValueError as error:
            raise UsageError(f"{path / 'config.json'} is not valid JSON: {error}.") from error
        try:
            algorithm, environment = dict(config["algorithm"]), dict(config["environment"])
            return Run(
                path,
                ALGORITHMS[algorithm.pop("name")](**_tuples(algorithm)),
                environment_class(environment.pop("name"))(**_tuples(environment)),
                Settings(**config["settings"]),
                config["versions"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(
                f"{path / 'config.json'} does not describe a run of this version of qscore: "
                f"{type(error).__name__}: {error}"
            ) from error

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def summary(self) -> dict[str, Any]:
        """The contents of summary.json; a run that has not finished has none."""
        path = self.folder / "summary.json"
        if not path.is_file():
            raise UsageError(f"{self.folder} has no summary.json: the run has not finished.")
        return json.loads(path.read_text())

    def save_config(self) -> None:
        """Write config.json."""
        name = algorithm_name(self.algorithm)
        config = {
            "algorithm": {"name": name, **dataclasses.asdict(self.algorithm)},  # pyright: ignore[reportArgumentType]
            "environment": {
                "name": environment_name(self.environment),
                **dataclasses.asdict(self.environment),  # pyright: ignore[reportArgumentType]
            },
            "settings": dataclasses.asdict(self.settings),
            "versions": self.versions,
        }
        write_json(self.folder / "config.json", config)


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
    log_every: int = Settings.log_every,
    keep_checkpoints: int = Settings.keep_checkpoints,
    progress: bool = True,
) -> Run:
    """Train `seeds` independent seeds for `steps` environment steps each, into the folder `out`.

    The same as `qscore train`; see `Settings` for the arguments. Raises `UsageError` for a request
    that cannot be carried out, before anything is written, and `RunStopped` for a run that ends
    early.
    """
    if isinstance(environment, str):
        environment = environment_class(environment)(id=environment)
    settings = _usage(
        lambda: Settings(
            steps, seeds, seed_start, eval_every, eval_episodes, log_every, keep_checkpoints
        )
    )
    rows = environment.num_envs
    if settings.eval_every is None:
        twentieth = max(1, steps // (20 * rows)) * rows
        settings = dataclasses.replace(settings, eval_every=twentieth)
    for name in ("steps", "eval_every", "log_every"):
        if getattr(settings, name) % rows:
            raise UsageError(
                f"`{name}` must be a multiple of `environment.num_envs`, {rows}; "
                f"got {getattr(settings, name)}."
            )
    if out is None:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        task = environment_name(environment).replace("/", "-")
        out = Path("runs") / f"{algorithm_name(algorithm)}-{task}-{stamp}"
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"`out` is {folder}, which exists and is not an empty folder.")
    _usage(environment.open).close()  # what is wrong with it is said before anything is written
    try:
        folder.mkdir(parents=True, exist_ok=True)
        run = Run(folder, algorithm, environment, settings, _versions())
        run.save_config()
    except OSError as error:
        raise UsageError(f"cannot write to `out`, {folder}: {error}.") from error
    _Loop(run, progress=progress).go()
    return run


def resume(folder: str | os.PathLike, *, steps: int | None = None, progress: bool = True) -> Run:
    """Continue a run from its newest intact checkpoint, to `steps` if given.

    Ends bit for bit where the uninterrupted run would have ended. Raises as `train` does.
    """
    run = Run.open(folder)
    if steps is not None:
        done = (checkpoint.steps(run.checkpoints) or [0])[-1]
        if steps < done:
            raise UsageError(f"`steps` is {steps}, but the run has already done {done}.")
        run = dataclasses.replace(run, settings=dataclasses.replace(run.settings, steps=steps))
    differing = [
        f"{name} {old} -> {_versions().get(name)}"
        for name, old in run.versions.items()
        if _versions().get(name) != old
    ]
    loop = _Loop(run, progress=progress)
    if differing:
        loop.bar.warn(f"versions differ, numbers may too: {', '.join(differing)}")
    try:
        loop.restore()
        run.save_config()
    except BaseException:
        loop.close()
        raise
    loop.go()
    return run


class LoadedPolicy:
    """One seed's trained policy: NumPy in, NumPy out, in the environment's own action units."""

    def __init__(self, policy: Policy, agent: Any, low: np.ndarray, high: np.ndarray):
        self._policy, self._read = policy, policy.read(agent)
        self._low, self._high = low, high

    def init_carry(self) -> Carry:
        """What the policy remembers at the start of an episode."""
        return self._policy.init_carry()

    def __call__(self, obs: np.ndarray, carry: Carry, *, key: Key) -> tuple[np.ndarray, Carry]:
        """The action for one flat observation. Raises `ValueError` for one of the wrong shape."""
        obs = np.asarray(obs, np.float32)
        if obs.shape != (self._policy.spec.obs_size,):
            raise ValueError(
                f"`obs` must have shape ({self._policy.spec.obs_size},), got {obs.shape}."
            )
        action, carry = self._policy(self._read, carry, obs[None], key, 0)
        return self._low + (action[0] + 1.0) / 2.0 * (self._high - self._low), carry


def load(folder: str | os.PathLike, *, seed: int | None = None) -> LoadedPolicy:
    """The policy of one seed (the first unless given) at a run's newest intact checkpoint."""
    run = Run.open(folder)
    seed = run.settings.seed_start if seed is None else seed
    task = run.environment.open()
    agents = _load_agents(run, task.spec, [seed])
    low, high = task.action_bounds
    task.close()
    return LoadedPolicy(evaluation_policy(run.algorithm, task.spec, rows=1), agents[seed], low, high)


def evaluate(
    folder: str | os.PathLike,
    *,
    episodes: int = Settings.eval_episodes,
    seed: int = 0,
    best_of: int = 1,
    video: str | os.PathLike | None = None,
) -> dict[str, Any]:
    """Evaluate every seed of a run at its newest intact checkpoint, and film one episode.

    `returns` and `lengths` list `episodes` episodes per trained seed, in the order of `seeds`;
    the episodes' starts come from `seed`. The result is that of `qscore eval --json`.
    """
    run = Run.open(folder)
    if episodes < 1:
        raise UsageError(f"`episodes` must be at least 1, got {episodes}.")
    if seed < 0:
        raise UsageError(f"`seed` must be at least 0, got {seed}.")
    if video is not None and Path(video).suffix not in (".mp4", ".gif"):
        raise UsageError(f"`video` must end in .mp4 or .gif, got {str(video)!r}.")
    if best_of != 1:  # refused before anything is opened
        _usage(lambda: with_best_of(run.algorithm, best_of))
    task = run.environment.open()
    tasks = [task] + [
        run.environment.open() for _ in range(min(episodes, train_host.EVAL_ROWS) - 1)
    ]
    seeds = run.settings.seed_list
    agents = _load_agents(run, task.spec, seeds)

    def play(best_of: int) -> tuple[list[list[float]], list[list[int]]]:
        policy = evaluation_policy(run.algorithm, task.spec, best_of=best_of)
        results = [
            train_host.evaluate(policy, agents[s], tasks, episodes=episodes, seed=seed)
            for s in seeds
        ]
        return [returns for returns, _ in results], [lengths for _, lengths in results]

    per_seed, lengths = play(1)
    flat = [value for returns in per_seed for value in returns]
    result = {
        "returns": flat,
        "lengths": [value for row in lengths for value in row],
        "mean": float(np.mean(flat)),
        **summarize(per_seed),
        "episodes": episodes,
        "seed": seed,
        "seeds": seeds,
    }
    if best_of != 1:
        result["best_of"] = best_of
        result["returns_best_of"] = [value for returns in play(best_of)[0] for value in returns]
    for each in tasks:
        each.close()
    if video is not None:
        policy = evaluation_policy(run.algorithm, task.spec, best_of=best_of)
        _film(run, policy, agents[seeds[0]], seed, Path(video))
    return result


def environment_name(environment: Environment) -> str:
    """The name the command line knows an environment by."""
    return getattr(environment, "id", type(environment).__name__.lower())


class _Loop:
    """The loop of one run over all its seeds, one thread each."""

    def __init__(self, run: Run, *, progress: bool):
        self.run, settings = run, run.settings
        self.env_steps = 0
        self.seconds = 0.0  # of training, over every sitting
        self.log: RunLog | None = None
        self.saturation_warned = False
        self.plotted = -math.inf
        try:
            self.sessions = [
                Session(
                    run.algorithm,
                    run.environment,
                    seed,
                    steps=settings.steps,
                    eval_episodes=settings.eval_episodes,
                )
                for seed in settings.seed_list
            ]
        except EnvironmentFailure as error:
            raise RunStopped(f"the environment failed before training began: {error}") from error
        label = f"{algorithm_name(run.algorithm)} on {environment_name(run.environment)}"
        self.bar = ProgressBar(label, settings.steps, enabled=progress)

    def restore(self) -> None:
        """Go back to the newest intact checkpoint; to the start where there is none."""
        folder = self.run.checkpoints
        found = checkpoint.newest(folder, self.bar.warn)
        if found is None:
            if checkpoint.steps(folder):
                raise RunStopped(f"no checkpoint in {folder} is intact; the run cannot be resumed.")
            return
        path, header = found
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

    def go(self) -> None:
        """From wherever the sessions are to the end."""
        try:
            with _interruptible() as interrupted, ThreadPoolExecutor(len(self.sessions)) as pool:
                self._loop(pool, interrupted)
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

    def _loop(self, pool: ThreadPoolExecutor, interrupted: Callable[[], bool]) -> None:
        settings = self.run.settings
        eval_every = settings.eval_every
        assert eval_every is not None  # `train` fills it
        if self.log is None:
            self.log = RunLog(self.run.folder)
            self._checkpoint()
        clock = time.perf_counter()
        while self.env_steps < settings.steps:
            milestones = (settings.log_every, eval_every)
            until = min(settings.steps, *((self.env_steps // n + 1) * n for n in milestones))
            list(pool.map(lambda session: session.advance(until), self.sessions))
            done = self.sessions[0].env_steps
            clock, taken = time.perf_counter(), time.perf_counter() - clock
            self.seconds += taken
            self.bar.update(done, (done - self.env_steps) * len(self.sessions) / taken)
            self.env_steps = done

            finished = done == settings.steps
            if done % settings.log_every == 0 or finished:
                self._log_metrics()
            if done % eval_every == 0 or finished:
                self._evaluate(pool)
            if done % eval_every == 0 or finished or interrupted():
                self._checkpoint()
            clock, taken = time.perf_counter(), time.perf_counter() - clock
            self.seconds += taken
            if interrupted() and not finished:
                raise Interrupted(
                    f"interrupted at {done} of {settings.steps} steps, checkpoint written; "
                    f"continue with: qscore resume {self.run.folder}"
                )

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
            saturation = metrics.get("action_saturation", 0.0)
            if saturation > SATURATION_WARNING and not self.saturation_warned:
                self.saturation_warned = True
                self.bar.warn(
                    f"seed {session.seed}: {saturation:.0%} of the policy's actions lie at their "
                    "bounds; the score is too large for its scale (a smaller score_scale or a "
                    "larger temperature would help)."
                )

    def _evaluate(self, pool: ThreadPoolExecutor) -> None:
        assert self.log is not None
        results = list(pool.map(lambda session: session.evaluate(0), self.sessions))
        for session, (returns, lengths) in zip(self.sessions, results, strict=True):
            self.log.evaluation(
                {
                    "seed": session.seed,
                    "env_steps": self.env_steps,
                    "seconds": round(self.seconds, 3),
                    "returns": returns,
                    "lengths": lengths,
                }
            )
        self.bar.note("return " + " ".join(f"{np.mean(returns):.0f}" for returns, _ in results))
        if time.monotonic() - self.plotted > PLOT_SECONDS or self.env_steps == self.run.settings.steps:
            plot_run(self.run)
            self.plotted = time.monotonic()

    def _checkpoint(self) -> None:
        assert self.log is not None
        snapshots = {session.seed: session.snapshot() for session in self.sessions}
        header = {
            "seconds": self.seconds,
            "offsets": self.log.offsets(),
            "seeds": {str(seed): counters for seed, (counters, _) in snapshots.items()},
        }
        checkpoint.save(
            self.run.checkpoints,
            self.env_steps,
            header,
            {seed: arrays for seed, (_, arrays) in snapshots.items()},
            keep=self.run.settings.keep_checkpoints,
        )

    def _last_good(self) -> str:
        steps = checkpoint.steps(self.run.checkpoints)
        if not steps:
            return "No checkpoint had been written yet."
        return f"The last good checkpoint is {self.run.checkpoints / str(steps[-1])}."

    def _summarize(self) -> None:
        curves = read_evals(self.run.folder)
        last = [curves[session.seed][self.env_steps] for session in self.sessions]
        seeds = len(self.sessions)
        summary = {
            "algorithm": algorithm_name(self.run.algorithm),
            "environment": environment_name(self.run.environment),
            "seeds": [session.seed for session in self.sessions],
            "env_steps": self.env_steps,
            "final_returns": [float(np.mean(returns)) for returns in last],
            **summarize(last),
            "seconds": round(self.seconds, 3),
            "env_steps_per_second": self.env_steps * seeds / self.seconds,
            "updates_per_second": sum(session.updates for session in self.sessions) / self.seconds,
        }
        write_json(self.run.folder / "summary.json", summary)


def plot_run(run: Run) -> None:
    """Redraw plots/returns.png."""
    label = f"{algorithm_name(run.algorithm)}, {environment_name(run.environment)}"
    plot_returns({label: read_evals(run.folder)}, run.folder / "plots" / "returns.png")


def write_json(path: Path, value: Any) -> None:
    """Write a small JSON file as a whole: never half of it, whenever the process dies."""
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(value, indent=2) + "\n")
    scratch.replace(path)


def _load_agents(run: Run, spec: Spec, seeds: list[int]) -> dict[int, Any]:
    """The agents of some seeds at the newest intact checkpoint."""
    for seed in seeds:
        if seed not in run.settings.seed_list:
            known = ", ".join(map(str, run.settings.seed_list))
            raise UsageError(f"{run.folder} has no seed {seed}; it has {known}.")
    found = checkpoint.newest(run.checkpoints, lambda text: print(f"warning: {text}", file=sys.stderr))
    if found is None:
        raise UsageError(f"{run.folder} has no intact checkpoint.")
    skeleton = {"agent": train_host.agent_shapes(run.algorithm, spec)}
    try:
        return {
            seed: jax.tree.map(jnp.asarray, checkpoint.load(found[0], seed, skeleton)["agent"])
            for seed in seeds
        }
    except checkpoint.CorruptCheckpoint as error:
        raise UsageError(str(error)) from error


def _film(run: Run, policy: Policy, agent: Any, seed: int, path: Path) -> None:
    """One evaluation episode as an mp4 or gif, at the environment's own speed."""
    task = _usage(lambda: run.environment.open(render=True))
    frames: list[np.ndarray] = []
    try:
        train_host.evaluate(
            policy, agent, [task], episodes=1, seed=seed, watch=lambda t: frames.append(t.render())
        )
    except EnvironmentFailure as error:
        raise UsageError(
            f"cannot film {environment_name(run.environment)}: {error} Rendering MuJoCo without a "
            "screen needs EGL or OSMesa (on Debian: apt-get install libegl1 libgl1)."
        ) from error
    finally:
        task.close()
    rate = 1.0 / policy.spec.dt
    keep = max(1, math.ceil(rate / MAX_FRAME_RATE))  # frames beyond the eye's are left out
    path.parent.mkdir(parents=True, exist_ok=True)
    kwargs: dict[str, Any] = {"fps": rate / keep, "macro_block_size": 2}
    if path.suffix == ".gif":
        kwargs = {"duration": 1000 * keep / rate, "loop": 0}
    with warnings.catch_warnings():  # JAX's of the fork that starts ffmpeg: the child runs no JAX
        warnings.simplefilter("ignore", RuntimeWarning)
        imageio.mimwrite(path, frames[::keep], **kwargs)  # pyright: ignore[reportArgumentType]


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Turn the first SIGINT or SIGTERM into a flag; the second one acts as usual."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set  # only the main thread may handle signals
        return
    usual = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handler(number: int, frame: Any) -> None:
        asked.set()
        for each, old in usual.items():
            signal.signal(each, old)

    for number in usual:
        signal.signal(number, handler)
    try:
        yield asked.is_set
    finally:
        for number, old in usual.items():
            signal.signal(number, old)


def _usage(function: Callable[[], T]) -> T:
    """Call, turning a `ValueError` into a `UsageError`."""
    try:
        return function()
    except ValueError as error:
        raise UsageError(str(error)) from error


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}


def _versions() -> dict[str, str]:
    packages = ("qscore", "jax", "jaxlib", "equinox", "optax", "numpy", "gymnasium", "mujoco")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}
