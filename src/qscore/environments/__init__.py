"""The registry of environments: ours by name, everything else by its Gymnasium id."""

from qscore.environments.base import Environment as Environment
from qscore.environments.base import EnvironmentFailure as EnvironmentFailure
from qscore.environments.base import Episodic as Episodic
from qscore.environments.cartpole import CartpoleSDE as CartpoleSDE
from qscore.environments.double_well import DoubleWell as DoubleWell
from qscore.environments.host import Host as Host
from qscore.environments.lq import LQ as LQ
from qscore.environments.pendulum import PendulumSDE as PendulumSDE
from qscore.environments.portfolio import Portfolio as Portfolio

ENVIRONMENTS: dict[str, type] = {
    "cartpole_sde": CartpoleSDE,
    "double_well": DoubleWell,
    "lq": LQ,
    "pendulum_sde": PendulumSDE,
    "portfolio": Portfolio,
}
"""Our own environments. A name that is not here is taken for a Gymnasium id."""


def environment_class(name: str) -> type:
    """The configuration class of an environment name."""
    return ENVIRONMENTS.get(name, Host)
