// Predicted against measured effects of one claim, each edge a mark; on a square-root scale, which keeps lines through
// the middle straight: the diagonal, and ½ and 2 beside it.
(function (viewer) {
  "use strict";

  const { svg, edges, nodes, clean, number, VERDICTS, CLAIMS } = viewer;
  const SIZE = 300;
  const MARGIN = 26;

  const root = (value) => Math.sign(value) * Math.sqrt(Math.abs(value));

  function points(claim) {
    return viewer.tests.edges.flatMap((e) => {
      const { predicted = null, measured = null } = viewer.tests.found(claim, e) ?? {};
      const shown = viewer.edgeShown[e] && predicted !== null && measured !== null;
      return shown ? [{ e, predicted, measured, verdict: viewer.tests.verdict(claim, e) }] : [];
    });
  }

  // The wedge of ratios from ½ to 2, to either side of the middle.
  function wedge(at, most) {
    const [half, far] = [most / 2, most];
    const corners = (s) => [[0, 0], [s * far, s * half], [s * far, s * far], [s * half, s * far]];
    const path = (s) => `M${corners(s).map(([x, y]) => `${at(x)},${SIZE - at(y)}`).join("L")}z`;
    return svg("path", { class: "wedge", d: path(1) + path(-1) });
  }

  function mark({ e, predicted, measured, verdict }, at) {
    const name = `${nodes.id[edges.source[e]]} → ${nodes.id[edges.target[e]]}`;
    const title = `${name}: predicted ${number(predicted)}, measured ${number(measured)}, ${VERDICTS[verdict].word}`;
    const place = { cx: at(predicted), cy: Math.round(10 * (SIZE - at(measured))) / 10, r: 3.5 };
    const made = svg("circle", { ...place, class: `dot ${verdict}` }, svg("title", {}, clean(title)));
    made.addEventListener("click", () => viewer.showEdge(e));
    return made;
  }

  function scatter(claim) {
    const found = points(claim);
    if (!found.length) return null;
    const most = Math.max(...found.flatMap((p) => [Math.abs(p.predicted), Math.abs(p.measured)])) || 1;
    const scale = (SIZE / 2 - MARGIN) / root(most);
    const at = (value) => Math.round(10 * (SIZE / 2 + scale * root(value))) / 10;
    const [low, high, middle] = [MARGIN, SIZE - MARGIN, SIZE / 2];
    const words = (x, y, content, anchor = "middle") => svg("text", { x, y, "text-anchor": anchor }, content);
    const label = `${CLAIMS[claim].name}: predicted against measured effects of ${found.length} edges`;
    return svg(
      "svg",
      { class: "scatter", viewBox: `0 0 ${SIZE} ${SIZE}`, role: "img", "aria-label": label },
      wedge(at, most),
      svg("path", { class: "axis", d: `M${low},${middle}H${high}M${middle},${low}V${high}` }),
      svg("path", { class: "diagonal", d: `M${low},${high}L${high},${low}` }),
      words(high, middle + 16, number(most), "end"),
      words(low, middle + 16, number(-most), "start"),
      words(middle, low - 8, "measured"),
      words(high, middle - 6, "predicted", "end"),
      ...found.map((point) => mark(point, at)),
    );
  }

  Object.assign(viewer, { scatter });
})((window.viewer ??= {}));
