"""Using a finished run: evaluate its policies, film them, load them."""

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

from qscore import checkpoint, train_host
from qscore.environments import EnvironmentFailure
from qscore.errors import RunStopped, UsageError
from qscore.folder import Run, Settings, as_usage_error, environment_name
from qscore.statistics import summarize
from qscore.train_host import Policy, evaluation_policy, with_best_of
from qscore.types import Carry, Key, Spec

MAX_FRAME_RATE = 50
"""Frames per second of a video at most."""


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
    task = as_usage_error(run.environment.open)
    agents = _load_agents(run, task.spec, [seed])
    low, high = task.action_bounds
    task.close()
    return LoadedPolicy(
        evaluation_policy(run.algorithm, task.spec, rows=1), agents[seed], low, high
    )


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
        as_usage_error(lambda: with_best_of(run.algorithm, best_of))
    task = as_usage_error(run.environment.open)
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

    try:
        per_seed, lengths = play(1)
        best = play(best_of)[0] if best_of != 1 else []
    except EnvironmentFailure as error:
        raise RunStopped(f"the environment failed: {error}") from error
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
    for each in tasks:
        each.close()
    if video is not None:
        policy = evaluation_policy(run.algorithm, task.spec, best_of=best_of)
        _film(run, policy, agents[seeds[0]], seed, Path(video))
    return result


def _load_agents(run: Run, spec: Spec, seeds: list[int]) -> dict[int, Any]:
    """The agents of some seeds at the newest intact checkpoint."""
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
        return {
            seed: jax.tree.map(jnp.asarray, checkpoint.load(found[0], seed, skeleton)["agent"])
            for seed in seeds
        }
    except checkpoint.CorruptCheckpoint as error:
        raise UsageError(str(error)) from error


def _film(run: Run, policy: Policy, agent: Any, seed: int, path: Path) -> None:
    """One evaluation episode as an mp4 or gif, at the environment's own speed."""
    task = as_usage_error(lambda: run.environment.open(render=True))
    frames: list[Any] = []
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
        imageio.mimwrite(path, frames[::keep], **kwargs)  # pyright: ignore[reportCallIssue]
