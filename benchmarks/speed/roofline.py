"""What share of this machine's rate of matrix products an update reaches.

    python benchmarks/speed/roofline.py --out benchmarks/results/roofline.json

An update's operations are counted from its program (`qscore.bench.matmul_flops`: matrix products
only, two per multiplication and addition). The rate is that of products (256, n) x (n, n) in
float32 in one compiled loop, n the width of the hidden layers: the largest products an update has,
and what it would reach if nothing else took time. Both are timed in turns, in rounds, in one
process; the share is taken round by round. `--cores` pins the process; the default is one core.
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

from compare import CONTESTANTS

PRODUCTS = 200
UPDATES = 50
ROWS = 256


def products(width: int) -> Callable[[], float]:
    """Measures the rate of products (ROWS, width) x (width, width): operations per second."""
    import jax
    import jax.numpy as jnp
    import jax.random as jr

    weight = jr.orthogonal(jr.key(0), width)
    rows = jnp.ones((ROWS, width))

    @jax.jit
    def multiply(x):
        return jax.lax.fori_loop(0, PRODUCTS, lambda _, x: x @ weight, x)

    def rate() -> float:
        start = time.perf_counter()
        multiply(rows).block_until_ready()
        return 2.0 * ROWS * width**2 * PRODUCTS / (time.perf_counter() - start)

    rate()  # compiles
    return rate


def in_turns(subject: Any, width: int, rounds: int) -> tuple[list[float], list[float]]:
    """Rates of products, and seconds per update, of every round."""
    rate, rates, times = products(width), [], []
    for turn in range(rounds + 1):
        now = rate()
        start = time.perf_counter()
        subject.update(UPDATES)
        seconds = (time.perf_counter() - start) / UPDATES
        if turn > 0:  # the first one is slow
            rates.append(now)
            times.append(seconds)
    return rates, times


def measure(algorithm: str, fields: dict[str, Any], width: int, rounds: int) -> dict[str, Any]:
    """Medians over rounds for one algorithm with two hidden layers of `width`."""
    from qscore.bench import Subject

    subject = Subject(algorithm, "HalfCheetah-v5", steps=0, hidden=(width, width), **fields)
    rates, times = in_turns(subject, width, rounds)
    subject.close()
    shares = [subject.flops / each / rate for each, rate in zip(times, rates, strict=True)]
    return {
        "million_operations": round(subject.flops / 1e6, 1),
        "milliseconds": round(1e3 * statistics.median(times), 3),
        "gigaflops": round(subject.flops / statistics.median(times) / 1e9, 1),
        "matmul_gigaflops": round(statistics.median(rates) / 1e9, 1),
        "share": round(statistics.median(shares), 3),
    }


def report(
    description: str | None, only: list[str], rounds: int, measure: Callable[..., dict[str, Any]]
) -> None:
    """The command: what `measure` says of this library's contestants, printed and written."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    ours = [name for name, (library, _, _) in CONTESTANTS.items() if library == "qscore"]
    parser.add_argument("--only", nargs="+", choices=ours, default=only)
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--rounds", type=int, default=rounds)
    one = sorted(os.sched_getaffinity(0))[:1]
    parser.add_argument("--cores", type=int, nargs="+", default=one)
    args = parser.parse_args()
    os.sched_setaffinity(0, args.cores)  # before JAX counts them

    results: dict[str, Any] = {
        "machine": f"{platform.machine()}, {len(args.cores)} of {os.cpu_count()} cores",
        "rounds": args.rounds,
    }
    for name in args.only:
        _, algorithm, fields = CONTESTANTS[name]
        for width in args.widths:
            row = measure(algorithm, fields, width, args.rounds)
            results[f"{name}, {width}"] = row
            print(name, width, row, flush=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    report(__doc__, ["qsm", "qsm, official", "sac"], 15, measure)
