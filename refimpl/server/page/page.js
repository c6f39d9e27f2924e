"use strict";
// The chat page. What a model says reaches the document as text nodes alone (textContent), never as markup.

const $ = (id) => document.getElementById(id);
const messages = [];
let stopping = null;
let experts = true; // until the server says that it does not know them

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function headers() {
  const found = { "content-type": "application/json" };
  if ($("key").value) found.authorization = "Bearer " + $("key").value;
  return found;
}

// Control characters and blanks are made visible where a token is shown by itself.
function visible(text) {
  const spelled = (c) => "\\u" + c.charCodeAt(0).toString(16).padStart(4, "0");
  return text.replaceAll("\n", "↵").replace(/[\u0000-\u001f\u007f-\u009f\u200b-\u200f\u202a-\u202e\u2066-\u2069]/g, spelled)
    .replaceAll(" ", "␣");
}

const percent = (logprob) => (100 * Math.exp(logprob)).toFixed(2) + " %";

function row(cells) {
  const made = element("tr");
  for (const cell of cells) made.append(element("td", "", cell));
  return made;
}

function explain(entry, routes) {
  $("token").textContent = visible(entry.token);
  $("probability").textContent = percent(entry.logprob);
  $("runners").replaceChildren(...entry.top_logprobs.map((t) => row([visible(t.token), percent(t.logprob)])));
  $("experts").replaceChildren(...Object.entries(routes || {}).map(([layer, ids]) => row([layer, ids.join(", ")])));
  $("routes").hidden = !routes;
  $("about").hidden = false;
}

function tokenOf(text, entry, routes) {
  const made = element("span", "token", text);
  if (!entry) return made;
  const p = Math.exp(entry.logprob);
  if (p < 0.95) made.classList.add(p < 0.3 ? "sure1" : p < 0.7 ? "sure2" : "sure3");
  made.tabIndex = 0;
  made.title = percent(entry.logprob);
  made.addEventListener("click", () => explain(entry, routes));
  made.addEventListener("keydown", (event) => { if (event.key === "Enter") explain(entry, routes); });
  return made;
}

class Answer {
  constructor() {
    this.box = element("div", "turn assistant");
    this.thinking = element("details", "thinking");
    this.thinking.append(element("summary", "", "Thinking"), this.thought = element("div"));
    this.thinking.hidden = true;
    this.box.append(this.thinking, this.text = element("div", "text"));
    this.said = "";
    this.reasoned = "";
    $("talk").append(this.box);
  }

  take(choice) {
    const delta = choice.delta || {};
    const reasoning = delta.reasoning_content;
    const text = reasoning ?? delta.content ?? "";
    if (choice.finish_reason === "length") this.box.append(element("small", "", " (cut: no more tokens)"));
    if (!text) return;
    const entry = choice.logprobs && choice.logprobs.content && choice.logprobs.content[0];
    const near = $("talk").scrollHeight - $("talk").scrollTop - $("talk").clientHeight < 80;
    (reasoning === undefined ? this.text : this.thought).append(tokenOf(text, entry, choice.experts && choice.experts[0]));
    if (reasoning === undefined) this.said += text;
    else { this.reasoned += text; this.thinking.hidden = false; }
    if (near) $("talk").scrollTop = $("talk").scrollHeight;
  }
}

async function refusal(response) {
  try { return (await response.json()).error; } catch { return { message: response.status + " " + response.statusText }; }
}

async function post(signal) {
  const asked = { messages, stream: true, logprobs: true, top_logprobs: 5 };
  if (experts) asked.experts = true;
  for (const [id, field] of [["temperature", "temperature"], ["seed", "seed"], ["length", "max_tokens"]])
    if ($(id).value !== "") asked[field] = Number($(id).value);
  const response = await fetch("v1/chat/completions", { method: "POST", headers: headers(), body: JSON.stringify(asked), signal });
  if (response.ok) return response;
  const error = await refusal(response);
  if (experts && error.param === "experts") { experts = false; return post(signal); }
  throw new Error(error.message);
}

async function read(response, answer) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const events = (held + value).split("\n\n");
    held = events.pop();
    for (const event of events) {
      if (!event.startsWith("data: {")) continue;
      const found = JSON.parse(event.slice(6));
      if (found.error) throw new Error(found.error.message);
      for (const choice of found.choices) answer.take(choice);
    }
  }
}

async function ask(question) {
  messages.push({ role: "user", content: question });
  $("talk").append(element("div", "turn user", question));
  const answer = new Answer();
  stopping = new AbortController();
  $("send").hidden = true;
  $("stop").hidden = false;
  try {
    await read(await post(stopping.signal), answer);
  } catch (error) {
    if (error.name !== "AbortError") answer.box.append(element("div", "turn error", error.message));
  }
  if (answer.said || answer.reasoned)
    messages.push({ role: "assistant", content: answer.said.trim(), reasoning_content: answer.reasoned.trim() });
  else messages.pop(); // a question without an answer is not asked again with the next one
  $("send").hidden = false;
  $("stop").hidden = true;
  answer.box.dataset.done = "true";
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = $("question").value.trim();
  if (!question || $("send").hidden) return;
  $("question").value = "";
  ask(question);
});
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); $("form").requestSubmit(); }
});
$("stop").addEventListener("click", () => stopping && stopping.abort());
$("close").addEventListener("click", () => { $("about").hidden = true; });
$("clear").addEventListener("click", () => { messages.length = 0; $("talk").replaceChildren(); });

async function name() {
  const response = await fetch("v1/models", { headers: headers() });
  $("model").textContent = response.ok ? (await response.json()).data[0].id : (await refusal(response)).message;
}
$("key").addEventListener("change", name);
name();
