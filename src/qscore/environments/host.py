"""Environments that run on the host: any Gymnasium id, and dm_control through shimmy.

Episodes are reset explicitly and with a seed of their own, never by a wrapper behind our back: the
observation before a reset is then always at hand for bootstrapping, and an episode can be
restored anywhere from its seed and its actions.
"""

import contextlib
import ctypes.util
import dataclasses
import difflib
import functools
import importlib.util
import io
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import gymnasium as gym
import numpy as np
import tyro

from qscore.config import Range, validate
from qscore.environments.base import EnvironmentFailure, Step
from qscore.errors import how_to_install
from qscore.types import Spec

ACTION_RANGE = (np.float32(-1.0), np.float32(1.0))
MAX_CLOSEST = 3
DEFAULT_LIMIT = 1000
"""Time limit in steps of a task that has none: an evaluation must end."""


@dataclass(frozen=True)
class Host:
    """A Gymnasium or dm_control task with Box observations and actions."""

    id: tyro.conf.Suppress[str]  # positional on the command line
    """Gymnasium id, such as `HalfCheetah-v5`, or `dm_control/<domain>-<task>-v0`."""
    num_envs: Annotated[int, Range(1, 4096)] = 1
    """Copies that collect experience side by side, in [1, 4096]."""
    dt: Annotated[float | None, Range(0, low_open=True)] = None
    """Control step in seconds, in (0, inf): a multiple of the physics step of a MuJoCo task. The
    reward is scaled by dt over the task's own step and the time limit keeps its seconds, so that
    returns compare across steps. None is the task's own step, the only one other tasks allow."""

    max_episode_steps: Annotated[int | None, Range(1)] = None
    """Steps until an episode is cut, in [1, inf); dm_control never runs past its own limit. None is
    the task's own, or 1000 where it has none. The state at the cut keeps its value: a time limit
    is not a termination."""

    def __post_init__(self):
        validate(self)

    def open(self, *, render: bool = False) -> "HostTask":
        """Start one copy of the task.

        Raises `ValueError` for an unknown id (with the closest known ones), for spaces that are not
        Box, for a step the task cannot take, and for an extra that is not installed.
        """
        return HostTask(self, "rgb_array" if render else None)


class HostTask:
    """One running copy: flat float32 observations, actions in [-1, 1], errors with a name."""

    def __init__(self, config: Host, render_mode: str | None):
        self.name = config.id
        env = _make(config, render_mode)
        try:
            native_dt = dt = _control_step(env)
            if config.dt is not None and not math.isclose(config.dt, native_dt):
                env = _set_dt(env, config, native_dt, render_mode)
                dt = _control_step(env)
            _check_spaces(config.id, env)
        except ValueError:
            env.close()
            raise
        self._reward_scale = dt / native_dt
        limit = _time_limit(env)
        self.limited = limit is None
        """Whether the time limit is ours, for the task has none."""
        if limit is None:
            limit = DEFAULT_LIMIT
            env = gym.wrappers.TimeLimit(env, limit)
        self.flattened = len(env.observation_space.shape or ()) != 1
        """Whether its own observations are no vectors."""
        space: Any = env.action_space
        self.action_shape: tuple[int, ...] = space.shape
        """Of its own actions."""
        self.action_bounds = (space.low.ravel(), space.high.ravel())
        with warnings.catch_warnings():  # of casting bounds of -1 and 1 to float32
            warnings.simplefilter("ignore")
            env = gym.wrappers.FlattenObservation(gym.wrappers.RescaleAction(env, *ACTION_RANGE))
        self._env = env
        self.spec = Spec(
            obs_size=env.observation_space.shape[0],  # pyright: ignore[reportOptionalSubscript]
            action_size=int(np.prod(self.action_shape)),
            dt=dt,
            horizon=limit * dt,
        )

    def reset(self, seed: int) -> np.ndarray:
        """Begin the episode that belongs to `seed`."""
        obs, _ = self._call("reset", lambda: self._env.reset(seed=seed))
        return self._checked(obs)

    def step(self, action: np.ndarray) -> Step:
        """Advance by one control step under an action in [-1, 1]."""
        action = np.asarray(action, np.float32).reshape(self.action_shape)
        obs, reward, terminated, truncated, _ = self._call("step", lambda: self._env.step(action))
        try:
            reward = np.asarray(reward, np.float64).item() * self._reward_scale
        except (TypeError, ValueError) as error:
            raise EnvironmentFailure(
                f"{self.name} returned the reward {reward!r}; it must be one number."
            ) from error
        if not np.isfinite(reward):
            raise EnvironmentFailure(f"{self.name} returned the reward {reward}.")
        # an episode that ends both ways is over: the state is final
        cut = bool(truncated and not terminated)
        return Step(self._checked(obs), reward, bool(terminated), cut, self.spec.dt)

    def render(self) -> np.ndarray:
        """The current frame, `uint8[height, width, 3]`."""
        try:
            return np.asarray(self._call("render", self._env.render))
        except EnvironmentFailure as error:
            if not (self.name.startswith("dm_control/") or hasattr(self._env.unwrapped, "model")):
                raise
            raise EnvironmentFailure(
                f"{error} Rendering MuJoCo without a screen needs EGL or OSMesa (on Debian: "
                "apt-get install libegl1 libgl1)."
            ) from error

    def close(self) -> None:
        """Free the task's resources."""
        with contextlib.suppress(Exception):
            self._env.close()

    def _call(self, verb: str, function: Any) -> Any:
        try:
            return function()
        except Exception as error:
            raise EnvironmentFailure(
                f"{self.name} raised in {verb}: {type(error).__name__}: {error}"
            ) from error

    def _checked(self, obs: Any) -> np.ndarray:
        try:
            obs = np.asarray(obs, np.float32)
        except (TypeError, ValueError) as error:
            raise EnvironmentFailure(
                f"{self.name} returned an observation that is no array of numbers: {error}."
            ) from error
        if obs.shape != (self.spec.obs_size,):
            raise EnvironmentFailure(
                f"{self.name} returned an observation of {obs.size} numbers, and says that it has "
                f"{self.spec.obs_size}."
            )
        if not np.isfinite(obs).all():
            bad = np.flatnonzero(~np.isfinite(obs))
            raise EnvironmentFailure(
                f"{self.name} returned an observation with {len(bad)} non-finite components, "
                f"the first at index {bad[0]}: {obs[bad[0]]}."
            )
        return obs


def known_ids() -> list[str]:
    """Every Gymnasium id at hand, the newest version of each task; dm_control's where installed."""
    _register_dm_control()
    newest: dict[str, tuple[int, str]] = {}
    for id, spec in gym.registry.items():
        stem = f"{spec.namespace}/{spec.name}" if spec.namespace else spec.name
        newest[stem] = max(newest.get(stem, (-1, "")), (spec.version or 0, id))
    return sorted(id for _, id in newest.values())


def _make(config: Host, render_mode: str | None) -> gym.Env:
    id, kwargs = config.id, {}
    if config.max_episode_steps is not None:
        kwargs["max_episode_steps"] = config.max_episode_steps
    if render_mode is not None:  # not every task takes the argument
        kwargs["render_mode"] = render_mode
    if id.startswith("dm_control/"):
        for module in ("dm_control", "shimmy"):
            if importlib.util.find_spec(module) is None:
                raise ValueError(f"{id!r} needs the package {module}: {how_to_install('dmc')}")
        _register_dm_control()
    with _quiet():
        try:
            env = gym.make(id, **kwargs)
        except gym.error.Error as error:
            if id in gym.registry:
                raise ValueError(f"cannot make {id!r}: {error}") from error
            closest = difflib.get_close_matches(id, known_ids(), MAX_CLOSEST, cutoff=0.5)
            hint = f" The closest are {', '.join(closest)}." if closest else ""
            raise ValueError(
                f"unknown environment {id!r}.{hint} `qscore list environments` shows them all."
            ) from error
        except ImportError as error:
            raise ValueError(
                f"{id!r} needs a package that is not installed: {error}. "
                "Install it, for example: pip install 'gymnasium[all]'."
            ) from error
        except Exception as error:
            raise ValueError(f"cannot make {id!r}: {type(error).__name__}: {error}") from error
    if env.spec is not None and env.spec.id != id.rpartition(":")[2]:
        env.close()
        raise ValueError(
            f"{id!r} names no version, so it may be another task one day. Today it is "
            f"{env.spec.id!r}."
        )
    return env


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence what importing and making tasks says: missing displays, deprecated model fields."""
    absl, level = logging.getLogger("absl"), logging.getLogger("absl").level
    _draw_off_screen()
    import mujoco  # late: it picks its renderer at import

    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        absl.setLevel(logging.ERROR)
        mujoco.set_mju_user_warning(lambda message: None)  # pyright: ignore[reportAttributeAccessIssue]
        try:
            yield
        finally:
            mujoco.set_mju_user_warning(None)  # pyright: ignore[reportAttributeAccessIssue]
            absl.setLevel(level)


@functools.cache  # looking for a library starts programs, which would take as long as a task
def _draw_off_screen() -> None:
    """Without a screen, the renderer that MuJoCo and pygame would pick fails: name another."""
    if sys.platform == "linux" and not os.environ.get("DISPLAY"):
        for renderer, library in (("egl", "EGL"), ("osmesa", "OSMesa")):
            if ctypes.util.find_library(library):
                os.environ.setdefault("MUJOCO_GL", renderer)
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")


def _register_dm_control() -> None:
    if importlib.util.find_spec("shimmy") and importlib.util.find_spec("dm_control"):
        with _quiet():
            import shimmy

            gym.register_envs(shimmy)


def _check_spaces(id: str, env: gym.Env) -> None:
    action = env.action_space
    if not isinstance(action, gym.spaces.Box):
        raise ValueError(
            f"{id!r} has the action space {action}; a score policy needs a Box of real numbers."
        )
    if not np.issubdtype(action.dtype, np.floating):
        raise ValueError(
            f"{id!r} has actions of {action.dtype}, {action}; a score policy needs real numbers."
        )
    if not (np.isfinite(action.low).all() and np.isfinite(action.high).all()):
        raise ValueError(
            f"{id!r} has unbounded actions, {action}; they cannot be scaled to [-1, 1]."
        )
    if (action.low >= action.high).any():
        raise ValueError(
            f"{id!r} has an action component with nothing to choose, {action}; its lower bounds "
            "must be below its upper ones."
        )
    obs = env.observation_space
    parts = list(obs.spaces.values()) if isinstance(obs, gym.spaces.Dict) else [obs]
    if not all(isinstance(part, gym.spaces.Box) for part in parts):
        raise ValueError(
            f"{id!r} has the observation space {obs}; it must be a Box, or a Dict of them."
        )


def _time_limit(env: gym.Env) -> int | None:
    """Steps until an episode is cut, or None; dm_control states its own in other places."""
    control: Any = getattr(env.unwrapped, "_env", None)
    own = getattr(control, "_step_limit", None)
    if own is None and hasattr(control, "_time_limit"):  # a composer's, in seconds
        own = control._time_limit / control.control_timestep()
    limits = [env.spec.max_episode_steps if env.spec else None, own]
    known = [round(limit) for limit in limits if limit is not None and np.isfinite(limit)]
    return min(known, default=None)


def _control_step(env: gym.Env) -> float:
    """The control step in seconds: the task's `dt`, else a frame of its video, else 1."""
    dt: Any = getattr(env.unwrapped, "dt", None)
    if dt is None:
        return 1.0 / (env.metadata.get("render_fps") or 1.0)
    return float(dt() if callable(dt) else dt)  # pyright: ignore[reportArgumentType]


def _set_dt(env: gym.Env, config: Host, native_dt: float, render_mode: str | None) -> gym.Env:
    dt = config.dt
    assert dt is not None
    task: Any = env.unwrapped
    is_dm_control = config.id.startswith("dm_control/")
    if is_dm_control and hasattr(task._env, "_step_limit"):
        physics_step = float(task._env.physics.timestep())
    elif hasattr(task, "frame_skip") and hasattr(task, "model"):  # Gymnasium's MuJoCo tasks
        physics_step = float(task.model.opt.timestep)
    else:
        raise ValueError(
            f"`environment.dt` of {config.id!r} can only be its own, {native_dt:g} s; got {dt:g}."
        )
    substeps = round(dt / physics_step)
    if substeps < 1 or abs(substeps * physics_step - dt) > 1e-6 * dt:
        raise ValueError(
            f"`environment.dt` of {config.id!r} must be a multiple of its physics step "
            f"{physics_step:g} s; got {dt:g}. The nearest is {max(substeps, 1) * physics_step:g}; "
            f"its own is {native_dt:g}."
        )
    if is_dm_control:  # most of its tasks set their control step themselves and take no other
        control = task._env
        control._step_limit *= control._n_sub_steps / substeps  # of the same seconds
        control._n_sub_steps = substeps
        return env
    limit = _time_limit(env)
    env.close()
    if config.max_episode_steps is None and limit is not None:
        steps = round(limit * native_dt / (substeps * physics_step))
        config = dataclasses.replace(config, max_episode_steps=steps)
    env = _make(config, render_mode)
    env.unwrapped.frame_skip = substeps  # pyright: ignore[reportAttributeAccessIssue]
    return env
