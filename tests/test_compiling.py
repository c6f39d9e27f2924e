"""Kernels compiled ahead by several processes."""

import signal
import sys
import threading
import time
from functools import partial

import pytest

import refimpl
from refimpl.devices.cpu import CpuBackend
from refimpl.loading import compiling
from refimpl.loading.compiling import Unit

pytest.importorskip("numba", reason="the cpu backend's kernels are compiled by Numba")
TWO = [[Unit("rms_norm"), Unit("rope")]]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where kernels are kept, empty; what is compiled in this process goes elsewhere."""
    from refimpl.kernels import kept

    monkeypatch.setattr(kept, "folder", lambda: tmp_path)
    monkeypatch.setenv("REFIMPL_CACHE", str(tmp_path))
    return tmp_path


def marks(folder):
    return sorted(folder.glob("ahead-*"))


def test_every_unit_is_compiled_once_and_told(folder, capsys):
    told = []
    compiling.ahead(TWO, lambda *n: told.append(n), 2)
    assert told == [(0, 2), (1, 2), (2, 2)] and len(marks(folder)) == 2
    assert {f.name.split("-")[0] for f in folder.rglob("*.nbi")} >= {
        "attention_numba._rms_norm",
        "attention_numba._rope",
    }
    compiling.ahead(TWO, lambda *n: told.append(n), 2)
    assert len(told) == 3
    marks(folder)[0].unlink()  # a single unit is left to whoever calls it
    compiling.ahead(TWO, lambda *n: told.append(n), 2)
    assert len(told) == 3 and "compiling kernels" not in capsys.readouterr().err


def test_without_a_listener_a_line_on_a_terminal_tells(folder, capfd, monkeypatch):
    compiling.ahead(TWO, processes=2)
    assert "compiling kernels" not in capfd.readouterr().err
    for mark in marks(folder):
        mark.unlink()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    compiling.ahead(TWO, processes=2)
    assert "compiling kernels: 2 of 2" in capfd.readouterr().err


@pytest.mark.parametrize("program", ["raise SystemExit(3)", "import sys; sys.stdin.readline()"])
def test_processes_that_fail_leave_the_work_to_the_caller(program, folder, monkeypatch):
    monkeypatch.setattr(compiling, "PROGRAM", program)
    told = []
    compiling.ahead([TWO[0], TWO[0]], lambda *n: told.append(n), 2)
    assert told == [(0, 4)] and not marks(folder)


def test_ctrl_c_ends_it_at_once(folder, monkeypatch):
    monkeypatch.setattr(compiling, "PROGRAM", "import time; time.sleep(60)")
    press = partial(signal.pthread_kill, threading.main_thread().ident, signal.SIGINT)
    before, start = signal.signal(signal.SIGINT, signal.default_int_handler), time.monotonic()
    try:  # a command that ran in this process may have left a handler of its own
        threading.Timer(1.0, press).start()
        with pytest.raises(KeyboardInterrupt):
            compiling.ahead([TWO[0] * 3], lambda *n: None, 2)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - start < 20


def test_one_process_and_no_units_do_nothing(folder):
    compiling.ahead(TWO, pytest.fail, 1)
    compiling.ahead([[], []], pytest.fail, 2)
    assert not marks(folder)


def test_units_are_those_of_the_weights_as_they_were_loaded(hybrid_folder):
    assert compiling.stages({}, refimpl.load().config, CpuBackend("reference")) == []
    as_in_files = refimpl.load(hybrid_folder, backend="cpu", repack="no")
    first, second = compiling.stages(as_in_files.checkpoint, as_in_files.config, as_in_files.backend)
    ways = {u.kinds[0] for u in first if u.op == "ways"}
    assert {"E4M3", "Q4_K"} <= ways and not any(k.endswith(compiling.BESIDE) for k in ways)
    assert [u.op for u in second] == ["experts"]
    both = compiling.stages(as_in_files.checkpoint, as_in_files.config, as_in_files.backend, repack=True)
    beside = {k + compiling.BESIDE for k in ("Q4_K", "Q6_K")}
    assert {u.kinds[0] for u in both[0] if u.op == "ways"} == ways | beside
    rearranged = refimpl.load(hybrid_folder, backend="cpu", repack="auto")
    kinds = {
        k
        for stage in compiling.stages(rearranged.checkpoint, rearranged.config, rearranged.backend)
        for u in stage
        for k in u.kinds
    }
    assert "Q4_K" + compiling.BESIDE in kinds and "Q4_K" not in kinds


@pytest.mark.parametrize("kind", ["INT4", "E4M3", "Q8_0", "Q5_K", "MXFP4", "F16"])
def test_units_of_any_format_can_be_run(kind):
    for op in ("ways", "linear"):
        compiling.compile_unit(Unit(op, (kind,), compiling.TOKENS))
