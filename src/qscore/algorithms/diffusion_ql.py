"""Diffusion-QL.  Wang, Hunt, Zhou, ICLR 2023, arXiv:2208.06193.

The actor is a diffusion model of the actions in the data, pulled towards actions of high value. The
critics' action gradient goes through the whole sampling chain, where QSM regresses each level onto
it by itself:

    L(theta) = bc_weight L_d(theta) + q_weight L_q(theta)
    L_d      = E | eps - eps_theta(s, a_t, t) |^2,   a_t = alpha_t a + sigma_t eps,   t uniform
    L_q      = -E Q_i(s, a_0) / E |Q_j(s, a_0)|,     a_0 from theta's own chain at s

(i, j) is (1, 2) or (2, 1), by one coin per update, and the divisor is held fixed: with it, q_weight
has no unit and rewards may be on any scale. The critics learn by one-step Q-learning on the
averaged actor's next action,

    y = r + gamma (1 - terminated) min_i Qbar_i(s', a'),           a' ~ average actor's chain at s',
    y = r + gamma (1 - terminated) min_i max_n Qbar_i(s', a'_n),   with `max_q_backup`: ten samples.

`best_of` > 1 acts as the authors' code does: of N sampled actions one is drawn with probability
softmax over n of min_i Qbar_i(s, a_n). Their figures have N = 50; it is 1 here.

Deviations from the paper's released code: (1) the time embedding is QSM's, learned Fourier features
into (128, 128), where theirs is sinusoidal, 16 wide; (2) the average actor follows from the first
update on, not from the thousandth; (3) evaluation takes one sample of the average actor, where
theirs draws from 50 of the actor itself; (4) step sizes decay at every update, theirs every
thousand; (5) layers start Glorot-uniform. Preset "offline" is the code otherwise, with its gym
tasks' usual settings; "default" is for learning online from scratch, where a replay buffer is no
demonstration: the value's unit is its gradient's size, its weight 5, and explored actions have
noise; the average follows at every update, networks are (256, 256), the critics' activation is
SiLU, no gradient is clipped and step sizes are constant.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, Float, Int

from qscore.algorithms.base import saturation
from qscore.config import Range, preset_field, resolve_preset, validate
from qscore.critics import bootstrap, critic_loss, q_values, stack_critics
from qscore.denoiser import Chain, score_loss
from qscore.networks import Critic, ScoreNetwork, mish
from qscore.normalize import Moments, observe_and_standardize, standardize
from qscore.optimize import gradient_step, move_target
from qscore.types import AnyArray, Carry, Key, Metrics, Spec, Transition

BACKUP_SAMPLES = 10
"""Next actions per row of `max_q_backup`, as in the released code."""


def value_loss(
    actor: ScoreNetwork,
    critics: Critic,
    obs: Float[AnyArray, "batch obs"],
    *,
    chain: Chain,
    normalization: Literal["value", "gradient"],
    leader: Int[Array, ""],
    key: Key,
) -> Float[Array, ""]:
    """-mean Q_i(s, a_0) / c, i = `leader`, c the mean |Q_j(s, a_0)| or |grad_a Q_i| component.

    Differentiating in `actor` goes back through every step of the chain.
    """
    first = jax.tree.map(lambda leaf: leaf[leader], critics)
    action = chain.sample_batch(actor, obs, key=key)
    q, gradient = jax.vmap(jax.value_and_grad(first, argnums=1))(obs, action)
    if normalization == "value":
        other = jax.tree.map(lambda leaf: leaf[1 - leader], critics)
        unit = jnp.mean(jnp.abs(jax.vmap(other)(obs, action)))
    else:
        unit = jnp.mean(jnp.abs(gradient))
    # critics that are flat everywhere pull nowhere: 0 / 0 must stay 0
    unit = jax.lax.stop_gradient(jnp.maximum(unit, 1e-12))
    # one pass back through the critic: its value is q, its derivative in the action `gradient`
    held = jax.lax.stop_gradient((q, gradient, action))
    linear = held[0] + jnp.sum(held[1] * (action - held[2]), axis=1)
    return -jnp.mean(linear) / unit


class DiffusionQLState(eqx.Module):
    """Everything Diffusion-QL learns."""

    actor: ScoreNetwork
    average_actor: ScoreNetwork  # follows the actor at `average_rate`
    critics: Critic  # stacked: leading axis "critics"
    target_critics: Critic
    actor_opt: optax.OptState
    critic_opt: optax.OptState
    moments: Moments  # of the observations
    updates: Int[Array, ""]


PRESETS: dict[str, dict[str, Any]] = {
    "default": {
        "q_weight": 5.0,
        "normalization": "gradient",
        "exploration_noise": 0.1,
        "average_every": 1,
        "critic_activation": "silu",
        "max_gradient_norm": None,
        "decay_steps": None,
        "hidden": (256, 256),
    },
    "offline": {
        "q_weight": 1.0,
        "normalization": "value",
        "exploration_noise": 0.0,
        "average_every": 5,
        "critic_activation": "mish",
        "max_gradient_norm": 9.0,
        "decay_steps": 2_000_000,
        "hidden": (256, 256, 256),
    },
}

ACTIVATIONS = {"relu": jax.nn.relu, "silu": jax.nn.silu, "mish": mish}


@dataclass(frozen=True)
class DiffusionQL:
    """Diffusion-QL: a diffusion model of the data's actions, pulled uphill through its chain."""

    preset: Literal["default", "offline"] = "default"
    """Where fields that are not given take their values: `default` learns online from scratch,
    `offline` is the released code's setting for recorded data."""
    q_weight: Annotated[float, Range(0)] = preset_field()
    """eta, the weight of the value term, in [0, inf), no unit. 0 is behaviour cloning."""
    normalization: Literal["value", "gradient"] = preset_field()
    """The value term's unit: the mean size of the values, or of their action gradient."""
    bc_weight: Annotated[float, Range(0)] = 1.0
    """Weight of the denoising (behaviour cloning) term, in [0, inf), no unit."""
    max_q_backup: bool = False
    """Whether the critics' target takes the best of ten next actions; the paper does on AntMaze."""
    schedule: Literal["vp", "cosine", "linear"] = "vp"
    """Noise schedule of the diffusion chain."""
    noise_levels: Annotated[int, Range(1, 1000)] = 5
    """Number T of noise levels, and of network evaluations per action, in [1, 1000]."""
    variance: Literal["beta", "posterior"] = "posterior"
    """Variance of each reverse step: beta_t, or that of q(a_{t-1} | a_t, a_0)."""
    exploration_noise: Annotated[float, Range(0)] = preset_field()
    """Standard deviation of the noise added to explored actions, in [0, inf), unit: half the action
    range."""
    normalize_observations: bool = False
    """Whether the networks see observations of mean 0 and variance 1, by running moments."""
    best_of: Annotated[int, Range(1, 1024)] = 1
    """Act with one of N sampled actions, drawn by the softmax of their values, in [1, 1024].
    Evaluation during training never uses it."""
    discount: Annotated[float, Range(0, 1, high_open=True)] = 0.99
    """Discount factor per environment step, in [0, 1)."""
    target_rate: Annotated[float, Range(0, 1, low_open=True)] = 0.005
    """Weight of the new parameters when the target critics follow, in (0, 1], per update."""
    average_rate: Annotated[float, Range(0, 1, low_open=True)] = 0.005
    """Weight of the new parameters when the actor's average follows, in (0, 1]. The average makes
    the critics' next action and acts when not exploring."""
    average_every: Annotated[int, Range(1)] = preset_field()
    """Updates between two steps of the average, in [1, inf)."""
    actor_lr: Annotated[float, Range(0, low_open=True)] = 3e-4
    """Adam's step size for the actor, in (0, inf)."""
    critic_lr: Annotated[float, Range(0, low_open=True)] = 3e-4
    """Adam's step size for the critics, in (0, inf)."""
    critic_activation: Literal["relu", "silu", "mish"] = preset_field()
    """Between the critics' layers."""
    max_gradient_norm: Annotated[float | None, Range(0, low_open=True)] = preset_field()
    """Euclidean norm that the actor's and the critics' gradients are clipped to, in (0, inf); None
    is not at all."""
    decay_steps: Annotated[int | None, Range(1)] = preset_field()
    """Updates over which both step sizes fall to zero on a cosine, in [1, inf); None is
    constant."""
    hidden: Annotated[tuple[int, ...], Range(1)] = preset_field()
    """Hidden layer widths of actor and critics, each in [1, inf)."""
    batch_size: Annotated[int, Range(1)] = 256
    """Transitions per update, in [1, inf)."""
    warmup_steps: Annotated[int, Range(1)] = 3_000
    """Environment steps with uniformly random actions before the first update, in [1, inf)."""
    updates_per_step: Annotated[float, Range(0, low_open=True)] = 1.0
    """Gradient updates per environment step (the update-to-data ratio), in (0, inf)."""
    replay_capacity: Annotated[int, Range(1)] = 1_000_000
    """Transitions the replay buffer holds, in [1, inf)."""

    def __post_init__(self):
        resolve_preset(self, PRESETS)
        validate(self)

    @property
    def chain(self) -> Chain:
        """How this policy's network becomes actions."""
        return Chain(self.schedule, self.noise_levels, "noise", self.variance, "clean")

    def init(self, spec: Spec, *, key: Key) -> DiffusionQLState:
        """A fresh actor and two critics, their targets and optimisers."""
        actor_key, critics_key = jr.split(key)
        actor = ScoreNetwork(spec.obs_size, spec.action_size, self.hidden, key=actor_key)
        activation = ACTIVATIONS[self.critic_activation]
        critics = stack_critics(2, spec, self.hidden, activation=activation, key=critics_key)
        return DiffusionQLState(
            actor=actor,
            average_actor=jax.tree.map(jnp.copy, actor),  # buffers of their own, to be donated
            critics=critics,
            target_critics=jax.tree.map(jnp.copy, critics),
            actor_opt=self._optimizer(self.actor_lr).init(actor),  # pyright: ignore[reportArgumentType]
            critic_opt=self._optimizer(self.critic_lr).init(critics),  # pyright: ignore[reportArgumentType]
            moments=Moments.unit(spec.obs_size),
            updates=jnp.zeros((), jnp.int32),
        )

    def init_carry(self, spec: Spec) -> Carry:
        """Nothing: each action starts from fresh noise."""
        return ()

    def act(
        self,
        state: DiffusionQLState,
        carry: Carry,
        obs: Float[Array, " obs"],
        *,
        key: Key,
        explore: bool,
    ) -> tuple[Float[Array, " act"], Carry]:
        """A sample of the chain: the actor's when exploring, else its average's; see `best_of`."""
        chain_key, noise_key, choice_key = jr.split(key, 3)
        obs = standardize(state.moments, obs) if self.normalize_observations else obs
        actor = state.actor if explore else state.average_actor
        if self.best_of > 1:
            rows = jnp.broadcast_to(obs, (self.best_of, *obs.shape))
            candidates = self.chain.sample_batch(actor, rows, key=chain_key)
            value = jnp.min(q_values(state.target_critics, rows, candidates), axis=0)
            action = candidates[jr.categorical(choice_key, value)]
        else:
            action = self.chain.sample(actor, obs, key=chain_key)
        if explore:
            action = action + self.exploration_noise * jr.normal(noise_key, action.shape)
        return jnp.clip(action, -1.0, 1.0), carry

    def update(
        self, state: DiffusionQLState, batch: Transition, *, key: Key
    ) -> tuple[DiffusionQLState, Metrics]:
        """One step of the critics, then one of the actor against the new critics."""
        next_key, actor_key = jr.split(key)
        moments = state.moments
        if self.normalize_observations:
            moments, batch = observe_and_standardize(moments, batch)
        next_value, next_action = self._next_value(state, batch, key=next_key)
        critics, critic_opt, critic_metrics = gradient_step(
            critic_loss,
            state.critics,
            self._optimizer(self.critic_lr),
            state.critic_opt,
            batch,
            bootstrap(batch, next_value, self.discount),
        )
        actor, actor_opt, actor_metrics = gradient_step(
            self._actor_loss,
            state.actor,
            self._optimizer(self.actor_lr),
            state.actor_opt,
            critics,
            batch,
            key=actor_key,
        )
        updates = state.updates + 1
        due = updates % self.average_every == 0
        rate = jnp.where(due, self.average_rate, 0.0).astype(jnp.float32)
        state = DiffusionQLState(
            actor=actor,
            average_actor=move_target(actor, state.average_actor, rate),
            critics=critics,
            target_critics=move_target(critics, state.target_critics, self.target_rate),
            actor_opt=actor_opt,
            critic_opt=critic_opt,
            moments=moments,
            updates=updates,
        )
        metrics = {"action_saturation": saturation(next_action)}
        return state, critic_metrics | actor_metrics | metrics

    def _optimizer(self, size: float) -> optax.GradientTransformation:
        steps = self.decay_steps
        adam = optax.adam(size if steps is None else optax.cosine_decay_schedule(size, steps))
        if self.max_gradient_norm is None:
            return adam
        return optax.chain(optax.clip_by_global_norm(self.max_gradient_norm), adam)

    def _next_value(
        self, state: DiffusionQLState, batch: Transition, *, key: Key
    ) -> tuple[Float[Array, " batch"], Float[Array, "rows act"]]:
        """min_i Qbar_i of the average actor's next action, or of the best of ten; the actions."""
        samples = BACKUP_SAMPLES if self.max_q_backup else 1
        obs = jnp.repeat(jnp.asarray(batch.next_obs), samples, axis=0)
        action = self.chain.sample_batch(state.average_actor, obs, key=key)
        q = q_values(state.target_critics, obs, action)
        best = jnp.max(q.reshape(q.shape[0], -1, samples), axis=2)
        return jnp.min(best, axis=0), action

    def _actor_loss(
        self, actor: ScoreNetwork, critics: Critic, batch: Transition, *, key: Key
    ) -> tuple[Float[Array, ""], Metrics]:
        level_key, noise_key, coin_key, chain_key = jr.split(key, 4)
        chain = self.chain
        noised, level, noise = chain.add_noise(
            batch.action, level_key=level_key, noise_key=noise_key
        )
        cloning, _ = score_loss(actor, batch.obs, noised, level, noise, levels=chain.levels)
        leader = jr.bernoulli(coin_key).astype(jnp.int32)
        value = jnp.zeros(())
        if self.q_weight > 0.0:  # behaviour cloning alone needs no chain
            value = value_loss(
                actor,
                critics,
                batch.obs,
                chain=chain,
                normalization=self.normalization,
                leader=leader,
                key=chain_key,
            )
        loss = self.bc_weight * cloning + self.q_weight * value
        return loss, {"actor_loss": loss, "bc_loss": cloning, "value_loss": value}
