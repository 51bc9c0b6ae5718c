/* A comparison of metrics: what the plan of each one lost when it was measured. */
(() => {
  "use strict";

  const { number, bytes, withError, chart, tip, axis, figure, folded, table } = globalThis.Bitquota;

  function comparison(doc) {
    const found = doc.comparison;
    const sections = found.budgets.map((budget, k) => {
      const entries = found.entries.filter((e) => e.plans[k])
        .sort((a, b) => a.plans[k].mean - b.plans[k].mean);
      const drawn = chart(`Measured loss increase of every method at ${budget}`, "methods",
        (style) => {
          const positive = entries.map((e) => e.plans[k].mean).filter((v) => v > 0);
          const floor = (positive.length ? Math.min(...positive) : 1) / 2;
          return {
            grid: { left: 14, right: 60, top: 8, bottom: 28, containLabel: true },
            tooltip: { ...tip(style), trigger: "item", formatter: (p) => {
              const plan = entries[p.dataIndex].plans[k];
              return `${entries[p.dataIndex].name}: ${bytes(plan.size_bits)}\nmeasured `
                + withError(plan.mean, plan.error);
            } },
            xAxis: axis(style, { type: "log", min: floor,
              axisLabel: { color: style.soft, fontSize: 0.78 * style.root,
                formatter: (v) => number(v, 2) } }),
            yAxis: axis(style, { type: "category", inverse: true, data: entries.map((e) => e.name),
              axisLabel: { color: style.ink, fontSize: 0.8 * style.root, width: 11 * style.root,
                overflow: "truncate" } }),
            // Points, not bars: a logarithmic axis has no zero for a bar to begin at.
            series: [
              { type: "custom", silent: true, encode: { x: [0, 1], y: 2 },
                data: entries.map((e, at) => [Math.max(e.plans[k].mean - e.plans[k].error, floor),
                  Math.max(e.plans[k].mean + e.plans[k].error, floor), at]),
                renderItem: (params, api) => {
                  const from = api.coord([api.value(0), api.value(2)]);
                  const to = api.coord([api.value(1), api.value(2)]);
                  return { type: "line", silent: true,
                    style: { stroke: style.soft, lineWidth: 2 },
                    shape: { x1: from[0], y1: from[1], x2: to[0], y2: to[1] } };
                } },
              { type: "scatter", symbolSize: 11, data: entries.map((e) => ({
                value: [Math.max(e.plans[k].mean, floor), e.name], symbol: e.kind === "baseline"
                  ? "emptyCircle" : "circle", itemStyle: { opacity: 1,
                  color: e.plans[k].ties || e === entries[0] ? style.second : style.accent } })),
              label: { show: true, position: "top", distance: 1, color: style.ink,
                fontSize: 0.75 * style.root, formatter: (p) =>
                  number(entries[p.dataIndex].plans[k].mean) } }],
          };
        });
      drawn.place.style.height = `${2.3 * entries.length + 3}rem`;
      const rows = folded("All methods as a table", () => table({
        caption: `Methods at ${budget}`, count: entries.length, filterBy: (j) => entries[j].name,
        columns: [
          { name: "Method", value: (j) => entries[j].name, text: (j) => entries[j].name },
          { name: "Known as", value: (j) => entries[j].known_as, text: (j) => entries[j].known_as },
          { name: "Stored weights", numeric: true, value: (j) => entries[j].plans[k].size_bits,
            text: (j) => bytes(entries[j].plans[k].size_bits) },
          { name: "Loss increase", numeric: true, value: (j) => entries[j].plans[k].mean,
            text: (j) => withError(entries[j].plans[k].mean, entries[j].plans[k].error) },
          { name: "Accuracy", numeric: true, value: (j) => entries[j].plans[k].accuracy,
            text: (j) => entries[j].plans[k].accuracy == null ? "–"
              : `${(100 * entries[j].plans[k].accuracy).toFixed(2)} %` },
          { name: "Rank correlation", numeric: true, value: (j) => entries[j].rank_correlation,
            text: (j) => number(entries[j].rank_correlation, 2) },
          { name: "Declared passes", numeric: true, value: (j) => entries[j].cost,
            text: (j) => number(entries[j].cost) },
        ],
      }));
      return { section: figure(`Methods at ${budget}`, found.verdicts[k], drawn.place,
        rows.element), draw: drawn.draw };
    });
    return sections;
  }

  Object.assign(globalThis.Bitquota, { comparison });
})();
