"""One connection is one nursery: a task that receives, and a sender task for each subscription.

Its end goes in this order, whatever began it: flagged closed (nothing is offered or written any
more), every task of the nursery ended, the leave posted, the transport closed.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence

import trio

from trading_push import logs
from trading_push.auth.tokens import Principal
from trading_push.broker.base import Publication, StatusChange
from trading_push.connections.context import Hub
from trading_push.connections.registry import Departure, Member
from trading_push.connections.seats import NoSeat, Seat
from trading_push.connections.subscription import Siblings, Subscription
from trading_push.errors import (
    AuthenticationError,
    CloseCode,
    ErrorCode,
    RequestError,
    SendTimeout,
    ServiceClosed,
    SourceError,
    TransportClosed,
)
from trading_push.protocol import messages as protocol
from trading_push.protocol.rate_limit import MessageRate
from trading_push.protocol.session import (
    Action,
    CheckToken,
    End,
    Reply,
    Session,
    Subscribe,
    Unsubscribe,
    Wanted,
)
from trading_push.topics import Topic
from trading_push.transport.base import ABNORMAL, Close, Transport, try_write

__all__ = ["Connection"]

# Trio makes a name for each task anew where it is given none.
_RECEIVER = "trading_push.connections.connection.Connection._receive_loop"
_SENDER = "trading_push.connections.subscription.Subscription.run"
_RECONNECT_AFTER_MS = (500, 3000)
_RESTART = Close(CloseCode.SERVICE_RESTART, "service restart", ours=True)


class Connection:
    """One peer, from its handshake to the end of its stream.

    Args:
        hub: What it shares with the others.
        transport: The peer.
        seat: Its place among the others; whoever took it gives it back.
        principal: Whom the handshake has authenticated, where it has.
    """

    __slots__ = (
        "_close",
        "_end_by",
        "_farewell",
        "_flushing",
        "_found_by_send",
        "_hub",
        "_limit",
        "_member",
        "_nursery",
        "_pinged_at",
        "_principal",
        "_seat",
        "_session",
        "_siblings",
        "_streams",
        "_subscriptions",
        "_told_expiry",
        "_transport",
        "closed",
        "look_at",
    )

    def __init__(
        self, hub: Hub, transport: Transport, seat: Seat, principal: Principal | None = None
    ) -> None:
        self._hub = hub
        self._transport = transport
        self._seat = seat
        self._principal = principal
        self._subscriptions: dict[Topic, Subscription] = {}
        self._streams: dict[Topic, trio.CancelScope] | None = None
        self._siblings = Siblings(hub.limits.pending_bytes)
        self._member: Member
        self._session: Session
        self._nursery: trio.Nursery | None = None
        self._close: Close | None = None
        self._farewell: list[bytes] = []
        self._flushing = False
        self._found_by_send = False
        self._limit = trio.current_time() + hub.limits.authentication_timeout_s
        self._end_by = math.inf
        self._pinged_at = -math.inf
        self._told_expiry = False
        self.look_at = math.inf
        self.closed = False

    # --- the life of it --------------------------------------------------------------------

    async def run(self) -> None:
        """Serve the peer until it is gone or `stop` is called.

        No exception of the peer's or of a handler's making leaves it; a handler's is logged, once.
        Cancelled, it still says good-bye to the peer, within `close_timeout_s`.

        Raises:
            ServiceClosed: The service runs no more; the peer has not been served.
        """
        hub = self._hub
        self._member = hub.registry.connect(self._transport.peer)
        self._session = Session(
            hub.channels,
            hub.limits,
            self._member.id,
            knows_symbol=hub.knows_symbol,
            rate=MessageRate(hub.limits, trio.current_time),
            clock=time.time,
        )
        hub.connections.add(self)
        if not hub.accepting:  # its handshake was under way when the drain began
            self.dismiss()
        try:
            try:
                async with trio.open_nursery() as nursery:
                    self._nursery = nursery
                    self._limit_to(self._limit)
                    self._transport.start(nursery)
                    hub.timetable.enter(self, self._next_look(trio.current_time()))
                    if self.closed:  # stopped before it began
                        nursery.cancel_scope.cancel()
                    nursery.start_soon(self._receive_loop, name=_RECEIVER)
                if nursery.cancel_scope.cancelled_caught:
                    self._end(self._at_deadline())
            except* ServiceClosed:
                self._end(_RESTART)
            except* Exception as errors:
                self._fail(errors)
        finally:
            # No await stands before the leave is posted, so that no cancellation can lose it.
            close = self._end(self._at_cancellation())
            hub.registry.leave(self._member, Departure(close, self._found_by_send))
            with trio.CancelScope(shield=True) as scope:
                scope.deadline = trio.current_time() + hub.limits.close_timeout_s
                await self._close_transport(close)
            if scope.cancelled_caught:
                self._transport.abort()
            hub.gone(self)

    @property
    def id(self) -> str:
        """What the reply to `auth` calls it."""
        return self._member.id

    def authenticated_by(self, token_id: str) -> bool:
        """Whether it stands on a token of this id."""
        return self._session.authenticated_by(token_id)

    def stop(self, code: int, reason: str, farewell: bytes | None = None) -> None:
        """End the connection with a close code; synchronous, and harmless when it has ended.

        Args:
            code: The close code.
            reason: At most 123 bytes of UTF-8.
            farewell: A last message that goes before the close frame.
        """
        if self.closed:
            return
        if farewell is not None:
            self._farewell.append(protocol.frame(farewell))
        self._end(Close(code, reason, ours=True))

    def dismiss(self) -> None:
        """End the connection because the service ends; synchronous.

        What is still pending goes out first, then the notice and 1012.
        """
        self._flushing = not self.closed
        # Not all at once: who comes back is spread over a few seconds.
        notice = protocol.Notice("shutdown", random.randint(*_RECONNECT_AFTER_MS))
        self.stop(CloseCode.SERVICE_RESTART, "service restart", protocol.encode(notice))

    def look_after(self, now: float) -> float:
        """Ping a silent peer, end one that stays so, and tell of a token's end; synchronous.

        Returns:
            When to look again, as `heartbeat.Timetable` asks.
        """
        if self.closed or self._nursery is None:
            return math.inf
        if now >= self._tell_expiry_at():
            self._told_expiry = True
            left = self._limit - self._hub.leeway_s - now
            notice = protocol.Notice("token_expires", expires_in=max(0, int(left)))
            self._slip_in(protocol.frame(protocol.encode(notice)))
        heard, heartbeat_s = self._transport.last_heard, self._hub.limits.heartbeat_s
        if heard is not None and now - heard >= heartbeat_s:
            if now - heard >= 2 * heartbeat_s:
                self.stop(CloseCode.HEARTBEAT_TIMEOUT, "nothing heard")
                return math.inf
            if self._pinged_at <= heard:
                self._pinged_at = now
                self._slip_in(protocol.PING)
        return self._next_look(now)

    def _next_look(self, now: float) -> float:
        heard, heartbeat_s = self._transport.last_heard, self._hub.limits.heartbeat_s
        if heard is None:
            return self._tell_expiry_at()
        beat = heard + heartbeat_s if now < heard + heartbeat_s else heard + 2 * heartbeat_s
        return min(beat, self._tell_expiry_at())

    def _tell_expiry_at(self) -> float:
        if self._told_expiry or self._session.principal is None:
            return math.inf
        return self._limit - self._hub.leeway_s - self._hub.limits.expiry_notice_s

    def _slip_in(self, frame: bytes) -> None:
        if not try_write(self._transport.writer, frame):
            assert self._nursery is not None
            self._nursery.start_soon(self._send_apart, frame)

    async def _send_apart(self, frame: bytes) -> None:
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
        self._flag_closed()
        if self._nursery is not None:
            self._nursery.cancel_scope.cancel()
        return self._close

    def _flag_closed(self) -> None:
        """Offer and write nothing any more."""
        if self.closed:
            return
        self.closed = True
        self._seat.release()
        for subscription in self._subscriptions.values():
            subscription.close(keep=self._flushing)
        gone = self._close is not None and not self._close.ours
        self._transport.hurry(0 if gone else self._hub.limits.close_timeout_s)

    def _at_deadline(self) -> Close:
        """Why the time of the connection was up."""
        if self._end_by < math.inf or self._transport.gone:
            return ABNORMAL  # it had gone, and nothing more of it was to be read
        if self._session.principal is None:
            return Close(CloseCode.AUTHENTICATION_TIMEOUT, "not authenticated in time", ours=True)
        return Close(CloseCode.TOKEN_EXPIRED, "token expired", ours=True)

    def _at_cancellation(self) -> Close:
        """Why somebody else has cancelled the connection: a server does it where the peer is gone.

        Only where it is known to be there, it is the server itself that ends.
        """
        return _RESTART if self._transport.gone is False else ABNORMAL

    def _fail(self, errors: BaseExceptionGroup[Exception]) -> None:
        error = logs.innermost(errors)
        logs.emit(
            logs.line("internal_error", address=self._transport.peer, error=error)._replace(
                exception=error
            )
        )
        self._farewell.append(self._internal_error())
        self._end(Close(CloseCode.INTERNAL_ERROR, "internal error", ours=True))

    async def _close_transport(self, close: Close) -> None:
        try:
            if close.ours:
                pending = self._subscriptions.values() if self._flushing else ()
                rest = [frame for subscription in pending for frame in subscription.rest()]
                if frames := rest + self._farewell:
                    await self._transport.send(frames)
            await self._transport.close(close.code, close.reason)
        except TransportClosed:
            pass  # the peer went first: there is nobody left to be polite to
        except Exception as error:
            line = logs.line("internal_error", address=self._transport.peer, error=error)
            logs.emit(line._replace(exception=error))

    # --- receiving -------------------------------------------------------------------------

    async def _receive_loop(self) -> None:
        try:
            if self._principal is not None:
                await self._authenticate(None, self._principal)
            while True:
                await self._act_on(await self._transport.receive())
        except TransportClosed as error:
            self._end(_reason_of(error))

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
                await self._send([protocol.frame(protocol.encode(message))])
            case CheckToken(id=request_id, token=token):
                await self._check(request_id, token)
            case Subscribe():
                await self._subscribe(action)
            case Unsubscribe():
                await self._unsubscribe(action)
            case End(code=code, reason=reason):
                self.stop(code, reason)

    async def _send(self, frames: list[bytes]) -> None:
        try:
            await self._transport.send(frames)
        except TransportClosed as error:
            self.send_failed(error)
            raise

    # --- authentication --------------------------------------------------------------------

    async def _check(self, request_id: protocol.Id, token: str) -> None:
        limit = self._limit
        if self._session.principal is not None:
            self._limit_to(math.inf)  # a renewal that came in time is not cut
        try:
            principal = await self._principal_of(token)
        except AuthenticationError as error:
            await self._refuse(request_id, error)
        except trio.TooSlowError:
            await self._send([self._internal_error()])
        except SourceError:  # nobody's token is to blame; a session goes on as it was
            await self._send([self._internal_error()])
            if self._session.principal is None:
                self.stop(CloseCode.INTERNAL_ERROR, "internal error")
        else:
            if await self._authenticate(request_id, principal):
                return
        self._limit_to(limit)
        # Whoever came to tell of the token's end meanwhile found none, and comes no more.
        self._hub.timetable.enter(self, self._tell_expiry_at())

    async def _principal_of(self, token: str) -> Principal:
        if self._session.principal is None:
            return await self._hub.check(token)  # before the connection's deadline, or never
        with trio.fail_after(self._hub.limits.authentication_timeout_s):
            return await self._hub.check(token)

    def _internal_error(self) -> bytes:
        internal = RequestError(ErrorCode.INTERNAL, "an error of ours; try again later")
        reply = protocol.error_reply(self._session.request_id, internal)
        return protocol.frame(protocol.encode(reply))

    async def _refuse(self, request_id: protocol.Id, error: AuthenticationError) -> None:
        for action in self._session.refused(request_id, error):
            await self._carry_out(action)

    async def _authenticate(self, request_id: protocol.Id, principal: Principal) -> bool:
        """Let in whom a token stands for, or extend the session; whether that was done."""
        first = self._session.principal is None
        # No await from here until the session has it: what is looked at now stays so.
        try:
            self._hub.revoked.check(principal)
        except AuthenticationError as error:  # while the handshake was under way
            await self._refuse(request_id, error)
            return False
        if first and not self._take_seat(principal.user):
            return False
        before = self._session.principal
        actions = self._session.authenticated(request_id, principal)
        if first:
            self._hub.registry.authenticate(self._member, principal.user)
        assert self._session.principal is not None
        expires_at = self._session.principal.expires_at
        if before is None or before.expires_at != expires_at:
            self._told_expiry = False
        if expires_at is None:
            self._limit_to(math.inf)
        else:
            left = expires_at + self._hub.leeway_s - time.time()
            self._limit_to(trio.current_time() + left)
            self._hub.timetable.enter(self, self._tell_expiry_at())
        for action in actions:
            await self._carry_out(action)
        return True

    def _take_seat(self, user: str) -> bool:
        if self.closed:
            return False
        try:
            self._seat.hold_user(user, self)
        except NoSeat as error:
            self.stop(CloseCode.CONNECTION_LIMIT, str(error))
            return False
        return True

    # --- subscriptions ---------------------------------------------------------------------

    async def _subscribe(self, action: Subscribe) -> None:
        hub = self._hub
        begun: list[Subscription] = []
        for wanted in action.wanted:
            subscription = Subscription(
                wanted.topic,
                hub.channels.kind_of(wanted.topic),
                self._transport,
                self._siblings,
                wanted.max_hz,
            )
            self._subscriptions[wanted.topic] = subscription
            begun.append(subscription)
        for topic, max_hz in action.throttled:
            self._subscriptions[topic].throttle(max_hz)
        # What is published from here on is offered to them, and waits behind the gate.
        hub.registry.subscribe(self._member, begun)
        frames: list[bytes] = []
        ready: list[Subscription] = []
        pushed: list[Topic] = []
        room = hub.limits.pending_bytes - self._siblings.bytes
        for subscription, wanted in zip(begun, action.wanted, strict=True):
            first = self._first(subscription, wanted, room)
            if first is None:
                continue
            if subscription.kind == "events":
                room -= sum(len(each.data) for each in first)
            ready.append(subscription)
            frames += map(subscription.frame_of, first)
            status = subscription.status_frame(self._status(wanted.topic))
            if status is not None:
                frames.append(status)
            if first:
                pushed.append(wanted.topic)
        self._session.charge(sum(map(len, frames)))
        await self._send([protocol.frame(protocol.encode(action.reply)), *frames])
        for topic in pushed:
            self._log_pushed(topic)
        for subscription in ready:
            subscription.open()
        for subscription in begun:
            assert self._nursery is not None
            self._nursery.start_soon(subscription.run, self, name=_SENDER)
            if subscription.topic.channel in hub.streams.own:
                self._start_stream(subscription)

    def _start_stream(self, subscription: Subscription) -> None:
        scope = trio.CancelScope()
        if self._streams is None:
            self._streams = {}
        self._streams[subscription.topic] = scope
        assert self._nursery is not None
        self._nursery.start_soon(self._run_stream, subscription, scope)

    async def _run_stream(self, subscription: Subscription, scope: trio.CancelScope) -> None:
        topic = subscription.topic
        with scope:
            await self._hub.streams.run_for(subscription, lambda: self._log_pushed(topic))

    def _first(
        self, subscription: Subscription, wanted: Wanted, room: int
    ) -> Sequence[Publication] | None:
        """What a subscription begins with; None where its value is yet to come.

        Args:
            subscription: Which.
            wanted: What the peer has asked for.
            room: How many bytes of missed events may be sent at once.
        """
        broker, topic = self._hub.broker, wanted.topic
        if wanted.since is not None:
            missed = broker.since(topic, wanted.since.epoch, wanted.since.seq)
            lost = 0
            if missed and subscription.kind == "events":
                fits = sum(len(each.data) for each in missed) <= room
                lost = 0 if fits else len(missed) - 1
            wanted.result.recovered = missed is not None and not lost
            if lost:
                subscription.resume_without(lost)
            elif missed is not None:
                seq = wanted.since.seq
                subscription.resume(
                    wanted.since.epoch, seq, knows_status=broker.turned_at(topic) < seq
                )
                return missed
        if self._hub.awaits_source(topic):
            return None
        snapshot = broker.snapshot(topic)
        return () if snapshot is None else (snapshot,)

    def _status(self, topic: Topic) -> StatusChange:
        return StatusChange(topic, self._hub.broker.status(topic), round(time.time() * 1000))

    def _log_pushed(self, topic: Topic) -> None:
        if topic.user is not None and logs.enabled("pushed"):
            logs.emit(logs.line("pushed", data_type=topic.channel, user=topic.user))

    async def _unsubscribe(self, action: Unsubscribe) -> None:
        ended = [self._subscriptions.pop(topic) for topic in action.topics]
        for subscription in ended:
            subscription.close()
            if self._streams and subscription.topic in self._streams:
                self._streams.pop(subscription.topic).cancel()
        if ended:
            self._hub.registry.unsubscribe(self._member, ended)
        await self._send([protocol.frame(protocol.encode(action.reply))])

    # --- what a sender task asks of its owner: see `subscription.Owner` --------------------

    @property
    def first_value_wait_s(self) -> float:
        """How long a subscription waits for the source's first answer."""
        return self._hub.limits.first_value_wait_s

    def begin(self, subscription: Subscription) -> None:
        """Give a subscription the value or the status that there is by now."""
        topic = subscription.topic
        if topic.channel in self._hub.streams.own:
            if subscription.idle:
                subscription.offer(self._status(topic))
            subscription.open()
        elif not subscription.shut and subscription.begin(
            self._hub.broker.snapshot(topic), self._status(topic)
        ):
            self._log_pushed(topic)

    def sender_started(self, subscription: Subscription) -> None:
        """Count it; and the source may have answered while the reply was being written."""
        self._hub.registry.ledger.senders_started += 1
        if not self._hub.awaits_source(subscription.topic):
            subscription.settle()

    def send_failed(self, error: TransportClosed) -> None:
        """The peer is gone, or too slow."""
        if self.closed or self._transport.peer_close is not None:
            return
        if isinstance(error, SendTimeout):
            self._close = _reason_of(error)
        else:
            self._found_by_send = True
        # The receive loop may still find the close frame that the peer sent before it went.
        self._end_by = trio.current_time() + self._hub.limits.close_timeout_s
        self._limit_to(self._limit)
        self._flag_closed()

    def sender_ended(self, subscription: Subscription) -> None:
        """Count it; if it did not end by itself, its connection ends, and is flagged first."""
        if not subscription.shut:
            self._flag_closed()
        self._hub.registry.ledger.senders_ended += 1


def _reason_of(error: TransportClosed) -> Close:
    if isinstance(error, SendTimeout):
        return Close(CloseCode.TOO_SLOW, "too slow", ours=True)
    return ABNORMAL
