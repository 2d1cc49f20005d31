//! What each key of each file means: the text of `docs/configuration.md`. A test holds it to the types that are read and to
//! the bounds that are checked, so a key that is added, renamed or bounded otherwise is told here too.

use std::fmt::Write;

use crate::run::SWITCH_LIVE;
use crate::site::shell;

/// Which values are taken.
#[derive(Clone, Copy, Debug)]
enum Bounds {
    /// Whole numbers, both ends included.
    Range(u64, u64),
    /// Anything else, in words.
    Words(&'static str),
}

use Bounds::{Range, Words};

/// A key.
#[derive(Clone, Copy, Debug)]
struct Key {
    /// Dotted; `[]` stands for each entry of a list.
    path: &'static str,
    /// What is counted, or what kind of value it is.
    unit: &'static str,
    /// What holds without the key.
    default: &'static str,
    bounds: Bounds,
    /// What it does, and why the default is as it is.
    text: &'static str,
}

const fn key(
    path: &'static str,
    unit: &'static str,
    default: &'static str,
    bounds: Bounds,
    text: &'static str,
) -> Key {
    Key { path, unit, default, bounds, text }
}

/// The default of a key that has to be given.
const NEEDED: &str = "needed";
const NONE: &str = "none";
const LABEL: Bounds = Words("1 to 63 of a-z, 0-9 and `-`, not starting with `-`");
const FILE: Bounds = Words("a file that is there");
const PATH: Bounds = Words("any path");
const ADDRESS: Bounds = Words("IP address and port");
const REMOTE: Bounds = Words("IP address or host name, and port");
const LOOPBACK: Bounds = Words("a loopback address and port");
const SITE: Bounds = Words("0 to 255");
const WORKER: Bounds = Words("0 to 65535");
const PORT: Bounds = Words("1 to 65279, each once");
const DEVICE: Bounds = Words("1 to 15 characters without space, `/` and `:`, each once");
const ANY: Bounds = Words("any");

/// One of `limosa run`.
struct Process {
    name: &'static str,
    text: &'static str,
    /// Keys that change while it runs, each with all below it.
    live: &'static [&'static str],
    keys: &'static [Key],
}

const TLS: [&str; 3] = [
    "Certificates of this node in PEM, its own first. Its name says which node of which cluster it is.",
    "The private key of the certificate, in PEM.",
    "Certificates in PEM that those of all other nodes have to chain to.",
];

const PLACEMENT: &[Key] = &[
    key("cluster", "text", NEEDED, LABEL, "The cluster's name, as in all certificates."),
    key("id", "number", NEEDED, Words("1 or more"), "This node's number, as in its certificate."),
    key("listen", "address", NEEDED, ADDRESS, "Where QUIC listens for placement nodes and agents (UDP)."),
    key(
        "api",
        "address",
        NEEDED,
        LOOPBACK,
        "Where the config API, metrics and health listen. It has no encryption, so it is reached through \
         SSH or a proxy from elsewhere.",
    ),
    key(
        "directory",
        "path",
        NEEDED,
        PATH,
        "Where Raft's log and state live. It is made if it is not there; one process has it at a time.",
    ),
    key("tls.certificate", "path", NEEDED, FILE, TLS[0]),
    key("tls.key", "path", NEEDED, FILE, TLS[1]),
    key("tls.authority", "path", NEEDED, FILE, TLS[2]),
    key(
        "peers[].id",
        "number",
        NEEDED,
        Words("1 or more, each once, not this node's"),
        "Number of another placement node. Without `peers` this node is alone.",
    ),
    key("peers[].address", "address", NEEDED, REMOTE, "Where its QUIC is reached from here."),
    key(
        "locations",
        "path",
        NONE,
        FILE,
        "A MaxMind DB with the places of addresses, from which delays are guessed before they are \
         measured: files with `latitude` and `longitude`, or `lat` and `lon` or `lng`, at the top or in \
         `location`, of any number type. A file without places (countries, autonomous systems) is warned \
         of at the start. A file that is replaced is read again.",
    ),
    key(
        "heartbeat_ms",
        "ms",
        "250",
        Range(20, 5_000),
        "Raft's heartbeat; elections take 4 to 8 of them. Has to be above the round trip between any two placement nodes: a later \
         answer is no sign of life. More makes the loss of a leader last longer, less makes elections under load.",
    ),
    key(
        "lease_ms",
        "ms",
        "6000",
        Range(500, 600_000),
        "How long a site that is silent counts as alive. When a leader dies, an election (up to two \
         seconds) and a report that still waits for the dead one (two more) must fit, or the next leader \
         takes living sites for dead. Has to be more than 8 `heartbeat_ms`.",
    ),
];

const SITES: &[Key] = &[
    key("cluster", "text", NEEDED, LABEL, "The cluster's name, as in all certificates."),
    key("site", "number", NEEDED, SITE, "The site's number, as placement knows it."),
    key("name", "text", NEEDED, LABEL, "The site's name, as in its certificate."),
    key("listen", "address", NEEDED, ADDRESS, "Where QUIC listens for other sites (UDP)."),
    key(
        "metrics",
        "address",
        NEEDED,
        LOOPBACK,
        "Where metrics, health and the switch's pages listen. It has no encryption, so it is reached \
         through SSH or a proxy from elsewhere.",
    ),
    key(
        "switch",
        "address",
        NEEDED,
        Words("a path, `unix:PATH`, `tcp:HOST:PORT` or `tls:HOST:PORT`"),
        "Where the site's switch listens for its controller.",
    ),
    key("tls.certificate", "path", NEEDED, FILE, TLS[0]),
    key("tls.key", "path", NEEDED, FILE, TLS[1]),
    key("tls.authority", "path", NEEDED, FILE, TLS[2]),
    key(
        "placement[].id",
        "number",
        NEEDED,
        Words("1 or more, each once"),
        "Number of a placement node, the nearest first. At least one is named.",
    ),
    key("placement[].address", "address", NEEDED, REMOTE, "Where its QUIC is reached from here."),
    key(
        "peers[].site",
        "number",
        NEEDED,
        Words("0 to 255, each once, not this site's"),
        "Number of another site. Without `peers` no group moves to or from here.",
    ),
    key("peers[].name", "text", NEEDED, LABEL, "Its name, as in its certificate."),
    key("peers[].address", "address", NEEDED, REMOTE, "Where its QUIC is reached from here."),
    key(
        "workers.directory",
        "path",
        NEEDED,
        PATH,
        "Directory of the workers' control sockets, `worker-N.control`. It is made if it is not there; \
         one agent has it at a time.",
    ),
    key(
        "workers.expected",
        "numbers",
        NEEDED,
        Words("at least one"),
        "Workers that should be there; the site is ready while they are, or with `workers.elastic` while as \
         many as its `min` are.",
    ),
    key(
        "workers.ports",
        "numbers",
        "those of `expected`",
        Words("all of `expected` among them"),
        "Workers that the switch has ports for, so that they may be started later.",
    ),
    key(
        "workers.elastic.start",
        "words",
        NEEDED,
        Words("1 to 64 words; `{worker}` stands for the number"),
        "Program and arguments that start a worker. Without the table `workers.elastic` the agent starts \
         and stops none.",
    ),
    key("workers.elastic.stop", "words", NEEDED, Words("as `start`"), "Program and arguments that stop one."),
    key(
        "workers.elastic.min",
        "workers",
        "1",
        Words("1 to `max`"),
        "Fewest workers: one is enough for a site that has nothing to do.",
    ),
    key(
        "workers.elastic.max",
        "workers",
        "all of `workers.ports`",
        Words("1 to the count of `workers.ports`"),
        "Most workers.",
    ),
    key(
        "workers.elastic.busy_high",
        "share of time",
        "0.7",
        Words("above 0, up to 1"),
        "A worker more when all are busier on the mean. Above 0.7 bursts wait for one another noticeably: \
         a packet meets two others on the mean.",
    ),
    key(
        "workers.elastic.busy_low",
        "share of time",
        "0.3",
        Words("0 to below `busy_high`"),
        "A worker less when two would be below it. Two workers below 0.3 have 0.6 together, which one can \
         bear.",
    ),
    key(
        "workers.elastic.hold_s",
        "s",
        "10",
        Range(1, 3_600),
        "How long a threshold is crossed before anything is done: longer than a burst, much shorter than \
         a surge.",
    ),
    key(
        "workers.elastic.pause_s",
        "s",
        "30",
        Range(1, 86_400),
        "Pause after a change, so that the next look sees what it has changed: a new worker has its \
         groups by then, and a retired one has relayed its last straggler.",
    ),
    key(
        "workers.elastic.timeout_s",
        "s",
        "30",
        Range(1, 600),
        "How long a hook may take. A service manager that starts a process with huge pages takes some \
         seconds.",
    ),
    key(
        "moves.marker_ms",
        "ms",
        "2000",
        Range(1, 60_000),
        "Longest wait of a move's source for the markers of all ingresses; then it cuts, if it hears of the \
         target, and packets that are still on the old way are relayed.",
    ),
    key(
        "moves.take_back_ms",
        "ms",
        "3000",
        Range(1_000, 60_000),
        "How long a move's source waits, after the flip, for a target that is silent: then it takes the group \
         back, unless the target may have the token. A target says four times a second that it is there, so \
         that shorter silences are lost packets.",
    ),
    key(
        "moves.cut_ms",
        "ms",
        "500",
        Range(1, 60_000),
        "Longest wait of a move's target for the cut along the data path, behind the records that came by \
         QUIC. At most `moves.marker_ms`: it takes one way, a marker two.",
    ),
    key(
        "moves.late_ms",
        "ms",
        "2000",
        Range(1, 60_000),
        "Longest hold, at a move's target, of the packets of an ingress whose marker is late.",
    ),
    key(
        "moves.relay_ms",
        "ms",
        "10000",
        Range(1, 600_000),
        "How long a former owner relays stragglers: longer than any packet is on its way, and at least as long \
         as `moves.marker_ms`, `moves.cut_ms` and `moves.late_ms`.",
    ),
    key(
        "moves.relay_late_ms",
        "ms",
        "300000, or `moves.relay_ms` if that is more",
        Range(1, 3_600_000),
        "How long a former owner relays, after the last packet that came by the old path, as long as some \
         ingress has not flipped, since its agent is away or does not reach its switch. A UDP mapping that \
         nobody uses for five minutes is over (RFC 4787, REQ-5). At least `moves.relay_ms`.",
    ),
    key(
        "moves.rate_mbit_per_s",
        "Mbit/s",
        "1000",
        Range(1, 400_000),
        "What moves from here may use of the link: a tenth of 10 Gbit/s.",
    ),
    key(
        "probe.enabled",
        "true or false",
        "false",
        ANY,
        "Whether this site measures servers that the leader is in doubt about. It is off because it sends \
         packets to others' servers.",
    ),
    key("probe.per_second", "probes/s", "2", Range(1, 100), "Most of them."),
    key("probe.networks", "prefixes", "all", Words("at most 256"), "Which servers may be measured."),
];

const OPENVSWITCH: &[Key] = &[
    key(
        "openvswitch.bridge",
        "text",
        NEEDED,
        DEVICE,
        "The bridge's name. Without the table `openvswitch` the switch is the embedded one.",
    ),
    key(
        "openvswitch.datapath",
        "text",
        "\"netdev\"",
        Words("`\"netdev\"` or `\"system\"`"),
        "The userspace datapath needs no kernel module and carries ports of DPDK.",
    ),
    key(
        "openvswitch.database",
        "address",
        NONE,
        Words("as `switch`"),
        "Where the database of Open vSwitch listens; `limosa switch setup` and the look at the fail mode \
         need it.",
    ),
    key(
        "openvswitch.control",
        "path",
        "this or `probe`",
        PATH,
        "Run directory or control socket of `ovs-vswitchd` on this machine, which is asked whether rules \
         are in force.",
    ),
    key(
        "openvswitch.check_fail_mode",
        "true or false",
        "true",
        Words("true needs `database`"),
        "Nothing is steered before the fail mode is `secure`: else a bridge without its controller is a \
         learning switch, and packets bypass the network functions.",
    ),
    key("openvswitch.inside.name", "text", NEEDED, DEVICE, "The port to clients."),
    key("openvswitch.inside.number", "number", "1", PORT, "Its OpenFlow number."),
    key("openvswitch.inside.type", "text", "that of a network device", ANY, "Its type in Open vSwitch."),
    key("openvswitch.inside.options", "table of texts", "none", ANY, "Its options in Open vSwitch."),
    key("openvswitch.outside.name", "text", NEEDED, DEVICE, "The port to the world."),
    key("openvswitch.outside.number", "number", "2", PORT, "Its OpenFlow number."),
    key("openvswitch.outside.type", "text", "that of a network device", ANY, "Its type."),
    key("openvswitch.outside.options", "table of texts", "none", ANY, "Its options."),
    key(
        "openvswitch.workers[].worker",
        "number",
        NEEDED,
        Words("0 to 65535, each once; all of `workers.ports`"),
        "A worker.",
    ),
    key("openvswitch.workers[].name", "text", NEEDED, DEVICE, "Its port."),
    key(
        "openvswitch.workers[].number",
        "number",
        "100 + worker, from 900 on 1400 + worker",
        PORT,
        "The port's OpenFlow number.",
    ),
    key("openvswitch.workers[].type", "text", "that of a network device", ANY, "The port's type."),
    key("openvswitch.workers[].options", "table of texts", "none", ANY, "The port's options."),
    key(
        "openvswitch.tunnels.mode",
        "text",
        NEEDED,
        Words("`\"flow-based\"` (IPv4) or `\"per-peer\"`"),
        "One port for all peers, or one for each. The table is needed when there are peers.",
    ),
    key(
        "openvswitch.tunnels.name",
        "text",
        "\"vxlan\"",
        DEVICE,
        "The port's name, or what the names of the ports begin with.",
    ),
    key(
        "openvswitch.tunnels.local",
        "address",
        "chosen by routes",
        Words("an IPv4 address"),
        "Where tunnels begin.",
    ),
    key(
        "openvswitch.tunnels.udp_port",
        "number",
        "4789",
        Range(1, 65_535),
        "Port of VXLAN; the default is assigned by IANA.",
    ),
    key("openvswitch.tunnels.remotes[].site", "number", NEEDED, Words("each of `peers` once"), "A peer."),
    key(
        "openvswitch.tunnels.remotes[].address",
        "address",
        NEEDED,
        Words("an IP address"),
        "Where its switch ends tunnels.",
    ),
    key(
        "openvswitch.probe.out.name",
        "text",
        NEEDED,
        DEVICE,
        "One end of a link by which probe packets leave a bridge elsewhere, in place of `control`.",
    ),
    key("openvswitch.probe.out.number", "number", "90", PORT, "Its OpenFlow number."),
    key("openvswitch.probe.out.type", "text", "that of a network device", ANY, "Its type."),
    key("openvswitch.probe.out.options", "table of texts", "none", ANY, "Its options."),
    key("openvswitch.probe.back.name", "text", NEEDED, DEVICE, "The other end, where they come in."),
    key("openvswitch.probe.back.number", "number", "91", PORT, "Its OpenFlow number."),
    key("openvswitch.probe.back.type", "text", "that of a network device", ANY, "Its type."),
    key("openvswitch.probe.back.options", "table of texts", "none", ANY, "Its options."),
    key(
        "openvswitch.tls.certificate",
        "path",
        NEEDED,
        FILE,
        "Certificate for connections `tls:` to the switch; without the table `openvswitch.tls` that of \
         the node.",
    ),
    key("openvswitch.tls.key", "path", NEEDED, FILE, "Its key."),
    key("openvswitch.tls.authority", "path", NEEDED, FILE, "What the switch's certificate has to chain to."),
    key(
        "openvswitch.tls.name",
        "text",
        "the host of the address",
        ANY,
        "The name in the switch's certificate.",
    ),
];

const WORKERS: &[Key] = &[
    key("site", "number", NEEDED, SITE, "The site's number."),
    key("worker", "number", NEEDED, WORKER, "The worker's number at its site."),
    key(
        "directory",
        "path",
        NEEDED,
        Words("a directory that is there"),
        "Where it makes its control socket, `worker-N.control`, and a lock file beside.",
    ),
    key(
        "switch",
        "path",
        "this or `dpdk`",
        PATH,
        "The switch's socket for this worker, `worker-N.packets`. It need not be there yet.",
    ),
    key("flows", "flows", "1048576", Range(1_024, 1 << 28), "Flows that fit; a million takes about 100 MiB."),
    key(
        "hold_packets",
        "packets",
        "65536; 16384 over DPDK",
        Range(32, 1 << 22),
        "Packets that may be held during moves, over all groups: 300 ms at 200,000 packets per second. \
         Over DPDK each has a buffer of full length. Beyond, holds open early, and once the source's cut has \
         come what has no room is dropped and counted; what a source relays may go over it by four times.",
    ),
    key(
        "hold_mb",
        "MiB",
        "128",
        Range(1, 1 << 16),
        "Memory of packets that are held during moves, over all groups, each at its own length. Holds open early \
         at half of it, and what has no room is dropped and counted (`dropped_hold_full`).",
    ),
    key(
        "dpdk.device",
        "text",
        "this or `dpdk.pci`",
        Words("driver, number and `key=value` pairs"),
        "A virtual device, such as `net_af_packet0,iface=eth1`. The table needs a program built with \
         feature `dpdk`.",
    ),
    key("dpdk.pci", "text", "this or `dpdk.device`", Words("`domain:bus:device.function`"), "A card."),
    key(
        "dpdk.lcore",
        "number",
        "chosen by the scheduler",
        Range(0, 1_023),
        "The processor that the worker stays on.",
    ),
    key("dpdk.huge_pages", "true or false", "true", ANY, "Whether memory is of huge pages."),
    key(
        "dpdk.memory_mb",
        "MiB",
        "what the buffers need, and 64",
        Words("what the buffers need, to 1048576"),
        "Memory of DPDK.",
    ),
    key(
        "dpdk.idle",
        "text",
        "\"backoff\"",
        Words("`\"spin\"` or `\"backoff\"`"),
        "What is done when no packet comes: look again at once, or sleep for growing times.",
    ),
    key("dpdk.mtu", "bytes", "1500", Range(576, 9_198), "Longest frame without its header."),
    key(
        "dpdk.buffers",
        "packets",
        "what `hold_packets` needs",
        Words("what `hold_packets` needs, to 16777216"),
        "Buffers of packets.",
    ),
    key(
        "dpdk.rx_descriptors",
        "packets",
        "1024",
        Range(32, 2_048),
        "Packets that the device may hold that came in.",
    ),
    key(
        "dpdk.tx_descriptors",
        "packets",
        "1024",
        Range(32, 2_048),
        "Packets that the device may hold that go out.",
    ),
    key("dpdk.eal", "words", NONE, Words("none that another key sets"), "More arguments for DPDK."),
];

const SWITCH: &[Key] = &[
    key("site", "number", NEEDED, SITE, "The site's number; it is in the datapath id."),
    key("name", "text", NEEDED, LABEL, "The name that controllers see."),
    key(
        "control",
        "path",
        NEEDED,
        PATH,
        "Where it listens for controllers. A lock file lies beside this and each other socket.",
    ),
    key(
        "inside",
        "path",
        NEEDED,
        PATH,
        "Socket of the port to clients (`SOCK_SEQPACKET`, a frame per message).",
    ),
    key("outside", "path", NEEDED, PATH, "Socket of the port to the world."),
    key(
        "directory",
        "path",
        NEEDED,
        Words("a directory that is there"),
        "Where it makes the workers' sockets, `worker-N.packets`.",
    ),
    key("workers", "numbers", NEEDED, Words("each once"), "Workers that it has ports for."),
    key(
        "tunnels[].site",
        "number",
        NEEDED,
        Words("0 to 255, each once, not this site's"),
        "Another site. Without `tunnels` the site is alone.",
    ),
    key("tunnels[].local", "address", NEEDED, ADDRESS, "Where its frames come in (VXLAN over UDP)."),
    key(
        "tunnels[].remote",
        "address",
        NEEDED,
        ADDRESS,
        "Where its switch receives; frames are taken from this IP address only.",
    ),
];

const PROCESSES: [Process; 5] = [
    Process { name: "placement", text: "A placement node.", live: &[], keys: PLACEMENT },
    Process { name: "site", text: "The agent of a site.", live: shell::LIVE, keys: SITES },
    Process {
        name: "site, table `openvswitch`",
        text: "Where the site's switch is a bridge of Open vSwitch ([openvswitch.md](openvswitch.md)).",
        live: shell::LIVE,
        keys: OPENVSWITCH,
    },
    Process { name: "worker", text: "A worker.", live: &[], keys: WORKERS },
    Process {
        name: "switch",
        text: "The embedded switch ([switch.md](switch.md)).",
        live: SWITCH_LIVE,
        keys: SWITCH,
    },
];

const HEAD: &str = "# Configuration

<!-- Written by `limosa dev configuration`; a test compares it. -->

Each process has one file of TOML: `limosa run PROCESS --config FILE`. An unknown key, a value of a wrong type and
a value out of bounds end the process at its start, with the file, the key, the value and what would be right.
Relative paths are relative to the file. `[]` in a key stands for each entry of a list of tables: `peers[].site` is
the key `site` of a table `[[peers]]`.

Most changes need a restart of the process. Keys with *live* in their meaning are taken with SIGHUP
([operations.md](operations.md#signals-and-how-processes-end)).

A host name in an address is looked up whenever a connection is made, so a node that moved is found again when its
connection ended.

Of the environment all processes read `LIMOSA_LOG`: what is logged to standard error, as comma-separated
`target=level` with the levels `error`, `warn`, `info`, `debug` and `trace`. The default is `info,openraft=warn`,
because what Raft says at `info` is for its authors, without its warnings of each heartbeat that a node did not
answer: that it is not reached is said once. What the command line reads, `limosa --help` names.
";

fn is_live(live: &[&str], path: &str) -> bool {
    let path = path.replace("[]", "");
    live.iter().any(|live| crate::signals::is_at_or_below(&path, live))
}

/// The whole document.
#[must_use]
pub fn document() -> String {
    let mut text = HEAD.to_owned();
    for process in PROCESSES {
        let _ = write!(text, "\n## {}\n\n{}\n\n", process.name, process.text);
        text.push_str("| key | unit | default | bounds | meaning |\n|---|---|---|---|---|\n");
        for Key { path, unit, default, bounds, text: meaning } in process.keys {
            let bounds = match bounds {
                Range(min, max) => format!("{min} to {max}"),
                Words(words) => (*words).to_owned(),
            };
            let live = if is_live(process.live, path) { " *live*" } else { "" };
            let _ = writeln!(text, "| `{path}` | {unit} | {default} | {bounds} | {meaning}{live} |");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::Path;

    use super::super::*;
    use super::*;

    /// Keys of a process as its types have them.
    fn read_keys(tables: Vec<(&str, Vec<String>)>) -> BTreeSet<String> {
        let prefixes: BTreeSet<String> =
            tables.iter().map(|(table, _)| table.trim_end_matches("[]").to_owned()).collect();
        let keys = tables.iter().flat_map(|(table, names)| {
            names
                .iter()
                .map(move |name| if table.is_empty() { name.clone() } else { format!("{table}.{name}") })
        });
        keys.filter(|key| !prefixes.contains(key)).collect()
    }

    fn told(processes: &[&str]) -> BTreeSet<String> {
        let of = |process: &&Process| processes.contains(&process.name);
        let keys = PROCESSES.iter().filter(of).flat_map(|process| process.keys);
        keys.map(|key| key.path.to_owned()).collect()
    }

    #[test]
    fn every_key_of_every_file_is_in_the_document_and_no_other() {
        let tls = |table| (table, fields::<RawTls>());
        let nodes = |table| (table, fields::<NodeAddress>());
        let placement = vec![("", fields::<RawPlacement>()), tls("tls"), nodes("peers[]")];
        assert_eq!(told(&["placement"]), read_keys(placement));
        let mut site = vec![("", fields::<RawSite>()), tls("tls"), nodes("placement[]")];
        site.extend([("peers[]", fields::<Peer>()), ("workers", fields::<RawWorkers>())]);
        site.extend([("workers.elastic", fields::<elastic::RawElastic>())]);
        site.extend([("moves", fields::<RawMoves>()), ("probe", fields::<RawProbe>())]);
        site.extend(openvswitch::tables());
        assert_eq!(told(&["site", "site, table `openvswitch`"]), read_keys(site));
        let worker = vec![("", fields::<RawWorker>()), ("dpdk", fields::<RawDpdk>())];
        assert_eq!(told(&["worker"]), read_keys(worker));
        let switch = vec![("", fields::<RawSwitch>()), ("tunnels[]", fields::<RawTunnel>())];
        assert_eq!(told(&["switch"]), read_keys(switch));
    }

    #[test]
    fn the_document_is_as_it_is_written() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/configuration.md");
        let kept = std::fs::read_to_string(path).unwrap();
        assert!(kept == document(), "run `limosa dev configuration > docs/configuration.md`");
    }

    const PLACEMENT_FILE: &str = r#"
        cluster = "c"
        id = 1
        listen = "127.0.0.1:4000"
        api = "127.0.0.1:8000"
        directory = "state"
        tls = { certificate = "c.pem", key = "k.pem", authority = "a.pem" }
    "#;
    const SITE_FILE: &str = r#"
        cluster = "c"
        site = 1
        name = "ams"
        listen = "127.0.0.1:4001"
        metrics = "127.0.0.1:9001"
        switch = "switch.control"
        tls = { certificate = "c.pem", key = "k.pem", authority = "a.pem" }
        placement = [{ id = 1, address = "127.0.0.1:4000" }]
        workers = { directory = "w", expected = [1], elastic = { start = ["a"], stop = ["b"] } }
        [[peers]]
        site = 2
        name = "fra"
        address = "192.0.2.2:4001"
        [openvswitch]
        bridge = "limosa"
        database = "db.sock"
        control = "/run/openvswitch"
        inside = { name = "in0" }
        outside = { name = "out0" }
        workers = [{ worker = 1, name = "w1" }]
        tunnels = { mode = "flow-based", remotes = [{ site = 2, address = "10.0.0.2" }] }
    "#;
    const WORKER_FILE: &str = "site = 1\nworker = 2\ndirectory = \"w\"\nswitch = \"s\"\n";
    const DPDK_FILE: &str = "site = 1\nworker = 2\ndirectory = \"w\"\ndpdk = { device = \"net_null0\" }\n";

    /// Reads a file in which one key is set, and says what is wrong with it.
    fn wrong_with(process: &str, key: &str, value: u64) -> String {
        let directory = tempfile::tempdir().unwrap();
        for name in ["c.pem", "k.pem", "a.pem"] {
            std::fs::write(directory.path().join(name), "").unwrap();
        }
        let text = match process {
            "placement" => PLACEMENT_FILE,
            "worker" if key.starts_with("dpdk.") => DPDK_FILE,
            "worker" => WORKER_FILE,
            _ => SITE_FILE,
        };
        let mut file: toml::Table = toml::from_str(text).unwrap();
        let mut table = &mut file;
        let (tables, last) = key.rsplit_once('.').unwrap_or(("", key));
        for name in tables.split('.').filter(|name| !name.is_empty()) {
            let inner = table.entry(name).or_insert_with(|| toml::Table::new().into());
            table = inner.as_table_mut().unwrap();
        }
        table.insert(last.to_owned(), i64::try_from(value).unwrap().into());
        let path = directory.path().join("file.toml");
        std::fs::write(&path, toml::to_string(&file).unwrap()).unwrap();
        let error = match process {
            "placement" => PlacementConfig::read(&path).err(),
            "worker" => WorkerConfig::read(&path).err(),
            _ => SiteConfig::read(&path).err(),
        };
        error.map(|error| error.to_string()).unwrap_or_default()
    }

    #[test]
    fn every_bound_in_the_document_is_checked_with_key_value_and_range() {
        let mut count = 0;
        for process in &PROCESSES {
            for key in process.keys {
                let Range(min, max) = key.bounds else { continue };
                count += 1;
                let wrong = |value| wrong_with(process.name, key.path, value);
                for value in [min, max] {
                    // It may still not fit to another key.
                    let error = wrong(value);
                    assert!(!error.contains(&format!("use {min} to {max}")), "{error}");
                }
                for value in [min.checked_sub(1), max.checked_add(1)].into_iter().flatten() {
                    let (error, named) =
                        (wrong(value), format!("{} = \"{value}\": use {min} to {max}", key.path));
                    // Of a number beyond its type the line is shown, and the types' own range.
                    let beyond = value == 65_536 && error.contains("file.toml") && error.contains("65536");
                    assert!(error.contains(&named) || beyond, "{named}, not {error}");
                }
            }
        }
        assert!(count >= 15, "only {count} keys have a range");
    }
}
