"""The paper exchange: demo users whose orders are filled at a market's prices, kept in a file.

Each user's account balances to the last decimal, after every committed transaction::

    deposits = cash + cost of open positions - realized PnL + fees

1. Cost is kept as a signed total (negative for a short), not as an average. A partial close takes a
   rounded share of it, and what the rounding left stays in the cost.
2. All arithmetic is exact. A result that would have to be rounded is an error, which EXACT traps,
   except for the two amounts that are defined by rounding: that share, and a fee.
3. The `MatchingEngine` trades in memory, without I/O. The `Books` write everything that one step
   changed in one transaction, so that a kill at any moment leaves a file that balances.
4. Decimals are TEXT in plain notation, computed here; SQL does no arithmetic.
5. One process trades on a file (a lock beside it says which); any other one only reads.

Imports run one way: engine -> traders, schema -> books -> file -> exchange.
"""

from trading_push.sources.paper.audit import audit
from trading_push.sources.paper.engine import Account, MatchingEngine, OrderRefused
from trading_push.sources.paper.exchange import PaperExchange, open_paper_exchange
from trading_push.sources.paper.schema import PAPER_QUERIES
from trading_push.sources.paper.source import PaperSource

__all__ = [
    "PAPER_QUERIES",
    "Account",
    "MatchingEngine",
    "OrderRefused",
    "PaperExchange",
    "PaperSource",
    "audit",
    "open_paper_exchange",
]
