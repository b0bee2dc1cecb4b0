// Where a head looks: its pattern on one of the prompts.

/** The attention pattern of a head on the chosen prompt, and which prompt that is. */
function attention({ data, state, card, highlight }, head) {
  const { prompts, patterns } = data.evidence;
  const prompt = prompts[state.prompt];
  const n = prompt.tokens.length;
  const shares = Uint8Array.from(atob(patterns[head][state.prompt]), (byte) => byte.charCodeAt(0));
  const share = (query, key) => shares[query * n + key] / 255;
  const names = Object.fromEntries(Object.entries(prompt.named).map(([name, place]) => [place, name]));
  const told = (place) => `${quoted(prompt.tokens[place])} (${names[place] ?? place + prompt.n_before})`;
  const read = (query, key) => `from ${told(query)} ${(100 * share(query, key)).toFixed(0)} % on ${told(key)}`;
  const strongest = (query) =>
    [...Array(n).keys()].reduce((best, key) => (share(query, key) > share(query, best) ? key : best), 0);
  const usual = `At the end: ${read(n - 1, strongest(n - 1))}`;
  const line = h("p", { class: "reading" }, usual);
  const cell = Math.max(7, Math.min(15, 205 / n));
  const [side, font] = [64, Math.min(10, cell + 1)];
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
