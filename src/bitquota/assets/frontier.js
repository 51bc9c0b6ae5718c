/* The frontier: size against predicted and measured loss, with the certificate. */
(() => {
  "use strict";

  const {
    number, bytes, withError, chart, tip, axis, legendRows, folded, table,
  } = globalThis.Bitquota;

  function frontierChart(doc, state) {
    const label = "Frontier: size of the stored weights against loss increase";
    const drawn = chart(label, "frontier", (style, width) => {
      const points = state.points;
      const measured = state.plans.filter((p) => p.measured);
      const baselines = state.baselines;
      const values = [
        ...points.map((p) => p.predicted), ...measured.map((p) => p.measured.mean),
        ...baselines.map((b) => b.measured.mean),
      ].filter((v) => v > 0);
      const top = values.length ? Math.max(...values) : 1;
      const floor = Math.max(values.length ? Math.min(...values) / 2 : 1e-6, top * 1e-6);
      const up = (v) => Math.max(v, floor);
      const kib = (bits) => bits / 8 / 1024;
      const large = top > 0 && points.concat(measured, baselines)
        .some((p) => kib(p.size_bits) > 4096);
      const unit = large ? 1024 : 1;
      const x = (bits) => kib(bits) / unit;
      // A bound below zero says nothing on a logarithmic axis.
      const proved = points.filter((p) => p.bound !== null && p.bound > 0);
      const dots = (list, value, shown) => list.map((p) => ({
        value: [x(p.size_bits), up(value(p))], tip: shown(p), average: p.average_bits }));
      const bar = (list) => list.map((p) => [
        x(p.size_bits), up(p.measured.mean - p.measured.error),
        up(p.measured.mean + p.measured.error)]);
      const whisker = (color) => (params, api) => {
        const low = api.coord([api.value(0), api.value(1)]);
        const high = api.coord([api.value(0), api.value(2)]);
        return { type: "line", silent: true, style: { stroke: color, lineWidth: 1.5 },
          shape: { x1: low[0], y1: low[1], x2: high[0], y2: high[1] } };
      };
      const current = state.current;
      const named = ["predicted", ...(proved.length > 1 ? ["certificate"] : []),
        ...(measured.length ? ["plan, measured"] : []),
        ...(baselines.length ? ["baseline, measured"] : []), ...(current ? ["slider"] : [])];
      return {
        grid: { left: 8, right: 16, top: legendRows(style, width, named) * 1.7 * style.root + 12,
          bottom: 30, containLabel: true },
        legend: { top: 0, left: 0, itemGap: 14, itemHeight: 10,
          textStyle: { color: style.ink, fontSize: 0.8 * style.root }, data: named },
        tooltip: { ...tip(style), trigger: "item",
          formatter: (p) => (p.data && p.data.tip) || "" },
        xAxis: axis(style, { type: "value", scale: true, splitNumber: width < 420 ? 3 : 6, name: large ? "MiB stored" : "KiB stored",
          nameLocation: "end", nameGap: 8, nameTextStyle: { align: "right",
            verticalAlign: "top", padding: [22, 0, 0, 0], color: style.soft,
            fontSize: 0.78 * style.root }, splitLine: { show: false } }),
        yAxis: axis(style, { type: "log", min: floor,
          axisLabel: { color: style.soft, fontSize: 0.78 * style.root, showMinLabel: false,
            formatter: (v) => number(v, 2) } }),
        series: [
          { name: "certificate", type: "custom", silent: true, itemStyle: { color: style.accent },
            data: proved.length > 1 ? [[x(proved[0].size_bits), up(proved[0].predicted)]] : [],
            renderItem: (params, api) => ({ type: "polygon", silent: true,
              shape: { points: [
                ...proved.map((p) => api.coord([x(p.size_bits), up(p.predicted)])),
                ...proved.slice().reverse().map((p) => api.coord([x(p.size_bits), up(p.bound)])),
              ] }, style: { fill: style.accent, opacity: 0.25 } }) },
          { name: "predicted", type: "line", symbolSize: 5,
            itemStyle: { color: style.accent }, lineStyle: { width: 2, color: style.accent },
            data: dots(points, (p) => p.predicted, (p) => `${number(p.average_bits)} bits per `
              + `weight, ${bytes(p.size_bits)}\npredicted ${number(p.predicted)}`
              + (p.bound === null ? "" : `, never below ${number(p.bound)}`)) },
          { name: "baseline, measured", type: "custom", silent: true, data: bar(baselines),
            itemStyle: { color: style.soft }, renderItem: whisker(style.soft) },
          { name: "baseline, measured", type: "scatter", symbol: "emptyCircle", symbolSize: 9,
            itemStyle: { color: style.soft },
            data: dots(baselines, (b) => b.measured.mean, (b) => `${b.name}: `
              + `${bytes(b.size_bits)}\nmeasured ${withError(b.measured.mean, b.measured.error)}`) },
          { name: "plan, measured", type: "custom", silent: true, data: bar(measured),
            itemStyle: { color: style.second }, renderItem: whisker(style.second) },
          { name: "plan, measured", type: "scatter", symbol: "diamond", symbolSize: 13,
            itemStyle: { color: style.second },
            data: dots(measured, (p) => p.measured.mean, (p) => `plan for ${p.budget}: `
              + `${bytes(p.size_bits)}\nmeasured ${withError(p.measured.mean, p.measured.error)}`) },
          { name: "slider", type: "scatter", symbol: "circle", symbolSize: 15, z: 5,
            itemStyle: { color: "rgba(0,0,0,0)", borderColor: style.ink, borderWidth: 2.5 },
            data: current ? dots([current], (p) => p.predicted, (p) => `slider: `
              + `${bytes(p.size_bits)}\npredicted ${number(p.predicted)}`) : [] },
        ],
      };
    });
    const rows = () => [
      ...state.points.map((p) => ({ what: "predicted", name: `${number(p.average_bits)} bits`,
        size: p.size_bits, value: p.predicted, error: null, bound: p.bound })),
      ...state.plans.filter((p) => p.measured).map((p) => ({ what: "plan, measured",
        name: p.budget, size: p.size_bits, value: p.measured.mean, error: p.measured.error,
        bound: null, accuracy: p.measured.accuracy })),
      ...state.baselines.map((b) => ({ what: "baseline, measured", name: b.name,
        size: b.size_bits, value: b.measured.mean, error: b.measured.error, bound: null,
        accuracy: b.measured.accuracy })),
    ];
    let listed = rows();
    const points = folded("All points as a table", () => table({
      caption: "Points of the frontier", count: listed.length,
      filterBy: (k) => listed[k].name,
      columns: [
        { name: "Point", value: (k) => listed[k].name, text: (k) => listed[k].name },
        { name: "Kind", value: (k) => listed[k].what, text: (k) => listed[k].what },
        { name: "Stored weights", numeric: true, value: (k) => listed[k].size,
          text: (k) => bytes(listed[k].size) },
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
    return { place: drawn.place, table: points.element, pick, draw: () => {
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

  Object.assign(globalThis.Bitquota, { frontierChart });
})();
