"""A model's folder as a mapping from GGUF names to weights, whichever of three layouts it has; nothing is
read before it is asked for.

hybrid        safetensors with GGUF names: FP8 pairs, plain tensors, and routed experts as flat U8 blobs of
GGML blocks (docs/hybrid-folder.md) safetensors   Hugging Face's layout and names, FP8, INT4 or BF16, one
tensor an expert gguf          all from GGUF, with `attn_kv_b` whole (old files) or in its halves `attn_k_b`
and `attn_v_b`
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from refimpl import fields, formats
from refimpl.checkpoint import codecs, compressed, gguf, link, names, safetensors
from refimpl.config import DeepSeekConfig, own_fields, token_ids
from refimpl.errors import RefimplError, printable, refusal
from refimpl.fields import family
from refimpl.files import map_bytes, read_small, window
from refimpl.formats import bf16, f16, f32
from refimpl.reference import int4, packed
from refimpl.tensors import Packed, ScaledFP8, ScaledInt4, Stack, TensorInfo, Weight

# __metadata__ of a hybrid file has the shape of each U8 blob: {"blk.3.ffn_up_exps.weight.shape":
# "256,2048,7168"}
SHAPE = ".shape"
VERSION = "refimpl.format_version"
FORMAT_VERSION = "1"
MAX_CONFIG = 4 << 20


class ExpertList(Sequence):
    """Experts stored one by one, seen as a stack; each is fetched when asked for."""

    def __init__(self, fetch: Callable[[int], Weight], shape: tuple[int, ...]):
        self._fetch, self.shape = fetch, shape

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, e):
        if not 0 <= e < len(self):
            raise IndexError(e)
        return self._fetch(e)


class Checkpoint(Mapping[str, Weight | Stack]):
    """Weights by GGUF name. `kind` is "hybrid", "safetensors" or "gguf", `config` the parsed config.json (or
    its likeness from GGUF metadata).
    """

    def __init__(
        self,
        folder: Path,
        kind: str,
        config: dict[str, Any],
        tensors: dict[str, TensorInfo],
        metadata: Mapping[str, str],
        linked: Mapping[str, TensorInfo] = MappingProxyType(
            {}
        ),  # experts that a hybrid folder leaves in their GGUF
    ):
        self.folder, self.kind, self.config, self.tensors, self._linked = (
            folder,
            kind,
            config,
            {**compressed.joined(tensors), **linked},
            linked,
        )
        self._shapes = _shapes(metadata, folder)
        self._memory = cache(map_bytes)
        self._sound: set[str] = set()  # scales that have been looked at: experts are fetched again and again
        # {GGUF name: {expert number, or None for a tensor that is whole: name in the file}}
        self._parts: dict[str, dict[int | None, str]] = {}
        for name in self.tensors:
            beside = name.endswith((".ggml_type", "_scale_inv")) or compressed.is_beside(name)
            if not beside and not names.is_derived(name):
                self._parts.setdefault(names.to_gguf(name), {})[names.split_expert(name)[1]] = name
        c = DeepSeekConfig.from_dict(config, where=folder)
        self.mtp = sorted(
            {
                n
                for name in self._parts
                if (n := names.layer_of(name)) is not None and n >= c.num_hidden_layers
            }
        )
        self._config = c
        for name in [n for n in self._parts if (names.layer_of(n) or 0) >= c.num_hidden_layers]:
            del self._parts[name]
        biases = [n for n in self._parts if n.endswith(names.BIAS[1])]
        if biases and c.topk_method != "noaux_tc":
            raise refusal("E4001 bias", folder, name=biases[0], found=repr(c.scoring_func))
        for name in [
            n
            for n in self._parts
            if n.endswith("attn_k_b.weight") and n.replace("attn_k_b", "attn_v_b") in self._parts
        ]:
            self._parts.setdefault(name.replace("attn_k_b", "attn_kv_b"), {})  # a file may have both forms
        self._refuse_unread()

    @classmethod
    def open(cls, folder: Path | str, config_folder: Path | str | None = None) -> Checkpoint:
        """Read the headers of a folder (or a .gguf file); config.json from `config_folder` where the folder
        has none.

        Raises what the readers raise, MismatchError E3001 for names of other models, E4020 when there is no
        config.json, E4021 for a missing path.
        """
        folder = Path(folder)
        if not folder.exists():
            raise refusal("E4021", folder)
        if (folder.is_dir() and any(folder.glob("*.safetensors"))) or (folder / safetensors.INDEX).exists():
            tensors, metadata = safetensors.read_folder(folder)
            linked = link.read(folder)
            kind = (
                "hybrid" if linked or any(name.endswith(".ggml_type") for name in tensors) else "safetensors"
            )
            return cls(folder, kind, read_config(folder, config_folder), tensors, metadata, linked)
        if folder.is_dir() and gguf.home(folder) is None:
            raise refusal("E4021 safetensors", folder, hint=safetensors.what_else(folder))
        file = gguf.read_all(folder)
        return cls(folder, "gguf", _config_of(file, folder, config_folder), gguf.unfused(file.tensors), {})

    def _refuse_unread(self) -> None:
        """MismatchError E4010 for a tensor that the model of the config does not have: without it another
        model would be computed. Layers that share rows may have an indexer of their own.
        """
        c = self._config
        known = {names.to_gguf(name) for name in names.shapes(c)}
        halves = {n.replace("attn_kv_b", half) for n in known for half in ("attn_k_b", "attn_v_b")}
        shared = {n for n in self._parts if ".indexer." in n} if c.index_topk else set()
        extra = sorted(self._parts.keys() - known - halves - shared)
        if extra:
            found = f"{extra[0]} and {len(extra) - 1} more" if len(extra) > 1 else extra[0]
            raise refusal("E4010 extra", self.folder, found=found, expected="those of its config alone")

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def __contains__(self, name: object) -> bool:
        return name in self._parts

    def __getitem__(self, name: str) -> Weight | Stack:
        parts = self._parts[name]
        if not parts:
            return self._join_kv_b(name)
        if None in parts:
            return self._weight(parts[None])
        if sorted(parts, key=str) != sorted(range(len(parts)), key=str):
            missing = min(set(range(len(parts) + 1)) - set(parts))
            raise refusal("E4010 expert", self.folder, missing=missing, name=name)
        first = self.tensors[parts[0]]
        for info in (self.tensors[n] for n in parts.values()):
            if info.shape != first.shape:
                found, expected = list(info.shape), f"{list(first.shape)} as {first.name}"
                raise refusal("E4011 damaged", info.path, name=info.name, found=found, expected=expected)
        return ExpertList(lambda e: self._weight(parts[e]), (len(parts), *first.shape))

    def stored(self, name: str) -> list[TensorInfo]:
        """What the files have of a tensor: itself, its experts, or the halves of kv_b. KeyError as
        `self[name]`.
        """
        if parts := self._parts[name]:
            return [self.tensors[n] for n in parts.values()]
        return [
            info for half in ("attn_k_b", "attn_v_b") for info in self.stored(name.replace("attn_kv_b", half))
        ]

    def mapped(self, info: TensorInfo) -> np.ndarray:
        """The bytes of one of `stored`'s, on the file: u8 [n]."""
        return window(info.path, info.offset, info.nbytes, self._memory(info.path))

    def _weight(self, name: str) -> Weight:
        info = self.tensors[name]
        memory = self._memory(info.path)
        if info.dtype == compressed.INT4:
            return self._int4(info)
        if info.dtype in safetensors.DTYPES and self.kind != "gguf" and name not in self._linked:
            return self._from_safetensors(name, info, safetensors.view(info, memory))
        weight = gguf.view(info, memory)
        return (
            packed.dequantize(weight) if weight.ggml_type == f32.GGML_TYPE or len(info.shape) == 1 else weight
        )

    def _from_safetensors(self, name: str, info: TensorInfo, array: np.ndarray) -> Weight:
        if info.dtype == "F8_E4M3":
            return ScaledFP8(array, self._scale(name, info))
        if info.dtype == "U8":
            return self._blob(name, array)
        if info.dtype in ("BF16", "F16"):
            # A matrix stays what it is in the file; there is no need to double an embedding table.
            module = bf16 if info.dtype == "BF16" else f16
            whole = Packed(array.view(np.uint8), module.GGML_TYPE, info.shape)
            return whole if len(info.shape) > 1 else packed.dequantize(whole)
        if info.dtype == "F32":
            return array
        raise refusal(
            "E4012", info.path, name=name, found=info.dtype, expected="F8_E4M3, BF16, F16, F32 or U8"
        )

    def _scale(self, name: str, info: TensorInfo) -> np.ndarray:
        found = self.tensors.get(name + "_scale_inv")
        tiles = tuple(-(-n // 128) for n in info.shape)
        if found is None:
            raise refusal("E4013", info.path, name=name)
        if found.dtype != "F32" or found.shape != tiles:
            shown = f"{found.dtype} {list(found.shape)}"
            raise refusal("E4014", found.path, name=found.name, found=shown, expected=f"F32 {list(tiles)}")
        scale = safetensors.view(found, self._memory(found.path))
        if found.name not in self._sound:
            check_scale(scale, found)
            self._sound.add(found.name)
        return scale

    def _int4(self, info: TensorInfo) -> ScaledInt4:
        found, scale = compressed.weight(info, self.tensors, self._memory)
        if scale.name not in self._sound:
            check_scale(int4.scales(found), scale)
            self._sound.add(scale.name)
        return found

    def _blob(self, name: str, array: np.ndarray) -> Packed:
        type_name = name.removesuffix(".weight") + ".ggml_type"
        kind = self.tensors.get(type_name)
        if kind is None or kind.dtype != "I64":
            raise refusal("E4015", self.folder, type_name=type_name)
        ggml_type = int(safetensors.view(kind, self._memory(kind.path)))
        module = formats.get(ggml_type, name)
        shape = self._shapes.get(name) or names.shapes(
            self._config, range(names.layer_of(name) or 0, (names.layer_of(name) or 0) + 1)
        ).get(names.to_hf(name))
        if shape is None or shape[-1] % module.WEIGHTS or formats.nbytes(ggml_type, shape) != array.size:
            expected = (
                formats.nbytes(ggml_type, shape)
                if shape and shape[-1] % module.WEIGHTS == 0
                else "whole blocks"
            )
            raise refusal(
                "E4016",
                self.folder,
                name=name,
                found=f"{array.size} bytes",
                expected=f"{expected} for {shape} {module.NAME}",
            )
        return Packed(array.reshape(*shape[:-1], -1), ggml_type, shape)

    def _join_kv_b(self, name: str) -> np.ndarray:
        """kv_b [H*(n+v), L] from the key half [H, L, n] and the value half [H, v, L]."""
        c = self._config
        heads, rank = c.num_attention_heads, c.kv_lora_rank
        wanted = {"attn_k_b": (heads, rank, c.qk_nope_head_dim), "attn_v_b": (heads, c.v_head_dim, rank)}
        halves = []
        for half, shape in wanted.items():
            weight = codecs.dense(self[name.replace("attn_kv_b", half)])
            if weight.shape not in (
                shape,
                (shape[0] * shape[1], shape[2]),
            ):  # some older files have the heads one below the other
                found, where = list(weight.shape), name.replace("attn_kv_b", half)
                raise refusal("E4011 metadata", where, found=found, expected=list(shape))
            halves.append(weight.reshape(shape))
        both = np.concatenate([halves[0].transpose(0, 2, 1), halves[1]], axis=1)
        return both.reshape(-1, rank)


def check_scale(scale: np.ndarray, info: TensorInfo) -> None:
    """MismatchError E4018 for a NaN, an infinity, a negative multiplier, or nothing but zeros, which is a
    hole in a download.

    A zero among others is a tile of zeros, and a subnormal a number like any other.
    """
    good = np.isfinite(scale) & (scale >= 0)
    if not good.all():
        at = np.unravel_index(int(good.argmin()), scale.shape)
        found = f"{scale[at]} at {[*map(int, at)]}"
    elif not scale.any():
        found = "nothing but zeros"
    else:
        return
    raise refusal("E4018", info.path, name=info.name, found=found, expected="positive numbers")


def _config_of(file: gguf.File, place: Path, config_folder: Path | str | None) -> dict[str, Any]:
    """The config.json beside a GGUF, else its likeness from the metadata.

    A config.json may describe another storage of the same model, so its quantization_config is left out; in
    all else the two must not contradict each other. MismatchError E4006.
    """
    beside = file.path.parent
    places = [Path(f) for f in (beside, place, config_folder) if f is not None]
    home = next((f for f in places if (f / "config.json").is_file()), None)
    if home is None:
        return gguf_config(file)
    raw = {k: v for k, v in own_fields(read_config(home)).items() if k != "quantization_config"}
    try:
        own = DeepSeekConfig.from_dict(gguf_config(file), where=file.path)
    except RefimplError as error:
        if error.code != "E1011":  # a file of experts alone says little of the model
            raise
        return raw
    _agree(DeepSeekConfig.from_dict(raw, where=home / "config.json"), own, file, home)
    return raw


def read_config(folder: Path, other: Path | str | None = None) -> dict[str, Any]:
    """config.json of the first of the folders that has one. MismatchError E4020 without any, InputFormatError
    E4003 when it is no JSON object.
    """
    for path in (Path(f) / "config.json" for f in (folder, other) if f is not None):
        if path.exists():
            try:
                raw = json.loads(read_small(path, MAX_CONFIG))
            except (ValueError, RecursionError) as error:
                raise refusal("E4003 json", path, found=str(error)[:80]) from None
            if not isinstance(raw, dict):
                raise refusal("E4003 object", path, found=type(raw).__name__)
            return raw
    raise refusal("E4020", folder)


def gguf_config(file: gguf.File) -> dict[str, Any]:
    """A config.json of the family from GGUF metadata (llama.cpp's keys). Raises as `check_architecture` and
    as `fields.judge`, and InputFormatError E1011 for a missing key. What the file does not say is told in a
    note.
    """
    check_architecture(file)
    meta, where = _as_deepseek2(file.metadata), file.path
    fields.judge("GGUF", meta, where, [k for k in meta if not k.startswith(fields.PROMPTS)])

    def get(key: str, default: Any = None) -> Any:
        value = meta.get(f"deepseek2.{key}", default)
        if value is None:
            raise refusal("E1011 missing", where, key=key)
        return _scalar(value, f"deepseek2.{key}", where)

    def length(name: str) -> int:  # of a head, for which files with the halves of kv_b have a key of its own
        both = f"deepseek2.attention.{name}_length_mla" in meta
        return get(f"attention.{name}_length" + "_mla" * both)

    rope, q_rank = get("rope.dimension_count"), meta.get("deepseek2.attention.q_lora_rank") or None
    tokens = listed if isinstance(listed := meta.get("tokenizer.ggml.tokens"), list) else None
    nextn = get("nextn_predict_layers", 0)
    vocab_size = get("vocab_size", len(tokens) if tokens else None)
    scores = _gguf_scores(get, where, vocab_size, model_type(file) == "glm_moe_dsa")
    config = {
        "model_type": model_type(file),
        "vocab_size": vocab_size,
        "hidden_size": get("embedding_length"),
        "intermediate_size": get("feed_forward_length"),
        "moe_intermediate_size": get("expert_feed_forward_length"),
        "num_hidden_layers": get("block_count") - nextn,
        "num_nextn_predict_layers": nextn,
        "num_attention_heads": get("attention.head_count"),
        "q_lora_rank": q_rank,
        "kv_lora_rank": get("attention.kv_lora_rank"),
        "qk_rope_head_dim": rope,
        "qk_nope_head_dim": length("key") - rope,
        "v_head_dim": length("value"),
        "n_routed_experts": get("expert_count"),
        "n_shared_experts": get("expert_shared_count"),
        "num_experts_per_tok": get("expert_used_count"),
        "norm_topk_prob": get("expert_weights_norm", False),
        "scoring_func": scores,
        # llama.cpp has no key for it; DeepSeek-V2's "greedy" is the same with one group
        "topk_method": "noaux_tc" if scores == "sigmoid" else "group_limited_greedy",
        "routed_scaling_factor": get("expert_weights_scale", 1.0) or 1.0,  # llama.cpp's 0: not scaled
        "first_k_dense_replace": get("leading_dense_block_count"),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "rope_theta": get("rope.freq_base"),
        "max_position_embeddings": get("context_length"),
        "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": stop_token_ids(meta, where),
        "rope_scaling": _gguf_rope(meta, where, get),
        "index_topk": meta.get("deepseek2.attention.indexer.top_k"),
        "index_n_heads": meta.get("deepseek2.attention.indexer.head_count"),
        "index_head_dim": meta.get("deepseek2.attention.indexer.key_length"),
        "indexer_types": _gguf_indexer_types(meta, get),
    }
    _check_lengths(config, get, where)
    config = {k: v for k, v in config.items() if v is not None or not k.startswith("index_")}
    return config | _groups(config["n_routed_experts"], config["model_type"], where, get)


def _check_lengths(config: Mapping[str, Any], get: Callable[..., Any], where: object) -> None:
    """Files with the halves of kv_b say the lengths of keys and values twice: of a head, and as llama.cpp
    computes with them, of the latent; older ones of a head alone. InputFormatError E1011 for others.
    """
    rope, rank = config["qk_rope_head_dim"], config["kv_lora_rank"]
    lengths = {"key": config["qk_nope_head_dim"] + rope, "value": config["v_head_dim"]}
    for name, latent in (("key", rank + rope), ("value", rank)):
        good = (lengths[name], latent)
        if (found := get(f"attention.{name}_length", latent)) not in good:
            key, expected = f"deepseek2.attention.{name}_length", " or ".join(map(str, good))
            raise refusal("E1011 length", where, key=key, found=found, expected=expected)


def _as_deepseek2(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata with the keys of its architecture as `deepseek2` has them."""
    own = f"{metadata.get('general.architecture')}."
    return {("deepseek2." + k[len(own) :] if k.startswith(own) else k): v for k, v in metadata.items()}


def model_type(file: gguf.File) -> str:
    """The `model_type` of the config.json that a GGUF's architecture stands for."""
    return {"deepseek32": "deepseek_v32", "glm-dsa": "glm_moe_dsa"}.get(
        str(file.metadata.get("general.architecture")), "deepseek_v3"
    )


def _gguf_indexer_types(meta: Mapping[str, Any], get: Callable[..., Any]) -> list[str] | None:
    """`indexer_types`. Files of GLM-5.2 that do not say are told by their context, as llama.cpp does."""
    found = meta.get("deepseek2.attention.indexer.types")
    if found is None and meta.get("general.architecture") == "glm-dsa" and get("context_length") >= 1 << 20:
        found = [i < 2 or (i - 2) % 4 == 0 for i in range(get("block_count"))]
    return None if found is None else ["full" if full else "shared" for full in found]


def _gguf_scores(get: Callable[..., Any], where: object, vocab_size: int, glm_5: bool) -> str:
    """`scoring_func`. Files that do not say are of DeepSeek-V2 or early ones of GLM-4.7-Flash, told apart as
    llama.cpp does.
    """
    early_glm = vocab_size == 154880 and get("block_count") in (47, 48)
    found = get("expert_gating_func", 2 if early_glm or glm_5 else 1)
    if found not in (1, 2):
        key, why = "deepseek2.expert_gating_func", "another router"
        raise refusal("E4002", where, key=key, why=why, found=found, expected="1 (softmax) or 2 (sigmoid)")
    return "softmax" if found == 1 else "sigmoid"


def _scalar(value: Any, key: str, where: object) -> Any:
    """A key's value, if it has the type it must have."""
    wanted = {"deepseek2.rope.scaling.type": str, "deepseek2.expert_weights_norm": bool}.get(key)
    if not (isinstance(value, wanted) if wanted else isinstance(value, int | float) and abs(value) < 2**53):
        raise refusal("E1011 wrong", where, key=key, found=printable(repr(value), 40))
    # Stored as float32, it had a short decimal: 1e-6, not 9.99999997e-7.
    return float(str(np.float32(value))) if isinstance(value, float) else value


def stop_token_ids(meta: Mapping[str, Any], where: object) -> list[int]:
    """The ids that end an answer by a GGUF's metadata: refimpl's own list, else llama.cpp's eos, eot and
    eom.
    """
    own = meta.get("refimpl.stop_token_ids")
    named = [meta.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    ids = token_ids([i for i in named if i is not None] if own is None else own)
    if ids is None:
        found = printable(repr(named if own is None else own), 60)
        raise refusal("E1011 stops", where, found=found, expected="token ids")
    return list(ids)


def _groups(experts: int, kind: str, where: object, get: Callable[..., Any]) -> dict[str, int]:
    """Groups of experts. Older files do not say; DeepSeek-V3 and R1 have 8, of which 4 are taken, and
    DeepSeek-V2 has 8, of which 3 are. GLM-5 has none.
    """
    guess = (1, 1) if kind == "glm_moe_dsa" else {256: (8, 4), 160: (8, 3)}.get(experts, (1, 1))
    found = get("expert_group_count", guess[0]), get("expert_group_used_count", guess[1])
    if get("expert_group_count", 0) == 0 or get("expert_group_used_count", 0) == 0:
        found = found if min(found) > 0 else guess
        fields.note(
            f"{where}: the file does not say how its {experts} experts are grouped; taken: {found[0]} "
            f"groups, the best {found[1]} of them to choose from; a config.json beside it goes before"
        )
    return {"n_group": found[0], "topk_group": found[1]}


def _gguf_rope(meta: Mapping[str, Any], where: object, get: Callable[..., Any]) -> dict[str, Any] | None:
    """`rope_scaling` as a config.json has it. llama.cpp takes a factor without a type for linear scaling."""
    kind = get("rope.scaling.type", "linear" if get("rope.scaling.factor", 1.0) not in (0, 1) else "none")
    if kind == "none":
        return None
    if kind != "yarn":
        return {"type": kind}
    whole = _mscale(get("rope.scaling.yarn_log_multiplier", 0.0))
    own = {
        name: _scalar(meta[key], key, where)
        for name in ("mscale", "attention_factor")
        if (key := f"refimpl.rope.{name}") in meta
    }
    betas = {
        name: get(f"rope.scaling.yarn_{name}", default)
        for name, default in (("beta_fast", 32.0), ("beta_slow", 1.0))
    }
    yarn = {
        "type": "yarn",
        "factor": get("rope.scaling.factor"),
        "original_max_position_embeddings": get("rope.scaling.original_context_length"),
        "mscale": whole or 1.0,  # llama.cpp has one number for both
        "mscale_all_dim": whole,
    }
    return yarn | betas | own


def _mscale(multiplier: float) -> float:
    """`mscale_all_dim` of a yarn_log_multiplier, which is a tenth of it in float32."""
    return float(f"{float(str(np.float32(multiplier))) / 0.1:.7g}")


def rope_metadata(c: DeepSeekConfig) -> dict[str, Any]:
    """What `gguf_config` reads `rope_scaling` from, with keys of refimpl's own for what llama.cpp has none
    for.
    """
    yarn = c.rope_scaling
    if yarn is None:
        return {}
    scaling = f"{names.architecture(c)}.rope.scaling"
    found: dict[str, Any] = {
        f"{scaling}.type": "yarn",
        f"{scaling}.factor": float(yarn.factor),
        f"{scaling}.original_context_length": yarn.original_max_position_embeddings,
        f"{scaling}.yarn_beta_fast": float(yarn.beta_fast),
        f"{scaling}.yarn_beta_slow": float(yarn.beta_slow),
        f"{scaling}.yarn_log_multiplier": 0.1 * yarn.mscale_all_dim,
    }
    if yarn.mscale != (_mscale(0.1 * yarn.mscale_all_dim) or 1.0):
        found["refimpl.rope.mscale"] = float(yarn.mscale)
    if yarn.attention_factor is not None:
        found["refimpl.rope.attention_factor"] = float(yarn.attention_factor)
    return found


# What may differ between a GGUF and the config.json beside it: what the former cannot say, and lengths,
# which are often changed by hand.
_MAY_DIFFER = {
    "max_position_embeddings",
    "bos_token_id",
    "eos_token_id",
    "scale_fmt",
    "num_nextn_predict_layers",
}


def _agree(config: DeepSeekConfig, own: DeepSeekConfig, file: gguf.File, home: Path) -> None:
    groups = f"{file.metadata['general.architecture']}.expert_group_count"
    silent = set() if groups in file.metadata else {"n_group", "topk_group"}
    for name in config.__dataclass_fields__.keys() - _MAY_DIFFER - silent - {"rope_scaling"}:
        mine, theirs = getattr(config, name), getattr(own, name)
        if not (mine == theirs or (isinstance(mine, float) and np.isclose(mine, theirs, rtol=1e-6))):
            raise refusal(
                "E4008", file.path, name=name, found=theirs, expected=f"{mine}, as {home / 'config.json'}"
            )
    if (config.rope_scaling is None) != (own.rope_scaling is None):
        found, expected = (("YaRN" if c.rope_scaling else "none") for c in (own, config))
        raise refusal("E4008", file.path, name="rope_scaling", found=found, expected=expected)
    for key, name in _YARN_KEYS.items():
        if any(k.endswith(key) for k in file.metadata) and config.rope_scaling is not None:
            mine, theirs = (getattr(c.rope_scaling, name) for c in (config, own))
            if mine is None or not np.isclose(mine, theirs, rtol=1e-6):
                expected = f"{mine}, as {home / 'config.json'}"
                raise refusal("E4008", file.path, name=name, found=theirs, expected=expected)


# Numbers of YaRN that a GGUF may say. Older files leave some out, and then the config.json knows better.
_YARN_KEYS = {
    "rope.scaling.factor": "factor",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
    "rope.scaling.yarn_log_multiplier": "mscale_all_dim",
    "refimpl.rope.mscale": "mscale",
    "refimpl.rope.attention_factor": "attention_factor",
}


def check_architecture(file: gguf.File) -> None:
    """InputFormatError E1010 unless the file is a model of the family."""
    found = file.metadata.get("general.architecture")
    if found in family.architectures():
        return
    shown = printable(repr(found), 40)
    expected = f"general.architecture {' or '.join(map(repr, family.architectures()))}"
    if why := family.missing(found):
        raise refusal("E1010 kin", file.path, why=why, found=shown, expected=expected)
    raise refusal("E1010", file.path, found=shown, expected=expected)


def _shapes(metadata: Mapping[str, str], folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the blobs from the files' metadata; KTransformers' folders have none, and the config's are
    used.
    """
    version = metadata.get(VERSION, FORMAT_VERSION)
    if version != FORMAT_VERSION:
        raise refusal("E4017 program", folder, found=version, expected=FORMAT_VERSION)
    found = {k.removesuffix(SHAPE): v for k, v in metadata.items() if k.endswith(SHAPE)}
    for name, shape in found.items():
        if not re.fullmatch(r"[1-9]\d{0,9}(,[1-9]\d{0,9}){0,3}", shape, re.ASCII):
            raise refusal("E4017 malformed", folder, found=f"{name}: {shape[:40]!r}", expected="E,out,in")
    return {name: tuple(map(int, shape.split(","))) for name, shape in found.items()}
