"""What a model does between its operations, under laws: our functions obey them, faulty ones do not."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from refimpl import generate
from refimpl.cli import run
from refimpl.conformance import main, model_rules
from refimpl.reference import attention
from refimpl.reference.attention import yarn_mscale


def without_yarn(c, positions):
    """Plain RoPE, whatever the config says."""
    return attention.rope_tables(replace(c, rope_scaling=None), positions)


def betas_swapped(c, positions):
    yarn = c.rope_scaling
    if yarn:
        c = replace(c, rope_scaling=replace(yarn, beta_fast=yarn.beta_slow, beta_slow=yarn.beta_fast))
    return attention.rope_tables(c, positions)


def tables_in_half(c, positions):
    return tuple(t.astype(np.float16).astype(np.float32) for t in attention.rope_tables(c, positions))


def mscale_for_all_dim(c):
    """NVIDIA/Megatron-LM#1429."""
    yarn, scale = c.rope_scaling, c.qk_head_dim**-0.5
    return scale * yarn_mscale(yarn.factor, yarn.mscale) ** 2 if yarn else scale


def temperature_once(c):
    yarn, scale = c.rope_scaling, c.qk_head_dim**-0.5
    return scale * yarn_mscale(yarn.factor, yarn.mscale_all_dim) if yarn else scale


def width_without_positions(c):
    return attention.softmax_scale(c) * (c.qk_head_dim / c.qk_nope_head_dim) ** 0.5


def crossing_token_dropped(logits, s):
    """top_p without the token that reaches it."""
    p = generate.probabilities(logits, s)
    if s.top_p < 1 and (p > 0).sum() > 1:
        p[p == p[p > 0].min()] = 0
    return p / p.sum()


def min_p_of_one(logits, s):
    p = generate.probabilities(logits, replace(s, min_p=0.0))
    p[(p < s.min_p) & (p < p.max())] = 0
    return p / p.sum()


def temperature_forgotten(logits, s):
    return generate.probabilities(logits, replace(s, temperature=1.0))


def always_the_likeliest(logits, s, rng):
    return int(logits.argmax())


def last_of_equals(logits, s, rng):
    if s.temperature:
        return generate.draw(logits, s, rng)
    return len(logits) - 1 - int(logits[::-1].argmax())


class KeepsOneMore(generate.Session):
    """The cache is cut one token too late."""

    def _keep(self, length):
        self.cache.truncate(length + 1)
        del self.ids[length:]


class NeverStops(generate.Session):
    """Stop ids are not looked at."""

    def generate(self, prompt, s, max_new_tokens=None, stop_ids=frozenset()):
        return super().generate(prompt, s, max_new_tokens, frozenset())


FAULTS = [
    ("tables", {"rope_tables": without_yarn}),
    ("tables", {"rope_tables": betas_swapped}),
    ("tables", {"rope_tables": tables_in_half}),
    ("scale", {"softmax_scale": mscale_for_all_dim}),
    ("scale", {"softmax_scale": temperature_once}),
    ("scale", {"softmax_scale": width_without_positions}),
    ("sampling", {"probabilities": crossing_token_dropped}),
    ("sampling", {"probabilities": min_p_of_one}),
    ("sampling", {"probabilities": temperature_forgotten}),
    ("sampling", {"draw": always_the_likeliest}),
    ("sampling", {"draw": last_of_equals}),
    ("positions", {"session": KeepsOneMore}),
    ("stops", {"session": NeverStops}),
    ("stops", {"stop_ids": lambda c: frozenset(list(c.stop_ids)[:1])}),
]


@pytest.mark.parametrize(("law", "given"), FAULTS, ids=lambda v: v if isinstance(v, str) else " ".join(v))
def test_a_faulty_function_breaks_its_law_and_no_other(law, given):
    verdicts = model_rules.judge(SimpleNamespace(**given))
    assert [v.law for v in verdicts if not v.passed] == [law]
    broken = next(v for v in verdicts if not v.passed)
    assert model_rules.again(SimpleNamespace(**given), law, broken.case) is not None


@pytest.mark.parametrize("seed", range(4))
def test_this_project_s_functions_obey(seed):
    assert all(v.passed for v in model_rules.judge(number=seed))


def test_the_command_judges_a_stranger_s_functions(capsys):
    assert run(main, ["--op", "model", "--kernel", "tests.test_model_rules:THEIRS", "--json"]) == 1
    (broken,) = [v for v in json.loads(capsys.readouterr().out) if not v["passed"]]
    assert (
        broken["law"] == "scale"
        and "--kernel tests.test_model_rules:THEIRS --law scale" in broken["reproduce"]
    )
    assert run(main, ["--law", "stops", "--level", "smoke"]) == 0


THEIRS = SimpleNamespace(softmax_scale=temperature_once)
