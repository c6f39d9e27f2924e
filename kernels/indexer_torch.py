"""Reference: layer_norm, index_rope and index_rows of refimpl.reference.indexer.

On torch tensors of any device; nothing is copied to the host, so that it can be part of a CUDA graph.
"""

from __future__ import annotations

import torch

from refimpl.entered import entered
from refimpl.kernels.attention_torch import rope
from refimpl.kernels.linear_torch import act_quant, decode
from refimpl.reference.fp8 import BLOCK

SCORES = 1 << 26  # bytes of the scores of all heads at a time


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last axis. f32 [..., d] -> f32 [..., d]."""
    centred = x - x.mean(dim=-1, keepdim=True)
    return centred / torch.sqrt(centred.square().mean(dim=-1, keepdim=True) + eps) * weight + bias


def index_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Turn the first r numbers of the last axis: f32 [T, ..., d], tables f32 [T, r/2] -> f32 [T, ..., d]."""
    r = 2 * cos.shape[1]
    part, rest = x[..., :r], x[..., r:]
    # rope turns neighbours; here the partners are r/2 apart, so they are brought together and back again.
    if not interleaved:
        part = torch.stack((part[..., : r // 2], part[..., r // 2 :]), dim=-1).flatten(-2)
    turned = rope(part, cos, sin)
    if not interleaved:
        turned = torch.cat((turned[..., 0::2], turned[..., 1::2]), dim=-1)
    return torch.cat((turned, rest), dim=-1)


def _hadamard(x: torch.Tensor) -> torch.Tensor:
    """The last axis times the Walsh-Hadamard matrix over sqrt(d). f32 [..., d] -> f32 [..., d]."""
    d, half, out = x.shape[-1], 1, x.float()
    # One step of the fast transform: sums and differences of neighbouring runs of `half` numbers.
    #
    #     half 1   a b c d  ->  a+b  a-b  c+d  c-d
    #     half 2            ->  (a+b)+(c+d)  (a-b)+(c-d)  (a+b)-(c+d)  (a-b)-(c-d)
    while half < d:
        a, b = out.reshape(*x.shape[:-1], d // (2 * half), 2, half).unbind(dim=-2)
        out, half = torch.stack((a + b, a - b), dim=-2).reshape(x.shape), 2 * half
    return out * d**-0.5


def index_rows(
    q: torch.Tensor,
    k: torch.Tensor,
    weights: torch.Tensor,
    topk: int,
    length: torch.Tensor | None = None,
    activations: str = "fp8",
) -> torch.Tensor:
    """The `topk` rows with the largest scores, of those up to each token: q f32 [T, J, d], k f32 or bf16
    [S, d], weights f32 [T, J] -> bool [T, S]. `length` is an integer on the device, as is what is behind it
    in k: there, and not chosen.
    """
    tokens, heads, d = q.shape
    k = k.float()
    if activations != "exact":
        ue8m0 = activations == "ue8m0"
        q = _rounded(_hadamard(q).reshape(-1, d), ue8m0).view(tokens, heads, d)
        k = _rounded(_hadamard(k), ue8m0)
    places = torch.arange(len(k), device=q.device)
    first = (len(k) if length is None else length) - tokens  # of the new tokens
    rows = torch.zeros(tokens, len(k), dtype=torch.bool, device=q.device)
    # Tokens at a time, as the scores of all heads, f32 [t, J, S], are the largest thing there is.
    step = max(1, SCORES // (4 * heads * max(1, len(k))))
    entered("all tokens at once" if step >= tokens else "tokens in pieces")
    for i in range(0, tokens, step):
        scores = torch.relu(q[i : i + step] @ k.T)  # [t, J, S]
        scores = torch.einsum("tj,tjs->ts", weights[i : i + step], scores)
        causal = places <= (first + torch.arange(i, i + len(scores), device=q.device))[:, None]
        scores = scores.masked_fill(~causal | scores.isnan(), float("-inf"))
        best = torch.sort(-scores, dim=-1, stable=True).indices[:, :topk]
        rows[i : i + step] = rows[i : i + step].scatter(1, best, True) & causal
    return rows


def _rounded(x: torch.Tensor, ue8m0: bool) -> torch.Tensor:
    """x f32 [N, d] by way of E4M3, a scale for each 128; `ue8m0`: one that is a power of two."""
    codes, scale = act_quant(x, ue8m0)
    return decode(codes) * scale.repeat_interleave(BLOCK, dim=-1)[:, : x.shape[1]]
