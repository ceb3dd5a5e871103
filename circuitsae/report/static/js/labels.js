// Texts beside the marks: all logits, one below the other where they would cover each other; and of features as many as
// there is room for, the most influential first.
(function (viewer) {
  "use strict";

  const { nodes, LINE, measureText } = viewer;
  const FEW = 80; // items; among more no feature is named
  const [LEFT, RIGHT] = [-1, 1];
  const GAP = 9; // pixels from the middle of a mark to its text
  const LONGEST = 26;

  const visible = ({ x, y }, view) =>
    x >= view.left && x <= view.left + view.plotWidth && y >= view.top && y <= view.top + view.plotHeight;

  const at = (item, view) => ({ x: view.x(item.x), y: view.y(item.y) });

  // Down the right side of the logits, in the order in which they stand; pushed apart, then back up from the lower end.
  function logitTexts(items, view) {
    const marks = items
      .filter(({ node }) => node >= 0 && viewer.tops.includes(node) && nodes.kind[node] === "logit")
      .map((item) => ({ node: item.node, ...at(item, view) }))
      .filter((mark) => visible(mark, view))
      .sort((a, b) => a.y - b.y);
    if (!marks.length) return [];
    const right = Math.max(...marks.map(({ x }) => x));
    const wanted = [];
    for (const { y } of marks) wanted.push(Math.max(y, (wanted.at(-1) ?? -Infinity) + LINE));
    const lowest = view.top + view.plotHeight - LINE / 2;
    for (let k = wanted.length - 1; k >= 0; k--)
      wanted[k] = Math.min(wanted[k], k === wanted.length - 1 ? lowest : wanted[k + 1] - LINE);
    return marks.map(({ node, x, y }, k) => ({
      text: viewer.logitText(node).join(" "),
      x: right + 16,
      y: wanted[k],
      from: { x: x + 6, y },
      color: "text",
      anchor: "start",
    }));
  }

  const box = ({ text, x, y, anchor }) => {
    const width = measureText(text);
    const left = anchor === "start" ? x : anchor === "end" ? x - width : x - width / 2;
    return { left: left - 3, right: left + width + 3, top: y - LINE / 2, bottom: y + LINE / 2 };
  };
  const clash = (a, b) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;

  function candidates(text, { x, y }) {
    const side = (direction) => ({ text, x: x + direction * GAP, y, anchor: direction < 0 ? "end" : "start" });
    const over = (dy) => ({ text, x, y: y + dy, anchor: "middle" });
    return [side(RIGHT), side(LEFT), over(-LINE - 1), over(LINE + 1)].map((place) => ({ ...place, color: "muted" }));
  }

  // The label, unless there is none that fits or a test spoke against it, or the number.
  function featureText(i) {
    const label = viewer.labelOf(i);
    const words = label && !label.nameless && label.status !== "contradicted" ? label.text : "";
    return viewer.shorten(words || viewer.title(i), LONGEST);
  }

  function featureTexts(items, taken, view) {
    const features = items
      .filter(({ node }) => node >= 0 && nodes.kind[node] === "feature" && nodes.x[node] !== undefined)
      .filter((item) => visible(at(item, view), view))
      .sort((a, b) => b.influence - a.influence || a.node - b.node);
    const inside = (one) => one.left >= view.left && one.right <= view.left + view.plotWidth && one.top >= view.top - 4;
    const made = [];
    for (const item of features) {
      const place = candidates(featureText(item.node), at(item, view)).find(
        (one) => inside(box(one)) && !taken.some((other) => clash(box(one), other)),
      );
      if (!place) continue;
      taken.push(box(place));
      made.push({ ...place, node: item.node });
    }
    return made;
  }

  // Where each text stands, in pixels: { text, x, y, anchor, color }, and `from`, the mark that a line leads to.
  function textMarks(view) {
    const items = viewer.itemsNow().filter(({ shown }) => shown.length);
    const logits = logitTexts(items, view);
    if (items.length > FEW) return logits;
    const marks = items.map((item) => at(item, view));
    const taken = marks.map(({ x, y }) => ({ left: x - 6, right: x + 6, top: y - 5, bottom: y + 5 }));
    return [...logits, ...featureTexts(items, [...taken, ...logits.map(box)], view)];
  }

  Object.assign(viewer, { textMarks });
})((window.viewer ??= {}));
