"""The two moves every algorithm makes: a gradient step, and a target that follows."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import optax
from jaxtyping import Array, Float

from qscore.types import Metrics

Network = TypeVar("Network")


def gradient_step(
    loss: Callable[..., tuple[Any, Metrics]],
    network: Network,
    optimizer: optax.GradientTransformation,
    opt_state: optax.OptState,
    *args: Any,
    **kwargs: Any,
) -> tuple[Network, optax.OptState, Metrics]:
    """One optimiser step on `loss(network, *args, **kwargs) -> (scalar, metrics)`.

    Returns the stepped network, the optimiser's next state and the loss's metrics.
    """
    gradient, metrics = jax.grad(loss, has_aux=True)(network, *args, **kwargs)
    updates, opt_state = optimizer.update(gradient, opt_state, network)  # pyright: ignore[reportArgumentType]
    return optax.apply_updates(network, updates), opt_state, metrics  # pyright: ignore


def move_target(network: Network, target: Network, rate: float | Float[Array, ""]) -> Network:
    """`rate * network + (1 - rate) * target`: `rate` is the weight on the **new** parameters."""
    return optax.incremental_update(network, target, rate)  # pyright: ignore
