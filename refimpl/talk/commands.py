"""The commands of a chat, those that begin with a slash: one function each, and one table. Every one says
what it did. A new command is a function and a row of COMMANDS.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from refimpl.errors import meant, near, printable, refusal
from refimpl.files import read_small
from refimpl.talk import saved, tokens
from refimpl.talk.conversation import Conversation
from refimpl.talk.questions import MAX_INPUT
from refimpl.talk.screen import THINK, Screen, describe, say
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
        close = near(word[1:], [name[1:] for name in COMMANDS])
        hint = f"did you mean /{close[0]}? " if close else ""
        say(
            f"no command {printable(word, 40)}; {hint}/help lists all; to ask it as it is, begin with a space"
        )
        return
    COMMANDS[word].run(talk, rest.strip())


def _help(talk: Talk, rest: str) -> None:
    for name, command in COMMANDS.items():
        say(f"  {(name + ' ' + command.takes).rstrip():18} {command.about}", 21)
    for key, about in KEYS.items():
        say(f"  {key:18} {about}", 21)


def _system(talk: Talk, rest: str) -> None:
    talk.chat.messages = [Message("system", rest)] if rest else []
    say("the system text is set, and the conversation begins anew" if rest else "no system text; begun anew")


def _clear(talk: Talk, rest: str) -> None:
    talk.chat.messages = [m for m in talk.chat.messages if m.role == "system"]
    talk.attached = ""
    say("the conversation begins anew")


def _last_question(talk: Talk) -> str | None:
    asked = [m for m in talk.chat.messages if m.role == "user"]
    if not asked:
        say("nothing has been asked yet")
        return None
    del talk.chat.messages[-2:]
    return asked[-1].content


def _regen(talk: Talk, rest: str) -> None:
    talk.ask = _last_question(talk) or ""


def _undo(talk: Talk, rest: str) -> None:
    if (text := _last_question(talk)) is not None:
        say(f"taken back: {printable(text, 60)}")


def _stats(talk: Talk, rest: str) -> None:
    last = talk.chat.last
    if last is None or last.stats is None:
        say("nothing has been answered yet")
    else:
        say(describe(last.stats, last.finish_reason))


def _tokens(talk: Talk, rest: str) -> None:
    chat = talk.chat
    if chat.last is None or not chat.last.token_ids:
        say("nothing has been answered yet")
        return
    with talk.screen.waiting.during("running the answer once more"):
        found = tokens.explain(chat.session.model, chat.tokenizer, chat.asked, chat.last.token_ids)  # type: ignore[arg-type]
    for line in tokens.lines(found):
        say(line, tokens.MARGIN)


def _counted(messages: list[Message]) -> str:
    return "1 message" if len(messages) == 1 else f"{len(messages)} messages"


def _path(rest: str) -> Path:
    return Path(os.path.expanduser(rest))


def _save(talk: Talk, rest: str) -> None:
    if not rest:
        say("/save needs a file to write")
        return
    saved.save(_path(rest), talk.chat.messages)
    say(f"{_counted(talk.chat.messages)} saved in {printable(rest, 200)}")


def _load(talk: Talk, rest: str) -> None:
    if not rest:
        say("/load needs a file that /save wrote")
        return
    talk.chat.messages = saved.load(_path(rest))
    say(
        f"{_counted(talk.chat.messages)} loaded from {printable(rest, 200)}; "
        "they are read with your next question"
    )


def _file(talk: Talk, rest: str) -> None:
    if not rest:
        say("/file needs the file whose text goes before your next question")
        return
    text = _text(_path(rest))
    count = _fitting(talk, rest, talk.attached + text)
    talk.attached += f"{text}\n\n"
    say(f"{printable(rest, 200)} goes before your next question ({count} tokens); /clear drops it")


def _text(path: Path) -> str:
    try:
        text = read_small(path, MAX_INPUT).decode("utf-8")
    except UnicodeDecodeError as error:
        found = f"byte 0x{error.object[error.start]:02x} at {error.start}, which is not UTF-8"
        raise refusal("E6003", path, found=found) from None
    if "\0" in text:
        raise refusal("E6003", path, found=f"a zero byte at {len(text[: text.index(chr(0))].encode())}")
    return text


def _fitting(talk: Talk, where: str, text: str) -> int:
    """How many tokens a text has. ResourceError E6001 for more than a context holds, found before a large
    one is cut into tokens.
    """
    limit, tokenizer = talk.chat.session.model.config.max_position_embeddings, talk.chat.tokenizer
    least = tokenizer.least_tokens(text)
    count = least if least > limit else len(tokenizer.encode(text))
    if count > limit:
        found = f"{'at least ' * (count == least)}{count} tokens"
        raise refusal("E6001 file", where, found=found, expected=f"at most {limit}")
    return count


def _exit(talk: Talk, rest: str) -> None:
    talk.leave = True


def setting_names(talk: Talk) -> list[str]:
    """What /set knows by name; any other name is a variable of the chat template."""
    return [*SETTINGS, *talk.chat.variables]


def _set(talk: Talk, rest: str) -> None:
    name, equals, text = rest.partition("=" if "=" in rest else " ")
    name, text = name.strip(), text.strip()
    if not rest:
        chat = talk.chat
        shown = asdict(chat.sampling) | {"max_new_tokens": chat.max_new_tokens, "think": talk.screen.mode}
        for key, value in (shown | {"stop": list(chat.stop)} | chat.variables).items():
            say(f"  {key} = {printable(json.dumps(value), 200)}")
        return
    if not name.isidentifier() or name in TEMPLATE_OWN or not equals:
        say("use /set NAME=VALUE, as /set temperature=0.6; /set alone shows all")
        return
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = text
    _give(talk, name, value)
    value = list(talk.chat.stop) if name == "stop" else value
    say(f"{name} = {printable(json.dumps(value), 200)}{_about(talk, name)}")


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
        try:
            chat.sampling = replace(chat.sampling, **{name: _number(name, value)})
        except ValueError as error:  # out of its range
            raise refusal("E6010 set", "/set", reason=str(error)) from None
    elif name == "max_new_tokens":
        chat.max_new_tokens = _number(name, value)
    elif name == "think":
        if value not in THINK:
            reason = f"think cannot be {_shown(value)}"
            raise refusal("E6010 set", "/set", reason=reason, expected=meant(str(value)[:40], THINK))
        talk.screen.set_think(value)
    elif name == "stop":
        stops = value if isinstance(value, list) else [value]
        chat.stop = tuple(s for s in map(str, stops) if s)
    else:
        chat.variables[name] = value


def _number(name: str, value: Any) -> Any:
    """A setting's value, or null where it may be without one. InputFormatError E6010 for what is no such
    number.
    """
    whole, free = name in ("seed", "top_k", "max_new_tokens"), name in ("seed", "max_new_tokens")
    if value is None and free:
        return value
    good = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if not good or (whole and value < 0):
        kind = "a whole number from 0 up" if whole else "a number"
        reason = f"{name} must be {kind}{' or null' * free}, not {_shown(value)}"
        raise refusal("E6010 set", "/set", reason=reason)
    return value


def _shown(value: Any) -> str:
    return printable(json.dumps(value), 40)


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
KEYS = {
    "Ctrl-C": "stop an answer, or clear what is typed",
    "Alt-Enter": "begin a new line",
    '"""': "begin and end a text of many lines",
}
ALIASES = {"/quit": "/exit", "/bye": "/exit", "/?": "/help"}
