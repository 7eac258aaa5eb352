// Images of the bundle's size: planes of values from 0 (the bundle's lowest) to 1 (its highest), channel by channel.

export function blank(shape, value) {
  const [channels, height, width] = shape;
  return { channels, height, width, data: new Float32Array(channels * height * width).fill(value) };
}

export function mapped(image, change) {
  return { ...image, data: image.data.map(change) };
}

export function isFlat(image) {
  return image.data.every((value) => value === image.data[0]);
}

/** The average over channels of each pixel. */
function grey({ channels, height, width, data }) {
  const size = height * width;
  return Float32Array.from({ length: size }, (_, at) => {
    let sum = 0;
    for (let channel = 0; channel < channels; channel++) sum += data[channel * size + at];
    return sum / channels;
  });
}

/** Decode an image file as it is; it must have the bundle's size. */
export async function decoded(blob, shape) {
  const bitmap = await createImageBitmap(blob, { colorSpaceConversion: "none", premultiplyAlpha: "none" });
  return fromCanvas(drawnOn(canvasOf(bitmap.width, bitmap.height), bitmap), shape);
}

/** Decode an image file of any size: it keeps its proportions, and `background` fills the rest. */
export async function fitted(blob, shape, background) {
  const [, height, width] = shape;
  const bitmap = await createImageBitmap(blob);
  const { canvas, context } = filled(width, height, background);
  const scale = Math.min(width / bitmap.width, height / bitmap.height);
  const [w, h] = [bitmap.width * scale, bitmap.height * scale];
  context.drawImage(halved(bitmap, w, h), (width - w) / 2, (height - h) / 2, w, h);
  return fromCanvas(canvas, shape);
}

/** Shrink by halves while the image is more than twice as large, so that no pixel is skipped. */
function halved(source, width, height) {
  let [now, w, h] = [source, source.width, source.height];
  while (w > 2 * width && h > 2 * height) {
    [w, h] = [Math.ceil(w / 2), Math.ceil(h / 2)];
    const canvas = canvasOf(w, h);
    canvas.getContext("2d").drawImage(now, 0, 0, w, h);
    now = canvas;
  }
  return now;
}

export function canvasOf(width, height) {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [width, height];
  return canvas;
}

/** A canvas of one grey, to draw a scaled image on. */
function filled(width, height, background) {
  const canvas = canvasOf(width, height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const level = Math.round(255 * background);
  context.fillStyle = `rgb(${level} ${level} ${level})`;
  context.fillRect(0, 0, width, height);
  context.imageSmoothingQuality = "high";
  return { canvas, context };
}

function drawnOn(canvas, source) {
  canvas.getContext("2d", { willReadFrequently: true }).drawImage(source, 0, 0);
  return canvas;
}

function fromCanvas(canvas, shape) {
  const [channels, height, width] = shape;
  const { data } = canvas.getContext("2d", { willReadFrequently: true }).getImageData(0, 0, width, height);
  const image = blank(shape, 0);
  const size = height * width;
  for (let at = 0; at < size; at++) {
    const [red, green, blue] = [data[4 * at], data[4 * at + 1], data[4 * at + 2]];
    if (channels === 1) image.data[at] = Math.round(0.299 * red + 0.587 * green + 0.114 * blue) / 255;
    else [red, green, blue].forEach((value, channel) => (image.data[channel * size + at] = value / 255));
  }
  return image;
}

/** Show an image on a canvas, a pixel for each of its own. */
export function show(canvas, image) {
  const size = image.height * image.width;
  put(canvas, image, (at) =>
    [0, 1, 2].map((channel) => 255 * image.data[(image.channels === 3 ? channel : 0) * size + at]),
  );
}

/** Show what differs: blue where `after` is brighter than `before`, orange where it is darker. Returns the factor. */
export function showChange(canvas, before, after) {
  const [a, b] = [grey(before), grey(after)];
  const change = b.map((value, at) => value - a[at]);
  const most = change.reduce((largest, value) => Math.max(largest, Math.abs(value)), 1 / 255);
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const none = dark ? [34, 41, 49] : [238, 240, 243];
  const [brighter, darker] = dark ? [[110, 180, 255], [255, 165, 80]] : [[20, 90, 190], [200, 85, 0]];
  put(canvas, after, (at) => {
    const share = change[at] / most;
    const colour = share > 0 ? brighter : darker;
    return none.map((level, channel) => level + Math.abs(share) * (colour[channel] - level));
  });
  return 1 / most;
}

function put(canvas, { height, width }, colourAt) {
  [canvas.width, canvas.height] = [width, height];
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(width, height);
  for (let at = 0; at < height * width; at++) pixels.data.set([...colourAt(at), 255], 4 * at);
  context.putImageData(pixels, 0, 0);
}

/** Scale and centre what was drawn as MNIST did: its longer side to 20 of 28 parts, its centre of mass to the centre. */
export function centred(image, background) {
  const { height, width } = image;
  const weight = grey(image).map((value) => Math.abs(value - background));
  let [left, right, top, bottom, mass, x, y] = [width, -1, height, -1, 0, 0, 0];
  weight.forEach((value, at) => {
    if (value < 0.05) return;
    const [row, column] = [Math.floor(at / width), at % width];
    [left, right] = [Math.min(left, column), Math.max(right, column)];
    [top, bottom] = [Math.min(top, row), Math.max(bottom, row)];
    mass += value;
    x += value * (column + 0.5);
    y += value * (row + 0.5);
  });
  if (!mass) return image;
  const scale = Math.min((20 / 28) * width / (right - left + 1), (20 / 28) * height / (bottom - top + 1));
  const shape = [image.channels, height, width];
  const source = canvasOf(width, height);
  show(source, image);
  const { canvas, context } = filled(width, height, background);
  context.drawImage(
    source, left, top, right - left + 1, bottom - top + 1,
    width / 2 - scale * (x / mass - left), height / 2 - scale * (y / mass - top),
    scale * (right - left + 1), scale * (bottom - top + 1),
  );
  return fromCanvas(canvas, shape);
}

/** The body of a request: uint8 as a .npy file, which says exactly what is meant and nothing else. */
export function npy({ channels, height, width, data }) {
  const shape = `(1, ${channels}, ${height}, ${width})`;
  const text = `{'descr': '|u1', 'fortran_order': False, 'shape': ${shape}, }`;
  const header = text.padEnd(Math.ceil((text.length + 11) / 64) * 64 - 11) + "\n";
  const start = new Uint8Array(10 + header.length);
  start.set([0x93, 0x4e, 0x55, 0x4d, 0x50, 0x59, 1, 0, header.length % 256, header.length >> 8]);
  start.set(new TextEncoder().encode(header), 10);
  return new Blob([start, Uint8Array.from(data, (value) => Math.round(255 * Math.min(1, Math.max(0, value))))]);
}

/** A picture of an answer, which is PNG in base64, as a file. */
export function picture(base64) {
  return new Blob([Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0))], { type: "image/png" });
}
