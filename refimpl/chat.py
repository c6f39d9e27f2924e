"""Talk to a model: `python -m refimpl.chat` with the embedded one, `--gguf_path DIR` with any folder (hybrid,
FP8, GGUF).

Without -p it converses, on a terminal or with the lines of a pipe, one turn each. Only the model's words go
to stdout. While it answers Ctrl-C stops it and keeps what was said. Commands: /help, /system TEXT, /regen,
/undo, /clear, /stats, /exit; a line of \"\"\" begins and ends a longer text.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from refimpl import fields, hub, ops
from refimpl.cli import Parser, integer, number, own, run, to_json
from refimpl.conversation import Conversation, Stats
from refimpl.errors import RefimplError, refusal, visible
from refimpl.generate import Sampling, Session
from refimpl.loading import check_backend, open_model
from refimpl.text import answers
from refimpl.text.template import ChatTemplate, Message
from refimpl.text.tokenizer import Tokenizer, first_with_tokenizer, scalar

TEMPLATE_OWN = {"messages", "add_generation_prompt", "tools", "documents", "self"}  # what a chat gives itself
MAX_INPUT = 16 << 20  # bytes of one question; what fits into the context is far less, and told in tokens
DIM, PLAIN = "\x1b[2m", "\x1b[0m"
HELP = """\
  /system TEXT   set the system text (none: remove it), start anew     /clear   start anew
  /regen         answer the last question again                        /undo    take the last question back
  /stats         figures of the last answer                            /exit    leave (so does Ctrl-D)"""


# --- on the terminal ----------------------------------------------------------------------------------------


class Screen:
    """Prints an answer as it comes: thinking dim on a terminal and left out of a pipe, or as `--think`
    says.
    """

    def __init__(self, think: str):
        self.terminal = sys.stdout.isatty()
        self.colour = self.terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        self.think = {"auto": self.terminal, "show": True, "hide": False}[think]

    def show(self, pieces: Iterator[tuple[str, str]]) -> None:
        """Print the pieces of one answer and a final newline."""
        before, whole = "", False
        try:
            for part, piece in pieces:
                if part == "reasoning" and not self.think:
                    continue
                if part != before:
                    print(("\n\n" if before else "") + self._style(part), end="", file=own(sys.stdout))
                before = part
                print(visible(piece), end="", flush=True)
            whole = True
        finally:
            if whole or before:  # a refusal before the first word leaves no blank line
                plain = PLAIN if self.colour and before == "reasoning" else ""
                print(plain, file=own(sys.stdout), flush=True)

    def _style(self, part: str) -> str:
        return (DIM if part == "reasoning" else PLAIN) if self.colour else ""


def describe(stats: Stats, finish_reason: str) -> str:
    """The figures of an answer in a line."""
    kept = f", {stats.cached_tokens} of them kept" if stats.cached_tokens else ""
    line = (
        f"prompt {stats.prompt_tokens} tokens{kept}, first token {stats.first_token_s:.2f} s; "
        f"{stats.new_tokens} tokens"
    )
    return (
        line
        + f", {stats.tokens_per_s:.1f} tokens/s"
        + ("" if finish_reason == "stop" else f" [{finish_reason}]")
    )


def converse(chat: Conversation, screen: Screen, as_json: bool) -> int:
    """Read questions from stdin until it ends."""
    if sys.stdin.isatty():
        with suppress(ImportError):  # Windows has none
            import readline  # noqa: F401 - arrow keys and history at the prompt
        print(
            "Ask something, for example: What is 123 + 456?   (/help for commands, Ctrl-D to leave)",
            file=sys.stderr,
        )
    code = 0
    while True:
        try:
            text = _read()
            if text is None or not _turn(chat, text, screen, as_json):
                return code
        except _Unanswered as unanswered:
            # A question that does not fit ends no conversation, but shows in the exit code of a pipe.
            print(f"refimpl: {unanswered.args[0].line()}", file=sys.stderr)
            code = 0 if sys.stdin.isatty() else 1
        except KeyboardInterrupt:  # of a line half written, as in a shell; a pipe has nobody who writes
            if not sys.stdin.isatty():
                raise
            print("\n(Ctrl-D or /exit to leave)", file=sys.stderr)


class _Unanswered(Exception):
    """A question, other than one that could not be read, ended in this RefimplError."""


def _turn(chat: Conversation, text: str, screen: Screen, as_json: bool) -> bool:
    """Carry out a command or answer a question; False to leave."""
    try:
        if text.startswith("/"):
            again = _command(chat, text)
            if again is None:
                return False
            text = again
        if text.strip():
            _answer(chat, text, screen, as_json)
    except RefimplError as error:
        raise _Unanswered(error) from error
    return True


def _read() -> str | None:
    """The next question; a line of three quotes begins and ends one of several lines. None at the end of
    input.
    """
    text = _line(">>> ")
    if text is None or not text.startswith('"""'):
        return text
    lines = [text[3:]]
    while not lines[-1].rstrip().endswith('"""'):
        more = _line("... ")
        if more is None:
            break
        lines.append(more)
        _bounded("\n".join(lines).encode("utf-8", "replace") if sum(map(len, lines)) > MAX_INPUT else b"")
    return "\n".join(lines).strip().removesuffix('"""').strip()


def _line(prompt: str) -> str | None:
    if sys.stdin.isatty():
        # input() would print its prompt to stdout where that is no terminal.
        print(prompt, end="", file=sys.stderr, flush=True)
        try:
            return input()
        except EOFError:
            print(file=sys.stderr)
            return None
    raw = _bounded(sys.stdin.buffer.readline(MAX_INPUT + 1))
    return raw.decode("utf-8", "replace").rstrip("\r\n") if raw else None


def _bounded(raw: bytes) -> bytes:
    """A question's bytes. ResourceError E6002 for more than any context holds: a device or a disk image in
    place of a text.
    """
    if len(raw) > MAX_INPUT:
        raise refusal("E6002", "stdin", found=f"over {MAX_INPUT} bytes")
    return raw


def _command(chat: Conversation, text: str) -> str | None:
    """Carry out a /command: "" when done, a question to ask again, None to leave."""
    word, _, rest = text.partition(" ")
    history = [m for m in chat.messages if m.role == "user"]
    if word in ("/exit", "/quit", "/bye"):
        return None
    if word in ("/clear", "/system"):
        system = (
            [Message("system", rest)]
            if rest.strip()
            else []
            if word == "/system"
            else [m for m in chat.messages if m.role == "system"]
        )
        chat.messages = system
    elif word in ("/undo", "/regen") and history:
        del chat.messages[-2:]
        return history[-1].content if word == "/regen" else ""
    elif word == "/stats" and chat.last and chat.last.stats:
        print(describe(chat.last.stats, chat.last.finish_reason), file=sys.stderr)
    else:
        print(HELP, file=sys.stderr)
    return ""


def _answer(chat: Conversation, text: str, screen: Screen, as_json: bool) -> None:
    pieces = chat.ask(scalar(text))
    try:
        if as_json:
            for _ in pieces:
                pass
        else:
            screen.show(pieces)
    except KeyboardInterrupt:
        # It came while a piece was being printed, not computed: the conversation is told all the same.
        with suppress(StopIteration):
            pieces.throw(KeyboardInterrupt())
    assert chat.last is not None and chat.last.stats is not None
    if as_json:
        print(to_json(chat.last.as_dict(), letters=True), flush=True)
    elif screen.terminal:
        print(describe(chat.last.stats, chat.last.finish_reason), file=sys.stderr)
    elif chat.last.finish_reason == "length":
        where = "while thinking" if not chat.last.text else ""
        print(
            f"refimpl: note: stopped at --max_new_tokens or the end of the context {where}".rstrip(),
            file=sys.stderr,
        )


# --- the command --------------------------------------------------------------------------------------------


def open_conversation(args: argparse.Namespace) -> Conversation:
    """Find the model, load it, and set the sampling: flags, else the model's generation_config.json, else
    greedy.
    """
    start = time.perf_counter()
    check_backend(args.backend)
    weights = Path(args.gguf_path) if args.gguf_path else None
    if args.model_path:
        home = hub.resolve(args.model_path, weights=weights is None)
    else:
        home = weights if weights is not None else hub.embedded()
    weights = hub.resolve(weights) if weights is not None else home
    model = open_model(
        weights, args.backend, args.optimize_config_path, args.activations, args.cpu_infer, config_folder=home
    )
    tokenizer = Tokenizer(first_with_tokenizer(home, weights))
    banned = tokenizer.without_token(model.config.vocab_size)
    chat = Conversation(
        Session(model, banned),
        tokenizer,
        ChatTemplate.open(tokenizer),
        _sampling(args, tokenizer),
        _length(args, tokenizer),
        time.perf_counter() - start,
        dict(args.template_var or ()),
    )
    if getattr(args, "system", None):
        chat.messages.append(Message("system", args.system))
    return chat


def _sampling(args: argparse.Namespace, tokenizer: Tokenizer) -> Sampling:
    """What the flags say, else the model's generation config; greedy, with a note, where neither says
    anything.
    """
    names, where = answers.SAMPLING, tokenizer.folder / "generation_config.json"
    flags = {n: getattr(args, n) for n in names if getattr(args, n) is not None}
    values: dict[str, Any] = answers.sampling(tokenizer.generation, where)
    if args.greedy:
        return Sampling()
    if not values and not flags and tokenizer.generation.get("do_sample") is None:
        fields.note(f"{tokenizer.folder} does not say how to sample: greedy; see --temperature and --top_p")
    try:
        return Sampling(**(values | flags), seed=args.seed)
    except (TypeError, ValueError) as error:
        raise refusal("E6010", where, found=str(error)) from None


def _length(args: argparse.Namespace, tokenizer: Tokenizer) -> int | None:
    if args.max_new_tokens is not None:
        return args.max_new_tokens
    return answers.max_new_tokens(tokenizer.generation, tokenizer.folder / "generation_config.json")


def _variable(text: str) -> tuple[str, Any]:
    """NAME=VALUE for the template; a value is JSON where it can be, else a text."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier() or name in TEMPLATE_OWN:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, as thinking=true, not {text!r}")
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):
        return name, value


def add_model_flags(parser: Parser) -> None:
    """The flags by which `open_conversation` finds a model, and those of its answers."""
    parser.add_argument(
        "--model_path",
        metavar="DIR|HUB_ID",
        help="config and tokenizer, and the weights unless --gguf_path names them",
    )
    parser.add_argument(
        "--gguf_path",
        metavar="DIR",
        help="the weights: a hybrid folder, a GGUF file or folder, an FP8 checkpoint",
    )
    parser.add_argument(
        "--optimize_config_path",
        metavar="RULES.yaml",
        help="placement rules: which module runs on which device",
    )
    parser.add_argument("--cpu_infer", type=integer(1), metavar="N", help="threads (default: all cores)")
    parser.add_argument(
        "--max_new_tokens",
        type=integer(),
        metavar="N",
        help="length of an answer at most (default: generation_config.json, else to the end of the context)",
    )
    parser.add_argument(
        "--template_var",
        type=_variable,
        action="append",
        metavar="NAME=VALUE",
        help="a variable of the chat template, as thinking=true for DeepSeek-V3.1; may be repeated",
    )
    parser.add_argument(
        "--temperature",
        type=number(0, 1e30),
        help="0 is greedy; defaults of these come from generation_config.json",
    )
    parser.add_argument("--top_p", type=number(0, 1e30))
    parser.add_argument("--top_k", type=integer())
    parser.add_argument("--min_p", type=number(0, 1e30))
    parser.add_argument("--seed", type=integer(0, 2**64 - 1), help="the same answer each time")
    parser.add_argument("--greedy", action="store_true", help="always the likeliest token")
    parser.add_argument("--backend", default="auto", choices=("auto", *ops.BACKENDS))
    parser.add_argument(
        "--activations",
        default="fp8",
        choices=("fp8", "exact"),
        help="fp8: as the real system computes; exact: float32 throughout",
    )


def check_sampling_flags(parser: Parser, args: argparse.Namespace) -> None:
    """A usage error for one out of its range."""
    for name in ("temperature", "top_k", "top_p", "min_p"):
        if (value := getattr(args, name)) is not None:
            try:
                Sampling(**{name: value})
            except ValueError as error:
                parser.error(str(error))


def _parser() -> Parser:
    parser = Parser(prog="python -m refimpl.chat", description=__doc__)
    add_model_flags(parser)
    parser.add_argument("-p", "--prompt", metavar="TEXT", help="one question; - reads it from stdin")
    parser.add_argument("--system", metavar="TEXT", help="system text")
    parser.add_argument(
        "--think",
        default="auto",
        choices=("auto", "show", "hide"),
        help="the reasoning: dim on a terminal, left out of a pipe",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object an answer on stdout")
    return parser


def main(argv: list[str]) -> int | None:
    """Run `python -m refimpl.chat` with these arguments."""
    parser = _parser()
    args = parser.parse_args(argv)
    check_sampling_flags(parser, args)
    np.seterr(all="ignore")  # a damaged weight is reported by the sampler, in one line
    chat = open_conversation(args)
    screen = Screen(args.think)
    if args.prompt is None:
        return converse(chat, screen, args.json)
    text = (
        _bounded(sys.stdin.buffer.read(MAX_INPUT + 1)).decode("utf-8", "replace")
        if args.prompt == "-"
        else args.prompt
    )
    if not text.strip():
        parser.error("the prompt is empty")
    _answer(chat, text, screen, args.json)
    return 130 if chat.last is not None and chat.last.finish_reason == "interrupted" else 0


if __name__ == "__main__":
    raise SystemExit(run(main))
