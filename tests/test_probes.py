"""Probe environments: tasks so small that the value of everything is known.

Every registered algorithm learns them from random actions, through the replay buffer and the
training chunk. Each probe adds one difficulty to the one before it, so the first that fails names
what is broken: the loss, the observation, the bootstrap, the action gradient, or both together.

A critic is read through `value_and_score` where the algorithm has it, else from the state's
`critics`, a stack of networks of an observation and an action.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from qscore import ALGORITHMS, Spec, Transition
from qscore.train import init_runner, train_chunk

SPEC = Spec(obs_size=1, action_size=1, dt=0.1)
ROWS, UPDATES, DISCOUNT = 512, 1500, 0.8

# What every algorithm is given where it has the field: small, quick to learn, quick to forget.
SETTINGS = {
    "discount": DISCOUNT,
    "hidden": (32, 32),
    "batch_size": 64,
    "actor_lr": 3e-3,
    "critic_lr": 3e-3,
    "target_rate": 0.05,
    "average_rate": 0.05,
}

# Variants of an algorithm that are each to pass; one that is not here runs as `SETTINGS` makes it.
VARIANTS = {
    "qsm": {
        # a gradient at the noised action is a score only where a level changes it little
        "qsm-normalized": {"target": "normalized", "temperature": 0.1, "noise_levels": 20},
        "qsm-posterior": {"target": "posterior", "temperature": 0.1, "noise_levels": 5},
    },
    "cqsm": {
        # without the score's cost the value is the reward's alone
        "cqsm-network": {
            "discount_rate": -math.log(0.8) / 0.1,
            "penalty": 0.0,
            "score_lr": 3e-3,
            "target_rate": 0.5,
            "uniform_share": 1.0,
            "action_noise": 0.0,
        }
    },
    # nearly no entropy bonus: the value is the reward's alone
    "sac": {"sac": {"learn_temperature": False, "initial_temperature": 1e-3}},
    # smoothing flattens the peak of a reward by the variance of its noise
    "td3": {"td3": {"target_action_noise": 0.1}},
}
CASES = [
    pytest.param((name, tuple(given.items())), id=label)
    for name in ALGORITHMS
    for label, given in VARIANTS.get(name, {name: {}}).items()
]

RATE = -math.log(DISCOUNT) / SPEC.dt
LASTS = 20  # steps that an observation lasts, for policies that move their action through time

# In continuous time a step's reward is spread over the step and discounted within it.
INSIDE = {"cqsm": (1.0 - DISCOUNT) / (RATE * SPEC.dt)}

Q_TOLERANCE = 0.05  # of values of order one, by a small network after 1500 small batches
ACTION_TOLERANCE = 0.15  # these policies keep a spread of 0.2 to 0.3 around the best action


@functools.cache
def learner(case):
    """An algorithm's training and its policy: two compiled functions that serve every probe."""
    name, given = case
    kind = ALGORITHMS[name]
    fields = {field.name for field in dataclasses.fields(kind)}
    shared = {field: value for field, value in SETTINGS.items() if field in fields}
    algorithm = kind(**shared | dict(given))

    @jax.jit
    def learn(rows, init_key, update_key):
        runner = init_runner(algorithm, SPEC, ROWS, key=init_key)
        runner, _, finite = train_chunk(
            algorithm, runner, rows, jnp.int32(ROWS), jnp.int32(UPDATES), key=update_key
        )
        return runner.agent, finite

    @jax.jit
    def act(agent, obs, key):
        """The mean of 64 actions at one observation that has lasted, exploration off."""

        def settled(key):
            def again(carry, key):
                action, carry = algorithm.act(agent, carry, obs, key=key, explore=False)
                return carry, action

            return jax.lax.scan(again, algorithm.init_carry(SPEC), jr.split(key, LASTS))[1][-1]

        return jnp.mean(jax.vmap(settled)(jr.split(key, 64)))

    @jax.jit
    def q(agent, obs, action):
        if hasattr(algorithm, "value_and_score"):
            return algorithm.value_and_score(agent, obs, action)[0]
        return jnp.mean(jax.vmap(lambda critic: critic(obs, action))(agent.critics))

    return learn, act, q


class Learned:
    """What an algorithm makes of a batch of transitions."""

    def __init__(self, case, rows):
        learn, self._act, self._q = learner(case)
        self._inside = INSIDE.get(case[0], 1.0)
        self.agent, finite = learn(rows, jr.key(0), jr.key(1))
        assert finite

    def q(self, obs, action):
        value = self._q(self.agent, jnp.float32([obs]), jnp.float32([action]))
        return float(value) / self._inside

    def action(self, obs):
        return float(self._act(self.agent, jnp.float32([obs]), jr.key(2)))


def transitions(obs, action, reward, next_obs, terminated):
    """A buffer of one-dimensional transitions; numbers are repeated over its rows."""

    def column(values, dtype):
        return jnp.asarray(np.broadcast_to(np.asarray(values, dtype), (ROWS,)))

    return Transition(
        obs=column(obs, np.float32)[:, None],
        action=column(action, np.float32)[:, None],
        reward=column(reward, np.float32),
        next_obs=column(next_obs, np.float32)[:, None],
        terminated=column(terminated, bool),
        time=jnp.zeros(ROWS),
        dt=jnp.full(ROWS, SPEC.dt),
    )


RANDOM = np.random.default_rng(0)
ACTIONS = RANDOM.uniform(-1.0, 1.0, ROWS)
SIGNS = RANDOM.choice([-1.0, 1.0], ROWS)
EVERY = pytest.mark.parametrize("case", CASES)
PLACES = [-0.8, 0.0, 0.8]  # actions at which a critic is read


@EVERY
def test_one_step_of_constant_reward(case):
    learned = Learned(case, transitions(0.0, ACTIONS, 1.0, 0.0, True))
    for action in PLACES:
        assert abs(learned.q(0.0, action) - 1.0) < Q_TOLERANCE


@EVERY
def test_reward_that_is_the_observation(case):
    learned = Learned(case, transitions(SIGNS, ACTIONS, SIGNS, 0.0, True))
    for obs in (-1.0, 1.0):
        for action in PLACES:
            assert abs(learned.q(obs, action) - obs) < Q_TOLERANCE


@EVERY
def test_reward_of_the_second_step_is_discounted(case):
    second = SIGNS > 0.0  # the first step leads to the second, the second ends with reward 1
    learned = Learned(case, transitions(second, ACTIONS, second, ~second, second))
    for action in PLACES:
        assert abs(learned.q(1.0, action) - 1.0) < Q_TOLERANCE
        assert abs(learned.q(0.0, action) - DISCOUNT) < Q_TOLERANCE


@EVERY
def test_policy_goes_where_the_reward_is(case):
    learned = Learned(case, transitions(0.0, ACTIONS, 1.0 - (ACTIONS - 0.3) ** 2, 0.0, True))
    for action in [*PLACES, 0.3]:
        assert abs(learned.q(0.0, action) - (1.0 - (action - 0.3) ** 2)) < Q_TOLERANCE
    assert abs(learned.action(0.0) - 0.3) < ACTION_TOLERANCE


@EVERY
def test_policy_reads_the_observation(case):
    best = 0.5 * SIGNS
    learned = Learned(case, transitions(SIGNS, ACTIONS, 1.0 - (ACTIONS - best) ** 2, 0.0, True))
    for obs in (-1.0, 1.0):
        for action in PLACES:
            assert abs(learned.q(obs, action) - (1.0 - (action - 0.5 * obs) ** 2)) < Q_TOLERANCE
        assert abs(learned.action(obs) - 0.5 * obs) < ACTION_TOLERANCE


@EVERY
def test_critic_follows_the_policys_own_next_action(case):
    # The first step costs and pays nothing; the second pays for being near 0.3. Random actions
    # earn 0.58 there and the policy nearly 1, and it is the policy's that the first step is worth.
    second = SIGNS > 0.0
    reward = second * (1.0 - (ACTIONS - 0.3) ** 2)
    learned = Learned(case, transitions(second, ACTIONS, reward, ~second, second))
    for action in PLACES:
        assert abs(learned.q(0.0, action) - DISCOUNT) < Q_TOLERANCE


@EVERY
def test_time_limit_is_not_a_death(case):
    # Reward 1 per step for ever. A time limit cuts the recording and `terminated` stays False. The
    # same rows with `terminated` are worth one step: what taking a limit for a death would give.
    forever = Learned(case, transitions(0.0, ACTIONS, 1.0, 0.0, False))
    ended = Learned(case, transitions(0.0, ACTIONS, 1.0, 0.0, True))
    for action in PLACES:
        assert abs(forever.q(0.0, action) - 1.0 / (1.0 - DISCOUNT)) < 5.0 * Q_TOLERANCE
        assert abs(ended.q(0.0, action) - 1.0) < Q_TOLERANCE
