"""The engine of one machine: so many processes at a time."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from qscore.folder import cores_here
from qscore.sweep.board import Board
from qscore.sweep.process import carry_out
from qscore.sweep.spec import Resources, Sweep, Trial


@contextmanager
def ready(sweep: Sweep) -> Iterator[None]:
    """Raises `UsageError` where this machine cannot do what is asked."""
    if sweep.resources.cores > cores_here():
        sweep.file.refuse(
            ("resources", "cores"),
            f"`cores` is {sweep.resources.cores}; this process may use {cores_here()}.",
        )
    usual = Resources()
    for name in ("share", "gpus", "address"):
        if getattr(sweep.resources, name) != getattr(usual, name):
            sweep.file.refuse(("resources", name), f"`{name}` is for engine = 'ray'.")
    yield


def workers(sweep: Sweep) -> int:
    """How many trials run at a time."""
    return sweep.resources.workers or cores_here() // sweep.resources.cores


def run(sweep: Sweep, todo: Sequence[Trial], board: Board, stopping: Callable[[], bool]) -> None:
    """Do the trials, in their order, as long as not too many have failed."""

    def one(trial: Trial) -> None:
        if stopping() or board.hopeless(sweep.failures.most):
            return
        folder = sweep.out / trial.name
        board.begun(trial.name)
        state, message = carry_out(
            trial.command(folder),
            folder,
            cores=sweep.resources.cores,
            retries=sweep.failures.retries,
            report=lambda evaluation: board.evaluated(trial.name, evaluation),
            stopping=stopping,
        )
        board.ended(trial.name, "interrupted" if state == "stopped" else state, message)

    with ThreadPoolExecutor(workers(sweep)) as pool:
        for _ in pool.map(one, todo):
            pass
