"""What the benchmarks of training runs share: a run's curve, and a file that processes add to."""

import fcntl
import json
import sys
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from qscore.folder import write_json
from qscore.train_host import Session


def learning_curve(session: Session, steps: int, every: int) -> dict[str, float]:
    """Train to the end: mean evaluation return by step, every `every` steps. Closes the session."""
    curve = {}
    while session.env_steps < steps:
        session.advance(min(steps, (session.env_steps // every + 1) * every))
        if session.env_steps % every == 0:
            curve[str(session.env_steps)] = round(float(np.mean(session.evaluate(0)[0])), 1)
    session.close()
    return curve


def record(
    file: Path, about: dict[str, Any], variants: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Add runs (by variant, then seed) to what the file holds by now, and return all of it.

    Exits where the file is about something else; the machine may differ.
    """
    with file.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        held = json.loads(file.read_text()) if file.is_file() else about | {"variants": {}}
        for key, value in about.items():
            if held.get(key) != value and key != "machine":
                _refuse(f"{file} holds {key} {held.get(key)!r}, not {value!r}; name another file")
        for name, runs in variants.items():
            held["variants"].setdefault(name, {}).update(runs)
        write_json(file, held)
    return held


def read(file: Path) -> dict[str, Any]:
    """What the file holds. Exits where there is none."""
    if not file.is_file():
        _refuse(f"there is no file {file} to print a table of")
    return json.loads(file.read_text())


def _refuse(message: str) -> NoReturn:
    """As `argparse` refuses: one line, exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)
