/* Elements, numbers and colours: what every drawing of Bitquota is made with.
 *
 * The files of this folder are plain scripts that share one object, in this order: elements.js,
 * tables.js, drawings.js, frontier.js, plans.js, heat.js, matrix.js, comparison.js, graph.js, charts.js. Text
 * from models reaches a page as text nodes and as canvas text only.
 */
(() => {
  "use strict";
  const BITS = [1, 2, 3, 4, 5, 6, 7, 8, 16];

  /** Make an element; children are nodes or text. */
  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (value === null || value === undefined || value === false) continue;
      if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else element.setAttribute(name, value === true ? "" : String(value));
    }
    element.append(...children.filter((child) => child !== null && child !== undefined));
    return element;
  }

  function decode(text) {
    if (!text) return null;
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    return new Float32Array(bytes.buffer);
  }

  function number(value, digits = 3) {
    if (value === null || value === undefined || Number.isNaN(value)) return "–";
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (size >= 1e5 || size < 1e-4) {
      return value.toExponential(digits - 1).replace("e+", "e").replace("-", "−");
    }
    return String(Number(value.toPrecision(digits))).replace("-", "−");
  }

  function bytes(bits) {
    let value = Math.ceil(bits / 8);
    let unit = "B";
    for (const larger of ["KiB", "MiB", "GiB", "TiB"]) {
      if (value < 1024) break;
      value /= 1024;
      unit = larger;
    }
    return `${unit === "B" ? value : value.toFixed(value < 100 ? 1 : 0)} ${unit}`;
  }

  function withError(value, error) {
    if (error === null || error === undefined || Number.isNaN(error)) return number(value);
    return `${number(value)} ± ${number(error, 2)}`;
  }

  function theme() {
    const style = getComputedStyle(document.documentElement);
    const read = (name) => style.getPropertyValue(name).trim();
    const root = parseFloat(style.fontSize);
    const found = {
      ink: read("--ink"), soft: read("--soft"), line: read("--line"), paper: read("--paper"),
      accent: read("--accent"), second: read("--second"), warn: read("--warn"), root,
      font: getComputedStyle(document.body).fontFamily,
      heat: read("--heat").split(",").map(parseColor),
      cold: read("--cold").split(",").map(parseColor),
      bits: {},
    };
    for (const bits of BITS) found.bits[bits] = read(`--b${bits}`);
    return found;
  }

  function parseColor(text) {
    const hex = text.trim().slice(1);
    return [0, 2, 4].map((k) => parseInt(hex.slice(k, k + 2), 16));
  }

  function blend(stops, t) {
    const x = Math.min(1, Math.max(0, t)) * (stops.length - 1);
    const k = Math.min(stops.length - 2, Math.floor(x));
    return stops[k].map((c, i) => Math.round(c + (x - k) * (stops[k + 1][i] - c)));
  }

  function colorOfBits(colors, bits) {
    return colors.bits[bits] || colors.bits[BITS.find((b) => b >= bits) || 16];
  }

  /** Drawings run again when the window or the scheme of colours changes. */
  const redraws = new Set();
  let redrawing = 0;
  function whenItMustBeRedrawn(draw) {
    redraws.add(draw);
  }
  function redrawAll() {
    cancelAnimationFrame(redrawing);
    redrawing = requestAnimationFrame(() => redraws.forEach((draw) => draw()));
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redrawAll);
  addEventListener("resize", redrawAll);

  let numbered = 0;
  const fresh = (name) => `${name}-${++numbered}`;

  globalThis.Bitquota = {
    make, decode, number, bytes, withError, theme, blend, colorOfBits,
    whenItMustBeRedrawn, fresh,
  };
})();
