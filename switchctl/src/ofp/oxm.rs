//! Matches, actions and instructions on the wire.

use std::net::Ipv4Addr;

use super::wire::{Reader, Writer};
use super::{DecodeError, Unsupported, error};
use crate::core::rules::{
    Action, ETH_IPV4, ETH_IPV6, ETH_VLAN, Field, Match, PROTO_ICMP, PROTO_ICMPV6, PROTO_TCP, PROTO_UDP,
    PortNo, Rule, VLAN_PRESENT,
};

const CLASS_BASIC: u16 = 0x8000;
/// The class of Nicira's extensions (`nicira-ext.h` of Open vSwitch).
const CLASS_NXM_1: u16 = 0x0001;

const IN_PORT: u8 = 0;
const ETH_TYPE: u8 = 5;
const VLAN_VID: u8 = 6;
const IP_PROTO: u8 = 10;
const IPV4_SRC: u8 = 11;
const IPV4_DST: u8 = 12;
const TCP_SRC: u8 = 13;
const TCP_DST: u8 = 14;
const UDP_SRC: u8 = 15;
const UDP_DST: u8 = 16;
const ICMPV4_TYPE: u8 = 19;
const ICMPV4_CODE: u8 = 20;
const IPV6_SRC: u8 = 26;
const IPV6_DST: u8 = 27;
const ICMPV6_TYPE: u8 = 29;
const ICMPV6_CODE: u8 = 30;
const TUNNEL_ID: u8 = 38;
/// `NXM_NX_TUN_IPV4_SRC` and `NXM_NX_TUN_IPV4_DST` have the numbers 31 and 32 of their class; the top bit, which no
/// field of OpenFlow 1.4 has, tells them apart here.
const NXM_1: u8 = 0x80;
const TUN_IPV4_SRC: u8 = NXM_1 | 31;
const TUN_IPV4_DST: u8 = NXM_1 | 32;

/// The field and its bytes on the wire.
fn field_of(number: u8) -> Option<(Field, usize)> {
    Some(match number {
        IN_PORT => (Field::InPort, 4),
        ETH_TYPE => (Field::EthType, 2),
        VLAN_VID => (Field::Vlan, 2),
        IP_PROTO => (Field::IpProto, 1),
        IPV4_SRC => (Field::IpSrc, 4),
        IPV4_DST => (Field::IpDst, 4),
        TCP_SRC | UDP_SRC => (Field::TpSrc, 2),
        TCP_DST | UDP_DST => (Field::TpDst, 2),
        ICMPV4_TYPE | ICMPV6_TYPE => (Field::TpSrc, 1),
        ICMPV4_CODE | ICMPV6_CODE => (Field::TpDst, 1),
        IPV6_SRC => (Field::IpSrc, 16),
        IPV6_DST => (Field::IpDst, 16),
        TUNNEL_ID => (Field::TunnelId, 8),
        TUN_IPV4_SRC => (Field::TunnelSrc, 4),
        _ => return None,
    })
}

/// Numbers of source, destination, port-like first and second field in this match: they depend on the
/// EtherType and the IP protocol.
fn numbers(matches: &Match) -> [(Field, Option<u8>); 10] {
    let v6 = matches.exact_value(Field::EthType) == Some(ETH_IPV6.into());
    let v4 = matches.exact_value(Field::EthType) == Some(ETH_IPV4.into());
    let ip = v4 || v6;
    let (src, dst) = match (v4, v6) {
        (true, _) => (Some(IPV4_SRC), Some(IPV4_DST)),
        (_, true) => (Some(IPV6_SRC), Some(IPV6_DST)),
        _ => (None, None),
    };
    let protocol = matches.exact_value(Field::IpProto).filter(|_| ip);
    let protocol = protocol.and_then(|protocol| u8::try_from(protocol).ok());
    let (first, second) = match protocol {
        Some(PROTO_TCP) => (Some(TCP_SRC), Some(TCP_DST)),
        Some(PROTO_UDP) => (Some(UDP_SRC), Some(UDP_DST)),
        Some(PROTO_ICMP) => (Some(ICMPV4_TYPE), Some(ICMPV4_CODE)),
        Some(PROTO_ICMPV6) => (Some(ICMPV6_TYPE), Some(ICMPV6_CODE)),
        _ => (None, None),
    };
    [
        (Field::InPort, Some(IN_PORT)),
        (Field::EthType, Some(ETH_TYPE)),
        (Field::Vlan, Some(VLAN_VID)),
        (Field::IpProto, ip.then_some(IP_PROTO)),
        (Field::IpSrc, src),
        (Field::IpDst, dst),
        (Field::TpSrc, first),
        (Field::TpDst, second),
        (Field::TunnelId, Some(TUNNEL_ID)),
        (Field::TunnelSrc, Some(TUN_IPV4_SRC)),
    ]
}

/// The ones of a field's whole mask on the wire.
fn full_mask(number: u8, len: usize) -> u128 {
    if number == VLAN_VID {
        return 0x1fff;
    }
    if len == 16 { u128::MAX } else { (1 << (8 * len)) - 1 }
}

fn put_value(w: &mut Writer, value: u128, len: usize) {
    w.bytes(&value.to_be_bytes()[16 - len..]);
}

fn put_field(w: &mut Writer, number: u8, value: u128, mask: Option<u128>) {
    let Some((_, len)) = field_of(number) else { return };
    put_header(w, number, mask.is_some(), len);
    put_value(w, value, len);
    if let Some(mask) = mask {
        put_value(w, mask, len);
    }
}

fn put_header(w: &mut Writer, number: u8, masked: bool, len: usize) {
    w.u16(if number & NXM_1 == 0 { CLASS_BASIC } else { CLASS_NXM_1 });
    w.u8((number & !NXM_1) << 1 | u8::from(masked));
    w.u8((len * if masked { 2 } else { 1 }) as u8);
}

/// Writes `ofp_match` with its padding. Fields that lack what they depend on (an address without EtherType)
/// have no number on the wire and are left out.
pub(crate) fn put_match(w: &mut Writer, matches: &Match) {
    let start = w.len();
    w.u16(1);
    w.u16(0);
    for (field, number) in numbers(matches) {
        let (Some((value, mask)), Some(number)) = (matches.field(field), number) else { continue };
        let full = field_of(number).map_or(0, |(_, len)| full_mask(number, len));
        // OpenFlow 1.4, table 13: no tag is written as id 0 without a mask.
        put_field(w, number, value, (mask != full).then_some(mask));
    }
    let len = w.len() - start;
    w.set_u16(start + 2, len);
    w.pad8(start);
}

/// Fields that the embedded switch matches.
const MATCHED: [u8; 17] = [
    IN_PORT,
    ETH_TYPE,
    VLAN_VID,
    IP_PROTO,
    IPV4_SRC,
    IPV4_DST,
    TCP_SRC,
    TCP_DST,
    UDP_SRC,
    UDP_DST,
    ICMPV4_TYPE,
    ICMPV4_CODE,
    IPV6_SRC,
    IPV6_DST,
    ICMPV6_TYPE,
    ICMPV6_CODE,
    TUNNEL_ID,
];

/// Headers of the fields that can be matched, with the mask bit where there can be a mask and `masks` are asked for.
pub(super) fn put_match_ids(w: &mut Writer, masks: bool) {
    for number in MATCHED {
        put_id(w, number, masks && !WITHOUT_MASK.contains(&number));
    }
}

/// Headers of the fields that can be set.
pub(super) fn put_set_ids(w: &mut Writer) {
    [VLAN_VID, TUNNEL_ID].into_iter().for_each(|number| put_id(w, number, false));
}

fn put_id(w: &mut Writer, number: u8, masked: bool) {
    if let Some((_, len)) = field_of(number) {
        put_header(w, number, masked, len);
    }
}

fn value_of(bytes: &[u8]) -> u128 {
    bytes.iter().fold(0, |value, &byte| value << 8 | u128::from(byte))
}

/// Bytes of a field on the wire, also of one that can only be set.
fn size_of_field(number: u8) -> Option<usize> {
    if number == TUN_IPV4_DST { Some(4) } else { field_of(number).map(|(_, len)| len) }
}

/// One field: its number, value and mask.
fn take_field(r: &mut Reader<'_>) -> Result<(u8, u128, u128), DecodeError> {
    let class = r.u16()?;
    let number_and_flag = r.u8()?;
    let len = usize::from(r.u8()?);
    let (on_wire, masked) = (number_and_flag >> 1, number_and_flag & 1 == 1);
    let mut body = r.sub(len)?;
    let number = if class == CLASS_NXM_1 { on_wire | NXM_1 } else { on_wire };
    let known = if class == CLASS_BASIC || class == CLASS_NXM_1 { size_of_field(number) } else { None };
    let size = known.ok_or(Unsupported::Field { class, number: on_wire })?;
    if len != size * if masked { 2 } else { 1 } {
        return Err(DecodeError::FieldLength { number, len });
    }
    let value = value_of(body.take(size)?);
    let full = full_mask(number, size);
    let mask = if masked { value_of(body.rest()) & full } else { full };
    Ok((number, value, mask))
}

/// Skips `ofp_match` with its padding.
pub(crate) fn skip_match(r: &mut Reader<'_>) -> Result<(), DecodeError> {
    let (kind, len) = (r.u16()?, usize::from(r.u16()?));
    if len < 4 {
        return Err(DecodeError::Match { kind, len });
    }
    r.take(len.next_multiple_of(8) - 4).map(drop)
}

/// Reads `ofp_match` with its padding.
pub(crate) fn take_match(r: &mut Reader<'_>) -> Result<Match, DecodeError> {
    let kind = r.u16()?;
    let len = usize::from(r.u16()?);
    let bad_len = DecodeError::Match { kind, len };
    if kind != 1 || len < 4 {
        return Err(bad_len);
    }
    let mut fields = r.sub(len - 4).map_err(|_| bad_len)?;
    r.take(len.next_multiple_of(8) - len).map_err(|_| bad_len)?;
    let mut matches = Match::any();
    // A field under a mask of zeros leaves nothing in the match.
    let mut seen = Vec::new();
    while !fields.is_empty() {
        let (number, value, mask) = take_field(&mut fields)
            .map_err(|error| if matches!(error, DecodeError::Short { .. }) { bad_len } else { error })?;
        check_value(number, value, mask)?;
        let Some((field, _)) = field_of(number) else {
            return Err(Unsupported::Field { class: CLASS_NXM_1, number: number & !NXM_1 }.into());
        };
        check_needs(number, field, &matches)?;
        if seen.contains(&number) || matches.field(field).is_some() {
            return Err(DecodeError::FieldTwice { number });
        }
        seen.push(number);
        matches = matches.masked(field, value, mask);
    }
    Ok(matches)
}

/// Fields that OpenFlow 1.4 gives no mask (table 11).
const WITHOUT_MASK: [u8; 7] =
    [IN_PORT, ETH_TYPE, IP_PROTO, ICMPV4_TYPE, ICMPV4_CODE, ICMPV6_TYPE, ICMPV6_CODE];

/// Refuses masks where there can be none, and values that no packet has, so that no rule is in force that never matches.
fn check_value(number: u8, value: u128, mask: u128) -> Result<(), DecodeError> {
    let full = full_mask(number, size_of_field(number).unwrap_or_default());
    if mask != full && WITHOUT_MASK.contains(&number) {
        return Err(DecodeError::MaskOnField { number });
    }
    let present = u128::from(VLAN_PRESENT);
    // A tag that is absent has no id.
    let absent_with_id = number == VLAN_VID && mask & present != 0 && value & present == 0 && value != 0;
    if number == VLAN_VID && value & !full != 0 || absent_with_id {
        let value = value as u32;
        return Err(DecodeError::Value { field: "VLAN id", value, code: error::MATCH_BAD_VALUE });
    }
    if value & !mask != 0 {
        return Err(DecodeError::BitsOutsideMask { number });
    }
    Ok(())
}

/// Refuses a field before or without what it depends on, or with another of it (a TCP port in a match of UDP): OpenFlow 1.4
/// ("Flow Match Field Prerequisite") allows it only behind that. So every match that is read can be written again.
fn check_needs(number: u8, field: Field, before: &Match) -> Result<(), DecodeError> {
    let is = |field, values: &[u16]| {
        let value = before.exact_value(field);
        values.iter().any(|&wanted| value == Some(wanted.into()))
    };
    let protocol = |number: u8| is(Field::IpProto, &[number.into()]);
    let met = match number {
        IP_PROTO => is(Field::EthType, &[ETH_IPV4, ETH_IPV6]),
        IPV4_SRC | IPV4_DST => is(Field::EthType, &[ETH_IPV4]),
        IPV6_SRC | IPV6_DST => is(Field::EthType, &[ETH_IPV6]),
        TCP_SRC | TCP_DST => protocol(PROTO_TCP),
        UDP_SRC | UDP_DST => protocol(PROTO_UDP),
        ICMPV4_TYPE | ICMPV4_CODE => protocol(PROTO_ICMP),
        ICMPV6_TYPE | ICMPV6_CODE => protocol(PROTO_ICMPV6),
        _ => true,
    };
    if met { Ok(()) } else { Err(DecodeError::Needs(field)) }
}

pub(super) const OUTPUT: u16 = 0;
pub(super) const PUSH_VLAN: u16 = 17;
pub(super) const POP_VLAN: u16 = 18;
const GROUP: u16 = 22;
pub(super) const SET_FIELD: u16 = 25;
const EXPERIMENTER: u16 = 0xffff;

/// `load:0xffff->NXM_OF_IN_PORT[]`: no port. OpenFlow itself cannot write the input port, so this is the action
/// `NXAST_REG_LOAD` of Open vSwitch: experimenter 0x2320, subtype 7, 16 bits from bit 0 of NXM field 0x0002.
const CLEAR_IN_PORT: [u8; 24] =
    [0xff, 0xff, 0, 24, 0, 0, 0x23, 0x20, 0, 7, 0, 15, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0xff, 0xff];

/// Writes a list of actions.
pub(crate) fn put_actions(w: &mut Writer, actions: &[Action]) {
    for action in actions {
        match *action {
            Action::PushVlan(id) => {
                put_plain(w, PUSH_VLAN, ETH_VLAN);
                put_set_vlan(w, id);
            }
            Action::PushTag => put_plain(w, PUSH_VLAN, ETH_VLAN),
            Action::PopVlan => put_plain(w, POP_VLAN, 0),
            Action::SetVlan(id) => put_set_vlan(w, id),
            Action::SetTunnel(key) => put_set(w, TUNNEL_ID, key.into()),
            Action::SetTunnelDst(address) => put_set(w, TUN_IPV4_DST, u32::from(address).into()),
            Action::ClearInPort => w.bytes(&CLEAR_IN_PORT),
            Action::Output(port) => put_output(w, port),
            Action::OutputInPort => put_output(w, PortNo::IN_PORT),
        }
    }
}

fn put_plain(w: &mut Writer, kind: u16, argument: u16) {
    w.u16(kind);
    w.u16(8);
    w.u16(argument);
    w.zeros(2);
}

fn put_output(w: &mut Writer, port: PortNo) {
    w.u16(OUTPUT);
    w.u16(16);
    w.u32(port.0);
    // Bytes of the packet, for the controller: all.
    w.u16(if port == PortNo::CONTROLLER { u16::MAX } else { 0 });
    w.zeros(6);
}

fn put_set_vlan(w: &mut Writer, id: u16) {
    put_set(w, VLAN_VID, u128::from(id & 0xfff | crate::core::rules::VLAN_PRESENT));
}

fn put_set(w: &mut Writer, number: u8, value: u128) {
    let start = w.len();
    w.u16(SET_FIELD);
    w.u16(0);
    if let Some(len) = size_of_field(number) {
        put_header(w, number, false, len);
        put_value(w, value, len);
    }
    w.pad8(start);
    let len = w.len() - start;
    w.set_u16(start + 2, len);
}

/// Reads a list of actions that fills the reader.
pub(crate) fn take_actions(mut r: Reader<'_>) -> Result<Vec<Action>, DecodeError> {
    let mut actions = Vec::new();
    while !r.is_empty() {
        let left = r.len();
        let (Ok(kind), Ok(len)) = (r.u16(), r.u16()) else {
            return Err(DecodeError::ActionLength { kind: 0, len: left });
        };
        let bad_len = DecodeError::ActionLength { kind, len: usize::from(len) };
        if len < 8 || !len.is_multiple_of(8) {
            return Err(bad_len);
        }
        let action = take_action(kind, r.sub(usize::from(len) - 4).map_err(|_| bad_len)?)?;
        // A push and the id that follows are one action of ours.
        match (actions.last_mut(), action) {
            (Some(push @ Action::PushTag), Action::SetVlan(id)) => *push = Action::PushVlan(id),
            _ => actions.push(action),
        }
    }
    Ok(actions)
}

fn take_action(kind: u16, mut body: Reader<'_>) -> Result<Action, DecodeError> {
    let len = body.len() + 4;
    match (kind, len) {
        (OUTPUT, 16) => match PortNo(body.u32()?) {
            PortNo::IN_PORT => Ok(Action::OutputInPort),
            port => Ok(Action::Output(port)),
        },
        (PUSH_VLAN, 8) => match body.u16()? {
            ETH_VLAN => Ok(Action::PushTag),
            other => Err(Unsupported::EtherType(other).into()),
        },
        (POP_VLAN, 8) => Ok(Action::PopVlan),
        (GROUP, 8) => {
            let (field, value) = ("group", body.u32()?);
            Err(DecodeError::Value { field, value, code: error::BAD_OUT_GROUP })
        }
        (OUTPUT | PUSH_VLAN | POP_VLAN | GROUP, _) => Err(DecodeError::ActionLength { kind, len }),
        (SET_FIELD, _) => take_set(&mut body),
        (EXPERIMENTER, _) if body.rest() == &CLEAR_IN_PORT[4..] => Ok(Action::ClearInPort),
        (EXPERIMENTER, _) => Err(Unsupported::ExperimenterAction(body.u32()?).into()),
        _ => Err(Unsupported::Action(kind).into()),
    }
}

/// What is wrong with the field is wrong with the action that sets it.
#[expect(clippy::wildcard_enum_match_arm, reason = "only these are about a field")]
fn error_of_set(error: DecodeError, len: usize) -> DecodeError {
    match error {
        DecodeError::Unsupported(Unsupported::Field { number, .. }) => Unsupported::SetField(number).into(),
        DecodeError::FieldLength { .. } | DecodeError::Short { .. } => DecodeError::SetLength(len),
        other => other,
    }
}

fn take_set(body: &mut Reader<'_>) -> Result<Action, DecodeError> {
    let len = body.len();
    let (number, value, mask) = take_field(body).map_err(|error| error_of_set(error, len))?;
    // Up to seven bytes of padding follow.
    if body.len() >= 8 {
        return Err(DecodeError::SetLength(len));
    }
    if mask != full_mask(number, size_of_field(number).unwrap_or_default()) {
        return Err(Unsupported::SetMasked(number).into());
    }
    match number {
        VLAN_VID if value & !0xfff == u128::from(VLAN_PRESENT) => Ok(Action::SetVlan(value as u16 & 0xfff)),
        VLAN_VID => {
            let (field, value) = ("VLAN id to be set", value as u32);
            Err(DecodeError::Value { field, value, code: error::BAD_SET_ARGUMENT })
        }
        TUNNEL_ID => Ok(Action::SetTunnel(value as u64)),
        TUN_IPV4_DST => Ok(Action::SetTunnelDst(Ipv4Addr::from(value as u32))),
        _ => Err(Unsupported::SetField(number).into()),
    }
}

pub(super) const GOTO_TABLE: u16 = 1;
pub(super) const APPLY_ACTIONS: u16 = 4;

/// Writes the instructions of a rule.
pub(crate) fn put_instructions(w: &mut Writer, rule: &Rule) {
    if !rule.actions.is_empty() {
        let start = w.len();
        w.u16(APPLY_ACTIONS);
        w.u16(0);
        w.zeros(4);
        put_actions(w, &rule.actions);
        let len = w.len() - start;
        w.set_u16(start + 2, len);
    }
    if let Some(table) = rule.goto {
        w.u16(GOTO_TABLE);
        w.u16(8);
        w.u8(table);
        w.zeros(3);
    }
}

/// Reads instructions that fill the reader.
pub(crate) fn take_instructions(mut r: Reader<'_>) -> Result<(Vec<Action>, Option<u8>), DecodeError> {
    let (mut actions, mut goto) = (None, None);
    while !r.is_empty() {
        let left = r.len();
        let (Ok(kind), Ok(len)) = (r.u16(), r.u16()) else {
            return Err(DecodeError::InstructionLength { kind: 0, len: left });
        };
        let bad_len = DecodeError::InstructionLength { kind, len: usize::from(len) };
        let body = usize::from(len).checked_sub(4).and_then(|len| r.sub(len).ok());
        let mut body = body.filter(|body| body.len() >= 4).ok_or(bad_len)?;
        let twice = match kind {
            GOTO_TABLE if body.len() != 4 => return Err(bad_len),
            GOTO_TABLE => goto.replace(body.u8()?).is_some(),
            APPLY_ACTIONS => {
                body.take(4)?;
                actions.replace(take_actions(body)?).is_some()
            }
            _ => return Err(Unsupported::Instruction(kind).into()),
        };
        if twice {
            return Err(DecodeError::InstructionTwice(kind));
        }
    }
    Ok((actions.unwrap_or_default(), goto))
}
