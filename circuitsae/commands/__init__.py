"""Sub-commands of `circuitsae`, one module each; `cli` registers them. Nothing here imports torch before it runs."""
