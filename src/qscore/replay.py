"""A ring buffer of transitions that lives on the device: a pytree, and three pure functions."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Int

from qscore.types import Key, Spec, Transition


class Replay(eqx.Module):
    """`data` has a leading axis of `capacity` rows; `added` counts every row ever added."""

    data: Transition
    added: Int[Array, ""]

    @property
    def capacity(self) -> int:
        return self.data.reward.shape[0]

    @property
    def size(self) -> Int[Array, ""]:
        """Rows that hold data; they are always the first `size` ones."""
        return jnp.minimum(self.added, self.capacity)


def empty_rows(spec: Spec, rows: int) -> Transition:
    """`rows` transitions of zeros."""
    return Transition(
        obs=jnp.zeros((rows, spec.obs_size)),
        action=jnp.zeros((rows, spec.action_size)),
        reward=jnp.zeros(rows),
        next_obs=jnp.zeros((rows, spec.obs_size)),
        terminated=jnp.zeros(rows, bool),
        time=jnp.zeros(rows),
        dt=jnp.zeros(rows),
    )


def row_bytes(spec: Spec) -> int:
    """The size of one transition, in bytes."""
    row = jax.eval_shape(lambda: empty_rows(spec, 1))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(row))


def init(spec: Spec, capacity: int) -> Replay:
    """An empty buffer of `capacity` transitions."""
    return Replay(empty_rows(spec, capacity), jnp.zeros((), jnp.int32))


def add(replay: Replay, rows: Transition, count: Int[Array, ""]) -> Replay:
    """Append the first `count` of `rows`, over the oldest where the buffer is full.

    `count` is an array, so one compiled program serves chunks of every length up to `rows`'.
    """
    index = jnp.arange(rows.reward.shape[0], dtype=jnp.int32)
    # rows beyond `count` are sent out of bounds, where a scatter drops them
    slot = jnp.where(index < count, (replay.added + index) % replay.capacity, replay.capacity)
    data = jax.tree.map(lambda old, new: old.at[slot].set(new, mode="drop"), replay.data, rows)
    return Replay(data, replay.added + count.astype(jnp.int32))


def sample(replay: Replay, batch_size: int, *, key: Key) -> Transition:
    """`batch_size` transitions, uniformly and with replacement. The buffer must not be empty."""
    # the remainder of one draw: of a million rows, none is likelier than another by more than
    # 0.03%; `randint` is closer, by a second draw
    index = jr.bits(key, (batch_size,)) % replay.size.astype(jnp.uint32)
    return jax.tree.map(lambda leaf: leaf[index], replay.data)
