"""The recipe of the embedded model: `python -m examples.pocket.recipe` rebuilds all that `circuitsae.pocket` holds.

`tokenizer` cuts the corpus, `train` fits the model, `measure` scores it on held-out prompts, `sparse` trains the
dictionaries, `cards` collects their feature cards, `report` writes the page, and `recipe` runs it all, and
labels features.
"""
