const $ = id => document.getElementById(id), every = selector => [...document.querySelectorAll(selector)];
const details = every('tr.more details'), all = $('all'), table = document.querySelector('table.claims');
const claims = every('tbody.one'), bodies = every('.claims > tbody'), fields = every('[data-by]'), heads = every('th[data-sort]');
all.hidden = $('filter').hidden = false;
all.addEventListener('click', () => {
  const open = all.getAttribute('aria-pressed') !== 'true';
  for (const d of details) d.open = open;
  all.setAttribute('aria-pressed', open); all.textContent = open ? 'Close all' : 'Open all';
});
const fits = (claim, field) => !field.value || (field.dataset.by === 'text'
  ? claim.textContent.toLowerCase().includes(field.value.trim().toLowerCase()) : claim.dataset[field.dataset.by] === field.value);
const show = () => {
  const key = $('sort').value, grouped = key === 'order', sign = key === 'severity' ? -1 : 1;
  for (const c of claims) c.hidden = !fields.every(f => fits(c, f));
  const rows = grouped ? bodies : [...claims].sort((a, b) => sign * (a.dataset[key] - b.dataset[key]));
  let group = null;
  for (const g of bodies) if (g.className === 'group') { group = g; g.hidden = true; } else if (grouped && !g.hidden) group.hidden = false;
  table.append(...rows);
  const left = claims.filter(c => !c.hidden).length;
  $('none').hidden = left > 0; $('shown').textContent = `${left} of ${claims.length}`;
  for (const h of heads) h.setAttribute('aria-sort', h.dataset.sort !== key ? 'none' : sign > 0 ? 'ascending' : 'descending');
};
for (const h of heads) {
  const button = document.createElement('button');
  button.type = 'button'; button.textContent = h.textContent; h.replaceChildren(button);
  button.addEventListener('click', () => { $('sort').value = h.dataset.sort; show(); });
}
for (const f of [...fields, $('sort')]) f.addEventListener('input', show);
const reach = () => {
  const row = $(decodeURIComponent(location.hash.slice(1)));
  if (!row || !row.classList.contains('claim')) return;
  if (row.parentNode.hidden) { for (const f of fields) f.value = ''; show(); }
  row.nextElementSibling.querySelector('details').open = true; row.scrollIntoView();
};
show(); addEventListener('hashchange', reach); reach();
let before = [];
addEventListener('beforeprint', () => { before = every('details:not([open])'); for (const d of before) d.open = true; });
addEventListener('afterprint', () => { for (const d of before) d.open = false; });
