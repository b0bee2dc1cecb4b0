"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const index = JSON.parse(byId("index").textContent);
  const SVG = byId("marks").namespaceURI;
  const PAGE = 100;
  const CONTEXT = 2; // tokens shown on each side of a source
  const STRONG = 0.1; // of the largest attribution: a source that is shown though it is far away
  const COLUMNS = ["place", "latent", "density", "maximum", "head", "share", "family", "token", "raises"];
  const state = { sort: "maximum", down: true, page: 0, search: "", family: "", colour: "activation", chosen: null };

  // Text only ever enters as text nodes and attributes, so no token can become markup.
  function fill(node, attributes, children) {
    for (const [name, value] of Object.entries(attributes)) {
      if (typeof value === "function") node.addEventListener(name, value);
      else if (value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
    }
    node.append(...children);
    return node;
  }
  const make = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
  const draw = (tag, attributes = {}, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

  const number = (x) => (x === null ? "–" : x === 0 ? "0" : Math.abs(x) < 0.01 ? x.toExponential(1) : x.toPrecision(3));
  const signed = (x) => (x > 0 ? "+" : "") + number(x).replace("-", "−");
  const percent = (x) => (x === null ? "–" : (100 * x).toPrecision(2) + " %");
  const visible = (word) => word.replaceAll("\n", "↵").replaceAll("\t", "⇥");
  const word = (id) => visible(index.words[id]);
  const head = (h) => (h === null ? "–" : "h" + h);
  const SHOWN = { density: percent, maximum: number, head, share: percent, family: (x) => x ?? "–", token: visible, raises: visible };
  const rows = index.rows.map((values, at) => Object.fromEntries([["at", at], ...values.map((x, i) => [COLUMNS[i], x])]));
  const nameOf = (row) => `${row.place}:${row.latent}`;

  function matching() {
    const search = state.search.toLowerCase().trim();
    const fits = (row) =>
      (!state.family || row.family === state.family) &&
      (!search || String(row.latent) === search || COLUMNS.some((c) => isNaN(search) && String(row[c] ?? "").toLowerCase().includes(search)));
    const rank = (row) => row[state.sort] ?? (state.sort === "family" ? "" : -1);
    const order = (a, b) => (rank(a) < rank(b) ? -1 : rank(a) > rank(b) ? 1 : 0) * (state.down ? -1 : 1) || a.at - b.at;
    return rows.filter(fits).sort(order);
  }

  function showTable() {
    const found = matching();
    const pages = Math.max(1, Math.ceil(found.length / PAGE));
    state.page = Math.min(state.page, pages - 1);
    const heading = (column) => {
      const sorted = state.sort === column ? (state.down ? "descending" : "ascending") : "none";
      const sort = () => {
        state.down = state.sort === column ? !state.down : typeof rows[0]?.[column] === "number";
        state.sort = column;
        showTable();
      };
      const arrow = { none: "", descending: " ↓", ascending: " ↑" }[sorted];
      return make("th", { scope: "col", "aria-sort": sorted }, make("button", { type: "button", click: sort }, column + arrow));
    };
    const cell = (row, column) => {
      const text = (SHOWN[column] ?? String)(row[column]);
      if (column === "latent") return make("td", {}, make("button", { type: "button", click: () => choose(row) }, text));
      return make("td", { class: typeof row[column] === "number" ? "number" : null }, text);
    };
    const line = (row) => make("tr", { class: row === state.chosen ? "chosen" : null }, ...COLUMNS.map((column) => cell(row, column)));
    byId("latents").replaceChildren(
      make("thead", {}, make("tr", {}, ...COLUMNS.map(heading))),
      make("tbody", {}, ...found.slice(state.page * PAGE, (state.page + 1) * PAGE).map(line)),
    );
    byId("found").textContent = `${found.length} of ${rows.length} latents, page ${state.page + 1} of ${pages}`;
    byId("before").disabled = state.page === 0;
    byId("next").disabled = state.page === pages - 1;
  }

  function choose(row) {
    state.chosen = row;
    location.hash = nameOf(row);
    showTable();
    showLatent();
  }

  function showLatent() {
    const row = state.chosen;
    const latent = JSON.parse(byId("latent-" + row.at).textContent); // parsed when asked for: a file may hold thousands
    const facts = [["family", row.family], ["density", `${percent(row.density)} of ${index.n_tokens} tokens`], ["maximum", number(row.maximum)],
      ["encoder bias", number(latent.bias)], ["constant", number(latent.constant)], ...latent.signature.map(([k, v]) => [k, number(v)])];
    const coloured = ["activation", "attribution"].map((colour) => {
      const pick = () => { state.colour = colour; showLatent(); };
      const box = make("input", { type: "radio", name: "colour", change: pick, checked: state.colour === colour });
      return make("label", {}, box, colour === "activation" ? " activation" : " attribution by source");
    });
    byId("latent").replaceChildren(
      make("h2", {}, `${row.place} latent ${row.latent}`),
      make("div", { class: "panels" },
        make("dl", {}, ...facts.filter(([, v]) => v !== null).flatMap(([k, v]) => [make("dt", {}, k), make("dd", {}, v)])),
        histogram(latent), heads(latent), logits("raises", latent.top), logits("lowers", latent.bottom), nearest(row, latent)),
      make("div", { class: "controls" }, "Colour tokens by", ...(index.attributed ? coloured : [" activation"])),
      ...latent.groups.flatMap((group) => [make("h3", {}, group.title), ...group.examples.map((at) => example(row, latent, latent.examples[at]))]),
    );
  }

  function histogram(latent) {
    const [width, height, top] = [260, 90, Math.log1p(Math.max(1, ...latent.histogram))];
    const step = width / latent.histogram.length;
    const bars = latent.histogram.map((count, at) => {
      const tall = (Math.log1p(count) / top) * height;
      return draw("rect", { class: "bar", x: at * step, y: height - tall, width: step * 0.9, height: tall }, draw("title", {}, `${count} positions`));
    });
    const label = `Histogram of ${latent.n_active} activations, counts on a log scale, 0 to ${number(latent.maximum)}`;
    const ends = [draw("text", { x: 0, y: height + 14 }, "0"), draw("text", { x: width, y: height + 14, "text-anchor": "end" }, number(latent.maximum))];
    return make("div", {}, make("h3", {}, "Activations (log counts)"),
      draw("svg", { width, height: height + 18, role: "img", "aria-label": label }, ...bars, ...ends));
  }

  function heads(latent) {
    if (!latent.heads.length) return "";
    const most = Math.max(...latent.heads, 1e-9);
    const bars = latent.heads.map((share, h) => [
      draw("text", { x: 0, y: 14 * h + 11 }, head(latent.first_head + h)),
      draw("rect", { class: "bar", x: 28, y: 14 * h + 2, width: (130 * share) / most, height: 10 }),
      draw("text", { x: 33 + (130 * share) / most, y: 14 * h + 11 }, percent(share))]);
    return make("div", {}, make("h3", {}, "Head shares"),
      draw("svg", { width: 220, height: 14 * bars.length + 4, role: "img", "aria-label": "Share of each head" }, ...bars.flat()));
  }

  function logits(title, effects) {
    if (!effects.length) return "";
    const line = ([token, effect]) => make("tr", {}, make("td", {}, word(token)), make("td", { class: "number" }, signed(effect)));
    return make("div", {}, make("h3", {}, `Logits it ${title}`), make("table", {}, make("tbody", {}, ...effects.map(line))));
  }

  function nearest(row, latent) {
    const line = ([other, cosine]) => {
      const there = rows.find((r) => r.place === row.place && r.latent === other);
      const name = there ? make("button", { type: "button", click: () => choose(there) }, String(other)) : String(other);
      return make("tr", {}, make("td", {}, name), make("td", { class: "number" }, number(cosine)));
    };
    if (!latent.nearest.length) return "";
    return make("div", {}, make("h3", {}, "Nearest (decoder cosine)"), make("table", {}, make("tbody", {}, ...latent.nearest.map(line))));
  }

  function example(row, latent, found) {
    const bySource = index.attributed && state.colour === "attribution";
    const ids = index.prompts[found.prompt];
    const sources = new Map((found.sources ?? []).map(([at, value, h]) => [at, { value, h }]));
    const most = Math.max(1e-12, ...[...sources.values()].map(({ value }) => Math.abs(value)));
    const activation = (at) => found.activations[at - found.start] ?? 0;
    const value = (at) => (bySource ? (sources.get(at)?.value ?? 0) : activation(at));
    const near = (at) => [...sources].some(([s, { value: v }]) => Math.abs(v) >= STRONG * most && Math.abs(s - at) <= CONTEXT);
    const inWindow = (at) => at >= found.start && at < found.start + found.activations.length;
    const text = make("div", { class: "text" });
    const write = (whole) => {
      const parts = [];
      let last = -1;
      ids.forEach((id, at) => {
        if (!(whole || inWindow(at) || (bySource && near(at)))) return;
        if (at > last + 1) parts.push(make("span", { class: "gap" }, " … "));
        last = at;
        const strength = 0.8 * Math.min(1, Math.abs(value(at)) / (bySource ? most : latent.maximum || 1));
        const colour = `background: rgba(var(--${value(at) < 0 ? "against" : "for"}), ${strength.toFixed(3)})`;
        const said = bySource ? attributed(found, sources.get(at)) : inWindow(at) ? `activation ${number(activation(at))}` : "";
        parts.push(make("span", { class: at === found.pos ? "query" : null, style: strength > 0.004 ? colour : null, title: `position ${at}: ${JSON.stringify(index.words[id])}\n${said}` }, word(id)));
      });
      if (last < ids.length - 1) parts.push(make("span", { class: "gap" }, " … "));
      if (!whole) parts.push(" ", make("button", { type: "button", class: "note", click: () => write(true) }, "whole prompt"));
      if (bySource) parts.push(make("div", { class: "note" }, summary(latent, found)));
      text.replaceChildren(...parts);
    };
    write(false);
    return make("div", { class: "example" }, make("span", { class: "number" }, number(found.activation)), text);
  }

  function attributed(found, source) {
    if (!source) return "attribution about 0";
    return `attribution ${signed(source.value)}, most of it by ${head(source.h)}`;
  }

  function summary(latent, found) {
    const strongest = found.by_head.map((value, h) => [value, h]).sort((a, b) => Math.abs(b[0]) - Math.abs(a[0])).slice(0, 3);
    const named = strongest.map(([value, h]) => `${head(latent.first_head + h)} ${signed(value)}`).join(", ");
    return `heads: ${named}; sources not coloured: ${signed(found.rest)}; constant: ${signed(latent.constant)}`;
  }

  byId("search").addEventListener("input", (event) => { state.search = event.target.value; state.page = 0; showTable(); });
  byId("family").addEventListener("change", (event) => { state.family = event.target.value; state.page = 0; showTable(); });
  byId("before").addEventListener("click", () => { state.page -= 1; showTable(); });
  byId("next").addEventListener("click", () => { state.page += 1; showTable(); });
  const present = [...new Set(rows.map((row) => row.family))].filter((family) => family !== null).sort();
  byId("family").append(make("option", { value: "" }, "all"), ...present.map((family) => make("option", { value: family }, family)));
  byId("families").append(...index.families.flatMap(([name, rule]) => [make("dt", {}, name), make("dd", {}, rule)]));
  const asked = () => rows.find((row) => nameOf(row) === decodeURIComponent(location.hash.slice(1)));
  window.addEventListener("hashchange", () => { if (asked() && asked() !== state.chosen) choose(asked()); });
  showTable();
  if (asked() || rows.length === 1) choose(asked() ?? rows[0]);
})();
