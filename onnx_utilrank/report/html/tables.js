"use strict";
// Heads of tables sort, and long tables get a field that filters. Without this they are plain.
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const heads = [...table.tHead.rows[0].cells];
  const value = (row, k) => {
    const cell = row.cells[k];
    return "sort" in cell.dataset ? Number(cell.dataset.sort) : cell.textContent.trim();
  };
  const compare = (a, b) => {
    if (typeof a === "number" && typeof b === "number") return a - b;
    if (typeof a === "number") return -1;
    if (typeof b === "number") return 1;
    return a.localeCompare(b, "en", { numeric: true });
  };
  heads.forEach((head, k) => {
    if (rows.length < 2) return;
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    if (!button.textContent) button.setAttribute("aria-label", "first column");
    head.append(button);
    head.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of heads) other.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const sign = down ? -1 : 1;
      body.append(...[...rows].sort((a, b) => sign * compare(value(a, k), value(b, k))));
    });
  });
  if (rows.length < 8) continue;
  const field = document.createElement("input");
  field.type = "search";
  field.placeholder = "filter";
  field.setAttribute("aria-label", "Show the rows that hold");
  const count = document.createElement("output");
  const texts = rows.map((row) =>
    [...row.cells].map((c) => c.title || c.textContent).join(" ").toLowerCase(),
  );
  field.addEventListener("input", () => {
    const wanted = field.value.trim().toLowerCase();
    let shown = 0;
    rows.forEach((row, k) => {
      row.hidden = !texts[k].includes(wanted);
      shown += row.hidden ? 0 : 1;
    });
    count.value = wanted ? `${shown} of ${rows.length}` : "";
  });
  const tools = document.createElement("div");
  tools.className = "tools";
  tools.append(field, count);
  table.parentElement.before(tools);
}
// Paper has nothing to click on; what is to be copied stays shut.
addEventListener("beforeprint", () => {
  for (const each of document.querySelectorAll("details:not(:has(pre))")) each.open = true;
});
