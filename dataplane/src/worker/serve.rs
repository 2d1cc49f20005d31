//! Packets of groups: translated, held, queued behind others, or counted as markers.

use flow::steer::{MarkerBody, Side, Tag};
use flow::{GroupId, Micros, Prefix, Protocol, SiteId, TcpState};

use super::{BURST_LEN, ICMP_PER_SECOND, Look, NIL, Output, Worker, tick};
use crate::control::Ordering;
use crate::group::{Held, State};
use crate::io::PacketBuf;
use crate::nat::{self, tcp};
use crate::packet::{self, Content, End, Headers, IcmpError, by_port};
use crate::rtt::Timed;
use crate::table::mapping::BindError;
use crate::table::{NewFlow, flags};

/// Held packets may go over the bound by this factor when the source relays them: sending those back
/// would let them circle.
pub(crate) const RELAYED_HOLD_FACTOR: usize = 4;

impl<B: PacketBuf> Worker<B> {
    /// Translates a packet of a group that we serve.
    pub(super) fn serve(
        &mut self,
        mut packet: B,
        number: u32,
        look: &Look,
        now: Micros,
        out: &mut Output<B>,
    ) {
        let message = self.message_in(packet.data(), look);
        let about = message.as_ref().map_or(look, |(message, _)| message);
        if self.groups[number as usize].open && (self.is_unmapped(about) || self.wants_port(about)) {
            return self.ask_source(packet, number, look, now, out);
        }
        if let State::Draining(armed) = &self.groups[number as usize].state
            && armed.target != self.settings.site
            && self.is_unmapped(about)
        {
            // A relaxed target may have opened the flow already; a strict one holds the packet and decides later. Another worker of this
            // site has opened none, and until the markers are in, no rule of the switch need lead there.
            let target = armed.target;
            return self.relay(packet, look.side, target, out);
        }
        if let Some((_, headers)) = message {
            // Only now: what another worker has to decide goes there by port.
            let len = by_port::unwrap(packet.data_mut(), &headers);
            packet.truncate(len);
            return self.serve_message(packet, number, now, out);
        }
        let sent = match look.parsed.content {
            Content::Flow(headers) => self.serve_flow(&mut packet, number, look, &headers, now, out),
            Content::Error(error) => self.serve_error(&mut packet, look, &error),
            Content::Marker(..) => {
                self.counters.dropped_malformed += 1;
                false
            }
        };
        if sent {
            self.send(packet, out);
        } else {
            out.free.push(packet);
        }
    }

    /// The ICMP message that came by port in this packet, as if it were parsed alone, and the headers around it.
    fn message_in(&mut self, frame: &[u8], look: &Look) -> Option<(Look, Headers)> {
        let Content::Flow(headers) = look.parsed.content else { return None };
        let seal = by_port::seal_of(frame, &headers)?;
        if look.side != Side::Outside || self.seal(&headers, headers.destination_port) != Some(seal) {
            return None;
        }
        let parsed = by_port::peek(frame, &look.parsed, &headers)?;
        Some((self.look_at(parsed)?, headers))
    }

    fn serve_message(&mut self, packet: B, number: u32, now: Micros, out: &mut Output<B>) {
        match packet::parse(packet.data()) {
            Ok(parsed) => {
                if let Some(look) = self.look_at(parsed) {
                    return self.serve(packet, number, &look, now, out);
                }
            }
            Err(reject) => self.count_reject(reject),
        }
        out.free.push(packet);
    }

    /// Whether a packet needs a flow or a mapping that is not here: one from the world, and of a client an error, or TCP that opens
    /// nothing. The other side of a move may have it.
    fn is_unmapped(&self, look: &Look) -> bool {
        let Look { side, tuple, .. } = look;
        let (inside, mappings) = (*side == Side::Inside, &self.table.mappings);
        let mapping = if inside {
            mappings.of_client(tuple.protocol, tuple.client, tuple.port)
        } else {
            mappings.of_outside(tuple.protocol, tuple.client, tuple.port)
        };
        match look.parsed.content {
            Content::Flow(headers)
                if headers.protocol == Protocol::Tcp && tcp::first(inside, headers.tcp_flags).is_none() =>
            {
                self.table.find(inside, tuple).is_none()
            }
            Content::Flow(_) if inside => false,
            Content::Flow(_) | Content::Error(_) | Content::Marker(..) => mapping.is_none(),
        }
    }

    /// Whether a packet from a client needs an outside port. Until the join only the source gives ports: two sites that do would give
    /// one endpoint two, or one port to two endpoints (RFC 4787, REQ-1 and REQ-3).
    fn wants_port(&self, look: &Look) -> bool {
        let Look { side, tuple, .. } = look;
        *side == Side::Inside
            && self.table.mappings.of_client(tuple.protocol, tuple.client, tuple.port).is_none()
    }

    /// The source decides while it serves; once it has cut it sends the packet back, to wait for the join.
    fn ask_source(&mut self, packet: B, number: u32, look: &Look, now: Micros, out: &mut Output<B>) {
        let group = &mut self.groups[number as usize];
        let source = group.arrival.as_ref().map_or(self.settings.site, |arrival| arrival.source);
        let Tag::Relayed(_, site) = look.parsed.tag else {
            return self.relay(packet, look.side, source, out);
        };
        if self.is_hold_filling() {
            self.counters.dropped_hold_full += 1;
            return out.free.push(packet);
        }
        let held = self.keep(packet, site, now, out);
        let hold = &mut self.groups[number as usize].hold;
        hold.total += 1;
        hold.parked.push_back(held);
    }

    /// A packet that waits, in no more memory than it needs.
    fn keep(&mut self, packet: B, site: SiteId, now: Micros, out: &mut Output<B>) -> Held<B> {
        let (packet, buffer) = packet.compact();
        out.free.extend(buffer);
        self.held += 1;
        self.held_bytes += packet.footprint();
        self.counters.held += 1;
        Held { packet, since: now, site }
    }

    /// Packets that were held are no more, or are about to be served.
    pub(super) fn let_go(&mut self, held: &Held<B>) {
        self.held -= 1;
        self.held_bytes -= held.packet.footprint();
    }

    /// Direct packets are held no more, so that there is room for those that the source relays.
    fn is_hold_filling(&self) -> bool {
        self.held >= self.settings.hold_packets_max || self.held_bytes >= self.settings.hold_bytes_max / 2
    }

    /// Nothing more can be held.
    fn is_hold_full(&self) -> bool {
        self.held >= self.settings.hold_packets_max * RELAYED_HOLD_FACTOR
            || self.held_bytes >= self.settings.hold_bytes_max
    }

    fn serve_flow(
        &mut self,
        packet: &mut B,
        number: u32,
        look: &Look,
        headers: &Headers,
        now: Micros,
        out: &mut Output<B>,
    ) -> bool {
        if headers.ttl <= 1 {
            self.counters.dropped_ttl += 1;
            return false;
        }
        let inside = look.side == Side::Inside;
        // An earlier packet of the burst may have made the flow.
        let found = if look.flow == NIL { self.table.find(inside, &look.tuple) } else { Some(look.flow) };
        let flow = match found {
            Some(flow) => {
                self.advance(flow, number, look, headers, now);
                flow
            }
            None => match self.open(number, look, headers, now) {
                Some(flow) => flow,
                None => {
                    self.explain_exhausted(packet.data(), look, headers, now, out);
                    return false;
                }
            },
        };
        self.account(flow, number, inside, headers);
        self.rewrite(packet.data_mut(), flow, inside, headers);
        true
    }

    fn account(&mut self, flow: u32, number: u32, inside: bool, headers: &Headers) {
        let group = &mut self.groups[number as usize];
        group.load.packets += 1;
        group.load.bytes += u64::from(headers.ip_len);
        self.table.count(flow, inside, headers.ip_len);
        if group.flows.tracking {
            self.table.mark_dirty(flow, &mut group.flows);
        }
    }

    fn rewrite(&mut self, frame: &mut [u8], flow: u32, inside: bool, headers: &Headers) {
        let entry = *self.table.flow(flow);
        if inside {
            packet::translate(frame, headers, End::Source, entry.outside, entry.outside_port);
            packet::set_tag(frame, Tag::ToOutside);
            self.counters.translated_out += 1;
            self.counters.hairpinned += u64::from(entry.flags & flags::HAIRPIN != 0);
        } else {
            packet::translate(frame, headers, End::Destination, entry.client, entry.client_port);
            packet::set_tag(frame, Tag::ToClient(SiteId(entry.ingress)));
            self.counters.translated_in += 1;
        }
    }

    /// A packet of a known flow: session machine, timer, ingress.
    fn advance(&mut self, flow: u32, number: u32, look: &Look, headers: &Headers, now: Micros) {
        if self.groups[number as usize].open {
            self.keep_base(flow, number, now);
        }
        let inside = look.side == Side::Inside;
        let group = &self.groups[number as usize];
        let clock = group.clock(tick(now));
        let service = group.id.service;
        let entry = self.table.flow_mut(flow);
        let (tcp, refresh) = match entry.protocol {
            Protocol::Tcp if group.open => tcp::step_of_part(entry.tcp, inside, headers.tcp_flags),
            Protocol::Tcp => tcp::step(entry.tcp, inside, headers.tcp_flags),
            Protocol::Udp | Protocol::Icmp | Protocol::Icmp6 => (TcpState::None, true),
        };
        if group.open && tcp == TcpState::ClientInit && entry.tcp >= TcpState::Established {
            entry.flags |= flags::RENEWED;
        }
        entry.tcp = tcp;
        let protocol = entry.protocol;
        if refresh && let Some(known) = self.services.iter().find(|known| known.spec.service == service) {
            entry.expires = clock.saturating_add(nat::lifetime(&known.spec.timeouts, protocol, tcp));
        }
        if let Tag::Direct(Side::Inside, site) = look.parsed.tag
            && entry.ingress != site.0
        {
            entry.ingress = site.0;
            let mapping = entry.mapping;
            self.table.mappings.set_ingress(mapping, site.0);
        }
        if self.table.flow(flow).flags & flags::HANDSHAKE != 0 {
            self.time_handshake(flow, number, look, headers, now);
        }
    }

    /// Relaxed: before the first packet of a shadow flow, notes what it came with.
    fn keep_base(&mut self, flow: u32, number: u32, now: Micros) {
        let group = &mut self.groups[number as usize];
        let entry = self.table.flow(flow);
        if entry.flags & (flags::IMPORTED | flags::TOUCHED) != flags::IMPORTED {
            return;
        }
        let base = self.table.joined(flow, group.clock(tick(now)));
        if let Some(arrival) = &mut group.arrival {
            arrival.bases.insert(flow, base);
        }
        self.table.flow_mut(flow).flags |= flags::TOUCHED;
    }

    fn time_handshake(&mut self, flow: u32, number: u32, look: &Look, headers: &Headers, now: Micros) {
        let entry = self.table.flow(flow);
        let direct = origin(look.parsed.tag).filter(|(direct, _)| *direct);
        let (inside, ingress) = (look.side == Side::Inside, direct.map(|(_, site)| site));
        let packet = Timed {
            inside,
            flags: headers.tcp_flags,
            group: self.groups[number as usize].id,
            remote: (entry.remote, entry.remote_port),
            ingress,
        };
        if self.round_trips.packet(flow, &packet, now) {
            self.table.flow_mut(flow).flags &= !flags::HANDSHAKE;
        }
    }

    /// A packet without a flow: opens one if it may.
    fn open(&mut self, number: u32, look: &Look, headers: &Headers, now: Micros) -> Option<u32> {
        let inside = look.side == Side::Inside;
        let tcp = match headers.protocol {
            Protocol::Tcp => tcp::first(inside, headers.tcp_flags),
            Protocol::Udp | Protocol::Icmp | Protocol::Icmp6 => Some(TcpState::None),
        };
        let Some(tcp) = tcp else {
            self.counters.dropped_no_mapping += 1;
            return None;
        };
        if self.table.room() as u64 <= self.reserved {
            self.counters.dropped_table_full += 1;
            return None;
        }
        let (mapping, outside) = if inside { self.bind(number, look)? } else { self.mapped(look, headers)? };
        let port = self.table.mappings.get(mapping).client_port;
        self.insert(number, look, mapping, outside, port, tcp, now)
    }

    /// The mapping of a client's endpoint, made when it has none.
    fn bind(&mut self, number: u32, look: &Look) -> Option<(u32, u32)> {
        let service = self.groups[number as usize].id.service;
        let tuple = &look.tuple;
        let known = self.services.iter().find(|known| known.spec.service == service);
        let range =
            known.and_then(|known| nat::range(&known.slices, tuple.protocol, tuple.client, tuple.port));
        let Some((outside, range)) = range else {
            self.counters.dropped_no_mapping += 1;
            return None;
        };
        match self.table.mappings.bind(tuple.protocol, tuple.client, tuple.port, range) {
            Ok(mapping) => Some((mapping, outside)),
            Err(BindError::Exhausted | BindError::Conflict) => {
                self.counters.dropped_port_block_exhausted += 1;
                None
            }
        }
    }

    /// Endpoint-independent filtering: any remote may use a mapping that is there.
    fn mapped(&mut self, look: &Look, headers: &Headers) -> Option<(u32, u32)> {
        let tuple = &look.tuple;
        let mapping = self.table.mappings.of_outside(tuple.protocol, tuple.client, tuple.port);
        if mapping.is_none() {
            self.counters.dropped_no_mapping += 1;
        }
        Some((mapping?, headers.destination))
    }

    #[expect(clippy::too_many_arguments, reason = "all of it is the new flow")]
    fn insert(
        &mut self,
        number: u32,
        look: &Look,
        mapping: u32,
        outside: u32,
        port: u16,
        tcp: TcpState,
        now: Micros,
    ) -> Option<u32> {
        let group = &mut self.groups[number as usize];
        let service = group.id.service;
        let Some(known) = self.services.iter().find(|known| known.spec.service == service) else {
            self.counters.dropped_no_mapping += 1;
            return None;
        };
        let life = nat::lifetime(&known.spec.timeouts, look.tuple.protocol, tcp);
        let known_ingress = Some(self.table.mappings.get(mapping)).filter(|mapping| mapping.flows > 0);
        let ingress = if let Tag::Direct(Side::Inside, site) = look.parsed.tag {
            site.0
        } else if let Some(mapping) = known_ingress {
            mapping.ingress
        } else {
            group.ingress.or(origin(look.parsed.tag).map(|(_, site)| site)).unwrap_or(self.settings.site).0
        };
        let hairpin = nat::in_pool(&self.services, look.tuple.remote);
        let timed = tcp == TcpState::ClientInit;
        let new = NewFlow {
            tuple: crate::table::Tuple { port, ..look.tuple },
            outside,
            group: number,
            mapping,
            expires: group.clock(tick(now)).saturating_add(life),
            expires_wall: tick(now).saturating_add(life),
            tcp,
            ingress,
            flags: if hairpin { flags::HAIRPIN } else { 0 },
        };
        self.table.mappings.set_ingress(mapping, ingress);
        let Some(flow) = self.table.insert(new, &mut group.flows) else {
            self.table.mappings.remove_unused(mapping);
            self.counters.dropped_table_full += 1;
            return None;
        };
        self.counters.flows_created += 1;
        if timed && self.round_trips.begin(flow, now) {
            self.table.flow_mut(flow).flags |= flags::HANDSHAKE;
        }
        Some(flow)
    }

    /// Tells a client whose ports are all in use (RFC 6888, REQ-11), a limited number of times a second.
    fn explain_exhausted(
        &mut self,
        frame: &[u8],
        look: &Look,
        headers: &Headers,
        now: Micros,
        out: &mut Output<B>,
    ) {
        let Tag::Direct(Side::Inside, site) = look.parsed.tag else { return };
        let tuple = &look.tuple;
        let Some(number) = self.group_of(tuple.client) else { return };
        let service = self.groups[number as usize].id.service;
        let Some(known) = self.services.iter().find(|known| known.spec.service == service) else { return };
        let Some((outside, range)) = nat::range(&known.slices, tuple.protocol, tuple.client, tuple.port)
        else {
            return;
        };
        if !self.table.mappings.is_exhausted(tuple.protocol, tuple.client, range) || !self.may_send_icmp(now)
        {
            return;
        }
        let bytes = packet::build_unreachable(Tag::ToClient(site), outside, frame, headers);
        self.counters.icmp_sent += u64::from(self.send_made(&bytes, out));
    }

    fn may_send_icmp(&mut self, now: Micros) -> bool {
        let second = now.0 / 1_000_000;
        if second != self.icmp_second {
            (self.icmp_second, self.icmp_left) = (second, ICMP_PER_SECOND);
        }
        let may = self.icmp_left > 0;
        self.icmp_left = self.icmp_left.saturating_sub(1);
        may
    }

    /// An ICMP error follows the mapping of the packet it is about, and changes nothing (RFC 5508, REQ-6).
    fn serve_error(&mut self, packet: &mut B, look: &Look, error: &IcmpError) -> bool {
        if error.outer.ttl <= 1 {
            self.counters.dropped_ttl += 1;
            return false;
        }
        let tuple = &look.tuple;
        let inside = look.side == Side::Inside;
        let mapping = if inside {
            self.table.mappings.of_client(tuple.protocol, tuple.client, tuple.port)
        } else {
            self.table.mappings.of_outside(tuple.protocol, tuple.client, tuple.port)
        };
        let Some(mapping) = mapping.map(|mapping| *self.table.mappings.get(mapping)) else {
            self.counters.dropped_no_mapping += 1;
            return false;
        };
        let frame = packet.data_mut();
        if inside {
            let Some(outside) = self.outside_address(mapping.client) else {
                self.counters.dropped_no_mapping += 1;
                return false;
            };
            packet::translate_error(frame, error, End::Source, outside, (outside, mapping.outside_port));
            packet::set_tag(frame, Tag::ToOutside);
            self.counters.translated_out += 1;
        } else {
            let client = (mapping.client, mapping.client_port);
            packet::translate_error(frame, error, End::Destination, mapping.client, client);
            packet::set_tag(frame, Tag::ToClient(SiteId(mapping.ingress)));
            self.counters.translated_in += 1;
        }
        true
    }

    fn outside_address(&self, client: u32) -> Option<u32> {
        self.services.iter().find_map(|known| {
            let subscriber = known.slices.subscriber(client.into())?;
            Some(known.slices.block(subscriber)?.address.into())
        })
    }

    /// Keeps a packet until the join. When the buffer fills it opens early: direct packets go to the source, which serves them while it
    /// has the group, out of order, and relays them back once it has cut. Only what has no room then is dropped, and counted.
    pub(super) fn hold(&mut self, packet: B, number: u32, look: &Look, now: Micros, out: &mut Output<B>) {
        let Some((direct, site)) = origin(look.parsed.tag) else {
            self.counters.dropped_malformed += 1;
            return out.free.push(packet);
        };
        if direct && self.is_hold_filling() {
            let group = &mut self.groups[number as usize];
            group.hold.opened_early = true;
            self.counters.hold_opened_early += 1;
            if let Some(source) = group.arrival.as_ref().map(|arrival| arrival.source) {
                return self.relay(packet, look.side, source, out);
            }
        }
        if self.is_hold_full() {
            self.counters.dropped_hold_full += 1;
            return out.free.push(packet);
        }
        let held = self.keep(packet, site, now, out);
        let hold = &mut self.groups[number as usize].hold;
        hold.total += 1;
        if direct {
            hold.direct.push_back(held);
        } else {
            hold.relayed.push_back(held);
        }
    }

    /// Puts a packet behind those that wait, unless it is older than they are. When the buffer fills, what waits is served now, and
    /// late ingresses are waited for no longer: their order is lost, their packets are not.
    pub(super) fn queue(&mut self, packet: B, number: u32, look: &Look, now: Micros, out: &mut Output<B>) {
        let Some((direct, site)) = origin(look.parsed.tag) else {
            self.counters.dropped_malformed += 1;
            return out.free.push(packet);
        };
        if self.is_hold_filling() {
            self.open_queue(number, now, out);
        }
        let hold = &self.groups[number as usize].hold;
        let is_late = direct && hold.is_late(site);
        let waits = if direct { hold.has_backlog() } else { !hold.relayed.is_empty() };
        if !is_late && !waits {
            return self.settle(packet, number, look, now, out);
        }
        let held = self.keep(packet, site, now, out);
        let hold = &mut self.groups[number as usize].hold;
        hold.total += 1;
        match hold.push_late(held, direct) {
            Ok(()) => {}
            Err(held) if direct => hold.direct.push_back(held),
            Err(held) => hold.relayed.push_back(held),
        }
    }

    fn open_queue(&mut self, number: u32, now: Micros, out: &mut Output<B>) {
        let hold = &mut self.groups[number as usize].hold;
        let late: Vec<SiteId> = hold.late.iter().map(|late| late.site).collect();
        if !late.is_empty() {
            hold.opened_early = true;
            self.counters.hold_opened_early += 1;
        }
        let hold = &mut self.groups[number as usize].hold;
        late.into_iter().for_each(|site| hold.release(site));
        self.serve_backlog(number, usize::MAX, now, out);
        self.groups[number as usize].refresh_mode();
    }

    /// Serves or relays, whatever waits.
    fn settle(&mut self, packet: B, number: u32, look: &Look, now: Micros, out: &mut Output<B>) {
        match &self.groups[number as usize].state {
            State::Relaying(given) => {
                let target = given.target;
                self.relay(packet, look.side, target, out);
            }
            State::Tombstone { to, .. } => {
                let to = *to;
                self.relay(packet, look.side, to, out);
            }
            State::Serving | State::Copying | State::Draining(_) | State::Open => {
                self.serve(packet, number, look, now, out);
            }
            State::Shadow => self.hold(packet, number, look, now, out),
        }
    }

    /// Serves some of what waits; returns how many.
    pub(super) fn serve_backlog(
        &mut self,
        number: u32,
        most: usize,
        now: Micros,
        out: &mut Output<B>,
    ) -> usize {
        let mut served = 0;
        while served < most.max(BURST_LEN) {
            let hold = &mut self.groups[number as usize].hold;
            let Some(held) = hold.pop() else { break };
            hold.note_time(now.since(held.since).0);
            self.let_go(&held);
            served += 1;
            let Some(look) = packet::parse(held.packet.data()).ok().and_then(|parsed| self.look_at(parsed))
            else {
                out.free.push(held.packet);
                continue;
            };
            if let Content::Marker(body, _) = look.parsed.content {
                self.note_marker(held.packet, number, look.parsed.tag, body, out);
                continue;
            }
            self.settle(held.packet, number, &look, now, out);
        }
        served
    }

    /// A marker or a cut.
    pub(super) fn marker(
        &mut self,
        packet: B,
        tag: Tag,
        body: MarkerBody,
        source: u32,
        now: Micros,
        out: &mut Output<B>,
    ) {
        let prefix = Prefix::new(std::net::IpAddr::V4(source.into()), body.prefix_len).ok();
        let id = prefix.map(|prefix| GroupId { service: body.service, prefix });
        let Some(&number) = id.and_then(|id| self.by_id.get(&id)) else {
            self.counters.dropped_no_group += 1;
            return out.free.push(packet);
        };
        self.activate(number);
        let group = &mut self.groups[number as usize];
        if let Tag::Cut(_) = tag {
            if group.move_id == Some(body.move_id)
                && let Some(arrival) = &mut group.arrival
            {
                arrival.cut_seen = true;
                group.freeze(tick(now));
            }
            self.counters.markers += 1;
            return out.free.push(packet);
        }
        if self.is_marker_early(number, body) && !self.is_hold_full() {
            let held = self.keep(packet, body.from, now, out);
            let hold = &mut self.groups[number as usize].hold;
            if let Err(held) = hold.push_late(held, true) {
                hold.direct.push_back(held);
            }
            return;
        }
        self.note_marker(packet, number, tag, body, out);
    }

    /// Whether a marker has to wait for what its ingress sent before it: that waits here for the marker of an earlier move, or to be
    /// relayed.
    fn is_marker_early(&self, number: u32, body: MarkerBody) -> bool {
        let group = &self.groups[number as usize];
        let is_later = !body.move_id.is_local() && body.epoch > group.epoch;
        is_later && (group.hold.is_late(body.from) || group.relays_to().is_some() && group.hold.has_backlog())
    }

    /// Nothing that the ingress sent before its marker waits here any more.
    fn note_marker(&mut self, packet: B, number: u32, tag: Tag, body: MarkerBody, out: &mut Output<B>) {
        let group = &mut self.groups[number as usize];
        group.markers.note(body.move_id, body.epoch, body.from);
        // Since then the group may have gone from worker to worker, under the same epoch.
        let led_here = !body.move_id.is_local() && body.epoch == group.epoch;
        if (led_here || group.joined == Some(body.move_id)) && group.state != State::Shadow {
            group.hold.release(body.from);
            group.refresh_mode();
        }
        // The target must see which ingress has flipped now. Nothing circles: each has the group from one with a smaller epoch.
        let goes_on = body.epoch > group.epoch || !matches!(tag, Tag::Relayed(..));
        match group.relays_to().filter(|_| goes_on) {
            Some(site) => self.relay(packet, Side::Inside, site, out),
            None => {
                self.counters.markers += 1;
                out.free.push(packet);
            }
        }
    }

    /// Whether packets of this group are served before the source's last changes came.
    pub(super) fn is_relaxed(&self, number: u32) -> bool {
        let arrival = self.groups[number as usize].arrival.as_ref();
        arrival.is_some_and(|arrival| arrival.ordering == Ordering::Relaxed)
    }
}

/// Whether a packet came directly, and from which site.
pub(super) fn origin(tag: Tag) -> Option<(bool, SiteId)> {
    if let Tag::Direct(_, site) = tag {
        return Some((true, site));
    }
    if let Tag::Relayed(_, site) = tag { Some((false, site)) } else { None }
}
