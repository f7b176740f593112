"""Linear-quadratic closed forms against SciPy, plain integration, simulation and identities.

The references here are written from the equations for P, p and c one by one, and from the SDE; they
share no code with the module, which solves one equation for the three in the coordinates (z, 1).
"""

import dataclasses
import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
from helpers import assert_close
from numpy.polynomial import hermite_e, legendre

import qscore as qs
from qscore import cli, lq, riccati
from qscore.lq import Problem, Solution, Terminal, Unsolvable, evaluate, solve

EXAMPLES = Path(__file__).parents[1] / "examples" / "lq"
UNSTABLE = Problem.from_json((EXAMPLES / "unstable.json").read_text())
FINITE = Problem.from_json((EXAMPLES / "finite.json").read_text())
BASE = {
    **{"A": [[0.3]], "B": [[1.0]], "sigma_a": 0.6, "M": [[1.0, 0.0], [0.0, 0.3]]},
    **{"score_cost": 0.3, "discount_rate": 0.2},
}


def make(**changes) -> Problem:
    return Problem.from_json({**BASE, **changes})


def replace(problem: Problem, **changes) -> Problem:
    return dataclasses.replace(problem, **changes)


def random_problem(seed, *, state=4, action=2, terms=2, strength=0.12, **changes) -> Problem:
    """A problem with an unstable drift, and noise that most such problems can be stabilised under.

    The score's cost is between 1e-4 and 1e2, the discount rate between 0.01 and 3.
    """
    draw = np.random.default_rng(seed)
    z = state + action
    root = draw.normal(size=(z, z))
    noise = [
        strength * draw.normal(size=(state, state)),
        strength * draw.normal(size=(state, action)),
        draw.normal(size=state),
    ]
    fields = {
        "A": draw.normal(size=(state, state)),
        "B": draw.normal(size=(state, action)),
        "f": draw.normal(size=state),
        "noise": tuple(tuple(draw.permuted(part) for part in noise) for _ in range(terms)),
        "sigma_a": draw.normal(size=(action, action)),
        "M": root @ root.T,
        "m": draw.normal(size=z),
        "r0": draw.normal(),
        "score_cost": 10.0 ** draw.uniform(-4.0, 2.0),
        "discount_rate": 10.0 ** draw.uniform(-2.0, 0.5),
    }
    return Problem(**{**fields, **changes})


def solvable(seeds, **kwargs):
    """The random problems that are solvable, and their solutions."""
    for seed in seeds:
        problem = random_problem(seed, **kwargs)
        try:
            yield problem, solve(problem)
        except Unsolvable:
            continue


def worst(solution: Solution, P, p, c) -> float:
    """The largest relative error of P, p and c, each in its norm."""
    pairs = zip((solution.P, solution.p, solution.c), (P, p, c), strict=True)
    errors = [np.linalg.norm(np.asarray(x - y, float)) / np.linalg.norm(y) for x, y in pairs]
    return float(max(errors))


# The equations, one by one.


def rates(problem, P, p, c, K=None, k=None):
    """-dP/dt, -dp/dt, -dc/dt under a fixed score, or the greedy one."""
    lam, beta = problem.score_cost, problem.discount_rate
    F, G, g, m = problem.F, problem.G, problem.g, problem.m
    if K is None:
        K, k = -G.T @ P / lam, G.T @ p / lam
    loop, push = F + G @ K, g + G @ k
    noise = list(zip(problem.S, problem.s, strict=True))
    return (
        loop.T @ P + P @ loop + sum(S.T @ P @ S for S, _ in noise) + problem.M
        + lam * K.T @ K - beta * P,
        loop.T @ p - P @ push - sum(S.T @ P @ s for S, s in noise) + m - lam * K.T @ k - beta * p,
        p @ push - 0.5 * sum(s @ P @ s for _, s in noise) + problem.r0 - 0.5 * lam * k @ k
        - beta * c,
    )  # fmt: skip


def runge_kutta(problem, duration, steps, K=None, k=None):
    """The equations integrated backwards from T by the classical method, in extended precision."""
    _, H, h1, h0 = problem.terminal
    y = [np.asarray(part, np.longdouble) for part in (H, h1, h0)]
    h = np.longdouble(duration) / steps
    for _ in range(steps):
        k1 = rates(problem, *y, K=K, k=k)
        k2 = rates(problem, *(a + 0.5 * h * b for a, b in zip(y, k1, strict=True)), K=K, k=k)
        k3 = rates(problem, *(a + 0.5 * h * b for a, b in zip(y, k2, strict=True)), K=K, k=k)
        k4 = rates(problem, *(a + h * b for a, b in zip(y, k3, strict=True)), K=K, k=k)
        y = [
            a + h / 6.0 * (p + 2.0 * q + 2.0 * r + s)
            for a, p, q, r, s in zip(y, k1, k2, k3, k4, strict=True)
        ]
    return y


def extrapolated(problem, duration, steps, K=None, k=None):
    """`runge_kutta` with `steps` and twice as many, and the leading error of the two removed."""
    coarse = runge_kutta(problem, duration, steps, K, k)
    fine = runge_kutta(problem, duration, 2 * steps, K, k)
    return [np.asarray(f + (f - c) / 15.0, float) for c, f in zip(coarse, fine, strict=True)]


def linear_parts(problem, P):
    """p and c of the optimum that go with a stationary P."""
    lam, beta, G = problem.score_cost, problem.discount_rate, problem.G
    noise = list(zip(problem.S, problem.s, strict=True))
    loop = problem.F - G @ G.T @ P / lam
    right = problem.m - P @ problem.g - sum(S.T @ P @ s for S, s in noise)
    p = np.linalg.solve(beta * np.eye(len(P)) - loop.T, right)
    gain = p @ problem.g + (G.T @ p) @ (G.T @ p) / (2.0 * lam)
    return p, (gain - 0.5 * sum(s @ P @ s for _, s in noise) + problem.r0) / beta


def polished(problem, P, steps=2):
    """Newton's (Kleinman's) steps from SciPy's P, whose own error may be 1e-11 of a large P."""
    shifted = problem.F - 0.5 * problem.discount_rate * np.eye(len(P))
    for _ in range(steps):
        K = -problem.G.T @ P / problem.score_cost
        cost = problem.M + problem.score_cost * K.T @ K
        P = scipy.linalg.solve_continuous_lyapunov((shifted + problem.G @ K).T, -cost)
    return P


def test_without_multiplicative_noise_it_is_scipys_riccati_equation():
    errors = []
    for n, d in itertools.product((1, 2, 4, 6), (1, 2, 3)):
        for problem, solution in solvable(range(5), state=n, action=d, terms=0):
            shifted = problem.F - 0.5 * problem.discount_rate * np.eye(n + d)
            weight = problem.score_cost * np.eye(d)
            P = scipy.linalg.solve_continuous_are(shifted, problem.G, problem.M, weight)
            P = polished(problem, P)
            errors.append(worst(solution, P, *linear_parts(problem, P)))
            assert solution.residual < 1e-14
            loop = problem.F + problem.G @ solution.K
            growth = 2.0 * np.linalg.eigvals(loop).real.max() - problem.discount_rate
            assert_close(solution.abscissa, growth, loosen=100.0, why="eigenvalues")
    assert len(errors) == 60 and max(errors) < 1e-10, max(errors)


def test_with_multiplicative_noise_it_is_a_fixed_point_of_scipys():
    errors = []
    for problem, solution in solvable(range(30), terms=3, strength=0.08):
        shifted = problem.F - 0.5 * problem.discount_rate * np.eye(6)
        weight, P = problem.score_cost * np.eye(2), np.zeros((6, 6))
        for _ in range(3000):
            seen = problem.M + sum(S.T @ P @ S for S in problem.S)
            last, P = P, scipy.linalg.solve_continuous_are(shifted, problem.G, seen, weight)
            if np.linalg.norm(P - last) <= 1e-13 * np.linalg.norm(P):
                errors.append(worst(solution, P, *linear_parts(problem, P)))
                break
        assert solution.residual < 1e-14 and solution.abscissa < 0.0
        operator = np.kron(problem.F + problem.G @ solution.K, np.eye(6))
        operator += np.kron(np.eye(6), problem.F + problem.G @ solution.K)
        operator += sum(np.kron(S, S) for S in problem.S)
        growth = np.linalg.eigvals(operator).real.max() - problem.discount_rate
        assert_close(solution.abscissa, growth, loosen=100.0, why="eigenvalues")
    assert len(errors) >= 15 and max(errors) < 1e-9, (len(errors), max(errors))


def terminal(seed, T, size=6):
    draw = np.random.default_rng(1000 + seed)
    root = draw.normal(size=(size, size))
    return Terminal(T, root @ root.T / size, draw.normal(size=size), draw.normal())


@pytest.mark.parametrize("seed", range(4))
def test_finite_horizon_equals_plain_integration(seed):
    problem = random_problem(seed, score_cost=10.0 ** (seed - 1), terminal=terminal(seed, 1.0))
    assert worst(solve(problem, at=0.4), *extrapolated(problem, 0.6, 400)) < 1e-9
    draw = np.random.default_rng(seed)
    K, k = draw.normal(size=(2, 6)), draw.normal(size=2)
    score = evaluate(problem, K, k, at=0.4)
    assert worst(score, *extrapolated(problem, 0.6, 200, K, k)) < 1e-9
    assert solve(problem).residual < 1e-9


@pytest.mark.parametrize("score_cost, stiffness", [(1e-4, 1.0), (1.0, 1e5), (1e2, 1e3)])
def test_stiff_finite_horizons_equal_the_exponential_of_the_hamiltonian(score_cost, stiffness):
    # without multiplicative noise the flow is that of linear equations, P = Y X^-1
    problem = random_problem(3, state=2, action=1, terms=0, score_cost=score_cost)
    A = problem.A - np.diag([stiffness, 0.0])
    end = terminal(3, 1.0, 3)
    problem = replace(problem, A=A, discount_rate=0.2, terminal=end)
    shifted = problem.F - 0.1 * np.eye(3)
    control = problem.G @ problem.G.T / score_cost
    h = 1.0 / 2**14
    flow = scipy.linalg.expm(h * np.block([[-shifted, control], [problem.M, shifted.T]]))
    X, Y = flow[:3, :3], flow[:3, 3:]
    # a step P -> Y X^-1 has the form P -> R + E'P (1 + N P)^-1 E, because the flow is symplectic;
    # two steps have it again
    E, N, R = np.linalg.inv(X), np.linalg.solve(X, Y), flow[3:, :3] @ np.linalg.inv(X)
    for _ in range(14):
        inner = np.linalg.inv(np.eye(3) + N @ R)
        E, N, R = E @ inner @ E, N + E @ inner @ N @ E.T, R + E.T @ R @ inner @ E
    P = R + E.T @ end.H @ np.linalg.inv(np.eye(3) + N @ end.H) @ E
    assert np.linalg.norm(solve(problem).P - P) < 1e-9 * np.linalg.norm(P)


def test_fixed_scores_over_a_finite_horizon_equal_the_matrix_exponential():
    problem, (T, H, h1, h0) = FINITE, FINITE.terminal or Terminal(0.0)
    K, k = -np.ones((2, 5)) - np.eye(2, 5, 3), np.array([0.2, -0.1])

    def packed(parts):
        return np.concatenate([np.ravel(part) for part in parts])

    def unpacked(y):
        return y[:25].reshape(5, 5), y[25:30], y[30]

    start = packed((H, h1, h0))
    zero = packed(rates(problem, *unpacked(np.zeros(31)), K, k))
    columns = [packed(rates(problem, *unpacked(e), K, k)) - zero for e in np.eye(31)]
    generator = np.block([[np.array(columns).T, zero[:, None]], [np.zeros((1, 32))]])
    for at in (0.0, 0.7, 1.5):
        y = scipy.linalg.expm((T - at) * generator) @ np.append(start, 1.0)
        assert worst(evaluate(problem, K, k, at), *unpacked(y[:31])) < 1e-12
    solution = evaluate(problem, K, k, at=T)
    assert_close([solution.P, solution.p, solution.c], [H, h1, h0])


@pytest.mark.parametrize("problem", [UNSTABLE, replace(FINITE, terminal=None)])
def test_a_long_horizon_ends_in_the_infinite_one(problem):
    infinite = solve(problem)
    for scale in (0.0, 5.0):
        H = scale * np.eye(len(problem.M))
        finite = solve(replace(problem, terminal=Terminal(300.0, H)))
        assert worst(finite, infinite.P, infinite.p, infinite.c) < 1e-10


# Q as the solution of its partial differential equation, known only through its values.


def generator_residual(problem, Q, score, z, dQ_dt=0.0):
    """d_t Q + L Q + r - lambda/2 |Psi|^2 - beta Q at z, and the largest of its terms.

    Central differences of step 1 have no truncation error on a quadratic.
    """
    n = problem.state_size
    size = len(z)
    unit = np.eye(size)
    gradient = np.array([(Q(z + e) - Q(z - e)) / 2.0 for e in unit])
    hessian = np.array(
        [
            [(Q(z + e + w) - Q(z + e - w) - Q(z - e + w) + Q(z - e - w)) / 4 for w in unit]
            for e in unit
        ]
    )
    x, a = z[:n], z[n:]
    drift = np.concatenate([problem.A @ x + problem.B @ a + problem.f, score])
    spread = np.zeros((size, size))
    for C, D, e in problem.noise:
        sigma = np.concatenate([C @ x + D @ a + e, np.zeros(size - n)])
        spread += np.outer(sigma, sigma)
    spread[n:, n:] += problem.sigma_a @ problem.sigma_a.T
    terms = [
        *(dQ_dt, drift @ gradient, 0.5 * np.sum(spread * hessian)),
        *(-0.5 * z @ problem.M @ z, problem.m @ z, problem.r0),
        *(-0.5 * problem.score_cost * score @ score, -problem.discount_rate * Q(z)),
    ]
    return sum(terms), max(map(abs, terms))


def test_stationary_values_solve_their_differential_equation():
    draw = np.random.default_rng(0)
    for problem in (UNSTABLE, replace(FINITE, terminal=None)):
        optimum = solve(problem)
        K = optimum.K - 0.2 * np.abs(draw.normal(size=optimum.K.shape)) * np.eye(*problem.G.T.shape)
        k = draw.normal(size=len(optimum.k))
        value = evaluate(problem, K, k)
        for z in 2.0 * draw.normal(size=(20, len(problem.M))):
            for solution, score in ((value, K @ z + k), (optimum, optimum.score(z))):
                left, size = generator_residual(problem, solution.q, score, z)
                assert abs(left) < 1e-11 * size
            # the score is the gradient of the value, and no other choice has a larger generator
            gradient = optimum.gradient(z)
            assert_close(gradient, problem.score_cost * optimum.score(z))
            other = optimum.score(z) + 0.1
            assert generator_residual(problem, optimum.q, other, z)[0] < 0.0


@pytest.mark.parametrize("optimal", [True, False])
@pytest.mark.parametrize("at", [0.3, 1.1])
def test_values_of_a_finite_horizon_solve_their_differential_equation(at, optimal):
    K, k, step = -np.ones((2, 5)), np.array([0.3, -0.2]), 0.01

    def value(at):
        return solve(FINITE, at) if optimal else evaluate(FINITE, K, k, at)

    around = {j: value(at + j * step) for j in range(-3, 4)}
    weights = {1: 45.0, 2: -9.0, 3: 1.0}  # of the central difference of order 6
    for z in np.random.default_rng(1).normal(size=(10, 5)):
        moved = sum(w * (around[j].q(z) - around[-j].q(z)) for j, w in weights.items())
        score = around[0].score(z) if optimal else K @ z + k
        left, size = generator_residual(FINITE, around[0].q, score, z, float(moved) / 0.6)
        assert abs(left) < 1e-9 * size  # what is left of the difference in time


# Policy improvement.


def admissible_start(problem, seed):
    """An admissible score well away from the optimum."""
    optimum = solve(problem)
    noise = np.random.default_rng(seed).normal(size=optimum.K.shape)
    for strength in (0.5, 0.2, 0.1, 0.05, 0.02):
        K = optimum.K * (1.0 + strength * noise)
        if qs.lq.abscissa(problem, K) < -1e-2:
            return K, optimum.k + 1.0
    raise AssertionError("none is admissible")


def test_policy_iteration_falls_to_the_optimum_quadratically():
    orders = []
    for seed in range(12):
        problem = random_problem(seed, terms=2, strength=0.08, score_cost=0.3)
        try:
            optimum = solve(problem)
        except Unsolvable:
            continue
        K, k = admissible_start(problem, seed)
        iterates = list(itertools.islice(qs.lq.kleinman(problem, K, k), 12))
        for above, below in itertools.pairwise(iterates):
            gap = np.linalg.eigvalsh(above.P - below.P)
            assert gap[0] > -1e-11 * np.linalg.norm(above.P)
            assert below.q(np.ones(6)) >= above.q(np.ones(6)) - 1e-10 * abs(above.q(np.ones(6)))
        errors = [np.linalg.norm(i.P - optimum.P) / np.linalg.norm(optimum.P) for i in iterates]
        assert errors[-1] < 1e-12
        assert_close(iterates[-1].k, optimum.k, loosen=100.0, why="condition of the loop")
        orders += [
            math.log(after) / math.log(before)
            for before, after in itertools.pairwise(errors)
            if before < 1e-2 and after > 1e-12
        ]
    assert len(orders) >= 5 and np.mean(orders) > 1.5, orders


def second_moment(problem, K, k, z, rate):
    """E int e^{-rate s} y y' ds for y = (z, 1) under a fixed score, by a plain linear solve."""
    size = len(z) + 1
    loop = np.zeros((size, size))
    loop[:-1, :-1], loop[:-1, -1] = problem.F + problem.G @ K, problem.g + problem.G @ k
    operator = np.kron(loop, np.eye(size)) + np.kron(np.eye(size), loop) - rate * np.eye(size**2)
    for S, s in zip(problem.S, problem.s, strict=True):
        noise = np.zeros((size, size))
        noise[:-1, :-1], noise[:-1, -1] = S, s
        operator += np.kron(noise, noise)
    y = np.append(z, 1.0)
    return operator, np.outer(y, y).ravel()


def quadratic_gap(problem, greedy, one, other):
    """lambda/2 (|one - greedy|^2 - |other - greedy|^2) as a matrix on (z, 1)."""

    def square(score):
        apart = np.column_stack([score[0] - greedy[0], score[1] - greedy[1]])
        return 0.5 * problem.score_cost * apart.T @ apart

    return square(one) - square(other)


@pytest.mark.parametrize("exact", [True, False])
def test_policy_improvement_identity(exact):
    """Q'' - Q = E'' int e^{-beta s} lambda/2 (|Psi - Psi'|^2 - |Psi'' - Psi'|^2) ds, for any Psi''.

    Psi' is greedy for the value Q of Psi; Psi'' is Psi' itself, or a regression of it with errors.
    """
    draw = np.random.default_rng(7)
    for problem in (UNSTABLE, replace(FINITE, terminal=None)):
        K, k = admissible_start(problem, 3)
        old = evaluate(problem, K, k)
        new = (old.K, old.k)
        if not exact:
            new = (old.K * (1.0 + 0.05 * draw.normal(size=K.shape)), old.k + 0.1)
        value = evaluate(problem, *new)
        gap = quadratic_gap(problem, (old.K, old.k), (K, k), new)
        for z in draw.normal(size=(3, len(problem.M))):
            operator, start = second_moment(problem, *new, z, problem.discount_rate)
            gain = np.sum(gap * np.linalg.solve(operator, -start).reshape(gap.shape))
            assert abs(value.q(z) - old.q(z) - gain) < 1e-10 * abs(gain)
            assert gain > 0.0 or not exact


def test_policy_improvement_identity_over_a_finite_horizon():
    problem = replace(UNSTABLE, terminal=Terminal(1.0, np.eye(2), np.ones(2), 0.3))
    (K, k), other = (
        (np.array([[-1.0, -2.0]]), np.array([0.4])),
        (np.array([[0.3, -1.0]]), np.ones(1)),
    )
    z = np.array([0.7, -0.4])
    operator, start = second_moment(problem, *other, z, problem.discount_rate)
    nodes, weights = legendre.leggauss(14)
    gain = 0.0
    for time, weight in zip((nodes + 1.0) / 2.0, weights / 2.0, strict=True):
        old = evaluate(problem, K, k, at=time)
        moment = (scipy.linalg.expm(time * operator) @ start).reshape(3, 3)
        gain += weight * np.sum(moment * quadratic_gap(problem, (old.K, old.k), (K, k), other))
    apart = evaluate(problem, *other).q(z) - evaluate(problem, K, k).q(z)
    assert abs(apart - gain) < 1e-10 * abs(gain)


# Simulation.


def returns(problem, K, k, z, dt, increments):
    """The returns of Euler-Maruyama paths from z, rewards by the trapezoid rule."""
    n, beta = problem.state_size, problem.discount_rate
    x, a = (np.repeat(part[None], increments.shape[1], axis=0) for part in (z[:n], z[n:]))

    def reward(x, a, psi):
        z = np.hstack([x, a])
        rate = z @ problem.m - 0.5 * np.sum(z * (z @ problem.M), axis=1) + problem.r0
        return rate - 0.5 * problem.score_cost * np.sum(psi**2, axis=1)

    total, psi = np.zeros(len(x)), np.hstack([x, a]) @ K.T + k
    before = reward(x, a, psi)
    for step, dW in enumerate(increments):
        moved = x + (x @ problem.A.T + a @ problem.B.T + problem.f) * dt
        for j, (C, D, e) in enumerate(problem.noise):
            moved = moved + (x @ C.T + a @ D.T + e) * dW[:, j, None]
        a = a + psi * dt + dW[:, len(problem.noise) :] @ problem.sigma_a.T
        x, psi = moved, np.hstack([moved, a]) @ K.T + k
        after = reward(x, a, psi)
        total += 0.5 * dt * math.exp(-beta * step * dt) * (before + math.exp(-beta * dt) * after)
        before = after
    T, H, h1, h0 = problem.terminal
    z = np.hstack([x, a])
    return total + math.exp(-beta * T) * (z @ h1 - 0.5 * np.sum(z * (z @ H), axis=1) + h0)


@pytest.mark.parametrize(
    "problem",
    [replace(UNSTABLE, terminal=Terminal(1.0, np.eye(2), np.ones(2), 0.3)), FINITE],
    ids=["1x1", "3x2"],
)
def test_simulated_returns_have_the_mean_of_the_closed_form(problem):
    d, size = problem.G.T.shape
    K, k = -0.6 * np.ones((d, size)) - np.eye(d, size, size - d), 0.2 * np.ones(d)
    z, paths, steps = 0.5 * np.ones(size), 20_000, 32
    dt = problem.terminal.T / steps
    noises = len(problem.noise) + d
    fine = np.random.default_rng(0).normal(size=(2 * steps, paths, noises)) * math.sqrt(dt / 2.0)
    fine = np.concatenate([fine, -fine], axis=1)  # antithetic
    coarse = fine[0::2] + fine[1::2]
    # the error of the mean is linear in the step, and cancels in 2 J(dt/2) - J(dt)
    each = 2.0 * returns(problem, K, k, z, dt / 2.0, fine) - returns(problem, K, k, z, dt, coarse)
    each = (each[:paths] + each[paths:]) / 2.0
    error = each.std() / math.sqrt(paths)
    exact = qs.lq.average_value(problem, K, k, z, np.zeros((size, size)))
    assert error < 0.005
    assert abs(exact) > 20.0 * error
    assert abs(each.mean() - exact) < 4.0 * error


def test_at_a_frozen_state_actions_have_the_boltzmann_density_of_q():
    """da = Psi da + sigma dB at a fixed x has the density exp(2 Q / (lambda sigma^2))."""
    problem = replace(FINITE, terminal=None, sigma_a=0.5)
    solution, x = solve(problem), np.array([0.4, -0.3, 0.2])
    draw, chains, dt = np.random.default_rng(1), 10_000, 3e-3
    a = np.zeros((chains, 2))
    for _ in range(2000):
        z = np.hstack([np.repeat(x[None], chains, axis=0), a])
        a = a + solution.score(z) * dt + 0.5 * math.sqrt(dt) * draw.normal(size=a.shape)
    temperature = 0.5 * problem.score_cost * 0.5**2
    cov = temperature * np.linalg.inv(solution.P[3:, 3:])
    mean = np.linalg.solve(solution.P[3:, 3:], solution.p[3:] - solution.P[3:, :3] @ x)
    spread = np.sqrt(np.diag(cov))
    assert np.all(np.abs(a.mean(axis=0) - mean) < 4.0 * spread / math.sqrt(chains))
    # four standard errors, and the variance that the step adds: rate dt / 2 of it
    rate = np.linalg.norm(solution.K[:, 3:], 2)
    allowed = (4.0 * math.sqrt(2.0 / chains) + rate * dt) * np.outer(spread, spread)
    assert np.all(np.abs(np.cov(a.T) - cov) < allowed)


# What cannot be solved, and what looks as if it could not.

D1 = {"C": [[0.0]], "D": [[1.0]], "e": [0.0]}
C4 = {"C": [[0.4]], "D": [[0.0]], "e": [0.0]}
APART = {"A": [[0.3, 0.0], [0.0, 0.5]], "B": [[1.0], [0.0]], "M": np.eye(3).tolist()}
C_APART = {"C": [[0.0, 0.0], [0.0, 1.5]]}
UNSOLVABLE = {
    "unreached mode": (APART, "not stabilisable: the mode of `A` with eigenvalue 0.5 grows"),
    "unreached pair": (
        {"A": [[0.2, 1], [-1, 0.2]], "B": [[0], [0]], "M": np.eye(3).tolist()},
        "not stabilisable: the mode of `A` with eigenvalue 0.2+1i",
    ),
    "unreached mode at the boundary": (
        {**APART, "A": [[0.3, 0.0], [0.0, 0.1]]},
        "not stabilisable: the mode of `A` with eigenvalue 0.1 grows",
    ),
    "twice the same unreached mode": (
        {**APART, "A": [[0.5, 1.0], [0.0, 0.5]], "B": [[1.0], [0.0]]},
        "not stabilisable: the mode of `A` with eigenvalue 0.5 grows",
    ),
    "action noise": (
        {"A": [[0.75]], "noise": [D1]},  # 2 A - B^2 / D^2 - beta = 0.3
        "not mean-square stabilisable: the noise that the action multiplies (`D`) is beyond the "
        "uncertainty threshold; e^(-beta t) E|z|^2 decays under no linear score (smallest growth "
        "rate 0.3)",
    ),
    "state noise": (
        {**APART, "A": [[0.3, 0.0], [0.0, -0.5]], "noise": [C_APART]},
        "not mean-square stabilisable: the noise that the state multiplies (`C`) is too strong "
        "where `B` hardly reaches; e^(-beta t) E|z|^2 decays under no linear score (smallest "
        "growth rate 1.05)",
    ),
    "unseen mode": (
        {"M": [[0.0, 0.0], [0.0, 1.0]]},
        "not detectable: the reward (`M`) does not see the mode with eigenvalue 0.3",
    ),
    "unseen noise": (
        {"A": [[0.05]], "M": [[0.0, 0.0], [0.0, 1.0]], "noise": [C4]},
        "not detectable: the reward (`M`) does not see the mode with eigenvalue 0.05, along which "
        "e^(-beta t) E|z|^2 does not decay without control (growth rate 0.06, beta/2 = 0.1)",
    ),
    "nothing seen, at the boundary": (
        {"A": [[0.1]], "M": [[0.0, 0.0], [0.0, 0.0]]},
        "not detectable",
    ),
    "no discount": ({"discount_rate": 0}, "`discount_rate` is 0 and the horizon infinite"),
    "reward for action": (
        {"M": [[1.0, 0.0], [0.0, -3.0]]},
        "no stabilising solution, because `M` is indefinite",
    ),
    "reward for growth": (
        {"A": [[0.5]], "M": [[-0.01, 0.0], [0.0, 1.0]]},
        "finite escape: `M` is indefinite, and over 5.83",
    ),
    "escape from M": (
        {**BASE, "A": [[0]], "B": [[0]], "M": [[0, 0], [0, -0.3]], "discount_rate": 0}
        | {"terminal": {"T": 3.0}},  # P_aa = -lambda tan(t) back from T
        f"finite escape: the value is infinite at t = {3.0 - math.pi / 2:.6g} and before",
    ),
    "escape from H": (
        {"A": [[0]], "B": [[0]], "M": [[0, 0], [0, 0]], "discount_rate": 0}
        | {"terminal": {"T": 1.0, "H": [[0, 0], [0, -1.0]]}},  # P_aa = -1 / (1 - t / lambda)
        "less than 0.3 s are left",
    ),
    "overflow": ({**APART, "terminal": {"T": 1e4}}, "too large for double precision"),
    "hardly reached": ({"B": [[1e-13]]}, "`B` hardly reaches a mode of `A` with real part 0.3"),
    "huge": ({"A": [[1e200]]}, "not stabilisable to working precision"),
    "on the boundary": (
        {"A": [[0.5 * (0.2 + 1.0) - 1e-13]], "noise": [D1]},
        "not mean-square stabilisable",
    ),
}


@pytest.mark.parametrize("name", UNSOLVABLE)
def test_unsolvable_problems_name_the_condition_that_fails(name):
    changes, message = UNSOLVABLE[name]
    with pytest.raises(Unsolvable, match=re.escape(message)) as failure:
        solve(make(**changes))
    assert "\n" not in str(failure.value)


SOLVABLE = {
    "no action cost": {"M": [[1.0, 0.0], [0.0, 0.0]]},
    "strong state noise": {"noise": [{"C": [[2.5]]}], "discount_rate": 0.5},
    "just under the threshold": {"A": [[0.599]], "noise": [D1]},
    "just reached": {**APART, "B": [[1.0], [1e-2]]},
    "just decaying": {**APART, "A": [[0.3, 0.0], [0.0, 0.09]]},
    "nothing seen": {"A": [[0.05]], "M": [[0.0, 0.0], [0.0, 0.0]], "m": [1.0, 0.5]},
    "no control": {"A": [[-0.3]], "B": [[0.0]]},
    "integrator": {"A": [[0.0]], "B": [[0.0]]},
    "zero noise": {"noise": [{"C": [[0.0]], "D": [[0.0]], "e": [0.0]}]},
    "no noise at all": {"sigma_a": 0.0},
    "at half the discount rate": {"A": [[0.1]]},
    "some reward for action": {"M": [[1.0, 0.0], [0.0, -0.3]]},
    "some reward for distance": {"A": [[-1.0]], "M": [[-1.0, 0.0], [0.0, 1.0]], "noise": [C4]},
}


@pytest.mark.parametrize("name", SOLVABLE)
def test_edge_cases_are_solved_and_are_the_limit_of_long_horizons(name):
    problem = make(**SOLVABLE[name])
    solution = solve(problem)
    assert solution.residual < 1e-14 and solution.abscissa < 0.0
    horizon = 40.0 / min(-solution.abscissa, problem.discount_rate)
    finite = solve(replace(problem, terminal=Terminal(horizon)))
    for part, limit in ((finite.P, solution.P), (finite.p, solution.p), (finite.c, solution.c)):
        assert np.linalg.norm(part - limit) <= 1e-9 * np.linalg.norm(limit)


def test_refusals_for_noise_are_proved():
    """No score stabilises if a Z >= 0 has d/dt E x'Zx >= beta E x'Zx whatever the action does.

    That is the case if [A'Z + ZA + C'ZC - beta Z, ZB + C'ZD; ., D'ZD] >= 0 (sums over the noise).
    """
    proved = 0
    for seed in range(40):
        problem = random_problem(seed, strength=0.3)
        try:
            solve(problem)
            continue
        except Unsolvable as refusal:
            found = re.search(r"not mean-square.*growth rate ([0-9.e+-]+)\)", str(refusal))
        assert found
        threshold = problem.discount_rate + float(found[1])
        eased = replace(problem, discount_rate=threshold + 1e-4 * (1.0 + threshold))
        P = solve(eased).P
        Z = P[:4, :4] / np.linalg.norm(P)
        A, B, beta = problem.A, problem.B, problem.discount_rate
        corner = A.T @ Z + Z @ A - beta * Z + sum(C.T @ Z @ C for C, _, _ in problem.noise)
        side = Z @ B + sum(C.T @ Z @ D for C, D, _ in problem.noise)
        low = sum(D.T @ Z @ D for _, D, _ in problem.noise)
        least = np.linalg.eigvalsh(np.block([[corner, side], [side.T, low]]))[0]
        assert least > -1e-3
        proved += 1
    assert proved >= 10, proved


def test_scores_that_do_not_keep_z_finite_are_refused_in_an_infinite_horizon():
    K = np.array([[0.0, -2.0]])
    message = "the score is not admissible: under it e^(-beta t) E|z|^2 grows at the rate 0.4"
    with pytest.raises(Unsolvable, match=re.escape(message)):
        evaluate(make(), K)
    assert not qs.lq.admissible(make(), K)
    assert qs.lq.admissible(make(), np.array([[-1.0, -2.0]]))
    assert qs.lq.admissible(UNSTABLE, qs.lq.admissible_gain(UNSTABLE))
    assert evaluate(make(terminal={"T": 3.0}), K).abscissa == pytest.approx(0.4)
    with pytest.raises(ValueError, match="constant in time; remove the `terminal`"):
        qs.lq.kleinman(FINITE, np.zeros((2, 5)))


def test_a_horizon_that_steps_reach_but_for_rounding_is_no_escape():
    common = {"A": [[1]], "B": [[2]], "noise": [], "M": np.eye(2).tolist(), "sigma_a": 1}
    common |= {"score_cost": 1, "discount_rate": 1}
    found, before, after = (
        solve(make(**common, terminal={"T": 0.2 + apart})) for apart in (0.0, -1e-5, 1e-5)
    )
    np.testing.assert_allclose(found.P, 0.5 * (before.P + after.P), rtol=1e-8)
    equation, zero = lq._equation(make(**common)), np.zeros((3, 3))
    first, P, _ = next(riccati.flow(equation, zero, 1.0))
    for apart in (1e-16, 1e-14, 1e-12):
        *_, (time, last, _) = riccati.flow(equation, zero, first + apart)
        assert time == first + apart
        np.testing.assert_allclose(last, P, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("at", [-0.1, 1.6, math.nan])
def test_times_outside_the_horizon_are_refused(at):
    message = f"`at` must lie in [0, 1.5], the problem's horizon; got {at}"
    with pytest.raises(ValueError, match=re.escape(message)):
        solve(FINITE, at=at)
    with pytest.raises(ValueError, match="`at` needs a problem with a `terminal`"):
        solve(UNSTABLE, at=at)


# Averages and distances.


def test_expected_values_and_relative_errors_are_those_of_quadrature():
    nodes, weights = hermite_e.hermegauss(6)  # exact for these polynomials
    z = np.array(list(itertools.product(nodes, nodes)))
    weight = np.prod(list(itertools.product(weights, weights)), axis=1) / (2.0 * math.pi)
    exact = solve(UNSTABLE)
    other = evaluate(UNSTABLE, exact.K - 0.3, exact.k + 0.1)

    def norm(values):
        return math.sqrt(weight @ np.sum(values.reshape(len(z), -1) ** 2, axis=1))

    fields = {name: getattr(other, name) for name in "PpcKk"}
    errors = qs.lq.relative_error(exact, **fields)
    assert_close(errors["q"], norm(other.q(z) - exact.q(z)) / norm(exact.q(z)))
    apart = norm(other.gradient(z) - exact.gradient(z)) / norm(exact.gradient(z))
    assert_close(errors["grad_a_q"], apart)
    assert_close(errors["score"], norm(other.score(z) - exact.score(z)) / norm(exact.score(z)))
    assert set(qs.lq.relative_error(exact, K=exact.K, k=exact.k)) == {"score"}
    assert qs.lq.relative_error(exact, P=exact.P, p=exact.p) == {"grad_a_q": 0.0}
    skewed = exact.P + np.array([[0.0, 1.0], [-1.0, 0.0]])  # the same z'Pz
    same = qs.lq.relative_error(exact, P=skewed, p=exact.p, c=exact.c)
    assert max(same.values()) < 1e-15

    mean, root = np.array([0.3, -0.2]), np.array([[0.5, 0.0], [0.2, 0.7]])
    average = weight @ evaluate(UNSTABLE, exact.K, exact.k).q(mean + z @ root.T)
    assert_close(
        qs.lq.average_value(UNSTABLE, exact.K, exact.k, mean, root @ root.T), float(average)
    )
    # the greedy score of the optimum is the optimum, and no other has a higher average
    assert_close(float(average), exact.expected_q(mean, root @ root.T))
    assert other.expected_q(mean, root @ root.T) < average


# Files.


@pytest.mark.parametrize("name", ["unstable", "finite"])
def test_problems_survive_json(name):
    problem = Problem.from_json((EXAMPLES / f"{name}.json").read_text())
    again = Problem.from_json(problem.to_json())
    assert again.to_json() == problem.to_json()
    np.testing.assert_array_equal(solve(again).P, solve(problem).P)
    assert Problem.from_json(json.loads(problem.to_json())).to_json() == problem.to_json()


@pytest.mark.parametrize(
    ("score_cost", "discount_rate", "r0", "sigma_a"),
    [(1e-3, 0.01, 1e6, 0.1), (0.3, 0.01, 1e6, 0.0), (1e-3, 1e-3, 1e4, 0.0), (1e-5, 0.01, 1e4, 0.1)],
)
def test_a_constant_reward_changes_no_score(score_cost, discount_rate, r0, sigma_a):
    fields = {
        **{"A": [[-1.0]], "B": [[1.0]], "M": [[1.0, 0.0], [0.0, 0.1]], "sigma_a": sigma_a},
        **{"score_cost": score_cost, "discount_rate": discount_rate},
    }
    plain, paid = lq.solve(lq.Problem(**fields)), lq.solve(lq.Problem(**fields, r0=r0))
    np.testing.assert_allclose(paid.K, plain.K, rtol=1e-9)
    assert paid.c - plain.c == pytest.approx(r0 / discount_rate, rel=1e-9)


@pytest.mark.parametrize("score_cost", [1e-3, 0.3])
def test_over_a_finite_horizon_neither_does_it(score_cost):
    plain = replace(FINITE, score_cost=score_cost)
    T, H, h1, h0 = plain.terminal or Terminal(0.0)
    exact, beta = lq.solve(plain), plain.discount_rate
    for r0, constant in ((1e12, h0), (0.0, h0 + 1e12)):
        paid = lq.solve(replace(plain, r0=r0, terminal=Terminal(T, H, h1, constant)))
        for name in ("P", "p", "K", "k"):
            np.testing.assert_allclose(getattr(paid, name), getattr(exact, name), rtol=1e-9)
        extra = (r0 - plain.r0) * -math.expm1(-beta * T) / beta
        assert paid.c == pytest.approx(
            exact.c + extra + (constant - h0) * math.exp(-beta * T), rel=1e-9
        )


def test_what_is_only_half_solved_is_refused(monkeypatch):
    monkeypatch.setattr(riccati, "optimize", riccati.evaluate)  # of the first admissible gain
    with pytest.raises(lq.Unsolvable, match="the equation is only solved to .* of its terms"):
        lq.solve(make())


def test_what_is_left_out_is_zero_and_asymmetry_does_not_matter():
    problem = make(M=[[1.0, 0.4], [0.0, 0.3]], terminal={"T": 1.0, "H": [[1.0, 0.2], [0.0, 1.0]]})
    np.testing.assert_array_equal(problem.M, [[1.0, 0.2], [0.2, 0.3]])
    assert problem.terminal is not None and problem.terminal.H[0, 1] == problem.terminal.H[1, 0]
    assert not problem.f.any() and not problem.m.any() and problem.noise == ()
    np.testing.assert_array_equal(problem.sigma_a, [[0.6]])
    assert make(noise=[{}]).noise[0].C.shape == (1, 1)
    with pytest.raises(ValueError, match="read-only"):
        problem.A[0, 0] = 1.0


INVALID = {
    "`A` must be a square matrix, got 1 x 2.": {"A": [[1.0, 2.0]]},
    "`A` must be a square matrix, got the number 0.3.": {"A": 0.3},
    "`A` has rows of different lengths; got [[1.0], [1.0, 2.0]].": {"A": [[1.0], [1.0, 2.0]]},
    "`B` must be of shape 1 x any, got 2 x 1.": {"B": [[1.0], [2.0]]},
    "`B` must be of shape 1 x any, got 1 x 0.": {"B": [[]]},
    "`f` must be a list of 1, got 2.": {"f": [1.0, 2.0]},
    "`M` must be of shape 2 x 2, got 1 x 1.": {"M": [[1.0]]},
    "`M` must hold finite numbers, got [[nan, 0], [0, 1]].": {"M": [[math.nan, 0], [0, 1]]},
    "`M` must hold numbers, got '1'.": {"M": [["1", 0], [0, 1]]},
    "`M` must hold numbers, got True.": {"M": [[True, 0], [0, 1]]},
    "`M` must hold real numbers": {"M": [[1j, 0], [0, 1]]},
    "`m` must hold numbers, got None.": {"m": [None, 1.0]},
    "`m` must hold finite numbers, got [inf, 1.0].": {"m": [math.inf, 1.0]},
    "`M` must hold numbers, got None.": {"M": None},
    "`sigma_a` must hold numbers, got None.": {"sigma_a": None},
    "`r0` must be a number, got '3'.": {"r0": "3"},
    "`r0` must lie in (-inf, inf), got nan.": {"r0": math.nan},
    "`sigma_a` must be of shape 1 x 1 or a number, got 2.": {"sigma_a": [1.0, 2.0]},
    "`sigma_a` must lie in (-inf, inf), got inf.": {"sigma_a": math.inf},
    "`score_cost` must lie in (0, inf), got 0.": {"score_cost": 0},
    "`score_cost` must lie in (0, inf), got -0.3.": {"score_cost": -0.3},
    "`score_cost` must be a number, got [1.0].": {"score_cost": [1.0]},
    "`score_cost` must be a number, got [[1], [1, 2]].": {"score_cost": [[1], [1, 2]]},
    "`sigma_a` has rows of different lengths; got [[1], [1, 2]].": {"sigma_a": [[1], [1, 2]]},
    "`discount_rate` must lie in [0, inf), got -0.2.": {"discount_rate": -0.2},
    "`noise` must be a list of objects with C, D and e, got 3.": {"noise": 3},
    "`noise[0]` must be an object with the keys C, D, e; got 3.": {"noise": [3]},
    "`noise[0].C` must be of shape 1 x 1, got 2 x 2.": {"noise": [{"C": [[1, 0], [0, 1]]}]},
    "`noise[1].e` must be a list of 1, got the number 1.0.": {"noise": [{}, {"e": 1.0}]},
    "`noise[0]` has an unknown key 'c'. Known: C, D, e.": {"noise": [{"c": [[1.0]]}]},
    "`terminal` lacks the key 'T'.": {"terminal": {"h0": 1.0}},
    "`terminal` must be an object with the keys T, H, h1, h0; got 1.5.": {"terminal": 1.5},
    "`terminal.T` must lie in (0, inf), got 0.": {"terminal": {"T": 0}},
    "`terminal.H` must be of shape 2 x 2, got 1 x 1.": {"terminal": {"T": 1, "H": [[1.0]]}},
    "`terminal.h1` must be a list of 2, got 1.": {"terminal": {"T": 1, "h1": [1.0]}},
    "the problem has an unknown key 'scorecost'; the closest is 'score_cost'.": {"scorecost": 1.0},
}


@pytest.mark.parametrize("message", INVALID)
def test_invalid_fields_are_named_and_shown(message):
    with pytest.raises(ValueError, match=re.escape(message)) as failure:
        make(**INVALID[message])
    assert "\n" not in str(failure.value)


def test_missing_fields_and_other_documents_are_refused():
    with pytest.raises(ValueError, match="the problem lacks the key 'score_cost'"):
        Problem.from_json({name: BASE[name] for name in BASE if name != "score_cost"})
    with pytest.raises(ValueError, match=r"the problem must be an object with the keys A, B, f, "):
        Problem.from_json("[1, 2]")
    for wrong, message in (
        ({"K": [[1.0]]}, "`K` must be of shape 1 x 2, got 1 x 1"),
        ({"K": [[1.0, 2.0]], "k": [1.0, 2.0]}, "`k` must be a list of 1, got 2"),
        ({"k": [1.0]}, "the score lacks the key 'K'"),
        ({"K": [[1.0, 2.0]], "kk": [1.0]}, "the score has an unknown key 'kk'; the closest is 'k'"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            UNSTABLE.read_score(wrong)
    with pytest.raises(ValueError, match=r"`K` must be of shape 1 x 2, got 2 x 2"):
        evaluate(UNSTABLE, np.zeros((2, 2)))
    wrong_noise: tuple = ("C",)
    with pytest.raises(
        ValueError, match=re.escape("`noise[0]` must be a tuple (C, D, e), got 'C'")
    ):
        replace(UNSTABLE, noise=wrong_noise)
    with pytest.raises(ValueError, match="`terminal` must be a Terminal or None, got 3"):
        replace(UNSTABLE, terminal=3)


# The command line.


def call(capsys, *args):
    """(exit code, stdout, stderr) of `qscore lq`."""
    code = 0
    try:
        cli.main(["lq", *map(str, args)])
    except SystemExit as error:
        code = error.code
    out, err = capsys.readouterr()
    return code, out, err


def test_command_prints_the_solution(capsys, tmp_path):
    code, out, err = call(capsys, "solve", EXAMPLES / "unstable.json", "--json")
    assert code == 0 and err == "" and out.count("\n") == 1
    result, solution = json.loads(out), solve(UNSTABLE)
    assert list(result) == ["P", "p", "c", "K", "k", "residual", "abscissa"]
    for name, value in result.items():
        np.testing.assert_array_equal(value, getattr(solution, name))

    score = tmp_path / "score.json"
    score.write_text(out)  # a solution is a score file as well
    code, out, _ = call(capsys, "solve", EXAMPLES / "unstable.json", "--score", score, "--json")
    for name in "PpcKk":  # the optimum is the value of its own score
        assert_close(np.array(json.loads(out)[name]), np.asarray(result[name]))
    score.write_text('{"K": [[-1, -2]], "k": [0.5]}')
    code, out, _ = call(capsys, "solve", EXAMPLES / "unstable.json", "--score", score, "--json")
    expected = evaluate(UNSTABLE, np.array([[-1.0, -2.0]]), np.array([0.5]))
    assert code == 0 and json.loads(out)["c"] == expected.c < solution.c

    code, out, _ = call(capsys, "solve", EXAMPLES / "finite.json", "--at", 0.5, "--json")
    np.testing.assert_array_equal(json.loads(out)["P"], solve(FINITE, at=0.5).P)
    code, out, err = call(capsys, "solve", EXAMPLES / "finite.json")
    assert code == 0 and "T = 1.5 s" in out and "abscissa" in out and err == ""


REFUSED = {
    "solve nowhere.json": "cannot read nowhere.json: No such file or directory.",
    "solve .": "cannot read .: Is a directory.",
    "solve broken.json": "broken.json is not valid JSON: Expecting value: line 2 column 7",
    "solve deep.json": "deep.json is not valid JSON",
    "solve binary.json": "binary.json is not a text file.",
    "solve typo.json": "typo.json: the problem has an unknown key 'scorecost'; the closest is",
    "solve unsolvable.json": "unsolvable.json: not stabilisable: the mode of `A`",
    "solve finite.json --at 1.6": "`at` must lie in [0, 1.5], the problem's horizon; got 1.6",
    "solve finite.json --at -1": "`at` must lie in [0, 1.5], the problem's horizon; got -1.0",
    "solve good.json --at 0": "--at 0 needs a problem with a `terminal`; it has none.",
    "solve good.json --score typo.json": "typo.json: the score has an unknown key 'A'",
    "solve good.json --score wrong.json": "wrong.json: `K` must be of shape 1 x 2, got 1 x 1.",
    "solve good.json --score bad.json": "good.json: the score is not admissible",
    "solv good.json": "unknown lq command 'solv'; the closest is 'solve'",
    "": "Missing from qscore lq solve: PATH",
}


@pytest.mark.parametrize("command", REFUSED)
def test_command_refuses_with_one_line(capsys, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    for name, text in {
        "broken": '{"A":\n[[0.3,, 1]]}',
        "deep": "[" * 100_000,
        "typo": json.dumps({**BASE, "scorecost": 1.0}),
        "unsolvable": json.dumps({**BASE, **APART}),
        "good": json.dumps(BASE),
        "finite": FINITE.to_json(),
        "wrong": '{"K": [[1.0]]}',
        "bad": '{"K": [[0.0, -2.0]]}',
    }.items():
        Path(f"{name}.json").write_text(text)
    Path("binary.json").write_bytes(b"\xff\xfe\x00")
    code, out, err = call(capsys, *command.split())
    assert code == 2 and out == ""
    assert REFUSED[command] in err and err.startswith("qscore: ") and err.count("\n") == 1
