//! What a site tells the leader of itself.

use flow::{GroupId, SiteId};
use serde::{Deserialize, Serialize};

/// Groups in one report; more go into the next.
pub const REPORT_GROUPS_MAX: usize = 16_384;

/// A sign of life with loads and delays. Sent to the leader, a few times per lease.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SiteReport {
    /// Who reports.
    pub site: SiteId,
    /// Packets per second of all workers.
    pub packets_per_s: u64,
    /// Share of time that the busiest worker was not idle, 0 to 1.
    pub busy: f64,
    /// Loads of groups that the site owns; the others keep their last. At most [`REPORT_GROUPS_MAX`] count.
    pub groups: Vec<GroupReport>,
    /// Round trips to other sites.
    pub peers: Vec<PeerRtt>,
}

/// Load and delay of one group at its owner.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GroupReport {
    /// Which.
    pub group: GroupId,
    /// Packets per second, both directions.
    pub packets_per_s: u64,
    /// Flows.
    pub flows: u64,
    /// Bits per second, both directions.
    #[serde(default)]
    pub bits_per_s: u64,
    /// Packets from clients by the site where they came in; only their shares count.
    #[serde(default)]
    pub inside_ingress: Vec<(SiteId, u64)>,
    /// Packets from the world by the site where they came in; only their shares count.
    #[serde(default)]
    pub outside_ingress: Vec<(SiteId, u64)>,
    /// Mean round trip from the owner to the servers, in microseconds.
    #[serde(default)]
    pub remote_rtt_us: Option<u32>,
}

/// A measured round trip to another site.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerRtt {
    /// The other site.
    pub site: SiteId,
    /// Microseconds, there and back.
    pub rtt_us: u32,
}
