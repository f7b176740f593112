"""CQSM from recorded data, against linear-quadratic closed forms."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import qscore as qs
from qscore import lq, martingale, offline, rollout
from qscore.environments import LQ

EPISODIC = """{"A": [[-0.2]], "B": [[1.0]], "noise": [{"C": [[0.2]], "D": [[0.1]], "e": [0.3]}],
 "sigma_a": 0.6, "M": [[1.0, 0.0], [0.0, 0.1]], "score_cost": 0.3, "discount_rate": 0.4,
 "terminal": {"T": 1.0, "H": [[1.0, 0.5], [0.5, 0.6]]}}"""
FINITE = LQ(id="lq", problem=EPISODIC, spread=2.0)
INFINITE = LQ(id="lq")  # unstable: the zero score is inadmissible
ALGORITHM = qs.CQSM(preset="linear_quadratic")
BEHAVIOUR = (np.array([[-0.7, -1.6]]), np.zeros(1))
TARGET = (np.array([[-1.0, -2.0]]), np.array([0.1]))
FAR = (np.array([[0.8, -1.5]]), np.zeros(1))
TIMES = (0.0, 0.25, 0.5, 0.75)
BOUND = 8.0


def linear(K, k):
    """The score K z + k for actions in [-1, 1]."""
    gain, offset = jnp.asarray(K, jnp.float32), jnp.asarray(k, jnp.float32)
    return lambda obs, action: (gain @ jnp.append(obs[:1], BOUND * action) + offset) / BOUND


def episodes(environment, score, paths, seed=0):
    """Actions that follow a score, or that are drawn anew at every step for None."""
    noise = environment.solved_problem.sigma_a[0, 0] / BOUND * np.sqrt(environment.dt)

    def draw(obs, key):
        return environment.spread / BOUND * jr.normal(key, (1,))

    def move(obs, action, key):
        if score is None:
            return draw(obs, key)
        return action + environment.dt * score(obs, action) + np.float32(noise) * jr.normal(key)

    return rollout.record(environment, draw, move, paths=paths, key=jr.key(seed))


def error(environment, agent, exact, name):
    """Relative L2 error of "grad_a_q" or "score" over z ~ N(0, I) and the episode."""
    timed = environment.finite_horizon
    z = np.random.default_rng(0).standard_normal((2_000, 2))
    apart, size = 0.0, 0.0
    for time in TIMES if timed else (0.0,):

        def found(z, time=time):
            obs = jnp.append(z[:1], jnp.float32(time)) if timed else z[:1]

            def q_and_score(a):
                return ALGORITHM.value_and_score(agent, obs, a / BOUND)

            if name == "score":
                return BOUND * q_and_score(z[1:])[1]
            return jax.grad(lambda a: q_and_score(a)[0])(z[1:])

        solution = exact(time)
        truth = solution.score(z) if name == "score" else solution.gradient(z)
        difference = np.asarray(jax.vmap(found)(jnp.asarray(z, jnp.float32))) - truth
        apart, size = apart + np.mean(difference**2), size + np.mean(truth**2)
    return float(np.sqrt(apart / size))


def valued(score):
    return lambda time: lq.evaluate(FINITE.solved_problem, score[0], score[1], time)


@pytest.fixture(scope="module")
def recorded():
    return episodes(FINITE, linear(*BEHAVIOUR), 5_000)


@pytest.fixture(scope="module")
def small():
    return episodes(FINITE, linear(*BEHAVIOUR), 20)


def by_loss(data, score, *, behaviour=linear(*BEHAVIOUR), rounds=8):  # noqa: B008
    return offline.evaluate(
        ALGORITHM,
        FINITE.spec,
        data,
        score=linear(*score),
        method="martingale_loss",
        behaviour=behaviour,
        rounds=rounds,
    )


def test_the_martingale_loss_finds_the_behaviours_value(recorded):
    found = by_loss(recorded, BEHAVIOUR)
    assert error(FINITE, found.agent, valued(BEHAVIOUR), "grad_a_q") < 0.06
    assert found.changes == pytest.approx([1.0] + [0.0] * 7, abs=1e-4)  # nothing to correct


@pytest.mark.parametrize("score", [TARGET, FAR], ids=["near", "far"])
def test_the_off_policy_correction_finds_the_targets_value(recorded, score):
    found = by_loss(recorded, score)
    assert error(FINITE, found.agent, valued(score), "grad_a_q") < 0.06
    assert found.changes[-1] < 0.01
    # the target in the penalty only, with the behaviour's paths: wrong by a lot
    penalised = by_loss(recorded, score, rounds=1)
    assert error(FINITE, penalised.agent, valued(score), "grad_a_q") > 0.2
    deceived = by_loss(recorded, score, behaviour=linear(*score))
    assert error(FINITE, deceived.agent, valued(score), "grad_a_q") > 0.2


def test_least_squares_find_the_value_of_a_distant_score_from_the_same_paths(recorded):
    found = offline.evaluate(ALGORITHM, FINITE.spec, recorded, score=linear(*FAR))
    assert error(FINITE, found.agent, valued(FAR), "grad_a_q") < 0.06
    assert error(FINITE, found.agent, valued(BEHAVIOUR), "grad_a_q") > 0.2


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_twenty_thousand_paths_give_two_percent(seed):
    environment = dataclasses.replace(FINITE, dt=0.005)
    data = episodes(environment, linear(*BEHAVIOUR), 20_000, seed)
    found = by_loss(data, TARGET, rounds=4)
    assert error(environment, found.agent, valued(TARGET), "grad_a_q") < 0.02


def test_improving_by_the_martingale_loss_reaches_the_optimum(recorded):
    found = offline.improve(
        ALGORITHM,
        FINITE.spec,
        recorded,
        method="martingale_loss",
        behaviour=linear(*BEHAVIOUR),
        start=linear(*FAR),
    )

    def best(time):
        return lq.solve(FINITE.solved_problem, time)

    errors = [error(FINITE, agent, best, "score") for agent in found.agents]
    assert errors[0] > 0.2 and errors[-1] < 0.05, errors


@pytest.mark.parametrize("behaviour", [linear(*TARGET), None], ids=["diffusion", "jumps"])
def test_improving_from_one_data_set_reaches_the_optimum(behaviour):
    data = episodes(INFINITE, behaviour, 1_000)
    found = offline.improve(ALGORITHM, INFINITE.spec, data)

    def best(time):
        return lq.solve(INFINITE.solved_problem)

    errors = [error(INFINITE, agent, best, "score") for agent in found.agents]
    assert errors[0] > 0.2 and errors[-1] < 0.05, errors
    assert found.changes[-1] < offline.CONVERGED
    assert found.growth_rates[0] > INFINITE.solved_problem.discount_rate > found.growth_rates[-1]
    # the agent acts like any other
    carry = ALGORITHM.init_carry(INFINITE.spec)
    obs = jnp.ones(1)
    action, carry = ALGORITHM.act(found.agent, carry, obs, key=jr.key(0), explore=False)
    moved, _ = ALGORITHM.act(found.agent, carry, obs, key=jr.key(1), explore=False)
    drift = float((moved - action)[0]) * BOUND / INFINITE.dt
    exact = best(0.0).score(np.array([1.0, BOUND * float(action[0])]))
    assert drift == pytest.approx(float(exact[0]), rel=0.1)


def test_an_inadmissible_score_is_refused():
    data = episodes(INFINITE, linear(*TARGET), 200)
    runaway = linear(np.array([[1.0, 0.5]]), np.zeros(1))
    with pytest.raises(ValueError, match="`score` is not admissible on these data: under it val"):
        offline.evaluate(ALGORITHM, INFINITE.spec, data, score=runaway)
    with pytest.raises(qs.TrainingDiverged, match="after 1 rounds the score is still inadmissib"):
        offline.improve(ALGORITHM, INFINITE.spec, data, rounds=1)


def theta(agent):
    """The coefficients of Q."""
    return agent.critic.theta


def test_one_round_is_the_improvement_on_an_admissible_start():
    data, start = episodes(INFINITE, linear(*TARGET), 200), linear(*TARGET)
    found = offline.improve(ALGORITHM, INFINITE.spec, data, start=start, rounds=1)
    value = offline.evaluate(ALGORITHM, INFINITE.spec, data, score=start)
    # within the caution of a first of many rounds, which would raise the rate
    assert 0.0 < INFINITE.solved_problem.discount_rate - value.growth_rate < 1.0
    np.testing.assert_array_equal(theta(found.agent), theta(value.agent))


def test_nothing_to_earn_is_a_value_of_zero(small):
    nothing = eqx.tree_at(lambda d: d.reward, small, jnp.zeros_like(small.reward))
    found = offline.improve(ALGORITHM, FINITE.spec, nothing)
    assert found.changes == (0.0,) and not np.any(theta(found.agent))
    away = offline.improve(ALGORITHM, FINITE.spec, nothing, start=linear(*TARGET))
    assert away.changes[-1] < offline.CONVERGED and np.isfinite(away.changes).all()
    sums = martingale.PathSums(jnp.eye(2), jnp.zeros(2), jnp.zeros((2, 2)))
    point = martingale.off_policy_fixed_point(sums, rounds=3)
    assert not np.any(point.changes) and not np.any(point.theta)


def test_a_fixed_point_that_is_not_reached_is_explained(recorded):
    far = (np.array([[-6.0, -6.0]]), np.zeros(1))
    with pytest.raises(qs.TrainingDiverged, match="the off-policy fixed point does not settle: "):
        by_loss(recorded, far, rounds=2)


def spoiled(data, name, index, value):
    array = np.array(getattr(data, name))
    array[index] = value
    return eqx.tree_at(lambda d: getattr(d, name), data, array)


def run(data, spec=FINITE.spec, **options):
    return offline.improve(ALGORITHM, spec, data, **options)


LOSS = {"method": "martingale_loss", "behaviour": linear(*BEHAVIOUR)}


def test_data_that_cannot_be_used_are_refused(small):
    flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), small)
    with pytest.raises(ValueError, match=r"`episodes.reward` must have the shape \[paths, steps\]"):
        run(flat)
    short = eqx.tree_at(lambda d: d.action, small, small.action[:, 1:])
    with pytest.raises(ValueError, match=r"`episodes.action` must have the shape \[20, 100, 1\]"):
        run(short)
    with pytest.raises(ValueError, match="`episodes.obs` must be finite; 1 of 2000 rows are not"):
        run(spoiled(small, "obs", (3, 4), np.nan))
    with pytest.raises(ValueError, match="`episodes.dt` must be above 0 seconds, got 0 at path 2"):
        run(spoiled(small, "dt", (2, 5), 0.0))
    with pytest.raises(ValueError, match="`episodes.action` must vary; component 0 is constant"):
        run(eqx.tree_at(lambda d: d.action, small, jnp.zeros_like(small.action)))
    noiseless = eqx.tree_at(lambda d: d.action, small, -0.1 * small.obs[..., :1])
    with pytest.raises(ValueError, match="cannot tell the action's effect from the state's"):
        run(noiseless)
    with pytest.raises(ValueError, match=r"`episodes.action` must lie in \[-1, 1\], in units of"):
        run(eqx.tree_at(lambda d: d.action, small, BOUND * small.action))
    with pytest.raises(ValueError, match="`episodes.terminated` must be of type bool, got int32"):
        run(eqx.tree_at(lambda d: d.terminated, small, small.terminated.astype(jnp.int32)))
    with pytest.raises(ValueError, match="`episodes.terminated` is nowhere True: over a finite ho"):
        run(jax.tree.map(lambda leaf: leaf[:, :-1], small))
    few = jax.tree.map(lambda leaf: leaf[:1, :20], small)
    with pytest.raises(ValueError, match="at least as many rows as Q has features, 54; it has 20"):
        run(few)


def test_the_martingale_loss_needs_whole_episodes_and_their_behaviour(small):
    with pytest.raises(ValueError, match="`behaviour` is missing: the martingale loss needs"):
        run(small, method="martingale_loss")
    with pytest.raises(ValueError, match="needs a finite horizon: `spec.clock` must contain 'ti"):
        run(small, dataclasses.replace(FINITE.spec, clock=()), **LOSS)
    cut = jax.tree.map(lambda leaf: leaf[:, :-1], small)
    with pytest.raises(ValueError, match="needs episodes from start to end"):
        run(cut, **LOSS)
    with pytest.raises(ValueError, match=r"`behaviour` must give a score of shape \(1,\)"):
        run(small, method="martingale_loss", behaviour=lambda obs, action: action[0])
    with pytest.raises(ValueError, match="`behaviour` must be finite along the episodes"):
        run(small, method="martingale_loss", behaviour=lambda obs, action: action / 0.0)


def test_settings_that_do_not_fit_are_refused(small):
    with pytest.raises(ValueError, match="`algorithm` must have critic='features'"):
        offline.improve(qs.CQSM(), FINITE.spec, small)
    with pytest.raises(ValueError, match="`behaviour` was given, but least squares do not use it"):
        run(small, behaviour=linear(*BEHAVIOUR))
    with pytest.raises(ValueError, match="`rounds` must be at least 1, got 0"):
        run(small, rounds=0)
    with pytest.raises(ValueError, match="`rounds` must be at least 1, got 0"):
        by_loss(small, TARGET, rounds=0)


def test_episodes_are_recorded_whole(small):
    assert small.reward.shape == (20, 100)
    np.testing.assert_array_equal(small.terminated, np.arange(100)[None] == [[99]] * 20)
    np.testing.assert_array_equal(small.obs[:, 1:], small.next_obs[:, :-1])
    np.testing.assert_allclose(np.sum(small.dt, axis=1), 1.0, rtol=1e-4)
    irregular = LQ(id="lq", dt_min=0.01, dt_max=0.02)
    with pytest.raises(ValueError, match="`environment` must have regular steps"):
        episodes(irregular, None, 2)
