//! What the fuzz targets do with bytes. `tests/corpus.rs` of the package does the same with the kept inputs.

mod driver;
mod pipeline;

use switchctl::PortNo;
use switchctl::core::jsonrpc::{self, Decoder};
use switchctl::core::ovsdb::{self, BridgeSpec, PortSpec, Present};
use switchctl::ofp::{self, Message, Reply};

pub use driver::driver;
pub use pipeline::switch;

/// One OpenFlow message: what is read can be written, and that is read as the same.
pub fn openflow(bytes: &[u8]) {
    let Some((&how, bytes)) = bytes.split_first() else { return };
    let mut message = bytes.to_vec();
    if how & 1 != 0 {
        mend_header(&mut message);
    }
    let Ok((xid, read)) = ofp::decode(&message) else { return };
    let again = ofp::decode(&ofp::encode(xid, &read));
    // A text that is not UTF-8, or has no zero byte at its end, is another when it was written again, and then stays.
    let reply = if let Message::MultipartReply { reply, .. } = &read { Some(reply) } else { None };
    if matches!(reply, Some(Reply::Description(_) | Reply::PortDesc(_))) {
        let (xid, again) = again.expect("what was read can be written");
        assert_eq!(ofp::decode(&ofp::encode(xid, &again)), Ok((xid, again)));
    } else {
        assert_eq!(again, Ok((xid, read)));
    }
}

/// The version and the length that the message has.
fn mend_header(message: &mut Vec<u8>) {
    message.truncate(ofp::MESSAGE_LEN_MAX);
    let [high, low] = (message.len() as u16).to_be_bytes();
    if let Some(head) = message.get_mut(..4) {
        (head[0], head[2], head[3]) = (ofp::VERSION, high, low);
    }
}

/// The stream from the database of Open vSwitch: however it is cut, the same messages come out, and what they say of a
/// bridge can be compared with what it should be.
pub fn ovsdb(bytes: &[u8]) {
    let Some((&cut, stream)) = bytes.split_first() else { return };
    let whole = messages(&[stream]);
    let (first, second) = stream.split_at(usize::from(cut).min(stream.len()));
    assert_eq!(messages(&[first, second]), whole);
    for message in whole {
        if let jsonrpc::Message::Answer { result: Ok(result), .. } = message
            && let Ok(results) = ovsdb::results(result)
        {
            compare(&results);
        }
    }
}

fn messages(pieces: &[&[u8]]) -> Vec<jsonrpc::Message> {
    let mut decoder = Decoder::default();
    let mut messages = Vec::new();
    for piece in pieces {
        decoder.push(piece);
        loop {
            match decoder.next_message() {
                Ok(Some(message)) => messages.push(message),
                Ok(None) => break,
                Err(_) => return messages,
            }
        }
    }
    for message in &messages {
        if let jsonrpc::Message::Request { id, params, .. } = message {
            let mut ours = Decoder::default();
            ours.push(&jsonrpc::answer(id, params));
            let read = ours.next_message().expect("our own is readable");
            assert_eq!(read, Some(jsonrpc::Message::Answer { id: id.clone(), result: Ok(params.clone()) }));
        }
    }
    messages
}

/// The bridge of a site, with a tunnel.
pub fn bridge() -> BridgeSpec {
    let ports = vec![
        PortSpec { name: "inside".into(), number: PortNo(1), kind: String::new(), options: [].into() },
        PortSpec::vxlan("to-ams".into(), PortNo(9), "192.0.2.1".parse().ok(), None, 4789),
    ];
    BridgeSpec { name: "br0".into(), datapath: "netdev".into(), ports, listen: Some("ptcp:6653".into()) }
}

fn compare(results: &[serde_json::Value]) {
    let Ok(present) = Present::parse(results) else { return };
    let spec = bridge();
    let _ = (present.problems(&spec), present.fail_mode(&spec.name), ovsdb::plan(&spec, &present));
}
