//! The config API as operators use it: any node that answers, soon.

use std::time::Duration;

use serde_json::Value;

/// A node that is stopped takes connections and never answers.
const PATIENCE: Duration = Duration::from_secs(4);
/// A look at what a node knows.
const GLANCE: Duration = Duration::from_millis(1_500);

/// How a request ended.
#[derive(Clone, Debug)]
pub(crate) enum Said {
    /// It was acknowledged.
    Done(Value),
    /// It was refused: status and reason.
    Refused(u16, String),
    /// No node answered, or none could: it may be done or not.
    Nothing(String),
}

/// The nodes of the config API, by number from 1.
#[derive(Clone)]
pub(crate) struct Api {
    pub(crate) nodes: Vec<String>,
    http: reqwest::Client,
}

impl Api {
    pub(crate) fn new(nodes: Vec<String>) -> Self {
        let http = reqwest::Client::builder().no_proxy().build().unwrap();
        Self { nodes, http }
    }

    /// One page of one process.
    pub(crate) async fn page(&self, url: &str) -> Option<(u16, String)> {
        let answer = self.http.get(url).timeout(GLANCE).send().await.ok()?;
        Some((answer.status().as_u16(), answer.text().await.ok()?))
    }

    /// What one node says.
    pub(crate) async fn at(&self, node: usize, path: &str) -> Option<Value> {
        let (status, text) = self.page(&format!("{}{path}", self.nodes[node])).await?;
        if status == 200 { serde_json::from_str(&text).ok() } else { None }
    }

    /// What the first node says that answers.
    pub(crate) async fn get(&self, path: &str) -> Option<Value> {
        for node in 0..self.nodes.len() {
            if let Some(value) = self.at(node, path).await {
                return Some(value);
            }
        }
        None
    }

    /// A request that changes something, at one node after another until one gives an answer of its own.
    pub(crate) async fn send(&self, method: &str, path: &str, body: Option<&Value>) -> Said {
        let mut last = String::new();
        for node in &self.nodes {
            let method = method.parse().unwrap();
            let mut request = self.http.request(method, format!("{node}{path}")).timeout(PATIENCE);
            request = request.header("If-Match", "*");
            if let Some(body) = body {
                request = request.json(body);
            }
            let answer = match request.send().await {
                Ok(answer) => answer,
                Err(error) => {
                    last = error.to_string();
                    continue;
                }
            };
            let status = answer.status().as_u16();
            let text = answer.text().await.unwrap_or_default();
            match status {
                200..300 => return Said::Done(serde_json::from_str(&text).unwrap_or_default()),
                400..500 => return Said::Refused(status, text),
                _ => last = format!("{status}: {text}"),
            }
        }
        Said::Nothing(last)
    }
}
