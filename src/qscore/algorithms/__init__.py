"""The registry of algorithms: one line each."""

from qscore.algorithms.base import Algorithm as Algorithm
from qscore.algorithms.cqsm import CQSM as CQSM
from qscore.algorithms.diffusion_ql import DiffusionQL as DiffusionQL
from qscore.algorithms.qsm import QSM as QSM
from qscore.algorithms.sac import SAC as SAC
from qscore.algorithms.td3 import TD3 as TD3

ALGORITHMS: dict[str, type] = {
    "qsm": QSM,
    "cqsm": CQSM,
    "sac": SAC,
    "td3": TD3,
    "diffusion_ql": DiffusionQL,
}


def algorithm_name(algorithm: Algorithm) -> str:
    """The registered name of an algorithm instance. Raises `ValueError` where there is none."""
    for name, kind in ALGORITHMS.items():
        if type(algorithm) is kind:
            return name
    raise ValueError(
        f"`algorithm` is a {type(algorithm).__name__}, which is not registered; qscore.ALGORITHMS "
        f"has {', '.join(ALGORITHMS)}."
    )
