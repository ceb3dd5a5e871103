"""Labels that a machine makes: what a feature fires on in a few words, and how well the words predict where it fires.

`excerpts` are the texts that labels are tested on.
"""
