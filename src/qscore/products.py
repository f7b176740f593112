"""How the matrix products of a program are computed: one place for every algorithm.

`with_products` takes a function of arrays and returns one that computes the same, up to rounding:
it is traced, and in the traced program every product is replaced, those of gradients among them.
Losses need not know, and networks only say which products are theirs, by `times`.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, jaxpr_as_fun
from jax.extend.core.primitives import dot_general_p
from jaxtyping import Array, BFloat16, Float

from qscore.types import AnyArray

Precision = Literal["f32", "bf16"]
"""Of the numbers that are multiplied; they are always summed in float32."""

BLOCK = 32
"""Columns of a matrix of bfloat16 that are transposed together; of 8, 16 and 32 the fastest."""

LAYER = jax.lax.Precision.DEFAULT


def times(x: Float[AnyArray, "*rows in"], weight: Float[AnyArray, "in out"]) -> Array:
    """x W of a network's layer: the products that may be rounded, and so may their gradients'.

    They are told by a precision that is named, though it is the usual one: JAX hands it on to the
    products of derivatives.
    """
    return jnp.matmul(x, weight, precision=LAYER)


def with_products(function: Callable[..., Any], precision: Precision = "f32") -> Callable[..., Any]:
    """`function` of arrays, with its matrix products taken at `precision`.

    With `bf16` both sides of a network's products, of gradients too, are rounded to bfloat16 (8
    significant bits) before they are multiplied. Sums are float32. Other products are as they were:
    of least squares, or of a noise's covariance.

    On CPUs each product A' B is taken of an A' that is made beforehand. Weights' gradients are such
    products: A holds a layer's inputs, B what is propagated back, a row each per example. Of XLA's
    two libraries of products the faster one takes none whose left side is summed over its rows.
    """
    if precision == "f32" and jax.default_backend() != "cpu":
        return function
    product = functools.partial(_product, precision=precision)

    @functools.wraps(function)  # the compiled program has its name
    def replaced(*args: Any) -> Any:
        program, shape = jax.make_jaxpr(function, return_shape=True)(*args)
        outputs = jaxpr_as_fun(_replaced(program, product))(*jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shape), outputs)

    return replaced


def to_bfloat16(x: Float[AnyArray, "*shape"]) -> Array:
    """x in bfloat16, to the nearest, and of two as near to the even one, as `astype` rounds.

    On CPUs by the bits, of which bfloat16 has the upper half: XLA's conversion takes one number at
    a time there, and so would everything that is computed in the same loop.
    """
    if jax.default_backend() != "cpu":
        return jnp.asarray(x, jnp.bfloat16)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    last = (bits >> 16) & jnp.uint32(1)  # of the bits that stay
    upper = (bits + jnp.uint32(0x7FFF) + last) >> 16
    upper = jnp.where(jnp.isnan(x), jnp.uint32(0x7FC0), upper)  # which the sum may have carried on
    return jax.lax.bitcast_convert_type(upper.astype(jnp.uint16), jnp.bfloat16)


def _product(left: AnyArray, right: AnyArray, *, equation: JaxprEqn, precision: str) -> AnyArray:
    """What stands for an equation `lax.dot_general`.

    On CPUs A' B becomes (B' A)' with a B' made beforehand: JAX asks for a weight's gradient as the
    propagated rows times the layer's inputs, and takes the transpose of it; this way both
    transposes of the result cancel.
    """
    params = equation.params
    (contracting, right_contracting), (batch, right_batch) = params["dimension_numbers"]
    lead = len(batch)
    if precision == "bf16" and params["precision"] == (LAYER, LAYER):
        params = params | {"preferred_element_type": left.dtype}
        left, right = to_bfloat16(left), to_bfloat16(right)
    if not (
        jax.default_backend() == "cpu"
        and left.ndim == right.ndim == lead + 2
        and left.shape[-1] > 1  # a vector is no product of matrices
        and tuple(batch) == tuple(right_batch) == tuple(range(lead))
        and tuple(contracting) == tuple(right_contracting) == (lead,)
    ):
        return dot_general_p.bind(left, right, **params)
    if right.dtype == jnp.bfloat16:
        right = _turned_bfloat16(right)
    else:
        # behind a barrier, or XLA would make one operation of the transpose and the product again
        right = jax.lax.optimization_barrier(jnp.swapaxes(right, -1, -2))
    params = params | {"dimension_numbers": (((lead + 1,), (lead,)), (batch, batch))}
    return jnp.swapaxes(dot_general_p.bind(right, left, **params), -1, -2)


def _turned_bfloat16(x: BFloat16[AnyArray, "*batch rows columns"]) -> BFloat16[Array, "..."]:
    """The transpose of each matrix, `[*batch, columns, rows]`, stored by rows.

    XLA rounds and transposes in one loop, one number at a time, which takes as long as the product
    that it is for. A product with the unit matrix transposes faster, and exactly: blocks of columns
    are rounded where they are contiguous, and a block's product sums a number and zeros. (If the
    number is infinite, its block becomes NaN.)
    """
    *batch, rows, columns = x.shape
    if columns % BLOCK:
        # flat: XLA stores a transpose by columns, and multiplies bfloat16 only if stored by rows
        flat = jax.lax.optimization_barrier(jnp.swapaxes(x, -1, -2).ravel())
        return flat.reshape(*batch, columns, rows)
    blocks = jnp.swapaxes(x.reshape(-1, rows, columns // BLOCK, BLOCK), 1, 2)
    blocks = jax.lax.optimization_barrier(blocks.ravel()).reshape(-1, rows, BLOCK)
    unit = jnp.broadcast_to(jnp.eye(BLOCK, dtype=x.dtype), (len(blocks), BLOCK, BLOCK))
    turned = jax.lax.dot_general(
        unit, blocks, (((2,), (2,)), ((0,), (0,))), preferred_element_type=x.dtype
    )
    return turned.reshape(*batch, columns, rows)


def _replaced(value: Any, product: Callable[..., Any]) -> Any:
    """A program, or any other parameter of an operation, with the products in it replaced."""
    if isinstance(value, ClosedJaxpr):
        return value.replace(jaxpr=_replaced(value.jaxpr, product))
    if isinstance(value, Jaxpr):
        return value.replace(eqns=[new for old in value.eqns for new in _replacement(old, product)])
    if type(value) is tuple:  # the branches of a condition
        return tuple(_replaced(item, product) for item in value)
    return value


def _replacement(equation: JaxprEqn, product: Callable[..., Any]) -> list[JaxprEqn]:
    """The equations that stand for one equation of a program."""
    if equation.primitive is not dot_general_p:
        params = {name: _replaced(value, product) for name, value in equation.params.items()}
        return [equation.replace(params=params)]
    sides = [atom.aval for atom in equation.invars]
    body = jax.make_jaxpr(lambda *sides: product(*sides, equation=equation))(*sides).jaxpr
    ends = zip([*body.invars, *body.outvars], [*equation.invars, *equation.outvars], strict=True)
    place = {id(inner): outer for inner, outer in ends}
    return [
        inner.replace(
            invars=[place.get(id(atom), atom) for atom in inner.invars],
            outvars=[place.get(id(variable), variable) for variable in inner.outvars],
        )
        for inner in body.eqns
    ]
