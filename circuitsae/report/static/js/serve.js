// The page with its model behind it (`circuitsae serve`): changes of nodes and tests of edges are run, and labels,
// pins, groups and notes are kept in the graph's folder. A page without a server goes without this file.
(function (viewer) {
  "use strict";

  const { page, nodes, state, element, button, text } = viewer;
  const POLL = 200;
  const PAUSE = 500;
  const OPERATIONS = {
    zero: { name: "remove" },
    scale: { name: "scale by", hint: "a number, such as 2", usual: "2" },
    patch: { name: "take from another prompt", hint: "a prompt as long as this one" },
    replace: { name: "replace by feature", hint: "LAYER.INDEX, or a token for a token" },
  };
  const wanted = { operation: "zero", value: "", on: "node" }; // from node to node
  let run = null; // that is under way
  let last = null; // what came of the last one, or why nothing did

  async function ask(method, path, body) {
    const sent = body && { headers: { "content-type": "application/json" }, body: JSON.stringify(body) };
    const response = await fetch(path, { method, ...sent });
    const found = await response.json();
    if (!response.ok) throw new Error(found.error);
    return found;
  }

  // Begins a run and follows it to its end; `told` hears what it is at.
  async function follow(asked, told) {
    try {
      run = await ask("POST", "runs", asked);
      while (run.state === "running") {
        told(run.step);
        await new Promise((done) => setTimeout(done, POLL));
        run = await ask("GET", `runs/${run.number}`);
      }
      if (run.state === "failed") throw new Error(run.error);
      if (run.state === "cancelled") throw new Error("Cancelled");
      return run.result;
    } finally {
      run = null;
    }
  }

  const cancel = () => run && ask("DELETE", `runs/${run.number}`).catch((error) => viewer.warn(error.message));

  // Nodes that can be changed together: this one, its group, all that is pinned.
  function choices(i) {
    const group = viewer.groupOf(i);
    const found = { node: ["this node", [i]] };
    const several = (members) => [...members].filter(viewer.changeable);
    if (group) found.group = [`group ${viewer.shorten(group.name, 30)}`, several(group.members)];
    if (state.pins.size > 1) found.pins = ["all pinned nodes", several(state.pins)];
    return found;
  }

  function select(label, rows, chosen, take) {
    const options = Object.entries(rows).map(([value, name]) => element("option", { value }, name));
    const made = element("select", { "aria-label": label, onchange: () => take(made.value) }, ...options);
    made.value = chosen;
    return made;
  }

  // `redraw` where the fields themselves change, `refill` where only the commands do: a button that is being pressed
  // must stay.
  function fields(i, redraw, refill) {
    const rows = choices(i);
    const { hint, usual } = OPERATIONS[wanted.operation];
    const value = element("input", {
      "aria-label": hint,
      placeholder: hint,
      spellcheck: "false",
      oninput: () => ((wanted.value = value.value), refill()),
    });
    if (hint) value.value = wanted.value ||= usual ?? "";
    const names = Object.fromEntries(Object.entries(OPERATIONS).map(([key, { name }]) => [key, name]));
    const members = Object.fromEntries(Object.entries(rows).map(([key, [name]]) => [key, name]));
    const operation = select("What to do", names, wanted.operation, (chosen) => {
      Object.assign(wanted, { operation: chosen, value: "" });
      redraw();
    });
    const on = (chosen) => ((wanted.on = chosen), refill());
    return [
      operation,
      hint ? value : null,
      Object.keys(rows).length > 1 ? select("With which nodes", members, wanted.on, on) : null,
    ];
  }

  // The form, what the run is at, what came of it, and the commands for the same.
  function askForm(i, foreseen) {
    const box = element("section", { class: "in-model", "aria-label": "In the model" });
    const status = element("p", { class: "hint", role: "status" });
    const stops = button("Cancel", cancel, { class: "cancel", hidden: "" });
    const starts = element("button", { type: "submit" }, "Run");
    const folded = element("details", { class: "commands" }, element("summary", {}, "Commands"));
    if (!choices(i)[wanted.on]) wanted.on = "node";
    const members = () => choices(i)[wanted.on][1];

    const busy = (step) => {
      status.textContent = step ? `${step} …` : "";
      starts.disabled = Boolean(step);
      stops.hidden = !step;
    };

    async function start() {
      const value = wanted.operation === "scale" ? Number(wanted.value) : wanted.value;
      const asked = { nodes: members().map((m) => nodes.id[m]), operation: wanted.operation, value };
      busy("asking");
      try {
        last = { result: await follow(asked, busy) };
        viewer.say("The run is done");
      } catch (error) {
        last = { error: error.message };
      }
      viewer.runs += 1;
      busy("");
      viewer.redrawPanel();
    }

    function refill() {
      const found = viewer.changeCommands(members(), wanted.operation, wanted.value);
      folded.replaceChildren(folded.firstChild, ...viewer.commandBlocks(found).filter(Boolean));
      folded.hidden = !found;
    }

    function draw() {
      const form = element("form", { autocomplete: "off" }, ...fields(i, redraw, refill), starts, stops);
      form.addEventListener("submit", (event) => (event.preventDefault(), start()));
      const found = last?.result?.changed.includes(nodes.id[i]) ? viewer.outcome(last.result) : null;
      const failed = last?.error ? element("p", { class: "failed", role: "alert" }, text(last.error)) : null;
      const parts = [element("h3", {}, "In the model"), foreseen, form, status, failed, found, folded, labelForm(i)];
      box.replaceChildren(...parts.filter(Boolean));
      refill();
      busy(run ? run.step : "");
    }

    const redraw = () => (draw(), box.querySelector("select").focus());
    draw();
    return box;
  }

  // A test of one edge, whose verdict is written below it.
  function testForm(e) {
    const status = element("p", { class: "hint", role: "status" });
    const found = element("div", { class: "test" });
    const stops = button("Cancel", cancel, { class: "cancel", hidden: "" });
    const starts = button("Test this edge", start, { class: "run" });

    async function start() {
      starts.disabled = !(stops.hidden = false);
      try {
        const result = await follow({ edge: viewer.endsOf(e) }, (step) => (status.textContent = `${step} …`));
        const tests = viewer.readTests(result.tests);
        const claim = tests.claims.includes(state.claim) ? state.claim : tests.claims[0];
        found.replaceChildren(viewer.badge(tests.verdict(claim, e)), ...viewer.testDetails(tests, e));
        status.textContent = "Tested alone: no verdict on other edges was weighed against it.";
      } catch (error) {
        status.textContent = error.message;
      }
      starts.disabled = !(stops.hidden = true);
    }

    return element("div", { class: "in-model" }, element("div", {}, starts, stops), status, found);
  }

  // A feature's label, kept in the graph's own ledger: a hypothesis like any other.
  function labelForm(i) {
    if (nodes.kind[i] !== "feature") return null;
    const key = `${nodes.layer[i]}.${nodes.index[i]}`;
    const field = element("input", { "aria-label": `Label of ${key}`, placeholder: "what it stands for" });
    const before = viewer.labelOf(i)?.text ?? "";
    field.value = before;
    const saves = element("button", {}, "Save label");
    const form = element("form", { class: "label-form", autocomplete: "off" }, field, saves);
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      if (field.value === before) return; // what others said is not made this reader's
      try {
        const { label } = await ask("PUT", `labels/${key}`, { text: field.value });
        (page.labels ??= {})[key] = label;
        if (!label) delete page.labels[key];
        viewer.changed("pins");
        viewer.say("The label is kept in the graph's folder");
      } catch (error) {
        viewer.warn(error.message);
      }
    });
    return form;
  }

  const written = () => ({
    pinned: viewer.loosePins().map((i) => nodes.id[i]),
    groups: state.groups.map(({ name, members }) => [name, ...[...members].map((i) => nodes.id[i])]),
    note: state.graphNote,
    notes: Object.fromEntries([...state.notes].map(([i, note]) => [nodes.id[i], note])),
  });

  // Pins, groups and notes are kept as they change, the last of a burst.
  function startServing() {
    let kept = JSON.stringify(written());
    let pending = 0;
    const keep = async () => {
      const now = JSON.stringify(written());
      if (now === kept) return;
      try {
        await ask("PUT", "opened", JSON.parse(now));
        kept = now;
        document.documentElement.dataset.kept = String(Number(document.documentElement.dataset.kept ?? 0) + 1);
      } catch (error) {
        viewer.warn(error.message);
      }
    };
    viewer.on("change", () => {
      clearTimeout(pending);
      pending = setTimeout(keep, PAUSE);
    });
  }

  Object.assign(viewer, { runs: 0, askForm, testForm, startServing }); // `runs`: how many have come to an end
})((window.viewer ??= {}));
