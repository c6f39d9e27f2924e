// A pass that is walked step by step; `walk(given)` takes what walk.data made.
"use strict";

function walk(given) {
  const at = (id) => document.getElementById(id), steps = given.steps;
  const state = { step: 0, token: given.tokens.length - 1, head: 0 };

  function element(kind, properties = {}, ...inner) {
    const made = Object.assign(document.createElement(kind), properties);
    made.append(...inner);
    return made;
  }

  function row(cells, head = 1) {
    return element("tr", {}, ...cells.map((cell, k) => {
      const made = element(k < head ? "th" : "td");
      if (k < head) made.scope = "row";
      made.append(cell);
      return made;
    }));
  }

  function columns(cells) {
    return element("tr", {}, ...cells.map((text) => Object.assign(element("th", { textContent: text }), { scope: "col" })));
  }

  function bytes(n) {
    for (const [unit, size] of [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]]) if (n >= size) return `${(n / size).toFixed(1)} ${unit}`;
    return `${n} bytes`;
  }

  const spelled = (text) => text.replace(/ /g, "␣").replace(/\n/g, "⏎") || "∅";
  const layerOf = (step) => (step.module.match(/layers\.(\d+)/) || [0, step.module])[1];
  const first = (step) => step.position;

  function go(n) {
    state.step = Math.max(0, Math.min(steps.length - 1, n));
    show();
  }

  function goLayer(way) {
    const here = layerOf(steps[state.step]);
    let n = state.step;
    while (n + way >= 0 && n + way < steps.length && layerOf(steps[n]) === here) n += way;
    while (way < 0 && n > 0 && layerOf(steps[n - 1]) === layerOf(steps[n])) n -= 1;
    go(n);
  }

  function show() {
    const step = steps[state.step];
    at("at").value = state.step;
    at("at").setAttribute("aria-valuetext", `${state.step + 1} of ${steps.length}: ${step.module} ${step.label}`);
    at("all").value = state.step;
    at("back").disabled = state.step === 0;
    at("on").disabled = state.step === steps.length - 1;
    at("h-step").textContent = `${state.step + 1} of ${steps.length}: ${step.module} ${step.label}`;
    at("what").textContent = given.operations[step.name];
    at("bytes").textContent = `It reads ${bytes(step.weight_bytes)} of weights and touches ${bytes(step.activation_bytes)} of ` +
      `activations, on ${step.backend}${step.position ? `, for the tokens from ${step.position} on` : ""}.`;
    at("shapes").tBodies[0].replaceChildren(...step.tensors.map(([name, dtype, shape, weight]) =>
      row([name, dtype, shape.join(" × "), weight ? "weight" : name.startsWith("out") ? "result" : "argument"])));
    tokens(step);
    attention(step);
    experts(step);
    numbers(step);
    lens(step);
  }

  function tokens(step) {
    const count = (step.first || (step.attention && step.attention[0]) || (step.experts && step.experts[1]) || given.tokens).length;
    at("tokens").replaceChildren("Tokens: ", ...given.tokens.flatMap((text, k) => {
      const button = element("button", { type: "button", textContent: spelled(text), onclick: () => { state.token = k; show(); at("tokens").children[k].focus(); } });
      button.setAttribute("aria-pressed", k === state.token);
      button.setAttribute("aria-label", `token ${k}: ${text}`);
      button.classList.toggle("makes", k === state.token);
      button.classList.toggle("idle", k < first(step) || k >= first(step) + count);
      return [button, " "];
    }));
  }

  function attention(step) {
    at("attention").hidden = !step.attention;
    if (!step.attention) return;
    const maps = step.attention, mean = maps.length < step.heads;
    state.head = Math.min(state.head, maps.length - 1);
    at("head").replaceChildren(...maps.map((_, h) => element("option", { value: h, textContent: mean ? `mean of ${step.heads}` : h })));
    at("head").value = state.head;
    const map = maps[state.head], seen = given.tokens.slice(0, map[0].length);
    at("map").replaceChildren(columns(["token", ...seen.map(spelled)]), ...map.map((values, t) => {
      const made = row([spelled(given.tokens[first(step) + t]), ...values.map((p, s) => s > first(step) + t ? "" : String(Math.round(100 * p)))]);
      values.forEach((p, s) => { made.cells[s + 1].style.background = `color-mix(in srgb, var(--heat) ${Math.round(60 * p)}%, transparent)`; });
      made.classList.toggle("mine", first(step) + t === state.token);
      return made;
    }));
  }

  function experts(step) {
    at("experts").hidden = !step.experts;
    if (!step.experts) return;
    const [count, ids, weights] = step.experts;
    at("chosen").replaceChildren(columns(["token", `experts of ${count}, with their weights`]), ...ids.map((chosen, t) => {
      const made = row([spelled(given.tokens[first(step) + t]), chosen.map((e, k) => `${e} (${weights[t][k]})`).join(", ")]);
      made.classList.toggle("mine", first(step) + t === state.token);
      return made;
    }));
  }

  function numbers(step) {
    at("numbers").hidden = !step.first;
    if (!step.first) return;
    const told = (value) => (value === null ? "no finite number" : String(value));
    at("rows").replaceChildren(columns(["token", "root mean square", `the first ${step.first[0].length} numbers`]), ...step.first.map((values, t) => {
      const made = row([spelled(given.tokens[first(step) + t]), told(step.rms[t]), values.map(told).join("  ")]);
      made.classList.toggle("mine", first(step) + t === state.token);
      return made;
    }));
  }

  // Of the pass that holds the chosen token: a row a layer, the best answers after that token.
  function lens(step) {
    const held = given.lens.filter((one) => state.token >= one.position && state.token < one.position + one.top.length);
    const here = step.module === "model.embed_tokens" ? "the embedding" : `layer ${layerOf(step)}`;
    at("lens").replaceChildren(columns(["after", `most likely after ${spelled(given.tokens[state.token])}`]), ...held.map((one) => {
      const top = one.top[state.token - one.position];
      const made = row([one.after, top.map(([text, p]) => `${spelled(text)} ${Math.round(1000 * p) / 10} %`).join(",  ")]);
      if (one.after === here) made.setAttribute("aria-current", "step");
      made.classList.toggle("mine", one.after === here);
      return made;
    }));
  }

  at("at").max = steps.length - 1;
  at("at").oninput = (event) => go(Number(event.target.value));
  at("all").replaceChildren(...steps.map((step, n) => element("option", { value: n, textContent: `${n + 1}  ${step.module}  ${step.label}` })));
  at("all").onchange = (event) => go(Number(event.target.value));
  at("head").onchange = (event) => { state.head = Number(event.target.value); show(); };
  at("back").onclick = () => go(state.step - 1);
  at("on").onclick = () => go(state.step + 1);
  at("layer-back").onclick = () => goLayer(-1);
  at("layer-on").onclick = () => goLayer(1);
  show();
}
