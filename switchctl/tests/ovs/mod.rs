//! Open vSwitch of one's own: database and daemon in a directory, and network namespaces if wanted. All of it ends with
//! the value, and with the thread that made it, however that ends.
#![allow(dead_code, reason = "each user of these helpers uses some")]
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::io::Write;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// Says on standard error why a test is skipped.
pub(crate) fn skip(test: &str, why: &str) {
    std::io::stderr().write_all(format!("SKIPPED: {test}: {why}\n").as_bytes()).unwrap();
}

/// Ends a process with the thread that started it.
fn mortal(program: &str) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", program]);
    command
}

/// A process that is killed with the value.
pub(crate) struct Mortal(Child);

impl Drop for Mortal {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A network namespace without a name, so that it ends with its processes.
pub(crate) struct Namespace(Mortal);

impl Namespace {
    /// `None` without the right to make one.
    pub(crate) fn new() -> Option<Self> {
        let mut command = Command::new("unshare");
        command.args([
            "--net",
            "setpriv",
            "--pdeathsig",
            "KILL",
            "sh",
            "-c",
            "ip link set lo up && echo && exec sleep 1000000",
        ]);
        let mut child =
            command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().ok()?;
        let mut ready = [0];
        let read = std::io::Read::read_exact(&mut child.stdout.take()?, &mut ready);
        let namespace = Self(Mortal(child));
        read.ok().map(|()| namespace)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.0.0.id()
    }

    /// Runs a command in it, which must succeed.
    pub(crate) fn run(&self, command: &str) {
        let pid = self.pid().to_string();
        let words = command.split_whitespace();
        let output = Command::new("nsenter").args(["-t", &pid, "-n"]).args(words).output().unwrap();
        assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

/// One database and one daemon.
pub(crate) struct OpenVswitch {
    children: Vec<Mortal>,
    directory: tempfile::TempDir,
    namespace: Option<u32>,
}

/// Which datapath.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Datapath {
    /// The userspace datapath with ports that exist nowhere else; needs no rights.
    Dummy,
    /// The userspace datapath with real ports, and such that exist nowhere else if asked for.
    Netdev,
}

impl OpenVswitch {
    /// `None` when it is not installed.
    pub(crate) fn start(datapath: Datapath, namespace: Option<&Namespace>) -> Option<Self> {
        for tool in ["ovs-vswitchd", "ovsdb-server", "ovsdb-tool", "ovs-vsctl", "ovs-appctl", "setpriv"] {
            Command::new(tool).arg("--version").output().ok()?;
        }
        let directory = tempfile::tempdir().unwrap();
        let namespace = namespace.map(Namespace::pid);
        let mut ovs = Self { directory, children: Vec::new(), namespace };
        ovs.run("ovsdb-tool", &["create", "db", "/usr/share/openvswitch/vswitch.ovsschema"]);
        ovs.spawn("ovsdb-server", &["db", "--remote=punix:db.sock", "--unixctl=db.ctl"]);
        ovs.wait_for("db.sock");
        ovs.vsctl(&["--no-wait", "init"]);
        ovs.vswitchd(datapath);
        Some(ovs)
    }

    /// Starts the daemon; what it had before is in the database.
    pub(crate) fn vswitchd(&mut self, datapath: Datapath) {
        let _ = std::fs::remove_file(self.path("vs.ctl"));
        let dummy = if datapath == Datapath::Dummy { "--enable-dummy=override" } else { "--enable-dummy" };
        self.spawn("ovs-vswitchd", &["unix:db.sock", "--unixctl=vs.ctl", "--log-file=vs.log", dummy]);
        self.wait_for("vs.ctl");
    }

    /// Kills the daemon started last.
    pub(crate) fn kill_vswitchd(&mut self) {
        self.children.pop();
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn prepare(&self, mut command: Command, arguments: &[&str]) -> Command {
        let directory = self.directory.path();
        command.args(arguments).current_dir(directory).stdin(Stdio::null());
        for variable in ["OVS_RUNDIR", "OVS_LOGDIR", "OVS_DBDIR"] {
            command.env(variable, directory);
        }
        command
    }

    /// Runs a tool, which must succeed; gives its output.
    pub(crate) fn run(&self, tool: &str, arguments: &[&str]) -> String {
        let output = self.prepare(Command::new(tool), arguments).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            output.status.success(),
            "{tool} {arguments:?}: {text}{}",
            String::from_utf8_lossy(&output.stderr)
        );
        text
    }

    pub(crate) fn vsctl(&self, arguments: &[&str]) -> String {
        self.run("ovs-vsctl", &[&["--db=unix:db.sock", "--timeout=20"], arguments].concat())
    }

    pub(crate) fn appctl(&self, arguments: &[&str]) -> String {
        self.run("ovs-appctl", &[&["-t", self.path("vs.ctl").to_str().unwrap()], arguments].concat())
    }

    pub(crate) fn ofctl(&self, arguments: &[&str]) -> String {
        self.run("ovs-ofctl", &[&["-O", "OpenFlow14", "--no-names", "--timeout=20"], arguments].concat())
    }

    fn spawn(&mut self, tool: &str, arguments: &[&str]) {
        let mut command = mortal(tool);
        if let Some(pid) = self.namespace {
            command = Command::new("nsenter");
            command.args(["-t", &pid.to_string(), "-n", "setpriv", "--pdeathsig", "KILL", tool]);
        }
        let mut command = self.prepare(command, arguments);
        let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        self.children.push(Mortal(child));
    }

    pub(crate) fn wait_for(&self, name: &str) {
        for _ in 0..500 {
            if self.path(name).exists() {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        panic!("{name} did not appear");
    }

    /// A bridge of the dummy datapath with ports of these names and numbers.
    pub(crate) fn dummy_bridge(&self, ports: &[(&str, u32)]) {
        let bridge =
            ["add-br", "br0", "--", "set", "bridge", "br0", "datapath_type=dummy", "fail_mode=secure"];
        self.vsctl(&[&bridge[..], &["protocols=OpenFlow14"]].concat());
        for (name, number) in ports {
            let number = format!("ofport_request={number}");
            self.vsctl(&["add-port", "br0", name, "--", "set", "interface", name, "type=dummy", &number]);
        }
        self.wait_for("br0.mgmt");
    }
}
