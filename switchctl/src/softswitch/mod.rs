//! The embedded switch.

pub mod packet;
pub mod pipeline;
