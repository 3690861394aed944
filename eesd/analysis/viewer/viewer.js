"use strict";
// Rows of the page's data: one for each (model, group, task, item, method), as `eesd view` writes them.
const rows = JSON.parse(document.getElementById("data").textContent);
const find = id => document.getElementById(id);
const unique = values => [...new Set(values)];
const FRAME_MS = 16;
const state = { row: null, vanilla: null, now: 0, playing: false, last: 0 };

function element(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function fill(select, values, labels) {
  const before = select.value;
  select.replaceChildren(...values.map((value, i) => {
    const option = element("option", labels[i]);
    option.value = value;
    return option;
  }));
  if (values.includes(before)) select.value = before;
}

// Spaces and line ends of a token on its own, made visible.
const shown = text => text.replace(/ /g, "\u00b7").replace(/\n/g, "\u21b5") || "\u2205";
const percent = value => value === null ? "copied" : value >= 0.995 ? "100 %" : (100 * value).toFixed(value < 0.1 ? 1 : 0) + " %";
const seconds = value => value.toFixed(2) + " s";

function choose() {
  const runs = unique(rows.map(row => row.run));
  fill(find("run"), runs, runs);
  find("run").parentElement.hidden = runs.length === 1;
  const inRun = rows.filter(row => row.run === find("run").value);
  fill(find("task"), unique(inRun.map(row => row.task)), unique(inRun.map(row => row.task_label)));
  const inTask = inRun.filter(row => row.task === find("task").value);
  const items = unique(inTask.map(row => row.item));
  fill(find("item"), items, items.map(item => inTask.find(row => row.item === item).title));
  const inItem = inTask.filter(row => row.item === find("item").value);
  const known = find("method").options.length > 0;
  fill(find("method"), inItem.map(row => row.method), inItem.map(row => row.label));
  // At first the fastest.
  if (!known) find("method").value = inItem.reduce((best, row) => row.decode_s < best.decode_s ? row : best).method;
  state.row = inItem.find(row => row.method === find("method").value);
  state.vanilla = inItem.find(row => row.method === "vanilla") || state.row;
  state.end = Math.max(state.row.decode_s, state.vanilla.decode_s);
  find("machine").textContent = `${state.row.model}, ${state.row.dtype}, ${state.row.device_name}, ${state.row.threads} ${state.row.threads === 1 ? "thread" : "threads"}, engine ${state.row.engine}. ` +
    "Seconds are those of one run, without the prompt.";
  find("prompt").textContent = state.row.prompt;
  drawOutput();
  drawRounds();
  find("time").max = state.end;
  pause();
  go(state.end);
}

// Every token with the moment it was settled.
function pieces(row) {
  const found = [{ text: row.first, kind: "plain", s: 0, round: -1 }];
  row.rounds.forEach((round, index) => {
    round.drafts.slice(0, round.kept).forEach(draft => found.push({ text: draft.text, kind: "accepted", s: round.s, round: index }));
    const rejected = round.drafts.slice(round.accepted);
    if (rejected.length && round.kept === round.accepted) found.push({ rejected, s: round.s, round: index });
    const kind = !round.drafts.length ? "plain" : round.accepted === round.drafts.length ? "bonus" : "corrected";
    if (round.text !== null) found.push({ text: round.text, kind, s: round.s, round: index });
  });
  return found;
}

function drawOutput() {
  find("output").replaceChildren(...pieces(state.row).map(piece => {
    let made;
    if (piece.rejected) {
      made = element("button", piece.rejected.length, "rejected");
      made.type = "button";
      made.setAttribute("aria-label", `${piece.rejected.length} rejected: ` + piece.rejected.map(draft => draft.text).join(", "));
      for (const on of ["mouseenter", "focus"]) made.addEventListener(on, () => showTip(made, piece.rejected));
      for (const off of ["mouseleave", "blur"]) made.addEventListener(off, hideTip);
    } else {
      made = element("span", piece.text, "token " + piece.kind);
      made.title = `round ${piece.round + 1}, ${piece.kind}, ${seconds(piece.s)}`;
    }
    made.dataset.s = piece.s;
    return made;
  }));
}

function showTip(anchor, rejected) {
  const tip = find("tip"), place = anchor.getBoundingClientRect();
  const lines = rejected.map(draft => {
    const line = element("div");
    line.append(element("code", shown(draft.text)), element("span", `draft ${percent(draft.q)}, target ${percent(draft.p)}`));
    return line;
  });
  tip.replaceChildren(element("strong", "Drafted, then rejected"), ...lines);
  tip.hidden = false;
  tip.style.left = Math.max(8, Math.min(place.left + scrollX, innerWidth - tip.offsetWidth - 16)) + "px";
  tip.style.top = place.bottom + scrollY + 6 + "px";
}
const hideTip = () => { find("tip").hidden = true; };

function drawRounds() {
  find("rounds").tBodies[0].replaceChildren(...state.row.rounds.map((round, index) => {
    const line = element("tr"), drafts = element("td");
    round.drafts.forEach((draft, i) => drafts.append(element("code", shown(draft.text), i < round.accepted ? "accepted" : "no"), element("small", " " + percent(draft.q))));
    const added = element("td");
    if (round.text !== null) added.append(element("code", shown(round.text)));
    line.append(element("td", index + 1), element("td", seconds(round.s)), drafts,
      element("td", round.drafts.length ? `${round.accepted} of ${round.drafts.length}` : "\u2013"), added, element("td", round.looked_up ? `copied: ${round.stop}` : round.stop));
    line.dataset.s = round.s;
    return line;
  }));
}

function lane(id, row) {
  const done = row.rounds.filter(round => round.s <= state.now), tokens = 1 + done.reduce((sum, round) => sum + round.kept + (round.text !== null), 0);
  const time = Math.min(state.now, row.decode_s), lane = find(id), share = tokens / row.tokens;
  lane.querySelector(".name").textContent = row.label;
  lane.querySelector("i").style.width = 100 * share + "%";
  lane.querySelector("i").style.background = row.color;
  lane.querySelector(".bar").setAttribute("aria-label", `${row.label}: ${Math.round(100 * share)} percent`);
  lane.querySelector("output").textContent = `${tokens} / ${row.tokens} tokens, ${seconds(time)}`;
}

function go(time) {
  state.now = Math.max(0, Math.min(time, state.end));
  find("time").value = state.now;
  find("time").setAttribute("aria-valuetext", seconds(state.now));
  for (const piece of find("output").children) piece.classList.toggle("future", Number(piece.dataset.s) > state.now + 1e-9);
  let current = null;
  for (const line of find("rounds").tBodies[0].rows) {
    const later = Number(line.dataset.s) > state.now + 1e-9;
    line.classList.toggle("later", later);
    line.classList.remove("now");
    if (!later) current = line;
  }
  if (current && state.now < state.row.decode_s) current.classList.add("now");
  lane("lane-method", state.row);
  lane("lane-vanilla", state.vanilla);
  find("lane-vanilla").hidden = state.vanilla === state.row;
}

function pause() {
  state.playing = false;
  find("play").textContent = "Play";
}

function play() {
  if (state.now >= state.end) go(0);
  state.playing = true;
  state.last = performance.now();
  find("play").textContent = "Pause";
  find("status").textContent = "";
  setTimeout(tick, FRAME_MS);
}

function tick() {
  if (!state.playing) return;
  const moment = performance.now();
  go(state.now + (moment - state.last) / 1000 * Number(find("speed").value));
  state.last = moment;
  if (state.now < state.end) {
    setTimeout(tick, FRAME_MS);
    return;
  }
  pause();
  const ratio = state.vanilla.decode_s / state.row.decode_s;
  find("status").textContent = `${state.row.label} took ${seconds(state.row.decode_s)}, ${state.vanilla.label} ${seconds(state.vanilla.decode_s)}: ${ratio.toFixed(2)} times as fast.`;
}

function stepRound(direction) {
  pause();
  const marks = [0, ...state.row.rounds.map(round => round.s)];
  const next = direction > 0 ? marks.find(s => s > state.now + 1e-9) : marks.filter(s => s < state.now - 1e-9).pop();
  if (next !== undefined) go(next);
}

for (const id of ["run", "task", "item", "method"]) find(id).addEventListener("change", choose);
find("play").addEventListener("click", () => state.playing ? pause() : play());
find("time").addEventListener("input", () => { pause(); go(Number(find("time").value)); });
document.addEventListener("keydown", event => {
  if (["SELECT", "INPUT", "BUTTON", "SUMMARY"].includes(event.target.tagName) || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === " ") { event.preventDefault(); state.playing ? pause() : play(); }
  if (event.key === "ArrowRight") { event.preventDefault(); stepRound(1); }
  if (event.key === "ArrowLeft") { event.preventDefault(); stepRound(-1); }
  if (event.key === "Escape") hideTip();
});
function setTheme(dark) {
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  find("theme").textContent = dark ? "Light" : "Dark";
  find("theme").setAttribute("aria-pressed", dark);
}
setTheme(matchMedia("(prefers-color-scheme: dark)").matches);
find("theme").addEventListener("click", () => setTheme(document.documentElement.dataset.theme !== "dark"));
choose();
