"""The pages for a browser: a block's script computes what numpy computes, frames the bits that make a
weight and no others, and reads files as the package does.
"""

import base64
import json
import os
import re
import shutil
import struct
import subprocess
from dataclasses import replace

import numpy as np
import pytest

import refimpl
from refimpl import fp8, inspect, tracing
from refimpl.cli import run
from refimpl.errors import ResourceError
from refimpl.formats import draw
from refimpl.model import Model
from refimpl.pages import block, html, layouts, spec, walk
from refimpl.pages.scaled import SCALED
from refimpl.tensors import ScaledFP8
from refimpl.tiny import FP8_DIR, GGUF_DIR
from tests.browser import OVERFLOW, WIDTHS, browser, page_of

NAMES = [*layouts.BLOCKS, *layouts.FLOATS]
BLOCKS = 1000 if os.environ.get("HYPOTHESIS_PROFILE") == "deep" else 100  # random ones a format


def decoded(name: str, data: np.ndarray) -> np.ndarray:
    """f32 [..., weights] of u8 [..., bytes], by the reference."""
    if name in layouts.BLOCKS:
        with np.errstate(all="ignore"):
            return layouts.BLOCKS[name].dequantize(data)
    module = layouts.FLOATS[name]
    return module.decode(data) if hasattr(module, "TABLE") else module.dequantize(data)


def random_blocks(name: str) -> np.ndarray:
    size = layouts.layout(name)["bytes"]
    return np.random.default_rng(20).integers(0, 256, (BLOCKS, size), np.uint8)


# In any JavaScript: all blocks of base64 to float32 in base64.
ALL = """(name, text) => {
  const layout = LAYOUTS[name], data = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const count = data.length / layout.bytes, made = new Float32Array(count * layout.weights);
  for (let k = 0; k < count; k++) {
    made.set(weightsOf(layout, data.subarray(k * layout.bytes, (k + 1) * layout.bytes)), k * layout.weights);
  }
  const bytes = new Uint8Array(made.buffer);
  let out = "";
  for (let k = 0; k < bytes.length; k += 8192) out += String.fromCharCode(...bytes.subarray(k, k + 8192));
  return btoa(out);
}"""


def assert_same_bits(name: str, data: np.ndarray, answer: str) -> None:
    found = np.frombuffer(base64.b64decode(answer), "<f4").reshape(len(data), -1)
    wanted = decoded(name, data)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(wanted))
    number = ~np.isnan(wanted)
    np.testing.assert_array_equal(found.view(np.uint32)[number], wanted.view(np.uint32)[number])


@pytest.fixture(scope="module")
def chrome():
    with browser() as found:
        yield found


@pytest.fixture(scope="module")
def q4_k(chrome, tmp_path_factory):
    """The page of a block of Q4_K, opened at both widths."""
    path = tmp_path_factory.mktemp("page") / "q4_k.html"
    data = np.random.default_rng(1).integers(0, 100, 3 * 144, np.uint8)
    path.write_text(block.page("Q4_K", data.tobytes()))
    return path, data


def test_the_script_has_the_bits_of_numpy_in_node(tmp_path):
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node here; the same is asked in the browser")
    blocks = {name: random_blocks(name) for name in NAMES}
    program = (
        layouts.script()
        + html.asset("numbers.js")
        + f"\nconst all = {ALL};\nconst told = JSON.parse(require('fs').readFileSync(0, 'utf8'));\n"
        + "for (const name of Object.keys(told)) told[name] = all(name, told[name]);\n"
        + "process.stdout.write(JSON.stringify(told));"
    )
    asked = json.dumps({name: base64.b64encode(data.tobytes()).decode() for name, data in blocks.items()})
    file = tmp_path / "all.js"  # a command line holds less
    file.write_text(program)
    ran = subprocess.run([node, file], input=asked, text=True, capture_output=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-2000:]
    answers = json.loads(ran.stdout)
    for name, data in blocks.items():
        assert_same_bits(name, data, answers[name])


def test_the_page_s_script_has_the_bits_of_numpy_in_the_browser(chrome, q4_k):
    with page_of(chrome) as (page, wrong):
        page.goto(q4_k[0].as_uri())
        for name in NAMES:
            data = random_blocks(name)
            answer = page.evaluate(
                f"([name, text]) => ({ALL})(name, text)", [name, base64.b64encode(data.tobytes()).decode()]
            )
            assert_same_bits(name, data, answer)
        assert not wrong


@pytest.mark.parametrize("ue8m0", [False, True])
def test_fp8_with_its_scale_is_what_fp8_decodes(ue8m0):
    module = SCALED["FP8_UE8M0" if ue8m0 else "FP8"]
    x = np.random.default_rng(4).normal(size=(128, 128)).astype(np.float32)
    codes, scale = fp8.act_quant(x, ue8m0=ue8m0)
    stored = np.zeros(128, module.BLOCK)
    stored["codes"] = codes
    stored[module.PARTS[0]] = np.log2(scale[:, 0]) + 127 if ue8m0 else scale[:, 0]
    wanted = np.concatenate([fp8.weight_dequant(ScaledFP8(c[None], s[None])) for c, s in zip(codes, scale)])
    np.testing.assert_array_equal(module.dequantize(stored.view(np.uint8)).reshape(128, 128), wanted)


def test_a_formula_that_is_none_is_refused():
    for text in ("d if q[i] else m", "d // q[i]", "d(q[i])", "d.x"):
        with pytest.raises(ValueError, match="no formula has this"):
            layouts.javascript(text)


def makers(name: str, n: int) -> set[int]:
    """Places of the bits that can change weight n, by trying: each bit is flipped in many blocks."""
    module = layouts.BLOCKS[name]
    size, rng, found = module.BLOCK.itemsize, np.random.default_rng(3), set()
    for data in rng.integers(0, 256, (60, size), np.uint8):
        for field in draw.fields(module):
            if field.kind in draw.FLOATS:
                data.view(module.BLOCK)[field.name] = np.float16(rng.uniform(0.5, 2))
        flipped = np.repeat(data[None], 8 * size, 0)
        flipped[np.arange(8 * size), np.arange(8 * size) // 8] ^= (1 << (np.arange(8 * size) % 8)).astype(
            np.uint8
        )
        with np.errstate(all="ignore"):
            now, was = module.dequantize(flipped)[:, n], module.dequantize(data)[n]
        found |= set(np.flatnonzero(now.view(np.uint32) != was.view(np.uint32)).tolist())
    return found


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "Q3_K", "IQ4_XS", "NVFP4", "MXFP4", "Q5_0", "Q8_K"])
def test_the_framed_bits_are_those_that_change_the_weight(chrome, tmp_path, name):
    """Flipping tells which bits can change weight 37; the page frames these and no others. A bit of NVFP4's
    scales that means nothing (its sign, by the format's page) belongs to the scale all the same.
    """
    n = 17 if layouts.BLOCKS[name].WEIGHTS == 32 else 37
    path = tmp_path / "page.html"
    path.write_text(
        block.page(
            name,
            bytes(range(1, 1 + layouts.BLOCKS[name].BLOCK.itemsize % 250)).ljust(
                layouts.BLOCKS[name].BLOCK.itemsize, b"\x07"
            ),
        )
    )
    with page_of(chrome) as (page, wrong):
        page.goto(path.as_uri())
        page.fill("#weight", str(n))
        page.press("#weight", "Enter")
        framed = set(
            page.evaluate(
                """() => [...document.querySelectorAll(".bit.makes")]
            .map((b) => b.getAttribute("aria-label").match(/byte (\\d+) bit (\\d)/))
            .map((m) => 8 * Number(m[1]) + Number(m[2]))"""
            )
        )
        assert not wrong
    tried = makers(name, n)
    assert tried <= framed
    extra = framed - tried
    assert {place % 8 for place in extra} <= {7} if name == "NVFP4" else not extra, framed - tried


def test_a_flipped_bit_changes_and_tells_what_numpy_says(chrome, q4_k):
    path, data = q4_k
    with page_of(chrome) as (page, wrong):
        page.goto(path.as_uri())
        page.click('[aria-label^="byte 40 bit 2:"]')
        after = data[:144].copy()
        after[40] ^= 4
        was, now = decoded("Q4_K", data[:144]), decoded("Q4_K", after)
        (n,) = np.flatnonzero(was != now)
        told = page.inner_text("#told")
        assert told.startswith("You flipped bit 2 of byte 40 from ")
        assert f"This flip changed 1 of 256 weights: weight {n} from" in told
        assert told.endswith("1 bit differs from the stored block.")
        assert page.get_attribute("#weights .changed", "aria-label").startswith(f"weight {n}: ")
        page.fill("#weight", str(n))
        page.press("#weight", "Enter")
        assert float(page.inner_text("#sum").rsplit("=", 1)[1]) == pytest.approx(float(now[n]), rel=1e-5)
        page.click("#reset")
        page.fill("#block", "2")
        page.press("#block", "Enter")
        page.locator("#told", has_text="You see block 2").wait_for()
        shown = float(page.get_attribute("#weights button", "aria-label").split(": ")[1])
        assert shown == pytest.approx(float(decoded("Q4_K", data[288:])[0]), rel=1e-5)
        assert not wrong


def test_bits_and_weights_are_reached_by_keyboard(chrome, q4_k):
    with page_of(chrome) as (page, wrong):
        page.goto(q4_k[0].as_uri())
        assert (
            page.locator('#bits [tabindex="0"]').count()
            == page.locator('#weights [tabindex="0"]').count()
            == 1
        )
        page.focus('#bits [tabindex="0"]')
        page.keyboard.press("ArrowRight")
        assert page.evaluate("document.activeElement.getAttribute('aria-label')").startswith("byte 0 bit 6:")
        page.keyboard.press("Enter")
        assert page.inner_text("#told").startswith("You flipped bit 6 of byte 0 from ")
        page.keyboard.press("Tab")  # to the link in what is said of the scales, and on to the weights
        assert page.evaluate("document.activeElement.textContent") == "quirks"
        page.keyboard.press("Tab")
        page.keyboard.press("End")
        page.keyboard.press("Enter")
        assert "Weight 255 is" in page.inner_text("#told")
        assert not page.evaluate("""[...document.querySelectorAll("button, input, select")]
            .filter((e) => !(e.getAttribute("aria-label") || e.textContent || e.labels?.length)).length""")
        assert not wrong


# In any page of a block: what it says about each number behind a weight, with that number.
SAID = """([name, text, n]) => {
  const layout = LAYOUTS[name], data = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  return numbersBehind(layout, n).map(([part, index]) => [part, index, madeOf(layout, data, part, index)[0]]);
}"""


@pytest.mark.parametrize("name", NAMES)
def test_the_sums_on_a_page_make_the_numbers_of_unpack(chrome, q4_k, name):
    """Python gets from each sum what stands behind its last equals sign, and that is numpy's number."""
    module, size = layouts.BLOCKS.get(name), layouts.layout(name)["bytes"]
    blocks = np.random.default_rng(8).integers(0, 256, (20, size), np.uint8)
    with page_of(chrome) as (page, wrong):
        page.goto(q4_k[0].as_uri())
        for k, data in enumerate(blocks):
            n = k % layouts.layout(name)["weights"]
            told = page.evaluate(SAID, [name, base64.b64encode(data.tobytes()).decode(), n])
            assert [part for part, _, _ in told] or module is None
            for part, index, text in told:
                last = re.split("[;:=] ", text)[-1]
                *sums, found = text.split("; ")[-1].split(" = ")
                if "means" not in text:
                    assert all(float(eval(t)) == pytest.approx(float(found), rel=1e-5) for t in sums), text
                if module is not None:
                    number = draw.field_values(module, data)[part].reshape(-1)[index]
                    assert float(last) == pytest.approx(float(number), rel=1e-5, nan_ok=True), (part, text)
        assert not wrong


def test_a_page_says_which_group_and_place_a_weight_has(chrome, q4_k):
    with page_of(chrome) as (page, wrong):
        page.goto(q4_k[0].as_uri())
        assert "Weight 37 is weight i = 5 of group j = 1, since 37 = 1 * 32 + 5" in page.inner_text("#place")
        assert "sc[1] and m[1]" in page.inner_text("#place")
        page.fill("#weight", "256")
        page.press("#weight", "Enter")
        assert page.inner_text("#told") == "There is no weight 256: this block has weights 0 to 255."
        assert page.input_value("#weight") == "37"
        page.fill("#block", "3")
        page.press("#block", "Enter")
        assert page.inner_text("#told") == "There is no block 3 here: they are 0 to 2."
        assert page.input_value("#block") == "0" and not wrong


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["Q4_K", "Q8_K", "F32"])
def test_nothing_sticks_out(chrome, tmp_path, name, width):
    path = tmp_path / "page.html"
    path.write_text(
        block.page(
            name, np.random.default_rng(2).integers(0, 256, layouts.layout(name)["bytes"], np.uint8).tobytes()
        )
    )
    for scheme in ("light", "dark"):
        with page_of(chrome, width, scheme) as (page, wrong):
            page.goto(path.as_uri())
            assert page.evaluate(OVERFLOW) == [] and not wrong


@pytest.mark.parametrize("folder", [FP8_DIR, GGUF_DIR], ids=["safetensors", "gguf"])
def test_a_file_that_is_given_lists_its_tensors_and_shows_any_block(chrome, q4_k, folder):
    file = next(p for p in sorted(folder.iterdir()) if p.suffix in (".safetensors", ".gguf"))
    model = inspect.read_headers(file)
    name = (
        "model.layers.1.mlp.experts.3.down_proj.weight" if folder is FP8_DIR else "blk.2.ffn_down_exps.weight"
    )
    tensor = model.tensors[name]
    with page_of(chrome) as (page, wrong):
        page.goto(q4_k[0].as_uri())
        page.set_input_files("#file", str(file))
        page.wait_for_selector("#list:not([hidden])")
        listed = page.evaluate(
            '[...document.querySelectorAll("#tensor option")].map((o) => o.value).filter(Boolean)'
        )
        assert sorted(listed) == sorted(model.tensors)
        page.select_option("#tensor", name)
        page.locator("#told", has_text="You see block 0 of").wait_for()
        page.fill("#block", "5")
        page.press("#block", "Enter")
        page.locator("#told", has_text="You see block 5 of").wait_for()
        kind = layouts.known(tensor.type)
        size = layouts.layout(kind)["bytes"]
        raw = np.frombuffer(file.read_bytes(), np.uint8)[tensor.info.offset :][5 * size : 6 * size]
        shown = page.evaluate(
            """[...document.querySelectorAll("#weights button")]
            .map((b) => b.getAttribute("aria-label").split(": ")[1])"""
        )
        np.testing.assert_allclose([float(s) for s in shown], decoded(kind, raw), rtol=1e-5)
        assert not wrong


def gguf(tensors, data=b"", fields=b"", count=0, version=3) -> bytes:
    """A GGUF file of [(name, shape, type, offset)]; `fields` are `count` keys with their values."""
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), count) + fields
    for name, shape, kind, offset in tensors:
        head += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind, offset)
    return head + bytes(-len(head) % 32) + data


def text(name: str) -> bytes:
    return struct.pack("<Q", len(name.encode())) + name.encode()


def safetensors(told) -> bytes:
    raw = json.dumps(told).encode()
    return struct.pack("<Q", len(raw)) + raw + bytes(16)


def one(**changed) -> dict:
    return {"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | changed}


ONE = gguf([("x", (256,), 12, 0)], bytes(144))
NO_MODELS = {
    "empty": (b"", "the file is empty"),
    "a word": (b"hello", "too short"),
    "a text": (b"This is a text. " * 40, "neither a GGUF nor"),
    "only a magic": (b"GGUF\x03\0\0\0", "ends within its header"),
    "ones after the magic": (b"GGUF" + b"\xff" * 60, "version 4294967295"),
    "ones": (b"\xff" * 64, "neither a GGUF nor"),
    "cut JSON": (b"\x08" + bytes(7) + b"[1, 2, 3", "neither a GGUF nor"),
    "a list": (safetensors([1]), "neither a GGUF nor"),
    "nothing": (safetensors(None), "neither a GGUF nor"),
    "a tensor that is none": (safetensors({"x": None}), "no type, no shape or no offsets"),
    "a type that is a number": (safetensors(one(dtype=3)), "no type, no shape or no offsets"),
    "an offset that is a word": (safetensors(one(data_offsets=["a", 4])), "no type, no shape or no offsets"),
    "an offset below zero": (safetensors(one(data_offsets=[-4, 0])), "no type, no shape or no offsets"),
    "an end before the beginning": (safetensors(one(data_offsets=[8, 4])), "ends before it begins"),
    "cut in the header": (ONE[:40], "ends within its header"),
    "version 1": (gguf([], version=1), "version 1 of GGUF"),
    "two of a name": (gguf([("x", (256,), 12, 0)] * 2), 'two tensors are named "x"'),
    "four billion axes": (
        gguf([])[:8] + struct.pack("<QQ", 1, 0) + text("x") + b"\xff" * 4,
        "4294967295 axes",
    ),
    "strings without end": (
        gguf([], bytes(999), text("k") + struct.pack("<IIQ", 9, 8, 1 << 52), 1),
        "ends within its header",
    ),
}


@pytest.mark.parametrize("name", NO_MODELS)
def test_a_file_that_is_no_model_is_told_in_a_line(chrome, q4_k, tmp_path, name):
    file, (data, why) = tmp_path / "x.gguf", NO_MODELS[name]
    file.write_bytes(data)
    with page_of(chrome) as (page, wrong):
        page.goto(q4_k[0].as_uri())
        page.set_input_files("#file", str(file))
        page.locator("#file-told", has_text="x.gguf: ").wait_for()
        assert why in page.inner_text("#file-told")
        assert page.is_hidden("#list") and not wrong


DROPPED = """(text) => {
  const dropped = new DataTransfer();
  if (text === null) dropped.setData("text/plain", "no file");
  else dropped.items.add(new File([Uint8Array.from(atob(text), (c) => c.charCodeAt(0))], "x.gguf"));
  document.body.dispatchEvent(new DragEvent("drop", { dataTransfer: dropped, bubbles: true }));
}"""


def test_a_file_can_be_dropped_anywhere_on_the_page(chrome, q4_k):
    with page_of(chrome) as (page, wrong):
        page.goto(q4_k[0].as_uri())
        page.evaluate(DROPPED, None)
        assert page.inner_text("#file-told") == "What was dropped is no file."
        page.evaluate(DROPPED, base64.b64encode(ONE).decode())
        page.locator("#file-told", has_text="x.gguf: 1 tensor").wait_for()
        assert told_of(page, "x") == "x: Q4_K, shape 256, 1 block." and not wrong


def told_of(page, name) -> str:
    """What the page says of a tensor of the file that it was given."""
    page.select_option("#tensor", name)
    return page.inner_text("#file-told")


def test_tensors_that_cannot_be_drawn_are_told_and_names_do_no_harm(chrome, q4_k, tmp_path):
    script, kinds = "<script>window.broken = 1</script>", {"MXFP4": (39, 32, 17), "IQ4_NL": (20, 32, 18)}
    whole = [(f"{script}{n}", (256,), 12, 0) for n in range(1200)]
    drawn = [(name, (weights,), kind, 0) for name, (kind, weights, _) in kinds.items()]
    odd = [("none", (0, 256), 12, 0), ("far", (256,), 12, 1 << 40), ("huge", (1 << 50, 1 << 50), 12, 0)]
    odd += [("foreign", (256,), 16, 0), ("__proto__", (256,), 12, 160)]
    file = tmp_path / "x.gguf"
    block_of_nan = np.array([(np.nan, np.inf)], "<f2, <f2").tobytes() + bytes(140)
    file.write_bytes(gguf(odd + drawn + whole, bytes(range(144)) + bytes(16) + block_of_nan))
    with open(file, "r+b") as sparse:
        sparse.truncate(3 << 30)  # a sparse file, of which only what is shown is read
    with page_of(chrome) as (page, wrong):
        page.goto(q4_k[0].as_uri())
        page.set_input_files("#file", str(file))
        page.locator("#file-told", has_text="1207 tensors. Choose one.").wait_for()
        assert told_of(page, "none") == "none is Q4_K and has no block."
        for name in ("far", "huge"):
            assert told_of(page, name) == f"{name} is Q4_K; the file ends before the tensor does."
        assert told_of(page, "foreign") == "foreign is GGML type 16, which this page does not draw."
        assert told_of(page, "__proto__") == "__proto__: Q4_K, shape 256, 1 block."
        page.locator("#sum", has_text="= NaN").wait_for()
        for name, (_, _, size) in kinds.items():
            assert told_of(page, name).startswith(f"{name}: {name}, shape 32, 1 block")
            page.locator("#told", has_text=f"the tensor {name} in the file x.gguf").wait_for()
            wanted = decoded(name, np.arange(size, dtype=np.uint8))
            shown = page.locator("#weights button").evaluate_all(
                "all => all.map((b) => b.getAttribute('aria-label').split(': ')[1])"
            )
            np.testing.assert_allclose([float(s) for s in shown], wanted, rtol=1e-5)
        assert told_of(page, f"{script}0").startswith(f"{script}0: Q4_K")
        assert page.inner_text("h1") == f"{script}0: Q4_K" and page.evaluate("window.broken") is None
        assert page.inner_text("#tensor").startswith("the first 1000 of 1207 tensors")
        page.fill("#filter", "script>1199")
        assert page.inner_text("#tensor").startswith("1 tensor\n")
        assert page.evaluate(OVERFLOW) == [] and not wrong


# --- inspect --html -----------------------------------------------------------------------------------------

TENSOR = "blk.1.ffn_gate_exps.weight"


def command(*words: object) -> int:
    return run(inspect.main, [str(w) for w in words])


def test_inspect_writes_a_tensor_s_page_and_overwrites_nothing(chrome, tmp_path, capsys):
    path = tmp_path / "block.html"
    assert command(GGUF_DIR, TENSOR, "--block", 5, "--html", path) == 0
    assert f"wrote {path}" in capsys.readouterr().out
    raw = inspect.read_headers(GGUF_DIR).tensors[TENSOR]
    block_5 = np.array(inspect._bytes(raw.info)[5 * 144 : 6 * 144])
    with page_of(chrome) as (page, wrong):
        page.goto(path.as_uri())
        assert "You see block 5 of the tensor blk.1" in page.inner_text(
            "#told"
        ) and TENSOR in page.inner_text("h1")
        said, shown = spec.SPECS["Q4_K"], page.inner_text("body")
        assert said.question in shown and said.fields["dmin"] in shown and "not added" in shown
        shown = page.evaluate(
            """[...document.querySelectorAll("#weights button")]
            .map((b) => b.getAttribute("aria-label").split(": ")[1])"""
        )
        np.testing.assert_allclose([float(s) for s in shown], decoded("Q4_K", block_5), rtol=1e-5)
        assert not wrong
    before = path.read_bytes()
    assert command(GGUF_DIR, TENSOR, "--html", path) == 1 and "E5108" in capsys.readouterr().err
    assert path.read_bytes() == before
    assert command(GGUF_DIR, TENSOR, "--html", path, "--force") == 0 and path.read_bytes() != before
    model = next(GGUF_DIR.glob("*.gguf"))
    assert command(model, TENSOR, "--html", model, "--force") == 1 and "E5105" in capsys.readouterr().err


def test_inspect_refuses_a_page_of_what_has_no_block(tmp_path, capsys):
    path = tmp_path / "block.html"
    assert command(GGUF_DIR, TENSOR, "--block", 2048, "--html", path) == 1
    assert "E4051" in capsys.readouterr().err and not path.exists()
    with pytest.raises(SystemExit) as usage:
        command(GGUF_DIR, "--html", path)
    assert usage.value.code == 2 and not path.exists()


def test_a_name_of_a_tensor_ends_no_script(chrome, tmp_path):
    name = "</script><script>window.broken = 1</script><!-- lead -->"
    path = tmp_path / "page.html"
    path.write_text(block.page("Q4_0", bytes(18), title=name, tensor=name))
    with page_of(chrome) as (page, wrong):
        page.goto(path.as_uri())
        assert page.inner_text("h1") == name and page.evaluate("window.broken") is None
        assert name in page.inner_text("#told") and not wrong


# --- a walk -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REFIMPL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield refimpl.load(backend="reference")


PROMPT = "What is 12 + 30?"


@pytest.mark.parametrize("decode", [None, 2])
def test_the_attention_map_is_what_the_operation_took(model, decode):
    """Times the values, a map is the operation's output; rows sum to one and nobody looks ahead."""
    seen = 0
    for step in refimpl.trace(model, PROMPT, decode):
        if step.name.startswith("mla_"):
            p, i = walk.attention_map(step.inputs), step.inputs
            length = i.get("length") or len(i["latent"])
            values = np.einsum("sl,hdl->shd", i["latent"][:length], i["kv_b"][:, i["q_nope"].shape[-1] :])
            np.testing.assert_allclose(np.einsum("hts,shv->thv", p, values), step.output, rtol=0, atol=1e-4)
            np.testing.assert_allclose(p.sum(-1), 1, rtol=1e-5)
            new = p.shape[1]
            assert not np.triu(p[:, :, length - new :], 1).any()
            seen += 1
    assert seen == model.config.num_hidden_layers * (1 if decode is None else 1 + decode)


@pytest.mark.parametrize("decode", [None, 2])
def test_a_walk_tells_what_the_steps_hold(model, decode):
    steps = list(refimpl.trace(model, PROMPT, decode))
    ids = tracing.token_ids(model, PROMPT)
    found = walk.data(refimpl.trace(model, PROMPT, decode), ids, str)
    assert [s["label"] for s in found["steps"]] == [s.label for s in steps]
    assert set(found["operations"]) == {s.name for s in steps} and all(found["operations"].values())
    for told, step in zip(found["steps"], steps):
        assert told["weight_bytes"] + told["activation_bytes"] == step.nbytes
        assert {n: tuple(shape) for n, _, shape, _ in told["tensors"]} == step.shapes
        if step.name == "route":
            assert told["experts"][1] == step.output[0].tolist()
    last = [one for one in found["lens"] if one["after"] == f"layer {model.config.num_hidden_layers - 1}"]
    best = [int(top[0][0]) for one in last for top in one["top"]]
    assert best == np.argmax(model.logits(ids), axis=-1).tolist()
    assert len(found["lens"]) == (model.config.num_hidden_layers + 1) * len(last)


def test_the_lens_of_a_layer_is_the_answer_of_a_model_that_ends_there(model):
    ids = tracing.token_ids(model, PROMPT)
    found = walk.data(refimpl.trace(model, ids), ids, str)["lens"]
    for layers in range(1, model.config.num_hidden_layers):
        short = Model(replace(model.config, num_hidden_layers=layers), model.checkpoint, model.backend)
        (one,) = [one for one in found if one["after"] == f"layer {layers - 1}"]
        assert [int(top[0][0]) for top in one["top"]] == np.argmax(short.logits(ids), axis=-1).tolist()


def test_a_walk_is_refused_where_its_page_would_lack_something(model, tmp_path):
    begun = refimpl.trace(model, PROMPT)
    next(begun)
    with pytest.raises(ValueError, match="taken already"):
        begun.to_html(tmp_path / "x.html")
    begun.close()
    with pytest.raises(ValueError, match="at most 128 tokens"):
        refimpl.trace(model, [5] * 129).to_html(tmp_path / "x.html")
    (tmp_path / "x.html").write_text("mine")
    with pytest.raises(ResourceError, match="E5108"):
        refimpl.trace(model, PROMPT).to_html(tmp_path / "x.html")
    assert (tmp_path / "x.html").read_text() == "mine"


@pytest.mark.parametrize("width", WIDTHS)
def test_a_walk_steps_forward_and_back(chrome, model, tmp_path, width):
    path, steps = tmp_path / "walk.html", list(refimpl.trace(model, PROMPT, 1))
    refimpl.trace(model, PROMPT, 1).to_html(path)
    with page_of(chrome, width, "dark") as (page, wrong):
        page.goto(path.as_uri())
        for n, step in enumerate(steps):
            assert page.inner_text("#h-step") == f"{n + 1} of {len(steps)}: {step.module} {step.label}"
            assert page.is_visible("#attention") == step.name.startswith("mla_")
            assert page.is_visible("#experts") == (step.name == "route")
            if step.name == "route":
                assert ", ".join(f"{e} (" for e in step.output[0][-1])[:3] in page.inner_text("#chosen")
            if n in (0, 9, 24, len(steps) - 1):
                assert page.evaluate(OVERFLOW) == []
            if n + 1 < len(steps):
                page.click("#on")
        assert page.is_disabled("#on")
        page.click("#layer-back")
        page.click("#back")
        assert not page.inner_text("#h-step").startswith(f"{len(steps)} of")
        page.focus("#at")
        page.keyboard.press("Home")
        assert page.inner_text("#h-step").startswith("1 of") and not wrong
