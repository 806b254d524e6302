"""trading_push by its public way: `service.publish`, authentication, default logging.

`ours.py hypercorn` under stock Hypercorn with the link, `plain` in plain ASGI form.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import hypercorn.config
import hypercorn.trio
import trio
from common import TOPICS, answered, commands_to, listening, ticker

from trading_push import JwtAuthenticator, PushService, logs, open_push_service
from trading_push.settings import Auth, Limits, Settings
from trading_push.transport import hypercorn_link

SECRET = "a secret of at least thirty-two bytes"
LIMITS = Limits(connections=20_000, connections_per_user=20_000)


async def publish(service: PushService, batches: int, topics: int, interval_s: float) -> None:
    due = trio.current_time()
    for _ in range(batches):
        if topics == 1:
            await service.publish(f"ticker.{TOPICS[0]}", ticker(TOPICS[0]))
        else:
            await service.publish_many(
                [(f"ticker.{symbol}", ticker(symbol), None) for symbol in TOPICS[:topics]]
            )
        due += interval_s
        await trio.sleep_until(due)
    answered()


async def main(form: str) -> None:
    if form != "plain":
        hypercorn_link.install(LIMITS)
    settings = Settings(jwt_secret=SECRET, limits=LIMITS)
    config = hypercorn.config.Config.from_mapping(
        {"bind": ["127.0.0.1:0"], "errorlog": None, "backlog": 4096}
    )
    send, commands = trio.open_memory_channel[dict[str, Any]](10)
    token = trio.lowlevel.current_trio_token()
    commands_to(
        lambda command: trio.from_thread.run_sync(send.send_nowait, command, trio_token=token)
    )
    async with (
        open_push_service(
            settings=settings, authenticate=JwtAuthenticator(Auth(), SECRET)
        ) as service,
        trio.open_nursery() as nursery,
    ):
        serve = partial(
            hypercorn.trio.serve,
            service.asgi_app,
            config,
            shutdown_trigger=trio.sleep_forever,
            mode="asgi",
        )
        binds = await nursery.start(serve)
        listening(int(binds[0].rsplit(":", 1)[1]))
        async for command in commands:
            await publish(service, **command)


with logs.attached():
    trio.run(main, sys.argv[1])
