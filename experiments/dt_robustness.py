"""How errors depend on the control step: CQSM, and Q-learning in discrete time.

    python experiments/dt_robustness.py             # about ten minutes of one core
    python experiments/dt_robustness.py --quick

One linear-quadratic problem (one unstable state, one action), learned at several control steps for
the same physical time: a step ten times shorter gives ten times as many transitions and updates.
CQSM also learns it with steps of random length. Every learner has the same networks, batches,
replay in seconds, step sizes (Adam, with sqrt(dt), decaying with experience) and averaging.

- `cqsm`: the `linear_quadratic` preset with network critics; `cqsm features`: with feature critics.
- `q`: a deterministic policy mu(x) against Q(x, u) (as in DDPG), discount e^{-beta dt}, with a
  target network that moves by a fixed share per update. Its white exploration noise (of standard
  deviation 0.3 of the bound; 0.05 and 0.15 were worse) and that share (0.2; 0.01 and 0.05 were
  worse) were chosen for the smallest errors on seeds 0 and 1 at 0.05 s and at shorter steps.

An error is the relative L2 error of the policy, over standard normal inputs, against the learner's
own optimum: for CQSM the score of continuous time, for Q-learning the exact gain at that control
step. Beside them stand two exact curves: the root mean square of the optimum's gradient in the
action, grad_a Q in continuous time and grad_u Q_dt at each step.

Runs that are in the file already are not repeated.
"""

import dataclasses
import functools
import json
from dataclasses import dataclass
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from common import arguments, learn_missing, save
from jaxtyping import Array, Float
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from qscore import CQSM, lq
from qscore.algorithms.cqsm import REFERENCE_DT
from qscore.closed_form import compare
from qscore.environments.lq import LQ
from qscore.networks import MLP
from qscore.normalize import Moments, observe, standardize
from qscore.optimize import gradient_step, move_target
from qscore.train_host import Session
from qscore.types import Key, Metrics, Spec, Transition

PROBLEM = """{"A": [[0.3]], "B": [[1.0]], "noise": [{"e": [0.3]}], "sigma_a": 0.6,
 "M": [[1.0, 0.0], [0.0, 0.1]], "score_cost": 0.2, "discount_rate": 0.5}"""
REPLAY_SECONDS = 16.0
WARMUP_SECONDS = 0.1
COPIES = 128
STEPS = (0.05, 0.02, 0.01, 0.005)
MEAN_STEP = 0.01
IRREGULAR = f"irregular, {MEAN_STEP:g}"
"""Steps drawn uniformly between 2/11 and 20/11 of the mean: a ten-fold range."""


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
    target_share: float = 0.2
    """Weight of the new parameters in the target, per update."""
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
        target = move_target(critic, state.target, self.target_share)

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


def cqsm(dt: float, critic: Literal["network", "features"], **fields: Any) -> CQSM:
    """The `linear_quadratic` preset, with its replay and warm-up in seconds."""
    return CQSM(
        preset="linear_quadratic",
        critic=critic,
        replay_capacity=round(REPLAY_SECONDS * COPIES / dt),
        warmup_steps=max(1, round(WARMUP_SECONDS * COPIES / dt)),
        **fields,
    )


LEARNERS: dict[str, Any] = {
    "cqsm": lambda dt, **fields: cqsm(dt, "network", **fields),
    "cqsm features": lambda dt, **fields: cqsm(dt, "features", **fields),
    "q": lambda dt, **fields: DiscreteQ(cqsm(dt, "network", **fields)),
}


def measured_at(quick: bool) -> dict[str, list[str]]:
    """What each learner is measured at. Q-learning's optimum is known at regular steps only."""
    steps = [f"{dt:g}" for dt in STEPS]
    if quick:
        return {"cqsm": [steps[0], IRREGULAR], "q": steps[:2]}
    return {name: steps if name == "q" else [*steps, IRREGULAR] for name in LEARNERS}


def environment_of(column: str) -> LQ:
    """The problem at a control step in seconds, or at irregular ones."""
    irregular = {"dt_min": MEAN_STEP * 2 / 11, "dt_max": MEAN_STEP * 20 / 11}
    times: dict[str, Any] = irregular if column == IRREGULAR else {"dt": float(column)}
    # one Euler step per control step, as in `discrete_optimum`
    return LQ(id="lq", problem=PROBLEM, num_envs=COPIES, substeps=1, **times)


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


def learn(algorithm: Any, environment: LQ, seed: int, seconds: float) -> float:
    """The error of the policy that one run ends with, after `seconds` in each copy."""
    steps = round(seconds / environment.dt) * COPIES
    session = Session(algorithm, environment, seed, steps=steps, eval_episodes=0)
    while session.env_steps < steps:
        session.advance(steps)
    error = policy_error(algorithm, environment, session.runner.agent)
    session.close()
    return round(error, 5)


def summarize(columns: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Mean error by column, and that of the shortest regular step over that of the longest."""
    means = {name: round(float(np.mean(list(c.values()))), 5) for name, c in columns.items()}
    regular = [mean for name, mean in means.items() if name != IRREGULAR]
    return {"mean": means, "ratio": round(regular[-1] / regular[0], 3)}


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """Every error in percent, as Markdown: seeds in a cell, separated by spaces."""
    columns = list(dict.fromkeys(column for runs in results.values() for column in runs))
    lines = [f"| learner | {' | '.join(columns)} | ratio of means, last regular to first |"]
    lines.append("|---|" + "---|" * (len(columns) + 1))
    for name, runs in results.items():
        cells = [
            " ".join(f"{100 * error:.1f}" for error in runs.get(column, {}).values())
            for column in columns
        ]
        lines.append(f"| {name} | {' | '.join(cells)} | {summarize(runs)['ratio']:.2f} |")
    return "\n".join(lines)


def exact_gradients() -> dict[str, dict[str, float]]:
    """The root mean square of the optimum's gradient in the action, at each control step."""
    problem = lq.Problem.from_json(PROBLEM)
    size, exact = problem.state_size, lq.solve(problem).P
    return {
        "grad_a Q": {f"{dt:g}": gradient_rms(exact, size) for dt in STEPS},
        "grad_u Q_dt": {
            f"{dt:g}": gradient_rms(discrete_optimum(problem, dt)[0], size) for dt in STEPS
        },
    }


def picture(
    results: dict[str, dict[str, dict[str, float]]], gradients: dict[str, dict[str, float]]
) -> Figure:
    """Errors of every seed and their means, and the two exact curves, against the control step."""
    figure = Figure(figsize=(10, 4.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    for index, (name, columns) in enumerate(results.items()):
        means = {}
        for column, seeds in columns.items():
            errors = [100 * error for error in seeds.values()]
            step = MEAN_STEP if column == IRREGULAR else float(column)
            style = "x" if column == IRREGULAR else "."
            left.plot([step] * len(errors), errors, style, color=f"C{index}", alpha=0.4)
            if column != IRREGULAR:
                means[step] = np.mean(errors)
        left.plot(list(means), list(means.values()), color=f"C{index}", label=name)
    title = "learned: dots are seeds, crosses irregular steps"
    left.set(ylabel="error of the policy, %", yscale="log", title=title)
    for name, values in gradients.items():
        right.plot([float(column) for column in values], list(values.values()), ".-", label=name)
    right.set(yscale="log", ylabel="root mean square", title="exact: gradient in the action")
    for axes in (left, right):
        axes.set(xlabel="control step, s", xscale="log")
        axes.set_xticks(STEPS, [f"{step:g}" for step in STEPS])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
    return figure


def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__, "dt_robustness").parse_args(argv)
    seconds, seeds = (10.0, 1) if args.quick else (100.0, 5)
    fields: dict[str, Any] = {"hidden": (16, 16), "batch_size": 64} if args.quick else {}
    settings = {
        "problem": json.loads(PROBLEM),
        "seconds": seconds,
        "copies": COPIES,
        "cqsm": json.loads(json.dumps(dataclasses.asdict(cqsm(MEAN_STEP, "network", **fields)))),
    }
    gradients = exact_gradients()
    wanted = {}
    for name, columns in measured_at(args.quick).items():
        for column in columns:
            environment = environment_of(column)  # one for all seeds, as their programs are
            algorithm = LEARNERS[name](environment.dt, **fields)
            for seed in range(seeds):
                run = functools.partial(learn, algorithm, environment, seed, seconds)
                wanted[name, column, str(seed)] = run
    found = learn_missing(args, wanted, settings=settings)
    results = found["algorithms"]
    print(table(results))
    summary = {name: summarize(columns) for name, columns in results.items()}
    exact = {"gradient_rms": gradients, "summary": summary}
    save(args, found | exact, picture(results, gradients))


if __name__ == "__main__":
    main()
