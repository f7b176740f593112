"""CQSM from one fixed data set: evaluate a score that did not make it, and improve on it.

A data set is a `Transition` with two leading axes, [paths, steps]: what was observed and done, and
what it earned. Two estimators of Q stand to choice, both with quadratic features and full batches.

* `least_squares` makes the martingale increments orthogonal to the features. The next action is not
  the logged one: it is what the score in question would have done from the logged action, in the
  exact mean over its noise. So the data may come from anything that varies the actions, jumps and
  independent draws included, over any horizon, and rows may stand in any order.
* `martingale_loss` regresses on what the paths earned until their end. It needs whole episodes of
  a finite horizon, with actions that followed da = Psi_b dt + sigma_a dB under a known Psi_b
  (`behaviour`) and the algorithm's own sigma_a. Then r + (Psi - Psi_b) . grad_a Q in place of r
  gives the value of Psi, and as Q stands on both sides: a fixed point, in a few regressions.

Improving is policy iteration: evaluate, take the greedy score grad_a Q / lambda, evaluate that on
the same data.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float

from qscore import martingale
from qscore.algorithms.cqsm import CQSM, CQSMState, Quadratic, quadratic_features
from qscore.errors import TrainingDiverged
from qscore.types import Spec, Transition

Method = Literal["least_squares", "martingale_loss"]

Score = Callable[[Float[Array, " obs"], Float[Array, " act"]], Float[Array, " act"]]
"""Psi(observation, action), in actions per second for actions in [-1, 1]. The observation is as
recorded, with its clock."""

INFORMATIVE = 1e-6
"""Least eigenvalue of the correlations of observation and action that counts as informative."""

FIXED_POINT_ROUNDS = 8
"""Regressions of the martingale loss; each one only adds algebra on the same sums."""

CONVERGED = 1e-3
"""Policy iteration stops where a round changes the score by less."""

UNSETTLED = 0.05
"""A last change beyond this, and no smaller than the one before it, is not convergence."""

BOUND_SLACK = 1e-4
"""By how much rounding may take an action out of [-1, 1]."""

COVERAGE = (
    "Offline, a score can only be judged where the data have been: more data, or data with actions "
    "that vary more, help."
)


class Evaluation(NamedTuple):
    """The value of one score, estimated from a data set.

    - `agent`: its critic is Q of the score; its own score is the improved one, grad_a Q / lambda.
      For `CQSM.act` and `CQSM.value_and_score`.
    - `changes`: martingale loss: relative change of Q in every round of the fixed point. Empty
      for least squares.
    - `growth_rate`: least squares over an infinite horizon: the estimated growth rate of the score,
      1/s, which must stay below the discount rate for Q to be finite. NaN elsewhere.
    """

    agent: CQSMState
    changes: tuple[float, ...]
    growth_rate: float


class Improvement(NamedTuple):
    """A policy found by policy iteration on one data set.

    - `agent`: the last round's: its score is the policy.
    - `agents`: one per round; their critic is Q of the score before, their score the improved one.
    - `changes`: relative change of the score over the data in every round; from the zero score the
      first is 1.
    - `growth_rates`: of the score that each round evaluated, see `Evaluation`.
    """

    agent: CQSMState
    agents: tuple[CQSMState, ...]
    changes: tuple[float, ...]
    growth_rates: tuple[float, ...]


def evaluate(
    algorithm: CQSM,
    spec: Spec,
    episodes: Transition,
    *,
    score: Score,
    method: Method = "least_squares",
    behaviour: Score | None = None,
    rounds: int = FIXED_POINT_ROUNDS,
) -> Evaluation:
    """Q of a score, from data that something else made.

    `behaviour`, the score that made the data, and `rounds`, of the fixed point, belong to the
    martingale loss. `algorithm` must have feature critics, with the score's cost in units of the
    reward (preset `linear_quadratic`).

    Raises `ValueError` for data or settings that the method cannot use and for a score whose value
    is infinite; `TrainingDiverged` where the changes of the fixed point do not fall. How far it
    came in these rounds, `changes` says.
    """
    data = _Data(algorithm, spec, episodes, method, behaviour)
    if rounds < 1:
        raise ValueError(f"`rounds` must be at least 1, got {rounds}.")
    found = data.evaluate(data.along(score, "score"), rounds)
    if found.rate > found.asked:
        raise ValueError(
            f"`score` is not admissible on these data: under it values grow at {found.growth:.3g} "
            f"per second, which must stay below the discount rate, {found.asked:.3g}. Evaluate a "
            "more stabilising score, or raise `discount_rate`; `improve` starts from any score."
        )
    return Evaluation(data.agent(found.theta), found.changes, found.growth)


def improve(
    algorithm: CQSM,
    spec: Spec,
    episodes: Transition,
    *,
    start: Score | None = None,
    method: Method = "least_squares",
    behaviour: Score | None = None,
    rounds: int = 20,
) -> Improvement:
    """A better policy from one data set: evaluate a score, take the greedy one, evaluate that.

    Ends when a round changes the score by less than 0.1%, after `rounds` rounds at most; one round
    is one improvement on `start`. That is the score evaluated first: by default zero for least
    squares, and for the martingale loss the behaviour itself. It need not be admissible: least
    squares then evaluate at a higher discount rate, until a round's score is. Otherwise as
    `evaluate`, with `TrainingDiverged` where the rounds do not settle at an admissible score.
    """
    data = _Data(algorithm, spec, episodes, method, behaviour)
    if rounds < 1:
        raise ValueError(f"`rounds` must be at least 1, got {rounds}.")
    if start is not None:
        psi = data.along(start, "start")
    elif data.behaviour is not None:
        psi = data.behaviour
    else:
        psi = jnp.zeros_like(data.rows.action)
    agents, changes, growth, found = [], [], [], None
    for index in range(rounds):
        # cautious at first: what a far score leads to is badly determined
        margin = 0.5**index if index < rounds - 1 else 0.0
        found = data.evaluate(psi, FIXED_POINT_ROUNDS, margin=margin)
        agents.append(data.agent(found.theta))
        new = data.greedy(agents[-1])
        changes.append(
            float(martingale.relative_change(jnp.sum((new - psi) ** 2), jnp.sum(new**2)))
        )
        growth.append(found.growth)
        psi = new
        # the rate is raised by caution, and not because the score is inadmissible
        admissible = found.growth < found.asked
        cautious = found.rate > found.asked and (admissible or margin > martingale.STEEP)
        if not changes[-1] >= CONVERGED and not cautious:
            break
    assert found is not None
    if found.rate > found.asked:
        raise TrainingDiverged(
            f"after {len(growth)} rounds the score is still inadmissible: under it values grow at "
            f"{found.growth:.3g} per second, which must stay below the discount rate, "
            f"{found.asked:.3g} (by round: {_listed(growth)}). Take more `rounds`, a `start` that "
            f"stabilises the task, or a higher `discount_rate`. {COVERAGE}"
        )
    _settled(changes, "the score", "policy iteration")
    return Improvement(agents[-1], tuple(agents), tuple(changes), tuple(growth))


class _Found(NamedTuple):
    """theta, and the rate it was solved at beside the one asked for."""

    theta: Float[Array, " params"]
    changes: tuple[float, ...]
    growth: float
    rate: float
    asked: float


class _Rows(NamedTuple):
    """What the estimators read, [paths, steps, ...]: observations without the elapsed time, and
    with the episode's time as a share of the horizon."""

    obs: Float[Array, "paths steps view"]
    action: Float[Array, "paths steps act"]
    reward: Float[Array, "paths steps"]
    next_obs: Float[Array, "paths steps view"]
    alive: Float[Array, "paths steps"]
    dt: Float[Array, "paths steps"]


class _Data:
    """A checked data set beside the problem it belongs to."""

    def __init__(
        self,
        algorithm: CQSM,
        spec: Spec,
        episodes: Transition,
        method: Method,
        behaviour: Score | None,
    ):
        _check_algorithm(algorithm)
        if method not in ("least_squares", "martingale_loss"):
            raise ValueError(
                f"`method` must be 'least_squares' or 'martingale_loss', got {method!r}."
            )
        _check_episodes(spec, episodes)
        if method == "martingale_loss":
            _check_whole(spec, episodes)
            if behaviour is None:
                raise ValueError(
                    "`behaviour` is missing: the martingale loss needs the score that drove the "
                    "recorded actions, as a function (obs, action) -> score in actions per "
                    "second. Without one take method='least_squares'."
                )
        elif behaviour is not None:
            raise ValueError(
                "`behaviour` was given, but least squares do not use it; leave it out, or take "
                "method='martingale_loss'."
            )
        self.algorithm, self.method = algorithm, method
        self.state = algorithm.init(spec, key=jr.key(0))
        self.recorded = jax.tree.map(jnp.asarray, (episodes.next_obs, episodes.action))
        view = jax.jit(jax.vmap(jax.vmap(lambda obs: algorithm.view(self.state, obs))))
        self.rows = _Rows(
            obs=view(jnp.asarray(episodes.obs)),
            action=jnp.asarray(episodes.action),
            reward=jnp.asarray(episodes.reward),
            next_obs=view(jnp.asarray(episodes.next_obs)),
            alive=1.0 - jnp.asarray(episodes.terminated, jnp.float32),
            dt=jnp.asarray(episodes.dt),
        )
        self.behaviour = None if behaviour is None else self.along(behaviour, "behaviour")
        _check_informative(self.rows, _time_degree(self.state))
        _check_ends(spec, episodes)

    def along(self, score: Score, name: str) -> Float[Array, "paths steps act"]:
        """A score where the next action is due: at the next observation, from the action held."""
        psi = jax.jit(jax.vmap(jax.vmap(score)))(*self.recorded)
        if psi.shape != self.rows.action.shape:
            raise ValueError(
                f"`{name}` must give a score of shape {self.rows.action.shape[2:]} for one "
                f"observation and action, got {psi.shape[2:]}."
            )
        if not np.isfinite(np.asarray(psi)).all():
            raise ValueError(f"`{name}` must be finite along the episodes; it is not.")
        return psi

    def agent(self, theta: Float[Array, " params"]) -> CQSMState:
        """An agent with this critic, and with the score that is greedy for it."""
        potential = Quadratic(theta, _time_degree(self.state))
        return eqx.tree_at(
            lambda s: (s.critic, s.score, s.average_score), self.state, (potential,) * 3
        )

    def greedy(self, agent: CQSMState) -> Float[Array, "paths steps act"]:
        """An agent's score where the next action is due."""
        return _greedy(self.algorithm, agent, self.rows)

    def evaluate(
        self, psi: Float[Array, "paths steps act"], rounds: int, margin: float = 0.0
    ) -> _Found:
        """theta of the score whose values along the data are `psi`; see `martingale.solve`."""
        asked = float(self.state.constants.discount_rate)
        if self.method == "least_squares":
            sums = _least_squares(self.algorithm, self.state, self.rows, psi)
            timed = _time_degree(self.state) > 0
            fit = martingale.solve(
                sums,
                discount_rate=asked,
                finite_horizon=timed,
                margin=0.0 if timed else margin,
            )
            growth, rate = float(fit.growth_rate), float(fit.discount_rate)
            found = _Found(fit.theta, (), growth, rate, asked)
        else:
            assert self.behaviour is not None
            sums = _martingale_loss(self.algorithm, self.state, self.rows, psi, self.behaviour)
            point = martingale.off_policy_fixed_point(sums, rounds=rounds)
            changes = tuple(np.asarray(point.changes).tolist())
            _settled(changes, "Q", "the off-policy fixed point")
            found = _Found(point.theta, changes, float("nan"), asked, asked)
        if not np.isfinite(np.asarray(found.theta)).all():
            raise TrainingDiverged(f"the value of the score came out infinite. {COVERAGE}")
        return found


# The sums over a data set, one path at a time under `martingale.add_up`.


@partial(jax.jit, static_argnums=0)
def _greedy(algorithm: CQSM, agent: CQSMState, rows: _Rows) -> Float[Array, "paths steps act"]:
    def psi(obs: Any, action: Any) -> Any:
        return algorithm.psi(agent, agent.score, obs, action)

    return jax.vmap(jax.vmap(psi))(rows.next_obs, rows.action)


@partial(jax.jit, static_argnums=0)
def _least_squares(
    algorithm: CQSM, state: CQSMState, rows: _Rows, psi: Float[Array, "paths steps act"]
) -> martingale.LeastSquares:
    """The orthogonality equations of the score with the values `psi`."""
    time_degree = _time_degree(state)
    constants, cost = state.constants, algorithm.cost(state)
    weight = _weights(algorithm, rows, time_degree)

    def ahead(obs: Any, action: Any, dt: Any, psi: Any) -> Any:
        """E phi of the next observation and action."""
        return martingale.mean_over_noise(
            lambda action: quadratic_features(obs, action, time_degree),
            action + dt * psi,
            jnp.sqrt(dt) * constants.action_noise,
        )

    def one(path: tuple[_Rows, Any, Any]) -> martingale.LeastSquares:
        rows, psi, weight = path
        phi = jax.vmap(partial(quadratic_features, time_degree=time_degree))(rows.obs, rows.action)
        phi_next = jax.vmap(ahead)(rows.next_obs, rows.action, rows.dt, psi)
        # no move, and no cost, where the next observation is final
        penalty = algorithm.penalty * 0.5 * cost * jnp.sum(psi**2, axis=1) * rows.alive
        return martingale.accumulate(
            martingale.LeastSquares.zeros(phi.shape[1]),
            weight[:, None] * phi,
            phi,
            rows.alive[:, None] * phi_next,
            rows.reward / rows.dt - penalty,
            rows.dt,
            keep=jnp.ones(()),
            discount_rate=constants.discount_rate,
        )

    return martingale.add_up(one, (rows, psi, weight))


@partial(jax.jit, static_argnums=0)
def _martingale_loss(
    algorithm: CQSM,
    state: CQSMState,
    rows: _Rows,
    psi: Float[Array, "paths steps act"],
    behaviour: Float[Array, "paths steps act"],
) -> martingale.PathSums:
    """The normal equations of the score with the values `psi`."""
    time_degree = _time_degree(state)
    cost = algorithm.cost(state)

    def slope(obs: Any, action: Any) -> Any:
        return jax.jacfwd(lambda action: quadratic_features(obs, action, time_degree))(action)

    def one(path: tuple[_Rows, Any, Any, Any]) -> martingale.PathSums:
        rows, psi, behaviour, weight = path
        # the action moves at the next observation, and not any more where that is final
        penalty = algorithm.penalty * 0.5 * cost * jnp.sum(psi**2, axis=1) * rows.alive
        ahead = jax.vmap(slope)(rows.next_obs, rows.action)
        shift = jnp.einsum("sfa,sa->sf", ahead, psi - behaviour) * rows.alive[:, None]
        return martingale.path_sums(
            jax.vmap(partial(quadratic_features, time_degree=time_degree))(rows.obs, rows.action),
            shift,
            rows.reward / rows.dt - penalty,
            jnp.zeros(()),  # the terminal reward is in the last step's
            weight,
            rows.dt,
            discount_rate=state.constants.discount_rate,
        )

    return martingale.add_up(one, (rows, psi, behaviour, _weights(algorithm, rows, time_degree)))


def _weights(algorithm: CQSM, rows: _Rows, time_degree: int) -> Float[Array, "paths steps"]:
    """1 over how the variance of dM grows with z for a quadratic Q, in standard units."""
    if algorithm.test_function == "gradient":
        return jnp.ones_like(rows.dt)
    z = _plain(rows.obs, rows.action, time_degree)
    axes = (0, 1)
    spread = jnp.maximum(jnp.std(z, axis=axes, keepdims=True), 1e-12)
    standard = (z - jnp.mean(z, axis=axes, keepdims=True)) / spread
    return 1.0 / (1.0 + jnp.sum(standard**2, axis=2))


def _time_degree(state: CQSMState) -> int:
    critic: Any = state.critic
    return critic.time_degree


def _plain(obs: Any, action: Any, time_degree: int) -> Any:
    """Observation and action side by side, without the time where there is one."""
    return jnp.concatenate([obs[..., :-1] if time_degree else obs, action], axis=-1)


# What is refused.


def _settled(changes: Sequence[float], what: str, iteration: str) -> None:
    if not np.isfinite(changes).all() or (
        len(changes) > 1 and changes[-1] > UNSETTLED and changes[-1] >= changes[-2]
    ):
        raise TrainingDiverged(
            f"{iteration} does not settle: the relative change of {what}, by round, was "
            f"{_listed(changes)}. {COVERAGE}"
        )


def _listed(numbers: Sequence[float]) -> str:
    return ", ".join(f"{number:.3g}" for number in numbers)


def _check_algorithm(algorithm: CQSM) -> None:
    if algorithm.critic != "features" or algorithm.cost_unit != "reward":
        raise ValueError(
            "`algorithm` must have critic='features' and cost_unit='reward', as "
            f"CQSM(preset='linear_quadratic') has; got critic={algorithm.critic!r} and "
            f"cost_unit={algorithm.cost_unit!r}."
        )


def _check_episodes(spec: Spec, episodes: Transition) -> None:
    lead = np.shape(episodes.reward)
    if len(lead) != 2 or 0 in lead:
        raise ValueError(
            f"`episodes.reward` must have the shape [paths, steps], neither of them 0; got "
            f"{list(lead)}."
        )
    sizes = {"obs": (spec.obs_size,), "next_obs": (spec.obs_size,), "action": (spec.action_size,)}
    for name, array in vars(episodes).items():
        want = (*lead, *sizes.get(name, ()))
        if np.shape(array) != want:
            raise ValueError(
                f"`episodes.{name}` must have the shape {list(want)} (paths and steps of "
                f"`episodes.reward`, sizes of `spec`); got {list(np.shape(array))}."
            )
        bad = np.argwhere(~np.isfinite(np.asarray(array)))
        if len(bad):
            where = np.unique(bad[:, :2], axis=0)
            raise ValueError(
                f"`episodes.{name}` must be finite; {len(where)} of {lead[0] * lead[1]} rows are "
                f"not, the first at path {where[0][0]}, step {where[0][1]}. Remove such episodes."
            )
    if np.asarray(episodes.terminated).dtype != bool:
        raise ValueError(
            f"`episodes.terminated` must be of type bool, got {episodes.terminated.dtype}."
        )
    if (largest := float(np.max(np.abs(episodes.action)))) > 1.0 + BOUND_SLACK:
        raise ValueError(
            f"`episodes.action` must lie in [-1, 1], in units of the environment's action bound; "
            f"the largest is {largest:g}."
        )
    if np.min(episodes.dt) <= 0.0:
        path, step = np.argwhere(np.asarray(episodes.dt) <= 0.0)[0]
        got = float(episodes.dt[path, step])
        raise ValueError(
            f"`episodes.dt` must be above 0 seconds, got {got:g} at path {path}, step {step}."
        )


def _check_ends(spec: Spec, episodes: Transition) -> None:
    """Over a finite horizon the ends of episodes are all that ties Q down."""
    if "time" in spec.clock and not np.any(episodes.terminated):
        raise ValueError(
            "`episodes.terminated` is nowhere True: over a finite horizon the data must reach the "
            "end of episodes, which decides what is earned before it."
        )


def _check_whole(spec: Spec, episodes: Transition) -> None:
    """The martingale loss needs what paths earned until the end of a finite horizon."""
    if "time" not in spec.clock or not spec.horizon:
        raise ValueError(
            "the martingale loss needs a finite horizon: `spec.clock` must contain 'time', the "
            "observation's last component but for an elapsed time, and `spec.horizon` be its "
            f"seconds; got clock={spec.clock!r}, horizon={spec.horizon!r}. For an infinite "
            "horizon take method='least_squares'."
        )
    ended = np.asarray(episodes.terminated)
    wrong = np.flatnonzero(~ended[:, -1] | ended[:, :-1].any(axis=1))
    if len(wrong):
        raise ValueError(
            "the martingale loss needs episodes from start to end, one per row: "
            "`episodes.terminated` must be True at the last step and nowhere else; it is not in "
            f"{len(wrong)} of {len(ended)}, the first of them row {wrong[0]}."
        )


def _check_informative(rows: _Rows, time_degree: int) -> None:
    """That rows are enough, and that observation and action vary, each in its own way."""
    z = np.asarray(_plain(rows.obs, rows.action, time_degree), np.float64)
    z = z.reshape(-1, z.shape[-1])
    size = rows.action.shape[-1]
    features = (time_degree + 1) * (z.shape[1] + 1) * (z.shape[1] + 2) // 2
    if len(z) < features:
        raise ValueError(
            f"`episodes` must have at least as many rows as Q has features, {features}; it has "
            f"{len(z)}."
        )
    spread = np.std(z, axis=0)
    still = np.flatnonzero(spread[-size:] == 0.0)
    if len(still):
        raise ValueError(
            f"`episodes.action` must vary; component {still[0]} is constant, so the data cannot "
            "say what it does."
        )
    correlations = np.atleast_2d(np.corrcoef(z[:, spread > 0.0], rowvar=False))
    least = np.linalg.eigvalsh(correlations)[0]
    if least < INFORMATIVE:
        raise ValueError(
            "`episodes` cannot tell the action's effect from the state's: observation and action "
            f"are linearly dependent (least eigenvalue of their correlations {least:.1e}, must be "
            f"at least {INFORMATIVE:g}), as under a linear controller without noise. Record with "
            "noise on the action."
        )
