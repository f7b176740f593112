"""A run folder: what a run was asked to do, and where its files are.

config.json  metrics.jsonl  evals.jsonl  summary.json  checkpoints/  plots/  tensorboard/
"""

import dataclasses
import fcntl
import itertools
import json
import math
import os
import platform
import shlex
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_type_hints

from qscore import lq
from qscore.algorithms import ALGORITHMS, algorithm_name
from qscore.algorithms.base import Algorithm
from qscore.config import Range, validate
from qscore.environments import Environment, environment_class
from qscore.errors import UsageError
from qscore.products import Precision

T = TypeVar("T")

Rows = dict[int, dict[int, dict[str, Any]]]
"""What a run has written of one kind: seed -> environment steps -> a line."""


MOST_STEPS = 2_000_000_000
"""Of a seed; loops on the device count in 32 bits."""


@dataclass(frozen=True)
class Settings:
    """How long a run is, and what it records. Steps are those of each seed."""

    steps: Annotated[int, Range(1, MOST_STEPS)] = 100_000
    """Environment steps of each seed, in [1, 2e+09]; gradient steps where a data set is given."""
    dataset: str | None = None
    """Recorded episodes to learn from instead of the environment: a recording (.npz), a D4RL-style
    file (.hdf5), a Minari folder or id. The environment is then for evaluation."""
    online_steps: Annotated[int, Range(0, MOST_STEPS)] = 0
    """Environment steps that follow after `steps` on a data set, which stays in the replay, in
    [0, 2e+09]."""
    seeds: Annotated[int, Range(1, 1000)] = 1
    """Independent seeds trained side by side, in [1, 1000]."""
    seed_start: Annotated[int, Range(0, 2_000_000_000)] = 0
    """The first seed, in [0, 2e+09]; the others follow."""
    eval_every: Annotated[int | None, Range(1)] = None
    """Steps between evaluations, each with a checkpoint, in [1, inf). None is a twentieth of the
    run."""
    eval_episodes: Annotated[int, Range(1)] = 10
    """Episodes per evaluation, in [1, inf), from the same starts every time."""
    log_every: Annotated[int | None, Range(1)] = None
    """Steps between lines of training metrics, in [1, inf). None is 1000, or for our own
    environments the chunk that they are trained in."""
    keep_checkpoints: Annotated[int, Range(1)] = 2
    """Newest checkpoints to keep, in [1, inf); they include the replay buffer."""
    precision: Precision = "f32"
    """Of the numbers that the networks' matrix products multiply in an update: float32, or both
    sides rounded to bfloat16, gradients too. Parameters, sums, losses and acting are float32."""

    def __post_init__(self):
        validate(self)
        if self.online_steps and self.dataset is None:
            raise ValueError("`online_steps` follow after training on a `dataset`; none is given.")
        if self.total_steps >= 2**31:
            raise ValueError(
                f"`steps` and `online_steps` must be below {2**31} together, got "
                f"{self.total_steps}."
            )

    @property
    def offline_steps(self) -> int:
        """Steps of each seed that are gradient steps on a data set."""
        return 0 if self.dataset is None else self.steps

    @property
    def total_steps(self) -> int:
        """Steps of each seed in all: gradient steps on a data set, then environment steps."""
        return self.steps + self.online_steps

    @property
    def seed_list(self) -> list[int]:
        return list(range(self.seed_start, self.seed_start + self.seeds))


@dataclass(frozen=True)
class Run:
    """A run folder, and what `config.json` in it says."""

    folder: Path
    algorithm: Algorithm
    environment: Environment
    settings: Settings
    versions: dict[str, str]

    @staticmethod
    def open(folder: str | os.PathLike) -> "Run":
        """Read a run folder. Raises `UsageError` where it is not one."""
        path = Path(folder)
        if not path.is_dir():
            raise UsageError(f"{path} is not a run folder: there is no such folder.")
        try:
            config = json.loads((path / "config.json").read_text())
        except FileNotFoundError:
            raise UsageError(f"{path} is not a run folder: it has no config.json.") from None
        except OSError as error:
            raise UsageError(f"cannot read {path / 'config.json'}: {error.strerror}.") from error
        except ValueError as error:
            raise UsageError(f"{path / 'config.json'} is not valid JSON: {error}.") from error
        try:
            algorithm, environment = dict(config["algorithm"]), dict(config["environment"])
            return Run(
                path,
                ALGORITHMS[algorithm.pop("name")](**_tuples(algorithm)),
                environment_class(environment.pop("name"))(**_tuples(environment)),
                Settings(**config["settings"]),
                dict(config["versions"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(
                f"{path / 'config.json'} does not describe a run of this version of qscore: "
                f"{type(error).__name__}: {error}"
            ) from error

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def how_to_resume(self) -> str:
        """What a message says to whoever wants to go on."""
        return f"continue with: {shlex.join(['qscore', 'resume', str(self.folder)])}"

    @property
    def summary(self) -> dict[str, Any]:
        """The contents of summary.json; a run that has not finished has none."""
        path = self.folder / "summary.json"
        if not path.is_file():
            raise UsageError(f"{self.folder} has no summary.json: the run has not finished.")
        try:
            return json.loads(path.read_text())
        except ValueError as error:
            raise UsageError(f"{path} is not valid JSON: {error}.") from error

    def rows(self, stream: Literal["evals", "metrics"]) -> Rows:
        """The lines of evals.jsonl or metrics.jsonl so far; of a line half written, nothing.

        Raises `UsageError` for a line that is not what a run writes.
        """
        path = self.folder / f"{stream}.jsonl"
        rows: Rows = defaultdict(dict)
        lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                row = json.loads(line)
                seed, step, _ = int(row["seed"]), int(row["env_steps"]), float(row["seconds"])
                if seed not in self.settings.seed_list:
                    raise ValueError(f"seed {seed} is none of the run's")
                if stream == "evals" and not (
                    row["returns"] and all(math.isfinite(value) for value in row["returns"])
                ):
                    raise ValueError(f"returns {row['returns']} are not numbers")
                rows[seed][step] = row
            except (KeyError, TypeError, ValueError) as error:
                raise UsageError(
                    f"{path}, line {number}, is not a line of a run: "
                    f"{type(error).__name__}: {error}."
                ) from error
        return dict(rows)

    def command(self) -> str:
        """The command that repeats this run, with what is not a default, and without `--out`."""
        words = ["qscore", "train", algorithm_name(self.algorithm)]
        words.append(self.environment.id)
        # what `qscore train` would take for this pair, were nothing else said
        plain = Settings(steps=usual_steps(self.environment))
        for prefix, changed in (
            ("--", differences(self.settings, plain)),
            ("--algorithm.", non_defaults(self.algorithm)),
            ("--environment.", non_defaults(self.environment)),
        ):
            for name, value in changed.items():
                negation = "no-" if value is False else ""
                words.append(prefix + negation + name.replace("_", "-"))
                if not isinstance(value, bool):
                    words.extend(map(str, value) if isinstance(value, tuple) else [str(value)])
        return shlex.join(words)

    def save_config(self) -> None:
        """Write config.json."""
        name = algorithm_name(self.algorithm)
        config = {
            "algorithm": {"name": name, **dataclasses.asdict(self.algorithm)},  # pyright: ignore[reportArgumentType]
            "environment": {
                "name": self.environment.id,
                **dataclasses.asdict(self.environment),  # pyright: ignore[reportArgumentType]
            },
            "settings": dataclasses.asdict(self.settings),
            "versions": self.versions,
        }
        write_json(self.folder / "config.json", config)


def differences(config: Any, other: Any) -> dict[str, Any]:
    """The fields of `config` that `other`, of the same kind, has otherwise."""
    return {
        field.name: value
        for field in dataclasses.fields(config)
        if (value := getattr(config, field.name)) != getattr(other, field.name)
    }


def non_defaults(config: Any) -> dict[str, Any]:
    """The preset of an algorithm or environment, if it has any, and what differs from it.

    Fields without a default, such as an environment's name, are left out.
    """
    named = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name == "preset"
        or (field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING)
    }
    found = differences(config, type(config)(**named))
    return {"preset": config.preset, **found} if "preset" in named else found


def expanded(path: str | os.PathLike) -> Path:
    """A path that may begin with `~`, which no shell expands in a file or after `--out=`."""
    return Path(os.path.expanduser(path))


def absolute(dataset: str | os.PathLike) -> str:
    """The full path of a file or folder, so that any place can resume the run; an id as it is."""
    path = expanded(dataset)
    return str(path.resolve() if path.exists() else dataset)


def usual_steps(environment: Environment | type) -> int:
    """The steps of a run on an environment, unless it is told otherwise."""
    return getattr(environment, "default_steps", Settings.steps)


def usual_preset(algorithm: str, environment: Environment | type, *, offline: bool) -> str | None:
    """The preset of an algorithm on an environment, unless it is told otherwise; None is its own.

    On a data set it is the one made for that, where there is one.
    """
    if offline and "offline" in presets(ALGORITHMS[algorithm]):
        return "offline"
    return getattr(environment, "recommended", {}).get(algorithm)


def presets(algorithm: type) -> tuple[str, ...]:
    """The names of an algorithm's presets; none where it has none."""
    return get_args(get_type_hints(algorithm).get("preset"))


def registered_name(environment: Environment) -> str:
    """An environment's name, if that stands for it: run folders know it by nothing else.

    Raises `ValueError`.
    """
    name, kind = getattr(environment, "id", None), type(environment).__name__
    if not isinstance(name, str):
        raise ValueError(f"`environment` is a {kind}; it must be a name, or have one in `id`.")
    if (known := environment_class(name)) is not type(environment):
        raise ValueError(
            f"`environment` is a {kind} with the name {name!r}, which stands for a "
            f"{known.__name__}. Take that, or put {kind} into `qscore.ENVIRONMENTS`."
        )
    return name


def write_json(path: Path, value: Any) -> None:
    """Write a small JSON file as a whole."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a small file as a whole: never half of it, whenever the machine dies."""
    scratch = path.with_name(f".{path.name}.tmp")
    try:
        with open(scratch, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    except OSError:  # a folder with nothing in it can be used once there is room again
        scratch.unlink(missing_ok=True)
        raise


def new_folder(path: Path) -> Path:
    """Make a folder of this name, or where there is one, of this name and a number."""
    for number in itertools.count(1):
        folder = path if number == 1 else path.with_name(f"{path.name}-{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
    raise AssertionError("counting ended")


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a run folder while it is written. Raises `UsageError` where another process does.

    On a file system that locks no folders, such as NFS, nothing is held.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"another process trains in {folder}.") from None
        except OSError:
            pass
        yield
    finally:
        os.close(descriptor)


def as_usage_error(function: Callable[[], T]) -> T:
    """Call, turning a `ValueError` into a `UsageError`."""
    try:
        return function()
    except ValueError as error:
        raise UsageError(str(error)) from error


def parsed(path: Path, parse: Callable[[str], T]) -> T:
    """What a JSON file holds; every failure names the file."""
    try:
        return parse(path.read_text())
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not a text file.") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise UsageError(f"{path} is not valid JSON: {error}.") from error
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from error


def problem_text(given: str) -> str:
    """The text of a linear-quadratic problem: what is given, or what the file of that name holds.

    A run keeps the text, for it must not lean on the file. Raises `UsageError` for a file that
    cannot be read or holds no problem.
    """
    if given.lstrip().startswith("{"):
        return given

    def checked(text: str) -> str:
        lq.Problem.from_json(text)
        return json.dumps(json.loads(text))

    return parsed(expanded(given), checked)


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}


def cores_here() -> int:
    """The cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def installed_versions() -> dict[str, str]:
    """Versions of what a run's numbers depend on, and how many cores round its matrix products."""
    packages = ("qscore", "jax", "jaxlib", "equinox", "optax", "numpy", "gymnasium", "mujoco")
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "cores": str(cores_here()),
    }
