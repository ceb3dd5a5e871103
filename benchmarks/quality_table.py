"""Placeholder."""
def write_tables(cells, plan):
    return ""
