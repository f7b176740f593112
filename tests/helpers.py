"""What tests share.

One comparison with one table of tolerances, a jit that compiles fast, networks in NumPy, random
critics and batches, critics that are known functions, a training session, and run folders without
training.
"""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax._src import compiler  # no public setting reaches everything that is compiled

import qscore as qs
from qscore.folder import Run, Settings, installed_versions
from qscore.networks import Critic
from qscore.train_host import Session

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
            np.testing.assert_allclose(
                left, right, relative, absolute, equal_nan=False, err_msg=f"{name} {why}"
            )
        else:
            np.testing.assert_array_equal(left, right, err_msg=name)


QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
}
"""Compiler options for programs that run once or twice.

Compiling is most of what a test of a small network costs, and these take most of that away.
"""

QUICK_PROCESS = {
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "XLA_FLAGS": "--xla_cpu_use_fusion_emitters=false",
}
"""The same for a process, by its environment."""


def quick_jit(function: Any, **kwargs: Any) -> Any:
    """`jax.jit`, compiling quickly."""
    return jax.jit(function, compiler_options=QUICK, **kwargs)


@contextlib.contextmanager
def fast_compilation() -> Iterator[None]:
    """The same for everything that is compiled within."""
    usual = compiler.get_compile_options

    def quick(*args: Any, **kwargs: Any) -> Any:
        options = usual(*args, **kwargs)
        options.env_option_overrides = [*options.env_option_overrides, *QUICK.items()]
        return options

    compiler.get_compile_options = quick
    try:
        yield
    finally:
        compiler.get_compile_options = usual


# The networks, in NumPy and float64 ---------------------------------------------------------------


def wide(tree):
    """Every array of a pytree as float64 in host memory."""
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def unstack(critics):
    """The two critics of a stack."""
    return [jax.tree.map(lambda leaf, i=i: leaf[i], wide(critics)) for i in range(2)]


def numpy_mlp(mlp, x, activation):
    """An MLP on rows, and the input of every layer."""
    inputs = []
    for layer in mlp.layers[:-1]:
        inputs.append(x)
        x = activation(x @ layer.weight + layer.bias)
    inputs.append(x)
    return x @ mlp.layers[-1].weight + mlp.layers[-1].bias, inputs


def relu(x):
    return np.maximum(x, 0.0)


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


# value and derivative
ACTIVATIONS = {
    jax.nn.relu: (relu, lambda x: x > 0.0),
    jax.nn.silu: (lambda x: x * sigmoid(x), lambda x: sigmoid(x) * (1.0 + x * sigmoid(-x))),
}


def numpy_q(critic, obs, action):
    activation, _ = ACTIVATIONS[critic.mlp.activation]
    return numpy_mlp(critic.mlp, np.concatenate([obs, action], axis=-1), activation)[0][..., 0]


def numpy_mish(x):
    return x * np.tanh(np.log1p(np.exp(x)))


def numpy_gradient(critic, obs, action):
    """dQ/da of one critic at every row, by back-propagation written out."""
    activation, slope = ACTIVATIONS[critic.mlp.activation]
    _, inputs = numpy_mlp(critic.mlp, np.concatenate([obs, action], axis=-1), activation)
    layers = critic.mlp.layers
    gradient = np.broadcast_to(layers[-1].weight[:, 0], inputs[-1].shape)
    for layer, x in zip(reversed(layers[:-1]), reversed(inputs[:-1]), strict=True):
        gradient = (gradient * slope(x @ layer.weight + layer.bias)) @ layer.weight.T
    return gradient[:, obs.shape[-1] :]


def numpy_denoiser(network, obs, noised, level):
    """The actor's network on rows of one level, as the dense network that it stands for."""
    phase = 2.0 * np.pi * level * network.features.frequencies
    features = np.concatenate([np.cos(phase), np.sin(phase)])
    embedding, _ = numpy_mlp(network.level_mlp, features, numpy_mish)
    inputs = [noised, obs, np.broadcast_to(embedding, (obs.shape[0], embedding.shape[0]))]
    return numpy_mlp(network.mlp, np.concatenate(inputs, axis=-1), numpy_mish)[0]


# Random networks and batches ----------------------------------------------------------------------

HIDDEN = (16, 16)


def perturbed(network, key):
    """The network with noise on every parameter: biases begin at 0, and should count here."""
    leaves, treedef = jax.tree.flatten(network)
    keys = jr.split(key, len(leaves))
    noisy = [leaf + 0.2 * jr.normal(k, leaf.shape) for leaf, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(treedef, noisy)


@functools.partial(jax.jit, static_argnums=0)
def random_critics(spec, key):
    init_key, noise_key = jr.split(key)
    keys = jr.split(init_key, 2)
    critics = jax.vmap(lambda key: Critic(spec.obs_size, spec.action_size, HIDDEN, key=key))(keys)
    return perturbed(critics, noise_key)


@functools.partial(jax.jit, static_argnums=(0, 1))
def random_batch(spec, rows, key):
    obs_key, action_key, reward_key, next_key = jr.split(key, 4)
    return qs.Transition(
        obs=jr.normal(obs_key, (rows, spec.obs_size)),
        action=jr.uniform(action_key, (rows, spec.action_size), minval=-1.0, maxval=1.0),
        reward=jr.normal(reward_key, (rows,)),
        next_obs=jr.normal(next_key, (rows, spec.obs_size)),
        terminated=jnp.arange(rows) % 3 == 0,
        time=jnp.zeros(rows),
        dt=jnp.full(rows, spec.dt),
    )


def random_state(algorithm, spec, names):
    """A fresh state in which the networks of these names are random, all of them different."""
    state = quick_jit(lambda key: algorithm.init(spec, key=key))(jr.key(10))
    networks = {
        name: perturbed(getattr(state, name), key)
        for name, key in zip(names, jr.split(jr.key(11), len(names)), strict=True)
    }
    return dataclasses.replace(state, **networks)


def along(network, gradient, key):
    """A random direction among a network's parameters: the gradient along it, and a function.

    The function takes a loss in NumPy to its central difference quotient along the same direction.
    """
    network = wide(network)
    direction = wide(perturbed(jax.tree.map(jnp.zeros_like, network), key))
    size = sum(np.sum(leaf**2) for leaf in jax.tree.leaves(direction)) ** 0.5
    products = jax.tree.map(lambda g, d: np.sum(g * d) / size, wide(gradient), direction)

    def quotient(loss, step=1e-6):
        ahead, behind = (
            jax.tree.map(lambda p, d, s=s: p + s * d / size, network, direction)
            for s in (step, -step)
        )
        return (loss(ahead) - loss(behind)) / (2.0 * step)

    return sum(jax.tree.leaves(products)), quotient


class Polynomial(eqx.Module):
    """Q(s, a) = p(a - shift s) of a one-dimensional task, in the place of a critic's network."""

    coefficients: jax.Array
    shift: jax.Array

    def __call__(self, x):
        obs, action = x
        return jnp.polyval(self.coefficients, action - self.shift * obs)[None]


def polynomial_critics(coefficients, shift=0.0):
    """A stack of critics Q_i(s, a) = p_i(a - shift s), coefficients from the highest power down."""
    critics = [
        eqx.tree_at(
            lambda critic: critic.mlp,
            Critic(1, 1, (1,), key=jr.key(0)),
            Polynomial(jnp.asarray(each, jnp.float32), jnp.float32(shift)),
        )
        for each in coefficients
    ]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *critics)


# Training -----------------------------------------------------------------------------------------


def learn(environment, algorithm, seed=0, *, steps, eval_episodes=0):
    """The session of one seed after `steps` environment steps."""
    session = Session(algorithm, environment, seed, steps=steps, eval_episodes=eval_episodes)
    while session.env_steps < steps:
        session.advance(steps)
    return session


def write_run(
    folder: Path,
    algorithm=None,
    environment=None,
    *,
    level: float = 0.0,
    every: int = 100,
    done: int | None = None,
    **settings,
) -> Path:
    """A run folder as a run leaves it, whose seed s returns level + steps + s on average."""
    settings = Settings(**{"steps": 400, "seeds": 3, "eval_episodes": 2, **settings})
    algorithm = algorithm or qs.QSM()
    folder.mkdir(parents=True)
    run = Run(
        folder, algorithm, environment or qs.Host("Pendulum-v1"), settings, installed_versions()
    )
    run.save_config()
    with open(folder / "evals.jsonl", "w") as evals, open(folder / "metrics.jsonl", "w") as metrics:
        for step in range(every, (done or settings.total_steps) + 1, every):
            for seed in settings.seed_list:
                mean = level + step + seed
                common = {"seed": seed, "env_steps": step, "seconds": step / 50}
                evals.write(json.dumps({**common, "returns": [mean - 1, mean + 1]}) + "\n")
                row = {**common, "updates": step, "critic_loss": 1.0 / step}
                if not isinstance(algorithm, qs.SAC):
                    row["score_norm"] = 2.0
                metrics.write(json.dumps(row) + "\n")
    return folder
