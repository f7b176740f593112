"""Free memory is the machine's, or what the limits of its control groups leave to the process."""

import types
from pathlib import Path

import pytest

from qscore import memory


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Makes a machine with 1000 bytes free, these control groups and these files under them."""
    free = types.SimpleNamespace(available=1000)
    monkeypatch.setattr("psutil.virtual_memory", lambda: free)

    def make(groups: str, files: dict[str, str]) -> Path:
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/cgroup").write_text(groups)
        for name, text in files.items():
            path = tmp_path / "sys/fs/cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n")
        return tmp_path

    return make


def group(folder: str, limit: str, use: int, *, version: int = 2) -> dict[str, str]:
    """The files of a group that uses so much, 5 bytes of it files that can be dropped."""
    names = ("memory.max", "memory.current", "inactive_file")
    if version == 1:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    stat = f"active_file 70\n{names[2]} 5"
    values = zip((names[0], names[1], "memory.stat"), (limit, str(use), stat), strict=True)
    return {f"{folder}{name}": value for name, value in values}


@pytest.mark.parametrize(
    "groups, files, free",
    [
        ("0::/\n", {}, 1000),  # the outermost group has no files
        ("0::/job\n", group("job/", "max", 90), 1000),
        ("0::/job\n", group("job/", "300", 90), 215),
        ("0::/job\n", group("job/", "80", 90), 0),
        ("0::/job/step\n", group("job/", "300", 90) | group("job/step/", "max", 20), 215),
        ("0::/on-the-host/abc\n", group("", "300", 90), 215),  # as seen in a container
        ("9:name=systemd:/\n4:cpu,memory:/job\n0::/\n", group("memory/job/", "300", 90, version=1),
         215),
        ("4:memory:/job\n", group("memory/job/", str(2**63 - 4096), 90, version=1), 1000),
    ],
)  # fmt: skip
def test_the_tightest_limit_counts(machine, groups, files, free):
    assert memory.available(machine(groups, files)) == free


def test_without_control_groups_it_is_the_machines(machine, tmp_path):
    assert not (tmp_path / "proc").exists()
    machine("", {})
    (tmp_path / "proc/self/cgroup").unlink()
    assert memory.available(tmp_path) == 1000
