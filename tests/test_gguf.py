"""The GGUF reader and writer against gguf-py; files that are wrong are in test_hostile_gguf.py."""

import struct

import gguf as gguf_py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refimpl import formats
from refimpl.checkpoint import gguf as ours
from refimpl.errors import RefimplError
from refimpl.tensors import Packed

TYPES = sorted(formats.FORMATS.keys() - {15})  # Q8_K is an activation format; no file holds it


def string(text: bytes | str) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def kv(key, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def tensor(name="a", ne=(4,), kind=0, offset=0, n=None) -> bytes:
    return string(name) + struct.pack(f"<I{len(ne)}QIQ", len(ne) if n is None else n, *ne, kind, offset)


def gguf_bytes(
    tensors=None, kvs=(), data=bytes(16), *, version=3, n_tensors=None, n_kv=None, magic=b"GGUF"
) -> bytes:
    tensors = (tensor(),) if tensors is None else tensors
    head = magic + struct.pack(
        "<IQQ", version, len(tensors) if n_tensors is None else n_tensors, len(kvs) if n_kv is None else n_kv
    )
    head += b"".join(kvs) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + data


def read(tmp_path, data: bytes) -> ours.File:
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    return ours.read(path)


def test_a_file_by_hand_is_read(tmp_path):
    values = struct.pack("<4f", 1, 2, 3, 4)
    kvs = [
        kv("n", 4, struct.pack("<I", 7)),
        kv("s", 8, string("é")),
        kv("b", 7, b"\x01"),
        kv("f", 6, struct.pack("<f", 0.5)),
    ]
    kvs += [
        kv("list", 9, struct.pack("<IQ", 8, 2) + string("x") + string(b"\xff")),
        kv("i64", 11, struct.pack("<q", -5)),
    ]
    file = read(tmp_path, gguf_bytes([tensor(ne=(2, 2))], kvs, values))
    assert file.metadata == {"n": 7, "s": "é", "b": True, "f": 0.5, "list": ["x", "\udcff"], "i64": -5}
    weight = ours.view(file.tensors["a"])
    assert weight.shape == (2, 2) and formats.dequantize(0, weight.data).tolist() == [[1, 2], [3, 4]]
    assert read(tmp_path, gguf_bytes(version=2)).version == 2


metadata = st.dictionaries(
    st.text("abc.é", min_size=1, max_size=9),
    st.one_of(
        st.booleans(),
        st.integers(0, 2**32 - 1),
        st.floats(width=32, allow_nan=False),
        st.text("xyz中\n", max_size=9),
        st.lists(st.text("xy", max_size=3), min_size=1, max_size=4),
        st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=4),
        st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=4),
    ),
    max_size=5,
)


@given(meta=metadata, kinds=st.lists(st.sampled_from(TYPES), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_what_is_written_gguf_py_reads_and_so_do_we(tmp_path_factory, meta, kinds, seed):
    path, rng = tmp_path_factory.mktemp("gguf") / "a.gguf", np.random.default_rng(seed)
    entries, data = [], {}
    for i, kind in enumerate(kinds):
        shape = (*rng.integers(1, 4, rng.integers(0, 3)).tolist(), 256 * int(rng.integers(1, 3)))
        data[f"t{i}"] = rng.integers(0, 256, formats.nbytes(kind, shape), dtype=np.uint8)
        entries.append(ours.Entry(f"t{i}", kind, shape, lambda i=i: [data[f"t{i}"].tobytes()]))
    ours.write(path, {"general.architecture": "deepseek2"} | meta, entries)
    file, theirs = ours.read(path), gguf_py.GGUFReader(path)
    assert file.metadata == {"general.architecture": "deepseek2"} | meta
    assert {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")} == file.metadata
    for t in theirs.tensors:
        info = file.tensors[t.name]
        assert (info.offset, info.nbytes, info.shape) == (
            t.data_offset,
            t.n_bytes,
            tuple(int(n) for n in reversed(t.shape)),
        )
        assert info.dtype == t.tensor_type.name
        weight = ours.view(info)
        assert isinstance(weight, Packed) and not weight.data.flags.writeable
        assert weight.data.tobytes() == data[t.name].tobytes() == t.data.tobytes()


def test_files_of_gguf_py_are_read(tmp_path):
    writer = gguf_py.GGUFWriter(tmp_path / "x.gguf", "deepseek2")
    writer.add_uint32("deepseek2.block_count", 3)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    x = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
    writer.add_tensor("x", x)
    writer.add_tensor(
        "q",
        gguf_py.quants.quantize(x, gguf_py.GGMLQuantizationType.Q8_0),
        raw_dtype=gguf_py.GGMLQuantizationType.Q8_0,
    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = ours.read(tmp_path / "x.gguf")
    assert file.metadata["deepseek2.block_count"] == 3 and file.metadata["tokenizer.ggml.tokens"] == [
        "a",
        "b",
    ]
    assert (formats.dequantize(0, ours.view(file.tensors["x"]).data) == x).all()
    assert file.tensors["q"].dtype == "Q8_0" and file.tensors["q"].shape == (3, 64)


@given(at=st.integers(0, 10**6), to=st.integers(0, 255))
def test_a_flipped_byte_raises_nothing_but_our_errors(tmp_path_factory, at, to):
    whole = bytearray(
        gguf_bytes(
            [tensor("t", (256,), 12)],
            [kv("s", 8, string("abc")), kv("l", 9, struct.pack("<IQ", 8, 1) + string("x"))],
            bytes(144),
        )
    )
    whole[at % len(whole)] = to
    try:
        read(tmp_path_factory.getbasetemp(), bytes(whole))
    except RefimplError as error:
        assert error.line().isprintable()


# --- split files --------------------------------------------------------------------------------------------


def split(folder, count=3, *, stem="m", nos=None, counts=None, total=None, names="abc"):
    for i in range(count):
        meta = {
            "general.architecture": "deepseek2",
            "split.no": i if nos is None else nos[i],
            "split.count": count if counts is None else counts[i],
        }
        meta["split.tensors.count"] = count if total is None else total
        ours.write(
            folder / f"{stem}-{i + 1:05d}-of-{count:05d}.gguf",
            meta,
            [ours.Entry(names[i], 0, (8,), lambda i=i: [bytes([i]) * 32])],
        )
    return folder


@pytest.mark.parametrize("given", ["folder", 0, 2])
def test_a_split_model_is_read_whole_from_any_part(tmp_path, given):
    split(tmp_path)
    path = tmp_path if given == "folder" else tmp_path / f"m-{given + 1:05d}-of-00003.gguf"
    file = ours.read_all(path)
    assert list(file.tensors) == ["a", "b", "c"] and file.metadata["split.no"] == 0
    assert ours.view(file.tensors["c"]).data[0] == 2


def test_the_model_is_found_beside_a_projector_and_two_models_are_refused(tmp_path):
    def write(name, arch):
        return ours.write(
            tmp_path / name, {"general.architecture": arch}, [ours.Entry(arch, 0, (8,), lambda: [bytes(32)])]
        )

    with pytest.raises(RefimplError, match=r"E1203 .*none"):
        ours.read_all(tmp_path)
    write("model.gguf", "deepseek2")
    write("mmproj.gguf", "clip")
    assert list(ours.read_all(tmp_path).tensors) == ["deepseek2"]
    write("other.gguf", "deepseek2")
    with pytest.raises(RefimplError, match=r"E1203 .*model\.gguf, other\.gguf"):
        ours.read_all(tmp_path)


def test_the_writer_refuses_what_it_cannot_say(tmp_path):
    one = ours.Entry("a", 0, (8,), lambda: [bytes(32)])
    for meta, entries, why in (
        ({"a": None}, [one], "E4007 "),
        ({"a": 2**32}, [one], "E4006 "),
        ({"a": [0, 2**31]}, [one], "E4006 "),
        ({"a": 1e39}, [one], "E4006 "),
        ({"a": "\ud800"}, [one], "E1006 "),
        ({}, [one._replace(name="a" * 256)], "E4007 "),
        ({}, [one, one], "one name"),
        ({}, [one._replace(shape=(16,))], "32 bytes given for 64"),
    ):
        with pytest.raises((ValueError, RefimplError), match=why):
            ours.write(tmp_path / "x.gguf", meta, entries)
    assert not list(tmp_path.iterdir())
