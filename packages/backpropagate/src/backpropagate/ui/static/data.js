// The data page: the cut on the histogram of lengths, and files that are dropped on the page.
"use strict";

(() => {
  const gib = (bytes) => (bytes < 0.1 * 2 ** 30 ? `${(bytes / 2 ** 20).toFixed(0)} MiB` : `${(bytes / 2 ** 30).toFixed(1)} GiB`);
  const whole = (v) => v.toLocaleString("en");

  function showCut() {
    const place = document.getElementById("lengths");
    const slider = document.getElementById("cut");
    if (!place || !slider) return;
    const cuts = JSON.parse(place.dataset.cuts);
    const [cut, over, memory] = cuts[Number(slider.value)];
    const full = cuts.at(-1)[2];
    const rows = Number(place.dataset.rows);
    const kept = over ? `${whole(rows - over)} of ${whole(rows)} examples stay whole, ${whole(over)} are truncated.` : `All ${whole(rows)} examples stay whole.`;
    let need = "";
    if (memory) need = gib(memory) !== gib(full) ? ` Training needs ${gib(memory)} instead of ${gib(full)}.` : ` Training needs ${gib(memory)}.`;
    document.getElementById("cut-words").textContent = `Cut at ${whole(cut)} tokens: ${kept}${need}`;
    slider.setAttribute("aria-valuetext", `${cut} tokens`);
    place.querySelectorAll("rect").forEach((bar, i) => bar.classList.toggle("over", i > Number(slider.value)));
  }

  document.addEventListener("input", (event) => event.target.id === "cut" && showCut());
  document.addEventListener("htmx:afterSwap", showCut);
  document.addEventListener("click", (event) => {
    if (event.target.id === "apply") htmx.trigger("#rows", "renew");
    if (event.target.id !== "cut-use") return;
    const place = document.getElementById("lengths");
    const field = document.getElementById("longest");
    field.value = JSON.parse(place.dataset.cuts)[Number(document.getElementById("cut").value)][0];
    field.focus();
  });

  const form = document.querySelector("form[data-upload]");
  if (!form) return;
  const input = form.querySelector('input[type="file"]');
  for (const kind of ["dragenter", "dragover"]) {
    document.addEventListener(kind, (event) => {
      event.preventDefault();
      form.classList.add("over");
    });
  }
  document.addEventListener("dragleave", (event) => event.relatedTarget || form.classList.remove("over"));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    form.classList.remove("over");
    if (!event.dataTransfer.files.length) return;
    input.files = event.dataTransfer.files;
    form.requestSubmit();
  });
})();
