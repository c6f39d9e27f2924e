"""Where questions come from: the lines of a pipe, or a person at a terminal, with line editing, history and
completion by `prompt_toolkit`, or plain lines where that is not installed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, Protocol

from refimpl.cli import own
from refimpl.errors import RefimplError, refusal
from refimpl.files import cache_folder

MAX_INPUT = 16 << 20  # bytes of one question; what fits into the context is far less, and told in tokens
QUOTES = '"""'
LEAVE = "(Ctrl-D or /exit to leave)"


class Questions(Protocol):
    """Anything that gives the next question: `read` returns None at the end of input."""

    person: bool  # somebody is there who can be told something

    def read(self) -> str | None: ...

    def busy(self) -> AbstractContextManager[None]:
        """Around what is done with a question, while nobody reads the next."""
        ...


def open_questions(words: Mapping[str, str], settings: Callable[[], list[str]]) -> Questions:
    """The best way to read from this stdin. `words` are commands with what they do, `settings` the names that
    /set knows, both for completion; a command that takes something has a space behind it.
    """
    if not sys.stdin.isatty():
        return Lines(person=False)
    if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        with suppress(ImportError):
            return Editor(words, settings)
    with suppress(ImportError):  # Windows has none
        import readline  # noqa: F401 - arrow keys at the prompt, where the better editor is missing
    return Lines(person=True)


class Lines:
    """A question a line; a line of three quotes begins and ends one of several lines."""

    def __init__(self, person: bool):
        self.person = person

    def read(self) -> str | None:
        text = self._line(">>> ")
        if text is None or not text.startswith(QUOTES):
            return text
        lines = [text[3:]]
        while not lines[-1].rstrip().endswith(QUOTES):
            more = self._line("... ")
            if more is None:
                break
            lines.append(more)
            bounded("\n".join(lines).encode("utf-8", "replace") if sum(map(len, lines)) > MAX_INPUT else b"")
        return "\n".join(lines).strip().removesuffix(QUOTES).strip()

    def busy(self) -> AbstractContextManager[None]:
        """Nothing is done: a terminal shows what is typed meanwhile."""
        return nullcontext()

    def _line(self, prompt: str) -> str | None:
        if self.person:
            # input() would print its prompt to stdout where that is no terminal.
            print(prompt, end="", file=sys.stderr, flush=True)
            try:
                return input()
            except EOFError:
                print(file=sys.stderr)
                return None
        raw = bounded(sys.stdin.buffer.readline(MAX_INPUT + 1))
        return raw.decode("utf-8", "replace").rstrip("\r\n") if raw else None


def bounded(raw: bytes) -> bytes:
    """A question's bytes. ResourceError E6002 for more than any context holds: a device or a disk image in
    place of a text.
    """
    if len(raw) > MAX_INPUT:
        raise refusal("E6002", "stdin", found=f"over {MAX_INPUT} bytes")
    return raw


class Editor:
    """A line editor: arrow keys, history from session to session, completion; Alt-Enter or Ctrl-J begins a
    new line, a paste keeps its own, and text after three quotes goes on to the next three.

    Ctrl-C clears what is written, and on an empty line raises KeyboardInterrupt.
    """

    person = True

    def __init__(self, words: Mapping[str, str], settings: Callable[[], list[str]]):
        from prompt_toolkit import PromptSession  # 0.2 s, and only a person at a terminal needs it
        from prompt_toolkit.output import create_output

        self.session: Any = PromptSession(
            history=_history(),
            completer=_completer(words, settings),
            complete_while_typing=False,
            key_bindings=_keys(),
            multiline=True,
            enable_suspend=True,  # Ctrl-Z, as in a shell
            prompt_continuation="... ",
            output=create_output(stdout=own(sys.stderr)),  # stdout is for the model's words
        )

    def read(self) -> str | None:
        try:
            text = self.session.prompt(">>> ")
        except EOFError:
            return None
        bounded(text.encode("utf-8", "replace"))
        if text.startswith(QUOTES):
            return text[3:].strip().removesuffix(QUOTES).strip()
        return text

    @contextmanager
    def busy(self) -> Iterator[None]:
        """What is typed meanwhile is kept for the next prompts and not shown among the words of an answer.
        Enter stays Enter, so that each line typed ahead is a question.
        """
        import termios  # Windows has none, and so no Editor with such a terminal

        stdin = sys.stdin.fileno()
        before = termios.tcgetattr(stdin)
        quiet = [*before]
        quiet[0], quiet[3] = before[0] & ~termios.ICRNL, before[3] & ~termios.ECHO
        termios.tcsetattr(stdin, termios.TCSANOW, quiet)
        try:
            yield
        finally:
            with suppress(termios.error):  # of a terminal that has gone
                termios.tcsetattr(stdin, termios.TCSANOW, before)


def _history() -> Any:
    """Questions of former sessions, in a file for the user's eyes alone; of this session, with a note, where
    there can be none.
    """
    from prompt_toolkit.history import FileHistory, InMemoryHistory  # see Editor

    try:
        path = cache_folder("chat") / "history"
        os.close(os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0), 0o600))
        return FileHistory(str(path))
    except (RefimplError, OSError) as error:
        print(f"refimpl: note: questions are not kept for the next time: {error}", file=sys.stderr)
        return InMemoryHistory()


def _keys() -> Any:
    from prompt_toolkit.key_binding import KeyBindings  # see Editor

    keys = KeyBindings()

    @keys.add("enter")
    def _(event: Any) -> None:
        text = event.current_buffer.text
        open_quotes = text.startswith(QUOTES) and not (len(text) >= 6 and text.rstrip().endswith(QUOTES))
        if open_quotes:
            event.current_buffer.insert_text("\n")
        else:
            event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    @keys.add("c-j")
    def _(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c")
    @keys.add("<sigint>")
    def _(event: Any) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt())

    return keys


def _completer(words: Mapping[str, str], settings: Callable[[], list[str]]) -> Any:
    """Commands at the start of a line, then what each takes: a file, or the name of a setting."""
    from prompt_toolkit.completion import Completer, Completion, PathCompleter  # see Editor
    from prompt_toolkit.document import Document

    files = PathCompleter(expanduser=True)

    class Slash(Completer):
        def get_completions(self, document: Any, event: Any) -> Iterator[Any]:
            word, space, rest = document.text_before_cursor.partition(" ")
            if not word.startswith("/"):
                return
            if not space:
                for name, about in words.items():
                    if name.startswith(word):
                        yield Completion(name, -len(word), display=name.strip(), display_meta=about)
            elif word in ("/file", "/save", "/load"):
                yield from files.get_completions(Document(rest), event)
            elif word == "/set":
                for name in settings():
                    if name.startswith(rest):
                        yield Completion(name + "=", -len(rest), display=name)

    return Slash()
