// The tensors of a GGUF or safetensors file that a reader gives to the page, from its header alone.
"use strict";

const HEADER = 1 << 20, LARGEST = 1 << 28, MOST_AXES = 8;

async function bytesOf(file, start, length) {
  if (![start, length].every((n) => Number.isSafeInteger(n) && n >= 0)) throw new Error("its header tells of a place that is none");
  if (start + length > file.size) throw new Error("the file ends before what its header tells");
  return new Uint8Array(await file.slice(start, start + length).arrayBuffer());
}

// {name: {type, shape, offset, nbytes}} of a GGUF or safetensors file, from its header alone.
async function tensorsOf(file) {
  const head = await bytesOf(file, 0, Math.min(8, file.size));
  if (String.fromCharCode(...head.subarray(0, 4)) === "GGUF") return ggufTensors(file);
  return safetensorsTensors(file);
}

async function safetensorsTensors(file) {
  if (file.size < 8) throw new Error(file.size ? "too short for a GGUF or safetensors file" : "the file is empty");
  const length = Number(new DataView((await bytesOf(file, 0, 8)).buffer).getBigUint64(0, true));
  if (!(length <= LARGEST && 8 + length <= file.size)) throw new Error("neither a GGUF nor a safetensors file");
  let told;
  try {
    told = JSON.parse(new TextDecoder().decode(await bytesOf(file, 8, length)));
  } catch (error) {
    throw new Error(`neither a GGUF nor a safetensors file: ${error.message}`);
  }
  const names = { F8_E4M3: "E4M3", F8_E5M2: "E5M2", F8_E8M0: "E8M0" }, found = new Map();
  if (!told || typeof told !== "object" || Array.isArray(told)) throw new Error("neither a GGUF nor a safetensors file");
  for (const [name, one] of Object.entries(told)) {
    if (name === "__metadata__") continue;
    const sizes = (list, count) => Array.isArray(list) && (count === undefined || list.length === count) &&
      list.every((n) => Number.isSafeInteger(n) && n >= 0);
    if (!one || typeof one.dtype !== "string" || !sizes(one.shape) || !sizes(one.data_offsets, 2)) {
      throw new Error(`the tensor ${name} has no type, no shape or no offsets`);
    }
    const [start, end] = one.data_offsets, type = Object.hasOwn(names, one.dtype) ? names[one.dtype] : one.dtype;
    if (end < start) throw new Error(`the tensor ${name} ends before it begins`);
    found.set(name, { type, shape: one.shape, offset: 8 + length + start, nbytes: end - start });
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
  for (let size = HEADER; size <= LARGEST; size *= 4) {  // the header says nowhere how long it is
    const bytes = await bytesOf(file, 0, Math.min(size, file.size));
    try {
      return ggufTable(new DataView(bytes.buffer), file.size);
    } catch (error) {
      if (!(error instanceof RangeError)) throw error;
      if (size >= file.size) throw new Error("the file ends within its header");
    }
  }
  throw new Error(`the header is larger than ${LARGEST} bytes, which is all that this page reads`);
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
    const name = text(), axes = u32();
    if (axes > MOST_AXES) throw new Error(`the tensor ${name} has ${axes} axes`);
    const shape = Array.from({ length: axes }, u64).reverse(), type = typeName(u32()), offset = u64();
    const layout = LAYOUTS[type], count = shape.reduce((a, b) => a * b, 1);
    if (found.has(name)) throw new Error(`two tensors are named "${name}"`);
    found.set(name, { type, shape, offset, nbytes: layout ? Math.ceil(count / layout.weights * layout.bytes) : 0 });
  }
  const data = Math.ceil(at / alignment) * alignment;
  if (found.size && data > fileSize) throw new Error("the file ends within its header");
  for (const one of found.values()) one.offset += data;
  return found;
}
