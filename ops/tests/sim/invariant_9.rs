//! I9: counters add up, and what a worker keeps is bounded: whatever came in was sent, is held, was a marker, or was dropped for a
//! reason that is counted. Source: part 1.1, I8 (memory); docs/operations.md, the counters of a worker.

use dataplane::control::Counters;
use flow::{MoveId, SiteId, WorkerId};

use crate::site::PACE;
use crate::world::{Checked, Violation};

/// The last packet may go over by its own length: frames of the simulation are shorter.
const PACKET_LEN_MAX: u64 = 200;

pub(crate) fn check(site: SiteId, worker: WorkerId, counters: &Counters, hold_bytes_max: usize) -> Checked {
    let lost = counters.unaccounted();
    if lost != 0 {
        return Err(Violation::new(
            9,
            format!("worker {site}/{worker} has lost {lost} packets: {counters:?}"),
        ));
    }
    if counters.held_bytes_now > hold_bytes_max as u64 + PACKET_LEN_MAX {
        let what = format!("worker {site}/{worker} holds {} bytes", counters.held_bytes_now);
        return Err(Violation::new(9, what));
    }
    Ok(())
}

/// Records that a source has sent and does not know to be installed.
pub(crate) fn check_window(id: MoveId, records: u64) -> Checked {
    let most = (PACE.chunk_records * PACE.window_chunks) as u64;
    if records <= most {
        return Ok(());
    }
    Err(Violation::new(9, format!("move {id} has {records} records under way, more than {most}")))
}
