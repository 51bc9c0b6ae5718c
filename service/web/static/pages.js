/* What all pages share: requests to the API, times, the list of states. */
(() => {
  "use strict";

  const token = document.querySelector("meta[name=csrf-token]").content;

  /** Call the API and return its JSON; a problem becomes an Error with its text. */
  async function call(path, { method = "GET", body = null, signal = null } = {}) {
    const headers = {};
    if (token && method !== "GET") headers["X-CSRF-Token"] = token;
    if (body !== null) headers["Content-Type"] = "application/json";
    const answer = await fetch(path, {
      method, headers, signal, body: body === null ? null : JSON.stringify(body),
      credentials: "same-origin",
    });
    if (answer.status === 401) {
      location.assign(`/sign-in?next=${encodeURIComponent(location.pathname)}`);
    }
    const data = await answer.json().catch(() => ({}));
    if (!answer.ok) throw new Error(data.detail || `the server answered ${answer.status}`);
    return data;
  }

  // To make a format takes a browser longer than to draw the row that it stands in.
  const format = (wanted) => {
    let made = null;
    return (seconds) => {
      made = made || new Intl.DateTimeFormat([], wanted);
      return made.format(seconds * 1000);
    };
  };
  const clock = format({ timeStyle: "medium", hour12: false });
  const moment = format({ dateStyle: "medium", timeStyle: "short" });
  const when = (seconds) => (seconds ? moment(seconds) : "");

  function lasting(seconds) {
    const s = Math.max(0, Math.round(seconds));
    if (s < 90) return `${s} s`;
    if (s < 5400) return `${Math.round(s / 60)} min`;
    return `${Math.floor(s / 3600)} h ${Math.round((s % 3600) / 60)} min`;
  }

  const data = () => JSON.parse(document.getElementById("data").textContent);

  globalThis.Pages = { call, token, clock, when, lasting, data };
})();
