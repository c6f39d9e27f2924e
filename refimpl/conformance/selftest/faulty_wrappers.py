"""Faults around a kernel rather than in its arithmetic: memory, threads, strides, addresses; and faulty
caches.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from refimpl import ops
from refimpl.cache import LatentCache
from refimpl.conformance.selftest.mutant import Mutant
from refimpl.reference.experts import pick
from refimpl.tensors import Packed

Kernel = Callable[..., Any]


def by_address(f: Kernel) -> Kernel:
    """Remembers results by where the input lies."""
    known: dict[tuple, Any] = {}

    def kernel(x: np.ndarray, *rest: Any) -> Any:
        key = x.__array_interface__["data"][0], x.shape, x.strides
        if key not in known:
            known[key] = f(x, *rest)
        return known[key].copy()

    return kernel


def one_buffer(f: Kernel) -> Kernel:
    """Gives out the same memory at each call of one shape."""
    held: dict[tuple, np.ndarray] = {}

    def kernel(*args: Any) -> Any:
        y = f(*args)
        buffer = held.setdefault(y.shape, np.empty_like(y))
        buffer[...] = y
        return buffer

    return kernel


def in_place(f: Kernel) -> Kernel:
    """Uses its input as scratch memory."""

    def kernel(x: np.ndarray, *rest: Any) -> Any:
        y = f(x, *rest)
        if x.flags.writeable and x.size:
            x[..., -1] = 0
        return y

    return kernel


def weight_in_place(f: Kernel) -> Kernel:
    """Repacks the weight where it lies and puts back all but the last row."""

    def kernel(x: np.ndarray, w: Any, *rest: Any) -> Any:
        y = f(x, w, *rest)
        if isinstance(w, Packed) and w.data.flags.writeable:
            w.data[-1, -1] ^= 1
        return y

    return kernel


def shared_scratch(f: Kernel) -> Kernel:
    """A race: the input goes through scratch memory that all threads share."""
    scratch: list[Any] = [None]

    def kernel(x: np.ndarray, *rest: Any) -> Any:
        scratch[0] = x
        time.sleep(0.0005)  # a kernel without the interpreter lock is interrupted anywhere
        return f(scratch[0], *rest)

    return kernel


def racing_sum(f: Kernel) -> Kernel:
    """Some calls lose an update: what two threads add to one output without a lock."""
    calls = [0]

    def kernel(*args: Any) -> Any:
        y = f(*args).copy()
        calls[0] += 1
        if calls[0] % 7 == 0 and y.size:
            y.reshape(-1)[-1] = np.nextafter(y.reshape(-1)[-1], np.float32(np.inf))
        return y

    return kernel


def by_thread_count(f: Kernel) -> Kernel:
    """Sums in as many parts as there are threads."""
    from refimpl.kernels import linear_numba

    def kernel(x: np.ndarray, w: Any, *rest: Any) -> Any:
        y = f(x, w, *rest)
        return np.nextafter(y, np.float32(0)) if linear_numba.threads() > 1 else y

    return kernel


def last_not_written(f: Kernel) -> Kernel:
    """The last element stays what the memory held."""

    def kernel(*args: Any) -> Any:
        y = f(*args)
        out = np.empty(y.shape, y.dtype)
        out.reshape(-1)[:-1] = y.reshape(-1)[:-1]
        return out

    return kernel


def strides_ignored(f: Kernel) -> Kernel:
    """Reads as many bytes as it needs from where the input begins."""

    def kernel(x: np.ndarray, *rest: Any) -> Any:
        if x.flags.c_contiguous or not x.size or min(x.strides) < 0:
            return f(x, *rest)
        base = x
        while isinstance(base.base, np.ndarray):
            base = base.base
        flat = np.ascontiguousarray(base).reshape(-1).view(np.uint8)
        raw = np.resize(flat, x.nbytes).view(x.dtype)
        return f(raw.reshape(x.shape), *rest)

    return kernel


def aligned_down(f: Kernel) -> Kernel:
    """Loads from the address without its last bits."""

    def kernel(x: np.ndarray, *rest: Any) -> Any:
        off = x.__array_interface__["data"][0] % 4
        if not off or not x.size:
            return f(x, *rest)
        raw = np.roll(
            x.reshape(-1).view(np.uint8), off
        )  # what lies before the array, as if it were what lies at its end
        return f(raw.view(x.dtype).reshape(x.shape), *rest)

    return kernel


def writeable_only(f: Kernel) -> Kernel:
    """Asks for memory that it could write to."""

    def kernel(x: np.ndarray, *rest: Any) -> Any:
        if not x.flags.writeable:
            raise ValueError("buffer source array is read-only")
        return f(x, *rest)

    return kernel


def columns_as_rows(f: Kernel) -> Kernel:
    """Takes any array without gaps for one by rows."""

    def kernel(x: np.ndarray, *rest: Any) -> Any:
        return f(x.ravel(order="F").reshape(x.shape) if x.flags.f_contiguous else x, *rest)

    return kernel


def some_tokens(f: Kernel) -> Kernel:
    """The kernel cannot take zero tokens."""

    def kernel(x: np.ndarray, *rest: Any) -> Any:
        if not len(x):
            raise ZeroDivisionError("division by zero")
        return f(x, *rest)

    return kernel


def double(f: Kernel) -> Kernel:
    """The kernel returns float64 instead of float32."""
    return lambda *args: f(*args).astype(np.float64)


def flattened(f: Kernel) -> Kernel:
    """The kernel forgets the leading dimensions of x."""
    return lambda x, *rest: f(x.reshape(-1), *rest)


def odd_token_lost(f: Kernel) -> Kernel:
    """Tokens in pairs; of an odd number the last is the one before it again."""

    def kernel(x: np.ndarray, *rest: Any) -> Any:
        y = f(x, *rest)
        if len(x) > 1 and len(x) % 2:
            y[-1] = y[-2]
        return y

    return kernel


def rows_in_eights(f: Kernel) -> Kernel:
    """Outputs in eights; what is left over is zero."""

    def kernel(x: np.ndarray, w: Any, *rest: Any) -> Any:
        y = f(x, w, *rest)
        if y.shape[-1] > 8:
            y[..., y.shape[-1] // 8 * 8 :] = 0
        return y

    return kernel


def nan_hidden(f: Kernel) -> Kernel:
    """A NaN becomes zero on the way."""
    return lambda x, *rest: f(np.nan_to_num(x, nan=0.0, posinf=np.inf, neginf=-np.inf), *rest)


def nan_everywhere(f: Kernel) -> Kernel:
    """One NaN spoils the whole batch."""

    def kernel(x: np.ndarray, *rest: Any) -> Any:
        y = f(x, *rest)
        return y * np.float32(np.nan) if np.isnan(x).any() else y

    return kernel


def offset_in_31_bits(f: Kernel) -> Kernel:
    """An expert's address is computed in 32 bits."""

    def kernel(
        x: np.ndarray, ids: np.ndarray, weights: np.ndarray, gate: Any, up: Any, down: Any, *rest: Any
    ) -> Any:
        def wrapped(e: int) -> int:
            stride = gate.data[0].nbytes if isinstance(gate, Packed) else 0
            return e if e * stride < 2**31 else (e * stride - 2**31) // stride

        chosen = np.vectorize(wrapped, otypes=[np.int64])(ids) if ids.size else ids
        return f(x, chosen, weights, gate, up, down, *rest)

    return kernel


def row_offsets_in_32_bits(f: Kernel) -> Kernel:
    """Counts the elements before a row of x, or of a packed weight, in a signed integer of 32 bits; rows
    behind that are the first again.
    """

    def seen(a: np.ndarray) -> np.ndarray:
        step = a.strides[0] // a.itemsize if a.ndim == 2 else 0
        return a[[i if i * step < 2**31 else 0 for i in range(len(a))]]

    def kernel(x: np.ndarray, w: Any, *rest: Any) -> Any:
        w = Packed(seen(w.data), w.ggml_type, w.shape) if isinstance(w, Packed) else w
        return f(x if isinstance(w, Packed) else seen(x), w, *rest)

    return kernel


def reads_the_next(f: Kernel) -> Kernel:
    """Prefetches the expert behind a chosen one into its sum, times zero."""

    def kernel(
        x: np.ndarray, ids: np.ndarray, weights: np.ndarray, gate: Any, up: Any, down: Any, *rest: Any
    ) -> Any:
        y = f(x, ids, weights, gate, up, down, *rest)
        count = len(gate.data) if isinstance(gate, Packed) else len(gate)
        if len(x) and ids.size and count > 1:
            next_ = int(ids.reshape(-1)[0] + 1) % count
            y[0] += (
                np.float32(0)
                * ops.OPS["swiglu"].reference(
                    x[:1], pick(gate, next_), pick(up, next_), pick(down, next_), *rest
                )[0]
            )
        return y

    return kernel


def out_too_long(f: Kernel) -> Kernel:
    """Writes one element behind its output."""

    def kernel(*args: Any, out: np.ndarray | None = None) -> Any:
        y = f(*args)
        if out is None:
            return y
        out[...] = y
        base = out
        while isinstance(base.base, np.ndarray):
            base = base.base
        if base.ndim == 1 and base.size > out.size:
            base[
                (out.__array_interface__["data"][0] - base.__array_interface__["data"][0]) // out.itemsize
                + out.size
            ] = 0
        return out

    return kernel


def out_added_to(f: Kernel) -> Kernel:
    """Adds to its output, without clearing it."""

    def kernel(*args: Any, out: np.ndarray | None = None) -> Any:
        y = f(*args)
        if out is not None:
            out += y
        return y

    return kernel


def _around(name: str, op: str, wrap: Callable[[Kernel], Kernel], **declared: Any) -> Mutant:
    return Mutant(name, op, lambda: wrap(ops.load(op, "cpu")), declared)


# --- caches -------------------------------------------------------------------------------------------------


class KeepsOneTooFew(LatentCache):
    """Truncates one token too far."""

    def truncate(self, length: int) -> None:
        super().truncate(max(0, length - (0 < length < self.length)))


class ForgetsWhenGrowing(LatentCache):
    """New memory, without what the old held."""

    def reserve(self, new: int) -> None:
        before = self._rows.shape[1]
        super().reserve(new)
        if self._rows.shape[1] != before:
            self._rows[:, : self.length] = 0


class CountsTooEarly(LatentCache):
    """The first layer's pass makes the tokens present; a pass that is interrupted leaves them."""

    def extend(self, layer: int, latent: np.ndarray, k_pe: np.ndarray, *index: np.ndarray) -> Any:
        found = super().extend(layer, latent, k_pe, *index)
        self.length += len(latent) if layer == len(self._rows) - 1 or layer == 0 else 0
        return found

    def advance(self, new: int) -> None:
        self.length -= new if self.length >= new else 0


class OneLayerForAll(LatentCache):
    """All layers in the rows of the first."""

    def extend(self, layer: int, latent: np.ndarray, k_pe: np.ndarray, *index: np.ndarray) -> Any:
        return super().extend(0, latent, k_pe, *index)


class OffByOne(LatentCache):
    """New rows go one place too early, once there are any."""

    def extend(self, layer: int, latent: np.ndarray, k_pe: np.ndarray, *index: np.ndarray) -> Any:
        found = super().extend(layer, latent, k_pe, *index)
        if self.length:
            self._rows[layer, self.length - 1, : self.split] = latent[0]
        return found


class NoLimit(LatentCache):
    """Grows past the context that the model was trained for."""

    def check(self, length: int) -> None:
        self.limit = max(self.limit, length)


class ResetKeepsTheLast(LatentCache):
    """A cache that forgets all tokens but one where it should forget all."""

    def truncate(self, length: int) -> None:
        super().truncate(length)
        self.length = max(self.length, min(1, self._rows.shape[1]))


def _cache(name: str, kind: type[LatentCache]) -> Mutant:
    return Mutant(name, "latent_cache", partial(lambda k: k, kind))


FAULTY_WRAPPERS = (
    _around("result cached by address", "q4_k.dequantize", by_address),
    _around("result cached by the address of x", "linear", by_address, weights=("q4_k", "fp8")),
    _around("stale output: one buffer for all calls", "rms_norm", one_buffer),
    _around("one buffer for all decoded blocks", "q6_k.dequantize", one_buffer),
    _around("input modified", "rope", in_place),
    _around("blocks modified", "q8_0.dequantize", in_place),
    _around("weight modified", "linear", weight_in_place, weights=("q4_k", "q6_k")),
    _around("race between threads: shared scratch", "rms_norm", shared_scratch),
    _around("race between threads: shared blocks", "q5_k.dequantize", shared_scratch),
    _around("a sum that loses an update", "linear", racing_sum, weights=("fp8",)),
    _around("result depends on the number of threads", "linear", by_thread_count, weights=("q4_k",)),
    _around("last element not written", "rms_norm", last_not_written),
    _around("strides ignored", "q4_k.dequantize", strides_ignored),
    _around("strides of x ignored", "rms_norm", strides_ignored),
    _around("address rounded down", "e4m3.encode", aligned_down),
    _around("refuses read-only memory", "q6_k.dequantize", writeable_only),
    _around("reads by columns as if by rows", "rms_norm", columns_as_rows),
    _around("no tokens: division by zero", "linear", some_tokens, weights=("q4_k",)),
    _around("result in float64", "rms_norm", double),
    _around("leading dimensions lost", "q8_0.dequantize", flattened),
    _around("odd token lost", "linear", odd_token_lost, weights=("q4_k",)),
    _around("rows left over after eights", "linear", rows_in_eights, weights=("q6_k",)),
    _around("NaN hidden", "linear", nan_hidden, weights=("q4_k", "q8_0")),
    _around("NaN spoils the batch", "rms_norm", nan_everywhere),
    _around("offset in 31 bits", "experts", offset_in_31_bits),
    _around("row offsets in 32 bits", "rms_norm", row_offsets_in_32_bits),
    _around("row offsets of the weight in 32 bits", "linear", row_offsets_in_32_bits, weights=("q4_k",)),
    _around("reads an expert nobody chose", "experts", reads_the_next),
    _around("writes past its output", "q4_k.dequantize", out_too_long),
    _around("output not cleared", "rms_norm", out_added_to),
    _cache("truncates one too far", KeepsOneTooFew),
    _cache("forgets when it grows", ForgetsWhenGrowing),
    _cache("interrupted pass stays", CountsTooEarly),
    _cache("one layer's rows for all", OneLayerForAll),
    _cache("off by one", OffByOne),
    _cache("no limit", NoLimit),
    _cache("reset keeps the last token", ResetKeepsTheLast),
)
