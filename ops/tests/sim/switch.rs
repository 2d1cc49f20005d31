//! A switch: committed rules, and a datapath that follows them flow by flow, as that of Open vSwitch does.

use std::collections::BTreeMap;

use switchctl::PortNo;
use switchctl::ofp::{BundleControl, FlowModMsg, FlowQuery, Message, Reply, Request};
use switchctl::softswitch::packet::Packet;
use switchctl::softswitch::pipeline::Pipeline;

/// A packet that left: by which port, what, with which tunnel key.
pub(crate) type Sent = (PortNo, Vec<u8>, u64);

#[derive(Default)]
pub(crate) struct Switch {
    /// What controllers see.
    rules: Pipeline,
    /// What a flow follows until its time between the two has come.
    before: Option<(Pipeline, u64, u64)>,
    bundles: BTreeMap<u32, Vec<FlowModMsg>>,
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

    /// It is another process now.
    pub(crate) fn forget_rules(&mut self) {
        *self = Self::default();
    }

    /// The connection of the controller is gone, and its open bundles with it.
    pub(crate) fn forget_bundles(&mut self) {
        self.bundles.clear();
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

    /// Executes a message; the datapath takes up to `lag` to follow a commit.
    pub(crate) fn message(&mut self, message: Message, now: u64, lag: u64) -> Turn {
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
                    self.bundles.entry(bundle).or_default().push(change);
                }
            }
            Message::BundleControl { bundle, control, flags } => {
                turn.committed = control == BundleControl::CommitRequest;
                if turn.committed {
                    self.commit(bundle, now, lag);
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

    fn commit(&mut self, bundle: u32, now: u64, lag: u64) {
        let before = self.rules.clone();
        for change in self.bundles.remove(&bundle).unwrap_or_default() {
            // The compiler only makes rules that the pipeline takes; its own tests say so.
            let _ = self.rules.apply(&change);
        }
        self.before = Some((before, now, now + lag));
    }
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
