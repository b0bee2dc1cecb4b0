// The drawing: layers, curves and parts as SVG.

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
