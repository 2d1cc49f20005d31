//! From the plan of a site to the rules of its switch.
//!
//! | table | holds |
//! |---|---|
//! | 0 | what a packet is, by port, tag and tunnel role; pushes the tag that a worker will see |
//! | 1 | from clients, by source prefix: to the local worker or into a tunnel |
//! | 2 | from the world, by outside slice: the same |
//! | 3 | from tunnels and relays, by source prefix: to the local worker |
//! | 4 | from tunnels and relays, by outside slice: to the local worker |
//!
//! The tag that table 0 pushes travels with the packet, so tables 3 and 4 need no rule per peer. A packet from
//! a tunnel only ever reaches table 3 or 4 or the inside port: it never leaves by a tunnel, so switches
//! cannot loop. What a worker sends to outside goes through table 2 as well, so that hairpin traffic is
//! steered again (RFC 4787, section 6); only when no pool has its destination does it leave.
//!
//! Sibling prefixes of one service with the same target become one rule, up to the client prefixes that the
//! operator wrote; so the number of rules follows the borders of the placement. The tunnel key and the
//! cookie of such a rule carry the highest epoch.
//!
//! # Limits of matching
//!
//! OpenFlow cannot match the identifier of ICMP, and later fragments carry no ports. An outside address that
//! belongs to one group as a whole is matched by address alone, whatever the protocol. On an address that
//! several groups share, TCP and UDP are told apart by port, and *everything else (ICMP, later fragments, other
//! protocols) goes to the owner of the lowest block of that address that has a plan*. The worker there knows
//! whose identifier or quoted port it is, and gives ICMP for others back by port (`dataplane::packet::by_port`): a
//! detour, and no packet lost. Later fragments are dropped and counted there. TCP and UDP for a block of a shared
//! address whose group has no plan here go there too, and are dropped and counted.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};

use flow::nat::NatSlices;
use flow::steer::{Side, Tag, TunnelKey, TunnelRole};
use flow::{Epoch, GroupId, Prefix, ServiceId, SiteId, WorkerId};

use super::rules::{Action, Match, PortNo, Rule, RuleKey, RuleSet, Vlan};
use super::steering::{Basis, Node, PRIORITY, Steering};

/// Classifies.
pub const TABLE_CLASSIFY: u8 = 0;
/// Steers what came from clients.
pub const TABLE_INSIDE: u8 = 1;
/// Steers what came from the world.
pub const TABLE_OUTSIDE: u8 = 2;
/// Delivers to local workers what came from clients of any site.
pub const TABLE_LOCAL_INSIDE: u8 = 3;
/// Delivers to local workers what came from the world at any site.
pub const TABLE_LOCAL_OUTSIDE: u8 = 4;

/// Addresses of a pool that have no plan.
const PRIORITY_POOL: u16 = 100;
/// What a worker sends to the world and no pool has.
const PRIORITY_LEAVE: u16 = 10;

/// How a peer site is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tunnel {
    /// The tunnel's port.
    pub port: PortNo,
    /// The peer's address, when the port is a flow-based tunnel that leads to all peers; such ports are an
    /// extension of Open vSwitch.
    pub remote: Option<Ipv4Addr>,
}

/// The ports of a site's switch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ports {
    /// Towards clients.
    pub inside: PortNo,
    /// Towards the world.
    pub outside: PortNo,
    /// How each peer site is reached.
    pub tunnels: BTreeMap<SiteId, Tunnel>,
    /// One per worker.
    pub workers: BTreeMap<WorkerId, PortNo>,
}

impl Ports {
    /// Number of the inside port by convention.
    pub const INSIDE: PortNo = PortNo(1);
    /// Number of the outside port by convention.
    pub const OUTSIDE: PortNo = PortNo(2);

    /// Number of a worker's port by convention: 100 + worker, and for the 900th and above 1400 + worker, behind
    /// the tunnels.
    #[must_use]
    pub fn worker(worker: WorkerId) -> PortNo {
        PortNo(if worker.0 < 900 { 100 + u32::from(worker.0) } else { 1_400 + u32::from(worker.0) })
    }

    /// Number of a tunnel's port by convention: 1000 + site.
    #[must_use]
    pub fn tunnel(site: SiteId) -> PortNo {
        PortNo(1_000 + u32::from(site.0))
    }

    /// Number of the one port of flow-based tunnels by convention; the numbers below it are of the tunnels of each
    /// site.
    pub const FLOW_BASED: PortNo = PortNo(1_300);

    /// All ports with their numbers by convention.
    #[must_use]
    pub fn conventional(
        peers: impl IntoIterator<Item = SiteId>,
        workers: impl IntoIterator<Item = WorkerId>,
    ) -> Self {
        let tunnel = |site| (site, Tunnel { port: Self::tunnel(site), remote: None });
        Self {
            inside: Self::INSIDE,
            outside: Self::OUTSIDE,
            tunnels: peers.into_iter().map(tunnel).collect(),
            workers: workers.into_iter().map(|worker| (worker, Self::worker(worker))).collect(),
        }
    }
}

/// What a site knows about one group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupPlan {
    /// Its epoch.
    pub epoch: Epoch,
    /// Where this site's ingress sends it now.
    pub steer: SiteId,
    /// Which local worker gets what comes by tunnel, by relay, or when `steer` is this site.
    pub local: Option<WorkerId>,
}

/// Everything that a site's rules follow from.
#[derive(Clone, Debug)]
pub struct SitePlan {
    /// The site.
    pub site: SiteId,
    /// Its switch.
    pub ports: Ports,
    /// Services that have outside slices; groups of others are steered by client prefix alone.
    pub services: BTreeMap<ServiceId, NatSlices>,
    /// The groups. Those without an entry are dropped by the switch.
    pub groups: BTreeMap<GroupId, GroupPlan>,
    /// Groups that are no more, with the local worker that still relays what comes for them by tunnel. No group with clients in
    /// common has a local worker.
    pub relayed: BTreeMap<GroupId, WorkerId>,
}

/// The cookie of a group's rules: service (6 bits), low 32 bits of the epoch, 26 bits of a hash of the prefix.
/// Cookie 0 is for rules that belong to no group.
#[must_use]
pub fn cookie(group: &GroupId, epoch: Epoch) -> u64 {
    u64::from(group.service.get()) << 58 | (epoch.0 & 0xffff_ffff) << 26 | prefix_hash(&group.prefix)
}

/// FNV-1a over address and length, folded to 26 bits.
fn prefix_hash(prefix: &Prefix) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    let mut add = |byte: u8| hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    match prefix.address() {
        IpAddr::V4(address) => address.octets().into_iter().for_each(&mut add),
        IpAddr::V6(address) => address.octets().into_iter().for_each(&mut add),
    }
    add(prefix.len());
    (hash >> 26 ^ hash >> 52 ^ hash) & 0x03ff_ffff
}

/// Compiles a plan. Work is about linear in groups and rules.
#[must_use]
pub fn compile(plan: &SitePlan) -> RuleSet {
    Compiled::new(plan).rules
}

/// What a plan says of one group.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PlanEntry {
    /// Of [`SitePlan::groups`].
    pub group: Option<GroupPlan>,
    /// Of [`SitePlan::relayed`].
    pub relayed: Option<WorkerId>,
}

/// A plan that was compiled, to be kept up with changes of its groups: work is that of the changes. When site, ports or services
/// change it is to be made anew.
#[derive(Clone, Debug)]
pub struct Compiled {
    frame: Frame,
    steer: Steering,
    local: Steering,
    rules: RuleSet,
}

impl Compiled {
    /// The rules of a plan.
    #[must_use]
    pub fn new(plan: &SitePlan) -> Self {
        let frame = Frame { site: plan.site, ports: plan.ports.clone(), services: plan.services.clone() };
        let mut compiled = Self {
            steer: Steering::new(TABLE_INSIDE, TABLE_OUTSIDE),
            local: Steering::new(TABLE_LOCAL_INSIDE, TABLE_LOCAL_OUTSIDE),
            rules: RuleSet::new(),
            frame,
        };
        compiled.frame.classify(&mut compiled.rules);
        let steer = plan.groups.iter().map(|(id, group)| (*id, compiled.frame.steer(group)));
        compiled.steer.fill(steer, &compiled.frame, &mut compiled.rules);
        let entry =
            |(id, group): (&GroupId, &GroupPlan)| (*id, PlanEntry { group: Some(*group), relayed: None });
        let mut entries: BTreeMap<_, _> = plan.groups.iter().map(entry).collect();
        for (id, worker) in &plan.relayed {
            entries.entry(*id).or_default().relayed = Some(*worker);
        }
        let local = entries.iter().filter_map(|(id, entry)| Some((*id, compiled.frame.local(entry)?)));
        compiled.local.fill(local, &compiled.frame, &mut compiled.rules);
        compiled
    }

    /// The rules. A copy costs nothing.
    #[must_use]
    pub fn rules(&self) -> &RuleSet {
        &self.rules
    }

    /// Brings the rules in line with a plan of which these groups may differ: each with all that the plan says of it by now.
    pub fn update(&mut self, changes: &BTreeMap<GroupId, PlanEntry>) {
        let Self { frame, steer, local, rules } = self;
        // What takes the place of groups that are no more overlaps them, so they go first.
        for (id, entry) in changes {
            if entry.group.is_none() {
                steer.set(*id, None, frame, rules);
            }
            if frame.local(entry).is_none() {
                local.set(*id, None, frame, rules);
            }
        }
        for (id, entry) in changes {
            if let Some(group) = &entry.group {
                steer.set(*id, Some(frame.steer(group)), frame, rules);
            }
            if let Some(node) = frame.local(entry) {
                local.set(*id, Some(node), frame, rules);
            }
        }
    }
}

/// Where the packets of a group go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Target {
    Worker(PortNo),
    Tunnel(Tunnel),
    /// Nowhere known: no rule.
    Nowhere,
}

/// What rules follow from beside the groups.
#[derive(Clone, Debug)]
struct Frame {
    site: SiteId,
    ports: Ports,
    services: BTreeMap<ServiceId, NatSlices>,
}

fn add(rules: &mut RuleSet, table: u8, priority: u16, matches: Match, rule: Rule) {
    rules.insert(RuleKey { table, priority, matches }, rule);
}

fn classify(rules: &mut RuleSet, matches: Match, actions: Vec<Action>, goto: Option<u8>) {
    add(rules, TABLE_CLASSIFY, PRIORITY, matches, Rule { cookie: 0, actions, goto });
}

impl Frame {
    /// Where this site's ingress sends a group.
    fn steer(&self, group: &GroupPlan) -> Node {
        let target = if group.steer == self.site {
            group.local.map_or(Target::Nowhere, |worker| self.worker_target(worker))
        } else {
            self.ports.tunnels.get(&group.steer).map_or(Target::Nowhere, |&tunnel| Target::Tunnel(tunnel))
        };
        Node { epoch: group.epoch, target }
    }

    /// Where what comes by tunnel goes. What has no worker here is left out, so that nothing stands between a group that is no more
    /// and the worker that relays for it.
    fn local(&self, entry: &PlanEntry) -> Option<Node> {
        let served = entry.group.and_then(|group| Some((group.epoch, group.local?)));
        let relayed = entry.relayed.map(|worker| (Epoch::default(), worker));
        let (epoch, worker) = served.or(relayed)?;
        let target = self.worker_target(worker);
        (target != Target::Nowhere).then_some(Node { epoch, target })
    }

    fn worker_target(&self, worker: WorkerId) -> Target {
        self.ports.workers.get(&worker).map_or(Target::Nowhere, |&port| Target::Worker(port))
    }

    fn classify(&self, rules: &mut RuleSet) {
        self.classify_ingress(rules);
        self.classify_tunnels(rules);
        self.classify_workers(rules);
        self.guard_pools(rules);
    }

    /// Tags from clients or the world would pass for ours, so only packets without one come in.
    fn classify_ingress(&self, rules: &mut RuleSet) {
        let own = self.site;
        let from = |port| Match::any().in_port(port).vlan(Vlan::Absent);
        let tag = |side| vec![Action::PushVlan(Tag::Direct(side, own).vlan())];
        classify(rules, from(self.ports.inside), tag(Side::Inside), Some(TABLE_INSIDE));
        classify(rules, from(self.ports.outside), tag(Side::Outside), Some(TABLE_OUTSIDE));
    }

    fn classify_tunnels(&self, rules: &mut RuleSet) {
        for (&peer, &tunnel) in &self.ports.tunnels {
            let deliveries = [
                (TunnelRole::Direct(Side::Inside), Tag::Direct(Side::Inside, peer), TABLE_LOCAL_INSIDE),
                (TunnelRole::Direct(Side::Outside), Tag::Direct(Side::Outside, peer), TABLE_LOCAL_OUTSIDE),
                (TunnelRole::Relayed(Side::Inside), Tag::Relayed(Side::Inside, peer), TABLE_LOCAL_INSIDE),
                (TunnelRole::Relayed(Side::Outside), Tag::Relayed(Side::Outside, peer), TABLE_LOCAL_OUTSIDE),
                (TunnelRole::Marker, Tag::Marker(peer), TABLE_LOCAL_INSIDE),
                (TunnelRole::Cut, Tag::Cut(peer), TABLE_LOCAL_INSIDE),
            ];
            for (role, tag, table) in deliveries {
                classify(rules, from_tunnel(tunnel, role), vec![Action::PushVlan(tag.vlan())], Some(table));
            }
            let to_client = vec![Action::Output(self.ports.inside)];
            classify(rules, from_tunnel(tunnel, TunnelRole::ToClient), to_client, None);
        }
    }

    fn classify_workers(&self, rules: &mut RuleSet) {
        let plan = self;
        for &port in plan.ports.workers.values() {
            let from = |tag: Tag| Match::any().in_port(port).vlan(Vlan::Tag(tag.vlan()));
            // Hairpin packets may be for the worker that sent them.
            let as_from_outside = vec![Action::ClearInPort];
            classify(rules, from(Tag::ToOutside), as_from_outside, Some(TABLE_OUTSIDE));
            self.classify_worker_local(from, rules);
            for (&peer, &tunnel) in &plan.ports.tunnels {
                let roles = [
                    (Tag::ToClient(peer), TunnelRole::ToClient),
                    (Tag::Relay(Side::Inside, peer), TunnelRole::Relayed(Side::Inside)),
                    (Tag::Relay(Side::Outside, peer), TunnelRole::Relayed(Side::Outside)),
                    (Tag::SendCut(peer), TunnelRole::Cut),
                ];
                for (tag, role) in roles {
                    // The worker's tag names neither service nor epoch, so the key has none.
                    let actions = into_tunnel(TunnelKey::new(role, ServiceId::default(), Epoch(0)), tunnel);
                    classify(rules, from(tag), actions, None);
                }
            }
        }
    }

    fn classify_worker_local(&self, from: impl Fn(Tag) -> Match, rules: &mut RuleSet) {
        let own = self.site;
        let to_client = vec![Action::PopVlan, Action::Output(self.ports.inside)];
        classify(rules, from(Tag::ToClient(own)), to_client, None);
        let retags = [
            (Tag::Relay(Side::Inside, own), Tag::Relayed(Side::Inside, own), TABLE_LOCAL_INSIDE),
            (Tag::Relay(Side::Outside, own), Tag::Relayed(Side::Outside, own), TABLE_LOCAL_OUTSIDE),
            (Tag::SendCut(own), Tag::Cut(own), TABLE_LOCAL_INSIDE),
        ];
        for (tag, to, table) in retags {
            classify(rules, from(tag), vec![Action::SetVlan(to.vlan())], Some(table));
        }
    }

    /// Addresses of a pool without a plan are dropped, wherever they come from; everything else that a
    /// worker sent to the world leaves.
    fn guard_pools(&self, rules: &mut RuleSet) {
        let plan = self;
        for prefix in plan.services.values().flat_map(|slices| &slices.spec().pool) {
            add(rules, TABLE_OUTSIDE, PRIORITY_POOL, Match::any().ip_dst(prefix), Rule::default());
        }
        let leave = Rule {
            cookie: 0,
            actions: vec![Action::PopVlan, Action::Output(plan.ports.outside)],
            goto: None,
        };
        let from_worker = Match::any().vlan(Vlan::Tag(Tag::ToOutside.vlan()));
        add(rules, TABLE_OUTSIDE, PRIORITY_LEAVE, from_worker, leave);
    }
}

impl Basis for Frame {
    fn slices(&self, service: ServiceId) -> Option<&NatSlices> {
        self.services.get(&service)
    }

    fn rule(&self, group: &GroupId, node: Node, table: u8, side: Side) -> Rule {
        let actions = match node.target {
            Target::Tunnel(tunnel) => {
                let key = TunnelKey::new(TunnelRole::Direct(side), group.service, node.epoch);
                into_tunnel(key, tunnel)
            }
            // In table 2 the packet may have come from a worker (hairpin), so its tag is not yet this one.
            Target::Worker(port) if table == TABLE_OUTSIDE => {
                let tag = Tag::Direct(side, self.site);
                vec![Action::SetVlan(tag.vlan()), Action::Output(port)]
            }
            Target::Worker(port) => vec![Action::Output(port)],
            Target::Nowhere => Vec::new(),
        };
        Rule { cookie: cookie(group, node.epoch), actions, goto: None }
    }
}

/// Behind table 0 every packet has a tag. Open vSwitch wants to see that before it lets a rule remove or change
/// one.
pub(super) fn tagged() -> Match {
    Match::any().vlan(Vlan::Present)
}

fn from_tunnel(tunnel: Tunnel, role: TunnelRole) -> Match {
    let key = u64::from(role.number() << 20);
    let matches =
        Match::any().in_port(tunnel.port).vlan(Vlan::Absent).tunnel_id(key, TunnelKey::ROLE_MASK.into());
    tunnel.remote.map_or(matches, |remote| matches.tunnel_src(remote))
}

fn into_tunnel(key: TunnelKey, tunnel: Tunnel) -> Vec<Action> {
    let mut actions = vec![Action::PopVlan];
    actions.extend(tunnel.enter(key));
    actions
}

impl Tunnel {
    /// What sends a packet into the tunnel.
    pub(crate) fn enter(self, key: TunnelKey) -> impl Iterator<Item = Action> {
        let remote = self.remote.map(Action::SetTunnelDst);
        std::iter::once(Action::SetTunnel(key.vni().into())).chain(remote).chain([Action::Output(self.port)])
    }
}
