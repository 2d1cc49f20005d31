//! The move protocol as two sans-IO machines: [`Source`] gives a group away, [`Target`] takes it.
//!
//! Neither knows a socket, a worker, or the log. Inputs come through `handle`, time through an argument, and what is
//! to be done comes out of `poll_action`, in the order in which it must be done. Work per call is bounded by
//! the records it is given. A machine can be made anew at any point of a move, from the committed phase and what the
//! worker says that it does with the group: that is how an agent goes on after a crash.

mod source;
mod target;

use std::sync::Arc;

use flow::{Batch, Epoch, GroupId, HoldTimes, Micros, MoveId, SiteId, Token};

pub use source::{Source, SourceAction, SourceInput};
pub use target::{Target, TargetAction, TargetInput};

/// What both sides know of a move from the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MoveSpec {
    /// The move.
    pub id: MoveId,
    /// What moves.
    pub group: GroupId,
    /// The present owner.
    pub from: SiteId,
    /// The next owner.
    pub to: SiteId,
    /// The epoch of the next owner.
    pub epoch: Epoch,
    /// The target serves from the flip on, once it has a whole copy, and joins later.
    pub relaxed: bool,
}

/// From source to target. `session` names one full copy: a new one starts from nothing.
#[derive(Clone, Debug, PartialEq)]
pub enum ToTarget {
    /// First message on every connection.
    Offer {
        /// The copy that goes on, or begins.
        session: u64,
        /// Flows to make room for.
        flows: u64,
    },
    /// Records, in sequence from 0.
    Chunk {
        /// The copy.
        session: u64,
        /// Its place.
        sequence: u64,
        /// The records.
        batch: Arc<Batch>,
    },
    /// To a relaxed target: the chunks before this are all flows that there were when this session began, so that it may
    /// serve at the flip; a mapping of its own making takes no port of theirs. Repeated on a new connection.
    Copied {
        /// The copy.
        session: u64,
        /// Number of chunks before this.
        chunks: u64,
    },
    /// The source has stopped serving. Repeated on a new connection.
    Handover {
        /// The copy.
        session: u64,
        /// Number of chunks before this.
        chunks: u64,
        /// The proof of completeness.
        token: Token,
        /// Ingresses whose marker is still to come.
        missing: Vec<SiteId>,
        /// For the record: time from the first record to this, and rounds.
        precopy_us: u64,
        /// Rounds of copying.
        rounds: u32,
    },
    /// Whether the target is there; it answers [`ToSource::Alive`] at once.
    Probe,
}

/// From target to source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToSource {
    /// Send on from this chunk.
    Accept {
        /// The copy.
        session: u64,
        /// The first chunk that the target does not have.
        next: u64,
    },
    /// The target does not take the group, and never will in this move.
    Refuse {
        /// For people.
        reason: String,
    },
    /// Chunks below this are installed.
    Ack {
        /// The copy.
        session: u64,
        /// The first that is not.
        next: u64,
    },
    /// The target serves.
    Joined,
    /// What was installed is not what the token says: copy once more.
    Mismatch {
        /// The copy.
        session: u64,
    },
    /// The target has not heard of the move yet; offer again in a moment.
    Unknown,
    /// Answer to [`ToTarget::Probe`]: agent and worker of the target are there.
    Alive,
}

/// How a move ended, by the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The target owns the group.
    Done,
    /// Aborted before switching: the source owns it under the old epoch.
    Aborted,
    /// Taken back: the source owns it under this epoch.
    TakenBack(Epoch),
}

/// What the source's worker was found to do with the group when the machine was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// It serves.
    Serving,
    /// It has cut: its table is frozen, and the target may have the token.
    Cut,
    /// It died after the flip, perhaps after its cut. A target that accepts a copy from nothing does not serve; then another
    /// worker does, without the flows.
    Lost,
}

/// How long a source waits for its target. Each is documented in the configuration reference; their order is checked where
/// they are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Waits {
    /// Longest wait for markers: then the source cuts without them, if the target is there.
    pub marker: Micros,
    /// A target that was not heard of for so long before the flip is committed: the move is aborted.
    pub prepare: Micros,
    /// A target that was not heard of for so long after that: the group is taken back, unless it may have the token.
    pub take_back: Micros,
}

/// How a copy is cut up, and when it is close enough to the table that the flip is proposed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pace {
    /// Records per chunk.
    pub chunk_records: usize,
    /// So many chunks may be under way before the worker is asked for more records.
    pub window_chunks: usize,
    /// The flip is proposed when so many flows or fewer are dirty.
    pub dirty_small: u64,
    /// Rounds before the flip is proposed even though the dirty set does not shrink.
    pub rounds_max: u32,
}

impl Default for Pace {
    /// From 16,384 records on larger chunks gain less than 1 %. Sixteen of them under way are 2.6 million records a second
    /// at a round trip of 100 ms, more than a worker imports (docs/benchmarks.md). A dirty set of 256 fits a few packets.
    fn default() -> Self {
        Self { chunk_records: 16_384, window_chunks: 16, dirty_small: 256, rounds_max: 8 }
    }
}

/// Why taking back is safe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Proof {
    /// The token was never given away, and no longer can be.
    NeverGiven,
    /// The target said that it never accepted, and never will.
    NeverAccepted,
}

/// What a finished move was like, as the target saw it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Flows that the target serves.
    pub flows: u64,
    /// Bytes of chunks as sent.
    pub bytes_on_wire: u64,
    /// From the first record to the handover, in microseconds.
    pub precopy_us: u64,
    /// Rounds of copying.
    pub rounds: u32,
    /// How long packets were held.
    pub hold: HoldTimes,
}
