//! How many workers a site has: carries out what [`super::elastic`] decides, by the operator's hooks, and shows it.

use std::os::unix::process::ExitStatusExt;
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use flow::{Micros, SiteId, WorkerId};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use prometheus::{IntCounterVec, IntGaugeVec, Opts, Registry};
use serde::Serialize;
use tokio::process::Command;
use tokio::sync::mpsc;

use super::core::{Agent, Input};
use super::elastic::{self, Action, Elastic, Hook, HookEnd, Limits, Outcomes, State, Views};

/// In a hook's arguments this stands for the worker's number.
pub const WORKER_PLACE: &str = "{worker}";

/// The table `[workers.elastic]`, validated.
#[derive(Clone, Debug, PartialEq)]
pub struct ElasticConfig {
    /// When workers are started and stopped.
    pub limits: Limits,
    /// Program and arguments that start a worker.
    pub start: Vec<String>,
    /// Program and arguments that stop one.
    pub stop: Vec<String>,
}

/// One worker, for those who ask.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct WorkerPage {
    /// Its number.
    pub worker: WorkerId,
    /// What it does, or is to do.
    pub state: State,
    /// Share of time that it was not idle, 0 to 1; nothing while no report is fresh.
    pub busy: Option<f64>,
    /// Groups that it has.
    pub groups: usize,
    /// How often its hook has failed in a row.
    pub hook_failures: u32,
}

/// All workers, for those who ask.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Page {
    /// Whether the agent starts and stops workers.
    pub elastic: bool,
    /// Those that answer, and one that is to.
    pub workers: Vec<WorkerPage>,
}

/// The page as of the last look, shared with the HTTP server.
pub type SharedPage = Arc<Mutex<Page>>;

/// The workers of a site as a number that may change.
pub struct Fleet {
    site: SiteId,
    elastic: Option<(Elastic, ElasticConfig)>,
    ends: mpsc::Sender<HookEnd>,
    page: SharedPage,
    workers: IntGaugeVec,
    starts: IntCounterVec,
    stops: IntCounterVec,
}

impl Fleet {
    /// A fleet, and where the ends of its hooks come out. Without a table `[workers.elastic]` it only shows.
    ///
    /// # Errors
    /// When a metric's name is registered twice.
    pub fn new(
        site: SiteId,
        config: Option<ElasticConfig>,
        registry: &Registry,
    ) -> anyhow::Result<(Self, mpsc::Receiver<HookEnd>)> {
        // One hook runs at a time.
        let (ends, hook_ends) = mpsc::channel(1);
        let counter = |name: &str, help: &str| -> anyhow::Result<IntCounterVec> {
            let counter = IntCounterVec::new(Opts::new(name, help), &["outcome"])?;
            registry.register(Box::new(counter.clone()))?;
            Ok(counter)
        };
        let workers = IntGaugeVec::new(Opts::new("limosa_workers", "Workers of the site"), &["state"])?;
        registry.register(Box::new(workers.clone()))?;
        let elastic = config.map(|config| (Elastic::new(config.limits.clone()), config));
        let fleet = Self {
            site,
            page: SharedPage::default(),
            workers,
            starts: counter("limosa_workers_starts_total", "Hooks that start a worker, by outcome")?,
            stops: counter("limosa_workers_stops_total", "Hooks that stop a worker, by outcome")?,
            elastic,
            ends,
        };
        fleet.export(&[], elastic::Counts::default());
        Ok((fleet, hook_ends))
    }

    /// The page, for the HTTP server.
    #[must_use]
    pub fn page(&self) -> SharedPage {
        self.page.clone()
    }

    /// Looks at the workers; what the agent is to do.
    pub fn look(&mut self, agent: &Agent, now: Micros) -> Vec<Input> {
        let views = agent.worker_views(now);
        let actions = match &mut self.elastic {
            Some((elastic, _)) => elastic.handle(elastic::Input::Workers(views.as_ref()), now),
            None => Vec::new(),
        };
        if let Some(views) = &views {
            self.show(views, agent);
        }
        actions.into_iter().filter_map(|action| self.carry_out(action)).collect()
    }

    /// A hook has ended.
    pub fn hook_ended(&mut self, end: HookEnd, now: Micros) {
        if let Some((elastic, _)) = &mut self.elastic {
            // It has nothing to do before the next look.
            let _ = elastic.handle(elastic::Input::HookEnded(end), now);
        }
    }

    fn carry_out(&self, action: Action) -> Option<Input> {
        match action {
            Action::Run(hook, worker) => {
                self.run(hook, worker);
                None
            }
            Action::Retire(worker) => {
                tracing::info!(%worker, "the load is low: the worker's groups go to others, then it is stopped");
                Some(Input::Retire(worker))
            }
            Action::Recall(worker) => Some(Input::Recall(worker)),
        }
    }

    fn run(&self, hook: Hook, worker: WorkerId) {
        let Some((elastic, config)) = &self.elastic else { return };
        let words = match hook {
            Hook::Start => &config.start,
            Hook::Stop => &config.stop,
        };
        let command = command(words, self.site, worker);
        let (timeout, ends) = (Duration::from_micros(elastic.timeout().0), self.ends.clone());
        tracing::info!(%worker, ?hook, failures = elastic.failures(), "a hook runs");
        tokio::spawn(async move {
            let _ = ends.send(run(command, hook, worker, timeout).await).await;
        });
    }

    fn show(&self, views: &Views, agent: &Agent) {
        let (in_hand, failures) =
            self.elastic.as_ref().map_or((None, 0), |(elastic, _)| (elastic.in_hand(), elastic.failures()));
        let state =
            |worker: WorkerId| in_hand.filter(|(changing, _)| *changing == worker).map(|(_, state)| state);
        let page = |worker: WorkerId| WorkerPage {
            worker,
            state: state(worker).unwrap_or(State::Serving),
            busy: views.get(&worker).and_then(|view| view.busy),
            groups: agent.groups_of(worker),
            hook_failures: state(worker).map_or(0, |_| failures),
        };
        let coming = in_hand.map(|(worker, _)| worker).filter(|worker| !views.contains_key(worker));
        let mut workers: Vec<_> = views.keys().copied().chain(coming).map(page).collect();
        workers.sort_by_key(|page| page.worker);
        let counts =
            self.elastic.as_ref().map_or_else(elastic::Counts::default, |(elastic, _)| elastic.counts());
        self.export(&workers, counts);
        let page = Page { elastic: self.elastic.is_some(), workers };
        *self.page.lock().unwrap_or_else(PoisonError::into_inner) = page;
    }

    fn export(&self, workers: &[WorkerPage], counts: elastic::Counts) {
        for state in State::ALL {
            let count = workers.iter().filter(|page| page.state == state).count();
            self.workers.with_label_values(&[state.name()]).set(i64::try_from(count).unwrap_or(i64::MAX));
        }
        for (metric, outcomes) in [(&self.starts, counts.starts), (&self.stops, counts.stops)] {
            let Outcomes { ok, failed, timeout } = outcomes;
            for (outcome, count) in [("ok", ok), ("failed", failed), ("timeout", timeout)] {
                let counter = metric.with_label_values(&[outcome]);
                counter.inc_by(count.saturating_sub(counter.get()));
            }
        }
    }
}

/// The hook as a process. Its group is its own, so that it can be killed with whatever it has started there.
fn command(words: &[String], site: SiteId, worker: WorkerId) -> Command {
    let number = worker.to_string();
    let mut words = words.iter().map(|word| word.replace(WORKER_PLACE, &number));
    let mut command = Command::new(words.next().unwrap_or_default());
    command
        .args(words)
        .env("LIMOSA_SITE", site.to_string())
        .env("LIMOSA_WORKER", number)
        .stdin(Stdio::null())
        .process_group(0);
    command
}

async fn run(mut command: Command, hook: Hook, worker: WorkerId, timeout: Duration) -> HookEnd {
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => {
            tracing::warn!(%worker, ?hook, %error, "the hook cannot be run");
            return HookEnd::Failed;
        }
    };
    let group = child.id().and_then(|id| i32::try_from(id).ok()).map(Pid::from_raw);
    match tokio::time::timeout(timeout, child.wait()).await {
        Ok(Ok(status)) if status.success() => HookEnd::Ok,
        Ok(Ok(status)) => {
            tracing::warn!(%worker, ?hook, status = end_of(status), "the hook failed");
            HookEnd::Failed
        }
        Ok(Err(error)) => {
            tracing::warn!(%worker, ?hook, %error, "the hook's end cannot be known");
            HookEnd::Failed
        }
        Err(_) => {
            tracing::warn!(%worker, ?hook, ?timeout, "the hook takes too long and is killed");
            // It has not been waited for, so the number is still its own.
            if let Some(group) = group {
                let _ = killpg(group, Signal::SIGKILL);
            }
            let _ = child.wait().await;
            HookEnd::Timeout
        }
    }
}

fn end_of(status: ExitStatus) -> String {
    let signal = status.signal().map(|signal| format!("signal {signal}"));
    signal.unwrap_or_else(|| format!("exit status {}", status.code().unwrap_or(-1)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let words = ["sh", "-c", script, "hook", WORKER_PLACE].map(str::to_owned);
        command(&words, SiteId(7), WorkerId(3))
    }

    async fn end(script: &str) -> HookEnd {
        run(shell(script), Hook::Start, WorkerId(3), Duration::from_secs(20)).await
    }

    #[tokio::test]
    async fn a_hook_hears_of_which_worker_by_argument_and_environment() {
        let test = "test \"$1/$LIMOSA_SITE/$LIMOSA_WORKER\" = 3/7/3";
        assert_eq!(end(test).await, HookEnd::Ok);
        assert_eq!(end("exit 3").await, HookEnd::Failed);
        let none = command(&["/nowhere/hook".to_owned()], SiteId(7), WorkerId(3));
        assert_eq!(run(none, Hook::Stop, WorkerId(3), Duration::from_secs(20)).await, HookEnd::Failed);
    }

    #[tokio::test]
    async fn a_hook_that_hangs_is_killed_with_what_it_started() {
        let directory = tempfile::tempdir().unwrap();
        let pid = directory.path().join("pid");
        let script = format!("sleep 1000 & echo $! > {0}.new; mv {0}.new {0}; wait", pid.display());
        let end = run(shell(&script), Hook::Start, WorkerId(3), Duration::from_millis(500)).await;
        assert_eq!(end, HookEnd::Timeout);
        let Ok(pid) = std::fs::read_to_string(pid) else { return };
        // It may stay as a zombie, which has no command line, until somebody waits for it.
        let line = std::path::PathBuf::from(format!("/proc/{}/cmdline", pid.trim()));
        while std::fs::read(&line).is_ok_and(|line| !line.is_empty()) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    #[test]
    fn all_outcomes_and_states_are_exported_from_the_start() {
        let registry = Registry::new();
        Fleet::new(SiteId(1), None, &registry).unwrap();
        let text = prometheus::TextEncoder::new().encode_to_string(&registry.gather()).unwrap();
        for line in [
            "limosa_workers{state=\"retiring\"} 0",
            "limosa_workers_starts_total{outcome=\"timeout\"} 0",
            "limosa_workers_stops_total{outcome=\"failed\"} 0",
        ] {
            assert!(text.contains(line), "{line}: {text}");
        }
    }
}
