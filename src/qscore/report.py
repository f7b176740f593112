"""A report of runs as one file: what was run, which method is better, by how much, how sure.

A report is a list of blocks (`compose`), which `report` writes as a page of HTML that needs nothing
else, or as Markdown with its pictures in a folder beside it.
"""

import base64
import html
import io
import itertools
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from matplotlib import rc_context
from matplotlib.figure import Figure

from qscore import datasets, plots
from qscore.errors import RunStopped, UsageError
from qscore.folder import write_text
from qscore.panel import EARLY, Method, Panel, Task, read_panel
from qscore.playback import film
from qscore.statistics import (
    Interval,
    bootstrap_interval,
    chance,
    interquartile_mean,
    least_chance,
    probability_of_improvement,
    ranked,
    require_rliable,
)

SURE = 0.05
"""A difference is called clear where chance alone would make one in fewer cases than this."""

HEALTH = {
    "critic_loss": "Critic loss: should settle, not grow.",
    "gradient_scale": "Gradient scale: of the critic's action gradient, reward per action.",
    "score_norm": "Score norm: size of the score that the actor learns.",
    "action_saturation": "Action saturation: share of actions near their bounds.",
}
"""Metrics that show whether training was healthy; not every algorithm has every one."""

LINEAR = ("action_saturation",)
"""The metrics among them that are drawn on a linear axis."""


@dataclass(frozen=True)
class Heading:
    """A section's, of level 2 or 3."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    """A paragraph; the verdict stands out."""

    text: str
    verdict: bool = False


@dataclass(frozen=True)
class Items:
    """A list of sentences, or of commands."""

    items: Sequence[str]
    code: bool = False


@dataclass(frozen=True)
class Legend:
    """The methods and their colours."""

    colors: dict[str, str]


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column names a method where it is one of the legend's."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """A figure, or a film's file, with its caption."""

    caption: str
    content: Figure | Path


@dataclass(frozen=True)
class Pictures:
    """Pictures side by side where there is room; small ones more of them."""

    pictures: Sequence[Picture]
    small: bool = False


Block = Heading | Text | Items | Legend | Table | Pictures


def report(folders: Sequence[Path], out: Path, *, films: bool = True) -> Panel:
    """Write the report of some run folders to `out`, an .html or .md file.

    `films` adds one episode of each method on each task. Raises `UsageError` where the folders
    cannot be compared (see `qscore.panel.read_panel`), for another kind of file, and where rliable
    is not installed.
    """
    if out.suffix not in (".html", ".md"):
        raise UsageError(f"`out` must end in .html or .md, got {str(out)!r}.")
    if out.is_dir():
        raise UsageError(f"`out` is {out}, which is a folder.")
    try:
        require_rliable()
    except ImportError as error:
        raise UsageError(f"`qscore report`: {error}") from error
    panel = read_panel(folders)
    with tempfile.TemporaryDirectory() as scratch:
        page = out.suffix == ".html"
        filmed = _film(panel, Path(scratch), ".mp4" if page else ".gif") if films else []
        style: dict[Any, Any] = dict.fromkeys(INKED, INK) if page else {}
        try:
            with rc_context({**style, "svg.fonttype": "none"}):
                blocks = compose(panel, filmed)
                out.parent.mkdir(parents=True, exist_ok=True)
                (_write_html if page else _write_markdown)(title(panel), blocks, out)
        except OSError as error:
            raise UsageError(f"cannot write the report {out}: {error}.") from error
    return panel


# -- what is said ----------------------------------------------------------------------------------


def title(panel: Panel) -> str:
    """What is compared, and where."""
    names, tasks = panel.names, [task.name for task in panel.tasks]
    where = tasks[0] if len(tasks) == 1 else f"{len(tasks)} tasks"
    return f"{_listed(names)} on {where}"


def compose(panel: Panel, filmed: Sequence[Block]) -> list[Block]:
    """The blocks of a report, the answer first."""
    blocks: list[Block] = []
    colors = {name: plots.color(panel, name) for name in panel.names}
    scores = panel.scores(Task.last_returns)
    ranking = ranked(scores)
    blocks.append(Text(_verdict(ranking, scores, panel.unit), verdict=True))
    if len(ranking) > 1:
        caption = "Interquartile mean over seeds and its 95% bootstrap interval, best first."
        if single := [name for name in ranking if not _repeated(scores[name])]:
            caption += f" Single seeds have none: {_listed(single)}."
        drawn = {
            name: (middle, interval if _repeated(scores[name]) else (middle, middle))
            for name, (middle, interval) in ranking.items()
        }
        figure = plots.figure_intervals(panel, drawn, panel.unit)
        blocks.append(Pictures([Picture(caption, figure)]))
        blocks.append(_comparison(ranking, scores))
    if len(panel.tasks) > 1 and len(ranking) > 1:
        blocks += [
            Text(
                "Normalised returns: on each task 0 is the lowest interquartile mean of any method "
                "at any evaluation, and 1 the highest at the end."
            ),
            _ranges(panel),
        ]
    if panel.notes:
        blocks += [Heading("Before comparing"), Items(panel.notes)]
    for task in panel.tasks:
        blocks += [Heading(task.name), Legend({m.name: colors[m.name] for m in task.methods})]
        blocks += _of_task(panel, task)
    blocks += filmed
    blocks.append(Heading("What was run, and how to repeat it"))
    blocks += _settings(panel)
    return blocks


def _ranges(panel: Panel) -> Table:
    rows = [[task.name, *map(_number, task.bounds)] for task in panel.tasks]
    return Table(["task", "0 is", "1 is"], rows)


def _verdict(ranking: dict[str, Interval], scores: dict[str, list[list[float]]], unit: str) -> str:
    if not ranking:
        return "No method was run on every task, so there is no figure over all of them."
    best, *others = ranking
    tasks = len(scores[best])
    if not others and tasks > 1:
        return f"{best} on {tasks} tasks; each has its figures below."
    middle, (low, high) = ranking[best]
    said = f"{_number(middle)} (95% {_number(low)} to {_number(high)})"
    if not _repeated(scores[best]):
        where = " on some task" if any(len(values) > 1 for values in scores[best]) else ""
        said = f"{_number(middle)} (one seed{where}, so without an interval)"
    if not others:
        return f"{best} ends at a {unit} of {said}."
    second = others[0]
    gap, p = middle - ranking[second][0], chance(scores[best], scores[second])
    if gap == 0.0:
        return f"{best} and {second} are level, at a {unit} of {said}."
    seeds = " against ".join(
        "/".join(str(len(values)) for values in scores[name]) for name in (best, second)
    )
    does, sure = ("does best", "clear") if p < SURE else ("is ahead", "not settled")
    said = (
        f"{best} {does}: a {unit} of {said}, {_number(gap)} above {second}, the next. "
        f"That is {sure}: of two equally good methods, one would be as clearly ahead in "
        f"{_percent(p)} of cases ({seeds} seeds)."
    )
    if least_chance(scores[best], scores[second]) >= SURE:
        said += " So few seeds cannot settle it, whatever their returns: train more."
    return said


def _repeated(scores: list[list[float]]) -> bool:
    """Whether a method has several seeds on every task; one says nothing of how others would do."""
    return all(len(values) > 1 for values in scores)


def _comparison(ranking: dict[str, Interval], scores: dict[str, list[list[float]]]) -> Table:
    """The best method against every other one."""
    best, *others = ranking
    rows = []
    for name in others:
        probability, (low, high) = probability_of_improvement(scores[best], scores[name])
        several = _repeated(scores[best]) and _repeated(scores[name])
        interval = f"{low:.0%} to {high:.0%}" if several else "one seed"
        rows.append(
            [
                name,
                _number(ranking[best][0] - ranking[name][0]),
                f"{probability:.0%} ({interval})",
                _percent(chance(scores[best], scores[name])),
            ]
        )
    header = [
        f"{best} against",
        "ahead by",
        "a seed of it is better with probability (95%)",
        "as clearly ahead by chance",
    ]
    return Table(header, rows)


def _of_task(panel: Panel, task: Task) -> list[Block]:
    """Curves, the final table, every seed, and the health of training."""
    captions = {
        "env_steps": f"Return over {task.counted}: each seed, interquartile mean, 95% interval.",
        "seconds": "The same over wall clock; seeds of one run train side by side.",
    }
    blocks: list[Block] = []
    if len(panel.tasks) > 1:
        scores = {method.name: [task.last_returns(method)] for method in task.methods}
        blocks.append(Text(_verdict(ranked(scores), scores, "return")))
    blocks += [
        Pictures(
            [
                Picture(caption, plots.figure_returns(panel, task, axis))
                for axis, caption in captions.items()
            ]
        ),
        _final_table(task),
    ]
    if exact := _lq_table(task):
        blocks.append(exact)
    blocks += [
        Heading("Every seed", 3),
        Pictures(
            [
                Picture(f"{method.name}, seed {s}", plots.figure_seed(panel, task, method, s))
                for method in task.methods
                for s in method.seeds
            ],
            small=True,
        ),
    ]
    health = []
    for metric, caption in HEALTH.items():
        have = [
            method.name
            for method in task.methods
            if any(metric in row for seed in method.seeds.values() for row in seed.metrics.values())
        ]
        if have:
            missing = [method.name for method in task.methods if method.name not in have]
            caption += f" Not logged by {_listed(missing)}." if missing else ""
            figure = plots.figure_metric(panel, task, metric, log=metric not in LINEAR)
            health.append(Picture(caption, figure))
    if health:
        blocks += [Heading("Training health", 3), Pictures(health)]
    return blocks


def _final_table(task: Task) -> Table:
    """The last evaluation that all methods have, and what came before it."""
    references = datasets.references(task.methods[0].runs[0].environment)
    header = ["method", f"return after {task.final_step:,} {task.counted}", "95% interval"]
    header += [f"normalised, {name}" for name in references]
    header += ["mean over training", f"over its first {EARLY:.0%}", "steps/s", "every seed"]
    rows = []
    for method in task.methods:
        values = task.last_returns(method)
        low, high = bootstrap_interval(values)
        middle = interquartile_mean(values)
        row = [
            method.name,
            _number(middle),
            f"{_number(low)} to {_number(high)}" if len(values) > 1 else "one seed",
        ]
        row += [
            f"{datasets.normalized(middle, reference):.1f}" for reference in references.values()
        ]
        row += [_mean_over(method, task, share) for share in (1.0, EARLY)]
        each = zip(method.seeds, values, strict=True)
        row += [_speed(method), ", ".join(f"{seed}: {_number(value)}" for seed, value in each)]
        rows.append(row)
    return Table(header, rows)


def _mean_over(method: Method, task: Task, share: float) -> str:
    """The interquartile mean over seeds of `Task.mean_over`."""
    values = task.mean_over(method, share)
    return "not evaluated" if values is None else _number(interquartile_mean(values))


def _speed(method: Method) -> str:
    """Environment steps per second of each run, of all its seeds; steps on data do not count."""
    speeds = []
    for run in method.runs:
        own = [seed for seed in method.seeds.values() if seed.run is run]
        last = [seed.evals[max(seed.evals)] for seed in own]
        steps = sum(row["env_steps"] - run.settings.offline_steps for row in last)
        if steps <= 0:
            speeds.append("-")
        elif seconds := max(row["seconds"] for row in last):
            plural = "s" if len(own) > 1 else ""
            speeds.append(f"{steps / seconds:,.0f} ({len(own)} seed{plural})")
    return ", ".join(speeds)


def _lq_table(task: Task) -> Table | None:
    """Errors against the closed form, of finished runs on a linear-quadratic problem."""
    rows = []
    for method in task.methods:
        for run in method.runs:
            exact = run.summary.get("lq") if (run.folder / "summary.json").is_file() else None
            if exact:
                errors = {**exact["relative_error"], "return gap": exact["return_gap"]}
                for name, values in errors.items():
                    cells = ["infinite" if value is None else f"{value:.2%}" for value in values]
                    rows.append([method.name, name, ", ".join(cells)])
    return Table(["method", "error against the closed form", "per seed"], rows) if rows else None


def _settings(panel: Panel) -> list[Block]:
    """The commands of every run, and the versions they ran on."""
    runs = {
        run.folder: run for task in panel.tasks for method in task.methods for run in method.runs
    }
    versions = {
        ", ".join(f"{name} {version}" for name, version in run.versions.items()): None
        for run in runs.values()
    }
    return [
        Items([run.command() for run in runs.values()], code=True),
        Text("Run folders: " + ", ".join(map(str, runs)) + "."),
        Text("Versions: " + "; ".join(versions) + "."),
    ]


def _film(panel: Panel, scratch: Path, suffix: str) -> list[Block]:
    """One episode of each method on each task, where a checkpoint and a camera are there."""
    pictures, missing = [], []
    for task in panel.tasks:
        for method in task.methods:
            run, seed = method.runs[0], next(iter(method.seeds))
            path = scratch / f"{len(pictures)}{suffix}"
            try:
                film(run, path, seed=seed)
            except (UsageError, RunStopped, OSError) as error:
                missing.append(f"No film of {method.name} on {task.name}: {error}")
                print(f"warning: {missing[-1]}", file=sys.stderr)
            else:
                pictures.append(Picture(f"{method.name} on {task.name}, seed {seed}", path))
    blocks: list[Block] = [Heading("The policies at work")]
    if pictures:
        said = "The first evaluation episode of the newest checkpoint, without exploration."
        blocks += [Text(said), Pictures(pictures)]
    return blocks + ([Items(missing)] if missing else [])


def _number(value: float) -> str:
    """Enough digits to compare by, and no more."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _percent(p: float) -> str:
    return f"{p:.1%}" if p < 0.1 else f"{p:.0%}"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


# -- how it is written -----------------------------------------------------------------------------

INK = "#010203"
"""Stands for the reader's text colour in a figure, until it is written into a page."""

INKED = (
    *("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"),
    "axes.titlecolor",
)

STYLE = """
:root { color-scheme: light dark; --ink: #1c1f24; --quiet: #5c6370; --paper: #ffffff;
  --panel: #f4f5f7; --line: #d9dce1; --accent: #3b7dd8; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --quiet: #a0a7b2; --paper: #14161a;
  --panel: #1e2127; --line: #363b44; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 68rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.25; } h2 { margin-top: 3rem; } h3 { margin-top: 2rem; }
.verdict { font-size: 1.2rem; border-left: 4px solid var(--accent); padding: .8rem 1rem;
  background: var(--panel); border-radius: 4px; }
.scroll { overflow-x: auto; }
table { width: max-content; border-collapse: collapse; font-variant-numeric: tabular-nums;
  font-size: .92rem; }
th, td { max-width: 17rem; text-align: left; padding: .35rem .8rem .35rem 0;
  border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--quiet); font-weight: 600; }
.swatch { display: inline-block; width: .8em; height: .8em; border-radius: 2px;
  margin-right: .4em; }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; margin: .5rem 0; }
.pictures { display: grid; gap: 1.2rem; margin: 1rem 0;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); }
.small { gap: .6rem; grid-template-columns: repeat(auto-fill, minmax(min(46%, 10rem), 1fr)); }
figure { margin: 0; min-width: 0; } figcaption { color: var(--quiet); font-size: .85rem; }
svg, video { display: block; width: 100%; height: auto; }
video { max-width: 30rem; border-radius: 4px; }
pre { background: var(--panel); padding: .6rem .8rem; border-radius: 4px; overflow-x: auto;
  white-space: pre-wrap; }
"""


def _write_html(heading: str, blocks: Sequence[Block], out: Path) -> None:
    colors: dict[str, str] = {}
    for block in blocks:
        if isinstance(block, Legend):
            colors |= block.colors
    numbers = itertools.count()
    body = "\n".join(_html(block, colors, numbers) for block in blocks)
    _write(
        out,
        "<!doctype html>\n"
        '<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{html.escape(heading)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{html.escape(heading)}</h1>\n{body}\n</body>\n</html>\n",
    )


def _html(block: Block, colors: dict[str, str], numbers: Iterator[int]) -> str:
    def named(text: str) -> str:
        swatch = f'<span class="swatch" style="background:{colors.get(text)}"></span>'
        return (swatch if text in colors else "") + html.escape(text)

    match block:
        case Heading(text, level):
            return f"<h{level}>{html.escape(text)}</h{level}>"
        case Text(text, verdict):
            kind = ' class="verdict"' if verdict else ""
            return f"<p{kind}>{html.escape(text)}</p>"
        case Items(items, code=True):
            return "\n".join(f"<pre><code>{html.escape(item)}</code></pre>" for item in items)
        case Items(items):
            return "<ul>" + "".join(f"<li>{html.escape(item)}</li>" for item in items) + "</ul>"
        case Legend(shades):
            names = "".join(f"<span>{named(name)}</span>" for name in shades)
            return f'<div class="legend">{names}</div>'
        case Table(header, rows):
            head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
            body = "".join(
                "<tr>" + "".join(f"<td>{named(cell)}</td>" for cell in row) + "</tr>"
                for row in rows
            )
            return (
                f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody>'
                "</table></div>"
            )
        case Pictures(pictures, small):
            inner = "".join(
                f"<figure>{_embedded(picture, next(numbers))}"
                f"<figcaption>{html.escape(picture.caption)}</figcaption></figure>"
                for picture in pictures
            )
            return f'<div class="pictures{" small" if small else ""}">{inner}</div>'


def _embedded(picture: Picture, number: int) -> str:
    """A figure as SVG in the reader's colours, a film as a video, both within the page.

    `number` keeps the ids within the figure apart from those of others.
    """
    if isinstance(picture.content, Path):
        data = base64.b64encode(picture.content.read_bytes()).decode()
        return (
            '<video controls muted loop playsinline preload="metadata" '
            f'src="data:video/mp4;base64,{data}"></video>'
        )
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": str(number)}):  # which would be random otherwise
        picture.content.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    drawn = buffer.getvalue()
    drawn = drawn[drawn.index("<svg") :].replace(INK, "currentColor")
    drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn, flags=re.DOTALL)
    drawn = re.sub(r'<g id="[^"]*"', "<g", drawn)
    drawn = re.sub(r' (?:width|height)="[\d.]+pt"', "", drawn, count=2)
    label = html.escape(picture.caption, quote=True)
    return drawn.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def _write_markdown(heading: str, blocks: Sequence[Block], out: Path) -> None:
    folder = out.with_name(out.stem + "_files")
    folder.mkdir(exist_ok=True)
    written: list[Path] = []
    parts = [f"# {heading}"]
    for block in blocks:
        match block:
            case Heading(text, level):
                parts.append(f"{'#' * level} {text}")
            case Text(text, verdict):
                parts.append(f"**{text}**" if verdict else text)
            case Items(items, code=True):
                parts.append("```bash\n" + "\n".join(items) + "\n```")
            case Items(items):
                parts.append("\n".join(f"- {item}" for item in items))
            case Legend():
                pass  # the pictures have legends of their own here
            case Table(header, rows):
                lines = [header, ["---"] * len(header), *rows]
                cells = [[cell.replace("|", "\\|") for cell in line] for line in lines]
                parts.append("\n".join("| " + " | ".join(line) + " |" for line in cells))
            case Pictures(pictures):
                for picture in pictures:
                    path = folder / f"{len(written):03}.png"
                    if isinstance(picture.content, Path):
                        path = path.with_suffix(picture.content.suffix)
                        shutil.copyfile(picture.content, path)
                    else:
                        for axes in picture.content.axes:
                            if axes.get_legend_handles_labels()[0]:
                                axes.legend(frameon=False, fontsize=8)
                        picture.content.savefig(path, dpi=150)
                    written.append(path)
                    caption = re.sub(r"([\\\[\]*])", r"\\\1", picture.caption)
                    parts.append(f"![{caption}]({quote(folder.name)}/{path.name})")
                    parts.append(f"*{caption}*")
    _write(out, "\n\n".join(parts) + "\n")
    for path in folder.iterdir():  # of a longer report that was here before
        if re.fullmatch(r"\d{3}\.(png|gif)", path.name) and path not in written:
            path.unlink()


def _write(out: Path, text: str) -> None:
    """Write the page as a whole; of a folder's name that is no text, what can be written."""
    write_text(out, text.encode("utf-8", "replace").decode())
