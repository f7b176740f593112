"""The replaced products of a program: what it computes, and that they are replaced everywhere."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import assert_close

from qscore import CQSM, QSM, SAC, TD3, DiffusionQL, replay
from qscore.bench import matmul_flops
from qscore.products import BLOCK, times, to_bfloat16, with_products
from qscore.types import Spec

SPEC = Spec(obs_size=5, action_size=2, dt=0.05)


def dots(function, *args):
    """The matrix products of a traced program and its inner ones."""
    found = []

    def visit(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                found.append(equation)
            for value in jax.tree.leaves(equation.params, is_leaf=lambda v: hasattr(v, "jaxpr")):
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    visit(inner)

    visit(jax.make_jaxpr(function)(*args).jaxpr)
    return found


def summed_over_rows(function, *args):
    """Shapes of the left sides of the products A' B in a traced program and its inner ones."""
    found = []
    for equation in dots(function, *args):
        (contracting, _), (batch, _) = equation.params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        if len(left) == len(batch) + 2 and contracting[0] == len(left) - 2:
            found.append(left)
    return found


def products(weights, rows):
    """Gradients of products with and without a batch, in a loop, a branch and a nested function."""

    def layer(weight, rows):
        return jnp.tanh(rows @ weight)

    def loss(weights, rows):
        single, stack = weights
        looped, _ = jax.lax.scan(lambda x, _: (layer(single, x), None), rows, None, length=3)
        chosen = jax.lax.cond(rows[0, 0] > 0, layer, lambda w, x: 2.0 * layer(w, x), single, rows)
        stacked = jax.vmap(jax.jit(layer), (0, None))(stack, looped + chosen)
        return jnp.mean(stacked**2)

    return jax.value_and_grad(loss)(weights, rows)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_what_a_program_computes_is_unchanged(sign):
    keys = jr.split(jr.key(0), 3)
    weights = jr.normal(keys[0], (6, 6)), jr.normal(keys[1], (2, 6, 3))
    rows = jr.normal(keys[2], (40, 6)).at[0, 0].set(sign)
    fast = with_products(products)
    assert summed_over_rows(products, weights, rows)
    assert not summed_over_rows(fast, weights, rows)
    assert matmul_flops(fast, weights, rows) == matmul_flops(products, weights, rows)
    expected = jax.tree.map(np.float64, jax.jit(products)(weights, rows))
    for actual, known in zip(
        jax.tree.leaves(jax.jit(fast)(weights, rows)), jax.tree.leaves(expected), strict=True
    ):
        assert_close(actual, known)


def traced_update(algorithm):
    """An algorithm's update and the shapes of its arguments."""
    state = jax.eval_shape(lambda: algorithm.init(SPEC, key=jr.key(0)))
    batch = jax.eval_shape(lambda: replay.empty_rows(SPEC, 32))

    def update(state, batch, key):
        return algorithm.update(state, batch, key=key)

    return update, state, batch, jr.key(0)


@pytest.mark.parametrize("algorithm", [QSM(), SAC(), TD3(), DiffusionQL()], ids=lambda a: type(a))
def test_updates_have_no_slow_product_left(algorithm):
    update, *args = traced_update(algorithm)
    before = summed_over_rows(update, *args)
    after = summed_over_rows(with_products(update), *args)
    assert len(before) > 5
    # gradients of the critics' last layers are products with a vector
    assert all(left[-1] == 1 for left in after)


def halves(function, *args):
    """Of a program's products, those whose two sides are bfloat16, and the others.

    Without those that transpose: of the unit matrix and a matrix's blocks of columns.
    """
    found = dots(with_products(function, "bf16"), *args)
    found = [
        dot
        for dot in found
        if dot.invars[0].aval.shape[-2:] != (BLOCK, BLOCK)
        or dot.outvars[0].aval.dtype != jnp.bfloat16
    ]
    types = [[str(side.aval.dtype) for side in (*dot.invars, *dot.outvars)] for dot in found]
    rounded = [dot for dot, each in zip(found, types, strict=True) if "bfloat16" in each]
    assert all(each[:2] == ["bfloat16"] * 2 for each in types if "bfloat16" in each)
    assert all(each[2] == "float32" for each in types)  # sums are not rounded
    return rounded, [dot for dot in found if dot not in rounded]


@pytest.mark.parametrize(
    "algorithm", [QSM(), SAC(), TD3(), DiffusionQL(), CQSM()], ids=lambda a: type(a)
)
def test_in_bf16_every_product_of_a_layer_is_rounded(algorithm):
    update, *args = traced_update(algorithm)
    rounded, others = halves(update, *args)
    assert len(rounded) > 10
    sizes = [side.aval.shape for dot in others for side in dot.invars]
    assert all(256 not in shape for shape in sizes)  # the layers' width


def test_in_bf16_least_squares_are_not_rounded():
    update, *args = traced_update(CQSM(preset="linear_quadratic"))
    rounded, others = halves(update, *args)
    assert not rounded and others


def test_rounding_is_that_of_bfloat16():
    rng = np.random.default_rng(0)
    bits = rng.integers(2**32, size=300_000, dtype=np.uint32)
    tie, most = np.uint32(0x8000), np.uint32(0xFFFFFFFF)
    middle = (bits[:1000] >> 16 << 16) | tie  # as near to one as to the other
    edges = np.array([0, tie, tie + 1, 0x7F7FFFFF, 0x7F800000, 0x7F800001, most, most >> 1])
    x = np.concatenate([bits, middle, edges.astype(np.uint32)]).view(np.float32)
    with np.errstate(invalid="ignore"):
        expected = x.astype(jnp.bfloat16)
    found = np.asarray(jax.jit(to_bfloat16)(x))
    numbers = ~np.isnan(x)
    assert np.array_equal(np.isnan(found.astype(np.float32)), ~numbers)
    assert np.array_equal(found[numbers].view(np.uint16), expected[numbers].view(np.uint16))


@pytest.mark.parametrize("size", [7, BLOCK])
def test_bf16_rounds_both_sides_and_sums_in_float32(size):
    """Value and gradients of sum(x W * c), against products of rounded numbers in float64."""
    keys = jr.split(jr.key(0), 3)
    x, w = jr.normal(keys[0], (300, size)), jr.normal(keys[1], (size, 5))
    c = jr.normal(keys[2], (300, 5))

    def both(x, w, c):
        y, back = jax.vjp(times, x, w)
        return y, *back(c)

    def rounded(array):
        return np.asarray(array.astype(jnp.bfloat16), np.float64)

    known = rounded(x) @ rounded(w), rounded(c) @ rounded(w).T, rounded(x).T @ rounded(c)
    exact = jax.jit(with_products(both))(x, w, c)
    for half, full, expected in zip(
        jax.jit(with_products(both, "bf16"))(x, w, c), exact, known, strict=True
    ):
        assert half.dtype == jnp.float32
        assert_close(half, expected)
        assert 1e-4 < np.max(np.abs(half - full)) / np.max(np.abs(full)) < 1e-1


def test_in_bf16_gradients_of_stacked_layers_are_those_of_each():
    keys = jr.split(jr.key(0), 3)
    x, w = jr.normal(keys[0], (40, 2 * BLOCK)), jr.normal(keys[1], (3, 2 * BLOCK, 6))
    c = jr.normal(keys[2], (3, 40, 6))

    def gradient(x, w, c):
        return jax.vjp(times, x, w)[1](c)[1]

    together = jax.jit(with_products(jax.vmap(gradient, (None, 0, 0)), "bf16"))(x, w, c)
    one = jax.jit(with_products(gradient, "bf16"))
    assert_close(together, np.stack([one(x, w[i], c[i]) for i in range(3)]))
    left, right = (np.asarray(side.astype(jnp.bfloat16), np.float64) for side in (x, c))
    assert_close(together, left.T @ right)
