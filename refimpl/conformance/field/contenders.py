"""Who is judged: the kernels of released packages, and what each declares of itself where it differs from
the reference by its own documentation or code.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Iterator
from typing import Any, NamedTuple

from refimpl import ops
from refimpl.bench import peers
from refimpl.conformance.child import INTERPRETED
from refimpl.errors import RefimplError

ROOM = "refimpl.conformance.field"
K_QUANTS = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k")
LEGACY = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")
_GGUF = {"tokens": 1, "layouts": ["contiguous", "read-only"]}
_TORCH = {"array": "torch"}
_DOT = {"modes": ["fp8"], "activations": "nearest", "shows_nan": False}


class Contender(NamedTuple):
    """One kernel. `package` is a distribution's name, `modules` what must be importable for it."""

    package: str
    what: str
    op: str
    kernel: str  # "module:function" in this room
    declared: dict[str, Any] = {}  # noqa: RUF012
    modules: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    gpu: bool = False

    @property
    def name(self) -> str:
        """What --only matches and reports call it."""
        return f"{self.package}: {self.what}, {self.op}"

    def target(self) -> str:
        """The kernel's name as the suite imports it."""
        return f"{ROOM}.{self.kernel}"

    def missing(self) -> str:
        """Why it cannot be judged here; empty where it can."""
        absent = [m for m in self.modules if importlib.util.find_spec(m) is None]
        if absent:
            return f"{' and '.join(absent)} not installed"
        if "llama_cpp" in self.modules and (why := _no_ggml()):
            return why
        return "needs a GPU" if self.gpu and not ops.sees_gpu() else ""

    def version(self) -> str:
        """The version of the package; of ggml, which llama-cpp-python carries, ggml's own."""
        if self.package == "ggml":
            return peers.version()
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return "unknown version"


def _no_ggml() -> str:
    try:
        peers.library()
    except RefimplError as error:
        return error.line()
    return ""


def _decoders() -> Iterator[Contender]:
    for kind in (*K_QUANTS, *LEGACY):
        op = f"{kind}.dequantize"
        yield Contender("gguf", "decoders", op, f"blocks:gguf_{kind}", _GGUF, ("gguf",))
    for kind in (*K_QUANTS, *LEGACY, "iq4_nl", "iq4_xs", "mxfp4", "nvfp4"):
        op = f"{kind}.dequantize"
        yield Contender("ggml", "to_float", op, f"blocks:ggml_{kind}", {}, ("llama_cpp",))
    for kind in (*K_QUANTS, "q4_0", "q4_1", "q8_0", "iq4_nl", "iq4_xs"):
        yield Contender(
            "transformers",
            "GGUF decoders",
            f"{kind}.dequantize",
            f"blocks:transformers_{kind}",
            {"tokens": 1},
            ("transformers", "torch"),
        )
    yield Contender(
        "torchao", "MX to float32", "mxfp4.dequantize", "blocks:torchao_mxfp4", {}, ("torchao", "torch")
    )


def _encoders() -> Iterator[Contender]:
    for kind in LEGACY:
        op = f"{kind}.quantize"
        yield Contender("gguf", "encoders", op, f"blocks:gguf_quantize_{kind}", {}, ("gguf",))
        yield Contender("ggml", "ggml_quantize_chunk", op, f"blocks:ggml_quantize_{kind}", {}, ("llama_cpp",))
    yield Contender(
        "torchao",
        "float32 to MX",
        "mxfp4.quantize",
        "blocks:torchao_quantize_mxfp4",
        {"tokens": 1},
        ("torchao", "torch"),
    )


_GROUPS = {"activations": "nearest", "columns": 128, "tokens": 1}

FLOATS = (
    Contender("torch", "cast to E4M3", "e4m3.encode", "floats:torch_e4m3", {}, ("torch",)),
    Contender("torch", "cast from E4M3", "e4m3.decode", "floats:torch_e4m3_decode", {}, ("torch",)),
    Contender("torch", "cast to bfloat16", "bf16.quantize", "floats:torch_bf16", {}, ("torch",)),
    Contender(
        "ml_dtypes",
        "cast to E4M3",
        "e4m3.encode",
        "floats:ml_dtypes_e4m3",
        {"overflow": "nan"},
        ("ml_dtypes",),
    ),
    Contender(
        "ml_dtypes", "cast from E4M3", "e4m3.decode", "floats:ml_dtypes_e4m3_decode", {}, ("ml_dtypes",)
    ),
    Contender("ml_dtypes", "cast to bfloat16", "bf16.quantize", "floats:ml_dtypes_bf16", {}, ("ml_dtypes",)),
    Contender(
        "triton",
        "the interpreter's cast to E4M3",
        "e4m3.encode",
        "floats:triton_e4m3",
        _TORCH | {"concurrent": False},
        ("triton", "torch"),
        tuple(INTERPRETED.items()),
    ),
    Contender(
        "torchao",
        "block-wise FP8 of activations",
        "fp8.act_quant",
        "floats:torchao_act_quant",
        _GROUPS | {"least": 1e-12},
        ("torchao", "torch"),
    ),
    Contender(
        "torchao",
        "block-wise FP8 of weights",
        "fp8.weight_quant",
        "floats:torchao_weight_quant",
        _GROUPS | {"rows": 128, "least": 1e-12},
        ("torchao", "torch"),
    ),
    Contender(
        "transformers",
        "FP8 of weights, made",
        "fp8.weight_quant",
        "floats:transformers_weight_quant",
        _GROUPS | {"rows": 128},
        ("transformers", "torch"),
    ),
    Contender(
        "transformers",
        "FP8 of weights, undone for gradients",
        "fp8.weight_dequant",
        "floats:transformers_weight_dequant",
        {},
        ("transformers", "torch"),
    ),
    Contender(
        "transformers",
        "FP8 of weights, undone at loading",
        "fp8.weight_dequant",
        "floats:transformers_load_dequant",
        {"rows": 128, "columns": 128},
        ("transformers", "torch"),
    ),
)

_PACKED = {"weights": [*K_QUANTS, "q8_0", "q4_0", "q5_0"]}
_STACKS = _PACKED | {"lists": False}
PRODUCTS = (
    Contender("ggml", "vec_dot", "linear", "products:ggml_vec_dot", _DOT | _PACKED, ("llama_cpp",)),
    Contender("ggml", "`MUL_MAT`", "linear", "products:ggml_mul_mat", _DOT | _PACKED, ("llama_cpp",)),
    Contender(
        "ggml",
        "`MUL_MAT`, rows interleaved by eight",
        "linear",
        "products:ggml_repacked",
        _DOT | {"weights": ["q4_k"], "rows": 8},
        ("llama_cpp",),
    ),
    Contender("ggml", "`MUL_MAT_ID`", "experts", "products:ggml_experts", _DOT | _STACKS, ("llama_cpp",)),
    Contender(
        "ggml",
        "`MUL_MAT_ID`, rows interleaved by eight",
        "experts",
        "products:ggml_experts_repacked",
        _DOT | _STACKS | {"weights": ["q4_k"]},
        ("llama_cpp",),
    ),
    Contender(
        "kt-kernel",
        "experts of GGUF blocks",
        "experts",
        "products:kt_experts",
        _DOT
        | _STACKS
        | {
            "weights": ["q4_k", "q6_k"],
            "input": "bfloat16",
            "output": "bfloat16",
            "concurrent": False,
            "threads": False,
        },
        ("kt_kernel",),
    ),
    Contender(
        "torch",
        "_scaled_mm, block by block",
        "fp8.linear",
        "products:torch_scaled_mm",
        {"modes": ["fp8"], "columns": 128, "rows": 16, "tokens": 1},
        ("torch",),
    ),
    Contender(
        "sgl-deep-gemm",
        "fp8_gemm_nt",
        "fp8.linear",
        "products:deep_gemm_fp8",
        _TORCH
        | {
            "device": "cuda",
            "modes": ["fp8"],
            "accumulation": "tensor-core",
            "output": "bfloat16",
            "columns": 128,
            "rows": 8,
            "threads": False,
        },
        ("deep_gemm",),
        gpu=True,
    ),
)

_MODEL = _TORCH | {"threads": False}
MODELS = (
    Contender(
        "transformers",
        "DeepSeek-V3's RMSNorm",
        "rms_norm",
        "models:transformers_rms_norm",
        _MODEL,
        ("transformers", "torch"),
    ),
    Contender(
        "transformers",
        "DeepSeek-V3's rotary positions",
        "rope",
        "models:transformers_rope",
        _MODEL,
        ("transformers", "torch"),
    ),
    Contender(
        "transformers",
        "DeepSeek-V3's router",
        "route",
        "models:transformers_route",
        _MODEL | {"order": "any", "ties": "any", "scores": "sigmoid", "group_of": 2},
        ("transformers", "torch"),
    ),
    Contender(
        "transformers",
        "DeepSeek-V3's attention, eager",
        "mla_naive",
        "models:transformers_attention",
        _MODEL,
        ("transformers", "torch"),
    ),
    Contender(
        "torch",
        "scaled_dot_product_attention",
        "mla_naive",
        "models:torch_attention",
        _MODEL | {"scaling": "queries"},
        ("torch",),
    ),
)

CONTENDERS: tuple[Contender, ...] = (*_decoders(), *_encoders(), *FLOATS, *PRODUCTS, *MODELS)
