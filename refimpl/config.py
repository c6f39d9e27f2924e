"""DeepSeek-V3's `config.json` as a frozen dataclass; field names are the file's own."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from refimpl.errors import refusal


@dataclass(frozen=True)
class YarnScaling:
    """`rope_scaling` of type yarn (Peng et al. 2023, section 3.4, as DeepSeek-V2/V3 use it)."""

    factor: float = 40.0
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0


@dataclass(frozen=True)
class DeepSeekConfig:
    """Shape and constants of a DeepSeek-V3/R1 model. Defaults are the 671B model's."""

    vocab_size: int = 129280
    hidden_size: int = 7168
    intermediate_size: int = 18432  # of the dense layers
    moe_intermediate_size: int = 2048  # of one routed expert
    num_hidden_layers: int = 61
    num_nextn_predict_layers: int = (
        0  # multi-token-prediction layers stored behind the last one; recognized and not run
    )
    num_attention_heads: int = 128
    q_lora_rank: int | None = 1536  # None: one matrix q_proj instead of q_a_proj and q_b_proj
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    n_routed_experts: int = 256
    n_shared_experts: int = 1
    num_experts_per_tok: int = 8
    n_group: int = 8
    topk_group: int = 4
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    first_k_dense_replace: int = 3
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: YarnScaling | None = field(default_factory=lambda: YarnScaling(mscale_all_dim=1.0))
    max_position_embeddings: int = 163840
    bos_token_id: int | None = 0
    eos_token_id: int | None = 1

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    def is_dense(self, layer: int) -> bool:
        """The first `first_k_dense_replace` layers have an ordinary MLP, the others experts."""
        return layer < self.first_k_dense_replace

    @classmethod
    def from_dict(cls, raw: dict[str, Any], where: object = "config.json") -> DeepSeekConfig:
        """Build from a parsed config.json.

        Raises UnsupportedError for another architecture or scheme (E4001, E4002), InputFormatError for a
        missing or ill-typed field (E4003), MismatchError for sizes that cannot go together (E4004).
        """
        _refuse_other_schemes(raw, where)
        values: dict[str, Any] = {}
        for f in fields(cls):
            if f.name == "rope_scaling":
                values[f.name] = _yarn(raw, where)
            elif f.name == "rope_theta":
                newer = raw.get("rope_parameters")
                default = newer.get("rope_theta", 10000.0) if isinstance(newer, dict) else 10000.0
                values[f.name] = _number(raw.get("rope_theta", default), f.name, where)
            elif f.name in raw:
                values[f.name] = (
                    raw[f.name]
                    if raw[f.name] is None and f.name in _MAY_BE_NULL
                    else _typed(raw[f.name], str(f.type), f.name, where)
                )
            elif f.name in _REQUIRED:
                raise refusal("E4003 missing", where, name=f.name)
        config = cls(**values)
        _check_sizes(config, where)
        return config


_MAY_BE_NULL = {"q_lora_rank", "bos_token_id", "eos_token_id"}
_REQUIRED = {
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "n_routed_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "intermediate_size",
    "first_k_dense_replace",
    "q_lora_rank",
}
_HINT = "refimpl runs DeepSeek-V3 and R1; see docs/hybrid-folder.md"


def _refuse_other_schemes(raw: dict[str, Any], where: object) -> None:
    if raw.get("model_type") != "deepseek_v3":
        raise refusal("E4001", where, found=f"model_type {raw.get('model_type')!r}", expected="'deepseek_v3'")
    fixed = {
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "hidden_act": "silu",
        "moe_layer_freq": 1,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "rope_interleave": True,
    }
    for key, expected in fixed.items():
        if raw.get(key, expected) != expected:
            raise refusal("E4002", where, key=key, found=repr(raw[key]), expected=repr(expected))
    scheme = raw.get("quantization_config")
    if scheme is None:
        return
    if not isinstance(scheme, dict) or scheme.get("quant_method") != "fp8":
        raise refusal("E4002 quantization", where, found=repr(scheme)[:80], expected="quant_method 'fp8'")
    if scheme.get("fmt", "e4m3") != "e4m3" or scheme.get("weight_block_size") != [128, 128]:
        found = f"{scheme.get('fmt')} in blocks of {scheme.get('weight_block_size')}"
        raise refusal("E4002 scheme", where, found=found, expected="e4m3 in blocks of [128, 128]")


def _yarn(raw: dict[str, Any], where: object) -> YarnScaling | None:
    # transformers 5 writes `rope_parameters`, DeepSeek's own files `rope_scaling`.
    scaling = raw.get("rope_scaling") or raw.get("rope_parameters")
    if scaling is None:
        return None
    if not isinstance(scaling, dict):
        raise refusal("E4003", where, found=type(scaling).__name__, expected="an object or null")
    kind = scaling.get("type", scaling.get("rope_type"))
    if kind in (None, "default"):
        return None
    if kind != "yarn":
        raise refusal("E4002 scaling", where, found=repr(kind), expected="'yarn'")
    values = {
        f.name: _typed(scaling[f.name], str(f.type), f.name, where)
        for f in fields(YarnScaling)
        if scaling.get(f.name) is not None
    }
    yarn = YarnScaling(**values)
    if not (
        yarn.factor >= 1
        and yarn.original_max_position_embeddings > 0
        and yarn.beta_fast > 0
        and yarn.beta_slow > 0
    ):
        raise refusal(
            "E4003 values", where, found=repr(yarn), expected="factor >= 1 and positive lengths and betas"
        )
    return yarn


def _typed(value: Any, kind: str, name: str, where: object) -> Any:
    if kind == "bool":
        if isinstance(value, bool):
            return value
        raise refusal("E4003 type", where, name=name, found=repr(value)[:40], expected="true or false")
    number = _number(value, name, where)
    if kind.startswith("int") and int(number) != number:
        raise refusal("E4003 type", where, name=name, found=repr(value)[:40], expected="an integer")
    return int(number) if kind.startswith("int") else float(number)


def _number(value: Any, name: str, where: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 2**53:
        raise refusal("E4003 type", where, name=name, found=repr(value)[:40], expected="a finite number")
    return value


def _check_sizes(c: DeepSeekConfig, where: object) -> None:
    positive = [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "moe_intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "kv_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
        "n_routed_experts",
        "num_experts_per_tok",
        "n_group",
        "topk_group",
        "rope_theta",
        "max_position_embeddings",
    ]
    for name in positive:
        if not getattr(c, name) > 0:
            raise refusal(
                "E4004 field", where, name=name, found=getattr(c, name), expected="a positive number"
            )
    if c.num_hidden_layers > 1024 or c.n_routed_experts > 65536:
        raise refusal(
            "E4004 sizes", where, found=f"{c.num_hidden_layers} layers, {c.n_routed_experts} experts"
        )
    if c.n_routed_experts % c.n_group:
        raise refusal("E4004 divide", where, found=f"{c.n_routed_experts} experts in {c.n_group} groups")
    if c.topk_group > c.n_group or c.num_experts_per_tok > c.topk_group * (c.n_routed_experts // c.n_group):
        found = f"top {c.num_experts_per_tok} of {c.topk_group} groups of {c.n_routed_experts // c.n_group}"
        raise refusal("E4004 chosen", where, found=found)
    if c.qk_rope_head_dim % 2:
        raise refusal("E4004 rope", where, found=c.qk_rope_head_dim)
