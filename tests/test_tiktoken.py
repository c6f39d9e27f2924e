"""A tiktoken.model gives the ids of the package tiktoken, through the tokenizer.json that is made of it, and
through a GGUF."""

import base64
import itertools
import json
import random
import shutil

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from refimpl.errors import RefimplError
from refimpl.text import gguf_vocabulary, tiktoken_vocabulary
from refimpl.text.template import ChatTemplate, Message
from refimpl.text.tokenizer import Tokenizer
from refimpl.tiny import FP8_DIR

TEXT = "the cat sat on the mat, don't it? HELLO WORLD Hello World 2024 東京 ça va\n\n  x = y+1 " * 3
TEMPLATE = (
    "{% for m in messages %}<|im_{{ m.role }}|>{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_assistant|>{% endif %}"
)


def train(text: str, tokens: int) -> dict[bytes, int]:
    """Ranks as byte-pair training makes them: the commonest pair is joined, again and again."""
    ranks = {bytes([b]): b for b in range(256)}
    words = [[bytes([b]) for b in w.encode()] for w in text.replace(" ", "\0 ").split("\0")]
    while len(ranks) < tokens:
        pairs: dict[tuple[bytes, bytes], int] = {}
        for word in words:
            for pair in itertools.pairwise(word):
                pairs[pair] = pairs.get(pair, 0) + 1
        if not pairs:
            break
        a, b = max(sorted(pairs), key=pairs.__getitem__)
        ranks[a + b] = len(ranks)
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == (a, b):
                    word[i : i + 2] = [a + b]
                i += 1
    return ranks


RANKS = train(TEXT, 400)


@pytest.fixture
def folder(tmp_path):
    """A model's folder with a tiktoken.model and its config."""
    lines = [base64.b64encode(token).decode() + f" {rank}" for token, rank in RANKS.items()]
    (tmp_path / "tiktoken.model").write_text("\n".join(lines) + "\n")
    first = len(RANKS)
    named = {first: "[BOS]", first + 1: "[EOS]", first + 4: "<|im_end|>", first + 5: "<|im_user|>"}
    named[first + 6] = "<|im_assistant|>"
    config = {
        "tokenizer_class": "TikTokenTokenizer",
        "bos_token": "[BOS]",
        "eos_token": "[EOS]",
        "added_tokens_decoder": {str(i): {"content": t, "special": True} for i, t in named.items()},
        "chat_template": TEMPLATE,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": first + 4}))
    return tmp_path


def test_without_the_package_the_hint_names_it(folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tiktoken.load", None)
    with pytest.raises(RefimplError, match=r"E6113 .*tiktoken.model.*package tiktoken.*refimpl\[tiktoken\]"):
        Tokenizer(folder)


def test_a_prompt_has_the_named_control_tokens(folder):
    pytest.importorskip("tiktoken")
    t, first = Tokenizer(folder), len(RANKS)
    prompt = t.encode_pieces(ChatTemplate.open(t).pieces([Message("user", "the <|im_end|>")]))
    assert [i for i in prompt if i >= first] == [first + 5, first + 4, first + 6]
    assert t.stop_ids == {first + 4} and t.special == {"bos_token": first, "eos_token": first + 1}
    assert t.decode(prompt) == "<|im_user|>the <|im_end|><|im_end|><|im_assistant|>"
    assert t.vocabulary["<|reserved_token_402|>"] == 402


@given(st.text(max_size=40))
@example("don't DON'T HelloWorld helloWORLD 東京abc 12345 \n\n  a\t")
def test_ids_are_tiktokens(text):
    tiktoken = pytest.importorskip("tiktoken")
    pattern = "|".join(gguf_vocabulary.SPLITS["kimi-k2"])
    theirs = tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=RANKS, special_tokens={})
    assert _ours().encode(text, add_special_tokens=False).ids == theirs.encode_ordinary(text)


def _ours():
    from tokenizers import Tokenizer as Library

    return Library.from_str(json.dumps(_raw()))


def _raw():
    vocabulary = {tiktoken_vocabulary.spell(t): i for t, i in RANKS.items()}
    merges = tiktoken_vocabulary._merges(RANKS)
    model = {"type": "BPE", "vocab": vocabulary, "merges": merges, "ignore_merges": True}
    return {"added_tokens": [], "pre_tokenizer": gguf_vocabulary.pre_tokenizer("kimi-k2"), "model": model}


@pytest.mark.parametrize("damage", ["IQ== 0\n", "IQ==\n", "no base64 \xff 1\n", ""])
def test_damaged_files_are_one_line(damage, folder):
    pytest.importorskip("tiktoken")
    (folder / "tiktoken.model").write_text(damage)
    with pytest.raises(RefimplError, match=r"E6113 .*tiktoken\.model"):
        Tokenizer(folder)


def test_the_splits_are_recognized_and_others_are_not():
    assert gguf_vocabulary.name_of(_raw()) == "kimi-k2"
    raw = _raw()
    raw["model"]["ignore_merges"] = False
    assert gguf_vocabulary.name_of(raw) is None
    assert gguf_vocabulary.name_of(json.loads((FP8_DIR / "tokenizer.json").read_text())) is None


def test_kimis_splits_in_a_gguf_without_tokenizer_json(folder):
    pytest.importorskip("tiktoken")
    whole = Tokenizer(folder)
    meta = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "kimi-k2",
        "tokenizer.ggml.tokens": [whole._spelling[i] for i in range(len(whole.vocabulary))],
        "tokenizer.ggml.token_type": [1 if i < len(RANKS) else 3 for i in range(len(whole.vocabulary))],
        "tokenizer.ggml.merges": [" ".join(m) for m in whole.raw["model"]["merges"]],
    }
    rebuilt = folder / "rebuilt"
    rebuilt.mkdir()
    shutil.copy(folder / "tokenizer_config.json", rebuilt)
    (rebuilt / "tokenizer.json").write_text(json.dumps(gguf_vocabulary.tokenizer(meta, "x")))
    rng = random.Random(1)
    texts = ["".join(rng.choices(TEXT, k=20)) for _ in range(20)]
    assert [Tokenizer(rebuilt).encode(t) for t in texts] == [whole.encode(t) for t in texts]
