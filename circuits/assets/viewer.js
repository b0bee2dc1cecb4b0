// The circuit viewer: one module without dependencies, for the HTML file and for the notebook widget alike.
// show(root, data) builds the page from viewer_data.py's data. The order of this file: what is kept by the filters, then the
// drawing, the card, the table, the controls, the keyboard. Names and tokens reach the page as text nodes only.

const SVG = "http://www.w3.org/2000/svg";
const UNIT = 72; // pixels of a unit of the layout
const [LEFT, RIGHT, MARGIN] = [70, 16, 34]; // around the drawing, in pixels
const MANY = 600; // more curves than this are painted on a canvas
const AT_FIRST = 300; // edges shown when a circuit of more than 1,000 is opened
const SAMPLES = 24; // points of a curve that the pointer is compared with
const NEAR = 7; // pixels
const [BATCH, SLOW] = [60, 34]; // curves painted at first in a frame, and the milliseconds of a frame that ask for fewer
const ROWS = 200; // of the table, at a time
const TOP = 6; // contributions on a card
const DASHES = [7, 4];
const PORTS = { q: "read as query", k: "read as key", v: "read as value", other: "read by MLP, logits" };
const AROUND = { both: "both directions", up: "descendants only", down: "ancestors only", own: "its own edges" };
let count = 0; // of viewers in this document, for ids

// ---- small tools ------------------------------------------------------------------------------------------------------

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

const signed = (number) => (number === null ? "not scored" : (number < 0 ? "−" : "+") + short(Math.abs(number)));
const short = (number) =>
  number === 0
    ? "0"
    : Math.abs(number) >= 1e-3 && Math.abs(number) < 1e5
      ? String(Number(number.toPrecision(3)))
      : number.toExponential(1);
const plural = (n, word) => `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;
const visible = (token) => token.replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/^ +$/, "␣");
const quoted = (token) => `“${visible(token).trim() || "␣"}”`;

// ---- the circuit ------------------------------------------------------------------------------------------------------

/** Curves in pixels, strongest last so that it is painted on top; neighbours of every part, strongest first. */
function prepared(data) {
  const { half_width, top } = data.size;
  const x = (across) => LEFT + (across + half_width) * UNIT;
  const y = (up) => MARGIN + (top + 0.5 - up) * UNIT;
  const strokes = [];
  data.edges.forEach((edge, number) =>
    edge.to.forEach((to, head) => {
      const curve = edge.curves[head].map((value, at) => (at % 2 ? y(value) : x(value)));
      strokes.push({ edge, number, from: edge.from, to, curve, path: bezier(curve), points: sampled(curve) });
    }),
  );
  strokes.reverse();
  const incoming = data.parts.map(() => []);
  const outgoing = data.parts.map(() => []);
  for (const stroke of [...strokes].reverse()) {
    incoming[stroke.to].push(stroke);
    outgoing[stroke.from].push(stroke);
  }
  const size = [LEFT + RIGHT + 2 * half_width * UNIT, 2 * MARGIN + (top + 1) * UNIT];
  const magnitudes = data.edges.filter((edge) => edge.score !== null).map((edge) => Math.abs(edge.score));
  return { strokes, incoming, outgoing, x, y, size, magnitudes };
}

const bezier = (c) => `M${c.slice(0, 2).map(Math.round)}C${c.slice(2).map((v) => v.toFixed(1))}`;

function sampled([ax, ay, bx, by, cx, cy, dx, dy]) {
  const points = new Float32Array(2 * SAMPLES);
  for (let at = 0; at < SAMPLES; at += 1) {
    const t = at / (SAMPLES - 1);
    const [a, b, c, d] = [(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t * t * (1 - t), t ** 3];
    points[2 * at] = a * ax + b * bx + c * cx + d * dx;
    points[2 * at + 1] = a * ay + b * by + c * cy + d * dy;
  }
  return points;
}

/** Which strokes the filters keep: score, sign, port, position; then whole paths; then what surrounds the chosen part. */
function kept(data, { strokes }, state) {
  const position = state.position === "" ? null : Number(state.position);
  const isAt = (part) => data.parts[part].pos === position;
  let left = strokes.filter(({ edge, from, to }) => {
    if (edge.score !== null && Math.abs(edge.score) < state.least) return false;
    if (state.sign !== "both" && !(edge.score !== null && (state.sign === "positive" ? edge.score > 0 : edge.score < 0)))
      return false;
    return state.ports.has(edge.port ?? "other") && (position === null || isAt(from) || isAt(to));
  });
  if (state.whole) {
    const kind = (name) => data.parts.flatMap((part, number) => (part.kind === name ? [number] : []));
    const [reached, reaching] = [reach(left, kind("input"), "from", "to"), reach(left, kind("logits"), "to", "from")];
    left = left.filter(({ from, to }) => reached.has(from) && reaching.has(to));
  }
  if (state.chosen === null) return left;
  if (state.around === "own") return left.filter(({ from, to }) => from === state.chosen || to === state.chosen);
  const [after, before] = [reach(left, [state.chosen], "from", "to"), reach(left, [state.chosen], "to", "from")];
  return left.filter(
    ({ from, to }) => (state.around !== "down" && after.has(from)) || (state.around !== "up" && before.has(to)),
  );
}

function reach(strokes, starts, end, other) {
  const next = new Map();
  for (const stroke of strokes) (next.get(stroke[end]) ?? next.set(stroke[end], []).get(stroke[end])).push(stroke[other]);
  const found = new Set(starts);
  for (const part of found) for (const neighbour of next.get(part) ?? []) found.add(neighbour);
  return found;
}

// ---- the viewer -------------------------------------------------------------------------------------------------------

/** Build the viewer in an empty element. Returns {select(name), destroy()}; onselect hears the chosen part's name or "". */
export function show(root, data, { onselect = () => {}, dark = null } = {}) {
  const circuit = prepared(data);
  const id = `circuit-viewer-${(count += 1)}`;
  const first = data.edges.length > 1000 ? circuit.magnitudes[AT_FIRST - 1] : 0;
  const defaults = () => ({
    least: 0,
    sign: "both",
    ports: new Set(Object.keys(PORTS)),
    whole: false,
    position: "",
    around: "both",
  });
  const state = {
    ...defaults(),
    least: first ?? 0,
    chosen: null,
    edge: null,
    hovered: null,
    prompt: 0,
    zoom: 1,
    walk: null,
    rows: ROWS,
    order: "score",
    query: "",
  };
  let shown = [];
  const isMany = circuit.strokes.length > MANY;

  // The skeleton.
  const said = h("p", { class: "said", "aria-live": "polite" });
  const size = h("output", { class: "size" });
  const card = h("aside", { class: "card", "aria-label": "About the part or edge in focus" });
  const stage = h("div", { class: "stage" });
  const table = h("div", { class: "table", hidden: true });
  const controls = h("form", { class: "controls", "aria-label": "Filters", onsubmit: (event) => event.preventDefault() });
  const drawing = drawn(data, circuit, isMany, id);
  const bright = drawing.querySelector(".bright");
  const parts = [...drawing.querySelectorAll(".part")];
  const canvas = isMany ? h("canvas", { "aria-hidden": "true" }) : null;
  const paths = new Map(
    isMany ? [] : circuit.strokes.map((stroke, at) => [stroke, drawing.querySelector(".edges").children[at]]),
  );
  const sheet = h("div", { class: "sheet" }, canvas, drawing);
  stage.append(sheet);
  root.replaceChildren(
    h("header", {}, h("h1", {}, data.title), h("p", {}, data.counts), size, aboutFacts(data.facts), buttons()),
    controls,
    h(
      "section",
      { class: "middle", "aria-label": "Circuit" },
      h("button", { class: "skip", type: "button", onclick: () => view("table") }, "Skip the drawing: edges as a table"),
      stage,
      table,
    ),
    card,
    said,
  );
  root.classList.add("circuit-viewer");
  root.setAttribute("tabindex", "-1"); // so that Escape is heard after a click anywhere

  // What is shown.
  let painting = 0;
  const colour = (name) => getComputedStyle(root).getPropertyValue(name).trim();

  function update() {
    shown = kept(data, circuit, state);
    const touched = new Set(shown.flatMap(({ from, to }) => [from, to]));
    if (state.chosen !== null) touched.add(state.chosen);
    parts.forEach((part, number) => {
      const is = touched.has(number);
      part.setAttribute("aria-pressed", String(state.chosen === number));
      if (part.getAttribute("tabindex") === (is ? "0" : "-1")) return; // untouched parts are not painted again
      part.classList.toggle("away", !is);
      part.setAttribute("tabindex", is ? "0" : "-1");
      part.setAttribute("opacity", is ? "1" : "0.22");
    });
    const visible = new Set(shown);
    for (const [stroke, path] of paths)
      visible.has(stroke) ? path.removeAttribute("display") : path.setAttribute("display", "none");
    paint();
    const n = new Set(shown.map(({ number }) => number)).size;
    size.textContent = `${n.toLocaleString("en")} of ${plural(data.edges.length, "edge")} shown`;
    root.dataset.shown = n;
    if (!table.hidden) fillTable();
    highlight();
  }

  /** Strongest first and a batch a frame, so that thousands of edges never hold up the pointer. */
  function paint() {
    if (!canvas) return;
    cancelAnimationFrame(painting);
    const [width, height] = circuit.size;
    const sharp = Math.min((window.devicePixelRatio || 1) * state.zoom, Math.sqrt(16e6 / (width * height)));
    if (canvas.width !== Math.round(width * sharp))
      [canvas.width, canvas.height] = [Math.round(width * sharp), Math.round(height * sharp)];
    const pen = canvas.getContext("2d", { willReadFrequently: true });
    pen.setTransform(sharp, 0, 0, sharp, 0, 0);
    pen.clearRect(0, 0, width, height);
    const inks = Object.fromEntries(Object.keys(PORTS).map((port) => [port, colour(`--${port}`)]));
    pen.globalCompositeOperation = "destination-over"; // each edge goes under those before it
    let [left, batch, last] = [shown.length, BATCH, 0];
    const some = (now) => {
      if (last) batch = now - last > SLOW ? Math.max(40, batch / 2) : Math.min(2000, batch * 1.25);
      last = now;
      for (const stop = Math.max(0, left - batch); left > stop;) stroked(pen, inks, shown[(left -= 1)]);
      if (left > 0) painting = requestAnimationFrame(some);
      else stage.removeAttribute("aria-busy");
    };
    stage.setAttribute("aria-busy", "true");
    some(performance.now());
  }

  /** Brighten the edges of what is in focus, name it on the card. */
  function highlight() {
    const focus = state.hovered ?? (state.edge ? { edge: state.edge } : state.chosen !== null ? { part: state.chosen } : null);
    const edges = !focus
      ? []
      : focus.edge
        ? circuit.strokes.filter(({ edge }) => edge === focus.edge)
        : shown.filter(({ from, to }) => from === focus.part || to === focus.part);
    bright.replaceChildren(...edges.map((stroke) => curveOf(stroke, 1)));
    const isPassing = state.edge || (state.hovered && state.hovered.part !== state.chosen);
    sheet.classList.toggle("focused", edges.length > 0 && Boolean(isPassing)); // what is isolated is all of interest
    const ends = new Set(focus?.edge ? edges.flatMap(({ from, to }) => [from, to]) : focus ? [focus.part] : []);
    parts.forEach((part, number) => part.classList.toggle("lit", ends.has(number)));
    fillCard(focus);
  }

  function hover(focus) {
    const same = focus?.part === state.hovered?.part && focus?.edge === state.hovered?.edge;
    if (same) return;
    state.hovered = focus;
    highlight();
  }

  function choose(part) {
    state.chosen = part;
    state.edge = null;
    state.hovered = null;
    update();
    onselect(part === null ? "" : data.parts[part].name);
    say(
      part === null
        ? `Nothing is isolated. ${size.textContent}.`
        : `${data.parts[part].name} isolated: ${AROUND[state.around]}. ${size.textContent}.`,
    );
  }

  const say = (text) => (said.textContent = text);
  const clear = () => {
    state.walk = null;
    choose(null);
  };

  // The pointer.
  function at(event) {
    const part = event.target.closest?.(".part");
    if (part && !part.classList.contains("away")) return { part: parts.indexOf(part) };
    const box = sheet.getBoundingClientRect();
    const [x, y] = [(event.clientX - box.left) / state.zoom, (event.clientY - box.top) / state.zoom];
    let [found, least] = [null, (NEAR / Math.min(1, state.zoom)) ** 2];
    for (const { edge, points } of shown) {
      for (let i = 0; i < points.length - 2; i += 2) {
        const [ux, uy, vx, vy] = [points[i + 2] - points[i], points[i + 3] - points[i + 1], x - points[i], y - points[i + 1]];
        const t = Math.max(0, Math.min(1, (ux * vx + uy * vy) / (ux * ux + uy * uy || 1)));
        const away = (vx - t * ux) ** 2 + (vy - t * uy) ** 2;
        if (away <= least) [found, least] = [edge, away];
      }
    }
    return found && { edge: found };
  }
  sheet.addEventListener("pointermove", (event) => hover(at(event)));
  sheet.addEventListener("pointerleave", () => hover(null));
  sheet.addEventListener("click", (event) => {
    const focus = at(event);
    if (focus?.part !== undefined) choose(focus.part === state.chosen ? null : focus.part);
    else if (focus?.edge) {
      state.edge = focus.edge;
      highlight();
      say(edgeInWords(focus.edge));
    } else if (state.chosen !== null || state.edge) clear();
  });

  // The keyboard: Tab goes from part to part, arrows along edges, Enter isolates, Escape clears.
  const stronger = (strokes) => strokes.filter((stroke) => shown.includes(stroke));
  function walk(from, key) {
    if (key === "ArrowUp" || key === "ArrowDown") {
      const up = key === "ArrowUp";
      state.walk = { from, up, edges: stronger((up ? circuit.outgoing : circuit.incoming)[from]), at: 0 };
    } else if (state.walk?.edges.length) {
      const n = state.walk.edges.length;
      state.walk.at = (state.walk.at + (key === "ArrowRight" ? 1 : n - 1)) % n;
    }
    const stroke = state.walk?.edges[state.walk.at];
    if (!stroke) return say(key === "ArrowUp" ? "No shown edge leads on from here." : "No shown edge leads here.");
    const target = state.walk.up ? stroke.to : stroke.from;
    const { edges, at: which } = state.walk;
    parts[target].focus();
    state.hovered = { edge: stroke.edge };
    highlight();
    return say(`${edgeInWords(stroke.edge)} Edge ${which + 1} of ${edges.length}. Now at ${data.parts[target].name}.`);
  }
  drawing.addEventListener("focusin", (event) => {
    const number = parts.indexOf(event.target.closest(".part"));
    if (number >= 0) hover({ part: number });
  });
  drawing.addEventListener("focusout", () => hover(null));
  drawing.addEventListener("keydown", (event) => {
    const number = parts.indexOf(event.target.closest(".part"));
    if (number < 0) return;
    if (event.key === "Enter" || event.key === " ") choose(number === state.chosen ? null : number);
    else if (event.key.startsWith("Arrow")) walk(number, event.key);
    else return;
    event.preventDefault();
  });
  const onkey = (event) => {
    if (event.key !== "Escape") return;
    state.hovered = null;
    clear();
  };
  root.addEventListener("keydown", onkey);

  // The card.
  function fillCard(focus) {
    if (!focus) return card.replaceChildren(welcome());
    if (focus.edge) return card.replaceChildren(...edgeCard(focus.edge));
    return card.replaceChildren(...partCard(focus.part));
  }

  function welcome() {
    const keys = [
      ["Tab", "from part to part, in the order of computation"],
      ["↑ ↓", "along the strongest edge out or in"],
      ["← →", "the next edge of that part instead"],
      ["Enter", "isolate the part"],
      ["Escape", "show all again"],
    ];
    return h(
      "div",
      { class: "welcome" },
      h("p", {}, "Point at a part or an edge to read about it. Click a part to isolate what leads to it and from it."),
      h(
        "dl",
        {},
        keys.map(([key, does]) => [h("dt", {}, h("kbd", {}, key)), h("dd", {}, does)]),
      ),
    );
  }

  function edgeCard(edge) {
    const ends = edge.to.map((to) => data.parts[to].name).join(", ");
    const lines = [
      ["from", data.parts[edge.from].words],
      ["to", edge.to.map((to) => data.parts[to].words).join("; ")],
    ];
    if (edge.port) lines.push(["read as", { q: "query", k: "key", v: "value" }[edge.port]]);
    if (edge.port_name) lines.push(["shared", `one edge into ${edge.port_name}, which ${ends} attend by`]);
    lines.push([
      "score",
      edge.score === null
        ? "not scored"
        : `${signed(edge.score)}${data.unit ? ` ${data.unit}` : ""}: ${data.signs[edge.score < 0 ? 1 : 0]}`,
    ]);
    if (edge.score !== null)
      lines.push([
        "rank",
        `${(data.edges.indexOf(edge) + 1).toLocaleString("en")} of ${data.edges.length.toLocaleString("en")}`,
      ]);
    return [
      h("h2", {}, edge.name),
      h(
        "dl",
        {},
        lines.map(([name, what]) => [h("dt", {}, name), h("dd", {}, what)]),
      ),
    ];
  }

  function partCard(number) {
    const part = data.parts[number];
    const plain = part.name.split("@")[0];
    const evidence = data.evidence;
    const lines = [];
    if (evidence?.looks[plain]?.length)
      lines.push(["looks", evidence.looks[plain].map((gaze) => gaze.replace("->", "→")).join(", ")]);
    const effects = evidence?.logits[plain];
    if (effects)
      lines.push(["writes", `${signed(effects[state.prompt])} logits towards ${answers(evidence.prompts[state.prompt])}`]);
    return [
      h("h2", {}, part.name),
      h("p", {}, part.words),
      lines.length
        ? h(
            "dl",
            {},
            lines.map(([name, what]) => [h("dt", {}, name), h("dd", {}, what)]),
          )
        : null,
      ...(evidence?.patterns[plain] ? attention(plain) : []),
      contributions("Reads most from", circuit.incoming[number], ({ from }) => from),
      contributions("Is read most by", circuit.outgoing[number], ({ to }) => to),
    ].filter(Boolean);
  }

  const answers = ({ answers: right, foils }) =>
    right.map(quoted).join(", ") + (foils.length ? ` and away from ${foils.map(quoted).join(", ")}` : "");

  function contributions(title, strokes, other) {
    if (!strokes.length) return null;
    const largest = Math.max(...strokes.map(({ edge }) => Math.abs(edge.score ?? 0))) || 1;
    const rows = strokes.slice(0, TOP).map((stroke) => {
      const { edge } = stroke;
      const bar = s(
        "svg",
        { class: "bar", viewBox: "0 0 60 8", "aria-hidden": "true" },
        s("line", {
          x1: 0,
          x2: Math.max(1, (60 * Math.abs(edge.score ?? 0)) / largest),
          y1: 4,
          y2: 4,
          stroke: `var(--${edge.port ?? "other"})`,
          "stroke-width": 6,
          "stroke-dasharray": edge.score < 0 ? "5 2.5" : null,
        }),
      );
      const name = data.parts[other(stroke)].name + (edge.port ? ` as ${edge.port}` : "");
      return h(
        "li",
        {},
        h("button", { type: "button", onclick: () => choose(other(stroke)) }, name),
        bar,
        h("span", { class: "number" }, signed(edge.score)),
      );
    });
    return h("div", {}, h("h3", {}, `${title} (${plural(strokes.length, "edge")})`), h("ol", { class: "contributions" }, rows));
  }

  function attention(head) {
    const { prompts, patterns } = data.evidence;
    const prompt = prompts[state.prompt];
    const n = prompt.tokens.length;
    const shares = Uint8Array.from(atob(patterns[head][state.prompt]), (byte) => byte.charCodeAt(0));
    const share = (query, key) => shares[query * n + key] / 255;
    const read = (query, key) =>
      `from ${quoted(prompt.tokens[query])} ${(100 * share(query, key)).toFixed(0)} % on ${quoted(prompt.tokens[key])}`;
    const strongest = (query) =>
      [...Array(n).keys()].reduce((best, key) => (share(query, key) > share(query, best) ? key : best), 0);
    const usual = `At the end: ${read(n - 1, strongest(n - 1))}`;
    const line = h("p", { class: "reading" }, usual);
    const cell = Math.max(7, Math.min(15, 205 / n));
    const [side, font] = [64, Math.min(10, cell + 1)];
    const names = Object.fromEntries(Object.entries(prompt.named).map(([name, place]) => [place, name]));
    const label = (place) => visible(prompt.tokens[place]).trim().slice(0, 9) + (names[place] ? ` ${names[place]}` : "");
    const cells = [];
    for (let query = 0; query < n; query += 1)
      for (let key = 0; key <= query; key += 1)
        if (share(query, key) > 0)
          cells.push(
            s("rect", {
              x: side + key * cell,
              y: query * cell,
              width: cell - 0.5,
              height: cell - 0.5,
              fill: "var(--heat)",
              "fill-opacity": share(query, key),
            }),
          );
    const labels = prompt.tokens.flatMap((_, place) => [
      s("text", { x: side - 4, y: (place + 0.75) * cell, "text-anchor": "end", "font-size": font }, label(place)),
      s(
        "text",
        {
          transform: `translate(${side + (place + 0.75) * cell},${n * cell + 4}) rotate(-90)`,
          "text-anchor": "end",
          "font-size": font,
        },
        label(place),
      ),
    ]);
    const map = s(
      "svg",
      {
        class: "pattern",
        width: side + n * cell + 4,
        height: n * cell + side + 6,
        role: "img",
        "aria-label": `Attention of ${head}. ${usual}`,
      },
      s("path", { class: "frame", d: `M${side} 0V${n * cell}H${side + n * cell}Z` }),
      cells,
      labels,
    );
    map.addEventListener("pointermove", (event) => {
      const box = map.getBoundingClientRect();
      const [key, query] = [Math.floor((event.clientX - box.left - side) / cell), Math.floor((event.clientY - box.top) / cell)];
      line.textContent = key >= 0 && key <= query && query < n ? read(query, key) : usual;
    });
    const options = prompts.map(({ tokens, n_before }, number) =>
      h(
        "option",
        { value: number, selected: number === state.prompt },
        `${number + 1}: ${n_before ? "…" : ""}${tokens.join("")}`,
      ),
    );
    const select = h(
      "select",
      {
        onchange: (event) => {
          state.prompt = Number(event.target.value);
          highlight();
          card.querySelector("select")?.focus();
        },
      },
      options,
    );
    return [
      h("h3", {}, "Attention (rows look at columns)"),
      h("label", {}, "Prompt ", select),
      h("div", { class: "scroll" }, map),
      line,
    ];
  }

  const edgeInWords = (edge) =>
    `${data.parts[edge.from].name} to ${edge.to.map((to) => data.parts[to].name).join(", ")}${edge.port ? ` as ${edge.port}` : ""}, ${edge.score === null ? "not scored" : `score ${signed(edge.score)}`}.`;

  // The table: the same edges for those who do not see the drawing.
  function fillTable() {
    const orders = {
      score: (a, b) => a.number - b.number,
      from: (a, b) => a.from - b.from || a.number - b.number,
      to: (a, b) => a.to - b.to || a.number - b.number,
    };
    const edges = [...new Map([...shown].reverse().map((stroke) => [stroke.number, stroke])).values()].sort(
      orders[state.order],
    );
    const head = [
      ["from", "writer"],
      ["to", "reader"],
      [null, "read as"],
      ["score", `score${data.unit ? `, ${data.unit}` : ""}`],
    ];
    const link = (number, name) =>
      h("button", { type: "button", onclick: () => choose(number === state.chosen ? null : number) }, name);
    const rows = edges.slice(0, state.rows).map(({ edge }) =>
      h(
        "tr",
        { onpointerenter: () => hover({ edge }), onpointerleave: () => hover(null) },
        h("td", {}, link(edge.from, data.parts[edge.from].name)),
        h(
          "td",
          {},
          edge.to.map((to, at) => [at ? ", " : null, link(to, data.parts[to].name)]),
        ),
        h("td", {}, edge.port_name ?? { q: "query", k: "key", v: "value" }[edge.port] ?? ""),
        h("td", { class: "number" }, signed(edge.score)),
      ),
    );
    const columns = head.map(([order, name]) =>
      h(
        "th",
        { scope: "col", "aria-sort": order === state.order ? (order === "score" ? "descending" : "ascending") : null },
        order
          ? h(
              "button",
              {
                type: "button",
                onclick: () => {
                  state.order = order;
                  fillTable();
                },
              },
              name,
            )
          : name,
      ),
    );
    const more =
      edges.length > state.rows
        ? h(
            "button",
            {
              type: "button",
              class: "more",
              onclick: () => {
                state.rows += ROWS;
                fillTable();
              },
            },
            `${Math.min(ROWS, edges.length - state.rows)} more of ${plural(edges.length, "edge")}`,
          )
        : null;
    table.replaceChildren(
      ...[
        h(
          "table",
          {},
          h("caption", {}, `Edges of ${data.title}. ${size.textContent}.`),
          h("thead", {}, h("tr", {}, columns)),
          h("tbody", {}, rows),
        ),
        more,
      ].filter(Boolean),
    );
  }

  // Buttons and filters.
  function buttons() {
    const button = (name, act, attributes) => h("button", { type: "button", onclick: act, ...attributes }, name);
    return h(
      "div",
      { class: "buttons" },
      button("Drawing", () => view("drawing"), { "data-view": "drawing", "aria-pressed": "true" }),
      button("Table", () => view("table"), { "data-view": "table", "aria-pressed": "false" }),
      button("−", () => zoom(1 / 1.25), { "aria-label": "Smaller" }),
      button("Fit", fit),
      button("+", () => zoom(1.25), { "aria-label": "Larger" }),
      button("Dark", () => theme(root.dataset.theme !== "dark"), { "data-act": "theme" }),
      button("Save SVG", saveSvg, { "data-act": "svg" }),
    );
  }

  function view(name) {
    table.hidden = name !== "table";
    stage.hidden = name === "table";
    state.rows = ROWS;
    for (const button of root.querySelectorAll("[data-view]"))
      button.setAttribute("aria-pressed", String(button.dataset.view === name));
    if (name === "table") {
      fillTable();
      table.querySelector("button")?.focus();
    }
  }

  function zoom(by) {
    rescale(Math.max(0.2, Math.min(4, state.zoom * by)));
  }
  function fit() {
    rescale(
      Math.max(
        0.35,
        Math.min(1.5, (stage.clientWidth - 4) / circuit.size[0], Math.max(0.8, (stage.clientHeight - 4) / circuit.size[1])),
      ),
    );
  }
  function rescale(to) {
    state.zoom = to;
    const [width, height] = circuit.size.map((length) => `${length * to}px`);
    for (const layer of [sheet, drawing, ...(canvas ? [canvas] : [])])
      [layer.style.width, layer.style.height] = [width, height];
    paint();
  }

  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const onsystem = () => theme(dark ?? system.matches);
  system.addEventListener("change", onsystem);
  function theme(isDark) {
    root.dataset.theme = isDark ? "dark" : "light";
    const button = root.querySelector("[data-act=theme]");
    button.textContent = isDark ? "Light" : "Dark";
    paint();
  }

  /** What is shown, as a file of its own: variables become colours, what is filtered away is left out. */
  function svgText() {
    const copy = drawing.cloneNode(true);
    copy.querySelector(".edges").replaceChildren(...shown.map((stroke) => curveOf(stroke)));
    copy.querySelectorAll(".away, .bright").forEach((element) => element.remove());
    const [width, height] = circuit.size;
    const notes = usedPorts().map((port) => [port, PORTS[port], null]);
    if (shown.some(({ edge }) => edge.score < 0)) notes.push(["other", `negative: ${data.signs[1]}`, DASHES.join(" ")]);
    const across = Math.max(1, Math.floor((width - LEFT) / 150));
    const legend = notes.map(([port, words, dashes], at) =>
      s(
        "g",
        { transform: `translate(${LEFT + (at % across) * 150},${height + 18 * Math.floor(at / across)})` },
        s("line", { x1: 0, x2: 22, y1: 0, y2: 0, stroke: `var(--${port})`, "stroke-width": 3, "stroke-dasharray": dashes }),
        s("text", { x: 28, y: 4, "font-size": 11, fill: "var(--ink)" }, words),
      ),
    );
    const tall = height + 18 * Math.ceil(notes.length / across);
    for (const [name, value] of Object.entries({ xmlns: SVG, width, height: tall, viewBox: `0 0 ${width} ${tall}` }))
      copy.setAttribute(name, value);
    copy.removeAttribute("style");
    copy.prepend(s("title", {}, data.title), s("rect", { width: "100%", height: "100%", fill: "var(--paper)" }));
    copy.append(
      ...legend,
      s(
        "text",
        { x: 8, y: 18, "font-size": 13, "font-weight": "bold", fill: "var(--ink)" },
        `${data.title}: ${size.textContent}`,
      ),
    );
    for (const element of copy.querySelectorAll("*")) {
      for (const name of ["tabindex", "role", "aria-label", "aria-pressed", "class"]) element.removeAttribute(name);
      for (const attribute of [...element.attributes])
        if (attribute.value.startsWith("var(")) attribute.value = colour(attribute.value.slice(4, -1));
    }
    return new XMLSerializer().serializeToString(copy);
  }

  function saveSvg() {
    const link = URL.createObjectURL(new Blob([svgText()], { type: "image/svg+xml" }));
    h("a", { href: link, download: `${data.title.replace(/[^\w.-]+/g, "-")}.svg` }).click();
    setTimeout(() => URL.revokeObjectURL(link), 10000);
    say("The drawing was saved as an SVG file.");
  }

  const usedPorts = () => Object.keys(PORTS).filter((port) => data.edges.some((edge) => (edge.port ?? "other") === port));

  function fillControls() {
    const n = circuit.magnitudes.length;
    const change = (name) => (event) => {
      state[name] = event.target.value;
      update();
    };
    const ranked = circuit.magnitudes;
    const slider = h("input", {
      type: "range",
      min: 0,
      max: Math.max(0, n - 1),
      step: 1,
      "aria-label": "How many of the strongest edges are left out",
      name: "rank",
    });
    const number = h("input", { type: "number", min: 0, step: "any", name: "least", "aria-label": "Least |score|" });
    const write = () => {
      const left = ranked.filter((magnitude) => magnitude >= state.least).length;
      slider.value = n - left;
      number.value = Number(state.least.toPrecision(4));
      slider.setAttribute("aria-valuetext", `|score| at least ${short(state.least)}: ${plural(left, "edge")}`);
    };
    slider.addEventListener("input", () => {
      const rank = Number(slider.value);
      state.least = rank === 0 ? 0 : ranked[n - 1 - rank];
      number.value = Number(state.least.toPrecision(4));
      slider.setAttribute("aria-valuetext", `|score| at least ${short(state.least)}: ${plural(n - rank, "edge")}`);
      soon();
    });
    number.addEventListener("input", () => {
      state.least = Math.max(0, Number(number.value) || 0);
      slider.value = n - ranked.filter((magnitude) => magnitude >= state.least).length;
      update();
    });
    const positions = [...new Set(data.parts.map(({ pos }) => pos).filter((pos) => pos !== null))].sort((a, b) => a - b);
    const tokens = data.evidence?.prompts[0];
    const token = (pos) =>
      tokens?.tokens[pos - tokens.n_before] === undefined ? "" : ` ${quoted(tokens.tokens[pos - tokens.n_before])}`;
    const line = (port, dashed) =>
      s(
        "svg",
        { class: "swatch", viewBox: "0 0 26 8", "aria-hidden": "true" },
        s("line", {
          x1: 0,
          x2: 26,
          y1: 4,
          y2: 4,
          stroke: `var(--${port})`,
          "stroke-width": 3,
          "stroke-dasharray": dashed ? "7 4" : null,
        }),
      );
    const names = h(
      "datalist",
      { id: `${id}-names` },
      data.parts.map(({ name }) => h("option", { value: name })),
    );
    const found = h("output", { class: "found" });
    const search = h("input", {
      type: "search",
      name: "query",
      list: `${id}-names`,
      autocomplete: "off",
      spellcheck: "false",
      placeholder: "a9.h6",
    });
    search.addEventListener("input", () => {
      state.query = search.value.trim().toLowerCase();
      const hits = parts.filter((part, at) =>
        part.classList.toggle("hit", state.query !== "" && data.parts[at].name.toLowerCase().includes(state.query)),
      );
      found.textContent = state.query && plural(hits.length, "part");
    });
    search.addEventListener("keydown", (event) => {
      if (event.key !== "Enter") return;
      const exact = data.parts.findIndex(({ name }) => name.toLowerCase() === state.query);
      const hit =
        exact >= 0 ? exact : data.parts.findIndex(({ name }) => state.query && name.toLowerCase().includes(state.query));
      if (hit >= 0) {
        choose(hit);
        parts[hit].scrollIntoView({ block: "nearest", inline: "nearest" });
      }
    });
    const hasSigns = data.edges.some(({ score }) => score < 0);
    const select = (title, name, options) => h("label", {}, title, h("select", { name, onchange: change(name) }, options));
    controls.replaceChildren(
      ...[
        h("label", {}, "Find a part", search, found),
        names,
        n ? h("fieldset", {}, h("legend", {}, `|score| at least${data.unit ? ` (${data.unit})` : ""}`), slider, number) : null,
        hasSigns
          ? h(
              "fieldset",
              {},
              h("legend", {}, "Sign"),
              [
                ["both", "both", null],
                ["positive", `positive: ${data.signs[0]}`, false],
                ["negative", `negative: ${data.signs[1]}`, true],
              ].map(([value, words, dashed]) =>
                h(
                  "label",
                  { class: "line" },
                  h("input", {
                    type: "radio",
                    name: `${id}-sign`,
                    value,
                    checked: value === "both",
                    onchange: (event) => {
                      state.sign = event.target.value;
                      update();
                    },
                  }),
                  dashed === null ? null : line("other", dashed),
                  words,
                ),
              ),
            )
          : null,
        h(
          "fieldset",
          {},
          h("legend", {}, "Edges"),
          usedPorts().map((port) =>
            h(
              "label",
              { class: "line" },
              h("input", {
                type: "checkbox",
                name: port,
                checked: true,
                onchange: (event) => {
                  state.ports[event.target.checked ? "add" : "delete"](port);
                  update();
                },
              }),
              line(port),
              PORTS[port],
            ),
          ),
        ),
        h(
          "label",
          { class: "line" },
          h("input", {
            type: "checkbox",
            name: "whole",
            onchange: (event) => {
              state.whole = event.target.checked;
              update();
            },
          }),
          "only on paths from input to logits",
        ),
        select(
          "A chosen part keeps",
          "around",
          Object.entries(AROUND).map(([value, words]) => h("option", { value }, words)),
        ),
        positions.length
          ? select("Position", "position", [
              h("option", { value: "" }, "all"),
              ...positions.map((pos) => h("option", { value: pos }, `${pos}${token(pos)}`)),
            ])
          : null,
        h(
          "button",
          {
            type: "button",
            name: "reset",
            onclick: () => {
              Object.assign(state, defaults());
              fillControls();
              clear();
            },
          },
          "Show all edges",
        ),
        h(
          "p",
          { class: "note" },
          n
            ? "Width grows with |score|. Queries enter a head on the left, keys in the middle, values on the right."
            : "These edges are not scored.",
        ),
      ].filter(Boolean),
    );
    write();
  }

  let waiting = 0;
  function soon() {
    waiting ||= requestAnimationFrame(() => {
      waiting = 0;
      update();
    });
  }

  fillControls();
  theme(dark ?? system.matches);
  update();
  fit();
  return {
    select: (name) => {
      const part = data.parts.findIndex((one) => one.name === name);
      if ((part < 0 ? null : part) !== state.chosen) choose(part < 0 ? null : part);
    },
    svgText,
    destroy: () => {
      system.removeEventListener("change", onsystem);
      root.removeEventListener("keydown", onkey);
      root.replaceChildren();
    },
  };
}

function aboutFacts(facts) {
  if (!facts.length) return null;
  return h(
    "details",
    {},
    h("summary", {}, "Facts"),
    h(
      "dl",
      {},
      facts.map(([name, fact]) => [h("dt", {}, name), h("dd", {}, fact)]),
    ),
  );
}

// ---- the drawing ------------------------------------------------------------------------------------------------------

function drawn(data, circuit, isMany, id) {
  const { x, y, size } = circuit;
  const bands = data.layers.map(({ layer, low, high }, at) => {
    const [from, to] = [y(high + 0.42), y(low - 0.42)];
    return s(
      "g",
      {},
      at % 2
        ? null
        : s("rect", { x: 0, y: from, width: size[0], height: to - from, fill: "var(--ink)", "fill-opacity": 0.045 }),
      s(
        "text",
        {
          x: LEFT - 10,
          y: (from + to) / 2 + 4,
          "text-anchor": "end",
          "font-size": 11,
          fill: "var(--soft)",
          stroke: "var(--paper)",
          "stroke-width": 3,
          "paint-order": "stroke",
        },
        `layer ${layer}`,
      ),
    );
  });
  const parts = data.parts.map((part, number) => drawnPart(data, circuit, part, number));
  return s(
    "svg",
    {
      viewBox: `0 0 ${size.join(" ")}`,
      role: "group",
      "aria-label": `${data.title}: ${plural(data.parts.length, "part")}. Tab moves from part to part, arrow keys move along edges.`,
      "font-family": "system-ui, sans-serif",
    },
    s("g", { "aria-hidden": "true" }, bands),
    s(
      "g",
      { class: "edges", fill: "none", "aria-hidden": "true" },
      isMany ? [] : circuit.strokes.map((stroke) => curveOf(stroke)),
    ),
    s("g", { class: "bright", fill: "none", "aria-hidden": "true" }),
    s("g", { id: `${id}-parts` }, parts),
  );
}

function curveOf({ edge, path }, opacity = edge.opacity) {
  return s("path", {
    d: path,
    fill: "none",
    stroke: `var(--${edge.port ?? "other"})`,
    "stroke-width": edge.width,
    "stroke-opacity": opacity,
    "stroke-dasharray": edge.score < 0 ? DASHES.join(" ") : null,
    "data-edge": edge.name,
  });
}

function stroked(pen, inks, { edge, curve }) {
  pen.strokeStyle = inks[edge.port ?? "other"];
  pen.lineWidth = edge.width;
  pen.globalAlpha = edge.opacity;
  pen.setLineDash(edge.score < 0 ? DASHES : []);
  pen.beginPath();
  pen.moveTo(curve[0], curve[1]);
  pen.bezierCurveTo(...curve.slice(2));
  pen.stroke();
}

/** Heads are rounded boxes, MLPs hexagons, latents and errors ellipses, input and logits bars; a dot for every port in use. */
function drawnPart(data, { incoming, outgoing, x, y, size }, part, number) {
  const [width, height] = [part.is_bar ? size[0] - LEFT - RIGHT - 8 : data.size.box[0] * UNIT, data.size.box[1] * UNIT];
  const [cx, cy] = [x(part.x), y(part.y)];
  const [left, top] = [cx - width / 2, cy - height / 2];
  const ink = { fill: `var(--${part.kind})`, stroke: "var(--ink)", "stroke-width": 1.1, class: "shape" };
  const shape =
    part.kind === "mlp"
      ? s("polygon", { points: hexagon(left, top, width, height, 9), ...ink })
      : part.kind === "latent" || part.kind === "error"
        ? s("ellipse", { cx, cy, rx: width / 2, ry: height / 2, ...ink })
        : s("rect", { x: left, y: top, width, height, rx: part.is_bar ? 2 : 7, ...ink });
  const used = new Set(incoming[number].map(({ edge }) => edge.port).filter(Boolean));
  const dots = [...used].map((port) =>
    s("circle", {
      cx: cx + part.ports[port] * UNIT,
      cy: cy + height / 2,
      r: 3.2,
      fill: `var(--${port})`,
      stroke: "var(--paper)",
    }),
  );
  const strongest = outgoing[number][0];
  const words = `${part.name}, ${part.words}. ${plural(incoming[number].length, "edge")} in, ${outgoing[number].length} out.${strongest ? ` Strongest: to ${data.parts[strongest.to].name}, ${signed(strongest.edge.score)}.` : ""}`;
  return s(
    "g",
    { class: "part", tabindex: 0, role: "button", "aria-pressed": "false", "aria-label": words, "data-part": part.name },
    shape,
    s(
      "text",
      { x: cx, y: cy + 4, "text-anchor": "middle", "font-size": part.name.length < 8 ? 11.5 : 9, fill: "var(--ink)" },
      part.name,
    ),
    dots,
  );
}

const hexagon = (x, y, w, t, cut) =>
  [
    [x, y + t / 2],
    [x + cut, y],
    [x + w - cut, y],
    [x + w, y + t / 2],
    [x + w - cut, y + t],
    [x + cut, y + t],
  ]
    .map((point) => point.join())
    .join(" ");

// ---- the notebook: anywidget's protocol -------------------------------------------------------------------------------

export default {
  render({ model, el }) {
    const dark = document.body.dataset.jpThemeLight === "false" ? true : null;
    const viewer = show(el, model.get("data"), {
      dark,
      onselect: (name) => {
        model.set("selected", name);
        model.save_changes();
      },
    });
    const follow = () => viewer.select(model.get("selected"));
    model.on("change:selected", follow);
    return () => {
      model.off("change:selected", follow);
      viewer.destroy();
    };
  },
};
