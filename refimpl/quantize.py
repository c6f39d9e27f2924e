"""An HF checkpoint (FP8 blocks or BF16) to a GGUF that llama.cpp loads: `python -m refimpl.quantize
--safetensor_path DIR --output FILE.gguf`.

Names and keys are llama.cpp's for the architecture `deepseek2` in its MLA form: kv_b_proj is stored as its
two halves, the key half transposed. The mix Q4_K_M gives each tensor the type that llama.cpp's quantizer
gives it. One matrix is in memory at a time.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from refimpl import formats
from refimpl.checkpoint import codecs, gguf, names
from refimpl.checkpoint.codecs import dense, fitting
from refimpl.checkpoint.folder import Checkpoint, ExpertList, rope_metadata, stop_token_ids
from refimpl.checkpoint.stored import FILE_TYPES, tensor_type
from refimpl.cli import Parser, Progress, run, size, to_json
from refimpl.config import DeepSeekConfig
from refimpl.errors import meant, printable, refusal
from refimpl.fields import note
from refimpl.files import check_writable
from refimpl.tensors import Stack, Weight
from refimpl.text import answers
from refimpl.text.gguf_vocabulary import NAMED, SPLITS, name_of
from refimpl.text.tokenizer import Tokenizer

ROWS = 2048  # of a matrix quantized at a time


def metadata(c: DeepSeekConfig, mix: str, name: str) -> dict[str, Any]:
    """The model's keys in GGUF."""
    found: dict[str, Any] = {
        "general.architecture": names.architecture(c),
        "general.type": "model",
        "general.name": name,
        "general.file_type": FILE_TYPES[mix],
        "general.quantization_version": 2,
    }
    model: dict[str, Any] = {
        "block_count": c.num_hidden_layers,
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "feed_forward_length": c.intermediate_size,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": 1,  # absorbed, all heads share the latent
        "attention.key_length": c.kv_lora_rank + c.qk_rope_head_dim,
        "attention.value_length": c.kv_lora_rank,
        "attention.key_length_mla": c.qk_head_dim,
        "attention.value_length_mla": c.v_head_dim,
        "attention.kv_lora_rank": c.kv_lora_rank,
        "attention.layer_norm_rms_epsilon": float(c.rms_norm_eps),
        "rope.freq_base": float(c.rope_theta),
        "rope.dimension_count": c.qk_rope_head_dim,
        "vocab_size": c.vocab_size,
        "leading_dense_block_count": c.first_k_dense_replace,
        "expert_count": c.n_routed_experts,
        "expert_used_count": c.num_experts_per_tok,
        "expert_shared_count": c.n_shared_experts,
        "expert_feed_forward_length": c.moe_intermediate_size,
        "expert_weights_scale": float(c.routed_scaling_factor),
        "expert_weights_norm": c.norm_topk_prob,
        "expert_gating_func": 1 if c.scoring_func == "softmax" else 2,
        "expert_group_count": c.n_group,
        "expert_group_used_count": c.topk_group,
    }
    if c.q_lora_rank is not None:
        model["attention.q_lora_rank"] = c.q_lora_rank
    if c.index_topk is not None:
        model |= {
            "attention.indexer.head_count": c.index_n_heads,
            "attention.indexer.key_length": c.index_head_dim,
            "attention.indexer.top_k": c.index_topk,
        }
    if c.indexer_types is not None:
        model["attention.indexer.types"] = [kind == "full" for kind in c.indexer_types]
    own = f"{names.architecture(c)}."
    return found | {own + key: value for key, value in model.items()} | rope_metadata(c)


def tokenizer_metadata(folder: Path, vocab_size: int) -> dict[str, Any]:
    """The tokenizer's keys in GGUF, from tokenizer.json (byte-level BPE). UnsupportedError E6110 for another
    kind of tokenizer.
    """
    tokenizer = Tokenizer(folder)
    raw = tokenizer.raw
    if raw.get("model", {}).get("type") != "BPE":
        raise refusal(
            "E6110", folder / "tokenizer.json", found=repr(raw.get("model", {}).get("type")), expected="'BPE'"
        )
    added = {tokenizer.vocabulary[t["content"]]: t for t in raw.get("added_tokens") or []}
    vocabulary = {i: token for token, i in tokenizer.vocabulary.items()}
    # 1 an ordinary token, 3 control, 4 user defined, 5 unused: rows of the embedding table without a token
    types = [
        5 if i not in vocabulary else 1 if i not in added else 3 if added[i].get("special") else 4
        for i in range(vocab_size)
    ]
    merges = [m if isinstance(m, str) else " ".join(m) for m in raw["model"].get("merges", [])]
    found: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _pre(raw, folder),
        "tokenizer.ggml.tokens": [vocabulary.get(i, f"[PAD{i}]") for i in range(vocab_size)],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.add_bos_token": tokenizer.bos is not None,
        "tokenizer.ggml.add_eos_token": False,
    }
    whole = json.dumps(raw, ensure_ascii=False, separators=(",", ":"))
    if (
        len(whole.encode("utf-8", "surrogatepass")) <= gguf.MAX_STRING
    ):  # for readers to whom a pre-tokenizer's name is not enough, this one too
        found["tokenizer.huggingface.json"] = whole
    elif name_of(raw) is None:
        raise refusal("E6112 large", folder / "tokenizer.json", expected=" or ".join(map(repr, SPLITS)))
    where = folder / "generation_config.json"
    return (
        found
        | _special_metadata(tokenizer)
        | _templates(tokenizer)
        | answers.generation_metadata(tokenizer.generation, where)
    )


def _pre(raw: dict[str, Any], folder: Path) -> str:
    """llama.cpp's name for how a tokenizer splits text. Where it has none, "default", with a note."""
    name = name_of(raw)
    if name is None:
        note(
            f"{folder / 'tokenizer.json'}: llama.cpp has no name known here for how it splits text; "
            "`default` is written, with which llama.cpp may make other tokens; refimpl reads tokenizer.json"
        )
    return name or "default"


def _special_metadata(tokenizer: Tokenizer) -> dict[str, Any]:
    """Named tokens and stop ids. llama.cpp has three keys for the latter; more, or others, go into one of
    refimpl's own.
    """
    named = {f"tokenizer.ggml.{key}_token_id": tokenizer.special.get(name) for key, name in NAMED.items()}
    if tokenizer.bos is not None:
        named["tokenizer.ggml.bos_token_id"] = tokenizer.bos
    found: dict[str, Any] = {k: v for k, v in named.items() if v is not None}
    rest = sorted(tokenizer.stop_ids - {found.get("tokenizer.ggml.eos_token_id")})
    if "tokenizer.ggml.eos_token_id" not in found and rest:
        found["tokenizer.ggml.eos_token_id"] = rest.pop(0)
    found |= {f"tokenizer.ggml.{key}_token_id": i for key, i in zip(("eot", "eom"), rest)}
    if set(stop_token_ids(found, tokenizer.folder)) != tokenizer.stop_ids:
        found["refimpl.stop_token_ids"] = sorted(tokenizer.stop_ids)
    return found


def _templates(tokenizer: Tokenizer) -> dict[str, Any]:
    named = {n: t for n, t in tokenizer.templates.items() if isinstance(t, str)}
    found: dict[str, Any] = {
        "tokenizer.chat_template" + ("" if n == "default" else f".{n}"): t for n, t in named.items()
    }
    others = [n for n in named if n != "default"]
    return found | ({"tokenizer.chat_templates": others} if others else {})


def _stored(
    c: DeepSeekConfig, checkpoint: Checkpoint
) -> Iterator[tuple[str, tuple[int, ...], Callable[[], Weight | Stack]]]:
    """(GGUF name, shape, how to get it) of every tensor of the output, in file order."""
    heads, n, v = c.num_attention_heads, c.qk_nope_head_dim, c.v_head_dim

    def kv_b(key: str) -> np.ndarray:
        whole = fitting(checkpoint[key], (heads * (n + v), c.kv_lora_rank), key)
        return dense(whole).reshape(heads, n + v, c.kv_lora_rank)

    for hf, shape in sorted(
        names.shapes(c).items(),
        key=lambda item: (names.layer_of(item[0]) is not None, names.layer_of(item[0]) or 0),
    ):
        key = names.to_gguf(hf)
        if key not in checkpoint:
            raise refusal("E4010", checkpoint.folder, name=hf, expected=key)
        if key.endswith("attn_kv_b.weight"):
            yield (
                key.replace("kv_b", "k_b"),
                (heads, c.kv_lora_rank, n),
                lambda key=key: kv_b(key)[:, :n].transpose(0, 2, 1),  # type: ignore[misc]
            )
            yield key.replace("kv_b", "v_b"), (heads, v, c.kv_lora_rank), lambda key=key: kv_b(key)[:, n:]  # type: ignore[misc]
        else:
            yield key, shape, lambda key=key, shape=shape: fitting(checkpoint[key], shape, key)  # type: ignore[misc]


def _bytes(weight: Weight | Stack, kind: int) -> Iterator[bytes]:
    """A tensor quantized piece by piece: an expert, then some rows, at a time."""
    matrices = (weight[e] for e in range(len(weight))) if isinstance(weight, ExpertList) else [weight]
    for matrix in matrices:
        x = np.atleast_2d(dense(matrix))
        x = x.reshape(-1, x.shape[-1])
        for at in range(0, len(x), ROWS):
            yield codecs.quantize(kind, x[at : at + ROWS]).tobytes()


class FilePlan(NamedTuple):
    """What a GGUF will hold: its metadata, and its tensors with how to make their bytes."""

    metadata: dict[str, Any]
    entries: tuple[gguf.Entry, ...]

    @property
    def nbytes(self) -> int:
        return sum(e.nbytes for e in self.entries)

    @property
    def types(self) -> dict[str, str]:
        """Type name of every tensor."""
        return {e.name: formats.type_name(e.ggml_type) for e in self.entries}


def plan(
    folder: Path,
    mix: str = "Q4_K_M",
    name: str | None = None,
    overrides: Callable[[str], str | None] = lambda key: None,
) -> FilePlan:
    """Lay out the GGUF of the checkpoint in `folder`, from headers alone. `overrides(key)` may name another
    type for a tensor.

    UnsupportedError E4030 for an unknown mix, MismatchError E4010 for a missing tensor, and what the readers
    raise.
    """
    if mix not in FILE_TYPES:
        raise refusal("E4030", mix, expected=meant(mix, FILE_TYPES))
    checkpoint = Checkpoint.open(folder)
    c = DeepSeekConfig.from_dict(checkpoint.config, where=checkpoint.folder)
    entries = []
    for key, shape, get in _stored(c, checkpoint):
        kind = formats.type_id(
            overrides(key) or tensor_type(key, shape, mix, c.num_hidden_layers, c.n_routed_experts)
        )
        entries.append(gguf.Entry(key, kind, shape, lambda get=get, kind=kind: _bytes(get(), kind)))  # type: ignore[misc]
    meta = metadata(c, mix, name or checkpoint.folder.resolve().name) | tokenizer_metadata(
        Path(folder), c.vocab_size
    )
    return FilePlan(meta, tuple(entries))


def write(
    p: FilePlan, output: Path, progress: Callable[[int], None] = lambda n: None, *, force: bool = False
) -> None:
    """Quantize and write; `output` appears complete or not at all, in place of a file only with `force`.
    `progress(n)` is told of every n bytes. ResourceError E5107, E5108 as `files.check_writable`.
    """
    gguf.write(Path(output), p.metadata, p.entries, progress, force=force)


def main(argv: list[str]) -> int | None:
    """Run `python -m refimpl.quantize` with these arguments."""
    parser = Parser(prog="python -m refimpl.quantize", description=__doc__)
    parser.add_argument(
        "--safetensor_path",
        type=Path,
        required=True,
        help="folder of the checkpoint (FP8 or BF16 safetensors, config.json, tokenizer)",
    )
    parser.add_argument("--output", type=Path, required=True, help="the .gguf file to write")
    parser.add_argument(
        "--type", default="Q4_K_M", metavar="MIX", help=f"one of {', '.join(FILE_TYPES)} (default Q4_K_M)"
    )
    parser.add_argument("--name", help="general.name in the file (default: the folder's name)")
    parser.add_argument("--force", action="store_true", help="replace --output if it is a file")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    args = parser.parse_args(argv)
    check_writable(args.output, force=args.force, inputs=[args.safetensor_path])
    p = plan(args.safetensor_path, args.type.upper(), args.name)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with Progress(p.nbytes, "quantizing") as progress:
        write(p, args.output, progress, force=args.force)
    types = p.types
    counts = {kind: list(types.values()).count(kind) for kind in dict.fromkeys(types.values())}
    total = args.output.stat().st_size
    print(
        f"wrote {printable(str(args.output), 400)}: {len(types)} tensors, {size(total)}: "
        f"{', '.join(f'{n} {k}' for k, n in counts.items())}",
        file=sys.stderr,
    )
    if args.json:
        print(to_json({"output": str(args.output), "nbytes": total, "tensors": len(types), "types": counts}))
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
