"""Host environments: scaling, flattening, time limits, control steps, and clear refusals."""

from typing import ClassVar

import gymnasium as gym
import numpy as np
import pytest

from qscore.environments import EnvironmentFailure, environment_class
from qscore.environments.host import Host, known_ids


def episode(task, seed, actions):
    observations, rewards = [task.reset(seed)], []
    for action in actions:
        step = task.step(action)
        observations.append(step.next_obs)
        rewards.append(step.reward)
    return np.array(observations), np.array(rewards)


@pytest.mark.parametrize("id", ["Pendulum-v1", "HalfCheetah-v5", "dm_control/reacher-easy-v0"])
def test_a_seed_and_actions_determine_an_episode(id):
    task = Host(id).open()
    assert task.spec.obs_size == task.reset(0).size and task.reset(0).dtype == np.float32
    actions = np.random.default_rng(0).uniform(-1, 1, (30, task.spec.action_size))
    first = episode(task, 7, actions)
    episode(task, 8, actions)
    again = episode(task, 7, actions)
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])
    other = Host(id).open()
    np.testing.assert_array_equal(first[0], episode(other, 7, actions)[0])
    assert not np.array_equal(first[0], episode(other, 8, actions)[0])


def test_actions_are_scaled_to_the_environments_bounds():
    task = Host("Pendulum-v1").open()
    raw = gym.make("Pendulum-v1")
    start = task.reset(3)
    np.testing.assert_array_equal(start, raw.reset(seed=3)[0])
    step = task.step(np.array([0.5]))
    obs, reward, *_ = raw.step(np.array([1.0], np.float32))  # half of +-2
    np.testing.assert_allclose(step.next_obs, obs, rtol=1e-6)
    assert step.reward == pytest.approx(float(reward), rel=1e-6)
    assert [bound.item() for bound in task.action_bounds] == [-2.0, 2.0]


def test_a_time_limit_truncates_and_a_fall_terminates():
    task = Host("Pendulum-v1").open()
    task.reset(0)
    steps = [task.step(np.zeros(1)) for _ in range(200)]
    assert [i for i, step in enumerate(steps) if step.truncated] == [199]
    assert not any(step.terminated for step in steps)
    assert task.spec.horizon == pytest.approx(10.0)

    hopper = Host("Hopper-v5").open()
    hopper.reset(0)
    steps = [hopper.step(np.ones(3)) for _ in range(30)]
    assert any(step.terminated for step in steps)
    assert not any(step.truncated for step in steps)


def test_an_episode_that_ends_both_ways_is_terminated():
    class Ends(gym.Env):
        observation_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)
        action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)

        def reset(self, *, seed=None, options=None):
            return np.zeros(1, np.float32), {}

        def step(self, action):
            return np.zeros(1, np.float32), 1.0, True, False, {}

    gym.register("Ends-v0", lambda **_: Ends(), max_episode_steps=1)
    task = Host("Ends-v0").open()
    task.reset(0)
    step = task.step(np.zeros(1))
    assert step.terminated and not step.truncated
    del gym.registry["Ends-v0"]


def test_dm_control_is_flattened_and_has_its_time_limit():
    task = Host("dm_control/cartpole-swingup-v0").open()
    assert (task.spec.obs_size, task.spec.action_size) == (5, 1)
    assert task.spec.dt == pytest.approx(0.01) and task.spec.horizon == pytest.approx(10.0)
    task.reset(0)
    steps = [task.step(np.zeros(1)) for _ in range(1000)]
    assert steps[-1].truncated and not any(s.truncated for s in steps[:-1])
    assert not any(s.terminated for s in steps)


def test_dm_controls_composer_has_its_limit_in_seconds_and_keeps_its_step():
    task = Host("dm_control/reach_site_features-v0").open()
    assert task.spec.dt == pytest.approx(0.04) and task.spec.horizon == pytest.approx(10.0)
    with pytest.raises(ValueError, match=r"can only be its own, 0.04 s; got 0.08"):
        Host("dm_control/reach_site_features-v0", dt=0.08).open()


@pytest.mark.parametrize(
    "id", ["HalfCheetah-v5", "dm_control/cartpole-swingup-v0", "dm_control/walker-walk-v0"]
)
def test_the_control_step_keeps_seconds_and_the_scale_of_returns(id):
    usual = Host(id).open()
    halved = Host(id, dt=usual.spec.dt * 2).open()
    assert halved.spec.dt == pytest.approx(2 * usual.spec.dt)
    assert halved.spec.horizon == pytest.approx(usual.spec.horizon)
    # two steps under one action are one step of twice the length, in state
    action = np.full(usual.spec.action_size, 0.3)
    fine, _ = episode(usual, 1, [action, action])
    coarse, _ = episode(halved, 1, [action])
    np.testing.assert_allclose(coarse[-1], fine[-1], atol=1e-5)
    # and in what they earn, but for the rule that integrates it
    _, fine = episode(usual, 1, [action] * 80)
    _, coarse = episode(halved, 1, [action] * 40)
    assert coarse.sum() == pytest.approx(fine.sum(), rel=0.05)


def test_a_control_step_that_cannot_be_is_refused_with_what_can():
    with pytest.raises(ValueError, match=r"can only be its own, 0.05 s; got 0.02"):
        Host("Pendulum-v1", dt=0.02).open()
    with pytest.raises(
        ValueError, match=r"multiple of its physics step 0.01 s; got 0.023. The nea"
    ):
        Host("HalfCheetah-v5", dt=0.023).open()
    with pytest.raises(ValueError, match=r"`dt` must lie in \(0, inf\), got -1.0"):
        Host("HalfCheetah-v5", dt=-1.0)


def test_what_is_not_there_or_not_continuous_is_refused():
    with pytest.raises(
        ValueError, match=r"unknown environment 'HalfCheeta-v5'. The closest are Half"
    ):
        Host("HalfCheeta-v5").open()
    with pytest.raises(ValueError, match=r"'CartPole-v1' has the action space Discrete\(2\)"):
        Host("CartPole-v1").open()
    with pytest.raises(ValueError, match=r"has the observation space Discrete\(16\)"):
        _registered("Flat-v0", gym.spaces.Discrete(16), gym.spaces.Box(-1.0, 1.0, (1,)))
    with pytest.raises(ValueError, match="has actions of int32"):
        whole = gym.spaces.Box(0, 10, (1,), np.int32)
        _registered("Whole-v0", gym.spaces.Box(-1.0, 1.0, (1,)), whole)
    with pytest.raises(ValueError, match="has unbounded actions"):
        _registered("Free-v0", gym.spaces.Box(-1.0, 1.0, (1,)), gym.spaces.Box(-np.inf, 1.0, (1,)))
    with pytest.raises(ValueError, match="has an action component with nothing to choose"):
        still = gym.spaces.Box(np.array([-1.0, 0.5]), np.array([1.0, 0.5]))
        _registered("Still-v0", gym.spaces.Box(-1.0, 1.0, (1,)), still)
    with pytest.raises(ValueError, match="cannot make 'Broken-v0': ZeroDivisionError: at birth"):
        _registered("Broken-v0", None, None)


def _registered(id, observations, actions):
    class Task(gym.Env):
        observation_space, action_space = observations, actions

        def __init__(self):
            if observations is None:
                raise ZeroDivisionError("at birth")
            left_open.append(id)

        def close(self):
            left_open.remove(id)

    left_open = []
    gym.register(id, lambda **_: Task(), disable_env_checker=True)
    try:
        Host(id).open()
    finally:
        del gym.registry[id]
        assert left_open == []


def test_a_missing_extra_is_named_with_its_install_command(monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "shimmy" else find(name)
    )
    with pytest.raises(ValueError, match=r"needs the package shimmy: .* pip install -e '.\[dmc\]'"):
        Host("dm_control/cartpole-swingup-v0").open()


def test_every_known_id_is_an_environment_of_the_host():
    ids = known_ids()
    assert {"Pendulum-v1", "HalfCheetah-v5", "dm_control/cartpole-swingup-v0"} <= set(ids)
    assert "HalfCheetah-v4" not in ids  # the newest version only
    assert environment_class("Pendulum-v1") is Host


@pytest.mark.parametrize(
    ("reward", "obs", "message"),
    [
        (np.array([2.0]), [0.5], None),
        (np.zeros(2), [0.5], "returned the reward array.*; it must be one number"),
        ("much", [0.5], "returned the reward 'much'; it must be one number"),
        (1.0, [0.5, 0.5], "returned an observation of 2 numbers, and says that it has 1"),
        (1.0, ["much"], "returned an observation that is no array of numbers|raised in step"),
    ],
)
def test_what_a_step_returns_is_checked(reward, obs, message):
    class Odd(gym.Env):
        observation_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)
        action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)
        metadata: ClassVar = {"render_modes": [], "render_fps": None}

        def reset(self, *, seed=None, options=None):
            return np.zeros(1, np.float32), {}

        def step(self, action):
            return obs, reward, False, False, {}

    gym.register("Odd-v0", lambda **_: Odd(), disable_env_checker=True)
    task = Host("Odd-v0").open()
    task.reset(0)
    try:
        if message is None:
            assert task.step(np.zeros(1)).reward == 2.0 and task.spec.dt == 1.0
        else:
            with pytest.raises(EnvironmentFailure, match=message):
                task.step(np.zeros(1))
    finally:
        del gym.registry["Odd-v0"]


@pytest.mark.parametrize(("id", "hint"), [("Pendulum-v1", False), ("Hopper-v5", True)])
def test_a_picture_that_fails_has_a_hint_where_mujoco_draws_it(id, hint, monkeypatch):
    def render():
        raise RuntimeError("no screen.")

    task = Host(id).open()
    monkeypatch.setattr(task._env, "render", render)
    with pytest.raises(EnvironmentFailure, match="raised in render: RuntimeError") as raised:
        task.render()
    assert ("needs EGL or OSMesa" in str(raised.value)) == hint
    task.close()


def test_every_task_has_a_time_limit():
    task = Host("Pendulum-v1", max_episode_steps=7).open()
    task.reset(0)
    assert [task.step(np.zeros(1)).truncated for _ in range(7)] == [False] * 6 + [True]

    class Endless(gym.Env):
        observation_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)
        action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)

        def reset(self, *, seed=None, options=None):
            return np.zeros(1, np.float32), {}

        def step(self, action):
            return np.zeros(1, np.float32), 1.0, False, False, {}

    gym.register("Endless-v0", lambda **_: Endless())
    endless = Host("Endless-v0").open()
    endless.reset(0)
    assert endless.spec.horizon == 1000.0  # a step of a task that does not say is one second
    Endless.metadata = {"render_modes": [], "render_fps": 50}
    assert Host("Endless-v0").open().spec.dt == 0.02
    assert [endless.step(np.zeros(1)).truncated for _ in range(1000)].index(True) == 999
    del gym.registry["Endless-v0"]
