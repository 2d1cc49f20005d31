//! The driver of one switch on a socket: connects, connects again, and carries commands and events.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::{Buf, BytesMut};
use flow::Micros;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::time::Instant;

use crate::core::driver::{Answer, Driver, Event, Output, Proof, Query, QueryId};
use crate::core::rules::{PacketOut, PortNo, RuleSet};
use crate::net::{self, Stream};
use crate::ofp::{self, FlowStats, HEADER_LEN, Header, PortStats, TableStats};
use crate::ovs;

pub use crate::core::driver::DriverError;
pub use crate::net::SwitchAddr;

/// How the session learns that rules are in force.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum InForce {
    /// They are when the barrier is answered: the embedded switch.
    #[default]
    Barrier,
    /// `ovs-vswitchd` of this machine is asked over its control socket: a socket, or the run directory in which it is,
    /// since its name changes with each start of the daemon.
    Control(PathBuf),
    /// Open vSwitch elsewhere: probe packets leave by one port and come in by another.
    Probe {
        /// Where probes leave.
        out: PortNo,
        /// Where they come in: the other end of the same link.
        back: PortNo,
    },
}

impl InForce {
    /// What the driver has to do for it.
    #[must_use]
    pub fn proof(&self) -> Proof {
        match *self {
            Self::Barrier => Proof::Barrier,
            Self::Control(_) => Proof::Sweeps,
            Self::Probe { out, back } => Proof::Probe { out, back },
        }
    }
}

/// How to behave.
#[derive(Clone, Debug)]
pub struct SessionOptions {
    /// Pause before the second attempt to connect; it doubles with each, up to `backoff_max`.
    pub backoff_min: Duration,
    /// Longest pause between attempts.
    pub backoff_max: Duration,
    /// How to learn that rules are in force.
    pub in_force: InForce,
}

impl Default for SessionOptions {
    fn default() -> Self {
        Self {
            backoff_min: Duration::from_millis(20),
            backoff_max: Duration::from_secs(1),
            in_force: InForce::Barrier,
        }
    }
}

/// What happened at the switch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SwitchEvent {
    /// The switch is there and its rules were read. Packets sent before may be lost: send markers again.
    Connected {
        /// Datapath id.
        datapath: u64,
        /// Rules that it had.
        rules: usize,
    },
    /// The switch is gone; it keeps its rules, and the session tries to connect again.
    Disconnected,
    /// Nothing was heard of the switch for so long, though it was asked: it is stopped, or hangs. Told at
    /// [`SILENCE_BOUND`](crate::core::driver::SILENCE_BOUND) and again twice a second, until it answers or is disconnected.
    Silent(Duration),
    /// A switch that was silent answers again.
    Answering,
    /// The datapath follows the rules with this tag, and so all that were set before.
    InForce {
        /// As it was set.
        tag: u64,
        /// How many rules had to change.
        changes: usize,
    },
    /// Something was refused; see [`DriverError`] for what happens next.
    Error(DriverError),
}

/// Why there are no statistics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QueryError {
    /// There is no connection, or it ended before the answer, or the switch refused. Ask again later.
    #[error("the switch is not connected or did not answer")]
    Unavailable,
}

/// Commands that may wait for the session. It takes them at once, except while it connects or nobody reads its events.
const COMMANDS_MAX: usize = 1_024;

#[derive(Debug)]
enum Command {
    Rules(Arc<RuleSet>, u64),
    Packets(Vec<PacketOut>),
    Query(Query, oneshot::Sender<Answer>),
    Resync(oneshot::Sender<Answer>),
}

/// Commands on their way from handles, which never wait, to the session.
#[derive(Debug, Default)]
struct Mailbox {
    commands: Mutex<VecDeque<Command>>,
    arrived: Notify,
    closed: AtomicBool,
}

impl Mailbox {
    fn lock(&self) -> std::sync::MutexGuard<'_, VecDeque<Command>> {
        self.commands.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, command: Command) {
        let mut commands = self.lock();
        if commands.len() >= COMMANDS_MAX {
            make_room(&mut commands);
        }
        commands.push_back(command);
        drop(commands);
        self.arrived.notify_one();
    }

    /// The next command; `None` once all handles are gone and their commands taken. Nothing is lost when this is dropped.
    async fn next(&self) -> Option<Command> {
        loop {
            if let Some(command) = self.lock().pop_front() {
                return Some(command);
            }
            if self.closed.load(Ordering::Acquire) {
                return None;
            }
            self.arrived.notified().await;
        }
    }
}

/// Of rules only the last are wanted. If that is not enough the older half goes: packets are sent again once the switch
/// is there, and who asked hears that there is no answer.
fn make_room(commands: &mut VecDeque<Command>) {
    let last = commands.iter().rposition(|command| matches!(command, Command::Rules(..)));
    let mut at = 0..;
    commands.retain(|command| at.next() == last || !matches!(command, Command::Rules(..)));
    let excess = commands.len().saturating_sub(COMMANDS_MAX / 2);
    if excess > 0 && commands.len() >= COMMANDS_MAX - 1 {
        tracing::warn!(excess, "the switch does not keep up: packets and questions to it are dropped");
        let mut left = excess;
        commands.retain(|command| {
            let kept = left == 0 || matches!(command, Command::Rules(..));
            left -= usize::from(!kept);
            kept
        });
    }
}

/// Ends the session when the last handle is dropped.
#[derive(Debug)]
struct Closer(Arc<Mailbox>);

impl Drop for Closer {
    fn drop(&mut self) {
        self.0.closed.store(true, Ordering::Release);
        self.0.arrived.notify_one();
    }
}

/// Commands one switch. Clones command the same; when the last is dropped the session ends, and the switch
/// keeps its rules.
#[derive(Clone, Debug)]
pub struct SwitchHandle {
    commands: Arc<Closer>,
}

impl SwitchHandle {
    /// Sets the whole set of wanted rules; [`SwitchEvent::InForce`] answers with the tag of this or of a later set.
    pub fn set_rules(&self, rules: Arc<RuleSet>, tag: u64) {
        self.command(Command::Rules(rules, tag));
    }

    /// Sends packets in order, after the rules that were set before are in force.
    pub fn packet_out(&self, packets: Vec<PacketOut>) {
        self.command(Command::Packets(packets));
    }

    /// Counters of all ports.
    ///
    /// # Errors
    /// [`QueryError::Unavailable`].
    pub async fn port_stats(&self) -> Result<Vec<PortStats>, QueryError> {
        match self.ask(Query::Ports).await {
            Some(Answer::Ports(list)) => Ok(list),
            _ => Err(QueryError::Unavailable),
        }
    }

    /// All rules with counters.
    ///
    /// # Errors
    /// [`QueryError::Unavailable`].
    pub async fn flow_stats(&self) -> Result<Vec<FlowStats>, QueryError> {
        match self.ask(Query::Flows).await {
            Some(Answer::Flows(list)) => Ok(list),
            _ => Err(QueryError::Unavailable),
        }
    }

    /// Counters of all tables.
    ///
    /// # Errors
    /// [`QueryError::Unavailable`].
    pub async fn table_stats(&self) -> Result<Vec<TableStats>, QueryError> {
        match self.ask(Query::Tables).await {
            Some(Answer::Tables(list)) => Ok(list),
            _ => Err(QueryError::Unavailable),
        }
    }

    /// Reads the rules that the switch has, mends those that are not as wanted, and says how many when they are in force.
    ///
    /// # Errors
    /// [`QueryError::Unavailable`], also when no rules were set yet or the switch refused them.
    pub async fn resync(&self) -> Result<usize, QueryError> {
        match self.ask_with(Command::Resync).await {
            Some(Answer::Resynced(changes)) => Ok(changes),
            _ => Err(QueryError::Unavailable),
        }
    }

    async fn ask(&self, query: Query) -> Option<Answer> {
        self.ask_with(|answer| Command::Query(query, answer)).await
    }

    async fn ask_with(&self, command: impl FnOnce(oneshot::Sender<Answer>) -> Command) -> Option<Answer> {
        let (answer, answered) = oneshot::channel();
        self.command(command(answer));
        answered.await.ok()
    }

    fn command(&self, command: Command) {
        self.commands.0.push(command);
    }
}

/// The task that drives one switch.
#[derive(Debug)]
pub struct Session {
    target: SwitchAddr,
    options: SessionOptions,
    commands: Arc<Mailbox>,
    events: mpsc::Sender<SwitchEvent>,
    driver: Driver,
    answers: Vec<(QueryId, oneshot::Sender<Answer>)>,
    next_query: u64,
    started: Instant,
    settled: (mpsc::Sender<u64>, mpsc::Receiver<u64>),
}

/// Why a connection was left.
enum Left {
    /// It ended, or was closed on purpose.
    Lost,
    /// Nobody commands any more.
    Unwanted,
}

impl Session {
    /// Starts to drive a switch, which need not be there yet. Must be called inside a tokio runtime. Events that
    /// nobody reads hold up the session, not the switch.
    #[must_use]
    pub fn spawn(target: SwitchAddr, options: SessionOptions) -> (SwitchHandle, mpsc::Receiver<SwitchEvent>) {
        let commands = Arc::new(Mailbox::default());
        let (events, event_source) = mpsc::channel(1_024);
        let driver = Driver::new(options.in_force.proof());
        let session = Self {
            target,
            options,
            commands: commands.clone(),
            events,
            driver,
            answers: Vec::new(),
            next_query: 0,
            started: Instant::now(),
            settled: mpsc::channel(SETTLED_MAX),
        };
        tokio::spawn(session.run());
        (SwitchHandle { commands: Arc::new(Closer(commands)) }, event_source)
    }

    async fn run(mut self) {
        let mut pause = self.options.backoff_min;
        loop {
            match net::connect(&self.target).await {
                Ok(mut stream) => {
                    let began = Instant::now();
                    if matches!(self.serve(&mut *stream).await, Left::Unwanted) {
                        return;
                    }
                    self.driver.handle_disconnected();
                    self.tell(&mut BytesMut::new()).await;
                    // A switch that accepts and hangs up is one that is not there.
                    if began.elapsed() > self.options.backoff_max {
                        pause = self.options.backoff_min;
                    }
                }
                Err(error) => tracing::debug!(%error, target = %self.target, "switch not reached"),
            }
            if self.pause(pause).await.is_none() {
                return;
            }
            pause = (pause * 2).min(self.options.backoff_max);
        }
    }

    /// Waits, still taking commands; `None` when nobody commands any more.
    async fn pause(&mut self, pause: Duration) -> Option<()> {
        let until = Instant::now() + pause;
        loop {
            tokio::select! {
                () = tokio::time::sleep_until(until) => return Some(()),
                command = self.commands.next() => self.command(command?),
            }
            self.tell(&mut BytesMut::new()).await;
        }
    }

    /// Microseconds since the session began; the driver's clock.
    fn now(&self) -> Micros {
        Micros(u64::try_from(self.started.elapsed().as_micros()).unwrap_or(u64::MAX))
    }

    fn command(&mut self, command: Command) {
        let now = self.now();
        match command {
            Command::Rules(rules, tag) => self.driver.set_rules(rules, tag, now),
            Command::Packets(packets) => self.driver.packet_out(packets, now),
            Command::Query(query, answer) => {
                let id = self.asked(answer);
                self.driver.query(id, query);
            }
            Command::Resync(answer) => {
                let id = self.asked(answer);
                self.driver.resync(id, now);
            }
        }
    }

    fn asked(&mut self, answer: oneshot::Sender<Answer>) -> QueryId {
        let id = QueryId(self.next_query);
        self.next_query += 1;
        self.answers.push((id, answer));
        id
    }

    async fn serve(&mut self, stream: &mut dyn Stream) -> Left {
        self.driver.handle_connected(self.now());
        let (mut reader, mut writer) = tokio::io::split(stream);
        let (mut input, mut output) = (BytesMut::with_capacity(64 << 10), BytesMut::new());
        let mut unflushed = false;
        loop {
            if !self.tell(&mut output).await {
                return Left::Lost;
            }
            let wake = self.driver.poll_timeout().unwrap_or(Micros(u64::MAX >> 1));
            let wake = self.started + Duration::from_micros(wake.0.min(u64::from(u32::MAX) * 1_000_000));
            tokio::select! {
                // Reading goes on while much is to be written, else two full sockets wait for one another.
                read = reader.read_buf(&mut input) => match read {
                    Ok(1..) => if self.received(&mut input).is_err() { return Left::Lost },
                    Ok(0) | Err(_) => return Left::Lost,
                },
                written = write_or_flush(&mut writer, &output), if !output.is_empty() || unflushed => match written {
                    Ok(count) => {
                        unflushed = !output.is_empty();
                        output.advance(count);
                    }
                    Err(_) => return Left::Lost,
                },
                command = self.commands.next() => match command {
                    Some(command) => self.command(command),
                    None => return Left::Unwanted,
                },
                Some(number) = self.settled.1.recv() => self.driver.handle_settled(number, self.now()),
                () = tokio::time::sleep_until(wake) => {
                    // What has come counts before time does: this process may have stood still itself.
                    match tokio::time::timeout(Duration::ZERO, reader.read_buf(&mut input)).await {
                        Ok(Ok(1..)) => if self.received(&mut input).is_err() { return Left::Lost },
                        Ok(Ok(0) | Err(_)) => return Left::Lost,
                        Err(_) => {}
                    }
                    self.driver.handle_timeout(self.now());
                }
            }
        }
    }

    /// Hands whole messages to the driver.
    fn received(&mut self, input: &mut BytesMut) -> Result<(), ofp::DecodeError> {
        let mut at = 0;
        while let Some(header) = Header::peek(&input[at..]) {
            if header.len < HEADER_LEN {
                return Err(ofp::DecodeError::RecordLength(header.len));
            }
            let Some(bytes) = input.get(at..at + header.len) else { break };
            let now = self.now();
            match ofp::decode(bytes) {
                Ok((xid, message)) => self.driver.handle_message(xid, message, now),
                Err(ofp::DecodeError::Unsupported(what)) => {
                    tracing::debug!(%what, "the switch said something that is not understood");
                    self.driver.handle_unreadable(header.xid, now);
                }
                Err(error) => {
                    tracing::warn!(%error, "the switch sent an invalid message");
                    return Err(error);
                }
            }
            at += header.len;
        }
        input.advance(at);
        Ok(())
    }

    /// Carries out what the driver wants; false when the connection is to be closed.
    async fn tell(&mut self, output: &mut BytesMut) -> bool {
        while let Some(next) = self.driver.poll_output() {
            match next {
                Output::Send(xid, message) => output.extend_from_slice(&ofp::encode(xid, &message)),
                Output::Settle(number) => self.settle(number),
                Output::Close => return false,
                Output::Event(event) => self.event(event).await,
            }
        }
        true
    }

    async fn event(&mut self, event: Event) {
        let event = match event {
            Event::Connected { datapath, rules } => SwitchEvent::Connected { datapath, rules },
            Event::Disconnected => SwitchEvent::Disconnected,
            Event::Silent(span) => SwitchEvent::Silent(Duration::from_micros(span.0)),
            Event::Answering => SwitchEvent::Answering,
            Event::InForce { tag, changes } => SwitchEvent::InForce { tag, changes },
            Event::Error(error) => SwitchEvent::Error(error),
            Event::Answer(id, answer) => {
                if let Some(at) = self.answers.iter().position(|(asked, _)| *asked == id) {
                    // Whoever asked may have gone.
                    let _ = self.answers.swap_remove(at).1.send(answer);
                }
                return;
            }
        };
        if self.events.send(event).await.is_err() {
            tracing::debug!("nobody reads the events of this switch");
        }
    }

    fn settle(&mut self, number: u64) {
        let InForce::Control(path) = self.options.in_force.clone() else {
            return self.driver.handle_settled(number, self.now());
        };
        let settled = self.settled.0.clone();
        tokio::spawn(async move {
            // Unanswered, the rule is reported late rather than never.
            if let Err(error) = ovs::revalidator_wait(&path).await {
                tracing::warn!(%error, path = %path.display(), "ovs-vswitchd did not confirm its datapath");
                tokio::time::sleep(OVS_WAIT_INSTEAD).await;
            }
            // Who waited may have gone.
            let _ = settled.send(number).await;
        });
    }
}

/// Writes what can be written, and without bytes flushes: TLS may keep what it took. Either can be cancelled without
/// loss, both in one could not.
async fn write_or_flush(writer: &mut (impl AsyncWriteExt + Unpin), bytes: &[u8]) -> std::io::Result<usize> {
    if bytes.is_empty() { writer.flush().await.map(|()| 0) } else { writer.write(bytes).await }
}

/// Confirmations that wait for the session; more wait in the tasks that asked for them, of which the driver has few.
const SETTLED_MAX: usize = 16;
/// What is waited instead when it cannot be asked: its revalidators run at least twice a second.
const OVS_WAIT_INSTEAD: Duration = Duration::from_millis(1_000);

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(tag: u64) -> Command {
        Command::Rules(Arc::default(), tag)
    }

    async fn taken(mailbox: &Mailbox) -> Vec<Command> {
        let mut taken = Vec::new();
        while !mailbox.lock().is_empty() {
            taken.extend(mailbox.next().await);
        }
        taken
    }

    #[tokio::test]
    async fn commands_are_taken_in_order_until_the_last_handle_is_gone() {
        let mailbox = Arc::new(Mailbox::default());
        let closer = Closer(mailbox.clone());
        for command in [rules(1), Command::Packets(Vec::new()), rules(2)] {
            mailbox.push(command);
        }
        drop(closer);
        assert!(matches!(mailbox.next().await, Some(Command::Rules(_, 1))));
        assert!(matches!(mailbox.next().await, Some(Command::Packets(_))));
        assert!(matches!(mailbox.next().await, Some(Command::Rules(_, 2))));
        assert!(mailbox.next().await.is_none());
    }

    #[tokio::test]
    async fn a_session_that_takes_nothing_keeps_the_newest_rules_and_a_bounded_rest() {
        let mailbox = Mailbox::default();
        (0..10 * COMMANDS_MAX as u64).for_each(|tag| mailbox.push(rules(tag)));
        let left = taken(&mailbox).await;
        assert!(left.len() <= COMMANDS_MAX);
        assert!(matches!(left.last(), Some(Command::Rules(_, tag)) if *tag == 10 * COMMANDS_MAX as u64 - 1));

        mailbox.push(rules(7));
        (0..10 * COMMANDS_MAX).for_each(|_| mailbox.push(Command::Packets(Vec::new())));
        let left = taken(&mailbox).await;
        assert!(left.len() <= COMMANDS_MAX);
        assert!(left.iter().any(|command| matches!(command, Command::Rules(_, 7))));
    }
}
