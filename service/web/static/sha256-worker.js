/* SHA-256 of a file, piece by piece, so that gigabytes need no memory (FIPS 180-4).
 * The browser's own digest wants the whole file at once and exists on https and loopback only.
 * In: a File. Out: {read} now and then, then {digest}.
 */
"use strict";

const PIECE = 4 * 1024 * 1024;

/** First 32 bits of the fractional parts of the roots of the first primes. */
function constants() {
  const primes = [];
  for (let n = 2; primes.length < 64; n++) if (primes.every((p) => n % p)) primes.push(n);
  const fraction = (x) => ((x - Math.floor(x)) * 2 ** 32) >>> 0;
  return {
    start: primes.slice(0, 8).map((p) => fraction(Math.sqrt(p))),
    rounds: Int32Array.from(primes, (p) => fraction(Math.cbrt(p))),
  };
}

const { start, rounds } = constants();
const words = new Int32Array(64);

function mix(state, bytes, from) {
  for (let t = 0; t < 16; t++) {
    const k = from + 4 * t;
    words[t] = (bytes[k] << 24) | (bytes[k + 1] << 16) | (bytes[k + 2] << 8) | bytes[k + 3];
  }
  for (let t = 16; t < 64; t++) {
    const x = words[t - 15];
    const y = words[t - 2];
    const s0 = ((x >>> 7) | (x << 25)) ^ ((x >>> 18) | (x << 14)) ^ (x >>> 3);
    const s1 = ((y >>> 17) | (y << 15)) ^ ((y >>> 19) | (y << 13)) ^ (y >>> 10);
    words[t] = (words[t - 16] + s0 + words[t - 7] + s1) | 0;
  }
  let [a, b, c, d, e, f, g, h] = state;
  for (let t = 0; t < 64; t++) {
    const s1 = ((e >>> 6) | (e << 26)) ^ ((e >>> 11) | (e << 21)) ^ ((e >>> 25) | (e << 7));
    const t1 = (h + s1 + ((e & f) ^ (~e & g)) + rounds[t] + words[t]) | 0;
    const s0 = ((a >>> 2) | (a << 30)) ^ ((a >>> 13) | (a << 19)) ^ ((a >>> 22) | (a << 10));
    const t2 = (s0 + ((a & b) ^ (a & c) ^ (b & c))) | 0;
    h = g;
    g = f;
    f = e;
    e = (d + t1) | 0;
    d = c;
    c = b;
    b = a;
    a = (t1 + t2) | 0;
  }
  [a, b, c, d, e, f, g, h].forEach((value, k) => {
    state[k] = (state[k] + value) | 0;
  });
}

function padded(rest, size) {
  const length = rest.length < 56 ? 64 : 128;
  const block = new Uint8Array(length);
  block.set(rest);
  block[rest.length] = 0x80;
  const view = new DataView(block.buffer);
  view.setUint32(length - 8, Math.floor(size / 2 ** 29));
  view.setUint32(length - 4, (size * 8) >>> 0);
  return block;
}

async function digest(file) {
  const state = Int32Array.from(start);
  let at = 0;
  while (file.size - at >= PIECE) {
    const bytes = new Uint8Array(await file.slice(at, at + PIECE).arrayBuffer());
    for (let from = 0; from < PIECE; from += 64) mix(state, bytes, from);
    at += PIECE;
    postMessage({ read: at });
  }
  const bytes = new Uint8Array(await file.slice(at).arrayBuffer());
  const whole = bytes.length - (bytes.length % 64);
  for (let from = 0; from < whole; from += 64) mix(state, bytes, from);
  const last = padded(bytes.subarray(whole), file.size);
  for (let from = 0; from < last.length; from += 64) mix(state, last, from);
  return [...state].map((word) => (word >>> 0).toString(16).padStart(8, "0")).join("");
}

onmessage = async (event) => {
  try {
    postMessage({ digest: await digest(event.data) });
  } catch (reason) {
    postMessage({ problem: `the file could not be read: ${reason.message}` });
  }
};
