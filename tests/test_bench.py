"""The benchmark: what it prints, and that it does not time a wrong result."""

import json
import time

import numpy as np
import pytest

from refimpl import ops
from refimpl.__main__ import entry
from refimpl.bench import __main__, codecs, cpu
from refimpl.cli import run
from refimpl.devices import speed

KEYS = {
    "name",
    "backend",
    "shape",
    "threads",
    "median_s",
    "spread",
    "gbps",
    "gflops",
    "limit_gbps",
    "share_of_limit",
    "peer",
    "peer_median_s",
    "speedup_vs_peer",
}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    pytest.importorskip("numba", reason="the kernels are compiled by Numba")
    monkeypatch.setattr(speed, "REST_S", 0)
    monkeypatch.setattr(cpu, "read_bandwidth", lambda threads: 10.0)


def measure(capsys, *args):
    code = run(__main__.main, ["--shape", "tiny", "--seconds", "0.01", "--json", *args])
    out, err = capsys.readouterr()
    return (json.loads(out) if code == 0 else None), err, code


def test_rows_have_the_promised_keys(capsys):
    rows, err, code = measure(capsys, "experts", "linear", "--tokens", "1", "--tokens", "3", "--threads", "1")
    assert code == 0 and all(r.keys() == KEYS for r in rows)
    assert {r["name"] for r in rows} >= {"experts Q4_K M=1", "experts Q4_K+Q6_K M=3", "linear FP8 M=1"}
    for r in rows:
        assert r["median_s"] > 0 and r["gbps"] > 0 and r["share_of_limit"] == pytest.approx(r["gbps"] / 10)
    assert len(err.splitlines()) == len(rows)


@pytest.mark.parametrize("verb", ["dequantize", "quantize"])
def test_codecs_are_compared_with_numpy(capsys, monkeypatch, verb):
    monkeypatch.setattr(codecs, "LINES", {verb: 4})
    rows, _, _ = measure(capsys, verb, "--threads", "2")
    assert {r["backend"] for r in rows} == {"cpu", "numpy"} and {r["threads"] for r in rows} == {2}
    compiled = [r for r in rows if r["backend"] == "cpu"]
    assert len(compiled) == len([op for op in ops.OPS if op.split(".")[-1] in codecs.VERBS[verb]])
    assert all(
        r["peer"] == "numpy" and r["speedup_vs_peer"] == pytest.approx(r["peer_median_s"] / r["median_s"])
        for r in compiled
    )


@pytest.mark.parametrize("verb", ["dequantize", "quantize"])
def test_codecs_are_compared_with_their_peers(capsys, monkeypatch, verb):
    pytest.importorskip("llama_cpp", reason="needs ggml: the extra `peers`")
    monkeypatch.setattr(codecs, "LINES", {verb: 4})
    rows, _, _ = measure(capsys, verb, "--peers")
    who = {
        name: {r["backend"] for r in rows if r["name"] == f"{verb} {name}"}
        for name in ("Q4_0", "Q4_K", "E4M3")
    }
    assert who["Q4_0"] == {"cpu", "numpy", "ggml", "gguf-py"} and who["E4M3"] == {"cpu", "numpy", "torch"}
    assert who["Q4_K"] == who["Q4_0"] - ({"gguf-py"} if verb == "quantize" else set())


def test_a_wrong_result_is_not_timed(capsys, monkeypatch):
    right = ops.load
    monkeypatch.setattr(
        ops, "load", lambda name, backend: lambda *a: right(name, backend)(*a) * np.float32(1.1)
    )
    rows, err, code = measure(capsys, "experts", "--tokens", "1", "--threads", "1")
    assert (
        code == 1 and rows is None and "E5130 experts Q4_K M=1 cpu: the result is not the reference's" in err
    )


def test_ggml_computes_the_same(capsys):
    pytest.importorskip("llama_cpp", reason="needs ggml: the extra `peers`")
    rows, _, code = measure(capsys, "experts", "--tokens", "2", "--threads", "1", "--peers")
    assert code == 0 and {r["backend"] for r in rows} == {"cpu", "ggml plain", "ggml 8x8"}
    assert all(r["peer"] for r in rows if r["backend"] == "cpu")


def test_unknown_names_are_usage_errors():
    with pytest.raises(SystemExit, match="2"):
        run(__main__.main, ["nothing"])


@pytest.mark.parametrize("name", __main__.ALONE)
def test_each_command_has_its_own_help_in_both_spellings(capsys, name):
    for spelling in {name, name.replace("-", "_")}:
        with pytest.raises(SystemExit, match="0"):
            run(__main__.main, [spelling, "--help"])
        assert f"python -m refimpl.bench {name} " in capsys.readouterr().out


def test_commands_that_stand_alone_do_not_combine(capsys):
    with pytest.raises(SystemExit, match="2"):
        run(__main__.main, ["experts", "formats"])
    assert "unrecognized arguments: experts" in capsys.readouterr().err


def test_the_console_script_is_the_same_command(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["refimpl", "bench", "formats", "--type", "Q8_0", "--json"])
    assert entry() == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["type"] == "Q8_0" and 0 < row["gaussian"] < 0.01


# --- the clock ----------------------------------------------------------------------------------------------


def test_contenders_take_turns_and_short_calls_are_repeated(monkeypatch):
    monkeypatch.setattr(speed, "WARM_S", 0)
    calls = []
    jobs = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = speed.race(jobs, 0.0, rounds=3)
    assert {k: len(t) for k, t in times.items()} == {"a": 3, "b": 3}
    turns = "".join(k for k, last in zip(calls, [None, *calls]) if k != last)
    assert turns == "ab" * 4 and len(calls) > 2 * (2 + 3)  # two calls of each before, then three turns


def test_the_clock_tells_a_sleep():
    assert 0.02 <= speed.median(lambda: time.sleep(0.02), 0.0) < 0.2
