"""The machine against us, X97-X105 of the bad inputs (at random, and at every act, in campaigns/crash.py),
and what holds for every module: no pickle, no code from files, every one of the 108 has its test.
"""

import ast
import errno
import io
import json
import os
import re
import resource
import shutil
import struct
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest

import refimpl
from refimpl import cli, convert_model, errors, files, inspect
from refimpl.checkpoint import gguf, safetensors
from refimpl.errors import RefimplError
from refimpl.tiny import FP8_DIR, GGUF_DIR, GGUF_FILE
from tests.campaigns.faults import Faults
from tests.test_gguf import gguf_bytes, kv, string, tensor

ROOT = Path(refimpl.__file__).parents[1]


def child(*argv, limits=(), env=None, **kwargs):
    """`python -m` in a process of its own, under resource limits [(which, value)]."""

    def limit():
        for which, value in limits:
            resource.setrlimit(which, (value, value))

    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)} | (env or {})
    command = [sys.executable, "-m", *map(str, argv)]
    kwargs = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | kwargs
    return subprocess.run(
        command, preexec_fn=limit, env=env, text=True, errors="surrogateescape", timeout=120, **kwargs
    )


def merge(output, *more, **kwargs):
    paths = ("--safetensor_path", FP8_DIR, "--gguf_path", GGUF_DIR, "--output_path", output)
    return child("refimpl.convert_model", *paths, *more, **kwargs)


# --- X ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nbytes", [0, 10_000, 600_000, 1_400_000])
def test_x97_a_disk_that_is_full_at_some_byte(nbytes, tmp_path):
    """No file may grow beyond so many bytes, as on a full disk or on FAT32; the same command ends the merge
    when there is room.
    """
    done = merge(tmp_path / "out", limits=[(resource.RLIMIT_FSIZE, nbytes)])
    last = done.stderr.splitlines()[-1]
    assert (
        done.returncode == 1
        and last.startswith("refimpl: E5102 ")
        and "goes on where it stopped" in last
        and "Traceback" not in done.stderr
    )
    assert not (tmp_path / "out").exists()
    assert merge(tmp_path / "out", "--verify").returncode == 0
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_x97_no_space_and_no_quota_are_one_line(number, refused, tmp_path):
    def fail(act):
        raise OSError(number, os.strerror(number))

    with Faults(60, fail).installed():
        line = refused_after_plan(refused, "E5102", FP8_DIR, tmp_path / "out")
    assert ("quota" if number == errno.EDQUOT else "no space") in line and not (tmp_path / "out").exists()


def test_x100_outputs_that_are_there_already(refused, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("precious")
    (tmp_path / "file").write_text("precious")
    copy = shutil.copytree(FP8_DIR, tmp_path / "fp8")
    for output in ("full", "file"):
        line = refused_after_plan(refused, "E5101", FP8_DIR, tmp_path / output)
        assert output in line
    for output in (copy, copy / "out"):  # an input, and inside one
        refused_after_plan(refused, "E5105", copy, output)
    assert (tmp_path / "full" / "mine").read_text() == (tmp_path / "file").read_text() == "precious"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "fp8", "full"]
    assert sorted(p.name for p in copy.iterdir()) == sorted(p.name for p in FP8_DIR.iterdir())


def refused_after_plan(refused, code, safetensor_path, output, gguf_path=GGUF_DIR):
    """A merge that has told its plan, and perhaps its progress, before it was refused: the last line is the
    error.
    """
    status = cli.run(
        convert_model.main,
        [
            "--safetensor_path",
            str(safetensor_path),
            "--gguf_path",
            str(gguf_path),
            "--output_path",
            str(output),
        ],
    )
    out, err = refused.capsys.readouterr()
    last = err.splitlines()[-1]
    assert (
        (status, out) == (1, "")
        and last.startswith(f"refimpl: {code}")
        and "Traceback" not in err
        and last.isprintable()
    ), err
    return last


def test_x100_a_folder_that_may_not_be_written(refused, tmp_path, monkeypatch):
    def refusing(*args, **kwargs):  # the tests may run as root, who may write everywhere
        raise PermissionError(13, "Permission denied", str(tmp_path / "out"))

    monkeypatch.setattr(Path, "mkdir", refusing)
    line = refused_after_plan(refused, "E5000", FP8_DIR, tmp_path / "out")
    assert str(tmp_path / "out") in line and "Permission denied" in line


@contextmanager
def unprivileged():
    """Root may write everywhere: for a while this process is nobody."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_x100_a_folder_in_which_nothing_may_be_made(refused):
    with (
        TemporaryDirectory() as name
    ):  # where nobody may look, unlike pytest's, and perhaps unlike this project's
        folder = Path(name)
        shutil.copytree(FP8_DIR, folder / "fp8")
        shutil.copytree(GGUF_DIR, folder / "gguf")
        (folder / "parent").mkdir()
        places = [folder, *folder.iterdir()]
        for path in places:
            path.chmod(0o555)
        with unprivileged():
            line = refused_after_plan(
                refused, "E5000", folder / "fp8", folder / "parent" / "out", folder / "gguf"
            )
        assert "parent" in line and "Permission denied" in line and not list((folder / "parent").iterdir())
        for path in places:
            path.chmod(0o755)


def test_x100_the_stage_lies_on_the_outputs_file_system(refused, tmp_path, monkeypatch):
    """No rename goes from one file system to another (EXDEV): the stage is a sibling. Of the place where a
    disk is mounted it would be on another.
    """
    seen = []
    rename = os.rename
    monkeypatch.setattr(
        os, "rename", lambda a, b: (seen.append((Path(a).parents[1], Path(b).parent)), rename(a, b))
    )
    convert_model.write(convert_model.plan(FP8_DIR, GGUF_DIR), tmp_path / "out")
    assert seen == [(tmp_path, tmp_path)]
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "disk")
    assert "a folder inside it" in refused_after_plan(refused, "E5101", FP8_DIR, tmp_path / "disk")
    convert_model.main(
        [
            *map(
                str,
                (
                    "--safetensor_path",
                    FP8_DIR,
                    "--gguf_path",
                    GGUF_DIR,
                    "--output_path",
                    tmp_path / "disk" / "out",
                ),
            )
        ]
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["disk", "out"]


def test_x100_names_that_are_taken_by_links_and_pipes(refused, tmp_path):
    (tmp_path / "precious").write_text("precious")
    for taken in (".out.lock", ".out.merging"):
        (tmp_path / taken).symlink_to(tmp_path / "precious")
        refused_after_plan(refused, "E5107", FP8_DIR, tmp_path / "out")
        (tmp_path / taken).unlink()
        os.mkfifo(tmp_path / taken)  # would be waited for
        refused_after_plan(refused, "E5107", FP8_DIR, tmp_path / "out")
        (tmp_path / taken).unlink()
    assert (tmp_path / "precious").read_text() == "precious"
    (tmp_path / ".out.lock").write_text("mine")
    refused_after_plan(refused, "E5107", FP8_DIR, tmp_path / "out")
    assert (tmp_path / ".out.lock").read_text() == "mine"
    (tmp_path / ".out.lock").unlink()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    refused.merge("E5107", FP8_DIR, output=tmp_path / "link")
    folder = shutil.copytree(FP8_DIR, tmp_path / "fp8")
    for name, code in (("tokenizer.json", "E5002"), ("generation_config.json", "E5004")):
        (folder / name).unlink()
        if code == "E5002":
            os.mkfifo(folder / name)  # would be waited for
        else:
            with open(folder / name, "wb") as file:
                file.truncate(1 << 40)
        refused.merge(code, folder, output=tmp_path / "out", names=name)
        (folder / name).unlink()


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_x102_reads_that_fail_and_reads_that_are_short(number, refused, tmp_path, monkeypatch):
    class Disk(io.FileIO):
        """Gives 100,000 bytes at most, and fails at a megabyte."""

        def read(self, n=-1):
            if broken and self.tell() > 1_000_000:
                raise OSError(number, os.strerror(number))
            return super().read(min(n, 100_000) if n >= 0 else n)

    monkeypatch.setattr(
        files, "open", lambda path, *mode, **kw: (Disk if kw else open)(path, *mode), raising=False
    )
    broken = True
    line = refused_after_plan(refused, "E5000", FP8_DIR, tmp_path / "out")
    assert errno.errorcode[number] in line and not (tmp_path / "out").exists()
    broken = False
    convert_model.write(convert_model.plan(FP8_DIR, GGUF_DIR), tmp_path / "out")
    monkeypatch.undo()
    assert convert_model.verify(tmp_path / "out") == 107


def test_x103_too_little_memory_is_one_line(tmp_path):
    """An array of 2^20 empty strings within all limits of the format, in 13 MiB more of address space than
    Python and numpy take.
    """
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf_bytes(kvs=[kv("a", 9, struct.pack("<IQ", 8, 2**20) + bytes(8 * 2**20))]))
    code = (
        "import re, resource, sys; from refimpl import cli, inspect; "
        "now = int(re.search(r'VmSize:\\s+(\\d+)', open('/proc/self/status').read())[1]) * 1024; "
        "resource.setrlimit(resource.RLIMIT_AS, (now + (13 << 20),) * 2); "
        "sys.exit(cli.run(inspect.main, sys.argv[1:]))"
    )
    if not Path("/proc/self/status").exists():
        pytest.skip("the address space in use is read from Linux's /proc")
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, env=env, timeout=120
    )
    assert (
        done.returncode == 1 and done.stdout == "" and re.fullmatch(r"refimpl: E500[01] .*\n", done.stderr)
    ), done.stderr


@pytest.fixture
def in_163_files(tmp_path):
    """The embedded model's checkpoint, in as many files as DeepSeek-V3's."""
    folder = tmp_path / "fp8"
    shutil.copytree(FP8_DIR, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = {
        n: (t.dtype, np.array(safetensors.view(t))) for n, t in safetensors.read_folder(FP8_DIR)[0].items()
    }
    groups = [dict(list(tensors.items())[i::163]) for i in range(163)]
    for i, group in enumerate(groups):
        safetensors.save(folder / f"model-{i + 1:05d}-of-000163.safetensors", group)
    return folder


FEW = (resource.RLIMIT_NOFILE, 64)


def test_x104_few_open_files(in_163_files, tmp_path):
    """A merge from 163 files has a few open at a time, and one that has failed leaves none open."""
    paths = ("--safetensor_path", in_163_files, "--gguf_path", GGUF_DIR, "--output_path", tmp_path / "out")
    done = child("refimpl.convert_model", *paths, "--verify", limits=[FEW])
    assert done.returncode == 0, done.stderr
    assert convert_model.verify(tmp_path / "out") == 107


def test_x104_a_model_in_163_files_is_mapped_with_none_open(in_163_files):
    ask = ("-p", "What is 7 + 8?", "--greedy", "--json", "--backend", "reference", "--max_new_tokens", "3")
    done = child("refimpl.chat", "--gguf_path", in_163_files, *ask, limits=[FEW])
    assert done.returncode == 0, done.stderr
    whole = child("refimpl.chat", "--gguf_path", FP8_DIR, *ask)
    assert json.loads(done.stdout)["token_ids"] == json.loads(whole.stdout)["token_ids"]


def test_a_mapping_is_read_only_and_goes_with_its_last_view(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(bytes(range(256)) * 64)
    view = files.map_bytes(path)[1:9]
    assert view.tolist() == list(range(1, 9))
    with pytest.raises(ValueError):
        view.flags.writeable = True
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(path) in maps.read_text()
        del view
        assert str(path) not in maps.read_text()
    (tmp_path / "gone").touch()
    assert files.map_bytes(tmp_path / "gone").size == 0


def test_x104_too_few_open_files_are_one_line(refused, monkeypatch):
    def refusing(*args, **kwargs):
        raise OSError(24, "Too many open files", "x.gguf")

    monkeypatch.setattr(gguf, "map_bytes", refusing)
    refused("E5000", inspect.main, GGUF_FILE, names="Too many open files (EMFILE) - raise the limit")


def test_x105_no_home(refused, monkeypatch, tmp_path):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    for name in ("REFIMPL_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(RefimplError, match=r"E5104 .*REFIMPL_CACHE"):
        files.cache_folder()
    monkeypatch.setenv("REFIMPL_CACHE", str(tmp_path / "cache"))
    assert files.cache_folder().stat().st_mode & 0o777 == 0o700  # private to the user


NAMES = {
    "blanks": "two  words ",
    "newline": "a\nrefimpl: E0000 all is well",
    "escape": "a\x1b[2J\x07",
    "not UTF-8": os.fsdecode(b"caf\xe9"),
    "right to left": "\u202efgg",
}


@pytest.mark.parametrize("case", NAMES)
def test_x105_odd_names_are_shown_escaped_and_read(case, refused, accepted, tmp_path):
    folder = tmp_path / NAMES[case]
    folder.mkdir()
    whole = shutil.copy(GGUF_FILE, folder / "x.gguf")
    (folder / "bad.gguf").write_bytes(b"GGUF")
    assert refused.inspect("E1005", folder / "bad.gguf", names="bad.gguf").isprintable()
    for argv in ((whole,), (whole, "output.weight")):
        shown = accepted(inspect.main, *argv)
        lines = shown.splitlines()
        assert all(line.isprintable() for line in lines) and not any(
            line.startswith("refimpl: ") for line in lines
        )
    accepted.merge(gguf_path=whole, output=folder / "out")


def test_x105_long_paths(refused, tmp_path):
    refused.inspect("E5000", tmp_path / ("x" * 300 + ".gguf"), names="File name too long")
    refused.inspect("E5000", tmp_path.joinpath(*["x" * 200] * 30), names="File name too long")
    deep = tmp_path
    while len(str(deep)) < 3000:
        deep = deep / ("d" * 200)
    deep.mkdir(parents=True)
    (deep / "x.gguf").write_bytes(b"GGUF")
    refused.inspect("E1005", deep / "x.gguf", names="x.gguf: the file ends inside the head")


def test_lines_are_one_line_whatever_they_tell():
    error = errors.MismatchError(
        "E0000", "a\nb", "c\x1b[2J", found="\ud800\x9b", expected="\u202e", hint="\r\n"
    )
    assert (
        error.line().isprintable()
        and len(errors.InputFormatError("E0000", "x" * 9000, "y" * 9000).line()) <= 1001
    )


# --- output that cannot be written --------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux's device that is always full")
def test_a_full_disk_behind_stdout_is_one_line():
    with open("/dev/full", "w") as full:
        done = child("refimpl.inspect", GGUF_FILE, stdout=full)
    assert done.returncode == 1 and re.fullmatch(
        r"refimpl: E5000 file system: No space left on device .*\n", done.stderr
    ), done.stderr


def test_readers_that_leave_and_streams_that_are_closed_make_no_noise():
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as gone:
        done = child("refimpl.inspect", GGUF_FILE, stdout=gone)
    assert (done.returncode, done.stderr) == (0, "")
    shell = f'"{sys.executable}" -m refimpl.inspect "{GGUF_FILE}" '
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    for closed in (">&-", "<&- >&-"):
        done = subprocess.run(
            shell + closed, shell=True, capture_output=True, text=True, env=env, timeout=120
        )
        assert (done.returncode, done.stderr) == (0, "")


def test_what_the_terminals_encoding_lacks_is_spelled_out(tmp_path):
    gguf.write(tmp_path / "x.gguf", {"general.name": "é中"}, [gguf.Entry("a", 0, (8,), lambda: [bytes(32)])])
    done = child("refimpl.inspect", tmp_path / "x.gguf", env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and r"general.name = \xe9\u4e2d" in done.stdout


def test_metadata_never_reach_a_terminal_raw(accepted, tmp_path):
    path = tmp_path / "x.gguf"
    hostile = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e\r\n"
    one = struct.pack("<IQ", 8, 1) + string(hostile)
    path.write_bytes(gguf_bytes([tensor("a")], [kv("general.name", 8, string(hostile)), kv("k", 9, one)]))
    for argv in ((path,), (path, "--json"), (path, "a", "--bits")):
        assert all(line.isprintable() for line in accepted(inspect.main, *argv).splitlines())


# --- what no module does ------------------------------------------------------------------------------------

FORBIDDEN = {
    "pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "joblib",
    "shelve",
    "marshal",
    "jsonpickle",
    "runpy",
    "code",
    "codeop",
}
# The one place that runs changed sources: the package's own, to see whether the conformance suite notices.
MAY_EXEC = {
    "refimpl/mutate.py": {"exec", "compile"},
    "kernels/kept.py": {"pickle"},  # Numba's own form, read after owner, mode and checksum
}


def trespasses(path: Path) -> set[str]:
    """Names of what would run code from data: imports, calls and keywords."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found |= {n for n in names if n.partition(".")[0] in FORBIDDEN}
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            found |= {called} & {
                "eval",
                "exec",
                "compile",
                "__import__",
                "os.system",
                "os.popen",
                "yaml.load",
                "yaml.unsafe_load",
                "torch.load",
            }
            found |= (
                {"torch.load"}
                if re.fullmatch(r"(\w+\.)*torch\.(jit\.|hub\.|package\.)?load\w*", called)
                else set()
            )
            for keyword in node.keywords:
                if keyword.arg in ("allow_pickle", "trust_remote_code", "shell") and not (
                    isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                ):
                    found.add(keyword.arg)
    return found


def test_no_module_unpickles_or_runs_what_a_file_says():
    sources = [p for folder in ("refimpl", "kernels") for p in (ROOT / folder).rglob("*.py")]
    assert len(sources) > 60
    for path in sources:
        assert trespasses(path) <= MAY_EXEC.get(path.relative_to(ROOT).as_posix(), set()), path


def test_the_search_for_such_code_finds_it(tmp_path):
    path = tmp_path / "x.py"
    for text in (
        "import pickle",
        "from pickle import loads",
        "eval(x)",
        "import torch\ntorch.load(p)",
        "f(trust_remote_code=True)",
        "np.load(p, allow_pickle=a)",
    ):
        path.write_text(text)
        assert trespasses(path), text
