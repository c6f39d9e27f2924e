"""The last answer token by token: how likely each was, what else might have been said, and which experts
worked on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from refimpl.errors import printable
from refimpl.model import Model
from refimpl.text.tokenizer import Tokenizer
from refimpl.tracing import as_numpy, trace

MARGIN = 28  # columns before the runners-up
RUNNERS_UP = 3


@dataclass(frozen=True)
class Token:
    """One token of an answer. `experts` are those of the pass that predicted it, by layer."""

    text: str
    probability: float
    others: tuple[tuple[str, float], ...]  # the likeliest other tokens
    experts: dict[int, tuple[int, ...]]


def explain(model: Model, tokenizer: Tokenizer, prompt: Sequence[int], answer: Sequence[int]) -> list[Token]:
    """Run the prompt and the answer once more, all tokens in one pass, and read off what was decided.

    Probabilities are those of the model itself, before temperature, top_k, top_p and min_p. Sums are taken
    in another order than when the answer was made, so their last digits may differ.
    """
    ids, first = [*prompt, *answer[:-1]], len(prompt) - 1
    chosen: dict[int, np.ndarray] = {}
    logits = np.empty(0)
    for step in trace(model, ids, decode=0):
        if step.name == "route":
            chosen[int(step.module.split(".")[2])] = as_numpy(step.output[0])[first:]
        elif step.module == "lm_head":
            logits = as_numpy(step.output)[first:].astype(np.float64)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    return [_token(tokenizer, i, token, p[i], chosen) for i, token in enumerate(answer)]


def _token(tokenizer: Tokenizer, i: int, token: int, p: np.ndarray, chosen: dict[int, np.ndarray]) -> Token:
    likeliest = [int(t) for t in np.argsort(-p, kind="stable")[: RUNNERS_UP + 1] if t != token]
    others = tuple((_word(tokenizer, t), float(p[t])) for t in likeliest[:RUNNERS_UP])
    experts = {layer: tuple(sorted(map(int, ids[i]))) for layer, ids in chosen.items()}
    return Token(_word(tokenizer, token), float(p[token]), others, experts)


def _word(tokenizer: Tokenizer, token: int) -> str:
    return printable(repr(tokenizer.decode([token]))[1:-1], 24)


def lines(tokens: Sequence[Token]) -> Iterator[str]:
    """A table for people, one token a line; what does not fit into a line goes on from column MARGIN."""
    others = ["  ".join(f"{word} {share:.1%}" for word, share in t.others if share >= 0.0005) for t in tokens]
    width = max(map(len, [*others, "instead"]))
    yield f"  {'token':16} {'chance':>7}  {'instead':{width}}  experts by layer"
    for t, instead in zip(tokens, others):
        experts = "  ".join(f"{layer}: {' '.join(map(str, ids))}" for layer, ids in t.experts.items())
        yield f"  {t.text:16} {t.probability:7.1%}  {instead:{width}}  {experts}".rstrip()
