"""How errors depend on the control step: CQSM, and Q-learning in discrete time.

    python benchmarks/dt_robustness.py                 # about twenty minutes on two cores
    python benchmarks/dt_robustness.py --irregular     # steps of random length instead
    python benchmarks/dt_robustness.py --quick            # in runs/

One linear-quadratic problem (one unstable state, one action), learned at several control steps for
the same physical time: a step ten times shorter gives ten times as many transitions and updates.
Every learner has the same networks, batches, replay in seconds, step sizes (Adam, with sqrt(dt),
decaying with experience) and averaging.

- `cqsm`: the `linear_quadratic` preset with network critics; `cqsm features`: with feature critics.
- `q`: a deterministic policy mu(x) against Q(x, u) (as in DDPG), discount e^{-beta dt}, with a
  target network that moves by a fixed share per update; `q, target per second` moves it by the
  same share in 0.05 s at every control step. Its white exploration noise (of standard deviation
  0.3 of the bound; 0.05 and 0.15 were worse) and that share (0.2; 0.01 and 0.05 were worse) were
  chosen for the smallest errors on seeds 0 and 1 at 0.05 s and at shorter steps.

An error is the relative L2 error of the policy, over standard normal inputs, against the learner's
own optimum: for CQSM the score of continuous time, for Q-learning the exact gain at that control
step. Beside them stand two exact curves: the root mean square of the optimum's gradient in the
action, grad_a Q in continuous time and grad_u Q_dt at each step. Each finished run is written to
the file at once and not repeated, so an interrupted benchmark goes on where it stopped.
"""

import argparse
import dataclasses
import json
import os
import platform
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array, Float

from qscore import CQSM, lq
from qscore.algorithms.cqsm import REFERENCE_DT
from qscore.closed_form import compare
from qscore.environments.lq import LQ
from qscore.folder import write_json
from qscore.networks import MLP
from qscore.normalize import Moments, observe, standardize
from qscore.optimize import gradient_step, move_target
from qscore.train_host import Session
from qscore.types import Key, Metrics, Spec, Transition

PROBLEM = """{"A": [[0.3]], "B": [[1.0]], "noise": [{"e": [0.3]}], "sigma_a": 0.6,
 "M": [[1.0, 0.0], [0.0, 0.1]], "score_cost": 0.2, "discount_rate": 0.5}"""
SECONDS = 100.0
REPLAY_SECONDS = 16.0
WARMUP_SECONDS = 0.1
COPIES = 128
STEPS = (0.05, 0.02, 0.01, 0.005)
MEAN_STEP = 0.01
"""Of irregular steps, drawn between 2/11 and 20/11 of it: a ten-fold range."""
ROOT = Path(__file__).parents[1]


class DiscreteState(eqx.Module):
    """Networks on standardised inputs, in units of half the action range."""

    critic: MLP
    target: MLP
    actor: MLP
    average_actor: MLP
    critic_opt: optax.OptState
    actor_opt: optax.OptState
    moments: Moments  # of (observation, action)
    learned: Float[Array, ""]  # seconds of experience learned from
    updates: Float[Array, ""]


@dataclass(frozen=True)
class DiscreteQ:
    """Q-learning with a deterministic policy: Q(x, u) <- r + e^{-beta dt} Q_target(x', mu(x'))."""

    like: CQSM
    """Where networks, step sizes, averaging, batches and replay are taken from."""
    target_share: float | None = 0.2
    """Weight of the new parameters in the target, per update."""
    target_rate: float | None = None
    """The same per second; one of the two is None."""
    noise: float = 0.3
    """Standard deviation of the white exploration noise, half action ranges."""

    @property
    def batch_size(self) -> int:
        return self.like.batch_size

    @property
    def warmup_steps(self) -> int:
        return self.like.warmup_steps

    @property
    def updates_per_step(self) -> float:
        return self.like.updates_per_step

    @property
    def replay_capacity(self) -> int:
        return self.like.replay_capacity

    def init(self, spec: Spec, *, key: Key) -> DiscreteState:
        critic_key, actor_key = jr.split(key)
        sizes, outputs = self.like.hidden, spec.action_size
        critic = MLP((spec.obs_size + outputs, *sizes, 1), jax.nn.silu, key=critic_key)
        actor = MLP((spec.obs_size, *sizes, outputs), jax.nn.silu, key=actor_key)
        last = actor.layers[-1]
        actor = eqx.tree_at(lambda m: m.layers[-1].weight, actor, jnp.zeros_like(last.weight))
        return DiscreteState(
            critic=critic,
            target=jax.tree.map(jnp.copy, critic),
            actor=actor,
            average_actor=jax.tree.map(jnp.copy, actor),
            critic_opt=optax.adam(1.0).init(critic),  # pyright: ignore[reportArgumentType]
            actor_opt=optax.adam(1.0).init(actor),  # pyright: ignore[reportArgumentType]
            moments=Moments.unit(spec.obs_size + outputs),
            learned=jnp.zeros(()),
            updates=jnp.zeros(()),
        )

    def init_carry(self, spec: Spec) -> tuple[()]:
        return ()

    def mu(self, actor: MLP, moments: Moments, obs: Float[Array, " obs"]) -> Float[Array, " act"]:
        """The policy, in [-1, 1]."""
        size = obs.shape[0]
        seen = Moments(moments.mean[:size], moments.variance[:size], moments.batches)
        return jnp.tanh(actor(standardize(seen, obs)))

    def act(self, state: DiscreteState, carry: tuple, obs, *, key: Key, explore: bool):
        actor = state.actor if explore else state.average_actor
        action = self.mu(actor, state.moments, obs)
        noise = self.noise * jr.normal(key, action.shape) if explore else jnp.zeros_like(action)
        return jnp.clip(action + noise, -1.0, 1.0), carry

    def update(
        self, state: DiscreteState, batch: Transition, *, key: Key
    ) -> tuple[DiscreteState, Metrics]:
        beta = lq.Problem.from_json(PROBLEM).discount_rate
        like, seconds = self.like, jnp.mean(batch.dt)
        learned, updates = state.learned + seconds, state.updates + 1.0
        pace = jnp.sqrt(seconds / REFERENCE_DT)
        if like.decay_seconds is not None:
            pace = pace / (1.0 + learned / like.decay_seconds)
        moments = observe(state.moments, jnp.concatenate([batch.obs, batch.action], axis=1))

        def q(critic: MLP, obs, action):
            return critic(standardize(moments, jnp.concatenate([obs, action])))[0]

        def ahead(obs):
            return q(state.target, obs, self.mu(state.actor, moments, obs))

        alive = 1.0 - batch.terminated.astype(jnp.float32)
        aim = batch.reward + alive * jnp.exp(-beta * batch.dt) * jax.vmap(ahead)(batch.next_obs)

        def critic_loss(critic: MLP):
            error = jax.vmap(lambda obs, action: q(critic, obs, action))(batch.obs, batch.action)
            loss = jnp.mean((error - aim) ** 2)
            return loss, {"critic_loss": loss}

        critic, critic_opt, metrics = gradient_step(
            critic_loss, state.critic, optax.adam(like.critic_lr * pace), state.critic_opt
        )
        share = self.target_share
        if self.target_rate is not None:
            share = -jnp.expm1(-self.target_rate * seconds)
        target = move_target(critic, state.target, share)  # pyright: ignore[reportArgumentType]

        def actor_loss(actor: MLP):
            value = jax.vmap(lambda obs: q(critic, obs, self.mu(actor, moments, obs)))(batch.obs)
            loss = -jnp.mean(value)
            return loss, {"actor_loss": loss}

        actor, actor_opt, actor_metrics = gradient_step(
            actor_loss, state.actor, optax.adam(like.score_lr * pace), state.actor_opt
        )
        weight = 1.0 / jnp.maximum(like.average_share * updates, 1.0)
        average = jax.tree.map(
            lambda old, new: old + weight * (new - old), state.average_actor, actor
        )
        return DiscreteState(
            critic=critic,
            target=target,
            actor=actor,
            average_actor=average,
            critic_opt=critic_opt,
            actor_opt=actor_opt,
            moments=moments,
            learned=learned,
            updates=updates,
        ), metrics | actor_metrics


def discrete_optimum(problem: lq.Problem, dt: float) -> tuple[np.ndarray, np.ndarray]:
    """(P, gain): Q_dt = -1/2 z'Pz + constant, and u = gain x, for actions held over steps dt.

    One Euler-Maruyama step of the state per control step, the reward by the trapezoidal rule, the
    discount e^{-beta dt}, no cost of a score: what the environment is. Additive noise only.
    """
    n, z = problem.state_size, len(problem.M)
    step = np.eye(z) + dt * problem.F
    reward = 0.5 * dt * (problem.M + step.T @ problem.M @ step)
    discount = np.exp(-problem.discount_rate * dt)
    P = reward
    while True:
        value = P[:n, :n] - P[:n, n:] @ np.linalg.solve(P[n:, n:], P[n:, :n])
        following = reward + discount * step[:n].T @ value @ step[:n]
        if np.abs(following - P).max() <= 1e-14 * np.abs(P).max():
            return following, -np.linalg.solve(following[n:, n:], following[n:, :n])
        P = following


def gradient_rms(P: np.ndarray, n: int) -> float:
    """sqrt(E|grad_a Q|^2 / d) over z ~ N(0, I), for Q = -1/2 z'Pz + constant."""
    return float(np.sqrt(np.sum(P[n:] ** 2) / (len(P) - n)))


def cqsm(dt: float, **fields: Any) -> CQSM:
    """The `linear_quadratic` preset, with its replay and warm-up in seconds."""
    return CQSM(
        preset="linear_quadratic",
        replay_capacity=round(REPLAY_SECONDS * COPIES / dt),
        warmup_steps=max(1, round(WARMUP_SECONDS * COPIES / dt)),
        **fields,
    )


def discrete(dt: float, **fields: Any) -> DiscreteQ:
    """Q-learning with what CQSM with networks has."""
    return DiscreteQ(cqsm(dt, critic="network"), **fields)


LEARNERS: dict[str, Any] = {
    "cqsm": lambda dt: cqsm(dt, critic="network"),
    "cqsm features": lambda dt: cqsm(dt, critic="features"),
    "q": discrete,
    "q, target per second": lambda dt: discrete(dt, target_share=None, target_rate=4.5),
}


def policy_error(algorithm: Any, environment: LQ, agent: Any) -> float:
    """The relative L2 error of the policy against the learner's own optimum."""
    if isinstance(algorithm, CQSM):
        return compare(algorithm, environment, agent).relative_error["score"]
    problem = environment.solved_problem
    x = np.random.default_rng(0).standard_normal((20_000, problem.state_size)).astype(np.float32)
    exact = x @ discrete_optimum(problem, environment.dt)[1].T
    learned = jax.vmap(lambda obs: algorithm.mu(agent.average_actor, agent.moments, obs))(x)
    error = np.asarray(learned) * environment.bound - exact
    return float(np.sqrt(np.mean(error**2) / np.mean(exact**2)))


@cache
def learner(name: str, dt: float, irregular: bool) -> tuple[Any, LQ]:
    """The same two objects for every seed, so that programs are compiled once."""
    times: dict[str, Any] = (
        {"dt_min": dt * 2 / 11, "dt_max": dt * 20 / 11} if irregular else {"dt": dt}
    )
    # one Euler step per control step, as in `discrete_optimum`
    environment = LQ(id="lq", problem=PROBLEM, num_envs=COPIES, substeps=1, **times)
    return LEARNERS[name](dt), environment


def measure(name: str, dt: float, seed: int, seconds: float, *, irregular: bool) -> dict[str, Any]:
    """One run: its policy's error, and its wall time with compiling."""
    algorithm, environment = learner(name, dt, irregular)
    steps = round(seconds / dt) * COPIES
    started = time.perf_counter()
    session = Session(algorithm, environment, seed, steps=steps, eval_episodes=0)
    while session.env_steps < steps:
        session.advance(steps)
    error = policy_error(algorithm, environment, session.runner.agent)
    session.close()
    wall = time.perf_counter() - started
    return {"error": round(error, 5), "env_steps": steps, "wall_seconds": round(wall, 1)}


def summarize(runs: dict[str, dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Mean and largest error by column, and mean(last column) / mean(first)."""
    means = {
        column: round(float(np.mean([run["error"] for run in seeds.values()])), 5)
        for column, seeds in runs.items()
    }
    worst = max(run["error"] for seeds in runs.values() for run in seeds.values())
    first, *_, last = means.values()
    return {"mean": means, "largest": worst, "ratio": round(last / first, 3)}


def table(results: dict[str, Any]) -> str:
    """Every error, as Markdown: seeds in a cell, separated by spaces."""
    columns = list(next(iter(results["errors"].values())))
    lines = [f"| learner | {' | '.join(columns)} | ratio of means, last to first |"]
    lines.append("|---|" + "---|" * (len(columns) + 1))
    for name, runs in results["errors"].items():
        cells = [
            " ".join(f"{100 * run['error']:.1f}" for run in seeds.values())
            for seeds in runs.values()
        ]
        ratio = results["summary"][name]["ratio"]
        lines.append(f"| {name} | {' | '.join(cells)} | {ratio:.2f} |")
    for name, values in results.get("gradient_rms", {}).items():
        cells = [f"{value:.4f}" for value in values.values()]
        lines.append(f"| rms of {name} | {' | '.join(cells)} | |")
    return "\n".join(lines)


def plot(results: dict[str, Any], out: Path) -> None:
    """Errors of every seed and their means, and the two exact curves, against the control step."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    figure = Figure(figsize=(10, 4.0), layout="constrained", dpi=150)
    left, right = figure.subplots(1, 2)
    for index, (name, runs) in enumerate(results["errors"].items()):
        steps = [float(column) for column in runs]
        for seed in next(iter(runs.values())):
            errors = [100 * seeds[seed]["error"] for seeds in runs.values()]
            left.plot(steps, errors, ".", color=f"C{index}", alpha=0.4)
        means = [100 * value for value in results["summary"][name]["mean"].values()]
        left.plot(steps, means, color=f"C{index}", label=name)
    left.set(ylabel="error of the policy, %", yscale="log", title="learned: dots are seeds")
    for name, values in results["gradient_rms"].items():
        right.plot([float(column) for column in values], list(values.values()), ".-", label=name)
    right.set(yscale="log", ylabel="root mean square", title="exact: gradient in the action")
    for axes in (left, right):
        steps = [float(column) for column in next(iter(results["gradient_rms"].values()))]
        axes.set(xlabel="control step, s", xscale="log")
        axes.set_xticks(steps, [f"{step:g}" for step in steps])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)


def columns(names: list[str], dts: list[float], irregular: bool) -> dict[str, list[Any]]:
    """(learner, control step, irregular) by learner and column of the table."""
    if irregular:
        pair = {"regular": (MEAN_STEP, False), "irregular": (MEAN_STEP, True)}
    else:
        pair = {f"{dt:g}": (dt, False) for dt in dts}
    return {name: [(column, *what) for column, what in pair.items()] for name in names}


def benchmark(
    names: list[str],
    dts: list[float],
    seeds: list[int],
    seconds: float,
    out: Path,
    *,
    irregular: bool = False,
) -> dict[str, Any]:
    """Measure what the file at `out` does not hold yet; returns all that it then holds.

    Raises `ValueError` where the file was made with other settings.
    """
    problem = lq.Problem.from_json(PROBLEM)
    settings = {
        "problem": json.loads(PROBLEM),
        "seconds_per_copy": seconds,
        "copies": COPIES,
        "irregular": irregular,
        "cqsm": json.loads(json.dumps(dataclasses.asdict(cqsm(MEAN_STEP, critic="network")))),
    }
    results: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {jax.default_backend()}",
        "settings": settings,
        "errors": {},
    }
    if out.exists():
        results = json.loads(out.read_text())
        if results["settings"] != settings:
            raise ValueError(f"{out} was made with other settings; choose another --out.")
    for name, wanted in columns(names, dts, irregular).items():
        for column, dt, random in wanted:
            for seed in seeds:
                runs = results["errors"].setdefault(name, {}).setdefault(column, {})
                if str(seed) not in runs:
                    runs[str(seed)] = measure(name, dt, seed, seconds, irregular=random)
                    print(name, column, f"seed {seed}", runs[str(seed)], flush=True)
                    write_json(out, results)
    if not irregular:
        n, exact = problem.state_size, lq.solve(problem).P
        results["gradient_rms"] = {
            "grad_a Q": {f"{dt:g}": gradient_rms(exact, n) for dt in dts},
            "grad_u Q_dt": {
                f"{dt:g}": gradient_rms(discrete_optimum(problem, dt)[0], n) for dt in dts
            },
        }
    results["summary"] = {name: summarize(runs) for name, runs in results["errors"].items()}
    write_json(out, results)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--irregular", action="store_true")
    parser.add_argument("--quick", action="store_true", help="one seed, two steps, less experience")
    parser.add_argument("--only", nargs="+", choices=list(LEARNERS))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--figure", type=Path, help="where to draw; not for --irregular")
    args = parser.parse_args()
    names = ["cqsm", "cqsm features"] if args.irregular else list(LEARNERS)
    name = "irregular-dt" if args.irregular else "dt-robustness"
    usual = f"runs/{name}-quick.json" if args.quick else f"benchmarks/results/{name}.json"
    out = args.out or ROOT / usual
    out.parent.mkdir(parents=True, exist_ok=True)
    results = benchmark(
        args.only or (["cqsm", "q"] if args.quick else names),
        [STEPS[0], STEPS[2]] if args.quick else list(STEPS),
        list(range(args.seeds or (1 if args.quick else 3 if args.irregular else 5))),
        40.0 if args.quick else SECONDS,
        out,
        irregular=args.irregular,
    )
    print(table(results))
    if args.figure:
        plot(results, args.figure)


if __name__ == "__main__":
    main()
