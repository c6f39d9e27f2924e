"""The pair of folders for SGLang with kt-kernel: bytes, names, index, and the merge's guarantees."""

import json
import shutil

import pytest

from refimpl import convert_model, doctor
from refimpl.checkpoint import gguf, names, safetensors
from refimpl.config import DeepSeekConfig
from refimpl.errors import RefimplError, UnsupportedError
from refimpl.merge import sglang_kt, sglang_kt_doctor, write
from refimpl.tiny import FP8_DIR, GGUF_DIR
from tests.test_convert_model import payload


@pytest.fixture
def pair(tmp_path):
    convert_model.write(convert_model.plan(FP8_DIR, GGUF_DIR, layout="sglang-kt"), tmp_path / "pair")
    return tmp_path / "pair"


def test_model_has_the_checkpoints_names_and_bytes(pair):
    wanted, _ = safetensors.read_folder(FP8_DIR, wanted=lambda name: not names.is_routed_expert(name))
    index = json.loads((pair / "MODEL" / safetensors.INDEX).read_text())["weight_map"]
    found, _ = safetensors.read_folder(pair / "MODEL")
    assert index.keys() == found.keys() == wanted.keys()
    # SGLang reads the files that the index names, and each tensor must be in the one it says.
    assert set(index.values()) == {p.name for p in (pair / "MODEL").glob("*.safetensors")}
    for name, info in wanted.items():
        assert (found[name].dtype, found[name].shape) == (info.dtype, info.shape)
        assert payload(found[name]) == payload(info)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (pair / "MODEL" / name).read_bytes() == (FP8_DIR / name).read_bytes()


@pytest.mark.parametrize("linked", [False, True])
def test_kt_has_the_experts_as_they_lie(tmp_path, linked):
    plan = convert_model.plan(FP8_DIR, GGUF_DIR, layout="sglang-kt", linked=linked)
    convert_model.write(plan, tmp_path / "pair", record=True)
    source = {n: t for n, t in gguf.read_all(GGUF_DIR).tensors.items() if names.is_routed_expert(n)}
    files = sorted((tmp_path / "pair" / "KT").glob("*.gguf"))
    found = {n: t for f in files for n, t in gguf.read(f).tensors.items() if names.is_routed_expert(n)}
    assert found.keys() == source.keys() and all(f.is_symlink() == linked for f in files)
    for name, info in source.items():
        assert (found[name].dtype, found[name].shape) == (info.dtype, info.shape)
        assert payload(found[name]) == payload(info)
    assert convert_model.verify(tmp_path / "pair") > len(source)


def test_a_changed_byte_is_found_in_either_folder(pair):
    for file in ("MODEL/model-00001-of-00004.safetensors", "KT/experts-00002.gguf"):
        data = bytearray((pair / file).read_bytes())
        data[-40] ^= 1
        (pair / file).write_bytes(data)
        with pytest.raises(RefimplError, match="E3201"):
            convert_model.verify(pair)
        data[-40] ^= 1
        (pair / file).write_bytes(data)
    assert convert_model.verify(pair)


def test_an_interrupted_merge_goes_on(tmp_path, pair, monkeypatch):
    plan, written = convert_model.plan(FP8_DIR, GGUF_DIR, layout="sglang-kt"), []
    whole = gguf.write

    def failing(path, *given, **more):
        if path.name == "experts-00003.gguf":
            raise OSError(5, "the disk fails", str(path))
        whole(path, *given, **more)

    monkeypatch.setattr(write.gguf, "write", failing)
    monkeypatch.setattr(write, "WORKERS", 1)
    with pytest.raises(OSError):
        convert_model.write(plan, tmp_path / "again")
    assert not (tmp_path / "again").exists()
    monkeypatch.setattr(write.gguf, "write", lambda p, *g, **m: (written.append(p.name), whole(p, *g, **m)))
    convert_model.write(plan, tmp_path / "again")
    assert written == ["experts-00003.gguf"]
    for file in (p.relative_to(pair) for p in pair.rglob("*") if p.is_file()):
        assert (tmp_path / "again" / file).read_bytes() == (pair / file).read_bytes()


def test_experts_that_kt_kernel_cannot_cut_are_refused(tmp_path):
    config = json.loads((FP8_DIR / "config.json").read_text()) | {"moe_intermediate_size": 384}
    with pytest.raises(UnsupportedError, match="E3107"):
        sglang_kt.check_columns(DeepSeekConfig.from_dict(config, where="x"), "x")


def test_the_command_is_printed(tmp_path, capsys):
    args = ["--safetensor_path", FP8_DIR, "--gguf_path", GGUF_DIR, "--output_path", tmp_path / "a b"]
    assert convert_model.main([*map(str, args), "--layout", "sglang-kt", "--json", "--progress", "none"]) == 0
    launch = json.loads(capsys.readouterr().out)["launch"]
    assert f"--kt-weight-path '{tmp_path}/a b/KT'" in launch and "--kt-method LLAMAFILE" in launch
    assert "--kt-num-gpu-experts 0" in launch and "--kt-threadpool-count 1" in launch  # 256 wide: one pool
    shutil.rmtree(tmp_path / "a b")


def test_the_doctor_finds_nothing_wrong_with_a_pair(pair):
    assert sglang_kt_doctor.sglang_kt_faults(pair) == []


def _rewrite(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


SICK = [
    (lambda p: shutil.rmtree(p / "KT"), "KT is missing"),
    (lambda p: (p / "MODEL" / safetensors.INDEX).unlink(), "index.json is missing"),
    (lambda p: (p / "MODEL" / "config.json").unlink(), "E4020"),
    (lambda p: _rewrite(p / "MODEL" / "config.json", architectures=["LlamaForCausalLM"]), "architectures"),
    (lambda p: (p / "MODEL" / "model-00002-of-00004.safetensors").unlink(), "E2102"),
    (lambda p: (p / "MODEL" / "tokenizer.json").unlink(), "no tokenizer"),
    (lambda p: (p / "KT" / "experts-00002.gguf").unlink(), "lacks blk.2.ffn_gate_exps.weight"),
    (lambda p: (p / "KT" / "experts-00002.gguf").write_bytes(b"GGUF"), "E1005"),
    (lambda p: [f.unlink() for f in (p / "KT").iterdir()], "no .gguf file"),
]


@pytest.mark.parametrize("spoil,told", SICK, ids=[told for _, told in SICK])
def test_the_doctor_tells_what_would_fail(pair, spoil, told):
    spoil(pair)
    assert any(told in line for line in sglang_kt_doctor.sglang_kt_faults(pair))


@pytest.mark.parametrize(
    "change,told",
    [
        ({"--kt-weight-path": None}, "KT is off"),
        ({"--kt-weight-path": "elsewhere"}, "is not"),
        ({"--model": None}, "--model is missing"),
        ({"--model": "elsewhere"}, "is not"),
        ({"--kt-method": None}, "AMXINT4"),
        ({"--kt-method": "llamafile"}, "in capitals"),
        ({"--kt-method": "AMXINT4"}, "LLAMAFILE"),
        ({"--kt-num-gpu-experts": None}, "KT is off"),
        ({"--kt-num-gpu-experts": "8"}, "must be 0"),
        ({"--kt-gpu-experts-ratio": "0.5"}, "must be 0"),
        ({"--kt-threadpool-count": "2"}, "allow 1 to 1"),
        ({"--chunked-prefill-size": "-1"}, "corrupts"),
    ],
)
def test_flags_that_do_not_fit_are_told(pair, change, told, capsys):
    flags = sglang_kt_doctor.read_flags(sglang_kt.launch_words(pair, 256)) | change
    words = [w for k, v in flags.items() if v is not None for w in (k, v) if w]
    assert doctor.main(["--for", "sglang-kt", str(pair), "--json", "--", "sglang", "serve", *words]) == 1
    (fault,) = json.loads(capsys.readouterr().out)["faults"]
    assert told in fault


def test_either_flag_for_experts_on_the_gpu_keeps_kt_on(pair):
    flags = sglang_kt_doctor.read_flags(sglang_kt.launch_words(pair, 256))
    del flags["--kt-num-gpu-experts"]
    assert sglang_kt_doctor.sglang_kt_faults(pair, flags | {"--kt-gpu-experts-ratio": "0.0"}) == []
    assert sglang_kt_doctor.sglang_kt_faults(pair, {})  # a command without flags is not one that is not given


def test_flags_are_read_as_a_shell_hands_them_over():
    words = ["python", "-m", "x", "--a=1=2", "--b", "--c", "-1", "stray", "--d", "two"]
    assert sglang_kt_doctor.read_flags(words) == {"--a": "1=2", "--b": "", "--c": "-1", "--d": "two"}


def test_a_type_that_kt_kernel_does_not_read_is_told(pair, monkeypatch):
    monkeypatch.setattr(sglang_kt_doctor, "TYPES", sglang_kt_doctor.TYPES.replace("Q4_K", ""))
    (fault,) = sglang_kt_doctor.sglang_kt_faults(pair)
    assert "is Q4_K, which kt-kernel 0.7.2 does not read" in fault


def test_the_command_of_the_doctor(pair, capsys):
    assert doctor.main(["--for", "sglang-kt", str(pair)]) == 0
    shutil.rmtree(pair / "KT")
    assert doctor.main([str(pair), "--json"]) == 1
    out = capsys.readouterr().out.splitlines()
    assert "nothing found" in out[0] and "KT is missing" in json.loads(out[1])["faults"][0]
