//! Nouns of the command line.
