"""The thread pool: phases, sizes, forks, limits of containers."""

import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from hasten import _native


def run(code: str, timeout: float = 60.0) -> str:
    """Run a script of its own process; its output."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout, check=False, env=None
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("threads", [1, 2, 3, 9])
def test_every_piece_runs_once_and_phases_do_not_overlap(threads):
    # Each round adds other pieces to other cells: where two phases overlap, somebody's sum is lost.
    count, rounds = 37, 300
    expected = np.zeros(count, np.int64)
    for shift in range(rounds):
        expected[(np.arange(count) + shift) % count] += np.arange(count)
    found = np.array(_native.pool_check(threads, count, rounds))
    np.testing.assert_array_equal(found[:count], expected)


def test_every_thread_flushes_denormals_and_the_caller_gets_its_own_mode_back():
    assert not _native.flushes_denormals()
    assert _native.pool_check(4, 1, 1)[1:] == [1, 1, 1, 1]
    assert not _native.flushes_denormals()


def test_the_pool_grows_to_the_largest_team_and_no_further():
    _native.pool_check(3, 1, 1)
    before = _native.pool_workers()
    _native.pool_check(2, 1, 1)
    _native.pool_check(before + 2, 1, 1)
    assert before >= 2
    assert _native.pool_workers() == before + 1


def test_two_callers_take_turns():
    found = {}

    def work(name):
        found[name] = [_native.pool_check(2, 5, 50) for _ in range(40)]

    callers = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    alone = _native.pool_check(2, 5, 50)
    assert all(result == alone for results in found.values() for result in results)


def test_more_threads_than_cores_still_finish_soon():
    start = time.monotonic()
    _native.pool_check(24, 48, 100)
    assert time.monotonic() - start < 20


def test_a_forked_child_has_a_pool_of_its_own():
    code = """
import os, warnings
warnings.simplefilter("ignore")
from hasten import _native
before = _native.pool_check(3, 10, 20)
child = os.fork()
if child == 0:
    assert _native.pool_workers() == 0
    os._exit(0 if _native.pool_check(3, 10, 20) == before else 3)
_, status = os.waitpid(child, 0)
assert _native.pool_check(3, 10, 20) == before
print(os.waitstatus_to_exitcode(status))
"""
    assert run(code) == "0"


def test_a_process_ends_while_its_threads_wait():
    assert run("from hasten import _native; _native.pool_check(6, 10, 10); print('done')", timeout=20) == "done"


@pytest.mark.skipif(sys.platform != "linux", reason="affinity is Linux's")
def test_affinity_is_honoured():
    code = """
import os
from hasten import _native
cores = sorted(os.sched_getaffinity(0))
print(_native.granted_threads() <= len(cores))
os.sched_setaffinity(0, cores[:1])
print(_native.granted_threads())
"""
    assert run(code).split() == ["True", "1"]


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/", {"cpu.max": "150000 100000"}, 1.5),
        ("0::/", {"cpu.max": "max 100000"}, 0),
        ("0::/a/b", {"cpu.max": "400000 100000", "a/cpu.max": "50000 100000", "a/b/cpu.max": "max 100000"}, 0.5),
        ("0::/gone", {}, 0),
        ("4:cpu,cpuacct:/a", {"cpu/a/cpu.cfs_quota_us": "250000", "cpu/a/cpu.cfs_period_us": "100000"}, 2.5),
        ("4:cpu,cpuacct:/", {"cpu,cpuacct/cpu.cfs_quota_us": "-1", "cpu,cpuacct/cpu.cfs_period_us": "100000"}, 0),
        ("4:cpuset:/a", {"cpu/a/cpu.cfs_quota_us": "100000", "cpu/a/cpu.cfs_period_us": "100000"}, 0),
        (
            "3:cpu:/a\n0::/a",
            {"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000", "a/cpu.max": "200000 100000"},
            2.0,
        ),
        ("nonsense\n0::", {"cpu.max": "words"}, 0),
    ],
)
def test_container_quotas(tmp_path, membership, files, expected):
    (tmp_path / "membership").write_text(membership + "\n")
    for name, content in files.items():
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")
    assert _native.cpu_quota(str(tmp_path / "membership"), str(tmp_path / "root")) == expected


def test_limits_of_the_machine_are_plausible():
    # Any machine of this century reads 0.1 GB/s and multiplies 0.1 billion times a second; none reaches the bounds.
    assert 0.1 < _native.read_gbs(32 << 20, 0.02, 1) < 1e4
    assert 0.1 < _native.int8_gmacs(0.02, 1) < 1e6
    assert 0.1 < _native.bf16_gmacs(0.02, 2) < 1e6
