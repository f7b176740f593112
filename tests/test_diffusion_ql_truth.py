"""Diffusion-QL against NumPy in float64: through the chain, and where the value pulls it."""

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
    numpy_denoiser,
    numpy_gradient,
    numpy_q,
    polynomial_critics,
    quick_jit,
    random_batch,
    random_state,
    unstack,
    wide,
)
from scipy import special

from qscore import DiffusionQL, Host, Spec, replay
from qscore.algorithms.diffusion_ql import value_loss

SPEC = Spec(obs_size=3, action_size=2, dt=0.05)
LINE = Spec(obs_size=1, action_size=1, dt=0.05)
ROWS = 64
CHAIN = DiffusionQL().chain
CHAINED = {"loosen": 20.0, "why": "five networks, one by another"}
ROUNDED = {"loosen": 10.0, "why": "a difference of parameters"}


@functools.cache
def setting(spec=SPEC, **fields):
    """An algorithm, a state whose networks are all random and differ, and its compiled update."""
    algorithm = DiffusionQL(hidden=HIDDEN, **fields)
    names = ("actor", "average_actor", "critics", "target_critics")
    state = random_state(algorithm, spec, names)
    update = quick_jit(lambda state, batch, key: algorithm.update(state, batch, key=key))
    return algorithm, state, update


# The chain, in NumPy ------------------------------------------------------------------------------


def chain_noise(key, rows):
    """What a batch of chains draws, in float64: their starts, and their noises by level."""
    draws = wide(jr.normal(key, (CHAIN.levels, rows, SPEC.action_size)))
    return draws[-1], np.roll(draws, 1, axis=0)


def chain_noise_each(keys):
    """The same of chains that are sampled one by one, each with a key of its own."""
    shape = (CHAIN.levels, SPEC.action_size)
    draws = np.swapaxes(wide(jax.vmap(lambda key: jr.normal(key, shape))(keys)), 0, 1)
    return draws[-1], np.roll(draws, 1, axis=0)


def numpy_chain(actor, obs, noise):
    """Sampled actions of one network, or of a list of one per level."""
    networks = actor if isinstance(actor, list) else [actor] * CHAIN.levels
    beta, alpha, sigma = wide(tuple(CHAIN.tables))
    noised, steps = noise
    for t in range(CHAIN.levels - 1, -1, -1):
        eps = numpy_denoiser(networks[t], obs, noised, t)
        clean = (noised - sigma[t] * eps) / alpha[t]
        before = alpha[t - 1] if t > 0 else 1.0
        remains = 1.0 - before**2
        mean = before * beta[t] * np.clip(clean, -1.0, 1.0)
        mean = (mean + np.sqrt(1.0 - beta[t]) * remains * noised) / sigma[t] ** 2
        noised = mean + np.sqrt(beta[t] * remains / sigma[t] ** 2) * steps[t]
    return np.clip(noised, -1.0, 1.0)


def calm(actor):
    """Half of every parameter: more of its clean estimates lie in the box, where there is slope."""
    return jax.tree.map(lambda leaf: 0.5 * leaf, actor)


def test_chain_is_the_ancestral_sampler():
    _, state, _ = setting()
    obs, key = random_batch(SPEC, ROWS, jr.key(12)).obs, jr.key(13)
    sample = quick_jit(lambda obs, key: CHAIN.sample_batch(state.actor, obs, key=key))
    expected = numpy_chain(wide(state.actor), wide(obs), chain_noise(key, ROWS))
    assert_close(sample(obs, key), expected, **CHAINED)


# The value term -----------------------------------------------------------------------------------


@functools.cache
def compiled_value_loss(normalization):
    """The value term and its gradient, for any leader."""

    def loss(actor, critics, obs, leader, key):
        choices = {"chain": CHAIN, "normalization": normalization}
        return value_loss(actor, critics, obs, leader=leader, key=key, **choices)

    return quick_jit(jax.value_and_grad(loss))


@pytest.mark.parametrize("leader", [0, 1])
@pytest.mark.parametrize("normalization", ["value", "gradient"])
def test_value_is_differentiated_through_the_whole_chain(normalization, leader):
    _, state, _ = setting()
    actor = calm(state.actor)
    obs, key = random_batch(SPEC, ROWS, jr.key(12)).obs, jr.key(14)
    value, gradient = compiled_value_loss(normalization)(
        actor, state.critics, obs, jnp.int32(leader), key
    )
    base, critics, obs = wide(actor), unstack(state.critics), wide(obs)
    noise = chain_noise(key, ROWS)

    def unit(action, leader=leader):
        if normalization == "value":
            return np.mean(np.abs(numpy_q(critics[1 - leader], obs, action)))
        return np.mean(np.abs(numpy_gradient(critics[leader], obs, action)))

    held = unit(numpy_chain(base, obs, noise))

    def loss(actor, live=range(CHAIN.levels), lead=leader, divisor=lambda action: held, sign=-1.0):
        networks = [actor if level in live else base for level in range(CHAIN.levels)]
        action = numpy_chain(networks, obs, noise)
        return sign * np.mean(numpy_q(critics[lead], obs, action)) / divisor(action)

    assert_close(value, np.float64(loss(base)), **CHAINED)
    for name, wrong in {
        "the other critic": loss(base, lead=1 - leader),
        "the other critic's unit": loss(base, divisor=lambda action: unit(action, 1 - leader)),
        "no unit": loss(base, divisor=lambda action: 1.0),
        "descent": loss(base, sign=1.0),
    }.items():
        assert abs(wrong - value) > 1e-3, name

    mutants = {
        "a chain cut before its last step": {"live": [0]},
        "a last step held fixed": {"live": range(1, CHAIN.levels)},
        "the other critic": {"lead": 1 - leader},
        "a unit that is not held fixed": {"divisor": unit},
        "descent": {"sign": 1.0},
    }
    caught = dict.fromkeys(mutants, False)
    for seed in range(5):
        slope, quotient = along(actor, gradient, jr.key(20 + seed))
        assert abs(slope - quotient(loss)) < 1e-6
        for name, mutant in mutants.items():
            wrong = quotient(lambda actor, mutant=mutant: loss(actor, **mutant))
            caught[name] |= abs(slope - wrong) > 1e-4
    assert all(caught.values()), caught


@pytest.mark.parametrize("normalization", ["value", "gradient"])
def test_flat_critics_pull_nowhere(normalization):
    _, state, _ = setting()
    critics = jax.tree.map(jnp.zeros_like, state.critics)
    obs = random_batch(SPEC, ROWS, jr.key(12)).obs
    pull = compiled_value_loss(normalization)(state.actor, critics, obs, jnp.int32(0), jr.key(13))
    for leaf in jax.tree.leaves(pull):
        np.testing.assert_array_equal(np.asarray(leaf), np.zeros(leaf.shape))


def test_either_critic_leads_by_a_fair_coin():
    algorithm, state, _ = setting(LINE, normalization="value")
    batch = random_batch(LINE, 2, jr.key(12))
    critics = polynomial_critics([[1.0], [4.0]])
    draws = 1000

    @quick_jit
    def values(keys):
        def one(key):
            return algorithm._actor_loss(state.actor, critics, batch, key=key)[1]["value_loss"]

        return jax.vmap(one)(keys)

    value = np.asarray(values(jr.split(jr.key(13), draws)))
    assert set(value) == {-1.0 / 4.0, -4.0}
    # within four standard errors
    assert abs(np.mean(value == -4.0) - 0.5) < 4.0 * 0.5 / np.sqrt(draws)


# The critics' target ------------------------------------------------------------------------------


def test_critics_learn_the_smaller_target_at_the_averages_next_action():
    algorithm, state, _ = setting(discount=0.9)
    batch, keys = random_batch(SPEC, ROWS, jr.key(12)), jr.split(jr.key(13), ROWS)

    # updates on one row each report that row's target and loss
    one_row = jax.vmap(
        lambda row, key: algorithm.update(
            state, jax.tree.map(lambda leaf: leaf[None], row), key=key
        )[1]
    )
    metrics = quick_jit(one_row)(batch, keys)
    noise = chain_noise_each(jax.vmap(lambda key: jr.split(key)[0])(keys))

    obs, action, next_obs = wide(batch.obs), wide(batch.action), wide(batch.next_obs)
    online, target = unstack(state.critics), unstack(state.target_critics)
    alive = 1.0 - wide(batch.terminated)
    silent = (noise[0], np.zeros_like(noise[1]))

    def expected(
        critics=target, actor=state.average_actor, least=np.minimum, alive=alive, noise=noise
    ):
        next_action = numpy_chain(wide(actor), next_obs, noise)
        q = least(*(numpy_q(critic, next_obs, next_action) for critic in critics))
        return wide(batch.reward) + 0.9 * alive * q

    y = expected()
    assert_close(metrics["q_target"], y, **CHAINED)
    loss = sum((numpy_q(critic, obs, action) - y) ** 2 for critic in online)
    assert_close(metrics["critic_loss"], loss, **CHAINED)
    ended = np.asarray(batch.terminated)
    np.testing.assert_array_equal(
        np.asarray(metrics["q_target"])[ended], np.asarray(batch.reward)[ended]
    )
    saturated = np.abs(numpy_chain(wide(state.average_actor), next_obs, noise)) > 0.95
    assert_close(metrics["action_saturation"], np.mean(saturated, axis=1))
    for name, wrong in {
        "the online critics": expected(online),
        "the actor itself, not its average": expected(actor=state.actor),
        "the larger critic": expected(least=np.maximum),
        "the critics' mean": expected(least=lambda a, b: (a + b) / 2.0),
        "a chain without noise": expected(noise=silent),
        "bootstrapping through death": expected(alive=1.0),
    }.items():
        assert np.mean(np.abs(wrong - y)) > 0.01, name


def test_backup_takes_the_best_of_ten_for_each_critic_and_the_smaller_of_those():
    algorithm, state, update = setting(max_q_backup=True, discount=0.9)
    batch, key = random_batch(SPEC, ROWS, jr.key(12)), jr.key(13)
    next_key = jr.split(key)[0]  # an update's first
    value, _ = quick_jit(lambda key: algorithm._next_value(state, batch, key=key))(next_key)

    obs = np.repeat(wide(batch.next_obs), 10, axis=0)
    noise = chain_noise(next_key, 10 * ROWS)
    action = numpy_chain(wide(state.average_actor), obs, noise)
    q = np.stack([numpy_q(c, obs, action).reshape(ROWS, 10) for c in unstack(state.target_critics)])
    best = np.min(np.max(q, axis=2), axis=0)
    assert_close(value, best, **CHAINED)
    for name, wrong in {
        "the best of the smaller": np.max(np.min(q, axis=0), axis=1),
        "the larger critic": np.max(q, axis=(0, 2)),
        "the mean of ten": np.min(np.mean(q, axis=2), axis=0),
        "one sample": np.min(q[:, :, 0], axis=0),
    }.items():
        assert np.mean(np.abs(wrong - best)) > 1e-3, name

    y = wide(batch.reward) + 0.9 * (1.0 - wide(batch.terminated)) * best
    _, metrics = update(state, batch, key)
    assert_close(metrics["q_target"], np.mean(y), **CHAINED)


# One update ---------------------------------------------------------------------------------------


def test_one_update_clones_and_climbs_the_new_critics():
    weights = {"bc_weight": 0.7, "q_weight": 1.6, "normalization": "value", "critic_lr": 1e-2}
    algorithm, state, update = setting(**weights)
    batch, key = random_batch(SPEC, ROWS, jr.key(12)), jr.key(15)
    after, metrics = update(state, batch, key)
    level_key, noise_key, _, chain_key = jr.split(jr.split(key)[1], 4)
    noised, level, noise = algorithm.chain.add_noise(
        batch.action, level_key=level_key, noise_key=noise_key
    )
    obs, actor, level = wide(batch.obs), wide(state.actor), np.asarray(level)
    every = [numpy_denoiser(actor, obs, wide(noised), t) for t in range(CHAIN.levels)]
    error = np.choose(level[:, None], every) - wide(noise)
    assert_close(metrics["bc_loss"], np.mean(error**2), **CHAINED)

    action = numpy_chain(actor, obs, chain_noise(chain_key, ROWS))

    def values(critics):
        one, two = (numpy_q(critic, obs, action) for critic in unstack(critics))
        return [-np.mean(one) / np.mean(np.abs(two)), -np.mean(two) / np.mean(np.abs(one))]

    near = np.argmin(np.abs(np.subtract(values(after.critics), float(metrics["value_loss"]))))
    assert_close(metrics["value_loss"], values(after.critics)[near], **CHAINED)
    assert all(abs(wrong - metrics["value_loss"]) > 1e-3 for wrong in values(state.critics))
    total = 0.7 * metrics["bc_loss"] + 1.6 * metrics["value_loss"]
    assert_close(metrics["actor_loss"], total)


@pytest.mark.parametrize("every", [1, 3])
def test_average_moves_now_and_then_and_the_target_critics_always(every):
    _, state, update = setting(average_every=every, average_rate=0.2, target_rate=0.01)

    def followed(network, follower, rate):
        return jax.tree.map(lambda new, old: rate * new + (1.0 - rate) * old, network, follower)

    for count in range(1, 7):
        before = state
        state, _ = update(before, random_batch(SPEC, ROWS, jr.key(20 + count)), jr.key(count))
        assert int(state.updates) == count
        rate = 0.2 if count % every == 0 else 0.0
        assert_close(state.average_actor, followed(state.actor, before.average_actor, rate))
        moved = not same(before.average_actor, state.average_actor)
        assert moved == (count % every == 0), count
        assert_close(state.target_critics, followed(state.critics, before.target_critics, 0.01))


def same(one, two):
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True)
    return all(np.array_equal(left, right) for left, right in pairs)


# The optimisers -----------------------------------------------------------------------------------


def first_moments(opt_state):
    """Adam's mean gradient, wherever in an optimiser's state."""
    return optax.tree.get(opt_state, "mu")


def norm(tree):
    return np.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(wide(tree))))


def test_gradients_are_clipped_by_their_norm():
    batch, limit = random_batch(SPEC, ROWS, jr.key(12)), 0.05
    after = {}
    for given in (None, 1e6, limit):
        _, state, update = setting(max_gradient_norm=given)
        after[given], _ = update(state, batch, jr.key(15))
    # Adam's first step hardly knows the gradient's size; its first moment is a tenth of it
    for name in ("actor_opt", "critic_opt"):
        free, loose, tight = (
            first_moments(getattr(after[given], name)) for given in (None, 1e6, limit)
        )
        assert norm(free) > 0.2 * limit  # the limit is felt
        assert_close(loose, free)
        assert abs(norm(tight) / (0.1 * limit) - 1.0) < 1e-5
    # the critics, which are stepped first, are clipped together and keep their direction
    critics = first_moments(after[None].critic_opt)
    shrunk = jax.tree.map(lambda leaf: 0.1 * limit / norm(critics) * leaf, critics)
    assert_close(first_moments(after[limit].critic_opt), shrunk)


def test_step_sizes_fall_to_zero_on_a_cosine():
    batch, steps = random_batch(SPEC, ROWS, jr.key(12)), 4
    _, state, update = setting(decay_steps=steps, actor_lr=1e-3, critic_lr=2e-3)
    _, _, slowly = setting(decay_steps=10**8, actor_lr=1e-3, critic_lr=2e-3)

    def step(before, after, name):
        pairs = zip(*(jax.tree.leaves(getattr(x, name)) for x in (before, after)), strict=True)
        return np.concatenate([np.ravel(new - old) for old, new in pairs])

    for count in range(6):
        after, _ = update(state, batch, jr.key(count))
        full, _ = slowly(state, batch, jr.key(count))
        share = 0.5 * (1.0 + np.cos(np.pi * min(count / steps, 1.0)))
        # the actor's gradient is that of critics which were stepped less
        got, whole = (step(state, each, "critics") for each in (after, full))
        assert np.max(np.abs(got - share * whole)) < 1e-6, count
        if count == 0:
            assert_close(np.max(np.abs(step(state, after, "actor"))), 1e-3, **ROUNDED)
            assert_close(np.max(np.abs(got)), 2e-3, **ROUNDED)
        for name in ("actor", "critics"):
            assert same(getattr(state, name), getattr(after, name)) == (count >= steps), count
        state = after


# Acting -------------------------------------------------------------------------------------------


def test_exploring_adds_noise_to_the_actors_sample_and_evaluation_samples_the_average():
    algorithm, state, _ = setting(exploration_noise=0.05)
    state = dataclasses.replace(
        state, actor=calm(state.actor), average_actor=calm(state.average_actor)
    )
    obs, keys = jnp.array([0.3, -0.8, 0.5]), jr.split(jr.key(1), 2000)

    @quick_jit
    def act(keys):
        def one(key):
            explored, evaluated = (
                algorithm.act(state, (), obs, key=key, explore=explore)[0]
                for explore in (True, False)
            )
            return explored, evaluated, jr.split(key, 3)[0]

        return jax.vmap(one)(keys)

    explored, evaluated, chain_keys = act(keys)
    rows, noise = np.broadcast_to(wide(obs), (2000, 3)), chain_noise_each(chain_keys)
    assert_close(evaluated, numpy_chain(wide(state.average_actor), rows, noise), **CHAINED)
    sample = numpy_chain(wide(state.actor), rows, noise)
    added = (wide(explored) - sample)[np.abs(sample) < 0.75]  # five deviations from the bounds
    assert added.size > 300
    # within four standard errors
    assert abs(added.mean()) < 4.0 * 0.05 / np.sqrt(added.size)
    assert abs(added.std() / 0.05 - 1.0) < 4.0 / np.sqrt(2 * added.size)
    assert np.max(np.abs(explored)) <= 1.0


@pytest.mark.parametrize("explore", [False, True])
def test_best_of_draws_by_the_softmax_of_the_smaller_target_critic(explore):
    many, draws = 4, 4000
    algorithm, state, _ = setting(LINE, best_of=many, exploration_noise=0.0)
    targets = [[3.0, 0.0], [-4.0, 0.5]]
    state = dataclasses.replace(
        state,
        actor=calm(state.actor),
        average_actor=calm(state.average_actor),
        critics=polynomial_critics([[-3.0, 0.0], [-3.0, 0.0]]),
        target_critics=polynomial_critics(targets),
    )
    obs, keys = jnp.array([0.4]), jr.split(jr.key(2), draws)
    network = state.actor if explore else state.average_actor

    @quick_jit
    def both(keys):
        def one(key):
            rows = jnp.broadcast_to(obs, (many, 1))
            candidates = algorithm.chain.sample_batch(network, rows, key=jr.split(key, 3)[0])
            return candidates[:, 0], algorithm.act(state, (), obs, key=key, explore=explore)[0][0]

        return jax.vmap(one)(keys)

    candidates, action = map(wide, both(keys))
    gap = np.abs(candidates - action[:, None])
    assert np.max(np.min(gap, axis=1)) < 1e-6  # one of them it is
    chosen = np.argmin(gap, axis=1)

    def surprise(value):
        """How far the chosen values are from those expected of a softmax, in standard errors."""
        weight = special.softmax(value, axis=1)
        mean = np.sum(weight * value, axis=1)
        variance = np.sum(weight * (value - mean[:, None]) ** 2, axis=1)
        return np.sum(value[np.arange(draws), chosen] - mean) / np.sqrt(np.sum(variance))

    one, two = (np.polyval(each, candidates) for each in targets)
    least = np.minimum(one, two)
    assert abs(surprise(least)) < 4.0
    for name, wrong in {
        "uniform": 1e-3 * least,
        "greedy": 1e3 * least,
        "half the temperature": 2.0 * least,
        "the larger critic": np.maximum(one, two),
        "the critics' mean": (one + two) / 2.0,
        "the online critics": -3.0 * candidates,
    }.items():
        assert abs(surprise(wrong)) > 6.0, name


# What the actor converges to ----------------------------------------------------------------------

MODE, SPREAD = 0.7, 0.05


def arms(rows, key):
    """Actions of two kinds, near -0.7 and 0.7, and their signs: of a bandit with two arms."""
    sign_key, noise_key = jr.split(key)
    sign = jr.rademacher(sign_key, (rows, 1), dtype=jnp.float32)
    return MODE * sign + SPREAD * jr.normal(noise_key, (rows, 1)), sign[:, 0]


def after_learning(q_weight):
    """Sampled actions of a policy that has learned where the right arm pays 1 and the left -1."""
    steps, rows = 2000, 128
    algorithm = DiffusionQL(
        q_weight=q_weight,
        # five levels would leave a quarter of an exact denoiser's samples between the modes
        noise_levels=20,
        actor_lr=1e-2,
        critic_lr=3e-3,
        average_rate=0.02,
        decay_steps=steps,
        hidden=(32, 32),
    )

    @jax.jit
    def train(key):
        init_key, loop_key, act_key = jr.split(key, 3)

        def step(state, key):
            batch_key, update_key = jr.split(key)
            action, sign = arms(rows, batch_key)
            batch = replay.empty_rows(LINE, rows)
            once = jnp.ones(rows, bool)
            batch = dataclasses.replace(batch, action=action, reward=sign, terminated=once)
            return algorithm.update(state, batch, key=update_key)[0], None

        state = algorithm.init(LINE, key=init_key)
        state, _ = jax.lax.scan(step, state, jr.split(loop_key, steps))

        def act(key):
            return algorithm.act(state, (), jnp.zeros(1), key=key, explore=False)[0][0]

        return jax.vmap(act)(jr.split(act_key, 2048))

    return wide(train(jr.key(17)))


def shares(action):
    """The parts of the actions near the left mode, near the right one, and well between."""
    near = [np.mean(np.abs(action - mode) < 3.0 * SPREAD) for mode in (-MODE, MODE)]
    return *near, np.mean(np.abs(action) < 0.5 * MODE)


def test_without_the_value_both_modes_of_the_data_stay():
    left, right, between = shares(after_learning(0.0))
    assert 0.35 < left < 0.65
    assert 0.35 < right < 0.65
    assert between < 0.1


def test_the_value_moves_mass_to_the_mode_that_pays():
    left, right, between = shares(after_learning(0.2))
    assert left < 0.3
    assert right > 0.65  # and it is the data's mode still
    assert between < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_learns_pendulum(seed):
    algorithm = DiffusionQL(
        # small networks and large steps: seconds, not minutes
        hidden=(64, 64),
        batch_size=128,
        actor_lr=1e-3,
        critic_lr=1e-3,
        warmup_steps=1_000,
    )
    session = learn(Host("Pendulum-v1"), algorithm, seed, steps=10_000, eval_episodes=5)
    returns, _ = session.evaluate(0)
    assert np.mean(returns) > -250.0
