//! The driver of a switch that says what it likes.

use std::sync::Arc;

use flow::Micros;
use switchctl::core::driver::{Driver, Output, Query, QueryId};
use switchctl::ofp::{self, BundleControl, Message, Reply};
use switchctl::{Action, Match, PacketOut, PortNo, Proof, Rule, RuleKey, RuleSet};

use super::mend_header;

/// Steps of one script.
const STEPS_MAX: usize = 200;
/// Outputs of one step: far more than the rules and packets of a script make.
const OUTPUTS_MAX: usize = 10_000;

/// The first byte chooses the proof; then each byte says what happens next, some with bytes behind it.
pub fn driver(bytes: &[u8]) {
    let mut script = Script(bytes);
    let Some(first) = script.byte() else { return };
    let proof = match first % 3 {
        0 => Proof::Barrier,
        1 => Proof::Sweeps,
        _ => Proof::Probe { out: PortNo(3), back: PortNo(4) },
    };
    let mut play =
        Play { driver: Driver::new(proof), now: Micros(0), sent: Vec::new(), settle: 0, connected: false };
    for _ in 0..STEPS_MAX {
        let Some(step) = script.byte() else { return };
        play.step(step, &mut script);
        play.drain();
    }
}

struct Play {
    driver: Driver,
    now: Micros,
    /// What the driver sent on this connection, newest last.
    sent: Vec<(u32, Message)>,
    settle: u64,
    connected: bool,
}

impl Play {
    fn step(&mut self, step: u8, script: &mut Script<'_>) {
        let now = self.now;
        match step % 16 {
            0 => self.driver.set_rules(Arc::new(rules(script.byte().unwrap_or(0))), step.into(), now),
            1 => {
                let packet =
                    PacketOut { bytes: vec![0; 60], in_port: PortNo::CONTROLLER, actions: Vec::new() };
                self.driver.packet_out(vec![packet], now);
            }
            2 => self.driver.query(QueryId(step.into()), Query::Flows),
            3 => self.driver.query(QueryId(step.into()), Query::Ports),
            4 => self.driver.resync(QueryId(step.into()), now),
            5 => self.driver.handle_settled(self.settle, now),
            6 => self.pass(Micros(1 << (script.byte().unwrap_or(0) % 32))),
            7 if self.connected => self.disconnected(),
            7 => {}
            _ if !self.connected => {
                self.connected = true;
                self.driver.handle_connected(now);
            }
            8 => {
                let mut bytes = script.bytes();
                mend_header(&mut bytes);
                match ofp::decode(&bytes) {
                    Ok((xid, message)) => self.driver.handle_message(xid, message, now),
                    Err(_) => self.driver.handle_unreadable(self.xid(script), now),
                }
            }
            9 => {
                // Something that makes sense, for the wrong request.
                let mut bytes = script.bytes();
                mend_header(&mut bytes);
                if let Ok((_, message)) = ofp::decode(&bytes) {
                    self.driver.handle_message(self.xid(script), message, now);
                }
            }
            _ => self.answer(script),
        }
    }

    /// Time passes; what is due then is done, and is not due again at once.
    fn pass(&mut self, span: Micros) {
        self.now = self.now.plus(span);
        for _ in 0..8 {
            if self.driver.poll_timeout().is_none_or(|at| at > self.now) {
                return;
            }
            self.driver.handle_timeout(self.now);
            self.drain();
        }
        panic!("a timeout is due again and again");
    }

    fn disconnected(&mut self) {
        self.connected = false;
        self.sent.clear();
        self.driver.handle_disconnected();
    }

    fn drain(&mut self) {
        for _ in 0..OUTPUTS_MAX {
            match self.driver.poll_output() {
                Some(Output::Send(xid, message)) => {
                    let written = ofp::encode(xid, &message);
                    assert!(ofp::decode(&written).is_ok(), "the driver sends what cannot be read");
                    self.sent.push((xid, message));
                }
                Some(Output::Settle(number)) => self.settle = number,
                Some(Output::Close) => self.disconnected(),
                Some(Output::Event(_)) => {}
                None => return,
            }
        }
        panic!("the driver never comes to an end");
    }

    /// One of the last messages.
    fn xid(&self, script: &mut Script<'_>) -> u32 {
        let back = usize::from(script.byte().unwrap_or(0)) % 8;
        self.sent.iter().rev().nth(back).map_or(0, |(xid, _)| *xid)
    }

    /// The answer of a sound switch without rules to one of the last messages.
    fn answer(&mut self, script: &mut Script<'_>) {
        let xid = self.xid(script);
        let Some((_, message)) = self.sent.iter().rfind(|(sent, _)| *sent == xid) else { return };
        let answer = match message {
            Message::Hello { .. } => Message::hello(),
            Message::FeaturesRequest => {
                Message::FeaturesReply { datapath: 1, buffers: 0, tables: 8, capabilities: 7 }
            }
            Message::BarrierRequest => Message::BarrierReply,
            Message::MultipartRequest(_) => {
                Message::MultipartReply { reply: Reply::Flows(Vec::new()), more: false }
            }
            Message::BundleControl { bundle, flags, control } => {
                let control = match control {
                    BundleControl::CommitRequest => BundleControl::CommitReply,
                    BundleControl::DiscardRequest => BundleControl::DiscardReply,
                    BundleControl::OpenRequest => BundleControl::OpenReply,
                    _ => BundleControl::CloseReply,
                };
                Message::BundleControl { bundle: *bundle, control, flags: *flags }
            }
            _ => Message::EchoReply(Vec::new()),
        };
        self.driver.handle_message(xid, answer, self.now);
    }
}

/// As many rules as there are ones in `bits`.
fn rules(bits: u8) -> RuleSet {
    let rule = |port: u32| {
        let key = RuleKey { table: 0, priority: 7, matches: Match::any().in_port(PortNo(port)) };
        (key, Rule { cookie: 1, actions: vec![Action::Output(PortNo(9))], goto: None })
    };
    (0..8).filter(|port| bits >> port & 1 != 0).map(rule).collect()
}

struct Script<'a>(&'a [u8]);

impl Script<'_> {
    fn byte(&mut self) -> Option<u8> {
        let (&first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(first)
    }

    fn bytes(&mut self) -> Vec<u8> {
        let len = usize::from(self.byte().unwrap_or(0)).min(self.0.len());
        let (taken, rest) = self.0.split_at(len);
        self.0 = rest;
        taken.to_vec()
    }
}
