// Charts in the page's colours, tables that sort, and the browser of users. Texts of users are set as textContent alone.
const read = (id) => JSON.parse(document.getElementById(id).textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");

// ---- charts
const specs = read("specs");
function theme() {
  const style = getComputedStyle(document.documentElement);
  const [ink, soft, line] = ["--ink", "--soft", "--line"].map((name) => style.getPropertyValue(name).trim());
  const axis = { labelColor: ink, titleColor: soft, gridColor: line, domainColor: line, tickColor: line };
  const colours = dark.matches
    ? ["#6cb6ff", "#f2a65a", "#6fd6a8", "#e58fd0", "#e8d44d", "#b9a3ff"]
    : ["#0072b2", "#d55e00", "#009e73", "#b0579b", "#8a7400", "#5b4bc4"]; // told apart by the colour-blind
  return {
    background: "transparent", font: "system-ui, sans-serif", view: { stroke: null },
    axis: { ...axis, labelLimit: 150, labelOverlap: true, labelSeparation: 6, titleFontWeight: "normal" },
    legend: { labelColor: ink, titleColor: soft, orient: "bottom", columns: 2, labelLimit: 220 },
    range: { category: colours }, rule: { color: soft }, bar: { color: colours[0] }, line: { color: colours[0] },
    circle: { color: colours[0] }, point: { color: colours[0] },
  };
}
const places = [...document.querySelectorAll("[data-chart]")];
async function drawCharts() {
  for (const place of places) {
    if ("drawn" in place.dataset || place.closest("details.part:not([open])")) continue; // closed, it has no width
    place.dataset.drawn = "";
    await vegaEmbed(place, specs[place.dataset.chart], {
      mode: "vega-lite", renderer: "svg", config: theme(), tooltip: { theme: dark.matches ? "dark" : "light" },
      actions: { export: true, source: false, compiled: false, editor: false },
    });
  }
  document.body.dataset.charts = "drawn";
}

// ---- parts: on a phone all but the verdict begin closed
const parts = [...document.querySelectorAll("details.part")];
if (matchMedia("(max-width: 600px)").matches) for (const part of parts) part.open = false;
function openNamed() {
  const section = document.getElementById(location.hash.slice(1));
  const part = section?.querySelector(":scope > details.part");
  if (!part) return;
  part.open = true;
  section.scrollIntoView();
}
openNamed();
addEventListener("hashchange", openNamed);
drawCharts();
for (const part of parts) part.addEventListener("toggle", drawCharts);
dark.addEventListener("change", () => {
  for (const place of places) delete place.dataset.drawn;
  drawCharts();
});

// ---- tables
const figure = (text) => {
  const found = text.replaceAll(",", "").match(/[-+]?\d+(\.\d+)?(e[-+]?\d+)?/i);
  return found ? Number(found[0]) : NaN;
};
function sort(table, column, ascending) {
  const numeric = table.tHead.rows[0].cells[column].classList.contains("figure");
  const value = (row) => (numeric ? figure(row.cells[column].textContent) : row.cells[column].textContent);
  const rows = [...table.tBodies[0].rows].map((row) => [value(row), row]);
  rows.sort(([one], [two]) => {
    if (!numeric) return ascending ? one.localeCompare(two) : two.localeCompare(one);
    if (Number.isNaN(one) || Number.isNaN(two)) return Number.isNaN(one) - Number.isNaN(two); // dashes last
    return ascending ? one - two : two - one;
  });
  table.tBodies[0].append(...rows.map(([, row]) => row));
}
for (const table of document.querySelectorAll("table.sortable")) {
  [...table.tHead.rows[0].cells].forEach((head, column, heads) => {
    head.querySelector("button").addEventListener("click", () => {
      const ascending = head.ariaSort !== "ascending";
      for (const other of heads) other.ariaSort = "none";
      head.ariaSort = ascending ? "ascending" : "descending";
      sort(table, column, ascending);
    });
  });
}

// ---- users
const users = read("users-data");
const made = (name, text, properties = {}) => Object.assign(document.createElement(name), { textContent: text ?? "" }, properties);
const shown = (value, digits = 4) => (value === null || value === undefined ? "–" : value.toFixed(digits));

function tableOf(title, heads, rows, className = "scroll") {
  const box = made("div", "", { className, tabIndex: 0, role: "region", ariaLabel: title });
  const table = box.appendChild(document.createElement("table"));
  table.append(made("caption", title));
  const top = table.createTHead().insertRow();
  for (const head of heads) top.append(made("th", head, { scope: "col" }));
  const body = table.createTBody();
  for (const cells of rows) {
    const row = body.insertRow();
    cells.forEach((cell, column) => {
      const [text, className] = Array.isArray(cell) ? cell : [cell, ""];
      const one = row.appendChild(made("td", "", { className }));
      one.dataset.label = heads[column];
      one.append(made("span", text));
    });
  }
  return box;
}
function listOf(texts, className = "") {
  const list = made("ul", "", { className });
  for (const text of texts) list.append(made("li", text));
  return list;
}
function ranking(list) {
  // A row per candidate in the order of the first ranking, with its place in each.
  const places = list.rankings.map((one) => one.order.map((_, item) => one.order.indexOf(item) + 1));
  const rows = list.rankings[0].order.map((item) => [
    [list.items[item] + (list.liked[item] ? " ♥ liked" : ""), list.liked[item] ? "liked" : ""],
    ...places.map((own, number) => {
      const moved = places[0][item] - own[item];
      if (!number || !moved) return String(own[item]);
      // Only of what is liked is a better place good.
      return [`${own[item]} ${moved > 0 ? "▲" : "▼"}${Math.abs(moved)}`, list.liked[item] ? (moved > 0 ? "up" : "down") : ""];
    }),
  ]);
  rows.push(["NDCG@5 of this list", ...list.rankings.map((one) => shown(one.ndcg, 3))]);
  return tableOf("Places in a list of this user, by the reward's reranker where the run has one, without a text and with the first text of each kind; ▲ higher, ▼ lower than without", [
    "candidate", ...list.rankings.map((one) => one.name)], rows, "places");
}
function show(user) {
  const place = document.getElementById("user");
  place.replaceChildren(made("h3", `User ${user.id}${user.profile ? `: ${user.profile}` : ""}`, { id: "user-title" }));
  place.append(made("h4", "History, oldest first"));
  place.append(listOf(user.history.map(([title, rating]) => `${title} · ${rating}`), "history"));
  if (user.prompt) {
    const fold = made("details", "", { className: "fold" });
    fold.append(made("summary", "The prompt"), made("pre", user.prompt));
    place.append(fold);
  }
  if (user.first) place.append(made("h4", "The text that rerankers read before any training"), made("p", user.first));
  for (const round of user.rounds) {
    place.append(tableOf(`Round ${round.round}: ${round.texts.length} sampled texts, best reward first`, ["rank", "reward", "pair", "text"],
      round.texts.map((one) => [one.rank ?? "–", shown(one.reward), [one.mark, one.mark], [one.text, "text"]])));
    if (round.others.length) {
      place.append(made("h4", "Other users' texts that a pair of this user has as rejected"), listOf(round.others));
    }
    if (round.after.length) {
      const [before, after] = round.reward ?? [null, null];
      const moved = round.reward ? `: mean reward ${shown(before)} before, ${shown(after)} after` : "";
      place.append(made("h4", `Fresh texts after round ${round.round}${moved}`), listOf(round.after));
    }
  }
  if (user.list?.rankings.length) place.append(ranking(user.list));
}
function browse() {
  const search = document.getElementById("user-search"), list = document.getElementById("user-list");
  const values = (value) => (value !== null && typeof value === "object" ? Object.values(value).map(values).join("\n") : String(value));
  const words = users.map((user) => values(user).toLowerCase());
  const named = (user) => {
    const reward = user.rounds.at(-1)?.reward;
    return reward ? `${user.id}   ${reward[1] >= reward[0] ? "+" : ""}${shown(reward[1] - reward[0], 3)}` : user.id;
  };
  const fill = () => {
    const wanted = search.value.trim().toLowerCase();
    const found = users.map((user, number) => [user, number]).filter(([, number]) => wanted.split(/\s+/).every((word) => words[number].includes(word)));
    found.sort(([one], [two]) => (two.id.toLowerCase() === wanted) - (one.id.toLowerCase() === wanted));
    list.replaceChildren(...found.map(([user, number]) => made("option", named(user), { value: number })));
    document.getElementById("user-count").textContent = `${found.length} of ${users.length} users`;
    if (found.length) {
      list.selectedIndex = 0;
      show(found[0][0]);
    } else document.getElementById("user").replaceChildren(made("h3", "No such user here", { id: "user-title" }));
  };
  search.addEventListener("input", fill);
  list.addEventListener("change", () => show(users[Number(list.value)]));
  fill();
}
if (users.length) browse();
