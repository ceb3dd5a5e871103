"""A graph's page with its model behind it: a local server that runs what the page asks for."""
