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
from pathlib import Path
from typing import Any

from compare import CONTESTANTS

PRODUCTS = 200
UPDATES = 50
ROWS = 256


def measure(algorithm: str, fields: dict[str, Any], width: int, rounds: int) -> dict[str, Any]:
    """Medians over rounds for one algorithm with two hidden layers of `width`."""
    import jax
    import jax.numpy as jnp
    import jax.random as jr

    from qscore.bench import Subject

    subject = Subject(algorithm, "HalfCheetah-v5", steps=0, hidden=(width, width), **fields)
    weight = jr.orthogonal(jr.key(0), width)

    @jax.jit
    def products(x):
        return jax.lax.fori_loop(0, PRODUCTS, lambda _, x: x @ weight, x)

    rows = jnp.ones((ROWS, width))
    rates, times = [], []
    for turn in range(rounds + 1):
        start = time.perf_counter()
        products(rows).block_until_ready()
        middle = time.perf_counter()
        subject.update(UPDATES)
        end = time.perf_counter()
        if turn > 0:  # the first one compiles
            rates.append(2.0 * ROWS * width**2 * PRODUCTS / (middle - start))
            times.append((end - middle) / UPDATES)
    subject.close()
    shares = [subject.flops / each / rate for each, rate in zip(times, rates, strict=True)]
    return {
        "million_operations": round(subject.flops / 1e6, 1),
        "milliseconds": round(1e3 * statistics.median(times), 3),
        "gigaflops": round(subject.flops / statistics.median(times) / 1e9, 1),
        "matmul_gigaflops": round(statistics.median(rates) / 1e9, 1),
        "share": round(statistics.median(shares), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    ours = [name for name, (library, _, _) in CONTESTANTS.items() if library == "qscore"]
    parser.add_argument("--only", nargs="+", choices=ours, default=["qsm", "qsm, official", "sac"])
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
    for name in args.only:
        _, algorithm, fields = CONTESTANTS[name]
        for width in args.widths:
            row = measure(algorithm, fields, width, args.rounds)
            results[f"{name}, {width}"] = row
            print(name, width, row, flush=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
