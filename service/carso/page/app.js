// The page: its two tabs, and the key that a service may ask for.

import { Attack } from "./attack.js";
import { Figures } from "./figures.js";
import { Service } from "./service.js";

const $ = (id) => document.getElementById(id);
const TABS = ["attack", "figures"];

function askForKey(wrong) {
  const dialog = $("key");
  $("key-wrong").hidden = !wrong;
  return new Promise((resolve) => {
    dialog.querySelector("form").onsubmit = (event) => {
      event.preventDefault();
      dialog.close();
      resolve($("key-value").value.trim());
      $("key-value").value = "";
    };
    dialog.oncancel = (event) => event.preventDefault(); // without a key there is nothing to show
    dialog.showModal();
  });
}

function choose(name, figures) {
  for (const tab of TABS) {
    const button = $(`tab-${tab}`);
    button.setAttribute("aria-selected", String(tab === name));
    button.tabIndex = tab === name ? 0 : -1;
    $(tab).hidden = tab !== name;
  }
  figures.show(name === "figures");
  history.replaceState(null, "", name === "figures" ? "#service" : location.pathname + location.search);
}

function listen(figures) {
  for (const [at, tab] of TABS.entries()) {
    $(`tab-${tab}`).addEventListener("click", () => choose(tab, figures));
    $(`tab-${tab}`).addEventListener("keydown", (event) => {
      const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: TABS.length - 1 }[event.key];
      if (to === undefined) return;
      const next = TABS[(to + TABS.length) % TABS.length];
      choose(next, figures);
      $(`tab-${next}`).focus();
      event.preventDefault();
    });
  }
}

try {
  const service = new Service(askForKey);
  const [info, samples] = await Promise.all([service.json("info"), service.json("samples")]);
  const figures = new Figures(service, info);
  listen(figures);
  if (location.hash === "#service") choose("figures", figures);
  await new Attack(service, info, samples).open();
} catch (error) {
  $("notice").textContent = `This page cannot begin: ${error.message}`;
  $("notice").hidden = false;
  throw error;
}
