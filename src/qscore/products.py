"""How the matrix products of a program are computed: one place for every algorithm.

`with_fast_products` takes a function of arrays and returns one that computes the same: it is
traced, and in the traced program every product is replaced, those of gradients among them. Networks
and losses need not know.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, jaxpr_as_fun
from jax.extend.core.primitives import dot_general_p

from qscore.types import AnyArray


def with_fast_products(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of arrays, with each product A' B taken of an A' that is made beforehand.

    Weights' gradients are such products: A holds a layer's inputs, B what is propagated back, a row
    each per example. Of XLA's two libraries of products on CPUs the faster one takes none whose
    left side is summed over its rows. The results are the same but for rounding.
    """

    def replaced(*args: Any) -> Any:
        program, shape = jax.make_jaxpr(function, return_shape=True)(*args)
        outputs = jaxpr_as_fun(_replaced(program))(*jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shape), outputs)

    return replaced


def _product(left: AnyArray, right: AnyArray, *, dimension_numbers: Any, **params: Any) -> AnyArray:
    """`lax.dot_general`; where it is A' B, as (B' A)' with a B' made beforehand.

    JAX asks for a weight's gradient as the propagated rows times the layer's inputs, and takes the
    transpose of it: this way both transposes of the result cancel.
    """
    (contracting, right_contracting), (batch, right_batch) = dimension_numbers
    lead = len(batch)
    if not (
        left.ndim == right.ndim == lead + 2
        and tuple(batch) == tuple(right_batch) == tuple(range(lead))
        and tuple(contracting) == tuple(right_contracting) == (lead,)
        and left.shape[-1] > 1  # a vector is no product of matrices
    ):
        return dot_general_p.bind(left, right, dimension_numbers=dimension_numbers, **params)
    # behind a barrier, or XLA would make one operation of the transpose and the product again
    right = jax.lax.optimization_barrier(jnp.swapaxes(right, -1, -2))
    numbers = (((lead + 1,), (lead,)), (batch, batch))
    product = dot_general_p.bind(right, left, dimension_numbers=numbers, **params)
    return jnp.swapaxes(product, -1, -2)


def _replaced(value: Any) -> Any:
    """A program, or any other parameter of an operation, with the products in it replaced."""
    if isinstance(value, ClosedJaxpr):
        return value.replace(jaxpr=_replaced(value.jaxpr))
    if isinstance(value, Jaxpr):
        return value.replace(eqns=[new for old in value.eqns for new in _replacement(old)])
    if type(value) is tuple:  # the branches of a condition
        return tuple(_replaced(item) for item in value)
    return value


def _replacement(equation: JaxprEqn) -> list[JaxprEqn]:
    """The equations that stand for one equation of a program."""
    if equation.primitive is not dot_general_p:
        params = {name: _replaced(value) for name, value in equation.params.items()}
        return [equation.replace(params=params)]
    sides = [atom.aval for atom in equation.invars]
    body = jax.make_jaxpr(lambda *sides: _product(*sides, **equation.params))(*sides).jaxpr
    ends = zip([*body.invars, *body.outvars], [*equation.invars, *equation.outvars], strict=True)
    place = {id(inner): outer for inner, outer in ends}
    return [
        inner.replace(
            invars=[place.get(id(atom), atom) for atom in inner.invars],
            outvars=[place.get(id(variable), variable) for variable in inner.outvars],
        )
        for inner in body.eqns
    ]
