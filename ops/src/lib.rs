//! Limosa: live flows move between sites without stopping. This package joins the parts into one binary.

pub mod address;
pub mod bench;
pub mod causes;
pub mod certs;
pub mod cli;
pub mod clock;
pub mod config;
pub mod demo;
pub mod files;
pub mod http;
pub mod keys;
pub mod lab;
pub mod lock;
pub mod net;
pub mod placement;
pub mod run;
pub mod signals;
pub mod site;
