// A click on a column's name sorts its table: the largest first, then the smallest.
const value = (row, column) => {
  const cell = row.cells[column], text = cell.dataset.sort ?? cell.textContent.replaceAll(",", "");
  return Number.isNaN(parseFloat(text)) ? text : parseFloat(text);
};
const compare = (a, b) => typeof a === typeof b
  ? typeof a === "number" ? a - b : a.localeCompare(b, "en", {numeric: true})
  : typeof a === "number" ? 1 : -1;
for (const table of document.querySelectorAll("table.sort")) {
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.onclick = () => {
      const sign = head.ariaSort === "descending" ? 1 : -1;
      for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
      head.ariaSort = sign < 0 ? "descending" : "ascending";
      const body = table.tBodies[0];
      body.append(...[...body.rows].sort((a, b) => sign * compare(value(a, column), value(b, column))));
    };
  });
}
