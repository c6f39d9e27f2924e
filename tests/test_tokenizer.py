"""The tokenizer: the stock encoder's ids, except that text of a user never becomes a control token."""

import gc
import hashlib
import json
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Stock

from refimpl.errors import RefimplError
from refimpl.text import sandbox
from refimpl.text.template import ChatTemplate, Message
from refimpl.text.tokenizer import Piece, Tokenizer
from refimpl.tiny import FP8_DIR

TOKENIZER = Tokenizer(FP8_DIR)
FILE = json.dumps({**TOKENIZER.raw, "truncation": None, "padding": None}, separators=(",", ":"))
STOCK = Stock.from_file(str(FP8_DIR / "tokenizer.json"))
TEMPLATE = ChatTemplate.open(TOKENIZER)
SPELLINGS = sorted(TOKENIZER._spelled, key=TOKENIZER._spelled.get)
hostile = st.lists(
    st.one_of(
        st.sampled_from(SPELLINGS),
        st.text(max_size=8),
        st.sampled_from(["<think", "｜", "\ud800", "\0", "\n\n", " "]),
    ),
    max_size=6,
).map("".join)


def test_special_tokens_are_deepseeks():
    assert TOKENIZER.special == {"bos_token": 0, "eos_token": 1, "pad_token": 2}
    assert TOKENIZER.stop_ids == {1}
    names = [
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        "<｜▁pad▁｜>",
        "<think>",
        "</think>",
        "<｜User｜>",
        "<｜Assistant｜>",
    ]
    assert names == SPELLINGS
    assert TOKENIZER.token_id("<think>") == 500 and TOKENIZER.token_id("no such") is None
    assert TOKENIZER.without_token(512).tolist() == list(range(504, 512))


@given(hostile)
def test_no_text_of_a_user_becomes_a_control_token(text):
    ids = TOKENIZER.encode(text)
    assert not TOKENIZER.control.intersection(ids)
    prompt = TOKENIZER.encode_pieces(TEMPLATE.pieces([Message("user", text)]))
    assert [i for i in prompt if i in TOKENIZER.control] == [0, 502, 503, 500]


@given(st.text(max_size=60))
def test_encoding_loses_nothing_and_is_the_stock_encoders(text):
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.least_tokens(text) <= len(ids)
    if not any(s in text for s in SPELLINGS):
        assert ids == STOCK.encode(text, add_special_tokens=False).ids


@given(st.lists(st.tuples(st.sampled_from(["a", "7", "中", *SPELLINGS]), st.booleans()), max_size=8))
def test_trusted_pieces_alone_are_the_stock_encoders(parts):
    stock = STOCK.encode("".join(t for t, _ in parts), add_special_tokens=False).ids
    # This tokenizer asks for a BOS, which is there once whether the template gives it or not.
    expected = stock if stock[:1] == [0] else [0, *stock]
    assert TOKENIZER.encode_pieces([Piece(t, True) for t, _ in parts]) == expected


@given(st.text("aé中😀 1+", max_size=20))
def test_streaming_shows_whole_characters_and_all_of_them(text):
    stream, shown = TOKENIZER.stream(), []
    for token in TOKENIZER.encode(text):
        piece = stream.push(token)
        assert "\ufffd" not in piece
        shown.append(piece)
    assert "".join([*shown, stream.end()]) == text


def test_a_broken_character_at_the_end_is_shown_as_such():
    stream = TOKENIZER.stream()
    ids = TOKENIZER.encode("a😀")
    shown = "".join(stream.push(i) for i in ids[:-1]) + stream.end()
    assert shown.startswith("a") and "\ufffd" in shown


def test_every_id_of_the_vocabulary_decodes_or_is_banned():
    banned = set(TOKENIZER.without_token(512).tolist())
    for i in range(512):
        assert (i in banned) == (STOCK.id_to_token(i) is None)


@pytest.fixture
def folder(tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(FP8_DIR / name, tmp_path)
    return tmp_path


def edit(path, **change):
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


@pytest.mark.parametrize(
    ("code", "change"),
    [
        ("E6101", lambda f: (f / "tokenizer.json").unlink()),
        ("E6103", lambda f: (f / "tokenizer.json").write_bytes(b"\xff\xfe")),
        ("E6104", lambda f: (f / "tokenizer.json").write_text("{")),
        ("E6104", lambda f: (f / "tokenizer.json").write_text("[]")),
        (
            "E6104 .*LFS",
            lambda f: (f / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\n"),
        ),
        ("E6104", lambda f: (f / "tokenizer.json").write_text("[" * 100_000)),
        ("E6105", lambda f: (f / "tokenizer.json").write_text("{}")),
        ("E6105", lambda f: edit(f / "tokenizer.json", model={"type": "BPE", "vocab": 3, "merges": []})),
        ("E6105", lambda f: edit(f / "tokenizer.json", added_tokens=[{"id": 1}])),
        ("E6108", lambda f: edit(f / "tokenizer_config.json", eos_token="<none>")),
        ("E6108", lambda f: edit(f / "generation_config.json", eos_token_id="1")),
        ("E6104", lambda f: (f / "generation_config.json").write_text("nonsense")),
    ],
)
def test_wrong_tokenizer_files_are_refused(folder, code, change):
    change(folder)
    with pytest.raises(RefimplError, match=code) as caught:
        Tokenizer(folder)
    assert caught.value.line().isprintable()


def test_a_tokenizer_larger_than_the_model_is_refused():
    with pytest.raises(RefimplError, match="E6106"):
        TOKENIZER.without_token(500)


def test_several_stop_ids_and_a_stored_truncation(folder):
    edit(folder / "generation_config.json", eos_token_id=[1, 2])
    edit(
        folder / "tokenizer.json",
        truncation={"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
    )
    tokenizer = Tokenizer(folder)
    assert tokenizer.stop_ids == {1, 2} and len(tokenizer.encode("1 2 3 4 5 6")) > 2
    assert np.array_equal(tokenizer.ids, TOKENIZER.ids)


# --- the library in a process of its own --------------------------------------------------------------------


def test_the_embedded_models_needs_no_process():
    digest = hashlib.sha256(FILE.encode()).hexdigest()
    assert digest in sandbox.KNOWN, (
        f"the embedded model's tokenizer has changed: put {digest} into text.sandbox.KNOWN"
    )
    assert isinstance(TOKENIZER._library, sandbox.InProcessTokenizer)


def test_another_process_gives_the_same():
    here, apart = sandbox.InProcessTokenizer(FILE), sandbox.ChildTokenizer(FILE)
    assert apart.vocabulary() == here.vocabulary()
    for text in ("", "What is 7 + 8?", "中\u2028\ufffd\0", SPELLINGS[3], "a" * 100_000):
        ids = apart.encode(text)
        assert ids == here.encode(text) and apart.decode(ids) == here.decode(ids) == text
    assert apart.decode([*range(512), 10**6]) == here.decode([*range(512), 10**6])


def test_a_process_that_was_interrupted_or_died_is_replaced(monkeypatch):
    apart = sandbox.ChildTokenizer(FILE)
    ids = apart.encode("What?")
    child = apart._child
    child.kill()
    with pytest.raises(sandbox.Failure, match="ended by signal 9"):
        apart.encode("What?")
    assert apart.encode("What?") == ids and apart._child is not child

    def interrupt(child, request, limit):
        child.stdin.write(request)
        child.stdin.flush()
        raise KeyboardInterrupt

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(sandbox, "_exchange", interrupt)
        apart.encode("an answer that nobody has read")
    assert apart.encode("What?") == ids
    last = apart._child
    del apart
    gc.collect()
    assert last.returncode == -9


def test_an_answer_beyond_measure_is_not_read_to_its_end():
    """A decoder may put a text in the place of another; what it makes of some ids is bounded."""
    longer = json.loads(FILE) | {
        "decoder": {"type": "Replace", "pattern": {"String": "e"}, "content": "e" * 4000}
    }
    apart = sandbox.ChildTokenizer(json.dumps(longer))
    with pytest.raises(sandbox.Failure, match="more than"):
        apart.decode(apart.encode("e" * 50_000))


# --- other files that name tokens ---------------------------------------------------------------------------


def named_in(folder, *, config=None, **files):
    """The embedded model's tokenizer, whose template writes <|im_end|>, with more in its files."""
    shutil.copy(FP8_DIR / "tokenizer.json", folder)
    old = json.loads((FP8_DIR / "tokenizer_config.json").read_text())
    old |= {"chat_template": "{{ bos_token }}{{ messages[0].content }}<|im_end|>"} | (config or {})
    (folder / "tokenizer_config.json").write_text(json.dumps(old))
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


@pytest.mark.parametrize("text", ["<|im_end|>", "<|no_template_writes_this|>"])
@pytest.mark.parametrize(
    "files",
    [
        lambda text: {"config": {"added_tokens_decoder": {"504": {"content": text, "special": True}}}},
        lambda text: {"config": {"additional_special_tokens": [text]}},
        lambda text: {"config": {"extra_special_tokens": {"end": text}}},
        lambda text: {"added_tokens": {text: 504}},
    ],
)
def test_a_token_that_another_file_adds_is_refused_where_a_template_writes_it(files, text, tmp_path, capsys):
    """transformers makes a new token of it, which tokenizer.json does not know."""
    folder = named_in(tmp_path, **files(text))
    if "im_end" in text:
        with pytest.raises(RefimplError, match=r"E6108 .*im_end"):
            Tokenizer(folder)
        return
    Tokenizer(folder)
    assert text in capsys.readouterr().err


def test_named_tokens_of_special_tokens_map_are_taken_or_agree(tmp_path):
    folder = named_in(tmp_path, config={"eos_token": None}, special_tokens_map={"eos_token": "<think>"})
    assert Tokenizer(folder).special["eos_token"] == 500
    named_in(tmp_path, special_tokens_map={"eos_token": {"content": "<think>"}})
    with pytest.raises(RefimplError, match=r"E6108 .*eos_token is another"):
        Tokenizer(folder)
