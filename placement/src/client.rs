//! What a site's agent uses: proposals that outlive leaders, a watch that outlives nodes, reports.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use flow::Micros;

use crate::clock::Clock;
use crate::core::{Command, Outcome, Probe, SiteReport};
use crate::node::{ClientRequest, ClientResponse, NodeId, ProposeError, Transport};
use crate::notices::Notices;
use crate::raft::Changes;
use crate::twins::draw_run;
use crate::{pack, wire};

/// How long one node may take to answer before another is asked.
const CALL_WAIT: Duration = Duration::from_secs(2);
/// How long a node may take to answer a watch beyond the time that it was to wait: a round trip, and a busy machine. Twice as long after each
/// round of all nodes without an answer, and at once where a quorum has to confirm it.
const WATCH_GRACE: Duration = Duration::from_secs(1);
/// The longest such time.
const WATCH_GRACE_MAX: Duration = Duration::from_secs(5);

/// Pause after a whole round of nodes without success; elections take longer than a second.
const PAUSE: Duration = Duration::from_millis(100);

/// A leader that has taken no report for so long is not reached directly: one of the other nodes is asked to pass on what is for it.
/// Sites report twice a second.
const UNREACHED: Duration = Duration::from_millis(1_200);

/// Of times: who sends no reports cannot tell by them whether the leader is reached.
const NEVER: u64 = u64::MAX;

/// How long nodes may take to say all there is before it is complained about: an election takes less.
const FIRST_WORD: Micros = Micros(5_000_000);

/// Pause of a site that was refused, before it asks the nodes again: until an operator adds the site nothing else comes of it.
pub const REFUSED_PAUSE: Duration = Duration::from_secs(1);

/// Why there is no outcome.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ClientError {
    /// No leader answered in time. The command may have taken effect: repeat it.
    #[error("no leader answered within {ms} ms; last: {last}")]
    Timeout {
        /// The deadline.
        ms: u64,
        /// What was heard last.
        last: String,
    },
    /// The answer is final.
    #[error(transparent)]
    Refused(ProposeError),
    /// There is nobody to ask.
    #[error("no placement nodes are configured")]
    NoMembers,
}

/// A report for one node, encoded.
#[derive(Clone, Debug)]
pub struct ReportMessage {
    bytes: Bytes,
    /// The place of the node that is to pass it on, if it is.
    passer: Option<usize>,
}

/// Talks to a group of placement nodes.
pub struct Client {
    transport: Arc<dyn Transport>,
    members: Vec<NodeId>,
    /// Place in `members` of who led last.
    leader: AtomicUsize,
    /// Place in `members` of who answered the last watch.
    watched: AtomicUsize,
    /// Place in `members` of who passes on what is for a leader that is not reached.
    passer: AtomicUsize,
    /// When the leader took a report itself last, in microseconds since `clock` began; the first report counts as taken.
    reached_us: AtomicU64,
    /// When a leader took one by any way.
    taken_us: AtomicU64,
    deadline: Duration,
    clock: Clock,
    notices: Notices,
    /// This process: two that are the same site are told from each other.
    run: u64,
}

impl Client {
    /// `members` in the order of preference, the nearest first: it answers watches while it can. The other
    /// end knows the caller by the transport's certificate.
    #[must_use]
    pub fn new(transport: Arc<dyn Transport>, members: Vec<NodeId>) -> Self {
        Self {
            transport,
            members,
            leader: AtomicUsize::new(0),
            watched: AtomicUsize::new(0),
            passer: AtomicUsize::new(0),
            reached_us: AtomicU64::new(NEVER),
            taken_us: AtomicU64::new(0),
            deadline: Duration::from_secs(10),
            clock: Clock::start(),
            notices: Notices::default(),
            run: draw_run(),
        }
    }

    /// Says once a minute, for all nodes together, that they refuse this site.
    pub fn tell_refused(&self, node: NodeId, error: &ProposeError) {
        if let Some(kept_back) = self.notices.due(&error.to_string(), self.clock.now()) {
            tracing::warn!(node, %error, kept_back, "placement refuses this site; it goes on asking");
        }
    }

    /// Says once a minute that there is nothing to begin with, if it takes longer than an election.
    fn tell_nothing_known(&self, last: &str) {
        if self.clock.now() > FIRST_WORD
            && let Some(kept_back) = self.notices.due("nothing is known", self.clock.now())
        {
            tracing::warn!(
                last,
                kept_back,
                "no placement node says, with a quorum's word, who owns which group: nothing is done before, and the switch keeps its rules"
            );
        }
    }

    /// With another deadline than 10 s for proposals.
    #[must_use]
    pub fn with_deadline(self, deadline: Duration) -> Self {
        Self { deadline, ..self }
    }

    /// Has a command committed. It is repeated until a leader answers, which commands allow.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn propose(&self, command: Command) -> Result<Outcome, ClientError> {
        self.to_leader(command, self.deadline).await
    }

    /// A sign of life, to all nodes: those that do not lead learn what they need when they come to. Not worth a long wait:
    /// the next one comes soon. What comes back is what the site should measure, within the rate that the report offers.
    ///
    /// # Errors
    /// [`ClientError`] when no leader took it.
    pub async fn report(&self, report: SiteReport) -> Result<Vec<Probe>, ClientError> {
        if self.members.is_empty() {
            return Err(ClientError::NoMembers);
        }
        let messages = self.messages(report);
        let calls =
            self.members.iter().zip(messages).map(|(&member, message)| self.report_to(member, message));
        let mut last = ClientError::NoMembers;
        for answer in futures::future::join_all(calls).await {
            match answer {
                Ok(_) => return answer,
                // A node that is behind may refuse what the leader takes.
                Err(error @ ClientError::Refused(_)) => last = error,
                Err(_) if matches!(last, ClientError::Refused(_)) => {}
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// The nodes, in the order of preference.
    #[must_use]
    pub fn members(&self) -> &[NodeId] {
        &self.members
    }

    /// A report for each member, in their order, as [`Self::report_to`] sends it. While the leader is not reached, because it is not
    /// among the members or the way to it is cut, one of them is to pass it on.
    #[must_use]
    pub fn messages(&self, report: SiteReport) -> Vec<ReportMessage> {
        let report = Box::new(report);
        let now = self.clock.now().0;
        let _ = self.reached_us.compare_exchange(NEVER, now, Ordering::Relaxed, Ordering::Relaxed);
        let passer = self.passer();
        let passed = passer.map(|at| (at, wire::encode(&ClientRequest::PassReport(report.clone()))));
        let bytes = wire::encode(&ClientRequest::Report(report));
        let message = |at: usize| match &passed {
            Some((passer, bytes)) if *passer == at => {
                ReportMessage { bytes: bytes.clone(), passer: Some(at) }
            }
            _ => ReportMessage { bytes: bytes.clone(), passer: None },
        };
        (0..self.members.len()).map(message).collect()
    }

    /// Sends a report to one node. It is the leader that takes it; others learn from it and say that they do not lead.
    ///
    /// # Errors
    /// [`ClientError::Refused`] when the report is not this site's to send, else [`ClientError::Timeout`].
    pub async fn report_to(&self, member: NodeId, message: ReportMessage) -> Result<Vec<Probe>, ClientError> {
        let wait = self.deadline.min(CALL_WAIT);
        let last = match self.call(member, message.bytes, wait).await {
            Ok(ClientResponse::Done(Ok(_))) => return Ok(self.taken(member, message.passer, Vec::new())),
            Ok(ClientResponse::Probes(probes)) => return Ok(self.taken(member, message.passer, probes)),
            Ok(ClientResponse::Done(Err(error @ ProposeError::Forbidden { .. }))) => {
                return Err(ClientError::Refused(error));
            }
            Ok(ClientResponse::Done(Err(error))) => error.to_string(),
            Ok(ClientResponse::Changes(_)) => format!("node {member} answered something else"),
            Ok(ClientResponse::Unreadable(error)) | Err(error) => error,
        };
        if let Some(at) = message.passer {
            self.passer_failed(at);
        }
        Err(ClientError::Timeout { ms: u64::try_from(wait.as_millis()).unwrap_or(u64::MAX), last })
    }

    /// Time since a leader took a report of this site, by whatever way; since this client began if none ever did.
    #[must_use]
    pub fn silence(&self) -> Duration {
        self.since(&self.taken_us)
    }

    fn since(&self, at_us: &AtomicU64) -> Duration {
        Duration::from_micros(self.clock.now().0.saturating_sub(at_us.load(Ordering::Relaxed)))
    }

    /// Who of the members is to pass on what is for the leader, if that is not reached.
    fn passer(&self) -> Option<usize> {
        let unreached = self.since(&self.reached_us) > UNREACHED && !self.members.is_empty();
        unreached.then(|| self.passer.load(Ordering::Relaxed) % self.members.len())
    }

    /// The next one is asked, unless another call had the same idea.
    fn passer_failed(&self, at: usize) {
        let next = (at + 1) % self.members.len();
        let _ = self.passer.compare_exchange(at, next, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// Who takes a report, and does not pass it on, leads. A passer may lead by now as well, which makes no difference: what it is asked
    /// to pass on it takes itself.
    fn taken(&self, member: NodeId, passer: Option<usize>, probes: Vec<Probe>) -> Vec<Probe> {
        let now = self.clock.now().0;
        self.taken_us.store(now, Ordering::Relaxed);
        if passer.is_none()
            && let Some(at) = self.members.iter().position(|&id| id == member)
        {
            self.leader.store(at, Ordering::Relaxed);
            self.reached_us.store(now, Ordering::Relaxed);
        }
        probes
    }

    /// Asks the leader itself in one round over the members, and in the next one of them after the other to pass it on.
    async fn to_leader(&self, command: Command, deadline: Duration) -> Result<Outcome, ClientError> {
        if self.members.is_empty() {
            return Err(ClientError::NoMembers);
        }
        let passed = wire::encode(&ClientRequest::PassProposal(command.clone()));
        let direct = wire::encode(&ClientRequest::Propose(command));
        let passer = self.passer();
        let mut passes = passer.is_some();
        if let Some(at) = passer {
            self.leader.store(at, Ordering::Relaxed);
        }
        let start = self.clock.now();
        let mut last = String::from("nobody answered");
        let ms = u64::try_from(deadline.as_millis()).unwrap_or(u64::MAX);
        let mut misses = 0;
        while self.clock.now().since(start).0 / 1000 < ms {
            let at = self.leader.load(Ordering::Relaxed) % self.members.len();
            let request = if passes { passed.clone() } else { direct.clone() };
            let next = match self.call(self.members[at], request, CALL_WAIT).await {
                Ok(ClientResponse::Done(Ok(outcome))) => return Ok(outcome),
                Ok(ClientResponse::Done(Err(ProposeError::NotLeader { leader }))) => {
                    last = format!("node {} does not lead", self.members[at]);
                    leader.and_then(|leader| self.members.iter().position(|&id| id == leader))
                }
                Ok(ClientResponse::Done(Err(
                    error @ (ProposeError::Timeout { .. } | ProposeError::Stopped(_)),
                ))) => {
                    last = error.to_string();
                    None
                }
                Ok(ClientResponse::Done(Err(error))) => return Err(ClientError::Refused(error)),
                Ok(ClientResponse::Changes(_) | ClientResponse::Probes(_)) => {
                    last = format!("node {} answered something else", self.members[at]);
                    None
                }
                Ok(ClientResponse::Unreadable(error)) | Err(error) => {
                    last = error;
                    None
                }
            };
            // A hint may be old: who is not the leader, or dead, is not asked again at once.
            self.leader.store(next.filter(|&next| next != at).unwrap_or(at + 1), Ordering::Relaxed);
            misses += 1;
            if misses % self.members.len() == 0 {
                passes = !passes;
                tokio::time::sleep(PAUSE).await;
            }
        }
        Err(ClientError::Timeout { ms, last })
    }

    async fn call(&self, to: NodeId, request: Bytes, wait: Duration) -> Result<ClientResponse, String> {
        let request = wire::with_run(&request, self.run);
        match tokio::time::timeout(wait, self.transport.call(to, request)).await {
            Ok(Ok(bytes)) => read(bytes).map_err(|error| error.to_string()),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err(format!("node {to} did not answer in time")),
        }
    }

    /// Changes after `since` from the first node that answers, the preferred one first; waits for them up to
    /// `wait`, and as long as it takes for any node to answer at all. 0 asks for all there is, which only a node tells
    /// that a quorum has confirmed to be up to date. To be called in a
    /// loop with the revision that came last. A node that is behind has no changes for the caller, so time never
    /// runs backwards. Once a node has failed the next is asked to answer at once: a caller that wakes after others have gone is
    /// not to wait for each of them as long as for news. Rounds over all nodes in which none has an answer are 100 ms apart at first, and 1 s in the end.
    pub async fn watch(&self, since: u64, wait: Duration) -> Changes {
        let mut pause = PAUSE;
        let mut grace = if since == 0 { WATCH_GRACE_MAX } else { WATCH_GRACE };
        let mut wait = wait;
        loop {
            let mut last = String::from("nobody answered");
            for _ in 0..self.members.len() {
                let at = self.watched.load(Ordering::Relaxed) % self.members.len();
                let wait_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
                let request = wire::encode(&ClientRequest::Watch { since, wait_ms, table: true });
                match self.call(self.members[at], request, wait + grace).await {
                    Ok(ClientResponse::Changes(changes)) => {
                        // Nothing new for a whole wait may mean that this node is cut off from the others: then
                        // the next watch asks another. Who has news, or was not to wait for any, is asked again.
                        let next = if changes.revision > since || wait.is_zero() { at } else { at + 1 };
                        self.watched.store(next, Ordering::Relaxed);
                        return changes;
                    }
                    Ok(ClientResponse::Done(Err(error @ ProposeError::Forbidden { .. }))) => {
                        self.tell_refused(self.members[at], &error);
                        pause = REFUSED_PAUSE;
                        self.watched.store(at + 1, Ordering::Relaxed);
                    }
                    Ok(ClientResponse::Done(Err(error))) => {
                        last = error.to_string();
                        self.watched.store(at + 1, Ordering::Relaxed);
                    }
                    Ok(ClientResponse::Done(Ok(_)) | ClientResponse::Probes(_)) => {
                        self.watched.store(at + 1, Ordering::Relaxed);
                    }
                    Ok(ClientResponse::Unreadable(error)) | Err(error) => {
                        last = error;
                        self.watched.store(at + 1, Ordering::Relaxed);
                    }
                }
                wait = Duration::ZERO;
            }
            if since == 0 {
                self.tell_nothing_known(&last);
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(REFUSED_PAUSE);
            grace = (grace * 2).min(WATCH_GRACE_MAX);
        }
    }
}

/// A response, with the table of groups that may be beside it.
fn read(bytes: Bytes) -> Result<ClientResponse, wire::WireError> {
    let (mut response, beside): (ClientResponse, Bytes) = wire::decode_with(bytes, wire::SNAPSHOT_LEN_MAX)?;
    if let ClientResponse::Changes(changes) = &mut response
        && !beside.is_empty()
    {
        changes.take_groups(pack::unpack(&beside)?);
    }
    Ok(response)
}

#[cfg(test)]
mod tests {
    use async_trait::async_trait;

    use super::*;
    use crate::node::TransportError;

    /// Nodes without a quorum: each answers at once that it cannot confirm anything.
    #[derive(Default)]
    struct Unconfirmed {
        asked: AtomicUsize,
    }

    #[async_trait]
    impl Transport for Unconfirmed {
        async fn call(&self, _: NodeId, _: Bytes) -> Result<Bytes, TransportError> {
            self.asked.fetch_add(1, Ordering::Relaxed);
            let answer = ClientResponse::Done(Err(ProposeError::Timeout { ms: 2_000 }));
            Ok(wire::encode(&answer))
        }
    }

    /// The first node says nothing, as one that hangs; the others have news.
    struct FirstHangs;

    #[async_trait]
    impl Transport for FirstHangs {
        async fn call(&self, to: NodeId, request: Bytes) -> Result<Bytes, TransportError> {
            let ClientRequest::Watch { since, wait_ms, .. } =
                wire::decode(request, wire::SNAPSHOT_LEN_MAX).unwrap()
            else {
                panic!()
            };
            if to == 1 {
                std::future::pending::<()>().await;
            }
            assert_eq!(wait_ms, 0, "the caller has waited already");
            let changes = Changes { revision: since, reset: false, changes: Vec::new(), more: false };
            Ok(wire::encode(&ClientResponse::Changes(changes)))
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_node_that_hangs_keeps_a_watch_a_second_longer_than_news_and_the_next_answers_at_once() {
        let client = Client::new(Arc::new(FirstHangs), vec![1, 2, 3]);
        let begun = tokio::time::Instant::now();
        assert_eq!(client.watch(7, Duration::from_secs(2)).await.revision, 7);
        assert_eq!(begun.elapsed(), Duration::from_secs(3));
        assert_eq!(client.watched.load(Ordering::Relaxed), 1, "who answered is asked again");
    }

    #[tokio::test(start_paused = true)]
    async fn nodes_that_have_no_answer_are_asked_less_and_less_often() {
        let nodes = Arc::new(Unconfirmed::default());
        let client = Client::new(nodes.clone(), vec![1, 2, 3]);
        let asked = |from: usize| nodes.asked.load(Ordering::Relaxed) - from;
        let mut watch = std::pin::pin!(client.watch(0, Duration::from_millis(500)));
        let _ = tokio::time::timeout(Duration::from_secs(1), &mut watch).await;
        let first = asked(0);
        // At 0, 0.1, 0.3 and 0.7 s.
        assert_eq!(first, 4 * 3);
        let _ = tokio::time::timeout(Duration::from_secs(59), &mut watch).await;
        assert!((58 * 3..=60 * 3).contains(&asked(first)), "{}", asked(first));
    }
}
