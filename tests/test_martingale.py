"""The martingale characterisation of Q, against linear-quadratic closed forms."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close

from qscore import lq, martingale
from qscore.algorithms.cqsm import moved_features, quadratic_features

PROBLEM = lq.Problem.from_json(
    json.dumps(
        {
            "A": [[-0.2]],
            "B": [[1.0]],
            "noise": [{"C": [[0.2]], "D": [[0.1]], "e": [0.3]}],
            "sigma_a": 0.6,
            "M": [[1.0, 0.0], [0.0, 0.1]],
            "score_cost": 0.3,
            "discount_rate": 0.4,
        }
    )
)
K, k = np.array([[-1.0, -2.0]]), np.array([0.1])
BEHAVIOUR = np.array([[0.8, -1.5]])
DT = 0.01
ROWS = 400_000


def steps_from(score_gain, score_offset, rng, rows=ROWS, dt=DT):
    """(z, z', reward rate) of one Euler step from z ~ N(0, 1.2^2), actions driven by a score."""
    z = 1.2 * rng.standard_normal((rows, 2))
    x, a = z[:, :1], z[:, 1:]
    noise = PROBLEM.noise[0]
    kick = x @ noise.C.T + a @ noise.D.T + noise.e
    x_next = (
        x
        + dt * (x @ PROBLEM.A.T + a @ PROBLEM.B.T)
        + kick * math.sqrt(dt) * rng.standard_normal((rows, 1))
    )
    a_next = (
        a
        + dt * (z @ score_gain.T + score_offset)
        + 0.6 * math.sqrt(dt) * rng.standard_normal((rows, 1))
    )
    reward = -0.5 * np.einsum("ri,ij,rj->r", z, PROBLEM.M, z)
    return z, np.concatenate([x_next, a_next], axis=1), reward


def phi(z):
    return np.asarray(
        jax.vmap(lambda z: quadratic_features(z[:1], z[1:], 0))(jnp.asarray(z, jnp.float32))
    )


def fit(z, z_next, reward, gain, offset, dt=DT):
    """theta of the orthogonality equations with the efficient instruments' cheap proxy."""
    test = phi(z) / (1.0 + np.sum(z**2, axis=1, keepdims=True))
    penalty = 0.5 * PROBLEM.score_cost * np.sum((z @ gain.T + offset) ** 2, axis=1)
    rows = len(z)
    sums = martingale.accumulate(
        martingale.LeastSquares.zeros(6),
        *(jnp.asarray(v, jnp.float32) for v in (test, phi(z), phi(z_next), reward - penalty)),
        dt=jnp.full(rows, dt, jnp.float32),
        keep=jnp.ones(()),
        discount_rate=PROBLEM.discount_rate,
    )
    return martingale.solve(sums, discount_rate=PROBLEM.discount_rate)


def gradient_error(theta, exact, rng):
    """Relative L2 error of grad_a Q over z ~ N(0, I)."""
    z = jnp.asarray(rng.standard_normal((4000, 2)), jnp.float32)
    slope = jax.vmap(jax.grad(lambda a, x: quadratic_features(x, a, 0) @ theta), in_axes=(0, 0))(
        z[:, 1:], z[:, :1]
    )
    truth = exact(np.asarray(z, float))
    return float(np.sqrt(np.mean((np.asarray(slope) - truth) ** 2) / np.mean(truth**2)))


def evaluated_gradient(gain=K, offset=k):
    return lq.evaluate(PROBLEM, gain, offset).gradient


def test_increments_have_mean_zero_for_the_right_q_only():
    rng = np.random.default_rng(0)
    z, z_next, reward = steps_from(K, k, rng)
    penalty = 0.5 * PROBLEM.score_cost * np.sum((z @ K.T + k) ** 2, axis=1)
    solution = lq.evaluate(PROBLEM, K, k)

    def statistics(q, penalty=penalty):
        dm = np.asarray(
            martingale.increment(
                *(jnp.asarray(v, jnp.float32) for v in (q(z), q(z_next), reward, penalty)),
                dt=jnp.full(len(z), DT, jnp.float32),
                discount_rate=PROBLEM.discount_rate,
            ),
            float,
        )
        weighted = dm[:, None] * phi(z) / (1.0 + np.sum(z**2, axis=1, keepdims=True))
        return np.mean(weighted, axis=0), np.std(weighted, axis=0) / math.sqrt(len(z))

    mean, error = statistics(solution.q)
    # the Euler step's own bias is of order dt^2
    assert np.all(np.abs(mean) < 4.5 * error + 3.0 * DT**2)
    for wrong in (
        statistics(lambda z: 1.2 * solution.q(z)),
        statistics(solution.q, -penalty),
        statistics(solution.q, 2.0 * penalty),
    ):
        mean, error = wrong
        assert np.max(np.abs(mean) / error) > 20.0


def test_least_squares_find_the_value_of_a_score():
    rng = np.random.default_rng(1)
    found = fit(*steps_from(K, k, rng), K, k)
    assert gradient_error(found.theta, evaluated_gradient(), rng) < 0.04
    assert float(found.discount_rate) == pytest.approx(PROBLEM.discount_rate)
    # modulo constants, growth is the closed form's abscissa without the discount
    solution = lq.evaluate(PROBLEM, K, k)
    linear = np.max(np.linalg.eigvals(PROBLEM.F + PROBLEM.G @ K).real)
    growth = max(solution.abscissa + PROBLEM.discount_rate, linear)
    assert float(found.growth_rate) == pytest.approx(growth, abs=0.15)


def test_resimulated_actions_are_right_off_policy_and_logged_ones_are_wrong():
    rng = np.random.default_rng(2)
    z, z_next, reward = steps_from(BEHAVIOUR, 0.0 * k, rng)
    exact = evaluated_gradient()
    naive = gradient_error(fit(z, z_next, reward, K, k).theta, exact, rng)
    drift = z @ K.T + k
    a_next = z[:, 1:] + DT * drift + 0.6 * math.sqrt(DT) * rng.standard_normal(drift.shape)
    fresh = np.concatenate([z_next[:, :1], a_next], axis=1)
    assert gradient_error(fit(z, fresh, reward, K, k).theta, exact, rng) < 0.05
    assert naive > 0.3


def test_minimising_squared_increments_flattens_q():
    # the negative control: the minimiser of E[dM^2] goes to zero with the time step
    rng = np.random.default_rng(3)
    sizes = []
    for dt in (0.05, 0.005):
        z, z_next, reward = steps_from(K, k, rng, rows=100_000, dt=dt)
        penalty = 0.5 * PROBLEM.score_cost * np.sum((z @ K.T + k) ** 2, axis=1)
        change = math.exp(-PROBLEM.discount_rate * dt) * phi(z_next) - phi(z)
        theta = np.linalg.lstsq(change, -(reward - penalty) * dt, rcond=None)[0]
        sizes.append(np.linalg.norm(theta[1:]))
    assert gradient_error(jnp.asarray(theta, jnp.float32), evaluated_gradient(), rng) > 0.85
    assert sizes[1] < 0.3 * sizes[0]


def test_inadmissible_scores_raise_the_discount_rate():
    rng = np.random.default_rng(4)
    runaway = np.array([[3.0, 1.0]])
    growth = lq.abscissa(PROBLEM, runaway) + PROBLEM.discount_rate
    assert growth > 1.0
    found = fit(*steps_from(runaway, 0.0 * k, rng), runaway, 0.0 * k)
    assert float(found.growth_rate) == pytest.approx(growth, rel=0.1)
    assert float(found.discount_rate) == pytest.approx(
        float(found.growth_rate) + martingale.STEEP, rel=1e-5
    )
    assert np.isfinite(np.asarray(found.theta)).all()


def test_spectral_abscissa_is_the_largest_real_part():
    rng = np.random.default_rng(5)
    for size in (1, 2, 5, 21):
        matrix = rng.standard_normal((size, size)) - rng.uniform(0.0, 3.0) * np.eye(size)
        exact = np.max(np.linalg.eigvals(matrix).real)
        found = float(martingale.spectral_abscissa(jnp.asarray(matrix, jnp.float32)))
        assert found == pytest.approx(exact, abs=float(0.001 + 0.001 * abs(exact)))


@pytest.mark.parametrize("fast", [3.0, 300.0])
def test_spectral_abscissa_sees_a_slow_mode_beside_fast_ones(fast):
    # a slow mode with an eigenvector at a sharp angle to those of twenty that die out at once
    rng = np.random.default_rng(6)
    basis = np.eye(21) + 0.2 * rng.standard_normal((21, 21))
    modes = np.diag([0.3, *np.linspace(-fast, -0.5 * fast, 20)])
    matrix = basis @ modes @ np.linalg.inv(basis)
    found = float(martingale.spectral_abscissa(jnp.asarray(matrix, jnp.float32)))
    assert found == pytest.approx(0.3, abs=1e-5 * fast)
    spiral = np.array([[0.1, fast], [-0.5 * fast, 0.1]])
    found = float(martingale.spectral_abscissa(jnp.asarray(spiral, jnp.float32)))
    assert found == pytest.approx(0.1, abs=1e-5 * fast)


def test_increment_is_exact_for_constant_rates():
    # a reward rate of 2 for ever under beta = 0.5 is worth 4, whatever the step
    dt = jnp.array([1e-4, 0.1, 3.0])
    four = jnp.full(3, 4.0)
    dm = martingale.increment(four, four, jnp.full(3, 3.0), jnp.full(3, 1.0), dt, discount_rate=0.5)
    assert_close(dm, jnp.zeros(3), loosen=3.0, why="differences of fours")
    undiscounted = martingale.span(0.0, dt)
    assert_close(undiscounted, dt)


def test_to_go_sums_a_path_backwards():
    rng = np.random.default_rng(6)
    rate, cost, dt = (rng.uniform(0.1, 1.0, 7).astype(np.float32) for _ in range(3))
    beta, value = 0.3, 2.0
    expected = []
    for i in reversed(range(7)):
        earned = (rate[i] - cost[i]) * (1.0 - math.exp(-beta * dt[i])) / beta
        value = earned + math.exp(-beta * dt[i]) * value
        expected.append(value)
    found = martingale.to_go(
        jnp.asarray(rate), jnp.asarray(cost), jnp.array(2.0), jnp.asarray(dt), discount_rate=beta
    )
    assert_close(found, np.array(expected[::-1], np.float32))


def test_traces_decay_per_second():
    rng = np.random.default_rng(7)
    gradients = rng.standard_normal((6, 3)).astype(np.float32)
    dt = rng.uniform(0.05, 0.2, 6).astype(np.float32)
    time = np.concatenate([[0.0], np.cumsum(dt)])
    expected = [
        sum(math.exp(-2.5 * (time[k] - time[j])) * gradients[j] for j in range(k + 1))
        for k in range(6)
    ]
    found = martingale.traces(
        jnp.asarray(gradients), jnp.asarray(dt), decay_rate=2.0, discount_rate=0.5
    )
    assert_close(found, np.array(expected, np.float32))


def test_variance_weights_are_floored():
    weight = martingale.variance_weight(jnp.array([1.0, 3.0, -5.0, 9.0]))
    assert_close(weight, jnp.array([1.0, 1.0 / 3.0, 1.0 / 0.325, 1.0 / 9.0]))
    # an estimate of the variance that is negative everywhere says nothing
    lost = martingale.variance_weight(jnp.array([-1.0, -2.0]))
    assert_close(lost / jnp.mean(lost), jnp.ones(2))


def test_coupled_sums_say_the_same_of_every_score():
    rng = np.random.default_rng(12)
    rows, cost, beta, penalty = 64, 0.3, 0.4, 0.7
    x, x_next, a = (jnp.asarray(rng.standard_normal((rows, 2)), jnp.float32) for _ in range(3))
    rate = jnp.asarray(rng.standard_normal(rows), jnp.float32)
    moved = moved_features(2, 2)
    assert len(moved) == 9  # a, a x and a a
    then, now = jnp.asarray(rng.standard_normal((2, 15)), jnp.float32)
    score_cost = jnp.asarray(cost)

    def accumulated(theta, dt, coupled):
        def phi_of(x, a):
            return quadratic_features(x, a, 0)

        psi = jax.vmap(jax.grad(lambda a, x: phi_of(x, a) @ theta / cost))(a, x_next)
        slope = jax.vmap(jax.jacobian(phi_of, argnums=1))(x_next, a)
        phi, ahead = jax.vmap(phi_of)(x, a), jax.vmap(phi_of)(x_next, a + dt * psi)
        net = rate - penalty * 0.5 * cost * jnp.sum(psi**2, axis=1)
        if coupled:
            ahead, net = ahead - dt * jnp.einsum("bfa,ba->bf", slope, psi), rate
        return martingale.accumulate(
            martingale.LeastSquares.zeros(15, len(moved) if coupled else None),
            phi,
            phi,
            ahead,
            net,
            jnp.full(rows, dt),
            keep=jnp.ones(()),
            discount_rate=beta,
            slope=slope[:, moved] if coupled else None,
        )

    def under(added, asked, dt):
        return accumulated(added, dt, True).under(
            asked[moved],
            moved,
            score_cost=score_cost,
            penalty=penalty,
            discount_rate=beta,
            dt=jnp.asarray(dt),
        )

    exact = accumulated(now, 0.01, False)
    same = under(now, now, 0.01)
    assert_close(same.loss, exact.loss, loosen=300.0, why="differences over dt")
    assert_close(same.gain, exact.gain, loosen=30.0, why="sums of squares")
    # rows of another score: what is left is of second order in a step
    off = [
        float(jnp.linalg.norm(under(then, now, dt).loss - accumulated(now, dt, False).loss))
        for dt in (0.01, 0.005)
    ]
    assert off[1] == pytest.approx(0.5 * off[0], rel=0.05)
    assert_close(under(then, now, 0.01).gain, exact.gain, loosen=30.0, why="sums of squares")
    wrong = accumulated(then, 0.01, False)
    assert off[0] < 0.1 * float(jnp.linalg.norm(wrong.loss - exact.loss))


def test_the_fitted_diffusion_gives_the_variance_of_increments():
    rng = np.random.default_rng(13)
    rows, dt = 20_000, 0.01
    z = rng.standard_normal((rows, 3))
    # two states; the noise grows with state and action, so the variance is of the fourth degree
    C = rng.standard_normal((2, 3))
    spread = z @ C.T + 0.3
    change = 0.1 * math.sqrt(dt) * spread * rng.standard_normal((rows, 1)) + 0.2 * z[:, :2] * dt
    gradient = z @ rng.standard_normal((3, 2))
    exact = 0.01 * np.sum(gradient * spread, axis=1) ** 2
    phi = jax.vmap(lambda z: quadratic_features(z[:2], z[2:], 0))(jnp.asarray(z, jnp.float32))
    weight, _ = martingale.DiffusionFit.zeros(10, 2).weights(
        phi,
        jnp.asarray(gradient, jnp.float32),
        jnp.asarray(change, jnp.float32),
        jnp.full(rows, dt),
        keep=jnp.ones(()),
    )
    weight = np.asarray(weight)
    assert np.mean(weight) == pytest.approx(1.0, rel=1e-4)
    leverage = np.asarray(martingale.leverage(phi))
    floor = martingale.LEVERAGE_FLOOR * np.mean(exact / leverage) * leverage
    assert 0.1 < np.mean(exact < floor) < 0.4  # the floor is at work, and not everywhere
    floored = np.maximum(exact, floor)
    assert np.corrcoef(np.log(weight), np.log(floored))[0, 1] < -0.97
    large = floored > np.median(floored)
    low, high = np.quantile((weight * floored)[large], [0.05, 0.95])
    assert high < 1.6 * low
    # before anything is known of Q, rows count by their size alone
    blind, _ = martingale.DiffusionFit.zeros(10, 2).weights(
        phi, jnp.zeros((rows, 2)), jnp.zeros((rows, 2)), jnp.full(rows, dt), keep=jnp.ones(())
    )
    flat = np.asarray(blind) * leverage
    assert np.max(flat) < 1.001 * np.min(flat)


def test_leverage_is_in_units_of_typical_rows():
    z = np.random.default_rng(3).standard_normal((2_000, 3))
    z[0] = 1e6  # an outlier, which would be typical of a mean
    phi = jnp.asarray(np.concatenate([np.ones((2_000, 1)), z, z**2], axis=1), jnp.float32)
    leverage = np.asarray(martingale.leverage(phi))
    assert 5.0 < np.median(leverage) < 20.0
    assert leverage[0] > 1e3 * np.sort(leverage)[-2]
    # features that are mostly zero do not make every other row an outlier
    rare = phi.at[:, 1].set(jnp.where(jnp.arange(2_000) % 10 == 0, phi[:, 1], 0.0))
    assert np.median(martingale.leverage(rare)) < 50.0


def test_path_sums_regress_on_what_is_to_go():
    generator = np.random.default_rng(9)
    phi, slope = (generator.standard_normal((5, 3)).astype(np.float32) for _ in range(2))
    rate, weight = (generator.uniform(0.5, 1.5, 5).astype(np.float32) for _ in range(2))
    dt, end = np.full(5, 0.1, np.float32), 2.0
    to_go = [sum(rate[k:] * dt[k:]) + end for k in range(5)]
    shift = np.stack([np.sum(slope[k:] * dt[k:, None], axis=0) for k in range(5)])
    weighted = phi * (weight * dt)[:, None]
    sums = martingale.path_sums(phi, slope, rate, jnp.array(end), weight, dt, discount_rate=0.0)
    assert_close(sums.gram, weighted.T @ phi)
    assert_close(sums.gain, weighted.T @ np.array(to_go, np.float32), loosen=3.0, why="sums of ten")
    assert_close(sums.shift, weighted.T @ shift, loosen=3.0, why="sums of ten")


def test_the_fixed_point_solves_the_corrected_normal_equations():
    generator = np.random.default_rng(10)
    root, shift = generator.standard_normal((2, 4, 4))
    gram = root @ root.T + np.eye(4)
    shift, gain = 0.1 * shift, generator.standard_normal(4)
    sums = martingale.PathSums(*(jnp.asarray(v, jnp.float32) for v in (gram, gain, shift)))
    found = martingale.off_policy_fixed_point(sums, rounds=12, ridge=0.0)
    exact = np.linalg.solve(gram - shift, gain)
    np.testing.assert_allclose(found.theta, exact, rtol=1e-4, atol=1e-5)
    assert float(found.changes[0]) == pytest.approx(1.0)
    assert float(found.changes[-1]) < 1e-4
    once = martingale.off_policy_fixed_point(sums, rounds=1, ridge=0.0)
    np.testing.assert_allclose(once.theta, np.linalg.solve(gram, gain), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("paths", [2, 6, 7])
def test_adding_up_does_not_depend_on_the_chunk(paths):
    values = np.random.default_rng(11).standard_normal((paths, 3)).astype(np.float32)
    total = martingale.add_up(lambda row: jnp.outer(row, row), jnp.asarray(values), chunk=3)
    assert_close(total, values.T @ values, loosen=3.0, why="sums of squares")


def test_the_mean_over_noise_is_exact_for_quadratics():
    noise = jnp.array([[0.3, 0.1], [0.0, 0.2]])
    action = jnp.array([0.5, -1.0])
    found = martingale.mean_over_noise(lambda a: jnp.outer(a, a).ravel(), action, noise)
    assert_close(found, (jnp.outer(action, action) + noise @ noise.T).ravel())
