"""Learning from recorded data: a step is an update, and nothing else of a run changes.

It never steps the environment, survives kills like any run, keeps the data through an online
phase, and leaves them out of its checkpoints.
"""

import json
from pathlib import Path

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import assert_close
from test_run import Killed, arrays, assert_same_run, interrupt_at, lines

import qscore as qs
from qscore import checkpoint, cli, datasets, train_host
from qscore.environments import Environment, environment_class

LIMIT = 20
PENDULUM = qs.Host("Pendulum-v1", max_episode_steps=LIMIT)
pytestmark = pytest.mark.usefixtures("quick_programs")
SMALL = {"hidden": (16, 16), "batch_size": 32}
TD3 = qs.TD3(preset="offline", **SMALL)
SDE = environment_class("pendulum_sde")(id="pendulum_sde", duration=0.4)


def write_episodes(path: Path, environment, count: int, seed: int = 0, made_in: str = "") -> Path:
    """A recording of random actions, which say that they were `made_in` the environment."""
    task, draw, rows = environment.open(), np.random.default_rng(seed), []
    for episode in range(count):
        obs, time, over = task.reset(episode), 0.0, False
        while not over:
            action = draw.uniform(-1.0, 1.0, task.spec.action_size).astype(np.float32)
            step = task.step(action)
            over = step.terminated or step.truncated
            row = (obs, action, step.reward, step.next_obs, step.terminated, time, step.dt)
            rows.append((row, step.truncated))
            obs, time = step.next_obs, time + step.dt
    columns = [np.array(column) for column in zip(*(row for row, _ in rows), strict=True)]
    single = [column if column.dtype == bool else column.astype(np.float32) for column in columns]
    low, high = task.action_bounds
    about = {
        "environment": made_in or environment.id,
        "action_low": low.tolist(),
        "action_high": high.tolist(),
    }
    datasets.save(path, qs.Transition(*single), np.array([cut for _, cut in rows]), about)
    task.close()
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Five episodes of 20 steps."""
    return write_episodes(tmp_path_factory.mktemp("data") / "data.npz", PENDULUM, 5)


def offline_run(out, data, environment: Environment = PENDULUM, algorithm=TD3, **kwargs):
    arguments = {
        **{"steps": 300, "eval_every": 100, "eval_episodes": 2, "log_every": 50},
        "progress": False,
    }
    return qs.train(algorithm, environment, dataset=data, out=out, **(arguments | kwargs))


def no_collecting(*_):
    raise AssertionError("the environment was stepped")


def test_a_step_on_data_is_an_update_and_no_step_of_the_environment(tmp_path, data, monkeypatch):
    monkeypatch.setattr(train_host.HostCollector, "collect", no_collecting)
    run = offline_run(tmp_path / "run", data, seeds=2)
    metrics = lines(run.folder, "metrics")
    assert [row["env_steps"] for row in metrics[::2]] == list(range(50, 301, 50))
    assert all(row["updates"] == row["env_steps"] for row in metrics)
    assert all("episode_return" not in row for row in metrics)
    assert [row["env_steps"] for row in lines(run.folder, "evals")[::2]] == [100, 200, 300]
    summary = run.summary
    assert summary["env_steps"] == 300 and summary["env_steps_per_second"] == 0.0
    assert summary["updates_per_second"] > 0.0
    task = PENDULUM.open()
    recorded = datasets.load(data, task)
    assert summary["dataset"] == {
        **{"source": str(data), "steps": 100, "episodes": 5},
        "mean_return": pytest.approx(recorded.returns.mean()),
    }
    assert "normalized" not in summary


def test_a_seed_on_data_is_the_same_alone_and_in_company(tmp_path, data):
    both = arrays(offline_run(tmp_path / "both", data, seeds=2).folder)
    alone = arrays(offline_run(tmp_path / "alone", data, seed_start=1).folder)
    assert both["seed-1.npz"] == alone["seed-1.npz"] != both["seed-0.npz"]


def test_where_chunks_end_does_not_change_what_is_learned_from_data(tmp_path, data):
    often = offline_run(tmp_path / "often", data, steps=500, eval_every=100, log_every=20)
    seldom = offline_run(tmp_path / "seldom", data, steps=500, eval_every=250, log_every=500)
    assert arrays(often.folder) == arrays(seldom.folder)


CASES = {
    "offline": (PENDULUM, 0),
    "offline to online": (PENDULUM, 150),
    "offline to online, in JAX": (SDE, 150),
}


@pytest.mark.parametrize("case", CASES)
def test_a_killed_run_on_data_resumes_bit_for_bit(tmp_path, monkeypatch, case):
    environment, online = CASES[case]
    data = write_episodes(tmp_path / "data.npz", environment, 5)
    whole = offline_run(tmp_path / "whole", data, environment, online_steps=online).folder
    folder = tmp_path / "killed"
    advance = train_host.Session.advance
    for i, step in enumerate([40, 150, 250, 300, 340, 400][: 6 if online else 3]):

        def dying(session, until, step=step):
            if session.env_steps >= step:
                raise Killed
            advance(session, until)

        monkeypatch.setattr(train_host.Session, "advance", dying)
        with pytest.raises(Killed):
            if i == 0:
                offline_run(folder, data, environment, online_steps=online)
            else:
                qs.resume(folder, progress=False)
        monkeypatch.undo()
    run = qs.resume(folder, progress=False)
    assert_same_run(whole, folder)
    assert run.summary["env_steps"] == 300 + online


@pytest.mark.parametrize("step", [150, 350])
def test_an_interrupted_run_on_data_goes_on_from_its_checkpoint(tmp_path, data, monkeypatch, step):
    whole = offline_run(tmp_path / "whole", data, online_steps=100).folder
    interrupt_at(step, monkeypatch)
    with pytest.raises(qs.Interrupted, match=f"at {step} of 400 steps"):
        offline_run(tmp_path / "cut", data, online_steps=100)
    monkeypatch.undo()
    qs.resume(tmp_path / "cut", progress=False)
    assert_same_run(whole, tmp_path / "cut")


def test_the_end_of_the_data_is_evaluated_and_the_online_part_collects(tmp_path, data):
    run = offline_run(tmp_path / "run", data, steps=250, online_steps=150, keep_checkpoints=9)
    assert [row["env_steps"] for row in lines(run.folder, "evals")] == [100, 200, 250, 300, 400]
    assert checkpoint.steps(run.checkpoints) == [0, 100, 200, 250, 300, 400]
    metrics = {row["env_steps"]: row for row in lines(run.folder, "metrics")}
    assert metrics[250]["updates"] == 250 and metrics[400]["updates"] == 400
    assert "episode_return" not in metrics[250] and "episode_return" in metrics[300]
    summary = run.summary
    assert summary["env_steps"] == 400 and summary["env_steps_per_second"] > 0.0


def test_a_checkpoint_holds_what_was_collected_and_not_what_was_recorded(tmp_path, data):
    run = offline_run(tmp_path / "run", data, online_steps=150, keep_checkpoints=9)
    for step, collected in ((300, 0), (400, 100), (450, 150)):
        with np.load(run.checkpoints / str(step) / "seed-0.npz") as archive:
            rows = {len(archive[name]) for name in archive.files if "replay" in name}
        assert rows == {collected}
    header = json.loads((run.checkpoints / "450" / "header.json").read_text())
    assert header["dataset"] == datasets.load(data, PENDULUM.open()).sha256


def test_the_data_stay_in_the_replay_through_a_longer_online_phase(data):
    task = PENDULUM.open()
    rows = datasets.load(data, task).rows
    algorithm = qs.TD3(**SMALL, replay_capacity=100, warmup_steps=10_000, exploration_noise=0.0)
    session = train_host.Session(
        algorithm, PENDULUM, 0, steps=350, eval_episodes=1, data=rows, offline_steps=100
    )
    while session.env_steps < 100:
        session.advance(100)
    policy = train_host.evaluation_policy(algorithm, task.spec)
    read = [jnp.array(leaf) for leaf in policy.read(session.runner.agent)]  # of the data alone
    session.advance(350)
    held = session.runner.replay.data
    # the first actions after the data are the policy's: the data were the warm-up
    obs = np.zeros((policy.rows, 3), np.float32)
    obs[:] = np.asarray(held.obs[100])
    acted, _ = policy(read, policy.init_carry(), obs, jr.key(0), 0)
    assert_close(np.asarray(held.action[100]), acted[0])
    while session.env_steps < 350:
        session.advance(350)
    assert session.updates == 350 and int(session.runner.replay.added) == 350
    held = session.runner.replay.data
    for name, leaf in vars(rows).items():
        assert np.array_equal(np.asarray(getattr(held, name))[:100], leaf)
    collected = np.asarray(held.obs)[100:350]
    assert len(np.unique(collected, axis=0)) == 250  # none was overwritten
    session.close()


def test_the_online_part_can_be_made_longer(tmp_path, data):
    longer = offline_run(tmp_path / "longer", data, online_steps=200).folder
    shorter = offline_run(tmp_path / "shorter", data, online_steps=100).folder
    run = qs.resume(shorter, steps=500, progress=False)
    assert_same_run(longer, shorter)
    assert (run.settings.steps, run.settings.online_steps) == (300, 200)
    with pytest.raises(qs.UsageError, match="`steps` is 450, but the run has already done 500"):
        qs.resume(shorter, steps=450)


def test_learning_from_data_can_be_made_longer(tmp_path, data, monkeypatch):
    longer = offline_run(tmp_path / "longer", data, steps=400).folder
    shorter = offline_run(tmp_path / "shorter", data, steps=200).folder
    run = qs.resume(shorter, steps=400, progress=False)
    assert_same_run(longer, shorter)
    assert run.settings.steps == 400

    interrupt_at(150, monkeypatch)
    with pytest.raises(qs.Interrupted):
        offline_run(tmp_path / "cut", data, steps=250, online_steps=100)
    monkeypatch.undo()
    with pytest.raises(qs.UsageError, match="`steps` is 200, but the run takes 250 on its data"):
        qs.resume(tmp_path / "cut", steps=200)
    # an end that was evaluated is not evaluated twice
    run = qs.resume(tmp_path / "cut", steps=250, progress=False)
    qs.resume(tmp_path / "cut", steps=250, progress=False)
    assert [row["env_steps"] for row in lines(run.folder, "evals")] == [100, 200, 250]


def test_a_run_finds_its_data_from_anywhere_and_refuses_other_ones(
    tmp_path, monkeypatch, data, capsys
):
    own = tmp_path / "own.npz"
    own.write_bytes(data.read_bytes())
    monkeypatch.chdir(tmp_path)
    run = offline_run(tmp_path / "run", "own.npz", steps=100)
    assert run.settings.dataset == str(own)
    monkeypatch.chdir("/")
    qs.resume(run.folder, steps=200, progress=False)
    write_episodes(own, PENDULUM, 5, seed=1)
    with pytest.raises(qs.UsageError, match="own.npz does not hold what this run began with"):
        qs.resume(run.folder, steps=300, progress=False)
    own.unlink()
    with pytest.raises(SystemExit, match="2"):
        cli.main(["resume", str(run.folder), "--steps", "300"])
    assert f"there is no data set {own}." in capsys.readouterr().err
    assert checkpoint.steps(run.checkpoints)[-1] == 200


def test_what_cannot_be_learned_from_is_refused_before_anything_is_written(tmp_path, data):
    def refused(message, source=data, **kwargs):
        with pytest.raises(qs.UsageError, match=message):
            offline_run(tmp_path / "run", source, **kwargs)
        assert not (tmp_path / "run").exists()

    small = qs.TD3(**SMALL, replay_capacity=99)
    refused("has 100 transitions, more than `algorithm.replay_capacity`, 99", algorithm=small)
    refused("`online_steps` follow after training on a `dataset`", None, online_steps=10)
    refused(r"`online_steps` must lie in \[0, 2e\+09\], got -1", online_steps=-1)
    refused("there is no data set gone.npz", "gone.npz")
    refused(r"recorded with `action_low` \[-2.0\]", environment=qs.Host("Hopper-v5"))
    pair = qs.Host("Pendulum-v1", num_envs=2)
    message = "`online_steps` must be a multiple of `environment.num_envs`, 2; got 51"
    refused(message, environment=pair, online_steps=51)


@pytest.mark.parametrize(
    "words, preset",
    {
        "td3": "default",
        "td3 --dataset DATA": "offline",
        "td3 --dataset=DATA": "offline",
        "td3 --dataset None": "default",
        "td3 --dataset DATA --algorithm.preset default": "default",
        "td3 --algorithm.preset=default --dataset DATA": "default",
        "qsm --dataset DATA --algorithm.preset official": "official",
    }.items(),
)
def test_data_choose_the_offline_preset_where_none_is_asked_for(monkeypatch, words, preset):
    asked = []
    monkeypatch.setattr(cli.run, "train", lambda algorithm, *_, **__: asked.append(algorithm))
    monkeypatch.setattr(cli, "_conclude", lambda _: None)
    name, *options = words.split()
    cli.main(["train", name, "Pendulum-v1", *options])
    assert asked == [qs.ALGORITHMS[name](preset=preset)]


def test_data_leave_an_algorithm_without_that_preset_as_it_is(monkeypatch):
    asked = []
    monkeypatch.setattr(cli.run, "train", lambda algorithm, *_, **kw: asked.append((algorithm, kw)))
    monkeypatch.setattr(cli, "_conclude", lambda _: None)
    cli.main(["train", "sac", "Pendulum-v1", "--dataset", "x", "--online-steps", "7"])
    ((algorithm, kwargs),) = asked
    assert algorithm == qs.SAC()
    assert kwargs["dataset"] == "x" and kwargs["online_steps"] == 7


def test_the_command_line_learns_from_data_and_says_so(capsys, tmp_path, data):
    folder = tmp_path / "run"
    settings = "--steps 60 --eval-episodes 1 --algorithm.hidden 8 8 --environment.max-episode-steps"
    options = [*settings.split(), str(LIMIT), "--dataset", str(data), "--out", str(folder)]
    cli.main(["train", "td3", "Pendulum-v1", *options])
    assert "0 environment steps/s" in capsys.readouterr().err
    config = json.loads((folder / "config.json").read_text())
    assert config["settings"]["dataset"] == str(data) and config["settings"]["online_steps"] == 0
    assert config["algorithm"]["preset"] == "offline"


def test_data_of_another_task_are_named(capsys, tmp_path):
    def said(name):
        data = write_episodes(tmp_path / f"{name}.npz", PENDULUM, 1, made_in=name)
        offline_run(tmp_path / name, data, steps=50, progress=True)
        return capsys.readouterr().err

    assert "was recorded in" not in said("Pendulum-v0")  # another version of the same task
    assert "Swing-v1.npz was recorded in Swing-v1, not in Pendulum-v1." in said("Swing-v1")


def test_scores_are_normalised_where_a_reference_is_known(tmp_path):
    hopper = qs.Host("Hopper-v5")
    data = write_episodes(tmp_path / "data.npz", hopper, 4)
    run = offline_run(tmp_path / "run", data, hopper, steps=50, seeds=2)
    low, high = datasets.references(hopper)["d4rl"]
    expected = [100.0 * (value - low) / (high - low) for value in run.summary["final_returns"]]
    assert run.summary["normalized"] == {"d4rl": pytest.approx(expected)}
    result = qs.evaluate(run.folder, episodes=2)
    score = 100.0 * (result["mean"] - low) / (high - low)
    assert result["normalized"] == {"d4rl": pytest.approx(score)}
