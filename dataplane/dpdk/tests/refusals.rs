//! Starts that must fail, each with an error that says what to do. A process of its own: a failed start is final.

#![expect(clippy::unwrap_used, reason = "tests")]

mod common;

use common::config;
use dpdk::{Eal, EalConfig, EalError, Memory};

#[test]
fn a_start_that_cannot_work_says_what_to_do() {
    let lcore = Eal::start(&EalConfig { lcore: Some(1023), ..config() }).unwrap_err();
    assert!(matches!(lcore, EalError::Lcore { lcore: 1023, .. }));
    assert!(lcore.to_string().contains("choose one of them as lcore"), "{lcore}");

    let memory = Memory::Huge { megabytes: 1 << 30 };
    let few = Eal::start(&EalConfig { memory, ..config() }).unwrap_err();
    assert!(matches!(few, EalError::HugePages { .. }), "{few}");
    assert!(few.to_string().contains("set huge_pages = false"), "{few}");

    let wrong = Eal::start(&EalConfig { extra: vec!["--no-such-thing".to_owned()], ..config() }).unwrap_err();
    let text = wrong.to_string();
    assert!(matches!(wrong, EalError::Refused { .. }), "{text}");
    assert!(text.contains("--no-such-thing") && text.contains("A wrong argument comes from `eal`"), "{text}");

    assert!(matches!(Eal::start(&config()), Err(EalError::Started)));
}
