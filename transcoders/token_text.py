"""Tokens as text, where one character may be several tokens.

A token that is part of a character has bytes and no text: alone it is written with those bytes, as SentencePiece writes
them (`<0xF0><0x9F>`), and beside its neighbours with the character that they make up (`🙂⟨F0 9F⟩`, `🙂⟨99 82⟩`), so
that it can be read and told from its neighbours.
"""

import re
from collections.abc import Iterator, Sequence
from functools import cache

_BYTE = re.compile(r"<0x([89A-F][0-9A-F])>")
_BYTES = re.compile(r".⟨([89A-F][0-9A-F](?: [89A-F][0-9A-F])*)⟩|<0x([89A-F][0-9A-F])>", re.DOTALL)
_LONE = "�"


def token_text(piece: str, decoded: str) -> str:
    """The text of one token: `decoded`, unless that lost bytes which its `piece` of the vocabulary tells."""
    if _LONE not in decoded:
        return decoded
    if _BYTE.fullmatch(piece):
        return piece
    known = _byte_of_letter()
    return _spelled(bytes(known[c] for c in piece)) if all(c in known for c in piece) else decoded


def with_characters(texts: Sequence[str]) -> list[str]:
    """Texts of neighbouring tokens; bytes that make up a character together are shown with it."""
    if not any(map(_BYTE.search, texts)):
        return list(texts)
    data = [_bytes_of(text, _BYTE) for text in texts]
    owners = [number for number, own in enumerate(data) for _ in own]
    made, start, stream = [""] * len(texts), 0, b"".join(data)
    for text, length in _characters(stream):
        members = owners[start : start + length]
        for owner in dict.fromkeys(members):
            own = bytes(stream[start + i] for i, member in enumerate(members) if member == owner)
            made[owner] += text if len(own) == length else f"{text}⟨{own.hex(' ').upper()}⟩"
        start += length
    return made


def join_tokens(texts: Sequence[str]) -> str:
    """The text that neighbouring tokens spell, in whichever of the two ways their bytes are written."""
    return _spelled(b"".join(_bytes_of(text, _BYTES) for text in texts))


def _bytes_of(text: str, form: re.Pattern[str]) -> bytes:
    made, end = b"", 0
    for match in form.finditer(text):
        made += text[end : match.start()].encode(errors="surrogatepass") + bytes.fromhex(match[1] or match[2])
        end = match.end()
    return made + text[end:].encode(errors="surrogatepass")


def _spelled(data: bytes) -> str:
    return "".join(text for text, _ in _characters(data))


def _characters(data: bytes) -> Iterator[tuple[str, int]]:
    """The characters of UTF-8, each with its number of bytes; a byte that is part of none as `<0xF0>`."""
    start = 0
    while start < len(data):
        first = data[start]
        length = 4 if first >= 0xF0 else 3 if first >= 0xE0 else 2 if first >= 0xC0 else 1
        try:
            yield data[start : start + length].decode(), length
        except UnicodeDecodeError:
            length = 1
            yield f"<0x{first:02X}>", length
        start += length


@cache
def _byte_of_letter() -> dict[str, int]:
    """The byte of each letter of a byte-level vocabulary: printable ones for themselves, others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
