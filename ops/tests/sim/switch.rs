//! A switch: committed rules, and a datapath that follows them flow by flow, as that of Open vSwitch does.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Bound;

use flow::WorkerId;
use switchctl::PortNo;
use switchctl::ofp::{BundleControl, FlowModMsg, FlowQuery, Message, Reply, Request};
use switchctl::softswitch::packet::Packet;
use switchctl::softswitch::pipeline::Pipeline;

/// A packet that left: by which port, what, with which tunnel key.
pub(crate) type Sent = (PortNo, Vec<u8>, u64);

/// A frame that a port has and the switch has not read: what, with which tunnel key.
type Waiting = (Vec<u8>, u64);

/// Frames that the socket of a port has room for.
const SOCKET_FRAMES: usize = 200;
/// Frames of a port that are read before those of another.
const FRAMES_PER_TURN: usize = 32;

#[derive(Default)]
pub(crate) struct Switch {
    /// What controllers see.
    rules: Pipeline,
    /// What a flow follows until its time between the two has come.
    before: Option<(Pipeline, u64, u64)>,
    /// By the controller's connection and the bundle's number.
    bundles: BTreeMap<(u64, u32), Vec<FlowModMsg>>,
    /// The process does nothing until then.
    pub(crate) stopped_until: u64,
    /// Each of its turns takes long until then.
    pub(crate) slow_until: u64,
    stopped_at: u64,
    /// What came for it meanwhile.
    waiting: BTreeMap<PortNo, VecDeque<Waiting>>,
    /// The port that is read, and how many frames more before another is.
    turn: (PortNo, usize),
    packet: Packet,
}

/// What a message to the switch led to.
#[derive(Default)]
pub(crate) struct Turn {
    pub(crate) reply: Option<Message>,
    pub(crate) sent: Vec<Sent>,
    /// Rules were committed.
    pub(crate) committed: bool,
}

impl Switch {
    /// All rules, as committed.
    pub(crate) fn rules(&self) -> switchctl::RuleSet {
        self.rules.flows(&FlowQuery::default()).into_iter().map(|flow| (flow.key, flow.rule)).collect()
    }

    /// When every flow follows what is committed.
    pub(crate) fn settled_at(&self) -> u64 {
        self.before.as_ref().map_or(0, |(_, _, until)| *until)
    }

    /// It is another process now. Gives what the sockets of the old one had.
    pub(crate) fn forget_rules(&mut self) -> Vec<Vec<u8>> {
        let old = std::mem::take(self);
        old.waiting.into_values().flatten().map(|(frame, _)| frame).collect()
    }

    /// The connection of a controller is gone, and its open bundles with it.
    pub(crate) fn forget_bundles(&mut self, connection: u64) {
        self.bundles.retain(|(of, _), _| *of != connection);
    }

    /// Whether frames wait: it is stopped, or has not read yet what came meanwhile.
    pub(crate) fn is_stopped(&self, now: u64) -> bool {
        self.stopped_until > now || !self.waiting.is_empty()
    }

    /// It does nothing until then.
    pub(crate) fn stop(&mut self, now: u64, until: u64) {
        if !self.is_stopped(now) {
            self.stopped_at = now;
        }
        self.stopped_until = until;
    }

    /// For how long it was stopped the last time.
    pub(crate) fn stopped_for(&self) -> u64 {
        self.stopped_until - self.stopped_at
    }

    /// A frame comes for a switch that is stopped; given back if the socket has no room for it. A worker keeps what the socket has no
    /// room for.
    pub(crate) fn wait(&mut self, port: PortNo, frame: Vec<u8>, tunnel: u64) -> Option<Vec<u8>> {
        let queue = self.waiting.entry(port).or_default();
        if queue.len() >= SOCKET_FRAMES && worker_of(port).is_none() {
            return Some(frame);
        }
        queue.push_back((frame, tunnel));
        None
    }

    /// The next frame that waits: some of each port in turn. What comes before all are read waits behind them.
    pub(crate) fn read_waiting(&mut self) -> Option<(PortNo, Waiting)> {
        let (last, left) = self.turn;
        let goes_on = left > 0 && self.waiting.contains_key(&last);
        let (port, left) = if goes_on {
            (last, left)
        } else {
            let behind = self.waiting.range((Bound::Excluded(last), Bound::Unbounded));
            let (next, _) = behind.chain(&self.waiting).next()?;
            (*next, FRAMES_PER_TURN)
        };
        self.turn = (port, left - 1);
        let queue = self.waiting.get_mut(&port)?;
        let frame = queue.pop_front();
        if queue.is_empty() {
            self.waiting.remove(&port);
        }
        Some((port, frame?))
    }

    pub(crate) fn process(&mut self, frame: &[u8], port: PortNo, tunnel: u64, now: u64) -> Vec<Sent> {
        let mut sent = Vec::new();
        if !self.packet.load(frame) {
            return sent;
        }
        if self.settled_at() <= now {
            self.before = None;
        }
        let mut out = |port, packet: &mut Packet, key| sent.push((port, packet.frame().to_vec(), key));
        match &mut self.before {
            Some((before, from, until)) if now < flips_at(frame, *from, *until) => {
                before.process(&mut self.packet, port, tunnel, &mut out);
            }
            _ => self.rules.process(&mut self.packet, port, tunnel, &mut out),
        }
        sent
    }

    /// Executes a message of a controller; the datapath takes up to `lag` to follow a commit.
    pub(crate) fn message(&mut self, connection: u64, message: Message, now: u64, lag: u64) -> Turn {
        let mut turn = Turn::default();
        match message {
            Message::Hello { .. } => turn.reply = Some(Message::hello()),
            Message::EchoRequest(data) => turn.reply = Some(Message::EchoReply(data)),
            Message::FeaturesRequest => {
                turn.reply =
                    Some(Message::FeaturesReply { datapath: 1, buffers: 0, tables: 8, capabilities: 0 });
            }
            Message::BarrierRequest => turn.reply = Some(Message::BarrierReply),
            Message::MultipartRequest(Request::Flows(query)) => {
                let reply = Reply::Flows(self.rules.flows(&query));
                turn.reply = Some(Message::MultipartReply { reply, more: false });
            }
            Message::PacketOut(out) if self.packet.load(&out.bytes) => {
                let mut deliver =
                    |port, packet: &mut Packet, key| turn.sent.push((port, packet.frame().to_vec(), key));
                // What a switch refuses it does not send.
                let _ = self.rules.packet_out(&mut self.packet, out.in_port, &out.actions, &mut deliver);
            }
            Message::BundleAdd { bundle, message, .. } => {
                if let Message::FlowMod(change) = *message {
                    self.bundles.entry((connection, bundle)).or_default().push(change);
                }
            }
            Message::BundleControl { bundle, control, flags } => {
                turn.committed = control == BundleControl::CommitRequest;
                if turn.committed {
                    self.commit((connection, bundle), now, lag);
                }
                let control = match control {
                    BundleControl::CommitRequest => BundleControl::CommitReply,
                    BundleControl::OpenRequest => BundleControl::OpenReply,
                    _ => BundleControl::DiscardReply,
                };
                turn.reply = Some(Message::BundleControl { bundle, control, flags });
            }
            _ => {}
        }
        turn
    }

    fn commit(&mut self, bundle: (u64, u32), now: u64, lag: u64) {
        let before = self.rules.clone();
        for change in self.bundles.remove(&bundle).unwrap_or_default() {
            // The compiler only makes rules that the pipeline takes; its own tests say so.
            let _ = self.rules.apply(&change);
        }
        self.before = Some((before, now, now + lag));
    }
}

/// The worker at a port.
pub(crate) fn worker_of(port: PortNo) -> Option<WorkerId> {
    let number = port.0.checked_sub(100).filter(|number| *number < 900)?;
    u16::try_from(number).ok().map(WorkerId)
}

/// Each flow follows at a time of its own.
fn flips_at(frame: &[u8], from: u64, until: u64) -> u64 {
    let key = frame
        .get(26..38)
        .unwrap_or(&[])
        .iter()
        .fold(7u64, |hash, byte| hash.wrapping_mul(31) + u64::from(*byte));
    let hash = key.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
    from + (until - from) * hash / (1 << 24)
}
