"""Gymnasium's pendulum as a stochastic differential equation: the same rod, in continuous time."""

from dataclasses import dataclass
from typing import Annotated, Any

import jax.numpy as jnp
import jax.random as jr
import numpy as np

from qscore.config import Range
from qscore.environments.sde import SDEEnvironment
from qscore.sde import SDE

GRAVITY, LENGTH, MASS = 10.0, 1.0, 1.0
GYMNASIUM_DT = 0.05


@dataclass(frozen=True)
class PendulumSDE(SDEEnvironment):
    """Swing a pendulum up and hold it; torque-limited, with random kicks.

    State (angle from upright, angular velocity), observed as (cos, sin, velocity). The reward rate
    is Gymnasium's reward per its 0.05 s step, so a return compares with `Pendulum-v1`'s. The
    velocity is not cut at 8 rad/s as it is there.
    """

    dt: Annotated[float, Range(0, low_open=True)] = 0.05
    duration: Annotated[float, Range(0, low_open=True)] = 10.0
    substeps: Annotated[int, Range(1)] = 4
    kick: Annotated[float, Range(0)] = 0.1
    """Diffusion of the angular velocity, in [0, inf), unit: rad/s per sqrt(s)."""

    @property
    def action_bound(self) -> tuple[float, ...]:
        return (2.0,)  # N m

    def process(self) -> SDE:
        def drift(time, x, action):
            gravity = 1.5 * GRAVITY / LENGTH * jnp.sin(x[0])
            torque = 3.0 / (MASS * LENGTH**2) * action[0]
            return jnp.array([x[1], gravity + torque])

        return SDE(drift, lambda time, x, action: jnp.array([[0.0], [self.kick]]), 1)

    def reward_rate(self, time, x, action):
        angle = jnp.mod(x[0] + jnp.pi, 2.0 * jnp.pi) - jnp.pi
        cost = angle**2 + 0.1 * x[1] ** 2 + 0.001 * action[0] ** 2
        return -cost / GYMNASIUM_DT

    def start(self, key):
        return jr.uniform(key, (2,), minval=-1.0, maxval=1.0) * jnp.array([jnp.pi, 1.0])

    def observe(self, x):
        return jnp.array([jnp.cos(x[0]), jnp.sin(x[0]), x[1]])

    def draw(self, x: np.ndarray, action: np.ndarray, axes: Any) -> None:
        axes.plot(
            [0, np.sin(x[0])], [0, np.cos(x[0])], lw=8, color="tab:red", solid_capstyle="round"
        )
        axes.plot(0, 0, "o", color="black")
        axes.plot([0, 0.4 * action[0]], [-1.2, -1.2], lw=4, color="tab:blue")
        axes.set(xlim=(-1.4, 1.4), ylim=(-1.4, 1.4), aspect="equal", xticks=[], yticks=[])
