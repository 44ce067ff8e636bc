// Who reads whom: rows read columns. A click is sent as {phase, reader, read}; the answer comes back as a new value.
const $ = (query) => element.querySelector(query);
const grid = $('.mx-grid');
const COLOURS = ['#e63946', '#1d7ad6', '#22a054', '#f08c00', '#9333c8', '#00a0aa', '#d63384', '#8c6428'];
let phase = null, picked = null, at = [0, 0];
const value = () => props.value || {};
const tone = (name) => { const n = +(name.match(/\d+$/) || [0])[0]; return n ? COLOURS[(n - 1) % 8] : ''; };

function draw() {
  const { names = [], early = [], late = [], labels = {}, live = {} } = value();
  phase = picked || (phase && live[phase] ? phase : live.late ? 'late' : 'early');
  for (const tab of element.querySelectorAll('[data-phase]')) {
    tab.textContent = labels[tab.dataset.phase] || '';
    tab.setAttribute('aria-selected', String(tab.dataset.phase === phase));
    tab.classList.toggle('off', !live[tab.dataset.phase]);
  }
  const table = phase === 'early' ? early : late;
  grid.replaceChildren();
  grid.style.setProperty('--count', names.length || 1);
  const head = grid.createTHead().insertRow();
  head.appendChild(document.createElement('td'));
  names.forEach((name) => head.appendChild(title(name, 'col')));
  const body = grid.createTBody();
  names.forEach((reader, r) => {
    const line = body.insertRow();
    line.appendChild(title(reader, 'row'));
    names.forEach((read, c) => {
      const cell = line.insertCell(), on = Boolean(table[r]?.[c]);
      cell.className = 'mx-cell'; cell.dataset.r = r; cell.dataset.c = c;
      cell.setAttribute('role', 'gridcell'); cell.tabIndex = r === at[0] && c === at[1] ? 0 : -1;
      cell.setAttribute('aria-selected', String(on));
      cell.setAttribute('aria-label', sentence(reader, read, on));
      cell.classList.toggle('on', on); cell.classList.toggle('fixed', r === c);
      cell.style.setProperty('--tone', tone(read) || 'var(--neutral)');
    });
  });
  say();
}
// What a cell says, or how things stand; and why a change would have no effect, if so.
function say(cell) {
  const { live = {}, why = {}, note = '', ...all } = value(), idle = all.idle || (live[phase] ? '' : why[phase] || '');
  $('.mx-said').textContent = cell ? `${cell.getAttribute('aria-label')}${idle && '. ' + idle}` : idle || note;
}
const code = (name) => name.replace('region ', '').split(' ').map((word) => (/\d/.test(word) ? word : word[0].toUpperCase())).join('');
function title(name, scope) {
  const head = document.createElement('th'), text = document.createElement('span');
  head.scope = scope; text.textContent = scope === 'col' ? code(name) : name; head.title = name;
  head.setAttribute('aria-label', name);
  if (tone(name)) head.style.setProperty('--tone', tone(name));
  head.appendChild(text);
  return head;
}
function sentence(reader, read, on) {
  return reader === read ? `${reader} always reads itself` : `${reader} ${on ? 'reads' : 'does not read'} ${read}`;
}
function flip(cell) {
  const { names } = value(), r = +cell.dataset.r, c = +cell.dataset.c;
  at = [r, c];
  if (r === c) { $('.mx-said').textContent = `${names[r]} always reads itself; this cell cannot be changed.`; return; }
  trigger('toggle', { phase, reader: r, read: c });
}
element.addEventListener('click', (event) => {
  const tab = event.target.closest('[data-phase]'), cell = event.target.closest('.mx-cell');
  if (tab) { phase = picked = tab.dataset.phase; draw(); }
  if (cell) flip(cell);
});
element.addEventListener('pointerover', (event) => {
  const cell = event.target.closest('.mx-cell'); if (cell) say(cell);
});
grid.addEventListener('pointerleave', () => say());
grid.addEventListener('focusin', (event) => { if (event.target.matches('.mx-cell')) say(event.target); });
grid.addEventListener('keydown', (event) => {
  const cell = event.target.closest('.mx-cell'); if (!cell) return;
  const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
  if (event.key === ' ' || event.key === 'Enter') { event.preventDefault(); flip(cell); return; }
  if (!move) return;
  event.preventDefault();
  const next = grid.querySelector(`[data-r="${+cell.dataset.r + move[0]}"][data-c="${+cell.dataset.c + move[1]}"]`);
  if (next) { cell.tabIndex = -1; next.tabIndex = 0; next.focus(); at = [+next.dataset.r, +next.dataset.c]; }
});
watch('value', () => { const had = element.contains(document.activeElement) && document.activeElement.matches('.mx-cell'); draw(); if (had) grid.querySelector('[tabindex="0"].mx-cell')?.focus(); });
draw();
