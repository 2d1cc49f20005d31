//! I5: per-flow order holds in strict moves. Measured where translated packets leave the owner's switch, since beyond
//! that the paths of two owners differ. Source: part 1.1.

use std::collections::BTreeMap;

use crate::traffic::{Sending, Way};
use crate::world::{Checked, Violation};

#[derive(Default)]
pub(crate) struct Order {
    last: BTreeMap<(usize, Way), (u64, u32)>,
}

impl Order {
    pub(crate) fn leaves(&mut self, number: u64, sending: &Sending) -> Checked {
        let (last, stretch) = self.last.get(&(sending.talk, sending.way)).copied().unwrap_or((0, 0));
        // Packets of before and after roaming come in at two sites: their order was lost outside.
        if number < last && stretch == sending.stretch {
            let what =
                format!("packet {number} of talk {} {:?} left after {last}", sending.talk, sending.way);
            return Err(Violation::new(5, what));
        }
        self.last.insert((sending.talk, sending.way), (number.max(last), sending.stretch.max(stretch)));
        Ok(())
    }
}
