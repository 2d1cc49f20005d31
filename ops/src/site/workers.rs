//! Control sockets of the workers: found in a directory, connected while they answer.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use dataplane::control::codec::{FrameDecoder, encode};
use dataplane::control::{Event, Request, VERSION};
use flow::{SiteId, WorkerId};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::mpsc;

use super::core::Input;
use super::shell::control_paths;

/// Between two looks into the directory, and two attempts to connect.
const LOOK: Duration = Duration::from_millis(100);

type Senders = Arc<Mutex<BTreeMap<WorkerId, mpsc::UnboundedSender<Vec<u8>>>>>;

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
        if let Some(sender) = senders.get(&worker) {
            let _ = sender.send(bytes);
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
        let (sender, mut queue) = mpsc::unbounded_channel::<Vec<u8>>();
        let write = async {
            while let Some(bytes) = queue.recv().await {
                writer.write_all(&bytes).await?;
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
                    self.take(worker, event, &sender).await?;
                }
            }
        };
        tokio::select! { result = write => result, result = read => result }
    }

    async fn take(
        &self,
        worker: WorkerId,
        event: Event,
        sender: &mpsc::UnboundedSender<Vec<u8>>,
    ) -> anyhow::Result<()> {
        #[expect(clippy::wildcard_enum_match_arm, reason = "all but the first message are for the core")]
        let input = match event {
            Event::Hello { version, worker: theirs, boot, .. } => {
                anyhow::ensure!(version == VERSION, "worker speaks version {version}, the agent {VERSION}");
                anyhow::ensure!(theirs == worker, "worker {theirs} listens where worker {worker} should");
                self.senders.lock().unwrap_or_else(PoisonError::into_inner).insert(worker, sender.clone());
                Input::WorkerUp { worker, boot }
            }
            other => Input::Worker(worker, other),
        };
        Ok(self.inputs.send(input).await?)
    }
}
