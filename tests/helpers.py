"""What tests share: one comparison with one table of tolerances, and a jit that compiles fast."""

from typing import Any

import jax
import numpy as np

TOLERANCES = {
    # (relative, absolute): a few dozen roundings of numbers of order one
    np.dtype(np.float32): (1e-5, 1e-6),
    np.dtype(np.float64): (1e-11, 1e-12),
}


def assert_close(actual: Any, expected: Any, *, loosen: float = 1.0, why: str = "") -> None:
    """Every leaf of `actual` equals that of `expected`, to the tolerance of the coarser of the two.

    Shapes must be equal; nothing is broadcast. Integers and booleans must be equal exactly.
    `loosen` multiplies the tolerance, and `why` then has to say what the test pays it for.
    """
    if loosen != 1.0 and not why:
        raise ValueError(f"`loosen` is {loosen}; `why` must say what for.")
    actual_leaves, actual_tree = jax.tree_util.tree_flatten_with_path(actual)
    expected_leaves, expected_tree = jax.tree_util.tree_flatten_with_path(expected)
    assert actual_tree == expected_tree, f"{actual_tree} is not {expected_tree}"
    for (path, left), (_, right) in zip(actual_leaves, expected_leaves, strict=True):
        left, right = np.asarray(left), np.asarray(right)
        name = jax.tree_util.keystr(path) or "value"
        assert left.shape == right.shape, f"{name} has shape {left.shape}, not {right.shape}"
        floating = [x.dtype for x in (left, right) if np.issubdtype(x.dtype, np.floating)]
        if floating:
            relative, absolute = TOLERANCES[min(floating, key=lambda dtype: dtype.itemsize)]
            relative, absolute = loosen * relative, loosen * absolute
            np.testing.assert_allclose(left, right, relative, absolute, err_msg=f"{name} {why}")
        else:
            np.testing.assert_array_equal(left, right, err_msg=name)


def quick_jit(function: Any, **kwargs: Any) -> Any:
    """`jax.jit` without the back end's optimisations, for programs that run once or twice.

    Compiling is most of what a test of a small network costs, and this halves it.
    """
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0}, **kwargs)
