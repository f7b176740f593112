"""What a sweep is asked to do: a TOML file, read into the trials it stands for.

    algorithms = ["qsm", "sac"]
    environments = ["Pendulum-v1"]
    seeds = 3

    [settings]                                # of `qscore train`
    steps = 10_000

    [algorithm]                               # fields of every algorithm
    batch_size = 128

    [algorithm.qsm]                           # and of one
    target = "gradient"

    [grid]                                    # one trial for every combination
    "algorithm.qsm.score_scale" = [10.0, 30.0]

A *configuration* is an algorithm and an environment with all their fields; a *trial* is one
training run of a configuration, of one seed or of `seeds_per_trial`. Everything is checked before
anything starts, and what is wrong is said with its line.
"""

import dataclasses
import itertools
import math
import re
import shlex
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar, get_args, get_type_hints

import numpy as np

from qscore.algorithms import ALGORITHMS, algorithm_name
from qscore.algorithms.base import Algorithm
from qscore.config import Range, validate
from qscore.environments import Environment, environment_class
from qscore.errors import UsageError
from qscore.folder import (
    Run,
    Settings,
    absolute,
    expanded,
    problem_text,
    usual_preset,
    usual_steps,
)
from qscore.panel import shortened

T = TypeVar("T")

Names = tuple[str, ...]
"""Where a value stands in the file: the names of its tables, and its own."""

Fields = dict[Names, Any]
"""Values of fields, such as {("algorithm", "qsm", "score_scale"): 30.0}."""

Engine = Literal["local", "ray"]

VALUES = ("algorithms", "environments", "seeds", "seeds_per_trial", "out", "engine")
MOST_TRIALS = 100_000
"""Of a sweep: a table of more would not be read, and their folders would not be listed."""

LONGEST_NAME = 200
"""Of a folder, in bytes; most file systems have 255, and files beside it have longer ones."""

REPEATS = 100
"""Draws in a row that were drawn before, after which there are no more."""

TABLES = (
    *("settings", "algorithm", "environment", "grid", "search", "stop_early", "resources"),
    "failures",
)


@dataclass(frozen=True)
class Resources:
    """`[resources]`: where trials run, and with how much each."""

    workers: Annotated[int | None, Range(1)] = None
    """Trials at a time, in [1, inf); None is as many as there are cores for."""
    cores: Annotated[int, Range(1)] = 1
    """Cores of each trial, in [1, inf). A run's numbers depend on how many there are."""
    share: Annotated[float, Range(0, 1, low_open=True)] = 1.0
    """Of the cores that a trial counts for with Ray, in (0, 1]: below 1, trials share cores."""
    gpus: Annotated[float, Range(0)] = 0.0
    """Accelerators of each trial with Ray, in [0, inf); below 1, trials share one."""
    address: str | None = None
    """A Ray cluster, as HOST:PORT or `auto`; None starts one on this machine."""

    def __post_init__(self):
        validate(self)
        if self.address == "":
            raise ValueError("`address` must be HOST:PORT or 'auto', got ''.")


@dataclass(frozen=True)
class Failures:
    """`[failures]`: what is done about trials that fail."""

    retries: Annotated[int, Range(0)] = 1
    """How often a trial whose process was lost goes on from its last checkpoint, in [0, inf). One
    that diverged or cannot be carried out would only do so again."""
    most: Annotated[int | None, Range(0)] = None
    """No more trials are started once more than so many have failed, in [0, inf)."""

    def __post_init__(self):
        validate(self)


@dataclass(frozen=True)
class StopEarly:
    """`[stop_early]`: asynchronous successive halving (Li et al. 2018), with Ray.

    At `grace`, `grace factor`, `grace factor^2`, ... steps a trial goes on only if its last return
    is among the best 1/factor of those that came as far.
    """

    grace: Annotated[int, Range(1)]
    """Steps that every trial may take, in [1, inf)."""
    factor: Annotated[float, Range(1, low_open=True)] = 3.0
    """Of the trials that come as far, one in so many goes on, in (1, inf)."""

    def __post_init__(self):
        validate(self)


@dataclass(frozen=True)
class Dimension:
    """`[search.space]`: the values that a field may take."""

    low: int | float | None = None
    """The least of them, for a range."""
    high: int | float | None = None
    """The greatest."""
    log: bool = False
    """Whether the logarithm is uniform, rather than the value."""
    choices: tuple[Any, ...] = ()
    """The values themselves, instead of a range."""

    def __post_init__(self):
        for i, value in enumerate(self.choices):
            if value in self.choices[:i]:
                raise ValueError(f"`choices` has {value!r} twice.")
        if bool(self.choices) == (self.low is not None) or (self.low is None) != (
            self.high is None
        ):
            raise ValueError("give either `low` and `high`, or `choices`, of at least one.")
        if self.low is not None and self.high is not None:
            for name in ("low", "high"):
                value = getattr(self, name)
                if isinstance(value, bool) or not isinstance(value, (int, float)):
                    raise ValueError(f"`{name}` must be a number, got {value!r}.")
            if not (0.0 if self.log else -math.inf) < self.low < self.high < math.inf:
                raise ValueError(
                    f"`low` must be below `high`{', and above 0' if self.log else ''}; "
                    f"got {self.low:g} and {self.high:g}."
                )

    @property
    def whole(self) -> bool:
        """Whether the values of a range are whole numbers, as both its ends are."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    def holds(self, value: Any) -> bool:
        """Whether a value is one of these."""
        if self.low is None or self.high is None:
            return value in self.choices
        return isinstance(value, (int, float)) and self.low <= value <= self.high

    @property
    def ends(self) -> tuple[Any, ...]:
        """The values beyond which there are none; every choice is one."""
        return self.choices or (self.low, self.high)

    def draw(self, generator: np.random.Generator) -> Any:
        """One value at random."""
        if self.choices:
            return self.choices[generator.integers(len(self.choices))]
        assert self.low is not None and self.high is not None
        if self.whole and not self.log:
            return int(generator.integers(int(self.low), int(self.high), endpoint=True))
        low, high = (math.log(end) if self.log else end for end in (self.low, self.high))
        value = generator.uniform(low, high)
        return self.rounded(math.exp(value) if self.log else value)

    def rounded(self, value: int | float) -> int | float:
        """A drawn value as it is used and written: whole, or to four digits and within the ends."""
        assert self.low is not None and self.high is not None
        if self.whole:
            return round(value)
        return min(max(float(f"{value:.4g}"), self.low), self.high)


@dataclass(frozen=True)
class Search:
    """`[search]`: configurations drawn from a space, rather than all of a grid."""

    samples: Annotated[int, Range(1, 10_000)]
    """Configurations of each algorithm on each environment, in [1, 10000]."""
    sampler: Literal["random", "optuna"] = "random"
    """Independent draws, or Optuna's tree-structured Parzen estimator, which learns from those that
    have ended and needs Ray."""
    seed: Annotated[int, Range(0)] = 0
    """Of the draws, in [0, inf)."""

    def __post_init__(self):
        validate(self)


Space = dict[Names, Dimension]
"""The values that fields may take."""


@dataclass(frozen=True)
class Trial:
    """One training run of a sweep."""

    name: str
    """Its folder, under the sweep's."""
    algorithm: Algorithm
    environment: Environment
    settings: Settings
    chosen: dict[str, Any]
    """What the grid or the search set, by the field's name in the file."""

    @property
    def pair(self) -> tuple[str, str]:
        """Its algorithm and its environment, as they are called in the file."""
        return algorithm_name(self.algorithm), self.environment.id

    def command(self, folder: Path) -> list[str]:
        """The words of the command that does the same by hand, in a folder of its own."""
        run = Run(folder, self.algorithm, self.environment, self.settings, {})
        return [*shlex.split(run.command()), "--out", str(folder)]


class Reader:
    """A TOML file, and where in it a value stands."""

    def __init__(self, text: str, source: str):
        self.text, self.source = text, source
        try:
            self.values: dict[str, Any] = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise UsageError(f"{source} is not valid TOML: {error}.") from error

    def line(self, path: Names) -> int | None:
        """The line of a value, or of the innermost table around it that has one."""
        found, deepest, table = None, 0, ()
        for number, line in enumerate(self.text.splitlines(), start=1):
            if line.lstrip().startswith("["):
                here = table = _names(line) or table
            else:
                key, equals, _ = line.partition("=")
                here = (*table, *(_names(f"{key} = 0") or ())) if equals else ()
            if len(here) > deepest and here == path[: len(here)]:
                found, deepest = number, len(here)
        return found

    def has(self, path: Names) -> bool:
        """Whether a value stands in the file."""
        value: Any = self.values
        for name in path:
            if not isinstance(value, dict) or name not in value:
                return False
            value = value[name]
        return True

    def refuse(self, path: Names, message: object) -> NoReturn:
        """Raises `UsageError` that says where."""
        line = self.line(path)
        place = self.source if line is None else f"{self.source}, line {line}"
        raise UsageError(f"{place}: {message}")

    def get(self, path: Names, kind: type, default: Any) -> Any:
        """A value of some kind."""
        value: Any = self.values
        for name in path:
            value = value.get(name, {}) if isinstance(value, dict) else {}
        if value == {} and kind is not dict:
            return default
        if not isinstance(value, kind) or isinstance(value, bool):
            said = {dict: "a table", list: "a list", str: "a text", int: "a whole number"}[kind]
            self.refuse(path, f"`{'.'.join(path)}` must be {said}; got {value!r}.")
        return value

    def build(self, kind: type[T], fields: dict[str, Any], origins: dict[str, Names]) -> T:
        """A dataclass of values that stand at `origins`; those of "" stand for the whole."""
        known = {each.name: each for each in dataclasses.fields(kind)}  # pyright: ignore[reportArgumentType]
        hints = get_type_hints(kind)
        for name, value in fields.items():
            if name not in known:
                of = f"`{kind.__name__}` has no field {name!r}."
                self.refuse(origins.get(name, ()), f"{of} It has: {', '.join(known)}.")
            if isinstance(value, list):
                fields = fields | {name: tuple(value)}
            elif hints[name] is float and type(value) is int:
                fields = fields | {name: float(value)}  # 1 and 1.0 are one setting
        for name, each in known.items():
            if each.default is each.default_factory is dataclasses.MISSING and name not in fields:
                self.refuse(origins[""], f"[{'.'.join(origins[''])}] lacks `{name}`.")
        try:
            return kind(**fields)
        except ValueError as error:
            named = re.match(r"`(\w+)`", str(error))
            self.refuse(origins.get(named[1] if named else "", origins[""]), error)

    def section(self, kind: type[T], *path: str) -> T:
        """The dataclass that a table is."""
        table = self.get(path, dict, {})
        return self.build(kind, table, {"": path, **{name: (*path, name) for name in table}})


def _names(line: str) -> Names | None:
    """The names in a line of TOML, from the outermost table on; None where it is none."""
    try:
        value = tomllib.loads(line)
    except tomllib.TOMLDecodeError:
        return None
    names = []
    while isinstance(value, dict) and len(value) == 1:
        ((name, value),) = value.items()
        names.append(name)
    return tuple(names)


@dataclass(frozen=True)
class Sweep:
    """A sweep whose file was found to be in order."""

    file: Reader
    out: Path
    engine: Engine
    trials: list[Trial]
    """All of them; where Optuna chooses one after the other, those at the ends of its space."""
    resources: Resources
    failures: Failures
    stop_early: StopEarly | None
    search: Search | None
    """Where the trials are not those of a grid."""
    space: Space
    """What a search draws from."""
    make: Callable[[dict[str, Any]], Trial]
    """The trial of one configuration, where Optuna chooses: from `Trial.chosen`."""

    @property
    def adaptive(self) -> bool:
        """Whether Optuna chooses the trials, while others run."""
        return self.search is not None and self.search.sampler == "optuna"

    def refuse(self, trial: Trial, message: object) -> NoReturn:
        """Raise `UsageError` about a trial, with a line of the file.

        The line is that of the first field that the message names, else that of `environments`.
        """
        tables = [
            *(("settings",), ("algorithm",), ("environment",)),
            *((group, name) for group in ("algorithm", "environment") for name in trial.pair),
        ]
        named = re.findall(r"`(?:\w+\.)*(\w+)`", str(message))
        if trial.settings.dataset is not None and str(trial.settings.dataset) in str(message):
            named = ["dataset"]
        for field in named:
            for table in tables:
                for path in ((*table, field), ("grid", ".".join((*table, field)))):
                    if self.file.has(path):
                        self.file.refuse(path, f"{trial.name}: {message}")
        self.file.refuse(("environments",), f"{trial.name}: {message}")


def parse(text: str, source: str) -> Sweep:
    """Read a sweep.

    Raises `UsageError` that names the line, for anything that cannot be carried out as it stands.
    """
    reader = Reader(text, source)
    for name in reader.values:
        if name not in (*VALUES, *TABLES):
            reader.refuse((name,), f"unknown name {name!r}. Known: {', '.join(VALUES + TABLES)}.")
    engine = reader.get(("engine",), str, "local")
    if engine not in get_args(Engine):
        reader.refuse(("engine",), f"`engine` must be 'local' or 'ray', got {engine!r}.")
    algorithms, environments = (_listed(reader, name) for name in ("algorithms", "environments"))
    for name in algorithms:
        if name not in ALGORITHMS:
            known = ", ".join(ALGORITHMS)
            reader.refuse(("algorithms",), f"unknown algorithm {name!r}. Known: {known}.")
    pairs = [(a, e) for e in environments for a in algorithms]
    _check_tables(reader, algorithms, environments)
    blocks = _seed_blocks(reader)
    axes = {
        path: _axis(reader, name)
        for name in reader.get(("grid",), dict, {})
        if (path := _field(reader, ("grid", name), algorithms, environments))
    }
    search, space = None, {}
    if "search" in reader.values:
        search, space = _search(reader, algorithms, environments)
        if len(pairs) * len(blocks) * search.samples > MOST_TRIALS:
            reader.refuse(
                ("search", "samples"),
                f"a sweep has at most {MOST_TRIALS} trials; got {search.samples} `samples` for "
                f"each of {len(pairs)} pairs and {len(blocks)} blocks of seeds.",
            )
        if axes:
            reader.refuse(("grid",), "give either [grid] or [search].")
        if search.sampler == "optuna" and (engine != "ray" or len(pairs) > 1):
            reader.refuse(
                ("search", "sampler"),
                "`sampler` 'optuna' needs engine = 'ray' and learns about one algorithm on one "
                f"environment; got engine = {engine!r} and {len(pairs)} pairs.",
            )
        if search.sampler == "optuna" and len(blocks) > 1:
            reader.refuse(
                ("search", "sampler"),
                "`sampler` 'optuna' judges a configuration by one trial: set `seeds_per_trial` to "
                "the number of seeds.",
            )
    stop_early = reader.section(StopEarly, "stop_early") if "stop_early" in reader.values else None
    if stop_early is not None and engine != "ray":
        reader.refuse(("stop_early",), "[stop_early] needs engine = 'ray'.")
    if stop_early is not None and len(environments) > 1:
        reader.refuse(
            ("stop_early",), "[stop_early] compares returns, so it needs one environment."
        )

    def make(pair: tuple[str, str], chosen: Fields) -> list[Trial]:
        return _trials(reader, *pair, chosen, blocks)

    trials: list[Trial] = []
    for pair in pairs:
        if search is None:
            own = {path: values for path, values in axes.items() if _applies(path, pair)}
            _refuse_both(reader, ("grid",), own)
            if len(trials) + len(blocks) * math.prod(map(len, own.values())) > MOST_TRIALS:
                reader.refuse(("grid",), f"a sweep has at most {MOST_TRIALS} trials.")
            for values in itertools.product(*own.values()):
                trials += make(pair, dict(zip(own, values, strict=True)))
        else:
            generator = np.random.default_rng(search.seed)
            samples = 1 if search.sampler == "optuna" else search.samples
            drawn = _draws(reader, space, pair, samples, generator)
            ends = [
                drawn[0] | {path: end}
                for path, each in space.items()
                for end in each.ends
                if path in drawn[0]
            ]
            at_ends = [trial for each in ends for trial in make(pair, each)]  # or they are refused
            if search.sampler == "optuna":
                trials += at_ends
            else:
                trials += itertools.chain.from_iterable(make(pair, each) for each in drawn)
    seen: set[str] = set()
    for trial in trials:
        if trial.name in seen and not (search and search.sampler == "optuna"):
            where = ("search", "samples") if search else ("grid",)
            reader.refuse(where, f"two runs would have the name {trial.name}.")
        seen.add(trial.name)
        if stop_early is not None and trial.settings.total_steps <= stop_early.grace:
            reader.refuse(("stop_early", "grace"), "`grace` must be below `settings.steps`.")
    default = f"runs/{Path(source).stem}"
    return Sweep(
        reader,
        expanded(reader.get(("out",), str, default)),
        engine,
        trials,
        reader.section(Resources, "resources"),
        reader.section(Failures, "failures"),
        stop_early,
        search,
        space,
        lambda chosen: make(pairs[0], {tuple(k.split(".")): v for k, v in chosen.items()})[0],
    )


def _listed(reader: Reader, name: str) -> list[str]:
    values = reader.get((name,), list, [])
    if not values or not all(isinstance(value, str) for value in values):
        reader.refuse((name,), f"`{name}` must be a list of names, of at least one; got {values}.")
    _refuse_repeated(reader, (name,), values)
    return values


def _refuse_repeated(reader: Reader, path: Names, values: list[Any]) -> None:
    for i, value in enumerate(values):
        if value in values[:i]:
            reader.refuse(path, f"{value!r} is listed twice; runs would have the same name.")


def _check_tables(reader: Reader, algorithms: list[str], environments: list[str]) -> None:
    """Refuse tables of algorithms and environments that the sweep does not have."""
    for group, names in (("algorithm", algorithms), ("environment", environments)):
        for name, value in reader.get((group,), dict, {}).items():
            if isinstance(value, dict) and name not in names:
                said = ", ".join(names)
                reader.refuse((group, name), f"no {group} of this sweep is {name!r}: {said}.")


def _seed_blocks(reader: Reader) -> list[list[int]]:
    """The seeds of each trial."""
    asked = reader.values.get("seeds", 1)
    if type(asked) is int and asked > MOST_TRIALS:
        reader.refuse(("seeds",), f"`seeds` is {asked}; a sweep has at most {MOST_TRIALS} trials.")
    seeds = list(range(asked)) if type(asked) is int else asked
    if (
        not isinstance(seeds, list)
        or not seeds
        or any(type(seed) is not int or seed < 0 for seed in seeds)
    ):
        reader.refuse(
            ("seeds",), f"`seeds` must be how many, or a list of them, from 0 on; got {asked!r}."
        )
    _refuse_repeated(reader, ("seeds",), seeds)
    each = reader.get(("seeds_per_trial",), int, 1)
    if each < 1:
        reader.refuse(("seeds_per_trial",), f"`seeds_per_trial` must be at least 1, got {each}.")
    blocks = [seeds[i : i + each] for i in range(0, len(seeds), each)]
    for block in blocks:
        if block != list(range(block[0], block[0] + len(block))):
            reader.refuse(
                ("seeds_per_trial",), f"the seeds of one trial must follow each other; got {block}."
            )
    return blocks


def _field(reader: Reader, place: Names, algorithms: list[str], environments: list[str]) -> Names:
    """The field that a dotted name in [grid] or [search.space] stands for."""
    path = tuple(place[-1].split("."))
    names = {"settings": [], "algorithm": algorithms, "environment": environments}
    if (
        len(path) not in (2, 3)
        or path[0] not in names
        or (len(path) == 3 and path[1] not in names[path[0]])
    ):
        reader.refuse(
            place,
            f"{place[-1]!r} names no field; write 'settings.FIELD', 'algorithm.FIELD', "
            "'algorithm.NAME.FIELD', and the same of 'environment', in quotation marks.",
        )
    return path


def _axis(reader: Reader, name: str) -> list[Any]:
    values = reader.values["grid"][name]
    if not isinstance(values, list) or not values:
        reader.refuse(("grid", name), f"{name!r} must be a list of at least one; got {values!r}.")
    _refuse_repeated(reader, ("grid", name), values)
    return values


def _refuse_both(reader: Reader, place: Names, paths: Iterable[Names]) -> None:
    """Refuse a field that two entries of a table set for one algorithm on one environment."""
    seen: dict[tuple[str, str], Names] = {}
    for path in paths:
        if (other := seen.setdefault((path[0], path[-1]), path)) != path:
            name = ".".join(path)
            reader.refuse((*place, name), f"{name!r} sets what {'.'.join(other)!r} sets, too.")


def _search(reader: Reader, algorithms: list[str], environments: list[str]) -> tuple[Search, Space]:
    """The table [search], and the dimensions in it by field."""
    table = dict(reader.get(("search",), dict, {}))
    table.pop("space", None)
    origins = {"": ("search",), **{name: ("search", name) for name in table}}
    search = reader.build(Search, table, origins)
    for name, dimension in reader.get(("search", "space"), dict, {}).items():
        path = ("search", "space", name)
        reader.get(path, dict, {})
        reader.get((*path, "choices"), list, [])
        if not isinstance(log := dimension.get("log", False), bool):
            reader.refuse(path, f"`log` must be true or false, got {log!r}.")
    space = {
        _field(reader, ("search", "space", name), algorithms, environments): reader.section(
            Dimension, "search", "space", name
        )
        for name in reader.get(("search", "space"), dict, {})
    }
    if not space:
        reader.refuse(("search", "space"), "[search.space] is empty: nothing would vary.")
    return search, space


def _applies(path: Names, pair: tuple[str, str]) -> bool:
    """Whether a field is one of an algorithm on an environment."""
    return len(path) == 2 or path[1] in pair


def _draws(
    reader: Reader,
    space: Space,
    pair: tuple[str, str],
    count: int,
    generator: np.random.Generator,
) -> list[Fields]:
    """So many configurations, all different; one, where nothing of the space concerns them."""
    own = {path: dimension for path, dimension in space.items() if _applies(path, pair)}
    if not own:
        return [{}]
    _refuse_both(reader, ("search", "space"), own)
    found: dict[str, Fields] = {}
    for _ in range(count):
        for _ in range(REPEATS):
            drawn = {path: dimension.draw(generator) for path, dimension in own.items()}
            if str(drawn) not in found:
                break
        else:
            reader.refuse(
                ("search", "samples"),
                f"`samples` is {count}, and the space has hardly more than {len(found)} "
                f"configurations of {pair[0]} on {pair[1]}.",
            )
        found[str(drawn)] = drawn
    return list(found.values())


def _trials(
    reader: Reader, algorithm: str, environment: str, chosen: Fields, blocks: list[list[int]]
) -> list[Trial]:
    """One trial for each block of seeds, of one configuration."""

    def configure(kind: type[T], group: str, name: str, start: dict[str, Any]) -> T:
        fields = dict(start)
        origins: dict[str, Names] = {"": (group,)}
        for path in ((group,), (group, name)) if name else ((group,),):
            for key, value in reader.get(path, dict, {}).items():
                if not isinstance(value, dict):
                    fields[key], origins[key] = value, (*path, key)
        for path, value in chosen.items():
            if path[0] == group:
                place = ("search", "space") if "search" in reader.values else ("grid",)
                fields[path[-1]], origins[path[-1]] = value, (*place, ".".join(path))
        if group == "environment" and isinstance(fields.get("problem"), str):
            try:
                fields["problem"] = problem_text(fields["problem"])
            except UsageError as error:
                reader.refuse(origins["problem"], str(error))
        return reader.build(kind, fields, origins)

    task: Environment = configure(
        environment_class(environment), "environment", environment, {"id": environment}
    )
    settings = configure(Settings, "settings", "", {"steps": usual_steps(task)})
    for name in ("seeds", "seed_start"):
        for path, has in (
            (("settings", name), name in reader.get(("settings",), dict, {})),
            (("grid", f"settings.{name}"), ("settings", name) in chosen),
        ):
            if has:
                reader.refuse(path, "seeds are set by `seeds`, above all tables.")
    if settings.dataset is not None:
        settings = dataclasses.replace(settings, dataset=absolute(settings.dataset))
    preset = usual_preset(algorithm, task, offline=settings.dataset is not None)
    learner = configure(
        ALGORITHMS[algorithm], "algorithm", algorithm, {"preset": preset} if preset else {}
    )
    varied = "".join(
        f"-{path[-1]}=" + ("x".join(map(str, v)) if isinstance(v, list) else shortened(v))
        for path, v in chosen.items()
    )
    name = re.sub(r"[^\w.,=+-]+", "_", f"{environment.replace('/', '-')}-{algorithm}{varied}")
    if len(name.encode()) > LONGEST_NAME:
        reader.refuse(
            ("search", "space") if "search" in reader.values else ("grid",),
            f"a folder would have a name of {len(name.encode())} bytes, more than {LONGEST_NAME}: "
            f"{name[:40]}...",
        )

    def seeded(block: list[int]) -> Settings:
        try:
            return dataclasses.replace(settings, seeds=len(block), seed_start=block[0])
        except ValueError as error:
            reader.refuse(("seeds",), error)

    return [
        Trial(
            f"{name}/seed-{block[0]}" + (f"-to-{block[-1]}" if len(block) > 1 else ""),
            learner,
            task,
            seeded(block),
            {".".join(path): value for path, value in chosen.items()},
        )
        for block in blocks
    ]
