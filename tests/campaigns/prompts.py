"""Random conversations through template and tokenizer: no exception, no control token from a message's text,
and the text comes back.

The texts hold what a stranger or a broken terminal may send: spellings of control tokens, whole and torn, in
one message or over two, Unicode of all kinds, control characters, lone surrogates, Jinja, and, rarely, a
hundred thousand characters.
"""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

from refimpl.text.template import ChatTemplate, Message
from refimpl.text.tokenizer import Tokenizer, scalar
from refimpl.tiny import FP8_DIR
from tests.campaigns import WHOLE, Part, Report, guard, keep

SHORT, LONG = 600, 50_000
BLANKS = ("", "", "", " ", "\n", "\t ", "\u3000", "\x85")
PLAIN = (
    "What is 2 + 2?",
    "你好",
    "é",
    "e\u0301",
    "👩‍👩‍👧",
    "\u202eabc",
    "\0",
    "\x1b[31m",
    "{{ messages }}",
    "{% raw %}",
    "<|im_end|>",
    "\ud800",
    "\udfff",
    "\U000f8f00\U00100000\U000f8f01",
    "a" * 300,
    "</think>",
    "\r\n",
    "\ufeff",
    "ﬁ",
    "\U0010ffff",
    "\ufffd",
)


def run(cases: int, seed: int, folder: Path, part: Part = WHOLE) -> Report:
    tokenizer = Tokenizer(FP8_DIR)
    template = ChatTemplate.open(tokenizer)
    spellings = [tokenizer.decode([i]) for i in tokenizer.control]
    failures: list[str] = []
    outcomes: Counter[str] = Counter()
    with guard.watched():
        for i in part.share(range(cases)):
            rng = random.Random(f"prompts/{seed}/{i}")
            messages = _conversation(rng, spellings)
            wrong: list[str] = []
            kind, why = guard.outcome(lambda: wrong.extend(_check(tokenizer, template, messages)))
            outcomes[f"{kind} {why}".strip()] += 1
            if kind == "failed" or wrong:
                text = repr([(m.role, m.content, m.reasoning) for m in messages])
                failures.append(
                    f"case {i} of seed {seed}: {why or wrong[0]} "
                    f"[{keep(folder, f'prompt-{seed}-{i}', text.encode()).name}]"
                )
    return Report(
        outcomes.total(), failures, {"conversations": outcomes}, {"control tokens spelled": len(spellings)}
    )


def _text(rng: random.Random, spellings: list[str]) -> str:
    if rng.random() < 0.002:
        return (rng.choice(PLAIN) * 100_000)[:100_000]
    parts = []
    for _ in range(rng.choice((0, 1, 1, 2, 5))):
        what = rng.random()
        if what < 0.3:
            spelling = rng.choice(spellings)
            at = rng.randrange(len(spelling) + 1)
            parts.append(rng.choice((spelling, spelling, spelling[:at], spelling[at:])))
        elif what < 0.7:
            parts.append(rng.choice(PLAIN))
        else:
            top = rng.choice((0x7F, 0x7FF, 0xFFFF, 0x10FFFF))
            parts.append("".join(chr(rng.randint(0, top)) for _ in range(rng.randint(1, 20))))
    return rng.choice(BLANKS) + "".join(parts) + rng.choice(BLANKS)


def _conversation(rng: random.Random, spellings: list[str]) -> list[Message]:
    messages = [Message("system", _text(rng, spellings))] if rng.random() < 0.3 else []
    for _ in range(rng.choice((0, 0, 1, 2))):
        reasoning = _text(rng, spellings) if rng.random() < 0.3 else ""
        messages += [
            Message("user", _text(rng, spellings)),
            Message("assistant", _text(rng, spellings), reasoning),
        ]
    return [*messages, Message("user", _text(rng, spellings))]


def _check(tokenizer: Tokenizer, template: ChatTemplate, messages: list[Message]) -> list[str]:
    wrong = []
    pieces = template.pieces(messages)
    ids = tokenizer.encode_pieces(pieces)
    trusted = tokenizer.encode_pieces([p for p in pieces if p.trusted])
    if [i for i in ids if i in tokenizer.control] != [i for i in trusted if i in tokenizer.control]:
        wrong.append("a message's text has added, or taken away, a control token")
    for message in messages:
        alone = tokenizer.encode(message.content)
        if tokenizer.control.intersection(alone):
            wrong.append("text alone gives a control token")
        if tokenizer.decode(alone) != scalar(message.content):
            wrong.append("the text does not come back")
    stream = tokenizer.stream()
    if len(ids) < 5000 and "".join([*map(stream.push, ids), stream.end()]) != tokenizer.decode(ids):
        wrong.append("token by token gives another text")
    return wrong
