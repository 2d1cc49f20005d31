//! `limosa switch`: the switch of one site, by the site's configuration file.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use serde_json::json;
use switchctl::ovs::{Database, OvsError, SetUp};
use switchctl::session::{Session, SessionOptions, SwitchEvent};

use super::client::{Answer, Ask, Client};
use super::output::{Rows, progress};
use super::{Context, Exit, Failure, Options};
use crate::config::{ConfigError, SiteConfig};
use crate::site::switch::{self, Difference, Differences, Drift, Resynced, RuleView};

/// What can be done with a site's switch.
#[derive(Clone, Debug, Subcommand)]
pub enum Verb {
    /// Prepare a bridge of Open vSwitch: bridge, ports, tunnels, fail mode. Run again, it changes what is different.
    Setup {
        #[command(flatten)]
        site: Site,
        /// Only say what would be changed.
        #[arg(long)]
        dry_run: bool,
    },
    /// Show the rules that the switch has, with their counters; the agent is not needed.
    Rules(Site),
    /// Show where the switch's rules are not what its agent wants; ends with 6 if they are not.
    Diff(Site),
    /// Let the agent read the switch's rules and mend those that are not what it wants.
    Resync(Site),
}

/// Which site.
#[derive(Args, Clone, Debug)]
pub struct Site {
    /// The configuration file of the site's agent (TOML).
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
}

impl Site {
    fn read(&self) -> Result<SiteConfig, Failure> {
        SiteConfig::read(&self.config).map_err(|error: ConfigError| Failure::usage(error.to_string()))
    }
}

pub(super) async fn run(verb: Verb, context: &Context, options: &Options) -> Result<Exit, Failure> {
    match verb {
        Verb::Setup { site, dry_run } => setup(&site, dry_run, context).await,
        Verb::Rules(site) => rules(&site.read()?, context, options).await,
        Verb::Diff(site) => {
            let answer = ask(&site.read()?, Ask::get(&["switch", "diff"]), options).await?;
            let found: Differences = answer.parse()?;
            context.output.print(&answer.body, &differences(&found.differences));
            Ok(if found.differences.is_empty() { Exit::Done } else { Exit::Degraded })
        }
        Verb::Resync(site) => {
            let answer = ask(&site.read()?, Ask::post(&["switch", "resync"], None), options).await?;
            let Resynced { mended } = answer.parse()?;
            let rows = Rows { heads: &["MENDED"], rows: vec![vec![mended.to_string()]] };
            context.output.print(&answer.body, &rows);
            Ok(Exit::Done)
        }
    }
}

async fn setup(site: &Site, dry_run: bool, context: &Context) -> Result<Exit, Failure> {
    let config = site.read()?;
    let Some(settings) = config.switch.openvswitch else {
        let message =
            format!("{}: there is no table [openvswitch], so no bridge to set up", site.config.display());
        return Err(Failure::usage(message));
    };
    let Some(target) = settings.database else {
        let message = format!(
            "{}: openvswitch.database is not set: give the socket of the database, for example \
             \"/run/openvswitch/db.sock\"",
            site.config.display()
        );
        return Err(Failure::usage(message));
    };
    let mut database = Database::connect(&target).await.map_err(|error| refused(&error))?;
    let done = if dry_run {
        database
            .plan(&settings.bridge)
            .await
            .map(|plan| SetUp { changes: plan.changes, problems: Vec::new() })
    } else {
        database.set_up(&settings.bridge).await
    };
    let SetUp { changes, problems } = done.map_err(|error| refused(&error))?;
    let rows = changes.iter().map(|change| vec![change.clone()]).collect();
    let body = json!({ "dry_run": dry_run, "changes": changes, "problems": problems });
    context.output.print(&body, &Rows { heads: &["CHANGE"], rows });
    problems.iter().for_each(|problem| progress(&format!("limosa: {problem}")));
    Ok(if problems.is_empty() { Exit::Done } else { Exit::Degraded })
}

fn refused(error: &OvsError) -> Failure {
    let exit = match error {
        OvsError::Timeout(_) => Exit::Timeout,
        OvsError::Database(switchctl::core::ovsdb::OvsdbError::Elsewhere { .. }) => Exit::Conflict,
        OvsError::Unreachable(..) | OvsError::Rpc(_) | OvsError::Refused { .. } | OvsError::Database(_) => {
            Exit::Error
        }
    };
    Failure::new(exit, error.to_string())
}

async fn rules(config: &SiteConfig, context: &Context, options: &Options) -> Result<Exit, Failure> {
    let address = &config.switch.address;
    let read = async {
        // A second controller that sets nothing.
        let (handle, mut events) = Session::spawn(address.clone(), SessionOptions::default());
        while let Some(event) = events.recv().await {
            match event {
                SwitchEvent::Connected { .. } => {
                    if let Ok(rules) = switch::rules(&handle).await {
                        return Ok(rules);
                    }
                }
                SwitchEvent::Error(error) => {
                    return Err(Failure::new(Exit::Error, format!("{address}: {error}")));
                }
                SwitchEvent::Disconnected
                | SwitchEvent::InForce { .. }
                | SwitchEvent::Silent(_)
                | SwitchEvent::Answering => {}
            }
        }
        Err(Failure::new(Exit::Error, format!("{address}: the connection ended")))
    };
    let rules = tokio::time::timeout(options.timeout, read).await.unwrap_or_else(|_| {
        let message =
            format!("{address} did not answer within {:?}: does the switch listen there?", options.timeout);
        Err(Failure::new(Exit::Timeout, message))
    })?;
    let body = json!(rules);
    let row = |rule: &RuleView| {
        let mut cells = cells(rule);
        cells.extend([rule.packets.to_string(), rule.bytes.to_string()]);
        cells
    };
    let heads = &["COOKIE", "TABLE", "PRIORITY", "MATCH", "ACTIONS", "PACKETS", "BYTES"];
    context.output.print(&body, &Rows { heads, rows: rules.rules.iter().map(row).collect() });
    Ok(Exit::Done)
}

fn cells(rule: &RuleView) -> Vec<String> {
    vec![
        rule.cookie.clone(),
        rule.table.to_string(),
        rule.priority.to_string(),
        rule.matches.clone(),
        rule.actions.clone(),
    ]
}

fn differences(found: &[Difference]) -> Rows {
    let row = |difference: &Difference| {
        let drift = match difference.drift {
            Drift::Missing => "missing",
            Drift::Differs => "differs",
            Drift::Extra => "extra",
        };
        let mut row = cells(&difference.rule);
        row.insert(1, drift.to_owned());
        row
    };
    let heads = &["COOKIE", "DRIFT", "TABLE", "PRIORITY", "MATCH", "ACTIONS"];
    Rows { heads, rows: found.iter().map(row).collect() }
}

/// Asks the site's agent.
async fn ask(config: &SiteConfig, ask: Ask, options: &Options) -> Result<Answer, Failure> {
    let agent = format!("http://{}", config.metrics);
    let answer = Client::new(std::slice::from_ref(&agent), options.timeout)?.send(ask).await;
    answer.map_err(|failure| match failure.exit {
        // The client speaks of placement nodes.
        Exit::Error => {
            let message =
                format!("the agent of site {} gives no answer at {agent}: does it run?", config.name);
            Failure::new(Exit::Error, message)
        }
        Exit::Done | Exit::Usage | Exit::Conflict | Exit::NotFound | Exit::Timeout | Exit::Degraded => {
            failure
        }
    })
}
