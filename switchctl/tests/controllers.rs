//! Who may connect to the switch and who listens at its paths: silent ones keep nobody out, and what is another's stays.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod common;
mod running;

use std::io::{Read, Write};
use std::net::UdpSocket;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use common::{OWN, in_force, next, rules};
use running::{Running, attach};
use switchctl::softswitch::{self, PortKind, SwitchError};
use switchctl::{Session, SessionOptions, SwitchEvent};

/// Connects as soon as somebody listens, and says nothing.
fn silent(running: &Running) -> UnixStream {
    let path = running.path("control");
    for _ in 0..1_500 {
        if let Ok(stream) = UnixStream::connect(&path) {
            stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
            return stream;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    panic!("nobody listens at {}", path.display());
}

fn identity(path: &Path) -> u64 {
    std::fs::symlink_metadata(path).unwrap().ino()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn silent_connections_neither_keep_a_controller_out_nor_displace_it() {
    let running = Running::start();
    let mut strangers: Vec<_> = (0..40).map(|_| silent(&running)).collect();
    let (switch, mut events) = Session::spawn(running.address(), SessionOptions::default());
    assert!(matches!(next(&mut events).await, SwitchEvent::Connected { .. }));
    for round in 1..20 {
        strangers.extend((0..5).map(|_| silent(&running)));
        switch.set_rules(rules(OWN, (round % 2 == 0).then_some(0)), round);
        loop {
            let event = next(&mut events).await;
            assert_ne!(event, SwitchEvent::Disconnected, "it was displaced");
            if matches!(event, SwitchEvent::InForce { tag, .. } if tag == round) {
                break;
            }
        }
    }
    drop(strangers);
}

#[test]
fn who_says_no_hello_is_left() {
    let running = Running::start();
    let mut stranger = silent(&running);
    let mut hello = [0; 16];
    stranger.read_exact(&mut hello).unwrap();
    assert_eq!(stranger.read(&mut hello).unwrap(), 0, "the connection ends");
}

/// As `printf ... | nc` does.
#[test]
fn who_says_no_more_still_gets_its_answers() {
    const ECHOES: usize = 60;
    const LEN: u16 = 60_000;
    let running = Running::start();
    let mut stream = silent(&running);
    // OFPT_HELLO and OFPT_ECHO_REQUEST of OpenFlow 1.4.
    stream.write_all(&[5, 0, 0, 8, 0, 0, 0, 1]).unwrap();
    let mut echo = vec![0; usize::from(LEN)];
    echo[..2].copy_from_slice(&[5, 2]);
    echo[2..4].copy_from_slice(&LEN.to_be_bytes());
    let mut asks = stream.try_clone().unwrap();
    let asked = std::thread::spawn(move || {
        (0..ECHOES).for_each(|_| asks.write_all(&echo).unwrap());
        asks.shutdown(std::net::Shutdown::Write).unwrap();
    });
    asked.join().unwrap();
    let mut answers = Vec::new();
    stream.read_to_end(&mut answers).unwrap();
    let hello = usize::from(u16::from_be_bytes([answers[2], answers[3]]));
    assert_eq!(answers.len(), hello + ECHOES * usize::from(LEN));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_switch_takes_nothing_from_the_first() {
    let running = Running::start();
    let (switch, mut events) = Session::spawn(running.address(), SessionOptions::default());
    switch.set_rules(rules(OWN, Some(0)), 1);
    in_force(&mut events, 1).await;
    let paths = ["control", "inside", "outside", "worker0"].map(|name| running.path(name));
    let before = paths.each_ref().map(|path| identity(path));
    let stop = AtomicBool::new(true);
    let refused = |config| match softswitch::run(&config, &softswitch::Tunnels::default(), &stop) {
        Err(SwitchError::Listen { at, source }) => (at, source.to_string()),
        other => panic!("{other:?}"),
    };
    // Its tunnel's port is in use, so no path is even looked at.
    assert_eq!(refused(running.config()).0, running.tunnel.to_string());
    let mut elsewhere = running.config();
    for port in &mut elsewhere.ports {
        if let PortKind::Tunnel { local, .. } = &mut port.kind {
            *local = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        }
    }
    let (at, why) = refused(elsewhere);
    assert!(at.ends_with("inside") && why.contains("another process listens there"), "{at}: {why}");
    assert_eq!(paths.each_ref().map(|path| identity(path)), before);
    assert!(switch.port_stats().await.is_ok());
    drop(silent(&running));
}

#[test]
fn at_its_end_a_switch_removes_its_own_sockets_and_no_others() {
    let mut running = Running::start();
    drop(silent(&running));
    let (own, lost) = (running.path("outside"), running.path("inside"));
    std::fs::remove_file(&lost).unwrap();
    let other = UnixListener::bind(&lost).unwrap();
    running.halt();
    assert!(!own.exists());
    UnixStream::connect(&lost).unwrap();
    drop(other);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_socket_that_was_taken_away_is_bound_again() {
    let running = Running::start();
    let (switch, mut events) = Session::spawn(running.address(), SessionOptions::default());
    switch.set_rules(rules(OWN, Some(0)), 1);
    in_force(&mut events, 1).await;
    for name in ["control", "inside"] {
        std::fs::remove_file(running.path(name)).unwrap();
    }
    drop(silent(&running));
    drop(attach(&running.path("inside")));
    // Who was connected still is, and a new one finds the rules that were there.
    assert!(switch.port_stats().await.is_ok());
    let (_another, mut events) = Session::spawn(running.address(), SessionOptions::default());
    let connected = next(&mut events).await;
    assert!(matches!(connected, SwitchEvent::Connected { rules, .. } if rules > 0), "{connected:?}");
}
