"use strict";
// Everything that comes from data is set as text or as a checked attribute; nothing is ever parsed as HTML.
const data = JSON.parse(document.getElementById("data").textContent);
const colours = ["#d1343a", "#2456c8", "#1f8a4c", "#a34bc4", "#c46a00", "#007f8c", "#8a5a2b", "#c2187a"];
const step = 40;
const at = (id) => document.getElementById(id);
const make = (name, text, kind) => {
  const node = document.createElement(name);
  if (text !== undefined && text !== null) node.textContent = String(text);
  if (kind) node.className = kind;
  return node;
};
const add = (parent, ...children) => { children.forEach((child) => child && parent.append(child)); return parent; };
const option = (value, text) => { const node = make("option", text); node.value = value; return node; };
let shown = step;

function scoreOf(item, run, dimension) {
  const ratings = (item.results[run] || {}).ratings || {};
  const one = (name) => (ratings[name] && typeof ratings[name].score === "number" ? ratings[name].score : null);
  if (dimension !== "overall") return one(dimension);
  const all = data.dimensions.map(one);
  return all.includes(null) ? null : all.reduce((sum, score) => sum + score, 0) / all.length;
}

function fill() {
  const count = data.runs.length;
  at("title").textContent = data.runs.map((run) => run.name).join(" against ");
  document.title = at("title").textContent;
  for (const group of ["referring", "task"]) {
    const names = [...new Set(data.items.map((item) => item[group]))].sort();
    add(at(group), option("", "(any)"), ...names.map((name) => option(name, name)));
  }
  data.runs.forEach((run, place) => add(at("run"), option(place, run.name)));
  at("run-label").hidden = count < 2;
  add(at("dimension"), ...["overall", ...data.dimensions].map((name) => option(name, name)));
  for (const score of [1, 2, 3, 4, 5]) { add(at("low"), option(score, score)); add(at("high"), option(score, score)); }
  at("high").options[4].defaultSelected = true;
  at("high").value = 5;
  const orders = [["id", "number"], ["worst", "worst first"], ["best", "best first"]];
  if (count > 1) orders.push(["gain", "second run gains most"], ["loss", "second run loses most"]);
  add(at("order"), ...orders.map(([value, text]) => option(value, text)));
}

function chosen() {
  const words = at("words").value.trim().toLowerCase();
  const run = Number(at("run").value || 0);
  const dimension = at("dimension").value;
  const low = Number(at("low").value), high = Number(at("high").value);
  const any = low === 1 && high === 5;
  const kept = data.items.filter((item) => {
    if (words && !`${item.instruction} ${item.expression}`.toLowerCase().includes(words)) return false;
    if (at("referring").value && item.referring !== at("referring").value) return false;
    if (at("task").value && item.task !== at("task").value) return false;
    const score = scoreOf(item, run, dimension);
    return any || (score !== null && score >= low && score <= high);
  });
  const order = at("order").value;
  const gain = (item) => {
    const before = scoreOf(item, 0, dimension), after = scoreOf(item, 1, dimension);
    return before === null || after === null ? 0 : after - before;
  };
  const value = (item) => scoreOf(item, run, dimension) ?? 0;
  const keys = { id: (i) => i.id, worst: value, best: (i) => -value(i), gain: (i) => -gain(i), loss: gain };
  return kept.sort((a, b) => keys[order](a) - keys[order](b) || a.id - b.id);
}

function picture(url, text, size, plan) {
  const frame = make("div", undefined, size[0] <= 192 ? "frame small" : "frame");
  const image = make("img");
  image.alt = text;
  image.loading = "lazy";
  image.width = size[0];
  image.height = size[1];
  if (/^data:image\/(png|webp);base64,[A-Za-z0-9+/=]*$/.test(url)) image.src = url;
  add(frame, image);
  (plan ? plan.regions : []).forEach((region, number) => {
    const [width, height] = plan.size;
    const [left, top, right, bottom] = region.box.map(Number);
    const box = make("div", undefined, "box");
    const colour = colours[number % colours.length];
    box.style.left = `${(100 * left) / width}%`;
    box.style.top = `${(100 * top) / height}%`;
    box.style.width = `${(100 * (right - left)) / width}%`;
    box.style.height = `${(100 * (bottom - top)) / height}%`;
    box.style.borderColor = colour;
    const label = make("span", number + 1);
    label.style.background = colour;
    add(frame, add(box, label));
  });
  return frame;
}

function plan(found) {
  const list = make("dl");
  if (found.reasoning) add(list, make("dt", "Reasoning"), make("dd", found.reasoning));
  add(list, make("dt", "For the whole picture"), make("dd", found.prompt || "(nothing)"), make("dt", "Regions"));
  const regions = make("ol");
  (found.regions || []).forEach((region, number) => {
    const chip = make("span", undefined, "chip");
    chip.style.background = colours[number % colours.length];
    add(regions, add(make("li"), chip, document.createTextNode(`${region.hint} (${region.box.join(", ")})`)));
  });
  add(list, add(make("dd"), regions.children.length ? regions : document.createTextNode("(none)")));
  return add(make("details"), make("summary", "Plan and reasoning"), list);
}

function verdict(result) {
  const badges = make("ul", undefined, "scores"), reasons = make("dl");
  for (const name of data.dimensions) {
    const rating = result.ratings[name];
    if (!rating) continue;
    const known = typeof rating.score === "number";
    const kind = !known ? "none" : rating.score >= 4 ? "good" : rating.score >= 3 ? "fair" : "poor";
    add(badges, make("li", `${name} ${known ? rating.score : "unscored"}`, kind));
    const why = rating.unscored || rating.reason;
    if (why) add(reasons, make("dt", name), make("dd", why));
  }
  const told = [badges];
  if (reasons.children.length) told.push(add(make("details"), make("summary", "The judge's reasons"), reasons));
  const pixels = Object.entries(result.pixels || {});
  if (pixels.length) {
    const list = make("dl");
    for (const [name, value] of pixels) add(list, make("dt", name.replaceAll("_", " ")), make("dd", value.toFixed(3)));
    told.push(add(make("details"), make("summary", "Pixels"), list));
  }
  return told;
}

function card(item) {
  const row = make("div", undefined, "row");
  const planned = item.results.find((result) => result.plan);
  const source = add(make("figure"), make("figcaption", "source"));
  if (item.source) add(source, picture(item.source, "source", item.size, planned && planned.plan));
  else add(source, make("p", item.error, "note"));
  add(row, source);
  item.results.forEach((result, place) => {
    const name = data.runs[place].name;
    const figure = add(make("figure"), make("figcaption", name));
    if (result.missing) add(figure, make("p", result.missing, "note"));
    else add(figure, picture(result.picture, `result of ${name}`, item.size, result.plan), ...verdict(result));
    if (result.plan) add(figure, plan(result.plan));
    (result.notes || []).forEach((note) => add(figure, make("p", note, "about")));
    add(row, figure);
  });
  const about = `#${item.id} · ${item.referring} · ${item.task}${item.expression ? ` · meant: ${item.expression}` : ""}`;
  const article = make("article");
  article.dataset.id = item.id;
  return add(article, make("h2", item.instruction), make("p", about, "about"), row);
}

function draw() {
  const items = chosen();
  at("list").replaceChildren(...items.slice(0, shown).map(card));
  at("count").textContent = `${items.length} of ${data.items.length} items`;
  at("more").hidden = items.length <= shown;
}

fill();
at("filters").addEventListener("input", () => { shown = step; draw(); });
at("filters").addEventListener("submit", (event) => event.preventDefault());
at("filters").addEventListener("reset", () => setTimeout(() => { shown = step; draw(); at("boxes").dispatchEvent(new Event("change")); }));
at("boxes").addEventListener("change", () => document.body.classList.toggle("plain", !at("boxes").checked));
at("more").addEventListener("click", () => { shown += step; draw(); });
draw();
