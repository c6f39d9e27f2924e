"""DeepSeek-V3 from top to bottom. No framework: every operation comes from the table in `ops.py`, for the
backend of the model.

    embed_tokens -> [ RMSNorm -> MLA -> + -> RMSNorm -> MLP or experts + shared expert -> + ] x layers
                 -> RMSNorm -> lm_head

Weights are named as in the Hugging Face checkpoint; `names.py` finds them in all three kinds of folder.
Letters: T tokens, D hidden, H heads, L kv_lora_rank, n/r/v head dimensions without position, with position,
of values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from refimpl.cache import LatentCache
from refimpl.checkpoint import names
from refimpl.config import DeepSeekConfig
from refimpl.devices import open_machine
from refimpl.devices.cpu import Host
from refimpl.errors import refusal
from refimpl.generate import Sampling, Session
from refimpl.reference.attention import rope_tables, softmax_scale
from refimpl.tensors import ScaledFP8, Stack, Weight


class Weights:
    """The checkpoint seen from one module: `w("q_a_proj.weight")` under a prefix, shapes checked, and the
    operations chosen for that module.
    """

    def __init__(self, model: Model, prefix: str = ""):
        self.model, self.machine, self.prefix = model, model.machine, prefix

    def under(self, prefix: str) -> Weights:
        """The same checkpoint, one level deeper."""
        return Weights(self.model, self.prefix + prefix + ".")

    @property
    def module(self) -> str:
        """The module's name, "model.layers.3.mlp"."""
        return self.prefix.rstrip(".")

    def op(self, name: str) -> Callable:
        """The function that runs operation `name` in this module."""
        return self.model.op(self.module, name)

    def __call__(self, name: str, *shape: int) -> Any:
        """A weight where its module runs. MismatchError E4010 when the tensor is missing, E4011 when its
        shape is another.
        """
        return self.machine.weight(self.prefix + name, self._find(name, *shape))

    def numbers(self, name: str, *shape: int) -> Any:
        """The same as an array, whatever it is packed in."""
        return self.machine.numbers(self.prefix + name, self._find(name, *shape))

    def side_by_side(self, first: tuple, second: tuple) -> tuple[Any, Any]:
        """Two weights, each (name, *shape), that multiply the same x."""
        return self.machine.side_by_side(
            (self.prefix + first[0], self.prefix + second[0]), (self(*first), self(*second))
        )

    def norm(self, *readers: Any) -> Callable:
        """RMSNorm before linears of these weights: (x, weight, eps, keep) -> numbers and what the linears
        read, codes where they multiply those.

        With keep=False there may be None for the numbers.
        """
        if self.machine.takes_codes(*readers):
            quantizing = self.op("rms_norm_quant")

            def norm(x: Any, weight: Any, eps: float, keep: bool = False) -> tuple[Any, Any]:
                normed, codes, scale = quantizing(x, weight, eps, keep)
                return normed, ScaledFP8(codes, scale)
        else:
            plain = self.op("rms_norm")

            def norm(x: Any, weight: Any, eps: float, keep: bool = False) -> tuple[Any, Any]:
                normed = plain(x, weight, eps)
                return normed, normed

        return norm

    def _find(self, name: str, *shape: int) -> Weight | Stack:
        full = self.prefix + name
        key = names.to_gguf(full)
        checkpoint = self.model.checkpoint
        if key not in checkpoint:
            where = getattr(checkpoint, "folder", "checkpoint")
            raise refusal("E4010", where, name=full, expected=key)
        weight = checkpoint[key]
        found = tuple(getattr(weight, "shape", ())) or (len(weight),)
        if found != shape[: len(found)]:
            raise refusal("E4011 different", key, found=list(found), expected=list(shape))
        return weight


class Attention:
    """Multi-head latent attention of one layer."""

    def __init__(self, c: DeepSeekConfig, layer: int, w: Weights):
        self.config, self.layer, self.scale, heads = c, layer, softmax_scale(c), c.num_attention_heads
        self.linear, self.rms_norm, self.rope = w.op("linear"), w.op("rms_norm"), w.op("rope")
        self.naive, self.absorbed, self.both = (
            w.op("mla_naive"),
            w.op("mla_absorbed"),
            w.machine.both(self.linear),
        )
        kv_a = ("kv_a_proj_with_mqa.weight", c.kv_lora_rank + c.qk_rope_head_dim, c.hidden_size)
        if c.q_lora_rank is None:
            self.q_proj, self.kv_a_proj_with_mqa = w.side_by_side(
                ("q_proj.weight", heads * c.qk_head_dim, c.hidden_size), kv_a
            )
        else:
            self.q_a_proj, self.kv_a_proj_with_mqa = w.side_by_side(
                ("q_a_proj.weight", c.q_lora_rank, c.hidden_size), kv_a
            )
            self.q_a_layernorm = w("q_a_layernorm.weight", c.q_lora_rank)
            self.q_b_proj = w("q_b_proj.weight", heads * c.qk_head_dim, c.q_lora_rank)
        self.kv_a_layernorm = w("kv_a_layernorm.weight", c.kv_lora_rank)
        self.o_proj = w("o_proj.weight", c.hidden_size, heads * c.v_head_dim)
        self.readers = (
            self.kv_a_proj_with_mqa,
            self.q_proj if c.q_lora_rank is None else self.q_a_proj,
        )  # of x
        self.q_norm = None if c.q_lora_rank is None else w.norm(self.q_b_proj)
        # Absorption needs kv_b as numbers, not as codes: dequantized once, as KTransformers does.
        kv_b = w.numbers("kv_b_proj.weight", heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank)
        self.kv_b = kv_b.reshape(heads, c.qk_nope_head_dim + c.v_head_dim, c.kv_lora_rank)

    def down(self, x: np.ndarray | ScaledFP8) -> tuple[np.ndarray, np.ndarray]:
        """[T, D] -> queries [T, H, n+r], not yet turned, and [T, L+r], the latent before its norm and the key
        before its turn.
        """
        c = self.config
        if self.q_norm is None:
            q, kv_a = self.both(x, self.q_proj, self.kv_a_proj_with_mqa)
        else:
            q_a, kv_a = self.both(x, self.q_a_proj, self.kv_a_proj_with_mqa)
            _, read = self.q_norm(q_a, self.q_a_layernorm, c.rms_norm_eps)
            q = self.linear(read, self.q_b_proj)
        return q.reshape(len(q), c.num_attention_heads, c.qk_head_dim), kv_a

    def __call__(
        self, x: np.ndarray | ScaledFP8, cos: np.ndarray, sin: np.ndarray, cache: LatentCache | None
    ) -> np.ndarray:
        """[T, D] -> [T, D]; without a cache naive attention over x alone, with one absorbed attention over
        all it holds.
        """
        c = self.config
        q, kv_a = self.down(x)
        q_nope, q_pe = q[..., : c.qk_nope_head_dim], self.rope(q[..., c.qk_nope_head_dim :], cos, sin)
        latent = self.rms_norm(kv_a[:, : c.kv_lora_rank], self.kv_a_layernorm, c.rms_norm_eps)
        k_pe = self.rope(kv_a[:, c.kv_lora_rank :], cos, sin)
        if cache is None:
            out = self.naive(q_nope, q_pe, latent, k_pe, self.kv_b, self.scale)
        else:
            latents, keys, length = cache.extend(self.layer, latent, k_pe)
            out = self.absorbed(q_nope, q_pe, latents, keys, self.kv_b, self.scale, length)
        return self.linear(out.reshape(len(q), -1), self.o_proj)  # [T, H*v] -> [T, D]


class MLP:
    """SwiGLU: the dense layers' MLP and the shared expert."""

    def __init__(self, hidden: int, intermediate: int, w: Weights):
        self.swiglu = w.op("swiglu")
        self.gate_proj, self.up_proj = w.side_by_side(
            ("gate_proj.weight", intermediate, hidden), ("up_proj.weight", intermediate, hidden)
        )
        self.down_proj = w("down_proj.weight", hidden, intermediate)
        self.readers = (self.gate_proj, self.up_proj)  # of x

    def __call__(self, x: np.ndarray | ScaledFP8) -> np.ndarray:
        return self.swiglu(x, self.gate_proj, self.up_proj, self.down_proj)


class MoE:
    """Router, routed experts and shared expert of one layer."""

    def __init__(self, c: DeepSeekConfig, w: Weights):
        self.config = c
        self.route, self.experts, self.start = (
            w.machine.segment(w.op("route")),
            w.op("experts"),
            w.machine.start,
        )
        self.gate = w.numbers("gate.weight", c.n_routed_experts, c.hidden_size)
        self.bias = w("gate.e_score_correction_bias", c.n_routed_experts)
        shape = (c.n_routed_experts, c.moe_intermediate_size, c.hidden_size)
        self.gate_proj = w("experts.gate_proj.weight", *shape)
        self.up_proj = w("experts.up_proj.weight", *shape)
        self.down_proj = w("experts.down_proj.weight", shape[0], shape[2], shape[1])
        width = c.moe_intermediate_size * c.n_shared_experts
        mlp = MLP(c.hidden_size, width, w.under("shared_experts")) if width else None
        self.shared: Any = w.machine.segment(mlp) if mlp else None
        self.readers = mlp.readers if mlp else ()

    def __call__(self, x: np.ndarray, read: np.ndarray | ScaledFP8) -> np.ndarray:
        """x for the router and the routed experts, `read` (the same, or its codes) for the shared one."""
        ids, weights = self.route(x, self.gate, self.bias, self.config)
        routed = self.start(self.experts, x, ids, weights, self.gate_proj, self.up_proj, self.down_proj)
        if self.shared is None:
            return routed()
        shared = self.shared(read)  # at the same time, on a machine that can
        return routed() + shared


class Block:
    """One layer."""

    def __init__(self, c: DeepSeekConfig, layer: int, w: Weights):
        self.eps, self.dense = c.rms_norm_eps, c.is_dense(layer)
        self.input_layernorm = w("input_layernorm.weight", c.hidden_size)
        self.post_attention_layernorm = w("post_attention_layernorm.weight", c.hidden_size)
        self.self_attn = Attention(c, layer, w.under("self_attn"))
        mlp: Any = (
            MLP(c.hidden_size, c.intermediate_size, w.under("mlp")) if self.dense else MoE(c, w.under("mlp"))
        )
        self.input_norm, self.post_attention_norm = w.norm(*self.self_attn.readers), w.norm(*mlp.readers)
        self.mlp = w.machine.segment(mlp) if self.dense else mlp
        self.attend = w.machine.segment(self._attend)

    def __call__(
        self, x: np.ndarray, cos: np.ndarray, sin: np.ndarray, cache: LatentCache | None
    ) -> np.ndarray:
        x, normed, read = self.attend(x, cos, sin, cache)
        return x + (self.mlp(read) if self.dense else self.mlp(normed, read))

    def _attend(
        self, x: np.ndarray, cos: np.ndarray, sin: np.ndarray, cache: LatentCache | None
    ) -> tuple[np.ndarray, Any, Any]:
        _, read = self.input_norm(x, self.input_layernorm, self.eps)
        x = x + self.self_attn(read, cos, sin, cache)
        return x, *self.post_attention_norm(x, self.post_attention_layernorm, self.eps, not self.dense)


class Model:
    """DeepSeek-V3 over any mapping of weights, usually a `hybrid.Checkpoint`.

    `activations="fp8"` rounds the inputs of FP8 linears to E4M3 per 1x128 group and those of GGML experts to
    Q8_K, as the real system does; `"exact"` keeps them float32, so that logits can be compared with any
    implementation fed the dequantized weights.
    """

    def __init__(
        self,
        config: DeepSeekConfig,
        checkpoint: Mapping[str, Weight | Stack],
        backend: str = "reference",
        activations: str = "fp8",
        machine: Host | None = None,
    ):
        if activations not in ("fp8", "exact"):
            raise ValueError(f"activations must be 'fp8' or 'exact', not {activations!r}")
        self.config, self.backend, self.activations = config, backend, activations
        self.checkpoint = checkpoint
        self.machine = machine or open_machine(backend, activations)
        self._build()

    def _build(self) -> None:
        """Give every module its weights and, from `op`, its operations."""
        config, w = self.config, Weights(self)
        self.embed = self.op("model.embed_tokens", "embed")
        self.rms_norm, self.linear = self.op("model.norm", "rms_norm"), self.op("lm_head", "linear")
        self.embed_tokens = w("model.embed_tokens.weight", config.vocab_size, config.hidden_size)
        self.layers = [
            Block(config, i, w.under(f"model.layers.{i}")) for i in range(config.num_hidden_layers)
        ]
        self.norm = w("model.norm.weight", config.hidden_size)
        self.lm_head = w("lm_head.weight", config.vocab_size, config.hidden_size)
        self.head = self.machine.segment(self._head)

    def op(self, module: str, name: str) -> Callable:
        """The function for operation `name` in `module`, a path like "model.layers.3.mlp" ("" is the model
        itself).
        """
        function = self.machine.load(module, name)
        return (
            partial(function, activations=self.activations)
            if name in ("linear", "swiglu", "experts")
            else function
        )

    def new_cache(self) -> LatentCache:
        """An empty cache for one conversation."""
        return self.machine.new_cache(self.config)

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
        stop = frozenset() if self.config.eos_token_id is None else frozenset([self.config.eos_token_id])
        return Session(self).generate(
            token_ids, Sampling(temperature, top_k, top_p, min_p, seed), max_new_tokens, stop
        )

    def _forward(
        self, token_ids: Sequence[int], cache: LatentCache | None, last_only: bool = False
    ) -> np.ndarray:
        ids = np.asarray(token_ids, np.int64)
        if ids.ndim != 1 or (len(ids) and not (ids.min() >= 0 and ids.max() < self.config.vocab_size)):
            raise ValueError(f"token ids must be a list of integers from 0 to {self.config.vocab_size - 1}")
        start = cache.length if cache is not None else 0
        cos, sin = rope_tables(self.config, np.arange(start, start + len(ids)))
        x = self.embed(self.embed_tokens, ids)  # [T, D]
        if not len(ids):
            return np.empty((0, self.config.vocab_size), np.float32)
        for i, layer in enumerate(self.layers):
            x, cos, sin = self.machine.bring(f"model.layers.{i}", x, cos, sin)
            x = layer(x, cos, sin, cache)
        (x,) = self.machine.bring("model.norm", x[-1:] if last_only else x)
        logits = self.machine.numpy(self.head(x))
        if cache is not None:
            cache.advance(len(ids))
        return logits

    def _head(self, x: np.ndarray) -> np.ndarray:
        return self.linear(self.rms_norm(x, self.norm, self.config.rms_norm_eps), self.lm_head)
