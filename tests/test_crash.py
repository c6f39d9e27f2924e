"""A merge that is interrupted by hand, or whose output nobody reads; what is killed, fails and races at
random is in tests/campaigns/crash.py.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import threading

import pytest

from refimpl import convert_model
from refimpl.bench import merge
from refimpl.cli import run
from refimpl.errors import ResourceError
from refimpl.merge import write
from refimpl.tiny import FP8_DIR, GGUF_DIR


def command(output) -> str:
    return shlex.join([sys.executable, "-m", "refimpl.convert_model", "--json", *_paths(output)])


def _paths(output) -> list[str]:
    return ["--safetensor_path", str(FP8_DIR), "--gguf_path", str(GGUF_DIR), "--output_path", str(output)]


@pytest.mark.parametrize("stdout", [">&-", "> /dev/full", "| true", "2>&-"])
def test_an_output_that_nobody_reads_is_no_traceback(tmp_path, stdout):
    if "full" in stdout and not os.path.exists("/dev/full"):
        pytest.skip("this system has no device that is always full")
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        f"{command(tmp_path / 'out')} {stdout}", shell=True, env=env, capture_output=True, text=True
    )
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr
    assert done.returncode == ("full" in stdout)
    assert not done.returncode or "ENOSPC" in done.stderr.splitlines()[-1]
    assert convert_model.verify(tmp_path / "out") == 107
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_interrupting_by_hand_stops_the_workers_and_keeps_what_is_finished(tmp_path, monkeypatch, capsys):
    plain = convert_model.plan(FP8_DIR, GGUF_DIR)
    seen = 0

    def interrupt(n):
        nonlocal seen
        seen += n
        if seen > plain.nbytes // 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(convert_model, "Progress", lambda *args: _Interrupting(interrupt))
    assert run(convert_model.main, _paths(tmp_path / "out")) == 130
    assert capsys.readouterr().err.endswith("refimpl: interrupted\n")
    assert not [
        t
        for t in threading.enumerate()
        if t is not threading.main_thread() and t.name.startswith("ThreadPool")
    ]
    assert not list(tmp_path.rglob(".*.part")) and not (tmp_path / "out").exists()
    convert_model.write(plain, tmp_path / "out")
    assert convert_model.verify(tmp_path / "out") == 107
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


class _Interrupting:
    def __init__(self, call):
        self.call = call

    def __enter__(self):
        return self.call

    def __exit__(self, *exc):
        pass


def test_everything_is_synced_before_the_folder_gets_its_name(tmp_path, monkeypatch):
    """After a power cut a name may be there whose bytes are not, unless they were synced first."""
    acts: list[tuple[int, str, str]] = []
    me = threading.get_ident
    fsync, replace, rename = os.fsync, os.replace, os.rename

    def name_of(fd):
        return os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))

    if not os.path.exists("/proc/self/fd"):
        pytest.skip("names of open files are read from Linux's /proc")
    monkeypatch.setattr(os, "fsync", lambda fd: (acts.append((me(), "sync", name_of(fd))), fsync(fd)))
    monkeypatch.setattr(
        os, "replace", lambda a, b: (acts.append((me(), "name", os.path.basename(b))), replace(a, b))
    )
    monkeypatch.setattr(
        os, "rename", lambda a, b: (acts.append((me(), "rename", os.path.basename(b))), rename(a, b))
    )
    convert_model.write(convert_model.plan(FP8_DIR, GGUF_DIR), tmp_path / "out")
    at = acts.index((me(), "rename", "out"))
    assert {name for _, act, name in acts[:at] if act == "name"} >= {
        p.name for p in (tmp_path / "out").iterdir()
    }
    assert not [name for _, act, name in acts[at:] if act == "name"]
    for thread in {t for t, _, _ in acts}:
        mine = [(act, name) for t, act, name in acts if t == thread]
        for k in (k for k, (act, _) in enumerate(mine) if act == "name"):
            assert mine[k - 1][0] == "sync" and mine[k - 1][1].startswith(
                f".{mine[k][1]}."
            )  # the bytes before the name
            assert mine[k + 1][0] == "sync"  # the name in its folder
    assert acts[at + 1] == (me(), "sync", tmp_path.name)


def test_merges_to_two_outputs_do_not_meet(tmp_path):
    p = convert_model.plan(FP8_DIR, GGUF_DIR)
    threads = [threading.Thread(target=convert_model.write, args=(p, tmp_path / name)) for name in ("a", "b")]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert {f.name: f.read_bytes() for f in (tmp_path / "a").iterdir()} == {
        f.name: f.read_bytes() for f in (tmp_path / "b").iterdir()
    }
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a", "b"]


def test_a_machine_without_room_for_threads_is_a_lack_of_memory(tmp_path, monkeypatch, capsys):
    def no_thread(*args, **kwargs):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(write.ThreadPoolExecutor, "submit", no_thread)
    assert run(convert_model.main, _paths(tmp_path / "out")) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("refimpl: E5001 ")


def test_a_result_that_has_its_name_needs_tidying_only(tmp_path, monkeypatch):
    """Killed between the rename and the end."""
    p = convert_model.plan(FP8_DIR, GGUF_DIR)
    monkeypatch.setattr(write, "_remove", lambda stage: None)
    convert_model.write(p, tmp_path / "out")
    assert (tmp_path / ".out.merging").exists()
    monkeypatch.undo()
    told: list[int] = []
    convert_model.write(p, tmp_path / "out", told.append)
    assert told == [p.nbytes] and [f.name for f in tmp_path.iterdir()] == ["out"]
    with pytest.raises(ResourceError, match="E5101"):
        convert_model.write(p, tmp_path / "out")


def test_the_benchmark_merges_and_copies_the_same_bytes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(merge, "HIDDEN", 256)
    monkeypatch.setattr(merge, "NARROW", 256)
    assert (
        run(merge.main, ["--gigabytes", "0.001", "--rounds", "3", "--folder", str(tmp_path), "--json"]) == 0
    )
    report = json.loads(capsys.readouterr().out)
    assert (
        set(report["seconds"]) == {"merge", "copy, synced", "copy, unsynced"} and report["nbytes"] > 1_000_000
    )
    assert report["memory"] < 64 << 20
    assert not list(tmp_path.iterdir())
