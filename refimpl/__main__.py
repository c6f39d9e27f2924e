"""`refimpl COMMAND ...`: the console script, the same as `python -m refimpl.COMMAND ...`."""

from refimpl import interrupts

interrupts.take()  # before anything else is imported: see there

import importlib  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402

COMMANDS = {
    "chat": ("refimpl.chat", "talk to a model; without arguments to the embedded one"),
    "serve": ("refimpl.serve", "serve a model to OpenAI's clients, with a page to chat"),
    "convert": ("refimpl.convert_model", "merge an FP8 checkpoint and a GGUF into a hybrid folder"),
    "doctor": ("refimpl.doctor", "what this machine has, and what is missing"),
    "inspect": ("refimpl.inspect", "list a model's tensors; draw one block with every bit"),
    "diff": ("refimpl.diff", "compare two checkpoints tensor by tensor, decoded"),
    "bench": ("refimpl.bench.__main__", "time the kernels against others and the memory here"),
    "conformance": ("refimpl.conformance", "judge a kernel of the table or of your own"),
    "plan": ("refimpl.plan", "does a model fit, and how fast is it, before it is loaded"),
    "rules": ("refimpl.rules", "check placement rules and draw the device map they give"),
    "warmup": ("refimpl.warmup", "compile a model's kernels ahead of its first answer"),
    "quantize": ("refimpl.quantize", "write a checkpoint as GGUF"),
    "arithmetic": ("refimpl.arithmetic", "a model's bytes and flops, from its config alone"),
}
ALIASES = {"convert_model": "convert", "convert-model": "convert"}
HELP, VERSION = ("-h", "--help", "help"), ("-V", "-v", "--version", "version")


def entry() -> int:
    """Dispatch to the command named by the first argument; exit code 2 for an unknown one."""
    own = os.path.basename(sys.argv[0])
    program = "python -m refimpl" if own == "__main__.py" else os.path.splitext(own)[0]
    cli = importlib.import_module("refimpl.cli")
    if "_ARGCOMPLETE" in os.environ:
        _complete(program)
    name, *rest = sys.argv[1:] or ["help"]
    if name in HELP and rest:  # `refimpl help plan`
        name, rest = rest[0], ["--help"]
    name = ALIASES.get(name, name)
    if name not in COMMANDS:
        return cli.run(_told, [program, name])
    command = _opened(program, name)
    return cli.run(command.main, rest)


def _opened(program: str, name: str):
    """The module of a command, whose help names it as it was called."""
    module = COMMANDS[name][0]
    importlib.import_module("refimpl.cli.parser").called(module, f"{program} {name}")
    return importlib.import_module(module)


def _told(argv: list[str]) -> int:
    """Help, the version, or what may have been meant."""
    program, name = argv
    if name in HELP:
        print(f"usage: {program} COMMAND [--help] ...\n")
        print("\n".join(f"  {c:12} {about}" for c, (_, about) in COMMANDS.items()))
        print(f"\n`{program} help COMMAND` lists a command's flags.")
        return 0
    if name in VERSION:
        print(f"refimpl {importlib.import_module('refimpl').__version__}")
        return 0
    errors = importlib.import_module("refimpl.errors")
    close = errors.near(name, [*COMMANDS, *ALIASES, "help", "version"])
    said = f"did you mean {close[0]}?" if close else f"there are {', '.join(COMMANDS)}"
    print(f"refimpl: no command {errors.printable(name, 60)!r}; {said}", file=sys.stderr)
    return 2


def _complete(program: str) -> None:
    """Answer a shell that asks how the line goes on: with the names of commands, or with what the parser of
    the command knows, which is asked as if the command were a program of its own.
    """
    parser = importlib.import_module("refimpl.cli.parser")
    words = os.environ.get("COMP_LINE", "")[: int(os.environ.get("COMP_POINT", "0"))].split(" ")
    name = ALIASES.get(words[1], words[1]) if len(words) > 2 else ""
    if name in COMMANDS:
        os.environ["_ARGCOMPLETE"] = str(int(os.environ["_ARGCOMPLETE"]) + 1)
        _opened(program, name).main([])  # whose parser answers, and ends
    names = parser.Parser(program, None)
    names.add_argument("command", choices=[*COMMANDS, "help"])
    names.add_argument("of", nargs="?", choices=[*COMMANDS])  # `refimpl help plan`
    parser.complete(names)


if __name__ == "__main__":
    raise SystemExit(entry())
