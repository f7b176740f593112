"""Every experiment runs, in its quick form, and ends in a file, a table and a picture."""

import dataclasses
import importlib
import json
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from helpers import fast_compilation, write_run

import qscore as qs
from qscore.panel import read_panel

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
NAMES = sorted(path.stem for path in EXPERIMENTS.glob("*.py") if path.stem != "common")


@pytest.fixture
def load(monkeypatch):
    """Import an experiment as its command does, with its folder on the path."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    registered = set(gym.registry)
    yield importlib.import_module
    for name in [*NAMES, "common"]:
        sys.modules.pop(name, None)
    for id in set(gym.registry) - registered:
        del gym.registry[id]


ARGUMENTS = {"control_panels": ["mujoco", "--algorithms", "td3", "qsm"]}
"""What a command needs besides, or leaves out because the contract tests have run it."""


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_quick_form_ends_in_a_file_a_table_and_a_picture(
    name, load, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("qscore.closed_form.PATHS", 64)  # the figures are not looked at
    out = tmp_path / f"{name}.json"
    places = ["--runs", str(tmp_path / "runs"), "--out", str(out)]
    with fast_compilation():
        load(name).main([*ARGUMENTS.get(name, []), "--quick", *places])
    result = json.loads(out.read_text())
    assert result["quick"] is True and result["commit"] and result["command"].startswith("python ")
    assert out.with_suffix(".png").stat().st_size > 10_000
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(rows) > 3 and len({row.count("|") for row in rows}) == 1


def test_runs_are_shared_and_taken_up_where_they_stopped(load, tmp_path, capsys):
    common = load("common")
    algorithm = qs.TD3(hidden=(4, 4), batch_size=4, warmup_steps=50)
    jobs = [
        common.Job("pendulum/td3", algorithm, qs.Host("Pendulum-v1"), 100, seed, 50, 1)
        for seed in (0, 1)
    ]
    lock = tmp_path / "pendulum" / "td3" / "seed-0.lock"
    lock.parent.mkdir(parents=True)
    with open(lock, "w") as held:  # another process is at it
        common.fcntl.flock(held, common.fcntl.LOCK_EX)
        assert not common.train(jobs, tmp_path)
    assert not jobs[0].folder(tmp_path).exists()
    panel = common.panel(jobs, tmp_path)
    assert list(panel.tasks[0].methods[0].seeds) == [1]
    assert common.train(jobs, tmp_path)
    (method,) = common.panel(jobs, tmp_path).tasks[0].methods
    assert list(method.seeds) == [0, 1] and method.steps == [50, 100]
    # one that was cut short, here by its summary, is resumed and not begun anew
    (jobs[1].folder(tmp_path) / "summary.json").unlink()
    before = (jobs[1].folder(tmp_path) / "metrics.jsonl").read_text()
    assert common.train(jobs, tmp_path)
    assert (jobs[1].folder(tmp_path) / "metrics.jsonl").read_text() == before


def test_a_run_that_another_process_gave_up_is_no_reason_to_wait(load, tmp_path, monkeypatch):
    common = load("common")
    jobs = [common.Job("task/td3", qs.TD3(), qs.Host("Pendulum-v1"), 100, 0, 50) for _ in "ab"]
    left = [BlockingIOError(), None, None]  # held at first; then it is free

    def flock(file, operation):
        if error := left.pop(0):
            raise error

    def diverging(job, folder):
        raise qs.TrainingDiverged("not finite")

    monkeypatch.setattr(common.fcntl, "flock", flock)
    monkeypatch.setattr(common, "_train", diverging)
    assert common.train(jobs, tmp_path)
    assert common.trained_at(tmp_path) == [common.commit()]


def test_an_asked_part_of_a_panel_leaves_the_rest_in_its_results(load, tmp_path):
    panels = load("control_panels")
    asked = panels.argparse.Namespace(
        tasks=["HalfCheetah-v5"], algorithms=None, seeds=[3], quick=False
    )
    (tmp_path / "Hopper-v5" / "td3" / "seed-4").mkdir(parents=True)
    (tmp_path / "Hopper-v5" / "td3" / "seed-4.lock").touch()
    found = panels.everything("mujoco", panels.jobs("mujoco", asked), tmp_path)
    names = {(job.environment.id, job.name.split("/")[1], job.seed) for job in found}
    assert len(found) == len(names) == 4 * 5 * 3 + 5 + 1
    assert ("HalfCheetah-v5", "cqsm", 3) in names and ("Hopper-v5", "td3", 4) in names
    assert ("Swimmer-v5", "cqsm", 2) in names and ("Swimmer-v5", "cqsm", 3) not in names


def finished_run(job, runs, level):
    """A job's run folder as training leaves it."""
    settings = {"steps": job.steps, "eval_every": job.eval_every, "eval_episodes": 10}
    settings |= {"seeds": 1, "seed_start": job.seed}
    folder = job.folder(runs)
    write_run(folder, job.algorithm, job.environment, level=level, every=5_000, **settings)
    (folder / "summary.json").write_text("{}")
    folder.with_suffix(".commits").write_text("0123456789\n")


def test_what_a_panel_found_outlives_its_runs(load, tmp_path, capsys):
    panels = load("control_panels")
    command = ["mujoco", "--tasks", "Hopper-v5", "--algorithms", "td3", "sac", "--seeds", "0", "1"]
    command += ["--table", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "found.json")]
    asked = panels.argparse.Namespace(
        tasks=["Hopper-v5"], algorithms=["td3", "sac"], seeds=[0, 1], quick=False
    )
    jobs = panels.jobs("mujoco", asked)
    for level, job in enumerate(jobs):
        finished_run(job, tmp_path / "runs", 1_000 * level)
    panels.main(command)
    table = capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    returns = {name: row["returns"] for name, row in found["tasks"]["Hopper-v5"].items()}
    assert returns["sac"] == {"0": 101_000.0, "1": 103_001.0}
    assert returns["td3"] == {"0": 100_000.0, "1": 102_001.0}
    assert found["trained_at"] == ["0123456789"]
    (tmp_path / "runs").rename(tmp_path / "lost")
    panels.main([word for word in command if word != "--table"])  # and none is trained again
    again = json.loads((tmp_path / "found.json").read_text())
    assert capsys.readouterr().out == table
    assert again | {"command": found["command"]} == found
    # they are run folders, for whatever compares runs
    folders = sorted((tmp_path / "found").glob("*/*/seed-?"))
    assert len(read_panel(folders).tasks[0].methods) == 2 and len(folders) == 4


@pytest.mark.parametrize("name", ["bf16", "score_scale", "multi_modality"])
def test_a_run_that_diverged_is_named_and_shortens_nothing(
    name, load, tmp_path, capsys, monkeypatch
):
    module = load(name)
    jobs = module.jobs(quick=True)
    jobs = jobs if isinstance(jobs, list) else [job for each in jobs.values() for job in each]
    ended, diverged = jobs
    for job, done in ((ended, ended.steps), (diverged, diverged.steps // 2)):
        settings = {**job.settings, "seeds": 1}
        every = settings.pop("eval_every")
        write_run(
            job.folder(tmp_path), job.algorithm, job.environment,
            every=every, done=done, eval_every=every, **settings,
        )  # fmt: skip
    (ended.folder(tmp_path) / "summary.json").write_text('{"final_returns": [1.0]}')
    monkeypatch.setattr(module, "train", lambda jobs, runs: True)
    if name == "multi_modality":
        monkeypatch.setattr(module, "draw", lambda *args, **_: np.array([-1.0, 1.0]))
    out = tmp_path / f"{name}.json"
    module.main(["--quick", "--runs", str(tmp_path), "--out", str(out)])
    found = json.loads(out.read_text())
    assert found["missing"] == [f"{diverged.name}, seed {diverged.seed}"]
    assert f"missing: {diverged.name}" in capsys.readouterr().out
    if name == "bf16":
        assert found["steps"] == {"Pendulum-v1": 600}


def test_a_run_of_other_settings_is_not_taken_for_one_of_the_experiment(load, tmp_path):
    common = load("common")
    job = common.Job("task/td3", qs.TD3(), qs.Host("Hopper-v5"), 100_000, 0, 5_000)
    finished_run(job, tmp_path, 0.0)
    assert common.panel([job], tmp_path).names == ["td3"]
    shorter = dataclasses.replace(job, steps=50_000)
    with pytest.raises(qs.UsageError, match="seed-0 is no run of this .* --steps 50000"):
        common.panel([shorter], tmp_path)
    wider = dataclasses.replace(job, algorithm=qs.TD3(hidden=(512, 512)))
    (job.folder(tmp_path) / "summary.json").unlink()
    with pytest.raises(qs.UsageError, match=r"--algorithm\.hidden 512 512` is asked for"):
        common.train([wider], tmp_path)


def test_quick_results_never_lie_where_the_full_ones_do(load):
    common = load("common")
    parse = common.arguments("", "name").parse_args
    quick, full = common.places(parse(["--quick"])), common.places(parse([]))
    assert full == (common.ROOT / "runs" / "name", common.RESULTS / "name.json")
    assert quick == (common.ROOT / "runs" / "name-quick", quick[0] / "name.json")


def test_coverage_of_two_modes(load):
    coverage = load("multi_modality").coverage
    assert coverage(np.array([-0.5, 0.5, 0.6, -0.7])) == 1.0
    assert coverage(np.array([-0.5, 0.5, 0.6, 0.7])) == 0.5
    assert coverage(np.array([0.5, 0.6])) == coverage(np.array([0.0, 0.05, -0.05])) == 0.0


def test_the_deceptive_reward_leads_to_the_small_hill(load):
    exploration = load("exploration")
    point = exploration.START.copy()
    for _ in range(200):  # steepest ascent
        step = [
            exploration.reward(point + 0.01 * unit) - exploration.reward(point - 0.01 * unit)
            for unit in np.eye(2)
        ]
        point = np.clip(point + 0.05 * np.array(step) / np.linalg.norm(step), -1, 1)
    assert np.linalg.norm(point - exploration.NEAR) < 0.1
    assert exploration.reward(exploration.FAR) > 3.5 * exploration.reward(exploration.NEAR)
    square = np.stack(np.meshgrid(*[np.linspace(-0.99, 0.99, 100)] * 2), -1).reshape(-1, 2)
    assert exploration.cells(square) == 1.0 and exploration.cells(square[:1]) == 1 / 400


def test_each_scale_of_the_score_is_a_multiple_of_the_default(load):
    algorithm = load("score_scale").algorithm
    usual = qs.QSM()
    assert algorithm("gradient", 3.0).score_scale == 3.0 * usual.score_scale
    assert algorithm("posterior", 3.0).temperature == usual.temperature / 3.0
    assert algorithm("normalized", 1.0) == usual


def test_the_figures_over_all_tasks_of_a_panel_are_of_its_normalised_returns(load, tmp_path):
    panels = load("control_panels")
    folders = [
        write_run(tmp_path / f"{task}-{name}", algorithm, qs.Host(task), level=level, every=20)
        for task in ("Pendulum-v1", "Hopper-v5")
        for name, algorithm, level in (("sac", qs.SAC(), -50), ("qsm", qs.QSM(), 0))
    ]
    folders.append(write_run(tmp_path / "td3", qs.TD3(), qs.Host("Hopper-v5"), every=20, level=-9))
    rows = panels.overall(read_panel(folders))
    # seeds end at 400 to 402 and 350 to 352; the lowest interquartile mean is 20 - 50 + 1
    assert list(rows) == ["qsm", "sac"]  # the other was run on one task only
    assert rows["qsm"]["iqm"] == 1.0
    assert rows["sac"]["iqm"] == pytest.approx(380 / 430, abs=1e-3)
    # 50 steps on average, of the evaluations at 20 to 80
    assert rows["qsm"]["early_iqm"] == pytest.approx(80 / 430, abs=1e-3)
    assert rows["sac"]["early_iqm"] == pytest.approx(30 / 430, abs=1e-3)
    assert rows["sac"]["best_is_better"] == 1.0 and rows["sac"]["by_chance"] < 0.01
    shown = panels.overall_table(rows).splitlines()
    assert shown[0].count("|") == shown[2].count("|") == 8
    assert "| a seed of qsm is better |" in shown[0] and "| 100% |" in shown[3]
