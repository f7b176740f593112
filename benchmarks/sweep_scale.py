"""What a thousand trials cost the driver of a sweep, with Ray: trials that only sleep and write.

    python benchmarks/sweep_scale.py --trials 1000 --out benchmarks/results/sweep_scale.json

Starts a cluster on this machine that says it has `--slots` cores, and carries out a sweep whose
trials have no process of their own: each sleeps and writes one line. What is left is the engine:
the time from the first trial to the last, beyond the sleeping, and the driver's resident memory
as trials end, whose slope is what each trial leaves behind.
"""

import argparse
import json
import os
import platform
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray

from qscore.folder import write_json
from qscore.sweep import cluster
from qscore.sweep.board import Board
from qscore.sweep.process import Evaluation, State
from qscore.sweep.spec import parse


class Sleeper:
    """In the place of a trial's process: it sleeps so long, and writes one evaluation."""

    def __init__(self, command: list[str], folder: Path, cores: int, environ: dict[str, str]):
        self.end = time.monotonic() + float(os.environ["SLEEP_SECONDS"])
        folder.mkdir(parents=True)
        (folder / "evals.jsonl").write_text("{}\n")
        self.said = False

    def news(self) -> Evaluation | None:
        if self.said or self.state() == "running":
            return None
        self.said = True
        return Evaluation(1, 0.0)

    def state(self) -> State:
        return "running" if time.monotonic() < self.end else "done"

    def message(self) -> str:
        return ""

    def stop(self) -> None:
        pass


def measure(trials: int, seconds: float, slots: int, folder: Path) -> dict[str, Any]:
    """Carry out the sweep, looking at the driver's memory every second."""
    os.environ["SLEEP_SECONDS"] = str(seconds)
    ray.init(num_cpus=slots, include_dashboard=False, log_to_driver=False, logging_level=40)
    sweep = parse(
        f'engine = "ray"\nout = "{folder}"\nalgorithms = ["td3"]\n'
        f'environments = ["Pendulum-v1"]\nseeds = {trials}\n',
        "sleepers.toml",
    )
    board = Board(folder, sweep.trials, trials, screen=False)
    samples: list[tuple[int, float]] = []  # (trials that have ended, MiB)
    over = threading.Event()

    def look() -> None:
        while not over.wait(1.0):
            memory = psutil.Process().memory_info().rss / 2**20
            samples.append((len(board.names("done", "failed")), memory))

    looking = threading.Thread(target=look)
    looking.start()
    began = time.monotonic()
    cluster.run(
        sweep,
        sweep.trials,
        board,
        lambda: False,
        Sleeper,  # pyright: ignore[reportArgumentType]
    )
    took = time.monotonic() - began
    over.set()
    looking.join()
    worker = [
        process.memory_full_info().pss / 2**20
        for process in psutil.process_iter(["cmdline"])
        if "ray::TrialOfTune" in " ".join(process.info["cmdline"] or [])
    ]
    ray.shutdown()
    counts = board.counts()
    board.close()
    ended = np.array(samples)
    later = ended[ended[:, 0] > trials / 4]  # after the start, whose imports are no trial's
    slope = float(np.polyfit(later[:, 0], later[:, 1], 1)[0])
    return {
        "trials": trials,
        "done": counts["done"],
        "sleep_seconds": seconds,
        "slots": slots,
        "seconds": round(took, 1),
        "seconds_asleep": round(trials * seconds / slots, 1),
        "trials_per_second": round(trials / took, 2),
        "driver_mib_first": round(float(later[0, 1]), 1),
        "driver_mib_last": round(float(later[-1, 1]), 1),
        "driver_kib_per_trial": round(1024 * slope, 1),
        "worker_pss_mib": round(float(np.median(worker)), 1) if worker else None,
        "ray": ray.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(args.trials, args.seconds, args.slots, Path(folder))
    print(json.dumps(found, indent=2))
    if args.out is not None:
        write_json(args.out, found)


if __name__ == "__main__":
    main()
