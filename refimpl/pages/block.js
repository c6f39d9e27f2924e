// The page of a block whose bits can be flipped; numbers.js computes, files.js reads.
"use strict";

function start(given) {
  const at = (id) => document.getElementById(id);
  const state = { given: decode(given.data), first: given.first, shown: 0, name: given.tensor || "", blocks: 1, file: null, chosen: 37 };
  let layout = LAYOUTS[given.format], bytes, original, weights;

  function decode(base64) { return Uint8Array.from(atob(base64), (c) => c.charCodeAt(0)); }

  function element(kind, properties = {}, ...inner) {
    const made = Object.assign(document.createElement(kind), properties);
    made.append(...inner);
    return made;
  }

  // Text with `code` and [words](#place) as elements.
  function prose(text) {
    return text.split(/(`[^`]+`|\[[^\]]+\]\(#[\w-]+\))/).map((piece) => {
      const link = piece.match(/^\[(.+)\]\((#.+)\)$/);
      if (link) return element("a", { href: link[2], textContent: link[1] });
      return piece.length > 2 && piece.startsWith("`") ? element("code", { textContent: piece.slice(1, -1) }) : piece;
    });
  }

  // One stop for Tab in a set of many buttons, arrows within it.
  function roving(box, buttons, columns) {
    buttons.forEach((button, k) => {
      button.tabIndex = k ? -1 : 0;
      button.onfocus = () => { for (const other of buttons) other.tabIndex = other === button ? 0 : -1; };
    });
    box.onkeydown = (event) => {
      const here = buttons.indexOf(document.activeElement);
      const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns(), ArrowUp: -columns(),
        Home: -here, End: buttons.length - 1 - here }[event.key];
      if (here < 0 || step === undefined) return;
      event.preventDefault();
      const next = Math.max(0, Math.min(buttons.length - 1, here + step));
      buttons[next].focus();
    };
  }

  let bitButtons = [], weightButtons = [];

  function lay(next) {
    layout = next;
    at("formula").textContent = `w = ${layout.formula}`;
    at("weight").max = layout.weights - 1;
    at("range").textContent = `of 0 to ${layout.weights - 1}`;
    const names = layout.used || Object.keys(layout.parts), words = WORDS[layout.name] || {};
    at("legend").replaceChildren(...names.map((name) => element("li", {},
      element("code", { className: `key c${Object.keys(layout.parts).indexOf(name)}`, textContent: name }), ` ${legend(name)}`)));
    at("tables").replaceChildren(...Object.entries(layout.tables).map(([name, values]) => element("li", {},
      element("code", { textContent: name }), ` is a table of the format: ${values.length} numbers, counted from 0` +
      (values.length > 16 ? "." : `. They are ${values.map(show).join(", ")}.`))));
    at("quirks").hidden = !words.quirks;
    at("h-quirks").textContent = `What is odd about ${layout.name}`;
    at("odd").replaceChildren(...(words.quirks || []).map((text) => element("li", {}, ...prose(text))));
    bitButtons = [];
    at("bits").replaceChildren(...layout.fields.map(fieldBox));
    const order = [...bitButtons.keys()].sort((a, b) => (a >> 3) - (b >> 3) || b - a).map((k) => bitButtons[k]);
    roving(at("bits"), order, () => 8 * columnsOf(document.querySelector(".bytes")));
    weightButtons = Array.from({ length: layout.weights }, (_, n) =>
      element("button", { type: "button", onclick: () => choose(n) }, element("small", { textContent: n }), element("span")));
    at("weights").replaceChildren(...weightButtons);
    roving(at("weights"), weightButtons, () => columnsOf(at("weights")));
  }

  // "scale: 8 numbers of 6 bits, one for each group of 32 weights"
  function legend(name) {
    const { shape, means, float } = layout.parts[name], count = shape.reduce((a, b) => a * b, 1);
    const bits = float ? 1 + float.exponent + float.mantissa : placesOf(layout, name, 0).length;
    const whose = count === layout.weights ? "one for each weight"
      : count > 1 ? `one for each group of ${layout.weights / count} weights` : "for the whole block";
    return `${means ? `${means}: ` : ""}${count} number${count > 1 ? "s" : ""} of ${bits} bit${bits > 1 ? "s" : ""}, ${whose}`;
  }

  function columnsOf(grid) { return getComputedStyle(grid).gridTemplateColumns.split(" ").length; }

  function fieldBox(field) {
    const rows = [];
    for (let byte = field.offset; byte < field.offset + field.nbytes; byte++) {
      const row = element("div", { className: "byte" }, element("span"));
      for (let bit = 7; bit >= 0; bit--) {
        const place = 8 * byte + bit;
        bitButtons[place] = element("button", { type: "button", className: `bit c${layout.bits[place][0]}`, onclick: () => flip(place) });
        row.append(bitButtons[place]);
      }
      rows.push(row);
    }
    const end = field.offset + field.nbytes - 1;
    const where = field.nbytes > 1 ? `bytes ${field.offset} to ${end}` : `byte ${field.offset}`;
    const meaning = ((WORDS[layout.name] || {}).fields || {})[field.name], box = element("div", { className: "field" });
    box.append(element("h3", {}, element("code", { textContent: field.name }), ` ${field.kind}, ${where}`));
    if (meaning) box.append(element("p", {}, ...prose(meaning)));
    const grid = element("div", { className: "bytes" }, ...rows);
    grid.setAttribute("role", "group");
    grid.setAttribute("aria-label", `Bits of ${field.name}`);
    box.append(grid);
    return box;
  }

  function put(block) {
    bytes = Uint8Array.from(block);
    original = Uint8Array.from(block);
    weights = weightsOf(layout, bytes);
    paint(new Set());
  }

  function paint(changed) {
    weights = weightsOf(layout, bytes);
    const made = new Set(bitsBehind(layout, state.chosen)), names = Object.keys(layout.parts);
    bitButtons.forEach((button, place) => {
      const [part, index, bit] = layout.bits[place], value = bitOf(bytes, place), makes = made.has(place);
      button.textContent = value;
      button.classList.toggle("makes", makes);
      button.setAttribute("aria-label", `byte ${place >> 3} bit ${place & 7}: ${value}, bit ${bit} of ` +
        `${label(layout, names[part], index)}${makes ? `, makes weight ${state.chosen}` : ""}`);
      button.title = `bit ${bit} of ${label(layout, names[part], index)}`;
    });
    for (const row of document.querySelectorAll(".byte")) {
      const byte = bitButtons.indexOf(row.lastChild) >> 3;
      row.firstChild.textContent = `${byte}: ${bytes[byte].toString(16).padStart(2, "0")}`;
    }
    weightButtons.forEach((button, n) => {
      button.lastChild.textContent = Number.isFinite(weights[n]) ? String(Number(weights[n].toPrecision(4))) : String(weights[n]);
      button.setAttribute("aria-pressed", n === state.chosen);
      button.setAttribute("aria-label", `weight ${n}: ${show(weights[n])}${changed.has(n) ? ", changed" : ""}`);
      button.classList.toggle("changed", changed.has(n));
    });
    explain();
  }

  function explain() {
    const p = numbersOf(layout, bytes), n = state.chosen;
    at("weight").value = n;
    at("h-made").textContent = `What makes weight ${n}`;
    at("place").textContent = placeOf(layout, n);
    at("made").tBodies[0].replaceChildren(...numbersBehind(layout, n).map(([part, index]) => numberRow(p, part, index)),
      ...lookups(p).map(([name, index]) => row([[`${name}[${index}]`, "looked up in the table"], ["", ""], show(layout.tables[name][index])])));
    at("sum").textContent = `weight ${n} = ${filled(p)} = ${show(weights[n])}`;
  }

  // A row of pairs, the second of which is written small, and of texts.
  function row(cells) {
    return element("tr", {}, ...cells.map((cell, k) => {
      const [text, small] = [cell].flat(), made = element(k ? "td" : "th", {}, text);
      if (!k) made.scope = "row";
      if (small) made.append(element("small", { textContent: small }));
      return made;
    }));
  }

  function numberRow(p, part, index) {
    const { means, float } = layout.parts[part], places = placesOf(layout, part, index);
    const pattern = places.map((place) => bitOf(bytes, place)).join("");
    const whose = sharedBy(layout, part, index), made = madeOf(layout, bytes, part, index);
    return row([[label(layout, part, index), means ? `${means}; ${whose}` : whose],
      [float ? splitFloat(float, pattern).join(" ").trim() : pattern, spell(places)], made]);
  }

  // [[table, index], ...] that the formula reads for the chosen weight.
  function lookups(p) {
    if (layout.float) return [];
    return [...placed(p).matchAll(/([A-Z]\w*)\[(\d+)\]/g)].map(([, name, index]) => [name, Number(index)]);
  }

  // The formula with the numbers of the chosen weight in it, tables still to be read.
  function placed(p) {
    const n = state.chosen, j = Math.floor(n / layout.width);
    return layout.formula.replace(/([a-z]\w*)(?:\[(j, i|j|i)\])?/g, (all, name, index) =>
      name in p ? bracketed(p[name][!index ? 0 : index === "j" ? j : n]) : all);
  }

  function bracketed(value) { return value < 0 ? `(${show(value)})` : show(value); }

  function filled(p) {
    const n = state.chosen;
    if (layout.float) return floatSum(layout.float, p.S[n], p.E[n], p.M[n], layout.used.includes("S"));
    return placed(p).replace(/([A-Z]\w*)\[(\d+)\]/g, (all, name, index) => bracketed(layout.tables[name][index]));
  }

  function choose(n) {
    if (!(Number.isInteger(n) && n >= 0 && n < layout.weights)) {
      at("told").textContent = `There is no weight ${n}: this block has weights 0 to ${layout.weights - 1}.`;
      at("weight").value = state.chosen;
      return;
    }
    state.chosen = n;
    paint(new Set());
    at("told").textContent = `Weight ${n} is ${show(weights[n])}. It is made of ${bitsBehind(layout, n).length} bits: ` +
      numbersBehind(layout, n).map(([part, index]) => `${label(layout, part, index)}, ${spell(placesOf(layout, part, index))}`).join("; ") + ".";
  }

  function flip(place) {
    const before = weights, [part, index] = layout.bits[place], name = Object.keys(layout.parts)[part];
    const valueOf = () => show(numbersOf(layout, bytes)[name][index]), old = valueOf(), was = bitOf(bytes, place);
    bytes[place >> 3] ^= 1 << (place & 7);
    const after = weightsOf(layout, bytes), changed = new Set();
    after.forEach((value, n) => { if (!Object.is(value, before[n])) changed.add(n); });
    paint(changed);
    const some = [...changed].slice(0, 3).map((n) => `weight ${n} from ${show(before[n])} to ${show(after[n])}`).join(", ");
    const apart = original.reduce((count, byte, k) => count + bitsSet(byte ^ bytes[k]), 0);
    at("told").textContent = `You flipped bit ${place & 7} of byte ${place >> 3} from ${was} to ${1 - was}. ` +
      `${label(layout, name, index)} was ${old} and is ${valueOf()} now. ` +
      (changed.size ? `This flip changed ${changed.size} of ${layout.weights} weights: ${some}${changed.size > 3 ? " and so on" : ""}.`
        : "This flip changed no weight.") +
      ` ${apart ? `${apart} bit${apart > 1 ? "s differ" : " differs"} from the stored block.` : "The block is as it was stored."}`;
  }

  function bitsSet(byte) { return byte.toString(2).replaceAll("0", "").length; }

  // --- which block

  function padded(block) {
    const whole = new Uint8Array(layout.bytes);
    whole.set(block);
    return whole;
  }

  async function load(n) {
    const size = layout.bytes, from = (n - state.first) * size, last = state.first + state.blocks - 1;
    if (!(Number.isInteger(n) && n >= state.first && n <= last)) {
      at("told").textContent = `There is no block ${n} here: they are ${state.first} to ${last}.`;
      at("block").value = state.shown;
      return;
    }
    const turn = ++turns;
    let block;
    try {
      block = state.file ? await bytesOf(state.file.blob, state.file.offset + from, Math.min(size, state.file.nbytes - from))
        : state.given.subarray(from, from + size);
    } catch (error) {
      at("file-told").textContent = `Cannot read block ${n}: ${error.message}.`;
      return;
    }
    if (turn !== turns) return;  // another block was asked for meanwhile
    state.shown = n;
    put(padded(block));
    const short = block.length < size ? ` Its last ${size - block.length} bytes are not there and shown as zeros.` : "";
    const place = state.file ? `${state.name} in the file ${state.file.blob.name}` : state.name;
    const weights = `${layout.weights * n} to ${layout.weights * (n + 1) - 1}`;
    at("told").textContent = `You see block ${n}${place ? ` of the tensor ${place}: its weights ${weights}` : ""}. Nothing is flipped yet.${short}`;
  }

  function offer(length) {
    state.blocks = Math.ceil(length / layout.bytes);
    at("which").hidden = state.first + state.blocks < 2;
    Object.assign(at("block"), { min: state.first, max: state.first + state.blocks - 1, value: state.first });
    at("count").textContent = `of ${state.first} to ${state.first + state.blocks - 1}`;
    state.chosen = Math.min(state.chosen, layout.weights - 1);
  }

  let tensors = new Map(), opened = null, turns = 0, files = 0;
  const LISTED = 1000;

  async function open(file) {
    const turn = ++files;
    at("file-told").textContent = `Reading ${file.name} ...`;
    let found;
    try {
      found = await tensorsOf(file);
    } catch (error) {
      if (turn !== files) return;  // another file was given meanwhile
      at("list").hidden = true;
      at("file-told").textContent = `${file.name}: ${error.message}.`;
      return;
    }
    if (turn !== files) return;
    [tensors, opened] = [found, file];
    at("list").hidden = false;
    at("filter").value = "";
    list();
    at("file-told").textContent = `${file.name}: ${tensors.size} tensor${tensors.size === 1 ? "" : "s"}. Choose one.`;
  }

  function list() {
    const wanted = at("filter").value, names = [...tensors.keys()].filter((name) => name.includes(wanted));
    const told = names.length > LISTED ? `the first ${LISTED} of ${names.length} tensors` : `${names.length} tensor${names.length === 1 ? "" : "s"}`;
    at("tensor").replaceChildren(element("option", { value: "", textContent: told }), ...names.slice(0, LISTED).map((name) => {
      const one = tensors.get(name);
      return element("option", { value: name, textContent: `${name}  ${one.type} [${one.shape.join(", ")}]` });
    }));
  }

  async function pick(name) {
    const one = tensors.get(name), drawn = one && Object.hasOwn(LAYOUTS, one.type);
    if (!one) return;
    const why = !drawn ? `is ${one.type}, which this page does not draw` : !one.nbytes ? `is ${one.type} and has no block`
      : one.offset + one.nbytes > opened.size ? `is ${one.type}; the file ends before the tensor does` : "";
    if (why) {
      at("file-told").textContent = `${name} ${why}.`;
      return;
    }
    Object.assign(state, { file: { blob: opened, ...one }, first: 0, name });
    lay(LAYOUTS[one.type]);
    offer(one.nbytes);
    document.querySelector("h1").textContent = `${name}: ${one.type}`;
    for (const told of document.querySelectorAll("#lead > p")) told.hidden = true;  // of the block before
    at("file-told").textContent = `${name}: ${one.type}, ${one.shape.length ? `shape ${one.shape.join(" x ")}` : "one number"}, ${state.blocks} block${state.blocks > 1 ? "s" : ""}.`;
    await load(0);
  }

  at("weight").onchange = (event) => choose(Number(event.target.value));
  at("block").onchange = (event) => load(Number(event.target.value));
  at("random").onclick = () => {
    bytes = crypto.getRandomValues(new Uint8Array(layout.bytes));
    paint(new Set());
    at("told").textContent = "All bits are random now.";
  };
  at("reset").onclick = () => {
    bytes = Uint8Array.from(original);
    paint(new Set());
    at("told").textContent = "The block is as it was.";
  };
  at("file").onchange = (event) => event.target.files[0] && open(event.target.files[0]);
  at("filter").oninput = list;
  at("tensor").onchange = (event) => pick(event.target.value);
  if (given.note) at("note").replaceChildren(...prose(given.note));
  for (const kind of ["dragover", "dragleave", "drop"]) {
    document.addEventListener(kind, (event) => {
      event.preventDefault();
      at("drop").classList.toggle("over", kind === "dragover");
      if (kind !== "drop") return;
      if (event.dataTransfer.files[0]) open(event.dataTransfer.files[0]);
      else at("file-told").textContent = "What was dropped is no file.";
    });
  }
  lay(layout);
  offer(state.given.length);
  load(state.first);
}
