"""The merge: what it writes, that bytes are unchanged, what it refuses, that it goes on where it stopped, and
how little memory it takes.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from refimpl import chat, convert_model, formats, inspect
from refimpl.checkpoint import gguf, link, names, safetensors
from refimpl.checkpoint.folder import Checkpoint
from refimpl.cli import run
from refimpl.config import DeepSeekConfig
from refimpl.errors import RefimplError
from refimpl.files import chunks
from refimpl.merge import write
from refimpl.tiny import FP8_DIR, GGUF_DIR, GGUF_FILE
from tests.hostile import Refusal

V3 = json.loads((FP8_DIR / "config.json").read_text()) | {
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "first_k_dense_replace": 3,
    "vocab_size": 129280,
}


def payload(info) -> bytes:
    return b"".join(chunks(info.path, info.offset, info.nbytes))


def test_payload_bytes_are_unchanged_and_names_are_the_contract(hybrid_folder):
    merged, _ = safetensors.read_folder(hybrid_folder)
    plain, _ = safetensors.read_folder(FP8_DIR, wanted=lambda name: not names.is_routed_expert(name))
    stacks = {n: t for n, t in gguf.read_all(GGUF_DIR).tensors.items() if "_exps" in n}
    for name, info in plain.items():
        copy = merged.pop(names.to_gguf(name))
        assert (copy.dtype, copy.shape, payload(copy)) == (info.dtype, info.shape, payload(info))
    for name, info in stacks.items():
        copy, kind = merged.pop(name), merged.pop(name.replace(".weight", ".ggml_type"))
        assert (copy.dtype, copy.shape) == ("U8", (info.nbytes,)) and payload(copy) == payload(info)
        assert (kind.dtype, kind.shape) == ("I64", ()) and int(safetensors.view(kind)) == formats.type_id(
            info.dtype
        )
    assert not merged


def test_the_folder_is_ktransformers_with_what_that_lacks(hybrid_folder):
    files = sorted(p.name for p in hybrid_folder.iterdir())
    shards = [f"model-{i:05d}-of-00004.safetensors" for i in range(5)]
    others = [
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "refimpl-manifest.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert files == sorted(shards + others)
    index = json.loads((hybrid_folder / "model.safetensors.index.json").read_text())
    for i, shard in enumerate(shards):
        with safe_open(hybrid_folder / shard, "pt") as file:  # the package reads every file, FP8 included
            for name in file.keys():  # noqa: SIM118
                file.get_tensor(name)
                assert index["weight_map"][name] == shard
                assert names.layer_of(name) == (i - 1 if i else None)
                if name.endswith(
                    ".weight_scale_inv"
                ):  # KTransformers looks for a scale in the file of its weight
                    assert name.removesuffix("_scale_inv") in file.keys()  # noqa: SIM118
            if i > 1:
                assert file.metadata()[f"blk.{i - 1}.ffn_up_exps.weight.shape"] == "8,256,256"
    assert index["metadata"]["total_size"] == sum(
        t.nbytes for t in safetensors.read_folder(hybrid_folder)[0].values()
    )


def nothing():
    return []


def sparse(path, head: bytes, nbytes: int) -> None:
    """A file of its true size whose data is a hole."""
    with open(path, "wb") as file:
        file.write(head)
        file.truncate(len(head) + nbytes)


def sources(folder, change, kind=lambda layer, part: 12):
    """A checkpoint without routed experts and a GGUF with nothing else, of V3's true shapes but for `change`;
    data are holes.
    """
    config = V3 | change
    c = DeepSeekConfig.from_dict(config)
    hf, gg = folder / "hf", folder / "gguf"
    hf.mkdir(parents=True)
    gg.mkdir()
    (hf / "config.json").write_text(json.dumps(config))
    plain = [
        safetensors.Entry(n, d, s, nothing)
        for n, (d, s) in names.hf_inventory(c).items()
        if not names.is_routed_expert(n)
    ]
    plain.sort(key=lambda e: -safetensors.DTYPES[e.dtype].itemsize)
    sparse(hf / "model.safetensors", safetensors.head(plain), sum(e.nbytes for e in plain))
    stacks = [
        gguf.Entry(f"blk.{i}.ffn_{part}_exps.weight", kind(i, part), (c.n_routed_experts, *shape), nothing)
        for i in range(c.first_k_dense_replace, c.num_hidden_layers)
        for part, shape in (("gate", (2048, 7168)), ("up", (2048, 7168)), ("down", (7168, 2048)))
    ]
    sparse(
        gg / "model.gguf",
        gguf.head({"general.architecture": "deepseek2"}, stacks),
        sum(e.nbytes for e in stacks),
    )
    return hf, gg


def test_the_plan_of_deepseek_v3_has_the_published_size_and_wants_a_disk_of_it(tmp_path, monkeypatch):
    def more_bits(layer, part):
        return 14 if part == "down" and (layer < 7 or layer >= 53 or (layer - 7) % 3 == 2) else 12

    p = convert_model.plan(*sources(tmp_path, {}, more_bits))
    assert (len(p.shards), p.tensors, round(p.nbytes / 1e9, 1)) == (62, 1687, 413.1)
    assert (
        p.shards[0].file == "model-00000-of-00061.safetensors"
        and p.shards[-1].file == "model-00061-of-00061.safetensors"
    )
    assert [len(s.items) for s in p.shards] == [3] + [20] * 3 + [28] * 58
    assert p.skipped_layers == (61,)
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 6 * 10**11, 4 * 10**11)
    )
    with pytest.raises(
        RefimplError,
        match=r"E5102 .*not enough room on this disk \(found 400\.0 GB free, expected 413\.1 GB\)",
    ):
        convert_model.write(p, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from Linux's /proc")
def test_merging_takes_little_memory_whatever_the_size_of_a_layer(tmp_path):
    """A layer of V3's shapes with 8 experts (0.6 GB), or with REFIMPL_FULL=1 all 256 (7.5 GB); the figure is
    in docs/hybrid-folder.md.
    """
    experts, few = (256, {}) if os.environ.get("REFIMPL_FULL") else (8, {"n_group": 2, "topk_group": 2})
    few |= {
        "vocab_size": 1024,
        "num_hidden_layers": 2,
        "first_k_dense_replace": 1,
        "n_routed_experts": experts,
        "num_nextn_predict_layers": 0,
    }
    hf, gg = sources(tmp_path, few, lambda layer, part: 14 if part == "down" else 12)
    code = r"""
import re, sys
from pathlib import Path
from refimpl import convert_model
# Not getrusage: its peak counts what the parent held at the moment of exec.
peak = lambda: int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
before = peak()
plan = convert_model.plan(Path(sys.argv[1]), Path(sys.argv[2]))
convert_model.write(plan, Path(sys.argv[3]))
print(max(s.nbytes for s in plan.shards), peak() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, hf, gg, tmp_path / "out"], capture_output=True, text=True, check=True
    )
    largest, kib = map(int, done.stdout.split())
    print(f"layer of {largest / 1e9:.1f} GB: peak {kib / 1024:.0f} MiB above the interpreter")
    assert largest > 28_000_000 * experts and kib < 256 * 1024
    shutil.rmtree(tmp_path / "out")


def cut(folder, tensors, shards):
    """A checkpoint's headers in as many files, in order, with an index; files that hold routed experts alone
    are directories: who opens one fails.
    """
    folder.mkdir()
    weight_map, poisoned = {}, 0
    step = -(-len(tensors) // shards)
    for k in range(shards):
        part, name = tensors[k * step : (k + 1) * step], f"model-{k + 1:05d}-of-{shards:06d}.safetensors"
        weight_map |= {n: name for n, _, _ in part}
        if all(names.is_routed_expert(n) for n, _, _ in part):
            (folder / name).mkdir()
            poisoned += 1
        else:
            entries = sorted(
                (safetensors.Entry(n, d, s, nothing) for n, d, s in part),
                key=lambda e: -safetensors.DTYPES[e.dtype].itemsize,
            )
            sparse(folder / name, safetensors.head(entries), sum(e.nbytes for e in entries))
    (folder / safetensors.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return poisoned


def test_deepseek_v3_in_163_files_beside_a_gguf_in_nine_is_planned_from_headers(tmp_path):
    c = DeepSeekConfig.from_dict(V3)
    tensors = [(n, d, s) for n, (d, s) in names.hf_inventory(c).items()]
    assert cut(tmp_path / "hf", tensors, 163) > 40
    (tmp_path / "hf" / "config.json").write_text(json.dumps(V3))
    stacks = [
        gguf.Entry(f"blk.{i}.ffn_{part}_exps.weight", 12, (256, *shape), nothing)
        for i in range(3, 61)
        for part, shape in (("gate", (2048, 7168)), ("up", (2048, 7168)), ("down", (7168, 2048)))
    ]
    (tmp_path / "gguf").mkdir()
    for k in range(9):
        part = stacks[k * 20 : (k + 1) * 20]
        meta = {
            "general.architecture": "deepseek2",
            "split.no": k,
            "split.count": 9,
            "split.tensors.count": len(stacks),
        }
        sparse(
            tmp_path / "gguf" / f"v3-{k + 1:05d}-of-00009.gguf",
            gguf.head(meta, part),
            sum(e.nbytes for e in part),
        )
    p = convert_model.plan(tmp_path / "hf", tmp_path / "gguf")
    assert (len(p.shards), p.tensors, p.skipped_layers) == (62, 1687, (61,))
    linked = convert_model.plan(tmp_path / "hf", tmp_path / "gguf", linked=True)
    assert (linked.tensors, len(linked.links), linked.types) == (1687 - 6 * 58, 9, p.types)
    assert (
        round(linked.nbytes / 1e9, 1) == 19.1
        and linked.nbytes == p.nbytes - sum(p.types.values()) - 8 * 3 * 58
    )


def test_with_an_index_files_of_experts_alone_are_never_opened(tmp_path, hybrid_folder):
    arrays = {
        n: (t.dtype, np.array(safetensors.view(t))) for n, t in safetensors.read_folder(FP8_DIR)[0].items()
    }
    folder = tmp_path / "hf"
    shutil.copytree(FP8_DIR, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    plain = {n: v for n, v in arrays.items() if not names.is_routed_expert(n)}
    safetensors.save(folder / "model-00002-of-00002.safetensors", plain)
    (folder / "model-00001-of-00002.safetensors").mkdir()  # neither opened nor read: it is no file
    files = {n: f"model-0000{2 if n in plain else 1}-of-00002.safetensors" for n in arrays}
    (folder / safetensors.INDEX).write_text(json.dumps({"weight_map": files}))
    convert_model.write(convert_model.plan(folder, GGUF_DIR), tmp_path / "a")
    (folder / "model-00001-of-00002.safetensors").rmdir()  # nor need it be there
    convert_model.write(convert_model.plan(folder, GGUF_DIR), tmp_path / "b")
    for path in hybrid_folder.iterdir():
        assert (
            (tmp_path / "a" / path.name).read_bytes()
            == (tmp_path / "b" / path.name).read_bytes()
            == path.read_bytes()
        )


# --- linked folders -----------------------------------------------------------------------------------------


def a_link(tmp_path, source=GGUF_FILE):
    """A linked folder beside its own copy of the GGUF."""
    (tmp_path / "gguf").mkdir(parents=True)
    shutil.copy(source, tmp_path / "gguf" / "model.gguf")
    p = convert_model.plan(FP8_DIR, tmp_path / "gguf", linked=True)
    convert_model.write(p, tmp_path / "out")
    return p, tmp_path / "out"


def test_a_linked_folder_is_the_same_model_without_the_bytes_of_its_experts(tmp_path, hybrid_folder):
    p, out = a_link(tmp_path)
    whole, linked = Checkpoint.open(hybrid_folder), Checkpoint.open(out)
    assert linked.kind == "hybrid" and set(linked) == set(whole)
    for name in whole:
        a, b = whole[name], linked[name]
        for x, y in zip(a, b, strict=True) if isinstance(a, tuple) else ((a, b),):
            assert np.array_equal(x, y), name
    assert sum(f.stat().st_size for f in out.glob("*.safetensors")) < p.nbytes + 20_000
    assert p.nbytes == convert_model.plan(FP8_DIR, GGUF_DIR).nbytes - sum(p.types.values()) - 9 * 8
    assert convert_model.verify(out) == p.tensors == 107 - 2 * 9
    model = inspect.read_headers(out)
    assert (model.kind, model.tensors["blk.1.ffn_gate_exps.weight"].type, len(model.tensors)) == (
        "hybrid",
        "Q4_K",
        107 - 9,
    )


def test_experts_of_every_type_and_one_by_one_can_be_linked(tmp_path):
    """F32 is a type of both formats: a linked tensor is GGUF's."""
    sizes = {"blk.1.ffn_gate_exps.weight": 0, "blk.1.ffn_up_exps.weight": 1}

    def change(e):
        kind = sizes.get(e.name)
        return (
            e
            if kind is None
            else gguf.Entry(
                e.name,
                kind,
                e.shape,
                lambda e=e: [np.ones(e.shape, np.float32 if kind == 0 else np.float16).tobytes()],
            )
        )

    _, out = a_link(tmp_path / "a", regguf(tmp_path / "wide.gguf", change))
    weights = Checkpoint.open(out)
    assert (
        np.all(weights["blk.1.ffn_gate_exps.weight"] == 1)
        and weights["blk.1.ffn_up_exps.weight"].ggml_type == 1
    )
    _, out = a_link(tmp_path / "b", one_by_one(tmp_path / "old.gguf"))
    assert len(Checkpoint.open(out)["blk.1.ffn_gate_exps.weight"]) == 8


def test_a_linked_folder_moves_with_its_gguf_and_names_one_that_changed_or_went(tmp_path):
    _, out = a_link(tmp_path / "here")
    assert json.loads((out / link.LINK).read_text())["files"][0]["path"] == os.path.join(
        "..", "gguf", "model.gguf"
    )
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    out, model = tmp_path / "there" / "out", tmp_path / "there" / "gguf" / "model.gguf"
    shutil.rmtree(tmp_path / "here")
    assert convert_model.verify(out)
    os.utime(model, (1, 1))
    for look in (Checkpoint.open, convert_model.verify, inspect.read_headers):
        with pytest.raises(
            RefimplError, match=r"E3204 .*is another \(found .* expected .*merge with --link again"
        ):
            look(out)
    model.unlink()
    with pytest.raises(RefimplError, match=r"E3204 .*is not there"):
        Checkpoint.open(out)
    for bad in (
        "",
        "[]",
        '{"format_version": "2", "files": []}',
        '{"format_version": "1", "files": [{"path": "x", "size": 1, "mtime_ns": 1}]}',
    ):
        (out / link.LINK).write_text(bad)
        with pytest.raises(RefimplError, match="E3203"):
            Checkpoint.open(out)


def test_what_is_linked_is_verified_where_its_checksums_were_recorded(tmp_path, capsys):
    _, out = a_link(tmp_path)
    assert run(convert_model.main, ["--output_path", str(out), "--verify", "--json"]) == 0
    told = capsys.readouterr()
    assert (json.loads(told.out)["verified"], json.loads(told.out)["unrecorded"]) == (
        89,
        9,
    ) and "9 tensors in a linked GGUF have no" in told.err
    paths = [
        "--safetensor_path",
        str(FP8_DIR),
        "--gguf_path",
        str(tmp_path / "gguf"),
        "--output_path",
        str(tmp_path / "sums"),
    ]
    assert run(convert_model.main, [*paths, "--link", "--verify", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["verified"], report["unrecorded"]) == (89, 0)  # the others were read for their checksums
    assert convert_model.verify(tmp_path / "sums") == 89 + 9
    model = tmp_path / "gguf" / "model.gguf"
    info = gguf.read(model).tensors["blk.2.ffn_up_exps.weight"]
    seen = os.stat(model)
    with open(model, "r+b") as file:
        file.seek(info.offset + info.nbytes - 1)
        file.write(bytes([payload(info)[-1] ^ 1]))
    os.utime(
        model, ns=(seen.st_atime_ns, seen.st_mtime_ns)
    )  # a bit that no one has written: rot, or a bad cable
    assert convert_model.verify(out) == 89
    with pytest.raises(
        RefimplError,
        match=r"E3201 .*model\.gguf: tensor blk\.2\.ffn_up_exps\.weight is not what was merged .*fetch "
        r"this file again",
    ):
        convert_model.verify(tmp_path / "sums")


def test_the_checksums_of_a_link_are_taken_once_and_given_up_with_the_rest(tmp_path, monkeypatch):
    (tmp_path / "gguf").mkdir()
    shutil.copy(GGUF_FILE, tmp_path / "gguf" / "model.gguf")
    p = convert_model.plan(FP8_DIR, tmp_path / "gguf", linked=True)
    whole = p.nbytes + sum(p.types.values())
    with monkeypatch.context() as m, pytest.raises(OSError, match="no more"):
        m.setattr(write, "_finish", lambda *_: (_ for _ in ()).throw(OSError("no more")))
        convert_model.write(p, tmp_path / "out", record=True)
    assert not (tmp_path / "out").exists()
    told = []
    with monkeypatch.context() as m:
        m.setattr(write, "digest", None)
        convert_model.write(p, tmp_path / "out", told.append, record=True)
    assert sum(told) == whole and convert_model.verify(tmp_path / "out") == 98


def test_a_linked_folder_chats_and_says_in_one_line_that_its_gguf_went(tmp_path, capsys):
    _, out = a_link(tmp_path)
    ask = [
        "--gguf_path",
        str(out),
        "-p",
        "What is 7 + 8?",
        "--greedy",
        "--json",
        "--backend",
        "reference",
        "--max_new_tokens",
        "4",
    ]
    assert run(chat.main, ask) == 0
    linked = json.loads(capsys.readouterr().out)
    ask[1] = str(GGUF_DIR)
    assert run(chat.main, ask) == 0
    assert len(linked["token_ids"]) == len(json.loads(capsys.readouterr().out)["token_ids"]) == 4
    ask[1] = str(out)
    (tmp_path / "gguf").rename(tmp_path / "moved")
    refusal = Refusal(capsys)
    refusal("E3204", chat.main, *ask, names="../gguf/model.gguf")
    refusal("E3204", convert_model.main, "--output_path", out, "--verify", names="is not there")
    refusal("E3204", inspect.main, out)
    (tmp_path / "moved").rename(tmp_path / "gguf")
    with open(tmp_path / "gguf" / "model.gguf", "ab") as file:
        file.write(b"0")
    refusal("E3204", chat.main, *ask, names="is another")


# --- what is refused ----------------------------------------------------------------------------------------


def rewrite(source, folder, change):
    """A copy of a safetensors folder whose entries went through `change(name, (dtype, array))` -> the same,
    or None to drop it.
    """
    shutil.copytree(source, folder)
    tensors, _ = safetensors.read_folder(folder)
    arrays = {n: (t.dtype, np.array(safetensors.view(t))) for n, t in tensors.items()}
    for path in folder.glob("*.safetensors"):
        path.unlink()
    changed = {n: v for n, old in arrays.items() if (v := change(n, old)) is not None}
    safetensors.save(folder / "model.safetensors", changed)
    return folder


def regguf(path, change, meta=None):
    """A copy of the embedded GGUF whose entries went through `change`."""
    entries = []
    for name, info in gguf.read(GGUF_FILE).tensors.items():
        entry = gguf.Entry(name, formats.type_id(info.dtype), info.shape, lambda info=info: [payload(info)])
        if (changed := change(entry)) is not None:
            entries.append(changed)
    gguf.write(path, meta or {"general.architecture": "deepseek2"}, entries)
    return path


def refused(code, safetensor_path, gguf_path):
    with pytest.raises(RefimplError, match=code) as caught:
        convert_model.plan(safetensor_path, gguf_path)
    assert caught.value.line().isprintable()


def test_mixed_up_paths_are_named(hybrid_folder, tmp_path):
    refused("E3102 .*swap", GGUF_DIR, FP8_DIR)
    refused("E3102 .*GGUF", FP8_DIR, FP8_DIR)
    refused("E3102 .*GGUF files only", GGUF_DIR, GGUF_DIR)
    refused("E3101 .*already merged", hybrid_folder, GGUF_DIR)
    refused("E4021", tmp_path / "none", GGUF_DIR)
    refused("E4021", FP8_DIR, tmp_path / "none")
    bare = rewrite(hybrid_folder, tmp_path / "bare", lambda n, v: v)  # merged elsewhere: no manifest of ours
    (bare / "refimpl-manifest.json").unlink()
    (bare / "model.safetensors.index.json").unlink()
    refused("E3101 .*already merged", bare, GGUF_DIR)


def test_ggufs_that_do_not_belong_to_the_checkpoint_are_named(tmp_path):
    drop = lambda part: lambda e: None if part in e.name else e  # noqa: E731
    refused("E3103 .*blk.3.ffn_gate_exps", FP8_DIR, regguf(tmp_path / "a.gguf", drop("blk.3.")))
    refused("E3103 .*blk.1.ffn_down_exps", FP8_DIR, regguf(tmp_path / "b.gguf", drop("blk.1.ffn_down_exps")))

    def half(e):
        return (
            e._replace(shape=(4, *e.shape[1:]), chunks=lambda: [bytes(e.nbytes // 2)])
            if "_exps" in e.name
            else e
        )

    refused(
        r"E3104 .*found \[4, 256, 256\], expected \[8, 256, 256\]", FP8_DIR, regguf(tmp_path / "c.gguf", half)
    )
    refused(
        "E1010 .*llama", FP8_DIR, regguf(tmp_path / "d.gguf", lambda e: e, {"general.architecture": "llama"})
    )


CHECKPOINTS = {
    "E3105 .*q_a_proj": lambda n, v: None if "layers.2.self_attn.q_a_proj.weight" in n else v,
    "E4013 .*weight_scale_inv is missing": lambda n, v: (
        None if n.endswith("layers.1.self_attn.o_proj.weight_scale_inv") else v
    ),
    "E4014": lambda n, v: ("F32", v[1][:1]) if n.endswith("kv_a_proj_with_mqa.weight_scale_inv") else v,
    "E3104 .*layers.0.mlp": lambda n, v: (
        (v[0], v[1][:256]) if n == "model.layers.0.mlp.gate_proj.weight" else v
    ),
    "E4012": lambda n, v: ("I8", v[1].view(np.int8)) if n == "model.layers.0.mlp.up_proj.weight" else v,
}


@pytest.mark.parametrize("code", CHECKPOINTS)
def test_incomplete_and_misshapen_checkpoints_are_named(tmp_path, code):
    refused(code, rewrite(FP8_DIR, tmp_path / "hf", CHECKPOINTS[code]), GGUF_DIR)


def test_tensors_of_another_architecture_are_named(tmp_path):
    folder = shutil.copytree(FP8_DIR, tmp_path / "hf")
    safetensors.save(
        folder / "other.safetensors", {"transformer.wte.weight": ("F32", np.zeros(1, np.float32))}
    )
    refused("E3001 .*transformer.wte.weight", folder, GGUF_DIR)


def test_configs_of_other_models_and_schemes_are_refused(tmp_path):
    config = json.loads((FP8_DIR / "config.json").read_text())
    fp8 = config["quantization_config"]
    folder = shutil.copytree(FP8_DIR, tmp_path / "hf")
    for code, change in [
        ("E4001", {"model_type": "llama"}),
        ("E4002", {"quantization_config": fp8 | {"weight_block_size": [64, 128]}}),
        ("E4002", {"quantization_config": fp8 | {"fmt": "e5m2"}}),
        ("E4002", {"scoring_func": "softmax"}),
        ("E4003", {"hidden_size": "256"}),
        ("E4004", {"n_group": 3}),
        ("E3104", {"moe_intermediate_size": 512}),
        ("E3105", {"num_hidden_layers": 5}),
    ]:
        (folder / "config.json").write_text(json.dumps(config | change))
        refused(code, folder, GGUF_DIR)
    (folder / "config.json").unlink()
    refused("E4020", folder, GGUF_DIR)


@pytest.mark.parametrize(
    "name", ["output_norm.weight", "blk.2.exp_probs_b.bias", "blk.3.ffn_gate_inp.weight"]
)
def test_two_models_of_one_shape_are_told_apart_by_what_both_have(tmp_path, name):
    def change(e):
        return (
            e._replace(
                chunks=lambda: [np.nextafter(np.frombuffer(b"".join(e.chunks()), "<f4"), np.inf).tobytes()]
            )
            if e.name == name
            else e
        )

    other = regguf(tmp_path / "r1.gguf", change)
    refused(f"E3106 .*{name} has other values.*--allow-mismatch", FP8_DIR, other)
    assert convert_model.plan(FP8_DIR, other, allow_mismatch=True).tensors == 107


def test_a_multi_token_prediction_layer_is_recognized_by_config(tmp_path):
    folder = shutil.copytree(FP8_DIR, tmp_path / "mtp")
    tensors = safetensors.read(FP8_DIR / "model.safetensors").tensors
    extra = {
        n.replace("layers.3.", "layers.4."): (t.dtype, np.array(safetensors.view(t)))
        for n, t in tensors.items()
        if "layers.3." in n
    }
    safetensors.save(folder / "mtp.safetensors", extra)
    p = convert_model.plan(folder, GGUF_DIR)
    assert p.skipped_layers == (4,) and p.tensors == 107
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.mtp == [4] and not any("blk.4." in name for name in checkpoint)


def one_by_one(path):
    """The embedded GGUF with one tensor an expert, and nothing else."""
    entries = []
    for name, info in gguf.read(GGUF_FILE).tensors.items():
        step = info.nbytes // 8
        for e in range(8) if "_exps" in name else ():
            one = info._replace(offset=info.offset + e * step, nbytes=step)
            entries.append(
                gguf.Entry(
                    name.replace("_exps", f".{e}"),
                    formats.type_id(info.dtype),
                    info.shape[1:],
                    lambda one=one: [payload(one)],
                )
            )
    gguf.write(path, {"general.architecture": "deepseek2"}, entries)
    return path


def test_old_ggufs_with_one_tensor_an_expert_give_the_same_bytes(tmp_path, hybrid_folder):
    convert_model.write(convert_model.plan(FP8_DIR, one_by_one(tmp_path / "old.gguf")), tmp_path / "out")
    for path in hybrid_folder.glob("*.safetensors"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


# --- writing ------------------------------------------------------------------------------------------------


def test_an_interrupted_merge_leaves_no_output_and_goes_on_to_the_same_bytes(tmp_path, hybrid_folder):
    p, out = convert_model.plan(FP8_DIR, GGUF_DIR), tmp_path / "out"
    for stop_at in (100_000, 1_500_000, 3_000_000, 5_000_000):
        done = 0

        def stop(n, stop_at=stop_at):
            nonlocal done
            done += n
            if done > stop_at:
                raise OSError("disk full")

        with pytest.raises(OSError, match="disk full"):
            convert_model.write(p, out, stop)
        assert not out.exists()
    stage = tmp_path / ".out.merging" / "result"
    kept = {f.name: f.stat().st_mtime_ns for f in stage.glob("*.safetensors")}
    assert len(kept) >= 2
    (stage / ".model-00004.safetensors.0123abcd.part").touch()  # what a killed process leaves
    convert_model.write(p, out)
    assert {f.name: f.stat().st_mtime_ns for f in out.glob("*.safetensors") if f.name in kept} == kept
    assert {f.name: f.read_bytes() for f in out.iterdir()} == {
        f.name: f.read_bytes() for f in hybrid_folder.iterdir()
    }
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


def test_what_another_merge_left_is_not_taken_for_ours(tmp_path):
    stage = tmp_path / ".out.merging"
    for folder in (stage / "result", stage / "sums"):
        folder.mkdir(parents=True)
        (folder / "model-00000-of-00004.safetensors").write_text("{}")
    (stage / "plan").write_text(write.TICKET + "another")
    convert_model.write(convert_model.plan(FP8_DIR, GGUF_DIR), tmp_path / "out")
    assert convert_model.verify(tmp_path / "out") == 107


def test_outputs_in_use_and_full_disks_are_refused(tmp_path, monkeypatch):
    p = convert_model.plan(FP8_DIR, GGUF_DIR)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(RefimplError, match="E5101"):
        convert_model.write(p, tmp_path / "full")
    with write._Lock(tmp_path / "busy"), pytest.raises(RefimplError, match="E5103"):
        convert_model.write(p, tmp_path / "busy")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
    with pytest.raises(RefimplError, match=r"E5102 .*1\.0 MB free, expected 22\.6 MB"):
        convert_model.write(p, tmp_path / "small")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["full"]


def test_an_input_that_shrinks_meanwhile_is_an_error(tmp_path):
    folder = shutil.copytree(FP8_DIR, tmp_path / "fp8")
    p = convert_model.plan(folder, GGUF_DIR)
    os.truncate(folder / "model.safetensors", 100_000)
    with pytest.raises(RefimplError, match="E5003"):
        convert_model.write(p, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_input_that_changes_meanwhile_is_an_error(tmp_path):
    folder = shutil.copytree(FP8_DIR, tmp_path / "fp8")
    p = convert_model.plan(folder, GGUF_DIR)
    with pytest.raises(RefimplError, match="E5106"):
        convert_model.write(p, tmp_path / "out", lambda n: os.utime(folder / "model.safetensors", (1, 1)))
    assert not (tmp_path / "out").exists()
    convert_model.write(p, tmp_path / "out")
    assert [f.name for f in sorted(tmp_path.iterdir())] == ["fp8", "out"]


def test_outputs_inside_inputs_and_outputs_that_are_files_are_refused_first(tmp_path, capsys):
    folder = shutil.copytree(FP8_DIR, tmp_path / "fp8")
    (tmp_path / "file").write_text("x")
    (tmp_path / "way").symlink_to(folder)
    before = sorted(tmp_path.rglob("*"))
    for output, code in (
        ("fp8", "E5105"),
        ("fp8/out", "E5105"),
        ("way/out", "E5105"),
        ("file", "E5101"),
        ("file/out", "E5000"),
    ):
        paths = [
            "--safetensor_path",
            str(folder),
            "--gguf_path",
            str(GGUF_FILE),
            "--output_path",
            str(tmp_path / output),
        ]
        assert run(convert_model.main, paths) == 1
        assert capsys.readouterr().err.splitlines()[-1].startswith(f"refimpl: {code} "), output
    assert sorted(tmp_path.rglob("*")) == before


def flip(path, at: int, bit: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        old = file.read(1)[0]
        file.seek(at)
        file.write(bytes([old ^ bit]))


def test_verify_catches_flipped_bits_and_a_bad_manifest(tmp_path, hybrid_folder):
    folder = shutil.copytree(hybrid_folder, tmp_path / "copy")
    assert convert_model.verify(folder) == 107
    tensors, _ = safetensors.read_folder(folder)
    rng = np.random.default_rng(0)
    for name in rng.choice(sorted(tensors), 12, replace=False):
        info = tensors[name]
        at, bit = info.offset + int(rng.integers(info.nbytes)), 1 << int(rng.integers(8))
        flip(info.path, at, bit)
        with pytest.raises(RefimplError, match=f"E3201 .*{name}"):
            convert_model.verify(folder)
        flip(info.path, at, bit)
    (folder / "refimpl-manifest.json").write_text("{}")
    with pytest.raises(RefimplError, match="E3202"):
        convert_model.verify(folder)


def test_the_command_reports_in_json_and_refuses_in_one_line(tmp_path, capsys):
    paths = [
        "--safetensor-path",
        str(FP8_DIR),
        "--gguf_path",
        str(GGUF_FILE),
        "--output_path",
        str(tmp_path / "out"),
    ]
    assert run(convert_model.main, [*paths, "--dry-run", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["tensors"] == 107 and not (tmp_path / "out").exists()
    assert (
        sum(f["nbytes"] for f in report["files"])
        == report["nbytes"]
        > sum(report["expert_bytes"].values())
        > 2_900_000
    )
    assert run(convert_model.main, [*paths, "--verify", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verified"] == 107
    assert run(convert_model.main, ["--output_path", str(tmp_path / "out"), "--verify"]) == 0
    capsys.readouterr()
    assert run(convert_model.main, paths) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines()[-1].startswith("refimpl: E5101 ") and "Traceback" not in err
    with pytest.raises(SystemExit, match="2"):
        run(convert_model.main, ["--output_path", "x"])


def test_progress_can_be_events_for_machines(tmp_path, capsys):
    paths = [
        "--safetensor-path",
        str(FP8_DIR),
        "--gguf_path",
        str(GGUF_FILE),
        "--output_path",
        str(tmp_path / "out"),
    ]
    assert run(convert_model.main, [*paths, "--progress", "json", "--json"]) == 0
    out, err = capsys.readouterr()
    events = [json.loads(line) for line in err.splitlines() if line.startswith("{")]
    total = json.loads(out)["nbytes"]
    assert [(e["stage"], e["done"], e["total"]) for e in (events[0], events[-1])] == [
        ("merging", 0, total),
        ("merging", total, total),
    ]
    assert events[-1]["eta_s"] == 0 < events[-1]["rate"]
