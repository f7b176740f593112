"""The default presets of QSM and CQSM, one part changed at a time.

    python benchmarks/ablation.py --environment HalfCheetah-v5 --steps 20000 --seeds 0 1 \\
        --out benchmarks/results/ablation-halfcheetah.json
    python benchmarks/ablation.py --algorithm cqsm --out benchmarks/results/ablation-cqsm.json

Each variant and seed is one training run; its mean evaluation return (10 episodes, no exploration)
every `--eval-every` steps goes into the JSON file as soon as it is known. Runs that are already in
the file are not repeated, so an interrupted ablation goes on where it stopped, and processes with
different `--seeds` or `--only` may share one file. `--table` prints what the file holds.
"""

import argparse
import platform
from pathlib import Path
from typing import Any

from curves import learning_curve, read, record

from qscore import CQSM, QSM, Host
from qscore.train_host import Session

# The prototype that the search began from, then the steps that led away from it.
CAUTIOUS = {"pessimism": 1.0, "exploration_noise": 0.1, "critic_activation": "relu"}
SLOW = {"actor_lr": 3e-4, "critic_lr": 3e-4}
AVERAGED = CAUTIOUS | SLOW | {"warmup_steps": 5_000}
START = AVERAGED | {"average_rate": 1.0}
FAST = CAUTIOUS | {"actor_lr": 1e-3, "critic_lr": 1e-3, "warmup_steps": 2_000}
QSM_VARIANTS: dict[str, dict[str, Any]] = {
    "start": START,
    "start, temperature 0.05": START | {"temperature": 0.05},
    "start, noise prediction": START | {"prediction": "noise"},
    "start, VP schedule": START | {"schedule": "vp"},
    "start, posterior variance": START | {"variance": "posterior"},
    "averaged actor": AVERAGED,
    "averaged actor, temperature 0.2": AVERAGED | {"temperature": 0.2},
    "averaged actor, T = 10": AVERAGED | {"noise_levels": 10},
    "steps 1e-3": FAST,
    "steps 1e-3, posterior variance": FAST | {"variance": "posterior"},
    "steps 1e-3, posterior variance, temperature 0.05": FAST
    | {"variance": "posterior", "temperature": 0.05},
    "steps 1e-3, noise in the target's chain": FAST | {"target_chain_noise": 1.0},
    "default": {},
    "ReLU critics": {"critic_activation": "relu"},
    "standardised observations": {"normalize_observations": True},
    "ReLU critics, standardised observations": {
        "critic_activation": "relu",
        "normalize_observations": True,
    },
    "pessimism 1": {"pessimism": 1.0},
    "exploration noise 0.1": {"exploration_noise": 0.1},
    "exploration noise 0.2": {"exploration_noise": 0.2},
    "steps 3e-4": SLOW,
    "warm-up 2000": {"warmup_steps": 2_000},
    "warm-up 5000": {"warmup_steps": 5_000},
    "no average": {"average_rate": 1.0},
    "noise in the target's chain": {"target_chain_noise": 1.0},
    "running gradient scale": {"normalization": "running"},
    "target posterior": {"target": "posterior"},
}
CQSM_VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "raw inputs": {"normalize_inputs": False},
    "ReLU critics": {"critic_activation": "relu"},
    "raw inputs, ReLU critics": {"normalize_inputs": False, "critic_activation": "relu"},
    "penalty 1": {"penalty": 1.0},
    "score on replayed actions only": {"uniform_share": 0.0, "score_spread": 0.0},
    "one critic": {"critics": 1},
    "no target networks": {"target_rate": None},
    "one inner step": {"inner_steps": 1},
    "half the action noise": {"action_noise": 0.9},
    "steps 3e-4": {"critic_lr": 3e-4, "score_lr": 3e-4},
    "no average": {"average_share": 0.0},
    "fixed score cost": {"cost_unit": "reward", "score_cost": 0.05},
}
ALGORITHMS: dict[str, Any] = {"qsm": (QSM, QSM_VARIANTS), "cqsm": (CQSM, CQSM_VARIANTS)}


def table(results: dict[str, Any]) -> str:
    """The last evaluation of every variant and seed, as Markdown."""
    lines = ["| variant | last return, one per seed |", "|---|---|"]
    for name, runs in results["variants"].items():
        last = [f"{list(curve.values())[-1]:.0f} (seed {seed})" for seed, curve in runs.items()]
        lines.append(f"| {name} | {', '.join(last)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--algorithm", choices=list(ALGORITHMS), default="qsm")
    parser.add_argument("--environment", default="HalfCheetah-v5")
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--eval-every", type=int, default=10_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", help="names of variants; all by default")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()

    kind, variants = ALGORITHMS[args.algorithm]
    unknown = set(args.only or []) - set(variants)
    if unknown:
        parser.error(f"no variant {sorted(unknown)[0]!r}; there are {', '.join(variants)}")
    if args.table:
        print(table(read(args.out)))
        return
    about = {
        "algorithm": args.algorithm,
        "environment": args.environment,
        "steps": args.steps,
        "machine": f"{platform.machine()}, one core per run",
    }
    results = record(args.out, about, {})
    for name in args.only or variants:
        for seed in args.seeds:
            if str(seed) in results["variants"].get(name, {}):
                continue
            session = Session(
                kind(**variants[name]),
                Host(args.environment),
                seed,
                steps=args.steps,
                eval_episodes=10,
            )
            curve = learning_curve(session, args.steps, args.eval_every)
            results = record(args.out, about, {name: {str(seed): curve}})
    print(table(results))


if __name__ == "__main__":
    main()
