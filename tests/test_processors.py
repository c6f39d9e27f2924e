"""What a process is told of its CPUs: quotas of both versions of control groups, threads of one core, time
that others take.
"""

import os

import pytest

from refimpl.kernels import processors


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Write files of groups: {folder: {file: text}}, with a line of /proc/self/cgroup for each."""
    monkeypatch.setattr(processors, "GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(processors, "OWN", tmp_path / "own")

    def write(own, files):
        (tmp_path / "own").write_text(own)
        for name, text in files.items():
            path = tmp_path / "cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return write


@pytest.mark.parametrize(
    ("own", "files", "quota"),
    [
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/\n", {"cpu.max": "750000 100000\n"}, 7.5),
        ("0::/a/b\n", {"cpu.max": "800000 100000\n", "a/cpu.max": "max 100000\n", "a/b/memory.max": "1"}, 8),
        ("0::/a/b\n", {"a/cpu.max": "50000 100000\n", "a/b/cpu.max": "400000 100000\n"}, 0.5),
        # A path of the host's, which a container does not see.
        ("0::/docker/123\n", {"cpu.max": "200000 100000\n"}, 2),
        ("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ("1:cpu:/x\n", {"cpu/x/cpu.cfs_quota_us": "150000\n", "cpu/x/cpu.cfs_period_us": "50000\n"}, 3),
        (
            "7:cpu,cpuacct:/\n0::/\n",
            {"cpu,cpuacct/cpu.cfs_quota_us": "120000\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"},
            1.2,
        ),
        ("3:cpuset:/\n2:memory:/\n", {"cpuset/cpu.max": "100 100\n"}, None),
        ("", {}, None),
    ],
)
def test_the_smallest_quota_of_the_groups_above_counts(groups, own, files, quota):
    groups(own, files)
    assert processors.quota() == quota


def test_throttled_time_is_told_in_seconds_of_both_versions(groups):
    groups("0::/\n", {"cpu.stat": "nr_periods 9\nnr_throttled 4\nthrottled_usec 2500000\n"})
    assert processors.taken()[2:4] == (4, 2.5)
    groups("1:cpu:/\n", {"cpu/cpu.stat": "nr_periods 9\nnr_throttled 5\nthrottled_time 1500000000\n"})
    assert processors.taken()[2:4] == (5, 1.5)


def test_threads_of_a_core_count_once(tmp_path, monkeypatch):
    monkeypatch.setattr(processors, "TOPOLOGY", tmp_path)
    monkeypatch.setattr(processors, "affinity", lambda: {0, 1, 2, 3, 9})
    for cpu, siblings in enumerate(("0,2", "1,3", "0,2", "1,3")):
        (tmp_path / f"cpu{cpu}/topology").mkdir(parents=True)
        (tmp_path / f"cpu{cpu}/topology/thread_siblings_list").write_text(siblings + "\n")
    assert processors.cores() == 3  # of CPU 9 nothing is known


def test_what_is_counted_grows_with_work():
    before = processors.taken()
    sum(i * i for i in range(1_000_000))
    since = processors.taken().since(before)
    assert 0 < since.own_s <= 2 * (os.cpu_count() or 1) * max(since.seconds, 0.01) and since.throttled >= 0
    assert 1 <= processors.cores() <= len(processors.affinity())


@pytest.mark.parametrize(("quota", "threads"), [(None, 15), (20.0, 15), (7.5, 6), (2.9, 2), (0.3, 1)])
def test_the_default_number_of_threads_heeds_a_quota(monkeypatch, quota, threads):
    pytest.importorskip("numba", reason="the team runs Numba's functions")
    from refimpl.kernels import team

    monkeypatch.setattr(team, "cores", lambda: 16)
    monkeypatch.setattr(processors, "quota", lambda: quota)
    monkeypatch.setattr(processors, "affinity", lambda: set(range(16)))
    monkeypatch.delenv("NUMBA_NUM_THREADS", raising=False)
    assert team.own_threads() == threads
    monkeypatch.setenv("NUMBA_NUM_THREADS", "16")  # whoever says a number has it
    assert team.own_threads() == 15
