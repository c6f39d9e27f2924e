"""The indexer of one layer of a model with sparse attention (DeepSeek-V3.2, GLM-5): before a token attends,
it chooses the rows of the cache that are worth it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from refimpl.config import DeepSeekConfig
from refimpl.devices.weights import Weights

EPS = 1e-6  # of the keys' norm, in the published code and not in the config


class Chosen:
    """The rows that the last indexer chose, for layers behind it that share them."""

    rows: Any = None


class Indexer:
    """The lightning indexer of a layer, `reference/indexer.py`: keys of its own beside the latents, and a
    score of every row for every token. A layer without weights of its own takes what the last one chose.
    """

    def __init__(self, c: DeepSeekConfig, layer: int, w: Weights, chosen: Chosen):
        self.chosen, self.topk = chosen, c.index_topk or 0
        self.consumers: tuple[tuple, tuple] = (), ()  # of x, and of c^Q
        self.heads, self.interleaved = c.index_n_heads, c.indexer_rope_interleave
        self.shares = c.shares_rows(layer)
        if self.shares:
            return
        self.wq_b = w.linear("wq_b", c.index_n_heads * c.index_head_dim, c.q_lora_rank or c.hidden_size)
        self.wk = w.linear("wk", c.index_head_dim, c.hidden_size)
        self.weights_proj = w.linear("weights_proj", c.index_n_heads, c.hidden_size)
        norm = {name: w(f"k_norm.{name}", c.index_head_dim) for name in ("weight", "bias")}
        self.k_norm = w.bind("layer_norm", **norm, eps=EPS)
        self.rope, self.rows = w.op("index_rope"), w.op("index_rows")
        self.scale = np.float32((c.index_n_heads * c.index_head_dim) ** -0.5)
        self.consumers = (self.wk, self.weights_proj), (self.wq_b,)

    def keys(self, x: Any, cos: Any, sin: Any) -> tuple[Any, ...]:
        """x [T, D] -> the keys [T, d] that the cache keeps beside the latents; none where rows are shared."""
        return () if self.shares else (self.rope(self.k_norm(self.wk(x)), cos, sin, self.interleaved),)

    def __call__(self, x: Any, c_q: Any, cos: Any, sin: Any, index: Any, length: Any = None) -> Any:
        """The rows that each token attends to, bool [T, S], or None for all: x [T, D], c_q [T, q_lora_rank],
        `index` the keys [S, d] of all tokens so far, of which `length` are there; none where rows are shared.
        """
        if not self.shares:
            (keys,) = index
            enough = len(keys) <= self.topk
            self.chosen.rows = None if enough else self._choose(x, c_q, cos, sin, keys, length)
        return self.chosen.rows

    def _choose(self, x: Any, c_q: Any, cos: Any, sin: Any, keys: Any, length: Any) -> Any:
        q = self.wq_b(c_q)
        q = self.rope(q.reshape(len(q), self.heads, -1), cos, sin, self.interleaved)  # [T, J, d]
        weights = self.weights_proj(x) * float(self.scale)  # [T, J]
        return self.rows(q, keys, weights, self.topk, length=length)
