//! Ethernet, IPv4 and UDP as far as the world needs them.

use std::net::Ipv4Addr;

/// An IPv4 address and a port.
pub(super) type Address = (Ipv4Addr, u16);

/// Length of an Ethernet header.
pub(super) const ETHERNET_LEN: usize = 14;
const IP_LEN: usize = 20;
const UDP_LEN: usize = 8;
/// Where the payload of a UDP frame that we make begins.
pub(super) const UDP_PAYLOAD: usize = ETHERNET_LEN + IP_LEN + UDP_LEN;

pub(super) const TCP: u8 = 6;
pub(super) const UDP: u8 = 17;

/// Constant addresses: the switch steers by IP only.
const ETHERNET: [u8; ETHERNET_LEN] = [2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0];

/// The headers of a TCP or UDP packet.
#[derive(Clone, Copy, Debug)]
pub(super) struct Headers {
    pub(super) from: Address,
    pub(super) to: Address,
    pub(super) protocol: u8,
    /// Where the transport header begins, counted from the frame's start.
    transport: usize,
    /// Where the IP packet ends.
    end: usize,
}

impl Headers {
    /// Reads a frame; `None` when it is not a whole IPv4 packet of TCP or UDP.
    pub(super) fn parse(frame: &[u8]) -> Option<Self> {
        let ip = frame.get(ETHERNET_LEN..)?;
        if frame[12..14] != ETHERNET[12..] || ip.first()? >> 4 != 4 {
            return None;
        }
        let header_len = usize::from(ip[0] & 15) * 4;
        let len = usize::from(u16_at(ip, 2)?);
        let protocol = *ip.get(9)?;
        let least = if protocol == UDP { UDP_LEN } else { 20 };
        if header_len < IP_LEN || len > ip.len() || len < header_len + least || !matches!(protocol, TCP | UDP)
        {
            return None;
        }
        let address = |at: usize| Some(Ipv4Addr::from(<[u8; 4]>::try_from(ip.get(at..at + 4)?).ok()?));
        let from = (address(12)?, u16_at(ip, header_len)?);
        let to = (address(16)?, u16_at(ip, header_len + 2)?);
        Some(Self { from, to, protocol, transport: ETHERNET_LEN + header_len, end: ETHERNET_LEN + len })
    }

    /// Whether the checksums of IP and transport are right. UDP without a checksum counts as wrong, for
    /// nobody here sends it so.
    pub(super) fn are_intact(&self, frame: &[u8]) -> bool {
        let transport = &frame[self.transport..self.end];
        let has_checksum = self.protocol == TCP || transport[6..8] != [0, 0];
        has_checksum
            && fold(sum(&frame[ETHERNET_LEN..self.transport])) == 0xffff
            && fold(self.pseudo_sum() + sum(transport)) == 0xffff
    }

    /// The IP packet.
    pub(super) fn packet<'a>(&self, frame: &'a [u8]) -> &'a [u8] {
        &frame[ETHERNET_LEN..self.end]
    }

    /// What a UDP packet carries.
    pub(super) fn udp_payload<'a>(&self, frame: &'a [u8]) -> &'a [u8] {
        &frame[self.transport + UDP_LEN..self.end]
    }

    fn pseudo_sum(&self) -> u64 {
        let len = (self.end - self.transport) as u64;
        sum(&self.from.0.octets()) + sum(&self.to.0.octets()) + u64::from(self.protocol) + len
    }
}

/// Puts an Ethernet header before an IP packet that begins at [`ETHERNET_LEN`].
pub(super) fn write_ethernet(frame: &mut [u8]) {
    frame[..ETHERNET_LEN].copy_from_slice(&ETHERNET);
}

/// Writes all headers and checksums of a UDP frame whose payload is in place from [`UDP_PAYLOAD`] on. The
/// frame must be no longer than an IP packet can be.
pub(super) fn write_udp(frame: &mut [u8], from: Address, to: Address) {
    write_ethernet(frame);
    let len = |start: usize| u16::try_from(frame.len() - start).unwrap_or(u16::MAX).to_be_bytes();
    let (ip_len, udp_len) = (len(ETHERNET_LEN), len(ETHERNET_LEN + IP_LEN));
    let ip = &mut frame[ETHERNET_LEN..ETHERNET_LEN + IP_LEN];
    ip.copy_from_slice(&[
        0x45, 0, ip_len[0], ip_len[1], 0, 0, 0x40, 0, 64, UDP, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    ]);
    ip[12..16].copy_from_slice(&from.0.octets());
    ip[16..20].copy_from_slice(&to.0.octets());
    let checksum = !fold(sum(ip));
    ip[10..12].copy_from_slice(&checksum.to_be_bytes());
    let udp = &mut frame[ETHERNET_LEN + IP_LEN..];
    udp[..2].copy_from_slice(&from.1.to_be_bytes());
    udp[2..4].copy_from_slice(&to.1.to_be_bytes());
    udp[4..6].copy_from_slice(&udp_len);
    udp[6..8].fill(0);
    let pseudo = sum(&from.0.octets()) + sum(&to.0.octets()) + u64::from(UDP) + sum(&udp_len);
    let checksum = match !fold(pseudo + sum(udp)) {
        0 => 0xffff,
        other => other,
    };
    udp[6..8].copy_from_slice(&checksum.to_be_bytes());
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]))
}

/// Sum of 16-bit words, the last one padded with zero.
fn sum(bytes: &[u8]) -> u64 {
    let words = bytes.chunks_exact(2);
    let last = words.remainder().first().map_or(0, |&byte| u64::from(byte) << 8);
    words.map(|word| u64::from(u16::from_be_bytes([word[0], word[1]]))).sum::<u64>() + last
}

fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    u16::try_from(sum).unwrap_or(u16::MAX)
}

/// Changes the addresses of a packet as a NAT does it: checksums follow, and a wrong one stays wrong.
#[cfg(test)]
pub(super) fn rewrite(frame: &mut [u8], headers: &Headers, from: Address, to: Address) {
    let transport = headers.transport;
    let checksum = transport + if headers.protocol == TCP { 16 } else { 6 };
    let addresses = ETHERNET_LEN + 12..ETHERNET_LEN + 20;
    let before = sum(&frame[addresses.clone()]);
    let ports_before = sum(&frame[transport..transport + 4]);
    frame[addresses.start..][..4].copy_from_slice(&from.0.octets());
    frame[addresses.start + 4..][..4].copy_from_slice(&to.0.octets());
    frame[transport..transport + 2].copy_from_slice(&from.1.to_be_bytes());
    frame[transport + 2..transport + 4].copy_from_slice(&to.1.to_be_bytes());
    let change = sum(&frame[addresses]) + u64::from(!fold(before));
    let ports = sum(&frame[transport..transport + 4]) + u64::from(!fold(ports_before));
    for (at, change) in [(ETHERNET_LEN + 10, change), (checksum, change + ports)] {
        let old = u16::from_be_bytes([frame[at], frame[at + 1]]);
        let new = match !fold(u64::from(!old) + change) {
            // RFC 768: zero would mean that there is none.
            0 if at == checksum && headers.protocol == UDP => 0xffff,
            new => new,
        };
        frame[at..at + 2].copy_from_slice(&new.to_be_bytes());
    }
}
