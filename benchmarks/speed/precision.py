"""What rounding the networks' products to bfloat16 gains, and how far from textbook arithmetic.

    python benchmarks/speed/precision.py --out benchmarks/results/precision.json

QSM with its official preset on transitions of HalfCheetah-v5's shapes, batches of 256. Contestants:

    textbook   the arithmetic of the released code: mish from its definition, the noise level
               embedded per row, whole inputs to the first layer at every step of the chain, XLA's
               own choice of products; 50 updates in one call
    released   the same, each update a call of its own, on a batch that NumPy drew
    f32, bf16  this library at its two precisions; 50 updates in one call

All are timed in turns in one process; ratios are taken round by round. `--cores` pins the process;
the default is one core.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

UPDATES = 50
ROWS = 10_000
"""Transitions to learn from."""


def textbook_actor() -> type:
    """A denoiser that is evaluated as it is written down."""
    import jax
    import jax.numpy as jnp

    from qscore.networks import ScoreNetwork

    class Textbook(ScoreNetwork):
        def __init__(self, *args: Any, **kwargs: Any):
            with mock.patch("qscore.networks.mish", lambda x: x * jnp.tanh(jax.nn.softplus(x))):
                super().__init__(*args, **kwargs)

        # what chains and losses hand on as codes is (observation, level) itself
        def encode_obs(self, obs):
            return jnp.append(obs, 0.0)

        def encode_levels(self, levels):
            return jnp.pad(
                jnp.arange(levels, dtype=jnp.float32)[:, None], ((0, 0), (self.obs_size, 0))
            )

        def __call__(self, action, code):
            embedding = self.level_mlp(self.features(code[-1]))
            return self.mlp(jnp.concatenate([action, code[:-1], embedding]))

    return Textbook


def contestants(width: int) -> dict[str, Callable[[], None]]:
    """By name: takes UPDATES updates, and waits for them."""
    import equinox as eqx
    import jax
    import jax.numpy as jnp
    import jax.random as jr

    from qscore import QSM, replay
    from qscore.train import Runner, init_runner, train_chunk
    from qscore.train_host import compiled_chunk
    from qscore.types import Spec, Transition

    spec = Spec(obs_size=17, action_size=6, dt=0.05)
    algorithm = QSM(preset="official", hidden=(width, width))
    rng = np.random.default_rng(0)
    empty = replay.empty_rows(spec, ROWS)
    rows = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), empty)
    rows = eqx.tree_at(lambda r: (r.terminated, r.dt), rows, (empty.terminated, empty.dt + spec.dt))
    block = replay.empty_rows(spec, UPDATES)
    key = jr.key(0)

    def chunks(compiled: Any) -> Callable[[], None]:
        state = [jax.tree.map(jnp.copy, filled)]

        def take() -> None:
            state[0], _, finite = compiled(state[0], block, np.int32(0), np.int32(UPDATES), key)
            jax.block_until_ready(finite)

        return take

    def singles(agent: Any) -> Callable[[], None]:
        state = [jax.tree.map(jnp.copy, agent)]

        @jax.jit
        def update(agent, batch, key):
            return algorithm.update(agent, batch, key=key)

        def take() -> None:
            for i in range(UPDATES):
                index = rng.integers(ROWS, size=algorithm.batch_size)
                batch: Transition = jax.tree.map(lambda leaf: np.asarray(leaf)[index], rows)
                state[0], metrics = update(state[0], batch, jr.fold_in(key, i))
            jax.block_until_ready(metrics)

        return take

    def runner() -> Any:
        fresh = init_runner(algorithm, spec, ROWS, key=key)
        full = replay.Replay(jax.tree.map(jnp.asarray, rows), jnp.array(ROWS, jnp.int32))
        return Runner(fresh.agent, full, fresh.updates)

    filled = runner()
    ours = {
        name: chunks(compiled_chunk(algorithm, spec, ROWS, UPDATES, name))
        for name in ("f32", "bf16")
    }
    with mock.patch("qscore.algorithms.qsm.ScoreNetwork", textbook_actor()):
        filled = runner()
    textbook = jax.jit(lambda *args: train_chunk(algorithm, *args[:-1], key=args[-1]))
    return {"textbook": chunks(textbook), "released": singles(filled.agent), **ours}


def measure(width: int, rounds: int) -> dict[str, Any]:
    """Milliseconds per update, and the speed as a multiple of each other contestant's."""
    takes = contestants(width)
    times: dict[str, list[float]] = {name: [] for name in takes}
    for turn in range(rounds + 1):
        for name, take in takes.items():
            start = time.perf_counter()
            take()
            if turn > 0:  # the first one compiles
                times[name].append(1e3 * (time.perf_counter() - start) / UPDATES)
    return {
        name: {
            "milliseconds": round(statistics.median(mine), 3),
            "speed_ratio": {
                other: round(statistics.median(np.array(theirs) / np.array(mine)), 3)
                for other, theirs in times.items()
                if other != name
            },
        }
        for name, mine in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--rounds", type=int, default=15)
    one = sorted(os.sched_getaffinity(0))[:1]
    parser.add_argument("--cores", type=int, nargs="+", default=one)
    args = parser.parse_args()
    os.sched_setaffinity(0, args.cores)  # before JAX counts them

    results: dict[str, Any] = {
        "machine": f"{platform.machine()}, {len(args.cores)} of {os.cpu_count()} cores",
        "rounds": args.rounds,
    }
    for width in args.widths:
        results[str(width)] = measure(width, args.rounds)
        print(width, json.dumps(results[str(width)], indent=1), flush=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
