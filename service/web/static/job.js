/* Job page: progress of the whole job with time left, the log as it grows, cancel. */
(() => {
  "use strict";

  const { make } = globalThis.Bitquota;
  const { call, clock, lasting, data } = globalThis.Pages;
  const FINAL = new Set(["succeeded", "failed", "cancelled", "expired"]);
  const MOST_LINES = 500;
  const SAID = { queued: "waits", running: "runs", succeeded: "has succeeded", failed: "has failed",
    cancelled: "was cancelled", expired: "has expired" };

  const section = document.getElementById("job");
  const id = section.dataset.job;
  const find = (name) => document.getElementById(name);
  const log = find("log");
  const first = data();

  // ------------------------------------------------------------------ the log

  let lastStage = null;

  /** A stage as a person reads it; a release before sent its name alone. */
  const words = ({ text, stage }) => text || stage;

  /** How many units of a stage are done; one alone says nothing. */
  const counts = ({ done, total }) => (total > 1 ? `, ${done} of ${total}` : "");

  function textOf({ type, data: said }) {
    if (type === "progress") {
      const reused = said.reused ? `, ${said.reused} from the ledger` : "";
      return `${words(said)}${counts(said)}${reused}`;
    }
    if (type === "status") {
      const why = said.reason || (said.error && said.error.detail);
      return why ? `${said.status}: ${why}` : said.status;
    }
    if (type === "cancel_requested") return "asked to stop";
    return `${type}: ${said.text || said.message || JSON.stringify(said)}`;
  }

  function add(entry, at) {
    const stage = entry.type === "progress" ? entry.data.stage : null;
    const text = textOf(entry);
    const low = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
    if (stage && stage === lastStage && log.lastElementChild) {
      // One line for each stage: hundreds of steps would hide what matters.
      log.lastElementChild.lastChild.textContent = text;
    } else {
      log.append(make("li", {}, make("time", { datetime: new Date(at * 1000).toISOString() },
        clock(at)), text));
      while (log.children.length > MOST_LINES) log.firstElementChild.remove();
    }
    lastStage = stage;
    if (low) log.scrollTop = log.scrollHeight;
  }

  // ------------------------------------------------------------------ progress

  /** Say how much of the whole job is done, and how long the rest will take. */
  function pace({ fraction, left_s: left }) {
    if (!fraction) return "";
    const done = `${Math.floor(100 * fraction)} % of the job`;
    return left === null || left === undefined ? done : `${done}, about ${lasting(left)} left`;
  }

  let told = "";
  let latest = first.row;

  function show(job) {
    latest = job;
    const state = find("state");
    state.textContent = job.status;
    state.className = `state ${job.status}`;
    const running = job.status === "running" && job.progress;
    const prepares = job.status === "queued" && job.progress && job.progress.stage === "compile";
    const bar = find("progress");
    bar.hidden = !running;
    find("stage").textContent = running
      ? words(job.progress) + counts(job.progress) : "";
    if (running) {
      // Without a value the bar moves to and fro: nobody knows yet.
      if (job.progress.fraction) bar.value = job.progress.fraction;
      else bar.removeAttribute("value");
      find("pace").textContent = pace(job.progress);
    } else if (job.finished_at && job.started_at) {
      find("pace").textContent = `took ${lasting(job.finished_at - job.started_at)}`;
    } else {
      const turn = job.status === "queued" ? "waits for its turn" : "";
      find("pace").textContent = prepares
        ? `The server is ${words(job.progress)}; the first job waits a minute or two for it.` : turn;
    }
    if (job.cancel_requested && !FINAL.has(job.status)) {
      state.textContent = "stopping";
      find("pace").textContent = "asked to stop; what was measured is kept";
    }
    if (job.error) {
      find("problem").textContent = job.error.detail;
      find("problem").hidden = false;
    }
    find("look").hidden = !job.charts;
    const cancel = find("cancel");
    if (cancel) {
      cancel.hidden = FINAL.has(job.status);
      cancel.disabled = job.cancel_requested;
    }
    // Screen readers hear of states, not of every step.
    if (told && told !== job.status) find("said").textContent = `The job ${SAID[job.status]}.`;
    told = job.status;
    if (FINAL.has(job.status) && !FINAL.has(first.row.status) && job.status === "succeeded") {
      first.row.status = job.status;
      fillResults();
    }
  }

  /** The links to results are made by the server; fetch them once the job has succeeded. */
  async function fillResults() {
    const answer = await fetch(location.href, { credentials: "same-origin" });
    if (!answer.ok) return;
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    for (const name of ["results", "estimate"]) {
      const fresh = page.getElementById(name);
      if (fresh) find(name).replaceWith(document.adoptNode(fresh));
    }
  }

  // ------------------------------------------------------------------ live

  first.log.forEach((entry) => add(entry, entry.at));
  show(first.row);
  if (!FINAL.has(first.row.status)) {
    let last = Number(section.dataset.last);
    let source = null;
    const follow = () => {
      // Opened anew with what was seen last: EventSource alone could not say so.
      source = new EventSource(`/jobs/${id}/live?after=${last}`);
      source.addEventListener("entry", (event) => {
        const entry = JSON.parse(event.data);
        last = Math.max(last, entry.number);
        add(entry, Date.now() / 1000);
      });
      source.addEventListener("row", (event) => {
        const job = JSON.parse(event.data);
        show(job);
        if (FINAL.has(job.status)) setTimeout(() => source.close(), 1000);
      });
      source.onerror = () => {
        source.close();
        if (!FINAL.has(told)) setTimeout(follow, 1000);
      };
    };
    follow();
    addEventListener("pagehide", () => source && source.close());
  }

  const cancel = find("cancel");
  if (cancel) {
    cancel.addEventListener("click", async () => {
      // Seen at once; the server's next word says the same, or that it failed.
      const before = latest;
      show({ ...before, cancel_requested: true });
      find("said").textContent = "The job was asked to stop.";
      try {
        await call(`/v1/jobs/${id}/cancel`, { method: "POST" });
      } catch (reason) {
        find("problem").textContent = reason.message;
        find("problem").hidden = false;
        show(before);
      }
    });
  }
})();
