"""The latent KV cache: per token and layer one normalized latent and one turned rope key, shared by all
heads.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from refimpl.config import DeepSeekConfig
from refimpl.errors import refusal

PREFILL = 256  # prompt tokens computed at a time: bounds memory, and lets Ctrl-C through
MOST_PREFILL = 2048  # with a GPU that has the room: experts are read once for as many
MOST_ON_CPU = 1024  # without one, where a model has so many experts that each would get few tokens


class LatentCache:
    """Memory of one conversation: f32 [layers, capacity, kv_lora_rank + qk_rope_head_dim], grown by doubling;
    with sparse attention the key of the indexer lies behind each row.

    4 * 576 bytes per token and layer for DeepSeek-V3, 137 KiB per token over its 61 layers (bfloat16 would be
    half of it). `length` tokens are valid; what lies behind is garbage from a truncated past. Prompts are
    best appended `prefill` tokens at a time.
    """

    def __init__(self, config: DeepSeekConfig, prefill: int = PREFILL):
        self.prefill = prefill
        self.split, self.end = config.kv_lora_rank, config.kv_lora_rank + config.qk_rope_head_dim
        # Where in a row the latent lies, the key, and the indexer's key.
        self.parts = slice(self.split), slice(self.split, self.end), slice(self.end, None)
        self.limit = config.max_position_embeddings
        self.length = 0
        self._rows = np.empty((config.num_hidden_layers, 0, config.cache_width), np.float32)

    @property
    def nbytes(self) -> int:
        """Bytes that the cache holds for all layers."""
        return self._rows.nbytes

    def check(self, length: int) -> None:
        """ResourceError E6001 when `length` tokens do not fit into the model's context."""
        if length > self.limit:
            raise refusal("E6001", "context", found=length, expected=f"at most {self.limit}")

    def reserve(self, new: int) -> None:
        """Make room for `new` more tokens, or raise as `check`."""
        needed, capacity = self.length + new, self._rows.shape[1]
        self.check(needed)
        if needed > capacity:
            grown = np.empty(
                (len(self._rows), min(self.limit, max(needed, 2 * capacity, 64)), self._rows.shape[2]),
                np.float32,
            )
            grown[:, : self.length] = self._rows[:, : self.length]
            self._rows = grown

    def extend(self, layer: int, latent: np.ndarray, k_pe: np.ndarray, *index: np.ndarray) -> tuple[Any, ...]:
        """Write the rows of the new tokens behind `length` and return all S rows: latent [S, L], k_pe [S, r],
        and where there are any the indexer's keys, `index` [S, d]. `length` stays until `advance`.

        The last thing is for caches that return more rows than are present: how many are; None for all.
        """
        rows = self._rows[layer, : self.length + len(latent)]
        for part, new in zip(self.parts, (latent, k_pe, *index)):
            rows[self.length :, part] = new
        return *[rows[:, part] for part in self.parts[: 2 + len(index)]], None

    def advance(self, new: int) -> None:
        """Count `new` tokens as present, after every layer has extended."""
        self.length += new

    def truncate(self, length: int) -> None:
        """Forget all tokens from `length` on."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate {self.length} tokens to {length}")
        self.length = length


INITIAL_ROWS = 256  # rows of a cache at first; it doubles from there


def capacity(context: int, limit: int) -> int:
    """Rows a cache has when it holds `context` tokens."""
    return min(limit, max(INITIAL_ROWS, 1 << (max(context, 1) - 1).bit_length()))
