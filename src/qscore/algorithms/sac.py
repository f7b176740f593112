"""Soft actor-critic (SAC).  Haarnoja et al. 2018, arXiv:1812.05905.

The policy maximises the return and, at the temperature alpha, its entropy. It is a Gaussian
squashed into the action box, a = tanh(u) with u ~ N(mean(s), std(s)^2), and its density counts the
squashing (`networks.tanh_gaussian`):

    critics       L(Q)  = sum_i E (Q_i(s, a) - y)^2
                  y     = r + gamma (1 - terminated) [min_i Qbar_i(s', a') - alpha log pi(a'|s')]
    actor         L(pi) = E [alpha log pi(a|s) - min_i Q_i(s, a)],    a ~ pi(s) by its noise
    temperature   L(log alpha) = log alpha (H - target_entropy),      H = -E log pi(a|s)

with a' ~ pi(s'). Its optimum at fixed critics is the density exp(Q / alpha) / Z: the policy's score
would be grad_a Q / alpha. Score matching goes there directly, SAC by the best Gaussian.

One update steps the critics, their targets, the actor against the new critics, then the temperature
from the entropy of the actor that was just stepped from: the order of Stable-Baselines3's JAX
version (SBX), which the default values follow too.

Deviations from the paper: (1) the temperature's loss is linear in log alpha, not in alpha, as in
the authors' code; (2) the actions of the first `warmup_steps` are random. From SBX: (3) that
warm-up is longer (100 steps there); (4) the critics' loss has no factor 1/2, which Adam does not
see; (5) layers start Glorot-uniform, the house's initialisation (LeCun-normal there).
"""

from dataclasses import dataclass
from typing import Annotated

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, Float

from qscore.algorithms.base import saturation
from qscore.config import Range, validate
from qscore.critics import bootstrap, critic_loss, q_values, stack_critics
from qscore.networks import Critic, GaussianActor, tanh_gaussian
from qscore.normalize import Moments, observe_and_standardize, standardize
from qscore.optimize import gradient_step, move_target
from qscore.types import AnyArray, Carry, Key, Metrics, Spec, Transition


def sample_actions(
    actor: GaussianActor, obs: Float[AnyArray, "batch obs"], noise: Float[Array, "batch act"]
) -> tuple[Float[Array, "batch act"], Float[Array, " batch"]]:
    """The squashed Gaussian's action at every row for standard normal noise, and log pi (nats)."""
    return jax.vmap(lambda obs, noise: tanh_gaussian(*actor(obs), noise))(obs, noise)


def soft_value(
    critics: Critic,
    obs: Float[AnyArray, "batch obs"],
    action: Float[Array, "batch act"],
    log_prob: Float[Array, " batch"],
    temperature: Float[Array, ""],
) -> Float[Array, " batch"]:
    """min_i Q_i(s, a) - alpha log pi(a|s): one sample of the soft value of s, in reward."""
    return jnp.min(q_values(critics, obs, action), axis=0) - temperature * log_prob


def actor_loss(
    actor: GaussianActor,
    critics: Critic,
    obs: Float[AnyArray, "batch obs"],
    temperature: Float[Array, ""],
    noise: Float[Array, "batch act"],
) -> tuple[Float[Array, ""], Metrics]:
    """mean [alpha log pi(a|s) - min_i Q_i(s, a)], differentiated through a and through pi."""
    action, log_prob = sample_actions(actor, obs, noise)
    loss = -jnp.mean(soft_value(critics, obs, action, log_prob, temperature))
    return loss, {"actor_loss": loss, "entropy": -jnp.mean(log_prob)}


def temperature_loss(
    log_temperature: Float[Array, ""], entropy: Float[Array, ""], target_entropy: float
) -> tuple[Float[Array, ""], Metrics]:
    """log alpha (H - target), H held fixed: too little entropy raises alpha."""
    return log_temperature * (entropy - target_entropy), {}


class SACState(eqx.Module):
    """Everything SAC learns."""

    actor: GaussianActor
    critics: Critic  # stacked: leading axis "critics"
    target_critics: Critic
    log_temperature: Float[Array, ""]
    actor_opt: optax.OptState
    critic_opt: optax.OptState
    temperature_opt: optax.OptState
    moments: Moments  # of the observations


@dataclass(frozen=True)
class SAC:
    """Soft actor-critic: a squashed Gaussian that is rewarded for its entropy."""

    initial_temperature: Annotated[float, Range(0, low_open=True)] = 1.0
    """Temperature alpha at the start, in (0, inf), unit: reward per nat."""
    learn_temperature: bool = True
    """Whether the temperature follows the target entropy; False keeps it where it starts."""
    target_entropy: float | None = None
    """Mean entropy that the temperature aims at, unit: nats, of actions in [-1, 1]; None is -1 per
    action component. A uniform policy has 0.69 per component, the most there is."""
    normalize_observations: bool = False
    """Whether the networks see observations of mean 0 and variance 1, by running moments."""
    discount: Annotated[float, Range(0, 1, high_open=True)] = 0.99
    """Discount factor per environment step, in [0, 1)."""
    target_rate: Annotated[float, Range(0, 1, low_open=True)] = 0.005
    """Weight of the new parameters when the target critics follow, in (0, 1], per update."""
    actor_lr: Annotated[float, Range(0, low_open=True)] = 3e-4
    """Adam's step size for the actor, in (0, inf)."""
    critic_lr: Annotated[float, Range(0, low_open=True)] = 3e-4
    """Adam's step size for the critics, in (0, inf)."""
    temperature_lr: Annotated[float, Range(0, low_open=True)] = 3e-4
    """Adam's step size for the logarithm of the temperature, in (0, inf)."""
    hidden: Annotated[tuple[int, ...], Range(1)] = (256, 256)
    """Hidden layer widths of actor and critics, each in [1, inf)."""
    batch_size: Annotated[int, Range(1)] = 256
    """Transitions per update, in [1, inf)."""
    warmup_steps: Annotated[int, Range(1)] = 3_000
    """Environment steps with uniformly random actions before the first update, in [1, inf). As many
    as QSM takes, so that runs of equal length compare: SBX's 100 do not fill a batch, and the
    10,000 of many MuJoCo settings are most of a short run."""
    updates_per_step: Annotated[float, Range(0, low_open=True)] = 1.0
    """Gradient updates per environment step (the update-to-data ratio), in (0, inf)."""
    replay_capacity: Annotated[int, Range(1)] = 1_000_000
    """Transitions the replay buffer holds, in [1, inf)."""

    def __post_init__(self):
        validate(self)

    def init(self, spec: Spec, *, key: Key) -> SACState:
        """A fresh actor and two critics, their targets, the temperature and the optimisers."""
        actor_key, critics_key = jr.split(key)
        actor = GaussianActor(spec.obs_size, spec.action_size, self.hidden, key=actor_key)
        critics = stack_critics(2, spec, self.hidden, key=critics_key)
        log_temperature = jnp.log(jnp.float32(self.initial_temperature))
        return SACState(
            actor=actor,
            critics=critics,
            target_critics=jax.tree.map(jnp.copy, critics),  # buffers of their own, to be donated
            log_temperature=log_temperature,
            actor_opt=optax.adam(self.actor_lr).init(actor),  # pyright: ignore[reportArgumentType]
            critic_opt=optax.adam(self.critic_lr).init(critics),  # pyright: ignore[reportArgumentType]
            temperature_opt=optax.adam(self.temperature_lr).init(log_temperature),
            moments=Moments.unit(spec.obs_size),
        )

    def init_carry(self, spec: Spec) -> Carry:
        """Nothing: the policy sees the observation only."""
        return ()

    def act(
        self, state: SACState, carry: Carry, obs: Float[Array, " obs"], *, key: Key, explore: bool
    ) -> tuple[Float[Array, " act"], Carry]:
        """A sample of the policy, or without exploration tanh of the Gaussian's mean."""
        obs = standardize(state.moments, obs) if self.normalize_observations else obs
        mean, log_std = state.actor(obs)
        if not explore:
            return jnp.tanh(mean), carry
        return tanh_gaussian(mean, log_std, jr.normal(key, mean.shape))[0], carry

    def update(self, state: SACState, batch: Transition, *, key: Key) -> tuple[SACState, Metrics]:
        """One step of the critics, one of the actor against them, one of the temperature."""
        next_key, actor_key = jr.split(key)
        moments = state.moments
        if self.normalize_observations:
            moments, batch = observe_and_standardize(moments, batch)
        temperature = jnp.exp(state.log_temperature)

        next_noise = jr.normal(next_key, batch.action.shape)
        next_action, next_log_prob = sample_actions(state.actor, batch.next_obs, next_noise)
        next_value = soft_value(
            state.target_critics, batch.next_obs, next_action, next_log_prob, temperature
        )
        critics, critic_opt, critic_metrics = gradient_step(
            critic_loss,
            state.critics,
            optax.adam(self.critic_lr),
            state.critic_opt,
            batch,
            bootstrap(batch, next_value, self.discount),
        )
        actor, actor_opt, actor_metrics = gradient_step(
            actor_loss,
            state.actor,
            optax.adam(self.actor_lr),
            state.actor_opt,
            critics,
            batch.obs,
            temperature,
            jr.normal(actor_key, batch.action.shape),
        )
        log_temperature, temperature_opt = state.log_temperature, state.temperature_opt
        if self.learn_temperature:
            default = -float(batch.action.shape[1])
            log_temperature, temperature_opt, _ = gradient_step(
                temperature_loss,
                log_temperature,
                optax.adam(self.temperature_lr),
                temperature_opt,
                actor_metrics["entropy"],
                default if self.target_entropy is None else self.target_entropy,
            )
        state = SACState(
            actor=actor,
            critics=critics,
            target_critics=move_target(critics, state.target_critics, self.target_rate),
            log_temperature=log_temperature,
            actor_opt=actor_opt,
            critic_opt=critic_opt,
            temperature_opt=temperature_opt,
            moments=moments,
        )
        metrics = {"action_saturation": saturation(next_action), "temperature": temperature}
        return state, critic_metrics | actor_metrics | metrics
