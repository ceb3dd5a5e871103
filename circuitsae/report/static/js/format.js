// How numbers are written. Knows no graph, so that other pages can use it.
(function (viewer) {
  "use strict";

  function number(value) {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    const text = size !== 0 && (size < 1e-3 || size >= 1e5) ? value.toExponential(1) : String(+value.toPrecision(3));
    return text.replaceAll("-", "−");
  }

  function percent(value) {
    if (value === null || value === undefined) return "–";
    const hundredths = 100 * value;
    return hundredths !== 0 && hundredths < 0.1 ? "<0.1 %" : `${hundredths.toFixed(hundredths < 10 ? 1 : 0)} %`;
  }

  // Small rates need their first digits: a feature may fire on one token of a million.
  function rate(value) {
    if (value === null || value === undefined) return "–";
    return value !== 0 && value < 0.001 ? `${number(1e6 * value)} per million` : percent(value);
  }

  const count = (value) => value.toLocaleString("en-US");
  const plural = (value, noun) => `${count(value)} ${noun}${value === 1 ? "" : "s"}`;

  Object.assign(viewer, { number, percent, rate, plural, countText: count });
})((window.viewer ??= {}));
