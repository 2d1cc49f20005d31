//! Nouns of the command line: they speak to the config API of any placement node.

mod assess;
mod client;
mod group;
mod moves;
mod output;
mod policy;
mod raft;
mod replay;
mod service;
mod site;
mod switch;

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Subcommand};
use serde_json::Value;

use client::Client;
pub use output::Format;
pub(crate) use output::{Output, Rows, complain};

/// Exit codes, for the end of `--help`.
pub const AFTER_HELP: &str = "\
Exit codes:
  0  done
  1  error
  2  usage, or a file or value that makes no sense
  3  conflict: the present state forbids it, or somebody else was faster
  4  not found
  5  timeout
  6  degraded: no node can answer for lack of a leader, what was waited for ended otherwise, or a switch is not as wanted";

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// As asked for.
    Done = 0,
    /// Something is wrong.
    Error = 1,
    /// The command or its input is wrong.
    Usage = 2,
    /// The present state forbids it.
    Conflict = 3,
    /// It is not there.
    NotFound = 4,
    /// It took too long.
    Timeout = 5,
    /// It works in part only.
    Degraded = 6,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// Why a command failed: one sentence for people and a code for scripts.
#[derive(Debug)]
struct Failure {
    exit: Exit,
    message: String,
}

impl Failure {
    fn new(exit: Exit, message: impl Into<String>) -> Self {
        Self { exit, message: message.into() }
    }

    fn usage(message: impl Into<String>) -> Self {
        Self::new(Exit::Usage, message)
    }
}

/// What every noun takes.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// A placement node's API; more may follow, and the next is asked when one cannot answer.
    #[arg(
        long,
        global = true,
        env = "LIMOSA_API",
        value_name = "URL",
        value_delimiter = ',',
        default_value = "http://127.0.0.1:8470"
    )]
    pub api: Vec<String>,
    /// How to print: a table for people, JSON for programs, or names only.
    #[arg(short, long, global = true, value_enum, default_value_t = Format::Table)]
    pub output: Format,
    /// Leave the heads of tables out.
    #[arg(long, global = true)]
    pub no_headers: bool,
    /// Longest wait for one answer, for example 10s; what only reads is asked of the next node then.
    #[arg(long, global = true, value_parser = wait, default_value = "10s")]
    pub timeout: Duration,
}

/// What can be asked of a running cluster.
#[derive(Clone, Debug, Subcommand)]
pub enum Noun {
    /// Points of presence.
    #[command(subcommand, after_help = AFTER_HELP)]
    Site(site::Verb),
    /// Network functions with their addresses.
    #[command(subcommand, after_help = AFTER_HELP)]
    Service(service::Verb),
    /// Flow groups: one client prefix of one service each.
    #[command(subcommand, after_help = AFTER_HELP)]
    Group(group::Verb),
    /// Moves of groups between sites.
    #[command(subcommand, after_help = AFTER_HELP)]
    Move(moves::Verb),
    /// The placement as a whole.
    #[command(subcommand, after_help = AFTER_HELP)]
    Placement(assess::Verb),
    /// What is wanted of the solver.
    #[command(subcommand, after_help = AFTER_HELP)]
    Policy(policy::Verb),
    /// The switch of a site: set up, look at its rules, mend them.
    #[command(subcommand, after_help = AFTER_HELP)]
    Switch(switch::Verb),
    /// The placement nodes.
    #[command(subcommand, after_help = AFTER_HELP)]
    Raft(raft::Verb),
    /// Who did what.
    #[command(subcommand, after_help = AFTER_HELP)]
    Audit(policy::AuditVerb),
}

/// What a verb works with.
struct Context {
    client: Client,
    output: Output,
}

/// Runs a noun; errors go to standard error.
pub async fn run(noun: Noun, options: &Options) -> Exit {
    match dispatch(noun, options).await {
        Ok(exit) => exit,
        Err(failure) => {
            output::complain(&failure.message);
            failure.exit
        }
    }
}

async fn dispatch(noun: Noun, options: &Options) -> Result<Exit, Failure> {
    let context = Context {
        client: Client::new(&options.api, options.timeout)?,
        output: Output { format: options.output, headers: !options.no_headers },
    };
    let exit = match noun {
        Noun::Site(verb) => site::run(verb, &context).await,
        Noun::Service(verb) => service::run(verb, &context).await,
        Noun::Group(verb) => group::run(verb, &context).await,
        Noun::Move(verb) => moves::run(verb, &context).await,
        Noun::Placement(verb) => assess::run(verb, &context).await,
        Noun::Policy(verb) => policy::run(verb, &context).await,
        Noun::Switch(verb) => switch::run(verb, &context, options).await,
        Noun::Raft(verb) => raft::run(verb, &context).await,
        Noun::Audit(verb) => policy::audit(verb, &context).await,
    }?;
    match context.client.old().filter(|_| exit == Exit::Done) {
        Some(why) => Err(Failure::new(Exit::Degraded, why)),
        None => Ok(exit),
    }
}

/// A duration such as `500ms`, `10s`, `5m` or `1h`.
fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is not a duration: write a number and ms, s, m or h, for example 10s");
    let split = text.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
    let (number, unit) = text.split_at(split);
    let number: u64 = number.parse().map_err(|_| wrong())?;
    let unit_ms = match unit {
        "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return Err(wrong()),
    };
    number.checked_mul(unit_ms).map(Duration::from_millis).ok_or_else(wrong)
}

/// A duration in which something can come.
fn wait(text: &str) -> Result<Duration, String> {
    let wait = duration(text)?;
    if wait.is_zero() { Err(format!("in {text} nothing can answer: give 1ms or more")) } else { Ok(wait) }
}

/// A name that can stand in the path of a request. The rest the node says.
fn site_name(text: &str) -> Result<String, String> {
    match text {
        "" => Err("the name of a site is wanted: `limosa site list` has them".to_owned()),
        "." | ".." => Err(format!("{text:?} is a step in a path, and names no site")),
        _ => Ok(text.to_owned()),
    }
}

/// Reads a file with JSON (`*.json`) or TOML (all others); `-` is standard input, JSON if it begins with a brace.
fn read_object(file: &Path) -> Result<Value, Failure> {
    let stdin = file == Path::new("-");
    let text = if stdin { std::io::read_to_string(std::io::stdin()) } else { std::fs::read_to_string(file) };
    let name = file.display();
    let text = text.map_err(|error| Failure::usage(format!("{name}: cannot be read: {error}")))?;
    let ends = |ends: &[&str]| file.extension().is_some_and(|end| ends.iter().any(|one| end == *one));
    let value = if ends(&["json"]) || (stdin && text.trim_start().starts_with('{')) {
        serde_json::from_str(&text).map_err(|error| error.to_string())
    } else if ends(&["yaml", "yml"]) {
        serde_saphyr::from_str(&text).map_err(|error| error.to_string())
    } else {
        toml::from_str(&text).map_err(|error| error.to_string())
    };
    let value: Value = value.map_err(|error| Failure::usage(format!("{name}: {}", error.trim_end())))?;
    if value.is_object() {
        return Ok(value);
    }
    Err(Failure::usage(format!("{name}: an object is wanted, with one value per key")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_a_unit() {
        assert_eq!(duration("10m"), Ok(Duration::from_secs(600)));
        assert_eq!(duration("250ms"), Ok(Duration::from_millis(250)));
        for wrong in ["", "10", "m", "1d", "-1s", "99999999999999999999s", "18446744073709551615h"] {
            assert!(duration(wrong).unwrap_err().contains("for example 10s"), "{wrong}");
        }
    }

    #[test]
    fn a_wait_of_nothing_and_names_that_are_none_are_refused() {
        assert_eq!(wait("1ms"), Ok(Duration::from_millis(1)));
        assert_eq!(wait("0s"), Err("in 0s nothing can answer: give 1ms or more".to_owned()));
        assert_eq!(site_name("a/b"), Ok("a/b".to_owned()));
        for name in ["", ".", ".."] {
            assert!(site_name(name).is_err(), "{name}");
        }
    }

    #[test]
    fn files_are_toml_or_json_by_their_name() {
        let directory = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = directory.path().join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        let toml = read_object(&write("a.toml", "headroom = 0.5")).unwrap();
        assert_eq!(toml, read_object(&write("a.json", r#"{"headroom":0.5}"#)).unwrap());
        let wrong = read_object(&write("b.toml", "headroom =")).unwrap_err();
        assert_eq!(wrong.exit, Exit::Usage);
        assert!(wrong.message.contains("b.toml"), "{}", wrong.message);
        assert_eq!(read_object(&write("c.json", "[]")).unwrap_err().exit, Exit::Usage);
        assert_eq!(read_object(Path::new("/nowhere.toml")).unwrap_err().exit, Exit::Usage);
    }
}
