// On paper: the graph as one vector picture, panels as text, everything light, nothing folded that has the figures.
(function (viewer) {
  "use strict";

  const OPENED = "#figures, #graph-note:has(textarea:not(:placeholder-shown)), #supergraph-sums, .group > details";
  let opened = null; // what was unfolded for the paper; null while there is none

  function before() {
    if (opened) return;
    opened = [...document.querySelectorAll(OPENED)].filter((one) => !one.open);
    for (const one of opened) one.open = true;
    document.documentElement.dataset.theme = "light";
    viewer.drawSupergraph();
    const picture = viewer.graphPicture();
    picture.id = "print-picture";
    picture.setAttribute("role", "img");
    document.querySelector(".stage").append(picture);
  }

  function after() {
    if (!opened) return;
    document.getElementById("print-picture")?.remove();
    for (const one of opened) one.open = false;
    opened = null;
    viewer.theme();
    viewer.drawSupergraph();
  }

  function startPrint() {
    addEventListener("beforeprint", before);
    addEventListener("afterprint", after);
  }

  Object.assign(viewer, { startPrint });
})((window.viewer ??= {}));
