// The circuit viewer, for the HTML file and for the notebook widget alike: no dependencies, and no network.
// Each other file has one subject and is given the viewer that is put together here; viewer.py joins them, this one last.

const MANY = 600; // more curves than this are painted on a canvas
const AT_FIRST = 300; // edges shown when a circuit of more than 1,000 is opened
let count = 0; // of viewers in this document, for ids

/** Build the viewer in an empty element. Returns {select(name), destroy()}; onselect hears the chosen part's name or "". */
function show(root, data, { onselect = () => {}, dark = null } = {}) {
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
  const colour = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const elements = { root, size, card, stage, table, controls, drawing, parts, canvas, sheet };
  const acts = { update, highlight, hover, choose, clear, say, colour };
  const viewer = { data, circuit, state, id, shown: [], ...elements, ...acts };
  viewer.paint = painter(viewer);
  viewer.fillTable = tables(viewer);
  const fillCard = cards(viewer);
  const bar = toolbar(viewer, dark);
  stage.append(sheet);
  root.replaceChildren(
    h("header", {}, h("h1", {}, data.title), h("p", {}, data.counts), size, aboutFacts(data.facts), bar.buttons()),
    controls,
    h(
      "section",
      { class: "middle", "aria-label": "Circuit" },
      h("button", { class: "skip", type: "button", onclick: () => bar.view("table") }, "Skip the drawing: edges as a table"),
      stage,
      table,
    ),
    card,
    said,
  );
  root.classList.add("circuit-viewer");
  root.setAttribute("tabindex", "-1"); // so that Escape is heard after a click anywhere

  function update() {
    viewer.shown = kept(data, circuit, state);
    if (!viewer.shown.some(({ edge }) => edge === state.edge)) state.edge = null;
    const touched = new Set(viewer.shown.flatMap(({ from, to }) => [from, to]));
    if (state.chosen !== null) touched.add(state.chosen);
    parts.forEach((part, number) => {
      const is = touched.has(number);
      part.setAttribute("aria-pressed", String(state.chosen === number));
      if (part.getAttribute("tabindex") === (is ? "0" : "-1")) return; // untouched parts are not painted again
      part.classList.toggle("away", !is);
      part.setAttribute("tabindex", is ? "0" : "-1");
      part.setAttribute("opacity", is ? "1" : "0.22");
    });
    const visible = new Set(viewer.shown);
    for (const [stroke, path] of paths)
      visible.has(stroke) ? path.removeAttribute("display") : path.setAttribute("display", "none");
    if (!state.walk?.edges.every((stroke) => visible.has(stroke))) state.walk = null;
    viewer.paint();
    const n = new Set(viewer.shown.map(({ number }) => number)).size;
    size.textContent = `${n.toLocaleString("en")} of ${plural(data.edges.length, "edge")} shown`;
    root.dataset.shown = n;
    if (!table.hidden) viewer.fillTable();
    highlight();
  }

  /** Brighten the edges of what is in focus, name it on the card. */
  function highlight() {
    const focus = state.hovered ?? (state.edge ? { edge: state.edge } : state.chosen !== null ? { part: state.chosen } : null);
    const edges = !focus
      ? []
      : focus.edge
        ? circuit.strokes.filter(({ edge }) => edge === focus.edge)
        : viewer.shown.filter(({ from, to }) => from === focus.part || to === focus.part);
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

  function say(text) {
    said.textContent = text;
  }

  function clear() {
    state.walk = null;
    choose(null);
  }

  const fillControls = filters(viewer, defaults);
  const stopListening = listen(viewer);
  fillControls();
  bar.theme();
  update();
  bar.fit();
  return {
    select: (name) => {
      const part = data.parts.findIndex((one) => one.name === name);
      if ((part < 0 ? null : part) !== state.chosen) choose(part < 0 ? null : part);
    },
    destroy: () => {
      bar.stop();
      stopListening();
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
