//! Bindings to the parts of DPDK that Limosa uses, made by bindgen from the headers that are installed.
//!
//! Everything here is as unsafe as C. Package `limosa-dpdk` is the safe layer, and the only user.
//! Empty without feature `dpdk`.

#[cfg(feature = "dpdk")]
#[allow(
    clippy::all,
    clippy::undocumented_unsafe_blocks,
    dead_code,
    missing_docs,
    non_camel_case_types,
    non_snake_case,
    non_upper_case_globals,
    unnameable_types,
    unreachable_pub,
    unsafe_code,
    unsafe_op_in_unsafe_fn,
    rustdoc::all,
    reason = "generated"
)]
mod bindings {
    include!(concat!(env!("OUT_DIR"), "/bindings.rs"));
}

#[cfg(feature = "dpdk")]
pub use bindings::*;
