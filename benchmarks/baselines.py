"""SAC and TD3 of three libraries, with the same hyperparameters on the same tasks.

    uv run --with sbx-rl==0.28.0 python benchmarks/baselines.py \\
        --out benchmarks/results/baselines.json
    uv run --with sbx-rl==0.28.0 python benchmarks/baselines.py --speed \\
        --out benchmarks/results/baselines-speed.json

Libraries: qscore, SBX (Stable-Baselines3's JAX version) and, where asked for, Stable-Baselines3
itself (sb3). Networks (256, 256), batches of 256, step sizes 3e-4, target rate 0.005, discount
0.99, 3,000 random steps, then one update per step; TD3 with a policy delay of 2, exploration noise
0.1, target noise 0.2 clipped at 0.5; SAC with a tuned temperature. Every `--eval-every` steps the
policy is run without noise for 10 episodes, from the same starts for all. No library's loop touches
another's.

Each run's curve goes into the JSON file as soon as it is known, and runs that are in it are not
repeated: an interrupted benchmark goes on where it stopped, and processes with different `--seeds`
may share one file. `--table` prints interquartile means of the last evaluation and their 95%
bootstrap intervals over seeds. `--speed` measures milliseconds per update of each library in turn,
in rounds, in one process; pin it to the cores it should use.
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

import gymnasium as gym
import numpy as np
from curves import learning_curve, read, record

from qscore import SAC, TD3, Host
from qscore.folder import write_json
from qscore.statistics import summarize
from qscore.train_host import CHUNK, Session, episode_seed

EPISODES = 10
WARMUP = 3_000
ALGORITHMS = {"sac": SAC, "td3": TD3}
TASKS = ("HalfCheetah-v5", "Hopper-v5")


def ours(algorithm: str, task: str, steps: int, seed: int, every: int) -> dict[str, float]:
    """Mean evaluation return by environment step of one training run of this library."""
    kind = ALGORITHMS[algorithm]
    session = Session(
        kind(warmup_steps=WARMUP), Host(task), seed, steps=steps, eval_episodes=EPISODES
    )
    return learning_curve(session, steps, every)


def make_theirs(library: str, algorithm: str, task: str, seed: int) -> Any:
    """A model of SBX or Stable-Baselines3 with this benchmark's hyperparameters."""
    if library == "sbx":
        import sbx as package  # pyright: ignore[reportMissingImports]
    else:
        import stable_baselines3 as package  # pyright: ignore[reportMissingImports]
    from stable_baselines3.common.noise import (  # pyright: ignore[reportMissingImports]
        NormalActionNoise,
    )

    kwargs: dict[str, Any] = {}
    if algorithm == "td3":
        space: Any = gym.make(task).action_space
        size = space.shape
        kwargs["action_noise"] = NormalActionNoise(np.zeros(size), 0.1 * np.ones(size))
        kwargs["policy_delay"] = 2
    return getattr(package, algorithm.upper())(
        "MlpPolicy",
        task,
        learning_rate=3e-4,
        learning_starts=WARMUP,
        batch_size=256,
        train_freq=1,
        gradient_steps=1,
        policy_kwargs={"net_arch": [256, 256]},
        seed=seed,
        **kwargs,
    )


def theirs(
    library: str, algorithm: str, task: str, steps: int, seed: int, every: int
) -> dict[str, float]:
    """Mean evaluation return by environment step of one training run of another library."""
    model, env, curve = make_theirs(library, algorithm, task, seed), gym.make(task), {}
    for done in range(every, steps + 1, every):
        model.learn(every, reset_num_timesteps=False)
        returns = [_episode(model, env, episode_seed(1, 0, i)) for i in range(EPISODES)]
        curve[str(done)] = round(float(np.mean(returns)), 1)
    return curve


def _episode(model: Any, env: gym.Env, seed: int) -> float:
    obs, _ = env.reset(seed=seed)
    total, over = 0.0, False
    while not over:
        obs, reward, terminated, truncated, _ = env.step(model.predict(obs, deterministic=True)[0])
        total, over = total + float(reward), terminated or truncated
    return total


def table(results: dict[str, Any]) -> str:
    """The last evaluation of every library, algorithm and task, as Markdown."""
    lines = [
        "| algorithm, task, library | interquartile mean | 95% interval | one per seed |",
        "|---|---|---|---|",
    ]
    for name in sorted(results["variants"]):
        runs = results["variants"][name]
        last = [list(runs[seed].values())[-1] for seed in sorted(runs, key=int)]
        about: Any = summarize([[value] for value in last])
        low, high = about["ci95"]
        seeds = ", ".join(f"{value:.0f}" for value in last)
        lines.append(f"| {name} | {about['iqm']:.0f} | {low:.0f} to {high:.0f} | {seeds} |")
    return "\n".join(lines)


def our_updates(algorithm: str, task: str) -> Callable[[int], None]:
    """Takes so many updates of this library, a multiple of `CHUNK`, at a full batch."""
    kind = ALGORITHMS[algorithm]
    session = Session(
        kind(warmup_steps=WARMUP), Host(task), 0, steps=WARMUP + CHUNK, eval_episodes=1
    )
    while session.env_steps < WARMUP + CHUNK:
        session.advance(WARMUP + CHUNK)
    rows = session.collector.empty_block()

    def take(updates: int) -> None:
        session.runner, metrics, _ = session._chunk(
            session.runner, rows, np.int32(0), np.int32(updates), session._update_key
        )
        float(metrics["critic_loss"])  # waits

    return take


def their_updates(algorithm: str, task: str, per_call: int) -> Callable[[int], None]:
    """Takes so many updates of SBX, `per_call` in each of its calls."""
    model = make_theirs("sbx", algorithm, task, 0)
    model.learn(WARMUP + CHUNK)

    def take(updates: int) -> None:
        for _ in range(updates // per_call):
            model.train(per_call, 256)

    return take


def speed(task: str, rounds: int, updates: int) -> dict[str, Any]:
    """Median milliseconds per update, and the median over rounds of the ratio theirs / ours."""
    results: dict[str, Any] = {}
    for algorithm in ALGORITHMS:
        contestants = {
            "qscore": our_updates(algorithm, task),
            "sbx, 1 update per call": their_updates(algorithm, task, 1),
            f"sbx, {updates} updates per call": their_updates(algorithm, task, updates),
        }
        seconds: dict[str, list[float]] = {name: [] for name in contestants}
        for _ in range(rounds + 1):
            for name, take in contestants.items():
                start = time.perf_counter()
                take(updates)
                seconds[name].append(time.perf_counter() - start)
        warm = {name: values[1:] for name, values in seconds.items()}  # the first one compiles
        results[algorithm] = {
            name: {
                "milliseconds_per_update": round(1e3 * statistics.median(values) / updates, 3),
                "ratio_to_qscore": round(
                    statistics.median(a / b for a, b in zip(values, warm["qscore"], strict=True)),
                    3,
                ),
            }
            for name, values in warm.items()
        }
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--algorithms", nargs="+", choices=list(ALGORITHMS), default=["sac", "td3"])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument(
        "--libraries", nargs="+", choices=["qscore", "sbx", "sb3"], default=["qscore", "sbx"]
    )
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--eval-every", type=int, default=10_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--updates", type=int, default=100)
    args = parser.parse_args()

    machine = f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores"
    if args.table:
        print(table(read(args.out)))
        return
    if args.steps % args.eval_every:
        parser.error(f"--steps must be a multiple of --eval-every; {args.steps} is not")
    if args.speed:
        results = speed(args.tasks[0], args.rounds, args.updates)
        results = {"machine": machine, "task": args.tasks[0], **results}
        write_json(args.out, results)
        print(json.dumps(results, indent=2))
        return
    about = {"steps": args.steps, "machine": f"{platform.machine()}, one core per run"}
    results = record(args.out, about, {})
    for seed in args.seeds:
        for task in args.tasks:
            for algorithm in args.algorithms:
                for library in args.libraries:
                    name = f"{algorithm}, {task}, {library}"
                    if str(seed) in results["variants"].get(name, {}):
                        continue
                    request = (algorithm, task, args.steps, seed, args.eval_every)
                    curve = ours(*request) if library == "qscore" else theirs(library, *request)
                    results = record(args.out, about, {name: {str(seed): curve}})
                    print(f"{name}, seed {seed}: {curve}", flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
