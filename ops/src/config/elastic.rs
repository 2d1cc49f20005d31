//! The table `[workers.elastic]`: when and how the agent starts and stops workers.

use flow::{Micros, WorkerId};
use serde::Deserialize;

use super::{ConfigError, File};
use crate::site::elastic::Limits;
use crate::site::fleet::{ElasticConfig, WORKER_PLACE};

/// One worker is enough for a site that has nothing to do.
const MIN: usize = 1;
/// Above it bursts wait for one another noticeably: at 0.7 a packet meets two others on the mean.
const BUSY_HIGH: f64 = 0.7;
/// Two workers below it have 0.6 together, which one can bear.
const BUSY_LOW: f64 = 0.3;
/// Twenty reports: longer than a burst, much shorter than a surge.
const HOLD_S: u64 = 10;
/// A started worker is up and has its groups by then, so the next look sees what it has changed; and a retired one has relayed
/// its last straggler (10 s).
const PAUSE_S: u64 = 30;
/// A service manager that starts a process with huge pages takes some seconds.
const TIMEOUT_S: u64 = 30;
/// Words of a hook: more is a mistake.
const WORDS_MAX: usize = 64;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawElastic {
    start: Vec<String>,
    stop: Vec<String>,
    min: Option<usize>,
    max: Option<usize>,
    busy_high: Option<f64>,
    busy_low: Option<f64>,
    hold_s: Option<u64>,
    pause_s: Option<u64>,
    timeout_s: Option<u64>,
}

impl RawElastic {
    /// `ports` are the workers that the switch has ports for.
    pub(super) fn validate(self, file: &File<'_>, ports: &[WorkerId]) -> Result<ElasticConfig, ConfigError> {
        let mut ports = ports.to_vec();
        ports.sort_unstable();
        ports.dedup();
        let (min, max) = (self.min.unwrap_or(MIN), self.max.unwrap_or(ports.len()));
        if max == 0 || max > ports.len() {
            let remedy = format!(
                "use 1 to {}, the workers that the switch has ports for (workers.ports)",
                ports.len()
            );
            return Err(file.error("workers.elastic.max", max, remedy));
        }
        if min == 0 || min > max {
            return Err(file.error("workers.elastic.min", min, format!("use 1 to {max}, the value of max")));
        }
        let high = self.busy_high.unwrap_or(BUSY_HIGH);
        if !(high > 0.0 && high <= 1.0) {
            return Err(file.error("workers.elastic.busy_high", high, "use a share above 0, up to 1"));
        }
        let low = self.busy_low.unwrap_or(BUSY_LOW);
        if !(low >= 0.0 && low < high) {
            let remedy = format!("use a share from 0 to below busy_high, which is {high}");
            return Err(file.error("workers.elastic.busy_low", low, remedy));
        }
        let span = |key: &str, value: Option<u64>, default: u64, max: u64| {
            let key = format!("workers.elastic.{key}");
            file.bounded(&key, value.unwrap_or(default), 1, max).map(|s| Micros(s * 1_000_000))
        };
        let limits = Limits {
            ports,
            min,
            max,
            busy_high: high,
            busy_low: low,
            hold: span("hold_s", self.hold_s, HOLD_S, 3_600)?,
            pause: span("pause_s", self.pause_s, PAUSE_S, 86_400)?,
            timeout: span("timeout_s", self.timeout_s, TIMEOUT_S, 600)?,
        };
        let start = hook(file, "workers.elastic.start", self.start)?;
        let stop = hook(file, "workers.elastic.stop", self.stop)?;
        Ok(ElasticConfig { limits, start, stop })
    }
}

fn hook(file: &File<'_>, key: &str, words: Vec<String>) -> Result<Vec<String>, ConfigError> {
    let example =
        "name a program and its arguments, such as [\"systemctl\", \"start\", \"limosa-worker@{worker}\"]";
    if words.first().is_none_or(|program| program.trim().is_empty()) {
        return Err(file.error(key, format!("{words:?}"), example));
    }
    if words.len() > WORDS_MAX {
        return Err(file.error(
            key,
            words.len(),
            format!("use up to {WORDS_MAX} words; longer hooks are scripts"),
        ));
    }
    let unknown = |word: &&String| {
        let rest = word.replace(WORKER_PLACE, "");
        word.contains('\0') || rest.contains("{work") || rest.contains("{site")
    };
    match words.iter().find(unknown) {
        Some(word) => {
            let remedy =
                "only {worker} stands for something; the environment has LIMOSA_SITE and LIMOSA_WORKER";
            Err(file.error(key, word, remedy))
        }
        None => Ok(words),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    const HOOKS: &str = "start = [\"run\", \"w{worker}\"]\nstop = [\"end\"]\n";

    fn read(text: &str) -> Result<ElasticConfig, String> {
        let raw: RawElastic = toml::from_str(text).map_err(|error| error.to_string())?;
        let file = File { path: Path::new("site.toml") };
        let ports: Vec<_> = [3, 1, 2].map(WorkerId).to_vec();
        raw.validate(&file, &ports).map_err(|error| error.to_string())
    }

    #[test]
    fn hooks_are_enough_and_the_rest_has_defaults() {
        let config = read(HOOKS).unwrap();
        let limits = &config.limits;
        assert_eq!((limits.min, limits.max, limits.ports.clone()), (1, 3, [1, 2, 3].map(WorkerId).to_vec()));
        assert_eq!((limits.busy_high, limits.busy_low), (0.7, 0.3));
        let spans = [limits.hold, limits.pause, limits.timeout];
        assert_eq!(spans, [10, 30, 30].map(|s| Micros(s * 1_000_000)));
        assert_eq!(config.start, ["run", "w{worker}"]);
    }

    #[test]
    fn errors_name_key_value_and_remedy() {
        for (rest, wanted) in [
            ("min = 0", "workers.elastic.min = \"0\": use 1 to 3"),
            ("min = 3\nmax = 2", "workers.elastic.min = \"3\": use 1 to 2, the value of max"),
            ("max = 4", "workers.elastic.max = \"4\": use 1 to 3, the workers that the switch has ports for"),
            ("busy_high = 0.0", "workers.elastic.busy_high = \"0\": use a share above 0, up to 1"),
            ("busy_high = nan", "workers.elastic.busy_high = \"NaN\""),
            (
                "busy_low = 0.7",
                "workers.elastic.busy_low = \"0.7\": use a share from 0 to below busy_high, which is 0.7",
            ),
            ("busy_low = nan", "workers.elastic.busy_low = \"NaN\""),
            ("hold_s = 0", "workers.elastic.hold_s = \"0\": use 1 to 3600"),
            ("pause_s = 0", "workers.elastic.pause_s = \"0\": use 1 to 86400"),
            ("timeout_s = 601", "workers.elastic.timeout_s = \"601\": use 1 to 600"),
            ("nosuch = 1", "unknown field `nosuch`"),
        ] {
            let error = read(&format!("{HOOKS}{rest}")).unwrap_err();
            assert!(error.contains(wanted), "{rest}: {error}");
        }
        for (hooks, wanted) in [
            ("start = []\nstop = [\"end\"]", "workers.elastic.start = \"[]\": name a program"),
            ("start = [\"run\"]\nstop = [\" \"]", "workers.elastic.stop"),
            ("start = [\"run\", \"{workers}\"]\nstop = [\"end\"]", "only {worker} stands for something"),
            ("start = [\"run\", \"{site}\"]\nstop = [\"end\"]", "LIMOSA_SITE"),
            ("start = [\"run\"]", "missing field `stop`"),
        ] {
            let error = read(hooks).unwrap_err();
            assert!(error.contains(wanted), "{hooks}: {error}");
        }
    }
}
