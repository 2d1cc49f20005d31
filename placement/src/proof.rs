//! What a node asks before it takes part: whether it has all that it promised (see `claims`). Enough of those must have answered whose
//! votes count, and who that is may have changed while the node was away.

use std::collections::BTreeSet;

use openraft::alias::StoredMembershipOf;
use serde::{Deserialize, Serialize};

use crate::node::NodeId;
use crate::raft::TypeConfig;

/// The voters, and the index of the entry that made them so.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Electorate {
    index: Option<u64>,
    voters: BTreeSet<NodeId>,
}

impl Electorate {
    pub(crate) fn of(membership: &StoredMembershipOf<TypeConfig>) -> Self {
        let index = membership.log_id().map(|id| id.index);
        Self { index, voters: membership.membership().voter_ids().collect() }
    }
}

/// Which electorate is meant: the last in the log, or the last that a quorum has.
#[derive(Clone, Copy)]
pub(crate) enum KnownTo {
    Log,
    Quorum,
}

/// Who has answered what this node promised, and who is still to.
pub(crate) struct Proof {
    id: NodeId,
    /// By this node's log, or else, where that is empty, those that its file names; until one that answers knows of a later one. A file
    /// may name nodes that were removed or are still to come, of whom no majority can be made.
    electorate: Electorate,
    /// Those of the file. They are asked too: all others that the log knows may be gone.
    named: BTreeSet<NodeId>,
    heard: BTreeSet<NodeId>,
}

impl Proof {
    pub(crate) fn new(id: NodeId, mut by_log: Electorate, named: BTreeSet<NodeId>) -> Self {
        if by_log.voters.is_empty() {
            by_log.voters.clone_from(&named);
        }
        Self { id, electorate: by_log, named, heard: BTreeSet::new() }
    }

    /// Who has not answered yet.
    pub(crate) fn unheard(&self) -> BTreeSet<NodeId> {
        let all = self.electorate.voters.union(&self.named).copied();
        all.filter(|id| *id != self.id && !self.heard.contains(id)).collect()
    }

    /// One has answered, and knows of this electorate.
    pub(crate) fn hear(&mut self, id: NodeId, knows: Electorate) {
        self.heard.insert(id);
        if knows.index > self.electorate.index && !knows.voters.is_empty() {
            self.electorate = knows;
        }
    }

    /// Whether those who have answered make a quorum with this node.
    pub(crate) fn is_enough(&self) -> bool {
        let others = || self.electorate.voters.iter().filter(|&&id| id != self.id);
        let heard = others().filter(|id| self.heard.contains(id)).count();
        heard >= others().count().div_ceil(2)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn electorate(index: Option<u64>, voters: &[NodeId]) -> Electorate {
        Electorate { index, voters: voters.iter().copied().collect() }
    }

    #[test]
    fn a_majority_of_the_latest_voters_is_enough_and_those_that_are_only_named_do_not_count() {
        let named = BTreeSet::from([1, 2, 5, 6, 7, 8]);
        let mut proof = Proof::new(1, electorate(Some(4), &[1, 2, 3]), named.clone());
        assert_eq!(proof.unheard(), BTreeSet::from([2, 3, 5, 6, 7, 8]));
        assert!(!proof.is_enough());
        // It belongs to no group.
        proof.hear(8, electorate(None, &[]));
        assert!(!proof.is_enough());
        // It knows of voters that came later; that it is one of them is not enough.
        proof.hear(5, electorate(Some(9), &[1, 5, 6, 7]));
        assert!(!proof.is_enough());
        // What is older says nothing any more.
        proof.hear(2, electorate(Some(4), &[1, 2, 3]));
        assert!(!proof.is_enough());
        proof.hear(6, electorate(Some(9), &[1, 5, 6, 7]));
        assert!(proof.is_enough());
        assert_eq!(proof.unheard(), BTreeSet::from([7]));

        let mut empty = Proof::new(1, electorate(None, &[]), named);
        for id in [2, 5] {
            empty.hear(id, electorate(None, &[]));
        }
        assert!(!empty.is_enough());
        empty.hear(6, electorate(None, &[]));
        assert!(empty.is_enough());
        assert!(Proof::new(1, electorate(None, &[]), BTreeSet::new()).is_enough());
    }
}
