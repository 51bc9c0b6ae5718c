/* Charts of Bitquota, for the web pages and for the report file. Needs echarts.
 *
 * Bitquota.mount(root, document, hooks) draws everything that the document holds:
 *   hooks.solve(average, seconds, signal) -> Promise of a point, for a slider that solves anew;
 *     without it the slider moves along the points of the document's frontier
 *   hooks.points(add, signal) -> called once to fetch the points of the frontier
 *   hooks.cross(at, signal) -> Promise of a map; without it the maps lie in the document
 *   hooks.measure(average) -> orders a measured plan, if there is a way to
 * Text from models reaches the page as text nodes and canvas text only.
 */
(() => {
  "use strict";

  const BITS = [1, 2, 3, 4, 5, 6, 7, 8, 16];
  const PAGE_ROWS = 50;
  const MANY = 600;
  const FIRST_SHOWN = 300;
  const DEBOUNCE_MS = 20;
  const QUICK_S = 0.05;
  const THOROUGH_S = 2;
  const IDLE_MS = 500;

  // ------------------------------------------------------------------ small things

  /** Make an element; children are nodes or text. */
  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (value === null || value === undefined || value === false) continue;
      if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else element.setAttribute(name, value === true ? "" : String(value));
    }
    element.append(...children.filter((child) => child !== null && child !== undefined));
    return element;
  }

  function decode(text) {
    if (!text) return null;
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    return new Float32Array(bytes.buffer);
  }

  function number(value, digits = 3) {
    if (value === null || value === undefined || Number.isNaN(value)) return "–";
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (size >= 1e5 || size < 1e-4) {
      return value.toExponential(digits - 1).replace("e+", "e").replace("-", "−");
    }
    return String(Number(value.toPrecision(digits))).replace("-", "−");
  }

  function bytes(bits) {
    let value = Math.ceil(bits / 8);
    let unit = "B";
    for (const larger of ["KiB", "MiB", "GiB", "TiB"]) {
      if (value < 1024) break;
      value /= 1024;
      unit = larger;
    }
    return `${unit === "B" ? value : value.toFixed(value < 100 ? 1 : 0)} ${unit}`;
  }

  function withError(value, error) {
    if (error === null || error === undefined || Number.isNaN(error)) return number(value);
    return `${number(value)} ± ${number(error, 2)}`;
  }

  function theme() {
    const style = getComputedStyle(document.documentElement);
    const read = (name) => style.getPropertyValue(name).trim();
    const root = parseFloat(style.fontSize);
    const found = {
      ink: read("--ink"), soft: read("--soft"), line: read("--line"), paper: read("--paper"),
      accent: read("--accent"), second: read("--second"), warn: read("--warn"), root,
      font: getComputedStyle(document.body).fontFamily,
      heat: read("--heat").split(",").map(parseColor),
      cold: read("--cold").split(",").map(parseColor),
      bits: {},
    };
    for (const bits of BITS) found.bits[bits] = read(`--b${bits}`);
    return found;
  }

  function parseColor(text) {
    const hex = text.trim().slice(1);
    return [0, 2, 4].map((k) => parseInt(hex.slice(k, k + 2), 16));
  }

  function blend(stops, t) {
    const x = Math.min(1, Math.max(0, t)) * (stops.length - 1);
    const k = Math.min(stops.length - 2, Math.floor(x));
    return stops[k].map((c, i) => Math.round(c + (x - k) * (stops[k + 1][i] - c)));
  }

  function colorOfBits(colors, bits) {
    return colors.bits[bits] || colors.bits[BITS.find((b) => b >= bits) || 16];
  }

  const redraws = new Set();
  let redrawing = 0;
  function whenItMustBeRedrawn(draw) {
    redraws.add(draw);
  }
  function redrawAll() {
    cancelAnimationFrame(redrawing);
    redrawing = requestAnimationFrame(() => redraws.forEach((draw) => draw()));
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redrawAll);
  addEventListener("resize", redrawAll);

  let numbered = 0;
  const fresh = (name) => `${name}-${++numbered}`;

  // ------------------------------------------------------------------ tables

  /** A table that can be sorted and filtered; only one page of rows is in the document.
   *
   * columns: {name, value(row), text(row), numeric, paint(cell, row)}; rows are 0 … count-1.
   */
  function table({ caption, columns, count, filterBy, pageRows = PAGE_ROWS, sortBy = null,
    dense = false }) {
    let order = Uint32Array.from({ length: count }, (_, k) => k);
    let shown = order;
    let page = 0;
    let sorting = { column: sortBy, falling: sortBy !== null };
    let wanted = "";
    const body = make("tbody");
    const heads = columns.map((column, k) => {
      const button = make("button", { type: "button", onclick: () => sort(k) }, column.name);
      return make("th", { scope: "col", class: column.numeric ? "number" : null }, button);
    });
    const said = make("span", { class: "said" });
    const back = make("button", { type: "button", onclick: () => turn(-1) }, "Previous");
    const on = make("button", { type: "button", onclick: () => turn(1) }, "Next");
    const id = fresh("filter");
    const filter = filterBy && count > 12
      ? make("label", { for: id, class: "filter" }, "Find ",
        make("input", { id, type: "search", oninput: (e) => find(e.target.value) }))
      : null;
    const grid = make("table", {},
      make("caption", {}, caption), make("thead", {}, make("tr", {}, ...heads)), body);
    const scroller = make("div", { class: "scroller", tabindex: 0, role: "region",
      "aria-label": caption }, grid);
    const pager = make("div", { class: "pager" }, back, said, on);
    const element = make("div", { class: dense ? "table dense" : "table" }, filter, scroller, pager);

    function arrange() {
      const column = columns[sorting.column];
      shown = order;
      if (wanted) shown = order.filter((k) => filterBy(k).toLowerCase().includes(wanted));
      if (column) {
        const sign = sorting.falling ? -1 : 1;
        const key = (k) => {
          const value = column.value(k);
          return value === null || Number.isNaN(value) ? -Infinity : value;
        };
        shown = shown.slice().sort((a, b) => {
          const x = key(a);
          const y = key(b);
          return x < y ? -sign : x > y ? sign : a - b;
        });
      }
      page = 0;
      show();
    }
    function sort(k) {
      const falling = sorting.column === k ? !sorting.falling : Boolean(columns[k].numeric);
      sorting = { column: k, falling };
      arrange();
    }
    function find(text) {
      wanted = text.trim().toLowerCase();
      arrange();
    }
    function turn(step) {
      page += step;
      show();
    }
    function show() {
      heads.forEach((head, k) => {
        if (sorting.column === k) {
          head.setAttribute("aria-sort", sorting.falling ? "descending" : "ascending");
        } else head.removeAttribute("aria-sort");
      });
      const first = page * pageRows;
      const rows = [];
      for (const k of shown.subarray(first, first + pageRows)) {
        const row = make("tr");
        columns.forEach((column, c) => {
          const cell = make(c === 0 ? "th" : "td",
            { class: column.numeric ? "number" : null, scope: c === 0 ? "row" : null },
            column.text(k));
          if (column.paint) column.paint(cell, k);
          row.append(cell);
        });
        rows.push(row);
      }
      body.replaceChildren(...rows);
      const last = Math.min(first + pageRows, shown.length);
      said.textContent = shown.length
        ? `${(first + 1).toLocaleString("en")}–${last.toLocaleString("en")} of `
          + shown.length.toLocaleString("en")
        : "nothing found";
      back.disabled = page === 0;
      on.disabled = last >= shown.length;
      pager.hidden = shown.length <= pageRows && !wanted;
    }
    arrange();
    whenItMustBeRedrawn(() => element.isConnected && show());
    return { element, update: (n) => {
      if (n !== undefined) order = Uint32Array.from({ length: n }, (_, k) => k);
      const kept = page;
      arrange();
      if (kept * pageRows < shown.length) page = kept;
      show();
    } };
  }

  /** A table that is built when it is first opened. */
  function folded(summary, build) {
    let built = null;
    const element = make("details", { ontoggle: () => {
      if (element.open && !built) {
        built = build();
        element.append(built.element);
      }
    } }, make("summary", {}, summary));
    return { element, update: (n) => built && built.update(n) };
  }

  function figure(title, hint, ...children) {
    const id = fresh("figure");
    return make("section", { class: "card", "aria-labelledby": id },
      make("h2", { id }, title), hint ? make("p", { class: "hint" }, hint) : null, ...children);
  }

  /** A drawing by echarts that follows size and theme. */
  function chart(label, className, option) {
    const place = make("div", { class: `chart ${className}`, role: "img", "aria-label": label });
    let drawing = null;
    function draw() {
      if (!place.isConnected) return;
      const style = theme();
      if (!drawing) drawing = echarts.init(place, null, { renderer: "canvas" });
      else drawing.resize();
      const wanted = option(style, place.clientWidth);
      const before = drawing.getOption();
      if (before && before.dataZoom && before.dataZoom[0] && wanted.dataZoom && wanted.dataZoom[0]) {
        // Whoever has zoomed in stays there while the slider moves.
        Object.assign(wanted.dataZoom[0],
          { start: before.dataZoom[0].start, end: before.dataZoom[0].end });
      }
      drawing.setOption(
        { animation: false, textStyle: { fontFamily: style.font, color: style.ink },
          backgroundColor: "transparent", ...wanted },
        { notMerge: true });
    }
    whenItMustBeRedrawn(draw);
    return { place, draw, label: (text) => place.setAttribute("aria-label", text),
      on: (name, act) => {
        if (!drawing) draw();
        if (drawing) drawing.on(name, act);
      } };
  }

  function tip(style) {
    // Drawn on the canvas: markup in a name stays text, and no style attribute meets the policy.
    return { renderMode: "richText", backgroundColor: style.paper, borderColor: style.line,
      textStyle: { color: style.ink, fontSize: 0.8 * style.root }, confine: true };
  }

  function axis(style, more) {
    return { axisLabel: { color: style.soft, fontSize: 0.78 * style.root },
      nameTextStyle: { color: style.soft, fontSize: 0.78 * style.root },
      axisLine: { lineStyle: { color: style.line } }, axisTick: { show: false },
      splitLine: { lineStyle: { color: style.line } }, ...more };
  }

  /** How many lines a legend takes, so that a drawing can begin below it. */
  function legendRows(style, width, names) {
    let rows = 1;
    let used = 0;
    for (const name of names) {
      const wide = name.length * 0.47 * style.root + 52;
      if (used && used + wide > width) {
        rows += 1;
        used = 0;
      }
      used += wide;
    }
    return rows;
  }

  /** Names without what they all begin with, up to a dot. */
  function shortened(names) {
    let common = names[0] || "";
    for (const name of names) {
      while (!name.startsWith(common)) common = common.slice(0, -1);
    }
    const cut = common.lastIndexOf(".") + 1;
    return names.map((name) => name.slice(cut) || name);
  }

  // ------------------------------------------------------------------ the frontier

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
    return { place: drawn.place, table: points.element, draw: () => {
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

  // ------------------------------------------------------------------ bars of one or two plans

  function bitSeries(style, names, bits, extra) {
    const widths = [...new Set(bits)].sort((a, b) => a - b);
    return widths.map((w) => ({ name: `${w} bits`, type: "bar", stack: extra.stack || "a",
      barCategoryGap: names.length > 150 ? "0%" : "18%", large: names.length > MANY,
      largeThreshold: MANY, progressive: 0, itemStyle: { color: colorOfBits(style, w) },
      data: bits.map((b) => (b === w ? b : "-")), ...extra }));
  }

  function summary(bits) {
    const counts = new Map();
    bits.forEach((b) => counts.set(b, (counts.get(b) || 0) + 1));
    return [...counts].sort((a, b) => a[0] - b[0])
      .map(([b, n]) => `${n} at ${b} bits`).join(", ");
  }

  function nameAxis(style, names, width, more) {
    const room = names.length * 1.15 * style.root < width;
    const brief = shortened(names);
    return axis(style, { type: "category", data: names, splitLine: { show: false },
      axisLabel: { show: true, color: style.soft, fontSize: 0.72 * style.root,
        interval: room ? 0 : "auto", rotate: room ? 60 : 0,
        formatter: (text, k) => {
          if (!room) return String(k + 1);
          return brief[k].length > 18 ? `…${brief[k].slice(-17)}` : brief[k];
        } }, ...more });
  }

  function zoomOf(style, names, xAxisIndex) {
    if (names.length <= 120) return [];
    // More bars than pixels would only show the tallest: begin with a part of them.
    const end = Math.min(100, (100 * FIRST_SHOWN) / names.length);
    return [{ type: "slider", xAxisIndex, start: 0, end, showDataShadow: false, height: 18, bottom: 4, brushSelect: false,
      borderColor: style.line, textStyle: { color: style.soft }, labelFormatter: (k) =>
        String(k + 1), fillerColor: "rgba(128,128,160,0.2)" }];
  }

  function bars(doc, state) {
    const names = doc.layers.names;
    const drawn = chart("Bits of every layer", "bars", (style, width) => {
      const bits = state.current ? state.current.bits : [];
      return {
        grid: { left: 8, right: 16, top: 40, bottom: names.length > 120 ? 34 : 8,
          containLabel: true },
        legend: { top: 0, left: 0, icon: "rect", itemHeight: 10, itemWidth: 14,
          textStyle: { color: style.ink, fontSize: 0.8 * style.root } },
        tooltip: { ...tip(style), trigger: "item", formatter: (p) => {
          const k = p.dataIndex;
          return `${names[k]}\n${bits[k]} bits, ${doc.layers.weights[k].toLocaleString("en")} `
            + "weights";
        } },
        dataZoom: zoomOf(style, names),
        xAxis: nameAxis(style, names, width, {}),
        yAxis: axis(style, { type: "value", minInterval: 1, min: 0 }),
        series: bitSeries(style, names, bits, {}),
      };
    });
    const rows = folded("Bits of every layer as a table", () => table({
      caption: "Bits of every layer", count: names.length, filterBy: (k) => names[k],
      columns: [
        { name: "Layer", value: (k) => names[k], text: (k) => names[k] },
        { name: "Bits", numeric: true, value: (k) => bit(k), text: (k) => String(bit(k) ?? "–") },
        { name: "Weights", numeric: true, value: (k) => doc.layers.weights[k],
          text: (k) => doc.layers.weights[k].toLocaleString("en") },
        ...(doc.layers.shapes.length ? [{ name: "Shape", value: (k) => doc.layers.shapes[k],
          text: (k) => doc.layers.shapes[k] }] : []),
      ],
    }));
    const bit = (k) => (state.current ? state.current.bits[k] : null);
    return { place: drawn.place, table: rows.element, draw: () => {
      drawn.draw();
      if (state.current) {
        drawn.label(`Bits of every layer: ${summary(state.current.bits)}. The table below lists `
          + "them.");
      }
      rows.update();
    } };
  }

  function sideBySide(doc, state) {
    const names = doc.layers.names;
    const sides = ["left", "right"];
    const options = () => [
      ...state.plans.flatMap((p, k) => [
        { id: `plan-${k}`, name: `plan for ${p.budget}`, ...p },
        ...p.baselines.map((b, j) => ({ id: `base-${k}-${j}`,
          name: `${b.name} (within ${p.budget})`, ...b, bits: b.bits })),
      ]),
      ...(state.current ? [{ ...state.current, id: "slider", name: "slider" }] : []),
    ];
    const chosen = { left: null, right: null };
    const find = (side) => options().find((o) => o.id === chosen[side]);
    const selects = {};
    const labels = sides.map((side) => {
      const id = fresh(side);
      selects[side] = make("select", { id, onchange: (e) => {
        chosen[side] = e.target.value;
        show();
      } });
      return make("label", { for: id }, side === "left" ? "Above " : "Below ", selects[side]);
    });
    const facts = make("p", { class: "facts", "aria-live": "polite" });
    const drawn = chart("Two plans, layer by layer", "pair", (style, width) => {
      const [a, b] = sides.map(find);
      if (!a || !b) return {};
      const top = Math.max(...a.bits, ...b.bits);
      const value = { type: "value", min: 0, max: top, minInterval: 1 };
      const series = [];
      [a, b].forEach((plan, at) => series.push(...bitSeries(style, names, plan.bits,
        { xAxisIndex: at, yAxisIndex: at, stack: String(at) })));
      return {
        grid: [{ left: 44, right: 16, top: 40, bottom: "52%" },
          { left: 44, right: 16, top: "50%", bottom: names.length > 120 ? 34 : 12 }],
        legend: { top: 0, left: 0, icon: "rect", itemHeight: 10, itemWidth: 14,
          textStyle: { color: style.ink, fontSize: 0.8 * style.root } },
        tooltip: { ...tip(style), trigger: "item", formatter: (p) => {
          const k = p.dataIndex;
          return `${names[k]}\n${a.bits[k]} bits above, ${b.bits[k]} bits below`;
        } },
        dataZoom: zoomOf(style, names, [0, 1]),
        xAxis: [0, 1].map((at) => axis(style, { type: "category", data: names, gridIndex: at,
          position: at ? "top" : "bottom", axisLabel: { show: false },
          splitLine: { show: false } })),
        yAxis: [axis(style, { ...value, gridIndex: 0 }),
          axis(style, { ...value, gridIndex: 1, inverse: true, axisLabel: { color: style.soft,
            fontSize: 0.78 * style.root, formatter: (v) => (v ? String(v) : "") } })],
        series,
      };
    });
    let onlyDifferent = true;
    let listed = [];
    const rows = folded("Where they differ, as a table", () => table({
      caption: "Layers in both plans", count: listed.length, filterBy: (k) => names[listed[k]],
      columns: [
        { name: "Layer", value: (k) => names[listed[k]], text: (k) => names[listed[k]] },
        { name: "Above", numeric: true, value: (k) => find("left").bits[listed[k]],
          text: (k) => `${find("left").bits[listed[k]]} bits` },
        { name: "Below", numeric: true, value: (k) => find("right").bits[listed[k]],
          text: (k) => `${find("right").bits[listed[k]]} bits` },
        { name: "Difference", numeric: true,
          value: (k) => find("left").bits[listed[k]] - find("right").bits[listed[k]],
          text: (k) => number(find("left").bits[listed[k]] - find("right").bits[listed[k]]) },
      ],
    }));
    const id = fresh("only");
    const only = make("label", { for: id, class: "check" }, make("input", { id, type: "checkbox",
      checked: true, onchange: (e) => {
        onlyDifferent = e.target.checked;
        show();
      } }), " list only layers that differ");
    rows.element.append(only);
    function lossOf(o) {
      if (o.measured) return `measured ${withError(o.measured.mean, o.measured.error)}`;
      return o.predicted === null || o.predicted === undefined ? "not measured"
        : `predicted ${number(o.predicted)}`;
    }
    function show() {
      const all = options();
      if (!all.length) return;
      if (!find("left")) chosen.left = all[0].id;
      if (!find("right")) {
        const uniform = all.filter((o) => o.name.startsWith("uniform") && o.id.startsWith("base-0"))
          .reduce((best, o) => (best && best.size_bits >= o.size_bits ? best : o), null);
        chosen.right = (uniform || all[all.length - 1]).id;
      }
      for (const side of sides) {
        const wanted = all.map((o) => `${o.id} ${o.name}`).join("\n");
        if (selects[side].dataset.options !== wanted) {
          selects[side].dataset.options = wanted;
          selects[side].replaceChildren(...all.map((o) => make("option", { value: o.id }, o.name)));
        }
        selects[side].value = chosen[side];
      }
      const [a, b] = sides.map(find);
      const different = names.map((_, k) => k).filter((k) => a.bits[k] !== b.bits[k]);
      listed = onlyDifferent ? different : names.map((_, k) => k);
      const text = `${different.length} of ${names.length} layers differ. Above: `
        + `${bytes(a.size_bits)}, ${lossOf(a)}. Below: ${bytes(b.size_bits)}, ${lossOf(b)}.`;
      if (facts.textContent !== text) facts.textContent = text;
      drawn.draw();
      drawn.label(`Two plans, layer by layer. ${text}`);
      rows.update(listed.length);
    }
    const section = figure("Two plans side by side", null,
      make("div", { class: "controls" }, ...labels), facts, drawn.place, rows.element);
    return { section, show,
      follows: () => chosen.left === "slider" || chosen.right === "slider" };
  }

  // ------------------------------------------------------------------ heat maps

  /** Cells on a canvas. Several columns in one pixel show the strongest of them.
   *
   * spec: {rows, columns, value(r, c), text(r, c), signed, square}; arrows move a cursor.
   */
  function heatMap(label, spec) {
    const canvas = make("canvas", { tabindex: 0, role: "application",
      "aria-roledescription": "heat map", "aria-label": label });
    const readout = make("p", { class: "readout", "aria-live": "polite" }, spec.hint);
    const scale = make("canvas", { class: "scale", "aria-hidden": "true" });
    const low = make("span");
    const high = make("span");
    const legend = make("div", { class: "legend" }, low, scale, high);
    const element = make("div", { class: spec.square ? "heat square" : "heat" }, canvas, legend,
      readout);
    const cursor = { row: -1, column: -1 };
    let limits = { low: 1, high: 1 };
    let picture = null;

    function measure() {
      let top = 0;
      const seen = [];
      for (let r = 0; r < spec.rows(); r++) {
        for (let c = 0; c < spec.columns(); c++) {
          const v = Math.abs(spec.value(r, c));
          if (v > top) top = v;
          if (v > 0) seen.push(v);
        }
      }
      seen.sort((a, b) => a - b);
      // A few tiny values must not take the whole scale.
      limits = { high: top || 1, low: Math.max(seen[Math.floor(seen.length / 50)] || 0,
        (top || 1) * 1e-5) };
    }
    function share(v) {
      if (spec.signed) {
        const soft = limits.high * 1e-3;
        return Math.log1p(Math.abs(v) / soft) / Math.log1p(limits.high / soft);
      }
      if (v <= 0) return 0;
      const span = Math.log(limits.high / limits.low) || 1;
      return Math.max(0, Math.log(v / limits.low) / span);
    }
    function color(style, v) {
      if (Number.isNaN(v)) return null;
      const stops = v < 0 ? style.cold : style.heat;
      // A negative sensitivity is odd: it is shown in the other hue at full strength.
      return blend(stops, v < 0 && !spec.signed ? 0.8 : share(v));
    }
    function draw() {
      if (!canvas.isConnected || !spec.rows() || !canvas.clientWidth) return;
      const style = theme();
      const ratio = devicePixelRatio || 1;
      const nr = spec.rows();
      const nc = spec.columns();
      const width = canvas.clientWidth;
      const height = spec.square ? width : Math.min(30, Math.max(18, 260 / nr)) * nr;
      canvas.style.height = `${height}px`;
      canvas.width = Math.round(width * ratio);
      canvas.height = Math.round(height * ratio);
      const w = Math.min(nc, canvas.width);
      const h = Math.min(nr, canvas.height);
      const small = new OffscreenCanvas(w, h);
      const image = new ImageData(w, h);
      const strongest = new Float32Array(w * h);
      const filled = new Uint8Array(w * h);
      for (let r = 0; r < nr; r++) {
        const y = Math.floor((r * h) / nr);
        for (let c = 0; c < nc; c++) {
          const v = spec.value(r, c);
          if (Number.isNaN(v)) continue;
          const at = y * w + Math.floor((c * w) / nc);
          if (!filled[at] || Math.abs(v) > Math.abs(strongest[at])) {
            filled[at] = 1;
            strongest[at] = v;
          }
        }
      }
      for (let at = 0; at < w * h; at++) {
        if (!filled[at]) continue;
        const [red, green, blue] = color(style, strongest[at]);
        image.data.set([red, green, blue, 255], 4 * at);
      }
      small.getContext("2d").putImageData(image, 0, 0);
      picture = small;
      paint(style);
      paintScale(style);
    }
    function paint(style) {
      const g = canvas.getContext("2d");
      g.clearRect(0, 0, canvas.width, canvas.height);
      g.imageSmoothingEnabled = false;
      g.drawImage(picture, 0, 0, canvas.width, canvas.height);
      const w = canvas.width / spec.columns();
      const h = canvas.height / spec.rows();
      if (w > 7 && h > 7) {
        g.fillStyle = style.paper;
        for (let c = 1; c < spec.columns(); c++) g.fillRect(Math.round(c * w), 0, 1, canvas.height);
        for (let r = 1; r < spec.rows(); r++) g.fillRect(0, Math.round(r * h), canvas.width, 1);
      }
      if (cursor.row >= 0) {
        const ratio = devicePixelRatio || 1;
        const side = Math.max(6 * ratio, w);
        const tall = Math.max(6 * ratio, h);
        const x = (cursor.column + 0.5) * w - side / 2;
        const y = (cursor.row + 0.5) * h - tall / 2;
        g.lineWidth = 2 * ratio;
        g.strokeStyle = style.paper;
        g.strokeRect(x - ratio, y - ratio, side + 2 * ratio, tall + 2 * ratio);
        g.strokeStyle = style.ink;
        g.strokeRect(x, y, side, tall);
      }
    }
    function paintScale(style) {
      scale.width = 128;
      scale.height = 1;
      const g = scale.getContext("2d");
      const image = g.createImageData(128, 1);
      for (let k = 0; k < 128; k++) {
        const t = spec.signed ? (k - 63.5) / 63.5 : k / 127;
        const rgb = blend(t < 0 ? style.cold : style.heat, Math.abs(t));
        image.data.set([...rgb, 255], 4 * k);
      }
      g.putImageData(image, 0, 0);
      low.textContent = spec.signed ? `−${number(limits.high)}` : `≤ ${number(limits.low)}`;
      high.textContent = number(limits.high);
    }
    function move(row, column) {
      cursor.row = Math.min(spec.rows() - 1, Math.max(0, row));
      cursor.column = Math.min(spec.columns() - 1, Math.max(0, column));
      readout.textContent = spec.text(cursor.row, cursor.column);
      if (picture) paint(theme());
    }
    canvas.addEventListener("pointermove", (event) => {
      const box = canvas.getBoundingClientRect();
      move(Math.floor(((event.clientY - box.top) / box.height) * spec.rows()),
        Math.floor(((event.clientX - box.left) / box.width) * spec.columns()));
    });
    canvas.addEventListener("keydown", (event) => {
      const step = event.shiftKey ? 10 : 1;
      const moves = { ArrowLeft: [0, -step], ArrowRight: [0, step], ArrowUp: [-step, 0],
        ArrowDown: [step, 0] };
      if (event.key === "Home") move(cursor.row, 0);
      else if (event.key === "End") move(cursor.row, spec.columns() - 1);
      else if (moves[event.key]) {
        const [dr, dc] = moves[event.key];
        move(cursor.row < 0 ? 0 : cursor.row + dr, cursor.column < 0 ? 0 : cursor.column + dc);
      } else return;
      event.preventDefault();
    });
    canvas.addEventListener("focus", () => cursor.row < 0 && move(0, 0));
    whenItMustBeRedrawn(draw);
    return { element, color: (v) => color(theme(), v), renew: () => {
      measure();
      draw();
    }, describe: (text) => canvas.setAttribute("aria-label", text), measure };
  }

  function readable([r, g, b]) {
    const linear = [r, g, b].map((c) => (c / 255 <= 0.04045 ? c / 255 / 12.92
      : ((c / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] > 0.179 ? "#000" : "#fff";
  }

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

  // ------------------------------------------------------------------ a comparison of metrics

  function comparison(doc) {
    const found = doc.comparison;
    const sections = found.budgets.map((budget, k) => {
      const entries = found.entries.filter((e) => e.plans[k])
        .sort((a, b) => a.plans[k].mean - b.plans[k].mean);
      const drawn = chart(`Measured loss increase of every method at ${budget}`, "methods",
        (style) => {
          const positive = entries.map((e) => e.plans[k].mean).filter((v) => v > 0);
          const floor = Math.min(...positive, 1) / 2;
          return {
            grid: { left: 8, right: 60, top: 8, bottom: 28, containLabel: true },
            tooltip: { ...tip(style), trigger: "item", formatter: (p) => {
              const plan = entries[p.dataIndex].plans[k];
              return `${entries[p.dataIndex].name}: ${bytes(plan.size_bits)}\nmeasured `
                + withError(plan.mean, plan.error);
            } },
            xAxis: axis(style, { type: "log", min: floor,
              axisLabel: { color: style.soft, fontSize: 0.78 * style.root,
                formatter: (v) => number(v, 2) } }),
            yAxis: axis(style, { type: "category", inverse: true, data: entries.map((e) => e.name),
              axisLabel: { color: style.ink, fontSize: 0.8 * style.root },
              splitLine: { show: false } }),
            series: [{ type: "bar", barCategoryGap: "25%", data: entries.map((e) => ({
              value: Math.max(e.plans[k].mean, floor), itemStyle: {
                color: e.plans[k].ties || e === entries[0] ? style.second : style.accent,
                opacity: e.kind === "baseline" ? 0.55 : 1 } })),
            label: { show: true, position: "right", color: style.ink,
              fontSize: 0.75 * style.root, formatter: (p) =>
                number(entries[p.dataIndex].plans[k].mean) } }],
          };
        });
      drawn.place.style.height = `${2.2 * entries.length + 3}rem`;
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

  // ------------------------------------------------------------------ everything together

  function sliderOf(doc, state, hooks, changed) {
    const ends = state.range;
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
    let running = null;

    function say(point, thorough) {
      if (!point) return;
      const gap = point.bound === null || point.bound === undefined ? ""
        : point.predicted - point.bound <= 1e-4 * Math.abs(point.predicted)
          ? ", proved best" : `, nothing is below ${number(point.bound)}`;
      const text = `${point.average_bits.toFixed(2)} bits per weight: ${bytes(point.size_bits)}, `
        + `predicted loss ${number(point.predicted)}${gap}${thorough ? "" : " …"}`;
      shown.textContent = text;
      input.setAttribute("aria-valuetext", text);
      input.dataset.solved = input.value;
    }
    async function solve(seconds) {
      if (running) running.abort();
      running = new AbortController();
      const { signal } = running;
      const average = Number(input.value);
      try {
        const point = await hooks.solve(average, seconds, signal);
        if (signal.aborted) return;
        state.current = point;
        say(point, seconds === THOROUGH_S);
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
        say(state.current, true);
        changed();
        return;
      }
      timer = setTimeout(() => solve(QUICK_S), DEBOUNCE_MS);
      idle = setTimeout(() => solve(THOROUGH_S), IDLE_MS);
    });
    const label = make("label", { for: id }, "Bits per weight");
    const measure = hooks.measure
      ? make("button", { type: "button", onclick: () => hooks.measure(Number(input.value)) },
        "Measure this plan") : null;
    return { element: make("div", { class: "slider" }, label, input, shown, measure),
      start: () => {
        if (!discrete) return solve(THOROUGH_S);
        const wanted = ends[2];
        const near = state.points.reduce((best, p, k) => (
          Math.abs(p.average_bits - wanted) < Math.abs(state.points[best].average_bits - wanted)
            ? k : best), 0);
        input.value = near;
        state.current = state.points[near] || null;
        say(state.current, true);
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
      const widths = doc.matrix.columns.map((label) => parseInt(label.slice(1), 10))
        .filter((b) => b > 0);
      low = Math.min(...widths);
      high = Math.max(...widths);
      // Pinned layers move both ends; the values say which candidates each group has.
      const values = decode(doc.matrix.values);
      const nc = doc.matrix.columns.length;
      const sums = [0, 0];
      const index = new Map(doc.layers.names.map((n, k) => [n, k]));
      doc.matrix.groups.forEach((group, g) => {
        const own = doc.matrix.columns.map((label, c) => [parseInt(label.slice(1), 10), c])
          .filter(([, c]) => !Number.isNaN(values[g * nc + c])).map(([b]) => b);
        for (const name of doc.matrix.members ? doc.matrix.members[g] : [group]) {
          const n = weights[index.get(name)] || 0;
          sums[0] += n * Math.min(...own);
          sums[1] += n * Math.max(...own);
        }
      });
      if (total && sums[0]) {
        low = Math.ceil((sums[0] / total) * 100) / 100;
        high = Math.ceil((sums[1] / total) * 100) / 100;
      }
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
    if (doc.plans.length || doc.matrix) {
      const curve = frontierChart(doc, state);
      const chosen = bars(doc, state);
      const pair = sideBySide(doc, state);
      const changed = () => {
        curve.draw();
        chosen.draw();
        if (pair.follows()) pair.show();
      };
      if (!doc.matrix || (!hooks.solve && !state.points.length)) {
        state.current = doc.plans[0] || null;
      }
      const slides = hooks.solve ? Boolean(doc.matrix) : state.points.length > 1;
      const slider = slides ? sliderOf(doc, state, hooks, changed) : null;
      parts.push(figure("Choose a plan",
        "Each point is the best choice of bits for its size. Measured points ran on the model; "
        + "the line is what the sensitivities predict, the band how far below it anything can be.",
        make("div", { class: "choose" },
          make("div", {}, make("h3", {}, `Loss increase (${doc.unit}) against stored size`),
            curve.place, curve.table),
          make("div", {}, slider ? slider.element : null, chosen.place, chosen.table))));
      if (doc.plans.length || slides) parts.push(pair.section);
      later.push(() => {
        changed();
        pair.show();
        if (slider) slider.start();
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

  globalThis.Bitquota = { mount, make, bytes, number, table, fresh };
})();
