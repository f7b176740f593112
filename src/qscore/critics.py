"""What algorithms in discrete time share about their critics: a stack, its values, its regression.

A stack is one `Critic` whose every leaf has a leading axis "critics".
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float

from qscore.networks import GLOROT, Activation, Critic, Initializer
from qscore.types import AnyArray, Key, Metrics, Spec, Transition


def stack_critics(
    count: int,
    spec: Spec,
    hidden: Sequence[int],
    *,
    activation: Activation = jax.nn.relu,
    initializer: Initializer = GLOROT,
    key: Key,
) -> Critic:
    """`count` critics, each with fresh parameters of its own, as one stack."""
    make = functools.partial(Critic, spec.obs_size, spec.action_size, hidden)
    return jax.vmap(lambda key: make(activation=activation, initializer=initializer, key=key))(
        jr.split(key, count)
    )


def q_values(
    critics: Critic, obs: Float[AnyArray, "batch obs"], action: Float[AnyArray, "batch act"]
) -> Float[Array, "critics batch"]:
    """Q_i(s, a) of every critic of a stack at every row."""
    count = jax.tree.leaves(critics)[0].shape[0]
    # each critic gets rows of its own: of rows that are shared, the first layer makes one wide
    # product, whose result is then transposed, for 3 to 5% of an update's time on a CPU
    own = [jnp.broadcast_to(rows, (count, *rows.shape)) for rows in (obs, action)]
    return jax.vmap(lambda critic, *rows: jax.vmap(critic)(*rows))(critics, *own)


def bootstrap(
    batch: Transition, next_value: Float[Array, " batch"], discount: float
) -> Float[AnyArray, " batch"]:
    """y = r + gamma (1 - terminated) V(s'), in units of reward; a time limit cuts nothing."""
    alive = 1.0 - batch.terminated.astype(jnp.float32)
    return batch.reward + discount * alive * next_value


def critic_loss(
    critics: Critic, batch: Transition, target: Float[AnyArray, " batch"]
) -> tuple[Float[Array, ""], Metrics]:
    """sum_i mean (Q_i(s, a) - y)^2 over a stack of critics, y held fixed."""
    q = q_values(critics, batch.obs, batch.action)
    loss = jnp.sum(jnp.mean((q - target[None]) ** 2, axis=1))
    return loss, {"critic_loss": loss, "q": jnp.mean(q), "q_target": jnp.mean(target)}
