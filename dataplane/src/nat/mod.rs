//! NAT44: which packets open a flow, and how long flows live.
//!
//! Mappings and filtering are endpoint-independent (RFC 4787, REQ-1 and REQ-8). Packets of both directions
//! refresh UDP and ICMP flows (REQ-6 and 6a); TCP follows the session machine of RFC 6146. ICMP errors are
//! translated and change nothing else. Fragments are not carried: they are counted as unsupported.

pub mod tcp;

use std::net::IpAddr;

use flow::nat::NatSlices;
use flow::{FlowRecord, GroupId, Protocol, TcpState};

use crate::control::{ServiceSpec, Timeouts};
use crate::table::TICKS_PER_SECOND;
use crate::table::mapping::Range;

/// A service with its addresses checked.
#[derive(Debug)]
pub struct Service {
    /// As configured.
    pub spec: ServiceSpec,
    /// Who owns which outside port.
    pub slices: NatSlices,
}

/// Who an outside port belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    /// The client's address.
    pub client: u32,
    /// Place of the service in the worker's list.
    pub service: usize,
}

/// The client that owns an outside port, over all services.
#[must_use]
pub fn owner(services: &[Service], address: u32, port: u16) -> Option<Owner> {
    services.iter().enumerate().find_map(|(service, entry)| {
        let subscriber = entry.slices.owner(address.into(), port)?;
        Some(Owner { client: entry.slices.client(subscriber)?.into(), service })
    })
}

/// Whether an address is of any pool.
#[must_use]
pub fn in_pool(services: &[Service], address: u32) -> bool {
    let address = IpAddr::V4(address.into());
    services.iter().any(|entry| entry.slices.spec().pool.iter().any(|prefix| prefix.contains(address)))
}

/// The outside address of a client and the ports to try for one of its endpoints.
#[must_use]
pub fn range(slices: &NatSlices, protocol: Protocol, client: u32, port: u16) -> Option<(u32, Range)> {
    let subscriber = slices.subscriber(client.into())?;
    let block = slices.block(subscriber)?;
    let preferred = slices.preferred_offset(subscriber, protocol, port);
    Some((block.address.into(), Range { first: block.first, count: block.count, preferred }))
}

/// Ticks that a flow lives without a packet.
#[must_use]
pub fn lifetime(timeouts: &Timeouts, protocol: Protocol, tcp: TcpState) -> u32 {
    let seconds = match (protocol, tcp) {
        (Protocol::Udp, _) => timeouts.udp_s,
        (Protocol::Icmp | Protocol::Icmp6, _) => timeouts.icmp_s,
        (Protocol::Tcp, TcpState::Established | TcpState::ClientFin | TcpState::RemoteFin) => {
            timeouts.tcp_established_s
        }
        (Protocol::Tcp, _) => timeouts.tcp_transitory_s,
    };
    // One more tick: the clock's present tick may be nearly over.
    seconds.saturating_mul(TICKS_PER_SECOND).saturating_add(1)
}

/// Whether a record from another site may be installed for a group: an authenticated peer may still be
/// wrong, and must not touch others' addresses.
///
/// # Errors
/// The reason, for people.
pub fn check_record(slices: &NatSlices, group: &GroupId, record: &FlowRecord) -> Result<(), String> {
    let IpAddr::V4(client) = record.key.client.address else {
        return Err(format!("client {} is not IPv4", record.key.client.address));
    };
    if !record.key.remote.address.is_ipv4() || record.key.protocol == Protocol::Icmp6 {
        return Err("the flow is not IPv4".to_owned());
    }
    if !group.prefix.contains(record.key.client.address) {
        return Err(format!("client {client} is outside the group {group}"));
    }
    let flow::Fixed::Nat44 { outside_port } = record.fixed;
    let block = slices.subscriber(client).and_then(|subscriber| slices.block(subscriber));
    let block = block.ok_or_else(|| format!("client {client} is no subscriber of the service"))?;
    if outside_port < block.first || outside_port - block.first >= block.count {
        let last = u32::from(block.first) + u32::from(block.count) - 1;
        return Err(format!(
            "outside port {outside_port} is not in the client's block {}..={last}",
            block.first
        ));
    }
    Ok(())
}
