// What every page needs: a table that renews itself leaves alone what somebody is choosing in.
"use strict";

document.addEventListener("htmx:beforeRequest", (event) => {
  const place = event.target;
  if (place.hasAttribute("data-keep-while-checked") && (place.querySelector("input:checked") || document.hidden)) {
    event.preventDefault();
  }
});
