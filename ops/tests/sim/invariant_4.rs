//! I4: a planned move drops no packet that reached us, and sends none twice. Packets are excused that were in a worker
//! process that died, and what [`crate::excuse`] lists. Source: part 1.1.

use crate::excuse::Excuses;
use crate::traffic::{Sending, Traffic, Way};
use crate::world::{Checked, Violation};

#[derive(Default)]
pub(crate) struct ExactlyOnce;

impl ExactlyOnce {
    pub(crate) fn arrives(&self, number: u64, sending: &Sending) -> Checked {
        if sending.arrived <= 1 {
            return Ok(());
        }
        Err(Violation::new(
            4,
            format!("packet {number} of talk {} arrived {} times", sending.talk, sending.arrived),
        ))
    }

    /// Everything has had its time to arrive.
    pub(crate) fn end(traffic: &Traffic, excuses: &Excuses) -> Checked {
        let lost = |(_, sending): &(usize, &Sending)| {
            let group = traffic.talks[sending.talk].group;
            // ICMP from the world goes by port, through the worker of another group of the service, which may have died.
            let by_port = sending.icmp && sending.way == Way::In;
            let excused = if by_port {
                excuses.may_lose_of(group.service) || !excuses.is_watched_of(group.service, sending.at)
            } else {
                excuses.may_lose(&group) || !excuses.is_watched_since(&group, sending.at)
            };
            sending.arrived == 0 && !sending.excused && !excused
        };
        let mut lost = traffic.sendings.iter().enumerate().filter(lost);
        let Some((number, sending)) = lost.next() else { return Ok(()) };
        let (talk, more) = (&traffic.talks[sending.talk], lost.count());
        let what = format!(
            "packet {number} {:?} at {} of {} was lost, and {more} more",
            sending.way, sending.at, talk.group
        );
        Err(Violation::new(4, what))
    }
}
