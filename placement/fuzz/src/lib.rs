//! What the fuzz targets do with bytes. `tests/corpus.rs` of the package does the same with the kept inputs.

use std::fmt::Debug;

use bytes::Bytes;
use flow::{Micros, SiteId};
use placement::core::leader::{Brain, BrainTimings};
use placement::core::{Change, Cluster, Command, Proposal, SiteReport};
use placement::node::{ClientRequest, ClientResponse};
use placement::{pack, wire};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Lines of one script.
const LINES_MAX: usize = 24;
/// Groups that a table may state in a long input: more are allowed, and take long.
const GROUPS_MAX: u32 = 1 << 16;

/// A table of groups. With the first byte's lowest bit set the rest is the columns of as many groups as the next byte
/// says, so that inputs get past compression.
pub fn groups(bytes: &[u8]) {
    let Some((&how, rest)) = bytes.split_first() else { return };
    let table = if how & 1 == 0 { rest.to_vec() } else { table_of(rest) };
    if how & 1 == 0 && rest.len() > 64 && stated_groups(rest).is_none_or(|count| count > GROUPS_MAX) {
        return;
    }
    if let Ok(read) = pack::unpack(&table) {
        assert_eq!(pack::unpack(&pack::pack(&read)), Ok(read));
    }
}

/// The head of a table that is not compressed, and what is behind it.
fn table_of(columns: &[u8]) -> Vec<u8> {
    let count = columns.first().map_or(0, |count| count & 0x7f);
    [&[1, 0, count], columns.get(1..).unwrap_or_default()].concat()
}

/// The number in the head.
fn stated_groups(table: &[u8]) -> Option<u32> {
    let mut count = 0;
    for (at, byte) in table.get(2..)?.iter().take(4).enumerate() {
        count |= u32::from(byte & 0x7f) << (7 * at);
        if byte & 0x80 == 0 {
            return Some(count);
        }
    }
    None
}

/// A message between nodes, agents and disks. The first byte says which type it should be, and whether the rest is the
/// whole message or only its body.
pub fn wire(bytes: &[u8]) {
    let Some((&how, rest)) = bytes.split_first() else { return };
    let message = if how & 0x80 == 0 { Bytes::copy_from_slice(rest) } else { envelope(rest, &[]) };
    match how % 5 {
        0 => leads_back::<Proposal>(message),
        1 => leads_back::<ClientRequest>(message),
        2 => leads_back::<ClientResponse>(message),
        3 => leads_back::<Vec<Change>>(message),
        _ => leads_back::<SiteReport>(message),
    }
}

fn leads_back<T: Serialize + DeserializeOwned + PartialEq + Debug>(message: Bytes) {
    if let Ok(read) = wire::decode::<T>(message, wire::MESSAGE_LEN_MAX) {
        assert_eq!(wire::decode::<T>(wire::encode(&read), wire::MESSAGE_LEN_MAX), Ok(read));
    }
}

/// A snapshot. The first byte says whether the rest is the whole, or only a body with the table of groups in front of it,
/// of as many bytes as the next byte says.
pub fn cluster(bytes: &[u8]) {
    let Some((&how, rest)) = bytes.split_first() else { return };
    let snapshot = if how & 1 == 0 {
        Bytes::copy_from_slice(rest)
    } else {
        let Some((&len, rest)) = rest.split_first() else { return };
        let (groups, body) = rest.split_at(usize::from(len).min(rest.len()));
        envelope(body, &if groups.is_empty() { Vec::new() } else { table_of(groups) })
    };
    if let Ok(read) = wire::decode_cluster(snapshot) {
        assert_eq!(wire::decode_cluster(wire::encode_cluster(&read)), Ok(read));
    }
}

/// A prost envelope of version 1 (fields 1, 3 and 4), by hand.
fn envelope(body: &[u8], attached: &[u8]) -> Bytes {
    let mut bytes = vec![1 << 3, 1];
    for (field, content) in [(3, body), (4, attached)] {
        bytes.push(field << 3 | 2);
        let mut len = content.len();
        while len >= 0x80 {
            bytes.push(len as u8 | 0x80);
            len >>= 7;
        }
        bytes.push(len as u8);
        bytes.extend(content);
    }
    bytes.into()
}

/// Commands in JSON, one a line, to the replicated state: none makes it panic, a refused one changes nothing but the
/// audit log, one that is repeated gives the same answer, and every state can be read from its snapshot.
pub fn commands(bytes: &[u8]) {
    let mut state = State::default();
    for line in lines(bytes) {
        if let Ok(command) = serde_json::from_slice(line) {
            state.apply(command);
        }
    }
    let snapshot = wire::encode_cluster(&state.cluster);
    assert_eq!(wire::decode_cluster(snapshot), Ok(state.cluster));
}

/// Commands of others, reports of sites (both JSON) and single digits of seconds that pass, one a line, to a leader,
/// whose own commands are applied.
pub fn leader(bytes: &[u8]) {
    let mut state = State::default();
    let mut now = Micros::from_secs(1);
    let mut brain = Brain::new(BrainTimings::default(), None, now);
    for line in lines(bytes) {
        if let [digit @ b'0'..=b'9'] = line {
            now = now.plus(Micros::from_secs(1 << (digit - b'0')));
        } else if let Ok(command) = serde_json::from_slice(line) {
            state.apply(command);
        } else if let Ok(report) = serde_json::from_slice::<SiteReport>(line) {
            brain.handle_report(&report, now);
            let _ = brain.probes(&report, now);
        }
        brain.handle_wall_clock(now.0 / 1000);
        for command in brain.poll(&state.cluster, now) {
            state.apply(command);
        }
        if let Some(command) = Brain::due(&state.cluster, now.0 / 1000) {
            state.apply(command);
        }
    }
    for group in state.cluster.groups.keys().take(4) {
        let _ = brain.explain(&state.cluster, group, now);
    }
}

fn lines(bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    bytes.split(|&byte| byte == b'\n').take(LINES_MAX)
}

/// A cluster with its log. It begins with three sites and a service, so that most commands have something to be about.
struct State {
    cluster: Cluster,
    index: u64,
}

impl Default for State {
    fn default() -> Self {
        let mut state = Self { cluster: Cluster::default(), index: 0 };
        for line in lines(START.as_bytes()) {
            let command = serde_json::from_slice(line).expect("the beginning is written by us");
            state.apply(command);
        }
        for site in 0..3 {
            state.apply(Command::SetAlive { site: SiteId(site), alive: true });
        }
        assert_eq!((state.cluster.sites.len(), state.cluster.groups.len()), (3, 4));
        state
    }
}

/// The first commands of every script.
pub const START: &str = concat!(
    r#"{"put_site":{"id":0,"name":"a","latitude":52,"longitude":5,"endpoint":"h:1","capacity_pps":1000}}"#,
    "\n",
    r#"{"put_site":{"id":1,"name":"b","latitude":39,"longitude":-77,"endpoint":"h:2","capacity_pps":1000}}"#,
    "\n",
    r#"{"put_site":{"id":2,"name":"c","endpoint":"h:3","capacity_pps":1000,"failure_domain":"d"}}"#,
    "\n",
    r#"{"put_service":{"service":{"id":1,"name":"s","nat":{"clients":["100.64.0.0/22"],"#,
    r#""pool":["198.51.100.0/24"],"ports_per_subscriber":504},"group_len":24},"owner":0}}"#,
);

impl State {
    fn apply(&mut self, command: Command) {
        if let Command::PutService { service, .. } = &command {
            // A service may have a million groups; one of them after the other would take long.
            let shortest = service.nat.clients.iter().map(flow::Prefix::len).min().unwrap_or(0);
            if service.group_len.saturating_sub(shortest) > 8 || service.nat.clients.len() > 8 {
                return;
            }
        }
        self.index += 5000;
        let before = self.cluster.clone();
        let proposal = Proposal { actor: "fuzz".to_owned(), at_ms: 7, command };
        let applied = self.cluster.apply(self.index, &proposal);
        if applied.result.is_err() {
            assert!(applied.changes.is_empty(), "a refused command has consequences");
            let refused = Cluster { audit: before.audit.clone(), ..self.cluster.clone() };
            assert_eq!(refused, before, "a refused command changed something");
        }
        assert!(self.cluster.policy.validate().is_ok(), "a policy that cannot be is in force");
        for group in self.cluster.groups.values() {
            assert!(self.cluster.services.contains_key(&group.id.service), "a group of no service");
            assert!(self.cluster.sites.contains_key(&group.owner), "a group of no site");
        }
    }
}
