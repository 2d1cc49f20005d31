//! Memory that is there before the first packet comes.

use std::hint::black_box;

/// An empty vector whose room for `capacity` values has been written once. The kernel gives memory at the first
/// write, page by page; that would otherwise happen between two packets, and cost a slice of an import several times
/// its ordinary time.
pub(super) fn room_for<T: Copy>(capacity: usize, filler: T) -> Vec<T> {
    let mut values = filled(capacity, filler);
    values.clear();
    values
}

/// `count` values, written, not lent as the kernel's page of zeros.
pub(super) fn filled<T: Copy>(count: usize, value: T) -> Vec<T> {
    let mut values = Vec::with_capacity(count);
    // Without this the compiler may ask for zeroed memory instead of writing zeros.
    black_box(values.as_mut_ptr());
    values.resize(count, value);
    black_box(values.as_ptr());
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_is_empty_and_filled_memory_is_full() {
        let room: Vec<u32> = room_for(1_000, 7);
        assert!(room.is_empty() && room.capacity() >= 1_000);
        assert_eq!(filled(3, 5_u64), [5, 5, 5]);
    }
}
