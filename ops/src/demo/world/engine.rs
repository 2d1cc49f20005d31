//! The loop of the world.

use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::mpsc::{Receiver, Sender, TryRecvError};
use std::time::Duration;

use anyhow::{Context as _, Result};
use flow::{Prefix, SiteId};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags};

use super::frame::{Headers, TCP};
use super::net::{Arrival, Net};
use super::port::Port;
use super::report::{ActTraffic, Delays, Harm, Ledger};
use super::tcp::Tcp;
use super::udp::Udp;
use super::{WorldSpec, micros};
use crate::demo::batch::{self, Inbox};
use crate::demo::clock::Clock;

/// Packets are handled together that come within this time: with thousands a second, a wake-up for each costs more
/// than all that is done for it.
const TICK: Duration = Duration::from_micros(200);
/// How often commands are looked for when nothing happens.
const COMMAND_POLL: Duration = Duration::from_millis(10);

/// What the handle asks for.
#[derive(Debug)]
pub(super) enum Command {
    Begin(String, Sender<usize>),
    Report(Option<usize>, Sender<ActTraffic>),
    Live(Sender<ActTraffic>),
    Harm(Sender<Harm>),
    Roam(Prefix, SiteId, Sender<usize>),
    SetRate(Prefix, f64, Sender<usize>),
    Window(Vec<Prefix>, Range<u64>, Sender<Delays>),
    Quiet(Sender<()>),
    Final(Sender<ActTraffic>),
}

/// A group on its way to another site.
struct Roaming {
    at: u64,
    group: usize,
    site: usize,
}

/// Everything that the one thread works on.
pub(super) struct Engine {
    clock: Clock,
    commands: Receiver<Command>,
    net: Net,
    /// Inside and outside port of each site in turn.
    ports: Vec<Port>,
    udp: Udp,
    tcp: Tcp,
    ledger: Ledger,
    roaming: Vec<Roaming>,
    roam_silence: u64,
    grace: u64,
    dropped: u64,
    inbox: Inbox,
    frames: Vec<Vec<u8>>,
}

impl Engine {
    pub(super) fn new(spec: &WorldSpec, clock: Clock, commands: Receiver<Command>) -> Result<Self> {
        let mut net = Net::new(spec)?;
        let mut ports = Vec::new();
        for path in spec.sites.iter().flat_map(|site| [&site.inside, &site.outside]) {
            ports.push(Port::open(path).with_context(|| format!("cannot attach to {}", path.display()))?);
        }
        net.now = clock.micros();
        let (udp, tcp) = (Udp::new(spec, &net, net.now), Tcp::new(spec, &net, net.now));
        let groups = spec.groups.iter().map(|group| group.prefix).collect();
        let ledger = Ledger::new(groups, net.sites.clone());
        Ok(Self {
            clock,
            commands,
            net,
            ports,
            udp,
            tcp,
            ledger,
            roaming: Vec::new(),
            roam_silence: micros(spec.roam_silence),
            grace: micros(spec.grace),
            dropped: 0,
            inbox: Inbox::new(),
            frames: Vec::new(),
        })
    }

    /// Runs until the handle is gone.
    pub(super) fn run(mut self) {
        while self.handle_commands() {
            self.turn();
            if let Err(error) = self.wait() {
                return tracing::error!(%error, "the world cannot wait and ends");
            }
        }
    }

    fn turn(&mut self) {
        self.net.now = self.clock.micros();
        self.ledger.tick(self.net.now);
        self.finish_roaming();
        for at in 0..self.ports.len() {
            self.receive(at);
        }
        self.udp.tick(&mut self.net, &mut self.ledger);
        self.tcp.tick(&mut self.net, &mut self.ledger);
        while let Some((arrival, frame)) = self.net.pop() {
            self.arrive(arrival, frame);
        }
        for port in &mut self.ports {
            port.retry(self.net.now);
            port.flush(&mut self.net);
        }
        let dropped = self.ports.iter().map(|port| port.dropped).sum();
        self.ledger.checks().world_dropped += dropped - self.dropped;
        self.dropped = dropped;
    }

    fn wait(&self) -> Result<(), Errno> {
        std::thread::sleep(TICK);
        let due = [self.net.next_due(), self.udp.next_due(), self.tcp.next_due()];
        let due = due.into_iter().flatten().min().unwrap_or(u64::MAX);
        let timeout = Duration::from_micros(due.saturating_sub(self.clock.micros())).min(COMMAND_POLL);
        if timeout.is_zero() {
            return Ok(());
        }
        let fds = self.ports.iter().filter_map(|port| {
            let write = if port.is_waiting() { PollFlags::POLLOUT } else { PollFlags::empty() };
            Some(PollFd::new(port.socket()?.as_fd(), PollFlags::POLLIN | write))
        });
        batch::wait(&mut fds.collect::<Vec<_>>(), timeout)
    }

    /// Starts the way of what a switch sent out.
    fn receive(&mut self, at: usize) {
        let mut frames = std::mem::take(&mut self.frames);
        self.ports[at].receive(&mut self.inbox, &mut self.net, &mut frames);
        let (site, is_inside) = (at / 2, at.is_multiple_of(2));
        for frame in frames.drain(..) {
            let to = Headers::parse(&frame).map(|headers| headers.to.0);
            if is_inside && let Some(client) = to.and_then(|to| self.net.client(to)) {
                self.net.carry_to_client(client, site, frame);
            } else if !is_inside && let Some(server) = to.and_then(|to| self.net.server(to)) {
                self.net.carry_to_server(server, site, frame);
            } else {
                self.ledger.checks().unknown += 1;
                self.net.recycle(frame);
            }
        }
        self.frames = frames;
    }

    fn arrive(&mut self, arrival: Arrival, frame: Vec<u8>) {
        match arrival {
            Arrival::Inside(site) => self.ports[site * 2].push(frame),
            Arrival::Outside(site) => self.ports[site * 2 + 1].push(frame),
            Arrival::Client | Arrival::Server => {
                self.arrive_at_host(arrival, &frame);
                self.net.recycle(frame);
            }
        }
    }

    fn arrive_at_host(&mut self, arrival: Arrival, frame: &[u8]) {
        let (net, ledger) = (&mut self.net, &mut self.ledger);
        let Some(headers) = Headers::parse(frame).filter(|headers| headers.are_intact(frame)) else {
            ledger.checks().corrupt_packets += 1;
            return;
        };
        let at_server = arrival == Arrival::Server;
        if at_server && !net.is_outside(headers.from.0) {
            ledger.checks().outside_foreign += 1;
        }
        match (headers.protocol, at_server) {
            (TCP, true) => self.tcp.arrive_at_server(&headers, frame, net, ledger),
            (TCP, false) => self.tcp.arrive_at_client(&headers, frame, net, ledger),
            _ => self.udp.arrive(&headers, frame, net, ledger),
        }
    }

    /// Does what the handle wants; whether it is still there. An answer that nobody waits for any more is lost.
    fn handle_commands(&mut self) -> bool {
        loop {
            match self.commands.try_recv() {
                Ok(command) => self.handle(command),
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return false,
            }
        }
    }

    fn handle(&mut self, command: Command) {
        let now = self.clock.micros();
        let settled = now.saturating_sub(self.grace);
        // A reply that nobody waits for any more is dropped.
        let _ = match command {
            Command::Begin(name, reply) => reply.send(self.ledger.begin(name, now)).ok(),
            Command::Report(act, reply) => reply.send(self.ledger.report(act, now, settled)).ok(),
            Command::Live(reply) => {
                reply.send(self.ledger.report(Some(self.ledger.current()), now, settled)).ok()
            }
            Command::Harm(reply) => reply.send(self.ledger.harm(settled)).ok(),
            Command::Roam(prefix, site, reply) => reply.send(self.roam(prefix, site, now)).ok(),
            Command::SetRate(prefix, factor, reply) => reply.send(self.set_rate(prefix, factor)).ok(),
            Command::Window(prefixes, time, reply) => {
                let groups = &self.net.groups;
                let is_wanted = |at: usize| prefixes.iter().any(|prefix| prefix.covers(&groups[at].prefix));
                reply.send(self.ledger.requests(is_wanted, time.start, time.end)).ok()
            }
            Command::Quiet(reply) => {
                (self.udp.stopped, self.tcp.stopped) = (true, true);
                reply.send(()).ok()
            }
            Command::Final(reply) => {
                let mut total = self.ledger.report(None, now, u64::MAX);
                total.missing = self.udp.missing(&self.net);
                reply.send(total).ok()
            }
        };
    }

    fn groups_in(&self, prefix: Prefix) -> Vec<usize> {
        let groups = self.net.groups.iter().enumerate();
        groups.filter(|(_, group)| prefix.covers(&group.prefix)).map(|(at, _)| at).collect()
    }

    fn roam(&mut self, prefix: Prefix, site: SiteId, now: u64) -> usize {
        let Some(site) = self.net.site(site) else { return 0 };
        let (groups, at) = (self.groups_in(prefix), now + self.roam_silence);
        for &group in &groups {
            self.net.groups[group].silent_until = at;
            self.roaming.push(Roaming { at, group, site });
        }
        groups.len()
    }

    fn finish_roaming(&mut self) {
        let now = self.net.now;
        let net = &mut self.net;
        self.roaming.retain(|roaming| {
            if roaming.at <= now {
                net.groups[roaming.group].site = roaming.site;
            }
            roaming.at > now
        });
    }

    fn set_rate(&mut self, prefix: Prefix, factor: f64) -> usize {
        let groups = self.groups_in(prefix);
        for &group in &groups {
            self.net.groups[group].factor = factor;
            self.udp.spread(group, &self.net);
        }
        groups.len()
    }
}
