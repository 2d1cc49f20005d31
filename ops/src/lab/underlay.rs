//! Addresses between the sites, and those of clients and servers. Everything is set by hand, neighbours too: no ARP
//! crosses the network function.

use std::fmt::Write as _;
use std::net::Ipv4Addr;
use std::time::Duration;

use flow::nat::{NatSpec, first_port_default};

use super::namespaces::{End, MTU, Namespace, UNDERLAY_MTU, cable};
use super::ovs::UNDERLAY_PORT;
use super::wan::{Network, Wire, WireEnd};
use crate::demo::DemoSite;
use crate::demo::wan::great_circle_delay;

/// Interface of agents and placement nodes. It is a cable of its own, so that they live on when Open vSwitch does not.
const CONTROL_PORT: &str = "ctl0";
/// A neighbour that stands for all of the other side.
const GATEWAY: &str = "169.254.0.1";
/// Hardware address of every client: also where a worker sends what it says itself.
const CLIENT_MAC: &str = "02:00:00:00:00:01";
/// Hardware address of every server.
const SERVER_MAC: &str = "02:00:00:00:00:02";
/// Hardware address of every server that is far from all sites.
const FAR_MAC: &str = "02:00:00:00:00:03";
/// Where packets leave the world for those.
const BORDER_MAC: &str = "02:00:00:00:00:04";
/// Routing tables of the clients' groups and of the servers.
const TABLE: u32 = 100;
/// Routing tables of what a site has sent to a server that is far.
const FAR_TABLE: u32 = 200;
/// Uniform, on top of each delay between sites; below what a detour over a third site adds.
const JITTER_US: u64 = 2_000;
/// 200 Mbit/s between any two sites, with room for a tenth of a second.
const RATE_BYTES_PER_S: u64 = 25_000_000;

/// All subscribers: eight groups of 256.
const CLIENTS: &str = "100.64.0.0/21";
/// Their outside addresses.
const POOL: &str = "198.51.100.0/28";

/// The service's addresses and ports.
///
/// # Errors
/// None for these constants.
pub(super) fn nat() -> anyhow::Result<NatSpec> {
    Ok(NatSpec {
        clients: vec![CLIENTS.parse()?],
        pool: vec![POOL.parse()?],
        ports_per_subscriber: 504,
        first_port: first_port_default(),
        port_key: 7_654_321,
    })
}

/// Where a site's tunnels begin and end.
pub(super) fn tunnel_address(site: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 99, 0, site)
}

/// The hardware address of that.
pub(super) fn tunnel_mac(site: u8) -> String {
    format!("02:00:00:00:99:{site:02x}")
}

/// Where a site's agent and placement node are.
pub(super) fn control_address(site: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 98, 0, site)
}

fn control_mac(site: u8) -> String {
    format!("02:00:00:00:98:{site:02x}")
}

/// A client of a group.
pub(super) fn client(group: u8, host: u8) -> Ipv4Addr {
    Ipv4Addr::new(100, 64, group, host)
}

/// The server near a site.
pub(super) fn server(site: u8) -> Ipv4Addr {
    Ipv4Addr::new(203, 0, 113, site)
}

/// A server that is at no site: packets to it and from it take as long as the way is, from whichever site they leave.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Far {
    pub(super) place: &'static str,
    at: (f64, f64),
    pub(super) address: Ipv4Addr,
    pub(super) network: &'static str,
    /// Whose clients talk to it.
    pub(super) group: u8,
    /// Where these come in. The first site has the group, and is the nearest to the server.
    pub(super) ingress: u8,
}

/// Of each, only the first site knows the way. Where the clients come in is as good as there for all that one can tell, so that it is in
/// doubt; in truth it is better, since the way from there to the server is not the detour over the first site.
const FAR: [Far; 2] = [
    Far {
        place: "reykjavik",
        at: (64.15, -21.94),
        address: Ipv4Addr::new(192, 0, 2, 1),
        network: "192.0.2.0/24",
        group: 6,
        ingress: 2,
    },
    Far {
        place: "dubai",
        at: (25.20, 55.27),
        address: Ipv4Addr::new(198, 18, 0, 1),
        network: "198.18.0.0/24",
        group: 7,
        ingress: 3,
    },
];

/// Those of a lab with so many sites.
pub(super) fn far_servers(sites: u8) -> impl Iterator<Item = Far> {
    FAR.into_iter().filter(move |far| far.ingress <= sites)
}

impl Far {
    /// A round trip from a site over the WAN, without what waiting adds: the delays, and the jitter at its mean.
    pub(super) fn round_trip_ms(&self, site: &DemoSite) -> f64 {
        let one_way = great_circle_delay(place(site), self.at) + Duration::from_micros(JITTER_US / 2);
        2_000.0 * one_way.as_secs_f64()
    }
}

/// Where packets of the world go from a site to what is far.
fn border_address(site: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 97, 0, site)
}

/// A group's name in the config API.
pub(super) fn group_name(group: u8) -> String {
    format!("1:100.64.{group}.0/24")
}

/// The namespaces of a lab.
#[derive(Clone, Debug)]
pub(super) struct Underlay {
    pub(super) sites: Vec<Namespace>,
    pub(super) wan: Namespace,
    pub(super) clients: Namespace,
    pub(super) world: Namespace,
    pub(super) far: Namespace,
}

impl Underlay {
    /// Makes the namespaces and lays all cables.
    ///
    /// # Errors
    /// In words of the tool that failed.
    pub(super) fn build(sites: u8, workers: u16) -> anyhow::Result<Self> {
        let underlay = Self {
            wan: Namespace::create("wan")?,
            clients: Namespace::create("clients")?,
            world: Namespace::create("world")?,
            far: Namespace::create("far")?,
            sites: (1..=sites)
                .map(|site| Namespace::create(&format!("s{site}")))
                .collect::<anyhow::Result<Vec<_>>>()?,
        };
        for site in 1..=sites {
            underlay.cables(site, sites, workers)?;
        }
        underlay.address_clients()?;
        underlay.address_world(sites)?;
        underlay.lay_far(sites)?;
        Ok(underlay)
    }

    /// The namespace of a site.
    pub(super) fn site(&self, site: u8) -> &Namespace {
        &self.sites[usize::from(site) - 1]
    }

    fn cables(&self, site: u8, sites: u8, workers: u16) -> anyhow::Result<()> {
        let own = self.site(site);
        let end = |namespace, interface: String, mac: Option<&str>| End {
            namespace,
            interface,
            mac: mac.map(str::to_owned),
        };
        let at_site = |interface: &str| end(own, interface.to_owned(), None);
        let far = format!("s{site}");
        cable(&at_site("in0"), &end(&self.clients, far.clone(), Some(CLIENT_MAC)), MTU)?;
        cable(&at_site("out0"), &end(&self.world, far, Some(SERVER_MAC)), MTU)?;
        cable(&at_site(UNDERLAY_PORT), &end(&self.wan, format!("d{site}"), None), UNDERLAY_MTU)?;
        let control = end(own, CONTROL_PORT.to_owned(), Some(&control_mac(site)));
        cable(&control, &end(&self.wan, format!("c{site}"), None), UNDERLAY_MTU)?;
        for worker in 1..=workers {
            cable(&at_site(&worker_port(worker)), &at_site(&worker_device(worker)), UNDERLAY_MTU)?;
        }
        let mut commands = format!("address add {}/24 dev {CONTROL_PORT}\n", control_address(site));
        for peer in (1..=sites).filter(|peer| *peer != site) {
            let (address, mac) = (control_address(peer), control_mac(peer));
            writeln!(commands, "neighbour add {address} lladdr {mac} dev {CONTROL_PORT} nud permanent")?;
        }
        own.ip_batch(&commands)
    }

    fn address_clients(&self) -> anyhow::Result<()> {
        let mut commands = String::new();
        for site in 1..=self.sites.len() {
            writeln!(commands, "neighbour add {GATEWAY} lladdr {SERVER_MAC} dev s{site} nud permanent")?;
        }
        // Every address of every group is here, without a list of them.
        writeln!(commands, "route add local {CLIENTS} dev lo")?;
        for group in 0..8_u8 {
            let table = TABLE + u32::from(group);
            writeln!(commands, "rule add from 100.64.{group}.0/24 lookup {table}")?;
            writeln!(commands, "route add default via {GATEWAY} dev s1 onlink table {table}")?;
        }
        self.clients.ip_batch(&commands)
    }

    fn address_world(&self, sites: u8) -> anyhow::Result<()> {
        let mut commands = String::new();
        for site in 1..=sites {
            let table = TABLE + u32::from(site);
            writeln!(commands, "address add {}/32 dev lo", server(site))?;
            writeln!(commands, "neighbour add {GATEWAY} lladdr {CLIENT_MAC} dev s{site} nud permanent")?;
            writeln!(commands, "rule add from {} lookup {table}", server(site))?;
            writeln!(commands, "route add default via {GATEWAY} dev s{site} onlink table {table}")?;
        }
        self.world.ip_batch(&commands)
    }

    /// What is far: from the world, for packets of clients, and from each site itself, for its probes. Both cross the WAN.
    fn lay_far(&self, sites: u8) -> anyhow::Result<()> {
        let end = |namespace, interface: String, mac: Option<&str>| End {
            namespace,
            interface,
            mac: mac.map(str::to_owned),
        };
        self.world.run("sysctl", &["-qw", "net.ipv4.ip_forward=1"])?;
        let mut world = String::new();
        for site in 1..=sites {
            let (border, table) = (format!("x{site}"), FAR_TABLE + u32::from(site));
            let at_world = end(&self.world, border.clone(), Some(BORDER_MAC));
            cable(&at_world, &end(&self.wan, border.clone(), None), UNDERLAY_MTU)?;
            writeln!(world, "neighbour add {GATEWAY} lladdr {FAR_MAC} dev {border} nud permanent")?;
            writeln!(world, "route add default via {GATEWAY} dev {border} onlink table {table}")?;
            writeln!(world, "rule add iif {border} lookup {}", TABLE + u32::from(site))?;
            let mut own =
                format!("neighbour add {GATEWAY} lladdr {FAR_MAC} dev {CONTROL_PORT} nud permanent\n");
            for far in far_servers(sites) {
                let network = far.network;
                writeln!(world, "rule add iif s{site} to {network} lookup {table}")?;
                writeln!(own, "route add {network} via {GATEWAY} dev {CONTROL_PORT} onlink")?;
            }
            self.site(site).ip_batch(&own)?;
        }
        self.world.ip_batch(&world)?;
        let mut commands = String::new();
        for (far, number) in far_servers(sites).zip(1_u32..) {
            let (device, table) = (format!("f{number}"), TABLE + number);
            let there = end(&self.far, device.clone(), Some(FAR_MAC));
            cable(&there, &end(&self.wan, device.clone(), None), UNDERLAY_MTU)?;
            writeln!(commands, "address add {}/32 dev lo", far.address)?;
            writeln!(commands, "rule add from {} lookup {table}", far.address)?;
            writeln!(commands, "neighbour add {GATEWAY} lladdr {BORDER_MAC} dev {device} nud permanent")?;
            writeln!(commands, "route add default via {GATEWAY} dev {device} onlink table {table}")?;
            for site in 1..=sites {
                let (address, mac) = (control_address(site), control_mac(site));
                writeln!(commands, "neighbour add {address} lladdr {mac} dev {device} nud permanent")?;
                writeln!(commands, "route add {address}/32 dev {device} scope link table {table}")?;
            }
        }
        self.far.ip_batch(&commands)
    }

    /// The clients of a group appear at a site. Their sockets stay.
    ///
    /// # Errors
    /// In words of `ip`.
    pub(super) fn roam(&self, group: u8, site: u8) -> anyhow::Result<()> {
        let table = (TABLE + u32::from(group)).to_string();
        let device = format!("s{site}");
        self.clients
            .ip(&["route", "replace", "default", "via", GATEWAY, "dev", &device, "onlink", "table", &table])
    }
}

/// A worker's port of the switch.
pub(super) fn worker_port(worker: u16) -> String {
    format!("w{worker}")
}

/// The other end of that, which the worker opens.
pub(super) fn worker_device(worker: u16) -> String {
    format!("w{worker}d")
}

/// The network between the sites: two ends at each, lines between ends of one kind, with the delays of the great circles. What is far
/// has lines to and from each site itself, and to and from where packets of the world leave it, which the pool is behind.
pub(super) fn network(sites: &[DemoSite], stats: std::path::PathBuf, loss: f64) -> anyhow::Result<Network> {
    let numbered = || (1..).zip(sites);
    let mut network = Network { stats, end: Vec::new(), line: Vec::new() };
    let line = |from: Ipv4Addr, to: Ipv4Addr, delay: Duration| Wire {
        from,
        to,
        delay_us: u64::try_from(delay.as_micros()).unwrap_or(0),
        jitter_us: JITTER_US,
        rate_bytes_per_s: RATE_BYTES_PER_S,
        queue_bytes_max: RATE_BYTES_PER_S / 10,
        loss,
    };
    for (prefix, address) in [("d", tunnel_address as fn(u8) -> Ipv4Addr), ("c", control_address)] {
        for (a, from) in numbered() {
            let (interface, networks) = (format!("{prefix}{a}"), Vec::new());
            network.end.push(WireEnd { interface, address: address(a), networks });
            for (b, to) in numbered().filter(|(b, _)| *b != a) {
                network.line.push(line(address(a), address(b), delay(from, to)));
            }
        }
    }
    for (a, _) in numbered() {
        let networks = vec![POOL.parse()?];
        network.end.push(WireEnd { interface: format!("x{a}"), address: border_address(a), networks });
    }
    for (far, number) in far_servers(u8::try_from(sites.len())?).zip(1_u32..) {
        let (interface, networks) = (format!("f{number}"), Vec::new());
        network.end.push(WireEnd { interface, address: far.address, networks });
        for (a, site) in numbered() {
            for near in [control_address(a), border_address(a)] {
                let delay = great_circle_delay(place(site), far.at);
                network.line.extend([line(near, far.address, delay), line(far.address, near, delay)]);
            }
        }
    }
    Ok(network)
}

/// One-way delay between two sites.
pub(super) fn delay(a: &DemoSite, b: &DemoSite) -> Duration {
    great_circle_delay(place(a), place(b))
}

fn place(site: &DemoSite) -> (f64, f64) {
    (site.latitude, site.longitude)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_pair_of_sites_has_a_line_each_way_for_tunnels_and_for_quic() {
        let network = network(&crate::demo::built_in(), std::path::PathBuf::new(), 0.0).unwrap();
        // Beside these, each site has an end for the world, and each of the two far servers one with four lines to each site.
        assert_eq!((network.end.len(), network.line.len()), (6 + 3 + 2, 12 + 2 * 3 * 4));
        let delay = |a, b| {
            let is_it = |wire: &&Wire| wire.from == tunnel_address(a) && wire.to == tunnel_address(b);
            network.line.iter().find(is_it).unwrap().delay_us
        };
        assert_eq!(delay(1, 3), delay(3, 1));
        assert!(delay(1, 2) < delay(2, 3));
        // What the emulator reads is what was meant.
        let text = toml::to_string(&network).unwrap();
        assert_eq!(toml::from_str::<Network>(&text).unwrap(), network);
    }

    /// Else nothing would be in doubt, or there would be nothing to find out.
    #[test]
    fn a_far_server_is_nearest_to_the_first_site_and_no_detour_from_where_its_clients_come_in() {
        let sites = crate::demo::built_in();
        for far in FAR {
            let ms: Vec<_> = sites.iter().map(|site| far.round_trip_ms(site)).collect();
            assert!(ms[1..].iter().all(|other| ms[0] < *other), "{}: {ms:?}", far.place);
            let ingress = usize::from(far.ingress) - 1;
            let detour = ms[0] + 2_000.0 * delay(&sites[0], &sites[ingress]).as_secs_f64();
            assert!(ms[ingress] + 30.0 < detour, "{}: {ms:?}, {detour}", far.place);
        }
    }
}
