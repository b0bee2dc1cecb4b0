// The card: what is known of the part or the edge in focus.

const TOP = 6; // contributions on a card

function cards(viewer) {
  const { data, circuit, state, card } = viewer;

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
    if (edge.port) lines.push(["read as", READ_AS[edge.port]]);
    if (edge.port_name) lines.push(["shared", `one edge into ${edge.port_name}, which ${ends} attend by`]);
    lines.push([
      "score",
      edge.score === null
        ? "not scored"
        : `${signed(edge.score)}${data.unit ? ` ${data.unit}` : ""}` +
          (edge.score ? `: ${data.signs[edge.score < 0 ? 1 : 0]}` : ""),
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
      lines.push(["looks", `${evidence.looks[plain].map((gaze) => gaze.replace("->", "→")).join(", ")} (mean over prompts)`]);
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
      ...(evidence?.patterns[plain] ? attention(viewer, plain) : []),
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
        h("button", { type: "button", onclick: () => viewer.choose(other(stroke)) }, name),
        bar,
        h("span", { class: "number" }, signed(edge.score)),
      );
    });
    return h("div", {}, h("h3", {}, `${title} (${plural(strokes.length, "edge")})`), h("ol", { class: "contributions" }, rows));
  }

  return fillCard;
}

const edgeInWords = (data, edge) =>
  `${data.parts[edge.from].name} to ${edge.to.map((to) => data.parts[to].name).join(", ")}${edge.port ? ` as ${edge.port}` : ""}, ${edge.score === null ? "not scored" : `score ${signed(edge.score)}`}.`;
