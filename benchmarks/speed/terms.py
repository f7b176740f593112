"""Where an update's time goes, term by term, by XLA's own profile of the compiled program.

    python benchmarks/speed/terms.py --out benchmarks/results/terms.json

Profiles updates of one algorithm on HalfCheetah-v5 in one call and sorts what was executed:

    products     matrix products, and of them
    at peak      what they would take at the rate of `roofline.py`, measured beside
    transposes   inputs of weights' gradients, rewritten for the products
    random       drawing batches, levels and noise
    the rest     activations, losses, optimiser, moving averages, copies

in milliseconds per update. A profile costs time by itself, most where there are many small pieces
(`random`, `the rest`): `update` is the time without it, and what the terms come to beyond that is
`profiling`.
"""

import gzip
import json
import re
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from roofline import UPDATES, in_turns, report

RANDOM = ("threefry", "_normal", "_uniform", "random")


def operations(program: str) -> dict[str, str]:
    """What each operation of a compiled program stands for: its name in the traced one."""
    found = re.findall(r'%?([\w.-]+) = [^\n]*?op_name="([^"]*)"', program)
    return dict(found)


def term(name: str, origin: str) -> str:
    """The term that an operation belongs to."""
    if any(word in origin for word in RANDOM):
        return "random"
    if re.match(r"(ynn_fusion|dot)[.\d]*$", name):
        return "products"
    return "transposes" if name.startswith("transpose") else "the rest"


OPERATION = re.compile(r"(?!while|call)[a-z][\w-]*(\.\d+)?$")
"""Not Python's nor the runtime's, and no loop, whose body is counted."""


def profile(work: Callable[[], None]) -> dict[str, float]:
    """Microseconds that each operation took while `work` ran."""
    import jax

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            work()
        (file,) = Path(folder).rglob("*.trace.json.gz")
        events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    taken: dict[str, float] = defaultdict(float)
    for event in events:
        if event.get("ph") == "X" and OPERATION.match(event["name"]):
            taken[event["name"]] += event["dur"]
    return taken


def measure(algorithm: str, fields: dict[str, Any], width: int, rounds: int) -> dict[str, float]:
    """Milliseconds per update, by term."""
    from qscore.bench import Subject

    subject = Subject(algorithm, "HalfCheetah-v5", steps=0, hidden=(width, width), **fields)
    program = subject._session._chunk.as_text()
    origins = operations(program)
    rates, times = in_turns(subject, width, rounds)
    terms: dict[str, float] = defaultdict(float)
    for name, taken in profile(lambda: subject.update(UPDATES)).items():
        if name in origins or name.split(".")[0] in ("copy", "ynn_fusion", "dot"):
            terms[term(name, origins.get(name, ""))] += taken / UPDATES / 1e3
    subject.close()
    update = 1e3 * statistics.median(times)
    row = {"update": update, "at peak": 1e3 * subject.flops / statistics.median(rates), **terms}
    row["profiling"] = sum(terms.values()) - update
    return {name: round(value, 3) for name, value in row.items()}


if __name__ == "__main__":
    report(__doc__, ["qsm", "qsm, official"], 7, measure)
