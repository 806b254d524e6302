"""Check a file: whether its accounts balance, and whether its sums agree."""

from __future__ import annotations

from contextlib import closing
from decimal import Decimal, localcontext
from pathlib import Path

from trading_push.sources.paper.engine import EXACT, ZERO
from trading_push.sources.sqlite import open_sqlite

__all__ = ["audit"]


def audit(path: Path) -> list[str]:
    """Check in one consistent reading whether a file's accounts balance and its sums agree.

    Returns:
        What is wrong, a line for each; nothing for a file that is in order.
    """
    # One transaction, so that no step is written between two of the queries.
    with closing(open_sqlite(path, "ro")) as connection:
        connection.execute("BEGIN")
        accounts = connection.execute(
            "SELECT user_id, deposits, cash, free, locked, realized, unrealized, fees, total "
            "FROM accounts"
        ).fetchall()
        positions = connection.execute(
            "SELECT user_id, cost, unrealized_pnl, realized, fees FROM positions"
        ).fetchall()
        orders = connection.execute(
            "SELECT user_id, quantity, filled, unit_lock FROM orders"
        ).fetchall()
    # Each amount of an account, and what it should be by the others.
    wrong = []
    with localcontext(EXACT):
        for user, *texts in accounts:
            deposits, cash, free, locked, realized, unrealized, fees, total = map(Decimal, texts)
            held = [tuple(map(Decimal, row[1:])) for row in positions if row[0] == user]
            cost, gain, made, paid = (
                sum(column, ZERO) for column in zip(*held, (ZERO,) * 4, strict=True)
            )
            resting = [tuple(map(Decimal, row[1:])) for row in orders if row[0] == user]
            kept = sum(((quantity - done) * unit for quantity, done, unit in resting), ZERO)
            for name, left, right in (
                ("deposits", deposits, cash + cost - realized + fees),
                ("cash", cash, free + locked),
                ("locked", locked, kept),
                ("realized", realized, made),
                ("unrealized", unrealized, gain),
                ("fees", fees, paid),
                ("total", total, realized + unrealized - fees),
            ):
                if left != right:
                    wrong.append(f"user {user}: {name}: {left} is not {right}")
    return wrong
