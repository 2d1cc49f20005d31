//! I6: before Switching is committed nobody serves under the next epoch, and every failure goes back; after it every
//! failure goes forward, unless it is taken back with proof that the target never served. Source: part 1.1.

use std::collections::{BTreeMap, BTreeSet};

use flow::{Epoch, GroupId, MoveId};
use placement::core::{Change, Move, MoveOutcome, MovePhase};

use crate::world::{Checked, Violation};

#[derive(Default)]
pub(crate) struct Outcomes {
    /// Epochs that the log allows: of owners, and of targets once Switching is committed.
    granted: BTreeSet<(GroupId, Epoch)>,
    /// Epochs of moves that were aborted or taken back.
    void: BTreeSet<(GroupId, Epoch)>,
    /// Epochs under which packets were translated.
    served: BTreeSet<(GroupId, Epoch)>,
}

impl Outcomes {
    pub(crate) fn committed(&mut self, change: &Change, before: &BTreeMap<MoveId, Move>) -> Checked {
        match change {
            Change::Group(group) => {
                self.granted.insert((group.id, group.epoch));
            }
            Change::Move(mv) if mv.phase == MovePhase::Switching => {
                self.granted.insert((mv.group, mv.epoch));
            }
            Change::MoveEnded { id, group, outcome } if *outcome != MoveOutcome::Done => {
                let Some(epoch) = before.get(id).map(|mv| mv.epoch) else { return Ok(()) };
                if *outcome == MoveOutcome::TakenBack {
                    self.void.insert((*group, epoch));
                } else {
                    // The next move of the group has the same epoch.
                    self.granted.remove(&(*group, epoch));
                }
                if self.served.contains(&(*group, epoch)) {
                    let what = format!(
                        "move {id} of {group} ended {outcome:?}, but the target served under {epoch}"
                    );
                    return Err(Violation::new(6, what));
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// An operator has fenced the target of this move: what it served is over.
    pub(crate) fn fenced(&mut self, mv: &Move) {
        self.served.remove(&(mv.group, mv.epoch));
    }

    /// A worker serves under this epoch.
    pub(crate) fn serves(&self, group: GroupId, epoch: Epoch) -> Checked {
        if epoch > Epoch(1) && !self.granted.contains(&(group, epoch)) {
            return Err(Violation::new(
                6,
                format!("{group} is served under {epoch}, which the log does not allow"),
            ));
        }
        if self.void.contains(&(group, epoch)) {
            return Err(Violation::new(6, format!("{group} is served under {epoch}, which was taken back")));
        }
        Ok(())
    }

    pub(crate) fn translated(&mut self, group: GroupId, epoch: Epoch) {
        self.served.insert((group, epoch));
    }
}
