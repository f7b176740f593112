"""CQSM from recorded data, against linear-quadratic closed forms.

    python benchmarks/offline_lq.py --out benchmarks/results/offline-lq.json

1. Evaluation. A target score's grad_a Q from episodes of another score, by the martingale loss and
   its off-policy fixed point: relative L2 error over z ~ N(0, I) at t = 0, T/4, T/2 and 3T/4
   together, and at t = 0 alone, after every regression. The first one changes the score in the
   penalty only. Least squares on the same episodes for comparison.
2. Improvement. The score's relative L2 error to the optimum after every round of policy iteration
   from one data set, by least squares: actions that diffuse, and actions drawn anew at every step.
   The problem is the one of `qscore train cqsm lq`; the first score is zero, which is inadmissible.

All seeds are printed and written. About seven minutes on two shared cores.
"""

import argparse
import os
import platform
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from qscore import CQSM, lq, offline, rollout
from qscore.closed_form import learned_by
from qscore.environments import LQ
from qscore.folder import write_json
from qscore.types import Transition

EPISODIC = """{"A": [[-0.2]], "B": [[1.0]], "noise": [{"C": [[0.2]], "D": [[0.1]], "e": [0.3]}],
 "sigma_a": 0.6, "M": [[1.0, 0.0], [0.0, 0.1]], "score_cost": 0.3, "discount_rate": 0.4,
 "terminal": {"T": 1.0, "H": [[1.0, 0.5], [0.5, 0.6]]}}"""
FINITE = LQ(id="lq", problem=EPISODIC, dt=0.005, spread=2.0)
INFINITE = LQ(id="lq", dt=0.01, duration=4.0)

BEHAVIOUR = (np.array([[-0.7, -1.6]]), np.zeros(1))
TARGET = (np.array([[-1.0, -2.0]]), np.array([0.1]))
ALGORITHM = CQSM(preset="linear_quadratic")
PATHS = (2_000, 20_000)
REGRESSIONS = 4
IMPROVEMENT_PATHS = 2_000


def linear(environment: LQ, K: np.ndarray, k: np.ndarray) -> offline.Score:
    """The score K z + k of a problem, for actions in [-1, 1]."""
    n, bound = environment.solved_problem.state_size, environment.bound
    gain, offset = jnp.asarray(K, jnp.float32), jnp.asarray(k, jnp.float32)
    return lambda obs, action: (gain @ jnp.concatenate([obs[:n], action * bound]) + offset) / bound


def episodes(environment: LQ, score: offline.Score | None, paths: int, seed: int) -> Transition:
    """Episodes whose actions follow a score, or are drawn anew at every step for None."""
    p, bound = environment.solved_problem, environment.bound
    noise = jnp.asarray(p.sigma_a / bound, jnp.float32)

    def draw(obs, key):
        return environment.spread / bound * jr.normal(key, (p.action_size,))

    def move(obs, action, key):
        if score is None:
            return draw(obs, key)
        kick = noise @ jr.normal(key, action.shape)
        return action + environment.dt * score(obs, action) + jnp.sqrt(environment.dt) * kick

    return rollout.record(environment, draw, move, paths=paths, key=jr.key(seed))


def gradient_error(environment: LQ, agent: Any, score: Any, times: list[float]) -> float:
    """Relative L2 error of the critic's grad_a Q to that of a linear score, over z ~ N(0, I)."""
    problem, (K, k) = environment.solved_problem, score
    n = problem.state_size
    gain, offset = jnp.asarray(K, jnp.float32), jnp.asarray(k, jnp.float32)
    z = np.random.default_rng(0).standard_normal((5_000, len(problem.M)))
    apart, size = 0.0, 0.0
    for time in times:

        def slope(z, time=time):
            obs, psi = z[:n], lambda a: gain @ jnp.concatenate([z[:n], a]) + offset
            q = learned_by(ALGORITHM, environment, agent, jnp.append(obs, jnp.float32(time)), psi)
            return jax.grad(lambda a: q(a)[0])(z[n:])

        exact = lq.evaluate(problem, K, k, time).gradient(z)
        found = np.asarray(jax.vmap(slope)(jnp.asarray(z, jnp.float32)))
        apart, size = apart + np.mean((found - exact) ** 2), size + np.mean(exact**2)
    return round(float(np.sqrt(apart / size)), 4)


def score_error(environment: LQ, agent: Any) -> float:
    """Relative L2 error of the agent's score to the optimal one, over z ~ N(0, I)."""
    problem = environment.solved_problem
    n = problem.state_size
    z = np.random.default_rng(0).standard_normal((5_000, len(problem.M)))
    exact = lq.solve(problem).score(z)
    found = np.asarray(
        jax.vmap(lambda z: learned_by(ALGORITHM, environment, agent, z[:n])(z[n:])[1])(
            jnp.asarray(z, jnp.float32)
        )
    )
    return round(float(np.sqrt(np.mean((found - exact) ** 2) / np.mean(exact**2))), 4)


def evaluation(paths: int, seed: int) -> dict[str, Any]:
    """Errors of the target's grad_a Q, one per regression."""
    behaviour, target = linear(FINITE, *BEHAVIOUR), linear(FINITE, *TARGET)
    data = episodes(FINITE, behaviour, paths, seed)
    spec, times = FINITE.spec, [0.0, 0.25, 0.5, 0.75]
    row: dict[str, Any] = {"error": [], "error_at_0": []}
    for regressions in range(1, REGRESSIONS + 1):
        found = offline.evaluate(
            ALGORITHM,
            spec,
            data,
            score=target,
            method="martingale_loss",
            behaviour=behaviour,
            rounds=regressions,
        )
        row["error"].append(gradient_error(FINITE, found.agent, TARGET, times))
        row["error_at_0"].append(gradient_error(FINITE, found.agent, TARGET, times[:1]))
    found = offline.evaluate(ALGORITHM, spec, data, score=target)
    return row | {"least_squares": gradient_error(FINITE, found.agent, TARGET, times)}


def improvement(data: str, seed: int) -> list[float]:
    """Relative L2 errors of the score to the optimal one, one per round."""
    score = linear(INFINITE, *TARGET) if data == "diffusion" else None
    recorded = episodes(INFINITE, score, IMPROVEMENT_PATHS, seed)
    found = offline.improve(ALGORITHM, INFINITE.spec, recorded)
    return [score_error(INFINITE, agent) for agent in found.agents]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()

    results: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "machine": f"{platform.platform()}, {os.cpu_count()} cores",
        "seeds": args.seeds,
        "evaluation": {str(paths): {} for paths in PATHS},
        "improvement": {"diffusion": {}, "jumps": {}},
    }
    for paths in PATHS:
        for seed in args.seeds:
            row = results["evaluation"][str(paths)][str(seed)] = evaluation(paths, seed)
            print(f"evaluation, {paths} paths, seed {seed}: {row}", flush=True)
    for data in results["improvement"]:
        for seed in args.seeds:
            row = results["improvement"][data][str(seed)] = improvement(data, seed)
            print(f"improvement, {data}, seed {seed}: {row}", flush=True)
    if args.out is not None:
        write_json(args.out, results)


if __name__ == "__main__":
    main()
