"""The ways a command can end other than well; `cli` turns each into its exit code and one line."""

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """The request cannot be carried out as it stands: exit code 2."""


class RunStopped(RuntimeError):
    """A run ended early and says why, and which checkpoint is good: exit code 1."""


class TrainingDiverged(RunStopped):
    """A number that is not finite, or a critic beyond all returns: exit code 3."""


class Interrupted(RunStopped):
    """A signal asked the run to stop; if it had begun, it wrote a checkpoint: exit code 130."""


def closest(name: str, known: Iterable[str]) -> str:
    """What a message adds to an unknown name: the known one that is most like it, if any is."""
    found = difflib.get_close_matches(name, known, 1, cutoff=0.5)
    return f"; the closest is {found[0]!r}" if found else ""


def how_to_install(extra: str) -> str:
    """What a message says where the packages of an extra are missing."""
    return (
        f"in the clone of qscore, pip install -e '.[{extra}]' "
        f"(or `uv sync --inexact --extra {extra}`)."
    )
