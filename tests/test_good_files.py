"""Good inputs that look odd: files as they are found in the field, each read as the model that it is."""

import json
import shutil
from functools import partial

import numpy as np
import pytest

from refimpl import chat, convert_model, diff, formats, inspect, plan, quantize
from refimpl.checkpoint import gguf, names, safetensors
from refimpl.errors import RefimplError
from refimpl.formats import bf16
from refimpl.loading.opening import open_model
from refimpl.tiny import FP8_DIR, GGUF_DIR, GGUF_FILE

IDS = [*range(40, 60)]
STRANGE = formats.type_id("IQ1_S")  # a type that nothing here decodes


def logits(place):
    return open_model(place, "reference", activations="exact").logits(IDS)


@pytest.fixture(scope="module")
def true():
    """Logits of the embedded model's GGUF."""
    return logits(GGUF_FILE)


def rewritten(path, change):
    """The embedded model's GGUF again, each entry as `change(entry, bytes)` gives it, several or none."""
    file = gguf.read(GGUF_FILE)
    entries = []
    for info in file.tensors.values():
        data = GGUF_FILE.read_bytes()[info.offset :][: info.nbytes]
        entry = gguf.Entry(info.name, formats.type_id(info.dtype), info.shape, lambda data=data: [data])
        entries += change(entry, data)
    path.parent.mkdir(exist_ok=True)
    gguf.write(path, file.metadata, entries)
    return path


def checkpoint(folder, change):
    """The embedded model's FP8 checkpoint again, {name: (dtype, array)} as `change` leaves it."""
    shutil.copytree(FP8_DIR, folder)
    header = safetensors.read(folder / "model.safetensors")
    arrays = {n: (t.dtype, np.array(safetensors.view(t))) for n, t in header.tensors.items()}
    change(arrays)
    safetensors.save(folder / "model.safetensors", arrays)
    return folder


def merged(checkpoint, file, output):
    convert_model.write(convert_model.plan(checkpoint, file), output)
    return output


def test_frequencies_in_a_checkpoint_are_passed_over(tmp_path):
    def add(arrays):
        arrays["model.layers.0.self_attn.rotary_emb.inv_freq"] = ("F32", np.ones(16, np.float32))

    folder = checkpoint(tmp_path / "hf", add)
    np.testing.assert_array_equal(logits(folder), logits(FP8_DIR))
    found = merged(folder, GGUF_DIR, tmp_path / "out")
    np.testing.assert_array_equal(logits(found), logits(merged(FP8_DIR, GGUF_DIR, tmp_path / "plain")))
    assert quantize.plan(folder).types == quantize.plan(FP8_DIR).types


def test_experts_of_gate_and_up_in_one_are_split(tmp_path, true):
    halves = {}

    def fuse(entry, data):
        if "ffn_gate_exps" not in entry.name and "ffn_up_exps" not in entry.name:
            return [entry]
        halves[entry.name] = np.frombuffer(data, np.uint8).reshape(entry.shape[0], -1)
        layer = entry.name.split(".ffn_")[0]
        gate, up = f"{layer}.ffn_gate_exps.weight", f"{layer}.ffn_up_exps.weight"
        if not {gate, up} <= halves.keys():
            return []
        both = np.concatenate([halves[gate], halves[up]], axis=1).tobytes()
        experts, rows, columns = entry.shape
        name = gate.replace("ffn_gate_", "ffn_gate_up_")
        return [entry._replace(name=name, shape=(experts, 2 * rows, columns), chunks=lambda: [both])]

    file = rewritten(tmp_path / "fused" / "m.gguf", fuse)
    assert any("gate_up" in name for name in gguf.read(file).tensors)
    np.testing.assert_array_equal(logits(file), true)
    np.testing.assert_array_equal(
        logits(merged(FP8_DIR, file, tmp_path / "fused-out")),
        logits(merged(FP8_DIR, GGUF_FILE, tmp_path / "plain-out")),
    )


def test_a_type_is_judged_when_it_is_decoded(tmp_path, capsys):
    """A merge needs the experts alone, and those who list a file no numbers at all."""

    def strange(entry, data):
        if not entry.name.endswith(("attn_output.weight", "attn_q_b.weight")):
            return [entry]
        rows, columns = entry.shape[0], -(-entry.shape[1] // 256) * 256
        new = entry._replace(ggml_type=STRANGE, shape=(rows, columns))
        return [new._replace(chunks=partial(lambda n: [bytes(n)], new.nbytes))]

    file = rewritten(tmp_path / "strange.gguf", strange)
    assert merged(FP8_DIR, file, tmp_path / "out").is_dir()
    inspect.main([str(file)])
    assert "IQ1_S" in capsys.readouterr().out
    with pytest.raises(RefimplError, match="E4060"):
        diff.main([str(file), str(GGUF_FILE)])
    assert "IQ1_S Q5_K         not the same bytes, and not decoded here" in capsys.readouterr().out
    with pytest.raises(RefimplError, match="IQ1_S"):
        logits(file)


def test_any_type_of_ggml_is_planned(tmp_path, capsys):
    def strange(entry, data):
        if "_exps" not in entry.name:
            return [entry]
        new = entry._replace(ggml_type=STRANGE)
        return [new._replace(chunks=partial(lambda n: [bytes(n)], new.nbytes))]

    file = rewritten(tmp_path / "strange.gguf", strange)
    assert plan.main(["--model_path", str(file), "--cpu_gbps", "100"]) in (0, None)
    assert "IQ1_S" in capsys.readouterr().out


def test_a_gguf_needs_no_suffix(tmp_path, true):
    shutil.copy(GGUF_FILE, tmp_path / "model")
    np.testing.assert_array_equal(logits(tmp_path / "model"), true)
    assert merged(FP8_DIR, tmp_path / "model", tmp_path / "out").is_dir()


def test_the_one_subfolder_with_a_gguf_is_taken_and_told(tmp_path, true, capsys):
    (tmp_path / "models" / "Q4").mkdir(parents=True)
    (tmp_path / "models" / "notes").mkdir()
    shutil.copy(GGUF_FILE, tmp_path / "models" / "Q4")
    np.testing.assert_array_equal(logits(tmp_path / "models"), true)
    assert "Q4" in capsys.readouterr().err
    assert merged(FP8_DIR, tmp_path / "models", tmp_path / "out").is_dir()


def test_metadata_of_safetensors_may_be_null(tmp_path):
    shutil.copytree(FP8_DIR, tmp_path / "hf")
    path = tmp_path / "hf" / "model.safetensors"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:][:size]) | {"__metadata__": None}).encode()
    header += b" " * (-len(header) % 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])
    np.testing.assert_array_equal(logits(tmp_path / "hf"), logits(FP8_DIR))


def test_a_bias_of_the_router_that_was_rounded_is_the_same_model(tmp_path):
    def rounded(entry, data):
        if not entry.name.endswith(names.BIAS[1]):
            return [entry]
        near = bf16.decode(bf16.encode(np.frombuffer(data, "<f4").copy())).tobytes()
        return [entry._replace(chunks=lambda: [near])]

    def other(entry, data):
        if not entry.name.endswith(names.BIAS[1]):
            return [entry]
        return [entry._replace(chunks=lambda: [(np.frombuffer(data, "<f4") * np.float32(1.1)).tobytes()])]

    merged(FP8_DIR, rewritten(tmp_path / "rounded.gguf", rounded), tmp_path / "out")
    with pytest.raises(RefimplError, match="E3106"):
        merged(FP8_DIR, rewritten(tmp_path / "other.gguf", other), tmp_path / "never")


def test_kimi_k2_is_a_model_type(tmp_path, true):
    shutil.copy(GGUF_FILE, tmp_path / "m.gguf")
    raw = json.loads((FP8_DIR / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"model_type": "kimi_k2"}))
    np.testing.assert_array_equal(logits(tmp_path), true)


def test_a_type_has_a_name_and_a_number():
    data = np.arange(144, dtype=np.uint8) % 60
    np.testing.assert_array_equal(formats.dequantize("Q4_K", data), formats.dequantize(12, data))
    with pytest.raises(RefimplError, match=r"E1302.*Q4_X"):
        formats.dequantize("Q4_X", data)


def test_a_variable_reaches_the_template(tmp_path, capsys):
    shutil.copytree(FP8_DIR, tmp_path / "hf")
    path = tmp_path / "hf" / "tokenizer_config.json"
    template = (
        "{{ bos_token }}<｜User｜>{{ messages[0].content }}<｜Assistant｜>{{ '<think>' if mood == 'x' }}"
    )
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    asked = ["--model_path", str(tmp_path / "hf"), "-p", "2+2", "--greedy", "--max_new_tokens", "2", "--json"]
    tokens = []
    for more in ([], ["--template_var", "mood=x"]):
        chat.main([*asked, "--backend", "reference", *more])
        tokens.append(json.loads(capsys.readouterr().out)["stats"]["prompt_tokens"])
    assert tokens[1] == tokens[0] + 1


def test_a_part_under_another_name_and_parts_in_one_are_called_that(tmp_path):
    file = gguf.read(GGUF_FILE)
    part = file.metadata | {"split.no": 0, "split.count": 2, "split.tensors.count": 2}
    entry = gguf.Entry("output_norm.weight", 0, (8,), lambda: [bytes(32)])
    gguf.write(tmp_path / "r1.gguf", part, [entry])
    with pytest.raises(RefimplError, match=r"E1202.*part 1 of 2.*name"):
        gguf.read_all(tmp_path / "r1.gguf")
    gguf.write(tmp_path / "b.gguf", part | {"split.no": 1}, [entry])
    (tmp_path / "both.gguf").write_bytes(b"".join((tmp_path / f).read_bytes() for f in ("r1.gguf", "b.gguf")))
    with pytest.raises(RefimplError, match=r"E1\d\d\d.*part"):
        gguf.read_all(tmp_path / "both.gguf")
