//! The one place that writes to standard output. JSON is the API's own answer, with its stable names; tables are for
//! people and may change.

use std::io::{self, Write};

use clap::ValueEnum;
use comfy_table::{Table, presets};
use serde_json::Value;

/// How to print.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// Columns for people.
    Table,
    /// The API's answer.
    Json,
    /// One name per line.
    Name,
}

/// Where and how to print.
pub(crate) struct Output {
    pub(crate) format: Format,
    pub(crate) headers: bool,
}

/// Rows for people; the first cell is the name.
pub(crate) struct Rows {
    pub(crate) heads: &'static [&'static str],
    pub(crate) rows: Vec<Vec<String>>,
}

impl Output {
    pub(crate) fn print(&self, json: &Value, rows: &Rows) {
        match self.format {
            Format::Json => line(&format!("{json:#}")),
            Format::Table => self.table(rows),
            Format::Name => rows.rows.iter().filter_map(|row| row.first()).for_each(|name| line(name)),
        }
    }

    /// One of many lines over time: compact JSON, so that a program can read line by line.
    pub(super) fn print_event(&self, json: &Value, name: &str, text: &str) {
        match self.format {
            Format::Json => line(&json.to_string()),
            Format::Table => line(text),
            Format::Name => line(name),
        }
    }

    fn table(&self, rows: &Rows) {
        let mut table = Table::new();
        table.load_style(presets::NOTHING);
        if self.headers {
            table.set_header(rows.heads.to_vec());
        }
        table.add_rows(rows.rows.iter().cloned());
        if table.column_count() == 0 {
            return;
        }
        for column in table.column_iter_mut() {
            column.set_padding((0, 2));
        }
        table.lines().for_each(|text| line(text.trim_end()));
    }
}

/// One line. A reader that has gone away has seen enough.
fn line(text: &str) {
    if let Err(error) = writeln!(io::stdout(), "{text}")
        && error.kind() != io::ErrorKind::BrokenPipe
    {
        complain(&format!("standard output: {error}"));
    }
}

/// An error, for people.
pub(crate) fn complain(message: &str) {
    progress(&format!("limosa: {message}"));
}

/// Progress, for people.
pub(super) fn progress(message: &str) {
    // Nothing can be said of a standard error that is gone.
    let _ = writeln!(io::stderr(), "{message}");
}

/// A value that may be missing.
pub(super) fn or_dash(value: Option<impl ToString>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}
