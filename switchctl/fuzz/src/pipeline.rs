//! The embedded switch's tables under a controller's messages and frames, against a plain search.

use switchctl::PortNo;
use switchctl::ofp::{self, FlowQuery, FlowStats, Message};
use switchctl::softswitch::packet::Packet;
use switchctl::softswitch::pipeline::Pipeline;

use super::mend_header;

/// Pieces of one script.
const PIECES_MAX: usize = 64;

/// A script of pieces, each a byte that says what it is, a byte of its length, and that many bytes: a message of the
/// controller or a frame.
pub fn switch(bytes: &[u8]) {
    let mut pipeline = Pipeline::default();
    let mut rest = bytes;
    for _ in 0..PIECES_MAX {
        let [kind, len, behind @ ..] = rest else { return };
        let (piece, behind) = behind.split_at(usize::from(*len).min(behind.len()));
        rest = behind;
        if kind & 1 == 0 {
            command(&mut pipeline, piece);
        } else {
            frame(&mut pipeline, piece, *kind);
        }
    }
}

fn command(pipeline: &mut Pipeline, piece: &[u8]) {
    let mut bytes = piece.to_vec();
    mend_header(&mut bytes);
    match ofp::decode(&bytes) {
        Ok((_, Message::FlowMod(change))) => {
            let allowed = pipeline.check(&change);
            let before = pipeline.len();
            assert_eq!(pipeline.apply(&change), allowed);
            assert!(allowed.is_ok() || pipeline.len() == before);
            assert_eq!(pipeline.flows(&FlowQuery::default()).len(), pipeline.len());
        }
        Ok((_, Message::PacketOut(out))) => {
            let mut packet = Packet::default();
            if packet.load(&out.bytes) {
                let _ = pipeline.packet_out(&mut packet, out.in_port, &out.actions, &mut emit);
            }
        }
        _ => {}
    }
}

fn emit(_: PortNo, packet: &mut Packet, key: u64) {
    let frame = packet.frame().to_vec();
    assert!(packet.encapsulated(key as u32).ends_with(&frame));
}

fn frame(pipeline: &mut Pipeline, piece: &[u8], kind: u8) {
    let mut packet = Packet::default();
    if !packet.load(piece) {
        return;
    }
    let (port, key) = (PortNo(u32::from(kind >> 1 & 7)), u64::from(kind >> 4));
    let words = packet.fields(port, key);
    let before = pipeline.flows(&FlowQuery::default());
    pipeline.process(&mut packet, port, key, &mut emit);
    let after = pipeline.flows(&FlowQuery::default());
    // Of the first table, which the packet came to as it was: one of those with the highest priority has counted it.
    let meets = |flow: &&FlowStats| {
        let matches = &flow.key.matches;
        let masked = words.iter().zip(matches.mask()).map(|(word, mask)| word & mask);
        flow.key.table == 0 && masked.eq(matches.value().iter().copied())
    };
    let best = before.iter().filter(meets).map(|flow| flow.key.priority).max();
    let counted = before.iter().zip(&after).filter(|(was, is)| was.packets != is.packets);
    let first = counted.map(|(was, _)| was.key).find(|key| key.table == 0);
    assert_eq!(first.map(|key| key.priority), best, "another rule than by a plain search");
}
