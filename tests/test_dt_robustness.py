"""The benchmark of errors against the control step: its exact curves, and that it runs."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

import qscore as qs

PATH = Path(__file__).parents[1] / "benchmarks" / "dt_robustness.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("dt_robustness", PATH)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_the_discrete_optimum_beats_its_neighbours_and_has_its_own_value(benchmark):
    problem, dt = qs.lq.Problem.from_json(benchmark.PROBLEM), 0.05
    P, gain = benchmark.discrete_optimum(problem, dt)

    def earned(first, gain):
        """Discounted rewards without noise from x = 1 and this first action, for 60 seconds."""
        x, u, total, discount = 1.0, first, 0.0, 1.0
        for _ in range(1200):
            z = np.array([x, u])
            after = np.array([x + dt * (0.3 * x + u), u])
            rate = lambda z: -0.5 * z @ problem.M @ z  # noqa: E731
            total += discount * 0.5 * dt * (rate(z) + rate(after))
            x, discount = after[0], discount * np.exp(-problem.discount_rate * dt)
            u = gain * x
        return total

    best = float(gain[0, 0])
    for u in (-1.0, 0.0, 2.0):
        z = np.array([1.0, u])
        assert earned(u, best) == pytest.approx(-0.5 * z @ P @ z, rel=1e-9)
    for other in (0.98 * best, 1.02 * best):
        assert earned(best, best) > earned(other, other)


def test_only_the_discrete_gradient_vanishes_with_the_step(benchmark):
    problem = qs.lq.Problem.from_json(benchmark.PROBLEM)
    rms = {dt: benchmark.gradient_rms(benchmark.discrete_optimum(problem, dt)[0], 1) for dt in
           (0.01, 0.005, 0.0025)}  # fmt: skip
    assert rms[0.01] / rms[0.005] == pytest.approx(2.0, rel=0.03)
    assert rms[0.005] / rms[0.0025] == pytest.approx(2.0, rel=0.015)
    exact = qs.lq.solve(problem)
    z = np.random.default_rng(0).standard_normal((100_000, 2))
    expected = np.sqrt(np.mean(exact.gradient(z) ** 2))
    assert benchmark.gradient_rms(exact.P, 1) == pytest.approx(expected, rel=0.02)


@pytest.mark.slow
def test_the_quick_benchmark(benchmark, tmp_path, monkeypatch, capsys):
    out, figure = tmp_path / "quick.json", tmp_path / "quick.png"
    arguments = ["--quick", "--only", "cqsm", "q", "--out", str(out), "--figure", str(figure)]
    monkeypatch.setattr(sys, "argv", ["dt_robustness.py", *arguments])
    benchmark.main()
    assert "| cqsm |" in capsys.readouterr().out
    results = json.loads(out.read_text())
    assert figure.stat().st_size > 10_000
    errors = [seeds["0"]["error"] for seeds in results["errors"]["cqsm"].values()]
    assert len(errors) == 2 and max(errors) < 0.25
    assert results["summary"]["cqsm"]["ratio"] == pytest.approx(errors[1] / errors[0], abs=1e-3)
    with pytest.raises(ValueError, match="other settings"):
        benchmark.benchmark(["cqsm"], [0.05], [0], 1.0, out)
