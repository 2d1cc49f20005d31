//! The deployment that is struck: three sites at their real distances, little traffic but of every group, and a small disk of its
//! own for one placement node.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use limosa::demo::cluster::{Cluster, Layout};
use limosa::demo::scenario::world_spec;
use limosa::demo::world::{World, WorldHandle};
use limosa::demo::{Thresholds, built_in};
use serde_json::json;

use crate::plan::WORKERS;
use crate::services::SERVICES;

/// The placement node whose disk may be full.
pub(crate) const DISK_NODE: u64 = 2;
/// Room for its database, many times over.
const DISK_LEN: &str = "size=64m";
/// Storms end agents, and a new one sends no markers of what the last one missed: old owners that waited for them for minutes would have
/// something left whenever it is looked whether all is whole again.
const RELAY_LATE: Duration = Duration::from_secs(20);
/// With a load of six times the usual of one site agents start workers, and stop them when it is gone.
const ELASTIC: Thresholds = Thresholds { busy_high: 0.03, busy_low: 0.015, hold_s: 2, pause_s: 5 };

/// A file system in memory, for as long as this is there.
pub(crate) struct Disk {
    path: PathBuf,
}

impl Disk {
    /// Only root may mount one.
    fn mount(path: &Path) -> Option<Self> {
        fs::create_dir_all(path).unwrap();
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", DISK_LEN, "tmpfs"]).arg(path).stderr(Stdio::null());
        mount.status().is_ok_and(|status| status.success()).then(|| Self { path: path.to_owned() })
    }

    fn filler(&self) -> PathBuf {
        self.path.join("filler")
    }

    /// Takes all the room that is left.
    pub(crate) fn fill(&self) {
        let mut file = File::create(self.filler()).unwrap();
        let mut piece = vec![0; 1 << 20];
        while !piece.is_empty() {
            if file.write_all(&piece).is_err() {
                piece.truncate(piece.len() / 2);
            }
        }
    }

    pub(crate) fn free(&self) {
        // Nothing is there when it was not filled.
        let _ = fs::remove_file(self.filler());
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Its process may still be about to end.
        let _ = Command::new("umount").arg("-l").arg(&self.path).status();
    }
}

/// What outlives the processes of a run.
pub(crate) struct Deployment {
    pub(crate) disk: Option<Disk>,
    _directory: Option<tempfile::TempDir>,
}

impl Deployment {
    pub(crate) async fn start(seed: u64) -> (Self, Cluster, WorldHandle) {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        // A short path, since socket paths end at 107 bytes.
        let mut builder = tempfile::Builder::new();
        builder.prefix("limosa-");
        let (kept, path) = match std::env::var_os("LIMOSA_TEST_DIRECTORY") {
            Some(parent) => {
                std::fs::create_dir_all(&parent).unwrap();
                (None, builder.tempdir_in(parent).unwrap().keep())
            }
            None => {
                let directory = builder.tempdir().unwrap();
                let path = directory.path().to_owned();
                (Some(directory), path)
            }
        };
        let disk = Disk::mount(&path.join(format!("placement-{DISK_NODE}")));
        let layout = Layout {
            sites: built_in(),
            workers: WORKERS,
            flows: 1 << 14,
            directory: path,
            binary: PathBuf::from(env!("CARGO_BIN_EXE_limosa")),
            elastic: Some(ELASTIC),
            relay_late: Some(RELAY_LATE),
        };
        let cluster = Cluster::start(layout).await.unwrap();
        cluster.set_policy(json!({ "automatic": false })).await.unwrap();
        cluster.add_sites(100_000).await.unwrap();
        for service in &SERVICES {
            cluster.put(&service.path(), &service.body(), None).await.unwrap();
        }
        cluster.until_ready().await.unwrap();
        let mut spec = world_spec(&cluster, seed);
        spec.tcp_connections = 48;
        spec.udp_flows = 1_200;
        spec.udp_fast_flows = 120;
        spec.udp_interval = (Duration::from_secs(1), Duration::from_secs(2));
        // The numbers that are remembered of a flow last longer than anybody holds its packets.
        spec.udp_fast_interval = Duration::from_millis(250);
        spec.grace = Duration::from_secs(3);
        let world = World::start(spec).unwrap();
        world.begin_act("chaos").unwrap();
        (Self { disk, _directory: kept }, cluster, world)
    }
}
