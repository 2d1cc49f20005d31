//! Reports to placement: a task per node, so that one that hangs delays none to the others.

use std::sync::Arc;

use placement::client::{Client, ClientError, REFUSED_PAUSE, ReportMessage};
use placement::core::SiteReport;
use tokio::sync::mpsc;

use super::prober::Prober;

/// Reports that wait for a node beside the one that is on its way: a node that is slower gets every other, not old ones.
const WAITING_MAX: usize = 1;

/// Tells all placement nodes.
pub struct Reporter {
    client: Arc<Client>,
    /// In the order of the client's members.
    nodes: Vec<mpsc::Sender<ReportMessage>>,
}

impl Reporter {
    /// Starts a task per node, each until this is dropped. Must be called inside a tokio runtime.
    #[must_use]
    pub fn start(client: &Arc<Client>, prober: &Arc<Prober>) -> Self {
        let begin = |&member: &u64| {
            let (sender, mut reports) = mpsc::channel::<ReportMessage>(WAITING_MAX);
            let (client, prober) = (client.clone(), prober.clone());
            tokio::spawn(async move {
                while let Some(report) = reports.recv().await {
                    match client.report_to(member, report).await {
                        Ok(probes) => prober.ask(probes),
                        Err(ClientError::Refused(error)) => {
                            client.tell_refused(member, &error);
                            tokio::time::sleep(REFUSED_PAUSE).await;
                            // What has waited meanwhile is old.
                            while reports.try_recv().is_ok() {}
                        }
                        Err(error) => tracing::debug!(node = member, %error, "the report was not taken"),
                    }
                }
            });
            sender
        };
        Self { nodes: client.members().iter().map(begin).collect(), client: client.clone() }
    }

    /// Sends a report to each node that has taken the one before the last; never waits.
    pub fn send(&self, report: SiteReport) {
        for (node, message) in self.nodes.iter().zip(self.client.messages(report)) {
            let _ = node.try_send(message);
        }
    }
}
