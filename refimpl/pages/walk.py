"""What a page tells of a pass: every step with shapes, bytes and numbers, where each head looked, which
experts were chosen, and what each layer would answer. `Trace.to_html` writes it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import Any

import numpy as np

from refimpl import ops
from refimpl.pages import html
from refimpl.reference.attention import causal_mask, softmax
from refimpl.tensors import as_numpy

MAX_TOKENS = 128
MAX_HEADS = 16  # of a model with more, the page has their mean
SHOWN = 8  # numbers of a token's row of an output
TOP = 5  # answers of a layer


def attention_map(inputs: Any) -> np.ndarray:
    """f32 [H, T, S]: how much of each of S tokens each of T queries takes, by head; of the arguments of
    `mla_naive` or
    `mla_absorbed`. The scores are the reference's, in numpy, whatever device the operation ran on.
    """
    q_nope, q_pe, latent, k_pe, kv_b = (
        as_numpy(inputs[n]) for n in ("q_nope", "q_pe", "latent", "k_pe", "kv_b")
    )
    length = inputs.get("length")
    latent, k_pe = latent[:length], k_pe[:length]
    q_latent = np.matmul(q_nope.transpose(1, 0, 2), kv_b[:, : q_nope.shape[-1]])
    scores = q_latent @ latent.T + q_pe.transpose(1, 0, 2) @ k_pe.T
    return softmax(scores * np.float32(inputs["scale"]) + causal_mask(len(q_nope), len(latent)))


def data(steps: Iterable[Any], ids: Sequence[int], spell: Callable[[int], str]) -> dict[str, Any]:
    """Everything that the page shows of `steps` (`tracing.Step`) of a pass over the tokens `ids`, ready for
    JSON; `spell` says how a token is written. ValueError for more than MAX_TOKENS tokens.
    """
    if len(ids) > MAX_TOKENS:
        raise ValueError(f"a page holds a pass of at most {MAX_TOKENS} tokens, and these are {len(ids)}")
    told, streams, lens = [], [], []
    for step in steps:
        told.append(_step(step))
        if (layer := _read_by(step)) is not None:
            streams.append((layer, step.inputs["x"]))
            if layer == "end":
                norm = step
        if step.module == "lm_head":
            lens += [_lens(name, x, norm, step, spell) for name, x in _named(streams)]
            streams = []
    return {"tokens": [spell(i) for i in ids], "steps": told, "lens": lens, "operations": _operations(told)}


def _read_by(step: Any) -> str | None:
    """Who reads the residual stream in this step: a layer by its number, or "end"."""
    if step.name != "rms_norm":
        return None
    if step.module == "model.norm":
        return "end"
    found = re.fullmatch(r"model\.layers\.(\d+)", step.module)
    return found[1] if found and "input_layernorm" in step.weights.values() else None


def _named(streams: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """What the next layer reads is what the layer before wrote."""
    names = ["the embedding", *(f"layer {layer}" for layer, _ in streams[:-1])]
    return list(zip(names, (x for _, x in streams)))


def _lens(name: str, x: Any, norm: Any, head: Any, spell: Callable[[int], str]) -> dict[str, Any]:
    """The answer if the stream x [T, D] were the last one: through the model's own last norm and head."""
    normed = norm.call(*(x if k == "x" else v for k, v in norm.inputs.items()))
    logits = as_numpy(head.call(*(normed if k == "x" else v for k, v in head.inputs.items())))
    p = softmax(logits.astype(np.float32))
    best = np.argsort(-p, axis=-1, kind="stable")[:, :TOP]
    rows = [[[spell(int(i)), round(float(row[i]), 4)] for i in top] for row, top in zip(p, best)]
    return {"after": name, "position": norm.position, "top": rows}


def _step(step: Any) -> dict[str, Any]:
    found = {
        "module": step.module,
        "name": step.name,
        "label": step.label,
        "backend": step.backend,
        "position": step.position,
        "tensors": [[n, step.dtypes[n], list(shape), n in step.weights] for n, shape in step.shapes.items()],
        "weight_bytes": step.weight_bytes,
        "activation_bytes": step.activation_bytes,
    }
    if step.name.startswith("mla_"):
        p = attention_map(step.inputs)
        found["heads"] = len(p)
        shown = p if len(p) <= MAX_HEADS else p.mean(axis=0, keepdims=True)
        found["attention"] = np.round(shown.astype(np.float64), 4).tolist()
    if step.name == "route":
        chosen, weights = map(as_numpy, step.output)
        found["experts"] = [len(as_numpy(step.inputs["bias"])), chosen.tolist(), _rounded(weights)]
    elif not isinstance(step.output, tuple):
        rows = as_numpy(step.output)
        rows = rows.reshape(len(rows), -1).astype(np.float64)
        found["rms"] = _rounded(np.sqrt(np.mean(rows**2, axis=-1)))
        found["first"] = _rounded(rows[:, :SHOWN])
    return found


def _rounded(values: np.ndarray) -> Any:
    """Lists of numbers with five digits; None for NaN and infinities, which JSON lacks."""
    if values.ndim:
        return [_rounded(v) for v in values]
    return float(f"{float(values):.5g}") if np.isfinite(values) else None


def _operations(told: list[dict[str, Any]]) -> dict[str, str]:
    """The first sentence of the docstring of each operation's reference."""
    names = {step["name"] for step in told}
    return {name: _first_sentence(inspect.getdoc(ops.OPS[name].reference) or "") for name in sorted(names)}


def _first_sentence(text: str) -> str:
    paragraph = " ".join(text.split("\n\n")[0].replace("`", "").split())
    return re.split(r"(?<=\.)\s", paragraph, maxsplit=1)[0]


def page(found: dict[str, Any], title: str = "A token you can walk", lead: str = "") -> str:
    """The whole page of `data`, scripts and styles in it; `lead` is HTML that stands under the title."""
    body = html.asset("walk.html").replace("<!-- title -->", escape(title)).replace("<!-- lead -->", lead)
    start = f"const GIVEN = {html.embedded(found)};\nwalk(GIVEN);"
    return html.page(title, body, [html.asset("walk.js"), start], html.asset("page.css"))
