"""Prompts of templates of every shape that models of this architecture have: transformers' own
`apply_chat_template` and tokenizer are the oracle. The templates are the round-trip campaign's."""

import json

import pytest

from refimpl.text.gguf_vocabulary import pre_tokenizer
from refimpl.text.template import ChatTemplate, Message
from refimpl.text.tokenizer import Tokenizer
from refimpl.tiny import FP8_DIR
from tests.campaigns.roundtrip import TEMPLATES

WORDS = [
    ("Herzinfarkt", False),
    ("<|im_middle|>", True),
    ("<|role_sep|>", False),
    ("<|message_sep|>", False),
    ("<|im_user|>", True),
    ("<|im_assistant|>", True),
    ("<|im_end|>", True),
]
TURNS = [
    Message("user", "ein Herzinfarkt, don't  panic\n"),
    Message("assistant", "No: 42.", "they said so"),
    Message("user", "and 東京 in 2024?"),
]


@pytest.fixture(params=TEMPLATES)
def folder(request, tmp_path):
    raw = json.loads((FP8_DIR / "tokenizer.json").read_text())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    for content, special in WORDS:
        number = len(raw["model"]["vocab"]) + len(raw["added_tokens"]) - 3
        raw["added_tokens"].append({"id": number, "content": content, "special": special, **flags})
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    config = json.loads((FP8_DIR / "tokenizer_config.json").read_text())
    config |= {"chat_template": TEMPLATES[request.param], "add_bos_token": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize("flags", [("lstrip",), ("rstrip",), ("normalized",), ("lstrip", "rstrip")])
def test_added_tokens_take_blanks_to_themselves_as_they_say(folder, flags):
    transformers = pytest.importorskip("transformers")
    path = folder / "tokenizer.json"
    raw = json.loads(path.read_text()) | {"normalizer": {"type": "NFC"}}
    raw["added_tokens"] = [a | dict.fromkeys(flags, True) for a in raw["added_tokens"]]
    path.write_text(json.dumps(raw))
    stock = transformers.PreTrainedTokenizerFast.from_pretrained(str(folder))
    ours = Tokenizer(folder)
    template = ChatTemplate.open(ours)
    for content in (" \n a \u2003", "Herzinfarkt  x", "\x1c e\u0301 Herzinfarkt\n", "\t"):
        turns = [Message("user", content), Message("assistant", "  4 \n"), Message("user", content)]
        messages = [{"role": m.role, "content": m.content} for m in turns]
        text = stock.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        expected = stock(text, add_special_tokens=False)["input_ids"]
        assert ours.encode_pieces(template.pieces(turns)) == expected


@pytest.mark.parametrize("variables", [{}, {"thinking": True}])
def test_prompts_are_those_of_transformers(folder, variables):
    transformers = pytest.importorskip("transformers")
    stock = transformers.PreTrainedTokenizerFast.from_pretrained(str(folder))
    messages = [{"role": m.role, "content": m.content} for m in TURNS]
    messages[1]["reasoning_content"] = TURNS[1].reasoning
    text = stock.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **variables)
    ours = Tokenizer(folder)
    template = ChatTemplate.open(ours)
    assert template.render(messages, **variables) == text
    expected = stock(text, add_special_tokens=False)["input_ids"]
    assert ours.encode_pieces(template.pieces(TURNS, **variables)) == expected


def test_one_bos_where_the_tokenizer_asks_for_it(folder):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"add_bos_token": True}))
    ours = Tokenizer(folder)
    prompt = ours.encode_pieces(ChatTemplate.open(ours).pieces(TURNS))
    assert prompt[0] == 0 and prompt.count(0) == 1


def test_words_of_a_fine_tuner_are_text_and_control_tokens_never(folder):
    ours = Tokenizer(folder)
    assert ours.vocabulary["Herzinfarkt"] in ours.encode("ein Herzinfarkt")
    for spelling in ("<|im_end|>", "<think>", "<｜User｜>", "<｜begin▁of▁sentence｜>"):
        assert ours.vocabulary[spelling] not in ours.encode(f"a {spelling} b")


@pytest.mark.parametrize(("ignored", "gap"), [(False, 0), (True, 0), (False, 3)])
def test_a_word_that_must_stand_alone_is_no_word_of_a_vocabulary_without_merges(ignored, gap, tmp_path):
    transformers = pytest.importorskip("transformers")
    raw = json.loads((FP8_DIR / "tokenizer.json").read_text())
    vocabulary = {token: i + gap * (i > 300) for token, i in raw["model"]["vocab"].items()}
    raw["model"] |= {"ignore_merges": ignored, "vocab": vocabulary}
    flags = {"special": False, "lstrip": False, "rstrip": False, "normalized": False}
    raw["pre_tokenizer"] = pre_tokenizer("kimi-k2")
    raw["added_tokens"] = [a for a in raw["added_tokens"] if a["content"] in vocabulary]
    raw["added_tokens"] += [
        {"id": 520, "content": "<|x|>", "single_word": False} | flags,
        {"id": 521, "content": "12", "single_word": True} | flags,
        {"id": 522, "content": "Haus", "single_word": False} | flags,
    ]
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    (tmp_path / "tokenizer_config.json").write_text((FP8_DIR / "tokenizer_config.json").read_text())
    stock = transformers.PreTrainedTokenizerFast.from_pretrained(str(tmp_path))
    ours = Tokenizer(tmp_path)
    for text in ("Haus12x", "Haus 12", "é12", "12", "12,Haus"):
        assert ours.encode(text) == stock(text, add_special_tokens=False)["input_ids"], text
