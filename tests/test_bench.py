"""The benchmarks of speed: what they count, what they make of timings, and that they run."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

from qscore import bench

CORES = {min(os.sched_getaffinity(0))}
FOLDER = Path(__file__).parents[1] / "benchmarks" / "speed"


@pytest.fixture(scope="module")
def compare():
    spec = importlib.util.spec_from_file_location("compare", FOLDER / "compare.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_subject_takes_whole_chunks_of_copies_on_the_device():
    subject = bench.Subject("td3", "lq", steps=6_400, hidden=(4,), batch_size=4)
    subject.loop(6_400)
    with pytest.raises(ValueError, match="there is room for 19200 steps, warm-up included"):
        subject.loop(6_400)
    subject.close()


@pytest.mark.slow
def test_a_subject_counts_its_operations_and_keeps_to_its_room():
    width, rows, chunk = 32, 16, 50
    subject = bench.Subject(
        "sac", "Pendulum-v1", steps=chunk, hidden=(width, width), batch_size=rows
    )
    # forward products of one critic and of the actor: 3 observations, 1 action
    critic = 2 * rows * (4 * width + width * width + width * 1)
    actor = 2 * rows * (3 * width + width * width + width * 2)
    # backwards: to weights and, but for the first layer's, to inputs
    critic_back = 2 * critic - 2 * rows * 4 * width
    actor_back = 2 * actor - 2 * rows * 3 * width
    # the action's slope needs no weights, but the first layer's inputs
    slope = critic
    expected = actor + 2 * critic + 2 * (critic + critic_back)
    expected += actor + 2 * (critic + slope) + actor_back
    assert subject.flops == expected
    subject.act(3)
    subject.update(2)
    subject.loop(chunk)
    with pytest.raises(ValueError, match="there is room for"):
        subject.loop(1)
    subject.close()


def test_ratios_are_taken_round_by_round(compare):
    # the machine gets three times slower on the way, the contestant is twice as fast throughout
    reference, faster = [1.0, 2.0, 3.0], [0.5, 1.0, 1.5]

    def measured(seconds):
        about = {"version": "1", "compile_seconds": 1.0}
        return {"about": about, "peak_memory_mb": 100.0} | dict.fromkeys(compare.WORK, seconds)

    results = {"SBX SAC": measured(reference), "sac": measured(faster)}
    table = compare.summarize(results, "SBX SAC")
    for verb, count in compare.WORK.items():
        row = table["sac"][verb]
        assert row["speed_ratio"] == 2.0 and table["SBX SAC"][verb]["speed_ratio"] == 1.0
        per = count / 1.0 if verb == "loop" else 1e3 / count
        assert row["median"] == pytest.approx(per, abs=1e-3)
        assert row["quartiles"][0] < row["median"] < row["quartiles"][1]
    # its single updates took three times as long as those in one call
    results["SBX SAC"]["single"] = [3.0 * seconds for seconds in reference]
    table = compare.summarize(results, "SBX SAC")
    assert table["sac"]["update_against_single"] == 6.0
    text = compare.markdown(table, "SBX SAC")
    assert "| sac | 20 (2.00) | 20 (6.00) | 5 (2.00) | 50 (2.00) | 1.0 | 100 | 6.00 |" in text


@pytest.mark.slow
def test_contestants_work_when_told_to(compare):
    results = compare.compare(["sac"], "no rival's", "Pendulum-v1", rounds=1, cores=CORES)
    row = compare.summarize(results, "sac")["sac"]
    assert all(row[verb]["median"] > 0 and row[verb]["speed_ratio"] == 1.0 for verb in compare.WORK)
    assert row["version"] == "0.1.0" and row["peak_memory_mb"] > 0


def test_a_contestant_that_ends_ends_the_comparison(compare, monkeypatch):
    monkeypatch.setitem(compare.CONTESTANTS, "none", ("qscore", "none", {}))
    with pytest.raises(SystemExit, match="none ended"):
        compare.Contestant(sys.executable, "none", "Pendulum-v1", 50, CORES)
