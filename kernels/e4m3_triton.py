"""Reference: refimpl.formats.e4m3 and refimpl.reference.fp8.act_quant. What the FP8 kernels in Triton share:
E4M3 in integer steps, and one group's scale.

This is E4M3 for Triton, as kernels/codec_fp8.pxi is for compiled loops: kernels of one engine cannot call
those of another. Codes travel as bytes. The chip's own conversions are used where they are right; the integer
ones stand in where there are none or they err:

    interpreter (TRITON_INTERPRET=1)      float32 -> E4M3 is off by up to 2x, NaN codes become 480, bfloat16
                                          products are garbage
    compute capability 8.0, 8.6           no E4M3 at all
    compute capability 8.9, Triton < 3.9  float32 -> E4M3 rounds twice, by way of float16
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def encode(x):
    """f32 -> u8, any shape: nearest, ties to even, saturated at +-448, NaN to 0x7f with its sign."""
    #     float32   S EEEEEEEE MMM mmmmmmmmmmmmmmmmmmmm    bias 127; m is rounded off, a carry goes up
    #     code      S EEEE MMM                             bias 7
    bits = x.to(tl.uint32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    # Beside 2^14 a float32 has steps of 2^-9, the smallest code: the addition rounds, and the low bits are
    # the code.
    subnormal = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    code = tl.where(size < 0x3C800000, subnormal, normal)  # 2^-6
    code = tl.where(size > 0x43E00000, 0x7E, code) | ((bits >> 24) & 0x80)  # 448
    return tl.where(size > 0x7F800000, 0x7F, code).to(tl.uint8)


@triton.jit
def decode_float32(code):
    """u8 -> f32, any shape, exactly: as the top of a float32, exponent and mantissa are the number times
    2^-120.
    """
    code = code.to(tl.uint32)
    number = ((code & 0x7F) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
    number = tl.where((code & 0x7F) == 0x7F, float("nan"), number)
    return (number.to(tl.uint32, bitcast=True) | ((code & 0x80) << 24)).to(tl.float32, bitcast=True)


@triton.jit
def decode_bfloat16(code):
    """u8 -> bf16, any shape, exactly: a bfloat16 has float32's exponent, so that the steps are those of
    `decode_float32`, in 16 bits.
    """
    code = code.to(tl.uint16)
    number = (((code & 0x80) << 8) | ((code & 0x7F) << 4)).to(tl.bfloat16, bitcast=True)
    nan = tl.full(code.shape, 0x7FC0, tl.uint16).to(tl.bfloat16, bitcast=True)
    return tl.where((code & 0x7F) == 0x7F, nan, number * 1.329227995784916e36)


@triton.jit
def as_bfloat16(v):
    """Codes (bytes or E4M3) or bf16, any shape -> bf16. By way of float32, for the chip turns float16, which
    E4M3 becomes first, into bf16 slowly.
    """
    if v.dtype == tl.uint8:
        wide = decode_bfloat16(v)
    elif v.dtype == tl.float8e4nv:
        wide = v.to(tl.float32).to(tl.bfloat16)
    else:
        wide = v
    return wide


@triton.jit
def as_float32(v):
    """Codes (bytes or E4M3), bf16 or f32, any shape -> f32, exactly."""
    if v.dtype == tl.uint8:
        wide = decode_float32(v)
    else:
        wide = v.to(tl.float32)
    return wide


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """f32, any shape -> `dtype`, f32 or bf16, rounded to nearest, which the interpreter does not."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, x, rounded.to(tl.float32, bitcast=True))
    return x.to(dtype)


@triton.jit
def quantize(x, UE8M0: tl.constexpr, NATIVE: tl.constexpr):
    """Groups f32 [G, 128] -> codes u8 [G, 128], scale f32 [G]: the bits of refimpl.reference.fp8.act_quant.

    UE8M0: scales are powers of two. NATIVE: the chip's own conversion rounds once.
    """
    # The largest magnitude is found among bit patterns, where NaN is larger than anything; `tl.max` of floats
    # would lose it.
    sizes = (x.to(tl.uint32, bitcast=True) & 0x7FFFFFFF).to(tl.int32)
    largest = tl.max(sizes, axis=1).to(tl.float32, bitcast=True)
    scale = tl.math.div_rn(largest, tl.full(largest.shape, 448.0, tl.float32))
    if UE8M0:  # one exponent more where there is a mantissa; no less than 2^-126, infinity and NaN stay
        bits = scale.to(tl.uint32, bitcast=True)
        exponent = tl.maximum((bits >> 23) + ((bits & 0x7FFFFF) != 0).to(tl.uint32), 1)
        scale = tl.where(exponent < 255, (exponent << 23).to(tl.float32, bitcast=True), scale)
    # Divided, not multiplied by the inverse, which rounds otherwise; a group of zeros by one.
    divisor = tl.broadcast_to(tl.where(scale == 0, 1.0, scale)[:, None], x.shape)
    quotient = tl.where((scale == 0)[:, None], 0.0, tl.math.div_rn(x, divisor))
    if NATIVE:
        codes = quotient.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        codes = encode(quotient)
    return codes, scale


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """The GPU's compute capability, (major, minor); (0, 0) for the interpreter, which has none."""
    return (0, 0) if INTERPRETED.value else torch.cuda.get_device_capability(device)


def follows(device: torch.device) -> bool:
    """Whether a kernel may be launched before the one before it has ended (programmatic dependent launch)."""
    return capability(device) >= (9, 0)


def has_e4m3(device: torch.device) -> bool:
    """Whether the GPU's tensor cores multiply E4M3: from 8.9 on."""
    return capability(device) >= (8, 9)


def converts_right(device: torch.device) -> bool:
    """Whether Triton's own float32 -> E4M3 rounds once on that device."""
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return has_e4m3(device) and (capability(device) != (8, 9) or version >= (3, 9))


def native(codes: Any) -> torch.Tensor:
    """Codes u8 [N, K] as the kernels want to see them: contiguous, as E4M3 where the tensor cores know it,
    else as bytes.
    """
    return codes.contiguous().view(torch.float8_e4m3fn if has_e4m3(codes.device) else torch.uint8)
