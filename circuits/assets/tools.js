// Elements, numbers and tokens: what every file of the viewer uses. Names and tokens become text nodes only.

const SVG = "http://www.w3.org/2000/svg";
const PORTS = { q: "read as query", k: "read as key", v: "read as value", other: "read by MLP, logits" };
const READ_AS = { q: "query", k: "key", v: "value" };
const DASHES = [7, 4]; // of a negative edge

function make(space, name, attributes, children) {
  const element = space ? document.createElementNS(space, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes ?? {})) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.flat(9).filter((child) => child !== null && child !== undefined));
  return element;
}
const h = (name, attributes, ...children) => make(null, name, attributes, children);
const s = (name, attributes, ...children) => make(SVG, name, attributes, children);

const signed = (number) => (number === null ? "not scored" : (number < 0 ? "−" : number > 0 ? "+" : "") + short(Math.abs(number)));
const short = (number) =>
  number === 0
    ? "0"
    : Math.abs(number) >= 1e-3 && Math.abs(number) < 1e5
      ? String(Number(number.toPrecision(3)))
      : number.toExponential(1);
const plural = (n, word) => `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;
const visible = (token) => token.replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/^ +$/, "␣");
const quoted = (token) => `“${visible(token).trim() || "␣"}”`;
