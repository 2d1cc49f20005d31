//! Chaos with whole processes: a deployment of three sites under numbered and checked traffic, operators who want things of it, and
//! faults of every kind of process and of the network between them, all drawn from a seed. Between storms all faults are healed, and
//! all must become whole again. What the docs promise is judged for the whole run, and printed as a table.
//!
//! What is tried follows from the seed alone. When it happens is real time: a strike waits for a phase of a move, a request for its
//! answer, and the machine for whoever else is busy; so a seed makes a failure likely again, not certain. Bounds grow with how late the
//! machine lets a sleeping task wake up.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
#![allow(clippy::print_stdout, reason = "its table is for people")]

mod api;
mod deployment;
mod excuse;
mod faults;
mod plan;
mod run;
mod says;
mod services;
mod usage;
mod verdict;
mod watch;

use std::time::Duration;

use run::Run;

/// How long it goes on if `CHAOS_MINUTES` does not say.
const MINUTES: u64 = 3;

fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok().filter(|text| !text.is_empty())?;
    Some(text.parse().unwrap_or_else(|_| panic!("{variable} = {text:?}: give a whole number")))
}

/// By the clock, since each run without a seed is to try something else.
fn any_seed() -> u64 {
    let since = std::time::UNIX_EPOCH.elapsed().unwrap();
    since.as_secs() % 1_000_000
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn storms_of_faults_break_no_promise() {
    let seed = number("CHAOS_SEED").unwrap_or_else(any_seed);
    let minutes = number("CHAOS_MINUTES").unwrap_or(MINUTES);
    println!("chaos for {minutes} minutes: CHAOS_SEED={seed}");
    let mut run = Run::start(seed).await;
    let directory = run.cluster.layout().directory.clone();
    run.play(seed, Duration::from_secs(minutes * 60)).await;
    println!("\n{}\n{}", run.verdict.table(), run.usage.table());
    if run.verdict.has_failed() {
        println!("{}", run.verdict.failures());
        panic!(
            "promises were broken: run it again with CHAOS_SEED={seed} CHAOS_MINUTES={minutes}; logs are in {} if \
                LIMOSA_TEST_DIRECTORY was set",
            directory.display()
        );
    }
}
