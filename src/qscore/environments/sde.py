"""Environments made of a stochastic differential equation, wholly in JAX.

A task says its drift, diffusion, reward rate, terminal reward and starts; this module makes an
environment of it: `begin` and `advance` are pure functions of one copy, to be vmapped and scanned
on the device, and `SDETask` is the same copy driven from the host, for evaluation and filming.

Time is physical. A control step lasts `dt` seconds, or a time drawn anew from [dt_min, dt_max] at
every step; the state moves through it in `substeps` Euler-Maruyama steps under a held action, and
the reward is the integral of the reward rate. Where the elapsed time or the time of the episode
matters to a policy it is part of the observation, in last place: `Spec.clock` says which.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import tyro
from jaxtyping import Array, Bool, Float, Int

from qscore import sde
from qscore.config import Range, validate
from qscore.environments.base import EnvironmentFailure, Step
from qscore.programs import kept
from qscore.types import Key, Spec

MOST_STEPS = 10**9
"""Of an episode; they are counted in 32 bits."""


class SDEState(eqx.Module):
    """One running copy: the process's state, and where it is in time (seconds).

    `elapsed` is the length of the step that led here; 0 at the start of an episode.
    """

    x: Float[Array, " state"]
    time: Float[Array, ""]
    elapsed: Float[Array, ""]
    steps: Int[Array, ""]


class Advanced(eqx.Module):
    """What one control step brought; `obs` is the observation before any reset."""

    obs: Float[Array, " obs"]
    reward: Float[Array, ""]
    terminated: Bool[Array, ""]
    truncated: Bool[Array, ""]
    dt: Float[Array, ""]


@dataclass(frozen=True)
class SDEEnvironment(ABC):
    """A controlled Ito process with a running reward."""

    id: tyro.conf.Suppress[str]
    """The registered name."""
    num_envs: Annotated[int, Range(1, 65536)] = 1
    """Copies that collect experience side by side, in [1, 65536]."""
    dt: Annotated[float, Range(0, low_open=True)] = 0.02
    """Control step in seconds, in (0, inf)."""
    dt_min: Annotated[float | None, Range(0, low_open=True)] = None
    """With `dt_max`: every step's length is drawn uniformly between the two, in (0, inf) seconds,
    and is observed once it has passed; `dt` is then their middle. None is a regular step."""
    dt_max: Annotated[float | None, Range(0, low_open=True)] = None
    """The longest step, in (0, inf) seconds; see `dt_min`."""
    substeps: Annotated[int, Range(1)] = 1
    """Euler-Maruyama steps per control step, in [1, inf)."""
    duration: Annotated[float, Range(0, low_open=True)] = 4.0
    """Length of an episode in seconds, in (0, inf). For a task with a terminal reward this is its
    horizon, and the episode's end is final; for the others it is a time limit, and the step that
    reaches it is taken whole."""

    recommended: ClassVar[dict[str, str]] = {}
    """The preset an algorithm should take here unless told otherwise, by algorithm name."""
    default_steps: ClassVar[int] = 100_000
    """Environment steps of a run that does not say how many."""

    def __post_init__(self):
        validate(self)
        if (self.dt_min is None) != (self.dt_max is None):
            raise ValueError("`dt_min` and `dt_max` go together; only one of them was given.")
        if self.dt_min is not None and self.dt_max is not None:
            if self.dt_min > self.dt_max:
                raise ValueError(
                    f"`dt_min` must not exceed `dt_max`, got {self.dt_min} and {self.dt_max}."
                )
            object.__setattr__(self, "dt", 0.5 * (self.dt_min + self.dt_max))
        if self.duration / (self.dt_min or self.dt) > MOST_STEPS:
            raise ValueError(
                f"`duration` must be at most {MOST_STEPS:g} steps, got {self.duration:g} s in "
                f"steps of {self.dt_min or self.dt:g} s."
            )

    # -- what a task says of itself ------------------------------------------------------------

    @abstractmethod
    def process(self) -> sde.SDE:
        """Drift and diffusion, as functions of (time, state, action in the task's units)."""

    @abstractmethod
    def reward_rate(
        self, time: Float[Array, ""], x: Float[Array, " state"], action: Float[Array, " act"]
    ) -> Float[Array, ""]:
        """Reward per second."""

    @abstractmethod
    def start(self, key: Key) -> Float[Array, " state"]:
        """The state an episode begins in."""

    @property
    @abstractmethod
    def action_bound(self) -> tuple[float, ...]:
        """Half the width of each action component's interval [-bound, bound]."""

    def observe(self, x: Float[Array, " state"]) -> Float[Array, " features"]:
        """What of the state a policy sees; all of it unless overridden."""
        return x

    def terminal_reward(
        self, x: Float[Array, " state"], action: Float[Array, " act"]
    ) -> Float[Array, ""]:
        """Reward at the end of the horizon; only for tasks with `finite_horizon`."""
        return jnp.zeros(())

    def terminated(self, x: Float[Array, " state"]) -> Bool[Array, ""]:
        """Whether the state is final."""
        return jnp.zeros((), bool)

    @property
    def finite_horizon(self) -> bool:
        """Whether the end of `duration` is final, so that time belongs to the observation."""
        return False

    def costs(self) -> dict[str, Any]:
        """What a task prescribes of Spec's `discount_rate`, `score_cost` and `action_noise`."""
        return {}

    def draw(self, x: np.ndarray, action: np.ndarray, axes: Any) -> None:
        """Draw one moment on Matplotlib axes."""
        axes.bar(range(len(x)), x, color="tab:blue")
        axes.bar(range(len(x), len(x) + len(action)), action, color="tab:orange")
        axes.set_ylim(-4, 4)
        axes.set_xticks([])

    # -- what the loops use --------------------------------------------------------------------

    @property
    def irregular(self) -> bool:
        return self.dt_min is not None

    @property
    def episode_steps(self) -> int:
        """Control steps of an episode that runs to its end; the most there can be if irregular."""
        # a rest that is shorter than a thousandth of a step is rounding, not a step
        return max(1, math.ceil(self.duration / (self.dt_min or self.dt) - 1e-3))

    @property
    def clock(self) -> tuple[str, ...]:
        time = ("time",) if self.finite_horizon else ()
        return (*time, "dt") if self.irregular else time

    @property
    def spec(self) -> Spec:
        x = jax.eval_shape(lambda: self.observe(self.start(jr.key(0))))
        return Spec(
            obs_size=x.shape[0] + len(self.clock),
            action_size=len(self.action_bound),
            dt=self.dt,
            horizon=self.duration,
            clock=self.clock,
            **self.costs(),
        )

    def begin(self, key: Key) -> SDEState:
        """A fresh copy at the start of an episode."""
        zero = jnp.zeros(())
        return SDEState(self.start(key), zero, zero, jnp.zeros((), jnp.int32))

    def observation(self, state: SDEState) -> Float[Array, " obs"]:
        """What a policy sees: the observed state, then the clock (seconds)."""
        clock = {"time": state.time, "dt": state.elapsed}
        parts = [self.observe(state.x), *(clock[name][None] for name in self.clock)]
        return jnp.concatenate(parts).astype(jnp.float32)

    def advance(
        self, state: SDEState, action: Float[Array, " act"], *, key: Key
    ) -> tuple[SDEState, Advanced]:
        """One control step under an action in [-1, 1]; no reset."""
        dt_key, noise_key = jr.split(key)
        action = jnp.clip(action, -1.0, 1.0) * jnp.asarray(self.action_bound, jnp.float32)
        if self.dt_min is not None and self.dt_max is not None:
            dt = jr.uniform(dt_key, (), minval=self.dt_min, maxval=self.dt_max)
            rest = self.duration - state.time
            last = rest <= dt * 1.001  # as in `episode_steps`
            end = state.time + dt
        else:
            # counted: a sum of many steps in float32 would miss the end
            before = self.episode_steps - 1
            dt = jnp.asarray(self.dt, jnp.float32)
            rest = jnp.asarray(self.duration - before * self.dt, jnp.float32)
            last = state.steps >= before
            end = (state.steps + 1).astype(jnp.float32) * dt
        if self.finite_horizon:
            dt = jnp.where(last, rest, dt)
            end = jnp.where(last, self.duration, end)
        x, reward = sde.advance(
            self.process(),
            self.reward_rate,
            state.time,
            state.x,
            action,
            dt,
            key=noise_key,
            substeps=self.substeps,
        )
        over = self.terminated(x)
        if self.finite_horizon:
            reward = reward + jnp.where(last, self.terminal_reward(x, action), 0.0)
            over = over | last
        after = SDEState(x, end, dt, state.steps + 1)
        return after, Advanced(self.observation(after), reward, over, last & ~over, dt)

    def open(self, *, render: bool = False) -> "SDETask":
        """One copy driven from the host."""
        return SDETask(self)


@kept
def _programs(environment: SDEEnvironment) -> tuple[Any, Any]:
    """Beginning an episode and advancing it, compiled once for all copies."""

    def begin(key):
        state = environment.begin(key)
        return state, environment.observation(state)

    def advance(state, action, key, step):
        return environment.advance(state, action, key=jr.fold_in(key, step))

    return jax.jit(begin), jax.jit(advance)


class SDETask:
    """One copy of an SDE environment in host memory: what evaluation and playback drive."""

    def __init__(self, environment: SDEEnvironment):
        self.environment, self.spec = environment, environment.spec
        bound = np.asarray(environment.action_bound, np.float32)
        self.action_bounds = (-bound, bound)
        self._begin, self._advance = _programs(environment)
        self._key, self._steps = jr.key(0), 0
        self._state: Any = None
        self._action = np.zeros(len(bound), np.float32)

    def reset(self, seed: int) -> np.ndarray:
        """Begin the episode that belongs to `seed`."""
        start_key, self._key = jr.split(jr.key(seed))
        self._state, obs = self._begin(start_key)
        self._steps = 0
        self._action = np.zeros_like(self._action)
        return np.asarray(obs)

    def step(self, action: np.ndarray) -> Step:
        """Advance by one control step."""
        self._action = np.asarray(action, np.float32)
        self._state, out = self._advance(
            self._state, self._action, self._key, np.uint32(self._steps)
        )
        self._steps += 1
        obs, reward = np.asarray(out.obs), float(out.reward)
        if not (np.isfinite(obs).all() and math.isfinite(reward)):
            raise EnvironmentFailure(
                f"{self.environment.id} diverged after {self._steps} steps "
                f"(reward {reward}); its state grew without bound under these actions."
            )
        return Step(obs, reward, bool(out.terminated), bool(out.truncated), float(out.dt))

    def render(self) -> np.ndarray:
        """The task's own drawing of this moment, `uint8[height, width, 3]`."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(3.2, 3.2), dpi=100)
        canvas = FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        bound = self.action_bounds[1]
        self.environment.draw(np.asarray(self._state.x), self._action * bound, axes)
        axes.set_title(f"t = {float(self._state.time):.2f} s", fontsize=9)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()

    def close(self) -> None:
        """Nothing is held."""
