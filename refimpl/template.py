"""Chat templates: Jinja programs that come with a stranger's model, run in a sandbox and in a child process with limits.

The sandbox keeps a template from Python's insides, not from `9**(9**9)` or two gigabytes of blanks; the child's limits on memory, time
and output do. A template whose SHA-256 is in KNOWN needs no child, so that the embedded model starts fast.

A message's text is not shown to the template at all. It gets a placeholder of private-use characters, and what it renders is cut there:
the template's own text may hold control tokens, a message's text never does, whatever it spells.

Run as a script this file is that child: JSON on stdin (template, variables), JSON on stdout (text or error).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from refimpl.tokenizer import Piece, Tokenizer

SECONDS = 2.0  # of wall clock and of CPU, counted from the moment the child starts to render
MEMORY = 256 << 20  # bytes of address space above what the child has by then
MAX_OUTPUT = 1 << 20  # characters; messages are placeholders, so this is the template's own text
MAX_TEMPLATE = 1 << 20

# SHA-256 of templates rendered without a child. tests/test_template.py says what to do when the embedded model's changes.
KNOWN: frozenset[str] = frozenset({"678935eda35f545d53f9e2daf0ad478710046e8909f31b1ad28ea5afa7b7525b"})


@dataclass
class Message:
    """One turn. `reasoning` is what an assistant thought before it answered; most templates drop it from the history."""

    role: str
    content: str
    reasoning: str = ""
    # What the template is shown in place of the text, filled in by `_disguise`.
    shown: dict[str, str] = field(default_factory=dict, repr=False)


class ChatTemplate:
    """A folder's chat template: `chat_template.jinja` when there is one, else the entry of tokenizer_config.json."""

    def __init__(self, source: str, where: object, special: dict[str, str] | None = None):
        self.source, self.where, self.special = source, where, special or {}
        self.sha256 = hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest()

    @classmethod
    def open(cls, tokenizer: Tokenizer) -> ChatTemplate:
        """Find the template beside a tokenizer. InputFormatError E6201 when there is none, E6202 when it is malformed or too large."""
        from refimpl.tokenizer import read_text

        special = {name: tokenizer.decode([token_id]) for name, token_id in tokenizer.special.items()}
        path = tokenizer.folder / "chat_template.jinja"
        if path.exists():
            return cls(read_text(path, MAX_TEMPLATE, what="chat template"), path, special)
        where = tokenizer.folder / "tokenizer_config.json"
        source = tokenizer.config.get("chat_template")
        if isinstance(source, list):  # several named ones, an older layout
            source = next((t.get("template") for t in source if isinstance(t, dict) and t.get("name") == "default"), None)
        if source is None:
            raise _error(
                "E6201",
                where,
                "no chat template, and no chat_template.jinja beside it",
                hint="use the tokenizer files of the chat model, not of its base",
            )
        if not isinstance(source, str) or len(source) > MAX_TEMPLATE:
            raise _error(
                "E6202",
                where,
                "chat_template is malformed",
                found=type(source).__name__,
                expected=f"a text of at most {MAX_TEMPLATE} characters",
            )
        return cls(source, where, special)

    def render(self, messages: list[dict[str, Any]], **variables: Any) -> str:
        """The prompt as one text, messages as they are: for comparison and display; `pieces` is what the model is fed.

        InputFormatError: E6203 syntax error or failure of the template, E6204 its own refusal (`raise_exception`), E6205 limits exceeded.
        """
        context = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": True, **self.special, **variables}
        outcome = _render(self.source, context) if self.sha256 in KNOWN else _render_in_child(self.source, context)
        if "text" in outcome:
            return outcome["text"]
        what = {
            "E6203": "the chat template fails",
            "E6204": "the chat template refuses this conversation",
            "E6205": "the chat template exceeds its limits",
        }
        hint = {"E6204": "change the conversation as it says"}.get(
            outcome["code"], "use the template that came with the model, or put another one in chat_template.jinja"
        )
        raise _error(outcome["code"], self.where, what[outcome["code"]], found=outcome["error"][:300], hint=hint)

    def pieces(self, messages: list[Message], **variables: Any) -> list[Piece]:
        """The rendered prompt in pieces: the template's text trusted, the messages' text not.

        Blanks around a message's text are shown to the template, so that `trim` does what it should; the rest is hidden from it, so that
        tests on the text (its length, its first word) do not. Raises as `render`, and InputFormatError E6206 when a message is dropped,
        repeated or cut by the template.
        """
        from refimpl.tokenizer import Piece

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
        wanted = [ord(i) - ord(_DIGIT) for m in shown for i in _PLACEHOLDER.findall(m["content"].rpartition("</think>")[2])]
        kept = [i for i in seen if i in wanted]
        if kept != wanted or len(set(seen)) < len(seen) or any(p.trusted and _PRIVATE.search(p.text) for p in pieces):
            found = f"{len(set(kept))} of {len(wanted)} messages, {len(seen)} insertions"
            hint = "it has no place for one of the roles (a system message?) or edits texts; put another template in chat_template.jinja"
            raise _error("E6206", self.where, "the chat template does not show every message once as it is", found=found, hint=hint)


# Placeholder: three characters of a private plane, the middle one a number. No letters that `upper` or `title` would change, no blanks.
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

    if message.role != "assistant" or not message.reasoning:
        return {"role": message.role, "content": hide(message.content)}
    # As the model wrote it: the prompt had opened the thinking, the model closed it.
    return {"role": message.role, "content": hide(message.reasoning) + "</think>" + hide(message.content)}


def _error(code: str, where: object, what: str, **facts: Any) -> Exception:
    # Imported late: the child runs this file alone, outside the package.
    from refimpl.errors import InputFormatError

    return InputFormatError(code, where, what, **facts)


def child_environment() -> dict[str, str]:
    """What a process that works on a stranger's file is told of the environment: no more than Python needs."""
    keep = ("PATH", "HOME", "LANG", "LC_ALL", "TZ", "SYSTEMROOT", "VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME", "PYTHONUSERBASE")
    return {name: os.environ[name] for name in keep if name in os.environ}


def _render_in_child(source: str, context: dict[str, Any]) -> dict[str, str]:
    """Run this file as a child on a template. Returns {"text"} or {"code", "error"}."""
    request = json.dumps({"source": source, "context": context})
    try:
        child = subprocess.run(
            [sys.executable, "-P", str(Path(__file__).resolve())], input=request.encode(), capture_output=True, env=child_environment(), timeout=30
        )
    except subprocess.TimeoutExpired:
        return {"code": "E6205", "error": "no answer within 30 s"}
    if child.returncode < 0:
        return {"code": "E6205", "error": f"stopped by signal {-child.returncode}; the limit is {SECONDS:g} s"}
    try:
        outcome = json.loads(child.stdout)
        return {str(k): str(v) for k, v in outcome.items()}
    except (ValueError, AttributeError):
        last = child.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
        return {"code": "E6203", "error": f"child exited with {child.returncode}: {' '.join(last)[:200]}"}


def _render(source: str, context: dict[str, Any]) -> dict[str, str]:
    """Render here and now. Returns {"text"} or {"code", "error"}."""
    import jinja2

    try:
        text = _environment().from_string(source).render(**context)
    except _Refusal as error:
        return {"code": "E6204", "error": str(error)}
    except jinja2.TemplateSyntaxError as error:
        return {"code": "E6203", "error": f"line {error.lineno}: {error.message}"}
    except MemoryError:
        return {"code": "E6205", "error": f"more than {MEMORY >> 20} MiB of memory"}
    except Exception as error:  # whatever a stranger's program does wrong
        return {"code": "E6203", "error": f"{type(error).__name__}: {error}"[:300]}
    if len(text) > MAX_OUTPUT:
        return {"code": "E6205", "error": f"{len(text)} characters of output; the limit is {MAX_OUTPUT}"}
    return {"text": text}


class _Refusal(Exception):
    """A template called `raise_exception`."""


def _environment() -> Any:
    """Jinja as Hugging Face's `apply_chat_template` sets it up."""
    from datetime import datetime

    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks an assistant's text for training; here it is only its body."""

        tags = {"generation"}  # noqa: RUF012 - Jinja's own spelling

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message: object) -> None:
        raise _Refusal(str(message))

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _limit() -> None:
    """Bound this process: no core, no files written, CPU and wall time, address space."""
    import signal

    if not hasattr(signal, "setitimer"):  # Windows: the parent's timeout is what remains
        return
    import resource

    signal.setitimer(signal.ITIMER_REAL, SECONDS)  # SIGALRM, not handled, ends the process
    bounds = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CPU: int(resource.getrusage(resource.RUSAGE_SELF).ru_utime + SECONDS) + 1,
    }
    statm = Path("/proc/self/statm")
    if statm.exists():
        bounds[resource.RLIMIT_AS] = int(statm.read_text().split()[0]) * resource.getpagesize() + MEMORY
    for which, value in bounds.items():
        hard = resource.getrlimit(which)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (value, value))


def _child() -> None:
    request = json.loads(sys.stdin.buffer.read())
    import jinja2.ext
    import jinja2.sandbox  # noqa: F401 - loaded before the limits count

    _limit()
    sys.stdout.write(json.dumps(_render(request["source"], request["context"])))


if __name__ == "__main__":
    _child()
