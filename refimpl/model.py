"""DeepSeek-V3 from top to bottom, as section 2.1 of the paper (arXiv 2412.19437) has it; numbers in
parentheses are its equations.

    embed_tokens -> [ x + attention(norm(x)) -> x + mlp(norm(x)) ] x layers -> norm -> lm_head

No framework: every operation comes from the table in `ops.py`. Weights are named as in the Hugging Face
checkpoint, and a module is given them already bound to operations: `w.linear("o_proj", ...)` is called with x
alone. Where and in how many pieces these run was decided by whoever made them (`devices/`).

Letters: T new tokens, S tokens so far, D hidden, H heads, L kv_lora_rank; n, r, v the numbers of a head
without position, with position, of a value; E routed experts, A chosen ones. Activations are f32 [T, ...].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from refimpl.cache import LatentCache
from refimpl.config import DeepSeekConfig
from refimpl.devices.backend import Backend
from refimpl.devices.cpu import CpuBackend
from refimpl.devices.weights import Weights
from refimpl.generate import Sampling, Session
from refimpl.reference.attention import rope_tables, softmax_scale
from refimpl.sparse import Chosen, Indexer
from refimpl.tensors import Stack, Weight


class Attention:
    """Multi-head latent attention of one layer, section 2.1.1: queries, keys and values of all heads come
    from two small latents, and of a past token only the second and one key with position are kept.
    """

    def __init__(self, c: DeepSeekConfig, layer: int, w: Weights, chosen: Chosen | None):
        self.config, self.layer, heads = c, layer, c.num_attention_heads
        self.indexer = None if chosen is None else Indexer(c, layer, w.under("indexer"), chosen)
        of_x, of_c_q = self.indexer.consumers if self.indexer else ((), ())
        queries, latent_and_key = heads * c.qk_head_dim, c.kv_lora_rank + c.qk_rope_head_dim
        if c.q_lora_rank is None:
            self.down = w.linears(c.hidden_size, q_proj=queries, kv_a_proj_with_mqa=latent_and_key)
        else:
            self.down = w.linears(c.hidden_size, q_a_proj=c.q_lora_rank, kv_a_proj_with_mqa=latent_and_key)
            self.q_b_proj = w.linear("q_b_proj", queries, c.q_lora_rank)
            norm = (c.q_lora_rank, c.rms_norm_eps)
            self.q_a_layernorm = w.norm("q_a_layernorm", *norm, self.q_b_proj, *of_c_q)
        self.kv_a_layernorm = w.norm("kv_a_layernorm", c.kv_lora_rank, c.rms_norm_eps)
        self.rope = w.op("rope")
        rows = c.qk_nope_head_dim + c.v_head_dim  # of a head in kv_b: W^UK, then W^UV
        kv_b = w.dequantized(
            "kv_b_proj.weight", heads * rows, c.kv_lora_rank, of=(heads, rows, c.kv_lora_rank)
        )
        self.naive = w.bind("mla_naive", kv_b=kv_b, scale=softmax_scale(c))
        self.absorbed = w.bind("mla_absorbed", kv_b=kv_b, scale=softmax_scale(c))
        self.o_proj = w.linear("o_proj", c.hidden_size, heads * c.v_head_dim)
        self.consumers = (self.down, *of_x)  # of x

    def __call__(
        self, x: np.ndarray, cos: np.ndarray, sin: np.ndarray, cache: LatentCache | None
    ) -> np.ndarray:
        """[T, D] -> [T, D]. Without a cache x is all there is, and attention the paper's own (2, 5, 10); with
        one it is over all the cache holds, the same with W^UK and W^UV absorbed into q and the result.
        """
        c = self.config
        q, kv = self.down(x)  # (6) c^Q = W^DQ h   (1, 3) c^KV = W^DKV h, beside W^KR h
        c_q = q
        if c.q_lora_rank is not None:
            c_q = self.q_a_layernorm(q)
            q = self.q_b_proj(c_q)  # (7, 8) q^C = W^UQ c^Q, beside W^QR c^Q
        q = q.reshape(len(q), c.num_attention_heads, c.qk_head_dim)
        q_nope, q_pe = q[..., : c.qk_nope_head_dim], self.rope(q[..., c.qk_nope_head_dim :], cos, sin)  # (9)
        latent = self.kv_a_layernorm(kv[:, : c.kv_lora_rank])
        k_pe = self.rope(kv[:, c.kv_lora_rank :], cos, sin)  # (3) k^R = RoPE(W^KR h), one for all heads
        index: tuple | list = self.indexer.keys(x, cos, sin) if self.indexer else ()
        rows, length = None, None  # that tokens attend to, of those of the cache: all
        if cache is not None:
            latent, k_pe, *index, length = cache.extend(self.layer, latent, k_pe, *index)
        if self.indexer:
            rows = self.indexer(x, c_q, cos, sin, index, length)
        if cache is None:
            out = self.naive(q_nope, q_pe, latent, k_pe, rows=rows)
        else:
            out = self.absorbed(q_nope, q_pe, latent, k_pe, rows=rows, length=length)
        return self.o_proj(out.reshape(len(q), -1))  # (11) u = W^O [o_1; ...; o_H]


class MLP:
    """SwiGLU, down(silu(gate(x)) * up(x)): the dense layers' MLP and the shared expert."""

    def __init__(self, c: DeepSeekConfig, intermediate: int, w: Weights):
        self.swiglu = w.bind(
            "swiglu",
            gate=w("gate_proj.weight", intermediate, c.hidden_size),
            up=w("up_proj.weight", intermediate, c.hidden_size),
            down=w("down_proj.weight", c.hidden_size, intermediate),
        )
        self.consumers = (self.swiglu,)  # of x

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """[T, D] -> [T, D]."""
        return self.swiglu(x)


class MoE:
    """Router, routed experts and shared expert of one layer, section 2.1.2:

    FFN(x) = sum of g_i FFN_i(x) over the A experts chosen for a token + FFN_shared(x)           (12)
    """

    def __init__(self, c: DeepSeekConfig, w: Weights):
        bias = w if c.topk_method == "noaux_tc" else w.zeros  # DeepSeek-V2's router has none
        self.route = w.bind(
            "route",
            weight=w.dequantized("gate.weight", c.n_routed_experts, c.hidden_size),
            bias=bias("gate.e_score_correction_bias", c.n_routed_experts),
            config=c,
        )
        inner = (c.n_routed_experts, c.moe_intermediate_size, c.hidden_size)
        self.experts = w.bind(
            "experts",
            gate=w("experts.gate_proj.weight", *inner),
            up=w("experts.up_proj.weight", *inner),
            down=w("experts.down_proj.weight", inner[0], inner[2], inner[1]),
        )
        width = c.moe_intermediate_size * c.n_shared_experts
        self.shared_experts = MLP(c, width, w.under("shared_experts")) if width else None
        self.consumers = (
            self.route,
            self.experts,
            *(self.shared_experts.consumers if self.shared_experts else ()),
        )  # of x

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """[T, D] -> [T, D]."""
        ids, weights = self.route(x)  # (13 to 16): i and g_i, [T, A]
        routed = self.experts(x, ids, weights)
        return routed if self.shared_experts is None else routed + self.shared_experts(x)


class Block:
    """One layer of the transformer: `x = x + attention(norm(x)); x = x + mlp(norm(x))`, with a dense MLP in
    the first layers and a mixture of experts behind them.
    """

    def __init__(self, c: DeepSeekConfig, layer: int, w: Weights, chosen: Chosen | None):
        self.self_attn = Attention(c, layer, w.under("self_attn"), chosen)
        self.shares_rows = c.shares_rows(layer)
        self.mlp = (
            MLP(c, c.intermediate_size, w.under("mlp")) if c.is_dense(layer) else MoE(c, w.under("mlp"))
        )
        self.input_layernorm = w.norm(
            "input_layernorm", c.hidden_size, c.rms_norm_eps, *self.self_attn.consumers
        )
        self.post_attention_layernorm = w.norm(
            "post_attention_layernorm", c.hidden_size, c.rms_norm_eps, *self.mlp.consumers
        )

    def __call__(
        self, x: np.ndarray, cos: np.ndarray, sin: np.ndarray, cache: LatentCache | None
    ) -> np.ndarray:
        """[T, D] -> [T, D]."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Head:
    """The last norm, and the scores of every token of the vocabulary."""

    def __init__(self, c: DeepSeekConfig, w: Weights):
        self.lm_head = w.under("lm_head").linear("", c.vocab_size, c.hidden_size)
        self.norm = w.under("model.norm").norm("", c.hidden_size, c.rms_norm_eps, self.lm_head)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """[T, D] -> logits [T, vocab]."""
        return self.lm_head(self.norm(x))


class Decoder:
    """All layers and the head: what lies between the embedding of the tokens and their logits."""

    def __init__(self, c: DeepSeekConfig, w: Weights):
        chosen = Chosen() if c.index_topk else None
        layers = range(c.num_hidden_layers)
        self.blocks = [Block(c, i, w.under(f"model.layers.{i}"), chosen) for i in layers]
        self.layers = [w.placed(f"model.layers.{i}", block) for i, block in enumerate(self.blocks)]
        self.head = w.placed("model.norm", Head(c, w))

    def __call__(
        self,
        x: np.ndarray,
        cos: np.ndarray,
        sin: np.ndarray,
        cache: LatentCache | None,
        last_only: bool = False,
    ) -> np.ndarray:
        """Embeddings [T, D] -> logits [T, vocab], or [1, vocab] of the last token. cos and sin [T, r/2]."""
        for layer in self.layers:
            x = layer(x, cos, sin, cache)
        return self.head(x[-1:] if last_only else x)


class Model:
    """DeepSeek-V3 over any mapping of weights, usually a `checkpoint.folder.Checkpoint`, on a backend:
    numpy's references unless another is given.

    The backend's `activations="fp8"` rounds the inputs of FP8 linears to E4M3 per 1x128 group and those of
    GGML experts to Q8_K, as the real system does; `"exact"` keeps them float32, so that logits can be
    compared with any implementation fed the dequantized weights. MismatchError E4010 or E4011 when a tensor
    is missing or of another shape.
    """

    def __init__(
        self,
        config: DeepSeekConfig,
        checkpoint: Mapping[str, Weight | Stack],
        backend: Backend | None = None,
    ):
        self.config, self.checkpoint = config, checkpoint
        self.backend = (backend or CpuBackend("reference")).suited(config)
        w = Weights(checkpoint, self.backend)
        table = w("model.embed_tokens.weight", config.vocab_size, config.hidden_size)
        self.embed_tokens = w.under("model.embed_tokens").bind("embed", table=table)
        decoder = Decoder(config, w)
        self.layers, self.decoder = decoder.blocks, w.placed("", decoder)

    def new_cache(self) -> LatentCache:
        """An empty cache for one conversation."""
        return self.backend.new_cache(self.config)

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """f32 [T, vocab], every position, no cache, naive attention: the plain truth."""
        return self._forward(token_ids, None)

    def forward(self, token_ids: Sequence[int], cache: LatentCache, last_only: bool = False) -> np.ndarray:
        """Append tokens to the cache and return their logits f32 [T, vocab], or [1, vocab] of the last one.

        An interrupted call leaves the cache at its old length. ResourceError E6001 when the context is full.
        """
        cache.reserve(len(token_ids))
        return self._forward(token_ids, cache, last_only)

    def generate(
        self,
        token_ids: Sequence[int],
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        seed: int | None = None,
    ) -> Iterator[int]:
        """Yield new token ids, the end of sentence included; greedy unless a temperature is given. Latent
        cache, absorbed attention.
        """
        return Session(self).generate(
            token_ids, Sampling(temperature, top_k, top_p, min_p, seed), max_new_tokens, self.config.stop_ids
        )

    def _forward(
        self, token_ids: Sequence[int], cache: LatentCache | None, last_only: bool = False
    ) -> np.ndarray:
        ids = np.asarray(token_ids, np.int64)
        if ids.ndim != 1 or (len(ids) and not (ids.min() >= 0 and ids.max() < self.config.vocab_size)):
            raise ValueError(f"token ids must be a list of integers from 0 to {self.config.vocab_size - 1}")
        x = self.embed_tokens(ids=ids)  # [T, D]
        if not len(ids):
            return np.empty((0, self.config.vocab_size), np.float32)
        start = cache.length if cache is not None else 0
        cos, sin = rope_tables(self.config, np.arange(start, start + len(ids)))
        logits = self.decoder(x, cos, sin, cache, last_only)
        if cache is not None:
            cache.advance(len(ids))
        return logits
