"""Continuous q-score matching (CQSM).  Hua, Gu, Tang, NeurIPS 2025, arXiv:2510.17122.

State and action both move in continuous time; the policy is the score Psi that drives the action,

    dX = b(X, a) dt + S(X, a) dW,        da = Psi(X, a) dt + sigma_a dB,

and is judged by E int e^{-beta t} (r - lambda/2 |Psi|^2) dt. Its value Q(x, a) is the function for
which e^{-beta t} Q + int e^{-beta u} (r - lambda/2 |Psi|^2) du is a martingale, and the policy
improvement step is Psi <- grad_a Q / lambda. So learning is two regressions:

* the critic makes the martingale's increments dM orthogonal to test functions,
  E[xi dM] = 0 (`qscore.martingale`);
* the score is regressed onto grad_a Q / lambda, the gradient at the action itself.

A recorded step (x, a, r, x') stays valid whatever chose a: the next action that dM needs is
simulated afresh from a with the agent's own action process, a' = a + Psi(x', a) dt + sigma_a dB.
What that simulated noise adds to dM is known and is taken off again (`control_variate`).

Every rate here is per second and not per step, so a change of the control step dt changes nothing
else: discounting, target and averaging rates, and Adam's step sizes, which go with sqrt(dt) since
dM is noise of that order.

Two critics stand behind one interface, a function of (observation, action):
`critic="features"` is quadratic in (x, a), with coefficients from least squares under forgetting;
the score is the gradient of another quadratic, which relaxes to the critic's. The sums are kept
apart from the score, so that all that is remembered evaluates the present one. It is exact where
the problem is linear-quadratic. `critic="network"` is an ensemble of networks learned by Adam.

Deviations from the paper: (1) the next action is re-simulated, which makes replay valid; (2) the
score cost can be tied to the running size of the critic's gradient (`cost_unit`), as a fixed one
is in units of the task's reward; (3) network critics charge the penalty for the displacement that
the action's bounds let through, not for the score that asked for it (features know no bounds), and
the default preset charges none, as its score cost is a step size and no part of the task;
(4) network critics have target networks and take the smaller of two.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from qscore import martingale
from qscore.algorithms.base import saturation
from qscore.config import Range, preset_field, resolve_preset, validate
from qscore.martingale import DiffusionFit, LeastSquares, VarianceFit
from qscore.networks import MLP, mean_q
from qscore.normalize import Moments, observe, standardize
from qscore.optimize import gradient_step, move_target
from qscore.types import Key, Metrics, Spec, Transition

DISCOUNT_RATE = 0.2
SCORE_COST = 0.05
ACTION_NOISE = 1.8
REFERENCE_DT = 0.05
"""Seconds; the control step at which the networks' step sizes are stated."""
SCALE_SECONDS = 10.0
"""Over how much experience the size of the critic's gradient is averaged."""

CAUTIOUS_SECONDS = 10.0
"""Time in which least squares come to trust a growth rate that is close to the discount rate."""

TIME_DEGREE = 8
"""Of the polynomials of time in a feature critic over a finite horizon: a steep terminal reward
makes for fast changes near the end."""

FINITE_WINDOW = 0.2
"""Largest `window` over a finite horizon, where the sums contain the scores of their time."""

VARIANCE_WINDOW = 0.1
"""The same for the variance of a network critic's increments, which changes as the critic does."""

FINITE_CAUTION = 5.0
"""1/s; how much more the future is discounted over a finite horizon when learning begins."""


class Quadratic(eqx.Module):
    """theta . phi(z, t): all monomials of z = (observation, action) up to degree two, and over a
    finite horizon each times polynomials of the time up to `time_degree`."""

    theta: Float[Array, " features"]
    time_degree: int = eqx.field(static=True)

    def __call__(self, obs: Float[Array, " obs"], action: Float[Array, " act"]) -> Float[Array, ""]:
        return quadratic_features(obs, action, self.time_degree) @ self.theta


def quadratic_features(
    obs: Float[Array, " obs"], action: Float[Array, " act"], time_degree: int
) -> Float[Array, " features"]:
    """1, z_i, z_i z_j (i <= j); for `time_degree` > 0 times T_0(2 s - 1), T_1, ..., s = obs[-1].

    The T_k are Chebyshev's polynomials and s the time's share of the horizon. Powers of s span the
    same functions, but are so nearly dependent that float32 loses the solution.
    """
    z = jnp.concatenate([obs[:-1] if time_degree else obs, action])
    i, j = jnp.triu_indices(z.shape[0])
    phi = jnp.concatenate([jnp.ones(1), z, z[i] * z[j]])
    if not time_degree:
        return phi
    angle = jnp.arccos(jnp.clip(2.0 * obs[-1] - 1.0, -1.0, 1.0))
    return (jnp.cos(jnp.arange(time_degree + 1.0) * angle)[:, None] * phi[None]).ravel()


def moved_features(obs_size: int, action_size: int) -> Int[np.ndarray, " moved"]:
    """Which of the `quadratic_features` without time depend on the action."""
    size = obs_size + action_size
    _, j = np.triu_indices(size)
    return np.flatnonzero(np.concatenate([[-1], np.arange(size), j]) >= obs_size)


class ScoreMLP(eqx.Module):
    """Psi(x, a) as a network on standardised inputs, in units of `Constants.speed`."""

    mlp: MLP
    moments: Moments  # of (observation, action)

    def __call__(
        self, obs: Float[Array, " obs"], action: Float[Array, " act"]
    ) -> Float[Array, " act"]:
        z = standardize(self.moments, jnp.concatenate([obs, action]))
        return self.mlp(z)


class NetworkQ(eqx.Module):
    """Q(x, a) as a network on standardised inputs."""

    mlp: MLP
    moments: Moments

    def __call__(self, obs: Float[Array, " obs"], action: Float[Array, " act"]) -> Float[Array, ""]:
        return self.mlp(standardize(self.moments, jnp.concatenate([obs, action])))[0]


def _first(*values: Any) -> Any:
    """The first that is not None."""
    return next(value for value in values if value is not None)


class FeatureLearner(eqx.Module):
    """Sums behind a linear critic; `diffusion` is fitted for weighted test functions."""

    sums: LeastSquares
    diffusion: DiffusionFit | None
    ends: Float[Array, ""]
    """Terminated rows among those learned from."""


class NetworkLearner(eqx.Module):
    """What trains a network critic and score; `variance` is fitted for weighted test functions."""

    target: NetworkQ
    variance: VarianceFit | None
    critic_opt: optax.OptState
    score_opt: optax.OptState


class Constants(NamedTuple):
    """What the task prescribes, or the hyperparameters in its place; never learned."""

    discount_rate: Float[Array, ""]
    score_cost: Float[Array, ""]
    action_noise: Float[Array, "act act"]
    dt: Float[Array, ""]
    horizon: Float[Array, ""]
    speed: Float[Array, ""]  # what a network score of 1 stands for, actions per second


class CQSMState(eqx.Module):
    """Everything CQSM learns; `score` and `average_score` are potentials for a feature critic."""

    critic: Quadratic | NetworkQ
    score: Quadratic | ScoreMLP
    average_score: Quadratic | ScoreMLP
    learner: FeatureLearner | NetworkLearner
    constants: Constants
    gradient_scale: Float[Array, ""]  # rms of grad_a Q, reward per action; of networks, running
    learned: Float[Array, ""]  # seconds of experience learned from
    updates: Int[Array, ""]
    clock: tuple[str, ...] = eqx.field(static=True)


class CQSMCarry(eqx.Module):
    """The action that the process has reached; an episode's first one is drawn."""

    action: Float[Array, " act"]
    begun: Bool[Array, ""]


PRESETS: dict[str, dict[str, Any]] = {
    "default": {
        "critic": "network",
        "cost_unit": "gradient",
        # a cost tied to the gradient's size feeds back on it through the penalty, and runs away
        "penalty": 0.0,
        "test_function": "gradient",
        "inner_steps": 4,
        "critics": 2,
        "target_rate": 0.15,
        "average_share": 0.05,
        "critic_lr": 1e-3,
        "score_lr": 1e-3,
        "decay_seconds": None,
        "hidden": (256, 256),
        "first_action": 0.0,
        "score_spread": 0.2,
        "uniform_share": 0.5,
        "batch_size": 256,
        "warmup_steps": 1_000,
        "updates_per_step": 1.0,
        "replay_capacity": 1_000_000,
    },
    "linear_quadratic": {
        "critic": "features",
        "cost_unit": "reward",
        "penalty": 1.0,
        "test_function": "weighted",
        "inner_steps": 1,
        "critics": 1,
        "target_rate": None,
        "average_share": 0.4,
        "critic_lr": 3e-3,
        "score_lr": 3e-3,
        "decay_seconds": 30.0,
        "hidden": (64, 64),
        "first_action": 0.15,
        "score_spread": 0.15,
        "uniform_share": 0.0,
        "batch_size": 256,
        "warmup_steps": 1_280,
        "updates_per_step": 1.0 / 128.0,
        # 16 s of 128 copies: what early, worse scores led to is rare and large
        "replay_capacity": 204_800,
    },
}


@dataclass(frozen=True)
class CQSM:
    """Continuous q-score matching: a score that drives the action in the state's own time."""

    preset: Literal["default", "linear_quadratic"] = "default"
    """Where fields that are not given take their values: `default` is for control tasks,
    `linear_quadratic` for the problems with a closed form."""
    critic: Literal["network", "features"] = preset_field()
    """A network learned by Adam, or quadratic features with least squares."""
    discount_rate: Annotated[float | None, Range(0)] = None
    """beta per second, in [0, inf). None is what the task prescribes, else 0.2: a discount factor
    of 0.99 per step of 0.05 s."""
    score_cost: Annotated[float | None, Range(0, low_open=True)] = None
    """lambda, in (0, inf); its unit is `cost_unit`. None is what the task prescribes, where that is
    `reward`, else 0.05."""
    cost_unit: Literal["gradient", "reward"] = preset_field()
    """Unit of `score_cost`: `gradient` is seconds times the size of grad_a Q (its running mean; of
    features the last batch's), so that the cost is the time in which a gradient of usual size moves
    the action by 1; `reward` is a reward times seconds, as in the theory."""
    action_noise: Annotated[float | None, Range(0)] = None
    """sigma_a, in [0, inf), actions per sqrt(second). None is what the task prescribes, else 1.8:
    0.4 in a step of 0.05 s."""
    penalty: Annotated[float, Range(0, 1)] = preset_field()
    """Share of the score's cost that is charged to Q, in [0, 1]; the theory's is 1."""
    inner_steps: Annotated[int, Range(1, 100)] = preset_field()
    """Euler-Maruyama steps of the action process per control step, in [1, 100]. Features learn as
    with one, and only act in more."""
    test_function: Literal["gradient", "weighted"] = preset_field()
    """xi: the critic's parameter gradient, or that over the increment's conditional variance, from
    a regression on quadratic features: of dx dx' / dt for features, of dM^2 / dt for networks."""
    control_variate: bool = True
    """Take the simulated action noise's known effect off dM: for features all of it, for networks
    with one inner step the first order; with more inner steps networks do without."""
    relaxation_rate: Annotated[float, Range(0, low_open=True)] = 2.0
    """Rate at which a feature score follows grad_a Q / lambda, in (0, inf), 1/s."""
    window: Annotated[float, Range(0, 1, low_open=True)] = 0.5
    """Share of all experience that the least squares remember, in (0, 1]; over a finite horizon at
    most 0.2."""
    critics: Annotated[int, Range(1, 10)] = preset_field()
    """Network critics, in [1, 10]; the smallest makes the target, their mean the gradient."""
    target_rate: Annotated[float | None, Range(0, low_open=True)] = preset_field()
    """Rate at which target networks follow, in (0, inf), 1/s; None is no target network."""
    average_share: Annotated[float, Range(0, 1, high_open=True)] = preset_field()
    """Share of the latest updates over which the evaluated score is averaged, in [0, 1)."""
    critic_lr: Annotated[float, Range(0, low_open=True)] = preset_field()
    """Adam's step size for network critics at a control step of 0.05 s, in (0, inf)."""
    score_lr: Annotated[float, Range(0, low_open=True)] = preset_field()
    """The same for the score, in (0, inf)."""
    decay_seconds: Annotated[float | None, Range(0, low_open=True)] = preset_field()
    """Experience, in (0, inf) seconds, that halves both step sizes; they fall as
    1 / (1 + experience / decay_seconds). None is constant step sizes."""
    score_spread: Annotated[float, Range(0)] = preset_field()
    """Standard deviation about replayed actions where the score is regressed, in [0, inf)."""
    uniform_share: Annotated[float, Range(0, 1)] = preset_field()
    """Share of actions drawn uniformly from the box for that regression, in [0, 1]."""
    score_limit: Annotated[float, Range(0, low_open=True)] = 240.0
    """Largest component of the score that is learned, in (0, inf), actions per second."""
    hidden: Annotated[tuple[int, ...], Range(1)] = preset_field()
    """Hidden layer widths of network critics and scores, each in [1, inf)."""
    critic_activation: Literal["relu", "silu"] = "silu"
    """Between a network critic's layers. The score learns from its gradient, which ReLU makes
    piecewise constant."""
    normalize_inputs: bool = True
    """Whether networks see observations and actions of mean 0 and variance 1, by running
    moments."""
    first_action: Annotated[float, Range(0)] = preset_field()
    """Standard deviation of an explored episode's first action, in [0, inf), half action ranges."""
    batch_size: Annotated[int, Range(1)] = preset_field()
    """Transitions per update, in [1, inf)."""
    warmup_steps: Annotated[int, Range(1)] = preset_field()
    """Environment steps with random actions before the first update, in [1, inf)."""
    updates_per_step: Annotated[float, Range(0, low_open=True)] = preset_field()
    """Gradient updates per environment step, in (0, inf). Each learns from dt seconds."""
    replay_capacity: Annotated[int, Range(1)] = preset_field()
    """Transitions the replay buffer holds, in [1, inf)."""

    def __post_init__(self):
        resolve_preset(self, PRESETS)
        validate(self)

    # -- set-up --------------------------------------------------------------------------------

    def constants(self, spec: Spec) -> Constants:
        """The hyperparameters where they are given, else what the task prescribes."""

        def number(value: float) -> Float[Array, ""]:
            return jnp.asarray(value, jnp.float32)

        noise = _first(self.action_noise, spec.action_noise, ACTION_NOISE)
        prescribed = spec.score_cost if self.cost_unit == "reward" else None  # as it is meant
        matrix = jnp.asarray(noise, jnp.float32)
        if matrix.ndim == 0:
            matrix = matrix * jnp.eye(spec.action_size)
        return Constants(
            discount_rate=number(self._discount_rate(spec)),
            score_cost=number(_first(self.score_cost, prescribed, SCORE_COST)),
            action_noise=matrix,
            dt=jnp.asarray(spec.dt, jnp.float32),
            horizon=jnp.asarray(spec.horizon if spec.horizon else 1.0, jnp.float32),
            speed=jnp.asarray(1.0 / SCORE_COST if self.cost_unit == "gradient" else 1.0),
        )

    def _discount_rate(self, spec: Spec) -> float:
        return _first(self.discount_rate, spec.discount_rate, DISCOUNT_RATE)

    def init(self, spec: Spec, *, key: Key) -> CQSMState:
        """A critic and a score of zero (features) or fresh networks.

        Raises `ValueError` where features would learn without a discount and without an end.
        """
        critic_key, score_key = jr.split(key)
        size = spec.obs_size - ("dt" in spec.clock)
        if self.critic == "features":
            if self._discount_rate(spec) == 0.0 and "time" not in spec.clock:
                raise ValueError(
                    "`discount_rate` is 0 and the task does not observe its time: values of an "
                    "infinite horizon are then infinite, and feature critics cannot learn them. "
                    "Set `algorithm.discount_rate` above 0."
                )
            time_degree = TIME_DEGREE if "time" in spec.clock else 0
            shape = jax.eval_shape(
                lambda: quadratic_features(
                    jnp.zeros(size), jnp.zeros(spec.action_size), time_degree
                )
            )
            n = shape.shape[0]
            critic: Any = Quadratic(jnp.zeros(n), time_degree)
            score: Any = Quadratic(jnp.zeros(n), time_degree)
            weighted = self.test_function == "weighted"
            states = size - ("time" in spec.clock)
            diffusion = DiffusionFit.zeros(n // (time_degree + 1), states) if weighted else None
            learner: Any = FeatureLearner(
                LeastSquares.zeros(
                    n, None if time_degree else len(moved_features(size, spec.action_size))
                ),
                diffusion,
                jnp.zeros(()),
            )
        else:
            moments = Moments.unit(size + spec.action_size)
            sizes = (size + spec.action_size, *self.hidden)
            activation = getattr(jax.nn, self.critic_activation)
            critic = NetworkQ(
                jax.vmap(lambda key: MLP((*sizes, 1), activation, key=key))(
                    jr.split(critic_key, self.critics)
                ),
                jax.tree.map(
                    lambda leaf: jnp.broadcast_to(leaf, (self.critics, *leaf.shape)), moments
                ),
            )
            mlp = MLP((*sizes, spec.action_size), jax.nn.silu, key=score_key)
            last = mlp.layers[-1]
            # the first score is zero: acting begins as a random walk
            mlp = eqx.tree_at(lambda m: m.layers[-1].weight, mlp, jnp.zeros_like(last.weight))
            score = ScoreMLP(mlp, moments)
            inputs = size + spec.action_size
            quadratics = (inputs + 1) * (inputs + 2) // 2
            learner = NetworkLearner(
                jax.tree.map(jnp.copy, critic),
                VarianceFit.zeros(quadratics) if self.test_function == "weighted" else None,
                optax.adam(1.0).init(critic.mlp),
                optax.adam(1.0).init(score.mlp),
            )
        return CQSMState(
            critic=critic,
            score=score,
            average_score=jax.tree.map(jnp.copy, score),
            learner=learner,
            constants=self.constants(spec),
            gradient_scale=jnp.zeros(()),
            learned=jnp.zeros(()),
            updates=jnp.zeros((), jnp.int32),
            clock=spec.clock,
        )

    def init_carry(self, spec: Spec) -> CQSMCarry:
        """The action process before an episode's first observation."""
        return CQSMCarry(jnp.zeros(spec.action_size), jnp.zeros((), bool))

    # -- acting --------------------------------------------------------------------------------

    def act(
        self,
        state: CQSMState,
        carry: CQSMCarry,
        obs: Float[Array, " obs"],
        *,
        key: Key,
        explore: bool,
    ) -> tuple[Float[Array, " act"], CQSMCarry]:
        """Move the carried action through the time since the last observation."""
        first_key, noise_key = jr.split(key)
        constants = state.constants
        score = state.score if explore else state.average_score
        # the process begins at one action, a nominal step before the first observation
        elapsed = obs[-1] if "dt" in state.clock else constants.dt
        dt = jnp.where(carry.begun, elapsed, constants.dt)
        obs = self.view(state, obs)
        noise = constants.action_noise if explore else jnp.zeros_like(constants.action_noise)
        first = self.first_action * jr.normal(first_key, carry.action.shape)
        first = jnp.clip(first, -1.0, 1.0) if explore else jnp.zeros_like(first)
        start = jnp.where(carry.begun, carry.action, first)
        action, _ = self.move(state, score, obs, start, dt, noise, key=noise_key)
        return action, CQSMCarry(action, jnp.ones((), bool))

    def view(self, state: CQSMState, obs: Float[Array, " obs"]) -> Float[Array, " view"]:
        """What critic and score see: no elapsed time, and the episode's time as a share."""
        if "dt" in state.clock:
            obs = obs[:-1]
        if "time" in state.clock:
            obs = obs.at[-1].divide(state.constants.horizon)
        return obs

    def psi(
        self, state: CQSMState, score: Any, obs: Float[Array, " view"], action: Float[Array, " act"]
    ) -> Float[Array, " act"]:
        """The score, in actions per second."""
        if isinstance(score, Quadratic):
            return jax.grad(score, argnums=1)(obs, action) / self.cost(state)
        psi = state.constants.speed * score(obs, action)
        return jnp.clip(psi, -self.score_limit, self.score_limit)

    def value_and_score(
        self, state: CQSMState, obs: Float[Array, " obs"], action: Float[Array, " act"]
    ) -> tuple[Float[Array, ""], Float[Array, " act"]]:
        """Q (the mean of the critics) and the evaluated score at one observation and action."""
        obs = self.view(state, obs)
        critic: Any = state.critic
        q = critic(obs, action) if isinstance(critic, Quadratic) else mean_q(critic, obs, action)
        return q, self.psi(state, state.average_score, obs, action)

    def cost(self, state: CQSMState) -> Float[Array, ""]:
        """lambda, in reward times seconds."""
        if self.cost_unit == "reward":
            return state.constants.score_cost
        return state.constants.score_cost * jnp.maximum(state.gradient_scale, 1e-6)

    def move(
        self,
        state: CQSMState,
        score: Any,
        obs: Float[Array, " view"],
        action: Float[Array, " act"],
        dt: Float[Array, ""],
        noise: Float[Array, "act act"],
        *,
        key: Key,
    ) -> tuple[Float[Array, " act"], Float[Array, ""]]:
        """The action process over `dt` at a held observation, kept in the box.

        Returns the action and the mean of |drift|^2 that the box let through, (actions/s)^2.
        """
        h = dt / self.inner_steps

        def step(carry, dw):
            a, effort = carry
            drifted = jnp.clip(a + h * self.psi(state, score, obs, a), -1.0, 1.0)
            effort = effort + jnp.sum((drifted - a) ** 2)
            a = jnp.clip(drifted + jnp.sqrt(h) * (noise @ dw), -1.0, 1.0)
            return (a, effort), None

        draws = jr.normal(key, (self.inner_steps, action.shape[0]))
        (action, effort), _ = jax.lax.scan(step, (action, jnp.zeros(())), draws)
        return action, effort / jnp.maximum(self.inner_steps * h**2, 1e-12)

    def next_q(
        self,
        state: CQSMState,
        next_obs: Float[Array, " view"],
        action: Float[Array, " act"],
        dt: Float[Array, ""],
        *,
        key: Key,
    ) -> tuple[Float[Array, " critics"], Float[Array, ""]]:
        """Every target network's Q after one draw of the action's move, and the move's effort.

        Less the first order of the draw's noise, with `control_variate` and one inner step: the
        mean stays the same and most of the noise goes.
        """
        noise = state.constants.action_noise
        learner: Any = state.learner
        moved, effort = self.move(state, state.score, next_obs, action, dt, noise, key=key)
        q = jax.vmap(lambda critic: critic(next_obs, moved))(learner.target)
        if self.control_variate and self.inner_steps == 1:
            still, _ = self.move(state, state.score, next_obs, action, dt, 0.0 * noise, key=key)
            slope = jax.vmap(lambda critic: jax.grad(critic, argnums=1)(next_obs, still))
            # at the bounds the box turns noise into drift, which stays
            mean = martingale.mean_in_box(still, jnp.sqrt(dt) * noise)
            q = q - slope(learner.target) @ (moved - mean)
        return q, effort

    # -- learning ------------------------------------------------------------------------------

    def update(self, state: CQSMState, batch: Transition, *, key: Key) -> tuple[CQSMState, Metrics]:
        """One step of the critic, then one of the score against the new critic."""
        learn = self._learn_features if self.critic == "features" else self._learn_networks
        seen = jax.vmap(lambda obs: self.view(state, obs))
        next_obs = seen(batch.next_obs)
        batch = eqx.tree_at(lambda b: (b.obs, b.next_obs), batch, (seen(batch.obs), next_obs))
        seconds = jnp.mean(batch.dt)
        state = eqx.tree_at(
            lambda s: (s.learned, s.updates), state, (state.learned + seconds, state.updates + 1)
        )
        state, metrics = learn(state, batch, key=key)
        if self.average_share > 0.0:
            weight = 1.0 / jnp.maximum(self.average_share * state.updates.astype(jnp.float32), 1.0)
            average = jax.tree.map(
                lambda old, new: old + weight * (new - old), state.average_score, state.score
            )
        else:
            average = state.score
        return eqx.tree_at(lambda s: s.average_score, state, average), metrics

    def _learn_features(self, state: CQSMState, batch: Transition, *, key: Key):
        constants, cost = state.constants, self.cost(state)
        learner: Any = state.learner
        critic: Any = state.critic
        time_degree = critic.time_degree
        alive = 1.0 - batch.terminated.astype(jnp.float32)
        phi_of = lambda obs, action: quadratic_features(obs, action, time_degree)  # noqa: E731

        def ahead(obs, next_obs, action, dt, key):
            """phi at the next state and action, in the mean over the action's noise."""
            psi = self.psi(state, state.score, next_obs, action)
            drifted = action + dt * psi
            noise = jnp.sqrt(dt) * constants.action_noise
            if self.control_variate:
                phi_next = martingale.mean_over_noise(
                    lambda action: phi_of(next_obs, action), drifted, noise
                )
            else:
                moved = drifted + noise @ jr.normal(key, action.shape)
                phi_next = phi_of(next_obs, moved)
            slope = jax.jacobian(phi_of, argnums=1)(next_obs, action)
            return phi_of(obs, action), phi_next, 0.5 * cost * jnp.sum(psi**2), slope, slope @ psi

        keys = jr.split(key, batch.reward.shape[0])
        phi, phi_next, penalty, slope, push = jax.vmap(ahead)(
            batch.obs, batch.next_obs, batch.action, batch.dt, keys
        )
        phi_next = alive[:, None] * phi_next
        # no action moves where an episode has ended
        net = batch.reward / batch.dt - self.penalty * penalty * alive
        increment = martingale.increment(
            phi @ critic.theta,
            phi_next @ critic.theta,
            net,
            jnp.zeros_like(net),
            batch.dt,
            discount_rate=constants.discount_rate,
        )
        seconds = jnp.mean(batch.dt)
        window = min(self.window, FINITE_WINDOW) if time_degree else self.window
        keep = kept(window, state, seconds)
        weight, diffusion = jnp.ones_like(net), learner.diffusion
        if diffusion is not None:
            untimed = phi[:, : phi.shape[1] // (time_degree + 1)]  # those times T_0 = 1
            states = batch.obs.shape[1] - (time_degree > 0)
            weight, diffusion = diffusion.weights(
                untimed,
                jax.vmap(jax.grad(critic))(batch.obs, batch.action)[:, :states],
                (batch.next_obs - batch.obs)[:, :states],
                batch.dt,
                keep=keep,
            )
        reward_rate = net
        if not time_degree:  # without the present score's part, which `under` adds for any score
            phi_next = phi_next - (batch.dt * alive)[:, None] * push
            reward_rate = batch.reward / batch.dt
        moved = moved_features(batch.obs.shape[1], batch.action.shape[1])
        sums = equations = martingale.accumulate(
            learner.sums,
            weight[:, None] * phi,
            phi,
            phi_next,
            reward_rate,
            batch.dt,
            keep=keep,
            discount_rate=constants.discount_rate,
            slope=None if time_degree else alive[:, None, None] * slope[:, moved],
        )
        if not time_degree:
            equations = sums.under(
                state.score.theta[moved],  # pyright: ignore[reportAttributeAccessIssue]
                moved,
                score_cost=cost,
                penalty=self.penalty,
                discount_rate=constants.discount_rate,
                dt=seconds,
            )
        fit = martingale.solve(
            equations,
            discount_rate=constants.discount_rate,
            finite_horizon=bool(time_degree),
            margin=(FINITE_CAUTION if time_degree else 1.0)
            * jnp.exp(-state.learned / CAUTIOUS_SECONDS),
        )
        # the terminal reward is all that ties Q down in a finite horizon: it must have been seen
        ends = learner.ends + jnp.sum(1.0 - alive)
        if time_degree:
            seen = ends >= critic.theta.shape[0]
            ready = seen & (state.learned > 1.0 + 1.2 * constants.horizon)
        else:
            ready = state.learned > 1.0
        theta = jnp.where(ready, fit.theta, critic.theta)
        follow = -jnp.expm1(-self.relaxation_rate * seconds)
        old: Any = state.score
        score = Quadratic(
            old.theta + jnp.where(ready, follow, 0.0) * (theta - old.theta), time_degree
        )

        gradient = jax.vmap(jax.grad(Quadratic(theta, time_degree), argnums=1))(
            batch.obs, batch.action
        )
        scale = jnp.sqrt(jnp.mean(gradient**2))  # features are 0 until they are fitted: no average
        state = eqx.tree_at(
            lambda s: (s.critic, s.score, s.learner, s.gradient_scale),
            state,
            (Quadratic(theta, time_degree), score, FeatureLearner(sums, diffusion, ends), scale),
        )
        metrics = {
            "critic_loss": jnp.mean(increment**2 / batch.dt),
            "q": jnp.mean(phi @ theta),
            "gradient_scale": scale,
            "penalty_rate": jnp.mean(penalty),
        }
        if not time_degree:  # with a finite horizon every score has a value
            metrics["stability_margin"] = constants.discount_rate - fit.growth_rate
        return state, metrics

    def _learn_networks(self, state: CQSMState, batch: Transition, *, key: Key):
        constants, cost = state.constants, self.cost(state)
        learner: Any = state.learner
        move_key, where_key, uniform_key, spread_key = jr.split(key, 4)
        rows, seconds = batch.reward.shape[0], jnp.mean(batch.dt)
        # dM is noise of order sqrt(dt), which Adam divides by
        pace = jnp.sqrt(seconds / REFERENCE_DT)
        if self.decay_seconds is not None:
            pace = pace / (1.0 + state.learned / self.decay_seconds)

        def ahead(next_obs, action, dt, key):
            """The smallest target Q at the next state and action, and the penalty's rate."""
            q, effort = self.next_q(state, next_obs, action, dt, key=key)
            return jnp.min(q), 0.5 * cost * effort

        inputs = jnp.concatenate([batch.obs, batch.action], axis=1)
        moments = state.score.moments  # pyright: ignore[reportAttributeAccessIssue]
        if self.normalize_inputs:
            moments = observe(moments, inputs)
        stacked = jax.tree.map(
            lambda leaf: jnp.broadcast_to(leaf, (self.critics, *leaf.shape)), moments
        )

        keys = jr.split(move_key, rows)
        q_next, penalty = jax.vmap(ahead)(batch.next_obs, batch.action, batch.dt, keys)
        alive = 1.0 - batch.terminated.astype(jnp.float32)

        def increments(mlps: Any) -> tuple[Any, Any]:
            critics = NetworkQ(mlps, stacked)
            q = jax.vmap(lambda critic: jax.vmap(critic)(batch.obs, batch.action))(critics)

            def increment(q: Float[Array, " batch"]) -> Any:
                return martingale.increment(
                    q,
                    alive * q_next,
                    batch.reward / batch.dt,
                    self.penalty * penalty * alive,
                    batch.dt,
                    discount_rate=constants.discount_rate,
                )

            return jax.vmap(increment)(q), q

        weight, variance = jnp.ones_like(batch.reward), learner.variance
        if variance is not None:
            dm, _ = increments(state.critic.mlp)  # pyright: ignore[reportAttributeAccessIssue]
            phi = jax.vmap(lambda z: quadratic_features(standardize(moments, z), z[:0], 0))(inputs)
            rms = jnp.sqrt(jnp.mean(dm**2, axis=0))
            weight, variance = variance.weights(
                phi, rms, batch.dt, keep=kept(VARIANCE_WINDOW, state, seconds), shift=1.0
            )

        def critic_loss(mlps: Any):
            dm, q = increments(mlps)
            loss = jnp.sum(jnp.mean(weight[None] * dm**2 / batch.dt[None], axis=1))
            return loss, {"critic_loss": loss, "q": jnp.mean(q)}

        # q_next is held fixed: the semi-gradient is the orthogonality update with xi = dQ/dtheta
        mlps, critic_opt, metrics = gradient_step(
            critic_loss,
            state.critic.mlp,  # pyright: ignore[reportAttributeAccessIssue]
            optax.adam(self.critic_lr * pace),
            learner.critic_opt,
        )
        critic = NetworkQ(mlps, stacked)  # the moments are observed, not trained
        follow = 1.0 if self.target_rate is None else -jnp.expm1(-self.target_rate * seconds)
        target = move_target(critic, learner.target, follow)  # pyright: ignore[reportArgumentType]

        shape = batch.action.shape
        near = batch.action + self.score_spread * jr.normal(spread_key, shape)
        anywhere = jr.uniform(uniform_key, shape, minval=-1.0, maxval=1.0)
        uniform = jr.bernoulli(where_key, self.uniform_share, (rows, 1))
        action = jnp.where(uniform, anywhere, jnp.clip(near, -1.0, 1.0))

        gradient = jax.vmap(jax.grad(mean_q, argnums=2), (None, 0, 0))(critic, batch.obs, action)
        rms = jnp.sqrt(jnp.mean(gradient**2))
        rate = jnp.where(state.updates == 1, 1.0, -jnp.expm1(-seconds / SCALE_SECONDS))
        scale = state.gradient_scale + rate * (rms - state.gradient_scale)
        cost = self.cost(eqx.tree_at(lambda s: s.gradient_scale, state, scale))
        goal = jnp.clip(gradient / cost, -self.score_limit, self.score_limit)

        def score_loss(mlp: Any):
            network: Any = ScoreMLP(mlp, moments)
            error = jax.vmap(network)(batch.obs, action) - goal / constants.speed
            loss = jnp.mean(error**2)
            return loss, {"actor_loss": loss}

        mlp, score_opt, score_metrics = gradient_step(
            score_loss,
            state.score.mlp,  # pyright: ignore[reportAttributeAccessIssue]
            optax.adam(self.score_lr * pace),
            learner.score_opt,
        )
        score = ScoreMLP(mlp, moments)
        state = eqx.tree_at(
            lambda s: (s.critic, s.score, s.learner, s.gradient_scale),
            state,
            (critic, score, NetworkLearner(target, variance, critic_opt, score_opt), scale),
        )
        return state, metrics | score_metrics | {
            "gradient_scale": rms,
            "score_norm": jnp.mean(jnp.linalg.norm(goal, axis=-1)),
            "penalty_rate": jnp.mean(penalty),
            "action_saturation": saturation(batch.action),
        }


def kept(window: float, state: CQSMState, seconds: Float[Array, ""]) -> Float[Array, ""]:
    """Weight of what running sums contain when `seconds` more have been learned from."""
    return jnp.exp(-seconds / (window * jnp.maximum(state.learned, seconds)))
