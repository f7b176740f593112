"""One attempt at a trial: its process, and what it has said so far. The same for all engines."""

import contextlib
import fcntl
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from qscore.errors import UsageError
from qscore.folder import Run

State = Literal["running", "done", "failed", "stopped", "lost"]
"""Of a trial: `failed` would only fail again, `lost` may go on from its checkpoint, `stopped` was
told to."""


SCRIPT = Path(__file__).with_name("trial.py")
"""What a trial's process runs."""

STOP_SECONDS = 600.0
"""A process that was asked to end has so long for its checkpoint; then it is killed."""

POLL_SECONDS = 0.5
"""Between looks at a process and at what it has written."""


@dataclass(frozen=True)
class Evaluation:
    """The last evaluation that all seeds of a trial have had."""

    step: int
    value: float
    """The mean return over the seeds."""


class Attempt:
    """A running process in `folder`; it does `command`, or goes on where that stopped.

    The process ends with this one, or when `stop` is called. What it prints goes to FOLDER.log,
    after what earlier attempts did.
    """

    def __init__(
        self, command: list[str], folder: Path, cores: int, environ: Mapping[str, str] | None = None
    ):
        self.folder = folder
        self._size = -1
        self._asked = False
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "ab") as log:
            self._said = log.tell()
            self.process = subprocess.Popen(
                [sys.executable, "-P", str(SCRIPT), str(folder), str(cores), *command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                # it finds the modules that this process does: those of tasks of one's own
                env={**os.environ, "PYTHONPATH": os.pathsep.join(_paths()), **(environ or {})},
                start_new_session=True,  # Ctrl-C is for the sweep, which stops its trials
            )

    @property
    def log(self) -> Path:
        """What the process prints."""
        return self.folder.with_suffix(".log")

    def news(self) -> Evaluation | None:
        """The last evaluation, where it is another one than at the last call."""
        path = self.folder / "evals.jsonl"
        size = path.stat().st_size if path.is_file() else -1
        if size == self._size:
            return None
        self._size = size
        return last_evaluation(self.folder)

    def state(self) -> State:
        """What has become of the process."""
        code = self.process.poll()
        if code is None:
            return "running"
        if code == 0:
            return "done"
        if self._asked:
            return "stopped"
        return "failed" if code in (2, 3) else "lost"

    def message(self) -> str:
        """Why it ended, in a line."""
        code = self.process.returncode
        if code is not None and code < 0:
            return f"killed by signal {-code}" + (
                ", as by a system that is out of memory" if code == -9 else ""
            )
        text = self.log.read_bytes()[self._said :].decode(errors="replace")
        lines = [line for line in text.splitlines() if line.strip()]
        said = [line for line in lines if line.startswith("qscore: ")] or lines
        return said[-1].removeprefix("qscore: ") if said else f"exit code {code}"

    def stop(self) -> None:
        """Ask the process to write a checkpoint and end, and wait until it has, or kill it."""
        self._asked = self.process.poll() is None
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:  # a task that hangs
            self.process.kill()
            self.process.wait()


def _paths() -> list[str]:
    """Where this process looks for modules."""
    return [os.path.abspath(path) for path in sys.path]


def last_evaluation(folder: Path) -> Evaluation | None:
    """The last evaluation that all seeds of a run have had; None before the first."""
    run = Run.open(folder)
    rows = run.rows("evals")
    common = set.intersection(*(set(rows.get(seed, {})) for seed in run.settings.seed_list))
    if not common:
        return None
    last = [np.mean(each[max(common)]["returns"]) for each in rows.values()]
    return Evaluation(max(common), float(np.mean(last)))


def wait_for_end(folder: Path) -> None:
    """Return once no trial's process is in a folder, wherever it was started.

    On a file system that locks no files that is not known, and this returns at once.
    """
    with open(folder.with_suffix(".lock"), "a") as lock, contextlib.suppress(OSError):
        fcntl.flock(lock, fcntl.LOCK_EX)


def carry_out(
    command: list[str],
    folder: Path,
    *,
    cores: int,
    retries: int,
    report: Callable[[Evaluation], None],
    stopping: Callable[[], bool],
) -> tuple[Literal["done", "failed", "stopped"], str]:
    """Do a trial, to its end: `done`, `failed` for the reason given, or `stopped` as asked.

    A process that is lost is begun again up to `retries` times, from its last checkpoint.
    """
    message = ""
    for _ in range(1 + retries):
        if stopping():
            return "stopped", ""
        try:
            attempt = Attempt(command, folder, cores)
        except OSError as error:
            return "failed", str(error)
        try:
            while (news := wait(attempt, stopping)) is not None:
                report(news)
        except (UsageError, OSError) as error:  # its files are not what a run writes
            return "failed", str(error)
        finally:
            attempt.stop()
        if (state := attempt.state()) in ("done", "stopped"):
            return state, ""
        message = attempt.message()
        if state == "failed":
            break
    return "failed", message


def wait(
    attempt: Attempt, stopping: Callable[[], bool] = lambda: False, seconds: float = math.inf
) -> Evaluation | None:
    """The next evaluation; None where the process ends, is to be stopped, or so long has none."""
    patience = time.monotonic() + seconds
    while True:
        over = attempt.state() != "running" or stopping() or time.monotonic() > patience
        if (news := attempt.news()) is not None or over:
            return news
        time.sleep(POLL_SECONDS)
