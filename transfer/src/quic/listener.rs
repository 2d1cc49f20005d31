//! Takes what peers begin: handshakes beside one another, bounded in number and time; connections bounded by peer.
//!
//! Anybody can begin a handshake, under any address. So the first few go on at once, and when those are many the others
//! are asked to come again with a token that only the owner of an address receives (RFC 9000, section 8.1.2). Handshakes of
//! addresses that were shown so are bounded per address, and there the oldest gives way: one that is honest takes
//! a few round trips, one that is never completed would stay for seconds.

use std::collections::{BTreeMap, VecDeque};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};

use quinn::{ConnectionError, Incoming};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::{AbortHandle, Id, JoinSet};

use super::{Connection, Counts, Endpoint, HANDSHAKE_BOUND, Limits, Notices, Outcome, code, peer_name};
use super::{plain, refusal};
use crate::name::NodeName;

/// Handshakes under way from addresses that nobody has shown to be theirs; beyond, tokens are asked for.
const UNPROVEN_MAX: usize = 16;
/// Handshakes under way from one address, or one /64 of IPv6.
const PER_ADDRESS_MAX: usize = 16;
/// Handshakes under way.
const HANDSHAKES_MAX: usize = 256;

/// Accepts connections.
#[derive(Debug)]
pub struct Listener {
    endpoint: Endpoint,
    tasks: JoinSet<Result<quinn::Connection, Option<ConnectionError>>>,
    /// Those under way, oldest first.
    under_way: VecDeque<Handshake>,
    seats: Arc<Seats>,
}

#[derive(Debug)]
struct Handshake {
    task: Id,
    abort: AbortHandle,
    remote: SocketAddr,
    source: Source,
}

/// Where a handshake comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Source {
    /// Somebody claims some address.
    Unproven,
    /// The peer receives at this address; of IPv6 the network, which is one owner's.
    Proven(IpAddr),
}

impl Source {
    fn of(incoming: &Incoming) -> Self {
        if !incoming.remote_address_validated() {
            return Self::Unproven;
        }
        Self::Proven(match incoming.remote_address().ip() {
            IpAddr::V4(ip) => IpAddr::V4(ip),
            IpAddr::V6(ip) => ip
                .to_ipv4_mapped()
                .map_or_else(|| IpAddr::V6(Ipv6Addr::from_bits(ip.to_bits() >> 64 << 64)), IpAddr::V4),
        })
    }
}

/// What to do with one more handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Admission {
    Accept,
    /// Accept it in the place of the one at this place.
    Replace(usize),
    Retry,
    Ignore,
}

/// Decides about a handshake from `source` while those from `under_way` are not done, oldest first.
fn admit(under_way: &[Source], source: Source) -> Admission {
    let of = |wanted: Source| under_way.iter().filter(move |other| **other == wanted).count();
    let oldest = |wanted: Source| under_way.iter().position(|other| *other == wanted);
    if source == Source::Unproven {
        return if of(source) < UNPROVEN_MAX && under_way.len() < HANDSHAKES_MAX {
            Admission::Accept
        } else {
            Admission::Retry
        };
    }
    if of(source) >= PER_ADDRESS_MAX {
        return oldest(source).map_or(Admission::Ignore, Admission::Replace);
    }
    if under_way.len() < HANDSHAKES_MAX {
        return Admission::Accept;
    }
    // Who has none under way gets a place of those who have most.
    let most = under_way.iter().copied().max_by_key(|other| of(*other));
    match most.filter(|_| of(source) == 0).and_then(oldest) {
        Some(at) => Admission::Replace(at),
        None => Admission::Ignore,
    }
}

impl Listener {
    pub(super) fn new(endpoint: Endpoint) -> Self {
        let seats = Arc::new(Seats {
            limits: endpoint.limits,
            counts: endpoint.counts.clone(),
            notices: endpoint.notices.clone(),
            peers: Mutex::default(),
        });
        Self { endpoint, tasks: JoinSet::new(), under_way: VecDeque::new(), seats }
    }

    /// The next peer that is connected; `None` when the endpoint is closed. Handshakes go on while this is awaited, beside
    /// one another. Those that fail are counted, and the log has a line for each kind now and then.
    pub async fn accept(&mut self) -> Option<Connection> {
        loop {
            tokio::select! {
                incoming = self.endpoint.inner.accept() => self.begin(incoming?),
                Some(ended) = self.tasks.join_next_with_id() => {
                    let (task, result) = match ended {
                        Ok((task, result)) => (task, Some(result)),
                        Err(error) => (error.id(), None),
                    };
                    let at = self.under_way.iter().position(|handshake| handshake.task == task);
                    let handshake = at.and_then(|at| self.under_way.remove(at));
                    if let (Some(handshake), Some(result)) = (handshake, result)
                        && let Some(connection) = self.finish(handshake.remote, result)
                    {
                        return Some(connection);
                    }
                }
            }
        }
    }

    fn begin(&mut self, incoming: Incoming) {
        let source = Source::of(&incoming);
        let sources: Vec<_> = self.under_way.iter().map(|handshake| handshake.source).collect();
        match admit(&sources, source) {
            Admission::Accept => {}
            Admission::Replace(at) => {
                if let Some(oldest) = self.under_way.remove(at) {
                    oldest.abort.abort();
                    self.endpoint.counts.add(Outcome::GaveWay);
                }
            }
            Admission::Retry => {
                self.endpoint.counts.add(Outcome::Retried);
                // Unproven addresses can always be asked.
                let _ = incoming.retry();
                return;
            }
            Admission::Ignore => {
                self.endpoint.counts.add(Outcome::Ignored);
                return incoming.ignore();
            }
        }
        let remote = incoming.remote_address();
        let abort = self.tasks.spawn(async move {
            let connecting = incoming.accept().map_err(Some)?;
            let done = tokio::time::timeout(HANDSHAKE_BOUND, connecting).await;
            done.map_err(|_| None)?.map_err(Some)
        });
        self.under_way.push_back(Handshake { task: abort.id(), abort, remote, source });
    }

    fn finish(
        &self,
        remote: SocketAddr,
        result: Result<quinn::Connection, Option<ConnectionError>>,
    ) -> Option<Connection> {
        let counts = &self.endpoint.counts;
        let error = match result {
            Ok(inner) => match peer_name(&inner, &self.endpoint.cluster) {
                Ok(peer) => return self.seats.take(inner, peer),
                Err(error) => error.to_string(),
            },
            // Nobody answers: a path that broke, or somebody who never meant to.
            Err(None | Some(ConnectionError::TimedOut)) => {
                counts.add(Outcome::TimedOut);
                tracing::debug!(%remote, "a handshake was not completed");
                return None;
            }
            Err(Some(error)) => match refusal(&error) {
                Some(error) => error.to_string(),
                None => plain(&error.to_string()),
            },
        };
        counts.add(Outcome::Failed);
        self.seats.say(remote, "an unknown node", &error);
        None
    }
}

/// Who is connected.
#[derive(Debug)]
pub(super) struct Seats {
    limits: Limits,
    counts: Arc<Counts>,
    notices: Arc<Notices>,
    peers: Mutex<BTreeMap<NodeName, Peer>>,
}

#[derive(Debug)]
struct Peer {
    /// Oldest first.
    connections: VecDeque<quinn::Connection>,
    /// Bytes that its frames may still take.
    memory: Arc<Semaphore>,
}

/// The place of one accepted connection; free again when the last handle of the connection is gone, which also ends it.
#[derive(Debug)]
pub(super) struct Seat {
    seats: Arc<Seats>,
    peer: NodeName,
    connection: usize,
    memory: Arc<Semaphore>,
}

impl Seats {
    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<NodeName, Peer>> {
        self.peers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(self: &Arc<Self>, inner: quinn::Connection, peer: NodeName) -> Option<Connection> {
        let mut peers = self.lock();
        let others: usize =
            peers.iter().filter(|(name, _)| **name != peer).map(|(_, peer)| peer.connections.len()).sum();
        if others >= self.limits.connections_max {
            drop(peers);
            let reason = format!("{} connections are open, the most that this node has", others);
            inner.close(code::REFUSED, reason.as_bytes());
            self.counts.add(Outcome::Refused);
            self.say(inner.remote_address(), &peer.to_string(), &reason);
            return None;
        }
        let held = peers.entry(peer.clone()).or_insert_with(|| Peer {
            connections: VecDeque::new(),
            memory: Arc::new(Semaphore::new(self.limits.buffered_max)),
        });
        while held.connections.len() >= self.limits.connections_per_peer {
            let Some(oldest) = held.connections.pop_front() else { break };
            oldest.close(code::REPLACED, b"a newer connection of this node took its place");
            self.counts.add(Outcome::Replaced);
        }
        held.connections.push_back(inner.clone());
        let memory = held.memory.clone();
        drop(peers);
        self.counts.add(Outcome::Accepted);
        let seat = Seat { seats: self.clone(), peer: peer.clone(), connection: inner.stable_id(), memory };
        Some(Connection { inner, peer, seat: Some(Arc::new(seat)) })
    }

    /// One line in a while for each address and reason.
    fn say(&self, remote: SocketAddr, peer: &str, reason: &str) {
        if let Some(kept_back) = self.notices.due(&format!("{} {peer} {reason}", remote.ip())) {
            tracing::warn!(%remote, peer, reason, kept_back, "a node that connects is refused");
        }
    }
}

impl Seat {
    pub(super) fn counts(&self) -> &Counts {
        &self.seats.counts
    }

    pub(super) fn refused(&self, inner: &quinn::Connection, peer: &str, reason: &str) {
        self.seats.counts.add(Outcome::Refused);
        self.seats.say(inner.remote_address(), peer, reason);
    }

    /// Waits for memory for a frame; `None` if nothing is to be waited for.
    pub(super) async fn reserve(&self, len: usize) -> Option<OwnedSemaphorePermit> {
        // A frame that is longer than all there is takes all.
        let len = u32::try_from(len.min(self.seats.limits.buffered_max)).unwrap_or(u32::MAX);
        self.memory.clone().acquire_many_owned(len).await.ok()
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut peers = self.seats.lock();
        let Some(peer) = peers.get_mut(&self.peer) else { return };
        let at = peer.connections.iter().position(|held| held.stable_id() == self.connection);
        if let Some(connection) = at.and_then(|at| peer.connections.remove(at)) {
            connection.close(code::BYE, b"bye");
        }
        if peer.connections.is_empty() {
            peers.remove(&self.peer);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proven(last: u8) -> Source {
        Source::Proven(IpAddr::from([192, 0, 2, last]))
    }

    #[test]
    fn unproven_handshakes_are_asked_for_tokens_once_there_are_many() {
        let mut under_way = vec![Source::Unproven; UNPROVEN_MAX - 1];
        assert_eq!(admit(&under_way, Source::Unproven), Admission::Accept);
        under_way.push(Source::Unproven);
        assert_eq!(admit(&under_way, Source::Unproven), Admission::Retry);
        assert_eq!(admit(&under_way, proven(1)), Admission::Accept);
    }

    #[test]
    fn one_address_has_its_share_and_its_oldest_gives_way() {
        let mut under_way = vec![proven(9)];
        under_way.extend([proven(1); PER_ADDRESS_MAX]);
        assert_eq!(admit(&under_way, proven(1)), Admission::Replace(1));
        assert_eq!(admit(&under_way, proven(2)), Admission::Accept);
    }

    #[test]
    fn an_address_without_handshakes_gets_a_place_though_all_are_taken() {
        let full: Vec<_> = (0..HANDSHAKES_MAX).map(|at| proven((at / PER_ADDRESS_MAX) as u8)).collect();
        assert!(matches!(admit(&full, proven(200)), Admission::Replace(_)));
        let mut full: Vec<_> = (0..HANDSHAKES_MAX - 1).map(|at| proven((at / 8) as u8)).collect();
        full.push(proven(200));
        assert_eq!(admit(&full, proven(200)), Admission::Ignore);
        assert_eq!(admit(&full, Source::Unproven), Admission::Retry);
    }
}
