"""Reference: embed of refimpl.reference.packed; rms_norm, rope, mla_naive, mla_absorbed and route of
refimpl.reference.attention; rms_norm_quant of refimpl.reference.quantizing.

On torch tensors of any device.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from refimpl.config import DeepSeekConfig
from refimpl.entered import entered
from refimpl.kernels.linear_torch import (
    act_quant,
    by_triton,
    decode,
    launches,
    on_host,
    product,
    triton_quantizers,
)
from refimpl.reference import packed
from refimpl.reference.fp8 import BLOCK
from refimpl.tensors import Packed, ScaledInt4

SCORES = 1 << 22  # bytes of absorbed attention's scores at a time: few tokens are in one piece


# More tokens than these go through expanded keys and values. By arithmetic alone that pays from
# L (n+v) / (2 L - n - v) tokens on, 171 for DeepSeek-V3; but absorbed scores are written and read some twenty
# times, in pieces of SCORES, where the fused kernel keeps them to itself.
EXPANDED_FROM = 17


EXPANDED = 1 << 26  # bytes of keys, values, queries and results at a time, or those of one head; four times
# that for a thousand tokens and more: heads times blocks of queries must be enough for all processors


FULL = 1 << 14  # queries of all heads that a large GPU computes at once: 128 blocks of 128
TILE = 32  # rows that a piece is a multiple of, as those that the kernel loads at a time


def embed(table: Any, ids: torch.Tensor) -> torch.Tensor:
    """Rows of the table, f32 [T, D], on its device; of GGML blocks and INT4, which stay with the CPU, on that
    of the ids.
    """
    if isinstance(table, torch.Tensor):
        return table[torch.as_tensor(ids, device=table.device)].float()
    if isinstance(table, Packed | ScaledInt4):
        return torch.from_numpy(packed.embed(on_host(table), torch.as_tensor(ids).cpu().numpy())).to(
            getattr(ids, "device", None)
        )
    ids = torch.as_tensor(ids, device=table.codes.device)
    return (
        decode(table.codes[ids])
        * table.scale[ids // BLOCK].repeat_interleave(BLOCK, 1)[:, : table.codes.shape[1]]
    )


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis. f32 [..., D], f32 [D] -> f32 [..., D]."""
    if by_triton(x):
        entered("in Triton")
        return launches().rms_norm(x, weight, eps)
    entered("in torch")
    return _normed(x, weight, eps)


def _normed(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x / torch.sqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight


def rms_norm_quant(
    x: torch.Tensor, weight: torch.Tensor, eps: float, keep: bool = True, ue8m0: bool = False
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """RMSNorm of x f32 [..., D] by weight f32 [D], and its FP8 quantization -> f32 [..., D] (None unless
    `keep`), codes u8 [..., D], scale f32 [..., ceil(D/128)].
    """
    if by_triton(x):
        entered("in Triton")
        return triton_quantizers().rms_norm_quant(x, weight, eps, keep, ue8m0)
    entered("in torch")
    normed = _normed(x, weight, eps)
    return normed if keep else None, *act_quant(normed, ue8m0)


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the interleaved pairs of the last axis. f32 [T, ..., r], tables [T, r/2] -> [T, ..., r]."""
    if by_triton(x):
        entered("in Triton")
        return launches().rope(x, cos, sin)
    entered("in torch")
    # cos and sin [T, r/2] as [T, 1, ..., r/2]: the same for all heads.
    between = (1,) * (x.ndim - 2)
    cos, sin = (table.reshape(len(table), *between, table.shape[1]) for table in (cos, sin))
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)


def mla_naive(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    latent: torch.Tensor,
    k_pe: torch.Tensor,
    kv_b: torch.Tensor,
    scale: float,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """Latent attention with keys and values expanded for every head: q_nope f32 [T, H, n], q_pe f32 [T, H, r]
    (turned), latent [S, L], k_pe [S, r] (turned) and kv_b [H, n+v, L], f32 or bf16 -> f32 [T, H, v].
    """
    n, tokens, total = q_nope.shape[-1], len(q_nope), len(latent)
    # The latents are the same for all heads; `expand` repeats them without memory.
    keys_values = product(latent.float().expand(len(kv_b), -1, -1), kv_b.transpose(1, 2))  # [H, S, n+v]
    keys, values = keys_values[..., :n], keys_values[..., n:]
    scores = (
        q_nope.transpose(0, 1) @ keys.transpose(1, 2) + q_pe.transpose(0, 1) @ k_pe.float().T
    )  # [H, T, S]
    places = torch.arange(total, device=q_nope.device)
    allowed = places <= places[total - tokens :, None] if rows is None else rows.to(q_nope.device)
    p = _softmax(scores.mul_(scale), allowed)
    return (p @ values).transpose(0, 1)


def mla_absorbed(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    latent: torch.Tensor,
    k_pe: torch.Tensor,
    kv_b: torch.Tensor,
    scale: float,
    rows: torch.Tensor | None = None,
    length: torch.Tensor | None = None,
) -> torch.Tensor:
    """Latent attention without expanding the cache: q_nope f32 [T, H, n], q_pe f32 [T, H, r]
    (turned), latent [S, L], k_pe [S, r] (turned) and kv_b [H, n+v, L], f32 or bf16 -> f32 [T, H, v].

    `length`, rows of latent and k_pe that are there, is an integer on the device: no copy to the host.
    Prompts, with nothing behind their last row, go through `mla_expanded`.
    """
    tokens, heads, n = q_nope.shape
    if rows is None and tokens == 1 and by_triton(q_nope):
        entered("one query in Triton")
        return _triton("refimpl.kernels.mla_decode_triton").mla_absorbed(
            q_nope, q_pe, latent, k_pe, kv_b, scale, length
        )
    # The fused kernel knows a causal mask, but no chosen rows and no rows that are not there yet.
    if rows is None and length is None and tokens >= EXPANDED_FROM and _fits_fused_kernel(q_nope, q_pe, kv_b):
        return mla_expanded(q_nope, q_pe, latent, k_pe, kv_b, scale)
    entered("absorbed")
    w_k, w_v = kv_b[:, :n], kv_b[:, n:].transpose(1, 2)  # [H, n, L], [H, L, v]
    out = q_nope.new_empty(tokens, heads, w_v.shape[2])
    places = torch.arange(len(latent), device=q_nope.device)
    first = (len(latent) if length is None else length) - tokens  # of the new tokens
    if length is not None:  # what a truncated past left there may be NaN, and zero times NaN is NaN
        latent = torch.where((places < length)[:, None], latent, latent.new_zeros(()))
    step = max(1, SCORES // (4 * heads * len(latent)))
    entered("all tokens at once" if step >= tokens else "tokens in pieces")
    for i in range(0, tokens, step):
        q, turned = q_nope[i : i + step].transpose(0, 1), q_pe[i : i + step].transpose(0, 1)
        t = q.shape[1]
        # Heads and tokens as rows of one matrix: one product reads the cache once for all of them.
        q_latent = product(q, w_k).reshape(heads * t, -1)  # [H*t, L]
        scores = product(q_latent, latent.T)
        scores += product(turned.reshape(heads * t, -1), k_pe.T)  # [H*t, S]
        if rows is None:
            allowed = places <= (first + torch.arange(i, i + t, device=places.device))[:, None]  # [t, S]
        else:
            allowed = rows[i : i + t].to(places.device)
        # [H, t, S]; `allowed` [t, S] is the same for all heads.
        p = _softmax(scores.view(heads, t, -1).mul_(scale), allowed)
        mixed = product(p.view(heads * t, -1), latent).view(heads, t, -1)
        out[i : i + step] = product(mixed, w_v).transpose(0, 1)
    return out


def mla_expanded(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    latent: torch.Tensor,
    k_pe: torch.Tensor,
    kv_b: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Latent attention of many tokens: q_nope f32 [T, H, n], q_pe f32 [T, H, r]
    (turned), latent [S, L], k_pe [S, r] (turned) and kv_b [H, n+v, L], f32 or bf16 -> f32 [T, H, v].

    Latents are expanded to keys and values of some heads, of all rows or of a piece of them. The rest is done
    by `mla_prompt_triton` where the cache is bfloat16 on a GPU, and otherwise by torch's fused attention in
    float32, which takes all rows at once. Sizes of a head (n, r and v) are multiples of four.
    """
    (tokens, heads, n), rows = q_nope.shape, len(latent)
    out = q_nope.new_empty(tokens, heads, kv_b.shape[1] - n)
    step = heads_at_a_time(tokens, heads, rows, n, q_pe.shape[2], out.shape[2])
    expanded: Callable[..., None] = _in_torch
    prompt = _triton("refimpl.kernels.mla_prompt_triton") if by_triton(q_nope) else None
    if prompt and prompt.takes(n, q_pe.shape[2], out.shape[2], k_pe):
        step, each = rows_at_a_time(step, tokens, heads, rows, n, q_pe.shape[2], out.shape[2])
        expanded = partial(_in_triton, prompt, each)
    entered("all heads at once" if step >= heads else "heads in pieces")
    for i in range(0, heads, step):
        # A few heads at a time: keys and values of all heads would be many times the cache.
        some = slice(i, i + step)
        expanded(q_nope[:, some], q_pe[:, some], latent, k_pe, kv_b[some], scale, out[:, some])
    return out


def expanded_bytes(tokens: int) -> int:
    """Bytes for what is expanded at a time for so many tokens."""
    return min(max(EXPANDED, tokens << 18), 4 * EXPANDED)


def heads_at_a_time(tokens: int, heads: int, rows: int, n: int, r: int, v: int) -> int:
    """Heads whose keys and values of all rows (and once more, cut in two or beside what they share), queries
    and results take `expanded_bytes`; one at least, and pieces of about equal size.
    """
    return _equal(heads, max(1, expanded_bytes(tokens) // _bytes_of_a_head(tokens, rows, n, r, v)))


def rows_at_a_time(some: int, tokens: int, heads: int, rows: int, n: int, r: int, v: int) -> tuple[int, int]:
    """Heads and rows at a time, where pieces of the rows can be joined: `some` heads and all rows where these
    heads are all, or occupy a GPU twice over. Otherwise as many heads as occupy it once, and as many rows, in
    whole tiles, as have keys and values of no more bytes than `some` heads would.
    """
    if some == heads or some * tokens >= 2 * FULL:
        return some, rows
    nbytes = some * _bytes_of_a_head(tokens, rows, n, r, v)
    some = _equal(heads, max(1, FULL // tokens))
    # Each query's largest score and sum are kept between the pieces.
    tiles = (nbytes // some - 8 * tokens) // (8 * (n + v) * TILE)
    return some, min(rows, TILE * _equal(-(-rows // TILE), max(1, tiles)))


def _bytes_of_a_head(tokens: int, rows: int, n: int, r: int, v: int) -> int:
    return 4 * (rows * (2 * (n + v) + r) + tokens * (n + r + v))


def _equal(count: int, most: int) -> int:
    """The size of pieces of `count`, `most` or less, and about equal."""
    return -(-count // -(-count // most))


def _fits_fused_kernel(q_nope: torch.Tensor, q_pe: torch.Tensor, kv_b: torch.Tensor) -> bool:
    """Whether what a thread of the GPU's kernel loads at once, 16 bytes, never crosses a head's border."""
    return q_nope.shape[2] % 4 == q_pe.shape[2] % 4 == kv_b.shape[1] % 4 == 0


def _in_triton(
    prompt: Any,
    each: int,
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    latent: torch.Tensor,
    k_pe: torch.Tensor,
    kv_b: torch.Tensor,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Expanded attention of some heads, `each` rows at a time, by the module `prompt`."""
    (tokens, heads), rows = q_nope.shape[:2], len(latent)
    entered("expanded, in Triton", "all rows at once" if each >= rows else "rows in pieces")
    so_far = None if each >= rows else q_nope.new_empty(heads, 2, tokens)
    for i in range(0, rows, each):
        # Not kept in a variable: the memory of a piece is free for the next.
        prompt.attention(q_nope, q_pe, _keys_values(latent[i : i + each], kv_b), k_pe, scale, out, i, so_far)


def _in_torch(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    latent: torch.Tensor,
    k_pe: torch.Tensor,
    kv_b: torch.Tensor,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Expanded attention of some heads, all rows at once."""
    from torch.nn.attention.bias import causal_lower_right  # torch's compiler: seconds

    entered("expanded, in torch")
    heads, n = q_nope.shape[1:]
    keys_values = _keys_values(latent, kv_b)
    turned = k_pe.float()[:, None].expand(-1, heads, -1)
    # One dot product of n + r numbers is the sum of the two that the paper has.
    keys = torch.cat((keys_values[..., :n], turned), dim=2)  # [S, H, n+r]
    q = torch.cat((q_nope, q_pe), dim=2).mul_(scale)
    q, keys, values = (a.transpose(0, 1)[None] for a in (q, keys, keys_values[..., n:]))  # [1, H, T or S, .]
    mask = causal_lower_right(q.shape[2], keys.shape[2])  # nothing that takes memory
    out[:] = scaled_dot_product_attention(q, keys, values, mask, scale=1.0)[0].transpose(0, 1)  # [T, H, v]


def _keys_values(latent: torch.Tensor, kv_b: torch.Tensor) -> torch.Tensor:
    """Keys and values of each row and head: latent [S, L], kv_b [H, n+v, L] -> f32 [S, H, n+v]."""
    return product(latent, kv_b.flatten(0, 1).T).unflatten(1, (len(kv_b), -1))  # [S, H, n+v]


def _softmax(scores: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """Softmax of scores f32 [H, T, S] over the last axis, zero where `allowed`, bool [T, S], is not, in the
    memory of the scores, which are the largest thing there is.
    """
    scores.masked_fill_(~allowed, float("-inf"))
    scores -= scores.amax(dim=-1, keepdim=True)
    scores.exp_()
    scores /= scores.sum(dim=-1, keepdim=True)
    return scores


def route(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, config: DeepSeekConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose A experts for every token, best first: x [T, D], weight [E, D], bias [E] -> ids int64 [T, A],
    weights f32 [T, A].
    """
    c = config
    if by_triton(x):
        fast = _triton("refimpl.kernels.route_triton")
        few = 0 < len(x) <= fast.FEW
        entered(f"{'few' if few else 'many'} tokens in Triton")
        return fast.choices(fast.few_logits(x, weight) if few else product(x, weight.T), bias, c)
    entered("in torch")
    logits = product(x, weight.T)
    affinity = logits.softmax(dim=-1) if c.scoring_func == "softmax" else torch.sigmoid(logits)  # [T, E]
    biased = affinity + bias
    grouped = biased.unflatten(1, (c.n_group, biased.shape[1] // c.n_group))  # [T, G, E/G]
    best = 1 if c.topk_method == "group_limited_greedy" else 2
    group_scores = grouped.topk(min(best, grouped.shape[-1]), dim=-1).values.sum(dim=-1)  # [T, G]
    # `topk` leaves open which of equal scores it takes; `_top` takes the lower index, as the reference.
    kept = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(
        1, _top(group_scores, c.topk_group), True
    )
    # Experts of the groups that are not kept are at -inf, but in the ranking.
    ids = _top(
        grouped.masked_fill(~kept[..., None], float("-inf")).view_as(biased), c.num_experts_per_tok
    )  # [T, A]
    weights = affinity.gather(1, ids)
    if c.norm_topk_prob:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return ids, weights * c.routed_scaling_factor


def _top(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Indices int64 [..., k] of the k largest of scores [..., N], largest first, the lower index first among
    equals, NaN last.
    """
    # Torch takes a NaN for the largest of all, so that the smallest of -scores are looked for.
    return torch.sort(-scores, dim=-1, stable=True).indices[..., :k]


@cache
def _triton(name: str) -> Any:
    """The Triton kernels for few tokens, imported where a GPU is first used: see
    `linear_torch.triton_linear`.
    """
    return importlib.import_module(name)
