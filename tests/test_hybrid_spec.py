"""docs/hybrid-folder.md, rule by rule: what the folder is, by a merge; what it must not be, by a folder
broken in that way alone.
"""

import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from refimpl import convert_model, formats
from refimpl.checkpoint import gguf, link, names, safetensors
from refimpl.config import DeepSeekConfig
from refimpl.errors import RefimplError
from refimpl.loading.opening import open_model
from refimpl.tiny import FP8_DIR, GGUF_FILE

PAGE = (Path(__file__).parent.parent / "docs" / "hybrid-folder.md").read_text()
CONFIG = DeepSeekConfig.from_dict(json.loads((FP8_DIR / "config.json").read_text()))
LAYER_1, LAYER_2 = "model-00002-of-00004.safetensors", "model-00003-of-00004.safetensors"
BLOB, FP8 = "blk.1.ffn_up_exps", "blk.1.attn_q_a.weight"


# --- what it is ---------------------------------------------------------------------------------------------


def test_files_are_numbered_and_hold_a_layer_each(hybrid_folder):
    files = sorted(p.name for p in hybrid_folder.glob("*.safetensors"))
    assert files == [
        f"model-{i:05d}-of-{CONFIG.num_hidden_layers:05d}.safetensors"
        for i in range(CONFIG.num_hidden_layers + 1)
    ]
    assert not [p for p in hybrid_folder.iterdir() if p.is_dir()]
    for i, file in enumerate(files):
        held = safetensors.read(hybrid_folder / file).tensors
        assert {names.layer_of(n) for n in held} == {i - 1 if i else None}
        assert all(names.is_gguf(n) for n in held)
    assert set(safetensors.read(hybrid_folder / files[0]).tensors) == {
        "token_embd.weight",
        "output_norm.weight",
        "output.weight",
    }


def test_matrices_lie_beside_their_scales_and_blobs_beside_their_types(hybrid_folder):
    truth, stacks = safetensors.read_folder(FP8_DIR)[0], gguf.read(GGUF_FILE).tensors
    for path in hybrid_folder.glob("*.safetensors"):
        header = safetensors.read(path)
        for name, info in header.tensors.items():
            if info.dtype == "F8_E4M3":
                scale = header.tensors[name + "_scale_inv"]
                assert (scale.dtype, scale.shape) == ("F32", tuple(-(-n // 128) for n in info.shape))
            elif info.dtype == "U8":
                kind, stack = header.tensors[name.removesuffix(".weight") + ".ggml_type"], stacks[name]
                assert (kind.dtype, kind.shape, len(info.shape)) == ("I64", (), 1)
                assert int(safetensors.view(kind)) == formats.type_id(stack.dtype)
                assert safetensors.view(info).tobytes() == bytes(gguf.view(stack).data.reshape(-1))
                assert header.metadata[name + ".shape"] == ",".join(map(str, stack.shape))
            elif not name.endswith(".ggml_type"):
                source = truth[names.to_hf(name)]
                assert (info.dtype, info.shape) == (source.dtype, source.shape) and info.dtype in (
                    "BF16",
                    "F16",
                    "F32",
                )
        assert header.metadata["refimpl.format_version"] == "1"


def test_config_index_and_manifest_are_what_the_page_says(hybrid_folder):
    assert (hybrid_folder / "config.json").read_bytes() == (FP8_DIR / "config.json").read_bytes()
    tensors, _ = safetensors.read_folder(hybrid_folder)
    placed = json.loads((hybrid_folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert placed == {n: t.path.name for n, t in tensors.items()}
    sums = json.loads((hybrid_folder / "refimpl-manifest.json").read_text())["sha256"]
    assert sums == {n: hashlib.sha256(safetensors.view(t).tobytes()).hexdigest() for n, t in tensors.items()}


def test_a_folder_without_anything_of_ours_is_the_same_model(hybrid_folder, tmp_path):
    bare = tmp_path / "kt"
    bare.mkdir()
    for path in hybrid_folder.glob("*.safetensors"):
        tensors = {n: (t.dtype, safetensors.view(t)) for n, t in safetensors.read(path).tensors.items()}
        safetensors.save(bare / path.name, tensors)
    ids = [1, 2, 3]
    there = open_model(bare, "reference", config_folder=FP8_DIR).logits(ids)
    np.testing.assert_array_equal(there, open_model(hybrid_folder, "reference").logits(ids))


# --- what is not allowed ------------------------------------------------------------------------------------


def edit(folder: Path, file: str, change, metadata=None) -> None:
    """Write a file anew after `change` of {name: (dtype, array)}, and the index to match."""
    header = safetensors.read(folder / file)
    tensors = {n: (t.dtype, np.array(safetensors.view(t))) for n, t in header.tensors.items()}
    change(tensors)
    safetensors.save(folder / file, tensors, header.metadata | (metadata or {}))
    (folder / safetensors.INDEX).unlink(missing_ok=True)


def drop(name: str):
    return lambda folder: edit(folder, LAYER_1, lambda t: t.pop(name))


def put(name: str, dtype: str, array: np.ndarray):
    return lambda folder: edit(folder, LAYER_1, lambda t: t.update({name: (dtype, array)}))


def described(key: str, value: str):
    return lambda folder: edit(folder, LAYER_1, lambda t: None, {key: value})


def move_in_index(folder: Path) -> None:
    index = folder / safetensors.INDEX
    raw = json.loads(index.read_text())
    raw["weight_map"][FP8] = LAYER_2
    index.write_text(json.dumps(raw))


def cut(folder: Path) -> None:
    with open(folder / LAYER_1, "r+b") as file:
        file.truncate((folder / LAYER_1).stat().st_size - 1)


def flip(folder: Path) -> None:
    with open(folder / LAYER_1, "r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))


BROKEN = {
    "a file is no safetensors file": lambda f: (f / LAYER_1).write_bytes(b"\xff" * 64),
    "a file is cut off, or has holes, overlaps or bytes behind the last tensor": cut,
    "a tensor is in two files": lambda f: edit(
        f, LAYER_2, lambda t: t.update({FP8: ("F8_E4M3", np.zeros((96, 256), np.uint8))})
    ),
    "the index names a file that is not there": lambda f: (f / LAYER_1).unlink(),
    "the index places a tensor in the wrong file": move_in_index,
    "a name is none of DeepSeek-V3's": put("blk.1.attn_sinks.weight", "F32", np.zeros(4, np.float32)),
    "a tensor of the model is missing": drop("blk.1.attn_norm.weight"),
    "a tensor has another shape than the config says": put(
        "blk.1.attn_norm.weight", "BF16", np.zeros(128, np.uint16)
    ),
    "a tensor has a type that no weight has": put("blk.1.attn_norm.weight", "I32", np.zeros(256, np.int32)),
    "an FP8 matrix has no scales": drop(FP8 + "_scale_inv"),
    "the scales do not fit their matrix": put(FP8 + "_scale_inv", "F32", np.ones((1, 1), np.float32)),
    "a blob has no GGML type": drop(BLOB + ".ggml_type"),
    "a blob is longer or shorter than its shape and type": put(
        BLOB + ".weight", "U8", np.zeros(144, np.uint8)
    ),
    "a shape in the metadata is no list of numbers": described(BLOB + ".weight.shape", "8x256x256"),
    'the version is newer than "1"': described("refimpl.format_version", "2"),
    "a GGML type does not exist": put(BLOB + ".ggml_type", "I64", np.array(999)),
    "a GGML type is known by name only, IQ2_XXS for example": put(BLOB + ".ggml_type", "I64", np.array(16)),
    "there is no config, in the folder or beside it": lambda f: (f / "config.json").unlink(),
    "a checksum of the manifest does not match (`--verify`)": flip,
    "the link is malformed": lambda f: (f / link.LINK).write_text("{}"),
    "a linked GGUF is missing, or another than was linked": lambda f: (f / link.LINK).write_text(
        link.text([GGUF_FILE], f).replace('"size": ', '"size": 1')
    ),
}
TABLE = dict(re.findall(r"^\| (.+?) \| (E\d{4}) \|$", PAGE, re.M))


def test_every_rule_of_the_page_has_its_broken_folder():
    assert TABLE.keys() == BROKEN.keys()


@pytest.mark.parametrize("rule", BROKEN)
def test_a_broken_folder_is_refused_with_the_code_of_the_page(hybrid_folder, tmp_path, rule):
    folder = tmp_path / "broken"
    shutil.copytree(hybrid_folder, folder)
    BROKEN[rule](folder)
    with pytest.raises(RefimplError) as refused:
        if "--verify" in rule:
            convert_model.verify(folder)
        open_model(folder, "reference").logits([1, 2, 3, 4, 5, 6, 7, 8])
    assert refused.value.code == TABLE[rule], refused.value
