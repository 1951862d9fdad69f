
"use strict";
// Everything that comes from outside (names of images, lines of the log) goes into the page as text, never as markup.
const POLL_MS = 2000, PAST = 150, MAPS_MAX = 12, NS = "http://www.w3.org/2000/svg";
const STATES = [["dirty", "not stored yet"], ["l1", "in L1, read"], ["prefetched", "in L1, prefetched"], ["l2", "in L2"], ["hole", "hole"], ["store", "in the store only"]];
const at = id => document.getElementById(id);
const past = [];
const maps = new Map();

function get(from, path) {
  for (const name of path.split(".")) { if (from === null || from === undefined) return null; from = from[name]; }
  return from === undefined ? null : from;
}
function make(tag, text, kind) {
  const made = document.createElement(tag);
  if (text !== undefined && text !== null) made.textContent = text;
  if (kind) made.className = kind;
  return made;
}
function shape(tag, attributes) {
  const made = document.createElementNS(NS, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}
// What turns the rest of a line around or hides it is shown, not done.
const visible = text => text.replace(/[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}]/gu, c => "\\u" + c.codePointAt(0).toString(16).padStart(4, "0"));
const count = n => n === null ? "–" : n < 1e5 ? Math.round(n).toLocaleString("en") : Intl.NumberFormat("en", {notation: "compact", maximumFractionDigits: 1}).format(n);
const percent = share => share === null || !isFinite(share) ? "–" : (100 * share).toFixed(share > 0.9995 || share === 0 ? 0 : Math.abs(share) < 0.0995 ? 2 : 1) + " %";
function bytes(n) {
  if (n === null) return "–";
  let unit = 0;
  while (n >= 1024 && unit < 6) { n /= 1024; unit++; }
  return (unit && n < 99.95 ? n.toFixed(1) : Math.round(n)) + " " + ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"][unit];
}
function span(seconds) {
  if (seconds === null) return "–";
  if (seconds < 1e-3) return (1e6 * seconds).toFixed(seconds < 1e-5 ? 1 : 0) + " µs";
  if (seconds < 1) return (1e3 * seconds).toFixed(seconds < 1e-2 ? 1 : 0) + " ms";
  if (seconds < 100) return seconds.toFixed(seconds < 10 ? 1 : 0) + " s";
  if (seconds < 6000) return Math.round(seconds / 60) + " min";
  if (seconds < 172800) return Math.round(seconds / 3600) + " h";
  return Math.round(seconds / 86400) + " days";
}

const hits = (now, tier) => [get(now, tier + ".hits"), get(now, tier + ".misses")];
const rate = (now, then, path) => {
  const [a, b] = [get(now, path), then ? get(then, path) : null];
  return a === null || b === null || now.time_s <= then.time_s || a < b ? null : (a - b) / (now.time_s - then.time_s);
};
const sum = (...parts) => parts.every(p => p === null) ? null : parts.reduce((a, b) => a + (b || 0), 0);
function hitRate(now, then, tier) {
  const [h, m] = hits(now, tier), [h0, m0] = then ? hits(then, tier) : [0, 0];
  if (h === null) return null;
  const asked = h + m - (h0 || 0) - (m0 || 0);
  return asked > 0 ? (h - (h0 || 0)) / asked : null;
}

function tile(title, value, more, kind) {
  const box = make("div");
  box.append(make("dt", title), make("dd", value, kind), make("dd", more));
  return box;
}
function drawTiles(now) {
  // Over the last ten seconds or so: what one poll sees jumps about.
  const then = past.length > 1 ? past[Math.max(0, past.length - 6)] : null;
  const reads = sum(rate(now, then, "traffic.memory_reads"), rate(now, then, "traffic.waited_reads"));
  const readBytes = sum(rate(now, then, "traffic.memory_bytes"), rate(now, then, "traffic.waited_bytes"));
  const recent = hitRate(now, then, "cache.l1");
  const risk = get(now, "data_at_risk.bytes"), cap = get(now, "dirty_max_bytes"), age = get(now, "data_at_risk.age_s");
  const accuracy = get(now, "prefetch.accuracy"), used = get(now, "cache.l1.used_bytes"), capacity = get(now, "cache.l1.capacity_bytes");
  const issued = get(now, "prefetch.total.issued");
  at("tiles").replaceChildren(
    tile("Reads", count(reads) + "/s", bytes(readBytes) + "/s"),
    tile("Writes", count(rate(now, then, "traffic.writes")) + "/s", bytes(rate(now, then, "traffic.written_bytes")) + "/s"),
    tile("Hit rate of L1", percent(recent === null ? hitRate(now, null, "cache.l1") : recent), percent(hitRate(now, null, "cache.l1")) + " since the start"),
    tile("Data at risk", bytes(risk), risk ? "oldest " + span(age) + ", cap " + bytes(cap) : "everything is stored", risk >= cap * 0.9 ? "bad" : risk >= cap / 2 ? "warn" : ""),
    tile("Prefetch accuracy", percent(accuracy), issued ? "coverage " + percent(get(now, "prefetch.coverage")) : "nothing prefetched yet"),
    tile("L1", percent(capacity ? used / capacity : null), bytes(used) + " of " + bytes(capacity)),
  );
}
function drawLine(id, values, top) {
  const line = at(id), known = values.map(v => v === null ? 0 : v), peak = top || Math.max(1, ...known) * 1.1;
  if (known.length < 2) { line.replaceChildren(); return; }
  const width = Math.max(30, known.length);
  const x = i => (300 * (width - known.length + i) / (width - 1)).toFixed(1), y = v => (58 - 55 * Math.min(1, v / peak)).toFixed(1);
  const points = known.map((v, i) => x(i) + "," + y(v));
  line.replaceChildren(
    shape("polygon", {points: x(0) + ",60 " + points.join(" ") + " " + x(known.length - 1) + ",60", class: "area"}),
    shape("polyline", {points: points.join(" "), class: "stroke"}),
  );
}
function drawLines() {
  const pairs = past.slice(1).map((now, i) => [now, past[i]]);
  const reads = pairs.map(([n, t]) => sum(rate(n, t, "traffic.memory_bytes"), rate(n, t, "traffic.waited_bytes")));
  const writes = pairs.map(([n, t]) => rate(n, t, "traffic.written_bytes"));
  let last = null;
  const found = pairs.map(([n, t]) => { const r = hitRate(n, t, "cache.l1"); if (r !== null) last = r; return last; });
  drawLine("read-line", reads); drawLine("write-line", writes); drawLine("hit-line", found, 1);
  at("read-now").textContent = reads.length ? bytes(reads[reads.length - 1]) + "/s" : "";
  at("write-now").textContent = writes.length ? bytes(writes[writes.length - 1]) + "/s" : "";
  at("hit-now").textContent = found.length ? percent(last) : "";
}

function row(cells) {
  const made = make("tr");
  cells.forEach((cell, i) => {
    const box = make(i ? "td" : "th");
    if (!i) box.scope = "row";
    if (cell instanceof Node) box.append(cell); else box.textContent = cell;
    made.append(box);
  });
  return made;
}
function drawTiers(now) {
  const tiers = [
    ["L1 memory", "cache.l1", "l1", true, get(now, "traffic.memory_bytes"), get(now, "cache.l1")],
    ["L2 Redis", "cache.l2_traffic", "l2", get(now, "cache.l2.up"), get(now, "cache.l2_traffic.read_bytes"), get(now, "cache.l2")],
    ["L3 store", "cache.l3_traffic", "l3", get(now, "store.up"), get(now, "cache.l3_traffic.read_bytes"), null],
  ];
  at("tiers").tBodies[0].replaceChildren(...tiers.map(([title, path, key, up, read, held]) => {
    const state = up === null ? make("span", "not used", "tag") : up ? make("span", "up", "tag good") : make("span", "does not answer", "tag bad");
    const [h, m] = hits(now, path), l = get(now, "latency." + key + ".get");
    const full = held ? bytes(held.used_bytes) + " of " + bytes(held.capacity_bytes) : "–";
    return row([title, state, percent(hitRate(now, null, path)), count(h), count(m), bytes(read), span(get(l, "p50_s")), span(get(l, "p95_s")), span(get(l, "p99_s")), full]);
  }));
}
function drawLatency(now) {
  const titles = {fuse: "request", l1: "L1", l2: "L2", l3: "L3", store: "store", journal: "journal", commit: "commit"};
  const rows = [];
  for (const subject of Object.keys(titles))
    for (const [operation, found] of Object.entries(get(now, "latency." + subject) || {})) {
      const title = titles[subject] + (operation === subject ? "" : " " + (subject === "fuse" && operation === "read" ? "read that waited" : operation.replaceAll("_", " ")));
      rows.push(row([title, count(found.count), span(found.p50_s), span(found.p95_s), span(found.p99_s)]));
    }
  at("latency").tBodies[0].replaceChildren(...rows);
}
function drawLearning(now) {
  const facts = [], fact = (title, text) => facts.push(make("dt", title), make("dd", text));
  fact("Accuracy", percent(get(now, "prefetch.accuracy")));
  fact("Coverage", percent(get(now, "prefetch.coverage")));
  fact("Under way", count(get(now, "prefetch.in_flight")));
  const spent = sum(get(now, "prefetch.policy_cpu_s"), get(now, "eviction.cpu_s")), all = get(now, "prefetch.process_cpu_s");
  fact("Processor time", span(spent) + (all ? ", " + percent(spent / all) + " of the daemon's" : ""));
  fact("Eviction", (get(now, "eviction.policy") || "–") + (get(now, "eviction.words") ? ": " + get(now, "eviction.words") : ""));
  const written = get(now, "written"), ratio = get(now, "collection.dedup_ratio");
  if (ratio !== null) fact("Deduplication", ratio.toFixed(2) + " : 1, " + bytes(get(now, "collection.saved_bytes")) + " saved");
  else if (written) fact("Deduplication", count(written.dedup_chunks) + " of " + count(written.dedup_chunks + written.new_chunks) + " chunks written were known");
  if (written && written.stored_bytes) fact("Compression", (written.new_bytes / written.stored_bytes).toFixed(2) + " : 1");
  at("learning").replaceChildren(...facts);
  const rows = Object.entries(get(now, "prefetch.sources") || {}).filter(([, c]) => c.issued).map(([name, c]) => {
    const ended = c.used + c.late + c.wasted;
    return row([name, count(c.issued), count(c.used), count(c.late), count(c.wasted), percent(ended ? (c.used + c.late) / ended : null)]);
  });
  at("sources").tBodies[0].replaceChildren(...rows);
  at("sources").hidden = !rows.length;
}

function drawLegend() {
  at("legend").replaceChildren(...STATES.map(([state, title]) => {
    const item = make("li"); item.append(make("span", "", "swatch " + state), title); return item;
  }));
}
function imageBox(id) {
  const box = make("article", "", "image"), title = make("h3"), facts = make("p", "", "line-of-facts");
  const map = shape("svg", {class: "map", role: "img", preserveAspectRatio: "none", tabindex: "0"}), spot = make("p", "", "spot");
  const more = make("details"), table = make("table");
  more.append(make("summary", "as a table"), table);
  box.append(title, facts, map, spot, more);
  const known = {box, title, facts, map, spot, table, more, found: null};
  const point = share => {
    if (!known.found || !known.found.l1.length) return;
    const cells = known.found.l1.length, i = Math.max(0, Math.min(cells - 1, Math.floor(share * cells)));
    known.spot.textContent = describe(known.found, i, i + 1);
    known.at = i;
  };
  map.addEventListener("mousemove", event => { const r = map.getBoundingClientRect(); point((event.clientX - r.left) / r.width); });
  map.addEventListener("mouseleave", () => { known.at = undefined; known.spot.textContent = known.found ? totals(known.found) : ""; });
  map.addEventListener("keydown", event => {
    const step = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (step && known.found) { event.preventDefault(); point(((known.at === undefined ? (step > 0 ? -1 : known.found.l1.length) : known.at) + step + 0.5) / known.found.l1.length); }
  });
  more.addEventListener("toggle", () => { if (known.found) drawTable(known); });
  return known;
}
function shares(found, from, to) {
  const held = {}; let rest = 1;
  for (const [state] of STATES) {
    if (state === "store") break;
    held[state] = Math.min(Math.max(0, rest), found[state].slice(from, to).reduce((a, b) => a + b, 0) / Math.max(1, to - from));
    rest -= held[state];
  }
  held.store = Math.max(0, rest);
  return held;
}
const listed = held => STATES.filter(([state]) => held[state] >= 0.0005).map(([state, title]) => percent(held[state]) + " " + title).join(", ");
function describe(found, from, to) {
  const cells = found.l1.length, size = found.chunks * found.chunk_size;
  return bytes(size * from / cells) + " to " + bytes(size * to / cells) + ": " + listed(shares(found, from, to));
}
const totals = found => (listed(shares(found, 0, found.l1.length)) || "empty") + (found.exact ? "" : " (sampled)") + (found.l2_known ? "" : "; L2 was not asked");
function drawMap(known) {
  const found = known.found, cells = found.l1.length, parts = [];
  known.map.setAttribute("viewBox", "0 0 " + Math.max(1, cells) + " 100");
  known.map.setAttribute("aria-label", "Where the chunks are, from the image's begin to its end: " + totals(found));
  const whole = i => { const held = shares(found, i, i + 1); return STATES.find(([state]) => held[state] > 0.9995)?.[0]; };
  for (let i = 0; i < cells;) {
    const state = whole(i); let to = i + 1;
    if (state) {
      // Neighbours that are all of one kind are one rectangle: fewer of them, and no seams between.
      while (to < cells && whole(to) === state) to++;
      if (state !== "store") parts.push(shape("rect", {x: i, y: 0, width: to - i, height: 100, class: state}));
    } else {
      const held = shares(found, i, to); let y = 100;
      for (const [kind] of STATES) {
        if (kind === "store" || !held[kind]) continue;
        const high = Math.max(4, 100 * held[kind]);
        y -= high;
        parts.push(shape("rect", {x: i, y: Math.max(0, y).toFixed(2), width: 1, height: high.toFixed(2), class: kind}));
      }
    }
    i = to;
  }
  known.map.replaceChildren(...parts);
  if (known.at === undefined) known.spot.textContent = totals(found);
  drawTable(known);
}
function drawTable(known) {
  if (!known.more.open) return;
  const found = known.found, cells = found.l1.length, rows = Math.min(16, cells), head = make("tr");
  for (const title of ["Part", ...STATES.map(([, title]) => title)]) { const cell = make("th", title); cell.scope = "col"; head.append(cell); }
  const body = [];
  for (let r = 0; r < rows; r++) {
    const from = Math.floor(r * cells / rows), to = Math.floor((r + 1) * cells / rows), held = shares(found, from, to), size = found.chunks * found.chunk_size;
    body.push(row([bytes(size * from / cells) + " – " + bytes(size * to / cells), ...STATES.map(([state]) => percent(held[state]))]));
  }
  const thead = make("thead"), tbody = make("tbody"); thead.append(head); tbody.append(...body);
  known.table.replaceChildren(thead, tbody);
}
function drawImages(now) {
  const then = past.length > 1 ? past[Math.max(0, past.length - 6)] : null, before = new Map((then ? then.images : []).map(i => [i.id, i]));
  const shown = now.images.slice(0, MAPS_MAX), here = new Set(shown.map(i => i.id));
  for (const id of maps.keys()) if (!here.has(id)) { maps.get(id).box.remove(); maps.delete(id); }
  for (const image of shown) {
    if (!maps.has(image.id)) maps.set(image.id, imageBox(image.id));
    const known = maps.get(image.id), old = before.get(image.id), gone = then ? now.time_s - then.time_s : 0;
    const per = field => old && gone > 0 ? Math.max(0, field.reduce((a, f) => a + image.traffic[f] - old.traffic[f], 0)) / gone : null;
    const t = image.traffic;
    known.title.textContent = visible(image.name);
    known.facts.textContent = [
      bytes(image.size), "generation " + image.generation,
      count(t.memory_reads + t.waited_reads) + " reads (" + count(per(["memory_reads", "waited_reads"])) + "/s, " + bytes(per(["memory_bytes", "waited_bytes"])) + "/s)",
      count(t.writes) + " writes (" + count(per(["writes"])) + "/s)",
      image.dirty_bytes ? bytes(image.dirty_bytes) + " not stored yet" : "all stored",
      image.read_only ? "read-only" : image.lease === "held" ? "lease held" : image.lease === "leaving" ? "lease being given back" : "no lease",
    ].join(" · ");
    at("images").append(known.box);
    look(image.id);
  }
  const left = now.images.length - shown.length + now.images_left_out;
  at("images-none").hidden = now.images.length > 0 && !left;
  at("images-none").textContent = left > 0 ? left + " more images are open; these are those that are used most." : "No image is open here.";
}
async function look(id) {
  const known = maps.get(id);
  if (known.asking) return;
  known.asking = true;
  try {
    const answer = await fetch("residency.json?image=" + encodeURIComponent(id));
    if (answer.ok) { known.found = await answer.json(); drawMap(known); }
  } catch { /* the next one will do, or the status says what is wrong */ } finally { known.asking = false; }
}
function drawEvents(now) {
  const kinds = {error: "tag bad", warning: "tag warn", lease: "tag", commit: "tag good"};
  at("events").replaceChildren(...now.happened.map(event => {
    const item = make("li"), when = make("time", new Date(1000 * event.time_s).toLocaleTimeString("en-GB"));
    when.dateTime = new Date(1000 * event.time_s).toISOString(); when.title = when.dateTime;
    item.append(when, make("span", event.kind, kinds[event.kind] || "tag"), make("p", visible(event.text) + (event.count > 1 ? " (" + event.count + " times)" : "")));
    return item;
  }));
  at("events-none").hidden = now.happened.length > 0;
}
function drawHead(now, ready) {
  const where = get(now, "mount.mountpoint") || "";
  at("where").textContent = visible(where);
  document.title = "NovaFS " + where;
  at("about").textContent = [get(now, "volume.url"), "version " + get(now, "mount.version"), "process " + get(now, "mount.pid"), "up " + span(get(now, "mount.uptime_s"))].join(" · ");
  const degraded = ready.ok && ready.text !== "ready";
  at("state").textContent = ready.ok ? degraded ? "degraded" : "ready" : "not ready";
  at("state").className = "pill " + (ready.ok ? degraded ? "warn" : "good" : "bad");
  tell(ready.ok && !degraded ? "" : ready.text, degraded);
}
function tell(text, mild) {
  const notice = at("notice");
  notice.hidden = !text;
  notice.className = mild ? "notice warn" : "notice";
  if (notice.textContent !== text) notice.textContent = text;
}

async function poll() {
  try {
    const [status, health] = await Promise.all([fetch("status.json"), fetch("readyz")]);
    if (!status.ok) throw new Error(await status.text());
    const now = await status.json(), ready = {ok: health.ok, text: (await health.text()).trim()};
    past.push(now);
    if (past.length > PAST + 1) past.shift();
    drawHead(now, ready); drawTiles(now); drawLines(); drawTiers(now); drawImages(now); drawLatency(now); drawLearning(now); drawEvents(now);
    at("foot").textContent = "As of " + new Date(1000 * now.time_s).toLocaleTimeString("en-GB") + ", every " + POLL_MS / 1000 + " seconds. Metrics for Prometheus are at /metrics.";
  } catch (error) {
    at("state").textContent = "no answer"; at("state").className = "pill bad";
    tell("The daemon does not answer; what is shown here is old. " + error.message, false);
  }
  setTimeout(poll, document.hidden ? 5 * POLL_MS : POLL_MS);
}
drawLegend();
poll();
