"""The pure part of training: what a run carries, and a chunk of gradient updates."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, Int

from qscore import replay
from qscore.algorithms.base import Algorithm
from qscore.replay import Replay
from qscore.types import Key, Metrics, Spec, State, Transition


class Runner(eqx.Module):
    """The device-resident state of one training run of one seed: a pytree of arrays."""

    agent: State
    replay: Replay
    updates: Int[Array, ""]


def init_runner(algorithm: Algorithm, spec: Spec, capacity: int, *, key: Key) -> Runner:
    """A fresh agent and an empty replay buffer of `capacity` transitions."""
    agent = algorithm.init(spec, key=key)
    return Runner(agent, replay.init(spec, capacity), jnp.zeros((), jnp.int32))


def train_chunk(
    algorithm: Algorithm,
    runner: Runner,
    rows: Transition,
    count: Int[Array, ""],
    updates: Int[Array, ""],
    *,
    key: Key,
) -> tuple[Runner, Metrics, Bool[Array, ""]]:
    """Add the first `count` of `rows` to the replay buffer, then take `updates` gradient updates.

    `count` and `updates` are arrays: one compiled program serves every chunk. The i-th update of
    a run draws its randomness from `fold_in(key, i)`, so a continued run needs no random state.
    Returns the next runner, the mean of each metric over the chunk (zeros for no update), and
    whether every learned number is finite.
    """
    runner = Runner(runner.agent, replay.add(runner.replay, rows, count), runner.updates)

    def update(_, carry: tuple[State, Int[Array, ""], Metrics]):
        agent, step, total = carry
        batch_key, update_key = jr.split(jr.fold_in(key, step))
        batch = replay.sample(runner.replay, algorithm.batch_size, key=batch_key)
        agent, metrics = algorithm.update(agent, batch, key=update_key)
        return agent, step + 1, jax.tree.map(jnp.add, total, metrics)

    shapes = jax.eval_shape(
        lambda: algorithm.update(
            runner.agent, replay.sample(runner.replay, algorithm.batch_size, key=key), key=key
        )[1]
    )
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    carry = (runner.agent, runner.updates, zeros)
    agent, step, total = jax.lax.fori_loop(0, updates, update, carry)
    divisor = jnp.maximum(updates, 1).astype(jnp.float32)
    metrics = jax.tree.map(lambda value: value / divisor, total)
    return Runner(agent, runner.replay, step), metrics, all_finite(agent)


def all_finite(tree: Any) -> Bool[Array, ""]:
    """Whether every floating-point number in a pytree is finite."""
    checks = [
        jnp.all(jnp.isfinite(leaf))
        for leaf in jax.tree.leaves(tree)
        if jnp.issubdtype(leaf.dtype, jnp.inexact)
    ]
    return jnp.all(jnp.stack(checks))
