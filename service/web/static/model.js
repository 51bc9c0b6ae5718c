/* Model page: gets the charts' document and lets the slider solve anew. */
(() => {
  "use strict";

  const { averages, make, mount } = globalThis.Bitquota;
  const { call, data } = globalThis.Pages;
  const POINTS = 21;
  const POINTS_OF_LARGE = 9;
  const LARGE = 600;
  const AT_ONCE = 3;
  const POINT_S = 0.2;

  const root = document.getElementById("charts");
  const id = root.dataset.job;
  const problem = document.getElementById("model-problem");
  const { job, may_write: mayWrite } = data();

  function complain(text) {
    problem.textContent = text;
    problem.hidden = !text;
  }

  // On average over rows of several bit-widths, or over weights of which half are left out.
  const bitsOf = (chosen) => chosen.mean_bits ?? chosen.weight_bits;

  const labelOf = (chosen) => (chosen.sparsity ? `W${chosen.weight_bits}:${chosen.sparsity}`
    : `W${Number(bitsOf(chosen).toPrecision(4))}`) + (chosen.activation_bits == null ? "" : `A${chosen.activation_bits}`);

  function pointOf(doc, solved) {
    if (solved.predicted === null) {
      throw new Error(`No plan was found for ${solved.budget}: ${solved.status}.`);
    }
    const bits = [];
    const labels = [];
    let size = 0;
    let codes = 0;
    let weights = 0;
    doc.layers.names.forEach((name, k) => {
      const chosen = solved.assignments[name];
      bits.push(chosen ? bitsOf(chosen) : 0);
      labels.push(chosen ? labelOf(chosen) : null);
      if (!chosen) return;
      size += chosen.size_bits;
      codes += bitsOf(chosen) * doc.layers.weights[k];
      weights += doc.layers.weights[k];
    });
    return { bits, labels, size_bits: size, average_bits: codes / weights, predicted: solved.predicted,
      bound: solved.bound };
  }

  async function solve(doc, budgets, seconds, signal) {
    const answer = await call("/v1/solve", { method: "POST", signal, body: {
      job: id, budgets: budgets.map((a) => `${a.toFixed(2)} bits`), time_limit_s: seconds,
    } });
    return answer.data.map((solved) => pointOf(doc, solved));
  }

  async function begin() {
    const doc = await call(`/jobs/${id}/charts.json`);
    const hooks = {};
    if (job.results.inventory) hooks.graph = () => call(`/jobs/${id}/graph.json`);
    if (doc.matrix) {
      hooks.solve = async (average, seconds, signal) =>
        (await solve(doc, [average], seconds, signal))[0];
      hooks.cross = (at, signal) =>
        call(`/jobs/${id}/cross.json?at=${encodeURIComponent(at)}`, { signal });
      hooks.points = async (add) => {
        const count = doc.layers.names.length > LARGE ? POINTS_OF_LARGE : POINTS;
        const wanted = averages(state.range, count);
        for (let k = 0; k < wanted.length; k += AT_ONCE) {
          try {
            add(await solve(doc, wanted.slice(k, k + AT_ONCE), POINT_S));
          } catch (reason) {
            complain(reason.message);
            return;
          }
        }
        root.dataset.frontier = "true";
      };
      if (mayWrite && job.model && job.dataset && job.kind === "plan") {
        hooks.measure = async (average) => {
          try {
            const made = await call("/v1/jobs", { method: "POST", body: {
              kind: "plan", model: job.model, dataset: job.dataset,
              request: { ...job.request, budgets: [`${average.toFixed(2)} bits`] },
              labels: job.labels,
            } });
            location.assign(`/jobs/${made.id}`);
          } catch (reason) {
            complain(reason.message);
          }
        };
      }
    }
    let state = null;
    const points = hooks.points;
    if (points) hooks.points = (add) => setTimeout(() => points(add), 0);
    state = mount(root, doc, hooks);
    root.setAttribute("aria-busy", "false");
  }

  begin().catch((reason) => {
    root.replaceChildren();
    complain(reason.message);
  });

  const exporting = document.getElementById("export");
  if (exporting) {
    const plans = document.getElementById("export-plan");
    const targets = document.getElementById("export-target");
    const refused = document.getElementById("refused");
    /** Offer what can hold the plan that is chosen, and say of the rest why it cannot. */
    const offer = () => {
      const list = refused.querySelector("dl");
      list.replaceChildren();
      for (const option of targets.options) {
        const why = JSON.parse(option.dataset.refused)[plans.selectedIndex];
        option.disabled = why !== null;
        if (why !== null) list.append(make("dt", {}, option.text), make("dd", {}, `${why}.`));
      }
      if (targets.selectedOptions[0]?.disabled) {
        targets.selectedIndex = [...targets.options].findIndex((option) => !option.disabled);
      }
      refused.hidden = !list.children.length;
    };
    plans.addEventListener("change", offer);
    offer();
    exporting.addEventListener("submit", async (event) => {
      event.preventDefault();
      try {
        const plan = document.getElementById("export-plan");
        const { quantized } = plan.selectedOptions[0].dataset;
        const made = await call("/v1/jobs", { method: "POST", body: {
          kind: "export", model: job.model, dataset: job.dataset, labels: job.labels,
          plan: plan.value, quantized: quantized ? [quantized] : [],
          request: JSON.parse(document.getElementById("export-target").value),
        } });
        location.assign(`/jobs/${made.id}`);
      } catch (reason) {
        complain(reason.message);
      }
    });
  }
})();
