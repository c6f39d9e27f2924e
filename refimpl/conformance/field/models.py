"""The operations of DeepSeek-V3 as transformers has them: RMSNorm, rotary positions, router, attention.

Called by the suite as `refimpl.conformance.field.models:transformers_rope` and so on, with tensors; each
takes and gives what the reference does. transformers is optional, so it is imported where it is judged.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any


def _deepseek() -> Any:
    from transformers.models.deepseek_v3 import modeling_deepseek_v3

    return modeling_deepseek_v3


def transformers_rms_norm(x: Any, weight: Any, eps: float) -> Any:
    """`DeepseekV3RMSNorm`: f32 [..., D] -> f32 [..., D]."""
    norm = _deepseek().DeepseekV3RMSNorm(x.shape[-1], eps)
    norm.weight.data = weight
    return norm(x).detach()


def transformers_rope(x: Any, cos: Any, sin: Any) -> Any:
    """`apply_rotary_pos_emb_interleave`: f32 [T, ..., r] with tables [T, r/2] -> f32 [T, ..., r]. It gives
    all first numbers of the pairs, then all second ones; they are put side by side again.
    """
    import torch

    flat = x.reshape(len(x), x[0:1].numel() // x.shape[-1], x.shape[-1]).transpose(0, 1)[None]  # [1, H, T, r]
    tables = (torch.cat([t, t], dim=-1)[None] for t in (cos, sin))
    turned = _deepseek().apply_rotary_pos_emb_interleave(flat, flat, *tables)[0][0].transpose(0, 1)
    return torch.stack(turned.chunk(2, dim=-1), dim=-1).flatten(-2).reshape(x.shape)


def transformers_route(x: Any, weight: Any, bias: Any, config: Any) -> Any:
    """`DeepseekV3TopkRouter`: ids int64 [T, A] in any order, weights f32 [T, A]."""
    names = (
        "num_experts_per_tok",
        "routed_scaling_factor",
        "n_group",
        "topk_group",
        "norm_topk_prob",
    )
    given = {name: getattr(config, name) for name in names}
    shape = SimpleNamespace(num_local_experts=len(weight), hidden_size=x.shape[1], **given)
    router = _deepseek().DeepseekV3TopkRouter(shape)
    router.weight.data, router.e_score_correction_bias = weight, bias
    _, shares, ids = router(x)
    return ids.detach(), shares.detach()


def _keys_and_values(q_nope: Any, q_pe: Any, latent: Any, k_pe: Any, kv_b: Any) -> tuple[Any, Any, Any]:
    """Queries [1, H, T, n+r], keys [1, H, S, n+r] and values [1, H, S, v] of latent attention."""
    import torch

    heads, n = q_nope.shape[1:]
    expanded = torch.einsum("sl,hkl->hsk", latent, kv_b)
    turned = k_pe[None].expand(heads, -1, -1)
    q = torch.cat([q_nope, q_pe], dim=-1).transpose(0, 1)
    return q[None], torch.cat([expanded[..., :n], turned], dim=-1)[None], expanded[None, ..., n:]


def _mask(rows: Any, tokens: int, total: int) -> Any:
    """What is added to scores, f32 [1, 1, T, S]: nothing where a token attends. That is to the chosen rows,
    bool [T, S], or to all up to its own where None are chosen.
    """
    import torch

    places = torch.arange(total)
    allowed = places <= places[total - tokens :, None] if rows is None else rows
    return torch.zeros(tokens, total).masked_fill(~allowed, float("-inf"))[None, None]


def transformers_attention(
    q_nope: Any, q_pe: Any, latent: Any, k_pe: Any, kv_b: Any, scale: float, rows: Any = None
) -> Any:
    """`eager_attention_forward` on expanded keys and values: f32 [T, H, v]. Chosen rows are a mask."""
    module = SimpleNamespace(num_key_value_groups=1, training=False)
    q, k, v = _keys_and_values(q_nope, q_pe, latent, k_pe, kv_b)
    mask = _mask(rows, len(q_nope), len(latent))
    return _deepseek().eager_attention_forward(module, q, k, v, mask, scale)[0][0]


def torch_attention(
    q_nope: Any, q_pe: Any, latent: Any, k_pe: Any, kv_b: Any, scale: float, rows: Any = None
) -> Any:
    """torch's `scaled_dot_product_attention` on expanded keys and values: f32 [T, H, v]. Chosen rows are a
    mask.
    """
    from torch.nn.functional import scaled_dot_product_attention

    q, k, v = _keys_and_values(q_nope, q_pe, latent, k_pe, kv_b)
    mask = _mask(rows, len(q_nope), len(latent))
    return scaled_dot_product_attention(q, k, v, mask, scale=scale)[0].transpose(0, 1)
