"""What is made of the family's files: random tiny models of every kind are merged, linked, quantized and
chatted with, and stay the same model.
"""

import json
import shutil
import zlib

import numpy as np
import pytest

from refimpl import chat, convert_model, quantize
from refimpl.checkpoint.folder import Checkpoint
from refimpl.cli import run
from refimpl.config import DeepSeekConfig
from refimpl.devices.cpu import CpuBackend
from refimpl.devices.placement import HYBRID, load
from refimpl.model import Model
from refimpl.tiny import FP8_DIR

family = pytest.importorskip("tests.family_models", reason="needs torch and transformers: the extra `test`")
gguf = pytest.importorskip("gguf", reason="gguf-py reads what quantize wrote: the extra `test`")
IDS = list(range(3, 15))
SLACK = 1e-4  # of the largest logit


@pytest.fixture(scope="module", params=family.KINDS)
def member(request, tmp_path_factory):
    """A folder of transformers' with the embedded model's tokenizer, its GGUF, its kind and its logits."""
    kind, home = family.KINDS[request.param], tmp_path_factory.mktemp("member")
    rng = np.random.default_rng([zlib.crc32(request.param.encode()), 100])
    raw = family.random_config(kind, rng)
    raw |= {"vocab_size": json.loads((FP8_DIR / "config.json").read_text())["vocab_size"]}
    raw |= {"max_position_embeddings": 512, "eos_token_id": 1}
    model = family.build(kind, raw, rng)
    family.save(kind, model, home / "hf")
    family.save_gguf(kind, model, raw, home / "model.gguf")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(FP8_DIR / file, home / "hf" / file)
    return home, kind, family.logits(model, IDS)


def close(path, true: np.ndarray) -> bool:
    """Whether the exact logits of a folder or file are these."""
    checkpoint = Checkpoint.open(path)
    model = Model(DeepSeekConfig.from_dict(checkpoint.config), checkpoint, CpuBackend("cpu", "exact"))
    return bool(np.abs(model.logits(IDS) - true).max() <= SLACK * np.abs(true).max())


@pytest.mark.parametrize("how", [[], ["--link"]], ids=["copied", "linked"])
def test_a_merge_of_folder_and_gguf_is_the_model(member, how, tmp_path, capsys):
    home, _, true = member
    inputs = ["--safetensor_path", str(home / "hf"), "--gguf_path", str(home / "model.gguf")]
    done = run(convert_model.main, [*inputs, "--output_path", str(tmp_path / "out"), "--verify", *how])
    assert done == 0, capsys.readouterr().err
    assert close(tmp_path / "out", true)


def test_quantize_writes_a_gguf_that_gguf_py_and_we_read(member, tmp_path, capsys):
    home, kind, true = member
    target = tmp_path / "f32.gguf"
    arguments = ["--safetensor_path", str(home / "hf"), "--output", str(target), "--type", "F32"]
    assert run(quantize.main, arguments) == 0, capsys.readouterr().err
    assert close(target, true)
    theirs = gguf.GGUFReader(target)
    assert theirs.fields["general.architecture"].contents() == kind.architecture
    made = {t.name: t.shape.tolist() for t in gguf.GGUFReader(home / "model.gguf").tensors}
    assert {t.name: t.shape.tolist() for t in theirs.tensors} == made


def test_the_default_mix_quantizes_and_chats(member, tmp_path, capsys):
    home, _, _ = member
    target = tmp_path / "mixed.gguf"
    assert run(quantize.main, ["--safetensor_path", str(home / "hf"), "--output", str(target)]) == 0
    capsys.readouterr()
    for place in (
        ["--gguf_path", str(target), "--model_path", str(tmp_path)],
        ["--model_path", str(home / "hf")],
    ):
        words = ["-p", "What is 7 + 8?", "--greedy", "--max_new_tokens", "4", "--json", *place]
        assert run(chat.main, words) == 0, capsys.readouterr().err
        report = json.loads(capsys.readouterr().out)
        assert len(report["token_ids"]) == 4 or report["finish_reason"] == "stop"


def test_the_rules_place_every_module(member):
    """Routed experts stay with the CPU, all else goes to the GPU: an indexer too."""
    home, _, _ = member
    config = DeepSeekConfig.from_dict(json.loads((home / "hf" / "config.json").read_text()))
    place, last = load(HYBRID, config), config.num_hidden_layers - 1
    assert place(f"model.layers.{last}.mlp.experts") == "cpu"
    modules = ["self_attn.o_proj", "mlp.gate"] + ["self_attn.indexer.wq_b"] * bool(config.index_topk)
    assert {place(f"model.layers.{last}.{m}") for m in modules} == {"cuda:0"}
