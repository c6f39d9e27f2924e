"""The table of names on the full inventories of DeepSeek-V3."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refimpl.checkpoint import names
from refimpl.config import DeepSeekConfig
from refimpl.errors import InputFormatError

V3 = DeepSeekConfig(num_nextn_predict_layers=1)


def test_the_inventories_have_the_published_sizes():
    hf = names.hf_inventory(V3)
    assert len(hf) == 91_991
    assert len(names.gguf_inventory(V3)) == 1_025
    nbytes = sum(
        (1 if kind == "F8_E4M3" else 4 if kind == "F32" else 2)
        * (shape[0] * (shape[1] if len(shape) > 1 else 1))
        for kind, shape in hf.values()
    )
    assert round(nbytes / 1e9, 1) == 688.6  # what the hub shows


def test_every_name_goes_over_and_back():
    for name in names.hf_inventory(V3):
        translated = names.to_gguf(name)
        assert names.is_gguf(translated) and names.to_gguf(translated) == translated
        assert names.to_hf(translated) == names.split_expert(name)[0]
        assert names.layer_of(name) == names.layer_of(translated)
        assert names.is_routed_expert(name) == names.is_routed_expert(translated)
    for name in names.gguf_inventory(V3):
        assert names.to_gguf(names.to_hf(name)) == name


def test_experts_share_the_name_of_their_stack():
    assert names.to_gguf("model.layers.3.mlp.experts.255.up_proj.weight") == "blk.3.ffn_up_exps.weight"
    assert names.to_gguf("blk.3.ffn_up.255.weight") == "blk.3.ffn_up_exps.weight"
    assert names.split_expert("blk.3.ffn_up.255.weight") == ("blk.3.ffn_up_exps.weight", 255)
    assert names.to_hf("blk.3.ffn_up.255.weight") == "model.layers.3.mlp.experts.255.up_proj.weight"


def test_layer_61_of_a_longer_model_is_a_layer_like_any_other():
    longer = DeepSeekConfig(num_hidden_layers=64)
    assert names.to_gguf("model.layers.61.mlp.gate.weight") == "blk.61.ffn_gate_inp.weight"
    assert len(names.gguf_inventory(longer)) == 1_025 + 3 * 17


@pytest.mark.parametrize(
    "name",
    [
        "",
        "model.layers.x.mlp.gate.weight",
        "transformer.h.0.attn.weight",
        "blk.3.attn_qkv.weight",
        "model.layers.1.mlp.gate.weight.extra",
        "blk.99999.attn_q.weight",
    ],
)
def test_names_of_other_models_are_refused(name):
    for translate in (names.to_gguf, names.to_hf):
        with pytest.raises(InputFormatError, match="E3001"):
            translate(name)


@pytest.mark.parametrize(
    "name", ["language_model.lm_head.weight", "vision_tower.blocks.0.mlp.weight", "mm_projector.w.weight"]
)
def test_a_language_model_within_a_larger_one_is_told_from_other_models(name):
    with pytest.raises(InputFormatError, match=r"E3001.*a part of a larger one.*language_model"):
        names.to_gguf(name)


@given(st.text(max_size=40))
def test_any_text_is_a_name_or_refused(text):
    try:
        assert names.is_gguf(names.to_gguf(text))
    except InputFormatError as error:
        assert error.line().isprintable()
