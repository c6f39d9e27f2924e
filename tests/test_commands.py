"""What all commands share: help, versions, suggestions, completion, `~`, and the machine's oddities."""

import argparse
import importlib
import os
import pathlib
import re
import subprocess
import sys
import tomllib
from unittest import mock

import pytest

from refimpl import __main__ as console
from refimpl import cli, plan
from refimpl.bench.__main__ import ALONE
from refimpl.cli import environment, parser
from refimpl.errors import meant, near
from refimpl.files import cache_base
from tests.terminal import Terminal

ROOT = pathlib.Path(__file__).parents[1]
MODULES = {name: module for name, (module, _) in console.COMMANDS.items()}
ALL = [(m, ()) for m in MODULES.values()] + [("refimpl.bench.__main__", (name,)) for name in ALONE]
ALL += [(f"refimpl.training.{name}", ()) for name in ("export", "evaluate")]
ALL += [("refimpl.conformance.field.__main__", ())]


# Without the relative names that an editable install adds, for a folder that is gone.
PATH = os.pathsep.join([str(ROOT), *filter(os.path.isabs, sys.path)])
ENTRY = "import sys; sys.argv[0] = '/bin/refimpl'; from refimpl.__main__ import entry; sys.exit(entry())"


@pytest.fixture(autouse=True)
def as_before():
    """A test may say how a command was called."""
    yield
    parser.called("", "")


class _Found(Exception):
    pass


def parser_of(module, words=()):
    """The parser of a command, as its `main` builds it."""

    def stop(self, *given):
        raise _Found(self)

    with mock.patch.object(parser.Parser, "parse_args", stop), pytest.raises(_Found) as found:
        importlib.import_module(module).main([*words])
    return found.value.args[0]


def called(*argv, **env):
    """The console script with these words."""
    return subprocess.run(
        [sys.executable, "-c", ENTRY, *argv],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": PATH} | env,
    )


# --- help ---------------------------------------------------------------------------------------------------


def test_the_version_is_told():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    for word in ("--version", "-V", "-v", "version"):
        done = called(word)
        assert (done.returncode, done.stdout) == (0, f"refimpl {version}\n")


def test_help_lists_all_commands_and_tells_of_one():
    for words in ((), ("help",), ("--help",), ("-h",)):
        done = called(*words)
        assert done.returncode == 0 and all(f"  {c} " in done.stdout for c in console.COMMANDS)
        assert all(len(line) <= 80 for line in done.stdout.splitlines())
    done = called("help", "rules")
    assert done.returncode == 0 and done.stdout.startswith("usage: refimpl rules [-h]")
    assert "python -m" not in done.stdout
    done = called("help", "ruels")
    assert done.returncode == 2 and "did you mean rules?" in done.stderr


def test_help_names_the_program_as_it_was_called(monkeypatch):
    for module, name, start in (
        ("refimpl.plan", "refimpl plan", ()),
        ("refimpl.bench.__main__", "refimpl bench", ("growth",)),
        ("refimpl.convert_model", "python -m refimpl convert", ()),
    ):
        plain = parser_of(module, start).format_help()
        own = f"python -m {module.removesuffix('.__main__')}"
        assert own in plain and name not in plain
        parser.called(module, name)
        told = parser_of(module, start).format_help()
        assert told.startswith("usage: " + " ".join((name, *start))) and own not in told
        parser.called("", "")
    monkeypatch.setattr(sys, "argv", ["/somewhere/refimpl/__main__.py", "rules", "--nothing"])
    with pytest.raises(SystemExit, match="2"):
        console.entry()


def test_another_module_s_name_is_left_alone():
    parser.called("refimpl.conformance", "refimpl conformance")
    assert parser.renamed("python -m refimpl.conformance.field") == "python -m refimpl.conformance.field"
    assert parser.renamed("see python -m refimpl.conformance.") != "see refimpl conformance"
    assert parser.renamed("`python -m refimpl.conformance --op x`") == "`refimpl conformance --op x`"


@pytest.mark.parametrize("module, words", ALL, ids=lambda v: " ".join(v) if isinstance(v, tuple) else v)
@pytest.mark.parametrize("columns", [60, 80, 200])
def test_help_is_no_wider_than_80_columns_and_the_terminal(module, words, columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    told = parser_of(module, words).format_help()
    wide = [line for line in told.splitlines() if len(line) > min(80, columns)]
    # What cannot be broken: one flag with its choices, one word.
    assert all(re.fullmatch(r"\s*(\S+( \S+)?|\[[^]]*\]*)", line) for line in wide if columns < 80), wide
    assert columns < 80 or not wide


@pytest.mark.parametrize("module, words", ALL, ids=lambda v: " ".join(v) if isinstance(v, tuple) else v)
def test_every_flag_of_a_file_expands_the_tilde(module, words, monkeypatch):
    """Found by what it is called, not by what makes it expand."""
    monkeypatch.setenv("HOME", "/somebody")
    for action in parser_of(module, words)._actions:
        about = f"{action.dest} {action.metavar or ''}".lower()
        if re.search(r"path|folder|dir\b|file\b|\.yaml|output|html|markdown|xfails|manifest", about):
            if action.nargs == 0:  # --force of a file, and so on
                continue
            assert str(action.type("~/x")) == "/somebody/x", action.dest
            assert str(action.type("x~")) == "x~"


def test_a_tilde_in_the_variable_of_the_cache_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/somebody")
    monkeypatch.setenv("REFIMPL_CACHE", "~/cache")
    assert cache_base() == pathlib.Path("/somebody/cache")


# --- suggestions --------------------------------------------------------------------------------------------


def test_a_misspelled_command_flag_or_choice_is_answered_with_the_nearest(capsys):
    assert called("chta").stderr == "refimpl: no command 'chta'; did you mean chat?\n"
    assert "there are chat, serve" in called("xyzzy").stderr
    for argv, told in (
        (["--contxt", "3"], "there is no --contxt: did you mean --context?"),
        (["--gguf-pth=x"], "did you mean --gguf"),
        (["--activations", "fp9"], "did you mean fp8?"),
    ):
        with pytest.raises(SystemExit, match="2"):
            plan.main(argv)
        err = capsys.readouterr().err
        assert told in err and err.startswith("usage: python -m refimpl.plan") and "--help" in err
        assert err.count("\n") <= 3
    with pytest.raises(SystemExit, match="2"):  # a flag that is needed is told of as well
        importlib.import_module("refimpl.convert_model").main(["--outptu_path", "x"])
    assert "did you mean --output_path?" in capsys.readouterr().err


def test_what_is_like_nothing_gets_no_suggestion_but_the_list():
    assert near("zzz", ["linear", "rope"]) == [] and meant("zzz", ["linear", "rope"]) == "linear, rope"
    assert near("conf", ["chat", "conformance"]) == ["conformance"] and near("c", ["chat", "x"]) == []
    assert near("LINAER", ["linear", "rope"]) == ["linear"]
    assert meant("rop", ["rope"]) == "rope (did you mean that?)"
    assert meant("q4", ["q4_1", "q4"]) == "q4, q4_1 (did you mean one of these?)"


def test_a_text_without_a_flag_is_told_where_it_belongs(capsys):
    for argv, told in ((["What is 1 + 1?"], True), (["--xyzzy"], False)):
        with pytest.raises(SystemExit, match="2"):
            importlib.import_module("refimpl.chat").main(argv)
        assert ("a text goes behind -p, between quotes" in capsys.readouterr().err) == told
    for command, argv, told in (
        ("plan", ["deepseek-r1"], "a name goes behind --config, a model's folder behind --model_path"),
        ("serve", ["models/v3"], "a path goes behind --model_path or --gguf_path or --optimize_config_path"),
    ):
        with pytest.raises(SystemExit, match="2"):
            importlib.import_module(f"refimpl.{command}").main(argv)
        assert told in capsys.readouterr().err


def test_the_ends_of_a_number_are_told_where_they_mean_something():
    for kind, told in (
        (cli.integer(1), "an integer from 1 up, not x"),
        (cli.integer(0, 65535), "an integer from 0 to 65535, not x"),
        (cli.number(0, 1e30), "a number from 0 up, not x"),
        (cli.number(0, 1), "a number from 0 to 1, not x"),
    ):
        with pytest.raises(argparse.ArgumentTypeError, match=f"{told}$"):
            kind("x")


def test_a_flag_that_is_needed_is_named_once(capsys):
    with pytest.raises(SystemExit, match="2"):
        importlib.import_module("refimpl.convert_model").main([])
    assert "are required: --output_path\n" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.parametrize(
    ("command", "told"),
    [("plan", "measuring memory and cores"), ("warmup", "compiling kernels for this CPU")],
)
def test_what_takes_seconds_says_so_at_a_terminal(command, told, tmp_path):
    env = {"REFIMPL_CACHE": str(tmp_path), "NUMBA_OPT": "0"}
    with Terminal("-m", "refimpl", command, env=env) as t:
        t.until(told)


def test_a_small_model_s_plan_has_no_zeros(capsys):
    assert cli.run(plan.main, []) == 0
    assert " 0.000 " not in (out := capsys.readouterr().out) and " MB  E4M3 with scales" in out


def test_memory_may_be_given_with_its_unit_and_has_no_odd_limit(capsys):
    for given, told in (
        ("512GB", None),
        ("24 gb", None),
        ("x", "a number from 0 up, not x"),
        ("-1", "up, not -1"),
    ):
        argv = ["--config", "deepseek-v2-lite", "--vram", "24", f"--ram={given}", "--json"]
        if told is None:
            assert cli.run(plan.main, argv) == 0 and "Traceback" not in capsys.readouterr().err
        else:
            with pytest.raises(SystemExit, match="2"):
                plan.main(argv)
            assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    "module, argv, told",
    [
        ("conformance", ["--op", "liner"], "linear"),
        ("conformance", ["--op", "q4k.dequantize"], "q4_k.dequantize"),
        ("conformance", ["--op", "linear", "--law", "bitz"], "bits"),
        ("conformance", ["--op", "linear", "--backend", "cpuu"], "cpu"),
        ("conformance", ["--op", "linear", "--kernel", "numpy:addd", "--case", "{}", "--law", "bits"], "add"),
        ("conformance", ["--op", "linear", "--kernel", "numpy:add", "--declare", "arry=torch"], "array"),
        ("conformance", ["--op", "linear", "--kernel", "numpy:add", "--declare", "array=torhc"], "torch"),
        ("conformance.field.__main__", ["--only", "torcha"], "torchao"),
        ("plan", ["--config", "depseek-r1"], "deepseek-r1"),
        ("quantize", ["--safetensor_path", "refimpl/tiny/fp8", "--output", "x", "--type", "Q4KM"], "Q4_K_M"),
        ("bench.__main__", ["formats", "--type", "Q4K"], "Q4_K"),
        ("bench.__main__", ["expert"], "experts"),
        ("arithmetic", ["prefil"], "prefill"),
    ],
)
def test_a_misspelled_name_is_answered_with_the_nearest(module, argv, told, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    try:
        code = cli.run(importlib.import_module(f"refimpl.{module}").main, argv)
    except SystemExit as end:
        code = end.code
    err = capsys.readouterr().err
    assert code in (1, 2) and "did you mean" in err and re.search(rf"\b{re.escape(told)}\b", err), err


# --- completion ---------------------------------------------------------------------------------------------


def completed(line, *words):
    """What a shell is told, which argcomplete writes to descriptor 8."""
    given = {"COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9", "_ARGCOMPLETE": "1"}
    given |= {"_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_SHELL": "bash"}
    done = subprocess.run(
        ["bash", "-c", 'exec "$0" -c "$1" 8>&1 9>/dev/null', sys.executable, ENTRY],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": PATH} | given,
    )
    return {word.strip() for word in done.stdout.splitlines() if word.strip()}


@pytest.mark.skipif(sys.platform == "win32", reason="bash")
def test_a_shell_completes_commands_flags_choices_and_files(tmp_path):
    pytest.importorskip("argcomplete", reason="the extra `completion`")
    assert completed("refimpl ") >= {*console.COMMANDS, "help"}
    assert completed("refimpl pl") == {"plan"} and completed("refimpl help pl") == {"plan"}
    assert completed("refimpl plan --con") == {"--config", "--context"}
    assert completed("refimpl convert_model --lay") == {"--layout"}
    assert completed("refimpl chat --think ") == {"auto", "show", "hide"}
    assert completed("refimpl plan --config kimi") == {"kimi-k2"}
    assert completed("refimpl conformance --op q4_k.") == {"q4_k.dequantize", "q4_k.quantize"}
    assert "bits" in completed("refimpl conformance --op rope --law b")
    (tmp_path / "weights.gguf").touch()
    assert completed(f"refimpl inspect {tmp_path}/wei") == {f"{tmp_path}/weights.gguf"}


# --- the machine --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, value",
    [
        ("NUMBA_NUM_THREADS", "abc"),
        ("NUMBA_NUM_THREADS", "0"),
        ("NUMBA_NUM_THREADS", "-3"),
        ("NUMBA_NUM_THREADS", "1000000"),
        ("NUMBA_NUM_THREADS", "2.5"),
        ("NUMBA_NUM_THREADS", "²"),
        ("NUMBA_OPT", "fast"),
        ("NUMBA_DISABLE_JIT", "1"),
        ("OMP_NUM_THREADS", "abc"),
        ("OMP_NUM_THREADS", "4,"),
        ("REFIMPL_SIMD", "avx3"),
        ("REFIMPL_CUDA_DEVICE", "cuda:1"),
    ],
)
def test_an_odd_variable_is_one_clear_line(name, value, monkeypatch, capsys):
    monkeypatch.setenv(name, value)
    assert cli.run(lambda argv: pytest.fail("it runs"), []) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"refimpl: E5021 {name}: ") and err.count("\n") == 1 and value in err


@pytest.mark.parametrize(
    "name, value",
    [("OMP_NUM_THREADS", "4,2"), ("NUMBA_NUM_THREADS", "2"), ("NUMBA_OPT", "max"), ("REFIMPL_SIMD", "")],
)
def test_a_usual_variable_is_let_through(name, value, monkeypatch, capsys):
    monkeypatch.setenv(name, value)
    assert cli.run(lambda argv: 0, []) == 0 and capsys.readouterr().err == ""


def test_no_library_speaks_before_we_do():
    """In a process of its own, whose Numba has not been imported."""
    done = called("chat", "-p", "What is 1 + 2?", "--greedy", NUMBA_NUM_THREADS="abc")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("refimpl: E5021 NUMBA_NUM_THREADS") and done.stderr.count("\n") == 1


def test_a_misspelled_variable_of_ours_is_told_of(monkeypatch, capsys):
    monkeypatch.setenv("REFIMPL_CAHCE", "x")
    monkeypatch.setenv("REFIMPL_SOMETHING_OF_SOMEBODY", "1")
    environment.check_environment()
    err = capsys.readouterr().err
    assert "REFIMPL_CAHCE is no variable" in err and "did you mean REFIMPL_CACHE?" in err
    assert "SOMEBODY" not in err


def test_our_variables_are_those_that_the_sources_read():
    text = "".join(p.read_text() for d in ("refimpl", "kernels") for p in (ROOT / d).rglob("*.py"))
    read = set(re.findall(r'"(REFIMPL_[A-Z_]+)"', text)) - {
        "REFIMPL_CONFORMANCE_THREADS"
    }  # between processes
    assert read == set(environment.OURS)
    simd = importlib.import_module("refimpl.kernels.simd_llvm")
    assert environment.LEVELS == simd.LEVELS


@pytest.mark.skipif(sys.platform == "win32", reason="a folder in use cannot be removed there")
@pytest.mark.parametrize("command", ["conformance --laws", "bench formats --type Q8_0", "rules --help"])
def test_a_removed_folder_is_one_clear_line_or_none(command, tmp_path):
    (tmp_path / "gone").mkdir()
    done = subprocess.run(
        [
            "bash",
            "-c",
            f'cd "$0" && rmdir "$0" && exec "$@" {command}',
            *(str(tmp_path / "gone"), sys.executable, "-c", ENTRY),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": PATH},
    )
    assert "Traceback" not in done.stderr
    if command.startswith("conformance"):
        assert done.returncode == 1 and done.stderr.startswith("refimpl: E5022 ")
        assert done.stderr.count("\n") == 1
    else:
        assert done.returncode == 0, done.stderr
