"""The arithmetic of a model, from its config alone: `python -m refimpl.arithmetic
[parameters|files|token|cache|linears|decode|prefill]`.

Nothing is loaded and nothing is measured: shapes come from `names.shapes`, bytes from the formats, and a
bandwidth or a peak rate is what you say it is. The default is DeepSeek-V3/R1 (671B) with routed experts in
the mix Q4_K_M. docs/arithmetic.md walks through every table.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from refimpl import formats
from refimpl.checkpoint import folder, names
from refimpl.checkpoint.stored import FILE_TYPES, KINDS, storage, tensor_type
from refimpl.cli import Parser, integer, number, run, size, to_json
from refimpl.config import DeepSeekConfig
from refimpl.errors import meant

ON_CPU = ("embedding", "routed experts")  # in the hybrid placement; all else lies on the GPU


class Component(NamedTuple):
    """A part of the network. `token_...` is what one token of a decode touches: a row of the embedding, the
    chosen experts, all of the rest.
    """

    name: str
    stored: str  # the formats of its bytes
    parameters: int
    nbytes: int
    token_parameters: int
    token_bytes: int
    token_flops: int  # two for each parameter of a matrix: a multiplication and an addition

    def __add__(self, other: Component) -> Component:  # type: ignore[override]
        return Component("total", "", *(a + b for a, b in zip(self[2:], other[2:])))


def components(c: DeepSeekConfig, mix: str = "Q4_K_M") -> list[Component]:
    """Every tensor of the hybrid folder, summed by kind; multi-token prediction is left out, as the folder
    leaves it out.
    """
    found = {kind: Component(kind, "", 0, 0, 0, 0, 0) for kind in KINDS}
    stored: dict[str, dict[str, None]] = {kind: {} for kind in KINDS}
    for name, shape in names.shapes(c).items():
        kind = next(k for k, pattern in KINDS.items() if re.search(pattern, name))
        label, nbytes = storage(c, name, shape, mix)
        parameters = math.prod(shape)
        used = (
            1 / c.vocab_size
            if kind == "embedding"
            else c.num_experts_per_tok / c.n_routed_experts
            if kind == "routed experts"
            else 1
        )
        flops = 2 * round(parameters * used) if len(shape) > 1 and kind != "embedding" else 0
        found[kind] += Component(
            "", "", parameters, nbytes, round(parameters * used), round(nbytes * used), flops
        )
        stored[kind][label] = None
    return [v._replace(name=k, stored=", ".join(stored[k])) for k, v in found.items() if v.parameters]


def total(parts: list[Component]) -> Component:
    """The sum of these components, named \"total\"."""
    return sum(parts, Component("total", "", 0, 0, 0, 0, 0))


def files(c: DeepSeekConfig, mix: str = "Q4_K_M") -> dict[str, int]:
    """Bytes of tensors (no headers) of the two inputs of a merge and of its output, and what is taken from
    each input.
    """
    width = {"F8_E4M3": 1, "BF16": 2, "F32": 4}
    with_mtp = (
        c if c.num_nextn_predict_layers else DeepSeekConfig(**(vars(c) | {"num_nextn_predict_layers": 1}))
    )
    checkpoint = sum(width[kind] * math.prod(shape) for kind, shape in names.hf_inventory(with_mtp).values())
    gguf = 0
    for name, shape in names.gguf_inventory(c).items():
        kind = tensor_type(name, shape, mix, c.num_hidden_layers, c.n_routed_experts)
        gguf += formats.nbytes(formats.type_id(kind), shape)
    parts = {p.name: p.nbytes for p in components(c, mix)}
    output = sum(parts.values())
    return {
        "FP8 checkpoint": checkpoint,
        "of it used": output - parts.get("routed experts", 0),
        f"GGUF {mix}": gguf,
        "of it used ": parts.get("routed experts", 0),
        "hybrid folder": output,
    }


def cache_bytes(c: DeepSeekConfig, context: int, number: int = 2) -> int:
    """Bytes of the latent cache of `context` tokens: L + r numbers a layer of `number` bytes each, 2 on a GPU
    and 4 on the CPU, and with sparse attention the indexer's key.
    """
    return c.num_hidden_layers * context * c.cache_width * number


def expanded_cache_bytes(c: DeepSeekConfig, context: int, number: int = 2) -> int:
    """Bytes of a cache in which every head keeps its own keys and values, as without latents."""
    return c.num_hidden_layers * context * c.num_attention_heads * (c.qk_head_dim + c.v_head_dim) * number


def attention_flops(c: DeepSeekConfig, context: int) -> int:
    """Operations of attention of one new token over `context` tokens, absorbed: scores against L + r numbers
    and a sum over L, per head and layer.
    """
    rows, index = context, 0
    if c.index_topk is not None:  # every row is scored by the indexer, and few are attended to
        rows, index = min(context, c.index_topk), context * 2 * c.index_n_heads * c.index_head_dim
    own = c.num_attention_heads * rows * 2 * (2 * c.kv_lora_rank + c.qk_rope_head_dim)
    return c.num_hidden_layers * (own + index)


def prompt_attention_flops(c: DeepSeekConfig, tokens: int, rows: int) -> int:
    """Operations of attention of the last `tokens` of `rows` together, whichever is less: absorbed, or
    expanded, where every row is multiplied by kv_b once, and then a pair of query and key takes n + r and v
    numbers. Products of `tokens` rows with kv_b are those of a linear layer, and not among them.
    """
    heads, pairs = c.num_hidden_layers * c.num_attention_heads, tokens * (rows - tokens // 2)
    expansion = (rows - tokens) * c.kv_lora_rank * (c.qk_nope_head_dim + c.v_head_dim)
    expanded = heads * 2 * (expansion + pairs * (c.qk_head_dim + c.v_head_dim))
    return min(expanded, attention_flops(c, pairs))


def decode_seconds(
    c: DeepSeekConfig, gpu: float, cpu: float, context: int = 0, mix: str = "Q4_K_M"
) -> tuple[float, float]:
    """The least seconds a token on the GPU and on the CPU, all bytes read once at `gpu` and `cpu` bytes a
    second, experts on the CPU.
    """
    parts = components(c, mix)
    slow = sum(p.token_bytes for p in parts if p.name in ON_CPU)
    fast = sum(p.token_bytes for p in parts if p.name not in ON_CPU)
    return (fast + cache_bytes(c, context)) / gpu, slow / cpu


def ridge(flops: float, bandwidth: float, bytes_per_weight: float) -> float:
    """Tokens at a time from which a matrix product is bound by arithmetic: each byte of weights serves 2 /
    bytes_per_weight flops a token.
    """
    return flops / bandwidth * bytes_per_weight / 2


def linears(c: DeepSeekConfig) -> dict[str, tuple[int, int, int]]:
    """Every FP8 linear of one dense and one expert layer: {name: (N, K, bytes with scales)}."""
    layers = sorted({0, c.first_k_dense_replace})
    found: dict[str, tuple[int, int, int]] = {}
    for layer in layers:
        for name, shape in names.shapes(c, range(layer, layer + 1)).items():
            if names.is_fp8(name) and not names.is_routed_expert(name):
                found[name.removeprefix(f"model.layers.{layer}.").removesuffix(".weight")] = (
                    *shape[:2],
                    storage(c, name, shape, "")[1],
                )  # type: ignore[assignment]
    return found


# --- the command --------------------------------------------------------------------------------------------

# GB/s. Memory channels times transfers a second times 8 bytes.
CPUS = {
    "2 x DDR5-5600": 2 * 5.6 * 8,
    "8 x DDR5-4800": 8 * 4.8 * 8,
    "12 x DDR5-6000": 12 * 6.0 * 8,
    "24 x DDR5-6000": 24 * 6.0 * 8,
}


def parameters_table(c: DeepSeekConfig, args: Any) -> list[dict[str, Any]]:
    """Where the parameters are and what they take."""
    parts = components(c, args.mix)
    everything = total(parts)
    return [
        {
            "component": p.name,
            "format": p.stored,
            "parameters": p.parameters,
            "share": p.parameters / everything.parameters,
            "bytes": p.nbytes,
        }
        for p in (*parts, everything)
    ]


def files_table(c: DeepSeekConfig, args: Any) -> list[dict[str, Any]]:
    """What a merge reads and writes."""
    return [{"what": what.strip(), "bytes": n} for what, n in files(c, args.mix).items()]


def token_table(c: DeepSeekConfig, args: Any) -> list[dict[str, Any]]:
    """What one token of a decode touches."""
    parts = components(c, args.mix)
    cache = Component(
        "latent cache", "BF16", 0, 0, 0, cache_bytes(c, args.context), attention_flops(c, args.context)
    )
    return [
        {
            "component": p.name,
            "on": "CPU" if p.name in ON_CPU else "GPU" if p.name != "total" else "",
            "parameters": p.token_parameters,
        }
        | {"bytes": p.token_bytes, "flops": p.token_flops}
        for p in (*parts, cache, total([*parts, cache]))
    ]


def cache_table(c: DeepSeekConfig, args: Any) -> list[dict[str, Any]]:
    """What the past takes: latents in two bytes a number (on a GPU) and in four (on the CPU), and keys and
    values of every head.
    """
    return [
        {
            "tokens": n,
            "latents": size(cache_bytes(c, n)),
            "in float32": size(cache_bytes(c, n, 4)),
            "expanded": size(expanded_cache_bytes(c, n)),
        }
        for n in (1, 1024, 8192, c.max_position_embeddings)
    ]


def linears_table(c: DeepSeekConfig, args: Any) -> list[dict[str, Any]]:
    """The FP8 linears and the least time to read each."""
    return [
        {"linear": n, "N": s[0], "K": s[1], "bytes": s[2], "us": s[2] / args.gpu / 1e3}
        for n, s in linears(c).items()
    ]


def decode_table(c: DeepSeekConfig, args: Any) -> list[dict[str, Any]]:
    """The most tokens a second that the memories allow."""
    rows = []
    for name, gbps in {f"--cpu {args.cpu:g}": args.cpu}.items() if args.cpu else CPUS.items():
        fast, slow = decode_seconds(c, args.gpu * 1e9, gbps * 1e9, args.context, args.mix)
        rows.append(
            {
                "CPU memory": name,
                "GB/s": gbps,
                "GPU ms": 1e3 * fast,
                "CPU ms": 1e3 * slow,
                "tokens/s": 1 / (fast + slow),
            }
        )
    return rows


def prefill_table(c: DeepSeekConfig, args: Any) -> list[dict[str, Any]]:
    """From how many tokens at a time a product is bound by arithmetic."""
    reach = c.n_routed_experts / c.num_experts_per_tok
    return [
        {
            "weights": name,
            "bytes a weight": b,
            "tokens": ridge(args.tflops * 1e12, args.gpu * 1e9, b),
            "for every expert": reach * tokens,
        }
        for name, b in (("E4M3", 1 + 4 / 128**2), ("BF16", 2.0), ("Q4_K", 144 / 256))
        for tokens in (ridge(args.tflops * 1e12, args.gpu * 1e9, b),)
    ]


TABLES: dict[str, Callable[[DeepSeekConfig, Any], list[dict[str, Any]]]] = {
    "parameters": parameters_table,
    "files": files_table,
    "token": token_table,
    "cache": cache_table,
    "linears": linears_table,
    "decode": decode_table,
    "prefill": prefill_table,
}


def lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    """A table as text, numbers to the right."""
    shown = [list(rows[0]), *([_cell(key, value) for key, value in row.items()] for row in rows)]
    widths = [max(len(row[i]) for row in shown) for i in range(len(shown[0]))]
    number = [
        not isinstance(value, str) or re.fullmatch(r"[\d.]+ [kMGT]?B", value) is not None
        for value in rows[0].values()
    ]
    for row in shown:
        yield "  ".join(
            f"{cell:>{w}}" if n else f"{cell:{w}}" for cell, w, n in zip(row, widths, number)
        ).rstrip()


def _cell(key: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if key == "bytes":
        return size(value)
    if key == "share":
        return f"{100 * value:.2f} %"
    if key in ("parameters", "flops"):
        return f"{value / 1e9:.3f} G" if value >= 1e8 or not value else f"{value / 1e6:.3f} M"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main(argv: list[str]) -> None:
    """The command: the tables named, or all."""
    parser = Parser("python -m refimpl.arithmetic", __doc__)
    parser.add_argument("table", nargs="*", help=f"which tables, of {', '.join(TABLES)}; none: all")
    parser.add_argument("--model_path", type=Path, metavar="DIR", help="a folder with another config.json")
    parser.add_argument("--mix", default="Q4_K_M", help="the GGUF's mix of types (default Q4_K_M)")
    parser.add_argument(
        "--context", type=integer(), default=0, metavar="N", help="tokens in the cache (default 0)"
    )
    parser.add_argument(
        "--gpu",
        type=number(1e-3, 1e9),
        default=1008.0,
        metavar="GBPS",
        help="the GPU's memory bandwidth in GB/s (default 1008, an RTX 4090)",
    )
    parser.add_argument(
        "--tflops",
        type=number(1e-3, 1e9),
        default=165.0,
        metavar="T",
        help="peak of the arithmetic units in Tflop/s (default 165, BF16 there)",
    )
    parser.add_argument(
        "--cpu",
        type=number(1e-3, 1e9),
        metavar="GBPS",
        help="the CPU's memory bandwidth in GB/s (default: several)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.table if name not in TABLES]:
        parser.error(f"no table {unknown[0]!r}, expected {meant(unknown[0], TABLES)}")
    if args.mix not in FILE_TYPES:
        parser.error(f"no mix {args.mix!r}, expected {meant(args.mix, FILE_TYPES)}")
    c = (
        DeepSeekConfig()
        if args.model_path is None
        else DeepSeekConfig.from_dict(folder.read_config(args.model_path), where=args.model_path)
    )
    tables = {name: TABLES[name](c, args) for name in args.table or TABLES}
    text = "\n\n".join(
        "\n".join(([f"{TABLES[n].__doc__}"] if len(tables) > 1 else []) + list(lines(rows)))
        for n, rows in tables.items()
    )
    print(to_json(tables) if args.json else text)


if __name__ == "__main__":
    raise SystemExit(run(main))
