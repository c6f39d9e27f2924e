"""From a request to a turn of the engine, and from its tokens to what the client is told."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from refimpl.errors import RefimplError
from refimpl.generate import Sampling
from refimpl.server.asked import ChatRequest, Common, CompletionRequest, Wrong
from refimpl.server.engine import Token, Turn
from refimpl.text.speech import Speech, StopText
from refimpl.text.template import ChatTemplate, Message
from refimpl.text.tokenizer import Tokenizer, scalar

# Names that a template is given by the chat itself.
TEMPLATE_OWN = {"messages", "add_generation_prompt", "tools", "documents", "self"}


@dataclass(frozen=True)
class Served:
    """The model as the server knows it."""

    name: str
    tokenizer: Tokenizer
    template: ChatTemplate | None  # None: only /v1/completions
    sampling: Sampling
    context: int
    vocabulary: int
    most_tokens: int  # of one answer
    max_new_tokens: int | None = None  # where a request does not say
    variables: dict[str, Any] = field(default_factory=dict)  # of the template

    def turn(self, asked: Common, scope: str) -> Turn:
        """The turn that a request asks for. Wrong 400 where it cannot be done."""
        asked.stops()
        chat = isinstance(asked, ChatRequest)
        prompt = self._chat(asked) if isinstance(asked, ChatRequest) else self._plain(asked)
        room = self.context - len(prompt)
        if room < 1:
            raise Wrong(
                400,
                f"the prompt has {len(prompt)} tokens and the context {self.context}: none is left to answer",
                "messages" if chat else "prompt",
                "context_length_exceeded",
            )
        assert isinstance(asked, ChatRequest | CompletionRequest)
        wanted = asked.length()
        if wanted is not None and wanted > self.most_tokens:
            raise Wrong(
                400, f"max_tokens is {wanted}; this server gives at most {self.most_tokens}", "max_tokens"
            )
        wanted = min(self.most_tokens, self.max_new_tokens or self.most_tokens) if wanted is None else wanted
        key = f"{scope}\n{asked.prompt_cache_key or ''}"
        return Turn(
            prompt,
            self._sampling(asked),
            min(room, wanted),
            self.tokenizer.stop_ids,
            key,
            asked.top(),
            bool(asked.experts),
        )

    def _sampling(self, asked: Common) -> Sampling:
        given = {
            name: value
            for name in ("temperature", "top_p", "top_k", "min_p")
            if (value := getattr(asked, name)) is not None
        }
        seed = self.sampling.seed if asked.seed is None else asked.seed % 2**64
        return replace(self.sampling, **given, seed=seed)

    def _chat(self, asked: ChatRequest) -> list[int]:
        if self.template is None:
            raise Wrong(400, "this model has no chat template: use /v1/completions", "messages")
        variables = dict(asked.chat_template_kwargs or {})
        taken = TEMPLATE_OWN | self.template.special.keys()
        if bad := next((n for n in variables if n in taken or not n.isidentifier()), None):
            raise Wrong(400, f"chat_template_kwargs.{bad[:80]} cannot be set", "chat_template_kwargs")
        messages = [
            Message(
                "system" if m.role == "developer" else m.role,
                scalar(m.text()),
                scalar(m.reasoning_content or "") if m.role == "assistant" else "",
            )
            for m in asked.messages
        ]
        self._short((m.content + m.reasoning for m in messages), "messages")
        try:
            pieces = self.template.pieces(messages, **(self.variables | variables))
            return self.tokenizer.encode_pieces(pieces)
        except RefimplError as error:
            raise Wrong(400, _sentence(error), "messages", error.code) from None

    def _plain(self, asked: Any) -> list[int]:
        prompt = asked.prompt
        if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str):
            prompt = prompt[0]
        if isinstance(prompt, str):
            self._short([prompt], "prompt")
            try:
                ids = self.tokenizer.encode(scalar(prompt))
            except RefimplError as error:
                raise Wrong(400, _sentence(error), "prompt", error.code) from None
            bos = [] if self.tokenizer.bos is None else [self.tokenizer.bos]
            prompt = [*bos, *ids]
        if not prompt or not all(isinstance(i, int) and 0 <= i < self.vocabulary for i in prompt):
            raise Wrong(
                400,
                f"prompt must be one text, or token ids from 0 to {self.vocabulary - 1}, and not empty",
                "prompt",
            )
        return list(prompt)

    def _short(self, texts: Iterable[str], param: str) -> None:
        """Megabytes are turned away before they are tokenized, let alone computed."""
        if sum(map(self.tokenizer.least_tokens, texts)) > 2 * self.context:
            raise Wrong(
                400,
                f"the text is longer than the context of {self.context} tokens",
                param,
                "context_length_exceeded",
            )


def _sentence(error: RefimplError) -> str:
    """What is wrong, without the path of a file on the server."""
    found = f" (found {error.found})" if error.found is not None else ""
    return f"{error.what}{found}"[:400]


@dataclass
class Delta:
    """What one token adds. `part` is "reasoning" or "text", `token` None for what was held back until the
    end.
    """

    part: str
    text: str
    token: Token | None = None


class Telling:
    """The text of one answer as its tokens come, cut before a stop text."""

    def __init__(self, tokenizer: Tokenizer, turn: Turn, stops: list[str], chat: bool):
        self.turn, self.stop = turn, StopText(tuple(stops))
        self.speech = Speech(tokenizer, turn.prompt) if chat else None
        self._stream = tokenizer.stream()
        self.tokens = self.reasoning_tokens = 0

    @property
    def finished(self) -> bool:
        """Whether a stop text was met."""
        return self.stop.found

    def push(self, token: Token) -> Iterator[Delta]:
        """What a token adds to the answer: at least one Delta, if only for its probability."""
        if self.finished:
            return
        self.tokens += 1
        part = self.speech.part if self.speech else "text"
        self.reasoning_tokens += part == "reasoning"
        told = False
        for piece_part, piece in self._pieces(token.id):
            for text in self._cut(piece_part, piece):
                yield Delta(piece_part, text, None if told else token)
                told = True
        if not told and (token.logprob is not None or token.experts):
            yield Delta(part, "", token)

    def end(self) -> Iterator[Delta]:
        """The text that was held back while it might have been the start of a stop text or of half a
        character.
        """
        if self.finished:
            return
        pieces = self.speech.end() if self.speech else iter([("text", self._stream.end())])
        for part, piece in pieces:
            for text in self._cut(part, piece):
                yield Delta(part, text)
        if held := self.stop.end():
            yield Delta("text", held)

    def _pieces(self, token: int) -> Iterator[tuple[str, str]]:
        if self.speech:
            yield from self.speech.push(token)
        elif token not in self.turn.stop_ids and (piece := self._stream.push(token)):
            yield "text", piece

    def _cut(self, part: str, piece: str) -> Iterator[str]:
        """The part of it that may be told: up to a stop text, and without an end that may become one."""
        text = self.stop.push(piece) if part == "text" else piece
        if text:
            yield text
