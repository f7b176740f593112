"""Linear-quadratic problems as an environment: learned scores can be held against closed forms."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, ClassVar

import jax.numpy as jnp
import jax.random as jr

from qscore import lq
from qscore.config import Range
from qscore.environments.sde import SDEEnvironment
from qscore.sde import SDE

SCALAR = """{"A": [[0.3]], "B": [[1.0]], "noise": [{"C": [[0.2]], "D": [[0.1]], "e": [0.3]}],
 "sigma_a": 0.6, "M": [[1.0, 0.0], [0.0, 0.1]], "score_cost": 0.3, "discount_rate": 0.2}"""
"""One unstable state, one action, multiplicative noise: what the demonstration solves."""


@lru_cache
def _problem(text: str) -> lq.Problem:
    if not text.lstrip().startswith("{"):
        raise ValueError(
            "`problem` must be the JSON text of a problem, which begins with a brace: what a file "
            f"holds, and not its name. Got {text!r}."
        )
    return lq.Problem.from_json(text)


@dataclass(frozen=True)
class LQ(SDEEnvironment):
    """A linear-quadratic problem, from its file; a run on it reports its distance to the solution.

    The problem prescribes the discount rate, the score cost and the action noise. Episodes begin
    at N(0, spread^2) and last `duration` seconds, or the problem's own finite horizon. The reward
    is that of the state and action alone: the score's cost belongs to the learner.
    """

    num_envs: Annotated[int, Range(1, 65536)] = 128
    dt: Annotated[float, Range(0, low_open=True)] = 0.01
    # long enough to see where actions lead, and short enough that most of the experience is as wide
    # as the starts: a good score soon brings every copy to the same narrow band
    duration: Annotated[float, Range(0, low_open=True)] = 1.0
    substeps: Annotated[int, Range(1)] = 4  # Euler's step gives an oscillator energy
    problem: str = SCALAR
    """The problem: a JSON file on the command line, its text in Python."""
    spread: Annotated[float, Range(0)] = 1.2
    """Standard deviation of each component of the state at the start, in [0, inf)."""
    bound: Annotated[float, Range(0, low_open=True)] = 8.0
    """Actions are kept in [-bound, bound], in (0, inf): far out, as the theory has no bounds."""

    recommended: ClassVar[dict[str, str]] = {"cqsm": "linear_quadratic"}
    default_steps: ClassVar[int] = 2_560_000

    def __post_init__(self):
        super().__post_init__()
        terminal = self.solved_problem.terminal
        if terminal is not None:
            object.__setattr__(self, "duration", terminal.T)
            super().__post_init__()  # whose limits hold for it as well

    @property
    def solved_problem(self) -> lq.Problem:
        """The problem itself. Raises `ValueError` where its text is not one."""
        return _problem(self.problem)

    @property
    def finite_horizon(self) -> bool:
        return self.solved_problem.terminal is not None

    @property
    def action_bound(self) -> tuple[float, ...]:
        return (self.bound,) * self.solved_problem.action_size

    def costs(self) -> dict[str, Any]:
        p = self.solved_problem
        return {
            "discount_rate": p.discount_rate,
            # in actions of [-1, 1]: |Psi|^2 shrinks by bound^2, and the noise by bound
            "score_cost": p.score_cost * self.bound**2,
            "action_noise": tuple(map(tuple, (p.sigma_a / self.bound).tolist())),
        }

    def process(self) -> SDE:
        p = self.solved_problem
        A, B, f = (jnp.asarray(m, jnp.float32) for m in (p.A, p.B, p.f))
        if not p.noise:
            return SDE(
                lambda time, x, a: A @ x + B @ a + f, lambda time, x, a: jnp.zeros((len(f), 1)), 1
            )
        C, D, e = (
            jnp.stack([jnp.asarray(getattr(noise, name), jnp.float32) for noise in p.noise])
            for name in ("C", "D", "e")
        )
        return SDE(
            lambda time, x, a: A @ x + B @ a + f,
            lambda time, x, a: (C @ x + D @ a + e).T,
            len(p.noise),
        )

    def reward_rate(self, time, x, action):
        p = self.solved_problem
        z = jnp.concatenate([x, action])
        M, m = jnp.asarray(p.M, jnp.float32), jnp.asarray(p.m, jnp.float32)
        return -0.5 * z @ M @ z + m @ z + p.r0

    def terminal_reward(self, x, action):
        end = self.solved_problem.terminal
        assert end is not None
        z = jnp.concatenate([x, action])
        H, h1 = jnp.asarray(end.H, jnp.float32), jnp.asarray(end.h1, jnp.float32)
        return -0.5 * z @ H @ z + h1 @ z + end.h0

    def start(self, key):
        return self.spread * jr.normal(key, (self.solved_problem.state_size,))
