// Many curves, painted on a canvas.

const [BATCH, SLOW] = [60, 34]; // curves painted at first in a frame, and the milliseconds of a frame that ask for fewer

/** Strongest first and a batch a frame, so that thousands of edges never hold up the pointer. */
function painter(viewer) {
  const { circuit, state, canvas, stage } = viewer;
  let painting = 0;
  return () => {
    if (!canvas) return;
    cancelAnimationFrame(painting);
    const [width, height] = circuit.size;
    const sharp = Math.min((window.devicePixelRatio || 1) * state.zoom, Math.sqrt(16e6 / (width * height)));
    if (canvas.width !== Math.round(width * sharp))
      [canvas.width, canvas.height] = [Math.round(width * sharp), Math.round(height * sharp)];
    const pen = canvas.getContext("2d", { willReadFrequently: true });
    pen.setTransform(sharp, 0, 0, sharp, 0, 0);
    pen.clearRect(0, 0, width, height);
    const inks = Object.fromEntries(Object.keys(PORTS).map((port) => [port, viewer.colour(`--${port}`)]));
    pen.globalCompositeOperation = "destination-over"; // each edge goes under those before it
    let [left, batch, last] = [viewer.shown.length, BATCH, 0];
    const some = (now) => {
      if (last) batch = now - last > SLOW ? Math.max(40, batch / 2) : Math.min(2000, batch * 1.25);
      last = now;
      for (const stop = Math.max(0, left - batch); left > stop;) stroked(pen, inks, viewer.shown[(left -= 1)]);
      if (left > 0) painting = requestAnimationFrame(some);
      else stage.removeAttribute("aria-busy");
    };
    stage.setAttribute("aria-busy", "true");
    some(performance.now());
  };
}

function stroked(pen, inks, { edge, curve }) {
  pen.strokeStyle = inks[edge.port ?? "other"];
  pen.lineWidth = edge.width;
  pen.globalAlpha = edge.opacity;
  pen.setLineDash(edge.score < 0 ? DASHES : []);
  pen.beginPath();
  pen.moveTo(curve[0], curve[1]);
  pen.bezierCurveTo(...curve.slice(2));
  pen.stroke();
}
