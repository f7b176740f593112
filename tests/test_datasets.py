"""Recorded data: every format gives the rows that were written, and bad data are refused by name.

Recordings that `evaluate` makes are what the policy did.
"""

import errno
import gc
import importlib.util
import json
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import h5py
import hypothesis.strategies as st
import jax.random as jr
import minari
import numpy as np
import pytest
from helpers import assert_close
from hypothesis import given, settings
from minari.data_collector import EpisodeBuffer
from minari.storage import get_dataset_path

import qscore as qs
from qscore import cli, datasets
from qscore.environments import LQ, Host, environment_class
from qscore.playback import Recorder
from qscore.train_host import episode_seed

DT = 0.05  # of Pendulum-v1, whose sizes are 3 and 1 and whose bounds are +-2


class Episode(NamedTuple):
    """What happened, in the environment's units; `end` is "final", "limit" or "open"."""

    obs: np.ndarray  # [steps + 1, obs]
    action: np.ndarray
    reward: np.ndarray
    end: str


def episodes(*layout: tuple[int, str]) -> list[Episode]:
    """Random episodes of these lengths and ends."""
    draw = np.random.default_rng(0)
    return [
        Episode(
            draw.normal(size=(steps + 1, 3)).astype(np.float32),
            draw.uniform(-2.0, 2.0, (steps, 1)).astype(np.float32),
            draw.normal(size=steps).astype(np.float32),
            end,
        )
        for steps, end in layout
    ]


def columns(written: list[Episode]) -> dict[str, np.ndarray]:
    """The episodes as the columns of a D4RL-style file."""

    def ends(kind: str) -> np.ndarray:
        return np.concatenate(
            [(np.arange(len(e.reward)) == len(e.reward) - 1) & (e.end == kind) for e in written]
        )

    return {
        "observations": np.concatenate([e.obs[:-1] for e in written]),
        "actions": np.concatenate([e.action for e in written]),
        "rewards": np.concatenate([e.reward for e in written]),
        "next_observations": np.concatenate([e.obs[1:] for e in written]),
        "terminals": ends("final"),
        "timeouts": ends("limit"),
    }


def write_hdf5(path: Path, held: dict[str, Any], *without: str) -> Path:
    with h5py.File(path, "w") as file:
        for name, values in held.items():
            if name not in without:
                file[name] = values
        file.create_group("infos")["qpos"] = np.zeros(3)
    return path


def recording(written: list[Episode], **about: Any) -> dict[str, np.ndarray]:
    """The episodes as the arrays of a recording."""
    held = columns(written)
    steps = np.concatenate([np.arange(len(e.reward)) for e in written])
    text = {"format": 1, "environment": "Pendulum-v1", "action_low": [-2.0], "action_high": [2.0]}
    return {
        "obs": held["observations"],
        "action": held["actions"] / 2.0,
        "reward": held["rewards"],
        "next_obs": held["next_observations"],
        "terminated": held["terminals"],
        "truncated": held["timeouts"],
        "time": (steps * DT).astype(np.float32),
        "dt": np.full(len(steps), DT, np.float32),
        "about": np.array(json.dumps(text | about)),
    }


def write_recording(path: Path, held: dict[str, Any]) -> Path:
    np.savez(path, allow_pickle=True, **held)
    return path


def write_minari(id: str, written: list[Episode], **spaces: Any) -> Path:
    """A data set in Minari's store; the folder it is in."""
    buffers = []
    for e in written:
        last = np.arange(len(e.reward)) == len(e.reward) - 1
        ends: dict[str, Any] = {
            "terminations": last & (e.end == "final"),
            "truncations": last & (e.end == "limit"),
        }
        steps: dict[str, Any] = {
            "observations": e.obs,
            "actions": e.action,
            "rewards": e.reward,
        }
        buffers.append(EpisodeBuffer(**steps, **ends))
    spaces = {
        "observation_space": gym.spaces.Box(-np.inf, np.inf, (3,)),
        "action_space": gym.spaces.Box(-2.0, 2.0, (1,)),
    } | spaces
    with warnings.catch_warnings():  # of an author, a licence and a code link that are not given
        warnings.simplefilter("ignore")
        minari.create_dataset_from_buffers(id, buffers, **spaces)
    return get_dataset_path(id)


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return tmp_path / "minari"


@pytest.fixture(scope="module")
def task():
    task = qs.Host("Pendulum-v1").open()
    yield task
    task.close()


LAYOUT = [(4, "limit"), (1, "final"), (3, "final"), (1, "limit"), (5, "limit")]


def sources(folder: Path) -> dict[str, Any]:
    """The same episodes in every format."""
    written = episodes(*LAYOUT)
    held = columns(written)
    return {
        "recording": write_recording(folder / "own.npz", recording(written)),
        "timeouts": write_hdf5(folder / "timeouts.hdf5", held, "next_observations"),
        "next observations": write_hdf5(folder / "next.h5", held, "timeouts"),
        "both": write_hdf5(folder / "both.hdf5", held),
        "Minari folder": write_minari("pendulum/folder-v0", written),
        "Minari data folder": write_minari("pendulum/data-v0", written) / "data",
        "Minari id": write_minari("pendulum/id-v0", written) and "pendulum/id-v0",
    }


def test_every_format_gives_the_rows_that_were_written(tmp_path, store, task):
    written = episodes(*LAYOUT)
    for name, source in sources(tmp_path).items():
        data = datasets.load(source, task)
        rows = data.rows
        # a limit's last row has no next observation where only the next row could tell
        lost = 1 if name == "timeouts" else 0
        kept = [(e, len(e.reward) - lost * (e.end == "limit")) for e in written]
        kept = [(e, steps) for e, steps in kept if steps]
        assert [s.stop - s.start for s in data.episodes] == [steps for _, steps in kept], name
        assert len(data) == sum(steps for _, steps in kept)
        assert_close(rows.obs, np.concatenate([e.obs[:n] for e, n in kept]))
        assert_close(rows.action, np.concatenate([e.action[:n] / 2.0 for e, n in kept]))
        assert_close(rows.reward, np.concatenate([e.reward[:n] for e, n in kept]))
        alive = ~rows.terminated  # nothing is asked of what follows a final state
        next_obs = np.concatenate([e.obs[1 : n + 1] for e, n in kept])
        assert_close(rows.next_obs[alive], next_obs[alive])
        assert np.isfinite(rows.next_obs).all()
        final = [(np.arange(n) == n - 1) & (e.end == "final") for e, n in kept]
        assert_close(rows.terminated, np.concatenate(final))
        time = np.concatenate([np.arange(n, dtype=np.float32) * np.float32(DT) for _, n in kept])
        assert_close(rows.time, time)
        assert_close(rows.dt, np.full(len(data), DT, np.float32))
        assert_close(data.returns, np.array([e.reward[:n].astype(float).sum() for e, n in kept]))
        assert Path(data.source).exists()
        assert {leaf.dtype.name for leaf in vars(rows).values()} == {"float32", "bool"}


def test_a_digest_is_of_the_numbers(tmp_path, store, task):
    loaded = {name: datasets.load(source, task) for name, source in sources(tmp_path).items()}
    # one lacks the rows at the limits; the recording's actions were never scaled
    assert len({data.sha256 for data in loaded.values()}) == 3
    assert loaded["both"].sha256 == loaded["Minari id"].sha256
    held = recording(episodes(*LAYOUT))
    held["reward"][3] += 1e-3
    changed = datasets.load(write_recording(tmp_path / "changed.npz", held), task)
    assert changed.sha256 != loaded["recording"].sha256


LAYOUTS = st.lists(st.tuples(st.integers(1, 4), st.sampled_from(["final", "limit"])), max_size=6)


@settings(deadline=None)
@given(layout=LAYOUTS, tail=st.integers(0, 3), without=st.sampled_from(["n", "t", ""]))
def test_no_row_leads_into_another_episode(tmp_path_factory, task, layout, tail, without):
    layout = [*layout, (tail, "open")] if tail else layout
    # an observation says whose it is: (episode, step, 0)
    written = []
    for number, (episode, (steps, _)) in enumerate(
        zip(episodes(*layout), layout, strict=True), start=1
    ):
        index = np.arange(steps + 1, dtype=np.float32)
        told = np.stack([np.full_like(index, number), index, np.zeros_like(index)], axis=1)
        written.append(episode._replace(obs=told))
    lost = {"n": ("next_observations",), "t": ("timeouts",), "": ()}[without]
    expected = [
        steps - (without == "n" and end != "final") for steps, end in layout
    ]  # rows of each that have a next observation
    path = tmp_path_factory.getbasetemp() / "layout.hdf5"
    if not layout:
        held = {name: values[:0] for name, values in columns(episodes((1, "final"))).items()}
    else:
        held = columns(written)
    write_hdf5(path, held, *lost)
    if not sum(expected):
        with pytest.raises(
            qs.UsageError, match=r"layout.hdf5 is empty: (it holds no|no row of it)"
        ):
            datasets.load(path, task)
        return
    data = datasets.load(path, task)
    obs, next_obs, terminated = data.rows.obs, data.rows.next_obs, data.rows.terminated
    assert [len(obs[rows]) for rows in data.episodes] == [steps for steps in expected if steps]
    for rows in data.episodes:
        assert len(set(obs[rows, 0])) == 1
        assert_close(obs[rows, 1], np.arange(rows.stop - rows.start, dtype=np.float32))
    assert_close(data.rows.time, obs[:, 1] * np.float32(DT))
    assert_close(next_obs[:, 0], obs[:, 0])
    assert_close(next_obs[~terminated, 1], obs[~terminated, 1] + 1.0)
    assert terminated.sum() == sum(end == "final" for _, end in layout)  # a limit is none


def collect(id: str, env: gym.Env, count: int) -> list[tuple[list, list, list]]:
    """Random episodes through Minari's own collector: (observations, actions, rewards) of each."""
    collector, played = minari.DataCollector(env), []
    for seed in range(count):
        collector.action_space.seed(seed)
        obs, over = [collector.reset(seed=seed)[0]], False
        actions, rewards = [], []
        while not over:
            actions.append(collector.action_space.sample())
            seen, reward, terminated, truncated, _ = collector.step(actions[-1])
            obs.append(seen)
            rewards.append(float(reward))
            over = terminated or truncated
        played.append((obs, actions, rewards))
    with warnings.catch_warnings():  # of what is not given, and of its own temporary folder
        warnings.simplefilter("ignore")
        collector.create_dataset(id)
        collector.close()
        del collector
        gc.collect()
    return played


def test_what_minari_collected_is_the_environments_own_episodes(store, task):
    played = collect("pendulum/random-v0", gym.make("Pendulum-v1", max_episode_steps=7), 3)
    rows = datasets.load("pendulum/random-v0", task).rows
    assert_close(rows.obs, np.concatenate([np.stack(obs[:-1]) for obs, _, _ in played]))
    assert_close(rows.next_obs, np.concatenate([np.stack(obs[1:]) for obs, _, _ in played]))
    assert not rows.terminated.any()
    for i, (obs, actions, _) in enumerate(played):  # our environment repeats them
        assert_close(task.reset(i), np.asarray(obs[0]))
        for t in range(7):
            assert_close(rows.action[7 * i + t] * 2.0, actions[t])
            step = task.step(rows.action[7 * i + t])
            why = "the action went through a scale and back"
            assert_close(step.next_obs, rows.next_obs[7 * i + t], loosen=10, why=why)
            assert step.reward == pytest.approx(rows.reward[7 * i + t], rel=1e-4, abs=1e-5)


class Parts(gym.Env):
    """Observations of several parts, that are not in alphabetical order."""

    parts = gym.spaces.Dict(
        speed=gym.spaces.Box(-9.0, 9.0, (2,)), angle=gym.spaces.Box(-9.0, 9.0, (1, 2))
    )
    observation_space = parts
    action_space = gym.spaces.Box(-1.0, 3.0, (2, 1))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self._seen(), {}

    def _seen(self):
        return {
            name: self.np_random.uniform(-1.0, 1.0, part.shape).astype(np.float32)
            for name, part in self.parts.items()
        }

    def step(self, action):
        self.t += 1
        return self._seen(), 1.0, self.t == 4, False, {}


def test_observations_of_parts_are_flattened_as_the_environment_flattens_them(store):
    gym.register("Parts-v0", f"{__name__}:Parts", max_episode_steps=9, disable_env_checker=True)
    try:
        collect("parts-v0", gym.make("Parts-v0"), 2)
        task = qs.Host("Parts-v0").open()
        rows = datasets.load("parts-v0", task).rows
        for i in range(2):
            assert_close(rows.obs[4 * i], task.reset(i))
            for t in range(4):
                step = task.step(np.asarray(rows.action[4 * i + t]))
                assert_close(rows.next_obs[4 * i + t], step.next_obs)
                assert rows.terminated[4 * i + t] == step.terminated == (t == 3)
    finally:
        del gym.registry["Parts-v0"]


def put(row: int, value: float):
    """A change of one row."""

    def change(values):
        values = np.array(values, np.float64 if value != value else values.dtype)
        values[row] = value
        return values

    return change


def gone(values):
    return None


BAD_HDF5: dict[str, tuple[dict[str, Any], str]] = {
    "missing key": (
        {"rewards": gone},
        r"data.hdf5 has no `rewards`; it holds `actions`, `next_observations`, `observations`",
    ),
    "cuts unknown": (
        {"timeouts": gone, "next_observations": gone},
        "has neither `timeouts` nor `next_observations`: where an episode was cut cannot be told",
    ),
    "width": (
        {"observations": lambda v: v[:, :2]},
        r"data.hdf5: `observations` has shape \[14, 2\]; \[rows, 3\] was expected",
    ),
    "length": (
        {"actions": lambda v: v[:-1]},
        r"`actions` has shape \[13, 1\]; \[14, 1\] was expected",
    ),
    "length of flags": (
        {"timeouts": lambda v: v[1:]},
        r"`timeouts` has shape \[13\]; \[14\] was expected",
    ),
    "columns for flags": (
        {"terminals": lambda v: v[:, None]},
        r"`terminals` has shape \[14, 1\]; \[14\] was expected",
    ),
    "scalar": ({"observations": lambda v: 1.0}, r"`observations` has shape \[\]; \[rows, 3\] was"),
    "nan": (
        {"observations": put(5, np.nan)},
        "data.hdf5: `observations` is not finite in 1 of 14 rows; the first is row 5",
    ),
    "infinite action": ({"actions": put(2, np.inf)}, "`actions` is not finite in 1 of 14 rows"),
    "nan after": ({"next_observations": put(9, np.nan)}, "`next_observations` is not .* row 9"),
    "too large for single precision": (
        {"rewards": lambda v: np.float64(1e300) * np.ones(14)},
        "`rewards` is not finite in 14 of 14 rows; the first is row 0",
    ),
    "no flag": (
        {"terminals": put(3, np.nan)},
        "`terminals` must hold true or false, 1 or 0; row 3 is nan",
    ),
    "action scale": (
        {"actions": lambda v: v * 1.5},
        r"`actions` reaches from -2.\d+ to 2.\d+; the bounds are \[-2.0\] and \[2.0\]",
    ),
    "text": (
        {"rewards": lambda v: np.array([b"one"] * 14)},
        r"`rewards` must hold real numbers, not \|S3",
    ),
    "complex": ({"rewards": lambda v: v + 1j}, "`rewards` must hold real numbers, not complex"),
    "empty": (
        dict.fromkeys(columns(episodes((1, "final"))), lambda v: v[:0]),
        "data.hdf5 is empty: it holds no transitions",
    ),
}


@pytest.mark.parametrize("case", BAD_HDF5)
def test_a_bad_hdf5_file_is_refused_by_key(tmp_path, task, case):
    changes, message = BAD_HDF5[case]
    held = columns(episodes(*LAYOUT))
    held |= {name: change(held[name]) for name, change in changes.items()}
    held = {name: values for name, values in held.items() if values is not None}
    path = write_hdf5(tmp_path / "data.hdf5", held)
    with pytest.raises(qs.UsageError, match=message):
        datasets.load(path, task)


def test_a_file_of_cut_rows_only_is_empty(tmp_path, task):
    held = columns(episodes((1, "limit"), (1, "open")))
    path = write_hdf5(tmp_path / "cut.hdf5", held, "next_observations")
    with pytest.raises(qs.UsageError, match="cut.hdf5 is empty: no row of it has a next obs"):
        datasets.load(path, task)


def test_steps_of_unknown_length_are_no_irregular_ones(tmp_path):
    environment = environment_class("pendulum_sde")(id="pendulum_sde", dt_min=0.01, dt_max=0.03)
    task, held = environment.open(), columns(episodes(*LAYOUT))
    shape = (len(held["rewards"]), task.spec.obs_size)
    held |= {name: np.zeros(shape, np.float32) for name in ("observations", "next_observations")}
    path = write_hdf5(tmp_path / "data.hdf5", held)
    with pytest.raises(qs.UsageError, match="data.hdf5 does not say how long its steps were"):
        datasets.load(path, task)


def about(**changes):
    return lambda _: recording(episodes((1, "final")), **changes)["about"]


BAD_RECORDING: dict[str, tuple[dict[str, Any], str]] = {
    "missing key": ({"time": gone}, r"data.npz has no `time`; it holds `about`, `action`, `dt`"),
    "about missing": ({"about": gone}, r"data.npz has no `about`; it holds `action`, `dt`"),
    "about no text": (
        {"about": lambda v: np.zeros(2)},
        "its `about` is not that of a recording: JSONDecodeError",
    ),
    "about of another": (
        {"about": lambda v: np.array('{"format": 1}')},
        "its `about` is not that of a recording: KeyError: 'environment'",
    ),
    "format": ({"about": about(format=2)}, "data.npz has format 2; this version reads 1"),
    "bounds": (
        {"about": about(action_high=[1.0])},
        r"recorded with `action_high` \[1.0\]; the environment's is \[2.0\]",
    ),
    "number of bounds": (
        {"about": about(action_low=[-2.0, -2.0])},
        r"recorded with `action_low` \[-2.0, -2.0\]; the environment's is \[-2.0\]",
    ),
    "step": (
        {"dt": put(2, 0.1)},
        "data.npz was recorded with steps of 0.1 s; the environment takes 0.05 s",
    ),
    "no step": ({"dt": put(4, 0.0)}, "data.npz: `dt` must be above 0 s; the least is 0"),
    "width": (
        {"next_obs": lambda v: v[:, :1]},
        r"`next_obs` has shape \[14, 1\]; \[14, 3\] was expected",
    ),
    "length": ({"truncated": lambda v: v[:2]}, r"`truncated` has shape \[2\]; \[14\] was"),
    "nan": ({"reward": put(7, np.nan)}, "`reward` is not finite in 1 of 14 rows; the first .* 7"),
    "nan step": ({"dt": put(0, np.nan)}, "`dt` is not finite in 1 of 14 rows"),
    "action": (
        {"action": lambda v: 2 * v},
        r"`action` reaches from -1.\d+ to 1.\d+; the bounds are \[-1.0\] and \[1.0\]",
    ),
    "text": ({"dt": lambda v: np.array(["x"] * 14)}, "`dt` must hold real numbers, not <U1"),
    "truth": ({"terminated": lambda v: 0.5 * v}, "`terminated` must hold true or false, .* is 0.5"),
    "objects": (
        {"obs": lambda v: np.array([None, {}], object)},
        "data.npz cannot be read as a recording: Object arrays cannot be loaded",
    ),
    "empty": (
        dict.fromkeys(datasets.RECORDING_KEYS, lambda v: v[:0]),
        "data.npz is empty: it holds no transitions",
    ),
}


@pytest.mark.parametrize("case", BAD_RECORDING)
def test_a_bad_recording_is_refused_by_key(tmp_path, task, case):
    changes, message = BAD_RECORDING[case]
    held = recording(episodes(*LAYOUT))
    held |= {name: change(held[name]) for name, change in changes.items()}
    held = {name: values for name, values in held.items() if values is not None}
    path = write_recording(tmp_path / "data.npz", held)
    with pytest.raises(qs.UsageError, match=message):
        datasets.load(path, task)


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "text", "one array"])
@pytest.mark.parametrize("suffix", [".npz", ".hdf5"])
def test_a_damaged_file_is_refused_by_name(tmp_path, task, suffix, damage):
    path = tmp_path / f"data{suffix}"
    if suffix == ".npz":
        write_recording(path, recording(episodes(*LAYOUT)))
    else:
        write_hdf5(path, columns(episodes(*LAYOUT)))
    content = bytearray(path.read_bytes())
    if damage == "one array":
        with open(path, "wb") as file:
            np.save(file, np.zeros(3))
    elif damage == "flipped":
        at = content.find(b"obs.npy") + 200 if suffix == ".npz" else 0
        content[at] ^= 255
        path.write_bytes(content)
    else:
        path.write_bytes({"empty": b"", "cut": content[: len(content) // 2], "text": b"no"}[damage])
    with pytest.raises(qs.UsageError, match=f"data{suffix} cannot be read as (a recording|HDF5): "):
        datasets.load(path, task)


def test_what_is_no_data_set_is_refused_by_name(tmp_path, store, task):
    (tmp_path / "data.csv").write_text("1,2")
    with pytest.raises(qs.UsageError, match="data.csv: a data set is an .npz, .hdf5 or .h5 file"):
        datasets.load(tmp_path / "data.csv", task)
    for name in ("gone.npz", "gone.h5", "gone"):
        with pytest.raises(qs.UsageError, match=f"there is no data set {tmp_path / name}"):
            datasets.load(tmp_path / name, task)
    with pytest.raises(qs.UsageError, match="there is no data set gone.npz"):
        datasets.load("gone.npz", task)
    (tmp_path / "folder").mkdir()
    with pytest.raises(
        qs.UsageError, match="folder cannot be read as a Minari data set: .*No data"
    ):
        datasets.load(tmp_path / "folder", task)

    write_minari("pendulum/expert-v0", episodes((2, "limit")))
    message = (
        "no file and no Minari data set 'pendulum/export-v0' on this machine; "
        "the closest is 'pendulum/expert-v0'. Fetch one with: minari download pendulum/export-v0"
    )
    with pytest.raises(qs.UsageError, match=message):
        datasets.load("pendulum/export-v0", task)
    with pytest.raises(qs.UsageError, match="no Minari data set 'x' on this machine. Fetch"):
        datasets.load("x", task)


def test_a_bad_minari_data_set_is_refused_by_key(store, task):
    def refused(id, message):
        with pytest.raises(qs.UsageError, match=message):
            datasets.load(id, task)

    one, two = episodes((2, "limit"), (3, "final"))
    write_minari("unit-v0", [one], action_space=gym.spaces.Box(-3.0, 3.0, (1,)))
    refused("unit-v0", r"unit-v0: `action_space` is Box\(-3.*; the environment's bounds are \[-2")
    write_minari("choice-v0", [one], action_space=gym.spaces.Discrete(3))
    refused("choice-v0", r"`action_space` is Discrete\(3\); the environment's bounds are \[-2.0\]")
    write_minari("shape-v0", [one._replace(obs=one.obs[:, :2])])
    refused("shape-v0", r"`episode_0/observations` has shape \[3, 2\]; \[3, 3\] was expected")
    write_minari("short-v0", [one, two._replace(obs=two.obs[1:])])
    refused("short-v0", r"`episode_1/observations` has shape \[3, 3\]; \[4, 3\] was expected")
    write_minari("nan-v0", [one, two._replace(reward=two.reward * np.array([1, np.nan, 1]))])
    refused("nan-v0", "`episode_1/rewards` is not finite in 1 of 3 rows; the first is row 1")
    write_minari("far-v0", [one._replace(action=4.0 * np.ones((2, 1), np.float32))])
    refused("far-v0", "`episode_0/actions` reaches from 4 to 4; the bounds are")
    space = gym.spaces.Tuple([gym.spaces.Box(-1.0, 1.0, (3,))])
    write_minari("tuple-v0", [one._replace(obs=(one.obs,))], observation_space=space)
    refused("tuple-v0", "tuple-v0 holds a Tuple space; it must be a Box, or a Dict of them")
    folder = write_minari("cut-v0", [one])
    file = folder / "data" / "main_data.hdf5"
    file.write_bytes(file.read_bytes()[:500])
    refused("cut-v0", "cut-v0 cannot be read as a Minari data set: OSError: .*truncated file")


@pytest.mark.parametrize("package, name", [("h5py", "data.hdf5"), ("minari", "folder")])
def test_a_missing_package_is_named_with_its_install_command(
    tmp_path, store, task, monkeypatch, package, name
):
    write_hdf5(tmp_path / "data.hdf5", columns(episodes((1, "final"))))
    (tmp_path / "folder").mkdir()
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == package else find(name)
    )
    message = rf"{name} needs the package {package}: .* pip install -e '.\[offline\]'"
    with pytest.raises(qs.UsageError, match=message):
        datasets.load(tmp_path / name, task)


def test_scores_are_normalised_between_two_returns():
    assert datasets.references(Host("HalfCheetah-v5")) == datasets.references(
        Host("HalfCheetah-v2")
    )
    assert datasets.references(Host("Pendulum-v1")) == datasets.references(LQ("lq")) == {}
    low, high = datasets.references(Host("Hopper-v5", num_envs=4))["d4rl"]
    assert [datasets.normalized(x, (low, high)) for x in (low, high)] == [0.0, 100.0]
    assert datasets.normalized((low + high) / 2, (low, high)) == pytest.approx(50.0)
    # a shorter episode, or another control step, is another task
    assert datasets.references(Host("Hopper-v5", max_episode_steps=10)) == {}
    assert datasets.references(Host("Hopper-v5", dt=0.004)) == {}


# Recording ----------------------------------------------------------------------------------------

STEPS = 20


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two seeds of a policy that is a function of the observation."""
    folder = tmp_path_factory.mktemp("runs") / "td3"
    return qs.train(
        qs.TD3(hidden=(8, 8), batch_size=8, warmup_steps=40),
        qs.Host("Pendulum-v1", max_episode_steps=STEPS),
        steps=100,
        seeds=2,
        seed_start=3,
        out=folder,
        eval_episodes=1,
        progress=False,
    )


def policy_actions(run, seed: int, obs: Any) -> np.ndarray:
    """What the policy of a seed does at each observation, in [-1, 1]."""
    policy = qs.load(run.folder, seed=seed)
    key = jr.key(0)
    return np.stack([policy(each, policy.init_carry(), key=key)[0] for each in obs]) / 2.0


def test_a_recording_is_what_the_policy_did(run, tmp_path, task):
    path = tmp_path / "new" / "data.npz"
    result = qs.evaluate(run.folder, episodes=3, seed=1, record=path)
    assert result["recorded"] == {"dataset": str(path), "steps": 6 * STEPS}
    assert result["returns"] == qs.evaluate(run.folder, episodes=3, seed=1)["returns"]
    data = datasets.load(path, task)
    # every seed's, one after another; in the file rewards are of single precision
    assert data.returns == pytest.approx(result["returns"], rel=1e-6)
    assert [each.name for each in path.parent.iterdir()] == ["data.npz"]

    env = gym.make("Pendulum-v1", max_episode_steps=STEPS)
    for number, rows in enumerate(data.episodes):
        policy = qs.load(run.folder, seed=3 + number // 3)
        obs, _ = env.reset(seed=episode_seed(1, 1, number % 3))
        carry = policy.init_carry()
        for t, row in enumerate(range(rows.start, rows.stop)):
            action, carry = policy(obs, carry, key=jr.key(0))
            why = "another batch size, and a scale and back"
            assert_close(data.rows.obs[row], obs, loosen=30, why=why)
            assert_close(data.rows.action[row], action / 2.0, loosen=30, why=why)
            obs, reward, terminated, truncated, _ = env.step(action)
            assert_close(data.rows.next_obs[row], obs, loosen=30, why=why)
            assert data.rows.reward[row] == pytest.approx(float(reward), rel=1e-3, abs=1e-4)
            assert truncated == (t == STEPS - 1) and not terminated
    assert not data.rows.terminated.any()

    with np.load(path) as archive:
        held = dict(archive)
    assert list(np.flatnonzero(held["truncated"])) == list(range(STEPS - 1, 6 * STEPS, STEPS))
    told = json.loads(str(held["about"]))
    assert told["format"] == 1 and told["environment"] == "Pendulum-v1"
    assert told["made_by"] == {
        **{"algorithm": "td3", "seeds": [3, 4], "episode_starts": 1},
        **{"random_share": 0.0, "noise": 0.0, "explore": False},
    }


def test_the_share_of_random_episodes_is_exact(run, tmp_path, task):
    record = tmp_path / "half.npz"
    qs.evaluate(run.folder, episodes=10, record=record, random_share=0.5)
    data = datasets.load(record, task)
    random = []
    for number, rows in enumerate(data.episodes):
        actions = data.rows.action[rows]
        expected = policy_actions(run, 3 + number // 10, data.rows.obs[rows])
        random.append(not np.allclose(actions, expected, atol=1e-3))
    assert sum(random[:10]) == sum(random[10:]) == 5
    drawn = np.concatenate(
        [data.rows.action[rows] for rows, yes in zip(data.episodes, random, strict=True) if yes]
    )
    assert len(np.unique(drawn)) == len(drawn) == 10 * STEPS  # no episode repeats another's
    assert abs(drawn.mean()) < 0.2 and abs(drawn.var() - 1 / 3) < 0.1
    assert drawn.min() < -0.9 and drawn.max() > 0.9


@given(count=st.integers(1, 200), share=st.integers(0, 200))
def test_every_share_is_exact(task, count, share):
    share = min(share, count)
    recorder = Recorder(Path("x.npz"), share / count, 0.0, starts=0)
    asked, random = np.zeros(1, np.float32), 0
    for episode in range(count):
        recorder.began(episode, task)
        random += recorder.disturb(episode, asked) is not asked
    assert random == share


def test_noise_has_its_standard_deviation(run, tmp_path, task):
    noises = []
    for starts in (0, 1):
        record = tmp_path / f"{starts}.npz"
        qs.evaluate(run.folder, episodes=10, seed=starts, record=record, noise=0.1)
        data = datasets.load(record, task)
        half = len(data) // 2  # of each seed
        expected = np.concatenate(
            [policy_actions(run, 3 + i, data.rows.obs[i * half : (i + 1) * half]) for i in range(2)]
        )
        assert np.abs(data.rows.action).max() <= 1.0
        noises.append(np.where(np.abs(expected) < 0.5, data.rows.action - expected, np.nan))
        noise = noises[-1][np.isfinite(noises[-1])]
        assert len(noise) > 100
        assert noise.std() == pytest.approx(0.1, rel=4.0 / np.sqrt(2 * len(noise)))
        assert abs(noise.mean()) < 4.0 * 0.1 / np.sqrt(len(noise))
    one, other = noises  # other starts come with other noise
    both = np.isfinite(one) & np.isfinite(other)
    assert np.abs(one - other)[both].mean() > 0.05


def test_exploration_can_be_recorded(run, tmp_path, task):
    actions = {}
    for explore in (False, True):
        record = tmp_path / f"{explore}.npz"
        qs.evaluate(run.folder, episodes=2, record=record, explore=explore)
        actions[explore] = datasets.load(record, task).rows.action
    assert not np.allclose(actions[True], actions[False], atol=0.01)


def test_our_own_environments_are_recorded(tmp_path):
    environment = environment_class("pendulum_sde")(id="pendulum_sde", duration=0.2)
    algorithm = qs.TD3(hidden=(8, 8), batch_size=8, warmup_steps=40)
    settings = {"steps": 50, "eval_episodes": 1, "progress": False}
    run = qs.train(algorithm, environment, out=tmp_path / "run", **settings)
    result = qs.evaluate(run.folder, episodes=2, record=tmp_path / "data.npz")
    task = environment.open()
    data = datasets.load(tmp_path / "data.npz", task)
    assert_close(data.returns, np.array(result["returns"]))
    for number, rows in enumerate(data.episodes):
        assert_close(task.reset(episode_seed(1, 0, number)), data.rows.obs[rows.start])
        for row in range(rows.start, rows.stop):  # it repeats under the recorded actions
            step = task.step(data.rows.action[row])
            assert_close(step.next_obs, data.rows.next_obs[row])
            assert step.dt == pytest.approx(float(data.rows.dt[row]))
    assert_close(data.rows.time[data.episodes[1]], data.rows.time[data.episodes[0]])


def test_a_horizon_may_end_with_a_shorter_step(tmp_path):
    task = environment_class("portfolio")(id="portfolio", dt=0.3, duration=1.0).open()
    assert task.spec.clock == ("time",)
    rows, obs, time = [], task.reset(0), 0.0
    action = np.zeros(task.spec.action_size, np.float32)
    while not rows or not rows[-1][4]:
        step = task.step(action)
        rows.append((obs, action, step.reward, step.next_obs, step.terminated, time, step.dt))
        obs, time = step.next_obs, time + step.dt
    assert rows[-1][-1] == pytest.approx(0.1)
    columns = [np.array(column) for column in zip(*rows, strict=True)]
    single = [c if c.dtype == bool else c.astype(np.float32) for c in columns]
    low, high = task.action_bounds
    bounds = {"action_low": low.tolist(), "action_high": high.tolist()}
    about = {"environment": "portfolio"} | bounds
    datasets.save(tmp_path / "x.npz", qs.Transition(*single), np.zeros(len(rows), bool), about)
    assert len(datasets.load(tmp_path / "x.npz", task)) == len(rows) == 4


def test_a_recording_that_cannot_be_is_refused(run, tmp_path, monkeypatch):
    def refused(message, **kwargs):
        with pytest.raises(qs.UsageError, match=message):
            qs.evaluate(run.folder, episodes=1, **kwargs)

    record = tmp_path / "data.npz"
    for kwargs in ({"random_share": 0.5}, {"noise": 0.1}, {"explore": True}):
        refused("`random_share`, `noise` and `explore` shape a recording: give `record`", **kwargs)
    refused("`record` must end in .npz, got 'data.h5'", record="data.h5")
    refused(r"`random_share` must lie in \[0, 1\], got 1.5", record=record, random_share=1.5)
    refused(r"`noise` must lie in \[0, inf\), got -1.0", record=record, noise=-1.0)
    refused(r"`noise` must lie in \[0, inf\), got nan", record=record, noise=float("nan"))
    refused("`best_of` is 2; a recording is of the policy itself", record=record, best_of=2)
    assert not record.exists()
    record.write_text("mine")
    refused("`record` is .*data.npz, which exists", record=record)
    assert record.read_text() == "mine"
    refused("cannot write to `record`, .*inside.npz: ", record=record / "inside.npz")

    def full(file, **kwargs):
        file.write(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    refused("cannot write to `record`, .*: .*No space left", record=tmp_path / "b" / "data.npz")
    assert list((tmp_path / "b").iterdir()) == []


@pytest.mark.parametrize(
    "words, message",
    {
        "train td3 Pendulum-v1 --dataset gone.npz": "there is no data set gone.npz.",
        "train td3 Pendulum-v1 --dataset DATA": "data.npz has no `about`; it holds `obs`.",
        "train td3 Pendulum-v1 --dataset pendulum/gone-v0": "minari download pendulum/gone-v0",
        "train td3 Pendulum-v1 --online-steps 5": "`online_steps` follow after training on a",
        "eval RUN --noise 0.1": "shape a recording: give `record`.",
        "eval RUN --record DATA": "data.npz, which exists.",
    }.items(),
)
def test_the_command_line_says_what_is_wrong(capsys, tmp_path, store, run, words, message):
    write_recording(tmp_path / "data.npz", {"obs": np.zeros((2, 3))})
    words = words.replace("DATA", str(tmp_path / "data.npz")).replace("RUN", str(run.folder))
    with pytest.raises(SystemExit) as done:
        cli.main(words.split())
    out, err = capsys.readouterr()
    assert done.value.code == 2 and out == "" and err.count("\n") == 1
    assert err.startswith("qscore: ") and message in err


def test_the_command_line_records(capsys, tmp_path, run, task):
    record = tmp_path / "data.npz"
    options = ["--episodes", "4", "--random-share", "0.25", "--noise", "0.1", "--explore"]
    cli.main(["eval", str(run.folder), "--record", str(record), *options])
    assert f"recorded            160 steps in {record}" in capsys.readouterr().out
    assert len(datasets.load(record, task)) == 160
