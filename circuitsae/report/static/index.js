// The table of a folder's graphs: searched, sorted, and restored from the address.
(function (viewer) {
  "use strict";

  const { element, text, number, percent, plural, countText: whole, CLAIMS, VERDICTS } = viewer;
  const data = JSON.parse(document.getElementById("index-data").textContent);
  const byId = (id) => document.getElementById(id);
  const search = byId("search");
  const body = byId("graphs").tBodies[0];

  const tested = (row) => Object.values(row.verdicts).reduce((sum, count) => sum + count, 0);

  // Of each column: its title, what it sorts by, and what it shows.
  const COLUMNS = [
    { key: "prompt", title: "Prompt", sort: (r) => (r.prompt ?? [r.name]).join(""), show: prompt },
    { key: "model", title: "Model", sort: (r) => r.model, show: (r) => [text(r.model)] },
    { key: "logit", title: "Top logit", sort: (r) => r.probability, show: logit, numeric: true },
    {
      key: "replacement",
      title: "Replacement",
      sort: (r) => r.replacement,
      show: (r) => [number(r.replacement)],
      numeric: true,
    },
    {
      key: "completeness",
      title: "Completeness",
      sort: (r) => r.completeness,
      show: (r) => [number(r.completeness)],
      numeric: true,
    },
    {
      key: "tested",
      title: "Tested edges",
      sort: (r) => (tested(r) ? (r.verdicts.confirmed ?? 0) / tested(r) : null),
      show: verdicts,
      numeric: true,
    },
    { key: "nodes", title: "Nodes", sort: (r) => r.nodes, show: (r) => [whole(r.nodes)], numeric: true },
    { key: "edges", title: "Edges", sort: (r) => r.edges, show: (r) => [whole(r.edges)], numeric: true },
    { key: "date", title: "Saved (UTC)", sort: (r) => r.date, show: (r) => [r.date], numeric: true },
  ];
  const state = { sort: "date", down: true, theme: null };

  // How far up this index is goes with the link, and the theme.
  function linkTo({ href, below }) {
    const said = new URLSearchParams({ up: below, ...(state.theme ? { theme: state.theme } : {}) });
    return `${href}#${said}`;
  }

  function prompt(row) {
    const shown = row.prompt.length > 60 ? [...row.prompt.slice(0, 30), "…", ...row.prompt.slice(-29)] : row.prompt;
    const words = shown.flatMap((token) => [element("wbr"), text(token)]);
    const link = row.href ? element("a", { href: linkTo(row) }, ...words) : element("span", {}, ...words);
    return [link, element("span", { class: "name" }, text(row.name))];
  }

  function logit(row) {
    return row.logit === null
      ? ["–"]
      : [element("span", { class: "token" }, text(row.logit)), ` ${percent(row.probability)}`];
  }

  function verdicts(row) {
    if (!tested(row)) return ["–"];
    const given = Object.entries(row.verdicts).map(([name, count]) => ({ name, count, ...VERDICTS[name] }));
    const { name, says } = CLAIMS[row.claim];
    const what = row.claim === "older" ? name : `${name} claim`;
    const parts = given.flatMap(({ name, count, glyph, word }) => [
      element("span", { class: name, title: `${count} ${word}` }, `${glyph} ${count}`),
      " ",
    ]);
    const words = `${what}: ${given.map(({ count, word }) => `${count} ${word}`).join(", ")}`;
    return [
      element("span", { "aria-hidden": "true" }, ...parts),
      element("span", { class: "name", "aria-hidden": "true", title: says }, what.toLowerCase()),
      element("span", { class: "visually-hidden" }, words),
    ];
  }

  function build(row) {
    const made = element("tr", { role: "row" });
    if (row.problem) {
      const why = element("span", { class: "problem" }, "cannot be read: ", text(row.problem));
      const name = element(
        "th",
        { role: "rowheader", scope: "row", colspan: String(COLUMNS.length - 1) },
        element("span", {}, text(row.name)),
        why,
      );
      const date = { role: "cell", "data-title": "Saved (UTC)", class: "number" };
      made.append(name, element("td", date, row.date));
      return made;
    }
    COLUMNS.forEach((column, c) => {
      const attributes = c ? (column.numeric ? { class: "number" } : {}) : { scope: "row" };
      const role = c ? "cell" : "rowheader"; // said anew where a narrow screen lays rows out as blocks
      made.append(element(c ? "td" : "th", { role, "data-title": column.title, ...attributes }, ...column.show(row)));
    });
    return made;
  }

  const rows = data.rows.map((row) => ({
    row,
    line: build(row),
    haystack: [row.name, row.model, row.logit, (row.prompt ?? []).join(""), (row.prompt ?? []).join(" "), row.problem]
      .join(" ")
      .replaceAll("·", " ")
      .toLowerCase(),
  }));

  // What is missing comes last, whichever way is up.
  function compare(x, y) {
    const { sort } = COLUMNS.find(({ key }) => key === state.sort);
    const [a, b] = [x, y].map(({ row }) =>
      row.problem && state.sort !== "date" && state.sort !== "prompt" ? null : sort(row),
    );
    const missing = (v) => v === null || v === undefined || v === "";
    if (missing(a) || missing(b)) return missing(a) - missing(b);
    const order = typeof a === "number" ? a - b : a < b ? -1 : a > b ? 1 : 0;
    return state.down ? -order : order;
  }

  function refresh() {
    const words = search.value.trim().toLowerCase().split(/\s+/).filter(Boolean);
    const found = rows.filter(({ haystack }) => words.every((word) => haystack.includes(word)));
    body.replaceChildren(...found.sort(compare).map(({ line }) => line));
    const of = found.length === rows.length ? "" : `${found.length} of `;
    byId("count").textContent = of + plural(rows.length, "graph");
    byId("none").hidden = found.length > 0;
    for (const head of document.querySelectorAll("thead th")) {
      const chosen = head.dataset.key === state.sort;
      head.setAttribute("aria-sort", chosen ? (state.down ? "descending" : "ascending") : "none");
    }
  }

  function sortBy(column) {
    state.down = state.sort === column.key ? !state.down : Boolean(column.numeric);
    state.sort = column.key;
    refresh();
    remember();
  }

  function heads() {
    const cells = COLUMNS.map((column) => {
      const button = element(
        "button",
        { type: "button" },
        column.title,
        element("span", { class: "arrow", "aria-hidden": "true" }),
      );
      button.addEventListener("click", () => sortBy(column));
      return element(
        "th",
        { role: "columnheader", scope: "col", "data-key": column.key, ...(column.numeric ? { class: "number" } : {}) },
        button,
      );
    });
    byId("graphs").tHead.append(element("tr", { role: "row" }, ...cells));
  }

  function remember() {
    const parameters = new URLSearchParams();
    if (search.value) parameters.set("q", search.value);
    if (state.sort !== "date" || !state.down) parameters.set("sort", (state.down ? "-" : "") + state.sort);
    if (state.theme) parameters.set("theme", state.theme);
    history.replaceState(null, "", parameters.size ? `#${parameters}` : location.pathname + location.search);
  }

  // The links name the theme too.
  function choose(theme) {
    state.theme = theme;
    for (const { row, line } of rows) line.querySelector("a")?.setAttribute("href", linkTo(row));
    viewer.fillWays(data.pages, theme);
  }

  function restore() {
    const parameters = new URLSearchParams(location.hash.slice(1));
    const wanted = parameters.get("sort") ?? "-date";
    search.value = parameters.get("q") ?? "";
    choose(viewer.setTheme(parameters.get("theme")));
    if (COLUMNS.some(({ key }) => key === wanted.replace(/^-/, ""))) {
      Object.assign(state, { sort: wanted.replace(/^-/, ""), down: wanted.startsWith("-") });
    }
    refresh();
  }

  // `/` search, ↓ from it into the table, ↑ and ↓ from link to link, Esc clears.
  function onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const links = [...body.querySelectorAll("a")];
    const at = links.indexOf(document.activeElement);
    if (event.key === "/" && document.activeElement !== search) search.focus();
    else if (event.key === "Escape" && document.activeElement === search) {
      search.value = "";
      refresh();
      remember();
    } else if (event.key === "ArrowDown" && (at >= 0 || document.activeElement === search)) links[at + 1]?.focus();
    else if (event.key === "ArrowUp" && at >= 0) (links[at - 1] ?? search).focus();
    else return;
    event.preventDefault();
  }

  document.title = data.title;
  byId("title").append(text(data.title));
  heads();
  restore();
  viewer.startTheme((theme) => {
    choose(theme);
    remember();
  });
  search.addEventListener("input", () => {
    refresh();
    remember();
  });
  byId("filter").addEventListener("submit", (event) => event.preventDefault());
  document.addEventListener("keydown", onKey);
  window.addEventListener("hashchange", restore);
  document.documentElement.dataset.ready = "true";
})((window.viewer ??= {}));
