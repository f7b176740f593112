"""What `qscore bench` measures, each figure the median of several repeats in one process.

Networks (256, 256) and batch 256, the algorithms' defaults. The whole loop is the training loop
itself (collecting, replay, updates), without evaluation and files.
"""

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.extend
import jax.random as jr
import numpy as np

from qscore import replay, train_host
from qscore.algorithms import ALGORITHMS
from qscore.environments import environment_class
from qscore.errors import RunStopped, UsageError
from qscore.folder import as_usage_error
from qscore.products import Precision
from qscore.train_host import Session

WARMUP = 500
REPEATS = 7


class Subject:
    """An algorithm on an environment, past its warm-up, whose parts can be run by themselves.

    Each method does so much work and waits for it; timing is the caller's. `steps` is how many
    environment steps `loop` may take in all. Raises `UsageError` for an environment that cannot be.
    """

    compile_seconds: float
    flops: int
    """Floating-point operations in the matrix products of one update."""

    def __init__(
        self,
        algorithm_name: str,
        environment_name: str,
        *,
        steps: int,
        precision: Precision = "f32",
        **fields: Any,
    ):
        algorithm = ALGORITHMS[algorithm_name](warmup_steps=WARMUP, **fields)
        environment = _environment(environment_name)
        task = as_usage_error(environment.open)
        spec = task.spec
        task.close()

        start = time.perf_counter()
        self._policy = train_host.exploration_policy(algorithm, spec, 1)
        size = train_host.chunk_steps(environment)
        begun = -(-(WARMUP + size) // size) * size  # whole chunks
        self._until = begun + steps
        train_host.compiled_chunk(algorithm, spec, self._until, size, precision)
        self.compile_seconds = time.perf_counter() - start

        self._session = Session(
            algorithm, environment, 0, steps=self._until, eval_episodes=0, precision=precision
        )
        while self._session.env_steps < begun:
            self._session.advance(begun)
        self._obs = np.asarray(self._session.runner.replay.data.obs[:1])
        self._rows = self._session.collector.empty_block()
        batch = jax.eval_shape(lambda: replay.empty_rows(spec, algorithm.batch_size))
        self.flops = matmul_flops(
            lambda state, batch, key: algorithm.update(state, batch, key=key),
            self._session.runner.agent,
            batch,
            jr.key(0),
        )

    def update(self, count: int) -> None:
        """`count` updates in one call, on batches from the replay buffer."""
        self._session.runner, _, finite = self._session._chunk(
            self._session.runner, self._rows, np.int32(0), np.int32(count), jr.key(0)
        )
        jax.block_until_ready(finite)

    def act(self, count: int) -> None:
        """`count` explored actions, one observation at a time."""
        read = self._policy.read(self._session.runner.agent)
        carry, key = self._policy.init_carry(), jr.key(0)
        for step in range(count):
            self._policy(read, carry, self._obs, key, step)

    def loop(self, count: int) -> None:
        """`count` steps of training: environment, replay and updates."""
        until = self._session.env_steps + count
        if until > self._until:
            raise ValueError(
                f"there is room for {self._until} steps, warm-up included; not {until}"
            )
        while self._session.env_steps < until:
            self._session.advance(until)

    def close(self) -> None:
        """Close the environments."""
        self._session.close()


def _environment(name: str) -> Any:
    return as_usage_error(lambda: environment_class(name)(id=name))


def measure(
    algorithm_name: str, environment_name: str, precision: Precision = "f32"
) -> dict[str, Any]:
    """One row of `qscore bench --json`. Raises `UsageError` for an environment that cannot be."""
    size = train_host.CHUNK
    chunk = max(size, train_host.chunk_steps(_environment(environment_name)))
    subject = Subject(algorithm_name, environment_name, steps=REPEATS * chunk, precision=precision)
    loop = _median_seconds(subject.loop, chunk)
    acting = _median_seconds(subject.act, 100)
    updating = _median_seconds(subject.update, size)
    subject.close()
    return {
        "algorithm": algorithm_name,
        "environment": environment_name,
        "updates_per_second": 1.0 / updating,
        "act_milliseconds": 1000.0 * acting,
        "env_steps_per_second": 1.0 / loop,
        "compile_seconds": subject.compile_seconds,
        "peak_memory_mb": peak_memory_mb(),
    }


def measure_apart(
    algorithm_name: str, environment_name: str, precision: Precision = "f32"
) -> dict[str, Any]:
    """`measure` in a process of its own: a peak of memory is that of all a process has done."""
    command = [sys.executable, "-m", "qscore", "bench", algorithm_name, "--json"]
    command += ["--environment", environment_name, "--precision", precision]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        said = done.stderr.strip().removeprefix("qscore: ")
        raise UsageError(said) if done.returncode == 2 else RunStopped(said)
    return json.loads(done.stdout)[0]


def peak_memory_mb() -> float:
    """The most memory that this process has had resident so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024.0 if sys.platform != "darwin" else 1024.0**2)  # bytes on macOS


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


def _median_seconds(work: Callable[[int], None], count: int) -> float:
    """Seconds per unit of `work`, the median of several calls for `count` units each."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work(count)
        times.append((time.perf_counter() - start) / count)
    return float(np.median(times))
