//! Error types and codes that are sent by name (OpenFlow 1.4, section 7.5.4).

/// Type and code.
pub type Code = (u16, u16);

macro_rules! codes {
    ($($(#[$comment:meta])+ $name:ident = $kind:literal, $code:literal;)+) => {
        $($(#[$comment])+ pub const $name: Code = ($kind, $code);)+
    };
}

codes! {
    /// No common version.
    HELLO_INCOMPATIBLE = 0, 0;
    /// Wrong version.
    BAD_VERSION = 1, 0;
    /// Unknown message type.
    BAD_TYPE = 1, 1;
    /// Unknown multipart type or flags.
    BAD_MULTIPART = 1, 2;
    /// Unknown experimenter.
    BAD_EXPERIMENTER = 1, 3;
    /// Wrong length.
    BAD_LEN = 1, 6;
    /// A buffer that is not there.
    BUFFER_UNKNOWN = 1, 8;
    /// No such table.
    BAD_TABLE_ID = 1, 9;
    /// A slave asked for a change.
    IS_SLAVE = 1, 10;
    /// No such port.
    BAD_PORT = 1, 11;
    /// A packet that is none.
    BAD_PACKET = 1, 12;
    /// A request in several parts that is not put together.
    MULTIPART_OVERFLOW = 1, 13;
    /// Unknown action.
    ACTION_BAD_TYPE = 2, 0;
    /// An action of a wrong length.
    ACTION_BAD_LEN = 2, 1;
    /// Unknown experimenter.
    ACTION_BAD_EXPERIMENTER = 2, 2;
    /// An output port that cannot be.
    BAD_OUT_PORT = 2, 4;
    /// An argument that cannot be.
    ACTION_BAD_ARGUMENT = 2, 5;
    /// More actions than can be done.
    TOO_MANY_ACTIONS = 2, 7;
    /// No such group.
    BAD_OUT_GROUP = 2, 9;
    /// An action on what the match says is not there.
    MATCH_INCONSISTENT = 2, 10;
    /// Setting a field that cannot be set.
    BAD_SET_TYPE = 2, 13;
    /// Setting a field with a wrong length.
    BAD_SET_LEN = 2, 14;
    /// Setting a field to what it cannot be.
    BAD_SET_ARGUMENT = 2, 15;
    /// An instruction that is none.
    INSTRUCTION_UNKNOWN = 3, 0;
    /// An instruction that is not supported.
    INSTRUCTION_UNSUPPORTED = 3, 1;
    /// A table to go to that is not later.
    INSTRUCTION_BAD_TABLE = 3, 2;
    /// Metadata is not supported.
    INSTRUCTION_UNSUPPORTED_METADATA = 3, 3;
    /// Unknown experimenter.
    INSTRUCTION_BAD_EXPERIMENTER = 3, 5;
    /// An instruction of a wrong length.
    INSTRUCTION_BAD_LEN = 3, 7;
    /// An instruction that is there twice.
    INSTRUCTION_DUP = 3, 9;
    /// A match that is not a list of fields.
    MATCH_BAD_TYPE = 4, 0;
    /// A match or field of a wrong length.
    MATCH_BAD_LEN = 4, 1;
    /// Value bits outside the mask.
    MATCH_BAD_WILDCARDS = 4, 5;
    /// A field that is not supported.
    MATCH_BAD_FIELD = 4, 6;
    /// A value that the field never has.
    MATCH_BAD_VALUE = 4, 7;
    /// A mask where there can be none.
    MATCH_BAD_MASK = 4, 8;
    /// A field without what it depends on.
    MATCH_BAD_PREREQ = 4, 9;
    /// A field that is there twice.
    MATCH_DUP_FIELD = 4, 10;
    /// A flow mod failed: table full.
    TABLE_FULL = 5, 1;
    /// A flow mod failed: no such table.
    FLOW_BAD_TABLE = 5, 2;
    /// A flow mod failed: there is a rule that some of its packets are of too.
    FLOW_OVERLAP = 5, 3;
    /// A flow mod failed: timeouts are not supported.
    FLOW_BAD_TIMEOUT = 5, 5;
    /// A flow mod failed: no such command.
    FLOW_BAD_COMMAND = 5, 6;
    /// A flow mod failed: flags that are not supported.
    FLOW_BAD_FLAGS = 5, 7;
    /// A group mod failed: no group can have this number.
    GROUP_INVALID = 6, 1;
    /// A group mod failed: there is no room for groups.
    GROUP_NO_ROOM = 6, 3;
    /// A group mod failed: no such group.
    GROUP_UNKNOWN = 6, 8;
    /// A group mod failed: no such type.
    GROUP_BAD_TYPE = 6, 10;
    /// A group mod failed: no such command.
    GROUP_BAD_COMMAND = 6, 11;
    /// A port mod failed: no such port.
    PORT_BAD_PORT = 7, 0;
    /// A port mod failed: the port has another address.
    PORT_BAD_ADDRESS = 7, 1;
    /// A port mod failed: a setting that is not supported.
    PORT_BAD_CONFIG = 7, 2;
    /// A port mod failed: the port advertises nothing.
    PORT_BAD_ADVERTISE = 7, 3;
    /// A table mod failed: no such table.
    TABLE_BAD_TABLE = 8, 0;
    /// A table mod failed: a setting that is not supported.
    TABLE_BAD_CONFIG = 8, 1;
    /// Queues were asked for: no such port.
    QUEUE_BAD_PORT = 9, 0;
    /// Queues were asked for: no such queue.
    QUEUE_BAD_QUEUE = 9, 1;
    /// Settings of the switch that are not supported.
    CONFIG_BAD_FLAGS = 10, 0;
    /// A role was asked for with an old generation.
    ROLE_STALE = 11, 0;
    /// A role that is none.
    ROLE_BAD_ROLE = 11, 2;
    /// A meter mod failed: no meter can have this number.
    METER_INVALID = 12, 2;
    /// A meter mod failed: no such meter.
    METER_UNKNOWN = 12, 3;
    /// A meter mod failed: no such command.
    METER_BAD_COMMAND = 12, 4;
    /// A meter mod failed: flags that are none.
    METER_BAD_FLAGS = 12, 5;
    /// A meter mod failed: there is no room for meters.
    METER_NO_ROOM = 12, 10;
    /// The features of tables cannot be set.
    TABLE_FEATURES_EPERM = 13, 5;
    /// A property of an unknown type.
    PROPERTY_BAD_TYPE = 14, 0;
    /// A property of a wrong length.
    PROPERTY_BAD_LEN = 14, 1;
    /// A property that is there twice.
    PROPERTY_DUP = 14, 4;
    /// A property of an unknown experimenter.
    PROPERTY_BAD_EXPERIMENTER = 14, 5;
    /// A mask of asynchronous messages with bits that mean nothing.
    ASYNC_INVALID = 15, 0;
    /// Asynchronous messages of an unknown kind.
    ASYNC_UNSUPPORTED = 15, 1;
    /// No bundle with this id.
    BUNDLE_BAD_ID = 17, 2;
    /// The bundle is there already.
    BUNDLE_EXISTS = 17, 3;
    /// The bundle is closed.
    BUNDLE_CLOSED = 17, 4;
    /// Too many bundles.
    BUNDLE_TOO_MANY = 17, 5;
    /// No such bundle request.
    BUNDLE_BAD_TYPE = 17, 6;
    /// Unknown flags, or others than the bundle was opened with.
    BUNDLE_BAD_FLAGS = 17, 7;
    /// A bundled message of a wrong length.
    BUNDLE_MSG_BAD_LEN = 17, 8;
    /// A message whose id is not that of the message around it.
    BUNDLE_BAD_XID = 17, 9;
    /// A message that cannot be bundled.
    BUNDLE_UNSUPPORTED = 17, 10;
    /// Too many messages in a bundle.
    BUNDLE_FULL = 17, 12;
    /// One of the bundle's messages failed.
    BUNDLE_FAILED = 17, 13;
}
