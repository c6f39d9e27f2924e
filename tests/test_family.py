"""The models that are DeepSeek-V3's architecture with a small difference: exact logits of random tiny ones
are transformers', from its folders and from GGUF, on every backend. The deep profile draws more of them.
"""

import os
import zlib
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from refimpl.checkpoint.folder import Checkpoint
from refimpl.config import DeepSeekConfig
from refimpl.devices.cpu import CpuBackend
from refimpl.errors import UnsupportedError
from refimpl.model import Model

family = pytest.importorskip("tests.family_models", reason="needs torch and transformers: the extra `test`")
cuda = pytest.importorskip("refimpl.devices.cuda")
COUNT = 20 if os.environ.get("HYPOTHESIS_PROFILE") == "deep" else 5  # models of a kind
SLACK = 1e-4  # of the largest logit


@pytest.fixture(autouse=True)
def cpu_tensors(monkeypatch):
    monkeypatch.setenv("REFIMPL_CUDA_DEVICE", "cpu")


def backends():
    yield CpuBackend("reference", "exact")
    yield CpuBackend("cpu", "exact")
    yield cuda.CudaBackend(activations="exact")


def agree(ours: np.ndarray, theirs: np.ndarray) -> bool:
    return ours.shape == theirs.shape and bool(np.abs(ours - theirs).max() <= SLACK * np.abs(theirs).max())


def decoded(model: Model, ids: list[int]) -> np.ndarray:
    """Logits with the cache, a prompt first and then token by token."""
    cache = model.new_cache()
    pieces = [model.forward(ids[:5], cache), *(model.forward([i], cache) for i in ids[5:])]
    return np.concatenate(pieces)


@pytest.mark.parametrize("number", range(COUNT))
@pytest.mark.parametrize("name", family.KINDS)
def test_exact_logits_are_transformers_logits(name, number, tmp_path: Path):
    kind, rng = family.KINDS[name], np.random.default_rng([zlib.crc32(name.encode()), number])
    raw = family.random_config(kind, rng)
    theirs_model = family.build(kind, raw, rng)
    ids = rng.integers(0, raw["vocab_size"], 12).tolist()
    theirs = family.logits(theirs_model, ids)
    folder = family.save(kind, theirs_model, tmp_path / "hf")
    file = family.save_gguf(kind, theirs_model, raw, tmp_path / "model.gguf")
    for path in (folder, file):
        checkpoint = Checkpoint.open(path)
        for backend in backends():
            model = Model(DeepSeekConfig.from_dict(checkpoint.config), checkpoint, backend)
            assert agree(model.logits(ids), theirs), (path, backend.name)
            assert agree(decoded(model, ids), theirs), (path, backend.name)


@pytest.mark.parametrize("name", ["deepseek_v4", "glm4_moe", "kimi_k3"])
def test_kin_that_do_not_run_are_refused_by_name_with_what_is_missing(name):
    raw = {"model_type": name, "vocab_size": 5}
    with pytest.raises(UnsupportedError, match=r"E4001 .*this model is not run here: (DeepSeek|GLM|Kimi)"):
        DeepSeekConfig.from_dict(raw)


def test_a_bias_beside_softmax_scores_is_refused(tmp_path):
    kind, rng = family.KINDS["DeepSeek-V2"], np.random.default_rng(5)
    raw = family.random_config(kind, rng) | {"first_k_dense_replace": 0}
    folder = family.save(kind, family.build(kind, raw, rng), tmp_path / "hf")
    bias = {"model.layers.0.mlp.gate.e_score_correction_bias": np.zeros(raw["n_routed_experts"], np.float32)}
    save_file(bias, folder / "more.safetensors")
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    with pytest.raises(UnsupportedError, match=r"E4001 .*exp_probs_b\.bias"):
        Checkpoint.open(folder)
