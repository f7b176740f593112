"""The resident memory of a long run, step by step: does it grow?

    python benchmarks/speed/memory.py --out benchmarks/results/memory.json

Trains QSM on Pendulum-v1 for `--steps` environment steps with its defaults, in a process of its
own, and samples that process's resident memory every few seconds. The figure is the
most memory after the first tenth of the run as a multiple of the most in it: 1 is no growth. It
includes the moments in which a checkpoint is written.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil


def steps_done(run: Path) -> int:
    """The environment steps of the last whole line of a run's metrics; 0 before the first."""
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text().split("\n")[:-1] if metrics.exists() else []
    return json.loads(lines[-1])["env_steps"] if lines else 0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--algorithm", default="qsm")
    parser.add_argument("--task", default="Pendulum-v1")
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--every", type=float, default=2.0, help="seconds between samples")
    args = parser.parse_args()

    samples: dict[int, float] = {}  # the most memory seen by the steps that were done
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "-m", "qscore", "train", args.algorithm, args.task]
        command += ["--steps", str(args.steps), "--out", str(run)]
        process = subprocess.Popen(command)
        while process.poll() is None:
            time.sleep(args.every)
            try:
                used = psutil.Process(process.pid).memory_info().rss / 2**20
            except psutil.NoSuchProcess:
                break  # it has just ended
            done = steps_done(run)
            samples[done] = max(used, samples.get(done, 0.0))
    if process.wait():
        raise SystemExit(process.returncode)

    tenths: list[list[float]] = [[] for _ in range(10)]  # the run's, by the steps already done
    for done, used in samples.items():
        tenths[min(10 * done // args.steps, 9)].append(used)
    most = [max(each) for each in tenths if each]
    result = {
        "machine": platform.machine(),
        "run": f"{args.algorithm} on {args.task}, {args.steps} steps",
        "most_mb_by_tenth": [round(each) for each in most],
        "growth": round(max(most[1:]) / most[0], 3),
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
