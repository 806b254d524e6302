/**
 * The JavaScript client of a trading_push server: one connection kept alive, its channels
 * resubscribed where they left off.
 *
 *     import { connect } from "/trading-push.js";
 *     const client = connect({ url: "wss://push.example.com/ws", token: async () => fetchToken() });
 *     const stop = client.subscribe("ticker.BTCUSDT", push => show(push.data.last), { maxHz: 5 });
 *     for await (const push of client.pushes("positions", "fills")) console.log(push.data);
 *
 * One ES module without dependencies, for browsers, Node 22 and later, and Node 20 with a
 * `WebSocket` handed in. It keeps these rules:
 *
 * 1. The server's word is its messages, and the code of a close frame that it sent: 1002, 1003,
 *    1007, 1009 and 4500 to 4999 end the client for good. After anything else it comes back.
 * 2. A close code that no frame brought was made up on this side, and never ends the client.
 * 3. A browser does not tell the status of a refused handshake. Where the given `WebSocket` does,
 *    one that says that there is no such thing here is believed until the first success.
 * 4. Ping frames are invisible to scripts, so silence is broken by the request `ping`.
 * 5. Timers of hidden tabs and of sleeping machines fire late: a deadline that was slept through
 *    is extended, and the server asked, before it is called silent.
 * 6. Prices are decimal strings and stay strings. An integer beyond 2^53 becomes a string too.
 *
 * @module trading-push
 */

/**
 * What `connect` takes.
 * @typedef {object} ConnectOptions
 * @property {string | URL} url Where the server is: `ws:`, `wss:`, `http:`, `https:`, or a path on
 *   the page's own host.
 * @property {string | (() => string | Promise<string>)} [token] The token, or a function that gives
 *   one. It is called for each connection, and when the present token is about to expire. If it
 *   throws, it is called again after the back-off. `Refused`, or an error whose `final` is true,
 *   ends the client. Without a token only a server's anonymous channels are served.
 * @property {AbortSignal} [signal] Ends the client when it is aborted, like `close()`.
 * @property {SocketMaker} [WebSocket] The class to use in place of the global `WebSocket`.
 * @property {number} [attempts] How many tries the first connection has; no bound by default.
 */

/**
 * Whatever behaves like the class `WebSocket` of browsers.
 * @typedef {new (url: string, protocol: string) => Socket} SocketMaker
 */

/**
 * @typedef {object} Socket
 * @property {((event: any) => void) | null} onopen
 * @property {((event: any) => void) | null} onmessage
 * @property {((event: any) => void) | null} onerror
 * @property {((event: any) => void) | null} onclose
 * @property {(data: string) => void} send
 * @property {(code?: number) => void} close
 * @property {() => void} [terminate]
 */

/**
 * A push, as it stood on the wire.
 *
 * The type `gap` is made here: a consumer of events was too slow, and `dropped` of them are not
 * there any more.
 * @typedef {object} Push
 * @property {string} channel The channel's name as the server spells it.
 * @property {"snapshot" | "update" | "status" | "gap"} type
 * @property {number} ts When it was published, in ms since the epoch.
 * @property {string} [epoch] Within which `seq` counts.
 * @property {number} [seq] The number of the publication.
 * @property {number} [prev] The `seq` of the push before; of an update only.
 * @property {number} [merged] How many publications this one stands for, if more than one.
 * @property {number} [dropped] How many events were lost before this push.
 * @property {any} [data] The payload; decimals are strings.
 * @property {"live" | "stale" | "down"} [state] Of a status only.
 * @property {string} [reason] Why, as a word for programs; of a status only.
 */

/**
 * @typedef {{ state: "connecting" }
 *   | { state: "open", user: string | null }
 *   | { state: "waiting", retryAt: number, reason: string }
 *   | { state: "ended", error: Error | null }} State `retryAt` is in ms since the epoch; `error` is
 *   null after `close()`.
 */

/** @typedef {{ epoch: string, seq: number }} Position */
/** @typedef {{ maxHz?: number, since?: Position }} SubscribeOptions */
/** @typedef {{ channel: string } & SubscribeOptions} Wanted */
/** @typedef {"state" | "events" | "keyed"} Kind */

/**
 * What the events of a client carry as `detail`.
 * @typedef {object} ClientEvents
 * @property {State} state What has become of the connection.
 * @property {{ channel: string, reason: "lost" | "slow", expected?: number, prev?: number,
 *   dropped?: number }} gap Something is missing: `lost` on the way, and asked for again, or left
 *   out for a `slow` consumer of events.
 * @property {{ channel: string, code: string, message: string, retryable: boolean }} refused A
 *   channel is not served; a retryable one is tried again.
 * @property {{ code: string, [member: string]: unknown }} notice What the server announces.
 * @property {{ ms: number }} rtt How long the server took to answer a ping.
 */

/**
 * @template {keyof ClientEvents} T
 * @typedef {((event: CustomEvent<ClientEvents[T]>) => void) | EventListenerObject | null} Listener
 */

/** @typedef {{ code: string, message: string, retryable: boolean }} ErrorBody */
/** @typedef {{ [member: string]: any }} Message */

const PROTOCOL = "trading-push.v1";
const BACK_OFF_FIRST_MS = 200;
const BACK_OFF_MOST_MS = 15_000;
/** A connection that was open for so long lets the back-off begin anew. */
const LASTING_MS = 15_000;
/** The longest advice of a server, on when to come back, that is followed. */
const ADVICE_MOST_MS = 60_000;
/** How long the handshake, and each reply, may take. */
const REPLY_MS = 10_000;
/** How long the server has to answer when the page has just come back to life. */
const CHECK_MS = 5_000;
/** How long the close may take that follows an error. */
const CLOSE_MS = 1_000;
/** A timer that fires later than this by so much was slept through. */
const LATE_MS = 1_000;
/** How many events wait for a slow consumer. */
const EVENTS_WAITING = 1_000;
/** How many candles of each interval are kept. */
const CANDLES_KEPT = 600;
/** So many channels go in one request: well under the server's bound on bytes. */
const CHANNELS_A_REQUEST = 100;
const FASTEST_HZ = 1_000;
const FINAL_CODES = new Set([1002, 1003, 1007, 1009]);
/** The statuses of a handshake that another try does not change, if they are the server's. */
const NOTHING_HERE = /^(200|3\d\d|400|401|403|404|421)$/;

/** The client is over for good, or one channel of it: another try would change nothing. */
export class Refused extends Error {
  name = "Refused";
  final = true;

  /**
   * @param {string} message
   * @param {number} [code] The close code that ended the client; 0 if it was no close.
   * @param {string} [word] The protocol's word for the error, as `bad_token`, if it has one.
   */
  constructor(message, code = 0, word = "") {
    super(message);
    this.code = code;
    this.word = word;
  }
}

/** No connection came about within the `attempts` of the first one. */
export class Unreachable extends Error {
  name = "Unreachable";
}

/**
 * Connect, and stay connected until `close()`.
 *
 * It returns at once: listen to `state` for what becomes of it.
 *
 * @param {ConnectOptions} options
 * @returns {Client}
 */
export function connect(options) {
  return new Client(options);
}

/**
 * A connection that is kept alive; made by `connect`.
 *
 * It is longer than a class should be because everything that a caller sees is here.
 */
export class Client extends EventTarget {
  #url;
  #token;
  #WebSocket;
  #attempts;
  /** @type {State} */
  #state = { state: "connecting" };
  /** What is wanted, by the server's name of the channel, or the caller's until that is known. */
  #subscriptions = /** @type {Map<string, Subscription>} */ (new Map());
  /** The server's name, by each other one that was asked for. */
  #aliases = /** @type {Map<string, string>} */ (new Map());
  /** What kinds an application's own channels have, as the server said. */
  #kinds = /** @type {Map<string, Kind>} */ (new Map());
  /** @type {Line | null} */
  #line = null;
  /** What the server has called expired; the same one again ends the client. */
  #expired = /** @type {string | null} */ (null);
  /** How many connections in a row were of no use. */
  #failures = 0;
  #hasSucceeded = false;
  /** Whether the wait is the server's advice, which nothing shortens. */
  #isAdvised = false;
  /** The timer of the wait before the next try. */
  #timer = /** @type {ReturnType<typeof setTimeout> | undefined} */ (undefined);
  /** Counts the tries, so that what a former one was waiting for is passed over. */
  #turn = 0;
  #isFlushing = false;
  /** Aborted when the client ends; takes the listeners away. */
  #over = new AbortController();
  /** @type {string | null} */
  #user = null;
  /** @type {number | null} */
  #rtt = null;

  /** @param {ConnectOptions} options */
  constructor({ url, token, signal, WebSocket = globalThis.WebSocket, attempts = Infinity }) {
    super();
    if (typeof WebSocket !== "function") {
      throw new TypeError("there is no WebSocket here: hand one in, as connect({ url, WebSocket })");
    }
    if (token !== undefined && typeof token !== "string" && typeof token !== "function") {
      throw new TypeError("token is to be a string, or a function that gives one");
    }
    this.#url = socketUrl(url);
    this.#token = token;
    this.#WebSocket = WebSocket;
    this.#attempts = attempts;
    if (signal?.aborted) {
      this.#end(null);
      return;
    }
    signal?.addEventListener("abort", () => this.close(), { signal: this.#over.signal });
    this.#listenToPage();
    // Not before the caller has had the chance to listen.
    queueMicrotask(() => this.#connect());
  }

  /** Who the server says we are; null before it has said so. */
  get user() {
    return this.#user;
  }

  /** What has become of the connection; each change is an event `state`. */
  get state() {
    return this.#state;
  }

  /** The last measured round trip, in ms; null before the first. `ping()` measures it anew. */
  get rtt() {
    return this.#rtt;
  }

  /**
   * Have `listener` called with each event of a type.
   * @template {keyof ClientEvents} T
   * @param {T} type
   * @param {Listener<T>} listener
   * @param {boolean | AddEventListenerOptions} [options]
   * @override
   */
  addEventListener(type, listener, options) {
    super.addEventListener(type, /** @type {EventListener | null} */ (listener), options);
  }

  /**
   * Take a listener away.
   * @template {keyof ClientEvents} T
   * @param {T} type
   * @param {Listener<T>} listener
   * @param {boolean | EventListenerOptions} [options]
   * @override
   */
  removeEventListener(type, listener, options) {
    super.removeEventListener(type, /** @type {EventListener | null} */ (listener), options);
  }

  /**
   * Subscribe to a channel: `fn` is called with each push, from the snapshot on.
   *
   * While a promise that `fn` has returned is pending, pushes wait: of a state the latest, of a
   * table the union of what has changed, and of events all of them, in order, up to a bound. The
   * same channel twice is one subscription, with the highest `maxHz`; who comes later begins with
   * the value that is there. On a client that has ended nothing happens.
   *
   * @param {string} channel
   * @param {(push: Push) => unknown} fn
   * @param {SubscribeOptions} [options] `maxHz`: no more pushes a second than that. `since`: the
   *   position to go on from.
   * @returns {() => void} Ends the subscription.
   */
  subscribe(channel, fn, options = {}) {
    if (typeof fn !== "function") {
      throw new TypeError("give subscribe() a function that takes the pushes");
    }
    return this.#add(channel, new Calls(fn, (gap) => this.#tell("gap", gap)), options);
  }

  /**
   * Iterate over the pushes of some channels, beginning with their snapshots.
   *
   * They wait for the loop as they do for a slow function given to `subscribe`. Leaving the loop
   * ends the subscriptions. It ends with the client, and throws what has ended it; it throws
   * `Refused` if one of its channels is not served.
   *
   * @param {...(string | Wanted)} channels
   * @returns {AsyncIterableIterator<Push>}
   */
  pushes(...channels) {
    if (!channels.length) throw new TypeError("name the channels to iterate over");
    const pushes = new Pushes((gap) => this.#tell("gap", gap));
    try {
      for (const each of channels) {
        const { channel, ...options } = typeof each === "string" ? { channel: each } : each;
        pushes.stops.push(this.#add(channel, pushes, options));
      }
    } catch (error) {
      pushes.end(null);
      throw error;
    }
    return pushes;
  }

  /**
   * The latest value of a subscribed channel: of a table all rows, as a snapshot.
   * @param {string} channel
   * @returns {Push | undefined}
   */
  latest(channel) {
    return this.#find(channel)?.value;
  }

  /**
   * Measure the round trip now; the event `rtt` has the answer.
   *
   * A server that does not answer within five seconds is left for a new connection.
   */
  ping() {
    if (this.#state.state === "open") this.#line?.check(CHECK_MS);
  }

  /** End the client: the connection is closed, loops over `pushes` end. */
  close() {
    this.#end(null);
  }

  // --- connecting ------------------------------------------------------------------------------

  async #connect() {
    if (this.#over.signal.aborted) return;
    const turn = ++this.#turn;
    clearTimeout(this.#timer);
    this.#setState({ state: "connecting" });
    let token;
    try {
      token = await this.#nextToken();
    } catch (error) {
      if (turn === this.#turn) this.#withoutToken(error);
      return;
    }
    if (turn !== this.#turn) return;
    try {
      this.#line = new Line(this.#WebSocket, this.#url, {
        opened: () => this.#authenticate(token),
        heard: (message) => this.#hear(message),
        measured: (ms) => this.#measured(ms),
        lost: (line, end) => this.#lost(line, end),
      });
    } catch (error) {
      // What the browser itself forbids, as ws: on a page of https:.
      this.#end(new Refused(`this URL cannot be connected to: ${words(error)}`));
    }
  }

  /** @returns {Promise<string | undefined>} */
  async #nextToken() {
    const given = this.#token;
    const token = typeof given === "function" ? await given() : given;
    if (typeof given === "function" && typeof token !== "string") {
      throw new TypeError("it gave no string");
    }
    if (token !== undefined && token === this.#expired) {
      throw new Refused("the token has expired: get a new one", 4003, "token_expired");
    }
    return token;
  }

  /** @param {unknown} error */
  #withoutToken(error) {
    if (isFinal(error)) this.#end(error);
    else this.#wait(`the function that gives the token failed: ${words(error)}`);
  }

  /** @param {string | undefined} token */
  #authenticate(token) {
    const line = this.#line;
    if (token === undefined || !line) {
      this.#opened();
      return;
    }
    line.request({ op: "auth", token }, (reply) => {
      if (reply.ok) {
        this.#authenticated(reply);
        this.#opened();
        return;
      }
      const error = errorOf(reply, "the server refused the token");
      const mayChange = typeof this.#token === "function";
      if (error.code === "token_expired") {
        // One more try, with another token: the same one again ends the client.
        this.#expired = token;
        if (mayChange) line.fail(error.message);
        else this.#end(new Refused(error.message, 4003, error.code));
      } else if (error.retryable) {
        line.fail(error.message);
      } else {
        this.#end(new Refused(error.message, error.code === "bad_token" ? 4500 : 0, error.code));
      }
    });
  }

  /** @param {Message} reply */
  #authenticated(reply) {
    this.#user = typeof reply.user === "string" ? reply.user : null;
    if (typeof reply.heartbeat_s === "number") this.#line?.beat(reply.heartbeat_s * 1000);
  }

  #opened() {
    const line = this.#line;
    if (!line) return;
    this.#hasSucceeded = true;
    line.openSince = performance.now();
    this.#setState({ state: "open", user: this.#user });
    if (line !== this.#line) return; // a listener has closed it
    line.check(line.heartbeatMs);
    this.#flush();
  }

  /**
   * The connection is over: come back, or end.
   * @param {Line} line
   * @param {End} end
   */
  #lost(line, { code, reason, why, isOurs }) {
    this.#line = null;
    for (const each of this.#subscriptions.values()) each.reset();
    const said = reason ? `${code} ${JSON.stringify(reason)}` : String(code);
    if (!isOurs && (FINAL_CODES.has(code) || (code >= 4500 && code <= 4999))) {
      this.#end(new Refused(`the server closed the connection: ${said}`, code));
      return;
    }
    const status = /server response: (\d{3})/.exec(why)?.[1] ?? ""; // as `ws` says it
    if (!this.#hasSucceeded && NOTHING_HERE.test(status)) {
      const advice = /40[13]/.test(status)
        ? "it, or a proxy in front of it, wants another token, or another origin"
        : "check the URL's host and path";
      this.#end(new Refused(`no WebSocket at ${shown(this.#url)}: HTTP ${status}; ${advice}`));
      return;
    }
    if (line.openSince !== null && performance.now() - line.openSince >= LASTING_MS) {
      this.#failures = 0;
    }
    let what = why;
    if (!what && line.isOpen) what = `the connection was closed: ${said}`;
    if (!what) {
      what = "no connection came about: check that the server runs, the URL, and its origins";
    }
    this.#wait(what, line.adviceMs);
  }

  /**
   * Wait before the next try.
   * @param {string} reason
   * @param {number | null} [adviceMs]
   */
  #wait(reason, adviceMs = null) {
    this.#failures += 1;
    if (!this.#hasSucceeded && this.#failures >= this.#attempts) {
      this.#end(new Unreachable(`cannot reach ${shown(this.#url)}: ${reason}`));
      return;
    }
    const ms = adviceMs ?? backOff(this.#failures);
    this.#isAdvised = adviceMs !== null;
    this.#timer = setTimeout(() => this.#connect(), ms);
    this.#setState({ state: "waiting", retryAt: Date.now() + ms, reason });
  }

  /** The page has come back to life: try at once, or see whether the connection still lives. */
  #nudge() {
    if (this.#state.state === "waiting") {
      if (!this.#isAdvised) this.#connect();
    } else {
      this.ping();
    }
  }

  #listenToPage() {
    if (typeof globalThis.addEventListener !== "function") return;
    const options = { signal: this.#over.signal };
    const nudge = () => this.#nudge();
    globalThis.addEventListener("online", nudge, options);
    // Of a page without a document, as a worker, there is nothing more to know.
    if (typeof document === "undefined") return;
    globalThis.addEventListener("pageshow", (event) => event.persisted && nudge(), options);
    document.addEventListener("resume", nudge, options);
    document.addEventListener(
      "visibilitychange",
      () => document.visibilityState === "visible" && nudge(),
      options,
    );
  }

  /** @param {Error | null} error */
  #end(error) {
    if (this.#over.signal.aborted) return;
    this.#over.abort();
    this.#turn += 1;
    clearTimeout(this.#timer);
    this.#line?.leave();
    this.#line = null;
    const subscriptions = [...this.#subscriptions.values()];
    this.#subscriptions.clear();
    this.#setState({ state: "ended", error });
    for (const subscription of subscriptions) {
      subscription.reset();
      for (const consumer of subscription.consumers.keys()) consumer.end(error);
    }
  }

  // --- what the server says --------------------------------------------------------------------

  /** @param {Message} message */
  #hear(message) {
    if (message.op === undefined) {
      if (typeof message.channel === "string") this.#push(/** @type {Push} */ (message));
    } else if (message.op === "notice") {
      this.#heed(message);
    } else if (message.op === "auth" && message.ok) {
      // Authenticated by the handshake itself, as by a cookie.
      this.#authenticated(message);
      if (this.#state.state === "open") this.#setState({ state: "open", user: this.#user });
    }
  }

  /** @param {Message} notice */
  #heed(notice) {
    const line = this.#line;
    if (line && typeof notice.reconnect_after_ms === "number") {
      line.adviceMs = Math.min(Math.max(notice.reconnect_after_ms, 0), ADVICE_MOST_MS);
    }
    if (line && notice.code === "token_expires") this.#renew(line);
    const { op, ...detail } = notice;
    this.#tell("notice", /** @type {ClientEvents["notice"]} */ (detail));
  }

  /**
   * Authenticate again on the living connection; what fails is tried again, ever more slowly.
   * @param {Line} line
   */
  async #renew(line) {
    if (typeof this.#token !== "function" || line.isRenewing) return;
    line.isRenewing = true;
    const sinceLast = performance.now() - line.renewedAt;
    line.renewals = sinceLast < LASTING_MS ? line.renewals + 1 : 0;
    if (line.renewals) await new Promise((done) => setTimeout(done, backOff(line.renewals)));
    line.renewedAt = performance.now();
    let token;
    try {
      token = line === this.#line ? await this.#nextToken() : "";
    } catch (error) {
      line.isRenewing = false;
      if (line !== this.#line) return;
      if (isFinal(error)) this.#end(error);
      else this.#renew(line);
      return;
    }
    if (line !== this.#line) return;
    line.request({ op: "auth", token }, (reply) => {
      line.isRenewing = false;
      // One that is refused for good leaves the session as it was, until its token expires.
      if (!reply.ok && errorOf(reply).retryable) this.#renew(line);
    });
  }

  /** @param {number} ms */
  #measured(ms) {
    this.#rtt = ms;
    this.#tell("rtt", { ms });
  }

  /** @param {Push} push */
  #push(push) {
    const subscription = this.#subscriptions.get(push.channel);
    // Pushes before the reply are of an older stream.
    if (subscription?.stage !== "live") return;
    if (push.type === "status") {
      subscription.status = push;
    } else if (push.type === "snapshot" || push.type === "update") {
      if (!this.#isNext(subscription, push)) return;
      subscription.take(push, this.#kindOf(push.channel));
    } else {
      return; // of a later version
    }
    subscription.offer(push, this.#kindOf(push.channel));
  }

  /**
   * Whether a push is the next one; after a gap, what is missing is asked for.
   * @param {Subscription} subscription
   * @param {Push} push
   */
  #isNext(subscription, push) {
    const at = subscription.position;
    if (push.type === "update") {
      const isSame = at?.epoch === push.epoch;
      if (!at || at.seq !== push.prev) {
        if (at && isSame && (push.seq ?? 0) <= at.seq) return false; // seen already
        const { channel, prev } = push;
        this.#tell("gap", { channel, reason: "lost", expected: at?.seq, prev });
        // The second time, and in another epoch, only a snapshot helps.
        if (subscription.isDoubtful || !isSame) subscription.position = null;
        subscription.isDoubtful = true;
        subscription.stage = "torn";
        this.#flush();
        return false;
      }
    }
    subscription.isDoubtful = false;
    subscription.position = { epoch: push.epoch ?? "", seq: push.seq ?? 0 };
    return true;
  }

  /**
   * @param {string} channel
   * @returns {Kind} What is not known to be anything else keeps its order.
   */
  #kindOf(channel) {
    return kindOf(channel) ?? this.#kinds.get(channel) ?? "events";
  }

  // --- subscriptions ---------------------------------------------------------------------------

  /**
   * @param {string} name
   * @param {Consumer} consumer
   * @param {SubscribeOptions} options
   * @returns {() => void}
   */
  #add(name, consumer, { maxHz, since }) {
    if (typeof name !== "string" || !name) throw new TypeError("name the channel to subscribe");
    if (maxHz !== undefined && !(maxHz > 0 && maxHz <= FASTEST_HZ)) {
      throw new RangeError(`maxHz is to be above 0, and at most ${FASTEST_HZ}`);
    }
    if (this.#state.state === "ended") {
      consumer.end(this.#state.error);
      return () => {};
    }
    let subscription = this.#find(name);
    if (!subscription) {
      const channel = canonical(name);
      subscription = new Subscription(channel, since ?? null);
      this.#subscriptions.set(channel, subscription);
    }
    const seat = { maxHz, isNew: false };
    subscription.consumers.set(consumer, seat);
    this.#greet(subscription, consumer, seat);
    this.#flushSoon();
    return () => {
      const there = this.#find(name);
      if (there?.consumers.get(consumer) !== seat) return;
      there.consumers.delete(consumer);
      consumer.leave();
      this.#flushSoon();
    };
  }

  /**
   * Give someone who comes later what is there already.
   * @param {Subscription} subscription
   * @param {Consumer} consumer
   * @param {Seat} seat
   */
  #greet(subscription, consumer, seat) {
    if (!subscription.value && !subscription.status) return;
    seat.isNew = true;
    queueMicrotask(() => {
      seat.isNew = false;
      if (subscription.consumers.get(consumer) !== seat) return;
      const kind = this.#kindOf(subscription.channel);
      const { value, status } = subscription;
      if (value && kind !== "events") consumer.offer(value, kind);
      if (status && (status.state !== "live" || status.reason)) consumer.offer(status, kind);
    });
  }

  /** @param {string} name */
  #find(name) {
    const channel = canonical(name);
    return this.#subscriptions.get(this.#aliases.get(channel) ?? channel);
  }

  #flushSoon() {
    if (this.#isFlushing) return;
    this.#isFlushing = true;
    queueMicrotask(() => {
      this.#isFlushing = false;
      this.#flush();
    });
  }

  /** Tell the server what has changed in what is wanted, in as few requests as can be. */
  #flush() {
    const line = this.#state.state === "open" ? this.#line : null;
    const ended = [];
    const wanted = [];
    const paced = [];
    for (const each of [...this.#subscriptions.values()]) {
      const isThere = each.stage === "asked" || each.stage === "live" || each.stage === "torn";
      // Subscribing twice starts nothing new: a torn stream has to end first.
      if (isThere && (!each.consumers.size || each.stage === "torn")) ended.push(each.channel);
      if (!each.consumers.size) {
        each.reset();
        this.#subscriptions.delete(each.channel);
      } else if (each.stage === "new" || each.stage === "torn") {
        wanted.push(each);
      } else if (isThere && each.maxHz() !== each.askedHz) {
        paced.push(each);
      }
    }
    if (!line) return;
    if (wanted.some((each) => !kindOf(each.channel) && !this.#kinds.has(each.channel))) {
      this.#askKinds(line);
    }
    for (const channels of batches(ended)) line.request({ op: "unsubscribe", args: channels });
    for (const some of batches(wanted)) {
      const args = some.map((each) => each.item());
      const id = line.request({ op: "subscribe", args }, (reply) => this.#granted(some, id, reply));
      for (const each of some) each.ask(id);
    }
    for (const some of batches(paced)) {
      line.request({ op: "subscribe", args: some.map((each) => each.pace()) });
    }
  }

  /** @param {Line} line */
  #askKinds(line) {
    if (line.hasAskedKinds) return;
    line.hasAskedKinds = true;
    line.request({ op: "channels" }, ({ channels }) => {
      if (!Array.isArray(channels)) return; // of an older server, or not for strangers
      for (const each of channels) this.#kinds.set(each?.channel, each?.kind);
    });
  }

  /**
   * @param {Subscription[]} subscriptions
   * @param {number} id
   * @param {Message} reply
   */
  #granted(subscriptions, id, reply) {
    const results = Array.isArray(reply.results) ? reply.results : [];
    const isWhole = reply.op === "subscribe" && results.length === subscriptions.length;
    if (!isWhole && errorOf(reply).code === "not_authenticated" && this.#token === undefined) {
      this.#end(new Refused("the server wants a token: give connect() one", 0, "not_authenticated"));
      return;
    }
    subscriptions.forEach((subscription, i) => {
      if (subscription.request !== id) return; // given up, or asked for again
      const result = isWhole ? results[i] : reply;
      if (isWhole && result?.ok) this.#begin(subscription, result.channel);
      else this.#refuse(subscription, errorOf(result ?? {}, "the server's reply does not fit"));
    });
  }

  /**
   * The server has granted a subscription; its pushes carry the server's spelling.
   * @param {Subscription} subscription
   * @param {unknown} channel
   */
  #begin(subscription, channel) {
    subscription.begin();
    const asked = subscription.channel;
    if (typeof channel !== "string" || channel === asked) return;
    this.#aliases.set(asked, channel);
    this.#subscriptions.delete(asked);
    const there = this.#subscriptions.get(channel);
    subscription.channel = channel;
    if (!there) {
      this.#subscriptions.set(channel, subscription);
      return;
    }
    for (const [consumer, seat] of subscription.consumers) {
      there.consumers.set(consumer, seat);
      this.#greet(there, consumer, seat);
    }
    this.#flushSoon();
  }

  /**
   * @param {Subscription} subscription
   * @param {ErrorBody} error
   */
  #refuse(subscription, error) {
    const { channel } = subscription;
    if (error.retryable) {
      subscription.pause(() => this.#flush());
    } else {
      subscription.reset();
      this.#subscriptions.delete(channel);
    }
    this.#tell("refused", { channel, ...error });
    if (error.retryable) return;
    const refused = new Refused(`${channel}: ${error.message}`, 0, error.code);
    for (const consumer of [...subscription.consumers.keys()]) consumer.refuse(refused);
  }

  // --- telling ---------------------------------------------------------------------------------

  /** @param {State} state */
  #setState(state) {
    this.#state = state;
    this.#tell("state", state);
  }

  /**
   * @template {keyof ClientEvents} T
   * @param {T} type
   * @param {ClientEvents[T]} detail
   */
  #tell(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }
}

// --- one connection ------------------------------------------------------------------------------

/**
 * How a connection ended: by a close `code` with its `reason`, or by what happened here (`why`).
 * `isOurs`: no close frame of the server has brought the code.
 * @typedef {{ code: number, reason: string, why: string, isOurs: boolean }} End
 */

/**
 * Who is told what happens on a connection.
 * @typedef {object} Owner
 * @property {() => void} opened The handshake is done.
 * @property {(message: Message) => void} heard A message that is no reply.
 * @property {(ms: number) => void} measured How long a ping took.
 * @property {(line: Line, end: End) => void} lost The connection is over; told once.
 */

/**
 * A request that waits for its reply; `isExtended`: its deadline was slept through.
 * @typedef {{ due: number, sentAt: number, isPing: boolean, isExtended: boolean, done: Done }} Request
 */
/** @typedef {(reply: Message) => void} Done */

/** One WebSocket: requests that have deadlines, and pings that break the silence. */
class Line {
  /** How long the server may be silent, in ms. */
  heartbeatMs = 15_000;
  /** Whether the handshake is done. */
  isOpen = false;
  /** Since when the connection is of use, by `performance.now()`. @type {number | null} */
  openSince = null;
  /** When to come back, in ms, as the server's last notice said. @type {number | null} */
  adviceMs = null;
  /** What the client notes of the renewals of its token. */
  isRenewing = false;
  renewals = 0;
  renewedAt = -Infinity;
  hasAskedKinds = false;

  #owner;
  /** @type {Socket} */
  #socket;
  #requests = /** @type {Map<number, Request>} */ (new Map());
  #nextId = 1;
  #heardAt = performance.now();
  #openBy = performance.now() + REPLY_MS;
  /** Whether the deadline of the handshake was slept through. */
  #wasLate = false;
  #timer = /** @type {ReturnType<typeof setTimeout> | undefined} */ (undefined);
  /** When the timer is to fire. */
  #dueAt = 0;
  /** What the socket's `error` event said; undefined if there was none. @type {string | undefined} */
  #failure;
  #isOver = false;

  /**
   * @param {SocketMaker} WebSocket
   * @param {string} url
   * @param {Owner} owner
   */
  constructor(WebSocket, url, owner) {
    this.#owner = owner;
    const socket = new WebSocket(url, PROTOCOL);
    this.#socket = socket;
    // They stay after the end: `ws` throws an error that nobody listens to.
    socket.onopen = () => {
      if (this.#isOver) return;
      this.isOpen = true;
      this.#openBy = Infinity;
      this.#heardAt = performance.now();
      this.#watch();
      owner.opened();
    };
    socket.onmessage = ({ data }) => {
      if (!this.#isOver) this.#read(data);
    };
    socket.onerror = (event) => {
      const why = typeof event?.message === "string" ? event.message : "";
      this.#failure = why;
      // Node's own WebSocket tells no close after a handshake that was refused.
      setTimeout(() => this.fail(why), this.isOpen ? CLOSE_MS : 0);
    };
    socket.onclose = ({ code, reason, wasClean }) => {
      const isOurs = this.#failure !== undefined && !wasClean && code < 4000;
      this.#finish({ code, reason: String(reason ?? ""), why: this.#failure ?? "", isOurs });
    };
    this.#watch();
  }

  /**
   * Send a request.
   * @param {Message} fields
   * @param {Done} [done] Called with the reply.
   * @param {number} [withinMs] How long the reply may take before the connection is given up.
   */
  request(fields, done = () => {}, withinMs = REPLY_MS) {
    const id = this.#nextId++;
    const sentAt = performance.now();
    const isPing = fields.op === "ping";
    this.#requests.set(id, { due: sentAt + withinMs, sentAt, isPing, isExtended: false, done });
    this.#socket.send(JSON.stringify({ ...fields, id }));
    this.#watch();
    return id;
  }

  /**
   * Ping, unless a ping is under way; without an answer in time the connection is given up.
   * @param {number} withinMs
   */
  check(withinMs) {
    if (this.#isOver) return;
    const asked = [...this.#requests.values()].find((each) => each.isPing);
    if (asked) {
      asked.due = Math.min(asked.due, performance.now() + withinMs);
      this.#watch();
      return;
    }
    const sentAt = performance.now();
    const done = () => this.#owner.measured(performance.now() - sentAt);
    this.request({ op: "ping" }, done, withinMs);
  }

  /**
   * Take the server's heartbeat over.
   * @param {number} ms
   */
  beat(ms) {
    this.heartbeatMs = Math.min(Math.max(ms, 100), 300_000);
    this.#watch();
  }

  /**
   * Give the connection up.
   * @param {string} why
   */
  fail(why) {
    if (this.#isOver) return;
    this.#hangUp();
    this.#socket.terminate?.(); // of `ws`, which would wait for the peer's answer
    this.#finish({ code: 0, reason: "", why, isOurs: true });
  }

  /** Close politely, and tell the owner nothing more. */
  leave() {
    this.#isOver = true;
    clearTimeout(this.#timer);
    this.#hangUp();
  }

  #hangUp() {
    try {
      this.#socket.close(1000);
    } catch {
      // One that was never open has nothing to close.
    }
  }

  /** @param {End} end */
  #finish(end) {
    if (this.#isOver) return;
    this.#isOver = true;
    clearTimeout(this.#timer);
    this.#owner.lost(this, end);
  }

  /** @param {unknown} data */
  #read(data) {
    this.#heardAt = performance.now();
    const message = typeof data === "string" ? parse(data) : null;
    if (!message) {
      this.fail("the server sent what this protocol does not have");
      return;
    }
    const asked = message.op === undefined ? undefined : this.#requests.get(message.id);
    if (asked) {
      this.#requests.delete(message.id);
      asked.done(message);
    } else {
      this.#owner.heard(message);
    }
  }

  /** Set the timer to the next moment at which something may be due. */
  #watch() {
    clearTimeout(this.#timer);
    if (this.#isOver) return;
    let due = this.#openBy;
    let isAsked = false;
    for (const each of this.#requests.values()) {
      due = Math.min(due, each.due);
      isAsked ||= each.isPing;
    }
    if (this.isOpen && !isAsked) due = Math.min(due, this.#heardAt + this.heartbeatMs);
    this.#dueAt = due;
    this.#timer = setTimeout(() => this.#look(), Math.max(due - performance.now(), 1));
  }

  #look() {
    const now = performance.now();
    // Slept through: what has come meanwhile may still wait to be read. Believed once for each
    // deadline, because in a hidden tab every timer is late.
    const isLate = now - this.#dueAt > LATE_MS;
    if (now >= this.#openBy) {
      if (!isLate || this.#wasLate) {
        this.fail("the server does not answer");
        return;
      }
      this.#wasLate = true;
      this.#openBy = now + CHECK_MS;
    }
    for (const [id, each] of this.#requests) {
      if (now < each.due) continue;
      if (each.isPing && this.#heardAt > each.sentAt) {
        this.#requests.delete(id); // it is busy with other things, and alive
      } else if (isLate && !each.isExtended) {
        each.isExtended = true;
        each.due = now + CHECK_MS;
      } else {
        this.fail(each.isPing ? "the server fell silent" : "the server does not answer");
        return;
      }
    }
    const isSilent = this.isOpen && now - this.#heardAt >= this.heartbeatMs;
    if (isSilent) this.check(isLate ? CHECK_MS : this.heartbeatMs);
    this.#watch();
  }
}

// --- what is subscribed, and for whom --------------------------------------------------------------

/**
 * Who takes the pushes of a subscription.
 * @typedef {object} Consumer
 * @property {(push: Push, kind: Kind) => void} offer
 * @property {() => void} leave The caller wants no more of a channel.
 * @property {(error: Error) => void} refuse The server does not have the channel.
 * @property {(error: Error | null) => void} end The client is over.
 */

/** @typedef {{ maxHz?: number, isNew: boolean }} Seat */

/** Where one channel stands, and who takes its pushes. */
class Subscription {
  consumers = /** @type {Map<Consumer, Seat>} */ (new Map());
  /** What was passed on last; null if only a snapshot helps. @type {Position | null} */
  position;
  /** Whether there was a gap, and no push has come since. */
  isDoubtful = false;
  /**
   * `asked`: its reply is awaited; `torn`: to be ended, and begun again; `paused`: it was refused,
   * and is tried again later.
   * @type {"new" | "asked" | "live" | "torn" | "paused"}
   */
  stage = "new";
  /** The request whose reply is awaited. */
  request = 0;
  /** The pace that the server was asked for. @type {number | undefined} */
  askedHz;
  /** The latest value; of a table, all of it. @type {Push | undefined} */
  value;
  /** The latest status. @type {Push | undefined} */
  status;
  #refusals = 0;
  #timer = /** @type {ReturnType<typeof setTimeout> | undefined} */ (undefined);

  /**
   * @param {string} channel
   * @param {Position | null} position
   */
  constructor(channel, position) {
    this.channel = channel;
    this.position = position;
  }

  /** The highest pace that somebody wants; undefined if there is no bound. */
  maxHz() {
    const paces = [...this.consumers.values()].map((seat) => seat.maxHz ?? Infinity);
    const highest = Math.max(...paces);
    return highest === Infinity ? undefined : highest;
  }

  /** What to subscribe, for the request. */
  item() {
    const { channel, position } = this;
    const max_hz = this.maxHz();
    if (max_hz === undefined && !position) return channel;
    return { channel, max_hz, since: position ?? undefined };
  }

  /** What changes the pace of the stream that is there, for the request. */
  pace() {
    this.askedHz = this.maxHz();
    return { channel: this.channel, max_hz: this.askedHz ?? FASTEST_HZ };
  }

  /** @param {number} request */
  ask(request) {
    this.stage = "asked";
    this.request = request;
    this.askedHz = this.maxHz();
  }

  begin() {
    this.stage = "live";
    this.#refusals = 0;
  }

  /** @param {() => void} again */
  pause(again) {
    this.reset();
    this.stage = "paused";
    this.#refusals += 1;
    this.#timer = setTimeout(() => {
      this.stage = "new";
      again();
    }, backOff(this.#refusals));
  }

  /** There is no stream any more. */
  reset() {
    clearTimeout(this.#timer);
    this.stage = "new";
    this.request = 0;
  }

  /**
   * Take a value over.
   * @param {Push} push
   * @param {Kind} kind
   */
  take(push, kind) {
    this.value = kind === "keyed" ? whole(this.value, push) : push;
  }

  /**
   * @param {Push} push
   * @param {Kind} kind
   */
  offer(push, kind) {
    for (const [consumer, seat] of this.consumers) if (!seat.isNew) consumer.offer(push, kind);
  }
}

/** The pushes that wait for a consumer that is busy. */
class Backlog {
  /** By what a later push replaces; events are under a number of their own. */
  #waiting = /** @type {Map<string | number, Push>} */ (new Map());
  /** How many events wait, by channel. */
  #events = /** @type {Map<string, number>} */ (new Map());
  #count = 0;
  #tellGap;

  /** @param {(gap: ClientEvents["gap"]) => void} tellGap */
  constructor(tellGap) {
    this.#tellGap = tellGap;
  }

  /**
   * @param {Push} push
   * @param {Kind} kind
   */
  put(push, kind) {
    const { channel, type } = push;
    if (type === "status") {
      this.#waiting.set(`status ${channel}`, push);
    } else if (kind === "events") {
      this.#putEvent(push);
    } else {
      const before = this.#waiting.get(channel);
      this.#waiting.set(channel, before ? merged(before, push, kind) : push);
    }
  }

  /** @returns {Push | undefined} The one that has waited longest. */
  take() {
    for (const [key, push] of this.#waiting) {
      this.#waiting.delete(key);
      const events = this.#events.get(push.channel);
      if (typeof key === "number" && events) this.#events.set(push.channel, events - 1);
      return push;
    }
    return undefined;
  }

  /** @param {Push} push */
  #putEvent(push) {
    const { channel, ts } = push;
    const waiting = this.#events.get(channel) ?? 0;
    if (waiting >= EVENTS_WAITING) {
      let dropped = 0;
      for (const [key, each] of this.#waiting) {
        if (typeof key !== "number" || each.channel !== channel) continue;
        dropped += each.type === "gap" ? (each.dropped ?? 0) : 1;
        this.#waiting.delete(key);
      }
      this.#waiting.set(this.#count++, { channel, type: "gap", ts, dropped });
      this.#events.set(channel, 1);
      this.#tellGap({ channel, reason: "slow", dropped });
    }
    this.#waiting.set(this.#count++, push);
    this.#events.set(channel, (this.#events.get(channel) ?? 0) + 1);
  }
}

/** @implements {Consumer} */
class Calls {
  #fn;
  #backlog;
  #isBusy = false;

  /**
   * @param {(push: Push) => unknown} fn
   * @param {(gap: ClientEvents["gap"]) => void} tellGap
   */
  constructor(fn, tellGap) {
    this.#fn = fn;
    this.#backlog = new Backlog(tellGap);
  }

  /**
   * @param {Push} push
   * @param {Kind} kind
   */
  offer(push, kind) {
    if (this.#isBusy) this.#backlog.put(push, kind);
    else this.#call(push);
  }

  leave() {
    while (this.#backlog.take());
  }

  refuse() {}
  end() {}

  /** @param {Push | undefined} push */
  #call(push) {
    for (; push; push = this.#backlog.take()) {
      try {
        const answer = this.#fn(push);
        if (isPromise(answer)) {
          this.#isBusy = true;
          Promise.resolve(answer).catch(report).then(() => {
            this.#isBusy = false;
            this.#call(this.#backlog.take());
          });
          return;
        }
      } catch (error) {
        report(error);
      }
    }
  }
}

/**
 * @implements {Consumer}
 * @implements {AsyncIterableIterator<Push>}
 */
class Pushes {
  /** What ends its subscriptions. @type {(() => void)[]} */
  stops = [];
  /** Who waits for the next push, the first one first. @type {Waiter[]} */
  #waiters = [];
  #backlog;
  #isOver = false;
  /** What is to be thrown, once. @type {Error | null} */
  #error = null;

  /** @param {(gap: ClientEvents["gap"]) => void} tellGap */
  constructor(tellGap) {
    this.#backlog = new Backlog(tellGap);
  }

  [Symbol.asyncIterator]() {
    return this;
  }

  /** @returns {Promise<IteratorResult<Push, undefined>>} */
  next() {
    const value = this.#backlog.take();
    if (value) return Promise.resolve({ value, done: false });
    if (!this.#isOver) {
      return new Promise((resolve, reject) => this.#waiters.push({ resolve, reject }));
    }
    const error = this.#error;
    this.#error = null;
    return error ? Promise.reject(error) : Promise.resolve({ value: undefined, done: true });
  }

  /** @returns {Promise<IteratorResult<Push, undefined>>} */
  return() {
    this.end(null);
    while (this.#backlog.take());
    this.#error = null;
    return Promise.resolve({ value: undefined, done: true });
  }

  /**
   * @param {Push} push
   * @param {Kind} kind
   */
  offer(push, kind) {
    if (this.#isOver) return;
    const waiter = this.#waiters.shift();
    if (waiter) waiter.resolve({ value: push, done: false });
    else this.#backlog.put(push, kind);
  }

  leave() {}

  /** @param {Error} error */
  refuse(error) {
    this.end(error);
  }

  /** @param {Error | null} error */
  end(error) {
    if (this.#isOver) return;
    this.#isOver = true;
    for (const stop of this.stops) stop();
    const [first, ...others] = this.#waiters.splice(0);
    if (first && error) first.reject(error);
    else if (first) first.resolve({ value: undefined, done: true });
    else this.#error = error;
    for (const each of others) each.resolve({ value: undefined, done: true });
  }
}

/**
 * @typedef {object} Waiter
 * @property {(result: IteratorResult<Push, undefined>) => void} resolve
 * @property {(error: Error) => void} reject
 */

// --- tables ----------------------------------------------------------------------------------------

/**
 * What kind of channel this is by its name; undefined for an application's own.
 * @param {string} channel
 * @returns {Kind | undefined}
 */
function kindOf(channel) {
  if (channel === "ticker.*" || channel.startsWith("candles.")) return "keyed";
  if (channel === "fills") return "events";
  if (channel.startsWith("ticker.") || /^(balance|positions|pnl|orders)$/.test(channel)) {
    return "state";
  }
  return undefined;
}

/**
 * Two pushes as one, for someone who has seen neither.
 * @param {Push} before
 * @param {Push} push
 * @param {Kind} kind
 * @returns {Push}
 */
function merged(before, push, kind) {
  if (push.type === "snapshot") return push;
  const both = {
    ...push,
    type: before.type,
    prev: before.prev,
    merged: (before.merged ?? 1) + (push.merged ?? 1),
  };
  if (kind === "keyed") both.data = union(before.data, push.data);
  return both;
}

/**
 * The whole table after a push, as a snapshot.
 * @param {Push | undefined} table
 * @param {Push} push
 * @returns {Push}
 */
function whole(table, push) {
  if (push.type === "snapshot") return push;
  const { prev, merged: count, ...rest } = push;
  return { ...rest, type: "snapshot", data: union(table?.data, push.data) };
}

/**
 * The rows of both, those of `changed` in place of former ones: tickers by symbol, or candles by
 * interval and time.
 * @param {any} rows
 * @param {any} changed
 */
function union(rows, changed) {
  if (Array.isArray(changed)) {
    const bySymbol = new Map((rows ?? []).map((/** @type {any} */ row) => [row.symbol, row]));
    for (const row of changed) bySymbol.set(row.symbol, row);
    return [...bySymbol.values()];
  }
  const intervals = new Map(Object.entries(rows ?? {}));
  for (const [interval, bars] of Object.entries(changed)) {
    intervals.set(interval, withBars(intervals.get(interval) ?? [], bars));
  }
  return Object.fromEntries(intervals);
}

/**
 * @param {any[][]} bars Each begins with its time, and they are in its order.
 * @param {any[][]} changed
 */
function withBars(bars, changed) {
  const all = [...bars];
  for (const bar of changed) {
    let at = all.length;
    while (at > 0 && all[at - 1][0] > bar[0]) at -= 1;
    if (at > 0 && all[at - 1][0] === bar[0]) all[at - 1] = bar;
    else all.splice(at, 0, bar);
  }
  return all.slice(-CANDLES_KEPT);
}

// --- small things ----------------------------------------------------------------------------------

/**
 * The wait after so many failures in a row, at random, so that not all clients come back at once.
 * @param {number} failures
 */
function backOff(failures) {
  const longest = Math.min(BACK_OFF_MOST_MS, BACK_OFF_FIRST_MS * 2 ** (failures - 1));
  return longest * (0.5 + Math.random() / 2);
}

/**
 * The message that a text holds; null if it is none of this protocol.
 *
 * An integer that `Number` cannot hold becomes a string.
 * @param {string} text
 * @returns {Message | null}
 */
function parse(text) {
  try {
    const message = JSON.parse(/\d{16}/.test(text) ? withLongNumbersQuoted(text) : text);
    return isMessage(message) ? message : null;
  } catch {
    return null;
  }
}

/** @param {string} text */
function withLongNumbersQuoted(text) {
  const tokens = /"[^"\\]*(?:\\.[^"\\]*)*"|-?\d[\d.eE+-]*/g;
  return text.replace(tokens, (token) =>
    /^-?\d{16,}$/.test(token) && !Number.isSafeInteger(Number(token)) ? `"${token}"` : token,
  );
}

/** @param {any} message */
function isMessage(message) {
  if (typeof message !== "object" || message === null) return false;
  const { op, channel, seq, prev, error } = message;
  return (
    [op, channel].every((each) => each === undefined || typeof each === "string") &&
    [seq, prev].every((each) => each == null || Number.isSafeInteger(each)) &&
    (error == null || typeof error === "object") &&
    (op !== undefined || channel !== undefined)
  );
}

/**
 * Why something was refused.
 * @param {Message} reply
 * @param {string} [otherwise] What is said if the server says nothing.
 * @returns {ErrorBody}
 */
function errorOf({ error }, otherwise = "the server refuses it") {
  // What does not even fit may do so the next time.
  const { code = "", message = otherwise, retryable = !error } = error ?? {};
  return { code, message, retryable };
}

/**
 * A channel's name as the server spells it, as far as that can be known here.
 * @param {string} name
 */
function canonical(name) {
  const [, kind, symbol] = /^(ticker|candles)\.(.*)$/su.exec(name.normalize("NFC")) ?? [];
  if (!kind || symbol === undefined) return name;
  return `${kind}.${symbol.replace(/[a-z]+/g, (letters) => letters.toUpperCase())}`;
}

/** @param {string | URL} url */
function socketUrl(url) {
  let made;
  try {
    made = new URL(url, globalThis.location?.href);
  } catch {
    // Said below, without what may hold a secret.
  }
  if (made) made.protocol = made.protocol.replace(/^http/, "ws");
  if (!made?.host || !/^wss?:$/.test(made.protocol)) {
    throw new TypeError("url is no WebSocket URL: give one like wss://push.example.com/ws");
  }
  made.hash = "";
  return made.href;
}

/**
 * A URL without what may be a secret.
 * @param {string} url
 */
function shown(url) {
  const { protocol, host, pathname } = new URL(url);
  return `${protocol}//${host}${pathname}`;
}

/**
 * @param {unknown} error
 * @returns {error is Error}
 */
function isFinal(error) {
  return error instanceof Error && /** @type {{ final?: unknown }} */ (error).final === true;
}

/**
 * @param {any} answer
 * @returns {answer is PromiseLike<unknown>}
 */
function isPromise(answer) {
  return typeof answer?.then === "function";
}

/** @param {unknown} error */
function words(error) {
  return error instanceof Error ? `${error.name}: ${error.message}` : String(error);
}

/**
 * Let an error of the caller's own code be seen, without ending anything.
 * @param {unknown} error
 */
function report(error) {
  queueMicrotask(() => {
    throw error;
  });
}

/**
 * @template T
 * @param {T[]} items
 * @returns {T[][]}
 */
function batches(items) {
  const all = [];
  for (let at = 0; at < items.length; at += CHANNELS_A_REQUEST) {
    all.push(items.slice(at, at + CHANNELS_A_REQUEST));
  }
  return all;
}
