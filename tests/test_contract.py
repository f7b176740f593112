"""What every registered algorithm and every configuration promises, whatever it learns."""

import ast
import dataclasses
import inspect
import itertools
import json
import math
import re
import textwrap
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import assert_close

from qscore import ALGORITHMS, ENVIRONMENTS, Host, Run, Settings, Spec, Transition, checkpoint
from qscore.config import Range, validate
from qscore.normalize import Moments
from qscore.train import init_runner, train_chunk

pytestmark = pytest.mark.usefixtures("quick_programs")
SPEC = Spec(obs_size=3, action_size=2, dt=0.05, horizon=1.0)
ROWS = 8
SMALL = {"hidden": (16, 16), "batch_size": ROWS, "warmup_steps": ROWS}


class Subject:
    """A small instance of an algorithm, its compiled methods, and a state it has trained."""

    def __init__(self, kind):
        self.algorithm = algorithm = kind(**SMALL)
        self.init = jax.jit(lambda key: algorithm.init(SPEC, key=key))
        self.update = jax.jit(lambda state, batch, key: algorithm.update(state, batch, key=key))
        self.carry = algorithm.init_carry(SPEC)
        self.acts = {
            explore: jax.jit(
                lambda state, obs, key, explore=explore: algorithm.act(
                    state, self.carry, obs, key=key, explore=explore
                )
            )
            for explore in (False, True)
        }
        self.fresh = self.init(jr.key(0))
        self.trained = self.fresh
        for i in range(4):  # enough for what is updated only now and then
            self.trained, self.metrics = self.update(self.trained, batch_of(i), jr.key(i))


@pytest.fixture(scope="module", params=list(ALGORITHMS))
def subject(request):
    return Subject(ALGORITHMS[request.param])


def batch_of(seed, rows=ROWS):
    """Random transitions, a quarter of them final."""
    obs, action, reward, next_obs = (
        np.random.default_rng([seed, i]).uniform(-1.0, 1.0, (rows, *shape)).astype(np.float32)
        for i, shape in enumerate([(3,), (2,), (), (3,)])
    )
    return Transition(
        obs=jnp.asarray(obs),
        action=jnp.asarray(action),
        reward=jnp.asarray(reward),
        next_obs=jnp.asarray(next_obs),
        terminated=jnp.arange(rows, dtype=jnp.int32) % 4 == 0,
        time=SPEC.dt * jnp.arange(rows, dtype=jnp.float32),
        dt=jnp.full(rows, SPEC.dt, jnp.float32),
    )


OBS = jnp.array([0.3, -0.8, 0.5], jnp.float32)


def networks(state):
    """The parts of a state that are networks, by name; some follow others and are not trained."""
    parts = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    found = {
        name: part
        for name, part in parts.items()
        if isinstance(part, eqx.Module) and not isinstance(part, Moments)
    }
    assert found, "a state keeps its networks as Equinox modules in fields of its own"
    return found


def equal(left, right):
    """Whether two pytrees of arrays are the same, bit for bit."""
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def signature(tree):
    """Structure, shapes and types."""
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, [(leaf.shape, leaf.dtype) for leaf in leaves]


# Shapes, purity and transformations ---------------------------------------------------------------


def test_state_is_arrays_only(subject):
    algorithm = subject.algorithm

    def check(state):
        for path, leaf in jax.tree_util.tree_leaves_with_path(state):
            name = jax.tree_util.keystr(path)
            assert eqx.is_array(leaf), f"{name} is {leaf!r}"
            assert not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key), f"{name} is a random key"
            assert leaf.dtype in (jnp.float32, jnp.int32, jnp.uint32, jnp.bool_), name

    def trace(key, batch):
        state = algorithm.init(SPEC, key=key)
        check(state)
        check(algorithm.update(state, batch, key=key)[0])

    # traced, so that Python numbers have not yet been turned into arrays by a jitted function
    jax.eval_shape(trace, jr.key(0), batch_of(0))
    check(subject.carry)


@pytest.mark.parametrize("explore", [False, True])
def test_act_returns_one_action_in_the_box(subject, explore):
    for seed in range(5):
        action, carry = subject.acts[explore](subject.trained, 10.0 * OBS, jr.key(seed))
        assert (action.shape, action.dtype) == ((2,), jnp.float32)
        assert np.all(np.abs(action) <= 1.0)
        assert signature(carry) == signature(subject.carry)


def test_exploring_depends_on_the_key(subject):
    actions = [subject.acts[True](subject.trained, OBS, jr.key(seed))[0] for seed in (0, 1)]
    assert not np.array_equal(*actions)


def test_update_keeps_the_states_form_and_reports_scalars(subject):
    assert signature(subject.trained) == signature(subject.fresh)
    assert subject.metrics
    for name, value in subject.metrics.items():
        assert isinstance(name, str)
        assert (value.shape, value.dtype) == ((), jnp.float32), name
        assert np.isfinite(value), name


def test_update_is_pure(subject):
    batch, key = batch_of(5), jr.key(5)
    before = jax.tree.map(np.array, (subject.trained, batch))
    first = subject.update(subject.trained, batch, key)
    second = subject.update(subject.trained, batch, key)
    assert equal(first, second)
    assert equal(before, (subject.trained, batch))


def test_update_depends_on_the_batch_and_the_key(subject):
    state, _ = subject.update(subject.trained, batch_of(5), jr.key(5))
    assert not equal(state, subject.update(subject.trained, batch_of(6), jr.key(5))[0])
    assert not equal(state, subject.update(subject.trained, batch_of(5), jr.key(6))[0])


def test_update_changes_every_parameter_of_every_network(subject):
    after = networks(subject.trained)
    for name, network in networks(subject.fresh).items():
        for (path, old), new in zip(
            jax.tree_util.tree_leaves_with_path(network),
            jax.tree.leaves(after[name]),
            strict=True,
        ):
            assert not np.array_equal(old, new), name + jax.tree_util.keystr(path)


def test_seeds_differ(subject):
    other = subject.init(jr.key(1))
    for name, network in networks(subject.fresh).items():
        assert not equal(network, networks(other)[name]), name


def test_vmap_over_seeds_is_a_loop_over_seeds(subject):
    algorithm = subject.algorithm

    def first_steps(key, batch):
        init_key, update_key, act_key = jr.split(key, 3)
        state, metrics = algorithm.update(algorithm.init(SPEC, key=init_key), batch, key=update_key)
        action, _ = algorithm.act(state, subject.carry, OBS, key=act_key, explore=True)
        return state, metrics, action

    keys, batches = jr.split(jr.key(2), 2), [batch_of(0), batch_of(1)]
    together = jax.jit(jax.vmap(first_steps))(
        keys, jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)
    )
    for i in range(2):
        init_key, update_key, act_key = jr.split(keys[i], 3)
        state, metrics = subject.update(subject.init(init_key), batches[i], update_key)
        action, _ = subject.acts[True](state, OBS, act_key)
        assert_close(
            jax.tree.map(lambda leaf, i=i: leaf[i], together),
            (state, metrics, action),
            loosen=10.0,
            why="batched matrix products add in another order, and Adam divides by small numbers",
        )


@pytest.mark.slow  # every operation on its own is a program to compile
def test_jit_changes_nothing(subject):
    algorithm, key = subject.algorithm, jr.key(7)
    why = "fused operations round elsewhere, and Adam divides by small numbers"
    jitted = subject.update(subject.trained, batch_of(7), key)
    eager = algorithm.update(subject.trained, batch_of(7), key=key)
    assert_close(eager, jitted, loosen=10.0, why=why)
    for explore, act in subject.acts.items():
        eager = algorithm.act(subject.trained, subject.carry, OBS, key=key, explore=explore)
        assert_close(eager, act(subject.trained, OBS, key), loosen=10.0, why=why)


def test_one_trace_serves_every_chunk(subject):
    algorithm, traces = subject.algorithm, 0

    def chunk(runner, rows, count, updates, key):
        nonlocal traces
        traces += 1
        return train_chunk(algorithm, runner, rows, count, updates, key=key)

    compiled = jax.jit(chunk)
    runner = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
        jax.eval_shape(lambda: init_runner(algorithm, SPEC, 32, key=jr.key(0))),
    )
    runner = dataclasses.replace(runner, agent=subject.fresh)
    updates = (0, 3, 1)
    for i, (count, due) in enumerate(zip((8, 5, 8), updates, strict=True)):
        before = runner.agent
        runner, metrics, finite = compiled(
            runner, batch_of(i), jnp.int32(count), jnp.int32(due), jr.key(3)
        )
        assert finite
        assert equal(before, runner.agent) == (due == 0)
        assert all(value == 0.0 for value in metrics.values()) == (due == 0)
    assert traces == 1
    assert (int(runner.updates), int(runner.replay.added)) == (sum(updates), 21)


def test_saved_agent_acts_the_same(subject, tmp_path):
    folder = checkpoint.save(tmp_path, 20, {}, {3: subject.trained}, keep=1)
    assert checkpoint.read_header(folder)["env_steps"] == 20
    skeleton = jax.eval_shape(lambda: subject.algorithm.init(SPEC, key=jr.key(0)))
    loaded = jax.tree.map(jnp.asarray, checkpoint.load(folder, 3, skeleton))
    assert signature(loaded) == signature(subject.trained)
    assert equal(loaded, subject.trained)
    for act in subject.acts.values():
        assert equal(act(loaded, OBS, jr.key(4)), act(subject.trained, OBS, jr.key(4)))
        # a state that was not loaded would act otherwise
        assert not equal(act(subject.fresh, OBS, jr.key(4)), act(subject.trained, OBS, jr.key(4)))


# Configurations -----------------------------------------------------------------------------------

CONFIGS = [*ALGORITHMS.values(), *ENVIRONMENTS.values(), Host, Settings]
GIVEN = {Host: {"id": "Pendulum-v1"}}  # fields without a default
GIVEN |= {kind: {"id": name} for name, kind in ENVIRONMENTS.items()}
TOGETHER = {  # one means nothing alone
    **{"dt_min": {"dt_max": 1e3}, "dt_max": {"dt_min": 1e-7}},
    "online_steps": {"dataset": "data.npz"},
}


def build(kind, **given):
    """`kind(**given)` without the run-time type checker, which would refuse a wrong type first."""
    config = object.__new__(kind)
    inspect.unwrap(kind.__init__)(config, **GIVEN.get(kind, {}) | given)
    return config


@dataclasses.dataclass(frozen=True)
class FieldRule:
    """What a field's annotation says of its values."""

    name: str
    kind: type
    optional: bool
    many: bool
    choices: tuple[Any, ...]
    bounds: Range | None

    def wrap(self, value):
        return (value,) if self.many else value

    def outside(self):
        """Values of the right type beyond the range."""
        if self.bounds is None:
            return []
        low, high, step = self.bounds.low, self.bounds.high, 1 if self.kind is int else 0.01
        values = [low if self.bounds.low_open else low - step, low - 1e6]
        if high < math.inf:
            values += [high if self.bounds.high_open else high + step, high + 1e6]
        values = [self.kind(value) for value in values]
        return [self.wrap(value) for value in values + [math.nan] * (self.kind is float)]

    def of_wrong_type(self):
        values: list[Any] = [] if self.kind is str else ["much"]
        if self.kind is not bool:
            values.append(True)
        if self.kind is int:
            values.append(1.5)
        if self.kind is bool:
            values.append(1)
        values = [self.wrap(value) for value in values] if self.many else values
        if self.many:
            values += [(), 5, [5]]
        return values + ([] if self.optional else [None])

    def other_than(self, value):
        """A valid value that is not `value`."""
        if self.choices:
            return next(choice for choice in self.choices if choice != value)
        if self.kind is bool:
            return not value
        if self.kind is str:
            return value + "x"
        candidates = [7, 1, 2] if self.kind is int else [0.25, 0.5]
        valid = [self.wrap(c) for c in candidates if self.bounds is None or c in self.bounds]
        return next(candidate for candidate in valid if candidate != value)


def rules(kind):
    """The rule of every field of a configuration."""
    hints = get_type_hints(kind, include_extras=True)
    found = []
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        extras = getattr(hint, "__metadata__", ())
        base = hint.__origin__ if extras else hint
        bounds = next((extra for extra in extras if isinstance(extra, Range)), None)
        choices = get_args(base) if get_origin(base) is Literal else ()
        optional = type(None) in get_args(base)
        if optional:
            base = next(arg for arg in get_args(base) if arg is not type(None))
        many = get_origin(base) is tuple
        if many:
            base = get_args(base)[0]
        item = str if choices else base
        found.append(FieldRule(field.name, item, optional, many, choices, bounds))
    return found


def fields_of(wanted):
    """(kind, rule) of every field of every configuration that `wanted` holds for."""
    return [
        pytest.param(kind, rule, id=f"{kind.__name__}.{rule.name}")
        for kind in CONFIGS
        for rule in rules(kind)
        if wanted(rule)
    ]


@pytest.mark.parametrize(("kind", "rule"), fields_of(lambda rule: rule.bounds is not None))
def test_out_of_range_is_refused_by_name(kind, rule):
    for value in rule.outside():
        message = f"`{rule.name}` must lie in {rule.bounds}, got {value!r}."
        with pytest.raises(ValueError, match=re.escape(message)):
            build(kind, **{rule.name: value})


def test_steps_are_what_32_bits_can_count():
    with pytest.raises(ValueError, match="must be below 2147483648 together, got 4000000000"):
        Settings(steps=2 * 10**9, dataset="data", online_steps=2 * 10**9)


def test_a_whole_number_in_a_real_field_is_real():
    @dataclasses.dataclass(frozen=True)
    class Plain:
        rate: Annotated[float, Range(0)] = 0.5
        maybe: float | None = None
        count: int = 1

        def __post_init__(self):
            validate(self)

    made = Plain(1, 2, 3)
    assert [type(value) for value in vars(made).values()] == [float, float, int]
    with pytest.raises(ValueError, match="`rate` must be finite, got 1000"):
        Plain(10**400)


@pytest.mark.parametrize(("kind", "rule"), fields_of(lambda rule: rule.kind is float))
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_by_name(kind, rule, value):
    with pytest.raises(
        ValueError, match=f"`{rule.name}` must (be finite|lie in .*), got .*{value}"
    ):
        build(kind, **{rule.name: (value,) if rule.many else value})


@pytest.mark.parametrize(("kind", "rule"), fields_of(lambda rule: True))
def test_wrong_type_is_refused_by_name(kind, rule):
    for value in rule.of_wrong_type():
        got = re.escape(repr(value))
        with pytest.raises(ValueError, match=f"^`{rule.name}` must be .*got {got}"):
            build(kind, **{rule.name: value})


@pytest.mark.parametrize(("kind", "rule"), fields_of(lambda rule: rule.choices))
def test_unknown_choice_is_refused_with_the_known_ones(kind, rule):
    message = f"^`{rule.name}` must be one of .*got 'nonsense'"
    with pytest.raises(ValueError, match=message) as caught:
        build(kind, **{rule.name: "nonsense"})
    assert all(repr(choice) in str(caught.value) for choice in rule.choices)


@pytest.mark.parametrize(("kind", "rule"), fields_of(lambda rule: rule.bounds is not None))
def test_ends_of_the_range_are_accepted(kind, rule):
    # None wherever it may stand; a closed end, or a number just inside of an open one
    bounds, epsilon = rule.bounds, 1 if rule.kind is int else 1e-6
    values = [rule.kind(bounds.low + epsilon * bounds.low_open)]
    if bounds.high < math.inf:
        values.append(rule.kind(bounds.high - epsilon * bounds.high_open))
    for value in [rule.wrap(value) for value in values] + [None] * rule.optional:
        others = TOGETHER.get(rule.name, {}) if value is not None else {}
        assert getattr(build(kind, **others | {rule.name: value}), rule.name) == value


def field_docs(kind):
    """The docstring under each field of a dataclass, from its source or its parents'."""
    docs = {}
    for parent in reversed(kind.__mro__[:-1]):
        docs |= own_field_docs(parent)
    return docs


def own_field_docs(kind):
    tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    body = next((node.body for node in tree.body if isinstance(node, ast.ClassDef)), [])
    docs = {}
    for field, below in itertools.zip_longest(body, body[1:]):
        match field, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(str(text))):
                docs[name] = " ".join(text.split())
    return docs


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_field_is_documented_with_its_range(kind):
    docs = field_docs(kind)
    for rule in rules(kind):
        assert rule.name in docs, f"{rule.name} has no docstring"
        assert len(docs[rule.name].split()) > 2, f"{rule.name} says nothing"
        if rule.bounds is not None:
            assert str(rule.bounds) in docs[rule.name], f"{rule.name} lies in {rule.bounds}"


@pytest.mark.parametrize("name", ALGORITHMS)
def test_configuration_survives_json(name, tmp_path):
    kind = ALGORITHMS[name]
    default = kind()
    others = {rule.name: rule.other_than(getattr(default, rule.name)) for rule in rules(kind)}
    for algorithm in (default, kind(**others)):
        run = Run(tmp_path, algorithm, Host("Pendulum-v1"), Settings(), {})
        run.save_config()
        written = json.loads((tmp_path / "config.json").read_text())
        assert written["algorithm"]["name"] == name
        restored = Run.open(tmp_path).algorithm
        assert restored == algorithm
        assert hash(restored) == hash(algorithm)  # static under jit: the same compiled program
    assert all(getattr(restored, field) != getattr(default, field) for field in others)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_configuration_is_frozen(name):
    with pytest.raises(dataclasses.FrozenInstanceError, match="batch_size"):
        ALGORITHMS[name]().batch_size = 3
