"""Placement rules: which module runs on which device, in the YAML of KTransformers' `--optimize_config_path`.

A file is a list of rules. Modules are visited from the root down; the first rule that matches one, by a
regular expression found anywhere in its name and by class, says what becomes of it, and `recursive: False`
leaves all below it alone. What no rule matches goes to cuda:0. docs/placement.md has the language, and what
differs from KTransformers: names of classes are looked up in the tables below and nothing named in a file is
ever imported.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from refimpl.config import DeepSeekConfig
from refimpl.errors import RefimplError, printable, refusal
from refimpl.files import regular_size

FILES = Path(__file__).parents[1] / "rules_yaml"


HYBRID = FILES / "DeepSeek-V3-Chat-fp8-linear-ggml-experts.yaml"


LIMIT = 1 << 18  # bytes of a file


DEPTH, ALIASES = 16, 64


PATTERN = 1000  # characters


SECONDS = 5.0  # for all patterns on all names


# The classes of DeepSeek-V3's modules as the original code names them, with the classes they are besides.
CLASSES = {
    "DeepseekV3ForCausalLM": (),
    "DeepseekV3Model": (),
    "DeepseekV3DecoderLayer": (),
    "DeepseekV3Attention": (),
    "DeepseekV3RMSNorm": (),
    "DeepseekV3MLP": (),
    "DeepseekV3MoE": (),
    "MoEGate": (),
    "Linear": (),
    "Embedding": (),
    "ModuleList": (),
    "DeepseekV3RotaryEmbedding": (),
    "DeepseekV3YarnRotaryEmbedding": ("DeepseekV3RotaryEmbedding",),
}


_DEVICES = {"generate_device", "prefill_device"}


_OPERATORS = _DEVICES | {"generate_op", "prefill_op"}


class Replacement(NamedTuple):
    """A class a rule may put in a module's place: which modules it can stand for, and its keywords."""

    stands_for: tuple[str, ...]
    keywords: set[str]


REPLACEMENTS = {
    "default": Replacement(tuple(CLASSES), _DEVICES),
    "YarnRotaryEmbeddingV3": Replacement(("DeepseekV3RotaryEmbedding",), _DEVICES),
    "RotaryEmbeddingV3": Replacement(("DeepseekV3RotaryEmbedding",), _DEVICES),
    "RotaryEmbeddingV4": Replacement(("DeepseekV3RotaryEmbedding",), _DEVICES),
    "KTransformersLinear": Replacement(("Linear",), _OPERATORS),
    "KDeepseekV3MoE": Replacement(("DeepseekV3MoE",), _DEVICES),
    "KDeepseekV3MoEV2": Replacement(("DeepseekV3MoE",), _DEVICES),
    "KMoEGate": Replacement(("MoEGate",), _DEVICES),
    "KMoEGateDeepSeekV3": Replacement(("MoEGate",), _DEVICES),
    "KTransformersExperts": Replacement(("ModuleList",), _OPERATORS | {"out_device", "backend"}),
    "KTransformersExpertsV2": Replacement(("ModuleList",), _OPERATORS | {"out_device", "backend"}),
    "KDeepseekV2Attention": Replacement(
        ("DeepseekV3Attention",), _DEVICES | {"absorb_for_prefill", "chunck_size"}
    ),
    "flashinfer_attn": Replacement(
        ("DeepseekV3Attention",), _DEVICES | {"absorb_for_prefill", "chunck_size"}
    ),
    "KDeepseekV2Model": Replacement(
        ("DeepseekV3Model",), _DEVICES | {"per_layer_prefill_intput_threshold", "transfer_map"}
    ),
    "RMSNorm": Replacement(("DeepseekV3RMSNorm",), _DEVICES),
    "kDeepseekV3MLP": Replacement(("DeepseekV3MLP",), _DEVICES),
}


# What an operator means here. The weights' own format is kept where one only names a kernel of
# KTransformers'.
LINEAR_OPS = {
    "KLinearFP8": "kept",
    "KLinearTorch": "bf16",
    "KLinearMarlin": "kept",
    "VLinearMarlin": "kept",
    "KLinearQ8": "kept",
    "KLinearCPUInfer": "kept",
}


EXPERT_OPS = {"KExpertsCPU": "kept"}


# Keywords of KTransformers' that would change what is computed, and why they do not here.
NOT_DONE = {
    "n_deferred_experts": "no expert's result is put off to a later layer",
    "num_bits": "weights keep the format they are stored in",
}


PREFILL_OPS = {*LINEAR_OPS, *EXPERT_OPS, "KExpertsTorch", "KExpertsMarlin"}


@dataclass(frozen=True)
class Rule:
    """One entry of a file. At least one of `name` and `class_` is there."""

    line: int
    name: str | None
    class_: str | None
    replace: str
    keywords: Mapping[str, Any]
    recursive: bool = True

    @property
    def device(self) -> str | None:
        """Where it puts a module; None where it does not say."""
        found = self.keywords.get("generate_device")
        return "cuda:0" if found == "cuda" else found


def experts_on_cpu(module: str) -> str:
    """The placement without rules: routed experts and the embedding table on the CPU, all else on the first
    GPU.
    """
    return "cpu" if module == "model.embed_tokens" or ".mlp.experts" in module else "cuda:0"


class Place(NamedTuple):
    """What becomes of a module."""

    device: str  # "cpu" or "cuda:N"
    operator: str = ""  # "bf16": a linear whose weights are dequantized
    rule: int | None = None  # its number in the file, None where none matched


@dataclass(frozen=True)
class Placement:
    """The rules applied to a model's modules. Calling it gives the device of a module, or of a weight's
    module, by name.
    """

    where: str
    rules: Sequence[Rule]
    places: Mapping[str, Place]
    notes: Sequence[str] = field(default=())

    def __call__(self, module: str) -> str:
        return self.find(module).device

    def find(self, module: str) -> Place:
        """The module's place, or that of the nearest module above it."""
        while module not in self.places:
            module = module.rpartition(".")[0]
        return self.places[module]

    @property
    def devices(self) -> list[str]:
        """All devices in use, the CPU first."""
        return sorted({p.device for p in self.places.values()}, key=lambda d: (d != "cpu", len(d), d))


def modules(c: DeepSeekConfig) -> dict[str, str]:
    """Every module of the model in the order of a walk: {name: class}. Routed experts are one module."""
    found = {
        "": "DeepseekV3ForCausalLM",
        "model": "DeepseekV3Model",
        "model.embed_tokens": "Embedding",
        "model.layers": "ModuleList",
    }
    mlp = {".gate_proj": "Linear", ".up_proj": "Linear", ".down_proj": "Linear"}
    query = ["q_proj"] if c.q_lora_rank is None else ["q_a_proj", "q_a_layernorm", "q_b_proj"]
    for i in range(c.num_hidden_layers):
        layer: dict[str, str] = {"": "DeepseekV3DecoderLayer", ".self_attn": "DeepseekV3Attention"}
        for name in (*query, "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj"):
            layer[f".self_attn.{name}"] = "DeepseekV3RMSNorm" if name.endswith("norm") else "Linear"
        layer[".self_attn.rotary_emb"] = (
            "DeepseekV3YarnRotaryEmbedding" if c.rope_scaling else "DeepseekV3RotaryEmbedding"
        )
        if c.is_dense(i):
            layer |= {".mlp": "DeepseekV3MLP"} | {f".mlp{k}": v for k, v in mlp.items()}
        else:
            layer |= {".mlp": "DeepseekV3MoE", ".mlp.experts": "ModuleList", ".mlp.gate": "MoEGate"}
            if c.n_shared_experts:
                layer |= {".mlp.shared_experts": "DeepseekV3MLP"} | {
                    f".mlp.shared_experts{k}": v for k, v in mlp.items()
                }
        layer |= {".input_layernorm": "DeepseekV3RMSNorm", ".post_attention_layernorm": "DeepseekV3RMSNorm"}
        found |= {f"model.layers.{i}{k}": v for k, v in layer.items()}
    return found | {"model.norm": "DeepseekV3RMSNorm", "lm_head": "Linear"}


def read(path: Path | str) -> list[Rule]:
    """The rules of a file, checked one by one.

    InputFormatError E7001 for what is no YAML or exceeds the limits, E7002 for a malformed rule, E7003 for an
    invalid pattern; UnsupportedError E7004 for unknown classes, E7006 for devices, E7007 for operators, E7008
    for layer-wise prefill.
    """
    import yaml  # only files of rules need it

    if regular_size(Path(path)) > LIMIT:
        raise refusal("E7001 large", path, found=regular_size(Path(path)), expected=f"at most {LIMIT} bytes")
    text = Path(path).read_bytes()
    try:
        _limit(yaml.parse(text, yaml.SafeLoader), path)
        loader = yaml.SafeLoader(text)
        try:
            root = loader.get_single_node()
            entries = [] if root is None else root.value
            if root is not None and not isinstance(root, yaml.SequenceNode):
                raise _malformed(path, 1, "the file is no list of rules", found=root.tag.rpartition(":")[2])
            return [_rule(path, node.start_mark.line + 1, _construct(loader, node)) for node in entries]
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        found = printable(str(getattr(error, "problem", None) or error), 120)
        raise refusal("E7001", path, found=found + (f" in line {mark.line + 1}" if mark else "")) from None


def _construct(loader: Any, node: Any) -> Any:
    """A rule's plain values. A tag that does not fit its text (`!!bool x`) makes PyYAML fail in many ways;
    all become ValueError.
    """
    import yaml  # only files of rules need it

    try:
        return loader.construct_object(node, deep=True)
    except yaml.YAMLError:
        raise
    except Exception as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None


def _limit(events: Any, path: Path | str) -> None:
    """Refuse nesting and aliases beyond what a rule needs, before anything is built."""
    import yaml  # only files of rules need it

    depth = aliases = 0
    for event in events:
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        aliases += isinstance(event, yaml.AliasEvent)
        if depth > DEPTH or aliases > ALIASES:
            found = f"nesting of {depth}" if depth > DEPTH else f"{aliases} aliases"
            raise refusal(
                "E7001 deep", path, found=found, expected=f"at most {DEPTH} levels and {ALIASES} aliases"
            )


def _malformed(path: Path | str, line: int, what: str, **sides: Any) -> RefimplError:
    return refusal("E7002", f"{path} line {line}", what=what, **sides)


def _rule(path: Path | str, line: int, raw: Any) -> Rule:
    if (
        not isinstance(raw, dict)
        or not isinstance(raw.get("match"), dict)
        or not isinstance(raw.get("replace"), dict)
    ):
        raise _malformed(
            path,
            line,
            "a rule needs `match` and `replace`",
            found=", ".join(map(str, raw)) if isinstance(raw, dict) else raw,
        )
    match, replace = raw["match"], raw["replace"]
    keywords = replace.get("kwargs") or {}
    name, class_ = match.get("name"), match.get("class")
    if (name is None and class_ is None) or not all(isinstance(v, str | None) for v in (name, class_)):
        raise _malformed(
            path, line, "`match` needs a name or a class, in text", found=printable(str(match), 60)
        )
    if not isinstance(keywords, dict) or not isinstance(raw.get("recursive", True), bool):
        raise _malformed(path, line, "`kwargs` must be a mapping and `recursive` true or false")
    if unknown := [
        k
        for k, known in (
            (raw, {"match", "replace", "recursive"}),
            (match, {"name", "class"}),
            (replace, {"class", "kwargs"}),
        )
        for k in k
        if k not in known
    ]:
        raise _malformed(path, line, f"unknown key {printable(str(unknown[0]), 40)}")
    rule = Rule(
        line,
        name,
        _class(path, line, class_, CLASSES),
        _class(path, line, replace.get("class", "default"), REPLACEMENTS) or "default",
        {str(k): v for k, v in keywords.items()},
        raw.get("recursive", True),
    )
    _check(path, rule)
    return rule


def _class(path: Path | str, line: int, dotted: Any, known: Mapping[str, Any]) -> str | None:
    """The last part of a class's dotted name, which must be in the table."""
    if dotted is None:
        return None
    root, _, last = str(dotted).rpartition(".")
    if last not in known or root.partition(".")[0] not in ("", "torch", "transformers", "ktransformers"):
        expected = ", ".join(known)
        raise refusal("E7004", f"{path} line {line}", found=printable(str(dotted), 80), expected=expected)
    return last


def _check(path: Path | str, rule: Rule) -> None:
    """Devices, operators and switches of a rule."""
    where, words = f"{path} line {rule.line}", rule.keywords
    if rule.name is not None and len(rule.name) > PATTERN:
        raise refusal(
            "E7003 long", where, found=f"{len(rule.name)} characters", expected=f"at most {PATTERN}"
        )
    transfers = words.get("transfer_map") or {}
    if not isinstance(transfers, dict):
        raise _malformed(path, rule.line, "transfer_map must be a mapping from layers to devices")
    for key, device in [
        *((k, words[k]) for k in ("generate_device", "prefill_device", "out_device") if k in words),
        *transfers.items(),
    ]:
        if not re.fullmatch(r"cpu|cuda(:\d{1,2})?", str(device)):
            found = printable(f"{key}: {device}", 60)
            raise refusal("E7006", where, found=found, expected="cpu, cuda or cuda:N")
    generate = LINEAR_OPS if rule.replace == "KTransformersLinear" else EXPERT_OPS
    for key, known in (("generate_op", generate), ("prefill_op", PREFILL_OPS)):
        if key in words and str(words[key]) not in known:
            hint = "routed experts run on the CPU" if generate is EXPERT_OPS else ""
            found, expected = printable(f"{key}: {words[key]}", 60), ", ".join(sorted(known))
            raise refusal("E7007", where, found=found, expected=expected, hint=hint)
    if words.get("per_layer_prefill_intput_threshold", 0) != 0:
        raise refusal("E7008", where, expected="per_layer_prefill_intput_threshold: 0")


def load(path: Path | str, config: DeepSeekConfig, notes: bool = False) -> Placement:
    """Read a file and apply it; with `notes` what looks unintended goes to stderr. Raises as `read` and
    `apply`.
    """
    placement = apply(read(path), config, path)
    for note in placement.notes if notes else ():
        print(f"refimpl: note: {path} {note}", file=sys.stderr)
    return placement


def apply(rules: Sequence[Rule], config: DeepSeekConfig, where: Path | str = "rules") -> Placement:
    """Every module's place.

    InputFormatError E7003 for an invalid pattern, E7009 for one that takes too long; UnsupportedError E7005
    for a class on a module it cannot stand for, E7011 for a module apart from its layer, E7012 for routed
    experts on a GPU.
    """
    found = modules(config)
    matching = search([r.name for r in rules], list(found), [f"{where} line {r.line}" for r in rules])
    classes = [{k for k, besides in CLASSES.items() if r.class_ in (None, k, *besides)} for r in rules]
    places: dict[str, Place] = {}
    closed: list[str] = []  # modules below which nothing is visited
    for name, class_ in found.items():
        if any(name.startswith(c + ".") for c in closed):
            continue
        number = next((i for i in range(len(rules)) if name in matching[i] and class_ in classes[i]), None)
        places[name] = _place(name, class_, number, rules, where)
        if number is not None and not rules[number].recursive:
            closed.append(name)
    placement = Placement(str(where), rules, places, _notes(rules, places))
    _check_layers(placement, found)
    return placement


def _place(name: str, class_: str, number: int | None, rules: Sequence[Rule], where: Path | str) -> Place:
    if number is None:
        return Place("cuda:0")
    rule = rules[number]
    fits = REPLACEMENTS[rule.replace].stands_for
    is_experts = rule.replace.startswith("KTransformersExperts")
    if not {class_, *CLASSES[class_]} & set(fits) or (is_experts and not name.endswith(".mlp.experts")):
        found, expected = f"{name or 'the model'}, a {class_}", " or ".join(fits)
        raise refusal(
            "E7005", f"{where} line {rule.line}", replace=rule.replace, found=found, expected=expected
        )
    operator = LINEAR_OPS.get(rule.keywords.get("generate_op", ""), "")
    return Place(rule.device or "cuda:0", "bf16" if operator == "bf16" else "", number)


def search(patterns: Sequence[str | None], names: Sequence[str], where: Sequence[str]) -> list[set[str]]:
    """The names in which each pattern is found (all, for None). It is done in a child process that can be
    stopped: Python's `re` cannot.

    The package `regex` has a timeout for that, which was tried and does not bound what it must. Its compiler
    has none: a{4294967294} takes 15 s, (?:(?:(?:(?:.*){100}){100}){100}){100}! takes 40 s, and both all of
    4 GB; and a search of (.{0,65535}){65535}x with a timeout of 1 s ended after 4.7 s and 4 GB.

    InputFormatError E7003 for an invalid pattern, E7009 when it takes longer than SECONDS.
    """
    asked = [p for p in patterns if p is not None]
    lines = [where[i] for i, p in enumerate(patterns) if p is not None]
    command = [sys.executable, "-I", "-S", "-c", _SEARCH]
    try:
        done = subprocess.run(
            command,
            input=json.dumps([asked, names]),
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=True,
        ).stdout
    except subprocess.TimeoutExpired as stopped:
        answered = (stopped.stdout or b"").decode().count("\n")
        raise refusal("E7009", lines[answered], found=f"over {SECONDS:g} s") from None
    results = [json.loads(line) for line in done.splitlines()]
    for line, result in zip(lines, results):
        if isinstance(result, str):
            raise refusal("E7003 expression", line, found=result)
    found = iter(results)
    return [set(names) if p is None else {names[i] for i in next(found)} for p in patterns]


_SEARCH = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for p in patterns:
    try:
        r = re.compile(p)
        found = [i for i, name in enumerate(names) if r.search(name)]
    except Exception as error:
        found = str(error)[:100] or type(error).__name__
    print(json.dumps(found), flush=True)
"""


def _notes(rules: Sequence[Rule], places: Mapping[str, Place]) -> list[str]:
    """What is not wrong and yet not what its author meant."""
    used = {p.rule for p in places.values()}
    notes = [
        f"line {r.line}: this rule is never the first to match a module"
        for i, r in enumerate(rules)
        if i not in used
    ]
    for r in rules:
        unknown = [k for k in r.keywords if k not in REPLACEMENTS[r.replace].keywords]
        notes += [f"line {r.line}: {_no_keyword(r.replace, k)}" for k in unknown]
        generate, prefill = (r.keywords.get(k) for k in ("generate_device", "prefill_device"))
        if prefill not in (None, generate) and not r.replace.startswith("KTransformersExperts"):
            notes.append(f"line {r.line}: prefill_device has no effect: there is no layer-wise prefill")
        for layer, device in (r.keywords.get("transfer_map") or {}).items():
            name = f"model.layers.{layer}"
            if name in places and places[name + ".self_attn"].device != (
                "cuda:0" if device == "cuda" else device
            ):
                notes.append(
                    f"line {r.line}: transfer_map sends layer {layer} to {device}, and its rules to "
                    f"{places[name + '.self_attn'].device}"
                )
    return sorted(notes, key=lambda n: int(n.split()[1].rstrip(":")))


def _no_keyword(replace: str, keyword: str) -> str:
    if keyword in NOT_DONE:
        return f"{keyword} has no effect: {NOT_DONE[keyword]}"
    return f"{replace} has no keyword {printable(keyword, 40)}"


def _check_layers(placement: Placement, found: Mapping[str, str]) -> None:
    """Activations of a layer are on one device. There, single linears and the routed experts may be on the
    CPU; nothing else may be elsewhere.
    """
    for name, class_ in found.items():
        place = placement.find(name)
        where = (
            placement.where
            if place.rule is None
            else f"{placement.where} line {placement.rules[place.rule].line}"
        )
        if name.endswith(".mlp.experts") and place.device != "cpu":
            raise refusal("E7012", where, name=name, found=place.device, expected="cpu")
        parts = name.split(".")
        if len(parts) < 4 or name.endswith(".mlp.experts") or class_.endswith(("MoE", "MLP")):
            continue
        home = placement(".".join([*parts[:3], "self_attn"]))
        may_leave = class_ == "Linear" and not name.endswith("kv_b_proj") and home != "cpu"
        if place.device != home and not (may_leave and place.device == "cpu"):
            raise refusal("E7011", where, name=name, found=place.device, expected=home)
