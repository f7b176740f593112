"""What `qscore bench` measures, each figure the median of several repeats in one process.

Networks (256, 256) and batch 256, the algorithms' defaults. The whole loop is the training loop
itself (collecting, replay, updates), without evaluation and files.
"""

import resource
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.extend
import jax.random as jr
import numpy as np

from qscore import train_host
from qscore.algorithms import ALGORITHMS
from qscore.environments import environment_class
from qscore.errors import UsageError
from qscore.train_host import Session

WARMUP = 500
REPEATS = 7


def measure(algorithm_name: str, environment_name: str) -> dict[str, Any]:
    """One row of `qscore bench --json`. Raises `UsageError` for an environment that cannot be."""
    algorithm = ALGORITHMS[algorithm_name](warmup_steps=WARMUP)
    try:
        environment = environment_class(environment_name)(id=environment_name)
        task = environment.open()
    except ValueError as error:
        raise UsageError(str(error)) from error
    spec = task.spec
    task.close()

    start = time.perf_counter()
    train_host.exploration_policy(algorithm, spec, 1)
    capacity = WARMUP + (REPEATS + 1) * train_host.CHUNK
    train_host.compiled_chunk(algorithm, spec, capacity, train_host.CHUNK)
    compile_seconds = time.perf_counter() - start

    session = Session(algorithm, environment, 0, steps=capacity, eval_episodes=1)
    while session.env_steps < WARMUP + train_host.CHUNK:
        session.advance(capacity)
    loop = _median_seconds(lambda: session.advance(capacity), REPEATS) / train_host.CHUNK

    policy = train_host.exploration_policy(algorithm, spec, 1)
    obs = np.asarray(session.runner.replay.data.obs[:1])
    read, key = policy.read(session.runner.agent), jr.key(0)
    carry = policy.init_carry()

    def act() -> None:
        for step in range(100):
            policy(read, carry, obs, key, step)

    acting = _median_seconds(act, REPEATS) / 100

    chunk = train_host.compiled_chunk(algorithm, spec, capacity, train_host.CHUNK)
    rows = session.collector.empty_block()

    def update() -> None:
        session.runner, _, finite = chunk(
            session.runner, rows, np.int32(0), np.int32(train_host.CHUNK), key
        )
        jax.block_until_ready(finite)

    updating = _median_seconds(update, REPEATS) / train_host.CHUNK
    session.close()
    # kilobytes on Linux, bytes on macOS
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "algorithm": algorithm_name,
        "environment": environment_name,
        "updates_per_second": 1.0 / updating,
        "act_milliseconds": 1000.0 * acting,
        "env_steps_per_second": 1.0 / loop,
        "compile_seconds": compile_seconds,
        "peak_memory_mb": peak / (1024.0 if sys.platform != "darwin" else 1024.0**2),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as aligned text."""
    columns = list(rows[0])
    cells = [columns] + [
        [value if isinstance(value, str) else f"{value:.3g}" for value in row.values()]
        for row in rows
    ]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )


def matmul_flops(function: Callable[..., Any], *args: Any) -> int:
    """Floating-point operations in the matrix products of a traced function of arrays or shapes.

    Counted from the program, because XLA's own count takes the body of a loop once. Both branches
    of a condition count, and a loop of unknown length counts once.
    """
    return _count_flops(jax.make_jaxpr(function)(*args).jaxpr)


def _count_flops(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracting, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            contracted = int(np.prod([left[axis] for axis in contracting]))
            total += 2 * contracted * int(np.prod(equation.outvars[0].aval.shape))
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        total += times * sum(_count_flops(inner) for inner in _subprograms(equation))
    return total


def _subprograms(equation: Any) -> Iterator[Any]:
    """The programs inside an operation: the body of a scan, a jitted function, and so on."""
    for value in equation.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            inner = getattr(item, "jaxpr", item)
            if isinstance(inner, jax.extend.core.Jaxpr):
                yield inner


def _median_seconds(function: Any, repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return float(np.median(times))
