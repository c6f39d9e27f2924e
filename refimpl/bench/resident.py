"""How much more memory a stretch of a program took, from Linux's /proc."""

from __future__ import annotations

from pathlib import Path

PROC = Path("/proc/self")


class Memory:
    """The most resident memory since `start`, in bytes; 0 where the system does not say."""

    def start(self) -> None:
        try:
            (PROC / "clear_refs").write_text(
                "5"
            )  # forget the peak so far; getrusage would count what a parent held before exec
            self.before = self._status("VmRSS")
        except OSError:
            self.before = -1

    def growth(self) -> int:
        return max(0, self._status("VmHWM") - self.before) if self.before >= 0 else 0

    @staticmethod
    def _status(key: str) -> int:
        text = (PROC / "status").read_text()
        return int(text.split(key + ":")[1].split()[0]) * 1024


def resident() -> int:
    """Bytes of this process in memory now, mapped files included; 0 where the system does not say."""
    try:
        return Memory._status("VmRSS")
    except OSError:
        return 0
