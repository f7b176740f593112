"""Whether a sweep's numbers are those of its commands by hand, on either engine.

    python benchmarks/sweep_agreement.py --out benchmarks/results/sweep_agreement.json

Two algorithms on two tasks with three seeds each, small: through `engine = "local"`, through
`engine = "ray"`, and as twelve commands one after the other, each on one core as a trial is.
Compares every figure of `summary.json` that is not a time.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from qscore.folder import write_json
from qscore.sweep import sweep
from qscore.sweep.spec import parse

SPEC = """
engine = "{engine}"
out = "{out}"
algorithms = ["qsm", "sac"]
environments = ["Pendulum-v1", "InvertedPendulum-v5"]
seeds = 3
[settings]
steps = 1000
eval_every = 500
eval_episodes = 2
[algorithm]
hidden = [16, 16]
batch_size = 32
warmup_steps = 200
"""


def figures(folder: Path) -> dict[str, Any]:
    """What must not depend on how a run came about."""
    summary = json.loads((folder / "summary.json").read_text())
    return {name: value for name, value in summary.items() if "second" not in name}


def by_hand(folder: Path) -> dict[str, dict[str, Any]]:
    """The command of every trial, on one core."""
    trials = parse(SPEC.format(engine="local", out=folder), "hand.toml").trials
    core = min(os.sched_getaffinity(0))
    for trial in trials:
        words = trial.command(folder / trial.name)
        command = ["taskset", "--cpu-list", str(core), sys.executable, "-m", *words]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    return {trial.name: figures(folder / trial.name) for trial in trials}


def by_sweep(engine: str, folder: Path) -> dict[str, dict[str, Any]]:
    """The same trials through an engine."""
    spec = folder.with_suffix(".toml")
    spec.write_text(SPEC.format(engine=engine, out=folder))
    done = sweep(spec, progress=False)
    if done.failures:
        raise RuntimeError(f"trials failed: {done.failures}")
    return {
        trial.name: figures(folder / trial.name) for trial in parse(spec.read_text(), "").trials
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        found = {engine: by_sweep(engine, Path(place) / engine) for engine in ("ray", "local")}
        hand = by_hand(Path(place) / "hand")
    result = {
        "trials": {name: row["final_returns"] for name, row in hand.items()},
        "differences": {
            engine: [name for name, row in hand.items() if rows[name] != row]
            for engine, rows in found.items()
        },
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }
    print(json.dumps(result, indent=2))
    if args.out is not None:
        write_json(args.out, result)
    sys.exit(any(result["differences"].values()))


if __name__ == "__main__":
    main()
