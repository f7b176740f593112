"""Training in host environments: collect a chunk, then update on it; and the one evaluation path.

No disk, clock or terminal here: `run` drives a `Session` per seed and does the rest.
"""

import dataclasses
from functools import cached_property, partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from qscore import replay
from qscore.algorithms.base import Algorithm
from qscore.environments.base import Environment, Episodic, Step
from qscore.environments.host import DEFAULT_LIMIT
from qscore.environments.sde import SDEEnvironment, SDETask
from qscore.products import Precision, with_products
from qscore.programs import kept
from qscore.rollout import (
    CHUNK_STEPS,
    DeviceCollector,
    compiled_evaluation,
    evaluate_on_device,
)
from qscore.train import Runner, init_runner, train_chunk
from qscore.types import Key, Spec, State, Transition

BLOWN_UP = 1_000.0
"""A critic's mean value beyond so many times the largest possible return counts as divergence."""

OFFLINE_CHUNK = 500
"""Updates on a data set between two looks at whether the numbers are finite."""

CHUNK = 50
"""Environment steps collected under one policy before its updates are taken."""


@kept
def compiled_init(algorithm: Algorithm, spec: Spec, capacity: int) -> Any:
    """`init_runner` of a key, compiled once for all seeds.

    Outside of a program every operation is compiled by itself, some seventy of them: seconds.
    """
    program = jax.jit(lambda key: init_runner(algorithm, spec, capacity, key=key))
    on_cpu = jax.default_backend() == "cpu"
    # it runs once a seed, so compiling is what it costs
    options: dict[str, str | bool] = {"xla_backend_optimization_level": "0"} if on_cpu else {}
    return program.lower(jr.key(0)).compile(compiler_options=options)


@kept
def compiled_chunk(
    algorithm: Algorithm, spec: Spec, capacity: int, rows: int, precision: Precision = "f32"
) -> Any:
    """`train_chunk` for blocks of `rows` transitions, compiled once for all seeds."""

    def chunk(runner, block, count, updates, key):
        return train_chunk(algorithm, runner, block, count, updates, key=key)

    runner = jax.eval_shape(lambda: init_runner(algorithm, spec, capacity, key=jr.key(0)))
    block = jax.eval_shape(lambda: replay.empty_rows(spec, rows))
    integer = jax.ShapeDtypeStruct((), jnp.int32)
    on_cpu = jax.default_backend() == "cpu"
    program = jax.jit(with_products(chunk, precision), donate_argnums=0)
    lowered = program.lower(runner, block, integer, integer, jr.key(0))
    # XLA uses half of a 512-bit register unless told otherwise: 4 to 6% of an update's time
    options: dict[str, str | bool] = {"xla_cpu_prefer_vector_width": "512"} if on_cpu else {}
    return lowered.compile(compiler_options=options)


class Policy:
    """An algorithm's `act`, compiled for a batch of observations and fed only what it reads.

    An agent holds critics, targets and optimiser states that acting never touches; handing all of
    them to a compiled function costs more than the action itself. The leaves that `act` depends
    on are found once from its traced form.
    """

    def __init__(self, algorithm: Algorithm, spec: Spec, rows: int, *, explore: bool):
        self.algorithm, self.spec, self.rows, self.explore = algorithm, spec, rows, explore

    def compile(self) -> None:
        """Compile now, in this thread; otherwise the first call does."""
        _ = self._program

    @cached_property
    def _program(self) -> tuple[list[int], Any]:
        """Which leaves of an agent are read, and the compiled function of them."""
        self._shapes, self._treedef = jax.tree.flatten(agent_shapes(self.algorithm, self.spec))
        carry = jax.eval_shape(self.init_carry)
        obs = jax.ShapeDtypeStruct((self.rows, self.spec.obs_size), jnp.float32)
        place = jax.ShapeDtypeStruct((2,), jnp.uint32)
        traced = jax.make_jaxpr(self._act_all)(self._shapes, carry, obs, jr.key(0), place)
        used = {id(var) for equation in traced.eqns for var in equation.invars}
        used |= {id(var) for var in traced.jaxpr.outvars}
        inputs = traced.jaxpr.invars[: len(self._shapes)]
        reads = [i for i, var in enumerate(inputs) if id(var) in used]

        def act(read, carry, obs, key, place):
            leaves: list[Any] = [jnp.zeros(leaf.shape, leaf.dtype) for leaf in self._shapes]
            for i, leaf in zip(reads, read, strict=True):
                leaves[i] = leaf
            return self._act_all(leaves, carry, obs, key, place)

        read = [self._shapes[i] for i in reads]
        return reads, jax.jit(act).lower(read, carry, obs, jr.key(0), place).compile()

    def init_carry(self) -> Any:
        """The carry at the start of an episode, for every row."""
        carry = self.algorithm.init_carry(self.spec)
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (self.rows, *leaf.shape)), carry)

    def read(self, state: State) -> list[jax.Array]:
        """What acting needs of an agent."""
        leaves, (reads, _) = jax.tree.leaves(state), self._program
        return [leaves[i] for i in reads]

    def __call__(
        self,
        read: list[jax.Array],
        carry: Any,
        obs: np.ndarray,
        key: Key,
        step: int,
        first: int = 0,
    ) -> tuple[np.ndarray, Any]:
        """Actions for `obs[rows, obs_size]`.

        Row i draws from `fold_in(fold_in(key, step), first + i)`.
        """
        _, program = self._program
        action, carry = program(read, carry, obs, key, np.array((step, first), np.uint32))
        return np.asarray(action), carry

    def _act_all(self, leaves, carry, obs, key, place):
        state = jax.tree.unflatten(self._treedef, leaves)
        key = jr.fold_in(key, place[0])
        rows = place[1] + jnp.arange(self.rows, dtype=jnp.uint32)
        keys = jax.vmap(lambda row: jr.fold_in(key, row))(rows)
        return jax.vmap(
            lambda carry, obs, key: self.algorithm.act(
                state, carry, obs, key=key, explore=self.explore
            )
        )(carry, obs, keys)


@kept
def exploration_policy(algorithm: Algorithm, spec: Spec, rows: int) -> Policy:
    """The policy that collects experience in `rows` environments side by side."""
    return Policy(algorithm, spec, rows, explore=True)


EVAL_ROWS = 10
"""Episodes evaluated side by side; fixed, so that no episode's numbers depend on how many."""


@kept
def evaluation_policy(
    algorithm: Algorithm, spec: Spec, *, best_of: int = 1, rows: int = EVAL_ROWS
) -> Policy:
    """The policy as it is evaluated: no exploration, and best-of-N only where it is asked for."""
    return Policy(with_best_of(algorithm, best_of), spec, rows, explore=False)


def with_best_of(algorithm: Algorithm, best_of: int) -> Algorithm:
    """The algorithm, acting with the best of N. Raises `ValueError` where it cannot."""
    if hasattr(algorithm, "best_of"):
        return dataclasses.replace(algorithm, best_of=best_of)  # pyright: ignore
    if best_of == 1:
        return algorithm
    raise ValueError(f"{type(algorithm).__name__} cannot act with the best of N actions.")


def agent_shapes(algorithm: Algorithm, spec: Spec) -> Any:
    """The structure, shapes and types of an agent's state, without making one."""
    return jax.eval_shape(lambda: algorithm.init(spec, key=jr.key(0)))


class Diverged(FloatingPointError):
    """Training produced a number that is not finite, or a critic beyond all returns."""


def inadmissible(metrics: dict[str, float]) -> str:
    """Why a value estimated by continuous-time methods means nothing; empty where it does."""
    margin = metrics.get("stability_margin", 0.0)
    if margin >= 0.0:
        return ""
    return (
        "; the score was not admissible: quadratic functions of state and action grew by "
        f"{-margin:.2g} per second more than the discount rate allows, and its value is infinite"
    )


def episode_seed(*stream: int) -> int:
    """The seed of one episode: a hash of the integers that name it."""
    return int(np.random.SeedSequence(stream).generate_state(1)[0] >> 1)


class Observer:
    """What may look on at an evaluation, or disturb it: does nothing until overridden."""

    def began(self, episode: int, task: Episodic) -> None:
        """An episode has begun in `task`."""

    def disturb(self, episode: int, action: np.ndarray) -> np.ndarray:
        """The action to take in place of the policy's; in [-1, 1] both."""
        return action

    def stepped(
        self, episode: int, task: Episodic, obs: np.ndarray, action: np.ndarray, step: Step
    ) -> None:
        """`action` at `obs` led to `step`."""


def evaluate(
    policy: Policy,
    agent: State,
    tasks: list[Episodic],
    *,
    episodes: int,
    seed: int,
    observer: Observer | None = None,
) -> tuple[list[float], list[int]]:
    """Returns (undiscounted) and lengths of `episodes` episodes: the only evaluation there is.

    Episode i begins from the environment seed that belongs to (`seed`, i). `tasks` are up to
    `policy.rows` open copies.
    """
    tasks = tasks[: policy.rows]
    ours = tasks[0].environment if isinstance(tasks[0], SDETask) else None
    if observer is None and ours is not None:
        return evaluate_on_device(
            policy.algorithm,
            ours,
            agent,
            [episode_seed(1, seed, episode) for episode in range(episodes)],
            key=jr.key(seed),
        )
    observer = observer or Observer()
    read, key = policy.read(agent), jr.key(seed)
    obs = np.zeros((policy.rows, policy.spec.obs_size), np.float32)
    carry = fresh = policy.init_carry()
    running: dict[int, int] = {}  # slot -> episode
    returns, lengths = [0.0] * episodes, [0] * episodes
    waiting = iter(range(episodes))

    def begin(slot: int) -> None:
        nonlocal carry
        episode = next(waiting, None)
        running.pop(slot, None)
        if episode is not None:
            obs[slot] = tasks[slot].reset(episode_seed(1, seed, episode))
            carry = _reset_rows(carry, fresh, slot)
            running[slot] = episode
            observer.began(episode, tasks[slot])

    for slot in range(len(tasks)):
        begin(slot)
    step = first = 0
    while running:
        actions, carry = policy(read, carry, obs.copy(), key, step, first)
        for slot, episode in list(running.items()):
            action = observer.disturb(episode, actions[slot])
            result = tasks[slot].step(action)
            observer.stepped(episode, tasks[slot], obs[slot].copy(), action, result)
            obs[slot] = result.next_obs
            returns[episode] += result.reward
            lengths[episode] += 1
            if result.terminated or result.truncated:
                # our own begin the next ones together, with the noise they have on the device
                if ours is not None:
                    running.pop(slot)
                else:
                    begin(slot)
        step += 1
        if not running:
            step, first = 0, first + len(tasks)
            for slot in range(len(tasks)):
                begin(slot)
    return returns, lengths


@partial(jax.jit, static_argnums=2, donate_argnums=0)  # a second buffer may not fit
def _filled(rows: Transition, part: Transition, start: int) -> Transition:
    """The rows with `part` from row `start` on, in the memory of `rows`."""
    return jax.tree.map(lambda all, own: all.at[start : start + len(own)].set(own), rows, part)


def _reset_rows(carry: Any, fresh: Any, row: int) -> Any:
    return jax.tree.map(lambda now, start: now.at[row].set(start[row]), carry, fresh)


@kept
def _compiled_uniform(rows: int, size: int):
    def uniform(key, step):
        return jr.uniform(jr.fold_in(key, step), (rows, size), minval=-1.0, maxval=1.0)

    step = jax.ShapeDtypeStruct((), jnp.uint32)
    return jax.jit(uniform).lower(jr.key(0), step).compile()


class HostCollector:
    """The host environments of one seed, side by side, and what is running in them.

    Everything random is drawn from the seed and the counters, so `snapshot` and `restore` need no
    random state: an environment is put back by its episode's seed and the actions taken since.
    """

    def __init__(self, algorithm: Algorithm, environment: Environment, seed: int, key: Key):
        self.algorithm, self.seed, self._key = algorithm, seed, key
        self.tasks = [environment.open() for _ in range(environment.num_envs)]
        self.spec = self.tasks[0].spec
        self._explore = exploration_policy(algorithm, self.spec, len(self.tasks))
        self._explore.compile()
        self._uniform = _compiled_uniform(len(self.tasks), self.spec.action_size)
        self.chunk = chunk_steps(environment)
        rows = len(self.tasks)
        self.episodes = [0] * rows  # of each environment, the running one included
        self.returns = [0.0] * rows  # of the running episodes
        self.history: list[list[np.ndarray]] = [[] for _ in range(rows)]
        self.finished: list[float] = []  # returns of episodes that ended since the last `flush`
        self.obs = np.stack([self._begin(row) for row in range(rows)])
        self.carry = self._explore.init_carry()

    def collect(self, agent: State, env_steps: int, count: int) -> Transition:
        """`count` transitions from `env_steps` on, in a block of `chunk` rows."""
        spec, rows = self.spec, self.empty_block()
        read = self._explore.read(agent)
        for start in range(0, count, len(self.tasks)):
            actions = self._actions(read, env_steps + start)
            next_obs = np.empty_like(self.obs)
            for row, task in enumerate(self.tasks):
                step = task.step(actions[row])
                i = start + row
                rows.obs[i], rows.action[i] = self.obs[row], actions[row]
                rows.reward[i], rows.next_obs[i] = step.reward, step.next_obs
                rows.terminated[i] = step.terminated
                rows.time[i] = len(self.history[row]) * spec.dt
                self.history[row].append(actions[row])
                self.returns[row] += step.reward
                next_obs[row] = step.next_obs
                if step.terminated or step.truncated:
                    self.finished.append(self.returns[row])
                    next_obs[row] = self._begin(row)
                    self.carry = _reset_rows(self.carry, self._explore.init_carry(), row)
            self.obs = next_obs
        return rows

    def flush(self) -> list[float]:
        """The returns of the episodes that ended since the last call."""
        finished, self.finished = self.finished, []
        return finished

    def snapshot(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """(counters as plain JSON values, arrays): what `restore` needs to continue exactly."""
        counters = {
            "episodes": list(self.episodes),
            "returns": list(self.returns),
            "finished": list(self.finished),
        }
        history = {
            str(row): np.asarray(actions, np.float32).reshape(-1, self.spec.action_size)
            for row, actions in enumerate(self.history)
        }
        return counters, {"carry": self.carry, "obs": self.obs, "history": history}

    def restore(self, counters: dict[str, Any], arrays: dict[str, Any]) -> bool:
        """Continue from a snapshot. False where an environment did not repeat its episode.

        Such an environment is not deterministic; it starts a new episode instead.
        """
        self.episodes, self.returns = list(counters["episodes"]), list(counters["returns"])
        self.finished = list(counters["finished"])
        self.carry = jax.tree.map(jnp.array, arrays["carry"])
        self.obs = np.array(arrays["obs"])
        self.history = [list(arrays["history"][str(row)]) for row in range(len(self.tasks))]
        repeated = [self._replay_episode(row) for row in range(len(self.tasks))]
        return all(repeated)

    def close(self) -> None:
        """Close every environment."""
        for task in self.tasks:
            task.close()

    def empty_block(self) -> Transition:
        """`chunk` rows of zeros in host memory; only their nominal dt is filled in."""
        block, spec = self.chunk, self.spec
        return Transition(
            obs=np.zeros((block, spec.obs_size), np.float32),
            action=np.zeros((block, spec.action_size), np.float32),
            reward=np.zeros(block, np.float32),
            next_obs=np.zeros((block, spec.obs_size), np.float32),
            terminated=np.zeros(block, bool),
            time=np.zeros(block, np.float32),
            dt=np.full(block, spec.dt, np.float32),
        )

    def _begin(self, row: int) -> np.ndarray:
        """Reset one environment to its next episode."""
        self.episodes[row] += 1
        self.returns[row] = 0.0
        self.history[row] = []
        return self.tasks[row].reset(episode_seed(0, self.seed, row, self.episodes[row]))

    def _replay_episode(self, row: int) -> bool:
        obs = self.tasks[row].reset(episode_seed(0, self.seed, row, self.episodes[row]))
        for action in self.history[row]:
            obs = self.tasks[row].step(action).next_obs
        if np.array_equal(obs, self.obs[row]):
            return True
        self.obs[row] = self._begin(row)
        self.carry = _reset_rows(self.carry, self._explore.init_carry(), row)
        return False

    def _actions(self, read: list[jax.Array], env_steps: int) -> np.ndarray:
        if env_steps < self.algorithm.warmup_steps:
            return np.asarray(self._uniform(self._key, np.uint32(env_steps)))
        actions, self.carry = self._explore(read, self.carry, self.obs, self._key, env_steps)
        return actions


def chunk_steps(environment: Environment) -> int:
    """Environment steps between two rounds of updates: collected under one policy."""
    if isinstance(environment, SDEEnvironment):
        return CHUNK_STEPS * environment.num_envs
    rows = environment.num_envs
    return -(-CHUNK // rows) * rows


def replay_rows(
    algorithm: Algorithm, environment: Environment, *, steps: int, recorded: int, offline_steps: int
) -> int:
    """Transitions that the replay buffer of one seed has room for."""
    # every collected row where recorded ones are to be kept
    room = steps - offline_steps if recorded else min(algorithm.replay_capacity, steps)
    # never below a chunk, so that no chunk overwrites itself
    return recorded + max(room, chunk_steps(environment))


class Collector(Protocol):
    """Gathers experience for one seed, on the host or on the device."""

    spec: Spec
    chunk: int

    def collect(self, agent: State, env_steps: int, count: int) -> Transition: ...
    def empty_block(self) -> Transition: ...
    def flush(self) -> list[float]: ...
    def snapshot(self) -> tuple[dict[str, Any], dict[str, Any]]: ...
    def restore(self, counters: dict[str, Any], arrays: dict[str, Any]) -> bool: ...
    def close(self) -> None: ...


class Session:
    """One seed of a run: what collects experience, the runner and their counters."""

    def __init__(
        self,
        algorithm: Algorithm,
        environment: Environment,
        seed: int,
        *,
        steps: int,
        eval_episodes: int,
        data: Transition | None = None,
        offline_steps: int = 0,
        precision: Precision = "f32",
    ):
        self.algorithm, self.seed, self.eval_episodes = algorithm, seed, eval_episodes
        self.offline_steps = offline_steps
        init_key, act_key, self._update_key = jr.split(jr.key(seed), 3)
        acting = algorithm
        if offline_steps:  # they are the warm-up: no action after them is random
            acting = dataclasses.replace(algorithm, warmup_steps=1)  # pyright: ignore
        # everything is compiled here, by one thread, before the seeds' threads start
        self.collector: Collector = (
            DeviceCollector(acting, environment, act_key)
            if isinstance(environment, SDEEnvironment)
            else HostCollector(acting, environment, seed, act_key)
        )
        self.eval_tasks = [environment.open() for _ in range(min(eval_episodes, EVAL_ROWS))]
        self.spec = self.collector.spec
        self.chunk = self.collector.chunk
        self.recorded = 0 if data is None else len(data.reward)
        self.capacity = replay_rows(
            algorithm, environment, steps=steps, recorded=self.recorded, offline_steps=offline_steps
        )
        self._evaluation = evaluation_policy(algorithm, self.spec) if eval_episodes else None
        if self._evaluation is not None:
            if isinstance(environment, SDEEnvironment):
                compiled_evaluation(self._evaluation.algorithm, environment, eval_episodes)
            else:
                self._evaluation.compile()
        self._chunk = compiled_chunk(algorithm, self.spec, self.capacity, self.chunk, precision)
        self.runner = compiled_init(algorithm, self.spec, self.capacity)(init_key)
        if data is not None:
            rows = _filled(self.runner.replay.data, data, 0)
            filled = replay.Replay(rows, jnp.array(self.recorded, jnp.int32))
            self.runner = Runner(self.runner.agent, filled, self.runner.updates)
        self.env_steps = 0
        self.updates = 0
        self.sums: dict[str, float] = {}  # metrics since the last log, summed over updates
        self.summed = 0
        self.latest: dict[str, float] = {}  # metrics of the latest updates
        self.largest_reward = 0.0 if data is None else float(np.abs(data.reward).max())

    def advance(self, until: int) -> None:
        """Collect to the end of the current chunk (or `until`), then take the updates due.

        On a data set nothing is collected, and a step is an update. Raises `Diverged` and
        `EnvironmentFailure`.
        """
        if self.env_steps < self.offline_steps:
            count = 0
            self.env_steps = min(self.env_steps + OFFLINE_CHUNK, until, self.offline_steps)
            rows = self.collector.empty_block()
        else:
            count = min(self.chunk - self.env_steps % self.chunk, until - self.env_steps)
            rows = self.collector.collect(self.runner.agent, self.env_steps, count)
            self.env_steps += count
        self.largest_reward = max(self.largest_reward, float(np.abs(rows.reward).max()))
        due = self._updates_due()
        updates = due - self.updates
        self.runner, metrics, finite = self._chunk(
            self.runner, rows, np.int32(count), np.int32(updates), self._update_key
        )
        if updates == 0:
            return
        values = {name: float(value) for name, value in metrics.items()}
        bad = [name for name, value in values.items() if not np.isfinite(value)]
        if bad or not finite:
            what = ", ".join(bad) if bad else "the parameters"
            raise Diverged(
                f"not finite: {what} (seed {self.seed}, env step {self.env_steps}, "
                f"updates {self.updates + 1} to {due}){self._before()}"
            )
        if abs(values.get("q", 0.0)) > self._credible_value():
            raise Diverged(
                f"the critic blew up: `q` is {values['q']:.3g}, more than {BLOWN_UP:g} times what "
                f"any episode can return at rewards of at most {self.largest_reward:.3g} per step "
                f"(seed {self.seed}, env step {self.env_steps}, updates {self.updates + 1} to "
                f"{due}){self._before()}"
            )
        self.latest = values
        self.updates = due
        self.summed += updates
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value * updates

    def _credible_value(self) -> float:
        """What no critic's mean can honestly exceed, from the rewards seen so far."""
        horizon, rate = self.spec.horizon, self.spec.discount_rate
        steps = DEFAULT_LIMIT if horizon is None else horizon / self.spec.dt
        if rate and "time" not in self.spec.clock:
            steps = max(steps, 1.0 / (rate * self.spec.dt))  # values reach beyond the time limit
        # at least 1: where no reward has been seen yet an entropy bonus still has a value
        return BLOWN_UP * steps * max(self.largest_reward, 1.0)

    def _updates_due(self) -> int:
        """Updates that belong to the steps done so far."""
        per_step, done = self.algorithm.updates_per_step, self.env_steps - self.offline_steps
        if self.offline_steps:  # the data are the warm-up
            return min(self.env_steps, self.offline_steps) + int(per_step * max(0, done))
        return int(per_step * max(0, done - self.algorithm.warmup_steps))

    def _before(self) -> str:
        """What the metrics said last, for the message of a divergence."""
        if not self.latest:
            return "; these were its first updates"
        said = ", ".join(f"{name} {value:.3g}" for name, value in sorted(self.latest.items()))
        return f"; in the updates before: {said}{inadmissible(self.latest)}"

    def evaluate(
        self, seed: int, arrays: dict[str, Any] | None = None
    ) -> tuple[list[float], list[int]]:
        """`evaluate` of the current agent, or of the one in a snapshot's `arrays`.

        Exploration and best-of-N are off. A snapshot may be evaluated while training goes on.
        """
        assert self._evaluation is not None  # nothing is compiled for 0 episodes
        agent, episodes = self.runner.agent, self.eval_episodes
        if arrays is not None:
            agent = jax.tree.map(jnp.asarray, arrays["agent"])
        return evaluate(self._evaluation, agent, self.eval_tasks, episodes=episodes, seed=seed)

    def flush(self) -> dict[str, float]:
        """The mean of every metric since the last call, and of the episodes that ended."""
        row = {name: total / self.summed for name, total in self.sums.items()}
        finished = self.collector.flush()
        if finished:
            row["episode_return"] = float(np.mean(finished))
        self.sums, self.summed = {}, 0
        return row

    def snapshot(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """(counters as plain JSON values, arrays): what `restore` needs to continue exactly.

        A copy, that training leaves alone.
        """
        collected, collector = self.collector.snapshot()
        counters = {
            "seed": self.seed,
            "env_steps": self.env_steps,
            "updates": self.updates,
            "sums": dict(self.sums),
            "summed": self.summed,
            "largest_reward": self.largest_reward,
            "collector": collected,
        }
        # what was recorded stays in its file
        held = slice(self.recorded, int(self.runner.replay.size))
        arrays = {
            "agent": jax.tree.map(np.array, self.runner.agent),
            "updates": np.array(self.runner.updates),
            # cut by NumPy: JAX would compile a program for every length, and keep it
            "replay": jax.tree.map(
                lambda leaf: np.asarray(leaf)[held].copy(), self.runner.replay.data
            ),
            "added": np.array(self.runner.replay.added),
            "collector": collector,
        }
        return counters, arrays

    def skeleton(self) -> dict[str, Any]:
        """A tree of the structure of `snapshot`'s arrays, to load them into."""
        arrays = self.snapshot()[1]
        return {**arrays, "agent": agent_shapes(self.algorithm, self.spec)}

    def restore(self, counters: dict[str, Any], arrays: dict[str, Any]) -> bool:
        """Continue from a snapshot. False where an environment did not repeat its episode."""
        self.env_steps, self.updates = counters["env_steps"], counters["updates"]
        self.sums, self.summed = dict(counters["sums"]), counters["summed"]
        self.largest_reward = counters["largest_reward"]
        self.runner = Runner(
            agent=jax.tree.map(jnp.array, arrays["agent"]),
            replay=replay.Replay(
                _filled(self.runner.replay.data, arrays["replay"], self.recorded),
                jnp.array(arrays["added"]),
            ),
            updates=jnp.array(arrays["updates"]),
        )
        return self.collector.restore(counters["collector"], arrays["collector"])

    def close(self) -> None:
        """Close every environment."""
        self.collector.close()
        for task in self.eval_tasks:
            task.close()
