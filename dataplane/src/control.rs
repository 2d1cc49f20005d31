//! What the site's agent and a worker say to one another over a Unix stream socket.
//!
//! Each message is a little-endian `u32` length and that many bytes of postcard. Both processes are of one
//! version: the first message of each side is `Hello`, and another [`VERSION`] ends the connection with an
//! error that names both. The worker keeps all state of its groups and moves when the agent goes away; an
//! agent that comes (back) asks for [`Request::Status`] and goes on from there. Every request may be
//! repeated: the worker answers as if it had been the first time.

pub mod codec;

use std::net::{IpAddr, SocketAddr};

use flow::nat::NatSpec;
use flow::{Batch, Epoch, GroupId, HoldTimes, MoveId, Prefix, ServiceId, SiteId, Token, WorkerId};
use serde::{Deserialize, Serialize};

/// Version of this vocabulary.
pub const VERSION: u32 = 8;

/// Longest message, in bytes. A longer one ends the connection.
pub const MESSAGE_LEN_MAX: usize = 4 << 20;

/// Most records in one [`Event::Records`] or [`Request::Install`].
pub const BATCH_LEN_MAX: usize = 16_384;

/// Whether packets of one flow may pass one another during a move.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Ordering {
    /// The target holds packets until it has everything the source changed.
    #[default]
    Strict,
    /// The target serves what its shadow knows at once, and only the source gives ports; what both counted is joined afterwards.
    Relaxed,
}

/// A service as a worker needs it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceSpec {
    /// Its number.
    pub service: ServiceId,
    /// What it does.
    pub function: Function,
    /// Idle timeouts.
    pub timeouts: Timeouts,
}

/// The network function of a service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Function {
    /// NAT44 with deterministic blocks.
    Nat44(NatSpec),
}

/// Idle timeouts in seconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Timeouts {
    /// UDP. At least 120; 300 recommended (RFC 4787, REQ-5).
    pub udp_s: u32,
    /// TCP established. At least 7,440 (RFC 5382, REQ-5).
    pub tcp_established_s: u32,
    /// TCP half-open or closing. At least 240 (RFC 5382, REQ-5).
    pub tcp_transitory_s: u32,
    /// ICMP echo. At least 60 (RFC 5508, REQ-2).
    pub icmp_s: u32,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self { udp_s: 300, tcp_established_s: 7_440, tcp_transitory_s: 240, icmp_s: 60 }
    }
}

/// From the agent to the worker.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Request {
    /// First message. Answered by [`Event::Hello`].
    Hello {
        /// [`VERSION`] of the agent.
        version: u32,
        /// The site of both.
        site: SiteId,
    },
    /// Adds services or replaces their timeouts. A change of a service's addresses is refused while the
    /// worker has groups of it.
    Services(Vec<ServiceSpec>),
    /// Answered by [`Event::Status`].
    Status,
    /// Answered by [`Event::Stats`]; loads and delays are those since the last one.
    Stats,
    /// Owns a group from now on, with whatever flows are here already. For the first placement of a group,
    /// and for taking it back. Refused for a smaller epoch than the group had. A part of a group that is served here, or
    /// a prefix that covers such ones, takes over their flows: so groups split and merge. Answered by [`Event::Serving`], then
    /// when the last flow has changed over.
    Serve {
        /// The group.
        group: GroupId,
        /// The epoch to serve under.
        epoch: Epoch,
    },
    /// Source: exports every flow of the group while serving it, then reports the round's end. What changes
    /// from now on is dirty. Sent again, it starts afresh.
    CopyStart {
        /// The group.
        group: GroupId,
        /// The move.
        move_id: MoveId,
        /// Names the copy: it comes back with what is exported for it.
        session: u64,
        /// See [`Request::Credit`].
        credit: u64,
    },
    /// Source: exports what is dirty, then reports the round's end.
    CopyRound {
        /// The group.
        group: GroupId,
        /// The move.
        move_id: MoveId,
    },
    /// Source: the flip is committed. When markers of all awaited ingresses are in (early ones count), or
    /// `bound_us` has passed since this request (the shortest of several counts), stops serving, sends the cut along the data path, exports
    /// the last changes and [`Event::Cut`]; from then on it relays. If the group is cut already and this is `again`: exports
    /// everything and the same token once more; else what is in hand goes on.
    Arm {
        /// The group.
        group: GroupId,
        /// The move.
        move_id: MoveId,
        /// The epoch of the new owner.
        epoch: Epoch,
        /// Where to relay to; the own site for a move between its workers.
        target: SiteId,
        /// Ingress sites whose markers must come.
        awaited: Vec<SiteId>,
        /// Longest wait for them, in microseconds.
        bound_us: u64,
        /// Names the copy: it comes back with what is exported for it.
        session: u64,
        /// See [`Request::Credit`].
        credit: u64,
        /// The target has nothing of what was exported before.
        again: bool,
    },
    /// Source: the move is off. Answered by [`Event::Disarmed`], which says whether the cut had happened.
    /// If not, the group is served on and can no longer be cut for this move.
    Disarm {
        /// The group.
        group: GroupId,
        /// The move.
        move_id: MoveId,
        /// The token has not left, and must not any more: what was cut is not exported again for this move.
        withdraw: bool,
    },
    /// Source: the target serves. Frees the flows and relays for `relay_us` more, then forgets the group; later, if an ingress has
    /// not flipped by then.
    Forget {
        /// The group.
        group: GroupId,
        /// The move.
        move_id: MoveId,
        /// The epoch of the new owner.
        epoch: Epoch,
        /// Where to relay to.
        target: SiteId,
        /// How long, in microseconds.
        relay_us: u64,
        /// All ingresses there are, also those whose agents are away.
        ingresses: Vec<SiteId>,
        /// How long after the last packet by the old path as long as the marker of one of them has not come, in microseconds.
        relay_late_us: u64,
    },
    /// Target: reserves room and holds packets of the group from now on (relaxed: see
    /// [`Request::Open`]). Answered by [`Event::Prepared`] or [`Event::Refused`]. Sent again for the same
    /// move, it empties the shadow and keeps what is held.
    Prepare {
        /// The group.
        group: GroupId,
        /// The move.
        move_id: MoveId,
        /// The epoch to serve under later.
        epoch: Epoch,
        /// The present owner's site, to relay to if the move is given up.
        source: SiteId,
        /// Flows to make room for.
        flows: u64,
        /// Strict or relaxed.
        ordering: Ordering,
    },
    /// Target, relaxed only: the flip is committed; serve from the shadow at once, and ask the source for ports.
    Open {
        /// The group.
        group: GroupId,
        /// The move.
        move_id: MoveId,
    },
    /// Target: puts records into the shadow. Answered by [`Event::Installed`] when done.
    Install {
        /// The group.
        group: GroupId,
        /// The move.
        move_id: MoveId,
        /// Returned in the answer.
        sequence: u64,
        /// At most [`BATCH_LEN_MAX`].
        batch: Batch,
        /// There are more pieces with this sequence number; only the last one is answered.
        more: bool,
    },
    /// Target: everything is installed. If flows and digest match the token, and the cut has come along the
    /// data path or `cut_bound_us` has passed, serves what is held and then directly:
    /// [`Event::Joined`]. If they do not match: [`Event::Mismatch`], and nothing has changed.
    Join {
        /// The group.
        group: GroupId,
        /// The move.
        move_id: MoveId,
        /// The source's token.
        token: Token,
        /// Ingresses that had not flipped when the source cut. Direct packets of each stay held, per
        /// ingress, until its marker has come, relayed by the source, or `late_bound_us` has passed after
        /// its first direct packet: what the source relays before the marker is older.
        missing: Vec<SiteId>,
        /// See `missing`.
        late_bound_us: u64,
        /// Longest wait for the cut, in microseconds.
        cut_bound_us: u64,
    },
    /// Target: the source is dead and the log says so; serve the shadow as it is. [`Event::Joined`].
    TakeOver {
        /// The group.
        group: GroupId,
        /// The move.
        move_id: MoveId,
    },
    /// Another worker of the site has the group by now: this one was taken for dead, or its link was. What comes for it is relayed
    /// to the site itself for `relay_us`, and its flows are forgotten. Unlike [`Request::Forget`] the epoch stays.
    Yield {
        /// The group.
        group: GroupId,
        /// How long, in microseconds.
        relay_us: u64,
    },
    /// Target: the move is off. Forgets the shadow, relays what is held to the source and relays on for
    /// `relay_us`. Answered by [`Event::Abandoned`], which says whether it was too late.
    Abandon {
        /// The group.
        group: GroupId,
        /// The move.
        move_id: MoveId,
        /// How long to relay on, in microseconds.
        relay_us: u64,
        /// How long after the last packet that comes, in microseconds, if ingresses may have led here: those that lead to the source
        /// again send no marker.
        relay_late_us: u64,
    },
    /// Source: so many records may be exported for this copy in all; the most that was said counts. What is beyond waits in the
    /// table. Not answered; without effect when another copy is in hand, or none.
    Credit {
        /// The group.
        group: GroupId,
        /// The move.
        move_id: MoveId,
        /// The copy.
        session: u64,
        /// The count.
        credit: u64,
    },
}

/// Records of one [`Request::Install`] that [`Request::install`] makes, so that taking it keeps the packet path waiting
/// for some ten microseconds only.
const PIECE_LEN: usize = 256;

impl Request {
    /// A batch as requests of a size that the packet path can bear; at least one. Removals come first, as in a batch.
    pub fn install(group: GroupId, move_id: MoveId, sequence: u64, batch: &Batch) -> Vec<Self> {
        let (removals, upserts) = (batch.removals.chunks(PIECE_LEN), batch.upserts.chunks(PIECE_LEN));
        let removals = removals.map(|piece| Batch { removals: piece.to_vec(), upserts: Vec::new() });
        let upserts = upserts.map(|piece| Batch { removals: Vec::new(), upserts: piece.to_vec() });
        let mut pieces: Vec<_> = removals.chain(upserts).collect();
        if pieces.is_empty() {
            pieces.push(Batch::default());
        }
        let last = pieces.len() - 1;
        let request = |(at, batch)| Self::Install { group, move_id, sequence, batch, more: at < last };
        pieces.into_iter().enumerate().map(request).collect()
    }
}

/// From the worker to the agent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Event {
    /// First message.
    Hello {
        /// [`VERSION`] of the worker.
        version: u32,
        /// Its number.
        worker: WorkerId,
        /// Flows it has room for.
        capacity: u64,
        /// Changes with every start of the process: an agent that sees another value knows that all is lost.
        boot: u64,
    },
    /// All groups and services of the worker.
    Status {
        /// Services it knows.
        services: Vec<ServiceId>,
        /// Every group it has anything of, in order.
        groups: Vec<GroupStatus>,
    },
    /// Counters, loads, delays.
    Stats(Box<Stats>),
    /// Source: a part of an export.
    Records {
        /// The group.
        group: GroupId,
        /// The move.
        move_id: MoveId,
        /// The copy.
        session: u64,
        /// Rounds are counted from 0, the full copy.
        round: u32,
        /// At most [`BATCH_LEN_MAX`].
        batch: Batch,
    },
    /// Source: the round's last record was sent.
    RoundEnd {
        /// The group.
        group: GroupId,
        /// The move.
        move_id: MoveId,
        /// The copy.
        session: u64,
        /// The round.
        round: u32,
        /// Flows that became dirty meanwhile.
        dirty: u64,
        /// Flows of the group.
        flows: u64,
    },
    /// Source: stopped serving; all changes were sent before this.
    Cut {
        /// The group.
        group: GroupId,
        /// The move.
        move_id: MoveId,
        /// The copy.
        session: u64,
        /// The proof of completeness.
        token: Token,
        /// Ingresses whose marker had not come when the bound passed; empty when all had. Of a move between workers of
        /// one site: those that were late in the move to this site and still are.
        missing: Vec<SiteId>,
    },
    /// Source: answer to [`Request::Disarm`].
    Disarmed {
        /// The group.
        group: GroupId,
        /// The move.
        move_id: MoveId,
        /// The group had been cut: the target may serve, and the source relays on.
        cut: bool,
        /// It had been cut, and the token was withdrawn before it left.
        withdrawn: bool,
    },
    /// Target: room is reserved and packets are held.
    Prepared {
        /// The group.
        group: GroupId,
        /// The move.
        move_id: MoveId,
    },
    /// A request was refused; nothing has changed.
    Refused {
        /// The group.
        group: GroupId,
        /// The move, if it was about one.
        move_id: Option<MoveId>,
        /// Why, for people: names the field, the value and what would be right.
        reason: String,
    },
    /// Target: the batch is in the shadow.
    Installed {
        /// The group.
        group: GroupId,
        /// The move.
        move_id: MoveId,
        /// As in the request.
        sequence: u64,
    },
    /// Target: serves directly.
    Joined {
        /// The group.
        group: GroupId,
        /// The move.
        move_id: MoveId,
        /// Flows it serves.
        flows: u64,
        /// How long packets were held.
        hold: HoldTimes,
        /// The hold buffer was full and opened early.
        opened_early: bool,
    },
    /// Target: the shadow differs from the token.
    Mismatch {
        /// The group.
        group: GroupId,
        /// The move.
        move_id: MoveId,
        /// What the shadow is.
        have: Token,
    },
    /// Target: answer to [`Request::Abandon`].
    Abandoned {
        /// The group.
        group: GroupId,
        /// The move.
        move_id: MoveId,
        /// It had joined already and serves on.
        joined: bool,
    },
    /// The services were taken over.
    ServicesSet,
    /// The group is served (answer to [`Request::Serve`]).
    Serving {
        /// The group.
        group: GroupId,
        /// The epoch.
        epoch: Epoch,
    },
    /// The group is gone: the relay time after `Forget` or `Abandon` is over.
    Gone {
        /// The group.
        group: GroupId,
        /// The move.
        move_id: MoveId,
    },
}

/// One group of a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct GroupStatus {
    /// The group.
    pub group: GroupId,
    /// The epoch it is served under, or will be.
    pub epoch: Epoch,
    /// The move in hand.
    pub move_id: Option<MoveId>,
    /// What the worker does with it.
    pub phase: Phase,
    /// Flows here.
    pub flows: u64,
}

/// What a worker does with a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Phase {
    /// Serves it; no copy is in hand.
    Serving,
    /// Serves it and tracks changes for a copy.
    Copying,
    /// Serves it and waits for markers.
    Draining,
    /// Has given the token away, keeps the flows, relays.
    Relaying,
    /// Has forgotten the flows, relays.
    Tombstone,
    /// Holds packets, fills the shadow.
    Shadow,
    /// Relaxed: serves the shadow, expects the last changes.
    Open,
}

/// Counters and what was seen on the way.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Stats {
    /// Since the process started.
    pub counters: Counters,
    /// Per group with traffic or flows.
    pub groups: Vec<GroupLoad>,
    /// Round trips seen in TCP handshakes.
    pub round_trips: Vec<RoundTrip>,
    /// Per group with timed handshakes, in the order of groups: whom its clients talk to.
    pub talks: Vec<Talk>,
    /// Share of time not spent idle since the last report, 0 to 1.
    pub busy: f64,
    /// Groups that the worker has anything of, those that it only relays included.
    pub groups_known: u64,
    /// Its link to the switch is not there.
    pub link_down: bool,
}

/// Packets by fate, since the start of the process. Names are those of the metrics.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "each is a count of packets, or of flows, that its name says")]
pub struct Counters {
    pub received: u64,
    pub sent: u64,
    pub made: u64,
    pub translated_out: u64,
    pub translated_in: u64,
    pub hairpinned: u64,
    pub relayed: u64,
    pub icmp_by_port: u64,
    pub held: u64,
    pub hold_opened_early: u64,
    pub hold_without_cut: u64,
    pub hold_without_marker: u64,
    pub held_now: u64,
    pub held_bytes_now: u64,
    pub markers: u64,
    pub dropped_malformed: u64,
    pub dropped_no_group: u64,
    pub dropped_no_mapping: u64,
    pub dropped_port_block_exhausted: u64,
    pub dropped_table_full: u64,
    pub dropped_hold_full: u64,
    pub dropped_unsupported: u64,
    pub dropped_ttl: u64,
    pub dropped_bad_checksum: u64,
    pub dropped_tx_full: u64,
    pub dropped_tx_error: u64,
    pub dropped_link_down: u64,
    pub dropped_no_buffer: u64,
    pub dropped_oversize: u64,
    pub dropped_rx_missed: u64,
    pub dropped_rx_error: u64,
    pub icmp_sent: u64,
    pub flows: u64,
    pub flows_created: u64,
    pub flows_expired: u64,
    pub flows_exported: u64,
    pub flows_imported: u64,
}

impl Counters {
    /// What came in or was made here, less what went out, is held, was a marker for here, or was dropped for a reason: 0, or the
    /// worker has lost a packet. What the link loses before or after is counted apart.
    #[must_use]
    pub fn unaccounted(&self) -> i128 {
        let dropped = [
            self.dropped_malformed,
            self.dropped_no_group,
            self.dropped_no_mapping,
            self.dropped_port_block_exhausted,
            self.dropped_table_full,
            self.dropped_hold_full,
            self.dropped_unsupported,
            self.dropped_ttl,
            self.dropped_bad_checksum,
        ];
        let gone = [self.sent, self.held_now, self.markers].into_iter().chain(dropped);
        i128::from(self.received) + i128::from(self.made) - gone.map(i128::from).sum::<i128>()
    }
}

/// Load of one group since the last report.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GroupLoad {
    /// The group.
    pub group: GroupId,
    /// Flows now.
    pub flows: u64,
    /// Packets, both directions.
    pub packets: u64,
    /// IP bytes, both directions.
    pub bytes: u64,
    /// Packets from clients by the site where they came in.
    pub inside_ingress: Vec<(SiteId, u64)>,
    /// Packets from the world by the site where they came in.
    pub outside_ingress: Vec<(SiteId, u64)>,
}

/// Handshake round trips of one prefix since the last report. The remote side runs from the worker to the server, and
/// back over the site where the answer came in (SYN to SYN-ACK); the client side from the worker to the client and back
/// (SYN-ACK to ACK). Handshakes with a retransmitted SYN or SYN-ACK are left out (Karn's rule), and so are packets that an old
/// owner relayed, since these took a detour.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct RoundTrip {
    /// Clients: the group's prefix. Servers: the /24 or /48.
    pub prefix: Prefix,
    /// Which side.
    pub remote: bool,
    /// Clients: their group.
    pub group: Option<GroupId>,
    /// The site where the packet came in that ended it.
    pub ingress: SiteId,
    /// Servers: one that answered, and its port.
    pub answered: Option<SocketAddr>,
    /// Samples.
    pub count: u32,
    /// Smallest, in microseconds.
    pub min_us: u32,
    /// Mean, in microseconds.
    pub mean_us: u32,
}

/// Whom the clients of a group talk to, by the handshakes that were timed since the last report.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Talk {
    /// The group.
    pub group: GroupId,
    /// Server prefixes with their handshakes, most first; at most [`TALK_LEN_MAX`].
    pub servers: Vec<(Prefix, u32)>,
}

/// Server prefixes in one [`Talk`].
pub const TALK_LEN_MAX: usize = 8;

/// The prefix that a server's round trips are collected under: /24 or /48.
#[must_use]
pub fn server_prefix(address: IpAddr) -> Option<Prefix> {
    let len = if address.is_ipv4() { 24 } else { 48 };
    Prefix::containing(address, len).ok()
}
