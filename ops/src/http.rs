//! Listeners for HTTP. Whoever connects and says nothing keeps nobody else out.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::http::Request;
use flow::Micros;
use hyper::body::{Frame, Incoming, SizeHint};
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{AbortHandle, JoinHandle, JoinSet};
use tokio::time::Sleep;

use crate::clock::Clock;

/// Connections at one time: a quarter of the files that a process may have open by default.
pub const CONNECTIONS_MAX: usize = 256;
/// How long a client may take to begin and end the head of a request, also of the next one on a connection that is kept.
/// Clients that poll do so more often, and those that come later connect again.
const HEAD_BOUND: Duration = Duration::from_secs(30);
/// How long a client may take to send the body of a request: some megabytes at most, on a path of the same machine or
/// through a proxy. Without a bound a body that never ends keeps a connection busy.
const BODY_BOUND: Duration = Duration::from_secs(30);
/// Pause after the system had no connection to give, as when it has no more files: one tried at once would fail as well.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Between two complaints that all connections are busy: whoever connects again and again is not to fill the log.
const COMPLAINT_INTERVAL: Micros = Micros(60_000_000);

/// What is known of one connection.
#[derive(Debug, Default)]
struct Activity {
    /// A request is in hand.
    busy: AtomicBool,
    /// It has made a request.
    known: AtomicBool,
    /// When it came, or its last request ended; microseconds.
    since: AtomicU64,
}

impl Activity {
    /// Where it stands among those that give way to others, the least first; `None` while a request is in hand.
    fn rank(&self) -> Option<(bool, u64)> {
        let rank = (self.known.load(Ordering::Relaxed), self.since.load(Ordering::Relaxed));
        (!self.busy.load(Ordering::Relaxed)).then_some(rank)
    }
}

/// A request in hand, which ends with the value.
struct InHand(Arc<Activity>, Clock);

impl InHand {
    fn new(activity: &Arc<Activity>, clock: Clock) -> Self {
        activity.known.store(true, Ordering::Relaxed);
        activity.busy.store(true, Ordering::Relaxed);
        Self(activity.clone(), clock)
    }
}

impl Drop for InHand {
    fn drop(&mut self) {
        self.0.since.store(self.1.now().0, Ordering::Relaxed);
        self.0.busy.store(false, Ordering::Relaxed);
    }
}

/// The body of a request, which has to come within a bound.
struct Bounded {
    body: Incoming,
    ends: Pin<Box<Sleep>>,
}

impl Bounded {
    fn new(body: Incoming) -> Self {
        Self { body, ends: Box::pin(tokio::time::sleep(BODY_BOUND)) }
    }
}

impl hyper::body::Body for Bounded {
    type Data = Bytes;
    type Error = axum::BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        match Pin::new(&mut self.body).poll_frame(context) {
            Poll::Ready(frame) => Poll::Ready(frame.map(|frame| frame.map_err(Into::into))),
            Poll::Pending if self.ends.as_mut().poll(context).is_ready() => {
                let late = format!("the body did not come within {} s", BODY_BOUND.as_secs());
                Poll::Ready(Some(Err(late.into())))
            }
            Poll::Pending => Poll::Pending,
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Serves until the task is aborted, which ends its connections. When there is no room, a connection without a request in
/// hand gives way: those that never made one first, the oldest of them before others.
pub fn serve(listener: TcpListener, router: Router) -> JoinHandle<()> {
    let clock = Clock::start();
    tokio::spawn(async move {
        let mut tasks = JoinSet::new();
        let mut open: Vec<(Arc<Activity>, AbortHandle)> = Vec::new();
        let mut complain_at = Micros(0);
        loop {
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::debug!(%error, "no connection for HTTP");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            while tasks.try_join_next().is_some() {}
            open.retain(|(_, task)| !task.is_finished());
            if open.len() >= CONNECTIONS_MAX && !make_room(&mut open) {
                let now = clock.now();
                if now >= complain_at {
                    complain_at = now.plus(COMPLAINT_INTERVAL);
                    tracing::warn!(
                        max = CONNECTIONS_MAX,
                        "all HTTP connections are busy: others are turned away"
                    );
                }
                continue;
            }
            let activity = Arc::new(Activity::default());
            activity.since.store(clock.now().0, Ordering::Relaxed);
            let task = tasks.spawn(serve_one(stream, router.clone(), activity.clone(), clock));
            open.push((activity, task));
        }
    })
}

fn make_room(open: &mut Vec<(Arc<Activity>, AbortHandle)>) -> bool {
    let ranks = open.iter().enumerate().filter_map(|(at, (activity, _))| Some((activity.rank()?, at)));
    let Some((_, longest)) = ranks.min() else { return false };
    open.swap_remove(longest).1.abort();
    true
}

async fn serve_one(stream: TcpStream, router: Router, activity: Arc<Activity>, clock: Clock) {
    let service = TowerToHyperService::new(router);
    let service = service_fn(move |request: Request<Incoming>| {
        let in_hand = InHand::new(&activity, clock);
        let answer = service.call(request.map(|body| Body::new(Bounded::new(body))));
        async move {
            let answer = answer.await;
            drop(in_hand);
            answer
        }
    });
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(HEAD_BOUND);
    // What goes wrong is the client's: it went, was too slow, or speaks no HTTP.
    if let Err(error) = builder.serve_connection(TokioIo::new(stream), service).await {
        tracing::debug!(%error, "an HTTP connection ended");
    }
}
