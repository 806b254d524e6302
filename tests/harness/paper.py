"""A process that trades on the paper exchange's file."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from harness.support import TESTS

TRADER = """
import sys
from pathlib import Path
import trio
from trading_push.sources.exchanges import simulated_market as market
from trading_push.sources.paper import exchange as paper

paper.STEP_S = market.STEP_S = 0.002

class Sink:
    updates = 0
    def update(self, tickers):
        self.updates += 1
        if self.updates % 20 == 0:
            print(self.updates, flush=True)
    def stale(self, reason, symbols=None):
        pass

async def main():
    simulated = market.SimulatedMarket(int(sys.argv[2]))
    async with paper.open_paper_exchange(Path(sys.argv[1]), market=simulated, seed=1) as exchange:
        print("read only" if exchange.read_only else "trading", flush=True)
        await exchange.run(Sink())

trio.run(main)
"""


class Trader:
    """A process that trades on a file until it is killed."""

    def __init__(self, path: Path, seed: int = 1) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", TRADER, str(path), str(seed)],
            stdout=subprocess.PIPE,
            cwd=TESTS,
            text=True,
        )

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def kill(self) -> None:
        self.process.kill()
        assert self.process.wait() == -signal.SIGKILL
        assert self.process.stdout is not None
        self.process.stdout.close()
