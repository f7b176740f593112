"""The registry of environments: ours by name, everything else by its Gymnasium id."""

from qscore.environments.base import Environment as Environment
from qscore.environments.base import EnvironmentFailure as EnvironmentFailure
from qscore.environments.base import Episodic as Episodic
from qscore.environments.host import Host as Host

ENVIRONMENTS: dict[str, type] = {}
"""Our own environments. A name that is not here is taken for a Gymnasium id."""


def environment_class(name: str) -> type:
    """The configuration class of an environment name."""
    return ENVIRONMENTS.get(name, Host)
