// The first tab: an image, an attack on it, and what both paths say.

import * as images from "./images.js";
import { Pad } from "./pad.js";
import { Refusal } from "./service.js";
import { element, ms, number, roundedDown, VoteChart } from "./vote.js";

const SOON = 120; // ms after the last change in which no further one came
const THUMBS = 20; // samples that can be taken, at most
const SCORES = 3; // classes of the fast path that are shown
const LEAST = 1 / 128; // the least eps that `certify=max` looks for

const $ = (id) => document.getElementById(id);
const percent = (share) => `${(100 * share).toFixed(share > 0.995 || share < 0.1 ? 1 : 0)} %`;

export class Attack {
  constructor(service, info, samples) {
    Object.assign(this, { service, info, samples: samples.images, split: samples.split });
    const { shape, low, high, background } = info.bundle.input;
    Object.assign(this, { shape, span: high - low, background: (background - low) / (high - low) });
    this.classes = info.bundle.classes;
    this.withheld = info.limits.evidence === "label";
    this.proves = info.certifies && !this.withheld;
    this.pad = new Pad($("pad"), shape, this.background, () => this.#changed());
    this.chart = new VoteChart($("bars"), $("count"), {
      track: $("risk-track"), bar: $("risk-bar").firstElementChild, text: $("risk-is"),
    });
    this.files = new Map(); // of samples that were fetched, decoded
    this.sample = null; // the clean one that was taken
    this.clean = null; // its image, or that of a file: what there was before any change
    this.count = 0; // of the elections begun; the newest is the one that is shown
    this.choices = 0; // of images that were asked for; the newest is the one that is taken
    this.#listen();
  }

  async open() {
    $("risk").options[0].textContent = `${number(this.info.risk)}: the service's`;
    $("centring").hidden = this.shape[0] !== 1;
    $("colour").hidden = this.shape[0] !== 3;
    $("colour").value = this.pad.colour;
    for (const id of ["vote", "pictures"]) $(id).hidden = this.withheld;
    $("proof").hidden = !this.proves;
    const clean = this.samples.filter(({ kind }) => kind === "none").slice(0, THUMBS);
    $("kinds").disabled = true;
    this.#provenance();
    if (!clean.length) return;
    $("samples").hidden = false;
    await Promise.all(clean.map((sample) => this.#thumb(sample)));
    const opening = this.#opening(clean);
    await this.#take(opening.clean, opening);
  }

  /** The first image whose shipped attack fools the fast path and not CARSO, else the first one. */
  #opening(clean) {
    const telling = this.samples.filter((each) => each.kind === "transfer" && each.fast_label !== each.label && each.robust_label === each.label);
    const first = telling[0] && clean.find(({ index }) => index === telling[0].index);
    if (!first) return { clean: clean[0], kind: "none", eps: 0 };
    const strongest = telling.filter(({ index }) => index === first.index).at(-1);
    return { clean: first, kind: "transfer", eps: strongest.eps };
  }

  async #thumb(sample) {
    const button = element("button");
    button.setAttribute("aria-pressed", "false");
    const fooled = this.samples.some((each) => each.index === sample.index && each.robust_label !== each.label);
    button.classList.toggle("fooled", fooled);
    button.setAttribute("aria-label", `A ${this.classes[sample.label]}${fooled ? "; at some strength it fools CARSO" : ""}`);
    button.title = button.getAttribute("aria-label");
    const canvas = images.canvasOf(1, 1);
    button.append(canvas);
    button.addEventListener("click", () => this.#take(sample, { kind: this.#kind(), eps: this.#version()?.eps ?? 0 }));
    $("thumbs").append(button);
    sample.button = button;
    images.show(canvas, await this.#fetched(sample));
  }

  async #fetched(sample) {
    if (!this.files.has(sample.file)) {
      const blob = await this.service.blob(`samples/${encodeURIComponent(sample.file)}`);
      this.files.set(sample.file, await images.decoded(blob, this.shape));
    }
    return this.files.get(sample.file);
  }

  /** Take a test image, and of its attacked versions the one nearest to the strength asked for. */
  async #take(sample, { kind, eps }) {
    this.sample = sample;
    this.clean = await this.#fetched(sample);
    for (const button of $("thumbs").children) button.setAttribute("aria-pressed", String(button === sample.button));
    const kinds = new Set(this.samples.filter(({ index }) => index === sample.index).map((each) => each.kind));
    $("kinds").disabled = false;
    for (const input of this.#radios()) {
      input.disabled = !kinds.has(input.value);
      input.checked = input.value === (kinds.has(kind) ? kind : "none");
    }
    await this.#chooseKind(eps);
  }

  #radios() {
    return document.querySelectorAll('input[name="kind"]');
  }

  #kind() {
    return document.querySelector('input[name="kind"]:checked').value;
  }

  /** The attacked versions that the slider goes through, from the weakest on. */
  #versions() {
    return this.samples
      .filter(({ index, kind }) => this.sample && index === this.sample.index && kind !== "none" && kind === this.#kind())
      .sort((a, b) => a.eps - b.eps);
  }

  #version() {
    const at = Number($("strength").value);
    return this.sample && (at ? this.#versions()[at - 1] : this.sample);
  }

  async #chooseKind(eps) {
    const versions = this.#versions();
    const strength = $("strength");
    strength.max = versions.length;
    strength.disabled = !versions.length;
    const reached = versions.filter((each) => each.eps <= eps + 1e-9).length;
    strength.value = versions.length ? reached || versions.length : 0;
    $("versions").replaceChildren(...(versions.length ? [this.sample, ...versions] : []).map((each) => this.#dot(each)));
    await this.#chooseStrength();
  }

  #dot(sample) {
    const [fast, robust] = [sample.fast_label === sample.label, sample.robust_label === sample.label];
    const dot = element("li", robust ? (fast ? "" : "fools-fast") : "fools-both");
    const said = robust ? (fast ? "both right" : "fools the fast path") : "fools CARSO";
    dot.title = `${sample.kind === "none" ? "clean" : `strength ${sample.eps}`}: ${said}`;
    const text = element("span", "unseen", dot.title);
    dot.append(text);
    return dot;
  }

  async #chooseStrength() {
    const version = this.#version();
    const eps = version?.eps ?? 0;
    $("strength-is").textContent = eps ? `${number(eps)} of ${number(this.span)}` : "none";
    if (!version) return;
    const choice = ++this.choices; // a slider moves faster than files come
    const image = await this.#fetched(version);
    if (choice !== this.choices) return;
    this.pad.put(image);
    this.#changed();
  }

  #provenance() {
    const version = this.#version();
    if (!this.sample) {
      $("provenance").textContent = this.samples.length
        ? "The service holds no gradients, so attacks ship with the bundle, for test images only. Noise works on any image."
        : "This bundle ships no attacked images. Noise works on any image.";
      return;
    }
    const told = [
      version.robust_label !== version.label ? "This one fools CARSO." : "",
      `These are the first images of the ${this.split} set, not a choice; circled ones fool CARSO at some strength. ` +
        "The page opens with the first one on which the two paths differ.",
      version.kind === "none" ? "" : `Made by ${version.attack}: each value is moved by at most ${number(version.eps)}.`,
    ];
    $("provenance").textContent = told.filter(Boolean).join(" ");
  }

  #listen() {
    const on = (id, name, act) => $(id).addEventListener(name, act);
    for (const input of this.#radios()) input.addEventListener("change", () => this.#chooseKind(this.#version()?.eps || Infinity));
    on("strength", "input", () => this.#chooseStrength());
    on("noise", "input", () => {
      const noise = Number($("noise").value);
      $("noise-is").textContent = noise ? `up to ${number(noise * this.span)}` : "none";
      this.#changed();
    });
    for (const id of ["pen", "eraser"]) {
      on(id, "click", () => {
        this.pad.erasing = id === "eraser";
        for (const each of ["pen", "eraser"]) $(each).setAttribute("aria-pressed", String(each === id));
      });
    }
    on("colour", "input", () => (this.pad.colour = $("colour").value));
    on("clear", "click", () => this.#clear());
    on("pad", "clear", () => this.#clear());
    on("invert", "click", () => {
      const inverted = images.mapped(this.pad.image(), (value) => 1 - value);
      if (!this.sample) this.clean = this.clean && images.mapped(this.clean, (value) => 1 - value);
      this.pad.put(inverted);
      this.#changed();
    });
    on("again", "click", () => this.#changed());
    on("risk", "change", () => this.#changed());
    on("open", "click", () => $("file").click());
    on("file", "change", () => {
      if ($("file").files.length) this.#file($("file").files[0]);
      $("file").value = "";
    });
    on("centre", "change", () => this.#changed());
    const over = (event, shown) => {
      event.preventDefault();
      $("dropping").hidden = !shown;
    };
    on("drop", "dragover", (event) => over(event, true));
    on("drop", "dragleave", (event) => over(event, false));
    on("drop", "drop", (event) => {
      over(event, false);
      if (event.dataTransfer.files.length) this.#file(event.dataTransfer.files[0]);
    });
    document.addEventListener("paste", (event) => {
      const file = [...event.clipboardData.files].find(({ type }) => type.startsWith("image/"));
      if (file) this.#file(file);
    });
  }

  #clear() {
    this.#leaveSample();
    this.clean = null;
    this.pad.put(images.blank(this.shape, this.background));
    this.#changed();
  }

  #leaveSample() {
    this.choices++;
    this.sample = null;
    for (const button of $("thumbs").children) button.setAttribute("aria-pressed", "false");
    $("kinds").disabled = $("strength").disabled = true;
    this.#radios()[0].checked = true;
    $("strength").value = $("strength").max = 0;
    $("strength-is").textContent = "none";
    $("versions").replaceChildren();
  }

  async #file(file) {
    let image;
    try {
      image = await images.fitted(file, this.shape, this.background);
    } catch {
      this.#notice(`${file.name || "This"} is not an image that this browser can read.`);
      return;
    }
    this.#leaveSample();
    this.clean = image;
    this.pad.put(image);
    this.#changed();
  }

  #notice(text) {
    $("notice").textContent = text;
    $("notice").hidden = !text;
  }

  /** What is classified: the image with its ink, centred if it is a drawing, and noise over it. */
  #subject() {
    let image = this.pad.image();
    const drawing = !this.sample && !this.clean;
    if (drawing && this.shape[0] === 1 && $("centre").checked) image = images.centred(image, this.background);
    const noise = Number($("noise").value);
    this.pad.shown = null;
    if (noise && !images.isFlat(image)) {
      image = images.mapped(image, (value) => Math.min(1, Math.max(0, value + noise * (2 * Math.random() - 1))));
      if (!drawing) this.pad.shown = image;
    }
    this.pad.draw();
    return image;
  }

  #changed() {
    this.#provenance();
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.#vote(), SOON);
  }

  async #vote() {
    const mine = ++this.count;
    const isCurrent = () => mine === this.count;
    this.running?.abort();
    this.running = new AbortController();
    this.#notice("");
    const subject = this.#subject();
    this.#reset();
    if (images.isFlat(subject)) {
      $("verdict").textContent = "Draw something, or take a test image.";
      this.#ended();
      return;
    }
    try {
      await (this.withheld ? this.#labels(subject, isCurrent) : this.#election(subject, isCurrent));
    } catch (error) {
      if (error.name === "AbortError" || !isCurrent()) return;
      this.#notice(error instanceof Refusal ? error.message : "The service does not answer. Is it running?");
    } finally {
      if (isCurrent()) this.#ended();
    }
  }

  /** Say, for whoever watches the page, how many elections have ended on it. */
  #ended() {
    const { dataset } = document.querySelector("main");
    dataset.ended = Number(dataset.ended ?? 0) + 1;
  }

  #reset() {
    for (const id of ["fast", "robust"]) {
      $(id).classList.remove("wrong");
      $(id).querySelector(".label").textContent = "\u00a0";
      for (const part of [".truth", ".cost"]) $(id).querySelector(part).textContent = "";
    }
    $("fast").querySelector(".scores").replaceChildren();
    $("robust").querySelector(".share").textContent = "";
    $("verdict").className = "";
    $("claim").textContent = "\u00a0";
  }

  async #election(subject, isCurrent) {
    const options = { risk: $("risk").value, ...(this.proves && { certify: "max" }) };
    let answer;
    for await (const [name, content] of this.service.votes(images.npy(subject), options, this.running.signal)) {
      if (!isCurrent()) return;
      if (name === "first_pass") {
        this.#firstPass(content);
        this.chart.start(this.classes, content.label);
      } else if (name === "tally") this.chart.add(content);
      else answer = content;
    }
    const [prediction] = answer.predictions;
    const { timings } = answer;
    $("fast").querySelector(".cost").textContent =
      `${ms(timings.queue_ms + timings.first_pass_ms)} in the engine${this.proves ? ", with the proof" : ""}`;
    if (this.proves) this.#proof(prediction);
    this.#pictures(subject, prediction, isCurrent);
    if (!(await this.chart.play(prediction, prediction.risk, isCurrent))) return;
    this.#label("robust", prediction);
    $("robust").querySelector(".share").textContent =
      prediction.share === 1 ? `all ${prediction.votes} votes` : `${percent(prediction.share)} of ${prediction.votes} votes`;
    $("robust").querySelector(".cost").textContent =
      `${ms(timings.queue_ms + timings.first_pass_ms + timings.vote_ms)} in the engine, ` +
      `${prediction.votes} votes where the published method casts ${prediction.samples}`;
    this.#verdict(prediction);
  }

  /** Where the evidence is withheld there are labels, and nothing else to show. */
  async #labels(subject, isCurrent) {
    const body = images.npy(subject);
    const [fast, robust] = await Promise.all(
      ["classify/fast", "classify"].map((path) => this.service.classify(path, body, {}, this.running.signal)),
    );
    if (!isCurrent()) return;
    const [first, prediction] = [fast.predictions[0], robust.predictions[0]];
    this.#label("fast", first);
    this.#label("robust", prediction);
    this.#verdict({ ...prediction, fast_label: first.label, agree: first.label === prediction.label });
  }

  #firstPass(content) {
    this.#label("fast", content);
    const ranked = content.probabilities.map((share, label) => [share, label]).sort(([a], [b]) => b - a);
    $("fast").querySelector(".scores").replaceChildren(
      ...ranked.slice(0, SCORES).map(([share, label]) => {
        const line = element("li");
        const track = element("span", "track");
        const bar = element("i");
        bar.style.width = `${100 * share}%`;
        track.append(bar);
        line.append(element("span", "", this.classes[label]), track, element("span", "", percent(share)));
        return line;
      }),
    );
  }

  #proof({ fast_label: label, certified }) {
    $("claim").textContent = certified
      ? `The first pass answers ${this.classes[label]} for every image within ${roundedDown(certified.eps)} of this one: ` +
        `no value may differ by more. Its score stays above all others by at least ${roundedDown(certified.margin)}.`
      : `Nothing is proven of this image, not even within ${roundedDown(LEAST)} of it.`;
  }

  #label(id, { label, class_name: name }) {
    const card = $(id);
    card.querySelector(".label").textContent = name;
    if (!this.sample) return;
    const right = label === this.sample.label;
    card.classList.toggle("wrong", !right);
    card.querySelector(".truth").textContent = right ? "right" : `wrong: it was a ${this.classes[this.sample.label]}`;
  }

  #verdict(prediction) {
    const [fast, robust] = [this.classes[prediction.fast_label], prediction.class_name];
    const told = prediction.agree
      ? [`Both paths say ${robust}.`]
      : [`The fast path says ${fast}, CARSO says ${robust}: the image may have been manipulated.`];
    if (this.sample && prediction.label !== this.sample.label) told.push("This image fools CARSO.");
    if (prediction.typical === false) told.push("It is not like the images that the bundle knows, so its label means little.");
    $("verdict").textContent = told.join(" ");
    $("verdict").className = prediction.agree && prediction.typical !== false ? "" : "alarm";
  }

  async #pictures(subject, { explanation }, isCurrent) {
    const opened = (png) => images.decoded(images.picture(png), this.shape);
    const [read, mean, ...voted] = await Promise.all(
      [explanation.input, explanation.mean, ...explanation.votes.map(({ image }) => image)].map(opened),
    );
    if (!isCurrent()) return;
    images.show($("read"), read);
    images.show($("mean"), mean);
    const changed = this.clean && subject.data.some((value, at) => Math.abs(value - this.clean.data[at]) > 0.5 / 255);
    const factor = changed
      ? images.showChange($("change"), this.clean, subject)
      : images.showChange($("change"), read, mean);
    $("change-is").textContent = `${changed ? "what was changed" : "what purifying changes"}, ×${number(factor)}`;
    $("mean-is").textContent = `purified, the mean of ${explanation.averaged}`;
    $("voters").replaceChildren(
      ...voted.map((image, at) => {
        const { label, class_name: name } = explanation.votes[at];
        const item = element("li", this.sample && label !== this.sample.label ? "other" : "");
        const canvas = images.canvasOf(1, 1);
        canvas.setAttribute("role", "img");
        canvas.setAttribute("aria-label", `Purified image ${at + 1}`);
        images.show(canvas, image);
        item.append(canvas, `votes ${name}`);
        return item;
      }),
    );
    $("distance").textContent =
      `The image is ${number(explanation.distance)} away from its purified version, on average over its values.`;
  }
}
