//! What the fuzz targets do with bytes. `tests/corpus.rs` of the package does the same with the kept inputs.

mod frame;
mod worker;

use dataplane::control::codec::{FrameDecoder, encode};
use dataplane::control::{Event, Request};
use serde::Serialize;
use serde::de::DeserializeOwned;

pub use frame::packet;
pub use worker::worker;

/// The stream between agent and worker, of either direction, in two pieces: whatever is read can be written, and that
/// is read as the same again.
pub fn control(bytes: &[u8]) {
    let Some((&cut, stream)) = bytes.split_first() else { return };
    let pieces = stream.split_at(usize::from(cut).min(stream.len()));
    read_stream::<Request>(pieces);
    read_stream::<Event>(pieces);
}

fn read_stream<T: Serialize + DeserializeOwned>((first, second): (&[u8], &[u8])) {
    let mut decoder = FrameDecoder::<T>::new();
    for piece in [first, second] {
        decoder.push(piece);
        while let Ok(Some(message)) = decoder.next() {
            let written = encode(&message).expect("what was read is short enough to be written");
            let mut again = FrameDecoder::<T>::new();
            again.push(&written);
            let read = again.next().expect("what was written can be read").expect("it is whole");
            // Bytes, because a share that is no number does not equal itself.
            assert_eq!(encode(&read).expect("as before"), written);
        }
    }
}
