"""What the compiler makes of the Triton kernels for a GPU that is not here. Not collected by name:
`test_triton_compile` runs this file once for each compute capability, given in REFIMPL_CAPABILITY, in a
process of its own: Triton keeps conversions of the first GPU it compiled for.
"""

import os
import re
import subprocess
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns that the default will change
os.environ["TRITON_ALWAYS_COMPILE"] = "1"

import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from refimpl.bench.fp8_parts import PARTS, without
from refimpl.config import DeepSeekConfig
from refimpl.kernels import (
    act_quant_triton,
    fp8_exact_gluon,
    fp8_gemm_triton,
    fp8_stream_gluon,
    fp8_wide_gluon,
    mla_decode_triton,
    mla_long_triton,
    mla_prompt_triton,
    norm_rope_triton,
    route_triton,
)
from refimpl.kernels.fp8_linear_triton import constants, persistent
from refimpl.kernels.fp8_overlap_gluon import AHEAD as BLOCKS
from refimpl.kernels.fp8_tiles import WIDE, Tiles, tiles

CAPABILITY = int(os.environ["REFIMPL_CAPABILITY"])
DEEP = os.environ.get("HYPOTHESIS_PROFILE") == "deep"
CHIP = divmod(CAPABILITY, 10)
VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
CODES = "*fp8e4nv" if CAPABILITY >= 89 else "*u8"
SHARED = (
    232448 if CAPABILITY in (90, 100) else 101376
)  # bytes a program may use; 8.0 has more than 8.6, which must do with as much
AHEAD = BLOCKS.value  # whose product, or whose scales, are on their way
TOOLS = Path(triton.backends.nvidia.__file__).parent / "bin"
DIMENSIONS = {
    name: "i32" for name in ("M", "N", "K", "x_row", "scale_row", "scale_group", "blocks_each", "row")
}
DIMENSIONS |= dict.fromkeys(("rounds", "rest", "each", "band"), "i32")
POINTERS = {
    "x_scale": "*fp32",
    "w": CODES,
    "w_scale": "*fp32",
    "partial": "*fp32",
    "arrived": "*i32",
    "scale": "*fp32",
    "weight": "*fp32",
    "eps": "fp32",
}
POINTERS |= {"gate_up": "*bf16", "codes": "*u8", "y": "*fp32"}


def compiled(
    kernel, values: dict, warps: int, /, registers: int | None = None, **types: str
) -> tuple[str, str, dict[str, int]]:
    """PTX, machine code and resources."""
    made = build(kernel, values, warps, registers=registers, **types)
    return made.asm["ptx"], *disassemble(made.asm["cubin"], made.metadata.shared)


def build(
    kernel,
    values: dict,
    warps: int,
    /,
    stages: int = 3,
    registers: int | None = None,
    strides: tuple[str, ...] = ("x_row", "row"),
    **types: str,
):
    """Compiled, with pointers, N, K and strides that are multiples of 16, as in real models."""
    signature = {
        name: (DIMENSIONS | POINTERS | types)[name] for name in kernel.arg_names if name not in values
    }
    even = {
        (kernel.arg_names.index(n),): [["tt.divisibility", 16]]
        for n, t in signature.items()
        if t[0] == "*" or n in ("N", "K", *strides)
    }
    source = GluonASTSource if kernel.is_gluon() else ASTSource
    return triton.compile(
        source(kernel, signature, values, even),
        target=GPUTarget("cuda", CAPABILITY, 32),
        options={"num_warps": warps, "num_stages": stages} | ({"maxnreg": registers} if registers else {}),
    )


def disassemble(cubin: bytes, shared: int) -> tuple[str, dict[str, int]]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run(
                [TOOLS / tool, option, file.name], capture_output=True, check=True, text=True
            ).stdout
            for tool, option in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c"))
        )
    registers, stack, local = map(
        int, re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage).groups()
    )
    return code, {
        "registers": registers,
        "stack": stack + local,
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "shared": shared,
    }


@cache
def product(kind: str, m: int, n: int, k: int, y: str = "*bf16"):
    """What the table picks, compiled."""
    tile = tiles(m, n, k, CHIP, 132, kind)
    x = {"fp8": CODES, "bf16": "*bf16", "f32": "*fp32"}[kind]
    if tile.kernel != "split":
        return tile, *in_gluon(tile, y[1:], None if kind == "fp8" else GLUON["bf16"])
    values = constants(tile, kind, k) | {"FOLLOWS": CAPABILITY >= 90, "EARLY": 2}
    return tile, *compiled(fp8_gemm_triton.split, values, tile.warps, x=x, y=y)


GLUON = {"gluon": fp8_stream_gluon.stream, "wide": fp8_wide_gluon.stream, "bf16": fp8_exact_gluon.stream}


def in_gluon(tile: Tiles, y: str, kernel: Any = None) -> tuple[str, str, dict[str, int]]:
    """The persistent kernel in Gluon for results of type y; without one, that of the tile for codes."""
    kind = "bf16" if kernel is GLUON["bf16"] else "fp8"
    values = persistent(tile, 2 if y == "bf16" else 4, kind, 7168)
    return _in_gluon(kernel or GLUON[tile.kernel], y, tile.tokens, tile.outputs, **values)


@cache  # by what the kernel is compiled with: tiles that are dealt out otherwise are the same kernel
def _in_gluon(
    kernel: Any, y: str, tokens: int, outputs: int, **values: Any
) -> tuple[str, str, dict[str, int]]:
    """With the types that the tiles' descriptions give its arguments."""
    codes = kernel is not GLUON["bf16"]
    result = (min(tokens, 64), min(outputs, 128)) if codes else (tokens, 64)
    x_rows = 64 if outputs == 256 else tokens
    sizes = {
        "x_tiles": ("fp8e4nv", x_rows, 128, 8) if codes else ("bf16", tokens, 128, 16),
        "w_tiles": ("fp8e4nv", outputs, 128, 8),
        "y_tiles": (y, *result, 16 if y == "bf16" else 32),
    }
    types = {
        name: f"tensordesc<{t}[{rows}, {columns}],{gl.NVMMASharedLayout(128, bits, 2)!r}>"
        for name, (t, rows, columns, bits) in sizes.items()
    }
    registers, warps = values.pop("maxnreg", None), values.pop("num_warps")
    return compiled(kernel, values, warps, registers=registers, **types)


CASES = [(kind, m, 7168, 2048) for kind in ("fp8", "bf16", "f32") for m in (1, 32)]
CASES += [
    ("fp8", 64, 7168, 2048),
    ("fp8", 128, 2112, 7168),
    ("bf16", 64, 2112, 7168),
    ("bf16", 128, 7168, 2048),
    ("fp8", 16, 576, 200),
    ("bf16", 16, 576, 200),
]
CASES += [("fp8", 4096, 7168, 2048)]
if CAPABILITY >= 100:  # a sample: nothing was tuned for these
    CASES = CASES[::3]
elif CAPABILITY < 90 and not DEEP:
    CASES = CASES[::2]  # all of them for Hopper


@pytest.mark.parametrize(("kind", "m", "n", "k"), CASES)
def test_products_fit_the_chip(kind, m, n, k):
    _tile, ptx, _code, used = product(kind, m, n, k)
    # For 12.0 the assembler keeps a number or two on the stack from before the loop to behind it, with
    # registers to spare.
    assert used["spills"] <= (6 if CAPABILITY == 120 else 0) and used["stack"] <= (
        16 if CAPABILITY == 120 else 0
    ), used
    assert used["shared"] <= SHARED and used["registers"] <= 255, used
    if CAPABILITY < 100:  # later ones have other matrix instructions, and this is no page about them
        wide = "e4m3" if kind == "fp8" and CAPABILITY >= 89 else "bf16"
        prefix = (
            r"wgmma\.mma_async\.sync\.aligned\.m64n\d+" if CAPABILITY == 90 else r"mma\.sync\.aligned\.m16n8"
        )
        found = re.findall(prefix + rf"\S*\.{wide}\.{wide}", ptx)
        assert found, f"no {wide} products among {set(re.findall(r'w?g?mma.*sync.*', ptx))}"


@pytest.mark.parametrize(
    ("kind", "n", "k", "programs", "streamed"),
    [("fp8", 7168, 2048, 2, 2), ("fp8", 32768, 512, 4, 3), ("bf16", 7168, 2048, 4, 0)],
)
def test_decode_leaves_room_for_programs_beside_it(kind, n, k, programs, streamed):
    """As many on a processor as the table counts on to keep enough reads under way; `streamed`: of the
    persistent kernel.
    """
    tile, _ptx, _code, used = product(kind, 1, n, k)
    threads = 128
    if tile.kernel == "gluon":  # four warps, and one in the place of four
        threads, programs = 256, streamed
    assert programs * threads * used["registers"] <= 65536
    if CAPABILITY in (90, 100):
        assert programs * used["shared"] <= SHARED


@pytest.mark.skipif(CAPABILITY != 90, reason="the persistent kernel is for Hopper")
@pytest.mark.parametrize("y", ["bf16", "fp32"])
@pytest.mark.parametrize(("outputs", "tokens"), [(64, 16), (64, 64), (64, 128), (128, 128), (256, 128)])
def test_the_persistent_kernel_multiplies_into_the_same_registers(outputs, tokens, y):
    """One product's registers for each group with 256 outputs, of two products in turns with fewer; and it
    promotes with one instruction an element.
    """
    halves, groups = max(1, outputs // 128), max(1, tokens // 64)
    width = 16 if tokens == 16 else min(outputs, 128)  # 16 tokens are on the right
    blocks = AHEAD if outputs == 256 else AHEAD + 1  # one by itself, as many as are over
    tile = WIDE if outputs == 256 else Tiles("gluon", outputs, tokens, 4, 6 if tokens <= 64 else 0)
    ptx, code, used = in_gluon(tile, y)
    assert used["spills"] == used["stack"] == 0 and used["shared"] <= SHARED, used
    if tokens <= 64:
        # With those of the next launch; of 16 tokens three fit beside each other.
        programs = 3 if tokens == 16 else 2
        assert programs * 256 * used["registers"] <= 65536 and programs * used["shared"] <= SHARED
    else:
        most = 232 if outputs == 64 else 240
        assert used["registers"] <= 168 and f"setmaxnreg.inc.sync.aligned.u32 \t{most}" in ptx
    assert f"wgmma.mma_async.sync.aligned.m64n{width}k32.f32.e4m3.e4m3" in ptx
    products = re.findall(r"QGMMA\S+ (R\d+), gdesc\[\w+\], (R\d+|RZ)", code)
    assert (
        len(products) == groups * halves * 4 * blocks
        and all(into == onto for into, onto in products)
        and len(set(products)) <= groups * (1 if outputs == 256 else 2)
    ), products
    # What still runs after each wait: the next block's product, but for the last block and the odd one.
    waits = Counter(re.findall(r"WARPGROUP\.DEPBAR\S* \S+ (\w+)", code))
    later = 0 if outputs == 256 else groups * (AHEAD - 1)
    assert waits == Counter({"0x0": groups * halves * blocks - later, "0x1": later}), waits
    promoted = groups * halves * width // 2 * blocks  # elements of a thread
    assert len(re.findall(r"\bFFMA\b", code)) == promoted
    assert "UTMALDG" in code and "UTMASTG" in code and "LDGSTS" not in code, (
        "tiles come and go by the copy engine alone"
    )
    # Who reads what the kernel before wrote, or writes, waits (W) for its end. Tiles (T) of weights come
    # before that, and then with those of x; scales are loaded (L), results stored (S).
    short = {"ACQBULK": "W", "UTMALDG": "T", "LDG": "L"} | dict.fromkeys(("STG", "ATOMG", "UTMASTG"), "S")
    order = "".join(short[name] for name in re.findall(rf"\b({'|'.join(short)})\b", code))
    order = re.sub(r"([TLS])\1+", r"\1", order)
    # A warp without work waits, too: before all else or at the end, as compilers put it.
    group = "WLS" if outputs == 256 else "WLSLS"  # what is shared is stored in parts, and these are loaded
    assert order.count(group) == groups and order.replace(group, "") in ("WTWT", "TWTW"), order
    assert "griddepcontrol.launch_dependents" in ptx


@pytest.mark.skipif(CAPABILITY != 90, reason="the persistent kernel is for Hopper")
@pytest.mark.parametrize("y", ["bf16", "fp32"])
@pytest.mark.parametrize(("outputs", "tokens"), [(64, 64), (64, 128), (128, 128)])
def test_the_persistent_kernel_widens_weights_in_registers(outputs, tokens, y):
    tile = Tiles("gluon", outputs, tokens, 4, 0, 1, 2 if tokens == 64 else 1)
    ptx, code, used = in_gluon(tile, y, GLUON["bf16"])
    assert used["spills"] == used["stack"] == 0 and used["shared"] <= SHARED // tile.beside, used
    if tokens == 64:
        assert used["registers"] <= 128, "two programs fit a processor"
    assert f"wgmma.mma_async.sync.aligned.m64n{tokens}k16.f32.bf16.bf16" in ptx
    groups = outputs // 64
    # The left operand is registers, and the sum stays where it is.
    products = re.findall(r"HGMMA\S+ (R\d+), R\d+, gdesc\[\w+\], (R\d+)", code)
    assert len(products) == groups * 8 and all(into == onto for into, onto in products), products
    assert "UTMALDG" in code and "UTMASTG" in code and "LDGSTS" not in code


@pytest.mark.skipif(CAPABILITY < 90, reason="from 9.0 on a kernel starts before the one before it has ended")
def test_products_of_few_tokens_wait_for_the_kernel_before_them():
    _tile, ptx, _code, _used = product("bf16", 1, 7168, 2048)
    wait = ptx.index("griddepcontrol.wait")
    assert wait < re.search(r"ld\.global|cp\.async", ptx).start()
    assert wait < ptx.index("griddepcontrol.launch_dependents")


QUANTIZERS = {
    "_act_quant": {"ROWS": 32, "UE8M0": False},
    "_swiglu_quant": {"ROWS": 32, "UE8M0": True},
    "_rms_norm_quant": {"KEEP": True, "GROUPS": 64, "UE8M0": False},
}


@pytest.mark.parametrize("name", QUANTIZERS)
def test_quantizers_round_once_and_divide_exactly(name):
    right = CAPABILITY >= 90 or (CAPABILITY == 89 and VERSION >= (3, 9))
    values = QUANTIZERS[name] | {"NATIVE": right, "FOLLOWS": CAPABILITY >= 90}
    ptx, code, used = compiled(
        getattr(act_quant_triton, name), values, 8 if name == "_rms_norm_quant" else 4, x="*bf16"
    )
    if CAPABILITY >= 90:  # nothing is read or written before the end of the kernel before
        assert "griddepcontrol.launch_dependents" in ptx
        assert code.index("ACQBULK") < min(code.index(name) for name in ("LDG", "STG"))
    assert "div.rn.f32" in ptx and used["spills"] == 0
    if name != "_rms_norm_quant":  # its mean may be off by what the bound of rms_norm allows
        assert "div.full" not in ptx and "div.approx" not in ptx
    assert ("cvt.rn.satfinite.e4m3x2.f32" in ptx) == right
    assert "e4m3x2.f16x2" not in ptx, "rounded by way of float16"


@pytest.mark.skipif(CAPABILITY >= 89, reason="has E4M3")
def test_why_codes_are_decoded_by_integers_here():
    with pytest.raises(triton.CompilationError) as error:
        compiled(
            act_quant_triton._act_quant,
            QUANTIZERS["_act_quant"] | {"NATIVE": True, "FOLLOWS": False},
            4,
            x="*bf16",
        )
    assert "fp8e4nv not supported" in str(error.value.__cause__.__cause__ or error.value.__cause__)


def test_weight_dequant_compiles():
    for y in ("*fp32", "*bf16"):
        _ptx, _code, used = compiled(act_quant_triton._weight_dequant, {"ROWS": 32}, 4, codes=CODES, y=y)
        assert used["spills"] == 0


DECODING = {name: "i32" for name in ("n", "v", "L", "R", "S", "H", "each", "width")}
DECODING |= {name: "i32" for name in ("q_head", "pe_head", "latent_row", "pe_row", "E", "D")}
DECODING |= {"length": "*i64", "ids": "*i64", "scale": "fp32"}
DECODING |= {name: "*fp32" for name in ("q", "q_latent", "q_pe", "scores", "mixed", "highest", "sums")}
DECODING |= {name: "*fp32" for name in ("x", "logits", "bias", "weights")}


ATTENDED = [(n, s, False) for n in ("absorb", "score", "mix", "value") for s in ("bfloat16", "float32")]
if CAPABILITY != 90 and not DEEP:  # each type on two of the four chips
    ATTENDED = ATTENDED[CAPABILITY in (89, 120) :: 2]
ATTENDED += [("absorb", "bfloat16", True), ("value", "bfloat16", True)]


@pytest.mark.parametrize(("name", "stored", "many"), ATTENDED)
def test_attention_of_one_token_keeps_to_the_registers(name, stored, many):
    dtype, pointer = getattr(torch, stored), {"bfloat16": "*bf16", "float32": "*fp32"}[stored]
    values = mla_decode_triton.sizes(dtype, 128, 64, 512, 128, many)[name]
    warps = values.pop("num_warps", 4)
    counted = {} if name == "absorb" else {"COUNTED": True}
    types = DECODING | dict.fromkeys(("kv_b", "latent", "k_pe"), pointer)
    types |= {"q_latent": "*bf16"} if many else {}
    ptx, _code, used = compiled(getattr(mla_decode_triton, name), values | counted, warps, **types)
    assert used["spills"] == used["stack"] == 0 and used["shared"] <= SHARED // 2, used
    if name in ("score", "mix"):
        assert ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32" in ptx) == (stored == "bfloat16")
        assert "tf32" not in ptx, "rounded to 11 bits"


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("name", ["absorb", "score", "mix", "value"])
def test_attention_of_one_token_compiles_for_small_heads(name, many):
    """Sizes that all differ from each other, and are below those of a block."""
    values = mla_decode_triton.sizes(torch.bfloat16, 12, 8, 128, 6, many)[name]
    warps = values.pop("num_warps", 4)
    types = DECODING | dict.fromkeys(("kv_b", "latent", "k_pe"), "*bf16")
    types |= {"q_latent": "*bf16"} if many and name == "absorb" else {}
    counted = {} if name == "absorb" else {"COUNTED": True}
    compiled(getattr(mla_decode_triton, name), values | counted, warps, **types)


TILED = dict.fromkeys(("q", "latent", "k_pe"), "*bf16") | {"length": "*i64", "S": "i32", "scale": "fp32"}
TILED |= dict.fromkeys(("p", "peaks", "tile_sums", "mixed", "highest", "sums"), "*fp32")


@pytest.mark.parametrize("heads", [128, 64] if CAPABILITY == 90 or DEEP else [128])
@pytest.mark.parametrize("name", ["score", "mix"])
def test_large_tiles_of_attention_use_the_widest_products_and_fit(name, heads):
    """Both parts of a query or a share meet all columns of a tile in one instruction of a group of warps."""
    shape = mla_long_triton.shapes(CHIP)[name].of(heads, 512)
    values = {"COUNTED": True, "H": heads, "LATENT_ROW": 576, "BH": shape.heads, "BS": shape.rows}
    if name == "score":
        values |= {"L": 576, "R": 0, "PE_ROW": 576, "BC": shape.columns}
    else:
        tiles = {"SHARES": mla_long_triton.SHARES, "TILE": mla_long_triton.ROWS, "EACH": mla_long_triton.EACH}
        values |= {"L": 512, "BL": shape.columns} | tiles
    made = build(getattr(mla_long_triton, name), values, shape.warps, stages=shape.stages, **TILED)
    _code, used = disassemble(made.asm["cubin"], made.metadata.shared)
    assert used["spills"] == used["stack"] == 0 and used["shared"] <= SHARED, used
    ptx, columns = made.asm["ptx"], shape.rows if name == "score" else shape.columns
    assert "tf32" not in ptx, "rounded to 11 bits"
    if CAPABILITY == 90:
        found = re.findall(r"wgmma\.mma_async\.sync\.aligned\.(m64n\d+k16\.f32\.bf16\.bf16)", ptx)
        depth = shape.columns if name == "score" else shape.rows
        assert Counter(found) == {f"m64n{columns}k16.f32.bf16.bf16": 2 * depth // 16}
        assert 2 * used["shared"] <= SHARED and 2 * 32 * shape.warps * used["registers"] <= 65536, (
            "two programs fit a processor"
        )
    else:
        assert {100: "tcgen05.mma"}.get(CAPABILITY, "mma.sync.aligned.m16n8k16") in ptx


PROMPT = dict.fromkeys(("keys", "keys_low", "values", "values_low", "k_pe"), "*bf16")
PROMPT |= dict.fromkeys(("q_nope", "q_pe", "keys_values", "out"), "*fp32") | {"scale": "fp32"}
PROMPT |= dict.fromkeys(("T", "S", "H", "N", "V", "first", "whole"), "i32") | {"so_far": "*fp32"}
PROMPT_STRIDES = ("nope_row", "nope_head", "pe_row", "pe_head", "k_row", "out_row", "out_head")
PROMPT |= dict.fromkeys(PROMPT_STRIDES, "i32")


@pytest.mark.parametrize("pieces", [False, True])
def test_attention_of_prompts_uses_tensor_cores_and_fits(pieces):
    shape = mla_prompt_triton.shape(CHIP)
    sizes = {"N": 128, "R": 64, "V": 128, "BM": shape.queries, "BN": shape.rows, "PIECES": pieces}
    options = {"stages": shape.stages, "strides": PROMPT_STRIDES}
    made = build(mla_prompt_triton.attend, sizes, shape.warps, **options, **PROMPT)
    ptx, (_code, used) = made.asm["ptx"], disassemble(made.asm["cubin"], made.metadata.shared)
    assert used["shared"] <= SHARED, used
    # Chips with half the registers for a program keep some addresses on the stack, beside the loop.
    assert used["spills"] <= (0 if CAPABILITY in (90, 100) else 96), used
    assert ".bf16" in ptx and "tf32" not in ptx, "rounded to 11 bits"
    assert {90: "wgmma", 100: "tcgen05.mma"}.get(CAPABILITY, "mma.sync") in ptx
    _ptx, _code, used = compiled(mla_prompt_triton.split, {"BC": 128, "BR": 32}, 4, **PROMPT)
    assert used["spills"] == 0


SMALL = {
    "_rms_norm": ({"COLUMNS": 8192}, 16),
    "_rope": ({"HEADS": 32, "PAIRS": 32}, 4),
    "_write_row": ({"COLUMNS": 512}, 4),
    "_ask": ({"COLUMNS": 512, "CHOSEN": 8}, 4),
    "_add": ({"COLUMNS": 512}, 4),
}


@pytest.mark.parametrize("name", SMALL)
def test_what_a_token_does_beside_its_products_compiles(name):
    values, warps = SMALL[name]
    types = dict.fromkeys(("to_x", "to_weights", "other", "cos", "sin"), "*fp32")
    types |= {"to_ids": "*i64", "place": "*i64", "rows": "*bf16", "k_pe": "*fp32", "latent": "*fp32"}
    types |= {"A": "i32", "x_head": "i32"}
    _ptx, _code, used = compiled(getattr(norm_rope_triton, name), values, warps, **(DECODING | types))
    assert used["spills"] == 0


def test_the_router_compiles():
    for weight in ("*bf16", "*fp32"):
        types = DECODING | {"weight": weight}
        _ptx, _code, used = compiled(
            route_triton.project, {"ROWS": route_triton.ROWS, "BD": 1024}, 4, **types
        )
        assert used["spills"] == 0
    ptx, _code, used = compiled(
        route_triton.choose, route_triton.constants(DeepSeekConfig(), 32), 1, **DECODING
    )
    assert used["spills"] == 0 and "div.rn.f32" in ptx and "div.full" not in ptx


WHOLE = {"split": fp8_gemm_triton.split} | {name: GLUON[name] for name in ("gluon", "wide")}


@pytest.mark.skipif(CAPABILITY != 90, reason="the parts are those of the kernels for Hopper")
@pytest.mark.parametrize("name", PARTS)
def test_kernels_without_a_part_of_their_work_are_smaller(name):
    tokens = {"split": 1, "gluon": 256, "wide": 4096}[name]
    # Hopper takes codes to the first kernel only where the copy engine cannot address them.
    tile = tiles(tokens, 7168, 16384, (8, 9) if name == "split" else CHIP, 132, "fp8")
    assert tile.kernel == name
    values, lengths = constants(tile, "fp8", 16384), {}
    for part, edits in PARTS[name].items():
        kernel = without(name, edits) if edits else WHOLE[name]
        ptx, _code, used = (
            in_gluon(tile, "bf16", kernel)
            if name != "split"
            else compiled(kernel, values | {"FOLLOWS": True, "EARLY": 2}, tile.warps, x=CODES, y="*bf16")
        )
        lengths[part] = len(ptx.splitlines())
        # Without a part, registers are dealt out anew. A few numbers on the stack do not show in a time.
        assert used["spills"] <= (0 if part == "whole" else 32), part
    assert all(
        length < lengths["whole"] for part, length in lengths.items() if part not in ("whole", "cached")
    ), lengths
    assert lengths.get("cached") != lengths["whole"]
