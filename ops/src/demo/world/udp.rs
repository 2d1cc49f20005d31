//! Numbered, checked packets of many UDP flows, and their echoes.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use flow::sample::Seeded;

use super::WorldSpec;
use super::frame::{Address, Headers, UDP_PAYLOAD, write_udp};
use super::net::{Net, micros};
use super::pattern;
use super::report::{Ledger, PacketCounts, Path};

/// The port that servers echo at.
const SERVER_PORT: u16 = 9_000;
/// The first source port of a client.
const CLIENT_PORT: u16 = 10_000;
/// Missing packets that are listed.
const MISSING_MAX: usize = 64;
/// Flow, sequence, bin, direction, time.
const HEADER_LEN: usize = 24;
/// Numbers of one flow and direction that are remembered.
const WINDOW: u32 = 256;
/// A flow is never faster, so that the window outlasts any delay, in microseconds.
const INTERVAL_MIN: u64 = 20_000;

/// Which numbers of one flow and direction have arrived, of the latest [`WINDOW`].
#[derive(Clone, Copy, Debug, Default)]
struct Track {
    highest: u32,
    seen: [u64; 4],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seen {
    Next,
    /// For the first time, after a later one.
    Reordered,
    Again,
    /// Too old to know; it was counted as lost.
    Ancient,
}

impl Track {
    fn see(&mut self, number: u32) -> Seen {
        if number > self.highest {
            for passed in self.highest.max(number.saturating_sub(WINDOW))..number {
                self.mark(passed + 1, false);
            }
            self.mark(number, true);
            self.highest = number;
            return Seen::Next;
        }
        if self.highest - number >= WINDOW {
            return Seen::Ancient;
        }
        if self.mark(number, true) { Seen::Again } else { Seen::Reordered }
    }

    /// Those of the latest numbers up to `sent` that have not arrived.
    fn missing(&self, sent: u32) -> impl Iterator<Item = u32> + use<'_> {
        let remembered = |number: u32| self.highest - number < WINDOW;
        let is_set = |place: u32| self.seen[(place / 64) as usize] & 1 << (place % 64) != 0;
        (1..=sent)
            .filter(move |&number| number > self.highest || remembered(number) && !is_set(number % WINDOW))
    }

    /// Sets or clears a bit; what it was.
    fn mark(&mut self, number: u32, seen: bool) -> bool {
        let place = number % WINDOW;
        let (word, bit) = (&mut self.seen[(place / 64) as usize], 1 << (place % 64));
        let before = *word & bit != 0;
        *word = if seen { *word | bit } else { *word & !bit };
        before
    }
}

#[derive(Debug)]
struct Flow {
    client: usize,
    server: usize,
    port: u16,
    interval: u64,
    next: u64,
    sent: u32,
    outside: Option<Address>,
    up: Track,
    down: Track,
}

impl Flow {
    fn path(&self, net: &Net) -> Path {
        Path { group: net.clients[self.client].group, server: net.servers[self.server].nearest }
    }
}

/// Which way a packet goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Up = 1,
    Down = 2,
}

/// What a packet says about itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Label {
    flow: u32,
    number: u32,
    bin: u32,
    way: Way,
    sent: u64,
}

impl Label {
    fn write(self, seed: u64, frame: &mut Vec<u8>) {
        frame.resize(UDP_PAYLOAD, 0);
        frame.extend_from_slice(&self.flow.to_be_bytes());
        frame.extend_from_slice(&self.number.to_be_bytes());
        frame.extend_from_slice(&self.bin.to_be_bytes());
        frame.extend_from_slice(&(self.way as u32).to_be_bytes());
        frame.extend_from_slice(&self.sent.to_be_bytes());
        let key = self.key(seed);
        let start = frame.len();
        frame.resize(start + fill_len(key), 0);
        pattern::fill(key, 0, &mut frame[start..]);
    }

    /// Reads and checks what is carried; `None` when a byte is wrong.
    fn read(seed: u64, payload: &[u8]) -> Option<Self> {
        let (header, fill) = payload.split_at_checked(HEADER_LEN)?;
        let word = |at: usize| Some(u32::from_be_bytes(header[at..at + 4].try_into().ok()?));
        let way = match word(12)? {
            1 => Way::Up,
            2 => Way::Down,
            _ => return None,
        };
        let sent = u64::from_be_bytes(header[16..].try_into().ok()?);
        let label = Self { flow: word(0)?, number: word(4)?, bin: word(8)?, way, sent };
        let key = label.key(seed);
        (fill.len() == fill_len(key) && pattern::wrong(key, 0, fill) == 0).then_some(label)
    }

    /// Covers the label, so that no byte of it can change unseen.
    fn key(self, seed: u64) -> u64 {
        let key = pattern::key(seed, u64::from(self.flow) << 32 | u64::from(self.number), self.way as u64);
        pattern::key(key, u64::from(self.bin), self.sent)
    }
}

/// 16 to 136 bytes.
fn fill_len(key: u64) -> usize {
    16 + usize::from(key.to_be_bytes()[0] & 15) * 8
}

/// All flows.
pub(super) struct Udp {
    seed: u64,
    flows: Vec<Flow>,
    timers: BinaryHeap<Reverse<(u64, u32)>>,
    rng: Seeded,
    /// No more is sent, except echoes.
    pub(super) stopped: bool,
}

impl Udp {
    pub(super) fn new(spec: &WorldSpec, net: &Net, start: u64) -> Self {
        let mut rng = Seeded::new(spec.seed ^ 0x7564_7000);
        let mut flows = Vec::with_capacity(spec.udp_flows);
        for at in 0..spec.udp_flows {
            let client = at % net.clients.len();
            let nth = u16::try_from(at / net.clients.len() % 50_000).unwrap_or(0);
            let server = net.choose_server(net.clients[client].group, &mut rng);
            let spread = micros(spec.udp_interval.1.saturating_sub(spec.udp_interval.0)).max(1);
            let slow = micros(spec.udp_interval.0) + rng.below(spread);
            let interval = if at < spec.udp_fast_flows { micros(spec.udp_fast_interval) } else { slow };
            let (port, tracks) = (CLIENT_PORT + nth, Track::default());
            let next = start + rng.below(interval.max(1));
            let (up, down) = (tracks, tracks);
            flows.push(Flow { client, server, port, interval, next, sent: 0, outside: None, up, down });
        }
        let timers = (0u32..).zip(&flows).map(|(at, flow)| Reverse((flow.next, at))).collect();
        Self { seed: spec.seed, flows, timers, rng, stopped: false }
    }

    pub(super) fn next_due(&self) -> Option<u64> {
        self.timers.peek().map(|Reverse((due, _))| *due).filter(|_| !self.stopped)
    }

    /// Sends what is due.
    pub(super) fn tick(&mut self, net: &mut Net, ledger: &mut Ledger) {
        while self.next_due().is_some_and(|due| due <= net.now) {
            let Some(Reverse((due, at))) = self.timers.pop() else { return };
            if self.flows[at as usize].next == due {
                self.fire(at, net, ledger);
            }
        }
    }

    fn fire(&mut self, at: u32, net: &mut Net, ledger: &mut Ledger) {
        let group = &net.groups[net.clients[self.flows[at as usize].client].group];
        let interval = interval(&self.flows[at as usize], group.factor);
        let silent_until = group.silent_until;
        let flow = &mut self.flows[at as usize];
        if silent_until > net.now {
            flow.next = silent_until + self.rng.below(interval);
        } else {
            // Keeps its pace, but makes up for nothing after a standstill.
            flow.next = (flow.next + interval).max(net.now + INTERVAL_MIN / 2);
            self.send(at, net, ledger);
        }
        self.timers.push(Reverse((self.flows[at as usize].next, at)));
    }

    fn send(&mut self, at: u32, net: &mut Net, ledger: &mut Ledger) {
        let flow = &mut self.flows[at as usize];
        flow.sent += 1;
        let bin = ledger.sent(flow.path(net));
        let label = Label { flow: at, number: flow.sent, bin, way: Way::Up, sent: net.now };
        let mut frame = net.buffer();
        label.write(self.seed, &mut frame);
        let from = (net.clients[flow.client].address, flow.port);
        write_udp(&mut frame, from, (net.servers[flow.server].address, SERVER_PORT));
        net.client_sends(flow.client, frame);
    }

    /// The rate of a group changed: its flows start anew, spread over their interval.
    pub(super) fn spread(&mut self, group: usize, net: &Net) {
        for (at, flow) in (0u32..).zip(&mut self.flows) {
            if net.clients[flow.client].group == group {
                flow.next = net.now + self.rng.below(interval(flow, net.groups[group].factor));
                self.timers.push(Reverse((flow.next, at)));
            }
        }
    }

    /// The packets that have not arrived, in words; the first ones only.
    pub(super) fn missing(&self, net: &Net) -> Vec<String> {
        let of_flow = |flow: &Flow| {
            let client = format!("{}:{}", net.clients[flow.client].address, flow.port);
            let server = format!("{}:{SERVER_PORT}", net.servers[flow.server].address);
            let up: Vec<u32> = flow.up.missing(flow.sent).collect();
            let down: Vec<u32> = flow.down.missing(flow.sent).filter(|number| !up.contains(number)).collect();
            let sent = flow.sent;
            let up = up.into_iter().map({
                let (client, server) = (client.clone(), server.clone());
                move |number| format!("{client} to {server}, {number} of {sent}")
            });
            up.chain(down.into_iter().map(move |number| format!("{server} to {client}, {number} of {sent}")))
                .collect::<Vec<_>>()
        };
        self.flows.iter().flat_map(of_flow).take(MISSING_MAX).collect()
    }

    /// A packet arrived at a server or at a client; its checksums are right.
    pub(super) fn arrive(&mut self, headers: &Headers, frame: &[u8], net: &mut Net, ledger: &mut Ledger) {
        let Some(label) = Label::read(self.seed, headers.udp_payload(frame)) else {
            ledger.checks().corrupt_packets += 1;
            return;
        };
        let Some(flow) = self.flows.get_mut(label.flow as usize) else {
            ledger.checks().misdelivered += 1;
            return;
        };
        let server = (net.servers[flow.server].address, SERVER_PORT);
        let client = (net.clients[flow.client].address, flow.port);
        let (is_right, track) = match label.way {
            Way::Up => (headers.to == server, &mut flow.up),
            Way::Down => ((headers.from, headers.to) == (server, client), &mut flow.down),
        };
        if !is_right {
            ledger.checks().misdelivered += 1;
            return;
        }
        let seen = track.see(label.number);
        let packets = match seen {
            Seen::Next => PacketCounts { delivered: 1, ..PacketCounts::default() },
            Seen::Reordered => PacketCounts { delivered: 1, reordered: 1, ..PacketCounts::default() },
            Seen::Again => PacketCounts { duplicated: 1, ..PacketCounts::default() },
            Seen::Ancient => PacketCounts { reordered: 1, ..PacketCounts::default() },
        };
        ledger.count(label.bin, flow.path(net), packets);
        if matches!(seen, Seen::Again | Seen::Ancient) {
            return;
        }
        match label.way {
            Way::Up => self.echo(label, headers, net, ledger),
            Way::Down => {
                let group = net.clients[flow.client].group;
                ledger.round_trip(label.bin, group, net.now.saturating_sub(label.sent));
            }
        }
    }

    /// A server saw a packet for the first time.
    fn echo(&mut self, label: Label, headers: &Headers, net: &mut Net, ledger: &mut Ledger) {
        let flow = &mut self.flows[label.flow as usize];
        if flow.outside.replace(headers.from).is_some_and(|before| before != headers.from) {
            ledger.checks().outside_changed += 1;
        }
        let label = Label { bin: ledger.sent(flow.path(net)), way: Way::Down, ..label };
        let server = flow.server;
        let mut frame = net.buffer();
        label.write(self.seed, &mut frame);
        write_udp(&mut frame, headers.to, headers.from);
        net.server_sends(server, frame);
    }
}

fn interval(flow: &Flow, factor: f64) -> u64 {
    let scaled = std::time::Duration::from_micros(flow.interval).as_secs_f64() / factor.max(0.001);
    let scaled = std::time::Duration::try_from_secs_f64(scaled).unwrap_or_default();
    micros(scaled).max(INTERVAL_MIN.min(flow.interval)).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_track_tells_next_late_and_again_apart() {
        let mut track = Track::default();
        assert_eq!(track.see(1), Seen::Next);
        assert_eq!(track.see(3), Seen::Next);
        assert_eq!(track.see(2), Seen::Reordered);
        assert_eq!(track.see(2), Seen::Again);
        assert_eq!(track.see(1_000), Seen::Next);
        assert_eq!(track.see(3), Seen::Ancient);
        assert_eq!(track.see(900), Seen::Reordered);
        assert_eq!(track.see(900), Seen::Again);
    }

    #[test]
    fn a_track_lists_what_has_not_come() {
        let mut track = Track::default();
        for number in [1, 2, 4, 5, 300, 302] {
            track.see(number);
        }
        let missing: Vec<u32> = track.missing(304).collect();
        assert_eq!(missing[..3], [47, 48, 49], "older ones are forgotten");
        assert_eq!(missing[missing.len() - 4..], [299, 301, 303, 304]);
    }

    #[test]
    fn a_label_survives_and_any_changed_byte_is_seen() {
        let label = Label { flow: 7, number: 9, bin: 3, way: Way::Down, sent: 123_456 };
        let mut frame = Vec::new();
        label.write(5, &mut frame);
        let payload = &mut frame[UDP_PAYLOAD..];
        assert_eq!(Label::read(5, payload), Some(label));
        for at in 0..payload.len() {
            payload[at] ^= 0x10;
            assert_eq!(Label::read(5, payload), None, "byte {at}");
            payload[at] ^= 0x10;
        }
    }
}
