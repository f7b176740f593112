"""Checkpoints: a JSON header and arrays without pickle, checked on reading, replaced as a whole.

    checkpoints/<env_steps>/header.json     counters, the size and SHA-256 of each file
    checkpoints/<env_steps>/seed-<s>.npz    the arrays of one seed, one entry per leaf

A checkpoint is written to a temporary folder, flushed to the disk and renamed, so whatever moment
a run dies at, each folder with a number for a name is complete.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

FORMAT = 1

ASIDE = ".tmp-replaced-"
"""What the checkpoint of a step is called while another one of the same step takes its place."""


class CorruptCheckpoint(RuntimeError):
    """A checkpoint file that is not what was written."""


def save(
    folder: Path, env_steps: int, header: dict[str, Any], arrays: dict[int, Any], *, keep: int
) -> Path:
    """Write one checkpoint (`arrays` by seed) and delete all but the newest `keep`.

    Raises `OSError` where the disk refuses; nothing that was there before is touched then.
    """
    final, scratch = folder / str(env_steps), folder / f".tmp-{env_steps}"
    clean(folder)
    scratch.mkdir(parents=True)
    try:
        files = {}
        for seed, tree in arrays.items():
            path = scratch / f"seed-{seed}.npz"
            with open(path, "wb") as file:
                np.savez(file, allow_pickle=False, **_named_leaves(tree))
                _flush(file)
            files[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        header = {"format": FORMAT, **header, "env_steps": env_steps, "files": files}
        header["sha256"] = _header_sha256(header)
        with open(scratch / "header.json", "w") as file:
            json.dump(header, file, indent=1)
            _flush(file)
        aside = folder / f"{ASIDE}{env_steps}"
        if final.exists():  # the same step again: an interrupt's checkpoint is now the end
            final.rename(aside)
        scratch.rename(final)
        _sync_folder(folder)
        shutil.rmtree(aside, ignore_errors=True)
    except BaseException:
        with contextlib.suppress(OSError):
            clean(folder)
        raise
    for old in steps(folder)[:-keep]:
        shutil.rmtree(folder / str(old))
    return final


def steps(folder: Path) -> list[int]:
    """Environment steps of the checkpoints in a folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())


def discard_after(folder: Path, env_steps: int) -> None:
    """Delete the checkpoints of later steps."""
    for step in steps(folder):
        if step > env_steps:
            shutil.rmtree(folder / str(step))


def clean(folder: Path) -> None:
    """Remove what a run that died while writing left behind, and put back what it was replacing."""
    for path in folder.glob(f"{ASIDE}*"):
        final = folder / path.name.removeprefix(ASIDE)
        if not final.exists():
            path.rename(final)
    for path in folder.glob(".tmp-*"):
        shutil.rmtree(path)


def read_header(checkpoint: Path) -> dict[str, Any]:
    """The header, once it and every file it names are verified.

    Raises `CorruptCheckpoint` with the name of the file at fault.
    """
    path = checkpoint / "header.json"
    try:
        header = json.loads(path.read_bytes())
        intact = header["sha256"] == _header_sha256(header)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptCheckpoint(f"{path} cannot be read ({error})") from error
    if not intact:
        raise CorruptCheckpoint(f"{path} does not match its checksum")
    if header["format"] != FORMAT:
        raise CorruptCheckpoint(
            f"{path} has format {header['format']}; this version reads {FORMAT}"
        )
    for name, entry in header["files"].items():
        file = checkpoint / name
        if not file.is_file():
            raise CorruptCheckpoint(f"{file} is missing")
        try:
            same = file.stat().st_size == entry["bytes"] and _sha256(file) == entry["sha256"]
        except OSError as error:
            raise CorruptCheckpoint(f"{file} cannot be read ({error})") from error
        if not same:
            raise CorruptCheckpoint(f"{file} does not match its checksum")
    return header


def newest(folder: Path, warn: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The newest intact checkpoint and its header, or None; `warn` hears of each that is not."""
    found = steps(folder)
    for step in reversed(found):
        try:
            return folder / str(step), read_header(folder / str(step))
        except CorruptCheckpoint as error:
            if steps(folder)[-1:] > found[-1:]:  # a training has replaced it meanwhile
                return newest(folder, warn)
            warn(f"{error}; trying the checkpoint before it.")
    return None


def load(checkpoint: Path, seed: int, skeleton: Any) -> Any:
    """The arrays of one seed, as a tree of `skeleton`'s structure.

    Only the leaves that the skeleton has are read; shape and type are compared where it holds a
    `jax.ShapeDtypeStruct`, and free elsewhere (the replay's rows). Raises `CorruptCheckpoint`
    naming the leaf that is missing or differs.
    """
    path = checkpoint / f"seed-{seed}.npz"
    leaves, treedef = jax.tree_util.tree_flatten_with_path(skeleton)
    with np.load(path, allow_pickle=False) as archive:
        loaded = []
        for key_path, expected in leaves:
            name = jax.tree_util.keystr(key_path)
            if name not in archive:
                raise CorruptCheckpoint(f"{path} has no array {name}")
            value = archive[name]
            if isinstance(expected, jax.ShapeDtypeStruct) and (
                value.shape != expected.shape or value.dtype != expected.dtype
            ):
                raise CorruptCheckpoint(
                    f"{path}: {name} is {value.dtype}{list(value.shape)}, "
                    f"the configuration makes {expected.dtype}{list(expected.shape)}"
                )
            loaded.append(value)
    return jax.tree.unflatten(treedef, loaded)


def _named_leaves(tree: Any) -> dict[str, np.ndarray]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def _header_sha256(header: dict[str, Any]) -> str:
    body = {name: value for name, value in header.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
