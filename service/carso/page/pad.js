// The pad: an image of the bundle's size, and ink above it, which is finer. A pixel without ink keeps its exact value.

import { blank, canvasOf, show } from "./images.js";

const SIDE = 336; // pixels of the longer side, at least
const STROKE = 1 / 13; // of the longer side

export class Pad {
  /** `changed` is called after each stroke. */
  constructor(canvas, shape, background, changed) {
    const [channels, height, width] = shape;
    const fine = Math.max(1, Math.round(SIDE / Math.max(height, width)));
    Object.assign(this, { canvas, shape, background, changed, fine, erasing: false, penDown: false });
    this.base = blank(shape, background);
    this.shown = null; // what to show instead of base, such as base with noise
    this.colour = background < 0.5 ? "#ffffff" : "#000000";
    [canvas.width, canvas.height] = [width * fine, height * fine];
    canvas.style.aspectRatio = `${width} / ${height}`;
    this.ink = canvasOf(canvas.width, canvas.height);
    this.pen = this.ink.getContext("2d", { willReadFrequently: true });
    this.pen.lineCap = this.pen.lineJoin = "round";
    this.pen.lineWidth = STROKE * Math.max(width, height) * fine;
    this.inked = false;
    this.cursor = { x: canvas.width / 2, y: canvas.height / 2 };
    this.last = null;
    canvas.addEventListener("pointerdown", (event) => this.#down(event));
    canvas.addEventListener("pointermove", (event) => this.#move(event));
    for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, () => this.#up());
    canvas.addEventListener("keydown", (event) => this.#key(event));
    for (const name of ["focus", "blur"]) canvas.addEventListener(name, () => this.draw());
    this.channels = channels;
    this.draw();
  }

  /** Put an image below, and take the ink away. */
  put(image) {
    this.base = image;
    this.clearInk();
  }

  clearInk() {
    this.pen.clearRect(0, 0, this.ink.width, this.ink.height);
    this.inked = false;
    this.shown = null;
    this.draw();
  }

  /** The image with its ink. */
  image() {
    if (!this.inked) return this.base;
    const { fine } = this;
    const [channels, height, width] = this.shape;
    const { data } = this.pen.getImageData(0, 0, this.ink.width, this.ink.height);
    const image = { ...this.base, data: this.base.data.slice() };
    for (let row = 0; row < height; row++) {
      for (let column = 0; column < width; column++) {
        const sums = [0, 0, 0, 0];
        for (let y = row * fine; y < (row + 1) * fine; y++) {
          for (let x = column * fine; x < (column + 1) * fine; x++) {
            const at = 4 * (y * this.ink.width + x);
            const alpha = data[at + 3];
            for (let part = 0; part < 3; part++) sums[part] += data[at + part] * alpha;
            sums[3] += alpha;
          }
        }
        if (!sums[3]) continue;
        const covered = sums[3] / (255 * fine * fine);
        const levels = sums.slice(0, 3).map((sum) => sum / sums[3] / 255);
        const inks = channels === 3 ? levels : [0.299 * levels[0] + 0.587 * levels[1] + 0.114 * levels[2]];
        inks.forEach((level, channel) => {
          const at = (channel * height + row) * width + column;
          image.data[at] += covered * (level - image.data[at]);
        });
      }
    }
    return image;
  }

  draw() {
    const context = this.canvas.getContext("2d");
    const below = canvasOf(1, 1);
    show(below, this.shown ?? this.base);
    context.imageSmoothingEnabled = false;
    context.drawImage(below, 0, 0, this.canvas.width, this.canvas.height);
    if (!this.shown) context.drawImage(this.ink, 0, 0);
    if (document.activeElement === this.canvas && this.canvas.matches(":focus-visible")) this.#drawCursor(context);
  }

  #drawCursor(context) {
    context.beginPath();
    context.arc(this.cursor.x, this.cursor.y, this.pen.lineWidth / 2, 0, 2 * Math.PI);
    context.lineWidth = 2;
    context.strokeStyle = "#1a9aa0";
    context.fillStyle = "rgb(26 154 160 / .55)";
    if (this.penDown) context.fill();
    context.stroke();
  }

  #at(event) {
    const box = this.canvas.getBoundingClientRect();
    return {
      x: ((event.clientX - box.left) / box.width) * this.canvas.width,
      y: ((event.clientY - box.top) / box.height) * this.canvas.height,
    };
  }

  #down(event) {
    if (event.button) return;
    this.canvas.setPointerCapture(event.pointerId);
    this.last = this.#at(event);
    this.#line(this.last, this.last);
  }

  #move(event) {
    if (!this.last) return;
    const steps = event.getCoalescedEvents?.() ?? [];
    for (const step of steps.length ? steps : [event]) {
      const next = this.#at(step);
      this.#line(this.last, next);
      this.last = next;
    }
  }

  #up() {
    if (!this.last) return;
    this.last = null;
    this.changed();
  }

  #line(from, to) {
    const level = Math.round(255 * this.background);
    this.pen.strokeStyle = this.erasing ? `rgb(${level} ${level} ${level})` : this.colour;
    this.pen.beginPath();
    this.pen.moveTo(from.x, from.y);
    this.pen.lineTo(to.x, to.y + (from.x === to.x && from.y === to.y ? 0.01 : 0));
    this.pen.stroke();
    this.inked = true;
    this.shown = null;
    this.draw();
  }

  #key(event) {
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (step) {
      const before = { ...this.cursor };
      const limit = (value, most) => Math.min(most, Math.max(0, value));
      this.cursor.x = limit(before.x + step[0] * this.fine, this.canvas.width);
      this.cursor.y = limit(before.y + step[1] * this.fine, this.canvas.height);
      if (this.penDown) this.#line(before, this.cursor);
      else this.draw();
    } else if (event.key === " ") {
      this.penDown = !this.penDown;
      if (this.penDown) this.#line(this.cursor, this.cursor);
      else {
        this.draw();
        this.changed();
      }
    } else if (event.key === "Delete" || event.key === "Backspace") {
      this.penDown = false;
      this.canvas.dispatchEvent(new Event("clear"));
    } else return;
    event.preventDefault();
  }
}
