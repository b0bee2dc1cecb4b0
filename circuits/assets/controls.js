// The filters on the left.

const AROUND = { both: "both directions", up: "descendants only", down: "ancestors only", own: "its own edges" };

const usedPorts = (data) => Object.keys(PORTS).filter((port) => data.edges.some((edge) => (edge.port ?? "other") === port));

function filters(viewer, defaults) {
  const { data, circuit, state, id, parts, controls, update, choose, clear } = viewer;

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
          usedPorts(data).map((port) =>
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
              Object.assign(state, defaults(), { query: "" });
              parts.forEach((part) => part.classList.remove("hit"));
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
            : data.edges.length
              ? "These edges are not scored."
              : "This circuit keeps no edge.",
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

  return fillControls;
}
