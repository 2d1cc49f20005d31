//! Pure parts: input and time in, actions out.

pub mod compile;
pub mod driver;
pub mod jsonrpc;
pub mod marker;
pub mod ovsdb;
pub mod rules;
mod steering;
mod text;
