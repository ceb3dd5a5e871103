"""The pictures of docs/lenses.md: `python docs/images/lenses.py`.

`lens.png`: the logit lens of the pocket model on the Dallas prompt. `causal-trace.png`: what brings its answer back
when *Dallas* is drowned in noise.

Needs playwright, a Chromium and pillow.
"""

from drawing import save_figure

import circuitsae as cs
from circuitsae.lenses import causal_trace, logit_lens

PROMPT = "The capital of the state containing Dallas is"
WIDTH, HEIGHT = 1000, 380


def main() -> None:
    model = cs.load_model("pocket")
    found = {"lens": logit_lens(model, PROMPT), "causal-trace": causal_trace(model, PROMPT, "Dallas")}
    for name, result in found.items():
        figure = result.figure()
        figure.update_layout(width=WIDTH, height=HEIGHT, margin={"l": 10, "r": 10, "t": 50, "b": 10})
        save_figure(figure, name)


if __name__ == "__main__":
    main()
