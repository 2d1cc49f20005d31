//! An error with its causes, on one line.

use std::fmt::Write;

/// An error and what caused it, each once: many an error's own text ends with its cause.
#[must_use]
pub fn said(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain() {
        let cause = cause.to_string();
        if text.contains(&cause) {
            continue;
        }
        let between = if text.is_empty() { "" } else { ": " };
        // A text takes whatever is written to it.
        let _ = write!(text, "{between}{cause}");
    }
    text
}

#[cfg(test)]
mod tests {
    use anyhow::Context;

    use super::*;
    use crate::config::ConfigError;

    #[test]
    fn each_cause_is_said_once_in_order() {
        let source = std::io::Error::other("the disk is gone");
        let read = ConfigError::Read { file: "a.toml".into(), source };
        let error = Err::<(), _>(read).context("it cannot start").unwrap_err();
        assert_eq!(said(&error), "it cannot start: a.toml: cannot be read: the disk is gone");
        let plain = anyhow::anyhow!("inner").context("middle").context("outer");
        assert_eq!(said(&plain), "outer: middle: inner");
    }
}
