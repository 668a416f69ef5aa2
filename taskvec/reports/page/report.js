"use strict";
// Sorts and filters the table of parameters. Of a long table only the first rows are laid out, so
// that it stays quick; "Show all rows" and printing bring the rest.
(() => {
  const FIRST = 500;
  const MORE = 4; // times as many rows at each click
  const table = document.getElementById("table");
  const body = table.tBodies[0];
  const headings = [...table.tHead.rows[0].cells];
  const words = document.getElementById("words");
  const kind = document.getElementById("kind");
  const label = document.getElementById("label"); // absent where there is one precision only
  const count = document.getElementById("count");
  const moreLine = document.getElementById("more-line");
  const more = document.getElementById("more");
  const inWords = (number) => number.toLocaleString("en");
  const inOrder = new Intl.Collator("en", { numeric: true }).compare;

  const rows = [...body.rows].map((element, index) => ({
    element,
    index,
    name: element.cells[0].textContent.toLowerCase(),
    kind: element.dataset.k,
    failed: element.className === "failed",
    label: element.cells[1].textContent,
  }));
  let sorted = rows;
  let matching = rows;
  let most = FIRST;

  const keyOf = (row, column, isNumber) => {
    const cell = row.element.cells[column];
    if (!isNumber) return cell.textContent;
    return cell.dataset.v === undefined ? NaN : Number(cell.dataset.v);
  };

  const compare = (a, b, isNumber, sign) => {
    if (!isNumber) return sign * inOrder(a, b);
    const missing = Number.isNaN(a) - Number.isNaN(b); // no value: last, whichever the direction
    return missing || (Number.isNaN(a) ? 0 : sign * (a - b));
  };

  const sort = (column) => {
    const heading = headings[column];
    const isNumber = heading.dataset.type === "number";
    // Names start from A, numbers from the largest.
    const first = isNumber ? "descending" : "ascending";
    const other = isNumber ? "ascending" : "descending";
    const direction = heading.getAttribute("aria-sort") === first ? other : first;
    for (const each of headings) each.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", direction);
    const sign = direction === "ascending" ? 1 : -1;
    const keys = new Map(rows.map((row) => [row, keyOf(row, column, isNumber)]));
    sorted = [...rows].sort(
      (a, b) => compare(keys.get(a), keys.get(b), isNumber, sign) || a.index - b.index,
    );
    update();
  };

  const show = (some) => body.replaceChildren(...some.map((row) => row.element));

  const update = () => {
    const wanted = words.value.toLowerCase().split(/\s+/).filter(Boolean);
    matching = sorted.filter(
      (row) =>
        wanted.every((word) => row.name.includes(word)) &&
        (!kind.value || (kind.value === "failed" ? row.failed : row.kind === kind.value)) &&
        (!label || !label.value || row.label === label.value),
    );
    const shown = matching.slice(0, most);
    show(shown);
    say(shown.length);
    moreLine.hidden = shown.length === matching.length;
  };

  const say = (shown) => {
    const of = matching.length === rows.length ? "" : ` (of ${inWords(rows.length)})`;
    count.textContent =
      shown === matching.length
        ? `${inWords(shown)} rows${of}, one per parameter and precision.`
        : `The first ${inWords(shown)} of ${inWords(matching.length)} rows${of}.`;
  };

  headings.forEach((heading, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = heading.textContent;
    button.addEventListener("click", () => sort(column));
    heading.replaceChildren(button);
  });
  words.addEventListener("input", update);
  kind.addEventListener("input", update);
  if (label) label.addEventListener("input", update);
  more.addEventListener("click", () => {
    most *= MORE;
    update();
    table.parentElement.focus();
  });
  document.getElementById("reset").addEventListener("click", () => {
    for (const control of [words, kind, label]) if (control) control.value = "";
    for (const heading of headings) heading.removeAttribute("aria-sort");
    sorted = rows;
    most = FIRST;
    update();
  });

  // On paper: every matching row, and every figure.
  let closed = [];
  addEventListener("beforeprint", () => {
    show(matching);
    say(matching.length);
    closed = [...document.querySelectorAll("details:not([open])")];
    for (const details of closed) details.open = true;
  });
  addEventListener("afterprint", () => {
    for (const details of closed) details.open = false;
    update();
  });

  document.getElementById("controls").hidden = false;
  update();
})();
