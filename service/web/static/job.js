/* Job page: progress with rate and time left, the log as it grows, cancel. */
(() => {
  "use strict";

  const { make } = globalThis.Bitquota;
  const { call, clock, lasting, data } = globalThis.Pages;
  const FINAL = new Set(["succeeded", "failed", "cancelled", "expired"]);
  const WINDOW_S = 20;
  const MOST_LINES = 500;

  const section = document.getElementById("job");
  const id = section.dataset.job;
  const find = (name) => document.getElementById(name);
  const log = find("log");
  const first = data();

  // ------------------------------------------------------------------ the log

  let lastStage = null;

  function textOf({ type, data: said }) {
    if (type === "progress") {
      const reused = said.reused ? `, ${said.reused} from the ledger` : "";
      return `${said.stage}: ${said.done} of ${said.total}${reused}`;
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

  let seen = [];

  /** Say how fast the stage goes and how long it will take, from the last seconds. */
  function pace(progress) {
    const now = performance.now() / 1000;
    if (seen.length && (seen[0].stage !== progress.stage || seen.at(-1).done > progress.done)) {
      seen = [];
    }
    if (!seen.length || seen.at(-1).done !== progress.done) {
      seen.push({ stage: progress.stage, done: progress.done, at: now });
    }
    while (seen.length > 2 && now - seen[0].at > WINDOW_S) seen.shift();
    const [a, b] = [seen[0], seen.at(-1)];
    const rate = (b.done - a.done) / (b.at - a.at);
    if (!(rate > 0)) return "";
    const shown = rate >= 1 ? `${rate.toFixed(1)} a second` : `${(rate * 60).toFixed(1)} a minute`;
    return `${shown}, about ${lasting((progress.total - progress.done) / rate)} left in this stage`;
  }

  let told = "";

  function show(job) {
    const state = find("state");
    state.textContent = job.status;
    state.className = `state ${job.status}`;
    const running = job.status === "running" && job.progress;
    const bar = find("progress");
    bar.hidden = !running;
    find("stage").textContent = running
      ? `${job.progress.stage}, ${job.progress.done} of ${job.progress.total}` : "";
    if (running) {
      bar.max = Math.max(1, job.progress.total);
      bar.value = job.progress.done;
      find("pace").textContent = pace(job.progress);
    } else if (job.finished_at && job.started_at) {
      find("pace").textContent = `took ${lasting(job.finished_at - job.started_at)}`;
    } else {
      find("pace").textContent = job.status === "queued" ? "waits for its turn" : "";
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
    if (told && told !== job.status) find("said").textContent = `The job is ${job.status}.`;
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
    const fresh = page.getElementById("results");
    if (fresh) find("results").replaceWith(document.adoptNode(fresh));
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
      cancel.disabled = true;
      try {
        await call(`/v1/jobs/${id}/cancel`, { method: "POST" });
      } catch (reason) {
        find("problem").textContent = reason.message;
        find("problem").hidden = false;
        cancel.disabled = false;
      }
    });
  }
})();
