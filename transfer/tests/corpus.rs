//! The kept inputs of the fuzz targets, and what they were seeded with, are replayed.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

#[path = "../../dataplane/fuzz/replay.rs"]
mod replay;
#[path = "../fuzz/src/lib.rs"]
#[allow(unreachable_pub, reason = "the package of the fuzz targets exports it")]
mod targets;

use replay::{after, replay};

use flow::{Batch, Epoch, SiteId, Token};
use transfer::codec::{ChunkHeader, Encoder};
use transfer::core::ToSource;
use transfer::wire::{Frame, encode_answer};

#[test]
fn no_kept_chunk_is_misread() {
    let slices = flow::sample::service(64).unwrap();
    let header = ChunkHeader { group: "1:100.64.0.0/16".parse().unwrap(), epoch: Epoch(7), sequence: 3 };
    let mut seeds = Vec::new();
    for (count, predicted) in [(0, false), (1, true), (5, false), (30, true)] {
        let upserts = flow::sample::flows(&slices, count, 1);
        let removals = upserts.iter().step_by(3).map(|r| (r.key, r.version + 1)).collect();
        let mut batch = Batch { upserts, removals };
        let chunk =
            Encoder::new().unwrap().encode(&header, &mut batch, predicted.then_some(&slices)).unwrap();
        let how = if predicted { 4 } else { 0 };
        seeds.push(after(how, &chunk));
        let (head, body) = chunk.split_at(transfer::codec::HEADER_LEN);
        let columns = zstd::bulk::decompress(body, 1 << 16).unwrap();
        seeds.push(after(how | 3, &[head, &columns].concat()));
    }
    replay("chunk", targets::chunk, &seeds);
}

#[test]
fn no_kept_message_of_a_move_is_misread() {
    let token = Token { epoch: Epoch(3), flows: 5, digest: 0x1234_5678_9abc };
    let missing = vec![SiteId(2), SiteId(255)];
    let frames = [
        Frame::Offer { session: 1, flows: 1000, schemas: (1, 1) },
        Frame::Chunk { session: 1, sequence: 2, bytes: vec![7; 20] },
        Frame::Copied { session: 1, chunks: 3 },
        Frame::Handover { session: 1, chunks: 3, token, missing, precopy_us: 9, rounds: 2 },
    ];
    let answers = [
        ToSource::Accept { session: 1, next: 0 },
        ToSource::Refuse { reason: "no room".to_owned() },
        ToSource::Ack { session: 1, next: 2 },
        ToSource::Joined,
        ToSource::Mismatch { session: 1 },
        ToSource::Unknown,
    ];
    let mut seeds: Vec<_> = frames.iter().map(|frame| after(0, &frame.encode())).collect();
    seeds.extend(answers.iter().map(|answer| after(1, &encode_answer(answer))));
    replay("message", targets::message, &seeds);
}

#[test]
fn no_kept_certificate_or_name_is_misread() {
    let mut seeds = vec![after(1, b"limosa://c/site/ams"), after(1, b"limosa://prod-1/placement/3")];
    for uris in [&["limosa://c/site/ams"][..], &["limosa://c/placement/1", "https://example.org/"], &[]] {
        let mut params = rcgen::CertificateParams::new(vec!["limosa".to_owned()]).unwrap();
        for uri in uris {
            params.subject_alt_names.push(rcgen::SanType::URI((*uri).try_into().unwrap()));
        }
        let key = rcgen::KeyPair::generate().unwrap();
        seeds.push(after(0, params.self_signed(&key).unwrap().der()));
    }
    replay("name", targets::name, &seeds);
}
