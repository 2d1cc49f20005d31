//! The life of processes: what signals do to them, how they end, and what they say when they cannot work.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::fs::File;
use std::net::{TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tempfile::TempDir;

/// Longest wait for anything: a busy machine is slow, and what never comes is a fault.
const BOUND_S: u32 = 60;

fn limosa() -> Command {
    Command::new(env!("CARGO_BIN_EXE_limosa"))
}

/// Waits until something is there.
fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    for _ in 0..BOUND_S * 20 {
        if let Some(found) = look() {
            return found;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    panic!("{what} did not come about");
}

/// A process of a deployment and what it logs.
struct Process {
    child: Child,
    log: PathBuf,
}

impl Process {
    fn start(kind: &str, config: &Path) -> Self {
        let log = config.with_extension("log");
        let child = limosa()
            .args(["run", kind, "--config"])
            .arg(config)
            .stdin(Stdio::null())
            .stderr(File::create(&log).unwrap())
            .spawn()
            .unwrap();
        Self { child, log }
    }

    fn send(&self, signal: Signal) {
        kill(Pid::from_raw(i32::try_from(self.child.id()).unwrap()), signal).unwrap();
    }

    fn said(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }

    fn until_said(&self, text: &str) {
        until(&format!("{text:?} in {}", self.log.display()), || self.said().contains(text).then_some(()));
    }

    fn runs(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    fn ended(&mut self) -> ExitStatus {
        until("the end of a process", || self.child.try_wait().unwrap())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn free_port() -> u16 {
    UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn free_tcp_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// Placement nodes on this machine.
struct Nodes {
    directory: TempDir,
    quic: Vec<u16>,
    api: Vec<u16>,
    heartbeat_ms: u64,
    processes: Vec<Option<Process>>,
}

impl Nodes {
    /// So many nodes that make one group.
    fn start(count: usize, heartbeat_ms: u64) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut certs = limosa();
        certs.args(["dev", "certs", "--cluster", "life", "--site", "home", "--directory"]);
        certs.arg(directory.path().join("certs"));
        for id in 1..=count {
            certs.args(["--placement", &id.to_string()]);
        }
        assert!(certs.stdout(Stdio::null()).status().unwrap().success());
        let mut nodes = Self {
            directory,
            quic: (0..count).map(|_| free_port()).collect(),
            api: (0..count).map(|_| free_tcp_port()).collect(),
            heartbeat_ms,
            processes: (0..count).map(|_| None).collect(),
        };
        (1..=count).for_each(|id| nodes.run(id));
        let members: Vec<String> =
            (1..=count).map(|id| format!("{id}=127.0.0.1:{}", nodes.quic[id - 1])).collect();
        until("a group", || {
            let mut command = nodes.raft(1);
            command.arg("initialize").args(&members).output().unwrap().status.success().then_some(())
        });
        until("a leader that all know", || (1..=count).all(|id| nodes.leader(id).is_some()).then_some(()));
        nodes
    }

    fn config(&self, id: usize) -> PathBuf {
        self.directory.path().join(format!("placement-{id}.toml"))
    }

    fn text(&self, id: usize) -> String {
        let others = (1..=self.quic.len()).filter(|other| *other != id);
        let peer = |other| format!("{{ id = {other}, address = \"127.0.0.1:{}\" }}", self.quic[other - 1]);
        format!(
            "cluster = \"life\"\nid = {id}\nlisten = \"127.0.0.1:{}\"\napi = \"127.0.0.1:{}\"\n\
             directory = \"node-{id}\"\nheartbeat_ms = {}\nlease_ms = {}\npeers = [{}]\n\
             tls = {{ certificate = \"certs/placement-{id}.pem\", key = \"certs/placement-{id}.key\", \
             authority = \"certs/authority.pem\" }}\n",
            self.quic[id - 1],
            self.api[id - 1],
            self.heartbeat_ms,
            // Longer than the longest election.
            (9 * self.heartbeat_ms).max(6_000),
            others.map(peer).collect::<Vec<_>>().join(", ")
        )
    }

    /// The file of an agent of site `home`, whose workers and switch need not run.
    fn site_text(&self) -> String {
        format!(
            "cluster = \"life\"\nsite = 1\nname = \"home\"\nlisten = \"127.0.0.1:{}\"\nmetrics = \"127.0.0.1:{}\"\n\
             switch = \"switch.control\"\nplacement = [{{ id = 1, address = \"127.0.0.1:{}\" }}]\n\
             workers = {{ directory = \".\", expected = [1] }}\n\
             tls = {{ certificate = \"certs/site-home.pem\", key = \"certs/site-home.key\", \
             authority = \"certs/authority.pem\" }}\n",
            free_port(),
            free_tcp_port(),
            self.quic[0]
        )
    }

    fn run(&mut self, id: usize) {
        std::fs::write(self.config(id), self.text(id)).unwrap();
        self.processes[id - 1] = Some(Process::start("placement", &self.config(id)));
    }

    fn process(&mut self, id: usize) -> &mut Process {
        self.processes[id - 1].as_mut().unwrap()
    }

    /// `limosa` at one node.
    fn ask(&self, id: usize, what: &[&str]) -> Command {
        let mut command = limosa();
        command.args(["--api", &format!("http://127.0.0.1:{}", self.api[id - 1]), "-o", "json"]).args(what);
        command
    }

    fn raft(&self, id: usize) -> Command {
        self.ask(id, &["raft"])
    }

    fn page(&self, id: usize, path: &str) -> Option<(u16, String)> {
        let url = format!("http://127.0.0.1:{}{path}", self.api[id - 1]);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
            let client = reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(10)).build();
            let answer = client.unwrap().get(url).send().await.ok()?;
            Some((answer.status().as_u16(), answer.text().await.ok()?))
        })
    }

    /// Who leads, by one node.
    fn leader(&self, id: usize) -> Option<usize> {
        let (_, text) = self.page(id, "/v1/raft")?;
        let status: Value = serde_json::from_str(&text).ok()?;
        usize::try_from(status["leader"].as_u64()?).ok()
    }

    fn has_metric(&self, id: usize, line: &str) -> bool {
        self.page(id, "/metrics").is_some_and(|(_, text)| text.lines().any(|found| found == line))
    }
}

/// Heartbeats that are so far apart that an election takes longer than any wait here would notice by chance.
const SLOW_HEARTBEAT_MS: u64 = 3_000;

#[test]
fn the_leader_hands_over_when_it_is_told_to_stop_and_nobody_waits_for_an_election() {
    let mut nodes = Nodes::start(3, SLOW_HEARTBEAT_MS);
    let leader = nodes.leader(1).unwrap();
    nodes.process(leader).send(Signal::SIGTERM);
    assert!(nodes.process(leader).ended().success());
    let said = nodes.process(leader).said();
    assert!(said.contains("the lead is handed over"), "{said}");
    let other = leader % 3 + 1;
    let next = until("another leader", || nodes.leader(other).filter(|next| *next != leader));
    assert!((1..=3).contains(&next));
}

#[test]
fn a_second_sigterm_ends_a_process_at_once() {
    let mut nodes = Nodes::start(3, SLOW_HEARTBEAT_MS);
    let leader = nodes.leader(1).unwrap();
    for id in (1..=3).filter(|&id| id != leader) {
        // Nobody takes the lead over.
        nodes.process(id).send(Signal::SIGSTOP);
    }
    nodes.process(leader).send(Signal::SIGTERM);
    nodes.process(leader).until_said("told to stop");
    assert!(nodes.process(leader).runs());
    let (status, text) = nodes.page(leader, "/readyz").unwrap();
    assert_eq!(status, 503);
    assert!(text.contains("[-] stop: it was told to stop"), "{text}");
    nodes.process(leader).send(Signal::SIGTERM);
    assert_eq!(nodes.process(leader).ended().code(), Some(1));
    assert!(nodes.process(leader).said().contains("a second time"));
}

#[test]
fn the_last_of_three_says_that_there_is_no_quorum() {
    let mut nodes = Nodes::start(3, 100);
    assert_eq!(nodes.page(1, "/readyz"), Some((200, "ok\n".into())));
    assert!(nodes.has_metric(1, "limosa_raft_has_leader 1"));
    for id in [2, 3] {
        nodes.process(id).send(Signal::SIGKILL);
        nodes.process(id).ended();
    }
    let text = until("readyz fails", || {
        nodes.page(1, "/readyz").filter(|(status, _)| *status == 503).map(|(_, text)| text)
    });
    assert!(text.contains("[-] leader: none is known") && text.contains("[-] quorum:"), "{text}");
    assert!(nodes.has_metric(1, "limosa_raft_has_leader 0"));
    assert!(nodes.has_metric(1, "limosa_raft_has_quorum 0"));
    let answer = nodes.raft(1).arg("status").output().unwrap();
    assert_eq!(answer.status.code(), Some(6), "{}", String::from_utf8_lossy(&answer.stderr));
    nodes.process(1).until_said("no quorum");
    assert_eq!(nodes.process(1).said().matches("no quorum").count(), 1, "it is said once");
    nodes.run(2);
    until("readyz holds again", || nodes.page(1, "/readyz").filter(|(status, _)| *status == 200));
}

#[test]
fn a_placement_node_that_may_never_take_part_again_ends_and_says_why() {
    let mut nodes = Nodes::start(3, 100);
    let gone = nodes.leader(1).unwrap() % 3 + 1;
    nodes.process(gone).send(Signal::SIGKILL);
    nodes.process(gone).ended();
    std::fs::remove_dir_all(nodes.directory.path().join(format!("node-{gone}"))).unwrap();
    nodes.run(gone);
    assert_eq!(nodes.process(gone).ended().code(), Some(1));
    let said = nodes.process(gone).said();
    assert!(said.contains(&format!("limosa raft remove {gone}")), "{said}");
    let path = nodes.directory.path().join(format!("node-{gone}/raft.redb"));
    std::fs::write(&path, vec![0; 65_536]).unwrap();
    nodes.run(gone);
    assert_eq!(nodes.process(gone).ended().code(), Some(1));
    let said = nodes.process(gone).said();
    assert!(said.contains("raft.redb") && !said.contains("panicked"), "{said}");
}

#[test]
fn a_node_that_runs_twice_from_a_copy_of_its_directory_is_said_by_the_leader() {
    let mut nodes = Nodes::start(3, 100);
    let leader = nodes.leader(1).unwrap();
    let node = leader % 3 + 1;
    let directory = nodes.directory.path().to_owned();
    // It does nothing while it is copied.
    nodes.process(node).send(Signal::SIGSTOP);
    std::fs::create_dir(directory.join("copy")).unwrap();
    for file in ["raft.redb", "promise"] {
        std::fs::copy(directory.join(format!("node-{node}")).join(file), directory.join("copy").join(file))
            .unwrap();
    }
    nodes.process(node).send(Signal::SIGCONT);
    let text = nodes.text(node);
    let text =
        text.replace(&format!(":{}\"\napi", nodes.quic[node - 1]), &format!(":{}\"\napi", free_port()));
    let text = text.replace(&nodes.api[node - 1].to_string(), &free_tcp_port().to_string());
    let config = directory.join("copy.toml");
    std::fs::write(&config, text.replace(&format!("\"node-{node}\""), "\"copy\"")).unwrap();
    let mut copy = Process::start("placement", &config);
    let wanted = format!("[-] numbers: two processes run as node {node}");
    let unready = || nodes.page(leader, "/readyz").is_some_and(|(_, text)| text.contains(&wanted));
    until("the leader says so", || unready().then_some(()));
    assert!(copy.runs(), "{}", copy.said());
    assert!(nodes.has_metric(leader, "limosa_raft_nodes_twice 1"));
    nodes.process(leader).until_said("two processes run with the number of this placement node");
    let status = nodes.raft(leader).arg("status").output().unwrap();
    assert_eq!(status.status.code(), Some(6));
    let said = String::from_utf8(status.stderr).unwrap();
    assert!(said.contains("two processes run with the number of a placement node"), "{said}");
}

#[test]
fn a_site_that_runs_twice_with_a_copy_of_its_certificate_is_named_and_neither_is_locked_out() {
    // Which one is right nobody else can know.
    let nodes = Nodes::start(1, 100);
    let add = ["site", "add", "home", "--id", "1", "--endpoint", "127.0.0.1:1", "--capacity-pps", "1000"];
    assert!(nodes.ask(1, &add).output().unwrap().status.success());
    let agent = |name: &str, workers: &str| {
        let path = nodes.directory.path().join(name).with_extension("toml");
        let text = nodes.site_text().replace("directory = \".\"", &format!("directory = \"{workers}\""));
        std::fs::write(&path, text).unwrap();
        Process::start("site", &path)
    };
    let twice = |expected: bool| {
        let list = nodes.ask(1, &["site", "list"]).output().unwrap();
        let text = String::from_utf8(list.stdout).unwrap();
        (text.contains("two processes run as this site") == expected).then_some(list.status.code())
    };
    let mut first = agent("first", "first");
    until("the first is heard", || nodes.has_metric(1, "limosa_placement_sites_twice 0").then_some(()));
    until("it is alive", || {
        let list = nodes.ask(1, &["site", "list"]).output().unwrap();
        String::from_utf8(list.stdout).unwrap().contains("\"alive\": true").then_some(())
    });
    assert!(twice(false).is_some());
    // With a copy of its certificate and paths of its own nothing on its machine tells it from the first.
    let mut copy = agent("copy", "copy");
    assert_eq!(until("the site is named", || twice(true)), Some(6));
    assert!(nodes.has_metric(1, "limosa_placement_sites_twice 1"));
    assert!(first.runs() && copy.runs());
    for process in [&first, &copy] {
        assert!(!process.said().contains("placement refuses this site"), "{}", process.said());
    }
}

#[test]
fn a_wrong_configuration_is_refused_while_the_process_runs_and_what_needs_a_restart_is_named() {
    let mut nodes = Nodes::start(1, 100);
    let (path, text) = (nodes.config(1), nodes.text(1));
    assert!(nodes.has_metric(1, "limosa_config_last_reload_successful 1"));
    std::fs::write(&path, text.replace("heartbeat_ms = 100", "heartbeat_ms = 1")).unwrap();
    nodes.process(1).send(Signal::SIGHUP);
    nodes.process(1).until_said("the configuration is refused, the former one stays");
    assert!(nodes.process(1).said().contains("use 20 to 5000"), "{}", nodes.process(1).said());
    assert!(nodes.has_metric(1, "limosa_config_last_reload_successful 0"));
    std::fs::write(&path, text.replace("heartbeat_ms = 100", "heartbeat_ms = 120")).unwrap();
    nodes.process(1).send(Signal::SIGHUP);
    nodes.process(1).until_said("what has changed needs a restart");
    assert!(nodes.process(1).said().contains("keys=\"heartbeat_ms\""), "{}", nodes.process(1).said());
    assert!(nodes.has_metric(1, "limosa_config_last_reload_successful 1"));
    assert_eq!(nodes.leader(1), Some(1), "it went on");
    nodes.process(1).send(Signal::SIGTERM);
    assert!(nodes.process(1).ended().success());
}

#[test]
fn sighup_refuses_what_a_start_would_refuse() {
    let mut nodes = Nodes::start(1, 100);
    let (path, text) = (nodes.config(1), nodes.text(1));
    let place = nodes.directory.path().to_owned();
    let certs = |directory: &str, cluster: &str| {
        let mut certs = limosa();
        certs.args(["dev", "certs", "--cluster", cluster, "--placement", "1", "--placement", "2"]);
        certs.arg("--directory").arg(place.join(directory)).stdout(Stdio::null());
        assert!(certs.status().unwrap().success());
    };
    certs("certs", "life");
    certs("others", "life");
    std::fs::write(place.join("places.mmdb"), "none").unwrap();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let (api, taken) = (nodes.api[0].to_string(), taken.local_addr().unwrap().port().to_string());
    let another = text.replace("placement-1.", "placement-2.").replace("id = 1", "id = 2");
    for (wrong, said) in [
        (text.replace("id = 1", "id = 2"), "this node is limosa://life/placement/2"),
        (text.replace("life", "death"), "this node is limosa://death/placement/1"),
        (text.replace("placement-1.key", "placement-2.key"), "it is not the key of the certificate"),
        (text.replace("certs/authority", "others/authority"), "in the authority's file has signed it"),
        // With the certificate of the other, but its directory is that of this one.
        (another.clone(), "directory belongs to node 1, not to node 2"),
        (format!("locations = \"places.mmdb\"\n{text}"), "places.mmdb as a MaxMind DB"),
        (text.replace(&api, &taken), "it cannot be bound"),
        (text.replace("\"node-1\"", "\"/proc/none\""), "it cannot be had: /proc/none"),
    ] {
        std::fs::write(&path, &wrong).unwrap();
        nodes.process(1).send(Signal::SIGHUP);
        nodes.process(1).until_said(said);
        until("the metric says so", || {
            nodes.has_metric(1, "limosa_config_last_reload_successful 0").then_some(())
        });
        // The file as it is in force is taken again.
        std::fs::write(&path, &text).unwrap();
        nodes.process(1).send(Signal::SIGHUP);
        until("the metric says so", || {
            nodes.has_metric(1, "limosa_config_last_reload_successful 1").then_some(())
        });
    }
    // What would start is read, and what needs a start is named.
    std::fs::write(&path, another.replace("node-1", "node-2")).unwrap();
    nodes.process(1).send(Signal::SIGHUP);
    nodes.process(1).until_said("keys=\"directory, id, tls.certificate, tls.key\"");
    let refused = nodes.process(1).said().matches("the configuration is refused").count();
    assert_eq!(refused, 8, "{}", nodes.process(1).said());
}

/// Puts a FIFO in the place of a file: to open it is to wait for who writes to it.
fn to_fifo(path: &Path) {
    std::fs::remove_file(path).unwrap();
    nix::unistd::mkfifo(path, nix::sys::stat::Mode::S_IRWXU).unwrap();
}

#[test]
fn no_file_keeps_a_process_from_hearing_signals_and_doing_its_work() {
    let mut nodes = Nodes::start(1, 100);
    to_fifo(&nodes.config(1));
    for file in ["placement-1.pem", "placement-1.key", "authority.pem"] {
        to_fifo(&nodes.directory.path().join("certs").join(file));
    }
    nodes.process(1).send(Signal::SIGHUP);
    nodes.process(1).until_said("placement-1.toml: cannot be read: it is a FIFO, a regular file is wanted");
    // Looked at while it runs, too.
    nodes
        .process(1)
        .until_said("placement-1.pem: PEM certificates are wanted (tls.certificate): it is a FIFO");
    nodes.process(1).send(Signal::SIGUSR1);
    nodes.process(1).until_said("filter=\"debug,openraft=info\"");
    assert!(nodes.has_metric(1, "limosa_config_last_reload_successful 0"));
    assert!(nodes.has_metric(1, "limosa_certificate_last_reload_successful 0"));
    assert_eq!(nodes.leader(1), Some(1), "it went on");
    nodes.process(1).send(Signal::SIGTERM);
    assert!(nodes.process(1).ended().success());
    // A start does not wait either, and says what is there.
    let config = nodes.config(1);
    for wanted in [
        "placement-1.toml: cannot be read: it is a FIFO, a regular file is wanted",
        "placement-1.pem\": it is a FIFO, a regular file is wanted",
    ] {
        let mut process = Process::start("placement", &config);
        assert_eq!(process.ended().code(), Some(1));
        assert!(process.said().contains(wanted), "{}", process.said());
        std::fs::remove_file(&config).unwrap();
        std::fs::write(&config, nodes.text(1)).unwrap();
    }
}

#[test]
fn signals_that_are_not_to_end_a_process_end_none() {
    let mut nodes = Nodes::start(1, 100);
    let dir = nodes.directory.path().to_owned();
    let write = |name: &str, text: String| {
        let path = dir.join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let switch = "site = 1\nname = \"home\"\ncontrol = \"switch.control\"\ninside = \"inside.packets\"\n\
                  outside = \"outside.packets\"\ndirectory = \".\"\nworkers = [1]\n";
    let worker = "site = 1\nworker = 1\ndirectory = \".\"\nswitch = \"worker-1.packets\"\n";
    let site = nodes.site_text();
    let mut others = [
        Process::start("switch", &write("switch.toml", switch.into())),
        Process::start("worker", &write("worker.toml", worker.into())),
        Process::start("site", &write("site.toml", site.clone())),
    ];
    others[0].until_said("switch runs");
    others[2].until_said("the agent runs");
    // A worker says nothing at its start but is there when its socket is.
    until("the worker's socket", || dir.join("worker-1.control").exists().then_some(()));
    // What a start could not have is refused, and the file as it is in force is taken again.
    for (process, name, right, from, to, said) in [
        (
            0,
            "switch.toml",
            switch,
            "\"switch.control\"",
            "\"none/control\"",
            "none/control.lock: cannot be locked",
        ),
        (
            0,
            "switch.toml",
            switch,
            "directory = \".\"",
            "directory = \"none\"",
            "worker-1.packets.lock: cannot be locked",
        ),
        (
            1,
            "worker.toml",
            worker,
            "directory = \".\"",
            "directory = \"none\"",
            "worker-1.control.lock: cannot be locked",
        ),
        (
            2,
            "site.toml",
            &site,
            "directory = \".\"",
            "directory = \"/proc/none\"",
            "it cannot be had: /proc/none",
        ),
    ] {
        assert!(right.contains(from));
        write(name, right.replace(from, to));
        others[process].send(Signal::SIGHUP);
        others[process].until_said(said);
        assert!(
            others[process].said().contains("the configuration is refused"),
            "{}",
            others[process].said()
        );
        write(name, right.to_owned());
    }
    for process in others.iter_mut().chain([nodes.process(1)]) {
        for (signal, said) in [
            (Signal::SIGUSR1, "filter=\"debug,openraft=info\""),
            (Signal::SIGUSR1, "filter=\"trace,openraft=debug\""),
            (Signal::SIGUSR2, "filter=\"as at the start\""),
            (Signal::SIGHUP, "the configuration was read again"),
        ] {
            process.send(signal);
            process.until_said(said);
        }
        assert!(process.runs());
        process.send(Signal::SIGTERM);
        assert!(process.ended().success(), "{}", process.said());
    }
}
