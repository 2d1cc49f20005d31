//! A whole worker under a script of hostile frames, requests and steps of time.

use std::net::{IpAddr, Ipv4Addr};

use dataplane::control::codec::{FrameDecoder, encode};
use dataplane::control::{Event, Function, Ordering, Request, ServiceSpec, Timeouts};
use dataplane::packet::{self, Content, Headers, by_port};
use dataplane::worker::Wait;
use dataplane::{Output, Settings, Worker};
use flow::nat::{NatSlices, NatSpec};
use flow::steer::{MARKER_PROTOCOL, MarkerBody, Side, Tag};
use flow::{
    Batch, Endpoint, Epoch, Fixed, FlowKey, FlowRecord, GroupId, Joinable, Micros, MoveId, Protocol,
    ServiceId, SiteId, TcpState, Token, WorkerId,
};

use super::frame::{mend_checksums, mend_head, transport_is_right};

/// Steps of one script: longer ones find nothing that shorter ones do not, and take long.
const STEPS_MAX: usize = 256;
/// Slices after one step until the worker should rest: room for what a step can ask for, by far.
const SLICES_MAX: usize = 2_000;

/// Reads a script and plays it. Whatever it says: no panic; the worker comes to rest; events can be sent; and as all
/// frames have right checksums, those that leave have them too.
pub fn worker(bytes: &[u8]) {
    let mut script = Script(bytes);
    let mut play = Play::new();
    for _ in 0..STEPS_MAX {
        let Some(step) = script.byte() else { return };
        match step % 8 {
            0..=2 => {
                let count = 1 + usize::from(step >> 6);
                let frames = (0..count).filter_map(|_| script.frame()).collect();
                play.burst(frames);
            }
            3 => {
                let mut raw = script.bytes();
                mend_checksums(&mut raw);
                play.burst(vec![raw]);
            }
            4 => play.now = play.now.plus(Micros(1 << (script.byte().unwrap_or(0) % 40))),
            5 | 6 => {
                if let Some(request) = script.request() {
                    play.worker.handle(request, play.now);
                }
            }
            _ if step & 0x80 != 0 => play.worker.agent_connected(),
            _ => play.raw_request(&script.bytes()),
        }
        play.settle();
    }
}

struct Play {
    worker: Worker<Vec<u8>>,
    now: Micros,
    slices: NatSlices,
}

/// Few addresses and ports: they are exhausted soon, and scripts find one another's flows.
fn spec() -> NatSpec {
    NatSpec {
        clients: "100.64.0.0/22".parse().into_iter().collect(),
        pool: "198.51.100.0/28".parse().into_iter().collect(),
        ports_per_subscriber: 256,
        first_port: 32_768,
        port_key: 7,
    }
}

fn service() -> ServiceId {
    ServiceId::new(1).expect("1 is a service")
}

impl Play {
    fn new() -> Self {
        let settings = Settings {
            site: SiteId(1),
            worker: WorkerId(1),
            flow_capacity: 64,
            hold_packets_max: 8,
            ..Settings::default()
        };
        let mut worker = Worker::new(settings, Micros(0));
        let service = ServiceSpec {
            service: service(),
            function: Function::Nat44(spec()),
            timeouts: Timeouts::default(),
        };
        worker.handle(Request::Services(vec![service]), Micros(0));
        let slices = NatSlices::new(spec()).expect("the service is sound");
        Self { worker, now: Micros(1), slices }
    }

    fn burst(&mut self, mut frames: Vec<Vec<u8>>) {
        let mut out = Output::default();
        self.worker.burst(&mut frames, self.now, &mut out);
        self.look_at(&out);
    }

    fn raw_request(&mut self, bytes: &[u8]) {
        let Ok(request) = postcard::from_bytes::<Request>(bytes) else { return };
        // Other addresses than those of the model would make it blind.
        if !matches!(request, Request::Services(_)) {
            self.worker.handle(request, self.now);
        }
    }

    fn settle(&mut self) {
        for turn in 0.. {
            let mut out = Output::default();
            self.worker.slice(self.now, &mut out);
            self.look_at(&out);
            while let Some(event) = self.worker.poll_event() {
                sendable(&event);
            }
            if turn > 1 && self.worker.wait() != Wait::Now {
                return;
            }
            assert!(turn < SLICES_MAX, "the worker never rests");
        }
    }

    fn look_at(&self, out: &Output<Vec<u8>>) {
        for frame in &out.tx {
            let parsed = packet::parse(frame).expect("what leaves the worker is sound");
            match (parsed.tag, parsed.content) {
                (Tag::ToOutside, Content::Flow(headers)) => self.look_outside(frame, &headers),
                (Tag::ToClient(_), Content::Flow(headers)) => {
                    assert!(transport_is_right(frame, &headers), "a wrong checksum goes to a client");
                    assert!(self.slices.subscriber(headers.destination.into()).is_some(), "to no client");
                }
                (Tag::ToOutside, Content::Error(error)) => {
                    assert!(spec().pool[0].contains(IpAddr::V4(error.outer.source.into())));
                }
                (Tag::ToClient(_), Content::Error(error)) => {
                    assert!(self.slices.subscriber(error.outer.destination.into()).is_some());
                }
                (Tag::Relay(..), _) | (Tag::SendCut(_), Content::Marker(..)) => {}
                other => panic!("the worker sends {other:?}"),
            }
        }
    }

    /// The model of NAT: source address and port are of somebody's block.
    fn look_outside(&self, frame: &[u8], headers: &Headers) {
        if let Some(seal) = by_port::seal_of(frame, headers) {
            // ICMP for a group that is not here: back to the switch, which leads it by port.
            let (outside, port) = (headers.destination, headers.destination_port);
            assert_eq!(seal, self.slices.seal(headers.source, outside, port));
            assert!(self.slices.owner(outside.into(), port).is_some(), "a message by port to nobody");
            return;
        }
        assert!(transport_is_right(frame, headers), "a wrong checksum goes to the world");
        let owner = self.slices.owner(headers.source.into(), headers.source_port);
        assert!(owner.is_some(), "a packet to the world from an endpoint of nobody");
    }
}

fn sendable(event: &Event) {
    let bytes = encode(event).expect("an event fits a message");
    let mut decoder = FrameDecoder::<Event>::new();
    decoder.push(&bytes);
    assert_eq!(decoder.next(), Ok(Some(event.clone())));
}

struct Script<'a>(&'a [u8]);

impl Script<'_> {
    fn byte(&mut self) -> Option<u8> {
        let (&first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(first)
    }

    fn bytes(&mut self) -> Vec<u8> {
        let len = usize::from(self.byte().unwrap_or(0)).min(self.0.len());
        let (taken, rest) = self.0.split_at(len);
        self.0 = rest;
        taken.to_vec()
    }

    fn word(&mut self) -> Option<u64> {
        let byte = self.byte()?;
        // Small numbers meet one another, and the ends of the range are where sums go wrong.
        Some(match byte {
            0..=250 => u64::from(byte % 8),
            251 => u64::MAX,
            252 => u64::MAX - 1,
            253 => 1 << 63,
            254 => u64::from(u32::MAX),
            _ => 1_000_000,
        })
    }

    fn endpoint(&mut self) -> Option<Endpoint> {
        let (host, port) = (self.byte()?, self.byte()?);
        let address = IpAddr::V4(Ipv4Addr::new(100, 64, host & 3, host >> 4));
        Some(Endpoint { address, port: u16::from(port) })
    }

    fn remote(&mut self) -> Option<Endpoint> {
        let (host, port) = (self.byte()?, self.byte()?);
        // Now and then one of our own pool: clients that talk to one another.
        let address = if host & 1 == 0 { [192, 0, 2, host] } else { [198, 51, 100, host & 0xf] };
        let high = if host & 1 == 0 { 0 } else { 128 };
        Some(Endpoint { address: IpAddr::V4(address.into()), port: u16::from_be_bytes([high, port]) })
    }

    fn tag(&mut self) -> Option<Tag> {
        let (role, site) = (self.byte()?, SiteId(self.byte()? % 4));
        Tag::from_vlan(u16::from(role % 12) << 8 | u16::from(site.0))
    }

    /// A sound frame of a protocol that the worker carries, with some bytes of it changed; then its checksums are
    /// made right.
    fn frame(&mut self) -> Option<Vec<u8>> {
        let tag = self.tag()?;
        let kind = self.byte()?;
        let (client, remote) = (self.endpoint()?, self.remote()?);
        let inside = matches!(tag, Tag::Direct(Side::Inside, _) | Tag::Relayed(Side::Inside, _));
        let (from, to) = if inside { (client, remote) } else { (remote, self.outside()?) };
        let mut frame = match kind % 8 {
            0 | 1 => transport(Protocol::Udp, from, to, 0),
            2 | 3 => transport(Protocol::Tcp, from, to, self.byte()?),
            4 => transport(Protocol::Icmp, from, to, if inside { 8 } else { 0 }),
            5 => {
                let about = transport(Protocol::Udp, to, from, 0);
                let body = [&[3, 1, 0, 0, 0, 0, 0, 0], &about[packet::IP..]].concat();
                packet::build_ip(tag, 1, v4(from), v4(to), &body)
            }
            6 => self.marker(tag)?,
            _ => {
                let mut raw = self.bytes();
                mend_head(&mut raw);
                raw
            }
        };
        packet::set_tag(&mut frame, tag);
        for _ in 0..kind >> 6 {
            let (at, value) = (usize::from(self.byte()?), self.byte()?);
            if let Some(byte) = frame.get_mut(packet::IP + at) {
                *byte ^= value;
            }
        }
        mend_checksums(&mut frame);
        Some(frame)
    }

    /// An endpoint of the pool.
    fn outside(&mut self) -> Option<Endpoint> {
        let (host, port) = (self.byte()?, self.byte()?);
        let address = IpAddr::V4(Ipv4Addr::new(198, 51, 100, host & 0xf));
        Some(Endpoint { address, port: u16::from_be_bytes([128 | host >> 4, port]) })
    }

    fn marker(&mut self, tag: Tag) -> Option<Vec<u8>> {
        let group = self.group()?;
        let body = MarkerBody {
            move_id: self.move_id()?,
            epoch: Epoch(self.word()?),
            service: group.service,
            prefix_len: group.prefix.len(),
            from: SiteId(self.byte()? % 4),
        };
        let IpAddr::V4(source) = group.prefix.address() else { return None };
        Some(packet::build_ip(tag, MARKER_PROTOCOL, source.into(), 0, &body.encode()))
    }

    /// One of some groups that contain one another.
    fn group(&mut self) -> Option<GroupId> {
        let groups = ["100.64.0.0/24", "100.64.1.0/24", "100.64.0.0/23", "100.64.0.0/25", "100.64.0.128/25"];
        let prefix = groups[usize::from(self.byte()?) % groups.len()].parse().ok()?;
        Some(GroupId { service: service(), prefix })
    }

    fn move_id(&mut self) -> Option<MoveId> {
        let word = self.word()?;
        Some(if word & 1 == 0 { MoveId(word) } else { MoveId::local(word) })
    }

    fn sites(&mut self) -> Option<Vec<SiteId>> {
        let bits = self.byte()?;
        Some((0..4).filter(|site| bits >> site & 1 != 0).map(SiteId).collect())
    }

    fn request(&mut self) -> Option<Request> {
        let (kind, group, move_id) = (self.byte()?, self.group()?, self.move_id()?);
        // In half of all cases exports wait for more credit.
        let credit = |kind: u8| if kind & 0x80 == 0 { u64::MAX } else { 2 };
        Some(match kind % 16 {
            0 => Request::Status,
            1 => Request::Stats,
            2 | 3 => Request::Serve { group, epoch: Epoch(self.word()?) },
            4 => Request::CopyStart { group, move_id, session: 0, credit: credit(kind) },
            5 => Request::CopyRound { group, move_id },
            6 => Request::Arm {
                group,
                move_id,
                epoch: Epoch(self.word()?),
                target: SiteId(self.byte()? % 4),
                awaited: self.sites()?,
                bound_us: self.word()?,
                session: 0,
                credit: credit(kind),
                again: kind & 0x40 == 0,
            },
            7 => Request::Disarm { group, move_id, withdraw: kind & 0x80 != 0 },
            8 => Request::Forget {
                group,
                move_id,
                epoch: Epoch(self.word()?),
                target: SiteId(self.byte()? % 4),
                relay_us: self.word()?,
                ingresses: self.sites()?,
                relay_late_us: self.word()?,
            },
            9 | 10 => Request::Prepare {
                group,
                move_id,
                epoch: Epoch(self.word()?),
                source: SiteId(self.byte()? % 4),
                flows: self.word()?,
                ordering: if kind & 0x80 == 0 { Ordering::Strict } else { Ordering::Relaxed },
            },
            11 => Request::Open { group, move_id },
            12 => Request::Install {
                group,
                move_id,
                sequence: self.word()?,
                batch: self.batch()?,
                more: kind & 0x80 != 0,
            },
            13 => Request::Join {
                group,
                move_id,
                token: Token { epoch: Epoch(self.word()?), flows: self.word()?, digest: self.word()? },
                missing: self.sites()?,
                late_bound_us: self.word()?,
                cut_bound_us: self.word()?,
            },
            14 if kind & 0x80 != 0 => Request::Credit { group, move_id, session: 0, credit: self.word()? },
            14 => Request::TakeOver { group, move_id },
            _ => Request::Abandon { group, move_id, relay_us: self.word()?, relay_late_us: self.word()? },
        })
    }

    fn batch(&mut self) -> Option<Batch> {
        let mut batch = Batch::default();
        let slices = NatSlices::new(spec()).ok()?;
        for _ in 0..self.byte()? % 8 {
            let (how, client, remote) = (self.byte()?, self.endpoint()?, self.remote()?);
            let protocol =
                [Protocol::Udp, Protocol::Tcp, Protocol::Icmp, Protocol::Icmp6][usize::from(how & 3)];
            let key = FlowKey { protocol, client, remote };
            let version = self.word()? as u32;
            if how & 4 != 0 {
                batch.removals.push((key, version));
                continue;
            }
            let IpAddr::V4(address) = client.address else { return None };
            let first = slices.subscriber(address).and_then(|subscriber| slices.block(subscriber));
            let first = first.map_or(0, |block| block.first);
            let joined = Joinable {
                packets_out: self.word()?,
                packets_in: self.word()?,
                bytes_out: self.word()?,
                bytes_in: self.word()?,
                remaining_s: self.word()? as u32,
                tcp: TcpState::from_number(how >> 5)?,
                ingress: SiteId(how >> 3 & 3),
            };
            let outside_port = first.wrapping_add(u16::from(self.byte()?));
            batch.upserts.push(FlowRecord { key, fixed: Fixed::Nat44 { outside_port }, joined, version });
        }
        Some(batch)
    }
}

fn v4(endpoint: Endpoint) -> u32 {
    match endpoint.address {
        IpAddr::V4(address) => address.into(),
        IpAddr::V6(_) => 0,
    }
}

/// A packet with right checksums. `flags` are those of TCP, or the type of ICMP.
fn transport(protocol: Protocol, from: Endpoint, to: Endpoint, flags: u8) -> Vec<u8> {
    let ports = [from.port.to_be_bytes(), to.port.to_be_bytes()].concat();
    let body = match protocol {
        Protocol::Udp => [&ports[..], &[0, 10, 0, 0, 1, 2]].concat(),
        Protocol::Tcp => [&ports[..], &[0, 0, 0, 1, 0, 0, 0, 1, 0x50, flags, 0, 9, 0, 0, 0, 0]].concat(),
        Protocol::Icmp | Protocol::Icmp6 => {
            let id = if flags == 8 { from.port } else { to.port }.to_be_bytes();
            vec![flags, 0, 0, 0, id[0], id[1], 0, 1]
        }
    };
    let mut frame = packet::build_ip(Tag::ToOutside, protocol.number(), v4(from), v4(to), &body);
    mend_checksums(&mut frame);
    frame
}
