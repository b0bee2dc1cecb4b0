// The table: the same edges for those who do not see the drawing.

const ROWS = 200; // of the table, at a time

function tables(viewer) {
  const { data, state, table, size, choose, hover } = viewer;

  function fillTable() {
    const orders = {
      score: (a, b) => a.number - b.number,
      from: (a, b) => a.from - b.from || a.number - b.number,
      to: (a, b) => a.to - b.to || a.number - b.number,
    };
    const edges = [...new Map([...viewer.shown].reverse().map((stroke) => [stroke.number, stroke])).values()].sort(
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
        h("td", {}, edge.port_name ?? READ_AS[edge.port] ?? ""),
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

  return fillTable;
}
