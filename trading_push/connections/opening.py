"""What a connection's handshake has told of it."""

from __future__ import annotations

from typing import Final

import attrs

from trading_push.auth.principal import Handshake, Principal

__all__ = ["NOTHING_TOLD", "Opening"]


@attrs.frozen
class Opening:
    """What a connection's handshake has told of it.

    Args:
        principal: Who has authenticated by it; None if nobody has.
        handshake: The request itself, for an `authenticate` that is to see it again with a later
            token; None for any other, so that no memory is held for it.
        token_in_url: A token was in the URL, where it is not read.
    """

    principal: Principal | None = None
    handshake: Handshake | None = None
    token_in_url: bool = False


NOTHING_TOLD: Final = Opening()
"""The opening of a connection that has yet to authenticate."""
