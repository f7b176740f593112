"""Runs side by side: their grouping and its complaints, the statistics, and the report's page."""

import base64
import dataclasses
import gc
import importlib
import json
import re
import shlex
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import pytest
from helpers import assert_close, fast_compilation, write_run
from imageio_ffmpeg import get_ffmpeg_exe
from matplotlib.figure import Figure

import qscore as qs
from qscore import cli, plots, statistics
from qscore.environments import LQ, DoubleWell
from qscore.errors import UsageError
from qscore.folder import Run, Settings
from qscore.panel import Method, Panel, Task, _labels, arrange, read_panel
from qscore.report import report

report_module = importlib.import_module("qscore.report")

probability_of_improvement = pytest.importorskip(
    "rliable.metrics", reason="the extra `stats` is not installed"
).probability_of_improvement

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


# -- grouping --------------------------------------------------------------------------------------


def test_seeds_of_one_method_belong_together_whichever_folders_they_lie_in(tmp_path):
    first = write_run(tmp_path / "first")
    more = write_run(tmp_path / "more", seeds=2, seed_start=3)
    other = write_run(tmp_path / "other", qs.SAC(), level=-50)
    panel = read_panel([first, other, more])
    (task,) = panel.tasks
    assert task.name == "Pendulum-v1" and task.final_step == 400
    assert [method.name for method in task.methods] == ["qsm", "sac"]
    qsm, sac = task.methods
    assert list(qsm.seeds) == [0, 1, 2, 3, 4] and [run.folder for run in qsm.runs] == [first, more]
    assert qsm.returns(400) == [400, 401, 402, 403, 404] and sac.returns(100) == [50, 51, 52]
    curve = qsm.curve("env_steps")
    assert curve.x == [100, 200, 300, 400] and curve.middle == [102, 202, 302, 402]
    assert curve.low[0] < 102 < curve.high[0] and qsm.curve("seconds").x == [2, 4, 6, 8]
    assert panel.notes == ["Pendulum-v1: different numbers of seeds (qsm: 5; sac: 3)."]


def test_labels_say_what_distinguishes_methods_and_tasks(tmp_path):
    hosts = [qs.Host("Pendulum-v1", max_episode_steps=n) for n in (100, 200)]
    folders = [
        write_run(tmp_path / "a", qs.QSM(temperature=0.2, hidden=(8, 8))),
        write_run(tmp_path / "b", qs.QSM(preset="official", hidden=(8, 8))),
        write_run(tmp_path / "c", qs.TD3(), hosts[0]),
        write_run(tmp_path / "d", qs.TD3(), dataclasses.replace(hosts[1], num_envs=2)),
        write_run(tmp_path / "e", qs.QSM(hidden=(8, 8)), precision="bf16"),
    ]
    panel = read_panel(folders)
    assert [task.name for task in panel.tasks] == [
        "Pendulum-v1",
        "Pendulum-v1, max_episode_steps=100",
        "Pendulum-v1, max_episode_steps=200",
    ]
    assert [method.name for method in panel.tasks[0].methods] == [
        "qsm, temperature=0.2",
        "qsm, official",
        "qsm, precision=bf16",
    ]
    assert [task.methods[0].name for task in panel.tasks[1:]] == ["td3", "td3, num_envs=2"]
    assert "Pendulum-v1 is there in different forms, which are tasks of their own." in panel.notes
    assert len({plots.color(panel, name) for name in panel.names}) == 5


def test_numbers_of_labels_count_settings_and_not_folders():
    one, other = {"problem": "a" * 40}, {"problem": "a" * 41}
    labels = _labels([("lq", each) for each in (one, other, other, other, one)])
    cut = "lq, problem=" + "a" * 27 + "..."
    assert labels == [cut, f"{cut} (2)", f"{cut} (2)", f"{cut} (2)", cut]


def test_long_settings_that_are_cut_to_the_same_characters_stay_apart(tmp_path):
    problems = [
        json.dumps(
            {"A": [[0.123]], "B": [[1.0]], "M": [[1.0, 0.0], [0.0, m]], "score_cost": 1.0}
            | {"sigma_a": 0.5, "discount_rate": 1.0}
        )
        for m in (1.0, 2.0)
    ]
    folders = [
        write_run(tmp_path / str(i), qs.CQSM(), LQ("lq", problem=problem))
        for i, problem in enumerate(problems)
    ]
    one, two = (task.name for task in read_panel(folders).tasks)
    assert one != two and two == one + " (2)"


def test_different_lengths_are_compared_where_all_have_been_and_said(tmp_path):
    folders = [
        write_run(tmp_path / "short", qs.SAC(), steps=300),
        write_run(tmp_path / "cut", qs.QSM(), done=200),
    ]
    other = Run.open(folders[0])
    versions = {**other.versions, "jax": "0.0.1", "cores": "64"}
    dataclasses.replace(other, versions=versions).save_config()
    panel = read_panel(folders)
    assert panel.tasks[0].final_step == 200
    assert panel.notes[0] == f"{folders[1]} has not finished: 200 of 400 steps."
    assert panel.notes[1].startswith("Pendulum-v1: compared after 200 steps, which all were")
    assert f"({folders[0]} 300; {folders[1]} 200)" in panel.notes[1]
    assert "tables take those that all have, 2 of them" in panel.notes[2]
    assert any(re.search(r"different versions, jax \(0\.0\.1, ", note) for note in panel.notes)
    assert any("different versions, cores (64, " in note for note in panel.notes)


def broken(folder: Path, line: str) -> list[Path]:
    with open(folder / "evals.jsonl", "ab") as file:
        file.write(line.encode("latin-1") + b"\n")
    return [folder]


def test_a_seed_that_lags_and_a_part_that_is_longer_are_said(tmp_path):
    first, longer = write_run(tmp_path / "a"), write_run(tmp_path / "b", steps=800, seed_start=3)
    lines = (first / "evals.jsonl").read_text().splitlines(keepends=True)
    (first / "evals.jsonl").write_text("".join(lines[:-1]))  # killed between two lines
    panel = read_panel([first, longer])
    assert panel.tasks[0].final_step == 300
    assert panel.notes[0] == f"{first} has not finished: 300 of 400 steps."
    assert f"({first} 300; {longer} 800)" in panel.notes[1]


def test_offline_runs_are_tasks_of_their_own_and_count_gradient_steps(tmp_path):
    data = str(tmp_path / "a|b.npz")
    folders = [
        write_run(tmp_path / "online", qs.TD3()),
        write_run(tmp_path / "offline", qs.TD3(), dataset=data),
        write_run(tmp_path / "both", qs.TD3(), dataset=data, steps=300, online_steps=100),
        write_run(tmp_path / "more", qs.TD3(), dataset=data, steps=200, online_steps=200),
    ]
    panel = read_panel(folders)
    assert [task.counted for task in panel.tasks] == [
        "environment steps",
        "gradient steps",
        *["gradient, then environment steps"] * 2,
    ]
    # lines are written at 50 steps a second; those on data are no environment steps
    speeds = [report_module._speed(task.methods[0]) for task in panel.tasks]
    assert speeds == ["150 (3 seeds)", "-", "38 (3 seeds)", "75 (3 seeds)"]
    report(folders, tmp_path / "r e (1).md", films=False)
    text = (tmp_path / "r e (1).md").read_text()
    assert "## Pendulum-v1, dataset=a|b.npz" in text
    assert "(r%20e%20%281%29_files/000.png)" in text
    report_module._write_markdown("t", [report_module.Table(["a"], [["x|y"]])], tmp_path / "t.md")
    assert "| x\\|y |" in (tmp_path / "t.md").read_text()


REFUSED = {
    "twice": (
        lambda t: [write_run(t / "a"), write_run(t / "b", seeds=1, seed_start=2)],
        "seed 2 of qsm is in .*a and in .*b; a seed counts once",
    ),
    "episodes": (
        lambda t: [write_run(t / "a"), write_run(t / "b", qs.SAC(), eval_episodes=5)],
        "different numbers of episodes \\(2 in .*a, 5 in .*b\\)",
    ),
    "steps": (
        lambda t: [write_run(t / "a"), write_run(t / "b", qs.SAC(), every=70)],
        "never evaluated after equally many steps",
    ),
    "empty": (lambda t: [write_run(t / "a", every=500)], "a has no evaluation yet"),
    "none": (lambda t: [], "no run folder was given"),
    "given twice": (lambda t: [write_run(t / "a"), t / "." / "a"], "a was given twice"),
    **{
        f"line {line}": (
            lambda t, line=line: broken(write_run(t / "a"), line),
            f"evals.jsonl, line 13, is not a line of a run: {message}",
        )
        for line, message in {
            '{"seed": 0}': "KeyError: 'env_steps'",
            '{"seed": 0, "env_steps": 500, "seconds": 1}': "KeyError: 'returns'",
            '{"seed": 0, "env_steps": 500, "returns": [1]}': "KeyError: 'seconds'",
            '{"seed": 0, "env_steps": 500, "seconds": 1, "returns": []}': "ValueError: returns",
            '{"seed": 0, "env_steps": 500, "seconds": 1, "returns": [NaN]}': "ValueError: returns",
            '{"seed": 0, "env_steps": 500, "seconds": 1, "returns": [null]}': "TypeError",
            '{"seed": 9, "env_steps": 500, "seconds": 1, "returns": [1]}': "ValueError: seed 9",
            "\xff": "UnicodeDecodeError",
        }.items()
    },
}


@pytest.mark.parametrize("case", REFUSED)
def test_runs_that_cannot_be_compared_are_refused(tmp_path, case):
    make, message = REFUSED[case]
    with pytest.raises(UsageError, match=message):
        read_panel(make(tmp_path))


def test_a_line_half_written_is_not_read(tmp_path):
    folder = write_run(tmp_path / "run")
    with open(folder / "evals.jsonl", "a") as file:
        file.write('{"seed": 0, "env_st')
    assert read_panel([folder]).tasks[0].final_step == 400


RUNS = {
    "plain": (qs.QSM(), qs.Host("Pendulum-v1"), {}),
    "preset": (qs.QSM(preset="official", hidden=(8, 8, 8)), qs.Host("Pendulum-v1", num_envs=4), {}),
    "flags": (
        qs.CQSM(control_variate=False, decay_seconds=None),
        qs.Host("InvertedPendulum-v5", max_episode_steps=50),
        {"steps": 10, "seeds": 2, "seed_start": 7, "precision": "bf16"},
    ),
    "ours": (qs.SAC(learn_temperature=False), DoubleWell("double_well", dt=0.05), {}),
}


RUNS["lq"] = (
    qs.CQSM(preset="linear_quadratic"),
    LQ(
        "lq",
        problem='{"A": [[0.1]], "B": [[1.0]], "M": [[1.0, 0.0], [0.0, 1.0]], "score_cost": 1.0, '
        '"sigma_a": 0.5, "discount_rate": 1.0}',
    ),
    {},
)


@pytest.mark.parametrize("case", RUNS)
def test_the_command_of_a_run_repeats_it(tmp_path, monkeypatch, case):
    algorithm, environment, settings = RUNS[case]
    run = Run(tmp_path, algorithm, environment, Settings(**settings), {})
    asked = {}
    monkeypatch.setattr(cli, "_conclude", lambda run: None)
    monkeypatch.setattr(
        cli.run, "train", lambda *args, **kwargs: asked.update(args=args, kwargs=kwargs)
    )
    words = shlex.split(run.command())
    assert words[0] == "qscore"
    cli.main(words[1:])
    assert asked["args"] == (algorithm, environment)
    assert Settings(**{k: v for k, v in asked["kwargs"].items() if k != "out"}) == run.settings


# -- statistics ------------------------------------------------------------------------------------


def test_figures_over_tasks_are_those_of_every_seed_together():
    scores = [[0.0, 1.0, 2.0, 3.0], [10.0, 11.0]]  # the second task's count twice
    middle, (low, high) = statistics.aggregate(scores)
    assert_close(middle, np.mean([2.0, 3.0, 10.0, 10.0]))
    assert low < middle < high
    # a seed is only drawn in its own task: the second task never falls below 10
    assert statistics.aggregate([[5.0] * 3, [10.0] * 3]) == (7.5, (7.5, 7.5))
    state = np.random.get_state(legacy=False)["state"]["key"].copy()  # noqa: NPY002
    assert statistics.aggregate(scores) == (middle, (low, high))
    after = np.random.get_state(legacy=False)["state"]["key"]  # noqa: NPY002
    np.testing.assert_array_equal(after, state)


def test_interval_over_one_task_is_that_of_the_plain_bootstrap():
    values = np.random.default_rng(0).normal(size=12).tolist()
    (low, high), plain = statistics.aggregate([values])[1], statistics.bootstrap_interval(values)
    # two sets of 2000 resamples
    np.testing.assert_allclose([low, high], plain, atol=0.1)


def test_probability_of_improvement_counts_pairs_ties_as_half_and_tasks_alike():
    better, worse = [[3.0, 4.0], [5.0]], [[1.0, 3.0], [9.0, 9.0, 9.0]]
    probability, (low, high) = statistics.probability_of_improvement(better, worse)
    assert probability == np.mean([3.5 / 4, 0.0])
    assert 0.0 <= low <= probability <= high <= 0.5
    # rliable's figure, of as many seeds on each of three tasks
    one, other = np.random.default_rng(0).integers(0, 9, (2, 5, 3)).astype(float)
    expected = probability_of_improvement(one, other)
    ours, _ = statistics.probability_of_improvement(one.T.tolist(), other.T.tolist())
    assert ours == pytest.approx(expected)


def test_tasks_count_alike_whatever_their_numbers_of_seeds():
    # two methods that do the same on both tasks, with seeds where the other has few
    one = statistics.aggregate([[100.0] * 8, [50.0] * 2])
    other = statistics.aggregate([[100.0] * 2, [50.0] * 8])
    assert one == other == (75.0, (75.0, 75.0))


def test_chance_knows_how_little_few_seeds_can_say():
    low, high = [1.0, 2.0, 3.0], [4.0, 5.0, 6.0]
    assert statistics.chance([high], [low]) == pytest.approx(2 / 20, abs=0.01)  # one of 20 orders
    assert statistics.chance([[7.0] * 3], [[0.0] * 3]) == pytest.approx(2 / 20, abs=0.01)  # ties
    assert statistics.chance([[4.0] * 4], [[0.0] * 4]) == pytest.approx(2 / 70, abs=0.01)
    assert statistics.chance([[2.0]], [[1.0]]) == pytest.approx(1.0, abs=0.02)
    assert statistics.chance([low], [low]) == 1.0
    # the direction counts: what is behind is not clearly ahead
    assert statistics.chance([low], [high]) == 1.0
    several = statistics.chance([high, high, high], [low, low, low])
    assert several < 0.01 < 0.05 < statistics.chance([high, low], [low, high])
    # equal methods: no more than the share of mistakes that it promises
    draws = np.random.default_rng(0).normal(size=(200, 2, 2, 5)).tolist()
    assert np.mean([statistics.chance(one, other) < 0.05 for one, other in draws]) <= 0.07


@pytest.mark.parametrize(("seeds", "tasks"), [(1, 1), (3, 1), (4, 1), (1, 3), (2, 2)])
def test_the_least_chance_is_that_of_one_who_is_always_ahead(seeds, tasks):
    high, low = [[9.0] * seeds] * tasks, [[1.0] * seeds] * tasks
    least = statistics.least_chance(high, low)
    assert least == pytest.approx(statistics.chance(high, low), abs=0.02)


@pytest.mark.parametrize(("seeds", "settles"), [(3, False), (4, True)])
def test_the_verdict_says_where_no_result_of_so_few_seeds_could_settle_it(tmp_path, seeds, settles):
    host = qs.Host("Pendulum-v1")
    folders = [
        write_run(tmp_path / "a", qs.TD3(), host, level=1e4, seeds=seeds, every=400),
        write_run(tmp_path / "b", qs.SAC(), host, level=0.0, seeds=seeds, every=400),
    ]
    report(folders, tmp_path / "r.html", films=False)
    said = re.search(r'class="verdict">(.*?)</p>', (tmp_path / "r.html").read_text())
    assert said
    assert ("That is clear" in said[1]) == settles
    assert ("So few seeds cannot settle it" in said[1]) == (not settles)


def test_no_draw_of_labels_is_below_the_least_chance(monkeypatch):
    ahead, behind = [[9.0] * 3, [9.0]], [[1.0] * 2, [1.0] * 3]
    assert statistics.least_chance(ahead, behind) == 0.05  # where `SURE` lies
    monkeypatch.setattr(statistics, "RELABELLINGS", 20)
    monkeypatch.setattr(statistics.np.random, "default_rng", lambda seed: Unlucky())
    assert statistics.chance(ahead, behind) == 0.05


class Unlucky:
    """Draws labels with which `ahead` is never ahead."""

    def permuted(self, ranks, axis):
        return ranks[:, ::-1]


def test_single_seeds_are_given_no_intervals(tmp_path):
    folders = [
        write_run(tmp_path / "td3", qs.TD3(), level=1e4, seeds=1),
        write_run(tmp_path / "sac", qs.SAC(), seeds=3),
    ]
    report(folders, tmp_path / "r.html", films=False)
    text = (tmp_path / "r.html").read_text()
    assert "a return of 10,400 (one seed, so without an interval), 9,999 above sac" in text
    assert "100% (one seed)" in Page(text).cells and "Single seeds have none: td3." in text
    # over two tasks, of which one has several seeds
    two = qs.Host("Hopper-v5")
    folders += [
        write_run(tmp_path / "td3b", qs.TD3(), two, level=1e4, seeds=3),
        write_run(tmp_path / "sacb", qs.SAC(), two, seeds=3),
    ]
    report(folders, tmp_path / "r.html", films=False)
    text = (tmp_path / "r.html").read_text()
    assert "(one seed on some task, so without an interval)" in text
    assert "100% (one seed)" in Page(text).cells


def test_the_verdict_is_not_sure_of_one_that_mostly_does_worse(tmp_path):
    # far ahead on one task, a little behind on two: the mean is higher, but a seed is mostly worse
    folders = []
    for task, ours, theirs in (
        ("Pendulum-v1", 1e4, 0.0),
        ("Hopper-v5", 900.0, 1000.0),
        ("Swimmer-v5", 900.0, 1000.0),
    ):
        host = qs.Host(task)
        folders += [
            write_run(tmp_path / f"a{task}", qs.TD3(), host, level=ours, seeds=4, every=400),
            write_run(tmp_path / f"b{task}", qs.SAC(), host, level=theirs, seeds=4, every=400),
        ]
    report(folders, tmp_path / "r.html", films=False)
    text = (tmp_path / "r.html").read_text()
    said = re.search(r'class="verdict">(.*?)</p>', text)
    assert said and "That is clear" not in said[1]


# -- the page --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run that can be filmed."""
    folder = tmp_path_factory.mktemp("trained") / "td3"
    algorithm = qs.TD3(hidden=(8, 8), batch_size=8, warmup_steps=60)
    with fast_compilation():
        qs.train(
            algorithm, "Pendulum-v1", steps=400, out=folder, eval_every=100, eval_episodes=2,
            progress=False,
        )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def page(tmp_path_factory, trained) -> Path:
    folder = tmp_path_factory.mktemp("report")
    cartpole = qs.Host("InvertedPendulum-v5")
    folders = [
        write_run(folder / "qsm", level=200),
        write_run(folder / "sac", qs.SAC(), level=-50, seeds=4),
        write_run(folder / "qsm2", qs.QSM(), cartpole, level=100),
        write_run(folder / "sac2", qs.SAC(), cartpole, level=10),
        trained,
    ]
    out = folder / "deep" / "report.html"
    report(folders, out)
    return out


class Page(HTMLParser):
    """Tags that are open and closed, what is referred to, ids, and the text of cells."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.links: list[str | None] = []
        self.ids: list[str | None] = []
        self.cells: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href"):
                self.links.append(value)
            if name == "id":
                self.ids.append(value)
        if tag not in ("meta", "link"):
            self.open.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "td" in self.open:
            self.cells[-1] += data


@pytest.mark.slow
def test_the_page_holds_everything_that_it_shows(page):
    text = page.read_text()
    parsed = Page(text)
    assert parsed.open == [] and "script" not in parsed.tags
    assert len(parsed.ids) == len(set(parsed.ids))
    for link in parsed.links:
        assert link is not None and link.startswith(("data:", "#")), link
        assert not link.startswith("#") or link[1:] in parsed.ids
    assert not re.search(r"(?:url\(|@import|https?://(?!www\.w3\.org))(?!#)", text)
    assert list(page.parent.iterdir()) == [page]
    # two tasks: curves twice, every seed, the metrics each has, one figure over both
    seeds = 3 + 4 + 1 + 3 + 3
    assert parsed.tags.count("svg") == 1 + 2 * 2 + seeds + 2 * 2 + 1
    assert parsed.tags.count("video") == 1
    assert "Not logged by sac" in text and "No film of qsm on Pendulum-v1" in text


@pytest.mark.slow
def test_the_page_says_which_is_better_by_how_much_and_how_sure(page):
    text = page.read_text()
    verdict = re.search(r'class="verdict">(.*?)</p>', text)
    assert verdict
    said = verdict[1]
    # normalised: 0 is sac's first interquartile mean, 1 is qsm's last
    assert said.startswith("qsm does best: a normalised return of 1 ")
    assert "the next. That is clear: " in said and "(3/3 against 4/3 seeds)" in said
    assert "100% (100% to 100%)" in text  # a seed of it is better
    cells = Page(text).cells
    assert "600 to 602" in cells and "0: 600, 1: 601, 2: 602" in cells
    for run in ("qsm", "sac", "td3"):
        assert f"<code>qscore train {run} Pendulum-v1 --steps 400" in text
    assert "Pendulum-v1: different numbers of seeds (qsm: 3; sac: 4; td3: 1)." in text
    assert "InvertedPendulum-v5: not run with td3." in text


@pytest.mark.slow
def test_the_film_in_the_page_is_the_episode(page, tmp_path):
    data = re.search(r'src="data:video/mp4;base64,([^"]+)"', page.read_text())
    assert data
    path = tmp_path / "film.mp4"
    path.write_bytes(base64.b64decode(data[1]))
    decode = [get_ffmpeg_exe(), "-i", path, "-f", "rawvideo", "-pix_fmt", "gray", "-"]
    done = subprocess.run(decode, capture_output=True, check=True)
    size = re.search(rb"Video: .* (\d+)x(\d+)[ ,]", done.stderr)
    assert size
    frames = np.frombuffer(done.stdout, np.uint8).reshape(-1, int(size[2]), int(size[1]))
    assert len(frames) == 201 and np.ptp(frames[0]) > 0


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")
def test_a_browser_shows_the_page_without_errors_in_both_themes_and_on_a_phone(page, tmp_path):
    shots = {}
    for name, width, scheme in (("light", 1200, 1), ("dark", 1200, 0), ("phone", 500, 1)):
        shot = tmp_path / f"{name}.png"
        done = subprocess.run(
            [
                *(str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu"),
                *("--hide-scrollbars", "--enable-logging=stderr", f"--window-size={width},1500"),
                f"--blink-settings=preferredColorScheme={scheme}",
                *(f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={shot}"),
                page.as_uri(),
            ],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0 and "CONSOLE" not in done.stderr, done.stderr
        shots[name] = np.asarray(imageio.imread(shot))[..., :3].astype(float)
    for shot in shots.values():
        assert np.ptp(shot) > 100  # something is drawn
    assert shots["light"].mean() > 200 and shots["dark"].mean() < 80
    # nothing sticks out: the margins of the phone's page are empty
    assert np.ptp(shots["phone"][:, :8]) == 0 and np.ptp(shots["phone"][:, -8:]) == 0


@pytest.mark.slow
def test_the_same_report_in_markdown_has_all_its_pictures(tmp_path, trained):
    out = tmp_path / "report.md"
    report([write_run(tmp_path / "sac", qs.SAC()), trained], out)
    text = out.read_text()
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert len(pictures) == len(set(pictures)) == 1 + 2 + 4 + 2 + 1
    assert {path.name for path in (tmp_path / "report_files").iterdir()} == {
        Path(each).name for each in pictures
    }
    for each in pictures:
        assert np.ptp(np.asarray(imageio.imread(tmp_path / each))) > 0
    assert text.startswith("# sac and td3 on Pendulum-v1\n\n**")
    assert "```bash\nqscore train sac Pendulum-v1 --steps 400 --seeds 3" in text
    assert not list(tmp_path.glob(".*"))
    # a report with fewer pictures, in its place, and one whose captions are cut within brackets
    (tmp_path / "report_files" / "mine.png").touch()
    wide = [qs.SAC(hidden=(size,) * 12) for size in (8, 16)]
    runs = [write_run(tmp_path / f"wide{i}", each, seeds=1) for i, each in enumerate(wide)]
    report(runs, out, films=False)
    text = out.read_text()
    assert "![sac, hidden=\\[8, 8, 8, 8, 8, 8, 8, 8, 8,..., seed 0](report_files/003.png)" in text
    assert sorted(path.name for path in (tmp_path / "report_files").iterdir()) == [
        *(f"{i:03}.png" for i in range(text.count("![") )), "mine.png"
    ]  # fmt: skip


def test_one_seed_of_one_method_has_no_interval_and_no_rival(tmp_path):
    report([write_run(tmp_path / "run", seeds=1)], tmp_path / "r.html", films=False)
    text = (tmp_path / "r.html").read_text()
    assert "qsm ends at a return of 400 (one seed, so without an interval)." in text
    assert "against" not in text and "one seed" in Page(text).cells


def test_figures_of_the_closed_form_are_in_the_report(tmp_path):
    folder = write_run(tmp_path / "run", qs.CQSM(preset="linear_quadratic"), LQ("lq"), seeds=2)
    (folder / "summary.json").write_text("{")
    with pytest.raises(UsageError, match="summary.json is not valid JSON"):
        report([folder], tmp_path / "r.html", films=False)
    errors = {"relative_error": {"q": [0.01, 0.02]}, "return_gap": [0.5, None]}
    (folder / "summary.json").write_text(json.dumps({"lq": errors}))
    report([folder], tmp_path / "r.html", films=False)
    cells = Page((tmp_path / "r.html").read_text()).cells
    assert "1.00%, 2.00%" in cells and "50.00%, infinite" in cells


def test_bad_requests_for_a_report_are_refused(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "run")
    with pytest.raises(UsageError, match=r"must end in .html or .md, got 'report.pdf'"):
        report([folder], Path("report.pdf"))
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(UsageError, match=r"`out` is .*folder.html, which is a folder"):
        report([folder], tmp_path / "folder.html")
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot write the report"):
        report([folder], tmp_path / "file" / "report.html", films=False)
    monkeypatch.setattr(statistics.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UsageError, match=r"needs the package rliable: .* pip install -e '.\[stats\]'"
    ):
        report([folder], tmp_path / "report.html")


def test_the_commands_draw_and_say_what_differs(tmp_path, capsys):
    folders = [write_run(tmp_path / "a"), write_run(tmp_path / "b", qs.SAC(), seeds=1)]
    for command, name in (("plot", "returns.png"), ("report", "report.html")):
        options = ["--no-films"] if command == "report" else []
        cli.main([command, *map(str, folders), "--out", str(tmp_path / name), *options])
        out, err = capsys.readouterr()
        assert out == f"{tmp_path / name}\n"
        assert err == "note: Pendulum-v1: different numbers of seeds (qsm: 3; sac: 1).\n"
        assert (tmp_path / name).stat().st_size > 0


def test_figures_do_not_pile_up(tmp_path):
    # a figure and its canvas hold each other: only the collector of cycles frees them
    def alive():
        return sum(isinstance(each, Figure) for each in gc.get_objects())

    panel = read_panel([write_run(tmp_path / "run")])
    gc.collect()
    before = alive()
    gc.disable()
    try:
        for _ in range(4):
            plots.plot_returns(panel, tmp_path / "figure.png")
        assert alive() - before <= 1
    finally:
        gc.enable()


def test_every_method_has_a_colour_of_its_own():
    methods = [Method(f"method {i}", {}) for i in range(40)]
    panel = Panel([Task("task", methods, [], "steps")], [])
    assert len({plots.color(panel, name) for name in panel.names}) == 40


def test_a_figure_has_one_axes_per_task(tmp_path, monkeypatch):
    drawn: list[Figure] = []
    monkeypatch.setattr(plots, "_save", lambda figure, out: drawn.append(figure))
    hosts = [qs.Host(name) for name in ("Pendulum-v1", "Hopper-v5", "Swimmer-v5")]
    runs = [Run.open(write_run(tmp_path / h.id, qs.SAC(), h)) for h in hosts]
    plots.plot_returns(arrange(runs), tmp_path / "figure.png")
    titles = [axes.get_title() for axes in drawn[0].axes if axes.axison]
    assert titles == [host.id for host in hosts]
