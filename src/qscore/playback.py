"""Using a finished run: evaluate its policies, film them, load them."""

import contextlib
import itertools
import math
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import imageio.v2 as imageio
import jax
import jax.numpy as jnp
import numpy as np

from qscore import checkpoint, datasets, train_host
from qscore.algorithms import algorithm_name
from qscore.environments import EnvironmentFailure
from qscore.environments.base import Episodic, Step
from qscore.errors import RunStopped, UsageError
from qscore.folder import Run, Settings, as_usage_error
from qscore.statistics import summarize
from qscore.train_host import Observer, Policy, evaluation_policy, exploration_policy, with_best_of
from qscore.types import Carry, Key, Spec, Transition

MAX_FRAME_RATE = 50
"""Frames per second of a video at most."""


class LoadedPolicy:
    """One seed's trained policy: NumPy in, NumPy out, in the environment's own action units.

    The carry is opaque: pass on what the last call returned. Noise comes from `key` alone, so fold
    the step into it; the same key repeats the noise.
    """

    def __init__(self, policy: Policy, agent: Any, low: np.ndarray, high: np.ndarray):
        self._policy, self._read = policy, policy.read(agent)
        self._low, self._high = low, high

    def init_carry(self) -> Carry:
        """What the policy remembers at the start of an episode."""
        return self._policy.init_carry()

    def __call__(self, obs: np.ndarray, carry: Carry, *, key: Key) -> tuple[np.ndarray, Carry]:
        """The action for one flat observation.

        Raises `ValueError` for one of the wrong shape, and where `key` is no key of JAX.
        """
        obs = np.asarray(obs, np.float32)
        if obs.shape != (self._policy.spec.obs_size,):
            raise ValueError(
                f"`obs` must have shape ({self._policy.spec.obs_size},), got {obs.shape}."
            )
        if not jax.dtypes.issubdtype(getattr(key, "dtype", None), jax.dtypes.prng_key):
            raise ValueError(f"`key` is {key!r}; it must be a key of JAX: jax.random.key(0).")
        action, carry = self._policy(self._read, carry, obs[None], key, 0)
        return self._low + (action[0] + 1.0) / 2.0 * (self._high - self._low), carry


def load(
    folder: str | os.PathLike, *, seed: int | None = None, explore: bool = False
) -> LoadedPolicy:
    """The policy of one seed (the first unless given) at a run's newest intact checkpoint.

    As it is evaluated, or with `explore` as it acts in training.
    """
    run = Run.open(folder)
    seed = run.settings.seed_start if seed is None else seed
    task = as_usage_error(run.environment.open)
    try:
        _, agents = load_agents(run, task.spec, [seed])
        low, high = task.action_bounds
    finally:
        task.close()
    kind = exploration_policy if explore else evaluation_policy
    return LoadedPolicy(kind(run.algorithm, task.spec, rows=1), agents[seed], low, high)


def evaluate(
    folder: str | os.PathLike,
    *,
    episodes: int = Settings.eval_episodes,
    seed: int = 0,
    best_of: int = 1,
    video: str | os.PathLike | None = None,
    record: str | os.PathLike | None = None,
    random_share: float = 0.0,
    noise: float = 0.0,
    explore: bool = False,
) -> dict[str, Any]:
    """Evaluate every seed of a run at its newest intact checkpoint; film one episode, record all.

    `returns` and `lengths` list `episodes` episodes per trained seed, in the order of `seeds`;
    the episodes' starts come from `seed`. The result is that of `qscore eval --json`.

    `record` names a data set (.npz) to write the episodes to. The last three arguments belong to
    it: a share of the episodes, in [0, 1], with uniformly random actions in place of the policy's;
    the standard deviation of Gaussian noise on the other episodes' actions, in [0, inf), in half
    action ranges; and whether the policy explores. The returns are then those of the recording.
    """
    run = Run.open(folder)
    if episodes < 1:
        raise UsageError(f"`episodes` must be at least 1, got {episodes}.")
    if not 0 <= seed < 2**32:
        raise UsageError(f"`seed` must lie in [0, 2^32), got {seed}.")
    if video is not None and Path(video).suffix not in (".mp4", ".gif"):
        raise UsageError(f"`video` must end in .mp4 or .gif, got {str(video)!r}.")
    if record is None and (random_share, noise, explore) != (0.0, 0.0, False):
        raise UsageError("`random_share`, `noise` and `explore` shape a recording: give `record`.")
    recorder = None
    if record is not None:
        recorder = _recorder(Path(record), random_share, noise, best_of, starts=seed)
    if best_of != 1:  # refused before anything is opened
        as_usage_error(lambda: with_best_of(run.algorithm, best_of))
    task = as_usage_error(run.environment.open)
    tasks, seeds = [task], run.settings.seed_list

    def play(best_of: int) -> tuple[list[list[float]], list[list[int]]]:
        policy = (
            exploration_policy(run.algorithm, task.spec, train_host.EVAL_ROWS)
            if explore
            else evaluation_policy(run.algorithm, task.spec, best_of=best_of)
        )
        results = []
        for s in seeds:
            if recorder is not None:
                recorder.begin_policy(s)
            results.append(
                train_host.evaluate(
                    policy, agents[s], tasks, episodes=episodes, seed=seed, observer=recorder
                )
            )
        return [returns for returns, _ in results], [lengths for _, lengths in results]

    try:
        _, agents = load_agents(run, task.spec, seeds)
        tasks += [run.environment.open() for _ in range(min(episodes, train_host.EVAL_ROWS) - 1)]
        if video is not None:  # first: what cannot be filmed is said before the long part
            policy = evaluation_policy(run.algorithm, task.spec, best_of=best_of)
            _film(run, policy, agents[seeds[0]], seed, Path(video))
        per_seed, lengths = play(1)
        best = play(best_of)[0] if best_of != 1 else []
    except EnvironmentFailure as error:
        raise RunStopped(f"the environment failed: {error}") from error
    finally:
        for each in tasks:
            each.close()
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
        result["returns_best_of"] = [value for returns in best for value in returns]
    if names := datasets.references(run.environment):
        result["normalized"] = {
            name: datasets.normalized(result["mean"], reference)
            for name, reference in names.items()
        }
    if recorder is not None:
        low, high = task.action_bounds
        about = {
            "environment": run.environment.id,
            "action_low": low.tolist(),
            "action_high": high.tolist(),
            "made_by": {
                "algorithm": algorithm_name(run.algorithm),
                "seeds": seeds,
                "episode_starts": seed,
                "random_share": random_share,
                "noise": noise,
                "explore": explore,
            },
        }
        rows, truncated = recorder.rows()
        try:
            datasets.save(recorder.path, rows, truncated, about)
        except OSError as error:
            raise UsageError(f"cannot write to `record`, {recorder.path}: {error}.") from error
        result["recorded"] = {"dataset": str(recorder.path), "steps": len(truncated)}
    return result


def load_agents(run: Run, spec: Spec, seeds: list[int]) -> tuple[int, dict[int, Any]]:
    """The newest intact checkpoint's environment steps, and the agents of some seeds at it."""
    for seed in seeds:
        if seed not in run.settings.seed_list:
            known = ", ".join(map(str, run.settings.seed_list))
            raise UsageError(f"{run.folder} has no seed {seed}; it has {known}.")
    found = checkpoint.newest(
        run.checkpoints, lambda text: print(f"warning: {text}", file=sys.stderr)
    )
    if found is None:
        raise UsageError(f"{run.folder} has no intact checkpoint.")
    skeleton = {"agent": train_host.agent_shapes(run.algorithm, spec)}
    try:
        return found[1]["env_steps"], {
            seed: jax.tree.map(jnp.asarray, checkpoint.load(found[0], seed, skeleton)["agent"])
            for seed in seeds
        }
    except FileNotFoundError:
        if found[0].is_dir():
            raise
        return load_agents(run, spec, seeds)  # a training has replaced it meanwhile
    except checkpoint.CorruptCheckpoint as error:
        raise UsageError(str(error)) from error


class Recorder(Observer):
    """Keeps every step of an evaluation, and disturbs it as asked."""

    def __init__(self, path: Path, random_share: float, noise: float, *, starts: int):
        self.path, self.random_share, self.noise, self.starts = path, random_share, noise, starts
        self._seed = 0
        self._draws: dict[int, np.random.Generator] = {}  # of the running episodes
        # rows of an episode, by trained seed and number: time, observation, action, step
        self._rows: dict[tuple[int, int], list[tuple[float, np.ndarray, np.ndarray, Step]]] = {}

    def begin_policy(self, seed: int) -> None:
        """What follows is played by the policy of another trained seed."""
        self._seed = seed

    def began(self, episode: int, task: Episodic) -> None:
        """No row yet, and draws of its own."""
        self._draws[episode] = np.random.default_rng([self.starts, self._seed, episode])
        self._rows[self._seed, episode] = []

    def disturb(self, episode: int, action: np.ndarray) -> np.ndarray:
        """The policy's action, with noise, or in a random episode a uniform one."""
        draws = self._draws[episode]
        if self._random_among(episode + 1) > self._random_among(episode):
            return draws.uniform(-1.0, 1.0, action.shape).astype(np.float32)
        if self.noise == 0.0:
            return action
        noisy = action + self.noise * draws.standard_normal(action.shape)
        return np.clip(noisy, -1.0, 1.0).astype(np.float32)

    def _random_among(self, episodes: int) -> int:
        """How many of the first episodes are random: their share, rounded, so spread evenly."""
        return math.floor(episodes * self.random_share + 0.5)

    def stepped(
        self, episode: int, task: Episodic, obs: np.ndarray, action: np.ndarray, step: Step
    ) -> None:
        """One more row."""
        rows = self._rows[self._seed, episode]
        time = rows[-1][0] + rows[-1][3].dt if rows else 0.0
        rows.append((time, obs, np.array(action), step))

    def rows(self) -> tuple[Transition, np.ndarray]:
        """Everything recorded, episode after episode, and which rows a time limit cut."""
        rows = itertools.chain.from_iterable(self._rows[key] for key in sorted(self._rows))
        time, obs, action, steps = zip(*rows, strict=True)
        next_obs, reward, terminated, truncated, dt = zip(*steps, strict=True)
        transitions = Transition(
            obs=np.stack(obs),
            action=np.stack(action),
            reward=np.array(reward, np.float32),
            next_obs=np.stack(next_obs),
            terminated=np.array(terminated),
            time=np.array(time, np.float32),
            dt=np.array(dt, np.float32),
        )
        return transitions, np.array(truncated)


def _recorder(
    path: Path, random_share: float, noise: float, best_of: int, *, starts: int
) -> Recorder:
    if path.suffix != ".npz":
        raise UsageError(f"`record` must end in .npz, got {str(path)!r}.")
    if path.exists():
        raise UsageError(f"`record` is {path}, which exists.")
    if not 0.0 <= random_share <= 1.0:
        raise UsageError(f"`random_share` must lie in [0, 1], got {random_share}.")
    if not 0.0 <= noise < math.inf:
        raise UsageError(f"`noise` must lie in [0, inf), got {noise}.")
    if best_of != 1:
        raise UsageError(f"`best_of` is {best_of}; a recording is of the policy itself, with 1.")
    try:  # before hours of playing
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        path.unlink()
    except OSError as error:
        raise UsageError(f"cannot write to `record`, {path}: {error}.") from error
    return Recorder(path, random_share, noise, starts=starts)


class Camera(Observer):
    """Films every step of an evaluation."""

    def __init__(self):
        self.frames: list[Any] = []

    def began(self, episode: int, task: Episodic) -> None:
        """The first frame."""
        self.frames.append(task.render())

    def stepped(
        self, episode: int, task: Episodic, obs: np.ndarray, action: np.ndarray, step: Step
    ) -> None:
        """One more frame."""
        self.frames.append(task.render())


def film(run: Run, path: Path, *, seed: int) -> None:
    """Film the first evaluation episode of a trained seed at the newest intact checkpoint.

    `path` ends in .mp4 or .gif. Raises `UsageError` where there is no checkpoint or no picture.
    """
    task = as_usage_error(run.environment.open)
    task.close()
    _, agents = load_agents(run, task.spec, [seed])
    _film(run, evaluation_policy(run.algorithm, task.spec), agents[seed], 0, path)


def _film(run: Run, policy: Policy, agent: Any, seed: int, path: Path) -> None:
    """One evaluation episode as an mp4 or gif, at the environment's own speed."""
    task = as_usage_error(lambda: run.environment.open(render=True))
    camera = Camera()
    try:
        train_host.evaluate(policy, agent, [task], episodes=1, seed=seed, observer=camera)
    except EnvironmentFailure as error:
        raise UsageError(f"cannot film {run.environment.id}: {error}") from error
    finally:
        task.close()
    rate = 1.0 / policy.spec.dt
    keep = max(1, math.ceil(rate / MAX_FRAME_RATE))  # frames beyond the eye's are left out
    kwargs: dict[str, Any] = {"fps": rate / keep, "macro_block_size": 2}
    if path.suffix == ".gif":
        kwargs = {"duration": 1000 * keep / rate, "loop": 0}
    scratch = path.with_stem(f".{path.stem}")  # what is there stays until there is another
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        open(scratch, "wb").close()  # what refuses says it better than ffmpeg
        with warnings.catch_warnings():  # JAX's of the fork that starts ffmpeg: it runs no JAX
            warnings.simplefilter("ignore", RuntimeWarning)
            imageio.mimwrite(scratch, camera.frames[::keep], **kwargs)  # pyright: ignore[reportCallIssue]
        scratch.replace(path)
    except OSError as error:
        raise UsageError(f"cannot write to `video`, {path}: {error}.") from error
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink()
