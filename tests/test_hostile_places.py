"""What a command finds where it would write, what it trusts, and what ends it from outside: files that are
there already, caches of others, memory that vanishes, Ctrl-C.
"""

import hashlib
import io
import json
import os
import signal
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from refimpl import chat, cli, conformance, convert_model, diff, files, inspect, plan, quantize, rules
from refimpl.bench import growth, random_model
from refimpl.checkpoint import gguf, safetensors
from refimpl.config import DeepSeekConfig
from refimpl.conformance import rows as judging
from refimpl.conformance.selftest import mutants
from refimpl.errors import RefimplError, visible
from refimpl.loading import hub
from refimpl.merge.merge_plan import MANIFEST
from refimpl.talk import questions
from refimpl.tiny import FP8_DIR, GGUF_DIR
from tests.campaigns import make

POSIX = pytest.mark.skipif(os.name != "posix", reason="modes, owners and signals of POSIX")
ROOT = Path(__file__).parents[1]


def environment(**more):
    path = os.pathsep.join([str(ROOT), *(p for p in sys.path if p)])
    return os.environ | {"PYTHONPATH": path} | {k: str(v) for k, v in more.items()}


# --- the writer ---


def test_o109_a_file_that_is_there_stays_unless_forced(tmp_path):
    path = tmp_path / "x"
    files.write_text(path, "one")
    with pytest.raises(RefimplError, match="E5108"):
        files.write_text(path, "two")
    assert path.read_text() == "one"
    files.write_text(path, "two", force=True)
    assert path.read_text() == "two" and os.listdir(tmp_path) == ["x"]


@POSIX
@pytest.mark.parametrize("kind", ["link", "link to nothing", "pipe", "folder", "device"])
@pytest.mark.parametrize("force", [False, True])
def test_o110_nothing_is_written_through_a_link_or_into_a_pipe(kind, force, tmp_path):
    path, target = tmp_path / "x", tmp_path / "target"
    if kind.startswith("link"):
        path.symlink_to(target)
        if kind == "link":
            target.write_text("precious")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path = Path("/dev/null")
    with pytest.raises(RefimplError, match="E5107"):
        files.write_text(path, "two", force=force)
    assert not target.exists() or target.read_text() == "precious"
    assert not list(tmp_path.glob(".*"))


def test_o109_a_file_that_comes_while_another_is_made_stays(tmp_path):
    path = tmp_path / "x"
    with pytest.raises(RefimplError, match="E5108"), files.atomic(path) as file:
        file.write(b"ours")
        path.write_text("theirs")
    assert path.read_text() == "theirs" and os.listdir(tmp_path) == ["x"]


def test_where_files_have_no_second_name_a_rename_does(tmp_path, monkeypatch):
    def no_links(*args):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    files.write_text(tmp_path / "x", "one")
    with pytest.raises(RefimplError, match="E5108"):
        files.write_text(tmp_path / "x", "two")
    assert (tmp_path / "x").read_text() == "one"


def test_o111_quantize_writes_over_no_input_even_when_forced(refused, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in FP8_DIR.iterdir():
        (folder / file.name).symlink_to(file.resolve())
    weights = tmp_path / "weights"
    weights.write_bytes((FP8_DIR / "model.safetensors").read_bytes())
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(weights)
    given = ("--safetensor_path", folder, "--output")
    before = weights.read_bytes()
    refused("E5105", quantize.main, *given, weights, "--force")
    refused("E5107", quantize.main, *given, folder / "model.safetensors", "--force")
    (tmp_path / "o.gguf").write_text("last week's")
    refused("E5108", quantize.main, *given, tmp_path / "o.gguf")
    assert weights.read_bytes() == before and (tmp_path / "o.gguf").read_text() == "last week's"


@pytest.mark.parametrize("judge", [["--op", "q4_0.dequantize"], ["--mutants"]])
def test_o109_a_report_takes_no_file_s_place_and_says_so_first(judge, refused, tmp_path, monkeypatch):
    """`--force` lets it, but not where the file is an input."""
    report = tmp_path / "report.md"
    report.write_text("mine")
    monkeypatch.setattr(judging, "judged", lambda *given: pytest.fail("judged first"))
    monkeypatch.setattr(mutants, "run", lambda *given: pytest.fail("judged first"))
    refused("E5108", conformance.main, *judge, "--markdown", report)
    refused("E5105", conformance.main, *judge, "--markdown", report, "--force", "--xfails", report)
    (tmp_path / "link").symlink_to(report)
    refused("E5107", conformance.main, *judge, "--markdown", tmp_path / "link", "--force")
    assert report.read_text() == "mine"


def test_o109_a_picture_takes_no_file_s_place(refused, tmp_path, monkeypatch):
    (tmp_path / "growth.svg").write_text("mine")
    monkeypatch.setattr(growth, "points", lambda: pytest.fail("measured first"))
    refused("E5108", growth.main, tmp_path)
    assert (tmp_path / "growth.svg").read_text() == "mine"


@pytest.mark.parametrize("theirs", ["config.json", "model-00001-of-00002.safetensors", "letters.txt"])
def test_o125_a_benchmark_removes_no_model_but_its_own(theirs, tmp_path):
    folder, small = tmp_path / "model", random_model.smaller(random_model.config("tiny"), 2, 2, 512)
    random_model.write(small, folder, lambda n: None)
    random_model.write(small | {"rope_theta": 5000.0}, folder, lambda n: None)  # its own it may
    assert json.loads((folder / "config.json").read_text())["rope_theta"] == 5000.0
    (folder / random_model.TICKET).unlink()
    for file in folder.iterdir():
        file.unlink()
    (folder / theirs).write_text("mine")
    with pytest.raises(RefimplError, match="E5101"):
        random_model.write(small, folder, lambda n: None)
    assert (folder / theirs).read_text() == "mine"


def test_a_name_of_all_the_bytes_that_a_name_may_have_is_written(tmp_path):
    path = tmp_path / ("é" * 127)
    files.write_text(path, "one")
    assert os.listdir(tmp_path) == [path.name]


# --- what a merge may remove ---


@pytest.mark.parametrize("what", ["their files", "a ticket of theirs", "a ticket that is a folder"])
@pytest.mark.parametrize("output", ["empty", "full"])
def test_o112_a_stage_without_our_ticket_is_left_alone(what, output, tmp_path, refused):
    stage, out = tmp_path / ".out.merging", tmp_path / "out"
    (stage / "result").mkdir(parents=True)
    (stage / "result" / "notes").write_text("mine")
    if what == "a ticket of theirs":
        (stage / "plan").write_text("how to spend the summer")
    elif what == "a ticket that is a folder":
        (stage / "plan").mkdir()
    out.mkdir()
    if output == "full":
        (out / "file").write_text("mine")
    with pytest.raises(RefimplError, match="E5107" if output == "empty" else "E5101"):
        convert_model.write(convert_model.plan(FP8_DIR, GGUF_DIR), out)
    assert (stage / "result" / "notes").read_text() == "mine"


def test_o112_what_lies_in_our_stage_and_is_not_ours_is_left_there(tmp_path):
    p, stage = convert_model.plan(FP8_DIR, GGUF_DIR), tmp_path / ".out.merging"
    stage.mkdir()
    (stage / "plan").write_text(f"refimpl merge {p.fingerprint()}")
    (stage / "notes").write_text("mine")
    convert_model.write(p, tmp_path / "out")
    assert convert_model.verify(tmp_path / "out") == 107
    assert [f.name for f in stage.iterdir()] == ["notes"]


@pytest.mark.parametrize("where", ["data", "head", "sums"])
def test_o113_a_finished_file_that_was_damaged_since_is_made_again(where, tmp_path, hybrid_folder):
    p, out = convert_model.plan(FP8_DIR, GGUF_DIR), tmp_path / "out"

    def stop(n):
        stop.done += n
        if stop.done > 3_000_000:
            raise OSError("killed")

    stop.done = 0
    with pytest.raises(OSError, match="killed"):
        convert_model.write(p, out, stop)
    stage = tmp_path / ".out.merging"
    finished = min((stage / "sums").glob("*.safetensors")).name
    path = stage / ("sums" if where == "sums" else "result") / finished
    raw = bytearray(path.read_bytes())
    raw[{"data": -5, "head": 20, "sums": 30}[where]] ^= 1
    path.write_bytes(raw)
    convert_model.write(p, out)
    assert {f.name: f.read_bytes() for f in out.iterdir()} == {
        f.name: f.read_bytes() for f in hybrid_folder.iterdir()
    }


# --- folders that are trusted ---


@POSIX
def test_a_private_folder_is_made_on_every_level(tmp_path):
    old = os.umask(0)
    try:
        found = files.private_folder(tmp_path / "a" / "b" / "c")
    finally:
        os.umask(old)
    for folder in (found, found.parent, found.parent.parent):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@POSIX
@pytest.mark.parametrize("what", ["link", "group", "world", "file"])
def test_o114_what_is_not_private_is_not_trusted(what, tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    if what == "link":
        (tmp_path / "mine").mkdir(mode=0o700)
        folder.symlink_to(tmp_path / "mine")
    elif what == "file":
        folder.touch()
    else:
        folder.mkdir()
        folder.chmod(0o770 if what == "group" else 0o777)
    with pytest.raises(RefimplError, match="E5104"):
        files.private_folder(folder)
    monkeypatch.setenv("REFIMPL_CACHE", str(folder))
    with pytest.raises(RefimplError, match="E5104"):
        files.cache_folder("x")
    if what == "world":  # as /tmp is: nobody can put another folder in a folder's place
        folder.chmod(0o1777)
        assert files.cache_folder("x").parent == folder


@POSIX
@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="to give files away needs root")
def test_o114_another_user_s_folder_is_not_trusted(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("REFIMPL_CACHE", str(tmp_path / "cache"))
    first = hub.embedded()
    assert first.parent == tmp_path / "cache" and hub.embedded() == first
    os.chown(next(first.glob("*.safetensors")), 65534, -1)
    assert hub.embedded().parent != tmp_path / "cache"
    assert "note: the embedded model is not kept: E5104 " in capfd.readouterr().err
    with pytest.raises(RefimplError, match="belongs to user 65534"):
        os.chown(tmp_path / "cache", 65534, -1)
        files.cache_folder()


# --- kernels on the disk ---


@POSIX
def test_o114_in_a_cache_of_others_only_the_embedded_model_is_kept(tmp_path, monkeypatch, capsys):
    """It is data, and compared with its checksums; compiled kernels are code."""
    cache = tmp_path / "cache"
    cache.mkdir()
    cache.chmod(0o777)  # without the sticky bit of /tmp
    monkeypatch.setenv("REFIMPL_CACHE", str(cache))
    first = hub.embedded()
    assert first.parent == cache and hub.embedded() == first and "note" not in capsys.readouterr().err
    with pytest.raises(RefimplError, match="others can write to it"):
        files.cache_folder("kernels")
    (first / "config.json").chmod(0o666)
    assert hub.embedded().parent != cache and "others can write to it" in capsys.readouterr().err


CACHED = """
import sys, numba
from refimpl.kernels.jit import jit
@jit
def add(x):
    return x + 1
print(add(41), sum(add.stats.cache_hits.values()))
"""


def compiled(tmp_path, cache, **more):
    script = tmp_path / "script.py"
    script.write_text(CACHED)
    done = subprocess.run(
        [sys.executable, script],
        env=environment(REFIMPL_CACHE=cache, **more),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    return done.stdout.split(), done.stderr


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", MANIFEST, "model-00002-of-00004.safetensors"]
)
@pytest.mark.parametrize("how", ["cut", "flipped", "gone"])
def test_o126_a_damaged_embedded_model_is_made_anew_with_a_note(name, how, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("REFIMPL_CACHE", str(tmp_path / "cache"))
    folder = hub.embedded()
    whole = {f.name: f.read_bytes() for f in folder.iterdir()}
    (folder / name).unlink()
    if how != "gone":
        middle = len(whole[name]) // 2
        flipped = bytes([whole[name][middle] ^ 1]) + whole[name][middle + 1 :]
        (folder / name).write_bytes(whole[name][:middle] + (flipped if how == "flipped" else b""))
    capfd.readouterr()
    assert hub.embedded() == folder
    assert capfd.readouterr().err.startswith("refimpl: note: the embedded model is damaged and made anew")
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == whole
    capfd.readouterr()
    assert hub.embedded() == folder and not capfd.readouterr().err


@POSIX
def test_caches_are_private_whatever_the_umask(tmp_path, monkeypatch):
    monkeypatch.setenv("REFIMPL_CACHE", str(tmp_path / "cache"))
    old = os.umask(0)
    try:
        folder = hub.embedded()
    finally:
        os.umask(old)
    assert not any(p.stat().st_mode & 0o022 for p in (folder, folder.parent, *folder.iterdir()))


@POSIX
def test_o115_a_damaged_kernel_is_made_anew_with_a_note(tmp_path):
    cache = tmp_path / "cache"
    assert compiled(tmp_path, cache)[0] == ["42", "0"]
    assert compiled(tmp_path, cache) == (["42", "1"], "")
    for suffix in ("nbc", "nbi"):
        (path,) = cache.rglob(f"*add*.{suffix}")
        whole = path.read_bytes()
        for damaged in (b"", whole[:-1], whole[: len(whole) // 2], bytes([whole[0] ^ 1]) + whole[1:]):
            path.write_bytes(damaged)
            found, said = compiled(tmp_path, cache)
            assert found == ["42", "0"] and said.count("note: a compiled kernel in ") == 1
            made = path.read_bytes()
            assert hashlib.sha256(made[:-32]).digest() == made[-32:]
        assert compiled(tmp_path, cache) == (["42", "1"], "")
        path.chmod(0o666)  # others could have written it
        assert "others can write to it" in compiled(tmp_path, cache)[1]


@POSIX
def test_o116_kernels_that_cannot_be_kept_are_compiled_all_the_same(tmp_path):
    if os.path.exists("/dev/full"):
        code = CACHED.replace("import sys", "import resource, signal, sys", 1).replace(
            "print(",
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\nprint(",
        )
        (tmp_path / "full.py").write_text(code)
        env = environment(REFIMPL_CACHE=tmp_path / "cache")
        done = subprocess.run(
            [sys.executable, tmp_path / "full.py"], env=env, capture_output=True, text=True, timeout=300
        )
        assert done.stdout.split() == ["42", "0"], done.stderr
        assert "note: compiled kernels are not kept" in done.stderr
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    found, said = compiled(tmp_path, shared)
    assert found == ["42", "0"] and "note: compiled kernels are not kept: E5104 " in said
    assert not list(shared.iterdir())


# --- memory that vanishes ---


@pytest.mark.skipif(files.vanished is None, reason="the extension is not built")
def test_o117_a_mapped_file_that_is_cut_short_is_one_line(tmp_path, capfd):
    path = tmp_path / "weights"
    path.write_bytes(bytes(1 << 20))

    def main(argv):
        mapped = files.map_bytes(path)
        os.truncate(path, 4096)
        assert int(mapped.sum()) == 0
        time.sleep(1)
        raise AssertionError("nobody was told")

    before = signal.getsignal(signal.SIGBUS)
    assert cli.run(main, []) == 1
    assert capfd.readouterr().err.startswith(f"refimpl: E5003 {path}: the file ends early")
    assert signal.getsignal(signal.SIGBUS) == before
    with pytest.raises(RefimplError, match="E5003"):
        files.window(path, 0, 1 << 20)
    assert np.array_equal(files.window(path, 4000, 96), np.zeros(96, np.uint8))


@pytest.mark.skipif(files.vanished is None, reason="the extension is not built")
def test_the_signal_of_another_s_memory_is_theirs(tmp_path):
    code = (
        "import mmap, os, sys; from refimpl import cli, files\n"
        "def main(argv):\n"
        "    open(argv[0], 'wb').write(bytes(1 << 20))\n"
        "    f = open(argv[0], 'r+b'); m = mmap.mmap(f.fileno(), 0)\n"
        "    os.truncate(argv[0], 0); print(m[-1])\n"
        "cli.run(main, sys.argv[1:])"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "x"], env=environment(), timeout=60)
    assert done.returncode == -signal.SIGBUS


# --- Ctrl-C ---


def test_a_library_leaves_signals_alone():
    code = "import signal; import refimpl, refimpl.chat; print(signal.getsignal(signal.SIGINT).__name__)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "default_int_handler\n"


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, refimpl.__main__; print({'numpy', 'argparse', 'json'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "set()\n"


@POSIX
@pytest.mark.parametrize("command", [["-m", "refimpl.chat"], ["-m", "refimpl", "chat"], ["script", "chat"]])
def test_o118_ctrl_c_while_a_command_starts_is_one_line(command, tmp_path):
    """From the first line of our own code on: what is interrupted says itself when it is there."""
    if command[0] == "script":
        (tmp_path / "refimpl_script").write_text(
            "import sys\nfrom refimpl.__main__ import entry\nsys.exit(entry())\n"
        )
        command = [str(tmp_path / "refimpl_script"), *command[1:]]
    # numpy's import, slow and then waiting for the signal
    (tmp_path / "numpy").mkdir()
    (tmp_path / "numpy" / "__init__.py").write_text(
        "import os, time\nos.write(1, b'now')\ntry:\n    time.sleep(60)\nexcept BaseException:\n    pass\n"
    )
    env = environment()
    env["PYTHONPATH"] = os.pathsep.join([str(tmp_path), env["PYTHONPATH"]])
    process = subprocess.Popen(
        [sys.executable, *command, "-p", "hi"], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout.read(3) == b"now"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, b"refimpl: interrupted\n")


@POSIX
def test_o118_ctrl_c_in_a_destructor_comes_again_without_a_word():
    """Python prints what a destructor raises and goes on; so does it with what the hook for that raises."""
    source = """
        import signal, time
        from refimpl import interrupts
        class Held:
            def __del__(self):
                signal.raise_signal(signal.SIGINT)
        interrupts.take()
        with interrupts.raised():
            try:
                Held()
                time.sleep(60)
            except KeyboardInterrupt:
                print("it came")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(source)], env=environment(), capture_output=True, timeout=50
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"it came\n", b"")


# --- numbers and texts of files ---

CONFIG = json.loads((FP8_DIR / "config.json").read_text())


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 1},
        {"rope_theta": 2e15},
        {"max_position_embeddings": 2**33},
        {"hidden_size": 2**40},
        {"rms_norm_eps": -1.0},
        {"rope_scaling": CONFIG["rope_scaling"] | {"beta_fast": 5e-324}},
        {"rope_scaling": CONFIG["rope_scaling"] | {"factor": 1e15}},
        {"rope_scaling": CONFIG["rope_scaling"] | {"original_max_position_embeddings": 2**40}},
    ],
    ids=str,
)
def test_o119_numbers_that_no_arithmetic_survives(changes):
    with pytest.raises(RefimplError, match=r"E4006 config\.json: "):
        DeepSeekConfig.from_dict(CONFIG | changes)


@pytest.mark.parametrize("value", [True, "1", None, 0.5, -1, 2**31, float("nan"), float("inf"), 10**400, [1]])
def test_o119_the_gate_lets_through_numbers_alone(value):
    with pytest.raises(RefimplError, match=r"E4006 file: name is no number that can be worked with \(found"):
        files.whole(value, "name", "file")
    if value not in (0.5, -1, 2**31):
        with pytest.raises(RefimplError, match="E4006"):
            files.real(value, "name", "file")
    assert (files.whole(3.0, "name", "file"), files.real(3, "name", "file")) == (3, 3.0)


def test_o120_what_a_gguf_cannot_say_is_not_written(tmp_path):
    for value, code in (
        (2**32, "E4006"),
        (-1, "E4006"),
        (1e39, "E4006"),
        ("\ud800", "E1006"),
        (None, "E4007"),
    ):
        with pytest.raises(RefimplError, match=code):
            gguf.write(tmp_path / "x.gguf", {"a": value}, [])
    assert not list(tmp_path.iterdir())


def test_o120_weights_of_another_config_are_not_quantized(refused, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(FP8_DIR / name)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"moe_intermediate_size": 512}))
    given = ("--safetensor_path", tmp_path, "--output", tmp_path / "o.gguf")
    assert cli.run(quantize.main, [*map(str, given)]) == 1
    assert not (tmp_path / "o.gguf").exists()
    with pytest.raises(RefimplError, match="E4011"):
        p = quantize.plan(tmp_path, "F16")
        quantize.write(p, tmp_path / "o.gguf")


def test_o121_tensors_are_counted_however_they_are_spelled(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    rows = ",".join(f'"t{i}":{{"dtype":"U8","shape":[0],"data\\u005foffsets":[0,0]}}' for i in range(12))
    path.write_bytes(make.safetensors_bytes(f"{{{rows}}}".encode(), b""))
    assert len(safetensors.read(path).tensors) == 12
    monkeypatch.setattr(safetensors, "MAX_TENSORS", 9)
    with pytest.raises(RefimplError, match="E2011"):
        safetensors.read(path)


@pytest.mark.parametrize(
    "shape", ["-8,-256,256", "8,+256,256", "8, 256,256", "8,,256", "", "8,٢٥٦,256", "0,256,256"]
)
def test_o122_shapes_of_blobs_are_natural_numbers(shape, hybrid_folder, tmp_path, refused):
    for file in hybrid_folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    path = min(
        tmp_path.glob("model-*.safetensors"), key=lambda p: p.name == "model-00000-of-00004.safetensors"
    )
    whole = path.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:end])
    key = next(k for k in header["__metadata__"] if k.endswith(".shape"))
    header["__metadata__"][key] = shape
    path.unlink()
    path.write_bytes(make.safetensors_bytes(json.dumps(header).encode(), whole[end:]))
    refused("E4017", chat.main, "--gguf_path", tmp_path, "-p", "x")


def test_o123_a_split_into_no_parts(refused, tmp_path):
    path = tmp_path / "x-00001-of-00000.gguf"
    gguf.write(path, {"general.architecture": "deepseek2", "split.count": 1, "split.no": 0}, [])
    refused("E1202", inspect.main, path)


def test_o124_what_is_printed_is_seen_and_json_is_json(tmp_path, capsys):
    path = tmp_path / "x.gguf"
    entry = gguf.Entry(
        "t", 0, (8,), lambda: [np.array([np.nan, np.inf, -np.inf, *range(5)], "<f4").tobytes()]
    )
    gguf.write(path, {"a": float("nan"), "b": [float("inf"), 1.0], "c": "\u202egpj\u200b"}, [entry])

    def no_constant(name):
        raise AssertionError(name)

    for more in ([], ["t", "--block", "0"]):
        assert cli.run(inspect.main, [str(path), *more, "--json"]) == 0
        assert json.loads(capsys.readouterr().out, parse_constant=no_constant)
        assert cli.run(inspect.main, [str(path), *more]) == 0
        assert not set("\u202e\u200b") & set(capsys.readouterr().out)
    assert visible("a\u202eb\u200b\u2066\ufeff\U000e0041c\n") == (
        "a\\u202eb\\u200b\\u2066\\ufeff\\U000e0041c\n"
    )
    assert visible("\u4f60\u597d \u3000\u00e9\U0001f469") == "\u4f60\u597d \u3000\u00e9\U0001f469"


NAME = "a\x1b[2J\u202eb"


def test_o127_what_names_would_do_to_a_terminal_is_spelled_out(tmp_path, capfd):
    """Whoever prints them, on either stream; see `cli._Seen`."""
    folder, output = tmp_path / NAME, tmp_path / f"{NAME}.gguf"
    folder.mkdir()
    for file in FP8_DIR.iterdir():
        (folder / file.name).symlink_to(file.resolve())
    merge = "--safetensor_path", folder, "--gguf_path", GGUF_DIR, "--output_path"
    for main, *argv in (
        (quantize.main, "--safetensor_path", folder, "--output", output, "--type", "Q8_0", "--json"),
        (inspect.main, output),
        (diff.main, folder, output),
        (plan.main, "--model_path", folder, "--cpu_gbps", "9", "--gpu_gbps", "9"),
        (rules.main, tmp_path / f"{NAME}.yaml"),
        (convert_model.main, *merge, folder / "x"),
        (convert_model.main, *merge, tmp_path / "o"),
    ):
        assert cli.run(main, [str(a) for a in argv]) in (0, 1)
        out, err = capfd.readouterr()
        assert visible(out) == out and visible(err) == err


def test_lines_that_are_rewritten_and_colours_are_left(capfd):
    def main(argv):
        print("\x1b[1m", end="", file=cli.own(sys.stdout))
        print("\x1b[2m\rtwo\nlines")
        sys.stdout.writelines(["\x9b"])

    assert cli.run(main, []) == 0
    assert capfd.readouterr().out == "\x1b[1m\\x1b[2m\\x0dtwo\nlines\n\\x9b"


def test_o124_ctrl_c_at_the_prompt_keeps_the_conversation(monkeypatch, capsys):
    lines = iter(["KeyboardInterrupt", "/stats", None])

    def line(self, prompt):
        if (found := next(lines)) == "KeyboardInterrupt":
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(questions.Lines, "_line", line)
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdin", terminal)

    class Nobody:
        messages, last = (), None

    assert chat.converse(Nobody(), None, False) == 0
    assert "/exit to leave" in capsys.readouterr().err
