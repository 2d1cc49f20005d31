//! Rules of a site, OpenFlow, and the embedded switch.
//!
//! [`core`] is pure: the rule model, the compiler from a site's plan to rules, the marker packet and the
//! driver of one switch. [`ofp`] is the OpenFlow 1.4 codec. [`session`] connects the driver to a switch over
//! a socket. [`softswitch`] is a small OpenFlow switch, usable where no Open vSwitch is wanted.

pub mod core;
mod net;
pub mod ofp;
pub mod ovs;
pub mod session;
pub mod softswitch;

pub use core::compile::{Compiled, GroupPlan, PlanEntry, Ports, SitePlan, Tunnel, compile};
pub use core::driver::{Proof, SENTINEL_SWEEPS};
pub use core::marker::{MarkerError, OldPath, marker_out, marker_packet};
pub use core::rules::{
    Action, FlowMod, Match, PacketIn, PacketOut, PortNo, Rule, RuleKey, RuleSet, Vlan, diff,
};
pub use net::{SwitchAddr, TlsClient, TlsError, TlsMaterial};
pub use session::{InForce, Session, SessionOptions, SwitchEvent, SwitchHandle};
