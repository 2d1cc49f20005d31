//! Groups that are steered alike, as one rule where their prefixes allow it, kept up with changes one by one.
//!
//! A node is a prefix whose groups all go to one place: a group itself, or a prefix of which both halves are nodes with one target,
//! up to the client prefixes that the operator wrote. A *top* is a node whose parent is none; tops become rules. When a group
//! changes, only nodes above it can, and only tops along that way and beside it come or go; so the work is that of the change.

use std::collections::{BTreeMap, HashMap};

use flow::nat::{NatSlices, OutsideMatch};
use flow::steer::Side;
use flow::{Epoch, Family, GroupId, Prefix, ServiceId};

use super::compile::{Target, tagged};
use super::rules::{ETH_IPV4, PROTO_TCP, PROTO_UDP, Rule, RuleKey, RuleSet};

/// Prefix rules: this plus the prefix length, so that the longest wins.
pub(super) const PRIORITY: u16 = 1_000;
/// Outside rules with ports; above every rule by address alone.
pub(super) const PRIORITY_PORTS: u16 = 2_000;

/// Where all groups of a prefix go, with the highest of their epochs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Node {
    pub(super) epoch: Epoch,
    pub(super) target: Target,
}

impl Node {
    fn with(self, other: Self) -> Option<Self> {
        let merged = Self { epoch: self.epoch.max(other.epoch), ..self };
        (self.target == other.target).then_some(merged)
    }
}

/// What rules are made of.
pub(super) trait Basis {
    /// The outside slices of a service, if it has any.
    fn slices(&self, service: ServiceId) -> Option<&NatSlices>;
    /// The rule of a prefix in one of the two tables.
    fn rule(&self, group: &GroupId, node: Node, table: u8, side: Side) -> Rule;
}

/// The two tables that steer by the same groups: by client, and by outside slice.
#[derive(Clone, Debug)]
pub(super) struct Steering {
    inside: u8,
    outside: u8,
    nodes: HashMap<GroupId, Node>,
    /// Outside addresses that several tops share: their blocks by first port, for what has no ports goes to the lowest.
    shared: BTreeMap<Prefix, BTreeMap<u16, Rule>>,
}

impl Steering {
    pub(super) fn new(inside: u8, outside: u8) -> Self {
        Self { inside, outside, nodes: HashMap::new(), shared: BTreeMap::new() }
    }

    /// All groups at once, in order.
    pub(super) fn fill(
        &mut self,
        groups: impl Iterator<Item = (GroupId, Node)>,
        basis: &impl Basis,
        rules: &mut RuleSet,
    ) {
        let mut tops: Vec<(GroupId, Node)> = Vec::new();
        // Groups, and about as many prefixes above them.
        self.nodes.reserve(2 * groups.size_hint().0);
        for (group, node) in groups {
            self.nodes.insert(group, node);
            tops.push((group, node));
            while let [.., (low, _), (high, _)] = tops.as_slice()
                && low.prefix.sibling() == Some(high.prefix)
                && low.service == high.service
                && let Some(parent) = parent(low, basis)
                && let Some(merged) = self.merged(&parent)
            {
                tops.truncate(tops.len() - 2);
                self.nodes.insert(parent, merged);
                tops.push((parent, merged));
            }
        }
        for (group, node) in tops {
            self.add(&group, node, basis, rules);
        }
    }

    /// A group goes elsewhere, is new, or is no more.
    pub(super) fn set(
        &mut self,
        group: GroupId,
        node: Option<Node>,
        basis: &impl Basis,
        rules: &mut RuleSet,
    ) {
        let before = self.top_of(group, basis).and_then(|top| Some((top, *self.nodes.get(&top)?)));
        match node {
            Some(node) => drop(self.nodes.insert(group, node)),
            None => drop(self.nodes.remove(&group)),
        }
        self.update_above(group, basis);
        let after = self.top_of(group, basis).and_then(|top| Some((top, *self.nodes.get(&top)?)));
        if before == after {
            return;
        }
        let len = |top: &Option<(GroupId, Node)>| top.map(|(top, _)| top.prefix.len());
        let below = |top: &Option<(GroupId, Node)>| top.map_or(group, |(top, _)| top);
        let is_above = |a: Option<u8>, b: Option<u8>| a.is_some_and(|a| b.is_none_or(|b| a < b));
        let parted = if is_above(len(&before), len(&after)) {
            before.map(|(top, _)| beside(below(&after), top))
        } else {
            None
        };
        let joined = if is_above(len(&after), len(&before)) {
            after.map(|(top, _)| beside(below(&before), top))
        } else {
            None
        };
        for top in before.map(|(top, _)| top).into_iter().chain(joined.into_iter().flatten()) {
            self.remove(&top, basis, rules);
        }
        let parted = parted.into_iter().flatten().filter_map(|top| Some((top, *self.nodes.get(&top)?)));
        for (top, node) in after.into_iter().chain(parted).collect::<Vec<_>>() {
            self.add(&top, node, basis, rules);
        }
    }

    fn merged(&self, parent: &GroupId) -> Option<Node> {
        let (low, high) = parent.prefix.halves()?;
        let node = |prefix| self.nodes.get(&GroupId { prefix, ..*parent });
        node(low)?.with(*node(high)?)
    }

    fn update_above(&mut self, group: GroupId, basis: &impl Basis) {
        let mut at = group;
        while let Some(above) = parent(&at, basis) {
            let merged = self.merged(&above);
            if self.nodes.get(&above).copied() == merged {
                return;
            }
            match merged {
                Some(node) => drop(self.nodes.insert(above, node)),
                None => drop(self.nodes.remove(&above)),
            }
            at = above;
        }
    }

    /// The top above a node, or the node itself.
    fn top_of(&self, group: GroupId, basis: &impl Basis) -> Option<GroupId> {
        self.nodes.get(&group)?;
        let above = std::iter::successors(Some(group), |at| {
            parent(at, basis).filter(|at| self.nodes.contains_key(at))
        });
        above.last()
    }

    fn add(&mut self, top: &GroupId, node: Node, basis: &impl Basis, rules: &mut RuleSet) {
        if node.target == Target::Nowhere {
            return;
        }
        let inside = basis.rule(top, node, self.inside, Side::Inside);
        rules.insert(inside_key(self.inside, &top.prefix), inside);
        let Some(slices) = basis.slices(top.service) else { return };
        let outside = basis.rule(top, node, self.outside, Side::Outside);
        for slice in slices.slice(&top.prefix) {
            for key in outside_keys(self.outside, &slice) {
                rules.insert(key, outside.clone());
            }
            if slice.port_mask != 0 {
                self.shared.entry(slice.addresses).or_default().insert(slice.port, outside.clone());
                self.refresh_shared(&slice.addresses, rules);
            }
        }
    }

    fn remove(&mut self, top: &GroupId, basis: &impl Basis, rules: &mut RuleSet) {
        rules.remove(&inside_key(self.inside, &top.prefix));
        let Some(slices) = basis.slices(top.service) else { return };
        for slice in slices.slice(&top.prefix) {
            for key in outside_keys(self.outside, &slice) {
                rules.remove(&key);
            }
            if slice.port_mask != 0 {
                if let Some(blocks) = self.shared.get_mut(&slice.addresses) {
                    blocks.remove(&slice.port);
                }
                self.refresh_shared(&slice.addresses, rules);
            }
        }
    }

    /// What has no ports goes to the lowest block.
    fn refresh_shared(&mut self, address: &Prefix, rules: &mut RuleSet) {
        let key = address_key(self.outside, address);
        match self.shared.get(address).and_then(|blocks| blocks.values().next()) {
            Some(lowest) => drop(rules.insert(key, lowest.clone())),
            None => {
                rules.remove(&key);
                self.shared.remove(address);
            }
        }
    }
}

/// Groups merge within the client prefixes of their service, since outside slices exist only there.
fn parent(group: &GroupId, basis: &impl Basis) -> Option<GroupId> {
    let parent = GroupId { prefix: group.prefix.parent()?, ..*group };
    let within = |slices: &NatSlices| slices.spec().clients.iter().any(|whole| whole.covers(&parent.prefix));
    basis.slices(group.service).is_none_or(within).then_some(parent)
}

/// The other halves along the way from a prefix to one that has it.
fn beside(from: GroupId, top: GroupId) -> impl Iterator<Item = GroupId> {
    let way = std::iter::successors(Some(from.prefix), Prefix::parent);
    let way = way.take_while(move |prefix| *prefix != top.prefix);
    way.filter_map(move |prefix| Some(GroupId { prefix: prefix.sibling()?, ..from }))
}

fn inside_key(table: u8, prefix: &Prefix) -> RuleKey {
    RuleKey { table, priority: PRIORITY + u16::from(prefix.len()), matches: tagged().ip_src(prefix) }
}

fn address_key(table: u8, addresses: &Prefix) -> RuleKey {
    RuleKey { table, priority: PRIORITY + u16::from(addresses.len()), matches: tagged().ip_dst(addresses) }
}

/// By address alone, or for TCP and UDP by address and port.
fn outside_keys(table: u8, slice: &OutsideMatch) -> Vec<RuleKey> {
    if slice.port_mask == 0 {
        return vec![address_key(table, &slice.addresses)];
    }
    debug_assert_eq!(slice.addresses.family(), Family::V4, "only nat44 has slices");
    let of = |protocol| {
        let to = tagged().eth_type(ETH_IPV4).ip_dst(&slice.addresses).ip_proto(protocol);
        RuleKey { table, priority: PRIORITY_PORTS, matches: to.tp_dst(slice.port, slice.port_mask) }
    };
    [PROTO_TCP, PROTO_UDP].map(of).into()
}
