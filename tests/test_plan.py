"""The memory plan against what is really held, against DeepSeek-V3's known figures, and against machines too
small for it.
"""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import refimpl
from refimpl import arithmetic, plan, warmup
from refimpl.cache import MOST_ON_CPU, MOST_PREFILL, PREFILL, capacity
from refimpl.checkpoint.folder import Checkpoint
from refimpl.devices import cuda, memory, placement, speed
from refimpl.errors import ResourceError, UnsupportedError
from refimpl.loading import interleaving
from refimpl.model import Model
from refimpl.tensors import ScaledFP8
from refimpl.tiny import FP8_DIR, GGUF_DIR

torch = pytest.importorskip("torch", reason="the cuda backend is torch's: the extra `gpu`")
V3 = memory.Inventory.builtin("deepseek-v3")


@pytest.fixture(autouse=True)
def on_cpu_tensors(monkeypatch):
    monkeypatch.setenv("REFIMPL_CUDA_DEVICE", "cpu")


def by_name(found, device="cuda:0"):
    return {p.name: p.nbytes for p in found if p.device == device}


def test_deepseek_v3_takes_at_most_19_gb_of_vram_at_8192_tokens():
    found = memory.items(V3, placement.experts_on_cpu, 8192)
    vram, ram = by_name(found), by_name(found, "cpu")
    assert memory.totals(found)["cuda:0"] == sum(vram.values()) <= 19e9 + 0.05e9
    assert sum(vram.values()) - vram["workspace"] <= 18.9e9  # what is there before the first prompt
    kv_b = 61 * 32768 * 512
    fp8 = vram["attention"] + vram["shared expert"] + vram["dense MLP"] + kv_b * (1 + 4 / 128**2)
    assert fp8 == pytest.approx(
        15.16e9, abs=0.01e9
    )  # the FP8 part of the checkpoint, kv_b in it as it is stored
    assert vram["kv_b"] - kv_b == pytest.approx(1.02e9, abs=0.01e9)  # what bfloat16 adds
    assert vram["head"] == 2 * 129280 * 7168 and vram["router"] == 58 * (2 * 256 * 7168 + 4 * 256)
    assert vram["latent cache"] == 61 * 8192 * 576 * 2
    assert (
        ram["routed experts"] == pytest.approx(393.98e9, abs=0.01e9) and ram["embedding"] == 2 * 129280 * 7168
    )
    assert set(vram) == {
        "kv_b",
        "attention",
        "shared expert",
        "router",
        "dense MLP",
        "norms",
        "head",
        "latent cache",
        "workspace",
    }


def test_a_token_reads_what_is_known_to_be_read():
    found = memory.items(V3, placement.experts_on_cpu, 0)
    touched = {p.name: p.bytes_per_token for p in found}
    assert touched["routed experts"] == pytest.approx(12.3e9, abs=0.05e9)
    seconds = plan.decode_seconds(found, {"cpu": 250.0, "cuda": 1000.0})
    on_gpu = sum(p.bytes_per_token for p in found if p.device == "cuda:0")
    by_hand = (
        touched["routed experts"] / 250e9
        + touched["embedding"] / 250e9
        + (on_gpu - touched["shared expert"]) / 1000e9
    )
    assert seconds == pytest.approx(by_hand)


@pytest.mark.parametrize("activations", ["fp8", "exact"])
@pytest.mark.parametrize("folder", ["hybrid", FP8_DIR, GGUF_DIR], ids=["hybrid", "FP8", "GGUF"])
def test_planned_weights_and_cache_are_those_held(folder, activations, hybrid_folder):
    model = refimpl.load(
        hybrid_folder if folder == "hybrid" else folder, backend="cuda", activations=activations
    )
    source = memory.Inventory.of(model.checkpoint)
    found = memory.items(source, placement.experts_on_cpu, 500, activations)
    held = 0
    for weight in model.backend._weights.values():
        held += sum(
            -(-t.nbytes // memory.ALIGN) * memory.ALIGN
            for t in (weight if isinstance(weight, ScaledFP8) else [weight])
        )
    planned = by_name(memory.weights(source, placement.experts_on_cpu, activations))
    assert sum(planned.values()) == held
    cache = model.new_cache()
    cache.reserve(500)
    assert by_name(found)["latent cache"] == cache.nbytes and capacity(500, 2048) == cache.capacity == 512


def test_rules_move_bytes_and_lose_none():
    multi = placement.load(
        placement.FILES / "DeepSeek-V3-Chat-multi-gpu-fp8-linear-ggml-experts.yaml", V3.config
    )
    one, two = (
        memory.totals(memory.weights(V3, placement.experts_on_cpu)),
        memory.totals(memory.weights(V3, multi)),
    )
    assert two["cuda:0"] + two["cuda:1"] == one["cuda:0"] and two["cpu"] == one["cpu"]
    caches = [p for p in memory.cache(V3, multi, 4096)]
    assert [(p.device, len(p.layers)) for p in caches] == [("cuda:0", 30), ("cuda:1", 31)]


def test_the_plan_and_the_kernels_agree_on_pieces():
    from refimpl.kernels import attention_torch, linear_torch

    for name in ("SCORES", "EXPANDED", "EXPANDED_FROM"):
        assert getattr(memory, name) == getattr(attention_torch, name)
    assert memory.STACKED == linear_torch.STACKED
    if importlib.util.find_spec("triton"):
        from refimpl.kernels import mla_long_triton

        assert (memory.SHARES, memory.SHARE) == (mla_long_triton.SHARES, mla_long_triton.EACH)
        assert warmup.LONG >= mla_long_triton.LONG
    assert [capacity(n, 3000) for n in (0, 1, 256, 257, 2048, 2049, 3000)] == [
        256,
        256,
        256,
        512,
        2048,
        3000,
        3000,
    ]
    assert capacity(5, 64) == 64


def test_what_does_not_fit_is_refused_with_the_numbers():
    found = memory.items(V3, placement.experts_on_cpu, 8192)
    memory.check_fits(found, {"cpu": 0, "cuda:0": 20 * 10**9}, "folder")
    with pytest.raises(
        ResourceError, match=r"E7020 folder: cuda:0 .*attention 10\.4 GB.*found 16\.0 GB, expected 19\.0 GB"
    ):
        memory.check_fits(found, {"cpu": 10**12, "cuda:0": 16 * 10**9}, "folder")


def test_prompts_are_read_by_as_many_tokens_as_there_is_room_for():
    place = placement.experts_on_cpu
    beside = memory.CONTEXT_BYTES
    for tokens in (512, 1024, 2048):
        need = memory.totals(memory.items(V3, place, memory.CONTEXT, prefill=tokens))["cuda:0"]
        assert memory.prefill_tokens(V3, place, {"cuda:0": need + beside}) == tokens
        assert memory.prefill_tokens(V3, place, {"cuda:0": need + beside - 1}) == tokens // 2
    assert memory.prefill_tokens(V3, place, {"cuda:0": 24 * 10**9}) == MOST_PREFILL  # a consumer's card
    assert memory.prefill_tokens(V3, place, {}) == PREFILL
    grown = [by_name(memory.items(V3, place, 8192, prefill=t))["workspace"] for t in (256, 1024, 2048)]
    assert grown == sorted(set(grown))


def test_a_prompt_on_the_cpu_brings_each_expert_some_tokens():
    everywhere = lambda module: "cpu"  # noqa: E731
    assert memory.prefill_tokens(V3, everywhere, {"cpu": 10**12}) == MOST_ON_CPU  # 32 for each of 256 experts
    assert memory.prefill_tokens(V3, everywhere, {}) == PREFILL
    need = memory.SPARED * 4 * memory._on_cpu(V3.config, 512)
    assert memory.prefill_tokens(V3, everywhere, {"cpu": need}) == 512
    assert memory.prefill_tokens(V3, everywhere, {"cpu": need - 1}) == PREFILL
    few = replace(V3.config, n_routed_experts=16, num_experts_per_tok=4)
    assert memory.prefill_on_cpu(few, 10**12) == PREFILL  # which bring each of them 64


def test_loading_takes_what_the_plan_says_for_prompts(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda: {"cpu": 10**12, "cuda:0": 10**12})
    assert refimpl.load(FP8_DIR, backend="cuda").new_cache().prefill == PREFILL  # on CPU tensors
    assert refimpl.load(FP8_DIR, backend="cpu").new_cache().prefill == PREFILL
    monkeypatch.setattr(memory, "on_cpu_tensors", lambda: False)
    model = refimpl.load(FP8_DIR, backend="cuda")
    assert model.new_cache().prefill == MOST_PREFILL
    monkeypatch.setattr(memory, "PER_EXPERT", 1000)  # of the embedded model's few experts, too
    assert refimpl.load(FP8_DIR, backend="cpu").new_cache().prefill == MOST_ON_CPU


def test_loading_asks_the_plan_before_it_uploads(monkeypatch):
    monkeypatch.setattr(memory, "on_cpu_tensors", lambda: False)
    monkeypatch.setattr(cuda.CudaBackend, "weight", lambda *a: pytest.fail("it uploads"))
    monkeypatch.setattr(memory, "free_memory", lambda: {"cpu": 10**12, "cuda:0": 10**6})
    with pytest.raises(ResourceError, match="E7020"):
        refimpl.load(FP8_DIR, backend="cuda")
    monkeypatch.setattr(memory, "free_memory", lambda: {"cpu": 10**12})
    with pytest.raises(UnsupportedError, match="E7010 cuda:0"):
        refimpl.load(FP8_DIR, backend="cuda")


def test_an_inventory_can_be_any_mapping_of_weights():
    checkpoint = Checkpoint.open(FP8_DIR)
    model = Model(memory.Inventory.of(checkpoint).config, dict(checkpoint.items()))
    assert (
        memory.Inventory.of(model.checkpoint, model.config).tensors == memory.Inventory.of(checkpoint).tensors
    )


# --- the command --------------------------------------------------------------------------------------------


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "refimpl.plan", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_command_prints_every_term():
    done = command("--config", "deepseek-v3", "--cpu_gbps", "250", "--gpu_gbps", "1008")
    assert done.returncode == 0, done.stderr
    for term in (
        "kv_b",
        "attention",
        "shared expert",
        "router",
        "head",
        "latent cache",
        "workspace",
        "routed experts",
        "tokens/s",
    ):
        assert term in done.stdout
    report = json.loads(
        command("--config", "deepseek-v3", "--cpu_gbps", "250", "--gpu_gbps", "1008", "--json").stdout
    )
    assert (
        report["totals"]["cuda:0"]
        == memory.totals(memory.items(V3, placement.experts_on_cpu, 8192))["cuda:0"]
    )
    assert report["gbps"]["cpu"] == {"value": 250.0, "known": "given"} and report["free"]["cpu"] > 0
    place, context = placement.load(placement.HYBRID, V3.config), report["context"]
    assert report["prefill_tokens"] == memory.prefill_tokens(V3, place, report["free"], context)
    assert f"prompts {report['prefill_tokens']} tokens at a time" in done.stdout
    assert f"{report['tokens_per_s']:.1f} tokens/s" in done.stdout


def test_the_command_measures_the_memory_when_nothing_is_given(hybrid_folder):
    report = json.loads(command("--model_path", hybrid_folder, "--json").stdout)
    assert (
        report["gbps"]["cpu"]["known"].startswith("measured") and 0.5 < report["gbps"]["cpu"]["value"] < 5000
    )
    assert report["fits"]["cpu"] is True and report["context"] == 2048


# {config: parameters that its publisher names, of all and of a token, in thousands of millions}
PUBLISHED = {
    "deepseek-v2": (236, 21),
    "deepseek-v2-lite": (15.7, 2.4),
    "deepseek-v3": (671, 37),
    "deepseek-v3.1": (671, 37),
    "deepseek-v3.2": (671, 37),
    "gigachat3-10b-a1.8b": (10, 1.8),
    "glm-4.7-flash": (30, 3),
    "glm-5": (744, 40),
    "kimi-k2": (1026, 32),
    "moonlight-16b-a3b": (16, 3),
}


def test_configs_in_full_size_have_the_parameters_their_names_say():
    assert memory.builtin_configs().keys() == PUBLISHED.keys()
    for name, (whole, of_a_token) in PUBLISHED.items():
        found = arithmetic.total(arithmetic.components(memory.Inventory.builtin(name).config))
        assert found.parameters / 1e9 == pytest.approx(whole, rel=0.07), name
        assert found.token_parameters / 1e9 == pytest.approx(of_a_token, rel=0.2), name


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_every_config_can_be_planned(name):
    report = json.loads(command("--config", name, "--cpu_gbps", "250", "--gpu_gbps", "1008", "--json").stdout)
    assert report["model"] == name and report["tokens_per_s"] > 1


def test_the_command_refuses_an_unknown_config():
    done = command("--config", "../errors")
    assert done.returncode == 1 and done.stderr.startswith("refimpl: E7021") and done.stderr.count("\n") == 1


def test_the_page_shows_what_the_command_prints():
    page = (Path(__file__).parents[1] / "docs" / "placement.md").read_text()
    arguments, shown = page.split("    python -m refimpl.plan --config ")[1].split("\n\n```text\n", 1)
    assert command("--config", *arguments.split()).stdout.startswith(shown.split("```")[0])


# --- prompts, and what one core can take in -----------------------------------------------------------------


def test_few_cores_are_bound_by_what_they_take_in():
    found = memory.items(V3, placement.experts_on_cpu, 0)
    gbps = {"cpu": 100.0, "cuda": 4000.0}
    free, bound = plan.part_seconds(found, gbps), plan.part_seconds(found, gbps | {"cores": 8 * 7.5})
    assert bound["routed experts"] == pytest.approx(free["routed experts"] * 100 / 60)
    assert all(bound[name] == free[name] for name in free if name != "routed experts")
    assert plan.part_seconds(found, gbps | {"cores": 32 * 7.5}) == free


def test_a_prompt_is_bound_by_reading_at_first_and_by_arithmetic_later():
    gbps, gflops = {"cpu": 100.0, "cuda": 4000.0}, {"cpu": 5e3, "floats": 2e3, "cuda": 1e6}
    found = memory.items(V3, placement.experts_on_cpu, 4096)
    routed = next(p for p in found if p.name == "routed experts")
    one, many = (plan.prefill_seconds(V3.config, found, n, gbps, gflops) for n in (1, 2560))
    assert one["routed experts"] == pytest.approx(routed.bytes_per_token / 100e9, rel=1e-6)
    by_reading = 10 * routed.nbytes / 100e9
    by_arithmetic = 2560 * 58 * 8 * 3 * 2 * 2048 * 7168 / 5e12
    assert many["routed experts"] == pytest.approx(max(by_reading, by_arithmetic), rel=1e-3)
    faster = plan.prefill_seconds(V3.config, found, 2560, gbps | {"cpu": 1e4}, gflops)
    assert faster["routed experts"] == pytest.approx(by_arithmetic, rel=1e-3)
    assert many["head"] == pytest.approx(
        10 * one["head"]
    )  # read for every piece, computed for the last token
    read_less = plan.prefill_seconds(V3.config, found, 2560, gbps, gflops | {"cpu": 1e9}, 2048)
    chosen = sum(1 - (1 - 8 / 256) ** n for n in (2048, 512))
    assert read_less["routed experts"] == pytest.approx(chosen * routed.nbytes / 100e9, rel=1e-6)
    alone = memory.items(V3, lambda module: "cpu", 2048)
    by_floats = plan.prefill_seconds(V3.config, alone, 2048, gbps, gflops, 2048)["latent cache"]
    pairs = 2048 * 1024
    assert by_floats == pytest.approx(61 * 128 * 2 * pairs * (192 + 128) / 2e12, rel=1e-6)
    behind = plan.prefill_seconds(V3.config, alone, 4096, gbps, gflops, 2048)["latent cache"] - by_floats
    pairs, expansion = 2048 * 3072, 2048 * 512 * 256  # rows of the first piece are expanded again
    assert behind == pytest.approx(61 * 128 * 2 * (pairs * (192 + 128) + expansion) / 2e12, rel=1e-6)
    assert plan.together({"routed experts": 3.0, "shared expert": 1.0, "head": 0.5}) == 3.5


def test_what_cores_take_in_is_measured_on_this_model_s_experts(monkeypatch):
    assert plan.expert_types(V3) == ("Q4_K", "Q6_K") or plan.expert_types(V3) == ("Q4_K", "Q4_K")
    assert plan.expert_types(memory.Inventory.of(Checkpoint.open(FP8_DIR))) is None
    asked = []

    def rates(threads, types, hidden, width, repack):
        asked.append((types, hidden, width, repack))
        return speed.Rates(2.0, 100.0)

    monkeypatch.setattr(plan, "expert_rates", rates)
    monkeypatch.setattr(plan, "read_bandwidth", lambda threads: 10.0)
    monkeypatch.setattr(plan, "free_ram", lambda: 10**9)
    found = plan.measured(V3)
    threads = len(os.sched_getaffinity(0))
    assert found["cores"][0] == 2.0 * threads and asked[0][1:] == (7168, 2048, False)
    # Where loading will lay the experts' rows side by side, they are measured so.
    monkeypatch.setattr(plan, "free_ram", lambda: 10**13)
    monkeypatch.setattr(interleaving, "SECONDS", 10**6)
    plan.measured(V3)
    assert asked[1][1:] == (7168, 2048, True)


def test_the_limit_of_a_container_is_memory_too(tmp_path):
    assert memory.container_room(tmp_path) is None
    files = {"max": "1000\n", "current": "700\n", "stat": "anon 500\nactive_file 60\ninactive_file 40\n"}
    for name, text in files.items():
        (tmp_path / f"memory.{name}").write_text(text)
    assert memory.container_room(tmp_path) == 400
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.container_room(tmp_path) is None
