"""What is known of a sweep's trials: a table on the terminal, and the same in JSON lines.

`trials.jsonl` has a line for every trial that begins, goes on elsewhere or ends; whoever reads it
knows what became of each. `progress.jsonl` has the counts, the time left and the best so far, at
most every ten seconds.
"""

import json
import math
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, Literal

from rich.console import Console, Group
from rich.live import Live
from rich.table import Column, Table
from rich.text import Text

from qscore.errors import UsageError
from qscore.sweep.process import Evaluation
from qscore.sweep.spec import Trial

Stage = Literal["waiting", "running", "done", "failed", "stopped", "interrupted"]
"""Of a trial in a sweep: `stopped` early, for others were better; `interrupted` with the sweep."""

COLUMNS = {"time", "trial", "stage", "return", "message", "chosen"}
"""Of a line of `trials.jsonl`."""

ENDED: tuple[Stage, ...] = ("done", "failed", "stopped")
WRITE_SECONDS, DRAW_SECONDS = 10.0, 0.5
"""Between lines of `progress.jsonl`, and between drawings of the table."""

SHOWN_FAILURES = 5
"""Of the failures, so many of the last are shown while the sweep runs."""


@dataclass
class Entry:
    """One trial's row."""

    trial: Trial
    stage: Stage = "waiting"
    share: float = 0.0
    """Of its steps."""
    value: float | None = None
    """Its last return."""
    message: str = ""
    """Why it failed."""


class Board:
    """The state of every trial, told by an engine and shown to people and to programs."""

    def __init__(self, folder: Path, trials: Iterable[Trial], expected: int, *, screen: bool):
        self.folder, self.expected = folder, expected
        self.entries = {trial.name: Entry(trial) for trial in trials}
        self._began = time.monotonic()
        self._before = 0.0  # trials' worth of work that was done before this sitting
        self._written = self._drawn = -math.inf
        self._trials = _open_whole(folder / "trials.jsonl")
        self._progress = _open_whole(folder / "progress.jsonl")
        self._lock = threading.RLock()  # trials end in several threads
        self._live: Live | None = None
        if screen and sys.stderr.isatty():
            self._live = Live(console=Console(stderr=True), auto_refresh=False)
            self._live.start()

    def recall(self, *, retry: bool) -> None:
        """Take up what an earlier sitting wrote; with `retry`, what failed is to be done again."""
        again = ("failed",) if retry else ()
        for row in read_trials(self.folder):
            if (entry := self.entries.get(row["trial"])) is not None:
                summary = self.folder / entry.trial.name / "summary.json"
                lost = row["stage"] == "done" and not summary.is_file()  # somebody deleted it
                ended = row["stage"] in ENDED and row["stage"] not in again and not lost
                entry.stage = row["stage"] if ended else "waiting"
                entry.message = row["message"] if ended else ""
                entry.value = row["return"]
                entry.share = 1.0 if ended else 0.0
        self._before = sum(entry.share for entry in self.entries.values())

    def add(self, trial: Trial) -> None:
        """A trial that was chosen while others ran."""
        self.entries.setdefault(trial.name, Entry(trial))

    def begun(self, name: str) -> None:
        """A trial runs, or runs again."""
        self._to(name, "running", "")

    def evaluated(self, name: str, evaluation: Evaluation) -> None:
        """A trial's last evaluation."""
        with self._lock:
            entry = self.entries[name]
            entry.share = evaluation.step / entry.trial.settings.total_steps
            entry.value = evaluation.value
            self.show()

    def ended(self, name: str, stage: Stage, message: str = "") -> None:
        """A trial runs no more."""
        self._to(name, stage, message)

    def hopeless(self, most: int | None) -> bool:
        """Whether more than `most` trials have failed."""
        return most is not None and len(self.names("failed")) > most

    def names(self, *stages: Stage) -> list[str]:
        """The trials in some stages."""
        return [name for name, entry in self.entries.items() if entry.stage in stages]

    def _to(self, name: str, stage: Stage, message: str) -> None:
        with self._lock:
            entry = self.entries[name]
            entry.stage, entry.message = stage, message
            if stage in ENDED:
                entry.share = 1.0
            row = {"time": round(time.time(), 1), "trial": name, "stage": stage}
            row |= {"return": entry.value, "message": message, "chosen": entry.trial.chosen}
            self._trials.write(json.dumps(row) + "\n")
            self._trials.flush()
            self.show()

    def counts(self) -> dict[str, Any]:
        """Trials by stage, seconds left, and the best configuration of each environment so far.

        "Best" is by the mean of its trials' last returns; failed and stopped trials do not count.
        """
        stages = Counter(entry.stage for entry in self.entries.values())
        work = sum(entry.share for entry in self.entries.values())
        done, left = work - self._before, self.expected - work
        elapsed = time.monotonic() - self._began
        values: dict[tuple[str, str], list[float]] = {}  # by environment and configuration
        for name, entry in self.entries.items():
            if entry.value is not None and entry.stage not in ("failed", "stopped"):
                key = entry.trial.environment.id, name.rpartition("/")[0]
                values.setdefault(key, []).append(entry.value)
        best: dict[str, dict[str, Any]] = {}
        for (task, configuration), each in values.items():
            mean = sum(each) / len(each)
            if task not in best or mean > best[task]["return"]:
                best[task] = {"configuration": configuration, "return": mean, "trials": len(each)}
        return {
            "expected": self.expected,
            # `samples` may have been lowered to below what was chosen before
            "waiting": max(0, self.expected - len(self.entries)) + stages["waiting"],
            **{stage: stages[stage] for stage in ("running", *ENDED, "interrupted")},
            "eta_seconds": round(elapsed * left / done) if done > 0 else None,
            "best": best,
        }

    def show(self, *, last: bool = False) -> None:
        """Redraw the table and write a line, where they are due."""
        now = time.monotonic()
        write = last or now - self._written > WRITE_SECONDS
        draw = self._live is not None and (last or now - self._drawn > DRAW_SECONDS)
        if not (write or draw):
            return
        counts = self.counts()
        if write:
            self._written = now
            self._progress.write(json.dumps({"time": round(time.time(), 1), **counts}) + "\n")
            self._progress.flush()
        if self._live is not None and draw:
            self._drawn = now
            self._live.update(self._table(counts), refresh=True)

    def _table(self, counts: dict[str, Any]) -> Group:
        """The counts, the best trials, and what failed last."""
        eta = counts["eta_seconds"]
        left = "" if eta is None else f", {timedelta(seconds=eta)} left"
        shown = [f"{counts[s]} {s}" for s in ("running", "waiting", *ENDED) if counts[s]]
        table = Table("environment", "best so far", "trials", Column("return", justify="right"))
        for task, best in counts["best"].items():
            row = task, best["configuration"], str(best["trials"]), f"{best['return']:.5g}"
            table.add_row(*row)
        failed = self.names("failed")[-SHOWN_FAILURES:]
        return Group(
            Text(f"{self.folder}: {self.expected} trials, {', '.join(shown)}{left}"),
            *([table] if counts["best"] else []),
            *(Text(f"failed: {name}: {self.entries[name].message}") for name in failed),
        )

    def close(self) -> None:
        """Write the last line and let go of the files and the terminal."""
        try:
            self.show(last=True)
        finally:
            if self._live is not None:
                self._live.stop()
            self._trials.close()
            self._progress.close()


def _open_whole(path: Path) -> IO[str]:
    """Open a file to append lines to; what was half written when a process died is cut off."""
    if path.is_file():
        content = path.read_bytes()
        os.truncate(path, content.rfind(b"\n") + 1)
    return open(path, "a")  # (closed by `Board.close`)


def read_trials(folder: Path) -> list[dict[str, Any]]:
    """The lines of `trials.jsonl`; of one half written, nothing. Raises `UsageError`."""
    path = folder / "trials.jsonl"
    rows = []
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    for number, line in enumerate(lines, start=1):
        if not line.endswith(b"\n"):
            break
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UsageError(f"{path}, line {number}, is not JSON: {error}.") from error
        if not isinstance(row, dict) or not row.keys() >= COLUMNS:
            raise UsageError(f"{path}, line {number}, is not a trial: {line.decode().strip()}")
        rows.append(row)
    return rows
