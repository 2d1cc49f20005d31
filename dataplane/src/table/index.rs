//! A hash index from keys that live elsewhere to slot numbers: open addressing with linear probing, eight
//! bytes per place (32 bits of hash beside the number, so that one cache line answers), and deletion by
//! backward shift, so that no tombstones gather and no rehash ever stalls the worker.

use super::resident::filled;

/// The index. Its size is fixed; it stays at most half full.
#[derive(Debug)]
pub struct Index {
    /// Hash in the high half, slot number plus one in the low half; 0 is free.
    places: Vec<u64>,
    mask: usize,
}

fn halves(place: u64) -> (u32, u32) {
    ((place >> 32) as u32, place as u32)
}

impl Index {
    /// Room for so many numbers.
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        let places = (capacity.max(8) * 2).next_power_of_two();
        Self { places: filled(places, 0), mask: places - 1 }
    }

    /// The first number with this hash, without looking at its key: for overlapping the memory accesses of
    /// a burst. The caller must compare the key.
    #[must_use]
    pub fn candidate(&self, hash: u32) -> Option<u32> {
        self.find(hash, |_| true)
    }

    /// The number with this hash whose key is the `same`.
    #[must_use]
    pub fn find(&self, hash: u32, mut same: impl FnMut(u32) -> bool) -> Option<u32> {
        let mut at = hash as usize & self.mask;
        loop {
            let (found, number) = halves(self.places[at]);
            if number == 0 {
                return None;
            }
            if found == hash && same(number - 1) {
                return Some(number - 1);
            }
            at = (at + 1) & self.mask;
        }
    }

    /// Adds a number. The caller keeps the count within the capacity, and the number is not in yet.
    pub fn insert(&mut self, hash: u32, number: u32) {
        let mut at = hash as usize & self.mask;
        while self.places[at] != 0 {
            at = (at + 1) & self.mask;
        }
        self.places[at] = u64::from(hash) << 32 | u64::from(number + 1);
    }

    /// Removes a number, if it is in.
    pub fn remove(&mut self, hash: u32, number: u32) {
        let wanted = u64::from(hash) << 32 | u64::from(number + 1);
        let mut hole = hash as usize & self.mask;
        while self.places[hole] != wanted {
            if self.places[hole] == 0 {
                return;
            }
            hole = (hole + 1) & self.mask;
        }
        let mut at = hole;
        loop {
            at = (at + 1) & self.mask;
            let place = self.places[at];
            if place == 0 {
                break;
            }
            // What sits at or before its home as seen from the hole must stay behind it.
            let home = (place >> 32) as usize & self.mask;
            if at.wrapping_sub(home) & self.mask >= at.wrapping_sub(hole) & self.mask {
                self.places[hole] = place;
                hole = at;
            }
        }
        self.places[hole] = 0;
    }
}

/// A keyed hash of 128 bits to 32: two folded multiplications. The key is secret to the process, so that
/// nobody outside can aim packets at one place.
#[derive(Clone, Copy, Debug)]
pub struct Hasher {
    keys: [u64; 2],
}

impl Hasher {
    /// From random words.
    #[must_use]
    pub fn new(keys: [u64; 2]) -> Self {
        Self { keys }
    }

    /// The hash.
    #[must_use]
    pub fn hash(self, a: u64, b: u64) -> u32 {
        let first = folded(a ^ self.keys[0], b ^ self.keys[1]);
        let second = folded(first ^ 0xa076_1d64_78bd_642f, self.keys[0] | 1);
        (second >> 32) as u32
    }
}

fn folded(a: u64, b: u64) -> u64 {
    let wide = u128::from(a) * u128::from(b);
    (wide >> 64) as u64 ^ wide as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn what_is_in_is_found_whatever_was_removed(ops in proptest::collection::vec((any::<bool>(), 0u32..24), 0..300)) {
            // Few hashes, so that runs of neighbours form and wrap around the end.
            let hash = |n: u32| if n < 12 { u32::MAX - n % 3 } else { n % 5 };
            let mut index = Index::new(32);
            let mut model = BTreeSet::new();
            for (add, n) in ops {
                if add && model.insert(n) {
                    index.insert(hash(n), n);
                } else if !add && model.remove(&n) {
                    index.remove(hash(n), n);
                }
                for m in 0..24 {
                    prop_assert_eq!(index.find(hash(m), |x| x == m).is_some(), model.contains(&m));
                }
            }
        }
    }
}
