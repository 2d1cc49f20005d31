//! The TCP session machine of RFC 6146, section 3.5.2, as a NAT44 uses it (RFC 7857, section 2). `Client`
//! and `Remote` stand for its V6 and V4 side.

use flow::TcpState;

use crate::packet::tcp_flags::{ACK, FIN, RST, SYN};

/// The state after the first packet of a flow; `None` when it may not open one.
///
/// From the world only a bare SYN opens (endpoint-independent filtering lets it). From inside a packet in
/// the middle of a connection is taken up too, since the port is likely to be the same as before a loss of
/// state; it lives shortly until more packets follow.
#[must_use]
pub fn first(inside: bool, flags: u8) -> Option<TcpState> {
    if flags & RST != 0 || flags & (SYN | FIN) == SYN | FIN {
        return None;
    }
    match (inside, flags & SYN != 0) {
        (true, true) => Some(TcpState::ClientInit),
        (true, false) => Some(TcpState::Transitory),
        (false, true) if flags & ACK == 0 => Some(TcpState::RemoteInit),
        (false, _) => None,
    }
}

/// The state after a packet, and whether the timer starts anew.
#[must_use]
pub fn step(state: TcpState, inside: bool, flags: u8) -> (TcpState, bool) {
    use TcpState::{BothFin, ClientFin, ClientInit, Established, None, RemoteFin, RemoteInit, Transitory};
    let (syn, fin, rst) = (flags & SYN != 0, flags & FIN != 0, flags & RST != 0);
    match state {
        None => (None, true),
        ClientInit if syn && !inside => (Established, true),
        RemoteInit if syn && inside => (Established, true),
        ClientInit => (ClientInit, syn),
        RemoteInit => (RemoteInit, syn),
        Established | ClientFin | RemoteFin if rst => (Transitory, true),
        Established if fin => (if inside { ClientFin } else { RemoteFin }, true),
        ClientFin if fin && !inside => (BothFin, true),
        RemoteFin if fin && inside => (BothFin, true),
        Established | ClientFin | RemoteFin => (state, true),
        // The ports are used again before the old session's timer ends.
        BothFin if syn && inside && !rst => (ClientInit, true),
        BothFin => (BothFin, false),
        Transitory if rst => (Transitory, false),
        Transitory if syn && inside && flags & ACK == 0 => (ClientInit, true),
        Transitory => (Established, true),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use TcpState::{BothFin, ClientFin, ClientInit, Established, RemoteFin, RemoteInit, Transitory};

    #[test]
    fn one_syn_each_way_is_enough() {
        assert_eq!(step(ClientInit, false, SYN | ACK), (Established, true));
        assert_eq!(step(ClientInit, false, SYN), (Established, true));
        assert_eq!(step(RemoteInit, true, SYN | ACK), (Established, true));
    }

    #[test]
    fn a_half_open_session_is_refreshed_by_syn_only() {
        assert_eq!(step(ClientInit, true, SYN), (ClientInit, true));
        assert_eq!(step(ClientInit, true, ACK), (ClientInit, false));
    }

    #[test]
    fn each_side_closes_its_half_and_then_only_time_ends_it() {
        assert_eq!(step(Established, true, FIN | ACK), (ClientFin, true));
        assert_eq!(step(ClientFin, false, ACK), (ClientFin, true));
        assert_eq!(step(ClientFin, false, FIN | ACK), (BothFin, true));
        assert_eq!(step(Established, false, FIN), (RemoteFin, true));
        assert_eq!(step(RemoteFin, true, FIN), (BothFin, true));
        assert_eq!(step(BothFin, true, ACK), (BothFin, false));
    }

    #[test]
    fn a_blind_reset_does_not_kill() {
        assert_eq!(step(Established, false, RST), (Transitory, true));
        assert_eq!(step(Transitory, false, RST), (Transitory, false));
        assert_eq!(step(Transitory, true, ACK), (Established, true));
    }

    #[test]
    fn only_a_bare_syn_opens_from_outside() {
        assert_eq!(first(false, SYN), Some(RemoteInit));
        assert_eq!(first(false, SYN | ACK), None);
        assert_eq!(first(false, ACK), None);
        assert_eq!(first(true, RST), None);
        assert_eq!(first(true, SYN | FIN), None);
    }
}
