"""Q-score matching (QSM).  Psenka, Escontrela, Abbeel, Ma, ICML 2024, arXiv:2312.11752.

The actor is a diffusion model over actions. Its denoiser is regressed onto the action gradient of
the critic; only the denoiser is differentiated, never the sampling chain:

    L(theta) = E | prediction_theta(s, a_t, t) - target |^2,     a_t = alpha_t a + sigma_t eps,
    (s, a) ~ replay,  t ~ U{0 ... T-1},  eps ~ N(0, I),

which is the iteration Psi <- alpha grad_a Q of the paper, written for a
denoiser. The critics learn by one-step Q-learning on the policy's own next action,

    y = r + gamma (1 - terminated) [(1 - p) mean_i + p min_i] Qbar_i(s', a'),

with a' from the denoising chain at s' and p the `pessimism`.

What the denoiser should say is `target`, written here as the noise it should predict (predicting
eps is having the score -eps / sigma_t), with g = grad_a mean_i Q_i at the *noised* action a_t:

    "gradient"     eps* = -M_q g                            the released code; M_q is `score_scale`
    "normalized"   eps* = -sigma_t g / (tau c)              tau is `temperature`
    "posterior"    eps* = (a_t - alpha_t E_w[a_0]) / sigma_t,   E_w[a_0] = sum_i w_i a_0^i

The second is the score of exp(Q / (tau c)) taken at a_t; c is the mean absolute component of g
(`normalization`), so tau has no unit and rewards may be on any scale. In the third, -eps* / sigma_t
is the exact score of the *noised marginal* of that density restricted to the action box, by
self-normalised importance sampling: a_0^i from N(a_t / alpha_t, (sigma_t / alpha_t)^2) truncated to
the box, w = softmax(Q(s, a_0^i) / (tau c)). The second is its limit for little noise.

With `bc_weight` w the target of the first two is eps* + w eps, eps being the noise that made a_t,
and g is taken at the replayed action a, where the critics have seen data, times
alpha_t v / sigma_t^2 with 1 / v = w / s^2 + alpha_t^2 / sigma_t^2. With w = 1 the clean action to
predict is then

    E[a + v grad_a Q(s, a) / (tau c) | a_t],

and v is the variance of a given a_t where replayed actions of density mu have the deviation s,
`bc_spread`. For little noise that is the score of mu exp(Q / (tau c)), for more noise its mean to
first order in Q: what offline learning wants, since it leaves no mass where there are no data.
Preset "offline" has w = 1; it also lets the chains keep their noise, as mu is not to be reduced to
its middle, takes the smaller critic and explores no further than that.

Deviations of the default preset from the paper: (1) the target is "normalized", not "gradient";
(2) the network predicts the clean action, and is regressed onto the clean action that eps* implies,
clipped to the action box, which bounds the regression however large the gradient; (3) cosine
schedule; (4) the chain inside the critic's target carries no noise (smoothing noise is added to its
end), and neither does the chain at evaluation; (5) both of those run a running average of the
actor; (6) the critics' mean makes the target, not their minimum; (7) the critics' activation is
SiLU: the action gradient of a ReLU network is piecewise constant; (8) exploration adds more noise,
the random warm-up is shorter, the step sizes are larger and the actor's is constant.
`preset="official"` undoes all eight and is the published algorithm as its released code computes
it, in that code's order: the critics, then the actor against the new critics. Only the width
differs, (512, 512) there: see `hidden`.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, Float, Int

from qscore import diffusion
from qscore.algorithms.base import saturation
from qscore.config import Range, preset_field, resolve_preset, validate
from qscore.critics import bootstrap, critic_loss, q_values, stack_critics
from qscore.denoiser import Chain, score_loss
from qscore.networks import Critic, ScoreNetwork, mean_q
from qscore.normalize import Moments, observe_and_standardize, standardize
from qscore.optimize import gradient_step, move_target
from qscore.types import Carry, Key, Metrics, Spec, Transition


def noise_target(
    gradient: Float[Array, "batch act"],
    sigma: Float[Array, " batch"],
    *,
    target: str,
    score_scale: float,
    temperature: Float[Array, ""],
) -> Float[Array, "batch act"]:
    """eps* of the "gradient" and "normalized" targets; `temperature` is tau c, a reward."""
    if target == "gradient":
        return -score_scale * gradient
    return -sigma[:, None] * gradient / temperature


def posterior_mean(
    critics: Critic,
    schedule: diffusion.NoiseSchedule,
    obs: Float[Array, " obs"],
    noised: Float[Array, " act"],
    level: Int[Array, ""],
    *,
    samples: int,
    temperature: Float[Array, ""],
    key: Key,
) -> tuple[Float[Array, " act"], Float[Array, ""]]:
    """E[a_0 | a_t] under exp(Q / temperature) on the box, and the effective number of samples."""
    center = noised / schedule.alpha[level]
    width = schedule.sigma[level] / schedule.alpha[level]
    lower, upper = (-1.0 - center) / width, (1.0 - center) / width
    z = jr.truncated_normal(key, lower[None], upper[None], (samples, noised.shape[0]))
    # in the far tail the sampler's inverse error function saturates: the box is imposed again
    candidates = jnp.clip(center[None] + width * z, -1.0, 1.0)
    q = jax.vmap(lambda action: mean_q(critics, obs, action))(candidates)
    weight = jax.nn.softmax(q / temperature)
    return weight @ candidates, 1.0 / jnp.sum(weight**2)


class QSMState(eqx.Module):
    """Everything QSM learns."""

    actor: ScoreNetwork
    average_actor: ScoreNetwork  # follows the actor at `average_rate`
    critics: Critic  # stacked: leading axis "critics"
    target_critics: Critic
    actor_opt: optax.OptState
    critic_opt: optax.OptState
    gradient_scale: Float[Array, ""]  # running mean |grad_a Q| component, in reward per unit action
    moments: Moments  # of the observations
    updates: Int[Array, ""]


PRESETS: dict[str, dict[str, Any]] = {
    "default": {
        "target": "normalized",
        "prediction": "action",
        "schedule": "cosine",
        "normalization": "batch",
        "temperature": 0.1,
        "bc_weight": 0.0,
        "clip": "clean",
        "target_chain_noise": 0.0,
        "exploration_noise": 0.3,
        "eval_chain_noise": 0.0,
        "critic_activation": "silu",
        "pessimism": 0.0,
        "average_rate": 0.005,
        "actor_lr": 5e-4,
        "critic_lr": 5e-4,
        "actor_decay_steps": None,
        "warmup_steps": 3_000,
    },
    "official": {
        "target": "gradient",
        "prediction": "noise",
        "schedule": "vp",
        "normalization": "none",
        "temperature": 0.1,
        "bc_weight": 0.0,
        "clip": "sample",
        "target_chain_noise": 1.0,
        "exploration_noise": 0.1,
        "eval_chain_noise": 1.0,
        "critic_activation": "relu",
        "pessimism": 1.0,
        "average_rate": 1.0,
        "actor_lr": 3e-4,
        "critic_lr": 3e-4,
        "actor_decay_steps": 2_000_000,
        "warmup_steps": 10_000,
    },
}
PRESETS["offline"] = PRESETS["default"] | {
    "temperature": 0.7,
    "bc_weight": 1.0,
    "target_chain_noise": 1.0,
    "eval_chain_noise": 1.0,
    "exploration_noise": 0.0,
    "pessimism": 1.0,
    "actor_lr": 3e-4,
    "critic_lr": 3e-4,
}


@dataclass(frozen=True)
class QSM:
    """Q-score matching: an off-policy actor-critic whose actor is a diffusion model."""

    preset: Literal["default", "official", "offline"] = "default"
    """Where fields that are not given take their values: `default` is robust without tuning per
    task, `official` is the algorithm of the paper's released code, `offline` clones the behaviour
    as well, for recorded data."""
    target: Literal["gradient", "normalized", "posterior"] = preset_field()
    """What the denoiser is regressed onto: the critic's raw action gradient, the gradient in units
    of its own mean size, or the exact score of the noised marginal by importance sampling."""
    prediction: Literal["noise", "action"] = preset_field()
    """What the network outputs: the noise in its input, or the clean action."""
    schedule: Literal["vp", "cosine", "linear"] = preset_field()
    """Noise schedule of the diffusion chain."""
    variance: Literal["beta", "posterior"] = "beta"
    """Variance of each reverse step: beta_t, or that of q(a_{t-1} | a_t, a_0)."""
    clip: Literal["clean", "sample"] = preset_field()
    """What is kept in [-1, 1] inside the chain: the clean estimate, or each intermediate action."""
    noise_levels: Annotated[int, Range(1, 1000)] = 5
    """Number T of noise levels, and of network evaluations per action, in [1, 1000]."""
    score_scale: Annotated[float, Range(0, low_open=True)] = 50.0
    """M_q of target `gradient`, in (0, inf), unit: action per reward. The paper tunes it per task
    (50; 120 for quadruped and humanoid)."""
    temperature: Annotated[float, Range(0, low_open=True)] = preset_field()
    """tau of the other targets, in (0, inf). No unit with normalization `batch` or `running`; in
    units of reward with `none`. Smaller is greedier."""
    bc_weight: Annotated[float, Range(0)] = preset_field()
    """Weight of behaviour cloning in the target: the replayed actions' density counts to this
    power, in [0, inf), no unit. 0 learns from the critic alone."""
    bc_spread: Annotated[float, Range(0, low_open=True)] = 0.3
    """Standard deviation that replayed actions are taken to have, given the observation, in (0,
    inf), unit: half the action range. Cloned actions move uphill by at most its square times the
    gradient over the temperature."""
    normalization: Literal["batch", "running", "none"] = preset_field()
    """The gradient's unit c: its mean size over the batch, a running mean of that, or 1."""
    posterior_samples: Annotated[int, Range(2, 4096)] = 16
    """Importance samples per row of target `posterior`, in [2, 4096]."""
    target_chain_noise: Annotated[float, Range(0, 1)] = preset_field()
    """Scale of the noise inside the chain that makes the critic's next action, in [0, 1]."""
    target_action_noise: Annotated[float, Range(0)] = 0.1
    """Standard deviation of the noise added to that action, in [0, inf), unit: half the action
    range."""
    exploration_noise: Annotated[float, Range(0)] = preset_field()
    """Standard deviation of the noise added to explored actions, in [0, inf), same unit."""
    eval_chain_noise: Annotated[float, Range(0, 1)] = preset_field()
    """Scale of the noise inside the chain when not exploring, in [0, 1]; 0 is deterministic."""
    normalize_observations: bool = False
    """Whether the networks see observations of mean 0 and variance 1, by running moments."""
    best_of: Annotated[int, Range(1, 1024)] = 1
    """Act with the best of N actions by the critics' mean, in [1, 1024], sampled with full noise,
    whatever `eval_chain_noise`. Evaluation during training never uses it."""
    discount: Annotated[float, Range(0, 1, high_open=True)] = 0.99
    """Discount factor per environment step, in [0, 1)."""
    pessimism: Annotated[float, Range(0, 1)] = preset_field()
    """How far the critic's target goes from the critics' mean to their minimum, in [0, 1]."""
    target_rate: Annotated[float, Range(0, 1, low_open=True)] = 0.005
    """Weight of the new parameters when the target critics follow, in (0, 1], per update."""
    average_rate: Annotated[float, Range(0, 1, low_open=True)] = preset_field()
    """Weight of the new parameters in the actor's running average, in (0, 1], per update. The
    average makes the critic's next action and acts when not exploring; 1 is no averaging."""
    actor_lr: Annotated[float, Range(0, low_open=True)] = preset_field()
    """Adam's step size for the actor, in (0, inf)."""
    critic_lr: Annotated[float, Range(0, low_open=True)] = preset_field()
    """Adam's step size for the critics, in (0, inf)."""
    critic_activation: Literal["relu", "silu"] = preset_field()
    """Between the critics' layers. The actor learns from their gradient, which ReLU makes piecewise
    constant."""
    actor_decay_steps: Annotated[int | None, Range(1)] = preset_field()
    """Updates over which the actor's step size falls to zero on a cosine, in [1, inf); None is
    constant."""
    hidden: Annotated[tuple[int, ...], Range(1)] = (256, 256)
    """Hidden layer widths of actor and critics, each in [1, inf)."""
    batch_size: Annotated[int, Range(1)] = 256
    """Transitions per update, in [1, inf)."""
    warmup_steps: Annotated[int, Range(1)] = preset_field()
    """Environment steps with uniformly random actions before the first update, in [1, inf)."""
    updates_per_step: Annotated[float, Range(0, low_open=True)] = 1.0
    """Gradient updates per environment step (the update-to-data ratio), in (0, inf)."""
    replay_capacity: Annotated[int, Range(1)] = 1_000_000
    """Transitions the replay buffer holds, in [1, inf)."""

    def __post_init__(self):
        resolve_preset(self, PRESETS)
        validate(self)
        if self.bc_weight > 0.0 and self.target == "posterior":
            raise ValueError(
                f"`bc_weight` is {self.bc_weight}; with `target` 'posterior' it must be 0, since "
                "the samples' weights do not know the density of the data."
            )

    def init(self, spec: Spec, *, key: Key) -> QSMState:
        """A fresh actor and two critics, their targets and optimisers."""
        actor_key, critics_key = jr.split(key)
        actor = ScoreNetwork(spec.obs_size, spec.action_size, self.hidden, key=actor_key)
        activation = getattr(jax.nn, self.critic_activation)
        critics = stack_critics(2, spec, self.hidden, activation=activation, key=critics_key)
        return QSMState(
            actor=actor,
            average_actor=jax.tree.map(jnp.copy, actor),  # buffers of their own, to be donated
            critics=critics,
            target_critics=jax.tree.map(jnp.copy, critics),
            actor_opt=self._actor_optimizer().init(actor),  # pyright: ignore[reportArgumentType]
            critic_opt=optax.adam(self.critic_lr).init(critics),  # pyright: ignore[reportArgumentType]
            gradient_scale=jnp.zeros(()),
            moments=Moments.unit(spec.obs_size),
            updates=jnp.zeros((), jnp.int32),
        )

    def init_carry(self, spec: Spec) -> Carry:
        """Nothing: each action starts from fresh noise."""
        return ()

    def act(
        self, state: QSMState, carry: Carry, obs: Float[Array, " obs"], *, key: Key, explore: bool
    ) -> tuple[Float[Array, " act"], Carry]:
        """Run the denoising chain for one observation; see `exploration_noise`, `best_of`."""
        chain_key, noise_key = jr.split(key)
        obs = standardize(state.moments, obs) if self.normalize_observations else obs
        actor = state.actor if explore else state.average_actor
        if self.best_of > 1:
            keys = jr.split(chain_key, self.best_of)
            candidates = jax.vmap(lambda key: self.chain.sample(actor, obs, key=key))(keys)
            values = jax.vmap(lambda action: mean_q(state.critics, obs, action))(candidates)
            action = candidates[jnp.argmax(values)]
        else:
            noise_scale = 1.0 if explore else self.eval_chain_noise
            action = self.chain.sample(actor, obs, key=chain_key, noise_scale=noise_scale)
        if explore:
            action = action + self.exploration_noise * jr.normal(noise_key, action.shape)
        return jnp.clip(action, -1.0, 1.0), carry

    def update(self, state: QSMState, batch: Transition, *, key: Key) -> tuple[QSMState, Metrics]:
        """One step of the critics, then one of the actor against the new critics."""
        critic_key, actor_key = jr.split(key)
        moments = state.moments
        if self.normalize_observations:
            moments, batch = observe_and_standardize(moments, batch)
        critics, target_critics, critic_opt, critic_metrics = self._update_critics(
            state, batch, key=critic_key
        )
        noised, level, target, scale, target_metrics = self._actor_batch(
            critics, state.gradient_scale, state.updates, batch, key=actor_key
        )
        actor, actor_opt, actor_metrics = gradient_step(
            score_loss,
            state.actor,
            self._actor_optimizer(),
            state.actor_opt,
            batch.obs,
            noised,
            level,
            target,
            levels=self.noise_levels,
        )
        state = QSMState(
            actor=actor,
            average_actor=move_target(actor, state.average_actor, self.average_rate),
            critics=critics,
            target_critics=target_critics,
            actor_opt=actor_opt,
            critic_opt=critic_opt,
            gradient_scale=scale,
            moments=moments,
            updates=state.updates + 1,
        )
        return state, critic_metrics | target_metrics | actor_metrics

    @property
    def chain(self) -> Chain:
        """How this policy's network becomes actions."""
        return Chain(self.schedule, self.noise_levels, self.prediction, self.variance, self.clip)

    def _actor_optimizer(self) -> optax.GradientTransformation:
        if self.actor_decay_steps is None:
            return optax.adam(self.actor_lr)
        return optax.adam(optax.cosine_decay_schedule(self.actor_lr, self.actor_decay_steps))

    def _update_critics(self, state: QSMState, batch: Transition, *, key: Key):
        chain_key, noise_key = jr.split(key)
        next_action = self.chain.sample_batch(
            state.average_actor, batch.next_obs, key=chain_key, noise_scale=self.target_chain_noise
        )
        noise = self.target_action_noise * jr.normal(noise_key, next_action.shape)
        smoothed = jnp.clip(next_action + noise, -1.0, 1.0)
        next_q = q_values(state.target_critics, batch.next_obs, smoothed)
        mean, least = jnp.mean(next_q, axis=0), jnp.min(next_q, axis=0)
        value = (1.0 - self.pessimism) * mean + self.pessimism * least
        target = bootstrap(batch, value, self.discount)

        critics, critic_opt, metrics = gradient_step(
            critic_loss,
            state.critics,
            optax.adam(self.critic_lr),
            state.critic_opt,
            batch,
            target,
        )
        target_critics = move_target(critics, state.target_critics, self.target_rate)
        metrics["action_saturation"] = saturation(next_action)
        return critics, target_critics, critic_opt, metrics

    def _actor_batch(
        self,
        critics: Critic,
        gradient_scale: Float[Array, ""],
        updates: Int[Array, ""],
        batch: Transition,
        *,
        key: Key,
    ):
        """Noised actions, their levels and what the network should say of them."""
        level_key, noise_key, posterior_key = jr.split(key, 3)
        schedule = self.chain.tables
        noised, level, noise = self.chain.add_noise(
            batch.action, level_key=level_key, noise_key=noise_key
        )

        cloning = self.bc_weight > 0.0
        where = batch.action if cloning else noised
        gradient = jax.vmap(jax.grad(mean_q, argnums=2), (None, 0, 0))(critics, batch.obs, where)
        batch_scale = jnp.mean(jnp.abs(gradient))
        if cloning:
            ratio = (schedule.alpha[level] / schedule.sigma[level])[:, None]
            confined = 1.0 / (self.bc_weight / self.bc_spread**2 + ratio**2)
            gradient = gradient * confined * ratio / schedule.sigma[level][:, None]
        rate = jnp.where(updates == 0, 1.0, 0.005)
        running_scale = gradient_scale + rate * (batch_scale - gradient_scale)
        unit = {"batch": batch_scale, "running": running_scale, "none": jnp.ones(())}
        # a critic that is flat everywhere has gradient 0, and 0 / 0 must stay 0
        temperature = self.temperature * jnp.maximum(unit[self.normalization], 1e-12)
        metrics = {"gradient_scale": batch_scale}

        if self.target == "posterior":
            clean, effective = jax.vmap(
                lambda obs, noised, level, key: posterior_mean(
                    critics,
                    schedule,
                    obs,
                    noised,
                    level,
                    samples=self.posterior_samples,
                    temperature=temperature,
                    key=key,
                )
            )(batch.obs, noised, level, jr.split(posterior_key, level.shape[0]))
            target = jax.vmap(lambda *args: diffusion.noise_from_clean(schedule, *args))(
                noised, level, clean
            )
            metrics["effective_samples"] = jnp.mean(effective)
        else:
            target = noise_target(
                gradient,
                schedule.sigma[level],
                target=self.target,
                score_scale=self.score_scale,
                temperature=temperature,
            )
            if self.bc_weight > 0.0:
                target = target + self.bc_weight * noise
        metrics["score_norm"] = jnp.mean(
            jnp.linalg.norm(target / schedule.sigma[level][:, None], axis=-1)
        )
        if self.prediction == "action":
            target = jax.vmap(lambda *args: diffusion.clean_from_noise(schedule, *args))(
                noised, level, target
            )
            target = jnp.clip(target, -1.0, 1.0)
        return noised, level, target, running_scale, metrics
