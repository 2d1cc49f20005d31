//! Where clients and servers are, and packets that are on their way.

use std::cmp::Ordering;
use std::collections::{BinaryHeap, HashMap};
use std::net::{IpAddr, Ipv4Addr};

use anyhow::{Context as _, Result, ensure};
use flow::sample::Seeded;
use flow::{Prefix, SiteId};

use super::WorldSpec;
use crate::demo::wan::great_circle_delay;

/// Buffers kept for reuse.
const POOL_LEN_MAX: usize = 8_192;

/// Where a packet arrives when its delay is over. Numbers are places in the lists of [`Net`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Arrival {
    /// The inside port of a site.
    Inside(usize),
    /// The outside port of a site.
    Outside(usize),
    /// The client host of its destination address.
    Client,
    /// The server of its destination address.
    Server,
}

/// A client prefix.
#[derive(Debug)]
pub(super) struct Group {
    pub(super) prefix: Prefix,
    /// The site where its clients come in now.
    pub(super) site: usize,
    /// UDP sends nothing until then.
    pub(super) silent_until: u64,
    /// Of the UDP rate.
    pub(super) factor: f64,
    weights: Vec<(usize, f64)>,
}

#[derive(Debug)]
pub(super) struct Client {
    pub(super) address: Ipv4Addr,
    pub(super) group: usize,
}

#[derive(Debug)]
pub(super) struct Server {
    pub(super) address: Ipv4Addr,
    site: usize,
    /// From the outside port of each site.
    delays: Vec<u64>,
    /// The site where its answers come in.
    pub(super) nearest: usize,
}

/// The topology, the time, and all packets on their way. Times are microseconds.
pub(super) struct Net {
    pub(super) now: u64,
    pub(super) groups: Vec<Group>,
    pub(super) clients: Vec<Client>,
    pub(super) servers: Vec<Server>,
    pub(super) sites: Vec<SiteId>,
    access: u64,
    between: Vec<Vec<u64>>,
    by_client: HashMap<Ipv4Addr, usize>,
    by_server: HashMap<Ipv4Addr, usize>,
    pool: Vec<Prefix>,
    queue: BinaryHeap<OnItsWay>,
    order: u64,
    spare: Vec<Vec<u8>>,
}

struct OnItsWay {
    due: u64,
    /// Keeps what is due at one time in order.
    order: u64,
    arrival: Arrival,
    frame: Vec<u8>,
}

impl Net {
    pub(super) fn new(spec: &WorldSpec) -> Result<Self> {
        let sites: Vec<SiteId> = spec.sites.iter().map(|site| site.id).collect();
        let place = |id: SiteId| {
            sites.iter().position(|&site| site == id).with_context(|| format!("site {} is not listed", id.0))
        };
        let at = |site: usize| (spec.sites[site].latitude, spec.sites[site].longitude);
        let delay = |a: usize, b: usize| micros(great_circle_delay(at(a), at(b)));
        let all = || 0..spec.sites.len();
        let between: Vec<Vec<u64>> = all().map(|a| all().map(|b| delay(a, b)).collect()).collect();
        let mut groups = Vec::new();
        for group in &spec.groups {
            let weights = group.servers.iter().map(|&(id, weight)| Ok((place(id)?, weight)));
            let weights = weights.collect::<Result<_>>()?;
            let (prefix, site) = (group.prefix, place(group.home)?);
            groups.push(Group { prefix, site, silent_until: 0, factor: 1.0, weights });
        }
        let mut servers = Vec::new();
        for server in &spec.servers {
            let (site, own) = (place(server.site)?, micros(server.distance));
            let delays: Vec<u64> = between[site].iter().map(|delay| delay + own).collect();
            let nearest = all().min_by_key(|&from| delays[from]).unwrap_or(site);
            servers.push(Server { address: server.address, site, delays, nearest });
        }
        let clients = clients(spec)?;
        ensure!(!clients.is_empty() && !servers.is_empty(), "the world needs clients and servers");
        let by_client = clients.iter().enumerate().map(|(at, client)| (client.address, at)).collect();
        let by_server = servers.iter().enumerate().map(|(at, server)| (server.address, at)).collect();
        Ok(Self {
            now: 0,
            groups,
            clients,
            servers,
            sites,
            access: micros(spec.access_delay),
            between,
            by_client,
            by_server,
            pool: spec.pool.clone(),
            queue: BinaryHeap::new(),
            order: 0,
            spare: Vec::new(),
        })
    }

    pub(super) fn site(&self, id: SiteId) -> Option<usize> {
        self.sites.iter().position(|&site| site == id)
    }

    pub(super) fn client(&self, address: Ipv4Addr) -> Option<usize> {
        self.by_client.get(&address).copied()
    }

    pub(super) fn server(&self, address: Ipv4Addr) -> Option<usize> {
        self.by_server.get(&address).copied()
    }

    pub(super) fn is_outside(&self, address: Ipv4Addr) -> bool {
        self.pool.iter().any(|pool| pool.contains(IpAddr::V4(address)))
    }

    /// A server for a client of the group, by the group's weights of the servers' sites; any if none fits.
    pub(super) fn choose_server(&self, group: usize, rng: &mut Seeded) -> usize {
        let weights = &self.groups[group].weights;
        let mut left = rng.fraction() * weights.iter().map(|(_, weight)| weight).sum::<f64>();
        let chosen = weights.iter().find(|(_, weight)| {
            left -= weight;
            left < 0.0
        });
        let near = |server: &Server| chosen.is_some_and(|&(site, _)| server.site == site);
        let candidates = self.servers.iter().filter(|server| near(server)).count() as u64;
        if candidates == 0 {
            return below(rng, self.servers.len());
        }
        let nth = usize::try_from(rng.below(candidates)).unwrap_or(0);
        self.servers.iter().enumerate().filter(|(_, server)| near(server)).nth(nth).map_or(0, |(at, _)| at)
    }

    /// A packet leaves a client towards its present ingress.
    pub(super) fn client_sends(&mut self, client: usize, frame: Vec<u8>) {
        let site = self.groups[self.clients[client].group].site;
        self.push(self.access, Arrival::Inside(site), frame);
    }

    /// A packet leaves a server towards the nearest site.
    pub(super) fn server_sends(&mut self, server: usize, frame: Vec<u8>) {
        let server = &self.servers[server];
        self.push(server.delays[server.nearest], Arrival::Outside(server.nearest), frame);
    }

    /// A packet left the inside port of a site towards a client. When the client has gone elsewhere, it is
    /// forwarded there, as a handover does it.
    pub(super) fn carry_to_client(&mut self, client: usize, site: usize, frame: Vec<u8>) {
        let here = self.groups[self.clients[client].group].site;
        self.push(self.access + self.between[site][here], Arrival::Client, frame);
    }

    /// A packet left the outside port of a site towards a server.
    pub(super) fn carry_to_server(&mut self, server: usize, site: usize, frame: Vec<u8>) {
        self.push(self.servers[server].delays[site], Arrival::Server, frame);
    }

    fn push(&mut self, delay: u64, arrival: Arrival, frame: Vec<u8>) {
        self.order += 1;
        self.queue.push(OnItsWay { due: self.now + delay, order: self.order, arrival, frame });
    }

    /// When the next packet arrives.
    pub(super) fn next_due(&self) -> Option<u64> {
        self.queue.peek().map(|packet| packet.due)
    }

    /// The next packet that has arrived.
    pub(super) fn pop(&mut self) -> Option<(Arrival, Vec<u8>)> {
        self.next_due().filter(|&due| due <= self.now)?;
        self.queue.pop().map(|packet| (packet.arrival, packet.frame))
    }

    /// An empty buffer.
    pub(super) fn buffer(&mut self) -> Vec<u8> {
        let mut buffer = self.spare.pop().unwrap_or_default();
        buffer.clear();
        buffer
    }

    pub(super) fn recycle(&mut self, buffer: Vec<u8>) {
        if self.spare.len() < POOL_LEN_MAX {
            self.spare.push(buffer);
        }
    }
}

impl Ord for OnItsWay {
    /// The greatest is what is due first, for a heap gives the greatest.
    fn cmp(&self, other: &Self) -> Ordering {
        (other.due, other.order).cmp(&(self.due, self.order))
    }
}

impl PartialOrd for OnItsWay {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for OnItsWay {
    fn eq(&self, other: &Self) -> bool {
        self.order == other.order
    }
}

impl Eq for OnItsWay {}

/// The first hosts of each prefix, interleaved by group so that neighbours in the list differ in group.
/// Clients are spread over their group, so that each half of it has some, should it be split.
fn clients(spec: &WorldSpec) -> Result<Vec<Client>> {
    let mut clients = Vec::new();
    for nth in 0..spec.clients_per_group {
        for (at, group) in spec.groups.iter().enumerate() {
            let step = (group.prefix.size() / u128::from(spec.clients_per_group)).max(1);
            let Some(IpAddr::V4(address)) = group.prefix.nth(u128::from(nth) * step) else {
                anyhow::bail!("{} has fewer than {} IPv4 addresses", group.prefix, spec.clients_per_group);
            };
            clients.push(Client { address, group: at });
        }
    }
    Ok(clients)
}

/// A place in a list of `len`, which must not be 0.
pub(super) fn below(rng: &mut Seeded, len: usize) -> usize {
    usize::try_from(rng.below(len as u64)).unwrap_or(0)
}

pub(super) fn micros(duration: std::time::Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX / 4)
}
