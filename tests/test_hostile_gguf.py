"""GGUF files by strangers, G1-G46 and P47-P56 of the bad inputs that must be refused in one line, or are no
fault and read.

Each file goes through two commands, `inspect` and the merge; numbers stand in the tests' names, so that
`pytest -k G18` runs one.
"""

import builtins
import os
import shutil
import struct

import pytest

from refimpl import formats, inspect
from refimpl.checkpoint import gguf as ours
from refimpl.errors import RefimplError
from refimpl.merge import merge_plan
from refimpl.tiny import FP8_DIR, GGUF_FILE
from tests.test_gguf import gguf_bytes, kv, split, string, tensor

big = struct.pack("<Q", 2**63)
ALIGNMENT = "general.alignment"


def array(kind: int, n: int, body: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, n) + body


REFUSED = {
    "G1 empty": (b"", "E1001"),
    "G2 shorter than a head": (b"GGUF\x03\x00\x00\x00", "E1005"),
    "G3 a web page": (b"<!DOCTYPE html>", "E1001 .*web page"),
    "G3 a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1", "E1001 .*git lfs pull"),
    "G3 a zip": (b"PK\x03\x04" + bytes(60), "E1001 .*zip"),
    "G3 safetensors": (struct.pack("<Q", 40) + b'{"a":{}}' + bytes(40), "E1001 .*safetensor_path"),
    "G4 version 0": (gguf_bytes(version=0), "E1002"),
    "G4 version 1": (gguf_bytes(version=1), "E1002"),
    "G5 version 4": (gguf_bytes(version=4), "E1002"),
    "G5 version 2^32-1": (gguf_bytes(version=2**32 - 1), "E1002"),
    "G6 big endian": (gguf_bytes(version=int.from_bytes(b"\0\0\0\3", "little")), "E1003"),
    "G7 FUGG": (gguf_bytes(magic=b"FUGG"), "E1001 .*big endian"),
    "G8 2^63 tensors": (gguf_bytes(n_tensors=2**63), "E1004"),
    "G8 -1 tensors": (gguf_bytes(n_tensors=2**64 - 1), "E1004"),
    "G8 more tensors than fit": (gguf_bytes(n_tensors=100_000), "E1004"),
    "G9 2^63 keys": (gguf_bytes(n_kv=2**63), "E1004"),
    "G11 key of 2^63": (gguf_bytes(kvs=[big + b"x" * 20]), "E1005"),
    "G11 key past the end": (gguf_bytes(kvs=[struct.pack("<Q", 1000) + b"x" * 20]), "E1005"),
    "G11 key over 1 KiB": (gguf_bytes(kvs=[kv("k" * 1025, 4, bytes(4))]), "E1005"),
    "G12 empty key": (gguf_bytes(kvs=[kv("", 4, bytes(4))]), "E1006"),
    "G13 key not UTF-8": (gguf_bytes(kvs=[kv(b"\xff\xfe", 4, bytes(4))]), "E1006"),
    "G13 key with an escape": (gguf_bytes(kvs=[kv("a\x1b[2J\n", 4, bytes(4))]), "E1006"),
    "G14 key twice": (gguf_bytes(kvs=[kv("a", 4, bytes(4))] * 2), "E1102"),
    "G15 type 13": (gguf_bytes(kvs=[kv("a", 13, bytes(4))]), "E1007"),
    "G15 type 99": (gguf_bytes(kvs=[kv("a", 99, bytes(4))]), "E1007"),
    "G16 string past the end": (gguf_bytes(kvs=[kv("a", 8, struct.pack("<Q", 10_000))]), "E1005"),
    "G16 string of 2^63": (gguf_bytes(kvs=[kv("a", 8, big)]), "E1005"),
    "G17 value not UTF-8": (gguf_bytes(kvs=[kv("general.name", 8, string(b"\xff"))]), "E1006"),
    "G18 array of 2^63": (gguf_bytes(kvs=[kv("a", 9, struct.pack("<I", 4) + big)]), "E1008"),
    "G18 array of 2^63 strings": (gguf_bytes(kvs=[kv("a", 9, struct.pack("<I", 8) + big)]), "E1008"),
    "G19 array larger than the file": (gguf_bytes(kvs=[kv("a", 9, array(12, 5_000_000))]), "E1008"),
    "G19 five million doubles in five megabytes": (
        gguf_bytes(kvs=[kv("a", 9, array(12, 5_000_000, bytes(5_000_000)))]),
        "E1008",
    ),
    "G19 strings that run over the end": (
        gguf_bytes(kvs=[kv("a", 9, array(8, 2, string("x") + struct.pack("<Q", 9999)))]),
        "E1005",
    ),
    "G20 array of arrays": (gguf_bytes(kvs=[kv("a", 9, array(9, 1) * 3000)]), "E1008"),
    "G21 array of type 13": (gguf_bytes(kvs=[kv("a", 9, array(13, 2, bytes(8)))]), "E1008"),
    "G22 a bool of 2": (gguf_bytes(kvs=[kv("a", 7, b"\x02")]), "E1007"),
    "G23 alignment 0": (gguf_bytes(kvs=[kv(ALIGNMENT, 4, struct.pack("<I", 0))]), "E1009"),
    "G23 alignment 13": (gguf_bytes(kvs=[kv(ALIGNMENT, 4, struct.pack("<I", 13))]), "E1009"),
    "G23 alignment 2^31": (gguf_bytes(kvs=[kv(ALIGNMENT, 4, struct.pack("<I", 2**31))]), "E1009"),
    "G23 alignment as text": (gguf_bytes(kvs=[kv(ALIGNMENT, 8, string("32"))]), "E1009"),
    "G23 alignment as a truth": (gguf_bytes(kvs=[kv(ALIGNMENT, 7, b"\x01")]), "E1009"),
    "G25 tensor without name": (gguf_bytes([tensor("")]), "E1101"),
    "G26 name of 256": (gguf_bytes([tensor("a" * 256)]), "E1005"),
    "G26 name of a megabyte": (gguf_bytes([tensor("a" * 2**20)]), "E1005"),
    "G27 NUL": (gguf_bytes([tensor("a\0b")]), "E1101"),
    "G27 escape": (gguf_bytes([tensor("a\x1b[2J")]), "E1101"),
    "G27 newline": (gguf_bytes([tensor("a\nb")]), "E1101"),
    "G27 right-to-left override": (gguf_bytes([tensor("a\u202eb")]), "E1101"),
    "G27 path": (gguf_bytes([tensor("../../etc/passwd")]), "E1101"),
    "G28 tensor twice": (gguf_bytes([tensor(), tensor(offset=32)], data=bytes(48)), "E1102"),
    "G29 no dimension": (gguf_bytes([tensor(n=0)]), "E1103"),
    "G29 five dimensions": (gguf_bytes([tensor(ne=(1,) * 5)]), "E1103"),
    "G29 a million": (gguf_bytes([tensor(n=10**6)]), "E1103"),
    "G30 dimension 0": (gguf_bytes([tensor(ne=(4, 0))]), "E1103"),
    "G31 dimension 2^63": (gguf_bytes([tensor(ne=(2**63,))]), "E1103"),
    "G32 product wraps to 16": (gguf_bytes([tensor(ne=(2**32 + 4, 2**32))]), "E1103"),
    "G33 bytes wrap where elements do not": (gguf_bytes([tensor(ne=(2**62,))]), "E1106"),
    "G34 ragged Q4_K": (gguf_bytes([tensor(ne=(100,), kind=12)]), "E1104"),
    "G36 type 999": (gguf_bytes([tensor(kind=999)]), "E1302"),
    "G38 offset 2^64-32": (gguf_bytes([tensor(offset=2**64 - 32)]), "E1105"),
    "G39 offset past the end": (gguf_bytes([tensor(offset=1 << 20)]), "E1105"),
    "G40 misaligned": (gguf_bytes([tensor(), tensor("b", offset=16)], data=bytes(48)), "E1105"),
    "G41 overlap": (gguf_bytes([tensor(), tensor("b", offset=0)], data=bytes(48)), "E1105"),
    "G42 gap": (gguf_bytes([tensor(), tensor("b", offset=64)], data=bytes(96)), "E1105"),
    "G43 data truncated": (gguf_bytes(data=bytes(15)), "E1106"),
    "G43 truncated inside a block": (gguf_bytes([tensor(ne=(256,), kind=12)], data=bytes(143)), "E1106"),
    "G45 trailing zip": (gguf_bytes(data=bytes(16) + b"PK\x03\x04" * 9), "E1106"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, refused, tmp_path):
    data, code = REFUSED[case]
    path = tmp_path / "stranger.gguf"
    path.write_bytes(data)
    assert refused.inspect(code, path) == refused.merge(
        code, gguf_path=path, output=tmp_path / "out", names=path.name
    )


HERE = struct.pack("<f", 0.5)
ACCEPTED = {
    "G10 no tensors": gguf_bytes([], data=b""),
    "G21 scores as INT8, which are numbers and not taken for floats": gguf_bytes(
        kvs=[kv("tokenizer.ggml.scores", 9, array(1, 3, b"\xff\0\1"))]
    ),
    "G17 tokens that are no UTF-8 each": gguf_bytes(
        kvs=[kv("tokenizer.ggml.tokens", 9, array(8, 1, string(b"\xc3")))]
    ),
    "G23 alignment 64 KiB": gguf_bytes([], [kv(ALIGNMENT, 4, struct.pack("<I", 2**16))], b""),
    "G26 a name of 64": gguf_bytes([tensor("a" * 64)]),
    "G45 padding behind the last tensor": gguf_bytes(data=bytes(32)),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_accepted(case, accepted, tmp_path):
    (tmp_path / "x.gguf").write_bytes(ACCEPTED[case])
    assert ": gguf, " in accepted(inspect.main, tmp_path / "x.gguf")


NAMED = {
    "G35 a removed type": 4,
    "G35 another": 5,
    "G37 IQ2_XXS": 16,
    "G37 IQ1_S": 19,
    "G37 IQ3_S": 21,
    "G37 TQ1_0": 34,
    "G37 TQ2_0": 35,
    "G37 IQ4_K of ik_llama.cpp": 139,
}


@pytest.mark.parametrize("case", NAMED)
def test_a_type_known_by_name_is_listed_and_its_numbers_refused(case, accepted, tmp_path):
    """G35, G37: E1301 for who wants the numbers."""
    row = formats.TYPES[NAMED[case]]
    data = gguf_bytes([tensor(ne=(row.weights,), kind=NAMED[case])], data=bytes(row.row_head + row.nbytes))
    (tmp_path / "x.gguf").write_bytes(data)
    assert f"types: {row.name} " in accepted(inspect.main, tmp_path / "x.gguf")
    with pytest.raises(RefimplError, match=rf"E1301 .*x\.gguf: a: .*found {row.name}"):
        ours.view(ours.read(tmp_path / "x.gguf").tensors["a"])


def test_g37_experts_of_a_type_known_by_name_are_not_merged(tmp_path):
    entries = [
        ours.Entry(n, 19 if "_exps" in n else formats.type_id(t.dtype), t.shape, lambda: [])
        for n, t in ours.read(GGUF_FILE).tensors.items()
    ]
    with open(tmp_path / "x.gguf", "wb") as file:
        file.write(ours.head({"general.architecture": "deepseek2"}, entries))
        file.truncate(file.tell() + sum(-(-e.nbytes // 32) * 32 for e in entries))
    with pytest.raises(RefimplError, match=r"E1301 .*x\.gguf: blk\.1\.ffn_gate_exps.*IQ1_S"):
        merge_plan.plan(FP8_DIR, tmp_path / "x.gguf", allow_mismatch=True)


def test_g10_a_file_without_tensors_has_no_experts_to_merge(refused, tmp_path):
    (tmp_path / "x.gguf").write_bytes(
        gguf_bytes([], [kv("general.architecture", 8, string("deepseek2"))], b"")
    )
    refused.merge("E3103", gguf_path=tmp_path / "x.gguf", output=tmp_path / "out", names="x.gguf")


@pytest.mark.parametrize("found", [None, "llama", 7])
def test_g24_only_deepseek2_is_merged(found, refused, tmp_path):
    ours.write(
        tmp_path / "x.gguf",
        {} if found is None else {"general.architecture": found},
        [ours.Entry("a", 0, (8,), lambda: [bytes(32)])],
    )
    refused.merge("E1010", gguf_path=tmp_path / "x.gguf", output=tmp_path / "out", names=repr(found))


def test_g24_metadata_of_the_wrong_type_give_no_config(refused, tmp_path):
    from refimpl import chat

    good = ours.read(GGUF_FILE).metadata
    for key, value in (
        ("attention.key_length", "x"),
        ("rope.dimension_count", [1, 2]),
        ("expert_weights_norm", "yes"),
        ("block_count", 2.5),
    ):
        meta = (
            {"general.architecture": "deepseek2"}
            | {k: v for k, v in good.items() if k.startswith("deepseek2.")}
            | {f"deepseek2.{key}": value}
        )
        (tmp_path / "x.gguf").unlink(missing_ok=True)
        ours.write(tmp_path / "x.gguf", meta, [ours.Entry("output.weight", 0, (8,), lambda: [bytes(32)])])
        refused("E1011|E4003", chat.main, "--gguf_path", tmp_path / "x.gguf", "-p", "x", names="x.gguf")
    (tmp_path / "x.gguf").unlink()
    ours.write(
        tmp_path / "x.gguf",
        {"general.architecture": "deepseek2"},
        [ours.Entry("output.weight", 0, (8,), lambda: [bytes(32)])],
    )
    refused("E1011", chat.main, "--gguf_path", tmp_path / "x.gguf", "-p", "x", names="x.gguf")


def test_g44_every_truncation_is_refused(tmp_path):
    whole = gguf_bytes(kvs=[kv("s", 8, string("abc")), kv("l", 9, struct.pack("<IQ", 5, 2) + bytes(8))])
    path = tmp_path / "x.gguf"
    for n in range(len(whole)):
        path.write_bytes(whole[:n])
        with pytest.raises(RefimplError, match=r"^E1[01]") as caught:
            ours.read(path)
        assert caught.value.line().isprintable() and "x.gguf" in caught.value.line()
    path.write_bytes(whole)
    ours.read(path)


def test_g46_folders_pipes_devices_loops_and_locked_files(refused, tmp_path, monkeypatch):
    refused.inspect("E4021", tmp_path)
    refused.inspect("E4021", tmp_path / "none.gguf")
    with pytest.raises(RefimplError, match="E5002"):
        ours.read(tmp_path)
    (tmp_path / "loop.gguf").symlink_to(tmp_path / "loop.gguf")
    refused.inspect("E4021", tmp_path / "loop.gguf")
    refused.inspect("E5000", tmp_path, names="loop.gguf")
    (tmp_path / "loop.gguf").unlink()
    refused.inspect("E5002", type(tmp_path)("/dev/zero"), names="/dev/zero")
    os.mkfifo(tmp_path / "pipe.gguf")
    refused.inspect("E5002", tmp_path / "pipe.gguf")
    refused.inspect("E5002", tmp_path, names="pipe.gguf")
    refused.merge("E5002", gguf_path=tmp_path / "pipe.gguf", output=tmp_path / "out", names="pipe.gguf")
    (tmp_path / "locked.gguf").write_bytes(gguf_bytes())

    def locked(path, *args, **kwargs):  # the tests may run as root, to whom all files are open
        if str(path).endswith("locked.gguf"):
            raise PermissionError(13, "Permission denied", str(path))
        return really(path, *args, **kwargs)

    really = builtins.open
    monkeypatch.setattr(builtins, "open", locked)
    refused.inspect("E5000", tmp_path / "locked.gguf")


# --- split files --------------------------------------------------------------------------------------------


def parts(folder, **change):
    folder.mkdir()
    return split(folder, **change)


SPLITS = {
    "P49 from another model": ({"names": "aba"}, "E1202"),
    "P50 another count inside": ({"counts": [3, 3, 4]}, "E1202"),
    "P50 another count than the name's": ({"counts": [4, 4, 4]}, "E1202"),
    "P52 numbers from one": ({"nos": [1, 2, 3]}, "E1202"),
    "P52 numbers exchanged": ({"nos": [0, 2, 1]}, "E1202"),
    "P53 another total": ({"total": 4}, "E1202"),
    "P54 tensor in two parts": ({"names": "aab"}, "E1202"),
}


@pytest.mark.parametrize("case", SPLITS)
def test_split_refused(case, refused, tmp_path):
    change, code = SPLITS[case]
    folder = parts(tmp_path / "m", **change)
    refused.inspect(code, folder)
    refused.merge(code, gguf_path=folder, output=tmp_path / "out", names="m")


@pytest.mark.parametrize("gone", [1, 2, 3])
def test_p47_a_missing_part_is_named(gone, refused, tmp_path):
    folder = parts(tmp_path / "m")
    name = f"m-{gone:05d}-of-00003.gguf"
    (folder / name).unlink()
    refused.inspect("E1201", folder, names=name)


@pytest.mark.parametrize("given", [1, 2, 3])
def test_p48_any_part_stands_for_the_model(given, accepted, tmp_path):
    folder = parts(tmp_path / "m")
    assert ": gguf, 3 tensors in 3 files" in accepted(inspect.main, folder / f"m-{given:05d}-of-00003.gguf")


def test_p51_a_merged_file_that_kept_its_count_of_zero_is_one_file(accepted, tmp_path):
    one = ours.Entry("a", 0, (8,), lambda: [bytes(32)])
    for name in ("m.gguf", "m-00001-of-00009.gguf"):
        ours.write(tmp_path / name, {"split.count": 0, "general.architecture": "deepseek2"}, [one])
        assert ": gguf, 1 tensors in 1 file," in accepted(inspect.main, tmp_path / name)


def test_p55_partial_downloads(refused, tmp_path):
    folder = parts(tmp_path / "m")
    second = folder / "m-00002-of-00003.gguf"
    whole = second.read_bytes()
    second.write_bytes(whole[:-1])
    refused.inspect("E1106", folder, names=second.name)
    second.write_bytes(bytes(len(whole)))  # room was taken and nothing arrived
    refused.inspect("E1001", folder, names=second.name)
    second.rename(folder / (second.name + ".incomplete"))
    refused.inspect("E1201", folder, names=second.name)


def test_p56_projectors_and_importance_matrices_lie_beside_models(accepted, refused, tmp_path):
    shutil.copy(GGUF_FILE, tmp_path / "model.gguf")
    for name, arch in (("mmproj.gguf", "clip"), ("imatrix.gguf", "imatrix")):
        ours.write(
            tmp_path / name, {"general.architecture": arch}, [ours.Entry("a", 0, (8,), lambda: [bytes(32)])]
        )
    assert "general.architecture = deepseek2" in accepted(inspect.main, tmp_path)
    accepted.merge(FP8_DIR, tmp_path, output=tmp_path.with_name("p56-out"))
    shutil.copy(GGUF_FILE, tmp_path / "other.gguf")
    refused.inspect("E1203", tmp_path, names="model.gguf, other.gguf")
