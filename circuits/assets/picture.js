// The drawing as an SVG file.

/** What is shown, as a file of its own: variables become colours, what is filtered away is left out. */
function picture({ data, circuit, drawing, size, shown, colour }) {
  const copy = drawing.cloneNode(true);
  copy.querySelector(".edges").replaceChildren(...shown.map((stroke) => curveOf(stroke)));
  copy.querySelectorAll(".away, .bright").forEach((element) => element.remove());
  const [width, height] = circuit.size;
  const notes = usedPorts(data).map((port) => [port, PORTS[port], null]);
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

function savePicture(viewer) {
  const link = URL.createObjectURL(new Blob([picture(viewer)], { type: "image/svg+xml" }));
  h("a", { href: link, download: `${viewer.data.title.replace(/[^\w.-]+/g, "-")}.svg` }).click();
  setTimeout(() => URL.revokeObjectURL(link), 10000);
  viewer.say("The drawing was saved as an SVG file.");
}
