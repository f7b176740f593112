"""One contestant of `compare.py`, in a process of its own: works when told to, and says how long.

It writes one line when it is ready, {"compile_seconds", "version"}, then answers every line it
reads, {"do": VERB, "count": N}, with {"seconds": S, "peak_memory_mb": M}. The verbs: `update`, N
updates at a full batch in one call; `single`, the same in N calls; `act`, N actions for one
observation each; `loop`, N steps of training, each with its update.
"""

import argparse
import json
import os
import resource
import sys
import time
from importlib.metadata import version
from typing import Any

import numpy as np

WARMUP = 500
BATCH = 256
HIDDEN = [256, 256]


class Rival:
    """An algorithm of SBX or Stable-Baselines3, as its users run it."""

    def __init__(self, library: str, algorithm: str, task: str):
        if library == "sbx":
            import sbx as package  # pyright: ignore[reportMissingImports]
        else:
            import stable_baselines3 as package  # pyright: ignore[reportMissingImports]
            import torch  # pyright: ignore[reportMissingImports]

            torch.set_num_threads(len(os.sched_getaffinity(0)))
        self.model: Any = getattr(package, algorithm.upper())(
            "MlpPolicy",
            task,
            learning_starts=WARMUP,
            batch_size=BATCH,
            train_freq=1,
            gradient_steps=1,
            policy_kwargs={"net_arch": HIDDEN},
            device="cpu",
            seed=0,
        )
        self.model.learn(WARMUP)
        start = time.perf_counter()
        self.loop(2)  # TD3's actor steps in every second update
        self.compile_seconds = time.perf_counter() - start
        self.obs = np.asarray(self.model.replay_buffer.observations[0, 0])

    def update(self, count: int) -> None:
        self.model.train(count, BATCH)

    def act(self, count: int) -> None:
        for _ in range(count):
            self.model.predict(self.obs)

    def loop(self, count: int) -> None:
        self.model.learn(count, reset_num_timesteps=False)


def make(library: str, algorithm: str, task: str, steps: int, fields: dict[str, Any]) -> Any:
    """The contestant: what has `update`, `act`, `loop` and `compile_seconds`."""
    if library == "torch":
        import torch  # pyright: ignore[reportMissingImports]
        from torch_diffusion_ql import DiffusionQL

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        return DiffusionQL(task, WARMUP)
    if library != "qscore":
        return Rival(library, algorithm, task)
    from qscore.bench import Subject

    return Subject(algorithm, task, steps=steps, **fields)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("library", choices=["qscore", "sbx", "sb3", "torch"])
    parser.add_argument("algorithm")
    parser.add_argument("task")
    parser.add_argument("--steps", type=int, required=True, help="that `loop` will take in all")
    parser.add_argument("--fields", type=json.loads, default={})
    parser.add_argument("--cores", type=int, nargs="+", required=True)
    args = parser.parse_args()
    os.sched_setaffinity(0, args.cores)  # before any library counts them

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not come between the answers

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    subject = make(args.library, args.algorithm, args.task, args.steps, args.fields)
    packages = {"sbx": "sbx-rl", "sb3": "stable-baselines3"}
    library: str = args.library
    found = version(packages.get(library, library))
    answer(compile_seconds=subject.compile_seconds, version=found)
    for line in sys.stdin:
        order = json.loads(line)
        count, single = order["count"], order["do"] == "single"
        work = getattr(subject, "update" if single else order["do"])
        start = time.perf_counter()
        for _ in range(count if single else 1):
            work(1 if single else count)
        seconds = time.perf_counter() - start
        # kilobytes on Linux, bytes on macOS
        unit = 1024.0 if sys.platform != "darwin" else 1024.0**2
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
        answer(seconds=seconds, peak_memory_mb=peak)


if __name__ == "__main__":
    main()
