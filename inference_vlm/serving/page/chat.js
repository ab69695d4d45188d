// The page: what is asked, what is answered, and what is kept of both. Texts are set as text, never as markup.

import { ApiError, answer, info } from "./api.js";
import { counts, isAnswered, measured, messages, number, read, share, tooLarge, tooMuch } from "./asking.js";

const at = Object.fromEntries([...document.querySelectorAll("[id]")].map((element) => [element.id, element]));
const FIELDS = ["system", "temperature", "top_p", "max_tokens", "seed", "stops"];

let server; // what /info says
let key = sessionStorage.getItem("duet key") ?? "";
let turns = []; // {question, images, expected} and what came of it: {answer, finish, usage, error, most: the longest asked for}
let pictures = []; // of the question that is being written
let edited = null; // {number of the turn, question and pictures that were being written before}
let running = null; // {controller, turn}
const views = new WeakMap(); // turn -> its elements

async function start() {
  try {
    server = await info(key);
  } catch (error) {
    at.door.hidden = error.status !== 401;
    if (error.status === 401) at.key.focus();
    if (error.status !== 401 || key) note(error.message);
    return;
  }
  at.door.hidden = at.composer.hidden = true;
  note("");
  sessionStorage.setItem("duet key", key);
  document.title = at.model.textContent = server.model;
  for (const name of ["temperature", "top_p", "max_tokens"]) at[name].placeholder = number(server.defaults[name]);
  at.max_tokens.max = server.limits.max_tokens;
  at.seed.placeholder = "another each time";
  at.question.placeholder = server.captions ? "Add pictures, then send" : "Ask a question";
  welcome();
  restore();
  at.composer.hidden = false;
  at.question.focus();
}

function welcome() {
  const [title, text] = at.welcome.querySelectorAll("h2, p");
  title.textContent = server.captions ? "What is in a picture?" : "Ask about a picture";
  text.textContent = server.captions
    ? "This model was trained on captions alone: send pictures without a question, and each message is captioned by itself. Questions it has not learned to answer."
    : "Add pictures by the button, by pasting or by dropping them here. Several may go with one question.";
  at.tried.hidden = !server.examples.length;
  at.examples.replaceChildren(...server.examples.map(offered));
}

function offered(example) {
  const button = element("button", "", "example"), item = element("li");
  button.type = "button";
  if (example.image) button.append(shown({ url: example.image, name: "" }));
  const words = element("span", example.question || "Caption it");
  words.dir = "auto";
  button.append(words);
  button.onclick = async () => {
    const { question, image, expected } = example;
    if (image) return send({ question, images: [await measured({ url: image, name: "example" })], expected });
    compose({ question, images: pictures });
    if (!pictures.length) note("Add the picture that is to be asked about.");
  };
  item.append(button);
  return item;
}

// -- asking -----------------------------------------------------------------------------------------------------------

/** Ask what was given, or else what was written, which then makes room. */
function send(given) {
  const turn = { answer: "", ...(given ?? { question: at.question.value.trim(), images: pictures }) };
  if (running || !server || (!turn.question && !turn.images.length)) return;
  const before = edited ? turns.slice(0, edited.number) : turns;
  const body = request(before, turn);
  if (!body) return;
  turns = [...before, turn];
  const draft = edited?.draft;
  edited = null;
  if (!given) compose(draft ?? { question: "", images: [] });
  draw();
  run(turn, body);
}

/** The body of a request; none, said in a line, where it cannot be sent. */
function request(before, turn) {
  if (!at.settings.firstElementChild.checkValidity()) {
    openSettings(true);
    at.settings.firstElementChild.reportValidity();
    return null;
  }
  const found = messages(before, turn, at.system.value.trim(), server.captions);
  const sent = found.length === 1 ? [turn] : [...before.filter(isAnswered), turn];
  const wanted = { model: server.model, messages: found, stream: true, stream_options: { include_usage: true } };
  for (const name of ["temperature", "top_p", "max_tokens", "seed"])
    if (at[name].value !== "") wanted[name] = at[name].valueAsNumber;
  const stops = at.stops.value.split("\n").filter((stop) => stop);
  if (stops.length) wanted.stop = stops;
  turn.most = wanted.max_tokens ?? server.defaults.max_tokens;
  const body = new Blob([JSON.stringify(wanted)]);
  const problem = tooMuch(sent.flatMap((one) => one.images), server.limits) || tooLarge(body.size, server.limits);
  note(problem);
  return problem ? null : body;
}

async function run(turn, body) {
  const controller = new AbortController();
  running = { controller, turn };
  Object.assign(turn, { answer: "", finish: null, usage: null, error: "" });
  drawRunning();
  drawTurn(turn);
  toBottom();
  say("Answering");
  try {
    for await (const event of answer(body, key, controller.signal)) {
      const follows = isAtBottom();
      if (event.text) {
        turn.answer += event.text;
        views.get(turn).written.appendData(event.text);
      } else Object.assign(turn, event);
      if (follows) toBottom();
    }
  } catch (error) {
    if (error.name === "AbortError") turn.finish = "stopped";
    else {
      turn.finish = "failed";
      turn.error = error.message;
      at.door.hidden = error.status !== 401;
      if (!(error instanceof ApiError)) console.error(error);
    }
  }
  if (running?.turn === turn) running = null;
  if (!turns.includes(turn)) return; // a new conversation has begun
  const follows = isAtBottom();
  say(turn.error ? "" : turn.answer || "No words");
  drawRunning();
  drawTurn(turn);
  if (follows) toBottom();
  if (!at.door.hidden) at.key.focus();
  save();
}

function stop() {
  running?.controller.abort();
}

function retry(turn) {
  const number = turns.indexOf(turn);
  if (running || number !== turns.length - 1) return;
  const body = request(turns.slice(0, number), turn);
  if (body) run(turn, body);
}

function edit(turn) {
  if (running) return;
  edited = { number: turns.indexOf(turn), draft: edited?.draft ?? { question: at.question.value, images: pictures } };
  compose(turn);
}

function cancelEdit() {
  const { draft } = edited;
  edited = null;
  compose(draft);
}

function begin() {
  stop();
  running = edited = null;
  turns = [];
  compose({ question: "", images: [] });
  draw();
  save();
}

/** Put a question and its pictures where they can be changed. */
function compose({ question, images }) {
  at.question.value = question;
  pictures = [...images];
  const later = edited ? turns.length - edited.number - 1 : 0;
  at.editing.hidden = !edited;
  at.editing.firstElementChild.textContent =
    `Editing: sending takes the place of this question and its answer` +
    (later ? `, and drops the ${later === 1 ? "turn" : `${later} turns`} after it.` : ".");
  note("");
  drawPictures();
  grow();
  at.question.focus();
}

// -- pictures ---------------------------------------------------------------------------------------------------------

async function addPictures(files) {
  const refused = [];
  for (const file of files) {
    if (!file.type.startsWith("image/")) refused.push(`${file.name} is no picture.`);
    else {
      const problem = tooLarge(Math.ceil(file.size / 3) * 4, server.limits) || (await added(file));
      if (problem) refused.push(`${file.name} was not added. ${problem}`);
    }
  }
  drawPictures();
  note(refused.join(" "));
  at.question.focus();
}

async function added(file) {
  let picture;
  try {
    picture = await read(file);
  } catch {
    return "It cannot be read.";
  }
  const before = server.captions ? [] : turns.slice(0, edited?.number).filter(isAnswered);
  const problem = tooMuch([...before.flatMap((turn) => turn.images), ...pictures, picture], server.limits);
  if (!problem) pictures = [...pictures, picture];
  return problem;
}

function drawPictures() {
  at.pictures.replaceChildren(
    ...pictures.map((picture) => {
      const item = shownItem(picture), button = element("button", "×", "round");
      button.type = "button";
      button.title = button.ariaLabel = `Remove ${picture.name}`;
      button.onclick = () => {
        pictures = pictures.filter((other) => other !== picture);
        drawPictures();
        note("");
        at.question.focus();
      };
      item.append(button);
      return item;
    }),
  );
}

function shownItem(picture) {
  const item = element("li");
  // A format that this browser cannot show, and the server may read, is shown by its name.
  item.append(picture.width ? shown(picture) : element("span", picture.name, "name"));
  return item;
}

function shown(picture) {
  const image = element("img");
  image.onload = () => image.classList.toggle("small", Math.max(image.naturalWidth, image.naturalHeight) < 128);
  image.alt = picture.name;
  image.src = picture.url;
  return image;
}

// -- drawing ----------------------------------------------------------------------------------------------------------

function draw() {
  at.welcome.hidden = turns.length > 0;
  at.turns.replaceChildren(...turns.map((turn) => (views.get(turn) ?? view(turn)).item));
  turns.forEach(drawTurn);
  drawRunning();
  toBottom();
}

function view(turn) {
  const item = at.turn.content.firstElementChild.cloneNode(true);
  const find = (name) => item.querySelector(name);
  find(".shown").append(...turn.images.map(shownItem));
  find(".question .words").textContent = turn.question;
  const written = document.createTextNode("");
  find(".answer .words").append(written);
  find(".edit").onclick = () => edit(turn);
  find(".retry").onclick = () => retry(turn);
  find(".copy").onclick = () => navigator.clipboard.writeText(turn.answer).then(() => say("Copied"), (error) => note(error.message));
  views.set(turn, { item, find, written });
  return views.get(turn);
}

function drawTurn(turn) {
  const { find, written } = views.get(turn), runs = running?.turn === turn;
  written.data = turn.answer;
  const isEmpty = !runs && !turn.answer && isAnswered(turn);
  find(".answer .words").dataset.none = isEmpty ? "no words" : "";
  find(".waiting").hidden = !runs;
  find(".answer").ariaBusy = runs;
  const lost = turn.finish && !isAnswered(turn) ? " This question is left out of what follows." : "";
  find(".error").textContent = turn.error && turn.error + lost;
  find(".error").hidden = !turn.error;
  find(".counts").textContent = runs ? "" : counts(turn, server.positions);
  find(".copy").hidden = runs || !turn.answer || !navigator.clipboard;
  at.turns.querySelectorAll(".retry").forEach((button, number) => (button.hidden = runs || number !== turns.length - 1));
  drawContext();
}

function drawContext() {
  const last = turns.findLast((turn) => turn.usage);
  at.context.hidden = !last || !server.positions;
  if (at.context.hidden) return;
  const used = share(last.usage.total_tokens, server.positions);
  at.context.firstElementChild.value = used;
  at.context.lastElementChild.textContent = `${used} % of ${number(server.positions)} tokens`;
}

function drawRunning() {
  at.send.hidden = Boolean(running);
  at.stop.hidden = !running;
  document.body.classList.toggle("running", Boolean(running));
}

function element(name, text = "", kind = "") {
  const made = document.createElement(name);
  made.textContent = text;
  made.className = kind;
  return made;
}

function note(text) {
  at.note.textContent = text;
  at.note.hidden = !text;
  if (text) at.composer.hidden = false;
}

function say(text) {
  at.said.textContent = text;
}

function isAtBottom() {
  return at.scroll.scrollHeight - at.scroll.scrollTop - at.scroll.clientHeight < 40;
}

function toBottom() {
  at.scroll.scrollTop = at.scroll.scrollHeight;
}

function grow() {
  at.question.style.height = "auto";
  at.question.style.height = `${at.question.scrollHeight + 2}px`;
}

function openSettings(open) {
  at.settings.hidden = !open;
  at.open.ariaExpanded = open;
  (open ? at.system : at.question).focus();
}

// -- what survives a reload -------------------------------------------------------------------------------------------

function place() {
  return `duet ${server.model}`;
}

function save() {
  const settings = Object.fromEntries(FIELDS.map((name) => [name, at[name].value]));
  const draft = edited?.draft ?? { question: at.question.value, images: pictures };
  try {
    sessionStorage.setItem(place(), JSON.stringify({ turns, settings, draft }));
  } catch {
    sessionStorage.removeItem(place());
    note("This conversation is too large to survive a reload of the page.");
  }
}

function restore() {
  const kept = JSON.parse(sessionStorage.getItem(place()) ?? "null");
  if (kept && !turns.length) {
    turns = kept.turns.map((turn) => ({ ...turn, finish: turn.finish ?? "stopped" }));
    for (const name of FIELDS) at[name].value = kept.settings[name];
    compose(kept.draft);
  }
  draw();
}

// -- what people do ---------------------------------------------------------------------------------------------------

at.composer.onsubmit = (event) => {
  event.preventDefault();
  send();
};
at.question.onkeydown = (event) => {
  // Enter that ends the composition of a character is not meant for the page; Safari tells it by its code alone.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
  event.preventDefault();
  send();
};
at.question.oninput = grow;
document.onkeydown = (event) => {
  if (event.key !== "Escape" || event.isComposing) return;
  if (running) stop();
  else if (!at.settings.hidden) openSettings(false);
  else if (edited) cancelEdit();
};
at.stop.onclick = stop;
at.new.onclick = () => server && begin();
at.open.onclick = () => openSettings(at.settings.hidden);
at.close.onclick = () => openSettings(false);
at.settings.firstElementChild.onsubmit = (event) => {
  event.preventDefault();
  openSettings(false);
};
at.editing.lastElementChild.onclick = cancelEdit;
at.add.onclick = () => at.files.click();
at.files.onchange = () => {
  const chosen = [...at.files.files];
  at.files.value = ""; // so that the same file can be chosen again
  addPictures(chosen);
};
at.door.onsubmit = (event) => {
  event.preventDefault();
  key = at.key.value;
  start();
};
document.onpaste = (event) => {
  // Text that was copied with a picture of itself, as from a table, is pasted as text.
  if (!server || !event.clipboardData.files.length || event.clipboardData.getData("text/plain")) return;
  event.preventDefault();
  addPictures([...event.clipboardData.files]);
};
document.ondragover = (event) => {
  if (!hasFiles(event)) return;
  event.preventDefault();
  at.drop.hidden = !server;
};
document.ondragleave = (event) => {
  if (!event.relatedTarget) at.drop.hidden = true;
};
document.ondrop = (event) => {
  // A file leads away from the page, and so does a link, except where text can be written.
  if (!hasFiles(event) && event.target.matches("input, textarea")) return;
  event.preventDefault();
  at.drop.hidden = true;
  if (server) addPictures([...event.dataTransfer.files]);
};
function hasFiles(event) {
  return event.dataTransfer.types.includes("Files");
}
window.onpagehide = () => server && save();

start();
