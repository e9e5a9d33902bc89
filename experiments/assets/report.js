"use strict";
// Sorting, filtering and cells of the report. No library, no request: everything is in the page.
const data = JSON.parse(document.getElementById("data").textContent);
const make = (name, text, attributes = {}) => {
  const element = document.createElement(name);
  if (text !== undefined) element.textContent = text;
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
};

// Tables ---------------------------------------------------------------------------------------------------------------

const keyOf = (row, column) => {
  const entry = row.cells[column];
  if (entry.dataset.key !== undefined) return entry.dataset.key === "" ? null : Number(entry.dataset.key);
  return entry.textContent.trim().toLowerCase();
};

function compare(a, b) {
  if (a === null || b === null) return (a === null) - (b === null);  // what is missing goes last
  if (typeof a === "number" && typeof b === "number") return a - b;
  return String(a).localeCompare(String(b), "en", { numeric: true });
}

function sortable(box) {
  const heads = [...box.querySelectorAll("thead th")];
  const body = box.querySelector("tbody");
  heads.forEach((head, column) => {
    const button = make("button", head.textContent, { type: "button" });
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...body.rows].map((row) => [keyOf(row, column), row]);
      const known = rows.filter(([key]) => key !== null), missing = rows.filter(([key]) => key === null);
      known.sort(([a], [b]) => (down ? compare(b, a) : compare(a, b)));
      body.append(...[...known, ...missing].map(([, row]) => row));
    });
  });
}

function filterable(box) {
  const rows = [...box.querySelectorAll("tbody tr")];
  const text = new Map(rows.map((row) => [row, row.textContent.toLowerCase().replace(/\s+/g, " ")]));
  const input = box.querySelector("[data-filter]"), count = box.querySelector("[data-count]");
  const selects = [];
  const apply = () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const chosen = selects.every(([column, select]) => !select.value || row.cells[column].textContent.trim() === select.value);
      row.hidden = !(chosen && words.every((word) => text.get(row).includes(word)));
      shown += !row.hidden;
    }
    count.textContent = `${shown} of ${rows.length} rows`;
  };
  [...box.querySelectorAll("thead th")].forEach((head, column) => {
    if (head.dataset.choose === undefined) return;
    const values = [...new Set(rows.map((row) => row.cells[column].textContent.trim()))].filter(Boolean);
    if (values.length < 2) return;
    const label = make("label", `${head.textContent} `), select = make("select");
    select.append(make("option", "all", { value: "" }), ...values.sort().map((value) => make("option", value)));
    select.addEventListener("change", apply);
    label.append(select);
    box.querySelector(".selects").append(label);
    selects.push([column, select]);
  });
  input.addEventListener("input", apply);
  box.querySelector(".tools").hidden = false;
  apply();
}

function enhance(box) {
  filterable(box);
  sortable(box);
}
document.querySelectorAll("[data-table]").forEach(enhance);

// Cells ----------------------------------------------------------------------------------------------------------------

const dialog = document.getElementById("cell"), cellBody = document.getElementById("cell-body");
let opener = null;

function definitions(entries) {
  const list = make("dl");
  for (const [key, value] of entries) if (value !== "" && value !== null) list.append(make("dt", key), make("dd", String(value)));
  return list;
}

function chart(sites) {
  const shown = sites.filter((site) => site.held_out_relative_before > 0 && site.held_out_relative_after > 0);
  if (!shown.length) return null;
  const width = Math.max(560, shown.length * 9), height = 190, left = 52;
  const values = shown.flatMap((site) => [site.held_out_relative_before, site.held_out_relative_after]).map(Math.log10);
  const low = Math.floor(Math.min(...values)), high = Math.max(low + 1, Math.ceil(Math.max(...values)));
  const y = (value) => 12 + (height - 36) * (1 - (Math.log10(value) - low) / (high - low));
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const add = (name, attributes, text) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text) element.textContent = text;
    svg.append(element);
    return element;
  };
  svg.setAttribute("viewBox", `0 0 ${width + left} ${height}`);
  svg.setAttribute("width", width + left);
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", "Relative output error of every site before and after compensation; the numbers are in the table");
  for (let power = low; power <= high; power++) {
    add("line", { x1: left, x2: width + left, y1: y(10 ** power), y2: y(10 ** power) });
    add("text", { x: 4, y: y(10 ** power) + 4 }, `1e${power}`);
  }
  const step = width / shown.length;
  shown.forEach((site, i) => {
    const x = left + (i + 0.5) * step;
    add("rect", { x: x - 3, y: y(site.held_out_relative_before) - 3, width: 6, height: 6, class: "before" });
    add("circle", { cx: x, cy: y(site.held_out_relative_after), r: 3, class: "after" });
  });
  add("text", { x: left, y: height - 6 }, "sites in forward order; square: before, circle: after; held-out samples, relative squared error");
  const scroll = make("div", undefined, { class: "scroll", tabindex: "0", role: "region", "aria-label": "Errors of the sites" });
  scroll.append(svg);
  return scroll;
}

const short = (value) => (typeof value === "number" ? String(Number(value.toPrecision(4))) : value ?? "—");

function siteTable(sites) {
  const columns = Object.keys(sites[0]);
  const box = make("div", undefined, { class: "table" });
  const tools = make("div", undefined, { class: "tools", hidden: "" });
  const label = make("label", "Filter ");
  label.append(make("input", undefined, { type: "search", "data-filter": "" }));
  tools.append(label, make("span", undefined, { class: "selects" }), make("span", undefined, { role: "status", "data-count": "" }));
  const table = make("table"), head = make("tr"), body = make("tbody");
  head.append(...columns.map((name) => make("th", name.replaceAll("_", " "), { scope: "col" })));
  for (const site of sites) {
    const row = make("tr");
    for (const name of columns) {
      const number = typeof site[name] === "number" || site[name] === null;
      row.append(make("td", short(site[name]), number ? { class: "number", "data-key": site[name] ?? "" } : {}));
    }
    body.append(row);
  }
  const thead = make("thead");
  thead.append(head);
  table.append(make("caption", "Output errors of the sites"), thead, body);
  const scroll = make("div", undefined, { class: "scroll", tabindex: "0" });
  scroll.append(table);
  box.append(tools, scroll);
  enhance(box);
  return box;
}

function openCell(hash) {
  const cell = data.cells[hash];
  if (!cell) return;
  document.getElementById("cell-title").textContent = cell.name;
  const parts = [make("h3", "Results"), definitions(cell.values), make("h3", "Settings"), definitions(cell.settings)];
  parts.push(make("h3", "Storage, errors, costs, provenance"), definitions(cell.provenance));
  const detail = data.details[hash];
  if (detail) {
    parts.push(make("h3", "Configuration"), make("pre", JSON.stringify(detail.config, null, 1)));
    parts.push(make("h3", "Versions and seconds"), make("pre", JSON.stringify(detail.provenance, null, 1)));
    if (detail.sites.length) parts.push(make("h3", "Sites"), chart(detail.sites) ?? "", siteTable(detail.sites));
  } else {
    parts.push(make("p", "Its folder under results/cells is not on the machine that made this report: the row of cells.csv is all that is shown."));
  }
  cellBody.replaceChildren(...parts.filter(Boolean));
  if (!dialog.open) dialog.showModal();
  dialog.scrollTop = 0;
}

function follow() {
  const found = location.hash.match(/^#cell-([0-9a-f]+)$/);
  if (found) openCell(found[1]);
  else if (dialog.open) dialog.close();
}
document.addEventListener("click", (event) => {
  const link = event.target.closest?.('a[href^="#cell-"]');
  if (link) opener = link;
});
dialog.addEventListener("close", () => {
  if (location.hash.startsWith("#cell-")) history.replaceState(null, "", location.pathname + location.search);
  opener?.focus();
});
window.addEventListener("hashchange", follow);
follow();

// Light and dark -------------------------------------------------------------------------------------------------------

const theme = document.getElementById("theme");
const isDark = () => (document.documentElement.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
const say = () => { theme.textContent = isDark() ? "Light" : "Dark"; };
theme.addEventListener("click", () => { document.documentElement.dataset.theme = isDark() ? "light" : "dark"; say(); });
theme.hidden = false;
say();
