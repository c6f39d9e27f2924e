"""Talk to a model: `python -m refimpl.chat` with the embedded one, `--gguf_path DIR` with any folder (hybrid,
FP8, GGUF).

Without -p it converses, on a terminal or with the lines of a pipe, one turn each. Only the model's words go
to stdout. While it answers Ctrl-C stops it and keeps what was said. /help lists the commands of a
conversation.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from refimpl import fields, ops
from refimpl.cli import Parser, integer, number, refused, run, to_json
from refimpl.errors import RefimplError, refusal
from refimpl.generate import Sampling, Session
from refimpl.loading import compiling, hub, interleaving
from refimpl.loading.opening import check_backend, open_model
from refimpl.talk import questions
from refimpl.talk.commands import COMMANDS, TEMPLATE_OWN, Talk, carry_out, setting_names
from refimpl.talk.conversation import Conversation
from refimpl.talk.questions import LEAVE, bounded, open_questions
from refimpl.talk.screen import THINK, Screen, say
from refimpl.text import answers
from refimpl.text.template import ChatTemplate, Message
from refimpl.text.tokenizer import Tokenizer, first_with_tokenizer, scalar

# --- a conversation -----------------------------------------------------------------------------------------

BARE = ("exit", "quit", "exit()", "quit()")
"""What leaves other programs: at a terminal it is no question."""


def converse(chat: Conversation, screen: Screen, as_json: bool) -> int:
    """Read questions until there are no more; the exit code tells whether a pipe's were all answered."""
    talk = Talk(chat, screen)
    words = {name + (" " if c.takes else ""): c.about for name, c in COMMANDS.items()}
    source = open_questions(words, lambda: setting_names(talk))
    if source.person:
        say("Ask something, such as: What is 123 + 456?   (/help: commands, Ctrl-D: leave)")
    code, asked = 0, False
    while not talk.leave:
        try:
            text = source.read()
            if text is None:
                break
            asked = True
            if source.person and text.rstrip("\n").lower() in BARE:
                say(f"{LEAVE[:-1]}; to ask it as it is, begin with a space)")
            else:
                with source.busy():
                    _turn(talk, text, as_json)
        except _Unanswered as unanswered:
            # A question that does not fit ends no conversation, but shows in the exit code of a pipe.
            say(f"refimpl: {unanswered.args[0].line()}")
            code = 0 if source.person else 1
        except KeyboardInterrupt:  # of a line half written, as in a shell; a pipe has nobody who writes
            if not source.person:
                raise
            print(f"\n{LEAVE}", file=sys.stderr)
    if not (asked or source.person):
        say("refimpl: note: nothing came from stdin, which is no terminal here; -p TEXT asks one question")
    return code


class _Unanswered(Exception):
    """A question, other than one that could not be read, ended in this RefimplError."""


def _turn(talk: Talk, text: str, as_json: bool) -> None:
    """Carry out a command or answer a question."""
    try:
        talk.ask = "" if text.startswith("/") else text
        if text.startswith("/"):
            carry_out(talk, text)
        elif text.strip():
            talk.ask, talk.attached = talk.attached + text, ""
        if talk.ask.strip():
            _answer(talk.chat, talk.ask, talk.screen, as_json)
    except OSError as error:  # of a file that a command names
        if not text.startswith("/"):
            raise
        raise _Unanswered(refused(error)) from error
    except RefimplError as error:
        raise _Unanswered(error) from error


def _answer(chat: Conversation, text: str, screen: Screen, as_json: bool) -> None:
    chat.session.progress = screen.waiting.tokens
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
    assert chat.last is not None
    if as_json:
        print(to_json(chat.last.as_dict(), letters=True), flush=True)
    else:
        screen.close(chat.last, chat.stopped)


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
        weights,
        args.backend,
        args.optimize_config_path,
        args.activations,
        args.cpu_infer,
        config_folder=home,
        repack=args.repack,
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
        tuple(args.stop or ()),
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


def _stop(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("expected a text, not an empty one")
    return text


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
    parser.add_argument(
        "--cpu_infer", type=integer(1), metavar="N", help="threads (default: the fastest number)"
    )
    interleaving.add_flag(parser)
    parser.add_argument(
        "--max_new_tokens",
        type=integer(),
        metavar="N",
        help="length of an answer at most (default: generation_config.json, else to the end of the context)",
    )
    parser.add_argument(
        "--stop",
        type=_stop,
        action="append",
        metavar="TEXT",
        help="end an answer before this text; may be repeated",
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
    parser.stray = "a text goes behind -p, between quotes; a model's folder behind --gguf_path"
    parser.add_argument("--system", metavar="TEXT", help="system text")
    parser.add_argument(
        "--think",
        default="auto",
        choices=THINK,
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
    screen = Screen(args.think)
    with screen.waiting.during(f"loading {args.gguf_path or args.model_path or 'the embedded model'}"):
        chat = open_conversation(args)
        compiling.for_model(chat.session.model, screen.waiting.compiled if screen.waiting.live else None)
    screen.waiting.watch_compiler()
    if args.prompt is None:
        return converse(chat, screen, args.json)
    text = (
        bounded(sys.stdin.buffer.read(questions.MAX_INPUT + 1)).decode("utf-8", "replace")
        if args.prompt == "-"
        else args.prompt
    )
    if not text.strip():
        parser.error("the prompt is empty")
    _answer(chat, text, screen, args.json)
    return 130 if chat.last is not None and chat.last.finish_reason == "interrupted" else 0


if __name__ == "__main__":
    raise SystemExit(run(main))
