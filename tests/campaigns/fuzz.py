"""Files of every kind that is read, valid ones with fields or bytes changed: answered or refused in one line,
in a second, in little memory.

`cases` is what each of the two binary formats gets; the others take longer to read and get a share.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from refimpl import convert_model
from refimpl.bench.resident import Memory
from refimpl.checkpoint import gguf, safetensors
from refimpl.checkpoint.folder import Checkpoint, gguf_config, read_config
from refimpl.config import DeepSeekConfig
from refimpl.devices import placement
from refimpl.text.template import ChatTemplate, Message
from refimpl.text.tokenizer import Tokenizer
from refimpl.tiny import FP8_DIR, GGUF_DIR
from tests.campaigns import WHOLE, Part, Report, guard, keep, make, words

SHORT, LONG = 2500, 1_000_000
BATCH = 50  # cases between two looks at the memory

Case = tuple[bytes, Callable[[], object]]


class Target(NamedTuple):
    """A kind of file. `prepare(folder)` gives a function of a random generator that writes one file and
    returns it with what reads it.
    """

    share: float  # of `cases`
    least: int
    prepare: Callable[[Path], Callable[[random.Random], Case]]
    seconds: float = guard.SECONDS


def run(cases: int, seed: int, folder: Path, part: Part = WHOLE) -> Report:
    """All targets. A failure can be had again with the same seed."""
    failures: list[str] = []
    counts: dict[str, Counter[str]] = {}
    facts: dict[str, Any] = {}
    for name, target in TARGETS.items():
        numbers = part.share(range(max(target.least, round(cases * target.share))))
        counts[name], growth = _target(name, target, numbers, seed, folder, failures)
        facts[f"{name}, most memory in MiB"] = growth >> 20
    return Report(sum(map(Counter.total, counts.values())), failures, counts, facts)


def _target(
    name: str, target: Target, numbers: Sequence[int], seed: int, folder: Path, failures: list[str]
) -> tuple[Counter[str], int]:
    """How many files were accepted and so on, and by how many bytes the resident memory grew."""
    place = folder / name
    place.mkdir()
    case, memory, outcomes = target.prepare(place), Memory(), Counter[str]()
    largest = growth = 0
    with guard.watched():
        case(random.Random("warm"))[1:]  # what is loaded once does not count
        for done, i in enumerate(numbers):
            if done % BATCH == 0:
                memory.start()
            data, read = case(random.Random(f"{name}/{seed}/{i}"))
            kind, detail = guard.outcome(read, target.seconds)
            outcomes[kind] += 1
            largest = max(largest, len(data))
            if kind == "failed":
                failures.append(
                    f"{name} case {i} of seed {seed}: {detail} "
                    f"[{keep(folder, f'{name}-{seed}-{i}', data).name}]"
                )
            if done % BATCH == BATCH - 1 or done == len(numbers) - 1:
                growth = max(growth, memory.growth())
                if growth > guard.ROOM + 2 * largest:
                    failures.append(
                        f"{name} near case {i} of seed {seed}: {growth >> 20} MiB for files of at most "
                        f"{largest} bytes"
                    )
    return outcomes, growth


# --- the two binary formats ---------------------------------------------------------------------------------


def _inside(tensors: dict, path: Path) -> None:
    """The promise to whoever uses an accepted file: all bytes of all tensors are in it."""
    size = path.stat().st_size
    for info in tensors.values():
        assert 0 <= info.offset <= info.offset + info.nbytes <= size, f"{info.name} is not in the file"


def _gguf(folder: Path) -> Callable[[random.Random], Case]:
    path = folder / "x.gguf"

    def read(model: bool) -> None:
        file = gguf.read(path)
        _inside(file.tensors, path)
        for info in file.tensors.values():
            assert gguf.view(info).data.nbytes == info.nbytes
        if model:
            DeepSeekConfig.from_dict(gguf_config(file), path)

    def case(rng: random.Random) -> Case:
        model = rng.random() < 0.4
        file = make.gguf_file(rng, model)
        for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
            file = make.changed(rng, file)
        data = file.write()
        data = make.bytes_changed(rng, data) if rng.random() < 0.25 else data
        path.write_bytes(data)
        return data, lambda: read(model)

    return case


def _safetensors(folder: Path) -> Callable[[random.Random], Case]:
    path = folder / "x.safetensors"

    def read() -> None:
        file = safetensors.read(path)
        _inside(file.tensors, path)
        for info in file.tensors.values():
            assert safetensors.view(info).nbytes == info.nbytes

    def case(rng: random.Random) -> Case:
        header, data = make.safetensors_file(rng)
        times = rng.choice((0, 1, 1, 1, 2, 3))
        text = make.json_bytes(rng, make.json_changed(rng, header, times) if times else header)
        data = rng.choice((data, data, data, data, data, data, data + b"x", data[:-1], data * 2))
        length = make.number(rng, len(text)) if rng.random() < 0.05 else None
        whole = make.safetensors_bytes(text, data, length)
        whole = make.bytes_changed(rng, whole) if rng.random() < 0.15 else whole
        path.write_bytes(whole)
        return whole, read

    return case


# --- texts --------------------------------------------------------------------------------------------------


def _json_file(path: Path, value: Any, read: Callable[[], object]) -> Callable[[random.Random], Case]:
    """Changes of one JSON file."""

    def case(rng: random.Random) -> Case:
        data = make.json_bytes(rng, make.json_changed(rng, value, rng.choice((1, 1, 2, 4))))
        path.write_bytes(data)
        return data, read

    return case


def _index(folder: Path) -> Callable[[random.Random], Case]:
    weight_map = {}
    for i in (1, 2):
        file = f"model-{i:05d}-of-00002.safetensors"
        header = {
            f"t{i}{j}": {"dtype": "U8", "shape": [4], "data_offsets": [4 * j, 4 * j + 4]} for j in range(3)
        }
        (folder / file).write_bytes(make.safetensors_bytes(header, bytes(12)))
        weight_map |= dict.fromkeys(header, file)
    path = folder / safetensors.INDEX
    return _json_file(
        path,
        {"metadata": {"total_size": 24}, "weight_map": weight_map},
        lambda: safetensors.read_folder(folder),
    )


def _config(folder: Path) -> Callable[[random.Random], Case]:
    raw = json.loads((FP8_DIR / "config.json").read_text())
    return _json_file(
        folder / "config.json",
        raw,
        lambda: DeepSeekConfig.from_dict(read_config(folder), folder / "config.json"),
    )


def _small_tokenizer() -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The embedded model's tokenizer with a vocabulary small enough to be built a thousand times."""
    raw, config, generation = (
        json.loads((FP8_DIR / f).read_text())
        for f in ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
    )
    vocabulary = raw["model"]["vocab"]
    first = {t: i for t, i in vocabulary.items() if i < 300 or len(t) == 1}
    merges = [
        m
        for m in raw["model"]["merges"]
        if all(p in first for p in (m if isinstance(m, list) else m.split(" ")))
    ]
    merges = [m for m in merges if "".join(m if isinstance(m, list) else m.split(" ")) in first][:20]
    raw["model"] |= {"vocab": first, "merges": merges}
    return raw, config, generation


def _tokenizer(folder: Path) -> Callable[[random.Random], Case]:
    values = dict(
        zip(("tokenizer.json", "tokenizer_config.json", "generation_config.json"), _small_tokenizer())
    )

    def read() -> None:
        tokenizer = Tokenizer(folder)
        ids = tokenizer.encode("What is 12 + 30? é中")
        tokenizer.decode(ids)
        tokenizer.without_token(100_000)
        ChatTemplate.open(tokenizer)

    def case(rng: random.Random) -> Case:
        for name, value in values.items():
            (folder / name).write_text(json.dumps(value))
        name = rng.choice(list(values))
        data = make.json_bytes(rng, make.json_changed(rng, values[name], rng.choice((1, 1, 2))))
        (folder / name).write_bytes(data)
        return data, read

    return case


def _manifest(folder: Path) -> Callable[[random.Random], Case]:
    """The files that describe a merged folder: its manifest, index, config, and the head of one of its
    files.
    """
    merged = folder / "merged"
    convert_model.write(convert_model.plan(FP8_DIR, GGUF_DIR), merged)
    whole = {p.name: p.read_bytes() for p in merged.iterdir()}
    shard = min(n for n in whole if n.endswith(".safetensors"))
    end = 8 + int.from_bytes(whole[shard][:8], "little")
    header = json.loads(whole[shard][8:end])

    def read() -> None:
        checkpoint = Checkpoint.open(merged)
        for name in list(checkpoint)[:3]:
            checkpoint[name]

    def case(rng: random.Random) -> Case:
        for name, data in whole.items():
            if not name.endswith(".safetensors") or name == shard:
                (merged / name).write_bytes(data)
        name = rng.choice((shard, "config.json", safetensors.INDEX, convert_model.MANIFEST))
        if name == shard:
            data = make.safetensors_bytes(
                make.json_bytes(rng, make.json_changed(rng, header)), whole[shard][end:]
            )
        else:
            data = make.json_bytes(rng, make.json_changed(rng, json.loads(whole[name]), 2))
        (merged / name).write_bytes(data)
        return data, (lambda: convert_model.verify(merged)) if name == convert_model.MANIFEST else read

    return case


def _rules(folder: Path) -> Callable[[random.Random], Case]:
    import yaml

    path = folder / "rules.yaml"
    texts = [p.read_text() for p in sorted(placement.FILES.glob("*.yaml"))]
    lists = [yaml.safe_load(t) for t in texts]
    pieces = [[f"- {json.dumps(rule)}\n" for rule in entries] for entries in lists]

    def case(rng: random.Random) -> Case:
        if rng.random() < 0.5:
            rule = make.json_changed(rng, rng.choice(rng.choice(lists)), rng.choice((1, 1, 2, 3)))
            data = (
                b"- "
                + make.json_bytes(rng, rule)
                + b"\n"
                + "".join(rng.sample(rng.choice(pieces), 2)).encode()
            )
        else:
            text = (
                "".join(rng.sample(rng.choice(texts).splitlines(keepends=True), 12))
                if rng.random() < 0.2
                else rng.choice(texts)[:1500]
            )
            for _ in range(rng.choice((1, 1, 2, 3))):
                at = rng.randrange(len(text))
                text = (
                    text[:at]
                    + rng.choice(words.YAML) * rng.choice((1, 1, 1, 3, 500))
                    + text[at + rng.choice((0, 0, 1, 5)) :]
                )
            data = text.encode()
            data = make.bytes_changed(rng, data) if rng.random() < 0.2 else data
        path.write_bytes(data)
        return data, lambda: placement.read(path)

    return case


def _template(folder: Path) -> Callable[[random.Random], Case]:
    source = json.loads((FP8_DIR / "tokenizer_config.json").read_text())["chat_template"]
    whole = [
        w
        for w in words.JINJA
        if w[:1] == "{"
        and w.count("{{") == w.count("}}")
        and w.count("{% end") == w.count("{%") - w.count("{% end")
    ]

    def case(rng: random.Random) -> Case:
        kind, word = rng.randrange(3), rng.choice(words.JINJA)
        if kind == 0:
            text = "".join(rng.choice(words.JINJA) for _ in range(rng.randint(1, 8)))
        elif kind == 1:
            at = rng.randrange(len(source))
            text = source[:at] + word + source[at + rng.choice((0, 1, 5)) :]
        else:  # something that runs
            text = (
                "{% for m in messages %}{{ m.role }}"
                + rng.choice(whole) * rng.choice((0, 1, 1))
                + "{{ m.content }}{% endfor %}"
                + rng.choice(whole)
            )
        messages = [
            Message("system", "a"),
            Message("user", "<｜User｜> {{ 1 }}"),
            Message("assistant", "b", "thought"),
            Message("user", " c "),
        ]
        template = ChatTemplate(text, "chat_template", {"bos_token": "<s>", "eos_token": "</s>"})
        return text.encode("utf-8", "surrogatepass"), lambda: template.pieces(messages[rng.randint(0, 1) :])

    return case


TARGETS = {
    "gguf": Target(1, 1, _gguf),
    "safetensors": Target(1, 1, _safetensors),
    "index.json": Target(0.05, 50, _index),
    "config.json": Target(0.1, 50, _config),
    "tokenizer files": Target(0.01, 50, _tokenizer),
    "merged folder": Target(0.02, 50, _manifest),
    "rules": Target(0.02, 50, _rules),
    "chat template": Target(0.0005, 8, _template),
}
