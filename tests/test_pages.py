"""The pages for a browser: a block's script computes what numpy computes, frames the bits that make a
weight and no others, and reads files as the package does.
"""

import base64
import json
import os
import shutil
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
from refimpl.pages import block, html, layouts, walk
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
        + html.asset("block.js")
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
        assert f"1 weight changed: weight {n} from" in page.inner_text("#told")
        assert page.get_attribute("#weights .changed", "aria-label").startswith(f"weight {n}: ")
        page.fill("#weight", str(n))
        page.press("#weight", "Enter")
        assert float(page.inner_text("#sum").rsplit("=", 1)[1]) == pytest.approx(float(now[n]), rel=1e-5)
        page.click("#reset")
        page.fill("#block", "2")
        page.press("#block", "Enter")
        page.locator("#told", has_text="Block 2").wait_for()
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
        assert page.inner_text("#told").startswith("Byte 0 bit 6 is")
        page.keyboard.press("Tab")
        page.keyboard.press("End")
        page.keyboard.press("Enter")
        assert "Weight 255 is" in page.inner_text("#told")
        assert not page.evaluate("""[...document.querySelectorAll("button, input, select")]
            .filter((e) => !(e.getAttribute("aria-label") || e.textContent || e.labels?.length)).length""")
        assert not wrong


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
        page.locator("#told", has_text="Block 0").wait_for()
        page.fill("#block", "5")
        page.press("#block", "Enter")
        page.locator("#told", has_text="Block 5").wait_for()
        kind = layouts.known(tensor.type)
        size = layouts.layout(kind)["bytes"]
        raw = np.frombuffer(file.read_bytes(), np.uint8)[tensor.info.offset :][5 * size : 6 * size]
        shown = page.evaluate(
            """[...document.querySelectorAll("#weights button")]
            .map((b) => b.getAttribute("aria-label").split(": ")[1])"""
        )
        np.testing.assert_allclose([float(s) for s in shown], decoded(kind, raw), rtol=1e-5)
        assert not wrong


@pytest.mark.parametrize(
    "data", [b"", b"GGUF\x03\0\0\0", b"GGUF" + b"\xff" * 60, b"\xff" * 64, b"\x08" + b"\0" * 7 + b"[1, 2, 3"]
)
def test_a_file_that_is_no_model_is_told_in_a_line(chrome, q4_k, tmp_path, data):
    file = tmp_path / "x.gguf"
    file.write_bytes(data)
    with page_of(chrome) as (page, wrong):
        page.goto(q4_k[0].as_uri())
        page.set_input_files("#file", str(file))
        page.locator("#file-told", has_text="x.gguf: ").wait_for()
        assert page.is_hidden("#list") and not wrong


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
        assert "Block 5 of blk.1" in page.inner_text("#told") and TENSOR in page.inner_text("h1")
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
