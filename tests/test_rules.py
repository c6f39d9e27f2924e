"""The rule language against KTransformers' semantics, the two packaged files, and files by strangers."""

import json
import random
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import refimpl
from refimpl.checkpoint import names
from refimpl.checkpoint.folder import Checkpoint
from refimpl.config import DeepSeekConfig
from refimpl.devices import cuda, memory, placement
from refimpl.errors import InputFormatError, RefimplError, UnsupportedError
from refimpl.model import Model
from refimpl.tiny import FP8_DIR

V3 = DeepSeekConfig()
MULTI = placement.FILES / "DeepSeek-V3-Chat-multi-gpu-fp8-linear-ggml-experts.yaml"
EXPERTS = """
- match: {name: '\\.mlp\\.experts$'}
  replace:
    class: ktransformers.operators.experts.KTransformersExperts
    kwargs: {generate_device: cpu, generate_op: KExpertsCPU}
  recursive: False
"""


def place(tmp_path, text, config=V3):
    path = tmp_path / "rules.yaml"
    path.write_text(text)
    return placement.load(path, config)


# --- what the files mean ------------------------------------------------------------------------------------


def test_the_packaged_file_is_the_default_placement():
    placed = placement.load(placement.HYBRID, V3)
    for name in [*placement.modules(V3), *(n.removesuffix(".weight") for n in names.shapes(V3))]:
        if name:
            assert placed(name) == placement.experts_on_cpu(name), name
    assert placed.notes == []


def test_its_eight_rules_match_what_they_say():
    """Counts for 61 layers of which 3 are dense: 61 rotary tables; (q_a, q_b, kv_a, o) x 61 + 3 x 61 linears
    of MLPs; 58 mixtures, routers and stacks of experts; 61 attentions; the model; the embedding table.
    """
    placed = placement.load(placement.HYBRID, V3)
    counts = [sum(p.rule == i for p in placed.places.values()) for i in range(8)]
    assert counts == [61, 4 * 61 + 3 * 61, 58, 58, 58, 61, 1, 1] and len(placed.rules) == 8
    unmatched = {n for n, p in placed.places.items() if p.rule is None}
    assert {"lm_head", "model.norm", "model.layers.7.self_attn.kv_b_proj", "model.layers.0.mlp"} <= unmatched
    assert placed.find("model.layers.5.mlp.experts.gate_proj") == placement.Place("cpu", "", 4)


def test_two_gpus_share_the_layers():
    placed = placement.load(MULTI, V3)
    assert placed.devices == ["cpu", "cuda:0", "cuda:1"] and placed.notes == []
    for i in range(61):
        for module in ("self_attn.o_proj", "self_attn.kv_b_proj", "input_layernorm", "mlp"):
            assert placed(f"model.layers.{i}.{module}") == ("cuda:0" if i < 30 else "cuda:1")
    assert {placed(m) for m in ("lm_head", "model.norm")} == {"cuda:1"} and placed(
        "model.embed_tokens"
    ) == "cpu"
    assert {placed(f"model.layers.{i}.mlp.experts") for i in range(3, 61)} == {"cpu"}


# Rule files of KTransformers as it has them for this architecture, each kind by what sets it apart from
# DeepSeek-V3-Chat.yaml, and the code of the line that refuses it.
KINDS = {
    "DeepSeek-V3-Chat": ({}, None),
    "DeepSeek-V3-Chat-amx": ({"backend": "AMXInt8"}, None),
    "DeepSeek-V3-Chat-amx-defer": ({"n_deferred_experts": [6], "backend": "AMXInt4"}, None),
    "DeepSeek-V3-Chat-dcu": ({"linear": "KLinearTorch"}, None),
    "DeepSeek-V3-Chat-serve": ({"serve": True, "linear": "VLinearMarlin"}, None),
    "DeepSeek-V3-Chat-fp8-linear-ggml-experts": ({"linear": "KLinearFP8", "head": None}, None),
    "DeepSeek-V3-Chat-fp8-linear-ggml-experts-serve": (
        {"serve": True, "linear": "KLinearFP8", "head": "VLinearMarlin", "backend": "llamafile"},
        None,
    ),
    "rocm/DeepSeek-V3-Chat": ({"linear": "KLinearQ8", "head": "KLinearCPUInfer", "head_on": "cpu"}, None),
    "Moonlight-16B-A3B": ({"rotary": "RotaryEmbeddingV3"}, None),
    "Moonlight-16B-A3B-serve": ({"serve": True, "rotary": "RotaryEmbeddingV4"}, None),
    "ds3_int4_2+6": ({"gate": "KMoEGateGreedy", "n_deferred_experts": [6], "backend": "AMXInt4"}, "E7004"),
    "DeepSeek-V3-Chat-sft-amx": ({"experts": "KSFTExpertsCPU"}, "E7007"),
    "DeepSeek-V3-Chat-multi-gpu-marlin": ({"experts": "KExpertsMarlin", "experts_on": "cuda"}, "E7007"),
    "xpu/DeepSeek-V3-Chat": ({"device": "xpu", "linear": "KLinearIPEXLLM"}, "E7006"),
    "npu/DeepSeek-V3-Chat-300IA2-npu": ({"device": "npu"}, "E7006"),
}
MODELING, OPERATORS = "ktransformers.models.modeling_deepseek_v3.", "ktransformers.operators."


def kind_of_file(
    *,
    device="cuda",
    rotary="YarnRotaryEmbeddingV3",
    linear="KLinearMarlin",
    head="KLinearMarlin",
    head_on=None,
    experts="KExpertsCPU",
    experts_on="cpu",
    gate="KMoEGate",
    serve=False,
    **of_experts,
):
    """The rules of such a file, as YAML."""
    both = {"generate_device": device, "prefill_device": device}

    def rule(match, replace, recursive=True, **kwargs):
        entry = {"match": match, "replace": {"class": replace, "kwargs": both | kwargs}}
        return entry | ({} if recursive else {"recursive": False})

    def class_(name):
        return {"class": MODELING + name}

    product, v2 = OPERATORS + "linear.KTransformersLinear", "V2" if serve else ""
    attention = "balance_serve_attention.flashinfer_attn" if serve else "attention.KDeepseekV2Attention"
    of_experts |= {"generate_device": experts_on, "generate_op": experts, "prefill_op": "KExpertsTorch"}
    rules = [
        rule(class_("DeepseekV3RotaryEmbedding"), f"{OPERATORS}RoPE.{rotary}"),
        rule(
            {"name": r"^model\.layers\.(?!.*self_attn\.kv_b_proj).*$", "class": "torch.nn.Linear"},
            product,
            generate_op=linear,
        ),
        rule(class_("DeepseekV3MoE"), f"{OPERATORS}experts.KDeepseekV3MoE{v2}"),
        rule(class_("MoEGate"), f"{OPERATORS}gate.{gate}"),
        rule(
            {"name": r"^model\.layers\..*\.mlp\.experts$"},
            f"{OPERATORS}experts.KTransformersExperts{v2}",
            recursive=False,
            out_device=device,
            **of_experts,
        ),
        rule(
            {"name": r"^model\.layers\..*\.self_attn$"},
            OPERATORS + attention,
            absorb_for_prefill=False,
        ),
        rule(
            {"name": "^model$"}, OPERATORS + "models.KDeepseekV2Model", per_layer_prefill_intput_threshold=0
        ),
        rule({"name": "^model.embed_tokens"}, "default", generate_device="cpu", prefill_device="cpu"),
    ]
    if head:
        place = {"generate_device": head_on or device}
        rules.append(
            rule({"name": "^lm_head$", "class": "torch.nn.Linear"}, product, generate_op=head, **place)
        )
    if serve:
        rules += [
            rule(class_("DeepseekV3RMSNorm"), OPERATORS + "layernorm.RMSNorm"),
            rule(class_("DeepseekV3MLP"), OPERATORS + "mlp.kDeepseekV3MLP"),
        ]
    return yaml.safe_dump(rules)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_of_ktransformers_places_all_modules_or_is_refused(kind, tmp_path):
    words, code = KINDS[kind]
    config = V3
    if kind.startswith("Moonlight"):
        config = replace(
            V3, num_hidden_layers=27, first_k_dense_replace=1, q_lora_rank=None, rope_scaling=None
        )
    text = kind_of_file(**words)
    if code:
        with pytest.raises(UnsupportedError, match=f"^{code} "):
            place(tmp_path, text, config)
        return
    placed = place(tmp_path, text, config)
    used = {p.rule for p in placed.places.values()}
    assert used >= set(range(len(placed.rules))) and placed.devices == ["cpu", "cuda:0"]
    for name in placement.modules(config):
        cpu = placement.experts_on_cpu(name) == "cpu" or (name == "lm_head" and "head_on" in words)
        assert placed(name) == ("cpu" if cpu else "cuda:0"), name
    told = [n.split(": ", 1)[1] for n in placed.notes]
    assert told == [
        f"{k} has no effect: {why}"
        for k, why in [
            *placement.NOT_DONE.items(),
            ("prefill_device", "there is no layer-wise prefill"),
        ]
        if k in words or (k == "prefill_device" and "head_on" in words)
    ]


def test_the_page_names_every_kind_of_file_and_what_becomes_of_it():
    page = (placement.FILES.parents[1] / "docs" / "placement.md").read_text()
    for kind, (_, code) in KINDS.items():
        row = next(line for line in page.splitlines() if line.startswith("|") and f"`{kind}`" in line)
        assert (f"no: {code}" if code else "| yes |") in row


def test_first_match_wins_and_names_are_searched_unanchored(tmp_path):
    text = """
- match: {name: 'o_proj', class: torch.nn.Linear}
  replace: {class: default, kwargs: {generate_device: cpu}}
- match: {name: 'layers.1.self_attn.o_proj'}
  replace: {class: default, kwargs: {generate_device: cuda:0}}
"""
    placed = place(tmp_path, text + EXPERTS)
    assert placed("model.layers.1.self_attn.o_proj") == "cpu"  # a second rule fits as well
    assert placed("model.layers.1.self_attn.q_b_proj") == "cuda:0"  # none fits
    assert placed.notes == ["line 4: this rule is never the first to match a module"]


def test_name_and_class_must_both_hold_and_subclasses_match(tmp_path):
    text = """
- match: {name: 'self_attn', class: torch.nn.Embedding}
  replace: {kwargs: {generate_device: cpu}}
- match: {class: x.DeepseekV3RotaryEmbedding}
  replace: {class: default, kwargs: {generate_device: cuda}}
"""
    placed = place(tmp_path, text.replace("x.", "") + EXPERTS)
    assert placed("model.layers.0.self_attn") == "cuda:0"
    assert (
        placed.find("model.layers.0.self_attn.rotary_emb").rule == 1
    )  # a DeepseekV3YarnRotaryEmbedding, which is one


def test_recursive_false_leaves_what_is_below_alone(tmp_path):
    text = """
- match: {name: '^model\\.layers\\.0$'}
  replace: {class: default, kwargs: {generate_device: cpu}}
  recursive: %s
- match: {class: torch.nn.Linear, name: 'layers'}
  replace: {class: KTransformersLinear, kwargs: {generate_device: cuda:0, generate_op: KLinearFP8}}
"""
    closed = place(tmp_path, text % "False" + EXPERTS)
    assert {
        closed(f"model.layers.0.{m}")
        for m in ("self_attn", "self_attn.o_proj", "mlp.up_proj", "input_layernorm")
    } == {"cpu"}
    assert "model.layers.0.mlp" not in closed.places and closed("model.layers.1.mlp.gate") == "cuda:0"
    opened = place(
        tmp_path, text % "True" + EXPERTS
    )  # children go their own way: to the linear rule, or to the default device
    assert (
        opened("model.layers.0") == "cpu"
        and opened("model.layers.0.self_attn.o_proj") == opened("model.layers.0.input_layernorm") == "cuda:0"
    )


def test_klineartorch_dequantizes(tmp_path, monkeypatch):
    monkeypatch.setenv("REFIMPL_CUDA_DEVICE", "cpu")
    torch = pytest.importorskip("torch")
    replace = "{class: KTransformersLinear, kwargs: {generate_device: cuda, generate_op: KLinearTorch}}"
    text = f"- match: {{name: 'o_proj|shared', class: torch.nn.Linear}}\n  replace: {replace}\n"
    config = memory.Inventory.open(FP8_DIR).config
    placed = place(tmp_path, text + EXPERTS, config)
    checkpoint = Checkpoint.open(FP8_DIR)
    model = Model(config, checkpoint, cuda.CudaBackend(placed))
    attention = model.layers[1].self_attn
    o_proj, q_b_proj = attention.o_proj.keywords["w"], attention.q_b_proj.keywords["w"]
    assert isinstance(o_proj, torch.Tensor) and o_proj.dtype == torch.bfloat16
    assert not isinstance(q_b_proj, torch.Tensor)


@pytest.mark.parametrize("backend", ["auto", "cpu"])
def test_a_file_is_read_and_said_to_be_of_no_use_without_a_gpu(backend, capsys):
    if backend == "auto" and refimpl.ops.sees_gpu():
        pytest.skip("there is a GPU here")
    assert refimpl.load(FP8_DIR, backend, placement.HYBRID).backend.name == "cpu"
    assert "is read and not used" in capsys.readouterr().err


def test_a_file_places_the_models_modules(monkeypatch, tmp_path):
    pytest.importorskip("torch")
    monkeypatch.setenv("REFIMPL_CUDA_DEVICE", "cpu")
    path = tmp_path / "rules.yaml"
    path.write_text(
        "- match: {name: 'layers\\.2($|\\.)'}\n  replace: {kwargs: {generate_device: cpu}}\n  recursive: "
        "False\n" + EXPERTS
    )
    model = refimpl.load(FP8_DIR, "cuda", path, "exact")
    kinds = [type(layer.self_attn.o_proj.keywords["w"].codes).__module__ for layer in model.layers]
    assert ["torch" in k for k in kinds] == [True, True, False, True]
    expected = refimpl.load(FP8_DIR, "reference", None, "exact").logits([5, 6, 7, 8])
    assert abs(model.logits([5, 6, 7, 8]) - expected).max() <= 1e-4 * abs(expected).max()


# --- what is refused ----------------------------------------------------------------------------------------

RULE = "- match: {name: a}\n  replace: {class: default, kwargs: {generate_device: cpu}}\n"
REFUSED = {
    "E7001 tag": ("- !!python/object/apply:os.system ['touch stranger-was-here']", "E7001"),
    "E7002 tag": ("!!python/object/apply:os.system {a: b}", "E7002"),
    "E7001 tag in a rule": ("- match: !!python/name:os.system\n  replace: {}", "E7001"),
    "E7001 unfinished": ("- match: {name: a", "E7001"),
    "E7001 depth": ("[" * 100 + "]" * 100, "E7001"),
    "E7001 aliases": ("- &a [x]\n" + "- *a\n" * 100, "E7001"),
    "E7001 binary": ("- \x00\x01", "E7001"),
    "E7001 two documents": (f"{RULE}---\n{RULE}", "E7001"),
    "E7001 size": ("# " + "x" * placement.LIMIT, "E7001"),
    "E7002 mapping": ("match: {name: a}", "E7002"),
    "E7002 scalar": ("hello", "E7002"),
    "E7002 no replace": ("- match: {name: a}", "E7002"),
    "E7002 empty match": ("- match: {}\n  replace: {class: default}", "E7002"),
    "E7002 number": ("- match: {name: 3}\n  replace: {class: default}", "E7002"),
    "E7002 kwargs": ("- match: {name: a}\n  replace: {class: default, kwargs: [1]}", "E7002"),
    "E7002 recursive": (RULE + "  recursive: maybe", "E7002"),
    "E7002 unknown key": (RULE + "  recursiv: False", "E7002"),
    "E7002 transfer map": (
        "- match: {name: a}\n  replace: {class: KDeepseekV2Model, kwargs: {transfer_map: [1]}}",
        "E7002",
    ),
    "E7003 range": (RULE.replace("name: a", "name: '([4-10])'"), "E7003"),
    "E7003 length": (RULE.replace("name: a", f"name: '{'a' * 2000}'"), "E7003"),
    "E7004 import": (RULE.replace("default", "os.system"), "E7004"),
    "E7004 near miss": (
        RULE.replace("default", "ktransformers.operators.linear.KTransformerLinear"),
        "E7004",
    ),
    "E7004 foreign root": (RULE.replace("name: a", "class: evil.package.Linear"), "E7004"),
    "E7004 match class": (RULE.replace("name: a", "class: torch.nn.Linnear"), "E7004"),
    "E7005 wrong kind": (
        RULE.replace("name: a", "name: '^model$'").replace("default", "KTransformersLinear"),
        "E7005",
    ),
    "E7005 experts": (
        RULE.replace("name: a", "name: '^model.layers$'").replace("default", "KTransformersExperts"),
        "E7005",
    ),
    "E7006 npu": (RULE.replace("cpu", "npu:0"), "E7006"),
    "E7006 number": (RULE.replace("cpu", "3"), "E7006"),
    "E7007 experts": (EXPERTS.replace("KExpertsCPU", "KExpertsMarlin"), "E7007"),
    "E7007 linear": (
        RULE.replace("default", "KTransformersLinear").replace("cpu}", "cpu, generate_op: KLinearIPEXLLM}"),
        "E7007",
    ),
    "E7008": (
        "- match: {name: ^model$}\n  replace: {class: KDeepseekV2Model, kwargs: "
        "{per_layer_prefill_intput_threshold: 30000}}",
        "E7008",
    ),
    "E7011 other GPU": (EXPERTS + RULE.replace("name: a", "name: o_proj").replace("cpu", "cuda:1"), "E7011"),
    "E7011 norm": (EXPERTS + RULE.replace("name: a", "name: post_attention_layernorm"), "E7011"),
    "E7011 kv_b": (EXPERTS + RULE.replace("name: a", "name: kv_b_proj"), "E7011"),
    "E7012": (RULE.replace("name: a", "name: lm_head"), "E7012"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(case, tmp_path):
    text, code = REFUSED[case]
    with pytest.raises(RefimplError) as caught:
        place(tmp_path, text)
    assert (
        caught.value.code == code
        and "\n" not in caught.value.line()
        and str(tmp_path / "rules.yaml") in caught.value.line()
    )


def test_a_catastrophic_pattern_is_stopped_and_named(tmp_path, monkeypatch):
    monkeypatch.setattr(placement, "SECONDS", 1.0)
    text = RULE.replace("name: a", "name: 'lm_head'") + RULE.replace("name: a", "name: '^(([a-z._0-9])+)+!$'")
    start = time.monotonic()
    with pytest.raises(InputFormatError, match=r"E7009 .*line 3"):
        place(tmp_path, text + EXPERTS)
    assert time.monotonic() - start < 10


def test_nothing_named_in_a_file_is_imported(tmp_path):
    before = set(sys.modules)
    for dotted in (
        "ktransformers.operators.linear.KTransformersLinear",
        "torch.nn.Linear",
        "ftplib.FTP",
        "ktransformers.antigravity.Linear",
    ):
        with (
            pytest.raises(UnsupportedError) if "FTP" in dotted or "operators" in dotted else open("/dev/null")
        ):
            place(tmp_path, RULE.replace("name: a", f"class: {dotted}, name: zzz") + EXPERTS)
    assert not {
        m for m in set(sys.modules) - before if m.startswith(("ftplib", "ktransformers", "antigravity"))
    }


@given(seed=st.integers(0, 2**32))
def test_a_damaged_file_gives_an_error_or_a_placement(seed, tmp_path_factory):
    rng = random.Random(seed)
    tree = yaml.safe_load(placement.HYBRID.read_text())
    for _ in range(rng.randint(1, 3)):
        target = rng.choice(tree)
        for _ in range(rng.randint(0, 2)):
            inner = [v for v in target.values() if isinstance(v, dict) and v]
            target = rng.choice(inner) if inner else target
        target[rng.choice([*target, "x"])] = rng.choice(
            [None, 1, "cuda:1", "", [], {}, {"a": [1]}, True, "^model", "cpu", "(", "torch.nn.Linear"]
        )
    config = DeepSeekConfig(num_hidden_layers=4, first_k_dense_replace=1)
    path = tmp_path_factory.getbasetemp() / "damaged.yaml"
    path.write_text(yaml.safe_dump(tree))
    try:
        placed = placement.load(path, config)
    except RefimplError as error:
        assert error.code.startswith("E7")
    else:
        assert {placed(n.removesuffix(".weight")) for n in names.shapes(config)} <= {
            "cpu",
            "cuda:0",
            "cuda:1",
        }


# --- the command --------------------------------------------------------------------------------------------


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "refimpl.rules", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_command_draws_the_map_in_bytes():
    done = command(placement.HYBRID, "--json")
    report = json.loads(done.stdout)
    source = memory.Inventory.builtin("deepseek-v3")
    assert [r["modules"] for r in report["rules"]] == [61, 427, 58, 58, 58, 61, 1, 1] and report[
        "notes"
    ] == []
    assert {p["device"] for p in report["devices"]} == {"cpu", "cuda:0"}
    assert sum(p["nbytes"] for p in report["devices"]) == sum(
        p.nbytes for p in memory.weights(source, placement.experts_on_cpu)
    )
    shown = command(MULTI, "--model_path", FP8_DIR).stdout
    assert "line   4:     1 modules -> default cpu" in shown and "\ncuda:0  " in shown


def test_the_command_lints(tmp_path):
    path = tmp_path / "rules.yaml"
    path.write_text(
        RULE.replace("name: a", "name: layers.99").replace("cpu}", "cpu, generate_devise: cuda}") + EXPERTS
    )
    done = command(path)
    assert done.returncode == 0
    assert "note: line 1: this rule is never the first to match a module" in done.stdout
    assert "note: line 1: default has no keyword generate_devise" in done.stdout
    path.write_text(RULE.replace("name: a", "name: '([4-10])'"))
    done = command(path)
    assert done.returncode == 1 and done.stdout == ""
    assert (
        done.stderr.startswith("refimpl: E7003")
        and "bad character range 4-1" in done.stderr
        and done.stderr.count("\n") == 1
    )
