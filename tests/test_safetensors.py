"""The safetensors reader and writer against the package; files that are wrong are in
test_hostile_safetensors.py.
"""

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

from refimpl.checkpoint import safetensors as ours
from refimpl.errors import RefimplError

DTYPES = sorted(
    ours.DTYPES.keys() - {"F8_E8M0"}
)  # which the package's numpy and torch sides of this version may lack


def raw_file(path, header, body=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@given(
    st.dictionaries(
        st.text("abc.é中", min_size=1, max_size=8), st.tuples(st.sampled_from(DTYPES), shapes), max_size=6
    ),
    st.integers(0, 99),
)
def test_what_is_written_the_package_reads_and_so_do_we(tmp_path_factory, spec, seed):
    path, rng = tmp_path_factory.mktemp("st") / "a.safetensors", np.random.default_rng(seed)
    arrays = {}
    for name, (dtype, shape) in spec.items():
        kind = ours.DTYPES[dtype]
        high = 2 if dtype == "BOOL" else 256
        data = (
            rng.integers(0, high, (*shape, kind.itemsize), dtype=np.uint8)
            if shape
            else rng.integers(0, high, kind.itemsize, dtype=np.uint8)
        )
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
        assert (
            theirs[name].contiguous().view(torch.uint8).numpy().tobytes() == array.tobytes()
            if array.size and array.ndim
            else True
        )


def test_files_of_the_package_are_read(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "a": rng.standard_normal((3, 5)).astype(np.float32),
        "b": rng.integers(0, 9, 7),
        "c": rng.standard_normal(4).astype(ml_dtypes.bfloat16),
    }
    safetensors.numpy.save_file(arrays, tmp_path / "x.safetensors", {"format": "np"})
    for name, info in ours.read(tmp_path / "x.safetensors").tensors.items():
        assert ours.view(info).tobytes() == arrays[name].tobytes()


def test_transposed_and_strided_arrays_are_written_as_they_look(tmp_path):
    x = np.arange(24, dtype=np.float32).reshape(4, 6)
    ours.save(tmp_path / "x.safetensors", {"t": ("F32", x.T), "s": ("F32", x[::-1, ::2])})
    loaded = load_file(tmp_path / "x.safetensors")
    assert (loaded["t"].numpy() == x.T).all() and (loaded["s"].numpy() == x[::-1, ::2]).all()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x.safetensors"
    ours.save(path, {"a": ("U8", np.ones(5, np.uint8))})
    before = path.read_bytes()

    def failing():
        yield b"12"
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        ours.write(path, [ours.Entry("a", "U8", (5,), failing)], force=True)
    with pytest.raises(ValueError, match="2 bytes given for 5"):
        ours.write(path, [ours.Entry("a", "U8", (5,), lambda: [b"12"])], force=True)
    with pytest.raises(ValueError, match="two tensors"):
        twice = [ours.Entry("a", "U8", (0,), lambda: []), ours.Entry("a", "U8", (0,), lambda: [])]
        ours.write(path, twice, force=True)
    with pytest.raises(RefimplError, match="E5108"):
        ours.save(path, {"a": ("U8", np.zeros(5, np.uint8))}, force=False)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def two_files(folder, weight_map=None):
    for name in "ab":
        ours.save(folder / f"{name}.safetensors", {name: ("U8", np.array([ord(name)], np.uint8))}, force=True)
    if weight_map is not None:
        (folder / ours.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_a_folder_is_read_with_and_without_index(tmp_path):
    assert ours.read_folder(two_files(tmp_path))[0].keys() == {"a", "b"}
    two_files(tmp_path, {"a": "a.safetensors", "b": "b.safetensors"})
    assert ours.read_folder(tmp_path)[0].keys() == {"a", "b"}
    (tmp_path / "b.safetensors").unlink()  # a file nobody asks for need not be there
    assert ours.read_folder(tmp_path, wanted=lambda name: name == "a")[0].keys() == {"a"}
