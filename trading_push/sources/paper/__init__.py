"""The paper exchange: demo users whose orders fill against a market, kept in an SQLite file.

The law, to the last decimal, for every user and after every committed transaction::

    deposits = cash + cost of open positions - realized PnL + fees

1. Cost is kept as a signed total (a short's is negative), not as an average; a partial close takes
   a quantized share of it, and what rounding left stays in the cost.
2. All arithmetic is exact: a result that would have to be rounded is an error (EXACT traps it),
   but for the two amounts that are defined by rounding, that share and a fee.
3. The `Book` trades in memory, without I/O; the `Books` writes everything that one step changed
   in one transaction, so that a kill at any moment leaves a file that obeys the law.
4. Decimals are TEXT in plain notation, computed here; SQL does no arithmetic.
5. One process trades on a file (a lock beside it says which); another one only reads.

Imports run one way: book -> traders, schema -> books -> file -> law, exchange, source.
"""

from trading_push.sources.paper.audit import audit
from trading_push.sources.paper.book import Account, Book, OrderRefused
from trading_push.sources.paper.exchange import PaperExchange, open_paper_exchange
from trading_push.sources.paper.schema import PAPER_QUERIES
from trading_push.sources.paper.source import PaperSource

__all__ = [
    "PAPER_QUERIES",
    "Account",
    "Book",
    "OrderRefused",
    "PaperExchange",
    "PaperSource",
    "audit",
    "open_paper_exchange",
]
