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
        // Who has closed and begins anew is through with the old session, whatever the other side thinks.
        ClientFin if inside && is_bare_syn(flags) => (ClientInit, true),
        Established | ClientFin | RemoteFin => (state, true),
        // The ports are used again before the old session's timer ends.
        BothFin if syn && inside && !rst => (ClientInit, true),
        BothFin => (BothFin, false),
        Transitory if rst => (Transitory, false),
        Transitory if inside && is_bare_syn(flags) => (ClientInit, true),
        Transitory => (Established, true),
    }
}

/// As [`step`], while another site sees a part of the packets: a bare SYN from inside is of a new session on the ports of one that ended there.
/// Where all packets are seen it is a late copy, and changes nothing.
#[must_use]
pub fn step_of_part(state: TcpState, inside: bool, flags: u8) -> (TcpState, bool) {
    let may_have_ended = matches!(state, TcpState::Established | TcpState::RemoteFin);
    if may_have_ended && inside && is_bare_syn(flags) {
        (TcpState::ClientInit, true)
    } else {
        step(state, inside, flags)
    }
}

fn is_bare_syn(flags: u8) -> bool {
    flags & (SYN | ACK | FIN | RST) == SYN
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
    fn who_has_closed_and_begins_anew_is_waited_for() {
        assert_eq!(step(ClientFin, true, SYN), (ClientInit, true));
        assert_eq!(step(ClientFin, true, SYN | ACK), (ClientFin, true));
        // A late copy of the SYN is no new session, but where a part of the packets is seen elsewhere it is.
        for state in [Established, RemoteFin] {
            assert_eq!(step(state, true, SYN), (state, true));
            assert_eq!(step_of_part(state, true, SYN), (ClientInit, true));
            assert_eq!(step_of_part(state, false, SYN), (state, true));
        }
        assert_eq!(step_of_part(ClientInit, false, SYN | ACK), (Established, true));
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
