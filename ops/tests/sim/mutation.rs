//! Faults of our own, built in on purpose: each must be found by the check that is there for it.

/// What is broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mutation {
    /// An old owner goes on serving under the epoch that it gave away.
    TwoOwners,
    /// A worker uses another outside port now and then.
    PortBent,
    /// A worker gives flows ports of another subscriber's block.
    BlockBent,
    /// A worker gives all flows of a subscriber one port.
    PortShared,
    /// What comes for a closed port is delivered to a client.
    DoorOpen,
    /// A translated packet is lost now and then.
    OutputLost,
    /// A translated packet is sent twice now and then.
    OutputTwice,
    /// The marker is sent before the flip is in force.
    MarkerBeforeFlip,
    /// The target serves before the log says so.
    EarlyTarget,
    /// The switch says that it follows rules that it never got.
    RulesLost,
    /// A worker sends what it does not count.
    Miscounted,
    /// A worker holds whatever comes, and its moves never join, so that it is much.
    HoldsAll,
    /// A worker exports whatever it has, whether the target takes it or not.
    Windowless,
    /// A target's worker is never told to join.
    NeverJoined,
    /// The driver of a switch is not told that time passes.
    DriverTimeless,
    /// Site 3 does not hear that moves between the others end.
    EndUnheard,
}
