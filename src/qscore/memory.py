"""How much memory a process may still take: the machine's, or less where it runs in a container."""

from pathlib import Path

import psutil

LIMIT_FILES = {
    # version of Linux's control groups: limit, use, and what of it are files the kernel can drop
    "v2": ("memory.max", "memory.current", "inactive_file"),
    "v1": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def available(root: Path = Path("/")) -> int:
    """Bytes that can be taken without swapping, and without a container or a job being killed.

    `psutil` knows the machine's memory but no limits of Linux control groups, which Docker,
    Kubernetes and Slurm set. The least of both counts; `root` is where `/proc` and `/sys` are.
    """
    return min([psutil.virtual_memory().available, *_left_in_groups(root)])


def _left_in_groups(root: Path) -> list[int]:
    """What is left to each control group with a limit that this process is in, the outer ones too.

    A container often sees its own group as the outermost, and its path only as the host's: folders
    that are not there are passed over.
    """
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # no Linux
        return []
    left = []
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        innermost = mount / path.lstrip("/")
        limit_name, use_name, dropped = LIMIT_FILES["v1" if controllers else "v2"]
        for folder in (innermost, *innermost.parents):
            if not folder.is_relative_to(mount):
                break
            try:
                limit = (folder / limit_name).read_text().strip()
                use = int((folder / use_name).read_text())
                stat = dict(
                    row.split() for row in (folder / "memory.stat").read_text().splitlines()
                )
            except OSError:  # the outermost group of version 2 has none of these files
                continue
            if limit != "max":
                left.append(max(0, int(limit) - use + int(stat.get(dropped, 0))))
    return left
