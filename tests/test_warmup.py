"""After a warmup a second process compiles nothing."""

import json
import os
import subprocess
import sys

import pytest

from refimpl import warmup
from refimpl.checkpoint.folder import Checkpoint
from refimpl.config import DeepSeekConfig
from refimpl.devices import memory
from refimpl.loading import compiling
from refimpl.tiny import FP8_DIR

COUNT = """
import refimpl.kernels
from numba.core.dispatcher import Dispatcher
found = {}
for name, module in list(sys.modules.items()):
    if name.startswith("refimpl.kernels."):
        found |= {id(v): v for v in vars(module).values() if isinstance(v, Dispatcher)}
stats = [d.stats for d in found.values()]
print(sum(sum(s.cache_misses.values()) for s in stats), sum(sum(s.cache_hits.values()) for s in stats))
"""
USE = f"""
import sys
import refimpl
model = refimpl.load(sys.argv[1], backend="cpu")
list(model.generate(list(range(40)), 4))
list(model.generate([5, 6, 7], 3))
{COUNT}
"""
WARM = f"""
import sys
from refimpl import warmup
warmup.main(["--backend", "cpu", "--model_path", sys.argv[1], "--json"])
{COUNT}
"""


def files(folder):
    return {
        str(p.relative_to(folder)): p.stat().st_mtime_ns
        for p in folder.rglob("*")
        if p.is_file() and p.suffix in (".nbi", ".nbc")
    }


def test_a_second_process_compiles_nothing(tmp_path, hybrid_folder):
    environment = os.environ | {"REFIMPL_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", WARM, str(hybrid_folder)]
    first = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert first.returncode == 0, first.stderr
    report, counts = first.stdout.splitlines()
    assert json.loads(report)["layers"] == warmup.kinds(memory.Inventory.open(hybrid_folder))
    if compiling._processes() > 1:  # others have compiled all that the model then called
        assert counts.split()[0] == "0" and "compiling the kernels" in first.stderr
    before = files(tmp_path)
    assert len(before) > 10
    used = subprocess.run(
        [sys.executable, "-c", USE, str(hybrid_folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert used.returncode == 0, used.stderr
    misses, hits = map(int, used.stdout.split())
    assert misses == 0 and hits > 5
    assert files(tmp_path) == before and "compiling" not in used.stderr


def test_layers_are_taken_by_kind():
    tensors = {
        f"model.layers.{i}.{n}": memory.Stored(k, (1,)) for i, k in enumerate("AABBAC") for n in ("x", "y")
    }
    tensors["model.layers.5.z"] = memory.Stored("A", (1,))
    config = DeepSeekConfig(num_hidden_layers=6)
    assert warmup.kinds(memory.Inventory(config, tensors)) == [0, 2, 5]
    assert warmup.kinds(memory.Inventory.builtin("deepseek-v3")) == [
        0,
        3,
        7,
    ]  # dense; experts with Q6_K down; with Q4_K down


def test_a_sample_is_the_layers_it_names():
    checkpoint = Checkpoint.open(FP8_DIR)
    config = DeepSeekConfig.from_dict(checkpoint.config)
    small, layers = warmup.sample(checkpoint, config)
    assert (small.num_hidden_layers, small.first_k_dense_replace, layers.layers) == (2, 1, [0, 1])
    other = warmup.Sample(checkpoint, [0, 3])
    assert (other["blk.1.attn_output.weight"].codes == checkpoint["blk.3.attn_output.weight"].codes).all()
    assert (
        "blk.2.attn_output.weight" in other
        and "blk.9.attn_output.weight" not in other
        and len(other) == len(checkpoint) == len(list(other))
    )


def test_without_a_gpu_it_refuses(monkeypatch):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    environment = {k: v for k, v in os.environ.items() if k != "REFIMPL_CUDA_DEVICE"}
    command = [sys.executable, "-m", "refimpl.warmup", "--model_path", str(FP8_DIR), "--backend", "cuda"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr.startswith("refimpl: E5030") and done.stderr.count("\n") == 1
