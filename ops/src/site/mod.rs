//! The agent of a site.

pub mod core;
