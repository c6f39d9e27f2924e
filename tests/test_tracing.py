"""The step debugger: it reports what runs, all of it, and disturbs nothing; a comparison finds the operation
that was tampered with.
"""

import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import refimpl
from refimpl import ops, tracing
from refimpl.checkpoint import names
from refimpl.devices.cpu import CpuBackend
from refimpl.kernels import team
from refimpl.model import Model
from refimpl.reference.packed import dense
from refimpl.tensors import Packed, ScaledFP8
from refimpl.tiny import FP8_DIR

PROMPT = "What is 12 + 30?"
LAYER = [
    "rms_norm",
    "linear",
    "linear",
    "rms_norm",
    "linear",
    "rope",
    "rms_norm",
    "rope",
    "mla_naive",
    "linear",
    "rms_norm",
]
DENSE, MIXTURE = [*LAYER, "swiglu"], [*LAYER, "route", "experts", "swiglu"]
PASS = ["embed", *DENSE, *MIXTURE * 3, "rms_norm", "linear"]


@pytest.fixture(scope="module", params=ops.BACKENDS)
def model(request, hybrid_folder):
    """On "cuda" the operations run on CPU tensors, where there is no GPU."""
    if request.param == "cuda":
        pytest.importorskip("torch", reason="the cuda backend is torch's: the extra `gpu`")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REFIMPL_CUDA_DEVICE", "cpu")
        yield refimpl.load(hybrid_folder, backend=request.param)


@pytest.fixture(scope="module")
def reference(hybrid_folder):
    return refimpl.load(hybrid_folder, backend="reference")


def test_every_operation_is_reported_in_order_and_the_last_is_the_logits(model):
    ids = tracing.token_ids(model, PROMPT)
    steps = list(refimpl.trace(model, PROMPT))
    assert [s.name for s in steps] == PASS
    assert [s.index for s in steps] == list(range(len(steps)))
    np.testing.assert_array_equal(steps[-1].output, model.logits(ids))
    for s in steps:
        again = s.call(*s.inputs.values())
        for one, other in zip(
            again if type(again) is tuple else (again,), s.output if type(s.output) is tuple else (s.output,)
        ):
            np.testing.assert_array_equal(one, other, err_msg=str(s))
        backend = model.backend.name
        placed = "cpu" if backend == "cuda" and s.name in ("embed", "experts") else backend
        assert s.backend == (placed if placed in ops.OPS[s.name].fast else "reference")


def test_every_tensor_of_the_checkpoint_is_met_once(model):
    met = [f"{s.module}.{w}" for s in refimpl.trace(model, PROMPT) for w in s.weights.values()]
    spelled = {
        "mlp.bias": "mlp.gate.e_score_correction_bias",
        "self_attn.kv_b": "self_attn.kv_b_proj",
        "model.norm.norm": "model.norm",
    }
    spelled |= {"model.embed_tokens.embed_tokens": "model.embed_tokens", "lm_head.lm_head": "lm_head"}
    spelled |= {
        f"layers.{i}.mlp.{p}_proj": f"layers.{i}.mlp.experts.{p}_proj"
        for i in (1, 2, 3)
        for p in ("gate", "up", "down")
    }
    for short, long in spelled.items():
        met = [m.removesuffix(short) + long if m.endswith(short) else m for m in met]
    wanted = {name.removesuffix(".weight") for name in names.shapes(model.config)}
    assert sorted(met) == sorted(wanted)


def test_shapes_types_and_bytes_are_those_of_the_values(reference):
    steps = {(s.module, s.label): s for s in refimpl.trace(reference, PROMPT)}
    tokens = len(tracing.token_ids(reference, PROMPT))
    q = steps["model.layers.0.self_attn", "linear q_a_proj"]
    assert q.shapes == {"x": (tokens, 256), "w": (96, 256), "out": (tokens, 96)} and q.dtypes == {
        "x": "f32",
        "w": "E4M3",
        "out": "f32",
    }
    assert (
        q.weight_bytes == 96 * 256 + 4 * 2
        and q.activation_bytes == 4 * tokens * (256 + 96)
        and q.nbytes == q.weight_bytes + q.activation_bytes
    )
    e = steps["model.layers.2.mlp", "experts gate_proj up_proj down_proj"]
    assert (e.dtypes["gate"], e.dtypes["down"], e.dtypes["ids"]) == ("Q4_K", "Q6_K", "i64")
    chosen = len(np.unique(e.inputs["ids"]))
    assert chosen <= 8 and e.weight_bytes == chosen * 256 * (144 + 144 + 210)
    assert steps["model.embed_tokens", "embed embed_tokens"].weight_bytes == tokens * 256 * 2
    assert steps["model.layers.2.mlp", "route gate bias"].shapes["out[1]"] == (tokens, 2)
    assert str(q).split()[:6] == [
        "2",
        "model.layers.0.self_attn",
        "linear",
        "q_a_proj",
        "reference",
        f"{q.nbytes / 1000:.1f}",
    ]
    assert str(q).endswith(f"kB  f32[{tokens},256] E4M3[96,256] -> f32[{tokens},96]")


@pytest.mark.parametrize("decode", [0, 1, 3])
def test_with_a_cache_it_is_forward(model, decode):
    ids = tracing.token_ids(model, PROMPT)
    steps = list(refimpl.trace(model, ids, decode=decode))
    np.testing.assert_array_equal(logits(steps), passes(model, ids, decode))
    first = len(ids) - decode
    assert sorted({s.position for s in steps}) == [0, *range(first, len(ids))]
    assert {s.name for s in steps} >= {"mla_absorbed"} and "mla_naive" not in {s.name for s in steps}
    last = [s for s in steps if s.name == "mla_absorbed"][-1]
    room = (
        len(ids) if model.backend.name != "cuda" or decode == 0 else 256
    )  # a GPU looks at all rows there is room for, and masks
    assert last.shapes["latent"] == (room, 256) and last.shapes["q_nope"][0] == (1 if decode else len(ids))


def test_a_number_of_threads_holds_for_a_trace_too(model):
    """A trace runs in a thread of its own, and OpenMP keeps a number for each thread: torch's sums of one
    token differ in their last bits where it works with another.
    """
    have = team.threads()
    ids = tracing.token_ids(model, PROMPT)
    try:
        ops.set_threads(1)
        steps = list(refimpl.trace(model, ids, decode=1))
        np.testing.assert_array_equal(logits(steps), passes(model, ids, 1))
    finally:
        ops.set_threads(have)


def logits(steps):
    return np.concatenate([s.output for s in steps if s.module == "lm_head"])


def passes(model, ids, decode):
    """The logits of all but `decode` tokens at once and then of one at a time, without a trace."""
    cache, first = model.new_cache(), len(ids) - decode
    return np.concatenate([model.forward(part, cache) for part in (ids[:first], *([i] for i in ids[first:]))])


def test_bad_prompts_are_refused(reference):
    with pytest.raises(ValueError, match="cannot decode 3 of 2 tokens"):
        refimpl.trace(reference, [1, 2], decode=3)
    with pytest.raises(ValueError, match="token ids must be"):
        list(refimpl.trace(reference, [10**6]))
    assert [s.output.shape for s in refimpl.trace(reference, [])] == [(0, 256)]
    loose = Model(reference.config, dict(reference.checkpoint))
    with pytest.raises(ValueError, match="give token ids"):
        refimpl.trace(loose, "text")
    assert len(list(refimpl.trace(loose, [5]))) == len(PASS)


# --- it costs nothing when off ------------------------------------------------------------------------------


def test_a_model_is_the_same_object_after_it_was_traced(model):
    def anatomy(m):
        parts = [m, *m.layers, *(x for layer in m.layers for x in (layer.self_attn, layer.mlp))]
        return [{k: id(v) for k, v in vars(p).items()} for p in parts]

    before = anatomy(model)
    list(refimpl.trace(model, [1, 2]))
    assert anatomy(model) == before


def test_running_a_model_does_not_even_import_it():
    code = (
        "import sys, refimpl; refimpl.load(sys.argv[1], backend='reference').logits([1]); "
        "sys.exit('refimpl.tracing' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(FP8_DIR)], timeout=120).returncode == 0


def test_the_pass_waits_to_be_asked_and_ends_when_nobody_asks(hybrid_folder):
    called = []

    class Counting(CpuBackend):
        def function(self, module, name):
            function = super().function(module, name)
            return lambda *args, **named: (called.append(name), function(*args, **named))[1]

    base = refimpl.load(hybrid_folder, backend="reference")
    steps = refimpl.trace(Model(base.config, base.checkpoint, Counting()), [1, 2, 3])
    assert not called
    for n in range(1, 5):
        next(steps)
        assert len(called) == n
    steps.close()
    assert len(called) == 4 and not [t for t in threading.enumerate() if t.name == "refimpl.trace"]


def test_values_stay_as_they_were_yielded(model):
    """No operation writes into what an earlier one returned, so a list of steps is a true record."""
    kept = [(s, tracing.output_array(s).copy()) for s in refimpl.trace(model, PROMPT, decode=2)]
    for step, was in kept:
        np.testing.assert_array_equal(tracing.output_array(step), was, err_msg=str(step))


# --- two models ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decode", [None, 2])
@pytest.mark.parametrize(("backend", "activations"), [("cpu", "fp8"), ("cpu", "exact"), ("cuda", "exact")])
def test_backends_do_not_part(hybrid_folder, monkeypatch, backend, activations, decode):
    pytest.importorskip({"cpu": "numba", "cuda": "torch"}[backend], reason=f"the backend {backend}")
    monkeypatch.setenv("REFIMPL_CUDA_DEVICE", "cpu")
    a, b = (
        refimpl.load(hybrid_folder, backend=backend, activations=activations)
        for backend in ("reference", backend)
    )
    found = refimpl.compare(a, b, PROMPT, decode=decode)
    # Each operation by itself differs by the order of float32 sums; where activations are rounded to codes,
    # that can tip one to its neighbour.
    assert found.cause is None and max(d.own_rms for d in found.steps) < 1e-5
    assert (found.first is None) or activations == "fp8"
    assert str(found).endswith("first beyond 0.01: none, on equal inputs")


def test_a_model_does_not_part_from_itself(reference):
    assert all(
        (d.rms, d.worst, d.own_rms, d.own_worst) == (0, 0, 0, 0)
        for d in refimpl.compare(reference, reference, PROMPT, bound=0).steps
    )


TAMPERED = {
    "blk.1.attn_q_a.weight": "linear q_a_proj",
    "blk.0.ffn_up.weight": "swiglu gate_proj up_proj down_proj",
    "blk.2.attn_norm.weight": "rms_norm input_layernorm",
    "blk.3.ffn_down_exps.weight": "experts gate_proj up_proj down_proj",
    "blk.2.attn_kv_b.weight": "mla_naive kv_b",
    "output.weight": "linear lm_head",
}


@pytest.mark.parametrize("name", TAMPERED)
@pytest.mark.parametrize("stop", [False, True])
def test_the_first_operation_that_parts_is_the_one_with_the_wrong_weight(reference, name, stop):
    weights = dict(reference.checkpoint)
    w = weights[name]
    if isinstance(w, ScaledFP8):
        weights[name] = ScaledFP8(w.codes, w.scale * np.float32(1.5))
    elif isinstance(w, Packed) and len(w.shape) == 3:
        weights[name] = np.stack(
            [dense(w.expert(e)) * (2 if e == 5 else 1) for e in range(len(w.data))]
        ).astype(np.float32)
    else:
        weights[name] = dense(w) * np.float32(1.5)
    found = refimpl.compare(reference, Model(reference.config, weights), list(range(30, 60)), stop=stop)
    layer = names.layer_of(name)
    assert found.first.a.label == TAMPERED[name] and (
        layer is None or found.first.a.module.startswith(f"model.layers.{layer}."[:-1])
    )
    assert len(found.steps) == (found.first.a.index + 1 if stop else len(PASS))
    assert [d.a.index for d in found.steps if d.own_rms > 1e-3] == [found.first.a.index]
    assert found.cause is found.first and str(found.first) in str(found)


def test_two_quantizations_differ_where_they_differ(reference):
    """The FP8 checkpoint and the hybrid folder share every tensor but the routed experts'."""
    found = refimpl.compare(refimpl.load(FP8_DIR, backend="reference"), reference, PROMPT)
    assert {d.a.name for d in found.steps if d.own_rms > 0} == {"experts"} and found.first.a.name == "experts"
    assert (found.first.a.dtypes["gate"], found.first.b.dtypes["gate"]) == ("E4M3", "Q4_K")
    assert found.steps[-1].rms > 0 and found.steps[-1].own_worst == 0


def test_other_models_are_not_compared(reference):
    weights = dict(reference.checkpoint)
    short = Model(type(reference.config)(**(vars(reference.config) | {"num_hidden_layers": 3})), weights)
    with pytest.raises(
        ValueError, match=r"the models differ: model\.layers\.3 rms_norm against model\.norm rms_norm"
    ):
        refimpl.compare(reference, short, [1, 2])


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=8), st.integers(-20, 20))
def test_errors_are_relative(values, power):
    x = np.array(values)
    y = x + np.arange(len(x))
    rms, worst = tracing.errors(x, y)
    assert rms <= worst or np.isclose(rms, worst)
    if np.square(x).sum() > 1e-12:
        assert tracing.errors(x * 2.0**power, y * 2.0**power) == (rms, worst)
    assert tracing.errors(x, x) == (0, 0)


def test_a_number_against_nan_is_infinitely_wrong_and_nan_against_nan_is_right():
    nan = np.array([1.0, np.nan])
    assert tracing.errors(nan, nan) == (0, 0)
    assert (
        tracing.errors(np.array([1.0, 2.0]), nan)
        == (np.inf, np.inf)
        == tracing.errors(nan, np.array([1.0, 2.0]))
    )
    assert tracing.errors(np.zeros(2), np.array([0, 0.5])) == pytest.approx((0.5 / 2**0.5, 0.5))
