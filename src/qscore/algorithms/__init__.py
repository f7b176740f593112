"""The registry of algorithms: one line each."""

from qscore.algorithms.base import Algorithm as Algorithm
from qscore.algorithms.cqsm import CQSM as CQSM
from qscore.algorithms.qsm import QSM as QSM

ALGORITHMS: dict[str, type] = {
    "qsm": QSM,
    "cqsm": CQSM,
}


def algorithm_name(algorithm: Algorithm) -> str:
    """The registered name of an algorithm instance."""
    return next(name for name, kind in ALGORITHMS.items() if type(algorithm) is kind)
