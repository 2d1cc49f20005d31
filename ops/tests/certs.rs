//! `limosa dev certs` through the binary, and a process with certificates of another.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};

fn limosa(directory: &Path, arguments: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_limosa"));
    command.current_dir(directory).args(arguments.split(' ')).output().unwrap()
}

fn lines(output: &Output) -> Vec<String> {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout.clone()).unwrap().lines().map(str::to_owned).collect()
}

#[test]
fn certificates_are_added_to_an_authority_that_stays() {
    let directory = tempfile::tempdir().unwrap();
    let read = |name: &str| fs::read(directory.path().join("certs").join(name)).unwrap();
    let certs =
        |rest: &str| limosa(directory.path(), &format!("dev certs --cluster try --directory certs {rest}"));
    assert_eq!(lines(&certs("--site home")), ["made certs/site-home.pem"]);
    let before = ["authority.pem", "authority.key", "site-home.pem", "site-home.key"].map(read);
    assert_eq!(
        lines(&certs("--site home --placement 1 --days 90")),
        ["kept certs/site-home.pem", "made certs/placement-1.pem"]
    );
    assert_eq!(["authority.pem", "authority.key", "site-home.pem", "site-home.key"].map(read), before);
    for key in ["authority.key", "site-home.key", "placement-1.key"] {
        let mode = fs::metadata(directory.path().join("certs").join(key)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{key}");
    }
    assert_eq!(lines(&certs("--site home --renew")), ["made certs/site-home.pem"]);
    assert_ne!(read("site-home.pem"), before[2]);
    for id in ["0", "9223372036854775808"] {
        let refused = certs(&format!("--site home --placement {id}"));
        let error = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(error.contains(&format!("--placement {id}: use 1 to 9223372036854775807")), "{error}");
        assert_eq!(refused.status.code(), Some(1));
        assert!(!directory.path().join(format!("certs/placement-{id}.pem")).exists());
    }
    let refused = certs("--site home --days 0");
    assert!(String::from_utf8_lossy(&refused.stderr).contains("--days 0: use 1 to 825"));
    assert_eq!(refused.status.code(), Some(1));
}

const PLACEMENT: &str = r#"
cluster = "try"
id = 2
listen = "127.0.0.1:0"
api = "127.0.0.1:0"
directory = "placement"
tls = { certificate = "certs/placement-1.pem", key = "certs/placement-1.key", authority = "certs/authority.pem" }
"#;

#[test]
fn a_node_does_not_start_with_the_certificate_of_another() {
    let directory = tempfile::tempdir().unwrap();
    lines(&limosa(directory.path(), "dev certs --cluster try --directory certs --placement 1"));
    fs::write(directory.path().join("placement.toml"), PLACEMENT).unwrap();
    let refused = limosa(directory.path(), "run placement --config placement.toml");
    let error = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success());
    let wanted = "placement-1.pem (tls.certificate): it is the certificate of limosa://try/placement/1, and this node \
                  is limosa://try/placement/2";
    assert!(error.contains(wanted), "{error}");
    let files = fs::read_dir(directory.path().join("placement")).into_iter().flatten().count();
    assert_eq!(files, 0, "nothing was begun");
}
