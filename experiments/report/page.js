const key = (row, i) => {
  const text = row.cells[i].textContent.trim(), number = parseFloat(text.replace(/^[~<\[\s]+/, "").replace(/,/g, ""));
  return Number.isNaN(number) ? text : number;
};
// Numbers come before what is none, whichever way they are sorted.
const compare = (a, b, up) => typeof a !== typeof b ? (typeof a === "number" ? -1 : 1) : (a < b ? -up : a > b ? up : 0);
document.querySelectorAll("table.sortable th").forEach(th => {
  const sort = () => {
    const i = th.cellIndex, up = th.getAttribute("aria-sort") !== "ascending", body = th.closest("table").tBodies[0];
    th.parentNode.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
    th.setAttribute("aria-sort", up ? "ascending" : "descending");
    body.append(...[...body.rows].sort((a, b) => compare(key(a, i), key(b, i), up ? 1 : -1)));
  };
  th.addEventListener("click", sort);
  th.addEventListener("keydown", event => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); sort(); } });
});
// A link to what is folded opens it, and paper shows everything.
const unfold = () => {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (target) { target.open = true; target.scrollIntoView(); }
};
addEventListener("hashchange", unfold);
// A second click on the same link changes no hash.
document.querySelectorAll("a[href^='#']").forEach(a => a.addEventListener("click", () => setTimeout(unfold)));
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach(one => one.open = true));
addEventListener("load", unfold);
