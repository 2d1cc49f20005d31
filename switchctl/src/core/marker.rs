//! The packet that ends an old path: built here, sent by an ingress after its flip is in force.

use std::net::IpAddr;

use flow::steer::{MARKER_BODY_LEN, MARKER_PROTOCOL, MarkerBody, Tag, TunnelKey, TunnelRole};
use flow::{Epoch, GroupId, MoveId, SiteId, WorkerId};

use super::compile::SitePlan;
use super::rules::{Action, ETH_IPV4, ETH_IPV6, PacketOut, PortNo};

/// Ethernet source and destination of markers; locally administered, and nobody looks at them.
const MACS: [u8; 12] = [0x02, 0x4c, 0x6d, 0, 0, 1, 0x02, 0x4c, 0x6d, 0, 0, 2];

/// Where the packets of a group went before the flip.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OldPath {
    /// To a worker of this site.
    Local(WorkerId),
    /// Through the tunnel to another site.
    Remote(SiteId),
}

/// Why no marker can be sent; the plan and the old path disagree, so the caller is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MarkerError {
    /// The worker has no port.
    #[error("worker {0} has no port on this switch")]
    NoWorker(WorkerId),
    /// There is no tunnel to the site.
    #[error("site {0} has no tunnel on this switch")]
    NoTunnel(SiteId),
}

/// An Ethernet frame that carries a marker (or, in tests, a cut): an IP packet from the group's first client
/// address, so that it matches the same rules as the group's own packets.
#[must_use]
pub fn marker_packet(group: &GroupId, move_id: MoveId, epoch: Epoch, from: SiteId) -> Vec<u8> {
    let body = MarkerBody { move_id, epoch, service: group.service, prefix_len: group.prefix.len(), from };
    let mut frame = Vec::with_capacity(14 + 40 + MARKER_BODY_LEN);
    frame.extend_from_slice(&MACS);
    match group.prefix.address() {
        IpAddr::V4(address) => ipv4_header(&mut frame, address.octets()),
        IpAddr::V6(address) => ipv6_header(&mut frame, address.octets()),
    }
    frame.extend_from_slice(&body.encode());
    frame
}

fn ipv4_header(frame: &mut Vec<u8>, address: [u8; 4]) {
    frame.extend_from_slice(&ETH_IPV4.to_be_bytes());
    let at = frame.len();
    let total = (20 + MARKER_BODY_LEN) as u16;
    frame.extend_from_slice(&[0x45, 0]);
    frame.extend_from_slice(&total.to_be_bytes());
    frame.extend_from_slice(&[0, 0, 0x40, 0, 64, MARKER_PROTOCOL, 0, 0]);
    frame.extend_from_slice(&address);
    frame.extend_from_slice(&address);
    let sum = frame[at..].chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1])).sum::<u32>();
    let folded = (sum & 0xffff) + (sum >> 16);
    let checksum = !((folded & 0xffff) + (folded >> 16)) as u16;
    frame[at + 10..at + 12].copy_from_slice(&checksum.to_be_bytes());
}

fn ipv6_header(frame: &mut Vec<u8>, address: [u8; 16]) {
    frame.extend_from_slice(&ETH_IPV6.to_be_bytes());
    frame.extend_from_slice(&[0x60, 0, 0, 0]);
    frame.extend_from_slice(&(MARKER_BODY_LEN as u16).to_be_bytes());
    frame.extend_from_slice(&[MARKER_PROTOCOL, 64]);
    frame.extend_from_slice(&address);
    frame.extend_from_slice(&address);
}

/// The marker of this site for a move of `group` to `epoch`, sent down the path that the group's packets took
/// before the flip, whatever the rules say now.
///
/// # Errors
/// [`MarkerError`] when the old path has no port.
pub fn marker_out(
    plan: &SitePlan,
    old: OldPath,
    group: &GroupId,
    move_id: MoveId,
    epoch: Epoch,
) -> Result<PacketOut, MarkerError> {
    let actions = match old {
        OldPath::Local(worker) => {
            let port = plan.ports.workers.get(&worker).ok_or(MarkerError::NoWorker(worker))?;
            vec![Action::PushVlan(Tag::Marker(plan.site).vlan()), Action::Output(*port)]
        }
        OldPath::Remote(site) => {
            let tunnel = plan.ports.tunnels.get(&site).ok_or(MarkerError::NoTunnel(site))?;
            let key = TunnelKey::new(TunnelRole::Marker, group.service, epoch);
            tunnel.enter(key).collect()
        }
    };
    let bytes = marker_packet(group, move_id, epoch, plan.site);
    Ok(PacketOut { bytes, in_port: PortNo::CONTROLLER, actions })
}

#[cfg(test)]
mod tests {
    use super::*;
    use etherparse::{NetSlice, SlicedPacket};

    #[test]
    fn a_marker_is_a_valid_packet_from_the_first_client() {
        for text in ["3:100.64.8.0/22", "3:2001:db8::/48"] {
            let group: GroupId = text.parse().unwrap();
            let frame = marker_packet(&group, MoveId(9), Epoch(4), SiteId(2));
            let sliced = SlicedPacket::from_ethernet(&frame).unwrap();
            let (source, payload) = match sliced.net.unwrap() {
                NetSlice::Ipv4(ip) => {
                    assert_eq!(ip.header().header_checksum(), ip.header().to_header().calc_header_checksum());
                    (IpAddr::V4(ip.header().source_addr()), ip.payload().payload.to_vec())
                }
                NetSlice::Ipv6(ip) => (IpAddr::V6(ip.header().source_addr()), ip.payload().payload.to_vec()),
                other => panic!("{other:?}"),
            };
            assert_eq!(source, group.prefix.address());
            let body = MarkerBody::decode(&payload).unwrap();
            assert_eq!((body.move_id, body.epoch, body.from), (MoveId(9), Epoch(4), SiteId(2)));
            assert_eq!((body.service, body.prefix_len), (group.service, group.prefix.len()));
        }
    }
}
