"""The arithmetic against published figures, and against the bytes of a real folder."""

import json
import subprocess
import sys

import pytest

from refimpl import arithmetic
from refimpl.checkpoint.folder import Checkpoint
from refimpl.config import DeepSeekConfig
from refimpl.tiny import FP8_DIR, GGUF_DIR

V3 = DeepSeekConfig()


def test_deepseek_v3_has_its_published_sizes():
    everything = arithmetic.total(arithmetic.components(V3))
    assert (
        round(everything.parameters / 1e9) == 671 and round(everything.token_parameters / 1e9) == 37
    )  # "671B, 37B activated"
    shown = {
        k.strip() if k.strip() != "of it used" else k: round(n / 1e9, 1)
        for k, n in arithmetic.files(V3).items()
    }
    assert shown == {
        "FP8 checkpoint": 688.6,
        "of it used": 19.1,
        "GGUF Q4_K_M": 404.4,
        "of it used ": 394.0,
        "hybrid folder": 413.1,
    }
    assert arithmetic.cache_bytes(V3, 1) == 70_272
    assert arithmetic.expanded_cache_bytes(V3, 1) / arithmetic.cache_bytes(V3, 1) == pytest.approx(
        128 * 320 / 576
    )
    experts = next(p for p in arithmetic.components(V3) if p.name == "routed experts")
    assert round(experts.token_bytes / 1e9, 1) == 12.3
    assert arithmetic.decode_seconds(V3, 1e30, 250e9)[1] == pytest.approx(1 / 20.3, rel=0.01)


def test_the_linears_are_those_of_the_network():
    found = {
        name.split(".")[-1]: (n, k)
        for name, (n, k, _) in arithmetic.linears(V3).items()
        if "self_attn" in name
    }
    assert found == {
        "q_a_proj": (1536, 7168),
        "q_b_proj": (24576, 1536),
        "kv_a_proj_with_mqa": (576, 7168),
        "kv_b_proj": (32768, 512),
        "o_proj": (7168, 16384),
    }
    assert (
        arithmetic.linears(V3)["self_attn.kv_a_proj_with_mqa"][2] == 576 * 7168 + 4 * 5 * 56
    )  # 576 rows are four tiles and a half
    assert len(arithmetic.linears(V3)) == 11


def test_a_real_folder_has_the_bytes_that_were_computed(hybrid_folder):
    c = DeepSeekConfig.from_dict(json.loads((FP8_DIR / "config.json").read_text()))
    tensors = Checkpoint.open(hybrid_folder).tensors
    parts = {p.name: p for p in arithmetic.components(c)}
    assert (
        sum(t.nbytes for t in tensors.values() if not t.name.endswith(".ggml_type"))
        == arithmetic.total([*parts.values()]).nbytes
    )
    assert (
        sum(t.nbytes for n, t in tensors.items() if "_exps" in n and t.dtype == "U8")
        == parts["routed experts"].nbytes
    )
    # Q4_K_M of a pure GGUF differs where llama.cpp stores kv_b in two halves; the experts are the same bytes.
    gguf = Checkpoint.open(GGUF_DIR).tensors
    assert sum(t.nbytes for n, t in gguf.items() if "_exps" in n) == parts["routed experts"].nbytes


def test_ridge_and_context():
    assert arithmetic.ridge(flops=200e12, bandwidth=1e12, bytes_per_weight=1) == 100
    assert arithmetic.attention_flops(V3, 100) == 61 * 128 * 100 * (2 * 576 + 2 * 512)
    at = [sum(arithmetic.decode_seconds(V3, 1e12, 1e11, context)) for context in (0, 1000, 2000)]
    assert at[2] - at[1] == pytest.approx(at[1] - at[0]) == pytest.approx(70_272 * 1000 / 1e12)


def run(*argv: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "refimpl.arithmetic", *argv], capture_output=True, text=True, timeout=120
    )


def test_the_command():
    shown = run("token", "decode", "--json", "--cpu", "250")
    tables = json.loads(shown.stdout)
    assert set(tables) == {"token", "decode"} and len(tables["decode"]) == 1
    assert tables["token"][-1]["bytes"] == sum(row["bytes"] for row in tables["token"][:-1])
    assert run("nothing").returncode == 2 and run("--mix", "IQ1_S").returncode == 2
    small = run("parameters", "--model_path", str(FP8_DIR))
    assert small.returncode == 0 and small.stdout.splitlines()[-1].split()[:3] == ["total", "7.301", "M"]
