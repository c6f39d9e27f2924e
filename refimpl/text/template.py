"""Chat templates: Jinja programs that come with a stranger's model, run in a sandbox and in a child process
with limits.

The sandbox keeps a template from Python's insides, not from `9**(9**9)` or two gigabytes of blanks; the
child's limits on memory, time and output do. A template whose SHA-256 is in KNOWN needs no child, so that the
embedded model starts fast.

A message's text is not shown to the template at all. It gets a placeholder of private-use characters, and
what it renders is cut there: the template's own text may hold control tokens, a message's text never does,
whatever it spells.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from typing import Any

from refimpl.errors import refusal
from refimpl.text.sandbox import render, render_in_child
from refimpl.text.tokenizer import MAX_TEMPLATE, Piece, Tokenizer

# SHA-256 of templates rendered without a child. tests/test_template.py says what to do when the embedded
# model's changes.
KNOWN: frozenset[str] = frozenset({"678935eda35f545d53f9e2daf0ad478710046e8909f31b1ad28ea5afa7b7525b"})


@dataclass
class Message:
    """One turn. `reasoning` is what an assistant thought before it answered: templates get it as
    `reasoning_content`, and most leave it out of the history.
    """

    role: str
    content: str
    reasoning: str = ""
    # What the template is shown in place of the text, filled in by `_disguise`.
    shown: dict[str, str] = field(default_factory=dict, repr=False)


class ChatTemplate:
    """A folder's chat template: `chat_template.jinja` when there is one, else the entry of
    tokenizer_config.json.
    """

    def __init__(self, source: str, where: object, special: dict[str, str] | None = None):
        self.source, self.where, self.special = source, where, special or {}
        self.sha256 = hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest()

    @classmethod
    def open(cls, tokenizer: Tokenizer) -> ChatTemplate:
        """Find the template beside a tokenizer. InputFormatError E6201 when there is none, E6202 when it is
        malformed or too large.
        """
        special = {name: tokenizer.decode([token_id]) for name, token_id in tokenizer.special.items()}
        file = tokenizer.folder / "chat_template.jinja"
        where = file if file.exists() else tokenizer.folder / "tokenizer_config.json"
        source = tokenizer.templates.get("default")
        if source is None and len(tokenizer.templates) > 0:
            raise refusal("E6201 default", where, found=", ".join(map(str, tokenizer.templates)))
        if source is None:
            raise refusal("E6201", where)
        if not isinstance(source, str) or len(source) > MAX_TEMPLATE:
            raise refusal(
                "E6202",
                where,
                found=type(source).__name__,
                expected=f"a text of at most {MAX_TEMPLATE} characters",
            )
        return cls(source, where, special)

    def render(self, messages: list[dict[str, Any]], **variables: Any) -> str:
        """The prompt as one text, messages as they are: for comparison and display; `pieces` is what the
        model is fed.

        InputFormatError: E6203 syntax error or failure of the template, E6204 its own refusal
        (`raise_exception`), E6205 limits exceeded.
        """
        context = {
            "messages": messages,
            "tools": None,
            "documents": None,
            "add_generation_prompt": True,
            **self.special,
            **variables,
        }
        outcome = (
            render(self.source, context) if self.sha256 in KNOWN else render_in_child(self.source, context)
        )
        if "text" in outcome:
            return outcome["text"]
        raise refusal(outcome["code"], self.where, found=outcome["error"][:300])

    def pieces(self, messages: list[Message], **variables: Any) -> list[Piece]:
        """The rendered prompt in pieces: the template's text trusted, the messages' text not.

        Blanks around a message's text are shown to the template, so that `trim` does what it should; the rest
        is hidden from it, so that tests on the text (its length, its first word) do not. Raises as `render`,
        and InputFormatError E6206 when a message is dropped, repeated or cut by the template.
        """
        texts: list[str] = []
        shown = [_disguise(m, texts) for m in messages]
        parts = _PLACEHOLDER.split(self.render(shown, **variables))
        pieces, seen = [], []
        for k, part in enumerate(parts):
            if k % 2 == 0:
                pieces.append(Piece(part, trusted=True))
                continue
            index = ord(part) - ord(_DIGIT)
            seen.append(index)
            if index < len(texts):
                pieces.append(Piece(texts[index], trusted=False))
        self._check(seen, pieces, shown)
        return [p for p in pieces if p.text]

    def _check(self, seen: list[int], pieces: list[Piece], shown: list[dict[str, str]]) -> None:
        """Every content once and in order; reasoning may be dropped; no torn placeholder."""
        wanted = [ord(i) - ord(_DIGIT) for m in shown for i in _PLACEHOLDER.findall(m["content"])]
        kept = [i for i in seen if i in wanted]
        if (
            kept != wanted
            or len(set(seen)) < len(seen)
            or any(p.trusted and _PRIVATE.search(p.text) for p in pieces)
        ):
            found = f"{len(set(kept))} of {len(wanted)} messages, {len(seen)} insertions"
            raise refusal("E6206", self.where, found=found)


# Placeholder: three characters of a private plane, the middle one a number. No letters that `upper` or
# `title` would change, no blanks.
_OPEN, _CLOSE, _DIGIT = "\U000f8f00", "\U000f8f01", "\U00100000"
_PLACEHOLDER = re.compile(f"{_OPEN}([{_DIGIT}-\U0010fffd]){_CLOSE}")
_PRIVATE = re.compile("[\U000f8f00\U000f8f01\U00100000-\U0010fffd]")


def _disguise(message: Message, texts: list[str]) -> dict[str, str]:
    """What the template sees of a message; the texts behind the placeholders are appended to `texts`."""

    def hide(text: str) -> str:
        core = text.strip()
        if not core:
            return text
        texts.append(core)
        # The 64 Ki messages that fit are far beyond any context; the last number is never used.
        mark = _OPEN + chr(ord(_DIGIT) + min(len(texts) - 1, 0xFFFD)) + _CLOSE
        head = text[: len(text) - len(text.lstrip())]
        return head + mark + text[len(head) + len(core) :]

    shown = {"role": message.role, "content": hide(message.content)}
    if message.role == "assistant" and message.reasoning:
        shown["reasoning_content"] = hide(message.reasoning)
    return shown
