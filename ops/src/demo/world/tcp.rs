//! TCP connections that stay open, with real stacks at both ends, and requests whose every byte is checked.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

use flow::sample::Seeded;
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Checksum, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp::{Socket, SocketBuffer};
use smoltcp::time::{Duration, Instant};
use smoltcp::wire::{HardwareAddress, IpCidr};

use super::WorldSpec;
use super::frame::{Address, ETHERNET_LEN, Headers, write_ethernet};
use super::net::{Net, micros};
use super::pattern;
use super::report::Ledger;

const SERVER_PORT: u16 = 8_080;
/// The first source port of a client.
const CLIENT_PORT: u16 = 20_000;
/// Bytes of each socket buffer.
const BUFFER_LEN: usize = 8_192;
/// Room for the tunnels' headers in a frame of usual size.
const MTU: usize = 1_400;
/// A connection that hears nothing for so long is given up.
const TIMEOUT: Duration = Duration::from_secs(30);
/// How long a connection that broke stays down, in microseconds.
const RECONNECT_DELAY: u64 = 1_000_000;
/// Connection, number of the request, check.
const HEADER_LEN: usize = 16;
/// Not armed.
const NEVER: u64 = u64::MAX;

/// A stack with one socket.
struct Host {
    iface: Interface,
    sockets: SocketSet<'static>,
    handle: SocketHandle,
    armed: u64,
}

/// The wire of a host during one poll: at most one packet in, any number out.
struct Wire<'a> {
    rx: Option<&'a [u8]>,
    tx: &'a mut Vec<Vec<u8>>,
    net: &'a mut Net,
}

struct Rx<'a>(&'a [u8]);

struct Tx<'a> {
    tx: &'a mut Vec<Vec<u8>>,
    net: &'a mut Net,
}

impl Device for Wire<'_> {
    type RxToken<'a>
        = Rx<'a>
    where
        Self: 'a;
    type TxToken<'a>
        = Tx<'a>
    where
        Self: 'a;

    fn receive(&mut self, _: Instant) -> Option<(Rx<'_>, Tx<'_>)> {
        let packet = self.rx.take()?;
        Some((Rx(packet), Tx { tx: self.tx, net: self.net }))
    }

    fn transmit(&mut self, _: Instant) -> Option<Tx<'_>> {
        Some(Tx { tx: self.tx, net: self.net })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = MTU;
        // What comes in was checked and counted before.
        capabilities.checksum.ipv4 = Checksum::Tx;
        capabilities.checksum.tcp = Checksum::Tx;
        capabilities
    }
}

impl RxToken for Rx<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(self.0)
    }
}

impl TxToken for Tx<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = self.net.buffer();
        frame.resize(ETHERNET_LEN + len, 0);
        write_ethernet(&mut frame);
        let result = f(&mut frame[ETHERNET_LEN..]);
        self.tx.push(frame);
        result
    }
}

impl Host {
    fn new(address: std::net::Ipv4Addr, seed: u64, now: u64) -> Self {
        let mut config = Config::new(HardwareAddress::Ip);
        config.random_seed = seed;
        let mut iface = Interface::new(config, &mut Idle, instant(now));
        iface.update_ip_addrs(|addresses| {
            // There is room for one.
            let _ = addresses.push(IpCidr::new(address.into(), 32));
        });
        // Packets leave as they are; a stack without a route would keep them.
        let _ = iface.routes_mut().add_default_ipv4_route(address);
        let mut sockets = SocketSet::new(Vec::with_capacity(1));
        let buffer = || SocketBuffer::new(vec![0; BUFFER_LEN]);
        let mut socket = Socket::new(buffer(), buffer());
        socket.set_nagle_enabled(false);
        let handle = sockets.add(socket);
        Self { iface, sockets, handle, armed: NEVER }
    }

    fn socket(&mut self) -> &mut Socket<'static> {
        self.sockets.get_mut(self.handle)
    }

    fn poll(&mut self, rx: Option<&[u8]>, tx: &mut Vec<Vec<u8>>, net: &mut Net) {
        let now = instant(net.now);
        self.iface.poll(now, &mut Wire { rx, tx, net }, &mut self.sockets);
    }

    /// When the stack wants to be polled.
    fn due(&mut self, now: u64) -> u64 {
        let at = self.iface.poll_at(instant(now), &self.sockets);
        at.map_or(NEVER, |at| u64::try_from(at.total_micros()).unwrap_or(0).max(now))
    }
}

/// A wire that nothing goes over: a stack asks only for its properties when it is made.
struct Idle;

impl Device for Idle {
    type RxToken<'a> = Rx<'a>;
    type TxToken<'a> = NoTx;

    fn receive(&mut self, _: Instant) -> Option<(Rx<'_>, NoTx)> {
        None
    }

    fn transmit(&mut self, _: Instant) -> Option<NoTx> {
        None
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = MTU;
        capabilities
    }
}

struct NoTx;

impl TxToken for NoTx {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        f(&mut vec![0; len])
    }
}

fn instant(micros: u64) -> Instant {
    Instant::from_micros(i64::try_from(micros).unwrap_or(i64::MAX))
}

/// One request and its answer, as both ends know them.
#[derive(Clone, Copy)]
struct Exchange {
    seed: u64,
    connection: u32,
    number: u32,
}

impl Exchange {
    fn key(self, way: u64) -> u64 {
        pattern::key(self.seed ^ way, u64::from(self.connection), u64::from(self.number))
    }

    fn header(self) -> [u8; HEADER_LEN] {
        let mut header = [0; HEADER_LEN];
        header[..4].copy_from_slice(&self.connection.to_be_bytes());
        header[4..8].copy_from_slice(&self.number.to_be_bytes());
        header[8..].copy_from_slice(&self.key(1).to_be_bytes());
        header
    }

    /// What a header says, when it is intact.
    fn read(seed: u64, header: &[u8; HEADER_LEN]) -> Option<Self> {
        let word = |at: usize| Some(u32::from_be_bytes(header[at..at + 4].try_into().ok()?));
        let exchange = Self { seed, connection: word(0)?, number: word(4)? };
        (exchange.header() == *header).then_some(exchange)
    }

    /// Bytes of the request behind its header: 20 to 319.
    fn request_len(self) -> usize {
        20 + usize::try_from(self.key(2) % 300).unwrap_or(0)
    }

    /// Bytes of the answer: 200 to 4000.
    fn answer_len(self) -> usize {
        200 + usize::try_from(self.key(3) % 3_801).unwrap_or(0)
    }

    /// Makes bytes of the request, header included.
    fn fill_request(self, at: usize, bytes: &mut [u8]) {
        let header = self.header();
        let from_header = HEADER_LEN.saturating_sub(at).min(bytes.len());
        bytes[..from_header].copy_from_slice(&header[at.min(HEADER_LEN)..][..from_header]);
        pattern::fill(self.key(4), at + from_header, &mut bytes[from_header..]);
    }
}

/// Where a client is in its endless series of requests.
#[derive(Clone, Copy)]
enum ClientPhase {
    Connecting,
    Thinking { until: u64 },
    Sending { at: usize, started: u64 },
    Receiving { at: usize, started: u64 },
    Broken { until: u64 },
}

struct Client {
    host: Host,
    client: usize,
    group: usize,
    server: usize,
    port: u16,
    exchange: Exchange,
    phase: ClientPhase,
}

/// Where a server is.
enum ServerPhase {
    Header { header: [u8; HEADER_LEN], at: usize },
    Request { exchange: Exchange, at: usize },
    Answer { exchange: Exchange, at: usize },
}

struct Server {
    host: Host,
    server: usize,
    phase: ServerPhase,
}

/// Timers name ends: clients first, servers behind them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum End {
    Client(usize),
    Server(usize),
}

/// What an end needs to know when it runs.
struct Scene<'a> {
    seed: u64,
    now: u64,
    stopped: bool,
    think: (u64, u64),
    rng: &'a mut Seeded,
    ledger: &'a mut Ledger,
}

/// All connections.
pub(super) struct Tcp {
    seed: u64,
    think: (u64, u64),
    clients: Vec<Client>,
    servers: Vec<Server>,
    by_client: HashMap<Address, usize>,
    by_server: HashMap<(Address, Address), usize>,
    timers: BinaryHeap<Reverse<(u64, End)>>,
    tx: Vec<Vec<u8>>,
    rng: Seeded,
    /// No new request begins.
    pub(super) stopped: bool,
}

impl Tcp {
    pub(super) fn new(spec: &WorldSpec, net: &Net, start: u64) -> Self {
        let mut tcp = Self {
            seed: spec.seed,
            think: (micros(spec.think.0), micros(spec.think.1)),
            clients: Vec::with_capacity(spec.tcp_connections),
            servers: Vec::with_capacity(spec.tcp_connections),
            by_client: HashMap::new(),
            by_server: HashMap::new(),
            timers: BinaryHeap::new(),
            tx: Vec::new(),
            rng: Seeded::new(spec.seed ^ 0x7463_7000),
            stopped: false,
        };
        for at in 0..spec.tcp_connections {
            tcp.add(at, net, start);
        }
        tcp
    }

    /// A connection that will be opened within the first second.
    fn add(&mut self, at: usize, net: &Net, start: u64) {
        let client = at % net.clients.len();
        let server = net.choose_server(net.clients[client].group, &mut self.rng);
        let port = CLIENT_PORT + u16::try_from(at / net.clients.len() % 40_000).unwrap_or(0);
        let mut host = Host::new(net.clients[client].address, self.rng.word(), start);
        let until = start + self.rng.below(1_000_000);
        host.armed = until;
        self.timers.push(Reverse((until, End::Client(at))));
        let connection = u32::try_from(at).unwrap_or(u32::MAX);
        let exchange = Exchange { seed: self.seed, connection, number: 0 };
        let phase = ClientPhase::Broken { until };
        self.clients.push(Client {
            host,
            client,
            group: net.clients[client].group,
            server,
            port,
            exchange,
            phase,
        });
    }

    pub(super) fn next_due(&self) -> Option<u64> {
        self.timers.peek().map(|Reverse((due, _))| *due)
    }

    /// Runs the ends whose time has come.
    pub(super) fn tick(&mut self, net: &mut Net, ledger: &mut Ledger) {
        while self.next_due().is_some_and(|due| due <= net.now) {
            let Some(Reverse((due, end))) = self.timers.pop() else { return };
            let armed = match end {
                End::Client(at) => &mut self.clients[at].host.armed,
                End::Server(at) => &mut self.servers[at].host.armed,
            };
            if *armed == due {
                *armed = NEVER;
                self.run(end, None, net, ledger);
            }
        }
    }

    /// A packet arrived at a client.
    pub(super) fn arrive_at_client(
        &mut self,
        headers: &Headers,
        frame: &[u8],
        net: &mut Net,
        ledger: &mut Ledger,
    ) {
        match self.by_client.get(&headers.to) {
            Some(&at) => self.run(End::Client(at), Some(headers.packet(frame)), net, ledger),
            None => ledger.checks().misdelivered += 1,
        }
    }

    /// A packet arrived at a server.
    pub(super) fn arrive_at_server(
        &mut self,
        headers: &Headers,
        frame: &[u8],
        net: &mut Net,
        ledger: &mut Ledger,
    ) {
        let pair = (headers.from, headers.to);
        let known = self.by_server.get(&pair).copied();
        let Some(at) = known.or_else(|| self.listen(pair, net)) else {
            ledger.checks().misdelivered += 1;
            return;
        };
        self.run(End::Server(at), Some(headers.packet(frame)), net, ledger);
    }

    /// A new end of a server, for one peer. A packet that opens no connection is answered by a reset, as
    /// anywhere. Bounded: as if each client had come from several outside endpoints.
    fn listen(&mut self, pair: (Address, Address), net: &Net) -> Option<usize> {
        let server = net.server(pair.1.0)?;
        if self.servers.len() > self.clients.len() * 8 {
            return None;
        }
        let host = Host::new(pair.1.0, self.rng.word(), net.now);
        self.servers.push(Server { host, server, phase: ServerPhase::start() });
        self.by_server.insert(pair, self.servers.len() - 1);
        Some(self.servers.len() - 1)
    }

    fn run(&mut self, end: End, packet: Option<&[u8]>, net: &mut Net, ledger: &mut Ledger) {
        let (think, stopped, now) = (self.think, self.stopped, net.now);
        let mut scene = Scene { seed: self.seed, now, stopped, think, rng: &mut self.rng, ledger };
        let tx = &mut self.tx;
        let (host, due) = match end {
            End::Client(at) => {
                let client = &mut self.clients[at];
                client.host.poll(packet, tx, net);
                client.run(net, &mut scene, &mut self.by_client, at);
                client.host.poll(None, tx, net);
                tx.drain(..).for_each(|frame| net.client_sends(client.client, frame));
                let due = client.due();
                (&mut client.host, due)
            }
            End::Server(at) => {
                let server = &mut self.servers[at];
                server.listen();
                server.host.poll(packet, tx, net);
                server.run(&mut scene);
                server.host.poll(None, tx, net);
                tx.drain(..).for_each(|frame| net.server_sends(server.server, frame));
                (&mut server.host, NEVER)
            }
        };
        // Later wishes are found when an earlier timer fires. Who wants to run again at once does so in the next turn: a turn has an end,
        // whatever an end wants.
        let due = due.min(host.due(net.now)).max(net.now + 1);
        if due < host.armed {
            host.armed = due;
            self.timers.push(Reverse((due, end)));
        }
    }
}

impl Client {
    /// When it wants to run without a packet.
    fn due(&self) -> u64 {
        match self.phase {
            ClientPhase::Thinking { until } | ClientPhase::Broken { until } => until,
            ClientPhase::Connecting | ClientPhase::Sending { .. } | ClientPhase::Receiving { .. } => NEVER,
        }
    }

    /// Takes as many steps as can be taken now.
    fn run(&mut self, net: &Net, scene: &mut Scene<'_>, by_client: &mut HashMap<Address, usize>, at: usize) {
        if self.is_lost() {
            self.give_up(scene);
        }
        if let ClientPhase::Broken { until } = self.phase
            && until <= scene.now
        {
            if scene.stopped {
                // It stays down, and wants nothing any more.
                self.phase = ClientPhase::Broken { until: NEVER };
                return;
            }
            by_client.remove(&(net.clients[self.client].address, self.port));
            self.connect(net, scene);
            by_client.insert((net.clients[self.client].address, self.port), at);
        }
        while self.step(scene) {}
    }

    fn is_lost(&mut self) -> bool {
        let socket = self.host.socket();
        match self.phase {
            ClientPhase::Broken { .. } => false,
            ClientPhase::Connecting => !socket.is_open(),
            ClientPhase::Thinking { .. } | ClientPhase::Sending { .. } | ClientPhase::Receiving { .. } => {
                !socket.may_send() || !socket.may_recv()
            }
        }
    }

    fn give_up(&mut self, scene: &mut Scene<'_>) {
        if !matches!(self.phase, ClientPhase::Connecting) {
            scene.ledger.open = scene.ledger.open.saturating_sub(1);
        }
        scene.ledger.broke(self.group, scene.now);
        self.host.socket().abort();
        self.phase = ClientPhase::Broken { until: scene.now + RECONNECT_DELAY };
    }

    fn connect(&mut self, net: &Net, scene: &mut Scene<'_>) {
        // Another port than before, and than those of the client's other connections.
        self.port =
            if self.exchange.number == 0 { self.port } else { self.port.wrapping_add(1_000).max(1_024) };
        let server = (net.servers[self.server].address, SERVER_PORT);
        let local = (net.clients[self.client].address, self.port);
        let Host { iface, sockets, handle, .. } = &mut self.host;
        let socket = sockets.get_mut::<Socket<'_>>(*handle);
        socket.set_timeout(Some(TIMEOUT));
        self.phase = match socket.connect(iface.context(), server, local) {
            Ok(()) => ClientPhase::Connecting,
            Err(_) => ClientPhase::Broken { until: scene.now + RECONNECT_DELAY },
        };
    }

    /// One step; whether another one may follow.
    fn step(&mut self, scene: &mut Scene<'_>) -> bool {
        let exchange = self.exchange;
        let next = match self.phase {
            ClientPhase::Connecting if self.host.socket().may_send() => {
                scene.ledger.open += 1;
                ClientPhase::Thinking { until: scene.now + scene.pause() }
            }
            ClientPhase::Thinking { until } if until <= scene.now => {
                if scene.stopped {
                    self.phase = ClientPhase::Thinking { until: NEVER };
                    return false;
                }
                self.exchange.number += 1;
                ClientPhase::Sending { at: 0, started: scene.now }
            }
            ClientPhase::Sending { at, started } => {
                let len = HEADER_LEN + exchange.request_len();
                let at = at + send(self.host.socket(), at, len, |at, bytes| exchange.fill_request(at, bytes));
                if at < len {
                    self.phase = ClientPhase::Sending { at, started };
                    return false;
                }
                ClientPhase::Receiving { at: 0, started }
            }
            ClientPhase::Receiving { at, started } => {
                let len = exchange.answer_len();
                let at = at + receive(self.host.socket(), exchange.key(5), at, len, scene.ledger);
                if at < len {
                    self.phase = ClientPhase::Receiving { at, started };
                    return false;
                }
                scene.ledger.request(self.group, started, scene.now - started);
                ClientPhase::Thinking { until: scene.now + scene.pause() }
            }
            ClientPhase::Connecting | ClientPhase::Thinking { .. } | ClientPhase::Broken { .. } => {
                return false;
            }
        };
        self.phase = next;
        true
    }
}

impl ServerPhase {
    fn start() -> Self {
        Self::Header { header: [0; HEADER_LEN], at: 0 }
    }
}

impl Server {
    /// Waits for a connection, at first and after one has ended.
    fn listen(&mut self) {
        let socket = self.host.socket();
        if !socket.is_open() {
            self.phase = ServerPhase::start();
            // Fails only without a port or while open.
            let _ = socket.listen(SERVER_PORT);
        }
    }

    fn run(&mut self, scene: &mut Scene<'_>) {
        while self.step(scene) {}
        let socket = self.host.socket();
        if socket.may_send() && !socket.may_recv() {
            socket.close();
        }
    }

    /// One step; whether another one may follow.
    fn step(&mut self, scene: &mut Scene<'_>) -> bool {
        let socket = self.host.sockets.get_mut::<Socket<'_>>(self.host.handle);
        let next = match &mut self.phase {
            ServerPhase::Header { header, at } => {
                *at += socket.recv_slice(&mut header[*at..]).unwrap_or(0);
                if *at < HEADER_LEN {
                    return false;
                }
                let Some(exchange) = Exchange::read(scene.seed, header) else {
                    scene.ledger.tcp().corrupt += HEADER_LEN as u64;
                    socket.abort();
                    return false;
                };
                scene.ledger.tcp().bytes_verified += HEADER_LEN as u64;
                ServerPhase::Request { exchange, at: HEADER_LEN }
            }
            ServerPhase::Request { exchange, at } => {
                let len = HEADER_LEN + exchange.request_len();
                *at += receive(socket, exchange.key(4), *at, len, scene.ledger);
                if *at < len {
                    return false;
                }
                ServerPhase::Answer { exchange: *exchange, at: 0 }
            }
            ServerPhase::Answer { exchange, at } => {
                let (len, key) = (exchange.answer_len(), exchange.key(5));
                *at += send(socket, *at, len, |at, bytes| pattern::fill(key, at, bytes));
                if *at < len {
                    return false;
                }
                ServerPhase::start()
            }
        };
        self.phase = next;
        true
    }
}

impl Scene<'_> {
    fn pause(&mut self) -> u64 {
        let (least, most) = self.think;
        least + self.rng.below(most.saturating_sub(least).max(1))
    }
}

/// Sends from `at` up to `len` as far as there is room; how many bytes.
fn send(socket: &mut Socket<'_>, at: usize, len: usize, mut fill: impl FnMut(usize, &mut [u8])) -> usize {
    let mut sent = 0;
    while at + sent < len {
        let from = at + sent;
        let taken = socket.send(|room| {
            let count = room.len().min(len - from);
            fill(from, &mut room[..count]);
            (count, count)
        });
        match taken {
            Ok(count) if count > 0 => sent += count,
            _ => break,
        }
    }
    sent
}

/// Receives and checks from `at` up to `len` as far as there is something; how many bytes.
fn receive(socket: &mut Socket<'_>, key: u64, at: usize, len: usize, ledger: &mut Ledger) -> usize {
    let mut received = 0;
    while at + received < len {
        let from = at + received;
        let taken = socket.recv(|bytes| {
            let count = bytes.len().min(len - from);
            (count, (count, pattern::wrong(key, from, &bytes[..count])))
        });
        match taken {
            Ok((count, wrong)) if count > 0 => {
                received += count;
                ledger.tcp().corrupt += wrong;
                ledger.tcp().bytes_verified += count as u64 - wrong;
            }
            _ => break,
        }
    }
    received
}
