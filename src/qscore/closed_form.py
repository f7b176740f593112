"""How far an agent on a linear-quadratic problem is from the closed form.

Errors are relative L2 errors over z = (x, a) ~ N(0, I). The return gap uses the
policy-improvement identity: with the optimal Psi*, for every score Psi,

    J* - J = E^Psi int e^{-beta t} (lambda / 2) |Psi - Psi*|^2 dt

(complete the square in the evaluation equation and apply Dynkin's formula), so a small gap is the
mean of small positive numbers and not the difference of two noisy returns.

The exact values are those of continuous time, while the environment holds an action over a step dt
and moves it at the step's end. The action that is held from t on lies on the continuous path at
t + dt/2, so what is learned is compared a half step on, `continuous` below: without that, errors
of order dt would hide those of learning.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float

from qscore import lq, sde
from qscore.environments.lq import LQ
from qscore.martingale import mean_over_noise
from qscore.programs import kept
from qscore.types import State

POINTS = 20_000
PATHS = 2_048
TAIL = 1e-3
"""Discount at which an infinite horizon is cut off."""


class Comparison(NamedTuple):
    """Learned and exact values at the same points."""

    learned: dict[str, np.ndarray]
    exact: dict[str, np.ndarray]

    @property
    def relative_error(self) -> dict[str, float]:
        """sqrt(E|learned - exact|^2 / E|exact|^2) of "q", "grad_a_q", "score": see `lq.ratio`."""

        def size(values: np.ndarray) -> float:
            return math.sqrt(np.mean(values**2))

        return {
            name: lq.ratio(size(self.learned[name] - exact), size(exact))
            for name, exact in self.exact.items()
        }


def continuous(
    q: Callable[[Float[Array, " act"]], Float[Array, ""]],
    score: Callable[[Float[Array, " act"]], Float[Array, " act"]],
    action: Float[Array, " act"],
    *,
    score_cost: float,
    action_noise: Float[np.ndarray, "act act"],
    dt: float,
) -> tuple[Float[Array, ""], Float[Array, " act"]]:
    """Q and the score of continuous time at an action, from those of actions held over steps dt.

    With m = a + dt/2 Psi(a) and xi ~ N(0, I), at one state:

        Q_0(a) = E Q(m + (dt/2)^(1/2) sigma_a xi) - dt/4 lambda |Psi(a)|^2,     Psi_0(a) = Psi(m)

    where state steps are exact: in the half step before it is held, the action moves from a under
    the score and the noise, and pays for the score. For the optimal score what is left is O(dt^2)
    but for these terms of Q: beta dt/2 times the discounted sum of the score's later costs, which
    are charged with the step before the one they belong to; lambda dt / (4 beta) |K_a sigma_a|^2,
    as a held action answers its own noise late; and over a finite horizon beta dt/2 of the terminal
    reward, which is discounted with the last step's, and what a terminal reward of the action would
    change by in the last half step, in which the action does not move. A score that is not greedy
    for its Q leaves another such term, as the action takes Euler's steps.
    """
    psi = score(action)
    middle = action + 0.5 * dt * psi
    ahead = mean_over_noise(lambda a: q(a)[None], middle, jnp.sqrt(0.5 * dt) * action_noise)[0]
    return ahead - 0.25 * dt * score_cost * jnp.sum(psi**2), score(middle)


def learned_by(
    algorithm: Any,
    environment: LQ,
    agent: State,
    obs: Float[Array, " obs"],
    score: Callable[[Float[Array, " act"]], Float[Array, " act"]] | None = None,
) -> Callable[[Float[Array, " act"]], tuple[Float[Array, ""], Float[Array, " act"]]]:
    """An agent's Q and score of continuous time at one observation, as functions of the action.

    All but the observation in the problem's units. `score` is whose Q it is: the agent's own by
    default.
    """
    bound = environment.bound

    def held(action):
        q, psi = algorithm.value_and_score(agent, obs, action / bound)
        return q, bound * psi

    return lambda action: continuous(
        lambda a: held(a)[0],
        score or (lambda a: held(a)[1]),
        action,
        score_cost=environment.solved_problem.score_cost,
        action_noise=np.asarray(environment.solved_problem.sigma_a, np.float32),
        dt=environment.dt,
    )


def compare(algorithm: Any, environment: LQ, agent: State) -> Comparison:
    """Hold an agent against the closed form; in a finite horizon at four times of it.

    `algorithm` must have `value_and_score(agent, obs, action) -> (q, score)`, in actions of
    [-1, 1].
    """
    problem = environment.solved_problem
    n, d = problem.state_size, problem.action_size
    horizon = problem.terminal.T if problem.terminal else None
    times = [0.0] if horizon is None else [share * horizon for share in (0.0, 0.25, 0.5, 0.75)]
    z = np.random.default_rng(0).standard_normal((POINTS // len(times), n + d))
    learned_at = _compiled(algorithm, environment)
    learned: dict[str, list] = {"q": [], "grad_a_q": [], "score": []}
    exact: dict[str, list] = {"q": [], "grad_a_q": [], "score": []}
    x, a = z[:, :n].astype(np.float32), z[:, n:].astype(np.float32)
    for time in times:
        solution = lq.solve(problem, time)
        values = learned_at(agent, x, a, np.float32(time))
        for name in learned:
            learned[name].append(np.asarray(values[name]))
        exact["q"].append(solution.q(z))
        exact["grad_a_q"].append(solution.gradient(z))
        exact["score"].append(solution.score(z))
    return Comparison(
        {name: np.concatenate(parts) for name, parts in learned.items()},
        {name: np.concatenate(parts) for name, parts in exact.items()},
    )


def return_gap(algorithm: Any, environment: LQ, agent: State) -> float:
    """(J* - J) / |J*| of an agent; NaN where J* is 0.

    From the environment's starts, with a first action like the first state. `algorithm` must have
    what `compare` asks for.
    """
    return _compiled_gap(algorithm, environment)(agent)


@kept
def _compiled(algorithm: Any, environment: LQ) -> Callable[..., Any]:
    """`_learned_at` of (agent, states, actions, time), compiled once for all agents."""
    return jax.jit(jax.vmap(_learned_at(algorithm, environment), (None, 0, 0, None)))


@kept
def _compiled_gap(algorithm: Any, environment: LQ) -> Callable[[State], float]:
    """`return_gap` of an agent, compiled once for all of them."""
    learned_at = _learned_at(algorithm, environment)
    return _return_gap(environment, lambda *arguments: learned_at(*arguments)["score"])


def _learned_at(algorithm: Any, environment: LQ) -> Callable[..., dict[str, Array]]:
    """Q, its gradient and the score at (agent, state, action, time), in the problem's units."""

    def observe(x, time):
        clock = {"time": time, "dt": environment.dt}
        extra = [jnp.asarray(clock[name], jnp.float32)[None] for name in environment.clock]
        return jnp.concatenate([x, *extra])

    def learned_at(agent, x, a, time):
        q_and_score = learned_by(algorithm, environment, agent, observe(x, time))
        (value, score), gradient = jax.value_and_grad(q_and_score, has_aux=True)(a)
        return {"q": value, "grad_a_q": gradient, "score": score}

    return learned_at


def _return_gap(environment: LQ, score: Callable[..., Any]) -> Callable[[State], float]:
    """The gap in return of agents whose score is a function of (agent, state, action, time)."""
    problem = environment.solved_problem
    n, d, dt = problem.state_size, problem.action_size, environment.dt
    process, sigma = environment.process(), jnp.asarray(problem.sigma_a, jnp.float32)
    rate = problem.discount_rate
    if problem.terminal is None:
        steps = int(np.ceil(-np.log(TAIL) / (rate * dt)))
        solutions = [lq.solve(problem)]
    else:
        # even steps, where the environment's last one may be shorter
        steps = int(np.ceil(problem.terminal.T / dt - 1e-6))
        dt = problem.terminal.T / steps
        solutions, (_, *end) = [], problem.terminal
        for _ in range(steps):  # backwards, each over its own step, which ends in the next one's Q
            last = dataclasses.replace(problem, terminal=lq.Terminal(dt, *end))
            solutions.insert(0, solution := lq.solve(last))
            end = solution.P, solution.p, solution.c
    K = jnp.asarray(np.stack([s.K for s in solutions]), jnp.float32)
    k = jnp.asarray(np.stack([s.k for s in solutions]), jnp.float32)
    spread = environment.spread**2 * np.eye(n + d)
    scale = abs(solutions[0].expected_q(np.zeros(n + d), spread))

    def row(time):
        return jnp.minimum((time / dt + 0.5).astype(jnp.int32), len(solutions) - 1)

    def diffusion(time, z, _):
        top = process.diffusion(time, z[:n], z[n:])
        noises = top.shape[1]
        return jnp.block([[top, jnp.zeros((n, d))], [jnp.zeros((d, noises)), sigma]])

    def path(agent, key):
        def drift(time, z, _):
            moved = process.drift(time, z[:n], z[n:])
            return jnp.concatenate([moved, score(agent, z[:n], z[n:], time)])

        def shortfall(time, z, _):
            best = K[row(time)] @ z + k[row(time)]
            apart = score(agent, z[:n], z[n:], time) - best
            return 0.5 * problem.score_cost * jnp.sum(apart**2)

        start_key, noise_key = jr.split(key)
        start = environment.spread * jr.normal(start_key, (n + d,))
        return sde.accumulate(
            sde.SDE(drift, diffusion, process.noises + d),
            shortfall,
            start,
            dt=dt,
            steps=steps,
            key=noise_key,
            discount_rate=rate,
        )

    keys = jr.split(jr.key(0), PATHS)
    gap = jax.jit(lambda agent: jnp.mean(jax.vmap(lambda key: path(agent, key))(keys)))
    return lambda agent: float(gap(agent)) / scale if scale else math.nan
