"""The array vocabulary shared by every module."""

from dataclasses import dataclass
from typing import Any, TypeAlias

import equinox as eqx
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

Key: TypeAlias = PRNGKeyArray
"""A typed JAX random key, as made by `jax.random.key`."""

AnyArray: TypeAlias = Array | np.ndarray
"""On the device or in host memory."""

Metrics: TypeAlias = dict[str, Float[Array, ""]]
"""Named scalars that an update reports."""

State: TypeAlias = Any
"""A pytree of arrays: all that an algorithm learns. Each algorithm defines its own."""

Carry: TypeAlias = Any
"""A pytree of arrays that acting remembers between steps; `()` for a memoryless policy."""


@dataclass(frozen=True)
class Spec:
    """What an algorithm needs to know of an environment.

    - `obs_size`: length of the (flattened) observation vector.
    - `action_size`: length of the action vector; every component lies in [-1, 1].
    - `dt`: nominal control step in seconds.
    - `horizon`: length of an episode's time limit in seconds, or None where there is none.
    - `clock`: what the last components of the observation are, in seconds: `"time"` of the
      episode (a finite horizon), `"dt"` that has passed since the last observation (irregular
      steps). Empty for most tasks.
    - `discount_rate` (1/s), `score_cost`, `action_noise` (a square matrix, 1/sqrt(s)): set by
      tasks that prescribe them, for actions in [-1, 1]; None elsewhere.
    """

    obs_size: int
    action_size: int
    dt: float
    horizon: float | None = None
    clock: tuple[str, ...] = ()
    discount_rate: float | None = None
    score_cost: float | None = None
    action_noise: tuple[tuple[float, ...], ...] | None = None


class Transition(eqx.Module):
    """One environment step, or any batch of them with common leading axes.

    - `action`: in [-1, 1], what the policy asked for.
    - `reward`: the reward of the step (for a reward rate r, the integral of r over the step).
    - `next_obs`: the observation the step led to, before any reset.
    - `terminated`: the episode ended because the environment's state is final. A time limit is
      never a termination: the state after it has a value like any other.
    - `time`: seconds since the start of the episode when the step began.
    - `dt`: the step's duration in seconds.
    """

    obs: Float[AnyArray, "*batch obs"]
    action: Float[AnyArray, "*batch act"]
    reward: Float[AnyArray, "*batch"]
    next_obs: Float[AnyArray, "*batch obs"]
    terminated: Bool[AnyArray, "*batch"]
    time: Float[AnyArray, "*batch"]
    dt: Float[AnyArray, "*batch"]
