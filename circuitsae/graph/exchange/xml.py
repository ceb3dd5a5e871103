"""XML of strangers: no entities, one encoding, and one sentence for whatever a reader trips over."""

import re

import networkx as nx

from circuitsae.graph.checking import Limits, MalformedError

NETWORKX_ERRORS = (
    nx.NetworkXException,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    RuntimeError,
    RecursionError,
)
"""What NetworkX's readers raise on files that are not what they expect."""
_DECLARED = re.compile(rb"""<\?xml[^>]*?encoding\s*=\s*["']([^"']*)["']""")
_FIRST_TAG = re.compile(rb"<([A-Za-z_][\w.:-]*)")


def check_xml(content: bytes, limits: Limits) -> None:
    """Raises `MalformedError` for files with entities, with too many tags, or not in UTF-8."""
    limits.check("values", content.count(b"<") + content.count(b"="))
    declared = _DECLARED.search(content[:200])
    if declared and declared[1].lower() not in (b"utf-8", b"us-ascii", b"ascii"):
        raise MalformedError("its XML is not in UTF-8; save it as UTF-8")
    try:
        content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise MalformedError(f"it is not text in UTF-8 (byte {error.start})") from error
    if b"<!DOCTYPE" in content or b"<!ENTITY" in content:
        raise MalformedError("its XML defines entities, which can grow without bounds; remove its DOCTYPE")


def first_tag(content: bytes) -> str:
    """The name of the first element, without its prefix; empty where there is none."""
    found = _FIRST_TAG.search(content[:10_000])
    return found[1].decode("utf-8", "replace").rsplit(":")[-1].lower() if found else ""


def require_simple(source: nx.Graph) -> None:
    if source.is_multigraph():
        raise MalformedError("it has several edges between the same two nodes; expected each edge once")


def xml_complaint(form: str, error: Exception) -> str:
    """What NetworkX or the XML parser said, as one short line."""
    said = " ".join(ascii(str(error) or type(error).__name__).strip("'\"").split())
    return f"it is not whole and correct {form} ({said[:120]})"
