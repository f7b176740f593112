"""The replaced products of a program: what it computes, and that they are replaced everywhere."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import assert_close

from qscore import QSM, SAC, TD3, DiffusionQL, replay
from qscore.bench import matmul_flops
from qscore.products import with_fast_products
from qscore.types import Spec

SPEC = Spec(obs_size=5, action_size=2, dt=0.05)


def summed_over_rows(function, *args):
    """Shapes of the left sides of the products A' B in a traced program and its inner ones."""
    found = []

    def visit(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                (contracting, _), (batch, _) = equation.params["dimension_numbers"]
                left = equation.invars[0].aval.shape
                if len(left) == len(batch) + 2 and contracting[0] == len(left) - 2:
                    found.append(left)
            for value in jax.tree.leaves(equation.params, is_leaf=lambda v: hasattr(v, "jaxpr")):
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    visit(inner)

    visit(jax.make_jaxpr(function)(*args).jaxpr)
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
    fast = with_fast_products(products)
    assert summed_over_rows(products, weights, rows)
    assert not summed_over_rows(fast, weights, rows)
    assert matmul_flops(fast, weights, rows) == matmul_flops(products, weights, rows)
    expected = jax.tree.map(np.float64, jax.jit(products)(weights, rows))
    for actual, known in zip(
        jax.tree.leaves(jax.jit(fast)(weights, rows)), jax.tree.leaves(expected), strict=True
    ):
        assert_close(actual, known)


@pytest.mark.parametrize("algorithm", [QSM(), SAC(), TD3(), DiffusionQL()], ids=lambda a: type(a))
def test_updates_have_no_slow_product_left(algorithm):
    state = jax.eval_shape(lambda: algorithm.init(SPEC, key=jr.key(0)))
    batch = jax.eval_shape(lambda: replay.empty_rows(SPEC, 32))

    def update(state, batch, key):
        return algorithm.update(state, batch, key=key)

    before = summed_over_rows(update, state, batch, jr.key(0))
    after = summed_over_rows(with_fast_products(update), state, batch, jr.key(0))
    assert len(before) > 5
    # gradients of the critics' last layers are products with a vector
    assert all(left[-1] == 1 for left in after)
