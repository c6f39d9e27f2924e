// A block whose bits can be flipped. LAYOUTS (layouts.js) is made from the format modules; nothing here knows a format.
"use strict";

// --- numbers ---------------------------------------------------------------------------------------------------------

function decodeFloat(shape, sign, exponent, mantissa) {
  const top = 2 ** shape.exponent - 1, last = 2 ** shape.mantissa - 1;
  if (exponent === top && (shape.ieee || mantissa === last)) {
    return shape.ieee && mantissa === 0 ? (sign ? -Infinity : Infinity) : NaN;
  }
  const one = 2 ** shape.mantissa;
  const size = exponent || !shape.mantissa
    ? 2 ** (exponent - shape.bias) * (1 + mantissa / one)
    : 2 ** (1 - shape.bias) * mantissa / one;
  return sign ? -size : size;
}

function bitOf(bytes, place) {
  return bytes[place >> 3] >> (place & 7) & 1;
}

// {part: array of numbers} of a block: what each set bit adds; floats are put together from their patterns.
function numbersOf(layout, bytes) {
  const names = Object.keys(layout.parts), found = {}, patterns = {};
  for (const name of names) {
    found[name] = layout.parts[name].zero.slice();
    if (layout.parts[name].float) patterns[name] = 0;
  }
  layout.bits.forEach(([part, index, bit, adds], place) => {
    if (!bitOf(bytes, place)) return;
    const name = names[part];
    if (name in patterns) patterns[name] += 2 ** bit;
    else found[name][index] += adds;
  });
  for (const name of Object.keys(patterns)) {
    const shape = layout.parts[name].float, one = 2 ** shape.mantissa, all = 2 ** shape.exponent;
    const pattern = patterns[name];
    found[name] = [decodeFloat(shape, Math.floor(pattern / one / all), Math.floor(pattern / one) % all, pattern % one)];
  }
  return found;
}

function weightsOf(layout, bytes) {
  const p = numbersOf(layout, bytes), made = new Float32Array(layout.weights);
  for (let n = 0; n < made.length; n++) {
    made[n] = layout.weight(layout, p, layout.tables, Math.fround, Math.floor(n / layout.width), n);
  }
  return made;
}

// [[part, flat index], ...] of the numbers that make weight n, in the order of the formula.
function numbersBehind(layout, n) {
  if (layout.float) return layout.used.map((part) => [part, n]);
  const found = [];
  for (const [, name, index] of layout.formula.matchAll(/([A-Za-z]\w*)(?:\[(j, i|j|i)\])?/g)) {
    if (name in layout.parts) found.push([name, !index ? 0 : index === "j" ? Math.floor(n / layout.width) : n]);
  }
  return found;
}

// Places (byte * 8 + bit) of a number's bits, highest first.
function placesOf(layout, part, index) {
  const at = Object.keys(layout.parts).indexOf(part), found = [];
  layout.bits.forEach(([p, i, bit], place) => { if (p === at && i === index) found.push([bit, place]); });
  return found.sort((a, b) => b[0] - a[0]).map((pair) => pair[1]);
}

function bitsBehind(layout, n) {
  return numbersBehind(layout, n).flatMap(([part, index]) => placesOf(layout, part, index));
}

function label(layout, part, index) {
  const shape = layout.parts[part].shape;
  if (!shape.length) return part;
  return `${part}[${shape.length === 1 ? index : `${Math.floor(index / shape[1])}, ${index % shape[1]}`}]`;
}

function spell(places) {
  const byByte = new Map();
  for (const place of places) byByte.set(place >> 3, [...(byByte.get(place >> 3) || []), place & 7]);
  return [...byByte].map(([byte, bits]) =>
    `byte ${byte} bit${bits.length > 1 ? `s ${bits[0]}..${bits[bits.length - 1]}` : ` ${bits[0]}`}`).join(", ");
}

function show(value) {
  return Number.isInteger(value) && Math.abs(value) < 1e9 ? String(Object.is(value, -0) ? "-0" : value)
    : Number.isFinite(value) ? String(Number(value.toPrecision(6))) : String(value);
}

// --- files -----------------------------------------------------------------------------------------------------------

const HEADER = 1 << 20, LARGEST = 1 << 28;

async function bytesOf(file, start, length) {
  if (start < 0 || length < 0 || start + length > file.size) throw new Error("the file ends before what its header tells");
  return new Uint8Array(await file.slice(start, start + length).arrayBuffer());
}

// {name: {type, shape, offset, nbytes}} of a GGUF or safetensors file, from its header alone.
async function tensorsOf(file) {
  const head = await bytesOf(file, 0, Math.min(8, file.size));
  if (String.fromCharCode(...head.subarray(0, 4)) === "GGUF") return ggufTensors(file);
  return safetensorsTensors(file);
}

async function safetensorsTensors(file) {
  if (file.size < 8) throw new Error("too short for a safetensors file");
  const length = Number(new DataView((await bytesOf(file, 0, 8)).buffer).getBigUint64(0, true));
  if (!(length <= LARGEST)) throw new Error("neither a GGUF nor a safetensors file");
  let told;
  try {
    told = JSON.parse(new TextDecoder().decode(await bytesOf(file, 8, length)));
  } catch (error) {
    throw new Error(`neither a GGUF nor a safetensors file: ${error.message}`);
  }
  const names = { F8_E4M3: "E4M3", F8_E5M2: "E5M2", F8_E8M0: "E8M0" }, found = new Map();
  for (const [name, one] of Object.entries(told)) {
    if (name === "__metadata__") continue;
    if (!one || !Array.isArray(one.shape) || !Array.isArray(one.data_offsets)) throw new Error(`${name} has no offsets`);
    const [start, end] = one.data_offsets;
    found.set(name, { type: names[one.dtype] || one.dtype, shape: one.shape, offset: 8 + length + start, nbytes: end - start });
  }
  for (const [name, one] of found) {  // the blobs of a hybrid folder
    const kind = one.type === "U8" && found.get(name.replace(/\.weight$/, "") + ".ggml_type");
    if (kind && kind.nbytes >= 1) one.type = typeName((await bytesOf(file, kind.offset, 1))[0]);
  }
  return found;
}

function typeName(number) {
  const found = Object.values(LAYOUTS).find((layout) => layout.type === number);
  return found ? found.name : `GGML type ${number}`;
}

async function ggufTensors(file) {
  for (let size = HEADER; ; size *= 4) {  // the header says nowhere how long it is
    const bytes = await bytesOf(file, 0, Math.min(size, file.size));
    try {
      return ggufTable(new DataView(bytes.buffer), file.size);
    } catch (error) {
      if (!(error instanceof RangeError) || size >= file.size) {
        throw new Error(error instanceof RangeError ? "the file ends within its header" : error.message);
      }
      if (size > LARGEST) throw new Error("the header is larger than this page reads");
    }
  }
}

const SCALAR_BYTES = { 0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8 };

function ggufTable(view, fileSize) {
  let at = 8;
  const u32 = () => view.getUint32((at += 4) - 4, true);
  const u64 = () => {
    const value = Number(view.getBigUint64((at += 8) - 8, true));
    if (value > Number.MAX_SAFE_INTEGER) throw new Error("a number of the header is too large");
    return value;
  };
  const text = () => {
    const length = u64();
    if (at + length > view.byteLength) throw new RangeError("text");
    return new TextDecoder().decode(new Uint8Array(view.buffer, (at += length) - length, length));
  };
  const skip = (type) => {
    if (type === 8) return text();
    if (type === 9) {
      const of = u32(), count = u64();
      if (of === 9) throw new Error("an array of arrays, which this page does not read");
      if (SCALAR_BYTES[of]) at += count * SCALAR_BYTES[of];
      else for (let k = 0; k < count; k++) skip(of);
      return null;
    }
    if (!SCALAR_BYTES[type]) throw new Error(`the header has a value of unknown type ${type}`);
    at += SCALAR_BYTES[type];
    return type === 4 ? view.getUint32(at - 4, true) : null;
  };
  const version = view.getUint32(4, true);
  if (version !== 2 && version !== 3) throw new Error(`version ${version} of GGUF, and this page reads 2 and 3`);
  const tensors = u64(), keys = u64();
  let alignment = 32;
  for (let k = 0; k < keys; k++) {
    const key = text(), value = skip(u32());
    if (key === "general.alignment" && value) alignment = value;
  }
  const found = new Map();
  for (let k = 0; k < tensors; k++) {
    const name = text(), shape = Array.from({ length: u32() }, u64).reverse(), type = typeName(u32()), offset = u64();
    const layout = LAYOUTS[type], count = shape.reduce((a, b) => a * b, 1);
    found.set(name, { type, shape, offset, nbytes: layout ? Math.ceil(count / layout.weights * layout.bytes) : 0 });
  }
  const data = Math.ceil(at / alignment) * alignment;
  if (data > fileSize) throw new RangeError("data");
  for (const one of found.values()) one.offset += data;
  return found;
}

// --- the page --------------------------------------------------------------------------------------------------------

function start(given) {
  const at = (id) => document.getElementById(id);
  const state = { given: decode(given.data), first: given.first, name: given.tensor || "", blocks: 1, file: null, chosen: 37 };
  let layout = LAYOUTS[given.format], bytes, original, weights;

  function decode(base64) { return Uint8Array.from(atob(base64), (c) => c.charCodeAt(0)); }

  function element(kind, properties = {}, ...inner) {
    const made = Object.assign(document.createElement(kind), properties);
    made.append(...inner);
    return made;
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
    const names = Object.keys(layout.parts);
    at("legend").replaceChildren("Colours: ", ...names.flatMap((name, k) => [element("span",
      { className: `key c${k}`, textContent: `${name}${layout.parts[name].shape.length ? ` [${layout.parts[name].shape.join(", ")}]` : ""}` }), " "]));
    bitButtons = [];
    at("bits").replaceChildren(...layout.fields.map(fieldBox));
    const order = [...bitButtons.keys()].sort((a, b) => (a >> 3) - (b >> 3) || b - a).map((k) => bitButtons[k]);
    roving(at("bits"), order, () => 8 * columnsOf(document.querySelector(".bytes")));
    weightButtons = Array.from({ length: layout.weights }, (_, n) =>
      element("button", { type: "button", onclick: () => choose(n) }, element("small", { textContent: n }), element("span")));
    at("weights").replaceChildren(...weightButtons);
    roving(at("weights"), weightButtons, () => columnsOf(at("weights")));
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
    const meaning = (given.fields || {})[field.name], box = element("div", { className: "field" });
    box.append(element("h3", {}, element("code", { textContent: field.name }), ` ${field.kind}, ${where}${meaning ? `: ${meaning}` : ""}`));
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
    const p = numbersOf(layout, bytes);
    at("weight").value = state.chosen;
    at("h-made").textContent = `What makes weight ${state.chosen}`;
    at("made").tBodies[0].replaceChildren(...numbersBehind(layout, state.chosen).map(([part, index]) => {
      const places = placesOf(layout, part, index), shape = layout.parts[part].float;
      const pattern = places.map((place) => bitOf(bytes, place)).join("");
      const split = shape ? [pattern.slice(0, pattern.length - shape.exponent - shape.mantissa),
        pattern.slice(pattern.length - shape.exponent - shape.mantissa, pattern.length - shape.mantissa),
        pattern.slice(pattern.length - shape.mantissa)].join(" ").trim() : pattern;
      return element("tr", {}, ...[label(layout, part, index), spell(places), split, show(p[part][index])]
        .map((text) => element("td", { textContent: text })));
    }));
    at("sum").textContent = `weight ${state.chosen} = ${filled(p)} = ${show(weights[state.chosen])}`;
  }

  // The formula with the numbers of the chosen weight in it.
  function filled(p) {
    const n = state.chosen, j = Math.floor(n / layout.width);
    const put = (value) => (value < 0 ? `(${show(value)})` : show(value));
    if (layout.float) {
      const E = p.E[n], found = decodeFloat(layout.float, 0, E, p.M[n]), { bias, mantissa } = layout.float;
      if (!Number.isFinite(found)) return "a code that is no finite number";
      const size = E || !mantissa ? `2 ** (${E} - ${bias})${mantissa ? ` * (1 + ${p.M[n]} / ${2 ** mantissa})` : ""}`
        : `2 ** ${1 - bias} * ${p.M[n]} / ${2 ** mantissa}`;
      return (layout.used.includes("S") ? `(-1) ** ${p.S[n]} * ` : "") + size;
    }
    return layout.formula
      .replace(/([a-z]\w*)(?:\[(j, i|j|i)\])?/g, (all, name, index) =>
        name in p ? put(p[name][!index ? 0 : index === "j" ? j : n]) : all)
      .replace(/([A-Z]\w*)\[(\d+)\]/g, (all, name, index) => put(layout.tables[name][index]));
  }

  function choose(n) {
    if (!(n >= 0 && n < layout.weights)) return;
    state.chosen = n;
    paint(new Set());
    at("told").textContent = `Weight ${n} is ${show(weights[n])}. It is made of ${bitsBehind(layout, n).length} bits: ` +
      numbersBehind(layout, n).map(([part, index]) => `${label(layout, part, index)}, ${spell(placesOf(layout, part, index))}`).join("; ") + ".";
  }

  function flip(place) {
    const before = weights, names = Object.keys(layout.parts), [part, index] = layout.bits[place];
    bytes[place >> 3] ^= 1 << (place & 7);
    const after = weightsOf(layout, bytes), changed = new Set();
    after.forEach((value, n) => { if (!Object.is(value, before[n])) changed.add(n); });
    paint(changed);
    const some = [...changed].slice(0, 3).map((n) => `weight ${n} from ${show(before[n])} to ${show(after[n])}`).join(", ");
    at("told").textContent = `Byte ${place >> 3} bit ${place & 7} is ${bitOf(bytes, place)} now. ` +
      `${label(layout, names[part], index)} is ${show(numbersOf(layout, bytes)[names[part]][index])}. ` +
      (changed.size ? `${changed.size} weight${changed.size > 1 ? "s" : ""} changed: ${some}${changed.size > 3 ? ", ..." : ""}.` : "No weight changed.");
  }

  // --- which block

  function padded(block) {
    const whole = new Uint8Array(layout.bytes);
    whole.set(block);
    return whole;
  }

  async function load(n) {
    const size = layout.bytes;
    if (!(n >= state.first && n < state.first + state.blocks)) return;
    const from = (n - state.first) * size;
    let block;
    try {
      block = state.file ? await bytesOf(state.file.blob, state.file.offset + from, Math.min(size, state.file.nbytes - from))
        : state.given.subarray(from, from + size);
    } catch (error) {
      at("file-told").textContent = `Cannot read block ${n}: ${error.message}.`;
      return;
    }
    put(padded(block));
    const short = block.length < size ? `; its last ${size - block.length} bytes are not there and shown as zeros` : "";
    at("told").textContent = `Block ${n}${state.name ? ` of ${state.name}` : ""}${short}.`;
  }

  function offer(length) {
    state.blocks = Math.ceil(length / layout.bytes);
    at("which").hidden = state.first + state.blocks < 2;
    Object.assign(at("block"), { min: state.first, max: state.first + state.blocks - 1, value: state.first });
    at("count").textContent = `of ${state.first} to ${state.first + state.blocks - 1}`;
    state.chosen = Math.min(state.chosen, layout.weights - 1);
  }

  let tensors = new Map(), opened = null;

  async function open(file) {
    try {
      tensors = await tensorsOf(file);
    } catch (error) {
      at("list").hidden = true;
      at("file-told").textContent = `${file.name}: ${error.message}.`;
      return;
    }
    opened = file;
    at("list").hidden = false;
    list();
    at("file-told").textContent = `${file.name}: ${tensors.size} tensors. Choose one.`;
  }

  function list() {
    const wanted = at("filter").value;
    const names = [...tensors.keys()].filter((name) => name.includes(wanted));
    at("tensor").replaceChildren(element("option", { value: "", textContent: `${names.length} tensors` }), ...names.map((name) => {
      const one = tensors.get(name);
      return element("option", { value: name, textContent: `${name}  ${one.type} [${one.shape.join(", ")}]` });
    }));
  }

  async function pick(name) {
    const one = tensors.get(name);
    if (!one) return;
    if (!LAYOUTS[one.type] || !one.nbytes) {
      at("file-told").textContent = `${name} is ${one.type}${one.nbytes ? ", which this page does not draw" : " and has no block"}.`;
      return;
    }
    Object.assign(state, { file: { blob: opened, ...one }, first: 0, name });
    given.fields = LAYOUTS[one.type] === LAYOUTS[given.format] ? given.fields : {};
    lay(LAYOUTS[one.type]);
    offer(one.nbytes);
    document.querySelector("h1").textContent = `${name}: ${one.type}`;
    at("file-told").textContent = `${name}: ${one.type}, shape ${one.shape.join(" x ")}, ${state.blocks} blocks.`;
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
  for (const kind of ["dragover", "dragleave", "drop"]) {
    document.addEventListener(kind, (event) => {
      event.preventDefault();
      at("drop").classList.toggle("over", kind === "dragover");
      if (kind === "drop" && event.dataTransfer.files[0]) open(event.dataTransfer.files[0]);
    });
  }
  lay(layout);
  offer(state.given.length);
  load(state.first);
}

if (typeof module !== "undefined") module.exports = { weightsOf, numbersOf, bitsBehind, tensorsOf, decodeFloat };
