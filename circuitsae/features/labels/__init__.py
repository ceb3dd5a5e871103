"""Labels that a machine makes: what a feature fires on in a few words, and how well the words predict where it fires.

`excerpts` are the texts that labels are tested on.

By language models: `explain` asks one (`explainers`) for a label of each feature (`describing`) and has it judge them
(`judging`) on texts of `held_out`; `answers` keeps what it said. `published` reads the labels of others.
"""
