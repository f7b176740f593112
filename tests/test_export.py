"""Exported policies: NumPy code that acts as the original does, and a card that says so."""

import json
import re
import subprocess
import sys

import gymnasium as gym
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import assert_close

import qscore as qs
from qscore import cli
from qscore.environments import LQ
from qscore.folder import Run
from qscore.numpy_code import evaluate, translate

pytestmark = pytest.mark.usefixtures("quick_programs")
SMALL = {"hidden": (8, 8), "batch_size": 8, "warmup_steps": 60}


def run_code(code, inputs, draws=()):
    """What translated code returns."""
    names = ", ".join(name for name, _ in inputs)
    body = "".join(f"    {line}\n" for line in code.lines)
    text = f"def f({names}, draws, c):\n{body}    return [{', '.join(code.outputs)}]\n"
    scope = {"np": np}
    exec(text, scope)
    values = [value for _, value in inputs]
    return scope["f"](*values, draws, code.constants)  # pyright: ignore


def shapes(inputs):
    return [(name, jax.ShapeDtypeStruct(v.shape, v.dtype)) for name, v in inputs]


X = np.linspace(-2.0, 2.0, 6, dtype=np.float32)
TABLE = np.arange(12.0, dtype=np.float32).reshape(3, 4)
FUNCTIONS = {
    "arithmetic": lambda x, k: ((x + 2.0) * x - 1.0) / (x**2 + 1.0) - x**3,
    "angles": lambda x, k: jnp.arccos(jnp.clip(x, -1.0, 1.0)),
    "elementary": lambda x, k: jnp.exp(-jnp.abs(x)) + jnp.sin(x) * jnp.tanh(x) + jnp.log1p(x * x),
    "activations": lambda x, k: jax.nn.silu(x) + jax.nn.relu(x) + jax.nn.softplus(x),
    "choices": lambda x, k: jnp.where(x > 0.5, x, jnp.clip(x, -1.0, 0.25)) + jnp.sign(x),
    "roots": lambda x, k: jax.lax.rsqrt(x * x + 1.0) + jnp.sqrt(jnp.abs(x)),
    "products": lambda x, k: (TABLE @ x[:4]) @ TABLE + x[:3] @ TABLE,
    "matrices": lambda x, k: (x.reshape(2, 3) @ TABLE).T @ x.reshape(2, 3),
    "shapes": lambda x, k: jnp.concatenate([x[None].T, x[::-1, None]], axis=1)[1:5:2].ravel(),
    "sums": lambda x, k: jnp.sum(x.reshape(2, 3), axis=0) * jnp.max(x) + jnp.min(x),
    "loop": lambda x, k: jax.lax.scan(
        lambda c, row: (jnp.tanh(c + row), c * row), x[:4], jnp.asarray(TABLE), reverse=True
    ),
    "places": lambda x, k: jax.grad(lambda x: jnp.sum(jnp.outer(x, x)[jnp.triu_indices(6)] ** 2))(
        x
    ),
    "tables": lambda x, k: jnp.cumsum(jnp.arange(6.0)) * x + jnp.roll(jnp.arange(6.0), 2),
    "noise": lambda x, k: x + 0.1 * jr.normal(jr.split(k)[1], (6,)),
    "unwanted noise": lambda x, k: x + 0.0 * jr.normal(k, (6,)),
    "noise in a loop": lambda x, k: jax.lax.fori_loop(
        0, 3, lambda i, x: x + jr.normal(jr.fold_in(k, i), (6,)), x
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_code_computes_what_jax_computes(name):
    def function(x, key):
        return jax.tree.leaves(FUNCTIONS[name](x, key))

    inputs, key = [("x", X)], jr.key(3)
    code = translate(function, shapes(inputs), key=key)
    expected, drawn = evaluate(function, [X], key=key)
    assert_close(expected, [np.asarray(leaf) for leaf in function(X, key)])  # the same draws
    found = run_code(code, inputs, [drawn[place] for place in code.kept])
    assert_close(
        [np.asarray(value, np.float32) for value in found], expected, loosen=3, why="another order"
    )
    assert len(code.draws) == (name in ("noise",)) + 3 * (name == "noise in a loop")


def test_what_is_known_is_not_in_the_code():
    def function(x, key):
        return [jnp.linalg.norm(jnp.asarray(TABLE)) * x, x + 1.0][:1]

    code = translate(function, shapes([("x", X)]), key=jr.key(0))
    assert len(code.lines) == 1 and code.constants == []


def test_an_operation_without_a_line_is_refused_by_name():
    for function, name in (
        (lambda x, key: [jnp.sort(x)], "`sort`"),
        (lambda x, key: [jnp.asarray(X).at[jnp.arange(6)].set(x)], "`scatter`"),
        (lambda x, key: list(jax.lax.top_k(x, 2)), "`top_k`"),
        (lambda x, key: [jr.uniform(key, (6,)) + x], "not standard normal"),
        (lambda x, key: [jr.key_data(key)], "`random_unwrap` of a random key"),
        (lambda x, key: [x, jr.split(key)], "returns a random key"),
    ):
        with pytest.raises(ValueError, match=name):
            translate(function, shapes([("x", X)]), key=jr.key(0))


POLICIES = {
    "qsm": (qs.QSM(**SMALL), "Pendulum-v1", 0),
    "qsm official": (qs.QSM(preset="official", **SMALL), "Pendulum-v1", 1),
    "qsm standardised": (
        qs.QSM(normalize_observations=True, noise_levels=7, **SMALL),
        "InvertedPendulum-v5",
        0,
    ),
    "diffusion_ql": (qs.DiffusionQL(**SMALL), "Pendulum-v1", 1),
    "sac": (qs.SAC(**SMALL), "Pendulum-v1", 0),
    "td3": (qs.TD3(preset="offline", **SMALL), "Pendulum-v1", 0),
    "cqsm": (qs.CQSM(**SMALL), "Pendulum-v1", 0),
    "cqsm features": (
        qs.CQSM(preset="linear_quadratic", warmup_steps=128, batch_size=64),
        LQ("lq"),
        0,
    ),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Run folders, made as they are asked for."""
    folder = tmp_path_factory.mktemp("runs")

    def make(name):
        algorithm, environment, _ = POLICIES[name]
        if not (folder / name).exists():
            steps = 12_800 if name == "cqsm features" else 120
            qs.train(
                algorithm,
                environment,
                steps=steps,
                seeds=2,
                out=folder / name,
                eval_episodes=2,
                eval_every=steps,
                progress=False,
            )
        return folder / name

    return make


@pytest.mark.slow
@pytest.mark.parametrize("name", POLICIES)
def test_an_exported_policy_acts_as_the_original_without_jax(name, trained, tmp_path):
    folder, draws = trained(name), POLICIES[name][2]
    measured = qs.export(folder, tmp_path / "policy", seed=1)
    assert measured["max_difference"] < 1e-5 and measured["latency_milliseconds"] > 0
    # a deterministic policy, held against the loaded one along an episode's first steps
    policy = qs.load(folder, seed=1)
    spec = policy._policy.spec
    rows = np.random.default_rng(0).normal(size=(20, spec.obs_size)).astype(np.float32)
    np.save(tmp_path / "rows.npy", rows)
    script = (
        "import sys, numpy as np\n"
        "from policy import DRAWS, Policy\n"
        "policy = Policy(seed=0)\n"
        "carry, actions = policy.init_carry(), []\n"
        "for row in np.load('../rows.npy'):\n"
        "    action, carry = policy(row, carry)\n"
        "    actions.append(action)\n"
        "assert not [name for name in sys.modules if name.split('.')[0] in ('jax', 'qscore')]\n"
        "np.save('../actions.npy', np.array(actions))\n"
        "print(len(DRAWS))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path / "policy", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == draws
    found = np.load(tmp_path / "actions.npy")
    low, high = policy._low, policy._high
    assert found.shape == (20, spec.action_size) and (found >= low).all() and (found <= high).all()
    if not draws:
        carry = policy.init_carry()
        for row, action in zip(rows, found, strict=True):
            expected, carry = policy(row, carry, key=jr.key(0))
            np.testing.assert_allclose(action, expected, atol=1e-5 * float(np.max(high - low)))


@pytest.mark.slow
def test_the_card_says_what_the_run_was(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    folder = trained("sac")
    cli.main(["export", str(folder), "--to", str(tmp_path / "out"), "--json"])
    measured = json.loads(capsys.readouterr().out)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("README.md", "policy.py", "policy.npz", "config.json", "evals.jsonl"),
    }
    card = (tmp_path / "out" / "README.md").read_text()
    head = card.split("---\n")[1]
    assert "library_name: qscore\n" in head and "type: mean_reward" in head
    summary = qs.Run.open(folder).summary
    first, second = summary["final_returns"]
    assert f"value: {first:.5g} +/- " in head
    assert f"| 0 | {first:.5g} |" in card and f"| 1 | {second:.5g} |" in card
    assert f"Interquartile mean over seeds: {summary['iqm']:.5g}" in card
    assert qs.Run.open(folder).command() in card
    assert f"{measured['latency_milliseconds']:.3f} ms" in card and "It is deterministic." in card
    # its example is a whole episode
    (example,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", example + "\nprint(carry, done)"],
        cwd=tmp_path / "out", capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    episode_return, end = done.stdout.splitlines()
    assert float(episode_return) < 0 and end == "() True"
    with pytest.raises(qs.UsageError, match="which exists and is not an empty folder"):
        qs.export(folder, tmp_path / "out")
    with pytest.raises(qs.UsageError, match="has no seed 9; it has 0, 1"):
        qs.export(folder, tmp_path / "other", seed=9)


EXAMPLES = {
    "Swimmer-v5": (qs.Host("Swimmer-v5", max_episode_steps=7), "max_episode_steps=7"),
    "dm_control/pendulum-swingup-v0": (
        qs.Host("dm_control/pendulum-swingup-v0", max_episode_steps=5),
        "gym.register_envs(shimmy)",
    ),
    "Pendulum-v1": (qs.Host("Pendulum-v1"), 'env = gym.make("Pendulum-v1")\n'),
    "another step": (qs.Host("InvertedPendulum-v5", dt=0.08), "InvertedPendulum-v5, dt=0.08"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_of_a_card_is_of_the_task_that_was_trained_on(name, tmp_path):
    environment, part = EXAMPLES[name]
    if name.startswith("dm_control"):
        pytest.importorskip("shimmy", reason="the extra `dmc` is not installed")
    run = Run(tmp_path, qs.TD3(), environment, qs.Settings(), {})
    task = environment.open()
    (tmp_path / "policy.py").write_text(
        "import numpy as np\n"
        "class Policy:\n"
        "    init_carry = tuple\n"
        "    def __call__(self, observation, carry):\n"
        f"        assert np.shape(observation) == ({task.spec.obs_size},)\n"
        f"        return np.zeros({task.spec.action_size}), carry\n"
    )
    task.close()
    example = sys.modules["qscore.export"]._example(run, task)  # pyright: ignore
    assert part in example
    done = subprocess.run(
        [sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_policy_trained_with_the_best_of_several_is_exported_as_it_is_evaluated(tmp_path):
    run = Run(tmp_path, qs.QSM(**SMALL, best_of=4), qs.Host("Pendulum-v1"), qs.Settings(), {})
    task, export = run.environment.open(), sys.modules["qscore.export"]
    agent = run.algorithm.init(task.spec, key=jr.key(0))
    function = export._flat(run, task, agent)  # pyright: ignore
    code = export._translate(function, task.spec.obs_size, [])  # pyright: ignore
    obs, key = np.array([0.6, 0.8, -1.0], np.float32), jr.key(3)
    _, drawn = evaluate(function, [obs], key=key)
    (found,) = run_code(code, [("obs", obs)], [drawn[place] for place in code.kept])
    single = qs.QSM(**SMALL)
    expected, _ = single.act(agent, (), jnp.asarray(obs), key=key, explore=False)
    assert_close(found, np.asarray(expected))
    task.close()


def test_an_example_flattens_what_is_no_vector_and_has_the_limit_of_a_task_without(tmp_path):
    class Endless(gym.Env):
        observation_space = gym.spaces.Box(-1.0, 1.0, (2, 2), np.float32)
        action_space = gym.spaces.Box(-1.0, 1.0, (2, 1), np.float32)

    gym.register("Grid-v0", lambda **_: Endless(), disable_env_checker=True)
    run = Run(tmp_path, qs.TD3(), qs.Host("Grid-v0"), qs.Settings(), {})
    example = sys.modules["qscore.export"]._example(run, run.environment.open())  # pyright: ignore
    del gym.registry["Grid-v0"]
    made = 'gym.wrappers.FlattenObservation(gym.make("Grid-v0", max_episode_steps=1000))'
    assert f"env = {made}" in example and "env.step(action.reshape((2, 1)))" in example


@pytest.mark.slow
def test_a_policy_that_acts_otherwise_is_not_passed_off_as_the_original(
    trained, tmp_path, monkeypatch
):
    folder, export = trained("sac"), sys.modules["qscore.export"]
    translate = export._translate  # pyright: ignore

    def wrong(*args):
        code = translate(*args)
        code.constants[0] = code.constants[0] + 0.1
        return code

    monkeypatch.setattr(export, "_translate", wrong)
    with pytest.raises(qs.RunStopped, match="differs from the original by .* do not use it"):
        qs.export(folder, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    (folder / "evals.jsonl").rename(folder / "hidden")
    try:
        with pytest.raises(qs.UsageError, match="no evaluation of seed 0 at .* 120 steps"):
            qs.export(folder, tmp_path / "none")
    finally:
        (folder / "hidden").rename(folder / "evals.jsonl")
