// Building elements. Strings become text nodes, never markup: tokens are untrusted.
(function (viewer) {
  "use strict";

  function element(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) {
      if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
      else if (value !== null && value !== undefined) made.setAttribute(key, value);
    }
    made.append(...children.filter((child) => child !== null && child !== undefined));
    return made;
  }

  const text = (value) => element("bdi", {}, value);

  function meter(share, className = "") {
    const bar = element("span");
    bar.style.width = `${Math.min(100, 100 * (share ?? 0))}%`;
    return element("span", { class: `meter ${className}`, "aria-hidden": "true" }, bar);
  }

  const nodeName = (i) => text(viewer.name(i));

  function nodePlace(i) {
    const [position, token] = viewer.place(i);
    return element("span", { class: "place" }, `${position} `, text(token));
  }

  // plotly.js reads a subset of HTML in its labels; this makes it show the text itself.
  function plotlyText(value) {
    const escaped = value.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
    return `\u2068${escaped}\u2069`;
  }

  function shorten(value, width) {
    const characters = Array.from(value);
    return characters.length <= width ? value : `${characters.slice(0, width - 1).join("")}…`;
  }

  // One animation frame's worth of calls becomes one.
  function throttled(action) {
    let waiting = false;
    return () => {
      if (waiting) return;
      waiting = true;
      requestAnimationFrame(() => {
        waiting = false;
        action();
      });
    };
  }

  function theme() {
    const wanted = viewer.state.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
    document.documentElement.dataset.theme = wanted;
    return wanted;
  }

  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

  Object.assign(viewer, { element, text, meter, nodeName, nodePlace, plotlyText, shorten, throttled, theme, color });
})((window.viewer ??= {}));
