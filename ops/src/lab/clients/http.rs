//! Short HTTP requests, each over a connection of its own, so many per second whatever the answers take.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Context;
use dataplane::nat::range;
use dataplane::table::index::Hasher;
use dataplane::table::mapping::Mappings;
use flow::Protocol;
use flow::nat::NatSlices;
use serde::Serialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpSocket;

use super::super::namespaces::Namespace;
use super::super::underlay;
use super::Samples;
use crate::clock::Clock;

/// How long a request may take: longer than the kernel's first five retransmissions.
const TIMEOUT: Duration = Duration::from_secs(30);
/// Subscribers that the requests are spread over. Each has a few hundred ports, and a closed connection keeps its for minutes.
const SUBSCRIBERS: u8 = 250;

/// What to ask for.
#[derive(Clone, Debug)]
pub(in super::super) struct Plan {
    /// The third byte of the clients' addresses.
    pub(in super::super) group: u8,
    pub(in super::super) server: Ipv4Addr,
    pub(in super::super) per_second: u32,
    pub(in super::super) expected: Vec<u8>,
}

/// Requests under way.
#[derive(Debug)]
pub(in super::super) struct Requests {
    pub(in super::super) samples: Samples,
    counts: Arc<Counts>,
    thread: Option<JoinHandle<()>>,
}

/// The ports that each subscriber has used, in order. A closed connection keeps its port for longer than the lab runs.
#[derive(Debug, Default)]
struct Ports(BTreeMap<Ipv4Addr, Vec<u16>>);

impl Ports {
    fn note(&mut self, client: SocketAddrV4) {
        let ports = self.0.entry(*client.ip()).or_default();
        if !ports.contains(&client.port()) {
            ports.push(client.port());
        }
    }

    /// Whether a worker that did not die before gave the connection another outside port than the first choice.
    fn was_displaced(&self, nat: &NatSlices, client: SocketAddrV4) -> bool {
        let used = self.0.get(client.ip()).map_or(&[][..], Vec::as_slice);
        let address = u32::from(*client.ip());
        let mut mappings = Mappings::new(used.len(), Hasher::new([0; 2]));
        for port in used {
            let Some((_, range)) = range(nat, Protocol::Tcp, address, *port) else { return false };
            let Ok(given) = mappings.bind(Protocol::Tcp, address, *port, range) else { return false };
            if *port == client.port() {
                return mappings.get(given).outside_port != range.first + range.preferred;
            }
        }
        false
    }
}

#[derive(Debug, Default)]
struct Counts {
    stop: AtomicBool,
    wrong: AtomicU64,
    reset: Mutex<Vec<Reset>>,
    ports: Mutex<Ports>,
    late: Mutex<Vec<u64>>,
}

/// A request whose connection was reset or refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(in super::super) struct Reset {
    /// When the request began, microseconds since the lab's start.
    pub(in super::super) at_us: u64,
    /// How long after that it failed.
    pub(in super::super) after_us: u64,
    pub(in super::super) client: Option<SocketAddr>,
    pub(in super::super) server: Ipv4Addr,
    pub(in super::super) error: String,
    /// Its outside port was not the one that is tried first, since an older connection of its client had that.
    pub(in super::super) was_displaced: bool,
}

impl fmt::Display for Reset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { at_us, after_us, client, server, error, was_displaced } = self;
        write!(f, "from ")?;
        match client {
            Some(client) => write!(f, "{client}")?,
            None => write!(f, "a socket without an address")?,
        }
        let at_s = Duration::from_micros(*at_us).as_secs_f64();
        write!(f, " to {server} at {at_s:.1} s, {} ms after it began: {error}", after_us / 1_000)?;
        if *was_displaced {
            write!(f, " (an older connection of the client had the port that was tried first for it)")?;
        }
        Ok(())
    }
}

/// What went wrong with requests.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(in super::super) struct Wrongs {
    pub(in super::super) reset: Vec<Reset>,
    /// The answer was not what the server has.
    pub(in super::super) wrong: u64,
    /// When those began that had no answer in time, microseconds since the lab's start.
    pub(in super::super) late_at_us: Vec<u64>,
}

impl Requests {
    /// Starts a thread in the namespace.
    ///
    /// # Errors
    /// No thread or runtime.
    pub(in super::super) fn start(clients: &Namespace, plan: Plan, clock: Clock) -> anyhow::Result<Self> {
        let (samples, counts) = (Samples::default(), Arc::new(Counts::default()));
        let nat = NatSlices::new(underlay::nat()?)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (namespace, into, shared) = (clients.clone(), samples.clone(), Arc::clone(&counts));
        let thread = std::thread::Builder::new().name("http".into()).spawn(move || {
            if let Err(error) = namespace.enter() {
                return tracing::error!(%error, "the namespace cannot be entered");
            }
            tokio::task::LocalSet::new()
                .block_on(&runtime, ask(Arc::new(plan), Arc::new(nat), clock, into, shared));
        })?;
        Ok(Self { samples, counts, thread: Some(thread) })
    }

    /// Asks no more, and waits for the last answers.
    pub(in super::super) fn stop(&mut self) -> Wrongs {
        self.counts.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        Wrongs {
            reset: self.counts.reset.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            wrong: self.counts.wrong.load(Ordering::Relaxed),
            late_at_us: self.counts.late.lock().unwrap_or_else(PoisonError::into_inner).clone(),
        }
    }
}

impl Drop for Requests {
    fn drop(&mut self) {
        // Not waited for: after Ctrl-C nobody needs the last answers.
        self.counts.stop.store(true, Ordering::Relaxed);
    }
}

async fn ask(plan: Arc<Plan>, nat: Arc<NatSlices>, clock: Clock, samples: Samples, counts: Arc<Counts>) {
    let mut due = tokio::time::interval(Duration::from_secs(1) / plan.per_second);
    let mut under_way = tokio::task::JoinSet::new();
    let mut number = 0_u32;
    while !counts.stop.load(Ordering::Relaxed) {
        due.tick().await;
        number = number.wrapping_add(1);
        let host = 1 + u8::try_from(number % u32::from(SUBSCRIBERS)).unwrap_or(0);
        let (plan, nat) = (Arc::clone(&plan), Arc::clone(&nat));
        let (samples, counts) = (samples.clone(), Arc::clone(&counts));
        under_way.spawn_local(async move {
            let at = clock.now().0;
            let mut client = None;
            let result = tokio::time::timeout(TIMEOUT, one(&plan, host, &mut client, &counts.ports)).await;
            let took = clock.now().0 - at;
            let right = matches!(&result, Ok(Ok(answer)) if answer.ends_with(&plan.expected));
            match result {
                Ok(Ok(_)) if right => {}
                Ok(Ok(_)) => drop(counts.wrong.fetch_add(1, Ordering::Relaxed)),
                Ok(Err(error)) => {
                    let (server, error) = (plan.server, format!("{error:#}"));
                    let ports = counts.ports.lock().unwrap_or_else(PoisonError::into_inner);
                    let was_displaced = client.is_some_and(|client| ports.was_displaced(&nat, client));
                    let client = client.map(SocketAddr::V4);
                    let reset = Reset { at_us: at, after_us: took, client, server, error, was_displaced };
                    counts.reset.lock().unwrap_or_else(PoisonError::into_inner).push(reset);
                }
                Err(_) => counts.late.lock().unwrap_or_else(PoisonError::into_inner).push(at),
            }
            samples.push(at, right.then_some(took));
        });
        while under_way.try_join_next().is_some() {}
    }
    while under_way.join_next().await.is_some() {}
}

async fn one(
    plan: &Plan,
    host: u8,
    client: &mut Option<SocketAddrV4>,
    ports: &Mutex<Ports>,
) -> anyhow::Result<Vec<u8>> {
    let socket = TcpSocket::new_v4()?;
    socket.bind(SocketAddr::from((underlay::client(plan.group, host), 0))).context("bind")?;
    if let SocketAddr::V4(address) = socket.local_addr()? {
        ports.lock().unwrap_or_else(PoisonError::into_inner).note(address);
        *client = Some(address);
    }
    let mut stream = socket.connect(SocketAddr::from((plan.server, 80))).await.context("connect")?;
    stream
        .write_all(b"GET /short HTTP/1.1\r\nHost: lab\r\nConnection: close\r\n\r\n")
        .await
        .context("write")?;
    let mut answer = Vec::with_capacity(1_500);
    stream.read_to_end(&mut answer).await.context("read")?;
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_is_displaced_when_an_older_one_of_the_subscriber_has_its_first_choice() {
        let nat = NatSlices::new(underlay::nat().unwrap()).unwrap();
        let client = underlay::client(6, 7);
        let subscriber = nat.subscriber(client).unwrap();
        let first = |port| nat.preferred_offset(subscriber, Protocol::Tcp, port);
        let other = (40_001..u16::MAX).find(|port| first(*port) == first(40_000)).unwrap();
        let third = (40_001..u16::MAX).find(|port| first(*port) == first(40_000) + 1).unwrap();
        let mut ports = Ports::default();
        for port in [40_000, other, third, 40_000] {
            ports.note(SocketAddrV4::new(client, port));
        }
        ports.note(SocketAddrV4::new(underlay::client(6, 8), 40_000));
        let displaced = |port| ports.was_displaced(&nat, SocketAddrV4::new(client, port));
        assert_eq!([40_000, other, third].map(displaced), [false, true, true]);
        assert!(!ports.was_displaced(&nat, SocketAddrV4::new(underlay::client(6, 8), 40_000)));
    }
}
