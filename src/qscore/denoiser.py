"""What algorithms with a diffusion actor share: how its network is read, run and regressed.

One floor below `algorithms/`. `diffusion` has the mathematics of a chain for any denoiser; here the
denoiser is a `ScoreNetwork`, with what it outputs and how the chain is bounded made explicit.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int

from qscore import diffusion
from qscore.networks import ScoreNetwork
from qscore.types import AnyArray, Key, Metrics


@dataclass(frozen=True)
class Chain:
    """How a `ScoreNetwork` becomes actions: static choices, hashable.

    - `schedule`, `levels`: the noise schedule and its number of levels.
    - `prediction`: what the network outputs, the noise in its input or the clean action.
    - `variance`: of each reverse step, see `diffusion.sample`.
    - `clip`: what is kept in [-1, 1], the clean estimate or each intermediate action.
    """

    schedule: Literal["vp", "cosine", "linear"]
    levels: int
    prediction: Literal["noise", "action"]
    variance: diffusion.Variance
    clip: Literal["clean", "sample"]

    @property
    def tables(self) -> diffusion.NoiseSchedule:
        """The tables of the schedule."""
        return diffusion.SCHEDULES[self.schedule](self.levels)

    def run(
        self, actor: ScoreNetwork, obs: Float[Array, " obs"], noise: Float[Array, "levels act"]
    ) -> Float[Array, " act"]:
        """The action in [-1, 1] that the chain makes of its noise; differentiable in the actor."""
        tables = self.tables
        obs_code = actor.encode_obs(obs)
        # under vmap over observations these stay unbatched: one pass for all
        level_codes = actor.encode_levels(self.levels)

        def denoiser(noised, level):
            prediction = actor(noised, obs_code + level_codes[level])
            if self.prediction == "noise":
                prediction = diffusion.clean_from_noise(tables, noised, level, prediction)
            return jnp.clip(prediction, -1.0, 1.0) if self.clip == "clean" else prediction

        action = diffusion.sample(
            denoiser,
            tables,
            noise,
            variance=self.variance,
            clip=1.0 if self.clip == "sample" else None,
        )
        return jnp.clip(action, -1.0, 1.0)

    def sample(
        self, actor: ScoreNetwork, obs: Float[Array, " obs"], *, key: Key, noise_scale: float = 1.0
    ) -> Float[Array, " act"]:
        """One action for one observation; `noise_scale` 0 is the deterministic chain."""
        return self.sample_batch(actor, obs[None], key=key, noise_scale=noise_scale)[0]

    def sample_batch(
        self,
        actor: ScoreNetwork,
        obs: Float[AnyArray, "batch obs"],
        *,
        key: Key,
        noise_scale: float = 1.0,
    ) -> Float[Array, "batch act"]:
        """One action per observation, each from noise of its own."""
        shape = (self.levels, obs.shape[0], actor.action_size)
        # levels first, as the chain takes them; nothing is drawn where nothing is wanted
        noise = noise_scale * jr.normal(key, shape) if noise_scale > 0.0 else jnp.zeros(shape)
        return jax.vmap(lambda obs, noise: self.run(actor, obs, noise), (0, 1))(obs, noise)

    def add_noise(
        self, action: Float[AnyArray, "batch act"], *, level_key: Key, noise_key: Key
    ) -> tuple[Float[Array, "batch act"], Int[Array, " batch"], Float[Array, "batch act"]]:
        """(a_t, t, eps) with a uniform level t and Gaussian eps for every row."""
        # the remainder of one draw; `randint` takes two, to be exact where this is off by 1e-9
        level = (jr.bits(level_key, action.shape[:1]) % self.levels).astype(jnp.int32)
        noise = jr.normal(noise_key, action.shape)
        tables = self.tables
        noised = jax.vmap(lambda *args: diffusion.add_noise(tables, *args))(action, level, noise)
        return noised, level, noise


def score_loss(
    network: ScoreNetwork,
    obs: Float[AnyArray, "batch obs"],
    noised: Float[Array, "batch act"],
    level: Int[Array, " batch"],
    target: Float[AnyArray, "batch act"],
    *,
    levels: int,
) -> tuple[Float[Array, ""], Metrics]:
    """mean |prediction_theta(s, a_t, t) - target|^2: no chain is run."""
    codes = (
        jax.vmap(lambda obs: network.encode_obs(obs))(obs) + network.encode_levels(levels)[level]
    )
    prediction = jax.vmap(network)(noised, codes)
    loss = jnp.mean((prediction - target) ** 2)
    return loss, {"actor_loss": loss}
