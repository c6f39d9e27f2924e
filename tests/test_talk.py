"""What a person meets in a chat: the line editor, the commands, what is shown while one waits."""

import io
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from refimpl import chat
from refimpl.cli import run
from refimpl.cli.waiting import Waiting
from refimpl.errors import RefimplError
from refimpl.talk import commands, saved, screen, tokens
from refimpl.talk.screen import Screen
from refimpl.text.speech import StopText
from refimpl.text.template import Message
from tests.terminal import Terminal

ROOT = Path(__file__).parent.parent
on_a_terminal = pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")


@pytest.fixture
def talk(hybrid_folder):
    args = chat._parser().parse_args(["--gguf_path", str(hybrid_folder), "--greedy"])
    return commands.Talk(chat.open_conversation(args), Screen("hide"))


@pytest.fixture
def say(talk, capsys):
    """Types a line; returns (stdout, stderr)."""

    def say(line):
        chat._turn(talk, line, False)
        return capsys.readouterr()

    capsys.readouterr()
    return say


def terminal(folder, *args, env=None):
    return Terminal("-m", "refimpl.chat", "--gguf_path", str(folder), "--greedy", *args, env=env)


# --- at the terminal ----------------------------------------------------------------------------------------


@on_a_terminal
def test_ctrl_c_stops_an_answer_and_keeps_what_was_said(hybrid_folder):
    with terminal(hybrid_folder) as t:
        t.until(">>>")
        t.type("What is 57 * 38?\r")
        t.until("\x1b[2m")  # the reasoning is dim
        t.until("\n")
        t.interrupt()
        t.until("[interrupted]")
        t.until(">>>")
        t.type("What is 7 + 8?\r")
        assert t.until("tokens/s").count("\x1b[0m15\r\n") == 1
        t.until(">>>")
        t.type("/exit\r")
        assert t.end() == 0


@on_a_terminal
def test_ctrl_c_at_the_prompt_clears_the_line_and_then_says_how_to_leave(hybrid_folder):
    with terminal(hybrid_folder) as t:
        t.until(">>>")
        t.type("What is 99")
        t.until("99")
        t.type("\x03")
        t.type("What is 7 + 8?\r")
        assert "15" in t.until("tokens/s")
        t.until(">>>")
        t.type("\x03")
        t.until("/exit to leave")
        t.until(">>>")
        t.type("\x04")
        assert t.end() == 0


@on_a_terminal
def test_lines_typed_while_it_answers_are_the_next_questions_and_not_shown_in_the_answer(hybrid_folder):
    with terminal(hybrid_folder, "--backend", "reference") as t:
        t.until(">>>")
        t.type("What is 57 * 38?\r")
        t.until("times")
        t.type("/stats\rWhat is 7 + 8?\r")
        answer = t.until("2166\r\n")
        assert "/stats" not in answer and "7 + 8" not in answer
        t.until("/stats")
        t.until("tokens/s")
        assert "15" in t.until("tokens/s")
        t.until(">>>")
        t.type("\x04")
        assert t.end() == 0


@on_a_terminal
def test_the_last_line_of_a_chat_is_the_person_s(hybrid_folder):
    """Numba has colorama, where that is installed, write a code to the streams as the process ends."""
    with terminal(hybrid_folder, "--backend", "cpu") as t:
        t.until(">>>")
        t.type("What is 7 + 8?\r")
        t.until("tokens/s")
        t.until(">>>")
        t.type("/exit\r")
        assert t.end() == 0 and "\\x1b" not in t.seen


@on_a_terminal
def test_ctrl_z_at_the_prompt_stops_the_chat_until_it_is_called_back(hybrid_folder):
    """Under a parent of the same session, as a shell is: without one nobody could call it back."""
    words = [sys.executable, "-m", "refimpl.chat", "--gguf_path", str(hybrid_folder)]
    shell = f"""if True:
        import os, signal, subprocess
        chat = subprocess.Popen({words!r}, process_group=0)
        _, status = os.waitpid(chat.pid, os.WUNTRACED)
        print("it is stopped" if os.WIFSTOPPED(status) else "it has ended")
        chat.send_signal(signal.SIGCONT)
        raise SystemExit(chat.wait())
    """
    with Terminal("-c", shell) as t:
        t.until(">>>")
        t.type("\x1a")
        t.until("it is stopped")
        t.until(">>>")
        t.type("/exit\r")
        assert t.end() == 0


@on_a_terminal
@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_ctrl_c_under_make_is_told_by_the_chat_alone(tmp_path):
    """While it loads. `make` says nothing, as it does not when an answer is interrupted."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (tmp_path / "bin" / "python").chmod(0o755)
    words = ["make", "-C", str(ROOT), "-o", str(tmp_path / "core"), "chat", f"VENV={tmp_path}"]
    start = f"import os; os.execvp('make', {words!r})"
    with Terminal("-c", start, env={"REFIMPL_CACHE": str(tmp_path / "cache")}) as t:
        t.until("merging the embedded model")
        os.killpg(t.process.pid, signal.SIGINT)
        assert "***" not in t.until("refimpl: interrupted")
        t.end()
        assert "***" not in t.seen


@on_a_terminal
def test_questions_are_kept_for_the_next_time_in_a_private_file(hybrid_folder, tmp_path):
    env = {"REFIMPL_CACHE": str(tmp_path / "cache")}
    with terminal(hybrid_folder, "--backend", "reference", env=env) as t:
        t.until(">>>")
        t.type("What is 7 + 8?\r")
        t.until("tokens/s")
        t.until(">>>")
        t.type("\x04")
        assert t.end() == 0
    file = tmp_path / "cache" / "chat" / "history"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and "What is 7 + 8?" in file.read_text()
    with terminal(hybrid_folder, "--backend", "reference", env=env) as t:
        t.until(">>>")
        t.type("\x1b[A\r")  # the arrow up
        assert "15" in t.until("tokens/s")


@on_a_terminal
def test_the_word_that_leaves_other_programs_is_no_question(hybrid_folder):
    with terminal(hybrid_folder) as t:
        t.until(">>>")
        t.type("exit\r")
        assert "tokens/s" not in t.until("/exit to leave; to ask it as it is")
        t.until(">>>")
        t.type(" exit\r")
        t.until("tokens/s")


@on_a_terminal
def test_commands_are_completed_and_lines_are_pasted_whole(hybrid_folder, tmp_path):
    with terminal(hybrid_folder) as t:
        t.until(">>>")
        t.type("/toke\t")
        t.until("/tokens")
        t.type("\r")
        t.until("nothing has been answered yet")
        t.until(">>>")
        t.type("/sav\t")  # a command that takes something is completed with a space
        t.until("/save")
        t.type(f"{tmp_path}/x.json\r")
        t.until("0 messages saved")
        t.until(">>>")
        t.type("\x1b[200~What is\n7 + 8?\x1b[201~")
        t.until("8?")
        t.type("\r")
        t.until("tokens/s")


@on_a_terminal
@pytest.mark.parametrize("missing", ["prompt_toolkit", "rich"])
def test_without_the_packages_there_is_a_plain_prompt(hybrid_folder, missing):
    start = (
        f"import sys; sys.modules[{missing!r}] = None; from refimpl import chat, cli; "
        f"raise SystemExit(cli.run(chat.main, ['--gguf_path', {str(hybrid_folder)!r}, '--greedy']))"
    )
    with Terminal("-c", start) as t:
        t.until(">>>")
        t.type("What is 7 + 8?\r")
        assert "15" in t.until("tokens/s")
        t.until(">>>")
        t.type("/exit\r")
        assert t.end() == 0


def test_an_empty_pipe_is_no_silent_chat(hybrid_folder):
    command = [
        sys.executable,
        "-m",
        "refimpl.chat",
        "--gguf_path",
        str(hybrid_folder),
        "--backend",
        "reference",
    ]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "") and "note: nothing came from stdin" in done.stderr


def test_a_pipe_and_one_question_import_neither(hybrid_folder):
    start = (
        "import sys; from refimpl import chat, cli; c = cli.run(chat.main, sys.argv[1:]); "
        "assert not {'rich', 'prompt_toolkit'} & set(sys.modules); raise SystemExit(c)"
    )
    command = [sys.executable, "-c", start, "--gguf_path", str(hybrid_folder), "--greedy"]
    for more, typed in ((["-p", "What is 7 + 8?"], ""), ([], "What is 7 + 8?\n")):
        done = subprocess.run([*command, *more], input=typed, capture_output=True, text=True, timeout=120)
        assert (done.returncode, done.stdout) == (0, "15\n"), done.stderr


# --- commands -----------------------------------------------------------------------------------------------


def test_every_command_says_what_it_did(say, tmp_path):
    (tmp_path / "f").write_text("12 + 30")
    lines = [
        "/help",
        "/set",
        "/set temperature=0.5",
        "/set think show",
        "/set seed=null",
        "/set thinking=true",
    ]
    lines += [
        "/system Be brief",
        "/system",
        f"/file {tmp_path / 'f'}",
        "/undo",
        "/clear",
        "/tokens",
        "/stats",
    ]
    lines += [
        "/save",
        "/load",
        f"/save {tmp_path / 'new'}",
        f"/load {tmp_path / 'new'}",
        "/set stop=x",
        "/regen",
    ]
    for line in lines:
        out, err = say(line)
        assert out == "" and err.strip(), line


def test_an_unknown_command_is_named_with_a_suggestion(say):
    assert "no command /regne; did you mean /regen?" in say("/regne").err
    assert "/help lists all" in say("/xyzzy").err


def test_a_misspelled_setting_is_told_of(talk, say):
    for name in ("temp", "temperture", "stp"):
        assert "has no such variable; did you mean" in say(f"/set {name}=0.3").err
    assert say("/set bystander=1").err.endswith("(this model's chat template has no such variable)\n")
    talk.chat.template.source += "{% if thinking %}{% endif %}"
    assert say("/set thinking=true").err == "thinking = true   (a variable of the chat template)\n"
    with pytest.raises(chat._Unanswered, match=r"E6010 .*think cannot be \"showw\" .*show"):
        say("/set think=showw")
    assert talk.screen.mode == "hide" and "think" not in talk.chat.variables


def test_a_command_typed_ahead_ends_in_a_newline(say):
    """A terminal that nobody reads from turns Enter into one, and the editor shows it in the next prompt."""
    assert "nothing has been answered yet" in say("/stats\n").err
    assert "no system text" in say("/system \n").err
    assert "no command /statz\n" not in say("/statz\n").err


def test_settings_are_taken_shown_and_refused(talk, say):
    say("/set temperature=0.7")
    say("/set max_new_tokens 5")
    assert talk.chat.sampling.temperature == 0.7 and talk.chat.max_new_tokens == 5
    say("/set thinking=true")
    assert talk.chat.variables == {"thinking": True} and "thinking = true" in say("/set").err
    for wrong in ("temperature=-1", "top_p=2", "top_k=1.5", "seed=-1", "max_new_tokens=x", "temperature=hot"):
        with pytest.raises(chat._Unanswered, match="E6010"):
            say(f"/set {wrong}")
    assert "use /set NAME=VALUE" in say("/set messages=1").err
    assert talk.chat.sampling.temperature == 0.7


def test_a_conversation_is_saved_and_gone_on_with(talk, say, tmp_path):
    say("What is 7 + 8?")
    file = tmp_path / "talk.json"
    before = list(talk.chat.messages)
    say(f"/save {file}")
    say("/clear")
    assert not talk.chat.messages
    say(f"/load {file}")
    assert talk.chat.messages == before and before[-1].content == "15"
    with pytest.raises(chat._Unanswered, match="E5108"):  # a file is never overwritten
        say(f"/save {file}")
    with pytest.raises(chat._Unanswered, match="E5000"):
        say(f"/load {tmp_path / 'none'}")


def test_what_a_command_refuses_is_told_with_what_helps_in_a_chat(say, tmp_path):
    (tmp_path / "f").write_text("x")
    for line, said in (
        (f"/save {tmp_path / 'f'}", "E5108 .*- choose another name$"),
        (f"/save {tmp_path / 'none' / 'f'}", "E5000 .*none/f: there is no folder .*none - make it"),
        ("/set top_k=1.5", "E6010 /set: top_k must be a whole number from 0 up, not 1.5 -"),
        ("/set seed=x", 'seed must be a whole number from 0 up or null, not "x"'),
        ("/set max_new_tokens=-3", "max_new_tokens must be a whole number from 0 up or null, not -3"),
        ("/set temperature=hot", 'temperature must be a number, not "hot"'),
    ):
        with pytest.raises(chat._Unanswered, match=said):
            say(line)
    assert "use /set NAME=VALUE" in say("/set =3").err
    assert say("/set stop=").err == "stop = []\n"
    assert "did you mean" not in say("/nope").err + say("/").err


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"\x7fELF\x02\x01\x01\0\0", "E6003 .*a zero byte at 7"),
        (b"caf\xe9", "E6003 .*byte 0xe9 at 3, which is not UTF-8"),
        (
            b"hello world " * 900_000,
            r"E6001 .*does not fit .*found at least \d+ tokens, expected at most 2048",
        ),
        (b"1 " * 1500, r"E6001 .*found \d+ tokens"),
    ],
)
def test_a_file_that_no_question_can_hold_is_refused_at_once(talk, say, tmp_path, data, why):
    (tmp_path / "f").write_bytes(data)
    with pytest.raises(chat._Unanswered, match=why):
        say(f"/file {tmp_path / 'f'}")
    assert talk.attached == ""


def test_lines_are_broken_between_words_at_a_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    line = "  /set NAME=VALUE    sampling, think, stop, or a template's variable; alone: show all"
    wide = screen.at_width(line, 12).splitlines()
    assert max(map(len, wide)) <= 40 and " ".join(wide).split() == line.split()
    assert wide[0].startswith("  /set NAME=VALUE    s") and all(w[:12].isspace() for w in wide[1:])
    assert screen.at_width("x " + "y" * 90, 2).splitlines() == ["x", "  " + "y" * 90]


@pytest.mark.parametrize(
    "found",
    [
        "x",
        "[]",
        "[" * 100_000,
        '{"format": "other", "messages": []}',
        [1],
        [{"role": "user", "content": 3}],
        [{"role": "tool", "content": "x"}],
        [{"role": "user", "content": "x"}],
        [{"role": "assistant", "content": "x"}, {"role": "user", "content": "y"}],
    ],
)
def test_a_file_that_is_no_conversation_is_refused(found, tmp_path):
    text = found if isinstance(found, str) else json.dumps({"format": saved.FORMAT, "messages": found})
    (tmp_path / "f").write_text(text)
    with pytest.raises(RefimplError, match="E6020"):
        saved.load(tmp_path / "f")


def test_what_was_saved_is_loaded_whatever_it_spells(tmp_path):
    messages = [Message("system", "\ud800\x1b[2J"), Message("user", "a\0b"), Message("assistant", "c", "d")]
    saved.save(tmp_path / "f", messages)
    assert saved.load(tmp_path / "f")[1:] == messages[1:]


def test_a_file_s_text_goes_before_the_next_question_alone(talk, say, tmp_path):
    (tmp_path / "f").write_text("What is")
    say(f"/file {tmp_path / 'f'}")
    say("7 + 8?")
    assert talk.chat.messages[0].content == "What is\n\n7 + 8?"
    say("What is 1 + 2?")
    assert talk.chat.messages[2].content == "What is 1 + 2?"


def test_tokens_are_those_that_were_likeliest(talk, say):
    say("What is 7 + 8?")
    chat_ = talk.chat
    found = tokens.explain(chat_.session.model, chat_.tokenizer, chat_.asked, chat_.last.token_ids)
    assert len(found) == len(chat_.last.token_ids)
    for t in found:  # greedy
        assert all(t.probability >= share for _, share in t.others)
        assert sum((share for _, share in t.others), t.probability) <= 1 + 1e-9
        config = chat_.session.model.config
        assert len(t.experts) == config.num_hidden_layers - config.first_k_dense_replace
        assert all(len(set(ids)) == config.num_experts_per_tok for ids in t.experts.values())
    assert say("/tokens").err.count("\n") == len(found) + 1


# --- stop strings, and nothing silent -----------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_a_stop_string_is_found_however_it_is_cut(size):
    for text, stops, want in [
        ("abcdef", ("cd",), "ab"),
        ("aaab", ("aab",), "a"),
        ("abcdef", ("ef", "bc"), "a"),
        ("abc", ("cd",), "abc"),
        ("abab", ("abc", "bab"), "a"),
    ]:
        stop = StopText(stops)
        said = "".join(stop.push(text[i : i + size]) for i in range(0, len(text), size)) + stop.end()
        assert said == want


def test_an_answer_ends_before_a_stop_string(hybrid_folder, capsys):
    ask = ["--gguf_path", str(hybrid_folder), "--greedy", "--json", "-p", "What is 123 + 456?"]
    assert run(chat.main, [*ask, "--stop", "9"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["text"], answer["finish_reason"]) == ("57", "stop")


def test_an_answer_without_a_word_ends_with_a_note(say, talk, monkeypatch):
    stop, think = next(iter(talk.chat.tokenizer.stop_ids)), talk.chat.tokenizer.token_id("</think>")
    for said, note in (([stop], "at once, without a word"), ([400, think, stop], "after thinking")):
        monkeypatch.setattr(talk.chat.session, "generate", lambda *args, said=said: iter(said))
        out, err = say("ba be bi bo bu")
        assert out.strip() == "" and err.startswith("refimpl: note: ") and note in err
    monkeypatch.undo()
    talk.chat.stop = ("1",)
    out, err = say("What is 7 + 8?")
    assert out.strip() == "" and "begins with a text that --stop or /set stop names" in err
    talk.chat.stop, talk.chat.max_new_tokens = (), 3
    assert "stopped at --max_new_tokens or the end of the context while thinking" in say("What is 1 + 2?").err


def test_a_long_question_tells_how_far_it_is(talk):
    told = []
    talk.chat.session.progress = lambda done, total: told.append((done, total))
    prompt = talk.chat.prompt("1 " * 400)
    talk.chat.session.prefill(prompt)
    assert len(told) > 1 and told[-1] == (len(prompt), len(prompt)) and told == sorted(told)


def test_of_kernels_that_are_compiled_within_one_another_the_outermost_is_named(monkeypatch):
    import numba

    said = []
    waiting = Waiting(live=True)
    monkeypatch.setattr(waiting, "say", lambda text: (said.append(text), setattr(waiting, "text", text)))
    waiting.text = "reading the question"
    inner = numba.njit(lambda x: x + 1)

    @numba.njit
    def outer(x):
        return inner(x) + 1

    waiting.watch_compiler()
    assert outer(1) == 3
    assert said == ["compiling outer for this CPU, which happens once", "reading the question"]


def test_waiting_says_nothing_in_a_pipe(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    waiting = Screen().waiting
    with waiting.during("loading"):
        waiting.tokens(1, 2)
    assert sys.stderr.getvalue() == ""
