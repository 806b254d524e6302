"""WebSocket frames as a client sends them, for tests that write bytes themselves."""

from __future__ import annotations

from typing import Final

MASK: Final = b"\x00\x00\x00\x00"


def masked(first: int, payload: bytes, mask: bytes = MASK) -> bytes:
    """A frame of a client; `first` is its first byte: FIN, the reserved bits and the opcode."""
    size = len(payload)
    if size < 126:
        head = bytes((first, 0x80 | size))
    elif size < 2**16:
        head = bytes((first, 0xFE)) + size.to_bytes(2, "big")
    else:
        head = bytes((first, 0xFF)) + size.to_bytes(8, "big")
    if mask != MASK:
        payload = bytes(byte ^ mask[place % 4] for place, byte in enumerate(payload))
    return head + mask + payload
