"""What every algorithm is: a frozen bundle of hyperparameters with four pure methods."""

from typing import Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float

from qscore.types import AnyArray, Carry, Key, Metrics, Spec, State, Transition

SATURATED = 0.95
"""An action component beyond this share of its range counts as saturated."""


def saturation(action: Float[AnyArray, "batch act"]) -> Float[Array, ""]:
    """Share of action components that lie at their bounds: the metric `action_saturation`."""
    return jnp.mean((jnp.abs(action) > SATURATED).astype(jnp.float32))


@runtime_checkable
class Algorithm(Protocol):
    """The contract of `algorithms/`: loops know this and nothing else.

    An implementation is a frozen dataclass of plain Python numbers, so it hashes (static under
    `jax.jit`), prints as JSON (checkpoint header) and makes its own command-line flags.
    """

    @property
    def batch_size(self) -> int:
        """Transitions per update."""
        ...

    @property
    def warmup_steps(self) -> int:
        """Environment steps with random actions before the first update."""
        ...

    @property
    def updates_per_step(self) -> float:
        """Updates per environment step."""
        ...

    @property
    def replay_capacity(self) -> int:
        """Transitions the replay buffer holds at most."""
        ...

    def init(self, spec: Spec, *, key: Key) -> State:
        """Fresh networks, targets and optimiser states: a pytree of arrays."""
        ...

    def init_carry(self, spec: Spec) -> Carry:
        """What acting remembers at the start of an episode."""
        ...

    def act(
        self, state: State, carry: Carry, obs: Float[Array, " obs"], *, key: Key, explore: bool
    ) -> tuple[Float[Array, " act"], Carry]:
        """An action in [-1, 1] for one observation; loops vmap."""
        ...

    def update(self, state: State, batch: Transition, *, key: Key) -> tuple[State, Metrics]:
        """One gradient step on a batch with one leading axis; loops scan."""
        ...
