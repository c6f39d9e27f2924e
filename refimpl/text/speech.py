"""An answer's tokens as they come, told apart into what the model thinks and what it says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from refimpl.text.tokenizer import Tokenizer


class Speech:
    """Text of one answer, part by part: `<think>` and `</think>` are single tokens and are looked for as
    such, as their spelling may be cut anywhere in a text. `prompt` is what the answer follows: R1's template
    has opened the thinking already.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]):
        self.think, self.end_think = tokenizer.token_id("<think>"), tokenizer.token_id("</think>")
        self.stop_ids, self._stream = tokenizer.stop_ids, tokenizer.stream()
        self.thinking = self._opened(tokenizer, prompt)
        self._begun = {"reasoning": False, "text": False}

    @property
    def part(self) -> str:
        """Where the next token belongs: "reasoning" or "text"."""
        return "reasoning" if self.thinking else "text"

    def push(self, token: int) -> Iterator[tuple[str, str]]:
        """("reasoning" or "text", piece) that this token completes, perhaps none; a stop id has no text."""
        if token in self.stop_ids:
            return
        if token in (self.think, self.end_think):
            yield from self.end()
            self.thinking = token == self.think
        else:
            yield from self._out(self._stream.push(token))

    def end(self) -> Iterator[tuple[str, str]]:
        """What was held back, at the end of a part or of the answer."""
        yield from self._out(self._stream.end())

    def _out(self, piece: str) -> Iterator[tuple[str, str]]:
        part = self.part
        piece = piece if self._begun[part] else piece.lstrip()  # the blank lines after a mark
        if piece:
            self._begun[part] = True
            yield part, piece

    def _opened(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> bool:
        marks = [i for i, token in enumerate(prompt) if token in (self.think, self.end_think)]
        return (
            bool(marks)
            and prompt[marks[-1]] == self.think
            and not tokenizer.decode(prompt[marks[-1] + 1 :]).strip()
        )


class StopText:
    """Text up to the first of some strings, given in pieces that may cut one in two."""

    def __init__(self, stops: tuple[str, ...]):
        self.stops, self.held, self.found = stops, "", False

    def push(self, piece: str) -> str:
        """What is certain not to belong to a stop string."""
        if self.found:
            return ""
        text = self.held + piece
        if cuts := [text.find(s) for s in self.stops if s in text]:
            self.found, self.held = True, ""
            return text[: min(cuts)]
        starts = (n for s in self.stops for n in range(1, len(s)) if text.endswith(s[:n]))
        sure = len(text) - max(starts, default=0)
        self.held = text[sure:]
        return text[:sure]

    def end(self) -> str:
        """What was held back, when no more comes."""
        held, self.held = self.held, ""
        return held
