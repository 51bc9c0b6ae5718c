/* Frames around drawings, and what all drawings by echarts share. */
(() => {
  "use strict";

  const { make, fresh, theme, whenItMustBeRedrawn } = globalThis.Bitquota;

  function figure(title, hint, ...children) {
    const id = fresh("figure");
    return make("section", { class: "card", "aria-labelledby": id },
      make("h2", { id }, title), hint ? make("p", { class: "hint" }, hint) : null, ...children);
  }

  /** A drawing by echarts that follows size and theme. */

  function chart(label, className, option) {
    const place = make("div", { class: `chart ${className}`, role: "img", "aria-label": label });
    let drawing = null;
    let zoomed = null;
    function begin() {
      const made = echarts.init(place, null, { renderer: "canvas" });
      made.on("datazoom", (event) => {
        const { start, end } = event.batch ? event.batch[0] : event;
        zoomed = { start, end };
      });
      return made;
    }
    function draw() {
      if (!place.isConnected) return;
      const style = theme();
      if (!drawing) drawing = begin();
      else if (place.clientWidth !== drawing.getWidth()) drawing.resize();
      const wanted = option(style, place.clientWidth);
      // Whoever has zoomed in stays there while the slider moves.
      if (zoomed && wanted.dataZoom && wanted.dataZoom[0]) Object.assign(wanted.dataZoom[0], zoomed);
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

  Object.assign(globalThis.Bitquota, { figure, chart, tip, axis, legendRows, shortened });
})();
