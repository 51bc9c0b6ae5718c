/* Bits of every layer: one plan, or two side by side. */
(() => {
  "use strict";

  const {
    make, fresh, number, bytes, withError, colorOfBits, chart, tip, axis, shortened, figure,
    folded, table,
  } = globalThis.Bitquota;
  const MANY = 600;
  const FIRST_SHOWN = 300;

  function bitSeries(style, names, bits, extra) {
    const widths = [...new Set(bits)].sort((a, b) => a - b);
    // Each layer has one bar, so that nothing is stacked: bars of all widths stand in one place.
    return widths.map((w) => ({ name: `${w} bits`, type: "bar", barGap: "-100%",
      barCategoryGap: names.length > 150 ? "0%" : "18%", large: names.length > MANY,
      largeThreshold: MANY, progressive: 0, itemStyle: { color: colorOfBits(style, w) },
      data: bits.flatMap((b, k) => (b === w ? [[k, b]] : [])), ...extra }));
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
          const [k] = p.value;
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
        { xAxisIndex: at, yAxisIndex: at })));
      return {
        grid: [{ left: 44, right: 16, top: 40, bottom: "52%" },
          { left: 44, right: 16, top: "50%", bottom: names.length > 120 ? 34 : 12 }],
        legend: { top: 0, left: 0, icon: "rect", itemHeight: 10, itemWidth: 14,
          textStyle: { color: style.ink, fontSize: 0.8 * style.root } },
        tooltip: { ...tip(style), trigger: "item", formatter: (p) => {
          const [k] = p.value;
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

  Object.assign(globalThis.Bitquota, { bars, sideBySide });
})();
