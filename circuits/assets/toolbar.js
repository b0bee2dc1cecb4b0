// The buttons above: drawing or table, size, dark or light, saving.

function toolbar(viewer, dark) {
  const { root, circuit, state, stage, table, sheet, drawing, canvas } = viewer;

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
      button("Save SVG", () => savePicture(viewer), { "data-act": "svg" }),
    );
  }

  function view(name) {
    table.hidden = name !== "table";
    stage.hidden = name === "table";
    state.rows = ROWS;
    for (const button of root.querySelectorAll("[data-view]"))
      button.setAttribute("aria-pressed", String(button.dataset.view === name));
    if (name === "table") {
      viewer.fillTable();
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
    viewer.paint();
  }

  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const onsystem = () => theme(dark ?? system.matches);
  system.addEventListener("change", onsystem);
  function theme(isDark) {
    root.dataset.theme = isDark ? "dark" : "light";
    const button = root.querySelector("[data-act=theme]");
    button.textContent = isDark ? "Light" : "Dark";
    viewer.paint();
  }

  return {
    buttons,
    view,
    fit,
    theme: () => theme(dark ?? system.matches),
    stop: () => system.removeEventListener("change", onsystem),
  };
}
