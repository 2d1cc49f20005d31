//! Network namespaces and the virtual cables between them.
//!
//! | namespace | what is in it |
//! |---|---|
//! | `limosa-lab-sN` | site N: Open vSwitch, workers, agent, placement node |
//! | `limosa-lab-wan` | the WAN emulator, with two cables to each site: tunnels, and QUIC and probes |
//! | `limosa-lab-clients` | all subscribers, with one cable to each site |
//! | `limosa-lab-world` | all servers near a site, with one cable to each site, and the way to those that are far |
//! | `limosa-lab-far` | servers far from all sites, each with one cable to the WAN emulator |
//!
//! A client roams by a change of one route, and its sockets live on. All ends of cables at clients have one hardware address,
//! all at servers another, so that a frame is taken whichever site it comes from. Nothing in these namespaces has a way to
//! the machine's own network.

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::Context;
use nix::sched::{CloneFlags, setns};

/// Every namespace of the lab begins so.
pub(super) const PREFIX: &str = "limosa-lab-";
/// Bytes of a packet at clients and servers: a tunnel's headers must still fit.
pub(super) const MTU: u16 = 1_400;
/// Bytes of a packet between sites.
pub(super) const UNDERLAY_MTU: u16 = 1_500;

/// A namespace, by the part of its name behind the prefix.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Namespace(String);

/// One end of a cable.
#[derive(Clone, Debug)]
pub(super) struct End<'a> {
    pub(super) namespace: &'a Namespace,
    pub(super) interface: String,
    pub(super) mac: Option<String>,
}

impl std::fmt::Display for Namespace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{PREFIX}{}", self.0)
    }
}

impl Namespace {
    /// Makes it, with its loopback up. No IPv6, so that nothing is sent that nobody asked for; no reverse path filter, so that an
    /// answer may come from another site than the one that the question went to.
    ///
    /// # Errors
    /// In words of `ip`.
    pub(super) fn create(name: &str) -> anyhow::Result<Self> {
        let own = Self(name.to_owned());
        ip(&["netns", "add", &own.to_string()])?;
        own.run(
            "sysctl",
            &[
                "-qw",
                "net.ipv6.conf.all.disable_ipv6=1",
                "net.ipv6.conf.default.disable_ipv6=1",
                "net.ipv4.conf.all.rp_filter=0",
                "net.ipv4.conf.default.rp_filter=0",
            ],
        )?;
        own.ip(&["link", "set", "lo", "up"])?;
        Ok(own)
    }

    /// Makes one with a cable in it, and removes both: not every container may.
    ///
    /// # Errors
    /// In words of the tool that failed.
    pub(super) fn possible() -> anyhow::Result<()> {
        let own = Self("check".to_owned());
        let made = Self::create("check")
            .and_then(|own| own.ip(&["link", "add", "v0", "type", "veth", "peer", "name", "v1"]));
        let removed = ip(&["netns", "delete", &own.to_string()]);
        made.and(removed).context("network namespaces cannot be made here")
    }

    /// One command of `ip` inside.
    ///
    /// # Errors
    /// In its words.
    pub(super) fn ip(&self, arguments: &[&str]) -> anyhow::Result<()> {
        let name = self.to_string();
        ip(&[&["-n", &name], arguments].concat())
    }

    /// Many commands of `ip` inside, one a line.
    ///
    /// # Errors
    /// In its words.
    pub(super) fn ip_batch(&self, commands: &str) -> anyhow::Result<()> {
        let name = self.to_string();
        let mut child = Command::new("ip")
            .args(["-n", &name, "-batch", "-"])
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("ip")?;
        child.stdin.take().context("ip has no input")?.write_all(commands.as_bytes())?;
        let output = child.wait_with_output()?;
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        anyhow::ensure!(output.status.success(), "ip -n {self} -batch: {said}\n{commands}");
        Ok(())
    }

    /// A command inside, to its end; what it wrote.
    ///
    /// # Errors
    /// In its words.
    pub(super) fn run(&self, program: &str, arguments: &[&str]) -> anyhow::Result<String> {
        output(self.command(program).args(arguments))
    }

    /// A command that will run inside. It becomes the process itself, so its number is that of the child.
    pub(super) fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.to_string()]).arg(program);
        command
    }

    /// To start, inside, what stands for a thing with hardware of its own: it goes before all that shares the processors, where the
    /// system lets us.
    pub(super) fn hardware(&self, program: &str) -> Command {
        const FIRST: [&str; 3] = ["chrt", "--rr", "1"];
        let tried = Command::new(FIRST[0]).args(&FIRST[1..]).arg("true").stderr(Stdio::null()).status();
        if !tried.is_ok_and(|status| status.success()) {
            return self.command(program);
        }
        let mut command = self.command(FIRST[0]);
        command.args(&FIRST[1..]).arg(program);
        command
    }

    /// Moves the calling thread inside, for the rest of its life: sockets that it opens are there.
    ///
    /// # Errors
    /// The namespace is gone.
    pub(super) fn enter(&self) -> anyhow::Result<()> {
        let path = PathBuf::from("/run/netns").join(self.to_string());
        let file = File::open(&path).with_context(|| path.display().to_string())?;
        Ok(setns(file, CloneFlags::CLONE_NEWNET)?)
    }
}

/// Lays a cable. No offloads: what a virtual cable leaves for hardware to do nobody does.
///
/// # Errors
/// In words of `ip` or `ethtool`.
pub(super) fn cable(a: &End<'_>, b: &End<'_>, mtu: u16) -> anyhow::Result<()> {
    let (name_a, name_b) = (a.namespace.to_string(), b.namespace.to_string());
    let mtu = mtu.to_string();
    let mut command =
        vec!["link", "add", &a.interface, "netns", &name_a, "mtu", &mtu, "type", "veth", "peer"];
    command.extend(["name", &b.interface, "netns", &name_b, "mtu", &mtu]);
    ip(&command)?;
    for end in [a, b] {
        if let Some(mac) = &end.mac {
            end.namespace.ip(&["link", "set", &end.interface, "address", mac])?;
        }
        let off = ["tx", "off", "rx", "off", "tso", "off", "gso", "off", "gro", "off"];
        end.namespace.run("ethtool", &[&["-K", end.interface.as_str()], &off[..]].concat())?;
        end.namespace.ip(&["link", "set", &end.interface, "up"])?;
    }
    Ok(())
}

/// All namespaces of the lab that there are.
pub(super) fn present() -> Vec<String> {
    let Ok(entries) = std::fs::read_dir("/run/netns") else { return Vec::new() };
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let mut names: Vec<_> = names.filter(|name| name.starts_with(PREFIX)).collect();
    names.sort_unstable();
    names
}

/// Deletes a namespace and the cables in it. That it is gone already is no error.
pub(super) fn delete(name: &str) {
    if let Err(error) = ip(&["netns", "delete", name]) {
        tracing::debug!(%error, name, "a namespace cannot be deleted");
    }
}

fn ip(arguments: &[&str]) -> anyhow::Result<()> {
    output(Command::new("ip").args(arguments)).map(drop)
}

fn output(command: &mut Command) -> anyhow::Result<String> {
    let shown = || {
        let words = command.get_args().map(|word| word.to_string_lossy().into_owned());
        format!("{} {}", command.get_program().to_string_lossy(), words.collect::<Vec<_>>().join(" "))
    };
    let shown = shown();
    let output = command.stdin(Stdio::null()).output().with_context(|| shown.clone())?;
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    anyhow::ensure!(output.status.success(), "{shown}: {said}");
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
