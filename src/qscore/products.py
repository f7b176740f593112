"""How the matrix products of a program are computed, decided in one place for every algorithm.

`with_fast_products` takes a function of arrays and returns one that computes the same: it is
traced, and in the traced program every matrix product, those of gradients among them, is replaced.
Networks and losses need not know.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, jaxpr_as_fun
from jax.extend.core.primitives import dot_general_p

from qscore.types import AnyArray


def with_fast_products(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, computing each product A' B from an A that is transposed beforehand.

    A weight's gradient is such a product: A holds a layer's inputs, B what is propagated back, a
    row each per example. Of XLA's two libraries of matrix products on CPUs the faster one takes
    none whose left side is summed over its rows; the transposition costs a third of what it gains.
    """

    def computed(*args: Any) -> Any:
        program, shape = jax.make_jaxpr(function, return_shape=True)(*args)
        outputs = jaxpr_as_fun(_rewritten(program))(*jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shape), outputs)

    return computed


def _product(left: AnyArray, right: AnyArray, *, dimension_numbers: Any, **params: Any) -> AnyArray:
    """`lax.dot_general`; where it is A' B, with the narrower of both sides transposed beforehand."""
    (contracting, right_contracting), (batch, right_batch) = dimension_numbers
    lead = len(batch)
    if not (
        left.ndim == right.ndim == lead + 2
        and batch == right_batch == tuple(range(lead))
        and contracting == right_contracting == (lead,)
    ):
        return dot_general_p.bind(left, right, dimension_numbers=dimension_numbers, **params)
    numbers = (((lead + 1,), (lead,)), (batch, batch))
    if left.shape[-1] < right.shape[-1]:
        return dot_general_p.bind(_transposed(left), right, dimension_numbers=numbers, **params)
    # JAX asks for a weight's gradient with its axes exchanged, and exchanges them afterwards
    product = dot_general_p.bind(_transposed(right), left, dimension_numbers=numbers, **params)
    return jnp.swapaxes(product, -1, -2)


def _transposed(matrix: AnyArray) -> AnyArray:
    """A transposed copy. XLA would make one operation of it and what comes before or after."""
    barrier = jax.lax.optimization_barrier
    return barrier(jnp.swapaxes(barrier(matrix), -1, -2))


def _rewritten(value: Any) -> Any:
    """A program, or whatever else an operation has for a parameter, with its products replaced."""
    if isinstance(value, ClosedJaxpr):
        return value.replace(jaxpr=_rewritten(value.jaxpr))
    if isinstance(value, Jaxpr):
        equations = [new for old in value.eqns for new in _replacement(old)]
        return value.replace(eqns=equations)
    if type(value) is tuple:
        return tuple(_rewritten(item) for item in value)
    return value


def _replacement(equation: JaxprEqn) -> list[JaxprEqn]:
    """The equations that stand for one equation of a program."""
    if equation.primitive is not dot_general_p:
        params = {name: _rewritten(value) for name, value in equation.params.items()}
        return [equation.replace(params=params)]
    arguments = [atom.aval for atom in equation.invars]
    body = jax.make_jaxpr(lambda *sides: _product(*sides, **equation.params))(*arguments).jaxpr
    place = dict(zip([*body.invars, *body.outvars], [*equation.invars, *equation.outvars]))
    return [
        inner.replace(
            invars=[place.get(atom, atom) for atom in inner.invars],
            outvars=[place.get(variable, variable) for variable in inner.outvars],
        )
        for inner in body.eqns
    ]
