/* The layers in the order in which they run, with their bits as colour and their branches as lines.
 *
 * A row for each layer; a lane stays taken from a layer down to the last one that reads it. Only the
 * rows in sight are drawn, so that thousands of layers cost what fifty do.
 */
(() => {
  "use strict";

  const { make, theme, colorOfBits, whenItMustBeRedrawn, figure } = globalThis.Bitquota;
  const ROW = 1.6; // of the font size, as the lengths below
  const LANE = 0.9;
  const CHIP = 2.6;
  const MOST_LANES = 24;
  const VISIBLE = 24;

  /** The lane of each row, and the edges from above: {lanes, edges: [from rows], width}. */
  function arranged(count, edges) {
    const from = Array.from({ length: count }, () => []);
    const last = new Int32Array(count).fill(-1);
    for (const [a, b] of edges) {
      from[b].push(a);
      last[a] = Math.max(last[a], b);
    }
    const lanes = new Int32Array(count);
    const taken = [];
    for (let row = 0; row < count; row += 1) {
      const ended = from[row].filter((a) => last[a] === row).map((a) => lanes[a]);
      for (const lane of ended) taken[lane] = false;
      let lane = ended.length ? Math.min(...ended) : taken.findIndex((t) => !t);
      if (lane < 0) lane = taken.length;
      lanes[row] = lane;
      taken[lane] = last[row] > row;
    }
    return { lanes, from, last, width: Math.min(MOST_LANES, taken.length) };
  }

  /** What a screen reader hears instead of the lines. */
  function said(order, edges) {
    if (!edges) return `${order.length} layers in order; how they are connected is not known.`;
    const readers = new Int32Array(order.length);
    for (const [a] of edges) readers[a] += 1;
    const branches = readers.filter((n) => n > 1).length;
    return `${order.length} layers in order, ${branches} of which are read by several. Their bits are `
      + "in the table of bits.";
  }

  function layerGraph(doc, state, graph) {
    const place = new Map(doc.layers.names.map((name, k) => [name, k]));
    const { order } = graph;
    const { lanes, from, last, width } = arranged(order.length, graph.edges || []);
    // The edges that pass a row, found from the rows above it: where each begins, in order.
    const begins = order.map((_, row) => row).filter((row) => last[row] > row);
    const canvas = make("canvas", { role: "img", "aria-label": said(order, graph.edges) });
    const room = make("div", { class: "room" });
    const scroller = make("div", { class: "graph", tabindex: 0, role: "region",
      "aria-label": "Layers in order" }, canvas, room);

    function draw() {
      if (!scroller.isConnected) return;
      const style = theme();
      const row = Math.round(ROW * style.root);
      const lane = LANE * style.root;
      const shown = Math.min(order.length, VISIBLE);
      const height = shown * row;
      scroller.style.height = `${height + 2}px`;
      room.style.height = `${(order.length - shown) * row}px`;
      const wide = scroller.clientWidth;
      const ratio = globalThis.devicePixelRatio || 1;
      canvas.width = wide * ratio;
      canvas.height = height * ratio;
      canvas.style.width = `${wide}px`;
      canvas.style.height = `${height}px`;
      const pen = canvas.getContext("2d");
      pen.setTransform(ratio, 0, 0, ratio, 0, 0);
      const top = scroller.scrollTop;
      const first = Math.floor(top / row);
      const end = Math.min(order.length, first + shown + 2);
      const x = (k) => (Math.min(lanes[k], MOST_LANES - 1) + 0.7) * lane;
      const y = (k) => (k + 0.5) * row - top;
      pen.strokeStyle = style.soft;
      pen.lineWidth = 1.5;
      pen.beginPath();
      for (const a of begins) {
        if (a >= end) break;
        if (last[a] >= first) {
          pen.moveTo(x(a), y(a));
          pen.lineTo(x(a), y(last[a] - 1));
        }
      }
      for (let k = first; k < Math.min(order.length, end + 1); k += 1) {
        for (const a of from[k]) {
          pen.moveTo(x(a), y(k - 1));
          pen.bezierCurveTo(x(a), y(k - 0.5), x(k), y(k - 0.5), x(k), y(k));
        }
      }
      pen.stroke();
      const point = state.current || state.plans[0];
      const text = (width + 1) * lane;
      pen.font = `${0.85 * style.root}px ${style.font}`;
      pen.textBaseline = "middle";
      for (let k = first; k < end; k += 1) {
        const layer = place.get(order[k]);
        const bits = point && layer !== undefined ? point.bits[layer] : 0;
        pen.fillStyle = bits ? colorOfBits(style, bits) : style.line;
        pen.beginPath();
        pen.arc(x(k), y(k), 0.32 * style.root, 0, 2 * Math.PI);
        pen.fill();
        pen.fillRect(text, y(k) - 0.38 * row, CHIP * style.root, 0.76 * row);
        pen.strokeRect(text, y(k) - 0.38 * row, CHIP * style.root, 0.76 * row);
        pen.fillStyle = style.ink;
        const label = bits ? `${Number(bits.toFixed(2))} bits` : "full";
        pen.fillText(label, text + (CHIP + 0.5) * style.root, y(k));
        pen.fillText(order[k], text + (CHIP + 5) * style.root, y(k));
      }
    }
    scroller.addEventListener("scroll", () => requestAnimationFrame(draw), { passive: true });
    whenItMustBeRedrawn(draw);
    const hint = graph.edges
      ? "Lines lead from a layer to those that read it; connections that only pass a block by are left out. "
        + "Colours are those of the bars, for the plan of the slider."
      : "In the order of the model. Its file does not say how they are connected, as a .pt2 or ONNX file does.";
    return { section: figure("Layers in order", hint, scroller), draw };
  }

  Object.assign(globalThis.Bitquota, { layerGraph, arranged });
})();
