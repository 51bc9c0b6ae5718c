/* Page of all plans: fetched job by job from the API, narrowed by what the filters say. */
(() => {
  "use strict";

  const { make, fresh, planTable } = globalThis.Bitquota;
  const { call } = globalThis.Pages;
  const JOBS_AT_ONCE = 50;

  const place = document.getElementById("plans");
  const problem = document.getElementById("plans-problem");
  const said = document.getElementById("plans-said");
  const more = document.getElementById("plans-more");
  const rows = [];
  let cursor = null;

  const FILTERS = [
    { name: "Model", of: (row) => row.model_name || row.model || "" },
    { name: "Target", of: (row) => row.target || "any" },
    { name: "Loss", of: (row) => row.loss },
    { name: "Effort", of: (row) => row.effort || "" },
    { name: "Budget", of: (row) => row.budget },
  ];
  const chosen = FILTERS.map(() => "");
  const selects = FILTERS.map(({ name }, k) => {
    const id = fresh("filter");
    const select = make("select", { id, onchange: (event) => {
      chosen[k] = event.target.value;
      show();
    } });
    document.getElementById("plans-filters").append(make("label", { for: id }, `${name} `, select));
    return select;
  });

  /** Each filter offers what the loaded rows have. */
  function offer() {
    FILTERS.forEach(({ of }, k) => {
      const values = [...new Set(rows.map(of))].filter(Boolean).sort();
      selects[k].replaceChildren(make("option", { value: "" }, "all"),
        ...values.map((value) => make("option", { value }, value)));
      selects[k].value = chosen[k];
    });
  }

  function show() {
    const kept = rows.filter((row) => FILTERS.every(({ of }, k) => !chosen[k] || of(row) === chosen[k]));
    const jobs = new Set(rows.map((row) => row.job)).size;
    said.textContent = `${kept.length.toLocaleString("en")} of ${rows.length.toLocaleString("en")} `
      + `plans of ${jobs.toLocaleString("en")} job${jobs === 1 ? "" : "s"}${cursor ? "; older jobs are not loaded yet" : ""}`;
    place.replaceChildren(kept.length ? planTable("Plans of all jobs", kept)
      : make("p", { class: "soft" }, rows.length ? "No plan matches." : "No job has left a plan yet."));
  }

  async function load() {
    more.disabled = true;
    try {
      const query = new URLSearchParams({ limit: JOBS_AT_ONCE });
      if (cursor) query.set("cursor", cursor);
      const page = await call(`/v1/jobs/plans?${query}`);
      for (const row of page.data) {
        rows.push({ ...row, name: row.labels.name || row.model_name || row.job });
      }
      cursor = page.has_more ? page.next_cursor : null;
      offer();
      show();
    } catch (reason) {
      problem.textContent = reason.message;
      problem.hidden = false;
    }
    more.disabled = false;
    more.hidden = !cursor;
    place.setAttribute("aria-busy", "false");
    place.dataset.ready = "true";
  }

  more.addEventListener("click", load);
  load();
})();
