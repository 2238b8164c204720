// What every page needs: local times, copy buttons, fields that depend on others, and a notice when the server is gone.
"use strict";

// A table that renews itself leaves alone what somebody is choosing in, and gives the keyboard its place back.
let focused = null;
document.addEventListener("htmx:beforeRequest", (event) => {
  const place = event.target;
  if (place.hasAttribute("data-keep-while-checked") && (place.querySelector("input:checked") || document.hidden)) {
    event.preventDefault();
  }
});
document.addEventListener("htmx:beforeSwap", () => (focused = document.activeElement?.id));
document.addEventListener("htmx:afterSwap", (event) => {
  prepare(event.target);
  if (focused && document.activeElement === document.body) document.getElementById(focused)?.focus({ preventScroll: true });
});

const lost = document.getElementById("lost");
const show = (isLost) => {
  lost.hidden = !isLost;
  document.body.toggleAttribute("data-lost", isLost);
};
document.addEventListener("htmx:sendError", () => show(true));
document.addEventListener("htmx:afterOnLoad", () => show(false));

/** Times are written in UTC; a browser shows them in its own zone. */
function localTimes(place) {
  for (const time of place.querySelectorAll("time[datetime]")) {
    const at = new Date(time.dateTime);
    if (!Number.isNaN(at.getTime())) {
      time.textContent = at.toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
      time.title = `${time.dateTime} (UTC)`;
    }
  }
}

function copyButtons(place) {
  for (const block of place.querySelectorAll("pre.command:not([data-copy])")) {
    block.dataset.copy = "";
    const button = document.createElement("button");
    button.type = "button";
    button.className = "quiet";
    button.textContent = "Copy";
    button.addEventListener("click", async () => {
      await navigator.clipboard?.writeText(block.textContent.trim());
      button.textContent = "Copied";
    });
    block.after(button);
  }
}

/** Fields that mean something only while another field has one of some values. */
function dependentFields() {
  for (const field of document.querySelectorAll("[data-only-for]")) {
    const other = document.querySelector(`[name="${field.dataset.onlyFor}"]`);
    if (!other) continue;
    const value = other.value || other.dataset.known || "";
    field.hidden = !field.dataset.values.split(" ").includes(value);
  }
  for (const group of document.querySelectorAll("details[data-group]")) {
    group.hidden = ![...group.querySelectorAll(".field")].some((field) => !field.hidden);
  }
}

function prepare(place) {
  localTimes(place);
  copyButtons(place);
  dependentFields();
}
document.addEventListener("change", dependentFields);
document.addEventListener("click", (event) => {
  const changes = event.target.closest("[data-set]")?.dataset.set;
  if (!changes) return;
  for (const [name, value] of Object.entries(JSON.parse(changes))) {
    const field = document.querySelector(`[name="${name}"]`);
    if (!field) continue;
    field.value = value;
    field.dispatchEvent(new Event("change", { bubbles: true }));
  }
});
document.addEventListener("change", (event) => {
  const upload = event.target.closest("form[data-upload]");
  if (upload) upload.requestSubmit();
});
prepare(document);
