//! Limosa: live flows move between sites without stopping.
