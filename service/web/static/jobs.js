/* First page: a new order by drag and drop, and the list of jobs as it changes. */
(() => {
  "use strict";

  const { make, bytes } = globalThis.Bitquota;
  const { call, token, when, data } = globalThis.Pages;
  const TRIES = 6;
  const KINDS = { model: "models", dataset: "datasets" };

  // ------------------------------------------------------------------ the list

  const body = document.getElementById("rows");
  const shown = new Map();
  const ticked = new Set();
  const comparing = document.getElementById("compare");

  /** Two jobs at least can be compared, and no more than one drawing shows. */
  function mayCompare() {
    const most = Number(comparing.dataset.most);
    document.getElementById("compare-go").disabled = ticked.size < 2 || ticked.size > most;
  }

  comparing.addEventListener("change", ({ target }) => {
    if (target.checked) ticked.add(target.value);
    else ticked.delete(target.value);
    mayCompare();
  });

  function row(job) {
    const name = job.labels.name || job.model || job.id;
    const { fraction, text } = job.progress || {};
    const share = fraction && job.status === "running"
      ? make("progress", { max: 1, value: fraction, title: text,
        "aria-label": `Progress of the job, now: ${text}` }) : null;
    return make("tr", { "data-job": job.id },
      make("th", { scope: "row" }, job.charts ? make("input", { type: "checkbox", name: "job",
        value: job.id, checked: ticked.has(job.id), "aria-label": `Compare ${name}` }) : null,
        make("a", { href: `/jobs/${job.id}` }, name),
        make("div", { class: "soft" }, job.labels.name ? `${job.kind}, ${job.model}` : job.kind)),
      make("td", {}, make("span", { class: `state ${job.status}` }, job.status), share),
      make("td", {}, job.budgets.join(", ")),
      make("td", {}, when(job.created_at)));
  }

  const versions = new Map();

  function show(job) {
    // What the page came with, the stream says once more.
    if (versions.get(job.id) === job.version) return;
    versions.set(job.id, job.version);
    const made = row(job);
    const old = shown.get(job.id);
    if (old) {
      const focused = old.contains(document.activeElement);
      old.replaceWith(made);
      if (focused) made.querySelector("a").focus();
    } else {
      // Ids are in the order of time; the newest comes first.
      const oldest = body.lastElementChild;
      const after = !oldest || oldest.dataset.job > job.id ? null
        : [...body.children].find((other) => other.dataset.job < job.id);
      body.insertBefore(made, after || null);
    }
    shown.set(job.id, made);
    document.getElementById("none").hidden = true;
  }

  const first = data();
  document.getElementById("none").hidden = first.length > 0;
  first.forEach(show);
  const live = new EventSource("/live/jobs");
  live.addEventListener("row", (event) => show(JSON.parse(event.data)));
  addEventListener("pagehide", () => live.close());

  const older = document.getElementById("older");
  const olderProblem = document.getElementById("older-problem");
  older.hidden = first.length < Number(older.dataset.listed);
  older.addEventListener("click", async () => {
    older.disabled = true;
    try {
      const found = await call(`/older/jobs?before=${body.lastElementChild.dataset.job}`);
      found.data.forEach(show);
      older.hidden = !found.has_more;
      olderProblem.hidden = true;
    } catch (reason) {
      olderProblem.textContent = reason.message;
      olderProblem.hidden = false;
    }
    older.disabled = false;
  });

  // ------------------------------------------------------------------ the order

  const form = document.getElementById("order");
  if (!form) return;
  const drop = document.getElementById("drop");
  const problem = document.getElementById("order-problem");
  const uploads = document.getElementById("uploads");
  const go = document.getElementById("go");
  const known = { model: new Map(), dataset: new Map() };
  const files = { model: null, dataset: null };

  function complain(text) {
    problem.textContent = text;
    problem.hidden = !text;
  }

  async function listKnown(kind) {
    const page = await call(`/v1/${KINDS[kind]}?limit=200`);
    const list = document.getElementById(`${kind}-known`);
    page.data.sort((a, b) => (a.created_at < b.created_at ? 1 : -1));
    for (const entry of page.data) {
      known[kind].set(entry.id, entry);
      list.append(make("option", { value: entry.id },
        `${entry.name || entry.id.slice(7, 19)} (${bytes(8 * entry.size)})`));
    }
  }

  function roleOf(file) {
    return /\.(npz|safetensors)$/i.test(file.name) ? "dataset" : "model";
  }

  function choose(role, file) {
    files[role] = file;
    const list = new DataTransfer();
    list.items.add(file);
    document.getElementById(role).files = list.files;
    document.getElementById(`${role}-known`).value = "";
  }

  for (const role of Object.keys(KINDS)) {
    document.getElementById(role).addEventListener("change", (event) => {
      files[role] = event.target.files[0] || null;
      if (files[role]) document.getElementById(`${role}-known`).value = "";
    });
    document.getElementById(`${role}-known`).addEventListener("change", (event) => {
      if (event.target.value) {
        files[role] = null;
        document.getElementById(role).value = "";
      }
    });
    listKnown(role).catch((reason) => complain(reason.message));
  }

  let inside = 0;
  // Anywhere on the page: a file that misses the frame must not replace the page.
  document.addEventListener("dragenter", (event) => {
    inside += 1;
    drop.classList.add("over");
    event.preventDefault();
  });
  document.addEventListener("dragleave", () => {
    inside -= 1;
    if (inside <= 0) drop.classList.remove("over");
  });
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    inside = 0;
    drop.classList.remove("over");
    for (const file of event.dataTransfer.files) choose(roleOf(file), file);
  });

  /** One line with a bar for one upload. */
  function bar(name) {
    const said = make("span");
    const progress = make("progress", { max: 1, value: 0, "aria-label": `Upload of ${name}` });
    uploads.hidden = false;
    uploads.append(make("div", {}, said, progress));
    return (text, share) => {
      said.textContent = `${name}: ${text}`;
      progress.value = share;
    };
  }

  function digestOf(file, tell) {
    return new Promise((resolve, reject) => {
      // Not form.dataset: that is the field of this name.
      const worker = new Worker(form.getAttribute("data-worker"));
      worker.onmessage = ({ data: said }) => {
        if (said.read) tell(`reading, ${bytes(8 * said.read)} of ${bytes(8 * file.size)}`,
          said.read / file.size);
        if (said.problem) reject(new Error(said.problem));
        if (said.digest) resolve(said.digest);
        if (said.digest || said.problem) worker.terminate();
      };
      worker.onerror = () => reject(new Error("this browser cannot read the file in pieces"));
      worker.postMessage(file);
    });
  }

  /** Send what follows `offset`; resolves with the answer, rejects when the line broke. */
  function send(path, file, digest, offset, tell) {
    return new Promise((resolve, reject) => {
      const began = performance.now();
      const request = new XMLHttpRequest();
      const query = new URLSearchParams({ name: file.name, sha256: digest, offset,
        total: file.size });
      request.open("PUT", `${path}?${query}`);
      if (token) request.setRequestHeader("X-CSRF-Token", token);
      request.setRequestHeader("Content-Type", "application/octet-stream");
      request.upload.onprogress = (event) => {
        const sent = offset + event.loaded;
        const rate = event.loaded / Math.max(0.001, (performance.now() - began) / 1000);
        tell(`sending, ${bytes(8 * sent)} of ${bytes(8 * file.size)}, ${bytes(8 * rate)}/s`,
          sent / file.size);
      };
      request.onload = () => resolve(request);
      request.onerror = () => reject(new Error("the connection broke"));
      request.send(file.slice(offset));
    });
  }

  /** Upload a file, going on where it broke off; returns its id. */
  async function upload(role, file) {
    const tell = bar(file.name);
    if (file.size === 0) throw new Error(`'${file.name}' must not be empty`);
    tell("reading", 0);
    const digest = await digestOf(file, tell);
    const id = `sha256:${digest}`;
    if (known[role].has(id)) {
      tell("is here already", 1);
      return id;
    }
    const path = `/v1/${KINDS[role]}`;
    for (let attempt = 1; ; attempt++) {
      try {
        const { received } = await call(`${path}/${id}/upload`);
        const request = await send(path, file, digest, Math.min(received, file.size), tell);
        if (request.status === 200 || request.status === 201) {
          tell(`sent, ${bytes(8 * file.size)}`, 1);
          return id;
        }
        let text = `the server answered ${request.status}`;
        try {
          text = JSON.parse(request.responseText).detail || text;
        } catch { /* the status has to do */ }
        throw Object.assign(new Error(text), { final: request.status < 500 });
      } catch (reason) {
        if (reason.final || attempt === TRIES) throw reason;
        tell(`${reason.message}; trying again`, 0);
        await new Promise((wake) => setTimeout(wake, 500 * 2 ** attempt));
      }
    }
  }

  function idOf(role) {
    const chosen = document.getElementById(`${role}-known`).value;
    if (chosen) return Promise.resolve(chosen);
    if (files[role]) return upload(role, files[role]);
    const what = role === "model" ? "a model" : "a calibration set";
    return Promise.reject(new Error(`Choose ${what}, or drop it here.`));
  }

  const value = (id) => document.getElementById(id).value.trim();
  const parts = (text, comma) => text.split(comma).map((part) => part.trim()).filter(Boolean);

  /** What the form says, as the request of a plan; raises what is missing. */
  function planRequest() {
    const checked = (name) =>
      [...form.querySelectorAll(`input[name=${name}]:checked`)].map((box) => box.value);
    const widths = checked("bits").map(Number);
    const target = value("target");
    if (!target && !widths.length) throw new Error("Offer at least one bit-width.");
    const request = {
      budgets: parts(value("budgets"), /,(?!\d{3}\b)/),
      samples: Number(value("samples")),
      holdout_samples: Number(value("holdout")),
      loss: value("loss") || "auto",
      effort: value("effort"),
      rounding: value("rounding"),
    };
    const corrections = checked("corrections");
    if (corrections.length) request.corrections = corrections;
    const allow = checked("allow");
    if (allow.length) request.allow = allow;
    if (request.rounding === "learned") request.iterations = Number(value("iterations"));
    // A target brings all bit-widths that it stores.
    if (target) request.target = target;
    else request.weight_bits = widths;
    const outputs = parts(value("outputs"), ",");
    if (outputs.length) request.outputs = outputs;
    return request;
  }

  const learning = document.getElementById("learning");
  document.getElementById("rounding").addEventListener("change", (event) => {
    learning.hidden = event.target.value !== "learned";
  });

  document.getElementById("target").addEventListener("change", (event) => {
    document.getElementById("widths").disabled = Boolean(event.target.value);
  });

  /** Upload what is missing, and submit a job of `kind` that `say` makes of the request. */
  async function submit(kind, say, labels) {
    complain("");
    uploads.replaceChildren();
    const request = say(planRequest());
    const model = await idOf("model");
    const dataset = await idOf("dataset");
    return call("/v1/jobs", { method: "POST", body: { kind, model, dataset, request, labels } });
  }

  /** Run `act` with the buttons disabled; a problem is said, and they work again. */
  async function busy(act) {
    go.disabled = estimate.disabled = true;
    try {
      await act();
    } catch (reason) {
      complain(reason.message);
    }
    go.disabled = estimate.disabled = false;
  }

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    busy(async () => {
      const name = value("name");
      const job = await submit("plan", (plan) => plan, name ? { name } : {});
      location.assign(`/jobs/${job.id}`);
    });
  });

  // ------------------------------------------------------------------ the estimate

  const estimate = document.getElementById("estimate");
  const found = document.getElementById("estimated");

  function facts(pairs, name) {
    const list = make("dl", { class: "facts", "aria-label": name });
    for (const [what, said] of pairs) list.append(make("dt", {}, what), make("dd", {}, said));
    return list;
  }

  /** Wait for a job and return it; what it does meanwhile is said. */
  async function ended(job) {
    while (job.status === "queued" || job.status === "running") {
      found.replaceChildren(make("p", { class: "soft" },
        job.progress ? `${job.progress.text} …` : "waits for its turn …"));
      await new Promise((wake) => setTimeout(wake, 500));
      job = await call(`/v1/jobs/${job.id}`);
    }
    if (job.status !== "succeeded") throw new Error((job.error || {}).detail || job.status);
    return job;
  }

  estimate.addEventListener("click", () => busy(async () => {
    found.hidden = false;
    found.replaceChildren();
    try {
      const job = await ended(await submit("estimate", (plan) => ({ plan }), {}));
      const said = await call(`/jobs/${job.id}/estimate.json`);
      found.replaceChildren(
        make("h3", {}, "What this would take"),
        facts(said.rows.map((row) => [row.what, row.estimate]), "Estimate"),
        make("details", {}, make("summary", {}, "In its parts"),
          facts(said.stages.map((row) => [row.part, `${row.passes} passes; ${row.time}`]),
            "Estimate of the parts"),
          ...said.sentences.map((line) => make("p", { class: "soft" }, line))));
    } catch (reason) {
      found.hidden = true;
      throw reason;
    }
  }));
})();
