"""Files of dictionaries: one module for each format, and a registry that sniffs which one a source is in.

`source` says where dictionaries lie (a folder, a file, a repository of the hub), `offers` which of what is there is
meant; `hooks` what others call our sites, `weights` and `files` how their files are read, `building` how their
conventions become ours. `upload` puts a folder on the hub.
"""

from transcoders.formats.registry import list_dictionaries, load_dictionaries, save_dictionaries
from transcoders.formats.upload import upload_dictionaries

__all__ = ["list_dictionaries", "load_dictionaries", "save_dictionaries", "upload_dictionaries"]
