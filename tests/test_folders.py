"""Every kind of folder as a whole: GGUFs in all styles and types, FP8 checkpoints. Equal weights give equal
logits, and the command answers.
"""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from tokenizers import Tokenizer as RustTokenizer

from refimpl import chat, formats, quantize
from refimpl.checkpoint import codecs, folder, gguf, names
from refimpl.checkpoint.folder import Checkpoint
from refimpl.cli import run
from refimpl.config import DeepSeekConfig
from refimpl.devices.cpu import CpuBackend
from refimpl.errors import RefimplError
from refimpl.model import Model
from refimpl.reference.packed import dense
from refimpl.text import gguf_vocabulary
from refimpl.text.tokenizer import Tokenizer
from refimpl.tiny import FP8_DIR, GGUF_FILE

CONFIG = DeepSeekConfig.from_dict(json.loads((FP8_DIR / "config.json").read_text()))
SHAPES = {names.to_gguf(name): shape for name, shape in names.shapes(CONFIG).items()}
IDS = Tokenizer(FP8_DIR).encode("What is 12 + 30?")
N = CONFIG.qk_nope_head_dim

# name: (kv_b whole or in halves, experts in a stack or one by one, type of a tensor by its name)
STYLES = {
    "old": ("whole", "stack", lambda name: "Q8_0"),
    "halves": ("halves", "stack", lambda name: "Q8_0"),
    "flat halves": ("flat halves", "stack", lambda name: "F32"),
    "per expert": ("whole", "single", lambda name: "Q6_K"),
    "F16": ("halves", "single", lambda name: "F16"),
    "BF16": ("halves", "stack", lambda name: "BF16"),
    "F32": ("whole", "stack", lambda name: "F32"),
    "mixed": (
        "halves",
        "single",
        lambda name: ("Q4_K", "Q5_K", "Q6_K", "Q8_0", "F16", "BF16", "F32")[sum(name.encode()) % 7],
    ),
    "vocabulary in K-quants": (
        "whole",
        "stack",
        lambda name: {"token_embd.weight": "Q5_K", "output.weight": "Q4_K"}.get(name, "Q5_0"),
    ),
}


@pytest.fixture(scope="module")
def truth() -> dict[str, np.ndarray]:
    """The FP8 checkpoint as float32 by GGUF name."""
    checkpoint = Checkpoint.open(FP8_DIR)
    return {name: codecs.dense(checkpoint[name]) for name in SHAPES}


def old_metadata() -> dict:
    """What files from before the halves said of the heads."""
    meta = {k: v for k, v in gguf.read(GGUF_FILE).metadata.items() if not k.endswith("_mla")}
    heads = {
        "head_count_kv": CONFIG.num_attention_heads,
        "key_length": CONFIG.qk_head_dim,
        "value_length": CONFIG.v_head_dim,
    }
    return meta | {f"deepseek2.attention.{k}": v for k, v in heads.items()}


def write(path, style: str, truth: dict[str, np.ndarray]) -> None:
    """A GGUF of the embedded model in one of the styles."""
    kv_b, experts, kind_of = STYLES[style]
    tensors: list[tuple[str, np.ndarray]] = []
    for name, x in truth.items():
        if name.endswith("attn_kv_b.weight") and kv_b != "whole":
            heads = x.reshape(CONFIG.num_attention_heads, -1, CONFIG.kv_lora_rank)
            halves = {"attn_k_b": heads[:, :N].transpose(0, 2, 1), "attn_v_b": heads[:, N:]}
            for half, y in halves.items():
                tensors.append(
                    (
                        name.replace("attn_kv_b", half),
                        y.reshape(-1, y.shape[-1]) if kv_b == "flat halves" else y,
                    )
                )
        elif x.ndim == 3 and experts == "single":
            tensors += [(name.replace("_exps", f".{e}"), x[e]) for e in range(len(x))]
        else:
            tensors.append((name, x))
    entries = []
    for name, x in tensors:
        kind = formats.type_id("F32" if x.ndim == 1 or "ffn_gate_inp" in name else kind_of(name))
        if x.shape[-1] % formats.get(kind).WEIGHTS:
            kind = formats.type_id("F16")
        data = codecs.quantize(kind, np.ascontiguousarray(x).reshape(-1, x.shape[-1])).tobytes()
        entries.append(gguf.Entry(name, kind, x.shape, lambda data=data: [data]))
    gguf.write(path, gguf.read(GGUF_FILE).metadata if kv_b != "whole" else old_metadata(), entries)


@pytest.fixture(scope="module")
def files(tmp_path_factory, truth):
    """{style: GGUF}, each alone in a folder."""
    found = {}
    for style in STYLES:
        found[style] = tmp_path_factory.mktemp("gguf") / "model.gguf"
        write(found[style], style, truth)
    return found


def logits(
    source, backend: str = "reference", activations: str = "exact", config: DeepSeekConfig = CONFIG
) -> np.ndarray:
    return Model(config, source, CpuBackend(backend, activations)).logits(IDS)


@pytest.mark.parametrize("style", STYLES)
def test_a_gguf_is_the_model_of_its_decoded_weights(files, style):
    """Decoded by the references, tensor by tensor, and given to the model as plain arrays: the same logits,
    bit by bit, and the same tokens.
    """
    checkpoint = Checkpoint.open(files[style])
    config = DeepSeekConfig.from_dict(checkpoint.config)
    assert config == CONFIG and checkpoint.keys() >= SHAPES.keys()
    plain = {name: dense(checkpoint[name]) for name in SHAPES}
    assert {name: x.shape for name, x in plain.items()} == SHAPES
    np.testing.assert_array_equal(logits(checkpoint), logits(plain))
    # Sums of products in another order: each step within gamma_n, through 4 layers a few thousand units in
    # the last place.
    fast = logits(checkpoint, "cpu")
    np.testing.assert_allclose(fast, logits(plain), rtol=0, atol=1e-4 * np.abs(fast).max())
    said = [
        list(Model(config, c, CpuBackend(b)).generate(IDS, 6))
        for c, b in ((checkpoint, "reference"), (checkpoint, "cpu"))
    ]
    assert said[0] == said[1]


def test_float32_files_hold_the_checkpoint_itself(files, truth):
    """Through the halves, one of them transposed, and back: the very numbers."""
    for style in ("F32", "flat halves"):
        checkpoint = Checkpoint.open(files[style])
        for name, x in truth.items():
            np.testing.assert_array_equal(codecs.dense(checkpoint[name]), x, err_msg=name)
        np.testing.assert_array_equal(logits(checkpoint), logits(Checkpoint.open(FP8_DIR)))


def test_the_key_half_is_transposed_head_by_head(files, truth):
    """k_b[h, l, i] is kv_b's row of head h and key dimension i at latent l; v_b has the rows behind the
    keys'.
    """
    file = gguf.read(files["BF16"])
    kv_b = truth["blk.2.attn_kv_b.weight"]
    k_b, v_b = (dense(gguf.view(file.tensors[f"blk.2.attn_{half}.weight"])) for half in ("k_b", "v_b"))
    for h, l, i in ((0, 0, 0), (1, 5, 3), (3, 255, 63), (2, 17, 40)):
        first = h * (N + CONFIG.v_head_dim)
        assert k_b[h, l, i] == pytest.approx(kv_b[first + i, l], rel=2**-8)
        assert v_b[h, i, l] == pytest.approx(kv_b[first + N + i, l], rel=2**-8)
    assert file.tensors["blk.2.attn_k_b.weight"].shape == (4, 256, 64)


def test_how_tensors_are_laid_out_does_not_matter(tmp_path, truth):
    """Whole or in halves, stacked or one by one: the same bits on every backend, with rounded activations
    too.
    """
    found = []
    for style in (("whole", "stack"), ("halves", "single")):
        STYLES["same"] = (*style, lambda name: "F32" if "attn_k" in name or "attn_v" in name else "Q8_0")
        try:
            write(tmp_path / "x.gguf", "same", truth)
        finally:
            del STYLES["same"]
        checkpoint = Checkpoint.open(tmp_path / "x.gguf")
        found.append(
            [
                logits(checkpoint, backend, activations)
                for backend in ("reference", "cpu")
                for activations in ("exact", "fp8")
            ]
        )
    for a, b in zip(*found):
        np.testing.assert_array_equal(a, b)


def test_transformers_agrees_on_a_mixed_file(files):
    oracle = pytest.importorskip("tests.oracle_hf", reason="needs torch and transformers: the extra `test`")
    checkpoint = Checkpoint.open(files["mixed"])
    theirs = oracle.transformers_logits(json.loads((FP8_DIR / "config.json").read_text()), checkpoint, IDS)
    assert np.abs(logits(checkpoint) - theirs).max() <= 1e-4 * np.abs(theirs).max()


def test_an_fp8_folder_runs_its_routed_experts_in_fp8_on_every_cpu_backend():
    checkpoint = Checkpoint.open(FP8_DIR)
    plain = {name: dense(checkpoint[name]) for name in SHAPES}
    np.testing.assert_array_equal(logits(checkpoint), logits(plain))
    fast = logits(checkpoint, "cpu")
    np.testing.assert_allclose(fast, logits(plain), rtol=0, atol=1e-4 * np.abs(fast).max())
    said = [list(Model(CONFIG, checkpoint, CpuBackend(b)).generate(IDS, 40)) for b in ("reference", "cpu")]
    assert said[0] == said[1]


def test_the_command_answers_from_every_kind_of_folder(hybrid_folder, files, tmp_path, capsys):
    """Nothing but the GGUF itself in its folder: config and tokenizer come from its metadata."""
    assert run(quantize.main, ["--safetensor_path", str(FP8_DIR), "--output", str(tmp_path / "x.gguf")]) == 0
    capsys.readouterr()
    kinds = [
        (hybrid_folder, "cpu"),
        (FP8_DIR, "reference"),
        (FP8_DIR, "cpu"),
        (tmp_path, "reference"),
        (files["old"], "cpu"),
    ]
    kinds += [(files["per expert"].parent, "cpu"), (files["mixed"], "reference")]
    for i, (path, backend) in enumerate(kinds):
        flag = ("--gguf_path", "--model_path")[i % 2]
        assert (
            run(chat.main, [flag, str(path), "-p", "What is 12 + 30?", "--greedy", "--backend", backend]) == 0
        )
        assert capsys.readouterr() == ("42\n", "")


def test_a_gguf_alone_answers_in_a_process_of_its_own(files):
    command = [
        sys.executable,
        "-m",
        "refimpl.chat",
        "--gguf_path",
        str(files["old"]),
        "-p",
        "What is 123 + 456?",
        "--greedy",
        "--backend",
        "reference",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "579\n", "")


def test_config_and_tokenizer_beside_a_gguf_go_before_its_metadata(files, tmp_path):
    shutil.copy(files["old"], tmp_path / "x.gguf")
    raw = json.loads((FP8_DIR / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"max_position_embeddings": 99}))
    assert Checkpoint.open(tmp_path / "x.gguf").config["max_position_embeddings"] == 99
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(FP8_DIR / name, tmp_path)
    generation = tmp_path / "generation_config.json"
    generation.write_text(json.dumps(json.loads(generation.read_text()) | {"temperature": 0.7}))
    assert Tokenizer(tmp_path).generation["temperature"] == 0.7
    assert Tokenizer(files["old"]).generation["temperature"] == 0.6  # from general.sampling.temp


# --- damaged ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "change"),
    [
        ("E4011 blk.1.attn_k_b", lambda n, x: x.transpose(0, 2, 1) if n == "blk.1.attn_k_b.weight" else x),
        ("E4011 blk.2.attn_v_b", lambda n, x: x[:, :-1] if n == "blk.2.attn_v_b.weight" else x),
        ("E4011 .*blk.1.ffn_up.5.weight", lambda n, x: x[:-32] if n == "blk.1.ffn_up.5.weight" else x),
        ("E4010 .*expert 3 of blk.1.ffn_up_exps", lambda n, x: None if n == "blk.1.ffn_up.3.weight" else x),
        ("E4010 .*kv_b_proj", lambda n, x: None if n == "blk.0.attn_v_b.weight" else x),
    ],
)
def test_damaged_ggufs_are_refused_by_tensor(files, tmp_path, code, change):
    file = gguf.read(files["F16"])
    entries = []
    for name, info in file.tensors.items():
        x = change(name, dense(gguf.view(info)))
        if x is not None:
            data = formats.quantize(0, np.ascontiguousarray(x).reshape(-1, x.shape[-1])).tobytes()
            entries.append(gguf.Entry(name, 0, x.shape, lambda data=data: [data]))
    gguf.write(tmp_path / "x.gguf", file.metadata, entries)
    with pytest.raises(RefimplError, match=code):
        Model(CONFIG, Checkpoint.open(tmp_path / "x.gguf"))


@pytest.mark.parametrize(
    ("code", "change"),
    [
        ("E1011 .*block_count is missing", {"deepseek2.block_count": None}),
        ("E1011 .*dimension_count has the wrong type .found '64'", {"deepseek2.rope.dimension_count": "64"}),
        ("E1010 .*llama", {"general.architecture": "llama"}),
        ("E1010 .*DeepSeek-V4: hash", {"general.architecture": "deepseek4"}),
        ("E4002 .*expert_gating_func .*found 4", {"deepseek2.expert_gating_func": 4}),
        ("E4002 .*norm_topk_prob", {"deepseek2.expert_gating_func": None}),  # files from before V3: softmax
    ],
)
def test_metadata_that_give_no_config_are_refused(code, change):
    file = gguf.read(GGUF_FILE)
    changed = {k: v for k, v in (file.metadata | change).items() if v is not None}
    with pytest.raises(RefimplError, match=code):
        DeepSeekConfig.from_dict(folder.gguf_config(file._replace(metadata=changed)))


def test_layers_for_several_tokens_are_not_counted_as_the_model_s():
    file = gguf.read(GGUF_FILE)
    found = folder.gguf_config(
        file._replace(
            metadata=file.metadata | {"deepseek2.block_count": 5, "deepseek2.nextn_predict_layers": 1}
        )
    )
    assert found["num_hidden_layers"] == 4


# --- the tokenizer in a GGUF --------------------------------------------------------------------------------

TEXTS = [
    "What is 12 + 30?",
    "0x1F and 12345 is 3.5e-7",
    "naïve café 東京タワー\r\n\n  x",
    "don't\t\tstop!! <think>",
    "",
    " ",
    "日本語ab한국어",
    "a\u0301b",
]


def bare(**change) -> dict:
    """llama.cpp's keys alone."""
    meta = (
        gguf.read(GGUF_FILE).metadata
        | {"tokenizer.ggml.pre": "deepseek-v3"}
        | {f"tokenizer.ggml.{k}": v for k, v in change.items()}
    )
    return {k: v for k, v in meta.items() if k != "tokenizer.huggingface.json" and v is not None}


def test_the_tokenizer_in_the_metadata_is_the_one_it_was_made_from():
    ours, theirs = Tokenizer(GGUF_FILE), Tokenizer(FP8_DIR)
    assert (
        ours.raw == theirs.raw
        and ours.special == theirs.special
        and ours.stop_ids == theirs.stop_ids
        and ours.control == theirs.control
    )
    assert ours.config["chat_template"] == theirs.config["chat_template"]


def test_llama_cpp_s_keys_alone_give_the_same_tokens_and_merges():
    rebuilt, shipped = (
        gguf_vocabulary.tokenizer(bare(), "x"),
        json.loads((FP8_DIR / "tokenizer.json").read_text()),
    )
    theirs = RustTokenizer.from_str(json.dumps(shipped | {"pre_tokenizer": rebuilt["pre_tokenizer"]}))
    ours = RustTokenizer.from_str(json.dumps(rebuilt))
    assert ours.get_vocab() == theirs.get_vocab()
    for text in TEXTS:
        assert ours.encode(text).ids == theirs.encode(text).ids
        assert ours.decode(ours.encode(text).ids, skip_special_tokens=False) == text
    added = {t["content"]: t["special"] for t in shipped["added_tokens"]}
    assert {t["content"]: t["special"] for t in rebuilt["added_tokens"]} == added


def test_deepseek_v3_splits_numbers_by_three_and_words_from_signs():
    pieces = RustTokenizer.from_str(
        json.dumps(gguf_vocabulary.tokenizer(bare(), "x"))
    ).pre_tokenizer.pre_tokenize_str
    assert [p for p, _ in pieces("is 12345, don't(x)")] == [
        "is",
        "Ġ",
        "123",
        "45",
        ",",
        "Ġdon",
        "'t",
        "(x",
        ")",
    ]
    text = "東京a"
    assert [text[a:b] for _, (a, b) in pieces(text)] == ["東京", "a"]


@pytest.mark.parametrize(
    ("code", "meta"),
    [
        ("E6110 .*'llama'", bare(model="llama")),
        ("E6112 .*'default'", bare(pre="default")),
        ("E6111 .*tokens is missing", bare(tokens=None)),
        ("E6111 .*tokens", bare(tokens=[1, 2])),
        ("E6111 .*merges", bare(merges=None)),
        ("E6111 .*token_type", bare(token_type=[1])),
        ("E6111 .*eos_token_id", bare(eos_token_id=512)),
        ("E6111 .*bos_token_id", bare(bos_token_id="0")),
        ("E6104", bare() | {"tokenizer.huggingface.json": "[1"}),
        ("E6104", bare() | {"tokenizer.huggingface.json": "[]"}),
        ("E6104", bare() | {"tokenizer.huggingface.json": 3}),
    ],
)
def test_tokenizers_that_cannot_be_rebuilt_are_refused(code, meta):
    with pytest.raises(RefimplError, match=code):
        gguf_vocabulary.config(meta, "x.gguf")
        gguf_vocabulary.tokenizer(meta, "x.gguf")


def test_a_broken_tokenizer_in_a_gguf_is_one_line(tmp_path, capsys):
    meta = gguf.read(GGUF_FILE).metadata | {"tokenizer.huggingface.json": '{"model": 3}'}
    gguf.write(
        tmp_path / "x.gguf", meta, [gguf.Entry("output_norm.weight", 0, (256,), lambda: [bytes(1024)])]
    )
    with pytest.raises(RefimplError, match=r"E6105 .*x\.gguf"):
        Tokenizer(tmp_path / "x.gguf")
