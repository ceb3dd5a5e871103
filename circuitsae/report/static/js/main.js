// Starts the page. `document.documentElement.dataset.ready` tells tests that the first drawing is done.
(async function (viewer) {
  "use strict";

  viewer.theme();
  viewer.on("theme", viewer.theme);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => viewer.setTheme(viewer.state.theme));
  viewer.fillHeader();
  viewer.startControls();
  viewer.startFilters();
  viewer.startPanel();
  viewer.startNotes();
  viewer.startList();
  viewer.startBench();
  viewer.startExport();
  viewer.startPrint();
  viewer.startKeyboard();
  viewer.startServing?.();
  viewer.comparison?.start();
  await viewer.startPlot();
  viewer.startSupergraph();
  performance.mark("ready");
  document.documentElement.dataset.ready = "true";
  viewer.startEmbedded();
})(window.viewer);
