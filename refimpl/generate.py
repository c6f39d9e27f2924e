"""Choosing the next token, again and again: sampling, and a session that keeps the latent cache from turn to
turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from refimpl.cache import LatentCache
from refimpl.config import DeepSeekConfig
from refimpl.errors import refusal


class LanguageModel(Protocol):
    """What a session needs of a model; `refimpl.model.Model` is one."""

    config: DeepSeekConfig

    def new_cache(self) -> LatentCache:
        """An empty cache for one conversation."""

    def forward(self, token_ids: Sequence[int], cache: LatentCache, last_only: bool = False) -> np.ndarray:
        """Append tokens to the cache and return their logits, f32 [T, vocab], or [1, vocab] of the last
        one.
        """


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from logits; applied in this order, as Hugging Face does. ValueError for values
    out of range.
    """

    temperature: float = 0.0  # 0: the likeliest token
    top_k: int = 0  # keep the k likeliest; 0: all
    top_p: float = 1.0  # keep the fewest likeliest tokens whose probabilities reach p
    min_p: float = 0.0  # keep those at least min_p times as likely as the likeliest
    seed: int | None = None  # None: another draw each time

    def __post_init__(self):
        ranges = {
            "temperature": (0 <= self.temperature <= 1e30, "a number from 0 up"),
            "top_k": (isinstance(self.top_k, int) and self.top_k >= 0, "a whole number from 0 (all) up"),
            "top_p": (0 < self.top_p <= 1, "a number above 0, at most 1"),
            "min_p": (0 <= self.min_p <= 1, "a number from 0 to 1"),
        }
        for name, (good, expected) in ranges.items():
            if not good:
                raise ValueError(f"{name} must be {expected}, not {getattr(self, name)}")


def probabilities(logits: np.ndarray, s: Sampling) -> np.ndarray:
    """f64 [vocab] that a token is drawn with, temperature > 0. Ties at the edge of top_k are broken by the
    smaller id.
    """
    # The maximum is taken away before the division, which a tiny temperature would make infinite.
    scaled = (logits.astype(np.float64) - logits.max()) / s.temperature
    order = np.argsort(-scaled, kind="stable")
    p = np.exp(scaled[order])  # likeliest first
    if s.top_k:
        p[s.top_k :] = 0
    before = np.cumsum(p / p.sum()) - p / p.sum()
    p[before >= s.top_p] = 0
    p[p < s.min_p * p[0]] = 0
    out = np.zeros(len(p))
    out[order] = p / p.sum()
    return out


def draw(logits: np.ndarray, s: Sampling, rng: np.random.Generator) -> int:
    """One token id. InputFormatError E4040 when the logits hold NaN or nothing finite: damaged weights."""
    if np.isnan(logits).any() or not np.isfinite(logits.max()):
        raise refusal("E4040", "model", found="NaN or infinity")
    if s.temperature == 0:
        return int(logits.argmax())
    return int(rng.choice(len(logits), p=probabilities(logits, s)))


class Session:
    """A model with the cache of one conversation. Tokens it has already seen are not computed again.

    `ids` are those in the cache. `banned` ids are never drawn: rows of the vocabulary that no token has.
    `progress(done, total)` is called after each piece of a prompt, in tokens that had to be computed.
    """

    progress: Callable[[int, int], None] | None = None

    def __init__(self, model: LanguageModel, banned: Sequence[int] | np.ndarray = ()):
        self.model, self.cache, self.ids = model, model.new_cache(), []  # type: ignore[var-annotated]
        self.banned = np.asarray(banned, np.int64)

    def prefill(self, prompt: Sequence[int]) -> np.ndarray:
        """Bring the cache to `prompt` and return the logits of its last token, f32 [vocab]; what it shares
        with `ids` is kept.

        ValueError for an empty prompt; ResourceError E6001 when it exceeds the context, the cache then being
        as it was.
        """
        *_, logits = self.pieces(prompt)
        return logits

    def pieces(self, prompt: Sequence[int]) -> Iterator[np.ndarray]:
        """What `prefill` does, a piece of the prompt at a time: the logits after each. Raises as it does,
        at the first one.
        """
        if not len(prompt):
            raise ValueError("the prompt is empty")
        prompt, kept = list(prompt), self.kept(prompt)
        self.cache.check(len(prompt))
        self._keep(kept)
        while len(self.ids) < len(prompt):
            logits = self.forward(prompt[len(self.ids) : len(self.ids) + self.cache.prefill])
            if self.progress is not None:
                self.progress(len(self.ids) - kept, len(prompt) - kept)
            yield logits

    def kept(self, prompt: Sequence[int]) -> int:
        """Tokens of `prompt` that are in the cache and will not be computed again. The last one always is:
        its logits are wanted.
        """
        most = min(len(self.ids), len(prompt) - 1)
        return next((i for i, (a, b) in enumerate(zip(self.ids[:most], prompt)) if a != b), most)

    def generate(
        self,
        prompt: Sequence[int],
        s: Sampling,
        max_new_tokens: int | None = None,
        stop_ids: frozenset[int] = frozenset(),
    ) -> Iterator[int]:
        """Yield new ids, a stop id included, until one of these, `max_new_tokens`, or the end of the
        context.
        """
        room = self.model.config.max_position_embeddings - len(prompt)
        rng = np.random.default_rng(s.seed)
        logits = self.prefill(prompt)
        for _ in range(room if max_new_tokens is None else min(room, max_new_tokens)):
            logits[self.banned] = -np.inf
            token = draw(logits, s, rng)
            yield token
            if token in stop_ids:
                return
            logits = self.forward([token])

    def forward(self, ids: Sequence[int]) -> np.ndarray:
        """Append tokens and return the logits of the last one, f32 [vocab]."""
        logits = self.model.forward(ids, self.cache, last_only=True)[-1]
        self.ids += ids
        return logits

    def _keep(self, length: int) -> None:
        self.cache.truncate(length)
        del self.ids[length:]
