//! Timer wheel: one bucket per second, entries chained through the flows themselves. A flow that stays
//! active is not touched: its bucket comes up once per timeout, and the caller arms it anew for the time
//! that is then left.

use super::{Cold, NIL};

/// Ticks of 100 ms in one bucket.
pub const TICKS_PER_BUCKET: u32 = 10;
const BUCKETS: usize = 8192;

/// The buckets. Work is done by the caller, a few entries at a time.
#[derive(Debug)]
pub struct Wheel {
    heads: Vec<u32>,
    /// The bucket that is being emptied, as a count since time zero.
    at: u32,
}

impl Wheel {
    /// Starts at this tick.
    #[must_use]
    pub fn new(tick: u32) -> Self {
        Self { heads: vec![NIL; BUCKETS], at: tick / TICKS_PER_BUCKET }
    }

    /// Chains a flow to come up when `tick` has passed. Further ahead than the wheel is wide, it comes up
    /// early and is armed anew.
    pub fn arm(&mut self, cold: &mut [Cold], flow: u32, tick: u32) {
        let due = (tick / TICKS_PER_BUCKET + 1).clamp(self.at + 1, self.at + BUCKETS as u32 - 1);
        let bucket = due as usize % BUCKETS;
        let head = std::mem::replace(&mut self.heads[bucket], flow);
        let entry = &mut cold[flow as usize];
        entry.bucket = u16::try_from(bucket).unwrap_or(0);
        (entry.wheel_prev, entry.wheel_next) = (NIL, head);
        if head != NIL {
            cold[head as usize].wheel_prev = flow;
        }
    }

    /// Takes a flow out.
    pub fn disarm(&mut self, cold: &mut [Cold], flow: u32) {
        let Cold { wheel_prev, wheel_next, bucket, .. } = cold[flow as usize];
        if wheel_prev == NIL {
            self.heads[usize::from(bucket)] = wheel_next;
        } else {
            cold[wheel_prev as usize].wheel_next = wheel_next;
        }
        if wheel_next != NIL {
            cold[wheel_next as usize].wheel_prev = wheel_prev;
        }
    }

    /// The next flow whose bucket has come up; it stays chained, so the caller disarms it.
    /// At most `BUCKETS` steps over empty buckets.
    pub fn due(&mut self, tick: u32) -> Option<u32> {
        let until = tick / TICKS_PER_BUCKET;
        loop {
            let head = self.heads[self.at as usize % BUCKETS];
            if head != NIL {
                return Some(head);
            }
            if self.at >= until {
                return None;
            }
            self.at += 1;
        }
    }
}
