"""Train a cross-layer transcoder on any text, evaluate it, and trace a prompt with it.

python examples/train_transcoders.py [--quick] MODEL TEXT_FILE OUTPUT_FOLDER
"""

import sys

import circuitsae as cs
import transcoders as tc


def main(arguments: list[str]) -> None:
    quick = "--quick" in arguments
    name, text, out = [a for a in arguments if not a.startswith("--")]
    model = cs.load_model(name)
    config = tc.CLTConfig(features=64 if quick else 2048, tokens=10_000 if quick else 5_000_000, batch=256)
    clt = tc.train(model, text, config, out=out, progress=not quick)
    evaluation = tc.evaluate(model, clt, tc.held_out_rows(model, text, tokens=1_000 if quick else 20_000, context=64))
    print(evaluation.to_frame()[["l0", "fvu", "dead"]])

    graph = cs.attribute(cs.ReplacementModel(model, clt), "Once upon a time there was a", max_features=100)
    print(graph.prune())


if __name__ == "__main__":
    main(sys.argv[1:])
