"""A trained policy as a folder to hand on: NumPy code that acts without JAX, and a model card.

README.md (a card in the layout of the Hugging Face Hub), policy.py, policy.npz, config.json,
evals.jsonl
"""

import os
import platform
import runpy
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from qscore.algorithms import algorithm_name
from qscore.environments import ENVIRONMENTS
from qscore.environments.base import Episodic, Step
from qscore.errors import RunStopped, UsageError
from qscore.folder import Run, as_usage_error, expanded
from qscore.numpy_code import Code, evaluate, translate
from qscore.panel import shortened, task_fields
from qscore.playback import load_agents
from qscore.statistics import summarize
from qscore.train_host import Observer, evaluation_policy, with_best_of
from qscore.train_host import evaluate as evaluate_policy

CHECKED = 100
"""Observations at which the exported policy is held against the original."""

TOLERANCE = 1e-5
"""Largest difference of an action, in half action ranges."""

TIMED = 1000
"""Calls whose median is the latency."""

POLICY = '''"""{title}: the policy, in NumPy alone.

    from policy import Policy

    policy = Policy()
    carry = policy.init_carry()                 # at the start of an episode
    action, carry = policy(observation, carry)  # a flat observation; the environment's own actions
"""

from pathlib import Path

import numpy as np

OBSERVATION = {obs_size}
DRAWS = {draws}
"""Shapes of the standard normal arrays that an action takes; none where it is deterministic."""


class Policy:
    """Acts as the trained policy is evaluated; `seed` is that of its noise, if it has any."""

    def __init__(self, seed=None):
        with np.load(Path(__file__).with_name("policy.npz"), allow_pickle=False) as arrays:
            self._constants = [arrays[f"c{{i}}"] for i in range({constants})]
            self._carry = tuple(arrays[f"carry{{i}}"] for i in range({carries}))
            self._low, self._high = arrays["action_low"], arrays["action_high"]
        self._random = np.random.default_rng(seed)

    def init_carry(self):
        """What the policy remembers at the start of an episode."""
        return self._carry

    def __call__(self, observation, carry, draws=None):
        """(action, carry) for one flat observation; `draws` replace the policy's own noise."""
        observation = np.asarray(observation, np.float32)
        if observation.shape != (OBSERVATION,):
            raise ValueError(
                f"`observation` must have shape ({{OBSERVATION}},), got {{observation.shape}}."
            )
        if draws is None:
            draws = [self._random.standard_normal(shape, np.float32) for shape in DRAWS]
        action, *carry = act(observation, *carry, draws, self._constants)
        return self._low + (action + 1.0) / 2.0 * (self._high - self._low), tuple(carry)


def act({arguments}, draws, c):
    """The action in [-1, 1], and what is carried to the next step."""
{body}
    return {outputs}
'''

EPISODE = """import gymnasium as gym
from policy import Policy
{before}
env = {make}
policy = Policy()
obs, _ = env.reset(seed=0)
carry, done, episode_return = policy.init_carry(), False, 0.0
while not done:
    action, carry = policy(obs, carry)
    obs, reward, terminated, truncated, _ = env.step({action})
    episode_return += reward
    done = terminated or truncated
print(episode_return)"""

ACTION = """import numpy as np
from policy import Policy

policy = Policy()
carry = policy.init_carry()
action, carry = policy(np.zeros({obs_size}), carry)  # an observation of `{environment}`
print(action)"""

CARD = """---
library_name: qscore
tags:
- reinforcement-learning
- {algorithm}
- {environment}
model-index:
- name: {algorithm}-{slug}
  results:
  - task:
      type: reinforcement-learning
      name: reinforcement-learning
    dataset:
      name: {environment}
      type: {environment}
    metrics:
    - type: mean_reward
      value: {mean:.5g} +/- {spread:.3g}
      name: mean_reward
      verified: false
---

# {title}

A policy trained by qscore. It needs NumPy and nothing else:

```python
{example}
```

## Figures

Undiscounted returns of the evaluation episodes after {steps:,} {counted}; {episodes} per seed,
without exploration. This policy is of seed {seed}.

| seed | mean return | standard deviation over episodes |
|---|---|---|
{rows}

Interquartile mean over {over}: {iqm:.5g}, 95% bootstrap interval {low:.5g} to {high:.5g}.
{finished}
At {checked} observations of an episode, actions of `policy.py` differ from the original's by at
most {difference:.1e} half action ranges, given the same noise. {deterministic}
An action takes {latency:.3f} ms (median of {timed} calls, {machine}).

## How it was trained

```bash
{command}
```

Versions: {versions}. All settings are in `config.json`, all evaluations in `evals.jsonl`.

## Limits

It was trained {learned}. How it does elsewhere has not been measured.
"""


def export(
    folder: str | os.PathLike, to: str | os.PathLike, *, seed: int | None = None
) -> dict[str, Any]:
    """Write the policy of one seed (the first unless given) of a run into the new folder `to`.

    Returns what was measured: `max_difference` from the original in half action ranges, and
    `latency_milliseconds` of an action. Raises `UsageError` where the run has no evaluation or
    checkpoint, for a folder that is not empty, and for a policy with operations that have no NumPy
    code; `RunStopped` where the written policy does not act as the original.
    """
    run, target = Run.open(folder), expanded(to).resolve()
    seed = run.settings.seed_start if seed is None else seed
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"`to` is {target}, which exists and is not an empty folder.")
    task = as_usage_error(run.environment.open)
    try:
        steps, agents = load_agents(run, task.spec, [seed])
        returns = {
            s: rows[steps]["returns"]
            for s, rows in sorted(run.rows("evals").items())
            if steps in rows
        }
        if seed not in returns:
            raise UsageError(
                f"{run.folder} has no evaluation of seed {seed} at its newest intact checkpoint, "
                f"{steps} steps; `qscore resume` it to the next one."
            )
        agent, carry = agents[seed], jax.tree.leaves(run.algorithm.init_carry(task.spec))
        function = _flat(run, task, agent)
        code = as_usage_error(lambda: _translate(function, task.spec.obs_size, carry))
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
                made = Path(scratch) / "made"
                made.mkdir()
                _write_policy(made, _title(run), code, carry, task)
                measured = _check(made, run, task, agent, function, carry, code)
                for name in ("config.json", "evals.jsonl"):
                    shutil.copyfile(run.folder / name, made / name)
                card = _card(run, seed, steps, returns, code, measured, task)
                (made / "README.md").write_text(card, encoding="utf-8")
                if target.exists():
                    target.rmdir()
                made.rename(target)
        except OSError as error:
            raise UsageError(f"cannot write to `to`, {target}: {error}.") from error
    finally:
        task.close()
    return measured


def _title(run: Run) -> str:
    """The algorithm and the task, with what of the task is not its default."""
    said = "".join(f", {name}={shortened(value)}" for name, value in task_fields(run).items())
    return f"{algorithm_name(run.algorithm)} on {run.environment.id}{said}"


def _flat(run: Run, task: Episodic, agent: Any) -> Any:
    """Acting as in evaluation as a function of (observation, carry's arrays..., key)."""
    algorithm = with_best_of(run.algorithm, 1)
    structure = jax.tree.structure(algorithm.init_carry(task.spec))

    def act(obs, *rest):
        *leaves, key = rest
        carry = jax.tree.unflatten(structure, leaves)
        action, carry = algorithm.act(agent, carry, obs, key=key, explore=False)
        return (action, *jax.tree.leaves(carry))

    return act


def _translate(function: Any, obs_size: int, carry: list[Any]) -> Code:
    inputs = [("obs", jax.ShapeDtypeStruct((obs_size,), jnp.float32))]
    inputs += [
        (f"carry{i}", jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)) for i, leaf in enumerate(carry)
    ]
    return translate(function, inputs, key=jr.key(0))


def _write_policy(target: Path, title: str, code: Code, carry: list[Any], task: Episodic) -> None:
    low, high = task.action_bounds
    arrays = {f"c{i}": array for i, array in enumerate(code.constants)}
    arrays |= {f"carry{i}": np.asarray(leaf) for i, leaf in enumerate(carry)}
    with open(target / "policy.npz", "wb") as file:
        np.savez(file, allow_pickle=False, action_low=low, action_high=high, **arrays)
    text = POLICY.format(
        title=title,
        obs_size=task.spec.obs_size,
        draws=code.draws,
        constants=len(code.constants),
        carries=len(carry),
        arguments=", ".join(["obs", *(f"carry{i}" for i in range(len(carry)))]),
        body="\n".join(f"    {line}" for line in code.lines),
        outputs=", ".join(code.outputs) + ("," if len(code.outputs) == 1 else ""),
    )
    (target / "policy.py").write_text(text, encoding="utf-8")


class _Observations(Observer):
    """The observations of an episode."""

    def __init__(self):
        self.seen: list[np.ndarray] = []

    def stepped(
        self, episode: int, task: Episodic, obs: np.ndarray, action: np.ndarray, step: Step
    ) -> None:
        self.seen.append(obs)


def _check(
    target: Path, run: Run, task: Episodic, agent: Any, function: Any, carry: list[Any], code: Code
) -> dict[str, Any]:
    """Hold the written policy against the original along an episode, and time it."""
    # (an import would leave its bytecode in the folder)
    policy = runpy.run_path(str(target / "policy.py"))["Policy"](seed=0)
    looking = _Observations()
    original = evaluation_policy(run.algorithm, task.spec)
    evaluate_policy(original, agent, [task], episodes=1, seed=0, observer=looking)
    seen = looking.seen[:: -(-len(looking.seen) // CHECKED)]
    low, high = task.action_bounds
    worst, own = 0.0, policy.init_carry()
    for index, obs in enumerate(seen):
        expected, drawn = evaluate(function, [obs, *carry], key=jr.key(index))
        action, own = policy(obs, own, [drawn[place] for place in code.kept])
        carry = expected[1:]
        half = (np.asarray(high) - np.asarray(low)) / 2.0
        worst = max(worst, float(np.abs((action - low) / half - 1.0 - expected[0]).max()))
    if not worst <= TOLERANCE:
        raise RunStopped(
            f"the policy in {target} differs from the original by {worst:.2g} half action ranges, "
            f"more than {TOLERANCE:g}; do not use it, and please report this."
        )
    times = []
    for _ in range(TIMED):
        start = time.perf_counter()
        policy(seen[0], own)
        times.append(time.perf_counter() - start)
    return {
        "max_difference": worst,
        "latency_milliseconds": round(1e3 * statistics.median(times), 4),
        "observations": len(seen),
    }


def _example(run: Run, task: Any) -> str:
    """How the policy is used in its environment; where Gymnasium has none like it, for one step."""
    environment = run.environment.id
    if environment in ENVIRONMENTS or task_fields(run).keys() - {"max_episode_steps"}:
        return ACTION.format(
            obs_size=task.spec.obs_size, environment=_title(run).partition(" on ")[2]
        )
    limit = getattr(run.environment, "max_episode_steps", None)
    if limit is None and task.limited:
        limit = round(task.spec.horizon / task.spec.dt)
    make = f'gym.make("{environment}"{f", max_episode_steps={limit}" if limit else ""})'
    if task.flattened:
        make = f"gym.wrappers.FlattenObservation({make})"
    before = ""
    if environment.startswith("dm_control/"):
        before = "import shimmy\n\ngym.register_envs(shimmy)\n"
    action = "action"
    if len(task.action_shape) != 1:
        action = f"action.reshape({task.action_shape})"
    return EPISODE.format(before=before, make=make, action=action)


def _card(
    run: Run,
    seed: int,
    steps: int,
    returns: dict[int, list[float]],
    code: Code,
    measured: dict[str, Any],
    task: Episodic,
) -> str:
    figures: Any = summarize(list(returns.values()))
    environment = run.environment.id
    total, dataset = run.settings.total_steps, run.settings.dataset
    learned = "in simulation, in this environment with the settings above"
    if dataset is not None:
        learned = f"on recorded data (`{Path(dataset).name}`)"
        if run.settings.online_steps:
            learned += f", then for {run.settings.online_steps:,} steps in the environment"
        learned += ", and evaluated in simulation"
    return CARD.format(
        algorithm=algorithm_name(run.algorithm),
        environment=environment,
        slug=environment.replace("/", "-"),
        title=_title(run),
        mean=np.mean(returns[seed]),
        spread=np.std(returns[seed]),
        example=_example(run, task),
        steps=steps,
        counted="steps" if dataset is None else "steps, those on data included",
        episodes=len(returns[seed]),
        seed=seed,
        rows="\n".join(
            f"| {s} | {np.mean(values):.5g} | {np.std(values):.3g} |"
            for s, values in returns.items()
        ),
        over=figures["ci95_over"],
        iqm=figures["iqm"],
        low=figures["ci95"][0],
        high=figures["ci95"][1],
        finished="" if steps == total else f"The run is not finished: {steps:,} of {total:,}.\n",
        checked=measured["observations"],
        difference=measured["max_difference"],
        deterministic="It is deterministic."
        if not code.draws
        else "Its actions are random: each takes fresh Gaussian noise.",
        latency=measured["latency_milliseconds"],
        timed=TIMED,
        machine=platform.machine(),
        learned=learned,
        command=run.command(),
        versions=", ".join(f"{name} {version}" for name, version in run.versions.items()),
    )
