// What the pages do beyond links and forms: keep values fresh, draw curves, follow logs, answer to keys.
"use strict";
(() => {
  const root = document.body.dataset.root;
  const find = (selector) => document.querySelector(selector);
  const bar = find("#bar");
  const say = (text) => { bar.textContent = text; bar.hidden = !text; };

  // --- live values ---------------------------------------------------------------------------------------------------
  const STALE = "These values are old: ";
  document.addEventListener("htmx:before:response", (event) => {
    const response = event.detail.ctx.response;
    if (!response.headers.get("x-dist-train")) {
      event.preventDefault();  // the login page of a proxy, for example
      say(`${STALE}something other than dist-train web answered (${response.status}).`);
    } else if (response.status >= 400) {
      say(`${STALE}${response.status === 403 ? "log in again with the address that dist-train web --url prints." : `the server answered with ${response.status}.`}`);
    } else {
      say("");
    }
  });
  document.addEventListener("htmx:error", (event) => {
    const timeout = event.detail.ctx?.request?.signal?.reason === "timeout";
    say(STALE + (timeout ? "the server does not answer." : "the server cannot be reached."));
  });
  document.addEventListener("htmx:after:swap", () => {
    const jobs = find("#jobs");
    if (jobs) document.title = `${jobs.dataset.running} running - dist_train`;
    for (const field of document.querySelectorAll("[aria-describedby^=error-]")) {
      field.setAttribute("aria-invalid", find(`#${field.getAttribute("aria-describedby")}`).textContent !== "");
    }
    drawCurves();
  });

  let sent = false;
  window.addEventListener("pageshow", () => { sent = false; });  // also when the browser goes back to the page
  document.addEventListener("submit", (event) => {
    const question = event.submitter?.dataset.confirm;
    // A double click is one request: the second would be refused, and take the place of the first one's answer.
    if (sent || (question && !window.confirm(question))) event.preventDefault();
    else sent = event.target.method === "post";
  });
  document.addEventListener("click", (event) => {
    const copy = event.target.closest("[data-copy]");
    if (copy) navigator.clipboard?.writeText(copy.previousElementSibling.textContent).then(() => { copy.textContent = "Copied"; });
  });

  // --- keys in the list ----------------------------------------------------------------------------------------------
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !find("#table")) return;
    if (event.target.matches("input[type=search], select, textarea")) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    const links = [...document.querySelectorAll("#body a")];
    const row = document.activeElement.closest("#body tr");
    const at = row ? links.indexOf(row.querySelector("a")) : -1;
    const actions = {
      "/": () => find("#filter input").focus(),
      j: () => links[Math.min(at + 1, links.length - 1)]?.focus(),
      k: () => links[Math.max(at - 1, 0)]?.focus(),
      x: () => row?.querySelector("input").click(),
      s: () => row?.querySelector("[id$=-stop]")?.click(),
      n: () => location.assign(`${root}new`),
    };
    if (actions[event.key]) {
      event.preventDefault();
      actions[event.key]();
    }
  });

  // --- curves --------------------------------------------------------------------------------------------------------
  const PANELS = [
    {title: "Loss", keys: ["train/loss", "val/loss"]},
    {title: "Accuracy, %", keys: ["train/accuracy", "val/accuracy"], scale: 100},
  ];
  const COLOURS = ["#2f6fde", "#d9730d", "#2a9d4b", "#c2379c", "#8a6d00", "#7a5ae0", "#0f8f9c", "#c23b3b"];
  const LOG_FROM = 30;  // ratio of the largest to the smallest loss from which a log axis shows more
  const box = find("#curves");
  const runs = box ? JSON.parse(box.dataset.runs) : [];
  const loaded = new Map();  // run -> {cut, to, points}
  let plots = [];  // {title, axis, kind: what must be drawn anew when it changes, uplot}
  let drawing = false;

  async function load(run) {
    const before = loaded.get(run) ?? {cut: "", to: 0, points: []};
    const answer = await fetch(`${root}jobs/${encodeURIComponent(run)}/points?from=${before.to}&cut=${before.cut}`);
    if (!answer.ok || !answer.headers.get("x-dist-train")) return;
    const {cut, from, to, points} = await answer.json();
    if (to === before.to && cut === before.cut) return;
    loaded.set(run, {cut, to, points: from === 0 ? points : before.points.concat(points)});
  }

  function positions(points, axis) {
    if (axis !== "seconds") return points.map((point) => point[axis]);
    let seconds = 0, last = points[0]?.time, attempt = points[0]?.attempt;
    return points.map((point) => {
      if (point.attempt === attempt) seconds += Math.max(0, point.time - last);
      [last, attempt] = [point.time, point.attempt];
      return seconds;
    });
  }

  function series(run, key, axis, scale) {
    const {points} = loaded.get(run) ?? {points: []};
    const xs = positions(points, axis), curve = [[], []];
    points.forEach((point, index) => {
      if (point[key] !== undefined && xs[index] !== undefined) {
        curve[0].push(xs[index]);
        curve[1].push(point[key] * scale);
      }
    });
    return curve;
  }

  function panels() {
    const own = new Set(), isOwn = [...loaded.values()].some(({points}) => points.some((point) => point["val/accuracy_is_own"]));
    for (const {points} of loaded.values()) {
      for (const point of points) {
        for (const key of Object.keys(point)) if (key.startsWith("val/") && !/\/(loss|accuracy|seen|accuracy_is_own)$/.test(key)) own.add(key);
      }
    }
    return [PANELS[0], isOwn ? {title: "Accuracy", keys: PANELS[1].keys} : PANELS[1], ...[...own].map((key) => ({title: key.slice(4), keys: [key]}))];
  }

  function plot(panel, axis) {
    const curves = [];
    runs.forEach((run, number) => panel.keys.forEach((key) => {
      const data = series(run, key, axis, panel.scale ?? 1);
      if (!data[0].length) return;
      const split = key.slice(0, key.indexOf("/"));
      const colour = COLOURS[(runs.length > 1 ? number : panel.keys.indexOf(key)) % COLOURS.length];
      const label = [runs.length > 1 ? run : "", panel.keys.length > 1 ? split : ""].filter(Boolean).join(", ") || panel.title;
      curves.push({data, label, colour, dash: runs.length > 1 && split === "train" ? [4, 3] : undefined});
    }));
    if (!curves.length) return null;
    const values = curves.flatMap(({data}) => data[1]);
    const low = Math.min(...values), high = Math.max(...values);
    const ink = getComputedStyle(document.body).color;
    const width = Math.max(260, Math.min(560, box.clientWidth));
    const distr = /loss/i.test(panel.title) && low > 0 && high / low >= LOG_FROM ? 3 : 1;
    const joined = uPlot.join(curves.map(({data}) => data));
    const kind = JSON.stringify([axis, distr, ink, width, curves.map(({label}) => label)]);
    const before = plots.find(({title}) => title === panel.title);
    const {min, max} = before?.uplot.scales.x ?? {};
    const isZoomed = before?.axis === axis && (min > before.uplot.data[0][0] || max < before.uplot.data[0].at(-1));
    if (before?.kind === kind) {  // the same chart with more points: a drag that is under way goes on
      before.uplot.setData(joined, !isZoomed);
      if (isZoomed) before.uplot.redraw();
      return before;
    }
    const lines = {stroke: ink, grid: {stroke: "#8884", width: 1}, ticks: {stroke: "#8884", width: 1}};
    const uplot = new uPlot({
      title: panel.title, width, height: 300,
      scales: {x: {time: false}, y: {distr}},
      axes: [lines, {...lines, size: 64}],
      series: [{label: axis}, ...curves.map(({label, colour, dash}) => ({
        label, stroke: colour, width: 1.5, dash, spanGaps: true,
        points: {show: ({data}, number) => data[number].filter((value) => value != null).length < 30, size: 5},
      }))],
    }, joined, null);
    if (isZoomed) uplot.setScale("x", {min, max});
    return {title: panel.title, axis, kind, uplot};
  }

  async function drawCurves() {
    if (!box || drawing) return;
    drawing = true;
    try {
      const state = () => JSON.stringify([...loaded].map(([run, {cut, to}]) => [run, cut, to]));
      const before = state();
      await Promise.all(runs.map(load));
      if (runs.length > 1) say("");  // of one run, the poll of its values says it
      const axis = find("#axis").value;
      if (state() === before && box.dataset.axis === axis && plots.length) return;
      box.dataset.axis = axis;
      const made = panels().map((panel) => plot(panel, axis)).filter(Boolean);
      if (made.length !== plots.length || made.some((each, number) => each !== plots[number])) {
        box.replaceChildren(...made.map(({uplot}) => uplot.root));
      }
      plots = made;
    } catch (error) {
      say(STALE + "the server cannot be reached.");
    } finally {
      drawing = false;
    }
  }
  if (box) {
    find("#axis").addEventListener("change", drawCurves);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { box.dataset.axis = ""; drawCurves(); });
    drawCurves();
    if (runs.length > 1) setInterval(drawCurves, 2000);
  }

  // --- logs ----------------------------------------------------------------------------------------------------------
  const log = find("#log");
  if (log) {
    const MOST = 400000;  // letters that stay on the page
    let offset = "";
    const read = async () => {
      try {
        const answer = await fetch(`${log.dataset.url}?name=${encodeURIComponent(find("#log-name").value)}&offset=${offset}`);
        if (!answer.ok || !answer.headers.get("x-dist-train")) throw new Error(answer.status);
        const found = await answer.json();
        if (found.offset < offset) log.textContent = "";
        if (found.text) log.textContent = (log.textContent + found.text).slice(-MOST);
        if (found.text && find("#follow").checked) log.scrollTop = log.scrollHeight;
        offset = found.offset;
        say("");
      } catch (error) {
        say(STALE + "the log cannot be read.");
      }
    };
    find("#log-name").addEventListener("change", () => { offset = ""; log.textContent = ""; read(); });
    read();
    setInterval(read, 1000);
  }

  // --- try an image --------------------------------------------------------------------------------------------------
  document.addEventListener("change", async (event) => {
    if (event.target.id !== "image" || !event.target.files.length) return;
    const answer = find("#answer");
    answer.textContent = "…";
    const url = `${location.pathname.replace(/\/$/, "")}/predict${find("#anyway")?.checked ? "?anyway=1" : ""}`;
    try {
      const response = await fetch(url, {method: "PUT", body: event.target.files[0], headers: {accept: "application/json"}});
      const found = await response.json();
      const shares = Object.entries(found.classes ?? {}).map(([name, share]) => `${name} ${(100 * share).toFixed(1)} %`);
      const numbers = (found.numbers ?? []).map((number) => number.toPrecision(4));
      answer.textContent = found.error ?? [...shares, ...numbers].join(", ");
    } catch (error) {
      answer.textContent = "The server cannot be reached.";
    }
  });
})();
