/* The sensitivity matrix: each candidate alone, and pairs of layers. */
(() => {
  "use strict";

  const {
    make, fresh, decode, number, withError, figure, folded, table, heatMap, readable,
  } = globalThis.Bitquota;

  function sensitivities(doc) {
    const m = doc.matrix;
    const values = decode(m.values);
    const errors = decode(m.errors);
    const columns = m.columns;
    const nc = columns.length;
    const groups = m.groups;
    let order = groups.map((_, k) => k);
    const name = (g) => (m.members && m.members[g].length > 1
      ? `${m.members[g][0]} + ${m.members[g].length - 1} tied` : groups[g]);
    const map = heatMap("Sensitivity of every layer to every candidate", {
      rows: () => nc, columns: () => groups.length,
      value: (r, c) => values[order[c] * nc + r],
      text: (r, c) => `${name(order[c])} at ${columns[r]}: `
        + withError(values[order[c] * nc + r], errors && errors[order[c] * nc + r]),
      hint: "One column for each layer, one row for each candidate (fewest bits on top). Point at "
        + "a cell, or focus the map and use the arrow keys.",
    });
    map.measure();
    const grid = table({
      caption: `Loss increase of each candidate alone (${doc.unit})`, count: groups.length,
      dense: true, filterBy: (k) => name(k), pageRows: 25,
      columns: [
        { name: "Layer", value: (k) => k, text: (k) => name(k) },
        ...columns.map((label, c) => ({ name: label, numeric: true,
          value: (k) => values[k * nc + c],
          text: (k) => withError(values[k * nc + c], errors && errors[k * nc + c]),
          paint: (cell, k) => {
            const rgb = map.color(values[k * nc + c]);
            if (!rgb) return;
            cell.style.backgroundColor = `rgb(${rgb})`;
            cell.style.color = readable(rgb);
          } })),
      ],
    });
    const id = fresh("sort");
    const sorter = make("select", { id, onchange: (e) => {
      const k = e.target.value;
      order = groups.map((_, g) => g);
      if (k !== "model") {
        const at = (g) => {
          const v = values[g * nc + Number(k)];
          return Number.isNaN(v) ? -Infinity : v;
        };
        order.sort((a, b) => at(b) - at(a));
      }
      map.renew();
    } }, make("option", { value: "model" }, "as in the model"),
    ...columns.map((label, c) => make("option", { value: c }, `by harm at ${label}`)));
    const odd = values.reduce((n, v) => n + (v < 0), 0);
    const section = figure("Where the bits hurt",
      `Loss increase (${doc.unit}) when one layer alone is quantized, around ${m.around}; `
      + `± is one standard error.${odd ? ` ${odd} negative values are shown in blue: they are `
      + "noise, or layers that like to be quantized." : ""}`,
      make("div", { class: "controls" }, make("label", { for: id }, "Order of layers ", sorter)),
      map.element, grid.element);
    return { section, draw: () => map.renew() };
  }

  function crossTerms(doc, hooks) {
    const m = doc.matrix;
    let shown = null;
    let order = [];
    let pending = null;
    const cell = (i, j) => (i > j ? (i * (i - 1)) / 2 + j : (j * (j - 1)) / 2 + i);
    const value = (r, c) => (order[r] === order[c] ? NaN : shown.values[cell(order[r], order[c])]);
    const error = (i, j) => (shown.errors ? shown.errors[cell(i, j)] : null);
    const named = (k) => (shown.block > 1 ? `${shown.names[k]} … (${shown.block} groups)`
      : shown.names[k]);
    const side = () => (shown ? shown.names.length : 0);
    const map = heatMap("Cross-layer terms by pair of layers", {
      rows: side, columns: side, square: true, signed: true, value,
      text: (r, c) => (order[r] === order[c] ? named(order[r])
        : `${named(order[r])} with ${named(order[c])}: `
          + withError(value(r, c), error(order[r], order[c]))),
      hint: "Red: the two hurt more together than apart; blue: less. Point at a cell, or focus the "
        + "map and use the arrow keys.",
    });
    let pairs = [];
    const list = folded("Pairs as a table, strongest first", () => table({
      caption: `Cross-layer terms (${doc.unit})`, count: pairs.length, sortBy: 3, pageRows: 20,
      filterBy: (k) => `${named(pairs[k][0])} ${named(pairs[k][1])}`,
      columns: [
        { name: "Layer", value: (k) => pairs[k][0], text: (k) => named(pairs[k][0]) },
        { name: "With", value: (k) => pairs[k][1], text: (k) => named(pairs[k][1]) },
        { name: "Term", numeric: true, value: (k) => shown.values[cell(...pairs[k])],
          text: (k) => withError(shown.values[cell(...pairs[k])], error(...pairs[k])) },
        { name: "Magnitude", numeric: true,
          value: (k) => Math.abs(shown.values[cell(...pairs[k])]),
          text: (k) => number(Math.abs(shown.values[cell(...pairs[k])])) },
      ],
    }));
    function arrange(by) {
      const n = side();
      order = Array.from({ length: n }, (_, k) => k);
      if (by === "strength") {
        const total = order.map((i) => order.reduce((sum, j) => sum
          + (i === j ? 0 : Math.abs(shown.values[cell(i, j)]) || 0), 0));
        order.sort((a, b) => total[b] - total[a]);
      }
    }
    async function load(at) {
      if (pending) pending.abort();
      pending = new AbortController();
      try {
        const found = hooks.cross ? await hooks.cross(at, pending.signal) : doc.cross[at];
        shown = { ...found, values: decode(found.values), errors: decode(found.errors) };
      } catch (reason) {
        if (reason.name !== "AbortError") message.textContent = reason.message;
        return;
      }
      message.textContent = shown.block > 1 ? `Each cell stands for ${shown.block} × `
        + `${shown.block} pairs and shows the strongest.` : "";
      arrange(sorter.value);
      pairs = [];
      for (let i = 0; i < side(); i++) {
        for (let j = 0; j < i; j++) {
          if (!Number.isNaN(shown.values[cell(i, j)])) pairs.push([i, j]);
        }
      }
      map.renew();
      list.update(pairs.length);
      // Beside the map there is room for it.
      if (!list.element.dataset.seen && matchMedia("(min-width: 95rem)").matches) {
        list.element.open = true;
      }
      list.element.dataset.seen = "true";
    }
    const message = make("p", { class: "hint", role: "status" });
    const names = { largest: "any two candidates, the strongest term", plan: "the first plan" };
    const maps = hooks.cross ? m.maps : Object.keys(doc.cross);
    const ids = [fresh("at"), fresh("order")];
    const selector = make("select", { id: ids[0], onchange: (e) => load(e.target.value) },
      ...maps.map((at) => make("option", { value: at }, names[at] || `both at ${at}`)));
    const sorter = make("select", { id: ids[1], onchange: (e) => {
      arrange(e.target.value);
      map.renew();
    } }, make("option", { value: "model" }, "as in the model"),
    make("option", { value: "strength" }, "strongest first"));
    const section = figure("What hurts together",
      `Extra loss increase (${doc.unit}) when two layers are quantized at once, beyond the sum of `
      + "both alone.",
      make("div", { class: "controls" },
        make("label", { for: ids[0] }, "Show ", selector),
        make("label", { for: ids[1] }, "Order of layers ", sorter)), message,
      make("div", { class: "beside" }, map.element, list.element));
    return { section, load: () => load(maps[0]) };
  }

  Object.assign(globalThis.Bitquota, { sensitivities, crossTerms });
})();
