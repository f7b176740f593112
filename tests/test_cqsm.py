"""CQSM against linear-quadratic closed forms, and on a real task."""

import dataclasses
import json
import math
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import learn, random_batch

import qscore as qs
from qscore import lq
from qscore.algorithms.cqsm import quadratic_features
from qscore.closed_form import Comparison, _return_gap, compare, continuous, return_gap
from qscore.environments import LQ
from qscore.train_host import Session

EXAMPLES = Path(__file__).parents[1] / "examples" / "lq"
STEPS = 1_280_000  # 100 seconds in each of 128 copies


@pytest.fixture(scope="module")
def sessions():
    environment = LQ(id="lq")
    algorithm = qs.CQSM(preset="linear_quadratic")
    return [learn(environment, algorithm, seed, steps=STEPS) for seed in range(3)]


@pytest.mark.parametrize("seed", range(3))
def test_features_learn_the_closed_form(sessions, seed):
    session = sessions[seed]
    learned = (session.algorithm, LQ(id="lq"), session.runner.agent)
    error = compare(*learned).relative_error
    assert max(error.values()) < 0.02, error
    assert 0.0 <= return_gap(*learned) < 2e-4


def test_features_learn_a_problem_that_says_little_in_a_step():
    # unstable, multiplicative noise, feedback gains of 8: unweighted or stale sums run away here
    environment = LQ(id="lq", problem=(EXAMPLES / "four_states.json").read_text())
    session = learn(environment, qs.CQSM(preset="linear_quadratic"), seed=1, steps=STEPS)
    learned = (session.algorithm, environment, session.runner.agent)
    error = compare(*learned).relative_error
    assert error["score"] < 0.1, error
    assert 0.0 <= return_gap(*learned) < 0.03


def test_comparison_sees_a_wrong_score(sessions):
    agent = sessions[0].runner.agent
    half = dataclasses.replace(agent.average_score, theta=0.5 * agent.average_score.theta)
    wrong = dataclasses.replace(agent, average_score=half)
    learned = (sessions[0].algorithm, LQ(id="lq"), wrong)
    error = compare(*learned).relative_error
    assert 0.4 < error["score"] < 0.6
    assert error["q"] < 0.05
    assert return_gap(*learned) > 0.05


def test_irregular_steps_learn_it_too():
    environment = LQ(id="lq", dt_min=0.002, dt_max=0.018)
    session = learn(environment, qs.CQSM(preset="linear_quadratic"), steps=STEPS)
    error = compare(session.algorithm, environment, session.runner.agent).relative_error
    assert max(error.values()) < 0.04, error


@pytest.mark.slow
def test_finite_horizon_with_a_steep_terminal_reward():
    environment = LQ(id="lq", problem=(EXAMPLES / "steep.json").read_text())
    session = learn(environment, qs.CQSM(preset="linear_quadratic"), steps=STEPS)
    learned = (session.algorithm, environment, session.runner.agent)
    error = compare(*learned).relative_error
    assert max(error.values()) < 0.1, error
    assert 0.0 <= return_gap(*learned) < 0.02


def test_a_score_that_stays_inadmissible_is_explained(tmp_path, capsys):
    # an action of at most 8 cannot hold dx = (3 x + a / 20) dt
    problem = {
        "A": [[3.0]],
        "B": [[0.05]],
        "sigma_a": 0.6,
        "M": [[1.0, 0.0], [0.0, 0.1]],
        "score_cost": 30.0,
        "discount_rate": 0.2,
    }
    environment = LQ(id="lq", problem=json.dumps(problem), num_envs=16)
    algorithm = qs.CQSM(preset="linear_quadratic", warmup_steps=160, updates_per_step=1 / 16)
    run = qs.train(
        algorithm, environment, steps=4_800, eval_episodes=1, out=tmp_path / "run", progress=False
    )
    said = capsys.readouterr().err
    assert "seed 0 did not find a score with a finite value; the score was not admissible" in said
    gap = run.summary["lq"]["return_gap"][0]
    assert gap is None or gap > 1.0
    text = (run.folder / "summary.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_an_error_against_nothing_is_zero_or_infinite():
    zeros, ones = np.zeros((4, 1)), np.ones((4, 1))
    learned = {"q": 3.0 * ones, "grad_a_q": ones, "score": zeros}
    found = Comparison(learned, {"q": 2.0 * ones, "grad_a_q": zeros, "score": zeros})
    assert found.relative_error == {"q": 0.5, "grad_a_q": math.inf, "score": 0.0}


def test_the_gap_in_return_is_that_of_the_horizon():
    """Also where that is no whole number of control steps."""
    problem = {
        **json.loads(LQ("lq").problem),
        "terminal": {"T": 1.0, "H": [[1.0, 0.0], [0.0, 0.0]]},
    }
    environment = LQ("lq", problem=json.dumps(problem), dt=0.03)
    solved, steps = environment.solved_problem, 34
    exact = [lq.solve(solved, i / steps) for i in range(steps)]
    K, k = (jnp.asarray(np.stack([getattr(s, n) for s in exact]), jnp.float32) for n in "Kk")

    def score(agent, x, a, time):  # everywhere 2 per second above the optimal one
        i = (time * steps + 0.5).astype(jnp.int32)
        return K[i] @ jnp.concatenate([x, a]) + k[i] + 2.0

    lost = 0.5 * 0.3 * 2.0**2 * -np.expm1(-0.2) / 0.2  # lambda/2 |2|^2, discounted over 1 s
    best = exact[0].expected_q(np.zeros(2), 1.2**2 * np.eye(2))
    assert _return_gap(environment, score)(None) == pytest.approx(lost / abs(best), rel=0.005)


@pytest.mark.slow
def test_networks_learn_the_closed_form_in_a_quarter_of_the_time():
    session = learn(
        LQ(id="lq"), qs.CQSM(preset="linear_quadratic", critic="network"), steps=640_000
    )
    learned = (session.algorithm, LQ(id="lq"), session.runner.agent)
    error = compare(*learned).relative_error
    assert error["score"] < 0.12, error
    assert 0.0 <= return_gap(*learned) < 0.03


def held_optimum(problem, dt, substeps):
    """P, K and Q(0) of the fixed point of CQSM's equations with actions held over steps dt.

    By iteration: state by Euler steps, reward by the trapezoidal rule, then the action by one Euler
    step, with noise.
    """
    beta, G, size = problem.discount_rate, problem.G, len(problem.M)
    span = -np.expm1(-beta * dt) / beta
    euler = np.eye(size) + dt / substeps * problem.F
    held = np.linalg.matrix_power(euler, substeps)
    reward, reached = np.zeros_like(problem.M), np.eye(size)
    for _ in range(substeps):
        ahead = euler @ reached
        reward += 0.5 * (reached.T @ problem.M @ reached + ahead.T @ problem.M @ ahead) / substeps
        reached = ahead
    P = qs.lq.solve(problem).P
    for _ in range(100_000):
        K = -G.T @ P / problem.score_cost
        moved = np.eye(size) + dt * G @ K
        after = span * problem.score_cost * K.T @ K + np.exp(-beta * dt) * moved.T @ P @ moved
        last, P = P, span * reward + held.T @ after @ held
        if np.abs(P - last).max() < 1e-13:
            noise = dt * np.sum(np.diag(G.T @ P @ G)) * problem.sigma_a[0, 0] ** 2
            return P, K, 0.5 * noise * np.exp(-beta * dt) / np.expm1(-beta * dt)
    raise AssertionError("no fixed point")


@pytest.mark.parametrize("discount_rate", [0.01, 0.5])
def test_half_a_step_on_the_error_of_held_actions_is_what_the_page_says(discount_rate):
    problem = qs.lq.Problem(
        A=[[0.2, 0.5], [-0.5, -0.1]],
        B=[[1.0], [0.4]],
        sigma_a=0.5,
        M=np.diag([1.0, 0.5, 0.2]),
        score_cost=0.3,
        discount_rate=discount_rate,
    )
    exact = qs.lq.solve(problem)
    # what the score costs on the way: minus the value of a task without other rewards
    costs = qs.lq.evaluate(dataclasses.replace(problem, M=0.0 * problem.M), exact.K, exact.k)
    z = np.random.default_rng(0).standard_normal((500, 3))
    plain, corrected = {}, {}
    for dt in (0.04, 0.02):
        P, K, constant = held_optimum(problem, dt, substeps=64)
        P, K = jnp.asarray(P, jnp.float32), jnp.asarray(K, jnp.float32)

        def at(z, P=P, K=K, dt=dt):
            full = lambda a: jnp.concatenate([z[:2], a])  # noqa: E731

            def both(a):
                return continuous(
                    lambda a: -0.5 * full(a) @ P @ full(a),
                    lambda a: K @ full(a),
                    a,
                    score_cost=problem.score_cost,
                    action_noise=problem.sigma_a,
                    dt=dt,
                )

            (q, score), gradient = jax.value_and_grad(both, has_aux=True)(z[2:])
            return q, gradient, problem.score_cost * score

        q, *gradients = jax.vmap(at)(jnp.asarray(z, jnp.float32))
        # charged half a step early; and blind to the action's noise for half a step on average
        early = 0.5 * discount_rate * dt
        response = problem.sigma_a @ exact.K[:, 2:].T
        blind = 0.25 * dt * problem.score_cost * np.sum(response**2) / discount_rate
        q = np.asarray(q, np.float64) + constant - early * costs.q(z) + blind
        gradients = [np.asarray(g, np.float64) - early * costs.gradient(z) for g in gradients]
        slopes = z @ np.asarray(P)
        held = constant - 0.5 * np.sum(z * slopes, axis=1), -slopes[:, 2:], -slopes[:, 2:]
        truths = exact.q(z), exact.gradient(z), exact.gradient(z)
        for errors, found in ((plain, held), (corrected, (q, *gradients))):
            errors[dt] = [
                np.linalg.norm(one - truth) / np.linalg.norm(truth)
                for one, truth in zip(found, truths, strict=True)
            ]
    shares = 0.2, 0.15, 0.15
    for share, one, coarse, fine in zip(
        shares, plain[0.04], corrected[0.04], corrected[0.02], strict=True
    ):
        assert one > 0.02 and coarse < share * one
        assert coarse / fine > 3.0
    assert plain[0.04][1] / plain[0.02][1] == pytest.approx(2.0, rel=0.2)


@pytest.mark.parametrize("action", [-1.0, 0.0, 0.8])
def test_the_control_variate_takes_off_noise_and_no_mean(action):
    algorithm = qs.CQSM(hidden=(16,), critics=1, inner_steps=1, normalize_inputs=False)
    state = algorithm.init(qs.Spec(2, 1, dt=0.1), key=jr.key(0))
    plain = dataclasses.replace(algorithm, control_variate=False)
    keys = jr.split(jr.key(1), 100_000)
    here = jnp.array([0.3, -0.4]), jnp.array([action])

    def values(algorithm):
        draw = lambda key: algorithm.next_q(state, *here, jnp.float32(0.1), key=key)[0][0]  # noqa: E731
        return np.asarray(jax.jit(jax.vmap(draw))(keys), np.float64)

    with_it, without = values(algorithm), values(plain)
    assert np.mean(with_it) == pytest.approx(np.mean(without), abs=float(0.02 * np.std(without)))
    assert np.std(with_it) < 0.3 * np.std(without)


def test_features_are_all_monomials_up_to_degree_two_times_polynomials_of_time():
    obs, action = jnp.array([2.0, 0.5]), jnp.array([3.0])
    plain = quadratic_features(obs, action, 0)
    np.testing.assert_allclose(plain, [1.0, 2.0, 0.5, 3.0, 4.0, 1.0, 6.0, 0.25, 1.5, 9.0])
    timed = quadratic_features(jnp.array([2.0, 0.75]), action, 3)
    base = np.array([1.0, 2.0, 3.0, 4.0, 6.0, 9.0])
    x = 2.0 * 0.75 - 1.0
    expected = np.concatenate([base, x * base, (2 * x**2 - 1) * base, (4 * x**3 - 3 * x) * base])
    np.testing.assert_allclose(timed, expected, rtol=1e-6)


def test_a_prescribed_cost_is_a_reward_and_no_time():
    spec = qs.Spec(1, 1, dt=0.2, score_cost=19.2, discount_rate=0.3)
    for algorithm, cost in (
        (qs.CQSM(), 0.05),
        (qs.CQSM(cost_unit="reward"), 19.2),
        (qs.CQSM(score_cost=0.4), 0.4),
    ):
        constants = algorithm.constants(spec)
        assert float(constants.score_cost) == pytest.approx(cost)
        assert float(constants.discount_rate) == pytest.approx(0.3)


def test_features_wait_until_they_have_seen_the_end_of_the_horizon():
    algorithm = qs.CQSM(preset="linear_quadratic", test_function="gradient")
    spec = qs.Spec(2, 1, dt=0.5, horizon=1.0, clock=("time",))
    rows = random_batch(spec, 64, jr.key(0))
    rows = dataclasses.replace(rows, terminated=jnp.zeros(64, bool))
    last = dataclasses.replace(rows, terminated=jnp.ones(64, bool))
    update = jax.jit(lambda state, batch: algorithm.update(state, batch, key=jr.key(1))[0])
    state: Any = algorithm.init(spec, key=jr.key(2))
    for _ in range(8):  # four horizons long
        state = update(state, rows)
    assert not np.any(state.critic.theta) and not np.any(state.score.theta)
    state = update(state, last)  # 64 and 128 ends, for 54 coefficients
    assert np.any(state.critic.theta) and np.any(state.score.theta)


def test_features_need_a_discount_or_an_end(tmp_path):
    algorithm = qs.CQSM(preset="linear_quadratic", discount_rate=0.0)
    with pytest.raises(qs.UsageError, match="`discount_rate` is 0 and .* above 0"):
        qs.train(algorithm, "lq", steps=1_280, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    algorithm.init(qs.Spec(2, 1, dt=0.1, horizon=1.0, clock=("time",)), key=jr.key(0))


def test_a_value_may_reach_beyond_the_time_limit():
    problem = json.loads(LQ("lq").problem) | {"r0": 20.0, "discount_rate": 1e-4}
    environment = LQ("lq", problem=json.dumps(problem))
    task = environment.open()
    reward = 20.0 * environment.dt
    session: Any = types.SimpleNamespace(spec=task.spec, largest_reward=reward)
    task.close()
    right = lq.solve(environment.solved_problem).expected_q(np.zeros(2), np.eye(2))
    assert 1e5 < right < Session._credible_value(session)


def test_the_action_process_has_the_scores_drift_and_the_given_noise():
    algorithm = qs.CQSM(critic="features", inner_steps=50, first_action=0.0, cost_unit="reward")
    spec = qs.Spec(1, 1, dt=0.2, score_cost=0.5, action_noise=((0.3,),))
    state = algorithm.init(spec, key=jr.key(0))
    # score = grad_a(-a^2) / 0.5 = -4 a: an Ornstein-Uhlenbeck process
    theta = jnp.zeros(6).at[5].set(-1.0)
    score = dataclasses.replace(state.score, theta=theta)
    state = dataclasses.replace(state, score=score, average_score=score)
    start = dataclasses.replace(
        algorithm.init_carry(spec), action=jnp.array([0.5]), begun=jnp.array(True)
    )
    act = jax.vmap(
        lambda key: algorithm.act(state, start, jnp.zeros(1), key=key, explore=True)[0][0]
    )
    actions = np.asarray(jax.jit(act)(jr.split(jr.key(1), 20_000)))
    decay = np.exp(-4.0 * 0.2)
    assert np.mean(actions) == pytest.approx(0.5 * decay, abs=0.015)
    assert np.var(actions) == pytest.approx(0.3**2 * (1.0 - decay**2) / 8.0, rel=0.08)
    still, carry = algorithm.act(state, start, jnp.zeros(1), key=jr.key(2), explore=False)
    assert float(still[0]) == pytest.approx(0.5 * decay, abs=0.02)
    np.testing.assert_array_equal(still, carry.action)


def test_an_episode_begins_at_the_origin_of_the_action_process_unless_exploring():
    algorithm = qs.CQSM(critic="features", first_action=0.2, action_noise=0.0)
    spec = qs.Spec(1, 2, dt=0.05)
    state = algorithm.init(spec, key=jr.key(0))  # the first score is zero
    carry = algorithm.init_carry(spec)
    action, moved = algorithm.act(state, carry, jnp.zeros(1), key=jr.key(1), explore=False)
    np.testing.assert_array_equal(action, jnp.zeros(2))
    assert bool(moved.begun)
    act = jax.vmap(lambda key: algorithm.act(state, carry, jnp.zeros(1), key=key, explore=True)[0])
    firsts = np.asarray(jax.jit(act)(jr.split(jr.key(1), 2_000)))
    assert np.std(firsts) == pytest.approx(0.2, rel=0.05)


@pytest.mark.slow
def test_networks_learn_pendulum():
    algorithm = qs.CQSM(hidden=(64, 64), batch_size=128)
    session = learn(qs.Host("Pendulum-v1"), algorithm, steps=6_000, eval_episodes=1)
    returns, _ = session.evaluate(0)
    assert np.mean(returns) > -250.0
