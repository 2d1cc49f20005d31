//! Rules of NAT behaviour and of moves, seen from packets and events.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use flow::nat::NatSpec;
use flow::steer::{MARKER_PROTOCOL, MarkerBody};
use flow::{ServiceId, TcpState, Token};

use super::*;
use crate::control::{Function, Ordering, Phase, Request, ServiceSpec, Timeouts};
use crate::packet::tcp_flags::{ACK, FIN, RST, SYN};

#[path = "moves.rs"]
mod moves;
#[path = "nat.rs"]
mod nat_rules;

const HERE: SiteId = SiteId(1);
const THERE: SiteId = SiteId(2);
const SECOND: u64 = 1_000_000;

fn address(text: &str) -> u32 {
    text.parse::<Ipv4Addr>().unwrap().into()
}

fn group_id() -> GroupId {
    "1:100.64.0.0/24".parse().unwrap()
}

fn service(ports: u16) -> ServiceSpec {
    ServiceSpec {
        service: ServiceId::new(1).unwrap(),
        function: Function::Nat44(NatSpec {
            clients: vec!["100.64.0.0/22".parse().unwrap()],
            pool: vec!["198.51.100.0/24".parse().unwrap()],
            ports_per_subscriber: ports,
            first_port: 1024,
            port_key: 7,
        }),
        timeouts: Timeouts::default(),
    }
}

/// A packet of a flow, with what a test wants to know of it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Seen {
    tag: Tag,
    source: (u32, u16),
    destination: (u32, u16),
    payload: Vec<u8>,
}

fn udp(from: (u32, u16), to: (u32, u16), payload: &[u8]) -> Vec<u8> {
    let mut bytes =
        [from.1.to_be_bytes(), to.1.to_be_bytes(), (payload.len() as u16 + 8).to_be_bytes(), [0, 0]].concat();
    bytes.extend_from_slice(payload);
    packet::build_ip(Tag::ToOutside, 17, from.0, to.0, &bytes)
}

fn tcp(from: (u32, u16), to: (u32, u16), flags: u8) -> Vec<u8> {
    let mut bytes = [from.1.to_be_bytes(), to.1.to_be_bytes()].concat();
    bytes.extend([0; 8]);
    bytes.extend([0x50, flags, 0, 0, 0, 0, 0, 0]);
    packet::build_ip(Tag::ToOutside, 6, from.0, to.0, &bytes)
}

fn echo(kind: u8, from: u32, to: u32, id: u16) -> Vec<u8> {
    let mut bytes = vec![kind, 0, 0, 0];
    bytes.extend(id.to_be_bytes());
    bytes.extend([0, 1]);
    let sum = !packet::ones_complement(&bytes);
    bytes[2..4].copy_from_slice(&sum.to_be_bytes());
    packet::build_ip(Tag::ToOutside, 1, from, to, &bytes)
}

fn with_tag(mut frame: Vec<u8>, tag: Tag) -> Vec<u8> {
    packet::set_tag(&mut frame, tag);
    frame
}

fn see(frame: &[u8]) -> Seen {
    let parsed = packet::parse(frame).unwrap();
    let Content::Flow(headers) = parsed.content else { panic!("{parsed:?}") };
    Seen {
        tag: parsed.tag,
        source: (headers.source, headers.source_port),
        destination: (headers.destination, headers.destination_port),
        payload: frame[packet::IP + 28..].to_vec(),
    }
}

struct Lab {
    worker: Worker<Vec<u8>>,
    now: Micros,
}

impl Lab {
    fn bare(site: SiteId, ports: u16) -> Self {
        Self::with(
            Settings { site, flow_capacity: 4096, hold_packets_max: 1000, ..Settings::default() },
            ports,
        )
    }

    fn with(settings: Settings, ports: u16) -> Self {
        let mut lab = Self { worker: Worker::new(settings, Micros(0)), now: Micros(0) };
        assert_eq!(lab.ask(Request::Services(vec![service(ports)])), [Event::ServicesSet]);
        lab
    }

    fn serving(ports: u16) -> Self {
        let mut lab = Self::bare(HERE, ports);
        let serving = Event::Serving { group: group_id(), epoch: Epoch(1) };
        assert_eq!(lab.ask(Request::Serve { group: group_id(), epoch: Epoch(1) }), [serving]);
        lab
    }

    /// A request, and all that comes of it now.
    fn ask(&mut self, request: Request) -> Vec<Event> {
        self.worker.handle(request, self.now);
        let (events, packets) = self.settle();
        assert!(packets.is_empty(), "{packets:?}");
        events
    }

    /// Slices until nothing is to be done at once.
    fn settle(&mut self) -> (Vec<Event>, Vec<Vec<u8>>) {
        let mut out = Output::default();
        let mut events = Vec::new();
        for turn in 0.. {
            self.worker.slice(self.now, &mut out);
            events.extend(std::iter::from_fn(|| self.worker.poll_event()));
            if turn > 2 && self.worker.wait() != Wait::Now {
                break;
            }
            assert!(turn < 100_000, "the worker never rests");
        }
        (events, out.tx)
    }

    fn after(&mut self, us: u64) -> (Vec<Event>, Vec<Vec<u8>>) {
        self.now = self.now.plus(Micros(us));
        self.settle()
    }

    /// Time passes second by second, as slices come in a real loop.
    fn seconds(&mut self, seconds: u64) {
        for _ in 0..seconds {
            self.after(SECOND);
        }
    }

    fn send(&mut self, frame: Vec<u8>, tag: Tag) -> Vec<Vec<u8>> {
        let mut out = Output::default();
        self.worker.burst(&mut vec![with_tag(frame, tag)], self.now, &mut out);
        out.tx
    }

    fn inside(&mut self, frame: Vec<u8>) -> Option<Seen> {
        self.send(frame, Tag::Direct(Side::Inside, HERE)).first().map(|frame| see(frame))
    }

    fn outside(&mut self, frame: Vec<u8>) -> Option<Seen> {
        self.send(frame, Tag::Direct(Side::Outside, HERE)).first().map(|frame| see(frame))
    }

    fn phase(&mut self) -> Option<Phase> {
        let events = self.ask(Request::Status);
        let [Event::Status { groups, .. }] = &events[..] else { panic!("{events:?}") };
        groups.first().map(|status| status.phase)
    }
}

#[test]
fn a_worker_that_stood_still_takes_no_packets_until_its_agent_has_asked_anew() {
    let mut lab = Lab::serving(256);
    assert!(lab.worker.takes_packets(Micros(2_400_000)), "shorter than an agent waits");
    lab.now = Micros(9_500_000);
    assert!(!lab.worker.takes_packets(lab.now));
    // What the agent asked meanwhile was in the socket.
    lab.ask(Request::Stats);
    assert!(!lab.worker.takes_packets(lab.now));
    lab.now = Micros(9_700_000);
    assert!(!lab.worker.takes_packets(lab.now) && lab.worker.is_waking());
    // The agent says first what others have by now.
    lab.ask(Request::Yield { group: group_id(), relay_us: 1_000_000 });
    lab.ask(Request::Stats);
    assert!(lab.worker.takes_packets(lab.now) && !lab.worker.is_waking());
    assert_ne!(lab.phase(), Some(Phase::Serving));
}

#[test]
fn a_worker_that_stood_still_and_has_no_agent_serves_what_it_has() {
    let mut lab = Lab::serving(256);
    assert!(!lab.worker.takes_packets(Micros(7_000_000)));
    assert!(!lab.worker.takes_packets(Micros(8_499_999)));
    assert!(lab.worker.takes_packets(Micros(8_500_000)));
    assert!(lab.worker.takes_packets(Micros(8_500_001)));
}
