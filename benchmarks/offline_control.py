"""Learning from recorded episodes: behaviour cloning, Diffusion-QL, QSM and TD3 on the same data.

    python benchmarks/offline_control.py HalfCheetah-v5 data/halfcheetah-medium.npz \\
        --out benchmarks/results/offline-halfcheetah.json

Each variant and seed is `--steps` gradient steps on the data set, then and at every `--eval-every`
steps 10 episodes without exploration. "cloning" is Diffusion-QL's actor without its value term;
"gaussian cloning" is TD3's actor at a weight of 1000 on the recorded action. The behaviour's own
returns are those of the data set's episodes. Curves go into the JSON file as soon as they are known
and runs in it are not repeated. `--table` prints what the file holds, with interquartile
means over seeds and their 95% bootstrap intervals.

A medium data set is recorded from a policy at about a third of its final return:

    qscore train sac HalfCheetah-v5 --steps 30000 --out runs/medium
    qscore eval runs/medium --episodes 100 --explore --record data/halfcheetah-medium.npz
"""

import argparse
import platform
from pathlib import Path
from typing import Any

import numpy as np
from baselines import table
from curves import learning_curve, read, record

from qscore import QSM, TD3, DiffusionQL, Host, datasets
from qscore.train_host import Session

VARIANTS: dict[str, Any] = {
    "cloning": DiffusionQL(preset="offline", hidden=(256, 256), q_weight=0.0),
    "diffusion_ql": DiffusionQL(preset="offline", hidden=(256, 256)),
    "qsm": QSM(preset="offline"),
    "td3": TD3(preset="offline"),
    "gaussian cloning": TD3(preset="offline", bc_weight=1000.0),
}


def measure(
    algorithm: Any, environment: str, data: datasets.Dataset, steps: int, seed: int, every: int
) -> dict[str, float]:
    """Mean evaluation return by gradient step of one training run."""
    session = Session(
        algorithm,
        Host(environment),
        seed,
        steps=steps,
        eval_episodes=10,
        data=data.rows,
        offline_steps=steps,
    )
    return learning_curve(session, steps, every)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("environment")
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--steps", type=int, default=50_000)
    parser.add_argument("--eval-every", type=int, default=10_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()

    if args.table:
        print(table(read(args.out)))
        return
    if args.steps % args.eval_every:
        parser.error(f"--steps must be a multiple of --eval-every; {args.steps} is not")
    task = Host(args.environment).open()
    data = datasets.load(args.dataset, task)
    task.close()
    about = {
        "environment": args.environment,
        "data": {
            "sha256": data.sha256,
            "steps": len(data),
            "episodes": len(data.episodes),
            "mean_return": round(float(np.mean(data.returns)), 1),
        },
        "steps": args.steps,
        "machine": f"{platform.machine()}, one core per run",
    }
    results = record(args.out, about, {})
    for seed in args.seeds:
        for name in args.only:
            if str(seed) in results["variants"].get(name, {}):
                continue
            request = (args.environment, data, args.steps, seed, args.eval_every)
            curve = measure(VARIANTS[name], *request)
            results = record(args.out, about, {name: {str(seed): curve}})
            print(f"{name}, seed {seed}: {curve}", flush=True)
    print(f"behaviour: {about['data']['mean_return']}")
    print(table(results))


if __name__ == "__main__":
    main()
