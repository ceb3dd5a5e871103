// Inside a notebook's widget: what is chosen, pinned and grouped goes to the page around this one, and comes from it.
(function (viewer) {
  "use strict";

  const { state, nodes } = viewer;
  const ids = (members) => [...members].map((i) => nodes.id[i]);

  // Groups by their names, of which a second one gets a number.
  function groups() {
    const named = new Map();
    for (const { name, members } of state.groups) {
      let own = name;
      for (let n = 2; named.has(own); n++) own = `${name} (${n})`;
      named.set(own, ids(members));
    }
    return Object.fromEntries(named);
  }

  const chosen = () => ({
    chosen: nodes.id[state.selected] ?? null,
    pinned: ids(viewer.loosePins()),
    groups: groups(),
  });

  // Through the address, which drops what this graph does not have.
  function choose(wanted) {
    const parameters = new URLSearchParams();
    viewer.writeAddress(parameters);
    for (const name of ["node", "pin", "group"]) parameters.delete(name);
    parameters.append("node", wanted.chosen ?? "");
    for (const id of ["", ...wanted.pinned]) parameters.append("pin", id);
    for (const group of Object.entries(wanted.groups)) parameters.append("group", JSON.stringify(group.flat()));
    viewer.restore(viewer.readAddress(parameters));
  }

  function startEmbedded() {
    if (!viewer.page.embedded) return;
    const tell = (message) => window.parent.postMessage({ circuitsae: message }, "*");
    let told = JSON.stringify(chosen());
    const report = () => {
      const now = chosen();
      if (told === JSON.stringify(now)) return;
      told = JSON.stringify(now);
      tell(now);
    };
    window.addEventListener("message", ({ source, data }) => {
      if (source !== window.parent || !data?.circuitsae) return;
      told = JSON.stringify(data.circuitsae);
      if (told !== JSON.stringify(chosen())) choose(data.circuitsae);
      report();
    });
    viewer.on("change", report);
    tell("ready");
  }

  Object.assign(viewer, { startEmbedded });
})((window.viewer ??= {}));
