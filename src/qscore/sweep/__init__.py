"""Sweeps: many training runs from one file, on this machine or on a cluster."""

import dataclasses
import fcntl
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qscore import run
from qscore.errors import Interrupted, UsageError, how_to_install
from qscore.folder import Run, differences, write_text
from qscore.sweep import local
from qscore.sweep.board import Board, read_trials
from qscore.sweep.spec import Sweep, Trial, parse


@dataclass(frozen=True)
class Outcome:
    """How a sweep ended."""

    folder: Path
    counts: dict[str, Any]
    """Trials by stage, and the best on every environment."""
    failures: dict[str, str]
    """Why each failed trial did."""
    retry: str
    """The command that tries those again."""
    report: Path | None
    """The page that compares the runs; None where no trial is done, or they cannot be compared."""
    unreported: str
    """Why there is no page where there could be one; empty otherwise."""


def sweep(
    spec: Path | str, *, resume: bool = False, retry: bool = False, progress: bool = True
) -> Outcome:
    """Carry out the sweep that a TOML file describes (`qscore.sweep.spec`).

    Every trial is an ordinary run in a folder under the sweep's; its numbers are those of the same
    command by hand on as many cores. With `resume`, what has ended is not repeated and what was cut
    short goes on from its checkpoint; with `retry`, trials that failed are tried again as well.

    Raises `UsageError` before anything starts where something is wrong with the file, or with the
    machines; and `Interrupted` after a signal, once every trial has written a checkpoint. A trial
    that fails is in `Outcome.failures`, and no exception.
    """
    path = Path(spec)
    asked = _read(path)
    engine = _engine(asked)
    again = shlex.join(["qscore", "sweep", str(path), "--resume"])
    if retry and not resume:
        raise UsageError("`--retry` is of what an earlier sitting left; it needs `--resume`.")
    if asked.out.exists() and not resume and (not asked.out.is_dir() or any(asked.out.iterdir())):
        asked.file.refuse(
            ("out",),
            f"`out` is {asked.out}, which exists and is not an empty folder; to go on with the "
            f"sweep in it: {again}",
        )
    if resume and not (asked.out / "sweep.toml").is_file():
        raise UsageError(f"there is no sweep in {asked.out} to go on with.")
    for trial in _begun(asked) if resume and asked.adaptive else asked.trials:
        _check_same(trial, asked.out / trial.name)
    with engine.ready(asked):  # before JAX has threads, beside which Ray cannot start processes
        _check_trials(asked)
        try:
            asked.out.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:
            asked.file.refuse(("out",), f"cannot write to `out`, {asked.out}: {error}.")
        with _alone(asked.out), run.interruptible() as stopping:
            write_text(asked.out / "sweep.toml", asked.file.text)
            board = _board(asked, retry=retry, screen=progress)
            try:
                todo = [board.entries[name].trial for name in board.names("waiting")]
                engine.run(asked, todo, board, stopping)
            finally:
                board.close()
            if stopping():
                raise Interrupted(f"interrupted, checkpoints written; continue with: {again}")
    page, unreported = _report(asked.out, board)
    return Outcome(
        asked.out,
        board.counts(),
        {name: board.entries[name].message for name in board.names("failed")},
        f"{again} --retry",
        page,
        unreported,
    )


def _read(path: Path) -> Sweep:
    """The sweep in a file; the file as a name in messages is as it was given."""
    try:
        return parse(path.read_text("utf-8-sig"), str(path))
    except OSError as error:
        raise UsageError(f"cannot read the sweep {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not a text file.") from error


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder of a sweep. Raises `UsageError` where another process does, or none can.

    On a file system that locks no files nothing is held.
    """
    try:
        file = open(folder / "sweep.lock", "w")  # noqa: SIM115 (below)
    except OSError as error:
        raise UsageError(f"cannot write to `out`, {folder}: {error}.") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"another process carries out the sweep in {folder}.") from None
        except OSError:
            pass
        yield


def _board(asked: Sweep, *, retry: bool, screen: bool) -> Board:
    """The state of the trials, with what an earlier sitting wrote of them."""
    if not asked.adaptive:
        board = Board(asked.out, asked.trials, len(asked.trials), screen=screen)
    else:
        assert asked.search is not None
        board = Board(asked.out, [], asked.search.samples, screen=screen)
        for trial in _begun(asked):
            board.add(trial)
    try:
        board.recall(retry=retry)
    except BaseException:
        board.close()
        raise
    return board


def _begun(asked: Sweep) -> list[Trial]:
    """What Optuna has chosen so far. Refuses what it could not choose in the file's space."""
    chosen = {row["trial"]: row["chosen"] for row in read_trials(asked.out)}
    space = {".".join(path): each for path, each in asked.space.items()}
    for name, values in chosen.items():
        odd = sorted(space.keys() ^ values.keys())
        odd += [f for f, value in values.items() if f in space and not space[f].holds(value)]
        if odd:
            said = f"`{odd[0]}` {values[odd[0]]!r}" if odd[0] in values else f"no `{odd[0]}`"
            asked.file.refuse(
                ("search", "space"),
                f"{asked.out / name} was begun with {said}, which the space does not hold; resume "
                "with the space that the sweep began with.",
            )
    return [asked.make(values) for values in chosen.values()]


def _engine(asked: Sweep) -> Any:
    if asked.engine == "local":
        return local
    try:
        from qscore.sweep import cluster
    except ImportError as error:
        raise UsageError(f"engine = 'ray' needs Ray: {how_to_install('sweep')}") from error
    return cluster


def _check_trials(asked: Sweep) -> None:
    """Refuse now what trials would refuse later.

    Trials that differ only in seeds, or in fields that decide nothing here, are checked once.
    """
    alike: dict[Any, list[Trial]] = {}
    for trial in asked.trials:
        settings = dataclasses.replace(trial.settings, seed_start=0)
        # what a closed form is asked for of, and what takes memory
        names = ("replay_capacity", "hidden", "critic", "discount_rate")
        sizes = (getattr(trial.algorithm, name, None) for name in names)
        key = (trial.environment, settings, type(trial.algorithm), *sizes)
        alike.setdefault(key, []).append(trial)
    # where Ray puts its trials is not known
    workers = local.workers(asked) if asked.engine == "local" else 1
    for (environment, settings, *_), (trial, *others) in alike.items():
        try:
            beside = min(workers, 1 + len(others))
            run.check(trial.algorithm, environment, settings, beside=beside)
        except UsageError as error:
            asked.refuse(trial, error)


def _check_same(trial: Trial, folder: Path) -> None:
    """Refuse to go on with a run that is not the one asked for."""
    if not (folder / "config.json").is_file():
        return
    found = Run.open(folder)
    settings = run.filled(trial.settings, trial.environment)
    for name, there, asked in (
        ("fields of its algorithm", found.algorithm, trial.algorithm),
        ("fields of its environment", found.environment, trial.environment),
        ("settings", found.settings, settings),
    ):
        if there != asked:
            said = ", ".join(
                f"`{field}` {value!r}, not {getattr(asked, field)!r}"
                for field, value in differences(there, asked).items()
            )
            raise UsageError(f"{folder} was begun with other {name}: {said}.")


def _report(folder: Path, board: Board) -> tuple[Path | None, str]:
    """Compare the runs that are done; others were evaluated too early to be compared with them.

    The page, or why there is none: what has been trained is not lost for the want of a page.
    """
    runs = [folder / name for name in board.names("done")]
    if not runs:
        return None, ""
    from qscore.report import report  # Matplotlib takes a second, which not every command has

    out = folder / "report.html"
    try:
        report(runs, out, films=False)
    except (UsageError, OSError) as error:
        return None, str(error)
    return out, ""
