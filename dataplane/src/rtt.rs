//! Round trips read from TCP handshakes on the way: SYN to SYN-ACK for the remote side, SYN-ACK to ACK for
//! the client side. A retransmission makes a sample ambiguous, so it is left out (Karn's rule).

use std::collections::{BTreeMap, HashMap};

use flow::{Micros, Prefix};

use crate::control::{RoundTrip, server_prefix};
use crate::packet::tcp_flags::{ACK, RST, SYN};

/// Handshakes timed at once; more are not timed.
const HANDSHAKES_MAX: usize = 65_536;
/// Prefixes in one report; more are left out.
const PREFIXES_MAX: usize = 8_192;

#[derive(Clone, Copy, Debug)]
struct Handshake {
    syn: Micros,
    syn_ack: Option<Micros>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Sum {
    count: u32,
    min_us: u32,
    sum_us: u64,
}

/// Handshakes in hand, and round trips since the last report.
#[derive(Debug, Default)]
pub struct RoundTrips {
    open: HashMap<u32, Handshake>,
    sums: BTreeMap<(Prefix, bool), Sum>,
}

impl RoundTrips {
    /// The SYN of a new flow has passed; false when it is not timed.
    pub fn begin(&mut self, flow: u32, now: Micros) -> bool {
        if self.open.len() >= HANDSHAKES_MAX {
            return false;
        }
        self.open.insert(flow, Handshake { syn: now, syn_ack: None });
        true
    }

    /// The flow is gone.
    pub fn forget(&mut self, flow: u32) {
        self.open.remove(&flow);
    }

    /// A packet of a timed flow; true when its timing is over.
    pub fn packet(
        &mut self,
        flow: u32,
        inside: bool,
        flags: u8,
        group: Prefix,
        remote: u32,
        now: Micros,
    ) -> bool {
        let Some(handshake) = self.open.get_mut(&flow) else { return true };
        let Handshake { syn, syn_ack } = *handshake;
        match (inside, flags & (SYN | ACK), syn_ack) {
            (false, both, None) if both == SYN | ACK && flags & RST == 0 => {
                handshake.syn_ack = Some(now);
                let server = server_prefix(std::net::IpAddr::V4(remote.into()));
                if let Some(server) = server {
                    self.add(server, true, now.since(syn));
                }
                return false;
            }
            (true, ACK, Some(syn_ack)) if flags & RST == 0 => self.add(group, false, now.since(syn_ack)),
            // A second SYN or SYN-ACK, a reset, or data out of turn.
            _ => {}
        }
        self.open.remove(&flow);
        true
    }

    fn add(&mut self, prefix: Prefix, remote: bool, span: Micros) {
        let us = u32::try_from(span.0).unwrap_or(u32::MAX);
        if self.sums.len() >= PREFIXES_MAX && !self.sums.contains_key(&(prefix, remote)) {
            return;
        }
        let sum = self.sums.entry((prefix, remote)).or_insert(Sum { min_us: us, ..Sum::default() });
        sum.count = sum.count.saturating_add(1);
        sum.min_us = sum.min_us.min(us);
        sum.sum_us += u64::from(us);
    }

    /// What was seen since the last call.
    pub fn take(&mut self) -> Vec<RoundTrip> {
        let sums = std::mem::take(&mut self.sums);
        let mean = |sum: &Sum| u32::try_from(sum.sum_us / u64::from(sum.count.max(1))).unwrap_or(u32::MAX);
        sums.into_iter()
            .map(|((prefix, remote), sum)| RoundTrip {
                prefix,
                remote,
                count: sum.count,
                min_us: sum.min_us,
                mean_us: mean(&sum),
            })
            .collect()
    }
}
