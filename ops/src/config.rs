//! Configuration files, one per process. What is read (`Raw*`) becomes what is used only through validation, and an
//! error names the file, the key, the value and what would be right. Relative paths are relative to the file.

mod elastic;
mod openvswitch;
pub mod reference;

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use dataplane::dpdk::{Device, DpdkConfig, DpdkError, Idle, buffers_min, memory_min_mb};
use dataplane::process::Link;
use flow::{Prefix, SiteId, WorkerId};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use transfer::name::is_label;

use crate::address::Address;
use crate::files;
use crate::site::core::Bounds;
use crate::site::fleet::ElasticConfig;
use crate::site::prober::{self, ProbeSettings};
pub use openvswitch::{OpenVswitch, SwitchSettings};

/// Why a file is of no use.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// It cannot be read.
    #[error("{file}: cannot be read: {source}")]
    Read {
        /// The file.
        file: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Not TOML, an unknown key, or a value of the wrong type; the message has the line.
    #[error("{file}: {message}")]
    Parse {
        /// The file.
        file: PathBuf,
        /// Line, key, and what was expected.
        message: String,
    },
    /// A value that cannot work.
    #[error("{file}: {key} = {value:?}: {remedy}")]
    Value {
        /// The file.
        file: PathBuf,
        /// The key, dotted.
        key: String,
        /// What was given.
        value: String,
        /// What would be right.
        remedy: String,
    },
}

/// Bytes of the path of a socket: `sun_path` has 108, and the last is zero (unix(7)).
const SOCKET_PATH_LEN_MAX: usize = 107;

/// A file while it is validated.
struct File<'a> {
    path: &'a Path,
}

impl File<'_> {
    fn error(&self, key: &str, value: impl ToString, remedy: impl Into<String>) -> ConfigError {
        ConfigError::Value {
            file: self.path.to_owned(),
            key: key.to_owned(),
            value: value.to_string(),
            remedy: remedy.into(),
        }
    }

    fn beside(&self, path: &Path) -> PathBuf {
        self.path.parent().unwrap_or(Path::new(".")).join(path)
    }

    fn socket(&self, key: &str, path: &Path) -> Result<PathBuf, ConfigError> {
        self.short_enough(key, self.beside(path))
    }

    /// The path of a socket, if one can have it.
    fn short_enough(&self, key: &str, path: PathBuf) -> Result<PathBuf, ConfigError> {
        let len = path.as_os_str().len();
        if len > SOCKET_PATH_LEN_MAX {
            let remedy = format!(
                "a socket's path has at most {SOCKET_PATH_LEN_MAX} bytes, and this one {len}: use a shorter one"
            );
            return Err(self.error(key, path.display(), remedy));
        }
        Ok(path)
    }

    fn label(&self, key: &str, text: String) -> Result<String, ConfigError> {
        if is_label(&text) {
            return Ok(text);
        }
        Err(self.error(key, text, "use 1 to 63 of a-z, 0-9 and '-', not starting with '-'"))
    }

    fn existing(&self, key: &str, path: &Path, remedy: &str) -> Result<PathBuf, ConfigError> {
        let full = self.beside(path);
        match files::check(&full) {
            Ok(()) => Ok(full),
            Err(error) if error.kind() == ErrorKind::NotFound => Err(self.error(key, full.display(), remedy)),
            Err(error) => Err(self.error(key, full.display(), error.to_string())),
        }
    }

    fn bounded(&self, key: &str, value: u64, min: u64, max: u64) -> Result<u64, ConfigError> {
        if (min..=max).contains(&value) {
            return Ok(value);
        }
        Err(self.error(key, value, format!("use {min} to {max}")))
    }
}

fn read<T: DeserializeOwned>(path: &Path) -> Result<T, ConfigError> {
    let text =
        files::read_text(path).map_err(|source| ConfigError::Read { file: path.to_owned(), source })?;
    toml::from_str(&text)
        .map_err(|error| ConfigError::Parse { file: path.to_owned(), message: error.to_string() })
}

/// The keys of a table, as its type refuses any other.
#[cfg(test)]
fn fields<T: DeserializeOwned>() -> Vec<String> {
    let error =
        toml::from_str::<T>("no-such-key = 1").err().map(|error| error.to_string()).unwrap_or_default();
    let (_, expected) = error.split_once("expected ").expect("unknown keys are refused");
    expected.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

/// Key material of a node.
#[derive(Clone, Debug)]
pub struct Tls {
    /// The cluster that its certificate names.
    pub cluster: String,
    /// PEM chain, the node's own first.
    pub certificate: PathBuf,
    /// PEM key.
    pub key: PathBuf,
    /// PEM certificates that peers must chain to.
    pub authority: PathBuf,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTls {
    certificate: PathBuf,
    key: PathBuf,
    authority: PathBuf,
}

impl RawTls {
    fn validate(self, file: &File<'_>, cluster: &str) -> Result<Tls, ConfigError> {
        let remedy = "there is no such file; `limosa dev certs` makes certificates for trying out";
        Ok(Tls {
            cluster: cluster.to_owned(),
            certificate: file.existing("tls.certificate", &self.certificate, remedy)?,
            key: file.existing("tls.key", &self.key, remedy)?,
            authority: file.existing("tls.authority", &self.authority, remedy)?,
        })
    }
}

/// A placement node as others reach it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, serde::Serialize)]
#[serde(deny_unknown_fields)]
pub struct NodeAddress {
    /// Its number.
    pub id: u64,
    /// Where its QUIC is reached from here.
    pub address: Address,
}

fn nodes(file: &File<'_>, key: &str, nodes: Vec<NodeAddress>) -> Result<Vec<NodeAddress>, ConfigError> {
    if nodes.is_empty() {
        return Err(file.error(
            key,
            "[]",
            "name the placement nodes: [{ id = 1, address = \"192.0.2.1:4001\" }]",
        ));
    }
    let mut seen = BTreeSet::new();
    match nodes.iter().find(|node| !PLACEMENT_IDS.contains(&node.id) || !seen.insert(node.id)) {
        Some(node) => Err(file.error(key, node.id, "node ids start at 1 and are unique")),
        None => Ok(nodes),
    }
}

/// Numbers of placement nodes. TOML has no larger ones.
pub const PLACEMENT_IDS: RangeInclusive<u64> = 1..=i64::MAX as u64;

/// `limosa run placement`.
#[derive(Clone, Debug)]
pub struct PlacementConfig {
    /// This node.
    pub id: u64,
    /// Key material.
    pub tls: Tls,
    /// Where QUIC listens.
    pub listen: SocketAddr,
    /// Where the config API, metrics and health listen; loopback only, because it is not encrypted yet.
    pub api: SocketAddr,
    /// Where log and state live.
    pub directory: PathBuf,
    /// The other nodes.
    pub peers: Vec<NodeAddress>,
    /// A MaxMind DB with locations, if there is one.
    pub locations: Option<PathBuf>,
    /// Raft heartbeat in milliseconds; elections take 4 to 8 of them.
    pub heartbeat_ms: u64,
    /// How long a silent site counts as alive, in milliseconds.
    pub lease_ms: u64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawPlacement {
    cluster: String,
    id: u64,
    listen: SocketAddr,
    api: SocketAddr,
    directory: PathBuf,
    tls: RawTls,
    #[serde(default)]
    peers: Vec<NodeAddress>,
    locations: Option<PathBuf>,
    heartbeat_ms: Option<u64>,
    lease_ms: Option<u64>,
}

/// A quarter of a second: above the round trip between most places of the earth.
const HEARTBEAT_MS: u64 = 250;
/// What an election takes, at least and at most.
pub(crate) const ELECTION_HEARTBEATS: [u32; 2] = [4, 8];
/// Six seconds: when a leader dies, an election (up to two) and a report that still waits for the dead one (two more) must
/// fit, or the next leader takes living sites for dead.
const LEASE_MS: u64 = 6_000;

impl PlacementConfig {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let raw: RawPlacement = read(path)?;
        let file = File { path };
        let cluster = file.label("cluster", raw.cluster)?;
        if !PLACEMENT_IDS.contains(&raw.id) {
            return Err(file.error("id", raw.id, "node ids start at 1"));
        }
        if raw.peers.iter().any(|peer| peer.id == raw.id) {
            return Err(file.error("peers", raw.id, "peers are the other nodes; leave this one out"));
        }
        let locations = "there is no such file; leave the key out to go without locations";
        let heartbeat_ms =
            file.bounded("heartbeat_ms", raw.heartbeat_ms.unwrap_or(HEARTBEAT_MS), 20, 5_000)?;
        let lease_ms = file.bounded("lease_ms", raw.lease_ms.unwrap_or(LEASE_MS), 500, 600_000)?;
        let election_ms = u64::from(ELECTION_HEARTBEATS[1]) * heartbeat_ms;
        if lease_ms <= election_ms {
            let remedy = format!(
                "use more than {election_ms}, the longest election with heartbeat_ms = {heartbeat_ms}, or the next leader takes \
                 living sites for dead"
            );
            return Err(file.error("lease_ms", lease_ms, remedy));
        }
        Ok(Self {
            id: raw.id,
            tls: raw.tls.validate(&file, &cluster)?,
            listen: raw.listen,
            api: loopback(&file, "api", raw.api)?,
            directory: file.beside(&raw.directory),
            peers: if raw.peers.is_empty() { raw.peers } else { nodes(&file, "peers", raw.peers)? },
            locations: raw.locations.map(|path| file.existing("locations", &path, locations)).transpose()?,
            heartbeat_ms,
            lease_ms,
        })
    }
}

fn loopback(file: &File<'_>, key: &str, address: SocketAddr) -> Result<SocketAddr, ConfigError> {
    if address.ip().is_loopback() {
        return Ok(address);
    }
    let remedy =
        "this listener has no encryption yet: use 127.0.0.1 or [::1] and reach it through SSH or a proxy";
    Err(file.error(key, address, remedy))
}

/// `limosa run site`.
#[derive(Clone, Debug)]
pub struct SiteConfig {
    /// The site's number.
    pub site: SiteId,
    /// Its name, as its certificate says.
    pub name: String,
    /// Key material.
    pub tls: Tls,
    /// Where QUIC listens.
    pub listen: SocketAddr,
    /// Where metrics and health listen.
    pub metrics: SocketAddr,
    /// Placement nodes, nearest first.
    pub placement: Vec<NodeAddress>,
    /// The other sites: number, name, and where their QUIC is reached from here.
    pub peers: Vec<Peer>,
    /// The switch.
    pub switch: SwitchSettings,
    /// Directory with the workers' control sockets, `worker-N.control`.
    pub workers: PathBuf,
    /// Workers that should be there.
    pub expected: Vec<WorkerId>,
    /// Workers that the switch has ports for.
    pub worker_ports: Vec<WorkerId>,
    /// When and how workers are started and stopped, if the agent is to.
    pub elastic: Option<ElasticConfig>,
    /// Bounds of the move protocol.
    pub bounds: Bounds,
    /// Bytes per second that moves from here may use.
    pub rate_bytes_per_s: u64,
    /// Which servers may be measured from here, and how often; `None` for none.
    pub probe: Option<ProbeSettings>,
}

/// Another site.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, serde::Serialize)]
#[serde(deny_unknown_fields)]
pub struct Peer {
    /// Its number.
    pub site: SiteId,
    /// Its name.
    pub name: String,
    /// Where its QUIC is reached from here.
    pub address: Address,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawSite {
    cluster: String,
    site: SiteId,
    name: String,
    listen: SocketAddr,
    metrics: SocketAddr,
    switch: String,
    openvswitch: Option<openvswitch::RawOpenVswitch>,
    tls: RawTls,
    placement: Vec<NodeAddress>,
    #[serde(default)]
    peers: Vec<Peer>,
    workers: RawWorkers,
    #[serde(default)]
    moves: RawMoves,
    #[serde(default)]
    probe: RawProbe,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawWorkers {
    directory: PathBuf,
    expected: Vec<WorkerId>,
    ports: Option<Vec<WorkerId>>,
    elastic: Option<elastic::RawElastic>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawMoves {
    marker_ms: Option<u64>,
    take_back_ms: Option<u64>,
    cut_ms: Option<u64>,
    late_ms: Option<u64>,
    relay_ms: Option<u64>,
    relay_late_ms: Option<u64>,
    rate_mbit_per_s: Option<u64>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawProbe {
    #[serde(default)]
    enabled: bool,
    per_second: Option<u64>,
    #[serde(default)]
    networks: Vec<Prefix>,
}

impl RawProbe {
    /// Off unless enabled; what is given is checked all the same.
    fn validate(self, file: &File<'_>) -> Result<Option<ProbeSettings>, ConfigError> {
        let per_second = self.per_second.unwrap_or(prober::PER_SECOND.into());
        let per_second =
            file.bounded("probe.per_second", per_second, 1, prober::PER_SECOND_MAX.into())? as u16;
        if self.networks.len() > prober::NETWORKS_MAX {
            let remedy = format!("give at most {} networks, or none to allow any", prober::NETWORKS_MAX);
            return Err(file.error("probe.networks", format!("{} of them", self.networks.len()), remedy));
        }
        Ok(self.enabled.then_some(ProbeSettings { per_second, networks: self.networks }))
    }
}

/// A tenth of a 10 Gbit/s link.
const RATE_MBIT_PER_S: u64 = 1_000;

impl SiteConfig {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let raw: RawSite = read(path)?;
        let file = File { path };
        let cluster = file.label("cluster", raw.cluster)?;
        if raw.workers.expected.is_empty() {
            return Err(file.error("workers.expected", "[]", "name at least one worker, for example [1]"));
        }
        let ports = raw.workers.ports.unwrap_or_else(|| raw.workers.expected.clone());
        if let Some(worker) = raw.workers.expected.iter().find(|worker| !ports.contains(worker)) {
            return Err(file.error(
                "workers.ports",
                worker,
                "every expected worker needs a port of the switch",
            ));
        }
        let elastic = raw.workers.elastic.map(|raw| raw.validate(&file, &ports)).transpose()?;
        let bounds = raw.moves.bounds(&file)?;
        let rate = raw.moves.rate_mbit_per_s.unwrap_or(RATE_MBIT_PER_S);
        let tls = raw.tls.validate(&file, &cluster)?;
        let peers = peers(&file, raw.site, raw.peers)?;
        let site = openvswitch::Site { file: &file, tls: &tls, peers: &peers, worker_ports: &ports };
        let switch = site.switch(&raw.switch, raw.openvswitch)?;
        let workers = file.beside(&raw.workers.directory);
        // No name of a socket there is longer.
        file.short_enough("workers.directory", control_path(&workers, WorkerId(u16::MAX)))?;
        Ok(Self {
            site: raw.site,
            name: file.label("name", raw.name)?,
            tls,
            listen: raw.listen,
            metrics: loopback(&file, "metrics", raw.metrics)?,
            placement: nodes(&file, "placement", raw.placement)?,
            peers,
            switch,
            workers,
            expected: raw.workers.expected,
            worker_ports: ports,
            elastic,
            bounds,
            rate_bytes_per_s: file.bounded("moves.rate_mbit_per_s", rate, 1, 400_000)? * 125_000,
            probe: raw.probe.validate(&file)?,
        })
    }
}

fn peers(file: &File<'_>, own: SiteId, peers: Vec<Peer>) -> Result<Vec<Peer>, ConfigError> {
    let mut seen = BTreeSet::from([own]);
    for peer in &peers {
        file.label("peers.name", peer.name.clone())?;
        if !seen.insert(peer.site) {
            return Err(file.error("peers.site", peer.site, "peers are the other sites, each once"));
        }
    }
    Ok(peers)
}

/// Four probes, the shortest silence that is not just a lost packet.
const TAKE_BACK_MS_MIN: u64 = 1_000;
/// Beyond, packets would be lost for longer than any peer waits.
const TAKE_BACK_MS_MAX: u64 = 60_000;

impl RawMoves {
    fn bounds(&self, file: &File<'_>) -> Result<Bounds, ConfigError> {
        let default = Bounds::default();
        let bound = |key: &str, ms: Option<u64>, default_us: u64, max_ms: u64| {
            file.bounded(key, ms.unwrap_or(default_us / 1_000), 1, max_ms).map(|ms| ms * 1_000)
        };
        let relay_us = bound("moves.relay_ms", self.relay_ms, default.relay_us, 600_000)?;
        let late_us = default.relay_late_us.max(relay_us);
        let bounds = Bounds {
            take_back_us: self.take_back_us(file, default.take_back_us)?,
            marker_us: bound("moves.marker_ms", self.marker_ms, default.marker_us, 60_000)?,
            cut_us: bound("moves.cut_ms", self.cut_ms, default.cut_us, 60_000)?,
            late_us: bound("moves.late_ms", self.late_ms, default.late_us, 60_000)?,
            relay_us,
            relay_late_us: bound("moves.relay_late_ms", self.relay_late_ms, late_us, 3_600_000)?,
            pace: default.pace,
        };
        self.check_order(file, &bounds)?;
        Ok(bounds)
    }

    fn take_back_us(&self, file: &File<'_>, default_us: u64) -> Result<u64, ConfigError> {
        let ms = self.take_back_ms.unwrap_or(default_us / 1_000);
        let (least, most) = (TAKE_BACK_MS_MIN, TAKE_BACK_MS_MAX);
        Ok(file.bounded("moves.take_back_ms", ms, least, most)? * 1_000)
    }

    /// Bounds that depend on one another: an old owner that relays for less time than an ingress may be late drops what that still
    /// sends. `take_back_ms` depends on none of them: it counts the silence of a target, which says four times a second that it is there
    /// whatever it waits for itself; and a group that is in a move is given to nobody else when a lease ends (`lease_ms`).
    fn check_order(&self, file: &File<'_>, bounds: &Bounds) -> Result<(), ConfigError> {
        let ms = |us: u64| us / 1_000;
        let longest = bounds.marker_us.max(bounds.cut_us).max(bounds.late_us);
        if bounds.relay_us < longest {
            let right = format!(
                "at least {} ms, the longest of marker_ms, cut_ms and late_ms: until then packets may come by an old path",
                ms(longest)
            );
            return Err(file.error("moves.relay_ms", ms(bounds.relay_us), &right));
        }
        if bounds.relay_late_us < bounds.relay_us {
            let right = format!("at least relay_ms, {} ms: it takes its place", ms(bounds.relay_us));
            return Err(file.error("moves.relay_late_ms", ms(bounds.relay_late_us), &right));
        }
        if bounds.cut_us > bounds.marker_us {
            let right = format!(
                "at most marker_ms, {} ms: the cut takes one way, a marker two",
                ms(bounds.marker_us)
            );
            return Err(file.error("moves.cut_ms", ms(bounds.cut_us), &right));
        }
        Ok(())
    }
}

/// `limosa run worker`.
#[derive(Clone, Debug)]
pub struct WorkerConfig {
    /// For the worker itself.
    pub worker: dataplane::process::WorkerConfig,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawWorker {
    site: SiteId,
    worker: WorkerId,
    directory: PathBuf,
    switch: Option<PathBuf>,
    flows: Option<usize>,
    hold_packets: Option<usize>,
    hold_mb: Option<u64>,
    dpdk: Option<RawDpdk>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawDpdk {
    device: Option<String>,
    pci: Option<String>,
    lcore: Option<usize>,
    huge_pages: Option<bool>,
    memory_mb: Option<u32>,
    idle: Option<String>,
    mtu: Option<u16>,
    buffers: Option<u32>,
    rx_descriptors: Option<u16>,
    tx_descriptors: Option<u16>,
    #[serde(default)]
    eal: Vec<String>,
}

/// A million flows take about 100 MiB.
const FLOWS: usize = 1 << 20;
/// 64 Ki packets: 300 ms at 200,000 packets per second.
const HOLD_PACKETS: usize = 1 << 16;
/// Memory of held packets: 64 Ki of some 1,000 bytes open holds early, as many again may come back from sources.
const HOLD_MB: u64 = 128;
/// Each has a buffer of full length over DPDK: with 16 Ki packets, and those that may go over, some 200 MiB.
const DPDK_HOLD_PACKETS: usize = 1 << 14;
/// Packets that a device may hold in each direction.
const DESCRIPTORS: u16 = 1_024;
/// Longest frame of a worker without its header.
const MTU_MAX: u64 = 9_198;
/// A tebibyte: more is a slip of a unit.
const DPDK_MEMORY_MB_MAX: u64 = 1 << 20;
/// Four times as many as packets can be held.
const DPDK_BUFFERS_MAX: u64 = 1 << 24;
/// The largest number of a processor that builds of DPDK know.
const LCORE_MAX: u64 = 1_023;
/// Arguments of DPDK that are set by other keys, and one that would end the process.
const EAL_OWN: [(&str, &str); 13] = [
    ("-l", "lcore"),
    ("-c", "lcore"),
    ("--lcores", "lcore"),
    ("-m", "memory_mb"),
    ("--no-huge", "huge_pages"),
    ("--in-memory", "huge_pages"),
    ("-a", "pci"),
    ("--allow", "pci"),
    ("--no-pci", "pci"),
    ("--vdev", "device"),
    ("--file-prefix", "huge_pages"),
    ("-h", ""),
    ("--help", ""),
];

impl WorkerConfig {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let raw: RawWorker = read(path)?;
        let file = File { path };
        let flows = raw.flows.unwrap_or(FLOWS);
        file.bounded("flows", flows as u64, 1_024, 1 << 28)?;
        let hold = match raw.dpdk {
            Some(_) => raw.hold_packets.unwrap_or(DPDK_HOLD_PACKETS),
            None => raw.hold_packets.unwrap_or(HOLD_PACKETS),
        };
        file.bounded("hold_packets", hold as u64, 32, 1 << 22)?;
        let hold_mb = file.bounded("hold_mb", raw.hold_mb.unwrap_or(HOLD_MB), 1, 1 << 16)?;
        let link = match (raw.switch, raw.dpdk) {
            (Some(path), None) => Link::Socket(file.socket("switch", &path)?),
            (None, Some(dpdk)) => {
                let link = Link::Dpdk(dpdk.validate(&file, hold)?);
                if !dataplane::dpdk::BUILT {
                    return Err(file.error("dpdk", "a table", DpdkError::NotBuilt.to_string()));
                }
                link
            }
            (Some(path), Some(_)) => {
                let remedy = "a worker has one way to its switch: either this socket or the table [dpdk]";
                return Err(file.error("switch", path.display(), remedy));
            }
            (None, None) => {
                let remedy = "name the switch's socket for this worker, or add a table [dpdk] with a device";
                return Err(file.error("switch", "", remedy));
            }
        };
        let directory = file.beside(&raw.directory);
        Ok(Self {
            worker: dataplane::process::WorkerConfig {
                site: raw.site,
                worker: raw.worker,
                control_path: file.short_enough("directory", control_path(&directory, raw.worker))?,
                link,
                flow_capacity: flows,
                hold_packets_max: hold,
                hold_bytes_max: usize::try_from(hold_mb << 20).unwrap_or(usize::MAX),
            },
        })
    }
}

impl WorkerConfig {
    /// Paths of the sockets that the worker makes.
    pub fn sockets(&self) -> impl Iterator<Item = &Path> {
        let device = match &self.worker.link {
            Link::Dpdk(DpdkConfig { device: Device::Virtual(text), .. }) => server_path(text),
            Link::Dpdk(_) | Link::Socket(_) => None,
        };
        std::iter::once(self.worker.control_path.as_path()).chain(device)
    }
}

/// The socket on which a virtual device waits for the switch to connect.
fn server_path(device: &str) -> Option<&Path> {
    let argument =
        |key| device.split(',').filter_map(|part| part.split_once('=')).find(|(name, _)| *name == key);
    argument("server")
        .filter(|(_, value)| *value == "1")
        .and(argument("path"))
        .map(|(_, path)| Path::new(path))
}

impl RawDpdk {
    fn validate(self, file: &File<'_>, hold_packets: usize) -> Result<DpdkConfig, ConfigError> {
        let mtu = self.mtu.unwrap_or(1_500);
        file.bounded("dpdk.mtu", mtu.into(), 576, MTU_MAX)?;
        let least = buffers_min(u32::try_from(hold_packets).unwrap_or(u32::MAX));
        let buffers = self.buffers.unwrap_or(least);
        if buffers < least {
            let remedy =
                format!("hold_packets = {hold_packets} needs {least} or more; lower that, or raise this");
            return Err(file.error("dpdk.buffers", buffers, remedy));
        }
        file.bounded("dpdk.buffers", buffers.into(), least.into(), DPDK_BUFFERS_MAX)?;
        let least = memory_min_mb(buffers, mtu);
        let memory_mb = self.memory_mb.unwrap_or(least.saturating_add(64));
        if memory_mb < least {
            let remedy = format!("{buffers} buffers need {least} or more; lower hold_packets, or raise this");
            return Err(file.error("dpdk.memory_mb", memory_mb, remedy));
        }
        file.bounded("dpdk.memory_mb", memory_mb.into(), least.into(), DPDK_MEMORY_MB_MAX)?;
        if let Some(lcore) = self.lcore {
            file.bounded("dpdk.lcore", lcore as u64, 0, LCORE_MAX)?;
        }
        let descriptors = |key: &str, value: Option<u16>| {
            let value = value.unwrap_or(DESCRIPTORS);
            file.bounded(key, value.into(), 32, 2_048).map(|_| value)
        };
        let idle = match self.idle.as_deref() {
            None | Some("backoff") => Idle::Backoff,
            Some("spin") => Idle::Spin,
            Some(other) => return Err(file.error("dpdk.idle", other, "use \"spin\" or \"backoff\"")),
        };
        for argument in &self.eal {
            let name = argument.split('=').next().unwrap_or_default();
            if let Some((_, key)) = EAL_OWN.iter().find(|(own, _)| *own == name) {
                let remedy = match *key {
                    "" => "leave it out: DPDK would end the process".to_owned(),
                    key => format!("leave it out: the key dpdk.{key} sets it"),
                };
                return Err(file.error("dpdk.eal", argument, remedy));
            }
        }
        Ok(DpdkConfig {
            device: dpdk_device(file, self.device, self.pci)?,
            lcore: self.lcore,
            huge_pages: self.huge_pages.unwrap_or(true),
            memory_mb,
            idle,
            mtu,
            buffers,
            rx_descriptors: descriptors("dpdk.rx_descriptors", self.rx_descriptors)?,
            tx_descriptors: descriptors("dpdk.tx_descriptors", self.tx_descriptors)?,
            eal: self.eal,
        })
    }
}

/// Exactly one of the two keys, in the form that DPDK wants.
fn dpdk_device(file: &File<'_>, device: Option<String>, pci: Option<String>) -> Result<Device, ConfigError> {
    match (device, pci) {
        (Some(text), None) => virtual_device(file, text).map(Device::Virtual),
        (None, Some(address)) if is_pci_address(&address) => Ok(Device::Pci(address)),
        (None, Some(address)) => {
            Err(file.error("dpdk.pci", address, "use domain:bus:device.function, such as \"0000:3b:00.1\""))
        }
        (Some(text), Some(_)) => {
            Err(file.error("dpdk.device", text, "a worker has one device: leave out this key or dpdk.pci"))
        }
        (None, None) => {
            let remedy =
                "name a device, such as \"net_af_packet0,iface=eth1\", or the address of one as dpdk.pci";
            Err(file.error("dpdk.device", "", remedy))
        }
    }
}

/// Drivers of virtual devices, and the argument that each cannot go without.
const DRIVERS: [(&str, &str); 9] = [
    ("net_virtio_user", "path"),
    ("net_af_packet", "iface"),
    ("net_af_xdp", "iface"),
    ("net_tap", ""),
    ("net_memif", "role"),
    ("net_vhost", "iface"),
    ("net_null", ""),
    ("net_ring", ""),
    ("net_pcap", ""),
];

fn virtual_device(file: &File<'_>, text: String) -> Result<String, ConfigError> {
    let mut parts = text.split(',');
    let name = parts.next().unwrap_or_default();
    let driver = name.trim_end_matches(|letter: char| letter.is_ascii_digit());
    let Some((_, needed)) = DRIVERS.iter().find(|(known, _)| *known == driver && name != driver) else {
        let known: Vec<_> = DRIVERS.iter().map(|(name, _)| *name).collect();
        let remedy =
            format!("use a driver and a number, then key=value pairs; drivers: {}", known.join(", "));
        return Err(file.error("dpdk.device", text, remedy));
    };
    if !needed.is_empty() && !parts.any(|part| part.split_once('=').is_some_and(|(key, _)| key == *needed)) {
        let remedy = format!("{driver} needs {needed}=, as in \"{name},{needed}=...\"");
        return Err(file.error("dpdk.device", text, remedy));
    }
    Ok(text)
}

fn is_pci_address(text: &str) -> bool {
    let is_hex = |part: &str, len| part.len() == len && part.chars().all(|letter| letter.is_ascii_hexdigit());
    let mut parts = text.splitn(3, ':');
    let (domain, bus, rest) =
        (parts.next(), parts.next(), parts.next().and_then(|rest| rest.split_once('.')));
    domain.is_some_and(|part| is_hex(part, 4))
        && bus.is_some_and(|part| is_hex(part, 2))
        && rest.is_some_and(|(device, function)| is_hex(device, 2) && is_hex(function, 1))
}

/// The control socket of a worker, by convention.
#[must_use]
pub fn control_path(directory: &Path, worker: WorkerId) -> PathBuf {
    directory.join(format!("worker-{worker}.control"))
}

/// `limosa run switch`.
#[derive(Clone, Debug)]
pub struct SwitchConfig {
    /// For the switch itself.
    pub switch: switchctl::softswitch::SwitchConfig,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawSwitch {
    site: SiteId,
    name: String,
    control: PathBuf,
    inside: PathBuf,
    outside: PathBuf,
    /// Directory of the workers' packet sockets, `worker-N.packets`.
    directory: PathBuf,
    workers: Vec<WorkerId>,
    #[serde(default)]
    tunnels: Vec<RawTunnel>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTunnel {
    site: SiteId,
    local: SocketAddr,
    remote: SocketAddr,
}

/// The packet socket of a worker, by convention.
#[must_use]
pub fn packets_path(directory: &Path, worker: WorkerId) -> PathBuf {
    directory.join(format!("worker-{worker}.packets"))
}

impl SwitchConfig {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        use switchctl::softswitch::{PortConfig, PortKind, QUEUE_FRAMES};
        use switchctl::{PortNo, Ports};
        let raw: RawSwitch = read(path)?;
        let file = File { path };
        let mut seen = BTreeSet::from([raw.site]);
        if let Some(tunnel) = raw.tunnels.iter().find(|tunnel| !seen.insert(tunnel.site)) {
            return Err(file.error(
                "tunnels.site",
                tunnel.site,
                "tunnels lead to the other sites, each once",
            ));
        }
        let mut workers = BTreeSet::new();
        if let Some(worker) = raw.workers.iter().find(|worker| !workers.insert(**worker)) {
            return Err(file.error("workers", worker, "name each worker once"));
        }
        let directory = file.beside(&raw.directory);
        let port = |number: PortNo, name: String, kind| PortConfig { number, name, kind };
        let socket = |key, path: &Path| Ok(PortKind::Socket { path: file.socket(key, path)? });
        let mut ports = vec![
            port(Ports::INSIDE, "inside".into(), socket("inside", &raw.inside)?),
            port(Ports::OUTSIDE, "outside".into(), socket("outside", &raw.outside)?),
        ];
        for &worker in &raw.workers {
            let path = file.short_enough("directory", packets_path(&directory, worker))?;
            ports.push(port(Ports::worker(worker), format!("worker-{worker}"), PortKind::Socket { path }));
        }
        ports.extend(raw.tunnels.iter().map(|tunnel| {
            let kind = PortKind::Tunnel { local: tunnel.local, remote: tunnel.remote };
            port(Ports::tunnel(tunnel.site), format!("tunnel-{}", tunnel.site), kind)
        }));
        let name = file.label("name", raw.name)?;
        let control = file.socket("control", &raw.control)?;
        Ok(Self {
            switch: switchctl::softswitch::SwitchConfig {
                site: raw.site,
                name,
                control,
                control_tcp: None,
                ports,
                queue_frames: QUEUE_FRAMES,
            },
        })
    }
}

impl SwitchConfig {
    /// Paths of the sockets that the switch makes.
    pub fn sockets(&self) -> impl Iterator<Item = &Path> {
        use switchctl::softswitch::PortKind;
        let ports = self.switch.ports.iter().filter_map(|port| match &port.kind {
            PortKind::Socket { path } => Some(path.as_path()),
            PortKind::Tunnel { .. } => None,
        });
        std::iter::once(self.switch.control.as_path()).chain(ports)
    }

    /// Where the frames of its tunnels come in.
    pub fn tunnels(&self) -> impl Iterator<Item = SocketAddr> {
        use switchctl::softswitch::PortKind;
        self.switch.ports.iter().filter_map(|port| match port.kind {
            PortKind::Tunnel { local, .. } => Some(local),
            PortKind::Socket { .. } => None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_socket_of_a_device_that_waits_is_the_workers_own() {
        let path = |text| server_path(text).and_then(Path::to_str);
        assert_eq!(path("net_virtio_user0,path=/run/w1,server=1,queues=1"), Some("/run/w1"));
        assert_eq!(path("net_virtio_user0,path=/run/w1"), None);
        assert_eq!(path("net_af_packet0,iface=eth1"), None);
    }

    fn written(text: &str) -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        for name in ["c.pem", "k.pem", "a.pem"] {
            std::fs::write(directory.path().join(name), "").unwrap();
        }
        let path = directory.path().join("site.toml");
        std::fs::write(&path, text).unwrap();
        (directory, path)
    }

    const SITE: &str = r#"
        cluster = "c"
        site = 1
        name = "ams"
        listen = "127.0.0.1:4001"
        metrics = "127.0.0.1:9001"
        switch = "switch.control"
        tls = { certificate = "c.pem", key = "k.pem", authority = "a.pem" }
        placement = [{ id = 1, address = "127.0.0.1:4000" }]
        workers = { directory = "workers", expected = [1, 2] }
    "#;

    fn site_error(from: &str, to: &str) -> String {
        assert!(SITE.contains(from));
        let (_directory, path) = written(&SITE.replace(from, to));
        SiteConfig::read(&path).unwrap_err().to_string()
    }

    #[test]
    fn a_good_file_is_read_with_its_defaults() {
        let (directory, path) = written(SITE);
        let config = SiteConfig::read(&path).unwrap();
        assert_eq!(config.bounds, Bounds::default());
        assert_eq!(config.worker_ports, [WorkerId(1), WorkerId(2)]);
        let path = directory.path().join("switch.control");
        assert_eq!(config.switch.address.to_string(), format!("unix:{}", path.display()));
        assert_eq!(config.switch.in_force, switchctl::InForce::Barrier);
    }

    #[test]
    fn bounds_of_moves_that_depend_on_one_another_are_in_their_order() {
        let with = |moves: &str| site_error("site = 1", &format!("site = 1\n{moves}"));
        for longest in ["marker_ms", "late_ms"] {
            let error = with(&format!("moves = {{ {longest} = 3000, relay_ms = 2999 }}"));
            assert!(error.contains("moves.relay_ms") && error.contains("2999"), "{error}");
            assert!(error.contains("at least 3000 ms"), "{error}");
        }
        let error = with("moves = { relay_ms = 20000, relay_late_ms = 19999 }");
        assert!(
            error.contains("moves.relay_late_ms") && error.contains("at least relay_ms, 20000 ms"),
            "{error}"
        );
        let error = with("moves = { marker_ms = 600, cut_ms = 601 }");
        assert!(error.contains("moves.cut_ms") && error.contains("at most marker_ms, 600 ms"), "{error}");
        for right in [
            "moves = { marker_ms = 3000, late_ms = 3000, cut_ms = 3000, relay_ms = 3000 }",
            "moves = { marker_ms = 500 }",
            "moves = { relay_ms = 600000 }",
        ] {
            let (_directory, path) = written(&SITE.replace("site = 1", &format!("site = 1\n{right}")));
            SiteConfig::read(&path).unwrap();
        }
    }

    #[test]
    fn a_lease_outlasts_the_longest_election() {
        let read = |keys: &str| {
            let text = "cluster = \"c\"\nid = 1\nlisten = \"127.0.0.1:4000\"\napi = \"127.0.0.1:9000\"\ndirectory = \"d\"\n";
            let tls = "tls = { certificate = \"c.pem\", key = \"k.pem\", authority = \"a.pem\" }\n";
            let (_directory, path) = written(&format!("{text}{tls}{keys}"));
            PlacementConfig::read(&path).map(|config| config.lease_ms).map_err(|error| error.to_string())
        };
        assert_eq!(read("heartbeat_ms = 700\n"), Ok(6_000));
        assert_eq!(read("heartbeat_ms = 100\nlease_ms = 801\n"), Ok(801));
        let short = read("heartbeat_ms = 1000\n").unwrap_err();
        assert!(short.contains("lease_ms = \"6000\": use more than 8000"), "{short}");
    }

    #[test]
    fn other_nodes_may_be_named_by_host() {
        let text = SITE.replace("127.0.0.1:4000", "localhost:4000");
        let peer = "[[peers]]\nsite = 2\nname = \"fra\"\naddress = \"fra.example.net:4001\"\n";
        let (_directory, path) = written(&format!("{text}{peer}"));
        let config = SiteConfig::read(&path).unwrap();
        assert_eq!(config.placement[0].address.to_string(), "localhost:4000");
        assert_eq!(config.peers[0].address.to_string(), "fra.example.net:4001");
    }

    #[test]
    fn probes_are_off_unless_enabled_and_their_rate_is_bounded() {
        let config = |table: &str| {
            let (_directory, path) = written(&format!("{SITE}{table}"));
            SiteConfig::read(&path).map(|config| config.probe).map_err(|error| error.to_string())
        };
        assert_eq!(config(""), Ok(None));
        assert_eq!(config("[probe]\nper_second = 5\n"), Ok(None));
        let any = ProbeSettings { per_second: prober::PER_SECOND, networks: vec![] };
        assert_eq!(config("[probe]\nenabled = true\n"), Ok(Some(any)));
        let some = config("[probe]\nenabled = true\nper_second = 5\nnetworks = [\"203.0.113.0/24\"]\n");
        let networks = vec!["203.0.113.0/24".parse().unwrap()];
        assert_eq!(some, Ok(Some(ProbeSettings { per_second: 5, networks })));
        let wrong = config("[probe]\nper_second = 1000\n").unwrap_err();
        assert!(wrong.contains("probe.per_second = \"1000\": use 1 to 100"), "{wrong}");
    }

    #[test]
    fn a_path_that_no_socket_can_have_is_refused_with_its_key_wherever_it_is_named() {
        let long = "s".repeat(200);
        let remedy = "a socket's path has at most 107 bytes, and this one 2";
        let switch = site_error("switch.control", &long);
        assert!(switch.contains("switch = \"") && switch.contains(remedy), "{switch}");
        let workers = site_error("\"workers\"", &format!("{long:?}"));
        assert!(workers.contains("workers.directory = \"") && workers.contains(remedy), "{workers}");
        let socket = worker(&format!("switch = {long:?}\n")).unwrap_err();
        assert!(socket.contains("switch = \"") && socket.contains(remedy), "{socket}");
        let names = ["control", "inside", "outside", "directory"];
        for bad in names {
            let value = |key| if key == bad { long.as_str() } else { key };
            let keys = names.map(|key| format!("{key} = {:?}\n", value(key))).concat();
            let (_directory, path) = written(&format!("site = 1\nname = \"ams\"\nworkers = [1]\n{keys}"));
            let error = SwitchConfig::read(&path).unwrap_err().to_string();
            assert!(error.contains(&format!("{bad} = \"")) && error.contains(remedy), "{error}");
        }
    }

    #[test]
    fn errors_name_file_key_value_and_remedy() {
        let unknown = site_error("site = 1", "site = 1\nsizte = 2");
        assert!(unknown.contains("site.toml") && unknown.contains("unknown field `sizte`"), "{unknown}");
        let label = site_error("\"ams\"", "\"Ams\"");
        assert!(label.contains("name = \"Ams\": use 1 to 63 of a-z"), "{label}");
        let missing = site_error("k.pem", "none.pem");
        assert!(missing.contains("tls.key") && missing.contains("limosa dev certs"), "{missing}");
        let workers = site_error("[1, 2]", "[]");
        assert!(workers.contains("workers.expected = \"[]\": name at least one worker"), "{workers}");
        let open = site_error("127.0.0.1:9001", "0.0.0.0:9001");
        assert!(open.contains("metrics = \"0.0.0.0:9001\": this listener has no encryption yet"), "{open}");
        let address = site_error("127.0.0.1:4000", "localhost");
        assert!(
            address.contains("site.toml") && address.contains("\"localhost\": use HOST:PORT"),
            "{address}"
        );
        let nodes = site_error("id = 1", "id = 0");
        assert!(nodes.contains("node ids start at 1"), "{nodes}");
        let site = site_error("site = 1", "site = 256");
        assert!(site.contains("site.toml") && site.contains("256"), "{site}");
    }

    const OPENVSWITCH: &str = r#"
        [[peers]]
        site = 2
        name = "fra"
        address = "192.0.2.2:4001"

        [openvswitch]
        bridge = "limosa"
        database = "db.sock"
        control = "/run/openvswitch"
        inside = { name = "in0" }
        outside = { name = "out0", number = 7, type = "dpdk", options = { dpdk-devargs = "0000:01:00.0" } }
        workers = [{ worker = 1, name = "w1" }, { worker = 2, name = "w2" }]
        tunnels = { mode = "flow-based", remotes = [{ site = 2, address = "10.0.0.2" }] }
    "#;

    fn with_openvswitch(from: &str, to: &str) -> Result<SiteConfig, ConfigError> {
        let text = SITE.replace("\"switch.control\"", "\"tcp:127.0.0.1:6653\"") + OPENVSWITCH;
        assert!(text.contains(from), "{from}");
        let (_directory, path) = written(&text.replace(from, to));
        SiteConfig::read(&path)
    }

    #[test]
    fn a_bridge_has_its_ports_tunnels_and_listener() {
        let switch = with_openvswitch("", "").unwrap().switch;
        let bridge = switch.openvswitch.unwrap().bridge;
        assert_eq!(bridge.listen.as_deref(), Some("ptcp:6653:127.0.0.1"));
        let ports: Vec<_> = bridge.ports.iter().map(|port| (port.name.as_str(), port.number.0)).collect();
        assert_eq!(ports, [("in0", 1), ("out0", 7), ("w1", 101), ("w2", 102), ("vxlan", 1300)]);
        assert_eq!(bridge.ports[4].options["remote_ip"], "flow");
        assert_eq!(switch.ports.outside, switchctl::PortNo(7));
        let tunnel = switch.ports.tunnels[&SiteId(2)];
        assert_eq!(tunnel.remote, Some([10, 0, 0, 2].into()));
        let per_peer = with_openvswitch("flow-based", "per-peer").unwrap().switch;
        let bridge = per_peer.openvswitch.unwrap().bridge;
        assert_eq!((bridge.ports[4].name.as_str(), bridge.ports[4].number.0), ("vxlan2", 1002));
        assert_eq!(bridge.ports[4].options["remote_ip"], "10.0.0.2");
    }

    #[test]
    fn mistakes_about_the_bridge_are_named_with_their_remedy() {
        for (from, to, wanted) in [
            ("tcp:127.0.0.1:6653", "tcp:6653", "switch = \"tcp:6653\": use a path, unix:PATH"),
            ("tcp:127.0.0.1:6653", "tls:127.0.0.1:6653", "tls.key = "),
            ("database = \"db.sock\"", "", "openvswitch.check_fail_mode = \"true\": the fail mode is read"),
            ("control = \"/run/openvswitch\"", "", "openvswitch.control = \"neither\": set control to"),
            ("{ worker = 2, name = \"w2\" }", "", "openvswitch.workers = \"2\": add { worker = 2"),
            ("\"w2\"", "\"w1\"", "openvswitch.workers.name = \"w1\": this name is taken"),
            ("number = 7", "number = 101", "openvswitch.workers.number = \"101\": port out0 has this number"),
            ("number = 7", "number = 65280", "openvswitch.outside.number = \"65280\": use 1 to 65279"),
            ("\"in0\"", "\"a name too long for it\"", "openvswitch.inside.name"),
            ("10.0.0.2\" }]", "2001:db8::2\" }]", "use mode = \"per-peer\""),
            (
                "{ site = 2, address = \"10.0.0.2\" }",
                "",
                "openvswitch.tunnels.remotes = \"fra\": add { site = 2",
            ),
            ("{ site = 2, ", "{ site = 3, ", "openvswitch.tunnels.remotes.site = \"3\": no such site"),
        ] {
            let error = with_openvswitch(from, to).unwrap_err().to_string();
            assert!(error.contains("site.toml") && error.contains(wanted), "{from} -> {to}: {error}");
        }
    }

    const WORKER: &str = r#"
        site = 1
        worker = 2
        directory = "workers"
    "#;

    fn worker(rest: &str) -> Result<WorkerConfig, String> {
        let (_directory, path) = written(&format!("{WORKER}{rest}"));
        WorkerConfig::read(&path).map_err(|error| error.to_string())
    }

    fn worker_error(rest: &str) -> String {
        worker(rest).unwrap_err()
    }

    #[test]
    fn a_worker_has_one_way_to_its_switch() {
        assert!(matches!(worker("switch = \"s\"").unwrap().worker.link, Link::Socket(_)));
        assert!(worker_error("").contains("name the switch's socket for this worker, or add a table [dpdk]"));
        let both = worker_error("switch = \"s\"\n[dpdk]\ndevice = \"net_null0\"");
        assert!(both.contains("switch = \"s\": a worker has one way to its switch"), "{both}");
    }

    #[test]
    fn a_dpdk_worker_needs_a_program_with_dpdk_and_has_defaults_that_fit() {
        let read = worker("[dpdk]\npci = \"0000:3b:00.1\"");
        if !dataplane::dpdk::BUILT {
            let error = read.unwrap_err();
            assert!(error.contains("site.toml: dpdk = "), "{error}");
            assert!(error.contains("cargo build --release --package limosa --features dpdk"), "{error}");
            return;
        }
        let config = read.unwrap().worker;
        let Link::Dpdk(dpdk) = config.link else { panic!("{:?}", config.link) };
        assert_eq!(dpdk.device, Device::Pci("0000:3b:00.1".to_owned()));
        assert_eq!((dpdk.idle, dpdk.huge_pages, dpdk.mtu), (Idle::Backoff, true, 1_500));
        assert_eq!((config.hold_packets_max, dpdk.buffers), (16_384, 4 * 16_384 + 8_192));
        assert!(dpdk.memory_mb >= memory_min_mb(dpdk.buffers, 1_500));
    }

    #[test]
    fn errors_of_a_dpdk_table_name_file_key_value_and_remedy() {
        for (rest, expected) in [
            ("", "dpdk.device = \"\": name a device, such as \"net_af_packet0,iface=eth1\""),
            ("pci = \"3b:00.1\"", "dpdk.pci = \"3b:00.1\": use domain:bus:device.function"),
            ("device = \"net_null0\"\npci = \"0000:3b:00.1\"", "a worker has one device"),
            ("device = \"net_null\"", "dpdk.device = \"net_null\": use a driver and a number"),
            ("device = \"eth1\"", "drivers: net_virtio_user, net_af_packet, net_af_xdp"),
            ("device = \"net_af_packet0\"", "net_af_packet needs iface=, as in \"net_af_packet0,iface=...\""),
            ("device = \"net_null0\"\nidle = \"nap\"", "dpdk.idle = \"nap\": use \"spin\" or \"backoff\""),
            ("device = \"net_null0\"\nmtu = 9500", "dpdk.mtu = \"9500\": use 576 to 9198"),
            ("device = \"net_null0\"\nbuffers = 9000", "hold_packets = 16384 needs 73728 or more"),
            ("device = \"net_null0\"\nmemory_mb = 64", "dpdk.memory_mb = \"64\": 73728 buffers need "),
            ("device = \"net_null0\"\nrx_descriptors = 8", "dpdk.rx_descriptors = \"8\": use 32 to 2048"),
            ("device = \"net_null0\"\neal = [\"--no-huge\"]", "the key dpdk.huge_pages sets it"),
            ("device = \"net_null0\"\neal = [\"-h\"]", "dpdk.eal = \"-h\": leave it out: DPDK would end"),
            ("device = \"net_null0\"\nnosuch = 1", "unknown field `nosuch`"),
        ] {
            let error = worker_error(&format!("[dpdk]\n{rest}"));
            assert!(error.contains("site.toml") && error.contains(expected), "{rest}: {error}");
        }
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = WorkerConfig::read(Path::new("/nowhere/worker.toml")).unwrap_err().to_string();
        assert!(error.starts_with("/nowhere/worker.toml: cannot be read"), "{error}");
    }
}
