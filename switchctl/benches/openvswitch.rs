//! Open vSwitch with its userspace datapath, driven by the session: rule updates per second; time of one atomic bundle of
//! 1,000 and 10,000 changes beside `ovs-ofctl --bundle`; time from a flip to in force; and 10,000 and 100,000 rules:
//! loading them, comparing them, moving one group among them. The dummy ports carry nothing; the revalidators run. Skipped
//! where Open vSwitch is not installed.
#![expect(clippy::print_stdout, reason = "a bench prints its figures")]
#![expect(clippy::unwrap_used, reason = "a bench that cannot run stops")]
#![expect(clippy::disallowed_methods, reason = "a bench measures time")]

#[path = "../tests/ovs/mod.rs"]
mod ovs;

use std::fmt::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ovs::{Datapath, OpenVswitch};
use switchctl::{
    Action, InForce, Match, PortNo, Rule, RuleKey, RuleSet, Session, SessionOptions, SwitchAddr, SwitchEvent,
    SwitchHandle, diff,
};
use tokio::sync::mpsc;

/// Rules by source /32, as steering has them at its worst; the port is what a move changes.
fn rules(count: u32, port: u32) -> RuleSet {
    (0..count).map(|number| rule(number, port)).collect()
}

fn rule(number: u32, port: u32) -> (RuleKey, Rule) {
    let prefix = flow::Prefix::new(std::net::Ipv4Addr::from(0x6440_0000 + number).into(), 32).unwrap();
    let key = RuleKey { table: 1, priority: 1_032, matches: Match::any().ip_src(&prefix) };
    (key, Rule { cookie: u64::from(number), actions: vec![Action::Output(PortNo(port))], goto: None })
}

struct Driven {
    switch: SwitchHandle,
    events: mpsc::Receiver<SwitchEvent>,
    tag: u64,
}

impl Driven {
    fn new(ovs: &OpenVswitch, in_force: InForce) -> Self {
        let options = SessionOptions { in_force, ..SessionOptions::default() };
        let (switch, events) = Session::spawn(SwitchAddr::Unix(ovs.path("br0.mgmt")), options);
        Self { switch, events, tag: 0 }
    }

    /// Time until a set of rules is in force, and how many changes that took.
    async fn set(&mut self, rules: Arc<RuleSet>) -> (Duration, usize) {
        self.tag += 1;
        let began = Instant::now();
        self.switch.set_rules(rules, self.tag);
        loop {
            match self.events.recv().await.unwrap() {
                SwitchEvent::InForce { tag, changes } if tag == self.tag => {
                    return (began.elapsed(), changes);
                }
                SwitchEvent::Error(error) => panic!("{error}"),
                SwitchEvent::Connected { .. }
                | SwitchEvent::Disconnected
                | SwitchEvent::InForce { .. }
                | SwitchEvent::Silent(_)
                | SwitchEvent::Answering => {}
            }
        }
    }
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

fn ms(time: Duration) -> String {
    format!("{:.2} ms", time.as_secs_f64() * 1e3)
}

/// One bundle of `count` changes by the session and by `ovs-ofctl`, each ten times.
async fn bundles(ovs: &OpenVswitch, count: u32) {
    let mut driven = Driven::new(ovs, InForce::Barrier);
    driven.set(Arc::new(RuleSet::new())).await;
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for round in 0..10 {
        let (time, changes) = driven.set(Arc::new(rules(count, 100 + round % 2))).await;
        assert_eq!(changes, count as usize);
        ours.push(time);
    }
    drop(driven);
    let bridge = format!("unix:{}", ovs.path("br0.mgmt").display());
    for round in 0..10u32 {
        let text = (0..count).fold(String::new(), |mut text, number| {
            let address = std::net::Ipv4Addr::from(0x6440_0000 + number);
            writeln!(
                text,
                "table=1,priority=1032,ip,nw_src={address},cookie={number},actions=output:{}",
                102 + round % 2
            )
            .unwrap();
            text
        });
        std::fs::write(ovs.path("flows"), text).unwrap();
        let file = ovs.path("flows").display().to_string();
        let began = Instant::now();
        ovs.ofctl(&["add-flows", &bridge, &file, "--bundle"]);
        theirs.push(began.elapsed());
    }
    let (ours, theirs) = (median(ours), median(theirs));
    println!(
        "one atomic bundle of {count} changes to the barrier: {} ({:.0} changes/s); ovs-ofctl --bundle, with its start and \
         its parsing: {}",
        ms(ours),
        f64::from(count) / ours.as_secs_f64(),
        ms(theirs),
    );
}

/// One group among `count` rules moves to and fro.
async fn moves(ovs: &OpenVswitch, count: u32, proof: (&str, InForce)) {
    let mut driven = Driven::new(ovs, proof.1);
    driven.set(Arc::new(RuleSet::new())).await;
    let all = rules(count, 100);
    let (load, _) = driven.set(Arc::new(all.clone())).await;
    let (mut times, mut compares) = (Vec::new(), Vec::new());
    for round in 0..20 {
        let mut moved = all.clone();
        moved.extend([rule(count / 2, 101 + round % 2)]);
        let (moved, before) = (Arc::new(moved), Instant::now());
        let changes = diff(&all, &moved);
        compares.push(before.elapsed());
        assert_eq!(changes.len(), 1);
        let (time, changes) = driven.set(moved).await;
        assert_eq!(changes, 1);
        times.push(time);
    }
    let began = Instant::now();
    assert_eq!(driven.switch.resync().await, Ok(0));
    let resync = began.elapsed();
    println!(
        "{count} rules, in force by {}: load {}; compare in memory {}; one group flipped and in force {}; read from the switch \
         and compared {}",
        proof.0,
        ms(load),
        ms(median(compares)),
        ms(median(times)),
        ms(resync),
    );
}

fn main() {
    let Some(ovs) = OpenVswitch::start(Datapath::Dummy, None) else {
        return ovs::skip("bench of Open vSwitch", "it is not installed");
    };
    ovs.dummy_bridge(&[("w0", 100), ("w1", 101), ("w2", 102), ("w3", 103), ("out", 90), ("back", 91)]);
    ovs.vsctl(&["set", "interface", "back", "options:pstream=punix:link"]);
    ovs.wait_for("link");
    ovs.vsctl(&["set", "interface", "out", "options:stream=unix:link"]);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        for count in [1_000, 10_000] {
            bundles(&ovs, count).await;
        }
        for count in [1, 10_000, 100_000] {
            let proofs = [
                ("barrier alone", InForce::Barrier),
                ("two sweeps", InForce::Control(ovs.path("vs.ctl"))),
                ("probes", InForce::Probe { out: PortNo(90), back: PortNo(91) }),
            ];
            for proof in proofs {
                moves(&ovs, count, proof).await;
            }
        }
    });
}
