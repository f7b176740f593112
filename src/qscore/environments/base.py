"""What every environment is to the loops, and the errors environments raise."""

from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from qscore.types import Spec


class EnvironmentFailure(RuntimeError):
    """The environment itself raised, or returned something that is not a number."""


class Step(NamedTuple):
    """One step of one environment, in host memory.

    `next_obs` is the observation before any reset; `truncated` is a time limit, never a death; `dt`
    is the step's duration in seconds.
    """

    next_obs: np.ndarray
    reward: float
    terminated: bool
    truncated: bool
    dt: float


@runtime_checkable
class Episodic(Protocol):
    """One running environment: an episode begins with a seed, and actions lie in [-1, 1].

    The seed and the actions since then determine the episode, so the two restore it.
    """

    spec: Spec
    action_bounds: tuple[np.ndarray, np.ndarray]
    """The environment's own bounds, that -1 and 1 stand for."""

    def reset(self, seed: int) -> np.ndarray:
        """Begin the episode that belongs to `seed`; its first observation."""
        ...

    def step(self, action: np.ndarray) -> Step:
        """Advance by one control step."""
        ...

    def render(self) -> np.ndarray:
        """The current frame, `uint8[height, width, 3]`."""
        ...

    def close(self) -> None:
        """Free what the environment holds."""
        ...


@runtime_checkable
class Environment(Protocol):
    """A frozen, JSON-able description of an environment, as the command line makes it."""

    @property
    def id(self) -> str:
        """The name that the command line and run folders know it by."""
        ...

    @property
    def num_envs(self) -> int:
        """Copies that collect experience side by side."""
        ...

    def open(self, *, render: bool = False) -> Episodic:
        """Start one copy. Raises `ValueError` where the description asks for the impossible."""
        ...
