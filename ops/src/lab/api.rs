//! HTTP to the daemons of a site. They listen on the loopback of the site's namespace, so a thread that lives there asks.

use std::time::Duration;

use anyhow::Context;
use serde_json::Value;
use tokio::sync::{mpsc, oneshot};

use super::namespaces::Namespace;

/// Where the config API of each placement node listens, in its site's namespace.
pub(super) const PLACEMENT: &str = "127.0.0.1:8470";
/// Where each agent listens.
pub(super) const AGENT: &str = "127.0.0.1:9101";
/// How long an answer may take.
const TIMEOUT: Duration = Duration::from_secs(10);

/// A question, and how to answer it.
struct Question {
    method: reqwest::Method,
    url: String,
    body: Option<Value>,
    if_match: Option<String>,
    answer: oneshot::Sender<anyhow::Result<Answer>>,
}

/// What came back.
pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) etag: Option<String>,
    pub(super) text: String,
}

/// Questions that wait for the thread, which takes them at once.
const QUESTIONS_MAX: usize = 64;

/// Asks the daemons of one site.
#[derive(Clone)]
pub(super) struct Api(mpsc::Sender<Question>);

impl Api {
    /// Starts the thread, which ends when the last copy of this is dropped.
    ///
    /// # Errors
    /// The namespace is gone.
    pub(super) fn start(namespace: &Namespace) -> anyhow::Result<Self> {
        let (sender, mut questions) = mpsc::channel::<Question>(QUESTIONS_MAX);
        let namespace = namespace.clone();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        std::thread::Builder::new().name("api".into()).spawn(move || {
            if let Err(error) = namespace.enter() {
                return tracing::error!(%error, "the namespace cannot be entered");
            }
            let Ok(client) = reqwest::Client::builder().timeout(TIMEOUT).build() else { return };
            let local = tokio::task::LocalSet::new();
            local.block_on(&runtime, async {
                while let Some(question) = questions.recv().await {
                    tokio::task::spawn_local(answer(client.clone(), question));
                }
            });
        })?;
        Ok(Self(sender))
    }

    /// Asks and waits.
    ///
    /// # Errors
    /// Nobody answers.
    pub(super) async fn ask(
        &self,
        method: reqwest::Method,
        address: &str,
        path: &str,
        body: Option<Value>,
        if_match: Option<String>,
    ) -> anyhow::Result<Answer> {
        let (answer, answered) = oneshot::channel();
        let url = format!("http://{address}{path}");
        let question = Question { method, url, body, if_match, answer };
        self.0.send(question).await.ok().context("the namespace is gone")?;
        answered.await.context("the namespace is gone")?
    }

    /// GET.
    ///
    /// # Errors
    /// Nobody answers.
    pub(super) async fn get(&self, address: &str, path: &str) -> anyhow::Result<Answer> {
        self.ask(reqwest::Method::GET, address, path, None, None).await
    }
}

async fn answer(client: reqwest::Client, question: Question) {
    let Question { method, url, body, if_match, answer } = question;
    let mut request = client.request(method, url);
    if let Some(body) = body {
        request = request.json(&body);
    }
    if let Some(revision) = if_match {
        request = request.header("If-Match", revision);
    }
    let answered = async {
        let response = request.send().await?;
        let etag = response.headers().get("etag").and_then(|tag| tag.to_str().ok()).map(str::to_owned);
        let status = response.status().as_u16();
        Ok(Answer { status, etag, text: response.text().await? })
    };
    // Who does not wait any more does not need it.
    let _ = answer.send(answered.await);
}
