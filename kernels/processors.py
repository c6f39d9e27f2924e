"""Which CPUs this process has, and what it is kept from having of them: its affinity, threads of one core, a
quota of its control group (cgroups, versions 1 and 2), and time that the host of a virtual machine takes.

Only Linux says all of it; elsewhere a quota is None, and what is counted stays 0.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

GROUPS, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
TOPOLOGY, STAT = Path("/sys/devices/system/cpu"), Path("/proc/stat")


def affinity() -> set[int]:
    """The CPUs this process may run on; a hyperthread counts as one."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def cores() -> int:
    """How many of those CPUs are cores of their own: threads of one core count once."""
    return len({_siblings(cpu) for cpu in affinity()})


def _siblings(cpu: int) -> str:
    with suppress(OSError):
        return (TOPOLOGY / f"cpu{cpu}/topology/thread_siblings_list").read_text()
    return str(cpu)


def usable() -> int:
    """CPUs that this process may use at a time, a quota's fractions left out; at least one."""
    cpus, limit = len(affinity()), quota()
    return cpus if limit is None else max(1, min(cpus, int(limit)))


def quota() -> float | None:
    """CPUs' worth of time that the control group, or one above it, allows in a period; None for no limit."""
    found = [limit for group in _groups() if (limit := _limit(group)) is not None]
    return min(found, default=None)


def _groups() -> Iterator[Path]:
    """Folders of this process's group that counts CPU time and of those above it, the own one first."""
    for line in _text(OWN).splitlines():
        _, controllers, path = line.split(":", 2)
        bases = [GROUPS, GROUPS / "unified"] if not controllers else []
        if "cpu" in controllers.split(","):
            bases = [GROUPS / controllers, GROUPS / "cpu"]
        for base in filter(Path.is_dir, bases):
            own = base / path.strip("/")
            # In a container the path may be one of the host's, which is not there: the base is the group.
            yield from (p for p in (own, *own.parents) if p.is_relative_to(base) and p.is_dir())


def _limit(group: Path) -> float | None:
    # "max 100000" or "750000 100000", microseconds of a period; version 1 has two files, and -1 for none.
    words = _text(group / "cpu.max").split()
    if not words:
        words = [*_text(group / "cpu.cfs_quota_us").split(), *_text(group / "cpu.cfs_period_us").split()]
    if len(words) == 2 and words[0] not in ("max", "-1") and float(words[1]) > 0:
        return float(words[0]) / float(words[1])
    return None


def _text(path: Path) -> str:
    with suppress(OSError):
        return path.read_text()
    return ""


class Taken(NamedTuple):
    """Counted since some time in the past; two of them tell what happened in between, by `since`."""

    seconds: float
    own_s: float  # CPU time of this process
    throttled: int  # periods in which the group had used up its quota
    throttled_s: float  # that its CPUs stood still for
    steal_s: float  # of all CPUs, that the host gave to others
    switches: int  # times a thread of this process lost its CPU to another

    def since(self, before: Taken) -> Taken:
        """What was counted from `before` to here."""
        return Taken._make(b - a for a, b in zip(before, self))


def taken() -> Taken:
    """The counters now."""
    stat: dict[str, float] = {}
    for group in _groups():
        for line in _text(group / "cpu.stat").splitlines():
            name, _, value = line.partition(" ")
            stat[name] = max(stat.get(name, 0.0), float(value))
    throttled_s = stat.get("throttled_usec", 0.0) / 1e6 + stat.get("throttled_time", 0.0) / 1e9
    of_all = _text(STAT).partition("\n")[0].split()  # cpu user nice system idle iowait irq softirq steal ...
    steal_s = float(of_all[8]) / os.sysconf("SC_CLK_TCK") if len(of_all) > 8 else 0.0
    throttled = int(stat.get("nr_throttled", 0))
    return Taken(time.perf_counter(), time.process_time(), throttled, throttled_s, steal_s, _switches())


def _switches() -> int:
    try:
        import resource  # not on Windows
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
