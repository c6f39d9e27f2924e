"""Linear layer on GGML-packed weights, as ggml computes it: activations rounded to Q8_K (or Q8_0), integer
products inside a block.

    y[t, n] = sum over blocks b of   d_w d_a * (sum over groups j of sc_j * sum_i q_i a_i)
                                               '------------ exact integers ------------'
                                  -  dmin_w d_a * (sum over groups j of m_j * sum_i a_i)
                                                  '---------- exact integers ----------'

Only the two multiplications by the block scales and the sum over blocks round. Source:
`ggml_vec_dot_q4_K_q8_K` and its siblings.
"""

from __future__ import annotations

import numpy as np

from refimpl import formats
from refimpl.formats import iq4_nl, iq4_xs, mxfp4, q2_k, q3_k, q4_0, q4_k, q5_0, q5_k, q6_k, q8_0, q8_k
from refimpl.reference import fp8, int4, interleaved
from refimpl.tensors import Interleaved, Packed, ScaledFP8, ScaledInt4, Stack, Weight

Q8_K_PARTNERS = (q2_k, q3_k, q4_k, q5_k, q6_k, iq4_xs)
Q8_0_PARTNERS = (q4_0, q5_0, q8_0, iq4_nl, mxfp4)


def linear(x: np.ndarray, w: Packed, activations: str = "fp8") -> np.ndarray:
    """x f32 [..., K] times the transpose of w [N, K] -> f32 [..., N].

    `activations="exact"` multiplies x by the dequantized weights in float32. Otherwise x is rounded to the
    format ggml pairs with w's: Q8_K for the K-quants and IQ4_XS, Q8_0 for Q4_0, Q5_0, Q8_0, IQ4_NL and
    MXFP4; the remaining formats have no integer product here and stay exact.
    """
    module = formats.get(w.ggml_type)
    flat = x.reshape(-1, x.shape[-1])
    if activations != "exact" and module in Q8_K_PARTNERS:
        y = _integer_product(module, w, *_q8_k(flat))
    elif activations != "exact" and module in Q8_0_PARTNERS:
        y = _integer_product(module, w, *_q8_0(flat))
    else:
        y = flat @ dequantize(w).T
    return y.reshape(*x.shape[:-1], w.shape[-2])


def dequantize(w: Packed) -> np.ndarray:
    """The weights of a packed tensor: u8 [..., row bytes] -> f32 of w.shape."""
    return formats.dequantize(w.ggml_type, w.data).reshape(w.shape)


def _q8_k(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x f32 [T, K] in Q8_K: scales f32 [T, B] and integers i8 [T, B, 256]."""
    d, qs, _ = q8_k.unpack(q8_k.quantize(x))
    return d, qs


def _q8_0(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x f32 [T, K] in Q8_0: scales f32 [T, B] and integers i8 [T, B, 32]."""
    d, qs = q8_0.unpack(q8_0.quantize(x))
    return d.astype(np.float32), qs


def _integer_product(module, w: Packed, d_a: np.ndarray, a: np.ndarray) -> np.ndarray:
    """Scales d_a f32 [T, B] and integers a i8 [T, B, W] of the activations; w [N, K = B*W] -> f32 [T, N]."""
    d, scaled_q, dmin, mins = _terms(module, w.data.reshape(w.shape[-2], -1))
    tokens, blocks, width = a.shape
    # float64 holds every one of these integers exactly (|sum| < 2^26), and BLAS multiplies it fast.
    a = a.astype(np.float64).transpose(1, 0, 2)  # [B, T, W]
    dots = (a @ scaled_q.transpose(1, 2, 0)).astype(np.float32)  # [B, T, N]
    y = dots * (d_a.T[:, :, None] * d.T[:, None, :])
    if dmin is not None and mins is not None:
        groups = mins.shape[-1]
        sums = a.reshape(blocks, tokens, groups, width // groups).sum(axis=-1)  # [B, T, J]
        y -= (sums @ mins.transpose(1, 2, 0)).astype(np.float32) * (d_a.T[:, :, None] * dmin.T[:, None, :])
    return y.sum(axis=0, dtype=np.float32)


def _terms(module, data: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray | None]:
    """What u8 [N, row bytes] hold for each row and block: d f32 [N, B], the integers sc*q f64 [N, B, W], and
    for formats with minima dmin f32 [N, B] and m f64 [N, B, J].
    """
    fields = module.unpack(data)
    if hasattr(module, "VALUES"):  # quants are places in a table of integers
        fields = (*fields[:-1], module.VALUES[fields[-1]])
    if module in Q8_0_PARTNERS:
        d, q = fields
        d = mxfp4.SCALES[d] if module is mxfp4 else d.astype(np.float32)
        return d, q.astype(np.float64), None, None
    if module in (q3_k, q6_k, iq4_xs):
        d, sc, q = fields
        dmin = m = None
    else:
        d, dmin, sc, m, q = fields
        dmin, m = dmin.astype(np.float32), m.astype(np.float64)
    scaled = sc.astype(np.float64)[..., None] * q  # [N, B, J, W/J]
    return d.astype(np.float32), scaled.reshape(*d.shape, -1), dmin, m


def dense(w: Weight | Stack) -> np.ndarray:
    """The f32 array that a weight of any kind stands for, in its shape; a list of E experts [N, K] gives
    their stack [E, N, K].
    """
    if isinstance(w, ScaledFP8):
        return fp8.weight_dequant(w)
    if isinstance(w, ScaledInt4):
        return int4.weight_dequant(w)
    if isinstance(w, Interleaved):
        w = interleaved.plain(w)
    if isinstance(w, Packed):
        return dequantize(w)
    return w if isinstance(w, np.ndarray) else np.stack([dense(e) for e in w])


def embed(table: Weight, ids: np.ndarray) -> np.ndarray:
    """Rows `ids`, int [T], of an embedding table [V, D] of any kind of weight -> f32 [T, D]; of a packed
    table only these rows are decoded.
    """
    if isinstance(table, Packed):
        return dequantize(
            Packed(table.data.reshape(table.shape[0], -1)[ids], table.ggml_type, (len(ids), table.shape[1]))
        )
    return dense(table)[ids]
