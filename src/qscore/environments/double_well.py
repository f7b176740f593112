"""A reward with two wells: from the ridge between them, left and right are equally good."""

from dataclasses import dataclass
from typing import Annotated, Any

import jax.numpy as jnp
import jax.random as jr
import numpy as np

from qscore.config import Range
from qscore.environments.sde import SDEEnvironment
from qscore.sde import SDE


def depth(x: Any) -> Any:
    """4 w / (4 + w) with w = (x^2 - 1)^2: zero in the wells, 0.8 on the ridge, at most 4."""
    well = (x**2 - 1.0) ** 2
    return 4.0 * well / (4.0 + well)


@dataclass(frozen=True)
class DoubleWell(SDEEnvironment):
    """Drive a point into either of two wells, at -1 and +1; starts between them.

    dX = speed a dt + noise dW, reward rate -4 w / (4 + w) - effort a^2 with w = (x^2 - 1)^2:
    quartic in the wells, bounded far from them. The problem is symmetric under x, a -> -x, -a, so
    at x = 0 an optimal policy has two modes, and their mean is the worst.
    """

    dt: Annotated[float, Range(0, low_open=True)] = 0.05
    duration: Annotated[float, Range(0, low_open=True)] = 4.0
    speed: Annotated[float, Range(0, low_open=True)] = 2.0
    """State per second under the largest action, in (0, inf)."""
    noise: Annotated[float, Range(0)] = 0.2
    """Diffusion of the state, in [0, inf), unit: state per sqrt(s)."""
    effort: Annotated[float, Range(0)] = 0.05
    """Cost rate of the largest action, in [0, inf), unit: reward per second."""
    spread: Annotated[float, Range(0)] = 0.05
    """Standard deviation of the start about the ridge, in [0, inf)."""

    @property
    def action_bound(self) -> tuple[float, ...]:
        return (1.0,)

    def process(self) -> SDE:
        return SDE(
            lambda time, x, action: self.speed * action,
            lambda time, x, action: jnp.full((1, 1), self.noise),
            1,
        )

    def reward_rate(self, time, x, action):
        return -depth(x[0]) - self.effort * action[0] ** 2

    def start(self, key):
        return self.spread * jr.normal(key, (1,))

    def draw(self, x: np.ndarray, action: np.ndarray, axes: Any) -> None:
        line = np.linspace(-1.7, 1.7, 200)
        axes.plot(line, depth(line), color="gray")
        axes.plot(x[0], depth(x[0]), "o", ms=12, color="tab:red")
        axes.arrow(x[0], -0.3, 0.5 * action[0], 0.0, width=0.03, color="tab:blue")
        axes.set(xlim=(-1.7, 1.7), ylim=(-0.6, 2.0), yticks=[])
