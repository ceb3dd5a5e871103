// Links to other pages. Knows no graph, so that every page can use it.
//
// `ways`: what lay beside the page when it was written, { href, text }. An index adds to its links how many folders up
// it is, so that a page that was written before it leads back to it.
(function (viewer) {
  "use strict";

  const INDEX = { text: "All graphs" };
  const said = () => new URLSearchParams(location.hash.slice(1)).get("up") ?? "";
  const up = /^[0-3]$/.test(said()) ? said() : null;

  // Addresses of files beside the page alone, whatever its data say.
  const inside = ({ href }) => !/^[a-z][a-z0-9+.-]*:|^[/\\]/i.test(href);

  function fillWays(ways, theme) {
    const back = up === null ? [] : [{ ...INDEX, href: `${"../".repeat(Number(up))}index.html` }];
    const known = (ways ?? []).filter((way) => inside(way) && !(up !== null && way.text === INDEX.text));
    const links = [...back, ...known].map(({ href, text }) => {
      const arrow = href.endsWith("index.html") && !href.endsWith("features/index.html") ? "← " : "";
      return viewer.element("a", { href: theme ? `${href}#theme=${theme}` : href }, arrow, viewer.text(text));
    });
    const place = document.getElementById("ways");
    place.replaceChildren(...links);
    place.hidden = !links.length;
  }

  Object.assign(viewer, { fillWays, up });
})((window.viewer ??= {}));
