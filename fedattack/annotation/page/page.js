"use strict";
const DATA = JSON.parse(document.getElementById("data").textContent);
const LARGEST = 256; // CSS pixels of a side, unless the picture is larger
const QUICK = 500, QUICK_IN_A_ROW = 3; // milliseconds
const at = id => document.getElementById(id);

/* Where answers go. Each has state(rater), answer(rater, token, choice, px), pass(rater, token) for practice, and
   undo(rater), which resolve to the state to show, or are rejected with a sentence. */

class Server {
  kept = "Each answer is saved before the next question shows.";
  async ask(path, body) {
    let reply;
    try {
      reply = await fetch(path, body && {
        method: "POST", body: JSON.stringify(body), headers: {"Content-Type": "application/json"},
      });
    } catch {
      throw new Lost("The server does not answer; your last answer may not have been saved. Trying again …");
    }
    const found = await reply.json();
    if (!reply.ok && !found.state) throw new Error(found.error);
    return found.state;
  }
  state(rater) { return this.ask("/api/state?rater=" + encodeURIComponent(rater)); }
  answer(rater, token, choice, shown_px) { return this.ask("/api/answer", {rater, token, choice, shown_px}); }
  pass(rater, token) { return this.ask("/api/practice", {rater, token}); }
  skip(rater) { return this.ask("/api/practice", {rater, token: null}); }
  undo(rater) { return this.ask("/api/undo", {rater}); }
}

class Lost extends Error {}

class Browser {
  kept = "Answers stay in this browser until you download them.";
  place(rater) { return "fedattack " + DATA.export + " " + rater; }
  load(rater) {
    const text = localStorage.getItem(this.place(rater));
    return text ? JSON.parse(text) : {practice: 0, answers: []};
  }
  store(rater, found) {
    const text = JSON.stringify(found);
    try {
      localStorage.setItem(this.place(rater), text);
      if (localStorage.getItem(this.place(rater)) !== text) throw new Error("not kept");
    } catch {
      throw new Error("This browser keeps nothing for this page (a private window, or full); the answer was not "
        + "taken. Open the file in an ordinary window.");
    }
  }
  async state(rater) {
    const found = this.load(rater), {practice, questions} = DATA.plans[rater];
    const answered = new Set(found.answers.map(one => one.token));
    const started = found.answers.length > 0;
    const common = {rater, question: DATA.question, hint: DATA.hint, options: DATA.options,
      answered: answered.size, total: questions.length, can_undo: started};
    const pictures = one => one.pictures.map(place => DATA.pictures[place]);
    if (!started && found.practice < practice.length) {
      const one = practice[found.practice];
      return {...common, phase: "practice", token: one.token, pictures: pictures(one), right: one.right,
        why: one.why, position: found.practice + 1, practice: practice.length};
    }
    const next = questions.find(one => !answered.has(one.token));
    return next ? {...common, phase: "rate", token: next.token, pictures: pictures(next)} : {...common, phase: "done"};
  }
  async answer(rater, token, choice, shown_px) {
    const now = await this.state(rater);
    if (now.token === token) {
      const found = this.load(rater);
      found.answers.push({token, choice, shown_px, timestamp: new Date().toISOString()});
      this.store(rater, found);
    }
    return this.state(rater);
  }
  async pass(rater, token) {
    const now = await this.state(rater), found = this.load(rater);
    if (now.token === token) this.store(rater, {...found, practice: found.practice + 1});
    return this.state(rater);
  }
  async skip(rater) {
    this.store(rater, {...this.load(rater), practice: DATA.plans[rater].practice.length});
    return this.state(rater);
  }
  async undo(rater) {
    const found = this.load(rater);
    found.answers.pop();
    this.store(rater, found);
    return this.state(rater);
  }
  download(rater) {
    const {answers} = this.load(rater);
    const text = JSON.stringify({format: 1, export: DATA.export, annotator: rater, answers}, null, 1);
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], {type: "application/json"}));
    link.download = `ratings-${rater}-${DATA.export}.json`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  }
}

const backend = DATA.export ? new Browser() : new Server();
let rater = null, now = null;
let busy = true; // nothing is asked, or an answer is on its way
let shownAt = 0, quick = 0;
let keys = new Map(); // key -> what it does now

function show(state) {
  now = state;
  keys = new Map();
  const practice = state.phase === "practice", done = state.phase === "done";
  document.body.dataset.phase = state.phase;
  document.body.dataset.token = "";
  at("where").textContent = practice ? `Practice ${state.position} of ${state.practice}: nothing is recorded`
    : done ? `${state.answered} of ${state.total} answered` : `Question ${state.answered + 1} of ${state.total}`;
  at("who").textContent = `rating as ${state.rater}`;
  const share = practice ? 0 : state.answered / state.total;
  at("bar").firstElementChild.style.width = 100 * share + "%";
  at("bar").setAttribute("aria-valuenow", Math.round(100 * share));
  at("question").textContent = done ? "Done. Thank you." : state.question;
  at("hint").textContent = !done ? state.hint : DATA.export
    ? "Download your answers and send the file to whoever asked you."
    : "All answers are saved; this page can be closed.";
  at("undo").hidden = !state.can_undo;
  at("skip").hidden = !practice;
  at("kept").textContent = backend.kept;
  if (DATA.export) {
    at("download").hidden = !state.answered;
    at("download").classList.toggle("main", done);
  }
  if (state.can_undo) for (const key of ["u", "backspace"]) keys.set(key, undo);
  buttons([]);
  at("pictures").hidden = done;
  at("pictures").replaceChildren();
  if (done) { busy = false; return; }
  ask(state);
}

async function ask(state) {
  const captions = state.pictures.length > 1 ? ["Original", "Reconstruction"] : [""];
  const loaded = [];
  state.pictures.forEach(({src, width, height}, place) => {
    const figure = document.createElement("figure"), image = new Image();
    loaded.push(new Promise((done, failed) => Object.assign(image, {onload: done, onerror: failed})));
    image.src = src;
    image.alt = captions[place] || "Picture to judge";
    Object.assign(image.dataset, {width, height});
    figure.append(image);
    if (captions[place]) figure.append(Object.assign(document.createElement("figcaption"), {textContent: captions[place]}));
    at("pictures").append(figure);
  });
  options(state, true);
  const side = Math.max(...state.pictures.flatMap(({width, height}) => [width, height]));
  at("pictures").style.flexBasis = Math.max(LARGEST, side) + 40 + "px";
  layout();
  try {
    await Promise.all(loaded); // decode() never ends in a tab behind others
  } catch {
    if (now === state) fault("A picture cannot be shown" + await reason(state.pictures) + ".");
    return;
  }
  await new Promise(painted => { // or soon, where nothing is painted: in a tab behind others
    requestAnimationFrame(() => setTimeout(painted));
    setTimeout(painted, 250);
  });
  if (now !== state) return;
  options(state, false);
  document.body.dataset.token = state.token;
  shownAt = performance.now();
  busy = false;
}

async function reason(pictures) {
  for (const {src} of pictures) {
    try {
      const reply = await fetch(src);
      if (!reply.ok) return ": " + (await reply.json()).error;
    } catch { /* of no use to the reader */ }
  }
  return "";
}

function options(state, disabled) {
  buttons(state.options.map(({key, text}, choice) => ({key, text, act: () => answer(choice)})), disabled);
}

function buttons(list, disabled = false) {
  at("answers").classList.toggle("many", list.length > 4);
  at("answers").replaceChildren(...list.map(({key, name, text, act}) => {
    const button = Object.assign(document.createElement("button"), {type: "button", disabled});
    button.append(Object.assign(document.createElement("kbd"), {textContent: name || key.toUpperCase()}));
    if (text !== key) button.append(text);
    button.classList.toggle("bare", text === key);
    button.classList.toggle("word", text.length > 3);
    button.classList.toggle("last", key === "n" || key === "?");
    button.addEventListener("click", event => { if (event.detail < 2) act(); }); // a double click answers once
    keys.set(key, act);
    if (key === "?") keys.set("/", act);
    return button;
  }));
}

/* Nearest neighbour at a whole number of device pixels a pixel; a picture too large for the page is scaled down. */
function layout() {
  const images = [...at("pictures").querySelectorAll("img")];
  if (!images.length) return;
  const gap = parseFloat(getComputedStyle(at("pictures")).columnGap) || 0, ratio = window.devicePixelRatio || 1;
  const wide = (at("pictures").clientWidth - gap * (images.length - 1)) / images.length;
  const high = at("pictures").clientHeight - (images.length > 1 ? 32 : 0);
  for (const image of images) {
    const width = +image.dataset.width, height = +image.dataset.height, side = Math.max(width, height);
    const fits = Math.min(wide / width, high / height, Math.max(LARGEST, side) / side);
    const scale = fits * ratio >= 1 ? Math.floor(fits * ratio + 1e-6) / ratio : fits;
    image.classList.toggle("large", scale * ratio < 1);
    image.style.width = width * scale + "px";
    image.style.height = height * scale + "px";
  }
}

function shownPx() {
  const sizes = [...at("pictures").querySelectorAll("img")].map(image => image.getBoundingClientRect());
  return Math.max(1, Math.round(Math.max(...sizes.map(size => Math.max(size.width, size.height)))));
}

async function take(change, message = "") {
  if (busy) return;
  busy = true;
  document.body.dataset.token = "";
  try {
    const state = await change();
    say(state.phase === "done" ? "" : message);
    show(state);
  } catch (error) {
    fault(error.message);
    if (error instanceof Lost) return again();
    document.body.dataset.token = now?.token || "";
    busy = false;
  }
}

async function again() {
  for (const button of at("answers").children) button.disabled = true;
  for (;;) {
    await new Promise(later => setTimeout(later, 1000));
    try {
      const state = await backend.state(rater), same = now && state.token === now.token;
      say(same ? "The server is back. Your last answer was not saved: please give it again." : "The server is back.");
      return show(state);
    } catch (error) {
      if (!(error instanceof Lost)) return fault(error.message);
    }
  }
}

function answer(choice) {
  if (busy) return;
  document.activeElement.blur();
  if (now.phase === "practice") return feedback(choice);
  quick = performance.now() - shownAt < QUICK ? quick + 1 : 0;
  const {token} = now;
  const message = quick >= QUICK_IN_A_ROW ? "That was quick. Very fast answers are kept, and marked as such." : "";
  return take(() => backend.answer(rater, token, choice, shownPx()), message);
}

function feedback(choice) {
  const state = now, right = state.right.includes(choice), last = state.position === state.practice;
  const after = last ? " That was the practice: from here on, answers count." : "";
  say(state.why + after, right ? "good" : "bad", right ? "Right." : "Not quite.");
  const go = () => take(() => backend.pass(rater, state.token));
  document.body.dataset.token = "";
  keys = new Map([["enter", go]]);
  buttons([{key: " ", name: "Space", text: last ? "Begin" : "Go on", act: go}]);
}

function undo() { quick = 0; return take(() => backend.undo(rater), "Taken back: answer this one again."); }

function say(text, kind = "", head = "") {
  at("message").className = kind;
  at("message").replaceChildren(...(head ? [Object.assign(document.createElement("b"), {textContent: head})] : []), text);
}

function fault(text) { say(text, "fault"); }

function choose() {
  at("where").textContent = "";
  at("question").textContent = "Who are you?";
  at("pictures").hidden = true;
  buttons(DATA.raters.map((name, place) => ({key: String(place + 1), text: name, act: () => begin(name)})));
  busy = false;
}

function begin(name) {
  rater = name;
  location.hash = encodeURIComponent(name);
  busy = false;
  return take(() => backend.state(rater));
}

const held = new Set(); // one press is one answer, however long it is held
document.addEventListener("keydown", event => {
  const key = event.key.toLowerCase(), physical = event.code || event.key;
  const again = event.repeat || held.has(physical);
  held.add(physical);
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  const act = keys.get(key);
  if (again) { if (act || key === "enter" || key === " ") event.preventDefault(); return; }
  if (!act || event.target.tagName === "BUTTON" && (key === "enter" || key === " ")) return;
  event.preventDefault();
  act();
});
document.addEventListener("keyup", event => held.delete(event.code || event.key));
window.addEventListener("blur", () => held.clear());
window.addEventListener("resize", layout);
at("undo").addEventListener("click", event => { if (event.detail < 2 && now.can_undo) undo(); });
at("skip").addEventListener("click", () => take(() => backend.skip(rater)));
at("download").addEventListener("click", () => backend.download(rater));

const named = decodeURIComponent(location.hash.slice(1));
if (DATA.raters.length === 1 || DATA.raters.includes(named)) {
  begin(DATA.raters.includes(named) ? named : DATA.raters[0]);
} else {
  choose();
}
