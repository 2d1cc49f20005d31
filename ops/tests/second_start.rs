//! A process that is started a second time on the same file says so and touches nothing; the first one goes on.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

/// Longest wait for a process to come up, or to end: far more than it takes, for a busy machine.
const LOOKS: usize = 1_500;
const BETWEEN: Duration = Duration::from_millis(20);

fn command(process: &str, config: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_limosa"));
    command.args(["run", process, "--with-parent", "--config"]).arg(config).stdin(Stdio::piped());
    command
}

/// A process that is killed with the value.
struct Mortal(Child);

impl Drop for Mortal {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start(process: &str, config: &Path) -> Mortal {
    Mortal(command(process, config).stderr(Stdio::null()).spawn().unwrap())
}

fn until(what: &str, done: impl Fn() -> bool) {
    for _ in 0..LOOKS {
        if done() {
            return;
        }
        std::thread::sleep(BETWEEN);
    }
    panic!("{what} did not happen");
}

/// A second start, which has to end by itself.
fn second(process: &str, config: &Path) -> Output {
    let mut child = command(process, config).stderr(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    for _ in 0..LOOKS {
        if child.try_wait().unwrap().is_some() {
            return child.wait_with_output().unwrap();
        }
        std::thread::sleep(BETWEEN);
    }
    drop(Mortal(child));
    panic!("a second limosa run {process} goes on");
}

fn assert_refused(process: &str, config: &Path, path: &str) {
    let output = second(process, config);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success(), "{said}");
    assert!(
        said.contains(path) && said.contains(&format!("limosa run {process} is already running here")),
        "{said}"
    );
    assert!(said.contains("nothing was changed"), "{said}");
}

/// The same file, and not another one with that name.
fn identity(path: &Path) -> (u64, i64, i64) {
    let found = std::fs::symlink_metadata(path).unwrap();
    (found.ino(), found.ctime(), found.ctime_nsec())
}

fn write(directory: &Path, name: &str, text: &str) -> PathBuf {
    let path = directory.join(name);
    std::fs::write(&path, text).unwrap();
    path
}

const SWITCH: &str = r#"
site = 1
name = "home"
control = "switch.control"
inside = "inside"
outside = "outside"
directory = "."
workers = [1]
"#;

#[test]
fn a_second_switch_is_refused_and_the_first_goes_on() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let config = write(directory.path(), "switch.toml", SWITCH);
    // Another switch that has one socket in common, and more of its own.
    let common = SWITCH.replace("switch.control", "other.control").replace("\"outside\"", "\"other\"");
    let common = write(directory.path(), "other.toml", &common);
    let first = start("switch", &config);
    let greets = || {
        let Ok(mut stream) = UnixStream::connect(path("switch.control")) else { return false };
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        let mut hello = [0; 16];
        stream.read_exact(&mut hello).is_ok() && hello[..2] == [5, 0]
    };
    until("the switch greets", greets);
    let sockets = ["switch.control", "inside", "outside", "worker-1.packets"].map(path);
    let before = sockets.each_ref().map(|path| identity(path));
    assert_refused("switch", &config, "switch.control");
    assert_refused("switch", &common, "inside");
    assert_eq!(sockets.each_ref().map(|path| identity(path)), before);
    assert!(greets(), "the first one is still there");
    assert!(!path("other").exists(), "nothing was made");
    // Killed, it leaves its sockets, which are nobody's then.
    drop(first);
    let next = start("switch", &config);
    until("the next switch greets", greets);
    drop(next);
    // What is no socket is not the switch's to replace.
    std::fs::remove_file(path("inside")).unwrap();
    std::fs::write(path("inside"), "precious").unwrap();
    let output = second("switch", &config);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains("inside: something that is no socket"), "{said}");
    assert_eq!(std::fs::read_to_string(path("inside")).unwrap(), "precious");
}

#[test]
fn a_second_worker_is_refused_and_the_first_goes_on() {
    let directory = tempfile::tempdir().unwrap();
    let text = "site = 1\nworker = 1\ndirectory = \".\"\nswitch = \"worker-1.packets\"\nflows = 1024\n";
    let config = write(directory.path(), "worker.toml", text);
    let control = directory.path().join("worker-1.control");
    let first = start("worker", &config);
    until("the worker listens", || UnixStream::connect(&control).is_ok());
    let before = identity(&control);
    assert_refused("worker", &config, "worker-1.control");
    assert_eq!(identity(&control), before);
    assert!(UnixStream::connect(&control).is_ok());
    drop(first);
    let _next = start("worker", &config);
    until("the next worker listens", || {
        UnixStream::connect(&control).is_ok() && identity(&control) != before
    });
}

#[test]
fn a_second_start_is_refused_also_where_the_lock_files_were_removed() {
    let directory = tempfile::tempdir().unwrap();
    let worker = "site = 1\nworker = 1\ndirectory = \".\"\nswitch = \"worker-1.packets\"\nflows = 1024\n";
    for (process, text, socket) in
        [("switch", SWITCH, "switch.control"), ("worker", worker, "worker-1.control")]
    {
        let config = write(directory.path(), &format!("{process}.toml"), text);
        let socket = directory.path().join(socket);
        let _first = start(process, &config);
        until("the first one listens", || UnixStream::connect(&socket).is_ok());
        for entry in std::fs::read_dir(directory.path()).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|extension| extension == "lock") {
                std::fs::remove_file(path).unwrap();
            }
        }
        let before = identity(&socket);
        let output = second(process, &config);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        let name = socket.file_name().unwrap().to_string_lossy();
        let expected = format!("{name}: another process listens here");
        assert!(!output.status.success() && said.contains(&expected), "{said}");
        assert_eq!(identity(&socket), before);
        assert!(UnixStream::connect(&socket).is_ok(), "the first one can be reached");
    }
}

/// Placement nodes and agents: other files with other addresses, but the same directory.
#[test]
fn a_second_placement_node_or_agent_in_a_directory_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let certs = Command::new(env!("CARGO_BIN_EXE_limosa"))
        .args(["dev", "certs", "--cluster", "try", "--site", "home", "--placement", "1", "--directory"])
        .arg(directory.path().join("certs"))
        .output()
        .unwrap();
    assert!(certs.status.success(), "{certs:?}");
    let tls = |name: &str| {
        format!(
            "[tls]\ncertificate = \"certs/{name}.pem\"\nkey = \"certs/{name}.key\"\nauthority = \"certs/authority.pem\"\n"
        )
    };
    let placement = |port: u16| {
        let listen = format!("listen = \"127.0.0.1:{port}\"\napi = \"127.0.0.1:{}\"\n", port + 1);
        format!("cluster = \"try\"\nid = 1\n{listen}directory = \"state\"\n{}", tls("placement-1"))
    };
    let site = |port: u16| {
        let listen = format!("listen = \"127.0.0.1:{port}\"\nmetrics = \"127.0.0.1:{}\"\n", port + 1);
        let names = "cluster = \"try\"\nsite = 1\nname = \"home\"\nswitch = \"unix:switch.control\"\n";
        let placement = "placement = [{ id = 1, address = \"127.0.0.1:1\" }]\n";
        format!(
            "{names}{listen}{placement}[workers]\ndirectory = \"workers\"\nexpected = [1]\n{}",
            tls("site-home")
        )
    };
    let free = || {
        let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        socket.local_addr().unwrap().port() & !1
    };
    for (process, text, path) in
        [("placement", &placement as &dyn Fn(u16) -> String, "state"), ("site", &site, "workers")]
    {
        let port = free();
        let config = write(directory.path(), &format!("{process}.toml"), &text(port));
        let other = write(directory.path(), &format!("{process}-2.toml"), &text(free()));
        let _first = start(process, &config);
        let listens = || std::net::TcpStream::connect(("127.0.0.1", port + 1)).is_ok();
        until("the first one listens", listens);
        assert_refused(process, &other, path);
        assert!(listens(), "the first one is still there");
    }
}
