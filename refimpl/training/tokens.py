"""The embedded model's tokenizer and chat template, and how a conversation becomes token ids.

Byte-level BPE over the generator's own text. Digits never merge, so that column k of a number is one token;
the ids of a training example are by construction those of the chat: the prompt the template renders, then the
response.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from refimpl.training.problems import Problem, conversation

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT, THINK, END_THINK = "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"
CONTROL = (THINK, END_THINK, USER, ASSISTANT)  # behind the vocabulary, in DeepSeek's order
BASE_VOCABULARY = 500

# A digit; the x of 0x; a capital hexadecimal digit; a word; signs (each with the blank before it, and the one
# that parts it from a digit); blanks.
_SPLIT = r"\d|(?<=0)x(?=[0-9A-Fa-f])|[A-F](?![a-z])| ?\p{L}+(?: (?=\d))?| ?[^\s\d\p{L}]+(?: (?=\d))?|\n+|\s"

# Earlier reasoning is dropped, as DeepSeek-R1's template does; the generation prompt opens the next one.
CHAT_TEMPLATE = """\
{{ bos_token }}
{%- for message in messages %}
{%- if message['role'] == 'system' %}{{ message['content'] }}
{%- elif message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}
{%- elif message['role'] == 'assistant' %}{{ '<｜Assistant｜>' + message['content'].split('</think>')[-1] | trim + eos_token }}
{%- else %}{{ raise_exception('this model knows the roles system, user and assistant, not ' + message['role']) }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"""


def _texts(seed: int, n: int) -> Iterator[str]:
    rng = random.Random(f"tokenizer {seed}")
    for _ in range(n):
        for problem in conversation(rng)[1]:
            yield from (problem.question, problem.reasoning + "\n", "\n\n" + problem.answer)


def train_tokenizer(seed: int = 0, conversations: int = 20_000) -> Tokenizer:
    """Byte-level BPE of 500 tokens, and DeepSeek's four chat tokens behind them."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(_SPLIT), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [AddedToken(t, special=True, normalized=False) for t in (BOS, EOS, PAD)]
    trainer = trainers.BpeTrainer(
        vocab_size=BASE_VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_texts(seed, conversations), trainer)
    # Not `special` in DeepSeek's files either: a decoder that skips special tokens shows the thinking marks.
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in CONTROL])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """tokenizer.json, tokenizer_config.json (with the chat template) and generation_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "add_bos_token": True,
    }
    config |= {
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    generation = {"bos_token_id": 0, "eos_token_id": 1, "do_sample": True, "temperature": 0.6, "top_p": 0.95}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")


class Encoder:
    """Conversations to token ids, every text encoded by itself between control tokens, as the chat does
    it.
    """

    def __init__(self, tokenizer: Tokenizer):
        ids: dict[str, Any] = {token: tokenizer.token_to_id(token) for token in (BOS, EOS, *CONTROL)}
        self.bos, self.eos, self.user, self.assistant = ids[BOS], ids[EOS], ids[USER], ids[ASSISTANT]
        self.think, self.end_think = ids[THINK], ids[END_THINK]
        # Without added tokens: a text that spells one stays text.
        self._plain = Tokenizer.from_str(json.dumps({**json.loads(tokenizer.to_str()), "added_tokens": []}))
        self._full = tokenizer
        self._known: dict[str, list[int]] = {}

    @classmethod
    def open(cls, folder: Path) -> Encoder:
        """The encoder of a folder's tokenizer.json."""
        return cls(Tokenizer.from_file(str(folder / "tokenizer.json")))

    def text(self, text: str) -> list[int]:
        """Ids of a text on its own; texts repeat a lot, so the recent ones are kept."""
        if text not in self._known:
            if len(self._known) > 50_000:
                self._known.clear()
            self._known[text] = self._plain.encode(text, add_special_tokens=False).ids
        return self._known[text]

    def prompt(self, system: str, earlier: list[Problem], question: str) -> list[int]:
        """What the chat template renders up to and including `<think>\\n`; earlier turns without their
        reasoning.
        """
        ids = [self.bos, *self.text(system)]
        for turn in earlier:
            ids += [self.user, *self.text(turn.question), self.assistant, *self.text(turn.answer), self.eos]
        return [*ids, self.user, *self.text(question), self.assistant, self.think, *self.text("\n")]

    def response(self, problem: Problem) -> list[int]:
        """What the model is to say: the reasoning, `</think>`, the answer, end of sentence."""
        return [
            *self.text(problem.reasoning + "\n"),
            self.end_think,
            *self.text("\n\n" + problem.answer),
            self.eos,
        ]

    def example(self, system: str, turns: list[Problem]) -> tuple[list[int], int]:
        """Ids of a conversation and the position where the last response starts."""
        prompt = self.prompt(system, turns[:-1], turns[-1].question)
        return prompt + self.response(turns[-1]), len(prompt)

    def answer(self, response: list[int]) -> str:
        """The text after `</think>` in a generated response; empty when the thinking never ended."""
        if self.end_think not in response:
            return ""
        return self._full.decode(
            response[response.index(self.end_think) + 1 :], skip_special_tokens=True
        ).strip()
