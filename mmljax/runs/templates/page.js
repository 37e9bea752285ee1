"use strict";
const select = document.getElementById("category");
const count = document.getElementById("count");
const list = document.getElementById("list");
const queries = [...list.children];
const visible = () => queries.filter((query) => !query.hidden);

// Only one query is reached by the Tab key; arrow keys move between queries.
function stopAt(query) {
  for (const other of queries) other.tabIndex = other === query ? 0 : -1;
}

function filter() {
  for (const query of queries) {
    query.hidden = select.value !== "" && query.dataset.category !== select.value;
  }
  count.textContent = `${visible().length} shown`;
  stopAt(visible()[0]);
}

list.addEventListener("keydown", (event) => {
  const shown = visible();
  const here = shown.indexOf(event.target);
  const next = {
    ArrowDown: shown[here + 1], ArrowUp: shown[here - 1], Home: shown[0], End: shown.at(-1),
  }[event.key];
  if (here < 0 || next === undefined || event.ctrlKey || event.altKey || event.metaKey) return;
  event.preventDefault();
  stopAt(next);
  next.focus({ preventScroll: true });
  next.scrollIntoView({ block: "nearest" });
});
list.addEventListener("focusin", (event) => {
  if (queries.includes(event.target)) stopAt(event.target);
});
select.addEventListener("change", filter);
filter(); // a browser may keep the selection after a reload
