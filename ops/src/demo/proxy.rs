//! A Unix stream proxy that can be cut: it stands between an agent and its switch, so that the demo can take the controller
//! connection away and give it back.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Notify;

/// A proxy in front of one socket.
#[derive(Clone)]
pub(super) struct Proxy {
    open: Arc<AtomicBool>,
    cut: Arc<Notify>,
}

impl Proxy {
    /// Listens at `from` and connects each client to `to`.
    ///
    /// # Errors
    /// When the socket cannot be bound.
    pub(super) fn start(from: &PathBuf, to: PathBuf) -> std::io::Result<Self> {
        let listener = UnixListener::bind(from)?;
        let proxy = Self { open: Arc::new(AtomicBool::new(true)), cut: Arc::new(Notify::new()) };
        let accepting = proxy.clone();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                if accepting.open.load(Ordering::SeqCst) {
                    tokio::spawn(accepting.clone().carry(client, to.clone()));
                }
            }
        });
        Ok(proxy)
    }

    async fn carry(self, mut client: UnixStream, to: PathBuf) {
        let Ok(mut server) = UnixStream::connect(&to).await else { return };
        tokio::select! {
            _ = tokio::io::copy_bidirectional(&mut client, &mut server) => {}
            () = self.cut.notified() => {}
        }
    }

    /// Ends all connections and lets none through for a while.
    pub(super) async fn cut_for(&self, time: Duration) {
        self.open.store(false, Ordering::SeqCst);
        self.cut.notify_waiters();
        tokio::time::sleep(time).await;
        self.open.store(true, Ordering::SeqCst);
    }
}
