// Free text beside a node or the whole graph. It travels in the address and in exports, so its length is bounded.
(function (viewer) {
  "use strict";

  const { state, element, NOTE_LENGTH, MOST_NOTES } = viewer;

  function field(label, value, write) {
    const box = element("textarea", {
      rows: "2",
      maxlength: NOTE_LENGTH,
      "aria-label": label,
      placeholder: "Write a note …",
    });
    box.value = value;
    box.addEventListener("input", () => write(box.value.slice(0, NOTE_LENGTH)));
    return box;
  }

  function setNodeNote(i, note) {
    if (!note.trim()) state.notes.delete(i);
    else if (state.notes.has(i) || state.notes.size < MOST_NOTES) state.notes.set(i, note);
    else return viewer.warn(`No more than ${MOST_NOTES} notes fit into a link`);
    viewer.changed("notes");
  }

  function nodeNote(i) {
    const note = state.notes.get(i) ?? "";
    const box = field(`Note on ${viewer.name(i)}`, note, (value) => setNodeNote(i, value));
    return element(
      "details",
      note ? { class: "note", open: "" } : { class: "note" },
      element("summary", {}, "Note"),
      box,
    );
  }

  function startNotes() {
    const fact = document.getElementById("graph-note");
    const box = field("Note on this graph", "", (value) => {
      state.graphNote = value.trim() ? value : "";
      viewer.changed("notes");
    });
    fact.append(box);
    const sync = () => {
      if (document.activeElement !== box) box.value = state.graphNote;
      fact.open ||= Boolean(state.graphNote);
    };
    viewer.on("notes", sync);
    sync();
  }

  Object.assign(viewer, { nodeNote, startNotes });
})((window.viewer ??= {}));
