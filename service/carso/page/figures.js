// The second tab: how the service fares, from /metrics and /info.

import { element, ms, number } from "./vote.js";

const EVERY = 2000; // ms
const KEPT = 90; // points of a line
const ALARM = 2.302; // of the evidence of an attack: log10(201), a false alarm in a hundred lives of the process
const $ = (id) => document.getElementById(id);

/** Read Prometheus' text format: a list of { name, labels, value }. */
export function parsed(text) {
  return text.split("\n").flatMap((line) => {
    const match = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)/.exec(line);
    if (!match) return [];
    const labels = Object.fromEntries([...(match[2] ?? "").matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)].map(([, name, value]) => [name, value]));
    return [{ name: match[1], labels, value: Number(match[3].replace("Inf", "Infinity")) }];
  });
}

const matching = (wanted) => (series) => Object.entries(wanted).every(([name, value]) => series.labels[name] === value);

/** The sum of all series of a name that have these labels. */
function sum(page, name, wanted = {}) {
  return page.filter((series) => series.name === name).filter(matching(wanted)).reduce((total, { value }) => total + value, 0);
}

function gauge(page, name) {
  const found = page.find((series) => series.name === name);
  return found ? found.value : NaN;
}

/** A quantile of a histogram between two looks, in the histogram's unit; NaN: nothing was observed. */
function quantile(now, before, name, wanted, q) {
  const counts = (page) => {
    const found = new Map();
    for (const series of page.filter((each) => each.name === `${name}_bucket`).filter(matching(wanted))) {
      const bound = Number(series.labels.le.replace("+Inf", "Infinity"));
      found.set(bound, (found.get(bound) ?? 0) + series.value);
    }
    return found;
  };
  const [after, earlier] = [counts(now), counts(before)];
  const bounds = [...after.keys()].sort((a, b) => a - b);
  const grown = bounds.map((bound) => after.get(bound) - (earlier.get(bound) ?? 0));
  const rank = q * (grown.at(-1) ?? 0);
  if (!rank) return NaN;
  const at = grown.findIndex((count) => count >= rank);
  if (bounds[at] === Infinity) return bounds[at - 1];
  const [low, below] = at ? [bounds[at - 1], grown[at - 1]] : [0, 0];
  return low + ((bounds[at] - low) * (rank - below)) / (grown[at] - below);
}

const perSecond = (name, wanted) => (now, before, seconds) => (sum(now, name, wanted) - sum(before, name, wanted)) / seconds;
const ratio = (above, below) => (now, before) => above(now, before, 1) / below(now, before, 1);
const latency = (endpoint, q) => (now, before) =>
  1e3 * quantile(now, before, "carso_request_duration_seconds", { endpoint, status: "200" }, q);
const percent = (value) => `${(100 * value).toFixed(1)} %`;

const TILES = [
  ["Robust answers a second", perSecond("carso_requests_total", { endpoint: "/classify", status: "200" }), (v) => v.toFixed(1)],
  ["Fast answers a second", perSecond("carso_requests_total", { endpoint: "/classify/fast", status: "200" }), (v) => v.toFixed(1)],
  ["Votes an image", ratio(perSecond("carso_votes_per_image_sum"), perSecond("carso_votes_per_image_count")), (v) => v.toFixed(1)],
  ["Paths disagree on", ratio(perSecond("carso_path_agreement_total", { agree: "false" }), perSecond("carso_path_agreement_total")), percent],
  ["Robust latency, median", latency("/classify", 0.5), ms],
  ["Robust latency, 95 %", latency("/classify", 0.95), ms],
  ["Requests refused a second", perSecond("carso_rejections_total"), (v) => v.toFixed(1)],
  ["Rows of work that are owed", (now) => sum(now, "carso_queue_rows"), (v) => String(v)],
  ["Evidence of an attack", (now) => gauge(now, "carso_attack_evidence"), (v) => v.toFixed(2), (v) => v >= ALARM,
    `an alarm at ${ALARM}; what you try here counts too`],
  ["Own samples still right", (now) => gauge(now, "carso_canary_correct_ratio"), percent, (v) => v < 1, "classified while it is idle"],
];

export class Figures {
  constructor(service, info) {
    this.service = service;
    this.last = null; // { page, at }
    this.open = false;
    this.tiles = TILES.map(([name, read, write, alarms = () => false, note = ""]) => {
      const tile = element("section", "card tile");
      const value = element("p", "value", "–");
      const line = document.createElementNS("http://www.w3.org/2000/svg", "svg");
      line.setAttribute("viewBox", `0 0 ${KEPT - 1} 36`);
      line.setAttribute("preserveAspectRatio", "none");
      line.setAttribute("aria-hidden", "true");
      tile.append(element("h2", "", name), value, element("p", "note", note), line);
      $("tiles").append(tile);
      return { read, write, alarms, value, line, points: [] };
    });
    this.#served(info);
    document.addEventListener("visibilitychange", () => this.#look());
  }

  /** Begin or stop to look, as the tab is shown or not. */
  show(open) {
    this.open = open;
    this.#look();
  }

  async #look() {
    clearTimeout(this.timer);
    if (!this.open || document.hidden) return;
    try {
      const [page, at] = [parsed(await this.service.text("metrics")), performance.now()];
      $("figures-notice").hidden = true;
      if (this.last) this.#draw(page, this.last.page, (at - this.last.at) / 1000);
      else this.#draw(page, page, 1);
      this.last = { page, at };
    } catch {
      $("figures-notice").textContent = "The metrics of this service cannot be read here. Its gateway may keep them inside.";
      $("figures-notice").hidden = false;
    }
    clearTimeout(this.timer);
    if (this.open) this.timer = setTimeout(() => this.#look(), EVERY);
  }

  #draw(now, before, seconds) {
    for (const { read, write, alarms, value, line, points } of this.tiles) {
      const found = read(now, before, seconds);
      value.textContent = Number.isFinite(found) ? write(found) : "–";
      value.classList.toggle("alarm", alarms(found));
      points.push(Number.isFinite(found) ? found : 0);
      if (points.length > KEPT) points.shift();
      const most = Math.max(...points, 1e-9);
      const first = KEPT - points.length;
      if (points.length < 2) continue;
      const path = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
      path.setAttribute("points", points.map((point, at) => `${first + at},${34 - (32 * Math.max(0, point)) / most}`).join(" "));
      for (const [name, set] of Object.entries({ fill: "none", stroke: "currentColor", "stroke-width": "2", "vector-effect": "non-scaling-stroke" })) path.setAttribute(name, set);
      line.replaceChildren(path);
    }
  }

  #served({ version, bundle, device, limits, risk, certificate }) {
    const adaptive = bundle.table
      .filter(({ defence, threat }) => defence === "carso" && threat.attack === "adaptive")
      .map(({ correct, images, threat }) => `${((100 * correct) / images).toFixed(1)} % of ${images} images at eps ${threat.eps.toFixed(2)}`);
    const facts = {
      Service: version,
      Bundle: `${bundle.name} ${bundle.version}, checksum ${bundle.checksum.slice(0, 12)}`,
      "Under adaptive attack": adaptive.join("; ") || "not measured",
      Classes: bundle.classes.join(", "),
      Images: `${bundle.input.shape.join(" × ")}, from ${bundle.input.low} to ${bundle.input.high}. ${bundle.input.expects}`,
      Votes: `${bundle.samples} at most, at risk ${number(risk)}`,
      Device: `${device.provider}, votes in ${device.precision}: ${device.precision_because}`,
      "A certificate": certificate,
      Evidence: limits.evidence === "full" ? "shown" : "withheld: labels only",
    };
    for (const [name, text] of Object.entries(facts)) $("served").append(element("dt", "", name), element("dd", "", text));
  }
}
