//! What can go wrong, and what to do then.

/// DPDK did not start. Nothing can be done with it in this process.
#[derive(Debug, thiserror::Error)]
pub enum EalError {
    /// A second start: DPDK can be started once in a process.
    #[error("DPDK was already started in this process: run one worker per process")]
    Started,
    /// A string with a zero byte.
    #[error("EAL argument {0:?} has a zero byte: remove it")]
    Zero(String),
    /// The processor is not there, or this process may not use it.
    #[error(
        "CPU {lcore} cannot be used by this process; it may use {allowed:?}: choose one of them as lcore, or widen the \
         CPU set of the service (CPUAffinity= of systemd, cpuset of the container)"
    )]
    Lcore {
        /// What was asked for.
        lcore: usize,
        /// What there is.
        allowed: Vec<usize>,
    },
    /// Too few huge pages.
    #[error(
        "{wanted_mb} MB of huge pages are wanted and {free_mb} MB are free: reserve more (sysctl -w \
         vm.nr_hugepages={pages} for 2 MB pages), lower memory_mb, or set huge_pages = false"
    )]
    HugePages {
        /// Wanted.
        wanted_mb: u32,
        /// Free now.
        free_mb: u64,
        /// 2 MB pages in all that would do.
        pages: u64,
    },
    /// DPDK's own refusal.
    #[error(
        "DPDK did not start: {reason}. Its own messages are on standard error; arguments were {arguments:?}. A wrong \
         argument comes from `eal`; \"Cannot allocate memory\" wants a smaller memory_mb or more (huge) pages; \
         \"Permission denied\" wants root or the capabilities in docs/operations.md"
    )]
    Refused {
        /// By its error number.
        reason: String,
        /// What it was started with.
        arguments: Vec<String>,
    },
}

/// There is no pool.
#[derive(Debug, thiserror::Error)]
pub enum PoolError {
    /// Too little memory, most of the time.
    #[error(
        "{buffers} buffers of {len} bytes do not fit ({reason}): raise memory_mb to {needed_mb} or more, or lower buffers \
         (and hold_packets with it)"
    )]
    Memory {
        /// How many.
        buffers: u32,
        /// How long.
        len: u16,
        /// As DPDK says.
        reason: String,
        /// What would do.
        needed_mb: u64,
    },
    /// The name has a zero byte or is too long.
    #[error("pool name {0:?} is not 1 to 25 letters")]
    Name(String),
}

/// There is no port.
#[derive(Debug, thiserror::Error)]
pub enum PortError {
    /// The device could not be made or found.
    #[error("device {device:?} cannot be opened ({reason}): {remedy}")]
    Device {
        /// As configured.
        device: String,
        /// As DPDK says.
        reason: String,
        /// What to look at.
        remedy: String,
    },
    /// The device is there and cannot be set up like this.
    #[error("device {device:?}: {step} failed ({reason}): {remedy}")]
    Setup {
        /// As configured.
        device: String,
        /// What was being done.
        step: &'static str,
        /// As DPDK says.
        reason: String,
        /// What to look at.
        remedy: String,
    },
}
