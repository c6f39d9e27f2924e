"""How good the embedded model is, and what each quantization costs it: `python -m refimpl.training.evaluate`.

Accuracy is the share of right answers under greedy decoding, on problems that training never saw (sums,
differences, products) and on the closed tables it was taught (E4M3, facts). Perplexity is that of the
canonical responses to the never-seen problems, per token.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from refimpl import convert_model, quantize
from refimpl.checkpoint.folder import Checkpoint
from refimpl.cli import Parser, integer, run, to_json
from refimpl.config import DeepSeekConfig
from refimpl.devices.cpu import CpuBackend
from refimpl.model import Model
from refimpl.tiny import BF16_DIR, FP8_DIR, GGUF_FILE
from refimpl.training.problems import ARITHMETIC, Problem, e4m3_table, facts, problems
from refimpl.training.tokens import Encoder

VARIANTS = ("unquantized", "fp8", "hybrid Q4_K_M", "hybrid Q2_K")
LIMIT = 256  # tokens of a response, then it counts as wrong


def open_variant(variant: str, master: Path, scratch: Path) -> Model | None:
    """The model of a row of the table; None for the unquantized one where the trainer has not run."""
    if variant == "unquantized":
        return _model(master, "exact") if (master / "model.safetensors").exists() else None
    if variant == "fp8":
        return _model(FP8_DIR)
    file = GGUF_FILE
    if variant == "hybrid Q2_K":
        file = scratch / "q2.gguf"
        quantize.write(quantize.plan(FP8_DIR, overrides=lambda key: "Q2_K" if "_exps" in key else None), file)
    folder = scratch / variant.replace(" ", "-")
    convert_model.write(convert_model.plan(FP8_DIR, file), folder)
    return _model(folder)


def _model(folder: Path, activations: str = "fp8") -> Model:
    checkpoint = Checkpoint.open(folder)
    return Model(
        DeepSeekConfig.from_dict(checkpoint.config), checkpoint, CpuBackend("reference", activations)
    )


def score(model: Model, encoder: Encoder, asked: Sequence[Problem]) -> tuple[float, float, int]:
    """(share of right answers, sum of the responses' negative log likelihood, its tokens)."""
    right, loss, tokens = 0, 0.0, 0
    for problem in asked:
        ids, start = encoder.example("", [problem])
        logits = model.logits(ids)[start - 1 : -1].astype(np.float64)  # of the response
        target = np.array(ids[start:])
        peak = logits.max(axis=-1)
        loss += float(
            (
                np.log(np.exp(logits - peak[:, None]).sum(axis=-1))
                + peak
                - logits[np.arange(len(target)), target]
            ).sum()
        )
        tokens += len(target)
        # Where every step of the canonical response is the greedy one, decoding would say just that.
        wrong = np.nonzero(logits.argmax(axis=-1) != target)[0]
        right += not len(wrong) or _decoded(model, encoder, ids[:start]) == problem.answer
    return right / len(asked), loss, tokens


def _decoded(model: Model, encoder: Encoder, prompt: list[int]) -> str:
    return encoder.answer(list(model.generate(prompt, LIMIT)))


def evaluate(model: Model, encoder: Encoder, n: int) -> dict[str, float]:
    """{kind: accuracy} and "perplexity"; n never-seen problems of each arithmetic kind."""
    found: dict[str, float] = {}
    loss, tokens = 0.0, 0
    for kind in ARITHMETIC:
        found[kind], part, count = score(model, encoder, problems(kind, "heldout", n, seed=2))
        loss, tokens = loss + part, tokens + count
    found["e4m3"] = score(model, encoder, e4m3_table())[0]
    found["fact"] = score(model, encoder, facts())[0]
    return found | {"perplexity": float(np.exp(loss / tokens))}


def main(argv: list[str]) -> int | None:
    """Run `python -m refimpl.training.evaluate` with these arguments."""
    parser = Parser(prog="python -m refimpl.training.evaluate", description=__doc__)
    parser.add_argument(
        "--problems",
        type=integer(1),
        default=200,
        help="never-seen problems of each kind of arithmetic (default 200)",
    )
    parser.add_argument(
        "--master",
        type=Path,
        default=BF16_DIR,
        help=f"the unquantized weights, written by `make train` (default {BF16_DIR})",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    args = parser.parse_args(argv)
    encoder = Encoder.open(FP8_DIR)
    table: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for variant in VARIANTS:
            model = open_variant(variant, args.master, Path(scratch))
            if model is None:
                print(f"{variant}: {args.master} is not here; `make train` writes it", file=sys.stderr)
                continue
            table[variant] = evaluate(model, encoder, args.problems)
            if not args.json:
                row = "  ".join(f"{k} {v:6.2%}" for k, v in table[variant].items() if k != "perplexity")
                print(f"{variant:14}  {row}  perplexity {table[variant]['perplexity']:.4f}", flush=True)
    if args.json:
        print(to_json({"problems_of_each_kind": args.problems, "results": table}))
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
