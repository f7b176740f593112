"""Environments in JAX: collecting and evaluating as one compiled program each.

Rows are copies of an environment, added by `jax.vmap`; steps are a loop on the device. A row's
randomness is `fold_in(fold_in(key, step), row)`, so it depends neither on the chunking nor on the
other rows, and a continued run needs no random state.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from qscore import replay
from qscore.algorithms.base import Algorithm
from qscore.environments.base import EnvironmentFailure
from qscore.environments.sde import SDEEnvironment, SDEState
from qscore.programs import kept
from qscore.types import Carry, Key, Spec, State, Transition

CHUNK_STEPS = 50
"""Steps of every row collected under one policy before its updates are taken."""


class Rows(eqx.Module):
    """Running copies side by side, with leading axis "rows", and what their episodes earned."""

    state: SDEState
    carry: Carry
    returns: Float[Array, " rows"]
    finished: Float[Array, ""]  # returns of ended episodes, summed
    ended: Int[Array, ""]


def begin(algorithm: Algorithm, environment: SDEEnvironment, *, key: Key) -> Rows:
    """`environment.num_envs` fresh copies."""
    rows = environment.num_envs
    carry = algorithm.init_carry(environment.spec)
    return Rows(
        state=jax.vmap(environment.begin)(row_keys(key, rows)),
        carry=jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (rows, *leaf.shape)), carry),
        returns=jnp.zeros(rows),
        finished=jnp.zeros(()),
        ended=jnp.zeros((), jnp.int32),
    )


def row_keys(key: Key, rows: int) -> Array:
    """One key per row: an array of `rows` keys."""
    return jax.vmap(lambda row: jr.fold_in(key, row))(jnp.arange(rows))


def step(
    algorithm: Algorithm,
    environment: SDEEnvironment,
    agent: State,
    rows: Rows,
    *,
    random: Bool[Array, ""],
    key: Key,
) -> tuple[Rows, Transition]:
    """One exploring step of every row (uniform actions if `random`); ended episodes begin anew."""
    count = rows.returns.shape[0]
    act_key, uniform_key, step_key, reset_key = jr.split(key, 4)
    obs = jax.vmap(environment.observation)(rows.state)
    action, carry = jax.vmap(
        lambda carry, obs, key: algorithm.act(agent, carry, obs, key=key, explore=True)
    )(rows.carry, obs, row_keys(act_key, count))
    uniform = jr.uniform(uniform_key, action.shape, minval=-1.0, maxval=1.0)
    action = jnp.where(random, uniform, action)
    state, out = jax.vmap(lambda state, action, key: environment.advance(state, action, key=key))(
        rows.state, action, row_keys(step_key, count)
    )
    transition = Transition(
        obs=obs,
        action=action,
        reward=out.reward,
        next_obs=out.obs,
        terminated=out.terminated,
        time=rows.state.time,
        dt=out.dt,
    )
    over = out.terminated | out.truncated
    returns = rows.returns + out.reward
    fresh = begin(algorithm, environment, key=reset_key)

    def either(new: Array, old: Array) -> Array:
        return jnp.where(over.reshape(-1, *([1] * (old.ndim - 1))), new, old)

    rows = Rows(
        state=jax.tree.map(either, fresh.state, state),
        carry=jax.tree.map(either, fresh.carry, carry),
        returns=jnp.where(over, 0.0, returns),
        finished=rows.finished + jnp.sum(jnp.where(over, returns, 0.0)),
        ended=rows.ended + jnp.sum(over, dtype=jnp.int32),
    )
    return rows, transition


def collect(
    algorithm: Algorithm,
    environment: SDEEnvironment,
    agent: State,
    rows: Rows,
    start: Int[Array, ""],
    steps: Int[Array, ""],
    *,
    key: Key,
) -> tuple[Rows, Transition]:
    """`steps` steps of every row, at most `CHUNK_STEPS`, from the `start`-th on.

    Both are arrays: one compiled program serves every chunk. The transitions have one leading axis
    of CHUNK_STEPS * rows, of which the first steps * rows are filled.
    """
    count = rows.returns.shape[0]
    one = jax.eval_shape(
        lambda: step(algorithm, environment, agent, rows, random=jnp.array(True), key=key)[1]
    )
    block = jax.tree.map(lambda leaf: jnp.zeros((CHUNK_STEPS, *leaf.shape), leaf.dtype), one)

    def body(i, inputs):
        rows, block = inputs
        rows, transition = step(
            algorithm,
            environment,
            agent,
            rows,
            random=(start + i) * count < algorithm.warmup_steps,
            key=jr.fold_in(key, start + i),
        )
        return rows, jax.tree.map(lambda old, new: old.at[i].set(new), block, transition)

    rows, block = jax.lax.fori_loop(0, steps, body, (rows, block))
    return rows, jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), block)


@kept
def _compiled_begin(algorithm: Algorithm, environment: SDEEnvironment) -> Any:
    return jax.jit(lambda key: begin(algorithm, environment, key=key))


@kept
def _compiled_collect(algorithm: Algorithm, environment: SDEEnvironment) -> Any:
    def run(agent, rows, start, steps, key):
        return collect(algorithm, environment, agent, rows, start, steps, key=key)

    agent = jax.eval_shape(lambda: algorithm.init(environment.spec, key=jr.key(0)))
    rows = jax.eval_shape(lambda: begin(algorithm, environment, key=jr.key(0)))
    integer = jax.ShapeDtypeStruct((), jnp.int32)
    return jax.jit(run).lower(agent, rows, integer, integer, jr.key(0)).compile()


class DeviceCollector:
    """The copies of a JAX environment that one seed collects in; all of it on the device."""

    def __init__(self, algorithm: Algorithm, environment: SDEEnvironment, key: Key):
        self.environment, self.spec = environment, environment.spec
        self.chunk = CHUNK_STEPS * environment.num_envs
        begin_key, self._key = jr.split(key)
        self.rows = _compiled_begin(algorithm, environment)(begin_key)
        self._collect = _compiled_collect(algorithm, environment)

    def collect(self, agent: State, env_steps: int, count: int) -> Transition:
        """`count` transitions from `env_steps` on, in a block of `chunk` rows.

        Raises `EnvironmentFailure` where the state diverged.
        """
        envs = self.environment.num_envs
        self.rows, block = self._collect(
            agent, self.rows, np.int32(env_steps // envs), np.int32(count // envs), self._key
        )
        # of running and of ended episodes
        returns = np.append(np.asarray(self.rows.returns), np.asarray(self.rows.finished))
        if not np.isfinite(returns).all():
            raise EnvironmentFailure(
                f"{self.environment.id} diverged: its state grew without bound under the "
                "actions taken."
            )
        return block

    def empty_block(self) -> Transition:
        """`chunk` rows of zeros."""
        return replay.empty_rows(self.spec, self.chunk)

    def flush(self) -> list[float]:
        """The mean return of the episodes that ended since the last call, if any did."""
        ended, finished = int(self.rows.ended), float(self.rows.finished)
        zeros = (jnp.zeros(()), jnp.zeros((), jnp.int32))
        self.rows = eqx.tree_at(lambda rows: (rows.finished, rows.ended), self.rows, zeros)
        return [finished / ended] if ended else []

    def snapshot(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """(counters, arrays): what `restore` needs to continue exactly."""
        return {}, {"rows": self.rows}

    def restore(self, counters: dict[str, Any], arrays: dict[str, Any]) -> bool:
        """Continue from a snapshot; always exact."""
        self.rows = jax.tree.map(jnp.array, arrays["rows"])
        return True

    def close(self) -> None:
        """Nothing is held."""


@kept
def compiled_evaluation(algorithm: Algorithm, environment: SDEEnvironment, episodes: int) -> Any:
    """The program of `evaluate_on_device` for so many episodes, to be compiled by one thread."""
    spec: Spec = environment.spec
    most = int(1.01 * environment.episode_steps) + 2  # irregular steps are summed with rounding

    def episode(agent, row, reset_key, act_key):
        start_key, noise_key = jr.split(reset_key)

        def body(inputs):
            state, carry, total, lost, _ = inputs
            key = jr.fold_in(jr.fold_in(act_key, state.steps), row)
            action, carry = algorithm.act(
                agent, carry, environment.observation(state), key=key, explore=False
            )
            key = jr.fold_in(noise_key, state.steps)
            state, out = environment.advance(state, action, key=key)
            # Kahan's sum: in float32, a long episode would add small rewards to a large return
            reward = out.reward - lost
            new = total + reward
            lost = (new - total) - reward
            return state, carry, new, lost, out.terminated | out.truncated

        start = (environment.begin(start_key), algorithm.init_carry(spec), 0.0, 0.0, False)
        state, _, total, _, _ = jax.lax.while_loop(
            lambda inputs: ~inputs[4] & (inputs[0].steps < most), body, start
        )
        return total, state.steps

    def evaluate(agent, seeds, act_key):
        reset_keys = jax.vmap(jr.key)(seeds)
        rows = jnp.arange(episodes)
        return jax.vmap(episode, in_axes=(None, 0, 0, None))(agent, rows, reset_keys, act_key)

    agent = jax.eval_shape(lambda: algorithm.init(spec, key=jr.key(0)))
    seeds = jax.ShapeDtypeStruct((episodes,), jnp.int32)
    return jax.jit(evaluate).lower(agent, seeds, jr.key(0)).compile()


def evaluate_on_device(
    algorithm: Algorithm,
    environment: SDEEnvironment,
    agent: State,
    seeds: list[int],
    *,
    key: Key,
) -> tuple[list[float], list[int]]:
    """Returns and lengths of the episodes that belong to `seeds`, exploration off.

    Raises `EnvironmentFailure` where the state diverged.
    """
    program = compiled_evaluation(algorithm, environment, len(seeds))
    returns, lengths = program(agent, np.asarray(seeds, np.int32), key)
    if not np.isfinite(np.asarray(returns)).all():
        raise EnvironmentFailure(
            f"{environment.id} diverged in an evaluation: its state grew without bound "
            "under the policy."
        )
    return np.asarray(returns).astype(float).tolist(), np.asarray(lengths).tolist()


def record(
    environment: SDEEnvironment,
    first: Callable[[Float[Array, " obs"], Key], Float[Array, " act"]],
    move: Callable[[Float[Array, " obs"], Float[Array, " act"], Key], Float[Array, " act"]],
    *,
    paths: int,
    key: Key,
) -> Transition:
    """Whole episodes side by side, axes [paths, steps]: a data set for `qscore.offline`.

    `first(obs, key)` is an episode's first action and `move(obs, action, key)` each next one, from
    the action before it; what leaves [-1, 1] is clipped, as the environment does.

    Raises `ValueError` where episodes are not all equally long, `EnvironmentFailure` where the
    state diverged.
    """
    if environment.irregular:
        raise ValueError("`environment` must have regular steps; leave out `dt_min` and `dt_max`.")

    def path(key):
        begin_key, first_key, path_key = jr.split(key, 3)
        state = environment.begin(begin_key)

        def one(carry, i):
            state, action = carry
            move_key, step_key = jr.split(jr.fold_in(path_key, i))
            obs = environment.observation(state)
            action = jnp.where(i == 0, action, move(obs, action, move_key))
            action = jnp.clip(action, -1.0, 1.0)
            after, out = environment.advance(state, action, key=step_key)
            row = Transition(obs, action, out.reward, out.obs, out.terminated, state.time, out.dt)
            return (after, action), row

        start = (state, first(environment.observation(state), first_key))
        return jax.lax.scan(one, start, jnp.arange(environment.episode_steps))[1]

    episodes = jax.jit(jax.vmap(path))(row_keys(key, paths))
    if bool(jnp.any(episodes.terminated[:, :-1])):
        raise ValueError(f"episodes of {environment.id} end early; their lengths must be equal.")
    if not np.isfinite(np.asarray(episodes.next_obs)).all():
        raise EnvironmentFailure(
            f"{environment.id} diverged: its state grew without bound under `move`."
        )
    return episodes
