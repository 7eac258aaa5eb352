// The vote as a bar chart that grows, with the bound at which the count may stop closing in.

const PAUSE = 150; // ms between two rounds as they are shown; a count takes a few ms, which nobody could follow
const STEPS = 9; // shown of one count, at most
const SHOWN = 12; // classes, at most

const still = matchMedia("(prefers-reduced-motion: reduce)");
const wait = (ms) => new Promise((done) => setTimeout(done, ms));

export function element(name, className = "", text = "") {
  const made = document.createElement(name);
  made.className = className;
  made.textContent = text;
  return made;
}

export class VoteChart {
  constructor(bars, count, risk) {
    Object.assign(this, { bars, count, risk });
    this.rows = new Map();
  }

  /** Begin: the fast path says `label`. */
  start(classes, label) {
    Object.assign(this, { classes, fast: label, tallies: [] });
    this.rows.clear();
    this.bars.replaceChildren();
    this.count.textContent = "";
    const most = classes.length <= SHOWN ? classes.map((_, at) => at) : [label];
    for (const at of most) this.#row(at);
  }

  add(tally) {
    this.tallies.push(tally);
  }

  /** Show the rounds one after the other, and last the outcome; false: a newer count took over. */
  async play(prediction, asked, isCurrent) {
    const rounds = thinned(this.tallies, STEPS);
    for (const [index, tally] of rounds.entries()) {
      if (!isCurrent()) return false;
      this.#draw(tally, asked, prediction.samples);
      if (!still.matches && index + 1 < rounds.length) await wait(PAUSE);
    }
    if (!isCurrent()) return false;
    this.#outcome(prediction);
    return true;
  }

  #row(label) {
    const row = element("div", "row");
    const name = element("span", "name");
    if (label === this.fast) {
      const mark = element("span", "mark", "▸");
      mark.title = "what the fast path says";
      name.append(mark);
    }
    name.append(this.classes[label]);
    const track = element("span", "track");
    const [bar, bound] = [element("i"), element("span", "bound")];
    bound.hidden = true;
    track.append(bar, bound);
    const votes = element("span", "votes", "0");
    row.append(name, track, votes);
    this.bars.append(row);
    this.rows.set(label, { row, bar, bound, votes });
    return this.rows.get(label);
  }

  #draw(tally, asked, samples) {
    const leader = tally.tally.indexOf(Math.max(...tally.tally));
    const bound = tally.tally[leader] + tally.needed;
    tally.tally.forEach((votes, label) => {
      if (!votes && !this.rows.has(label)) return;
      if (!this.rows.has(label) && this.rows.size >= SHOWN && label !== leader) return;
      const row = this.rows.get(label) ?? this.#row(label);
      row.row.classList.toggle("leader", label === leader);
      row.bar.style.width = `${(100 * votes) / bound}%`;
      row.votes.textContent = votes;
      row.bound.hidden = label !== leader;
    });
    this.count.textContent = tally.needed
      ? `${tally.votes} votes. ${tally.needed} more for ${this.classes[leader]} would settle it.`
      : `${tally.votes} votes, of ${samples} at most: settled.`;
    this.#drawRisk(tally.risk_reached, asked);
  }

  /** On a logarithmic scale, from 1 (nothing is known) to what was asked for. */
  #drawRisk(reached, asked) {
    this.risk.track.hidden = !asked;
    if (!asked) return;
    const part = reached ? Math.min(1, Math.log(reached) / Math.log(asked)) : 1;
    this.risk.bar.style.width = `${100 * Math.max(0, part)}%`;
    this.risk.text.textContent =
      `Risk that all votes would elect another class: at most ${number(reached)}. Counting stops at ${number(asked)}.`;
  }

  #outcome(prediction) {
    const ended = {
      "risk-limited": "The risk that was asked for is reached",
      exact: "No vote that is left could change it",
      deadline: "The deadline ended the count",
    }[prediction.rule];
    this.count.textContent =
      `${prediction.votes} of at most ${prediction.samples} votes were cast. ${ended}, so the count stopped` +
      `${this.tallies.length > 1 ? ` after ${this.tallies.length} rounds` : ""}.`;
  }
}

/** At most `most` of the items, the first and the last among them. */
function thinned(items, most) {
  if (items.length <= most) return items;
  return Array.from({ length: most }, (_, at) => items[Math.round((at * (items.length - 1)) / (most - 1))]);
}

export function ms(value) {
  return `${value < 10 ? value.toFixed(1) : Math.round(value)} ms`;
}

/** At most what the value is, which is positive: what is proven of it is proven of this. */
export function roundedDown(value) {
  const digit = 10 ** (Math.floor(Math.log10(value)) - 2);
  return String(Number((Math.floor(value / digit) * digit).toPrecision(3)));
}

export function number(value) {
  if (!value) return "0";
  return value >= 0.001 ? String(Number(value.toPrecision(2))) : value.toExponential(1);
}
