//! What nodes know of one another's promises.
//!
//! A directory that was put back from an older copy, or is gone, looks right to its own node. But the others
//! remember what that node acknowledged to them: the leader learns it with each answer and tells all others
//! with each heartbeat, and everyone keeps it on disk. A node that starts asks them before it takes part, and
//! one that has less than it acknowledged stops.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use openraft::alias::{LogIdOf, VoteOf};
use serde::{Deserialize, Serialize};

use crate::node::NodeId;
use crate::promise::Promise;
use crate::raft::TypeConfig;

/// What one node has acknowledged, as far as somebody knows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Claim {
    /// It voted so, or followed a leader with this vote.
    pub(crate) vote: Option<VoteOf<TypeConfig>>,
    /// It had this entry on disk.
    pub(crate) last: Option<LogIdOf<TypeConfig>>,
}

impl Claim {
    /// Takes over what is more; whether anything was.
    fn raise(&mut self, other: &Self) -> bool {
        let before = *self;
        if other.vote > self.vote {
            self.vote = other.vote;
        }
        self.last = self.last.max(other.last);
        *self != before
    }

    /// What is missing of it in what the node has; nothing if it has all.
    pub(crate) fn missing_in(&self, own: &Promise) -> Option<String> {
        let id = |id: Option<LogIdOf<TypeConfig>>| id.map_or("nothing".into(), |id| id.to_string());
        let kept = own.last.max(own.dropped);
        if self.last > kept {
            return Some(format!(
                "it acknowledged its log up to {}, and has {}",
                id(self.last),
                id(own.last)
            ));
        }
        if self.vote > own.vote {
            let vote = |vote: Option<VoteOf<TypeConfig>>| vote.map_or("none".into(), |vote| vote.to_string());
            return Some(format!("it gave the vote {}, and knows of {}", vote(self.vote), vote(own.vote)));
        }
        None
    }
}

/// Of each node what is known.
pub(crate) type Claims = BTreeMap<NodeId, Claim>;

/// Nodes that are remembered at most: far more than a group ever had, since numbers are never used again.
const CLAIMS_LEN_MAX: usize = 1024;

/// What this node knows of all.
#[derive(Debug, Default)]
pub(crate) struct Witness {
    claims: Mutex<Claims>,
    /// There is something that is not on disk yet.
    news: AtomicBool,
}

impl Witness {
    pub(crate) fn new(claims: Claims) -> Self {
        Self { claims: Mutex::new(claims), news: AtomicBool::new(false) }
    }

    fn lock(&self) -> MutexGuard<'_, Claims> {
        self.claims.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn learn(&self, node: NodeId, claim: &Claim) {
        let mut claims = self.lock();
        if !claims.contains_key(&node) && claims.len() >= CLAIMS_LEN_MAX {
            return;
        }
        if claims.entry(node).or_default().raise(claim) {
            self.news.store(true, Ordering::Relaxed);
        }
    }

    pub(crate) fn learn_all(&self, claims: &Claims) {
        claims.iter().for_each(|(&node, claim)| self.learn(node, claim));
    }

    pub(crate) fn of(&self, node: NodeId) -> Claim {
        self.lock().get(&node).copied().unwrap_or_default()
    }

    /// All that is known, with what this node has promised itself.
    pub(crate) fn told(&self, own: &Promise) -> Claims {
        self.learn(own.node, &Claim { vote: own.vote, last: own.last });
        self.lock().clone()
    }

    /// What is to be written, if it is not on disk yet. Who fails to write it stops for good.
    pub(crate) fn unwritten(&self) -> Option<Claims> {
        self.news.swap(false, Ordering::Relaxed).then(|| self.lock().clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use openraft::impls::Vote;
    use openraft::testing::log_id;

    fn own(last: u64) -> Promise {
        let last = Some(log_id::<TypeConfig>(3, 1, last));
        Promise { node: 2, incarnation: 7, vote: Some(Vote::new(3, 1)), last, dropped: None }
    }

    #[test]
    fn less_than_was_acknowledged_is_said_and_what_a_leader_cut_back_is_excused() {
        let witness = Witness::default();
        witness.learn(2, &Claim { vote: None, last: Some(log_id::<TypeConfig>(3, 1, 9)) });
        witness.learn(2, &Claim { vote: Some(Vote::new(3, 1)), last: Some(log_id::<TypeConfig>(3, 1, 5)) });
        let claim = witness.of(2);
        assert_eq!(claim.last, Some(log_id::<TypeConfig>(3, 1, 9)), "knowledge only grows");
        assert_eq!(claim.missing_in(&own(9)), None);
        assert!(claim.missing_in(&own(8)).is_some_and(|what| what.contains("acknowledged its log up to")));
        let mut cut = own(9);
        cut.cut_back(Some(log_id::<TypeConfig>(3, 1, 8)));
        assert_eq!(claim.missing_in(&cut), None);
        witness.learn(2, &Claim { vote: Some(Vote::new(4, 3)), last: None });
        assert!(witness.of(2).missing_in(&own(9)).is_some_and(|what| what.contains("gave the vote")));
        assert_eq!(witness.of(1), Claim::default());
    }

    #[test]
    fn what_is_new_is_written_once() {
        let witness = Witness::default();
        witness.learn(1, &Claim { vote: None, last: Some(log_id::<TypeConfig>(1, 1, 1)) });
        assert_eq!(witness.unwritten().map(|claims| claims.len()), Some(1));
        assert_eq!(witness.unwritten(), None);
        witness.learn(1, &Claim { vote: None, last: Some(log_id::<TypeConfig>(1, 1, 1)) });
        assert_eq!(witness.unwritten(), None, "nothing new");
    }
}
