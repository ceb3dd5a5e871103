// A page of tables and figures: links to other pages, the theme, and figures in the colours of the page.
(function (viewer) {
  "use strict";

  const { ways } = JSON.parse(document.getElementById("document-data").textContent);
  const said = () => new URLSearchParams(location.hash.slice(1)).get("theme");

  function paint() {
    const [ink, line] = [viewer.color("text"), viewer.color("line")];
    for (const figure of document.querySelectorAll(".js-plotly-plot")) {
      const axes = Object.keys(figure._fullLayout).filter((name) => /^[xy]axis\d*$/.test(name));
      const colours = axes.flatMap((axis) => ["gridcolor", "zerolinecolor"].map((name) => [`${axis}.${name}`, line]));
      const clear = { paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", "font.color": ink };
      const narrow = figure.clientWidth < 600 ? { "legend.orientation": "h", "legend.y": -0.15 } : {};
      window.Plotly.relayout(figure, { ...clear, ...Object.fromEntries(colours), ...narrow });
    }
  }

  let theme = viewer.setTheme(said());
  const follow = () => {
    viewer.fillWays(ways, theme);
    paint();
  };
  viewer.startTheme((chosen) => {
    theme = chosen;
    follow();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", follow);
  addEventListener("beforeprint", () => {
    viewer.setTheme("light");
    paint();
  });
  addEventListener("afterprint", () => {
    viewer.setTheme(theme);
    paint();
  });
  follow();
  document.documentElement.dataset.ready = "true";
})((window.viewer ??= {}));
