"""The command line: tyro over the dataclasses that the library itself is made of.

Exit codes: 0 done, 1 stopped (the environment failed, the disk is full), 2 bad usage or
configuration, 3 training diverged, 130 interrupted. Every failure is one message on stderr.
"""

import atexit
import contextlib
import dataclasses
import difflib
import io
import itertools
import json
import re
import shlex
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, TypeVar

import tyro

from qscore import bench, lq, playback, run
from qscore.algorithms import ALGORITHMS
from qscore.environments import ENVIRONMENTS, EnvironmentFailure, environment_class
from qscore.environments.host import known_ids
from qscore.errors import Interrupted, RunStopped, TrainingDiverged, UsageError, closest
from qscore.export import export
from qscore.folder import (
    Run,
    Settings,
    parsed,
    presets,
    problem_text,
    usual_preset,
    usual_steps,
)
from qscore.panel import read_panel
from qscore.products import Precision
from qscore.sweep import sweep

T = TypeVar("T")


@dataclass(frozen=True)
class Resume:
    """Continue a run from its newest intact checkpoint, bit for bit."""

    run: tyro.conf.Positional[Path]
    """The run folder."""
    steps: int | None = None
    """Steps of each seed in all, at least those already done; None is the run's own. After a data
    set it is the online steps that change, if there are any."""


@dataclass(frozen=True)
class Eval:
    """Evaluate every seed of a run at its newest checkpoint: no exploration, fixed starts."""

    run: tyro.conf.Positional[Path]
    """The run folder."""
    episodes: int = Settings.eval_episodes
    """Episodes per trained seed, in [1, inf)."""
    seed: int = 0
    """Which set of episode starts, in [0, 2^32); training evaluates on 0."""
    best_of: int = 1
    """Also act with the best of N sampled actions by the critic, in [1, inf); reported beside."""
    video: Path | None = None
    """Film the first seed's first episode into this .mp4 or .gif file."""
    record: Path | None = None
    """Write the episodes to this .npz file, a data set for `qscore train --dataset`."""
    random_share: float = 0.0
    """Of a recording: the share of episodes with uniformly random actions, in [0, 1]."""
    noise: float = 0.0
    """Of a recording: standard deviation of Gaussian noise on the other episodes' actions, in [0,
    inf), in half action ranges."""
    explore: bool = False
    """Of a recording: act as in training, with exploration."""
    json: bool = False
    """Print one JSON value on stdout."""


@dataclass(frozen=True)
class List:
    """Name the algorithms and environments there are."""

    what: tyro.conf.Positional[Literal["all", "algorithms", "environments"]] = "all"
    """What to list."""


@dataclass(frozen=True)
class Lq:
    """Solve a linear-quadratic problem in closed form, or evaluate a linear score on it."""

    problem: tyro.conf.Positional[Path]
    """The problem, a JSON file."""
    at: float | None = None
    """Time in seconds, in [0, T], of a problem with a terminal reward; None is 0."""
    score: Path | None = None
    """A score {"K": .., "k": ..} to evaluate; K and k of the result are then the greedy ones."""
    json: bool = False
    """Print one JSON value on stdout."""


@dataclass(frozen=True)
class Plot:
    """Draw the evaluations of runs into one figure."""

    run: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders."""
    out: Path
    """The figure to write, such as returns.png."""


@dataclass(frozen=True)
class Report:
    """Compare runs on one page: which is better, by how much, how sure, and how to repeat them."""

    run: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders, in any mixture of algorithms, tasks and seeds."""
    out: Path
    """The page to write: .html, which needs nothing else, or .md with a folder of pictures."""
    no_films: bool = False
    """Leave out the films of the policies, which take a while to make."""


@dataclass(frozen=True)
class Export:
    """Write a trained policy as NumPy code that acts without JAX, with a model card."""

    run: tyro.conf.Positional[Path]
    """The run folder."""
    to: Path
    """The folder to make."""
    seed: int | None = None
    """The trained seed; None is the first."""
    json: bool = False
    """Print one JSON value on stdout."""


@dataclass(frozen=True)
class Sweep:
    """Many runs from one file: a grid or a search over algorithms, environments, fields, seeds."""

    spec: tyro.conf.Positional[Path]
    """The file, TOML."""
    resume: bool = False
    """Go on with the sweep: what has ended is not repeated, what was cut short continues."""
    retry: bool = False
    """With `resume`: try again what failed, too."""
    json: bool = False
    """Print one JSON value on stdout."""


@dataclass(frozen=True)
class Bench:
    """Measure updates, acting and the whole loop on the cores this process may use."""

    algorithm: tyro.conf.Positional[tuple[str, ...]] = ()
    """Algorithms; none is all of them."""
    environment: str = "HalfCheetah-v5"
    """Where the whole loop is measured."""
    precision: Precision = "f32"
    """Of the networks' matrix products, as for `qscore train`."""
    json: bool = False
    """Print one JSON value on stdout."""


USAGE = """usage: qscore COMMAND ...

  train ALGORITHM ENVIRONMENT   train: qscore train qsm Pendulum-v1 --steps 15000 --out runs/first
  resume RUN                    continue a run, bit for bit
  eval RUN                      evaluate, film: qscore eval runs/first --video policy.mp4
  list                          the algorithms and environments
  lq solve PROBLEM.json         the closed form of a linear-quadratic problem
  plot RUN... --out FILE        learning curves of runs
  report RUN... --out FILE      compare runs on one page: qscore report runs/* --out report.html
  export RUN --to FOLDER        the policy as NumPy code, with a model card
  sweep SPEC.toml               many runs from one file, here or on a cluster
  bench                         speed on this machine

`qscore COMMAND --help` explains every option; for train, name the algorithm and environment first.
"""


def main(args: list[str] | None = None) -> None:
    """The console script. Exits with the codes above."""
    # the last to be registered is the first to be called: an impatient second Ctrl-C, when all has
    # been written, would else end in a traceback of what JAX does at exit
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
    try:
        _dispatch(sys.argv[1:] if args is None else args)
    except UsageError as error:
        _fail(2, error)
    except TrainingDiverged as error:
        _fail(3, error)
    except Interrupted as error:
        _fail(130, error)
    except (RunStopped, EnvironmentFailure) as error:
        _fail(1, error)
    except KeyboardInterrupt:
        _fail(130, "interrupted")
    except BrokenPipeError:
        sys.exit(1)  # the reader of our stdout went away
    except OSError as error:  # a disk that is full, a file that cannot be written
        _fail(1, error)


def _dispatch(args: list[str]) -> None:
    if not args or args[0] in ("-h", "--help"):
        print(USAGE, end="")
        if not args:
            sys.exit(2)
        return
    command, rest = args[0], args[1:]
    if command == "--version":
        print(version("qscore"))
    elif command == "train":
        _train(rest)
    elif command == "lq":
        if rest and rest[0] not in ("solve", "-h", "--help"):
            raise UsageError(unknown("lq command", rest[0], ["solve"]))
        _lq(_parse(Lq, "qscore lq solve", rest[1:] if rest[:1] == ["solve"] else rest))
    elif command in SIMPLE:
        request, carry_out = SIMPLE[command]
        carry_out(_parse(request, f"qscore {command}", rest))
    else:
        raise UsageError(unknown("command", command, ["train", *SIMPLE]))


def _parse(request: type[T], prog: str, args: list[str], **kwargs: Any) -> T:
    """tyro, with its box of an error message folded into one line."""
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            return tyro.cli(request, prog=prog, args=args, config=CONFIG, **kwargs)
    except SystemExit as error:
        if error.code in (0, None):
            raise
    lines = [line.strip("│╭╮╰╯─ ") for line in captured.getvalue().splitlines()[1:]]
    message = " ".join(itertools.takewhile(bool, lines))
    if "Perhaps you meant:" in lines:  # tyro has them in alphabetical order
        found = [line for line in lines if line.startswith("--")]
        mistaken = next((arg for arg in args if arg.startswith("--") and arg in message), "")
        found.sort(key=lambda line: _likeness(mistaken, line.split()[0]), reverse=True)
        message += f" (closest: {', '.join(found[:MAX_CLOSEST])})"
    message = re.sub(
        r"invalid literal for int\(\) with base 10: ('[^']*')", r"\1 is not a whole number", message
    )
    raise UsageError(f"{message} -- see {prog} --help")


def _likeness(word: str, other: str) -> float:
    return difflib.SequenceMatcher(None, word, other).ratio()


MAX_CLOSEST = 2
CONFIG = (tyro.conf.FlagCreatePairsOff, tyro.conf.AvoidSubcommands)


def unknown(kind: str, name: str, known: list[str]) -> str:
    """The message for a name that is none of the known ones."""
    return f"unknown {kind} {name!r}{closest(name, known)}. Known: {', '.join(sorted(known))}."


def _train(args: list[str]) -> None:
    if args and args[0] in ("-h", "--help"):
        print(
            "usage: qscore train ALGORITHM ENVIRONMENT [options]\n\n"
            f"ALGORITHM    one of {', '.join(ALGORITHMS)}\n"
            "ENVIRONMENT  a Gymnasium id (Pendulum-v1), a dm_control id\n"
            "             (dm_control/cartpole-swingup-v0); see `qscore list environments`\n\n"
            "`qscore train qsm Pendulum-v1 --help` explains the options of that pair."
        )
        return
    if len(args) < 2 or args[0].startswith("-") or args[1].startswith("-"):
        raise UsageError(
            "`qscore train` needs an algorithm and an environment first: "
            "qscore train qsm Pendulum-v1 [options]"
        )
    name, task, rest = args[0], args[1], args[2:]
    if name not in ALGORITHMS:
        raise UsageError(unknown("algorithm", name, list(ALGORITHMS)))
    kind, environment = ALGORITHMS[name], environment_class(task)
    offline = bool(set(_values(rest, "--dataset")) - {"None"})
    default = kind(**_preset(kind, rest, usual_preset(name, environment, offline=offline)))
    rest = _inline_problem(rest)
    fields = [
        ("settings", tyro.conf.OmitArgPrefixes[Settings], Settings(steps=usual_steps(environment))),
        ("out", Path | None, None),
        ("algorithm", kind, default),
        ("environment", environment, environment(id=task)),
    ]
    request = dataclasses.make_dataclass("Train", fields)
    request.__doc__ = f"""Train {name} on {task}.

    Args:
        out: Run folder to make; None is runs/ALGORITHM-ENVIRONMENT-DATE.
    """
    asked: Any = _parse(request, f"qscore train {name} {task}", rest)
    settings = dataclasses.asdict(asked.settings)
    _conclude(run.train(asked.algorithm, asked.environment, out=asked.out, **settings))


def _inline_problem(args: list[str]) -> list[str]:
    """`--environment.problem FILE` with the file's text in its place: a run must not lean on it."""
    args, flag = list(args), "--environment.problem"
    for i, arg in enumerate(args):
        name, equals, value = arg.partition("=")
        if name == flag and (equals or i + 1 < len(args)):
            place = i if equals else i + 1
            given = value if equals else args[place]
            text = problem_text(given)
            args[place] = f"{flag}={text}" if equals else text
    return args


def _preset(kind: type, args: list[str], usual: str | None) -> dict[str, str]:
    """The preset among the flags, else the task's usual one: the defaults that others override.

    One that does not exist is left for the parser to refuse.
    """
    known = presets(kind)
    asked = [value for value in _values(args, "--algorithm.preset") if value in known]
    asked = asked or ([usual] if usual else [])
    return {"preset": asked[-1]} if asked else {}


def _values(args: list[str], flag: str) -> list[str]:
    """What follows a flag, as `FLAG VALUE` or `FLAG=VALUE`, at each of its places."""
    words = [word for arg in args for word in arg.split("=", 1)]
    return [value for name, value in itertools.pairwise(words) if name == flag]


def _conclude(done: Run) -> None:
    summary = done.summary
    per_seed = ", ".join(f"{value:.5g}" for value in summary["final_returns"])
    low, high = summary["ci95"]
    if "lq" in summary:
        errors = {**summary["lq"]["relative_error"], "return gap": summary["lq"]["return_gap"]}
        print("error against the closed form, per seed", file=sys.stderr)
        for name, values in errors.items():
            row = "  ".join("infinite" if value is None else f"{value:8.3%}" for value in values)
            print(f"  {name:<21}{row}", file=sys.stderr)
        print(f"learned against exact  {done.folder / 'plots' / 'lq.png'}", file=sys.stderr)
    watch = ["qscore", "eval", str(done.folder), "--video", str(done.folder / "policy.mp4")]
    print(
        f"final return per seed  {per_seed}\n"
        f"interquartile mean     {summary['iqm']:.5g}  (95% over {summary['ci95_over']} "
        f"{low:.5g} to {high:.5g})\n"
        f"speed                  {summary['env_steps_per_second']:.0f} environment steps/s, "
        f"{summary['updates_per_second']:.0f} updates/s\n"
        f"summary                {done.folder / 'summary.json'}\n"
        f"learning curve         {done.folder / 'plots' / 'returns.png'}\n"
        f"watch the policy       {shlex.join(watch)}",
        file=sys.stderr,
    )


def _resume(asked: Resume) -> None:
    _conclude(run.resume(asked.run, steps=asked.steps))


def _eval(asked: Eval) -> None:
    result = playback.evaluate(
        asked.run,
        episodes=asked.episodes,
        seed=asked.seed,
        best_of=asked.best_of,
        video=asked.video,
        record=asked.record,
        random_share=asked.random_share,
        noise=asked.noise,
        explore=asked.explore,
    )
    if asked.json:
        print(json.dumps(result))
        return
    low, high = result["ci95"]
    print(f"{result['episodes']} episodes of each of seeds {result['seeds']}")
    print(f"mean                {result['mean']:.5g}")
    print(f"interquartile mean  {result['iqm']:.5g}")
    print(f"95% interval        {low:.5g} to {high:.5g} (over {result['ci95_over']})")
    if "returns_best_of" in result:
        best = result["returns_best_of"]
        print(f"best of {result['best_of']:<12}mean {sum(best) / len(best):.5g}")
    for name, score in result.get("normalized", {}).items():
        print(f"{'normalised, ' + name:<20}{score:.5g}")
    if asked.video:
        print(f"video               {asked.video}")
    if asked.record:
        print(f"recorded            {result['recorded']['steps']} steps in {asked.record}")


def _list(asked: List) -> None:
    if asked.what != "environments":
        print("algorithms:")
        for name, kind in ALGORITHMS.items():
            print(f"  {name:<14}{(kind.__doc__ or '').splitlines()[0]}")
    if asked.what != "algorithms":
        print("environments (of Gymnasium's, those whose spaces are boxes can be trained in):")
        for name in [*ENVIRONMENTS, *known_ids()]:
            print(f"  {name}")


def _lq(asked: Lq) -> None:
    problem = parsed(asked.problem, lq.Problem.from_json)
    if asked.at is not None and problem.terminal is None:
        raise UsageError(f"--at {asked.at:g} needs a problem with a `terminal`; it has none.")
    at = asked.at or 0.0
    try:
        if asked.score is None:
            solution = lq.solve(problem, at=at)
        else:
            K, k = parsed(asked.score, problem.read_score)
            solution = lq.evaluate(problem, K, k, at=at)
    except ValueError as error:
        raise UsageError(f"{asked.problem}: {error}") from error
    if asked.json:
        print(solution.to_json())
        return
    horizon = "infinite horizon" if problem.terminal is None else f"T = {problem.terminal.T:g} s"
    print(
        f"{problem.state_size} state and {problem.action_size} action components, {horizon}\n"
        + ("Q = -1/2 z'Pz + p'z + c, optimal" if asked.score is None else "Q of the given score")
        + ("" if problem.terminal is None else f", at t = {at:g} s")
    )
    for name, value in json.loads(solution.to_json()).items():
        rows = value if name in "PK" else [value if isinstance(value, list) else [value]]
        for i, row in enumerate(rows):
            print(f"{name if i == 0 else '':<10}" + " ".join(f"{number:14.8g}" for number in row))


def _plot(asked: Plot) -> None:
    from qscore.plots import plot_returns  # Matplotlib takes a second, which not every command has

    if not asked.out.suffix:
        raise UsageError(f"`out` must end in a kind of picture, such as .png; got {asked.out}.")
    panel = read_panel(asked.run)
    for note in panel.notes:
        print(f"note: {note}", file=sys.stderr)
    try:
        plot_returns(panel, asked.out)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot plot to {asked.out}: {error}.") from error
    print(asked.out)


def _report(asked: Report) -> None:
    from qscore.report import report  # (see `_plot`)

    panel = report(asked.run, asked.out, films=not asked.no_films)
    for note in panel.notes:
        print(f"note: {note}", file=sys.stderr)
    print(asked.out)


def _export(asked: Export) -> None:
    measured = export(asked.run, asked.to, seed=asked.seed)
    if asked.json:
        print(json.dumps(measured))
        return
    print(
        f"{asked.to}: an action takes {measured['latency_milliseconds']:.3f} ms and differs from "
        f"the original's by at most {measured['max_difference']:.1e} half action ranges"
    )


def _sweep(asked: Sweep) -> None:
    done = sweep(asked.spec, resume=asked.resume, retry=asked.retry)
    if asked.json:
        print(json.dumps({**done.counts, "failures": done.failures, "out": str(done.folder)}))
    for task, best in done.counts["best"].items():
        said = f"{best['return']:.5g} over {best['trials']} trials, {best['configuration']}"
        print(f"best on {task:<13} {said}", file=sys.stderr)
    if done.report is not None:
        print(f"report                {done.report}", file=sys.stderr)
    if done.unreported:
        print(f"note: the runs are not compared on a page: {done.unreported}", file=sys.stderr)
    waiting = done.counts["waiting"]
    if waiting and not done.failures:
        print(f"note: {waiting} trials less than asked: the space has no more", file=sys.stderr)
    if done.failures:
        for name, message in done.failures.items():
            print(f"failed: {name}: {message}", file=sys.stderr)
        left = f", {waiting} were not begun" if waiting else ""
        raise RunStopped(
            f"{len(done.failures)} of {done.counts['expected']} trials failed{left}; to try those "
            f"again: {done.retry}"
        )


def _bench(asked: Bench) -> None:
    for name in asked.algorithm:
        if name not in ALGORITHMS:
            raise UsageError(unknown("algorithm", name, list(ALGORITHMS)))
    names = asked.algorithm or tuple(ALGORITHMS)
    measure = bench.measure if len(names) == 1 else bench.measure_apart
    rows = [measure(name, asked.environment, asked.precision) for name in names]
    print(json.dumps(rows) if asked.json else bench.table(rows))


SIMPLE: dict[str, tuple[type, Callable[[Any], None]]] = {
    "resume": (Resume, _resume),
    "eval": (Eval, _eval),
    "list": (List, _list),
    "lq": (Lq, _lq),
    "plot": (Plot, _plot),
    "report": (Report, _report),
    "export": (Export, _export),
    "sweep": (Sweep, _sweep),
    "bench": (Bench, _bench),
}


def _fail(code: int, error: object) -> None:
    print(f"qscore: {error}", file=sys.stderr)
    sys.exit(code)
