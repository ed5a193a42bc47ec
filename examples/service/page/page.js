"use strict";

const find = (id) => document.getElementById(id);
const [drop, input, preview, choose] = ["drop", "file", "preview", "choose"].map(find);
const [status_, failure, again, classes] = ["status", "failure", "again", "classes"].map(find);
const maxBytes = Number(document.body.dataset.maxBytes);
let shown = "";
let underWay = null;
let last = null;

/* Everything that comes from a file or from the service is set as text and never as HTML. */
function say(text, heard = "") {
  const span = document.createElement("span"); // read out, and not shown: the list below shows it
  span.className = "heard";
  span.textContent = heard;
  status_.replaceChildren(...(heard ? [span, ` ${text}`] : [text]));
}

function fail(text, retry) {
  say("");
  failure.textContent = text;
  again.hidden = !retry;
  classes.replaceChildren();
}

function size(bytes) {
  const [unit, name] = bytes < 2 ** 20 ? [2 ** 10, "kB"] : [2 ** 20, "MB"];
  return `${(bytes / unit).toFixed(bytes < 100 * unit ? 1 : 0)} ${name}`;
}

function show(file) {
  URL.revokeObjectURL(shown);
  shown = URL.createObjectURL(file);
  preview.alt = `The chosen image, ${file.name}`;
  preview.hidden = false;
  preview.src = shown;
  drop.classList.add("filled");
  choose.textContent = "Choose another image";
}

preview.addEventListener("load", () => preview.classList.toggle("small", preview.naturalWidth <= 64));
preview.addEventListener("error", () => {
  preview.hidden = true;
  drop.classList.remove("filled");
});

/* Probabilities as percentages; what else a model gives as it is. */
function written(score, areShares) {
  if (!areShares) return score.toPrecision(4);
  return score > 0 && score < 0.0005 ? "< 0.1 %" : `${(100 * score).toFixed(1)} %`;
}

function list(predictions) {
  const scores = predictions.map((one) => one.score);
  const areShares = scores.every((score) => score >= 0 && score <= 1);
  const [lowest, highest] = [Math.min(0, ...scores), Math.max(...scores)];
  const rows = predictions.map((one) => {
    const [row, name, score, track, bar] = ["li", "span", "span", "div", "div"].map((kind) => document.createElement(kind));
    [name.className, score.className, track.className, bar.className] = ["name", "score", "track", "bar"];
    name.textContent = one.label ?? `Class ${one.class}`;
    score.textContent = written(one.score, areShares);
    bar.style.width = `${100 * (areShares ? one.score : (one.score - lowest) / (highest - lowest || 1))}%`;
    track.append(bar);
    row.append(name, score, track);
    return row;
  });
  classes.replaceChildren(...rows);
  return `${rows[0].children[0].textContent}, ${rows[0].children[1].textContent}`;
}

async function classify(file) {
  underWay?.abort();
  const ours = new AbortController();
  [underWay, last] = [ours, file];
  failure.textContent = "";
  again.hidden = true;
  if (file.size > maxBytes) {
    fail(`The file has ${size(file.size)}, and this service takes ${size(maxBytes)} at most.`, false);
    return;
  }
  say("Sending the image …");
  classes.classList.add("stale");
  const started = performance.now();
  try {
    const answer = await fetch("predict", { method: "POST", body: file, signal: ours.signal });
    const text = await answer.text();
    const took = Math.max(1, Math.round(performance.now() - started));
    if (ours !== underWay) return;
    let content = {};
    try {
      content = JSON.parse(text);
    } catch {
      // a proxy's page: its status says enough
    }
    if (answer.ok && content.predictions) {
      say(`Answered in ${took} ms`, `Best: ${list(content.predictions)}.`);
    } else {
      const why = typeof content.error === "string" ? content.error : `The service answered with status ${answer.status}`;
      fail(`${why[0].toUpperCase()}${why.slice(1)}.`, [408, 429, 502, 503, 504].includes(answer.status));
    }
  } catch (error) {
    if (error.name !== "AbortError" && ours === underWay) {
      fail("No answer came: the service may have stopped, or the network is gone.", true);
    }
  } finally {
    if (ours === underWay) classes.classList.remove("stale");
  }
}

function take(files, what) {
  if (!files.length) {
    fail(`What was ${what} is no file. Take a JPEG, PNG or WebP image.`, false);
    return;
  }
  show(files[0]);
  classify(files[0]);
}

input.addEventListener("change", () => {
  if (input.files.length) take(input.files, "chosen");
  input.value = ""; // so that the same file can be chosen again
});
again.addEventListener("click", () => {
  input.focus(); // the button goes
  classify(last);
});

/* On the whole window: a browser would leave the page for an image that is dropped beside the field. */
for (const kind of ["dragenter", "dragover"]) {
  window.addEventListener(kind, (event) => {
    event.preventDefault();
    drop.classList.add("over");
  });
}
window.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) drop.classList.remove("over");
});
window.addEventListener("drop", (event) => {
  event.preventDefault();
  drop.classList.remove("over");
  take(event.dataTransfer.files, "dropped");
});
window.addEventListener("paste", (event) => take(event.clipboardData.files, "pasted"));
