"""Cores and memory are those that this process may use, not the machine's: affinity, containers, a sweep's share."""

import os
import subprocess
import sys
import threading
import time

import psutil
import pytest

from blip2nb import doctor, resources
from blip2nb.conversion.preview import preview
from blip2nb.lavis_env import reference
from blip2nb.sweeps import cluster
from blip2nb.variants import variant
from blip2nb.weights.threads import at_once

V1 = "3:cpuset:/box\n2:cpu,cpuacct:/box/inner\n4:memory:/box/inner\n1:name=systemd:/box\n0::/unified\n"


@pytest.fixture(autouse=True)
def _no_share(monkeypatch):
    monkeypatch.delenv(resources.CORES, raising=False)


def tree(root, files):
    """Files as the kernel shows them, under a folder that stands for /."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def ask(code, **environment):
    command = [sys.executable, "-c", f"import os; from blip2nb.resources import *; {code}"]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_a_process_that_is_bound_to_one_core_counts_one():
    assert ask(f"os.sched_setaffinity(0, {{{min(os.sched_getaffinity(0))}}}); print(cores())") == 1


def test_a_share_is_a_limit_and_no_more(monkeypatch):
    own = resources.cores()
    for share, expected in (("1", 1), ("100000", own), ("0", 1), ("many", own), ("", own)):
        monkeypatch.setenv(resources.CORES, share)
        assert resources.cores() == expected


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "300000 100000\n"}, 3),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "150000 100000\n",
          "sys/fs/cgroup/a/b/cpu.max": "max 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/not/mounted/here\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        ({"proc/self/cgroup": V1, "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_quota_us": "400000\n",
          "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_period_us": "100000\n",
          "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n"}, 4),
        ({"proc/self/cgroup": V1, "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000\n",
          "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}, 2),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        ({}, None),
    ],
)  # fmt: skip
def test_a_quota_of_processor_time_counts_as_cores_in_both_versions(tmp_path, monkeypatch, files, quota):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(64))
    assert resources.cores(tree(tmp_path, files)) == (quota or 64)


@pytest.mark.parametrize(
    ("own", "group", "limit", "use", "cache"),
    [
        ("0::/box\n", "box", "memory.max", "memory.current", ""),
        (V1, "memory/box/inner", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
        (V1, "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),  # as a container mounts it
    ],
)
def test_a_limit_of_memory_counts_in_both_versions_and_cached_files_are_free(tmp_path, own, group, limit, use, cache):
    stat = f"anon 1\n{cache}inactive_file 20000000\n{cache}active_file 10000000\n"
    files = {limit: "100000000\n", use: "90000000\n", "memory.stat": stat}
    root = tree(tmp_path, {"proc/self/cgroup": own, **{f"sys/fs/cgroup/{group}/{name}": files[name] for name in files}})
    assert resources.memory(root) == 100_000_000
    assert resources.free_memory(root) == 40_000_000


def test_without_a_limit_memory_is_the_machines(tmp_path):
    no_limit = {"proc/self/cgroup": V1, "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"}
    for root in (tree(tmp_path / "one", no_limit), tmp_path / "none"):
        assert resources.memory(root) == psutil.virtual_memory().total
        assert 0 < resources.free_memory(root) < psutil.virtual_memory().total


def test_copying_takes_no_more_threads_than_its_share_of_cores(monkeypatch):
    monkeypatch.setenv(resources.CORES, "1")
    together = threading.Barrier(3)  # one for the core, two that wait for the disk

    def job():
        together.wait(timeout=30)
        time.sleep(0.05)  # so that a thread is begun for each further job, if there may be more
        return threading.get_ident()

    assert len(set(at_once([job] * 12))) == 3


def test_plan_proof_sweep_and_doctor_count_the_same_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(resources, "memory", lambda: 20_000_000_000)
    monkeypatch.setattr(resources, "free_memory", lambda: 18_000_000_000)
    assert preview(variant("tiny-blip2-opt-2.7b"), tmp_path / "model").memory_here == 20_000_000_000
    assert "this machine has 20" in reference.memory_short(variant("blip2-opt-6.7b"))
    assert cluster.memory() == 18_000_000_000
    assert doctor._memory().found == "18 GB available"
