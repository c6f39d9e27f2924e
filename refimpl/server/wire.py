"""The objects of OpenAI's protocol, from turns and what they came to."""

from __future__ import annotations

import json
import math
import secrets
import time
from typing import Any

from refimpl.server.answering import Delta, Served
from refimpl.server.engine import Token

DONE = b"data: [DONE]\n\n"


def sse(value: dict[str, Any]) -> bytes:
    """One event of a stream; JSON escapes line ends, so a text cannot end it."""
    return b"data: " + json.dumps(value, separators=(",", ":"), allow_nan=False).encode() + b"\n\n"


def usage(prompt: int, completion: int, cached: int, reasoning: int) -> dict[str, Any]:
    """How many tokens a turn had."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {"reasoning_tokens": reasoning},
    }


class Wire:
    """Objects of one answer: whole ones and chunks share id, time and model."""

    def __init__(self, served: Served, chat: bool, stream: bool):
        self.served, self.chat = served, chat
        kind = ("chat.completion" if chat else "text_completion") + (".chunk" if stream and chat else "")
        self.head = {
            "id": ("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12),
            "object": kind,
            "created": int(time.time()),
            "model": served.name,
        }

    def first(self) -> dict[str, Any] | None:
        """What a stream of a chat begins with."""
        return self._chunk({"role": "assistant", "content": ""}, None) if self.chat else None

    def chunk(self, delta: Delta) -> dict[str, Any]:
        """One delta of a stream."""
        logprobs = self.logprobs([delta])
        if not self.chat:
            return self._choice({"text": delta.text}, logprobs, None)
        key = "reasoning_content" if delta.part == "reasoning" else "content"
        return self._chunk({key: delta.text}, logprobs, _experts([delta]))

    def last(self, reason: str) -> dict[str, Any]:
        """The end of a stream."""
        if self.chat:
            return self.head | {"choices": [self._of({"delta": {}}, None, reason)]}
        return self._choice({"text": ""}, None, reason)

    def final_usage(self, found: dict[str, Any]) -> dict[str, Any]:
        """The usage, in a chunk without choices."""
        return self.head | {"choices": [], "usage": found}

    def whole(self, deltas: list[Delta], reason: str, found: dict[str, Any]) -> dict[str, Any]:
        """The answer in one object."""
        said = {p: "".join(d.text for d in deltas if d.part == p) for p in ("reasoning", "text")}
        logprobs = self.logprobs(deltas)
        if not self.chat:
            return self._choice({"text": said["text"]}, logprobs, reason) | {"usage": found}
        message = {"role": "assistant", "content": said["text"].strip(), "refusal": None}
        if said["reasoning"].strip():
            message["reasoning_content"] = said["reasoning"].strip()
        choice = self._of({"message": message}, logprobs, reason) | _experts(deltas)
        return self.head | {"choices": [choice], "usage": found}

    def logprobs(self, deltas: list[Delta]) -> dict[str, Any] | None:
        """The probabilities of the tokens behind them, None where none were asked for."""
        tokens = [d.token for d in deltas if d.token is not None and d.token.logprob is not None]
        if not tokens:
            return None
        if self.chat:
            return {"content": [self._entry(t) for t in tokens], "refusal": None}
        texts = [self._text(t.id) for t in tokens]
        starts = [sum(map(len, texts[:i])) for i in range(len(texts))]
        return {
            "tokens": texts,
            "token_logprobs": [_number(t.logprob) for t in tokens],
            "top_logprobs": [{self._text(i): _number(p) for i, p in t.top} for t in tokens],
            "text_offset": starts,
        }

    def _entry(self, token: Token) -> dict[str, Any]:
        tops = [self._scored(i, p) for i, p in token.top]
        return self._scored(token.id, token.logprob) | {"top_logprobs": tops}

    def _scored(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self._text(token)
        return {"token": text, "logprob": _number(logprob), "bytes": list(text.encode())}

    def _text(self, token: int) -> str:
        return self.served.tokenizer.decode([token])

    def _chunk(self, delta: dict, logprobs: dict | None, extra: dict | None = None) -> dict[str, Any]:
        return self.head | {"choices": [self._of({"delta": delta}, logprobs, None) | (extra or {})]}

    def _choice(self, what: dict, logprobs: dict | None, reason: str | None) -> dict[str, Any]:
        return self.head | {"choices": [self._of(what, logprobs, reason)]}

    @staticmethod
    def _of(what: dict, logprobs: dict | None, reason: str | None) -> dict[str, Any]:
        return {"index": 0, **what, "logprobs": logprobs, "finish_reason": reason}


def _number(logprob: float | None) -> float:
    """JSON has no infinity; OpenAI writes -9999 for what cannot be."""
    return -9999.0 if logprob is None or not math.isfinite(logprob) else logprob


def _experts(deltas: list[Delta]) -> dict[str, Any]:
    """Where tokens went, by layer: a field of this server alone."""
    found = [d.token.experts for d in deltas if d.token is not None and d.token.experts]
    return {"experts": found} if found else {}
