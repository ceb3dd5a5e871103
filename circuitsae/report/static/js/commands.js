// Commands that repeat in a terminal, or in Python, what the page shows of a node or an edge. They are made in Python,
// with everything quoted that a graph says; here they get ids of nodes and numbers, and nothing else.
(function (viewer) {
  "use strict";

  const { page, nodes, edges, element, button, text, number } = viewer;
  const ID = /^[\w.@+-]+$/;
  const CHANGEABLE = ["feature", "error", "token"];
  const commands = page.commands ?? {};
  const changeable = (i) => CHANGEABLE.includes(nodes.kind[i]) && ID.test(nodes.id[i]);

  const decimal = (value) => (Number.isInteger(Number(value)) ? Number(value).toFixed(1) : String(Number(value)));
  const OPTIONS = {
    zero: () => [" --zero", "Zero()"],
    scale: (value) => [` --scale=${Number(value)}`, `Scale(${decimal(value)})`],
    replace: (value) => [` --replace ${value}`, `Replace(parse_target("${value}"))`],
  };
  const known = (operation, value) =>
    operation === "zero" ||
    (operation === "scale" && Number.isFinite(parseFloat(value)) && Number.isFinite(Number(value))) ||
    (operation === "replace" && /^\d+\.\d+$/.test(value));

  const filled = (halves, middle) => halves && `${halves[0]}${middle}${halves[1]}`;

  // What does `operation` to some nodes at once; null where there is no such command.
  function changeCommands(members, operation, value) {
    if (!commands.intervene || !known(operation, value) || !members.every(changeable)) return null;
    const ids = members.map((i) => nodes.id[i]);
    const [option, call] = OPTIONS[operation](value);
    const features = ids.map((id) => ` --feature ${id}`).join("");
    const changes = ids.map((id) => `Intervention(parse_target("${id}"), ${call})`).join(",\n    ");
    return {
      shell: filled(commands.intervene.shell, `${features}${option}`),
      python: filled(commands.intervene.python, ids.length > 1 ? `[\n    ${changes},\n]` : `[${changes}]`),
    };
  }

  function edgeCommands(e) {
    const [source, target] = viewer.endsOf(e);
    if (!commands.validate || !changeable(edges.source[e]) || !ID.test(target)) return null;
    const edge = `${source} → ${target}`;
    return { shell: filled(commands.validate.shell, edge), python: filled(commands.validate.python, edge) };
  }

  // Where the clipboard is closed, the text is chosen, and copied as a reader would.
  async function copy(code) {
    try {
      await navigator.clipboard.writeText(code.textContent);
    } catch {
      getSelection().selectAllChildren(code);
      if (!document.execCommand("copy")) return viewer.warn("Not copied; the command is chosen, copy it by key");
    }
    viewer.say("Copied");
  }

  function block(title, command) {
    if (!command) return null;
    const parts = command.split(/(--[a-z][a-z0-9-]*)/u); // lines break beside options, not in them
    const words = parts.map((part, p) => (p % 2 ? element("span", { class: "option" }, part) : part));
    const code = element("code", { dir: "ltr" }, ...words);
    const copies = button("Copy", () => copy(code), { "aria-label": `Copy the command for ${title}`, class: "copy" });
    return element(
      "div",
      { class: "command" },
      element("div", { class: "heading" }, element("span", { class: "command-title" }, title), copies),
      element("pre", { tabindex: "0", "aria-label": title }, code),
    );
  }

  const blocks = (found) => (found ? [block("a terminal", found.shell), block("Python", found.python)] : []);

  // What removing a node does to the first of what is explained, as far as the graph tells.
  function foreseen(i) {
    const value = page.foreseen?.removed[i] ?? null;
    if (value === null) return null;
    const target = text(viewer.title(page.foreseen.target).replace(/^→ /u, ""));
    const sum = element("strong", { title: "along all paths that are drawn" }, number(value));
    return element("p", { class: "hint foreseen" }, "Without it the graph foresees ", sum, " on ", target);
  }

  let open = false; // from node to node

  // A chosen node: behind a click without a server, with one to be run at once.
  function nodeInModel(i) {
    if (page.comparison || !changeable(i)) return null;
    if (page.serving) return viewer.askForm(i, foreseen(i));
    if (!commands.intervene) return null;
    const made = element(
      "details",
      { class: "in-model" },
      element("summary", {}, "In the model"),
      foreseen(i),
      ...blocks(changeCommands([i], "zero")),
    );
    made.open = open;
    made.addEventListener("toggle", () => (open = made.open));
    return made;
  }

  // An edge, in the lists of the panel.
  function edgeInModel(e) {
    const found = page.comparison ? null : edgeCommands(e);
    if (!found) return null;
    const about = viewer.endsOf(e).join(" → ");
    const body = element("div");
    const says = { "aria-label": `Test ${about} in the model`, title: "Test it in the model" };
    const summary = element("summary", says, "⋯");
    const made = element("details", { class: "edge-model" }, summary, body);
    const show = () => body.append(...[page.serving ? viewer.testForm(e) : null, ...blocks(found)].filter(Boolean));
    made.addEventListener("toggle", () => made.open && !body.childElementCount && show());
    return made;
  }

  Object.assign(viewer, { changeable, changeCommands, commandBlocks: blocks, nodeInModel, edgeInModel });
})((window.viewer ??= {}));
