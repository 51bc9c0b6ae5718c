/* Comparison page: the plans of several jobs in one table, their frontiers in one drawing. */
(() => {
  "use strict";

  const {
    make, number, bytes, withError, chart, planTable, averages, floorOf, lossAxes, measuresOf, whiskers,
  } = globalThis.Bitquota;
  const { call, data } = globalThis.Pages;
  const POINTS = 9;
  const POINT_S = 0.2;
  const SYMBOLS = ["circle", "diamond", "rect", "triangle", "pin", "arrow"];
  const LINES = ["solid", "dashed", "dotted", [8, 3, 2, 3], [2, 6], [12, 4]];

  const runs = data();
  const problem = document.getElementById("compare-problem");
  // Two jobs of one name are told apart by the ends of their ids.
  const plain = runs.map((run) => run.labels.name || run.model || run.id);
  const names = plain.map((name, k) => (
    plain.indexOf(name) === plain.lastIndexOf(name) ? name : `${name} (${runs[k].id.slice(-6)})`));

  // ------------------------------------------------------------------ the drawing

  function colours(style) {
    return [style.accent, style.second, style.warn, style.ink, style.soft, style.accent];
  }

  const points = runs.map(() => []);
  const units = new Set(runs.flatMap((run) => run.plans.map((p) => `${p.loss}, ${p.unit}`)));
  const overlay = chart("Frontiers: size of the stored weights against loss increase", "frontier",
    (style, width) => {
      const measured = runs.map((run) => run.plans.filter((p) => p.measured));
      const shown = points.concat(measured).flat();
      const floor = floorOf([...points.flat().map((p) => p.predicted),
        ...measured.flat().map((p) => p.measured.mean)]);
      const up = (v) => Math.max(v, floor);
      const [size] = measuresOf({});
      const [unit, unitName] = size.scale(Math.max(0, ...shown.map(size.of)));
      const x = (p) => size.of(p) / unit;
      const series = runs.flatMap((run, k) => {
        const color = colours(style)[k];
        const common = { name: names[k], itemStyle: { color } };
        return [
          { ...common, type: "line", symbol: SYMBOLS[k], symbolSize: 5,
            lineStyle: { color, width: 2, type: LINES[k] },
            data: points[k].map((p) => ({ value: [x(p), up(p.predicted)],
              tip: `${names[k]}: ${bytes(p.size_bits)}\npredicted ${number(p.predicted)}` })) },
          { ...common, ...whiskers(color, measured[k], x, up) },
          { ...common, type: "scatter", symbol: SYMBOLS[k], symbolSize: 13,
            data: measured[k].map((p) => ({ value: [x(p), up(p.measured.mean)],
              tip: `${names[k]}, plan for ${p.budget}: ${bytes(p.size_bits)}\n`
                + `measured ${withError(p.measured.mean, p.measured.error)}` })) },
        ];
      });
      return {
        ...lossAxes(style, width, names, unitName, floor),
        series,
      };
    });

  /** The points of one job's frontier; sizes are those of the choices found. */
  async function frontierOf(run) {
    // Rounded up, so that the smallest choice fits.
    const budgets = averages(run.range, POINTS).map((a) => Math.ceil(a * 100) / 100);
    const answer = await call("/v1/solve", { method: "POST", body: { job: run.id,
      budgets: budgets.map((a) => `${a.toFixed(2)} bits`), time_limit_s: POINT_S } });
    const found = answer.data.filter((solved) => solved.predicted !== null).map((solved) => ({
      predicted: solved.predicted,
      size_bits: Object.values(solved.assignments).reduce((sum, c) => sum + c.size_bits, 0),
    }));
    return found.sort((a, b) => a.size_bits - b.size_bits);
  }

  async function begin() {
    const place = document.getElementById("overlay");
    if (units.size > 1) {
      place.append(make("p", { class: "problem" },
        `These jobs measured different losses (${[...units].join("; ")}): their heights cannot be `
        + "compared."));
    }
    const [unit] = runs.flatMap((run) => run.plans.map((plan) => plan.unit)).filter(Boolean);
    place.append(make("h3", {}, `Loss increase${unit ? ` (${unit})` : ""} against stored size`),
      overlay.place);
    overlay.draw();
    for (const [k, run] of runs.entries()) {
      if (!run.range) continue;
      try {
        points[k] = await frontierOf(run);
      } catch (reason) {
        problem.textContent = `${names[k]}: ${reason.message}`;
        problem.hidden = false;
      }
      overlay.draw();
    }
    place.setAttribute("aria-busy", "false");
    place.dataset.ready = "true";
    overlay.label(`Frontiers of ${names.join(", ")}: size of the stored weights against loss `
      + "increase. The table below lists the measured plans.");
  }

  // ------------------------------------------------------------------ the table

  const plans = runs.flatMap((run, k) => run.plans.map((plan) => ({ ...plan, job: run.id,
    name: names[k], model_name: run.model, target: run.target || plan.target, effort: run.effort,
    rounding: run.rounding, created_at: 1000 * run.created_at })));
  document.getElementById("plans").append(planTable("Plans of all jobs compared", plans));

  begin();
})();
