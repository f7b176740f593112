"""The engine of many machines: Ray Tune starts the trials, and starts them again elsewhere.

Tune schedules, watches the nodes, stops early and searches. A trial's checkpoints are those of its
own run folder, which every node sees; so a trial that lost its node goes on from there on another
one. Tune's own notes lie in `ray/` under the sweep's folder, and nothing is read from them: what an
earlier sitting did is known from the sweep's own files.
"""

import logging
import os
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

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
from ray.tune.search import Searcher
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from qscore.errors import RunStopped, UsageError
from qscore.folder import Run, cores_here, installed_versions
from qscore.sweep.board import ENDED, Board
from qscore.sweep.process import Attempt, Evaluation, wait, wait_for_end
from qscore.sweep.spec import REPEATS, Dimension, Sweep, Trial

ANSWER_SECONDS = 120.0
"""How long a node may take to answer."""

CONNECT_SECONDS = 10.0
"""How long the head of a cluster may take to accept a connection."""

STEP_SECONDS = 5.0
"""A step of Tune's takes so long, and the last one twice: a trial cannot be stopped within one."""

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
            if news.step == Run.open(self.attempt.folder).settings.total_steps:
                # a summary follows, which an early stop at the last step would prevent
                wait(self.attempt, seconds=STEP_SECONDS)
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


class Optuna(Searcher):
    """A study of Optuna's that is told what has ended, also in earlier sittings.

    It begins with what was cut short, and suggests no configuration twice; where nearly all have
    been tried, it ends the sweep.
    """

    def __init__(self, sweep: Sweep, board: Board):
        super().__init__(metric="value", mode="max")
        assert sweep.search is not None
        self.resolve, self.choices = _chosen(sweep), {}
        self.distributions = {}
        for path, each in sweep.space.items():
            name = ".".join(path)
            self.choices[name], self.distributions[name] = each.choices, _distribution(each)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        # with the seed alone, it would draw again what it drew in the sitting before
        seed = sweep.search.seed + len(board.entries)
        self.study = optuna.create_study(
            direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed)
        )
        self.asked: dict[str, optuna.Trial] = {}
        self.tried = set(board.names(*ENDED))
        for name, entry in board.entries.items():
            chosen = self._encoded(entry.trial)
            if name not in self.tried:
                self.study.enqueue_trial(chosen)
            elif entry.value is not None and entry.stage != "failed":
                told = optuna.create_trial(
                    params=chosen, distributions=self.distributions, value=entry.value
                )
                self.study.add_trial(told)

    def _encoded(self, trial: Trial) -> Config:
        """What `resolve` makes the trial of."""
        return {
            name: self.choices[name].index(value) if self.choices[name] else value
            for name, value in trial.chosen.items()
        }

    def suggest(self, trial_id: str) -> Config | str:  # pyright: ignore (as Ray documents it)
        for _ in range(REPEATS):
            asked = self.study.ask(self.distributions)
            name = self.resolve(asked.params).name
            if name not in self.tried:
                self.tried.add(name)
                self.asked[trial_id] = asked
                return asked.params
            self.study.tell(asked, state=optuna.trial.TrialState.FAIL)
        return Searcher.FINISHED

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        found = result or {}
        value = None if error or found.get("stage") == "failed" else found.get("value")
        state = optuna.trial.TrialState.FAIL if value is None else None
        if (asked := self.asked.pop(trial_id, None)) is not None:  # Tune may say it twice
            self.study.tell(asked, value, state=state)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: what is to be known of a trial is known from the sweep's own files."""


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
        if address is not None:
            _check_address(sweep, address)
        options = {} if address else {"num_cpus": cores_here(), "include_dashboard": False}
        try:
            ray.init(
                address or "local", log_to_driver=False, logging_level=logging.ERROR, **options
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            _refuse_address(sweep, address, error)
    try:
        _check_cluster(sweep)
        yield
    finally:
        if mine:
            ray.shutdown()


def _check_address(sweep: Sweep, address: str) -> None:
    """Refuse one where nothing listens at once: Ray would try it for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
        except (OSError, OverflowError) as error:
            _refuse_address(sweep, address, error)


def _refuse_address(sweep: Sweep, address: str | None, error: Exception) -> NoReturn:
    said = str(error).strip().splitlines()[0]
    sweep.file.refuse(("resources", "address"), f"no Ray cluster at {address!r}: {said}")


def _check_cluster(sweep: Sweep) -> None:
    resources = sweep.resources
    nodes = [node for node in ray.nodes() if node["Alive"]]
    needed = {"CPU": resources.cores * resources.share, "GPU": resources.gpus}
    for kind, count in needed.items():
        most = max(node["Resources"].get(kind, 0.0) for node in nodes)
        if count > most:
            sweep.file.refuse(
                ("resources", {"CPU": "cores", "GPU": "gpus"}[kind]),
                f"a trial needs {count:g} {kind}, and the largest of the {len(nodes)} nodes has "
                f"{most:g}.",
            )
    _check_nodes(sweep, nodes)


def _check_nodes(sweep: Sweep, nodes: list[dict[str, Any]]) -> None:
    """Ask every node whether it has this version, and sees a file that is made here."""
    out = sweep.out.absolute()
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
                sweep.file.refuse(
                    ("out",),
                    f"node {address} does not see {place}, where `out` is; a sweep over several "
                    "nodes needs a folder that all of them share.",
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
        assert sweep.search is not None
        searcher, samples = Optuna(sweep, board), sweep.search.samples - len(board.names(*ENDED))
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
    for name in board.names("running"):  # Tune lets go of what it stops without a word
        wait_for_end(out / name)
        board.ended(name, "interrupted")


def _named(trials: dict[str, Trial]) -> Callable[[Config], Trial]:
    return lambda config: trials[config["trial"]]


def _chosen(sweep: Sweep) -> Callable[[Config], Trial]:
    """Where Optuna chooses: choices by their number, as it knows no lists."""
    make, space = sweep.make, {".".join(path): each for path, each in sweep.space.items()}

    def resolve(config: Config) -> Trial:
        return make(
            {
                name: space[name].choices[value]
                if space[name].choices
                else space[name].rounded(value)
                for name, value in config.items()
            }
        )

    return resolve


def _distribution(dimension: Dimension) -> Any:
    """A dimension in Optuna's terms; of choices, their numbers."""
    low, high = dimension.low, dimension.high
    if low is None or high is None:
        return optuna.distributions.CategoricalDistribution(range(len(dimension.choices)))
    if dimension.whole:
        return optuna.distributions.IntDistribution(int(low), int(high), log=dimension.log)
    return optuna.distributions.FloatDistribution(low, high, log=dimension.log)
