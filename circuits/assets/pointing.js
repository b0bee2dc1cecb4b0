// Pointing: with the mouse and with the keyboard.

const NEAR = 7; // pixels

/** Listen to both. Returns what ends it where the viewer's own elements do not. */
function listen(viewer) {
  const { root, data, circuit, state, drawing, sheet, parts, choose, clear, hover, highlight, say } = viewer;

  // The pointer.
  function at(event) {
    const part = event.target.closest?.(".part");
    if (part && !part.classList.contains("away")) return { part: parts.indexOf(part) };
    const box = sheet.getBoundingClientRect();
    const [x, y] = [(event.clientX - box.left) / state.zoom, (event.clientY - box.top) / state.zoom];
    let [found, least] = [null, (NEAR / Math.min(1, state.zoom)) ** 2];
    for (const { edge, points } of viewer.shown) {
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
      say(edgeInWords(data, focus.edge));
    } else if (state.chosen !== null || state.edge) clear();
  });

  // The keyboard: Tab goes from part to part, arrows along edges, Enter isolates, Escape clears.
  const stronger = (strokes) => strokes.filter((stroke) => viewer.shown.includes(stroke));
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
    return say(`${edgeInWords(data, stroke.edge)} Edge ${which + 1} of ${edges.length}. Now at ${data.parts[target].name}.`);
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
  return () => root.removeEventListener("keydown", onkey);
}
