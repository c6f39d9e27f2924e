"""ggml, driven through ctypes in the library that the package llama_cpp carries (extra `peers`): its
quantizers, and its graphs as it runs them; and the experts of KTransformers' package kt_kernel, where it is
installed.

Nothing here takes part in a model. Struct layouts and signatures are ggml's C headers'.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from ctypes import c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from refimpl import formats
from refimpl.errors import refusal
from refimpl.formats import bf16
from refimpl.tensors import Packed

F32, I32, BF16 = 0, 26, 30
HUGE_PAGES = 14  # madvise's MADV_HUGEPAGE
REPACKED = ("Q4_K", "MXFP4")  # formats that ggml has an interleaved layout for, of those measured
_P, _N = c_void_p, c_int64


class _Memory(ctypes.Structure):
    """ggml's struct `ggml_init_params`, the memory that a context is made in."""

    _fields_ = (("mem_size", c_size_t), ("mem_buffer", _P), ("no_alloc", c_bool))


_BASE = {
    "ggml_quantize_chunk": (c_size_t, c_int, _P, _P, _N, _N, _N, _P),
    "ggml_init": (_P, _Memory),
    "ggml_free": (None, _P),
    "ggml_log_set": (None, _P, _P),
    "ggml_new_tensor_2d": (_P, _P, c_int, _N, _N),
    "ggml_new_tensor_3d": (_P, _P, c_int, _N, _N, _N),
    "ggml_mul_mat": (_P, _P, _P, _P),
    "ggml_mul_mat_id": (_P, _P, _P, _P, _P),
    "ggml_swiglu_split": (_P, _P, _P, _P),
    "ggml_new_graph": (_P, _P),
    "ggml_build_forward_expand": (None, _P, _P),
    "ggml_tensor_overhead": (c_size_t,),
    "ggml_graph_overhead": (c_size_t,),
    "ggml_get_data": (_P, _P),
    "ggml_nbytes": (c_size_t, _P),
    "ggml_backend_alloc_ctx_tensors_from_buft": (_P, _P, _P),
    "ggml_backend_buffer_get_base": (_P, _P),
    "ggml_backend_buffer_get_size": (c_size_t, _P),
    "ggml_backend_buffer_free": (None, _P),
    "ggml_backend_buft_name": (c_char_p, _P),
    "ggml_backend_tensor_set": (None, _P, _P, c_size_t, c_size_t),
    "ggml_backend_graph_compute": (c_int, _P, _P),
    "ggml_backend_free": (None, _P),
    "ggml_backend_cpu_buffer_type": (_P,),
    "ggml_backend_reg_get_proc_address": (_P, _P, c_char_p),
    "ggml_backend_reg_dev_get": (_P, _P, c_size_t),
    "ggml_get_type_traits": (_P, c_int),
    "ggml_version": (c_char_p,),
}
_CPU = {
    "ggml_backend_cpu_init": (_P,),
    "ggml_backend_cpu_set_n_threads": (None, _P, c_int),
    "ggml_backend_cpu_reg": (_P,),
}


class _Traits(ctypes.Structure):
    """The first fields of ggml's struct `ggml_type_traits`; the rest is not read."""

    _fields_ = (
        ("name", c_char_p),
        ("block", _N),
        ("interleave", _N),
        ("size", c_size_t),
        ("quantized", c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, _P, _P, _N)),
    )


_SILENT = ctypes.CFUNCTYPE(None, c_int, c_char_p, _P)(lambda level, text, data: None)


@cache
def library() -> ctypes.CDLL:
    """ggml with the signatures used here. UnsupportedError E5120 when the package llama_cpp is not
    installed.
    """
    folders = getattr(find_spec("llama_cpp"), "submodule_search_locations", None) or []
    found = {
        name: next((p for f in folders for p in sorted(Path(f, "lib").glob(f"*{name}.*"))), None)
        for name in ("ggml-base", "ggml-cpu")
    }
    if None in found.values():
        raise refusal("E5120", "llama_cpp", expected="ggml-base, ggml-cpu")
    base, cpu = (ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL) for path in found.values())
    for lib, table in ((base, _BASE), (cpu, _CPU)):
        for name, (result, *args) in table.items():
            if not hasattr(lib, name):  # some moved between the two libraries
                lib = cpu if lib is base else base
            function = getattr(lib, name)
            function.restype, function.argtypes = result, args
            setattr(base, name, function)
    base.ggml_log_set(ctypes.cast(_SILENT, _P), None)
    return base


def version() -> str:
    """The version of the ggml library itself, which llama_cpp carries."""
    return library().ggml_version().decode()


def quantize(ggml_type: int, x: np.ndarray) -> np.ndarray:
    """`ggml_quantize_chunk` without an importance matrix: f32 [N, K] -> u8 [N, row bytes]."""
    x = np.ascontiguousarray(x, np.float32)
    rows, width = x.shape
    out = np.empty((rows, formats.row_bytes(ggml_type, width)), np.uint8)
    written = library().ggml_quantize_chunk(ggml_type, x.ctypes.data, out.ctypes.data, 0, rows, width, None)
    if written != out.nbytes:
        raise ValueError(f"ggml wrote {written} bytes for {out.nbytes}")
    return out


def dequantize(ggml_type: int, data: np.ndarray, out: np.ndarray) -> np.ndarray:
    """ggml's `to_float` of one type: u8, contiguous -> `out` f32."""
    traits = ctypes.cast(library().ggml_get_type_traits(ggml_type), ctypes.POINTER(_Traits)).contents
    traits.to_float(data.ctypes.data, out.ctypes.data, out.size)
    return out


def _repack_buffers() -> int | None:
    """The CPU's buffer type whose weights are stored interleaved by eight rows (what llama.cpp uses by
    default); None where ggml has none.
    """
    g = library()
    registry = g.ggml_backend_cpu_reg()
    address = g.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
    if not address:
        return None
    kinds = ctypes.CFUNCTYPE(ctypes.POINTER(_P), _P)(address)(g.ggml_backend_reg_dev_get(registry, 0))
    i = 0
    while kinds and kinds[i]:
        if b"REPACK" in g.ggml_backend_buft_name(kinds[i]):
            return kinds[i]
        i += 1
    return None


class Graph:
    """A linear layer or a layer's experts in ggml, with copies of the weights in plain memory or (`repack`)
    in its interleaved layout.

    The memory is asked to lie in 2 MB pages, as numpy's does. Close it when done.
    """

    def __init__(self, threads: int, repack: bool = False):
        g = self.g = library()
        self.backend = g.ggml_backend_cpu_init()
        g.ggml_backend_cpu_set_n_threads(self.backend, threads)
        room = _Memory(64 * g.ggml_tensor_overhead() + g.ggml_graph_overhead(), None, True)
        self.plain, self.packed, self.rest = (g.ggml_init(room) for _ in range(3))
        self.graph = g.ggml_new_graph(self.rest)
        self.repack = _repack_buffers() if repack else None
        self.inputs: list[int] = []
        self.buffers: list[int] = []

    def experts(self, gate: Packed, up: Packed, down: Packed, tokens: int, chosen: int) -> Graph:
        """down(silu(gate) * up) of the chosen experts: inputs x f32 [T, D], ids i32 [T, A]; result f32 [T, A,
        D].
        """
        g = self.g
        x = g.ggml_new_tensor_3d(self.rest, F32, gate.shape[2], 1, tokens)
        ids = g.ggml_new_tensor_2d(self.rest, I32, chosen, tokens)
        sides = self._weights(gate, up, down)
        both = [g.ggml_mul_mat_id(self.rest, w, x, ids) for w in sides[:2]]
        return self._finish(
            [x, ids],
            g.ggml_mul_mat_id(self.rest, sides[2], g.ggml_swiglu_split(self.rest, *both), ids),
            (tokens, chosen, down.shape[1]),
        )

    def linear(self, w: Packed, tokens: int) -> Graph:
        """Input x f32 [T, K]; result f32 [T, N]."""
        x = self.g.ggml_new_tensor_2d(self.rest, F32, w.shape[1], tokens)
        return self._finish([x], self.g.ggml_mul_mat(self.rest, self._weights(w)[0], x), (tokens, w.shape[0]))

    def __call__(self, *inputs: np.ndarray) -> np.ndarray:
        """Set the inputs, compute, and return the result, a view that the next call overwrites."""
        for tensor, value in zip(self.inputs, inputs):
            value = np.ascontiguousarray(value)
            assert value.nbytes == self.g.ggml_nbytes(tensor)
            self.g.ggml_backend_tensor_set(tensor, value.ctypes.data, 0, value.nbytes)
        if self.g.ggml_backend_graph_compute(self.backend, self.graph):
            raise RuntimeError("ggml failed")
        return self.out

    def close(self) -> None:
        """Free the peer's copies of the weights."""
        for buffer in self.buffers:
            self.g.ggml_backend_buffer_free(buffer)
        for context in (self.plain, self.packed, self.rest):
            self.g.ggml_free(context)
        self.g.ggml_backend_free(self.backend)

    def _weights(self, *weights: Packed) -> list[int]:
        g, tensors = self.g, []
        for w in weights:
            place = self.packed if self.repack and formats.type_name(w.ggml_type) in REPACKED else self.plain
            new = g.ggml_new_tensor_3d if len(w.shape) == 3 else g.ggml_new_tensor_2d
            tensors.append(new(place, w.ggml_type, *reversed(w.shape)))
        self._allocate(self.plain, g.ggml_backend_cpu_buffer_type())
        if self.repack:
            self._allocate(self.packed, self.repack)
        for tensor, w in zip(tensors, weights):
            g.ggml_backend_tensor_set(tensor, w.data.ctypes.data, 0, w.data.nbytes)
        return tensors

    def _allocate(self, context: int, kind: int) -> None:
        buffer = self.g.ggml_backend_alloc_ctx_tensors_from_buft(context, kind)
        if buffer:  # none where the context is empty
            self.buffers.append(buffer)
            start, size = (
                self.g.ggml_backend_buffer_get_base(buffer),
                self.g.ggml_backend_buffer_get_size(buffer),
            )
            low, high = -(-start // 4096) * 4096, (start + size) // 4096 * 4096
            ctypes.CDLL(None).madvise(c_void_p(low), c_size_t(high - low), HUGE_PAGES)

    def _finish(self, inputs: list[int], out: int, shape: tuple[int, ...]) -> Graph:
        g = self.g
        g.ggml_build_forward_expand(self.graph, out)
        self._allocate(self.rest, g.ggml_backend_cpu_buffer_type())
        self.inputs = inputs
        size = int(np.prod(shape)) * 4
        memory: Any = (ctypes.c_char * size).from_address(g.ggml_get_data(out))
        self.out = np.frombuffer(memory, np.float32).reshape(shape)
        return self


def _keep_stdout() -> None:
    """Let what libraries print to file descriptor 1 go to the error output, and sys.stdout where it went."""
    if sys.stdout is sys.__stdout__ is not None:
        print(end="", flush=True)
        sys.stdout = open(os.dup(1), "w")  # noqa: SIM115
        os.dup2(2, 1)


def kt_experts(
    threads: int, tokens: int, chosen: int, sides: tuple[Packed, Packed, Packed]
) -> Callable | None:
    """kt_kernel's experts on GGUF blocks: f(x f32 [T, D], ids [T, A], weights f32 [T, A]) -> f32 [T, D]; None
    where the package is not installed.

    Its class for Python wants pinned memory, so a GPU; the extension below does not. It takes and gives
    bfloat16, and keeps a copy of the weights.
    """
    try:
        from kt_kernel import kt_kernel_ext as kt  # optional: a peer
    except Exception:  # whatever its many parts raise where they cannot be loaded
        return None
    _keep_stdout()
    experts, width, hidden = sides[0].shape
    pool = kt.WorkerPoolConfig()
    pool.subpool_count, pool.subpool_numa_map, pool.subpool_thread_count = 1, [0], [threads]
    cpu, on_gpu = kt.CPUInfer(pool), np.zeros(experts, np.uint8)
    config = kt.moe.MOEConfig(experts, chosen, hidden, width, on_gpu.ctypes.data)
    config.pool, config.layer_idx, config.m_block, config.group_min_len = cpu.backend_, 0, 32, 10
    config.max_len = config.group_max_len = max(tokens, 16)
    for name, side in zip(("gate", "up", "down"), sides):
        setattr(config, f"{name}_proj", side.data.ctypes.data)
        setattr(config, f"{name}_type", kt.kvcache.ggml_type(side.ggml_type))
    config.hidden_type = kt.kvcache.ggml_type(BF16)
    moe, order = kt.moe.MOE(config), np.arange(experts, dtype=np.int64)
    cpu.submit(moe.load_weights_task(order.ctypes.data))
    cpu.sync()

    def run(x: np.ndarray, ids: np.ndarray, weights: np.ndarray) -> np.ndarray:
        half, ids, out = (
            bf16.quantize(x),
            np.ascontiguousarray(ids, np.int64),
            np.empty((*x.shape, 2), np.uint8),
        )
        count, _alive = np.array([len(x)], np.int32), (on_gpu, config)
        args = (count, ids.shape[1], ids, weights, half, out)
        cpu.submit(
            moe.forward_task(*(a.ctypes.data if isinstance(a, np.ndarray) else a for a in args), False)
        )
        cpu.sync()
        return bf16.dequantize(out.reshape(len(x), -1))

    return run
