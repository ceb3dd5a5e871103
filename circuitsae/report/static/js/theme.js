// Light or dark: what the address says, or else what the reader's system prefers.
(function (viewer) {
  "use strict";

  const preferred = matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;

  function show() {
    const wanted = chosen ?? (preferred.matches ? "dark" : "light");
    document.documentElement.dataset.theme = wanted;
    return wanted;
  }

  // The theme that was chosen, null for any other name.
  function setTheme(theme) {
    chosen = ["light", "dark"].includes(theme) ? theme : null;
    show();
    return chosen;
  }

  // `changed` is told the theme after a click, to write it into the address.
  function startTheme(changed) {
    preferred.addEventListener("change", show);
    document.getElementById("theme").addEventListener("click", () => {
      setTheme(show() === "dark" ? "light" : "dark");
      changed(chosen);
    });
    show();
  }

  Object.assign(viewer, { startTheme, setTheme });
})((window.viewer ??= {}));
