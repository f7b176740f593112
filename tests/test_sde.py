"""Euler-Maruyama against exact solutions and an independent solver, and the environments on it."""

import dataclasses
import json
import math
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import qscore as qs
from qscore import sde
from qscore.environments import ENVIRONMENTS, DoubleWell, Portfolio
from qscore.environments.base import EnvironmentFailure
from qscore.rollout import DeviceCollector, evaluate_on_device, record
from qscore.train_host import Observer, Session, episode_seed, evaluate, evaluation_policy

PATHS = 4_000


def strong_error(process, exact, steps, key):
    """E|X_1 - exact| for one step size, from x = 1, over many paths."""
    dt = 1.0 / steps

    def error(key):
        dw = math.sqrt(dt) * jr.normal(key, (steps, 1))
        end = sde.simulate(process, jnp.ones(1), dw, dt=dt)[-1, 0]
        return jnp.abs(end - exact(dw[:, 0], dt))

    return float(jnp.mean(jax.jit(jax.vmap(error))(jr.split(key, PATHS))))


def test_strong_order_is_one_half_with_multiplicative_noise():
    mu, vol = 0.2, 0.8
    process = sde.SDE(lambda t, x, a: mu * x, lambda t, x, a: vol * x[:, None], 1)

    def exact(dw, dt):
        return jnp.exp(mu - 0.5 * vol**2 + vol * jnp.sum(dw))

    coarse, fine = (strong_error(process, exact, n, jr.key(0)) for n in (16, 256))
    order = math.log(coarse / fine) / math.log(16)
    assert 0.4 < order < 0.6


def test_strong_order_is_one_with_additive_noise():
    # dX = -X dt + dW: X_1 = e^{-1} + int e^{-(1 - s)} dW, whose finest sum stands for the integral
    process = sde.SDE(lambda t, x, a: -x, lambda t, x, a: jnp.ones((1, 1)), 1)
    finest = 4096

    def errors(key):
        dw = math.sqrt(1.0 / finest) * jr.normal(key, (finest, 1))
        paths = {
            n: sde.simulate(process, jnp.ones(1), dw.reshape(n, -1).sum(1)[:, None], dt=1.0 / n)
            for n in (16, 64, finest)
        }
        return jnp.stack([jnp.abs(paths[n][-1, 0] - paths[finest][-1, 0]) for n in (16, 64)])

    coarse, fine = np.mean(jax.jit(jax.vmap(errors))(jr.split(jr.key(1), 300)), axis=0)
    assert 0.85 < math.log(coarse / fine) / math.log(4) < 1.15


def test_agrees_with_an_independent_solver_path_by_path():
    steps, dt = 50, 0.02
    noise = jnp.array([[0.3, 0.1], [0.0, 0.2]])
    brownian = diffrax.VirtualBrownianTree(0.0, 1.0, tol=1e-4, shape=(2,), key=jr.key(2))

    def drift(t, x):
        return jnp.array([x[1], -jnp.sin(x[0]) + t])

    def diffusion(t, x):
        return noise * (1.0 + 0.1 * x[0])

    times = jnp.array([i * dt for i in range(steps + 1)], jnp.float32)
    pieces: Any = jax.jit(jax.vmap(brownian.evaluate))
    increments = pieces(times[:-1], times[1:])
    process = sde.SDE(lambda t, x, a: drift(t, x), lambda t, x, a: diffusion(t, x), 2)
    ours = sde.simulate(process, jnp.array([1.0, 0.0]), increments, dt=dt)
    terms = diffrax.MultiTerm(
        diffrax.ODETerm(lambda t, x, args: drift(t, x)),
        diffrax.ControlTerm(lambda t, x, args: diffusion(t, x), brownian),
    )
    theirs: Any = diffrax.diffeqsolve(
        terms,
        diffrax.Euler(),
        0.0,
        1.0,
        dt,
        jnp.array([1.0, 0.0]),
        saveat=diffrax.SaveAt(t1=True),
    ).ys
    np.testing.assert_allclose(ours[-1], theirs[0], atol=2e-5)


def test_reward_is_discounted_within_the_step():
    still = sde.SDE(lambda t, x, a: jnp.zeros(1), lambda t, x, a: jnp.zeros((1, 1)), 1)
    rate, dt = 1.5, jnp.array(0.8)
    _, reward = sde.advance(
        still,
        lambda t, x, a: jnp.array(3.0),
        jnp.zeros(()),
        jnp.zeros(1),
        jnp.zeros(1),
        dt,
        key=jr.key(3),
        substeps=200,
        discount_rate=rate,
    )
    assert abs(float(reward) - 3.0 * (1.0 - math.exp(-rate * 0.8)) / rate) < 1e-4


def test_accumulated_reward_is_the_discounted_integral():
    # dX = dW from 0: E int_0^T e^{-b t} X^2 dt = int t e^{-b t} dt
    free = sde.SDE(lambda t, x, a: jnp.zeros(1), lambda t, x, a: jnp.ones((1, 1)), 1)
    rate, dt, steps = 0.7, 0.01, 200
    total = jax.jit(
        jax.vmap(
            lambda key: sde.accumulate(
                free,
                lambda t, x, a: x[0] ** 2,
                jnp.zeros(1),
                dt=dt,
                steps=steps,
                key=key,
                discount_rate=rate,
            )
        )
    )(jr.split(jr.key(4), PATHS))
    end = dt * steps
    exact = (1.0 - math.exp(-rate * end) * (1.0 + rate * end)) / rate**2
    error = np.std(total) / math.sqrt(PATHS)
    assert abs(float(np.mean(total)) - exact) < 4.0 * error + rate * dt


# Environments -------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=list(ENVIRONMENTS))
def environment(request):
    kind = ENVIRONMENTS[request.param]
    return kind(id=request.param, duration=20 * kind(id=request.param).dt)


def test_an_episode_lasts_its_duration_and_repeats_from_its_seed(environment):
    task = environment.open()
    actions = np.random.default_rng(0).uniform(-1, 1, (40, task.spec.action_size))
    runs = []
    for _ in range(2):
        observations, steps = [task.reset(7)], []
        for action in actions:
            steps.append(task.step(action))
            observations.append(steps[-1].next_obs)
            if steps[-1].terminated or steps[-1].truncated:
                break
        runs.append(np.stack(observations))
        assert len(steps) == 20
        assert steps[-1].terminated == environment.finite_horizon
    np.testing.assert_array_equal(*runs)
    assert not np.array_equal(task.reset(8), runs[0][0])
    assert task.render().dtype == np.uint8 and task.render().ndim == 3


@pytest.mark.parametrize(
    ("duration", "dt", "steps"),
    [
        (1.0, 0.002, 500),
        (50.0, 0.05, 1_000),
        (10.0, 1e-4, 100_000),
        (1.04, 0.1, 11),
        (0.05, 0.1, 1),
    ],
)
@pytest.mark.parametrize("name", ["double_well", "portfolio"])
def test_an_episode_has_all_its_steps_and_no_sliver(name, duration, dt, steps):
    environment = ENVIRONMENTS[name](id=name, duration=duration, dt=dt)

    @jax.jit
    def episode(state):
        def step(inputs):
            state, _ = inputs
            state, out = environment.advance(state, jnp.zeros(1), key=jr.key(0))
            return state, out

        return jax.lax.while_loop(
            lambda inputs: ~(inputs[1].terminated | inputs[1].truncated), step, step((state, None))
        )

    state, out = episode(environment.begin(jr.key(0)))
    assert int(state.steps) == steps == environment.episode_steps
    rest = duration - (steps - 1) * dt if environment.finite_horizon else dt
    assert float(out.dt) == pytest.approx(rest, rel=1e-6)
    end = duration if environment.finite_horizon else steps * dt
    assert float(state.time) == pytest.approx(end, rel=1e-6)


def test_the_return_of_a_long_episode_is_its_sum():
    class Even(type(ENVIRONMENTS["double_well"](id="double_well"))):
        def reward_rate(self, time, x, action):
            return jnp.ones(())

    environment = Even(id="even", duration=300.0, dt=1e-3)
    algorithm = qs.TD3(hidden=(4,))
    agent = algorithm.init(environment.spec, key=jr.key(0))
    (total,), (steps,) = evaluate_on_device(algorithm, environment, agent, [0], key=jr.key(0))
    assert steps == 300_000 and total == pytest.approx(300.0, rel=1e-6)


def test_recordings_reach_the_end_of_a_horizon_that_is_no_whole_number_of_steps():
    environment = ENVIRONMENTS["portfolio"](id="portfolio", duration=0.104, dt=0.01)
    zero = lambda *inputs: jnp.zeros(1)  # noqa: E731
    rows = record(environment, zero, zero, paths=3, key=jr.key(0))
    assert rows.reward.shape == (3, 11)
    assert np.asarray(rows.terminated)[:, -1].all()


# no score keeps dx = (60 x + a) dt finite; its episodes of 100 steps end where a chunk does
RUNAWAY = ENVIRONMENTS["lq"](
    id="lq",
    problem=json.dumps(
        {
            "A": [[60.0]],
            "B": [[1.0]],
            "sigma_a": 0.6,
            "M": [[1.0, 0.0], [0.0, 0.1]],
            "score_cost": 0.1,
            "discount_rate": 0.2,
        }
    ),
)


def test_what_leaves_the_numbers_and_begins_anew_within_a_chunk_is_seen():
    algorithm = qs.TD3(hidden=(8,), warmup_steps=10**6)
    collector = DeviceCollector(algorithm, RUNAWAY, jr.key(0))
    agent = algorithm.init(RUNAWAY.spec, key=jr.key(0))
    with pytest.raises(EnvironmentFailure, match="lq diverged"):
        for chunk in range(2):
            collector.collect(agent, chunk * collector.chunk, collector.chunk)


def test_an_evaluation_that_leaves_the_numbers_is_refused():
    algorithm = qs.TD3(hidden=(8,))
    agent = algorithm.init(RUNAWAY.spec, key=jr.key(0))
    with pytest.raises(EnvironmentFailure, match="lq diverged in an evaluation"):
        evaluate_on_device(algorithm, RUNAWAY, agent, [0, 1], key=jr.key(0))


def test_irregular_steps_are_drawn_and_observed(environment):
    dt = environment.dt
    irregular = dataclasses.replace(environment, dt_min=0.2 * dt, dt_max=1.8 * dt)
    assert irregular.spec.dt == pytest.approx(dt)
    assert irregular.spec.clock[-1] == "dt"
    state = irregular.begin(jr.key(0))
    advance = jax.jit(lambda state, key: irregular.advance(state, jnp.zeros(1), key=key))
    if irregular.spec.action_size != 1:
        pytest.skip("one action is enough to draw steps")
    lengths = []
    for i in range(15):
        state, out = advance(state, jr.key(i))
        lengths.append(float(out.dt))
        assert float(out.obs[-1]) == lengths[-1]
    if not irregular.finite_horizon:  # the last step of a finite horizon is cut to fit
        assert 0.2 * dt <= min(lengths) < 0.7 * dt and 1.3 * dt < max(lengths) <= 1.8 * dt
    assert float(state.time) == pytest.approx(sum(lengths), rel=1e-5)


def test_device_and_host_play_the_same_episodes(environment):
    algorithm = qs.CQSM(critic="features")
    spec = environment.spec
    agent: Any = algorithm.init(spec, key=jr.key(0))
    key = jr.key(5)
    theta = 0.1 * jr.normal(key, agent.critic.theta.shape)
    quadratic = dataclasses.replace(agent.average_score, theta=theta)
    scale = jnp.ones(())
    agent = dataclasses.replace(agent, average_score=quadratic, gradient_scale=scale)
    seeds = [episode_seed(1, 0, i) for i in range(3)]
    returns, lengths = evaluate_on_device(algorithm, environment, agent, seeds, key=jr.key(0))
    act = jax.jit(lambda carry, obs: algorithm.act(agent, carry, obs, key=key, explore=False))
    task = environment.open()
    for seed, total, length in zip(seeds, returns, lengths, strict=True):
        obs, carry, rewards = task.reset(seed), algorithm.init_carry(spec), []
        while True:
            action, carry = act(carry, obs)
            step = task.step(np.asarray(action))
            rewards.append(step.reward)
            obs = step.next_obs
            if step.terminated or step.truncated:
                break
        assert len(rewards) == length
        assert sum(rewards) == pytest.approx(total, rel=1e-4, abs=1e-4)


def test_an_evaluation_that_is_watched_is_the_same():
    """With noise in the policy, beyond the episodes that go side by side."""
    environment = DoubleWell("double_well", duration=0.5)
    algorithm = qs.DiffusionQL(hidden=(8,), noise_levels=3)
    agent = algorithm.init(environment.spec, key=jr.key(0))
    policy = evaluation_policy(algorithm, environment.spec)
    tasks: list[Any] = [environment.open() for _ in range(policy.rows)]
    episodes = policy.rows + 3
    alone, watched = (
        evaluate(policy, agent, tasks, episodes=episodes, seed=3, observer=observer)
        for observer in (None, Observer())
    )
    assert alone[1] == watched[1] and len(set(np.round(alone[0], 4))) == episodes
    np.testing.assert_allclose(alone[0], watched[0], atol=1e-4)


def test_a_restored_session_ends_where_the_other_does():
    algorithm = qs.CQSM(hidden=(8, 8), batch_size=16, warmup_steps=100)
    environment = ENVIRONMENTS["double_well"](id="double_well", num_envs=4, duration=1.0)

    def begin():
        return Session(algorithm, environment, 3, steps=1_000, eval_episodes=2)

    whole, restored = begin(), begin()
    while whole.env_steps < 400:
        whole.advance(400)
    counters, arrays = whole.snapshot()
    arrays = jax.tree.map(np.asarray, arrays)  # as a checkpoint gives them back
    assert restored.restore(json.loads(json.dumps(counters)), arrays)
    for session in (whole, restored):
        while session.env_steps < 1_000:
            session.advance(1_000)
    assert whole.evaluate(0) == restored.evaluate(0)
    for a, b in zip(
        jax.tree.leaves(whole.snapshot()), jax.tree.leaves(restored.snapshot()), strict=True
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dt": 0.0}, "`dt` must lie in"),
        ({"dt_min": 0.01}, "go together"),
        ({"dt_min": 0.2, "dt_max": 0.1}, "must not exceed `dt_max`"),
        ({"substeps": 0}, "`substeps` must lie in"),
        ({"duration": 1e9, "dt": 1e-3}, "at most 1e\\+09 steps, got 1e\\+09 s in steps of 0.001 s"),
    ],
)
def test_impossible_times_are_refused(fields, message):
    problem = json.loads(RUNAWAY.problem) | {"A": [[0.3]], "terminal": {"T": 1e8}}
    with pytest.raises(ValueError, match="`duration` must be at most"):
        ENVIRONMENTS["lq"](id="lq", problem=json.dumps(problem))
    with pytest.raises(ValueError, match=message):
        ENVIRONMENTS["double_well"](id="double_well", **fields)


def test_pendulum_is_gymnasiums():
    import gymnasium as gym

    ours = ENVIRONMENTS["pendulum_sde"](id="pendulum_sde", kick=0.0, dt=0.0005, substeps=1)
    theirs = gym.make("Pendulum-v1").unwrapped
    theirs.reset(seed=0)
    theirs.dt = 0.0005  # pyright: ignore[reportAttributeAccessIssue]
    x = jnp.array([2.0, 0.5])
    theirs.state = np.array([2.0, 0.5])  # pyright: ignore[reportAttributeAccessIssue]
    state = dataclasses.replace(ours.begin(jr.key(0)), x=x)
    _, out = jax.jit(lambda s: ours.advance(s, jnp.array([0.6]), key=jr.key(1)))(state)
    obs, reward, *_ = theirs.step(np.array([1.2]))
    # Gymnasium moves the angle with the new velocity: apart by O(dt^2)
    np.testing.assert_allclose(out.obs, obs, atol=1e-5)
    # a rate against a step: Gymnasium's reward is that of 0.05 s
    assert float(out.reward) / 0.0005 * 0.05 == pytest.approx(float(reward), rel=2e-3)


# Portfolio choice ---------------------------------------------------------------------------------


def test_portfolio_earns_its_closed_form_under_the_optimal_rule_and_less_under_others():
    environment = Portfolio(id="portfolio", dt=1.0 / 500.0, leverage=50.0)
    process = environment.process()
    x0 = jnp.array([1.0])

    def mean_reward(rule):
        def drift(t, x, _):
            return process.drift(t, x, rule(x))

        def diffusion(t, x, _):
            return process.diffusion(t, x, rule(x))

        closed = sde.SDE(drift, diffusion, 1)

        def one(key):
            dw = math.sqrt(environment.dt) * jr.normal(key, (500, 1))
            end = sde.simulate(closed, x0, dw, dt=environment.dt)[-1]
            return environment.terminal_reward(end, end)

        rewards = jax.jit(jax.vmap(one))(jr.split(jr.key(6), 40_000))
        return float(jnp.mean(rewards)), float(jnp.std(rewards)) / 200.0

    best, error = mean_reward(environment.optimal_money)
    exact = float(environment.optimal_value(jnp.zeros(()), x0))
    assert abs(best - exact) < 4.0 * error + 0.01 * abs(exact)
    for factor in (0.6, 1.5):
        other, _ = mean_reward(lambda x, factor=factor: factor * environment.optimal_money(x))
        assert other < best - 4.0 * error
