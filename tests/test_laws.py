"""The laws of the house, read from the source: who may import whom, and what is written nowhere.

A law is a function from sources (module name -> text) to its breaches, so that a second test can
break each of them on purpose and see it noticed.
"""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

import qscore

Sources = dict[str, str]

OUTER = {
    f"qscore.{name}"
    for name in (
        *("__main__", "bench", "checkpoint", "cli", "datasets", "export", "folder", "log"),
        *("memory", "panel", "playback", "plots", "report", "run", "sweep"),
        *(f"sweep.{name}" for name in ("board", "cluster", "local", "process", "spec", "trial")),
    )
}
"""What may touch disk, clock and terminal. The rest is pure."""

OUTSIDE = {
    *("builtins", "concurrent", "ctypes", "datetime", "fcntl", "glob", "imageio", "io", "logging"),
    *("matplotlib", "multiprocessing", "os", "pathlib", "pickle", "platform", "resource", "rich"),
    *("shutil", "signal", "socket", "sqlite3", "subprocess", "sys", "tempfile", "tensorboardX"),
    *("threading", "time", "timeit", "urllib", "zipfile"),
}
"""Packages that lead to disk, clock or terminal, or to processes and threads."""

ALLOWED = {
    # to silence libraries, and to choose how those render
    "qscore.environments.host": {"ctypes", "io", "logging", "os", "sys"},
    # to draw a frame into memory
    "qscore.environments.sde": {"matplotlib"},
}
"""What an environment may import all the same."""

MATHEMATICS = {f"qscore.{name}" for name in ("diffusion", "sde", "martingale", "lq", "riccati")}

BANNED = {"PRNGKey": "jax.random.key", "rng": "key"}
"""Names that are never written, and what is written instead."""


def read_sources() -> Sources:
    """Every module of the package."""
    root = Path(qscore.__file__).parent
    sources = {}
    for path in sorted(root.rglob("*.py")):
        parts = ("qscore", *path.relative_to(root).with_suffix("").parts)
        sources[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text()
    return sources


SOURCES = read_sources()


@functools.cache
def walk(text: str) -> list[ast.AST]:
    return list(ast.walk(ast.parse(text)))


def imports(sources: Sources, module: str) -> Iterator[str]:
    """Everything a module imports, wherever in it, as the fullest module name that is known.

    `from qscore import replay` is `qscore.replay`; the packages on the way are not counted.
    """
    for node in walk(sources[module]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports here are absolute"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in sources else node.module or ""


def reachable(sources: Sources, start: str) -> set[str]:
    """Modules of the package that a module imports, directly or through others."""
    found: set[str] = set()
    waiting = [start]
    while waiting:
        for name in imports(sources, waiting.pop()):
            if name in sources and name not in found:
                found.add(name)
                waiting.append(name)
    return found


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def algorithms_and_environments_meet(sources: Sources) -> list[str]:
    sides = ("qscore.algorithms", "qscore.environments")
    return [
        f"{module} reaches {other}"
        for side, opposite in (sides, sides[::-1])
        for module in sources
        if within(module, side)
        for other in reachable(sources, module)
        if within(other, opposite)
    ]


def algorithm_imports_algorithm(sources: Sources) -> list[str]:
    registry, base = "qscore.algorithms", "qscore.algorithms.base"
    return [
        f"{module} imports {other}"
        for module in sources
        if within(module, registry) and module != registry
        for other in imports(sources, module)
        if within(other, registry) and other != base
    ]


def pure_module_touches_the_world(sources: Sources) -> list[str]:
    breaches = []
    for module in sources.keys() - OUTER:
        allowed = ALLOWED.get(module, set())
        for name in imports(sources, module):
            if name.split(".")[0] in OUTSIDE - allowed:
                breaches.append(f"{module} imports {name}")
        for node in walk(sources[module]):
            if isinstance(node, ast.Call):
                called = node.func
                if isinstance(called, ast.Name) and called.id in ("open", "print", "input"):
                    breaches.append(f"{module} calls {called.id}")
                if isinstance(called, ast.Attribute) and called.attr == "print":
                    breaches.append(f"{module} calls {ast.unparse(called)}")
    return breaches


def pure_module_imports_an_outer_one(sources: Sources) -> list[str]:
    # the package itself gathers the public names
    return [
        f"{module} reaches {other}"
        for module in sources.keys() - OUTER - {"qscore"}
        for other in reachable(sources, module)
        if other in OUTER
    ]


def mathematics_knows_reinforcement_learning(sources: Sources) -> list[str]:
    return [
        f"{module} imports {name}"
        for module in sources.keys() & MATHEMATICS
        for name in imports(sources, module)
        if within(name, "qscore") and name not in MATHEMATICS | {"qscore.types"}
    ]


def imports_go_round(sources: Sources) -> list[str]:
    return [module for module in sources if module in reachable(sources, module)]


def banned_name_is_written(sources: Sources) -> list[str]:
    breaches = []
    for module, text in sources.items():
        for node in walk(text):
            for name in names(node):
                if name in BANNED or name.startswith("filter_"):
                    instead = BANNED.get(name, "plain jax transformations: every leaf is an array")
                    breaches.append(f"{module}: {name}; write {instead}")
            if isinstance(node, ast.ImportFrom) and node.module == "__future__":
                breaches.append(f"{module}: jaxtyping reads annotations as objects, not as text")
    return breaches


def names(node: ast.AST) -> Iterator[str]:
    """The names that a node uses or makes."""
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name):
            yield name
        case ast.keyword(arg=str(name)) | ast.FunctionDef(name=name) | ast.ClassDef(name=name):
            yield name
        case ast.alias(name=name, asname=other):
            yield name.split(".")[-1]
            if other:
                yield other


LAWS = {
    algorithms_and_environments_meet: {
        "qscore.algorithms.qsm": "from qscore.environments import Host",
        "qscore.environments.host": "from qscore.algorithms.base import Algorithm",
        "qscore.algorithms.base": "import qscore.train_host",  # through another module
    },
    algorithm_imports_algorithm: {
        "qscore.algorithms.new": "from qscore.algorithms.qsm import mean_q",
        "qscore.algorithms.newer": "from qscore.algorithms import ALGORITHMS",
        "qscore.algorithms.newest": "def late():\n    import qscore.algorithms.qsm",
    },
    pure_module_touches_the_world: {
        "qscore.replay": "from pathlib import Path",
        "qscore.train": "import os.path",
        "qscore.optimize": "def step():\n    import time",
        "qscore.statistics": "print('half way')",
        "qscore.types": "text = open('notes').read()",
        "qscore.networks": "import jax\njax.debug.print('{}', 1)",
        "qscore.environments.host": "import time",
        "qscore.environments.base": "import sys",
    },
    pure_module_imports_an_outer_one: {
        "qscore.replay": "from qscore import checkpoint",
        "qscore.algorithms.base": "from qscore.run import train",
    },
    mathematics_knows_reinforcement_learning: {
        "qscore.diffusion": "from qscore import replay",
        "qscore.sde": "from qscore.environments.base import Step",
    },
    imports_go_round: {
        "qscore.types": "from qscore.networks import MLP",
        "qscore.config": "import qscore.config",
    },
    banned_name_is_written: {
        "qscore.types": "import jax\nkey = jax.random.PRNGKey(0)",
        "qscore.replay": "from jax.random import PRNGKey",
        "qscore.train": "def train(rng): ...",
        "qscore.networks": "sample(rng=1)",
        "qscore.optimize": "import equinox as eqx\neqx.filter_jit(len)",
        "qscore.diffusion": "from equinox import filter_grad as grad",
        "qscore.algorithms.base": "from __future__ import annotations",
    },
}


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_law_holds(law):
    assert "qscore.algorithms.qsm" in SOURCES  # the source was found
    assert law(SOURCES) == []


@pytest.mark.parametrize(
    ("law", "module", "breach"),
    [(law, module, text) for law, breaches in LAWS.items() for module, text in breaches.items()],
    ids=lambda value: value.__name__ if callable(value) else str(value).replace("\n", "; "),
)
def test_breach_is_noticed(law, module, breach):
    broken = SOURCES | {module: breach + "\n" + SOURCES.get(module, "")}
    assert any(module in found for found in law(broken)), f"{law.__name__} missed {breach!r}"


def test_innocent_lines_are_not_breaches():
    innocent = SOURCES | {
        "qscore.algorithms.new": "from qscore.algorithms.base import Algorithm",
        "qscore.sde": "from qscore.types import Key\nfrom qscore.diffusion import sample",
        "qscore.statistics": "import numpy as np\ndraw = np.random.default_rng(0)",
        "qscore.train_host": "def tasks(environment):\n    return environment.open()",
        "qscore.cli": "import sys\nprint('done', file=sys.stderr)",
    }
    assert all(law(innocent) == [] for law in LAWS)
