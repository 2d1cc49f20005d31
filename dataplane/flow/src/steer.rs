//! What switches and workers tell one another about a packet: the VLAN tag between switch and worker, the
//! tunnel key between sites, and the marker packet that ends an old path.

use serde::{Deserialize, Serialize};

use crate::{Epoch, MoveId, ServiceId, SiteId};

/// Which way a packet of a group travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Side {
    /// From the client: its source lies in the client prefix.
    Inside,
    /// From the world: its destination lies in the outside slice.
    Outside,
}

/// The VLAN tag between switch and worker: four bits of role, eight bits of site.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Tag {
    /// To the worker: came in at this site's switch, on this side.
    Direct(Side, SiteId),
    /// To the worker: relayed by an old owner at this site. Says nothing about where the client is.
    Relayed(Side, SiteId),
    /// To the worker: a marker of the ingress at this site.
    Marker(SiteId),
    /// To the worker: the old owner at this site has stopped serving; nothing it emitted is behind this.
    Cut(SiteId),
    /// From the worker: to the world, at this site.
    ToOutside,
    /// From the worker: to the client, whose packets come in at this site.
    ToClient(SiteId),
    /// From the worker: to the owner, at this site.
    Relay(Side, SiteId),
    /// From the worker: to the next owner, at this site (see [`Tag::Cut`]).
    SendCut(SiteId),
}

impl Tag {
    /// The 12 bits of the VLAN id. Never 0 or 4095, which IEEE 802.1Q reserves, because roles run 1 to 11.
    #[must_use]
    pub fn vlan(self) -> u16 {
        let (role, site) = match self {
            Self::Direct(Side::Inside, site) => (1, site),
            Self::Direct(Side::Outside, site) => (2, site),
            Self::Relayed(Side::Inside, site) => (3, site),
            Self::Relayed(Side::Outside, site) => (4, site),
            Self::Marker(site) => (5, site),
            Self::Cut(site) => (6, site),
            Self::ToOutside => (7, SiteId(0)),
            Self::ToClient(site) => (8, site),
            Self::Relay(Side::Inside, site) => (9, site),
            Self::Relay(Side::Outside, site) => (10, site),
            Self::SendCut(site) => (11, site),
        };
        role << 8 | u16::from(site.0)
    }

    /// From the 12 bits of a VLAN id; the priority bits above are ignored.
    #[must_use]
    pub fn from_vlan(vlan: u16) -> Option<Self> {
        #[expect(clippy::cast_possible_truncation, reason = "the low eight bits are the site")]
        let site = SiteId(vlan as u8);
        Some(match vlan >> 8 & 0xf {
            1 => Self::Direct(Side::Inside, site),
            2 => Self::Direct(Side::Outside, site),
            3 => Self::Relayed(Side::Inside, site),
            4 => Self::Relayed(Side::Outside, site),
            5 => Self::Marker(site),
            6 => Self::Cut(site),
            7 => Self::ToOutside,
            8 => Self::ToClient(site),
            9 => Self::Relay(Side::Inside, site),
            10 => Self::Relay(Side::Outside, site),
            11 => Self::SendCut(site),
            _ => return None,
        })
    }
}

/// What a packet in a tunnel between sites is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TunnelRole {
    /// Steered by the ingress to the owner.
    Direct(Side),
    /// Relayed by an old owner to the new one.
    Relayed(Side),
    /// A marker of the ingress.
    Marker,
    /// The old owner's cut.
    Cut,
    /// From the owner to the client.
    ToClient,
}

/// The 24-bit tunnel key (VXLAN network identifier): role, service, low bits of the group's epoch.
/// The epoch is a hint for people and for fencing; the owner decides by its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TunnelKey {
    /// What the packet is.
    pub role: TunnelRole,
    /// Its service.
    pub service: ServiceId,
    /// The low 14 bits of the group's epoch.
    pub epoch_low: u16,
}

impl TunnelKey {
    /// Bits of the key that hold the role.
    pub const ROLE_MASK: u32 = 0xf << 20;
    /// Bits of the key that hold the service.
    pub const SERVICE_MASK: u32 = 0x3f << 14;

    /// A key with the low bits of an epoch.
    #[must_use]
    pub fn new(role: TunnelRole, service: ServiceId, epoch: Epoch) -> Self {
        Self { role, service, epoch_low: (epoch.0 & 0x3fff) as u16 }
    }

    /// The number on the wire.
    #[must_use]
    pub fn vni(self) -> u32 {
        self.role.number() << 20 | u32::from(self.service.get()) << 14 | u32::from(self.epoch_low)
    }

    /// From the number on the wire.
    #[must_use]
    pub fn from_vni(vni: u32) -> Option<Self> {
        let (service, epoch_low) = (ServiceId::new((vni >> 14 & 0x3f) as u8).ok()?, (vni & 0x3fff) as u16);
        Some(Self { role: TunnelRole::from_number(vni >> 20 & 0xf)?, service, epoch_low })
    }
}

impl TunnelRole {
    /// The four bits on the wire.
    #[must_use]
    pub fn number(self) -> u32 {
        match self {
            Self::Direct(Side::Inside) => 1,
            Self::Direct(Side::Outside) => 2,
            Self::Relayed(Side::Inside) => 3,
            Self::Relayed(Side::Outside) => 4,
            Self::Marker => 5,
            Self::Cut => 6,
            Self::ToClient => 8,
        }
    }

    /// From the four bits on the wire.
    #[must_use]
    pub fn from_number(number: u32) -> Option<Self> {
        Some(match number {
            1 => Self::Direct(Side::Inside),
            2 => Self::Direct(Side::Outside),
            3 => Self::Relayed(Side::Inside),
            4 => Self::Relayed(Side::Outside),
            5 => Self::Marker,
            6 => Self::Cut,
            8 => Self::ToClient,
            _ => return None,
        })
    }
}

/// IP protocol of markers and cuts: 253, for experiments (RFC 3692, section 2.1). A marker is an IP packet
/// from the group's first client address, so that it takes exactly the path of the group's packets.
pub const MARKER_PROTOCOL: u8 = 253;

/// Bytes of [`MarkerBody`] on the wire.
pub const MARKER_BODY_LEN: usize = 21;

/// What follows the IP header of a marker or a cut. The tag says which of the two it is and from where.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MarkerBody {
    /// The move.
    pub move_id: MoveId,
    /// The epoch of the new owner.
    pub epoch: Epoch,
    /// The service of the group.
    pub service: ServiceId,
    /// The length of the group's prefix; the address is the source address of the packet.
    pub prefix_len: u8,
    /// The site that sent it. A marker that an old owner relays is told apart by this.
    pub from: SiteId,
}

impl MarkerBody {
    /// First bytes, so that nobody else's experiment is taken for a marker.
    const MAGIC: [u8; 2] = *b"Lm";

    /// The bytes on the wire.
    #[must_use]
    pub fn encode(&self) -> [u8; MARKER_BODY_LEN] {
        let mut bytes = [0; MARKER_BODY_LEN];
        bytes[..2].copy_from_slice(&Self::MAGIC);
        bytes[2] = self.service.get();
        bytes[3] = self.prefix_len;
        bytes[4..12].copy_from_slice(&self.move_id.0.to_be_bytes());
        bytes[12..20].copy_from_slice(&self.epoch.0.to_be_bytes());
        bytes[20] = self.from.0;
        bytes
    }

    /// From the bytes behind the IP header; longer input is allowed (Ethernet padding).
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; MARKER_BODY_LEN] = bytes.first_chunk()?;
        if bytes[..2] != Self::MAGIC {
            return None;
        }
        Some(Self {
            service: ServiceId::new(bytes[2]).ok()?,
            prefix_len: bytes[3],
            move_id: MoveId(u64::from_be_bytes(*bytes[4..].first_chunk()?)),
            epoch: Epoch(u64::from_be_bytes(*bytes[12..].first_chunk()?)),
            from: SiteId(bytes[20]),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_tag_leads_back_and_none_is_reserved() {
        let roles = [
            Tag::Direct(Side::Inside, SiteId(255)),
            Tag::Direct(Side::Outside, SiteId(0)),
            Tag::Relayed(Side::Inside, SiteId(1)),
            Tag::Relayed(Side::Outside, SiteId(2)),
            Tag::Marker(SiteId(3)),
            Tag::Cut(SiteId(4)),
            Tag::ToOutside,
            Tag::ToClient(SiteId(5)),
            Tag::Relay(Side::Inside, SiteId(6)),
            Tag::Relay(Side::Outside, SiteId(7)),
            Tag::SendCut(SiteId(8)),
        ];
        for tag in roles {
            assert_eq!(Tag::from_vlan(tag.vlan()), Some(tag));
            assert!((1..4095).contains(&tag.vlan()));
        }
    }

    proptest! {
        #[test]
        fn what_decodes_encodes_to_the_same(vni in 0u32..1 << 24, vlan in 0u16..1 << 12, bytes: [u8; 24]) {
            if let Some(key) = TunnelKey::from_vni(vni) {
                prop_assert_eq!(key.vni(), vni);
            }
            if let Some(tag) = Tag::from_vlan(vlan) {
                prop_assert!(tag.vlan() == vlan || tag == Tag::ToOutside);
            }
            let mut bytes = bytes;
            bytes[..2].copy_from_slice(&MarkerBody::MAGIC);
            if let Some(body) = MarkerBody::decode(&bytes) {
                prop_assert_eq!(&body.encode()[..], &bytes[..MARKER_BODY_LEN]);
            }
        }

        #[test]
        fn a_cut_off_marker_is_refused(len in 0usize..MARKER_BODY_LEN) {
            let body = MarkerBody {
                move_id: MoveId(1),
                epoch: Epoch(2),
                service: ServiceId::default(),
                prefix_len: 24,
                from: SiteId(3),
            };
            prop_assert_eq!(MarkerBody::decode(&body.encode()[..len]), None);
        }
    }
}
