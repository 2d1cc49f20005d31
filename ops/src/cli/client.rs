//! Requests to the API: the next node is asked when one cannot answer.

use std::error::Error;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use reqwest::header::HeaderMap;
use reqwest::{Method, StatusCode, Url};
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::{Exit, Failure};
use crate::placement::api::{ProblemBody, QUORUM_AGE_HEADER, QUORUM_HEADER};

/// Longest wait for a connection: a node that is gone should not hold up the next.
const CONNECT_BOUND: Duration = Duration::from_secs(2);

/// The placement nodes.
pub(super) struct Client {
    http: reqwest::Client,
    bases: Vec<Url>,
    /// The one that answered last.
    present: AtomicUsize,
    timeout: Duration,
    /// Why the last answer that may be old may be so.
    old: Mutex<Option<String>>,
}

/// An answer.
#[derive(Debug)]
pub(super) struct Answer {
    /// The body; null if it was empty.
    pub(super) body: Value,
    /// The ETag.
    pub(super) tag: Option<String>,
    /// Why it may be old, if it may.
    old: Option<String>,
}

impl Answer {
    /// The body as what it should be.
    pub(super) fn parse<T: DeserializeOwned>(&self) -> Result<T, Failure> {
        T::deserialize(&self.body).map_err(|error| {
            let message = format!("the node's answer makes no sense here: {error}; are both of one version?");
            Failure::new(Exit::Error, message)
        })
    }
}

/// A request.
pub(super) struct Ask {
    method: Method,
    path: Vec<String>,
    query: Vec<(&'static str, String)>,
    body: Option<Value>,
    if_match: Option<String>,
}

impl Ask {
    fn new(method: Method, path: &[&str]) -> Self {
        let path = path.iter().map(|&segment| segment.to_owned()).collect();
        Self { method, path, query: Vec::new(), body: None, if_match: None }
    }

    /// Reads. The path's segments follow `/v1` and may hold any character.
    pub(super) fn get(path: &[&str]) -> Self {
        Self::new(Method::GET, path)
    }

    pub(super) fn put(path: &[&str], body: Value) -> Self {
        Self { body: Some(body), ..Self::new(Method::PUT, path) }
    }

    pub(super) fn post(path: &[&str], body: Option<Value>) -> Self {
        Self { body, ..Self::new(Method::POST, path) }
    }

    pub(super) fn delete(path: &[&str]) -> Self {
        Self::new(Method::DELETE, path)
    }

    pub(super) fn query(mut self, key: &'static str, value: Option<impl ToString>) -> Self {
        self.query.extend(value.map(|value| (key, value.to_string())));
        self
    }

    pub(super) fn if_match(mut self, tag: String) -> Self {
        self.if_match = Some(tag);
        self
    }

    /// Whether an old answer is worth less than another node's. What a node says of itself is never old.
    fn judges_age(&self) -> bool {
        self.method == Method::GET && self.path.first().is_none_or(|noun| noun != "raft")
    }

    fn url(&self, base: &Url) -> Url {
        let mut url = base.clone();
        if let Ok(mut segments) = url.path_segments_mut() {
            segments.pop_if_empty().push("v1").extend(&self.path);
        }
        if !self.query.is_empty() {
            url.query_pairs_mut().extend_pairs(&self.query);
        }
        url
    }
}

/// Why one node gave no answer that counts.
enum Miss {
    /// Another may do better.
    Next(Failure),
    /// The answer is final.
    Final(Failure),
}

impl Client {
    pub(super) fn new(bases: &[String], timeout: Duration) -> Result<Self, Failure> {
        let bases = bases.iter().map(|base| parse_base(base)).collect::<Result<Vec<_>, _>>()?;
        if bases.is_empty() {
            return Err(Failure::usage("--api names no node: give at least one URL"));
        }
        // Tests and other programs may come here without `main`; a second call only says that it is done.
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let http = reqwest::Client::builder().no_proxy().connect_timeout(CONNECT_BOUND).build();
        let http = http.map_err(|error| Failure::new(Exit::Error, format!("no HTTP client: {error}")))?;
        Ok(Self { http, bases, present: AtomicUsize::new(0), timeout, old: Mutex::default() })
    }

    /// Asks the node that answered last, then the others; one whose answer may be old only if no other has a newer one.
    pub(super) async fn send(&self, ask: Ask) -> Result<Answer, Failure> {
        let first = self.present.load(Ordering::Relaxed);
        let mut worst: Option<Failure> = None;
        let mut old: Option<(usize, Answer)> = None;
        for n in 0..self.bases.len() {
            let at = (first + n) % self.bases.len();
            match self.send_to(&self.bases[at], &ask).await {
                Ok(answer) if answer.old.is_some() && ask.judges_age() => {
                    old.get_or_insert((at, answer));
                }
                Ok(answer) => {
                    self.present.store(at, Ordering::Relaxed);
                    return Ok(answer);
                }
                Err(Miss::Final(failure)) => return Err(failure),
                // A node that says why it cannot answer tells more than one that is not there.
                Err(Miss::Next(failure)) => {
                    if worst.as_ref().is_none_or(|worst| worst.exit == Exit::Error) {
                        worst = Some(failure);
                    }
                }
            }
        }
        if let Some((at, answer)) = old {
            self.present.store(at, Ordering::Relaxed);
            *self.old.lock().unwrap_or_else(PoisonError::into_inner) = answer.old.clone();
            return Ok(answer);
        }
        Err(worst.unwrap_or_else(|| Failure::usage("--api names no node: give at least one URL")))
    }

    /// Why what was shown may be old, if it may.
    pub(super) fn old(&self) -> Option<String> {
        self.old.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    async fn send_to(&self, base: &Url, ask: &Ask) -> Result<Answer, Miss> {
        let mut request = self.http.request(ask.method.clone(), ask.url(base)).timeout(self.timeout);
        if let Some(name) = actor() {
            request = request.header("limosa-actor", name);
        }
        if let Some(tag) = &ask.if_match {
            request = request.header("if-match", tag);
        }
        if let Some(body) = &ask.body {
            request = request.json(body);
        }
        let reads = ask.method == Method::GET;
        let response = request.send().await.map_err(|error| self.miss(base, reads, &error))?;
        let status = response.status();
        let tag = response.headers().get("etag").and_then(|tag| tag.to_str().ok()).map(str::to_owned);
        let old = old(base, response.headers());
        let bytes = response.bytes().await.map_err(|error| self.miss(base, reads, &error))?;
        if status.is_success() {
            let body = if bytes.is_empty() { Ok(Value::Null) } else { serde_json::from_slice(&bytes) };
            let body = body.map_err(|error| {
                let message = format!("{base} gives no JSON: {error}; is it the API of a placement node?");
                Miss::Final(Failure::new(Exit::Error, message))
            })?;
            return Ok(Answer { body, tag, old });
        }
        Err(refusal(base, status, &bytes))
    }

    fn miss(&self, base: &Url, reads: bool, error: &reqwest::Error) -> Miss {
        if error.is_timeout() && !error.is_connect() {
            let silent = format!("{base} gave no answer within {:?}", self.timeout);
            // A node that hangs keeps its connections; what only reads may be asked of the next at once.
            return if reads {
                Miss::Next(Failure::new(Exit::Timeout, silent))
            } else {
                let message = format!("{silent}; the request may still take effect");
                Miss::Final(Failure::new(Exit::Timeout, message))
            };
        }
        let mut cause: &dyn Error = error;
        while let Some(deeper) = cause.source() {
            cause = deeper;
        }
        let message = format!(
            "{base} cannot be reached: {cause}; give a placement node's API with --api or LIMOSA_API"
        );
        Miss::Next(Failure::new(Exit::Error, message))
    }
}

/// Why an answer may be old.
fn old(base: &Url, headers: &HeaderMap) -> Option<String> {
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
    if text(QUORUM_HEADER) != Some("no") {
        return None;
    }
    let age = text(QUORUM_AGE_HEADER).and_then(|age| age.parse::<u64>().ok());
    let since = age.map_or_else(String::new, |ms| format!(" for {:.1} s", ms as f64 / 1e3));
    Some(format!(
        "{base} has heard of no majority of the placement nodes{since}: what it shows may be old (`limosa raft status`)"
    ))
}

fn refusal(base: &Url, status: StatusCode, body: &[u8]) -> Miss {
    let message = match serde_json::from_slice::<ProblemBody>(body) {
        Ok(ProblemBody { field: Some(field), detail, .. }) if !detail.contains(&field) => {
            format!("{field}: {detail}")
        }
        Ok(problem) => problem.detail,
        Err(_) => format!("{base} answered {status}: is it the API of a placement node?"),
    };
    let exit = match status.as_u16() {
        400 | 413 | 415 | 422 | 428 => Exit::Usage,
        404 => Exit::NotFound,
        409 | 412 => Exit::Conflict,
        503 => Exit::Degraded,
        504 => Exit::Timeout,
        _ => Exit::Error,
    };
    let failure = Failure::new(exit, message);
    if status == StatusCode::SERVICE_UNAVAILABLE { Miss::Next(failure) } else { Miss::Final(failure) }
}

fn parse_base(text: &str) -> Result<Url, Failure> {
    let wrong = |why: String| {
        Failure::usage(format!("--api {text:?}: {why}; give a URL such as http://127.0.0.1:8470"))
    };
    let url = Url::parse(text.trim()).map_err(|error| wrong(error.to_string()))?;
    match url.scheme() {
        "http" if url.has_host() => Ok(url),
        "http" => Err(wrong("no host".into())),
        scheme => Err(wrong(format!("{scheme} is not spoken, only http"))),
    }
}

/// The login name, for the audit log; not if the API would not take it.
fn actor() -> Option<String> {
    let name = std::env::var("USER").or_else(|_| std::env::var("LOGNAME")).ok()?;
    let plain = name.bytes().all(|byte| byte.is_ascii_graphic());
    (plain && (1..=64).contains(&name.len())).then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_are_encoded() {
        let base = parse_base("http://127.0.0.1:8470").unwrap();
        let url = Ask::get(&["groups", "1:100.64.3.0/24"]).query("limit", Some(3)).url(&base);
        assert_eq!(url.as_str(), "http://127.0.0.1:8470/v1/groups/1:100.64.3.0%2F24?limit=3");
    }

    #[test]
    fn a_base_that_cannot_work_is_named() {
        for wrong in ["", "127.0.0.1:8470", "https://127.0.0.1", "unix:/run/limosa"] {
            let failure = parse_base(wrong).unwrap_err();
            assert_eq!(failure.exit, Exit::Usage);
            assert!(failure.message.contains(&format!("{wrong:?}")), "{}", failure.message);
        }
    }
}
