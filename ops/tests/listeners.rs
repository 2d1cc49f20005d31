//! The HTTP listeners and clients that say nothing, or not all.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Bytes;
use axum::routing::{get, post};
use limosa::http::{CONNECTIONS_MAX, serve};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;

/// Longer than any test takes: what waits for so long has hung.
const NEVER: Duration = Duration::from_secs(120);

#[tokio::test]
async fn silent_clients_make_room_for_others_and_who_waits_for_an_answer_does_not() {
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let (entered, answer) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let (enters, answers) = (entered.clone(), answer.clone());
    let waits = get(|| async move {
        enters.notify_one();
        answers.notified().await;
        "late"
    });
    let router = Router::new().route("/livez", get(|| async { "ok" })).route("/waits", waits);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let server = serve(listener, router);
    let ask = |path| async move {
        reqwest::Client::new().get(format!("http://{address}{path}")).send().await?.text().await
    };
    let waiting = tokio::spawn(ask("/waits"));
    entered.notified().await;
    let mut silent = Vec::new();
    for _ in 0..2 * CONNECTIONS_MAX {
        silent.push(TcpStream::connect(address).await.unwrap());
    }
    let answered = tokio::time::timeout(NEVER, ask("/livez")).await.expect("there is room");
    assert_eq!(answered.unwrap(), "ok");
    // The oldest have made room.
    let ended = tokio::time::timeout(NEVER, silent[0].read(&mut [0; 1])).await;
    assert!(ended.expect("it is closed").is_ok_and(|len| len == 0));
    answer.notify_one();
    assert_eq!(waiting.await.unwrap().unwrap(), "late");
    server.abort();
}

#[tokio::test]
async fn a_client_that_never_ends_its_head_or_its_body_is_left() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let _server = serve(listener, Router::new().route("/", post(|body: Bytes| async { body })));
    let half = |text: &'static str| async move {
        let mut client = TcpStream::connect(address).await.unwrap();
        client.write_all(text.as_bytes()).await.unwrap();
        let mut answer = String::new();
        let ended = tokio::time::timeout(NEVER, client.read_to_string(&mut answer)).await;
        ended.expect("it is closed").unwrap();
        answer
    };
    let body = "POST / HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9\r\n\r\nhalf";
    let (_, answer) = tokio::join!(half("GET / HT"), half(body));
    assert!(answer.starts_with("HTTP/1.1 400"), "{answer}");
}
