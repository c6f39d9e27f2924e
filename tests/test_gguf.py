"""The GGUF reader and writer against gguf-py, and against files that are wrong."""

import struct

import gguf as gguf_py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refimpl import formats
from refimpl import gguf as ours
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


def gguf_bytes(tensors=None, kvs=(), data=bytes(16), *, version=3, n_tensors=None, n_kv=None, magic=b"GGUF") -> bytes:
    tensors = (tensor(),) if tensors is None else tensors
    head = magic + struct.pack("<IQQ", version, len(tensors) if n_tensors is None else n_tensors, len(kvs) if n_kv is None else n_kv)
    head += b"".join(kvs) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + data


def read(tmp_path, data: bytes) -> ours.File:
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    return ours.read(path)


def test_a_file_by_hand_is_read(tmp_path):
    values = struct.pack("<4f", 1, 2, 3, 4)
    kvs = [kv("n", 4, struct.pack("<I", 7)), kv("s", 8, string("é")), kv("b", 7, b"\x01"), kv("f", 6, struct.pack("<f", 0.5))]
    kvs += [kv("list", 9, struct.pack("<IQ", 8, 2) + string("x") + string(b"\xff")), kv("i64", 11, struct.pack("<q", -5))]
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
        assert (info.offset, info.nbytes, info.shape) == (t.data_offset, t.n_bytes, tuple(int(n) for n in reversed(t.shape)))
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
    writer.add_tensor("q", gguf_py.quants.quantize(x, gguf_py.GGMLQuantizationType.Q8_0), raw_dtype=gguf_py.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = ours.read(tmp_path / "x.gguf")
    assert file.metadata["deepseek2.block_count"] == 3 and file.metadata["tokenizer.ggml.tokens"] == ["a", "b"]
    assert (formats.dequantize(0, ours.view(file.tensors["x"]).data) == x).all()
    assert file.tensors["q"].dtype == "Q8_0" and file.tensors["q"].shape == (3, 64)


big = struct.pack("<Q", 2**63)
BAD = {
    "1 empty": (b"", "E1001"),
    "2 short": (b"GGUF\x03\x00\x00\x00", "E1005"),
    "3 a page": (b"<!DOCTYPE html>", "E1001"),
    "3 a pointer": (b"version https://git-lfs.github.com/spec/v1", "E1001"),
    "3 safetensors": (struct.pack("<Q", 40) + b'{"a":{}}' + bytes(40), "E1001 .*safetensor_path"),
    "4 version 1": (gguf_bytes(version=1), "E1002"),
    "5 version 4": (gguf_bytes(version=4), "E1002"),
    "6 big endian": (gguf_bytes(version=int.from_bytes(b"\0\0\0\3", "little")), "E1003"),
    "7 FUGG": (gguf_bytes(magic=b"FUGG"), "E1001"),
    "8 tensors 2^63": (gguf_bytes(n_tensors=2**63), "E1004"),
    "9 keys 2^63": (gguf_bytes(n_kv=2**63), "E1004"),
    "10 no tensors": (gguf_bytes([], data=b""), "E1004"),
    "11 key of 2^63": (gguf_bytes(kvs=[big + b"x" * 20]), "E1005"),
    "12 empty key": (gguf_bytes(kvs=[kv("", 4, bytes(4))]), "E1006"),
    "13 key not UTF-8": (gguf_bytes(kvs=[kv(b"\xff\xfe", 4, bytes(4))]), "E1006"),
    "14 key twice": (gguf_bytes(kvs=[kv("a", 4, bytes(4))] * 2), "E1102"),
    "15 type 13": (gguf_bytes(kvs=[kv("a", 13, bytes(4))]), "E1007"),
    "16 string past the end": (gguf_bytes(kvs=[kv("a", 8, struct.pack("<Q", 10_000))]), "E1005"),
    "17 value not UTF-8": (gguf_bytes(kvs=[kv("general.name", 8, string(b"\xff"))]), "E1006"),
    "18 array of 2^63": (gguf_bytes(kvs=[kv("a", 9, struct.pack("<I", 4) + big)]), "E1008"),
    "19 array larger than the file": (gguf_bytes(kvs=[kv("a", 9, struct.pack("<IQ", 12, 5_000_000))]), "E1008"),
    "20 array of arrays": (gguf_bytes(kvs=[kv("a", 9, struct.pack("<IQ", 9, 1) * 3000)]), "E1008"),
    "22 a bool of 2": (gguf_bytes(kvs=[kv("a", 7, b"\x02")]), "E1007"),
    "23 alignment 0": (gguf_bytes(kvs=[kv("general.alignment", 4, struct.pack("<I", 0))]), "E1009"),
    "23 alignment 13": (gguf_bytes(kvs=[kv("general.alignment", 4, struct.pack("<I", 13))]), "E1009"),
    "23 alignment 2^31": (gguf_bytes(kvs=[kv("general.alignment", 4, struct.pack("<I", 2**31))]), "E1009"),
    "23 alignment text": (gguf_bytes(kvs=[kv("general.alignment", 8, string("32"))]), "E1009"),
    "25 tensor without name": (gguf_bytes([tensor("")]), "E1101"),
    "26 long name": (gguf_bytes([tensor("a" * 300)]), "E1005"),
    "27 NUL": (gguf_bytes([tensor("a\0b")]), "E1101"),
    "27 escape": (gguf_bytes([tensor("a\x1b[2J")]), "E1101"),
    "27 path": (gguf_bytes([tensor("../a")]), "E1101"),
    "28 tensor twice": (gguf_bytes([tensor(), tensor(offset=32)], data=bytes(48)), "E1102"),
    "29 no dimension": (gguf_bytes([tensor(n=0)]), "E1103"),
    "29 five dimensions": (gguf_bytes([tensor(ne=(1,) * 5)]), "E1103"),
    "29 a million": (gguf_bytes([tensor(n=10**6)]), "E1103"),
    "30 dimension 0": (gguf_bytes([tensor(ne=(4, 0))]), "E1103"),
    "31 dimension 2^63": (gguf_bytes([tensor(ne=(2**63,))]), "E1103"),
    "32 product wraps to 4": (gguf_bytes([tensor(ne=(2**32 + 4, 2**32))]), "E1103"),
    "33 bytes beyond": (gguf_bytes([tensor(ne=(2**61,))]), "E1106"),
    "34 ragged Q4_K": (gguf_bytes([tensor(ne=(100,), kind=12)]), "E1104"),
    "35 removed type": (gguf_bytes([tensor(kind=4)]), "E1301 .*Q4_2"),
    "36 type 999": (gguf_bytes([tensor(kind=999)]), "E1302"),
    "37 IQ1_S": (gguf_bytes([tensor(ne=(256,), kind=19)]), "E1301 .*IQ1_S"),
    "37 MXFP4": (gguf_bytes([tensor(ne=(256,), kind=39)]), "E1301 .*MXFP4"),
    "38 offset 2^64-32": (gguf_bytes([tensor(offset=2**64 - 32)]), "E1105"),
    "39 offset past the end": (gguf_bytes([tensor(offset=1 << 20)]), "E1105"),
    "40 misaligned": (gguf_bytes([tensor(), tensor("b", offset=16)], data=bytes(48)), "E1105"),
    "41 overlap": (gguf_bytes([tensor(), tensor("b", offset=0)], data=bytes(48)), "E1105"),
    "42 gap": (gguf_bytes([tensor(), tensor("b", offset=64)], data=bytes(96)), "E1105"),
    "43 truncated data": (gguf_bytes(data=bytes(15)), "E1106"),
    "45 trailing": (gguf_bytes(data=bytes(16) + b"PK\x03\x04" * 9), "E1106"),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_files_are_refused_in_one_line(tmp_path, name):
    data, code = BAD[name]
    with pytest.raises(RefimplError, match=code) as caught:
        read(tmp_path, data)
    line = caught.value.line()
    assert line.isprintable() and str(tmp_path) in line


def test_every_truncation_is_refused(tmp_path):
    whole = gguf_bytes(kvs=[kv("s", 8, string("abc")), kv("l", 9, struct.pack("<IQ", 5, 2) + bytes(8))])
    read(tmp_path, whole)
    for n in range(len(whole)):
        with pytest.raises(RefimplError):
            read(tmp_path, whole[:n])


@given(at=st.integers(0, 10**6), to=st.integers(0, 255))
def test_a_flipped_byte_raises_nothing_but_our_errors(tmp_path_factory, at, to):
    whole = bytearray(
        gguf_bytes([tensor("t", (256,), 12)], [kv("s", 8, string("abc")), kv("l", 9, struct.pack("<IQ", 8, 1) + string("x"))], bytes(144))
    )
    whole[at % len(whole)] = to
    try:
        read(tmp_path_factory.getbasetemp(), bytes(whole))
    except RefimplError as error:
        assert error.line().isprintable()


def test_folders_pipes_and_missing_files_are_refused(tmp_path):
    with pytest.raises(RefimplError, match="E5002"):
        ours.read(tmp_path)
    with pytest.raises(OSError):
        ours.read(tmp_path / "none.gguf")


# --- split files ------------------------------------------------------------------------------------------------------------------------------


def split(folder, count=3, *, stem="m", nos=None, counts=None, total=None, names="abc"):
    for i in range(count):
        meta = {"general.architecture": "deepseek2", "split.no": i if nos is None else nos[i], "split.count": count if counts is None else counts[i]}
        meta["split.tensors.count"] = count if total is None else total
        ours.write(folder / f"{stem}-{i + 1:05d}-of-{count:05d}.gguf", meta, [ours.Entry(names[i], 0, (8,), lambda i=i: [bytes([i]) * 32])])
    return folder


@pytest.mark.parametrize("given", ["folder", 0, 2])
def test_a_split_model_is_read_whole_from_any_part(tmp_path, given):
    split(tmp_path)
    path = tmp_path if given == "folder" else tmp_path / f"m-{given + 1:05d}-of-00003.gguf"
    file = ours.read_all(path)
    assert list(file.tensors) == ["a", "b", "c"] and file.metadata["split.no"] == 0
    assert ours.view(file.tensors["c"]).data[0] == 2


def test_wrong_splits_are_refused(tmp_path):
    cases = {
        "nos": ({"nos": [0, 2, 1]}, "E1202"),
        "counts": ({"counts": [3, 3, 4]}, "E1202"),
        "total": ({"total": 4}, "E1202"),
        "twice": ({"names": "aba"}, "E1202"),
    }
    for name, (change, code) in cases.items():
        folder = tmp_path / name
        folder.mkdir()
        with pytest.raises(RefimplError, match=code):
            ours.read_all(split(folder, **change))
    folder = tmp_path / "missing"
    folder.mkdir()
    (split(folder) / "m-00002-of-00003.gguf").unlink()
    with pytest.raises(RefimplError, match=r"E1201 .*m-00002-of-00003\.gguf"):
        ours.read_all(folder)


def test_a_merged_file_that_kept_its_split_count_of_zero_is_one_file(tmp_path):
    ours.write(tmp_path / "m.gguf", {"split.count": 0, "general.architecture": "deepseek2"}, [ours.Entry("a", 0, (8,), lambda: [bytes(32)])])
    assert list(ours.read_all(tmp_path).tensors) == ["a"]


def test_the_model_is_found_beside_a_projector_and_two_models_are_refused(tmp_path):
    write = lambda name, arch: ours.write(tmp_path / name, {"general.architecture": arch}, [ours.Entry(arch, 0, (8,), lambda: [bytes(32)])])  # noqa: E731
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
        ({"a": None}, [one], "no GGUF type"),
        ({}, [one, one], "one name"),
        ({}, [one._replace(shape=(16,))], "32 bytes given for 64"),
    ):
        with pytest.raises(ValueError, match=why):
            ours.write(tmp_path / "x.gguf", meta, entries)
    assert not list(tmp_path.iterdir())
