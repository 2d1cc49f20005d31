//! Lines of the log that would come with every message.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use flow::Micros;

/// Between two lines about the same thing.
const INTERVAL: Micros = Micros(60_000_000);
/// Things that are remembered; beyond, all others have one line together.
const KEYS_MAX: usize = 256;

/// Lets the same line into the log once a minute.
#[derive(Debug, Default)]
pub(crate) struct Notices(Mutex<BTreeMap<String, (Micros, u64)>>);

impl Notices {
    /// Whether a line is due: if so, how many were kept back since the last.
    pub(crate) fn due(&self, key: &str, now: Micros) -> Option<u64> {
        let mut said = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if said.len() >= KEYS_MAX && !said.contains_key(key) {
            said.retain(|_, (at, _)| now.since(*at) < INTERVAL);
        }
        let key = if said.len() >= KEYS_MAX && !said.contains_key(key) { "" } else { key };
        match said.get_mut(key) {
            Some((at, kept)) if now.since(*at) < INTERVAL => {
                *kept += 1;
                None
            }
            Some((at, kept)) => {
                *at = now;
                Some(std::mem::take(kept))
            }
            None => {
                said.insert(key.to_owned(), (now, 0));
                Some(0)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_line_comes_once_a_minute_and_what_is_remembered_is_bounded() {
        let notices = Notices::default();
        let (start, half, later) = (Micros(0), Micros(INTERVAL.0 / 2), INTERVAL);
        assert_eq!([start, half, half, later].map(|at| notices.due("a", at)), [Some(0), None, None, Some(2)]);
        assert_eq!(notices.due("b", half), Some(0));
        let lines = (0..10 * KEYS_MAX).filter(|key| notices.due(&key.to_string(), later).is_some()).count();
        assert!(lines <= KEYS_MAX + 1, "{lines}");
        assert!(notices.0.lock().unwrap().len() <= KEYS_MAX + 1);
    }
}
