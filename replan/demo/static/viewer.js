// Before and after, the difference, the candidates, and the live preview of an edit under way.
const $ = (query) => element.querySelector(query);
const root = $('.vw');
let stamp = null, shots = [], chosen = 0, mode = 'compare';
const safe = (src) => (typeof src === 'string' && src.startsWith('data:image/') ? src : '');
function put(query, src) { const image = $(query); if (safe(src)) image.src = safe(src); else image.removeAttribute('src'); }
function load() {
  const value = props.value || {};
  if (value.stamp === stamp) return;
  stamp = value.stamp;
  if ('before' in value) put('.vw-before', value.before);
  if (value.shots) { shots = value.shots; chosen = value.chosen || 0; picks(); }
  if (value.state) root.dataset.state = value.state;
  if (value.live) put('.vw-after', value.live);
  if (value.steps !== undefined) { $('.vw-steps').textContent = value.steps; $('.vw-fill').style.width = `${100 * (value.share || 0)}%`; }
  if (root.dataset.state === 'done') show();  // props.value stays: writing here could undo news that just came in
}
function show() {
  const shot = shots[chosen]; if (!shot) return;
  put('.vw-after', shot.after); put('.vw-heat', shot.heat);
  $('.vw-caption').textContent = shot.caption || '';
  for (const one of element.querySelectorAll('.vw-picks button')) one.setAttribute('aria-pressed', String(+one.dataset.at === chosen));
}
function picks() {
  const list = $('.vw-picks');
  list.replaceChildren();
  if (shots.length < 2) return;
  shots.forEach((shot, at) => {
    const button = document.createElement('button'), image = document.createElement('img');
    button.type = 'button'; button.dataset.at = at; button.setAttribute('aria-label', `Candidate ${at + 1}, ${shot.caption}`);
    image.src = safe(shot.after); image.alt = '';
    button.appendChild(image); list.appendChild(button);
  });
}
element.addEventListener('click', (event) => {
  const look = event.target.closest('[data-mode]:not(.vw)'), pick = event.target.closest('[data-at]');
  if (look) {
    mode = root.dataset.mode = look.dataset.mode;
    for (const one of element.querySelectorAll('.vw-modes button')) one.setAttribute('aria-pressed', String(one === look));
  }
  if (pick) { chosen = +pick.dataset.at; show(); trigger('chosen', { index: chosen }); }
});
// the frame has the picture's own shape, so that the boundary runs over the picture and nothing else
for (const image of element.querySelectorAll('.vw-before, .vw-after')) image.addEventListener('load', () => {
  root.style.setProperty('--ratio', image.naturalWidth / image.naturalHeight);
});
$('.vw-slide').addEventListener('input', (event) => root.style.setProperty('--cut', `${event.target.value}%`));
watch('value', load); load();
