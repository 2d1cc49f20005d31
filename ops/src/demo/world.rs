//! Simulates all clients and all servers of the demo, and checks what the network does to their packets.
//!
//! One thread attaches to the inside and outside ports of all switches. Clients come in at their group's site after
//! the access delay; servers are reached from the site where a packet goes out, and answer at the site nearest to
//! them (anycast), after the delay of the great circle. All delays are constant and every leg is first in, first
//! out: the world loses, duplicates and reorders nothing, so whatever of that is counted happened between ports.
//! What a switch does not take is counted apart (`world_dropped`).
//!
//! UDP packets carry their flow and number and are echoed; TCP connections are real stacks, stay open, and carry
//! requests and answers of which both ends know every byte.

mod engine;
mod frame;
mod net;
mod pattern;
mod port;
mod report;
mod tcp;
mod udp;

#[cfg(test)]
mod tests;

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result};
use flow::{Prefix, SiteId};

use super::clock::Clock;
use engine::{Command, Engine};
use net::micros;
pub use report::{ActTraffic, Checks, Delays, GroupDelays, Harm, PacketCounts, PathHarm, TcpCounts};

/// A site where clients and servers can come in.
#[derive(Clone, Debug)]
pub struct SiteSpec {
    /// Its number.
    pub id: SiteId,
    /// Its name.
    pub name: String,
    /// In degrees.
    pub latitude: f64,
    /// In degrees.
    pub longitude: f64,
    /// Socket of the switch's inside port.
    pub inside: PathBuf,
    /// Socket of the switch's outside port.
    pub outside: PathBuf,
}

/// Clients that are in one place and move together.
#[derive(Clone, Debug)]
pub struct GroupSpec {
    /// Their addresses.
    pub prefix: Prefix,
    /// The site where they come in at first.
    pub home: SiteId,
    /// How likely a flow's server is near which site. Weights need not sum to 1.
    pub servers: Vec<(SiteId, f64)>,
}

/// A server.
#[derive(Clone, Debug)]
pub struct ServerSpec {
    /// Its address.
    pub address: Ipv4Addr,
    /// The site that it is near to.
    pub site: SiteId,
    /// One-way delay from there.
    pub distance: Duration,
}

/// The world to simulate.
#[derive(Clone, Debug)]
pub struct WorldSpec {
    /// Everything that is chosen at random follows from it.
    pub seed: u64,
    /// The sites.
    pub sites: Vec<SiteSpec>,
    /// The client groups.
    pub groups: Vec<GroupSpec>,
    /// The servers.
    pub servers: Vec<ServerSpec>,
    /// Outside addresses that clients may appear with.
    pub pool: Vec<Prefix>,
    /// Client addresses used of each group, at equal distances.
    pub clients_per_group: u32,
    /// One-way delay between a client and its site.
    pub access_delay: Duration,
    /// TCP connections, spread over the clients.
    pub tcp_connections: usize,
    /// Least and most time between an answer and the next request.
    pub think: (Duration, Duration),
    /// UDP flows, spread over the clients.
    pub udp_flows: usize,
    /// Least and most time between packets of a flow.
    pub udp_interval: (Duration, Duration),
    /// How many of the flows send fast.
    pub udp_fast_flows: usize,
    /// Time between packets of those.
    pub udp_fast_interval: Duration,
    /// How long UDP of a group is silent before the group appears elsewhere.
    pub roam_silence: Duration,
    /// A packet that is on its way for longer is lost.
    pub grace: Duration,
}

impl WorldSpec {
    /// The traffic of the demo: some 9,000 UDP packets and 1,500 TCP packets per second in each direction.
    #[must_use]
    pub fn new(
        sites: Vec<SiteSpec>,
        groups: Vec<GroupSpec>,
        servers: Vec<ServerSpec>,
        pool: Vec<Prefix>,
    ) -> Self {
        Self {
            seed: 1,
            sites,
            groups,
            servers,
            pool,
            clients_per_group: 50,
            access_delay: Duration::from_millis(5),
            tcp_connections: 320,
            think: (Duration::from_millis(500), Duration::from_secs(2)),
            udp_flows: 20_000,
            udp_interval: (Duration::from_secs(4), Duration::from_secs(5)),
            udp_fast_flows: 200,
            udp_fast_interval: Duration::from_millis(100),
            roam_silence: Duration::from_secs(1),
            grace: Duration::from_millis(1_500),
        }
    }
}

/// A moment of the world, for [`WorldHandle::delay_window`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mark(u64);

impl Mark {
    /// Time since the world began.
    #[must_use]
    pub fn since_start(self) -> Duration {
        Duration::from_micros(self.0)
    }
}

/// The world, before it runs.
#[derive(Debug)]
pub struct World;

impl World {
    /// Attaches to all ports and starts the traffic.
    ///
    /// # Errors
    /// A port cannot be reached, or the specification does not fit together.
    pub fn start(spec: WorldSpec) -> Result<WorldHandle> {
        let clock = Clock::start();
        // Who asks waits for the answer, so that there is one command of each thread at most.
        let (sender, commands) = channel();
        let grace = spec.grace;
        let engine = Engine::new(&spec, clock, commands)?;
        let thread = std::thread::Builder::new().name("world".into()).spawn(move || engine.run())?;
        Ok(WorldHandle { commands: Some(sender), thread: Some(thread), clock, grace })
    }
}

/// A running world; it ends when this is dropped. Calls fail only when its thread is gone.
#[derive(Debug)]
pub struct WorldHandle {
    commands: Option<Sender<Command>>,
    thread: Option<JoinHandle<()>>,
    clock: Clock,
    grace: Duration,
}

impl WorldHandle {
    /// Begins an act; the one before ends.
    ///
    /// # Errors
    /// The world has ended.
    pub fn begin_act(&self, name: &str) -> Result<()> {
        self.ask(|reply| Command::Begin(name.to_owned(), reply)).map(drop)
    }

    /// Ends the act and tells what it saw. Blocks for the grace time, while traffic goes on, so that all of the
    /// act's packets have arrived or are lost.
    ///
    /// # Errors
    /// The world has ended.
    pub fn end_act(&self) -> Result<ActTraffic> {
        let next = self.ask(|reply| Command::Begin(String::new(), reply))?;
        std::thread::sleep(self.grace);
        self.ask(|reply| Command::Report(Some(next.saturating_sub(1)), reply))
    }

    /// What the present act has seen so far. Packets younger than the grace time do not count as lost.
    ///
    /// # Errors
    /// The world has ended.
    pub fn live(&self) -> Result<ActTraffic> {
        self.ask(Command::Live)
    }

    /// What was seen since the start.
    ///
    /// # Errors
    /// The world has ended.
    pub fn total(&self) -> Result<ActTraffic> {
        self.ask(|reply| Command::Report(None, reply))
    }

    /// What came to harm since the start, and when it was sent.
    ///
    /// # Errors
    /// The world has ended.
    pub fn harm(&self) -> Result<Harm> {
        self.ask(Command::Harm)
    }

    /// Clients of all groups inside the prefix leave their site and appear at another one. Blocks no one: UDP is
    /// silent for [`WorldSpec::roam_silence`], then they are there. The number of groups.
    ///
    /// # Errors
    /// The world has ended.
    pub fn roam(&self, prefix: Prefix, to: SiteId) -> Result<usize> {
        self.ask(|reply| Command::Roam(prefix, to, reply))
    }

    /// Multiplies the UDP rate of all groups inside the prefix, as compared to the start. The number of groups.
    ///
    /// # Errors
    /// The world has ended.
    pub fn set_rate(&self, prefix: Prefix, factor: f64) -> Result<usize> {
        self.ask(|reply| Command::SetRate(prefix, factor, reply))
    }

    /// Now.
    #[must_use]
    pub fn mark(&self) -> Mark {
        Mark(self.clock.micros())
    }

    /// Delays of requests of clients inside the prefixes that began from `since` on, and before `until` if given.
    ///
    /// # Errors
    /// The world has ended.
    pub fn delay_window(&self, groups: &[Prefix], since: Mark, until: Option<Mark>) -> Result<Delays> {
        let until = until.map_or(u64::MAX, |mark| mark.0);
        self.ask(|reply| Command::Window(groups.to_vec(), since.0..until, reply))
    }

    /// Stops sending for good, waits until nothing is on its way (3 seconds at most), and tells what was seen
    /// since the start. Packets that have not arrived by then are lost.
    ///
    /// # Errors
    /// The world has ended.
    pub fn drain(&self) -> Result<ActTraffic> {
        const STEP: Duration = Duration::from_millis(50);
        const STEPS_MAX: u32 = 60;
        self.ask(Command::Quiet)?;
        for _ in 0..STEPS_MAX {
            std::thread::sleep(STEP);
            let packets = self.total()?.packets;
            if packets.sent == packets.delivered {
                break;
            }
        }
        self.ask(Command::Final)
    }

    fn ask<T>(&self, command: impl FnOnce(Sender<T>) -> Command) -> Result<T> {
        let (reply, answer): (_, Receiver<T>) = channel();
        let commands = self.commands.as_ref().context("the world has ended")?;
        commands.send(command(reply)).ok().context("the world has ended")?;
        answer.recv().context("the world has ended")
    }
}

impl Drop for WorldHandle {
    fn drop(&mut self) {
        self.commands = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
