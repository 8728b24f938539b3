from __future__ import annotations

from pathlib import Path

import pytest

from hasten.engine import memory
from hasten.errors import MemoryLimitError

MiB = 1 << 20


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MEMINFO = "MemTotal:       8388608 kB\nMemFree:  1 kB\nMemAvailable:   4194304 kB\n"


def test_memory_without_container(tmp_path: Path) -> None:
    root = write(tmp_path, {"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/\n"})
    assert memory.memory(root) == (8192 * MiB, 4096 * MiB)


@pytest.mark.parametrize("limit", ["max", "9223372036854771712"])
def test_memory_without_limit(tmp_path: Path, limit: str) -> None:
    files = {"memory.max": limit, "memory.current": "5", "memory.stat": "inactive_file 0"}
    group = {f"sys/fs/cgroup/a/{name}": text for name, text in files.items()}
    root = write(tmp_path, {"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/a\n", **group})
    assert memory.memory(root) == (8192 * MiB, 4096 * MiB)


def test_memory_of_nested_groups_is_the_tightest(tmp_path: Path) -> None:
    files = {
        "a/memory.max": str(1000 * MiB),
        "a/memory.current": str(900 * MiB),
        "a/memory.stat": f"anon 1\ninactive_file {300 * MiB}\n",
        "a/b/memory.max": str(2000 * MiB),
        "a/b/memory.current": str(100 * MiB),
        "a/b/memory.stat": "inactive_file 0\n",
    }
    group = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    root = write(tmp_path, {"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/a/b\n", **group})
    assert memory.memory(root) == (1000 * MiB, 400 * MiB)


def test_memory_of_version_one_groups(tmp_path: Path) -> None:
    files = {
        "memory.limit_in_bytes": str(512 * MiB),
        "memory.usage_in_bytes": str(200 * MiB),
        "memory.stat": f"total_inactive_file {100 * MiB}\n",
    }
    group = {f"sys/fs/cgroup/memory/docker/{name}": text for name, text in files.items()}
    lines = "5:cpu,cpuacct:/docker\n4:memory:/docker\n0::/\n"
    root = write(tmp_path, {"proc/meminfo": MEMINFO, "proc/self/cgroup": lines, **group})
    assert memory.memory(root) == (512 * MiB, 412 * MiB)


def group(name: str, limit: str, used: int) -> dict[str, str]:
    folder = f"sys/fs/cgroup/{name}/"
    return {folder + "memory.max": limit, folder + "memory.current": str(used), folder + "memory.stat": "anon 1\n"}


@pytest.mark.parametrize("used", [1000 * MiB, 1001 * MiB])
@pytest.mark.parametrize("parent", ["max", str(4000 * MiB)])
def test_a_group_at_its_limit_has_nothing_left(tmp_path: Path, parent: str, used: int) -> None:
    files = {**group("a", parent, 1001 * MiB), **group("a/b", str(1000 * MiB), used)}
    root = write(tmp_path, {"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/a/b\n", **files})
    assert memory.memory(root) == (1000 * MiB, 0)


def test_a_full_group_above_a_roomier_one(tmp_path: Path) -> None:
    files = {**group("a", str(1000 * MiB), 1000 * MiB), **group("a/b", str(2000 * MiB), 5 * MiB)}
    root = write(tmp_path, {"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/a/b\n", **files})
    assert memory.memory(root) == (1000 * MiB, 0)


def test_a_system_that_does_not_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(name: str) -> int:
        raise ValueError

    monkeypatch.setattr("os.sysconf", unknown)
    assert memory.memory(tmp_path) == (None, None)
    root = write(tmp_path, {"proc/self/cgroup": "0::/a\n", **group("a", str(1000 * MiB), 300 * MiB)})
    assert memory.memory(root) == (1000 * MiB, 700 * MiB)


def test_nothing_left_is_not_unknown() -> None:
    needed = memory.Prediction(weights=1, kv_cache=1, buffers=1)
    memory.require(needed, None)
    with pytest.raises(MemoryLimitError, match="0 B are available"):
        memory.require(needed, 0)
