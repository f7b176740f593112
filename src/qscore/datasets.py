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

import difflib
import hashlib
import importlib.util
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float

from qscore.environments.base import Episodic
from qscore.errors import UsageError
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
    """

    source: str
    rows: Transition
    last: Bool[np.ndarray, " rows"]

    def __len__(self) -> int:
        return len(self.last)

    @property
    def episodes(self) -> list[slice]:
        """The rows of each episode."""
        ends = np.flatnonzero(self.last) + 1
        return [slice(a, b) for a, b in zip([0, *ends[:-1]], ends, strict=True)]

    @property
    def returns(self) -> Float[np.ndarray, " episodes"]:
        """The undiscounted return of each episode, as far as it was recorded."""
        reward = np.asarray(self.rows.reward, np.float64)
        return np.array([reward[rows].sum() for rows in self.episodes])

    @property
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


def references(environment: str) -> dict[str, tuple[float, float]]:
    """The returns that score 0 and 100 on an environment, by the name of the reference."""
    task = re.sub(r"-v\d+$", "", environment)
    return {name: tasks[task] for name, tasks in REFERENCES.items() if task in tasks}


def normalized(value: float, reference: tuple[float, float]) -> float:
    """100 (value - low) / (high - low)."""
    low, high = reference
    return 100.0 * (value - low) / (high - low)


# Sources ------------------------------------------------------------------------------------------


def _read_recording(path: Path, task: Episodic) -> Dataset:
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError) as error:
        raise UsageError(f"{path} cannot be read as a recording: {error}.") from error
    about = _about(path, arrays)
    for name in RECORDING_KEYS:
        _require(path, arrays, name)
    low, high = task.action_bounds
    for name, bound in (("action_low", low), ("action_high", high)):
        if not np.allclose(about[name], bound):
            raise UsageError(
                f"{path}: actions were recorded with {name} {about[name]}; the environment's is "
                f"{bound.tolist()}."
            )
    dt = np.unique(arrays["dt"])
    if "dt" not in task.spec.clock and not np.allclose(dt, task.spec.dt):
        raise UsageError(
            f"{path}: recorded with steps of {dt[0]:g} s; the environment takes {task.spec.dt:g} s."
        )
    names = {name: name for name in RECORDING_KEYS}
    rows = {name: arrays[name] for name in RECORDING_KEYS if name != "truncated"}
    last = np.asarray(arrays["truncated"], bool) | np.asarray(arrays["terminated"], bool)
    return _checked(str(path), task.spec, names, rows, last)


def _about(path: Path, arrays: dict[str, Any]) -> dict[str, Any]:
    try:
        about = json.loads(str(_require(path, arrays, "about")))
        form, _, _ = about["format"], about["action_low"], about["action_high"]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: its `about` is not that of a recording ({error}).") from error
    if form != FORMAT:
        raise UsageError(f"{path} has format {form}; this version reads {FORMAT}.")
    return about


def _read_hdf5(path: Path, task: Episodic) -> Dataset:
    h5py = _import("h5py", path)
    try:
        with h5py.File(path, "r") as file:
            arrays = {
                name: np.asarray(item)
                for name, item in file.items()
                if isinstance(item, h5py.Dataset)
            }
    except OSError as error:
        raise UsageError(f"{path} cannot be read as HDF5: {error}.") from error
    obs = _require(path, arrays, "observations")
    terminated = np.asarray(_require(path, arrays, "terminals"), bool)
    _require(path, arrays, "actions")
    _require(path, arrays, "rewards")
    for name in ("actions", "rewards", "terminals", "timeouts", "next_observations"):
        if name in arrays and len(arrays[name]) != len(obs):
            raise UsageError(
                f"{path}: `{name}` has {len(arrays[name])} rows, `observations` has {len(obs)}."
            )
    ended = terminated.copy()
    if "timeouts" in arrays:
        ended |= np.asarray(arrays["timeouts"], bool)
    elif "next_observations" not in arrays:
        raise UsageError(
            f"{path} has neither `timeouts` nor `next_observations`: where an episode was cut "
            "cannot be told, and values would be learned across the cut."
        )
    keep = np.ones(len(obs), bool)
    if "next_observations" in arrays:
        next_obs = arrays["next_observations"]
        if "timeouts" not in arrays:  # an episode goes on where the next row goes on from
            apart = np.array(
                [not np.allclose(a, b) for a, b in zip(next_obs[:-1], obs[1:], strict=True)], bool
            )
            ended[:-1] |= apart
    else:
        next_obs = np.concatenate([obs[1:], obs[-1:]])
        next_obs[ended] = obs[ended]  # the next row is another episode's
        keep = ~ended | terminated
        keep[-1:] &= terminated[-1:]
    ended[-1:] = True
    rows = {
        "obs": obs,
        "action": _unit_actions(str(path), "actions", arrays["actions"], task),
        "reward": arrays["rewards"],
        "next_obs": next_obs,
        "terminated": terminated,
    }
    names = {
        "obs": "observations",
        "action": "actions",
        "reward": "rewards",
        "next_obs": "next_observations",
        "terminated": "terminals",
    }
    return _checked(str(path), task.spec, names, rows, ended, keep)


def _read_minari(folder: Path, task: Episodic) -> Dataset:
    minari = _import("minari", folder)
    data = folder / "data" if (folder / "data").is_dir() else folder
    try:
        recorded = minari.MinariDataset(data)
        episodes = list(recorded.iterate_episodes())
    except Exception as error:  # it raises whatever its storage does
        raise UsageError(
            f"{folder} cannot be read as a Minari data set: {type(error).__name__}: {error}"
        ) from error
    if not episodes:
        raise UsageError(f"{folder} holds no episodes.")
    parts: dict[str, list[np.ndarray]] = {}
    for number, episode in enumerate(episodes):
        obs = _flat(recorded.observation_space, episode.observations)
        steps = len(episode.rewards)
        if len(obs) != steps + 1:
            raise UsageError(
                f"{folder}: episode {number} has {len(obs)} observations for {steps} rewards; "
                f"{steps + 1} were expected."
            )
        last = np.arange(steps) == steps - 1
        columns = {
            "obs": obs[:-1],
            "action": _flat(recorded.action_space, episode.actions),
            "reward": episode.rewards,
            "next_obs": obs[1:],
            "terminated": episode.terminations,
            "last": last,
        }
        for name, values in columns.items():
            parts.setdefault(name, []).append(np.asarray(values))
    rows = {name: np.concatenate(values) for name, values in parts.items()}
    rows["action"] = _unit_actions(str(folder), "actions", rows["action"], task)
    names = {
        "obs": "observations",
        "action": "actions",
        "reward": "rewards",
        "next_obs": "observations",
        "terminated": "terminations",
    }
    return _checked(str(folder), task.spec, names, rows, rows.pop("last"))


def _minari_folder(id: str) -> Path:
    """Where Minari keeps a data set on this machine."""
    minari = _import("minari", id)
    folder = Path(minari.storage.get_dataset_path(id))
    if not (folder / "data").is_dir():
        known = sorted(minari.list_local_datasets())
        closest = difflib.get_close_matches(id, known, 1, cutoff=0.5)
        hint = f"; the closest is {closest[0]!r}" if closest else ""
        raise UsageError(
            f"there is no file and no Minari data set {id!r} on this machine{hint}. "
            f"Fetch one with: minari download {id}"
        )
    return folder


# Checks -------------------------------------------------------------------------------------------


def _require(source: Path, arrays: dict[str, Any], key: str) -> Any:
    if key not in arrays:
        held = ", ".join(f"`{name}`" for name in sorted(arrays)) or "nothing"
        raise UsageError(f"{source} has no `{key}`; it holds {held}.")
    return arrays[key]


def _import(package: str, source: Any) -> Any:
    if importlib.util.find_spec(package) is None:
        raise UsageError(
            f"reading {source} needs the package {package}: pip install 'qscore[offline]' "
            "(or `uv sync --extra offline`)."
        )
    return __import__(package)


def _flat(space: Any, values: Any) -> np.ndarray:
    """Leading axis kept, everything else in one vector, in the order Gymnasium flattens."""
    if isinstance(values, dict):
        return np.concatenate([_flat(part, values[name]) for name, part in space.items()], axis=1)
    values = np.asarray(values)
    return values.reshape(len(values), -1)


def _unit_actions(source: str, key: str, actions: Any, task: Episodic) -> np.ndarray:
    """Actions in the environment's units, scaled to [-1, 1]."""
    low, high = task.action_bounds
    actions = np.asarray(actions, np.float32)
    if actions.ndim != 2 or actions.shape[1] != len(low):
        return actions  # said with the other shapes
    unit = 2.0 * (actions - low) / (high - low) - 1.0
    if np.abs(unit[np.isfinite(unit)]).max(initial=0.0) > 1.0 + SLACK:
        raise UsageError(
            f"{source}: `{key}` reach from {np.nanmin(actions):g} to {np.nanmax(actions):g}; the "
            f"environment's bounds are {low.tolist()} and {high.tolist()}."
        )
    return np.clip(unit, -1.0, 1.0).astype(np.float32)


def _checked(
    source: str,
    spec: Spec,
    names: dict[str, str],
    rows: dict[str, Any],
    last: np.ndarray,
    keep: np.ndarray | None = None,
) -> Dataset:
    """The rows as a `Dataset`, times filled in where they were not recorded.

    `names` are the source's own, for messages. Rows that are not kept are those without a next
    observation.
    """
    count = len(last)
    if count == 0:
        raise UsageError(f"{source} is empty: it holds no transitions.")
    sizes = {"obs": (spec.obs_size,), "next_obs": (spec.obs_size,), "action": (spec.action_size,)}
    for name, values in rows.items():
        expected = (count, *sizes.get(name, ()))
        if np.shape(values) != expected:
            raise UsageError(
                f"{source}: `{names[name]}` has shape {list(np.shape(values))}; the environment's "
                f"are {list(expected)}."
            )
        if not np.issubdtype(np.asarray(values).dtype, np.number) and name != "terminated":
            raise UsageError(f"{source}: `{names[name]}` does not hold numbers.")
    # after the last row of an episode the source's next row is another's, and may be anything
    for name, values in rows.items():
        flat = np.asarray(values, np.float64).reshape(count, -1)
        bad = ~np.isfinite(flat).all(axis=1)
        if keep is not None:
            bad &= keep
        if bad.any():
            first = int(np.flatnonzero(bad)[0])
            raise UsageError(
                f"{source}: `{names[name]}` has {int(bad.sum())} rows that are not finite, the "
                f"first is row {first}."
            )
    if "time" not in rows:
        starts = np.concatenate([[0], np.flatnonzero(last)[:-1] + 1])
        began = np.repeat(starts, np.diff([*starts, count]))
        rows = rows | {
            "time": (np.arange(count) - began) * spec.dt,
            "dt": np.full(count, spec.dt),
        }
    typed = {
        name: np.asarray(values, bool if name == "terminated" else np.float32)
        for name, values in rows.items()
    }
    if keep is not None:
        # the row before one that is left out is now the last of its episode
        last = last | np.append(~keep[1:] & last[1:], False)
        typed, last = {name: values[keep] for name, values in typed.items()}, last[keep]
        if not len(last):
            raise UsageError(f"{source} is empty: no row of it has a next observation.")
        last[-1] = True
    return Dataset(source, Transition(**typed), last)
