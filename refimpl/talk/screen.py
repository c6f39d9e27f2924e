"""How an answer appears: piece by piece, the reasoning dim on a terminal and left out of a pipe, and a note
for whatever would otherwise end in silence.
"""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Iterator

from refimpl.cli import own, waiting
from refimpl.errors import visible
from refimpl.talk.conversation import Answer, Stats

DIM, PLAIN = "\x1b[2m", "\x1b[0m"
THINK = ("auto", "show", "hide")


class Screen:
    """Prints an answer as it comes: thinking dim on a terminal and left out of a pipe, or as `--think`
    says.
    """

    def __init__(self, think: str = "auto"):
        self.terminal = sys.stdout.isatty()
        dumb = os.environ.get("TERM") == "dumb"
        self.colour = self.terminal and not os.environ.get("NO_COLOR") and not dumb
        self.set_think(think)
        self.waiting = waiting.at_terminal()

    def set_think(self, think: str) -> None:
        """Show the reasoning or not: one of THINK."""
        self.mode = think
        self.think = {"auto": self.terminal, "show": True, "hide": False}[think]

    def show(self, pieces: Iterator[tuple[str, str]]) -> None:
        """Print the pieces of one answer and a final newline."""
        before, whole, hidden = "", False, 0
        self.waiting.begin("reading the question")
        try:
            for part, piece in pieces:
                if part == "reasoning" and not self.think:
                    hidden += 1
                    self.waiting.say(f"thinking, {hidden} pieces of text so far (/set think show shows them)")
                    continue
                if part != before:
                    self.waiting.end()
                    print(("\n\n" if before else "") + self._style(part), end="", file=own(sys.stdout))
                before = part
                print(visible(piece), end="", flush=True)
            whole = True
        finally:
            self.waiting.end()
            if whole or before:  # a refusal before the first word leaves no blank line
                plain = PLAIN if self.colour and before == "reasoning" else ""
                print(plain, file=own(sys.stdout), flush=True)

    def close(self, answer: Answer, stopped: bool) -> None:
        """What is to be said of an answer that has ended, perhaps `stopped` by a text of --stop: its figures
        on a terminal, a note where it is empty or was cut short.
        """
        assert answer.stats is not None
        if self.terminal:
            say(describe(answer.stats, answer.finish_reason))
        if why := shortcoming(answer, self.think, stopped):
            say(f"refimpl: note: {why}")

    def _style(self, part: str) -> str:
        return (DIM if part == "reasoning" else PLAIN) if self.colour else ""


def shortcoming(answer: Answer, think: bool, stopped: bool) -> str:
    """Why an answer is not what one would expect; "" for one that is."""
    if answer.finish_reason == "length":
        where = "" if answer.text else " while thinking" if answer.reasoning else " before the first word"
        return f"stopped at --max_new_tokens or the end of the context{where}"
    if answer.text or answer.finish_reason == "interrupted":
        return ""
    if stopped:
        return "the answer begins with a text that --stop or /set stop names, so nothing of it is shown"
    if answer.reasoning:
        seen = "" if think else "; --think show shows its thoughts"
        return f"the model ended its answer after thinking, without a word{seen}"
    return "the model ended its answer at once, without a word: it has nothing to say to this question"


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
        + (f" with {stats.threads} threads" if stats.threads else "")
        + ("" if finish_reason == "stop" else f" [{finish_reason}]")
    )


def say(line: str, margin: int = 2) -> None:
    """A line for people, on stderr; at a terminal broken between words, what follows `margin` columns in."""
    print(at_width(line, margin) if sys.stderr.isatty() else line, file=sys.stderr)


def at_width(line: str, margin: int) -> str:
    """The line broken between words at the width of the terminal, blanks within it kept. In a narrow terminal
    the margin is small.
    """
    width = max(shutil.get_terminal_size().columns, 20)
    margin = margin if width >= 3 * margin else 4
    return textwrap.fill(
        line, width, subsequent_indent=" " * margin, break_long_words=False, break_on_hyphens=False
    )
