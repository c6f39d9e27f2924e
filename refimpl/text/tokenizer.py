"""Text to token ids and back, such that only a template can write a control token.

A control token (`<｜User｜>`, `<think>`, end of sentence ...) is an added token of tokenizer.json. The stock
encoder turns its spelling into its id wherever it stands, in a user's message as well;
`encode_special_tokens` stops that only for tokens marked `special`, which DeepSeek's `<｜User｜>` is not.
Here the text is encoded by a clone without them, and control tokens are looked for in trusted pieces (the
template's) alone. Added tokens that are words of a text stay in the clone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from refimpl import fields
from refimpl.checkpoint import gguf
from refimpl.config import own_fields
from refimpl.errors import InputFormatError, refusal
from refimpl.text import answers, gguf_vocabulary, tiktoken_vocabulary
from refimpl.text.sandbox import WORDS, Failure, Library, open_library

MAX_TOKENIZER_BYTES = 128 << 20  # the largest published tokenizer.json files have about 35 MB
MAX_CONFIG_BYTES = 4 << 20
MAX_TEMPLATE = 1 << 20  # characters
MAX_TEMPLATES = 64
MAX_ID = 1 << 32
TIKTOKEN = "tiktoken.model"  # Kimi's and Moonlight's vocabulary
# characters that one may become before it is split: compatibility forms of Unicode, the longest, make 18
GROWTH = 64
# Unicode's White_Space, which is what the package `tokenizers` takes; `str.isspace` knows four controls more.
BLANKS = "".join(c for c in map(chr, range(0x3001)) if c.isspace() and c not in "\x1c\x1d\x1e\x1f")
_HINT = "use the tokenizer files that came with the model"


class Piece(NamedTuple):
    """A stretch of a prompt; control tokens are recognized where `trusted`, that is in text the template
    wrote.
    """

    text: str
    trusted: bool


class Files(NamedTuple):
    """What the files beside a model say of its text, each from its own file, else from a GGUF's metadata."""

    path: Path  # that the tokenizer is from
    tokenizer: dict[str, Any]
    config: dict[str, Any]  # tokenizer_config.json
    generation: dict[str, Any]
    model: dict[str, Any]  # config.json, {} where there is none


def read_files(place: Path) -> Files:
    """Read the tokenizer of a folder, or of a .gguf file and the folder it is in. Errors as `read_json`,
    `gguf_vocabulary.tokenizer` and `tiktoken_vocabulary.tokenizer`, and InputFormatError E6101 for no
    tokenizer at all.
    """
    folder = place.parent if place.is_file() else place
    small = {
        name: read_json(folder / f"{name}.json", MAX_CONFIG_BYTES, missing_ok=True)
        for name in ("tokenizer_config", "generation_config", "config")
    }
    if small["tokenizer_config"] or not has_gguf(place):
        small["tokenizer_config"] = _with_map(small["tokenizer_config"], folder / "special_tokens_map.json")
    if small["tokenizer_config"]:
        fields.judge("tokenizer_config.json", small["tokenizer_config"], folder / "tokenizer_config.json")
    path = folder / "tokenizer.json"
    if not has_gguf(place):
        if not path.exists() and (folder / TIKTOKEN).exists():
            path = folder / TIKTOKEN
            raw = tiktoken_vocabulary.tokenizer(path, small["tokenizer_config"])
        else:
            raw = read_json(path, MAX_TOKENIZER_BYTES)
        return Files(path, raw, *small.values())
    meta, file = gguf_vocabulary.metadata(place)
    if path.exists():
        raw = read_json(path, MAX_TOKENIZER_BYTES)
    else:
        path, raw = file, gguf_vocabulary.tokenizer(meta, file)
    return Files(
        path,
        raw,
        small["tokenizer_config"] or gguf_vocabulary.config(meta, file),
        small["generation_config"] or answers.gguf_generation(meta, file),
        small["config"],
    )


def read_stop_ids(places: Sequence[Path | str], config: dict[str, Any]) -> frozenset[int]:
    """The `stop_ids` of a tokenizer at the first of the places that has one, without building it, for which
    only the last of the three sources needs one. `config` is the model's config.json, whichever folder it
    is from.
    """
    found = [Path(p) for p in places]
    try:
        place = first_with_tokenizer(*found)
    except InputFormatError:  # a model without a tokenizer is a model
        place = found[0]
    folder = place.parent if place.is_file() else place
    generation = read_json(folder / "generation_config.json", MAX_CONFIG_BYTES, missing_ok=True)
    if not generation and has_gguf(place):
        generation = answers.gguf_generation(*gguf_vocabulary.metadata(place))
    stops = answers.stop_ids(generation, config, None, folder / "generation_config.json")
    if stops or not any((folder / name).exists() for name in ("tokenizer.json", TIKTOKEN)):
        return stops
    return Tokenizer(place).stop_ids


class Tokenizer:
    """A folder's tokenizer.json with the special ids of its tokenizer_config.json and generation_config.json;
    or all that from a GGUF's metadata.

    control: ids that no untrusted text ever yields. Added tokens that are words of a fine-tuner's (`special:
        false`, spelled like words) are not among them.
    special: the named ones ("bos_token": 0, ...), stop_ids: those that end an answer, generation: the
        generation config as it stands.
    bos: the id that a prompt must begin with, None where the tokenizer does not ask for one.
    """

    def __init__(self, place: Path):
        """`place`: a folder, or a .gguf file; tokenizer.json goes before metadata. Errors as `read_files`."""
        path, raw, self.config, self.generation, model = read_files(place)
        folder = place.parent if place.is_file() else place
        # A stored truncation would cut prompts without a word.
        raw = {k: v for k, v in raw.items() if k != WORDS} | {"truncation": None, "padding": None}
        _added_tokens(raw, path)
        self.folder, self.path, self.raw = folder, path, raw
        self.templates = find_templates(folder, self.config)
        controls, words = _split_added(raw, self.templates)
        self._library = _build(raw | ({WORDS: words} if words else {}), path)
        self.vocabulary = vocabulary = self._library.vocabulary()
        self._spelling = {i: t for t, i in vocabulary.items()}
        _check_named(folder, self.config, self.templates, vocabulary)
        self.special = _special_ids(self.config, vocabulary, folder / "tokenizer_config.json")
        where = folder / "generation_config.json"
        self.stop_ids = answers.stop_ids(self.generation, model, self.special.get("eos_token"), where)
        named = set(self.special.values()) | self.stop_ids
        # The id of what the vocabulary lacks is an ordinary outcome of ordinary text.
        self.control = ({vocabulary[t] for t in controls} | named) - {self.special.get("unk_token")}
        if any(vocabulary[t] in self.control for t in words):  # a word that ends answers is no word of a text
            words = [t for t in words if vocabulary[t] not in self.control]
            self._library = _build(raw | ({WORDS: words} if words else {}), path)
        self.bos = _bos(
            self.config, raw, self.special.get("bos_token", own_fields(model).get("bos_token_id"))
        )
        self.ids = np.array(sorted(vocabulary.values()), np.int64)
        self._longest = max(map(len, vocabulary), default=1)
        spelled = {t: i for i in self.control if (t := self._spelling.get(i))}
        # The longest spelling first, as the stock encoder prefers it too.
        pattern = "|".join(re.escape(t) for t in sorted(spelled, key=len, reverse=True))
        self._spelled, self._split = spelled, re.compile(f"({pattern})") if pattern else None
        added = [a for a in raw.get("added_tokens", ()) if a["content"] in spelled]
        self._strips_left = {spelled[a["content"]] for a in added if a.get("lstrip")}
        self._strips_right = {spelled[a["content"]] for a in added if a.get("rstrip")}

    def token_id(self, spelling: str) -> int | None:
        """Id of the control token spelled so, or None: `<think>` has one in R1 and none in V3."""
        return self._spelled.get(spelling)

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, which never becomes a control token; no BOS is added. Lone surrogates count as
        U+FFFD.
        """
        return self._encode([Piece(text, trusted=False)])

    def encode_pieces(self, pieces: Iterable[Piece]) -> list[int]:
        """Ids of a rendered prompt, with one BOS before it where the tokenizer asks for one and the
        template gave none. Text between two control tokens is encoded in one go, wherever its pieces came
        from.

        So the ids are those of the stock encoder unless untrusted text spells a control token.
        InputFormatError E6107 when the vocabulary itself makes plain text a control token.
        """
        ids = self._encode(pieces)
        return ids if self.bos is None or ids[:1] == [self.bos] else [self.bos, *ids]

    def _encode(self, pieces: Iterable[Piece]) -> list[int]:
        ids: list[int] = []
        run: list[str] = []
        last = None
        for piece in pieces:
            parts = self._split.split(piece.text) if piece.trusted and self._split else [piece.text]
            for k, part in enumerate(parts):
                if k % 2:  # `re.split` with one group puts the separators at odd places
                    token = self._spelled[part]
                    ids += [*self._encode_run(self._between(last, "".join(run), token)), token]
                    run, last = [], token
                else:
                    run.append(part)
        return ids + self._encode_run(self._between(last, "".join(run), None))

    def _between(self, left: int | None, text: str, right: int | None) -> str:
        """Text between two control tokens without the blanks that these take to themselves (`rstrip` of the
        one, `lstrip` of the other), as the stock encoder does.
        """
        text = text.lstrip(BLANKS) if left in self._strips_right else text
        return text.rstrip(BLANKS) if right in self._strips_left else text

    def _encode_run(self, text: str) -> list[int]:
        with _failure(
            self.folder / "tokenizer.json", "the tokenizer fails"
        ):  # a pattern may backtrack beyond the library's limit, or ours
            ids = self._library.encode(scalar(text)) if text else []
        bad = self.control.intersection(ids)
        if bad:
            token = self._spelling.get(min(bad))
            raise refusal("E6107", self.folder, found=repr(token))
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, control tokens spelled out; bytes that are no UTF-8 become U+FFFD, ids without a
        token nothing.
        """
        with _failure(self.folder / "tokenizer.json", "the tokenizer fails"):
            return self._library.decode(ids)

    def stream(self) -> Stream:
        """A decoder that takes one id at a time."""
        return Stream(self)

    def least_tokens(self, text: str) -> int:
        """A lower bound of `len(encode(text))`, without encoding: no token stands for more characters than
        the longest has.
        """
        # A spelling in a byte-level vocabulary has one character per byte, elsewhere at most a few more than
        # it stands for.
        return len(text) // self._longest

    def without_token(self, rows: int) -> np.ndarray:
        """Ids below `rows` (the model's vocabulary) that spell nothing and must not be sampled, int64 [n].

        DeepSeek-V3 has 129,280 rows and 128,815 tokens. MismatchError E6106 when the tokenizer has more
        tokens than the model rows.
        """
        if len(self.ids) and self.ids[-1] >= rows:
            raise refusal(
                "E6106",
                self.folder / "tokenizer.json",
                found=f"token id {self.ids[-1]}",
                expected=f"ids below {rows}",
            )
        _tell_moved(self.raw, self.vocabulary, self.path)
        return np.setdiff1d(np.arange(rows), self.ids)


def has_gguf(place: Path) -> bool:
    """Whether it is a file, which weights of one file are only in GGUF, or a folder with one."""
    return place.is_file() or (
        place.is_dir() and not _has_safetensors(place) and gguf.home(place) is not None
    )


def _has_safetensors(folder: Path) -> bool:
    return any(folder.glob("*.safetensors")) or (folder / "model.safetensors.index.json").exists()


def first_with_tokenizer(*places: Path) -> Path:
    """The first place with a tokenizer.json, else the first with a GGUF, else with a tiktoken.model.
    InputFormatError E6101 when there is none of these.
    """

    def beside(name: str) -> list[Path]:
        return [p for p in places if ((p.parent if p.is_file() else p) / name).exists()]

    for place in (*beside("tokenizer.json"), *filter(has_gguf, places), *beside(TIKTOKEN)):
        return place
    raise refusal("E6101 tokenizer", places[0] / "tokenizer.json")


class Stream:
    """Text of ids as they come. A character whose bytes are spread over several tokens is held back until it
    is complete.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # a decoded head, kept as context, and behind `_shown` what is pending
        self._shown = 0

    def push(self, token_id: int) -> str:
        """The text that this token completes, perhaps none."""
        self._ids.append(token_id)
        text = self._pending()
        if text.endswith("\ufffd"):
            return ""
        self._ids, self._shown = self._ids[self._shown :], len(self._ids) - self._shown
        return text

    def end(self) -> str:
        """What was held back; an incomplete character becomes U+FFFD."""
        text = self._pending()
        self._ids, self._shown = [], 0
        return text

    def _pending(self) -> str:
        # Decoded behind what was shown last: some decoders drop the blank of a first word.
        head = self._tokenizer.decode(self._ids[: self._shown])
        return self._tokenizer.decode(self._ids)[len(head) :]


def scalar(text: str) -> str:
    """`text` with lone surrogates (undecodable bytes of a command line, halves of broken UTF-16) replaced by
    U+FFFD.
    """
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def read_text(path: Path, limit: int, *, what: str = "file") -> str:
    """A small UTF-8 file. InputFormatError: E6101 missing, E6102 larger than `limit` bytes, E6103 not
    UTF-8.
    """
    if not path.is_file():
        raise refusal("E6101 missing", path, what=what)
    with open(path, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise refusal(
            "E6102", path, what=what, found=f"{path.stat().st_size} bytes", expected=f"at most {limit}"
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise refusal(
            "E6103", path, what=what, found=f"byte {data[error.start]:#04x} at {error.start}"
        ) from None


def read_json(path: Path, limit: int, *, missing_ok: bool = False) -> dict[str, Any]:
    """A small JSON object; {} for a missing file when `missing_ok`. Errors as `read_text`, and E6104 when it
    is no JSON object.
    """
    if missing_ok and not path.exists():
        return {}
    text = read_text(path, limit)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        hint = (
            "this is a Git LFS pointer: fetch the real file"
            if text.startswith("version https://git-lfs")
            else _HINT
        )
        raise refusal("E6104 json", path, found=str(error) or type(error).__name__, hint=hint) from None
    if not isinstance(value, dict):
        raise refusal("E6104 files", path, found=type(value).__name__)
    return value


def _build(raw: dict[str, Any], path: Path) -> Library:
    if (times := _growth(raw.get("normalizer"))) > GROWTH:
        raise refusal("E6105 normalizer", path, found=f"up to {times} times", expected=GROWTH)
    with _failure(path, "the tokenizer cannot be built"):
        return open_library(raw)


def _growth(normalizer: Any) -> int:
    """How many characters a normalizer can make of one, by what it puts in the place of a pattern or before a
    text.
    """
    if not isinstance(normalizer, dict):
        return 1
    times = max([1, *(len(v) for n in ("content", "prepend") if isinstance(v := normalizer.get(n), str))])
    parts = normalizer.get("normalizers")
    for part in parts if isinstance(parts, list) else ():
        times = min(times * _growth(part), 10**9)
    return times


@contextmanager
def _failure(path: Path, what: str) -> Iterator[None]:
    """InputFormatError E6105 for a failure of the library."""
    try:
        yield
    except Failure as error:
        raise refusal("E6105", path, what=what, found=str(error)) from None


def _added_tokens(raw: dict[str, Any], path: Path) -> dict[str, int]:
    try:
        added = {t["content"]: int(t["id"]) for t in raw.get("added_tokens") or [] if t["content"]}
        if not all(0 <= i < MAX_ID for i in added.values()):
            raise ValueError("an id out of range")
        if not all(isinstance(text, str) for text in added):
            raise ValueError("a content that is no text")
        return added
    except (TypeError, KeyError, ValueError, OverflowError, AttributeError) as error:
        raise refusal(
            "E6105 malformed", path, found=repr(error), expected="objects with id and content"
        ) from None


SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


def _with_map(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """tokenizer_config.json with the named tokens of special_tokens_map.json, which older programs write
    beside it. MismatchError E6108 where the two differ: transformers 5 takes the latter, older ones the
    former.
    """
    listed = read_json(path, MAX_CONFIG_BYTES, missing_ok=True)
    mapped = {name: _spelling(listed[name]) for name in SPECIAL if listed.get(name) is not None}
    for name, spelling in mapped.items():
        if config.get(name) is not None and _spelling(config[name]) != spelling:
            found, expected = (
                repr(spelling)[:60],
                f"{repr(_spelling(config[name]))[:60]}, as tokenizer_config",
            )
            raise refusal("E6108 differ", path, name=name, found=found, expected=expected)
    return config | {n: s for n, s in mapped.items() if config.get(n) is None}


def _spelling(value: Any) -> Any:
    return value.get("content") if isinstance(value, dict) else value


def _check_named(
    folder: Path, config: dict[str, Any], templates: dict[str, Any], vocabulary: dict[str, int]
) -> None:
    """Tokens that other files name and tokenizer.json lacks: transformers makes new ones of them.
    MismatchError E6108 for one that a template writes; the others are named in a note.
    """
    named: dict[Any, str] = {}
    for key in ("added_tokens_decoder", "additional_special_tokens", "extra_special_tokens"):
        value = config.get(key)
        rows = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        named |= {s: key for s in map(_spelling, rows) if isinstance(s, str)}
    named |= dict.fromkeys(
        read_json(folder / "added_tokens.json", MAX_CONFIG_BYTES, missing_ok=True), "added_tokens.json"
    )
    lost = {text: key for text, key in named.items() if text not in vocabulary}
    for text, key in lost.items():
        if any(isinstance(source, str) and text in source for source in templates.values()):
            raise refusal(
                "E6108 tokenizer", folder / "tokenizer_config.json", name=key, found=repr(text)[:80]
            )
    if lost:
        shown = ", ".join(map(repr, [*lost][:20]))
        fields.note(f"{folder}: no tokens of tokenizer.json, and not made of a text: {shown}")


def _special_ids(config: dict[str, Any], vocabulary: dict[str, int], path: Path) -> dict[str, int]:
    special = {}
    for name in SPECIAL:
        spelling = _spelling(config.get(name))
        if spelling is None:
            continue
        token_id = vocabulary.get(spelling) if isinstance(spelling, str) else None
        if token_id is None:
            raise refusal("E6108 tokenizer", path, name=name, found=repr(spelling)[:80])
        special[name] = token_id
    return special


def find_templates(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Chat templates by name, as they stand: those of files (`chat_template.jinja` is the default,
    `additional_chat_templates/NAME.jinja` others) before those of tokenizer_config.json.
    """
    listed = config.get("chat_template")
    found: dict[str, Any] = {} if listed is None else {"default": listed}
    if isinstance(listed, list):
        found = {str(t.get("name")): t.get("template") for t in listed if isinstance(t, dict)}
    files = {"default": folder / "chat_template.jinja"} | {
        path.stem: path
        for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))[:MAX_TEMPLATES]
    }
    texts = {n: read_text(p, MAX_TEMPLATE, what="chat template") for n, p in files.items() if p.exists()}
    return found | texts


def _split_added(raw: dict[str, Any], templates: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Added tokens: those that only a template writes, and those that are words of a text. The former are
    marked special, spelled in brackets, or found in a template; DeepSeek's `<｜User｜>` is not marked.
    """
    sources = [t for t in templates.values() if isinstance(t, str)]

    def is_control(token: dict[str, Any]) -> bool:
        text = token["content"]
        if token.get("special") or _BRACKETS.fullmatch(text):
            return True
        # Plain words stand in a template's code as well, "user" for one.
        odd = not _WORDS.fullmatch(text) and any(c.isalpha() for c in text)
        return odd and any(text in source for source in sources)

    added = raw.get("added_tokens") or []
    controls = [t["content"] for t in added if is_control(t)]
    return controls, [t["content"] for t in added if t["content"] not in controls]


def _tell_moved(raw: dict[str, Any], vocabulary: dict[str, int], path: Path) -> None:
    """The library numbers added tokens without a gap behind the vocabulary, whatever the file says."""
    moved = [t for t in raw.get("added_tokens") or [] if vocabulary[t["content"]] != int(t["id"])]
    if moved:
        first = moved[0]
        fields.note(
            f"{path}: {len(moved)} added tokens have other ids than the file says, {first['content']!r} "
            f"{vocabulary[first['content']]} and not {first['id']}: the package tokenizers numbers them so"
        )


_BRACKETS = re.compile(r"<.+>|\[.+\]|[｜|].+[｜|]", re.DOTALL)
_WORDS = re.compile(r"[\w\s'.-]+")


def _bos(config: dict[str, Any], raw: dict[str, Any], bos: Any) -> int | None:
    """The id that goes before a prompt: `add_bos_token` decides, else whether tokenizer.json adds one
    itself.
    """
    asked = config.get("add_bos_token")
    if asked is None:
        asked = any(bos in ids for ids in _heads(raw.get("post_processor")))
    return bos if asked is True and isinstance(bos, int) else None


def _heads(processor: Any) -> Iterator[list[Any]]:
    """The ids that each template of a post-processor puts before a text."""
    if not isinstance(processor, dict):
        return
    for part in processor.get("processors") or []:
        yield from _heads(part)
    head = (processor.get("single") or [None])[0] if isinstance(processor.get("single"), list) else None
    if isinstance(head, dict) and isinstance(token := head.get("SpecialToken"), dict):
        ids = ((processor.get("special_tokens") or {}).get(token.get("id")) or {}).get("ids")
        yield ids if isinstance(ids, list) else []
