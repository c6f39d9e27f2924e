"""The commands of a chat, those that begin with a slash: one function each, and one table. Every one says
what it did. A new command is a function and a row of COMMANDS.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from refimpl.errors import meant, near, printable, refusal
from refimpl.files import read_small
from refimpl.talk import saved, tokens
from refimpl.talk.conversation import Conversation
from refimpl.talk.questions import MAX_INPUT
from refimpl.talk.screen import THINK, Screen, describe
from refimpl.text.template import Message

# What a chat gives its template itself.
TEMPLATE_OWN = {"messages", "add_generation_prompt", "tools", "documents", "self"}
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "seed")
SETTINGS = (*SAMPLING, "max_new_tokens", "think", "stop")


@dataclass
class Talk:
    """What a command works on. `ask` is the question to be answered next, `attached` what /file read for
    it.
    """

    chat: Conversation
    screen: Screen
    ask: str = ""
    attached: str = ""
    leave: bool = False


def carry_out(talk: Talk, text: str) -> None:
    """Do what a line that begins with a slash says. RefimplError for what a command refuses."""
    word, *more = text.split(maxsplit=1)  # a line typed ahead, while it answered, ends in a newline
    rest = "".join(more)
    word = ALIASES.get(word, word)
    if word not in COMMANDS:
        close = near(word, [*COMMANDS, *ALIASES])
        hint = f"did you mean {close[0]}? " if close else ""
        _say(
            f"no command {printable(word, 40)}; {hint}/help lists all; to ask it as it is, begin with a space"
        )
        return
    COMMANDS[word].run(talk, rest.strip())


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _help(talk: Talk, rest: str) -> None:
    for name, command in COMMANDS.items():
        _say(f"  {(name + ' ' + command.takes).rstrip():18} {command.about}")
    _say(
        '  Alt-Enter begins a new line; three quotes """ begin and end a longer text; Ctrl-C stops an answer'
    )


def _system(talk: Talk, rest: str) -> None:
    talk.chat.messages = [Message("system", rest)] if rest else []
    _say("the system text is set, and the conversation begins anew" if rest else "no system text; begun anew")


def _clear(talk: Talk, rest: str) -> None:
    talk.chat.messages = [m for m in talk.chat.messages if m.role == "system"]
    talk.attached = ""
    _say("the conversation begins anew")


def _last_question(talk: Talk) -> str | None:
    asked = [m for m in talk.chat.messages if m.role == "user"]
    if not asked:
        _say("nothing has been asked yet")
        return None
    del talk.chat.messages[-2:]
    return asked[-1].content


def _regen(talk: Talk, rest: str) -> None:
    talk.ask = _last_question(talk) or ""


def _undo(talk: Talk, rest: str) -> None:
    if (text := _last_question(talk)) is not None:
        _say(f"taken back: {printable(text, 60)}")


def _stats(talk: Talk, rest: str) -> None:
    last = talk.chat.last
    if last is None or last.stats is None:
        _say("nothing has been answered yet")
    else:
        _say(describe(last.stats, last.finish_reason))


def _tokens(talk: Talk, rest: str) -> None:
    chat = talk.chat
    if chat.last is None or not chat.last.token_ids:
        _say("nothing has been answered yet")
        return
    with talk.screen.waiting.during("running the answer once more"):
        found = tokens.explain(chat.session.model, chat.tokenizer, chat.asked, chat.last.token_ids)  # type: ignore[arg-type]
    for line in tokens.lines(found):
        _say(line)


def _path(rest: str) -> Path:
    return Path(os.path.expanduser(rest))


def _save(talk: Talk, rest: str) -> None:
    if not rest:
        _say("/save needs a file to write")
        return
    saved.save(_path(rest), talk.chat.messages)
    _say(f"{len(talk.chat.messages)} messages saved in {printable(rest, 200)}")


def _load(talk: Talk, rest: str) -> None:
    if not rest:
        _say("/load needs a file that /save wrote")
        return
    talk.chat.messages = saved.load(_path(rest))
    _say(
        f"{len(talk.chat.messages)} messages loaded from {printable(rest, 200)}; "
        "they are read with your next question"
    )


def _file(talk: Talk, rest: str) -> None:
    if not rest:
        _say("/file needs the file whose text goes before your next question")
        return
    text = read_small(_path(rest), MAX_INPUT).decode("utf-8", "replace")
    talk.attached += f"{text}\n\n"
    count = len(talk.chat.tokenizer.encode(text)) if len(text) < 1 << 20 else len(text) // 4
    _say(f"{printable(rest, 200)}, about {count} tokens, goes before your next question; /clear drops it")


def _exit(talk: Talk, rest: str) -> None:
    talk.leave = True


def setting_names(talk: Talk) -> list[str]:
    """What /set knows by name; any other name is a variable of the chat template."""
    return [*SETTINGS, *talk.chat.variables]


def _set(talk: Talk, rest: str) -> None:
    name, equals, text = rest.partition("=" if "=" in rest else " ")
    name, text = name.strip(), text.strip()
    if not name:
        chat = talk.chat
        shown = asdict(chat.sampling) | {"max_new_tokens": chat.max_new_tokens, "think": talk.screen.mode}
        for key, value in (shown | {"stop": list(chat.stop)} | chat.variables).items():
            _say(f"  {key} = {printable(json.dumps(value), 200)}")
        return
    if not name.isidentifier() or name in TEMPLATE_OWN or not equals:
        _say("use /set NAME=VALUE, as /set temperature=0.6; /set alone shows all")
        return
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = text
    _give(talk, name, value)
    _say(f"{name} = {printable(json.dumps(value), 200)}{_about(talk, name)}")


def _about(talk: Talk, name: str) -> str:
    """That a name is a variable of the template, and where that does not ask for it, what may be meant."""
    if name not in talk.chat.variables:
        return ""
    if re.search(rf"\b{name}\b", talk.chat.template.source):
        return "   (a variable of the chat template)"
    hint = "".join(f"; did you mean {close}?" for close in near(name, SETTINGS))
    return f"   (this model's chat template has no such variable{hint})"


def _give(talk: Talk, name: str, value: Any) -> None:
    chat = talk.chat
    if name in SAMPLING:
        whole = name in ("seed", "top_k")
        good = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
        try:
            if not (good or (name == "seed" and value is None)) or (name == "seed" and (value or 0) < 0):
                raise ValueError(f"{name} must be a number, not {printable(json.dumps(value), 40)}")
            chat.sampling = replace(chat.sampling, **{name: value})
        except ValueError as error:
            raise refusal("E6010 set", "/set", found=str(error)) from None
    elif name == "max_new_tokens":
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
            raise refusal("E6010 set", "/set", found=f"max_new_tokens {value!r:.40}")
        chat.max_new_tokens = value
    elif name == "think":
        if value not in THINK:
            found = f"think {printable(json.dumps(value), 40)}"
            raise refusal("E6010 set", "/set", found=found, expected=meant(str(value)[:40], THINK))
        talk.screen.set_think(value)
    elif name == "stop":
        stops = value if isinstance(value, list) else [value]
        chat.stop = tuple(s for s in map(str, stops) if s)
    else:
        chat.variables[name] = value


@dataclass(frozen=True)
class Command:
    """A row: what it does, what it takes, in a few words."""

    run: Callable[[Talk, str], None]
    takes: str
    about: str


COMMANDS = {
    "/help": Command(_help, "", "this list"),
    "/set": Command(_set, "NAME=VALUE", "sampling, think, stop, or a template's variable; alone: show all"),
    "/system": Command(_system, "TEXT", "set the system text (none: remove it), and begin anew"),
    "/file": Command(_file, "PATH", "put a file's text before the next question"),
    "/regen": Command(_regen, "", "answer the last question again"),
    "/undo": Command(_undo, "", "take the last question back"),
    "/clear": Command(_clear, "", "begin anew"),
    "/save": Command(_save, "PATH", "write the conversation to a new file"),
    "/load": Command(_load, "PATH", "go on with a conversation that was saved"),
    "/tokens": Command(_tokens, "", "the last answer token by token: chance, runners-up, experts"),
    "/stats": Command(_stats, "", "figures of the last answer"),
    "/exit": Command(_exit, "", "leave (so does Ctrl-D)"),
}
ALIASES = {"/quit": "/exit", "/bye": "/exit", "/?": "/help"}
