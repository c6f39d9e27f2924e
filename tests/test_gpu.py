"""The cuda backend on a real GPU: Triton's linears, graphs, overlap, tokens. Everything that
test_cuda_backend.py cannot show on CPU tensors.
"""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest

import refimpl
from refimpl import ops
from refimpl.checkpoint import names
from refimpl.config import DeepSeekConfig
from refimpl.conformance import Manifest, greedy_ties
from refimpl.conformance.selftest import equivalents, mutants
from refimpl.formats import bf16, q4_k
from refimpl.model import Model
from refimpl.reference import attention, fp8
from refimpl.tensors import Packed, ScaledFP8
from refimpl.tiny import FP8_DIR
from refimpl.training.problems import problems
from refimpl.training.tokens import Encoder

torch = pytest.importorskip("torch", reason="the cuda backend is torch's: the extra `gpu`")
if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from refimpl.devices import (  # noqa: E402
    cuda,
    cuda_experts,
    cuda_graph,
    cuda_questions,
    memory,
    placement,
)
from refimpl.kernels import attention_torch, linear_torch  # noqa: E402


def on_gpu(array):
    return (
        ScaledFP8(*map(on_gpu, array))
        if isinstance(array, ScaledFP8)
        else torch.from_numpy(np.array(array)).cuda()
    )


def model(folder, activations="fp8", graphs=True):
    found = refimpl.load(folder, backend="cpu", activations=activations)
    backend = cuda.CudaBackend(activations=activations, graphs=graphs)
    return Model(found.config, found.checkpoint, backend)


def test_bf16_products_keep_float32s_bits():
    rng = np.random.default_rng(0)
    for shape in ((1, 7168, 256), (5, 700, 33), (300, 512, 1000)):
        x, w = (
            rng.standard_normal(shape[:2]).astype(np.float32),
            torch.from_numpy(rng.standard_normal((shape[2], shape[1]))).to(torch.bfloat16),
        )
        y = linear_torch.linear(on_gpu(x), w.cuda()).cpu().numpy()
        values = w.double().numpy()
        bound = (shape[1] + 8) * 2.0**-24 * (np.abs(x.astype(np.float64)) @ np.abs(values).T)
        assert (np.abs(y - x.astype(np.float64) @ values.T) <= bound).all()


@pytest.mark.parametrize("activations", ["fp8", "exact"])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 576, 7168), (16, 300, 384), (200, 512, 512)])
def test_fp8_linears_are_within_their_bounds(m, n, k, activations):
    """Triton's may be off by what the tensor cores of Hopper and Ada cut off a sum of E4M3 products, which
    keeps 13 bits; torch's float32 may not.
    """
    from tests import triton_cases

    rng = np.random.default_rng(1)
    x, w = (
        rng.standard_normal((m, k)).astype(np.float32),
        fp8.weight_quant(rng.standard_normal((n, k)).astype(np.float32)),
    )
    true, bound = triton_cases.truth(x, w, activations)
    assert (
        np.abs(linear_torch.linear(on_gpu(x), on_gpu(w), activations).cpu().numpy() - true) <= bound
    ).all()
    plain = linear_torch.fp8_linear(on_gpu(x), on_gpu(w), activations).cpu().numpy()
    assert (
        np.abs(plain - true).max()
        <= (k + 8) * 2.0**-24 * np.abs(x).max() * np.abs(fp8.weight_dequant(w)).sum(axis=1).max()
    )


@pytest.mark.parametrize(("tokens", "past"), [(17, 0), (300, 0), (40, 1000), (256, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_prompts_keep_float32s_bits_in_the_fused_kernel(tokens, past, dtype):
    """DeepSeek-V3's heads, no more of them than take long in float64; as exact as absorbed attention is."""
    rng, rows = np.random.default_rng(0), tokens + past
    shapes = ((tokens, 8, 128), (tokens, 8, 64), (rows, 512), (rows, 64), (8, 256, 512))
    q_nope, q_pe, *stored = (torch.from_numpy(rng.standard_normal(s).astype(np.float32)) for s in shapes)
    stored[2] /= 512**0.5
    stored = [a.to(dtype) for a in stored]
    numbers = [a.double().numpy() for a in (q_nope, q_pe, *stored)]
    true = attention.mla_naive(*numbers, 0.07)
    args = [a.cuda() for a in (q_nope, q_pe, *stored)]
    found = attention_torch.mla_absorbed(*args, 0.07)  # takes the libraries' workspace, once
    assert np.abs(found.cpu().numpy() - true).max() <= 1e-4 * np.abs(true).max()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    attention_torch.mla_absorbed(*args, 0.07)
    taken = torch.cuda.max_memory_allocated() - before
    assert taken <= 4 * 8 * (rows * 576 + tokens * (320 + 128)) + (1 << 20)  # no scores are among it


def test_exact_logits_are_the_references(hybrid_folder):
    ids, _ = Encoder.open(FP8_DIR).example("", problems("product", "heldout", 3, seed=1))
    true = refimpl.load(hybrid_folder, backend="reference", activations="exact").logits(ids)
    found = model(hybrid_folder, "exact")
    assert np.abs(found.logits(ids) - true).max() <= 1e-4 * np.abs(true).max()
    cache = found.new_cache()
    stepwise = np.concatenate(
        [found.forward(ids[a:b], cache) for a, b in ((0, 50), (50, 51), (51, 52), (52, 53), (53, len(ids)))]
    )
    assert np.abs(stepwise - true).max() <= 1e-4 * np.abs(true).max()


def test_greedy_tokens_are_the_references_and_graphs_change_nothing(hybrid_folder):
    reference = refimpl.load(hybrid_folder, backend="reference")
    graphs, eager = model(hybrid_folder), model(hybrid_folder, graphs=False)
    for seed in range(3):
        prompt = Encoder.open(FP8_DIR).example("", problems("sum", "heldout", 1, seed=seed))[0][:24]
        tokens = list(graphs.generate(prompt, 32))
        assert tokens == list(eager.generate(prompt, 32))
        # Teacher forced: where numbers within the bounds of all operations can change the reference's choice,
        # either token is right.
        ids = [*prompt, *tokens]
        true = reference.logits(ids)[len(prompt) - 1 : -1].argmax(axis=-1)
        ambiguous = greedy_ties.ambiguous_tokens(reference, ids, Manifest(accumulation="tensor-core"))[
            len(prompt) - 1 : -1
        ]
        assert (ambiguous | (true == tokens)).all() and ambiguous.mean() <= 0.25


def test_graphs_give_the_same_bits_and_survive_growth(hybrid_folder):
    graphs, eager = model(hybrid_folder), model(hybrid_folder, graphs=False)
    ids = np.random.default_rng(0).integers(0, 512, 300).tolist()
    one, other = graphs.new_cache(), eager.new_cache()
    graphs.forward(ids[:240], one), eager.forward(ids[:240], other)
    for i in range(240, 300):
        np.testing.assert_array_equal(
            graphs.forward(ids[i : i + 1], one), eager.forward(ids[i : i + 1], other)
        )
    one.truncate(100), other.truncate(100)
    np.testing.assert_array_equal(graphs.forward([5], one), eager.forward([5], other))
    # A token is one graph where it can ask for its experts. Else one begins it, and two more come with each
    # layer of experts: behind their launch, and behind their result.
    sparse = sum(not graphs.config.is_dense(i) for i in range(len(graphs.layers)))
    asks = cuda_questions.supported(torch.device("cuda", 0))
    assert len(graphs.decoder.function.steps) == (1 if asks else 1 + 4 * sparse)


def test_the_gpu_works_while_the_experts_do():
    """What comes after the launch in the stream runs although the experts have not finished: they finish only
    when it has.
    """
    done = threading.Event()
    x, ids, weights = (
        torch.ones(1, 64, device="cuda"),
        torch.zeros(1, 1, dtype=torch.int64, device="cuda"),
        torch.ones(1, 1, device="cuda"),
    )

    def experts(x, ids, weights):
        assert done.wait(20)
        return x + 1

    launch = cuda_experts.OverlappedExperts(experts, cuda_graph.Capture(), cuda_experts.PinnedMemory())
    routed = launch(x, ids, weights)
    after = torch.cuda.Event()
    shared = x * 3
    after.record()
    after.synchronize()
    done.set()
    assert torch.equal(routed + shared, torch.full_like(x, 5.0))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("graphs", [True, False])
def test_layers_on_two_gpus_are_the_references(hybrid_folder, graphs):
    """The second half of the layers, the last norm and the head on the other GPU: logits of a prefill and of
    decoding.
    """

    def place(module):
        where = placement.experts_on_cpu(module)
        late = module in ("model.norm", "lm_head") or (
            module.startswith("model.layers.") and int(module.split(".")[2]) >= 2
        )
        return "cuda:1" if where == "cuda:0" and late else where

    true = refimpl.load(hybrid_folder, backend="reference", activations="exact")
    found = Model(true.config, true.checkpoint, cuda.CudaBackend(place, "exact", graphs))
    ids = np.random.default_rng(2).integers(0, 512, 60).tolist()
    cache, wanted = found.new_cache(), true.logits(ids)
    stepwise = np.concatenate(
        [found.forward(ids[:50], cache), *(found.forward([i], cache) for i in ids[50:])]
    )
    assert np.abs(stepwise - wanted).max() <= 1e-4 * np.abs(wanted).max()
    assert all(torch.cuda.memory_allocated(i) > 0 for i in range(2))


def test_auto_is_cuda(hybrid_folder):
    assert ops.best_backend() == "cuda"
    assert refimpl.load(hybrid_folder).backend.name == "cuda"


def mid_size():
    """A model of random weights, about 700 MB of them on the GPU: {GGUF name: weight} and its config. All
    layers share the same experts.
    """
    c = DeepSeekConfig(
        vocab_size=32768,
        hidden_size=2048,
        intermediate_size=8192,
        moe_intermediate_size=1024,
        num_hidden_layers=10,
        num_attention_heads=32,
        q_lora_rank=768,
        n_routed_experts=16,
        n_group=4,
        topk_group=2,
        num_experts_per_tok=4,
        first_k_dense_replace=4,
        max_position_embeddings=4096,
    )
    rng, found, shared = np.random.default_rng(0), {}, {}
    for name, shape in names.shapes(c).items():
        if len(shape) == 1:
            found[names.to_gguf(name)] = np.full(shape, 0.0 if name.endswith("bias") else 1.0, np.float32)
        elif names.is_routed_expert(name):
            if shape not in shared:
                blocks = rng.integers(0, 256, (*shape[:-1], shape[-1] // 256 * 144), np.uint8)
                blocks.view(q4_k.BLOCK)["d"] = blocks.view(q4_k.BLOCK)["dmin"] = 1e-4
                shared[shape] = Packed(blocks, q4_k.GGML_TYPE, shape)
            found[names.to_gguf(name)] = shared[shape]
        elif names.is_fp8(name):
            codes = rng.integers(0x08, 0x50, shape, np.uint8) | (rng.integers(0, 2, shape, np.uint8) << 7)
            found[names.to_gguf(name)] = ScaledFP8(
                codes, np.full([-(-n // 128) for n in shape], 0.01, np.float32)
            )
        else:
            halves = (rng.standard_normal(shape, np.float32) * 0.02).view(np.uint32) >> 16
            found[names.to_gguf(name)] = Packed(
                halves.astype(np.uint16).view(np.uint8).reshape(shape[0], -1), bf16.GGML_TYPE, shape
            )
    return c, found


@pytest.mark.parametrize("prefill", [250, 1000])
@pytest.mark.parametrize("which", ["embedded", "mid-size"])
def test_the_plan_is_within_five_percent_of_what_is_taken(which, prefill):
    """In a process of its own: the libraries' workspaces come once. 1,000 tokens of prompt, then decoding."""
    program = "import sys; from tests import test_gpu; test_gpu.report_memory(sys.argv[1], int(sys.argv[2]))"
    done = subprocess.run(
        [sys.executable, "-c", program, which, str(prefill)], capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr[-2000:]
    planned, taken, context = map(int, done.stdout.split())
    print(which, prefill, planned, taken)
    assert abs(planned - taken) <= 0.05 * taken, (planned, taken, context)


def report_memory(which, prefill):
    if which == "embedded":
        found = refimpl.load(backend="cuda")
        config, weights = found.config, found.checkpoint
    else:
        config, weights = mid_size()
        found = Model(config, weights, cuda.CudaBackend())
    cache, context = found.new_cache(), 1024
    for _ in range(2):  # a second prompt meets what the graphs of the first tokens keep
        cache.truncate(0)
        for start in range(0, 1000, prefill):
            ids = [5] * prefill if which == "embedded" else list(range(start, start + prefill))
            found.forward(ids, cache, last_only=True)
        for _ in range(3):
            found.forward([7], cache)
    inventory = memory.Inventory.of(weights, config)
    items = memory.items(inventory, placement.experts_on_cpu, context, prefill=prefill)
    planned = memory.totals(items)["cuda:0"]
    print(planned, torch.cuda.max_memory_allocated(), context)


def test_after_a_warmup_a_second_process_compiles_nothing(tmp_path, hybrid_folder):
    environment = os.environ | {
        "REFIMPL_CACHE": str(tmp_path / "refimpl"),
        "TRITON_CACHE_DIR": str(tmp_path / "triton"),
    }
    command = [
        sys.executable,
        "-m",
        "refimpl.warmup",
        "--backend",
        "cuda",
        "--model_path",
        str(hybrid_folder),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-2000:]

    def compiled():
        return {p for p in tmp_path.rglob("*") if p.suffix in (".cubin", ".ptx", ".nbc")}

    before = compiled()
    assert any(p.suffix == ".cubin" for p in before)
    program = (
        "import sys, refimpl; m = refimpl.load(sys.argv[1], 'cuda'); "
        "[list(m.generate(list(range(n)), 2)) for n in (1, 7, 40, 200)]"
    )
    used = subprocess.run(
        [sys.executable, "-c", program, str(hybrid_folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert used.returncode == 0, used.stderr[-2000:]
    assert compiled() == before, [str(p) for p in compiled() - before]


def test_a_fault_on_a_gpu_is_found_and_a_rewrite_accepted():
    """The first that this GPU has the code for; `python -m refimpl.conformance --mutants` tries all."""
    fault = next(m for m in mutants.on_gpu() if not m.lacks())
    assert mutants.tried(fault) is not None
    rewrite = next(r for r in equivalents.on_gpu() if not r.lacks())
    assert not equivalents.alarms(rewrite, level="smoke")
