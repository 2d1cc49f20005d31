//! Control sockets of the workers: found in a directory, connected while they answer.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use dataplane::control::codec::{FrameDecoder, encode};
use dataplane::control::{Event, Request, VERSION};
use flow::{SiteId, WorkerId};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::{Notify, mpsc};

use super::core::Input;
use super::shell::control_paths;

/// Between two looks into the directory, and two attempts to connect.
const LOOK: Duration = Duration::from_millis(100);

/// Requests that may wait for one worker: two for each of a service's 1,048,576 groups.
const REQUESTS_MAX: usize = 1 << 21;
/// Bytes of them: thirty chunks of the longest kind. A worker that reads none is one that hangs.
const REQUESTS_LEN_MAX: usize = 256 << 20;

type Senders = Arc<Mutex<BTreeMap<WorkerId, Requests>>>;

/// Requests on their way to one worker. Nobody waits for room: a worker that does not read is disconnected, and what it
/// has missed is made up for when it answers again.
#[derive(Clone, Debug)]
struct Requests {
    queue: mpsc::Sender<Vec<u8>>,
    waiting_len: Arc<AtomicUsize>,
    overflow: Arc<Notify>,
    /// The connection is to end.
    end: Arc<Notify>,
}

impl Requests {
    fn new() -> (Self, mpsc::Receiver<Vec<u8>>) {
        let (queue, requests) = mpsc::channel(REQUESTS_MAX);
        (Self { queue, waiting_len: Arc::default(), overflow: Arc::default(), end: Arc::default() }, requests)
    }

    fn send(&self, bytes: Vec<u8>) {
        let len = bytes.len();
        let before = self.waiting_len.fetch_add(len, Ordering::Relaxed);
        if before + len > REQUESTS_LEN_MAX || self.queue.try_send(bytes).is_err() {
            self.overflow.notify_one();
        }
    }

    fn written(&self, len: usize) {
        self.waiting_len.fetch_sub(len, Ordering::Relaxed);
    }
}

/// All workers of the site.
#[derive(Clone)]
pub struct Workers {
    site: SiteId,
    inputs: mpsc::Sender<Input>,
    senders: Senders,
}

impl Workers {
    /// None connected yet.
    #[must_use]
    pub fn new(site: SiteId, inputs: mpsc::Sender<Input>) -> Self {
        Self { site, inputs, senders: Senders::default() }
    }

    /// Sends a request, if the worker is connected; if not, its next status will tell what it missed.
    pub fn send(&self, worker: WorkerId, request: &Request) {
        let bytes = match encode(request) {
            Ok(bytes) => bytes,
            Err(error) => return tracing::error!(%error, "a request cannot be encoded"),
        };
        let senders = self.senders.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(requests) = senders.get(&worker) {
            requests.send(bytes);
        }
    }

    /// Sends a request to every connected worker.
    pub fn broadcast(&self, request: &Request) {
        let workers: Vec<_> = {
            let senders = self.senders.lock().unwrap_or_else(PoisonError::into_inner);
            senders.keys().copied().collect()
        };
        workers.into_iter().for_each(|worker| self.send(worker, request));
    }

    /// Ends the connection of a worker that does not answer.
    pub fn disconnect(&self, worker: WorkerId) {
        let senders = self.senders.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(requests) = senders.get(&worker) {
            requests.end.notify_one();
        }
    }

    /// Looks for control sockets, and keeps each connected. Workers without a port of the switch are left alone.
    pub async fn discover(self, directory: PathBuf, ports: Vec<WorkerId>) {
        let mut known = BTreeSet::new();
        loop {
            for (worker, path) in control_paths(&directory) {
                if !known.insert(worker) {
                    continue;
                }
                if ports.contains(&worker) {
                    tokio::spawn(self.clone().keep(worker, path));
                } else {
                    tracing::warn!(%worker, "the switch has no port for this worker (workers.ports)");
                }
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    async fn keep(self, worker: WorkerId, path: PathBuf) {
        while !self.inputs.is_closed() {
            if let Err(error) = self.talk(worker, &path).await {
                tracing::debug!(%worker, %error, "worker");
            }
            let connected =
                self.senders.lock().unwrap_or_else(PoisonError::into_inner).remove(&worker).is_some();
            if connected && self.inputs.send(Input::WorkerDown(worker)).await.is_err() {
                return;
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    async fn talk(&self, worker: WorkerId, path: &Path) -> anyhow::Result<()> {
        let (mut reader, mut writer) = UnixStream::connect(path).await?.into_split();
        writer.write_all(&encode(&Request::Hello { version: VERSION, site: self.site })?).await?;
        let (requests, mut queue) = Requests::new();
        let write = async {
            while let Some(bytes) = queue.recv().await {
                writer.write_all(&bytes).await?;
                requests.written(bytes.len());
            }
            anyhow::Ok(())
        };
        let read = async {
            let mut decoder = FrameDecoder::<Event>::new();
            let mut buffer = vec![0; 256 << 10];
            loop {
                let len = reader.read(&mut buffer).await?;
                anyhow::ensure!(len > 0, "the worker closed the connection");
                decoder.push(&buffer[..len]);
                while let Some(event) = decoder.next()? {
                    self.take(worker, event, &requests).await?;
                }
            }
        };
        tokio::select! {
            result = write => result,
            result = read => result,
            () = requests.overflow.notified() => {
                tracing::warn!(%worker, "the worker does not read what it is told, and is disconnected");
                anyhow::bail!("{REQUESTS_LEN_MAX} bytes wait for it")
            }
            () = requests.end.notified() => anyhow::bail!("it was given up"),
        }
    }

    async fn take(&self, worker: WorkerId, event: Event, requests: &Requests) -> anyhow::Result<()> {
        #[expect(clippy::wildcard_enum_match_arm, reason = "all but the first message are for the core")]
        let input = match event {
            Event::Hello { version, worker: theirs, boot, .. } => {
                anyhow::ensure!(version == VERSION, "worker speaks version {version}, the agent {VERSION}");
                anyhow::ensure!(theirs == worker, "worker {theirs} listens where worker {worker} should");
                self.senders.lock().unwrap_or_else(PoisonError::into_inner).insert(worker, requests.clone());
                Input::WorkerUp { worker, boot }
            }
            other => Input::Worker(worker, other),
        };
        Ok(self.inputs.send(input).await?)
    }
}
