//! Rules as text, in the words of `ovs-ofctl`, so that people need to know one language.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};

use super::rules::{
    Action, ETH_IPV4, ETH_IPV6, Field, Match, PROTO_ICMP, PROTO_ICMPV6, PROTO_TCP, PROTO_UDP, PortNo, Rule,
    VLAN_PRESENT,
};

impl fmt::Display for Match {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let v6 = self.exact_value(Field::EthType) == Some(ETH_IPV6.into());
        let mut parts: Vec<String> = Vec::new();
        if let Some((port, _)) = self.field(Field::InPort) {
            parts.push(format!("in_port={port}"));
        }
        if let Some((value, mask)) = self.field(Field::Vlan) {
            let present = u128::from(VLAN_PRESENT);
            parts.push(match mask {
                0x1fff if value >= present => format!("dl_vlan={}", value & !present),
                _ => format!("vlan_tci={value:#06x}/{mask:#06x}"),
            });
        }
        if let Some((value, mask)) = self.field(Field::TunnelId) {
            parts.push(format!("tun_id={value:#x}{}", masked(mask, u64::MAX.into())));
        }
        if let Some((value, mask)) = self.field(Field::TunnelSrc) {
            parts.push(format!("tun_src={}", address(value, mask, false)));
        }
        parts.extend(self.protocol());
        let names = if v6 { ("ipv6_src", "ipv6_dst") } else { ("nw_src", "nw_dst") };
        for (name, field) in [(names.0, Field::IpSrc), (names.1, Field::IpDst)] {
            if let Some((value, mask)) = self.field(field) {
                parts.push(format!("{name}={}", address(value, mask, v6)));
            }
        }
        let icmp = matches!(self.ip_protocol(), Some(PROTO_ICMP | PROTO_ICMPV6));
        let names = if icmp { ("icmp_type", "icmp_code") } else { ("tp_src", "tp_dst") };
        for (name, field) in [(names.0, Field::TpSrc), (names.1, Field::TpDst)] {
            if let Some((value, mask)) = self.field(field) {
                let whole = if icmp { 0xff } else { 0xffff };
                parts.push(format!("{name}={value}{}", masked(mask, whole)));
            }
        }
        f.write_str(&parts.join(","))
    }
}

impl Match {
    fn ip_protocol(&self) -> Option<u8> {
        self.exact_value(Field::IpProto).and_then(|protocol| u8::try_from(protocol).ok())
    }

    fn protocol(&self) -> Vec<String> {
        let eth_type = self.exact_value(Field::EthType).and_then(|kind| u16::try_from(kind).ok());
        let (ip, six) = match eth_type {
            Some(ETH_IPV4) => ("ip", ""),
            Some(ETH_IPV6) => ("ipv6", "6"),
            Some(other) => return vec![format!("dl_type={other:#06x}")],
            None => return Vec::new(),
        };
        match self.ip_protocol() {
            Some(PROTO_TCP) => vec![format!("tcp{six}")],
            Some(PROTO_UDP) => vec![format!("udp{six}")],
            Some(PROTO_ICMP | PROTO_ICMPV6) => vec![format!("icmp{six}")],
            Some(other) => vec![ip.to_owned(), format!("nw_proto={other}")],
            None => vec![ip.to_owned()],
        }
    }
}

fn masked(mask: u128, whole: u128) -> String {
    if mask == whole { String::new() } else { format!("/{mask:#x}") }
}

/// An address with the length of its prefix, or its mask where that is no prefix.
fn address(value: u128, mask: u128, v6: bool) -> String {
    let text = |bits: u128| match u32::try_from(bits) {
        Ok(bits) if !v6 => Ipv4Addr::from(bits).to_string(),
        _ => Ipv6Addr::from(bits).to_string(),
    };
    let width = if v6 { 128 } else { 32 };
    let len = mask.count_ones();
    let prefix = mask.checked_shr(width - len).unwrap_or(0).count_ones() == len;
    match (prefix, len == width) {
        (true, true) => text(value),
        (true, false) => format!("{}/{len}", text(value)),
        (false, _) => format!("{}/{}", text(value), text(mask)),
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::PushVlan(id) => write!(f, "push_vlan:0x8100,set_field:{}->vlan_vid", id | VLAN_PRESENT),
            Self::PushTag => f.write_str("push_vlan:0x8100"),
            Self::PopVlan => f.write_str("pop_vlan"),
            Self::SetVlan(id) => write!(f, "set_field:{}->vlan_vid", id | VLAN_PRESENT),
            Self::SetTunnel(key) => write!(f, "set_field:{key:#x}->tun_id"),
            Self::SetTunnelDst(address) => write!(f, "set_field:{address}->tun_dst"),
            Self::ClearInPort => f.write_str("load:0xffff->NXM_OF_IN_PORT[]"),
            Self::Output(PortNo::CONTROLLER) => f.write_str("CONTROLLER:65535"),
            Self::Output(port) => write!(f, "output:{port}"),
            Self::OutputInPort => f.write_str("IN_PORT"),
        }
    }
}

/// What a rule does, with where it goes on; `drop` for nothing.
impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts: Vec<_> = self.actions.iter().map(ToString::to_string).collect();
        parts.extend(self.goto.map(|table| format!("goto_table:{table}")));
        if parts.is_empty() {
            parts.push("drop".to_owned());
        }
        f.write_str(&parts.join(","))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::rules::Vlan;

    #[test]
    fn rules_read_as_ovs_ofctl_writes_them() {
        let all = Match::any()
            .in_port(PortNo(1300))
            .vlan(Vlan::Absent)
            .tunnel_id(0x10_0000, 0xf0_0000)
            .tunnel_src([10, 0, 0, 2].into());
        assert_eq!(
            all.to_string(),
            "in_port=1300,vlan_tci=0x0000/0x1fff,tun_id=0x100000/0xf00000,tun_src=10.0.0.2"
        );
        let slice = Match::any()
            .vlan(Vlan::Tag(257))
            .ip_dst(&"192.0.2.0/24".parse().unwrap())
            .ip_proto(PROTO_TCP)
            .tp_dst(1024, 0xfc00);
        assert_eq!(slice.to_string(), "dl_vlan=257,tcp,nw_dst=192.0.2.0/24,tp_dst=1024/0xfc00");
        let v6 = Match::any().ip_src(&"2001:db8::/48".parse().unwrap());
        assert_eq!(v6.to_string(), "ipv6,ipv6_src=2001:db8::/48");
        let actions =
            vec![Action::PopVlan, Action::SetTunnelDst([10, 0, 0, 2].into()), Action::Output(PortNo(7))];
        let rule = Rule { cookie: 0, actions, goto: Some(3) };
        assert_eq!(rule.to_string(), "pop_vlan,set_field:10.0.0.2->tun_dst,output:7,goto_table:3");
        assert_eq!(Rule::default().to_string(), "drop");
    }
}
