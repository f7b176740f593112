"""How much of a task's states each algorithm visits, where the reward leads the wrong way.

    python experiments/exploration.py             # about an hour of one core
    python experiments/exploration.py --quick

A point moves in a square. Near its start lies a small hill of reward, and far away, past a ditch of
negative reward, a hill four times as high: following the reward leads to the small one. Every
algorithm has its own defaults, and nothing that rewards novelty; QSM also has the preset of the
released code, and the regression target that is the exact score of its own distribution. Two
figures over training: the *coverage*, the share of the square's 20 x 20 cells that training has
visited, and the share of evaluation episodes that end on the high hill.

Runs that are in the file already are not repeated.
"""

import functools
from typing import Any

import gymnasium as gym
import numpy as np
from common import arguments, learn_missing, save
from matplotlib.figure import Figure

import qscore as qs
from qscore.train_host import Session

NAME = "Deceptive-v0"
CELLS = 20
START = np.array([-0.4, -0.4])
NEAR, FAR = np.array([-0.7, -0.7]), np.array([0.6, 0.6])
STEPS = 50
HIGH = 2.0
"""Reward per step beyond which a point stands on the high hill."""
ALGORITHMS: dict[str, tuple[Any, dict[str, Any]]] = {
    "qsm": (qs.QSM, {}),
    "qsm, official": (qs.QSM, {"preset": "official"}),
    "qsm, posterior": (qs.QSM, {"target": "posterior"}),
    "diffusion_ql": (qs.DiffusionQL, {}),
    "sac": (qs.SAC, {}),
    "td3": (qs.TD3, {}),
}
QUICK = ("qsm", "diffusion_ql")


def reward(point: np.ndarray) -> float:
    """Hills of 1 at NEAR and 4 at FAR, of width 0.25; a ditch of -0.5 along x + y = 0."""

    def hill(center: np.ndarray, width: float) -> float:
        return float(np.exp(-0.5 * np.sum((point - center) ** 2) / width**2))

    ditch = np.exp(-0.5 * (point.sum() / np.sqrt(2.0) / 0.15) ** 2)
    return hill(NEAR, 0.25) + 4.0 * hill(FAR, 0.25) - 0.5 * float(ditch)


class Deceptive(gym.Env):
    """A point in [-1, 1]^2 that moves by at most 0.1 per step in either direction."""

    observation_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
    action_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.point = START + self.np_random.uniform(-0.05, 0.05, 2)
        return self.point.astype(np.float32), {}

    def step(self, action):
        self.point = np.clip(self.point + 0.1 * np.clip(action, -1.0, 1.0), -1.0, 1.0)
        return self.point.astype(np.float32), reward(self.point), False, False, {}


def cells(points: np.ndarray) -> float:
    """The share of the square's cells in which there is one of `points[n, 2]`."""
    index = np.clip(((points + 1.0) / 2.0 * CELLS).astype(int), 0, CELLS - 1)
    return len(np.unique(index, axis=0)) / CELLS**2


def learn(algorithm: Any, seed: int, steps: int, every: int) -> dict[str, Any]:
    """Coverage, and return and success of the evaluated policy, after every `every` steps."""
    environment = qs.Host(NAME, max_episode_steps=STEPS)
    session = Session(algorithm, environment, seed, steps=steps, eval_episodes=10)
    curve: dict[str, dict[str, float]] = {}
    while session.env_steps < steps:
        session.advance(min(steps, (session.env_steps // every + 1) * every))
        if session.env_steps % every == 0:
            visited = np.asarray(session.runner.replay.data.obs)[: session.env_steps]
            returns, _ = session.evaluate(0)
            curve[str(session.env_steps)] = {
                "coverage": round(cells(visited), 4),
                "return": round(float(np.mean(returns)), 2),
                "success": float(np.mean([value > 0.5 * STEPS * HIGH for value in returns])),
            }
    session.close()
    return curve


def picture(results: dict[str, Any]) -> Figure:
    """The task, and every seed's coverage and success over training."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    task, left, right = figure.subplots(1, 3)
    grid = np.linspace(-1, 1, 101)
    field = np.array([[reward(np.array([x, y])) for x in grid] for y in grid])
    image = task.pcolormesh(grid, grid, field, cmap="viridis", shading="nearest")
    figure.colorbar(image, ax=task, label="reward per step")
    task.plot(*START, "w+", markersize=10)
    task.set(title="the task; + is the start", aspect="equal")
    for axes, key in ((left, "coverage"), (right, "return")):
        for index, (name, seeds) in enumerate(results.items()):
            curves = [[row[key] for row in curve.values()] for curve in seeds.values()]
            x = [int(step) for step in next(iter(seeds.values()))]
            for curve in curves:
                axes.plot(x, curve, color=f"C{index}", alpha=0.35, linewidth=0.9)
            axes.plot(x, np.mean(curves, axis=0), color=f"C{index}", linewidth=2, label=name)
        axes.set(xlabel="environment steps", title=key)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    right.legend(frameon=False)
    return figure


def table(results: dict[str, Any]) -> str:
    """The last figures of every seed, as Markdown."""
    lines = ["| algorithm | coverage | return | success |", "|---|---|---|---|"]
    for name, seeds in results.items():
        last = [list(curve.values())[-1] for curve in seeds.values()]
        cells = [", ".join(f"{row[key]:g}" for row in last) for key in last[0]]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__, "exploration").parse_args(argv)
    if NAME not in gym.registry:
        gym.register(NAME, entry_point=Deceptive)  # pyright: ignore[reportArgumentType]
    steps, every, seeds = (1_500, 500, 1) if args.quick else (20_000, 1_000, 5)
    fields: dict[str, Any] = {"warmup_steps": 1_000}
    if args.quick:
        fields = {"warmup_steps": 500, "hidden": (32, 32), "batch_size": 64}
    wanted = {}
    for name in QUICK if args.quick else ALGORITHMS:
        kind, own = ALGORITHMS[name]
        algorithm = kind(**own, **fields)
        for seed in range(seeds):
            wanted[name, str(seed)] = functools.partial(learn, algorithm, seed, steps, every)
    found = learn_missing(args, wanted, steps=steps)
    print(table(found["algorithms"]))
    save(args, found, picture(found["algorithms"]))


if __name__ == "__main__":
    main()
