"use strict";
// A page small enough to read: elements with children, attributes and listeners, enough to run the dashboard's own script.
// Usage: node dashboard_stand_in.js page.html, a list of steps as JSON on the command line; prints what is then on the page.
const fs = require("fs");
const page = fs.readFileSync(process.argv[2], "utf-8");
const scripts = [...page.matchAll(/<script(?: type="application\/json")?(?: id="([^"]+)")?>([\s\S]*?)<\/script>/g)];

class Node {
  constructor(tag) { Object.assign(this, { tag, children: [], attributes: {}, listeners: {}, namespaceURI: "svg", value: "", text: null }); }
  append(...children) {
    for (const child of children) {
      if (typeof child !== "string" && !(child instanceof Node)) throw new Error(`${child} is no child of <${this.tag}>`);
      this.children.push(child);
    }
  }
  replaceChildren(...children) { this.children = []; this.append(...children); }
  setAttribute(name, value) { this.attributes[name] = String(value); }
  addEventListener(name, listener) { this.listeners[name] = listener; }
  fire(name) { if (!this.disabled) this.listeners[name]({ target: this }); }
  get textContent() { return this.text ?? this.children.map((c) => (typeof c === "string" ? c : c.textContent)).join(""); }
  set textContent(text) { this.text = text; }
  *all() { yield this; for (const child of this.children) if (child instanceof Node) yield* child.all(); }
}

const byId = {};
for (const id of ["marks", "search", "family", "found", "latents", "before", "next", "latent", "families"]) byId[id] = new Node(id);
for (const [, id, text] of scripts) if (id) (byId[id] = new Node("script")).text = text;
globalThis.document = {
  getElementById: (id) => byId[id] ?? null,
  createElement: (tag) => new Node(tag),
  createElementNS: (space, tag) => new Node(tag),
};
globalThis.location = { hash: process.argv[4] ?? "" };
globalThis.window = { addEventListener: () => {} };
(0, eval)(scripts.at(-1)[2]);

const steps = {
  open: (at) => [...byId.latents.all()].filter((n) => n.tag === "td").flatMap((n) => [...n.all()]).filter((n) => n.tag === "button")[at].fire("click"),
  sort: (column) => [...byId.latents.all()].find((n) => n.tag === "button" && n.textContent.startsWith(column)).fire("click"),
  search: (text) => { byId.search.value = text; byId.search.fire("input"); },
  family: (name) => { byId.family.value = name; byId.family.fire("change"); },
  colour: (which) => [...byId.latent.all()].filter((n) => n.attributes.type === "radio")[which].fire("change"),
  press: (id) => byId[id].fire("click"),
  whole: () => [...byId.latent.all()].filter((n) => n.tag === "button" && n.textContent === "whole prompt").forEach((n) => n.fire("click")),
};
for (const [step, value] of JSON.parse(process.argv[3])) steps[step](value);
const cells = [...byId.latents.all()].filter((n) => n.tag === "tr").slice(1).map((n) => n.children.map((c) => c.textContent));
const spans = [...byId.latent.all()].filter((n) => n.tag === "span").map((n) => [n.textContent, n.attributes]);
const tags = [...byId.latent.all()].map((n) => n.tag);
console.log(JSON.stringify({ cells, spans, tags, found: byId.found.textContent, latent: byId.latent.textContent, hash: location.hash }));
