// The first page where every layer has its own list: the theme, and links to other pages.
(function (viewer) {
  "use strict";

  const { ways } = JSON.parse(document.getElementById("contents-data").textContent);
  const said = new URLSearchParams(location.hash.slice(1)).get("theme");

  viewer.fillWays(ways, viewer.setTheme(said));
  viewer.startTheme((theme) => viewer.fillWays(ways, theme));
  document.documentElement.dataset.ready = "true";
})((window.viewer ??= {}));
