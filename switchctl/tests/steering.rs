//! Compiled rules, evaluated by the embedded switch's own tables, send every packet where the plan says.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};

use flow::nat::{NatSlices, NatSpec, Subscriber};
use flow::steer::{Side, Tag, TunnelKey, TunnelRole};
use flow::{Epoch, GroupId, Prefix, ServiceId, SiteId, WorkerId};
use proptest::prelude::*;
use switchctl::core::rules::{ETH_IPV4, PROTO_ICMP, PROTO_TCP, PROTO_UDP};
use switchctl::ofp::{self, Command, FlowModMsg, Message};
use switchctl::softswitch::packet::Packet;
use switchctl::softswitch::pipeline::Pipeline;
use switchctl::{Compiled, GroupPlan, PlanEntry, PortNo, Ports, SitePlan, compile};

const OWN: SiteId = SiteId(1);
const PEERS: [SiteId; 2] = [SiteId(2), SiteId(200)];
const WORKERS: [WorkerId; 2] = [WorkerId(0), WorkerId(1)];

/// A copy that left: port, tag if any, tunnel key.
#[derive(Debug, PartialEq)]
struct Sent {
    port: PortNo,
    tag: Option<Tag>,
    key: Option<TunnelKey>,
}

fn frame(tag: Option<Tag>, src: Ipv4Addr, dst: Ipv4Addr, protocol: u8, dst_port: u16) -> Vec<u8> {
    let mut frame = vec![2; 12];
    if let Some(tag) = tag {
        frame.extend_from_slice(&[0x81, 0]);
        frame.extend_from_slice(&tag.vlan().to_be_bytes());
    }
    frame.extend_from_slice(&ETH_IPV4.to_be_bytes());
    frame.extend_from_slice(&[0x45, 0, 0, 28, 0, 0, 0, 0, 64, protocol, 0, 0]);
    frame.extend_from_slice(&src.octets());
    frame.extend_from_slice(&dst.octets());
    frame.extend_from_slice(&[0x12, 0x34]);
    frame.extend_from_slice(&dst_port.to_be_bytes());
    frame.extend_from_slice(&[0, 8, 0, 0]);
    frame
}

fn send(pipeline: &mut Pipeline, in_port: PortNo, key: Option<TunnelKey>, frame: &[u8]) -> Vec<Sent> {
    let mut packet = Packet::default();
    assert!(packet.load(frame));
    let mut sent = Vec::new();
    let key = key.map_or(0, |key| key.vni().into());
    pipeline.process(&mut packet, in_port, key, &mut |port, packet, key| {
        let tagged = packet.frame()[12..14] == [0x81, 0];
        let tag = tagged.then(|| u16::from_be_bytes([packet.frame()[14], packet.frame()[15]]));
        let tunnel = PEERS.iter().any(|&peer| Ports::tunnel(peer) == port);
        let key = u32::try_from(key).unwrap();
        sent.push(Sent {
            port,
            tag: tag.map(|vlan| Tag::from_vlan(vlan).unwrap()),
            key: tunnel.then(|| TunnelKey::from_vni(key).unwrap()),
        });
    });
    sent
}

/// One service over 100.64.0.0/22 whose leaves are cut at random, with a plan for most of them.
#[derive(Clone, Debug)]
struct World {
    plan: SitePlan,
    slices: NatSlices,
}

fn service() -> ServiceId {
    ServiceId::new(3).unwrap()
}

fn leaves(root: Prefix, cuts: &[bool]) -> Vec<Prefix> {
    let (mut open, mut leaves, mut cuts) = (vec![root], Vec::new(), cuts.iter());
    while let Some(prefix) = open.pop() {
        match prefix.halves() {
            Some((low, high)) if *cuts.next().unwrap_or(&false) => open.extend([low, high]),
            _ => leaves.push(prefix),
        }
    }
    leaves
}

fn worlds() -> impl Strategy<Value = World> {
    let entry = (0u64..5, 0usize..4, proptest::option::of(0usize..2), 0u8..10);
    let entries = proptest::collection::vec(entry, 64);
    (proptest::collection::vec(any::<bool>(), 0..60), entries, 1u16..20_000).prop_map(
        |(cuts, entries, ports)| {
            let roots: Vec<Prefix> = vec!["100.64.0.0/23".parse().unwrap(), "100.64.2.0/25".parse().unwrap()];
            let spec = NatSpec {
                clients: roots.clone(),
                pool: vec!["198.51.100.0/24".parse().unwrap(), "203.0.112.0/22".parse().unwrap()],
                ports_per_subscriber: ports,
                first_port: 1024,
                port_key: 1,
            };
            let slices = NatSlices::new(spec).unwrap();
            let all =
                roots.iter().enumerate().flat_map(|(i, root)| leaves(*root, &cuts[(cuts.len() / 2) * i..]));
            let groups =
                all.zip(entries.iter().cycle()).filter(|(_, entry)| entry.3 != 0).map(|(prefix, entry)| {
                    let steer = [OWN, OWN, PEERS[0], PEERS[1]][entry.1];
                    let local = entry.2.map(|worker| WORKERS[worker]);
                    (
                        GroupId { service: service(), prefix },
                        GroupPlan { epoch: Epoch(entry.0), steer, local },
                    )
                });
            let plan = SitePlan {
                site: OWN,
                ports: Ports::conventional(PEERS, WORKERS),
                services: BTreeMap::from([(service(), slices.clone())]),
                groups: groups.collect(),
                relayed: BTreeMap::new(),
            };
            World { plan, slices }
        },
    )
}

impl World {
    fn group(&self, client: Ipv4Addr) -> Option<(&GroupId, &GroupPlan)> {
        self.plan.groups.iter().find(|(group, _)| group.prefix.contains(IpAddr::V4(client)))
    }

    /// Where the ingress of this site must send a packet of a client's group. `ignore` the key's epoch, which
    /// depends on what was merged; it is checked to be at least the group's.
    fn steered(
        &self,
        client: Option<Ipv4Addr>,
        side: Side,
    ) -> Vec<(PortNo, Option<Tag>, Option<TunnelRole>)> {
        let Some((_, plan)) = client.and_then(|client| self.group(client)) else { return Vec::new() };
        if plan.steer == OWN {
            return self.local(client, Tag::Direct(side, OWN));
        }
        vec![(Ports::tunnel(plan.steer), None, Some(TunnelRole::Direct(side)))]
    }

    fn local(&self, client: Option<Ipv4Addr>, tag: Tag) -> Vec<(PortNo, Option<Tag>, Option<TunnelRole>)> {
        let worker = client.and_then(|client| self.group(client)).and_then(|(_, plan)| plan.local);
        worker.map(|worker| (Ports::worker(worker), Some(tag), None)).into_iter().collect()
    }

    fn owner(&self, address: Ipv4Addr, port: u16) -> Option<Ipv4Addr> {
        self.slices.owner(address, port).and_then(|subscriber| self.slices.client(subscriber))
    }
}

fn plain(sent: &[Sent]) -> Vec<(PortNo, Option<Tag>, Option<TunnelRole>)> {
    sent.iter().map(|sent| (sent.port, sent.tag, sent.key.map(|key| key.role))).collect()
}

const WORLD: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 9);

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn the_embedded_switch_takes_every_rule_that_is_compiled(world in worlds()) {
        let mut pipeline = Pipeline::default();
        let rules = compile(&world.plan);
        for (key, rule) in &rules {
            let change = Message::FlowMod(FlowModMsg::new(Command::Add, *key, rule.clone()));
            let (_, read) = ofp::decode(&ofp::encode(1, &change)).unwrap();
            let Message::FlowMod(change) = read else { panic!("{read:?}") };
            prop_assert_eq!(pipeline.apply(&change), Ok(()), "{:?} {:?}", key, rule);
        }
        prop_assert_eq!(pipeline.len(), rules.len());
    }

    #[test]
    fn every_packet_goes_where_the_plan_says(
        world in worlds(), picks in proptest::collection::vec((0u32..640, any::<u16>(), any::<bool>()), 40),
    ) {
        let rules = compile(&world.plan);
        let mut pipeline = Pipeline::with_rules(&rules);
        for (host, port, tcp) in picks {
            let protocol = if tcp { PROTO_TCP } else { PROTO_UDP };
            let client = Ipv4Addr::from(0x6440_0000 + host);
            let known = world.group(client).map(|_| client);

            // From a client.
            let out = frame(None, client, WORLD, protocol, port);
            let sent = send(&mut pipeline, Ports::INSIDE, None, &out);
            prop_assert_eq!(plain(&sent), world.steered(known, Side::Inside));
            if let Some(key) = sent.first().and_then(|sent| sent.key) {
                prop_assert_eq!(key.service, service());
                prop_assert!(u64::from(key.epoch_low) >= world.group(client).unwrap().1.epoch.0);
            }

            // From the world, to the block of that client or to any port.
            let block = world.slices.subscriber(client).and_then(|subscriber| world.slices.block(subscriber));
            let (address, to) = block.map_or((Ipv4Addr::new(198, 51, 100, 7), port), |block| {
                (block.address, if host % 7 == 0 { port } else { block.first + port % block.count })
            });
            let back = frame(None, WORLD, address, protocol, to);
            let owner = world.owner(address, to);
            let owned = owner.and_then(|owner| world.group(owner)).is_some();
            let sent = send(&mut pipeline, Ports::OUTSIDE, None, &back);
            let expected = world.steered(owner, Side::Outside);
            if owned && !expected.is_empty() {
                prop_assert_eq!(plain(&sent), expected);
            }
            // What nobody owns may be carried to an owner of the same address, but never out of the switch
            // by a client or world port.
            prop_assert!(sent.iter().all(|sent| sent.port != Ports::INSIDE && sent.port != Ports::OUTSIDE));

            // Hairpin: the same from a worker, also to itself.
            for worker in WORKERS {
                let hairpin = frame(Some(Tag::ToOutside), WORLD, address, protocol, to);
                let again = send(&mut pipeline, Ports::worker(worker), None, &hairpin);
                prop_assert_eq!(plain(&again), plain(&sent));
            }

            // From a tunnel and relayed by a worker: to the local worker only.
            for (role, tag) in [
                (TunnelRole::Direct(Side::Inside), Tag::Direct(Side::Inside, PEERS[1])),
                (TunnelRole::Relayed(Side::Inside), Tag::Relayed(Side::Inside, PEERS[1])),
                (TunnelRole::Marker, Tag::Marker(PEERS[1])),
                (TunnelRole::Cut, Tag::Cut(PEERS[1])),
            ] {
                let key = TunnelKey::new(role, ServiceId::default(), Epoch(9));
                let sent = send(&mut pipeline, Ports::tunnel(PEERS[1]), Some(key), &out);
                prop_assert_eq!(plain(&sent), world.local(known, tag));
            }
            let expected = world.local(owner, Tag::Relayed(Side::Outside, PEERS[0]));
            if !expected.is_empty() {
                let key = TunnelKey::new(TunnelRole::Relayed(Side::Outside), service(), Epoch(9));
                let sent = send(&mut pipeline, Ports::tunnel(PEERS[0]), Some(key), &back);
                prop_assert_eq!(plain(&sent), expected);
            }
        }
    }

    /// Groups change, come, go, split and merge, all at once or one after another.
    #[test]
    fn a_plan_that_is_kept_up_has_the_rules_of_one_compiled_anew(
        worlds in (worlds(), worlds()), relays in proptest::collection::vec(0usize..64, 0..3),
        edits in proptest::collection::vec((0usize..64, 0u64..5, 0usize..4, proptest::option::of(0usize..2)), 0..30),
    ) {
        let (from, to) = worlds;
        let mut plan = from.plan;
        let mut compiled = Compiled::new(&plan);
        for (nth, epoch, steer, local) in edits {
            let Some((id, group)) = plan.groups.iter_mut().nth(nth) else { continue };
            let steer = [OWN, OWN, PEERS[0], PEERS[1]][steer];
            *group = GroupPlan { epoch: Epoch(epoch), steer, local: local.map(|worker| WORKERS[worker]) };
            compiled.update(&BTreeMap::from([(*id, PlanEntry { group: Some(*group), relayed: None })]));
            prop_assert_eq!(compiled.rules(), &compile(&plan));
        }
        // The services are those of the second from the start: only groups may change.
        let mut next = SitePlan { groups: to.plan.groups, services: plan.services.clone(), ..plan.clone() };
        for nth in relays {
            // What relays for a group that is no more has no other worker.
            if let Some((&id, _)) = next.groups.iter().nth(nth) {
                next.groups.remove(&id);
                next.relayed.insert(id, WORKERS[nth % 2]);
            }
        }
        let ids = plan.groups.keys().chain(next.groups.keys()).chain(next.relayed.keys());
        let entry = |id: &GroupId| {
            let group = next.groups.get(id).copied();
            (*id, PlanEntry { group, relayed: next.relayed.get(id).copied() })
        };
        compiled.update(&ids.map(entry).collect());
        prop_assert_eq!(compiled.rules(), &compile(&next));
        let all = plan.groups.keys().chain(next.groups.keys()).chain(next.relayed.keys());
        let back = all.map(|id| (*id, PlanEntry { group: plan.groups.get(id).copied(), relayed: None }));
        compiled.update(&back.collect());
        prop_assert_eq!(compiled.rules(), &compile(&plan));
    }

    #[test]
    fn rules_follow_the_borders_of_the_placement(world in worlds()) {
        // As many rules per border as its masks need: at most 16 port masks at each end of a slice, twice for
        // TCP and UDP, and some prefixes; four tables.
        let plans: Vec<_> = world.plan.groups.iter().collect();
        let borders = 2 + plans.windows(2).filter(|pair| {
            (pair[0].1.steer, pair[0].1.local) != (pair[1].1.steer, pair[1].1.local)
                || pair[0].0.prefix.nth(pair[0].0.prefix.size()) != Some(pair[1].0.prefix.address())
        }).count();
        let rules = compile(&world.plan).len();
        prop_assert!(rules < 100 + borders * 10 * 80, "{rules} rules for {borders} borders");
    }

    #[test]
    fn a_packet_from_a_tunnel_never_leaves_by_a_tunnel(world in worlds(), vni in 0u32..1 << 24, host: u16, port: u16) {
        let mut pipeline = Pipeline::with_rules(&compile(&world.plan));
        let client = Ipv4Addr::from(0x6440_0000 + u32::from(host) % 640);
        for dst in [WORLD, Ipv4Addr::new(198, 51, 100, 1)] {
            let mut packet = Packet::default();
            prop_assert!(packet.load(&frame(None, client, dst, PROTO_UDP, port)));
            let mut ports = Vec::new();
            pipeline.process(&mut packet, Ports::tunnel(PEERS[0]), vni.into(), &mut |port, _, _| ports.push(port));
            prop_assert!(ports.iter().all(|port| *port == Ports::INSIDE || port.0 < 1000 && *port != Ports::OUTSIDE));
        }
    }
}

fn small() -> World {
    let root: Prefix = "100.64.0.0/24".parse().unwrap();
    let spec = NatSpec {
        clients: vec![root],
        pool: vec!["198.51.100.0/29".parse().unwrap()],
        ports_per_subscriber: 2016,
        first_port: 1024,
        port_key: 1,
    };
    let slices = NatSlices::new(spec).unwrap();
    let (low, high) = root.halves().unwrap();
    let plan = |steer, local| GroupPlan { epoch: Epoch(1), steer, local };
    let groups = BTreeMap::from([
        (GroupId { service: service(), prefix: low }, plan(OWN, Some(WORKERS[0]))),
        (GroupId { service: service(), prefix: high }, plan(PEERS[0], None)),
    ]);
    let services = BTreeMap::from([(service(), slices.clone())]);
    World {
        plan: SitePlan {
            site: OWN,
            ports: Ports::conventional(PEERS, WORKERS),
            services,
            groups,
            relayed: BTreeMap::new(),
        },
        slices,
    }
}

#[test]
fn siblings_with_one_target_are_one_rule_with_the_highest_epoch() {
    let mut world = small();
    let before = compile(&world.plan).len();
    for (i, group) in world.plan.groups.values_mut().enumerate() {
        *group = GroupPlan { epoch: Epoch(5 + i as u64), steer: PEERS[1], local: None };
    }
    let rules = compile(&world.plan);
    assert!(rules.len() < before);
    let group = GroupId { service: service(), prefix: "100.64.0.0/24".parse().unwrap() };
    let cookie = switchctl::core::compile::cookie(&group, Epoch(6));
    // One rule by source, and the whole pool by destination.
    assert_eq!(rules.values().filter(|rule| rule.cookie != 0).count(), 2);
    assert!(rules.values().all(|rule| rule.cookie == 0 || rule.cookie == cookie));
}

#[test]
fn icmp_to_a_shared_address_goes_to_the_owner_of_its_lowest_block() {
    let mut world = small();
    let (first, _) = world.plan.groups.pop_first().unwrap();
    let mut rest = first.prefix;
    // Cut down to single subscribers, so that one address has several owners.
    while let Some((low, high)) = rest.halves() {
        let plan = GroupPlan { epoch: Epoch(1), steer: OWN, local: Some(WORKERS[1]) };
        world.plan.groups.insert(GroupId { service: service(), prefix: high }, plan);
        rest = low;
    }
    let plan = GroupPlan { epoch: Epoch(1), steer: PEERS[1], local: None };
    world.plan.groups.insert(GroupId { service: service(), prefix: rest }, plan);
    let mut pipeline = Pipeline::with_rules(&compile(&world.plan));
    let address = world.slices.block(Subscriber(0)).unwrap().address;
    let sent = send(&mut pipeline, Ports::OUTSIDE, None, &frame(None, WORLD, address, PROTO_ICMP, 0));
    assert_eq!(plain(&sent), [(Ports::tunnel(PEERS[1]), None, Some(TunnelRole::Direct(Side::Outside)))]);
}

#[test]
fn what_workers_send_leaves_as_their_tag_says() {
    let world = small();
    let mut pipeline = Pipeline::with_rules(&compile(&world.plan));
    let client = Ipv4Addr::new(100, 64, 0, 1);
    let mut from_worker = |tag, src, dst| {
        plain(&send(
            &mut pipeline,
            Ports::worker(WORKERS[1]),
            None,
            &frame(Some(tag), src, dst, PROTO_UDP, 53),
        ))
    };
    let peer = Ports::tunnel(PEERS[0]);
    assert_eq!(from_worker(Tag::ToOutside, client, WORLD), [(Ports::OUTSIDE, None, None)]);
    assert_eq!(from_worker(Tag::ToClient(OWN), WORLD, client), [(Ports::INSIDE, None, None)]);
    let to_client = [(peer, None, Some(TunnelRole::ToClient))];
    assert_eq!(from_worker(Tag::ToClient(PEERS[0]), WORLD, client), to_client);
    let relayed = [(peer, None, Some(TunnelRole::Relayed(Side::Inside)))];
    assert_eq!(from_worker(Tag::Relay(Side::Inside, PEERS[0]), client, WORLD), relayed);
    assert_eq!(from_worker(Tag::SendCut(PEERS[0]), client, client), [(peer, None, Some(TunnelRole::Cut))]);
    let local = Ports::worker(WORKERS[0]);
    let relayed = [(local, Some(Tag::Relayed(Side::Inside, OWN)), None)];
    assert_eq!(from_worker(Tag::Relay(Side::Inside, OWN), client, WORLD), relayed);
    assert_eq!(from_worker(Tag::SendCut(OWN), client, client), [(local, Some(Tag::Cut(OWN)), None)]);
    // No worker may pretend to be the switch.
    assert_eq!(from_worker(Tag::Direct(Side::Inside, OWN), client, WORLD), []);
}

#[test]
fn addresses_of_the_pool_without_a_plan_are_dropped() {
    let mut world = small();
    world.plan.groups.clear();
    let mut pipeline = Pipeline::with_rules(&compile(&world.plan));
    let pool = Ipv4Addr::new(198, 51, 100, 3);
    let hairpin = frame(Some(Tag::ToOutside), WORLD, pool, PROTO_UDP, 5000);
    assert_eq!(send(&mut pipeline, Ports::worker(WORKERS[0]), None, &hairpin), []);
    let plain = frame(None, WORLD, pool, PROTO_UDP, 5000);
    assert_eq!(send(&mut pipeline, Ports::OUTSIDE, None, &plain), []);
    // And nothing from the world goes back to it.
    let other = frame(None, WORLD, Ipv4Addr::new(8, 8, 8, 8), PROTO_UDP, 5000);
    assert_eq!(send(&mut pipeline, Ports::OUTSIDE, None, &other), []);
}
