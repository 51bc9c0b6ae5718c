/* Tables that sort, filter and page; one stands beside every chart. */
(() => {
  "use strict";

  const { make, fresh, whenItMustBeRedrawn } = globalThis.Bitquota;
  const PAGE_ROWS = 50;

  /** Pieces of a name that may go on the next line after a dot, and nowhere else if there is room. */
  function breakable(text) {
    return text.split(/(?<=[./])/).flatMap((piece, k) => (k ? [make("wbr"), piece] : [piece]));
  }

  /** A table that can be sorted and filtered; only one page of rows is in the document.
   *
   * columns: {name, value(row), text(row), numeric, paint(cell, row)}; rows are 0 … count-1.
   */
  function table({ caption, columns, count, filterBy, pageRows = PAGE_ROWS, sortBy = null,
    dense = false, filterFrom = 13 }) {
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
    const filter = filterBy && count >= filterFrom
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
            ...(column.numeric ? [column.text(k)] : breakable(column.text(k))));
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

  Object.assign(globalThis.Bitquota, { table, folded });
})();
