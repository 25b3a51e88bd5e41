// Only the rows in view are in the document; all text is set as text, never as markup.
const { columns, rows } = JSON.parse(document.getElementById("data").textContent);
const HEIGHT = 84, AROUND = 6;
const table = document.getElementById("table"), space = document.getElementById("space"), head = table.querySelector(".head");
const find = document.getElementById("find"), which = document.getElementById("which"), whole = document.getElementById("whole");
const chosen = columns.findIndex(column => column.name === "selected");
const searched = rows.map(row => row.filter((_, i) => columns[i].kind === "text").join("\n").toLowerCase());
let shown = [], sorted = null, up = true;

const cell = (kind, text) => {
  const made = document.createElement("div");
  made.className = kind;
  made.textContent = text;
  return made;
};
const written = (value, kind) => value === null ? "–"
  : kind === "flag" ? (value ? "yes" : "no") : kind === "number" ? String(+value.toPrecision(5)) : value;

// A value that is missing comes last, whichever way they are sorted.
const compare = (a, b) => a === null ? (b === null ? 0 : 1) : b === null ? -1 : (a < b ? -1 : a > b ? 1 : 0) * (up ? 1 : -1);

const choose = () => {
  const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
  shown = rows.map((_, i) => i).filter(i =>
    (which.value === "" || rows[i][chosen] === Number(which.value)) && words.every(word => searched[i].includes(word)));
  if (sorted !== null) shown.sort((a, b) => compare(rows[a][sorted], rows[b][sorted]) || a - b);
  document.getElementById("count").textContent = `${shown.length.toLocaleString("en")} of ${rows.length.toLocaleString("en")} samples`;
  space.style.height = `${shown.length * HEIGHT}px`;
  table.scrollTop = 0;
  draw();
};
const draw = () => {
  const first = Math.max(0, Math.floor(table.scrollTop / HEIGHT) - AROUND);
  const last = Math.min(shown.length, Math.ceil((table.scrollTop + table.clientHeight) / HEIGHT) + AROUND);
  space.replaceChildren(...shown.slice(first, last).map((i, k) => {
    const row = document.createElement("div");
    row.className = rows[i][chosen] ? "row selected" : "row";
    row.style.top = `${(first + k) * HEIGHT}px`;
    row.append(...rows[i].map((value, c) => cell(columns[c].kind, written(value, columns[c].kind))));
    row.tabIndex = 0;
    row.addEventListener("click", () => open(i));
    onKey(row, () => open(i));
    return row;
  }));
};
const open = i => {
  whole.replaceChildren(...rows[i].flatMap((value, c) => {
    const title = document.createElement("h2");
    title.textContent = columns[c].name;
    return [title, cell("text", written(value, columns[c].kind))];
  }));
  const close = document.createElement("button");
  close.textContent = "Close";
  close.addEventListener("click", () => whole.close());
  whole.prepend(close);
  whole.showModal();
  whole.scrollTop = 0;
};
const onKey = (element, act) => element.addEventListener("keydown", event => {
  if (event.key === "Enter" || event.key === " ") { event.preventDefault(); act(); }
});
columns.forEach((column, c) => {
  const made = cell(column.kind, column.name);
  made.tabIndex = 0;
  made.setAttribute("role", "columnheader");
  const sort = () => {
    up = sorted === c ? !up : true;
    sorted = c;
    for (const other of head.children) other.removeAttribute("aria-sort");
    made.setAttribute("aria-sort", up ? "ascending" : "descending");
    choose();
  };
  made.addEventListener("click", sort);
  onKey(made, sort);
  head.append(made);
});
const texts = { prompt: ["16rem", "3fr"], answer: ["11rem", "2fr"] };
const least = ({ name }) => texts[name]?.[0] ?? `${Math.max(6, 2 + name.length * .6)}rem`;
table.style.setProperty("--columns", columns.map(c => texts[c.name] ? `minmax(${least(c)}, ${texts[c.name][1]})` : least(c)).join(" "));
table.style.setProperty("--least", `calc(${columns.map(least).join(" + ")})`);
table.addEventListener("scroll", draw);
addEventListener("resize", draw);
whole.addEventListener("click", event => { if (event.target === whole) whole.close(); });
let waiting;
find.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(choose, 120); });
which.addEventListener("change", choose);
choose();
