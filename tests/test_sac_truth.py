"""SAC against SciPy, NumPy in float64, and the best squashed Gaussian of a known reward."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from helpers import (
    HIDDEN,
    along,
    assert_close,
    learn,
    numpy_mlp,
    numpy_q,
    perturbed,
    polynomial_critics,
    quick_jit,
    random_batch,
    random_state,
    relu,
    unstack,
    wide,
)
from scipy import optimize, stats

from qscore import SAC, Host, Spec
from qscore.algorithms.sac import actor_loss, temperature_loss
from qscore.networks import GaussianActor, tanh_gaussian
from qscore.optimize import gradient_step

SPEC = Spec(obs_size=3, action_size=2, dt=0.05)
ROWS = 64


# The squashed Gaussian ----------------------------------------------------------------------------


def log_slope(u):
    """log(1 - tanh(u)^2) = -2 log cosh u in NumPy, with every digit at any u."""
    return 2.0 * np.log(2.0) - 2.0 * np.logaddexp(u, -u)


def log_density(u, mean, std):
    """log pi(tanh u), by the change of variables; sum over the last axis."""
    return np.sum(stats.norm.logpdf(u, mean, std) - log_slope(u), axis=-1)


@quick_jit
def squashed(mean, log_std, noise):
    return jax.vmap(tanh_gaussian)(mean, log_std, noise)


def test_log_probability_is_scipys_with_the_change_of_variables():
    # up to where tanh is 1 and its slope 0 in float32 (|u| = 9), and in float64 (|u| = 19)
    u = np.array([-20.0, -12.0, -9.5, -3.0, -0.4, 0.0, 0.7, 2.0, 9.5, 12.0, 20.0])
    pairs = np.stack([u, u[::-1] + 0.1], axis=1)  # two components: a density is their product
    mean, log_std = (np.full_like(pairs, row) for row in ([0.5, -0.5], [0.25, -0.75]))
    noise = (pairs - mean) / np.exp(log_std)
    action, log_prob = squashed(*(jnp.asarray(x, jnp.float32) for x in (mean, log_std, noise)))
    assert_close(action, np.tanh(pairs))
    assert_close(log_prob, log_density(pairs, mean, np.exp(log_std)))
    without = np.sum(stats.norm.logpdf(pairs, mean, np.exp(log_std)), axis=-1)
    assert np.median(np.abs(without - log_density(pairs, mean, np.exp(log_std)))) > 1.0


def test_density_is_the_slope_of_the_distribution_function():
    mean, std, step = 0.3, 0.8, 1e-5
    action = np.linspace(-0.99, 0.99, 41)

    def below(action):
        return stats.norm.cdf(np.arctanh(action), mean, std)

    slope = (below(action + step) - below(action - step)) / (2.0 * step)
    column = np.ones((41, 1))
    noise = (np.arctanh(action)[:, None] - mean) / std
    inputs = (mean * column, np.log(std) * column, noise)
    _, log_prob = squashed(*(jnp.asarray(x, jnp.float32) for x in inputs))
    assert_close(np.exp(log_prob), slope, loosen=10.0, why="the exponential of a float32")


@pytest.mark.parametrize("std", [0.05, 0.6, 1.5])
@pytest.mark.parametrize("mean", [0.0, -1.2])
def test_density_integrates_to_one(mean, std):
    # steps that shrink towards the bounds, where a wide Gaussian piles up
    u = np.linspace(-9.0, 9.0, 20_001)
    noise = jnp.asarray((u - mean) / std, jnp.float32)[:, None]
    column = jnp.ones_like(noise)
    action, log_prob = squashed(mean * column, np.float32(np.log(std)) * column, noise)
    np.testing.assert_allclose(np.tanh(u), action[:, 0], atol=1e-6)
    assert abs(np.trapezoid(np.exp(wide(log_prob)), np.tanh(u)) - 1.0) < 1e-4


def test_gradient_stays_finite_and_exact_at_the_bounds():
    # with the noise held: d log pi / d mean = 2 tanh(u), d log pi / d log std = 2 tanh(u) std n - 1
    mean = jnp.array([[-20.0], [-9.0], [0.3], [9.0], [20.0]])
    noise, log_std = jnp.full_like(mean, 0.7), jnp.full_like(mean, -1.0)
    gradients = jax.vmap(jax.grad(lambda *args: tanh_gaussian(*args)[1], argnums=(0, 1)))
    by_mean, by_log_std = quick_jit(gradients)(mean, log_std, noise)
    slope = 2.0 * np.tanh(wide(mean) + 0.7 * np.exp(-1.0))
    assert_close(by_mean, slope)
    assert_close(by_log_std, slope * 0.7 * np.exp(-1.0) - 1.0)


def test_log_probability_survives_the_smallest_deviation():
    mean, noise = np.array([[1.0]]), np.array([[1.7]])
    log_std = np.full((1, 1), -20.0)
    _, log_prob = squashed(*(jnp.asarray(x, jnp.float32) for x in (mean, log_std, noise)))
    expected = stats.norm.logpdf(1.7) + 20.0 - log_slope(1.0)
    assert_close(log_prob, np.array([expected]))


def test_deviations_are_bounded():
    actor = GaussianActor(1, 1, (4,), key=jr.key(0))
    extreme = jax.tree.map(lambda leaf: 1e3 * jnp.ones_like(leaf), actor)
    assert float(extreme(jnp.ones(1))[1][0]) == 2.0
    assert float(jax.tree.map(jnp.negative, extreme)(-jnp.ones(1))[1][0]) == -20.0


def test_explored_actions_follow_the_density_and_evaluation_takes_its_centre():
    spec = Spec(obs_size=1, action_size=1, dt=0.1)
    algorithm = SAC(hidden=HIDDEN)
    state = quick_jit(lambda key: algorithm.init(spec, key=key))(jr.key(0))
    state = dataclasses.replace(state, actor=perturbed(state.actor, jr.key(1)))
    obs = jnp.array([0.4])
    mean, log_std = (float(x[0]) for x in state.actor(obs))

    @quick_jit
    def explored(keys):
        return jax.vmap(lambda k: algorithm.act(state, (), obs, key=k, explore=True)[0])(keys)

    u = np.arctanh(wide(explored(jr.split(jr.key(2), 4000)))[:, 0])
    assert stats.kstest(u, "norm", (mean, np.exp(log_std))).pvalue > 0.01
    for key in (jr.key(3), jr.key(4)):
        action, _ = algorithm.act(state, (), obs, key=key, explore=False)
        assert_close(action, np.tanh([mean]))


# One update ---------------------------------------------------------------------------------------


def numpy_policy(actor, obs, noise):
    """The action and log pi of a `GaussianActor` on rows, and u."""
    mean, log_std = np.split(numpy_mlp(actor.mlp, obs, relu)[0], 2, axis=-1)
    u = mean + np.exp(np.clip(log_std, -20.0, 2.0)) * noise
    return np.tanh(u), log_density(u, mean, np.exp(np.clip(log_std, -20.0, 2.0))), u


@functools.cache
def setting(**fields):
    """An algorithm, a state whose networks are all random and differ, and its compiled update."""
    algorithm = SAC(hidden=HIDDEN, **fields)
    state = random_state(algorithm, SPEC, ("actor", "critics", "target_critics"))
    update = quick_jit(lambda state, batch, key: algorithm.update(state, batch, key=key))
    return algorithm, state, update


def test_critics_learn_the_soft_value_of_the_policys_next_action():
    algorithm, state, _ = setting(initial_temperature=0.7, discount=0.9)
    batch, keys = random_batch(SPEC, ROWS, jr.key(12)), jr.split(jr.key(13), ROWS)

    # updates on one row each report that row's target and loss
    one_row = jax.vmap(
        lambda row, key: algorithm.update(
            state, jax.tree.map(lambda leaf: leaf[None], row), key=key
        )[1]
    )
    metrics = quick_jit(one_row)(batch, keys)
    noise = jax.vmap(lambda key: jr.normal(jr.split(key)[0], (1, SPEC.action_size))[0])(keys)

    obs, action, next_obs = wide(batch.obs), wide(batch.action), wide(batch.next_obs)
    online, target = unstack(state.critics), unstack(state.target_critics)
    next_action, log_prob, u = numpy_policy(wide(state.actor), next_obs, wide(noise))
    alive = 1.0 - wide(batch.terminated)

    def expected(critics=target, least=np.minimum, log_prob=log_prob, alive=alive):
        q = least(*(numpy_q(critic, next_obs, next_action) for critic in critics))
        return wide(batch.reward) + 0.9 * alive * (q - 0.7 * log_prob)

    y = expected()
    tolerance = {"loosen": 20.0, "why": "three networks and a logarithm"}
    assert_close(metrics["q_target"], y, **tolerance)
    loss = sum((numpy_q(critic, obs, action) - y) ** 2 for critic in online)
    assert_close(metrics["critic_loss"], loss, **tolerance)
    ended = np.asarray(batch.terminated)
    np.testing.assert_array_equal(  # neither value nor entropy beyond the end
        np.asarray(metrics["q_target"])[ended], np.asarray(batch.reward)[ended]
    )
    assert_close(metrics["action_saturation"], np.mean(np.abs(next_action) > 0.95, axis=1))
    for name, wrong in {
        "the online critics": expected(online),
        "the larger critic": expected(least=np.maximum),
        "entropy as a cost": expected(log_prob=-log_prob),
        "no entropy": expected(log_prob=0.0),
        "no change of variables": expected(log_prob=log_prob + log_slope(u).sum(axis=1)),
        "bootstrapping through death": expected(alive=1.0),
    }.items():
        assert np.mean(np.abs(wrong - y)) > 0.01, name


def test_actors_gradient_is_that_of_the_soft_value():
    _, state, _ = setting()
    obs = random_batch(SPEC, ROWS, jr.key(12)).obs
    noise = jr.normal(jr.key(14), (ROWS, SPEC.action_size))
    gradient, metrics = quick_jit(jax.grad(actor_loss, has_aux=True))(
        state.actor, state.critics, obs, jnp.float32(0.7), noise
    )
    actor, critics = wide(state.actor), unstack(state.critics)

    def numpy_loss(actor, least=np.minimum, temperature=0.7, correction=1.0):
        action, log_prob, u = numpy_policy(actor, wide(obs), wide(noise))
        q = least(*(numpy_q(critic, wide(obs), action) for critic in critics))
        log_prob = log_prob + (1.0 - correction) * log_slope(u).sum(axis=1)
        return np.mean(temperature * log_prob - q), -np.mean(log_prob)

    assert_close(metrics["actor_loss"], numpy_loss(actor)[0])
    assert_close(metrics["entropy"], numpy_loss(actor)[1])

    mutants = {
        "entropy as a cost": {"temperature": -0.7},
        "the larger critic": {"least": np.maximum},
        "no change of variables": {"correction": 0.0},
    }
    caught = dict.fromkeys(mutants, False)
    for seed in range(5):
        slope, quotient = along(state.actor, gradient, jr.key(20 + seed))
        assert abs(slope - quotient(lambda actor: numpy_loss(actor)[0])) < 1e-4
        for name, mutant in mutants.items():
            wrong = quotient(lambda actor, mutant=mutant: numpy_loss(actor, **mutant)[0])
            caught[name] |= abs(slope - wrong) > 1e-2
    assert all(caught.values()), caught


def test_temperatures_gradient_is_the_missing_entropy():
    for entropy, target in ((-3.0, -2.0), (1.5, -2.0), (0.25, 0.5)):
        slope = jax.grad(lambda *args: temperature_loss(*args)[0])(
            jnp.float32(0.3), jnp.float32(entropy), target
        )
        assert float(slope) == entropy - target


def test_temperature_moves_towards_its_target_entropy():
    batch, lr = random_batch(SPEC, ROWS, jr.key(12)), 3e-4
    steps = []
    for given, target in ((None, -2.0), (1.5, 1.5)):  # None is -1 per component
        _, state, update = setting(target_entropy=given)
        after, metrics = update(state, batch, jr.key(15))
        assert metrics["temperature"] == 1.0
        gradient = wide(metrics["entropy"]) - target
        # Adam's first step is its step size, downhill; its first moment is a tenth of the gradient
        assert_close(after.temperature_opt[0].mu, 0.1 * gradient)
        steps.append(-np.sign(gradient) * lr)
        assert_close(after.log_temperature, steps[-1], loosen=10.0, why="Adam's division")
    assert steps[0] < 0.0 < steps[1]  # more entropy than asked for, and less
    # and it can be fixed
    _, state, update = setting(learn_temperature=False, initial_temperature=0.2)
    for seed in range(2):
        state, metrics = update(state, batch, jr.key(seed))
        assert_close(metrics["temperature"], np.float32(0.2))
    assert_close(np.exp(state.log_temperature), np.float32(0.2))


def test_one_update_moves_the_targets_and_the_actor_against_the_new_critics():
    _, start, update = setting(target_rate=0.01)
    batch = random_batch(SPEC, ROWS, jr.key(12))
    after, metrics = update(start, batch, jr.key(16))
    followed = jax.tree.map(
        lambda new, old: 0.01 * new + 0.99 * old, after.critics, start.target_critics
    )
    assert_close(after.target_critics, followed)
    # the actor that the entropy is of is the one before its step
    obs, noise = wide(batch.obs), wide(jr.normal(jr.split(jr.key(16))[1], (ROWS, 2)))
    action, log_prob, _ = numpy_policy(wide(start.actor), obs, noise)
    assert_close(metrics["entropy"], -np.mean(log_prob))
    q = np.minimum(*(numpy_q(critic, obs, action) for critic in unstack(after.critics)))
    assert_close(metrics["actor_loss"], np.mean(log_prob - q))
    before = np.minimum(*(numpy_q(critic, obs, action) for critic in unstack(start.critics)))
    assert abs(np.mean(before - q)) > 1e-4


# What the actor converges to ----------------------------------------------------------------------

QUADRATICS = np.array([[-2.0, 2.0, 0.0], [-1.0, -0.4, 0.5]])  # two Q_i(a) that cross at 0.17
TEMPERATURE = 0.3


def best_squashed_gaussian(least=np.minimum, temperature=TEMPERATURE):
    """(tanh mean, std) that maximises E min_i Q_i(a) + temperature * entropy, by quadrature."""
    noise = np.linspace(-8.0, 8.0, 4001)
    weight = stats.norm.pdf(noise) * (noise[1] - noise[0])

    def loss(parameters):
        mean, log_std = parameters
        u = mean + np.exp(log_std) * noise
        q = least(*(np.polyval(each, np.tanh(u)) for each in QUADRATICS))
        log_prob = stats.norm.logpdf(noise) - log_std - log_slope(u)
        return weight @ (temperature * log_prob - q)

    starts = [(mean, log_std) for mean in (-1.0, 0.0, 1.0) for log_std in (-1.5, 0.0)]
    found = [optimize.minimize(loss, start, method="Nelder-Mead", tol=1e-9) for start in starts]
    mean, log_std = min(found, key=lambda result: result.fun).x
    return np.array([np.tanh(mean), np.exp(log_std)])


def test_actor_finds_the_best_squashed_gaussian():
    steps, rows = 3000, 256
    critics = polynomial_critics(QUADRATICS)
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, steps))

    @jax.jit
    def train(key):
        init_key, loop_key = jr.split(key)
        actor = GaussianActor(1, 1, (8,), key=init_key)
        obs = jnp.ones((rows, 1))

        def step(carry, key):
            actor, opt_state = carry
            inputs = (critics, obs, jnp.float32(TEMPERATURE), jr.normal(key, (rows, 1)))
            return gradient_step(actor_loss, actor, optimizer, opt_state, *inputs)[:2], None

        carry = (actor, optimizer.init(actor))  # pyright: ignore[reportArgumentType]
        (actor, _), _ = jax.lax.scan(step, carry, jr.split(loop_key, steps))
        mean, log_std = actor(obs[0])
        return jnp.tanh(mean[0]), jnp.exp(log_std[0])

    found, best = np.array(train(jr.key(17))), best_squashed_gaussian()
    assert np.max(np.abs(found - best)) < 0.02, (found, best)
    for name, wrong in {
        "the larger critic": best_squashed_gaussian(least=np.maximum),
        "the critics' mean": best_squashed_gaussian(least=lambda a, b: (a + b) / 2.0),
        "half the temperature": best_squashed_gaussian(temperature=TEMPERATURE / 2.0),
    }.items():
        assert np.max(np.abs(wrong - best)) > 0.05, name


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_learns_pendulum(seed):
    # small networks and large steps: seconds, not minutes
    steps = {"actor_lr": 1e-3, "critic_lr": 1e-3, "warmup_steps": 1_000}
    algorithm = SAC(hidden=(64, 64), batch_size=128, **steps)
    session = learn(Host("Pendulum-v1"), algorithm, seed, steps=6_000, eval_episodes=5)
    returns, _ = session.evaluate(0)
    assert np.mean(returns) > -250.0
