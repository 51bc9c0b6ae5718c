/* Heat maps on a canvas, for any number of cells; a keyboard reaches each of them. */
(() => {
  "use strict";

  const { make, number, theme, blend, whenItMustBeRedrawn } = globalThis.Bitquota;

  /** Cells on a canvas. Several columns in one pixel show the strongest of them.
   *
   * spec: {rows, columns, value(r, c), text(r, c), signed, square}; arrows move a cursor.
   */
  function heatMap(label, spec) {
    const canvas = make("canvas", { tabindex: 0, role: "application",
      "aria-roledescription": "heat map", "aria-label": label });
    const readout = make("p", { class: "readout", "aria-live": "polite" }, spec.hint);
    const scale = make("canvas", { class: "scale", "aria-hidden": "true" });
    const low = make("span");
    const high = make("span");
    const legend = make("div", { class: "legend" }, low, scale, high);
    const element = make("div", { class: spec.square ? "heat square" : "heat" }, canvas, legend,
      readout);
    const cursor = { row: -1, column: -1 };
    let limits = { low: 1, high: 1 };
    let picture = null;

    function measure() {
      let top = 0;
      const seen = [];
      for (let r = 0; r < spec.rows(); r++) {
        for (let c = 0; c < spec.columns(); c++) {
          const v = Math.abs(spec.value(r, c));
          if (v > top) top = v;
          if (v > 0) seen.push(v);
        }
      }
      seen.sort((a, b) => a - b);
      // A few tiny values must not take the whole scale.
      limits = { high: top || 1, low: Math.max(seen[Math.floor(seen.length / 50)] || 0,
        (top || 1) * 1e-5) };
    }
    function share(v) {
      if (spec.signed) {
        const soft = limits.high * 1e-3;
        return Math.log1p(Math.abs(v) / soft) / Math.log1p(limits.high / soft);
      }
      if (v <= 0) return 0;
      const span = Math.log(limits.high / limits.low) || 1;
      return Math.max(0, Math.log(v / limits.low) / span);
    }
    function color(style, v) {
      if (Number.isNaN(v)) return null;
      const stops = v < 0 ? style.cold : style.heat;
      // A negative sensitivity is odd: it is shown in the other hue at full strength.
      return blend(stops, v < 0 && !spec.signed ? 0.8 : share(v));
    }
    function draw() {
      if (!canvas.isConnected || !spec.rows() || !canvas.clientWidth) return;
      const style = theme();
      const ratio = devicePixelRatio || 1;
      const nr = spec.rows();
      const nc = spec.columns();
      const width = canvas.clientWidth;
      const height = spec.square ? width : Math.min(30, Math.max(18, 260 / nr)) * nr;
      canvas.style.height = `${height}px`;
      canvas.width = Math.round(width * ratio);
      canvas.height = Math.round(height * ratio);
      const w = Math.min(nc, canvas.width);
      const h = Math.min(nr, canvas.height);
      const small = new OffscreenCanvas(w, h);
      const image = new ImageData(w, h);
      const strongest = new Float32Array(w * h);
      const filled = new Uint8Array(w * h);
      for (let r = 0; r < nr; r++) {
        const y = Math.floor((r * h) / nr);
        for (let c = 0; c < nc; c++) {
          const v = spec.value(r, c);
          if (Number.isNaN(v)) continue;
          const at = y * w + Math.floor((c * w) / nc);
          if (!filled[at] || Math.abs(v) > Math.abs(strongest[at])) {
            filled[at] = 1;
            strongest[at] = v;
          }
        }
      }
      for (let at = 0; at < w * h; at++) {
        if (!filled[at]) continue;
        const [red, green, blue] = color(style, strongest[at]);
        image.data.set([red, green, blue, 255], 4 * at);
      }
      small.getContext("2d").putImageData(image, 0, 0);
      picture = small;
      paint(style);
      paintScale(style);
    }
    function paint(style) {
      const g = canvas.getContext("2d");
      g.clearRect(0, 0, canvas.width, canvas.height);
      g.imageSmoothingEnabled = false;
      g.drawImage(picture, 0, 0, canvas.width, canvas.height);
      const w = canvas.width / spec.columns();
      const h = canvas.height / spec.rows();
      if (w > 7 && h > 7) {
        g.fillStyle = style.paper;
        for (let c = 1; c < spec.columns(); c++) g.fillRect(Math.round(c * w), 0, 1, canvas.height);
        for (let r = 1; r < spec.rows(); r++) g.fillRect(0, Math.round(r * h), canvas.width, 1);
      }
      if (cursor.row >= 0) {
        const ratio = devicePixelRatio || 1;
        const side = Math.max(6 * ratio, w);
        const tall = Math.max(6 * ratio, h);
        const x = (cursor.column + 0.5) * w - side / 2;
        const y = (cursor.row + 0.5) * h - tall / 2;
        g.lineWidth = 2 * ratio;
        g.strokeStyle = style.paper;
        g.strokeRect(x - ratio, y - ratio, side + 2 * ratio, tall + 2 * ratio);
        g.strokeStyle = style.ink;
        g.strokeRect(x, y, side, tall);
      }
    }
    function paintScale(style) {
      scale.width = 128;
      scale.height = 1;
      const g = scale.getContext("2d");
      const image = g.createImageData(128, 1);
      for (let k = 0; k < 128; k++) {
        const t = spec.signed ? (k - 63.5) / 63.5 : k / 127;
        const rgb = blend(t < 0 ? style.cold : style.heat, Math.abs(t));
        image.data.set([...rgb, 255], 4 * k);
      }
      g.putImageData(image, 0, 0);
      low.textContent = spec.signed ? `−${number(limits.high)}` : `≤ ${number(limits.low)}`;
      high.textContent = number(limits.high);
    }
    function move(row, column) {
      cursor.row = Math.min(spec.rows() - 1, Math.max(0, row));
      cursor.column = Math.min(spec.columns() - 1, Math.max(0, column));
      readout.textContent = spec.text(cursor.row, cursor.column);
      if (picture) paint(theme());
    }
    canvas.addEventListener("pointermove", (event) => {
      const box = canvas.getBoundingClientRect();
      move(Math.floor(((event.clientY - box.top) / box.height) * spec.rows()),
        Math.floor(((event.clientX - box.left) / box.width) * spec.columns()));
    });
    canvas.addEventListener("keydown", (event) => {
      const step = event.shiftKey ? 10 : 1;
      const moves = { ArrowLeft: [0, -step], ArrowRight: [0, step], ArrowUp: [-step, 0],
        ArrowDown: [step, 0] };
      if (event.key === "Home") move(cursor.row, 0);
      else if (event.key === "End") move(cursor.row, spec.columns() - 1);
      else if (moves[event.key]) {
        const [dr, dc] = moves[event.key];
        move(cursor.row < 0 ? 0 : cursor.row + dr, cursor.column < 0 ? 0 : cursor.column + dc);
      } else return;
      event.preventDefault();
    });
    canvas.addEventListener("focus", () => cursor.row < 0 && move(0, 0));
    whenItMustBeRedrawn(draw);
    return { element, color: (v) => color(theme(), v), renew: () => {
      measure();
      draw();
    }, describe: (text) => canvas.setAttribute("aria-label", text), measure };
  }

  function readable([r, g, b]) {
    const linear = [r, g, b].map((c) => (c / 255 <= 0.04045 ? c / 255 / 12.92
      : ((c / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] > 0.179 ? "#000" : "#fff";
  }

  Object.assign(globalThis.Bitquota, { heatMap, readable });
})();
