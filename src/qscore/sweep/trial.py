"""The process of one trial: `python -P trial.py FOLDER CORES qscore train ...`.

It does what the command does, in FOLDER, or goes on where a run there stopped. It holds a lock on
the folder, so that a trial that was given up for lost and the one in its place never write at once;
it takes so many cores for itself; and it writes a checkpoint and ends where its standard input
does, which is when the process that started it ends, however that happens.

Started as a script, so that the cores are chosen before anything counts them.
"""

import fcntl
import os
import random
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import IO

LOCK_SECONDS = 120.0
"""How long a trial waits for the one before it to write its checkpoint and leave the folder."""


def take_cores(count: int) -> list[IO]:
    """Run on `count` cores that no other trial on this machine has, as far as there are any.

    What is returned must be held as long as they are wanted.
    """
    allowed = sorted(os.sched_getaffinity(0))
    place = Path(tempfile.gettempdir()) / f"qscore-cores-{os.getuid()}"
    place.mkdir(exist_ok=True)
    locks, taken = [], []
    for core in allowed:
        if len(taken) == count:
            break
        lock = open(place / str(core), "w")  # noqa: SIM115 (held while the trial runs)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            continue
        locks.append(lock)
        taken.append(core)
    others = [core for core in allowed if core not in taken]
    random.shuffle(others)  # where cores have to be shared, not always the first
    os.sched_setaffinity(0, {*taken, *others[: count - len(taken)]})
    return locks


def lock(folder: Path) -> IO | None:
    """Hold a run folder; None where another process would not let go of it.

    On a file system that locks no files nothing is held.
    """
    file = open(folder.with_suffix(".lock"), "w")  # noqa: SIM115 (held while the trial runs)
    patience = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() > patience:
                return None
            time.sleep(0.2)
        except OSError:
            return file


def end_with_input() -> None:
    """Stop, with a checkpoint, once standard input ends."""
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def main(folder: Path, cores: int, command: list[str]) -> None:
    """Train, as `command` says, and exit with its code."""
    held = take_cores(cores) if hasattr(os, "sched_setaffinity") else []  # Linux only
    threading.Thread(target=end_with_input, daemon=True).start()
    own = lock(folder)
    if own is None:
        sys.exit(f"qscore: another process has been in {folder} for {LOCK_SECONDS:.0f} s.")
    held.append(own)
    from qscore import cli

    if (folder / "config.json").is_file():
        cli.main(["resume", str(folder)])
    else:
        (folder / ".config.json.tmp").unlink(missing_ok=True)  # of a process that died as it began
        cli.main(command[1:])


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
