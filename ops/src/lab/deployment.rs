//! A deployment of Limosa in the namespaces: configuration files, and the processes of each site.

use std::fmt::Write as _;
use std::fs;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use flow::WorkerId;
use nix::sched::{CpuSet, sched_getaffinity};
use nix::unistd::Pid;
use reqwest::Method;
use serde_json::{Value, json};
use tokio::time::sleep;
use transfer::name::NodeName;

use super::api::{AGENT, Api, PLACEMENT};
use super::ovs::{Datapath, Ovs};
use super::processes::Processes;
use super::underlay::{self, Far, Underlay, far_servers, worker_device, worker_port};
use super::wan::WanStats;
use crate::certs;
use crate::config::control_path;
use crate::demo::DemoSite;
use crate::demo::hooked::{HookWorkers, Thresholds};

/// The cluster's name.
const CLUSTER: &str = "lab";
/// Workers of each site at the start.
pub(super) const WORKERS: u16 = 2;
/// Workers that each switch has ports for.
pub(super) const WORKER_PORTS: u16 = 3;
/// Packets that each worker may hold; every one is a buffer of full length.
const HOLD_PACKETS: usize = 4_096;
/// Frames that the kernel keeps for each worker: what comes in two seconds, in which a busy machine may not let it run.
const RING_FRAMES: usize = 4_096;
/// Flows that each worker has room for.
const FLOWS: usize = 1 << 16;
/// How long a part may take to come up on a busy machine.
const START_BOUND: Duration = Duration::from_secs(40);
/// The WAN emulator, by name.
const WAN: &str = "wan";
/// The WAN may be so late before it is said.
const WAN_LATE_MAX_US: u64 = 20_000;

/// The running deployment.
pub(super) struct Deployment {
    pub(super) sites: Vec<DemoSite>,
    pub(super) underlay: Underlay,
    pub(super) processes: Processes,
    ovs: Vec<Ovs>,
    apis: Vec<Api>,
    datapath: Datapath,
    directory: PathBuf,
    binary: PathBuf,
    /// Those that the lab may use; at least one.
    processors: Vec<usize>,
    /// Workers that an agent has started; they end with this.
    _hooked: HookWorkers,
}

/// When the agent of the last site starts and stops workers. What the clients send keeps a worker busy for some per cent of its
/// time.
const ELASTIC: Thresholds = Thresholds { busy_high: 0.02, busy_low: 0.012, hold_s: 3, pause_s: 8 };

/// The processors that this process may run on.
fn processors() -> anyhow::Result<Vec<usize>> {
    let allowed = sched_getaffinity(Pid::from_raw(0))?;
    Ok((0..CpuSet::count()).filter(|number| allowed.is_set(*number).unwrap_or(false)).collect())
}

/// The agent of a site, by name.
pub(super) fn agent(site: u8) -> String {
    format!("agent-{site}")
}

/// A placement node, by name.
pub(super) fn placement(id: u8) -> String {
    format!("placement-{id}")
}

/// A worker, by name.
pub(super) fn worker(site: u8, worker: u16) -> String {
    format!("worker-{site}-{worker}")
}

impl Deployment {
    /// Namespaces and cables, the WAN, Open vSwitch; then everything of Limosa, until all agents report.
    ///
    /// # Errors
    /// What failed, in plain words.
    pub(super) async fn start(
        sites: Vec<DemoSite>,
        loss: f64,
        directory: PathBuf,
        mut processes: Processes,
    ) -> anyhow::Result<Self> {
        let count = u8::try_from(sites.len())?;
        let datapath = Datapath::wanted()?;
        let underlay = Underlay::build(count, WORKER_PORTS)?;
        let binary = std::env::current_exe()?;
        let network = underlay::network(&sites, directory.join("wan.json"), loss)?;
        fs::write(directory.join("wan.toml"), toml::to_string(&network)?)?;
        let mut wan = underlay.wan.hardware(&binary.display().to_string());
        wan.args(["lab", "wan", "--config"]).arg(directory.join("wan.toml"));
        processes.spawn(WAN, wan)?;
        let mut ovs = Vec::new();
        for site in 1..=count {
            let own = directory.join(format!("s{site}"));
            fs::create_dir_all(&own)?;
            ovs.push(Ovs::start(
                site,
                count,
                underlay.site(site),
                own.join("ovs"),
                datapath,
                &mut processes,
            )?);
        }
        let apis = underlay.sites.iter().map(Api::start).collect::<anyhow::Result<Vec<_>>>()?;
        let processors = processors()?;
        let _hooked = HookWorkers::new(&directory, &binary)?;
        let mut own =
            Self { sites, underlay, processes, ovs, apis, datapath, directory, binary, processors, _hooked };
        own.configure()?;
        own.start_limosa().await?;
        Ok(own)
    }

    /// The sites' numbers.
    pub(super) fn numbers(&self) -> impl Iterator<Item = u8> + use<> {
        1..=u8::try_from(self.sites.len()).unwrap_or(u8::MAX)
    }

    /// Servers that are at no site.
    pub(super) fn far(&self) -> impl Iterator<Item = Far> + use<> {
        far_servers(u8::try_from(self.sites.len()).unwrap_or(u8::MAX))
    }

    /// Whether the site's agent starts and stops workers: the last of three, where load comes and goes.
    pub(super) fn is_elastic(&self, site: u8) -> bool {
        site == 3 && self.sites.len() == 3
    }

    /// How many workers serve at a site, by its agent.
    pub(super) async fn worker_count(&self, site: u8) -> usize {
        let text = self.agent_page(site, "/v1/workers").await.unwrap_or_default();
        let page: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
        let is_there = |worker: &&serde_json::Value| worker["state"] != "starting";
        page["workers"].as_array().map_or(0, |workers| workers.iter().filter(is_there).count())
    }

    /// A site's name.
    pub(super) fn name(&self, site: u8) -> String {
        self.sites[usize::from(site) - 1].name.clone()
    }

    /// A site's number.
    pub(super) fn number(&self, name: &str) -> Option<u8> {
        self.numbers().find(|site| self.name(*site) == name)
    }

    // ---- configuration ------------------------------------------------------------------------------------

    fn configure(&self) -> anyhow::Result<()> {
        let names = self.sites.iter().map(|site| NodeName::site(CLUSTER, &site.name));
        let nodes: Vec<_> =
            names.chain(self.numbers().map(|id| NodeName::placement(CLUSTER, id.into()))).collect();
        certs::write(&self.directory.join("certs"), &nodes)?;
        for site in self.numbers() {
            self.write(&placement(site), &self.placement_config(site)?)?;
            self.write(&agent(site), &self.agent_config(site)?)?;
            for number in 1..=WORKER_PORTS {
                self.write(&worker(site, number), &self.worker_config(site, number))?;
            }
        }
        Ok(())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.join(format!("{name}.toml"))
    }

    fn write(&self, name: &str, text: &str) -> anyhow::Result<()> {
        let path = self.path(name);
        fs::write(&path, text).with_context(|| path.display().to_string())
    }

    fn tls(node: &NodeName) -> String {
        let stem = certs::file_stem(node);
        format!(
            "tls = {{ certificate = \"certs/{stem}.pem\", key = \"certs/{stem}.key\", authority = \
             \"certs/authority.pem\" }}\n"
        )
    }

    fn placement_config(&self, id: u8) -> anyhow::Result<String> {
        let listen = underlay::control_address(id);
        let mut text = format!(
            "cluster = {CLUSTER:?}\nid = {id}\nlisten = \"{listen}:4001\"\napi = {PLACEMENT:?}\n\
             directory = \"placement-{id}.d\"\n"
        );
        text += &Self::tls(&NodeName::placement(CLUSTER, id.into()));
        for peer in self.numbers().filter(|peer| *peer != id) {
            let address = underlay::control_address(peer);
            write!(text, "\n[[peers]]\nid = {peer}\naddress = \"{address}:4001\"\n")?;
        }
        Ok(text)
    }

    fn agent_config(&self, site: u8) -> anyhow::Result<String> {
        let (name, listen) = (self.name(site), underlay::control_address(site));
        let expected: Vec<_> = (1..=WORKERS).collect();
        let ports: Vec<_> = (1..=WORKER_PORTS).collect();
        let mut text = format!(
            "cluster = {CLUSTER:?}\nsite = {site}\nname = {name:?}\nlisten = \"{listen}:4101\"\n\
             metrics = {AGENT:?}\nswitch = \"unix:s{site}/ovs/limosa.mgmt\"\n\
             workers.directory = \"s{site}\"\nworkers.expected = {expected:?}\nworkers.ports = {ports:?}\n"
        );
        if self.is_elastic(site) {
            text += &ELASTIC.table(&self.directory, WORKERS, WORKER_PORTS);
        }
        text += &Self::tls(&NodeName::site(CLUSTER, &name));
        // The node at this site first: it answers watches without crossing the WAN.
        let ids = std::iter::once(site).chain(self.numbers().filter(|id| *id != site));
        for id in ids {
            let address = underlay::control_address(id);
            write!(text, "\n[[placement]]\nid = {id}\naddress = \"{address}:4001\"\n")?;
        }
        for peer in self.numbers().filter(|peer| *peer != site) {
            let (name, address) = (self.name(peer), underlay::control_address(peer));
            write!(text, "\n[[peers]]\nsite = {peer}\nname = {name:?}\naddress = \"{address}:4101\"\n")?;
        }
        let ovs = &self.ovs[usize::from(site) - 1];
        write!(
            text,
            "\n[openvswitch]\nbridge = \"limosa\"\ndatabase = {:?}\ncontrol = {:?}\n\
             inside = {{ name = \"in0\" }}\noutside = {{ name = \"out0\" }}\nworkers = [\n",
            ovs.database(),
            ovs.directory()
        )?;
        for number in 1..=WORKER_PORTS {
            let port = match self.datapath {
                Datapath::Cable => format!("name = {:?}", worker_port(number)),
                Datapath::VhostUser => format!(
                    "name = \"vhost{number}\", type = \"dpdkvhostuserclient\", options = {{ vhost-server-path = {:?} }}",
                    self.vhost_socket(site, number)
                ),
            };
            writeln!(text, "  {{ worker = {number}, {port} }},")?;
        }
        write!(text, "]\ntunnels = {{ mode = \"flow-based\", remotes = [\n")?;
        for peer in self.numbers().filter(|peer| *peer != site) {
            let address = underlay::tunnel_address(peer);
            writeln!(text, "  {{ site = {peer}, address = \"{address}\" }},")?;
        }
        // No other servers: to those that are near a site the way out takes no time, whichever site it leaves.
        let networks: Vec<_> = self.far().map(|far| far.network).collect();
        write!(text, "] }}\n\n[probe]\nenabled = true\nnetworks = {networks:?}\n")?;
        Ok(text)
    }

    fn vhost_socket(&self, site: u8, worker: u16) -> PathBuf {
        self.directory.join(format!("s{site}")).join(format!("worker-{worker}.vhost"))
    }

    fn worker_config(&self, site: u8, number: u16) -> String {
        let device = match self.datapath {
            Datapath::Cable => {
                format!("net_af_packet0,iface={},framecnt={RING_FRAMES}", worker_device(number))
            }
            Datapath::VhostUser => {
                format!(
                    "net_virtio_user0,path={},server=1,queues=1",
                    self.vhost_socket(site, number).display()
                )
            }
        };
        format!(
            "site = {site}\nworker = {number}\ndirectory = \"s{site}\"\nflows = {FLOWS}\n\
             hold_packets = {HOLD_PACKETS}\n\n[dpdk]\ndevice = {device:?}\nhuge_pages = false\n\
             idle = \"backoff\"\nlcore = {}\n",
            self.lcore(site, number)
        )
    }

    /// Workers take turns over the processors that there are.
    fn lcore(&self, site: u8, worker: u16) -> usize {
        let turn = usize::from(site - 1) * usize::from(WORKERS) + usize::from(worker - 1);
        self.processors[turn % self.processors.len()]
    }

    // ---- processes ----------------------------------------------------------------------------------------

    async fn start_limosa(&mut self) -> anyhow::Result<()> {
        for site in self.numbers() {
            let config = self.path(&agent(site)).display().to_string();
            let binary = self.binary.display().to_string();
            self.underlay
                .site(site)
                .run(&binary, &["switch", "setup", "--config", &config])
                .with_context(|| format!("the bridge of site {site}"))?;
            self.start_placement(site)?;
            for number in 1..=WORKERS {
                self.start_worker(site, number)?;
            }
        }
        self.form_raft().await?;
        self.until_workers_listen().await?;
        for site in self.numbers() {
            self.start_agent(site)?;
        }
        self.declare().await?;
        self.until_workers_serve().await
    }

    fn start_process(&mut self, kind: &str, name: &str, site: u8) -> anyhow::Result<()> {
        let mut command = self.underlay.site(site).command(&self.binary);
        command.args(["run", kind, "--with-parent", "--config"]).arg(self.path(name));
        command.current_dir(&self.directory);
        self.processes.spawn(name, command)
    }

    /// Starts a site's agent, for the first time or again.
    pub(super) fn start_agent(&mut self, site: u8) -> anyhow::Result<()> {
        self.start_process("site", &agent(site), site)
    }

    /// Starts a placement node, for the first time or again.
    pub(super) fn start_placement(&mut self, id: u8) -> anyhow::Result<()> {
        self.start_process("placement", &placement(id), id)
    }

    /// Starts a worker, for the first time or again.
    pub(super) fn start_worker(&mut self, site: u8, number: u16) -> anyhow::Result<()> {
        self.start_process("worker", &worker(site, number), site)
    }

    /// An agent with hooks starts workers that are not there: on a slow machine it would be quicker than those that are coming.
    async fn until_workers_listen(&mut self) -> anyhow::Result<()> {
        Self::until("the workers listen", async || {
            let mut all = true;
            for site in self.numbers() {
                let directory = self.directory.join(format!("s{site}"));
                let listens =
                    |number: u16| UnixStream::connect(control_path(&directory, WorkerId(number))).is_ok();
                if !(1..=WORKERS).all(listens) {
                    all = false;
                    self.start_ended_workers(site);
                }
            }
            all
        })
        .await
    }

    async fn until_workers_serve(&mut self) -> anyhow::Result<()> {
        Self::until("the agents have their workers", async || {
            let mut all = true;
            for site in self.numbers() {
                if self.worker_count(site).await < usize::from(WORKERS) {
                    all = false;
                    self.start_ended_workers(site);
                }
            }
            all
        })
        .await
    }

    /// The driver numbers its fanout group by process and interface, and two workers of one namespace may meet in one number, of
    /// which the second ends. Another process has another.
    fn start_ended_workers(&mut self, site: u8) {
        let ended: Vec<_> =
            (1..=WORKERS).filter(|number| self.processes.has_ended(&worker(site, *number))).collect();
        // One that cannot be started is missed at the end of the wait.
        ended.into_iter().for_each(|number| drop(self.start_worker(site, number)));
    }

    /// Kills Open vSwitch of a site and starts it again.
    ///
    /// # Errors
    /// It does not come up.
    pub(super) fn restart_ovs(&mut self, site: u8) -> anyhow::Result<()> {
        self.ovs[usize::from(site) - 1].restart_daemon(&mut self.processes)
    }

    async fn form_raft(&self) -> anyhow::Result<()> {
        let member = |id: u8| (id.to_string(), format!("{}:4001", underlay::control_address(id)));
        let members: std::collections::BTreeMap<_, _> = self.numbers().map(member).collect();
        let body = json!({ "members": members });
        Self::until("the placement nodes answer", async || {
            self.post("/v1/raft/initialize", &body).await.is_ok()
        })
        .await?;
        Self::until("the placement nodes elected a leader", async || {
            let mut ready = 0;
            for api in &self.apis {
                ready += usize::from(api.get(PLACEMENT, "/readyz").await.is_ok_and(|a| a.status == 200));
            }
            ready == self.apis.len()
        })
        .await
    }

    /// Adds sites, service and policy, as an operator would.
    async fn declare(&self) -> anyhow::Result<()> {
        let policy =
            json!({ "automatic": false, "min_dwell_s": 2, "moves_in_flight_max": 8, "min_gain_ms": 5 });
        self.set_policy(policy).await?;
        for (id, site) in (1_u8..).zip(&self.sites) {
            let body = json!({
                "id": id, "endpoint": format!("{}:4101", underlay::control_address(id)), "capacity_pps": 200_000,
                "latitude": site.latitude, "longitude": site.longitude,
            });
            self.put(&format!("/v1/sites/{}", site.name), &body, None).await?;
        }
        Self::until("the sites report", async || {
            let sites = self.get("/v1/sites").await.unwrap_or_default();
            sites["sites"].as_array().is_some_and(|all| all.iter().all(|site| site["alive"] == true))
        })
        .await?;
        let service = json!({ "id": 1, "group_len": 24, "nat": underlay::nat()? });
        self.put("/v1/services/cgn", &service, None).await?;
        self.until_ready().await
    }

    /// Replaces parts of the policy.
    ///
    /// # Errors
    /// The API refuses.
    pub(super) async fn set_policy(&self, change: Value) -> anyhow::Result<()> {
        let known: Value = self.get("/v1/policy").await?;
        let tag = self.apis[0].get(PLACEMENT, "/v1/policy").await?.etag;
        let mut policy = known;
        if let (Some(policy), Some(change)) = (policy.as_object_mut(), change.as_object()) {
            for (key, value) in change.iter().filter(|(key, _)| policy.contains_key(*key)).collect::<Vec<_>>()
            {
                policy.insert(key.clone(), value.clone());
            }
        }
        self.put("/v1/policy", &policy, tag).await.map(drop)
    }

    /// Waits until every agent is ready.
    ///
    /// # Errors
    /// That takes too long.
    pub(super) async fn until_ready(&self) -> anyhow::Result<()> {
        Self::until("the agents are ready", async || {
            let mut ready = 0;
            for api in &self.apis {
                ready += usize::from(api.get(AGENT, "/readyz").await.is_ok_and(|a| a.status == 200));
            }
            ready == self.apis.len()
        })
        .await
    }

    async fn until(what: &str, mut check: impl AsyncFnMut() -> bool) -> anyhow::Result<()> {
        let ends = tokio::time::Instant::now() + START_BOUND;
        while !check().await {
            let late = tokio::time::Instant::now() > ends;
            anyhow::ensure!(!late, "{what}: not within {} s", START_BOUND.as_secs());
            sleep(Duration::from_millis(50)).await;
        }
        Ok(())
    }

    // ---- questions ----------------------------------------------------------------------------------------

    /// GET from any placement node.
    ///
    /// # Errors
    /// The last failure.
    pub(super) async fn get(&self, path: &str) -> anyhow::Result<Value> {
        self.any(Method::GET, path, None, None).await
    }

    /// POST to any placement node.
    ///
    /// # Errors
    /// The last failure.
    pub(super) async fn post(&self, path: &str, body: &Value) -> anyhow::Result<Value> {
        self.any(Method::POST, path, Some(body), None).await
    }

    async fn put(&self, path: &str, body: &Value, if_match: Option<String>) -> anyhow::Result<Value> {
        self.any(Method::PUT, path, Some(body), if_match).await
    }

    async fn any(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
        if_match: Option<String>,
    ) -> anyhow::Result<Value> {
        let mut last = anyhow::anyhow!("there is no placement node");
        for api in &self.apis {
            match api.ask(method.clone(), PLACEMENT, path, body.cloned(), if_match.clone()).await {
                Ok(answer) if answer.status < 300 => {
                    return Ok(serde_json::from_str(&answer.text).unwrap_or(Value::Null));
                }
                Ok(answer) => last = anyhow::anyhow!("{path}: {}: {}", answer.status, answer.text),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// A page of a site's agent.
    ///
    /// # Errors
    /// It does not answer.
    pub(super) async fn agent_page(&self, site: u8, path: &str) -> anyhow::Result<String> {
        Ok(self.apis[usize::from(site) - 1].get(AGENT, path).await?.text)
    }

    /// The placement node that leads.
    pub(super) async fn leader(&self) -> Option<u8> {
        let status = self.get("/v1/raft").await.ok()?;
        u8::try_from(status.get("leader")?.as_u64()?).ok()
    }

    /// Where packets were dropped so far, in words: by workers and by the WAN. And whether that was late.
    pub(super) async fn drops(&self) -> Vec<String> {
        let mut drops = Vec::new();
        for site in self.numbers() {
            let text = self.agent_page(site, "/metrics").await.unwrap_or_default();
            let is_drop = |line: &&str| line.starts_with("limosa_worker_packets") && line.contains("drop");
            let lines = text.lines().filter(is_drop).filter(|line| !line.ends_with(" 0"));
            drops.extend(lines.map(|line| format!("{}: {line}", self.name(site))));
        }
        let wan = self.wan();
        if wan.late_us_max > WAN_LATE_MAX_US {
            drops.push(format!(
                "the WAN had no processor: packets left up to {} ms late",
                wan.late_us_max / 1_000
            ));
        }
        let lost = wan.lines.into_iter().filter(|line| line.dropped > 0);
        drops.extend(lost.map(|line| format!("WAN {} to {}: {}", line.from, line.to, line.dropped)));
        drops
    }

    /// Counters of the WAN, half a second old at most.
    fn wan(&self) -> WanStats {
        let text = fs::read_to_string(self.directory.join("wan.json")).unwrap_or_default();
        serde_json::from_str(&text).unwrap_or_default()
    }
}
