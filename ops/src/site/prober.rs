//! Measures servers that the leader asks for, by the time in which they answer a TCP connection (SYN to SYN-ACK, or to RST).
//!
//! The kernel's own TCP is used, from the site's own address, and a connection that comes about is closed at once: nothing is sent on it.
//! A probe is some connections, one after the other, of which the fastest counts: what this process waits for a processor adds to each,
//! and is no part of the way.
//! Off unless the configuration enables it. What is asked for is checked and bounded here again, whoever asks: so many
//! probes per second, so many at a time, only to the networks that are allowed, never to a group address.

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use flow::Prefix;
use placement::core::{PROBES_MAX, Probe, ServerRtt};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;

use crate::clock::Clock;

/// Probes per second that may be configured.
pub const PER_SECOND_MAX: u16 = 100;
/// Probes per second if nothing is said.
pub const PER_SECOND: u16 = 2;
/// Networks that may be named.
pub const NETWORKS_MAX: usize = 256;
/// Probes in hand at a time.
const AT_ONCE_MAX: usize = 16;
/// Below a second, after which Linux sends a SYN again: an answer would then be of either.
const WAIT: Duration = Duration::from_millis(900);
/// Connections of one probe.
const SAMPLES: u32 = 3;
/// Results that wait for a report; more are dropped.
const RESULTS_MAX: usize = 1024;

/// What a site is willing to measure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProbeSettings {
    /// Probes per second, 1 to [`PER_SECOND_MAX`].
    pub per_second: u16,
    /// Only servers in these; empty for any.
    pub networks: Vec<Prefix>,
}

impl ProbeSettings {
    /// Whether an address may be asked: one host, in an allowed network.
    #[must_use]
    pub fn allows(&self, target: &SocketAddr) -> bool {
        let ip = target.ip();
        let group = ip.is_multicast() || ip.is_unspecified() || ip == IpAddr::from([255; 4]);
        let inside = self.networks.is_empty() || self.networks.iter().any(|network| network.contains(ip));
        !group && target.port() != 0 && inside
    }
}

/// What became of probes since the start.
#[derive(Debug, Default)]
struct Counts {
    answered: AtomicU64,
    silent: AtomicU64,
    refused: AtomicU64,
}

/// Asks servers, one after the other.
#[derive(Debug)]
pub struct Prober {
    settings: Mutex<Option<ProbeSettings>>,
    queue: Mutex<VecDeque<Probe>>,
    results: Mutex<Vec<ServerRtt>>,
    counts: Counts,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Prober {
    /// `None` never sends anything.
    #[must_use]
    pub fn new(settings: Option<ProbeSettings>) -> Self {
        Self {
            settings: Mutex::new(settings),
            queue: Mutex::default(),
            results: Mutex::default(),
            counts: Counts::default(),
        }
    }

    /// Other settings from now on; what waits and is not allowed any more is left out.
    pub fn set(&self, settings: Option<ProbeSettings>) {
        let allowed =
            |probe: &Probe| settings.as_ref().is_some_and(|settings| settings.allows(&probe.target));
        lock(&self.queue).retain(allowed);
        *lock(&self.settings) = settings;
    }

    /// Probes per second that placement may ask for.
    #[must_use]
    pub fn per_second(&self) -> u16 {
        lock(&self.settings).as_ref().map_or(0, |settings| settings.per_second)
    }

    /// Takes what placement asks for; what is not allowed, or too much, is refused and counted.
    pub fn ask(&self, probes: Vec<Probe>) {
        let settings = lock(&self.settings);
        let Some(settings) = settings.as_ref() else { return };
        let mut queue = lock(&self.queue);
        for probe in probes {
            if !settings.allows(&probe.target) || queue.len() >= PROBES_MAX {
                self.counts.refused.fetch_add(1, Ordering::Relaxed);
            } else if !queue.contains(&probe) {
                queue.push_back(probe);
            }
        }
    }

    /// What was measured since the last call.
    #[must_use]
    pub fn take(&self) -> Vec<ServerRtt> {
        std::mem::take(&mut *lock(&self.results))
    }

    /// Probes by what became of them, for metrics.
    #[must_use]
    pub fn counts(&self) -> [(&'static str, u64); 3] {
        let Counts { answered, silent, refused } = &self.counts;
        [("answered", answered), ("silent", silent), ("refused", refused)]
            .map(|(fate, count)| (fate, count.load(Ordering::Relaxed)))
    }

    /// Sends what is asked for, at the rate of the settings, until it is dropped.
    pub async fn run(self: Arc<Self>) {
        let room = Arc::new(Semaphore::new(AT_ONCE_MAX));
        loop {
            tokio::time::sleep(Duration::from_secs(1) / u32::from(self.per_second().max(1))).await;
            let Some(probe) = lock(&self.queue).pop_front() else { continue };
            let Ok(permit) = room.clone().acquire_owned().await else { return };
            let prober = self.clone();
            tokio::spawn(async move {
                prober.measure(probe).await;
                drop(permit);
            });
        }
    }

    async fn measure(&self, probe: Probe) {
        let Some(us) = least_round_trip_us(probe.target).await else {
            self.counts.silent.fetch_add(1, Ordering::Relaxed);
            return;
        };
        self.counts.answered.fetch_add(1, Ordering::Relaxed);
        let mut results = lock(&self.results);
        if results.len() < RESULTS_MAX {
            let (prefix, answered) = (probe.prefix, Some(probe.target));
            results.push(ServerRtt { prefix, ingress: None, count: 1, min_us: us, mean_us: us, answered });
        }
    }
}

/// The least of some. One that does not answer is not asked again: it may be far away, or want to be left alone.
async fn least_round_trip_us(target: SocketAddr) -> Option<u32> {
    let mut least = None;
    for _ in 0..SAMPLES {
        let Some(us) = round_trip_us(target).await else { break };
        least = Some(least.map_or(us, |least: u32| least.min(us)));
    }
    least
}

/// Microseconds until a server accepts or refuses a connection; nothing when it is silent or out of reach.
async fn round_trip_us(target: SocketAddr) -> Option<u32> {
    let clock = Clock::start();
    let connected = tokio::time::timeout(WAIT, TcpStream::connect(target)).await.ok()?;
    let us = u32::try_from(clock.now().0).ok()?.max(1);
    match connected {
        Ok(_) => Some(us),
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => Some(us),
        Err(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(per_second: u16, networks: &[&str]) -> ProbeSettings {
        let networks = networks.iter().map(|text| text.parse().unwrap()).collect();
        ProbeSettings { per_second, networks }
    }

    fn probe(target: &str) -> Probe {
        Probe { prefix: "127.0.0.0/24".parse().unwrap(), target: target.parse().unwrap() }
    }

    async fn results(prober: &Arc<Prober>, done: u64) -> Vec<ServerRtt> {
        let running = tokio::spawn(prober.clone().run());
        while prober.counts()[0].1 + prober.counts()[1].1 < done {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        running.abort();
        prober.take()
    }

    #[tokio::test]
    async fn a_server_that_accepts_and_one_that_refuses_both_answer() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let open = listener.local_addr().unwrap();
        let closed = {
            let other = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            other.local_addr().unwrap()
        };
        let prober = Arc::new(Prober::new(Some(settings(100, &["127.0.0.0/8"]))));
        prober.ask(vec![probe(&open.to_string()), probe(&closed.to_string())]);
        let mut results = results(&prober, 2).await;
        results.sort_by_key(|result| result.answered != Some(open));
        let asked: Vec<_> =
            results.iter().map(|result| (result.answered, result.ingress, result.count)).collect();
        assert_eq!(asked, [(Some(open), None, 1), (Some(closed), None, 1)]);
        assert!(
            results.iter().all(|result| result.min_us > 0 && result.prefix == probe("127.0.0.1:1").prefix)
        );
        assert_eq!(prober.take(), [], "told once");
    }

    #[tokio::test]
    async fn what_is_not_enabled_or_not_allowed_is_never_asked() {
        let off = Arc::new(Prober::new(None));
        off.ask(vec![probe("127.0.0.1:9")]);
        assert_eq!((off.per_second(), lock(&off.queue).len()), (0, 0));
        let prober = Prober::new(Some(settings(5, &["127.0.0.0/24"])));
        let refused =
            ["127.1.0.1:9", "127.0.0.1:0", "0.0.0.0:9", "224.0.0.1:9", "255.255.255.255:9", "[ff02::1]:9"];
        prober.ask(refused.iter().map(|target| probe(target)).collect());
        assert!(lock(&prober.queue).is_empty());
        assert_eq!(prober.counts()[2], ("refused", 6));
    }

    #[test]
    fn what_waits_and_is_not_allowed_any_more_is_not_asked() {
        let prober = Prober::new(None);
        prober.set(Some(settings(5, &[])));
        prober.ask(vec![probe("127.0.0.1:9"), probe("127.1.0.1:9")]);
        assert_eq!((prober.per_second(), lock(&prober.queue).len()), (5, 2));
        prober.set(Some(settings(7, &["127.1.0.0/16"])));
        assert_eq!(
            lock(&prober.queue).front().map(|probe| probe.target.to_string()).as_deref(),
            Some("127.1.0.1:9")
        );
        prober.set(None);
        assert_eq!((prober.per_second(), lock(&prober.queue).len()), (0, 0));
    }

    #[test]
    fn what_is_asked_for_is_bounded_and_asked_once() {
        let prober = Prober::new(Some(settings(5, &[])));
        prober.ask(vec![probe("127.0.0.1:9"), probe("127.0.0.1:9")]);
        assert_eq!(lock(&prober.queue).len(), 1);
        prober.ask((1..=2 * PROBES_MAX).map(|port| probe(&format!("127.0.0.1:{port}"))).collect());
        assert_eq!(lock(&prober.queue).len(), PROBES_MAX);
    }
}
