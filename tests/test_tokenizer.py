"""The tokenizer: the stock encoder's ids, except that text of a user never becomes a control token."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Stock

from refimpl.errors import RefimplError
from refimpl.template import ChatTemplate, Message
from refimpl.tiny import FP8_DIR
from refimpl.tokenizer import Piece, Tokenizer

TOKENIZER = Tokenizer(FP8_DIR)
STOCK = Stock.from_file(str(FP8_DIR / "tokenizer.json"))
TEMPLATE = ChatTemplate.open(TOKENIZER)
SPELLINGS = sorted(TOKENIZER._spelled, key=TOKENIZER._spelled.get)
hostile = st.lists(
    st.one_of(st.sampled_from(SPELLINGS), st.text(max_size=8), st.sampled_from(["<think", "｜", "\ud800", "\0", "\n\n", " "])), max_size=6
).map("".join)


def test_special_tokens_are_deepseeks():
    assert TOKENIZER.special == {"bos_token": 0, "eos_token": 1, "pad_token": 2}
    assert TOKENIZER.stop_ids == {1}
    names = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>", "<think>", "</think>", "<｜User｜>", "<｜Assistant｜>"]
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
    text = "".join(t for t, _ in parts)
    assert TOKENIZER.encode_pieces([Piece(t, True) for t, _ in parts]) == STOCK.encode(text, add_special_tokens=False).ids


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
        ("E6104 .*LFS", lambda f: (f / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\n")),
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
    edit(folder / "tokenizer.json", truncation={"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0})
    tokenizer = Tokenizer(folder)
    assert tokenizer.stop_ids == {1, 2} and len(tokenizer.encode("1 2 3 4 5 6")) > 2
    assert np.array_equal(tokenizer.ids, TOKENIZER.ids)
