"""A run folder: what it holds, and that it survives kills, flips, full disks, bad tasks."""

import errno
import io
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any

import gymnasium as gym
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import QUICK_PROCESS

import qscore as qs
from qscore import checkpoint, memory, train_host
from qscore.environments import LQ, DoubleWell
from qscore.folder import Run, absolute, alone, new_folder
from qscore.log import ProgressBar
from qscore.run import _Loop, check, interruptible

pytestmark = pytest.mark.usefixtures("quick_programs")
SMALL = {"hidden": (16, 16), "batch_size": 16, "warmup_steps": 60, "noise_levels": 2}
ROOM = 100  # of the replay: one for all lengths of a run, which then share their programs
TASKS = ["Pendulum-v1", "InvertedPendulum-v5"]


class Brittle(gym.Env):
    """A one-dimensional task that misbehaves at step `at` of its third episode."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gym.spaces.Box(-3.0, 1.0, (1,), np.float32)
    failure = "raise"
    at = 10

    def __init__(self):
        self.episode = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.t = self.episode + 1, 0
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.t += 1
        obs, reward = np.array([self.t, action[0]], np.float32), 0.0
        if self.episode == 3 and self.t == self.at:
            if self.failure == "raise":
                raise RuntimeError("the gripper fell off")
            if self.failure == "nan":
                obs[1] = np.nan
            if self.failure == "reward":
                reward = float("inf")
            if self.failure == "huge":
                reward = 1e38
        return obs, reward, False, False, {}


@pytest.fixture
def brittle(request):
    gym.register(
        "Brittle-v0",
        lambda **_: type("Task", (Brittle,), {"failure": request.param})(),
        max_episode_steps=40,
        disable_env_checker=True,
    )
    yield "Brittle-v0"
    del gym.registry["Brittle-v0"]


class Killed(BaseException):
    """Stands for a process that is gone: nothing in the library catches it."""


def small_run(out, *, task: str | qs.Host = "Pendulum-v1", steps=300, room=ROOM, **kwargs):
    arguments = {"eval_every": 100, "eval_episodes": 2, "log_every": 50, "progress": False}
    algorithm = qs.QSM(**SMALL, replay_capacity=room)
    return qs.train(algorithm, task, steps=steps, out=out, **(arguments | kwargs))


def lines(folder: Path, stream: str) -> list[dict]:
    """A stream's lines without the wall clock, the one thing that no run repeats."""
    rows = [json.loads(line) for line in (folder / f"{stream}.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def arrays(folder: Path) -> dict[str, bytes]:
    newest = folder / "checkpoints" / str(checkpoint.steps(folder / "checkpoints")[-1])
    return {path.name: path.read_bytes() for path in sorted(newest.glob("*.npz"))}


def interrupt_at(step: int, monkeypatch) -> None:
    """Press Ctrl-C when a session has taken `step` steps."""
    advance = train_host.Session.advance

    def interrupting(session, until):
        advance(session, until)
        if session.env_steps == step:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(train_host.Session, "advance", interrupting)


def assert_same_run(one: Path, two: Path) -> None:
    assert lines(one, "evals") == lines(two, "evals")
    assert lines(one, "metrics") == lines(two, "metrics")
    assert arrays(one) == arrays(two)  # parameters, optimisers, replay, counters: byte for byte


def test_run_folder_holds_what_the_contract_says(tmp_path):
    run = small_run(tmp_path / "run", seeds=2, seed_start=3)
    folder = run.folder
    for name in ("config.json", "metrics.jsonl", "evals.jsonl", "summary.json"):
        assert (folder / name).is_file()
    assert (folder / "plots" / "returns.png").read_bytes().startswith(b"\x89PNG")
    assert list((folder / "tensorboard").iterdir())
    assert checkpoint.steps(folder / "checkpoints") == [200, 300]

    evals = lines(folder, "evals")
    assert [(row["env_steps"], row["seed"]) for row in evals] == [
        (step, seed) for step in (100, 200, 300) for seed in (3, 4)
    ]
    assert all(row["lengths"] == [200, 200] for row in evals)
    metrics = lines(folder, "metrics")
    assert {"seed", "env_steps", "updates"} <= set(metrics[0])
    assert metrics[-1]["updates"] == 300 - SMALL["warmup_steps"]
    assert {"critic_loss", "actor_loss", "action_saturation"} <= set(metrics[-1])

    summary = run.summary
    assert summary["algorithm"] == "qsm" and summary["environment"] == "Pendulum-v1"
    assert summary["seeds"] == [3, 4] and summary["env_steps"] == 300
    last = run.rows("evals")
    assert summary["final_returns"] == [
        float(np.mean(last[seed][300]["returns"])) for seed in (3, 4)
    ]
    assert summary["ci95"][0] <= summary["iqm"] <= summary["ci95"][1]
    assert summary["env_steps_per_second"] > 0 and summary["updates_per_second"] > 0


def test_nothing_is_compiled_once_a_run_is_under_way(tmp_path, monkeypatch, caplog):
    """A program for each length of the replay would be kept: memory would grow without end."""
    under_way = []  # per checkpoint: how many programs had been compiled
    save = checkpoint.save

    def counting(*args, **kwargs):
        under_way.append(sum("XLA compilation" in record.message for record in caplog.records))
        return save(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "save", counting)
    jax.config.update("jax_log_compiles", True)
    try:
        small_run(tmp_path / "run", steps=500, room=500)
    finally:
        jax.config.update("jax_log_compiles", False)
    start, first, *later = under_way
    assert start > 0  # they are counted
    assert later == [first] * 4


def test_a_seed_is_the_same_alone_and_in_company(tmp_path):
    small_run(tmp_path / "both", seeds=2)
    small_run(tmp_path / "alone", seed_start=1)
    both, alone = arrays(tmp_path / "both"), arrays(tmp_path / "alone")
    assert both["seed-1.npz"] == alone["seed-1.npz"]
    assert both["seed-0.npz"] != both["seed-1.npz"]


def test_evaluation_after_training_repeats_the_last_one(tmp_path):
    run = small_run(tmp_path / "run")
    result = qs.evaluate(run.folder, episodes=2)
    assert result["returns"] == lines(run.folder, "evals")[-1]["returns"]
    assert result["episodes"] == 2 and result["seed"] == 0
    other = qs.evaluate(run.folder, episodes=2, seed=1)
    assert other["returns"] != result["returns"]


def test_best_of_is_reported_beside_the_plain_figure(tmp_path):
    run = small_run(tmp_path / "run")
    result = qs.evaluate(run.folder, episodes=2, best_of=4)
    assert result["returns"] == qs.evaluate(run.folder, episodes=2)["returns"]
    assert result["best_of"] == 4 and len(result["returns_best_of"]) == 2
    assert result["returns_best_of"] != result["returns"]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("moment", ["anywhere", "while writing a checkpoint"])
def test_a_killed_run_resumes_bit_for_bit(tmp_path, monkeypatch, task, moment):
    whole = small_run(tmp_path / "whole", task=task, seeds=2).folder
    folder = tmp_path / "killed"
    advance, rename = train_host.Session.advance, Path.rename

    def die_at(step):
        def dying_advance(session, until):
            if session.env_steps >= step:
                raise Killed
            advance(session, until)

        def dying_rename(path, target):
            if int(path.name.removeprefix(".tmp-")) >= step:
                raise Killed
            return rename(path, target)

        if moment == "anywhere":
            monkeypatch.setattr(train_host.Session, "advance", dying_advance)
        else:
            monkeypatch.setattr(Path, "rename", dying_rename)

    deaths = [40, 90, 150, 201, 250] if moment == "anywhere" else [1, 150, 300]
    for i, step in enumerate(deaths):
        die_at(step)
        with pytest.raises(Killed):
            if i == 0:
                small_run(folder, task=task, seeds=2)
            else:
                qs.resume(folder, progress=False)
        monkeypatch.undo()
    run = qs.resume(folder, progress=False)
    assert_same_run(whole, folder)
    assert run.summary["final_returns"] == qs.Run.open(whole).summary["final_returns"]


@pytest.mark.slow
def test_a_process_killed_by_the_system_resumes_bit_for_bit(tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    settings = [
        *("--steps=600", "--seeds=2", "--eval-every=100", "--eval-episodes=2", "--log-every=50"),
        *("--algorithm.batch-size=16", "--algorithm.warmup-steps=60"),
        *("--algorithm.hidden", "16", "16"),
    ]

    def command(*arguments):  # every run in a process of its own, as this one checks its types
        command = [sys.executable, "-m", "qscore", *map(str, arguments)]
        programs = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "programs")}
        return subprocess.Popen(command, env=os.environ | QUICK_PROCESS | programs)

    start = ("train", "td3", "Pendulum-v1", *settings, "--out")
    uninterrupted = command(*start, whole)
    for arguments in ((*start, folder), ("resume", folder)):
        before = len(lines(folder, "evals")) if folder.exists() else 0
        process = command(*arguments)
        while process.poll() is None:  # until it has written one more evaluation
            time.sleep(0.02)
            if (folder / "evals.jsonl").exists() and len(lines(folder, "evals")) > before:
                process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert command("resume", folder).wait() == 0
    assert uninterrupted.wait() == 0
    assert_same_run(whole, folder)


def test_an_interrupt_writes_a_checkpoint_and_the_run_goes_on_from_it(tmp_path, monkeypatch):
    whole = small_run(tmp_path / "whole").folder
    interrupt_at(150, monkeypatch)
    with pytest.raises(qs.Interrupted, match=r"at 150 of 300 steps.*qscore resume .*cut"):
        small_run(tmp_path / "cut")
    monkeypatch.undo()
    assert checkpoint.steps(tmp_path / "cut" / "checkpoints")[-1] == 150
    qs.resume(tmp_path / "cut", progress=False)
    assert_same_run(whole, tmp_path / "cut")


def test_a_snapshot_stays_as_it_is_while_training_goes_on():
    session = train_host.Session(
        qs.QSM(**SMALL), qs.Host("Pendulum-v1"), 0, steps=300, eval_episodes=2
    )
    while session.env_steps < 150:
        session.advance(150)
    counters, snapshot = session.snapshot()
    evaluated = session.evaluate(0)
    before = json.dumps(counters), jax.tree.map(np.array, snapshot)
    while session.env_steps < 300:
        session.advance(300)
    assert session.evaluate(0, snapshot) == evaluated != session.evaluate(0)
    after = json.dumps(counters), snapshot
    assert jax.tree.all(jax.tree.map(np.array_equal, before, after))
    session.close()


def test_training_does_not_wait_for_an_evaluation(tmp_path, monkeypatch):
    """The evaluation at 100 steps ends only once training has gone beyond them."""
    advance, evaluate = train_host.Session.advance, train_host.Session.evaluate
    beyond = threading.Event()

    def advancing(session, until):
        advance(session, until)
        if session.env_steps > 100:
            beyond.set()

    def waiting(session, seed, arrays=None):
        assert beyond.wait(timeout=60)
        return evaluate(session, seed, arrays)

    monkeypatch.setattr(train_host.Session, "advance", advancing)
    monkeypatch.setattr(train_host.Session, "evaluate", waiting)
    small_run(tmp_path / "run")
    monkeypatch.undo()
    assert_same_run(small_run(tmp_path / "usual").folder, tmp_path / "run")


def test_results_without_a_checkpoint_are_not_replaced(tmp_path):
    run = small_run(tmp_path / "run", steps=100)
    shutil.rmtree(run.checkpoints)
    kept = {path: path.read_bytes() for path in run.folder.iterdir() if path.is_file()}
    with pytest.raises(qs.RunStopped, match=r"results \(summary.json\).*qscore train qsm Pendulum"):
        qs.resume(run.folder, progress=False)
    assert kept == {path: path.read_bytes() for path in run.folder.iterdir() if path.is_file()}
    (run.folder / "summary.json").unlink()
    with pytest.raises(qs.RunStopped, match=r"results \(evals.jsonl\)"):
        qs.resume(run.folder, steps=200, progress=False)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_beside_the_loop_says_how_to_go_on(tmp_path, monkeypatch, number):
    run = small_run(tmp_path / "run", steps=100)
    outer = signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background: ignored
    usual = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]

    def interrupted(*args):
        signal.raise_signal(number)

    for place in ("restore", "_summarize"):
        with monkeypatch.context() as patch:
            patch.setattr(_Loop, place, interrupted)
            with pytest.raises(qs.Interrupted, match="continue with: qscore resume .*run"):
                qs.resume(run.folder, steps=200, progress=False)
    assert usual == [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    signal.signal(signal.SIGINT, outer)
    assert qs.resume(run.folder, steps=200, progress=False).summary["env_steps"] == 200


def test_a_problem_without_a_closed_form_is_refused_before_it_is_trained_in(tmp_path):
    text = json.dumps({**json.loads(LQ("lq").problem), "B": [[0.0]], "noise": []})
    algorithm = qs.CQSM(preset="linear_quadratic")
    with pytest.raises(qs.UsageError, match="not stabilisable: the mode of `A`"):
        qs.train(algorithm, LQ("lq", problem=text), steps=1_280, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    check(qs.TD3(), LQ("lq", problem=text), qs.Settings(steps=1_280))  # compares nothing
    with pytest.raises(
        ValueError, match="`problem` must be the JSON text .* not its name.* Got 'p"
    ):
        LQ("lq", problem="problem.json")


def test_what_a_learner_holds_must_fit(monkeypatch):
    algorithm = qs.CQSM(critic="features", replay_capacity=1_000)
    monkeypatch.setattr(memory, "available", lambda: 8 * 2**30)
    with pytest.raises(
        qs.UsageError, match=r"a run takes \d\d\.\d GiB .*; 8\.0 GiB.*network critics"
    ):
        check(algorithm, qs.Host("Ant-v5"), qs.Settings(steps=2_000))


def test_an_algorithm_of_ones_own_is_refused_by_name(tmp_path):
    class Mine(qs.QSM):
        pass

    with pytest.raises(qs.UsageError, match=r"`algorithm` is a Mine.*qsm, cqsm, sac"):
        qs.train(Mine(), "Pendulum-v1", out=tmp_path / "run")


def test_an_environment_is_what_its_name_stands_for(tmp_path):
    class Steeper(DoubleWell):
        pass

    for task, message in (
        (
            Steeper("double_well"),
            r"Steeper with the name 'double_well', .* stands for a DoubleWell",
        ),
        (
            Steeper("steeper"),
            r"Steeper with the name 'steeper', which stands for a Host\. Take that",
        ),
        (qs.Host("lq"), r"`environment` is a Host with the name 'lq', which stands for a LQ"),
    ):
        with pytest.raises(qs.UsageError, match=message):
            qs.train(qs.QSM(), task, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_devices_memory_counts_besides_the_machines(monkeypatch):
    algorithm, task = qs.TD3(), qs.Host("Ant-v5")
    stats = {"bytes_limit": 2**30, "bytes_in_use": 2**29}
    device = types.SimpleNamespace(memory_stats=lambda: stats)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    check(algorithm, task, qs.Settings(steps=100_000))
    with pytest.raises(qs.UsageError, match=r"takes 0\.8 GiB .*; 0\.5 GiB are free on the device"):
        check(algorithm, task, qs.Settings(steps=1_000_000))
    stats["bytes_limit"] = 2**40
    monkeypatch.setattr(memory, "available", lambda: 2**30)
    with pytest.raises(qs.UsageError, match=r"and as much again .*; 1\.0 GiB are free\. Lower"):
        check(algorithm, task, qs.Settings(steps=1_000_000))


def test_only_ctrl_c_acts_at_once_after_another_signal():
    """A service that is stopped sends SIGTERM to a sweep and to its trials, which send it on."""
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)  # may be ignored here
    try:
        with interruptible() as asked:
            for _ in range(2):
                signal.raise_signal(signal.SIGTERM)
                assert asked()
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, usual)


def test_a_file_that_finds_no_room_leaves_nothing(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(qs.UsageError, match="cannot write to `out`, .*: .*No space left"):
            small_run(tmp_path / "run")
    small_run(tmp_path / "run")  # the same folder, once there is room


def test_a_folder_may_lie_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "data.npz").touch()
    assert small_run("~/run").folder == tmp_path / "run"
    assert absolute("~/data.npz") == str(tmp_path / "data.npz")


def test_a_handler_from_elsewhere_is_no_error(monkeypatch):
    """Python cannot know one that C installed, and says None."""
    usual = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(signal, "getsignal", lambda number: None)
    with interruptible() as asked:
        signal.raise_signal(signal.SIGTERM)
        assert asked()
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    for number, handler in usual.items():
        signal.signal(number, handler)


def test_a_class_is_no_algorithm(tmp_path):
    kind: Any = qs.QSM
    with pytest.raises(qs.UsageError, match=r"`algorithm` is .*qs.QSM\(\)"):
        qs.train(kind, "Pendulum-v1", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_finished_run_can_be_extended(tmp_path):
    longer = small_run(tmp_path / "longer", steps=300, room=1_000).folder
    shorter = small_run(tmp_path / "shorter", steps=200, room=1_000).folder  # its replay grows
    qs.resume(shorter, steps=300, progress=False)
    assert_same_run(longer, shorter)
    with pytest.raises(qs.UsageError, match="`steps` is 100, but the run has already done 300"):
        qs.resume(shorter, steps=100)


def test_a_run_in_bf16_keeps_float32_parameters_and_resumes_bit_for_bit(tmp_path):
    small_run(tmp_path / "whole", steps=200, precision="bf16")
    shorter = small_run(tmp_path / "parts", steps=100, precision="bf16").folder
    qs.resume(shorter, steps=200, progress=False)
    assert_same_run(tmp_path / "whole", shorter)
    assert json.loads((shorter / "config.json").read_text())["settings"]["precision"] == "bf16"

    exact = small_run(tmp_path / "exact", steps=200).folder
    same_types = same = 0
    with (
        np.load(shorter / "checkpoints" / "200" / "seed-0.npz") as half,
        np.load(exact / "checkpoints" / "200" / "seed-0.npz") as full,
    ):
        names = [name for name in full if name.startswith("['agent']")]
        for name in names:
            same_types += half[name].dtype == full[name].dtype
            same += np.array_equal(half[name], full[name])
    assert same_types == len(names) > 20
    assert same < len(names) / 2  # it was not ignored


@pytest.mark.parametrize("log_every", [50, 100])
def test_the_step_of_an_interrupt_can_become_the_end(tmp_path, monkeypatch, log_every):
    interrupt_at(150, monkeypatch)
    with pytest.raises(qs.Interrupted):
        small_run(tmp_path / "run", log_every=log_every)
    monkeypatch.undo()
    run = qs.resume(tmp_path / "run", steps=150, progress=False)
    assert run.summary["env_steps"] == 150
    assert lines(run.folder, "metrics")[-1]["env_steps"] == 150
    assert lines(run.folder, "evals")[-1]["env_steps"] == 150
    whole = small_run(tmp_path / "whole", steps=150, log_every=log_every)
    assert_same_run(whole.folder, run.folder)


def test_resume_refuses_what_train_refuses(tmp_path):
    run = small_run(tmp_path / "run", task=qs.Host("Pendulum-v1", num_envs=2), steps=100)
    with pytest.raises(qs.UsageError, match=r"multiple of `environment.num_envs`, 2; got 201"):
        qs.resume(run.folder, steps=201)
    config = (run.folder / "config.json").read_text()
    (run.folder / "config.json").write_text(config.replace("Pendulum-v1", "Gone-v1"))
    for use in (qs.resume, qs.evaluate, qs.load):
        with pytest.raises(qs.UsageError, match="unknown environment 'Gone-v1'"):
            use(run.folder)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_time_left_is_of_steps_that_learn_and_fits_a_narrow_terminal(monkeypatch):
    screen, now = Terminal(), [0.0]
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("qscore.log.time", types.SimpleNamespace(monotonic=lambda: now[0]))

    def shown(env_steps, seconds):
        now[0] = seconds
        bar.update(env_steps, 199.0)
        screen.seek(0)
        screen.truncate()
        bar._progress.refresh()
        return screen.getvalue()

    bar = ProgressBar("qsm on HalfCheetah-v5", 100_000, warmup=10_000, enabled=True)
    bar.note("return 1234 2345 3456")
    try:
        assert "-:--:--" in shown(5_000, 1.0)
        assert "-:--:--" in shown(10_000, 2.0)
        text = re.sub("\x1b\\[[0-9;?]*[a-zA-Z]", "", shown(19_000, 92.0))
        # 100 steps/s, 81,000 left
        assert text.endswith(" 19000/100000  199 steps/s 0:13:30 return 1234 2345 3456")
        assert "0:15:02" in shown(100_000, 902.0)  # taken
    finally:
        bar.close()


def test_no_two_processes_write_one_run(tmp_path):
    run = small_run(tmp_path / "run", steps=100)
    before = arrays(run.folder)
    with alone(run.folder):  # as another process would
        with pytest.raises(qs.UsageError, match="another process trains in .*run"):
            qs.resume(run.folder, steps=200, progress=False)
        (tmp_path / "empty").mkdir()
        with alone(tmp_path / "empty"), pytest.raises(qs.UsageError, match="another process trai"):
            small_run(tmp_path / "empty")
    assert arrays(run.folder) == before
    assert qs.resume(run.folder, steps=200, progress=False).summary["env_steps"] == 200


def test_runs_begun_in_the_same_second_have_folders_of_their_own(tmp_path):
    folders = [new_folder(tmp_path / "runs" / "td3-lq-1") for _ in range(3)]
    assert [folder.name for folder in folders] == ["td3-lq-1", "td3-lq-1-2", "td3-lq-1-3"]
    assert all(folder.is_dir() for folder in folders)


def test_an_interrupt_before_the_first_step_says_how_to_go_on(tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train_host.Session, "__init__", interrupted)
        with pytest.raises(qs.Interrupted, match="continue with: qscore resume '.*a run'"):
            small_run(tmp_path / "a run", steps=100)
    whole = small_run(tmp_path / "whole", steps=100).folder
    assert_same_run(whole, qs.resume(tmp_path / "a run", progress=False).folder)


def test_a_checkpoint_that_another_was_about_to_replace_is_put_back(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoints"
    header = {"seconds": 0.0}
    checkpoint.save(folder, 50, header, {0: {"x": np.zeros(2)}}, keep=1)
    rename = Path.rename

    def killed(path, target):
        if path.name == ".tmp-50":
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        patch.setattr(checkpoint, "clean", lambda folder: None)  # a kill leaves no time for it
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(folder, 50, header, {0: {"x": np.ones(2)}}, keep=1)
    assert checkpoint.steps(folder) == []
    checkpoint.clean(folder)
    assert checkpoint.steps(folder) == [50] and not list(folder.glob(".tmp*"))
    np.testing.assert_array_equal(checkpoint.load(folder / "50", 0, {"x": 0})["x"], np.zeros(2))
    checkpoint.save(folder, 50, header, {0: {"x": np.ones(2)}}, keep=1)
    np.testing.assert_array_equal(checkpoint.load(folder / "50", 0, {"x": 0})["x"], np.ones(2))
    assert checkpoint.steps(folder) == [50] and not list(folder.glob(".tmp*"))


def test_a_checkpoint_that_cannot_be_read_gives_way_to_the_one_before(tmp_path, monkeypatch):
    run = small_run(tmp_path / "run", steps=200, eval_every=100)
    digest = checkpoint._sha256

    def failing(path):
        if path.parent.name == "200":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return digest(path)

    monkeypatch.setattr(checkpoint, "_sha256", failing)
    said = []
    found = checkpoint.newest(run.checkpoints, said.append)
    assert found and found[0].name == "100" and "cannot be read ([Errno 5]" in said[0]


def test_a_checkpoint_that_training_replaces_meanwhile_is_no_trouble(tmp_path, monkeypatch, capsys):
    run = small_run(tmp_path / "run", steps=200, eval_every=100)
    newest = run.checkpoints / "200"
    load, header = checkpoint.load, checkpoint.read_header
    left = {"load": 1, "header": 1}

    def replaced(name, usual):
        def late(path, *args):
            if left[name]:  # what was found is gone by now, and there is another
                left[name] = 0
                newest.rename(run.checkpoints / "300")
            return usual(path, *args)

        return late

    monkeypatch.setattr(checkpoint, "load", replaced("load", load))
    assert qs.load(run.folder) is not None and not left["load"]
    (run.checkpoints / "300").rename(newest)
    monkeypatch.setattr(checkpoint, "read_header", replaced("header", header))
    assert qs.load(run.folder) is not None and not left["header"]
    assert capsys.readouterr().err == ""


def test_a_resume_that_cannot_write_is_one_message(tmp_path, monkeypatch):
    run = small_run(tmp_path / "run", steps=100)

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "truncate", full)
    with pytest.raises(qs.RunStopped, match="cannot write to .*run: .*No space left"):
        qs.resume(run.folder, steps=200, progress=False)


def test_a_flipped_byte_is_named_and_the_checkpoint_before_is_used(tmp_path, capsys):
    whole = small_run(tmp_path / "whole").folder
    folder = small_run(tmp_path / "run").folder
    victim = folder / "checkpoints" / "300" / "seed-0.npz"
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)

    before = qs.evaluate(folder, episodes=2)
    assert f"{victim} does not match its checksum" in capsys.readouterr().err
    assert before["returns"] == lines(whole, "evals")[1]["returns"]
    qs.resume(folder, progress=False)
    assert f"{victim} does not match its checksum" in capsys.readouterr().err
    assert_same_run(whole, folder)

    for name in ("200", "300"):
        (folder / "checkpoints" / name / "header.json").write_text("{}")
    with pytest.raises(qs.RunStopped, match="no checkpoint in .* is intact"):
        qs.resume(folder, progress=False)
    with pytest.raises(qs.UsageError, match="no intact checkpoint"):
        qs.evaluate(folder)


def test_a_full_disk_loses_nothing_already_written(tmp_path, monkeypatch):
    whole = small_run(tmp_path / "whole").folder
    savez, calls = np.savez, []

    def full(file, **kwargs):
        calls.append(1)
        if len(calls) > 2:  # the checkpoints at 0 and 100 fit
            file.write(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        savez(file, **kwargs)

    monkeypatch.setattr(np, "savez", full)
    message = r"No space left on device.*last good checkpoint is .*checkpoints/100"
    with pytest.raises(qs.RunStopped, match=message):
        small_run(tmp_path / "run")
    monkeypatch.undo()
    folder = tmp_path / "run"
    assert checkpoint.steps(folder / "checkpoints") == [0, 100]
    assert not list((folder / "checkpoints").glob(".tmp*"))
    qs.resume(folder, progress=False)
    assert_same_run(whole, folder)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_disk_that_is_full_for_tensorboard_stops_the_run_too(tmp_path, monkeypatch):
    with monkeypatch.context() as patched, open("/dev/full", "wb") as full:
        patched.setattr("tensorboardX.record_writer.open_file", lambda _: full)
        with pytest.raises(qs.RunStopped, match="No space left on device"):
            small_run(tmp_path / "run")
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == []


def test_tensorboard_is_told_what_the_lines_say(tmp_path):
    from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

    run = small_run(tmp_path / "run")
    qs.resume(run.folder, steps=400, progress=False)
    events = []
    for path in sorted((run.folder / "tensorboard").iterdir()):  # as TensorBoard reads them
        content = path.read_bytes()
        while content:
            (size,) = struct.unpack("Q", content[:8])
            events.append(Event.FromString(content[12 : 12 + size]))
            content = content[16 + size :]
    assert events[0].file_version == "brain.Event:2"
    found = {(v.tag, e.step): v.simple_value for e in events for v in e.summary.value}
    for row in lines(run.folder, "metrics"):
        for name in row.keys() - {"seed", "env_steps"}:
            assert found[f"seed-0/{name}", row["env_steps"]] == pytest.approx(row[name])
    for row in lines(run.folder, "evals"):
        mean = np.mean(row["returns"])
        assert found["seed-0/eval_return", row["env_steps"]] == pytest.approx(mean)
    begun_anew = [e.step for e in events if e.HasField("session_log")]
    assert begun_anew == [301]


FAILURES = {
    "raise": (qs.RunStopped, "raised in step: RuntimeError: the gripper fell off"),
    "nan": (qs.RunStopped, "non-finite components, the first at index 1"),
    "reward": (qs.RunStopped, "returned the reward inf"),
    "huge": (
        qs.TrainingDiverged,
        r"not finite: .*critic_loss.*\(seed 0, env step 1\d\d, updates \d+ to \d+\); "
        r"(in the updates before: .*critic_loss \S+|these were its first)",
    ),
}


@pytest.mark.parametrize("brittle", FAILURES, indirect=True)
def test_a_failing_environment_stops_the_run_and_the_checkpoint_stays(tmp_path, brittle, request):
    kind, message = FAILURES[request.node.callspec.params["brittle"]]
    with pytest.raises(kind, match=message) as caught:
        small_run(tmp_path / "run", task=brittle, eval_every=60, eval_episodes=1)
    assert f"last good checkpoint is {tmp_path / 'run' / 'checkpoints' / '60'}" in str(caught.value)
    _, header = checkpoint.newest(tmp_path / "run" / "checkpoints", pytest.fail) or (None, None)
    assert header is not None and header["env_steps"] == 60


def test_a_critic_that_blows_up_below_overflow_stops_the_run(tmp_path):
    # without target networks and with large steps, values grow until they overflow
    wild = qs.TD3(target_rate=1.0, critic_lr=0.3, warmup_steps=50, hidden=(32, 32), batch_size=32)
    message = r"the critic blew up: `q` is -?\d\S+, more than 1000 times .*seed 0, env step \d+"
    with pytest.raises(qs.TrainingDiverged, match=message) as caught:
        qs.train(
            wild,
            "Pendulum-v1",
            steps=2_000,
            eval_every=50,
            eval_episodes=1,
            out=tmp_path / "run",
            progress=False,
        )
    newest = checkpoint.steps(tmp_path / "run" / "checkpoints")[-1]
    assert f"last good checkpoint is {tmp_path / 'run' / 'checkpoints' / str(newest)}" in str(
        caught.value
    )
    assert np.isfinite(qs.evaluate(tmp_path / "run", episodes=1)["returns"]).all()


@pytest.mark.parametrize("brittle", ["none"], indirect=True)
def test_time_limits_are_not_terminations_and_actions_are_scaled(tmp_path, brittle):
    session = train_host.Session(
        qs.QSM(**SMALL), qs.Host(brittle, num_envs=2), 0, steps=200, eval_episodes=1
    )
    while session.env_steps < 200:
        session.advance(200)
    data = session.runner.replay.data
    obs, next_obs = np.asarray(data.obs), np.asarray(data.next_obs)
    assert not np.asarray(data.terminated).any()
    assert next_obs[:, 0].max() == 40  # the observation at the limit, not the one after the reset
    assert np.array_equal(next_obs[:, 0], obs[:, 0] + 1)
    assert np.asarray(data.time).max() == 39
    # [-1, 1] stands for [-3, 1], which is what the task was given
    np.testing.assert_allclose(next_obs[:, 1], 2.0 * np.asarray(data.action)[:, 0] - 1.0, atol=1e-6)
    assert np.ptp(next_obs[:, 1]) > 2.0
    session.close()


def test_a_loaded_policy_acts_in_the_environments_units(tmp_path):
    run = small_run(tmp_path / "run")
    policy = qs.load(run.folder, seed=0)
    obs = np.array([1.0, 0.0, 0.1])
    action, _ = policy(obs, policy.init_carry(), key=jr.key(0))
    assert isinstance(action, np.ndarray) and action.shape == (1,)
    session = train_host.Session(run.algorithm, run.environment, 0, steps=300, eval_episodes=1)
    shapes = {"agent": session.skeleton()["agent"]}
    agent = checkpoint.load(folder := run.checkpoints / "300", 0, shapes)["agent"]
    inner, _ = run.algorithm.act(
        agent, (), jnp.asarray(obs, jnp.float32), key=jr.key(7), explore=False
    )
    np.testing.assert_allclose(action, 2.0 * np.asarray(inner), rtol=1e-5)  # bounds are +-2
    assert folder.is_dir()
    with pytest.raises(ValueError, match=r"`obs` must have shape \(3,\), got \(4,\)"):
        policy(np.zeros(4), policy.init_carry(), key=jr.key(0))
    with pytest.raises(ValueError, match=r"`key` is .*; it must be a key of JAX"):
        policy(obs, policy.init_carry(), key=jr.PRNGKey(0))
    with pytest.raises(qs.UsageError, match="has no seed 5; it has 0"):
        qs.load(run.folder, seed=5)
    session.close()


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_a_video_is_written(tmp_path, monkeypatch, suffix):
    run = small_run(tmp_path / "run")
    film = tmp_path / f"film{suffix}"
    qs.evaluate(run.folder, episodes=1, video=film)
    assert film.stat().st_size > 10_000
    before = film.read_bytes()

    def failing(path, *args, **kwargs):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("imageio.v2.mimwrite", failing)
    with pytest.raises(qs.UsageError, match="cannot write to `video`, .*film.*No space"):
        qs.evaluate(run.folder, episodes=1, video=film)
    assert film.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"run", film.name}


def test_a_config_describes_the_run_it_came_from(tmp_path):
    run = small_run(tmp_path / "run")
    assert qs.Run.open(run.folder) == run
    config = json.loads((run.folder / "config.json").read_text())
    assert config["algorithm"]["name"] == "qsm" and config["algorithm"]["batch_size"] == 16
    assert config["versions"]["jax"]


def test_resuming_on_another_number_of_cores_warns(tmp_path, capsys):
    run = small_run(tmp_path / "run", steps=100)
    path = run.folder / "config.json"
    config = json.loads(path.read_text())
    cores = config["versions"]["cores"]
    assert int(cores) >= 1
    qs.resume(run.folder, steps=200, progress=False)
    assert "differ" not in capsys.readouterr().err
    config["versions"]["cores"] = "999"
    path.write_text(json.dumps(config))
    qs.resume(run.folder, steps=300, progress=False)
    assert f"numbers may differ: cores 999 -> {cores}" in capsys.readouterr().err


def test_what_cannot_be_run_is_refused_before_anything_is_written(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(qs.UsageError, match="exists and is not an empty folder"):
        small_run(tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]
    with pytest.raises(qs.UsageError, match=r"`steps` must lie in \[1, 2e\+09\], got 0"):
        small_run(tmp_path / "new", steps=0)
    with pytest.raises(qs.UsageError, match="multiple of `environment.num_envs`, 7; got 300"):
        small_run(tmp_path / "new", task=qs.Host("Pendulum-v1", num_envs=7))
    with pytest.raises(qs.UsageError, match=r"unknown environment 'Pendulun-v1'. The closest"):
        small_run(tmp_path / "new", task="Pendulun-v1")
    assert not (tmp_path / "new").exists()
    with pytest.raises(qs.UsageError, match="there is no such folder"):
        qs.resume(tmp_path / "new")
    with pytest.raises(qs.UsageError, match="it has no config.json"):
        Run.open(tmp_path)


@pytest.mark.parametrize("task", ["Pendulum-v1", "double_well"])
def test_programs_are_compiled_before_the_seeds_threads_begin(tmp_path, caplog, task):
    """Two threads that compile one program at the same time have crashed XLA."""
    jax.config.update("jax_log_compiles", True)
    try:
        # sizes that no other test has: nothing of it has been compiled yet
        algorithm = qs.QSM(hidden=(15, 13), batch_size=16, warmup_steps=60)
        folder = tmp_path / "run"
        qs.train(algorithm, task, steps=300, seeds=2, eval_episodes=3, out=folder, progress=False)
    finally:
        jax.config.update("jax_log_compiles", False)
    compiled = [
        (record.threadName, found[1])
        for record in caplog.records
        if (found := re.search(r"Finished XLA compilation of (.*?) in", record.message))
    ]
    assert "MainThread" in {thread for thread, _ in compiled}
    assert {"jit(chunk)", "jit(act)"} <= {name for _, name in compiled} or task != TASKS[0]
    own = {"jit(chunk)", "jit(evaluate)", "jit(uniform)", "jit(run)", "jit(act)"}
    assert not own & {name for thread, name in compiled if thread != "MainThread"}
    # outside of programs every operation is one: a hundred of them, and seconds at every start
    assert len(compiled) < 50, [name for _, name in compiled]
