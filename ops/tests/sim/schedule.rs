//! Virtual time: what happens next, in microseconds, and in the order of asking when at the same time.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// When, in which order of asking, in which order of putting here, and at which place the event lies.
type Entry = (u64, u64, u64, usize);

/// A queue of events by time.
pub(crate) struct Schedule<E> {
    heap: BinaryHeap<Reverse<Entry>>,
    /// Events are large, and stay where they are while the queue is kept in order.
    events: Vec<Option<E>>,
    free: Vec<usize>,
    number: u64,
    puts: u64,
    /// Of the event that happens now.
    present: u64,
}

impl<E> Default for Schedule<E> {
    fn default() -> Self {
        Self { heap: BinaryHeap::new(), events: Vec::new(), free: Vec::new(), number: 0, puts: 0, present: 0 }
    }
}

impl<E> Schedule<E> {
    pub(crate) fn at(&mut self, at: u64, event: E) {
        self.number += 1;
        self.put(at, self.number, event);
    }

    /// Puts the event that happens now, or a part of what comes of it, off until then: before all that was asked for after it, also
    /// what is to happen just then.
    pub(crate) fn put_off(&mut self, until: u64, event: E) {
        self.put(until, self.present, event);
    }

    fn put(&mut self, at: u64, number: u64, event: E) {
        let place = self.free.pop().unwrap_or_else(|| {
            self.events.push(None);
            self.events.len() - 1
        });
        self.events[place] = Some(event);
        self.puts += 1;
        self.heap.push(Reverse((at, number, self.puts, place)));
    }

    /// When the next event is.
    pub(crate) fn next_at(&self) -> Option<u64> {
        self.heap.peek().map(|Reverse((at, ..))| *at)
    }

    pub(crate) fn pop(&mut self) -> Option<(u64, E)> {
        let Reverse((at, number, _, place)) = self.heap.pop()?;
        self.present = number;
        self.free.push(place);
        Some((at, self.events[place].take()?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_put_off_stays_before_what_was_asked_for_later() {
        let mut schedule = Schedule::default();
        schedule.at(1, "first");
        schedule.at(5, "second");
        assert_eq!(schedule.pop(), Some((1, "first")));
        schedule.at(5, "third");
        schedule.put_off(5, "first");
        schedule.put_off(5, "and what else comes of it");
        let rest: Vec<_> = std::iter::from_fn(|| schedule.pop()).collect();
        assert_eq!(rest, [(5, "first"), (5, "and what else comes of it"), (5, "second"), (5, "third")]);
    }
}
