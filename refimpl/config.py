"""The `config.json` of DeepSeek-V3 and its family as a frozen dataclass; field names are the file's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from typing import Any

from refimpl import fields as table
from refimpl.errors import refusal
from refimpl.fields import scaling
from refimpl.fields.family import KIN, missing
from refimpl.files import real, whole


@dataclass(frozen=True)
class YarnScaling:
    """`rope_scaling` of type yarn (Peng et al. 2023, section 3.4, as DeepSeek-V2/V3 use it)."""

    factor: float = 40.0
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    # Defaults as DeepSeek's own code has them: an absent mscale is 1, an absent mscale_all_dim 0.
    mscale: float = 1.0
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None  # size of cosines and sines in place of what these two make


@dataclass(frozen=True)
class DeepSeekConfig:
    """Shape and constants of a model of DeepSeek-V3's family. Defaults are the 671B model's."""

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
    scoring_func: str = "sigmoid"  # or "softmax": DeepSeek-V2's affinities
    # How experts are chosen. "noaux_tc": with a bias, groups ranked by their two best;
    # "group_limited_greedy": by their best; "greedy": of all experts, which is one group here.
    topk_method: str = "noaux_tc"
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
    eos_token_id: int | tuple[int, ...] | None = 1
    scale_fmt: str | None = None  # of FP8 activations: "ue8m0" for powers of two (DeepSeek-V3.1)

    # Sparse attention (DeepSeek-V3.2, GLM-5): rows that a token attends to; None: all, and no indexer.
    index_topk: int | None = None
    index_n_heads: int = 64
    index_head_dim: int = 128
    indexer_rope_interleave: bool = False  # pairs of the indexer's rotary embedding lie side by side
    indexer_types: tuple[str, ...] | None = None  # "full" or "shared" for each layer; None: all are full

    @property
    def cache_width(self) -> int:
        """Numbers that the cache keeps of a token and layer."""
        return self.kv_lora_rank + self.qk_rope_head_dim + (self.index_head_dim if self.index_topk else 0)

    def shares_rows(self, layer: int) -> bool:
        """Whether a layer attends to the rows that an earlier one chose."""
        return self.indexer_types is not None and self.indexer_types[layer] == "shared"

    @property
    def stop_ids(self) -> frozenset[int]:
        """The ids of `eos_token_id`, however many."""
        ids = self.eos_token_id
        return frozenset() if ids is None else frozenset([ids] if isinstance(ids, int) else ids)

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
        _check_outer(raw, where)
        raw = own_fields(raw)
        _refuse_other_schemes(raw, where)
        values: dict[str, Any] = {}
        said = raw
        raw = KIN[raw["model_type"]].absent | _said(raw)
        for f in fields(cls):
            if f.name in _READ:
                values[f.name] = _READ[f.name](raw, where)
            elif f.name in raw:
                values[f.name] = (
                    _NULL[f.name]
                    if raw[f.name] is None and f.name in _NULL
                    else _typed(raw[f.name], str(f.type), f.name, where)
                )
            elif f.name in _REQUIRED:
                raise refusal("E4003 missing", where, name=f.name)
        if values["topk_method"] == "greedy":  # whatever groups the file speaks of
            values |= {"n_group": 1, "topk_group": 1}
        config = cls(**values)
        _check_router(config, where)
        _check_sparse(config, said, where)
        _check_sizes(config, where)
        return config


_NULL = {
    "index_topk": None,
    "q_lora_rank": None,
    "bos_token_id": None,
    "n_shared_experts": 0,
}  # what null stands for
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


def own_fields(raw: dict[str, Any]) -> dict[str, Any]:
    """The language model's fields, where a config nests them in `text_config` beside those of other parts."""
    inner = raw.get("text_config")
    if not isinstance(inner, dict) or "hidden_size" in raw:
        return raw
    return {k: raw[k] for k in _SHARED if k in raw} | inner


_SHARED = ("bos_token_id", "eos_token_id", "quantization_config", "tie_word_embeddings")
_ANOTHER = {"model_type", "text_config", "bos_token_id", "eos_token_id"}  # may differ from the inner ones


def _check_outer(raw: dict[str, Any], where: object) -> None:
    """Judge the fields around a nested config. InputFormatError E4003 where a field that governs the model
    stands outside and inside and differs; those that stand outside alone are named in a note.
    """
    inner = raw.get("text_config")
    if not isinstance(inner, dict):
        return
    outside = {k: v for k, v in raw.items() if k not in _ANOTHER}
    for key in outside.keys() & inner.keys():
        row = table.row("config.json", key)
        if row is None or row.verdict != table.HARMLESS:
            scaling.one({"outside": outside[key], "in text_config": inner[key]}, key, where)
    table.judge("config.json", inner | outside, where, outside)
    alone = [k for k in outside if k not in inner and _governs(k) and k not in _SHARED]
    if alone and "hidden_size" not in raw:
        table.note(f"{where}: fields beside text_config are not the language model's: {', '.join(alone)}")


def _governs(key: str) -> bool:
    row = table.row("config.json", key)
    return row is not None and row.verdict == table.HONOURED


def _refuse_other_schemes(raw: dict[str, Any], where: object) -> None:
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in KIN:
        found, expected = f"model_type {str(kind)[:40]!r}", " or ".join(map(repr, KIN))
        if why := missing(kind):
            raise refusal("E4001 kin", where, why=why, found=found, expected=expected)
        raise refusal("E4001", where, found=found, expected=expected)
    table.judge("config.json", raw, where)
    if raw.get("index_topk") is not None and "index_topk" not in KIN[kind].absent:
        sparse = " or ".join(repr(name) for name, kin in KIN.items() if "index_topk" in kin.absent)
        found, expected = repr(raw["index_topk"])[:40], f"model_type {sparse}, or no such field"
        raise refusal("E4002", where, key="index_topk", why=SPARSE, found=found, expected=expected)
    for key in scaling.PLACES:
        if isinstance(raw.get(key), dict):
            table.judge("rope_scaling", raw[key], where)
        elif raw.get(key) is not None:
            raise refusal("E4003", where, found=type(raw[key]).__name__, expected="an object or null")
    scheme = raw.get("quantization_config")
    if scheme is None:
        return
    if isinstance(scheme, dict) and scheme.get("quant_method") == "compressed-tensors":
        _check_compressed(scheme, where)
        return
    if not isinstance(scheme, dict) or scheme.get("quant_method") != "fp8":
        expected = "quant_method 'fp8' or 'compressed-tensors'"
        raise refusal("E4002 quantization", where, found=repr(scheme)[:80], expected=expected)
    if (scheme.get("fmt") or "e4m3") != "e4m3" or scheme.get("weight_block_size") != [128, 128]:
        found = f"{scheme.get('fmt')} in blocks of {scheme.get('weight_block_size')}"
        raise refusal("E4002 scheme", where, found=found, expected="e4m3 in blocks of [128, 128]")
    table.judge("quantization_config", scheme, where)


def _check_compressed(scheme: dict[str, Any], where: object) -> None:
    """Weights of INT4 in symmetric groups of 32, packed, as Kimi-K2-Thinking has them, and no others."""
    groups = scheme.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        found = f"config_groups {groups!r}"[:80]
        raise refusal("E4002 quantization", where, found=found, expected="groups of weights")
    table.judge("compressed-tensors", scheme, where)
    for group in groups.values():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict):
            raise refusal("E4002 quantization", where, found=repr(group)[:80], expected="weights in a group")
        table.judge("compressed-tensors", {k: v for k, v in group.items() if k != "weights"}, where)
        table.judge("weights of compressed-tensors", {"num_bits": 0, "group_size": 0} | weights, where)


SPARSE = "sparse attention, which other models of the family have"

# Fields that some of these models leave out as null.
_UNSAID = ("n_group", "topk_group", "scoring_func", "topk_method")


def _said(raw: dict[str, Any]) -> dict[str, Any]:
    """The fields that say something: null is silence in those that some models of the family do not have."""
    return {k: v for k, v in raw.items() if v is not None or k not in _UNSAID}


def _word(name: str, *known: str) -> Callable[[dict[str, Any], object], str]:
    """A reader of a field that is one of these words, the first where it is absent."""

    def read(raw: dict[str, Any], where: object) -> str:
        found = raw.get(name, known[0])
        if found not in known:
            expected = " or ".join(map(repr, known))
            shown = repr(found)[:40]
            raise refusal("E4002", where, key=name, why="another router", found=shown, expected=expected)
        return found

    return read


def _first_dense(raw: dict[str, Any], where: object) -> int:
    """`first_k_dense_replace`, or the same from `mlp_layer_types`, which has a word for every layer."""
    kinds = raw.get("mlp_layer_types")
    if kinds is None:
        if raw.get("first_k_dense_replace") is None:
            raise refusal("E4003 missing", where, name="first_k_dense_replace")
        return _typed(raw["first_k_dense_replace"], "int", "first_k_dense_replace", where)
    layers = len(kinds) if isinstance(kinds, list) else -1
    dense = next((i for i in range(layers) if kinds[i] != "dense"), layers)
    if layers != raw.get("num_hidden_layers") or kinds[dense:] != ["sparse"] * (layers - dense):
        why, expected = "other layers are dense than the first", "'dense' for the first layers, then 'sparse'"
        found = repr(kinds)[:60]
        raise refusal("E4002", where, key="mlp_layer_types", why=why, found=found, expected=expected)
    return dense


def _indexer_types(raw: dict[str, Any], where: object) -> tuple[str, ...] | None:
    """From the words for each layer, from their first letters, or from how often a layer is full."""
    layers, found = raw.get("num_hidden_layers"), raw.get("indexer_types")
    if raw.get("index_topk") is None or not isinstance(layers, int):
        return None
    if found is None and (pattern := raw.get("index_topk_pattern")) is not None:
        found = [{"F": "full", "S": "shared"}.get(letter, letter) for letter in pattern]
    if found is None:
        every, first = (
            _typed(raw[name] if raw.get(name) is not None else default, "int", name, where)
            for name, default in (("index_topk_freq", 1), ("index_skip_topk_offset", 2))
        )
        full = [max(i - first + 1, 0) % max(every, 1) == 0 for i in range(layers)]
        found = ["full" if here else "shared" for here in full]
    if len(found) < layers or {*map(str, found)} - {"full", "shared"} or found[0] != "full":
        expected = "'full' or 'shared' for every layer, the first full"
        shown = repr(found)[:60]
        raise refusal("E4002", where, key="indexer_types", why=SPARSE, found=shown, expected=expected)
    kinds = tuple(found[:layers])
    return kinds if "shared" in kinds else None


def _check_sparse(c: DeepSeekConfig, raw: dict[str, Any], where: object) -> None:
    if c.index_topk is None:
        kin = next((k for k, v in raw.items() if k.startswith("index") and v is not None), None)
        if kin is not None and kin in table.TABLES["config.json"]:
            shown, expected = repr(raw[kin])[:40], "an index_topk beside it"
            raise refusal("E4002", where, key=kin, why=SPARSE, found=shown, expected=expected)
        return
    d = c.index_head_dim
    good = c.index_topk > 0 and c.index_n_heads > 0 and d >= c.qk_rope_head_dim and d & (d - 1) == 0
    if not good or c.q_lora_rank is None:
        found = f"{c.index_topk} rows by {c.index_n_heads} heads of {d}, q_lora_rank {c.q_lora_rank}"
        expected = "positive numbers, heads of a power of two not below qk_rope_head_dim, and a q_lora_rank"
        raise refusal("E4004 indexer", where, found=found, expected=expected)


def _check_router(c: DeepSeekConfig, where: object) -> None:
    """Two routers are known: DeepSeek-V3's, with sigmoid scores and a bias, and DeepSeek-V2's, with softmax
    and none.
    """
    softmax = c.scoring_func == "softmax"
    if softmax == (c.topk_method == "noaux_tc"):
        expected = "'sigmoid' with 'noaux_tc', or 'softmax' with 'greedy' or 'group_limited_greedy'"
        found = f"{c.scoring_func!r} with {c.topk_method!r}"
        why = "another router"
        raise refusal("E4002", where, key="scoring_func", why=why, found=found, expected=expected)
    if softmax and c.norm_topk_prob and c.routed_scaling_factor != 1:
        why = "published codes differ on whether normalized softmax scores are scaled as well"
        found, expected = repr(c.norm_topk_prob), "false, or a routed_scaling_factor of 1"
        raise refusal("E4002", where, key="norm_topk_prob", why=why, found=found, expected=expected)


def _scale_fmt(raw: dict[str, Any], where: object) -> str | None:
    found = (raw.get("quantization_config") or {}).get("scale_fmt")
    if found not in (None, "float", "ue8m0"):
        why = "another format of scales"
        raise refusal(
            "E4002",
            where,
            key="scale_fmt",
            why=why,
            found=repr(found)[:40],
            expected="'ue8m0' or no such field",
        )
    return None if found == "float" else found


def _theta(raw: dict[str, Any], where: object) -> float:
    found = scaling.theta(raw, where)
    return _number(10000.0 if found is None else found, "rope_theta", where)


def token_ids(value: Any) -> tuple[int, ...] | None:
    """Ids as a config names them, a number, a list or null; None for what is none of these."""
    ids = value if isinstance(value, list | tuple) else [] if value is None else [value]
    good = all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < 1 << 32 for i in ids)
    return tuple(dict.fromkeys(ids)) if good else None


def _stop_ids(raw: dict[str, Any], where: object) -> int | tuple[int, ...] | None:
    value = raw.get("eos_token_id", 1)
    if (ids := token_ids(value)) is None:
        expected = "a token id, a list of them or null"
        raise refusal("E4003 type", where, name="eos_token_id", found=repr(value)[:40], expected=expected)
    return plain_ids(ids)


def plain_ids(ids: Iterable[int]) -> int | tuple[int, ...] | None:
    """Ids as `eos_token_id` holds them: none, one, or several in order."""
    found = tuple(sorted(set(ids)))
    return found if len(found) > 1 else found[0] if found else None


def _yarn(raw: dict[str, Any], where: object) -> YarnScaling | None:
    said = scaling.yarn(raw, where)
    if said is None:
        return None
    values = {
        f.name: _typed(said[f.name], str(f.type), f.name, where)
        for f in fields(YarnScaling)
        if f.name in said
    }
    yarn = YarnScaling(**values)
    if yarn.attention_factor is not None and not yarn.attention_factor > 0:
        raise refusal("E4003 values", where, found=repr(yarn), expected="a positive attention_factor")
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


_READ = {
    "rope_scaling": _yarn,
    "rope_theta": _theta,
    "eos_token_id": _stop_ids,
    "scale_fmt": _scale_fmt,
    "first_k_dense_replace": _first_dense,
    "indexer_types": _indexer_types,
    "scoring_func": _word("scoring_func", "sigmoid", "softmax"),
    "topk_method": _word("topk_method", "noaux_tc", "greedy", "group_limited_greedy"),
}


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
    for f in fields(c):
        value = getattr(c, f.name)
        if type(value) is int:
            whole(value, f.name, where)
        elif type(value) is float:
            real(value, f.name, where)
    real(c.rope_theta, "rope_theta", where, 2, 1e15)  # its logarithm is divided by
    real(c.rms_norm_eps, "rms_norm_eps", where, 0, 1)
    if c.rope_scaling is not None:
        for name, least in (("factor", 1), ("beta_fast", 1e-3), ("beta_slow", 1e-3)):
            real(getattr(c.rope_scaling, name), name, where, least, 1e6)
        for name in ("mscale", "mscale_all_dim"):
            real(getattr(c.rope_scaling, name), name, where, -1e3, 1e3)
        whole(c.rope_scaling.original_max_position_embeddings, "original_max_position_embeddings", where, 1)
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
