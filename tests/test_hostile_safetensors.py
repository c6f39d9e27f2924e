"""safetensors files and indexes by strangers, S57-S73 of the bad inputs. Files go through `inspect` and
through the merge.
"""

import json
import os
import shutil
import struct

import numpy as np
import pytest

from refimpl import inspect
from refimpl.checkpoint import safetensors as ours
from refimpl.errors import RefimplError
from refimpl.tiny import FP8_DIR
from tests.test_convert_model import rewrite
from tests.test_safetensors import entry, raw_file, two_files

ONE = b'"a": {"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
GOOD = {"a": entry()}
WHOLE = {
    "S57 empty": (b"", "E2002"),
    "S57 seven bytes": (b"1234567", "E2002"),
    "S58 header of 2^63": (struct.pack("<Q", 2**63) + b"{}", "E2002"),
    "S58 header over 100 MB": (struct.pack("<Q", 100_000_001) + b"{}", "E2002"),
    "S58 header past the end": (struct.pack("<Q", 100) + b"{}", "E2002"),
    "S59 a GGUF": (b"GGUF" + bytes(60), "E2001 .*gguf_path"),
    "S59 a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\n", "E2001 .*git lfs pull"),
    "S59 a web page": (b"<!DOCTYPE html><html></html>", "E2001 .*web page"),
    "S73 a pickle": (b"\x80\x02" + b"c" * 60, "E2001 .*never opened"),
    "S73 a zip with a pickle": (b"PK\x03\x04" + b"c" * 60, "E2001 .*never opened"),
}
HEADERS = {
    "S59 not JSON": (b"{]", b"", "E2003"),
    "S59 not UTF-8": (b'{"\xff": 1}', b"", "E2003"),
    "S59 a blank first": (b' {"a": 1}', b"", "E2003"),
    "S59 100,000 deep": (b'{"a":' + b"[" * 100_000, b"", "E2003"),
    "S59 a list": (b"[]", b"", "E2003"),
    "S59 a number of 10,000 digits": (b'{"a": ' + b"9" * 10_000 + b"}", b"", "E2003"),
    "S60 a name twice": (b"{" + ONE + b", " + ONE + b"}", b"1", "E2004"),
    "S60 a key of an entry twice": (
        ONE.replace(b'"dtype"', b'"dtype":"U8","dtype"').join((b"{", b"}")),
        b"1",
        "E2004",
    ),
    "S61 overlap": ({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12), "E2008"),
    "S62 hole": ({"a": entry(offsets=(4, 12))}, bytes(12), "E2008"),
    "S63 cut off": (GOOD, bytes(7), "E2008"),
    "S64 trailing bytes": (GOOD, bytes(9), "E2008"),
    "S65 bytes against shape": ({"a": entry(shape=(3,))}, bytes(8), "E2007"),
    "S65 offsets backwards": ({"a": entry(offsets=(8, 0))}, bytes(8), "E2007"),
    "S66 negative": ({"a": entry(shape=(-2,))}, bytes(8), "E2005"),
    "S66 overflow": ({"a": entry(shape=(2**62, 4))}, bytes(8), "E2005|E2007"),
    "S66 beyond 64 bits": ({"a": entry(shape=(2**64, 1))}, bytes(8), "E2005"),
    "S66 true as a size": ({"a": entry("U8", (True,), (0, 1))}, b"1", "E2005"),
    "S66 a fraction as a size": ({"a": entry(shape=(2.0,))}, bytes(8), "E2005"),
    "S66 nine dimensions": ({"a": entry("U8", (1,) * 9, (0, 1))}, b"1", "E2005"),
    "S65 no dtype": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8), "E2005"),
    "S65 an entry that is a number": ({"a": 1}, bytes(8), "E2005"),
    "S67 unknown dtype": ({"a": entry("F12")}, bytes(8), "E2006"),
    "S67 dtype as a number": ({"a": entry(7)}, bytes(8), "E2006"),
    "S67 dtype as a list": ({"a": entry(["F32"])}, bytes(8), "E2006"),
    "S67 F4": ({"a": entry("F4", (16,))}, bytes(8), "E2006 .*below a byte"),
    "S68 metadata number": ({"__metadata__": {"a": 1}}, b"", "E2010"),
    "S68 metadata list": ({"__metadata__": ["a"]}, b"", "E2010"),
    "S69 misaligned F32": ({"a": entry("U8", (1,), (0, 1)), "b": entry(offsets=(1, 9))}, bytes(9), "E2009"),
    "S65 empty name": ({"": entry()}, bytes(8), "E2005"),
    "S65 escape in a name": ({"\x1b[2J": entry()}, bytes(8), "E2005"),
    "S65 newline in a name": ({"a\nrefimpl: all is well": entry()}, bytes(8), "E2005"),
    "S65 name of 256": ({"n" * 256: entry()}, bytes(8), "E2005"),
}


def write(path, case):
    if case in WHOLE:
        path.write_bytes(WHOLE[case][0])
        return WHOLE[case][1]
    header, body, code = HEADERS[case]
    if not isinstance(header, bytes):  # keep data aligned, so that what is meant to be wrong is what is wrong
        text = json.dumps(header).encode()
        header = text + b" " * (-len(text) % 8)
    raw_file(path, header, body)
    return code


@pytest.mark.parametrize("case", [*WHOLE, *HEADERS])
def test_refused(case, refused, tmp_path):
    folder = tmp_path / "fp8"
    folder.mkdir()
    shutil.copy(FP8_DIR / "config.json", folder)
    code = write(folder / "stranger.safetensors", case)
    line = refused.inspect(code, folder / "stranger.safetensors")
    assert refused.merge(code, folder, output=tmp_path / "out") == line


@pytest.mark.parametrize("dtype", ["F8_E5M2", "F8_E8M0", "I8"])
def test_s67_dtypes_that_no_weight_has_are_listed_and_not_merged(dtype, accepted, refused, tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    folder = rewrite(
        FP8_DIR, tmp_path / "hf", lambda n, v: (dtype, v[1].view(ours.DTYPES[dtype])) if n == name else v
    )
    assert dtype in accepted(inspect.main, folder, name)
    refused.merge("E4012", folder, output=tmp_path / "out", names=name)


def test_s58_a_header_of_a_million_tensors(refused, tmp_path, monkeypatch):
    """Half a minute for a file of 97 MB, were they read; here with fewer."""
    entries = {f"t{i}": {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]} for i in range(9)}
    text = json.dumps(entries).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(9))
    monkeypatch.setattr(ours, "MAX_TENSORS", 8)
    refused.inspect("E2011", path)
    monkeypatch.setattr(ours, "MAX_TENSORS", 9)
    assert len(ours.read(path).tensors) == 9


def test_s63_every_truncation_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    ours.save(path, {"a": ("F32", np.ones(3, np.float32)), "b": ("U8", np.ones(5, np.uint8))})
    whole = path.read_bytes()
    for n in range(len(whole)):
        path.write_bytes(whole[:n])
        with pytest.raises(RefimplError) as caught:
            ours.read(path)
        assert "x.safetensors" in caught.value.line() and caught.value.line().isprintable()


# --- folders and their index --------------------------------------------------------------------------------

INDEXES = {
    "S70 a path upwards": ('{"weight_map": {"a": "../a.safetensors"}}', "E2101"),
    "S70 an absolute path": ('{"weight_map": {"a": "/etc/a.safetensors"}}', "E2101"),
    "S70 a path upwards on Windows": ('{"weight_map": {"a": "..\\\\a.safetensors"}}', "E2101"),
    "S70 a drive of Windows": ('{"weight_map": {"a": "C:a.safetensors"}}', "E2101|E2102"),
    "S70 a file that is no safetensors": ('{"weight_map": {"a": "pytorch_model.bin"}}', "E2101"),
    "S70 a number for a file": ('{"weight_map": {"a": 3}}', "E2101"),
    "S70 a list": ('{"weight_map": []}', "E2101"),
    "S70 no weight_map": ("{}", "E2101"),
    "S70 not an object": ("[1]", "E2101"),
    "S70 not JSON": ("{", "E2101"),
    "S70 100,000 deep": ("[" * 100_000, "E2101"),
    "S70 not UTF-8": (b"\xff\xfe{", "E2101"),
    "S70 a file that is missing": ('{"weight_map": {"a": "c.safetensors"}}', "E2102"),
    "S70 a name too long for a file": (
        json.dumps({"weight_map": {"a": "c" * 300 + ".safetensors"}}),
        "E2102|E5000",
    ),
    "S70 a tensor in another file": ('{"weight_map": {"a": "a.safetensors", "b": "a.safetensors"}}', "E2103"),
    "S71 two entries of a tensor": ('{"weight_map": {"a": "a.safetensors", "a": "b.safetensors"}}', "E2004"),
    "S72 five digits against six": ('{"weight_map": {"a": "model-00001-of-000163.safetensors"}}', "E2102"),
}


@pytest.mark.parametrize("case", INDEXES)
def test_index_refused(case, refused, tmp_path):
    text, code = INDEXES[case]
    folder = tmp_path / "fp8"
    folder.mkdir()
    two_files(folder)
    shutil.copy(folder / "a.safetensors", folder / "model-00001-of-00163.safetensors")
    (folder / ours.INDEX).write_bytes(text if isinstance(text, bytes) else text.encode())
    shutil.copy(FP8_DIR / "config.json", folder)
    refused.inspect(code, folder, names="ccc" if "too long" in case else "fp8")
    refused.merge(code, folder, output=tmp_path / "out")


def test_s70_an_index_that_is_a_pipe_or_too_large(refused, tmp_path, monkeypatch):
    two_files(tmp_path)
    os.mkfifo(tmp_path / ours.INDEX)
    refused.inspect("E5002", tmp_path, names=ours.INDEX)
    (tmp_path / ours.INDEX).unlink()
    (tmp_path / ours.INDEX).write_text('{"weight_map": {}}')
    monkeypatch.setattr(ours, "MAX_INDEX", 10)
    refused.inspect("E5004", tmp_path, names=ours.INDEX)


def test_s70_a_folder_without_index_is_read_whole(accepted, tmp_path):
    assert "2 tensors in 2 files" in accepted(inspect.main, two_files(tmp_path))


def test_s70_files_beside_those_of_the_index_and_a_wrong_total_size_do_no_harm(accepted, tmp_path):
    two_files(tmp_path)
    (tmp_path / ours.INDEX).write_text(
        json.dumps({"metadata": {"total_size": 7}, "weight_map": {"a": "a.safetensors"}})
    )
    assert "1 tensors in 1 file," in accepted(inspect.main, tmp_path)


def test_s71_a_tensor_in_two_files_without_an_index(refused, tmp_path):
    two_files(tmp_path)
    ours.save(tmp_path / "c.safetensors", {"a": ("U8", np.zeros(1, np.uint8))})
    refused.inspect("E2104", tmp_path, names="a.safetensors and c.safetensors")


def test_s72_a_shard_that_is_missing_without_an_index_is_a_missing_tensor(refused, tmp_path):
    """And the number of shards in the names is of no meaning."""
    tensors = {n: (t.dtype, np.array(ours.view(t))) for n, t in ours.read_folder(FP8_DIR)[0].items()}
    folder = tmp_path / "fp8"
    folder.mkdir()
    shutil.copy(FP8_DIR / "config.json", folder)
    ours.save(
        folder / "model-00001-of-000163.safetensors",
        {n: v for n, v in tensors.items() if "layers.2." not in n},
    )
    refused.merge("E3105", folder, output=tmp_path / "out", names="model.layers.2.")


def test_s73_pickles_are_never_opened(refused, tmp_path):
    folder = tmp_path / "torch"
    folder.mkdir()
    shutil.copy(FP8_DIR / "config.json", folder)
    for name in ("pytorch_model.bin", "model.pt"):
        (folder / name).write_bytes(b"\x80\x02cos\nsystem\n(S'touch stranger-was-here'\ntR.")
        refused.inspect("E4021", folder, names="never opened")
        refused.merge("E2105", folder, output=tmp_path / "out", names="never opened")
        refused.inspect("E1001", folder / name)
        (folder / name).unlink()
