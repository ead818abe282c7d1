"use strict";
const $ = (id) => document.getElementById(id);
const data = JSON.parse($("data").textContent);
const K = data.names.length, ALL = K;
const state = { step: data.start, label: null, kind: "label", cell: null, limit: 24, list: [], open: 0 };
const running = (changes) => { let total = 0; return changes.map((change) => (total += change)); };
const counts = data.counts.map(running), rights = data.right.map(running);
const MARGIN = { left: 42, right: 10, top: 10, bottom: 40 }, WIDTH = 440, HEIGHT = 300;
const COLOURS = ["#1f83c8", "#d95f02", "#0f9b74", "#c266a0", "#b8860b", "#7a6fd0", "#3aa7b8"];
const DASHES = ["none", "7 3", "2 3", "10 3 2 3"];

function element(tag, attributes = {}, ...children) {
  const isSvg = /^(svg|rect|image|text|line|polyline|circle|g|path)$/.test(tag);
  const node = isSvg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

// Numbers at a threshold: row K is all classes together. The formulas are those of evaluation/thresholds.py.
function rates(row, step) {
  const found = counts[row][step], right = rights[row][step], boxes = data.boxes[row];
  return {
    precision: found ? right / found : null, recall: right / Math.max(1, boxes),
    f1: (2 * right) / Math.max(found + boxes, 1), right, wrong: found - right, missed: boxes - right,
  };
}
const share = (value) => (value === null ? "–" : value.toFixed(3));
function cells(row) {
  const { precision, recall, f1, right, wrong, missed } = rates(row, state.step);
  return [share(precision), share(recall), share(f1), right, wrong, missed].map(String);
}
function fill(tableRow, row) {
  const texts = cells(row), old = tableRow.querySelectorAll("td.now");
  if (old.length) old.forEach((cell, place) => { cell.textContent = texts[place]; });
  else tableRow.append(...texts.map((text) => element("td", { class: "now" }, text)));
}

// Charts.
const lastOf = (values, otherwise) => values.reduce((most, value) => Math.max(most, value), otherwise);
function ticks(high) {
  const rough = high / 4, unit = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * unit).find((size) => size >= rough * 0.999);
  return Array.from({ length: Math.floor(high / step + 1e-6) + 1 }, (_, place) => +(place * step).toPrecision(6));
}
function chart(svg, { low = 0, high, top = 1, xName, lines }) {
  const x = (value) => MARGIN.left + ((value - low) / (high - low || 1)) * (WIDTH - MARGIN.left - MARGIN.right);
  const y = (value) => HEIGHT - MARGIN.bottom - (value / top) * (HEIGHT - MARGIN.top - MARGIN.bottom);
  svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
  svg.replaceChildren();
  for (const value of ticks(top)) {
    svg.append(element("line", { class: "axis", x1: MARGIN.left, x2: WIDTH - MARGIN.right, y1: y(value), y2: y(value) }),
      element("text", { x: MARGIN.left - 6, y: y(value) + 4, "text-anchor": "end" }, value));
  }
  for (const value of low < 0 ? [low, high] : ticks(high)) {
    svg.append(element("text", { x: x(value), y: HEIGHT - MARGIN.bottom + 17, "text-anchor": "middle" }, value));
  }
  const middle = (MARGIN.left + WIDTH - MARGIN.right) / 2;
  svg.append(element("text", { x: middle, y: HEIGHT - 5, "text-anchor": "middle" }, xName));
  for (const { points, colour, dash = "none", row, name } of lines) {
    const text = points.map(([a, b]) => `${x(a).toFixed(1)},${y(b).toFixed(1)}`).join(" ");
    const line = element("polyline", { points: text, stroke: colour, "stroke-dasharray": dash, "data-row": row ?? "" });
    if (row === ALL) line.classList.add("all");
    svg.append(line);
    if (name) {
      const [a, b] = points.at(-1);
      svg.append(element("text", { x: x(a) - 4, y: y(b) - 7, "text-anchor": "end", style: `fill: ${colour}` }, name),
        element("circle", { cx: x(a), cy: y(b), r: 3, fill: colour }));
    }
  }
  return { x, y };
}
const drawn = [...data.names.keys()].sort((a, b) => data.boxes[b] - data.boxes[a]).slice(0, 24);
const colourOf = (row) => (row === ALL ? "var(--ink)" : COLOURS[Math.max(0, drawn.indexOf(row)) % COLOURS.length]);
const dashOf = (row) => DASHES[Math.floor(Math.max(0, drawn.indexOf(row)) / COLOURS.length) % DASHES.length];
const scales = {};
function drawCurves() {
  const rows = [...drawn, ALL];
  if (state.label !== null && !drawn.includes(state.label)) rows.push(state.label);
  const style = (row) => ({ row, colour: colourOf(row), dash: dashOf(row) });
  const places = [...data.steps.keys()];
  const pr = (row) => places.map((step) => rates(row, step)).filter((rate) => rate.precision !== null)
    .map(({ recall, precision }) => [recall, precision]);
  const f1 = (row) => places.map((step) => [data.steps[step], rates(row, step).f1]);
  const [low, high] = [data.steps[0], data.steps.at(-1)];
  scales.pr = chart($("pr"), { high: 1, xName: "recall", lines: rows.map((row) => ({ ...style(row), points: pr(row) })) });
  scales.f1 = chart($("f1"), { low, high, xName: "score", lines: rows.map((row) => ({ ...style(row), points: f1(row) })) });
  $("pr").append(element("g", { id: "dots" }));
  $("f1").append(element("line", { id: "cut", stroke: "var(--accent)", y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom }));
  highlight(state.label);
  moveMarks();
}
function highlight(row) {
  document.querySelectorAll("#pr polyline, #f1 polyline").forEach((line) => {
    line.classList.toggle("strong", row !== null && +line.dataset.row === row);
    line.classList.toggle("faint", row !== null && +line.dataset.row !== row);
  });
}
function moveMarks() {
  const at = scales.f1.x(data.steps[state.step]);
  $("cut").setAttribute("x1", at);
  $("cut").setAttribute("x2", at);
  const rows = state.label === null ? [ALL] : [ALL, state.label];
  $("dots").replaceChildren(...rows.filter((row) => counts[row][state.step]).map((row) => {
    const { recall, precision } = rates(row, state.step);
    return element("circle", { cx: scales.pr.x(recall), cy: scales.pr.y(precision), r: 6, fill: colourOf(row),
      stroke: "var(--ground)", "stroke-width": 2 });
  }));
}
function makeLegend() {
  $("legend").append(...[...drawn, ALL].map((row) => {
    const line = element("line", { x1: 0, x2: 26, y1: 5, y2: 5, stroke: colourOf(row), "stroke-width": row === ALL ? 4 : 3,
      "stroke-dasharray": dashOf(row) });
    const name = element("bdi", {}, row === ALL ? "all" : data.names[row]);
    const button = element("button", { type: "button", "data-label": row, title: name.textContent, "aria-pressed": false },
      element("svg", { viewBox: "0 0 26 10", "aria-hidden": true }, line), name);
    button.addEventListener("click", () => choose(row === ALL || row === state.label ? null : row));
    for (const event of ["mouseenter", "focus"]) button.addEventListener(event, () => highlight(row));
    for (const event of ["mouseleave", "blur"]) button.addEventListener(event, () => highlight(state.label));
    return button;
  }));
  if (K > drawn.length) $("legend").append(`the ${drawn.length} most frequent of ${K} classes`);
}

// The gallery: its cases follow from the boxes of its images.
function cases() {
  const { step, kind, cell, label } = state, found = [], truth = [], mixed = [];
  const asked = { false: ["background", "both"], label: ["background"] }[kind] ?? [kind];
  for (const image of data.images) {
    const hit = new Set(), near = new Set(), taken = new Set();
    image.found.forEach(([, , , , name, score, what, target, took, level], box) => {
      if (what === "right" && level > step) hit.add(target);
      near.add(target);
      taken.add(took);
      const overlapped = took < 0 ? K : image.truth[took][4];
      const wanted = cell ? took !== -2 && overlapped === cell[0] && name === cell[1] : level > step && asked.includes(what);
      const names = [name, cell ? overlapped : what === "class" ? image.truth[target][4] : name];
      if (wanted && (label === null || names.includes(label))) found.push({ image, box, weight: score });
    });
    image.truth.forEach(([x1, y1, x2, y2, name, iou], box) => {
      const wanted = cell ? cell[1] === K && name === cell[0] && !taken.has(box)
        : { missing: !hit.has(box), missed: !near.has(box), label: iou <= data.near }[kind];
      const weight = ((x2 - x1) * (y2 - y1)) / (kind === "label" ? image.size[0] * image.size[1] : 1);
      if (wanted && (label === null || name === label)) truth.push({ image, box, isTruth: true, weight });
    });
  }
  for (const list of [found, truth]) list.sort((a, b) => b.weight - a.weight);
  for (let place = 0; place < Math.max(found.length, truth.length); place++) {
    mixed.push(...[found[place], truth[place]].filter(Boolean));
  }
  return mixed;
}
const VERDICTS = { ...data.kinds, right: "Right", missed: "Missed" };
const fileOf = (path) => path.split(/[\\/]/).at(-1);
function describe({ image, box, isTruth }) {
  if (isTruth) {
    const [, , , , name, iou, place] = image.truth[box];
    return { what: data.names[name], verdict: iou <= data.near ? "Annotated, no detection near" : "Annotated, missed",
      where: fileOf(place), long: `Annotated in ${place}; the nearest detection overlaps it by an IoU of ${iou.toFixed(2)}.` };
  }
  const [, , , , name, score, kind, target, took] = image.found[box];
  const other = image.truth[kind === "class" ? target : state.cell && took >= 0 ? took : -1];
  return { what: `${data.names[name]} ${score.toFixed(2)}`, where: fileOf(image.path),
    verdict: other ? `${VERDICTS[kind]}: annotated as ${data.names[other[4]]}` : VERDICTS[kind],
    long: other ? `Annotated in ${other[6]}.` : "" };
}
function boxOf({ image, box, isTruth }) { return (isTruth ? image.truth : image.found)[box]; }
function draw(svg, { image, box, isTruth }, view, withText) {
  const [height, width] = image.size, hit = new Set(), rectangles = [], texts = [];
  svg.setAttribute("viewBox", view.join(" "));
  svg.replaceChildren();
  if (image.file) {
    svg.append(element("image", { href: `report/${image.file}`, width, height, preserveAspectRatio: "none" }));
  } else {
    svg.append(element("rect", { width, height, fill: "#555" }),
      element("text", { x: view[0] + view[2] / 2, y: view[1] + view[3] / 2, "text-anchor": "middle", class: "caption",
        "font-size": view[2] / 20 }, "image not readable"));
  }
  const shown = image.found.map((one, place) => [one, place]).filter(([one, place]) =>
    one[9] > state.step || (!isTruth && place === box));
  for (const [one] of shown) if (one[6] === "right") hit.add(one[7]);
  image.ignored.forEach((one) => rectangles.push([one, "ignored", false]));
  image.truth.forEach((one, place) => rectangles.push(
    [one, hit.has(place) ? "truth" : "lost", isTruth && place === box, `${data.names[one[4]]} (annotated)`]));
  shown.forEach(([one, place]) => rectangles.push([one, one[6] === "right" ? "right" : "wrong", !isTruth && place === box,
    `${data.names[one[4]]} ${one[5].toFixed(2)}`]));
  rectangles.sort((a, b) => a[2] - b[2]);  // the box in question on top
  const size = Math.max(view[2], view[3]) / 50, few = rectangles.length <= 30;
  for (const [[x1, y1, x2, y2], style, isFocus, text] of rectangles) {
    const place = { x: x1, y: y1, width: Math.max(0, x2 - x1), height: Math.max(0, y2 - y1) };
    for (const name of ["edge", style]) {
      svg.append(element("rect", { ...place, class: `${name}${isFocus ? " focus" : few ? "" : " dim"}` }));
    }
    if (withText && text && (isFocus || (few && style !== "truth"))) {
      const y = style === "lost" ? Math.min(y2 + size, height - 2) : Math.max(y1 - size / 3, size);
      texts.push(element("text", { x: Math.max(x1, 0), y, class: "caption", "font-size": isFocus ? size * 1.2 : size }, text));
    }
  }
  svg.append(...texts);
}
function crop(one) {
  const [x1, y1, x2, y2] = boxOf(one), [height, width] = one.image.size, ratio = 4 / 3;
  const across = Math.max(2.2 * (x2 - x1), 2.2 * ratio * (y2 - y1), Math.min(96, width), 1), down = across / ratio;
  const start = (low, high, span, whole) =>
    span >= whole ? (whole - span) / 2 : Math.min(Math.max((low + high - span) / 2, 0), whole - span);
  return [start(x1, x2, across, width), start(y1, y2, down, height), across, down];
}
function drawCards() {
  const list = (state.list = cases()), more = list.length - state.limit;
  $("cards").replaceChildren(...list.slice(0, state.limit).map((one, place) => {
    const { what, verdict, where } = describe(one), svg = element("svg", { "aria-hidden": true });
    draw(svg, one, crop(one), false);
    const line = (name, text) => element("span", { class: name, dir: "auto", title: text }, text);
    const card = element("button", { type: "button", class: "card" }, svg, line("what", what), line("", verdict),
      line("where", where));
    card.addEventListener("click", () => { $("whole").showModal(); show(place); });
    return element("li", {}, card);
  }));
  $("more").hidden = more <= 0;
  $("more").textContent = `Show ${Math.min(24, more)} more of ${more}`;
  $("shown").textContent = `${list.length} ${list.length === 1 ? "case" : "cases"}`;
  $("to-gallery").textContent = `${$("shown").textContent} below`;
}
const HINTS = {
  label: "Either the detector or the annotation is wrong: confident detections where nothing is annotated, in turn with " +
    "annotated objects that no detection came near. What you correct here makes the next training better.",
  missing: "Objects without a right detection above the threshold.",
  missed: "Objects that no detection of any score found or nearly found: set the threshold to 0 to see all detections.",
  cell: "Cases of a cell of the confusion matrix, whatever the threshold.",
};

// The whole image.
function show(place) {
  const one = state.list[place];
  state.open = place;
  state.shown = one;
  const { what, verdict, long } = describe(one);
  $("whole-title").textContent = `${what}: ${verdict.toLowerCase()}`;
  $("whole-text").textContent = `${place + 1} of ${state.list.length}. ${one.image.path}. ${long}`;
  $("previous").disabled = place === 0;
  $("next").disabled = place === state.list.length - 1;
  drawWhole();
}
function drawWhole() {
  const { image } = state.shown, [height, width] = image.size;
  draw($("whole-image"), state.shown, [0, 0, width, height], true);
  const row = (one, score, verdict) => element("tr", {}, element("th", { scope: "row" }, element("bdi", {}, data.names[one[4]])),
    ...[score, verdict, one.slice(0, 4).join(", ")].map((text) => element("td", {}, text)));
  $("boxes").tBodies[0].replaceChildren(
    ...image.truth.map((one) => row(one, "–", `annotated in ${fileOf(one[6])}`)),
    ...image.found.filter((one) => one[9] > state.step).map((one) => row(one, one[5].toFixed(3), VERDICTS[one[6]])));
}

// What the user changes.
let speaking, drawing;
function moveTo(step) {
  state.step = Math.max(0, Math.min(data.steps.length - 1, step));
  const score = data.steps[state.step];
  for (const [slider, output] of [["slider", "score"], ["slider-2", "score-2"]]) {
    $(slider).value = state.step;
    $(slider).setAttribute("aria-valuetext", score);
    $(output).textContent = score;
  }
  $("flag").textContent = `--score_threshold ${score}`;
  document.querySelectorAll("tr[data-row]").forEach((row) => fill(row, +row.dataset.row));
  moveMarks();
  cancelAnimationFrame(drawing);
  drawing = requestAnimationFrame(() => { if ($("whole").open) drawWhole(); drawCards(); });
  clearTimeout(speaking);  // a screen reader hears where the slider stops
  speaking = setTimeout(() => {
    const [precision, recall, f1] = cells(state.label ?? ALL);
    $("status").textContent = `Scores above ${score}: precision ${precision}, recall ${recall}, F1 ${f1}`;
  }, 400);
}
function choose(label) {
  const name = label === null ? "" : data.names[label];
  state.label = label;
  state.limit = 24;
  document.querySelectorAll("button[data-label]").forEach((button) =>
    button.setAttribute("aria-pressed", +button.dataset.label === (label ?? ALL)));
  $("class").value = label ?? "";
  $("filter").hidden = $("now-class").hidden = label === null;
  $("filter").querySelector("bdi").textContent = $("now-class").querySelector("bdi").textContent = name;
  $("now-class").dataset.row = label ?? ALL;
  $("best-class").hidden = label === null || data.best[label] === null;
  if (!$("best-class").hidden) $("best-class").textContent = `Best F1 of it: ${data.steps[data.best[label]]}`;
  drawCurves();
  moveTo(state.step);
}
function chooseKind(kind, cell = null) {
  Object.assign(state, { kind, cell, limit: 24 });
  $("cell").hidden = !cell;
  if (cell) {
    const [from, to] = cell.map((label) => data.names[label] ?? "background");
    $("cell").textContent = to === "background" && cell[1] === K ? `${from} missed` : `${from} found as ${to}`;
  }
  $("kind").value = kind;
  $("hint").textContent = HINTS[kind] ?? "The highest scores come first.";
  drawCards();
}
function toGallery() {
  $("gallery").scrollIntoView();
  $("gallery-title").focus({ preventScroll: true });
}
function sortBy(header) {
  const down = header.getAttribute("aria-sort") === "ascending", column = header.cellIndex, body = $("class-table").tBodies[0];
  $("class-table").querySelectorAll("th[aria-sort]").forEach((other) => other.removeAttribute("aria-sort"));
  header.setAttribute("aria-sort", down ? "descending" : "ascending");
  const keys = new Map([...body.rows].map((row) => [row, row.cells[column].textContent.trim()]));
  const compare = (a, b) => {
    const [left, right] = [keys.get(a), keys.get(b)];
    if ((left === "–") !== (right === "–")) return left === "–" ? 1 : -1;  // what does not exist comes last
    return (down ? -1 : 1) * (column ? left - right || 0 : left.localeCompare(right));
  };
  body.append(...[...body.rows].sort(compare));
}
async function copyFlag() {
  const text = $("flag").textContent;
  try {
    await navigator.clipboard.writeText(text);
  } catch {  // not every browser lets a page from a file do so
    getSelection().selectAllChildren($("flag"));
    document.execCommand("copy");
  }
  $("status").textContent = `copied: ${text}`;
  $("copy").classList.add("done");
  setTimeout(() => $("copy").classList.remove("done"), 1500);
}

makeLegend();
for (const slider of ["slider", "slider-2"]) $(slider).addEventListener("input", (event) => moveTo(+event.target.value));
const best = data.best[ALL];
$("best-all").hidden = $("mark").hidden = best === null;
if (best !== null) {
  $("best-all").textContent = `Best F1: ${data.steps[best]}`;
  $("mark").style.left = `calc(8px + ${best / (data.steps.length - 1)} * (100% - 16px))`;
  $("best-all").addEventListener("click", () => moveTo(best));
}
$("best-class").addEventListener("click", () => moveTo(data.best[state.label]));
$("copy").addEventListener("click", copyFlag);
$("clear").addEventListener("click", () => { choose(null); $("slider").focus(); });
$("class").addEventListener("change", (event) => choose(event.target.value === "" ? null : +event.target.value));
$("kind").addEventListener("change", (event) => chooseKind(event.target.value));
$("more").addEventListener("click", () => {
  const first = state.limit;
  state.limit += 24;
  drawCards();
  $("cards").children[first]?.firstChild.focus();
});
$("class-table").tHead.addEventListener("click", ({ target }) => target.closest("button") && sortBy(target.closest("th")));
document.querySelectorAll("#class-table .name").forEach((button) => button.addEventListener("click", () =>
  choose(+button.dataset.label === state.label ? null : +button.dataset.label)));
document.querySelectorAll("[data-cell]").forEach((button) => button.addEventListener("click", () => {
  choose(null);
  chooseKind("cell", button.dataset.cell.split(" ").map(Number));
  toGallery();
}));
document.querySelectorAll("[data-kind]").forEach((button) => button.addEventListener("click", () => {
  choose(null);
  chooseKind(button.dataset.kind);
  moveTo(0);  // scores of all sizes count
  toGallery();
}));
$("previous").addEventListener("click", () => show(state.open - 1));
$("next").addEventListener("click", () => show(state.open + 1));
$("close").addEventListener("click", () => $("whole").close());
$("whole").addEventListener("close", () => $("cards").children[state.open]?.firstChild.focus());
$("whole").addEventListener("keydown", ({ key, target }) => {
  const place = state.open + ({ ArrowLeft: -1, ArrowRight: 1 }[key] ?? 0);
  if (target.type !== "range" && place !== state.open && state.list[place]) show(place);
});
sortBy($("class-table").querySelectorAll("th")[1]);
sortBy($("class-table").querySelectorAll("th")[1]);
choose(null);
chooseKind("label");
if (data.training.length) {
  const lines = (names) => names.map(([key, name], place) => ({ name, colour: COLOURS[place],
    points: data.training.filter((entry) => key in entry).map((entry) => [entry.epoch, entry[key]]) }))
    .filter(({ points }) => points.length);
  const losses = lines([["class_loss", "class loss"], ["box_loss", "box loss"]]);
  const high = lastOf(data.training.map(({ epoch }) => epoch), 1);
  const top = lastOf(losses.flatMap(({ points }) => points.map(([, value]) => value)), 0.1) * 1.05;
  chart($("loss"), { high, top, xName: "epochs", lines: losses });
  chart($("ap"), { high, xName: "epochs", lines: lines([["AP", "AP"], ["AP50", "AP50"]]) });
}
