"""The benchmark of errors against the control step: its exact curves, and that it runs."""

import dataclasses
import importlib
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import qscore as qs
from qscore import replay


@pytest.fixture
def experiment(monkeypatch):
    """The experiment, imported as its command does, with its folder on the path."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "experiments"))
    yield importlib.import_module("dt_robustness")
    for name in ("dt_robustness", "common"):
        sys.modules.pop(name)


def test_the_discrete_optimum_beats_its_neighbours_and_has_its_own_value(experiment):
    problem, dt = qs.lq.Problem.from_json(experiment.PROBLEM), 0.05
    P, gain = experiment.discrete_optimum(problem, dt)

    def earned(first, gain):
        """Discounted rewards without noise from x = 1 and this first action, for 60 seconds."""
        x, u, total, discount = 1.0, first, 0.0, 1.0
        for _ in range(1200):
            z = np.array([x, u])
            after = np.array([x + dt * (0.3 * x + u), u])
            rate = lambda z: -0.5 * z @ problem.M @ z  # noqa: E731
            total += discount * 0.5 * dt * (rate(z) + rate(after))
            x, discount = after[0], discount * np.exp(-problem.discount_rate * dt)
            u = gain * x
        return total

    best = float(gain[0, 0])
    for u in (-1.0, 0.0, 2.0):
        z = np.array([1.0, u])
        assert earned(u, best) == pytest.approx(-0.5 * z @ P @ z, rel=1e-9)
    for other in (0.98 * best, 1.02 * best):
        assert earned(best, best) > earned(other, other)


def test_only_the_discrete_gradient_vanishes_with_the_step(experiment):
    problem = qs.lq.Problem.from_json(experiment.PROBLEM)
    rms = {dt: experiment.gradient_rms(experiment.discrete_optimum(problem, dt)[0], 1) for dt in
           (0.01, 0.005, 0.0025)}  # fmt: skip
    assert rms[0.01] / rms[0.005] == pytest.approx(2.0, rel=0.03)
    assert rms[0.005] / rms[0.0025] == pytest.approx(2.0, rel=0.015)
    exact = qs.lq.solve(problem)
    z = np.random.default_rng(0).standard_normal((100_000, 2))
    expected = np.sqrt(np.mean(exact.gradient(z) ** 2))
    assert experiment.gradient_rms(exact.P, 1) == pytest.approx(expected, rel=0.02)


def test_the_discrete_learner_finds_its_optimum(experiment):
    environment, rows, updates = experiment.environment_of("0.05"), 256, 2_000
    problem, dt, spec = environment.solved_problem, environment.dt, environment.spec
    learner = experiment.LEARNERS["q"](dt, hidden=(32, 32))
    empty = replay.empty_rows(spec, rows)

    def rate(x, u):
        return -0.5 * (problem.M[0, 0].item() * x**2 + problem.M[1, 1].item() * u**2)

    @jax.jit
    def train(key):
        def step(state, key):
            state_key, action_key, noise_key, update_key = jr.split(key, 4)
            x, noise = jr.normal(state_key, (rows,)), jr.normal(noise_key, (rows,))
            action = jr.uniform(action_key, (rows,), minval=-1.0, maxval=1.0)
            u = environment.bound * action
            following = x + dt * (0.3 * x + u) + 0.3 * np.sqrt(dt).item() * noise
            batch = dataclasses.replace(
                empty,
                obs=x[:, None],
                action=action[:, None],
                reward=0.5 * dt * (rate(x, u) + rate(following, u)),
                next_obs=following[:, None],
                dt=jnp.full(rows, dt, jnp.float32),
            )
            return learner.update(state, batch, key=update_key)[0], None

        init_key, loop_key = jr.split(key)
        state = learner.init(spec, key=init_key)
        return jax.lax.scan(step, state, jr.split(loop_key, updates))[0]

    assert experiment.policy_error(learner, environment, train(jr.key(0))) < 0.1


def test_what_was_learned_is_kept_and_results_of_other_settings_are_not_mixed(experiment, tmp_path):
    out = tmp_path / "x.json"
    before = {"commit": "abc", "steps": 5, "algorithms": {"q": {"0.1": {"0": 7.0}}}}
    out.write_text(json.dumps(before))
    args = experiment.arguments(None, "x").parse_args(["--out", str(out)])

    def killed():
        raise KeyboardInterrupt

    wanted = {("q", "0.1", "0"): killed, ("q", "0.1", "1"): lambda: 8.0, ("q", "0.2", "0"): killed}
    with pytest.raises(KeyboardInterrupt):
        experiment.learn_missing(args, wanted, steps=5)
    after = json.loads(out.read_text())
    assert after["algorithms"] == {"q": {"0.1": {"0": 7.0, "1": 8.0}}}
    assert after["steps"] == 5 and set(after["trained_at"]) == {"abc", after["commit"]}
    with pytest.raises(qs.UsageError, match=r"x\.json holds results of other `steps`"):
        experiment.learn_missing(args, {}, steps=6)
