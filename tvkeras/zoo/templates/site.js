// Sorts the leaderboard's tables, unreliable rows last, and filters them and the points above; without
// it they stand as written.
"use strict";

const form = document.querySelector("form");
const sections = [...document.querySelectorAll("section")];

function sortable(table) {
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    const button = document.createElement("button");
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      const ascending = heading.getAttribute("aria-sort") !== "ascending";
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", ascending ? "ascending" : "descending");
      const rows = [...table.tBodies[0].rows];
      rows.sort((one, other) => {
        const last = one.classList.contains("unreliable") - other.classList.contains("unreliable");
        return last || compare(one.cells[column], other.cells[column], ascending);
      });
      table.tBodies[0].append(...rows);
    });
  });
}

// Cells without a figure come last in both directions.
function compare(one, other, ascending) {
  const sign = ascending ? 1 : -1;
  if (!one.classList.contains("number")) {
    return sign * one.textContent.localeCompare(other.textContent);
  }
  const missing = !("value" in one.dataset) - !("value" in other.dataset);
  return missing || sign * (one.dataset.value - other.dataset.value);
}

function filter() {
  const { dataset, norm, network } = Object.fromEntries(new FormData(form));
  let shown = 0;
  for (const section of sections) {
    const wanted =
      (!dataset || section.dataset.dataset === dataset) && (!norm || section.dataset.norm === norm);
    const rows = [...section.querySelectorAll("tbody tr")];
    for (const one of [...rows, ...section.querySelectorAll(".point")]) {
      one.toggleAttribute("hidden", !wanted || (network && one.dataset.network !== network));
    }
    const left = rows.filter((row) => !row.hidden).length;
    section.hidden = left === 0;
    shown += left;
  }
  form.querySelector("output").textContent = `${shown} ${shown === 1 ? "row" : "rows"}`;
}

sections.forEach((section) => sortable(section.querySelector("table")));
form.addEventListener("change", filter);
form.hidden = false;
filter(); // a browser may have kept choices over a reload
