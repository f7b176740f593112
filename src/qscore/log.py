"""What a run writes as it goes: JSON lines, TensorBoard, and a progress bar on a terminal."""

import contextlib
import json
import os
import platform
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

STREAMS = ("metrics", "evals")
BAR_WIDTH = 24
FLUSH_SECONDS = 30.0
"""Training that is watched in TensorBoard is seen this much later, at most."""


class RunLog:
    """Appends to `metrics.jsonl` and `evals.jsonl`, and mirrors both to TensorBoard.

    `offsets`, by stream, cuts the files back to the lengths a checkpoint recorded, so that a
    resumed run repeats no line.
    """

    def __init__(self, folder: Path, offsets: dict[str, int] | None = None, env_steps: int = 0):
        self._files = {}
        for stream in STREAMS:
            path = folder / f"{stream}.jsonl"
            path.touch()
            os.truncate(path, min((offsets or {}).get(stream, 0), path.stat().st_size))
            self._files[stream] = open(path, "a")  # noqa: SIM115 (closed by `close`)
        # events after the checkpoint belong to the run that died
        self._events = _Events(folder / "tensorboard", env_steps + 1 if offsets else None)

    def metrics(self, row: dict[str, Any]) -> None:
        """One line of training metrics of one seed."""
        self._append("metrics", row)
        shown = {name: value for name, value in row.items() if name not in ("seed", "env_steps")}
        self._events.write(row["seed"], row["env_steps"], shown)

    def evaluation(self, row: dict[str, Any]) -> None:
        """One line per seed and evaluation."""
        self._append("evals", row)
        mean = sum(row["returns"]) / len(row["returns"])
        self._events.write(row["seed"], row["env_steps"], {"eval_return": mean})

    def offset(self, stream: str) -> int:
        """A file's length in bytes, once its lines are on the disk.

        One stream may be written by one thread and another one by another.
        """
        file = self._files[stream]
        file.flush()
        os.fsync(file.fileno())
        self._events.flush()
        return file.tell()

    def close(self) -> None:
        """Flush and close; what cannot be written any more is let go."""
        for file in (*self._files.values(), self._events):
            with contextlib.suppress(OSError):
                file.close()

    def _append(self, stream: str, row: dict[str, Any]) -> None:
        self._files[stream].write(json.dumps(row) + "\n")
        self._files[stream].flush()


class _Events:
    """Scalars for TensorBoard.

    Written by whoever calls. `SummaryWriter` has a thread for it, which ends where the disk refuses
    a write, and then its callers wait for ever.
    """

    def __init__(self, folder: Path, first_step: int | None):
        """From `first_step` on, TensorBoard forgets what the folder's earlier files hold."""
        from tensorboardX.proto.event_pb2 import (
            Event,  # pyright: ignore[reportAttributeAccessIssue]
            SessionLog,  # pyright: ignore[reportAttributeAccessIssue]
        )
        from tensorboardX.record_writer import RecordWriter
        from tensorboardX.summary import scalar

        self._event, self._scalar = Event, scalar
        folder.mkdir(exist_ok=True)
        self._lock = threading.Lock()  # training and evaluation each have a thread
        name = f"events.out.tfevents.{time.time():.6f}.{platform.node()}"
        self._records = RecordWriter(str(folder / name))
        self._flushed = time.monotonic()
        version = "brain.Event:2"
        self._add(Event(file_version=version))
        if first_step is not None:
            self._add(Event(step=first_step, file_version=version))
            start = SessionLog(status=SessionLog.START)
            self._add(Event(step=first_step, session_log=start))

    def write(self, seed: int, step: int, values: dict[str, Any]) -> None:
        """Some values of one seed at an environment step."""
        with self._lock:
            for name, value in values.items():
                summary = self._scalar(f"seed-{seed}/{name}", value)
                self._add(self._event(step=step, summary=summary))
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """To the disk, from where TensorBoard reads."""
        with self._lock:
            self._records.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        self._records.close()

    def _add(self, event: Any) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())


class ProgressBar:
    """Steps, speed, time left and the last return on stderr; silent without a terminal.

    The first `warmup` steps take next to no time, so the time left is that of the others at the
    pace that they have had, and is unknown before the first of them.
    """

    def __init__(self, label: str, total: int, *, warmup: int, enabled: bool):
        self._total, self._warmup = total, warmup
        self._began = time.monotonic()
        self._learning: tuple[float, int] | None = None  # since when, and the steps by then
        console = Console(stderr=True)

        def column(text: str, width: int) -> TextColumn:
            """What a narrow terminal leaves whole; the bar shrinks before it."""
            return TextColumn(text, table_column=Column(no_wrap=True, min_width=width))

        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(BAR_WIDTH),
            column("{task.completed}/{task.total}", 2 * len(str(total)) + 1),
            column("{task.fields[rate]}", len("100 steps/s")),
            column("{task.fields[left]}", len("0:00:00")),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not (enabled and sys.stderr.isatty()),
        )
        self._task = self._progress.add_task(label, total=total, rate="", left="", note="")
        self._progress.start()

    def update(self, env_steps: int, rate: float) -> None:
        """Move the bar; `rate` is environment steps per second, all seeds together."""
        now = time.monotonic()
        self._progress.update(
            self._task,
            completed=env_steps,
            rate=f"{rate:.0f} steps/s",
            left=self._left(env_steps, now),
        )
        if self._learning is None and env_steps >= self._warmup:
            self._learning = now, env_steps

    def _left(self, env_steps: int, now: float) -> str:
        """The time left; at the end, the time taken."""
        if env_steps >= self._total:
            seconds = now - self._began
        elif self._learning is None:
            return "-:--:--"
        else:
            since, before = self._learning
            seconds = (now - since) * (self._total - env_steps) / (env_steps - before)
        return str(timedelta(seconds=round(seconds)))

    def note(self, text: str) -> None:
        """Replace the text at the end of the bar."""
        self._progress.update(self._task, note=text)

    def warn(self, text: str) -> None:
        """A line above the bar that stays; also without a terminal."""
        if self._progress.disable:
            print(f"warning: {text}", file=sys.stderr, flush=True)
        else:
            self._progress.console.print(f"[yellow]warning:[/] {text}")

    def close(self) -> None:
        """Stop drawing."""
        self._progress.stop()
