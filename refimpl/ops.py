"""OPS: every operation, its slow true reference, its fast paths by backend, and what "equal" means between
them.

The model, the tests, the benchmark and the notebooks read this table. What is not in it cannot be called by
the model; what is in it is tested. Fast paths are named by strings and imported when first asked for, so that
a missing compiler or GPU costs nothing.

A fast path has the signature of its reference to the letter, written out again beside each: it is what a
reader of one file needs to see, and what the model calls without knowing which it has.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType

from threadpoolctl import get_cached_controller

from refimpl.formats import FORMATS, e4m3, f16, f32
from refimpl.reference import attention, experts, fp8, indexer, int4, packed, quantizing
from refimpl.reference.linear import linear


@dataclass(frozen=True)
class Op:
    """One row: the reference, fast paths {backend: "module:function"}, and the demand ("bits" or "bound", see
    docs/conformance.md).
    """

    reference: Callable
    equal: str
    fast: Mapping[str, str] = field(default_factory=dict)


CODEC = "refimpl.kernels.ggml_codec"


def _attention(name: str, module: str = "attention") -> Op:
    fast = {
        "cpu": f"refimpl.kernels.{module}_numba:{name}",
        "cuda": f"refimpl.kernels.attention_torch:{name}",
    }
    return Op(getattr(attention, name), "bound", fast)


def _indexer(name: str, **fast: str) -> Op:
    fast["cuda"] = f"refimpl.kernels.indexer_torch:{name}"
    return Op(getattr(indexer, name), "bound", fast)


def _codec(reference: Callable, function: str, **others: str) -> Op:
    return Op(reference, "bits", {"cpu": f"{CODEC}:{function}", **others})


# Every format has its rows by itself; F32 and F16 are numpy's own. What the codec has of them is named here,
# of all else there is the reference alone.
STORED = tuple(module for module in FORMATS.values() if module not in (f32, f16))
_ENCODED = ("bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q4_k", "q5_k", "q6_k", "q8_k")
COMPILED = {"quantize": _ENCODED, "dequantize": (*_ENCODED, "q3_k", "iq4_nl", "iq4_xs", "mxfp4")}


def _format(module: ModuleType, verb: str) -> Op:
    name = module.NAME.lower()
    reference = getattr(module, verb)
    return _codec(reference, f"{verb}_{name}") if name in COMPILED[verb] else Op(reference, "bits")


OPS: dict[str, Op] = {
    "embed": Op(packed.embed, "bits", {"cuda": "refimpl.kernels.attention_torch:embed"}),
    "linear": Op(
        linear,
        "bound",
        {"cpu": "refimpl.kernels.linear_numba:linear", "cuda": "refimpl.kernels.linear_torch:linear"},
    ),
    "rms_norm": _attention("rms_norm", "norm_rope"),
    "rope": _attention("rope", "norm_rope"),
    "mla_naive": Op(attention.mla_naive, "bound", {"cuda": "refimpl.kernels.attention_torch:mla_naive"}),
    "mla_absorbed": _attention("mla_absorbed"),
    "route": _attention("route"),
    "layer_norm": _indexer("layer_norm"),
    "index_rope": _indexer("index_rope"),
    "index_rows": _indexer("index_rows", cpu="refimpl.kernels.indexer_numba:index_rows"),
    "swiglu": Op(
        experts.swiglu,
        "bound",
        {"cpu": "refimpl.kernels.experts_numba:swiglu", "cuda": "refimpl.kernels.linear_torch:swiglu"},
    ),
    "experts": Op(experts.experts, "bound", {"cpu": "refimpl.kernels.experts_numba:experts"}),
    # The same functions, of weights whose rows lie side by side (refimpl/reference/interleaved.py).
    "interleaved.linear": Op(linear, "bound", {"cpu": "refimpl.kernels.linear_numba:linear"}),
    "interleaved.experts": Op(experts.experts, "bound", {"cpu": "refimpl.kernels.experts_numba:experts"}),
    "e4m3.decode": _codec(e4m3.decode, "e4m3_decode"),
    "e4m3.encode": _codec(e4m3.encode, "e4m3_encode"),
    "fp8.act_quant": _codec(fp8.act_quant, "act_quant", cuda="refimpl.kernels.act_quant_triton:act_quant"),
    "fp8.act_quant_ue8m0": Op(
        fp8.act_quant_ue8m0, "bits", {"cuda": "refimpl.kernels.act_quant_triton:act_quant_ue8m0"}
    ),
    "fp8.weight_quant": _codec(fp8.weight_quant, "weight_quant"),
    "fp8.weight_dequant": _codec(
        fp8.weight_dequant, "weight_dequant", cuda="refimpl.kernels.act_quant_triton:weight_dequant"
    ),
    "int4.weight_dequant": Op(int4.weight_dequant, "bits"),
    "rms_norm_quant": Op(
        quantizing.rms_norm_quant, "bound", {"cuda": "refimpl.kernels.attention_torch:rms_norm_quant"}
    ),
    "swiglu_quant": Op(
        quantizing.swiglu_quant, "bound", {"cuda": "refimpl.kernels.linear_torch:swiglu_quant"}
    ),
    "fp8.linear": Op(fp8.linear, "bound", {"cuda": "refimpl.kernels.fp8_linear_triton:linear"}),
    # The same function, of activations in bfloat16, for which there are kernels of their own.
    "fp8.bf16.linear": Op(fp8.linear, "bound", {"cuda": "refimpl.kernels.fp8_linear_triton:linear"}),
} | {
    f"{module.NAME.lower()}.{verb}": _format(module, verb)
    for verb in ("dequantize", "quantize")
    for module in STORED
    if hasattr(module, verb)  # some are only decoded
}

# Backends of the model, slowest first.
BACKENDS = ("reference", "cpu", "cuda")


def load(name: str, backend: str) -> Callable:
    """The function that runs operation `name` on `backend`: its fast path there, else (or where that was not
    built) the reference.
    """
    op = OPS[name]
    module, _, function = op.fast.get(backend, "").partition(":")
    built = _import(module) if module else None
    return op.reference if built is None else getattr(built, function)


@cache
def _import(module: str) -> ModuleType | None:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        print(
            f"refimpl: note: {module} is not built ({error}); the numpy references are used instead",
            file=sys.stderr,
        )
        return None


def best_backend() -> str:
    """What "auto" means here: "cuda" where torch sees a GPU, else "cpu" where Numba is installed."""
    if sees_gpu():
        return "cuda"
    return "cpu" if importlib.util.find_spec("numba") else "reference"


# What a driver of NVIDIA's puts there: on Linux, and on Linux within Windows (WSL2).
GPU_DEVICES = ("/dev/nvidiactl", "/dev/dxg")


def sees_gpu() -> bool:
    """Whether torch sees one; it takes seconds to import, so it is not asked where there is clearly none."""
    if importlib.util.find_spec("torch") is None or not any(map(os.path.exists, GPU_DEVICES)):
        return False
    import torch  # optional, and seconds to import

    return torch.cuda.is_available()


def set_threads(n: int) -> None:
    """Use at most n threads, in numpy's BLAS, in torch where it is loaded, and in the kernels. ValueError for
    n < 1.
    """
    if n < 1:
        raise ValueError(f"threads must be at least 1, not {n}")
    get_cached_controller().limit(limits=n)
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(n)  # for every thread: the line above counts for the calling one alone
    numba = "refimpl.kernels.linear_numba" if importlib.util.find_spec("numba") else None
    for module in filter(None, (numba, CODEC)):
        kernels = _import(module)
        if kernels is not None:
            kernels.set_threads(n)


def own_threads() -> int:
    """Have Numba's kernels take threads as they did before `set_threads`, where they find by themselves how
    many are fastest for a token; the most that they take.
    """
    team = importlib.import_module("refimpl.kernels.team")  # Numba: seconds
    team.set_threads(None)
    return team.threads()
