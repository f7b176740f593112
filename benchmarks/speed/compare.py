"""How fast every algorithm is beside what one would use instead, all timed in turns in one run.

    python benchmarks/speed/compare.py --out benchmarks/results/speed.json

Each contestant is a process of its own (`contestant.py`), started on the same cores: this library's
algorithms, SAC and TD3 of SBX (Stable-Baselines3's JAX version) and of Stable-Baselines3, which
are installed from PyPI into an environment of their own, and Diffusion-QL in PyTorch
(`torch_diffusion_ql.py`). In every round each contestant takes its turn at the same work while the
others wait; figures are medians over rounds with their quartiles, and ratios are taken round by
round, so that a machine that changes its pace changes no ratio.

All have networks (256, 256) (Diffusion-QL as its authors have it: three layers), batches of 256,
one update per step and their other defaults. Work:

    update   milliseconds per update, 50 in one call
    single   milliseconds per update, each in a call of its own, as SBX and SB3 train
    act      milliseconds per action for one observation
    loop     environment steps per second of training: acting, environment, replay and update

Also seconds of compilation before the first update, and the peak memory of the process. `--cores`
pins everything; the default is one core. The file is written anew each time, with the machine and
the versions; tables go to stdout and, as Markdown, beside the file.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

RIVALS = ("sbx-rl==0.28.0", "stable-baselines3==2.9.2", "gymnasium[mujoco]>=1.1", "mujoco<4")
# library, algorithm, its fields and, of this library, the precision of products
CONTESTANTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qsm": ("qscore", "qsm", {}),
    "qsm, official": ("qscore", "qsm", {"preset": "official"}),
    "qsm, bf16": ("qscore", "qsm", {"precision": "bf16"}),
    "cqsm": ("qscore", "cqsm", {}),
    "diffusion_ql": ("qscore", "diffusion_ql", {}),
    "diffusion_ql, offline": ("qscore", "diffusion_ql", {"preset": "offline"}),
    "diffusion_ql, offline, bf16": (
        "qscore",
        "diffusion_ql",
        {"preset": "offline", "precision": "bf16"},
    ),
    "sac": ("qscore", "sac", {}),
    "td3": ("qscore", "td3", {}),
    "SBX SAC": ("sbx", "sac", {}),
    "SBX TD3": ("sbx", "td3", {}),
    "SB3 SAC": ("sb3", "sac", {}),
    "SB3 TD3": ("sb3", "td3", {}),
    "PyTorch Diffusion-QL": ("torch", "diffusion_ql", {}),
}
WORK = {"update": 50, "single": 50, "act": 200, "loop": 50}
REFERENCE = "SBX SAC"


class Contestant:
    """A process that works when it is told to."""

    def __init__(self, python: str, name: str, task: str, steps: int, cores: set[int]):
        library, algorithm, fields = CONTESTANTS[name]
        script = Path(__file__).with_name("contestant.py")
        command = [python, str(script), library, algorithm, task, "--steps", str(steps)]
        command += ["--fields", json.dumps(fields), "--cores", *map(str, sorted(cores))]
        self.name = name
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.about = self._answer()

    def work(self, verb: str) -> dict[str, float]:
        """Seconds for the work of one turn, and the process's peak memory since it began."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": verb, "count": WORK[verb]}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def stop(self) -> None:
        """End the process."""
        with self.process:  # closes its pipes, too
            self.process.kill()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.stop()
            raise SystemExit(f"error: {self.name} ended; what it said is above")
        return json.loads(line)


def install_rivals(folder: Path) -> str:
    """The interpreter of an environment that holds the rivals, made where there is none."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run(["uv", "venv", "--quiet", str(folder)], check=True)
    install = ["uv", "pip", "install", "--quiet", "--python", str(python)]
    subprocess.run([*install, *RIVALS], check=True)
    return str(python)


def compare(
    names: list[str], rivals: str, task: str, rounds: int, cores: set[int]
) -> dict[str, Any]:
    """Seconds of every round, by contestant and work, and what each said of itself."""
    steps = (rounds + 1) * WORK["loop"]
    contestants = [
        Contestant(
            sys.executable if CONTESTANTS[name][0] == "qscore" else rivals, name, task, steps, cores
        )
        for name in names
    ]
    results: dict[str, Any] = {each.name: {"about": each.about} for each in contestants}
    for verb in WORK:
        for turn in range(rounds + 1):
            for each in contestants:
                answer = each.work(verb)
                if turn > 0:  # the first turn compiles
                    results[each.name].setdefault(verb, []).append(answer["seconds"])
                results[each.name]["peak_memory_mb"] = answer["peak_memory_mb"]
    for each in contestants:
        each.stop()
    return results


def summarize(results: dict[str, Any], reference: str) -> dict[str, Any]:
    """Medians, quartiles and the median ratio to the reference's speed, round by round."""
    table: dict[str, Any] = {}
    for name, measured in results.items():
        row: dict[str, Any] = {
            "version": measured["about"]["version"],
            "compile_seconds": round(measured["about"]["compile_seconds"], 2),
            "peak_memory_mb": round(measured["peak_memory_mb"]),
        }
        single = np.array(results[reference]["single"]) / WORK["single"]
        each = np.array(measured["update"]) / WORK["update"]
        row["update_against_single"] = round(float(np.median(single / each)), 3)
        for verb, count in WORK.items():
            seconds, other = np.array(measured[verb]), np.array(results[reference][verb])
            per = count / seconds if verb == "loop" else 1e3 * seconds / count
            low, middle, high = np.quantile(per, [0.25, 0.5, 0.75])
            row[verb] = {
                "median": round(float(middle), 3),
                "quartiles": [round(float(low), 3), round(float(high), 3)],
                "speed_ratio": round(float(np.median(other / seconds)), 3),
            }
        table[name] = row
    return table


def markdown(table: dict[str, Any], reference: str) -> str:
    """The summary as a table; in brackets how many times as fast as the reference."""
    lines = [
        "| | update, ms | one per call, ms | act, ms | loop, steps/s | compile, s | memory, MiB "
        f"| update, against {reference}'s one per call |\n|---|---|---|---|---|---|---|---|"
    ]
    for name, row in table.items():
        cells = [
            f"{row[verb]['median']:.3g} ({row[verb]['speed_ratio']:.2f})"
            for verb in ("update", "single", "act", "loop")
        ]
        rest = f"{row['compile_seconds']:.1f} | {row['peak_memory_mb']}"
        against = f"{row['update_against_single']:.2f}"
        lines.append(f"| {name} | {' | '.join(cells)} | {rest} | {against} |")
    return "\n".join(lines) + f"\n\nIn brackets: speed as a multiple of {reference}'s.\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=list(CONTESTANTS), default=list(CONTESTANTS))
    parser.add_argument("--task", default="HalfCheetah-v5")
    parser.add_argument("--rounds", type=int, default=15)
    one = sorted(os.sched_getaffinity(0))[:1]
    parser.add_argument("--cores", type=int, nargs="+", default=one)
    parser.add_argument("--rivals", type=Path, default=Path(".venv-rivals"))
    args = parser.parse_args()
    if REFERENCE not in args.only:
        parser.error(f"--only must name {REFERENCE!r}, which all ratios refer to")

    rivals = install_rivals(args.rivals)
    results = compare(args.only, rivals, args.task, args.rounds, set(args.cores))
    table = summarize(results, REFERENCE)
    machine = f"{platform.machine()}, {len(args.cores)} of {os.cpu_count()} cores"
    about = {"machine": machine, "task": args.task, "rounds": args.rounds, "reference": REFERENCE}
    args.out.write_text(json.dumps(about | {"contestants": table}, indent=1) + "\n")
    text = markdown(table, REFERENCE)
    args.out.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
