//! Where the site's switch is, and the `[openvswitch]` table: a bridge of Open vSwitch, its ports, and how to know that
//! its rules are in force.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;

use flow::{SiteId, WorkerId};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde::Deserialize;
use switchctl::core::ovsdb::{BridgeSpec, PORT_MAX, PortSpec};
use switchctl::{InForce, PortNo, Ports, SwitchAddr, TlsClient, TlsMaterial, Tunnel};

use super::{ConfigError, File, Peer, RawTls, Tls};
use crate::files;

/// Which of the files is wrong, where it is, and what is wanted.
type Wrong = (&'static str, PathBuf, String);

/// What an agent shows to a switch.
fn switch_material(paths: &Tls) -> Result<TlsMaterial, Wrong> {
    let certificates = |part: &'static str, path: &PathBuf| {
        let wrong = |cause: &str| (part, path.clone(), format!("PEM certificates are wanted: {cause}"));
        let text = files::read(path).map_err(|error| wrong(&error.to_string()))?;
        let read: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&text).collect();
        match read {
            Ok(chain) if !chain.is_empty() => Ok(chain),
            Ok(_) => Err(wrong("there is none in it")),
            Err(error) => Err(wrong(&error.to_string())),
        }
    };
    let wrong = |cause: String| ("key", paths.key.clone(), format!("a PEM private key is wanted: {cause}"));
    let text = files::read(&paths.key).map_err(|error| wrong(error.to_string()))?;
    let key = PrivateKeyDer::from_pem_slice(&text).map_err(|error| wrong(error.to_string()))?;
    let authority = certificates("authority", &paths.authority)?;
    Ok(TlsMaterial { chain: certificates("certificate", &paths.certificate)?, key, authority })
}

/// The switch of a site.
#[derive(Clone, Debug)]
pub struct SwitchSettings {
    /// Where it listens for its controller.
    pub address: SwitchAddr,
    /// How to know that rules are in force.
    pub in_force: InForce,
    /// Numbers of its ports.
    pub ports: Ports,
    /// More, where it is Open vSwitch.
    pub openvswitch: Option<OpenVswitch>,
}

/// Open vSwitch beside OpenFlow.
#[derive(Clone, Debug)]
pub struct OpenVswitch {
    /// Where its database listens.
    pub database: Option<SwitchAddr>,
    /// The bridge as it should be.
    pub bridge: BridgeSpec,
    /// Whether nothing is steered before the bridge's fail mode is known to be secure.
    pub check_fail_mode: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawOpenVswitch {
    bridge: String,
    #[serde(default)]
    datapath: Datapath,
    database: Option<String>,
    control: Option<PathBuf>,
    probe: Option<RawProbe>,
    #[serde(default = "yes")]
    check_fail_mode: bool,
    inside: RawPort,
    outside: RawPort,
    workers: Vec<RawWorkerPort>,
    tunnels: Option<RawTunnels>,
    tls: Option<RawSwitchTls>,
}

/// A bridge that is a learning switch when its controller is gone lets packets bypass the network functions.
fn yes() -> bool {
    true
}

#[derive(Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Datapath {
    /// The userspace datapath: it needs no kernel module and carries DPDK ports.
    #[default]
    Netdev,
    System,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawProbe {
    out: RawPort,
    back: RawPort,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawPort {
    name: String,
    number: Option<u32>,
    #[serde(default, rename = "type")]
    kind: String,
    #[serde(default)]
    options: BTreeMap<String, String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawWorkerPort {
    worker: WorkerId,
    name: String,
    number: Option<u32>,
    #[serde(default, rename = "type")]
    kind: String,
    #[serde(default)]
    options: BTreeMap<String, String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTunnels {
    mode: TunnelMode,
    /// The name of the port, or what each name begins with.
    #[serde(default = "tunnel_name")]
    name: String,
    local: Option<Ipv4Addr>,
    #[serde(default = "udp_port")]
    udp_port: u16,
    remotes: Vec<RawRemote>,
}

fn tunnel_name() -> String {
    "vxlan".to_owned()
}

/// Assigned to VXLAN by IANA.
fn udp_port() -> u16 {
    4_789
}

#[derive(Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum TunnelMode {
    FlowBased,
    PerPeer,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawRemote {
    site: SiteId,
    address: IpAddr,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawSwitchTls {
    certificate: PathBuf,
    key: PathBuf,
    authority: PathBuf,
    /// The name in the switch's certificate; the host of the address if not given.
    name: Option<String>,
}

/// The tables of this file, each with its keys.
#[cfg(test)]
pub(super) fn tables() -> Vec<(&'static str, Vec<String>)> {
    use super::fields;
    vec![
        ("openvswitch", fields::<RawOpenVswitch>()),
        ("openvswitch.inside", fields::<RawPort>()),
        ("openvswitch.outside", fields::<RawPort>()),
        ("openvswitch.probe", fields::<RawProbe>()),
        ("openvswitch.probe.out", fields::<RawPort>()),
        ("openvswitch.probe.back", fields::<RawPort>()),
        ("openvswitch.workers[]", fields::<RawWorkerPort>()),
        ("openvswitch.tunnels", fields::<RawTunnels>()),
        ("openvswitch.tunnels.remotes[]", fields::<RawRemote>()),
        ("openvswitch.tls", fields::<RawSwitchTls>()),
    ]
}

/// Numbers of the probe's ports by convention: below those of workers.
const PROBE_OUT: PortNo = PortNo(90);
const PROBE_BACK: PortNo = PortNo(91);

/// What the rest of the site's configuration says.
pub(super) struct Site<'a> {
    pub(super) file: &'a File<'a>,
    pub(super) tls: &'a Tls,
    pub(super) peers: &'a [Peer],
    pub(super) worker_ports: &'a [WorkerId],
}

impl Site<'_> {
    /// Checks the key `switch` and the table `[openvswitch]` together.
    pub(super) fn switch(
        &self,
        switch: &str,
        table: Option<RawOpenVswitch>,
    ) -> Result<SwitchSettings, ConfigError> {
        let Some(mut table) = table else {
            return Ok(SwitchSettings {
                address: self.address("switch", switch, None)?,
                in_force: InForce::Barrier,
                ports: Ports::conventional(
                    self.peers.iter().map(|peer| peer.site),
                    self.worker_ports.iter().copied(),
                ),
                openvswitch: None,
            });
        };
        let tls = table.tls.take();
        let address = self.address("switch", switch, tls.as_ref())?;
        let database = table
            .database
            .as_ref()
            .map(|text| self.address("openvswitch.database", text, tls.as_ref()))
            .transpose()?;
        if table.check_fail_mode && database.is_none() {
            return Err(self.file.error(
                "openvswitch.check_fail_mode",
                true,
                "the fail mode is read from the database: set openvswitch.database, for example \
                 \"/run/openvswitch/db.sock\", or set this to false and see to fail_mode=secure yourself",
            ));
        }
        let check_fail_mode = table.check_fail_mode;
        let (in_force, ports, bridge) = self.bridge(table, &address)?;
        let openvswitch = Some(OpenVswitch { database, bridge, check_fail_mode });
        Ok(SwitchSettings { address, in_force, ports, openvswitch })
    }

    fn address(&self, key: &str, text: &str, tls: Option<&RawSwitchTls>) -> Result<SwitchAddr, ConfigError> {
        let host_and_port = |rest: &str| {
            let (host, port) = rest.rsplit_once(':')?;
            let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
            (!host.is_empty()).then_some((host.to_owned(), port.parse().ok().filter(|port| *port != 0)?))
        };
        let wrong = || self.file.error(key, text, "use a path, unix:PATH, tcp:HOST:PORT or tls:HOST:PORT");
        if let Some(rest) = text.strip_prefix("tcp:") {
            let (host, port) = host_and_port(rest).ok_or_else(wrong)?;
            return Ok(SwitchAddr::Tcp(host, port));
        }
        if let Some(rest) = text.strip_prefix("tls:") {
            let (host, port) = host_and_port(rest).ok_or_else(wrong)?;
            let client = self.tls_client(&host, tls)?;
            return Ok(SwitchAddr::Tls(host, port, client));
        }
        let path = text.strip_prefix("unix:").unwrap_or(text);
        if path.is_empty() {
            return Err(wrong());
        }
        Ok(SwitchAddr::Unix(self.file.socket(key, path.as_ref())?))
    }

    fn tls_client(&self, host: &str, tls: Option<&RawSwitchTls>) -> Result<TlsClient, ConfigError> {
        let file = self.file;
        let (key, name, material) = match tls {
            None => ("tls", host, self.tls.clone()),
            Some(raw) => {
                let paths = RawTls {
                    certificate: raw.certificate.clone(),
                    key: raw.key.clone(),
                    authority: raw.authority.clone(),
                };
                let material = paths.validate(file, &self.tls.cluster)?;
                ("openvswitch.tls", raw.name.as_deref().unwrap_or(host), material)
            }
        };
        let wrong =
            |(part, path, remedy): Wrong| file.error(&format!("{key}.{part}"), path.display(), remedy);
        let found = switch_material(&material).map_err(wrong)?;
        let client = TlsClient::new(name, found).map_err(|error| {
            file.error(&format!("{key}.certificate"), material.certificate.display(), error.to_string())
        })?;
        Ok(client.read_anew(move || {
            switch_material(&material).map_err(|(_, path, remedy)| format!("{}: {remedy}", path.display()))
        }))
    }

    fn bridge(
        &self,
        table: RawOpenVswitch,
        address: &SwitchAddr,
    ) -> Result<(InForce, Ports, BridgeSpec), ConfigError> {
        let mut list = PortList { file: self.file, ports: Vec::new(), names: BTreeSet::new() };
        let name = list.device("openvswitch.bridge", table.bridge)?;
        let mut ports = Ports {
            inside: list.add("openvswitch.inside", table.inside, Ports::INSIDE)?,
            outside: list.add("openvswitch.outside", table.outside, Ports::OUTSIDE)?,
            ..Ports::default()
        };
        for raw in table.workers {
            let port = RawPort { name: raw.name, number: raw.number, kind: raw.kind, options: raw.options };
            let number = list.add("openvswitch.workers", port, Ports::worker(raw.worker))?;
            if ports.workers.insert(raw.worker, number).is_some() {
                return Err(self.file.error(
                    "openvswitch.workers.worker",
                    raw.worker,
                    "name each worker once",
                ));
            }
        }
        if let Some(worker) = self.worker_ports.iter().find(|worker| !ports.workers.contains_key(worker)) {
            let remedy = format!("add {{ worker = {worker}, name = \"DEVICE\" }}: each worker needs a port");
            return Err(self.file.error("openvswitch.workers", worker, remedy));
        }
        self.tunnels(table.tunnels, &mut list, &mut ports)?;
        let in_force = match (table.control, table.probe) {
            (Some(path), None) => InForce::Control(self.file.socket("openvswitch.control", &path)?),
            (None, Some(probe)) => InForce::Probe {
                out: list.add("openvswitch.probe.out", probe.out, PROBE_OUT)?,
                back: list.add("openvswitch.probe.back", probe.back, PROBE_BACK)?,
            },
            (control, _) => {
                let value = if control.is_some() { "control and probe" } else { "neither" };
                return Err(self.file.error(
                    "openvswitch.control",
                    value,
                    "set control to the run directory (\"/run/openvswitch\") of an ovs-vswitchd on this machine, or \
                     probe to the two ends of a link for one elsewhere",
                ));
            }
        };
        let datapath = match table.datapath {
            Datapath::Netdev => "netdev",
            Datapath::System => "system",
        };
        let listen = listen_at(address);
        Ok((in_force, ports, BridgeSpec { name, datapath: datapath.to_owned(), ports: list.ports, listen }))
    }

    fn tunnels(
        &self,
        raw: Option<RawTunnels>,
        list: &mut PortList<'_>,
        ports: &mut Ports,
    ) -> Result<(), ConfigError> {
        let Some(raw) = raw else {
            return match self.peers.first() {
                None => Ok(()),
                Some(peer) => Err(self.file.error(
                    "openvswitch.tunnels",
                    format!("none to site {}", peer.site),
                    "say how the peers' switches are reached: mode, and an address for each site in remotes",
                )),
            };
        };
        self.file.bounded("openvswitch.tunnels.udp_port", raw.udp_port.into(), 1, u16::MAX.into())?;
        let flow_based = raw.mode == TunnelMode::FlowBased;
        let vxlan = |name, number, remote| PortSpec::vxlan(name, number, remote, raw.local, raw.udp_port);
        if flow_based {
            let name = list.device("openvswitch.tunnels.name", raw.name.clone())?;
            list.push("openvswitch.tunnels.name", vxlan(name, Ports::FLOW_BASED, None))?;
        }
        for remote in raw.remotes {
            let tunnel = match (flow_based, remote.address) {
                (true, IpAddr::V4(address)) => Tunnel { port: Ports::FLOW_BASED, remote: Some(address) },
                (true, IpAddr::V6(address)) => {
                    let remedy = "flow-based tunnels lead to IPv4 addresses; use mode = \"per-peer\"";
                    return Err(self.file.error("openvswitch.tunnels.remotes.address", address, remedy));
                }
                (false, address) => {
                    let name = format!("{}{}", raw.name, remote.site);
                    let name = list.device("openvswitch.tunnels.name", name)?;
                    let port = Ports::tunnel(remote.site);
                    list.push("openvswitch.tunnels.name", vxlan(name, port, Some(address)))?;
                    Tunnel { port, remote: None }
                }
            };
            if !self.peers.iter().any(|peer| peer.site == remote.site) {
                let remedy = "no such site among the peers: add it to [[peers]] or leave it out";
                return Err(self.file.error("openvswitch.tunnels.remotes.site", remote.site, remedy));
            }
            if ports.tunnels.insert(remote.site, tunnel).is_some() {
                let remedy = "name each site once";
                return Err(self.file.error("openvswitch.tunnels.remotes.site", remote.site, remedy));
            }
        }
        match self.peers.iter().find(|peer| !ports.tunnels.contains_key(&peer.site)) {
            None => Ok(()),
            Some(peer) => {
                let remedy = format!("add {{ site = {}, address = \"ADDRESS\" }} for its switch", peer.site);
                Err(self.file.error("openvswitch.tunnels.remotes", &peer.name, remedy))
            }
        }
    }
}

/// Where the bridge must listen to be reached at an address; a Unix socket is there always.
fn listen_at(address: &SwitchAddr) -> Option<String> {
    let (kind, host, port) = match address {
        SwitchAddr::Unix(_) => return None,
        SwitchAddr::Tcp(host, port) => ("ptcp", host, port),
        SwitchAddr::Tls(host, port, _) => ("pssl", host, port),
    };
    // A name may stand for something between this machine and the switch.
    match host.parse() {
        Ok(IpAddr::V4(address)) => Some(format!("{kind}:{port}:{address}")),
        Ok(IpAddr::V6(address)) => Some(format!("{kind}:{port}:[{address}]")),
        Err(_) => None,
    }
}

/// The ports so far; names and numbers are unique.
struct PortList<'a> {
    file: &'a File<'a>,
    ports: Vec<PortSpec>,
    names: BTreeSet<String>,
}

/// Longest name of a network device (`IFNAMSIZ`).
const NAME_LEN_MAX: usize = 15;

impl PortList<'_> {
    fn device(&mut self, key: &str, name: String) -> Result<String, ConfigError> {
        let plain = |byte: u8| byte.is_ascii_graphic() && byte != b'/' && byte != b':';
        if !(1..=NAME_LEN_MAX).contains(&name.len()) || !name.bytes().all(plain) {
            return Err(self.file.error(key, name, "use 1 to 15 characters without space, '/' and ':'"));
        }
        if !self.names.insert(name.clone()) {
            return Err(self.file.error(key, name, "this name is taken: bridge and ports have one each"));
        }
        Ok(name)
    }

    fn add(&mut self, key: &str, raw: RawPort, number: PortNo) -> Result<PortNo, ConfigError> {
        let number = raw.number.map_or(number, PortNo);
        let name = self.device(&format!("{key}.name"), raw.name)?;
        self.push(&format!("{key}.number"), PortSpec { name, number, kind: raw.kind, options: raw.options })?;
        Ok(number)
    }

    fn push(&mut self, key: &str, port: PortSpec) -> Result<(), ConfigError> {
        if port.number.0 == 0 || port.number > PORT_MAX {
            return Err(self.file.error(key, port.number, format!("use 1 to {PORT_MAX}")));
        }
        if let Some(other) = self.ports.iter().find(|other| other.number == port.number) {
            let remedy = format!("port {} has this number: use another", other.name);
            return Err(self.file.error(key, port.number, remedy));
        }
        self.ports.push(port);
        Ok(())
    }
}
