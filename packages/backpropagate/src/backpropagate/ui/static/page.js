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
document.addEventListener("htmx:oobAfterSwap", (event) => prepare(event.target));
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

/** Sections with `data-tab` become tabs; without scripts they stand one below the other. */
function makeTabs() {
  const bar = document.getElementById("tabs");
  const panels = [...document.querySelectorAll("[data-tab]")];
  if (!bar || panels.length < 2) return;
  bar.hidden = false;
  bar.setAttribute("role", "tablist");
  bar.setAttribute("aria-label", "Parts of this page");
  const buttons = panels.map((panel) => {
    const button = document.createElement("button");
    button.type = "button";
    button.id = `to-${panel.id}`;
    button.textContent = panel.dataset.tab;
    button.setAttribute("role", "tab");
    button.setAttribute("aria-controls", panel.id);
    panel.setAttribute("role", "tabpanel");
    bar.append(button);
    return button;
  });
  const choose = (place, isByKey) => {
    panels.forEach((panel, i) => {
      panel.hidden = i !== place;
      buttons[i].setAttribute("aria-selected", String(i === place));
      buttons[i].tabIndex = i === place ? 0 : -1;
    });
    if (isByKey) buttons[place].focus();
    dispatchEvent(new Event("resize"));
  };
  buttons.forEach((button, i) => {
    button.addEventListener("click", () => {
      choose(i);
      history.replaceState(null, "", `#${panels[i].id}`);
    });
    button.addEventListener("keydown", (event) => {
      const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (by) choose((i + by + panels.length) % panels.length, true);
    });
  });
  const target = document.getElementById(location.hash.slice(1));
  choose(Math.max(0, panels.findIndex((panel) => panel === target || (target !== null && panel.contains(target)))));
}
makeTabs();
// On a phone the pages are one row that scrolls; the present one is in sight.
document.querySelector(".side nav [aria-current]")?.scrollIntoView({ block: "nearest", inline: "center" });
prepare(document);
