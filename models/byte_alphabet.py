"""GPT-2's printable stand-ins for the 256 bytes, in which byte-level tokens are spelled."""


def _byte_of_character() -> dict[str, int]:
    """Printable Latin-1 stands for itself; the other bytes, in order, are U+0100 onwards."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + rank): byte for rank, byte in enumerate(others)}


BYTE_OF_CHARACTER = _byte_of_character()
