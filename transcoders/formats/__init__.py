"""Files of dictionaries: one module for each format, and a registry that sniffs which one a folder is in."""

from transcoders.formats.registry import load_dictionaries, save_dictionaries

__all__ = ["load_dictionaries", "save_dictionaries"]
