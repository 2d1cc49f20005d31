//! Virtual time: what happens next, in microseconds, and in the order of asking when at the same time.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// When, in which order of asking, and at which place the event lies.
type Entry = (u64, u64, usize);

/// A queue of events by time.
pub(crate) struct Schedule<E> {
    heap: BinaryHeap<Reverse<Entry>>,
    /// Events are large, and stay where they are while the queue is kept in order.
    events: Vec<Option<E>>,
    free: Vec<usize>,
    number: u64,
}

impl<E> Default for Schedule<E> {
    fn default() -> Self {
        Self { heap: BinaryHeap::new(), events: Vec::new(), free: Vec::new(), number: 0 }
    }
}

impl<E> Schedule<E> {
    pub(crate) fn at(&mut self, at: u64, event: E) {
        self.number += 1;
        let place = self.free.pop().unwrap_or_else(|| {
            self.events.push(None);
            self.events.len() - 1
        });
        self.events[place] = Some(event);
        self.heap.push(Reverse((at, self.number, place)));
    }

    /// When the next event is.
    pub(crate) fn next_at(&self) -> Option<u64> {
        self.heap.peek().map(|Reverse((at, ..))| *at)
    }

    pub(crate) fn pop(&mut self) -> Option<(u64, E)> {
        let Reverse((at, _, place)) = self.heap.pop()?;
        self.free.push(place);
        Some((at, self.events[place].take()?))
    }
}
