"""What is inside the Numba kernels: layouts of activations, workspaces, plans, levels of SIMD. What they
compute is judged in test_conformance.py.
"""

import itertools
import os
import re
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import threadpoolctl
from hypothesis import given
from hypothesis import strategies as st

import refimpl
from refimpl import formats, ops
from refimpl.conformance import greedy_ties
from refimpl.conformance.inputs import draws
from refimpl.conformance.inputs.draws import activations, packed
from refimpl.conformance.rows import MANY
from refimpl.formats import e4m3, iq4_xs, q4_k, q6_k, q8_0, q8_k
from refimpl.ops import OPS
from refimpl.reference import fp8, interleaved
from refimpl.tensors import Packed
from refimpl.tiny import FP8_DIR
from refimpl.training.problems import problems
from refimpl.training.tokens import Encoder

numba = pytest.importorskip("numba", reason="the cpu backend's kernels are compiled by Numba")
from refimpl.kernels import (  # noqa: E402
    activations_numba,
    dot_llvm,
    experts_numba,
    interleaved_llvm,
    latent_llvm,
    linear_numba,
    pair_llvm,
    panel_llvm,
    simd_llvm,
    unpack_llvm,
    workspace,
)

# --- linear -------------------------------------------------------------------------------------------------


def test_what_the_kernel_does_not_take_goes_to_the_reference():
    rng = np.random.default_rng(3)
    w = packed(rng, q4_k, 8, 512)
    scattered = Packed(np.asfortranarray(w.data), w.ggml_type, w.shape)
    x = activations(rng, "outliers", 2, 512)
    for weight in (
        scattered,
        packed(rng, formats.get(3), 8, 512),
        rng.normal(0, 1, (8, 500)).astype(np.float32),  # not a multiple of 32
    ):
        a = x[:, : weight.shape[1]]
        np.testing.assert_array_equal(
            ops.load("linear", "cpu")(a, weight), OPS["linear"].reference(a, weight)
        )
    assert ops.load("linear", "cpu")(x[:0], w).shape == (0, 8)


# --- activations --------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 2**32), tokens=st.integers(1, 4), power=st.integers(-30, 30))
def test_activations_are_quantized_to_the_reference_s_bits(seed, tokens, power):
    x = (np.random.default_rng(seed).normal(0, 1, (tokens, 512)) * 10.0**power).astype(np.float32)
    d, q, sums = q8_k.unpack(q8_k.quantize(x))
    ours = activations_numba.prepare("test", x, "q8_k")
    for name, true in (("d", d), ("q", q), ("sums", sums[..., unpack_llvm.HALVES])):
        np.testing.assert_array_equal(ours[name], true)
    d, q = q8_0.unpack(q8_0.quantize(x))
    ours = activations_numba.prepare("test", x, "q8_0")
    np.testing.assert_array_equal(ours["d"], d)
    np.testing.assert_array_equal(ours["q"][np.isfinite(d) & (d > 0)], q[np.isfinite(d) & (d > 0)])
    for layout, ue8m0 in (("e4m3", False), ("e4m3_ue8m0", True)):
        codes, scale = fp8.act_quant(x, ue8m0)
        np.testing.assert_array_equal(
            activations_numba.prepare("test", x, layout), e4m3.decode(codes) * np.repeat(scale, 128, axis=-1)
        )


# --- experts ------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 2**32))
def test_one_expert_of_weight_one_is_swiglu(seed):
    rng = np.random.default_rng(seed)
    gate, up, down = (
        packed(rng, q4_k, 1, 256, 256),
        packed(rng, q4_k, 1, 256, 256),
        packed(rng, q6_k, 1, 256, 256),
    )
    x = activations(rng, "outliers", 5, 256)
    alone = ops.load("swiglu", "cpu")(x, gate.expert(0), up.expert(0), down.expert(0))
    np.testing.assert_array_equal(
        alone,
        ops.load("experts", "cpu")(x, np.zeros((5, 1), int), np.ones((5, 1), np.float32), gate, up, down),
    )


def test_a_steady_state_allocates_nothing_but_its_result():
    rng = np.random.default_rng(6)
    gate, up, down = (packed(rng, q4_k, 4, 256, 256) for _ in range(3))
    x, weights = activations(rng, "outliers", 6, 256), np.ones((6, 2), np.float32)
    run = ops.load("experts", "cpu")
    run(x, np.array([[0, 1]] * 6), weights, gate, up, down)
    buffers = {name: b.ctypes.data for name, b in workspace.WORKSPACE._memory.items()}
    for ids in ([[2, 3]] * 6, [[0, 3]] * 6):
        run(x, np.array(ids), weights, gate, up, down)
    run(x[:2], np.array([[1, 2]] * 2), weights[:2], gate, up, down)
    assert {name: b.ctypes.data for name, b in workspace.WORKSPACE._memory.items()} == buffers


# --- whole models -------------------------------------------------------------------------------------------


def test_greedy_tokens_are_those_of_the_reference(hybrid_folder):
    models = [refimpl.load(hybrid_folder, backend=b) for b in ("cpu", "reference")]
    encoder = Encoder.open(FP8_DIR)
    for kind in ("sum", "product", "e4m3", "fact"):
        for problem in problems(kind, "heldout", 3, seed=8):
            prompt = encoder.prompt("", [], problem.question)
            ours, true = (list(m.generate(prompt)) for m in models)
            if ours != true:  # then only where rounding alone can change the choice
                at = next(i for i, (a, b) in enumerate(zip(ours, true)) if a != b)
                assert greedy_ties.ambiguous_tokens(models[1], prompt + true[:at])[-1], problem


# --- levels -------------------------------------------------------------------------------------------------

HERE = simd_llvm.available()
WIRES = {
    "generic": (),
    "avx2": ("vpmaddubsw",),
    "vnni": ("vpdpbusd", "vpdpwssd"),
    "avx512": ("%zmm",),
    "bf16": ("vdpbf16ps",),
    "amx": ("tdpbssd",),
}
TARGETS = [
    ("generic", "x86-64"),
    ("generic", "neoverse-n1"),
    ("avx2", "haswell"),
    ("vnni", "alderlake"),
    ("vnni", "cascadelake"),
    ("avx512", "cascadelake"),
    ("avx512", "znver4"),
    ("bf16", "znver4"),
    ("bf16", "sapphirerapids"),
]


def assembly(cpu: str, arguments: int, emit) -> str:
    """What LLVM makes of emit(builder, arguments) for another CPU than this."""
    import llvmlite.binding as llvm
    from llvmlite import ir

    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    triple = "aarch64-unknown-linux-gnu" if cpu == "neoverse-n1" else "x86_64-unknown-linux-gnu"
    module = ir.Module()
    module.triple = triple
    f = ir.Function(module, ir.FunctionType(ir.VoidType(), [simd_llvm.I64] * arguments), "kernel")
    b = ir.IRBuilder(f.append_basic_block())
    emit(b, f.args)
    b.ret_void()
    parsed = llvm.parse_assembly(str(module))
    parsed.verify()
    return llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, opt=3).emit_assembly(parsed)


def has_only(text: str, level: str, needed: tuple[str, ...]) -> None:
    """None gets an instruction of a higher level."""
    assert all(name in text for name in needed), level
    forbidden = itertools.chain.from_iterable(
        WIRES[n] for n in simd_llvm.LEVELS[simd_llvm.LEVELS.index(level) + 1 :]
    )
    assert not any(name in text for name in forbidden)


@pytest.mark.parametrize("kind", dot_llvm.KINDS)
@pytest.mark.parametrize(("level", "cpu"), TARGETS)
def test_every_row_kernel_compiles_for_every_level(level, cpu, kind):
    """For CPUs that are not here too."""

    def emit(b, args):
        e, (w, scale, columns, out, ahead, *tokens) = simd_llvm.Emitter(b, level), args
        for i, y in enumerate(dot_llvm.KINDS[kind].dot(e, w, scale, columns, tokens, ahead)):
            e.store(e.splat(y, 1), e.at(out, 4 * i))

    integers = dot_llvm.KINDS[kind].acts == "q8_k"
    needed = WIRES["vnni" if level in ("avx512", "bf16") else level] if integers else ()
    if kind == iq4_xs.GGML_TYPE and "vpdpbusd" in needed:  # numbers with a sign: sums of four exceed 16 bits
        needed = (*WIRES["avx2"], "vpdpwssd")
    has_only(assembly(cpu, 7, emit), level, needed)


@pytest.mark.parametrize("kind", panel_llvm.PANELS)
@pytest.mark.parametrize(("level", "cpu"), TARGETS)
def test_every_panel_kernel_compiles_for_every_level(level, cpu, kind, monkeypatch):
    monkeypatch.setattr(panel_llvm, "ROWS", simd_llvm.WORDS[level])
    monkeypatch.setattr(panel_llvm, "VECTOR", 4 * simd_llvm.WORDS[level])

    def emit(b, args):
        w, row_bytes, columns, scratch, ahead, lines, out, *tokens = args
        e, layout = simd_llvm.Emitter(b, level), panel_llvm.PANELS[kind]
        panel_llvm._pack_panel(e, layout, w, row_bytes, columns, scratch)
        for i, y in enumerate(panel_llvm._multiply(e, layout, scratch, columns, ahead, lines, tokens)):
            e.store(y, e.at(out, 64 * i))

    needed = WIRES["vnni"] + WIRES["avx512"] if level in ("avx512", "bf16") else WIRES[level]
    has_only(assembly(cpu, 9, emit), level, needed)


@pytest.mark.parametrize(("level", "cpu"), TARGETS)
def test_the_kernels_of_attention_compile_for_every_level(level, cpu):
    many = 4 if simd_llvm.WORDS[level] == 16 else 2

    def emit(b, args):
        e, (count, panel, step, other, rows, scores, *rest) = simd_llvm.Emitter(b, level), args
        four, start, to = rest[:4], rest[4:8], rest[8:12]
        latent_llvm._products(e, many, count, (panel, step), (four, other), start, to)
        latent_llvm._shares(e, many, rows, scores, simd_llvm.F32(0.5), *rest[12:])

    has_only(assembly(cpu, 21, emit), level, WIRES["avx512"] if many == 4 else ())


@pytest.mark.parametrize("cpu", ["znver4", "znver5", "sapphirerapids"])
def test_products_of_bf16_keep_their_sums_in_registers(cpu):
    """Of four tokens and four registers of rows. In the loop over columns nothing is stored."""

    def emit(b, args):
        e, (pairs, out, *rest) = simd_llvm.Emitter(b, "bf16"), args
        block, tokens, ahead = pair_llvm.Block(*rest[:4]), rest[4:8], rest[8:]
        for i, y in enumerate(pair_llvm._sums(e, block, pairs, tokens, 4, ahead)):
            e.store(y, e.at(out, 64 * i))

    text = assembly(cpu, 12, emit)
    has_only(text, "bf16", (*WIRES["avx512"], *WIRES["bf16"]))
    inside = text[text.index("vdpbf16ps") : text.rindex("vdpbf16ps")].splitlines()
    assert not [line for line in inside if re.search(r"vmovup[sd]\s+%zmm\d+, ", line)]
    assert sum("vdpbf16ps" in line for line in inside) % 16 == 15


def test_no_product_of_bf16_without_the_instruction():
    """A CPU that lacks it, or the table of 128 bytes, is not given the level."""
    import llvmlite.binding as llvm

    features = llvm.get_host_cpu_features()
    both = features.get("avx512bf16") and features.get("avx512vbmi")
    assert ("bf16" in HERE) <= bool(both) and (simd_llvm.LEVEL in ("bf16", "amx")) == pair_llvm.PAIRS


@pytest.mark.parametrize("module", interleaved.FORMATS)
@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize(("level", "cpu"), TARGETS)
def test_the_kernel_of_interleaved_rows_compiles_for_every_level(level, cpu, tokens, module, monkeypatch):
    words = simd_llvm.WORDS[level]
    for kernels in (panel_llvm, interleaved_llvm):
        monkeypatch.setattr(kernels, "ROWS", words)
        monkeypatch.setattr(kernels, "VECTOR", 4 * words)
    monkeypatch.setattr(interleaved_llvm, "PARTS", panel_llvm.TILE // words)

    def emit(b, args):
        w, blocks, out, fetch, *acts = args
        e, kind = simd_llvm.Emitter(b, level), panel_llvm.INTERLEAVED + module.GGML_TYPE
        zeros = [[e.constant(simd_llvm.F32, [0.0] * words)] * interleaved_llvm.PARTS] * tokens
        for t, parts in enumerate(interleaved_llvm._multiply(e, kind, w, blocks, acts, zeros, fetch)):
            for i, part in enumerate(parts):
                e.store(part, e.at(out, 64 * t + 4 * words * i))

    # Sums of minima may be vpmaddwd and an addition, whatever the level.
    full = ("vpdpbusd", "%zmm")
    needed = {"vnni": ("vpdpbusd",), "avx512": full, "bf16": full}.get(level, WIRES[level])
    has_only(assembly(cpu, 4 + tokens, emit), level, needed)


EVERYWHERE = ("fp8", "q4_k", "q6_k")
"""Kinds of weights that every level is tried with; the others are dealt out, since each compiles kernels of
its own. `make conformance` and the deep profile try all with all.
"""
ON_A_LEVEL = """
import sys
from refimpl import ops
from refimpl.conformance import Manifest, report
from refimpl.conformance.judge import judge
from refimpl.conformance.lookup import Spec
from refimpl.conformance.rows import usual_threads

ops.set_threads(usual_threads())
level, *weights = sys.argv[1:]
laws = ["bound", "edges", "one_hot", "integers", "batch", "threads"]
for op, kernel in (("linear", "linear_numba:linear"), ("experts", "experts_numba:experts")):
    spec = Spec(op, "", f"refimpl.kernels.{kernel}", Manifest(weights=tuple(weights)), level)
    print(report.text(judge(spec.trial(), laws)))
"""


@pytest.mark.parametrize("level", simd_llvm.LEVELS)
def test_levels_give_the_same_results(level):
    """In a process each, since a process has one level: integer products are exact, so only the sums of
    floats may differ.
    """
    if level not in HERE:
        pytest.skip(f"this CPU has no {level}")
    deep = os.environ.get("HYPOTHESIS_PROFILE") == "deep"
    others = [] if deep else sorted({*draws.WEIGHTS} - {*EVERYWHERE})
    some = [*EVERYWHERE, *others[HERE.index(level) :: len(HERE)]]
    command = [sys.executable, "-c", ON_A_LEVEL, "quick" if deep else "smoke", *([] if deep else some)]
    env = os.environ | {
        **MANY,
        "REFIMPL_SIMD": level,
        "PYTHONPATH": os.pathsep.join([os.getcwd(), *filter(None, sys.path)]),
    }
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count(" pass ") == 10, done.stdout + done.stderr


def test_a_level_that_is_not_here_is_refused(monkeypatch):
    monkeypatch.setenv("REFIMPL_SIMD", "altivec")
    with pytest.raises(Exception, match="E5020 REFIMPL_SIMD: no such level on this CPU"):
        simd_llvm.choose()
    monkeypatch.setenv("REFIMPL_SIMD", "generic")
    assert simd_llvm.choose() == "generic"


def test_the_plan_sorts_pairs_by_expert():
    ids = np.array([[3, 1], [1, 0], [3, 0]])
    used, first, counts, tokens, pairs = experts_numba._plan(ids, 5)
    assert (used.tolist(), first.tolist(), counts.tolist()) == ([0, 1, 3], [0, 2, 4] * 2, [2] * 6)
    assert tokens.tolist() == [1, 2, 0, 1, 0, 2] and pairs.tolist() == [[4, 2], [3, 0], [5, 1]]


# --- beside others ------------------------------------------------------------------------------------------


def test_sums_of_32_stand_in_the_order_of_panels():
    x = activations(np.random.default_rng(8), "outliers", 3, 512)
    _, _, sums = q8_k.unpack(q8_k.quantize(x))
    of_32 = sums[..., ::2] + sums[..., 1::2]
    np.testing.assert_array_equal(
        activations_numba.prepare("test", x, "q8_k")["sums32"], of_32[..., [0, 2, 4, 6, 1, 3, 5, 7]]
    )


@pytest.mark.parametrize("tokens", [2, 3, 4, 5, 6, 7, 9])
def test_panels_are_what_single_rows_are(tokens):
    """The two ways to multiply add the same exact integers of blocks; with one block even the floats are
    rounded alike.
    """
    rng = np.random.default_rng(9)
    for kind in panel_llvm.PANELS:
        w, x = (
            packed(rng, formats.get(kind), 3 * panel_llvm.ROWS + 5, 256),
            activations(rng, "normal", tokens, 256),
        )
        together = linear_numba.linear(x, w)
        np.testing.assert_allclose(
            together,
            np.concatenate([linear_numba.linear(x[t : t + 1], w) for t in range(tokens)]),
            rtol=1e-4,
            atol=1e-4,
        )
        np.testing.assert_array_equal(together[: tokens - 1], linear_numba.linear(x, w)[: tokens - 1])


def test_python_goes_on_while_a_kernel_runs():
    """With the interpreter's lock held, the main thread would stand still for as long as the call lasts."""
    rng = np.random.default_rng(10)
    w, x = packed(rng, q4_k, 2048, 2048), activations(rng, "normal", 2048, 2048)
    have = linear_numba.threads()
    try:
        ops.set_threads(1)
        linear_numba.linear(x, w)
        shares = []
        for _ in range(5):  # somebody else may take the CPU meanwhile
            done: list[float] = []

            def work():
                start = time.perf_counter()
                linear_numba.linear(x, w)
                done.append(time.perf_counter() - start)

            thread, longest, last = threading.Thread(target=work), 0.0, time.perf_counter()
            thread.start()
            while not done:
                now = time.perf_counter()
                longest, last = max(longest, now - last), now
            thread.join()
            shares.append(longest / done[0])
        assert min(shares) < 0.5
    finally:
        ops.set_threads(have)


def test_threads_are_limited_in_blas_as_in_kernels():
    have = linear_numba.threads()
    try:
        ops.set_threads(1)
        assert linear_numba.threads() == 1
        assert {
            pool["num_threads"] for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"
        } == {1}
    finally:
        ops.set_threads(have)


def test_the_second_process_compiles_nothing(tmp_path):
    code = """
import numpy as np
from refimpl.conformance import greedy_ties
from refimpl.conformance.inputs.draws import packed
from refimpl.formats import q4_k, q6_k
from refimpl.kernels import linear_numba as k, strips_numba
for module in (q4_k, q6_k):
    k.linear(np.ones((3, 256), np.float32), packed(np.random.default_rng(0), module, 32, 256))
made, strips = (k._linear,), [strips_numba.strip(m.GGML_TYPE, "lanes") for m in (q4_k, q6_k)]
print(sum(sum(f.stats.cache_misses.values()) for f in made), sum(s.cache_hits for s in strips))
"""
    env = os.environ | {
        "REFIMPL_CACHE": str(tmp_path),
        "PYTHONPATH": os.pathsep.join([os.getcwd(), *filter(None, sys.path)]),
    }
    runs = [
        subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        for _ in range(2)
    ]
    assert [r.stdout.split() for r in runs] == [["1", "0"], ["0", "2"]], runs
    assert "compiling the kernels for this CPU" in runs[0].stderr and not runs[1].stderr
    for index in tmp_path.rglob("*_lane_strip_14*.nbi"):
        index.unlink()
    again = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert "compiling the kernels for this CPU" in again.stderr, again
    # An index of its own for each variant: two processes that compile at once cannot take each other's code
    # for theirs.
    assert {f.name.split("-")[0].rsplit(".")[-1] for f in tmp_path.rglob("*_lane_strip_*.nbi")} == {
        "_lane_strip_12",
        "_lane_strip_14",
    }
