// One card of a block of features, the one that the address names, with the way to its neighbours and back to the list.
(function (viewer) {
  "use strict";

  const page = JSON.parse(document.getElementById("cards-data").textContent);
  const names = page.cards.map((card) => `${card.layer}.${card.feature}`);
  const byId = (id) => document.getElementById(id);
  let theme = "";

  const file = (layer, feature) => `${layer}-${Math.floor(feature / page.per_page)}.html`;
  const exists = (layer, feature) => page.widths[layer] !== undefined && feature >= 0 && feature < page.widths[layer];
  const themed = (address) => (theme ? `${address}&theme=${theme}` : address);
  const linkTo = (layer, feature) =>
    exists(layer, feature) ? themed(`${file(layer, feature)}#${layer}.${feature}`) : null;

  function lead(id, layer, feature, label) {
    const way = linkTo(layer, feature);
    byId(id).hidden = way === null;
    if (way !== null) byId(id).href = way;
    byId(id).textContent = label;
  }

  function show() {
    const [name, ...rest] = location.hash.slice(1).split("&");
    theme = new URLSearchParams(rest.join("&")).get("theme") ?? "";
    if (!["light", "dark"].includes(theme)) theme = "";
    viewer.setTheme(theme);
    const card = page.cards[Math.max(0, names.indexOf(name))];
    const { layer, feature } = card;
    byId("name").textContent = `Feature ${layer}.${feature}`;
    document.title = `${layer}.${feature} · ${page.title}`;
    lead("previous", layer, feature - 1, `← ${layer}.${feature - 1}`);
    lead("next", layer, feature + 1, `${layer}.${feature + 1} →`);
    byId("back").href = `../${page.back}${theme ? `#theme=${theme}` : ""}`;
    byId("card").replaceChildren(viewer.featureCard(card, { linkTo, headings: 2 }));
  }

  addEventListener("hashchange", show);
  viewer.startTheme((chosen) => {
    history.replaceState(null, "", `#${location.hash.slice(1).split("&")[0]}${chosen ? `&theme=${chosen}` : ""}`);
    show();
  });
  show();
  document.documentElement.dataset.ready = "";
})((window.viewer ??= {}));
