// Sends files in chunks that survive broken lines (tus 1.0), then the form that they belong to.
"use strict";
(() => {
  const CHUNK = 8 << 20;  // bytes in one request
  const STALLED_MS = 30000;  // without a byte sent, a line is taken to be broken
  const LONGEST_WAIT_MS = 10000;
  const TUS = {"tus-resumable": "1.0.0", accept: "application/json"};
  const root = document.body.dataset.root;
  const form = document.querySelector("form[data-upload]");
  const find = (id) => document.getElementById(id);
  const say = (text) => { find("upload-state").textContent = text; find("upload-state").hidden = !text; };
  const sleep = (ms) => new Promise((resolve) => { wake = resolve; setTimeout(resolve, ms); });
  let wake = () => {};  // ends a wait
  let paused = false;
  let current = null;  // the request that is being sent
  let rates = [];  // [ms, bytes sent in all], of the last seconds

  class Refused extends Error {}  // going on by itself would not help
  class Cancelled extends Error {}

  // One request, with what is sent of its body told to `progress`. Resolves for each answer of this server.
  const request = (method, url, headers, body = null, progress = () => {}) => new Promise((resolve, reject) => {
    const sending = new XMLHttpRequest();
    let watch;
    const alive = () => { clearTimeout(watch); watch = setTimeout(() => sending.abort(), STALLED_MS); };
    sending.open(method, url);
    for (const [name, value] of Object.entries({...TUS, ...headers})) sending.setRequestHeader(name, value);
    sending.upload.onprogress = (event) => { alive(); progress(event.loaded); };
    sending.onerror = sending.onabort = () => reject(new Error("The server cannot be reached."));
    sending.onload = () => {
      if (sending.getResponseHeader("x-dist-train")) resolve(sending);
      else reject(new Error(`Something other than dist-train web answered (${sending.status}).`));
    };
    sending.onloadend = () => { clearTimeout(watch); current = null; };
    current = sending;
    alive();
    sending.send(body);
  });

  const reason = (answer) => {
    if (answer.status === 403) return "Log in again with the address that dist-train web --url prints, then go on.";
    try { return JSON.parse(answer.responseText).error; } catch (error) { return `The server answered with ${answer.status}.`; }
  };

  async function create(file, key) {
    const name = btoa(String.fromCodePoint(...new TextEncoder().encode(file.name)));
    const answer = await request("POST", `${root}uploads`, {"upload-length": file.size, "upload-metadata": `filename ${name}`});
    if (answer.status !== 201) throw new Refused(reason(answer));
    const url = answer.getResponseHeader("location");
    localStorage.setItem(key, url);
    return url;
  }

  // The address of an upload of this file that was begun, with the bytes that it has; else of a new one.
  async function begin(file, key) {
    const url = localStorage.getItem(key);
    if (url) {
      const answer = await request("HEAD", root + url, {});
      if (answer.status === 200) return [url, Number(answer.getResponseHeader("upload-offset"))];
      if (answer.status !== 404) throw new Refused(reason(answer));
    }
    return [await create(file, key), 0];
  }

  async function send(file) {
    const key = `upload ${root}${file.name} ${file.size} ${file.lastModified}`;
    let url = null, offset = 0, wait = 500;
    rates = [];
    for (;;) {
      try {
        while (paused) await sleep(1e6);
        if (cancelled) throw new Cancelled();
        if (url === null) [url, offset] = await begin(file, key);
        if (paused || cancelled) continue;  // pressed meanwhile
        show(file, offset);
        if (offset === file.size) return url.split("/").pop();
        const from = offset;
        const answer = await request("PATCH", root + url, {"content-type": "application/offset+octet-stream", "upload-offset": from},
          file.slice(from, from + CHUNK), (sent) => show(file, from + sent));
        if (answer.status === 204) {
          offset = Number(answer.getResponseHeader("upload-offset"));
          wait = 500;
          say("");
        } else if ([404, 409, 423, 503].includes(answer.status)) {  // another tab sends it, or has sent it
          url = null;
          if (answer.status !== 404) await sleep(1000);
        } else {
          throw new Refused(reason(answer));
        }
      } catch (error) {
        if (cancelled) { await forget(key); throw new Cancelled(); }
        if (error instanceof Refused) { pause(true); say(error.message); }
        else if (!paused) {
          say(`${error.message} It goes on by itself.`);
          await sleep(wait);
          wait = Math.min(2 * wait, LONGEST_WAIT_MS);
        }
        url = null;  // ask how much has come
      }
    }
  }

  async function forget(key) {
    const url = localStorage.getItem(key);
    localStorage.removeItem(key);
    try { if (url) await request("DELETE", root + url, {}); } catch (error) { /* it is removed after some days */ }
  }

  const bytes = (count) => {
    for (const unit of ["B", "kB", "MB", "GB"]) {
      if (count < 1000) return `${unit === "B" ? count : count.toFixed(1)} ${unit}`;
      count /= 1000;
    }
    return `${count.toFixed(1)} TB`;
  };

  function show(file, sent) {
    const now = performance.now();
    rates = [...rates.filter(([at]) => now - at < 5000), [now, sent]];
    const [first, before] = rates[0];
    const rate = now - first > 500 ? (sent - before) / (now - first) * 1000 : 0;
    find("sent").value = file.size ? sent / file.size : 1;
    find("sent-text").textContent = `${bytes(sent)} of ${bytes(file.size)} of ${file.name}${rate > 0 && !paused ? `, ${bytes(rate)}/s` : ""}`;
  }

  let cancelled = false;
  const pause = (on) => {
    paused = on;
    find("pause").textContent = on ? "Go on" : "Pause";
    rates = [];
    if (on) current?.abort();
    else { say(""); wake(); }
  };
  const working = (on) => {
    for (const id of ["pause", "stop-upload", "sending"]) find(id).hidden = !on;
    for (const id of ["begin", "empty"]) if (find(id)) find(id).disabled = on;
  };
  find("pause").addEventListener("click", () => pause(!paused));
  find("stop-upload").addEventListener("click", () => { cancelled = true; paused = false; current?.abort(); wake(); });

  form.addEventListener("submit", async (event) => {
    const inputs = [...form.querySelectorAll("input[type=file]")].filter((input) => input.files.length);
    if (!inputs.length || event.submitter?.name === "empty") return;
    event.preventDefault();
    event.stopPropagation();  // it is sent once the files are
    const most = Number(form.dataset.most ?? Infinity);
    const file = find("zip").files[0];
    if (file && file.size > most) { say(`${file.name} has ${bytes(file.size)}, more than ${bytes(most)}: a zip of code holds no data.`); return; }
    cancelled = false;
    pause(false);
    working(true);
    try {
      for (const input of inputs) {
        const value = await send(input.files[0]);
        form.append(Object.assign(document.createElement("input"), {type: "hidden", name: input.dataset.field, value}));
      }
      form.submit();
    } catch (error) {
      working(false);
      say(error instanceof Cancelled ? "Cancelled: nothing was added." : error.message);
    }
  });
})();
