"use strict";
// Sorting: a click on a heading sorts its table by data-value, a second click turns the order round.
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const heading = button.closest("th"), body = heading.closest("table").tBodies[0];
    const column = [...heading.parentNode.children].indexOf(heading);
    const up = heading.getAttribute("aria-sort") !== "ascending";
    for (const other of heading.parentNode.children) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", up ? "ascending" : "descending");
    const value = (row) => row.children[column].dataset.value;
    const compare = (a, b) => {
      const [x, y] = [value(a), value(b)], [n, m] = [Number(x), Number(y)];
      if (x === "" || y === "") return (x === "") - (y === ""); // what is not there comes last
      return (up ? 1 : -1) * (Number.isNaN(n) || Number.isNaN(m) ? x.localeCompare(y) : n < m ? -1 : Number(n > m));
    };
    body.append(...[...body.rows].sort(compare));
  });
}
