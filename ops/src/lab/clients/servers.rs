//! The servers, in the namespace of the world: nginx, OpenSSH and iperf3 with configurations of their own.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context;
use rand::{RngCore, SeedableRng};

use super::super::namespaces::Namespace;
use super::super::processes::Processes;
use super::super::underlay::server;

/// Where the SSH server listens.
pub(in super::super) const SSH_PORT: u16 = 2_222;
/// Where iperf3 listens, for TCP and for UDP.
pub(in super::super) const IPERF_PORTS: [u16; 2] = [5_201, 5_202];
/// What short requests are answered with.
pub(in super::super) const SHORT_LEN: usize = 1_000;

/// Files that clients and servers share.
#[derive(Clone, Debug)]
pub(in super::super) struct Files {
    directory: PathBuf,
    /// What is downloaded.
    pub(in super::super) big: PathBuf,
    /// What short requests are answered with.
    pub(in super::super) short: Vec<u8>,
    /// The key that the SSH session logs in with.
    pub(in super::super) key: PathBuf,
}

impl Files {
    /// Writes a big file and a short one of random bytes, and keys.
    ///
    /// # Errors
    /// A file cannot be written, or `ssh-keygen` fails.
    pub(in super::super) fn write(directory: &Path, big_len: usize) -> anyhow::Result<Self> {
        let own = directory.join("world");
        fs::create_dir_all(own.join("html"))?;
        let mut rng = rand::rngs::SmallRng::seed_from_u64(1);
        let mut short = vec![0; SHORT_LEN];
        rng.fill_bytes(&mut short);
        fs::write(own.join("html/short"), &short)?;
        let big = own.join("html/big");
        let mut file = fs::File::create(&big)?;
        let mut block = vec![0; 1 << 20];
        let mut left = big_len;
        while left > 0 {
            rng.fill_bytes(&mut block);
            let len = left.min(block.len());
            file.write_all(&block[..len])?;
            left -= len;
        }
        for name in ["host", "client"] {
            let path = own.join(name);
            let made = Command::new("ssh-keygen")
                .args(["-q", "-t", "ed25519", "-N", "", "-f"])
                .arg(&path)
                .output()
                .context("ssh-keygen")?;
            anyhow::ensure!(made.status.success(), "ssh-keygen: {}", String::from_utf8_lossy(&made.stderr));
        }
        let key = own.join("client");
        Ok(Self { directory: own, big, short, key })
    }

    /// Starts the servers that are near sites; the big file is sent at so many kilobytes per second.
    ///
    /// # Errors
    /// One cannot be started.
    pub(in super::super) fn serve(
        &self,
        world: &Namespace,
        kbytes_per_s: u32,
        processes: &mut Processes,
    ) -> anyhow::Result<()> {
        self.serve_http("nginx", world, kbytes_per_s, processes)?;
        let own = self.directory.display();

        // Where OpenSSH's own start script would make it.
        fs::create_dir_all("/run/sshd")?;
        let sshd = format!(
            "Port {SSH_PORT}\nHostKey {own}/host\nAuthorizedKeysFile {own}/client.pub\nPidFile none\n\
             StrictModes no\nUsePAM no\nPermitRootLogin prohibit-password\nPasswordAuthentication no\n\
             PrintMotd no\nPrintLastLog no\nUseDNS no\n"
        );
        let config = self.directory.join("sshd.conf");
        fs::write(&config, sshd)?;
        // It wants to be called by its full path.
        let mut command = world.command("/usr/sbin/sshd");
        command.args(["-D", "-e", "-f"]).arg(&config);
        processes.spawn("sshd", command)?;
        for port in IPERF_PORTS {
            let mut command = world.command("iperf3");
            // Bound, because where an answer goes follows from the address that it comes from.
            command.args(["-s", "-B", &server(1).to_string(), "-p", &port.to_string()]);
            processes.spawn(&format!("iperf3-server-{port}"), command)?;
        }
        Ok(())
    }

    /// Starts nginx under this name.
    ///
    /// # Errors
    /// It cannot be started.
    pub(in super::super) fn serve_http(
        &self,
        name: &str,
        namespace: &Namespace,
        kbytes_per_s: u32,
        processes: &mut Processes,
    ) -> anyhow::Result<()> {
        let own = self.directory.display();
        let nginx = format!(
            "daemon off;\nmaster_process off;\npid {own}/{name}.pid;\nerror_log {own}/{name}.log;\n\
             events {{ worker_connections 4096; }}\n\
             http {{\n  access_log off;\n  sendfile on;\n  tcp_nodelay on;\n\
             client_body_temp_path {own}/{name}-body;\n  proxy_temp_path {own}/{name}-proxy;\n\
             fastcgi_temp_path {own}/{name}-fastcgi;\n  uwsgi_temp_path {own}/{name}-uwsgi;\n\
             scgi_temp_path {own}/{name}-scgi;\n\
             server {{ listen 80 backlog=1024; root {own}/html; location /big {{ limit_rate {kbytes_per_s}k; }} }}\n}}\n"
        );
        let config = self.directory.join(format!("{name}.conf"));
        fs::write(&config, nginx)?;
        let mut command = namespace.command("nginx");
        command.arg("-c").arg(&config).args(["-e", "stderr"]);
        processes.spawn(name, command)
    }
}
