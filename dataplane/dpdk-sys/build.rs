//! Bindings of what `src/wrapper.h` names, by the flags of pkg-config. Nothing at all without feature `dpdk`.

#[cfg(not(feature = "dpdk"))]
fn main() {}

#[cfg(feature = "dpdk")]
fn main() {
    build::main();
}

#[cfg(feature = "dpdk")]
mod build {
    use std::path::PathBuf;
    use std::process::Command;

    const INSTALL: &str =
        "feature `dpdk` needs DPDK 22.11 or later: apt-get install libdpdk-dev pkg-config clang libclang-dev";

    /// Functions that DPDK exports.
    const FUNCTIONS: &[&str] = &[
        "rte_dev_probe",
        "rte_eal_init",
        "rte_eth_dev_adjust_nb_rx_tx_desc",
        "rte_eth_dev_close",
        "rte_eth_dev_configure",
        "rte_eth_dev_get_port_by_name",
        "rte_eth_dev_info_get",
        "rte_eth_dev_set_link_down",
        "rte_eth_dev_set_link_up",
        "rte_eth_dev_set_mtu",
        "rte_eth_dev_socket_id",
        "rte_eth_dev_start",
        "rte_eth_dev_stop",
        "rte_eth_dev_rx_intr_ctl_q",
        "rte_eth_dev_rx_intr_disable",
        "rte_eth_dev_rx_intr_enable",
        "rte_epoll_wait",
        "rte_eth_link_get_nowait",
        "rte_eth_promiscuous_enable",
        "rte_eth_rx_queue_setup",
        "rte_eth_stats_get",
        "rte_eth_tx_queue_setup",
        "rte_get_tsc_hz",
        "rte_mempool_avail_count",
        "rte_pktmbuf_free_bulk",
        "rte_pktmbuf_pool_create",
        "rte_strerror",
    ];

    fn pkg_config(what: &str) -> Vec<String> {
        println!("cargo::rerun-if-env-changed=PKG_CONFIG_PATH");
        let output = Command::new("pkg-config").args([what, "libdpdk"]).output();
        match output {
            Ok(output) if output.status.success() => {
                String::from_utf8_lossy(&output.stdout).split_whitespace().map(str::to_owned).collect()
            }
            Ok(output) => panic!("{INSTALL} (pkg-config: {})", String::from_utf8_lossy(&output.stderr)),
            Err(error) => panic!("{INSTALL} (pkg-config: {error})"),
        }
    }

    pub(super) fn main() {
        println!("cargo::rerun-if-changed=src/wrapper.h");
        println!("cargo::rerun-if-changed=src/wrapper.c");
        let flags = pkg_config("--cflags");
        let mut inlines = cc::Build::new();
        inlines.file("src/wrapper.c").opt_level(3).warnings(false);
        for flag in &flags {
            inlines.flag(flag);
        }
        inlines.compile("limosa_dpdk_inlines");
        for flag in pkg_config("--libs") {
            if let Some(path) = flag.strip_prefix("-L") {
                println!("cargo::rustc-link-search=native={path}");
            } else if let Some(name) = flag.strip_prefix("-l") {
                println!("cargo::rustc-link-lib={name}");
            }
        }
        let mut bindings = bindgen::Builder::default()
            .header("src/wrapper.h")
            .clang_args(&flags)
            .allowlist_function("limosa_.*")
            .allowlist_var("LIMOSA_.*")
            .derive_default(true)
            .generate_comments(false)
            .layout_tests(false);
        for function in FUNCTIONS {
            bindings = bindings.allowlist_function(function);
        }
        let bindings = bindings.generate().unwrap_or_else(|error| panic!("{INSTALL} ({error})"));
        let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets it"));
        bindings.write_to_file(out.join("bindings.rs")).expect("the output directory is writable");
    }
}
