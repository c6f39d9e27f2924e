"""The API reference, from the sources: one page a module, with every public function, class, method, property
and documented constant.

The sources are parsed and not imported, so that pages for kernels are made where their compilers are missing.
"""

from __future__ import annotations

import ast
import html
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

SKIPPED = {"refimpl.__main__"}

FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef


class Module(NamedTuple):
    """A module's name and its source."""

    name: str
    path: Path

    def parse(self) -> ast.Module:
        return ast.parse(self.path.read_text())


def modules(root: Path) -> list[Module]:
    """Public modules of the package, `refimpl` first; kernels under their import name."""
    found = []
    for path in sorted((root / "refimpl").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if not any(p.startswith("_") and p != "__init__" for p in parts):
            found.append(Module(".".join(parts).removesuffix(".__init__"), path))
    if not any(
        m.name.startswith("refimpl.kernels.") for m in found
    ):  # rglob does not follow the symlink everywhere
        found += [Module(f"refimpl.kernels.{p.stem}", p) for p in sorted((root / "kernels").glob("*.py"))]
    return [m for m in sorted(found) if m.name not in SKIPPED]


def pages(root: Path) -> dict[str, str]:
    """{file: Markdown} of the whole reference."""
    listed = modules(root)
    rows = [
        f"| [`{m.name}`]({m.name}.md) | {escape(first_sentence(ast.get_docstring(m.parse()) or ''))} |"
        for m in listed
    ]
    index = [
        "# API reference",
        "",
        "Made of the docstrings. Everything here is public; what begins with an underscore is not.",
        "",
        "| module | |",
        "|---|---|",
        *rows,
        "",
    ]
    return {"index.md": "\n".join(index)} | {f"{m.name}.md": "\n".join(page(m)) for m in listed}


def page(module: Module) -> Iterator[str]:
    """One module."""
    tree, source = module.parse(), module.path.read_text().splitlines()
    yield from (f"# {module.name}", "", *prose(ast.get_docstring(tree)))
    for node, text in members(tree.body):
        if isinstance(node, ast.ClassDef):
            yield from (
                "",
                f"## class {escape(node.name)}",
                "",
                *_head(node),
                *prose(text),
                "",
                *_fields(node, source),
            )
            for method, about in members(node.body):
                if isinstance(method, FUNCTION) and about is not None:
                    yield from (
                        "",
                        f"### {escape(f'{node.name}.{method.name}')}",
                        "",
                        *code(_signature(method)),
                        *prose(about),
                    )
        elif isinstance(node, FUNCTION):
            yield from ("", f"## {escape(node.name)}", "", *code(_signature(node)), *prose(text))
        else:
            yield from ("", f"## {escape(_name(node) or '')}", "", *prose(text))
    yield ""


def members(body: list[ast.stmt]) -> Iterator[tuple[ast.stmt, str | None]]:
    """Public definitions with their docstrings; a constant counts when a string stands behind it."""
    for i, node in enumerate(body):
        if isinstance(node, FUNCTION | ast.ClassDef) and not node.name.startswith("_"):
            yield node, ast.get_docstring(node)
        elif (name := _name(node)) and not name.startswith("_") and i + 1 < len(body):
            after = body[i + 1]
            if (
                isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
                and isinstance(after.value.value, str)
            ):
                yield node, inspect.cleandoc(after.value.value)


def _name(node: ast.stmt) -> str | None:
    target = (
        node.targets[0]
        if isinstance(node, ast.Assign)
        else node.target
        if isinstance(node, ast.AnnAssign)
        else None
    )
    return target.id if isinstance(target, ast.Name) else None


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    marks = [
        f"@{ast.unparse(d)}\n"
        for d in node.decorator_list
        if ast.unparse(d) in ("property", "classmethod", "staticmethod", "cache")
    ]
    marks += ["async "] * isinstance(node, ast.AsyncFunctionDef)
    arguments = ast.unparse(node.args)
    if len(node.name) + len(arguments) + len(returns) > 96:
        arguments = "\n    " + ",\n    ".join(_split(arguments)) + ",\n"
    return f"{''.join(marks)}{node.name}({arguments}){returns}"


def _split(arguments: str) -> Iterator[str]:
    """At the commas that no bracket encloses."""
    start = depth = 0
    for i, c in enumerate(arguments):
        depth += (c in "([{") - (c in ")]}")
        if c == "," and not depth:
            yield arguments[start:i].strip()
            start = i + 1
    yield arguments[start:].strip()


def _head(node: ast.ClassDef) -> list[str]:
    """How it is made, or what it is made of; nothing for a class without either."""
    made = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
    if made is None:
        return code(f"class {node.name}({', '.join(map(ast.unparse, node.bases))})") if node.bases else []
    return code(re.sub(r"^__init__\((\s*)self(,\s*)?", rf"{node.name}(\1", _signature(made)))


def _fields(node: ast.ClassDef, source: list[str]) -> Iterator[str]:
    """The annotated fields of a tuple or dataclass as they are written, with their comments."""
    found = [
        n
        for n in node.body
        if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name) and not n.target.id.startswith("_")
    ]
    if found:
        yield from code(
            textwrap.dedent("\n".join(line for n in found for line in source[n.lineno - 1 : n.end_lineno]))
        )


def code(text: str) -> list[str]:
    """A Python block."""
    return ["```python", text, "```", ""]


def prose(docstring: str | None) -> list[str]:
    """A docstring as Markdown: indented lines and bit diagrams stay as they are, the rest is text with `code`
    in it.
    """
    lines: list[str] = []
    for line in (docstring or "").splitlines():
        if line.startswith("    "):
            if lines and lines[-1] and not lines[-1].startswith("    "):
                lines.append("")
            lines.append(line)
        else:
            if lines and lines[-1].startswith("    ") and line:
                lines.append("")
            lines.append(escape(line))
    return lines


def escape(text: str) -> str:
    """Markdown's signs as they are written, outside of `code`."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(
        p
        if p.startswith("`") and len(p) > 1
        else re.sub(r"([\\*_#<>\[\]|{}])", lambda m: f"&#{ord(m[1])};", p)
        for p in parts
    )


def unescape(text: str) -> str:
    """What `escape` was given, of a name."""
    return html.unescape(text)


def name_of(node: ast.stmt) -> str:
    """The name that a member of `members` defines."""
    return node.name if isinstance(node, FUNCTION | ast.ClassDef) else _name(node) or ""


def first_sentence(docstring: str) -> str:
    """Up to the first full stop or the end of the paragraph."""
    paragraph = docstring.split("\n\n")[0].replace("\n", " ")
    return re.split(r"(?<=[a-z)`\]])[.:](?: |$)", paragraph)[0]
