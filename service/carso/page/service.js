// What the page asks the service. Addresses are relative to this file, so the page works below any prefix.

const ROOT = new URL("../", import.meta.url);
const KEY = "carso-key"; // in sessionStorage: of this tab, until it is closed

/** An answer that is not 2xx, or an event `error`. */
export class Refusal extends Error {
  constructor({ error, message, status }) {
    super(message);
    [this.name, this.status] = [error, status];
  }
}

async function refusalOf(response) {
  const { error = "", message = `the service answers ${response.status}` } = await response.json().catch(() => ({}));
  return new Refusal({ error, message, status: response.status });
}

/** Ask, and ask for a key first if there must be one: `askForKey(wrong)` resolves to one. */
async function ask(path, options, askForKey) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const headers = { ...options.headers, ...(key && { authorization: `Bearer ${key}` }) };
    const response = await fetch(new URL(path, ROOT), { ...options, headers });
    if (response.ok) return response;
    const refusal = await refusalOf(response);
    if (response.status !== 401) throw refusal;
    sessionStorage.setItem(KEY, await askForKey(Boolean(key)));
  }
}

export class Service {
  constructor(askForKey) {
    let asking = null; // many requests may find out at once, and one question is enough
    this.ask = (path, options = {}) =>
      ask(path, options, (wrong) => (asking ??= askForKey(wrong).finally(() => (asking = null))));
  }

  async json(path) {
    return (await this.ask(path)).json();
  }

  async blob(path, options) {
    return (await this.ask(path, options)).blob();
  }

  async text(path) {
    return (await this.ask(path)).text();
  }

  /** Yield [name, content] of each event of an election; the last one is `answer`. Throws Refusal. */
  async *votes(body, options, signal) {
    const response = await this.#post("classify", body, { ...options, explain: true }, signal, "text/event-stream");
    const [reader, decoder] = [response.body.getReader(), new TextDecoder()];
    let text = "";
    for (let part = await reader.read(); !part.done; part = await reader.read()) {
      const blocks = (text + decoder.decode(part.value, { stream: true })).split("\n\n");
      text = blocks.pop();
      for (const block of blocks) {
        const [name, data] = block.split("\n").map((line) => line.slice(line.indexOf(": ") + 2));
        const content = JSON.parse(data);
        if (name === "error") throw new Refusal(content);
        yield [name, content];
      }
    }
  }

  /** Return the answer of a path, for a service that shows labels only. */
  async classify(path, body, options, signal) {
    return (await this.#post(path, body, options, signal, "application/json")).json();
  }

  #post(path, body, options, signal, accept) {
    const query = new URLSearchParams(Object.entries(options).filter(([, value]) => value !== ""));
    const headers = { accept, "content-type": "application/x-npy" };
    return this.ask(`${path}?${query}`, { method: "POST", body, headers, signal });
  }
}
