"""The engine of many machines: Ray Tune starts the trials, and starts them again elsewhere.

Tune schedules, watches the nodes, stops early and searches. A trial's checkpoints are those of its
own run folder, which every node sees; so a trial that lost its node goes on from there on another
one. Tune's own notes lie in `ray/` under the sweep's folder, and nothing is read from them: what an
earlier sitting did is known from the sweep's own files.
"""

import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the sweep has a table of its own,
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # the runs have their own logs,
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # and the sweep stops its trials itself
# under `uv run`, Ray would send the working folder to every node and install it there anew
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
# a trial that fails at once has no return to report
os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")

import optuna
import ray
from ray import tune
from ray.exceptions import GetTimeoutError, RayError
from ray.tune.error import TuneError
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import ConcurrencyLimiter
from ray.tune.search.optuna import OptunaSearch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from qscore.errors import RunStopped, UsageError
from qscore.folder import cores_here, installed_versions
from qscore.sweep.board import Board
from qscore.sweep.process import Attempt, Evaluation, wait
from qscore.sweep.spec import Dimension, Sweep, Trial, rounded

ANSWER_SECONDS = 120.0
"""How long a node may take to answer."""

STEP_SECONDS = 5.0
"""A step of Tune's takes no longer, for a trial cannot be stopped within one."""

NEVER = 10**12
"""Steps that no trial takes: early stopping is not what ends one that comes to its last step."""

Config = dict[str, Any]
"""What Tune gives a trial: its name, or what Optuna chose for it."""


class TrialOfTune(tune.Trainable):
    """One trial in Tune's terms; a step ends with an evaluation, with the trial, or soon."""

    attempt: Attempt | None = None

    def setup(self, config: Config, begin: Callable[[Config], Attempt]) -> None:
        self.begin = begin
        self.reset_config(config)

    def reset_config(self, new_config: Config) -> bool:
        """Do the next trial: starting a process of Ray's for each would take longer than some."""
        self.cleanup()
        self.attempt = self.begin(new_config)
        self.found: dict[str, Any] = {}
        return True

    def step(self) -> dict[str, Any]:
        assert self.attempt is not None
        if (news := wait(self.attempt, seconds=STEP_SECONDS)) is not None:
            self.found = {"env_steps": news.step, "value": news.value}
        state = self.attempt.state()
        if state == "lost":
            raise RuntimeError(self.attempt.message())
        if state == "running":
            return self.found
        message = self.attempt.message() if state == "failed" else ""
        return self.found | {"done": True, "stage": state, "message": message}

    def cleanup(self) -> None:
        if self.attempt is not None:
            self.attempt.stop()


class Unkept:
    """What Tune cannot keep: it pickles all that it is given, for a restoring that is not ours."""

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return object, ()


class ToBoard(Unkept, tune.Callback):
    """Tells the board what Tune sees."""

    def __init__(self, board: Board, resolve: Callable[[Config], Trial], stopping: Any):
        self.board, self.resolve, self.stopping = board, resolve, stopping

    def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        ours = self.resolve(trial.config)
        self.board.add(ours)
        self.board.begun(ours.name)

    def on_trial_result(
        self, iteration: int, trials: list, trial: Any, result: dict, **info: Any
    ) -> None:
        if "value" in result:
            name = self.resolve(trial.config).name
            self.board.evaluated(name, Evaluation(result["env_steps"], result["value"]))

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        ours, last = self.resolve(trial.config), trial.last_result or {}
        stage = last.get("stage")
        if stage is None and last.get("env_steps") == ours.settings.total_steps:
            stage = "done"  # its process is about to write the summary
        elif stage is None:
            stage = "interrupted" if self.stopping() else "stopped"
        self.board.ended(ours.name, stage, last.get("message", ""))

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        said = str(trial.get_error() or "lost").strip().splitlines()
        self.board.ended(self.resolve(trial.config).name, "failed", said[-1])


class StopAll(Unkept, tune.Stopper):
    """Ends the sweep once it is told to, or once too many trials have failed."""

    def __init__(self, stopping: Callable[[], bool]):
        self.stopping = stopping

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self.stopping()


@contextmanager
def ready(sweep: Sweep) -> Iterator[None]:
    """Be connected to the cluster; one that is started here is gone afterwards.

    Raises `UsageError` where there is none at its address, where no node has what a trial needs,
    and where a node does not have this version of qscore or does not see the sweep's folder.
    """
    address, mine = sweep.resources.address, not ray.is_initialized()
    if mine:
        options = {} if address else {"num_cpus": cores_here(), "include_dashboard": False}
        try:
            ray.init(
                address or "local", log_to_driver=False, logging_level=logging.ERROR, **options
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            said = str(error).strip().splitlines()[0]
            raise UsageError(f"no Ray cluster at {address!r}: {said}") from error
    try:
        _check_cluster(sweep)
        yield
    finally:
        if mine:
            ray.shutdown()


def _check_cluster(sweep: Sweep) -> None:
    resources = sweep.resources
    nodes = [node for node in ray.nodes() if node["Alive"]]
    needed = {"CPU": resources.cores * resources.share, "GPU": resources.gpus}
    for kind, count in needed.items():
        most = max(node["Resources"].get(kind, 0.0) for node in nodes)
        if count > most:
            raise UsageError(
                f"a trial needs {count:g} {kind}, and the largest of the {len(nodes)} nodes has "
                f"{most:g}; see [resources]."
            )
    _check_nodes(nodes, sweep.out.absolute())


def _check_nodes(nodes: list[dict[str, Any]], out: Path) -> None:
    """Ask every node whether it has this version, and sees a file that is made here."""
    place = next(folder for folder in (out, *out.parents) if folder.is_dir())
    mine = installed_versions()["qscore"]
    with tempfile.NamedTemporaryFile(dir=place, prefix=".qscore-", delete=True) as token:
        ask = ray.remote(_seen_from_here)
        answers = {}
        for node in nodes:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            asked = ask.options(num_cpus=0, scheduling_strategy=there).remote(token.name)
            answers[f"{node['NodeManagerAddress']} ({node['NodeID'][:8]})"] = asked
        for address, answer in answers.items():
            try:
                seen, version = ray.get(answer, timeout=ANSWER_SECONDS)
            except GetTimeoutError as error:
                raise UsageError(
                    f"node {address} did not answer in {ANSWER_SECONDS:.0f} s."
                ) from error
            except RayError as error:
                said = str(error).strip().splitlines()[-1]
                raise UsageError(f"node {address} cannot run qscore: {said}") from error
            if version != mine:
                raise UsageError(f"node {address} has qscore {version}, and this one {mine}.")
            if not seen:
                raise UsageError(
                    f"node {address} does not see {place}, where `out` is; a sweep over several "
                    "nodes needs a folder that all of them share."
                )


def _seen_from_here(path: str) -> tuple[bool, str]:
    return os.path.exists(path), installed_versions()["qscore"]


def run(
    sweep: Sweep,
    todo: Sequence[Trial],
    board: Board,
    stopping: Callable[[], bool],
    attempt: Callable[..., Attempt] = Attempt,
) -> None:
    """Do the trials, in their order, as long as not too many have failed."""
    resources = sweep.resources
    if sweep.adaptive:
        space, resolve = {}, _chosen(sweep)
        searcher, samples = _optuna(sweep, board)
    else:
        named = {trial.name: trial for trial in todo}
        space, resolve = {"trial": tune.grid_search(list(named))}, _named(named)
        searcher, samples = None, min(1, len(todo))
    if samples <= 0:
        return

    def ending() -> bool:
        return stopping() or board.hopeless(sweep.failures.most)

    scheduler = None
    if sweep.stop_early is not None:
        scheduler = ASHAScheduler(
            time_attr="env_steps",
            max_t=NEVER,
            grace_period=sweep.stop_early.grace,
            reduction_factor=sweep.stop_early.factor,
        )
    out, cores = sweep.out.absolute(), resources.cores
    part = {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 * resources.gpus:.3f}"}
    environ = part if 0 < resources.gpus < 1 else {}

    def begin(config: Config) -> Attempt:
        trial = resolve(config)
        return attempt(trial.command(out / trial.name), out / trial.name, cores, environ)

    trainable = tune.with_parameters(TrialOfTune, begin=begin)
    tuner = tune.Tuner(
        tune.with_resources(
            trainable, {"cpu": resources.cores * resources.share, "gpu": resources.gpus}
        ),
        param_space=space,
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            scheduler=scheduler,
            num_samples=samples,
            max_concurrent_trials=resources.workers,
            reuse_actors=True,
            trial_dirname_creator=lambda trial: trial.trial_id,
            metric="value" if scheduler else None,  # a searcher has its own
            mode="max" if scheduler else None,
        ),
        run_config=tune.RunConfig(
            name="ray",
            storage_path=str(sweep.out.absolute()),
            stop=StopAll(ending),
            callbacks=[ToBoard(board, resolve, stopping)],
            failure_config=tune.FailureConfig(max_failures=sweep.failures.retries),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            verbose=0,
        ),
    )
    try:
        tuner.fit()
    except TuneError as error:
        raise RunStopped(f"Ray Tune ended: {str(error).strip().splitlines()[-1]}") from error


def _named(trials: dict[str, Trial]) -> Callable[[Config], Trial]:
    return lambda config: trials[config["trial"]]


def _chosen(sweep: Sweep) -> Callable[[Config], Trial]:
    """Where Optuna chooses: choices by their number, as it knows no lists."""
    make, space = sweep.make, {".".join(path): each for path, each in sweep.space.items()}

    def resolve(config: Config) -> Trial:
        return make(
            {
                name: space[name].choices[value] if space[name].choices else rounded(value)
                for name, value in config.items()
            }
        )

    return resolve


def _optuna(sweep: Sweep, board: Board) -> tuple[Any, int]:
    """The searcher, told of what has ended and to begin with what was cut short; samples left."""
    assert sweep.search is not None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = {".".join(path): _domain(each) for path, each in sweep.space.items()}
    choices = {".".join(path): each.choices for path, each in sweep.space.items() if each.choices}

    def encoded(trial: Trial) -> Config:
        return {k: choices[k].index(v) if k in choices else v for k, v in trial.chosen.items()}

    unfinished = [encoded(board.entries[name].trial) for name in board.names("waiting")]
    searcher = OptunaSearch(
        OptunaSearch.convert_search_space(space),
        metric="value",
        mode="max",
        points_to_evaluate=unfinished or None,
        seed=sweep.search.seed,
    )
    ended = [board.entries[name] for name in board.names("done", "stopped", "failed")]
    for entry in ended:
        if entry.value is not None:
            searcher.add_evaluated_point(encoded(entry.trial), entry.value)
    workers = sweep.resources.workers
    limited = ConcurrencyLimiter(searcher, workers) if workers else searcher
    return limited, sweep.search.samples - len(ended)


def _domain(dimension: Dimension) -> Any:
    """A dimension in Tune's terms."""
    low, high = dimension.low, dimension.high
    if low is None or high is None:
        return tune.choice(list(range(len(dimension.choices))))
    if dimension.whole:
        return (tune.lograndint if dimension.log else tune.randint)(int(low), int(high) + 1)
    return (tune.loguniform if dimension.log else tune.uniform)(low, high)
