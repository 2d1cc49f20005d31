//! The kept inputs of the fuzz targets, and what they were seeded with, are replayed.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use dataplane::control::codec::encode;
use dataplane::control::{Event, Request, Stats, VERSION};
use dataplane::packet;
use flow::steer::{Side, Tag};
use flow::{Epoch, MoveId, SiteId, WorkerId};

#[path = "../fuzz/replay.rs"]
mod replay;
#[path = "../fuzz/src/lib.rs"]
#[allow(unreachable_pub, reason = "the package of the fuzz targets exports it")]
mod targets;

use replay::{after, replay};

fn frame(protocol: u8, payload: &[u8]) -> Vec<u8> {
    packet::build_ip(Tag::Direct(Side::Inside, SiteId(1)), protocol, 0x6440_0005, 0xc000_0201, payload)
}

#[test]
fn no_kept_frame_is_misread_or_rewritten_wrongly() {
    let udp = frame(17, &[4, 210, 0, 53, 0, 12, 0, 0, 1, 2, 3, 4]);
    let tcp = frame(6, &[4, 210, 0, 80, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, 2, 32, 0, 0, 0, 0, 0]);
    let echo = frame(1, &[8, 0, 0, 0, 0, 5, 0, 1, 9, 9]);
    let error = frame(1, &[&[3, 1, 0, 0, 0, 0, 0, 0], &udp[packet::IP..]].concat());
    let echo_error = frame(1, &[&[11, 0, 0, 0, 0, 0, 0, 0], &echo[packet::IP..]].concat());
    let frames = [udp, tcp, echo, error, echo_error];
    let seeds: Vec<_> = frames.iter().flat_map(|frame| [after(3, frame), after(7, frame)]).collect();
    replay("packet", targets::packet, &seeds);
}

#[test]
fn no_kept_script_makes_the_worker_panic_or_send_what_is_wrong() {
    // Serve the group of the first clients, a packet out, one back, and the beginning of a move.
    let seeds = [
        vec![5, 2, 0, 0, 1, 0, 1, 1, 0, 4, 9, 2, 53],
        vec![5, 2, 0, 0, 1, 0, 1, 1, 2, 4, 9, 2, 80, 2, 5, 4, 0, 2, 5, 6, 0, 0, 2, 2, 1, 3, 0],
        vec![5, 9, 0, 0, 1, 2, 2, 0, 5, 13, 0, 0, 1, 0, 0, 0, 0, 0],
    ];
    replay("worker", targets::worker, &seeds);
}

#[test]
fn no_kept_control_message_is_misread() {
    let group = "1:100.64.0.0/24".parse().unwrap();
    let slices = flow::sample::service(64).unwrap();
    let upserts = flow::sample::flows(&slices, 3, 1);
    let batch = flow::Batch { removals: vec![(upserts[0].key, 9)], upserts };
    let requests = [
        Request::Hello { version: VERSION, site: SiteId(1) },
        Request::Status,
        Request::Serve { group, epoch: Epoch(1) },
        Request::Arm {
            group,
            move_id: MoveId(5),
            epoch: Epoch(2),
            target: SiteId(2),
            awaited: vec![SiteId(1), SiteId(3)],
            bound_us: 100_000,
            session: 1 << 16,
            credit: 9,
            again: true,
        },
        Request::Install { group, move_id: MoveId::local(1), sequence: 1, batch: batch.clone(), more: true },
    ];
    let events = [
        Event::Hello { version: VERSION, worker: WorkerId(1), capacity: 9, boot: 7 },
        Event::Stats(Box::new(Stats { busy: 0.5, ..Stats::default() })),
        Event::Records { group, move_id: MoveId(5), session: 7, round: 1, batch },
        Event::Refused { group, move_id: None, reason: "no".to_owned() },
    ];
    let mut seeds: Vec<_> = requests.iter().map(|request| after(3, &encode(request).unwrap())).collect();
    seeds.extend(events.iter().map(|event| after(200, &encode(event).unwrap())));
    replay("control", targets::control, &seeds);
}
