"""A conversation as a file: JSON that `/save` writes and `/load` reads, checked field by field."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from refimpl.errors import refusal
from refimpl.files import read_small, write_text
from refimpl.text.template import Message

FORMAT = "refimpl conversation 1"
LIMIT = 64 << 20  # bytes of such a file
ROLES = ("system", "user", "assistant")


def save(path: Path, messages: list[Message]) -> None:
    """Write the turns. ResourceError E5108 where the file exists, and what the file system refuses."""
    if os.path.isfile(path):
        raise refusal("E5108 save", path)
    turns = [{"role": m.role, "content": m.content, "reasoning": m.reasoning} for m in messages]
    text = json.dumps({"format": FORMAT, "messages": turns}, ensure_ascii=True, indent=1)
    write_text(path, text + "\n")


def load(path: Path) -> list[Message]:
    """The turns of a file. InputFormatError E6020 for a file that `save` did not write."""
    try:
        found = json.loads(read_small(path, LIMIT))
    except (ValueError, RecursionError):
        raise refusal("E6020", path, found="no JSON") from None
    turns = found.get("messages") if isinstance(found, dict) and found.get("format") == FORMAT else None
    if not isinstance(turns, list):
        raise refusal("E6020", path, found="no list of messages", expected=f'"format": "{FORMAT}"')
    messages = [_message(path, turn) for turn in turns]
    roles = [m.role for m in messages if m.role != "system"]
    if any(m.role == "system" for m in messages[1:]) or roles != ["user", "assistant"] * (len(roles) // 2):
        raise refusal("E6020", path, found="turns out of order", expected="user and assistant in turn")
    return messages


def _message(path: Path, turn: Any) -> Message:
    values = [turn.get(k, "") for k in ("role", "content", "reasoning")] if isinstance(turn, dict) else []
    texts = [v.encode("utf-8", "replace").decode() for v in values if isinstance(v, str)]
    if len(texts) != 3 or texts[0] not in ROLES:
        raise refusal("E6020", path, found=f"{turn!r:.60}", expected="role, content and reasoning as texts")
    role, content, reasoning = texts
    return Message(role, content, reasoning)
