"use strict";
const $ = (id) => document.getElementById(id), all = (selector) => document.querySelectorAll(selector);
const on = (id, event, action) => $(id).addEventListener(event, action);
const data = JSON.parse($("data").textContent), PAGE = 24;
const ALL = data.names.length, BACKGROUND = ALL; // the row of all classes, and the label of no object
const state = { step: data.start, label: null, kind: "label", cell: null, limit: PAGE, list: [], open: 0 };
const running = (changes) => { let total = 0; return changes.map((change) => (total += change)); };
const counts = data.counts.map(running), rights = data.right.map(running);
const WIDTH = 440, HEIGHT = 300, LEFT = 42, TOP = 10, BOTTOM = HEIGHT - 40;
const fileOf = (path) => path.split(/[\\/]/).at(-1);
const shortened = (name) => (name.length > 24 ? `${name.slice(0, 23)}…` : name);
function element(tag, attributes = {}, ...children) {
  const isHtml = ["li", "button", "span", "tr", "th", "td", "bdi"].includes(tag);
  const node = document.createElementNS(`http://www.w3.org/${isHtml ? "1999/xhtml" : "2000/svg"}`, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}
// The numbers of a class (or of all classes, in the last row) above a threshold, as in evaluation/thresholds.py.
function rates(row, step) {
  const found = counts[row][step], right = rights[row][step], boxes = data.boxes[row];
  const precision = found ? right / found : null, recall = right / Math.max(1, boxes);
  const f1 = (2 * right) / Math.max(found + boxes, 1);
  return { precision, recall, f1, right, wrong: found - right, missed: boxes - right };
}
function cells(row) {
  const { right, wrong, missed, ...shares } = rates(row, state.step);
  return [...Object.values(shares).map((share) => share?.toFixed(3) ?? "–"), right, wrong, missed];
}
function ticks(high) {
  const unit = 10 ** Math.floor(Math.log10(high / 5));
  const gap = [1, 2, 5, 10].find((size) => size * unit >= high / 5.001) * unit;
  return Array.from({ length: Math.floor(high / gap + 1e-6) + 1 }, (_, place) => +(place * gap).toPrecision(6));
}
function chart(svg, { low = 0, high, top = 1, xName, lines }) {
  const RIGHT = WIDTH - (lines[0].name ? 80 : 10); // room for names
  const x = (value) => LEFT + ((value - low) / (high - low)) * (RIGHT - LEFT);
  const y = (value) => BOTTOM - (value / top) * (BOTTOM - TOP);
  const write = (x, y, anchor, text) => svg.append(element("text", { x, y, "text-anchor": anchor }, text));
  svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
  svg.replaceChildren();
  for (const value of ticks(top)) {
    svg.append(element("line", { stroke: "var(--line)", x1: LEFT, x2: RIGHT, y1: y(value), y2: y(value) }));
    write(LEFT - 6, y(value) + 4, "end", value);
  }
  for (const value of low < 0 ? [low, high] : ticks(high)) write(x(value), BOTTOM + 17, "middle", value);
  write((LEFT + RIGHT) / 2, HEIGHT - 5, "middle", xName);
  for (const { points, colour, row = "", name } of lines) {
    const path = points.map(([a, b]) => `${x(a).toFixed(1)},${y(b).toFixed(1)}`).join(" ");
    svg.append(element("polyline", { points: path, stroke: colour, "data-row": row }));
    if (!name) continue;
    const [a, b] = points.at(-1);
    svg.append(element("circle", { cx: x(a), cy: y(b), r: 3, fill: colour }));
    write(x(a) + 8, y(b) + 4, "start", name);
  }
  return { x, y };
}
const scales = {};
function colourOf(row) {
  const place = data.curves.indexOf(row);
  return `var(--${row === ALL ? "line-all" : place < 0 ? "accent" : `line-${place}`})`;
}
function drawCurves() {
  const rows = [...new Set([...data.curves, ALL, state.label ?? ALL])], steps = [...data.steps.keys()];
  const lines = (points) =>
    rows.map((row) => ({ row, colour: colourOf(row), points: points(steps.map((step) => rates(row, step))) }));
  const pr = (all) => all.filter((one) => one.precision !== null).map((one) => [one.recall, one.precision]);
  const f1 = (all) => all.map((one, step) => [data.steps[step], one.f1]);
  scales.pr = chart($("pr"), { high: 1, xName: "recall", lines: lines(pr) });
  scales.f1 = chart($("f1"), { low: data.steps[0], high: data.steps.at(-1), xName: "score", lines: lines(f1) });
  $("pr").append(element("g", { id: "dots", stroke: "var(--ground)", "stroke-width": 2 }));
  $("f1").append(element("line", { id: "cut", stroke: "var(--accent)", y1: TOP, y2: BOTTOM }));
  for (const line of all("#pr polyline, #f1 polyline")) {
    const isChosen = +line.dataset.row === (state.label ?? ALL);
    line.setAttribute("class", isChosen ? "strong" : state.label === null ? "" : "faint");
  }
}
function moveMarks() {
  for (const end of ["x1", "x2"]) $("cut").setAttribute(end, scales.f1.x(data.steps[state.step]));
  const rows = [...new Set([ALL, state.label ?? ALL])].filter((row) => counts[row][state.step]);
  $("dots").replaceChildren(...rows.map((row) => {
    const { recall, precision } = rates(row, state.step);
    return element("circle", { cx: scales.pr.x(recall), cy: scales.pr.y(precision), r: 6, fill: colourOf(row) });
  }));
}
// The gallery: its cases are computed from the boxes of its images.
function cases() {
  const { step, kind, cell, label } = state, found = [], truth = [];
  const asked = { false: ["background", "both"], label: ["background"] }[kind] ?? [kind];
  for (const image of data.images) {
    const hit = new Set(), near = new Set(), taken = new Set();
    image.found.forEach((one, box) => {
      const { target, took } = one, isAbove = one.level > step;
      if (one.kind === "right" && isAbove) hit.add(target);
      near.add(target), taken.add(took);
      const under = took < 0 ? BACKGROUND : image.truth[took].label;
      const wanted = cell ? took !== -2 && under === cell[0] && one.label === cell[1]
        : isAbove && asked.includes(one.kind);
      const labels = [one.label, cell ? under : one.kind === "class" ? image.truth[target].label : one.label];
      if (wanted && (label === null || labels.includes(label))) found.push({ image, box, weight: one.score });
    });
    image.truth.forEach((one, box) => {
      const wanted = cell ? cell[1] === BACKGROUND && one.label === cell[0] && !taken.has(box)
        : { missing: !hit.has(box), missed: !near.has(box), label: one.iou <= data.near }[kind];
      if (!wanted || (label !== null && one.label !== label)) return;
      const [x1, y1, x2, y2] = one.corners;
      truth.push({ image, box, isTruth: true, weight: (x2 - x1) * (y2 - y1) });
    });
  }
  for (const list of [found, truth]) list.sort((a, b) => b.weight - a.weight);
  return found.flatMap((one, place) => [one, truth[place] ?? []].flat()).concat(truth.slice(found.length)); // in turn
}
function describe({ image, box, isTruth }) {
  if (isTruth) {
    const { label, iou, place } = image.truth[box], verdict = iou <= data.near ? "no detection near" : "missed";
    const long = `Annotated in ${place}. The nearest detection overlaps it by an IoU of ${iou.toFixed(2)}.`;
    return { what: data.names[label], verdict: `Annotated, ${verdict}`, where: fileOf(place), long };
  }
  const { label, score, kind, target, took } = image.found[box];
  const other = image.truth[kind === "class" ? target : state.cell ? took : -1];
  const verdict = data.kinds[kind] + (other ? `: annotated as ${data.names[other.label]}` : "");
  const long = other ? `Annotated in ${other.place}.` : "";
  return { what: `${data.names[label]} ${score.toFixed(2)}`, verdict, where: fileOf(image.path), long };
}
function draw(svg, { image, box, isTruth }, view, withText) {
  const size = Math.max(view[2], view[3]) / (innerWidth < 700 ? 30 : 50), hit = new Set(), boxes = [], texts = [];
  const [height, width] = image.size;
  const write = (x, y, size, text, anchor = "start") =>
    texts.push(element("text", { x, y, class: "caption", "font-size": size, "text-anchor": anchor }, text));
  svg.setAttribute("viewBox", view.join(" "));
  svg.replaceChildren();
  if (image.file) svg.append(element("image", { href: `report/${image.file}`, width, height, preserveAspectRatio: "none" }));
  else write(view[0] + size, view[1] + 3 * size, 2 * size, "The image cannot be read.");
  image.ignored.forEach((one) => boxes.push([one, "ignored", false, ""]));
  image.found.forEach((one, place) => {
    const isFocus = !isTruth && place === box, isRight = one.kind === "right";
    if (!isFocus && one.level <= state.step) return;
    if (isRight) hit.add(one.target);
    const name = `${shortened(data.names[one.label])} ${one.score.toFixed(2)}`;
    boxes.push([one.corners, isRight ? "found-right" : "found-false", isFocus, name]);
  });
  image.truth.forEach((one, place) => {
    const isFocus = isTruth && place === box, name = shortened(data.names[one.label]);
    boxes.unshift([one.corners, ...(hit.has(place) ? ["truth", isFocus, ""] : ["lost", isFocus, name])]);
  });
  boxes.sort((a, b) => a[2] - b[2]); // the box in question on top
  for (const [[x1, y1, x2, y2], style, isFocus, text] of boxes) {
    const place = { x: x1, y: y1, width: Math.max(0, x2 - x1), height: Math.max(0, y2 - y1) };
    svg.append(...["edge", style].map((name) => element("rect", { ...place, class: name + (isFocus ? " focus" : "") })));
    if (!withText || !(isFocus || boxes.length <= 60)) continue;
    if (style === "lost") write(x2, Math.min(y2 + size, height - size / 4), size, text, "end");
    else write(Math.max(x1, 0), Math.max(y1 - size / 3, size), size, text);
  }
  svg.append(...texts);
}
function crop({ image, box, isTruth }) {
  const [x1, y1, x2, y2] = (isTruth ? image.truth : image.found)[box].corners, [height, width] = image.size;
  const across = Math.max(2.2 * (x2 - x1), 2.9 * (y2 - y1), Math.min(96, width)), down = across * 0.75;
  const start = (low, high, span, all) => Math.max(Math.min((low + high - span) / 2, all - span), Math.min(0, (all - span) / 2));
  return [start(x1, x2, across, width), start(y1, y2, down, height), across, down];
}
function drawCards() {
  cancelAnimationFrame(drawing); // a second drawing would take the focus from the cards
  const list = (state.list = cases()), more = list.length - state.limit;
  $("cards").replaceChildren(...list.slice(0, state.limit).map((one, place) => {
    const svg = element("svg", { "aria-hidden": true }), { what, verdict, where } = describe(one);
    const lines = Object.entries({ what, verdict, where }).map(([name, text]) =>
      element("span", { class: name, dir: "auto", title: text }, text));
    draw(svg, one, crop(one), false);
    return element("li", {}, element("button", { type: "button", class: "card", "data-case": place }, svg, ...lines));
  }));
  Object.assign($("more"), { hidden: more <= 0, textContent: `Show ${Math.min(PAGE, more)} of ${more} more` });
  for (const text of all(".count")) text.textContent = `${list.length} ${list.length === 1 ? "case" : "cases"}`;
  clearTimeout(announcing); // screen readers announce where the slider stops, not every step
  announcing = setTimeout(() => {
    const [precision, recall, f1] = cells(state.label ?? ALL), above = `Scores above ${data.steps[state.step]}`;
    $("status").textContent = `${above}: precision ${precision}, recall ${recall}, F1 ${f1}; ${$("shown").textContent}`;
  }, 600);
}
function showWhole(place) {
  if (!state.list[place]) return; // there is no such case, or another key was pressed
  const one = (state.shown = state.list[place]), { what, verdict, long } = describe(one);
  state.open = place;
  $("whole-title").textContent = `${what}: ${verdict.toLowerCase()}`;
  $("whole-text").textContent = `${place + 1} of ${state.list.length}. ${one.image.path}. ${long}`;
  drawWhole();
}
function drawWhole() {
  const { image } = state.shown, [height, width] = image.size;
  const name = (one) => element("th", { scope: "row" }, element("bdi", {}, data.names[one.label]));
  const row = (one, ...texts) =>
    element("tr", {}, name(one), ...[...texts, one.corners.join(", ")].map((text) => element("td", {}, text)));
  draw($("whole-image"), state.shown, [0, 0, width, height], true);
  const shown = image.found.filter((one) => one.level > state.step);
  $("boxes").tBodies[0].replaceChildren(
    ...image.truth.map((one) => row(one, "–", `annotated in ${fileOf(one.place)}`)),
    ...shown.map((one) => row(one, one.score.toFixed(3), data.kinds[one.kind])));
}
// Changes that the user makes.
let drawing, announcing;
function moveTo(step) {
  const score = data.steps[(state.step = step)];
  for (const slider of all("input[type=range]")) Object.assign(slider, { value: step, ariaValueText: score });
  for (const text of all("#score, #score-2")) text.textContent = score;
  $("flag").textContent = `--score_threshold ${score}`;
  for (const row of all("tr[data-row]")) {
    const texts = cells(+row.dataset.row);
    row.querySelectorAll(".now").forEach((cell, place) => (cell.textContent = texts[place]));
  }
  moveMarks();
  cancelAnimationFrame(drawing);
  drawing = requestAnimationFrame(() => ($("whole").open ? drawWhole() : drawCards()));
}
function choose(label) {
  const best = data.best[label] ?? null;
  Object.assign(state, { label, limit: PAGE });
  for (const button of all("[data-label]")) button.ariaPressed = +button.dataset.label === (label ?? ALL);
  $("class").value = label ?? "";
  $("now-class").querySelector("bdi").textContent = data.names[label] ?? "";
  $("now-class").dataset.row = label ?? ALL;
  $("now-class").hidden = label === null;
  Object.assign($("best-class"), { hidden: best === null, textContent: `of the class: ${data.steps[best]}` });
  drawCurves();
  moveTo(state.step);
}
function chooseKind(kind, cell = null) {
  Object.assign(state, { kind, cell, limit: PAGE });
  $("cell").hidden = !cell;
  const [from, to] = cell?.map((label) => data.names[label]) ?? [];
  $("cell").textContent = cell?.[1] === BACKGROUND ? `${from} missed` : `${to}, annotated: ${from ?? "nothing"}`;
  $("kind").value = kind;
  $("hint").textContent = $("kind").selectedOptions[0].dataset.hint ?? "The highest scores come first.";
  drawCards();
}
function sortBy(header, isDown) {
  const body = $("class-table").tBodies[0], column = header.cellIndex;
  const key = (row) => row.cells[column].textContent.trim();
  const compare = (a, b) => (column ? a - b : a.localeCompare(b)) * (isDown ? -1 : 1);
  const lacks = (row) => column && key(row) === "–"; // missing values come last
  for (const other of all("#class-table [aria-sort]")) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", isDown ? "descending" : "ascending");
  body.append(...[...body.rows].sort((a, b) => lacks(a) - lacks(b) || (lacks(a) ? 0 : compare(key(a), key(b)))));
}
document.addEventListener("click", ({ target }) => {
  const button = target.closest("button"), { label, by, cell, kind, case: place } = button?.dataset ?? {};
  if (label) choose(+label === ALL || +label === state.label ? null : +label);
  if (by) showWhole(state.open + +by);
  if (place) $("whole").showModal(), showWhole(+place);
  if (button?.matches("#class-table thead *")) sortBy(button.parentNode, button.parentNode.ariaSort === "ascending");
  if (!cell && !kind) return;
  chooseKind(kind ?? "cell", cell?.split(" ").map(Number));
  choose(null);
  if (kind in data.kinds) moveTo(0); // all scores count there
  $("gallery").scrollIntoView();
  $("gallery-title").focus({ preventScroll: true });
});
for (const slider of all("input[type=range]")) slider.addEventListener("input", () => moveTo(+slider.value));
on("best-all", "click", () => moveTo(data.best[ALL]));
on("best-class", "click", () => moveTo(data.best[state.label]));
on("copy", "click", () => {
  getSelection().selectAllChildren($("flag"));
  $("status").textContent = $("copied").textContent = document.execCommand("copy") ? "copied" : "select and copy it";
});
on("clear", "click", () => (choose(null), $("slider").focus()));
on("class", "change", ({ target }) => choose(target.value === "" ? null : +target.value));
on("kind", "change", ({ target }) => chooseKind(target.value, target.value === "cell" ? state.cell : null));
on("more", "click", () => {
  state.limit += PAGE;
  drawCards();
  $("cards").children[state.limit - PAGE].firstChild.focus();
});
on("whole", "close", () => (drawCards(), $("cards").children[state.open]?.firstChild.focus()));
on("whole", "keydown", ({ key, target }) =>
  target.type === "range" || showWhole(state.open + { ArrowLeft: -1, ArrowRight: 1 }[key]));
choose(null);
chooseKind("label");
for (const [id, curves] of Object.entries(data.training)) {
  const lines = curves.map(([name, points], place) => ({ name, points, colour: `var(--line-${place})` }));
  const most = (axis) => Math.max(0.1, ...lines.flatMap(({ points }) => points.map((point) => point[axis])));
  chart($(id), { xName: "epochs", high: most(0), top: id === "ap" ? 1 : 1.05 * most(1), lines });
}
