// The viewer in a frame of its own, and what the reader chose there as the state of the widget, both ways.
const NAMES = ["chosen", "pinned", "groups"];
const unlike = (one, other) => JSON.stringify(one) !== JSON.stringify(other);

function render({ model, el }) {
  const frame = document.createElement("iframe");
  // Without its own origin the page cannot reach the notebook; messages are all it has.
  frame.setAttribute("sandbox", "allow-scripts allow-downloads");
  frame.setAttribute("allow", "clipboard-write");
  frame.title = model.get("_title");
  frame.style.cssText = `width: 100%; height: ${model.get("_height")}px; border: 1px solid #8884; border-radius: 4px`;

  let ready = false;
  let hearing = false; // what this frame told need not be told back to it

  function tell() {
    if (!ready || hearing) return;
    const state = Object.fromEntries(NAMES.map((name) => [name, model.get(name)]));
    frame.contentWindow.postMessage({ circuitsae: state }, "*");
  }

  function hear({ source, data }) {
    if (source !== frame.contentWindow || !data?.circuitsae) return;
    if (data.circuitsae === "ready") {
      ready = true;
      tell();
      return;
    }
    const changed = NAMES.filter((name) => unlike(model.get(name), data.circuitsae[name]));
    if (!changed.length) return;
    hearing = true;
    for (const name of changed) model.set(name, data.circuitsae[name]);
    hearing = false;
    model.save_changes();
  }

  window.addEventListener("message", hear);
  for (const name of NAMES) model.on(`change:${name}`, tell);
  frame.srcdoc = model.get("_page");
  el.replaceChildren(frame);
  return () => {
    window.removeEventListener("message", hear);
    for (const name of NAMES) model.off(`change:${name}`, tell);
  };
}

export default { render };
