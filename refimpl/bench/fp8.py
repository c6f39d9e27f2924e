"""The FP8 linears on a GPU: `python -m refimpl.bench fp8`, at DeepSeek-V3's shapes.

Each result is compared with the reference first. Then each contender is captured in a CUDA graph that goes
through copies of the weights, CACHE bytes or more in all, so that none is in the GPU's cache, and the graph's
replays are timed: kernels and the gaps between them, no Python. `floor` is the time to read the weights once
at the bandwidth of a large copy (bytes read plus bytes written), or to do the arithmetic at the rate of a
large E4M3 product, whichever is longer; both are measured first.

    ours a16        bf16 activations as they are ("exact")
    ours a8         codes by codes ("fp8"), the quantization done by the operation before, as between a norm
    and its linear
    ours q+a8       the same with the quantization as a launch of its own
    plain           kernels/fp8_plain_triton.py, the design of DeepSeek's and KTransformers' kernels, in the
    best of its tile sizes
    plain blind     the same in the tile that is best with the most tokens of the run: what a tuner that looks
    at N and K only, as theirs
                    does, keeps from a prompt for the tokens after it
    bf16            the dequantized weights by torch (cuBLAS)
    scaled_mm       torch's own block-scaled product (cuBLASLt), codes given
    deep_gemm       with --peers, which leaves the plain design out: DeepGEMM's, codes given and scales laid
                    out as it wants them, where it is installed (`pip install sgl-deep-gemm==0.1.3
                    apache-tvm-ffi==0.1.9` on torch 2.11 with CUDA 13). It is built by nvcc before it is
                    timed
    q+deep_gemm     the same with DeepGEMM's own function for quantizing before it
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from refimpl.bench.measure import Row, Settings
from refimpl.devices.speed import Result, copy_bandwidth, replay
from refimpl.errors import refusal
from refimpl.tensors import ScaledFP8

LAYER = {
    "q_a+kv_a": (2112, 7168),
    "q_b": (24576, 1536),
    "kv_b": (32768, 512),
    "o": (7168, 16384),
    "gate+up": (4096, 7168),
    "down": (7168, 2048),
}
DENSE = {"dense gate+up": (36864, 7168), "dense down": (7168, 18432)}
QUANTIZED = (1, 16, 4096)  # tokens, for the quantizers alone
TOKENS = (1, 16, 32, 64, 128, 256, 512, 4096)
CACHE = 256 << 20
DEVICE = "cuda"
OURS = ("ours a16", "ours a8", "ours q+a8")
CONTENDERS = (*OURS, "plain", "plain blind", "bf16", "scaled_mm", "deep_gemm", "q+deep_gemm")
PLAIN = [(tokens, outputs) for tokens in (16, 64) for outputs in (32, 64, 128)]  # tiles of the plain design
# of a row's largest number: bf16 output and what E4M3's units drop, many times over; a sieve, as in
# `bench.check`
TOLERANCE = 2e-2


class Limits(NamedTuple):
    """What this GPU reaches, measured: bytes of memory read, and operations in E4M3 and in bf16, each in a
    second.
    """

    bytes_s: float
    flops_s: float  # E4M3
    bf16_flops_s: float


# --- measuring ----------------------------------------------------------------------------------------------


def gpu() -> Any:
    """torch, where it has a GPU to run on. ResourceError E5131."""
    if importlib.util.find_spec("torch") and importlib.util.find_spec("triton"):
        import torch  # optional, and seconds to import

        if torch.cuda.is_available():
            return torch
    raise refusal("E5131", "bench fp8")


def measure_limits() -> Limits:
    """The bandwidth of a copy, and the rates of 8192-cubed products of random numbers."""
    torch = gpu()
    a, b = (torch.randn(8192, 8192, device=DEVICE).to(torch.bfloat16) for _ in range(2))
    bf16 = e4m3 = replay([lambda: a @ b.T]).seconds
    if torch.cuda.get_device_capability() >= (8, 9):
        one, c, d = torch.ones((), device=DEVICE), a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
        e4m3 = replay(
            [lambda: torch._scaled_mm(c, d.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)]
        ).seconds
    return Limits(copy_bandwidth() * 1e9, 2 * 8192**3 / e4m3, 2 * 8192**3 / bf16)


# --- contenders ---------------------------------------------------------------------------------------------


class Problem:
    """One shape: copies of the weights, activations of several lengths, and the truth for a few tokens of
    each.
    """

    def __init__(self, n: int, k: int, seed: int = 0):
        torch = self.torch = gpu()
        self.n, self.k = n, k
        make = torch.Generator(DEVICE).manual_seed(seed)
        codes = torch.randn(n, k, device=DEVICE, generator=make).to(torch.float8_e4m3fn).view(torch.uint8)
        scale = torch.rand(-(-n // 128), k // 128, device=DEVICE, generator=make) * 0.02 + 0.001
        self.copies = [ScaledFP8(codes.clone(), scale.clone()) for _ in range(-(-CACHE // codes.numel()))]
        self.make = make
        self.wide: list = []

    def activations(self, m: int) -> Any:
        x = self.torch.randn(m, self.k, device=DEVICE, generator=self.make) * 10.0 ** self.torch.randint(
            -1, 2, (m, 1), device=DEVICE, generator=self.make
        )
        return x.to(self.torch.bfloat16)

    def bf16(self) -> list:
        """The weights dequantized, in as many copies as leave the cache."""
        if not self.wide:
            from refimpl.kernels.act_quant_triton import weight_dequant  # Triton: needs a GPU

            count = -(-len(self.copies) // 2)
            self.wide = [weight_dequant(w, self.torch.bfloat16) for w in self.copies[:count]]
        return self.wide


def jobs(problem: Problem, x: Any, peers: bool) -> dict[str, Callable[[], Sequence[Callable[[], Any]]]]:
    """What makes each contender's calls, one for each copy of the weights. `peers`: DeepGEMM's instead of the
    plain design's.
    """
    torch = problem.torch
    from refimpl.kernels import fp8_linear_triton as ours  # Triton: needs a GPU
    from refimpl.kernels import fp8_plain_triton as plain  # Triton: needs a GPU
    from refimpl.kernels.act_quant_triton import act_quant  # Triton: needs a GPU

    quantized = ScaledFP8(*act_quant(x))
    made: dict[str, Callable[[], Sequence]] = {
        "ours a16": lambda: [partial(ours.linear, x, w, "exact") for w in problem.copies],
        "ours a8": lambda: [partial(ours.linear, quantized, w) for w in problem.copies],
        "ours q+a8": lambda: [partial(ours.linear, x, w) for w in problem.copies],
        "bf16": lambda: [partial(torch.mm, x, w.T) for w in problem.bf16()],
        "scaled_mm": lambda: [partial(scaled_mm, quantized, w) for w in problem.copies],
    }
    for tokens, outputs in () if peers else PLAIN:
        make = partial(
            lambda *tile: [partial(plain.linear, x, w, *tile) for w in problem.copies], tokens, outputs
        )
        made[f"plain {tokens}x{outputs}"] = make
    if peers and importlib.util.find_spec("deep_gemm"):
        made["deep_gemm"] = lambda: [partial(deep_gemm, _laid_out(quantized), w) for w in problem.copies]
        made["q+deep_gemm"] = lambda: [partial(deep_gemm, x, w) for w in problem.copies]
    return made


def scaled_mm(x: ScaledFP8, w: ScaledFP8) -> Any:
    """torch's product for 1x128 and 128x128 scales; it wants a multiple of four tokens, so fewer are filled
    up beforehand (not timed).
    """
    torch = gpu()
    a, b = torch.as_tensor(x.codes), torch.as_tensor(w.codes)
    codes, scale = _padded(a, torch.as_tensor(x.scale))
    e4m3 = torch.float8_e4m3fn
    y = torch._scaled_mm(
        codes.view(e4m3),
        b.view(e4m3).T,
        scale_a=scale,
        scale_b=torch.as_tensor(w.scale).T,
        out_dtype=torch.bfloat16,
    )
    return y[: len(a)]


_filled: dict[tuple[int, int], tuple[Any, Any]] = {}


def _padded(codes: Any, scale: Any) -> tuple[Any, Any]:
    if len(codes) % 4 == 0:
        return codes, scale
    key = (codes.data_ptr(), len(codes))
    if key not in _filled:
        torch = gpu()
        fill = -len(codes) % 4
        wide = torch.nn.functional.pad(scale, (0, 0, 0, fill))
        _filled.clear()
        _filled[key] = torch.nn.functional.pad(codes, (0, 0, 0, fill)), wide.T.contiguous().T
    return _filled[key]


def _laid_out(x: ScaledFP8) -> ScaledFP8:
    """x with its scales as DeepGEMM reads them, which it would otherwise do within each product."""
    return ScaledFP8(x.codes, importlib.import_module("deep_gemm").get_mn_major_tma_aligned_tensor(x.scale))


def deep_gemm(x: Any, w: ScaledFP8) -> Any:
    """DeepGEMM's product of FP8 codes with their scales, where it is installed, or of bf16 [M, K], which it
    quantizes.
    """
    torch, library = gpu(), importlib.import_module("deep_gemm")
    if not isinstance(x, ScaledFP8):
        quantize = importlib.import_module("deep_gemm.utils.math").per_token_cast_to_fp8
        x = _laid_out(ScaledFP8(*quantize(x, use_ue8m0=False)))
    a, b = torch.as_tensor(x.codes), torch.as_tensor(w.codes)
    y = torch.empty(len(a), len(b), dtype=torch.bfloat16, device=DEVICE)
    library.fp8_gemm_nt((a.view(torch.float8_e4m3fn), x.scale), (b.view(torch.float8_e4m3fn), w.scale), y)
    return y


def truth(problem: Problem, x: Any, how: str) -> Any:
    """f64 [few, N]: the tokens of `sample` by float64 from what is really multiplied."""
    torch = problem.torch
    from refimpl.kernels.act_quant_triton import act_quant, weight_dequant  # Triton: needs a GPU

    few = x[sample(len(x))]
    if how == "fp8":
        codes, scale = act_quant(few)
        few = codes.view(torch.float8_e4m3fn).double() * scale.double().repeat_interleave(128, dim=1)
    rows = [
        few.double() @ weight_dequant(ScaledFP8(c, s)).double().T for c, s in _row_tiles(problem.copies[0])
    ]
    return torch.cat(rows, dim=1)


def sample(m: int) -> list[int]:
    """Tokens that are compared: some of every part of a tile of 128."""
    return sorted({*range(0, m, max(1, m // 7)), m - 1})


def _row_tiles(w: ScaledFP8, rows: int = 8192) -> Iterator[tuple[Any, Any]]:
    for start in range(0, len(w.codes), rows):
        yield w.codes[start : start + rows], w.scale[start // 128 : -(-(start + rows) // 128)]


def attempt(calls: Callable[[], Sequence[Callable[[], Any]]], true: Any) -> Result:
    """Checked and timed; or what went wrong, in a few words."""
    try:
        made = calls()
        y = made[0]()
        y = y[sample(len(y))].double()
        off = float(
            ((y - true).abs() / (true.abs().amax(dim=1, keepdim=True) + 1e-30))
            .nan_to_num(nan=float("inf"))
            .max()
        )
        if not off <= TOLERANCE:
            return Result(float("inf"), failure=f"wrong: {off:.2g} off")
        return replay(made)
    except Exception as error:
        gpu().cuda.synchronize()
        return Result(
            float("inf"),
            failure=f"{type(error).__name__}: "
            f"{str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:150],
        )


def contend(problem: Problem, m: int, peers: bool, blind: str = "") -> tuple[dict[str, Result], str]:
    """All contenders at m tokens, the plain design in its best tile and in the one called `blind`; and what
    that best tile is called ("" where it is left out for `peers`).
    """
    x = problem.activations(m)
    true = {how: truth(problem, x, how) for how in ("exact", "fp8")}
    found = {
        name: attempt(calls, true["exact" if name in ("ours a16", "bf16") else "fp8"])
        for name, calls in jobs(problem, x, peers).items()
    }
    if peers:
        return found, ""
    tiles = {name: found.pop(name) for name in [*found] if name.startswith("plain")}
    best = min(tiles, key=lambda name: tiles[name].seconds)
    return found | {"plain": tiles[best], "plain blind": tiles[blind or best]}, best


# --- figures ------------------------------------------------------------------------------------------------


def floor(n: int, k: int, m: int, limits: Limits) -> float:
    """Seconds that reading the weights or the arithmetic takes at least."""
    return max(n * k / limits.bytes_s, 2.0 * m * n * k / limits.flops_s)


def rows(name: str, n: int, k: int, m: int, found: dict[str, Result], limits: Limits) -> Iterator[Row]:
    """The contenders' rows; ours with the fastest of the others as peer. Bytes are those of the codes, for
    all.
    """
    others = {c: r.seconds for c, r in found.items() if c not in OURS and not r.failure}
    for contender, result in found.items():
        if result.failure:
            continue
        gbps = n * k / result.seconds / 1e9
        row = Row(
            f"fp8 {name} M={m}",
            contender,
            f"{n}x{k}",
            1,
            result.seconds,
            result.spread,
            gbps,
            2.0 * m * n * k / result.seconds / 1e9,
            limits.bytes_s / 1e9,
            floor(n, k, m, limits) / result.seconds,
        )
        if others and contender in OURS:
            row.peer = min(others, key=lambda c: others[c])
            row.peer_median_s = others[row.peer]
            row.speedup_vs_peer = row.peer_median_s / result.seconds
        yield row


def table(results: dict[tuple[str, int], dict[str, Result]], limits: Limits, device: str) -> str:
    """Microseconds of every contender, sums over a MoE layer's linears, and the ratios that matter."""
    shapes = LAYER | DENSE
    lines = [
        f"{device}: copy {limits.bytes_s / 1e9:.0f} GB/s, E4M3 {limits.flops_s / 1e12:.0f} TFLOP/s, bf16 "
        f"{limits.bf16_flops_s / 1e12:.0f} TFLOP/s"
    ]
    names = [c for c in CONTENDERS if any(c in found for found in results.values())]
    lines.append(f"{'microseconds':14}{'N x K':>12}{'M':>6}{'floor':>9}" + "".join(f"{c:>12}" for c in names))
    failures: dict[tuple[str, str], tuple[str, int]] = {}
    for (name, m), found in results.items():
        n, k = shapes[name]
        cells = [found.get(c, Result(float("inf"), failure="-")) for c in names]
        failures |= {(c, r.failure): (name, m) for c, r in found.items() if r.failure}
        lines.append(
            f"{name:14}{f'{n}x{k}':>12}{m:6}{floor(n, k, m, limits) * 1e6:9.1f}"
            + "".join(_cell(r) for r in cells)
        )
    for m in sorted({m for _, m in results}):
        layer = {
            c: [
                results[name, m].get(c, Result(float("inf"))).seconds
                for name in LAYER
                if (name, m) in results
            ]
            for c in names
        }
        if any(len(s) < len(LAYER) for s in layer.values()):
            continue
        sums = {c: sum(s) for c, s in layer.items()}
        least = sum(floor(*LAYER[name], m, limits) for name in LAYER)
        lines.append(
            f"{'MoE layer':26}{m:6}{least * 1e6:9.1f}" + "".join(_cell(Result(sums[c])) for c in names)
        )
        for ours in OURS:
            lines.append(
                f"  M={m} {ours}: {least / sums[ours]:.0%} of the floor's rate; "
                + ", ".join(
                    f"{sums[c] / sums[ours]:.2f}x {c}"
                    for c in names
                    if c not in OURS and np.isfinite(sums[c])
                )
            )
    lines += [f"not measured: {c} ({name}, M={m}): {why}" for (c, why), (name, m) in failures.items()]
    return "\n".join(lines)


def _cell(result: Result) -> str:
    return f"{result.seconds * 1e6:12.1f}" if np.isfinite(result.seconds) else f"{'-':>12}"


def quantizer_lines(limits: Limits) -> Iterator[str]:
    """The quantizers alone, as a share of the copy's bandwidth."""
    torch = gpu()
    from refimpl.kernels import act_quant_triton as quantizers  # Triton: needs a GPU

    for m in QUANTIZED:
        x, weight = (
            torch.randn(m, 7168, device=DEVICE, dtype=torch.bfloat16),
            torch.ones(7168, device=DEVICE, dtype=torch.bfloat16),
        )
        both = torch.randn(m, 4096, device=DEVICE, dtype=torch.bfloat16)
        cases: dict[str, tuple[Callable[[], Any], int]] = {
            "act_quant 7168": (partial(quantizers.act_quant, x), 3 * x.numel()),
            "rms_norm_quant 7168": (
                partial(quantizers.rms_norm_quant, x, weight, 1e-6, False),
                3 * x.numel(),
            ),
            "swiglu_quant 2048": (partial(quantizers.swiglu_quant, both), 5 * both.numel() // 2),
        }
        for name, (call, nbytes) in cases.items():
            s = replay([call]).seconds
            yield (
                f"{name:22} M={m:<5} {s * 1e6:8.1f} us {nbytes / s / 1e9:8.0f} GB/s "
                f"{nbytes / s / limits.bytes_s:5.0%} of copy"
            )


def fp8(given: Settings) -> Iterator[Row]:
    """All shapes and lengths; the tables go to stderr at the end."""
    torch = gpu()
    if given.peers and not importlib.util.find_spec("deep_gemm"):
        print("deep_gemm is not installed, so it is left out", file=sys.stderr)
    limits = measure_limits()
    results: dict[tuple[str, int], dict[str, Result]] = {}
    for name, (n, k) in (LAYER | DENSE).items():
        problem = Problem(n, k)
        blind = ""
        for m in sorted(given.tokens, reverse=True):
            results[name, m], best = contend(problem, m, given.peers, blind)
            blind = blind or best
            yield from rows(name, n, k, m, results[name, m], limits)
        del problem
        torch.cuda.empty_cache()
    print(
        "\n".join([*quantizer_lines(limits), table(results, limits, torch.cuda.get_device_name())]),
        file=sys.stderr,
        flush=True,
    )
