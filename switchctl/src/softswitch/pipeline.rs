//! The tables of the embedded switch: finding a packet's rule, and doing what it says.
//!
//! Each table groups its rules by mask (tuple space search): one hash lookup per mask, masks in the order of their
//! highest priority, until no later mask can win. With prefixes and port masks that is some dozens of lookups
//! however many rules there are.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::time::Duration;

use flow::Micros;

use super::packet::{PUSHES_MAX, Packet, TABLES};
use crate::core::rules::{Action, Field, Match, PortNo, Rule, RuleKey, RuleSet, VLAN_PRESENT, WORDS};
use crate::ofp::{self, Command, FlowModMsg, FlowQuery, FlowStats, GROUP_ANY, TableStats, error};

/// Most rules in all tables together.
pub const RULES_MAX: usize = 4 << 20;
/// Largest key of a tunnel: VXLAN has 24 bits (RFC 7348, section 5).
const TUNNEL_KEY_MAX: u64 = 0xff_ffff;

type Words = [u64; WORDS];

/// Multiply and rotate, a word at a time. Which rules exist is the controller's decision, so nobody gains by
/// colliding keys.
#[derive(Clone, Copy, Debug, Default)]
struct WordHasher(u64);

impl Hasher for WordHasher {
    fn finish(&self) -> u64 {
        self.0 ^ self.0 >> 32
    }

    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.write_u64(u64::from_le_bytes(word));
        }
    }

    fn write_u64(&mut self, word: u64) {
        self.0 = (self.0.rotate_left(23) ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }

    fn write_usize(&mut self, word: usize) {
        self.write_u64(word as u64);
    }
}

#[derive(Clone, Debug)]
struct Entry {
    priority: u16,
    rule: Rule,
    /// As it was added. Packets and bytes are counted whatever they say, as OpenFlow allows.
    flags: u16,
    importance: u16,
    since: Micros,
    packets: u64,
    bytes: u64,
}

impl Entry {
    fn new(change: &FlowModMsg, since: Micros) -> Self {
        let FlowModMsg { key, flags, importance, .. } = *change;
        let rule = change.rule.clone();
        Self { priority: key.priority, rule, flags, importance, since, packets: 0, bytes: 0 }
    }
}

/// Rules with one mask.
#[derive(Clone, Debug)]
struct Tuple {
    mask: Words,
    /// No rule here has a higher one. May be too high after a removal, which costs time only.
    priority_max: u16,
    /// By masked value; few rules share one, the highest priority first.
    rules: HashMap<Words, Vec<Entry>, BuildHasherDefault<WordHasher>>,
}

#[derive(Clone, Debug, Default)]
struct Table {
    /// The highest `priority_max` first.
    tuples: Vec<Tuple>,
    len: usize,
    lookups: u64,
    matched: u64,
}

impl Table {
    fn tuple(&self, matches: &Match) -> Option<usize> {
        self.tuples.iter().position(|tuple| tuple.mask == *matches.mask())
    }

    /// Adds a rule. One with the same key makes way, and leaves its counters unless they are to begin at zero.
    fn insert(&mut self, matches: &Match, mut new: Entry) {
        let priority = new.priority;
        let at = self.tuple(matches).unwrap_or_else(|| {
            self.tuples.push(Tuple { mask: *matches.mask(), priority_max: 0, rules: HashMap::default() });
            self.tuples.len() - 1
        });
        let tuple = &mut self.tuples[at];
        let entries = tuple.rules.entry(*matches.value()).or_default();
        let place = entries.partition_point(|entry| entry.priority > priority);
        if let Some(old) = entries.get_mut(place).filter(|entry| entry.priority == priority) {
            if new.flags & ofp::FLAG_RESET_COUNTS == 0 {
                (new.packets, new.bytes) = (old.packets, old.bytes);
            }
            *old = new;
        } else {
            entries.insert(place, new);
            self.len += 1;
        }
        if priority > tuple.priority_max {
            tuple.priority_max = priority;
            self.tuples.sort_by_key(|tuple| std::cmp::Reverse(tuple.priority_max));
        }
    }

    /// Whether a packet can be of this match and of a rule with this priority. Linear in the rules.
    fn overlaps(&self, priority: u16, matches: &Match) -> bool {
        self.entries().any(|(other, rule, _)| other == priority && rule.overlaps(matches))
    }

    fn remove(&mut self, priority: u16, matches: &Match) {
        let Some(at) = self.tuple(matches) else { return };
        let tuple = &mut self.tuples[at];
        let Some(entries) = tuple.rules.get_mut(matches.value()) else { return };
        let before = entries.len();
        entries.retain(|entry| entry.priority != priority);
        self.len -= before - entries.len();
        if entries.is_empty() {
            tuple.rules.remove(matches.value());
        }
        if tuple.rules.is_empty() {
            self.tuples.remove(at);
        }
    }

    #[inline]
    fn lookup(&mut self, words: &Words) -> Option<&mut Entry> {
        self.lookups += 1;
        let mut best: Option<(u16, usize, Words)> = None;
        for (at, tuple) in self.tuples.iter().enumerate() {
            if best.as_ref().is_some_and(|(priority, ..)| *priority >= tuple.priority_max) {
                break;
            }
            let mut value = *words;
            value.iter_mut().zip(&tuple.mask).for_each(|(word, mask)| *word &= mask);
            if let Some(entry) = tuple.rules.get(&value).and_then(|entries| entries.first())
                && best.as_ref().is_none_or(|(priority, ..)| entry.priority > *priority)
            {
                best = Some((entry.priority, at, value));
            }
        }
        let (_, at, value) = best?;
        self.matched += 1;
        self.tuples[at].rules.get_mut(&value)?.first_mut()
    }

    fn entries(&self) -> impl Iterator<Item = (u16, Match, &Entry)> {
        self.tuples.iter().flat_map(|tuple| {
            tuple.rules.iter().flat_map(|(value, entries)| {
                let matches = Match::from_words(*value, tuple.mask);
                entries.iter().map(move |entry| (entry.priority, matches, entry))
            })
        })
    }
}

/// All tables of a switch.
#[derive(Clone, Debug)]
pub struct Pipeline {
    tables: Vec<Table>,
    now: Micros,
}

impl Default for Pipeline {
    fn default() -> Self {
        Self { tables: vec![Table::default(); TABLES.into()], now: Micros(0) }
    }
}

impl Pipeline {
    /// Tables with these rules, for tests and benches; rules of tables that do not exist are left out.
    #[must_use]
    pub fn with_rules(rules: &RuleSet) -> Self {
        let mut pipeline = Self::default();
        for (key, rule) in rules {
            if let Some(table) = pipeline.tables.get_mut(usize::from(key.table)) {
                let change = FlowModMsg::new(Command::Add, *key, rule.clone());
                table.insert(&key.matches, Entry::new(&change, Micros(0)));
            }
        }
        pipeline
    }

    /// Says how late it is, for the ages of rules.
    pub fn set_time(&mut self, now: Micros) {
        self.now = now;
    }

    /// Number of rules.
    #[must_use]
    pub fn len(&self) -> usize {
        self.tables.iter().map(|table| table.len).sum()
    }

    /// Whether there are no rules.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Says whether a change could be applied, without applying it.
    ///
    /// # Errors
    /// The OpenFlow error that answers it.
    pub fn check(&self, change: &FlowModMsg) -> Result<(), error::Code> {
        let deletes = matches!(change.command, Command::Delete | Command::DeleteStrict);
        let all = change.key.table == FlowModMsg::ALL_TABLES && deletes;
        if change.key.table >= TABLES && !all {
            return Err(error::FLOW_BAD_TABLE);
        }
        if change.flags & !ofp::FLAGS_ALL != 0 {
            return Err(error::FLOW_BAD_FLAGS);
        }
        if change.command == Command::Add {
            self.check_new(change)?;
        }
        // What else a deletion says is not looked at (OpenFlow 1.4, section 6.4).
        if deletes { Ok(()) } else { check_rule(change) }
    }

    /// What only a new rule can have wrong: the rest of a modification leaves rules as they are.
    fn check_new(&self, change: &FlowModMsg) -> Result<(), error::Code> {
        let key = &change.key;
        // Nobody would be told, since nothing but a controller ends a rule.
        if change.flags & ofp::FLAG_SEND_REMOVED != 0 {
            return Err(error::FLOW_BAD_FLAGS);
        }
        if change.idle_timeout != 0 || change.hard_timeout != 0 {
            return Err(error::FLOW_BAD_TIMEOUT);
        }
        if key.matches.field(Field::TunnelSrc).is_some() {
            return Err(error::MATCH_BAD_FIELD);
        }
        let from =
            key.matches.exact_value(Field::InPort).and_then(|port| u32::try_from(port).ok()).map(PortNo);
        let real = |port: PortNo| port.0 != 0 && port <= PortNo::MAX;
        if from.is_some_and(|port| !real(port) && port != PortNo::CONTROLLER && port != PortNo::ANY) {
            return Err(error::MATCH_BAD_VALUE);
        }
        let table = &self.tables[usize::from(key.table)];
        if change.flags & ofp::FLAG_CHECK_OVERLAP != 0 && table.overlaps(key.priority, &key.matches) {
            return Err(error::FLOW_OVERLAP);
        }
        if self.len() >= RULES_MAX { Err(error::TABLE_FULL) } else { Ok(()) }
    }

    /// Applies a change.
    ///
    /// # Errors
    /// As [`Pipeline::check`]; nothing changed then.
    pub fn apply(&mut self, change: &FlowModMsg) -> Result<(), error::Code> {
        self.check(change)?;
        let key = &change.key;
        match change.command {
            Command::Add => {
                let table = &mut self.tables[usize::from(key.table)];
                table.insert(&key.matches, Entry::new(change, self.now));
            }
            Command::Modify | Command::ModifyStrict => self.modify(change),
            Command::Delete | Command::DeleteStrict => self.delete(change),
        }
        Ok(())
    }

    fn modify(&mut self, change: &FlowModMsg) {
        for key in self.selected(change) {
            let table = &mut self.tables[usize::from(key.table)];
            let entry = table.tuple(&key.matches).and_then(|at| {
                let entries = table.tuples[at].rules.get_mut(key.matches.value())?;
                entries.iter_mut().find(|entry| entry.priority == key.priority)
            });
            if let Some(entry) = entry {
                // The cookie stays (OpenFlow 1.4, section 6.4).
                entry.rule.actions.clone_from(&change.rule.actions);
                entry.rule.goto = change.rule.goto;
                if change.flags & ofp::FLAG_RESET_COUNTS != 0 {
                    (entry.packets, entry.bytes) = (0, 0);
                }
            }
        }
    }

    fn delete(&mut self, change: &FlowModMsg) {
        let strict = change.command == Command::DeleteStrict;
        let filtered =
            change.cookie_mask != 0 || change.out_port != PortNo::ANY || change.out_group != GROUP_ANY;
        if strict && !filtered && change.key.table < TABLES {
            self.tables[usize::from(change.key.table)].remove(change.key.priority, &change.key.matches);
            return;
        }
        for key in self.selected(change) {
            self.tables[usize::from(key.table)].remove(key.priority, &key.matches);
        }
    }

    /// The rules that a change is about. Linear in the rules of the tables.
    fn selected(&self, change: &FlowModMsg) -> Vec<RuleKey> {
        let strict = matches!(change.command, Command::ModifyStrict | Command::DeleteStrict);
        let (out_port, out_group) = match change.command {
            Command::Delete | Command::DeleteStrict => (change.out_port, change.out_group),
            Command::Add | Command::Modify | Command::ModifyStrict => (PortNo::ANY, GROUP_ANY),
        };
        let query = FlowQuery {
            table: change.key.table,
            out_port,
            out_group,
            cookie: change.rule.cookie,
            cookie_mask: change.cookie_mask,
            matches: change.key.matches,
        };
        let same = |key: &RuleKey| key.priority == change.key.priority && key.matches == change.key.matches;
        self.select(&query).map(|(key, _)| key).filter(|key| !strict || same(key)).collect()
    }

    fn select<'a>(&'a self, query: &'a FlowQuery) -> impl Iterator<Item = (RuleKey, &'a Entry)> + 'a {
        let tables = self.tables.iter().zip(0u8..);
        tables.filter(|(_, table)| query.table == FlowModMsg::ALL_TABLES || query.table == *table).flat_map(
            move |(table, number)| {
                table.entries().filter_map(move |(priority, matches, entry)| {
                    // No rule has a group, because there are none.
                    let wanted = query.out_group == GROUP_ANY
                        && query.matches.covers(&matches)
                        && (entry.rule.cookie ^ query.cookie) & query.cookie_mask == 0
                        && (query.out_port == PortNo::ANY
                            || ofp::outputs(&entry.rule.actions).any(|port| port == query.out_port));
                    wanted.then_some((RuleKey { table: number, priority, matches }, entry))
                })
            },
        )
    }

    /// Rules with counters, in the order of their keys.
    #[must_use]
    pub fn flows(&self, query: &FlowQuery) -> Vec<FlowStats> {
        let mut flows: Vec<_> = self
            .select(query)
            .map(|(key, entry)| FlowStats {
                key,
                rule: entry.rule.clone(),
                packets: entry.packets,
                bytes: entry.bytes,
                age: Duration::from_micros(self.now.0.saturating_sub(entry.since.0)),
                flags: entry.flags,
                importance: entry.importance,
            })
            .collect();
        flows.sort_unstable_by_key(|flow| flow.key);
        flows
    }

    /// Counters per table.
    #[must_use]
    pub fn table_stats(&self) -> Vec<TableStats> {
        let stats = |(table, number): (&Table, u8)| TableStats {
            table: number,
            active: u32::try_from(table.len).unwrap_or(u32::MAX),
            lookups: table.lookups,
            matched: table.matched,
        };
        self.tables.iter().zip(0..).map(stats).collect()
    }

    /// Sends a packet through the tables from the first on. `out` gets each copy, with the port and the tunnel key.
    pub fn process(
        &mut self,
        packet: &mut Packet,
        in_port: PortNo,
        tunnel_id: u64,
        out: &mut impl FnMut(PortNo, &mut Packet, u64),
    ) {
        self.fly(Flight { words: packet.fields(in_port, tunnel_id), from: in_port }, packet, out);
    }

    fn fly(
        &mut self,
        mut flight: Flight,
        packet: &mut Packet,
        out: &mut impl FnMut(PortNo, &mut Packet, u64),
    ) {
        let len = packet.frame().len() as u64;
        let mut number = 0;
        while let Some(table) = self.tables.get_mut(number)
            && let Some(entry) = table.lookup(&flight.words)
        {
            entry.packets += 1;
            entry.bytes += len;
            flight.apply(&entry.rule.actions, packet, out);
            let Some(goto) = entry.rule.goto else { return };
            number = usize::from(goto);
        }
    }

    /// Does what a controller said to do with a packet of its own, which may be to send it through the tables.
    ///
    /// # Errors
    /// The OpenFlow error that answers it; nothing was done then.
    pub fn packet_out(
        &mut self,
        packet: &mut Packet,
        in_port: PortNo,
        actions: &[Action],
        out: &mut impl FnMut(PortNo, &mut Packet, u64),
    ) -> Result<(), error::Code> {
        check_actions(actions, None, |port| port == PortNo::TABLE)?;
        let mut flight = Flight { words: packet.fields(in_port, 0), from: in_port };
        let mut rest = actions;
        while let Some(at) = rest.iter().position(|action| *action == Action::Output(PortNo::TABLE)) {
            flight.apply(&rest[..at], packet, out);
            // What the tables do to it is done to a copy.
            self.fly(flight, &mut packet.clone(), out);
            rest = &rest[at + 1..];
        }
        flight.apply(rest, packet, out);
        Ok(())
    }
}

/// What of a rule can be wrong whatever else there is.
fn check_rule(change: &FlowModMsg) -> Result<(), error::Code> {
    if change.rule.goto.is_some_and(|goto| goto <= change.key.table || goto >= TABLES) {
        return Err(error::INSTRUCTION_BAD_TABLE);
    }
    let vlan = change.key.matches.field(Field::Vlan);
    let present = u128::from(VLAN_PRESENT);
    let tagged = vlan.filter(|(_, mask)| mask & present != 0).map(|(value, _)| value & present != 0);
    check_actions(&change.rule.actions, tagged, |_| false)
}

/// Refuses actions that would do nothing or something else than they say. `tagged` is whether packets are known to have a
/// tag; `reserved` says which reserved ports there are.
fn check_actions(
    actions: &[Action],
    mut tagged: Option<bool>,
    reserved: impl Fn(PortNo) -> bool,
) -> Result<(), error::Code> {
    let mut pushes = 0;
    for action in actions {
        match *action {
            // Packets for the controller are not supported.
            Action::Output(port) if (port.0 == 0 || port > PortNo::MAX) && !reserved(port) => {
                return Err(error::BAD_OUT_PORT);
            }
            Action::SetTunnelDst(_) => return Err(error::BAD_SET_TYPE),
            Action::SetTunnel(key) if key > TUNNEL_KEY_MAX => return Err(error::BAD_SET_ARGUMENT),
            Action::PopVlan | Action::SetVlan(_) if tagged == Some(false) => {
                return Err(error::MATCH_INCONSISTENT);
            }
            Action::PushVlan(_) | Action::PushTag if pushes == PUSHES_MAX => {
                return Err(error::TOO_MANY_ACTIONS);
            }
            Action::PushVlan(_) | Action::PushTag => {
                pushes += 1;
                tagged = Some(true);
            }
            // There may be another behind it.
            Action::PopVlan => tagged = None,
            Action::SetVlan(_)
            | Action::SetTunnel(_)
            | Action::ClearInPort
            | Action::Output(_)
            | Action::OutputInPort => {}
        }
    }
    Ok(())
}

/// A packet's fields on its way through the tables.
#[derive(Clone, Copy)]
struct Flight {
    words: Words,
    /// Where `OFPP_IN_PORT` leads.
    from: PortNo,
}

impl Flight {
    fn apply(
        &mut self,
        actions: &[Action],
        packet: &mut Packet,
        out: &mut impl FnMut(PortNo, &mut Packet, u64),
    ) {
        for action in actions {
            match *action {
                Action::PushTag => {
                    packet.push_tag();
                    self.follow_tag(packet);
                }
                Action::PushVlan(id) => {
                    packet.push_tag();
                    packet.set_vlan(id);
                    self.follow_tag(packet);
                }
                Action::PopVlan => {
                    packet.pop_vlan();
                    // There may be another tag behind it.
                    self.words = packet.fields(self.in_port(), self.tunnel_id());
                }
                Action::SetVlan(id) => {
                    packet.set_vlan(id);
                    self.follow_tag(packet);
                }
                Action::SetTunnel(key) => Field::TunnelId.write(&mut self.words, key.into()),
                // Refused when the rule came; a packet of a controller goes where its port leads.
                Action::SetTunnelDst(_) => {}
                Action::ClearInPort => {
                    Field::InPort.write(&mut self.words, PortNo::ANY.0.into());
                    self.from = PortNo::ANY;
                }
                Action::Output(port) if port == self.from => {}
                Action::Output(port) => out(port, packet, self.tunnel_id()),
                Action::OutputInPort => out(self.from, packet, self.tunnel_id()),
            }
        }
    }

    /// What later tables see is what the frame has: to set the id of a tag that is not there does nothing.
    fn follow_tag(&mut self, packet: &Packet) {
        Field::Vlan.write(&mut self.words, packet.vlan().into());
    }

    fn in_port(&self) -> PortNo {
        PortNo(Field::InPort.read(&self.words) as u32)
    }

    fn tunnel_id(&self) -> u64 {
        Field::TunnelId.read(&self.words) as u64
    }
}
