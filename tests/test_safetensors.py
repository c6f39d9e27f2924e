"""The safetensors reader and writer against the package, and against files that are wrong."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from refimpl import safetensors as ours
from refimpl.errors import RefimplError

DTYPES = sorted(ours.DTYPES.keys() - {"F8_E8M0"})  # which the package's numpy and torch sides of this version may lack


def raw_file(path, header, body=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@given(st.dictionaries(st.text("abc.é中", min_size=1, max_size=8), st.tuples(st.sampled_from(DTYPES), shapes), max_size=6), st.integers(0, 99))
def test_what_is_written_the_package_reads_and_so_do_we(tmp_path_factory, spec, seed):
    path, rng = tmp_path_factory.mktemp("st") / "a.safetensors", np.random.default_rng(seed)
    arrays = {}
    for name, (dtype, shape) in spec.items():
        kind = ours.DTYPES[dtype]
        high = 2 if dtype == "BOOL" else 256
        data = rng.integers(0, high, (*shape, kind.itemsize), dtype=np.uint8) if shape else rng.integers(0, high, kind.itemsize, dtype=np.uint8)
        arrays[name] = (dtype, np.ascontiguousarray(data).view(kind).reshape(shape))
    ours.save(path, arrays, {"key": "value"})
    header = ours.read(path)
    assert header.metadata == {"key": "value"}
    theirs = load_file(path)
    assert header.tensors.keys() == theirs.keys() == arrays.keys()
    for name, (dtype, array) in arrays.items():
        info = header.tensors[name]
        assert (info.dtype, info.shape) == (dtype, array.shape)
        view = ours.view(info)
        assert view.tobytes() == array.tobytes()
        assert not view.flags.writeable
        assert theirs[name].contiguous().view(torch.uint8).numpy().tobytes() == array.tobytes() if array.size and array.ndim else True


def test_files_of_the_package_are_read(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {"a": rng.standard_normal((3, 5)).astype(np.float32), "b": rng.integers(0, 9, 7), "c": rng.standard_normal(4).astype(ml_dtypes.bfloat16)}
    safetensors.numpy.save_file(arrays, tmp_path / "x.safetensors", {"format": "np"})
    for name, info in ours.read(tmp_path / "x.safetensors").tensors.items():
        assert ours.view(info).tobytes() == arrays[name].tobytes()


def test_transposed_and_strided_arrays_are_written_as_they_look(tmp_path):
    x = np.arange(24, dtype=np.float32).reshape(4, 6)
    ours.save(tmp_path / "x.safetensors", {"t": ("F32", x.T), "s": ("F32", x[::-1, ::2])})
    loaded = load_file(tmp_path / "x.safetensors")
    assert (loaded["t"].numpy() == x.T).all() and (loaded["s"].numpy() == x[::-1, ::2]).all()


GOOD = {"a": entry()}
BAD = {
    "empty": (b"", "E2002"),
    "seven bytes": (b"1234567", "E2002"),
    "header of 2^63": (struct.pack("<Q", 2**63) + b"{}", "E2002"),
    "header past the end": (struct.pack("<Q", 100) + b"{}", "E2002"),
    "a GGUF": (b"GGUF" + bytes(60), "E2001"),
    "a pickle": (b"\x80\x02" + b"c" * 60, "E2001"),
    "a zip": (b"PK\x03\x04" + b"c" * 60, "E2001"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\n", "E2001"),
    "a page": (b"<!DOCTYPE html><html></html>", "E2001"),
}


@pytest.mark.parametrize("name", BAD)
def test_other_files_are_refused_by_what_they_are(tmp_path, name):
    data, code = BAD[name]
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(RefimplError, match=code):
        ours.read(path)


HEADERS = {
    "not JSON": (b"{]", b"", "E2003"),
    "not UTF-8": (b'{"\xff": 1}', b"", "E2003"),
    "a blank first": (b' {"a": 1}', b"", "E2003"),
    "deep": (b'{"a":' + b"[" * 100_000, b"", "E2003"),
    "a list": (b"[]", b"", "E2003"),
    "twice": (b'{"a": {"dtype":"U8","shape":[1],"data_offsets":[0,1]}, "a": {"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"1", "E2004"),
    "overlap": ({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12), "E2008"),
    "hole": ({"a": entry(offsets=(4, 12))}, bytes(12), "E2008"),
    "cut off": (GOOD, bytes(7), "E2008"),
    "trailing": (GOOD, bytes(9), "E2008"),
    "bytes against shape": ({"a": entry(shape=(3,))}, bytes(8), "E2007"),
    "negative": ({"a": entry(shape=(-2,))}, bytes(8), "E2005"),
    "overflow": ({"a": entry(shape=(2**62, 4))}, bytes(8), "E2007"),
    "true as a size": ({"a": entry("U8", (True,), (0, 1))}, b"1", "E2005"),
    "no dtype": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8), "E2005"),
    "unknown dtype": ({"a": entry("F12")}, bytes(8), "E2006"),
    "F4": ({"a": entry("F4", (16,))}, bytes(8), "E2006"),
    "metadata number": ({"__metadata__": {"a": 1}}, b"", "E2010"),
    "misaligned": ({"a": entry("U8", (1,), (0, 1)), "b": entry(offsets=(1, 9))}, bytes(9), "E2009"),
    "empty name": ({"": entry()}, bytes(8), "E2005"),
    "escape in a name": ({"\x1b[2J": entry()}, bytes(8), "E2005"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_wrong_headers_are_refused_in_one_line(tmp_path, name):
    header, body, code = HEADERS[name]
    if not isinstance(header, bytes):  # keep data aligned, so that what is meant to be wrong is what is wrong
        text = json.dumps(header).encode()
        header = text + b" " * (-len(text) % 8)
    with pytest.raises(RefimplError, match=code) as caught:
        ours.read(raw_file(tmp_path / "x.safetensors", header, body))
    assert "\n" not in caught.value.line() and "\x1b" not in caught.value.line()


def test_every_truncation_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    ours.save(path, {"a": ("F32", np.ones(3, np.float32)), "b": ("U8", np.ones(5, np.uint8))})
    whole = path.read_bytes()
    for n in range(len(whole)):
        path.write_bytes(whole[:n])
        with pytest.raises(RefimplError):
            ours.read(path)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x.safetensors"
    ours.save(path, {"a": ("U8", np.ones(5, np.uint8))})
    before = path.read_bytes()

    def failing():
        yield b"12"
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        ours.write(path, [ours.Entry("a", "U8", (5,), failing)])
    with pytest.raises(ValueError, match="2 bytes given for 5"):
        ours.write(path, [ours.Entry("a", "U8", (5,), lambda: [b"12"])])
    with pytest.raises(ValueError, match="two tensors"):
        ours.write(path, [ours.Entry("a", "U8", (0,), lambda: []), ours.Entry("a", "U8", (0,), lambda: [])])
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def two_files(folder, weight_map=None):
    for name in "ab":
        ours.save(folder / f"{name}.safetensors", {name: ("U8", np.array([ord(name)], np.uint8))})
    if weight_map is not None:
        (folder / ours.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_a_folder_is_read_with_and_without_index(tmp_path):
    assert ours.read_folder(two_files(tmp_path))[0].keys() == {"a", "b"}
    two_files(tmp_path, {"a": "a.safetensors", "b": "b.safetensors"})
    assert ours.read_folder(tmp_path)[0].keys() == {"a", "b"}
    (tmp_path / "b.safetensors").unlink()  # a file nobody asks for need not be there
    assert ours.read_folder(tmp_path, wanted=lambda name: name == "a")[0].keys() == {"a"}


@pytest.mark.parametrize(
    ("weight_map", "code"),
    [
        ({"a": "../a.safetensors"}, "E2101"),
        ({"a": "/etc/a.safetensors"}, "E2101"),
        ({"a": "..\\a.safetensors"}, "E2101"),
        ({"a": 3}, "E2101"),
        ([], "E2101"),
        ({"a": "c.safetensors"}, "E2102"),
        ({"a": "a.safetensors", "b": "a.safetensors"}, "E2103"),
    ],
)
def test_wrong_indexes_are_refused(tmp_path, weight_map, code):
    with pytest.raises(RefimplError, match=code):
        ours.read_folder(two_files(tmp_path, weight_map))


def test_folders_without_safetensors_and_with_a_tensor_twice_are_refused(tmp_path):
    with pytest.raises(RefimplError, match=r"E2105"):
        ours.read_folder(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(RefimplError, match=r"E2105 .*pickles"):
        ours.read_folder(tmp_path)
    two_files(tmp_path)
    ours.save(tmp_path / "c.safetensors", {"a": ("U8", np.zeros(1, np.uint8))})
    with pytest.raises(RefimplError, match=r"E2104 .*a\.safetensors and c\.safetensors"):
        ours.read_folder(tmp_path)
