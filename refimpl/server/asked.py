"""What a client may ask, checked field by field: OpenAI's names, and nothing ignored in silence.

The package `fastapi-openai-compat` was looked at first. Its models hand every field on unchecked, it turns
whatever a callback raises into status 500, and it has neither /v1/completions nor logprobs. So the schemas
are here, in pydantic, which comes with fastapi.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, ValidationError

MOST_TOP = 20  # runners-up a token, as with OpenAI
MOST_STOPS = 4


class Wrong(Exception):
    """A request that is not carried out: the HTTP status, a sentence, the field, and a word for programs."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        """The one JSON object that every error is."""
        kinds = {
            401: "authentication_error",
            404: "not_found_error",
            500: "server_error",
            503: "server_error",
        }
        return {
            "error": {
                "message": str(self),
                "type": kinds.get(self.status, "invalid_request_error"),
                "param": self.param,
                "code": self.code,
            }
        }


class _Fields(BaseModel):
    """Fields that are not named in a class are kept, to be looked at by `_check_others`."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())


class TextPart(_Fields):
    """A piece of a message."""

    type: Literal["text"]
    text: StrictStr


class ChatMessage(_Fields):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: StrictStr | list[TextPart] | None = None
    reasoning_content: StrictStr | None = None

    def text(self) -> str:
        """The message's content as one text, its parts joined."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class StreamOptions(_Fields):
    """What a stream brings beside the answer."""

    include_usage: StrictBool = False


Number = Annotated[float, Field(allow_inf_nan=False, strict=True)]
Whole = StrictInt


class Common(_Fields):
    """What both endpoints take. Null is as good as absent everywhere."""

    model: StrictStr | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[Whole, Field(ge=1, le=2**31)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[Whole, Field(ge=0, le=2**31)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    seed: Annotated[Whole, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: StrictStr | list[StrictStr] | None = None
    prompt_cache_key: Annotated[StrictStr, Field(max_length=256)] | None = None
    experts: StrictBool | None = None  # of this server alone

    def stops(self) -> list[str]:
        """Texts that end the answer. Wrong for an empty one or too many."""
        found = [self.stop] if isinstance(self.stop, str) else list(self.stop or ())
        if len(found) > MOST_STOPS or not all(0 < len(s) <= 1000 for s in found):
            raise Wrong(400, f"stop must be 1 to {MOST_STOPS} texts of 1 to 1000 characters", "stop")
        return found

    def include_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatRequest(Common):
    """The fields that the body of /v1/chat/completions may have."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[Whole, Field(ge=1, le=2**31)] | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[Whole, Field(ge=0, le=MOST_TOP)] | None = None
    chat_template_kwargs: dict[str, StrictBool | Whole | Number | None] | None = None

    def length(self) -> int | None:
        """Tokens at most. Wrong where two fields say two things."""
        if None not in (self.max_tokens, self.max_completion_tokens) and (
            self.max_tokens != self.max_completion_tokens
        ):
            raise Wrong(400, "max_tokens and max_completion_tokens differ", "max_tokens")
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens

    def top(self) -> int | None:
        """Runners-up wanted, None for no probabilities."""
        if self.top_logprobs is not None and not self.logprobs:
            raise Wrong(400, "top_logprobs needs logprobs: true", "top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Common):
    """The body of /v1/completions: a text, or token ids."""

    prompt: StrictStr | list[StrictInt] | list[StrictStr]
    logprobs: Annotated[Whole, Field(ge=0, le=MOST_TOP)] | None = None

    def length(self) -> int | None:
        """Tokens at most; OpenAI's default here is 16."""
        return 16 if self.max_tokens is None else self.max_tokens

    def top(self) -> int | None:
        """Runners-up wanted, None for no probabilities."""
        return self.logprobs


# Fields of the protocol that are not done, and the values with which they ask for nothing.
NEUTRAL: dict[str, list[Any]] = {
    "n": [1],
    "best_of": [1],
    "echo": [False],
    "suffix": [""],
    "tools": [[]],
    "tool_choice": ["none", "auto"],
    "functions": [[]],
    "function_call": ["none", "auto"],
    "response_format": [{"type": "text"}],
    "frequency_penalty": [0],
    "presence_penalty": [0],
    "logit_bias": [{}],
    "modalities": [["text"]],
    "store": [False],
    "tool_calls": [[]],
    "annotations": [[]],
}
# Fields that change no answer: whom a request is for, and how it is filed or billed.
INDIFFERENT = {"user", "metadata", "service_tier", "safety_identifier", "parallel_tool_calls"}


def parse(kind: type[Common], body: bytes) -> Any:
    """The body of a request as `kind`. Wrong 400 for what is no JSON object, a field of the wrong type or
    range, one that is there twice, and one that is not done here.
    """
    try:
        value = json.loads(body, parse_constant=_no_constant, object_pairs_hook=_fields_once)
    except (ValueError, RecursionError) as error:
        raise Wrong(400, f"the body is no JSON: {str(error)[:200] or 'nested too deep'}") from None
    if not isinstance(value, dict):
        raise Wrong(400, f"the body must be a JSON object, not {type(value).__name__}")
    try:
        found = kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        param = ".".join(map(str, first["loc"]))[:200]
        raise Wrong(400, f"{param}: {first['msg']}"[:400], param) from None
    except RecursionError:
        raise Wrong(400, "the body is nested too deep") from None
    _check_others(found, "")
    for i, message in enumerate(found.messages if isinstance(found, ChatRequest) else ()):
        _check_others(message, f"messages.{i}.")
        for part in message.content if isinstance(message.content, list) else ():
            _check_others(part, f"messages.{i}.content.")
    if found.stream_options is not None:
        if not found.stream:
            raise Wrong(400, "stream_options needs stream: true", "stream_options")
        _check_others(found.stream_options, "stream_options.")
    return found


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is no JSON")


def _fields_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose names differ: of two that are the same, parsers differ in which one they take."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the field {name[:80]!r} is there twice")
        found[name] = value
    return found


def _same_kind(neutral: Any) -> tuple[type, ...]:
    """Types in which a neutral value may be written: 0 as 0.0 too, but false as nothing else."""
    return (int, float) if type(neutral) is int else (type(neutral),)


def _check_others(found: BaseModel, where: str) -> None:
    for name, value in (found.model_extra or {}).items():
        if value is None or (not where and name in INDIFFERENT):
            continue
        neutral = NEUTRAL.get(name, [])
        if any(value == n and type(value) in _same_kind(n) for n in neutral):
            continue
        shown = (where + name)[:200]
        what = "is not supported by this server" if name in NEUTRAL else "is not known to this server"
        only = f"; only {json.dumps(neutral[0])} is" if neutral else ""
        raise Wrong(400, f"{shown} {what}{only}", shown, "unsupported_parameter")
