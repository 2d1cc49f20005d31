//! What a worker knows about one group: who serves it, what is held, what is still to be sent.

use std::collections::{HashMap, VecDeque};

use flow::{Batch, Epoch, FlowKey, GroupId, Joinable, Micros, MoveId, SiteId, Token};

use crate::control::{Ordering, Phase};
use crate::table::GroupFlows;

/// Moves whose markers are remembered per group.
const MARKED_MOVES_MAX: usize = 4;

/// Packets of one move whose time in the hold is kept for the report.
const TIMES_LEN_MAX: usize = 65_536;

/// A set of sites.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sites([u64; 4]);

impl Sites {
    /// All that there can be.
    pub(crate) const ALL: Self = Self([u64::MAX; 4]);

    /// Adds one.
    pub fn insert(&mut self, site: SiteId) {
        self.0[usize::from(site.0 >> 6)] |= 1 << (site.0 & 63);
    }

    /// Takes out those that another set has.
    fn remove_all(&mut self, others: &Self) {
        for (own, other) in self.0.iter_mut().zip(others.0) {
            *own &= !other;
        }
    }

    /// Whether it is in.
    #[must_use]
    pub fn contains(&self, site: SiteId) -> bool {
        self.0[usize::from(site.0 >> 6)] & 1 << (site.0 & 63) != 0
    }
}

impl FromIterator<SiteId> for Sites {
    fn from_iter<I: IntoIterator<Item = SiteId>>(sites: I) -> Self {
        let mut set = Self::default();
        sites.into_iter().for_each(|site| set.insert(site));
        set
    }
}

/// An ingress that has not flipped for so long after the join keeps a group from no other worker: its agent is away.
const AWAITED_MAX: Micros = Micros(10_000_000);
/// Markers by move, the latest few moves.
#[derive(Debug, Default)]
pub struct Markers(VecDeque<Marked>);

#[derive(Debug)]
struct Marked {
    move_id: MoveId,
    epoch: Epoch,
    sites: Sites,
}

impl Markers {
    /// Notes the marker of an ingress.
    pub fn note(&mut self, move_id: MoveId, epoch: Epoch, site: SiteId) {
        if let Some(marked) =
            self.0.iter_mut().find(|marked| (marked.move_id, marked.epoch) == (move_id, epoch))
        {
            marked.sites.insert(site);
            return;
        }
        if self.0.len() == MARKED_MOVES_MAX {
            self.0.pop_front();
        }
        let mut sites = Sites::default();
        sites.insert(site);
        self.0.push_back(Marked { move_id, epoch, sites });
    }

    /// Those of `wanted` whose marker has not come.
    #[must_use]
    pub fn missing(&self, move_id: MoveId, wanted: &[SiteId]) -> Vec<SiteId> {
        self.but(wanted, |marked| marked.move_id == move_id)
    }

    /// Those of `wanted` whose marker of the move between sites that led to the epoch has not come.
    #[must_use]
    pub fn missing_of_epoch(&self, epoch: Epoch, wanted: &[SiteId]) -> Vec<SiteId> {
        self.but(wanted, |marked| marked.epoch == epoch && !marked.move_id.is_local())
    }

    /// Whether each of these sites has sent a marker of a move between sites to a greater epoch: it sends nothing any more by the
    /// path of this one.
    fn have_all_since(&self, epoch: Epoch, mut sites: Sites) -> bool {
        let later = self.0.iter().filter(|marked| marked.epoch > epoch && !marked.move_id.is_local());
        later.for_each(|marked| sites.remove_all(&marked.sites));
        sites == Sites::default()
    }

    fn but(&self, wanted: &[SiteId], is_of: impl Fn(&Marked) -> bool) -> Vec<SiteId> {
        let has = |site: &SiteId| self.0.iter().any(|marked| is_of(marked) && marked.sites.contains(*site));
        wanted.iter().copied().filter(|site| !has(site)).collect()
    }
}

/// Who decides about the group's packets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// We do.
    Serving,
    /// We do, and changes are queued for a copy.
    Copying,
    /// We do until the markers are in.
    Draining(Armed),
    /// The target does; the flows are kept.
    Relaying(Given),
    /// Somebody else does; the flows are being forgotten. Relays until the time.
    Tombstone {
        /// To whom.
        to: SiteId,
        /// Until when.
        until: Micros,
        /// Ingresses whose marker had not come at the cut, or that have sent here since: what they still send here is older than
        /// what they send by the new path.
        behind: Vec<SiteId>,
        /// Owners of before that have relayed to here since, for an ingress that is behind even further.
        relaying: Vec<SiteId>,
        /// For how long it stays if not all have flipped.
        stay: Stay,
    },
    /// The source does; packets are held.
    Shadow,
    /// We do, relaxed, while the source's last changes come.
    Open,
}

/// The relay of a group that was given away goes on for ingresses that have not flipped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stay {
    /// All that there are; those that lead to the source of a move again, which was taken back, send no marker.
    pub ingresses: Sites,
    /// For so long after the last packet that came by the old path.
    pub span: Micros,
    /// Until when.
    pub until: Micros,
}

impl Stay {
    /// From now on.
    pub(crate) fn new(ingresses: Sites, span: Micros, now: Micros) -> Self {
        Self { ingresses, span, until: now.plus(span) }
    }
}

/// What ends the serving.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Armed {
    /// The next epoch.
    pub epoch: Epoch,
    /// The next owner.
    pub target: SiteId,
    /// Whose markers must come.
    pub awaited: Vec<SiteId>,
    /// Cut without them then.
    pub deadline: Micros,
}

/// What was given away.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Given {
    /// To whom.
    pub target: SiteId,
    /// The proof.
    pub token: Token,
    /// Whose markers had not come.
    pub missing: Vec<SiteId>,
}

/// The short form of the state that each packet looks at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Translate.
    Serve,
    /// Keep until the join.
    Hold,
    /// Pass on, untouched.
    Relay(SiteId),
    /// Something is still queued ahead of it.
    Queue,
}

/// A packet that waits, with when it came and who sent it.
#[derive(Debug)]
pub struct Held<B> {
    /// The packet.
    pub packet: B,
    /// When it came.
    pub since: Micros,
    /// Its ingress, or the relaying site.
    pub site: SiteId,
}

/// Direct packets of an ingress that had not flipped when the source cut.
#[derive(Debug)]
pub struct Late<B> {
    /// The ingress.
    pub site: SiteId,
    /// Set by the first packet.
    pub deadline: Option<Micros>,
    /// In the order of arrival.
    pub queue: VecDeque<Held<B>>,
}

/// Packets of a group that wait.
#[derive(Debug)]
pub struct Hold<B> {
    /// Relayed by the source: older than the direct ones.
    pub relayed: VecDeque<Held<B>>,
    /// In the order of arrival.
    pub direct: VecDeque<Held<B>>,
    /// Relaxed: packets to mappings that only the source knows, which relayed them. Served after the join.
    pub parked: VecDeque<Held<B>>,
    /// Ingresses that are behind.
    pub late: Vec<Late<B>>,
    /// Longest wait after the first packet of a late ingress.
    pub late_bound: Micros,
    /// Since when they are waited for.
    pub late_since: Micros,
    /// Packets that were held in this move.
    pub total: u64,
    /// How long packets were held, in microseconds: the first [`TIMES_LEN_MAX`] of a move.
    pub times_us: Vec<u64>,
    /// The bound was reached.
    pub opened_early: bool,
}

impl<B> Default for Hold<B> {
    fn default() -> Self {
        Self {
            relayed: VecDeque::new(),
            direct: VecDeque::new(),
            parked: VecDeque::new(),
            late: Vec::new(),
            late_bound: Micros(0),
            late_since: Micros(0),
            total: 0,
            times_us: Vec::new(),
            opened_early: false,
        }
    }
}

impl<B> Hold<B> {
    /// Notes how long a packet was held.
    pub fn note_time(&mut self, us: u64) {
        if self.times_us.len() < TIMES_LEN_MAX {
            self.times_us.push(us);
        }
    }

    /// For another move: what waits goes on waiting, the rest begins anew.
    pub fn renew(&mut self) {
        self.unpark();
        let late = std::mem::take(&mut self.late).into_iter().flat_map(|late| late.queue);
        self.direct.extend(late);
        self.times_us.clear();
        (self.total, self.opened_early) = (0, false);
    }

    /// Whether no packet waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        !self.has_backlog() && self.parked.is_empty() && self.late.iter().all(|late| late.queue.is_empty())
    }

    /// Whether packets wait that could be served.
    #[must_use]
    pub fn has_backlog(&self) -> bool {
        !self.relayed.is_empty() || !self.direct.is_empty()
    }

    /// The next packet to be served.
    pub fn pop(&mut self) -> Option<Held<B>> {
        self.relayed.pop_front().or_else(|| self.direct.pop_front())
    }

    /// The join: parked packets are older than all others.
    pub fn unpark(&mut self) {
        self.parked.append(&mut self.relayed);
        self.relayed = std::mem::take(&mut self.parked);
    }

    /// Waits for the ingresses that another group waits for, too.
    pub fn wait_as(&mut self, other: &Self) {
        self.late_bound = self.late_bound.max(other.late_bound);
        self.late_since = self.late_since.max(other.late_since);
        for late in &other.late {
            if self.late.iter().all(|known| known.site != late.site) {
                self.late.push(Late { site: late.site, deadline: None, queue: VecDeque::new() });
            }
        }
    }

    /// From the join on, packets of these ingresses wait apart.
    pub fn set_late(&mut self, sites: &[SiteId], bound: Micros, now: Micros) {
        (self.late_bound, self.late_since) = (bound, now);
        self.late =
            sites.iter().map(|site| Late { site: *site, deadline: None, queue: VecDeque::new() }).collect();
        if self.late.is_empty() {
            return;
        }
        for held in std::mem::take(&mut self.direct) {
            if let Err(held) = self.push_late(held, true) {
                self.direct.push_back(held);
            }
        }
    }

    /// An ingress that has not flipped and may do so at any moment: one whose agent is away for long does not hold up what waits for it.
    #[must_use]
    pub fn awaited(&self, now: Micros) -> Option<SiteId> {
        self.late.first().map(|late| late.site).filter(|_| now < self.late_since.plus(AWAITED_MAX))
    }

    /// Whether direct packets of the ingress wait for its marker.
    #[must_use]
    pub fn is_late(&self, site: SiteId) -> bool {
        self.late.iter().any(|late| late.site == site)
    }

    /// Queues a direct packet of a late ingress; gives back any other.
    ///
    /// # Errors
    /// The packet, when it is not direct or its ingress is not late.
    pub fn push_late(&mut self, held: Held<B>, direct: bool) -> Result<(), Held<B>> {
        let bound = self.late_bound;
        match self.late.iter_mut().find(|late| direct && late.site == held.site) {
            Some(late) => {
                late.deadline.get_or_insert(held.since.plus(bound));
                late.queue.push_back(held);
                Ok(())
            }
            None => Err(held),
        }
    }

    /// The ingress has flipped: its packets join the others.
    pub fn release(&mut self, site: SiteId) {
        if let Some(at) = self.late.iter().position(|late| late.site == site) {
            let late = self.late.remove(at);
            self.direct.extend(late.queue);
        }
    }

    /// Releases ingresses that were waited for long enough; how many there were.
    pub fn release_due(&mut self, now: Micros) -> usize {
        let due = |late: &Late<B>| late.deadline.is_some_and(|deadline| deadline <= now);
        let sites: Vec<SiteId> = self.late.iter().filter(|late| due(late)).map(|late| late.site).collect();
        self.opened_early |= !sites.is_empty();
        sites.iter().for_each(|site| self.release(*site));
        sites.len()
    }
}

/// Records that may be exported for a copy, and those that were.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Credit {
    /// The copy, as the agent names it.
    pub session: u64,
    granted: u64,
    spent: u64,
}

impl Credit {
    /// A new count.
    #[must_use]
    pub fn new(session: u64, granted: u64) -> Self {
        Self { session, granted, spent: 0 }
    }

    /// So many in all, unless it was more, or is for another copy.
    pub fn raise(&mut self, to: Self) {
        if self.session == to.session {
            self.granted = self.granted.max(to.granted);
        }
    }

    /// Notes one record.
    pub fn spend(&mut self) {
        self.spent += 1;
    }

    /// Whether no record may be exported now.
    #[must_use]
    pub fn is_spent(&self) -> bool {
        self.spent >= self.granted
    }
}

/// An export in hand.
#[derive(Debug)]
pub struct Export {
    /// The round, from 0.
    pub round: u32,
    /// The full walk is not over.
    pub walking: bool,
    /// Entries of the dirty queue that belong to this round.
    pub left: usize,
    /// Records that wait to be sent.
    pub batch: Batch,
    /// A round is being sent.
    pub running: bool,
    /// It ends with the cut.
    pub last: bool,
}

/// What was asked with a join.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Joining {
    /// The source's token; `None` when the source is dead and its word is not awaited.
    pub token: Option<Token>,
    /// Ingresses that are behind.
    pub missing: Vec<SiteId>,
    /// See [`Hold::late_bound`].
    pub late_bound: Micros,
    /// Serve without the cut then.
    pub cut_deadline: Micros,
}

/// The target's side of a move.
#[derive(Debug)]
pub struct Arrival {
    /// The present owner.
    pub source: SiteId,
    /// Strict or relaxed.
    pub ordering: Ordering,
    /// Flows that room is kept for.
    pub reserved: u64,
    /// Flows and digest as the source knows them, once we serve too.
    pub shadow: (u64, u64),
    /// Removed flows and the version that must not be overtaken.
    pub removed: HashMap<FlowKey, u32>,
    /// Relaxed: flows of the source that clash with what was opened here, with their digests.
    pub clashes: HashMap<FlowKey, u64>,
    /// Of flows that were served before the last changes came: what they were imported with.
    pub bases: HashMap<u32, Joinable>,
    /// The cut has come along the data path.
    pub cut_seen: bool,
    /// Batches that are queued.
    pub installing: usize,
    /// Relaxed: serve as soon as the batches that are queued are installed.
    pub opening: bool,
    /// What was asked.
    pub joining: Option<Joining>,
}

/// Counts since the last report.
#[derive(Clone, Debug, Default)]
pub struct Load {
    /// Packets.
    pub packets: u64,
    /// IP bytes.
    pub bytes: u64,
    /// From clients, by ingress.
    pub inside: Vec<(SiteId, u64)>,
    /// From the world, by ingress.
    pub outside: Vec<(SiteId, u64)>,
}

impl Load {
    /// Adds what another group has counted.
    pub fn add(&mut self, other: Self) {
        self.packets += other.packets;
        self.bytes += other.bytes;
        for (sum, counts) in [(&mut self.inside, other.inside), (&mut self.outside, other.outside)] {
            for (site, count) in counts {
                match sum.iter_mut().find(|(known, _)| *known == site) {
                    Some((_, known)) => *known += count,
                    None => sum.push((site, count)),
                }
            }
        }
    }
}

/// Counts a packet of a site; the sites of one group are few.
pub fn count_site(counts: &mut Vec<(SiteId, u64)>, site: SiteId) {
    match counts.iter_mut().find(|(known, _)| *known == site) {
        Some((_, count)) => *count += 1,
        None => counts.push((site, 1)),
    }
}

/// A group of a worker.
#[derive(Debug)]
pub struct Group<B> {
    /// Its mode, derived from the rest by [`Group::refresh_mode`].
    pub mode: Mode,
    /// Packets served now must leave a base behind (see [`Arrival::bases`]).
    pub open: bool,
    /// Which group.
    pub id: GroupId,
    /// Ticks that its clock is behind the worker's.
    pub offset: u32,
    /// Its clock stands still since this tick.
    pub frozen: Option<u32>,
    /// Its flows.
    pub flows: GroupFlows,
    /// The epoch it is served under, or will be.
    pub epoch: Epoch,
    /// The state.
    pub state: State,
    /// The move in hand.
    pub move_id: Option<MoveId>,
    /// The move by which it came here.
    pub joined: Option<MoveId>,
    /// The move whose target has a whole copy, and the tick until which flows of the copy do not end here.
    pub keeps: Option<(MoveId, u32)>,
    /// A move that can no longer cut.
    pub disarmed: Option<MoveId>,
    /// Markers that came.
    pub markers: Markers,
    /// Packets that wait.
    pub hold: Hold<B>,
    /// Export in hand.
    pub export: Option<Export>,
    /// How much of it the agent has asked for.
    pub credit: Credit,
    /// Version of the last batch exported or imported.
    pub version: u32,
    /// The target's side of a move.
    pub arrival: Option<Arrival>,
    /// The join of this move is to be reported when the backlog is served.
    pub report_join: bool,
    /// Flows are being removed.
    pub purging: bool,
    /// Flows of it may belong to groups that were made from it, and are on their way there.
    pub parting: bool,
    /// That it is served with all its flows is to be reported.
    pub report_serving: bool,
    /// Where packets from clients came in last.
    pub ingress: Option<SiteId>,
    /// Counts.
    pub load: Load,
    /// In the list of groups with work to do.
    pub active: bool,
}

impl<B> Group<B> {
    /// A group that is served.
    #[must_use]
    pub fn new(id: GroupId, epoch: Epoch) -> Self {
        Self {
            mode: Mode::Serve,
            open: false,
            id,
            offset: 0,
            frozen: None,
            flows: GroupFlows::default(),
            epoch,
            state: State::Serving,
            move_id: None,
            joined: None,
            keeps: None,
            disarmed: None,
            markers: Markers::default(),
            hold: Hold::default(),
            export: None,
            credit: Credit::default(),
            version: 0,
            arrival: None,
            report_join: false,
            purging: false,
            parting: false,
            report_serving: false,
            ingress: None,
            load: Load::default(),
            active: false,
        }
    }

    /// Whether this worker decides about its packets.
    #[must_use]
    pub fn serves(&self) -> bool {
        matches!(self.state, State::Serving | State::Copying | State::Draining(_) | State::Open)
    }

    /// To whom packets go on that come here.
    #[must_use]
    pub fn relays_to(&self) -> Option<SiteId> {
        match &self.state {
            State::Relaying(given) => Some(given.target),
            State::Tombstone { to, .. } => Some(*to),
            State::Serving | State::Copying | State::Draining(_) | State::Shadow | State::Open => None,
        }
    }

    /// The state as the agent knows it.
    #[must_use]
    pub fn phase(&self) -> Phase {
        match self.state {
            State::Serving => Phase::Serving,
            State::Copying => Phase::Copying,
            State::Draining(_) => Phase::Draining,
            State::Relaying(_) => Phase::Relaying,
            State::Tombstone { .. } => Phase::Tombstone,
            State::Shadow => Phase::Shadow,
            State::Open => Phase::Open,
        }
    }

    /// To be called after each change of the state or of what is held.
    pub fn refresh_mode(&mut self) {
        self.open = self.state == State::Open;
        self.mode = match &self.state {
            State::Shadow => Mode::Hold,
            _ if self.hold.has_backlog() || !self.hold.late.is_empty() => Mode::Queue,
            State::Serving | State::Copying | State::Draining(_) | State::Open => Mode::Serve,
            State::Relaying(given) => Mode::Relay(given.target),
            State::Tombstone { to, .. } => Mode::Relay(*to),
        };
    }

    /// The group's clock at a tick of the worker's.
    #[must_use]
    pub fn clock(&self, tick: u32) -> u32 {
        self.frozen.unwrap_or(tick).saturating_sub(self.offset)
    }

    /// Ingresses that may still send by a path that ended here.
    #[must_use]
    pub fn behind(&self) -> Vec<SiteId> {
        let behind = match &self.state {
            // Between workers of one site nothing ends at the worker: whoever is late, is so for the next worker too.
            _ if self.move_id.is_some_and(MoveId::is_local) => return vec![],
            State::Relaying(given) => &given.missing,
            State::Tombstone { behind, .. } => behind,
            State::Serving | State::Copying | State::Draining(_) | State::Shadow | State::Open => {
                return vec![];
            }
        };
        self.move_id.map_or_else(Vec::new, |move_id| self.markers.missing(move_id, behind))
    }

    /// Whether what was given away is still relayed for an ingress that has not flipped.
    #[must_use]
    pub fn stays(&self, now: Micros) -> bool {
        let State::Tombstone { stay, .. } = &self.state else { return false };
        stay.until > now && !self.markers.have_all_since(self.epoch, stay.ingresses)
    }

    /// Stops the clock, if it runs.
    pub fn freeze(&mut self, tick: u32) {
        self.frozen.get_or_insert(tick);
    }

    /// Lets the clock go on from where it stopped.
    pub fn unfreeze(&mut self, tick: u32) {
        if let Some(since) = self.frozen.take() {
            self.offset += tick.saturating_sub(since);
        }
    }

    /// A whole copy of the flows is on its way: they do not end until this tick, or the end of the move. Another copy of the same move
    /// does not make it later.
    pub fn keep_flows(&mut self, until: u32) {
        if let Some(move_id) = self.move_id
            && self.keeps.is_none_or(|(kept, _)| kept != move_id)
        {
            self.keeps = Some((move_id, until));
        }
    }

    /// Whether flows whose time is over stay.
    #[must_use]
    pub fn keeps_flows(&self, tick: u32) -> bool {
        self.keeps.is_some_and(|(move_id, until)| self.move_id == Some(move_id) && tick < until)
    }

    /// Ends whatever export is in hand, and the tracking of changes.
    pub fn stop_export(&mut self) {
        self.export = None;
        self.flows.track(false);
    }

    /// Flows and digest, as the source of a move must know them.
    #[must_use]
    pub fn have(&self) -> Token {
        let (flows, digest) = match (&self.state, &self.arrival) {
            (State::Open, Some(arrival)) => arrival.shadow,
            _ => (self.flows.count, self.flows.digest),
        };
        Token { epoch: self.epoch, flows, digest }
    }
}

impl Arrival {
    /// The beginning of a move.
    #[must_use]
    pub fn new(source: SiteId, ordering: Ordering, reserved: u64, cut_seen: bool) -> Self {
        Self {
            source,
            ordering,
            reserved,
            shadow: (0, 0),
            removed: HashMap::new(),
            clashes: HashMap::new(),
            bases: HashMap::new(),
            cut_seen,
            installing: 0,
            opening: false,
            joining: None,
        }
    }
}
