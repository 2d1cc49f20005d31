//! A whole deployment as child processes on this machine: certificates, configuration files, a WAN emulator between the sites,
//! and one process per placement node, switch, agent and worker.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::Context;
use flow::{SiteId, WorkerId};
use transfer::name::NodeName;

use super::hooked::{HookWorkers, Thresholds};
use super::proxy::Proxy;
use super::sites::DemoSite;
use super::wan::{LinkSpec, Wan, great_circle_delay};
use crate::certs;

/// The cluster's name.
const CLUSTER: &str = "demo";
/// Uniform jitter on top of the delay of each link between sites. It must stay below what a detour over
/// the third site adds: what the old owner sent to a client may otherwise be overtaken by what the new one sends.
const JITTER: Duration = Duration::from_millis(2);
/// 1 Gbit/s between any two sites, with room for a tenth of a second.
const RATE_BYTES_PER_S: u64 = 125_000_000;
/// Workers that each switch has ports for.
pub const WORKER_PORTS: u16 = 4;
/// How long a part may take to come up on a busy machine.
const START_BOUND: Duration = Duration::from_secs(120);

/// A child process, by what it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Part {
    /// A placement node, by number.
    Placement(u64),
    /// A site's switch.
    Switch(SiteId),
    /// A site's agent.
    Agent(SiteId),
    /// A worker.
    Worker(SiteId, WorkerId),
}

impl std::fmt::Display for Part {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Placement(id) => write!(f, "placement-{id}"),
            Self::Switch(site) => write!(f, "switch-{site}"),
            Self::Agent(site) => write!(f, "site-{site}"),
            Self::Worker(site, worker) => write!(f, "worker-{site}-{worker}"),
        }
    }
}

impl Part {
    fn process(self) -> &'static str {
        match self {
            Self::Placement(_) => "placement",
            Self::Switch(_) => "switch",
            Self::Agent(_) => "site",
            Self::Worker(..) => "worker",
        }
    }
}

/// How a cluster is laid out.
#[derive(Clone, Debug)]
pub struct Layout {
    /// The sites; their numbers are their places, from 1.
    pub sites: Vec<DemoSite>,
    /// Workers of each site at the start.
    pub workers: u16,
    /// Flows that each worker has room for.
    pub flows: usize,
    /// Where configuration, sockets, logs and state go; a short path, since socket paths end at 107 bytes.
    pub directory: PathBuf,
    /// The `limosa` binary.
    pub binary: PathBuf,
    /// When agents start and stop workers beyond those, if they are to.
    pub elastic: Option<Thresholds>,
    /// How long old owners relay for an ingress that has not flipped (`moves.relay_late_ms`), if not as by default.
    pub relay_late: Option<Duration>,
}

/// The running deployment. Dropping it ends every child.
pub struct Cluster {
    layout: Layout,
    children: BTreeMap<Part, Child>,
    apis: BTreeMap<u64, SocketAddr>,
    metrics: BTreeMap<SiteId, SocketAddr>,
    quic: BTreeMap<u64, SocketAddr>,
    proxies: BTreeMap<SiteId, Proxy>,
    /// Workers that agents have started.
    hooked: Option<HookWorkers>,
    wan: Wan,
    /// What each link of the emulator joins, in its order.
    joined: Vec<(Part, Part)>,
    http: reqwest::Client,
}

/// Addresses that were free a moment ago.
struct Addresses {
    quic_placement: BTreeMap<u64, SocketAddr>,
    quic_site: BTreeMap<SiteId, SocketAddr>,
    tunnel: BTreeMap<(SiteId, SiteId), SocketAddr>,
    api: BTreeMap<u64, SocketAddr>,
    metrics: BTreeMap<SiteId, SocketAddr>,
}

impl Cluster {
    /// Writes everything and starts the children: placement first, then switches and workers, then agents. Returns when each
    /// agent is ready.
    ///
    /// # Errors
    /// What failed, with the log of the part at fault named.
    pub async fn start(layout: Layout) -> anyhow::Result<Self> {
        fs::create_dir_all(layout.directory.join("logs"))?;
        let mut nodes: Vec<_> = layout.sites.iter().map(|site| NodeName::site(CLUSTER, &site.name)).collect();
        nodes.extend(layout.node_ids().map(|id| NodeName::placement(CLUSTER, id)));
        certs::write(&layout.directory.join("certs"), &nodes)?;
        let elastic = layout.elastic.is_some();
        let hooked = elastic.then(|| HookWorkers::new(&layout.directory, &layout.binary)).transpose()?;
        let mut ports = PortPool::default();
        let addresses = layout.addresses(&mut ports)?;
        let mut plan = WanPlan::new(&layout, &mut ports);
        layout.write_configs(&addresses, &mut plan)?;
        let WanPlan { links, joined, .. } = plan;
        drop(ports);
        let wan = Wan::start(links).context("the WAN emulator cannot start")?;
        let mut cluster = Self {
            proxies: BTreeMap::new(),
            hooked,
            children: BTreeMap::new(),
            apis: addresses.api,
            metrics: addresses.metrics,
            quic: addresses.quic_placement,
            wan,
            joined,
            http: reqwest::Client::builder().timeout(Duration::from_secs(10)).build()?,
            layout,
        };
        cluster.start_children().await?;
        Ok(cluster)
    }

    async fn start_children(&mut self) -> anyhow::Result<()> {
        for id in self.layout.node_ids().collect::<Vec<_>>() {
            self.spawn(Part::Placement(id))?;
        }
        for site in self.layout.site_ids().collect::<Vec<_>>() {
            self.spawn(Part::Switch(site))?;
            let directory = self.layout.site_directory(site);
            let proxy = Proxy::start(&directory.join("switch.proxy"), directory.join("switch.control"))?;
            self.proxies.insert(site, proxy);
            for worker in 1..=self.layout.workers {
                self.spawn(Part::Worker(site, WorkerId(worker)))?;
            }
        }
        self.form_raft().await?;
        for site in self.layout.site_ids().collect::<Vec<_>>() {
            self.spawn(Part::Agent(site))?;
        }
        Ok(())
    }

    /// Makes the three nodes one Raft group.
    async fn form_raft(&self) -> anyhow::Result<()> {
        let members: BTreeMap<_, _> =
            self.quic.iter().map(|(id, address)| (id.to_string(), address.to_string())).collect();
        let body = serde_json::json!({ "members": members });
        self.until("the placement nodes answer", async || {
            self.post("/v1/raft/initialize", &body).await.is_ok()
        })
        .await?;
        self.until("the placement nodes elected a leader", async || {
            let mut known = 0;
            for api in self.apis.values() {
                known += usize::from(self.status(*api, "/readyz").await.is_some_and(|code| code == 200));
            }
            known == self.apis.len()
        })
        .await
    }

    /// Waits until each agent follows all that placement has decided by now, and its workers and switch follow it.
    ///
    /// # Errors
    /// When that takes too long.
    pub async fn until_ready(&self) -> anyhow::Result<()> {
        let revision = self.revision().await;
        self.until("the agents follow the placement", async || {
            let mut following = 0;
            for &site in self.metrics.keys() {
                let text = self.site_text(site, "/metrics").await.unwrap_or_default();
                let followed = text.lines().find_map(|line| {
                    line.strip_prefix("limosa_config_revision{")?.rsplit(' ').next()?.parse::<u64>().ok()
                });
                following += usize::from(followed.is_some_and(|followed| followed >= revision));
            }
            following == self.metrics.len()
        })
        .await?;
        self.until("the agents are ready", async || {
            let mut ready = 0;
            for address in self.metrics.values() {
                ready += usize::from(self.status(*address, "/readyz").await == Some(200));
            }
            ready == self.metrics.len()
        })
        .await
    }

    /// The newest revision that any placement node has.
    async fn revision(&self) -> u64 {
        let mut newest = 0;
        for api in self.apis.values() {
            let Ok(answer) = self.http.get(format!("http://{api}/v1/raft")).send().await else { continue };
            let status = answer.json::<serde_json::Value>().await.unwrap_or_default();
            newest = newest.max(status["revision"].as_u64().unwrap_or(0));
        }
        newest
    }

    async fn until(&self, what: &str, mut check: impl AsyncFnMut() -> bool) -> anyhow::Result<()> {
        let ends = tokio::time::Instant::now() + START_BOUND;
        while !check().await {
            let late = tokio::time::Instant::now() > ends;
            let logs = self.layout.directory.join("logs");
            anyhow::ensure!(!late, "{what}: not within {} s; see {}", START_BOUND.as_secs(), logs.display());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok(())
    }

    /// Starts a part, for the first time or again.
    ///
    /// # Errors
    /// When the process cannot be started.
    pub fn spawn(&mut self, part: Part) -> anyhow::Result<()> {
        let log = self.layout.directory.join("logs").join(format!("{part}.log"));
        let log = File::options().create(true).append(true).open(log)?;
        let child = Command::new(&self.layout.binary)
            .args(["run", part.process(), "--with-parent", "--config"])
            .arg(self.layout.config_path(part))
            .stdin(Stdio::piped())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("{part} cannot be started"))?;
        self.children.insert(part, child);
        Ok(())
    }

    /// Gives the agent of a site other thresholds, and starts it again with them.
    ///
    /// # Errors
    /// The site's agents start and stop no workers, or the process cannot be started.
    pub fn set_thresholds(&mut self, site: SiteId, thresholds: Thresholds) -> anyhow::Result<()> {
        let part = Part::Agent(site);
        let path = self.layout.config_path(part);
        let table = thresholds.table(&self.layout.directory, self.layout.workers, WORKER_PORTS);
        let mut text = String::new();
        let mut found = false;
        for line in fs::read_to_string(&path)?.lines() {
            let is_it = line.starts_with("workers.elastic = ");
            found |= is_it;
            if is_it {
                text += &table;
            } else {
                text += line;
                text.push('\n');
            }
        }
        anyhow::ensure!(found, "the agent of site {site} starts and stops no workers");
        fs::write(&path, text)?;
        self.kill(part)?;
        self.spawn(part)
    }

    /// Ends a part with SIGKILL.
    ///
    /// # Errors
    /// When it is not running.
    pub fn kill(&mut self, part: Part) -> anyhow::Result<()> {
        let mut child = self.children.remove(&part).with_context(|| format!("{part} is not running"))?;
        child.kill()?;
        child.wait()?;
        Ok(())
    }

    /// The process of a part, if it runs, whoever started it.
    #[must_use]
    pub fn process_id(&self, part: Part) -> Option<u32> {
        self.children.get(&part).map(Child::id).or_else(|| self.hooked_process_id(part))
    }

    /// The process of a worker that its agent had started.
    #[must_use]
    pub fn hooked_process_id(&self, part: Part) -> Option<u32> {
        self.hooked.as_ref()?.process_id(&part.to_string())
    }

    /// Parts that have ended by themselves since the last look, which none should.
    pub fn ended(&mut self) -> Vec<Part> {
        let ended: Vec<_> = self
            .children
            .iter_mut()
            .filter_map(|(part, child)| matches!(child.try_wait(), Ok(Some(_))).then_some(*part))
            .collect();
        for part in &ended {
            self.children.remove(part);
        }
        ended
    }

    /// Takes the controller connection of a site's switch away for a while.
    pub async fn cut_controller(&self, site: SiteId, time: Duration) {
        if let Some(proxy) = self.proxies.get(&site) {
            proxy.cut_for(time).await;
        }
    }

    /// The same, for whoever does not want to keep the deployment meanwhile.
    pub fn controller_cut(&self, site: SiteId, time: Duration) -> impl Future<Output = ()> + Send + use<> {
        let proxy = self.proxies.get(&site).cloned();
        async move {
            if let Some(proxy) = proxy {
                proxy.cut_for(time).await;
            }
        }
    }

    /// The emulator between the sites.
    #[must_use]
    pub fn wan(&self) -> &Wan {
        &self.wan
    }

    /// The emulator's links between two parts, both ways: of two switches their tunnel, of agents and placement nodes what they tell
    /// one another. Parts of one place reach one another without it.
    #[must_use]
    pub fn links(&self, a: Part, b: Part) -> Vec<usize> {
        let is_wanted = |joined: &(Part, Part)| *joined == (a, b) || *joined == (b, a);
        self.joined.iter().enumerate().filter(|(_, joined)| is_wanted(joined)).map(|(at, _)| at).collect()
    }

    /// How it is laid out.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Where the config API of each placement node listens.
    #[must_use]
    pub fn apis(&self) -> Vec<String> {
        self.apis.values().map(|address| format!("http://{address}")).collect()
    }

    /// Where each agent's metrics are.
    #[must_use]
    pub fn metrics(&self) -> &BTreeMap<SiteId, SocketAddr> {
        &self.metrics
    }

    async fn status(&self, address: SocketAddr, path: &str) -> Option<u16> {
        Some(self.http.get(format!("http://{address}{path}")).send().await.ok()?.status().as_u16())
    }

    /// GET from any placement node that answers.
    ///
    /// # Errors
    /// The last failure, when none does.
    pub async fn get(&self, path: &str) -> anyhow::Result<serde_json::Value> {
        self.any(async |api| Ok(self.http.get(format!("http://{api}{path}")).send().await?)).await
    }

    /// POST to any placement node that takes it.
    ///
    /// # Errors
    /// The last failure, when none does.
    pub async fn post(&self, path: &str, body: &serde_json::Value) -> anyhow::Result<serde_json::Value> {
        self.any(async |api| Ok(self.http.post(format!("http://{api}{path}")).json(body).send().await?)).await
    }

    /// PUT, with `If-Match` where a revision is given.
    ///
    /// # Errors
    /// The last failure, when no node takes it.
    pub async fn put(
        &self,
        path: &str,
        body: &serde_json::Value,
        if_match: Option<&str>,
    ) -> anyhow::Result<serde_json::Value> {
        self.any(async |api| {
            let mut request = self.http.put(format!("http://{api}{path}")).json(body);
            if let Some(revision) = if_match {
                request = request.header("If-Match", revision);
            }
            Ok(request.send().await?)
        })
        .await
    }

    /// The `ETag` of a resource.
    ///
    /// # Errors
    /// When no node answers.
    pub async fn etag(&self, path: &str) -> anyhow::Result<String> {
        for api in self.apis.values() {
            let Ok(answer) = self.http.get(format!("http://{api}{path}")).send().await else { continue };
            if let Some(tag) = answer.headers().get("etag").and_then(|tag| tag.to_str().ok()) {
                return Ok(tag.to_owned());
            }
        }
        anyhow::bail!("{path}: no placement node gave an ETag")
    }

    async fn any(
        &self,
        request: impl AsyncFn(SocketAddr) -> anyhow::Result<reqwest::Response>,
    ) -> anyhow::Result<serde_json::Value> {
        let mut last = anyhow::anyhow!("there is no placement node");
        for &api in self.apis.values() {
            match request(api).await {
                Ok(answer) => {
                    let status = answer.status();
                    let text = answer.text().await.unwrap_or_default();
                    if status.is_success() {
                        return Ok(serde_json::from_str(&text).unwrap_or(serde_json::Value::Null));
                    }
                    last = anyhow::anyhow!("{status}: {text}");
                }
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// The text of an agent's page, for example `/metrics`.
    ///
    /// # Errors
    /// When the agent does not answer.
    pub async fn site_text(&self, site: SiteId, path: &str) -> anyhow::Result<String> {
        let address = self.metrics.get(&site).context("there is no such site")?;
        Ok(self.http.get(format!("http://{address}{path}")).send().await?.text().await?)
    }

    /// Workers of a site that answer, as its agent says; 0 while it does not.
    pub async fn worker_count(&self, site: SiteId) -> usize {
        let text = self.site_text(site, "/v1/workers").await.unwrap_or_default();
        let page: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
        let is_there = |worker: &&serde_json::Value| worker["state"] != "starting";
        page["workers"].as_array().map_or(0, |workers| workers.iter().filter(is_there).count())
    }

    /// Lines of the sites' metrics that are not 0.
    async fn counted(&self, wanted: impl Fn(&str) -> bool) -> Vec<String> {
        let mut found = Vec::new();
        for &site in self.metrics.keys() {
            let text = self.site_text(site, "/metrics").await.unwrap_or_default();
            let lines = text.lines().filter(|line| wanted(line) && !line.ends_with(" 0"));
            found.extend(lines.map(str::to_owned));
        }
        found
    }

    /// Holds that were opened before what they waited for had come: why packets may have lost their order.
    pub async fn opened_holds(&self) -> Vec<String> {
        self.counted(|line| line.starts_with("limosa_worker_holds_opened_early{")).await
    }

    /// Where packets were dropped so far, in words: by workers and by the emulated network.
    pub async fn drops(&self) -> Vec<String> {
        let mut drops =
            self.counted(|line| line.starts_with("limosa_worker_packets") && line.contains("dropped_")).await;
        let links = self.wan.stats().into_iter().enumerate().filter(|(_, link)| link.dropped > 0);
        drops.extend(links.map(|(at, link)| format!("network link {at}: {} dropped", link.dropped)));
        drops
    }

    /// The number of the placement node that leads.
    pub async fn leader(&self) -> Option<u64> {
        let status = self.get("/v1/raft").await.ok()?;
        status.get("leader")?.as_u64()
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for child in self.children.values_mut() {
            let _ = child.kill();
        }
        for child in self.children.values_mut() {
            let _ = child.wait();
        }
        // No agent is left that could start another.
        drop(self.hooked.take());
    }
}

/// Sockets that hold addresses until all are chosen, so that none is chosen twice.
#[derive(Default)]
struct PortPool {
    udp: Vec<UdpSocket>,
    tcp: Vec<TcpListener>,
}

impl PortPool {
    fn udp(&mut self) -> anyhow::Result<SocketAddr> {
        let socket = UdpSocket::bind("127.0.0.1:0")?;
        let address = socket.local_addr()?;
        self.udp.push(socket);
        Ok(address)
    }

    fn tcp(&mut self) -> anyhow::Result<SocketAddr> {
        let socket = TcpListener::bind("127.0.0.1:0")?;
        let address = socket.local_addr()?;
        self.tcp.push(socket);
        Ok(address)
    }
}

/// Links between the sites, made as the configuration files need them.
struct WanPlan<'a> {
    layout: &'a Layout,
    ports: &'a mut PortPool,
    links: Vec<LinkSpec>,
    /// From which part to which, of each link.
    joined: Vec<(Part, Part)>,
}

impl<'a> WanPlan<'a> {
    fn new(layout: &'a Layout, ports: &'a mut PortPool) -> Self {
        Self { layout, ports, links: Vec::new(), joined: Vec::new() }
    }

    /// Addresses by which two endpoints at two sites reach one another: where the first sends to reach the second, and the
    /// reverse. At one site they talk directly.
    fn join(
        &mut self,
        (part_a, a, at_a): (Part, SocketAddr, SiteId),
        (part_b, b, at_b): (Part, SocketAddr, SiteId),
    ) -> anyhow::Result<(SocketAddr, SocketAddr)> {
        if at_a == at_b {
            return Ok((b, a));
        }
        let (near_a, near_b) = (self.ports.udp()?, self.ports.udp()?);
        let delay = self.layout.delay(at_a, at_b);
        let link = |listen, from, to| LinkSpec {
            jitter: JITTER,
            rate_bytes_per_s: RATE_BYTES_PER_S,
            queue_bytes_max: RATE_BYTES_PER_S / 10,
            ..LinkSpec::new(listen, from, to, delay)
        };
        self.links.push(link(near_a, near_b, b));
        self.links.push(link(near_b, near_a, a));
        self.joined.extend([(part_a, part_b), (part_b, part_a)]);
        Ok((near_a, near_b))
    }
}

impl Layout {
    /// Numbers of the sites.
    pub fn site_ids(&self) -> impl Iterator<Item = SiteId> + use<> {
        (1..=u8::try_from(self.sites.len()).unwrap_or(u8::MAX)).map(SiteId)
    }

    /// Numbers of the placement nodes: one at each site.
    pub fn node_ids(&self) -> impl Iterator<Item = u64> + use<> {
        1..=self.sites.len() as u64
    }

    /// A site by number.
    #[must_use]
    pub fn site(&self, id: SiteId) -> &DemoSite {
        &self.sites[usize::from(id.0) - 1]
    }

    /// The directory of a site.
    #[must_use]
    pub fn site_directory(&self, site: SiteId) -> PathBuf {
        self.directory.join(format!("s{site}"))
    }

    /// One-way delay between two sites.
    #[must_use]
    pub fn delay(&self, a: SiteId, b: SiteId) -> Duration {
        let place = |site: SiteId| (self.site(site).latitude, self.site(site).longitude);
        great_circle_delay(place(a), place(b))
    }

    /// The configuration file of a process.
    #[must_use]
    pub fn config_path(&self, part: Part) -> PathBuf {
        self.directory.join(format!("{part}.toml"))
    }

    fn addresses(&self, ports: &mut PortPool) -> anyhow::Result<Addresses> {
        let mut addresses = Addresses {
            quic_placement: BTreeMap::new(),
            quic_site: BTreeMap::new(),
            tunnel: BTreeMap::new(),
            api: BTreeMap::new(),
            metrics: BTreeMap::new(),
        };
        for id in self.node_ids() {
            addresses.quic_placement.insert(id, ports.udp()?);
            addresses.api.insert(id, ports.tcp()?);
        }
        for site in self.site_ids() {
            addresses.quic_site.insert(site, ports.udp()?);
            addresses.metrics.insert(site, ports.tcp()?);
            for peer in self.site_ids().filter(|peer| *peer != site) {
                addresses.tunnel.insert((site, peer), ports.udp()?);
            }
        }
        Ok(addresses)
    }

    fn write_configs(&self, at: &Addresses, wan: &mut WanPlan<'_>) -> anyhow::Result<()> {
        let reach = Reach::new(self, at, wan)?;
        for id in self.node_ids() {
            self.write_placement(id, at, &reach)?;
        }
        for site in self.site_ids() {
            fs::create_dir_all(self.site_directory(site))?;
            self.write_agent(site, at, &reach)?;
            self.write_switch(site, at, &reach)?;
            for worker in 1..=WORKER_PORTS {
                self.write_worker(site, WorkerId(worker))?;
            }
        }
        Ok(())
    }

    fn tls(&self, node: &NodeName) -> String {
        let certs = self.directory.join("certs");
        let stem = certs::file_stem(node);
        format!(
            "tls = {{ certificate = {:?}, key = {:?}, authority = {:?} }}\n",
            certs.join(format!("{stem}.pem")),
            certs.join(format!("{stem}.key")),
            certs.join("authority.pem")
        )
    }

    fn write_placement(&self, id: u64, at: &Addresses, reach: &Reach) -> anyhow::Result<()> {
        let mut text = format!(
            "cluster = {CLUSTER:?}\nid = {id}\nlisten = \"{}\"\napi = \"{}\"\ndirectory = \"placement-{id}\"\n",
            at.quic_placement[&id], at.api[&id]
        );
        text += &self.tls(&NodeName::placement(CLUSTER, id));
        for peer in self.node_ids().filter(|peer| *peer != id) {
            let address = reach.0[&(Node::Placement(id), Node::Placement(peer))];
            write!(text, "\n[[peers]]\nid = {peer}\naddress = \"{address}\"\n")?;
        }
        Ok(fs::write(self.config_path(Part::Placement(id)), text)?)
    }

    fn write_agent(&self, site: SiteId, at: &Addresses, reach: &Reach) -> anyhow::Result<()> {
        let name = &self.site(site).name;
        let expected: Vec<_> = (1..=self.workers).collect();
        let ports: Vec<_> = (1..=WORKER_PORTS).collect();
        let mut text = format!(
            "cluster = {CLUSTER:?}\nsite = {site}\nname = {name:?}\nlisten = \"{}\"\nmetrics = \"{}\"\n\
             switch = \"s{site}/switch.proxy\"\n\
             workers.directory = \"s{site}\"\nworkers.expected = {expected:?}\nworkers.ports = {ports:?}\n",
            at.quic_site[&site], at.metrics[&site]
        );
        if let Some(thresholds) = &self.elastic {
            text += &thresholds.table(&self.directory, self.workers, WORKER_PORTS);
        }
        if let Some(span) = self.relay_late {
            writeln!(text, "moves.relay_late_ms = {}", span.as_millis())?;
        }
        text += &self.tls(&NodeName::site(CLUSTER, name));
        // The node at this site first: it answers watches without crossing the WAN.
        let own = u64::from(site.0);
        let ids = std::iter::once(own).chain(self.node_ids().filter(|id| *id != own));
        for id in ids {
            let address = reach.0[&(Node::Site(site), Node::Placement(id))];
            write!(text, "\n[[placement]]\nid = {id}\naddress = \"{address}\"\n")?;
        }
        for peer in self.site_ids().filter(|peer| *peer != site) {
            let address = reach.0[&(Node::Site(site), Node::Site(peer))];
            let name = &self.site(peer).name;
            write!(text, "\n[[peers]]\nsite = {peer}\nname = {name:?}\naddress = \"{address}\"\n")?;
        }
        Ok(fs::write(self.config_path(Part::Agent(site)), text)?)
    }

    fn write_switch(&self, site: SiteId, at: &Addresses, reach: &Reach) -> anyhow::Result<()> {
        let workers: Vec<_> = (1..=WORKER_PORTS).collect();
        let mut text = format!(
            "site = {site}\nname = \"switch-{site}\"\ncontrol = \"s{site}/switch.control\"\n\
             inside = \"s{site}/inside.packets\"\noutside = \"s{site}/outside.packets\"\n\
             directory = \"s{site}\"\nworkers = {workers:?}\n"
        );
        for peer in self.site_ids().filter(|peer| *peer != site) {
            let remote = reach.1[&(site, peer)];
            let local = at.tunnel[&(site, peer)];
            write!(text, "\n[[tunnels]]\nsite = {peer}\nlocal = \"{local}\"\nremote = \"{remote}\"\n")?;
        }
        Ok(fs::write(self.config_path(Part::Switch(site)), text)?)
    }

    fn write_worker(&self, site: SiteId, worker: WorkerId) -> anyhow::Result<()> {
        let switch = crate::config::packets_path(Path::new(&format!("s{site}")), worker);
        let text = format!(
            "site = {site}\nworker = {worker}\ndirectory = \"s{site}\"\nswitch = {switch:?}\nflows = {}\n",
            self.flows
        );
        Ok(fs::write(self.config_path(Part::Worker(site, worker)), text)?)
    }
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Node {
    Placement(u64),
    Site(SiteId),
}

impl Node {
    fn part(self) -> Part {
        match self {
            Self::Placement(id) => Part::Placement(id),
            Self::Site(site) => Part::Agent(site),
        }
    }
}

/// By which address one node reaches another, and one switch another.
struct Reach(BTreeMap<(Node, Node), SocketAddr>, BTreeMap<(SiteId, SiteId), SocketAddr>);

impl Reach {
    fn new(layout: &Layout, at: &Addresses, wan: &mut WanPlan<'_>) -> anyhow::Result<Self> {
        let place = |id: u64| SiteId(u8::try_from(id).unwrap_or(u8::MAX));
        let nodes = layout.node_ids().map(|id| (Node::Placement(id), at.quic_placement[&id], place(id)));
        let sites = layout.site_ids().map(|site| (Node::Site(site), at.quic_site[&site], site));
        let all: Vec<_> = nodes.chain(sites).collect();
        let mut reach = BTreeMap::new();
        for (i, &(a, address_a, at_a)) in all.iter().enumerate() {
            for &(b, address_b, at_b) in &all[i + 1..] {
                let (to_b, to_a) = wan.join((a.part(), address_a, at_a), (b.part(), address_b, at_b))?;
                reach.insert((a, b), to_b);
                reach.insert((b, a), to_a);
            }
        }
        let mut tunnels = BTreeMap::new();
        for a in layout.site_ids() {
            for b in layout.site_ids().filter(|b| *b > a) {
                let (to_b, to_a) = wan.join(
                    (Part::Switch(a), at.tunnel[&(a, b)], a),
                    (Part::Switch(b), at.tunnel[&(b, a)], b),
                )?;
                tunnels.insert((a, b), to_b);
                tunnels.insert((b, a), to_a);
            }
        }
        Ok(Self(reach, tunnels))
    }
}

/// The client prefixes of the demo's NAT service: 24 groups of 256 subscribers.
pub const CLIENTS: [&str; 2] = ["100.64.0.0/20", "100.64.16.0/21"];
/// Its outside pool: 64 addresses with 128 port blocks each.
pub const POOL: &str = "198.51.100.0/26";

impl Cluster {
    /// Adds the sites and the NAT service through the config API, as an operator would.
    ///
    /// # Errors
    /// When the API refuses.
    pub async fn configure(&self, capacity_pps: u64) -> anyhow::Result<()> {
        self.add_sites(capacity_pps).await?;
        let service = serde_json::json!({
            "id": 1,
            "nat": { "clients": CLIENTS, "pool": [POOL], "ports_per_subscriber": 504, "port_key": 7_654_321 },
            "group_len": 24,
        });
        self.put("/v1/services/cgn", &service, None).await?;
        Ok(())
    }

    /// Adds the sites alone, and waits until they can own groups.
    ///
    /// # Errors
    /// When the API refuses.
    pub async fn add_sites(&self, capacity_pps: u64) -> anyhow::Result<()> {
        for id in self.layout.site_ids() {
            let site = self.layout.site(id);
            let body = serde_json::json!({
                "id": id.0,
                "endpoint": format!("site-{id}:4101"),
                "capacity_pps": capacity_pps,
                "latitude": site.latitude,
                "longitude": site.longitude,
            });
            self.put(&format!("/v1/sites/{}", site.name), &body, None).await?;
        }
        // A site can own groups once its agent has reported.
        self.until("the sites report", async || {
            let sites = self.get("/v1/sites").await.unwrap_or_default();
            let alive = |site: &serde_json::Value| site["alive"] == true;
            sites["sites"].as_array().is_some_and(|sites| sites.iter().all(alive))
        })
        .await
    }

    /// Replaces parts of the policy.
    ///
    /// # Errors
    /// When the API refuses.
    pub async fn set_policy(&self, change: serde_json::Value) -> anyhow::Result<()> {
        let tag = self.etag("/v1/policy").await?;
        let mut policy = self.get("/v1/policy").await?;
        if let (Some(policy), Some(change)) = (policy.as_object_mut(), change.as_object()) {
            policy.extend(change.clone());
        }
        self.put("/v1/policy", &policy, Some(&tag)).await?;
        Ok(())
    }
}
