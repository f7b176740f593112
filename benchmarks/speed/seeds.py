"""What many seeds in one process cost, against one.

    python benchmarks/speed/seeds.py --out benchmarks/results/seeds.json

Runs `qscore train cqsm lq` with a network critic and score of (64, 64) for each number of seeds, in
turns, in rounds: wall time of the whole process, start and compilation included, and the time that
its `summary.json` gives to training alone. Ratios to one seed are taken round by round. `--cores`
pins the processes; the default is all there are.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def train(seeds: int, steps: int, cores: list[int]) -> dict[str, float]:
    """Seconds that a run of so many seeds takes: of the process, and of training alone."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "-m", "qscore", "train", "cqsm", "lq"]
        command += ["--algorithm.critic", "network", "--steps", str(steps), "--seeds", str(seeds)]
        command += ["--out", str(run)]
        start = time.perf_counter()
        subprocess.run(
            ["taskset", "-c", ",".join(map(str, cores)), *command], check=True, capture_output=True
        )
        process = time.perf_counter() - start
        training = json.loads((run / "summary.json").read_text())["seconds"]
    return {"process": process, "training": training}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--steps", type=int, default=640_000)
    parser.add_argument("--rounds", type=int, default=3)
    cores = sorted(os.sched_getaffinity(0))
    parser.add_argument("--cores", type=int, nargs="+", default=cores)
    args = parser.parse_args()

    rounds: dict[int, list[dict[str, float]]] = {seeds: [] for seeds in args.seeds}
    for _ in range(args.rounds):
        for seeds in args.seeds:
            rounds[seeds].append(train(seeds, args.steps, args.cores))
            print(seeds, rounds[seeds][-1], flush=True)
    one = rounds[args.seeds[0]]
    result: dict[str, Any] = {
        "machine": f"{platform.machine()}, {len(args.cores)} of {os.cpu_count()} cores",
        "steps": args.steps,
        "rounds": args.rounds,
        "seeds": {
            str(seeds): {
                name: {
                    "seconds": round(statistics.median(each[name] for each in times), 2),
                    "ratio": round(
                        statistics.median(
                            each[name] / base[name] for each, base in zip(times, one, strict=True)
                        ),
                        2,
                    ),
                }
                for name in ("process", "training")
            }
            for seeds, times in rounds.items()
        },
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
