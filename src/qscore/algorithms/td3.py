"""Twin delayed deep deterministic policy gradient (TD3).  Fujimoto et al. 2018, arXiv:1802.09477.

A deterministic actor pi(s) climbs the smaller of two critics, at every `policy_delay`-th update.
The critics' target takes the smaller of the two target critics at a target actor's action with
clipped noise, so that a sharp peak of one critic is not believed:

    critics   L(Q)  = sum_i E (Q_i(s, a) - y)^2
              y     = r + gamma (1 - terminated) min_i Qbar_i(s', a')
              a'    = clip(pibar(s') + clip(noise, -c, c), -1, 1),
              noise ~ N(0, target_action_noise^2),    c: target_noise_clip
    actor     L(pi) = -E Q(s, pi(s)),    Q = min_i Q_i

    offline   L(pi) = -E Q(s, pi(s)) / E |Q(s, pi(s))| + bc_weight E |pi(s) - a|^2

The last is TD3+BC (Fujimoto and Gu 2021, arXiv:2106.06860), for recorded data: it holds the actor
to the recorded action; the divisor is held fixed, and bc_weight is their 1 / alpha.

pibar and Qbar_i follow at `target_rate`. One update steps the critics; every `policy_delay`-th then
steps the actor against the new critics; the targets follow last, at every update.

Deviations from the papers: (1) networks (256, 256), batches of 256 and step sizes of 3e-4, as in
the authors' later code; the paper has (400, 300), 100 and 1e-3; (2) a random warm-up of 3,000
steps; the paper's is 1,000 or 10,000, by task. Three more are taken from Stable-Baselines3's JAX
version (SBX), because TD3 without them stays in the first gait it finds far more often: (3) the
targets follow at every update; the paper's move with the actor, half as fast; (4) the actor climbs
the smaller critic; the paper's the first; (5) layers start LeCun-normal; the house's start
Glorot-uniform, and the authors' uniform in between. From SBX: (6) exploration noise is the paper's,
where SBX has none unless given; (7) the warm-up is longer (100 steps there); (8) the critics' loss
has no factor 1/2, which Adam does not see.
"""

from dataclasses import dataclass, replace
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
from qscore.networks import LECUN, Critic, DeterministicActor
from qscore.normalize import Moments, observe_and_standardize, standardize
from qscore.optimize import gradient_step, move_target
from qscore.types import AnyArray, Carry, Key, Metrics, Spec, Transition


def smoothed(
    action: Float[Array, "batch act"], noise: Float[Array, "batch act"], bound: float
) -> Float[Array, "batch act"]:
    """clip(a + clip(noise, -bound, bound), -1, 1)."""
    return jnp.clip(action + jnp.clip(noise, -bound, bound), -1.0, 1.0)


def own_values(
    actor: DeterministicActor, critics: Critic, obs: Float[AnyArray, "batch obs"]
) -> tuple[Float[Array, "batch act"], Float[Array, " batch"]]:
    """pi(s) and min_i Q_i(s, pi(s)) at every row."""
    action = jax.vmap(lambda obs: actor(obs))(obs)
    return action, jnp.min(q_values(critics, obs, action), axis=0)


def actor_loss(
    actor: DeterministicActor, critics: Critic, obs: Float[AnyArray, "batch obs"]
) -> tuple[Float[Array, ""], Metrics]:
    """-mean min_i Q_i(s, pi(s)), differentiated through the action."""
    loss = -jnp.mean(own_values(actor, critics, obs)[1])
    return loss, {"actor_loss": loss}


def offline_actor_loss(
    actor: DeterministicActor, critics: Critic, batch: Transition, *, bc_weight: float
) -> tuple[Float[Array, ""], Metrics]:
    """-mean Q / mean |Q| + bc_weight mean (pi(s) - a)^2, over components too; Q = min_i Q_i."""
    action, value = own_values(actor, critics, batch.obs)
    # critics that are zero everywhere pull nowhere: 0 / 0 must stay 0
    unit = jnp.maximum(jax.lax.stop_gradient(jnp.mean(jnp.abs(value))), 1e-12)
    cloning = jnp.mean((action - batch.action) ** 2)
    loss = -jnp.mean(value) / unit + bc_weight * cloning
    return loss, {"actor_loss": loss}


class TD3State(eqx.Module):
    """Everything TD3 learns."""

    actor: DeterministicActor
    target_actor: DeterministicActor
    critics: Critic  # stacked: leading axis "critics"
    target_critics: Critic
    actor_opt: optax.OptState
    critic_opt: optax.OptState
    actor_loss: Float[Array, ""]  # of the actor's last step: what the updates between report
    moments: Moments  # of the observations
    updates: Int[Array, ""]


PRESETS: dict[str, dict[str, Any]] = {
    "default": {"bc_weight": 0.0, "normalize_observations": False},
    "offline": {"bc_weight": 0.4, "normalize_observations": True},
}


@dataclass(frozen=True)
class TD3:
    """Twin delayed DDPG: a deterministic actor that climbs two pessimistic critics."""

    preset: Literal["default", "offline"] = "default"
    """Where fields that are not given take their values: `offline` is TD3+BC, for recorded data."""
    bc_weight: Annotated[float, Range(0)] = preset_field()
    """Weight of the squared distance between the actor's action and the replayed one, in [0, inf),
    against values in units of their mean size. 0 is plain TD3."""
    policy_delay: Annotated[int, Range(1)] = 2
    """Updates of the critics per step of the actor, in [1, inf)."""
    target_action_noise: Annotated[float, Range(0)] = 0.2
    """Standard deviation of the noise added to the critic's next action, in [0, inf), unit: half
    the action range."""
    target_noise_clip: Annotated[float, Range(0)] = 0.5
    """Largest size of that noise, in [0, inf), same unit."""
    exploration_noise: Annotated[float, Range(0)] = 0.1
    """Standard deviation of the noise added to explored actions, in [0, inf), same unit."""
    normalize_observations: bool = preset_field()
    """Whether the networks see observations of mean 0 and variance 1, by running moments."""
    discount: Annotated[float, Range(0, 1, high_open=True)] = 0.99
    """Discount factor per environment step, in [0, 1)."""
    target_rate: Annotated[float, Range(0, 1, low_open=True)] = 0.005
    """Weight of the new parameters when the target networks follow, in (0, 1], per update."""
    actor_lr: Annotated[float, Range(0, low_open=True)] = 3e-4
    """Adam's step size for the actor, in (0, inf)."""
    critic_lr: Annotated[float, Range(0, low_open=True)] = 3e-4
    """Adam's step size for the critics, in (0, inf)."""
    hidden: Annotated[tuple[int, ...], Range(1)] = (256, 256)
    """Hidden layer widths of actor and critics, each in [1, inf)."""
    batch_size: Annotated[int, Range(1)] = 256
    """Transitions per update, in [1, inf)."""
    warmup_steps: Annotated[int, Range(1)] = 3_000
    """Environment steps with uniformly random actions before the first update, in [1, inf). As many
    as QSM takes, so that runs of equal length compare: SBX's 100 do not fill a batch, and the
    10,000 or more of many MuJoCo settings are most of a short run."""
    updates_per_step: Annotated[float, Range(0, low_open=True)] = 1.0
    """Gradient updates per environment step (the update-to-data ratio), in (0, inf)."""
    replay_capacity: Annotated[int, Range(1)] = 1_000_000
    """Transitions the replay buffer holds, in [1, inf)."""

    def __post_init__(self):
        resolve_preset(self, PRESETS)
        validate(self)

    def init(self, spec: Spec, *, key: Key) -> TD3State:
        """A fresh actor and two critics, their targets and optimisers."""
        actor_key, critics_key = jr.split(key)
        sizes = (spec.obs_size, spec.action_size, self.hidden)
        actor = DeterministicActor(*sizes, initializer=LECUN, key=actor_key)
        critics = stack_critics(2, spec, self.hidden, initializer=LECUN, key=critics_key)
        return TD3State(
            actor=actor,
            target_actor=jax.tree.map(jnp.copy, actor),  # buffers of their own, to be donated
            critics=critics,
            target_critics=jax.tree.map(jnp.copy, critics),
            actor_opt=optax.adam(self.actor_lr).init(actor),  # pyright: ignore[reportArgumentType]
            critic_opt=optax.adam(self.critic_lr).init(critics),  # pyright: ignore[reportArgumentType]
            actor_loss=jnp.zeros(()),
            moments=Moments.unit(spec.obs_size),
            updates=jnp.zeros((), jnp.int32),
        )

    def init_carry(self, spec: Spec) -> Carry:
        """Nothing: the policy sees the observation only."""
        return ()

    def act(
        self, state: TD3State, carry: Carry, obs: Float[Array, " obs"], *, key: Key, explore: bool
    ) -> tuple[Float[Array, " act"], Carry]:
        """The actor's action, with Gaussian noise when exploring."""
        obs = standardize(state.moments, obs) if self.normalize_observations else obs
        action = state.actor(obs)
        if explore:
            action = action + self.exploration_noise * jr.normal(key, action.shape)
        return jnp.clip(action, -1.0, 1.0), carry

    def update(self, state: TD3State, batch: Transition, *, key: Key) -> tuple[TD3State, Metrics]:
        """One step of the critics and, when it is due, one of the actor; the targets follow."""
        moments = state.moments
        if self.normalize_observations:
            moments, batch = observe_and_standardize(moments, batch)

        next_action = jax.vmap(lambda obs: state.target_actor(obs))(batch.next_obs)
        noise = self.target_action_noise * jr.normal(key, next_action.shape)
        next_q = q_values(
            state.target_critics,
            batch.next_obs,
            smoothed(next_action, noise, self.target_noise_clip),
        )
        critics, critic_opt, metrics = gradient_step(
            critic_loss,
            state.critics,
            optax.adam(self.critic_lr),
            state.critic_opt,
            batch,
            bootstrap(batch, jnp.min(next_q, axis=0), self.discount),
        )
        updates = state.updates + 1
        state = replace(
            state, critics=critics, critic_opt=critic_opt, moments=moments, updates=updates
        )
        state = jax.lax.cond(
            updates % self.policy_delay == 0,
            lambda state: self._update_actor(state, batch),
            lambda state: state,
            state,
        )
        state = replace(
            state,
            target_actor=move_target(state.actor, state.target_actor, self.target_rate),
            target_critics=move_target(critics, state.target_critics, self.target_rate),
        )
        metrics["action_saturation"] = saturation(next_action)
        return state, metrics | {"actor_loss": state.actor_loss}

    def _actor_loss(
        self, actor: DeterministicActor, critics: Critic, batch: Transition
    ) -> tuple[Float[Array, ""], Metrics]:
        if self.bc_weight > 0.0:
            return offline_actor_loss(actor, critics, batch, bc_weight=self.bc_weight)
        return actor_loss(actor, critics, batch.obs)

    def _update_actor(self, state: TD3State, batch: Transition) -> TD3State:
        """The delayed part of an update: the actor against the new critics."""
        actor, actor_opt, metrics = gradient_step(
            self._actor_loss,
            state.actor,
            optax.adam(self.actor_lr),
            state.actor_opt,
            state.critics,
            batch,
        )
        return replace(state, actor=actor, actor_opt=actor_opt, actor_loss=metrics["actor_loss"])
