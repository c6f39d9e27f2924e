"""Chat templates: the stock rendering, the sandbox, the limits, and what is done with what messages say."""

import json
import shutil
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from refimpl.errors import RefimplError
from refimpl.text import template
from refimpl.text.template import ChatTemplate, Message
from refimpl.text.tokenizer import Tokenizer
from refimpl.tiny import FP8_DIR
from refimpl.training.tokens import CHAT_TEMPLATE, Encoder

TOKENIZER = Tokenizer(FP8_DIR)
OURS = ChatTemplate.open(TOKENIZER)
STOCK = PreTrainedTokenizerFast.from_pretrained(FP8_DIR)
CONVERSATION = [
    Message("system", "Be brief."),
    Message("user", "What is 1 + 2?"),
    Message("assistant", "3", "1 + 2\n= 3"),
    Message("user", "And 2 + 2?"),
]
# DeepSeek-R1's own conventions, in words of ours: what is known of it is that history loses its reasoning and
# the prompt opens the next one.
LOOPS = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% break %}{% endif %}{% endfor %}"


def plain(messages):
    return [
        {"role": m.role, "content": (m.reasoning + "</think>" if m.reasoning else "") + m.content}
        for m in messages
    ]


def test_the_embedded_template_is_known_and_renders_without_a_child(monkeypatch):
    assert OURS.source == CHAT_TEMPLATE
    assert OURS.sha256 in template.KNOWN, (
        f"the embedded model's template has changed: put {OURS.sha256} into template.KNOWN"
    )
    monkeypatch.setattr(template, "render_in_child", None)
    OURS.pieces(CONVERSATION)


def test_ids_are_those_of_transformers():
    for n in range(1, 5):
        if CONVERSATION[n - 1].role == "user":
            ours = TOKENIZER.encode_pieces(OURS.pieces(CONVERSATION[:n]))
            assert ours == STOCK.apply_chat_template(
                plain(CONVERSATION[:n]), add_generation_prompt=True, return_dict=False
            )


def test_the_trainer_and_the_chat_make_the_same_prompt():
    from refimpl.training.problems import problems

    first, second = problems("sum", "train", 2, seed=0)
    ids = Encoder.open(FP8_DIR).prompt("Be brief.", [first], second.question)
    chat = [
        Message("system", "Be brief."),
        Message("user", first.question),
        Message("assistant", first.answer, first.reasoning),
        Message("user", second.question),
    ]
    assert TOKENIZER.encode_pieces(OURS.pieces(chat)) == ids


@given(st.text(max_size=30), st.text(max_size=30))
def test_a_message_is_shown_as_it_is_whatever_it_says(question, system):
    pieces = OURS.pieces([Message("system", system), Message("user", question)])
    assert (
        "".join(p.text for p in pieces)
        == f"<｜begin▁of▁sentence｜>{system}<｜User｜>{question}<｜Assistant｜><think>\n"
    )
    assert all(p.trusted or p.text in (question.strip(), system.strip()) for p in pieces)


def test_unknown_roles_are_the_templates_refusal():
    with pytest.raises(RefimplError, match=r"E6204 .*roles system, user and assistant, not tool"):
        OURS.pieces([Message("tool", "x")])


def other(source: str) -> ChatTemplate:
    return ChatTemplate(source, "a stranger's folder")


def test_a_stranger_s_template_runs_in_a_child_with_the_usual_helpers():
    source = (
        "{%- set a = {'k': 'é'} %}{{ a | tojson }}\n{% generation %}{{ messages[0].content }}{% "
        "endgeneration %}"
    )
    source += " {{ strftime_now('%Y') | int > 2000 }}"
    assert other(source).render([{"role": "user", "content": "hi"}]) == '{"k": "é"}\nhi True'
    assert other(LOOPS).render([{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]) == "u"


@pytest.mark.parametrize(
    ("code", "source"),
    [
        ("E6203", "{% for %}"),
        ("E6203", "{{ nothing.at.all }}"),
        ("E6203", "{{ ''.__class__.__mro__[1].__subclasses__() }}"),
        ("E6203", "{{ cycler.__init__.__globals__.os.popen('id').read() }}"),
        ("E6203", "{{ messages.append(1) }}"),
        ("E6203", "{% include '/etc/passwd' %}"),
        ("E6204", "{{ raise_exception('no') }}"),
        (
            "E6205",
            "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% "
            "endfor %}{% endfor %}",
        ),
        ("E6205", "{{ 9**(9**9) }}"),
        ("E6205", "{{ 'A' * 10**9 }}"),
        ("E6205", "{{ '%2000000000d' | format(1) }}"),
        ("E6205", "{{ 'A' * (2 * 1024 * 1024) }}"),
        ("E6206", "no messages here"),
        ("E6206", "{{ messages[0].content }}{{ messages[0].content }}"),
        ("E6206", "{{ messages[0].content[:1] }}"),
    ],
)
def test_templates_that_fail_attack_or_explode_give_one_line(code, source):
    start = time.monotonic()
    with pytest.raises(RefimplError, match=code) as caught:
        other(source).pieces([Message("user", "hello there")])
    assert caught.value.line().isprintable() and time.monotonic() - start < 20


def test_a_jinja_file_wins_over_the_config_and_both_may_be_missing(tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(FP8_DIR / name, tmp_path)
    (tmp_path / "chat_template.jinja").write_text(LOOPS)
    assert ChatTemplate.open(Tokenizer(tmp_path)).source == LOOPS
    (tmp_path / "chat_template.jinja").unlink()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    for value, code in ((None, "E6201"), (3, "E6202"), ([{"name": "tool_use", "template": "x"}], "E6201")):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": value}))
        with pytest.raises(RefimplError, match=code):
            ChatTemplate.open(Tokenizer(tmp_path))
    named = [{"name": "default", "template": LOOPS}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": named}))
    assert ChatTemplate.open(Tokenizer(tmp_path)).source == LOOPS
