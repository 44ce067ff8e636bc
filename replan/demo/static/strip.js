// A row of thumbnails to click on.
const list = element.querySelector('.st');
let stamp = null;
function load() {
  const value = props.value || {};
  if (value.stamp === stamp) return;
  stamp = value.stamp;
  list.setAttribute('aria-label', value.label || 'Pictures');
  list.replaceChildren();
  (value.items || []).forEach((item, at) => {
    const button = document.createElement('button'), image = document.createElement('img'), text = document.createElement('span');
    button.type = 'button'; button.dataset.at = at; button.title = item.label;
    button.setAttribute('aria-label', item.label);
    image.src = String(item.picture).startsWith('data:image/') ? item.picture : ''; image.alt = '';
    text.textContent = item.label;
    button.append(image, text); list.appendChild(button);
  });
  if (!(value.items || []).length) { const none = document.createElement('p'); none.textContent = value.empty || ''; list.appendChild(none); }
}
element.addEventListener('click', (event) => {
  const button = event.target.closest('[data-at]'); if (button) trigger('picked', { index: +button.dataset.at });
});
watch('value', load); load();
