/* The frontier: size, time or energy against predicted and measured loss, with the certificate. */
(() => {
  "use strict";

  const {
    make, fresh, number, bytes, withError, chart, tip, axis, legendRows, folded, table,
  } = globalThis.Bitquota;
  const UNITS = {
    latency_ns: ["Time of one run", "take longer", ["ns", "µs", "ms", "s"]],
    energy_pj: ["Energy of one run", "take more energy", ["pJ", "nJ", "µJ", "mJ", "J"]],
  };
  const DOT = 5;
  const LARGER_DOT = 15;

  /** What the x axis may show: the stored size, and what the plans' cost tables price. */
  function measuresOf(doc) {
    const size = { name: "Stored size", more: "take more room", of: (p) => p.size_bits, text: bytes,
      scale: (most) => (most / 8 / 1024 > 4096 ? [8 * 1024 ** 2, "MiB stored"]
        : [8 * 1024, "KiB stored"]) };
    const priced = (doc.prices || []).map(({ resource, constant, layers, pairs }) => {
      const [name, more, units] = UNITS[resource];
      const key = (layer, label) => `${layer}\n${label}`;
      const cost = new Map(layers.map(([layer, label, value]) => [key(layer, label), value]));
      const scale = (most) => {
        const k = Math.min(units.length - 1, Math.max(0, Math.floor(Math.log10(most || 1) / 3)));
        return [1000 ** k, `${units[k]} for one run`, units[k]];
      };
      const add = (labels) => {
        const chosen = new Set(doc.layers.names.map((layer, k) => key(layer, labels[k])));
        let sum = constant;
        for (const one of chosen) sum += cost.get(one);
        for (const [a, atA, b, atB, value] of pairs) {
          if (chosen.has(key(a, atA)) && chosen.has(key(b, atB))) sum += value;
        }
        return sum; // NaN where the table lacks a candidate
      };
      const known = new WeakMap();
      return { name, more, scale, of: (p) => {
        if (!known.has(p)) known.set(p, p.labels ? add(p.labels) : NaN);
        return known.get(p);
      }, text: (value) => {
        if (Number.isNaN(value)) return "–";
        const [unit, , short] = scale(value);
        return `${number(value / unit)} ${short}`;
      } };
    });
    return [size, ...priced];
  }

  /** Legend, tooltips, a linear axis of what plans take, and a logarithmic one of losses. */
  function lossAxes(style, width, names, unitName, floor) {
    const small = 0.78 * style.root;
    return {
      grid: { left: 8, right: 16, top: legendRows(style, width, names) * 1.7 * style.root + 12,
        bottom: 30, containLabel: true },
      legend: { top: 0, left: 0, itemGap: 14, itemHeight: 10,
        textStyle: { color: style.ink, fontSize: 0.8 * style.root }, data: names },
      tooltip: { ...tip(style), trigger: "item", formatter: (p) => (p.data && p.data.tip) || "" },
      xAxis: axis(style, { type: "value", scale: true, splitNumber: width < 420 ? 3 : 6,
        name: unitName, nameLocation: "end", nameGap: 8, nameTextStyle: { align: "right",
          verticalAlign: "top", padding: [22, 0, 0, 0], color: style.soft, fontSize: small },
        splitLine: { show: false } }),
      yAxis: axis(style, { type: "log", min: floor, axisLabel: { color: style.soft,
        fontSize: small, showMinLabel: false, formatter: (v) => number(v, 2) } }),
    };
  }

  /** Standard errors of measured points, as a series. */
  function whiskers(color, list, x, up) {
    return { type: "custom", silent: true, itemStyle: { color },
      data: list.map((p) => [x(p), up(p.measured.mean - p.measured.error),
        up(p.measured.mean + p.measured.error)]),
      renderItem: (params, api) => {
        const low = api.coord([api.value(0), api.value(1)]);
        const high = api.coord([api.value(0), api.value(2)]);
        return { type: "line", silent: true, style: { stroke: color, lineWidth: 1.5 },
          shape: { x1: low[0], y1: low[1], x2: high[0], y2: high[1] } };
      } };
  }

  /** Where losses end on a logarithmic axis: what is less is drawn there. */
  function floorOf(losses) {
    const values = losses.filter((v) => v > 0);
    const top = values.length ? Math.max(...values) : 1;
    return Math.max(values.length ? Math.min(...values) / 2 : 1e-6, top * 1e-6);
  }

  /** Average bit-widths from cheapest to dearest, closer together where the loss is steep. */
  function averages([low, high], count) {
    return Array.from({ length: count }, (_, k) => low + (high - low) * (k / (count - 1)) ** 1.5);
  }

  /** What a point takes of everything: `10.1 KiB, 72.4 µs`. */
  const spentText = (measures, p) => measures.map((m) => m.text(m.of(p))).join(", ");

  function frontierChart(doc, state) {
    const label = "Frontier: size of the stored weights against loss increase";
    const measures = measuresOf(doc);
    let [along, beside] = measures;
    const said = (p) => spentText(measures, p);
    const drawn = chart(label, "frontier", (style, width) => {
      const here = (list) => list.filter((p) => !Number.isNaN(along.of(p)));
      const points = here(state.points).sort((a, b) => along.of(a) - along.of(b));
      const measured = here(state.plans.filter((p) => p.measured));
      const baselines = here(state.baselines);
      const floor = floorOf([
        ...points.map((p) => p.predicted), ...measured.map((p) => p.measured.mean),
        ...baselines.map((b) => b.measured.mean),
      ]);
      const up = (v) => Math.max(v, floor);
      const all = points.concat(measured, baselines);
      const [unit, unitName] = along.scale(Math.max(0, ...all.map(along.of)));
      const x = (p) => along.of(p) / unit;
      // The dots of the frontier grow with what the axis does not show.
      const besides = beside ? points.map(beside.of).filter((v) => !Number.isNaN(v)) : [];
      const least = Math.min(...besides);
      const span = Math.max(...besides) - least || 1;
      const dot = (p) => (besides.length && !Number.isNaN(beside.of(p))
        ? DOT + (LARGER_DOT - DOT) * (beside.of(p) - least) / span : DOT);
      // A bound below zero says nothing on a logarithmic axis.
      // Bounds are of sizes.
      const bySize = along === measures[0];
      const proved = bySize ? points.filter((p) => p.bound !== null && p.bound > 0) : [];
      // A proved optimum has no band to see.
      const band = proved.length > 1 && proved.some((p) => p.bound < 0.99 * p.predicted);
      const dots = (list, value, shown) => list.map((p) => ({
        value: [x(p), up(value(p))], tip: shown(p), average: p.average_bits }));
      const current = state.current;
      const named = ["predicted", ...(band ? ["certificate"] : []),
        ...(measured.length ? ["plan, measured"] : []),
        ...(baselines.length ? ["baseline, measured"] : []), ...(current ? ["slider"] : [])];
      return {
        ...lossAxes(style, width, named, unitName, floor),
        series: [
          { name: "certificate", type: "custom", silent: true, itemStyle: { color: style.accent },
            data: band ? [[x(proved[0]), up(proved[0].predicted)]] : [],
            renderItem: (params, api) => ({ type: "polygon", silent: true,
              shape: { points: [
                ...proved.map((p) => api.coord([x(p), up(p.predicted)])),
                ...proved.slice().reverse().map((p) => api.coord([x(p), up(p.bound)])),
              ] }, style: { fill: style.accent, opacity: 0.25 } }) },
          { name: "predicted", type: "line",
            symbolSize: (value, { dataIndex }) => dot(points[dataIndex]),
            itemStyle: { color: style.accent }, lineStyle: { width: bySize ? 2 : 0, color: style.accent },
            data: dots(points, (p) => p.predicted, (p) => `average bit-width ${number(p.average_bits)}, `
              + `${said(p)}\npredicted ${number(p.predicted)}`
              + (p.bound === null ? "" : `, never below ${number(p.bound)}`)) },
          { name: "baseline, measured", ...whiskers(style.soft, baselines, x, up) },
          { name: "baseline, measured", type: "scatter", symbol: "emptyCircle", symbolSize: 9,
            itemStyle: { color: style.soft },
            data: dots(baselines, (b) => b.measured.mean, (b) => `${b.name}: `
              + `${said(b)}\nmeasured ${withError(b.measured.mean, b.measured.error)}`) },
          { name: "plan, measured", ...whiskers(style.second, measured, x, up) },
          { name: "plan, measured", type: "scatter", symbol: "diamond", symbolSize: 13,
            itemStyle: { color: style.second },
            data: dots(measured, (p) => p.measured.mean, (p) => `plan for ${p.budget}: `
              + `${said(p)}\nmeasured ${withError(p.measured.mean, p.measured.error)}`) },
          { name: "slider", type: "scatter", symbol: "circle", symbolSize: 15, z: 5,
            itemStyle: { color: "rgba(0,0,0,0)", borderColor: style.ink, borderWidth: 2.5 },
            data: current && here([current]).length ? dots([current], (p) => p.predicted, (p) => `slider: `
              + `${said(p)}\npredicted ${number(p.predicted)}`) : [] },
        ],
      };
    });
    const id = fresh("along");
    const note = make("span", { class: "note" });
    const tell = () => {
      note.textContent = `Larger dots ${beside.more}.`;
    };
    const choice = measures.length < 2 ? null : make("div", { class: "controls" },
      make("label", { for: id }, "Against ", make("select", { id, onchange: (e) => {
        along = measures[Number(e.target.value)];
        beside = along === measures[0] ? measures[1] : measures[0];
        tell();
        drawn.draw();
      } }, ...measures.map((m, k) => make("option", { value: k }, m.name)))), note);
    if (choice) tell();
    const rows = () => [
      ...state.points.map((p) => ({ of: p, what: "predicted",
        name: `${number(p.average_bits)} bits`, value: p.predicted, error: null, bound: p.bound })),
      ...state.plans.filter((p) => p.measured).map((p) => ({ of: p, what: "plan, measured",
        name: p.budget, value: p.measured.mean, error: p.measured.error,
        bound: null, accuracy: p.measured.accuracy })),
      ...state.baselines.map((b) => ({ of: b, what: "baseline, measured", name: b.name,
        value: b.measured.mean, error: b.measured.error, bound: null,
        accuracy: b.measured.accuracy })),
    ];
    let listed = rows();
    const points = folded("All points as a table", () => table({
      caption: "Points of the frontier", count: listed.length,
      filterBy: (k) => listed[k].name,
      columns: [
        { name: "Point", value: (k) => listed[k].name, text: (k) => listed[k].name },
        { name: "Kind", value: (k) => listed[k].what, text: (k) => listed[k].what },
        ...measures.map((m) => ({ name: m.name, numeric: true, value: (k) => m.of(listed[k].of),
          text: (k) => m.text(m.of(listed[k].of)) })),
        { name: "Loss increase", numeric: true, value: (k) => listed[k].value,
          text: (k) => withError(listed[k].value, listed[k].error) },
        { name: "Never below", numeric: true, value: (k) => listed[k].bound,
          text: (k) => number(listed[k].bound) },
        { name: "Accuracy", numeric: true, value: (k) => listed[k].accuracy ?? null,
          text: (k) => listed[k].accuracy == null ? "–"
            : `${(100 * listed[k].accuracy).toFixed(2)} %` },
      ],
    }));
    const pick = (act) => drawn.on("click", (p) => p.data && p.data.average
      && act(p.data.average));
    return { place: make("div", {}, choice, drawn.place), table: points.element, pick, draw: () => {
      listed = rows();
      drawn.draw();
      const first = state.points[0];
      const last = state.points[state.points.length - 1];
      drawn.label(first ? `${label}. From ${bytes(first.size_bits)} with a predicted loss of `
        + `${number(first.predicted)} to ${bytes(last.size_bits)} with ${number(last.predicted)}; `
        + `the table below lists all points.` : `${label}. The table below lists all points.`);
      points.update(listed.length);
    } };
  }

  Object.assign(globalThis.Bitquota, {
    averages, floorOf, frontierChart, lossAxes, measuresOf, spentText, whiskers,
  });
})();
