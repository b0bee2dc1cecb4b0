// The circuit: its curves in pixels, who neighbours whom, and what the filters keep.

const UNIT = 72; // pixels of a unit of the layout
const [LEFT, RIGHT, MARGIN] = [70, 16, 34]; // around the drawing, in pixels
const SAMPLES = 24; // points of a curve that the pointer is compared with

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
