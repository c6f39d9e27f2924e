"""Kernels compiled ahead by several processes."""

import os
import signal
import sys
import threading
import time
from contextlib import nullcontext, suppress
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
        "norm_rope_numba._rms_norm",
        "norm_rope_numba._rope",
    }
    compiling.ahead(TWO, lambda *n: told.append(n), 2)
    assert len(told) == 3
    marks(folder)[0].unlink()  # a single unit is left to whoever calls it
    compiling.ahead(TWO, lambda *n: told.append(n), 2)
    assert len(told) == 3 and "compiling kernels" not in capsys.readouterr().err


def test_processes_that_are_not_forks_do_the_same(folder, monkeypatch):
    monkeypatch.setattr(compiling, "FORKS", False)
    told = []
    compiling.ahead(TWO, lambda *n: told.append(n), 2)
    assert told == [(0, 2), (1, 2), (2, 2)] and len(marks(folder)) == 2


@pytest.mark.skipif(not compiling.FORKS, reason="there are no forks here")
@pytest.mark.parametrize("stopped", [False, True])
def test_forks_end_with_their_leader(folder, stopped):
    with suppress(KeyboardInterrupt), compiling._Children(3) as children:
        leader = children.started[0]
        assert len(children.started) == 1 and len(children.all) == 3
        assert [children.compile(unit) for unit in TWO[0]] == TWO[0]
        # The one that has done nothing yet fails, and the others go on.
        idle = children.idle.get()
        idle.stdin.write("no unit\n")
        idle.stdin.flush()
        assert idle.stdout.readline() == ""
        assert children.compile(Unit("rope")) == Unit("rope")
        if stopped:
            raise KeyboardInterrupt
    assert leader.returncode == 0
    with pytest.raises(ProcessLookupError):
        os.killpg(leader.pid, 0)


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


def test_processes_start_before_numba_where_nothing_was_compiled_yet(folder, monkeypatch):
    started = []
    monkeypatch.setattr(compiling, "_Children", lambda count: started.append(count) or nullcontext())
    from refimpl.kernels import kept

    monkeypatch.setattr(kept, "folder", lambda: started.append("folder"))  # None: no kernel can be kept
    compiling.ahead(TWO, processes=2)
    assert started == [2, "folder"]
    (folder / "numba-0" / "ahead-0").parent.mkdir()
    (folder / "numba-0" / "ahead-0").touch()
    compiling.ahead(TWO, processes=2)
    assert started == [2, "folder", "folder"]


def test_one_process_and_no_units_do_nothing(folder):
    compiling.ahead(TWO, pytest.fail, 1)
    compiling.ahead([[], []], pytest.fail, 2)
    assert not marks(folder)


def test_units_are_those_of_the_weights_as_they_were_loaded(hybrid_folder):
    assert compiling.stages({}, refimpl.load().config, CpuBackend("reference")) == []
    as_in_files = refimpl.load(hybrid_folder, backend="cpu", repack="no")
    first, second = compiling.stages(as_in_files.checkpoint, as_in_files.config, as_in_files.backend)
    ways = {u.kinds[0] for u in first if u.op == "way"}
    assert {"E4M3", "F32", "Q4_K"} <= ways and not any(k.endswith(compiling.BESIDE) for k in ways)
    assert [u.op for u in second] == ["experts", "latents"]
    both = compiling.stages(as_in_files.checkpoint, as_in_files.config, as_in_files.backend, repack=True)
    beside = {k + compiling.BESIDE for k in ("Q4_K", "Q6_K")}
    assert {u.kinds[0] for u in both[0] if u.op == "way"} == ways | beside
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
    for op, *rest in (("way", "few"), ("way", "many"), ("quantizer",), ("linear",)):
        compiling.compile_unit(Unit(op, (kind, *rest), compiling.TOKENS))


def test_parts_are_those_that_attention_and_experts_compile(folder):
    """Whoever calls the whole finds them on the disk: an index of each is there before, and none is added."""
    parts = [Unit("attention part", (p,)) for p in compiling.LATENT_PARTS]
    parts += [Unit("experts part", (p,)) for p in compiling.EXPERT_PARTS]
    compiling.ahead([parts], lambda *n: None, 2)
    forms = {f.name: f.stat().st_mtime_ns for f in folder.rglob("*.nbi")}
    used = ("_plan", "_silu_pieces", "_weighted_pieces", "_weighted_sum", "_attend", "_turn_out", "_turn_in_")
    mine = {name: [form for form in forms if f".{name}" in form] for name in (*used, "_fill_panels")}
    assert all(mine.values()), mine
    experts = Unit("experts", ("Q8_0", "Q8_0", "Q8_0"), compiling.TOKENS)
    compiling.ahead([[experts, Unit("latents")]], lambda *n: None, 2)
    after = {f.name: f.stat().st_mtime_ns for f in folder.rglob("*.nbi")}
    assert [form for found in mine.values() for form in found if after[form] != forms[form]] == []
