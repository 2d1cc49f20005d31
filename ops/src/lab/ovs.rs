//! Open vSwitch of one site: a database and a daemon of its own, and the bridge towards the other sites.
//!
//! The userspace datapath wraps tunnelled packets itself. It needs a bridge whose own interface has the address that tunnels come
//! from, and whose port leads to the other sites: `br-wan`. The bridge with the clients, servers and workers is Limosa's, made by
//! `limosa switch setup`.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::Context;

use super::namespaces::Namespace;
use super::processes::Processes;
use super::underlay;

/// The bridge towards the other sites.
const UNDERLAY_BRIDGE: &str = "br-wan";
/// The end of the cable to the WAN emulator.
pub(super) const UNDERLAY_PORT: &str = "wan0";
/// Where Debian keeps the schema of the database.
const SCHEMA: &str = "/usr/share/openvswitch/vswitch.ovsschema";
/// Open vSwitch with DPDK, where Debian's package puts it.
const DPDK_DAEMON: &str = "/usr/lib/openvswitch-switch-dpdk/ovs-vswitchd-dpdk";
/// How long a daemon may take to answer after its start.
const START_BOUND: Duration = Duration::from_secs(20);

/// How packets go between Open vSwitch and workers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Datapath {
    /// Virtual cables; the daemon sleeps when there is nothing to do.
    Cable,
    /// DPDK's vhost-user; the daemon polls.
    VhostUser,
}

impl Datapath {
    /// `LAB_OVS_DPDK=1` asks for vhost-user.
    ///
    /// # Errors
    /// It is asked for, and Open vSwitch with DPDK is not installed.
    pub(super) fn wanted() -> anyhow::Result<Self> {
        if std::env::var("LAB_OVS_DPDK").is_ok_and(|value| value == "1") {
            anyhow::ensure!(
                Path::new(DPDK_DAEMON).exists(),
                "LAB_OVS_DPDK=1 needs {DPDK_DAEMON}: apt-get install openvswitch-switch-dpdk, or leave it unset"
            );
            return Ok(Self::VhostUser);
        }
        Ok(Self::Cable)
    }
}

/// Open vSwitch of a site.
#[derive(Clone, Debug)]
pub(super) struct Ovs {
    site: u8,
    sites: u8,
    namespace: Namespace,
    directory: PathBuf,
    datapath: Datapath,
}

impl Ovs {
    /// Starts database and daemon, and makes the bridge towards the others.
    ///
    /// # Errors
    /// In words of the tool that failed.
    pub(super) fn start(
        site: u8,
        sites: u8,
        namespace: &Namespace,
        directory: PathBuf,
        datapath: Datapath,
        processes: &mut Processes,
    ) -> anyhow::Result<Self> {
        std::fs::create_dir_all(&directory)?;
        let ovs = Self { site, sites, namespace: namespace.clone(), directory, datapath };
        let database = ovs.directory.join("conf.db").display().to_string();
        namespace.run("ovsdb-tool", &["create", &database, SCHEMA])?;
        let mut server = ovs.command("ovsdb-server");
        server.args([&database, &format!("--remote=punix:{}", ovs.database().display())]);
        server.arg(format!("--unixctl={}", ovs.directory.join("ovsdb-server.ctl").display()));
        processes.spawn(&format!("ovsdb-{site}"), server)?;
        ovs.until("the database", || ovs.database().exists())?;
        ovs.vsctl(&["--no-wait", "init"])?;
        if datapath == Datapath::VhostUser {
            let extra = format!("--no-huge --legacy-mem -m 512 --file-prefix=lab-ovs-{site} --no-pci");
            ovs.vsctl(&[
                "--no-wait",
                "set",
                "Open_vSwitch",
                ".",
                "other_config:dpdk-init=true",
                "other_config:pmd-maxsleep=200",
                &format!("other_config:dpdk-extra={extra}"),
            ])?;
        }
        ovs.start_daemon(processes)?;
        ovs.vsctl(&[
            "add-br",
            UNDERLAY_BRIDGE,
            "--",
            "set",
            "bridge",
            UNDERLAY_BRIDGE,
            "datapath_type=netdev",
            &format!("other-config:hwaddr=\"{}\"", underlay::tunnel_mac(site)),
            "--",
            "add-port",
            UNDERLAY_BRIDGE,
            UNDERLAY_PORT,
        ])?;
        ovs.address()?;
        Ok(ovs)
    }

    /// Where the database listens.
    pub(super) fn database(&self) -> PathBuf {
        self.directory.join("db.sock")
    }

    /// The run directory, with the control socket of the daemon and OpenFlow of its bridges.
    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }

    /// The process, by name.
    pub(super) fn daemon(&self) -> String {
        format!("vswitchd-{}", self.site)
    }

    fn command(&self, program: &str) -> Command {
        self.with_directories(self.namespace.command(program))
    }

    fn with_directories(&self, mut command: Command) -> Command {
        command.env("OVS_RUNDIR", &self.directory).env("OVS_LOGDIR", &self.directory);
        command.env("OVS_DBDIR", &self.directory).env("OVS_SYSCONFDIR", &self.directory);
        command
    }

    /// The daemon to start. Its own name makes that of its control socket, so the one with DPDK gets the usual name, as Debian's
    /// `update-alternatives` would give it.
    fn program(&self) -> anyhow::Result<String> {
        const NAME: &str = "ovs-vswitchd";
        if self.datapath == Datapath::Cable {
            return Ok(NAME.to_owned());
        }
        let link = self.directory.join(NAME);
        if !link.exists() {
            std::os::unix::fs::symlink(DPDK_DAEMON, &link)?;
        }
        Ok(link.display().to_string())
    }

    fn start_daemon(&self, processes: &mut Processes) -> anyhow::Result<()> {
        let program = self.program()?;
        let daemon = match self.datapath {
            Datapath::Cable => self.namespace.hardware(&program),
            // It polls, and would leave the processor to nobody.
            Datapath::VhostUser => self.namespace.command(&program),
        };
        let mut daemon = self.with_directories(daemon);
        daemon.arg(format!("unix:{}", self.database().display()));
        daemon.arg("--pidfile");
        processes.spawn(&self.daemon(), daemon)?;
        self.until("ovs-vswitchd", || self.appctl(&["version"]).is_ok())
    }

    /// Kills the daemon and starts it again, as an upgrade or a crash does. Its bridges' interfaces are new ones, so they get their
    /// addresses again, as the system's own scripts would see to.
    ///
    /// # Errors
    /// In words of the tool that failed.
    pub(super) fn restart_daemon(&self, processes: &mut Processes) -> anyhow::Result<()> {
        processes.kill(&self.daemon())?;
        let _ = std::fs::remove_file(self.directory.join("ovs-vswitchd.pid"));
        self.start_daemon(processes)?;
        self.address()
    }

    /// Gives the bridge towards the others its address and tells it who they are.
    fn address(&self) -> anyhow::Result<()> {
        let bridge = format!("/sys/class/net/{UNDERLAY_BRIDGE}");
        self.until(UNDERLAY_BRIDGE, || self.namespace.run("test", &["-e", &bridge]).is_ok())?;
        let own = format!("{}/24", underlay::tunnel_address(self.site));
        self.namespace.ip(&["address", "replace", &own, "dev", UNDERLAY_BRIDGE])?;
        self.namespace.ip(&["link", "set", UNDERLAY_BRIDGE, "up"])?;
        for peer in (1..=self.sites).filter(|peer| *peer != self.site) {
            let address = underlay::tunnel_address(peer).to_string();
            let mac = underlay::tunnel_mac(peer);
            let neighbour = ["neighbour", "replace", &address, "lladdr", &mac, "dev", UNDERLAY_BRIDGE];
            self.namespace.ip(&[&neighbour[..], &["nud", "permanent"]].concat())?;
            self.appctl(&["tnl/arp/set", UNDERLAY_BRIDGE, &address, &mac])?;
        }
        Ok(())
    }

    /// Configures through the database.
    ///
    /// # Errors
    /// In words of `ovs-vsctl`.
    pub(super) fn vsctl(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let database = format!("--db=unix:{}", self.database().display());
        self.output("ovs-vsctl", &[&[database.as_str(), "--timeout=20"], arguments].concat())
    }

    fn appctl(&self, arguments: &[&str]) -> anyhow::Result<String> {
        self.output("ovs-appctl", &[&["--timeout=5"], arguments].concat())
    }

    fn output(&self, program: &str, arguments: &[&str]) -> anyhow::Result<String> {
        let output = self.command(program).args(arguments).output().context(program.to_owned())?;
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        anyhow::ensure!(
            output.status.success(),
            "site {}: {program} {}: {said}",
            self.site,
            arguments.join(" ")
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    fn until(&self, what: &str, mut check: impl FnMut() -> bool) -> anyhow::Result<()> {
        const STEP: Duration = Duration::from_millis(20);
        let mut waited = Duration::ZERO;
        while !check() {
            anyhow::ensure!(
                waited < START_BOUND,
                "site {}: {what} does not come up within {} s",
                self.site,
                START_BOUND.as_secs()
            );
            std::thread::sleep(STEP);
            waited += STEP;
        }
        Ok(())
    }
}
