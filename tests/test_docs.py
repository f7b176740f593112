"""The documentation is true: its Python runs, its commands parse, its tables match the code."""

import contextlib
import dataclasses
import importlib
import io
import itertools
import json
import re
import shlex
import sys
import types
from collections.abc import Iterator
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import gymnasium as gym
import jax
import jax.random as jr
import numpy as np
import pytest
from helpers import fast_compilation

import qscore as qs
from qscore import cli, datasets, replay
from qscore.config import Range
from qscore.environments import ENVIRONMENTS
from qscore.panel import read_panel

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.rglob("*.md")), ROOT / "CONTRIBUTING.md"]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
FLAG = re.compile(r"--[a-z][\w.-]*")


def blocks(page: Path, language: str) -> list[str]:
    return [body for _, kind, body in FENCE.findall(page.read_text()) if kind == language]


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text())


def spans(page: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(page))


def table(page: Path, *columns: str) -> Iterator[dict[str, str]]:
    """The rows of the first table of a page that has these columns; cells without backticks."""
    rows = [
        [cell.strip().replace("`", "") for cell in line.strip("|").split("|")]
        for line in page.read_text().splitlines()
        if line.startswith("|")
    ]
    start = next(i for i, row in enumerate(rows) if set(columns) <= set(row))
    header = rows[start]
    for row in rows[start + 2 :]:
        if len(row) != len(header) or set(row[0]) == {"-"}:
            return
        yield dict(zip(header, row, strict=True))


def run_python(page: Path) -> None:
    """Execute a page's Python blocks in order, as one module.

    Without the compiler's optimisations: compiling is most of what these short programs cost.
    """
    module = types.ModuleType(f"docs_{page.stem}")
    sys.modules[module.__name__] = module  # dataclasses look themselves up
    registered = set(gym.registry)
    try:
        with fast_compilation():
            for match in FENCE.finditer(page.read_text()):
                if match[2] == "python":
                    # lines above it, for true line numbers
                    above = "\n" * (page.read_text()[: match.start(3)].count("\n"))
                    exec(compile(above + match[3], str(page), "exec"), module.__dict__)
    finally:
        del sys.modules[module.__name__]
        for id in set(gym.registry) - registered:
            del gym.registry[id]


def test_the_algorithm_and_the_environment_of_the_extending_page_work():
    assert len(blocks(DOCS / "extending.md", "python")) == 3
    run_python(DOCS / "extending.md")


def test_the_linear_quadratic_page_shows_what_the_command_prints(capsys):
    page = DOCS / "lq.md"
    run_python(page)
    capsys.readouterr()
    problem = ROOT / "examples" / "lq" / "unstable.json"
    assert json.loads(blocks(page, "json")[0]) == json.loads(problem.read_text())
    cli.main(["lq", "solve", str(problem)])
    printed = capsys.readouterr().out.splitlines()
    shown = next(text for text in blocks(page, "text") if "abscissa" in text).splitlines()
    assert [line for line in printed if "residual" not in line] == [
        line for line in shown if "residual" not in line
    ]


def test_the_offline_example_of_the_cqsm_page_finds_the_exact_score(capsys):
    run_python(DOCS / "algorithms" / "cqsm.md")
    words = capsys.readouterr().out.split()
    assert words[::2] == ["learned", "exact"]
    assert float(words[1]) == pytest.approx(float(words[3]), rel=0.05)


@pytest.fixture(scope="module")
def first_run(tmp_path_factory) -> Path:
    """The run folder that the Python of the starting page makes."""
    folder = tmp_path_factory.mktemp("start")
    with contextlib.chdir(folder):
        run_python(DOCS / "start.md")
    return folder / "runs" / "first"


def keys(value: Any) -> set[str]:
    """Every key of nested JSON, but for seeds and file names."""
    if not isinstance(value, dict):
        return set()
    plain = {key for key in value if not key.isdecimal() and not key.endswith(".npz")}
    return plain.union(*map(keys, value.values()))


def test_every_field_of_a_run_folder_is_described(first_run):
    described = set(spans(DOCS / "runs.md")) | set(spans(DOCS / "evaluation.md"))
    described |= {row["metric"] for row in table(DOCS / "algorithms" / "qsm.md", "metric")}
    config = json.loads((first_run / "config.json").read_text())
    for section, kind in (("algorithm", qs.QSM), ("environment", qs.Host)):
        fields = set(config.pop(section))  # those have tables of their own, tested below
        assert fields == {"name"} | {field.name for field in dataclasses.fields(kind)}
    newest = max((first_run / "checkpoints").iterdir(), key=lambda path: int(path.name))
    documents = [config, json.loads((first_run / "summary.json").read_text())]
    documents.append(json.loads((newest / "header.json").read_text()))
    for stream in ("metrics", "evals"):
        documents += map(json.loads, (first_run / f"{stream}.jsonl").read_text().splitlines())
    for document in documents:
        assert keys(document) <= described

    drawn = "".join(blocks(DOCS / "runs.md", "text") + blocks(DOCS / "start.md", "text"))
    assert all(path.name in drawn for path in first_run.iterdir())


def test_every_figure_of_an_evaluation_is_described(first_run, tmp_path, monkeypatch):
    monkeypatch.setitem(datasets.REFERENCES["d4rl"], "Pendulum", (-1400.0, -150.0))
    rows = table(DOCS / "evaluation.md", "field of --json")
    named = {name for row in rows for name in row["field of --json"].split(", ")}
    best = qs.evaluate(first_run, episodes=1, best_of=2)
    recorded = qs.evaluate(first_run, episodes=1, record=tmp_path / "data.npz")
    assert set(best) | set(recorded) == named
    assert keys(recorded["recorded"]) <= set(spans(DOCS / "evaluation.md"))


def test_the_example_of_the_data_page_learns_and_its_fields_are_described(first_run, capsys):
    with contextlib.chdir(first_run.parents[1]):
        run_python(DOCS / "data.md")
    size, episodes, *_ = capsys.readouterr().out.split()
    assert (size, episodes) == ("1600", "8")  # of two seeds
    described = set(spans(DOCS / "runs.md"))
    folder = first_run.parent / "offline"
    summary = json.loads((folder / "summary.json").read_text())
    header = json.loads((folder / "checkpoints" / "300" / "header.json").read_text())
    assert {"dataset", "mean_return"} <= keys(summary) <= described
    assert isinstance(header["dataset"], str) and keys(header) <= described

    with np.load(first_run.parents[1] / "data" / "first.npz") as archive:
        held = dict(archive)
    rows = table(DOCS / "data.md", "key", "shape")
    named = {name for row in rows for name in row["key"].split(", ")}
    assert named == set(held) == {*datasets.RECORDING_KEYS, "about"}
    assert set(json.loads(str(held["about"]))) <= set(spans(DOCS / "data.md"))


def test_the_tables_of_the_data_page_are_the_code():
    for row in table(DOCS / "data.md", "flag", "default"):
        field = cli.Eval.__dataclass_fields__[row["flag"].removeprefix("--").replace("-", "_")]
        assert row["default"] == str(field.default)
    named = {
        (row["reference"], row["task"]): (float(row["low"]), float(row["high"]))
        for row in table(DOCS / "data.md", "reference", "low")
    }
    assert named == {
        (name, task): pair
        for name, tasks in datasets.REFERENCES.items()
        for task, pair in tasks.items()
    }
    presets = [name for name, kind in qs.ALGORITHMS.items() if "offline" in cli.presets(kind)]
    assert presets == ["qsm", "td3", "diffusion_ql"]
    assert "QSM, TD3 and Diffusion-QL have a preset `offline`" in (DOCS / "data.md").read_text()


def limits(kind: type, name: str) -> str:
    """How a table writes a field's valid values: its choices, or its range."""
    hint = get_type_hints(kind, include_extras=True)[name]
    if get_origin(hint) is Literal:
        return ", ".join(get_args(hint))
    ranges = [extra for extra in getattr(hint, "__metadata__", ()) if isinstance(extra, Range)]
    return str(ranges[0]) if ranges else ""


@pytest.mark.parametrize("name", qs.ALGORITHMS)
def test_the_table_of_an_algorithm_has_every_field_with_its_presets_and_range(name):
    kind, page = qs.ALGORITHMS[name], DOCS / "algorithms" / f"{name}.md"
    fields = [field.name for field in dataclasses.fields(kind)]
    presets = get_args(get_type_hints(kind)["preset"]) if "preset" in fields else ()
    others = {preset: kind(preset=preset) for preset in presets if preset != "default"}
    rows = list(table(page, "field", "default", *others))
    assert [row["field"] for row in rows] == fields
    for row in rows:
        field = row["field"]
        assert row["default"] == str(getattr(kind(), field)), field
        for preset, other in others.items():
            assert (row[preset] or row["default"]) == str(getattr(other, field)), (preset, field)
        assert row["range"] == limits(kind, field), field
        assert row["meaning"], field


BASELINES = pytest.mark.parametrize("name", ["sac", "td3", "diffusion_ql"])


@BASELINES
def test_the_table_of_metrics_is_what_a_baseline_reports(name):
    spec = qs.Spec(obs_size=3, action_size=2, dt=0.1)
    algorithm = qs.ALGORITHMS[name](hidden=(4, 4))
    batch = replay.empty_rows(spec, 4)

    def metrics(key):
        return algorithm.update(algorithm.init(spec, key=key), batch, key=key)[1]

    page = DOCS / "algorithms" / f"{name}.md"
    rows = {row["metric"] for row in table(page, "metric", "formula")}
    assert rows == set(jax.eval_shape(metrics, jr.key(0))) | {"episode_return"}


def test_the_table_of_metrics_is_what_cqsm_reports():
    spec = qs.Spec(obs_size=3, action_size=2, dt=0.1)
    batch = replay.empty_rows(spec, 4)
    kinds = {"both": set(), "features": set(), "network": set()}
    for row in table(DOCS / "algorithms" / "cqsm.md", "metric", "critic"):
        kinds[row["critic"]].add(row["metric"])
    for critic in ("features", "network"):
        algorithm = qs.CQSM(critic=critic, hidden=(4, 4))

        def metrics(key, algorithm=algorithm):
            return algorithm.update(algorithm.init(spec, key=key), batch, key=key)[1]

        assert set(jax.eval_shape(metrics, jr.key(0))) == kinds["both"] | kinds[critic]


@pytest.mark.parametrize(
    "kind, page, prefix",
    [(qs.Settings, "runs.md", "--"), (qs.Host, "environments/host.md", "--environment.")],
    ids=["Settings", "Host"],
)
def test_the_table_of_a_configuration_has_every_field(kind, page, prefix):
    rows = {row["field"]: row for row in table(DOCS / page, "flag", "field", "default")}
    assert list(rows) == [field.name for field in dataclasses.fields(kind)]
    for field in dataclasses.fields(kind):
        row = rows[field.name]
        if field.default is dataclasses.MISSING:  # positional on the command line
            continue
        assert row["flag"] == prefix + field.name.replace("_", "-")
        assert row["default"] == str(field.default), field.name
        assert row["range"] == limits(kind, field.name), field.name


def test_the_tables_of_environments_in_jax_have_every_field():
    page = DOCS / "environments" / "sde.md"
    common = {row["common field"]: row for row in table(page, "common field", "range")}
    own = {(row["environment"], row["own field"]): row for row in table(page, "own field", "range")}
    for name, kind in ENVIRONMENTS.items():
        for field in dataclasses.fields(kind):
            if field.name == "id":
                continue
            row = common.get(field.name) or own.pop((name, field.name))
            default = row[name] if field.name in common else row["default"]
            if field.default is None:
                assert default == "None"
            elif field.name != "problem":
                assert float(Fraction(default)) == field.default, (name, field.name)
            assert row["range"] == limits(kind, field.name), (name, field.name)
            assert row["meaning"]
    assert not own


def test_what_is_said_of_the_control_step_is_the_committed_result():
    path = ROOT / "experiments" / "results" / "dt_robustness.json"
    result = json.loads(path.read_text())
    rows = list(table(DOCS / "experiments" / "dt_robustness.md", "gradient", "0.05"))
    assert [row["gradient"] for row in rows] == list(result["gradient_rms"])
    for row in rows:
        for step, size in result["gradient_rms"][row["gradient"]].items():
            assert row[step] == f"{size:.4f}"
    first, _, third, last = result["summary"]["q"]["mean"].values()
    theory = " ".join((DOCS / "theory.md").read_text().split())
    said = f"from {first:.1%} to {third:.1%} down to 0.01 seconds and no further, {last:.1%} at 0.0"
    assert said in theory


def test_the_table_of_metrics_is_what_qsm_reports():
    spec = qs.Spec(obs_size=3, action_size=2, dt=0.1)
    batch = replay.empty_rows(spec, 4)
    reported: set[str] = set()
    for target in ("gradient", "normalized", "posterior"):
        algorithm = qs.QSM(target=target, hidden=(4, 4))

        def metrics(key, algorithm=algorithm):
            return algorithm.update(algorithm.init(spec, key=key), batch, key=key)[1]

        reported |= set(jax.eval_shape(metrics, jr.key(0)))
    rows = {row["metric"] for row in table(DOCS / "algorithms" / "qsm.md", "metric", "formula")}
    assert rows == reported | {"episode_return"}


@pytest.fixture(scope="module")
def flags() -> dict[str, set[str]]:
    """The flags of every command, from its own help."""
    found = {}
    pairs = [["train", name, "Pendulum-v1"] for name in ("qsm", "sac", "td3", "diffusion_ql")]
    pairs.append(["train", "cqsm", "lq"])
    pairs.append(["train", "td3", "Pendulum-v1", "--algorithm.preset", "offline"])
    for command in (*pairs, *([name] for name in cli.SIMPLE)):
        with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit) as done:
            cli.main([*command, "--help"])
        assert done.value.code == 0
        found.setdefault(command[0], set()).update(FLAG.findall(out.getvalue()))
    assert found["train"] >= {"--steps", "--algorithm.temperature", "--environment.num-envs"}
    return found


def commands(page: Path) -> Iterator[tuple[bool, list[str]]]:
    """(whether it is complete, its words) of every `qscore ...` of a page."""
    for line in itertools.chain.from_iterable(map(str.splitlines, blocks(page, "bash"))):
        for part in line.split("&&"):
            words = shlex.split(re.sub(r"^(python3 -m )?uv run ", "", part.strip()), comments=True)
            if words[:1] == ["qscore"]:
                yield True, words[1:]
    for span in spans(page):
        if span.startswith("qscore "):
            yield False, shlex.split(span)[1:]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_exists_with_its_flags(page, flags):
    for complete, (command, *rest) in commands(page):
        text = f"qscore {command} {' '.join(rest)}"
        if command in ("COMMAND", "--version"):
            continue
        assert command in flags, text
        used = {word.partition("=")[0] for word in rest if word.startswith("--")}
        assert used <= flags[command], text
        if complete and command == "train":
            algorithm, environment, *options = rest
            assert algorithm in qs.ALGORITHMS, text
            known = environment in gym.registry or environment in qs.ENVIRONMENTS
            assert known or environment.startswith("dm_control/"), text
            if "--algorithm.preset" in options:
                preset = options[options.index("--algorithm.preset") + 1]
                qs.ALGORITHMS[algorithm](preset=preset)
    every = set.union(*flags.values(), {"--algorithm.", "--environment."})
    if page.parent.name == "experiments":
        every |= {"--quick", "--runs"}  # those of the scripts
    for span in spans(page):
        if page.parent != ROOT and span.startswith("--"):
            assert span.split()[0].removesuffix("*") in every


LESS = {
    **{"--steps": "100", "--eval-episodes": "1", "--algorithm.batch-size": "8"},
    **{"--algorithm.warmup-steps": "50", "--eval-every": "100"},
    **{"--algorithm.replay-capacity": "100", "--environment.max-episode-steps": "50"},
}


def less(command: str, rest: list[str]) -> list[str]:
    """A command with small networks and few steps."""
    if command == "resume" and "--steps" in rest:
        return [word.replace("30000", "200") for word in rest]
    if command != "train" or "--help" in rest:
        return rest
    for flag, value in LESS.items():
        if flag in rest:
            rest[rest.index(flag) + 1] = value
        else:
            rest += [flag, value]
    return [*rest, "--algorithm.hidden", "8", "8"]


@pytest.mark.slow
def test_the_commands_of_five_minutes_work_in_their_order(tmp_path, capsys):
    with contextlib.chdir(tmp_path), fast_compilation():
        for complete, (command, *rest) in commands(DOCS / "start.md"):
            if complete:
                try:
                    cli.main([command, *less(command, rest)])
                except SystemExit as done:  # --help
                    assert done.code == 0, (command, rest, capsys.readouterr().err)
        made = {str(path) for path in Path().glob("**/*") if path.is_file()}
    assert {"returns.png", "report.html", "runs/pendulum/policy.mp4"} <= made
    assert {"runs/pendulum/summary.json", "runs/sac/summary.json"} <= made
    assert {"policies/pendulum/policy.py", "policies/pendulum/README.md"} <= made


def anchors(page: Path) -> set[str]:
    """The ids that the headings of a page get."""
    headings = re.findall(r"^#+ +(.*?) *$", prose(page), re.MULTILINE)
    plain = [re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings]
    return {re.sub(r"[-\s]+", "-", heading) for heading in plain}


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "README.md"], ids=lambda page: str(page.relative_to(ROOT))
)
def test_internal_links_and_paths_resolve(page):
    links = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    for link in links:
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target), link
    for span in spans(page):
        if re.match(r"(src|tests|docs)/", span) and "<" not in span:
            assert (ROOT / span).exists(), span


RESULTS = sorted((ROOT / "experiments" / "results").glob("*.json"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_the_table_of_an_experiment_is_its_results(path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    results = json.loads(path.read_text())
    script = Path(shlex.split(results["command"])[1])
    module = importlib.import_module(script.stem)
    assert not results["quick"] and "dirty" not in results["commit"]
    (kept,) = results.keys() & {"algorithms", "tasks"}
    page = (DOCS / "experiments" / f"{script.stem}.md").read_text()
    assert module.table(results[kept]) in page
    assert f"../assets/{path.stem}.png" in page
    if "overall" in results:
        assert not results["overall"] or module.overall_table(results["overall"]) in page
        # and they are those of the runs whose records lie beside them
        records = path.with_suffix("")
        jobs = module.everything(path.stem.removeprefix("panel_"), [], records)
        folders = [job.folder(records) for job in jobs if module.finished(job, records)]
        assert module.contents(read_panel(folders)).items() <= results.items()


def test_the_errors_against_the_closed_form_are_the_committed_results():
    rows = table(DOCS / "algorithms" / "cqsm.md", "problem and critic", "return gap")
    names = ("", "-network", "-steep", "-3x2", "-network-3x2", "-4x2", "-barely", "-barely-wide")
    for row, name in zip(rows, names, strict=True):
        summary = ROOT / "benchmarks" / "results" / f"lq{name}" / "summary.json"
        found = json.loads(summary.read_text())["lq"]
        for title, key in (("Q", "q"), ("grad_a Q", "grad_a_q"), ("score", "score")):
            assert row[title] == " ".join(f"{value:.2%}" for value in found["relative_error"][key])
        assert row["return gap"] == " ".join(f"{value:.3%}" for value in found["return_gap"])


def test_the_tables_of_the_readme_are_the_committed_results():
    readme = ROOT / "README.md"
    rows = list(table(readme, "seeds", "interquartile mean"))
    for row, name in zip(rows, ("pendulum", "pendulum-seeds-3-7"), strict=True):
        summary = json.loads((ROOT / "benchmarks" / "results" / name / "summary.json").read_text())
        assert row["seeds"] == ", ".join(map(str, summary["seeds"]))
        returns = ", ".join(f"{value:.1f}" for value in summary["final_returns"])
        assert row["return of each seed"] == returns
        assert row["interquartile mean"] == f"{summary['iqm']:.1f}"
        low, high = summary["ci95"]
        assert row["95% bootstrap interval over seeds"] == f"{low:.1f} to {high:.1f}"
    cheetah = qs.Run.open(ROOT / "benchmarks" / "results" / "halfcheetah").rows("evals")
    for row in table(readme, "environment steps", "return of each seed (0, 1, 2)"):
        step = int(row["environment steps"].split()[0].replace(",", ""))
        returns = [np.mean(cheetah[seed][step]["returns"]) for seed in (0, 1, 2)]
        expected = ", ".join(f"{value:.1f}" for value in returns)
        assert row["return of each seed (0, 1, 2)"] == expected
    panel = json.loads((ROOT / "experiments" / "results" / "panel_dm_control.json").read_text())
    rows = list(table(readme, "algorithm", "normalised return"))
    for row, (name, each) in zip(rows, panel["overall"].items(), strict=True):
        low, high = each["ci95"]
        assert row["algorithm"] == name and row["normalised return"] == f"{each['iqm']:.2f}"
        assert row["95% bootstrap interval"] == f"{low:.2f} to {high:.2f}"


def test_the_table_of_many_seeds_is_the_committed_result():
    results = json.loads((ROOT / "benchmarks" / "results" / "seeds.json").read_text())["seeds"]
    rows = list(table(DOCS / "speed.md", "seeds", "process, s"))
    assert [row["seeds"] for row in rows] == list(results)
    for row, each in zip(rows, results.values(), strict=True):
        for name, column in (("process", "process, s"), ("training", "training alone, s")):
            assert float(row[column]) == each[name]["seconds"]


def test_the_tables_of_speed_are_the_committed_results():
    page, results = (DOCS / "speed.md").read_text(), ROOT / "benchmarks" / "results"
    for name in ("speed.md", "speed-two-cores.md"):
        lines = (results / name).read_text().splitlines()
        shown = "\n".join(line for line in lines if line.startswith("|"))
        assert shown.count("\n") >= 5 and shown in page
    measured = json.loads((results / "precision.json").read_text())
    rows = {row[""]: row for row in table(DOCS / "speed.md", "(256, 256), ms", "(512, 512), ms")}
    for width in (256, 512):
        for name, each in measured[str(width)].items():
            assert rows[name][f"({width}, {width}), ms"] == f"{each['milliseconds']:.2f}"
    assert rows["bf16"]["speed"] == f"{measured['512']['bf16']['speed_ratio']['released']:.2f}"


def test_the_table_of_memory_is_the_committed_result():
    result = json.loads((ROOT / "benchmarks" / "results" / "memory.json").read_text())
    (row,) = table(DOCS / "speed.md", "tenth")
    assert [int(row[str(tenth)]) for tenth in range(1, 11)] == result["most_mb_by_tenth"]
    assert "1,000,000" in f"{int(result['run'].split()[3]):,}" and result["growth"] < 1.05


def test_the_version_is_the_same_everywhere():
    assert f"version: {version('qscore')}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## [{version('qscore')}]" in (ROOT / "CHANGELOG.md").read_text()


def test_the_size_of_a_transition_is_as_documented():
    assert "`4 * (2 * obs + act + 3) + 1` bytes" in (DOCS / "runs.md").read_text()
    for obs, act in ((3, 1), (17, 6)):
        row = replay.empty_rows(qs.Spec(obs_size=obs, action_size=act, dt=1.0), 1)
        size = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(row))
        assert size == 4 * (2 * obs + act + 3) + 1
