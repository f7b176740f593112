"""Which policies keep two equally good actions, and which settle for one or for their mean.

    python experiments/multi_modality.py             # about three hours of two cores
    python experiments/multi_modality.py --quick

QSM (by default and as released), Diffusion-QL, SAC and TD3 on three tasks that are symmetric at one
observation, so that the best policy has two modes there and their mean is the worst choice: a
bandit with two equal arms, the `double_well` at its ridge, and `cartpole-swingup` hanging still.
From there, actions are drawn from the trained policy, as it is evaluated and as it explores. The
*coverage* of the two modes is

    2 min(P(a < -0.1), P(a > 0.1))

in half action ranges: 1 for two equally frequent modes, 0 for one. A policy without randomness
covers at most one; whether its seeds differ says nothing of the policy.
"""

import argparse
from typing import Any

import gymnasium as gym
import jax.random as jr
import numpy as np
from common import Job, arguments, finished, missing, places, save, train
from matplotlib.figure import Figure

import qscore as qs
from qscore.environments import DoubleWell

BANDIT = "TwoArms-v0"
ARM = 0.6
MARGIN = 0.1
VARIANTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "qsm": (qs.QSM, {}),
    "qsm, official": (qs.QSM, {"preset": "official"}),
    "diffusion_ql": (qs.DiffusionQL, {}),
    "sac": (qs.SAC, {}),
    "td3": (qs.TD3, {}),
}
"""Algorithms with what is set beside their defaults."""
QUICK = ("qsm", "td3")
SYMMETRIC = {
    "bandit": [0.0],
    "double_well": [0.0],  # on the ridge
    "cartpole-swingup": [0.0, -1.0, 0.0, 0.0, 0.0],  # hanging still
}
"""The observation of each task that is its own mirror image."""


class TwoArms(gym.Env):
    """One action a in [-1, 1], one reward, 1 - ((a / 0.6)^2 - 1)^2: 1 at either arm, 0 between."""

    observation_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)
    action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        reward = 1.0 - ((float(action[0]) / ARM) ** 2 - 1.0) ** 2
        return np.zeros(1, np.float32), reward, True, False, {}


def jobs(quick: bool) -> list[Job]:
    """Every run, the short ones first."""
    tasks: dict[str, tuple[Any, int, int]] = {
        # task: (environment, steps, random steps before learning)
        "bandit": (qs.Host(BANDIT), 4_000, 500),
        "double_well": (DoubleWell("double_well"), 20_000, 1_000),
        "cartpole-swingup": (qs.Host("dm_control/cartpole-swingup-v0"), 60_000, 3_000),
    }
    small: dict[str, Any] = {"hidden": (32, 32), "batch_size": 64} if quick else {}
    found = []
    for task, (environment, steps, warmup) in tasks.items():
        if quick:
            if task != "bandit":
                continue
            steps, warmup = 600, 300
        for name in QUICK if quick else VARIANTS:
            kind, fields = VARIANTS[name]
            for seed in range(1 if quick else 3):
                algorithm = kind(warmup_steps=warmup, **fields, **small)
                job = Job(f"{task}/{name}", algorithm, environment, steps, seed, steps // 10)
                found.append(job)
    return found


def coverage(actions: np.ndarray) -> float:
    """Of two modes, the rarer one's share of actions, doubled."""
    return 2.0 * float(min(np.mean(actions < -MARGIN), np.mean(actions > MARGIN)))


def draw(folder: Any, seed: int, obs: list[float], count: int, *, explore: bool) -> np.ndarray:
    """`count` actions of a trained policy at one observation, in half action ranges."""
    policy = qs.load(folder, seed=seed, explore=explore)
    carry = policy.init_carry()
    keys = jr.split(jr.key(0), count)
    actions = [policy(np.asarray(obs, np.float32), carry, key=key)[0][0] for key in keys]
    return np.asarray(actions)


def picture(actions: dict[str, dict[str, list[tuple[np.ndarray, np.ndarray]]]]) -> Figure:
    """One row per task, one column per algorithm, one colour per seed: the density of actions."""
    figure = Figure(figsize=(12, 2.1 * len(actions) + 0.4), layout="constrained")
    columns = max(map(len, actions.values()))
    grid = figure.subplots(len(actions), columns, squeeze=False, sharex=True)
    bins = np.linspace(-1.0, 1.0, 41)
    for row, (task, by_algorithm) in zip(grid, actions.items(), strict=True):
        for axes, (name, seeds) in zip(row, by_algorithm.items(), strict=True):
            for index, (evaluated, exploring) in enumerate(seeds):
                shares = np.histogram(exploring, bins)[0] / len(exploring)
                axes.stairs(shares, bins, color=f"C{index}", alpha=0.35, fill=True)
                axes.stairs(shares, bins, color=f"C{index}", linewidth=1.0)
                spread = np.quantile(evaluated, [0.05, 0.95])
                axes.plot(
                    spread,
                    [-0.04 * (index + 1)] * 2,
                    color=f"C{index}",
                    linewidth=2.5,
                    marker="|",
                    transform=axes.get_xaxis_transform(),
                    clip_on=False,
                )
            axes.tick_params(axis="x", pad=9)
            axes.set_xlim(-1.05, 1.05)
            axes.set_ylim(bottom=0)
            axes.spines[["top", "right"]].set_visible(False)
            if axes in grid[0]:
                axes.set_title(name)
        row[0].set_ylabel(f"{task}\nshare of actions", fontsize=8)
    for axes in grid[-1]:
        axes.set_xlabel("action")
    figure.suptitle(
        "actions at the symmetric observation, one colour per seed: while exploring (areas) and as "
        "evaluated (bars below: 5% to 95%)",
        fontsize=10,
    )
    return figure


def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__, "multi_modality").parse_args(argv)
    if BANDIT not in gym.registry:
        gym.register(BANDIT, entry_point=TwoArms)  # pyright: ignore[reportArgumentType]
    runs, _ = places(args)
    todo = jobs(args.quick)
    if not train(todo, runs):
        print("other processes are still at some of the runs; they will write the results")
        return
    results, actions = summary(args, todo)
    print(table(results))
    kept = {"margin": MARGIN, "missing": missing(todo, runs), "tasks": results}
    save(args, kept, picture(actions))


def summary(args: argparse.Namespace, todo: list[Job]) -> tuple[dict, dict]:
    """Per task and algorithm: coverage and last return of every seed; and the actions drawn."""
    runs, _ = places(args)
    results: dict[str, dict[str, Any]] = {}
    actions: dict[str, dict[str, list[tuple[np.ndarray, np.ndarray]]]] = {}
    for job in todo:
        if not finished(job, runs):
            continue
        task, name = job.name.split("/")
        folder = job.folder(runs)
        row = results.setdefault(task, {}).setdefault(
            name, {"steps": job.steps, "coverage": {}, "coverage_exploring": {}, "return": {}}
        )
        evaluated, exploring = (
            draw(folder, job.seed, SYMMETRIC[task], 100 if args.quick else 2000, explore=explore)
            for explore in (False, True)
        )
        row["coverage"][str(job.seed)] = round(coverage(evaluated), 3)
        row["coverage_exploring"][str(job.seed)] = round(coverage(exploring), 3)
        row["return"][str(job.seed)] = round(qs.Run.open(folder).summary["final_returns"][0], 2)
        actions.setdefault(task, {}).setdefault(name, []).append((evaluated, exploring))
    return results, actions


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "| task | algorithm | coverage | while exploring | last return |",
        "|---|---|---|---|---|",
    ]
    for task, rows in results.items():
        for name, row in rows.items():
            cells = [
                ", ".join(str(value) for value in row[key].values())
                for key in ("coverage", "coverage_exploring", "return")
            ]
            lines.append(f"| `{task}` | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
