// Building elements. Strings become text nodes, never markup: tokens are untrusted. Knows no graph.
(function (viewer) {
  "use strict";

  const SVG = "http://www.w3.org/2000/svg";

  function fill(made, attributes, children) {
    for (const [key, value] of Object.entries(attributes)) {
      if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
      else if (value !== null && value !== undefined) made.setAttribute(key, value);
    }
    made.append(...children.filter((child) => child !== null && child !== undefined));
    return made;
  }

  const element = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
  const svg = (tag, attributes = {}, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);
  const button = (label, onclick, attributes = {}) =>
    element("button", { type: "button", onclick, ...attributes }, label);

  const text = (value) => element("bdi", {}, value);

  function meter(share, className = "") {
    const bar = element("span");
    bar.style.width = `${Math.min(100, 100 * (share ?? 0))}%`;
    return element("span", { class: `meter ${className}`, "aria-hidden": "true" }, bar);
  }

  // A sign that is read aloud as a word.
  const symbol = (glyph, meaning, className = "") =>
    element("span", { class: `symbol ${className}`, role: "img", "aria-label": meaning, title: meaning }, glyph);

  // plotly.js reads a subset of HTML in its labels; this makes it show the text itself.
  function plotlyText(value) {
    const escaped = value.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
    return `\u2068${escaped}\u2069`;
  }

  // A drawing may be saved: what XML cannot hold, whatever a token or a name says, is replaced.
  const clean = (value) => value.replace(/[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\u{10000}-\u{10ffff}]/gu, "\ufffd");

  // Running text as `printable` of report/text.py makes it: controls and what turns the reading direction get a form.
  const UNSEEN = /[\p{Cc}\p{Cs}\p{Zl}\p{Zp}\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]/gu;
  const printable = (value) =>
    value.replace(UNSEEN, (one) => `\\u${one.codePointAt(0).toString(16).padStart(4, "0")}`);

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

  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

  const words = { plotlyText, clean, printable, shorten };
  Object.assign(viewer, { element, svg, button, text, meter, symbol, throttled, color, ...words });
})((window.viewer ??= {}));
