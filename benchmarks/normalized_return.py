"""Returns of finished `lq` runs between a plain score's and the optimum, per seed.

    python benchmarks/normalized_return.py RUN [RUN ...]

Prints (J - J0) / (J* - J0) with J* the optimal return, J* - J from the run's `return_gap`, and J0
that of the score -B'x - 2 a, all from the environment's starts, continuous in time and with the
score's cost. That score needs no solution of the problem; where it is not admissible the
normalised return is not defined, and the command says so.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from qscore import lq


def normalized_returns(run: Path) -> list[float | None]:
    """One value per seed of a run folder; None where the learned score is not admissible."""
    config, summary = (
        json.loads((run / name).read_text()) for name in ("config.json", "summary.json")
    )
    if "lq" not in summary:
        raise SystemExit(f"{run} is not a finished run on `lq`: its summary has no closed form.")
    problem = lq.Problem.from_json(config["environment"]["problem"])
    start = np.zeros(problem.state_size + problem.action_size)
    spread = config["environment"]["spread"] ** 2 * np.eye(len(start))
    K = np.hstack([-problem.B.T, -2.0 * np.eye(problem.action_size)])
    plain = lq.evaluate(problem, K).expected_q(start, spread)
    best = lq.solve(problem).expected_q(start, spread)
    unit = abs(best) / (best - plain)
    return [None if gap is None else 1.0 - unit * gap for gap in summary["lq"]["return_gap"]]


def main() -> None:
    parser = argparse.ArgumentParser(description="normalised returns of lq runs")
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, or their committed files")
    for run in parser.parse_args().runs:
        values = normalized_returns(run)
        row = "  ".join("unbounded" if v is None else f"{v:.4f}" for v in values)
        print(f"{run}  {row}")


if __name__ == "__main__":
    main()
