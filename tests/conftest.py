"""The house runs strict: no silent dtype promotion, no silent broadcasting, no screen."""

import functools
import gc
import os

os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame draws classic-control tasks off screen
if "PYTEST_XDIST_WORKER" in os.environ:  # there is one per core: more threads are in their way
    os.environ.setdefault("PJRT_NPROC", "1")

import jax
import optax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def _lenient(make):
    """An Optax optimiser whose own arithmetic is exempt from strict promotion.

    Optax raises Python floats to integer counts. Strictness is for our arithmetic, not for its.
    """

    @functools.wraps(make)
    def made(*args, **kwargs):
        optimizer = make(*args, **kwargs)

        def update(*args, **kwargs):
            with jax.numpy_dtype_promotion("standard"):
                return optimizer.update(*args, **kwargs)

        return optax.GradientTransformation(optimizer.init, update)

    return made


# before the package is imported, so that it sees these whichever way it imports Optax
for _name in ("adam", "adamw"):
    setattr(optax, _name, _lenient(getattr(optax, _name)))


def pytest_collection_modifyitems(items):
    """Sweeps first: they mostly wait for other processes, and the other workers fill the time."""
    items.sort(key=lambda item: item.path.stem != "test_sweep")


def pytest_collection_finish():
    """What is imported by now stays, so no garbage collection need go through it again."""
    gc.freeze()


@pytest.fixture(scope="module")
def quick_programs():
    """For modules that try out the machinery about an algorithm: compiled in half the time."""
    from helpers import fast_compilation  # with which comes the package

    with fast_compilation():
        yield


@pytest.fixture(autouse=True, scope="module")
def _programs_are_given_back():
    """A module's compiled programs are freed after it.

    Each holds some tens of memory mappings and Linux grants a process 65,530 (`vm.max_map_count`);
    the compiler dies of a segmentation fault where it is refused one.
    """
    yield
    jax.clear_caches()
    gc.collect()
