//! DPDK's environment abstraction layer: its start, and its clock.

use std::ffi::{CStr, CString, c_char, c_int};
use std::marker::PhantomData;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sched::{CpuSet, sched_getaffinity};
use nix::unistd::Pid;

use crate::error::EalError;

/// Where packets and tables of DPDK live.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Memory {
    /// In huge pages.
    Huge {
        /// Taken at the start; more is taken when it is wanted.
        megabytes: u32,
    },
    /// In ordinary pages: slower, but nothing needs to be reserved.
    Ordinary {
        /// All that there will be.
        megabytes: u32,
    },
}

/// How DPDK is started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EalConfig {
    /// The processor that the calling thread is bound to; any that it may use without.
    pub lcore: Option<usize>,
    /// Memory.
    pub memory: Memory,
    /// The one PCI device to be looked at, if any.
    pub pci: Option<String>,
    /// More arguments, as they are.
    pub extra: Vec<String>,
}

/// The proof that DPDK was started in this process.
#[derive(Debug)]
pub struct Eal {
    /// Made only by [`Eal::start`].
    _private: PhantomData<()>,
}

static STARTED: AtomicBool = AtomicBool::new(false);

impl Eal {
    /// Starts DPDK, and binds this thread to its processor.
    ///
    /// # Errors
    /// [`EalError`]. After any but the checks of processor and huge pages no second start is possible.
    pub fn start(config: &EalConfig) -> Result<Self, EalError> {
        let lcore = choose_lcore(config.lcore)?;
        if let Memory::Huge { megabytes } = config.memory {
            check_huge_pages(megabytes)?;
        }
        let arguments = arguments(config, lcore);
        let strings: Vec<CString> = arguments
            .iter()
            .map(|text| CString::new(text.as_str()).map_err(|_| EalError::Zero(text.clone())))
            .collect::<Result<_, _>>()?;
        if STARTED.swap(true, Ordering::SeqCst) {
            return Err(EalError::Started);
        }
        // DPDK may keep pointers to its arguments, and reorders the array: both are given away for good.
        let array: Vec<*mut c_char> = strings.into_iter().map(CString::into_raw).collect();
        let array = array.leak();
        let count = c_int::try_from(array.len()).unwrap_or(c_int::MAX);
        // SAFETY: `array` has `count` strings that end in zero and are never freed; the swap above makes this the
        // only call in the process.
        let result = unsafe { dpdk_sys::rte_eal_init(count, array.as_mut_ptr()) };
        if result < 0 {
            return Err(EalError::Refused { reason: last_error(), arguments });
        }
        Ok(Self { _private: PhantomData })
    }
}

fn arguments(config: &EalConfig, lcore: usize) -> Vec<String> {
    let mut arguments = vec!["limosa".to_owned(), "--lcores".to_owned(), format!("0@{lcore}")];
    // Nothing in files: nothing of a process that died stays behind, and no two processes can meet.
    match config.memory {
        Memory::Huge { megabytes } => {
            // vhost wants few segments.
            arguments.extend(["--in-memory".to_owned(), "--single-file-segments".to_owned()]);
            arguments.extend(["-m".to_owned(), megabytes.to_string()]);
        }
        Memory::Ordinary { megabytes } => {
            arguments.extend(["--no-huge".to_owned(), "-m".to_owned(), megabytes.to_string()]);
            arguments.extend(["--no-shconf".to_owned(), "--file-prefix".to_owned(), "limosa".to_owned()]);
            arguments.push("--iova-mode=va".to_owned());
        }
    }
    arguments.push("--no-telemetry".to_owned());
    match &config.pci {
        Some(address) => arguments.extend(["--allow".to_owned(), address.clone()]),
        None => arguments.push("--no-pci".to_owned()),
    }
    arguments.push("--log-level=warning".to_owned());
    arguments.extend(config.extra.iter().cloned());
    arguments
}

fn choose_lcore(wanted: Option<usize>) -> Result<usize, EalError> {
    let set = sched_getaffinity(Pid::from_raw(0)).unwrap_or_default();
    let allowed: Vec<usize> = (0..CpuSet::count()).filter(|cpu| set.is_set(*cpu).unwrap_or(false)).collect();
    match wanted {
        None => Ok(allowed.first().copied().unwrap_or(0)),
        Some(lcore) if allowed.contains(&lcore) => Ok(lcore),
        Some(lcore) => Err(EalError::Lcore { lcore, allowed }),
    }
}

/// DPDK says only "cannot get hugepage information"; this says how many are missing.
fn check_huge_pages(wanted_mb: u32) -> Result<(), EalError> {
    let (mut free_mb, mut total_small) = (0, 0);
    for entry in std::fs::read_dir("/sys/kernel/mm/hugepages").into_iter().flatten().flatten() {
        let number = |file: &str| -> u64 {
            std::fs::read_to_string(entry.path().join(file))
                .ok()
                .and_then(|text| text.trim().parse().ok())
                .unwrap_or(0)
        };
        let name = entry.file_name();
        let size_kb: u64 = name
            .to_string_lossy()
            .trim_start_matches("hugepages-")
            .trim_end_matches("kB")
            .parse()
            .unwrap_or(0);
        free_mb += number("free_hugepages") * size_kb / 1024;
        if size_kb == 2048 {
            total_small = number("nr_hugepages");
        }
    }
    if free_mb >= u64::from(wanted_mb) {
        return Ok(());
    }
    let missing = (u64::from(wanted_mb) - free_mb).div_ceil(2);
    Err(EalError::HugePages { wanted_mb, free_mb, pages: total_small + missing })
}

/// What the error number of this thread says.
pub(crate) fn last_error() -> String {
    // SAFETY: reads a variable of this thread.
    describe(unsafe { dpdk_sys::limosa_errno() })
}

/// What an error number says; negative ones, as DPDK returns them, too.
pub(crate) fn describe(number: c_int) -> String {
    // SAFETY: returns a string that is either static or of this thread and lives until the next call.
    let text = unsafe { CStr::from_ptr(dpdk_sys::rte_strerror(number.saturating_abs())) };
    text.to_string_lossy().into_owned()
}

/// The processor's cycle counter.
#[must_use]
pub fn cycles() -> u64 {
    // SAFETY: reads a register.
    unsafe { dpdk_sys::limosa_cycles() }
}

/// How fast [`cycles`] counts.
#[must_use]
pub fn cycles_per_second(_: &Eal) -> u64 {
    // SAFETY: DPDK was started, so the rate is known.
    unsafe { dpdk_sys::rte_get_tsc_hz() }
}
