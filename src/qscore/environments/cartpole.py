"""Cart-pole swing-up as a stochastic differential equation: one force, two degrees of freedom."""

from dataclasses import dataclass
from typing import Annotated, Any

import jax.numpy as jnp
import jax.random as jr
import numpy as np

from qscore.config import Range
from qscore.environments.sde import SDEEnvironment
from qscore.sde import SDE

GRAVITY, CART, POLE, HALF_LENGTH, FORCE, TRACK = 9.81, 1.0, 0.1, 0.5, 10.0, 2.4


@dataclass(frozen=True)
class CartpoleSDE(SDEEnvironment):
    """Swing a pole up by pushing its cart, under-actuated and with random gusts.

    State (position m, velocity m/s, angle from upright rad, angular velocity rad/s), observed as
    (position, velocity, cos, sin, angular velocity); equations of Florian (2007) without friction.
    The reward rate is (1 + cos angle) / 2, less near the ends of the track: at most 1 per second.
    An episode ends for good where the cart is 4.8 m from the middle.
    """

    dt: Annotated[float, Range(0, low_open=True)] = 0.02
    duration: Annotated[float, Range(0, low_open=True)] = 10.0
    substeps: Annotated[int, Range(1)] = 2
    gust: Annotated[float, Range(0)] = 0.05
    """Diffusion of the angular velocity, in [0, inf), unit: rad/s per sqrt(s)."""

    @property
    def action_bound(self) -> tuple[float, ...]:
        return (FORCE,)  # N

    def process(self) -> SDE:
        def drift(time, x, action):
            _, velocity, angle, spin = x
            sin, cos = jnp.sin(angle), jnp.cos(angle)
            total = CART + POLE
            push = (action[0] + POLE * HALF_LENGTH * spin**2 * sin) / total
            turn = (GRAVITY * sin - cos * push) / (
                HALF_LENGTH * (4.0 / 3.0 - POLE * cos**2 / total)
            )
            return jnp.array([velocity, push - POLE * HALF_LENGTH * turn * cos / total, spin, turn])

        gusts = jnp.array([[0.0], [0.0], [0.0], [self.gust]])
        return SDE(drift, lambda time, x, action: gusts, 1)

    def reward_rate(self, time, x, action):
        centred = jnp.exp(-((x[0] / TRACK) ** 2))
        return 0.5 * (1.0 + jnp.cos(x[2])) * centred

    def terminated(self, x):
        return jnp.abs(x[0]) > 2.0 * TRACK

    def start(self, key):
        return jnp.array([0.0, 0.0, jnp.pi, 0.0]) + 0.05 * jr.normal(key, (4,))

    def observe(self, x):
        return jnp.array([x[0], x[1], jnp.cos(x[2]), jnp.sin(x[2]), x[3]])

    def draw(self, x: np.ndarray, action: np.ndarray, axes: Any) -> None:
        tip = (x[0] + 2 * HALF_LENGTH * np.sin(x[2]), 2 * HALF_LENGTH * np.cos(x[2]))
        axes.plot([x[0], tip[0]], [0, tip[1]], lw=5, color="tab:red")
        axes.plot(x[0], 0, "s", ms=18, color="tab:gray")
        axes.plot([x[0], x[0] + 0.1 * action[0]], [-0.3, -0.3], lw=4, color="tab:blue")
        axes.set(xlim=(-3, 3), ylim=(-1.5, 1.5), aspect="equal", xticks=[], yticks=[])
