//! What the demo simulates: the network between the sites and the traffic of all clients and servers.

mod batch;
mod clock;
pub mod wan;
pub mod world;
