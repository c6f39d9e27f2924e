"""Reference: refimpl.reference.fp8.linear. Block-scaled FP8 linears on a GPU of compute capability 8.0 or
later, by the kernels of `fp8_gemm_triton`, `fp8_stream_gluon`, `fp8_wide_gluon` and `fp8_exact_gluon`.

Two arithmetics: "fp8" (W8A8) multiplies codes by codes, "exact" (W8A16) leaves the activations as they are,
bf16 or f32, and widens the weights' codes inside the kernel. Which tiles a product is cut into follows from
its shape and the GPU (`tiles`); nothing is tried out at run time, and the same call gives the same bits every
time.
"""

from __future__ import annotations

from functools import cache
from threading import Lock
from typing import Any

import torch
import triton
from triton.testing import get_dram_gbps

from refimpl.entered import entered
from refimpl.kernels import fp8_exact_gluon as exact
from refimpl.kernels import fp8_gemm_triton as gemm
from refimpl.kernels import fp8_stream_gluon as streamed
from refimpl.kernels import fp8_wide_gluon as wide
from refimpl.kernels.act_quant_triton import act_quant
from refimpl.kernels.e4m3_triton import INTERPRETED, capability, follows, native
from refimpl.kernels.fp8_tiles import H100_GBPS, Tiles, band, deal, launches, stages, tiles
from refimpl.reference.fp8 import BLOCK
from refimpl.tensors import ScaledFP8

COUNTERS = 1 << 20  # of arrivals, handed out in turn


# How a product comes to its kernel:
#
#     x               activations       first        then
#     codes, scales   any               -            on Hopper fp8_stream_gluon.stream, fp8_wide_gluon.stream,
#                                                    or both one after the other,
#     f32, bf16       "fp8", "ue8m0"    act_quant    else fp8_gemm_triton.split: codes times codes
#     bf16            "exact"           -            fp8_exact_gluon.stream for many tokens on Hopper,
#     f32, bf16       "exact"           -            else fp8_gemm_triton.split: numbers times widened codes
def linear(
    x: torch.Tensor | ScaledFP8, w: ScaledFP8, activations: str = "fp8", dtype: torch.dtype | None = None
) -> torch.Tensor:
    """x [..., K] times the transpose of w [N, K] -> [..., N] in `dtype` (bf16 or f32; that of x, and bf16 for
    quantized x, by default).

    x is bf16 or f32, or quantized already ([M, K], as the fused kernels of `act_quant_triton` leave it). Sums
    are kept in f32. From Hopper on, weights may be fetched while launches before this one still run, of
    linears and of what quantizes. So weights that a kernel has just written need a launch of another kind, or
    an end that is waited for, between that kernel and this.
    """
    if activations not in ("fp8", "ue8m0", "exact"):
        raise ValueError(f'activations are "fp8", "ue8m0" or "exact", not {activations!r}')
    if isinstance(x, ScaledFP8):
        return _product(x.codes, x.scale, w, dtype or torch.bfloat16)
    flat = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    dtype = dtype or x.dtype
    if activations == "exact":
        y = _product(flat, None, w, dtype)
    else:
        y = _product(*act_quant(flat, activations == "ue8m0"), w, dtype)
    return y.view(*x.shape[:-1], len(w.codes))


def _product(
    x: torch.Tensor, x_scale: torch.Tensor | None, w: ScaledFP8, dtype: torch.dtype, tile: Tiles | None = None
) -> torch.Tensor:
    """x [M, K], codes u8 with their scales f32 [M, ceil(K/128)], or bf16 or f32 without, times the transpose
    of w [N, K] -> [M, N] in `dtype`, in tiles of the caller's choice or those of the table. ValueError where
    K differs.
    """
    (m, k), n = x.shape, len(w.codes)
    if w.codes.shape[1] != k:
        raise ValueError(f"x has {k} columns and the weights {w.codes.shape[1]}")
    y = torch.empty(m, n, dtype=dtype, device=x.device)
    if not y.numel():
        return y
    if not k:
        return y.zero_()
    x = x if x.stride(1) == 1 else x.contiguous()
    strides = (x.stride(0), *(x_scale.stride() if x_scale is not None else (0, 0)))
    # A stride that nothing is multiplied by may be anything, and another kernel would be compiled for it.
    if m == 1:
        groups = x_scale.stride(1) if x_scale is not None and x_scale.shape[1] > 1 else 1
        strides = (k, *((1, groups) if x_scale is not None else (0, 0)))
    left = x if x_scale is None else native(x)
    weights = (native(w.codes), torch.as_tensor(w.scale).contiguous())
    parts = ((n, tile),) if tile else _parts(left, weights[0], y, (m, n, k), strides[0])
    first = 0
    for outputs, part in parts:
        these = (*weights, y)
        if outputs < n:  # from a multiple of 128 on
            blocks = slice(first // BLOCK, triton.cdiv(first + outputs, BLOCK))
            rows = slice(first, first + outputs)
            these = weights[0][rows], weights[1][blocks], y[:, rows]
        shape = m, outputs, k
        kernel, grid, arguments, options = _launch(left, x_scale, *these, shape, strides, x.device, part)
        if "launch_pdl" in options and not torch.as_tensor(w.codes).is_contiguous():
            options["launch_pdl"] = False  # the copy of the weights is the launch before
        kernel[grid](*arguments, **options)
        first += outputs
    return y


def _launch(
    x, x_scale, w, w_scale, y, shape, strides, device, tile=None
) -> tuple[Any, tuple[int, ...], tuple, dict[str, Any]]:
    """Kernel, grid, arguments and options of a product of shape (M, N, K). Instead of tensors x, x_scale, w,
    w_scale and y there may be their dtypes, where it is only to be compiled; `strides` are x_row, scale_row
    and scale_group.
    """
    m, n, k = shape
    plain = isinstance(x, torch.dtype)
    kind = {torch.bfloat16: "bf16", torch.float32: "f32"}.get(x if plain else x.dtype, "fp8")
    tile = tile or picked(m, n, k, device, kind)
    # What the copy engine cannot address goes the way of a chip without one.
    if tile.kernel != "split" and not _copyable(x, w, y, shape, strides[0]):
        tile = tiles(m, n, k, (8, 9), processors(device), kind)
    if tile.kernel != "split":
        size = "few tokens" if tile.tokens < 64 else f"{tile.outputs} outputs"
        entered(f"persistent{'' if kind == 'fp8' else ' bf16'}, {size}")
        return _launch_stream(x, x_scale, w, w_scale, y, shape, strides[1:], device, tile)
    grid = (triton.cdiv(n, tile.outputs), tile.splits, triton.cdiv(m, tile.tokens))
    entered(f"{kind}, {tile.outputs} outputs", "K in parts" if tile.splits > 1 else "K in one")
    if tile.splits == 1:  # not used
        partial = y
        arrived = y
    elif plain:
        partial = torch.float32
        arrived = torch.int32
    else:
        partial = torch.empty(tile.splits, m, n, dtype=torch.float32, device=device)
        arrived = _counters(device).take(grid[0] * grid[2])
    blocks_each = triton.cdiv(triton.cdiv(k, BLOCK), tile.splits)
    arguments = (
        x,
        x if x_scale is None else x_scale,
        w,
        w_scale,
        y,
        partial,
        arrived,
        m,
        n,
        k,
        *strides,
        blocks_each,
    )
    values = constants(tile, kind, k) | {"num_warps": tile.warps}
    early_start = follows(device)
    values |= {"FOLLOWS": early_start, "EARLY": early(blocks_each)}
    values |= {"launch_pdl": True} if early_start else {}
    return gemm.split, grid, arguments, values


def picked(m: int, n: int, k: int, device: torch.device, kind: str = "fp8") -> Tiles:
    """What the table picks on that device for a product of this shape in one launch; `kind`: "fp8", "bf16" or
    "f32" activations.
    """
    return tiles(m, n, k, capability(device), processors(device), kind, memory_gbps(device))


def _parts(x, w, y, shape, x_row) -> tuple[tuple[int, Tiles | None], ...]:
    """The launches of a product of codes: outputs, and their tiles, or those of the table."""
    _m, n, _k = shape
    if x.dtype in (torch.bfloat16, torch.float32) or not _copyable(x, w, y, shape, x_row):
        return ((n, None),)
    device = x.device
    parts = launches(*shape, capability(device), processors(device), "fp8", memory_gbps(device))
    if len(parts) > 1:
        entered("outputs in two launches")
    return parts


def _copyable(x, w, y, shape, x_row) -> bool:
    """Whether the copy engine can address x, w and y: rows side by side, a multiple of 16 bytes long and
    starting at one.
    """
    _m, n, k = shape
    if isinstance(x, torch.dtype):
        return k % 16 == 0 and n * y.itemsize % 16 == 0 and x_row == k
    return (
        k % 16 == 0
        and n * y.dtype.itemsize % 16 == 0
        and x_row == k
        and x.data_ptr() % 16 == w.data_ptr() % 16 == 0
    )


def _launch_stream(
    x, x_scale, w, w_scale, y, shape, scale_strides, device, tile: Tiles
) -> tuple[Any, tuple[int, ...], tuple, dict[str, Any]]:
    """Kernel, grid, arguments and options of a product by the persistent kernel; arguments as `_launch`."""
    m, n, k = shape
    count = triton.cdiv(m, tile.tokens) * triton.cdiv(n, tile.outputs)
    dealt = deal(count, triton.cdiv(k, BLOCK), processors(device) * tile.beside, tile.splits)
    plain = isinstance(y, torch.dtype)
    if plain or tile.kernel == "wide":
        partial, arrived = torch.float32, torch.int32
    elif dealt.shared:
        parts = (dealt.programs, 2, tile.tokens, tile.outputs)  # [., 2, groups, 64, width] to the kernel
        partial = torch.empty(parts, dtype=torch.float32, device=device)
        groups = max(tile.tokens, tile.outputs) // 64  # at most: as many arrivals a tile
        arrived = _counters(device).take(dealt.rest * groups)
    else:  # not used
        partial, arrived = w_scale, torch.empty(0, dtype=torch.int32, device=device)
    kind = "bf16" if x_scale is None else "fp8"
    values = persistent(tile, (y if plain else y.dtype).itemsize, kind, k) | {"launch_pdl": True}
    dealing = (dealt.rounds, dealt.rest, dealt.each, band(k))
    shared = (partial, arrived, m, n, k)
    if kind == "bf16":
        described = streamed.describe(x, w, y, shape, tile, (tile.tokens, 64), device)
        return exact.stream, (dealt.programs,), (*described, w_scale, *shared, *dealing), values
    result = (min(tile.tokens, 64), min(tile.outputs, 128))
    described = streamed.describe(x, w, y, shape, tile, result, device)
    scales = (*described, x_scale, w_scale)
    if tile.kernel == "wide":
        return wide.stream, (dealt.programs,), (*scales, m, n, k, *scale_strides, *dealing), values
    return streamed.stream, (dealt.programs,), (*scales, *shared, *scale_strides, *dealing), values


def early(blocks: int) -> int:
    """Blocks of weights that a program of so many asks for while the kernel before it ends. More of them, or
    of a short program, come between those that this kernel waits for. Measured.
    """
    return 2 if blocks >= 12 else 0


def persistent(tile: Tiles, itemsize: int, kind: str, k: int) -> dict[str, Any]:
    """What a persistent kernel is compiled with, for K columns, results of `itemsize` bytes, and "fp8" or
    "bf16" activations.
    """
    values = constants(tile, kind, k) | {"num_warps": tile.warps, "STAGES": stages(tile, itemsize, kind)}
    if tile.kernel == "gluon":
        values["EARLY"] = kind == "fp8" and tile.tokens <= 64  # faster there, measured
    if tile.outputs == 64 and tile.tokens <= 64:
        # So that two programs fit a processor, or three; with what the fetching warp gives back, 232 and 104.
        values["maxnreg"] = 128 if tile.tokens == 64 else 64
    return values


def constants(tile: Tiles, kind: str, k: int) -> dict[str, Any]:
    """What the kernel of a tile is compiled with, for K columns and "fp8", "bf16" or "f32" activations."""
    sizes = {"BN": tile.outputs, "BM": tile.tokens}
    if tile.kernel != "split":
        return sizes if tile.kernel == "gluon" else {}
    return sizes | {
        "SPLIT": tile.splits > 1,
        "SCALED": kind == "fp8",
        "EVEN": k % BLOCK == 0,
        "STAGES": tile.stages,
    }


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of the GPU; few for the interpreter, which does them one by one."""
    return 4 if INTERPRETED.value else torch.cuda.get_device_properties(device).multi_processor_count


@cache
def memory_gbps(device: torch.device) -> float:
    """GB/s that the GPU's memory moves, by its clock and width as the driver gives them. Those of an H100 for
    the interpreter, and where the driver does not say.
    """
    return H100_GBPS if INTERPRETED.value else get_dram_gbps(device.index) or H100_GBPS


class _Counters:
    """Zeros that a launch counts its arrivals in and leaves as zeros. Launches under way at the same time get
    different ones.
    """

    def __init__(self, device: torch.device):
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "call the linear once before capturing it in a CUDA graph: its counters must outlive the "
                "graph"
            )
        self.zeros = torch.zeros(COUNTERS, dtype=torch.int32, device=device)
        self.next = 0
        self.lock = Lock()

    def take(self, n: int) -> torch.Tensor:
        """The next n counters, i32 [n]; from the first on when they have been handed out."""
        with self.lock:  # threads launch on streams of their own
            # The interpreter ends a launch before the next begins. There all get the first ones, so that one
            # that is not left as zero is found at once.
            if INTERPRETED.value or self.next + n > COUNTERS:
                self.next = 0
            first = self.next
            self.next += n + -n % 4  # 16 bytes: at other addresses another kernel would be compiled for them
        return self.zeros[first : first + n]


@cache
def _counters(device: torch.device) -> _Counters:
    return _Counters(device)
