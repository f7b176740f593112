"""TD3 against NumPy in float64: the smoothed target, the delay, and where the actor goes."""

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
    polynomial_critics,
    quick_jit,
    random_batch,
    random_state,
    relu,
    unstack,
    wide,
)

from qscore import TD3, Host, Spec
from qscore.algorithms.td3 import actor_loss, offline_actor_loss, smoothed
from qscore.networks import DeterministicActor
from qscore.optimize import gradient_step

SPEC = Spec(obs_size=3, action_size=2, dt=0.05)
ROWS = 64


def numpy_policy(actor, obs):
    """The action of a `DeterministicActor` on rows."""
    return np.tanh(numpy_mlp(actor.mlp, obs, relu)[0])


@functools.cache
def setting(**fields):
    """An algorithm, a state whose networks are all random and differ, and its compiled update."""
    algorithm = TD3(hidden=HIDDEN, **fields)
    names = ("actor", "target_actor", "critics", "target_critics")
    state = random_state(algorithm, SPEC, names)
    update = quick_jit(lambda state, batch, key: algorithm.update(state, batch, key=key))
    return algorithm, state, update


# The critics' target ------------------------------------------------------------------------------


def test_smoothing_noise_is_clipped_and_stays_in_the_box():
    action = jnp.array([[0.0, 0.0, 0.0, 0.9, -0.9, 0.9]])
    noise = jnp.array([[0.2, 3.0, -3.0, 3.0, -0.3, -3.0]])
    assert_close(smoothed(action, noise, 0.5), np.array([[0.2, 0.5, -0.5, 1.0, -1.0, 0.4]]))


def test_critics_learn_the_smaller_target_at_the_target_actors_smoothed_action():
    # a third of the noise is beyond the clip
    fields = {"target_action_noise": 0.4, "target_noise_clip": 0.4, "discount": 0.9}
    algorithm, state, _ = setting(**fields)
    batch, keys = random_batch(SPEC, ROWS, jr.key(12)), jr.split(jr.key(13), ROWS)

    # updates on one row each report that row's target and loss
    one_row = jax.vmap(
        lambda row, key: algorithm.update(
            state, jax.tree.map(lambda leaf: leaf[None], row), key=key
        )[1]
    )
    metrics = quick_jit(one_row)(batch, keys)
    noise = jax.vmap(lambda key: jr.normal(key, (1, SPEC.action_size))[0])(keys)

    obs, action, next_obs = wide(batch.obs), wide(batch.action), wide(batch.next_obs)
    online, target = unstack(state.critics), unstack(state.target_critics)
    alive = 1.0 - wide(batch.terminated)

    def expected(
        critics=target, actor=state.target_actor, least=np.minimum, alive=alive, scale=0.4, clip=0.4
    ):
        smoothing = np.clip(scale * wide(noise), -clip, clip)
        next_action = np.clip(numpy_policy(wide(actor), next_obs) + smoothing, -1.0, 1.0)
        q = least(*(numpy_q(critic, next_obs, next_action) for critic in critics))
        return wide(batch.reward) + 0.9 * alive * q

    y = expected()
    tolerance = {"loosen": 20.0, "why": "three networks"}
    assert_close(metrics["q_target"], y, **tolerance)
    loss = sum((numpy_q(critic, obs, action) - y) ** 2 for critic in online)
    assert_close(metrics["critic_loss"], loss, **tolerance)
    ended = np.asarray(batch.terminated)
    np.testing.assert_array_equal(
        np.asarray(metrics["q_target"])[ended], np.asarray(batch.reward)[ended]
    )
    saturated = np.abs(numpy_policy(wide(state.target_actor), next_obs)) > 0.95
    assert_close(metrics["action_saturation"], np.mean(saturated, axis=1))
    for name, wrong in {
        "the online critics": expected(online),
        "the online actor": expected(actor=state.actor),
        "the larger critic": expected(least=np.maximum),
        "no smoothing": expected(scale=0.0),
        "no clip": expected(clip=np.inf),
        "bootstrapping through death": expected(alive=1.0),
    }.items():
        assert np.mean(np.abs(wrong - y)) > 0.01, name


# The delay ----------------------------------------------------------------------------------------

DELAYED = ("actor", "actor_opt", "actor_loss")


def same(one, two):
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True)
    return all(np.array_equal(left, right) for left, right in pairs)


@pytest.mark.parametrize("delay", [1, 2, 3])
def test_actor_steps_at_every_delayed_update_only_and_targets_follow_at_each(delay):
    _, state, update = setting(policy_delay=delay, target_rate=0.01)
    for count in range(1, 7):
        before = state
        batch = random_batch(SPEC, ROWS, jr.key(20 + count))
        state, metrics = update(before, batch, jr.key(count))
        assert int(state.updates) == count
        assert not same(before.critics, state.critics)
        for name in DELAYED:
            moved = not same(getattr(before, name), getattr(state, name))
            assert moved == (count % delay == 0), (name, count)
        for new, old, follower in (
            (state.actor, before.target_actor, state.target_actor),
            (state.critics, before.target_critics, state.target_critics),
        ):
            followed = jax.tree.map(lambda n, o: 0.01 * n + 0.99 * o, new, old)
            assert_close(follower, followed)
        assert metrics["actor_loss"] == state.actor_loss
        if count % delay == 0:
            # the actor climbs the critics that were just stepped
            obs, critics = wide(batch.obs), unstack(state.critics)
            action = numpy_policy(wide(before.actor), obs)
            q = np.minimum(*(numpy_q(critic, obs, action) for critic in critics))
            assert_close(metrics["actor_loss"], -np.mean(q))


# The actor ----------------------------------------------------------------------------------------


def test_actors_gradient_is_that_of_the_smaller_critic():
    _, state, _ = setting()
    obs = random_batch(SPEC, ROWS, jr.key(12)).obs
    gradient, _ = quick_jit(jax.grad(actor_loss, has_aux=True))(state.actor, state.critics, obs)
    first, second = unstack(state.critics)

    def numpy_loss(actor, choose):
        action = numpy_policy(actor, wide(obs))
        return -np.mean(choose(*(numpy_q(critic, wide(obs), action) for critic in (first, second))))

    mutants = {
        "the first critic": lambda a, b: a,
        "the larger critic": np.maximum,
        "the critics' mean": lambda a, b: (a + b) / 2.0,
        "descent": lambda a, b: -np.minimum(a, b),
    }
    caught = dict.fromkeys(mutants, False)
    for seed in range(5):
        slope, quotient = along(state.actor, gradient, jr.key(20 + seed))
        assert abs(slope - quotient(lambda actor: numpy_loss(actor, np.minimum))) < 1e-4
        for name, choose in mutants.items():
            wrong = quotient(lambda actor, choose=choose: numpy_loss(actor, choose))
            caught[name] |= abs(slope - wrong) > 5e-3
    assert all(caught.values()), caught


def test_offline_gradient_is_that_of_the_normalised_value_and_the_distance():
    _, state, _ = setting()
    critics = jax.tree.map(lambda leaf: 1.5 * leaf, state.critics)  # values far from size 1
    batch, weight = random_batch(SPEC, ROWS, jr.key(12)), 0.4
    loss = functools.partial(offline_actor_loss, bc_weight=weight)
    gradient, metrics = quick_jit(jax.grad(loss, has_aux=True))(state.actor, critics, batch)
    obs, recorded = wide(batch.obs), wide(batch.action)

    def numpy_value(actor, choose=np.minimum):
        action = numpy_policy(actor, obs)
        return choose(*(numpy_q(critic, obs, action) for critic in unstack(critics)))

    def size(actor, choose=np.minimum):
        return np.mean(np.abs(numpy_value(actor, choose)))

    held = size(wide(state.actor))

    def numpy_loss(
        actor, choose=np.minimum, unit=lambda actor: held, reduce=np.mean, weight=weight
    ):
        value = np.mean(numpy_value(actor, choose)) / unit(actor)
        return -value + weight * reduce((numpy_policy(actor, obs) - recorded) ** 2)

    assert_close(metrics["actor_loss"], np.float64(numpy_loss(wide(state.actor))))
    mutants = {
        "the first critic": {"choose": lambda a, b: a},
        "the second critic": {"choose": lambda a, b: b},
        "the larger critic's unit": {"unit": lambda actor: size(wide(state.actor), np.maximum)},
        "a unit that is not held fixed": {"unit": size},
        "no unit": {"unit": lambda actor: 1.0},
        "away from the data": {"weight": -weight},
        "no data": {"weight": 0.0},
        "the sum over components": {"weight": SPEC.action_size * weight},
        "the sum over the batch": {"reduce": np.sum},
    }
    caught = dict.fromkeys(mutants, False)
    for seed in range(5):
        slope, quotient = along(state.actor, gradient, jr.key(20 + seed))
        assert abs(slope - quotient(numpy_loss)) < 1e-4
        for name, mutant in mutants.items():
            wrong = quotient(lambda actor, mutant=mutant: numpy_loss(actor, **mutant))
            caught[name] |= abs(slope - wrong) > 5e-3
    assert all(caught.values()), caught


def test_flat_critics_leave_the_distance_alone():
    _, state, _ = setting()
    critics = jax.tree.map(jnp.zeros_like, state.critics)
    batch = random_batch(SPEC, ROWS, jr.key(12))
    loss = functools.partial(offline_actor_loss, bc_weight=0.4)
    gradient, metrics = quick_jit(jax.grad(loss, has_aux=True))(state.actor, critics, batch)
    distance = numpy_policy(wide(state.actor), wide(batch.obs)) - wide(batch.action)
    assert_close(metrics["actor_loss"], 0.4 * np.mean(distance**2))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))


def test_cloning_weight_chooses_the_loss_of_an_update():
    batch, key = random_batch(SPEC, ROWS, jr.key(12)), jr.key(15)
    _, state, update = setting(policy_delay=1)
    after, metrics = update(state, batch, key)
    fields = {"preset": "offline", "normalize_observations": False, "policy_delay": 1}
    _, _, plain = setting(bc_weight=0.0, **fields)
    assert same(plain(state, batch, key), (after, metrics))  # weight 0 is TD3 itself
    _, _, offline = setting(**fields)
    cloned, offline_metrics = offline(state, batch, key)
    expected, _ = offline_actor_loss(state.actor, cloned.critics, batch, bc_weight=0.4)
    assert_close(offline_metrics["actor_loss"], expected)
    assert same(cloned.critics, after.critics)  # they learn as before
    assert not same(cloned.actor, after.actor)


def test_actor_finds_the_peak_of_the_smaller_critic():
    # with x = a - 0.4 s: Q_1 = -x^2, and Q_2 = -(x + 0.4)^2 - 0.5 below it for x > -0.825
    critics = polynomial_critics([[-1.0, 0.0, 0.0], [-1.0, -0.8, -0.66]], shift=0.4)
    optimizer, obs = optax.adam(3e-3), jnp.array([[-1.0], [1.0]])

    @jax.jit
    def train(key):
        actor = DeterministicActor(1, 1, (16,), key=key)

        def step(carry, _):
            actor, opt_state = carry
            return gradient_step(actor_loss, actor, optimizer, opt_state, critics, obs)[:2], None

        carry = (actor, optimizer.init(actor))  # pyright: ignore[reportArgumentType]
        (actor, _), _ = jax.lax.scan(step, carry, length=1000)
        return jax.vmap(actor)(obs)[:, 0]

    assert np.max(np.abs(np.array(train(jr.key(17))) - [-0.8, 0.0])) < 0.01


def test_exploration_adds_noise_and_evaluation_none():
    algorithm, state, _ = setting(exploration_noise=0.05)
    obs = jnp.array([0.2, -0.1, 0.3])
    action, _ = algorithm.act(state, (), obs, key=jr.key(0), explore=False)
    assert_close(action, numpy_policy(wide(state.actor), wide(obs)))
    assert np.max(np.abs(action)) < 0.8  # so that no noise is clipped below

    @quick_jit
    def explored(keys):
        return jax.vmap(lambda k: algorithm.act(state, (), obs, key=k, explore=True)[0])(keys)

    noise = np.asarray(explored(jr.split(jr.key(1), 4000))) - np.asarray(action)
    # within four standard errors
    assert np.max(np.abs(noise.mean(axis=0))) < 4.0 * 0.05 / np.sqrt(4000)
    assert np.max(np.abs(noise.std(axis=0) / 0.05 - 1.0)) < 4.0 / np.sqrt(2 * 4000)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_learns_pendulum(seed):
    # small networks and large steps: seconds, not minutes
    steps = {"actor_lr": 1e-3, "critic_lr": 1e-3, "warmup_steps": 1_000}
    algorithm = TD3(hidden=(64, 64), batch_size=128, **steps)
    session = learn(Host("Pendulum-v1"), algorithm, seed, steps=8_000, eval_episodes=5)
    returns, _ = session.evaluate(0)
    assert np.mean(returns) > -250.0
