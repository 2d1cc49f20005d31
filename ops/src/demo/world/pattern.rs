//! Pseudo-random bytes that sender and receiver make alike.

use flow::sample::Seeded;

/// A key out of three words.
pub(super) fn key(seed: u64, a: u64, b: u64) -> u64 {
    let first = Seeded::new(seed ^ a.wrapping_mul(0xd6e8_feb8_6659_fd93)).word();
    Seeded::new(first ^ b).word()
}

/// Writes the bytes of a stream from an offset on.
pub(super) fn fill(key: u64, offset: usize, bytes: &mut [u8]) {
    let mut stream = Stream::new(key);
    for (at, byte) in (offset..).zip(bytes) {
        *byte = stream.byte(at);
    }
}

/// How many bytes differ from the stream.
pub(super) fn wrong(key: u64, offset: usize, bytes: &[u8]) -> u64 {
    let mut stream = Stream::new(key);
    (offset..).zip(bytes).filter(|&(at, &byte)| stream.byte(at) != byte).count() as u64
}

struct Stream {
    key: u64,
    /// The word that was made last, and its place.
    word: [u8; 8],
    place: Option<usize>,
}

impl Stream {
    fn new(key: u64) -> Self {
        Self { key, word: [0; 8], place: None }
    }

    fn byte(&mut self, at: usize) -> u8 {
        let place = at / 8;
        if self.place != Some(place) {
            self.place = Some(place);
            self.word = Seeded::new(self.key.wrapping_add(place as u64)).word().to_le_bytes();
        }
        self.word[at % 8]
    }
}
