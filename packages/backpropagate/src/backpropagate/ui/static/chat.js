// A conversation, streamed; or two side by side whose models are named after the vote.
"use strict";

(() => {
  const form = document.getElementById("chat");
  if (!form) return;
  const talk = document.getElementById("talk");
  const ask = document.getElementById("ask");
  const state = document.getElementById("chat-state");
  const wrong = document.getElementById("chat-error");
  const votes = document.getElementById("votes");
  const isBlind = form.dataset.blind === "yes";
  const token = form.elements.token.value;
  let messages = [];
  let pair = null;
  let last = null;

  /** The chosen model's key: of a run, what its slider is at. */
  const chosen = (name) => {
    const select = form.elements[name];
    const slider = select.closest(".model-choice").querySelector('input[type="range"]');
    const steps = stepsOf(select);
    return steps ? steps[Number(slider.value)][0] : select.value;
  };
  const stepsOf = (select) => {
    const steps = JSON.parse(select.selectedOptions[0]?.dataset.steps ?? "[]");
    return steps.length > 1 ? steps : null;
  };

  /** A slider from the base model over the checkpoints to the adapter, for a run that has some. */
  function showSlider(place, wanted) {
    const steps = stepsOf(place.querySelector("select"));
    const label = place.querySelector(".steps");
    label.hidden = !steps;
    if (!steps) return;
    const slider = label.querySelector("input");
    slider.max = steps.length - 1;
    const found = steps.findIndex(([key]) => key === wanted);
    slider.value = found < 0 ? steps.length - 1 : found;
    tellStep(place);
  }

  function tellStep(place) {
    const slider = place.querySelector(".steps input");
    const [, label] = stepsOf(place.querySelector("select"))[Number(slider.value)];
    place.querySelector("output").value = label;
    slider.setAttribute("aria-valuetext", label);
  }

  for (const place of form.querySelectorAll(".model-choice")) {
    showSlider(place, place.dataset.chosen);
    place.querySelector("select").addEventListener("change", () => showSlider(place));
    place.querySelector(".steps input").addEventListener("input", () => tellStep(place));
  }

  fetch("/chat/ollama").then((answer) => (answer.ok ? answer.json() : [])).then((models) => {
    if (!models.length) return;
    for (const select of form.querySelectorAll("select")) {
      const group = document.createElement("optgroup");
      group.label = "In Ollama";
      for (const { key, label } of models) group.append(new Option(label, key));
      select.querySelector('optgroup[label="In Ollama"]')?.remove();
      select.append(group);
    }
  });

  const post = (path, fields) => fetch(path, { method: "POST", body: new URLSearchParams({ token, ...fields }) });

  function say(role, text, place = talk) {
    const box = document.createElement("div");
    box.className = `bubble ${role}`;
    box.textContent = text;
    place.append(box);
    box.scrollIntoView({ block: "nearest" });
    return box;
  }

  function fail(error) {
    wrong.textContent = [error.message, error.cause, error.fix].filter(Boolean).join(" ");
    wrong.hidden = false;
  }

  async function stream(fields, box) {
    const answer = await post("/chat/answer", fields);
    if (!answer.ok) throw new Error(answer.status === 403 ? "This page is too old. Load it again." : "The model can't answer.");
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    let said = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return said;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        const found = JSON.parse(line);
        if (found.error) throw found.error;
        if (found.piece) box.textContent = said += found.piece;
      }
    }
  }

  async function answerOne(text) {
    say("user", text);
    messages.push({ role: "user", content: text });
    const box = say("assistant", "…");
    const said = await stream({ target: chosen("target"), messages: JSON.stringify(messages) }, box);
    messages.push({ role: "assistant", content: said });
  }

  async function answerTwo(text) {
    if (!pair) pair = (await (await post("/chat/pair", { target: chosen("target"), other: chosen("other") })).json()).pair;
    const boxes = {};
    talk.replaceChildren();
    for (const side of ["left", "right"]) {
      const column = document.createElement("div");
      column.className = "stack";
      talk.append(column);
      const title = document.createElement("h2");
      title.textContent = side === "left" ? "Left" : "Right";
      title.dataset.side = side;
      column.append(title);
      boxes[side] = say("assistant", "…", column);
    }
    const question = JSON.stringify([{ role: "user", content: text }]);
    last = { prompt: text };
    for (const side of ["left", "right"]) last[side] = await stream({ pair, side, messages: question }, boxes[side]);
    votes.hidden = false;
  }

  ask.addEventListener("submit", async (event) => {
    event.preventDefault();
    const text = ask.elements.text.value.trim();
    if (!text) return;
    const button = ask.querySelector("button");
    button.disabled = true;
    wrong.hidden = true;
    state.textContent = "Answering…";
    ask.elements.text.value = "";
    try {
      await (isBlind ? answerTwo(text) : answerOne(text));
    } catch (error) {
      fail(error);
      messages = messages.slice(0, messages.at(-1)?.role === "user" ? -1 : undefined);
    }
    state.textContent = "";
    button.disabled = false;
    ask.elements.text.focus();
  });

  ask.elements.text.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      ask.requestSubmit();
    }
  });

  votes?.addEventListener("click", async (event) => {
    const better = event.target.dataset.vote;
    if (!better || !last) return;
    const names = await (await post("/chat/vote", { pair, better, ...last })).json();
    for (const title of talk.querySelectorAll("h2")) {
      title.textContent = `${names[title.dataset.side]}${better === title.dataset.side ? " ✓" : ""}`;
    }
    votes.hidden = true;
    pair = last = null;
  });

  document.getElementById("reset").addEventListener("click", () => {
    messages = [];
    pair = last = null;
    talk.replaceChildren();
    wrong.hidden = true;
    if (votes) votes.hidden = true;
  });
  form.addEventListener("change", () => document.getElementById("reset").click());
})();
