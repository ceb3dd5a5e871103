// The list of features: search, filters, order, and all of it in the address, so that going back restores it.
(function (viewer) {
  "use strict";

  const { element, text, number, rate, countText, plural } = viewer;
  const page = JSON.parse(document.getElementById("list-data").textContent);
  const { features, vocabulary, statuses } = page;
  const total = features.layer.length;
  const ROWS = 200;
  const RATES = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 0.5];
  const byId = (id) => document.getElementById(id);
  const name = (i) => `${features.layer[i]}.${features.feature[i]}`;

  const rates = [["", "any share"], ...RATES.map((value) => [String(value), rate(value)])];
  const CHOICES = {
    layer: [["", "all"], ...[...new Set(features.layer)].map((layer) => [String(layer), String(layer)])],
    least: rates,
    most: rates,
    dead: [
      ["", "shown"],
      ["no", "hidden"],
      ["only", "only"],
    ],
    status: [
      ["", "any or none"],
      ["none", "none"],
      ["any", "any"],
      ...statuses.slice(1).map((status) => [status, status]),
    ],
    sort: [
      ["", "id"],
      ["often", "most often"],
      ["rare", "least often"],
      ["strong", "strongest"],
      ["label", "label"],
    ],
  };
  const ORDERS = {
    often: (a, b) => features.rate[b] - features.rate[a],
    rare: (a, b) => features.rate[a] - features.rate[b],
    strong: (a, b) => features.max[b] - features.max[a],
    label: (a, b) => !features.label[a] - !features.label[b] || features.label[a].localeCompare(features.label[b]),
  };
  const folded = (value) => value.toLowerCase();
  const foldedTokens = vocabulary.map(folded);
  const foldedLabels = features.label.map(folded);
  const state = { query: "", layer: "", least: "", most: "", dead: "", status: "", sort: "", theme: "" };
  let shown = [];
  let drawn = 0;

  // Ids match from their start, labels and tokens anywhere, whatever the case.
  function matcher(query) {
    const wanted = folded(query.trim());
    if (!wanted) return () => true;
    const tokens = new Set(foldedTokens.flatMap((token, t) => (token.includes(wanted) ? [t] : [])));
    return (i) =>
      name(i).startsWith(wanted) || foldedLabels[i].includes(wanted) || features.tokens[i].some((t) => tokens.has(t));
  }

  function passes(i) {
    const dead = features.rate[i] === 0;
    const status = statuses[features.status[i]];
    if (state.layer !== "" && String(features.layer[i]) !== state.layer) return false;
    if (state.least !== "" && features.rate[i] < Number(state.least)) return false;
    if (state.most !== "" && features.rate[i] > Number(state.most)) return false;
    if ((state.dead === "no" && dead) || (state.dead === "only" && !dead)) return false;
    if (state.status === "none") return status === "";
    return state.status === "" || (state.status === "any" ? status !== "" : status === state.status);
  }

  const words = (list) =>
    list.flatMap((t, n) => [n ? " " : "", element("span", { class: "token" }, text(vocabulary[t]))]);

  function row(i) {
    const dead = features.rate[i] === 0;
    const file = `cards/${features.layer[i]}-${Math.floor(features.feature[i] / page.per_page)}.html`;
    const theme = state.theme && `&theme=${state.theme}`;
    return element(
      "tr",
      { class: dead ? "dead" : null },
      element("th", { scope: "row" }, element("a", { href: `${file}#${name(i)}${theme}` }, name(i))),
      element("td", { class: "number" }, dead ? "dead" : rate(features.rate[i])),
      element("td", { class: "number" }, dead ? "" : number(features.max[i])),
      element("td", {}, text(features.label[i])),
      element("td", {}, ...words(features.peaks[i])),
      element("td", {}, ...words(features.raises[i])),
    );
  }

  function draw() {
    const next = shown.slice(drawn, drawn + ROWS);
    byId("rows").append(...next.map(row));
    drawn += next.length;
    byId("more").hidden = drawn === shown.length;
    byId("more").textContent = `Show ${countText(Math.min(ROWS, shown.length - drawn))} more`;
  }

  function update() {
    const matches = matcher(state.query);
    shown = [];
    for (let i = 0; i < total; i++) if (passes(i) && matches(i)) shown.push(i);
    if (ORDERS[state.sort]) shown.sort((a, b) => ORDERS[state.sort](a, b) || a - b);
    byId("count").textContent = `${countText(shown.length)} of ${plural(total, "feature")}`;
    byId("rows").replaceChildren();
    drawn = 0;
    draw();
  }

  function writeHash() {
    const said = new URLSearchParams(Object.entries(state).filter(([, value]) => value !== ""));
    history.replaceState(null, "", `#${said}`);
  }

  function readHash() {
    const said = new URLSearchParams(location.hash.slice(1));
    for (const key of Object.keys(state)) {
      const value = said.get(key) ?? "";
      state[key] = !CHOICES[key] || CHOICES[key].some(([choice]) => choice === value) ? value.slice(0, 200) : "";
      if (byId(key) && key !== "theme") byId(key).value = state[key];
    }
    viewer.setTheme(state.theme);
    viewer.fillWays(page.ways, state.theme);
    update();
  }

  function change(key, value) {
    state[key] = value;
    writeHash();
    update();
  }

  byId("title").append(text(page.title));
  byId("about").textContent = page.about;
  for (const [key, choices] of Object.entries(CHOICES)) {
    byId(key).append(...choices.map(([value, label]) => element("option", { value }, label)));
    byId(key).addEventListener("change", (event) => change(key, event.target.value));
  }
  byId("query").addEventListener("input", (event) => change("query", event.target.value));
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  byId("more").addEventListener("click", draw);
  addEventListener("hashchange", readHash);
  addEventListener("keydown", (event) => {
    if (event.key !== "/" || /^(INPUT|SELECT)$/.test(event.target.tagName)) return;
    event.preventDefault();
    byId("query").focus();
  });
  viewer.startTheme((theme) => {
    change("theme", theme ?? ""); // the links name it
    viewer.fillWays(page.ways, state.theme);
  });
  readHash();
  document.documentElement.dataset.ready = "";
})((window.viewer ??= {}));
