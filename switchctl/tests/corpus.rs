//! The kept inputs of the fuzz targets, and what they were seeded with, are replayed.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use serde_json::json;
use switchctl::ofp::{self, Command, FlowModMsg, FlowStats, Message, Reply};
use switchctl::{Action, Match, PacketOut, PortNo, Rule, RuleKey, Vlan};

#[path = "../../dataplane/fuzz/replay.rs"]
mod replay;
#[path = "../fuzz/src/lib.rs"]
#[allow(unreachable_pub, reason = "the package of the fuzz targets exports it")]
#[allow(clippy::wildcard_enum_match_arm, reason = "a hostile peer sends whatever is left")]
mod targets;

use replay::{after, replay};

/// Rules of several fields.
fn rules() -> Vec<(RuleKey, Rule)> {
    let rule = |priority, matches, actions, goto| {
        (RuleKey { table: 0, priority, matches }, Rule { cookie: 3, actions, goto })
    };
    let any = Match::any;
    vec![
        rule(1, any(), vec![Action::Output(PortNo::CONTROLLER)], None),
        rule(9, any().in_port(PortNo(1)).vlan(Vlan::Absent), vec![Action::PushVlan(5)], Some(2)),
        rule(7, any().ip_dst(&"192.0.2.0/24".parse().unwrap()), vec![Action::PopVlan], Some(1)),
        rule(8, any().ip_proto(6).tp_dst(1024, 0xfc00).tunnel_id(5, 0xff), vec![Action::OutputInPort], None),
    ]
}

fn changes() -> Vec<Message> {
    let change = |(key, rule)| Message::FlowMod(FlowModMsg::new(Command::Add, key, rule));
    rules().into_iter().map(change).collect()
}

fn packet_out() -> Message {
    let actions = vec![Action::SetTunnel(7), Action::Output(PortNo(2))];
    Message::PacketOut(PacketOut { bytes: frame(), in_port: PortNo::CONTROLLER, actions })
}

/// UDP in IPv4.
fn frame() -> Vec<u8> {
    let mut frame = vec![0; 12];
    frame.extend([8, 0, 0x45, 0, 0, 32, 0, 0, 0, 0, 64, 6, 0, 0, 100, 64, 0, 1, 192, 0, 2, 1]);
    frame.extend([4, 0, 4, 1, 0, 12, 0, 0, 1, 2, 3, 4]);
    frame
}

#[test]
fn no_kept_openflow_message_is_misread() {
    let flows = rules()
        .into_iter()
        .map(|(key, rule)| FlowStats { key, rule, packets: 1, ..FlowStats::default() })
        .collect();
    let mut messages = changes();
    messages.push(packet_out());
    messages.push(Message::BundleAdd { bundle: 9, flags: 3, message: Box::new(messages[1].clone()) });
    messages.push(Message::MultipartReply { reply: Reply::Flows(flows), more: true });
    messages.push(Message::hello());
    let mut seeds: Vec<_> = messages.iter().map(|message| after(0, &ofp::encode(1, message))).collect();
    let kept = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus");
    for entry in std::fs::read_dir(kept).unwrap() {
        seeds.push(after(0, &std::fs::read(entry.unwrap().path()).unwrap()));
    }
    replay("openflow", targets::openflow, &seeds);
}

#[test]
fn no_kept_script_makes_the_tables_choose_another_rule_than_a_plain_search() {
    let piece = |kind, bytes: &[u8]| [&[kind, u8::try_from(bytes.len()).unwrap()], bytes].concat();
    let mut script: Vec<u8> =
        changes().iter().flat_map(|message| piece(0, &ofp::encode(1, message))).collect();
    script.extend(piece(3, &frame()));
    script.extend(piece(0x55, &frame()));
    script.extend(piece(0, &ofp::encode(2, &packet_out())));
    replay("switch", targets::switch, &[script]);
}

#[test]
fn no_kept_switch_makes_the_driver_panic_or_spin() {
    // Connects, gets rules and says that they are there, by each proof; the last is cut off and refuses.
    let course = [15, 10, 0, 10, 0, 10, 0, 0, 7, 10, 0, 10, 0, 10, 0, 5, 5, 6, 21, 2, 10, 0];
    let mut seeds: Vec<_> = (0..3).map(|proof| after(proof, &course)).collect();
    let refusal = ofp::encode(1, &Message::Error { kind: 5, code: 1, data: vec![0; 8] });
    let refused = [&course[..9], &[9, refusal.len() as u8], &refusal, &[0, 7, 15, 4, 6, 30]].concat();
    seeds.push(after(0, &refused));
    replay("driver", targets::driver, &seeds);
}

#[test]
fn no_kept_answer_of_a_database_is_misread() {
    let row = |json| json!({ "rows": [json] });
    let uuid = json!(["uuid", "b6"]);
    let answer = json!({ "id": 1, "error": null, "result": [
        row(json!({ "_uuid": uuid, "name": "br0", "datapath_type": "netdev", "fail_mode": ["set", []],
            "protocols": ["set", ["OpenFlow13"]], "ports": uuid, "controller": ["set", []] })),
        row(json!({ "_uuid": uuid, "name": "inside", "interfaces": uuid })),
        row(json!({ "_uuid": uuid, "name": "inside", "type": "", "options": ["map", [["key", "flow"]]],
            "ofport": 1, "ofport_request": ["set", []], "error": "none" })),
        row(json!({ "_uuid": uuid, "target": "ptcp:6653" })),
        row(json!({ "next_cfg": 4, "cur_cfg": 3 })),
    ]});
    let stream = format!(
        "{}{}{}",
        json!({ "id": "echo", "method": "echo", "params": ["}{", "\\\""] }),
        json!({ "id": null, "method": "update", "params": [] }),
        json!({ "id": 2, "error": { "error": "constraint violation" }, "result": null }),
    );
    let seeds = [after(255, answer.to_string().as_bytes()), after(40, stream.as_bytes())];
    replay("ovsdb", targets::ovsdb, &seeds);
}
