//! Every message is read as it was written; no bytes make the codec panic; kept inputs are replayed.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use proptest::prelude::*;
use switchctl::core::rules::PacketIn;
use switchctl::core::rules::{ETH_IPV4, ETH_IPV6, Field, PROTO_ICMP, PROTO_TCP, PROTO_UDP};
use switchctl::ofp::{
    self, Absent, Aggregate, AsyncConfig, BundleControl, Command, DecodeError, Description, FlowModMsg,
    FlowQuery, FlowStats, GroupMod, Message, MeterMod, PortDesc, PortMod, PortStats, Reply, Request,
    TableMod, TableStats,
};
use switchctl::{Action, Match, PacketOut, PortNo, Rule, RuleKey, Vlan};

fn matches() -> impl Strategy<Value = Match> {
    let vlan = prop_oneof![
        Just(None),
        Just(Some(Vlan::Absent)),
        Just(Some(Vlan::Present)),
        (0u16..4096).prop_map(|id| Some(Vlan::Tag(id)))
    ];
    let ip =
        proptest::option::of((any::<bool>(), any::<u128>(), any::<u128>(), any::<u128>(), any::<u128>()));
    let port =
        proptest::option::of((prop_oneof![Just(PROTO_TCP), Just(PROTO_UDP)], any::<u16>(), any::<u16>()));
    (vlan, any::<Option<u32>>(), any::<Option<(u64, u64)>>(), any::<Option<std::net::Ipv4Addr>>(), ip, port)
        .prop_map(|(vlan, in_port, key, from, ip, port)| {
            let from_tunnel = |m: Match| from.map_or(m, |address| m.tunnel_src(address));
            let mut m = from_tunnel(Match::any());
            m = vlan.map_or(m, |vlan| m.vlan(vlan));
            m = in_port.map_or(m, |port| m.in_port(PortNo(port)));
            m = key.map_or(m, |(key, mask)| m.tunnel_id(key, mask));
            if let Some((v6, src, src_mask, dst, dst_mask)) = ip {
                let bits = if v6 { u128::MAX } else { u128::from(u32::MAX) };
                m = m.eth_type(if v6 { ETH_IPV6 } else { ETH_IPV4 });
                m = m.masked(Field::IpSrc, src, src_mask & bits).masked(Field::IpDst, dst, dst_mask & bits);
            }
            port.map_or(m, |(protocol, port, mask)| {
                let m = if ip.is_some() { m } else { m.eth_type(ETH_IPV4) };
                m.ip_proto(protocol).tp_dst(port, mask).tp_src(port, !mask)
            })
        })
}

fn actions() -> impl Strategy<Value = Vec<Action>> {
    let action = prop_oneof![
        (0u16..4096).prop_map(Action::PushVlan),
        Just(Action::PushTag),
        Just(Action::PopVlan),
        any::<u64>().prop_map(Action::SetTunnel),
        Just(Action::ClearInPort),
        any::<std::net::Ipv4Addr>().prop_map(Action::SetTunnelDst),
        (0u32..0xffff_ff00).prop_map(|port| Action::Output(PortNo(port))),
        Just(Action::OutputInPort),
    ];
    proptest::collection::vec(action, 0..6)
}

fn rules() -> impl Strategy<Value = (RuleKey, Rule)> {
    (0u8..8, any::<u16>(), matches(), any::<u64>(), actions(), any::<Option<u8>>()).prop_map(
        |(table, priority, matches, cookie, actions, goto)| {
            (RuleKey { table, priority, matches }, Rule { cookie, actions, goto })
        },
    )
}

fn messages() -> impl Strategy<Value = Message> {
    let bytes = || proptest::collection::vec(any::<u8>(), 0..80);
    let flow_mod = (rules(), 0usize..5, any::<u64>())
        .prop_map(|((key, rule), command, mask)| {
            let group = mask as u32;
            let commands = [
                Command::Add,
                Command::Modify,
                Command::ModifyStrict,
                Command::Delete,
                Command::DeleteStrict,
            ];
            Message::FlowMod(FlowModMsg {
                cookie_mask: mask,
                out_group: group,
                flags: mask as u16,
                importance: !mask as u16,
                ..FlowModMsg::new(commands[command], key, rule)
            })
        })
        .boxed();
    let flows = proptest::collection::vec((rules(), any::<u64>()), 0..5).prop_map(|list| {
        let flow = |((key, rule), packets)| FlowStats {
            key,
            rule,
            packets,
            bytes: packets,
            age: std::time::Duration::new(packets >> 40, 7),
            flags: packets as u16,
            importance: !packets as u16,
        };
        Reply::Flows(list.into_iter().map(flow).collect())
    });
    let ports = proptest::collection::vec((any::<u32>(), any::<u64>()), 0..5).prop_map(|list| {
        let stats = |(port, n)| PortStats {
            port: PortNo(port),
            rx_packets: n,
            tx_packets: !n,
            rx_bytes: n,
            tx_bytes: n,
            rx_dropped: n,
            tx_dropped: n,
        };
        Reply::PortStats(list.into_iter().map(stats).collect())
    });
    let replies = prop_oneof![
        flows,
        ports,
        any::<u64>().prop_map(|n| Reply::Aggregate(Aggregate { packets: n, bytes: n, flows: 3 })),
        Just(Reply::Description(Box::new(Description { datapath: "edge".into(), ..Description::default() }))),
        Just(Reply::Tables(vec![TableStats { table: 1, active: 2, lookups: 3, matched: 4 }])),
        Just(Reply::PortDesc(vec![PortDesc {
            port: PortNo(1),
            name: "inside".into(),
            mac: [1; 6],
            up: true
        }])),
    ];
    let requests = prop_oneof![
        Just(Request::Description),
        Just(Request::Tables),
        Just(Request::PortDesc),
        any::<u32>().prop_map(|port| Request::PortStats(PortNo(port))),
        matches().prop_map(|matches| Request::Flows(FlowQuery { matches, ..FlowQuery::default() })),
        (matches(), any::<u32>()).prop_map(|(matches, out_group)| {
            Request::Aggregate(FlowQuery { matches, out_group, ..FlowQuery::default() })
        }),
        any::<bool>().prop_map(|set| Request::TableFeatures { set }),
        Just(Request::TableDesc),
        any::<u32>().prop_map(|of| Request::Absent { kind: Absent::QueueStats, of, queue: !of }),
        Just(Request::Absent { kind: Absent::GroupFeatures, of: 0, queue: 0 }),
    ];
    prop_oneof![
        any::<Option<u32>>().prop_map(|versions| Message::Hello { version: 5, versions }),
        (any::<u16>(), bytes()).prop_map(|(kind, data)| Message::Error { kind, code: 1, data }),
        bytes().prop_map(Message::EchoRequest),
        any::<u64>().prop_map(|datapath| Message::FeaturesReply {
            datapath,
            buffers: 0,
            tables: 8,
            capabilities: 7
        }),
        (actions(), bytes()).prop_map(|(actions, bytes)| {
            Message::PacketOut(PacketOut { bytes, in_port: PortNo::CONTROLLER, actions })
        }),
        (any::<u64>(), any::<u8>(), bytes()).prop_map(|(cookie, table, bytes)| Message::PacketIn(PacketIn {
            cookie,
            table,
            bytes
        })),
        flow_mod.clone(),
        flow_mod.prop_map(|change| Message::BundleAdd { bundle: 9, flags: 3, message: Box::new(change) }),
        requests.prop_map(Message::MultipartRequest),
        (replies, any::<bool>()).prop_map(|(reply, more)| Message::MultipartReply { reply, more }),
        Just(Message::BarrierRequest),
        Just(Message::RoleRequest(2, 7)),
        Just(Message::RoleStatus(3, 0, 7)),
        Just(Message::SetAsync(AsyncConfig::initial())),
        any::<Option<bool>>().prop_map(|bit| {
            let mut wants = AsyncConfig::default();
            wants.0[10] = bit.map(u32::from);
            Message::GetAsyncReply(wants)
        }),
        (any::<u16>(), any::<u32>())
            .prop_map(|(command, group)| { Message::GroupMod(GroupMod { command, group }) }),
        (any::<u16>(), any::<u32>())
            .prop_map(|(command, meter)| { Message::MeterMod(MeterMod { command, meter }) }),
        any::<(u32, [u8; 6], u32, u32, u32)>().prop_map(|(port, mac, config, mask, advertise)| {
            Message::PortMod(PortMod { port: PortNo(port), mac, config, mask, advertise })
        }),
        (any::<u8>(), any::<u32>()).prop_map(|(table, config)| Message::TableMod(TableMod { table, config })),
        Just(Message::BundleControl { bundle: 1, control: BundleControl::CommitRequest, flags: 3 }),
    ]
}

proptest! {
    #[test]
    fn what_was_written_is_read(xid: u32, message in messages()) {
        let bytes = ofp::encode(xid, &message);
        prop_assert_eq!(ofp::decode(&bytes), Ok((xid, message)));
    }

    #[test]
    fn damaged_messages_never_panic_and_what_is_read_can_be_written(
        message in messages(), changes in proptest::collection::vec((any::<u16>(), any::<u8>()), 0..6), cut: u16,
    ) {
        let mut bytes = ofp::encode(1, &message);
        for (at, value) in changes {
            let at = usize::from(at) % bytes.len();
            bytes[at] = value;
        }
        bytes.truncate(usize::from(cut).max(8));
        let len = u16::try_from(bytes.len()).unwrap();
        bytes[2..4].copy_from_slice(&len.to_be_bytes());
        if let Ok((xid, message)) = ofp::decode(&bytes) {
            let again = ofp::encode(xid, &message);
            prop_assert_eq!(ofp::decode(&again), Ok((xid, message)));
        }
    }

    #[test]
    fn random_bytes_never_panic(kind in 0u8..40, body in proptest::collection::vec(any::<u8>(), 0..300)) {
        let mut bytes = vec![5, kind, 0, 0, 0, 0, 0, 1];
        bytes.extend_from_slice(&body);
        let len = u16::try_from(bytes.len()).unwrap();
        bytes[2..4].copy_from_slice(&len.to_be_bytes());
        let _ = ofp::decode(&bytes);
        let _ = ofp::decode(&body);
    }
}

#[test]
fn kept_inputs_are_replayed() {
    let corpus = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus");
    let mut count = 0;
    for entry in std::fs::read_dir(corpus).unwrap() {
        let path = entry.unwrap().path();
        let bytes = std::fs::read(&path).unwrap();
        let valid = path.file_name().unwrap().to_string_lossy().starts_with("valid");
        assert_eq!(ofp::decode(&bytes).is_ok(), valid, "{}: {:?}", path.display(), ofp::decode(&bytes));
        count += 1;
    }
    assert!(count >= 6);
}

/// OpenFlow 1.4, section 7.3.4.1, by hand: in_port 1, no tag, to 192.0.2.0/24, TCP ports 1024/0xfc00.
#[test]
fn a_flow_mod_has_the_bytes_of_the_specification() {
    let matches = Match::any()
        .in_port(PortNo(1))
        .vlan(Vlan::Absent)
        .ip_dst(&"192.0.2.0/24".parse().unwrap())
        .ip_proto(PROTO_TCP)
        .tp_dst(1024, 0xfc00);
    let rule =
        Rule { cookie: 0x0102, actions: vec![Action::PopVlan, Action::Output(PortNo(7))], goto: Some(3) };
    let message =
        Message::FlowMod(FlowModMsg::new(Command::Add, RuleKey { table: 2, priority: 99, matches }, rule));
    let hex: String = ofp::encode(1, &message).iter().map(|byte| format!("{byte:02x}")).collect();
    let expected = concat!(
        "050e009000000001",
        "0000000000000102",
        "0000000000000000",
        "0200",
        "00000000",
        "0063",
        "ffffffff",
        "ffffffff",
        "ffffffff",
        "00000000",
        "00010031",
        "8000000400000001",
        "80000a020800",
        "80000c020000",
        "8000140106",
        "80001908c0000200ffffff00",
        "80001d040400fc00",
        "00000000000000",
        "0004002000000000",
        "0012000800000000",
        "0000001000000007",
        "0000000000000000",
        "0001000803000000",
    );
    assert_eq!(hex, expected);
}

#[test]
fn icmp_matches_have_their_own_fields() {
    let matches = Match::any().eth_type(ETH_IPV4).ip_proto(PROTO_ICMP).exact(Field::TpSrc, 8);
    let message = Message::MultipartRequest(Request::Flows(FlowQuery { matches, ..FlowQuery::default() }));
    let bytes = ofp::encode(1, &message);
    // An exact type is eight bits on the wire and sixteen in our words, so the masks differ; both say the same.
    let (_, Message::MultipartRequest(Request::Flows(read))) = ofp::decode(&bytes).unwrap() else { panic!() };
    assert_eq!(read.matches.field(Field::TpSrc).unwrap().0, 8);
}

#[test]
fn a_text_that_is_cut_ends_with_a_whole_character() {
    let port = PortDesc { port: PortNo(1), name: "fourteen bytes€".into(), mac: [1; 6], up: true };
    let message = Message::MultipartReply { reply: Reply::PortDesc(vec![port]), more: false };
    let (_, read) = ofp::decode(&ofp::encode(1, &message)).unwrap();
    let Message::MultipartReply { reply: Reply::PortDesc(ports), .. } = read else { panic!("{read:?}") };
    assert_eq!(ports[0].name, "fourteen bytes");
}

#[test]
fn a_field_of_another_protocol_than_the_match_names_is_refused() {
    let matches = Match::any().eth_type(ETH_IPV4).ip_proto(PROTO_TCP).tp_dst(1024, 0xfc00);
    let message = Message::MultipartRequest(Request::Flows(FlowQuery { matches, ..FlowQuery::default() }));
    let mut bytes = ofp::encode(1, &message);
    let protocol = [0x80, 0, 20, 1, PROTO_TCP];
    let at = bytes.windows(5).position(|field| field == protocol).unwrap() + 4;
    // Such a rule would match, and be told without the port.
    for other in [PROTO_UDP, PROTO_ICMP] {
        bytes[at] = other;
        assert_eq!(ofp::decode(&bytes), Err(DecodeError::Needs(Field::TpDst)));
    }
}

#[test]
fn a_field_that_is_there_twice_is_refused_also_when_its_first_mask_is_zero() {
    let of = |first: u8, second: u8| {
        let query = FlowQuery { matches: Match::any(), ..FlowQuery::default() };
        let mut bytes = ofp::encode(1, &Message::MultipartRequest(Request::Flows(query)));
        // The empty match and its padding are the last eight bytes.
        bytes.truncate(bytes.len() - 8);
        // ETH_TYPE, then IPV4_DST, which may be masked, two times.
        let address = |mask: u8| [0x80, 0, 12 << 1 | 1, 8, 0, 0, 0, 0, mask, mask, mask, mask];
        let fields = [[0x80, 0, 5 << 1, 2, 8, 0].as_slice(), &address(first), &address(second)].concat();
        bytes.extend([0, 1, 0, 4 + fields.len() as u8]);
        bytes.extend(&fields);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        let len = bytes.len() as u16;
        bytes[2..4].copy_from_slice(&len.to_be_bytes());
        ofp::decode(&bytes)
    };
    assert_eq!(of(0xff, 0xff), Err(DecodeError::FieldTwice { number: 12 }));
    assert_eq!(of(0, 0xff), Err(DecodeError::FieldTwice { number: 12 }));
}
