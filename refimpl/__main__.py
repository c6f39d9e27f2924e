"""`refimpl COMMAND ...`: the console script, the same as `python -m refimpl.COMMAND ...`."""

from refimpl import interrupts

interrupts.take()  # before anything else is imported: see there

import importlib  # noqa: E402
import sys  # noqa: E402

COMMANDS = {
    "chat": ("refimpl.chat", "talk to a model; without arguments to the embedded one"),
    "serve": ("refimpl.serve", "serve a model to OpenAI's clients, and a page to chat with it"),
    "convert": ("refimpl.convert_model", "merge an FP8 checkpoint and a GGUF into a hybrid folder"),
    "doctor": ("refimpl.doctor", "what would keep an engine from starting, before it is started"),
    "inspect": ("refimpl.inspect", "list a model's tensors; draw one block with every bit"),
    "diff": ("refimpl.diff", "compare two checkpoints tensor by tensor, decoded"),
    "bench": ("refimpl.bench.__main__", "time the kernels against peers and the memory of this machine"),
    "conformance": ("refimpl.conformance", "judge a kernel of the table or of your own"),
    "plan": ("refimpl.plan", "VRAM, RAM and speed of a model, before it is loaded"),
    "rules": ("refimpl.rules", "check placement rules and draw the device map they give"),
    "warmup": ("refimpl.warmup", "compile a model's kernels ahead of its first answer"),
    "quantize": ("refimpl.quantize", "write a checkpoint as GGUF"),
    "arithmetic": ("refimpl.arithmetic", "where the bytes and flops of a model are, from its config alone"),
}


def entry() -> int:
    """Dispatch to the command named by the first argument; exit code 2 for an unknown one."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    cli = importlib.import_module("refimpl.cli")
    if name not in COMMANDS:
        return cli.run(_help if name in ("-h", "--help") else _unknown, [name])
    sys.argv = [f"refimpl {name}", *sys.argv[2:]]
    command = importlib.import_module(COMMANDS[name][0])
    return cli.run(command.main)


def _help(argv: list[str]) -> None:
    said = "\n".join(f"  {c:10} {about}" for c, (_, about) in COMMANDS.items())
    print(f"usage: refimpl COMMAND [--help] ...\n\n{said}")


def _unknown(argv: list[str]) -> int:
    print(f"refimpl: no command {argv[0]!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    raise SystemExit(entry())
