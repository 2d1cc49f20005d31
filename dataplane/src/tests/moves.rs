//! The group machine: states, events, and moves between two workers.

use super::*;
