"""One connection is one nursery: a task that receives, and a sender task for each subscription.

Its end goes in this order, whatever began it: flagged closed (nothing is offered or written any
more), every task of the nursery ended, the leave posted, the transport closed.
"""

from __future__ import annotations

import math
import time

import trio

from trading_push import logs
from trading_push.auth.principal import Principal
from trading_push.connections import ending
from trading_push.connections.context import Context
from trading_push.connections.members import Departure, Member
from trading_push.connections.opening import NOTHING_TOLD, Opening
from trading_push.connections.seats import NoSeat, Seat
from trading_push.connections.subscriber import Subscriber
from trading_push.connections.subscription import Subscription
from trading_push.errors import (
    AuthenticationError,
    CloseCode,
    SendTimeout,
    ServiceClosed,
    SourceError,
    TransportClosed,
    innermost,
)
from trading_push.protocol import frames, messages
from trading_push.protocol.actions import Action, CheckToken, End, Reply, Subscribe, Unsubscribe
from trading_push.protocol.rate_limit import MessageRate
from trading_push.protocol.session import Session
from trading_push.transport.base import ABNORMAL, Close, Transport, try_write

__all__ = ["Connection"]

# Trio makes a name for each task anew where it is given none.
_RECEIVER = "trading_push.connections.connection.Connection._receive_loop"
_SENDER = "trading_push.connections.subscription.Subscription.run"


class Connection:
    """One peer, from its handshake to the end of its stream.

    It is longer than 300 lines because every way to its end changes the same state: what was
    decided, what is still to be sent, and until when.

    Args:
        context: What all connections share.
        transport: The peer.
        seat: Its place among the connections; the caller, who took it, gives it back.
        opening: What its handshake has told, the user whom it has authenticated among it.
    """

    __slots__ = (
        "_close",
        "_context",
        "_end_by",
        "_final_frames",
        "_flushing",
        "_found_by_send",
        "_limit",
        "_member",
        "_nursery",
        "_opening",
        "_pinged_at",
        "_seat",
        "_session",
        "_subscriber",
        "_told_expiry",
        "_transport",
        "closed",
        "due",
    )

    def __init__(
        self, context: Context, transport: Transport, seat: Seat, opening: Opening = NOTHING_TOLD
    ) -> None:
        self._context = context
        self._transport = transport
        self._seat = seat
        self._opening = opening
        self._subscriber = Subscriber(context, transport)
        self._member: Member
        self._session: Session
        # Where its tasks run; None before `run`.
        self._nursery: trio.Nursery | None = None
        # How it was closed; None until that is decided.
        self._close: Close | None = None
        # What goes out before our close frame: a notice, or an error reply.
        self._final_frames: list[bytes] = []
        # Whether pending publications go out before them; set by a drain.
        self._flushing = False
        # Whether it was a send that found the peer gone; the log says so.
        self._found_by_send = False
        # When the connection ends unless it authenticates, or renews its token; on trio's clock,
        # the leeway included.
        timeout_s = math.inf if context.anonymous else context.limits.authentication_timeout_s
        self._limit = trio.current_time() + timeout_s
        # When it ends because a send has failed, unless the peer's close frame is found before.
        self._end_by = math.inf
        # When the last ping was sent, on trio's clock.
        self._pinged_at = -math.inf
        # Whether the notice of the token's end has been sent.
        self._told_expiry = False
        self.due = math.inf
        self.closed = False
        """Whether nothing is sent any more: the connection is to end, or has ended."""

    # --- its life --------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve the peer until it is gone or `stop` is called.

        No exception of the peer's or of a handler's making leaves it; a handler's is logged, once.
        Cancelled, it still says good-bye to the peer, within `close_timeout_s`.

        Raises:
            ServiceClosed: The service runs no more; the peer has not been served.
        """
        context = self._context
        self._member = context.registry.connect(self._transport.peer, self._transport.endpoint)
        self._session = Session(
            context.channels,
            context.limits,
            self._member.id,
            market=context.market,
            rate=MessageRate(context.limits, trio.current_time),
            clock=time.time,
            anonymous=context.anonymous,
            token_in_url=self._opening.token_in_url,
            requests=context.registry.tally.requests,
        )
        context.connections.add(self)
        if not context.connections.accepting:  # its handshake was under way when the drain began
            self.dismiss()
        try:
            try:
                async with trio.open_nursery() as nursery:
                    self._nursery = nursery
                    self._limit_to(self._limit)
                    self._transport.start(nursery)
                    self._subscriber.start(nursery, self._member)
                    context.heartbeat.add(self, self._next_look(trio.current_time()))
                    if self.closed:  # stopped before it began
                        nursery.cancel_scope.cancel()
                    nursery.start_soon(self._receive_loop, name=_RECEIVER)
                if nursery.cancel_scope.cancelled_caught:
                    # It had gone, and nothing more of it was to be read; or its time was up.
                    gone = self._end_by < math.inf or self._transport.gone
                    known = self._session.principal is not None
                    self._end(ABNORMAL if gone else ending.at_deadline(known, self._opening))
            except* ServiceClosed:
                self._end(ending.RESTART)
            except* Exception as errors:
                self._fail(errors)
        finally:
            # No await stands before the leave is posted, so that no cancellation can lose it.
            close = self._end(ending.at_cancellation(self._transport.gone))
            context.registry.leave(self._member, Departure(close, self._found_by_send))
            with trio.CancelScope(shield=True) as scope:
                scope.deadline = trio.current_time() + context.limits.close_timeout_s
                await self._close_transport(close)
            if scope.cancelled_caught:
                self._transport.abort()
            self._subscriber.close(keep=False)  # what a drain kept, and could not send
            context.heartbeat.remove(self)
            context.connections.remove(self)

    @property
    def member(self) -> Member:
        """What the registry knows of it."""
        return self._member

    def authenticated_by(self, token_id: str) -> bool:
        """Whether it stands on a token of this id."""
        return self._session.authenticated_by(token_id)

    def stop(self, code: int, reason: str, last: bytes | None = None) -> None:
        """End the connection with a close code; synchronous, and harmless when it has ended.

        Args:
            code: The close code.
            reason: At most 123 bytes of UTF-8.
            last: A last message that goes before the close frame.
        """
        if self.closed:
            return
        if last is not None:
            self._final_frames.append(frames.frame(last))
        self._end(Close(code, reason, ours=True))

    def dismiss(self) -> None:
        """End the connection because the service ends; synchronous.

        What is still pending goes out first, then the notice and 1012.
        """
        self._flushing = not self.closed
        self.stop(CloseCode.SERVICE_RESTART, "service restart", ending.shutdown_notice())

    def look_after(self, now: float) -> float:
        """Ping a silent peer, end one that stays so, and tell of a token's end; synchronous.

        Returns:
            When to look again, as `heartbeat.Heartbeat` asks.
        """
        if self.closed or self._nursery is None:
            return math.inf
        if now >= self._tell_expiry_at():
            self._told_expiry = True
            left = self._limit - self._context.leeway_s - now
            notice = messages.Notice("token_expires", expires_in=max(0, int(left)))
            self._send_at_once(frames.frame(messages.encode(notice)))
        heard, heartbeat_s = self._transport.last_heard, self._context.limits.heartbeat_s
        if heard is not None and now - heard >= heartbeat_s:
            if now - heard >= 2 * heartbeat_s:
                self.stop(CloseCode.HEARTBEAT_TIMEOUT, "nothing heard")
                return math.inf
            if self._pinged_at <= heard:
                self._pinged_at = now
                self._send_at_once(frames.PING)
        return self._next_look(now)

    def _next_look(self, now: float) -> float:
        heard, heartbeat_s = self._transport.last_heard, self._context.limits.heartbeat_s
        if heard is None:
            return self._tell_expiry_at()
        beat = heard + heartbeat_s if now < heard + heartbeat_s else heard + 2 * heartbeat_s
        return min(beat, self._tell_expiry_at())

    def _tell_expiry_at(self) -> float:
        if self._told_expiry or self._session.principal is None:
            return math.inf
        return self._limit - self._context.leeway_s - self._context.limits.expiry_notice_s

    def _send_at_once(self, frame: bytes) -> None:
        if not try_write(self._transport.writer, frame):
            assert self._nursery is not None
            self._nursery.start_soon(self._send_later, frame)

    async def _send_later(self, frame: bytes) -> None:
        try:
            await self._transport.send([frame])
        except TransportClosed as error:
            self.send_failed(error)

    def abort(self) -> None:
        """Drop the peer without a close frame; synchronous."""
        self.stop(CloseCode.SERVICE_RESTART, "service restart")
        self._transport.abort()

    def _end(self, close: Close) -> Close:
        """End every task of the connection; synchronous, and the only way to it.

        Args:
            close: Why, as we see it.

        Returns:
            How it is closed: by the first close frame, sent or received, or for the first reason.
        """
        if self._close is None:
            self._close = self._transport.peer_close or close
        self.stop_sending()
        if self._nursery is not None:
            self._nursery.cancel_scope.cancel()
        return self._close

    def _fail(self, errors: BaseExceptionGroup[Exception]) -> None:
        error = innermost(errors)
        logs.emit(logs.traced("internal_error", error, address=self._transport.peer))
        self._final_frames.append(ending.internal_error(self._session))
        self._end(Close(CloseCode.INTERNAL_ERROR, "internal error", ours=True))

    async def _close_transport(self, close: Close) -> None:
        try:
            if close.ours:
                rest = self._subscriber.rest() if self._flushing else []
                if frames := rest + self._final_frames:
                    await self._transport.send(frames)
            await self._transport.close(close.code, close.reason)
        except TransportClosed:
            pass  # the peer went first
        except Exception as error:
            logs.emit(logs.traced("internal_error", error, address=self._transport.peer))

    # --- receiving -------------------------------------------------------------------------

    async def _receive_loop(self) -> None:
        try:
            if self._opening.principal is not None:
                await self._authenticate(None, self._opening.principal)
            while True:
                await self._act_on(await self._transport.receive())
        except TransportClosed as error:
            self._end(ending.of_transport(error))

    async def _act_on(self, message: str | bytes) -> None:
        # A frame of its own: the one that waits for the next message would keep this one alive.
        for action in self._session.receive(message):
            await self._carry_out(action)

    def _limit_to(self, at: float) -> None:
        self._limit = at
        if self._nursery is not None:
            self._nursery.cancel_scope.deadline = min(at, self._end_by)

    async def _carry_out(self, action: Action) -> None:
        match action:
            case Reply(message=message):
                await self.send([frames.frame(messages.encode(message))])
            case CheckToken(id=request_id, token=token):
                await self._check(request_id, token)
            case Subscribe():
                await self._subscriber.subscribe(action, self)
            case Unsubscribe():
                await self._subscriber.unsubscribe(action, self)
            case End(code=code, reason=reason):
                self.stop(code, reason)

    # --- authentication --------------------------------------------------------------------

    async def _check(self, request_id: messages.Id, token: str) -> None:
        limit, timeout_s = self._limit, self._context.limits.authentication_timeout_s
        if self._session.principal is not None:
            self._limit_to(math.inf)  # a renewal that came in time is not cut
        elif limit < math.inf:
            timeout_s = math.inf  # before the connection's deadline, or never
        address, seen = self._transport.peer, self._opening.handshake
        try:
            with trio.fail_after(timeout_s):
                principal = await self._context.tokens.principal(token, address, seen)
        except AuthenticationError as error:
            await self._refuse(request_id, error)
        except (trio.TooSlowError, SourceError) as error:
            # No token is to blame; a session goes on as it was.
            await self.send([ending.internal_error(self._session)])
            if isinstance(error, SourceError) and self._session.principal is None:
                self.stop(CloseCode.INTERNAL_ERROR, "internal error")
        else:
            if await self._authenticate(request_id, principal):
                return
        self._limit_to(limit)
        # Whoever came to tell of the token's end meanwhile found none, and comes no more.
        self._context.heartbeat.add(self, self._tell_expiry_at())

    async def _refuse(self, request_id: messages.Id, error: AuthenticationError) -> None:
        for action in self._session.refused(request_id, error):
            await self._carry_out(action)

    async def _authenticate(self, request_id: messages.Id, principal: Principal) -> bool:
        """Let in whom a token stands for, or extend the session; whether that was done."""
        first = self._session.principal is None
        # No await from here until the session has it: what is looked at now stays so.
        try:
            self._context.tokens.check_again(principal, self._transport.peer)
        except AuthenticationError as error:  # while the handshake was under way
            await self._refuse(request_id, error)
            return False
        if first:
            if self.closed:
                return False
            try:
                self._seat.hold_user(principal.user, self)
            except NoSeat as error:
                self.stop(CloseCode.CONNECTION_LIMIT, str(error))
                return False
        before = self._session.principal
        actions = self._session.authenticated(request_id, principal)
        if first:
            self._context.registry.authenticate(self._member, principal.user)
            self._subscriber.throttle(self._session.rates())
        assert self._session.principal is not None
        expires_at = self._session.principal.expires_at
        if before is None or before.expires_at != expires_at:
            self._told_expiry = False
        if expires_at is None:
            self._limit_to(math.inf)
        else:
            left = expires_at + self._context.leeway_s - time.time()
            self._limit_to(trio.current_time() + left)
            self._context.heartbeat.add(self, self._tell_expiry_at())
        for action in actions:
            await self._carry_out(action)
        return True

    # --- what its subscriptions ask of it: see `subscriber.Carrier` ------------------------

    @property
    def first_value_wait_s(self) -> float:
        """How long a subscription waits for the source's first answer."""
        return self._context.limits.first_value_wait_s

    def begin(self, subscription: Subscription) -> None:
        """Give a subscription the value or the status that there is by now."""
        self._subscriber.begin(subscription)

    def sender_started(self, subscription: Subscription) -> None:
        """Count a sender task that begins."""
        self._context.registry.ledger.senders_started += 1
        self._subscriber.sender_started(subscription)

    def sender_ended(self, subscription: Subscription) -> None:
        """Count a sender task that ends; unless it was told to, the connection ends with it."""
        if not subscription.shut:
            self.stop_sending()
        self._context.registry.ledger.senders_ended += 1

    async def send(self, frames: list[bytes]) -> None:
        """Send some frames, in order; raises TransportClosed when the peer is gone."""
        try:
            await self._transport.send(frames)
        except TransportClosed as error:
            self.send_failed(error)
            raise

    def charge(self, size: int) -> None:
        """Count so many bytes that a request was answered with."""
        self._session.charge(size)

    def send_failed(self, error: TransportClosed) -> None:
        """Stop sending: the peer is gone, or too slow; synchronous."""
        if self.closed or self._transport.peer_close is not None:
            return
        if isinstance(error, SendTimeout):
            self._close = ending.of_transport(error)
        else:
            self._found_by_send = True
        # The receive loop may still find the close frame that the peer sent before it went.
        self._end_by = trio.current_time() + self._context.limits.close_timeout_s
        self._limit_to(self._limit)
        self.stop_sending()

    def stop_sending(self) -> None:
        """Flag the connection closed: nothing is offered or written any more; synchronous."""
        if self.closed:
            return
        self.closed = True
        self._seat.release()
        self._subscriber.close(keep=self._flushing)
        gone = self._close is not None and not self._close.ours
        self._transport.shorten_deadline(0 if gone else self._context.limits.close_timeout_s)
