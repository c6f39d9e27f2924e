"""The benchmark: what it prints, and that it does not time a wrong result."""

import json
import time
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest

from refimpl import formats, ops
from refimpl.__main__ import entry
from refimpl.bench import __main__, codecs, cpu, random_model, system, watch
from refimpl.checkpoint import names
from refimpl.checkpoint.folder import Checkpoint
from refimpl.cli import run
from refimpl.devices import speed
from refimpl.errors import RefimplError
from refimpl.loading import interleaving
from refimpl.reference import packed

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
    lines = [line for line in err.splitlines() if not line.startswith("refimpl: compiling")]
    assert len(lines) == len(rows)


@pytest.mark.parametrize("verb", ["dequantize", "quantize"])
def test_codecs_are_compared_with_numpy(capsys, monkeypatch, verb):
    monkeypatch.setattr(codecs, "LINES", {verb: 4})
    rows, _, _ = measure(capsys, verb, "--threads", "2")
    assert {r["backend"] for r in rows} == {"cpu", "numpy"} and {r["threads"] for r in rows} == {2}
    compiled = [r for r in rows if r["backend"] == "cpu"]
    fast = [
        key for key, op in ops.OPS.items() if key.split(".")[-1] in codecs.VERBS[verb] and "cpu" in op.fast
    ]
    assert len(compiled) == len(fast)
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

    def load(name, backend):
        function = right(name, backend)
        return (lambda *a: function(*a) * np.float32(1.1)) if name == "experts" else function

    monkeypatch.setattr(ops, "load", load)
    rows, err, code = measure(capsys, "experts", "--tokens", "1", "--threads", "1")
    assert (
        code == 1 and rows is None and "E5130 experts Q4_K M=1 cpu: the result is not the reference's" in err
    )


def test_ggml_computes_the_same(capsys):
    pytest.importorskip("llama_cpp", reason="needs ggml: the extra `peers`")
    rows, _, code = measure(capsys, "experts", "--tokens", "2", "--threads", "1", "--peers")
    assert code == 0 and {r["backend"] for r in rows} == {"cpu", "cpu interleaved", "ggml plain", "ggml 8x8"}
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


# --- the whole system with random weights -------------------------------------------------------------------


SMALL = ("--config", "tiny", "--layers", "2", "--experts", "4", "--vocabulary", "300")


def whole(capsys, *args):
    code = run(__main__.main, ["system", *SMALL, "--context", "40", "--tokens", "20", *args, "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    return json.loads(out)


@pytest.fixture
def slow_memory(monkeypatch):
    """Measuring half a gigabyte takes a second or two."""
    monkeypatch.setattr(speed, "read_bandwidth", lambda threads: 10.0)
    monkeypatch.setattr(speed, "Reading", lambda threads: SimpleNamespace(gbps=lambda: 5.0))


def test_the_system_is_measured_beside_the_plan(capsys, slow_memory):
    report = whole(capsys, "--backend", "cpu", "--threads", "1", "--threads", "2")
    assert (report["weights"], report["layers"], report["layers_full"]) == ("random", 2, 4)
    rows = {(r["what"], r["at"], r["threads"]): r for r in report["rows"]}
    assert {(what, at) for what, at, _ in rows} == {
        ("loading", None),
        ("rearranging", None),
        ("first token", 8),
        ("decode", 40),
        ("prefill", 20),
        ("RAM", None),
    }
    one, two = rows["decode", 40, 1], rows["decode", 40, 2]
    assert one["unit"] == "tokens/s" and one["predicted"] > 0 and two["predicted"] >= one["predicted"]
    assert one["reading"] == 5.0 and rows["prefill", 20, 1]["reading"] is None  # as memory is at that moment
    for r in (one, two, rows["prefill", 20, 1]):
        assert r["measured"] > 0 and r["share"] == pytest.approx(r["measured"] / r["predicted"])
        assert r["extrapolated"] == pytest.approx(r["share"] * r["predicted_full"])
        assert r["predicted_full"] < r["predicted"]  # of four layers
    copied = report["repack"]["nbytes"]
    assert report["repack"] == {"choice": "auto", "nbytes": copied, "kept": False} and copied > 0
    assert rows["rearranging", None, 1]["measured"] <= rows["loading", None, 1]["measured"]
    for apart in report["breakdown"].values():
        assert {"experts", "attention", "dense MLP", "shared expert", "rest"} == set(apart["parts"])
        assert sum(apart["parts"].values()) == pytest.approx(apart["ms"])
        assert all(ms > 0 for ms in apart["parts"].values())


def test_decoding_against_context_is_drawn(capsys, slow_memory, tmp_path):
    pytest.importorskip("matplotlib", reason="draws")
    picture = tmp_path / "contexts.svg"
    whole(capsys, "--backend", "cpu", "--threads", "2", "--context", "90", "--draw", str(picture))
    text = picture.read_text()
    assert text.startswith("<?xml") and "<!-- tokens of context -->" in text
    assert run(__main__.main, ["system", "--draw", str(picture)]) == 1  # before anything is measured
    assert picture.read_text() == text


def test_experts_lie_as_repack_says_and_are_planned_so(capsys, slow_memory, monkeypatch, tmp_path):
    monkeypatch.setenv("REFIMPL_CACHE", str(tmp_path / "cache"))
    asked, rates = [], speed.expert_rates

    def expert_rates(*args):
        asked.append(args[-1])
        return rates(*args)

    monkeypatch.setattr(speed, "expert_rates", expert_rates)

    def measured(choice):
        report = whole(capsys, "--backend", "cpu", "--threads", "1", "--repack", choice, "--folder", folder)
        found = {r["what"]: r for r in report["rows"]}
        return report["repack"] | {"choice": choice}, found["RAM"]["predicted"], "rearranging" in found

    folder = str(tmp_path / "model")
    (no, plain, _), (auto, with_copy, timed) = measured("no"), measured("auto")
    assert no == {"choice": "no", "nbytes": 0, "kept": False} and auto["nbytes"] == with_copy - plain > 0
    assert timed and asked == [False, True]
    (made, _, _), (kept, mapped, timed) = measured("yes"), measured("auto")
    assert made["nbytes"] == auto["nbytes"] and kept == {"choice": "auto", "nbytes": 0, "kept": True}
    assert mapped == plain and not timed and asked == [False, True, True, True]
    for report in (no, made, kept):
        assert report["choice"] in system._order(**report) or report["kept"]


def test_a_kept_copy_of_files_that_go_is_refused():
    with pytest.raises(SystemExit, match="2"):
        run(__main__.main, ["system", "--repack", "yes"])


def test_the_breakdown_of_the_cuda_backend_adds_up(capsys, slow_memory, monkeypatch):
    """On CPU tensors, where no driver keeps a record."""
    pytest.importorskip("torch", reason="the cuda backend is torch's: the extra `gpu`")
    monkeypatch.setenv("REFIMPL_CUDA_DEVICE", "cpu")
    report = whole(capsys, "--backend", "cuda", "--threads", "1")
    for apart in report["breakdown"].values():
        assert set(apart["parts"]) == {"experts", "GPU, transfers and Python", "waiting"}
        assert sum(apart["parts"].values()) == pytest.approx(apart["ms"]) and apart["parts"]["experts"] > 0


def test_a_gpu_s_record_is_split_into_kernels_and_transfers(monkeypatch):
    torch = pytest.importorskip("torch", reason="the record is torch's: the extra `gpu`")
    from torch.autograd import DeviceType

    def event(name, us, device=DeviceType.CUDA):
        return SimpleNamespace(
            name=name, device_type=device, time_range=SimpleNamespace(elapsed_us=lambda: us)
        )

    events = [
        event("Memcpy HtoD (Pinned -> Device)", 2),
        event("Memcpy DtoH (Device -> Pinned)", 3),
        event("Memcpy DtoD", 4),
        event("gemm", 5),
        event("aten::mm", 100, DeviceType.CPU),
    ]
    monkeypatch.setattr(
        torch.profiler, "profile", lambda **k: nullcontext(SimpleNamespace(events=lambda: events))
    )
    found = watch.gpu_seconds(lambda: None)
    assert found == {"GPU": pytest.approx(9e-6), "transfers": pytest.approx(5e-6)}
    events.clear()
    assert watch.gpu_seconds(lambda: None) is None


def test_random_folders_are_whole_and_used_again(tmp_path, capsys):
    raw = random_model.smaller(random_model.config("tiny"), 3, experts=4, vocabulary=300)
    told = []
    random_model.write(raw, tmp_path, told.append)
    assert sum(told) >= random_model.nbytes(raw)
    checkpoint = Checkpoint.open(tmp_path)
    assert set(checkpoint) == {names.to_gguf(n) for n in random_model.inventory(raw).tensors}
    gate = checkpoint["blk.1.ffn_gate_exps.weight"]
    assert formats.type_name(gate.ggml_type) == "Q4_K" and gate.shape == (4, 256, 256)
    values = packed.dense(gate)
    assert np.isfinite(values).all() and values.std() == pytest.approx(0.02, rel=0.1)
    assert not np.array_equal(values, packed.dense(checkpoint["blk.1.ffn_up_exps.weight"]))
    assert packed.dense(checkpoint["blk.0.ffn_up.weight"]).std() == pytest.approx(0.02, rel=0.1)
    files = {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    random_model.write(raw, tmp_path, told.append)
    assert files == {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    random_model.write(random_model.smaller(raw, 2), tmp_path, told.append)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3 and Checkpoint.open(tmp_path)


def test_as_many_layers_as_fit(tmp_path, monkeypatch):
    raw = random_model.config("deepseek-v3")
    args = system._arguments(["--backend", "cpu"])
    monkeypatch.setattr(system, "_in_memory", lambda folder: False)
    monkeypatch.setattr(system.memory, "free_memory", lambda: {"cpu": 100 * 10**9})
    monkeypatch.setattr(system.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10**12))
    found = system.fitting(args, raw, tmp_path)
    layers = found["num_hidden_layers"]
    assert random_model.nbytes(found) <= 85e9 < random_model.nbytes(random_model.smaller(raw, layers + 1))
    assert 12 <= layers <= 16 and found["first_k_dense_replace"] == 3
    # Beside files in memory, the copy of experts must have room too.
    monkeypatch.setattr(system, "_in_memory", lambda folder: True)
    monkeypatch.setattr(interleaving, "SECONDS", 10**6)
    fewer = system.fitting(args, raw, tmp_path)
    copy = interleaving.cost_of(random_model.inventory(fewer)).nbytes
    assert fewer["num_hidden_layers"] < layers and random_model.nbytes(fewer) + copy <= 85e9
    args.repack = "no"
    assert system.fitting(args, raw, tmp_path) == found
    monkeypatch.setattr(system.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10**9))
    with pytest.raises(RefimplError, match="E5102"):
        system.fitting(args, raw, tmp_path)


def test_an_unknown_config_and_too_few_layers_are_refused(capsys):
    assert run(__main__.main, ["system", "--config", "../tiny"]) == 1
    assert "E7021 ../tiny" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        run(__main__.main, ["system", "--layers", "1"])


def test_attention_is_measured_beside_the_reference(capsys, monkeypatch):
    from refimpl.bench import attention

    monkeypatch.setattr(attention, "HEADS", 4)
    monkeypatch.setattr(attention, "PAIRS", 40)
    flags = ["--tokens", "1", "--tokens", "3", "--context", "20", "--threads", "1", "--seconds", "0.01"]
    code = run(__main__.main, ["attention", *flags, "--json"])
    out, err = capsys.readouterr()
    rows = json.loads(out)
    assert code == 0 and all(r.keys() == KEYS for r in rows) and len(err.splitlines()) == len(rows) == 3
    told = [(r["name"], r["backend"]) for r in rows]
    assert told[:2] == [("attention M=1 S=21", "cpu"), ("attention M=1 S=21", "reference")]
    assert told[2:] == [("attention M=3 S=23", "cpu")]  # the reference would take long
    monkeypatch.setattr("refimpl.kernels.attention_numba.attend", lambda q, *rest: q[..., ::-1])
    assert run(__main__.main, ["attention", *flags]) == 1 and "E5130" in capsys.readouterr().err


def test_the_team_is_measured_beside_prange(capsys, monkeypatch):
    from refimpl.bench import team

    monkeypatch.setattr(team, "QUIET_S", 0)
    code = run(__main__.main, ["team", "--threads", "2", "--mb", "1", "--seconds", "0.01", "--json"])
    out, err = capsys.readouterr()
    rows = json.loads(out)
    assert code == 0 and all(r.keys() == KEYS for r in rows) and len(err.splitlines()) == len(rows)
    assert [(r["name"], r["backend"]) for r in rows] == [
        (name, backend) for name in ("read", "region", "region after 0.7 ms") for backend in ("cpu", "prange")
    ]
    assert all(r["speedup_vs_peer"] > 0 for r in rows if r["backend"] == "cpu")
