"""A conversation with a model: its turns, the answer with its reasoning, and how long each took."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from refimpl.devices import steps
from refimpl.generate import Sampling, Session
from refimpl.text.speech import Speech, StopText
from refimpl.text.template import ChatTemplate, Message
from refimpl.text.tokenizer import Tokenizer


@dataclass
class Stats:
    """Times of one answer in seconds. `decode_s` is the time after the first token, which belongs to the
    prompt.
    """

    load_s: float
    prompt_tokens: int
    cached_tokens: int  # of the prompt, kept from the turn before and not computed again
    first_token_s: float
    new_tokens: int
    decode_s: float
    tokens_per_s: float
    threads: int | None = None  # found fastest for a token; None of a number that was given, or of one


@dataclass
class Answer:
    """What was said and how it ended: "stop", "length" (max_new_tokens or the end of the context) or
    "interrupted".
    """

    text: str = ""
    reasoning: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = "length"
    stats: Stats | None = None

    def as_dict(self) -> dict[str, Any]:
        """The answer as the object that `refimpl.chat --json` prints."""
        return asdict(self)


class Conversation:
    """Messages so far, the session that remembers their tokens, and how to ask for the next answer."""

    def __init__(
        self,
        session: Session,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        sampling: Sampling,
        max_new_tokens: int | None,
        load_s: float = 0.0,
        variables: dict[str, Any] | None = None,
        stop: tuple[str, ...] = (),
    ):
        """`variables` are given to the template, as `thinking` to DeepSeek-V3.1's. An answer ends before any
        of the texts `stop`, wherever they begin and end in its tokens; its reasoning does not.
        """
        self.session, self.tokenizer, self.template, self.sampling = session, tokenizer, template, sampling
        self.max_new_tokens, self.load_s, self.variables = max_new_tokens, load_s, variables or {}
        self.stop, self.stopped = stop, False  # by one of these texts, the last answer
        self.asked: list[int] = []  # ids of the last prompt
        self.messages: list[Message] = []
        self.last: Answer | None = None

    def prompt(self, text: str) -> list[int]:
        """Ids of the conversation with one more question, up to where the answer starts."""
        limit = self.session.model.config.max_position_embeddings
        # Ten megabytes of paste are refused before they are tokenized, let alone computed.
        self.session.cache.check(min(self.tokenizer.least_tokens(text), 2 * limit))
        messages = [*self.messages, Message("user", text)]
        return self.tokenizer.encode_pieces(self.template.pieces(messages, **self.variables))

    def ask(self, text: str) -> Generator[tuple[str, str]]:
        """Put a question; yields ("reasoning" or "text", piece) as it comes. Afterwards `last` has the whole
        answer, and both are remembered.

        KeyboardInterrupt ends the answer early and is not passed on. RefimplError when the prompt cannot be
        made or does not fit; nothing is remembered then.
        """
        prompt = self.asked = self.prompt(text)
        self.stopped = False
        answer = self.last = Answer()
        start = time.perf_counter()
        cached = self.session.kept(prompt)  # counted before the cache is touched
        times: list[float] = []
        try:
            yield from self._stream(prompt, answer, times)
        except KeyboardInterrupt:
            answer.finish_reason = "interrupted"
        decode = times[-1] - times[0] if times else 0.0
        rate = (len(times) - 1) / decode if len(times) > 1 else 0.0
        first = times[0] - start if times else time.perf_counter() - start
        found, tokens = steps.threads_found(), len(prompt)
        threads = found[0] if found else None
        answer.stats = Stats(self.load_s, tokens, cached, first, len(times), decode, rate, threads)
        answer.text, answer.reasoning = answer.text.strip(), answer.reasoning.strip()
        self.messages += [Message("user", text), Message("assistant", answer.text, answer.reasoning)]

    def _stream(self, prompt: list[int], answer: Answer, times: list[float]) -> Iterator[tuple[str, str]]:
        speech, stop = Speech(self.tokenizer, prompt), StopText(self.stop)

        def said(pieces: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
            for part, piece in pieces:
                piece = stop.push(piece) if part == "text" else piece
                if piece:
                    setattr(answer, part, getattr(answer, part) + piece)
                    yield part, piece

        try:
            for token in self.session.generate(
                prompt, self.sampling, self.max_new_tokens, self.tokenizer.stop_ids
            ):
                times.append(time.perf_counter())
                answer.token_ids.append(token)
                yield from said(speech.push(token))
                self.stopped = stop.found
                if stop.found or token in self.tokenizer.stop_ids:
                    answer.finish_reason = "stop"
                    break
        finally:
            yield from said(speech.end())
            if held := stop.end():
                answer.text += held
                yield "text", held
