"""qscore: reinforcement learning with score-based policies, in discrete and in continuous time."""

from qscore import lq as lq
from qscore.algorithms import ALGORITHMS as ALGORITHMS
from qscore.algorithms import CQSM as CQSM
from qscore.algorithms import QSM as QSM
from qscore.algorithms import SAC as SAC
from qscore.algorithms import TD3 as TD3
from qscore.algorithms import Algorithm as Algorithm
from qscore.algorithms import DiffusionQL as DiffusionQL
from qscore.environments import ENVIRONMENTS as ENVIRONMENTS
from qscore.environments import EnvironmentFailure as EnvironmentFailure
from qscore.environments import Host as Host
from qscore.errors import Interrupted as Interrupted
from qscore.errors import RunStopped as RunStopped
from qscore.errors import TrainingDiverged as TrainingDiverged
from qscore.errors import UsageError as UsageError
from qscore.export import export as export
from qscore.folder import Run as Run
from qscore.folder import Settings as Settings
from qscore.playback import evaluate as evaluate
from qscore.playback import load as load
from qscore.run import resume as resume
from qscore.run import train as train
from qscore.types import Spec as Spec
from qscore.types import Transition as Transition
