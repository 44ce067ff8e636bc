// Draws regions over a picture. Coordinates are pixels of the picture; `scale()` is picture pixels per screen pixel.
const $ = (query) => element.querySelector(query);
const svgNs = 'http://www.w3.org/2000/svg';
const KEEP = 'keep this unchanged';
const COLOURS = ['#e63946', '#1d7ad6', '#22a054', '#f08c00', '#9333c8', '#00a0aa', '#d63384', '#8c6428'];
const MOST = 19, MAX_HINT = 500, MOST_BYTES = 25_000_000;
const HANDLES = { nw: [0, 0], n: [.5, 0], ne: [1, 0], e: [1, .5], se: [1, 1], s: [.5, 1], sw: [0, 1], w: [0, .5] };
const root = $('.bx'), svg = $('.bx-svg'), rows = $('.bx-rows');
const layer = { overlaps: $('.bx-overlaps'), boxes: $('.bx-boxes'), handles: $('.bx-handles') };
let width = 0, height = 0, regions = [], selected = null, stamp = null;
const newId = () => 1 + Math.floor(Math.random() * 2 ** 30);
let undone = [], done = [], view = null, drag = null;
const fingers = new Map();

const clamp = (value, low, high) => Math.min(high, Math.max(low, value));
const find = (id) => regions.find((region) => region.id === id);
const snapshot = () => JSON.stringify(regions);
const say = (text) => { $('.bx-said').textContent = text; };
const scale = () => { const m = svg.getScreenCTM(); return m && m.a ? 1 / m.a : 1; };

function make(name, attributes, parent) {
  const node = document.createElementNS(svgNs, name);
  for (const key in attributes) node.setAttribute(key, attributes[key]);
  if (parent) parent.appendChild(node);
  return node;
}

// --- value in and out ---
function load() {
  const value = props.value || {};
  if (value.stamp === stamp) return;
  stamp = value.stamp;
  if (typeof value.picture === 'string') {
    const src = value.picture.startsWith('data:image/') ? value.picture : '';
    [width, height] = [value.width || 0, value.height || 0];
    const image = $('.bx-image');
    image.setAttribute('href', src);
    image.setAttribute('width', width);
    image.setAttribute('height', height);
    image.setAttribute('preserveAspectRatio', 'none');
    root.dataset.empty = String(!width);
    undone = []; done = []; regions = []; fit();
  } else if (width) done.push(snapshot()), undone = [];
  regions = (value.regions || []).map((region) => ({
    id: region.id || newId(), box: region.box.slice(), hint: region.hint || '', point: region.point || null,
    keep: region.hint === KEEP, said: '', colour: null,
  }));
  regions.forEach((region, at) => { region.colour = COLOURS[at % COLOURS.length]; });
  selected = null;
  store(); draw();
}
function store() { props.value = { stamp, regions: regions.map(({ said, ...region }) => region) }; }
function commit(before) {
  if (before !== undefined && before !== snapshot()) { done.push(before); undone = []; if (done.length > 200) done.shift(); }
  store(); draw(); trigger('edited');
}
function change(act) { const before = snapshot(); act(); commit(before); }
function travel(from, to) {
  if (!from.length) return;
  to.push(snapshot()); regions = JSON.parse(from.pop());
  if (!find(selected)) selected = null;
  store(); draw(); trigger('edited');
}

// --- what can be done ---
function newRegion(box, like) {
  const used = regions.map((region) => region.colour);
  const colour = COLOURS.find((one) => !used.includes(one)) || COLOURS[regions.length % COLOURS.length];
  return { id: newId(), box, hint: like ? like.hint : '', point: null, keep: like ? like.keep : false, said: like ? like.said : '', colour };
}
function room() { if (regions.length < MOST) return true; say(`At most ${MOST} regions`); return false; }
function insert(box, like, focus) {
  if (!width || !room()) return;
  change(() => { const region = newRegion(box, like); regions.push(region); selected = region.id; });
  say(`Region ${regions.length} added`);
  if (focus) row(selected).querySelector('.bx-text').focus({ preventScroll: true });
}
const actions = {
  undo: () => travel(done, undone),
  redo: () => travel(undone, done),
  add: () => { const v = view; insert([v.x + v.w * .35, v.y + v.h * .35, v.x + v.w * .65, v.y + v.h * .65].map(Math.round), null, true); },
  duplicate: (id) => {
    const region = find(id); if (!region) return;
    const [l, t, r, b] = region.box, step = Math.round(Math.max(width, height) / 40) || 1;
    const dx = r + step <= width ? step : -Math.min(step, l), dy = b + step <= height ? step : -Math.min(step, t);
    insert([l + dx, t + dy, r + dx, b + dy], region);
  },
  delete: (id) => {
    if (!find(id)) return;
    const at = regions.findIndex((region) => region.id === id);
    change(() => { regions.splice(at, 1); selected = regions.length ? regions[Math.min(at, regions.length - 1)].id : null; });
    say(`Region ${at + 1} deleted`);
  },
  up: (id) => order(id, -1),
  down: (id) => order(id, 1),
  in: () => zoom(1.4), out: () => zoom(1 / 1.4), fit: () => { fit(); draw(); },
  choose: () => { const input = uploader(); input?.setAttribute('accept', 'image/*'); input?.click(); },
};
function order(id, step) {
  const at = regions.findIndex((region) => region.id === id), to = at + step;
  if (at < 0 || to < 0 || to >= regions.length) return;
  change(() => { const [one] = regions.splice(at, 1); regions.splice(to, 0, one); });
  say(`Region is now number ${to + 1}`);
}
function uploader() { return document.querySelector('#left input[type=file]'); }

// --- view ---
function fit() { view = { x: 0, y: 0, w: width || 1, h: height || 1 }; }
function zoom(factor, at) {
  if (!width) return;
  const [x, y] = at || [view.x + view.w / 2, view.y + view.h / 2];
  const w = clamp(view.w / factor, width / 16, width), h = w * height / width;
  view = { w, h, x: clamp(x - (x - view.x) * w / view.w, 0, width - w), y: clamp(y - (y - view.y) * h / view.h, 0, height - h) };
  draw();
}
function pan(dx, dy) { view.x = clamp(view.x + dx, 0, width - view.w); view.y = clamp(view.y + dy, 0, height - view.h); draw(); }

// --- drawing ---
function draw() {
  if (!view) fit();
  svg.setAttribute('viewBox', `${view.x} ${view.y} ${view.w} ${view.h}`);
  const unit = scale();
  $('.bx-zoom').textContent = view.w < width ? `${Math.round(100 * width / view.w)} %` : 'Fit';
  for (const [name, off] of [['undo', !done.length], ['redo', !undone.length], ['duplicate', !find(selected)], ['delete', !find(selected)], ['add', !width], ['in', !width], ['out', !width], ['fit', !width]])
    root.querySelector(`.bx-bar [data-do=${name}]`).disabled = off;
  drawBoxes(unit); drawOverlaps(unit); drawHandles(unit); drawRows();
}
function shape(node, box) {
  const [l, t, r, b] = box;
  node.setAttribute('x', Math.min(l, r)); node.setAttribute('y', Math.min(t, b));
  node.setAttribute('width', Math.abs(r - l)); node.setAttribute('height', Math.abs(b - t));
}
function drawBoxes(unit) {
  const seen = new Set();
  regions.forEach((region, at) => {
    seen.add(String(region.id));
    let group = layer.boxes.querySelector(`[data-id="${region.id}"]`);
    if (!group) {
      group = make('g', { class: 'bx-box', 'data-id': region.id, tabindex: 0, role: 'button' }, layer.boxes);
      make('rect', { class: 'bx-body' }, group);
      make('rect', { class: 'bx-tag' }, group);
      make('text', { class: 'bx-name' }, group);
      group.addEventListener('focus', () => { if (selected !== region.id) { selected = region.id; draw(); } });
    }
    const [l, t, r, b] = region.box, name = `${at + 1}`;
    group.style.setProperty('--tone', region.colour);
    group.classList.toggle('on', region.id === selected);
    group.classList.toggle('keep', region.keep);
    group.setAttribute('aria-pressed', String(region.id === selected));
    group.setAttribute('aria-label', `Region ${at + 1}: ${region.hint || 'no hint yet'}; left ${l}, top ${t}, ${r - l} by ${b - t} pixels`);
    shape(group.children[0], region.box);
    const text = group.children[2], size = 12 * unit;
    text.textContent = name; text.setAttribute('font-size', size);
    const wide = (8 + 7.5 * name.length) * unit, high = 18 * unit;
    const x = Math.min(l, r), y = clamp(Math.min(t, b) - high, view.y, height);
    shape(group.children[1], [x - unit, y, x - unit + wide, y + high]);
    text.setAttribute('x', x - unit + wide / 2); text.setAttribute('y', y + high * .72);
    text.setAttribute('text-anchor', 'middle');
  });
  for (const group of [...layer.boxes.children]) if (!seen.has(group.dataset.id)) group.remove();
}
function drawOverlaps(unit) {
  const hatch = $('#bx-hatch'), parts = [];
  hatch.setAttribute('patternTransform', `rotate(45) scale(${unit})`);
  regions.forEach((one, at) => regions.slice(at + 1).forEach((two) => {
    const l = Math.max(one.box[0], two.box[0]), t = Math.max(one.box[1], two.box[1]), r = Math.min(one.box[2], two.box[2]), b = Math.min(one.box[3], two.box[3]);
    if (r > l && b > t) parts.push(`M${l} ${t}H${r}V${b}H${l}Z`);
  }));
  layer.overlaps.replaceChildren();  // one path, so that many boxes on one spot are hatched once
  if (parts.length) make('path', { class: 'bx-overlap', fill: 'url(#bx-hatch)', d: parts.join('') }, layer.overlaps);
}
function drawHandles(unit) {
  const region = find(selected);
  layer.handles.replaceChildren();
  if (!region || drag?.mode === 'new') return;
  const [l, t, r, b] = region.box, coarse = matchMedia('(pointer: coarse)').matches;
  const reach = (coarse ? 16 : 7) * unit, x = Math.min(reach, (r - l) / 4), y = Math.min(reach, (b - t) / 4);
  const sides = { n: [l, t - reach, r, t + y], s: [l, b - y, r, b + reach], w: [l - reach, t, l + x, b], e: [r - x, t, r + reach, b] };
  for (const side in sides) shape(make('rect', { class: 'bx-grip', 'data-handle': side, style: `cursor:${side}-resize` }, layer.handles), sides[side]);
  for (const name in HANDLES) {
    const cx = l + (r - l) * HANDLES[name][0], cy = t + (b - t) * HANDLES[name][1];
    if (name.length === 1 && (name === 'n' || name === 's' ? r - l : b - t) < 40 * unit) continue;
    make('rect', { class: 'bx-dot', x: cx - 4 * unit, y: cy - 4 * unit, width: 8 * unit, height: 8 * unit, rx: 2 * unit, style: `--tone:${region.colour}` }, layer.handles);
    if (name.length === 2) make('circle', { class: 'bx-grip', 'data-handle': name, cx, cy, r: (coarse ? 18 : 9) * unit, style: `cursor:${name}-resize` }, layer.handles);
  }
}

// --- the list of regions ---
const ICONS = { up: 'm5 12 5-5 5 5', down: 'm5 8 5 5 5-5', duplicate: 'M7 7h9v9H7zM4 13V4h9', delete: 'M5 5l10 10M15 5 5 15' };
function row(id) { return rows.querySelector(`[data-id="${id}"]`); }
function button(act, label) {
  const node = document.createElement('button');
  node.type = 'button'; node.dataset.do = act; node.title = label;
  const icon = make('svg', { viewBox: '0 0 20 20', 'aria-hidden': 'true' }, node);
  make('path', { d: ICONS[act] }, icon);
  return node;
}
function newRow(region) {
  const item = document.createElement('li');
  item.dataset.id = region.id;
  const number = document.createElement('button');
  number.type = 'button'; number.className = 'bx-number'; number.dataset.do = 'select';
  const text = document.createElement('input');
  text.type = 'text'; text.className = 'bx-text'; text.maxLength = MAX_HINT; text.placeholder = 'What should happen in here?';
  const keep = document.createElement('label');
  keep.className = 'bx-keep'; keep.title = 'Keep this region unchanged';
  const box = document.createElement('input'); box.type = 'checkbox';
  keep.append(box, document.createTextNode('keep'));
  const colour = document.createElement('input');
  colour.type = 'color'; colour.className = 'bx-colour'; colour.title = 'Colour of this box';
  item.append(number, text, keep, colour, button('up', 'Move up'), button('down', 'Move down'), button('duplicate', 'Duplicate'), button('delete', 'Delete'));
  return item;
}
function drawRows() {
  const seen = new Set(regions.map((region) => String(region.id)));
  for (const item of [...rows.children]) if (!seen.has(item.dataset.id)) item.remove();
  regions.forEach((region, at) => {
    let item = row(region.id) || newRow(region);
    if (rows.children[at] !== item) rows.insertBefore(item, rows.children[at] || null);
    const [number, text, keep, colour] = item.children, name = `region ${at + 1}`;
    item.classList.toggle('on', region.id === selected);
    item.style.setProperty('--tone', region.colour);
    number.textContent = at + 1; number.setAttribute('aria-label', `Select ${name}`);
    text.setAttribute('aria-label', `Hint of ${name}`);
    if (text.value !== region.hint) text.value = region.hint;
    text.readOnly = region.keep; text.classList.toggle('missing', !region.hint.trim());
    keep.firstChild.checked = region.keep; keep.firstChild.setAttribute('aria-label', `Keep ${name} unchanged`);
    colour.value = region.colour; colour.setAttribute('aria-label', `Colour of ${name}`);
    for (const node of item.querySelectorAll('[data-do]:not(.bx-number)')) node.setAttribute('aria-label', `${node.title} ${name}`);
    item.querySelector('[data-do=up]').disabled = at === 0;
    item.querySelector('[data-do=down]').disabled = at === regions.length - 1;
  });
  root.dataset.count = regions.length;
}
let typed = null;
rows.addEventListener('focusin', (event) => {
  const id = +event.target.closest('li').dataset.id;
  if (event.target.matches('.bx-text')) typed = snapshot();
  if (selected !== id) { selected = id; draw(); }
});
rows.addEventListener('input', (event) => {
  const region = find(+event.target.closest('li').dataset.id);
  if (event.target.matches('.bx-text')) { region.hint = event.target.value; event.target.classList.toggle('missing', !region.hint.trim()); store(); }
});
rows.addEventListener('change', (event) => {
  const region = find(+event.target.closest('li').dataset.id), target = event.target;
  if (target.matches('.bx-text')) { const before = typed; typed = snapshot(); commit(before ?? undefined); }
  else if (target.matches('.bx-colour')) change(() => { region.colour = target.value; });
  else if (target.type === 'checkbox') change(() => {
    region.keep = target.checked;
    if (region.keep) { region.said = region.hint === KEEP ? '' : region.hint; region.hint = KEEP; } else region.hint = region.said || '';
  });
});
element.addEventListener('click', (event) => {
  const target = event.target.closest('[data-do]'); if (!target) return;
  const item = target.closest('li'), id = item ? +item.dataset.id : selected;
  if (target.dataset.do === 'select') { selected = id; draw(); layer.boxes.querySelector(`[data-id="${id}"]`)?.focus(); return; }
  actions[target.dataset.do]?.(id);
});

// --- pointer: draw, move, resize; two fingers zoom ---
function point(event) {
  const m = svg.getScreenCTM().inverse(), p = new DOMPoint(event.clientX, event.clientY).matrixTransform(m);
  return [clamp(p.x, 0, width), clamp(p.y, 0, height)];
}
function under(x, y) {  // the smallest box there, so that one inside another can be reached; of equal ones the selected
  const size = ({ box: [l, t, r, b], id }) => (r - l) * (b - t) - (id === selected ? .5 : 0);
  return regions.filter(({ box: [l, t, r, b] }) => x >= l && x <= r && y >= t && y <= b).sort((one, two) => size(one) - size(two))[0];
}
svg.addEventListener('pointerdown', (event) => {
  if (!width || event.button > 0) return;
  fingers.set(event.pointerId, event);
  svg.setPointerCapture(event.pointerId);
  if (fingers.size === 2) { if (drag) { regions = JSON.parse(drag.before); drag = null; } draw(); return; }
  const [x, y] = point(event), grip = event.target.dataset?.handle, group = event.target.closest('[data-id]');
  const before = snapshot();
  if (grip) drag = { mode: grip, id: selected, x, y, before, box: find(selected).box.slice() };
  else if (group) {
    selected = (under(x, y) || find(+group.dataset.id)).id;
    layer.boxes.querySelector(`[data-id="${selected}"]`).focus({ preventScroll: true });
    drag = { mode: 'move', id: selected, x, y, before, box: find(selected).box.slice() };
  } else { root.focus({ preventScroll: true }); drag = { mode: 'wait', x, y, before }; }
  if (event.pointerType === 'mouse') event.preventDefault();
  draw();
});
svg.addEventListener('pointermove', (event) => {
  if (fingers.size === 2 && fingers.has(event.pointerId)) { pinch(event); return; }
  if (!drag) return;
  const [x, y] = point(event);
  if (drag.mode === 'wait') {
    if (Math.hypot(x - drag.x, y - drag.y) < 5 * scale() || !room()) return;
    const region = newRegion([drag.x, drag.y, x, y].map(Math.round));
    regions.push(region); selected = region.id;
    drag = { ...drag, mode: 'new', id: region.id };
  }
  const region = find(drag.id), dx = x - drag.x, dy = y - drag.y, box = drag.box;
  if (drag.mode === 'new') region.box = [drag.x, drag.y, x, y].map(Math.round);
  else if (drag.mode === 'move') {
    const mx = Math.round(clamp(dx, -box[0], width - box[2])), my = Math.round(clamp(dy, -box[1], height - box[3]));
    region.box = [box[0] + mx, box[1] + my, box[2] + mx, box[3] + my]; region.point = null;
  } else region.box = resized(box, drag.mode, Math.round(dx), Math.round(dy));
  draw();
});
function resized(box, side, dx, dy) {
  let [l, t, r, b] = box; const least = Math.max(1, Math.round(6 * scale()));
  if (side.includes('w')) l = clamp(l + dx, 0, r - least);
  if (side.includes('e')) r = clamp(r + dx, l + least, width);
  if (side.includes('n')) t = clamp(t + dy, 0, b - least);
  if (side.includes('s')) b = clamp(b + dy, t + least, height);
  return [l, t, r, b];
}
function release(event) {
  fingers.delete(event.pointerId);
  if (!drag) return;
  const { mode, before, id } = drag; drag = null;
  if (mode === 'wait') { selected = null; draw(); return; }
  const region = find(id);
  if (mode === 'new') {
    const [l, t, r, b] = region.box;
    region.box = [Math.min(l, r), Math.min(t, b), Math.max(l, r), Math.max(t, b)];
    if (region.box[2] - region.box[0] < 1 || region.box[3] - region.box[1] < 1) { regions = JSON.parse(before); selected = null; draw(); return; }
  }
  if (before === snapshot()) { draw(); return; }
  commit(before);
  if (mode === 'new' && event.pointerType === 'mouse') row(id).querySelector('.bx-text').focus({ preventScroll: true });
}
svg.addEventListener('pointerup', release);
svg.addEventListener('pointercancel', (event) => { if (drag) { regions = JSON.parse(drag.before); drag = null; draw(); } fingers.delete(event.pointerId); });
function pinch(event) {
  const old = [...fingers.values()], gap = (pair) => Math.hypot(pair[0].clientX - pair[1].clientX, pair[0].clientY - pair[1].clientY) || 1;
  fingers.set(event.pointerId, event);
  const now = [...fingers.values()], unit = scale(), middle = (pair, axis) => (pair[0][axis] + pair[1][axis]) / 2;
  pan((middle(old, 'clientX') - middle(now, 'clientX')) * unit, (middle(old, 'clientY') - middle(now, 'clientY')) * unit);
  zoom(gap(now) / gap(old), point({ clientX: middle(now, 'clientX'), clientY: middle(now, 'clientY') }));
}
svg.addEventListener('wheel', (event) => {
  if (!width) return;
  if (event.ctrlKey) { event.preventDefault(); zoom(Math.exp(-event.deltaY / 200), point(event)); }
  else if (view.w < width) { event.preventDefault(); pan(event.deltaX * scale(), event.deltaY * scale()); }
}, { passive: false });

// --- keys, while a box or the canvas has the focus ---
element.addEventListener('keydown', (event) => {
  const editing = event.target.matches('input[type=text]'), held = event.ctrlKey || event.metaKey, key = event.key.toLowerCase();
  if (editing) { if (key === 'enter' || key === 'escape') event.target.blur(); return; }
  if (key === 'escape') { if (drag) { regions = JSON.parse(drag.before); drag = null; } selected = null; root.focus({ preventScroll: true }); draw(); return; }
  let act = held && key === 'z' ? (event.shiftKey ? 'redo' : 'undo') : held && key === 'y' ? 'redo' : held && key === 'd' ? 'duplicate' : null;
  if (!held && !event.altKey) act = { delete: 'delete', backspace: 'delete', n: 'add', 0: 'fit', '+': 'in', '-': 'out' }[key] || act;
  if (act && !(event.target.matches('.bx-rows input'))) {
    event.preventDefault(); actions[act](selected);
    if (act === 'delete') (layer.boxes.querySelector(`[data-id="${selected}"]`) || $('[data-do=add]')).focus();
    return;
  }
  const arrow = { arrowleft: [-1, 0], arrowright: [1, 0], arrowup: [0, -1], arrowdown: [0, 1] }[key];
  const group = event.target.closest('.bx-box'), region = find(selected);
  if (!group || !region) return;
  if (key === 'enter' || key === ' ') { event.preventDefault(); row(selected).querySelector('.bx-text').focus(); return; }
  if (!arrow) return;
  event.preventDefault();
  const far = event.shiftKey ? 10 : 1, [dx, dy] = [arrow[0] * far, arrow[1] * far], [l, t, r, b] = region.box;
  change(() => {
    if (event.altKey) region.box = [l, t, clamp(r + dx, l + 1, width), clamp(b + dy, t + 1, height)];
    else { const mx = clamp(dx, -l, width - r), my = clamp(dy, -t, height - b); region.box = [l + mx, t + my, r + mx, b + my]; region.point = null; }
  });
});

document.addEventListener('keydown', (event) => {  // undo works wherever nothing is being typed
  const typing = event.target.matches?.('textarea, [contenteditable], input:not([type=checkbox], [type=range])');
  if (!(event.ctrlKey || event.metaKey) || typing || root.contains(event.target)) return;
  const act = { z: event.shiftKey ? 'redo' : 'undo', y: 'redo' }[event.key.toLowerCase()];
  if (act) { event.preventDefault(); actions[act](); }
});

// --- files dropped or pasted take the way of the upload button ---
function hand(files) {
  const input = uploader(); if (!input || !files.length) return;
  const carrier = new DataTransfer(); carrier.items.add(files[0]);
  input.files = carrier.files; input.dispatchEvent(new Event('change', { bubbles: true }));
}
for (const kind of ['dragover', 'dragleave', 'drop']) root.addEventListener(kind, (event) => {
  event.preventDefault(); root.classList.toggle('drop', kind === 'dragover');
  if (kind === 'drop') hand(event.dataTransfer.files);
});
document.addEventListener('paste', (event) => { if (!event.target.matches?.('input, textarea') && event.clipboardData.files.length) hand(event.clipboardData.files); });
window.addEventListener('change', (event) => {  // Gradio would only flash a message in a corner
  const file = event.target.matches?.('#desk input[type=file]') && event.target.files[0];
  if (!file || file.size <= MOST_BYTES) return;
  event.stopImmediatePropagation(); event.target.value = '';
  trigger('refused', { bytes: file.size });
}, true);
new ResizeObserver(() => draw()).observe($('.bx-stage'));
watch('value', load); load(); draw();
