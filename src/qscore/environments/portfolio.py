"""Continuous-time mean-variance portfolio choice, whose solution is known.

Discounted wealth X moves as dX = u (rho s dt + s dW) with u the discounted money in the stock, s
its volatility and rho its Sharpe ratio. Reaching a wealth `target` w with least variance is, by a
Lagrange multiplier, to minimise E (X_T - w)^2 (Zhou & Li 2000). The least value from X_t = x is

    V(t, x) = (x - w)^2 e^{-rho^2 (T - t)},    u*(t, x) = -(rho / s) (x - w)

(Wang & Zhou 2020, section 3, with no exploration).
"""

from dataclasses import dataclass
from typing import Annotated, Any

import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float

from qscore.config import Range
from qscore.environments.sde import SDEEnvironment
from qscore.sde import SDE


@dataclass(frozen=True)
class Portfolio(SDEEnvironment):
    """Bring wealth near a target, in mean square, by moving money into and out of a stock.

    State: discounted wealth. Action: money in the stock, in units of the starting wealth. The
    reward is -(X_T - target)^2 at the end of the horizon, and nothing before.
    """

    dt: Annotated[float, Range(0, low_open=True)] = 1.0 / 52.0
    """Time between trades in years, in (0, inf)."""
    duration: Annotated[float, Range(0, low_open=True)] = 1.0
    """The horizon in years, in (0, inf)."""
    volatility: Annotated[float, Range(0, low_open=True)] = 0.2
    """Of the stock, in (0, inf), per sqrt(year)."""
    sharpe_ratio: Annotated[float, Range(0)] = 0.8
    """Excess return over volatility, in [0, inf), per sqrt(year)."""
    target: Annotated[float, Range(0)] = 1.2
    """w, in [0, inf), in units of the starting wealth x: the wealth that is reached with the least
    variance is the mean w - (w - x) e^{-rho^2 T}, a little less."""
    spread: Annotated[float, Range(0)] = 0.1
    """Half the width of the uniform distribution of starting wealth about 1, in [0, inf)."""
    leverage: Annotated[float, Range(0, low_open=True)] = 4.0
    """The most money in the stock, long or short, in (0, inf), in units of starting wealth."""

    @property
    def finite_horizon(self) -> bool:
        return True

    @property
    def action_bound(self) -> tuple[float, ...]:
        return (self.leverage,)

    def process(self) -> SDE:
        return SDE(
            lambda time, x, money: money * self.sharpe_ratio * self.volatility,
            lambda time, x, money: (money * self.volatility)[:, None],
            1,
        )

    def reward_rate(self, time, x, action):
        return jnp.zeros_like(x[0])

    def terminal_reward(self, x, action):
        return -((x[0] - self.target) ** 2)

    def start(self, key):
        return 1.0 + jr.uniform(key, (1,), minval=-self.spread, maxval=self.spread)

    def optimal_money(self, x: Float[Array, " state"]) -> Float[Array, " act"]:
        """u*: money in the stock, were there no bound on it. It does not depend on time."""
        return -(self.sharpe_ratio / self.volatility) * (x - self.target)

    def optimal_value(self, time: Float[Array, ""], x: Float[Array, " state"]) -> Float[Array, ""]:
        """The largest expected reward from wealth x at `time`, -V, with `optimal_money`."""
        rest = self.duration - time
        return -((x[0] - self.target) ** 2) * jnp.exp(-(self.sharpe_ratio**2) * rest)

    def draw(self, x: np.ndarray, action: np.ndarray, axes: Any) -> None:
        axes.bar([0, 1], [x[0], action[0]], color=["tab:green", "tab:blue"])
        axes.axhline(self.target, color="gray", ls="--")
        axes.set(ylim=(-self.leverage, self.leverage), xticks=[0, 1])
        axes.set_xticklabels(["wealth", "in the stock"])
