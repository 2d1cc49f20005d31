//! What the fuzz targets do with bytes. `tests/corpus.rs` of the package does the same with the kept inputs.

use std::sync::OnceLock;

use flow::Batch;
use flow::nat::NatSlices;
use transfer::codec::{ChunkHeader, Decoder, Encoder, HEADER_LEN};
use transfer::name::NodeName;
use transfer::wire::{Frame, decode_answer, encode_answer};

/// Inputs that unpack to more are left out: the limits allow them, and they take long.
const COLUMNS_LEN_MAX: usize = 1 << 16;

/// A chunk of flow records. The first byte says what of it is made right first, so that inputs get past compression and
/// checksum: bit 0, what follows the header are columns; bit 1, the checksum; bit 2, ports are predicted.
pub fn chunk(bytes: &[u8]) {
    let Some((&how, rest)) = bytes.split_first() else { return };
    let mut chunk = rest.to_vec();
    if how & 1 != 0 && chunk.len() >= HEADER_LEN {
        let columns = chunk.split_off(HEADER_LEN);
        let Ok(body) = zstd::bulk::compress(&columns, 1) else { return };
        chunk[48..52].copy_from_slice(&(columns.len() as u32).to_le_bytes());
        chunk.extend(body);
    }
    if how & 2 != 0 && chunk.len() >= HEADER_LEN {
        if u32::from_le_bytes([chunk[48], chunk[49], chunk[50], chunk[51]]) as usize > COLUMNS_LEN_MAX {
            return;
        }
        let checksum = crc32c::crc32c(&chunk[..HEADER_LEN - 4]);
        let checksum = crc32c::crc32c_append(checksum, &chunk[HEADER_LEN..]);
        chunk[HEADER_LEN - 4..HEADER_LEN].copy_from_slice(&checksum.to_le_bytes());
    }
    let slices = (how & 4 != 0).then(service);
    let decoded = Decoder::new().expect("zstd has a context").decode(&chunk, slices);
    if let Ok((header, batch)) = decoded {
        leads_back(&header, batch, slices);
    }
}

fn service() -> &'static NatSlices {
    static SERVICE: OnceLock<NatSlices> = OnceLock::new();
    SERVICE.get_or_init(|| flow::sample::service(64).expect("64 subscribers are few"))
}

/// What was read can be written, and that is read as the same, in the order in which an encoder writes it.
fn leads_back(header: &ChunkHeader, mut batch: Batch, slices: Option<&NatSlices>) {
    let mut encoder = Encoder::new().expect("zstd has a context");
    let written =
        encoder.encode(header, &mut batch, slices).expect("what was read is few enough to be written");
    let (again, read) =
        Decoder::new().expect("as before").decode(&written, slices).expect("our own is readable");
    assert_eq!((again, &read), (*header, &batch));
}

/// A message of a move: the first byte says in which direction.
pub fn message(bytes: &[u8]) {
    let Some((&way, bytes)) = bytes.split_first() else { return };
    if way & 1 == 0 {
        if let Ok(frame) = Frame::decode(bytes) {
            assert_eq!(Frame::decode(&frame.encode()), Ok(frame));
        }
    } else if let Ok(answer) = decode_answer(bytes) {
        assert_eq!(decode_answer(&encode_answer(&answer)), Ok(answer));
    }
}

/// The certificate of a peer, or, after a first byte with its lowest bit set, the name alone.
pub fn name(bytes: &[u8]) {
    let Some((&how, bytes)) = bytes.split_first() else { return };
    let name = if how & 1 == 0 {
        NodeName::of_certificate(bytes).ok()
    } else {
        std::str::from_utf8(bytes).ok().and_then(|text| text.parse().ok())
    };
    if let Some(name) = name {
        assert_eq!(name.to_string().parse(), Ok(name));
    }
}
