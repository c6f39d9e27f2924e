// What the bits of a block make. LAYOUTS (layouts.js) is made from the format modules; nothing here knows a format.
"use strict";

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

// --- in words --------------------------------------------------------------------------------------------------------

// "0 00011 0001011110": sign, exponent and mantissa of a pattern of a float, apart.
function splitFloat(shape, pattern) {
  const cut = pattern.length - shape.mantissa, head = cut - shape.exponent;
  return [pattern.slice(0, head), pattern.slice(head, cut), pattern.slice(cut)];
}

// How sign, exponent and mantissa make a float: the formula with its numbers.
function floatSum(shape, sign, exponent, mantissa, signed = true) {
  const found = decodeFloat(shape, sign, exponent, mantissa), one = 2 ** shape.mantissa;
  if (Number.isNaN(found)) return "the highest exponent with this mantissa means NaN, not a number";
  if (!Number.isFinite(found)) return "the highest exponent with mantissa 0 means infinity";
  const size = exponent || !shape.mantissa
    ? `2 ** (${exponent} - ${shape.bias})${shape.mantissa ? ` * (1 + ${mantissa} / ${one})` : ""}`
    : `2 ** ${1 - shape.bias} * ${mantissa} / ${one}`;
  return (signed ? `(-1) ** ${sign} * ` : "") + size;
}

// How the bits of a number make it: [sum, what stands for what in it].
function madeOf(layout, bytes, part, index) {
  const places = placesOf(layout, part, index), told = layout.parts[part];
  const value = show(numbersOf(layout, bytes)[part][index]);
  if (told.float) {
    const pieces = splitFloat(told.float, places.map((place) => bitOf(bytes, place)).join(""));
    const [sign, exponent, mantissa] = pieces.map((piece) => parseInt(piece || "0", 2));
    return [`${floatSum(told.float, sign, exponent, mantissa)} = ${value}`,
      `sign ${sign}, exponent ${pieces[1]} is ${exponent}, mantissa ${pieces[2]} is ${mantissa}`];
  }
  const adds = places.filter((place) => bitOf(bytes, place)).map((place) => layout.bits[place][3]);
  const stored = adds.reduce((a, b) => a + b, 0), zero = told.zero[index];
  const sum = adds.length > 1 ? `${adds.join(" + ")} = ${stored}` : String(stored);
  return zero ? [`${sum}; ${stored} - ${-zero} = ${value}`, `stored is the number + ${-zero}`] : [sum, ""];
}

// Which weight n is, by the letters of the formula.
function placeOf(layout, n) {
  if (layout.float) return `Each of the ${layout.weights} numbers stands by itself. This is number ${n}, counted from 0.`;
  if (!layout.formula.includes("[j")) return `The weights of a block are counted from 0 to ${layout.weights - 1}: i = ${n}.`;
  const j = Math.floor(n / layout.width), i = n % layout.width;
  const shared = [...new Set([...layout.formula.matchAll(/(\w+)\[j\]/g)].map((found) => `${found[1]}[${j}]`))].join(" and ");
  return `A group is ${layout.width} weights in a row that share a scale. Weight ${n} is weight i = ${i} of group j = ${j}, since ` +
    `${n} = ${j} * ${layout.width} + ${i}. The whole group uses ${shared}.`;
}

// Who else uses a number that makes weight n.
function sharedBy(layout, part, index) {
  const count = layout.parts[part].shape.length ? layout.parts[part].shape.reduce((a, b) => a * b, 1) : 1;
  if (count === layout.weights) return "this weight's own";
  return count === 1 ? `all ${layout.weights} weights share it` : `the ${layout.weights / count} weights of group ${index} share it`;
}
