"""The command line: exit codes, one clear line for bad input, one JSON value on stdout."""

import errno
import json
import os
import shlex
import shutil
import subprocess
import sys

import pytest

import qscore as qs
from qscore import bench, cli, train_host

pytestmark = pytest.mark.usefixtures("quick_programs")
TINY = [
    *("--algorithm.hidden", "8", "8", "--algorithm.batch-size", "8", "--algorithm.noise-levels"),
    *("2", "--algorithm.warmup-steps", "60", "--algorithm.replay-capacity", "100"),
    *("--environment.max-episode-steps", "50", "--eval-episodes", "1", "--log-every", "50"),
]


def call(capsys, *args):
    """(exit code, stdout, stderr) of a command."""
    code = 0
    try:
        cli.main(list(map(str, args)))
    except SystemExit as error:
        code = error.code
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    qs.train(
        qs.QSM(hidden=(8, 8), batch_size=8, noise_levels=2, warmup_steps=60, replay_capacity=100),
        qs.Host("Pendulum-v1", max_episode_steps=50),
        steps=120,
        out=folder,
        eval_episodes=1,
        progress=False,
    )
    return folder


BAD = {
    "": "usage: qscore COMMAND",
    "trian qsm Pendulum-v1": "unknown command 'trian'; the closest is 'train'",
    "train": "needs an algorithm and an environment first",
    "train qsm": "needs an algorithm and an environment first",
    "train qsmm Pendulum-v1": "'qsmm'; the closest is 'qsm'. Known: cqsm, diffusion_ql, qsm, sac, ",
    "train qsm Pendulun-v1": "unknown environment 'Pendulun-v1'. The closest are Pendulum-v1",
    "train qsm CartPole-v1": "has the action space Discrete(2)",
    "train qsm Pendulum-v1 --steps -5": "`steps` must lie in [1, 2e+09], got -5",
    "train qsm Pendulum-v1 --steps 0": "`steps` must lie in [1, 2e+09], got 0",
    "train qsm Pendulum-v1 --steps ten": "Error parsing --steps: 'ten' is not a whole number",
    "train qsm Pendulum --steps 10": "names no version, so it may be another task one day. Today",
    "train qsm Pendulum-v1 --step 10": "(closest: --steps INT, ",
    "train qsm Pendulum-v1 --seed 1": "(closest: --seeds INT, --seed-start INT)",
    "train qsm Pendulum-v1 --precision f16": "Expected one of ('f32', 'bf16')",
    "train qsm Pendulum-v1 --stepz 10": "Unrecognized options: --stepz, 10",
    "train qsm Pendulum-v1 --algorithm.discount 1.2": "`discount` must lie in [0, 1), got 1.2",
    "train qsm Pendulum-v1 --algorithm.schedule sine": "Expected one of ('vp', 'cosine', 'linear')",
    "train qsm Pendulum-v1 --algorithm.preset best": "one of ('default', 'official', 'offline')",
    "train qsm Pendulum-v1 --environment.dt 0.02": "can only be its own, 0.05 s; got 0.02",
    "train qsm Pendulum-v1 --environment.num-envs 0": "`num_envs` must lie in [1, 4096], got 0",
    f"train qsm Pendulum-v1 --steps {10**9} --seeds 1000 --algorithm.replay-capacity {10**9}": (
        "a run takes 38188.1 GiB (1000 x 1000000000 transitions of 41 bytes and 4.0 MiB that are "
        "learned), and as much again"
    ),
    f"train qsm Pendulum-v1 --steps {10**10}": "`steps` must lie in [1, 2e+09], got 10000000000",
    "resume nowhere": "nowhere is not a run folder: there is no such folder",
    "resume .": "is not a run folder: it has no config.json",
    "eval nowhere": "nowhere is not a run folder",
    "eval RUN --episodes 0": "`episodes` must be at least 1, got 0",
    "eval RUN --video film.avi": "`video` must end in .mp4 or .gif",
    "eval RUN --best-of 0": "`best_of` must lie in [1, 1024], got 0",
    "resume RUN --steps 60": "`steps` is 60, but the run has already done 120",
    "train qsm Pendulum-v1 --out RUN": "exists and is not an empty folder",
    "list agents": "invalid choice 'agents'",
    "bench qsmm": "unknown algorithm 'qsmm'",
    "plot nowhere --out x.png": "nowhere is not a run folder",
    "plot RUN RUN --out x.png": "tiny was given twice.",
    "report RUN --out x.pdf": "`out` must end in .html or .md, got 'x.pdf'",
}


@pytest.mark.parametrize("command", BAD)
def test_bad_usage_exits_2_with_one_line_that_says_what_is_wrong(capsys, run, command):
    args = [str(run) if word == "RUN" else word for word in command.split()]
    code, out, err = call(capsys, *args)
    assert code == 2
    assert BAD[command] in (out if command == "" else err)
    assert "Traceback" not in err
    if command:
        assert err.startswith("qscore: ") and err.count("\n") == 1 and out == ""


def test_help_explains_every_field_with_its_range(capsys):
    code, out, _ = call(capsys, "train", "qsm", "Pendulum-v1", "--help")
    assert code == 0
    text = " ".join(line.strip("│ ") for line in out.splitlines())
    for flag in ("--steps", "--seeds", "--eval-every", "--algorithm.temperature", "--out"):
        assert flag in text
    for field in qs.QSM.__dataclass_fields__:
        assert f"--algorithm.{field.replace('_', '-')}" in text
    assert "in (0, inf)" in text
    assert "--environment.num-envs" in text and "--environment.id" not in text


def test_a_preset_decides_the_defaults_that_flags_override(capsys):
    official = call(capsys, "train", "qsm", "X", "--algorithm.preset", "official", "--help")[1]
    text = " ".join(line.strip("│ ") for line in official.splitlines())
    assert "(default: gradient)" in text and "(default: vp)" in text
    default = call(capsys, "train", "qsm", "X", "--help")[1]
    assert "(default: normalized)" in " ".join(line.strip("│ ") for line in default.splitlines())


def test_train_resume_eval_plot_from_the_command_line(capsys, tmp_path):
    folder = tmp_path / "run"
    code, out, err = call(
        capsys, "train", "qsm", "Pendulum-v1", "--steps", 120, "--out", folder, *TINY
    )
    assert code == 0 and out == ""
    assert "summary.json" in err and "returns.png" in err
    code, _, err = call(capsys, "resume", folder, "--steps", 180)
    assert code == 0 and json.loads((folder / "summary.json").read_text())["env_steps"] == 180

    film = tmp_path / "film.gif"
    code, out, _ = call(capsys, "eval", folder, "--episodes", 3, "--json", "--video", film)
    result = json.loads(out)
    assert code == 0 and film.stat().st_size > 0
    assert len(result["returns"]) == len(result["lengths"]) == result["episodes"] == 3
    assert result["ci95"][0] <= result["iqm"] <= result["ci95"][1] and result["seed"] == 0
    assert result["mean"] == pytest.approx(sum(result["returns"]) / 3)

    code, out, _ = call(capsys, "plot", folder, "--out", tmp_path / "figure.png")
    assert code == 0 and (tmp_path / "figure.png").stat().st_size > 0


def test_list_names_algorithms_and_environments(capsys):
    code, out, _ = call(capsys, "list")
    assert code == 0 and "qsm" in out and "HalfCheetah-v5" in out
    assert "HalfCheetah" not in call(capsys, "list", "algorithms")[1]
    assert "qsm " not in call(capsys, "list", "environments")[1]


def test_divergence_and_interrupts_have_their_exit_codes(capsys, tmp_path, monkeypatch):
    def diverging(session, until):
        raise train_host.Diverged("not finite: critic_loss")

    monkeypatch.setattr(train_host.Session, "advance", diverging)
    code, _, err = call(capsys, "train", "qsm", "Pendulum-v1", "--out", tmp_path / "a", *TINY)
    assert code == 3 and "not finite: critic_loss" in err and "checkpoints/0" in err

    def interrupted(session, until):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_host.Session, "advance", interrupted)
    code, _, _ = call(capsys, "train", "qsm", "Pendulum-v1", "--out", tmp_path / "b", *TINY)
    assert code == 130


def test_a_file_that_cannot_be_written_is_one_message(capsys, run, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    to = tmp_path / "file" / "film.mp4"
    code, _, err = call(capsys, "eval", run, "--episodes", "1", "--video", to)
    assert code == 2 and err.startswith("qscore: cannot write to `video`, ") and "film.mp4" in err

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("qscore.playback.evaluate", full)
    code, _, err = call(capsys, "eval", run)
    assert code == 1 and err == "qscore: [Errno 28] No space left on device\n"


def test_a_printed_command_can_be_pasted(capsys, run, tmp_path):
    folder = tmp_path / "a run"
    shutil.copytree(run, folder)
    _, _, err = call(capsys, "resume", folder)
    film = err.splitlines()[-1].removeprefix("watch the policy").split("eval", 1)[1]
    assert shlex.split(film) == [str(folder), "--video", str(folder / "policy.mp4")]


def test_bench_reports_the_contracts_fields(capsys, monkeypatch):
    monkeypatch.setattr("qscore.bench.REPEATS", 1)
    code, out, _ = call(capsys, "bench", "qsm", "--environment", "Pendulum-v1", "--json")
    (row,) = json.loads(out)
    assert code == 0 and list(row) == [
        *("algorithm", "environment", "updates_per_second", "act_milliseconds"),
        *("env_steps_per_second", "compile_seconds", "peak_memory_mb"),
    ]
    assert all(value > 0 for value in list(row.values())[2:])
    assert "updates_per_second" in call(capsys, "bench", "td3", "--environment", "Pendulum-v1")[1]


def test_several_are_measured_apart(capsys):
    with pytest.raises(qs.UsageError, match="unknown environment 'Pendulun-v1'"):
        bench.measure_apart("td3", "Pendulun-v1")


def test_it_also_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "qscore", "train", "nope", "x"], capture_output=True, text=True
    )
    assert done.returncode == 2 and "unknown algorithm 'nope'" in done.stderr
