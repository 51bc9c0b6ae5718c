/* Everything together: the slider, and mount(root, document, hooks).
 *
 *   hooks.solve(average, seconds, signal) -> Promise of a point, for a slider that solves anew;
 *     without it the slider moves along the points of the document's frontier
 *   hooks.points(add) -> called once to fetch the points of the frontier
 *   hooks.cross(at, signal) -> Promise of a map; without it the maps lie in the document
 *   hooks.graph() -> Promise of the order and the edges of layers
 *   hooks.measure(average) -> orders a measured plan, if there is a way to
 */
(() => {
  "use strict";

  const {
    make, fresh, decode, number, figure, frontierChart, measuresOf, spentText, bars, sideBySide,
    sensitivities, crossTerms, comparison, layerGraph,
  } = globalThis.Bitquota;
  const DEBOUNCE_MS = 20;
  const CALM_MS = 120;
  const QUICK_S = 0.03;
  const THOROUGH_S = 2;
  const IDLE_MS = 500;

  function sliderOf(doc, state, hooks, changed) {
    const ends = state.range;
    const measures = measuresOf(doc);
    const id = fresh("slider");
    const shown = make("output", { for: id, "aria-live": "polite", class: "facts" });
    const discrete = !hooks.solve;
    const input = make("input", discrete
      ? { id, type: "range", min: 0, max: Math.max(0, state.points.length - 1), step: 1,
        value: 0, class: "budget" }
      : { id, type: "range", min: ends[0], max: ends[1], step: 0.01, value: ends[2],
        class: "budget" });
    let timer = 0;
    let idle = 0;
    let moved = -Infinity;
    let running = null;

    /** Shows the plan for the slider at `asked`: it may have moved on before the answer came. */
    function say(point, thorough, asked) {
      if (!point) return;
      const gap = point.bound === null || point.bound === undefined ? ""
        : point.predicted - point.bound <= 1e-4 * Math.abs(point.predicted)
          ? ", proved best"
          : number(point.predicted) === number(point.bound) ? ", proved best to these digits"
            : `, nothing is below ${number(point.bound)}`;
      const text = `average bit-width ${point.average_bits.toFixed(2)}: ${spentText(measures, point)}, `
        + `predicted loss ${number(point.predicted)}${gap}${thorough ? "" : " …"}`;
      shown.textContent = text;
      input.setAttribute("aria-valuetext", text);
      input.dataset.solved = asked;
    }
    async function solve(seconds) {
      if (running) running.abort();
      running = new AbortController();
      const { signal } = running;
      const asked = input.value;
      try {
        const point = await hooks.solve(Number(asked), seconds, signal);
        if (signal.aborted) return;
        state.current = point;
        say(point, seconds === THOROUGH_S, asked);
        changed();
      } catch (reason) {
        if (reason.name !== "AbortError") shown.textContent = reason.message;
      }
    }
    input.addEventListener("input", () => {
      clearTimeout(timer);
      clearTimeout(idle);
      if (discrete) {
        state.current = state.points[Number(input.value)] || null;
        say(state.current, true, input.value);
        changed();
        return;
      }
      // The first move is answered at once; of many in a row only the last of each moment.
      const calm = performance.now() - moved > CALM_MS;
      moved = performance.now();
      if (calm) solve(QUICK_S);
      else timer = setTimeout(() => solve(QUICK_S), DEBOUNCE_MS);
      idle = setTimeout(() => solve(THOROUGH_S), IDLE_MS);
    });
    const label = make("label", { for: id }, "Average bit-width");
    const measure = hooks.measure
      ? make("button", { type: "button", onclick: () => hooks.measure(Number(input.value)) },
        "Measure this plan") : null;
    const nearest = (wanted) => state.points.reduce((best, p, k) => (
      Math.abs(p.average_bits - wanted) < Math.abs(state.points[best].average_bits - wanted)
        ? k : best), 0);
    return { element: make("div", { class: "slider" }, label, input, shown, measure),
      set: (average) => {
        input.value = discrete ? nearest(average) : average;
        input.dispatchEvent(new Event("input"));
      },
      start: () => {
        if (!discrete) return solve(THOROUGH_S);
        const near = nearest(ends[2]);
        input.value = near;
        state.current = state.points[near] || null;
        say(state.current, true, input.value);
        changed();
        return null;
      } };
  }

  /** Averages at the cheapest and the dearest candidates, and where the slider begins. */
  function rangeOf(doc) {
    const weights = doc.layers.weights;
    const total = weights.reduce((a, b) => a + b, 0);
    let low = 2;
    let high = 8;
    if (doc.matrix) {
      // Pinned layers move both ends; the values say which candidates each group has.
      const { bits, groups, members } = doc.matrix;
      const values = decode(doc.matrix.values);
      const sums = [0, 0];
      const index = new Map(doc.layers.names.map((n, k) => [n, k]));
      groups.forEach((group, g) => {
        const own = bits.filter((_, c) => !Number.isNaN(values[g * bits.length + c]));
        for (const name of members ? members[g] : [group]) {
          const n = weights[index.get(name)] || 0;
          sums[0] += n * Math.min(...own);
          sums[1] += n * Math.max(...own);
        }
      });
      low = Math.ceil((sums[0] / total) * 100) / 100;
      high = Math.ceil((sums[1] / total) * 100) / 100;
    }
    const start = doc.plans.length ? doc.plans[0].average_bits : (low + high) / 2;
    return [low, high, Math.min(high, Math.max(low, Math.round(start * 100) / 100))];
  }

  function mount(root, doc, hooks = {}) {
    const state = {
      plans: doc.plans, points: doc.frontier.slice(), current: null, range: rangeOf(doc),
      baselines: [],
    };
    const known = new Set();
    for (const plan of doc.plans) {
      for (const b of plan.baselines) {
        const key = `${b.name} ${b.size_bits} ${b.measured.mean}`;
        if (!known.has(key)) {
          known.add(key);
          state.baselines.push(b);
        }
      }
    }
    const parts = [];
    const later = [];
    if (doc.plans.length || doc.matrix || doc.frontier.length) {
      const curve = frontierChart(doc, state);
      const chosen = bars(doc, state);
      const pair = sideBySide(doc, state);
      let rest = 0;
      let graph = null;
      const changed = () => {
        chosen.draw();
        // The bars are what the eye follows; the rest comes a frame later.
        cancelAnimationFrame(rest);
        rest = requestAnimationFrame(() => {
          curve.draw();
          if (pair.follows()) pair.show();
          if (graph) graph.draw();
        });
      };
      if (!doc.matrix || (!hooks.solve && !state.points.length)) {
        state.current = doc.plans[0] || null;
      }
      const slides = hooks.solve ? Boolean(doc.matrix) : state.points.length > 1;
      const slider = slides ? sliderOf(doc, state, hooks, changed) : null;
      parts.push(figure("Choose a plan",
        "Each predicted point is the best choice of bits for its size. Measured points ran on the model; "
        + "the line is what the sensitivities predict, the band how far below it anything can be.",
        make("div", { class: "choose" },
          make("div", {}, make("h3", {}, `Loss increase (${doc.unit})`),
            curve.place, curve.table),
          make("div", {}, slider ? slider.element : null, chosen.place, chosen.table))));
      if (doc.plans.length || slides) parts.push(pair.section);
      if (hooks.graph) {
        const host = make("div");
        parts.push(host);
        later.push(() => hooks.graph().then((found) => {
          graph = layerGraph(doc, state, found);
          host.replaceChildren(graph.section);
          graph.draw();
          host.dataset.graph = "true";
        }, (reason) => host.replaceChildren(make("p", { class: "problem" }, reason.message))));
      }
      later.push(() => {
        changed();
        pair.show();
        if (slider) {
          slider.start();
          curve.pick(slider.set);
        }
        if (hooks.points) {
          hooks.points((points) => {
            state.points = state.points.concat(points).sort((a, b) => a.size_bits - b.size_bits);
            curve.draw();
          });
        }
      });
    }
    if (doc.matrix) {
      const alone = sensitivities(doc);
      parts.push(alone.section);
      later.push(alone.draw);
      if (hooks.cross ? doc.matrix.maps.length : doc.cross && Object.keys(doc.cross).length) {
        const cross = crossTerms(doc, hooks);
        parts.push(cross.section);
        later.push(cross.load);
      }
    }
    if (doc.comparison) {
      for (const one of comparison(doc)) {
        parts.push(one.section);
        later.push(one.draw);
      }
    }
    root.replaceChildren(...parts);
    later.forEach((act) => act());
    root.dataset.ready = "true";
    return state;
  }

  Object.assign(globalThis.Bitquota, { mount });
})();
