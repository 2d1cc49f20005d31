//! Writes MaxMind DB files of one network, for tests (MaxMind DB file format, version 2.0).

use std::net::IpAddr;

use flow::Prefix;

/// A value in a file.
#[derive(Clone, Debug)]
pub(super) enum Item {
    Text(&'static str),
    Double(f64),
    Float(f32),
    U16(u16),
    U32(u32),
    U64(u64),
    Int32(i32),
    Flag(bool),
    Map(Vec<(&'static str, Item)>),
}

/// The control byte; types above 7 are in a byte of their own.
fn head(out: &mut Vec<u8>, kind: u8, len: usize) {
    assert!(len < 29, "longer ones need more bytes");
    if kind <= 7 {
        out.push(kind << 5 | len as u8);
    } else {
        out.extend([len as u8, kind - 7]);
    }
}

fn put(out: &mut Vec<u8>, item: &Item) {
    match item {
        Item::Text(text) => {
            head(out, 2, text.len());
            out.extend(text.as_bytes());
        }
        Item::Double(number) => {
            head(out, 3, 8);
            out.extend(number.to_be_bytes());
        }
        Item::Float(number) => {
            head(out, 15, 4);
            out.extend(number.to_be_bytes());
        }
        Item::U16(number) => {
            head(out, 5, 2);
            out.extend(number.to_be_bytes());
        }
        Item::U32(number) => {
            head(out, 6, 4);
            out.extend(number.to_be_bytes());
        }
        Item::U64(number) => {
            head(out, 9, 8);
            out.extend(number.to_be_bytes());
        }
        Item::Int32(number) => {
            head(out, 8, 4);
            out.extend(number.to_be_bytes());
        }
        Item::Flag(flag) => head(out, 14, usize::from(*flag)),
        Item::Map(entries) => {
            head(out, 7, entries.len());
            for (key, value) in entries {
                put(out, &Item::Text(key));
                put(out, value);
            }
        }
    }
}

/// A file in which this network of IPv4, and no other, has a record.
pub(super) fn file(kind: &str, network: &str, record: &Item) -> Vec<u8> {
    let network: Prefix = network.parse().unwrap();
    let IpAddr::V4(address) = network.address() else { panic!("IPv4 only") };
    let nodes = u32::from(network.len());
    let mut out = Vec::new();
    // Each node has two records of 24 bits: the next node, no data (the count of nodes), or where the data is.
    for bit in 0..nodes {
        let next = if bit + 1 == nodes { nodes + 16 } else { bit + 1 };
        let right = u32::from(address) >> (31 - bit) & 1 == 1;
        for number in if right { [nodes, next] } else { [next, nodes] } {
            out.extend(&number.to_be_bytes()[1..]);
        }
    }
    out.extend([0; 16]);
    put(&mut out, record);
    out.extend(b"\xab\xcd\xefMaxMind.com");
    put_metadata(&mut out, kind, nodes);
    out
}

fn put_metadata(out: &mut Vec<u8>, kind: &str, nodes: u32) {
    head(out, 7, 9);
    let mut entry = |key, fill: &dyn Fn(&mut Vec<u8>)| {
        put(out, &Item::Text(key));
        fill(out);
    };
    let item = |item: Item| move |out: &mut Vec<u8>| put(out, &item);
    entry("binary_format_major_version", &item(Item::U16(2)));
    entry("binary_format_minor_version", &item(Item::U16(0)));
    entry("build_epoch", &item(Item::U64(1)));
    entry("database_type", &|out| {
        head(out, 2, kind.len());
        out.extend(kind.as_bytes());
    });
    entry("description", &item(Item::Map(Vec::new())));
    entry("ip_version", &item(Item::U16(4)));
    entry("languages", &|out| head(out, 11, 0));
    entry("node_count", &item(Item::U32(nodes)));
    entry("record_size", &item(Item::U16(24)));
}
