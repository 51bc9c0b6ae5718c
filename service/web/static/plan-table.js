/* The table of plans that the comparison and the page of all plans share.
 *
 * rows: {job, name, model_name, target, budget, effort, rounding, size_bits, average_bits, unit,
 * measured, created_at}
 */
(() => {
  "use strict";

  const { make, bytes, number, withError, table } = globalThis.Bitquota;

  function planTable(caption, rows) {
    const text = (name, get) => ({ name, value: (k) => get(rows[k]), text: (k) => get(rows[k]) });
    const figure = (name, get, show) => ({ name, numeric: true, value: (k) => get(rows[k]),
      text: (k) => (get(rows[k]) === null ? "–" : show(rows[k])) });
    const method = (row) => [row.effort, row.rounding].filter(Boolean).join(", ");
    const words = (row) => [row.name, row.model_name, row.target, row.budget, row.selected,
      method(row)].join(" ");
    return table({
      caption, count: rows.length, filterBy: (k) => words(rows[k]), filterFrom: 2, dense: true,
      columns: [
        { ...text("Job", (row) => row.name), paint: (cell, k) => cell.replaceChildren(
          make("a", { href: `/jobs/${rows[k].job}/model` }, rows[k].name)) },
        text("Model", (row) => row.model_name),
        text("Target", (row) => row.target || "any"),
        text("Budget", (row) => row.budget),
        text("Method", method),
        figure("Stored weights", (row) => row.size_bits, (row) => bytes(row.size_bits)),
        figure("Average bit-width", (row) => row.average_bits, (row) => row.average_bits.toFixed(2)),
        figure("Predicted", (row) => row.predicted, (row) => number(row.predicted)),
        figure("Loss increase", (row) => (row.measured ? row.measured.mean : null),
          (row) => withError(row.measured.mean, row.measured.error)),
        figure("Accuracy", (row) => (row.measured ? row.measured.accuracy : null),
          (row) => `${(100 * row.measured.accuracy).toFixed(2)} %`),
        figure("Begun", (row) => row.created_at,
          (row) => new Date(row.created_at).toISOString().slice(0, 10)),
      ],
    }).element;
  }

  Object.assign(globalThis.Bitquota, { planTable });
})();
