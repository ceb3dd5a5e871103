// A feature card: what a feature fires on, how strongly, what it does to the output, and the features like it. Draws
// what the card has. Uses dom.js and format.js only, so that the browser of all features shows the same cards.
//
//   viewer.featureCard(card, { linkTo, headings }) -> Element
//   headings: the level of its headings, 3 by default
//   linkTo(layer, feature) -> an address, a function to call on a click, or null where there is nowhere to go
(function (viewer) {
  "use strict";

  const { element, svg, text, button, number, percent, rate, plural } = viewer;
  const FIRST_EXAMPLES = 4;
  const STATUS = { supported: "confirmed", contradicted: "reversed", hypothesis: "null" };

  // Headings are below that of the node, or of the page, that the card is of.
  let level = 3;
  const section = (title, ...content) =>
    element("section", { class: "card-part" }, element(`h${level}`, { class: "part" }, title), ...content);
  const under = (title) => element(`h${level + 1}`, { class: "under" }, title);

  function facts(card) {
    const known = (value) => value !== null && value !== undefined;
    const of = known(card.tokens_seen) ? ` of ${plural(card.tokens_seen, "token")}` : "";
    const fires = card.dead
      ? `Dead: it never fired${of && ` in${of.slice(3)}`}`
      : `Fires on ${rate(card.firing_rate)}${of}`;
    const sizes = [
      known(card.max_activation) && `strongest ${number(card.max_activation)}`,
      known(card.mean_activation) && `mean when active ${number(card.mean_activation)}`,
    ];
    const rows = [card.dead || known(card.firing_rate) ? fires : null, sizes.filter(Boolean).join(" · ")];
    return rows.filter(Boolean).map((row) => element("p", { class: "hint" }, row));
  }

  // Running text with each token as dark as its activation; the strongest is outlined.
  function example({ tokens, activations, peak }, most) {
    const spans = tokens.flatMap((token, t) => {
      const value = activations[t] ?? 0;
      if (value <= 0 && t !== peak) return [token];
      const [, space, word] = /^( *)(.*)$/su.exec(token); // a line may break at the space, not inside the mark
      const mark = element("mark", { title: number(value), class: t === peak ? "peak" : null }, word || token);
      mark.style.setProperty("--heat", `${Math.round(6 + 38 * Math.min(1, value / most))}%`);
      return word ? [space, mark] : [mark];
    });
    if (typeof spans[0] === "string") spans[0] = spans[0].trimStart();
    const strength = number(activations[peak] ?? Math.max(...activations, 0));
    return element("li", {}, element("span", { class: "number" }, strength), element("p", { dir: "auto" }, ...spans));
  }

  function examples(card) {
    const all = card.examples ?? [];
    if (!all.length) return null;
    const most = Math.max(card.max_activation ?? 0, ...all.flatMap(({ activations }) => activations)) || 1;
    const list = element("ol", { class: "examples" });
    const strata = new Set(all.map(({ stratum }) => stratum ?? "top"));
    let current = "top";
    const add = (from) => {
      for (const item of from) {
        const stratum = item.stratum ?? "top";
        if (stratum !== current) list.append(element("li", { class: "stratum hint" }, `${stratum} of the strongest`));
        current = stratum;
        list.append(example(item, most));
      }
    };
    add(all.slice(0, FIRST_EXAMPLES));
    const more = button(`Show all ${all.length}`, () => (add(all.slice(FIRST_EXAMPLES)), more.remove()), {
      class: "more",
    });
    const title = strata.size > 1 ? "Examples, strongest and in each range" : "Strongest examples";
    return section(title, list, all.length > FIRST_EXAMPLES ? more : null);
  }

  // Heights are square roots: the many weak activations must not flatten the few strong ones.
  function histogram({ histogram: bins }) {
    const total = bins?.counts?.reduce((sum, n) => sum + n, 0) ?? 0;
    if (!total) return null;
    const { edges, counts } = bins;
    const [width, height, most] = [100, 36, Math.sqrt(Math.max(...counts))];
    const step = width / counts.length;
    const bars = counts.map((n, b) => {
      const tall = n ? Math.max(1, (height * Math.sqrt(n)) / most) : 0;
      const range = `${number(edges[b])} to ${number(edges[b + 1])}: ${plural(n, "token")}`;
      return svg("rect", { x: b * step, y: height - tall, width: 0.86 * step, height: tall }, svg("title", {}, range));
    });
    const fullest = counts.indexOf(Math.max(...counts));
    const summary =
      `Histogram of ${plural(total, "non-zero activation")} from ${number(edges[0])} to ${number(edges.at(-1))}; ` +
      `most, ${plural(counts[fullest], "token")}, from ${number(edges[fullest])} to ${number(edges[fullest + 1])}`;
    const drawing = svg(
      "svg",
      {
        class: "histogram",
        viewBox: `0 0 ${width} ${height}`,
        preserveAspectRatio: "none",
        role: "img",
        "aria-label": summary,
      },
      ...bars,
    );
    const axis = element(
      "p",
      { class: "axis hint" },
      element("span", {}, number(edges[0])),
      element("span", {}, number(edges.at(-1))),
    );
    return section("Activations (√ of the count)", drawing, axis);
  }

  function logits(title, rows, sign) {
    const most = Math.max(...rows.map(({ value }) => Math.abs(value ?? 0))) || 1;
    const items = rows.map(({ token, value }) =>
      element(
        "li",
        {},
        element("span", { class: "token" }, text(token)),
        viewer.meter(Math.abs(value ?? 0) / most, sign),
        element("span", { class: "number" }, number(value)),
      ),
    );
    return element("div", {}, under(title), element("ol", { class: "logits" }, ...items));
  }

  function effects(card) {
    const [top, bottom] = [card.top_logits ?? [], card.bottom_logits ?? []];
    if (!top.length && !bottom.length) return null;
    return section(
      "Direct effect on the logits",
      element(
        "div",
        { class: "columns" },
        top.length ? logits("raises", top, "positive") : null,
        bottom.length ? logits("lowers", bottom, "negative") : null,
      ),
    );
  }

  // `write`: what is said of a row beside its feature.
  function similar(title, rows, linkTo, write) {
    const items = rows.map((row) => {
      const { layer, feature, label } = row;
      const name = `${layer}.${feature}`;
      const way = linkTo?.(layer, feature) ?? null;
      const link =
        typeof way === "function"
          ? button(name, way, { class: "link" })
          : way === null
            ? element("span", {}, name)
            : element("a", { href: way }, name);
      return element("li", {}, link, label ? text(label) : null, element("span", { class: "number" }, write(row)));
    });
    return element("div", {}, under(title), element("ol", { class: "similar" }, ...items));
  }

  function relatives(card, linkTo) {
    const [fires, points] = [card.neighbours ?? [], card.nearest ?? []];
    if (!fires.length && !points.length) return null;
    return section(
      "Features like it",
      element(
        "div",
        { class: "columns" },
        fires.length ? similar("active together", fires, linkTo, ({ score }) => percent(score)) : null,
        points.length ? similar("nearest in direction", points, linkTo, ({ score }) => number(score)) : null,
      ),
    );
  }

  // TWERA, with the virtual weight that it is made of.
  function connections(card, linkTo) {
    const [inputs, outputs] = [card.inputs ?? [], card.outputs ?? []];
    if (!inputs.length && !outputs.length) return null;
    const write = ({ twera, weight }) => element("span", { title: `virtual weight ${number(weight)}` }, number(twera));
    return section(
      "Over the corpus",
      element(
        "div",
        { class: "columns" },
        inputs.length ? similar("inputs", inputs, linkTo, write) : null,
        outputs.length ? similar("outputs", outputs, linkTo, write) : null,
      ),
    );
  }

  // A label says whether it was tested; what the tests found is behind a click.
  function featureLabel(label) {
    if (!label) return null;
    const badge = element("span", { class: `badge ${STATUS[label.status] ?? "null"}` }, label.status ?? "hypothesis");
    const display = label.display ?? label.text;
    const once = display === `${label.status}: ${label.text}` ? label.text : display; // the badge says the status
    const claim = element("span", {}, badge, text(once));
    const evidence = label.evidence ?? [];
    if (!evidence.length) return element("p", { class: "label" }, claim);
    const rows = evidence.map((row) => element("li", {}, text(row)));
    return element("details", { class: "label" }, element("summary", {}, claim), element("ul", {}, ...rows));
  }

  function featureCard(card, { linkTo = null, headings = 3 } = {}) {
    level = headings;
    const related = [relatives(card, linkTo), connections(card, linkTo)];
    const parts = [...facts(card), examples(card), histogram(card), effects(card), ...related];
    return element("article", { class: "card" }, featureLabel(card.label), ...parts);
  }

  Object.assign(viewer, { featureCard, featureLabel });
})((window.viewer ??= {}));
