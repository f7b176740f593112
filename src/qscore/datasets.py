"""Recorded episodes: our own recordings, Minari data sets and D4RL-style HDF5 files, in one form.

Whatever the source, a row is a `Transition` in the library's terms: actions in [-1, 1], flat
float32 observations, `terminated` for final states only. Where an episode was cut by a time limit
its last row bootstraps like any other; where the observation after the cut was not recorded, the
row is left out, for there is nothing to bootstrap from.

A recording is one .npz file, readable without pickle:

    obs [rows, obs]  action [rows, act], in [-1, 1]  reward [rows]  next_obs [rows, obs]
    terminated [rows]  truncated [rows]  time [rows], s  dt [rows], s
    about: JSON text with "format", "environment", "action_low", "action_high", "made_by"
"""

import hashlib
import importlib.util
import json
import os
import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float

from qscore.environments import Environment, Host
from qscore.environments.base import Episodic
from qscore.errors import UsageError, closest, how_to_install
from qscore.types import Spec, Transition

FORMAT = 1
RECORDING_KEYS = ("obs", "action", "reward", "next_obs", "terminated", "truncated", "time", "dt")
SLACK = 1e-4
"""How far beyond [-1, 1] a scaled action may lie by rounding."""

REFERENCES: dict[str, dict[str, tuple[float, float]]] = {
    "d4rl": {  # Fu et al. 2020, arXiv:2004.07219, of a random and an expert policy
        "HalfCheetah": (-280.178953, 12135.0),
        "Hopper": (-20.272305, 3234.3),
        "Walker2d": (1.629008, 4592.3),
        "Ant": (-325.6, 3879.7),
    }
}
"""Returns that score 0 and 100, by the reference's name and the task's."""


@dataclass(frozen=True)
class Dataset:
    """Episodes one after another, in host memory.

    - `source`: the file or id they came from.
    - `rows`: the transitions, leading axis "rows", in the order they were recorded.
    - `last`: whether a row is the last one recorded of its episode.
    - `environment`: what a recording says it was made in; None where a format does not say.
    """

    source: str
    rows: Transition
    last: Bool[np.ndarray, " rows"]
    environment: str | None = None

    def __len__(self) -> int:
        return len(self.last)

    @property
    def episodes(self) -> list[slice]:
        """The rows of each episode."""
        ends = np.flatnonzero(self.last) + 1
        return [slice(a, b) for a, b in zip([0, *ends[:-1]], ends, strict=True)]

    @property
    def returns(self) -> Float[np.ndarray, " episodes"]:
        """The undiscounted return of each episode, of the rows that it has here."""
        reward = np.asarray(self.rows.reward, np.float64)
        return np.array([reward[rows].sum() for rows in self.episodes])

    @cached_property
    def sha256(self) -> str:
        """A digest of every number in it."""
        digest = hashlib.sha256()
        for leaf in [*jax.tree.leaves(self.rows), self.last]:
            digest.update(np.ascontiguousarray(leaf).tobytes())
        return digest.hexdigest()


def load(source: str | os.PathLike, task: Episodic) -> Dataset:
    """Read a recording (.npz), a D4RL-style file (.hdf5, .h5), a Minari folder or a Minari id.

    `task` is an open copy of the environment that the data are for: its sizes, bounds and step are
    what they are checked against. Raises `UsageError` that names the source, the key and what was
    expected.
    """
    path = Path(source)
    if path.is_dir():
        return _read_minari(path, task)
    if path.suffix == ".npz" and path.is_file():
        return _read_recording(path, task)
    if path.suffix in (".hdf5", ".h5") and path.is_file():
        return _read_hdf5(path, task)
    if path.is_file():
        raise UsageError(f"{path}: a data set is an .npz, .hdf5 or .h5 file, or a Minari folder.")
    if path.is_absolute() or path.suffix in (".npz", ".hdf5", ".h5"):
        raise UsageError(f"there is no data set {path}.")
    return _read_minari(_minari_folder(str(source)), task)


def save(
    path: Path, rows: Transition, truncated: Bool[np.ndarray, " rows"], about: dict[str, Any]
) -> None:
    """Write a recording as a whole: never half of it, whenever the process dies."""
    named = {
        name: np.asarray(getattr(rows, name)) for name in RECORDING_KEYS if name != "truncated"
    }
    text = np.array(json.dumps({"format": FORMAT, **about}))
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.tmp")
    try:
        with open(scratch, "wb") as file:
            np.savez(file, allow_pickle=False, **named, truncated=truncated, about=text)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def references(environment: Environment) -> dict[str, tuple[float, float]]:
    """The returns that score 0 and 100 on an environment, by the name of the reference.

    None where its control step or time limit was set: they are of the task as it comes.
    """
    if environment != Host(environment.id, num_envs=environment.num_envs):
        return {}
    task = unversioned(environment.id)
    return {name: tasks[task] for name, tasks in REFERENCES.items() if task in tasks}


def unversioned(environment: str) -> str:
    """The name of an environment without its version: `Hopper` for `Hopper-v5`."""
    return re.sub(r"-v\d+$", "", environment)


def normalized(value: float, reference: tuple[float, float]) -> float:
    """100 (value - low) / (high - low)."""
    low, high = reference
    return 100.0 * (value - low) / (high - low)


# Sources ------------------------------------------------------------------------------------------


def _read_recording(path: Path, task: Episodic) -> Dataset:
    try:
        # opened here: NumPy leaves a file open that is no whole archive
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except Exception as error:  # NumPy, zipfile and zlib each raise their own
        raise UsageError(f"{path} cannot be read as a recording: {error}.") from error
    environment = _check_about(path, _require(path, arrays, "about"), task)
    spec = task.spec
    obs = _numbers(path, arrays, "obs", None, spec.obs_size)
    count = len(obs)
    columns = {
        "obs": obs,
        "action": _numbers(path, arrays, "action", count, spec.action_size),
        "reward": _numbers(path, arrays, "reward", count),
        "next_obs": _numbers(path, arrays, "next_obs", count, spec.obs_size),
        "time": _numbers(path, arrays, "time", count),
        "dt": _numbers(path, arrays, "dt", count),
    }
    terminated = _flags(path, arrays, "terminated", count)
    ended = terminated | _flags(path, arrays, "truncated", count)
    for name, values in columns.items():
        _check_finite(path, name, values)
    one = np.ones(spec.action_size, np.float32)
    _check_bounds(path, "action", columns["action"], (-one, one))
    if (columns["dt"] <= 0.0).any():
        raise UsageError(f"{path}: `dt` must be above 0 s; the least is {columns['dt'].min():g}.")
    # a horizon that is no whole number of steps ends with a shorter one
    odd = columns["dt"][~np.isclose(columns["dt"], spec.dt) & ~terminated]
    if "dt" not in spec.clock and len(odd):
        raise UsageError(
            f"{path} was recorded with steps of {odd[0]:g} s; the environment takes {spec.dt:g} s."
        )
    data = _dataset(path, Transition(terminated=terminated, **columns), ended)
    return replace(data, environment=environment)


def _check_about(path: Path, text: Any, task: Episodic) -> str:
    """What a recording says of itself, against the environment; the name of its own."""
    try:
        about = json.loads(str(text))
        form, environment = about["format"], str(about["environment"])
        ours = [np.asarray(about[name], np.float32) for name in ("action_low", "action_high")]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path}: its `about` is not that of a recording: {type(error).__name__}: {error}."
        ) from error
    if form != FORMAT:
        raise UsageError(f"{path} has format {form}; this version reads {FORMAT}.")
    for name, recorded, bound in zip(
        ("action_low", "action_high"), ours, task.action_bounds, strict=True
    ):
        if recorded.shape != bound.shape or not np.allclose(recorded, bound):
            raise UsageError(
                f"{path}: actions were recorded with `{name}` {recorded.tolist()}; the "
                f"environment's is {bound.tolist()}."
            )
    return environment


def _read_hdf5(path: Path, task: Episodic) -> Dataset:
    h5py = _import("h5py", path)
    try:
        with h5py.File(path, "r") as file:
            arrays = {
                name: item[()] for name, item in file.items() if isinstance(item, h5py.Dataset)
            }
    except Exception as error:  # it raises whatever is the matter with the file
        raise UsageError(f"{path} cannot be read as HDF5: {error}.") from error
    spec = task.spec
    obs = _numbers(path, arrays, "observations", None, spec.obs_size)
    count = len(obs)
    action = _numbers(path, arrays, "actions", count, spec.action_size)
    reward = _numbers(path, arrays, "rewards", count)
    terminated = _flags(path, arrays, "terminals", count)
    cut = _flags(path, arrays, "timeouts", count) if "timeouts" in arrays else None
    if "next_observations" in arrays:
        next_obs = _numbers(path, arrays, "next_observations", count, spec.obs_size)
        keep = np.ones(count, bool)
        if cut is None:  # an episode goes on where the next row goes on from
            goes_on = np.isclose(next_obs[:-1], obs[1:]).all(axis=1)
            cut = np.append(~goes_on, True)[:count]
    elif cut is not None:
        # the next row's observation, where it is this episode's; after a final state none is needed
        ended = terminated | cut | (np.arange(count) == count - 1)
        next_obs = np.where(ended[:, None], obs, np.roll(obs, -1, axis=0))
        keep = terminated | ~ended
    else:
        raise UsageError(
            f"{path} has neither `timeouts` nor `next_observations`: where an episode was cut "
            "cannot be told, and values would be learned across the cut."
        )
    checked = {"observations": obs, "actions": action, "rewards": reward}
    for key, values in (checked | {"next_observations": next_obs}).items():
        _check_finite(path, key, values)
    time, dt = _regular_clock(path, terminated | cut, spec)
    action = _unit_actions(path, "actions", action, task)
    rows = Transition(obs, action, reward, next_obs, terminated, time, dt)
    return _dataset(path, rows, terminated | cut, keep)


def _read_minari(folder: Path, task: Episodic) -> Dataset:
    minari = _import("minari", folder)
    data = folder / "data" if (folder / "data").is_dir() else folder
    try:
        recorded = minari.MinariDataset(data)
        episodes = list(recorded.iterate_episodes())
        # as it is written, for reading it sorts the parts, and the environment may not
        written = json.loads((data / "metadata.json").read_text()).get("observation_space")
        serialize = minari.serialization.serialize_space
        layout = json.loads(written or serialize(recorded.observation_space))
    except Exception as error:  # it raises whatever its storage does
        raise UsageError(
            f"{folder} cannot be read as a Minari data set: {type(error).__name__}: {error}"
        ) from error
    space, bounds = recorded.action_space, task.action_bounds
    for name, bound in zip(("low", "high"), bounds, strict=True):
        theirs = np.ravel(getattr(space, name, []))
        if theirs.shape != bound.shape or not np.allclose(theirs, bound):
            raise UsageError(
                f"{folder}: `action_space` is {space}; the environment's bounds are "
                f"{bounds[0].tolist()} and {bounds[1].tolist()}."
            )
    spec = task.spec
    parts = []
    for number, episode in enumerate(episodes):
        held = {
            "observations": _flat(folder, layout, episode.observations),
            "actions": np.reshape(episode.actions, (len(episode.actions), -1)),
            "rewards": episode.rewards,
            "terminations": episode.terminations,
        }
        arrays = {f"episode_{number}/{name}": values for name, values in held.items()}
        obs_key, action_key, reward_key, terminated_key = arrays
        reward = _numbers(folder, arrays, reward_key, None)
        count = len(reward)
        obs = _numbers(folder, arrays, obs_key, count + 1, spec.obs_size)
        action = _numbers(folder, arrays, action_key, count, spec.action_size)
        terminated = _flags(folder, arrays, terminated_key, count)
        for key, values in ((obs_key, obs), (action_key, action), (reward_key, reward)):
            _check_finite(folder, key, values)
        action = _unit_actions(folder, action_key, action, task)
        last = np.arange(count) == count - 1
        time, dt = _regular_clock(folder, last, spec)
        rows = Transition(obs[:-1], action, reward, obs[1:], terminated, time, dt)
        parts.append((rows, last))
    if not parts:
        raise UsageError(f"{folder} is empty: it holds no episodes.")
    rows, last = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
    return _dataset(folder, rows, last)


def _minari_folder(id: str) -> Path:
    """Where Minari keeps a data set on this machine."""
    _import("minari", id)
    root = Path(os.environ.get("MINARI_DATASETS_PATH", "~/.minari/datasets")).expanduser()
    if not (root / id / "data").is_dir():
        known = sorted(
            path.parents[1].relative_to(root).as_posix()
            for path in root.glob("**/data/metadata.json")
        )
        raise UsageError(
            f"there is no file and no Minari data set {id!r} on this machine{closest(id, known)}. "
            f"Fetch one with: minari download {id}"
        )
    return root / id


def _flat(source: Path, layout: dict[str, Any], values: Any) -> np.ndarray:
    """Leading axis kept, everything else in one vector, in the order Gymnasium flattens."""
    if layout["type"] == "Dict":
        parts = layout["subspaces"].items()
        return np.concatenate([_flat(source, part, values[name]) for name, part in parts], axis=1)
    if layout["type"] != "Box":
        raise UsageError(
            f"{source} holds a {layout['type']} space; it must be a Box, or a Dict of them."
        )
    return np.reshape(values, (len(values), -1))


def _regular_clock(
    source: Path, last: Bool[np.ndarray, " rows"], spec: Spec
) -> tuple[Float[np.ndarray, " rows"], Float[np.ndarray, " rows"]]:
    """(time, dt) of rows that were recorded at the environment's regular steps."""
    if "dt" in spec.clock:
        raise UsageError(
            f"{source} does not say how long its steps were, and the environment's are irregular."
        )
    index = np.arange(len(last))
    begins = np.insert(last[:-1], 0, True)[: len(last)]
    began = np.maximum.accumulate(np.where(begins, index, 0))
    time = (index - began) * spec.dt
    return time.astype(np.float32), np.full(len(last), spec.dt, np.float32)


def _dataset(
    source: Path,
    rows: Transition,
    last: Bool[np.ndarray, " rows"],
    keep: Bool[np.ndarray, " rows"] | None = None,
) -> Dataset:
    """Of all rows those to keep: the others lack a next observation, and end their episodes."""
    if not len(last):
        raise UsageError(f"{source} is empty: it holds no transitions.")
    if keep is not None:
        last = last | np.append(~keep[1:], False)  # what is left out was the last of its episode
        rows, last = jax.tree.map(lambda leaf: leaf[keep], (rows, last))
        if not len(last):
            raise UsageError(f"{source} is empty: no row of it has a next observation.")
    return Dataset(str(source), rows, np.append(last[:-1], True))


# Checks -------------------------------------------------------------------------------------------


def _require(source: Path, arrays: dict[str, Any], key: str) -> Any:
    if key not in arrays:
        held = ", ".join(f"`{name}`" for name in sorted(arrays)) or "nothing"
        raise UsageError(f"{source} has no `{key}`; it holds {held}.")
    return arrays[key]


def _import(package: str, source: Any) -> Any:
    if importlib.util.find_spec(package) is None:
        raise UsageError(
            f"reading {source} needs the package {package}: {how_to_install('offline')}"
        )
    return importlib.import_module(package)


def _numbers(
    source: Path, arrays: dict[str, Any], key: str, rows: int | None, *size: int
) -> Float[np.ndarray, "..."]:
    """An array of real numbers, as float32; any number of rows where `rows` is None."""
    values = np.asarray(_require(source, arrays, key))
    if not (np.issubdtype(values.dtype, np.floating) or np.issubdtype(values.dtype, np.integer)):
        raise UsageError(f"{source}: `{key}` must hold real numbers, not {values.dtype}.")
    _check_shape(source, key, values, rows, *size)
    with np.errstate(over="ignore"):  # what overflows is said with all that is not finite
        return values.astype(np.float32)


def _flags(source: Path, arrays: dict[str, Any], key: str, rows: int) -> Bool[np.ndarray, " rows"]:
    """An array of true or false, also where it is written in numbers."""
    values = np.asarray(_require(source, arrays, key))
    _check_shape(source, key, values, rows)
    bad = np.flatnonzero(~np.isin(values, (0, 1)))
    if len(bad):
        raise UsageError(
            f"{source}: `{key}` must hold true or false, 1 or 0; row {bad[0]} is {values[bad[0]]}."
        )
    return values.astype(bool)


def _check_shape(source: Path, key: str, values: np.ndarray, rows: int | None, *size: int) -> None:
    if values.shape != (values.shape[:1] if rows is None else (rows,)) + size:
        wanted = ", ".join(map(str, ("rows" if rows is None else rows, *size)))
        raise UsageError(
            f"{source}: `{key}` has shape {list(values.shape)}; [{wanted}] was expected."
        )


def _check_finite(source: Path, key: str, values: np.ndarray) -> None:
    bad = np.unique(np.nonzero(~np.isfinite(values))[0])
    if len(bad):
        raise UsageError(
            f"{source}: `{key}` is not finite in {len(bad)} of {len(values)} rows; the first is "
            f"row {bad[0]}."
        )


def _check_bounds(
    source: Path, key: str, actions: np.ndarray, bounds: tuple[np.ndarray, np.ndarray]
) -> None:
    low, high = bounds
    slack = SLACK * (high - low) / 2.0
    inside = ((actions >= low - slack) & (actions <= high + slack)) | ~np.isfinite(actions)
    if not inside.all():
        reached = actions[np.isfinite(actions)]
        raise UsageError(
            f"{source}: `{key}` reaches from {reached.min():g} to {reached.max():g}; the bounds "
            f"are {low.tolist()} and {high.tolist()}."
        )


def _unit_actions(source: Path, key: str, actions: np.ndarray, task: Episodic) -> np.ndarray:
    """Actions in the environment's units, scaled to [-1, 1]."""
    low, high = task.action_bounds
    _check_bounds(source, key, actions, (low, high))
    return np.clip(2.0 * (actions - low) / (high - low) - 1.0, -1.0, 1.0).astype(np.float32)
