"""Sweeps: what a file stands for, what is refused, and that every trial is an ordinary run."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import QUICK_PROCESS

import qscore as qs
from qscore.environments import LQ
from qscore.sweep import _alone, _begun, _check_trials, _report, process, sweep
from qscore.sweep.board import Board, Stage, read_trials
from qscore.sweep.process import Evaluation
from qscore.sweep.spec import Dimension, Failures, Resources, parse

GRID = """
algorithms = ["qsm", "td3"]
environments = ["Pendulum-v1", "lq"]
seeds = [3, 4, 7]

[settings]
steps = 500

[algorithm]
batch_size = 32

[algorithm.td3]
policy_delay = 1

[environment.lq]
dt = 0.05

[grid]
"algorithm.qsm.hidden" = [[8], [16, 16]]
"settings.eval_episodes" = [1, 2]
"""


def test_a_grid_is_every_combination_with_every_seed():
    trials = {trial.name: trial for trial in parse(GRID, "g.toml").trials}
    assert len(trials) == 2 * (2 * 2 + 2) * 3
    trial = trials["Pendulum-v1-qsm-hidden=16x16-eval_episodes=2/seed-7"]
    assert trial.algorithm == qs.QSM(batch_size=32, hidden=(16, 16))
    assert trial.environment == qs.Host("Pendulum-v1")
    settings = trial.settings
    assert (settings.steps, settings.eval_episodes) == (500, 2)
    assert settings.seed_list == [7]
    other = trials["lq-td3-eval_episodes=1/seed-3"]
    assert other.algorithm == qs.TD3(batch_size=32, policy_delay=1)
    assert other.environment == LQ(id="lq", dt=0.05)


def test_a_trial_is_the_command_by_hand():
    text = 'algorithms = ["cqsm", "td3"]\nenvironments = ["lq"]\nseeds = 4\nseeds_per_trial = 2'
    cqsm, more, *_ = parse(text, "g.toml").trials
    assert (cqsm.name, more.name) == ("lq-cqsm/seed-0-to-1", "lq-cqsm/seed-2-to-3")
    assert cqsm.algorithm == qs.CQSM(preset="linear_quadratic")  # as `qscore train cqsm lq`
    assert cqsm.settings.steps == LQ.default_steps
    words = more.command(Path("out"))
    assert words[:4] == ["qscore", "train", "cqsm", "lq"]
    for flag, value in (("--seed-start", "2"), ("--seeds", "2"), ("--out", "out")):
        assert words[words.index(flag) + 1] == value


def test_the_files_of_the_documentation_are_in_order():
    page = (Path(__file__).parents[1] / "docs" / "sweep.md").read_text()
    counts = [
        len(parse(text, "d.toml").trials) for text in re.findall(r"```toml\n(.*?)```", page, re.S)
    ]
    assert counts == [24, 60, 10, 2]
    assert page.count("`[resources]`") and all(
        f"| `{field.name}` |" in page
        for kind in (Resources, Failures)
        for field in dataclasses.fields(kind)
    )


def test_draws_stay_within_their_range():
    generator = np.random.default_rng(0)
    for log in (False, True):
        narrow = Dimension(low=0.9999, high=0.99999, log=log)
        drawn = {narrow.draw(generator) for _ in range(100)}
        assert all(narrow.holds(value) for value in drawn) and len(drawn) > 1
        assert narrow.rounded(0.999_99) == 0.999_99


def test_a_problem_may_be_a_file(tmp_path, monkeypatch):
    head = 'algorithms = ["cqsm"]\nenvironments = ["lq"]\n[environment.lq]\n'
    file = tmp_path / "problem.json"
    file.write_text(LQ("lq").problem)
    (trial,) = parse(f'{head}problem = "{file}"', "s.toml").trials
    assert isinstance(trial.environment, LQ)
    assert json.loads(trial.environment.problem) == json.loads(LQ("lq").problem)
    with pytest.raises(qs.UsageError, match=r"s.toml, line 4: cannot read .*gone.json: No such"):
        parse(f'{head}problem = "{tmp_path}/gone.json"', "s.toml")
    file.write_text("[" * 100_000)
    with pytest.raises(qs.UsageError, match=r"problem.json is not valid JSON"):
        parse(f'{head}problem = "{file}"', "s.toml")


def test_whole_numbers_stand_for_real_ones():
    text = 'algorithms = ["qsm"]\nenvironments = ["lq"]\n[algorithm]\nscore_scale = 30'
    (trial,) = parse(text, "g.toml").trials
    assert isinstance(trial.algorithm, qs.QSM) and type(trial.algorithm.score_scale) is float


SEARCH = """
algorithms = ["qsm"]
environments = ["Pendulum-v1"]
[search]
samples = 40
seed = 1
[search.space]
"algorithm.actor_lr" = { low = 1e-5, high = 1e-2, log = true }
"algorithm.noise_levels" = { low = 2, high = 4 }
"algorithm.hidden" = { choices = [[8], [16]] }
"""


def test_a_random_search_draws_from_its_space_the_same_every_time():
    algorithms: list[Any] = [trial.algorithm for trial in parse(SEARCH, "s.toml").trials]
    assert algorithms == [trial.algorithm for trial in parse(SEARCH, "s.toml").trials]
    rates = np.log10([a.actor_lr for a in algorithms])
    assert -5 < rates.min() < -4.5 and -2.5 < rates.max() < -2
    assert {a.noise_levels for a in algorithms} == {2, 3, 4}
    assert {a.hidden for a in algorithms} == {(8,), (16,)}
    other = parse(SEARCH.replace("seed = 1", "seed = 2"), "s.toml").trials
    assert algorithms != [trial.algorithm for trial in other]


def test_random_configurations_are_all_different_and_only_where_something_varies():
    text = SEARCH.replace("samples = 40", "samples = 6").replace('["qsm"]', '["qsm", "sac"]')
    text = re.sub('"algorithm.actor_lr.*\n', "", text).replace("m.hidden", "m.qsm.hidden")
    text = text.replace("m.noise_levels", "m.qsm.noise_levels")
    names = [trial.name for trial in parse(text, "s.toml").trials]
    assert len(set(names)) == len(names) == 6 + 1 and names[-1] == "Pendulum-v1-sac/seed-0"


def test_ranges_of_whole_numbers_reach_both_ends_evenly():
    draws = [Dimension(low=1, high=3).draw(np.random.default_rng(i)) for i in range(900)]
    assert all(250 < draws.count(value) < 350 for value in (1, 2, 3))


def changed(old: str, new: str) -> str:
    assert old in GRID
    return GRID.replace(old, new)


BAD = {
    "not TOML": (GRID + "x = [", "is not valid TOML"),
    "unknown name": (changed("seeds", "seed"), r"line 4: unknown name 'seed'. Known: algorithms"),
    "unknown algorithm": (changed('"td3"]', '"td4"]'), "line 2: unknown algorithm 'td4'"),
    "unknown field": (changed("batch_size", "batch"), "line 10: `QSM` has no field 'batch'"),
    "unknown setting": (changed("steps = 500", "step = 5"), "line 7: `Settings` has no field"),
    "unknown field in the grid": (
        changed("algorithm.qsm.hidden", "algorithm.qsm.hiden"),
        "line 19: `QSM` has no field 'hiden'",
    ),
    "no such place": (changed("algorithm.qsm.h", "algorithm.sac.h"), "line 19: .* names no field"),
    "bad value": (changed("[8]", "[0]"), r"line 19: `hidden` must lie in \[1, inf\)"),
    "empty axis": (changed("[1, 2]", "[]"), "line 20: .* must be a list of at least one"),
    "repeated value": (changed("[1, 2]", "[2, 2]"), "line 20: 2 is listed twice"),
    "repeated name": (changed('"td3"]', '"qsm"]'), "line 2: 'qsm' is listed twice"),
    "another's table": (changed("[algorithm.td3]", "[algorithm.sac]"), "line 12: no algorithm"),
    "no seed": (changed("[3, 4, 7]", "0"), "line 4: `seeds` must be how many"),
    "seeds apart": (
        changed("[3, 4, 7]", "[3, 4, 7]\nseeds_per_trial = 3"),
        r"line 5: the seeds of one trial must follow each other; got \[3, 4, 7\]",
    ),
    "seeds in the wrong place": (changed("steps = 500", "seeds = 2"), "line 7: seeds are set by"),
    "unknown engine": ('engine = "slurm"\n' + GRID, "line 1: `engine` must be 'local' or 'ray'"),
    "no list": (changed('["Pendulum-v1", "lq"]', '"lq"'), "line 3: .* must be a list"),
    "no environment": (changed('["Pendulum-v1", "lq"]', "[]"), "line 3: .* of at least one"),
    "both": (GRID + "[search]\nsamples = 2\n[search.space]\n'algorithm.batch_size' = "
             "{low=1, high=2}", r"line 18: give either \[grid\] or \[search\]"),
    "optuna here": (
        SEARCH.replace("samples = 40", 'samples = 4\nsampler = "optuna"'),
        "line 6: `sampler` 'optuna' needs engine = 'ray'",
    ),
    "bounds": (SEARCH.replace("low = 2", "low = 9"), "line 9: `low` must be below `high`"),
    "half a range": (SEARCH.replace("low = 2, ", ""), "line 9: give either `low` and `high`"),
    "beyond": (SEARCH.replace("high = 4", "high = 4_000"), "line 9: `noise_levels` must lie"),
    "no samples": (SEARCH.replace("samples = 40", ""), r"line 4: \[search\] lacks `samples`"),
    "early here": (GRID + "[stop_early]\ngrace = 10", r"line 21: \[stop_early\] needs engine"),
    "no list of choices": (
        SEARCH.replace("[[8], [16]]", "3"), "line 10: .*choices` must be a list; got 3"
    ),
    "no choice": (SEARCH.replace("[[8], [16]]", "[]"), "line 10: give .* of at least one"),
    "a choice twice": (SEARCH.replace("[16]", "[8]"), r"line 10: `choices` has \[8\] twice"),
    "log of what": (SEARCH.replace("log = true", "log = 1"), "line 8: `log` must be true or false"),
    "too small a space": (
        re.sub('"algorithm.(actor_lr|noise).*\n', "", SEARCH), "line 5: `samples` is 40, .* than 2"
    ),
    "infinite": (GRID.replace("batch_size = 32", "critic_lr = inf"), "line 10: `critic_lr`"),
    "too many seeds": (changed("[3, 4, 7]", "1000000000"), "line 4: `seeds` is 1000000000;"),
    "too large a seed": (changed("7]", "99999999999]"), r"line 4: `seed_start` must lie"),
    "too many trials": (changed("[1, 2]", str(list(range(1, 20000)))), "line 18: .* at most"),
    "too many samples": (
        "seeds = 11" + SEARCH.replace("samples = 40", "samples = 10_000"),
        "line 5: a sweep has at most 100000 trials; got 10000 `samples` for each of 1 pairs and 11",
    ),
    "too long a name": (changed("[8]", str([1000] * 60)), "line 18: a folder would have a name of"),
    "one field twice": (
        GRID + '"algorithm.hidden" = [[8], [9]]', "line 21: .* sets what 'algorithm.qsm.h"
    ),
    "one field drawn twice": (
        SEARCH + '"algorithm.qsm.hidden" = { choices = [[8], [9]] }',
        "line 11: 'algorithm.qsm.hidden' sets what 'algorithm.hidden' sets, too",
    ),
    "seeds in the grid": (GRID + '"settings.seeds" = [1, 2]', "line 21: seeds are set by"),
    "stopped too late": (
        'engine = "ray"\n' + changed('"Pendulum-v1", ', "") + "[stop_early]\ngrace = 500",
        "line 23: `grace` must be below `settings.steps`",
    ),
    "no address": (GRID + '[resources]\naddress = ""', "line 22: `address` must be HOST:PORT"),
    "resources": (GRID + "[resources]\ncores = 0", r"line 22: `cores` must lie in \[1, inf\)"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "message"), BAD.values(), ids=list(BAD))
def test_a_bad_file_is_refused_with_its_line(text, message):
    with pytest.raises(qs.UsageError, match=message):
        parse(text, "g.toml")


TASKS = '''
"""Tasks that misbehave; each is otherwise the same as Fine."""
import os, signal, time
import gymnasium as gym
import numpy as np
from pathlib import Path

class Fine(gym.Env):
    observation_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
    action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)
    taken = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.point = self.np_random.uniform(-0.5, 0.5)
        return np.array([self.point, 1.0], np.float32), {}

    def step(self, action):
        self.taken += 1
        self.trouble()
        self.point = float(np.clip(self.point + 0.1 * float(action[0]), -1.0, 1.0))
        return np.array([self.point, 1.0], np.float32), -self.point**2, False, False, {}

    def trouble(self):
        pass

class Breaks(Fine):
    def trouble(self):
        if self.taken > 70:
            raise OSError("the sensor is unplugged")

class Explodes(Fine):
    def step(self, action):
        observation, reward, *rest = super().step(action)
        return observation, 1e30 * reward, *rest  # its square is no number of 32 bits

class Dies(Fine):  # once, as if the system had run out of memory
    def trouble(self):
        marker = Path(os.environ["SWEEP_MARKER"])
        if self.taken == 150 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)

class Held(Fine):  # short of its last evaluation, for as long as the gate is shut
    def trouble(self):
        if self.taken > 245 and not Path(os.environ["SWEEP_GATE"]).exists():
            time.sleep(1.0)

for kind in (Fine, Breaks, Explodes, Dies, Held):
    gym.register(f"{kind.__name__}-v0", entry_point=kind, max_episode_steps=10)
'''

SWEEP = """
out = "{out}"
algorithms = ["td3"]
environments = {environments}
seeds = {seeds}
[settings]
steps = 300
eval_every = 100
eval_episodes = 2
[algorithm]
hidden = [4]
batch_size = 4
warmup_steps = 50
[resources]
workers = {workers}
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """The environment in which processes find the tasks above; this process does, too."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "sweep_tasks.py").write_text(TASKS)
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    environ = dict(os.environ)
    environ.pop("PJRT_NPROC", None)  # trials have cores of their own
    return environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "SWEEP_MARKER": str(folder / "died"),
        "RAY_worker_niceness": "0",  # the other tests would leave them little at Ray's 15
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # the test connects before the sweep can say so
        "JAX_COMPILATION_CACHE_DIR": str(folder / "programs"),  # which are the same in all trials
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.05",
        **QUICK_PROCESS,
    }


@pytest.fixture
def gate(tasks, tmp_path):
    """What the task Held waits for; it is shut until someone makes this file."""
    tasks["SWEEP_GATE"] = str(tmp_path / "gate")
    return tmp_path / "gate"


def write(
    folder: Path, *names: str, seeds: int | list[int] = 1, workers: int = 2, more: str = ""
) -> Path:
    """A file that asks for a sweep over some of the tasks."""
    environments = json.dumps([f"sweep_tasks:{name}-v0" for name in names])
    path = folder / "sweep.toml"
    out = folder / "out"
    text = SWEEP.format(out=out, environments=environments, seeds=seeds, workers=workers)
    path.write_text(more + text)
    return path


def qscore(environ, *args, **kwargs) -> subprocess.CompletedProcess:
    """The command line, in a process of its own."""
    command = [sys.executable, "-m", "qscore", *map(str, args)]
    return subprocess.run(command, env=environ, capture_output=True, text=True, **kwargs)


def figures(folder: Path) -> dict:
    """What must not depend on how a run came about."""
    summary = json.loads((folder / "summary.json").read_text())
    return {k: v for k, v in summary.items() if "second" not in k and k != "environment"}


@pytest.fixture(scope="module")
def alone(tasks, tmp_path_factory):
    """The runs by hand, on one core: of seed 0 and of seed 1."""
    folder = tmp_path_factory.mktemp("alone")
    command = "--steps 300 --eval-every 100 --eval-episodes 2 --algorithm.hidden 4"
    command += " --algorithm.batch-size 4 --algorithm.warmup-steps 50"
    cores = sorted(os.sched_getaffinity(0))
    running = []
    for seed in (0, 1):
        words = ["train", "td3", "sweep_tasks:Fine-v0", *command.split()]
        words += ["--seed-start", str(seed), "--out", str(folder / str(seed))]
        program = f"import os; os.sched_setaffinity(0, {{{cores[-seed]}}}); "
        program += f"from qscore import cli; cli.main({words})"
        process = subprocess.Popen(
            [sys.executable, "-c", program], env=tasks, stderr=subprocess.DEVNULL
        )
        running.append(process)
    assert [process.wait() for process in running] == [0, 0]
    return [figures(folder / str(seed)) for seed in (0, 1)]


@pytest.mark.slow
def test_a_trial_that_fails_takes_no_other_with_it(tasks, alone, tmp_path):
    path = write(tmp_path, "Fine", "Breaks", "Explodes", "Dies")
    done = qscore(tasks, "sweep", path, "--json")
    assert done.returncode == 1, done.stderr
    result, out = json.loads(done.stdout), tmp_path / "out"
    assert (result["done"], result["failed"], result["expected"]) == (2, 2, 4)
    said = {"Breaks": "the sensor is unplugged", "Explodes": "diverged"}
    failures = {f"sweep_tasks_{task}-v0-td3/seed-0": words for task, words in said.items()}
    assert result["failures"].keys() == failures.keys()
    for name, words in failures.items():
        assert words in result["failures"][name] and f"failed: {name}: " in done.stderr
    assert f"qscore sweep {path} --resume --retry" in done.stderr
    assert "2 of 4 trials failed" in done.stderr and (out / "report.html").is_file()
    for task in ("Fine", "Dies"):  # the second one was killed once, and went on
        assert figures(out / f"sweep_tasks_{task}-v0-td3" / "seed-0") == alone[0]
    assert Path(tasks["SWEEP_MARKER"]).exists()
    rows = [json.loads(line) for line in (out / "trials.jsonl").read_text().splitlines()]
    for name in failures:  # neither was tried twice
        assert [row["stage"] for row in rows if row["trial"] == name] == ["running", "failed"]
    last = json.loads((out / "progress.jsonl").read_text().splitlines()[-1])
    assert "sweep_tasks:Fine-v0" in last["best"] and last["failed"] == 2

    again = qscore(tasks, "sweep", path, "--resume")  # what failed is left alone
    assert again.returncode == 1 and len((out / "trials.jsonl").read_text().splitlines()) == len(
        rows
    )
    path.write_text(path.read_text().replace("batch_size = 4", "batch_size = 8"))
    with pytest.raises(
        qs.UsageError, match="begun with other fields of its algorithm: `batch_size` 4, not"
    ):
        sweep(path, resume=True)


@pytest.mark.slow
def test_a_sweep_whose_driver_was_killed_is_finished(tasks, gate, alone, tmp_path):
    path, out = write(tmp_path, "Fine", "Held", workers=1), tmp_path / "out"
    command = [sys.executable, "-m", "qscore", "sweep", str(path)]
    with subprocess.Popen(command, env=tasks, stderr=subprocess.DEVNULL) as driver:
        held = out / "sweep_tasks_Held-v0-td3" / "seed-0"
        until(lambda: (held / "checkpoints" / "200").is_dir())
        driver.kill()
    gate.touch()
    fine = out / "sweep_tasks_Fine-v0-td3" / "seed-0" / "summary.json"
    written = fine.stat().st_mtime_ns
    done = qscore(tasks, "sweep", path, "--resume")
    assert done.returncode == 0, done.stderr
    assert figures(held) == figures(fine.parent) == alone[0]
    assert fine.stat().st_mtime_ns == written  # it was not repeated


@pytest.mark.slow
def test_with_ray_too_and_it_stops_early_what_is_worse(tasks, gate, alone, tmp_path):
    """Seed 1 is cut short and goes on; after it seed 0, which at 200 steps has less return."""
    pytest.importorskip("ray", reason="Ray, the extra `sweep`, is not installed")
    path = write(tmp_path, "Held", seeds=[1, 0], workers=1, more='engine = "ray"\n')
    path.write_text(path.read_text() + "[stop_early]\ngrace = 200\nfactor = 2")
    out = tmp_path / "out"
    first, second = (out / "sweep_tasks_Held-v0-td3" / f"seed-{i}" for i in (1, 0))
    command = [sys.executable, "-m", "qscore", "sweep", str(path)]
    with subprocess.Popen(command, env=tasks, stderr=subprocess.DEVNULL) as driver:
        until(lambda: (first / "checkpoints" / "100").is_dir())
        driver.kill()
    gate.touch()
    command += ["--resume", "--json"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=tasks, stdout=pipe, stderr=pipe, text=True) as driver:
        until(lambda: (first / "summary.json").is_file())
        gate.unlink()  # so that seed 0 does not end before it is stopped
        result, said = driver.communicate(timeout=120)
    assert driver.returncode == 0, said
    assert {"done": 1, "stopped": 1, "failed": 0}.items() <= json.loads(result).items()
    assert figures(first) == alone[1]
    assert (second / "checkpoints" / "200").is_dir() and not (second / "summary.json").exists()
    assert [row["stage"] for row in read_trials(out)] == [
        *("running", "running", "done"),  # seed 1
        *("running", "stopped"),
    ]


@pytest.mark.slow
def test_an_interrupted_sweep_writes_checkpoints(tasks, gate, tmp_path):
    path, out = write(tmp_path, "Held"), tmp_path / "out"
    command = [sys.executable, "-m", "qscore", "sweep", str(path)]
    held = out / "sweep_tasks_Held-v0-td3" / "seed-0"
    with subprocess.Popen(command, env=tasks, stderr=subprocess.PIPE, text=True) as driver:
        until(lambda: (held / "checkpoints" / "200").is_dir())
        # another driver is refused
        with (
            pytest.raises(qs.UsageError, match="another process carries out the sweep"),
            _alone(out),
        ):
            pass
        driver.send_signal(signal.SIGINT)
        _, said = driver.communicate(timeout=120)
    assert driver.returncode == 130 and f"qscore sweep {path} --resume" in said
    assert not (held / "summary.json").exists()
    rows = [json.loads(line) for line in (out / "trials.jsonl").read_text().splitlines()]
    assert rows[-1]["stage"] == "interrupted"
    done = [int(each.name) for each in (held / "checkpoints").iterdir()]
    assert max(done) > 200  # one was written for the interrupt


def until(condition, seconds: float = 180.0) -> None:
    """Wait for something to become true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about in time"
        time.sleep(0.05)


CLUSTER = """
import fcntl, json, sys, threading, time
from pathlib import Path
import ray
from ray.cluster_utils import Cluster
from qscore.errors import UsageError
from qscore.sweep import sweep

spec, out, gate = map(Path, sys.argv[1:])
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
other = cluster.add_node(num_cpus=1)
ray.init(cluster.address, log_to_driver=False)
held = [out / "sweep_tasks_Held-v0-td3" / f"seed-{i}" for i in (0, 1)]

def ended(folder):
    with open(folder.with_suffix(".lock"), "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True

def until(condition):
    while not condition():
        time.sleep(0.05)

def lose_a_node():
    until(lambda: all((folder / "checkpoints" / "100").is_dir() for folder in held))
    cluster.remove_node(other, allow_graceful=False)
    until(lambda: any(map(ended, held)))  # its trial has gone with it
    gate.touch()

wider = spec.with_name("wider.toml")
wider.write_text(spec.read_text() + "cores = 2")
try:
    sweep(wider)
except UsageError as error:
    refused = str(error)
threading.Thread(target=lose_a_node, daemon=True).start()
outcome = sweep(spec, progress=False)
print(json.dumps(outcome.counts | {"failures": outcome.failures, "refused": refused}))
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.slow
def test_a_node_that_is_lost_changes_nothing(tasks, gate, alone, tmp_path):
    pytest.importorskip("ray", reason="Ray, the extra `sweep`, is not installed")
    ray = 'engine = "ray"\n'
    path, out = write(tmp_path, "Held", seeds=2, more=ray), tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-c", CLUSTER, str(path), str(out), str(gate)],
        env=tasks,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    # Ray writes what its processes say between the lines, and after the last
    (said,) = [line for line in done.stdout.splitlines() if line.startswith('{"')]
    result = json.loads(said)
    assert (result["done"], result["failures"]) == (2, {})
    words = r"line \d+: a trial needs 2 CPU, and the largest of the 2 nodes has 1\."
    assert re.search(words, result["refused"])
    rows = [json.loads(line) for line in (out / "trials.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in rows].count("running") == 3  # one of the two began again
    held = out / "sweep_tasks_Held-v0-td3"
    assert [figures(held / f"seed-{i}") for i in (0, 1)] == alone


OPTUNA = 'engine = "ray"\n' + SEARCH.replace("samples = 40", 'samples = 12\nsampler = "optuna"')


def test_optuna_learns_from_what_an_earlier_sitting_did(tmp_path):
    cluster = pytest.importorskip("qscore.sweep.cluster", reason="Ray is not installed")
    asked = parse(OPTUNA, "o.toml")
    board = Board(tmp_path, [], 12, screen=False)
    optuna = cluster.Optuna(asked, board)
    first = [optuna.resolve(optuna.suggest(str(i))) for i in range(4)]
    assert len({trial.name for trial in first}) == 4
    ends: list[tuple[Stage, float | None]] = [
        *(("done", -1.0), ("interrupted", None), ("failed", None), ("failed", 9.0))
    ]
    for trial, (stage, value) in zip(first, ends, strict=True):
        board.add(trial)
        board.begun(trial.name)
        if value is not None:
            board.evaluated(trial.name, Evaluation(100, value))
        board.ended(trial.name, stage)
    board.close()
    done = tmp_path / first[0].name
    done.mkdir(parents=True)
    (done / "summary.json").touch()

    again = Board(tmp_path, [], 12, screen=False)
    for row in read_trials(tmp_path):
        again.add(asked.make(row["chosen"]))
    again.recall(retry=False)
    optuna = cluster.Optuna(asked, again)
    again.close()
    assert optuna.resolve(optuna.suggest("a")) == first[1]  # what was cut short comes first
    assert optuna.resolve(optuna.suggest("b")) not in first  # and nothing comes twice
    (told,) = [each for each in optuna.study.get_trials() if each.value is not None]
    levels: Any = first[0].algorithm
    assert (told.value, told.params["algorithm.noise_levels"]) == (-1.0, levels.noise_levels)


def test_optuna_maximises_and_ends_where_all_was_tried(tmp_path):
    cluster = pytest.importorskip("qscore.sweep.cluster", reason="Ray is not installed")
    whole = '{ low = 2, high = 4 }\n"algorithm.batch_size" = { low = 1, high = 500 }'
    text = re.sub(r'"algorithm.actor_lr.*\n|"algorithm.hidden.*\n', "", OPTUNA)
    asked = parse(text.replace("{ low = 2, high = 4 }", whole), "o.toml")
    board = Board(tmp_path, [], 12, screen=False)
    optuna, sizes = cluster.Optuna(asked, board), []
    for i in range(60):
        chosen = optuna.suggest(str(i))
        sizes.append(chosen["algorithm.batch_size"])
        optuna.on_trial_complete(str(i), {"value": -abs(sizes[-1] - 400.0)})
    assert (
        np.mean(np.abs(np.array(sizes[-20:]) - 400))
        < 60
        < np.abs(np.array(sizes[:10]) - 400).mean()
    )

    optuna, seen = cluster.Optuna(parse(text, "o.toml"), board), []
    while (chosen := optuna.suggest(str(len(seen)))) != "FINISHED":
        seen.append(chosen["algorithm.noise_levels"])
        optuna.on_trial_complete(str(len(seen) - 1), {"stage": "failed", "value": 1.0})
    assert sorted(seen) == [2, 3, 4]
    board.close()


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("low = 2, high = 4", "low = 2, high = 3", "with `algorithm.noise_levels` 4, which"),
        (
            '"algorithm.noise_levels" = { low = 2, high = 4 }\n',
            "",
            "with `algorithm.noise_levels` ",
        ),
        (
            "[search.space]",
            '[search.space]\n"algorithm.batch_size" = { low = 1, high = 9 }',
            "with no `",
        ),
    ],
)
def test_a_search_goes_on_in_the_space_it_began_with(tmp_path, before, after, message):
    text = f'out = "{tmp_path}"\n{OPTUNA}'
    asked = parse(text, "o.toml")
    board = Board(tmp_path, [], 12, screen=False)
    trial = asked.trials[0]  # at an end of the space
    largest = next(t for t in asked.trials if t.chosen["algorithm.noise_levels"] == 4)
    for each in (trial, largest):
        board.add(each)
        board.begun(each.name)
    board.close()
    assert {each.name for each in _begun(asked)} == {trial.name, largest.name}
    assert before in text
    with pytest.raises(qs.UsageError, match=f"was begun {message}"):
        _begun(parse(text.replace(before, after), "o.toml"))


def test_a_page_that_fails_loses_no_sweep(tmp_path, monkeypatch):
    def failing(*args, **kwargs):
        raise qs.UsageError("seed 0 of td3 is in a and in b")

    monkeypatch.setattr("qscore.report.report", failing)
    trial = parse(GRID, "g.toml").trials[0]
    board = Board(tmp_path, [trial], 1, screen=False)
    board.ended(trial.name, "done")
    board.close()
    assert _report(tmp_path, board) == (None, "seed 0 of td3 is in a and in b")


def test_a_trial_whose_files_are_odd_fails_alone(tmp_path, monkeypatch):
    stopped = []

    class Odd(process.Attempt):
        def __init__(self, *args):
            pass

        def state(self):
            return "running"

        def news(self):
            raise qs.UsageError("evals.jsonl, line 1, is not a line of a run")

        def stop(self):
            stopped.append(self)

    monkeypatch.setattr(process, "Attempt", Odd)
    told = process.carry_out(
        [], tmp_path, cores=1, retries=3, report=lambda _: None, stopping=lambda: False
    )
    assert told == ("failed", "evals.jsonl, line 1, is not a line of a run") and len(stopped) == 1


def test_a_trial_finds_the_modules_that_its_sweep_does(tmp_path, monkeypatch):
    (tmp_path / "own_tasks.py").write_text("open('imported', 'w').close()")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    attempt = process.Attempt(["qscore", "train", "td3", "own_tasks:Gone-v0"], tmp_path / "run", 1)
    attempt.process.wait()
    attempt.stop()
    assert (tmp_path / "imported").is_file() and attempt.state() == "failed", attempt.message()


def test_a_trial_that_hangs_is_killed_and_what_each_attempt_says_is_kept(tmp_path, monkeypatch):
    script = tmp_path / "deaf.py"
    script.write_text("import time\nprint('qscore: I hang', flush=True)\ntime.sleep(600)")
    monkeypatch.setattr(process, "SCRIPT", script)
    monkeypatch.setattr(process, "STOP_SECONDS", 0.2)
    for attempts in (1, 2):
        attempt = process.Attempt([], tmp_path / "run", 1)
        until(lambda n=attempts: attempt.log.read_text().count("I hang") == n)
        assert attempt.state() == "running"
        attempt.stop()
        assert attempt.state() == "stopped" and attempt.process.returncode == -signal.SIGKILL


def test_only_trials_that_are_alike_are_checked_side_by_side(tmp_path, monkeypatch):
    few = types.SimpleNamespace(available=2**26)
    monkeypatch.setattr("psutil.virtual_memory", lambda: few)
    text = (
        f'out = "{tmp_path}/out"\nalgorithms = ["td3"]\nenvironments = ["lq"]\nSEEDS\n'
        "[resources]\nworkers = 2\n[settings]\nsteps = 640_000\n[grid]\n"
        '"algorithm.replay_capacity" = [100, 640_000]'
    )
    _check_trials(parse(text.replace("SEEDS", "seeds = 1"), "s.toml"))
    with pytest.raises(qs.UsageError, match="2 trials side by side"):
        _check_trials(parse(text.replace("SEEDS", "seeds = 2"), "s.toml"))


@pytest.mark.slow
def test_after_too_many_failures_no_more_are_begun(tasks, tmp_path):
    path = write(tmp_path, "Breaks", seeds=3, workers=1)
    path.write_text(path.read_text() + "[failures]\nretries = 0\nmost = 0")
    done = qscore(tasks, "sweep", path)
    assert done.returncode == 1 and "1 of 3 trials failed, 2 were not begun" in done.stderr
    assert "report" not in done.stderr


def test_a_sweep_never_writes_into_what_is_there(tmp_path):
    path = tmp_path / "s.toml"
    path.write_text(f'out = "{tmp_path}"\nalgorithms = ["sac"]\nenvironments = ["Pendulum-v1"]')
    with pytest.raises(
        qs.UsageError, match="line 1: .* exists and is not an empty folder; to go on .*resume"
    ):
        sweep(path)
    with pytest.raises(qs.UsageError, match="there is no sweep in .* to go on with"):
        sweep(path, resume=True)
    with pytest.raises(qs.UsageError, match="needs `--resume`"):
        sweep(path, retry=True)
    path.write_text('algorithms = ["sac"]\nenvironments = ["Pendulm-v1"]\nout = "new"')
    with pytest.raises(qs.UsageError, match="line 2: Pendulm-v1-sac/seed-0: .*Pendulum-v1"):
        sweep(path)
    path.write_text(path.read_text().replace("Pendulm", "Pendulum") + "\n[resources]\ncores = 999")
    with pytest.raises(qs.UsageError, match="line 5: `cores` is 999; this process may use"):
        sweep(path)
    path.write_text(path.read_text().replace("cores = 999", "share = 0.5"))
    with pytest.raises(qs.UsageError, match="line 5: `share` is for engine = 'ray'"):
        sweep(path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # as editors on Windows write it
    with pytest.raises(qs.UsageError, match="line 5: `share` is for engine = 'ray'"):
        sweep(path)
    pytest.importorskip("ray", reason="Ray, the extra `sweep`, is not installed")
    path.write_text('engine = "ray"\n' + path.read_text("utf-8-sig") + "\naddress = '127.0.0.1:1'")
    with pytest.raises(qs.UsageError, match="line 7: no Ray cluster at '127.0.0.1:1': .*refused"):
        sweep(path)

    with pytest.raises(qs.UsageError, match="cannot read the sweep"):
        sweep(tmp_path / "none.toml")
    assert os.listdir(tmp_path) == ["s.toml"] and not Path("new").exists()


def test_what_a_trial_would_refuse_is_refused_with_its_line(tmp_path, monkeypatch):
    few = types.SimpleNamespace(available=2**26)
    monkeypatch.setattr("psutil.virtual_memory", lambda: few)
    path = tmp_path / "s.toml"
    head = f'out = "{tmp_path}/out"\nalgorithms = ["td3"]\nenvironments = ["lq"]\n'
    for rest, line, words in (
        (
            "[environment.lq]\nnum_envs = 2\n[settings]\nsteps = 3001",
            7,
            "`steps` must be a multiple",
        ),
        ("[environment]\nnum_envs = 2\n[grid]\n'settings.steps' = [3000, 3001]", 7, "`steps` must"),
        (
            "[settings]\nsteps = 1_280_000\n[algorithm]\nreplay_capacity = 1_280_000",
            7,
            r"a run takes 0.0 GiB \(1 x 1280000 transitions",
        ),
        (
            "seeds = 2\n[resources]\nworkers = 2\n[settings]\nsteps = 640_000\n[algorithm]\n"
            "replay_capacity = 640_000",
            10,
            r"2 trials side by side take 0.0 GiB \(1 x 640000 transitions .* each\)",
        ),
    ):
        path.write_text(head + rest)
        with pytest.raises(qs.UsageError, match=f"s.toml, line {line}: lq-td3.*/seed-0: {words}"):
            sweep(path)
    few.available = 2**34
    problem = json.dumps({**json.loads(LQ("lq").problem), "B": [[0.0]], "noise": []})
    head = head.replace('["td3"]', '["td3", "cqsm"]')
    path.write_text(f"{head}[environment.lq]\nproblem = '{problem}'")
    with pytest.raises(qs.UsageError, match="lq-cqsm/seed-0: not stabilisable"):
        sweep(path)
    assert os.listdir(tmp_path) == ["s.toml"]


def test_the_best_is_among_those_that_can_be_compared(tmp_path):
    trials = parse(GRID, "g.toml").trials
    lq = [trial for trial in trials if trial.name.startswith("lq-td3-eval_episodes=1")]
    other = next(trial for trial in trials if trial.name.startswith("lq-td3-eval_episodes=2"))
    board = Board(tmp_path, trials, len(trials), screen=False)
    returns: list[tuple[float, Stage]] = [(-3.0, "done"), (-1.0, "running"), (5.0, "failed")]
    for trial, (value, stage) in zip(lq, returns, strict=True):
        board.evaluated(trial.name, Evaluation(100, value))
        board.ended(trial.name, stage)
    board.evaluated(other.name, Evaluation(100, 7.0))
    board.ended(other.name, "stopped")
    best = {"configuration": "lq-td3-eval_episodes=1", "return": -2.0, "trials": 2}
    assert board.counts()["best"] == {"lq": best}
    board.close()


def test_what_is_known_of_trials_may_be_damaged(tmp_path):
    trials = parse(GRID, "g.toml").trials[:2]
    board = Board(tmp_path, trials, 2, screen=False)
    for trial in trials:
        (tmp_path / trial.name).mkdir(parents=True)
        (tmp_path / trial.name / "summary.json").touch()
        board.ended(trial.name, "done")
    board.close()
    (tmp_path / trials[0].name / "summary.json").unlink()  # its folder was deleted, say
    again = Board(tmp_path, trials, 2, screen=False)
    again.recall(retry=False)
    again.close()
    assert again.names("waiting") == [trials[0].name] and again.names("done") == [trials[1].name]
    with open(tmp_path / "trials.jsonl", "a") as file:
        file.write("[1]\n")
    with pytest.raises(qs.UsageError, match=r"trials.jsonl, line 3, is not a trial: \[1\]"):
        read_trials(tmp_path)
