"""The table of fields: every honoured one changes what it governs, every refused one is one line, and none is
passed over in silence.
"""

import json
import shutil

import numpy as np
import pytest

from refimpl import fields
from refimpl.checkpoint import gguf, names, safetensors
from refimpl.checkpoint.folder import Checkpoint, gguf_config
from refimpl.config import DeepSeekConfig
from refimpl.devices.cpu import CpuBackend
from refimpl.errors import RefimplError
from refimpl.model import Model
from refimpl.reference import fp8
from refimpl.text import answers, gguf_vocabulary
from refimpl.text.template import ChatTemplate, Message
from refimpl.text.tokenizer import Tokenizer
from refimpl.tiny import FP8_DIR, GGUF_FILE

YARN = {
    "type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.5,
}
BASE = {
    "model_type": "deepseek_v3",
    "vocab_size": 40,
    "hidden_size": 128,
    "intermediate_size": 24,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_nextn_predict_layers": 0,
    "num_attention_heads": 2,
    "q_lora_rank": 8,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": YARN,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
IDS = [*range(3, 33)]


def logits(raw, activations="exact"):
    """Of a model with these fields and weights that depend on names and shapes alone; linears in FP8."""
    c = DeepSeekConfig.from_dict(raw)
    weights = {}
    for number, (name, shape) in enumerate(names.shapes(c).items()):
        rng = np.random.default_rng(number)
        x = rng.standard_normal(shape, dtype=np.float32) * np.float32(shape[-1] ** -0.5)
        x = 1 + x if "norm" in name else x
        weights[names.to_gguf(name)] = fp8.weight_quant(x) if "_proj" in name and x.ndim == 2 else x
    return Model(c, weights, CpuBackend("reference", activations)).logits(IDS)


def different(raw):
    """Whether the logits of the base model are others, or of another shape."""
    a, b = logits(BASE), logits(raw)
    return a.shape != b.shape or not np.array_equal(a, b)


def config(key):
    """Whether a field of the parsed config differs, which only a part of the program that is tested elsewhere
    reads.
    """
    return lambda raw: (
        getattr(DeepSeekConfig.from_dict(raw), key) != getattr(DeepSeekConfig.from_dict(BASE), key)
    )


NESTED = {"model_type": "some_vl", "text_config": BASE | {"rms_norm_eps": 0.1}}
UE8M0 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"}
SOFTMAX = BASE | {"scoring_func": "softmax", "topk_method": "greedy", "routed_scaling_factor": 1.0}
SOFTMAX["num_experts_per_tok"] = 3  # more than there are groups
BY_GROUPS = SOFTMAX | {"topk_method": "group_limited_greedy"}
SPARSE = BASE | {"model_type": "deepseek_v32", "index_topk": 4, "index_n_heads": 8, "index_head_dim": 16}
SHARED = SPARSE | {"model_type": "glm_moe_dsa", "num_hidden_layers": 4, "indexer_types": ["full"] * 4}


def differs_from(base):
    return lambda raw: not np.array_equal(logits(raw), logits(base))


def means_another_by_absence(raw):
    """Whether fields that are left out mean something else."""
    short = [{k: v for k, v in r.items() if k != "routed_scaling_factor"} for r in (raw, BASE)]
    return not np.array_equal(logits(short[0]), logits(short[1]))


# {field: (another value, or a whole config; what must then differ)}
CONFIG = {
    "model_type": ("glm4_moe_lite", means_another_by_absence),
    "scoring_func": (SOFTMAX, different),
    "topk_method": (BY_GROUPS, differs_from(SOFTMAX)),
    "mlp_layer_types": (["sparse", "sparse"], different),
    "index_topk": (SPARSE | {"index_topk": 6}, differs_from(SPARSE)),
    "index_n_heads": (SPARSE | {"index_n_heads": 9}, differs_from(SPARSE)),
    "index_head_dim": (SPARSE | {"index_head_dim": 32}, differs_from(SPARSE)),
    "indexer_rope_interleave": (SPARSE | {"indexer_rope_interleave": True}, differs_from(SPARSE)),
    "indexer_types": (SHARED | {"indexer_types": ["full", "shared", "full", "full"]}, differs_from(SHARED)),
    **{
        key: (SHARED | {"indexer_types": None} | value, differs_from(SHARED))
        for key, value in {
            "index_topk_pattern": {"index_topk_pattern": "FSSF"},
            "index_topk_freq": {"index_topk_freq": 2},
            "index_skip_topk_offset": {"index_topk_freq": 3, "index_skip_topk_offset": 1},
        }.items()
    },
    **dict.fromkeys(("hidden_size", "intermediate_size", "moe_intermediate_size"), (64, different)),
    "vocab_size": (48, different),
    "num_hidden_layers": (3, different),
    "num_nextn_predict_layers": (1, config("num_nextn_predict_layers")),
    "num_attention_heads": (3, different),
    "q_lora_rank": (None, different),
    "kv_lora_rank": (24, different),
    "qk_nope_head_dim": (12, different),
    "qk_rope_head_dim": (4, different),
    "v_head_dim": (12, different),
    "n_routed_experts": (12, different),
    "n_shared_experts": (None, different),
    "num_experts_per_tok": (3, different),
    "n_group": (2, different),
    "topk_group": (1, different),
    "norm_topk_prob": (False, different),
    "routed_scaling_factor": (1.5, different),
    "first_k_dense_replace": (0, different),
    "rms_norm_eps": (0.1, different),
    "rope_theta": (500.0, different),
    "rope_scaling": (None, different),
    "rope_parameters": (BASE | {"rope_scaling": None, "rope_parameters": YARN | {"factor": 40.0}}, different),
    "max_position_embeddings": (64, config("max_position_embeddings")),
    "bos_token_id": (5, config("bos_token_id")),
    "eos_token_id": ([1, 7], config("stop_ids")),
    "quantization_config": (UE8M0, config("scale_fmt")),
    "text_config": (NESTED, different),
}
ROPE = {
    "type": "default",
    "rope_type": ({"rope_type": "default"}),
    "rope_theta": ({**YARN, "rope_theta": 500.0}),
    "factor": 16.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 1,
    "beta_slow": 0.01,
    "mscale": 0.3,
    "mscale_all_dim": 1.0,
    "attention_factor": 1.3,
}


def keys(source, verdict):
    return {key for key, row in fields.TABLES[source].items() if row.verdict == verdict}


def test_kimi_k2_is_the_same_model():
    assert not different(BASE | {"model_type": "kimi_k2"})


def test_every_honoured_field_is_changed_here():
    assert CONFIG.keys() == keys("config.json", fields.HONOURED)
    assert ROPE.keys() == keys("rope_scaling", fields.HONOURED)
    assert keys("quantization_config", fields.HONOURED) == {"scale_fmt"}
    assert TEXT.keys() == keys("tokenizer_config.json", fields.HONOURED)
    assert GENERATION.keys() == keys("generation_config.json", fields.HONOURED)
    known = MODEL.keys() | {f"deepseek2.{key}" for key in INDEXER}
    assert {k for k in keys("GGUF", fields.HONOURED) if k.startswith("deepseek2.")} <= known


@pytest.mark.parametrize("key", CONFIG)
def test_an_honoured_field_of_config_changes_what_it_governs(key):
    value, governs = CONFIG[key]
    whole = isinstance(value, dict) and "model_type" in value
    assert governs(value if whole else BASE | {key: value})


@pytest.mark.parametrize("key", ROPE)
def test_an_honoured_field_of_rope_scaling_changes_the_logits(key):
    value = ROPE[key]
    raw = BASE | {"rope_scaling": value if isinstance(value, dict) else YARN | {key: value}}
    if key == "rope_theta":
        del raw["rope_theta"]
    assert different(raw)


def test_ue8m0_changes_the_logits_with_fp8_activations_alone():
    scheme = {k: v for k, v in UE8M0.items() if k != "scale_fmt"}
    plain, powers = BASE | {"quantization_config": scheme}, BASE | {"quantization_config": UE8M0}
    assert not np.array_equal(logits(plain, "fp8"), logits(powers, "fp8"))
    np.testing.assert_array_equal(logits(plain), logits(powers))


def judge(source, raw):
    """The check as those who read such a file call it."""
    if source == "generation_config.json":
        answers.sampling(raw, "x")
    elif source in ("tokenizer_config.json", "GGUF"):
        fields.judge(source, raw, "x")
    else:
        nested = {
            "rope_scaling": {"rope_scaling": YARN | raw},
            "config.json": raw,
            "compressed-tensors": {"quantization_config": compressed(raw)},
            "weights of compressed-tensors": {"quantization_config": compressed({}, raw)},
        }
        DeepSeekConfig.from_dict(BASE | nested.get(source, {"quantization_config": UE8M0 | raw}))


def compressed(scheme, weights=()):
    """A quantization_config as Kimi-K2-Thinking's, with other fields."""
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 32} | dict(weights)}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}} | scheme


REFUSED = [(source, key) for source in fields.TABLES for key in sorted(keys(source, fields.REFUSED))]


@pytest.mark.parametrize(("source", "key"), REFUSED)
def test_a_refused_field_is_one_line_and_its_neutral_values_are_let_through(source, key):
    row = fields.TABLES[source][key]
    with pytest.raises(RefimplError, match=r"E4002") as caught:
        judge(source, {key: 12345})
    line = caught.value.line()
    assert line.isprintable() and (key in line or key in ("quant_method", "fmt", "weight_block_size"))
    judge(source, {key: None} if key not in ("quant_method", "weight_block_size", "num_bits") else {})
    for value in row.neutral if isinstance(row.neutral, tuple) else ():
        judge(source, {key: value})


WITHOUT = {k: v for k, v in BASE.items() if k not in ("rope_scaling", "rope_theta")}


@pytest.mark.parametrize(
    "raw",
    [
        BASE | {"rope_scaling": YARN | {"rope_theta": 500.0}},
        WITHOUT | {"rope_scaling": YARN | {"rope_theta": 1e4}, "rope_parameters": {"rope_theta": 500.0}},
        BASE | {"rope_parameters": YARN | {"factor": 40.0}},
        BASE | {"rope_scaling": YARN | {"rope_type": "default"}},
        BASE | {"text_config": BASE | {"rms_norm_eps": 0.1}},
        {"model_type": "some_vl", "text_config": BASE, "rope_theta": 500.0},
        {"model_type": "some_vl", "text_config": BASE | {"quantization_config": UE8M0}}
        | {"quantization_config": UE8M0 | {"scale_fmt": None}},
    ],
)
def test_a_field_that_stands_at_two_places_is_refused_where_they_differ(raw):
    with pytest.raises(RefimplError, match=r"E4003.*more than once"):
        DeepSeekConfig.from_dict(raw)


def test_the_same_at_two_places_is_taken_wherever_null_stands_beside_it():
    wanted = DeepSeekConfig.from_dict(BASE)
    for raw in (
        BASE | {"rope_parameters": YARN | {"rope_theta": 10000.0}},
        WITHOUT | {"rope_parameters": YARN | {"rope_theta": 10000.0}, "rope_scaling": {}},
        BASE | {"rope_scaling": YARN | {"type": None, "rope_type": "yarn"}},
        {"model_type": "some_vl", "text_config": BASE, "rope_theta": 1e4, "vocab_size": None},
    ):
        assert DeepSeekConfig.from_dict(raw) == wanted


@pytest.mark.parametrize("key", ["type", "factor", "original_max_position_embeddings"])
def test_a_number_of_yarn_that_programs_guess_differently_is_not_guessed(key):
    scaling = {k: v for k, v in YARN.items() if k != key}
    with pytest.raises(RefimplError, match=f"E4003.*rope_scaling {key} is missing"):
        DeepSeekConfig.from_dict(BASE | {"rope_scaling": scaling})


def test_fields_around_a_nested_config_are_judged_too(capsys):
    outer = {"model_type": "some_vl", "text_config": BASE, "zebra": 1, "index_topk": 5}
    DeepSeekConfig.from_dict(outer, "here")
    err = capsys.readouterr().err
    assert "here: fields that are not known here and not looked at: zebra\n" in err
    assert "here: fields beside text_config are not the language model's: index_topk\n" in err
    with pytest.raises(RefimplError, match=r"E4002.*attention_bias"):
        DeepSeekConfig.from_dict(outer | {"attention_bias": True})


def test_true_is_not_one_and_one_is_not_true():
    with pytest.raises(RefimplError, match="E4002"):
        DeepSeekConfig.from_dict(BASE | {"attention_bias": 0})
    DeepSeekConfig.from_dict(BASE | {"moe_layer_freq": 1.0})


def test_what_nobody_knows_is_named_in_one_note(capsys, tmp_path):
    DeepSeekConfig.from_dict(BASE | {"zebra": 1, "aardvark": [2]}, tmp_path)
    DeepSeekConfig.from_dict(BASE | {"zebra": 1, "aardvark": [2]}, tmp_path)
    err = capsys.readouterr().err
    assert (
        err
        == f"refimpl: note: {tmp_path}: fields that are not known here and not looked at: aardvark, zebra\n"
    )


def test_all_keys_of_llama_cpps_converter_for_this_architecture_are_in_the_table():
    constants = pytest.importorskip("gguf.constants")

    def spelled(group):
        for value in vars(group).values():
            if isinstance(value, type):
                yield from spelled(value)
            elif isinstance(value, str) and "." in value and " " not in value:
                yield value.format(arch="deepseek2", id=0, name="x", dense="x")

    wanted = {k for g in ("General", "Split", "Tokenizer") for k in spelled(getattr(constants.Keys, g))}
    wanted -= {"tokenizer.rwkv.world", "gguf.constants"}
    assert not [k for k in wanted if "." in k and k[0].islower() and fields.row("GGUF", k) is None]


# --- GGUF ---------------------------------------------------------------------------------------------------

META = gguf.read(GGUF_FILE).metadata
# {key of the architecture: another value that the parsed config must show}
MODEL = {
    f"deepseek2.{key}": value
    for key, value in {
        "vocab_size": 600,
        "embedding_length": 512,
        "feed_forward_length": 640,
        "expert_feed_forward_length": 512,
        "block_count": 5,
        "nextn_predict_layers": 1,
        "attention.head_count": 5,
        "attention.q_lora_rank": 128,
        "attention.kv_lora_rank": 128,
        "attention.key_length_mla": 128,
        "attention.value_length_mla": 128,
        "attention.key_length": None,
        "attention.value_length": None,
        "rope.dimension_count": 16,
        "expert_count": 16,
        "expert_used_count": 1,
        "expert_shared_count": 2,
        "expert_group_count": 2,
        "expert_group_used_count": 1,
        "expert_weights_scale": 1.5,
        "expert_weights_norm": False,
        "expert_gating_func": 1,
        "leading_dense_block_count": 2,
        "attention.layer_norm_rms_epsilon": 0.5,
        "rope.freq_base": 500.0,
        "context_length": 99,
        "rope.scaling.type": "none",
        "rope.scaling.factor": 2.0,
        "rope.scaling.original_context_length": 99,
        "rope.scaling.yarn_beta_fast": 1.0,
        "rope.scaling.yarn_beta_slow": 0.5,
        "rope.scaling.yarn_log_multiplier": 0.05,
    }.items()
}


# {key of sparse attention: its value, another}
INDEXER = {
    "attention.indexer.top_k": (64, 32),
    "attention.indexer.head_count": (8, 16),
    "attention.indexer.key_length": (64, 128),
    "attention.indexer.types": ([True] * 4, [True, False, True, True]),
}


@pytest.mark.parametrize("key", INDEXER)
def test_an_honoured_key_of_the_indexer_changes_the_config(key):
    def config(values):
        own = {k.replace("deepseek2.", "glm-dsa."): v for k, v in META.items()}
        own |= {f"glm-dsa.{k}": v for k, v in values.items()} | {"general.architecture": "glm-dsa"}
        return DeepSeekConfig.from_dict(gguf_config(gguf.File(GGUF_FILE, 3, own, {})))

    plain = {k: v for k, (v, _) in INDEXER.items()}
    assert config(plain | {key: INDEXER[key][1]}) != config(plain)


@pytest.mark.parametrize("key", [*MODEL, "refimpl.rope.mscale", "refimpl.rope.attention_factor"])
def test_an_honoured_key_of_a_gguf_changes_the_config(key):
    value = MODEL.get(key, 0.3)
    twice = {
        "deepseek2.attention.key_length",
        "deepseek2.attention.value_length",
    }  # which must fit the others
    file = gguf.File(GGUF_FILE, 3, {k: v for k, v in META.items() if k not in twice}, {})
    if value is None:  # read where the newer key of the other form is not there
        file = file._replace(metadata={k: v for k, v in META.items() if k != f"{key}_mla"} | {key: 128})
    changed = file._replace(
        metadata=file.metadata | {key: file.metadata.get(key) if value is None else value}
    )
    if key == "deepseek2.expert_gating_func":  # softmax is scaled or normalized
        changed = changed._replace(metadata=changed.metadata | {"deepseek2.expert_weights_norm": False})
    ours = DeepSeekConfig.from_dict(gguf_config(gguf.File(GGUF_FILE, 3, META, {})))
    assert DeepSeekConfig.from_dict(gguf_config(changed)) != ours


@pytest.mark.parametrize(
    ("key", "field"), [("attention.indexer.top_k", "index_topk"), ("rope.scaling.type", "rope")]
)
def test_a_gguf_and_a_config_are_refused_alike(key, field):
    file = gguf.File(GGUF_FILE, 3, META | {f"deepseek2.{key}": "linear" if "type" in key else 2048}, {})
    with pytest.raises(RefimplError, match="E4002") as ours:
        DeepSeekConfig.from_dict(gguf_config(file))
    other = {"rope_scaling": {"type": "linear", "factor": 2.0}} if field == "rope" else {field: 2048}
    with pytest.raises(RefimplError, match="E4002") as theirs:
        DeepSeekConfig.from_dict(BASE | other)
    assert ours.value.expected == theirs.value.expected


def test_groups_that_a_gguf_does_not_name_are_a_guess_and_told(capsys, tmp_path):
    meta = {k: v for k, v in META.items() if "expert_group" not in k}
    found = gguf_config(gguf.File(tmp_path / "x.gguf", 3, meta, {}))
    assert (found["n_group"], found["topk_group"]) == (1, 1)
    assert "does not say how its 8 experts are grouped; taken: 1 groups" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["key_length", "value_length"])
def test_lengths_that_a_gguf_says_twice_must_fit(key):
    for value in (META[f"deepseek2.attention.{key}"], META[f"deepseek2.attention.{key}_mla"]):
        gguf_config(gguf.File(GGUF_FILE, 3, META | {f"deepseek2.attention.{key}": value}, {}))
    with pytest.raises(RefimplError, match=f"E1011.*{key}"):
        gguf_config(gguf.File(GGUF_FILE, 3, META | {f"deepseek2.attention.{key}": 7}, {}))


@pytest.mark.parametrize("key", ["index_n_heads", "index_head_dim", "indexer_types", "index_topk_freq"])
def test_the_kin_of_index_topk_are_not_dropped_under_an_edited_model_type(key):
    raw = {k: v for k, v in SPARSE.items() if not k.startswith("index_")} | {"model_type": "deepseek_v3"}
    with pytest.raises(RefimplError, match=f"E4002.*{key}"):
        DeepSeekConfig.from_dict(raw | {key: ["full", "full"] if key == "indexer_types" else 8})


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("self_attn.indexer.wk.weight", {}),
        ("mlp.shared_experts.up_proj.weight", {"n_shared_experts": None}),
        ("mlp.gate.weight", {"first_k_dense_replace": 2}),
    ],
)
def test_a_tensor_that_the_config_does_not_speak_of_is_not_dropped(name, changed, tmp_path):
    """A config that was edited describes another model, which would be computed without a word."""
    raw = BASE | changed
    arrays = {
        n: ("F32", np.zeros(s, np.float32)) for n, s in names.shapes(DeepSeekConfig.from_dict(raw)).items()
    }
    arrays = {
        n.replace("experts.", "experts.0.") if len(x.shape) == 3 else n: (k, x)
        for n, (k, x) in arrays.items()
    }
    safetensors.save(tmp_path / "model.safetensors", arrays)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    Checkpoint.open(tmp_path)
    safetensors.save(
        tmp_path / "model.safetensors",
        arrays | {f"model.layers.1.{name}": ("F32", np.zeros((2, 2), np.float32))},
    )
    with pytest.raises(RefimplError, match=r"E4010.*config"):
        Checkpoint.open(tmp_path)


def test_experts_of_glm_5_are_in_one_group_though_deepseek_v3_has_as_many():
    for architecture, groups in (("deepseek2", (8, 4)), ("glm-dsa", (1, 1))):
        meta = {k.replace("deepseek2.", f"{architecture}."): v for k, v in META.items() if "_group" not in k}
        meta |= {"general.architecture": architecture, f"{architecture}.expert_count": 256}
        found = gguf_config(gguf.File(GGUF_FILE, 3, meta, {}))
        assert (found["n_group"], found["topk_group"]) == groups


def test_a_config_that_contradicts_its_gguf_is_refused(tmp_path):
    shutil.copy(GGUF_FILE, tmp_path / "x.gguf")
    raw = json.loads((FP8_DIR / "config.json").read_text())
    for change, code in (
        ({"routed_scaling_factor": 1.0}, "E4008.*routed_scaling_factor"),
        ({"rope_scaling": None}, "E4008"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(raw | change))
        with pytest.raises(RefimplError, match=code):
            Checkpoint.open(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(raw | {"quantization_config": {"quant_method": "awq"}}))
    assert Checkpoint.open(tmp_path).kind == "gguf"
    for key, value in {"factor": 9.0, "beta_fast": 3, "mscale_all_dim": 0.1, "beta_slow": 7}.items():
        scaling = raw["rope_scaling"] | {key: value}
        (tmp_path / "config.json").write_text(json.dumps(raw | {"rope_scaling": scaling}))
        with pytest.raises(RefimplError, match=f"E4008.*{key}"):
            Checkpoint.open(tmp_path)


# --- what governs text --------------------------------------------------------------------------------------

GENERATION = {
    "do_sample": (False, answers.sampling),
    "temperature": (0.1, answers.sampling),
    "top_k": (3, answers.sampling),
    "top_p": (0.5, answers.sampling),
    "min_p": (0.5, answers.sampling),
    "eos_token_id": ([1, 2], lambda g, where: answers.stop_ids(g, {}, None, where)),
    "max_new_tokens": (7, answers.max_new_tokens),
}


@pytest.mark.parametrize("key", GENERATION)
def test_an_honoured_field_of_generation_config_changes_what_it_governs(key):
    value, governs = GENERATION[key]
    base = {"do_sample": True, "temperature": 0.6, "eos_token_id": 1}
    assert governs(base | {key: value}, "x") != governs(base, "x")
    back = answers.gguf_generation(answers.generation_metadata(base | {key: value}, "x"), "x")
    if key != "eos_token_id":  # quantize writes those with the named tokens
        assert governs(back, "x") == governs(base | {key: value}, "x")


TEXT = {
    "bos_token": "<think>",
    "eos_token": "<think>",
    "pad_token": "<think>",
    "unk_token": "<think>",
    "add_bos_token": False,
    "chat_template": "{{ messages[0].content }}!",
    "added_tokens_decoder": None,  # tests/test_tiktoken.py, and these three tests/test_tokenizer.py
    "additional_special_tokens": None,
    "extra_special_tokens": None,
}


@pytest.mark.parametrize("key", [k for k, v in TEXT.items() if v is not None])
def test_an_honoured_field_of_tokenizer_config_changes_what_it_governs(key, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(FP8_DIR / name, tmp_path)

    def facts():
        t = Tokenizer(tmp_path)
        prompt = t.encode_pieces(ChatTemplate.open(t).pieces([Message("user", "hi")]))
        return t.special, t.stop_ids, t.bos, prompt

    path = tmp_path / "tokenizer_config.json"
    before = facts()
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: TEXT[key]}))
    assert facts() != before


@pytest.mark.parametrize(
    ("generation", "model", "token", "expected"),
    [
        ({"eos_token_id": [3, 4]}, {"eos_token_id": 5}, 6, {3, 4}),
        ({"eos_token_id": None}, {"eos_token_id": [5, 7]}, 6, {5, 7}),
        ({}, {"text_config": {"eos_token_id": 5}}, 6, {5}),
        ({}, {"eos_token_id": None}, 6, {6}),
        ({"eos_token_id": []}, {}, None, set()),
    ],
)
def test_stop_ids_come_from_the_first_that_says(generation, model, token, expected):
    assert answers.stop_ids(generation, model, token, "x") == expected


def test_stop_ids_of_a_gguf_are_all_it_names():
    meta = META | {"tokenizer.ggml.eot_token_id": 5, "tokenizer.ggml.eom_token_id": 6}
    assert answers.gguf_generation(meta, "x")["eos_token_id"] == [1, 5, 6]
    assert gguf_vocabulary.config(META, "x")["add_bos_token"] is True


# --- what a GGUF says of text, of itself and of its parts ---------------------------------------------------

KEYS = {"tokenizer.huggingface.json": None, "tokenizer.ggml.pre": "deepseek-v3"}  # llama.cpp's alone
# {key: (the metadata without it, another value)}
OF_TEXT = {
    "general.sampling.temp": ({}, 0.3),
    "general.sampling.top_k": ({"general.sampling.temp": 0.5}, 3),
    "general.sampling.top_p": ({"general.sampling.temp": 0.5}, 0.5),
    "general.sampling.min_p": ({"general.sampling.temp": 0.5}, 0.25),
    "tokenizer.ggml.model": (KEYS, "llama"),
    "tokenizer.ggml.pre": (KEYS, "kimi-k2"),
    "tokenizer.ggml.tokens": (
        KEYS,
        lambda tokens: [*tokens[:19], tokens[20], tokens[19], *tokens[21:]],
    ),
    "tokenizer.ggml.token_type": (KEYS, lambda types: [*types[:-1], 3]),
    "tokenizer.ggml.merges": (KEYS, lambda merges: merges[:-20]),
    "tokenizer.huggingface.json": ({}, lambda text: text.replace('"lstrip":false', '"lstrip":true')),
    "tokenizer.ggml.bos_token_id": ({}, 5),
    "tokenizer.ggml.padding_token_id": ({}, 5),
    "tokenizer.ggml.unknown_token_id": ({}, 5),
    "tokenizer.ggml.eos_token_id": ({}, 5),
    "tokenizer.ggml.eot_token_id": ({}, 5),
    "tokenizer.ggml.eom_token_id": ({}, 5),
    "refimpl.stop_token_ids": ({}, [5, 6]),
    "refimpl.max_new_tokens": ({}, 9),
    "tokenizer.ggml.add_bos_token": ({"tokenizer.chat_template": "{{ messages[0].content }}"}, False),
    "tokenizer.chat_template": ({}, "{{ messages[0].content }}!"),
    "tokenizer.chat_template.*": ({}, "x"),
}
# tests/test_gguf.py and tests/test_hostile_gguf.py change these
OF_FILES = {"general.architecture", "general.alignment", "split.no", "split.count", "split.tensors.count"}


def test_every_honoured_key_of_a_gguf_is_changed_here():
    known = MODEL.keys() | {f"deepseek2.{key}" for key in INDEXER} | OF_TEXT.keys() | OF_FILES
    assert keys("GGUF", fields.HONOURED) == known | {"refimpl.rope.mscale", "refimpl.rope.attention_factor"}


def text_of(metadata, place):
    """All that a GGUF with these metadata says of text; the line of its refusal."""
    gguf.write(place / "m.gguf", {k: v for k, v in metadata.items() if v is not None}, [], force=True)
    try:
        t = Tokenizer(place / "m.gguf")
    except RefimplError as error:
        return error.code
    prompt = t.encode_pieces(ChatTemplate.open(t).pieces([Message("user", "Hello, 1234 zz Haus")]))
    sampling = answers.sampling(t.generation, place), answers.max_new_tokens(t.generation, place)
    return prompt, t.special, t.stop_ids, t.control, t.vocabulary, t.raw, t.templates, sampling


@pytest.mark.parametrize("key", OF_TEXT)
def test_an_honoured_key_of_a_gguf_changes_what_it_says_of_text(key, tmp_path):
    base, value = OF_TEXT[key]
    key, meta = key.replace("*", "rag"), META | base
    changed = meta | {key: value(meta[key]) if callable(value) else value}
    before = text_of(meta, tmp_path)
    assert isinstance(before, tuple) and before != text_of(changed, tmp_path)
