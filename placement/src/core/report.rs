//! What a site tells the leader of itself.

use std::net::SocketAddr;

use flow::{GroupId, Prefix, SiteId};
use serde::{Deserialize, Serialize};

/// Groups in one report; more go into the next.
pub const REPORT_GROUPS_MAX: usize = 16_384;
/// Ways to clients, and as many to servers, in one report; more go into the next.
pub const REPORT_WAYS_MAX: usize = 8_192;
/// Server prefixes of one group in one report, those with the most handshakes.
pub const TALK_LEN_MAX: usize = 8;
/// Problems of a site that are told to those who ask.
pub const PROBLEMS_MAX: usize = 16;
/// Probes that one answer to a report may ask for.
pub const PROBES_MAX: usize = 64;

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
    /// Client sides of handshakes since the last report. At most [`REPORT_WAYS_MAX`] count.
    pub clients: Vec<ClientRtt>,
    /// Server sides of handshakes, and of probes, since the last report. At most [`REPORT_WAYS_MAX`] count.
    pub servers: Vec<ServerRtt>,
    /// Whom the clients of groups have talked to since the last report.
    pub talks: Vec<GroupTalk>,
    /// Probes per second that the site is willing to send; 0 for none.
    pub probes_per_s: u16,
    /// What keeps the site from being ready, by its own account. At most [`PROBLEMS_MAX`] are told.
    pub problems: Vec<String>,
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

/// Round trips from the owner to a group's clients and back (SYN-ACK to ACK).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClientRtt {
    /// The group.
    pub group: GroupId,
    /// Where these clients come in.
    pub ingress: SiteId,
    /// Handshakes.
    pub count: u32,
    /// The least, in microseconds.
    pub min_us: u32,
    /// Their mean, in microseconds.
    pub mean_us: u32,
}

/// Round trips from the reporting site to a server prefix and back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServerRtt {
    /// The server prefix.
    pub prefix: Prefix,
    /// Handshakes: where the answer came in, and went on to the owner from. Probes: nothing, the answer came to the site itself.
    #[serde(default)]
    pub ingress: Option<SiteId>,
    /// Handshakes or probes.
    pub count: u32,
    /// The least, in microseconds.
    pub min_us: u32,
    /// Their mean, in microseconds.
    pub mean_us: u32,
    /// A server that answered, and its port.
    #[serde(default)]
    pub answered: Option<SocketAddr>,
}

/// Whom the clients of a group talk to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupTalk {
    /// The group.
    pub group: GroupId,
    /// Server prefixes with their handshakes, most first. At most [`TALK_LEN_MAX`] count.
    pub servers: Vec<(Prefix, u32)>,
}

/// A server that a site is asked to measure, by the time in which it answers a TCP connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Probe {
    /// Its prefix: what the result is reported under.
    pub prefix: Prefix,
    /// Address and port.
    pub target: SocketAddr,
}
